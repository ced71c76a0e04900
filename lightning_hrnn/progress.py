"""How far a fit has come and how long it will be, for the cooldown of the learned rates."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


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

    Lightning's `max_steps` counts those of all optimizers. Of a module that steps by hand, one step of each optimizer a
    batch is assumed.
    """
    bounds = [math.inf]
    if trainer.max_steps > 0:
        bounds.append(math.ceil(trainer.max_steps / max(1, len(trainer.optimizers))))
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches < math.inf:
        bounds.append(_steps_in_epochs(trainer, int(batches), epochs))
    return min(bounds)


def _steps_in_epochs(trainer: Trainer, batches: int, epochs: int) -> int:
    """Count the steps of all epochs, each with as many batches a step as a scheduler of accumulation plans for it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors = map(callback.get_accumulate_grad_batches, range(epochs))
            return sum(math.ceil(batches / factor) for factor in factors)
    return math.ceil(batches / trainer.accumulate_grad_batches) * epochs


def known_steps(trainer: Trainer) -> float:
    """Return how many steps each optimizer of a fit will take, 0 where nobody knows.

    Nobody does where nothing bounds the fit, or a module steps by hand: it may step once a batch, or more, or less.
    """
    steps = planned_steps(trainer)
    return steps if steps < math.inf and trainer.lightning_module.automatic_optimization else 0.0
