"""The rule's direction alone, at learning rates and under a schedule that somebody else gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import Schedule, warm_up_cosine
from lightning_hrnn.meta.population import Population
from lightning_hrnn.meta.unroll import begin
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine

SMALLEST = 1e-30  # a schedule may end at zero, which has no logarithm


@torch.no_grad()
def train_given(
    rule: HierarchicalRNN,
    population: Population,
    lr: Tensor,
    steps: int,
    scored: set[int],
    schedule: Schedule = warm_up_cosine,
    tick: Callable[[int], None] = lambda step: None,
    engine: ParamLevelEngine | None = None,
) -> Tensor:
    """Train tasks as `HRNN(rate="given")` does.

    Args:
        rule: a rule without rates of its own, see `HierarchicalRNN.without_rate`.
        population: the tasks.
        lr: root mean square of every tensor's update in each task, before the schedule. [M]
        steps: inner steps.
        scored: after which steps (0 is the first) to compute full losses.
        schedule: factor on the learning rate.
        tick: called after each step with its number, 0 the first.
        engine: a fused equivalent of the rule's param level.

    Returns:
        Losses. [N, M]
    """
    layout = population.layout
    rates = layout.to_tensors(lr)  # [T]
    theta, _, state, lookahead = begin(rule, population, rates.log())
    losses = []
    for step in range(steps):
        log_rate = (rates * schedule(step, steps)).clamp(min=SMALLEST).log()
        state = state._replace(log_rate=layout.to_params(log_rate) if rule.rate_per_param else log_rate)
        attended = theta if lookahead is None else theta - lookahead
        output = rule(population.gradient(attended), population.param_rms(theta), state, layout, engine)
        theta, state, lookahead = theta - output.update, output.state, output.lookahead
        if step in scored:
            losses.append(population.losses(theta))
        tick(step)
    return torch.stack(losses)
