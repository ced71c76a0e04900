"""What every run records besides its metrics, with any of Lightning's loggers: time, the weights' card, pictures."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from lightning_hrnn.optimizer.optimizer import HRNN

SECONDS = "seconds"
"""The metric that `RunClock` logs."""


class RunClock(Callback):
    """Log the seconds since training began, as `seconds`, so that runs can be compared by time as well as by steps.

    Validation is part of the time. A run that is resumed goes on from the time of its checkpoint.
    """

    def __init__(self) -> None:
        self.before = 0.0  # seconds of the runs that this one resumes
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the time; Lightning writes it as often as it writes the other metrics of a step."""
        pl_module.log(SECONDS, self.elapsed(), on_step=True, on_epoch=False)

    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return self.before + time.monotonic() - self.started if self.started else self.before

    def state_dict(self) -> dict[str, Any]:
        """Return the time so far."""
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time of a checkpoint."""
        self.before = state_dict["seconds"]


class LogWeightsCard(Callback):
    """Record which meta-trained weights a run uses: the card of the learned optimizer's weights.

    To Weights & Biases as an artifact of the type `optimizer-weights` and in the run's configuration; to other
    loggers as a file `NAME.json` in the folder of the run. Weights & Biases is also told which optimizer trains,
    as `trained_by`, by which runs can be grouped.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the cards of all learned optimizers."""
        if not trainer.is_global_zero:
            return
        names = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"trained_by": " ".join(names)}, allow_val_change=True)
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, HRNN):
                    _log_card(logger, optimizer.weights_name, optimizer.card)


def _log_card(logger: Logger, weights: str, card: dict[str, Any]) -> None:
    name = re.sub(r"[^\w.-]", "-", Path(weights).name.removesuffix(".safetensors"))
    folder = Path(logger.experiment.dir) if isinstance(logger, WandbLogger) else folder_of(logger)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if isinstance(logger, WandbLogger):
        logger.experiment.log_artifact(str(file), name=name, type="optimizer-weights")
        logger.experiment.config.update({"optimizer_weights": card}, allow_val_change=True)


def log_picture(logger: Logger, name: str, picture: Tensor, step: int) -> None:
    """Log a picture: to Weights & Biases and to TensorBoard as an image, beside other logs as a PNG.

    Args:
        logger: Any logger of Lightning; one without a folder gets nothing.
        name: What the picture shows, such as `val/confusion`.
        picture: Bytes [H, W, 3].
        step: Optimizer step.
    """
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [picture.numpy()], caption=[f"step {step}"])
    elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):  # TensorBoard's
        add_image(name, picture, step, dataformats="HWC")
    elif folder := folder_of(logger):
        from matplotlib.image import imsave

        path = folder / "pictures" / f"{name.replace('/', '-')}-{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, picture.numpy())


def folder_of(logger: Logger) -> Path | None:
    """Return the folder in which a logger keeps a run; None if it keeps it elsewhere."""
    folder = getattr(logger, "log_dir", None) or logger.save_dir
    return Path(folder) if folder else None
