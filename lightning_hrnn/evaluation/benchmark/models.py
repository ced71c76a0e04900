"""What is optimized: real networks, and ResNet-18's tensors at any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

CLASSES = 1000
SCALED = 10
"""Dimensions from this size on are scaled: channels and classes, but neither the three colours nor kernels."""

Shape = tuple[int, ...]


class Model(NamedTuple):
    """Hold the shapes of a model's parameters and, of a real network, the network."""

    name: str
    shapes: list[Shape]
    module: nn.Module | None

    @property
    def params(self) -> int:
        """Number of parameters."""
        return _count(self.shapes)


def load_model(name: str) -> Model:
    """Return a model by name.

    Args:
        name: a network of torchvision, such as `"resnet50"`, `"timm/NAME"`, `"conv"`, or a number of parameters,
            such as `"1e6"`: ResNet-18's tensors at the width that comes nearest to it.

    Raises:
        ValueError: nothing has that name, or the number is too small.
    """
    from lightning_hrnn.vision.models import MODELS, build_model

    try:
        target = float(name)
    except ValueError:
        own = name in MODELS or "/" in name
        module = build_model(name if own else f"torchvision/{name}", 3, CLASSES)
        return Model(name, [tuple(param.shape) for param in module.parameters()], module)
    from torchvision.models import resnet18

    with torch.device("meta"):  # shapes alone
        whole = [tuple(param.shape) for param in resnet18().parameters()]
    smallest = _count(_scaled(whole, 0.0))
    if not smallest <= target <= 1e12:
        raise ValueError(f"A model has from {smallest:,} to 1e12 parameters, not {name}.")
    return Model(name, _scaled(whole, _width(whole, target)), None)


def _width(shapes: Sequence[Shape], target: float) -> float:
    """Return the width at which the tensors have most nearly `target` parameters, by bisection."""
    low, high = 0.0, 1.0
    while _count(_scaled(shapes, high)) < target:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _count(_scaled(shapes, middle)) < target else (low, middle)
    return min(low, high, key=lambda width: abs(_count(_scaled(shapes, width)) - target))


def _scaled(shapes: Sequence[Shape], width: float) -> list[Shape]:
    return [tuple(max(1, round(width * size)) if size >= SCALED else size for size in shape) for shape in shapes]


def _count(shapes: Sequence[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
