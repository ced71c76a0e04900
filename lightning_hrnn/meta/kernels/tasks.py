"""Losses and gradients of a population through the compiled operator.

Legend: `P` parameters, `M` models (instances) of all batches together, `B` instances of a batch, `n` its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hrnn.meta.kernels.programs import Program, describe
from lightning_hrnn.optimizer.kernels.build import FOLDER, BuildError, Library, compiled
from lightning_hrnn.tasks.base import Data
from lightning_hrnn.tasks.draws import integers, normal_like
from lightning_hrnn.tasks.transforms import (
    Bfloat16Gradient,
    GradientNoise,
    LogObjective,
    Rescaled,
    SparseGradient,
)

if TYPE_CHECKING:
    from lightning_hrnn.meta.population import TaskBatch

_OWN = ("network_tasks.cpp", "network_tasks.h", "activations.h")
LIBRARY = Library((*(Path(__file__).parent / name for name in _OWN), FOLDER / "segments.h", FOLDER / "lanes.h"))
DTYPES = (torch.float32, torch.float64)


class FusedTasks:
    """Compute losses and gradients of those batches of a population that the operator knows.

    Random numbers are drawn as the families draw them, in the same order: a generator is left as they leave it.

    Args:
        batches: all batches, laid end to end.

    Raises:
        BuildError: the operator cannot be built.
    """

    def __init__(self, batches: Sequence[TaskBatch]) -> None:
        self._library = compiled(LIBRARY)
        self._models = [batch.count for batch in batches]
        self.known: dict[int, FusedBatch] = {}  # by the number of the batch
        scales, first_param, first_model = [], 0, 0
        for index, batch in enumerate(batches):
            program = describe(batch.family, batch.params, batch.data, first_param, first_model)
            if program is not None and _fits(batch, program):
                self.known[index] = FusedBatch(batch, program, slice(first_param, first_param + batch.size))
            scale = self.known[index].scale() if index in self.known else None
            scales.append(batch.params[0].new_ones(batch.size) if scale is None else scale)
            first_param, first_model = first_param + batch.size, first_model + batch.count
        self._scale = torch.cat(scales)
        self._programs = [fused.program for fused in self.known.values()]
        self._data = [(program.inputs(), program.targets()) for program in self._programs]
        self._nothing = [torch.empty(0, dtype=torch.int64)] * len(self.known)
        self._full, self._minibatch = (_encode(self._programs, whole) for whole in (True, False))

    def gradient(self, theta: Tensor) -> Tensor:
        """Return gradients of the stochastic losses, zero for batches that are not known. [P]"""
        picked = [fused.draw() for fused in self.known.values()]
        losses, grads = self._run(theta / self._scale, self._minibatch, picked, with_grad=True)
        by_batch = losses.split(self._models)
        for index, fused in self.known.items():
            fused.spoil(grads[fused.part], by_batch[index])
        return grads

    def losses(self, theta: Tensor) -> dict[int, Tensor]:
        """Return the full losses of each known batch by its number, differentiable once. `[B]` each"""
        by_batch = _Losses.apply(theta / self._scale, self).split(self._models)
        return {index: fused.wrapped(by_batch[index]) for index, fused in self.known.items()}

    def full(self, own: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Return full losses `[M]` of the innermost families at their own parameters, and gradients `[P]`."""
        return self._run(own, self._full, self._nothing, with_grad)

    def _run(self, own: Tensor, program: Tensor, picked: list[Tensor], with_grad: bool) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*self._data, strict=True)
        losses, grads = self._library.task_losses(
            own.detach(), sum(self._models), program, inputs, targets, picked, with_grad
        )
        return losses, grads

    def backward(self, to_losses: Tensor, grads: Tensor) -> Tensor:
        """Weigh the gradient of each instance. [M], [P] -> [P]"""
        by_batch = to_losses.split(self._models)
        weighed = torch.zeros_like(grads)
        for index, fused in self.known.items():
            torch.mul(grads[fused.part], fused.spread(by_batch[index]), out=weighed[fused.part])
        return weighed


