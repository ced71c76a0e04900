"""The meta-loss: how much of its loss a task has lost, on a log scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def refuse_negative(losses: Tensor, name: str) -> None:
    """Raise a `ValueError` if a loss is negative: no meta-loss can take its logarithm.

    Args:
        losses: of any shape.
        name: what the message calls them.
    """
    if bool((losses < 0).any()):
        raise ValueError(f"{name} is negative, and the meta-loss takes its logarithm: shift the loss to be >= 0.")


@dataclass(frozen=True)
class LogRatio:
    """Score losses against the loss at the very start of the run: `log((f + c f0) / (f0 + c f0))`.

    On a log scale the last digits of convergence count as much as the first; the floor `c` says where they stop to
    count. A diverged task must neither own the update nor come free: above `cap` the score grows at a tenth of its
    slope, up to `2 cap`; a loss that is not finite scores `2 cap`.

    Args:
        floor: `c`, a fraction of the initial loss.
        cap: score from which a task counts as diverged.

    Raises:
        ValueError: an argument is not positive.

    Example:
        >>> LogRatio(floor=0.01)(torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 1.0])).tolist()
        [0.0, 4.0]
    """

    floor: float = 1e-3
    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.floor <= 0 or self.cap <= 0:
            raise ValueError(f"floor and cap must be positive, not {self.floor} and {self.cap}.")

    def __call__(self, losses: Tensor, initial: Tensor) -> Tensor:
        """Return scores.

        Args:
            losses: non-negative. [..., M]
            initial: losses at the start of the run. [M]

        Raises:
            ValueError: a loss is negative.
        """
        refuse_negative(losses, "A task's loss")
        largest = torch.finfo(losses.dtype).max / 1e3
        offset = self.floor * initial + torch.finfo(losses.dtype).tiny
        safe = torch.where(losses.isfinite() & (losses < largest), losses, torch.full_like(losses, largest))
        score = ((safe + offset) / (initial + offset)).log()
        over = (score - self.cap).clamp(min=0)
        return torch.minimum(score, score - 0.9 * over).clamp(max=2 * self.cap)

    def diverged(self, scores: Tensor) -> Tensor:
        """Tell which scores are those of diverged tasks."""
        return scores >= self.cap
