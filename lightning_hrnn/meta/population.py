"""Tasks side by side: task batches of any families laid end to end in one flat vector of parameters.

The update rule does not care where one model ends and the next begins (`Layout` does), so one call of it serves every
task in flight. Only losses are computed family by family.

Legend: `B` instances of one family, `P` parameters, `T` tensors and `M` models (instances) of all batches together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.meta.kernels.tasks import FusedTasks, fuse
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.rule_state import RuleState
from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.draws import InStep


@dataclass(frozen=True)
class TaskBatch:
    """Hold some instances of one family.

    Args:
        family: what the instances are drawn from.
        params: their initial parameters, each `[B, *shape]`.
        data: what defines them.
        generator: source of minibatches and noise.
    """

    family: TaskFamily
    params: Params
    data: Data
    generator: torch.Generator

    @classmethod
    def draw(cls, family: TaskFamily, count: int, seed: int, device: torch.device | str = "cpu") -> TaskBatch:
        """Draw `count` instances; the same arguments give the same instances and the same noise."""
        generator = torch.Generator(device).manual_seed(seed)
        params, data = family.init(count, generator)
        return cls(family, [value.contiguous() for value in params], data, generator)

    def repeat(self, times: int) -> TaskBatch:
        """Return the instances several times over, one after the other, with the same source of minibatches."""

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(times, *[1] * (value.dim() - 1))

        data = {key: repeated(value) for key, value in self.data.items()}
        return TaskBatch(self.family, [repeated(value) for value in self.params], data, self.generator)

    def first(self, count: int) -> TaskBatch:
        """Return the first instances, with the same source of minibatches."""
        data = {key: value[:count] for key, value in self.data.items()}
        return replace(self, params=[value[:count] for value in self.params], data=data)

    def twice(self) -> TaskBatch:
        """Return the instances twice over, one after the other, each with the same minibatches and noise as its twin.

        Families that draw by other means than `tasks.draws` give twins draws of their own.
        """
        return replace(self.repeat(2), generator=InStep.of(self.generator, copies=2))

    @property
    def count(self) -> int:
        """Number of instances, `B`."""
        return len(self.params[0])

    @property
    def size(self) -> int:
        """Number of parameters of all instances together."""
        return sum(value.numel() for value in self.params)


class Progress(NamedTuple):
    """Hold how far the inner training of some tasks has come."""

    theta: Tensor  # [P]
    average: Tensor  # [P] of theta over the last steps, see `meta.unroll.trailing`; theta where no loss is taken there
    state: RuleState
    lookahead: Tensor | None = None  # [P] with attention: the next gradient is taken at theta - lookahead

    def detach(self) -> Progress:
        """Cut it from the graph that made it."""
        lookahead = None if self.lookahead is None else self.lookahead.detach()
        return Progress(self.theta.detach(), self.average.detach(), self.state.detach(), lookahead)

    def to(self, device: torch.device | str) -> Progress:
        """Return the same on a device."""
        lookahead = None if self.lookahead is None else self.lookahead.to(device)
        state = RuleState(*(value.to(device) for value in self.state))
        return Progress(self.theta.to(device), self.average.to(device), state, lookahead)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors of their own."""
        return {
            "theta": self.theta.detach().clone(),
            "average": self.average.detach().clone(),
            "state": [value.detach().clone() for value in self.state],
            "lookahead": None if self.lookahead is None else self.lookahead.detach().clone(),
        }

    @classmethod
    def from_state_dict(cls, stored: dict[str, Any]) -> Progress:
        """Undo `state_dict`."""
        state = dict(zip(RuleState._fields, stored["state"], strict=False))
        for field, rows in (("run_length", ()), ("gradient_size", (3,))):  # not of rules that were stored long ago
            state.setdefault(field, torch.zeros(*rows, *state["age"].shape).to(state["age"]))
        return cls(stored["theta"], stored["average"], RuleState(**state), stored["lookahead"])


