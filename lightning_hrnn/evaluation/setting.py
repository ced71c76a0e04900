"""What an evaluation runs: the tasks of each suite, how many steps and seeds, when losses are scored.

Legend: `N` scored steps, `M` runs.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_hrnn.evaluation.images import vision_nets
from lightning_hrnn.evaluation.nets import VALIDATION_NETS
from lightning_hrnn.evaluation.unseen import unseen_nets
from lightning_hrnn.meta.population import TaskBatch
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.corpus import get_corpus
from lightning_hrnn.tasks.registry import get_family

SUITES = ("corpus", "nets", "vision")
SELECTION = "validation"  # prefix of the nets by which meta-training picks checkpoints
FINAL_SHARE, FINAL_SCORES = 0.05, 5  # a final loss is the mean of so many scores over the last share of the steps
CURVE_SCORES = 40


@dataclass(frozen=True)
class Setting:
    """Say what outcomes depend on, besides task and optimizer.

    Args:
        suite: `"corpus"`, `"nets"` or `"vision"`.
        steps: inner steps of every run.
        seeds: instances of each task to report on.
        tuning_seeds: other instances of it, to tune baselines on.
        seed: moves all seeds.
        corpus: name of the corpus whose families make the suite `"corpus"`.
        draws: configurations to draw from each family of the corpus; each is a task.
        data_dir: folder of Fashion-MNIST; None looks where it usually is.
        device: where to run.

    Raises:
        ValueError: there is no such suite or corpus, or a number is not positive.
    """

    suite: str
    steps: int
    seeds: int = 5
    tuning_seeds: int = 3
    seed: int = 0
    corpus: str = "released"
    draws: int = 1
    data_dir: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"Unknown suite {self.suite!r}: choose from {list(SUITES)}.")
        for field in ("steps", "seeds", "tuning_seeds", "draws"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}.")
        get_corpus(self.corpus)

    def families(self) -> dict[str, Callable[[], TaskFamily]]:
        """Return the suite's tasks by name; each is made when called."""
        if self.suite == "vision":
            return vision_nets(self.data_dir)
        if self.suite == "nets":
            judged = {f"{SELECTION}/{name}": make for name, make in VALIDATION_NETS.items()}
            return unseen_nets() | judged
        return {
            f"{name}/{draw}": partial(get_family, name, random.Random(f"{name}/{draw}/{self.seed}"))
            for name in get_corpus(self.corpus).weights
            for draw in range(1, self.draws + 1)
        }

    def choose(self, names: Sequence[str] | None, without: Sequence[str] = ()) -> list[str]:
        """Return names of tasks; a name before a slash stands for all of its group.

        Args:
            names: of those to take, all of the suite if None.
            without: of those to leave out.

        Raises:
            ValueError: a name is unknown, or none is left.
        """
        known = list(self.families())
        wanted, left_out = known if names is None else self._named(names, known), self._named(without, known)
        chosen = [task for task in wanted if task not in left_out]
        if not chosen:
            raise ValueError(f"No task is left of the suite {self.suite!r} without {list(without)}.")
        return chosen

    def _named(self, names: Sequence[str], known: Sequence[str]) -> list[str]:
        found = {name: [task for task in known if name in (task, task.partition("/")[0])] for name in names}
        if unknown := [name for name, tasks in found.items() if not tasks]:
            raise ValueError(f"The suite {self.suite!r} has no tasks {unknown}: choose from {list(known)}.")
        return list(dict.fromkeys(task for tasks in found.values() for task in tasks))

    def draw(self, task: str, purpose: str, count: int) -> TaskBatch:
        """Draw instances of a task; for tuning other ones than for the report.

        Args:
            task: its name.
            purpose: `"tune"` or `"report"`.
            count: number of instances.

        Raises:
            DataNotFoundError: the task's data set is not there.
        """
        seed = zlib.crc32(f"{self.suite}/{task}/{purpose}/{self.seed}".encode())
        return TaskBatch.draw(self.families()[task](), count, seed, self.device)

    def scored(self) -> list[int]:
        """Return the steps at which full losses are taken, counted from 1. [N]"""
        spread = {round(self.steps ** (k / CURVE_SCORES)) for k in range(CURVE_SCORES + 1)}
        return sorted(spread | set(self.final()))

    def final(self) -> list[int]:
        """Return the steps over which a final loss is averaged."""
        window = max(1, round(FINAL_SHARE * self.steps))
        points = min(FINAL_SCORES, window)
        return sorted({self.steps - round(k * window / points) for k in range(points)})

    def final_loss(self, losses: Tensor) -> Tensor:
        """Average the losses at the final steps, which come last; infinite if one is not finite. [N, M] -> [M]"""
        final = losses[-len(self.final()) :].mean(0)
        return torch.where(final.isfinite(), final, torch.full_like(final, math.inf))
