"""The report of an evaluation: verdict first, then every task, then the nets by which checkpoints were picked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_hrnn.evaluation.baselines import BASELINES, CONSTANT
from lightning_hrnn.evaluation.protocol import GIVEN
from lightning_hrnn.evaluation.report import Column, Report
from lightning_hrnn.evaluation.verdict import Record, summarise, tuned_parts

LOSS_COLUMNS = (
    Column("task", "task"),
    Column("hrnn", "HRNN", ".3g"),
    Column("anytime", "no cooldown", ".3g"),
    Column("given", "given rates", ".3g"),
    *(Column(name, baseline.title.partition(",")[0], ".3g") for name, baseline in BASELINES.items()),
    Column("default_adam", "Adam 1e-3", ".3g"),
    Column("beaten", "baselines beaten"),
    Column("speedup", "speed-up", ".2f"),
    Column("diverged", "diverged"),
    Column("came_back", "came back"),
)
COST_COLUMNS = (
    Column("task", "task"),
    *(
        Column(f"{name}_lr", f"rate of {baseline.title.partition(',')[0]}", ".2g")
        for name, baseline in BASELINES.items()
    ),
    Column("edge", "best at the edge of the grid"),
    Column("hrnn_seconds", "HRNN, s", ".1f"),
    Column("adam_seconds", "Adam, s", ".1f"),
    Column("tuning_seconds", "tuning of all, s", ".1f"),
)
CONSTANT_COLUMNS = (
    Column("task", "task"),
    Column("anytime", "HRNN, no cooldown", ".3g"),
    *(Column(name, BASELINES[name.removesuffix("_constant")].title.partition(",")[0], ".3g") for name in CONSTANT),
    Column("beaten", "baselines beaten"),
)


def losses_row(record: Mapping[str, Any]) -> Record:
    """Return a record's losses, geometric means over seeds, as a row of a table.

    Counts are those of runs told the length + those of runs not told.
    """
    return {
        "task": record["task"],
        "hrnn": record["hrnn"]["mean"],
        "anytime": record["hrnn_anytime"]["mean"],
        "given": record[GIVEN]["mean"] if GIVEN in record else None,
        **{name: base["mean"] for name, base in record["baselines"].items()},
        "default_adam": record["default_adam"]["mean"],
        "beaten": _beaten(record["beats"]),
        "speedup": record["speedup_vs_adam"],
        **{key: f"{record['hrnn'][key]} + {record['hrnn_anytime'][key]}" for key in ("diverged", "came_back")},
    }


def constant_row(record: Mapping[str, Any]) -> Record:
    """Return a record's losses where nobody knows how long the run is, as a row of a table."""
    constant = record["constant"]
    return {
        "task": record["task"],
        "anytime": record["hrnn_anytime"]["mean"],
        **{name: base["mean"] for name, base in constant["baselines"].items()},
        "beaten": _beaten(constant["beats"]),
    }


def cost_row(record: Mapping[str, Any]) -> Record:
    """Return a record's tuned rates and times as a row of a table."""
    tuned = tuned_parts(record)
    return {
        "task": record["task"],
        **{f"{name}_lr": base["lr"] for name, base in record["baselines"].items()},
        "edge": ", ".join(name for name, part in tuned.items() if part["at_edge_of_grid"]) or "none",
        "hrnn_seconds": record["hrnn"]["seconds"],
        "adam_seconds": record["baselines"]["adam"]["seconds"],
        "tuning_seconds": sum(part["tuning_seconds"] for part in tuned.values()),
    }


Row = Callable[[Mapping[str, Any]], Record]


@dataclass(frozen=True)
class EvaluationReport(Report):
    """A report of an evaluation; its rows are the records of all tasks.

    Args:
        verdict: what the tasks add up to that no choice of weights saw.
        selection: what the others add up to.
    """

    verdict: Record = field(default_factory=dict)
    selection: Record = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record], **about: Any) -> EvaluationReport:
        """Return the report of some records.

        Args:
            records: of `verdict.judge`.
            about: title, command, settings and figures.
        """
        verdict = summarise([record for record in records if not record["used_for_selection"]])
        selection = summarise([record for record in records if record["used_for_selection"]])
        return cls(
            summary=sentence(verdict),
            columns=LOSS_COLUMNS,
            rows=list(records),
            verdict=verdict,
            selection=selection,
            **about,
        )

    def content(self) -> dict[str, Any]:
        """Return what `report.json` holds: the numbers of the summary in place of the sentence."""
        return {**super().content(), "summary": dict(self.verdict), "selection": dict(self.selection)}

    def markdown(self) -> str:
        """Return the report as Markdown."""
        reported = [record for record in self.rows if not record["used_for_selection"]]
        judged = [record for record in self.rows if record["used_for_selection"]]
        only = {name: getattr(self, name) for name in Report.__dataclass_fields__}
        plain = replace(Report(**only), rows=[losses_row(record) for record in reported])
        head, mark, tail = plain.markdown().partition("## How to repeat it")
        parts = [head.rstrip(), ""]
        if judged:
            parts += [_section("Nets by which checkpoints were picked: no evidence", LOSS_COLUMNS, judged, losses_row)]
        constant = [record for record in reported if "constant" in record]
        if constant:
            title = "Without cooldown, against baselines tuned at constant rates: nobody knows the length of the run"
            parts += [_section(title, CONSTANT_COLUMNS, constant, constant_row)]
        parts += [_section("Tuned rates and time on the wall", COST_COLUMNS, self.rows, cost_row)]
        return "\n".join([*parts, mark + tail])


