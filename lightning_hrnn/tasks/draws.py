"""Random draws that task families share.

Tensors come from a `torch.Generator`, on its device and in torch's default dtype; configurations (sizes, noise
levels, activations) come from a `random.Random`.

Shapes: B instances, N examples, D dimensions, V entries of a table, E numbers in an entry.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class InStep(torch.Generator):
    """A source from which copies of instances draw the same: `[copies * B, ...]` is `[B, ...]` several times over."""

    copies = 1

    @classmethod
    def of(cls, source: torch.Generator, copies: int) -> InStep:
        """Begin where another source is, and leave that alone."""
        generator = cls(source.device)
        generator.set_state(source.get_state())
        generator.copies = copies
        return generator


def _drawn(
    sampler: Callable[..., Tensor], generator: torch.Generator, shape: Sequence[int], **options: Any
) -> Tensor:  # [shape]
    """Draw for the instances that `shape` begins with, once for all copies that are in step."""
    copies = generator.copies if isinstance(generator, InStep) else 1
    own = (shape[0] // copies, *shape[1:]) if copies > 1 else shape
    value = sampler(size=own, generator=generator, device=generator.device, **options)
    return value.repeat(copies, *[1] * (len(shape) - 1)) if copies > 1 else value


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers."""
    return _drawn(torch.randn, generator, shape)


def normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers with the shape and dtype of `tensor`."""
    return _drawn(torch.randn, generator, tensor.shape, dtype=tensor.dtype)


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw numbers uniform in `[low, high)`."""
    return low + (high - low) * _drawn(torch.rand, generator, shape)


def integers(generator: torch.Generator, *shape: int, below: int) -> Tensor:
    """Draw integers uniform in `[0, below)`."""
    return _drawn(torch.randint, generator, shape, low=0, high=below)


def rotation(generator: torch.Generator, count: int, dim: int) -> Tensor:
    """Draw `count` uniformly distributed orthogonal matrices, `[B, D, D]`.

    The Q of a Gaussian matrix's QR factorisation is uniform once R's diagonal is made positive
    (Mezzadri, Notices of the AMS 54(5), 2007).
    """
    q, r = torch.linalg.qr(normal(generator, count, dim, dim))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)  # [B, D]
    return q * signs.unsqueeze(-2)


def minibatch(*tensors: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Draw the same `size` rows of each tensor `[B, N, ...]` with replacement; returns `[B, size, ...]` each."""
    rows = integers(generator, len(tensors[0]), size, below=tensors[0].shape[1])
    start = tensors[0].shape[1] * torch.arange(len(rows), device=rows.device).unsqueeze(-1)
    flat = (rows + start).flatten()
    return [tensor.flatten(0, 1).index_select(0, flat).unflatten(0, rows.shape) for tensor in tensors]


def lookup(table: Tensor, rows: Tensor) -> Tensor:
    """Pick rows `[B, ...]` of each instance's own table `[B, V, E]`; returns `[B, ..., E]`."""
    count, entries = table.shape[:2]
    start = entries * torch.arange(count, device=rows.device).view(-1, *[1] * (rows.dim() - 1))
    return table.flatten(0, 1).index_select(0, (rows + start).flatten()).unflatten(0, rows.shape)


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform in `[log low, log high]`."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def log_integer(rng: random.Random, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both included, about log-uniformly."""
    return min(high, int(log_uniform(rng, low, high + 1)))
