"""Validation during meta-training: small unseen networks over whole runs, beside tuned Adam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import Adam, train
from lightning_hrnn.evaluation.nets import VALIDATION_NETS
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine
from lightning_hrnn.optimizer.schedule import cooldown

INSTANCES = 2
SEED = 20170717
LOSS_FLOOR = 3e-3  # of the first loss: below this, less is not counted as better
LR_GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, -2))  # 1e-4 to 3e-2, half a decade apart


class ValidationResult(NamedTuple):
    """Hold how a validation run went."""

    regret: Tensor  # [] mean over instances and scored steps of the log loss less tuned Adam's; 0 is as good
    final: Tensor  # [] the same of the last score alone
    diverged: Tensor  # [] share of instances that ended above where they began
    losses: Tensor  # [N, B] of the rule
    baseline: Tensor  # [N, B] of Adam at its best rate
    steps: list[int]  # [N] at which they were taken

    def row(self, name: str) -> dict[str, Any]:
        """Return plain values for a card or a table; losses are means over instances."""
        return {
            "net": name,
            "regret": round(float(self.regret), 4),
            "steps": self.steps,
            "hrnn": [round(float(value), 6) for value in self.losses.mean(1)],
            "tuned_adam": [round(float(value), 6) for value in self.baseline.mean(1)],
        }


def validation_suite(names: Sequence[str] | None = None) -> list[str]:
    """Return the names of validation tasks, all by default.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = list(VALIDATION_NETS) if names is None else list(names)
    unknown = [name for name in chosen if name not in VALIDATION_NETS]
    if unknown:
        raise ValueError(f"Unknown validation tasks {unknown}: choose from {sorted(VALIDATION_NETS)}.")
    return chosen


class ValidationRun(NamedTuple):
    """Describe one validation run."""

    name: str  # of the network
    steps: int  # inner steps

    def scored(self) -> set[int]:
        """Return the steps at which losses are compared: eight, evenly apart on a log scale from a 16th of the run."""
        return {max(1, round(self.steps * 2 ** (-4 * k / 7))) - 1 for k in range(8)}

    @torch.no_grad()
    def run(
        self,
        rule: HierarchicalRNN,
        initial_rate: float,
        engine: ParamLevelEngine | None = None,
        device: torch.device | str = "cpu",
    ) -> ValidationResult:
        """Train the network with the rule, cooling down over the last half, and compare."""
        population = Population([TaskBatch.draw(VALIDATION_NETS[self.name](), INSTANCES, SEED, device)])
        initial = population.losses(population.initial_params())
        start = begin(rule, population, math.log(initial_rate), self.steps)
        schedule = partial(cooldown, steps=self.steps)
        losses = unroll(rule, population, start, self.steps, self.scored(), engine, schedule=schedule).losses
        baseline = _tuned_adam(self.name, self.steps, str(device))
        worst, least = initial * 10, initial * LOSS_FLOOR  # a loss that is not finite counts as the worst
        safe = torch.where(losses.isfinite(), losses, worst).minimum(worst)
        behind = ((safe + least) / (baseline + least)).log()  # [N, B]
        return ValidationResult(
            regret=behind.mean(),
            final=behind[-1].mean(),
            diverged=(safe[-1] > initial).float().mean(),
            losses=losses,
            baseline=baseline,
            steps=[step + 1 for step in sorted(self.scored())],
        )


@lru_cache(maxsize=32)
def _tuned_adam(name: str, steps: int, device: str) -> Tensor:
    """Return the losses of Adam at the constant rate that is best on average over the scored steps. [N, B]"""
    tasks = TaskBatch.draw(VALIDATION_NETS[name](), INSTANCES, SEED, device)
    rates = torch.tensor(LR_GRID, device=device).repeat_interleave(INSTANCES)
    population = Population([tasks.repeat(len(LR_GRID))])
    losses = train(Adam(), population, rates, steps, ValidationRun(name, steps).scored())
    by_rate = losses.view(len(losses), len(LR_GRID), INSTANCES)
    best = by_rate.nan_to_num(math.inf).log().mean((0, 2)).argmin()
    return by_rate[:, best]