class _Losses(torch.autograd.Function):
    """Give full losses the gradients that came with them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, fused: FusedTasks) -> Tensor:
        losses, grads = fused.full(own, ctx.needs_input_grad[0])
        ctx.fused = fused
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_losses: Tensor) -> tuple[Tensor, None]:
        (grads,) = ctx.saved_tensors
        return ctx.fused.backward(to_losses, grads), None


class FusedBatch:
    """Do for one batch what the operator leaves to do: what its wrappers say, and random draws.

    Args:
        batch: the batch.
        program: its description.
        part: where its parameters lie among all.
    """

    def __init__(self, batch: TaskBatch, program: Program, part: slice) -> None:
        self.batch, self.program, self.part = batch, program, part
        self._scales = [
            self._flat_scale(data) if isinstance(wrapper, Rescaled) else None for wrapper, data in program.wrappers
        ]
        self._kept: list[Tensor] = []  # what sparse gradients are multiplied by, the innermost last

    def scale(self) -> Tensor | None:
        """Return what divides parameters before the innermost family sees them, if anything does. [n]"""
        scales = [scale for scale in self._scales if scale is not None]
        return torch.stack(scales).prod(0) if scales else None

    def _flat_scale(self, data: Data) -> Tensor:
        params = self.batch.params
        return torch.cat([data[f"scale/{k}"].expand_as(param).reshape(-1) for k, param in enumerate(params)])

    def draw(self) -> Tensor:
        """Draw, from the outermost wrapper inward, sparse factors, and return the rows of a minibatch. [B, examples]"""
        generator, program = self.batch.generator, self.program
        for wrapper, _ in program.wrappers:
            if isinstance(wrapper, SparseGradient):
                factors = [wrapper.factor(param, generator) for param in self.batch.params]
                self._kept.append(torch.cat([factor.reshape(-1) for factor in factors]))
        if program.batch_size is None:
            return torch.empty(0, dtype=torch.int64)
        return integers(generator, self.batch.count, program.batch_size, below=program.points)

    def spoil(self, grad: Tensor, losses: Tensor) -> None:
        """Do to the innermost family's gradient, in place, what its wrappers do, from the innermost outward.

        Args:
            grad: of the family's loss at its own parameters. [n]
            losses: of the family. [B]
        """
        for (wrapper, _), scale in zip(reversed(self.program.wrappers), reversed(self._scales), strict=True):
            if scale is not None:
                grad.div_(scale)
            elif isinstance(wrapper, GradientNoise):
                noise = [normal_like(param, self.batch.generator).reshape(-1) for param in self.batch.params]
                grad.add_(torch.cat(noise), alpha=wrapper.deviation)
            elif isinstance(wrapper, SparseGradient):
                grad.mul_(self._kept.pop())
            elif isinstance(wrapper, Bfloat16Gradient):
                grad.copy_(grad.bfloat16())
            elif isinstance(wrapper, LogObjective):
                grad.div_(self.spread(wrapper.floor + losses))
                losses = torch.log1p(losses / wrapper.floor)

    def wrapped(self, losses: Tensor) -> Tensor:
        """Return full losses as the outermost wrapper gives them. [B]"""
        for wrapper, _ in reversed(self.program.wrappers):
            if isinstance(wrapper, LogObjective):
                losses = torch.log1p(losses / wrapper.floor)
        return losses

    def spread(self, values: Tensor) -> Tensor:
        """Hand a value of each instance to its parameters. [B] -> [n]"""
        sizes = [param[0].numel() for param in self.batch.params]
        return torch.cat([values[:, None].expand(-1, size).reshape(-1) for size in sizes])


def _fits(batch: TaskBatch, program: Program) -> bool:
    """Whether the operator takes the numbers of a batch: of one type, on the CPU."""
    dtype = batch.params[0].dtype
    values = [*batch.params, program.inputs(), program.targets()]
    return dtype in DTYPES and all(
        value.device.type == "cpu" and (value.dtype == dtype or not value.is_floating_point()) for value in values
    )


def _encode(programs: Sequence[Program], whole: bool) -> Tensor:
    return torch.tensor([number for program in programs for number in program.encoded(whole)], dtype=torch.int64)


def fuse(batches: Sequence[TaskBatch]) -> FusedTasks | None:
    """Return the fused computation of what the operator knows, or `None` if that is nothing or it cannot be built."""
    try:
        fused = FusedTasks(batches)
    except BuildError:
        return None
    return fused if fused.known else None
