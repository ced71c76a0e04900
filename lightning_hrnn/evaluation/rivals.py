"""Tuned baselines as rivals in meta-training: the rates that `lightning-hrnn evaluate` found, on fresh instances."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import BASELINES, train
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.meta.rivals import Rivals
from lightning_hrnn.tasks.base import describe

HOW_TO_MAKE = (
    "`lightning-hrnn evaluate --suite corpus --steps 300 --draws 12 --without quadratic-large --out DIR` leaves one in "
    "DIR/report.json"
)


class TunedRivals(Rivals):
    """Train tasks by hand-designed optimizers, each at the rate that was tuned for the configuration of a task.

    Args:
        report: `report.json` of an evaluation on a corpus, all of whose runs were equally long.
        names: which of its baselines.

    Raises:
        ValueError: the file is not there, is no such report, or a name is unknown.

    Example::

        Evolution(param_level=True, rivals=TunedRivals("tuned/report.json"))
    """

    def __init__(self, report: str, names: Sequence[str] = ("adam", "rmsprop")) -> None:
        if not names or len(set(names)) < len(names) or not set(names) <= BASELINES.keys():
            raise ValueError(f"Rivals are some of {list(BASELINES)}, each once, not {list(names)}.")
        self.names = tuple(names)
        records = _records(Path(report), names)
        lengths = {record["steps"] for record in records}
        if len(lengths) != 1:
            raise ValueError(f"{report} has runs of {sorted(lengths)} steps: rivals are tuned for one length.")
        (self.steps,) = lengths
        found: dict[str, list[list[float]]] = defaultdict(list)
        for record in records:
            found[record["configuration"]].append([math.log(record["baselines"][name]["lr"]) for name in self.names])
        self.rates = {
            configuration: [math.exp(sum(logs) / len(logs)) for logs in zip(*rows, strict=True)]
            for configuration, rows in found.items()
        }

    @torch.no_grad()
    def losses(self, batches: Sequence[TaskBatch], scored: Collection[int]) -> list[dict[str, Tensor]]:
        """Train the instances whose configuration the report has, under the schedule for which rates were tuned."""
        known = {index: batch for index, batch in enumerate(batches) if describe(batch.family) in self.rates}
        found: list[dict[str, Tensor]] = [{} for _ in batches]
        if not known:
            return found
        population = Population(list(known.values()))
        counts = torch.tensor([batch.count for batch in known.values()])
        tuned = torch.tensor([self.rates[describe(batch.family)] for batch in known.values()])  # [batches, rivals]
        for name, lr in zip(self.names, tuned.unbind(1), strict=True):
            rates = lr.repeat_interleave(counts).to(population.layout.params_in)
            rule, schedule = BASELINES[name].rule, BASELINES[name].schedule
            losses = train(rule, population, rates, self.steps, set(scored), schedule)
            for index, part in zip(known, population.by_batch(losses), strict=True):
                found[index][name] = part
        return found


def _records(report: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the records of a report, all of which name their configuration and tuned rates."""
    try:
        records = json.loads(report.read_text(encoding="utf-8"))["results"]
    except FileNotFoundError:
        raise ValueError(f"There is no report {report}: {HOW_TO_MAKE}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report of an evaluation ({type(error).__name__}: {error}).") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{report} has no results: {HOW_TO_MAKE}.")
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("configuration"), str):
            raise ValueError(
                f"Result {index} of {report} names no configuration, as those of a corpus do: {HOW_TO_MAKE}."
            )
        if not isinstance(steps := record.get("steps"), int) or steps < 1:
            raise ValueError(f"Result {index} of {report} has {steps!r} steps: the file is damaged.")
        for name in names:
            if not _is_rate(rate := _entry(_entry(record.get("baselines"), name), "lr")):
                raise ValueError(f"Result {index} of {report} has {rate!r} as the tuned rate of {name!r}.")
    return records


def _entry(value: Any, key: str) -> Any:
    """Return an entry of a mapping; None where there is none."""
    return value.get(key) if isinstance(value, dict) else None


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
