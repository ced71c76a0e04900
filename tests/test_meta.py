"""Meta-training: populations, unrolls, the meta-loss, the pool, and the MetaLearner in a Trainer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_hrnn.datamodule import TaskDataModule
from lightning_hrnn.evaluation.suites import LOSS_FLOOR, ValidationRun, validation_suite
from lightning_hrnn.export import WeightsExport
from lightning_hrnn.meta.estimators import PES, TruncatedBackprop, Window
from lightning_hrnn.meta.loss import LogRatio
from lightning_hrnn.meta.population import Population, Progress, TaskBatch, join
from lightning_hrnn.meta.truncation import Lives, TaskPool, TaskStream, schedule_of
from lightning_hrnn.meta.unroll import TAIL, Point, Schedule, Unrolled, begin, trailing, unroll
from lightning_hrnn.module import MetaLearner
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import load_pretrained, read_card
from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.corpus import get_corpus
from lightning_hrnn.tasks.registry import get_family

LOG_RATE = math.log(1e-2)


class Parabola(TaskFamily):
    """Two tensors, no noise: what a hand can check."""

    name = "parabola"

    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        options = {"generator": generator, "dtype": torch.get_default_dtype()}
        params = [torch.randn(count, 3, **options), torch.randn(count, 2, 2, **options)]
        return params, {"scale": 1 + torch.rand(count, **options)}

    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        return data["scale"] * (params[0].square().sum(1) + params[1].square().sum((1, 2)))


def make_population(seed: int = 0) -> Population:
    families = [Parabola(), get_family("mlp", random.Random(seed)), get_family("random-bowl", random.Random(seed))]
    return Population([TaskBatch.draw(family, 3, seed) for family in families])


def test_the_trailing_average_forgets_at_the_pace_of_age() -> None:
    values = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = values[0]
    for step, value in enumerate(values):
        average = trailing(average, value, torch.full((3,), step + 1.0, dtype=torch.float64))
    weights = torch.ones(50, dtype=torch.float64)
    for step in range(50):  # each step takes its share and leaves the rest to those before
        share = min(1.0, (TAIL + 1) / (TAIL + step + 1))
        weights[:step] *= 1 - share
        weights[step] = share
    assert weights.sum().item() == pytest.approx(1)
    assert 0.5 < weights[-6:].sum() < 0.8  # mostly the last ninth
    torch.testing.assert_close(average, weights @ values)


def test_losses_are_taken_at_the_point_asked_for() -> None:
    population, rule = make_population(), HierarchicalRNN()
    generators = [batch.generator.get_state() for batch in population.batches]

    def run(point: Point, steps: int) -> Unrolled:
        for batch, state in zip(population.batches, generators, strict=True):
            batch.generator.set_state(state)
        with torch.no_grad():
            return unroll(rule, population, begin(rule, population, LOG_RATE), steps, {3, steps - 1}, point=point)

    last, average, both = (run(point, 30) for point in get_args(Point))
    assert both.losses.shape == (4, 9)
    assert torch.equal(both.losses[::2], last.losses)
    assert torch.equal(both.losses[1::2], average.losses)
    assert torch.equal(last.losses[1], population.losses(last.progress.theta))
    assert torch.equal(average.losses[1], population.losses(average.progress.average))
    assert not torch.equal(last.losses, average.losses)
    average_of_one = run("average", 1).progress
    assert torch.equal(average_of_one.average, average_of_one.theta)


def test_a_schedule_multiplies_every_update() -> None:
    population, rule = Population([TaskBatch.draw(Parabola(), 3, 0)]), HierarchicalRNN()

    def theta(schedule: Schedule, steps: int = 1) -> Tensor:
        with torch.no_grad():
            start = begin(rule, population, LOG_RATE)
            return unroll(rule, population, start, steps, set(), schedule=schedule).progress.theta

    start, whole = population.initial_params(), theta(lambda step: 1.0)
    torch.testing.assert_close(theta(lambda step: 0.5) - start, (whole - start) / 2)
    assert torch.equal(theta(lambda step: 0.0, steps=3), start)
    assert torch.equal(theta(lambda step: float(step == 0), steps=3), whole)
    each = torch.arange(float(len(start)))
    torch.testing.assert_close(theta(lambda step: each) - start, (whole - start) * each)


def test_population_lays_tasks_end_to_end() -> None:
    population = make_population()
    theta = population.initial_params()
    layout = population.layout
    assert len(layout.tensor_of) == len(theta) == sum(batch.size for batch in population.batches)
    assert len(layout.tensors_in) == 9
    assert layout.tensors_in[:3].tolist() == [2, 2, 2]
    for batch, params in zip(population.batches, population.views(theta), strict=True):
        for ours, theirs in zip(batch.params, params, strict=True):
            assert torch.equal(ours, theirs)
    parts = population.by_batch(population.losses(theta))
    for batch, losses in zip(population.batches, parts, strict=True):
        torch.testing.assert_close(losses, batch.family.loss(batch.params, batch.data))


def test_gradient_is_each_tasks_own() -> None:
    population = Population([TaskBatch.draw(Parabola(), 2, 0), TaskBatch.draw(Parabola(), 2, 1)])
    theta = population.initial_params()
    scale = torch.cat([batch.data["scale"] for batch in population.batches])
    expected = 2 * theta * population.layout.to_params(population.layout.to_tensors(scale))
    torch.testing.assert_close(population.gradient(theta), expected)


def test_split_and_join_are_inverse() -> None:
    for preset in ("default", "paper"):
        rule = HierarchicalRNN(RuleConfig.preset(preset, readouts=("direction", "attention")))
        population = make_population()
        progress = unroll(rule, population, begin(rule, population, LOG_RATE), 2, set()).progress.detach()
        again = join(population.split(progress))
        assert torch.equal(progress.theta, again.theta)
        assert torch.equal(progress.lookahead, again.lookahead)
        assert all(torch.equal(a, b) for a, b in zip(progress.state, again.state, strict=True))


@pytest.mark.parametrize("readouts", [("direction",), ("direction", "attention")])
def test_inner_training_is_what_the_optimizer_does(readouts: tuple[str, ...]) -> None:
    rule = HierarchicalRNN(RuleConfig(readouts=readouts))
    tasks = TaskBatch.draw(Parabola(), 1, 0)
    population = Population([tasks])
    with torch.no_grad():
        result = unroll(rule, population, begin(rule, population, LOG_RATE), 10, {9})
    params = [torch.nn.Parameter(value[0].clone()) for value in tasks.params]
    optimizer = HRNN(params, weights=rule, initial_rate=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        with optimizer.attend():
            tasks.family.loss([param[None] for param in params], tasks.data).sum().backward()
        optimizer.step()
    ours = torch.cat([param.detach().reshape(-1) for param in params])
    torch.testing.assert_close(ours, result.progress.theta, rtol=1e-4, atol=1e-6)


def window_loss(rule: HierarchicalRNN, population: Population, second_order: bool) -> Tensor:
    result = unroll(rule, population, begin(rule, population, LOG_RATE), 6, {2, 5}, second_order=second_order)
    return LogRatio()(result.losses, population.losses(population.initial_params())).mean()


def test_second_order_meta_gradient_matches_finite_differences(double_precision: None) -> None:
    rule = HierarchicalRNN(RuleConfig(readouts=("direction", "attention")))
    population = Population([TaskBatch.draw(Parabola(), 2, 0)])
    with torch.no_grad():
        for value in rule.rate.parameters():
            value += 0.1 * torch.randn_like(value)
    window_loss(rule, population, second_order=True).backward()
    direction = [torch.randn_like(value) for value in rule.parameters()]
    slope = sum(float((value.grad * d).sum()) for value, d in zip(rule.parameters(), direction, strict=True))
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            for value, d in zip(rule.parameters(), direction, strict=True):
                value += sign * 1e-5 * d
            shifted.append(float(window_loss(rule, population, second_order=True)))
            for value, d in zip(rule.parameters(), direction, strict=True):
                value -= sign * 1e-5 * d
    assert slope == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-4)


def test_first_order_takes_gradients_as_constants(double_precision: None) -> None:
    rule = HierarchicalRNN()
    population = Population([TaskBatch.draw(Parabola(), 2, 0)])
    grads = []
    for second_order in (False, True):
        rule.zero_grad()
        window_loss(rule, population, second_order).backward()
        grads.append(torch.cat([value.grad.reshape(-1) for value in rule.parameters()]))
    assert not torch.allclose(grads[0], grads[1])
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.5


def pes_pool(rule: HierarchicalRNN, places: int = 4) -> TaskPool:
    pool = TaskPool(places, Lives(1000, 1000, 1000, 1), rates=(1e-2, 1e-2))
    pool.refill(TaskStream(Parabola(), 2, 0), rule, 0, "cpu")
    return pool


def estimate_of(rule: HierarchicalRNN, estimator: Any, pool: TaskPool, index: int) -> tuple[Tensor, float]:
    rule.zero_grad()
    result = estimator(rule, pool, Window(4, {1, 3}, LogRatio(), index=index))
    result.surrogate.backward()
    return torch.cat([value.grad.reshape(-1) for value in rule.parameters()]), float(result.surrogate.detach())


def test_pes_agrees_with_second_order_backprop_on_average(double_precision: None) -> None:
    rule = HierarchicalRNN(RuleConfig(param_hidden=2, tensor_hidden=2, global_hidden=2, timescales=2))
    expected, value = estimate_of(rule, TruncatedBackprop(second_order=True), pes_pool(rule, 1), 0)
    drawn, values = zip(
        *(estimate_of(rule, PES(sigma=1e-3, pairs=1), pes_pool(rule, 1), index) for index in range(600)), strict=True
    )
    mean = torch.stack(drawn).mean(0)
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.8
    assert sum(values) / len(values) == pytest.approx(value, rel=1e-3)


def test_pes_credits_late_losses_to_early_perturbations() -> None:
    rule = HierarchicalRNN()
    pool, pes = pes_pool(rule, places=2), PES(sigma=0.01, pairs=2)
    noises = []
    for index in range(3):
        estimate_of(rule, pes, pool, index)
        noises.append([twin["noise"] for twin in pes.state_dict()["twins"]])
    assert [place.age for place in pool] == [12, 12]
    spread = [torch.stack(noise).std() / 0.01 for noise in noises]  # sums of n draws spread like the root of n
    assert [float(value) for value in spread] == pytest.approx([1, math.sqrt(2), math.sqrt(3)], rel=0.05)
    pool.places[0].age = 1000
    pool.refill(TaskStream(Parabola(), 2, 9), rule, 0, "cpu")
    estimate_of(rule, pes, pool, 3)
    youngest = next(t["noise"] for t in pes.state_dict()["twins"] if t["seed"] == pool.places[1].seed)
    assert float(youngest.std() / 0.01) == pytest.approx(1, rel=0.05)


def test_pes_comes_back_as_it_was() -> None:
    rule = HierarchicalRNN()
    pool, pes = pes_pool(rule), PES(sigma=0.01, pairs=2)
    estimate_of(rule, pes, pool, 0)
    twin_pool, twin = TaskPool(4, pool.lives, pool.rates), PES(sigma=0.01, pairs=2)
    twin_pool.load_state_dict(pool.state_dict(), TaskStream(Parabola(), 2, 0), "cpu")
    twin.load_state_dict(pes.state_dict())
    ours, theirs = (estimate_of(rule, each, tasks, 1)[0] for each, tasks in ((pes, pool), (twin, twin_pool)))
    assert torch.equal(ours, theirs)


def test_pes_trains_in_a_trainer(tmp_path: Path) -> None:
    learner = make_learner(estimator=PES(sigma=0.02, pairs=2))
    start = [value.detach().clone() for value in learner.rule.parameters()]
    make_trainer(tmp_path, 3, limit_val_batches=0, enable_checkpointing=False).fit(
        learner, TaskDataModule("quick", instances=2, epoch_steps=3)
    )
    assert learner.skipped_meta_steps == 0
    assert not all(torch.equal(a, b) for a, b in zip(start, learner.rule.parameters(), strict=True))
    with pytest.raises(ValueError, match="sigma must be positive"):
        PES(sigma=0.0)


class TestLogRatio:
    def test_counts_on_a_log_scale_down_to_the_floor(self) -> None:
        loss = LogRatio(floor=1e-6)
        initial = torch.tensor([1.0, 50.0])
        torch.testing.assert_close(loss(0.01 * initial, initial), torch.full((2,), math.log(0.01)), rtol=1e-3, atol=0)
        assert float(loss(torch.zeros(1), torch.ones(1))) == pytest.approx(math.log(1e-6), rel=1e-3)

    def test_divergence_costs_but_does_not_own_the_update(self) -> None:
        loss = LogRatio(cap=2.0)
        losses = torch.tensor([math.exp(1.0), math.exp(12.0), 1e30, math.inf, math.nan], requires_grad=True)
        scores = loss(losses, torch.ones(5))
        torch.testing.assert_close(scores, torch.tensor([1.0, 3.0, 4.0, 4.0, 4.0]), rtol=1e-3, atol=1e-3)
        scores.sum().backward()
        assert losses.grad.isfinite().all()
        assert losses.grad[:2].gt(0).all()
        assert loss.diverged(scores.detach()).tolist() == [False, True, True, True, True]

    def test_refuses_negative_losses_and_settings(self) -> None:
        with pytest.raises(ValueError, match="loss is negative"):
            LogRatio()(torch.tensor([-1.0]), torch.ones(1))
        with pytest.raises(ValueError, match="must be positive"):
            LogRatio(floor=0.0)


class TestPool:
    def test_streams_of_ranks_share_no_task_and_repeat_by_seed(self) -> None:
        corpus = get_corpus("quick")
        seeds = [[TaskStream(corpus, 2, 0, rank, 3).next_seed() for _ in range(1)] for rank in range(3)]
        assert len({seed for rank in seeds for seed in rank}) == 3
        one, two = TaskStream(corpus, 2, 7), TaskStream(corpus, 2, 7)
        a, b = (stream.draw(stream.next_seed()) for stream in (one, two))
        assert a.family.name == b.family.name
        assert all(torch.equal(x, y) for x, y in zip(a.params, b.params, strict=True))

    def test_a_family_with_negative_losses_is_named(self) -> None:
        class Shifted(Parabola):
            name = "shifted"

            def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
                return super().loss(params, data, generator) - 1e6

        pool = TaskPool(1, Lives(20, 20, 20), rates=(1e-3, 1e-2))
        with pytest.raises(ValueError, match=r"'shifted' is negative.*shift the loss"):
            pool.refill(TaskStream(Shifted(), 2, 0), HierarchicalRNN(), 0, "cpu")

    def test_instances_that_begin_at_no_finite_loss_are_left_out(self) -> None:
        class Sometimes(Parabola):
            name = "sometimes"
            share = 0.3

            def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
                losses = super().loss(params, data, generator)
                first = params[0].flatten(1)[:, 0]
                return torch.where((1e4 * first).frac().abs() < self.share, losses * math.inf, losses)

        class Always(Sometimes):
            name = "always"
            share = 1.0

        rule, pool = HierarchicalRNN(), TaskPool(8, Lives(20, 20, 20), rates=(1e-3, 1e-2))
        with pytest.warns(UserWarning, match="'sometimes' is left out: some of its instances begin"):
            pool.refill(TaskStream(Sometimes(), 2, 0), rule, 0, "cpu")
        assert len(pool.places) == 8
        assert pool.initial_losses().isfinite().all()
        with (
            pytest.raises(ValueError, match=r"20 draws in a row .* the last of the family 'always'"),
            pytest.warns(UserWarning, match="'always'"),
        ):
            TaskPool(1, Lives(20, 20, 20), rates=(1e-3, 1e-2)).refill(TaskStream(Always(), 2, 0), rule, 0, "cpu")

    def test_lives_grow_and_stay_in_range(self) -> None:
        lives = Lives(shortest=10, first_longest=100, longest=1000, growth_steps=100)
        assert lives.upper(0) == pytest.approx(100)
        assert lives.upper(50) == pytest.approx(math.sqrt(1e5))
        assert lives.upper(10**6) == pytest.approx(1000)
        drawn = [lives.draw(random.Random(i), 0) for i in range(200)]
        assert 10 <= min(drawn) < 20
        assert 80 < max(drawn) <= 100
        with pytest.raises(ValueError, match="shortest <= first_longest"):
            Lives(shortest=10, first_longest=5)

    def test_tasks_age_and_make_room(self) -> None:
        rule, stream = HierarchicalRNN(), TaskStream(Parabola(), 2, 0)
        pool = TaskPool(3, Lives(20, 40, 40, 1), rates=(1e-3, 1e-2))
        seeds = set()
        for _ in range(6):
            pool.refill(stream, rule, 0, "cpu")
            assert all(place.age < place.life for place in pool)
            seeds |= {place.seed for place in pool}
            population = pool.population()
            pool.advance(population, unroll(rule, population, pool.start(rule), 10, set()).progress, 10)
        assert len(seeds) > 3
        assert not any(value.requires_grad for place in pool for value in place.progress.state)

    def test_some_tasks_cool_down_over_the_last_half_of_their_lives(self) -> None:
        rule, stream = HierarchicalRNN(), TaskStream(get_corpus("quick"), 2, 0)

        def pool(cooling: float) -> TaskPool:
            made = TaskPool(40, Lives(40, 40, 40), (1e-4, 1e-3), cooling)
            made.refill(stream, rule, 0, "cpu")
            return made

        assert not any(place.cools for place in pool(0))
        assert all(place.cools for place in pool(1))
        assert 10 < sum(place.cools for place in pool(0.5)) < 30
        mixed = pool(0.5)
        for place, part in zip(mixed, mixed.population().split(mixed.start(rule)), strict=True):
            assert set(part.state.run_length.tolist()) == {40.0 if place.cools else 0.0}
        warm, cool = pool(0).places[0], pool(1).places[0]
        for place in (warm, cool):
            place.age = 10
        population = Population([warm.tasks, cool.tasks])
        schedule = schedule_of([warm, cool], population)
        assert schedule(0) == schedule(10) == 1.0
        later = schedule(20)  # ten steps before the end of a life of 40
        assert isinstance(later, Tensor)
        first, second = (block.unique().tolist() for block in later.split([warm.tasks.size, cool.tasks.size]))
        assert (first, second) == ([1.0], [0.5])
        assert 0 < schedule_of([cool], Population([cool.tasks]))(35).max() < 0.1  # a window may outlive a task
        with pytest.raises(ValueError, match="cooling is a share of the tasks"):
            pool(1.5)

    def test_a_pool_comes_back_as_it_was(self) -> None:
        rule, stream = HierarchicalRNN(), TaskStream(get_corpus("quick"), 2, 0)
        pool, twin = (TaskPool(3, Lives(20, 40, 40, 1), rates=(1e-3, 1e-2)) for _ in range(2))
        pool.refill(stream, rule, 0, "cpu")
        population = pool.population()
        pool.advance(population, unroll(rule, population, pool.start(rule), 5, set()).progress, 5)
        twin.load_state_dict(pool.state_dict(), TaskStream(get_corpus("quick"), 2, 0), "cpu")
        thetas = []
        for each in (pool, twin):
            population = each.population()
            with torch.no_grad():
                thetas.append(unroll(rule, population, each.start(rule), 5, set()).progress.theta)
        assert torch.equal(*thetas)

    def test_a_task_that_blew_up_is_replaced(self) -> None:
        rule, stream = HierarchicalRNN(), TaskStream(Parabola(), 2, 0)
        pool = TaskPool(2, Lives(100, 100, 100, 1), rates=(1e-3, 1e-2))
        pool.refill(stream, rule, 0, "cpu")
        lost = pool.places[0].seed
        pool.places[0].progress.theta[1] = math.inf
        pool.refill(stream, rule, 0, "cpu")
        assert lost not in {place.seed for place in pool}
        assert len(pool.places) == 2


def make_trainer(path: Path, max_steps: int, **options: Any) -> Trainer:
    return Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        gradient_clip_val=0.1,
        logger=CSVLogger(path / "logs", flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **options},
    )


def make_learner(**options: Any) -> MetaLearner:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "places": 3,
        "window": 10,
        "scored_steps": 3,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "lives": Lives(20, 60, 60, 1),
        "rates": (1e-3, 1e-2),
        **options,
    }
    return MetaLearner(**settings)


def test_the_meta_loss_falls(tmp_path: Path) -> None:
    def first_and_last(steps: int) -> float:
        trainer = make_trainer(tmp_path / str(steps), steps, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(make_learner(window=20, lives=Lives(20, 20, 20, 1)), TaskDataModule("quick", family=Parabola()))
        rows = (tmp_path / str(steps) / "logs").rglob("metrics.csv")
        table = [line.split(",") for line in next(rows).read_text().splitlines()]
        column = table[0].index("meta_loss")
        values = [float(row[column]) for row in table[1:] if row[column]]
        assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 0.1
        return values[-1]

    assert first_and_last(60) < 0


class Kill(Callback):
    """Stop a run in the middle."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = {"instances": 2, "epoch_steps": 4, "validation": ["wide-mlp"], "validation_steps": 4}
    whole = make_learner()
    make_trainer(tmp_path / "whole", 8, limit_val_batches=0, enable_checkpointing=False).fit(
        whole, TaskDataModule("quick", **data)
    )
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=4)
    killed = make_trainer(tmp_path / "part", 8, limit_val_batches=0, callbacks=[checkpoint, Kill(at=5)])
    with pytest.raises(RuntimeError, match="killed"):
        killed.fit(make_learner(), TaskDataModule("quick", **data))
    resumed = make_learner()
    make_trainer(tmp_path / "part", 8, limit_val_batches=0, enable_checkpointing=False).fit(
        resumed, TaskDataModule("quick", **data), ckpt_path=str(tmp_path / "kept" / "last.ckpt")
    )
    stored = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=False)
    assert [place["age"] for place in stored["task_pool"]["places"]]
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_run_goes_on_with_the_tasks_it_had(tmp_path: Path) -> None:
    """Another corpus, a damaged pool or meta-parameters that are not finite are refused before anything is done."""
    data = {"instances": 2, "validation": ["wide-mlp"]}
    module = TaskDataModule("quick", **data)
    learner = make_learner(places=4)
    trainer = make_trainer(tmp_path, 2, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(learner, module)
    kept = module.state_dict()
    assert {"corpus", "corpus_version", "seed", "instances"} < kept.keys()
    for change, said in (({"corpus": "extended"}, "'corpus': 'quick'"), ({"seed": 5}, "'seed': 0"), ({}, None)):
        other = TaskDataModule(**{"corpus": "quick", **data, **change})
        if said is None:
            other.load_state_dict(kept)
            assert other.state_dict() == kept
        else:
            with pytest.raises(ValueError, match=f"drew its tasks with .*{said}.*start anew"):
                other.load_state_dict(kept)
    TaskDataModule("quick", **data).load_state_dict({"drawn": 3})  # of an earlier version
    saved = {"state_dict": learner.state_dict()}
    learner.on_save_checkpoint(saved)
    fewer = TaskPool(2, learner.pool.lives, (1e-4, 1e-3))
    stream = TaskStream(module.source, 2, 0)
    fewer.load_state_dict(saved["task_pool"], stream, "cpu")
    assert len(fewer.places) == 2
    for pool in ({}, {"places": [1]}, {"places": [{"seed": 1}]}):
        with pytest.raises(ValueError, match="The tasks in flight of the checkpoint are damaged"):
            fewer.load_state_dict(pool, stream, "cpu")
    with pytest.raises(ValueError, match="another corpus, or its families have changed"):
        fewer.load_state_dict(saved["task_pool"], TaskStream(module.source, 3, 0), "cpu")
    next(iter(saved["state_dict"].values())).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="has meta-parameters that are not finite"):
        learner.on_load_checkpoint(saved)


