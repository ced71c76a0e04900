"""Pictures of what a classifier predicts, logged from time to time while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_hrnn.tracking import log_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 20
"""Whose names can be read along the sides of a confusion matrix."""


class LogPredictions(Callback):
    """Log, after validation, some images with what the module takes them for, and the confusion matrix.

    As `val/predictions` and `val/confusion`: to Weights & Biases and TensorBoard as images, beside CSV logs as
    PNG files in the folder `pictures`. The matrix covers the whole validation set, on all processes; of more
    than 20 classes it shows those 20 that are confused most.

    Args:
        every_n_epochs: Epochs between two sets of pictures.
        images: Number of images to show, the first of the validation set.

    Raises:
        TypeError: If the module's `validation_step` does not return logits [B, classes].

    Example::

        Trainer(callbacks=[LogPredictions(every_n_epochs=5)], logger=WandbLogger(offline=True))
    """

    def __init__(self, every_n_epochs: int = 1, images: int = 16) -> None:
        self.every_n_epochs = every_n_epochs
        self.images = images
        self._confusion: MulticlassConfusionMatrix | None = None
        self._shown: list[tuple[Tensor, Tensor, Tensor]] = []  # images, logits, labels

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what was taken for what; keep the first images."""
        if not self._due(trainer):
            return
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise TypeError(
                f"LogPredictions needs the logits: let {type(pl_module).__name__}.validation_step return them."
            )
        images, labels = batch
        if self._confusion is None:
            self._confusion = MulticlassConfusionMatrix(outputs.shape[1]).to(outputs.device)
        self._confusion.update(outputs, labels)
        missing = self.images - sum(len(kept) for kept, _, _ in self._shown)
        if missing > 0 and trainer.is_global_zero:
            first = (images[:missing], outputs[:missing], labels[:missing])
            self._shown.append(tuple(tensor.detach().float().cpu() for tensor in first))  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log."""
        if self._confusion is None:
            return
        counts = self._confusion.compute().cpu()  # [K, K], summed over all processes
        shown, self._confusion, self._shown = self._shown, None, []
        if not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        names = list(getattr(data, "classes", None) or map(str, range(len(counts))))
        images, logits, labels = (torch.cat(parts) for parts in zip(*shown, strict=True))
        if hasattr(data, "picture"):
            images = data.picture(images)
        pictures = {
            "val/predictions": draw_predictions(images, logits, labels.long(), names),
            "val/confusion": draw_confusion(counts, names),
        }
        for logger in trainer.loggers:
            for name, picture in pictures.items():
                log_picture(logger, name, picture, trainer.global_step)

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or not trainer.loggers:
            return False
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0


def draw_predictions(images: Tensor, logits: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    """Draw images with what they are taken for, how surely, and, where that is wrong, what they are.

    Args:
        images: Shares of brightness [B, C, H, W]; of other than three channels the first is shown.
        logits: [B, K].
        labels: [B].
        names: Of the K classes.

    Returns:
        The picture: bytes [H, W, 3].
    """
    from matplotlib.figure import Figure

    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), dpi=100, layout="constrained")
    surest = torch.softmax(logits, dim=1).max(dim=1)
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for axes in cells:
        axes.set_axis_off()
    for axes, image, share, taken, label in zip(
        figure.axes, images, surest.values, surest.indices, labels, strict=False
    ):
        if len(image) == 3:
            axes.imshow(image.permute(1, 2, 0).numpy())
        else:
            axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        right = bool(taken == label)
        told = f"{names[int(taken)]} {100 * float(share):.0f} %"
        title = told if right else f"{told}\nis {names[int(label)]}"
        axes.set_title(title, fontsize=8, color="black" if right else "#D55E00")
    return pixels(figure)


def draw_confusion(counts: Tensor, names: list[str]) -> Tensor:
    """Draw a confusion matrix, in shares of each true class.

    Args:
        counts: [K, K], rows for what an image is, columns for what it is taken for.
        names: Of the K classes.

    Returns:
        The picture: bytes [H, W, 3].
    """
    from matplotlib.figure import Figure

    chosen = most_confused(counts)
    title = "Shares of each class"
    if len(chosen) < len(counts):
        title += f": the {len(chosen)} of {len(counts)} confused most"
    shares = counts[chosen][:, chosen] / counts[chosen].sum(1, keepdim=True).clamp(min=1)
    shown = [names[int(index)] for index in chosen]
    figure = Figure(figsize=(3 + 0.35 * len(shown), 2.4 + 0.35 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), shown, fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return pixels(figure)


def most_confused(counts: Tensor, most: int = MOST_CLASSES) -> Tensor:
    """Return the classes, at most so many and ascending, that are taken for others or others for them most often.

    Example:
        >>> most_confused(torch.tensor([[9, 0, 1], [0, 9, 0], [0, 0, 9]]), most=2)
        tensor([0, 2])
    """
    wrong = counts.sum(1) + counts.sum(0) - 2 * counts.diagonal()
    return wrong.topk(min(most, len(counts))).indices.sort().values


def pixels(figure: Figure) -> Tensor:
    """Return a figure as bytes [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)
    return rgba[..., :3].contiguous()