class Population:
    """Lay task batches end to end.

    Args:
        batches: at least one, all on one device and of one dtype.
    """

    def __init__(self, batches: Sequence[TaskBatch]) -> None:
        self.batches = list(batches)
        self._shapes = [[value.shape for value in batch.params] for batch in batches]
        self._blocks = [[value.numel() for value in batch.params] for batch in batches]
        self._sizes = [batch.size for batch in batches]
        sizes: list[int] = []
        model_of: list[int] = []
        first = 0
        for batch in batches:
            for value in batch.params:
                sizes += [value[0].numel()] * batch.count
                model_of += range(first, first + batch.count)
            first += batch.count
        like = batches[0].params[0]
        self.layout = Layout.of(sizes, model_of, device=like.device, dtype=like.dtype)
        self._lengths = torch.tensor(sizes, device=like.device)
        self._tensors = [len(batch.params) * batch.count for batch in batches]
        self._models = [batch.count for batch in batches]

    def initial_params(self) -> Tensor:
        """Return the initial parameters of all tasks. [P]"""
        return torch.cat([value.reshape(-1) for batch in self.batches for value in batch.params])

    def views(self, theta: Tensor) -> list[Params]:
        """Give each batch its parameters back, in their shapes."""
        return [self._view(index, part) for index, part in enumerate(theta.split(self._sizes))]

    def _view(self, index: int, part: Tensor) -> Params:
        shapes = self._shapes[index]
        return [block.view(shape) for block, shape in zip(part.split(self._blocks[index]), shapes, strict=True)]

    @cached_property
    def _fused(self) -> FusedTasks | None:
        return fuse(self.batches)

    def losses(self, theta: Tensor, fused: bool = False) -> Tensor:
        """Return the full loss of every task, differentiable once if fused. [M]"""
        known = self._fused.losses(theta) if fused and self._fused else {}
        return torch.cat(
            [
                known[index] if index in known else batch.family.loss(params, batch.data)
                for index, (batch, params) in enumerate(zip(self.batches, self.views(theta), strict=True))
            ]
        )

    def gradient(self, theta: Tensor, second_order: bool = False, fused: bool = False) -> Tensor:
        """Return the gradient of every task's stochastic loss at `theta`. [P]

        Entries that are not finite become zero: an instance that diverged must not stop the others.

        Args:
            theta: parameters. [P]
            second_order: keep the graph from `theta` to the gradient.
            fused: take gradients of the families that it knows from the compiled operator, if that can be had. They
                are the same but for rounding.
        """
        if not fused or second_order or self._fused is None:
            point = theta if second_order and theta.requires_grad else theta.detach().requires_grad_()
            with torch.enable_grad():
                losses = self._stochastic_losses(enumerate(self.views(point)))
                (grad,) = torch.autograd.grad(torch.stack(losses).sum(), point, create_graph=second_order)
            return grad.nan_to_num(0.0, 0.0, 0.0)
        grad = self._fused.gradient(theta.detach())
        parts = {k: part for k, part in enumerate(theta.detach().split(self._sizes)) if k not in self._fused.known}
        if parts:
            points = {index: part.requires_grad_() for index, part in parts.items()}
            with torch.enable_grad():
                views = ((index, self._view(index, point)) for index, point in points.items())
                found = torch.autograd.grad(self._stochastic_losses(views), list(points.values()))
            for index, part in zip(points, found, strict=True):
                grad.split(self._sizes)[index].copy_(part)
        return grad.nan_to_num_(0.0, 0.0, 0.0)

    def _stochastic_losses(self, views: Iterable[tuple[int, Params]]) -> list[Tensor]:
        """Return the sum of the stochastic losses of each batch, by its number and parameters."""
        batches = ((self.batches[index], params) for index, params in views)
        return [batch.family.loss(params, batch.data, batch.generator).sum() for batch, params in batches]

    def param_rms(self, theta: Tensor) -> Tensor:
        """Return the root mean square of each parameter tensor, as a constant. [T]"""
        squares = theta.detach().square()
        return torch.segment_reduce(squares, "mean", lengths=self._lengths, unsafe=True).sqrt()  # lengths are right

    def split(self, progress: Progress) -> list[Progress]:
        """Divide the progress of all tasks into that of each batch."""
        params = [batch.size for batch in self.batches]
        rates = self._tensors if progress.state.log_rate.shape == progress.state.age.shape else params
        of_params = dict.fromkeys(("hidden", "average", "square"), params)
        along = {**of_params, "log_rate": rates, "global_hidden": self._models}  # the rest is of tensors
        values = progress.state._asdict().items()
        states = zip(*(value.split(along.get(name, self._tensors), -1) for name, value in values), strict=True)
        lookaheads = [None] * len(params) if progress.lookahead is None else progress.lookahead.split(params)
        points = zip(progress.theta.split(params), progress.average.split(params), strict=True)
        return [
            Progress(theta, average, RuleState(*state), lookahead)
            for (theta, average), state, lookahead in zip(points, states, lookaheads, strict=True)
        ]

    def to_tensors(self, values: Sequence[float]) -> Tensor:
        """Hand a value of each batch to the tensors of its models. [T]"""
        return torch.tensor(values).to(self.layout.params_in)[self._batch_of]

    @cached_property
    def _batch_of(self) -> Tensor:  # [T] index of each tensor's batch
        of_models = torch.arange(len(self.batches)).repeat_interleave(torch.tensor(self._models))
        return self.layout.to_tensors(of_models.to(self.layout.model_of.device))

    def by_batch(self, values: Tensor) -> list[Tensor]:
        """Divide a value of each task among the batches: `[..., M]` to `[..., B]` each."""
        return list(values.split(self._models, -1))


def join(parts: Sequence[Progress]) -> Progress:
    """Undo `Population.split`."""
    lookaheads = [part.lookahead for part in parts if part.lookahead is not None]
    return Progress(
        theta=torch.cat([part.theta for part in parts]),
        average=torch.cat([part.average for part in parts]),
        state=RuleState(*(torch.cat(values, -1) for values in zip(*(part.state for part in parts), strict=True))),
        lookahead=torch.cat(lookaheads) if lookaheads else None,
    )
