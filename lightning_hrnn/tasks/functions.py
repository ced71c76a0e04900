"""Quadratics, norms of a linear system, and bowls.

Shapes: B instances, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.draws import normal, rotation, uniform


@dataclass(frozen=True)
class Quadratic(TaskFamily):
    """`f(x) = 1/2 norm(W x - y)^2` with Gaussian `W` `[D, D]`, `y` `[D]` and start `x` `[D]`.

    Args:
        dim: dimension D.
    """

    name = "quadratic"
    dim: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        matrix = self.matrix(count, generator)
        target = normal(generator, count, self.dim, 1)
        return [normal(generator, count, self.dim)], {"matrix": matrix, "target": target}

    def matrix(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `W`, `[B, D, D]`."""
        return normal(generator, count, self.dim, self.dim)

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        return 0.5 * residual(params[0], data).square().sum(-1)


def residual(x: Tensor, data: Data) -> Tensor:
    """Return `W x - y`, `[B, D]`."""
    return torch.baddbmm(data["target"], data["matrix"], x.unsqueeze(-1), beta=-1).squeeze(-1)


@dataclass(frozen=True)
class ConditionedQuadratic(Quadratic):
    """A quadratic whose Hessian has eigenvalues log-uniform between `1 / condition` and 1, in random directions.

    Args:
        dim: dimension D.
        condition: largest over smallest eigenvalue that may occur, at least 1.
    """

    name = "conditioned-quadratic"
    condition: float = 100.0

    @override
    def matrix(self, count: int, generator: torch.Generator) -> Tensor:
        depth = uniform(generator, count, self.dim, 1, high=0.5 * math.log(self.condition))
        return torch.exp(-depth) * rotation(generator, count, self.dim)


@dataclass(frozen=True)
class Norm(Quadratic):
    """`f(x) = (sum_k abs(W x - y)_k^p)^(1/p)`, the p-norm of a Gaussian system's residual.

    Args:
        dim: dimension D.
        power: p, at least 1. For p = 1 the function is piecewise linear.
    """

    name = "norm"
    power: float = 2.0

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        powers = residual(params[0], data).abs().pow(self.power)
        return (powers.sum(-1) + 1e-12).pow(1 / self.power)  # the root has no gradient at zero


@dataclass(frozen=True)
class Bowl(TaskFamily):
    """`f(x) = 1/2 (u^2 + condition v^2)` in two dimensions, `(u, v)` being `x` turned by `angle`.

    Args:
        condition: curvature along the second axis over that along the first.
        angle: turn of the axes, in radians.
    """

    name = "bowl"
    condition: float
    angle: float = 0.0

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return [normal(generator, count, 2)], {}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        c, s, scale = math.cos(self.angle), math.sin(self.angle), math.sqrt(self.condition)
        axes = params[0].new_tensor([[c, -s * scale], [s, c * scale]])  # columns: the scaled axes
        return 0.5 * (params[0] @ axes).square().sum(-1)
