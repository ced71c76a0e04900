"""The landscapes of the two-dimensional tasks, as contact sheets for the docs.

Shapes: G points of a grid along each axis.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.tasks.base import Data, TaskFamily
from lightning_hrnn.tasks.functions import Bowl
from lightning_hrnn.tasks.structured import DependencyChain, MinMaxWell, OutwardSnake
from lightning_hrnn.tasks.surfaces import SURFACES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Landscape(NamedTuple):
    """A family of tasks with two parameters, over a box.

    Args:
        family: its parameters are one tensor `[B, 2]`.
        low: corner of the box with the smallest coordinates.
        high: corner of the box with the largest coordinates.
        minimizer: where the minimum is taken; None if nowhere in the box.
    """

    family: TaskFamily
    low: tuple[float, float]
    high: tuple[float, float]
    minimizer: tuple[float, float] | None

    def losses(self, points: int) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate one instance on a grid; returns x `[G]`, y `[G]` and the loss `[G, G]` (row: y, column: x)."""
        (x0, y0), (x1, y1) = self.low, self.high
        x, y = torch.linspace(x0, x1, points), torch.linspace(y0, y1, points)
        grid = torch.cartesian_prod(y, x).flip(-1)  # [G * G, 2]
        _, instance = self.family.init(1, torch.Generator().manual_seed(3))
        data: Data = {key: value.expand(len(grid), *value.shape[1:]) for key, value in instance.items()}
        return x, y, self.family.loss([grid], data).view(points, points)


SQUARE = ((-3.0, -3.0), (3.0, 3.0))

SHEETS: dict[str, dict[str, Landscape]] = {
    "test-functions": {
        **{name: Landscape(s, s.low, s.high, s.minimizer) for name, s in SURFACES.items()},
        "ackley": Landscape(SURFACES["ackley"], (-4.0, -4.0), (4.0, 4.0), (0.0, 0.0)),  # the middle of its box
    },
    "bowls-and-structured": {
        "bowl, condition 0.1": Landscape(Bowl(0.1), *SQUARE, (0.0, 0.0)),
        "bowl, condition 5": Landscape(Bowl(5.0), *SQUARE, (0.0, 0.0)),
        "the same, turned by pi/4": Landscape(Bowl(5.0, math.pi / 4), *SQUARE, (0.0, 0.0)),
        "dependency chain": Landscape(DependencyChain(2), *SQUARE, (0.0, 0.0)),
        "min-max well": Landscape(MinMaxWell(2), *SQUARE, (1.0, 1.0)),
        "outward snake": Landscape(OutwardSnake(2), (-2.0, -5.0), (20.0, 5.0), None),
    },
}

COLUMNS = 3
LEVELS = 10


def draw_surfaces(folder: str | Path, points: int = 100) -> list[Path]:
    """Draw every landscape, shaded by the rank of the loss (the darker, the smaller), one PNG for each sheet.

    Args:
        folder: where the pictures go; it is made if need be.
        points: grid points along each axis of a panel.

    Returns:
        The pictures' paths.

    Raises:
        ImportError: matplotlib is missing; `pip install "lightning-hrnn[vision]"` brings it.

    Example::

        draw_surfaces("docs/images")
    """
    from matplotlib.figure import Figure

    paths = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, landscapes in SHEETS.items():
        rows = math.ceil(len(landscapes) / COLUMNS)
        figure = Figure(figsize=(2.2 * COLUMNS, 2.1 * rows), dpi=80, layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for ax, (title, landscape) in zip(axes, landscapes.items(), strict=True):
            _draw(ax, title, landscape, points)
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], metadata={"Software": None}, pil_kwargs={"optimize": True})
    return paths


def _draw(ax: Axes, title: str, landscape: Landscape, points: int) -> None:
    x, y, losses = landscape.losses(points)
    ranks = losses.flatten().argsort().argsort().view(losses.shape) / losses.numel()  # [G, G], 0 to 1
    ax.contourf(x.numpy(), y.numpy(), ranks.sqrt().numpy(), levels=LEVELS, antialiased=False)
    if landscape.minimizer is not None:
        ax.plot(*landscape.minimizer, marker="x", color="white", markersize=5)
    ax.set_title(title, fontsize=8)
    ax.set_xticks(x[[0, -1]].tolist())
    ax.set_yticks(y[[0, -1]].tolist())
    ax.tick_params(labelsize=6)
