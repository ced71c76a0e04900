"""A `DataLoader` for data sets too large for memory that goes on within an epoch where a run was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_hrnn.vision.batches import Resumable


class EpochShare(DistributedSampler[int]):
    """Visit this process's share of the data set, in an order that depends on `seed` and the epoch alone.

    Args:
        data: The data set.
        batch_size: Images per batch.
        rank: Which share.
        world_size: Number of shares.
        seed: Seed of the order.
        position: Says how many batches to leave out, as those of a run that is resumed.
    """

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: Callable[[], int],
    ) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.position = position

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.position() * self.batch_size, None)


class ResumableLoader(Resumable, DataLoader[Any]):
    """A `DataLoader` that starts its workers when the first batch is asked for, and not before.

    By then the trainer has restored how far the run had come, which `position` says.

    Args:
        position: See `Resumable`.
        options: What `DataLoader` takes.
    """

    def __init__(self, *args: Any, position: Callable[[], int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.position = position

    def __iter__(self) -> Any:
        yield from super().__iter__()
