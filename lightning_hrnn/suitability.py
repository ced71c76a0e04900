"""Whether a fit suits the learned optimizer: strategies that are refused, and what is worth a warning."""

import math
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import FAR, horizon
from lightning_hrnn.progress import planned_steps

REFUSED_STRATEGIES = {
    FSDPStrategy: (
        "FSDP1 flattens parameters into one, which hides the tensors whose statistics HRNN needs. Use "
        "ModelParallelStrategy, which shards by FSDP2, or Trainer(strategy='ddp')"
    ),
    DeepSpeedStrategy: (
        "DeepSpeed takes the step itself, on its own copies of the parameters. Use ModelParallelStrategy, which shards "
        "by FSDP2, or Trainer(strategy='ddp')"
    ),
}
SUSPICIOUS_LR = 0.02  # of the lr at the start: who writes less most likely means a step length


def check_strategy(trainer: Trainer) -> None:
    """Refuse the strategies under which `HRNN` would not see the tensors, or not take the step.

    Raises:
        MisconfigurationException: the trainer's is one of them; the message says why and what to use instead.
    """
    for strategy, reason in REFUSED_STRATEGIES.items():
        if isinstance(trainer.strategy, strategy):
            raise MisconfigurationException(f"HRNN cannot train under {type(trainer.strategy).__name__}: {reason}.")


def warn_of_length(trainer: Trainer, optimizers: Sequence[HRNN]) -> None:
    """Warn, here and not again on the way, of a run many times as long as those of the meta-training."""
    steps = planned_steps(trainer)
    far = [optimizer for optimizer in optimizers if FAR * horizon(optimizer.card) < steps < math.inf]
    for optimizer in far:
        optimizer.far_is_known = True
    for optimizer in far[:1]:
        rank_zero_warn(
            f"This fit plans {steps:,} steps, and the weights {optimizer.weights_name!r} were meta-trained on runs of "
            f"at most {horizon(optimizer.card):,.0f}. Whether their learned rates are right so far out nobody has "
            "measured. Watch hrnn/log_lr, or choose rate='given' and a schedule of your own."
        )


class StepLengthWatch:
    """Notice, once, who writes a learning rate into `HRNN` that looks like the length of a step."""

    def __init__(self) -> None:
        self._at_start: list[list[float]] = []  # lr by optimizer and param group, while there is something to notice

    def start(self, optimizers: Sequence[HRNN]) -> None:
        """Remember the multipliers of optimizers that nothing is meant to change."""
        self._at_start = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def look(self, optimizers: Sequence[HRNN]) -> None:
        """Warn once if something has written a learning rate that looks like a step length."""
        for optimizer, at_start in zip(optimizers, self._at_start, strict=False):
            for index, group in enumerate(optimizer.param_groups):
                before = at_start[index] if index < len(at_start) else max(at_start)
                if 0 < group["lr"] < before * SUSPICIOUS_LR:
                    self._at_start = []
                    rank_zero_warn(
                        f"Something set the lr of param group {index} to {group['lr']:g}. For HRNN it is a multiplier "
                        f"of the learned rates (at the start {before:g}), not a step length: the group will barely "
                        "train. Look for a warm-up in `optimizer_step`, or for a learning rate given to a callback "
                        "such as StochasticWeightAveraging or BackboneFinetuning."
                    )
                    return
