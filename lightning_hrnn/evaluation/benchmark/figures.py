"""Draw what was measured: cost over size, and bars of ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_hrnn.evaluation.plots import GREY, OTHERS, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
DASHES = ("-", "--", ":")


class Bars(NamedTuple):
    """Describe one diagram of bars."""

    title: str
    xlabel: str
    values: Mapping[str, float]  # name -> value, the first on top
    log: bool = False  # the axis then starts at the power of ten below the least value


def name_of(row: Row) -> str:
    """Return what a variant is called in the figures."""
    return f"{row['optimizer']} {row['kernel']}"


def plot_cost(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw the time of a step over the number of parameters, a curve for each variant.

    Args:
        rows: of steps.
        path: where to save the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name_of(row) for row in rows))
    for name in names:
        points = sorted(
            (row["params"], row["params"] * row["ns_per_param"] / 1e6) for row in rows if name_of(row) == name
        )
        ours, family = _is_ours(name), [other for other in names if _is_ours(other) == _is_ours(name)]
        index = family.index(name)
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            marker="o",
            markersize=4,
            color=OURS if ours else OTHERS[index % len(OTHERS)],
            linestyle=DASHES[index % len(DASHES)] if ours else "-",
            linewidth=2.0 if ours else 1.2,
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="one step [ms]")
    axes.set_title("Time of an optimizer step", fontsize=10, color=GREY)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _save(figure, path)


def plot_bars(panels: Sequence[Bars], path: str | Path) -> Path:
    """Draw diagrams of horizontal bars side by side.

    Args:
        panels: the diagrams.
        path: where to save the PNG.
    """
    from matplotlib.figure import Figure

    tallest = max(len(panel.values) for panel in panels)
    figure = Figure(figsize=(5.2 * len(panels), 1.4 + 0.3 * tallest), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_bars(axes, panel)
    return _save(figure, path)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    names, values = list(panel.values), list(panel.values.values())
    bars = axes.barh(names, values, color=[OURS if _is_ours(name) else OTHERS[0] for name in names], height=0.7)
    axes.bar_label(bars, labels=[_short(value) for value in values], padding=3, fontsize=8)
    axes.invert_yaxis()
    if panel.log:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(min(values))), 4 * max(values))
    else:
        axes.set_xlim(0, 1.25 * max(values))
    axes.set_xlabel(panel.xlabel)
    axes.set_title(panel.title, fontsize=10, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _is_ours(name: str) -> bool:
    return name.startswith("hrnn")


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
