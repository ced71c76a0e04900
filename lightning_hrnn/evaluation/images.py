"""Convolutional nets on real images, as task families: handwritten digits and Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_

from lightning_hrnn.evaluation.nets import Examples, FixedDataTask
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.vision.data import ImageData
from lightning_hrnn.vision.datasets import DigitsData, FashionMNISTData
from lightning_hrnn.vision.models import conv, conv_bn


@lru_cache(maxsize=1)
def digits() -> Examples:
    """Return the 1,437 training images of scikit-learn's digits, 8x8."""
    return _examples(DigitsData(validation=0))


@lru_cache(maxsize=1)
def fashion(data_dir: str | None) -> Examples:
    """Return the 60,000 training images of Fashion-MNIST, 28x28.

    Args:
        data_dir: where the idx files or torchvision's folder are; None looks in `data` and in Debian's package.

    Raises:
        DataNotFoundError: there are no such files; the message says how to obtain them.
    """
    return _examples(FashionMNISTData(data_dir, validation=0))


def _examples(data: ImageData) -> Examples:
    images, scale = data.images("train"), data.scale
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the first ones are scored
    mean, std = scale.mean[0] * scale.maximum, scale.std[0] * scale.maximum
    return Examples(images.images[order], images.labels[order], mean, std)


class Residual(nn.Module):
    """Add to the input two 3x3 convolutions of it, each after batch norm and ReLU (He et al. 2016, arXiv 1603.05027).

    Args:
        inputs: channels in.
        outputs: channels out; where they differ, the block halves the image and a 1x1 convolution carries the input.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.norm = batch_norm(inputs)
        self.carry = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            batch_norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:  # [n, inputs, H, W] -> [n, outputs, H', W']
        """Return input and body's sum."""
        active = self.norm(x).relu()
        return (x if self.carry is None else self.carry(active)) + self.body(active)


def resnet_v2(width: int = 8, stride: int = 1) -> nn.Module:
    """Build a ResNet V2 of three blocks.

    Args:
        width: channels of the first stage; the others have twice and four times as many.
        stride: of the first convolution.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride, padding=1, bias=False),
        Residual(width, width),
        Residual(width, 2 * width),
        Residual(2 * width, 4 * width),
        batch_norm(4 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def strided_conv(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Build a net of two strided convolutions, small as the paper's, for 28x28 images.

    Args:
        norm: builds what follows each convolution, from its channels.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 5, stride=2, padding=2), norm(16), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def batch_norm(channels: int) -> nn.Module:
    """Build a batch norm that knows the statistics of its batch alone."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def plain(width: int) -> nn.Module:
    """Build the small convolutional net of `vision.models`."""
    return conv(1, 10, width)


def normed(width: int) -> nn.Module:
    """Build the same with batch norm, which knows the statistics of its batch alone."""
    return replace_all_batch_norm_modules_(conv_bn(1, 10, width))


def vision_nets(data_dir: str | None) -> dict[str, Callable[[], TaskFamily]]:
    """Return the families by name; each is made when called, its data read when it draws instances.

    Args:
        data_dir: folder of Fashion-MNIST; None looks where it usually is.
    """
    clothes = partial(fashion, data_dir)
    nets: dict[str, tuple[Callable[[], nn.Module], Callable[[], Examples]]] = {
        "digits-conv": (partial(plain, 8), digits),
        "digits-norm-conv": (partial(normed, 8), digits),
        "digits-resnet-v2": (partial(resnet_v2, 8), digits),
        "fashion-conv": (partial(strided_conv, nn.Identity), clothes),
        "fashion-norm-conv": (partial(strided_conv, batch_norm), clothes),
        "fashion-resnet-v2": (partial(resnet_v2, 8, 2), clothes),
    }
    return {name: partial(FixedDataTask, name, build, load, 32) for name, (build, load) in nets.items()}
