"""Time calls in turns, so that what slows the machine for a while slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Tick = Callable[[int, int], None]
"""Called with the number of measurements done and their total."""


@dataclass(frozen=True)
class Timings:
    """Hold the seconds a call took, of each call in each round.

    Args:
        seconds: name -> seconds, one number a round.
    """

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of a call's seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Return how many times as long a call took as another: the median of the rounds' ratios."""
        return statistics.median(self._ratios(name, base))

    def share(self, name: str, rest: str) -> float:
        """Return a call's share of the time of both: the median of the rounds' shares."""
        return statistics.median(a / (a + b) for a, b in zip(self.seconds[name], self.seconds[rest], strict=True))

    def spread(self, name: str, base: str) -> float:
        """Return how far the rounds' ratios lie from their median, relative to it: the median distance."""
        ratios, middle = self._ratios(name, base), self.ratio(name, base)
        return statistics.median(abs(ratio / middle - 1) for ratio in ratios)

    def _ratios(self, name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    shortest: float,
    tick: Tick = lambda done, total: None,
) -> Timings:
    """Time calls in turns: all of them in each round, every other round in reverse.

    Args:
        calls: name -> what to time; each is called once or twice before, untimed.
        device: where they run; a GPU is waited for.
        rounds: number of rounds.
        shortest: seconds a measurement lasts at least; quick calls are repeated for that long, and their mean taken.
        tick: told after each measurement.
    """
    clock = clock_of(device)
    repeats, total = {}, len(calls) * (rounds + 1)
    for done, (name, call) in enumerate(calls.items(), start=1):
        seconds = _time(call, 1, device, clock)
        if seconds < 1:  # the first call also allocates
            seconds = _time(call, 1, device, clock)
        repeats[name] = max(1, math.ceil(shortest / max(seconds, 1e-6)))
        tick(done, total)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    done = len(calls)
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            taken[name].append(_time(calls[name], repeats[name], device, clock))
            done += 1
            tick(done, total)
    return Timings(taken)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds for work on a device.

    One thread on the CPU is timed by the processor time it got, which other processes of a shared machine do not
    lengthen as they do the time on the wall.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _time(call: Call, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the mean seconds of some calls in a row."""
    _wait_for(device)
    start = clock()
    for _ in range(repeats):
        call()
    _wait_for(device)
    return (clock() - start) / repeats


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
