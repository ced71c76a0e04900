"""Read the idx files in which MNIST and its successors are published, gzipped or not.

Format: two zero bytes, a byte for the element type (8 = unsigned byte), a byte for the number of dimensions,
each dimension as a big-endian 32-bit integer, then the elements in C order. Source:
http://yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 8


def read_idx(path: str | Path) -> Tensor:
    """Read an idx file of unsigned bytes.

    Args:
        path: The file; a name that ends in `.gz` is decompressed.

    Returns:
        The elements (`torch.uint8`), in the shape that the file's header states.

    Raises:
        ValueError: If the file is damaged or is no idx file of unsigned bytes.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); get the file again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path} is no idx file of unsigned bytes; get the file again.")
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:header]) if len(raw) >= header else ()
    elements = torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8) if len(raw) > header else torch.empty(0)
    expected = 1
    for size in shape:
        expected *= size
    if not shape or elements.numel() != expected:
        raise ValueError(
            f"{path} is cut short or damaged: its header promises the shape {list(shape)}, "
            f"it holds {elements.numel()} bytes of data; get the file again."
        )
    return elements.view(*shape)


def find_idx(folder: Path, stem: str) -> Path | None:
    """Return `folder/stem.gz` or `folder/stem`, whichever is there; None if neither is."""
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    return None
