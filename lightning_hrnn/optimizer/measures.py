"""What an `HRNN` did in a step, tensor by tensor, for whoever watches: sizes, rates, memory, time.

Nothing here is on the way of a step. Everything is measured on the device, summed over shards in one `all_reduce` if
there are any, and copied to the host once, by the caller.

Legend: `T` tensors, `P` parameters of a tensor, `S` timescales, `H0` param hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_hrnn.optimizer.hierarchical_rnn import MAX_DECAY_LOGIT, HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.sharding import Ranks, local

CHUNK = 262_144  # parameters looked at together: bounds temporary memory
TRIAL_SIZE = 65_536  # parameters of the trial steps by which the time of a step is estimated


class Measures(NamedTuple):
    """Hold what was measured of the tensors that have taken a step, each of shape `[T]`."""

    log_lr: Tensor  # natural log of the learned rate
    update_to_param: Tensor  # root mean square of the update over that of the parameters
    timescale: Tensor  # steps over which gradients are averaged: geometric mean over parameters and timescales
    hidden_norm: Tensor  # of the param RNN's state: root mean square over parameters
    weight: Tensor  # share of the model's parameters
    update: Tensor  # mean square of the update
    param: Tensor  # mean square of the parameters before it


@torch.no_grad()
def measure(optimizer: HRNN, before: Mapping[Tensor, Tensor]) -> Measures | None:
    """Measure the last step.

    Args:
        optimizer: after its step.
        before: the parameters to look at, with a copy of each (of this rank's shard) from before the step.

    Returns:
        What was measured, in the order of `before`; None if there is nothing to measure. Where parameters are sharded
        every rank must ask.
    """
    if not before:
        return None
    sums = Ranks.of(list(before)).sum(torch.stack([_sums(optimizer, param, old) for param, old in before.items()], 1))
    count, means = sums[0], sums[1:] / sums[0]
    log_lr, update, param, log_length, hidden = means.unbind()
    ratio = (update / param.clamp_min(torch.finfo(param.dtype).tiny)).sqrt()
    return Measures(log_lr, ratio, log_length.exp(), hidden.sqrt(), count / count.sum(), update, param)


def _sums(optimizer: HRNN, param: Tensor, old: Tensor) -> Tensor:
    """Add up, over this rank's shard: one, log rate, square of update and parameter, log length, square of hidden."""
    state, shard = optimizer.state[param], local(param.detach())
    log_rate = local(state["log_rate"])
    hidden = local(state["hidden"])
    parts = hidden.reshape(len(hidden), -1).split(CHUNK, 1)
    of_hidden = torch.stack([_of_hidden(optimizer.rule, part.float()) for part in parts]).sum(0)
    count = of_hidden.new_tensor(float(shard.numel()))
    return torch.stack(
        [
            count,
            log_rate.sum() if log_rate.dim() else log_rate * count,
            torch.linalg.vector_norm(shard - old, dtype=torch.float32).square(),
            torch.linalg.vector_norm(old, dtype=torch.float32).square(),
            *of_hidden,
        ]
    )


def _of_hidden(rule: HierarchicalRNN, hidden: Tensor) -> Tensor:  # [H0, P] -> [2]
    """Add up the log of the averaging length, `1 / (1 - decay)`, and the square of the hidden state."""
    weight, bias = rule.decay_weight[0].to(hidden.device), rule.decay_bias[0].to(hidden.device)
    log_decay = logsigmoid((weight @ hidden + bias).clamp(max=MAX_DECAY_LOGIT))
    timescales = 0.5 ** torch.arange(rule.config.timescales, device=hidden.device)
    log_length = -(-torch.expm1(timescales[:, None] * log_decay)).log()
    return torch.stack([log_length.mean(0).sum(), hidden.square().sum()])


def state_bytes(optimizer: HRNN) -> int:
    """Return the memory of an optimizer's state on this rank, in bytes."""
    return sum(local(value).nbytes for state in optimizer.state.values() for value in state.values())


def adam_bytes(optimizer: HRNN) -> int:
    """Return the memory that Adam's two averages would take on this rank, in bytes."""
    return 2 * sum(local(param.detach()).nbytes for group in optimizer.param_groups for param in group["params"])


def seconds_of_a_step(optimizer: HRNN, kernel: str = "auto") -> float | None:
    """Estimate how long a step takes on this rank, by steps of small tensors; None where there is nothing to step.

    What a tensor costs is measured with tensors of one parameter, what a parameter costs with tensors of 65,536
    together. The optimizer itself is left alone.
    """
    params = [local(param.detach()) for group in optimizer.param_groups for param in group["params"]]
    params = [param for param in params if param.numel()]
    total = sum(param.numel() for param in params)
    if not total:
        return None
    share = min(1.0, TRIAL_SIZE / total)
    small = [param.new_zeros(1) for param in params]
    large = [param.new_zeros(max(1, round(param.numel() * share))) for param in params]
    of_tensors, of_both = (_seconds(trial, optimizer.rule, kernel) for trial in (small, large))
    return of_tensors + max(0.0, of_both - of_tensors) * total / sum(param.numel() for param in large)


def _seconds(params: list[Tensor], rule: HierarchicalRNN, kernel: str) -> float:
    """Return the shortest of three steps, after one to warm up."""
    parameters = [torch.nn.Parameter(param) for param in params]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer, taken = HRNN(parameters, weights=rule, kernel=kernel), []
    for _ in range(4):
        _wait_for(params[0].device)
        start = time.perf_counter()
        optimizer.step()
        _wait_for(params[0].device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
