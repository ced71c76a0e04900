"""How far a fit has come and how long it will be, for the cooldown of the learned rates."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def progress(trainer: Trainer) -> float | None:
    """Return the share of a fit's batches that are behind, from 0 to 1, the same on every rank.

    By `max_steps` or `max_epochs`, whichever comes first. None if neither bounds the fit: a time limit or early
    stopping may end it at any moment.
    """
    shares = []
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and 0 < batches < math.inf:
        shares.append(trainer.fit_loop.total_batch_idx / (batches * epochs))
    return min(1.0, max(shares)) if shares else None


def planned_steps(trainer: Trainer) -> float:
    """Return about how many steps each optimizer of a fit will take; infinite if nothing bounds it.

    Lightning's `max_steps` counts those of all optimizers. A module that steps by hand may leave batches out.
    """
    bounds = [math.inf]
    if trainer.max_steps > 0:
        bounds.append(math.ceil(trainer.max_steps / max(1, len(trainer.optimizers))))
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches < math.inf:
        bounds.append(math.ceil(batches / trainer.accumulate_grad_batches) * epochs)
    return min(bounds)
