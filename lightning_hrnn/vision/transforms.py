"""What turns stored bytes into a network's input, a batch at a time.

Legend: `B` images in a batch, `C` channels, `H x W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def brightness(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn inputs [B, C, H, W], centred by `mean` and `std` of each channel, back into shares of brightness."""
    centre, width = images.new_tensor(mean), images.new_tensor(std)
    return (images * width[:, None, None] + centre[:, None, None]).clamp(0, 1)


@dataclass(frozen=True)
class Scale:
    """Turn stored bytes into the network's input: scaled to 0..1, centred, resized if asked.

    Args:
        mean: Mean of each channel [C], of values scaled to 0..1.
        std: Standard deviation of each channel [C].
        maximum: The stored value that stands for 1.
        size: Side in pixels to resize to (bilinear); None keeps the stored size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: float = 255.0
    size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Map bytes [B, C, H, W] to floats [B, C, H', W']."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1) * self.maximum
        std = torch.tensor(self.std).view(1, -1, 1, 1) * self.maximum
        scaled = (images.float() - mean) / std
        if self.size is not None:
            scaled = F.interpolate(scaled, size=self.size, mode="bilinear", antialias=True)
        return scaled


@dataclass(frozen=True)
class ShiftAndFlip:
    """Move each image by up to `shift` pixels (zeros enter), mirror half of them, then scale.

    Draws from torch's global random state.

    Args:
        scale: What follows.
        shift: Largest move in pixels along either axis.
    """

    scale: Scale
    shift: int = 4

    def __call__(self, images: Tensor) -> Tensor:
        """Map bytes [B, C, H, W] to floats [B, C, H', W']."""
        count, _, height, width = images.shape
        padded = F.pad(images, [self.shift] * 4)
        top = torch.randint(0, 2 * self.shift + 1, (count, 1))
        left = torch.randint(0, 2 * self.shift + 1, (count, 1))
        rows = top + torch.arange(height)  # [B, H]
        columns = left + torch.arange(width)  # [B, W]
        mirrored = torch.rand(count, 1) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        examples = torch.arange(count).view(-1, 1, 1)
        moved = padded.permute(0, 2, 3, 1)[examples, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
        return self.scale(moved.permute(0, 3, 1, 2))
