"""The pictures of an evaluation: curves with bands, win rates, learned rates over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_hrnn.evaluation.baselines import BASELINES
from lightning_hrnn.evaluation.plots import GREY, OTHERS, OURS
from lightning_hrnn.evaluation.protocol import OURS as LEARNED
from lightning_hrnn.evaluation.protocol import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLUMNS = 4
NAMES = {LEARNED: "HRNN, untuned", **{name: baseline.title for name, baseline in BASELINES.items()}}
COLOURS = {LEARNED: OURS, **dict(zip(BASELINES, OTHERS, strict=False))}
SMALLEST = 1e-12

Outcomes = Mapping[str, Mapping[str, Outcome]]
"""Task -> optimizer -> outcome."""


def plot_curves(outcomes: Outcomes, path: Path) -> None:
    """Draw the training loss of each task over the steps: median over the seeds, in a band from lowest to highest."""
    figure, grid = _grid(len(outcomes), "Training loss; tuned baselines, all on the same instances")
    for axes, (task, by_name) in zip(grid, outcomes.items(), strict=True):
        for name in NAMES:
            outcome = by_name[name]
            rows = [sorted(max(value, SMALLEST) for value in row if math.isfinite(value)) for row in outcome.curve]
            points = [(step, row) for step, row in zip(outcome.steps, rows, strict=True) if row]
            steps = [step for step, _ in points]
            ours = name == LEARNED
            axes.fill_between(
                steps, [row[0] for _, row in points], [row[-1] for _, row in points], color=COLOURS[name], alpha=0.1
            )
            middle = [median(row) for _, row in points]
            axes.plot(steps, middle, color=COLOURS[name], lw=2 if ours else 1.2, zorder=3 if ours else 2)
        _dress(axes, task)
    _legend(figure)
    figure.savefig(path)


def plot_win_rates(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the share of tasks on which the learned optimizer ends lower than each other one.

    Where baselines ran at constant rates too, a second panel shows the same of runs whose length nobody knows.
    """
    from matplotlib.figure import Figure

    panels = [(f"HRNN, untuned, ends lower than (of {summary['tasks']} tasks)", summary)]
    if summary["constant"]["win_rate_best"] is not None:
        panels.append(("HRNN without cooldown; baselines at constant rates", summary["constant"]))
    styles = {
        **{name: (base.title, colour) for (name, base), colour in zip(BASELINES.items(), OTHERS, strict=False)},
        "best": ("all of them", OURS),
        "default_adam": ("Adam 1e-3", GREY),
    }
    figure = Figure(figsize=(7 * len(panels), 3.2), dpi=150, layout="constrained")
    for axes, (title, rates) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        known = {style: rates.get(f"win_rate_{name}") for name, style in styles.items()}
        shares = {style: 100 * float(rate) for style, rate in known.items() if rate is not None}  # where both were run
        bars = axes.barh([title for title, _ in shares], list(shares.values()), color=[colour for _, colour in shares])
        axes.bar_label(bars, fmt="%.0f %%", padding=3)
        axes.axvline(50, color=GREY, lw=0.8, ls="--")
        axes.set(xlim=(0, 110), xlabel="tasks won [%]", title=title)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_rates(outcomes: Outcomes, path: Path) -> None:
    """Draw the learned rate of every tensor of each task over the steps; early tensors dark, late ones light."""
    figure, grid = _grid(len(outcomes), "Learned rate of each tensor (geometric mean over seeds)")
    for axes, (task, by_name) in zip(grid, outcomes.items(), strict=True):
        ours = by_name[LEARNED]
        tensors = list(zip(*ours.rates, strict=True))
        for index, rates in enumerate(tensors):
            axes.plot(ours.steps, rates, color=OURS, lw=1.2, alpha=1 - 0.75 * index / max(1, len(tensors) - 1))
        _dress(axes, task)
    figure.savefig(path)


def _grid(count: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(6.0, 3.3 * columns), 1 + 2.5 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in grid[count:]:
        spare.set_visible(False)
    return figure, grid[:count]


def _dress(axes: Axes, task: str) -> None:
    axes.set_title(task, fontsize=9, color=GREY)
    drawn = axes.dataLim
    if math.isfinite(drawn.minposx) and math.isfinite(drawn.minposy):  # else all runs failed at once
        axes.set(xscale="log", yscale="log")
    axes.tick_params(which="both", labelsize=7)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("steps", fontsize=8)


def _legend(figure: Figure) -> None:
    figure.legend(handles=list(_handles()), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _handles() -> Iterator[Line2D]:
    from matplotlib.lines import Line2D

    for name, title in NAMES.items():
        yield Line2D([], [], color=COLOURS[name], label=title, lw=2)