def test_the_best_weights_are_exported_with_a_card(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    export = WeightsExport(str(path), notes={"by": "a test"})
    by_ends = WeightsExport(str(tmp_path / "by_ends.safetensors"), monitor="val/final")
    data = TaskDataModule("quick", instances=2, epoch_steps=3, seed=5, validation=["wide-mlp"], validation_steps=20)
    learner = make_learner()
    make_trainer(tmp_path, 6, callbacks=[export, by_ends], enable_checkpointing=False).fit(learner, data)
    rule = load_pretrained(path)
    assert load_pretrained(by_ends.path).card["val/final"] == pytest.approx(by_ends.best, abs=1e-3)
    assert by_ends.best != export.best
    assert rule.card["corpus"] == "quick"
    assert rule.card["seed"] == 5
    assert rule.card["by"] == "a test"
    assert rule.card["val/regret"] == pytest.approx(export.best, abs=1e-3)
    (row,) = rule.card["evaluation"]
    assert row["net"] == "wide-mlp"
    assert len(row["steps"]) == len(row["hrnn"]) == len(row["tuned_adam"])
    assert HRNN([torch.nn.Parameter(torch.ones(2))], weights=path).uses_attention is False
    started = make_learner(weights=str(path))
    assert torch.equal(started.rule.decay_bias, rule.decay_bias)
    changed = make_learner(weights=str(path), rule_changes={"drift_rise": 3.0})
    assert (changed.rule.config.drift_rise, rule.config.drift_rise) == (3.0, 2.0)
    assert torch.equal(changed.rule.decay_bias, rule.decay_bias)
    assert started.initial_rate == rule.card["initial_rate"]
    started.export(tmp_path / "again.safetensors")
    again = load_pretrained(tmp_path / "again.safetensors").card
    assert (again["meta_steps"], again["corpus"], again["name"]) == (rule.card["meta_steps"], "quick", "again")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_weights_of_another_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    data = {"instances": 2, "epoch_steps": 2, "validation": ["wide-mlp"], "validation_steps": 8}

    def run(steps: int, checkpoint: Path | None = None, **how: Any) -> WeightsExport:
        export = WeightsExport(str(path), keep_all=True)
        # as in the recipes: written after the steps that are validated, but before they are
        saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, enable_version_counter=False)
        trainer = make_trainer(tmp_path, steps, callbacks=[export, saving], **how)
        trainer.fit(make_learner(), TaskDataModule("quick", **data), ckpt_path=checkpoint)
        return export

    run(4)
    first, names = path.read_bytes(), {file.name for file in tmp_path.glob("*.safetensors")}
    assert names == {"weights.safetensors", "step_2.safetensors", "step_4.safetensors"}
    validating = make_trainer(tmp_path, 1, callbacks=[WeightsExport(str(path))], enable_checkpointing=False)
    validating.validate(make_learner(), TaskDataModule("quick", **data))
    run(1, fast_dev_run=1)
    assert path.read_bytes() == first  # neither is a run whose weights are worth keeping
    once = run(2)
    kept = {f"{Path(name).stem}-before-1.safetensors" for name in names}
    assert {file.name for file in tmp_path.glob("*.safetensors")} == kept | {
        "weights.safetensors",
        "step_2.safetensors",
    }
    assert (tmp_path / "weights-before-1.safetensors").read_bytes() == first
    card = read_card(path)
    card["val/regret"] = -99.0  # a validation that no later one will better, and that last.ckpt does not know
    path.with_suffix(".json").write_text(json.dumps(card))
    again = run(4, tmp_path / "last.ckpt")
    assert again.run == once.run
    assert again.best == read_card(path)["val/regret"] == -99.0
    assert {file.name for file in tmp_path.glob("*.safetensors")} == kept | names


