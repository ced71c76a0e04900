"""Train one net under several optimizers: same first weights, same batches, curves on the whole data set.

Works through Lightning's `Trainer`, as a user's training would, and knows no optimizer: whoever calls it
says how each entrant builds its module and which callbacks it brings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int, float], None]
"""Called with the number of steps done and the latest training loss on the whole training set."""


@dataclass(frozen=True)
class Entrant:
    """One optimizer in a comparison.

    Args:
        name: What tables and legends call it.
        settings: Its settings in words.
        module: Builds the module; called right after seeding, so that every entrant starts from the same
            weights.
        callbacks: Builds the callbacks it brings.
    """

    name: str
    settings: str
    module: Callable[[], LightningModule]
    callbacks: Callable[[], Sequence[Callback]] = tuple


@dataclass(frozen=True)
class Score:
    """How good the weights are after some steps.

    Args:
        step: Optimizer steps done.
        train_loss: Mean cross-entropy over the training images [nats].
        test_loss: Mean cross-entropy over the test images [nats].
        test_accuracy: Share of the test images classified rightly.
    """

    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float


@dataclass
class Run:
    """What one entrant achieved.

    Args:
        name: The entrant's name.
        settings: Its settings in words.
        curve: Scores on `Exam`'s sample, from step 0 to the last step.
        final: Score of the last weights on all images.
        seconds: Time spent training, without scoring.
    """

    name: str
    settings: str
    curve: list[Score]
    final: Score
    seconds: float

    @property
    def steps_per_second(self) -> float:
        """Optimizer steps per second of training."""
        return self.final.step / self.seconds if self.seconds else math.nan

    def row(self) -> dict[str, Any]:
        """Return the run as plain values, for a report."""
        return {
            "name": self.name,
            "settings": self.settings,
            **asdict(self.final),
            "seconds": self.seconds,
            "steps_per_second": self.steps_per_second,
            "curve": [asdict(score) for score in self.curve],
        }


@dataclass(frozen=True)
class Exam:
    """The images that tell how good weights are.

    Args:
        train: Batches of training images.
        test: Batches of test images.
        num_classes: Number of classes.
    """

    train: Batches
    test: Batches
    num_classes: int = 10

    def score(self, module: LightningModule, step: int) -> Score:
        """Score a module after some steps; its training mode is left as it was."""
        train_loss, _ = self._evaluate(module, self.train)
        test_loss, accuracy = self._evaluate(module, self.test)
        return Score(step, train_loss, test_loss, accuracy)

    @torch.no_grad()
    def _evaluate(self, module: LightningModule, batches: Batches) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy over all batches."""
        training = module.training
        module.eval()
        accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        total, count = torch.zeros((), dtype=torch.float64), 0
        for images, labels in batches:
            logits = module(images)
            total += F.cross_entropy(logits, labels, reduction="sum")
            accuracy.update(logits, labels)
            count += len(labels)
        module.train(training)
        return float(total) / count, float(accuracy.compute())


class ScoreCurve(Callback):
    """Score the module from time to time while it trains, and time the training apart from the scoring.

    Args:
        exam: What to score it on.
        every: Steps between scores; the first comes before the first step, the last after the last.
        progress: Told after each step.
    """

    def __init__(self, exam: Exam, every: int, progress: Progress | None = None) -> None:
        self.exam = exam
        self.every = max(1, every)
        self.progress = progress
        self.curve: list[Score] = []
        self.seconds = 0.0
        self._resumed = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the first weights, then start the clock."""
        self._add_score(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score after every `every` steps."""
        if trainer.global_step % self.every == 0:
            self._add_score(trainer, pl_module)
        self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the last weights."""
        if self.curve[-1].step != trainer.global_step:
            self._add_score(trainer, pl_module)
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if self.progress is not None:
            self.progress(trainer.global_step, self.curve[-1].train_loss)

    def _add_score(self, trainer: Trainer, module: LightningModule) -> None:
        if self.curve:
            self.seconds += time.perf_counter() - self._resumed
        self.curve.append(self.exam.score(module, trainer.global_step))
        self._resumed = time.perf_counter()


def train_entrant(entrant: Entrant, batches: Batches, steps: int, curve: ScoreCurve, exam: Exam, seed: int = 0) -> Run:
    """Train one entrant on the CPU and return its scores.

    Args:
        entrant: What to train.
        batches: Training batches. Their order must not depend on the global random state: all entrants then
            see the same batches.
        steps: Optimizer steps.
        curve: A fresh callback that scores while it trains.
        exam: The images for the final score.
        seed: Seed of the first weights.

    Returns:
        The run. Weights that went astray show as a loss that is huge or not finite: nothing is hidden or
        repeated.
    """
    torch.manual_seed(seed)
    module = entrant.module()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*entrant.callbacks(), curve],  # the curve last: it sees the weights as the optimizer left them
    )
    trainer.fit(module, train_dataloaders=batches)
    return Run(entrant.name, entrant.settings, curve.curve, exam.score(module, trainer.global_step), curve.seconds)