def sentence(verdict: Record) -> str:
    """Say in a few sentences what came out."""
    if not verdict["tasks"]:
        return "No task but nets by which checkpoints were picked: nothing to conclude."
    low, high = verdict["speedup_iqm_interval"]
    return (
        f"Untuned, the learned optimizer ends lower than per-task tuned Adam on {verdict['win_rate_adam']:.0%} of "
        f"{verdict['tasks']} tasks, than tuned RMSProp on {verdict['win_rate_rmsprop']:.0%}, than every tuned baseline "
        f"on {verdict['win_rate_best']:.0%}; within 5 % of tuned Adam or lower on "
        f"{verdict['within_5_percent_of_adam']:.0%}; lower than Adam at 1e-3 on "
        f"{verdict['win_rate_default_adam']:.0%}. Speed-up over tuned Adam, interquartile mean: "
        f"{verdict['speedup_iqm']:.2f} (95 % interval {low:.2f} to {high:.2f}). "
        f"{verdict['diverged']} of {verdict['runs']} runs diverged{_came_back(verdict)}. Without cooldown, not knowing "
        f"the length of the run, it ends lower than tuned Adam on {verdict['anytime']['win_rate_adam']:.0%}, and "
        f"{verdict['anytime']['diverged']} runs diverged{_came_back(verdict['anytime'])}."
        f"{_constant(verdict['constant'])}{_given(verdict['given'])}{_not_looked_at(verdict)}"
    )


def _came_back(verdict: Record) -> str:
    return f", and {count} lost again what they had learned" if (count := verdict["came_back"]) else ""


def _not_looked_at(verdict: Record) -> str:
    part = verdict["not_looked_at"]
    if part["tasks"] == verdict["tasks"]:
        return ""
    if not part["tasks"]:
        return " Whoever made the weights looked at all of these tasks: they are no evidence."
    return (
        f" Of tasks that whoever made the weights never looked at, {part['tasks']} in number: lower than Adam on "
        f"{part['win_rate_adam']:.0%}, than RMSProp on {part['win_rate_rmsprop']:.0%}, than all on "
        f"{part['win_rate_best']:.0%}; within 5 % of Adam or lower on {part['within_5_percent_of_adam']:.0%}."
    )


def _beaten(beats: Mapping[str, bool]) -> str:
    beaten = [name.removesuffix("_constant") for name, won in beats.items() if won]
    return "all" if len(beaten) == len(beats) else ", ".join(beaten) or "none"


def _constant(verdict: Record) -> str:
    if verdict["win_rate_adam"] is None:
        return ""
    return (
        " Against baselines that do not know the length either, tuned at constant rates, it then ends lower than Adam "
        f"on {verdict['win_rate_adam']:.0%}, than RMSProp on {verdict['win_rate_rmsprop']:.0%}, than all on "
        f"{verdict['win_rate_best']:.0%}; within 5 % of Adam or lower on {verdict['within_5_percent_of_adam']:.0%}."
    )


def _given(verdict: Record) -> str:
    if verdict["win_rate_adamw"] is None:
        return ""
    return (
        " At given rates, tuned as the baselines are and under the same warm-up and cosine, its direction ends lower "
        f"than AdamW on {verdict['win_rate_adamw']:.0%} and than Adam on {verdict['win_rate_adam']:.0%}."
    )


def _section(title: str, columns: Sequence[Column], records: Sequence[Mapping[str, Any]], row: Row) -> str:
    cells = [[column.title for column in columns], ["---:" if column.format else "---" for column in columns]]
    cells += [[column.cell(row(record)) for column in columns] for record in records]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in cells), ""])