def test_what_was_looked_at_is_handed_on(tmp_path: Path) -> None:
    looked_at = load_pretrained("hrnn-v10").card["looked_at"]
    learner = MetaLearner(weights="hrnn-v10", places=1, window=5, scored_steps=2, lives=Lives(10, 10, 10, 1))
    make_trainer(tmp_path, 1, enable_checkpointing=False).fit(learner, TaskDataModule("quick", instances=2))
    path = learner.export(tmp_path / "tuned.safetensors", {"looked_at": {"nets": ["lstm"], "vision": ["digits-conv"]}})
    assert read_card(path)["looked_at"] == {"nets": [*looked_at["nets"], "lstm"], "vision": ["digits-conv"]}
    with pytest.raises(ValueError, match=r"looked_at lists names of tasks for each suite, .* not \['gru'\]"):
        WeightsExport("a.safetensors", notes={"looked_at": ["gru"]}).setup(make_trainer(tmp_path, 1), learner, "fit")


def test_many_dropped_meta_steps_in_a_row_are_told(tmp_path: Path) -> None:
    class Hopeless(MetaLearner):
        def on_after_backward(self) -> None:
            next(self.rule.parameters()).grad = torch.full_like(next(self.rule.parameters()), math.nan)

    learner = Hopeless(places=1, window=2, scored_steps=1, lives=Lives(10, 10, 10, 1))
    data = TaskDataModule("quick", family=Parabola(), instances=2)
    trainer = make_trainer(tmp_path, 12, limit_val_batches=0, enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"10 meta-steps in a row were dropped.* tasks of \['parabola'\]"):
        trainer.fit(learner, data)
    assert learner.skipped_meta_steps == 12


