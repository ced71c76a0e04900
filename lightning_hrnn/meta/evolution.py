"""Evolution strategies over whole runs for the few meta-parameters that move the learned rates.

Backprop through windows teaches a rule good directions, but it sees rates through a window: it cannot know what a rate
of today does to the loss in a thousand steps. Evolution sees whole runs and nothing but their ends. It needs few
meta-parameters, since the variance of its estimate grows with their number; here it moves those alone that make the
lengths of steps (`HierarchicalRNN.evolving`), and because they belong to the tensor level, every instance of every
task tries a perturbation of its own at the cost of one plain run.

Legend: `D` meta-parameters that evolve, `B` instances of a task batch, `M` models, `T` tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.meta.estimators import Estimate, Window, perturbations, surrogate
from lightning_hrnn.meta.population import Population
from lightning_hrnn.meta.truncation import TaskPool, schedule_of
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import BoundedRate, HierarchicalRNN

LAST_STEPS = (0, 1, 2, 4, 6)  # before the end of a run, where its loss is taken


class RateEvolution:
    """Perturb what makes the lengths of steps, and weigh perturbations by the losses at the end of whole runs.

    Each window is one run of every task of the pool, from its start. Each instance runs twice, with a perturbation `e`
    and with `-e`; the estimate is the mean of `e (L+ - L-) / (2 sigma)` for `e ~ N(0, 1)`, with differences clipped, so
    that a task that diverges says which way not to go and no more. All other meta-parameters stay as they are.

    Args:
        sigma: standard deviation of a perturbation.
        shares: of the window, which runs last by turns: short ones, long ones.
        clip: largest difference of two meta-losses that counts.
        seed: of the perturbations.

    Raises:
        ValueError: an argument is out of range.

    Reference:
        Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017,
        https://arxiv.org/abs/1703.03864; antithetic pairs and clipped differences make it rank-like.
    """

    def __init__(
        self, sigma: float = 0.06, shares: Sequence[float] = (0.2, 0.5, 1.0), clip: float = 1.0, seed: int = 0
    ) -> None:
        if sigma <= 0 or clip <= 0:
            raise ValueError(f"sigma and clip must be positive, not {sigma} and {clip}.")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares of the window must be above 0 and at most 1, not {list(shares)}.")
        self.sigma, self.shares, self.clip, self.seed = sigma, tuple(shares), clip, seed

    @torch.no_grad()
    def __call__(self, rule: HierarchicalRNN, pool: TaskPool, window: Window) -> Estimate:
        """Run every task of the pool from its start to its end, both ways."""
        if not isinstance(rule.rate, BoundedRate):
            raise ValueError("RateEvolution moves bounded rates: this rule's rates are 'smoothed'.")
        length = max(1, round(window.steps * self.shares[window.index % len(self.shares)]))
        places = [replace(place, tasks=place.tasks.repeat(2), life=length) for place in pool]
        population = Population([place.tasks for place in places])
        generator = perturbations(rule.evolving[0].device, self.seed, window.index)
        noises = [_draw(rule, place.tasks.count, generator) for place in pool]
        probe = perturbed(rule, population, self.sigma * torch.cat([torch.cat([e, -e], 1) for e in noises], 1))
        losses = unroll(
            probe,
            population,
            begin(probe, population, population.layout.to_tensors(_first_log_rates(pool))),
            length,
            {max(0, length - 1 - before) for before in LAST_STEPS},
            window.engine,
            schedule=schedule_of(places, population),
        ).losses
        initial = torch.cat([place.initial_loss.repeat(2) for place in places])
        scores = population.by_batch(window.loss(losses, initial).mean(0))
        estimate = torch.zeros(len(noises[0]), device=losses.device)
        for noise, score in zip(noises, scores, strict=True):
            plus, minus = score.chunk(2)
            estimate += (noise * (plus - minus).clamp(-self.clip, self.clip)).mean(1) / (2 * self.sigma * len(noises))
        for place in pool:
            place.age = place.life  # this run was its whole life
        value = torch.stack([score.mean() for score in scores]).mean()
        return Estimate(surrogate(rule, rule.evolving, estimate, value), [score[None] for score in scores])

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no run outlasts its window."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on nothing."""


def perturbed(rule: HierarchicalRNN, population: Population, noise: Tensor) -> HierarchicalRNN:
    """Return a copy of the rule whose steps are made longer or shorter in each model.

    Args:
        rule: with bounded rates.
        population: of models.
        noise: what to add to the meta-parameters that evolve, end to end. [D, M]
    """
    probe = deepcopy(rule)
    assert isinstance(probe.rate, BoundedRate)
    parts = population.layout.to_tensors(noise).split([len(value) for value in probe.evolving])  # [k, T] each
    for value, part in zip(probe.evolving, parts, strict=True):
        value.requires_grad_(False).data = value + (part if value.dim() == 2 else part[0])
    return probe


def _draw(rule: HierarchicalRNN, count: int, generator: torch.Generator) -> Tensor:  # [D, B]
    like, size = rule.evolving[0], sum(len(value) for value in rule.evolving)
    return torch.randn(size, count, generator=generator, device=like.device, dtype=like.dtype)


def _first_log_rates(pool: TaskPool) -> Tensor:
    """Return the first log rate of each model of the pool, twice for each batch. [M]"""
    return torch.cat(
        [Population([place.tasks]).layout.mean_per_model(place.progress.state.log_rate).repeat(2) for place in pool]
    )
