"""Inner training, step by step, with the losses that the meta-loss will score.

Legend: `P` parameters, `T` tensors, `M` models, `N` scored steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population, Progress
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine


class Unrolled(NamedTuple):
    """Hold the outcome of an unroll."""

    losses: Tensor  # [N, M] full losses at the true parameters after the scored steps
    progress: Progress  # after the last step


def begin(rule: HierarchicalRNN, population: Population, log_rate: Tensor | float) -> Progress:
    """Return the progress before the first inner step.

    Args:
        rule: whose state it is.
        population: the tasks.
        log_rate: natural log of the first learned rate, one number or `[T]`.
    """
    theta = population.initial_params()
    lookahead = torch.zeros_like(theta) if "attention" in rule.config.readouts else None
    return Progress(theta, rule.init(population.layout, log_rate), lookahead)


def unroll(
    rule: HierarchicalRNN,
    population: Population,
    start: Progress,
    steps: int,
    scored: Collection[int],
    engine: ParamLevelEngine | None = None,
    second_order: bool = False,
) -> Unrolled:
    """Take inner steps, differentiably with respect to the meta-parameters.

    Args:
        rule: the update rule.
        population: the tasks.
        start: where to go on from.
        steps: number of inner steps.
        scored: after which of the steps (0 is the first) to compute full losses.
        engine: a fused equivalent of the rule's param level.
        second_order: differentiate through the tasks' gradients too, instead of taking them as constants.
    """
    theta, state, lookahead = start
    losses = []
    for step in range(steps):
        point = theta if lookahead is None else theta - lookahead
        grad = population.gradient(point, second_order)
        output = rule(grad, population.param_rms(theta), state, population.layout, engine)
        theta, state, lookahead = theta - output.update, output.state, output.lookahead
        if step in scored:
            losses.append(population.losses(theta))
    scores = torch.stack(losses) if losses else theta.new_zeros(0, len(population.layout.tensors_in))
    return Unrolled(scores, Progress(theta, state, lookahead))
