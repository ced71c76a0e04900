"""`Evolution`: evolution strategies over whole runs."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from lightning_hrnn.datamodule import TaskDataModule
from lightning_hrnn.meta.estimators import TruncatedBackprop, Window
from lightning_hrnn.meta.evolution import (
    EXPLORED,
    LARGEST_WEIGHTED,
    LAST_STEPS,
    UNRIVALLED,
    Evolution,
    perturbed,
)
from lightning_hrnn.meta.exploration import Exploration
from lightning_hrnn.meta.kernels.param_levels import OwnParamLevels
from lightning_hrnn.meta.loss import LogRatio
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.meta.rivals import Rivals
from lightning_hrnn.meta.truncation import FEWEST, Lives, TaskPool, TaskStream
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.module import MetaLearner
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import build
from lightning_hrnn.optimizer.kernels.cpp import packed, param_level_parts
from lightning_hrnn.optimizer.pretrained import save_pretrained
from lightning_hrnn.tasks.base import describe
from lightning_hrnn.tasks.registry import get_family

STEPS = 12
SMALL = RuleConfig(
    param_hidden=2,
    tensor_hidden=2,
    global_hidden=2,
    timescales=2,
    drift_inputs=("tensor", "means", "global", "peak"),
    first_inputs=("size", "model_count"),
    slows=True,
    readouts=("direction", "attention"),
)
PLAIN = replace(  # backprop takes sizes of gradients and parameters as constants; evolution sees what comes of them
    SMALL, drift_inputs=SMALL.drift_inputs[:3], first_inputs=(), slows=False
)
EVOLVING = {"rate.drift", "rate.drift_bias", "rate.first", "rate.slowing", "reach"}


def make_rule(config: RuleConfig = SMALL) -> HierarchicalRNN:
    torch.manual_seed(0)
    rule = HierarchicalRNN(config)
    with torch.no_grad():
        rule.rate.drift.normal_(0, 0.3)
        for value in rule.evolving[2:]:
            value.fill_(0.2)
    return rule


def make_pool(rule: HierarchicalRNN, instances: int, places: int = 2, family: str = "random-bowl") -> TaskPool:
    pool = TaskPool(places, Lives(STEPS, STEPS, STEPS, 1), rates=(1e-2, 1e-2))
    pool.refill(TaskStream(get_family(family, random.Random(4)), instances, 0), rule, 0, "cpu")
    return pool


needs_compiler = pytest.mark.skipif(
    build.why_unavailable() is not None, reason=f"no compiled kernels here: {build.why_unavailable()}"
)
WHOLE = RuleConfig(drift_inputs=PLAIN.drift_inputs)  # of a size that the compiled kernels are built for anyway


def gradients(rule: HierarchicalRNN) -> tuple[Tensor, Tensor]:
    """Return those of what evolves, and those of everything else."""
    rest = [value.grad.reshape(-1) for name, value in rule.named_parameters() if name not in EVOLVING]
    return torch.cat([value.grad.reshape(-1) for value in rule.evolving]), torch.cat(rest)


def test_it_agrees_with_backprop_through_whole_runs_on_average(double_precision: None) -> None:
    rule, loss = make_rule(PLAIN), LogRatio()
    scored = {STEPS - 1 - before for before in LAST_STEPS}
    exact = TruncatedBackprop(second_order=True)(rule, make_pool(rule, 4), Window(STEPS, scored, loss))
    exact.surrogate.backward()
    expected, _ = gradients(rule)
    drawn = []
    for index in range(100):
        rule.zero_grad()
        pool = make_pool(rule, 4)
        estimate = Evolution(sigma=1e-3, shares=[1.0])(rule, pool, Window(STEPS, {0}, loss, index=index))
        estimate.surrogate.backward()
        moved, rest = gradients(rule)
        assert not rest.any()  # directions and timescales stay as they are
        assert [place.age for place in pool] == [STEPS, STEPS]  # the next window draws new tasks
        drawn.append(moved)
    mean = torch.stack(drawn).mean(0)
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.9
    assert float(mean.norm()) == pytest.approx(float(expected.norm()), rel=0.2)
    assert float(estimate.surrogate.detach()) == pytest.approx(float(exact.surrogate.detach()), rel=1e-2)


@needs_compiler
def test_param_levels_agree_with_backprop_too(double_precision: None) -> None:
    rule, loss = make_rule(WHOLE), LogRatio()
    scored = {STEPS - 1 - before for before in LAST_STEPS}
    exact = TruncatedBackprop(second_order=True)(rule, make_pool(rule, 20), Window(STEPS, scored, loss))
    exact.surrogate.backward()
    parts = param_level_parts(rule)
    expected = torch.cat([part.grad.reshape(-1) for part in parts])
    drawn = []
    for index in range(50):
        rule.zero_grad()
        evolution = Evolution(sigma=1e-3, shares=[1.0], param_level=True)
        estimate = evolution(rule, make_pool(rule, 20), Window(STEPS, {0}, loss, index=index))
        estimate.surrogate.backward()
        drawn.append(torch.cat([part.grad.reshape(-1) for part in parts]))
    mean = torch.stack(drawn).mean(0)
    spread = evolution.spreads(rule)[-len(expected) :]  # what is spread wider is known better
    assert torch.cosine_similarity(mean * spread, expected * spread, dim=0) > 0.7
    assert all(not value.grad.any() for value in rule.tensor_rnn.parameters())


def test_exploration_agrees_with_backprop_for_all_that_moves_rates(double_precision: None) -> None:
    config = replace(PLAIN, first_inputs=("tensor_count", "model_count"), tensor_features=())
    rule, loss = make_rule(config), LogRatio()
    named = dict(rule.named_parameters())
    reached = [*EXPLORED, "tensor_rnn.candidate_weight", "global_rnn.candidate_weight"]

    def pool() -> TaskPool:
        made = make_pool(rule, 20, places=1, family="matrix-multiplication")  # of several tensors
        for place in made.places:  # evolution has all tensors of a model begin at one rate
            state = place.progress.state
            even = state._replace(log_rate=torch.full_like(state.log_rate, math.log(1e-2)))
            place.progress = place.progress._replace(state=even)
        return made

    scored = {STEPS - 1 - before for before in LAST_STEPS}
    exact = TruncatedBackprop(second_order=True)(rule, pool(), Window(STEPS, scored, loss))
    exact.surrogate.backward()
    expected = {name: named[name].grad.clone() for name in reached}
    rule.zero_grad()
    draws = 40
    for index in range(draws):
        evolution = Evolution(sigma=1e-6, shares=[1.0], explore=1e-3)
        estimate = evolution(rule, pool(), Window(STEPS, {0}, loss, index=index))
        estimate.surrogate.backward()
    for name in reached:
        found = named[name].grad / draws
        assert torch.cosine_similarity(found.flatten(), expected[name].flatten(), dim=0) > 0.98, name
        assert 0.6 < float(found.norm() / expected[name].norm()) < 1.4, name  # which takes more draws
    assert not rule.param_rnn.gate_weight.grad.any()


@pytest.mark.parametrize("name", ["mlp", "quadratic-noisy", "sparse-gradient-mlp"])
@pytest.mark.parametrize("fused", [True, False])
def test_twins_see_the_same_minibatches_and_noise(name: str, fused: bool) -> None:
    batch = TaskBatch.draw(get_family(name, random.Random(0)), 3, 0)
    before = batch.generator.get_state()
    population = Population([batch.twice()])
    first, second = (population.gradient(population.initial_params(), fused=fused) for _ in range(2))
    assert not torch.equal(first, second)  # the next step's are others
    for value in population.views(first):
        torch.testing.assert_close(value[0][:3], value[0][3:])
    assert torch.equal(batch.generator.get_state(), before)


class Loud(LogRatio):
    """Scores that differ a thousand times as much."""

    def __call__(self, losses: Tensor, initial: Tensor) -> Tensor:
        return 1000 * super().__call__(losses, initial)


@pytest.mark.parametrize("explore", [0.0, 0.3])
def test_balanced_task_batches_weigh_the_same_however_much_their_losses_vary(explore: float) -> None:
    rule = make_rule()

    def sizes(balance: bool) -> list[float]:
        found = []
        for loss in (LogRatio(), Loud()):
            rule.zero_grad()
            evolution = Evolution(shares=[1.0], clip=1e9, explore=explore, balance=balance)
            evolution(rule, make_pool(rule, 6), Window(STEPS, {0}, loss)).surrogate.backward()
            found.append(float(rule.rate.drift.grad.norm()))
        return found

    quiet, loud = sizes(balance=False)
    assert loud == pytest.approx(1000 * quiet, rel=1e-3)
    quiet, loud = sizes(balance=True)
    assert loud == pytest.approx(quiet, rel=0.1)  # less what is negligible


def test_nudges_are_opposites_spread_over_stretches_of_log_time() -> None:
    rule = make_rule()
    half = TaskBatch.draw(get_family("mlp", random.Random(0)), 3, 0)
    population = Population([half.twice()])
    probe = perturbed(rule, population, torch.zeros(sum(len(value) for value in rule.evolving), 6))
    with torch.no_grad():
        probe.rate.drift.zero_(), probe.rate.drift_bias.fill_(0.0), probe.rate.first.zero_()
    steps = 40
    exploration = Exploration(rule, population, steps, 0.3, torch.Generator().manual_seed(0))
    with torch.no_grad(), exploration.watching(probe):
        state = unroll(probe, population, begin(probe, population, -9.0), steps, set()).progress.state
    moved = (state.log_rate + 9.0).view(len(half.params), 6)
    torch.testing.assert_close(moved, exploration.nudges.sum(0).view_as(moved))  # each as far as its nudges say
    torch.testing.assert_close(moved[:, :3], -moved[:, 3:])
    stretches = exploration.stretches
    assert stretches == sorted(stretches)
    lengths = [stretches.count(number) for number in range(max(stretches) + 1)]
    assert len(lengths) > 1
    assert lengths[0] == 1  # which makes the first rate
    assert lengths == sorted(lengths)  # early ones are short
    assert len(exploration.kept) == len(lengths)  # a step of each


@needs_compiler
@pytest.mark.parametrize("readouts", [("direction",), ("direction", "attention")])
def test_models_side_by_side_have_param_levels_of_their_own(readouts: tuple[str, ...], double_precision: None) -> None:
    rule = make_rule(replace(WHOLE, readouts=readouts))
    batches = [
        TaskBatch.draw(get_family(name, random.Random(0)), 3, seed)
        for seed, name in enumerate(("matrix-multiplication", "quadratic", "dependency-chain"))
    ]
    population = Population(batches)
    metas = packed(rule).detach() + 0.1 * torch.randn(9, len(packed(rule)))
    engine = OwnParamLevels(rule, population.layout, metas)
    with torch.no_grad():
        together = unroll(rule, population, begin(rule, population, -4.0), 10, {4, 9}, engine).losses
        for model, meta in enumerate(metas):
            batch, instance = batches[model // 3], slice(model % 3, model % 3 + 1)
            params = [value[instance] for value in batch.params]
            data = {name: value[instance] for name, value in batch.data.items()}
            alone = Population([TaskBatch(batch.family, params, data, batch.generator)])
            own = deepcopy(rule)
            vector_to_parameters(meta, param_level_parts(own))
            losses = unroll(own, alone, begin(own, alone, -4.0), 10, {4, 9}).losses
            torch.testing.assert_close(together[:, model], losses[:, 0], rtol=1e-8, atol=1e-10)


def test_every_model_drifts_by_its_own_perturbation() -> None:
    rule = make_rule()
    assert {name for name, value in rule.named_parameters() if any(value is one for one in rule.evolving)} == EVOLVING
    population = Population([TaskBatch.draw(get_family("mlp", random.Random(0)), 3, 0)])
    noise = torch.zeros(sum(len(value) for value in rule.evolving), 3)
    noise[len(rule.rate.drift), 1] = 2.0  # only the second one's bias

    def rates(probe: HierarchicalRNN) -> Tensor:
        with torch.no_grad():
            start = begin(probe, population, -5.0)
            state = unroll(probe, population, start, 5, set()).progress.state
        return population.layout.mean_per_model(state.log_rate)

    before, after = rates(rule), rates(perturbed(rule, population, noise))
    assert (after - before > 0.1).tolist() == [False, True, False]
    assert len(rule.rate.drift_bias) == 1  # the rule itself is left alone


def test_a_share_of_the_window_is_a_whole_run_that_cools_down() -> None:
    rule = make_rule(PLAIN)
    pool = make_pool(rule, 2)
    pool.places = [replace(place, cools=True) for place in pool]
    theta = [place.progress.theta.clone() for place in pool]
    short = Evolution(shares=[0.5, 1.0])
    scores = {
        index: short(rule, make_pool(rule, 2), Window(STEPS, {0}, LogRatio(), meta_step=index)) for index in (0, 1)
    }
    assert float(scores[0].surrogate.detach()) > float(scores[1].surrogate.detach())  # half the steps get less far
    short(rule, pool, Window(STEPS, {0}, LogRatio()))
    assert all(torch.equal(a, place.progress.theta) for a, place in zip(theta, pool, strict=True))


def test_runs_are_told_their_length_where_they_cool_down(monkeypatch) -> None:
    rule, lengths = make_rule(PLAIN), []
    pool = make_pool(rule, 2)
    pool.places = [replace(place, cools=index == 1) for index, place in enumerate(pool)]

    def watched(*arguments):
        progress = begin(*arguments)
        lengths.append(progress.state.run_length.tolist())
        return progress

    monkeypatch.setattr("lightning_hrnn.meta.evolution.begin", watched)
    Evolution(shares=[0.5])(rule, pool, Window(STEPS, {0}, LogRatio()))
    tensors = [2 * len(place.tasks.params) * place.tasks.count for place in pool]
    assert lengths == [[0.0] * tensors[0] + [STEPS / 2] * tensors[1]]


def test_it_moves_only_what_makes_rates_in_a_trainer_and_starts_from_narrower_weights(tmp_path) -> None:
    narrow = make_rule(replace(SMALL, drift_inputs=("tensor",), first_inputs=(), slows=False))
    path = save_pretrained(narrow, tmp_path / "narrow.safetensors", {"initial_rate": 1e-3, "meta_steps": 0})
    learner = MetaLearner(
        weights=str(path),
        rule_changes={key: getattr(SMALL, key) for key in ("drift_inputs", "first_inputs", "slows")},
        places=2,
        window=10,
        scored_steps=1,
        lives=Lives(10, 10, 10, 1),
        rates=(1e-3, 1e-3),
        estimator=Evolution(),
        warmup_steps=1,
    )
    start = {name: value.detach().clone() for name, value in learner.rule.named_parameters()}
    tensors = len(narrow.rate.drift)
    assert torch.equal(start["rate.drift"][:tensors], narrow.rate.drift)
    assert not start["rate.drift"][tensors:].any()
    Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    ).fit(learner, TaskDataModule("quick", instances=2, epoch_steps=3))
    moved = {name for name, value in learner.rule.named_parameters() if not torch.equal(value, start[name])}
    assert moved == EVOLVING


@needs_compiler
@pytest.mark.parametrize("explore", [0.0, 0.25])
def test_it_moves_the_param_level_too_as_wide_as_it_is_spread_and_goes_on_from_a_checkpoint(tmp_path, explore) -> None:
    def fit(steps: int, resume: str | None = None) -> MetaLearner:
        learner = MetaLearner(
            rule_changes={"drift_inputs": ["tensor", "peak"], "without": ["gradient_shortcut"]},
            places=2,
            window=10,
            scored_steps=1,
            lives=Lives(10, 10, 10, 1),
            estimator=Evolution(param_level=True, explore=explore),
            warmup_steps=1,
        )
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            callbacks=[checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(learner, TaskDataModule("quick", instances=2, epoch_steps=2), ckpt_path=resume)
        return learner

    torch.manual_seed(0)
    learner = fit(2)
    rule, new = learner.rule, HierarchicalRNN(learner.rule.config)
    rates = {id(value): group["initial_lr"] for group in learner.optimizers().param_groups for value in group["params"]}
    rate = rates[id(rule.rate.drift)]
    assert rates[id(rule.decay_bias)] == pytest.approx(4 * rate)
    assert rates[id(rule.param_rnn.gate_weight)] == pytest.approx(0.3 * rate)
    assert rates[id(rule.tensor_rnn.gate_weight)] == pytest.approx(0.3 * rate)
    assert not torch.equal(rule.decay_bias, new.decay_bias)  # which does not start at random
    assert torch.equal(rule.tensor_rnn.gate_bias, new.tensor_rnn.gate_bias) == (explore == 0)
    assert not torch.equal(rule.rate.drift_bias, new.rate.drift_bias)
    assert not rule.directions["direction"].shortcut.any()  # a part that it does without stays away
    further = fit(4, str(tmp_path / "last.ckpt"))
    assert further.global_step == 4
    assert not torch.equal(further.rule.decay_bias, rule.decay_bias)


def test_rules_that_it_cannot_move_are_refused_early() -> None:
    with pytest.raises(ValueError, match="this rule's rates are 'smoothed'"):
        MetaLearner("paper", estimator=Evolution())
    with pytest.raises(ValueError, match=r"param_level=True\) needs the compiled kernels: .* Leave param_level out"):
        MetaLearner(rule_changes={"without": ["input_scaling"]}, estimator=Evolution(param_level=True))


@needs_compiler
def test_param_levels_side_by_side_refuse_other_devices_and_runs_under_way() -> None:
    rule = HierarchicalRNN()
    layout = Layout.of([3, 2])
    metas = packed(rule)[None]
    with pytest.raises(ValueError, match="computed on the CPU in single or double precision, not on meta"):
        OwnParamLevels(rule, layout, metas.to("meta"))
    with pytest.raises(ValueError, match=r"not on cpu in torch.float16"):
        OwnParamLevels(rule, layout, metas.half())
    state = rule.init(layout, -7.0)
    engine = OwnParamLevels(rule, layout, metas)
    with torch.no_grad(), pytest.raises(ValueError, match="begin at a run's first step"):
        rule(torch.randn(5), torch.ones(2), state._replace(age=state.age + 1), layout, engine)


def test_bad_arguments() -> None:
    for sigma in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma and clip must be positive and finite"):
            Evolution(sigma=sigma)
    with pytest.raises(ValueError, match="an even number of models"):
        batch = TaskBatch.draw(get_family("mlp", random.Random(0)), 3, 0)
        Exploration(make_rule(), Population([batch]), 10, 0.1, torch.Generator())
    for explore in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="explore must be finite and not negative"):
            Evolution(explore=explore)
    with pytest.raises(ValueError, match="shares of the window"):
        Evolution(shares=[])
    with pytest.raises(ValueError, match="shares of the window"):
        Evolution(shares=[1.5])
    with pytest.raises(ValueError, match="Unknown first_inputs"):
        RuleConfig(first_inputs=("colour",))
    with pytest.raises(ValueError, match="the input 'tensor' first"):
        RuleConfig(drift_inputs=("means",))


class Fixed(Rivals):
    """Rivals that end at a given loss."""

    def __init__(self, steps: int, loss: float, known: bool = True) -> None:
        self.steps, self.loss, self.known = steps, loss, known

    def losses(self, batches: Sequence[TaskBatch], scored: Collection[int]) -> list[dict[str, Tensor]]:
        return [{"rival": torch.full((len(scored), batch.count), self.loss)} if self.known else {} for batch in batches]


def test_differences_count_by_how_near_the_rivals_are() -> None:
    rule, window = make_rule(), Window(STEPS, {0}, LogRatio(floor=1e-12))

    def differences(rivals: Rivals | None, cools: bool = True) -> tuple[Tensor, Evolution]:
        pool = make_pool(rule, 8, places=1)
        pool.places[0].cools = cools
        evolution = Evolution(shares=[1.0], rivals=rivals, balance=True, clip=1e9)
        seen: list[Tensor] = []
        found = evolution._difference
        evolution._difference = lambda *given: seen.append(found(*given)) or seen[-1]  # type: ignore[method-assign]
        evolution(rule, pool, window)
        return seen[0], evolution

    plain, _ = differences(None)
    ends = make_pool(rule, 8, places=1).places[0].initial_loss.mean()
    near, evolution = differences(Fixed(STEPS, float(ends)))
    assert [*evolution.standing.known] == [describe(make_pool(rule, 1).places[0].tasks.family)]
    far, _ = differences(Fixed(STEPS, float(ends) * 1e9))
    torch.testing.assert_close(far, UNRIVALLED * plain)  # nothing is given up
    torch.testing.assert_close(near / near.norm(), plain / plain.norm())  # the same differences, scaled
    assert near.norm() > far.norm()
    assert near.square().mean().sqrt() <= LARGEST_WEIGHTED
    other, evolution = differences(Fixed(STEPS, 1.0, known=False))
    torch.testing.assert_close(other, UNRIVALLED * plain)
    assert not evolution.standing.known
    with pytest.raises(ValueError, match=rf"tuned for runs of {STEPS + 1} steps, .* have \[{STEPS}\]: none would ever"):
        differences(Fixed(STEPS + 1, 1.0))
    assert not differences(Fixed(STEPS, 1.0), cools=False)[1].standing.known
    again = Evolution()
    again.load_state_dict(differences(Fixed(STEPS, 1.0))[1].state_dict())
    assert again.standing.known


def test_spreads_of_ones_own_come_before_the_usual_ones() -> None:
    rule, usual = make_rule(), Evolution()
    own = Evolution(spreads={"rate.drift_bias": 0.0, "rate.drift": 0.25, "param_rnn": 0.1, "decay_bias": 3})
    names = {value: name for name, value in rule.named_parameters()}
    expected = {"rate.drift": 0.25, "rate.drift_bias": 0.0}
    rows = [expected.get(names[value], 1.0) for value in rule.evolving for _ in range(value.numel())]
    assert own.spreads(rule).tolist() == rows
    assert (own.spread_of("param_rnn.gate_weight"), own.spread_of("decay_bias")) == (0.1, 3)
    assert own.spread_of("tensor_rnn.gate_weight") == usual.spread_of("tensor_rnn.gate_weight") == 0.3
    assert usual.spread_of("param_rnn.gate_weight") == 0.3
    estimate = own(rule, make_pool(rule, 2), Window(STEPS, {0}, LogRatio()))
    estimate.surrogate.backward()
    assert rule.rate.drift.grad.any()
    assert not rule.rate.drift_bias.grad.any()
    nested = {"param_rnn": 0.6, "param_rnn.gate": 0.0}
    for order in (nested, dict(reversed(nested.items()))):
        assert Evolution(spreads=order).spread_of("param_rnn.gate_weight") == 0.0  # the longest beginning counts
    with pytest.raises(ValueError, match=r"spreads names \['rate.drfit'\], with which no meta-parameter begins"):
        Evolution(spreads={"rate.drfit": 1.0}).check(rule, STEPS)
    for width in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="spreads must be finite and not negative"):
            Evolution(spreads={"rate.drift": width})


def test_of_large_tasks_there_are_fewer_instances() -> None:
    family = get_family("random-bowl", random.Random(4))
    (size,) = {TaskBatch.draw(family, 1, 0).size}
    for most, count in ((None, 8), (100 * size, 8), (6 * size, 6), (1, FEWEST)):
        assert TaskStream(family, 8, 0, most_params=most).draw(3).count == count
    assert TaskStream(family, 2, 0, most_params=1).draw(3).count == 2
    module = TaskDataModule("quick", most_params=30)
    assert module.state_dict()["most_params"] == 30
    with pytest.raises(ValueError, match="drew its tasks with"):
        TaskDataModule("quick").load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="drew its tasks with"):
        module.load_state_dict(TaskDataModule("quick").state_dict())
    before = {key: value for key, value in TaskDataModule("quick").state_dict().items() if key != "most_params"}
    TaskDataModule("quick").load_state_dict(before)  # of a run from before there was such a bound
    with pytest.raises(ValueError, match="drew its tasks with"):
        module.load_state_dict(before)
    with pytest.raises(ValueError, match="most_params must be at least 1"):
        TaskDataModule("quick", most_params=-1)


def test_the_first_instances_of_a_batch_are_those() -> None:
    batch = TaskBatch.draw(get_family("quadratic", random.Random(4)), 5, 0)
    first = batch.first(2)
    assert (first.count, batch.count) == (2, 5)
    whole, part = (one.family.loss(one.params, one.data) for one in (batch, first))
    torch.testing.assert_close(part, whole[:2])
