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
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_hrnn.vision.baselines import OPTIMIZERS, OptimizerName, build_baseline, rate_factor
from lightning_hrnn.vision.models import build_model
from lightning_hrnn.vision.sharding import shard_blocks

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Train an image classification net by cross-entropy.

    Its own optimizer is one of the usual baselines, at torch's default rates unless told otherwise; with
    `HRNNOptimizerCallback` in the trainer's callbacks the learned optimizer takes its place.

    It logs `train/loss`, and `val/loss`, `val/acc`, `val/acc_top5` (the same under `test/`); accuracies are
    fractions, those at `test/` and `val/` cover the whole set.

    It trains on one device, under DDP, and under `ModelParallelStrategy`, which shards its parameters (FSDP2).
    Precision is the trainer's.

    Args:
        model: Name of the net: `conv`, `conv_bn`, or any name of timm or torchvision, if need be as
            `timm/NAME` or `torchvision/NAME`.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        model_options: More arguments for the net's builder, such as `{"width": 32}` for `conv`.
        label_smoothing: Share of the target probability that is spread evenly over all classes. Only
            training uses it.
        auxiliary_weight: Weight of the loss of auxiliary logits, where the net has any (torchvision's
            Inception V3 and GoogLeNet; timm's Inception V3 with `model_options={"aux_logits": True}`).
        channels_last: Keep images and weights in memory with the channels last, as GPUs with bf16 like it;
            images alone where FSDP2 shards the weights.
        compile: Backend of `torch.compile` for the net, such as `inductor`; None runs it as it is.
        optimizer: The baseline optimizer; `rmsprop_tf` is TensorFlow's RMSProp.
        lr: Its learning rate; None means its default (AdamW, Adam and SGD 0.001, RMSprop 0.01).
        momentum: Momentum of `sgd` (other optimizers do not read it).
        weight_decay: Its weight decay, of the weights of convolutions and linear layers, not of biases and
            norms; None means torch's default (AdamW 0.01, the others 0) for all parameters.
        optimizer_options: More arguments for the optimizer, such as `{"alpha": 0.9}` for `rmsprop`.
        schedule: `constant`; `cosine`, from the end of the warm-up to zero at the end of training; or `step`,
            which multiplies the rate by `decay_rate` after every `decay_epochs` epochs.
        warmup_steps: Steps over which the rate grows linearly from zero. All schedules have it.
        decay_epochs: Epochs between the decays of `step`.
        decay_rate: What each decay of `step` multiplies by.

    Raises:
        ValueError: If the model or the optimizer is unknown, the data have more classes than the net, or a
            cosine has no end.

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
        channels_last: bool = False,
        compile: str | None = None,
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        optimizer_options: dict[str, Any] | None = None,
        schedule: Literal["constant", "cosine", "step"] = "constant",
        warmup_steps: int = 0,
        decay_epochs: float = 30.0,
        decay_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; valid are {', '.join(OPTIMIZERS)}.")
        self.save_hyperparameters()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        net = build_model(model, in_channels, num_classes, **(model_options or {}))
        self.net = net.to(memory_format=self.memory_format)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        accuracies = {"acc": _accuracy(num_classes, top_k=1)}
        if num_classes > 5:
            accuracies["acc_top5"] = _accuracy(num_classes, top_k=5)
        self.val_accuracy = MetricCollection({**accuracies}, prefix="val/")
        self.test_accuracy = self.val_accuracy.clone(prefix="test/")

    def configure_model(self) -> None:
        """Shard the net, if the strategy has a device mesh, and compile it, if asked to."""
        if self.device_mesh is not None:
            self.net.to(memory_format=torch.contiguous_format)  # FSDP2 shards no other
            shard_blocks(self.net, self.device_mesh["data_parallel"])
        if self.hparams["compile"] is not None:
            self.net.compile(backend=self.hparams["compile"])

    def setup(self, stage: str) -> None:
        """Compare the classes of the data with those of the net."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is not None and classes > self.hparams["num_classes"]:
            raise ValueError(
                f"The data have {classes} classes, the net {self.hparams['num_classes']}; "
                f"set --model.num_classes {classes}."
            )

    def forward(self, images: Tensor) -> Any:
        """Return what the net makes of images [B, C, H, W]: logits [B, num_classes], or a tuple of them.

        A tuple holds auxiliary logits after the first.
        """
        return self.net(images.contiguous(memory_format=self.memory_format))

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

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score a batch of the validation set; return its logits [B, num_classes]."""
        return self._score(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score a batch of the test set; return its logits [B, num_classes]."""
        return self._score(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class [B, num_classes]."""
        return torch.softmax(self._logits(batch[0]), dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the baseline optimizer, with its schedule if it has one."""
        own = self.hparams
        options = dict(own["optimizer_options"] or {})
        if own["lr"] is not None:
            options["lr"] = own["lr"]
        if own["optimizer"] == "sgd":
            options["momentum"] = own["momentum"]
        optimizer = build_baseline(self, own["optimizer"], own["weight_decay"], **options)
        if own["schedule"] == "constant" and not own["warmup_steps"]:
            return optimizer
        lengths: dict[str, Any] = {}
        if own["schedule"] == "cosine":
            lengths = {"total_steps": self._total_steps()}
        elif own["schedule"] == "step":
            lengths = {"decay_steps": own["decay_epochs"] * self._steps_per_epoch(), "decay_rate": own["decay_rate"]}
        factor = partial(rate_factor, warmup_steps=own["warmup_steps"], **lengths)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("A cosine schedule needs an end: set --trainer.max_epochs or --trainer.max_steps.")
        return int(total)

    def _steps_per_epoch(self) -> float:
        self.trainer.fit_loop.setup_data()  # what counts the batches
        batches = self.trainer.num_training_batches
        return batches if math.isinf(batches) else math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _score(self, batch: Batch, stage: str, accuracy: MetricCollection) -> Tensor:
        images, labels = batch
        logits = self._logits(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log_dict(accuracy, prog_bar=True)
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, num_classes] alone; some nets give auxiliary ones also when they do not train."""
        output = self(images)
        return output[0] if isinstance(output, tuple) else output


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, top_k=top_k, average="micro")
