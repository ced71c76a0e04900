"""Tasks with a structure that trips optimizers: chains, snakes, wells, minibatch quadratics, matrix multiplication.

Shapes: B instances, D dimensions, N points or directions, n of them in a minibatch, K products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.draws import minibatch, normal, uniform


@dataclass(frozen=True)
class DependencyChain(TaskFamily):
    """Parameters that can only be solved in order.

    `f(x) = mean_k (1 - prod_{j <= k} 1 / (1 + x_j^2))`: the gradient of `x_k` carries the factor
    `prod_{j < k} 1 / (1 + x_j^2)`, next to nothing until all earlier parameters are near zero.

    Args:
        dim: length of the chain, D.
    """

    name = "dependency-chain"
    dim: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return [2 * normal(generator, count, self.dim)], {}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        log_factors = params[0].square().log1p()
        return -torch.expm1(-log_factors.cumsum(-1)).mean(-1)


@dataclass(frozen=True)
class OutwardSnake(TaskFamily):
    """A winding valley that leads outward for ever: gradients fade while the ideal step stays constant.

    `f(x) = mean_{k > 1} (x_k - 2 cos(x_1 + phase_k))^2 + 1 / sqrt(1 + x_1^2)`. The valley is a coil around the first
    axis with the same curvature everywhere; the pull along it falls like `x_1^-2`.

    Args:
        dim: dimension D, at least 2.
    """

    name = "outward-snake"
    dim: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        phase = uniform(generator, count, self.dim - 1, high=2 * math.pi)
        return [normal(generator, count, self.dim)], {"phase": phase}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        along, across = params[0][:, :1], params[0][:, 1:]
        valley = (across - 2 * torch.cos(along + data["phase"])).square().mean(-1)
        return valley + along.squeeze(-1).square().add(1).rsqrt()


@dataclass(frozen=True)
class MinMaxWell(TaskFamily):
    """`f(x) = max_k x_k^2 + 1 / min_k x_k^2 - 2`: only the largest and the smallest entry have a gradient.

    The minimum, zero, is taken where every entry is +-1.

    Args:
        dim: dimension D.
    """

    name = "min-max-well"
    dim: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return [normal(generator, count, self.dim)], {}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        softening = 1e-3  # keeps the pole at zero finite; the shift below keeps the minimum at zero
        low, high = torch.aminmax(params[0].square(), dim=-1)
        return high + (low + softening).reciprocal() - (2 - softening) + 1e-6


@dataclass(frozen=True)
class SumOfQuadratics(TaskFamily):
    """`f(x) = 1/2 norm(x - mean_n z_n)^2`; a minibatch knows the mean of its own points only.

    Up to a constant this is the mean of N quadratics, one about each point `z_n`.

    Args:
        dim: dimension D.
        batch_size: points in a minibatch, n.
        points: N.
    """

    name = "sum-of-quadratics"
    dim: int
    batch_size: int
    points: int = 500

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        centre = normal(generator, count, 1, self.dim)
        points = centre + normal(generator, count, self.points, self.dim)
        return [normal(generator, count, self.dim)], {"points": points}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        points = data["points"]
        if generator is not None:
            (points,) = minibatch(points, size=self.batch_size, generator=generator)
        return 0.5 * (params[0] - points.mean(1)).square().sum(-1)


@dataclass(frozen=True)
class ProjectionQuadratic(TaskFamily):
    """`f(x) = 1/2 mean_n (v_n . x)^2` with Gaussian directions; a minibatch sees a few directions only.

    Args:
        dim: dimension D.
        batch_size: directions in a minibatch, n.
        directions: N.
    """

    name = "projection-quadratic"
    dim: int
    batch_size: int
    directions: int = 500

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        directions = normal(generator, count, self.directions, self.dim) / math.sqrt(self.dim)
        return [normal(generator, count, self.dim)], {"directions": directions}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        directions = data["directions"]
        if generator is not None:
            (directions,) = minibatch(directions, size=self.batch_size, generator=generator)
        return 0.5 * torch.bmm(directions, params[0].unsqueeze(-1)).square().mean((1, 2))


@dataclass(frozen=True)
class MatrixMultiplication(TaskFamily):
    """Search for an algorithm that multiplies two `size x size` matrices with `products` multiplications.

    Three factors `[size^2, K]` describe it (two linear forms to multiply, one to gather); the loss is the squared
    distance of `sum_k a_ik b_jk c_lk` from the tensor of matrix multiplication, a polynomial of order six. It
    reaches zero where an algorithm exists: size 2 needs 7 products (Strassen, 1969), size 3 at most 23 (Laderman,
    1976).

    Args:
        size: rows of the matrices.
        products: multiplications allowed, K.
    """

    name = "matrix-multiplication"
    size: int
    products: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        return [0.5 * normal(generator, count, self.size**2, self.products) for _ in range(3)], {}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        a, b, c = params
        forms = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2)  # [B, size^4, K]
        return (torch.bmm(forms, c.mT) - self._target(a)).square().sum((1, 2))

    def _target(self, like: Tensor) -> Tensor:
        """Return `[size^4, size^2]`: one where entry (i,j) times entry (j,l) adds to entry (i,l)."""
        eye = torch.eye(self.size, dtype=like.dtype, device=like.device)
        return torch.einsum("ia,jb,lc->ijbcal", eye, eye, eye).reshape(self.size**4, self.size**2)
