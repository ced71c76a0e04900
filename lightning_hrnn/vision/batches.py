"""Batches by index from tensors that lie in memory: no worker processes, no per-image Python.

A data set of some ten thousand small images fits in memory as bytes; one `index_select` and one cast per
batch then beat a `DataLoader` with workers by far on a machine with few cores.

Legend: `N` images, `B` images in a batch, `C` channels, `H x W` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler


class ImageTransform(Protocol):
    """What turns a batch of stored images into the network's input."""

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] (bytes) to floats [B, C', H', W']."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Args:
        images: Bytes [N, C, H, W] (`torch.uint8`).
        labels: Class of each image [N] (`torch.int64`).

    Raises:
        ValueError: If the two disagree in length.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{len(self.images)} images but {len(self.labels)} labels: the two files do not belong together."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """Return the images at `index` [n], in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def first(self, count: int | None) -> ImageSet:
        """Return the first `count` images (all, if there are fewer or `count` is None), without a copy."""
        return ImageSet(self.images[:count], self.labels[:count])


class EpochShuffle(Sampler[int]):
    """Visit 0..length-1 in an order that depends on `seed` and the epoch alone.

    The order is independent of the global random state: two runs that draw different numbers of random
    values, such as two optimizers, still see the same batches. Lightning calls `set_epoch`, also after a
    resume.

    Args:
        length: Number of examples.
        seed: Seed of the order.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def from_the_start() -> int:
    """Return the position of a run that was not stopped within an epoch."""
    return 0


class Resumable:
    """What Lightning asks of batches before it trusts them to go on within an epoch.

    They need no state of their own: where to go on follows from the trainer's progress, which a checkpoint
    holds. `position` says how many batches of the epoch are done; it is asked when the first batch is.
    """

    position: Callable[[], int] = staticmethod(from_the_start)

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches of the epoch are done."""
        return {"batches": self.position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the trainer's progress, restored too, says the same."""


class TensorBatches(Resumable):
    """Iterate over `(images, labels)` batches of an `ImageSet`.

    With several processes, each global batch of `batch_size * world_size` examples is dealt out in turn, so
    that n processes with batches of B see together exactly what one process with batches of n * B sees.

    Args:
        data: The images and labels.
        batch_size: Images per batch and process.
        transform: Applied to each batch of stored images.
        shuffle_seed: Seed of the order of each epoch; None keeps the stored order.
        drop_last: Leave out the ragged last batch (unless it is the only one). When kept, and where
            processes cannot share it evenly, the last example is repeated, at most `world_size - 1` times.
        rank: Which share of each global batch to yield.
        world_size: Number of processes.
        position: Says how many batches of the epoch to leave out, as those of a run that is resumed.

    Example:
        >>> data = ImageSet(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> batches = TensorBatches(data, batch_size=4, transform=lambda images: images.float())
        >>> [labels.tolist() for _, labels in batches]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        transform: ImageTransform,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], int] = from_the_start,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.data = data
        self.batch_size = batch_size
        self.transform = transform
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.position = position
        # Lightning asks for both as of a `DataLoader`: it calls `set_epoch` and looks for shuffling.
        self.batch_sampler = None
        self.sampler: Sampler[int] = SequentialSampler(range(len(data)))
        if shuffle_seed is not None:
            self.sampler = EpochShuffle(len(data), shuffle_seed)

    def __len__(self) -> int:
        count = len(self.data) / (self.batch_size * self.world_size)
        return max(1, math.floor(count)) if self.drop_last else math.ceil(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.tensor(list(self.sampler), dtype=torch.int64)  # [N]
        step = self.batch_size * self.world_size
        for start in range(self.position() * step, len(self) * step, step):
            index = order[start : start + step]
            ragged = -len(index) % self.world_size
            if ragged:
                index = torch.cat([index, index[-1:].expand(ragged)])
            index = index[self.rank :: self.world_size]  # [B]
            yield self.transform(self.data.images[index]), self.data.labels[index]
