"""`HRNN`: the learned rule as a `torch.optim.Optimizer`.

The rule itself is `hierarchical_rnn`; this file gives it parameters, gradients and state, and keeps torch's contract:
closures, parameter groups, `state_dict`, sparse or missing gradients, gradients that are not finite.

State of each parameter tensor (all in single precision unless `state_dtype` says otherwise), in `optimizer.state[p]`:

=============== =============== ================================================
`hidden`        `[H0, *shape]`  param RNN
`average`       `[S, *shape]`   gradient averages
`square`        `[S, *shape]`   mean squares of the averages
`log_rate`      `[]`            log of the learned rate (`[*shape]` for a rule with a rate of each parameter)
`tensor_hidden` `[H1]`          tensor RNN
`global_hidden` `[H2]`          global RNN: one for the model, repeated with each tensor
`age`           `[]`            steps this tensor has taken
`lookahead`     `[*shape]`      with attention only: true weights less the attended ones
=============== =============== ================================================

Legend: `P` scalar parameters, `T` tensors, `S` timescales, `H0 H1 H2` hidden sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hrnn.optimizer.adapt import adapt_state
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import RMS_FLOOR, HierarchicalRNN, ParamLevel, RuleState
from lightning_hrnn.optimizer.kernels import FromAbove, StepKernel, Sums, TensorWork, choose_kernel
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, fingerprint, load_pretrained

GROUP_SIZE = 4_194_304  # parameters measured before they are applied: bounds what lies between the two passes
STATE_DTYPES = (torch.float32, torch.bfloat16)
OTHER_WEIGHTS = ("refuse", "adapt")
STATE_KEYS = ("hidden", "average", "square", "log_rate", "tensor_hidden", "global_hidden", "age")


class HRNN(Optimizer):
    """Train with the learned optimizer of Wichrowska et al. 2017: no learning rate to tune.

    Args:
        params: parameters, or dicts of parameter groups.
        weights: name of shipped weights, path of a `.safetensors` file, or a rule.
        lr: multiplier of the learned rate, of each group. 1 is the rule as trained; 0 leaves parameters and state
            alone. Schedulers may move it.
        weight_decay: decoupled decay, of each group: `theta -= lr * rate * weight_decay * theta`, with `rate` the
            tensor's learned rate; the same numbers as for `torch.optim.AdamW` are right.
        initial_rate: first learned rate, of each group: root mean square of a tensor's first update. The weights'
            own if `None`.
        kernel: how the step is computed, `"auto"` or a name of `available_kernels()`.
        state_dtype: of hidden states and averages, `torch.float32` or `torch.bfloat16`.
        other_weights: what becomes of a saved state made with other weights: `"refuse"` is an error, `"adapt"` keeps
            averages and learned rates, starts the hidden states anew, and warns.

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
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        initial_rate: float | None = None,
        kernel: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        other_weights: str = "refuse",
    ) -> None:
        if other_weights not in OTHER_WEIGHTS:
            raise ValueError(f"other_weights must be one of {list(OTHER_WEIGHTS)}, not {other_weights!r}.")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {list(STATE_DTYPES)}, not {state_dtype}.")
        rule = weights if isinstance(weights, HierarchicalRNN) else load_pretrained(weights)
        self._rules = {torch.device("cpu"): _frozen(rule)}
        self._weights_name = "custom" if isinstance(weights, HierarchicalRNN) else str(weights)
        self._fingerprint = fingerprint(rule)
        self._first_rate = float(rule.card.get("initial_rate", 1e-3))
        self._kernel_name, self._state_dtype = kernel, state_dtype
        self._other_weights = other_weights
        choose_kernel(kernel, rule, "cpu")  # an unknown name is an error now, not at the first step
        self._kernels: dict[str, StepKernel] = {}
        self._true_weights: dict[Tensor, Tensor] = {}
        self._skipped = 0
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "initial_rate": initial_rate})

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their state.

        Raises:
            ValueError: a parameter is complex, or `lr`, `weight_decay` or `initial_rate` is out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._init_state(param, group["initial_rate"])

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "weight_decay"):
            if not 0 <= float(group[key]) < math.inf:
                raise ValueError(f"{key} must be zero or more, not {group[key]}.")
        rate = group["initial_rate"]
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"initial_rate must be positive, not {rate}.")
        for index, param in enumerate(group["params"]):
            if hasattr(param, "placements"):
                raise ValueError(
                    f"Parameter {index} of shape {list(param.shape)} is a DTensor, and HRNN's statistics do not span "
                    "the shards of a tensor yet. Train with DDP, or give this parameter to another optimizer."
                )
            if param.is_complex():
                raise ValueError(
                    f"Parameter {index} of shape {list(param.shape)} is complex, and the rule is defined for real "
                    "numbers. Optimize torch.view_as_real of it, or give it to another optimizer."
                )

    def _init_state(self, param: Tensor, initial_rate: float | None) -> None:
        rule = self._rule_on(param.device)
        config = rule.config
        log_rate = math.log(initial_rate or self._first_rate)

        def full(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((rows, *param.shape), dtype=dtype, device=param.device)

        hidden = full(config.param_hidden, self._state_dtype)
        hidden += rule.param_rnn.initial.view(-1, *[1] * param.dim())
        rate_shape = param.shape if rule.rate_per_param else ()
        self.state[param] = {
            "hidden": hidden,
            "average": full(config.timescales, self._state_dtype),
            "square": full(config.timescales, self._state_dtype),
            "log_rate": torch.full(rate_shape, log_rate, device=param.device),
            "tensor_hidden": rule.tensor_rnn.initial.clone(),
            "global_hidden": self._global_hidden(rule),
            "age": torch.zeros((), device=param.device),
        }
        if self.uses_attention:
            self.state[param]["lookahead"] = torch.zeros_like(param, memory_format=torch.contiguous_format)

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
        params, groups = self._members()
        if params and self._gradients_are_finite(params):
            self._update(params, groups)
        return loss

    def _members(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return the parameters that move in this step, with their groups."""
        params, groups = [], []
        for group in self.param_groups:
            if float(group["lr"]) == 0:
                continue
            for index, param in enumerate(group["params"]):
                if param.grad is None or param.numel() == 0:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"The gradient of parameter {index} of shape {list(param.shape)} is sparse, and HRNN needs "
                        "dense ones. Build the embedding with sparse=False, or give this parameter to "
                        "torch.optim.SparseAdam."
                    )
                params.append(param)
                groups.append(group)
        return params, groups

    def _gradients_are_finite(self, params: Sequence[Tensor]) -> bool:
        """Check all gradients; if one is not finite, count a skipped step and warn the first time."""
        largest = torch._foreach_norm([param.grad for param in params if param.grad is not None], math.inf)
        if bool(torch.stack([value.isfinite() for value in largest]).all()):  # one synchronisation
            return True
        self._skipped += 1
        if self._skipped == 1:
            warnings.warn(
                "HRNN skipped a step, because a gradient was not finite; parameters and state stay as they were. "
                "Later ones are only counted, in HRNN.skipped_steps. If many steps are skipped, look for the "
                "operation that overflows: torch.autograd.set_detect_anomaly(True) finds it.",
                UserWarning,
                stacklevel=3,
            )
        return False

    def _update(self, params: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """Take every level's step: see `HierarchicalRNN.forward`, whose order this follows."""
        if len(devices := {str(param.device) for param in params}) > 1:
            raise RuntimeError(
                f"The parameters lie on several devices, {sorted(devices)}, and an HRNN steps those of one: give the "
                "parameters of each device an optimizer of their own."
            )
        rule = self._rule_on(params[0].device)
        kernel = self._kernel_on(params[0].device.type)
        state, layout = self._upper_state(params, rule), _tensor_layout(params)
        above = FromAbove(
            bias=rule.param_bias(state, layout),
            log_rate=state.log_rate,
            mean_log_rate=layout.to_tensors(layout.mean_per_model(state.log_rate)),
            remembers=(state.age > 0).to(state.age.dtype),
        )
        sums = []
        for part in _parts(params):
            work = [self._work(param, group) for param, group in zip(params[part], groups[part], strict=True)]
            measured, pending = kernel.measure(rule, work, FromAbove(*(value[..., part] for value in above)))
            mean_square = measured.squares / layout.params_in[part]
            kernel.apply(work, pending, (mean_square + RMS_FLOOR).rsqrt())
            sums.append(measured)
        total = Sums(*(torch.cat(values, -1) for values in zip(*sums, strict=True)))
        self._step_upper_levels(rule, params, state, total, layout)

    def _work(self, param: Tensor, group: dict[str, Any]) -> TensorWork:
        state = self.state[param]
        if param.grad is None:
            raise RuntimeError("A parameter lost its gradient during the step.")
        return TensorWork(
            param=param,
            grad=param.grad,
            hidden=state["hidden"],
            average=state["average"],
            square=state["square"],
            log_rate=state["log_rate"],
            lookahead=state.get("lookahead"),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
        )

    def _upper_state(self, params: Sequence[Tensor], rule: HierarchicalRNN) -> RuleState:
        """Gather what the tensor and global levels remember; the param level's state stays where it is."""
        states = [self.state[param] for param in params]
        log_rates = [state["log_rate"] for state in states]
        if rule.rate_per_param:
            log_rates = [value.mean() for value in log_rates]
        empty = log_rates[0].new_empty(0)
        return RuleState(
            hidden=empty,
            average=empty,
            square=empty,
            log_rate=torch.stack(log_rates),
            tensor_hidden=torch.stack([state["tensor_hidden"] for state in states], 1),
            global_hidden=states[0]["global_hidden"][:, None],
            age=torch.stack([state["age"] for state in states]),
        )

    def _step_upper_levels(
        self, rule: HierarchicalRNN, params: Sequence[Tensor], state: RuleState, sums: Sums, layout: Layout
    ) -> None:
        empty = state.hidden
        pooled = sums.pooled / layout.params_in
        param_rms = (sums.param_square / layout.params_in).sqrt()
        level = ParamLevel(empty, empty, empty, pooled, empty, log_rate=None)
        after = rule.upper_levels(level, param_rms, state, layout)
        states = [self.state[param] for param in params]
        for key, values in (("tensor_hidden", after.tensor_hidden.unbind(1)), ("age", after.age.unbind())):
            torch._foreach_copy_([state[key] for state in states], list(values))
        if not rule.rate_per_param:
            torch._foreach_copy_([state["log_rate"] for state in states], list(after.log_rate.unbind()))
        shared = [state["global_hidden"] for state in self.state.values()]
        torch._foreach_copy_(shared, [after.global_hidden[:, 0]] * len(shared))

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
                    self._true_weights[param] = param.detach().clone()
                    param.sub_(self.state[param]["lookahead"])

    @torch.no_grad()
    def end_attention(self) -> None:
        """Put the true weights back, bit for bit."""
        for param, value in self._true_weights.items():
            param.copy_(value)
        self._true_weights.clear()

    # ------------------------------------------------------------------ what can be read

    @property
    def skipped_steps(self) -> int:
        """Count the steps skipped because a gradient was not finite."""
        return self._skipped

    @property
    def weights_name(self) -> str:
        """Name the weights."""
        return self._weights_name

    @property
    def card(self) -> dict[str, Any]:
        """Say how the weights came about; empty for a rule that was not loaded."""
        return self._rules[torch.device("cpu")].card

    def log_rates(self) -> list[Tensor]:
        """Return the natural log of the learned rate of each tensor (its mean), in order of parameters. [T]"""
        params = [param for group in self.param_groups for param in group["params"]]
        return [self.state[param]["log_rate"].mean() for param in params]

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with a note of the weights it belongs to."""
        result = super().state_dict()
        result["hrnn"] = {"weights": self._weights_name, "sha256": self._fingerprint, "skipped_steps": self._skipped}
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a state, keeping its precision; the argument is left as it is.

        Raises:
            ValueError: the state is another optimizer's, or belongs to other weights, or does not fit.
        """
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
        note, notice = state_dict.get("hrnn", {}), ""
        _check_state(state_dict)
        theirs = str(note.get("sha256"))
        if note and theirs != self._fingerprint:
            differ = (
                f"This state was made with the weights {note.get('weights')!r} ({theirs[:12]}), and the optimizer "
                f"has {self._weights_name!r} ({self._fingerprint[:12]})."
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
        for index, param in zip(saved_ids, params, strict=False):
            self._check_fit(param, state_dict["state"].get(index, {}))
        if notice:
            warnings.warn(notice, stacklevel=4)
        return state_dict

    def _restore(self, saved: dict[str, Any], fresh: dict[Tensor, dict[str, Any]]) -> None:
        """Put the saved values in the place of what torch made of them, which has the parameters' precision."""
        saved_ids = [index for group in saved["param_groups"] for index in group["params"]]
        for index, (param, like) in zip(saved_ids, fresh.items(), strict=True):
            values = saved["state"].get(index)
            self.state[param] = (
                like if values is None else {key: _converted(value, like.get(key)) for key, value in values.items()}
            )
        self._skipped = int(saved.get("hrnn", {}).get("skipped_steps", 0))

    def _check_fit(self, param: Tensor, saved: dict[str, Any]) -> None:
        for key, value in self.state[param].items():
            if key in saved and saved[key].shape != value.shape:
                raise ValueError(
                    f"The saved {key} has shape {list(saved[key].shape)} where a parameter of shape "
                    f"{list(param.shape)} needs {list(value.shape)}: the model or the weights differ from those saved."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, unlike torch's own, so that copies and pickles work.

        Except hooks; kernels, which belong to a process; and the `step` that torch's schedulers put on the instance,
        which would step the original.
        """
        left_out = {key for key in self.__dict__ if key.endswith("_hooks")} | {"step"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out} | {"_kernels": {}}


def _frozen(rule: HierarchicalRNN) -> HierarchicalRNN:
    """Copy a rule for use, in single precision, on the CPU, without gradients."""
    card = rule.card
    copy = deepcopy(rule).float().cpu().requires_grad_(False).eval()
    copy.card = card
    return copy


def _tensor_layout(params: Sequence[Tensor]) -> Layout:
    """Describe the tensors of one model to the upper levels, which do not look at single parameters."""
    device = params[0].device
    return Layout(
        tensor_of=torch.empty(0, dtype=torch.int64, device=device),
        model_of=torch.zeros(len(params), dtype=torch.int64, device=device),
        params_in=torch.tensor([float(param.numel()) for param in params], device=device),
        tensors_in=torch.tensor([float(len(params))], device=device),
    )


def _parts(params: Sequence[Tensor]) -> Iterator[slice]:
    """Divide tensors into runs of about `GROUP_SIZE` parameters."""
    start = count = 0
    for index, param in enumerate(params):
        if index > start and count + param.numel() > GROUP_SIZE:
            yield slice(start, index)
            start, count = index, 0
        count += param.numel()
    yield slice(start, len(params))


def _converted(value: Any, like: Tensor | None) -> Any:
    """Copy a saved value to where and in the precision it is kept."""
    if not isinstance(value, Tensor) or like is None:
        return deepcopy(value)
    return value.detach().to(device=like.device, dtype=like.dtype, copy=True)


def _check_state(state_dict: dict[str, Any]) -> None:
    """Refuse what is not the state of an `HRNN`."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"This is not an optimizer's state: it has the keys {sorted(map(str, state_dict))}.")
    for index, state in state_dict["state"].items():
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ValueError(
                f"This is not the state of HRNN: parameter {index} has {sorted(map(str, state))} and lacks {missing}. "
                "It looks like another optimizer's; load it into that one, or start HRNN without it."
            )
    if any("initial_rate" not in group for group in state_dict["param_groups"]):  # SGD's state may be empty
        raise ValueError(
            "This is not the state of HRNN: its param groups have no initial_rate. It looks like another optimizer's; "
            "load it into that one, or start HRNN without it."
        )
