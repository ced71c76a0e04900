"""`TaskDataModule`: fresh tasks for meta-training, as Lightning wants its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningDataModule

from lightning_hrnn.evaluation.suites import ValidationRun, validation_suite
from lightning_hrnn.meta.truncation import TaskStream
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.conformance import check_interface
from lightning_hrnn.tasks.corpus import Corpus, get_corpus

T = TypeVar("T")


class _Batches(Generic[T]):
    """Hand out batches in order, the same ones on every rank.

    An iterable of our own rather than a `DataLoader`: Lightning would deal out a loader's batches among the ranks.
    """

    def __init__(self, batches: Sequence[T]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[T]:
        """Iterate over the batches."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.batches)


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
        most_params: of a task batch: of large tasks there are fewer instances, four at least. None for no such bound.

    Raises:
        TaskError: `family` does not keep the interface; `check_task` tests more of it.
        ValueError: a number is less than 1, or there is no such corpus or validation task.

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
        most_params: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("instances", instances),
            ("epoch_steps", epoch_steps),
            ("validation_steps", validation_steps),
            ("most_params", 1 if most_params is None else most_params),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if family is not None:
            check_interface(family, torch.Generator().manual_seed(seed))
        self.source: Corpus | TaskFamily = get_corpus(corpus) if family is None else family
        self.instances, self.epoch_steps, self.seed, self.most_params = instances, epoch_steps, seed, most_params
        self.validation, self.validation_steps = validation_suite(validation), validation_steps
        self.stream: TaskStream | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Say what the tasks are, for the card of weights trained on them."""
        if isinstance(self.source, Corpus):
            return {"corpus": self.source.name, "corpus_version": self.source.version, "seed": self.seed}
        return {"corpus": self.source.name, "corpus_version": "own", "seed": self.seed}

    def setup(self, stage: str) -> None:
        """Start this process's stream of tasks."""
        self._started()

    def _started(self) -> TaskStream:
        if self.stream is None:
            rank = self.trainer.global_rank if self.trainer else 0
            world = self.trainer.world_size if self.trainer else 1
            self.stream = TaskStream(self.source, self.instances, self.seed, rank, world, self.most_params)
        return self.stream

    def train_dataloader(self) -> Iterable[TaskStream]:
        """Return the stream of tasks, once for each window of an epoch; the learner draws what it has room for."""
        return _Batches([self._started()] * self.epoch_steps)

    def val_dataloader(self) -> Iterable[ValidationRun]:
        """Return the validation runs, one network each, all of them on every rank."""
        return _Batches([ValidationRun(name, self.validation_steps) for name in self.validation])

    def state_dict(self) -> dict[str, Any]:
        """Return how many tasks were drawn, so that a resumed run goes on with others, and from what."""
        drawn = self.stream.drawn if self.stream else 0
        return {"drawn": drawn, **self.description, "instances": self.instances, "most_params": self.most_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on drawing where the run stopped.

        Raises:
            ValueError: it drew from another corpus, with another seed, or another number of instances.
        """
        own, saved = (
            self.state_dict(),
            {"most_params": None, **state_dict},
        )  # of a run from before there was such a bound
        changed = {key: value for key, value in saved.items() if key != "drawn" and own.get(key) != value}
        if changed:
            raise ValueError(
                f"The run that stopped drew its tasks with {changed}, this one would with "
                f"{ ({key: own.get(key) for key in changed}) }: give the same to go on, or start anew from the weights "
                "that it exported, with --model.weights."
            )
        self._started().drawn = state_dict["drawn"]
