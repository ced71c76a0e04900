"""`lightning-hrnn compare`: training runs side by side, over steps and over time."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.evaluation.plots import plot_panels
from lightning_hrnn.evaluation.report import Column, Report
from lightning_hrnn.evaluation.runs import LoggedRun, find_runs, panels_of_runs, read_runs, shared_metrics

EXTRA_METRICS = ("train/loss", "val/loss", "val/acc")
"""Which a table shows besides those that are drawn, where runs have them."""
EXAMPLES = f"""\
  {PROGRAM} compare runs/digits
  {PROGRAM} compare runs/imagenet/resnet50v2_hrnn runs/imagenet/resnet50v2_sgd --out /tmp/comparison
  {PROGRAM} compare runs/digits/version_0 runs/digits/version_1 --metrics train/loss val/acc"""


def run(arguments: Sequence[str]) -> None:
    """Read the runs, print the table, write the report and its figure.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        OSError: If `--out` cannot be written to.
        ValueError: If a file is none of `CSVLogger`'s, or the runs lack a metric.
    """
    parser = CommandParser(
        prog=f"{PROGRAM} compare",
        description=(
            "Put training runs side by side: their losses over steps and over seconds of training as a figure, and a\n"
            "table. A run is a folder with the metrics.csv of Lightning's CSVLogger; all runs below a folder count."
        ),
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("folders", type=str, nargs="+", metavar="RUN_DIR", help="Folders of runs, or folders above them.")
    metrics_help = "Metrics to draw; if null, train/loss and val/loss, or what losses there are."
    add("--metrics", type=str, nargs="+", default=None, help=metrics_help)
    add("--out", type=Path, default=Path("hrnn-comparison"), help="Folder for the figure, report and table.csv.")
    options = parser.parse_args(list(arguments))
    runs = read_runs(find_runs(options.folders))
    metrics = shared_metrics(runs, options.metrics)
    out, console = ready_folder(options.out), Console()
    ours = next((logged.label for logged in runs if logged.optimizer.startswith("HRNN")), None)
    panels = panels_of_runs(runs, metrics)
    columns = len(panels) // len(metrics)  # a row for each metric: over steps and over seconds
    plot_panels(panels, out / "curves.png", ", ".join(options.folders), highlight=ours, columns=columns)
    report = report_of(runs, metrics, shlex.join([PROGRAM, "compare", *arguments]))
    report.write(out)
    write_csv(report, out / "table.csv")
    show(report, console)
    console.print(report.summary)
    console.print(f"Written to {out}: report.md, report.json, table.csv, curves.png")


def report_of(runs: Sequence[LoggedRun], metrics: Sequence[str], command: str) -> Report:
    """Return the table of the runs, the best at the first metric on top, those without a number last."""
    shown = list(dict.fromkeys([*metrics, *(name for name in EXTRA_METRICS if any(name in r.curves for r in runs))]))
    rows = [logged.row(shown) for logged in runs]
    best_first = -1 if "acc" in metrics[0] else 1
    rows.sort(key=lambda row: (math.isnan(row[metrics[0]]), best_first * row[metrics[0]]))
    summary = "Training losses are means over the last tenth of what was logged; others are the best of the run."
    if untimed := [logged.name for logged in runs if not logged.seconds[0]]:
        summary += f" Without time: {', '.join(untimed)}; lightning_hrnn.tracking.RunClock logs it."
    return Report(
        title=f"Comparison of {len(runs)} run{'s' if len(runs) > 1 else ''}",
        summary=summary,
        command=command,
        settings={"metrics": ", ".join(metrics)},
        columns=(
            Column("run", "run"),
            Column("optimizer", "optimizer"),
            Column("steps", "steps", ",d"),
            Column("seconds", "time [s]", ",.0f"),
            *(Column(name, name, ".4g") for name in shown),
        ),
        rows=rows,
        figures={"curves.png": "Over steps and over seconds, averaged over a fiftieth of each curve"},
    )


def write_csv(report: Report, path: Path) -> None:
    """Write the rows of a report for spreadsheets."""
    keys = [column.key for column in report.columns]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, keys, extrasaction="ignore")
        table.writeheader()
        table.writerows(map(_plain, report.rows))


def show(report: Report, console: Console) -> None:
    """Print the table."""
    table = Table(title=report.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in report.columns:
        table.add_column(column.title, justify="right" if column.format else "left", overflow="fold")
    for row in report.rows:
        table.add_row(*(column.cell(row) for column in report.columns))
    console.print(table)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "" if value is None else value for key, value in row.items()}
