"""Who else trains the same tasks, and how much a difference of the rule's losses counts where they do.

A mean of log losses is owned by the tasks on which they vary most. Who asks how often a rule ends lower than others
asks something else: on a task that is won or lost by far nothing changes, and on a near tie a small step decides.

Legend: `B` instances of a task batch, `N` scored steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_hrnn.meta.population import TaskBatch

SEEDS = 5  # instances over whose mean a verdict is thought to be reached
MEMORY = 0.7  # of what earlier batches of a configuration said
SMALLEST_ERROR = 2e-3  # of a mean log loss that is worth to be told apart
FLOOR_MARGIN = 0.3  # a rival so close to the floor of the meta-loss, as a log, can only be drawn level with
LEVEL_WITH_FLOOR = 0.1  # what that is worth beside a win
LARGEST_GAP = 6.0


class Rivals(ABC):
    """Optimizers that a rule is to end lower than.

    Attributes:
        steps: length of the runs for which they were tuned.
    """

    steps: int

    @abstractmethod
    def losses(self, batches: Sequence[TaskBatch], scored: Collection[int]) -> list[dict[str, Tensor]]:
        """Train the same instances.

        Args:
            batches: of tasks.
            scored: after which of the steps (0 is the first) to compute full losses.

        Returns:
            for each batch the losses by the rival's name, none where the rivals do not know the configuration.
            `[N, B]` each
        """


class Standing:
    """Remember how the rule stands beside its rivals on each configuration, and weigh differences by it.

    With `g` the mean of the rule's final log loss less a rival's, and `s` its standard error over `SEEDS` instances,
    the weight is the mean over rivals of::

        1 / (1 + g^2 / (2 s^2)) / s

    which falls off on both sides as the density of a win's probability does, only more slowly, so that no task is given
    up. A rival at the floor of the meta-loss cannot be beaten and weighs little.
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[str, list[float]]] = {}  # configuration, rival: mean and variance of the gap

    def weight(self, configuration: str, score: Tensor, rivals: Mapping[str, Tensor], floor: float) -> float:
        """Take note of a batch and return by how much differences of its meta-losses count.

        Args:
            configuration: what its instances have in common.
            score: meta-loss of the rule on each. [B]
            rivals: the same of each rival. [B] each
            floor: the least meta-loss.
        """
        known, weight = self.known.setdefault(configuration, {}), 0.0
        for name, theirs in rivals.items():
            gap = (score - theirs).clamp(-LARGEST_GAP, LARGEST_GAP)
            seen = [float(gap.mean()), float(gap.var(unbiased=False))]
            known[name] = [MEMORY * a + (1 - MEMORY) * b for a, b in zip(known.get(name, seen), seen, strict=True)]
            mean, variance = known[name]
            error = math.sqrt(variance / SEEDS + SMALLEST_ERROR**2)
            if float(theirs.mean()) < floor + FLOOR_MARGIN:
                weight += LEVEL_WITH_FLOOR / (1 + max(0.0, mean / error))
            else:
                weight += 1 / (1 + 0.5 * (mean / error) ** 2) / error
        return weight / max(1, len(rivals))

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, as plain values."""
        return {"known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it on."""
        self.known = state.get("known", {})
