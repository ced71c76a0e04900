"""Image classification networks by name: small ones of our own, any of timm and of torchvision."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

Builder = Callable[..., nn.Module]


def conv(in_channels: int, num_classes: int, width: int = 16) -> nn.Module:
    """Build a plain convolutional net of three 3x3 convolutions and a linear layer.

    ReLU after each convolution, a max pool before the third, an average pool to 2x2 before the linear layer.
    It takes images of any size from 4x4 up. With one channel, ten classes and `width=16` it has 15,338
    parameters in 8 tensors.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        width: Channels of the first convolution; the others have twice as many.

    Returns:
        A net from [B, in_channels, H, W] to logits [B, num_classes].
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, num_classes),
    )


def conv_bn(in_channels: int, num_classes: int, width: int = 16) -> nn.Module:
    """Build the net of `conv` with batch normalisation after each convolution (whose own bias is left out).

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        width: Channels of the first convolution; the others have twice as many.

    Returns:
        A net from [B, in_channels, H, W] to logits [B, num_classes].
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(in_channels, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, num_classes),
    )


def inception_v3_narrow(in_channels: int, num_classes: int, divisor: int = 4) -> nn.Module:
    """Build torchvision's Inception V3 with a fraction of its channels and without its auxiliary logits.

    All of its layers are there, with weights drawn as their authors did; every layer keeps the first of its
    channels. It takes images from 75x75 up. With one channel, ten classes and `divisor=4` it has 1,373,202
    parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        divisor: What the number of channels of every layer is divided by: 1, 2, 4, 8 or 16.

    Returns:
        A net from [B, in_channels, H, W] to logits [B, num_classes].

    Raises:
        ValueError: If `divisor` does not divide the channels of every layer.
    """
    if divisor < 1 or 16 % divisor:
        raise ValueError(
            f"divisor must be 1, 2, 4, 8 or 16, which divide all of Inception V3's channels; got {divisor}."
        )
    net = build_model("torchvision/inception_v3", in_channels, num_classes, aux_logits=False)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels //= divisor
            if module is not convolutions[0]:
                module.in_channels //= divisor
            module.weight = nn.Parameter(module.weight[: module.out_channels, : module.in_channels].clone())
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features //= divisor
            for part in ("weight", "bias"):
                setattr(module, part, nn.Parameter(getattr(module, part)[: module.num_features].clone()))
            for part in ("running_mean", "running_var"):
                setattr(module, part, getattr(module, part)[: module.num_features].clone())
        elif isinstance(module, nn.Linear):
            module.in_features //= divisor
            module.weight = nn.Parameter(module.weight[:, : module.in_features].clone())
    return net


MODELS: dict[str, Builder] = {"conv": conv, "conv_bn": conv_bn, "inception_v3_narrow": inception_v3_narrow}
"""Our own nets: name -> builder(in_channels, num_classes, **options)."""

CHOOSE_THEIR_START = ("googlenet", "inception_v3")
"""Nets of torchvision that warn unless told whether to draw their first weights as their authors did."""


def build_model(name: str, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """Build a freshly initialised classifier.

    Args:
        name: One of `MODELS`, `timm/NAME`, `torchvision/NAME`, or a bare NAME, looked up in that order.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        options: Passed on to the builder of the net.

    Returns:
        The net, from [B, in_channels, H, W] to logits [B, num_classes] (torchvision's Inception V3 and
        GoogLeNet return a named tuple with auxiliary logits while they train).

    Raises:
        ValueError: If nothing has that name; similar names are listed.

    Example:
        >>> sum(p.numel() for p in build_model("conv", in_channels=1, num_classes=10).parameters())
        15338
    """
    library, _, bare = name.rpartition("/")
    if not library and name in MODELS:
        return MODELS[name](in_channels, num_classes, **options)
    if library in ("", "timm"):
        import timm

        if timm.is_model(bare):
            return timm.create_model(bare, in_chans=in_channels, num_classes=num_classes, **options)
    if library in ("", "torchvision"):
        from torchvision import models

        if bare in _torchvision_names():
            if bare in CHOOSE_THEIR_START:
                options.setdefault("init_weights", True)
            net = models.get_model(bare, num_classes=num_classes, **options)
            return net if in_channels == 3 else _adapt_first_convolution(net, in_channels)
    raise ValueError(_unknown(name, bare))


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _unknown(name: str, bare: str) -> str:
    import timm

    known = [*MODELS, *timm.list_models(), *(f"torchvision/{other}" for other in _torchvision_names())]
    similar = difflib.get_close_matches(bare, known, n=5)
    hint = f"similar names: {', '.join(similar)}; " if similar else ""
    return f"unknown model {name!r}; {hint}valid are {', '.join(MODELS)}, and any of timm/NAME or torchvision/NAME."


def _adapt_first_convolution(net: nn.Module, in_channels: int) -> nn.Module:
    """Let a torchvision net, whose first convolution takes three channels, take `in_channels`."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            replacement = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, replacement)
            return net
    raise ValueError(f"{type(net).__name__} has no convolution to adapt to {in_channels} channels; use 3 channels.")
