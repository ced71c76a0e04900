"""Figures. Drawn on `Figure` objects, without pyplot: no display, no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart also by colour-blind readers. Ours first.
OURS = "#D55E00"
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"
FEW_POINTS = 12


@dataclass(frozen=True)
class Panel:
    """One diagram: a curve per name.

    Args:
        title: What the reader sees in it.
        xlabel: Quantity and unit of the horizontal axis.
        ylabel: Quantity and unit of the vertical axis.
        curves: Name -> (x, y); values that are not finite are left out.
        log: Whether the vertical axis is logarithmic.
        limits: Bounds of the vertical axis; None fits them to the curves.
        percent: Whether the values are shares, to be labelled in per cent.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: bool = False
    limits: tuple[float, float] | None = None
    percent: bool = False


class Style(NamedTuple):
    """How a curve is drawn; a higher level lies on top."""

    colour: str
    line: str
    width: float = 1.4
    level: int = 2


def plot_panels(
    panels: Sequence[Panel], path: str | Path, title: str, highlight: str | None = None, columns: int | None = None
) -> Path:
    """Draw panels side by side, with one legend below, and save them as a PNG.

    Args:
        panels: The diagrams; a name has the same colour in all of them.
        path: Where to save.
        title: Heading of the figure.
        highlight: The curve to draw on top, thicker.
        columns: How many panels lie side by side; None draws one row of all.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    others = [name for name in names if name != highlight]
    # Every other curve is dashed, so that one can be seen below another.
    styles = {name: Style(OTHERS[i % len(OTHERS)], "--" if i % 2 else "-") for i, name in enumerate(others)}
    if highlight is not None:
        styles[highlight] = Style(OURS, "-", width=2.4, level=3)

    columns = min(columns or len(panels), len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 0.9 + 3.5 * rows), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in grid[len(panels) :]:
        spare.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, styles)
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    handles = [lines[name] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, Style]) -> None:
    for name, (x, y) in panel.curves.items():
        finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        style = styles[name]
        axes.plot(
            [a for a, _ in finite],
            [b for _, b in finite],
            label=name,
            color=style.colour,
            linestyle=style.line,
            linewidth=style.width,
            marker="o" if len(finite) <= FEW_POINTS else None,
            markersize=4,
            zorder=style.level,
        )
    axes.set_title(panel.title, fontsize=10, color=GREY)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    if panel.log:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.margins(x=0.01)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
