"""A generated image folder in ImageNet's layout, to try a pipeline before the real images are there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def write_image_folder(
    folder: str | Path, classes: int = 10, train: int = 64, val: int = 16, size: int = 256, seed: int = 0
) -> Path:
    """Write JPEG images of `classes` kinds of coloured stripes, `FOLDER/{train,val}/CLASS/NUMBER.JPEG`.

    Each class has a colour, a direction and a width of its stripes; shift, brightness and noise are drawn for
    each image. A net learns them in a few hundred steps: a loss that does not fall means that something in
    the pipeline is wrong. It says nothing about real images.

    Args:
        folder: Where to write; made if need be.
        classes: Number of classes.
        train: Training images of each class.
        val: Validation images of each class.
        size: Side of the images in pixels.
        seed: Seed of the classes and of the images.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds images already.

    Example::

        write_image_folder("data/generated")
        ImageNetData("data/generated")
    """
    from PIL import Image

    folder = Path(folder)
    for part in ("train", "val"):
        if (folder / part).exists():
            raise FileExistsError(f"{folder / part} is there already; name another folder, or remove it.")
    generator = torch.Generator().manual_seed(seed)
    for index in range(classes):
        colour = torch.rand(3, generator=generator)
        wave = torch.randn(2, generator=generator) * 12 / size  # radians per pixel, down and across
        for part, count in (("train", train), ("val", val)):
            place = folder / part / f"class{index:04d}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = _stripes(colour, wave, size, generator)
                Image.fromarray(pixels.numpy()).save(place / f"{number:05d}.JPEG", quality=90)
    return folder


def _stripes(colour: Tensor, wave: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw one image, bytes [size, size, 3]."""
    shift, brightness = torch.rand(2, generator=generator).tolist()
    along = torch.arange(size, dtype=torch.float32)
    phase = wave[0] * along[:, None] + wave[1] * along + 6.2832 * shift  # [size, size]
    light = (0.5 + 0.5 * torch.sin(phase)).unsqueeze(2) * colour * (0.6 + 0.4 * brightness)
    noise = 0.1 * torch.randn(size, size, 3, generator=generator)
    return ((light + noise).clamp(0, 1) * 255).to(torch.uint8)