def test_fine_tuning_keeps_the_first_rate_and_the_horizon_of_its_weights(tmp_path: Path) -> None:
    learner = MetaLearner(weights="hrnn-v4", places=1, window=5, scored_steps=2, lives=Lives(10, 10, 10, 1))
    make_trainer(tmp_path, 1, enable_checkpointing=False).fit(learner, TaskDataModule("quick", instances=2))
    card = load_pretrained(learner.export(tmp_path / "tuned.safetensors")).card
    before = load_pretrained("hrnn-v4").card
    assert (card["initial_rate"], card["horizon"]) == (before["initial_rate"], before["horizon"])
    assert card["meta_steps"] == 1
    chosen = MetaLearner(weights="hrnn-v4", initial_rate=3e-4)
    assert (chosen.initial_rate, MetaLearner().initial_rate) == (3e-4, 1e-3)


def test_shipped_weights_specialise_to_a_family_of_ones_own(tmp_path: Path) -> None:
    """Forty meta-steps on parabolas, and fresh ones end at less than half of the loss."""
    learner = MetaLearner(
        weights="hrnn-v4",
        places=2,
        window=20,
        scored_steps=4,
        lives=Lives(20, 20, 20, 1),
        learning_rate=3e-3,
        warmup_steps=5,
        averaging=0.9,
        loss=LogRatio(1e-6),
    )
    population = Population([TaskBatch.draw(Parabola(), 20, 99)])

    def final(rule: HierarchicalRNN) -> float:
        with torch.no_grad():
            start = begin(rule, population, math.log(learner.initial_rate))
            losses = unroll(rule, population, start, 20, {19}).losses
        return losses.log().mean().item()

    before = final(learner.rule)
    tasks = TaskDataModule(family=Parabola(), instances=8)
    make_trainer(tmp_path, 40, limit_val_batches=0, enable_checkpointing=False).fit(learner, tasks)
    tuned = load_pretrained(learner.export(tmp_path / "tuned.safetensors"))
    assert tuned.card["started_from"] == "hrnn-v4"
    assert final(tuned) < before - math.log(2)


