"""The param level in C++, for the CPU: a differentiable one for meta-training, an in-place step for deployment.

`param_level` takes the place of `HierarchicalRNN.param_level` (pass it as `engine`). It runs over tiles of parameters
that stay in cache, a parameter a lane across the borders of tensors, and saves for the backward pass no more than what
went in and came out: the backward pass takes the forward step again, tile by tile. In single precision its functions
are approximations, whose errors `lanes.h` states; in double precision they are the C library's.

`CppKernel` is the deployment step over chunks of all tensors together, which threads share.

Legend: `P` parameters, `T` tensors, `R` readouts, `S` timescales, `H0` param hidden size, `F` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.features import FEATURES, Layout, LongScale
from lightning_hrnn.optimizer.hierarchical_rnn import GatedDirection, HierarchicalRNN, ParamLevel
from lightning_hrnn.optimizer.kernels import FromAbove, Sums, TensorWork
from lightning_hrnn.optimizer.kernels.build import BuildError, operators, why_unavailable
from lightning_hrnn.optimizer.kernels.eager import EagerKernel
from lightning_hrnn.optimizer.rates import BoundedRate
from lightning_hrnn.optimizer.rule_state import RuleState

__all__ = ["CppKernel", "param_level", "why_unavailable", "why_unsupported"]

MOST_HIDDEN, MOST_TIMESCALES = 32, 8
DTYPES = (torch.float32, torch.float64)


def why_unsupported(rule: HierarchicalRNN) -> str | None:
    """Return what of a rule the compiled kernels do not know, or `None`."""
    config = rule.config
    if config.direction != "gated" or config.rate != "bounded":
        return "The compiled kernels know the gated direction with the bounded rate only."
    if "input_scaling" in config.without:
        return "The compiled kernels scale inputs."
    if config.features != tuple(FEATURES):
        return f"The compiled kernels know the features {list(FEATURES)} in this order only."
    if config.param_hidden > MOST_HIDDEN or not 2 <= config.timescales <= MOST_TIMESCALES:
        return (
            f"The compiled kernels go up to {MOST_HIDDEN} hidden units and {MOST_TIMESCALES} timescales, "
            f"not {config.param_hidden} and {config.timescales}."
        )
    return None


def param_level(rule: HierarchicalRNN, grad: Tensor, state: RuleState, bias: Tensor, layout: Layout) -> ParamLevel:
    """Compute what `HierarchicalRNN.param_level` does, fused; by the rule itself where that cannot be.

    Differentiable once, with respect to everything that the rule's own is. Numbers differ from the rule's by rounding
    alone: after 20 steps in single precision by about as much as the rule's own differ from double precision.

    Args:
        rule: the update rule.
        grad: gradients of all parameters, end to end. [P]
        state: of the step before.
        bias: of the gates, from the levels above. [3 H0, T]
        layout: of the models; the parameters of a tensor lie side by side.
    """
    config = rule.config
    if grad.device.type != "cpu" or grad.dtype not in DTYPES or why_unsupported(rule):
        return rule.param_level(grad, state, bias, layout)
    try:
        library = operators(config)
    except BuildError:
        return rule.param_level(grad, state, bias, layout)
    hidden, average, square, pooled, steps = _ParamLevel.apply(
        library,
        config.momentary_bound,
        len(config.readouts),
        "output_scaling" not in config.without,
        layout.params_in,
        grad,
        state.hidden,
        state.average,
        state.square,
        said_from_above(rule, state, bias, layout),
        packed(rule),
    )
    return ParamLevel(hidden, average, square, pooled, steps, log_rate=None)


def said_from_above(rule: HierarchicalRNN, state: RuleState, bias: Tensor, layout: Layout) -> Tensor:
    """Lay what each tensor tells its parameters below each other, in the order of `ABOVE` in `rule.h`. [A, T]"""
    relative_rate = state.log_rate - rule.mean_log_rate(state, layout)
    remembers = (state.age > 0).to(bias.dtype)
    return _told(bias, relative_rate, remembers, rule.long_scale(state, layout))


def rows_from_above(config: RuleConfig) -> int:
    """Count the rows of `said_from_above`."""
    return 3 * config.param_hidden + 2 + 2 * (config.scale_memory > 0)


def _told(bias: Tensor, relative_rate: Tensor, remembers: Tensor, long_scale: LongScale | None) -> Tensor:
    return torch.cat([bias, torch.stack([relative_rate, remembers, *(long_scale or ())])])


def packed(rule: HierarchicalRNN) -> Tensor:
    """Lay the meta-parameters of the param level end to end."""
    return torch.cat([part.reshape(-1) for part in param_level_parts(rule)])


def param_level_parts(rule: HierarchicalRNN) -> list[nn.Parameter]:
    """Return the meta-parameters of the param level, in the order of `Packed` in `rule.h`."""
    readouts = [readout for readout in rule.directions.values() if isinstance(readout, GatedDirection)]
    if not isinstance(rule.rate, BoundedRate) or len(readouts) != len(rule.directions):
        raise TypeError(why_unsupported(rule))
    return [
        rule.param_rnn.gate_weight,
        rule.param_rnn.candidate_weight,
        rule.decay_weight,
        rule.rate.momentary,
        *(readout.weight for readout in readouts),
        rule.param_rnn.gate_bias,
        rule.param_rnn.candidate_bias,
        rule.decay_bias,
        rule.rate.momentary_bias,
        *(readout.shortcut for readout in readouts),
    ]


class _ParamLevel(torch.autograd.Function):
    """Join the two compiled operators."""

    @staticmethod
    def forward(
        ctx: Any, library: Any, bound: float, readouts: int, scales: bool, params_in: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = tuple(value.contiguous() for value in inputs)
        grad, hidden, average, square, above, meta = inputs
        *outputs, steps, inverse_rms = library.param_level(
            grad, hidden, average, square, above, params_in, meta, bound, readouts, scales
        )
        ctx.set_materialize_grads(False)
        ctx.library, ctx.bound, ctx.scales = library, bound, scales
        ctx.save_for_backward(*inputs[:5], params_in, meta, steps, inverse_rms)
        return *outputs, steps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [None if value is None else value.contiguous() for value in to_outputs]
        with_grad = ctx.needs_input_grad[5]
        to_grad, hidden, average, square, above, meta = ctx.library.param_level_backward(
            *given, *ctx.saved_tensors, ctx.bound, ctx.scales, with_grad
        )
        # What came are the rows of biases and relative rate, then that of the power, if the rule has one. No gradient
        # flows through `remembers` and the long average's decay, which lie between them.
        to_rate, to_power = above.tensor_split([3 * len(hidden) + 1])
        above = torch.cat([to_rate, torch.zeros_like(above[: 1 + len(to_power)]), to_power])
        return None, None, None, None, None, to_grad if with_grad else None, hidden, average, square, above, meta


class Pending(NamedTuple):
    """Hold what `measure` leaves for `apply`."""

    library: Any
    steps: Tensor  # [R n] of each tensor, end to end: directions times factors, not yet normalised
    params: list[Tensor]  # contiguous: the parameters themselves or copies
    rates: Tensor  # [T]


class CppKernel:
    """Run the fused step, or the eager one where the operators cannot be built.

    Parameters that are not contiguous in memory go through a copy.

    State in bfloat16 is rounded stochastically: a moving average that changes by less than half of its last bit in a
    step would stand still otherwise. The randomness is a hash of what the levels above say, the gradient and the place
    of the parameter, so it is the same on every rank and after a resume.
    """

    def measure(self, rule: HierarchicalRNN, work: Sequence[TensorWork], above: FromAbove) -> tuple[Sums, Any]:
        """Update the states in place; return sums over tensors and the steps."""
        config = rule.config
        try:
            library = operators(config)
        except BuildError:
            return EagerKernel().measure(rule, work, above)
        params = [tensor.param.detach().contiguous() for tensor in work]
        steps, sums = library.measure_step(
            params,
            [tensor.grad.contiguous() for tensor in work],
            [tensor.hidden for tensor in work],
            [tensor.average for tensor in work],
            [tensor.square for tensor in work],
            _told(above.bias, above.log_rate - above.mean_log_rate, above.remembers, above.long_scale),
            above.log_rate.contiguous(),
            packed(rule),
            config.momentary_bound,
            len(config.readouts),
        )
        pooled, squares, param_square = sums.split([len(sums) - len(config.readouts) - 1, len(config.readouts), 1])
        return Sums(pooled, squares, param_square[0]), Pending(library, steps, params, above.log_rate.exp())

    def apply(self, work: Sequence[TensorWork], pending: Any, inverse_rms: Tensor, limits: Tensor) -> None:
        """Move the parameters and lookaheads."""
        if not isinstance(pending, Pending):
            EagerKernel().apply(work, pending, inverse_rms, limits)
            return
        multipliers = pending.rates.new_tensor([tensor.lr for tensor in work])
        rates, limits = pending.rates * multipliers, limits * multipliers
        lookaheads = [tensor.lookahead for tensor in work if tensor.lookahead is not None]
        decay = rates * rates.new_tensor([tensor.weight_decay for tensor in work])
        pending.library.apply_step(pending.params, lookaheads, pending.steps, inverse_rms * rates, limits, decay)
        moved = [tensor.param for tensor in work]
        for param, copy in zip(moved, pending.params, strict=True):
            if copy.data_ptr() != param.data_ptr():
                param.copy_(copy)
        for changed in (*moved, *lookaheads):
            increment_version(changed)
