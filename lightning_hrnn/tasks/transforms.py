"""Task families made of other families: rescaled parameters, noisy gradients, other objectives.

Shapes: B instances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily, pack, unpack
from lightning_hrnn.tasks.draws import normal_like, uniform


@dataclass(frozen=True)
class Rescaled(TaskFamily):
    """The parameters seen by the optimizer are `scale` times the family's own.

    A tensor's scale is log-uniform between `low` and `high`, apart for every tensor of every instance, so that
    each needs another learning rate. Equal bounds give one fixed scale.

    Args:
        family: the family to rescale.
        low, high: bounds of the scale, positive.
    """

    name = "rescaled"
    family: TaskFamily
    low: float
    high: float

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        params, data = self.family.init(count, generator)
        logs = uniform(generator, count, len(params), low=math.log(self.low), high=math.log(self.high))
        scale = logs.exp()  # [B, T]
        return self._multiply(params, scale), {"scale": scale, **pack("of", data)}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        own = self._multiply(params, data["scale"].reciprocal())
        return self.family.loss(own, unpack("of", data), generator)

    @staticmethod
    def _multiply(params: Params, scale: Tensor) -> Params:
        return [p * s.view(-1, *[1] * (p.dim() - 1)) for p, s in zip(params, scale.unbind(1), strict=True)]


@dataclass(frozen=True)
class GradientNoise(TaskFamily):
    """Gaussian noise added to the gradient; the value of the loss stays exact.

    Args:
        family: the family whose gradients become noisy.
        deviation: standard deviation of the noise on every entry.
    """

    name = "gradient-noise"
    family: TaskFamily
    deviation: float

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return self.family.init(count, generator)

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
class LogObjective(TaskFamily):
    """`log(f + floor) - log(floor)` in place of `f`: gradients grow near the minimum.

    Args:
        family: the family that gives f.
        floor: where the logarithm levels off.
    """

    name = "log-objective"
    family: TaskFamily
    floor: float = 1e-6

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return self.family.init(count, generator)

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        return torch.log1p(self.family.loss(params, data, generator) / self.floor)
