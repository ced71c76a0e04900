"""The classical test functions of two variables, and the family that starts in their usual boxes.

All are shifted so that the minimum over the whole plane is zero, or a hair above it where rounding could make the loss
negative.
Formulas, boxes and minimizers: Surjanovic & Bingham, Virtual Library of Simulation Experiments, sfu.ca/~ssurjano;
LogSumExp: Boyd & Vandenberghe, Convex Optimization, section 9.3.

Shapes: B instances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily, named
from lightning_hrnn.tasks.draws import uniform


@dataclass(frozen=True)
class Surface(TaskFamily):
    """A test function of two variables, started uniformly in a box.

    Args:
        formula: the function of `(x, y)`, elementwise, with minimum about zero.
        low: corner of the box with the smallest coordinates.
        high: corner of the box with the largest coordinates.
        minimizer: a point where the minimum is taken.
    """

    name = "surface"
    formula: Callable[[Tensor, Tensor], Tensor]
    low: tuple[float, float]
    high: tuple[float, float]
    minimizer: tuple[float, float]

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        unit = uniform(generator, count, 2)
        low, high = unit.new_tensor(self.low), unit.new_tensor(self.high)
        return [low + (high - low) * unit], {}

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        return self.formula(*params[0].unbind(-1))


def ackley(x: Tensor, y: Tensor) -> Tensor:
    """A funnel covered with a grid of local minima."""
    radius = torch.sqrt(0.5 * (x.square() + y.square()) + 1e-12)  # the root has no gradient at zero
    waves = 0.5 * (torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y))
    return 20 * -torch.expm1(-0.2 * radius) + math.e * -torch.expm1(waves - 1)


def beale(x: Tensor, y: Tensor) -> Tensor:
    """`(1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2`: flat, with steep corners."""
    y2 = y * y
    terms = (1.5 - x + x * y, 2.25 - x + x * y2, 2.625 - x + x * y2 * y)
    return terms[0].square() + terms[1].square() + terms[2].square()


def booth(x: Tensor, y: Tensor) -> Tensor:
    """`(x + 2 y - 7)^2 + (2 x + y - 5)^2`: a quadratic of condition 9."""
    return (x + 2 * y - 7).square() + (2 * x + y - 5).square()


def branin(x: Tensor, y: Tensor) -> Tensor:
    """A wavy parabolic valley with three equal minima."""
    valley = y - 5.1 / (4 * math.pi**2) * x.square() + 5 / math.pi * x - 6
    waves = 10 * (1 - 1 / (8 * math.pi)) * torch.cos(x)
    return valley.square() + waves + (10 - 0.39788)  # the exact minimum is 0.397887...


def log_sum_exp(x: Tensor, y: Tensor) -> Tensor:
    """`log(e^(x + 3y - .1) + e^(x - 3y - .1) + e^(-x - .1))`: almost linear far away, round at the bottom."""
    terms = torch.stack([x + 3 * y, x - 3 * y, -x], -1)
    return terms.logsumexp(-1) - (1.5 * math.log(2) - 1e-6)


def matyas(x: Tensor, y: Tensor) -> Tensor:
    """`0.26 (x^2 + y^2) - 0.48 x y`, written as `0.02 (x^2 + y^2) + 0.24 (x - y)^2`: an oblique valley."""
    return 0.02 * (x.square() + y.square()) + 0.24 * (x - y).square()


def michalewicz(x: Tensor, y: Tensor) -> Tensor:
    """`-sin(x) sin^10(x^2/pi) - sin(y) sin^10(2 y^2/pi)` (m = 5): plateaus cut by narrow ravines.

    Beyond the sides of its box, 0 and pi, where it is flat, it is its own mirror image: the formula falls lower there.
    """
    x, y = _mirrored(x), _mirrored(y)
    ravine_x = torch.sin(x) * torch.sin(x.square() / math.pi) ** 10
    ravine_y = torch.sin(y) * torch.sin(2 * y.square() / math.pi) ** 10
    return 1.806624 - ravine_x - ravine_y  # the exact minimum is -1.8066228...


def _mirrored(t: Tensor) -> Tensor:
    """Fold the line into 0..pi."""
    return (torch.remainder(t + math.pi, 2 * math.pi) - math.pi).abs()


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """`(1 - x)^2 + 100 (y - x^2)^2`: a bent valley with a flat floor."""
    return (1 - x).square() + 100 * (y - x.square()).square()


STYBLINSKI_ROOT = -2.9035340277711775  # the least root of 4 x^3 - 32 x + 5


def styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    """`1/2 (x^4 - 16 x^2 + 5 x)` summed over x and y, less its minimum: four wells, one deepest.

    With the minimizer `a` factored out, a term is `1/2 (x - a)^2 (x^2 + 2 a x + 3 a^2 - 16)`: no cancellation.
    """
    a = STYBLINSKI_ROOT
    terms = [(t - a).square() * (t * (t + 2 * a) + (3 * a * a - 16)) for t in (x, y)]
    return 0.5 * (terms[0] + terms[1])


def _box(half: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (-half, -half), (half, half)


SURFACES: dict[str, Surface] = {
    name: named(name, surface)
    for name, surface in {
        "ackley": Surface(ackley, *_box(32.768), minimizer=(0.0, 0.0)),
        "beale": Surface(beale, *_box(4.5), minimizer=(3.0, 0.5)),
        "booth": Surface(booth, *_box(10.0), minimizer=(1.0, 3.0)),
        "branin": Surface(branin, (-5.0, 0.0), (10.0, 15.0), minimizer=(math.pi, 2.275)),
        "log-sum-exp": Surface(log_sum_exp, *_box(3.0), minimizer=(-0.5 * math.log(2), 0.0)),
        "matyas": Surface(matyas, *_box(10.0), minimizer=(0.0, 0.0)),
        "michalewicz": Surface(michalewicz, (0.0, 0.0), (math.pi, math.pi), minimizer=(2.185312, math.pi / 2)),
        "rosenbrock": Surface(rosenbrock, *_box(2.048), minimizer=(1.0, 1.0)),
        "styblinski-tang": Surface(styblinski_tang, *_box(5.0), minimizer=(STYBLINSKI_ROOT, STYBLINSKI_ROOT)),
    }.items()
}
