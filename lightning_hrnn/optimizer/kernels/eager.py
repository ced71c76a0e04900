"""The step in plain tensor code: runs everywhere, in chunks, so that temporary memory stays bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import FromAbove, Sums, TensorWork, where

CHUNK = 32_768  # parameters taken at once: their temporaries (about 100 floats each) stay near the cache


class Pending(NamedTuple):
    """Hold the step of each tensor between the passes."""

    steps: list[Tensor]  # [R, n] directions times factors, not yet normalised
    rates: list[Tensor]  # learned rate, [...] or [] as the rule has one for each parameter or not
    proceed: Tensor | None  # [] see `FromAbove`


class EagerKernel:
    """Run `HierarchicalRNN.param_step` over chunks of one tensor after the other."""

    def measure(self, rule: HierarchicalRNN, work: Sequence[TensorWork], above: FromAbove) -> tuple[Sums, Pending]:
        """Update the states in place; return sums over tensors and the steps."""
        pending, sums = Pending([], [], above.proceed), []
        for index, tensor in enumerate(work):
            sums.append(self._measure_tensor(rule, tensor, above.part(slice(index, index + 1)), pending))
        pooled, squares, param_square = zip(*sums, strict=True)
        return Sums(torch.stack(pooled, 1), torch.stack(squares, 1), torch.stack(param_square)), pending

    def _measure_tensor(
        self, rule: HierarchicalRNN, tensor: TensorWork, above: FromAbove, pending: Pending
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step one tensor; return its three sums."""
        count, dtype = tensor.param.numel(), above.bias.dtype
        param, grad = tensor.param.reshape(-1), tensor.grad.reshape(-1)
        state = [value.view(len(value), -1) for value in (tensor.hidden, tensor.average, tensor.square)]
        log_rate = tensor.log_rate.view(-1) if rule.rate_per_param else above.log_rate
        pending.rates.append(log_rate.exp().view(tensor.param.shape if rule.rate_per_param else ()))
        steps = above.bias.new_empty(len(rule.directions), count)
        pending.steps.append(steps)
        pooled = squares = param_square = above.bias.new_zeros(())
        key = _rounding_key(above.bias) if tensor.hidden.dtype == torch.bfloat16 else None
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            hidden, average, square = (value[:, part].to(dtype) for value in state)
            rate = log_rate[part] if rule.rate_per_param else log_rate
            step = rule.param_step(
                grad[part].to(dtype),
                hidden,
                average,
                square,
                rate,
                rate - above.mean_log_rate,
                above.bias,
                above.remembers,
                above.long_scale,
            )
            for number, (value, after) in enumerate(zip(state, (step.hidden, step.average, step.square), strict=True)):
                kept = after if key is None else _rounded(after, key + number, start)
                value[:, part] = where(above.proceed, kept, value[:, part])
            if step.log_rate is not None:
                log_rate[part] = where(above.proceed, step.log_rate, log_rate[part])
            steps[:, part] = step.directions * step.factor
            pooled = pooled + torch.cat([step.hidden, step.inputs]).sum(1)
            squares = squares + step.directions.square().sum(1)
            param_square = param_square + param[part].to(dtype).square().sum()
        return pooled, squares, param_square

    def apply(self, work: Sequence[TensorWork], pending: Pending, inverse_rms: Tensor, limits: Tensor) -> None:
        """Move the parameters and lookaheads."""
        steps_of, rate_of, proceed = pending
        scales = (inverse_rms.unbind(1), limits.unbind(1))
        for tensor, steps, rate, scale, limit in zip(work, steps_of, rate_of, *scales, strict=True):
            rates, most, shape = tensor.lr * rate, tensor.lr * limit, tensor.param.shape
            update, *lookahead = (
                row.mul_(factor).view(shape).mul_(rates).clamp_(-bound, bound)
                for row, factor, bound in zip(steps, scale, most, strict=True)
            )
            if tensor.weight_decay:
                update += rates * tensor.weight_decay * tensor.param
            tensor.param.sub_(update if proceed is None else update.masked_fill_(proceed.logical_not(), 0.0))
            if tensor.lookahead is not None:
                tensor.lookahead.copy_(where(proceed, lookahead[0], tensor.lookahead))


def _rounding_key(bias: Tensor) -> Tensor:
    """Make a 32-bit number of what the levels above say to a tensor, which changes from step to step. []"""
    return bias.float().view(torch.int32).sum().to(torch.int32)


def _rounded(rows: Tensor, key: Tensor, start: int) -> Tensor:
    """Round a state stochastically to bfloat16: to nearest, slow averages would stand still.

    As many random bits are added as will be cut off. They are a hash of the key and of the place of the value: the same
    on every rank and after a resume.

    Args:
        rows: of the state. [K, n]
        key: another one for every step and state. []
        start: place of the first parameter in its tensor.
    """
    place = torch.arange(start, start + rows.shape[1], device=rows.device, dtype=torch.int32) * -0x61C88647
    row = torch.arange(len(rows), device=rows.device, dtype=torch.int32)[:, None] * -0x7A143595
    random = _scramble(_scramble(place ^ key) + row) & 0xFFFF
    raised = (rows.float().contiguous().view(torch.int32) + random) & -0x10000
    return raised.view(torch.float32).to(torch.bfloat16)


def _scramble(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers: the finaliser of a multiplicative hash, as in the other kernels."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)
