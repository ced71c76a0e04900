"""A user's learning-rate schedulers after their optimizer has become `HRNN`: held still, or kept in its unit.

A scheduler writes steps of a chosen length, such as 3e-4; `HRNN` reads its `lr` as a multiplier of learned rates. Two
things make sense, and both leave every scheduler in its place, so that code which steps or logs it goes on working:

- `hold`: the scheduler makes room for a stand-in that never changes anything;
- `keep`: the scheduler goes on in the unit it was written for and the optimizer sees what it writes over `unit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Keys of a param group that hold learning rates for anyone to read. Some schedulers store others for themselves, such
# as OneCycleLR's `max_lr`: those stay in the unit of the scheduler.
LR_KEYS = ("lr", "initial_lr")


class HeldLR(LRScheduler):
    """Leave the learning rate alone, whatever it is stepped with: the stand-in for a dropped scheduler."""

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group as it is."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group as it is."""
        return self.get_lr()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing. Takes what any scheduler takes: an epoch, or the metric of `ReduceLROnPlateau`."""


class _InUserUnit:
    """Mixed into a kept scheduler: it reads and writes learning rates times `unit`."""

    optimizer: Optimizer
    unit: float

    def step(self, *args: Any, **kwargs: Any) -> None:
        with _multiplied(self.optimizer, self.unit):
            super().step(*args, **kwargs)  # type: ignore[misc]

    def get_last_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def hold(optimizer: Optimizer) -> HeldLR:
    """Return a stand-in for a scheduler of `optimizer` that is to be dropped."""
    return HeldLR(optimizer)


def keep(scheduler: LRScheduler, optimizer: Optimizer, unit: float) -> LRScheduler:
    """Bind a scheduler, and those it is made of, to another optimizer that measures its rates in another unit.

    Works for every scheduler that acts through `param_groups`, a user's own too, because the learning rates of the
    groups are converted around each step rather than the scheduler's own numbers.

    Args:
        scheduler: changed in place; it stays an instance of its class.
        optimizer: its groups hold what the scheduler's old optimizer held, learning rates over `unit`.
        unit: positive; the scheduler's learning rate that is one of the new optimizer's.

    Returns:
        The same scheduler.
    """
    HeldLR(optimizer)  # torch marks `optimizer.step`, by which schedulers tell that they are stepped after it
    for part in parts(scheduler):
        part.optimizer = optimizer
    kind = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (_InUserUnit, kind), {"unit": unit, "__module__": kind.__module__})
    return scheduler


def parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and those it is made of, such as the phases of `SequentialLR`."""
    yield scheduler
    for value in vars(scheduler).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, LRScheduler):
                yield from parts(inner)


def base_rates(optimizer: Optimizer, schedulers: list[LRScheduler]) -> list[float | None]:
    """Return the learning rate that each param group was written for; None where it has none.

    Schedulers with a warm-up overwrite `lr` when they are made, so it is the rate before any schedule, `initial_lr`.
    The cyclic ones replace that too, and their peak takes its place.
    """
    peaks = next((part.max_lrs for s in schedulers for part in parts(s) if hasattr(part, "max_lrs")), None)
    rates: list[float | None] = []
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))
        if peaks is not None:
            rate = peaks[index]
        rates.append(None if rate is None else float(rate))
    return rates


@contextmanager
def _multiplied(optimizer: Optimizer, unit: float) -> Iterator[None]:
    """Multiply the learning rates of all groups by `unit` for a while."""
    for group, key in _rates_of(optimizer):
        group[key] = group[key] * unit
    try:
        yield
    finally:
        for group, key in _rates_of(optimizer):
            group[key] = float(group[key]) / unit


def _rates_of(optimizer: Optimizer) -> list[tuple[dict[str, Any], str]]:
    return [(group, key) for group in optimizer.param_groups for key in LR_KEYS if key in group]
