"""Where the tensors of a step are in memory: the tables that the Triton kernel reads.

Legend: `T` tensors, `B` chunks of all tensors, `R` readouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.optimizer.kernels import TensorWork

LARGEST = 2**31 - 1  # elements of a tensor that is not contiguous

Types = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient, state


class Launch(NamedTuple):
    """Say which chunks one launch takes."""

    types: Types
    first_chunk: int
    chunks: int


class Tables(NamedTuple):
    """Hold what the device reads of a set of tensors, and how to launch over it."""

    tensors: Tensor  # [T, 18]
    chunks: Tensor  # [B, 2]
    launches: list[Launch]
    steps: int  # elements
    host: tuple[Tensor, ...]  # what was copied to the device


def types_of(tensor: TensorWork) -> Types:
    """Return the types of parameter, gradient and state."""
    return tensor.param.dtype, tensor.grad.dtype, tensor.hidden.dtype


def whereabouts(tensor: TensorWork) -> tuple[Any, ...]:
    """Return everything of a tensor that its row in the table depends on."""
    param, grad = tensor.param, tensor.grad
    return (
        param.data_ptr(),
        grad.data_ptr(),
        tensor.hidden.data_ptr(),
        tensor.average.data_ptr(),
        tensor.square.data_ptr(),
        0 if tensor.lookahead is None else tensor.lookahead.data_ptr(),
        types_of(tensor),
        param.shape,
        param.stride(),
        grad.stride(),
    )


def build_tables(work: Sequence[TensorWork], readouts: int, chunk: int) -> Tables:
    """Lay out chunks of so many parameters, those of one type side by side, and write down where everything is."""
    counts = [tensor.param.numel() for tensor in work]
    chunks_in = [-(-count // chunk) for count in counts]
    order = sorted(range(len(work)), key=lambda index: str(types_of(work[index])))
    first, launches, chunks = [0] * len(work), [], 0
    for types, members in groupby(order, key=lambda index: types_of(work[index])):
        begin = chunks
        for index in members:
            first[index] = chunks
            chunks += chunks_in[index]
        if chunks > begin:
            launches.append(Launch(types, begin, chunks - begin))
    tensor_of = torch.repeat_interleave(torch.tensor(order), torch.tensor([chunks_in[index] for index in order]))
    number = torch.arange(chunks) - torch.tensor(first)[tensor_of]
    rows, steps = [], 0
    for tensor, count, start, length in zip(work, counts, first, chunks_in, strict=True):
        sizes = dimensions(tensor.param.shape, tensor.param.stride(), tensor.grad.stride())
        addresses = whereabouts(tensor)[:6]
        rows.append([*addresses, steps, count, *(sizes or [0] * 8), start, length])
        steps += readouts * count
    device = work[0].param.device
    tensors, tensors_host = upload(torch.tensor(rows), device)
    table, table_host = upload(torch.stack([tensor_of, number], 1).int(), device)
    return Tables(tensors, table, launches, steps, (tensors_host, table_host))


def upload(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy to the device without waiting for it; return the copy, and what must live until it is done."""
    if device.type != "cuda":
        return host, host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host


@lru_cache(maxsize=16_384)
def dimensions(
    shape: tuple[int, ...], param_strides: tuple[int, ...], grad_strides: tuple[int, ...]
) -> list[int] | None:
    """Merge dimensions that lie as one in both tensors; return sizes of the inner two of three and all strides.

    Returns:
        Middle and inner size, three strides of the parameter, three of the gradient; or `None` where both are
        contiguous.

    Raises:
        ValueError: more than three dimensions are left.
    """
    merged: list[tuple[int, int, int]] = []
    for size, param, grad in zip(shape, param_strides, grad_strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == (param * size, grad * size):
            merged[-1] = (merged[-1][0] * size, param, grad)
        else:
            merged.append((size, param, grad))
    if not merged or [dimension[1:] for dimension in merged] == [(1, 1)]:
        return None
    if len(merged) > 3:
        raise ValueError(f"{len(merged)} dimensions cannot be merged to three.")
    merged = [(1, 0, 0)] * (3 - len(merged)) + merged
    sizes, of_param, of_grad = zip(*merged, strict=True)
    return [*sizes[1:], *of_param, *of_grad]


def describable(tensor: TensorWork) -> TensorWork:
    """Put contiguous copies in the place of parameter and gradient if the tables cannot say how they lie in memory."""
    param, grad = tensor.param, tensor.grad
    if param.is_contiguous() and grad.is_contiguous():
        return tensor
    try:
        dimensions(param.shape, param.stride(), grad.stride())
        if param.numel() <= LARGEST:
            return tensor
    except ValueError:
        pass
    return tensor._replace(param=param.detach().contiguous(), grad=grad.contiguous())
