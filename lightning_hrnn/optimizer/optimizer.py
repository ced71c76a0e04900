"""`HRNN`: the learned rule as a `torch.optim.Optimizer`.

The rule itself is `hierarchical_rnn`; this file gives it parameters, gradients and state, and keeps torch's contract:
closures, parameter groups, `state_dict`, sparse or missing gradients, gradients that are not finite. What is remembered
of each tensor says `state`, what is refused `checks`, and how ranks step their shards of it `sharding`.

Legend: `P` scalar parameters, `T` tensors, `S` timescales, `H0 H1 H2` hidden sizes, `R` readouts, `F` features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import compress
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lightning_hrnn.optimizer.adapt import OtherWeights, adapt_state, carried
from lightning_hrnn.optimizer.checks import (
    check_fit,
    check_gradient,
    check_group,
    check_kind,
    check_members,
    check_one_device,
)
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import StepKernel, TensorWork, check_kernel, choose_kernel
from lightning_hrnn.optimizer.levels import (
    Totals,
    from_above,
    passes,
    step_upper_levels,
    tensor_layout,
    tensor_log_rates,
    upper_state,
)
from lightning_hrnn.optimizer.pretrained import (
    DEFAULT_WEIGHTS,
    FAR,
    fingerprint,
    first_rate,
    horizon,
    load_pretrained,
)
from lightning_hrnn.optimizer.sharding import Ranks, is_sharded, local, local_grad
from lightning_hrnn.optimizer.state import LOOKAHEAD, NOTE, STATE_DTYPES, initial_state, loaded_state, note_of

Rate = Literal["learned", "given"]
LONGEST = 1e30  # of a run, in steps: well within single precision


class HRNN(Optimizer):
    """Train with the learned optimizer of Wichrowska et al. 2017: no learning rate to tune.

    Args:
        params: parameters, or dicts of parameter groups.
        weights: name of shipped weights, path of a `.safetensors` file, or a rule. Weights may name others for models
            of few parameters, as `hrnn-v11` does; these count all parameters that the optimizer is given.
        lr: multiplier of the learned rate, of each group. 1, the rule as trained, if `None`; 0 leaves parameters and
            state alone. Schedulers may move it. With `rate="given"`, the rate itself.
        weight_decay: decoupled decay, of each group: `theta -= lr * rate * weight_decay * theta`, with `rate` the
            tensor's learned rate; the same numbers as for `torch.optim.AdamW` are right.
        rate: `"learned"`, or `"given"`: `lr` *is* the root mean square of every tensor's update, before weight decay,
            and the rule supplies direction and timescales alone. For who wants a schedule of their own; a third to
            a tenth of the rate that is best for Adam.
        initial_rate: first learned rate, of each group: root mean square of a tensor's first update. The weights'
            own if `None`.
        kernel: how the step is computed, `"auto"` or a name of `available_kernels()`.
        state_dtype: of hidden states and averages, `torch.float32` or `torch.bfloat16`.
        other_weights: what becomes of a saved state made with other weights: `"refuse"` is an error, `"adapt"` keeps
            averages and learned rates, starts the hidden states anew, and warns.

    Attributes:
        cooldown: a second multiplier, of all groups, for who knows how far the run has come; see
            `optimizer.schedule.cooldown`. 1 unless set.
        run_length: steps of the run, for who knows it and lets `cooldown` fall to 0 at its end; weights may read it,
            as `hrnn-v11` does. 0, unknown, unless set. Like `cooldown` it is no part of
            the state dict.

    Raises:
        ValueError: a parameter is complex, an argument is out of range, or the weights are unknown.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = HRNN(model.parameters())
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()

    Reference:
        Learned Optimizers that Scale and Generalize, https://arxiv.org/abs/1703.04813
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        weights: str | Path | HierarchicalRNN = DEFAULT_WEIGHTS,
        lr: float | None = None,
        weight_decay: float = 0.0,
        *,
        rate: Rate = "learned",
        initial_rate: float | None = None,
        kernel: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        other_weights: OtherWeights = "refuse",
    ) -> None:
        if other_weights not in (choices := get_args(OtherWeights)):
            raise ValueError(f"other_weights must be one of {choices}, not {other_weights!r}.")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {list(STATE_DTYPES)}, not {state_dtype}.")
        if rate not in (choices := get_args(Rate)):
            raise ValueError(f"rate must be one of {choices}, not {rate!r}.")
        if rate == "given" and initial_rate is not None:
            raise ValueError("With rate='given' there is no learned rate to begin: drop initial_rate, and set lr.")
        self._weights = deepcopy(weights) if isinstance(weights, HierarchicalRNN) else load_pretrained(weights)
        self._weights_name = "custom" if isinstance(weights, HierarchicalRNN) else str(weights)
        self._rate, self._given = rate, dict[Tensor, float]()  # the second: log rates as put, with `rate="given"`
        self._kernel_name, self._state_dtype = kernel, state_dtype
        self._other_weights = other_weights
        check_kernel(kernel)  # now, not at the first step
        self._used: HierarchicalRNN | None = None  # chosen once all groups are known
        self._ranks = Ranks()
        self._true_weights: dict[Tensor, Tensor] = {}  # this rank's shards
        self._skipped = self._taken = 0
        self.far_is_known = False  # somebody has warned of a run far beyond the horizon of the weights
        self._unread: Tensor | None = None  # skipped steps that the device has counted since
        self._cooldown, self._run_length = 1.0, 0.0
        if lr is None:
            lr = 1.0 if rate == "learned" else math.nan  # which check_group refuses
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "initial_rate": initial_rate})
        self._choose_rule()

    @property
    def cooldown(self) -> float:
        """Return the second multiplier of all groups."""
        return self._cooldown

    @cooldown.setter
    def cooldown(self, multiplier: float) -> None:
        if not isinstance(multiplier, Real) or not 0 <= multiplier < math.inf:
            raise ValueError(f"cooldown is a multiplier of learned rates, from 0 upwards, and not {multiplier!r}.")
        self._cooldown = float(multiplier)

    @property
    def run_length(self) -> float:
        """Return the steps of the run, 0 where nobody knows."""
        return self._run_length

    @run_length.setter
    def run_length(self, steps: float) -> None:
        if not isinstance(steps, Real) or not 0 <= steps <= LONGEST:
            raise ValueError(f"run_length is a number of steps, 0 where nobody knows it, and not {steps!r}.")
        self._run_length = float(steps)

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their state.

        Raises:
            ValueError: a parameter is complex, or `lr`, `weight_decay` or `initial_rate` is out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            self._ranks = Ranks.of([param for group in self.param_groups for param in group["params"]])
        except ValueError:
            self.param_groups.pop()
            raise
        if self._used is not None and not self._choose_rule():
            self._begin_group(group)

    def _choose_rule(self) -> bool:
        """Take the rule for a model of this size; tell whether it is another one, by which all groups have then begun.

        Hidden states of the other rule begin anew, as `adapt_state` has it.
        """
        params = sum(param.numel() for group in self.param_groups for param in group["params"])
        if (rule := self._weights.for_model(params)) is self._used:
            return False
        before = dict(self.state)
        self._use(rule)
        self.state.clear()
        for group in self.param_groups:
            self._begin_group(group)
        for param, values in before.items():
            if values["age"] > 0:
                self.state[param] = carried(values, self.state[param])
        return True

    def _use(self, rule: HierarchicalRNN) -> None:
        """Step by a rule from now on."""
        self._used = rule
        self._rules = {torch.device("cpu"): _frozen(rule if self._rate == "learned" else rule.without_rate())}
        self._kernels: dict[str, StepKernel] = {}
        self._fingerprint, self._first_rate = fingerprint(rule), first_rate(rule)
        self._given.clear()

    def _begin_group(self, group: dict[str, Any]) -> None:
        """Give the parameters of a group their state."""
        log_rate = math.log(group["initial_rate"] or self._first_rate)
        for param in group["params"]:
            rule = self._rule_on(param.device)
            self.state[param] = initial_state(param, rule, log_rate, self._global_hidden(rule), self._state_dtype)

    def _global_hidden(self, rule: HierarchicalRNN) -> Tensor:
        """Return the model's global state, which a tensor that joins late shares from its first step."""
        for state in self.state.values():
            return state["global_hidden"].clone()
        return rule.global_rnn.initial.clone()

    def _rule_on(self, device: torch.device) -> HierarchicalRNN:
        if device not in self._rules:
            self._rules[device] = deepcopy(self._rules[torch.device("cpu")]).to(device)
        return self._rules[device]

    def _kernel_on(self, device_type: str) -> StepKernel:
        """Return the kernel for a kind of device, looked for once: the search asks the file system for a compiler."""
        if device_type not in self._kernels:
            rule = self._rules[torch.device("cpu")]
            self._kernels[device_type] = choose_kernel(self._kernel_name, rule, device_type)
        return self._kernels[device_type]

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model, computes gradients and returns the loss; called once, first, with gradients
                enabled and, if the weights use attention, at the attended point.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.attend():
                loss = closure()
        self.end_attention()
        self._advance()
        return loss

    def _advance(self) -> None:
        """Move the parameters by the gradients they have."""
        params, work, proceed = self._members()
        if params:
            self._update(params, work, proceed)
            self._count_taken()

    def _count_taken(self) -> None:
        """Count the step, and warn once where the learned rates are beyond all that was measured of them."""
        self._taken += 1
        longest = horizon(self.card)
        if self._rate == "learned" and not self.far_is_known and self._taken > FAR * longest:
            self.far_is_known = True
            warnings.warn(
                f"HRNN has taken {self._taken:,} steps with the weights {self.weights_name!r}, which were meta-trained "
                f"on runs of at most {longest:,.0f}. Whether their learned rates are right so far out nobody has "
                "measured: watch them, with log_rates(), let lr fall, or go on with rate='given' and a schedule of "
                "your own.",
                UserWarning,
                stacklevel=6,
            )

    def _members(self) -> tuple[list[Tensor], list[TensorWork], Tensor | None]:
        """Return the parameters that move in this step, on every rank the same; none if a gradient is not finite.

        Whether all are finite is known at once on the CPU and where ranks must agree. On another device a flag says it,
        the last of what is returned, and the device counts the step if it is skipped: nobody waits.
        """
        members = []
        for group in self.param_groups:
            if float(group["lr"]) * self.cooldown == 0:
                continue
            for index, param in enumerate(group["params"]):
                check_gradient(index, param)
                if param.numel() and (param.grad is not None or self._ranks.several):
                    members.append((param, group, local_grad(param)))
        if not members:
            return [], [], None
        check_one_device([param for param, *_ in members])
        device = members[0][0].device
        moves, finite = self._ranks.agree([grad for *_, grad in members], device, wait=_waits_for(device))
        proceed = finite if isinstance(finite, Tensor) else None
        if proceed is not None:
            if self._unread is None or self._unread.device != device:
                self._unread = torch.zeros((), dtype=torch.int64, device=device)
            self._unread.add_(proceed.logical_not())
        elif not finite:
            self._count_skipped()
            return [], [], None
        members = list(compress(members, moves))
        return [param for param, *_ in members], [self._work(*member) for member in members], proceed

    def _count_skipped(self, count: int = 1) -> None:
        """Count skipped steps, and warn the first time."""
        self._skipped += count
        if self._skipped == count:
            warnings.warn(
                "HRNN skipped a step, because a gradient was not finite; parameters and state stay as they were. "
                "Later ones are only counted, in HRNN.skipped_steps. If many steps are skipped, look for the "
                "operation that overflows: torch.autograd.set_detect_anomaly(True) finds it.",
                UserWarning,
                stacklevel=4,
            )

    def _work(self, param: Tensor, group: dict[str, Any], grad: Tensor | None) -> TensorWork:
        state = self.state[param]
        shard, lookahead = local(param), state.get(LOOKAHEAD)
        lr = float(group["lr"]) * self.cooldown
        if self._rate == "given":
            self._put_rate(param, math.log(lr))
            lr = 1.0
        return TensorWork(
            param=shard,
            grad=torch.zeros_like(shard) if grad is None else grad,  # where other ranks alone have one
            hidden=local(state["hidden"]),
            average=local(state["average"]),
            square=local(state["square"]),
            log_rate=local(state["log_rate"]),
            lookahead=None if lookahead is None else local(lookahead),
            lr=lr,
            weight_decay=float(group["weight_decay"]),
        )

    def _put_rate(self, param: Tensor, log_rate: float) -> None:
        if self._given.get(param) != log_rate:
            local(self.state[param]["log_rate"]).fill_(log_rate)
            self._given[param] = log_rate

    def _update(self, params: Sequence[Tensor], work: Sequence[TensorWork], proceed: Tensor | None) -> None:
        """Take every level's step: see `HierarchicalRNN.forward`, whose order this follows."""
        rule = self._rule_on(params[0].device)
        kernel = self._kernel_on(params[0].device.type)
        states, layout = [self.state[param] for param in params], tensor_layout(params)
        before = upper_state(states, rule, self._ranks, self.run_length)
        above, totals = from_above(rule, before, layout)._replace(proceed=proceed), Totals(rule, work, before, layout)
        for parts in passes(work, together=self._ranks.several):
            pending = []
            for part in parts:
                sums, left = kernel.measure(rule, work[part], above.part(part))
                totals.put(part, sums)
                pending.append(left)
            self._ranks.sum(totals.values)
            for part, left in zip(parts, pending, strict=True):
                kernel.apply(work[part], left, totals.scales(part), totals.limits(part))
        step_upper_levels(rule, before, totals, layout, states, list(self.state.values()), proceed)
        increment_version([param for param in params if is_sharded(param)])  # their shards have moved

    # ------------------------------------------------------------------ attention

    @property
    def uses_attention(self) -> bool:
        """Tell whether the weights choose where the gradient is taken."""
        return "attention" in self._rules[torch.device("cpu")].config.readouts

    @contextmanager
    def attend(self) -> Iterator[None]:
        """Take gradients at the attended point within, as the weights may ask; nothing happens if they do not.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = HRNN(model.parameters())
            >>> with optimizer.attend():
            ...     model(torch.ones(3, 4)).square().mean().backward()
            >>> optimizer.step()
        """
        begun = not self._true_weights
        self.begin_attention()
        try:
            yield
        finally:
            if begun:
                self.end_attention()

    @torch.no_grad()
    def begin_attention(self) -> None:
        """Move the parameters to the attended point, if the weights use attention and they are not there yet."""
        if not self.uses_attention or self._true_weights:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if float(group["lr"]) and param.requires_grad:
                    self._true_weights[param] = local(param).clone()
                    local(param).sub_(local(self.state[param][LOOKAHEAD]))

    @torch.no_grad()
    def end_attention(self) -> None:
        """Put the true weights back, bit for bit."""
        for param, value in self._true_weights.items():
            local(param).copy_(value)
        self._true_weights.clear()

    # ------------------------------------------------------------------ what can be read

    @property
    def skipped_steps(self) -> int:
        """Count the steps skipped because a gradient was not finite; on a GPU this waits for the steps taken so far."""
        if self._unread is not None and (count := int(self._unread)):
            self._unread.zero_()
            self._count_skipped(count)
        return self._skipped

    @property
    def weights_name(self) -> str:
        """Name the weights in use: for a small model those that the given weights name for it."""
        if self._used is None or self._used is self._weights:
            return self._weights_name
        return str(self._used.card.get("name", "custom"))

    @property
    def rule(self) -> HierarchicalRNN:
        """Return the rule, on the CPU, to be read only."""
        return self._rules[torch.device("cpu")]

    @property
    def card(self) -> dict[str, Any]:
        """Say how the weights came about; empty for a rule that was not loaded."""
        return self._rules[torch.device("cpu")].card

    def log_rates(self) -> list[Tensor]:
        """Return the natural log of the learned rate of each tensor (its mean), in order of parameters. [T]"""
        states = [self.state[param] for group in self.param_groups for param in group["params"]]
        return list(tensor_log_rates(states, self._rules[torch.device("cpu")], self._ranks).unbind())

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with a note of the weights it belongs to."""
        result = super().state_dict()
        note = {"weights": self.weights_name, "sha256": self._fingerprint, "skipped_steps": self.skipped_steps}
        result[NOTE] = result["param_groups"][0][NOTE] = note  # see `note_of`
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a state, keeping its precision; the argument is left as it is.

        Raises:
            ValueError: the state is another optimizer's, or belongs to other weights, or does not fit.
        """
        self._choose_rule()  # Lightning's finetuning, where it resumes, has put its groups here without adding them
        params = [param for group in self.param_groups for param in group["params"]]
        fresh = {param: self.state[param] for param in params}
        saved: dict[str, Any] = {}

        def check(_: Optimizer, hooked: dict[str, Any]) -> None:
            saved.update(self._checked(hooked))
            self.end_attention()

        def restore(_: Optimizer) -> None:
            self._restore(saved, fresh)

        # The last of the hooks before, and the first of those after: both sides see what the user's hooks make of it.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state that fits this optimizer, or refuse it."""
        check_kind(state_dict)
        note, notice = note_of(state_dict), ""
        theirs = str(note.get("sha256"))
        if note and theirs != self._fingerprint:
            differ = (
                f"This state was made with the weights {note.get('weights')!r} ({theirs[:12]}), and the optimizer "
                f"has {self.weights_name!r} ({self._fingerprint[:12]})."
            )
            if self._other_weights == "refuse":
                raise ValueError(
                    f"{differ} Build it with the same weights to resume, or with other_weights='adapt' to keep the "
                    "averages and the learned rates and start the hidden states anew."
                )
            state_dict = adapt_state(state_dict, self.state_dict())
            notice = f"{differ} Averages, learned rates and ages are kept; the hidden states start anew."
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        check_members(state_dict["state"].keys(), saved_ids)
        for index, param in zip(saved_ids, params, strict=False):
            check_fit(param, self.state[param], state_dict["state"].get(index, {}))
        if notice:
            warnings.warn(notice, stacklevel=4)
        return state_dict

    def _restore(self, saved: dict[str, Any], fresh: dict[Tensor, dict[str, Any]]) -> None:
        """Put the saved values in the place of what torch made of them, which has the parameters' precision."""
        saved_ids = [index for group in saved["param_groups"] for index in group["params"]]
        for index, (param, like) in zip(saved_ids, fresh.items(), strict=True):
            values = saved["state"].get(index)
            self.state[param] = like if values is None else loaded_state(values, like)
        for group in self.param_groups:
            group.pop(NOTE, None)
        self._given.clear()
        self._unread = None
        self._taken = int(max(float(self.state[param]["age"]) for param in fresh)) if fresh else 0
        self._skipped = int(note_of(saved).get("skipped_steps", 0))

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, unlike torch's own, so that copies and pickles work.

        Except hooks; kernels and ranks, which belong to a process; and the `step` that torch's schedulers put on the
        instance, which would step the original.
        """
        left_out = {key for key in self.__dict__ if key.endswith("_hooks")} | {"step", "_ranks"}
        kept = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return kept | {"_kernels": {}, "_given": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on what `__getstate__` returned, and find the ranks again."""
        super().__setstate__(state)
        self._ranks = Ranks.of([param for group in self.param_groups for param in group["params"]])


def _waits_for(device: torch.device) -> bool:
    """Tell whether a value on a device can be looked at without stopping what is under way."""
    return device.type == "cpu"


def _frozen(rule: HierarchicalRNN) -> HierarchicalRNN:
    """Copy a rule for use, in single precision, on the CPU, without gradients."""
    card = rule.card
    copy = deepcopy(rule).float().cpu().requires_grad_(False).eval()
    copy.card, copy.small = card, None  # which of the two it is, is settled
    return copy
