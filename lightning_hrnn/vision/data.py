"""The data module for small image data sets that are held in memory.

Every data set is split into training, validation and test images in a fixed way; `seed` moves the order of
the batches only, never the split.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_hrnn.vision.batches import ImageSet, TensorBatches, from_the_start
from lightning_hrnn.vision.transforms import Scale, ShiftAndFlip, brightness

SPLIT_SEED = 0


class DataNotFoundError(FileNotFoundError):
    """A data set's files are not where they were looked for; the message says how to obtain them."""


class ImageData(LightningDataModule):
    """Serve an image data set from memory, in batches by index.

    A data set of your own is a subclass with `scale` and `read`.

    Args:
        batch_size: Training images per step and process.
        eval_batch_size: Images per step and process when only scoring.
        validation: Number of training images set aside for validation, stratified by class.
        image_size: Side in pixels to resize images to; None keeps theirs.
        seed: Seed of the order of the training batches.
    """

    scale: Scale

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        validation: int = 5000,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation = validation
        self.image_size = image_size
        self.seed = seed
        self._sets: dict[str, ImageSet] = {}

    @abstractmethod
    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return all training images (validation images among them) and the test images.

        Raises:
            DataNotFoundError: If the files are not there.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes, known after `setup`."""
        return max((1 + int(part.labels.max()) for part in self._sets.values() if len(part)), default=0)

    def picture(self, images: Tensor) -> Tensor:
        """Turn inputs [B, C, H, W] back into shares of brightness, for people to look at."""
        return brightness(images, self.scale.mean, self.scale.std)

    def setup(self, stage: str | None = None) -> None:
        """Read the data set, once."""
        if self._sets:
            return
        training, test = self.read()
        if not 0 <= self.validation < len(training):
            raise ValueError(f"validation={self.validation}, but there are only {len(training)} training images.")
        kept, held_out = stratified_split(training.labels, self.validation)
        self._sets = {"train": training.subset(kept), "val": training.subset(held_out), "test": test}

    def images(self, split: str) -> ImageSet:
        """Return the stored images of `train`, `val` or `test`."""
        self.setup()
        return self._sets[split]

    def train_dataloader(self) -> TensorBatches:
        """Return the training batches, in another order each epoch."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return self._batches(
            "train",
            self.batch_size,
            self.train_transform(),
            shuffle_seed=None if overfit else self.seed,
            drop_last=True,
            position=partial(batches_done, self),
        )

    def val_dataloader(self) -> TensorBatches | list[TensorBatches]:
        """Return the validation batches; none if no images were set aside."""
        return self._batches("val", self.eval_batch_size, self.eval_transform()) if self.validation else []

    def test_dataloader(self) -> TensorBatches:
        """Return the test batches."""
        return self._batches("test", self.eval_batch_size, self.eval_transform())

    def predict_dataloader(self) -> TensorBatches:
        """Return the test batches."""
        return self.test_dataloader()

    def eval_transform(self) -> Scale:
        """Return what turns stored images into inputs."""
        return Scale(self.scale.mean, self.scale.std, self.scale.maximum, self.image_size)

    def train_transform(self) -> Scale | ShiftAndFlip:
        """Return what turns stored images into inputs while training."""
        return self.eval_transform()

    def _batches(
        self,
        split: str,
        batch_size: int,
        transform: Scale | ShiftAndFlip,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        position: Callable[[], int] = from_the_start,
    ) -> TensorBatches:
        rank, world_size = data_rank(self)
        return TensorBatches(
            self.images(split), batch_size, transform, shuffle_seed, drop_last, rank, world_size, position
        )


def data_rank(data: LightningDataModule) -> tuple[int, int]:
    """Return which share of the data this process takes, and how many shares there are."""
    spread = data.trainer.distributed_sampler_kwargs if data.trainer else None
    return (spread["rank"], spread["num_replicas"]) if spread else (0, 1)


def batches_done(data: LightningDataModule) -> int:
    """Return how many batches of the current epoch are done: 0, unless a run is resumed within an epoch."""
    return data.trainer.fit_loop.epoch_loop.batch_progress.current.ready if data.trainer else 0


def stratified_split(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Split examples in a fixed pseudo-random way that keeps the shares of the classes.

    Args:
        labels: Class of each example [N].
        held_out: Number of examples in the second part.

    Returns:
        The positions [N - held_out] and [held_out] of the examples in either part, ascending.

    Example:
        >>> stratified_split(torch.tensor([0, 1] * 4), held_out=4)[1].numel()
        4
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    position = torch.randperm(len(labels), generator=generator)
    position = position[torch.argsort(labels[position], stable=True)]  # class by class, at random within each
    count = len(labels)
    # Evenly spaced picks along that list take from each class its share.
    picks = (torch.arange(held_out) * count + count // 2) // max(1, held_out)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[position[picks]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
