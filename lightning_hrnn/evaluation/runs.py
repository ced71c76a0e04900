"""Training runs as Lightning's `CSVLogger` leaves them: found, read, put side by side."""

from __future__ import annotations

import csv
import math
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from lightning_hrnn.evaluation.plots import Panel

METRICS = "metrics.csv"
SECONDS = "seconds"  # as `tracking.RunClock` logs them
NOT_METRICS = ("step", "epoch", SECONDS)
LAST_SHARE = 0.1
"""Of the logged values of a run, whose mean is its last training loss: single batches are noisy."""
SMOOTHED_SHARE = 0.02
"""Of the logged values of a curve, over which it is averaged to be drawn."""
HOW_TO_LOG = (
    "`lightning-hrnn train fit --config recipes/digits.yaml` leaves one in runs/digits/version_0; with another logger, "
    "`--out DIR` leaves one in DIR."
)

Curve = tuple[list[float], list[float]]
"""Steps, or seconds, and values."""


@dataclass(frozen=True)
class LoggedRun:
    """A training run.

    Args:
        name: Short name of its folder, unlike that of any other run beside it.
        optimizer: What trained, as far as the run's configuration tells.
        curves: Metric -> (steps, values).
        seconds: (steps, seconds since the start); empty if nothing logged the time.
    """

    name: str
    optimizer: str
    curves: dict[str, Curve]
    seconds: Curve

    @property
    def label(self) -> str:
        """What legends call it."""
        return f"{self.optimizer} ({self.name})" if self.optimizer else self.name

    def by_time(self, metric: str) -> Curve:
        """Return a metric over seconds instead of steps, interpolated between the steps whose time was logged."""
        steps, values = self.curves[metric]
        return [interpolate(step, *self.seconds) for step in steps], values

    def row(self, metrics: Sequence[str]) -> dict[str, Any]:
        """Return what a table shows of it: steps, seconds, and the last or best value of each metric."""
        row: dict[str, Any] = {"run": self.name, "optimizer": self.optimizer or None}
        row["steps"] = 1 + max(int(steps[-1]) for steps, _ in self.curves.values())
        row["seconds"] = self.seconds[1][-1] if self.seconds[1] else None
        for metric in metrics:
            if metric in self.curves:
                row[metric] = summary_value(metric, self.curves[metric][1])
        return row


def summary_value(metric: str, values: Sequence[float]) -> float:
    """Return one number for a curve: of training the mean of the last tenth, otherwise the best value.

    Example:
        >>> summary_value("train/loss", [3.0, 2.0, 1.0]), summary_value("val/acc", [0.5, 0.9, 0.8])
        (1.0, 0.9)
    """
    if metric.startswith("train"):
        return fmean(values[-max(1, round(LAST_SHARE * len(values))) :])
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    return max(finite) if "acc" in metric else min(finite)


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders of all runs that lie in some folders, or below them, in order of their names.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in one.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
        here = [folder] if (folder / METRICS).is_file() else sorted(path.parent for path in folder.rglob(METRICS))
        if not here:
            raise FileNotFoundError(f"{str(folder)!r} holds no run: no {METRICS} in it or below. {HOW_TO_LOG}")
        found += [run for run in here if run not in found]
    return found


