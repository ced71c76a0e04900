"""`TaskDataModule`: fresh tasks for meta-training, as Lightning wants its data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_hrnn.meta.truncation import TaskStream
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.corpus import Corpus, get_corpus


class _Windows(Dataset[TaskStream]):
    """Hand out the same stream, once for each truncation window; the learner draws as many tasks as it has room for."""

    def __init__(self, stream: TaskStream, windows: int) -> None:
        self.stream, self.windows = stream, windows

    def __getitem__(self, index: int) -> TaskStream:
        """Return the stream."""
        return self.stream

    def __len__(self) -> int:
        """Return the number of windows in an epoch, of all processes together: a sampler divides them."""
        return self.windows * self.stream.shards


class TaskDataModule(LightningDataModule):
    """Draw tasks from a corpus; each process of a distributed run draws others.

    Args:
        corpus: name of a corpus.
        instances: instances of a family side by side in a task batch.
        epoch_steps: meta-steps in an epoch; validation and checkpoints come between epochs.
        seed: of all tasks.
        validation: names of validation tasks, all if `None`.
        validation_steps: inner steps of a validation run.
        family: a task family of your own to train on instead of a corpus; it is drawn again and again.

    Example::

        Trainer(max_steps=1000).fit(MetaLearner(), TaskDataModule("quick"))
    """

    def __init__(
        self,
        corpus: str = "quick",
        instances: int = 8,
        epoch_steps: int = 100,
        seed: int = 0,
        validation: list[str] | None = None,
        validation_steps: int = 1000,
        family: TaskFamily | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("instances", instances),
            ("epoch_steps", epoch_steps),
            ("validation_steps", validation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        self.source: Corpus | TaskFamily = family or get_corpus(corpus)
        self.instances, self.epoch_steps, self.seed = instances, epoch_steps, seed
        self.validation, self.validation_steps = validation, validation_steps
        self.stream: TaskStream | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Say what the tasks are, for the card of weights trained on them."""
        if isinstance(self.source, Corpus):
            return {"corpus": self.source.name, "corpus_version": self.source.version, "seed": self.seed}
        return {"corpus": self.source.name, "corpus_version": "own", "seed": self.seed}

    def setup(self, stage: str) -> None:
        """Start this process's stream of tasks."""
        if self.stream is None:
            rank = self.trainer.global_rank if self.trainer else 0
            world = self.trainer.world_size if self.trainer else 1
            self.stream = TaskStream(self.source, self.instances, self.seed, rank, world)

    def train_dataloader(self) -> DataLoader[TaskStream]:
        """Return one stream of tasks for each window of an epoch."""
        if self.stream is None:
            self.setup("fit")
        assert self.stream is not None
        return DataLoader(_Windows(self.stream, self.epoch_steps), batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation tasks, one at a time, far past the training horizon."""
        from lightning_hrnn.evaluation.suites import ValidationRun, validation_suite

        names = validation_suite(self.validation)
        runs = [ValidationRun(name, self.validation_steps) for name in names]
        return DataLoader(runs, batch_size=None, num_workers=0)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Return how many tasks were drawn, so that a resumed run goes on with others."""
        return {"drawn": self.stream.drawn if self.stream else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on drawing where the run stopped."""
        if self.stream is None:
            self.setup("fit")
        assert self.stream is not None
        self.stream.drawn = state_dict["drawn"]
