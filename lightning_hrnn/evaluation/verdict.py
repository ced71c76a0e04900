"""From outcomes to a verdict: a record of each task, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import BASELINES, CONSTANT
from lightning_hrnn.evaluation.protocol import ANYTIME, DEFAULT_ADAM, GIVEN, OURS, RATES, Outcome
from lightning_hrnn.evaluation.setting import SELECTION, Setting
from lightning_hrnn.evaluation.statistics import (
    LOSS_FLOOR,
    came_back,
    diverged,
    interquartile_mean,
    interval,
    mean_log,
    speedup,
)
from lightning_hrnn.tasks.base import describe

CLOSE = 1.05  # "within 5 %"

Record = dict[str, Any]


def judge(setting: Setting, task: str, outcomes: Mapping[str, Outcome], looked_at: Collection[str] = ()) -> Record:
    """Compare the learned optimizer with all others on one task.

    One optimizer beats another if the geometric mean of its final losses over the seeds is lower; a run whose loss is
    not finite makes that mean infinite.

    Args:
        setting: what was run.
        task: its name.
        outcomes: of `"hrnn"`, `"hrnn_anytime"`, `"default_adam"` and every baseline; `"hrnn_given"` may be there, and
            so may every baseline at a constant rate, with which `"hrnn_anytime"` is compared.
        looked_at: tasks that whoever made the weights looked at.
    """
    ours, anytime, adam = outcomes[OURS], outcomes[ANYTIME], outcomes["adam"]
    level = {name: _level(outcome) for name, outcome in outcomes.items()}
    speedups = [
        speedup(ours.steps, ours_curve, max(ours_final, floor), adam_curve, max(adam_final, floor))
        for ours_curve, ours_final, adam_curve, adam_final, floor in zip(
            _columns(ours.curve), ours.final, _columns(adam.curve), adam.final, _floors(ours), strict=True
        )
    ]
    default = outcomes[DEFAULT_ADAM]
    given: Record = {}
    if GIVEN in outcomes:
        beats_given = {name: level[GIVEN] < level[name] for name in BASELINES}
        given = {GIVEN: {**_baseline(outcomes[GIVEN], level[GIVEN]), "beats": beats_given}}
    unscheduled: Record = {}
    if CONSTANT.keys() <= outcomes.keys():
        unscheduled = {
            "constant": {
                "baselines": {name: _baseline(outcomes[name], level[name]) for name in CONSTANT},
                "beats": {name: level[ANYTIME] < level[name] for name in CONSTANT},
                "within_5_percent_of_adam": _is_within(level[ANYTIME], level["adam_constant"]),
            }
        }
    return {
        "suite": setting.suite,
        "task": task,
        **_configuration(setting, task),
        "steps": setting.steps,
        "used_for_selection": task.startswith(f"{SELECTION}/"),
        "looked_at": task in looked_at,
        "initial": ours.initial,
        "hrnn": _learned(ours, level[OURS]),
        "hrnn_anytime": {
            **_learned(anytime, level[ANYTIME]),
            "beats": {name: level[ANYTIME] < level[name] for name in BASELINES},
        },
        **given,
        **unscheduled,
        "baselines": {name: _baseline(outcomes[name], level[name]) for name in BASELINES},
        "default_adam": _baseline(default, level[DEFAULT_ADAM]),
        "speedup_vs_adam": math.exp(sum(map(math.log, speedups)) / len(speedups)),
        "speedups_vs_adam": speedups,
        "loss_ratio_to_adam": _ratio(level[OURS], level["adam"]),
        "beats": {name: level[OURS] < level[name] for name in BASELINES},
        "beats_default_adam": level[OURS] < level[DEFAULT_ADAM],
        "within_5_percent_of_adam": _is_within(level[OURS], level["adam"]),
        "beaten_pairs": {name: _pairs(ours, outcomes[name]) for name in BASELINES},
    }


def _configuration(setting: Setting, task: str) -> Record:
    """Name what was drawn from a family of a corpus; the tasks of other suites are known by their names."""
    return {"configuration": describe(setting.families()[task]())} if setting.suite == "corpus" else {}


def summarise(records: Sequence[Record]) -> Record:
    """Add records up; rates are shares of tasks, None without any.

    Returns:
        `win_rate_NAME` for each baseline, `win_rate_best` (all tuned baselines beaten), `win_rate_default_adam`,
        `win_rate_pairs_adam` (share of task and seed pairs), `within_5_percent_of_adam`, `speedup_iqm` with its 95 %
        bootstrap interval `speedup_iqm_interval`, `diverged` and `came_back` of `runs`, `tasks`, `seconds` on the wall
        of the learned optimizer and of the baselines, tuning apart; `not_looked_at`, shares and number of the tasks
        that nobody looked at who made the weights; `anytime`, the same without cooldown; `given`, win rates of the
        rule's direction at tuned rates, None where it was not run; `constant`, win rates without cooldown over
        baselines at constant rates, None where they were not run.
    """
    speeds = torch.tensor([record["speedups_vs_adam"] for record in records], dtype=torch.float64).log()
    given = [record[GIVEN] for record in records if GIVEN in record]
    constant = [record["constant"] for record in records if "constant" in record]
    return {
        **_shares(records),
        "not_looked_at": _shares([record for record in records if not record["looked_at"]]),
        "runs": sum(len(record["hrnn"]["final"]) for record in records),
        "win_rate_pairs_adam": _share([pair for record in records for pair in record["beaten_pairs"]["adam"]]),
        "anytime": {
            **{
                f"win_rate_{name}": _share([record["hrnn_anytime"]["beats"][name] for record in records])
                for name in BASELINES
            },
            "diverged": sum(record["hrnn_anytime"]["diverged"] for record in records),
            "came_back": sum(record["hrnn_anytime"]["came_back"] for record in records),
        },
        "given": {f"win_rate_{name}": _share([one["beats"][name] for one in given]) for name in BASELINES},
        "constant": {
            **{
                f"win_rate_{name}": _share([one["beats"][f"{name}_constant"] for one in constant]) for name in BASELINES
            },
            "win_rate_best": _share([all(one["beats"].values()) for one in constant]),
            "within_5_percent_of_adam": _share([one["within_5_percent_of_adam"] for one in constant]),
        },
        "speedup_iqm": float(interquartile_mean(speeds.flatten()).exp()) if records else None,
        "speedup_iqm_interval": [math.exp(edge) for edge in interval(speeds)] if records else None,
        "diverged": sum(record["hrnn"]["diverged"] for record in records),
        "came_back": sum(record["hrnn"]["came_back"] for record in records),
        "seconds": {
            "hrnn": sum(record["hrnn"]["seconds"] for record in records),
            **{name: sum(record["baselines"][name]["seconds"] for record in records) for name in BASELINES},
            "tuning": sum(part["tuning_seconds"] for record in records for part in tuned_parts(record).values()),
        },
    }


def _shares(records: Sequence[Record]) -> Record:
    """Return the number of tasks, and on which share of them the learned optimizer ends lower, or close."""
    return {
        "tasks": len(records),
        **{f"win_rate_{name}": _share([record["beats"][name] for record in records]) for name in BASELINES},
        "win_rate_best": _share([all(record["beats"].values()) for record in records]),
        "win_rate_default_adam": _share([record["beats_default_adam"] for record in records]),
        "within_5_percent_of_adam": _share([record["within_5_percent_of_adam"] for record in records]),
    }


def tuned_parts(record: Mapping[str, Any]) -> dict[str, Record]:
    """Return the parts of a record, by the name of their optimizer, whose rates were tuned."""
    constant = record["constant"]["baselines"] if "constant" in record else {}
    return {**record["baselines"], **constant, **({GIVEN: record[GIVEN]} if GIVEN in record else {})}


def count_diverged(outcome: Outcome) -> int:
    """Count the runs that were ever not finite or ended above where they began."""
    curve, final, initial = (torch.tensor(value) for value in (outcome.curve, outcome.final, outcome.initial))
    return int(diverged(curve, final, initial).sum())


def count_came_back(outcome: Outcome) -> int:
    """Count the runs that lost again what they had learned, see `statistics.came_back`."""
    return int(came_back(torch.tensor(outcome.curve), torch.tensor(outcome.initial)).sum())


def _learned(outcome: Outcome, level: float) -> Record:
    return {
        "final": outcome.final,
        "mean": math.exp(level),
        "diverged": count_diverged(outcome),
        "came_back": count_came_back(outcome),
        "seconds": outcome.seconds,
    }


def _baseline(outcome: Outcome, level: float) -> Record:
    return {
        "lr": outcome.lr,
        "final": outcome.final,
        "mean": math.exp(level),
        "diverged": count_diverged(outcome),
        "came_back": count_came_back(outcome),
        "at_edge_of_grid": outcome.lr in (RATES[0], RATES[-1]),
        "seconds": outcome.seconds,
        "tuning_seconds": outcome.tuning_seconds,
    }


def _level(outcome: Outcome) -> float:
    return float(mean_log(_double(outcome.final), _double(outcome.initial)))


def _is_within(level: float, other: float) -> bool:
    """Tell whether a finite level is lower than another, or at most 5 % above."""
    return math.isfinite(level) and level <= other + math.log(CLOSE)


def _floors(outcome: Outcome) -> list[float]:
    return [LOSS_FLOOR * value for value in outcome.initial]


def _pairs(ours: Outcome, theirs: Outcome) -> list[bool]:
    return [a < b for a, b in zip(ours.final, theirs.final, strict=True)]


def _ratio(ours: float, theirs: float) -> float | None:
    if not math.isfinite(theirs):
        return None
    return math.exp(min(ours - theirs, 700.0)) if math.isfinite(ours) else math.inf


def _columns(curve: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*curve, strict=True)]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
