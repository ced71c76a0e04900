"""A LightningModule that classifies images with any net by name and reports accuracy with torchmetrics."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_hrnn.vision.models import build_model

Batch = tuple[Tensor, Tensor]
OptimizerName = Literal["adamw", "adam", "rmsprop", "sgd"]
OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "rmsprop": RMSprop, "sgd": SGD}


class ImageClassifier(LightningModule):
    """Train an image classification net by cross-entropy.

    Its own optimizer is one of the usual baselines, at torch's default rates unless told otherwise; with
    `HRNNOptimizerCallback` in the trainer's callbacks the learned optimizer takes its place.

    It logs `train/loss`, and `val/loss`, `val/acc`, `val/acc_top5` (the same under `test/`); accuracies are
    fractions, those at `test/` and `val/` cover the whole set.

    Args:
        model: Name of the net: `conv`, `conv_bn`, or any name of timm or torchvision, if need be as
            `timm/NAME` or `torchvision/NAME`.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        model_options: More arguments for the net's builder, such as `{"width": 32}` for `conv`.
        label_smoothing: Share of the target probability that is spread evenly over all classes. Only
            training uses it.
        auxiliary_weight: Weight of the loss of auxiliary logits, where the net has any (torchvision's
            Inception V3, GoogLeNet).
        optimizer: The baseline optimizer.
        lr: Its learning rate; None means torch's default (AdamW, Adam and SGD 0.001, RMSprop 0.01).
        momentum: Momentum of `sgd` (other optimizers do not read it).
        weight_decay: Its weight decay; None means torch's default (AdamW 0.01, the others 0).
        schedule: `constant`, or `cosine`: from the end of the warm-up to zero at the end of training.
        warmup_steps: Steps over which the rate grows linearly from zero. Both schedules have it.

    Raises:
        ValueError: If the model's name is unknown.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[HRNNOptimizerCallback()])
        trainer.fit(ImageClassifier("resnet18", in_channels=3), datamodule=CIFAR10Data("data"))
    """

    def __init__(
        self,
        model: str = "conv",
        num_classes: int = 10,
        in_channels: int = 1,
        model_options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.4,
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; valid are {', '.join(OPTIMIZERS)}.")
        self.save_hyperparameters()
        self.net = build_model(model, in_channels, num_classes, **(model_options or {}))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        accuracies = {"acc": _accuracy(num_classes, top_k=1)}
        if num_classes > 5:
            accuracies["acc_top5"] = _accuracy(num_classes, top_k=5)
        self.val_accuracy = MetricCollection({**accuracies}, prefix="val/")
        self.test_accuracy = self.val_accuracy.clone(prefix="test/")

    def forward(self, images: Tensor) -> Any:
        """Return the logits [B, num_classes] of images [B, C, H, W]."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean training loss of a batch of images [B, C, H, W] and labels [B]."""
        images, labels = batch
        output = self(images)
        if isinstance(output, tuple):  # the logits first, then the auxiliary ones
            loss, *auxiliary = (self.criterion(logits, labels) for logits in output if logits is not None)
            loss = loss + self.hparams["auxiliary_weight"] * sum(auxiliary)
        else:
            loss = self.criterion(output, labels)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the validation set."""
        self._score(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the test set."""
        self._score(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class [B, num_classes]."""
        return torch.softmax(self(batch[0]), dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the baseline optimizer, with its schedule if it has one."""
        optimizer = self._baseline()
        if self.hparams["schedule"] == "constant" and not self.hparams["warmup_steps"]:
            return optimizer
        cosine = self.hparams["schedule"] == "cosine"
        total_steps = int(self.trainer.estimated_stepping_batches) if cosine else None
        factor = partial(rate_factor, warmup_steps=self.hparams["warmup_steps"], total_steps=total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _baseline(self) -> Optimizer:
        options: dict[str, Any] = {}
        for key in ("lr", "weight_decay"):
            if self.hparams[key] is not None:
                options[key] = self.hparams[key]
        name = self.hparams["optimizer"]
        if name == "sgd":
            options["momentum"] = self.hparams["momentum"]
        return OPTIMIZERS[name](self.parameters(), **options)

    def _score(self, batch: Batch, stage: str, accuracy: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log_dict(accuracy, prog_bar=True)


def rate_factor(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """Return the learning rate at a step as a multiple of the base rate.

    Args:
        step: Number of steps done.
        warmup_steps: Steps of linear growth, the first of which already moves: (step + 1) / warmup_steps.
        total_steps: Steps of the whole run, for a cosine from 1 after the warm-up to 0 at the end; None
            keeps 1.

    Example:
        >>> [round(rate_factor(step, warmup_steps=2, total_steps=6), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, top_k=top_k, average="micro")
