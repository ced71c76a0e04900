"""When the length of a run is known: lower the learned rate to zero over its last part.

A rule that does not know when training ends can only guess how soon to settle. Whoever knows may say so with the
multiplier `lr` of an `HRNN`, and nothing else needs to change.
"""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHARE = 0.5  # of a run, its last part


def cooldown(step: int, steps: int, share: float = SHARE) -> float:
    """Return 1 until the last part of a run, then a line down to zero at its end.

    Args:
        step: of the run, 0 the first.
        steps: length of the run.
        share: of the run that the line takes, from 0 to 1.

    Example:
        >>> [cooldown(step, 100) for step in (0, 50, 75, 99, 100, 200)]
        [1.0, 1.0, 0.5, 0.02, 0.0, 0.0]
    """
    left = max(0.0, 1 - step / steps)
    return min(1.0, left / share) if share > 0 else float(left > 0)


class CooldownLR(LambdaLR):
    """Lower the multiplier `lr` of every group to zero over the last part of a run; step it after each optimizer step.

    Args:
        optimizer: usually an `HRNN`.
        steps: length of the run, in optimizer steps.
        share: of the run that the cooldown takes, from 0 (none) to 1 (all of it).

    Raises:
        ValueError: `steps` is not positive or `share` is not between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_hrnn import HRNN
        >>> optimizer = HRNN([torch.nn.Parameter(torch.ones(3))])
        >>> scheduler = CooldownLR(optimizer, steps=1000)
        >>> scheduler.get_last_lr()
        [1.0]
    """

    def __init__(self, optimizer: Optimizer, steps: int, share: float = SHARE) -> None:
        if steps < 1:
            raise ValueError(f"A cooldown needs the number of optimizer steps of the run, at least 1, not {steps}.")
        if not 0 <= share <= 1:
            raise ValueError(f"A cooldown takes a share of the run between 0 and 1, not {share}.")
        super().__init__(optimizer, partial(cooldown, steps=steps, share=share))
