"""Inner training, step by step, with the losses that the meta-loss will score.

Legend: `P` parameters, `T` tensors, `M` models, `N` scored steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population, Progress
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine

TAIL = 8.0  # the trailing average spans about a ninth of the steps taken

Point = Literal["last", "average", "both"]
Schedule = Callable[[int], Tensor | float]  # step of the unroll, 0 the first -> multiplier of the learned rates [P]


class Unrolled(NamedTuple):
    """Hold the outcome of an unroll."""

    losses: Tensor  # [N, M] full losses after the scored steps; [2 N, M] if scored at both points
    progress: Progress  # after the last step


def begin(
    rule: HierarchicalRNN, population: Population, log_rate: Tensor | float, run_length: Tensor | float = 0.0
) -> Progress:
    """Return the progress before the first inner step.

    Args:
        rule: whose state it is.
        population: the tasks.
        log_rate: natural log of the first learned rate, one number or `[T]`.
        run_length: steps of the run, if rates cool down to zero at its end, one number or `[T]`.
    """
    theta = population.initial_params()
    lookahead = torch.zeros_like(theta) if "attention" in rule.config.readouts else None
    return Progress(theta, theta, rule.init(population.layout, log_rate, run_length), lookahead)


def constant(step: int) -> float:
    """Leave the learned rate alone."""
    return 1.0


def trailing(average: Tensor, theta: Tensor, age: Tensor) -> Tensor:
    """Move an average of the parameters on by a step: recent ones count most, over a tail that grows with age.

    Polynomial-decay averaging, `a <- a + (TAIL + 1) / (TAIL + t) (theta - a)`. It shows where training has got to
    with the noise of the last steps taken out, as lowering the rate to zero would.

    Args:
        average: so far. [P]
        theta: parameters after the step. [P]
        age: steps taken, this one included, of each parameter. [P]

    Reference:
        Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization, ICML 2013.
    """
    return torch.lerp(average, theta, ((TAIL + 1) / (TAIL + age)).clamp(max=1.0))


def unroll(
    rule: HierarchicalRNN,
    population: Population,
    start: Progress,
    steps: int,
    scored: Collection[int],
    engine: ParamLevelEngine | None = None,
    second_order: bool = False,
    point: Point = "last",
    schedule: Schedule = constant,
) -> Unrolled:
    """Take inner steps, differentiably with respect to the meta-parameters.

    Args:
        rule: the update rule.
        population: the tasks.
        start: where to go on from.
        steps: number of inner steps.
        scored: after which of the steps (0 is the first) to compute full losses.
        engine: a fused equivalent of the rule's param level; with it, the tasks' gradients are fused too.
        second_order: differentiate through the tasks' gradients too, instead of taking them as constants.
        point: where losses are taken, at the parameters themselves, at their trailing average, or at both.
        schedule: multiplier of the learned rate.
    """
    layout = population.layout
    theta, average, state, lookahead = start
    losses = []
    for step in range(steps):
        attended = theta if lookahead is None else theta - lookahead
        grad = population.gradient(attended, second_order, fused=engine is not None)
        output = rule(grad, population.param_rms(theta), state, layout, engine)
        multiplier = schedule(step)
        theta, state = theta - multiplier * output.update, output.state
        lookahead = None if output.lookahead is None else multiplier * output.lookahead
        average = theta if point == "last" else trailing(average, theta, layout.to_params(state.age))
        if step in scored:
            points = {"last": (theta,), "average": (average,), "both": (theta, average)}[point]
            losses += [population.losses(value, fused=engine is not None) for value in points]
    scores = torch.stack(losses) if losses else theta.new_zeros(0, len(layout.tensors_in))
    return Unrolled(scores, Progress(theta, average, state, lookahead))
