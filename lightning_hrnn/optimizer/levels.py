"""The tensor and global level of an optimizer's step, and the sums over whole tensors that they see.

The param level is the kernels'. Its sums over tensors lie in one buffer, `Totals`: the levels above take means from it,
and so do the directions, which are divided by their root mean square over the tensor before they are applied.

Legend: `T` tensors of the step, `R` readouts, `H0 H1 H2` hidden sizes, `F` features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lightning_hrnn.optimizer.features import Layout, smallness
from lightning_hrnn.optimizer.hierarchical_rnn import RMS_FLOOR, HierarchicalRNN, ParamLevel
from lightning_hrnn.optimizer.kernels import FromAbove, Sums, TensorWork, where
from lightning_hrnn.optimizer.rule_state import RuleState
from lightning_hrnn.optimizer.sharding import Ranks, local
from lightning_hrnn.optimizer.state import GRADIENT_SIZE, LOG_PEAK

NO_LIMIT = 1e30  # that multipliers of rates do not make infinite, or not a number
GROUP_SIZE = 4_194_304  # parameters measured before they are applied: bounds what lies between the two passes

States = Sequence[dict[str, Tensor]]


class Totals:
    """Sums over tensors, in one buffer: on this rank until the ranks have added them up.

    Args:
        rule: the update rule, which says how many sums there are.
        work: the tensors, in order.
        before: what the upper levels remember.
        layout: of the tensors.
    """

    def __init__(self, rule: HierarchicalRNN, work: Sequence[TensorWork], before: RuleState, layout: Layout) -> None:
        like = rule.param_rnn.gate_weight
        self.rule, self.before, self.layout = rule, before, layout
        self.rows = [like.shape[1], len(rule.directions), 1, 1, 1]
        self.values = like.new_zeros(sum(self.rows), len(work))
        if rule.sees_gradient_size:
            self.values[-2] = _squares([tensor.grad for tensor in work])
        self.values[-1] = _counts(tuple(tensor.param.numel() for tensor in work), like.device)

    def put(self, part: slice, sums: Sums) -> None:
        """Note the sums of some tensors."""
        self.values[:-2, part] = torch.cat([sums.pooled, sums.squares, sums.param_square[None]])

    @property
    def count(self) -> Tensor:
        """Number of parameters that were added up. [T]"""
        return self.values[-1]

    def means(self) -> Sums:
        """Divide by the count."""
        pooled, squares, param_square, *_ = (self.values / self.count).split(self.rows)
        return Sums(pooled, squares, param_square[0])

    @cached_property
    def noted(self) -> tuple[RuleState, Tensor | None]:
        """What `HierarchicalRNN.with_gradient_size` returns for all tensors; for when the ranks have added up."""
        return self.rule.with_gradient_size(self.values[-2] / self.count, self.before)

    @cached_property
    def paced(self) -> Tensor | None:
        """What `BoundedRate.paced` returns for all tensors, if the rule asks."""
        rate = self.rule.pacing_rate
        return None if rate is None else rate.paced(self.before, self.layout)

    def scales(self, part: slice) -> Tensor:
        """Return what directions are multiplied by, before their rate. [R, T of the part]"""
        squares = self.values.split(self.rows)[1][:, part]
        scales = torch.ones_like(squares)
        if "output_scaling" not in self.rule.config.without:
            scales = (squares / self.count[part] + RMS_FLOOR).rsqrt()
        if (rate := self.rule.rate_by_peak) is not None and (below := self.noted[1]) is not None:
            scales = scales * rate.slowed(below[part], self.before.run_length[part])
        if self.paced is not None:
            scales = scales * self.paced[part]
        return self._reaching(scales)

    def limits(self, part: slice) -> Tensor:
        """Return how far a parameter may move, before its group's multiplier. [R, T of the part]"""
        _, squares, param_square, *_ = self.values[:, part].split(self.rows)
        limits = self.rule.step_limits((param_square[0] / self.count[part]).sqrt())
        if limits is None:
            return torch.full_like(squares, NO_LIMIT)
        return self._reaching(limits.expand_as(squares)).abs()

    def _reaching(self, rows: Tensor) -> Tensor:
        """Let the second readout, if the rule has one, reach as far ahead as attention does. [R, T]"""
        return rows if len(rows) == 1 else torch.stack([rows[0], rows[1] * self.rule.reach])


def passes(work: Sequence[TensorWork], together: bool) -> Iterable[list[slice]]:
    """Divide tensors into parts, and those into passes: what is measured before it is applied.

    A part is a run of tensors with about `GROUP_SIZE` parameters. Where ranks add up their sums, which they do once,
    all is one pass, and shards without a parameter belong to no part.
    """
    parts = list(_parts([tensor.param.numel() for tensor in work]))
    return [parts] if together else [[part] for part in parts]


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    start = count = 0
    for index, size in enumerate(sizes):
        if index > start and (size == 0 or count + size > GROUP_SIZE):
            yield slice(start, index)
            start, count = index, 0
        if size == 0:
            start = index + 1
        count += size
    if start < len(sizes):
        yield slice(start, len(sizes))