def test_meta_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    class Broken(MetaLearner):
        def on_after_backward(self) -> None:
            if self.global_step == 0 and self.skipped_meta_steps < 2:
                self.rule.decay_bias.grad[0] = math.nan

    torch.manual_seed(0)
    learner = Broken(places=1, window=5, scored_steps=2, lives=Lives(10, 10, 10, 1))
    before = learner.rule.decay_bias.detach().clone()
    make_trainer(tmp_path, 4, limit_val_batches=0, enable_checkpointing=False).fit(
        learner, TaskDataModule(family=Parabola(), instances=2)
    )
    assert learner.skipped_meta_steps >= 1
    assert all(value.isfinite().all() for value in learner.rule.parameters())
    assert not torch.equal(before, learner.rule.decay_bias)


def test_validation_compares_with_tuned_adam_past_the_horizon() -> None:
    outcome = ValidationRun("wide-mlp", 60).run(load_pretrained(), initial_rate=1e-3)
    assert outcome.losses.shape == outcome.baseline.shape
    floor = LOSS_FLOOR * math.log(10)  # about: the first loss of ten classes
    expected = ((outcome.losses + floor) / (outcome.baseline + floor)).log()
    assert outcome.regret == pytest.approx(float(expected.mean()), rel=0.02)
    assert outcome.final == pytest.approx(float(expected[-1].mean()), rel=0.02)
    assert outcome.baseline[-1].mean() < outcome.baseline[0].mean()


