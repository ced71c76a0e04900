"""Generated image data sets in the layouts in which real ones come."""

import gzip
import struct

import torch

from lightning_hrnn.vision.batches import ImageSet


def write_idx(path, elements):
    """Write bytes as an idx file, gzipped if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = struct.pack(f">2xBB{elements.dim()}I", 8, elements.dim(), *elements.shape) + elements.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_idx_set(folder, train, test, suffix=".gz", side=28):
    """Write random images with classes 0..9 in turn as MNIST's four files; return both parts."""
    parts = []
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, side, side), dtype=torch.uint8)
        labels = torch.arange(count) % 10
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels.to(torch.uint8))
        parts.append(ImageSet(images.unsqueeze(1), labels))
    return parts


class StoredCIFAR:
    """What torchvision's data sets of CIFAR give, with a few images of known bytes."""

    base_folder = "cifar-10-batches-py"

    def __init__(self, root, train):
        count = 200 if train else 10
        values = torch.arange(count * 32 * 32 * 3).remainder(251).to(torch.uint8)
        self.data = values.view(count, 32, 32, 3).numpy()
        self.targets = [i % 10 for i in range(count)]