def read_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Read runs; their names are what distinguishes their folders.

    Raises:
        ValueError: If a file is none of `CSVLogger`'s, or holds no metric.
    """
    folders = [folder.resolve() for folder in folders]
    above = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [read_run(folder, str(folder.relative_to(above))) for folder in folders]


def read_run(folder: Path, name: str) -> LoggedRun:
    """Read one run; see `read_runs`."""
    curves = read_curves(folder / METRICS)
    seconds = curves.pop(SECONDS, ([], []))
    if not curves:
        raise ValueError(f"{folder / METRICS} holds no metric yet.")
    return LoggedRun(name, optimizer_of(folder), curves, seconds)


def read_curves(path: Path) -> dict[str, Curve]:
    """Return the metrics of a `CSVLogger`'s file as name -> (steps, values).

    Raises:
        ValueError: If the file is none of `CSVLogger`'s.
    """
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    with path.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        if "step" not in (table.fieldnames or []):
            raise ValueError(f"{path} is no file of Lightning's CSVLogger: it has no column 'step'. {HOW_TO_LOG}")
        for row in table:
            for name, value in row.items():
                if value and row["step"] and name not in ("step", "epoch"):
                    try:
                        step, number = float(row["step"]), float(value)
                    except (TypeError, ValueError):
                        raise ValueError(f"{path}, line {table.line_num}: {name} is {value!r}, no number.") from None
                    curves[name][0].append(step)
                    curves[name][1].append(number)
    return dict(curves)


def optimizer_of(folder: Path) -> str:
    """Return what trained a run, from the configuration that the command line saved; empty if it does not tell."""
    for file in (folder / "config.yaml", folder / "hparams.yaml"):
        if not file.is_file():
            continue
        try:
            config = _mapping(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError):  # of a module's own objects, or cut short
            continue
        callbacks = _mapping(config.get("trainer")).get("callbacks")
        for callback in map(_mapping, callbacks if isinstance(callbacks, list) else [callbacks]):
            if str(callback.get("class_path")).endswith("HRNNOptimizerCallback"):
                return _with_rate("HRNN", _mapping(callback.get("init_args")), usual=1.0)
        own = _mapping(_mapping(config.get("model")).get("init_args")) if "trainer" in config else config
        if name := own.get("optimizer"):
            return _with_rate(str(name), own)
    return ""


def _mapping(value: Any) -> dict[str, Any]:
    """Return a part of a configuration; an empty one where a foreign file has something else."""
    return value if isinstance(value, dict) else {}


def _with_rate(name: str, options: dict[str, Any], usual: float | None = None) -> str:
    rate = options.get("lr")
    return f"{name} lr {rate:g}" if isinstance(rate, (int, float)) and rate != usual else name


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the value at `x` of the line through points, of which the first and the last segment go on outside.

    Example:
        >>> interpolate(1.5, [0, 1, 2], [0, 10, 30]), interpolate(3, [0, 1, 2], [0, 10, 30])
        (20.0, 50.0)
    """
    if len(xs) < 2:
        return ys[0] * (x + 1) / (xs[0] + 1)  # from zero before the first step
    right = bisect_left(xs, x, 1, len(xs) - 1)
    left = right - 1
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / ((xs[right] - xs[left]) or 1)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running mean of a curve over a fiftieth of its values, those up to each one.

    Example:
        >>> smoothed([1.0, 3.0]), smoothed([0.0, 1.0] * 50)[-1]
        ([1.0, 3.0], 0.5)
    """
    window = max(1, round(SMOOTHED_SHARE * len(values)))
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def shared_metrics(runs: Sequence[LoggedRun], wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to compare: those wanted, or `train/loss` and `val/loss`, or any loss that runs share.

    Raises:
        ValueError: If some run lacks a metric that is wanted, or there is none to compare.
    """
    for metric in wanted or ():
        for run in runs:
            if metric not in run.curves:
                raise ValueError(f"{run.name} has no metric {metric!r}; it has {', '.join(sorted(run.curves))}.")
    if wanted:
        return list(wanted)
    shared = set.intersection(*(set(run.curves) for run in runs))
    chosen: list[str] = [name for name in ("train/loss", "val/loss") if name in shared]
    chosen = chosen or sorted(name for name in shared if "loss" in name)[:2] or sorted(shared)[:1]
    if not chosen:
        listed = "; ".join(f"{run.name}: {', '.join(sorted(run.curves))}" for run in runs)
        raise ValueError(f"The runs share no metric. {listed}.")
    return chosen


def panels_of_runs(runs: Sequence[LoggedRun], metrics: Sequence[str]) -> list[Panel]:
    """Return, for each metric, a panel over steps and, where any run logged the time, one over seconds."""
    timed = [run for run in runs if run.seconds[0]]
    panels = []
    for metric in metrics:
        by_step = {run.label: (run.curves[metric][0], smoothed(run.curves[metric][1])) for run in runs}
        panels.append(Panel(metric, "optimizer steps", metric, by_step, log=spans_decades(by_step)))
        if timed:
            by_time = {run.label: run.by_time(metric) for run in timed}
            by_time = {label: (seconds, smoothed(values)) for label, (seconds, values) in by_time.items()}
            panels.append(Panel(metric, "seconds of training", metric, by_time, log=spans_decades(by_time)))
    return panels


def spans_decades(curves: dict[str, Curve]) -> bool:
    """Whether all values are positive and the largest is over ten times the smallest."""
    values = [value for _, ys in curves.values() for value in ys if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)