@lru_cache(maxsize=64)
def _counts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return sizes as floats on a device, copied there once. [T]"""
    return torch.tensor(sizes, dtype=torch.float32, device=device)


def tensor_layout(params: Sequence[Tensor]) -> Layout:
    """Describe the tensors of one model to the upper levels, which do not look at single parameters."""
    return _layout(tuple(param.numel() for param in params), params[0].device)


@lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> Layout:
    params_in, model_of = _counts(sizes, device), torch.zeros(len(sizes), dtype=torch.int64, device=device)
    return Layout(
        tensor_of=torch.empty(0, dtype=torch.int64, device=device),
        model_of=model_of,
        params_in=params_in,
        tensors_in=_counts((len(sizes),), device),
        smallness=smallness(params_in, model_of, models=1),
    )


def upper_state(states: States, rule: HierarchicalRNN, ranks: Ranks, run_length: float) -> RuleState:
    """Gather what the tensor and global levels remember; the param level's state stays where it is."""
    empty, ages = states[0]["age"].new_empty(0), torch.stack([state["age"] for state in states])
    return RuleState(
        hidden=empty,
        average=empty,
        square=empty,
        log_rate=tensor_log_rates(states, rule, ranks),
        tensor_hidden=torch.stack([state["tensor_hidden"] for state in states], 1),
        global_hidden=states[0]["global_hidden"][:, None],
        age=ages,
        log_peak=torch.stack([state.get(LOG_PEAK, state["age"]) for state in states]),
        run_length=torch.full_like(ages, run_length),
        gradient_size=torch.stack([state.get(GRADIENT_SIZE, state["age"]) for state in states], -1),
    )


def _squares(grads: Sequence[Tensor]) -> Tensor:
    """Sum the squares of each gradient, in single precision; beyond its range a sum is infinite. [T]"""
    wide = [grad if grad.dtype in (torch.float32, torch.float64) else grad.float() for grad in grads]
    return torch.stack([norm.float() for norm in torch._foreach_norm(wide)]).square()


def tensor_log_rates(states: States, rule: HierarchicalRNN, ranks: Ranks) -> Tensor:
    """Return the log rate of each tensor: its own, or the mean of its parameters'. [T]"""
    rates = [local(state["log_rate"]) for state in states]
    return ranks.mean(rates) if rule.rate_per_param else torch.stack(rates)


def from_above(rule: HierarchicalRNN, state: RuleState, layout: Layout) -> FromAbove:
    """Return what the levels above say to each tensor."""
    return FromAbove(
        bias=rule.param_bias(state, layout),
        log_rate=state.log_rate,
        mean_log_rate=layout.to_tensors(layout.mean_per_model(state.log_rate)),
        remembers=(state.age > 0).to(state.age.dtype),
        long_scale=rule.long_scale(state, layout),
    )


def step_upper_levels(
    rule: HierarchicalRNN,
    before: RuleState,
    totals: Totals,
    layout: Layout,
    states: States,
    model: States,
    proceed: Tensor | None = None,
) -> None:
    """Step the tensor RNN, the global RNN and the rates, in place.

    Args:
        rule: the update rule.
        before: what these levels remember.
        totals: over each tensor.
        layout: of the tensors.
        states: of the tensors that move.
        model: of all tensors, which share the global state.
        proceed: see `FromAbove`.
    """
    empty, means = before.hidden, totals.means()
    level = ParamLevel(empty, empty, empty, means.pooled, empty, log_rate=None)
    noted, below = totals.noted
    after = rule.upper_levels(level, means.param_square.sqrt(), noted, layout, below)
    after = RuleState(*(where(proceed, *values) for values in zip(after, before, strict=True)))
    for key, values in (("tensor_hidden", after.tensor_hidden.unbind(1)), ("age", after.age.unbind())):
        torch._foreach_copy_([state[key] for state in states], list(values))
    if below is not None:
        torch._foreach_copy_([state[LOG_PEAK] for state in states], list(after.log_peak.unbind()))
    if rule.config.knows_trend:
        torch._foreach_copy_([state[GRADIENT_SIZE] for state in states], list(after.gradient_size.unbind(1)))
    if not rule.rate_per_param:
        torch._foreach_copy_([state["log_rate"] for state in states], list(after.log_rate.unbind()))
    torch._foreach_copy_([state["global_hidden"] for state in model], [after.global_hidden[:, 0]] * len(model))
