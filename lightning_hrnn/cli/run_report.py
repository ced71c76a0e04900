"""The report of one Lightning run: its last metrics, and curves of what it logged."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_hrnn.evaluation.plots import Panel, plot_panels
from lightning_hrnn.evaluation.report import Column, Report
from lightning_hrnn.evaluation.runs import METRICS, NOT_METRICS, Curve, read_curves, spans_decades

STAGES = ("train", "val", "test")
MOST_PANELS = 4
MOST_CURVES = 8
"""In one panel; more cannot be told apart."""


def write_run_report(out: Path, command: str, trainer: Trainer) -> Report:
    """Write `report.json`, `report.md` and, if anything was logged more than once, `curves.png`.

    Args:
        out: The folder; its `metrics.csv` holds what was logged.
        command: The command that ran.
        trainer: The trainer after the run.

    Returns:
        The report.
    """
    figures = {}
    config = Path(trainer.log_dir or out, "config.yaml")
    panels = panels_of(logged(out / METRICS))
    if panels:
        plot_panels(panels, out / "curves.png", command)
        figures["curves.png"] = "What was logged, against steps"
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    report = Report(
        title=f"Metrics of {command}",
        summary=f"{trainer.global_step:,} optimizer steps, {trainer.current_epoch:,} epochs.",
        command=f"{command} --config {config}",
        settings={"devices": trainer.world_size, "precision": trainer.precision},
        columns=(Column("metric", "metric"), Column("value", "value", ".4g")),
        rows=[{"metric": name, "value": value} for name, value in metrics.items()],
        figures=figures,
    )
    report.write(out)
    return report


def logged(path: Path) -> dict[str, Curve]:
    """Return what a `CSVLogger`'s file holds more than one value of; nothing if there is no such file."""
    curves = read_curves(path) if path.is_file() else {}
    return {name: curve for name, curve in curves.items() if len(curve[0]) > 1 and name not in NOT_METRICS}


def panels_of(curves: dict[str, Curve]) -> list[Panel]:
    """Return a panel for each quantity that changes.

    `train/loss` and `val/loss` share a panel, and so do `loss/a` and `loss/b`; losses come first.
    """
    quantities: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name, curve in curves.items():
        first, _, last = name.rpartition("/")
        quantity = quantities[last if first in STAGES or not first else first]
        if len(set(curve[1])) > 1 and len(quantity) < MOST_CURVES:
            quantity[name] = curve
    quantities = {name: shown for name, shown in quantities.items() if shown}
    shown = sorted(quantities, key=lambda quantity: ("loss" not in quantity, quantity))[:MOST_PANELS]
    return [
        Panel(quantity, "optimizer steps", quantity, quantities[quantity], log=spans_decades(quantities[quantity]))
        for quantity in shown
    ]
