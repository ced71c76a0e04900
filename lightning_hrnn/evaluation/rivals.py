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

HOW_TO_MAKE = "lightning-hrnn evaluate --suite corpus --steps 300 --draws 12 makes one"


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
        if not names or (unknown := [name for name in names if name not in BASELINES]):
            raise ValueError(f"Rivals are some of {list(BASELINES)}, not {list(names) and unknown}.")
        self.names = tuple(names)
        records = _records(Path(report))
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
        known = {index: batch for index, batch in enumerate(batches) if repr(batch.family) in self.rates}
        found: list[dict[str, Tensor]] = [{} for _ in batches]
        if not known:
            return found
        population = Population(list(known.values()))
        counts = torch.tensor([batch.count for batch in known.values()])
        tuned = torch.tensor([self.rates[repr(batch.family)] for batch in known.values()])  # [batches, rivals]
        for name, lr in zip(self.names, tuned.unbind(1), strict=True):
            rates = lr.repeat_interleave(counts).to(population.layout.params_in)
            rule, schedule = BASELINES[name].rule, BASELINES[name].schedule
            losses = train(rule, population, rates, self.steps, set(scored), schedule)
            for index, part in zip(known, population.by_batch(losses), strict=True):
                found[index][name] = part
        return found


def _records(report: Path) -> list[dict[str, Any]]:
    """Return the records of a report that name their configuration."""
    try:
        records = json.loads(report.read_text(encoding="utf-8"))["results"]
        if not records or not all("configuration" in record for record in records):
            raise KeyError("configuration")
    except FileNotFoundError:
        raise ValueError(f"There is no report {report}: {HOW_TO_MAKE}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{report} is no report of an evaluation on a corpus ({type(error).__name__}: {error}): {HOW_TO_MAKE}."
        ) from error
    return records
