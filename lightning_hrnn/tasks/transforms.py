"""Task families made of other families: rescaled parameters, sums, other objectives, spoilt gradients.

Transforms of the gradient leave the value of the loss and the full loss as they are.

Shapes: B instances, T tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily, pack, unpack
from lightning_hrnn.tasks.draws import normal_like, uniform


@dataclass(frozen=True)
class Rescaled(TaskFamily):
    """The parameters seen by the optimizer are `scale` times the family's own.

    The scale is log-uniform between `low` and `high`, apart for every tensor of every instance, so that each needs
    another learning rate. Equal bounds give one fixed scale.

    Args:
        family: the family to rescale.
        low: smallest scale, positive.
        high: largest scale.
    """

    name = "rescaled"
    family: TaskFamily
    low: float
    high: float

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        params, data = self.family.init(count, generator)
        scales = {str(k): self._scale(p, generator) for k, p in enumerate(params)}
        seen = [p * scale for p, scale in zip(params, scales.values(), strict=True)]
        return seen, {**pack("scale", scales), **pack("of", data)}

    def _scale(self, param: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the scale of one tensor `[B, *shape]`, in a shape that broadcasts against it."""
        return self._draw(generator, len(param), *[1] * (param.dim() - 1))

    def _draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        return uniform(generator, *shape, low=math.log(self.low), high=math.log(self.high)).exp()

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        own = [p / data[f"scale/{k}"] for k, p in enumerate(params)]
        return self.family.loss(own, unpack("of", data), generator)


@dataclass(frozen=True)
class RescaledEntries(Rescaled):
    """Like `Rescaled`, with a scale for every single entry: bad conditioning along the axes."""

    name = "rescaled-entries"

    @override
    def _scale(self, param: Tensor, generator: torch.Generator) -> Tensor:
        return self._draw(generator, *param.shape)


@dataclass(frozen=True)
class SumOf(TaskFamily):
    """Independent tasks solved together: the losses add up, the parameters lie side by side.

    Args:
        families: the parts.
    """

    name = "sum"
    families: tuple[TaskFamily, ...]

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        params: Params = []
        data: Data = {}
        for k, family in enumerate(self.families):
            own_params, own_data = family.init(count, generator)
            params += own_params
            data |= pack(str(k), own_data)
        return params, data

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        rest = iter(params)
        losses = [
            family.loss([next(rest) for _ in range(tensors)], unpack(str(k), data), generator)
            for k, (family, tensors) in enumerate(zip(self.families, self._tensors, strict=True))
        ]
        return torch.stack(losses).sum(0)

    @cached_property
    def _tensors(self) -> list[int]:
        """Number of tensors of each part."""
        return [len(family.init(1, torch.Generator())[0]) for family in self.families]


@dataclass(frozen=True)
class _Wrapper(TaskFamily):
    """A family with another's instances; subclasses change the loss."""

    family: TaskFamily

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return self.family.init(count, generator)


@dataclass(frozen=True)
class LogObjective(_Wrapper):
    """`log(f + floor) - log(floor)` in place of `f`: gradients grow near the minimum.

    Args:
        family: the family that gives f.
        floor: where the logarithm levels off.
    """

    name = "log-objective"
    floor: float = 1e-6

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        return torch.log1p(self.family.loss(params, data, generator) / self.floor)


@dataclass(frozen=True)
class GradientNoise(_Wrapper):
    """Gaussian noise added to every entry of the gradient.

    Args:
        family: the family whose gradients become noisy.
        deviation: standard deviation of the noise.
    """

    name = "gradient-noise"
    deviation: float

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        loss = self.family.loss(params, data, generator)
        if generator is None:
            return loss
        for tensor in params:  # <noise, p - constant>, of value zero, has the noise as its gradient
            noise = self.deviation * normal_like(tensor, generator)
            loss = loss + (noise * (tensor - tensor.detach())).flatten(1).sum(-1)
        return loss


@dataclass(frozen=True)
class SparseGradient(_Wrapper):
    """Every entry of the gradient is zero with probability `chance`, anew at every step.

    The entries that are left grow by `1 / (1 - chance)`, which keeps the mean gradient what it was.

    Args:
        family: the family whose gradients become sparse.
        chance: probability that an entry is zero, below 1.
    """

    name = "sparse-gradient"
    chance: float = 0.99

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        if generator is not None:
            params = [_scale_gradient(p, self.factor(p, generator)) for p in params]
        return self.family.loss(params, data, generator)

    def factor(self, param: Tensor, generator: torch.Generator) -> Tensor:
        """Draw what each entry of the gradient is multiplied by: zero or `1 / (1 - chance)`."""
        kept = uniform(generator, *param.shape) >= self.chance
        return kept.to(param.dtype) / (1 - self.chance)


def _scale_gradient(param: Tensor, factor: Tensor) -> Tensor:
    """Return `param`, its value exact, its gradient multiplied by `factor`."""
    fixed = param.detach()
    return fixed + factor * (param - fixed)


@dataclass(frozen=True)
class Bfloat16Gradient(_Wrapper):
    """Gradients rounded to bfloat16 (8 significant bits), as mixed-precision training delivers them.

    Args:
        family: the family whose gradients are rounded.
    """

    name = "bfloat16-gradient"

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        if generator is not None:
            params = [_round_gradient(p) for p in params]
        return self.family.loss(params, data, generator)


def _round_gradient(param: Tensor) -> Tensor:
    """Return `param`, its value exact, its gradient passed through a cast to bfloat16."""
    through = param.bfloat16().to(param.dtype)
    return param.detach() + (through - through.detach())
