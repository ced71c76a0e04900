"""Rivals in meta-training: tuned baselines on the same instances, and what a difference beside them is worth."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import BASELINES, train
from lightning_hrnn.evaluation.protocol import Outcome
from lightning_hrnn.evaluation.rivals import TunedRivals
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.evaluation.verdict import judge
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.meta.rivals import LARGEST_GAP, LEVEL_WITH_FLOOR, MEMORY, SEEDS, SMALLEST_ERROR, Standing
from lightning_hrnn.tasks.base import describe
from lightning_hrnn.tasks.functions import Quadratic
from lightning_hrnn.tasks.registry import get_family
from lightning_hrnn.tasks.released import RELEASED

FLOOR = math.log(1e-12)


def weight_of(mean: float, deviation: float) -> float:
    error = math.sqrt(deviation**2 / SEEDS + SMALLEST_ERROR**2)
    return 1 / (1 + 0.5 * (mean / error) ** 2) / error


def gaps(mean: float, deviation: float) -> Tensor:
    return mean + deviation * torch.tensor([-1.0, 1.0, -1.0, 1.0])


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.1), (0.3, 0.1), (-2.0, 0.5), (1e-3, 0.0)])
def test_a_near_tie_weighs_most(mean: float, deviation: float) -> None:
    score, standing = torch.full((4,), -3.0), Standing()
    weight = standing.weight("a", score, {"adam": score - gaps(mean, deviation)}, FLOOR)
    assert weight == pytest.approx(weight_of(mean, deviation), rel=1e-3)
    assert weight <= weight_of(0.0, deviation) * 1.001
    both = Standing().weight("a", score, {"adam": score - gaps(mean, deviation), "sgd": score - gaps(5, 0.1)}, FLOOR)
    assert both == pytest.approx((weight + weight_of(5, 0.1)) / 2, rel=1e-3)


def test_configurations_are_told_apart_and_remembered() -> None:
    score, standing = torch.zeros(4), Standing()
    standing.weight("a", score, {"adam": score - gaps(1.0, 0.2)}, FLOOR)
    standing.weight("b", score, {"adam": score - gaps(3.0, 0.2)}, FLOOR)
    standing.weight("a", score, {"adam": score - gaps(2.0, 0.2)}, FLOOR)
    assert standing.known["a"]["adam"] == pytest.approx([MEMORY * 1 + (1 - MEMORY) * 2, 0.04], rel=1e-3)
    assert standing.known["b"]["adam"][0] == pytest.approx(3.0)
    again = Standing()
    again.load_state_dict(json.loads(json.dumps(standing.state_dict())))
    assert again.known == standing.known
    again.load_state_dict({})  # of a run before there were rivals
    assert again.known == {}


def test_a_rival_at_the_floor_weighs_little_and_a_run_far_off_is_no_outlier() -> None:
    floor = torch.full((4,), FLOOR)
    assert Standing().weight("a", floor, {"adam": floor}, FLOOR) == pytest.approx(LEVEL_WITH_FLOOR)
    behind = Standing().weight("a", floor + 3, {"adam": floor}, FLOOR)
    assert 0 < behind < LEVEL_WITH_FLOOR
    standing = Standing()
    standing.weight("a", torch.tensor([2.0, -20.0]), {"adam": torch.tensor([-25.0, -20.0])}, FLOOR)
    assert standing.known["a"]["adam"][0] == LARGEST_GAP / 2


def write_report(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text(json.dumps({"results": rows}))
    return str(path)


def row(configuration: str, adam: float, rmsprop: float, steps: int = 12) -> dict[str, object]:
    baselines = {"adam": {"lr": adam}, "rmsprop": {"lr": rmsprop}}
    return {"configuration": configuration, "steps": steps, "baselines": baselines}


def test_tuned_rivals_train_the_same_instances_at_their_rates(tmp_path: Path) -> None:
    known, unknown, other = Quadratic(3), Quadratic(4), Quadratic(5)
    rows = [row(describe(known), 1e-1, 1e-2), row(describe(known), 1e-3, 1e-2), row(describe(other), 1e-2, 1e-1)]
    rivals = TunedRivals(write_report(tmp_path / "report.json", rows))
    assert rivals.steps == 12
    batches = [TaskBatch.draw(family, count, 7) for family, count in ((other, 2), (unknown, 3), (known, 4))]
    found = rivals.losses(batches, {5, 11})
    assert found[1] == {}
    for batch, losses, rates in zip(batches[::2], found[::2], ((1e-2, 1e-1), (1e-2, 1e-2)), strict=True):
        for name, rate in zip(("adam", "rmsprop"), rates, strict=True):
            baseline, population = BASELINES[name], Population([batch])
            alone = train(baseline.rule, population, torch.full((batch.count,), rate), 12, {5, 11}, baseline.schedule)
            torch.testing.assert_close(losses[name], alone)  # whatever ran beside it
    assert rivals.losses(batches[1:2], {11}) == [{}]
    assert TunedRivals(str(tmp_path / "report.json"), ["rmsprop"]).losses(batches[:1], {11})[0].keys() == {"rmsprop"}


def test_reports_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match=r"There is no report .*: `lightning-hrnn evaluate .* --out DIR` leaves one"):
        TunedRivals(str(path))
    for text in ("no json", "[]", "{}", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no report of an evaluation"):
            TunedRivals(str(path))
    good = row("a", 1, 1)
    for results, why in (
        ([], "has no results"),
        ({}, "has no results"),
        (["gru"], "Result 0 of .* names no configuration"),
        ([{"task": "gru", "steps": 3}], "Result 0 of .* names no configuration, as those of a corpus do"),
        ([good, {**good, "configuration": ["a"]}], "Result 1 of .* names no configuration"),
        ([{**good, "steps": None}], "has None steps"),
        *(([{**good, "steps": steps}], f"has {steps} steps") for steps in (0, 1.5)),
        *(([{**good, "baselines": bad}], "has None as the tuned rate of 'adam'") for bad in (None, [], {"adam": 1})),
        ([{**good, "baselines": {"adam": {"lr": 1}}}], "has None as the tuned rate of 'rmsprop'"),
        *(
            ([row("a", rate, 1)], "as the tuned rate of 'adam'")
            for rate in (0, -1, math.nan, math.inf, None, "1", True)
        ),
    ):
        path.write_text(json.dumps({"results": results}))
        with pytest.raises(ValueError, match=why):
            TunedRivals(str(path))
    write_report(path, [row("a", 1, 1), row("b", 1, 1, steps=100)])
    with pytest.raises(ValueError, match=r"runs of \[12, 100\] steps: rivals are tuned for one length"):
        TunedRivals(str(path))
    for names in (["lion"], [], ["adam", "adam"]):
        with pytest.raises(ValueError, match="Rivals are some of"):
            TunedRivals(str(path), names)


def test_records_of_a_corpus_name_their_configuration() -> None:
    """By which `TunedRivals` knows it again, whatever draw it comes from."""
    outcome = Outcome(0.1, [1.0], [0.5], [1], [[0.5]], 1.0)
    names = ("hrnn", "hrnn_anytime", "default_adam", *BASELINES)
    record = judge(Setting("corpus", 12), "quadratic/1", dict.fromkeys(names, outcome))
    drawn = {describe(get_family("quadratic", random.Random(seed))) for seed in range(40)}
    assert record["configuration"] in drawn
    assert len(drawn) == 4
    every = [describe(family) for released in RELEASED.values() for family in released.families]
    assert len(set(every)) == len(every)
    assert not [words for words in every if "0x" in words]  # which is another in the next process
    assert "configuration" not in judge(Setting("nets", 12), "gru", dict.fromkeys(names, outcome))