def test_progress_stored_before_rules_knew_the_length_or_the_trend_is_restored() -> None:
    population = Population([TaskBatch.draw(Parabola(), 2, 0)])
    progress = begin(HierarchicalRNN(), population, LOG_RATE, 50.0)
    stored = progress.state_dict()
    assert set(Progress.from_state_dict(stored).state.run_length.tolist()) == {50.0}
    stored["state"].pop()
    assert Progress.from_state_dict(stored).state.gradient_size.tolist() == [[0.0] * 4] * 3
    stored["state"].pop()
    assert set(Progress.from_state_dict(stored).state.run_length.tolist()) == {0.0}


def test_validation_tells_the_length_of_its_runs() -> None:
    rule = HierarchicalRNN(RuleConfig(drift_inputs=("tensor", "length")))
    plain = ValidationRun("wide-mlp", 60).run(rule, initial_rate=1e-3)
    with torch.no_grad():
        rule.rate.drift[-2] = 5.0  # rates rise where the length is known
    told = ValidationRun("wide-mlp", 60).run(rule, initial_rate=1e-3)
    assert told.losses[-1].mean() < 0.9 * plain.losses[-1].mean()


class RecordEvaluation(Callback):
    """Write down what each rank validated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: MetaLearner) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        torch.save(metrics, self.folder / f"rank{trainer.global_rank}.pt")
        pl_module.export(self.folder / f"rank{trainer.global_rank}.safetensors")


def test_a_metric_that_nobody_logs_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    export = WeightsExport(str(tmp_path / "weights.safetensors"), monitor="val/regrets")
    data = TaskDataModule("quick", instances=2, validation=["wide-mlp"], validation_steps=8)
    learner = make_learner()
    trainer = make_trainer(tmp_path, 6, callbacks=[export], enable_checkpointing=False, num_sanity_val_steps=1)
    with pytest.raises(ValueError, match=r"No metric 'val/regrets' .*'val/final', 'val/regret'"):
        trainer.fit(learner, data)
    assert trainer.global_step == 0


def test_every_process_validates_every_network(tmp_path: Path) -> None:
    data = TaskDataModule("quick", validation=["wide-mlp", "transformer"], validation_steps=8)
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False}
    make_trainer(tmp_path, 1, callbacks=[RecordEvaluation(tmp_path)], **options).validate(make_learner(), data)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one == pytest.approx(two)
    rows = load_pretrained(tmp_path / "rank1.safetensors").card["evaluation"]
    assert {row["net"]: row["regret"] for row in rows} == {
        name: pytest.approx(one[f"val/{name}"], abs=1e-3) for name in ("wide-mlp", "transformer")
    }
    assert rows[0]["regret"] != rows[1]["regret"]
    assert all(len(row["hrnn"]) == len(row["steps"]) for row in rows)  # of runs as short as this


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="scored_steps must be between 1 and window=10"):
        make_learner(scored_steps=11)
    with pytest.raises(ValueError, match=r"averaging must be in \[0, 1\)"):
        make_learner(averaging=1.0)
    with pytest.raises(ValueError, match="Unknown engine 'gpu9'"):
        make_learner(engine="gpu9")
    with pytest.raises(ValueError, match="First rates need"):
        make_learner(rates=(1.0, 0.1))
    with pytest.raises(ValueError, match="both finite"):
        make_learner(rates=(1e-3, math.inf))
    with pytest.raises(ValueError, match="leave out preset='paper', or weights='hrnn-v10'"):
        make_learner(preset="paper", weights="hrnn-v10")
    with pytest.raises(ValueError, match=r"rule_changes \['tensor_hidden'\] need other meta-parameters"):
        make_learner(weights="hrnn-v0", rule_changes={"tensor_hidden": 30})
    with pytest.raises(ValueError, match=r"no fields \['tensor_size'\]: it has .*'tensor_hidden'"):
        make_learner(weights="hrnn-v0", rule_changes={"tensor_size": 30})
    for wrong in ({"initial_rate": 0.0}, {"initial_rate": math.inf}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive and finite"):
            make_learner(**wrong)
    for wrong in ({"threads": 0}, {"warmup_steps": -2}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            make_learner(**wrong)
    with pytest.raises(ValueError, match=r"scored_point must be one of \['last', 'average', 'both'\]"):
        make_learner(scored_point="first")
    with pytest.raises(ValueError, match="at least one place"):
        make_learner(places=0)
    with pytest.raises(ValueError, match=r"unknown corpus 'big'; known: .*quick"):
        TaskDataModule("big")
    with pytest.raises(ValueError, match="instances must be at least 1"):
        TaskDataModule("quick", instances=0)
    with pytest.raises(ValueError, match="Unknown validation tasks"):
        validation_suite(["resnet"])
    with pytest.raises(ValueError, match=r"exported as \.safetensors"):
        WeightsExport("a.pt").setup(None, make_learner(), "fit")  # type: ignore[arg-type]


def test_attention_begins_as_the_direction_of_weights_without_it():
    rule = make_learner(weights="hrnn-v0", rule_changes={"readouts": ["direction", "attention"]}).rule
    direction, attention = (rule.directions[name].state_dict() for name in rule.config.readouts)
    assert all(torch.equal(value, direction[key]) for key, value in attention.items())
    assert torch.equal(direction["weight"], load_pretrained("hrnn-v0").directions["direction"].weight)
    assert rule.reach.item() == 1.0


class RecordSeeds(Callback):
    """Write down which tasks each rank met, and what it learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: MetaLearner) -> None:
        torch.save(
            {
                "seeds": [place.seed for place in pl_module.pool],
                "rule": [value.detach().clone() for value in pl_module.rule.parameters()],
                "average": [value.detach().clone() for value in pl_module.averaged_rule.parameters()],
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def test_two_processes_meet_different_tasks_and_learn_one_rule(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        3,
        strategy="ddp_fork",
        devices=2,
        limit_val_batches=0,
        enable_checkpointing=False,
        callbacks=[RecordSeeds(tmp_path)],
    )
    trainer.fit(make_learner(), TaskDataModule("quick", instances=2, epoch_steps=10))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert not set(one["seeds"]) & set(two["seeds"])
    for key in ("rule", "average"):
        assert all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True))
    start = make_learner().rule.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(one["rule"], start, strict=True))
