"""What a comparison says: who ended lower, how many times faster, and how sure that is.

Legend: `N` scored steps, `K` seeds (runs), `Q` tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOSS_FLOOR = 1e-12  # of the first loss: below this, single precision says nothing
LEARNED, LOST = 1e-4, 1e-2  # of the first loss: who was below the one and rises above the other has lost what it knew
DRAWS = 2000
CONFIDENCE = 0.95


def mean_log(losses: Tensor, initial: Tensor) -> Tensor:
    """Average log losses over runs; one that is not finite makes it infinite, the worst.

    Args:
        losses: [..., K]
        initial: first losses, which say what is too small to count. [K]

    Returns:
        [...]
    """
    finite = torch.where(losses.isfinite(), losses, torch.full_like(losses, math.inf))
    floor = LOSS_FLOOR * initial + torch.finfo(losses.dtype).tiny
    return finite.maximum(floor).log().mean(-1)


def diverged(curve: Tensor, final: Tensor, initial: Tensor) -> Tensor:
    """Tell which runs were ever not finite or ended above where they began. [N, K], [K], [K] -> [K]"""
    return ~(curve.isfinite().all(0) & (final <= initial))


def came_back(curve: Tensor, initial: Tensor) -> Tensor:
    """Tell in which runs the loss fell below 1e-4 of the first, and was above 1e-2 of it later. [N, K], [K] -> [K]

    Example:
        >>> came_back(torch.tensor([[1e-5, 0.5], [2.0, 0.5]]), torch.tensor([1.0, 1.0]))
        tensor([ True, False])
    """
    lowest = curve.cummin(0).values
    return ((lowest < LEARNED * initial) & (curve > LOST * initial)).any(0)


def reached(steps: Sequence[int], curve: Sequence[float], target: float) -> int | None:
    """Return the first step at which a loss is down to the target, None if it never is.

    A single low value of a noisy curve does not count: each is taken as the median of itself and its neighbours.

    Example:
        >>> reached([1, 2, 3, 4, 5, 6], [5.0, 1.0, 4.0, 3.0, 1.0, 1.0], target=2.0)
        5
    """
    last = len(curve) - 1
    for index, step in enumerate(steps):
        around = [value if math.isfinite(value) else math.inf for value in curve[max(0, index - 1) : index + 2]]
        if index in (0, last):
            around = [curve[index]]
        if sorted(around)[len(around) // 2] <= target:
            return step
    return None


def speedup(
    steps: Sequence[int], ours: Sequence[float], ours_final: float, theirs: Sequence[float], theirs_final: float
) -> float:
    """Say how many times fewer steps one run needs to get where the other ends; below 1 if it takes more.

    If ours gets to their final loss at step `s` of `n`, that is `n / s`. If it never does, the roles are swapped:
    theirs gets to our final loss at step `s`, and the answer is `s / n`.

    Args:
        steps: at which both were scored, counted from 1; the last is `n`. [N]
        ours: losses. [N]
        ours_final: our final loss; not finite if the run failed.
        theirs: losses. [N]
        theirs_final: their final loss.

    Example:
        >>> speedup([1, 2, 4, 8], [4.0, 1.0, 1.0, 1.0], 1.0, [4.0, 3.0, 2.0, 1.0], 1.0)
        4.0
    """
    end = steps[-1]
    if math.isfinite(ours_final):
        step = reached(steps, ours, theirs_final if math.isfinite(theirs_final) else math.inf)
        if step is not None or ours_final <= theirs_final:
            return end / (step or end)
    if not math.isfinite(theirs_final):
        return 1.0
    target = ours_final if math.isfinite(ours_final) else math.inf
    return (reached(steps, theirs, target) or end) / end


def interquartile_mean(values: Tensor) -> Tensor:  # [..., n] -> [...]
    """Average the middle half of values along the last dimension.

    Example:
        >>> interquartile_mean(torch.tensor([0.0, 1.0, 2.0, 100.0])).item()
        1.5
    """
    ordered = values.sort(-1).values
    cut = values.shape[-1] // 4
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the interquartile mean over all values.

    Seeds are drawn anew with replacement within each task, so that the interval speaks of other seeds on the same tasks
    (stratified bootstrap, Agarwal et al. 2021, arXiv 2108.13264).

    Args:
        values: [Q, K]
        seed: of the draws.
    """
    tasks, seeds = values.shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(seeds, (DRAWS, tasks, seeds), generator=generator)
    drawn = values.expand(DRAWS, tasks, seeds).gather(-1, chosen).flatten(1)
    edges = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=values.dtype)
    low, high = interquartile_mean(drawn).quantile(edges)
    return float(low), float(high)
