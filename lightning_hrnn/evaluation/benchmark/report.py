"""The report of a benchmark: tables, a summary, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning_hrnn.evaluation.benchmark.figures import Bars, name_of, plot_bars, plot_cost
from lightning_hrnn.evaluation.report import Column, Report

STEP_COLUMNS = (
    Column("model", "model"),
    Column("params", "parameters", ","),
    Column("optimizer", "optimizer"),
    Column("kernel", "kernel"),
    Column("ns_per_param", "ns/param", ".2f"),
    Column("ratio_to_adam_fused", "x fused Adam", ".1f"),
    Column("share_of_iteration", "share", ".1%"),
    Column("state_bytes_per_param", "state B/param", ".1f"),
    Column("peak_temp_bytes", "temporary B", ","),
)
SHARE_COLUMNS = (
    Column("model", "model"),
    Column("batch_size", "batch", "d"),
    Column("image_size", "image", "d"),
    Column("optimizer", "optimizer"),
    Column("kernel", "kernel"),
    Column("share_of_iteration", "share", ".2%"),
)
THREAD_COLUMNS = (
    Column("model", "model"),
    Column("params", "parameters", ","),
    Column("optimizer", "optimizer"),
    Column("kernel", "kernel"),
    Column("threads", "threads", "d"),
    Column("ns_per_param", "ns/param", ".2f"),
    Column("speedup", "speed-up", ".2f"),
)
UNROLL_COLUMNS = (
    Column("estimator", "estimator"),
    Column("engine", "engine"),
    Column("task_param_steps_per_s", "param steps/s", ",.0f"),
    Column("ratio_to_eager", "x truncated backprop, eager", ".1f"),
)

Row = dict[str, Any]


class Part(NamedTuple):
    """Hold one table of the report."""

    title: str
    columns: Sequence[Column]
    rows: list[Row]


@dataclass
class Measured:
    """Hold all that was measured.

    Args:
        steps: rows of `measure_steps`, of all models.
        shares: rows of the same.
        threads: rows of `measure_threads`.
        unrolls: rows of `measure_unrolls`.
        spread: the largest of any model.
    """

    steps: list[Row]
    shares: list[Row]
    threads: list[Row]
    unrolls: list[Row]
    spread: float

    @property
    def parts(self) -> list[Part]:
        """The tables; an empty one is left out."""
        parts = [
            Part("One step", STEP_COLUMNS, self.steps),
            Part("Share of a training iteration", SHARE_COLUMNS, self.shares),
            Part("Threads", THREAD_COLUMNS, self.threads),
            Part("Meta-training", UNROLL_COLUMNS, self.unrolls),
        ]
        return [part for part in parts if part.rows]

    @property
    def largest(self) -> str:
        """Name of the largest model."""
        return str(max(self.steps, key=lambda row: row["params"])["model"])

    def summary(self) -> str:
        """Return in a few sentences what came out."""
        ours = [row for row in self.steps if (row["model"], row["optimizer"]) == (self.largest, "hrnn")]
        costs = ", ".join(f"{row['ratio_to_adam_fused']:.1f} with the kernel {row['kernel']}" for row in ours)
        kernel = ours[-1]["kernel"]  # the last is the fastest
        cost = [row["ns_per_param"] for row in self.steps if (row["optimizer"], row["kernel"]) == ("hrnn", kernel)]
        fastest = max(
            (row for row in self.unrolls if row["estimator"] == "truncated_backprop"),
            key=lambda row: row["task_param_steps_per_s"],
        )
        strategy = max(row["ratio_to_eager"] for row in self.unrolls if row["estimator"] == "pes")
        return (
            f"On {self.largest} a step takes this many times as long as one of fused Adam: {costs}. "
            f"A parameter takes {_range(cost)} ns with {kernel}, over all models. "
            f"Meta-training by truncated backprop is {fastest['ratio_to_eager']:.1f} times as fast with the engine "
            f"{fastest['engine']} as with eager, by evolution strategies {strategy:.1f} times. Numbers are "
            f"medians of rounds in which all took turns; half of the rounds lie within {self.spread:.0%} of the median "
            "ratio or closer."
        )

    def plot(self, folder: Path) -> dict[str, str]:
        """Draw the figures into a folder; return file names with captions."""
        plot_cost(self.steps, folder / "cost.png")
        plot_bars(self._bars(), folder / "ratios.png")
        return {
            "cost.png": "Time of a step over the number of parameters",
            "ratios.png": "Ratios to fused Adam, shares of an iteration, speed of meta-training",
        }

    def _bars(self) -> list[Bars]:
        ratios = {name_of(row): row["ratio_to_adam_fused"] for row in self.steps if row["model"] == self.largest}
        panels = [Bars(f"Step of {self.largest}", "times fused Adam", ratios, log=True)]
        timed = [row for row in self.shares if row["optimizer"] == "hrnn"]
        if timed:
            model, kernel = timed[-1]["model"], timed[-1]["kernel"]  # the last is the fastest
            percent = {
                f"hrnn {kernel}, batch {row['batch_size']}": 100 * row["share_of_iteration"]
                for row in timed
                if (row["model"], row["kernel"]) == (model, kernel)
            }
            panels.append(Bars(f"Share of an iteration of {model}", "per cent", percent))
        speeds = {
            f"{row['estimator'].replace('_', ' ')}, {row['engine']}": row["task_param_steps_per_s"]
            for row in self.unrolls
        }
        return [*panels, Bars("Meta-training", "parameters x inner steps per second", speeds)]


@dataclass(frozen=True)
class BenchmarkReport(Report):
    """A report of several tables.

    Args:
        parts: The tables; `rows` are those of all of them.
    """

    parts: Sequence[Part] = field(default=())

    @classmethod
    def of(
        cls, measured: Measured, command: str, settings: Mapping[str, Any], figures: Mapping[str, str]
    ) -> BenchmarkReport:
        """Return the report of what was measured."""
        return cls(
            title="What the learned optimizer costs",
            summary=measured.summary(),
            command=command,
            settings=settings,
            columns=STEP_COLUMNS,
            rows=[row for part in measured.parts for row in part.rows],
            figures=figures,
            parts=measured.parts,
        )

    def markdown(self) -> str:
        """Return the report as Markdown, a section for each table after the first."""
        first, *others = self.parts
        only = {name: getattr(self, name) for name in Report.__dataclass_fields__}
        head, mark, tail = replace(Report(**only), rows=first.rows).markdown().partition("## How to repeat it")
        return "\n".join([head.rstrip(), "", *(_section(part) for part in others), mark + tail])


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values))))


def _section(part: Part) -> str:
    cells = [[column.title for column in part.columns]]
    cells.append(["---:" if column.format else "---" for column in part.columns])
    cells += [[column.cell(row) for column in part.columns] for row in part.rows]
    return "\n".join([f"## {part.title}", "", *(f"| {' | '.join(line)} |" for line in cells), ""])
