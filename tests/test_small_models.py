"""Weights that name others for models of few parameters: which of the two steps, and what becomes of the state."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_hrnn.cli import main
from lightning_hrnn.cli.evaluate import _version
from lightning_hrnn.evaluation.protocol import OURS, Learned, Trial
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.module import MetaLearner
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, SmallModels
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import (
    DEFAULT_WEIGHTS,
    WeightsError,
    fingerprint,
    load_pretrained,
    save_pretrained,
)

BELOW = 12  # parameters


def load_pretrained_alone(path: Path) -> HierarchicalRNN:
    rule = load_pretrained(path)
    rule.small = None
    return rule


def tensor(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1.0, 1.0, torch.Size(shape).numel()).view(shape))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Weights that begin at 0.01, and for small models others, which begin at 0.02."""
    torch.manual_seed(0)
    rule, small = HierarchicalRNN(), HierarchicalRNN(RuleConfig(scale_memory=50))
    small.card = {"initial_rate": 0.02}
    rule.small = SmallModels(BELOW, small)
    return save_pretrained(rule, tmp_path / "mine.safetensors", {"initial_rate": 0.01, "corpus": "quick"})


def take_steps(optimizer: HRNN, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def first_rates(optimizer: HRNN) -> list[float]:
    return [rate.exp().item() for rate in optimizer.log_rates()]


def test_the_number_of_parameters_chooses(large: Path) -> None:
    rule = load_pretrained(large)
    assert rule.small is not None
    assert rule.for_model(BELOW - 1) is rule.small.rule
    assert rule.for_model(BELOW) is rule
    assert rule.small.rule.for_model(1) is rule.small.rule
    small, other = HRNN([tensor(BELOW - 1)], weights=large), HRNN([tensor(3), tensor(BELOW - 3)], weights=large)
    assert (small.weights_name, other.weights_name) == ("mine-small", str(large))
    assert (fingerprint(small.rule), fingerprint(other.rule)) == (fingerprint(rule.small.rule), fingerprint(rule))
    assert (first_rates(small), first_rates(other)) == ([pytest.approx(0.02)], [pytest.approx(0.01)] * 2)
    assert HRNN([tensor(2)], weights=rule).weights_name == "mine-small"
    assert HRNN([tensor(BELOW)], weights=rule).weights_name == "custom"


def test_frozen_parameters_and_all_groups_count(large: Path) -> None:
    frozen = tensor(BELOW).requires_grad_(False)
    for groups in ([tensor(2), frozen], [{"params": [tensor(2)]}, {"params": [frozen]}]):
        optimizer = HRNN(groups, weights=large)
        assert optimizer.weights_name == str(large)
        assert first_rates(optimizer) == [pytest.approx(0.01)] * 2
        assert optimizer.rule.config == load_pretrained(large).config


def test_it_steps_by_the_rule_for_small_models(large: Path) -> None:
    """As if that one had been given; on every step."""
    params = [tensor(4), tensor(2, 3)]
    chosen, given = (
        HRNN(params, weights=large),
        HRNN(deepcopy(params), weights=large.with_name("mine-small.safetensors")),
    )
    chosen.run_length = given.run_length = 5.0
    for step in range(5):
        take_steps(chosen, 1, step)
        take_steps(given, 1, step)
        for one, other in zip(params, given.param_groups[0]["params"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rate", ["learned", "given"])
def test_a_model_that_grows_goes_on_by_the_other_rule(large: Path, rate: str) -> None:
    """Averages, learned rates and ages stay, hidden states begin anew: as an adapted state."""
    options = {"rate": rate, "lr": 1.0 if rate == "learned" else 1e-3}
    first, second = tensor(4), tensor(BELOW)
    optimizer = HRNN([first], weights=large, **options)
    take_steps(optimizer, 3)
    assert optimizer.weights_name == "mine-small"
    before, state = {key: value.clone() for key, value in optimizer.state[first].items()}, optimizer.state_dict()
    optimizer.add_param_group({"params": [second]})
    assert optimizer.weights_name == str(large)
    after = optimizer.state[first]
    for key in ("average", "log_rate", "age"):
        assert torch.equal(after[key], before[key]), key
    assert torch.equal(after["square"], before["square"][:-1])  # without the long memory, which this rule has not
    initial = optimizer.rule.param_rnn.initial
    assert torch.equal(after["hidden"], initial[:, None].expand_as(after["hidden"]))
    adapted = HRNN([deepcopy(first)], weights=load_pretrained_alone(large), other_weights="adapt", **options)
    with pytest.warns(UserWarning, match=r"the weights 'mine-small' .* the hidden states start anew"):
        adapted.load_state_dict(state)
    for key, value in adapted.state[adapted.param_groups[0]["params"][0]].items():
        assert torch.equal(after[key], value), key
    take_steps(optimizer, 2)
    assert torch.isfinite(first).all()
    assert (optimizer.state[first]["age"], optimizer.state[second]["age"]) == (5, 2)


def test_what_grows_before_its_first_step_is_as_if_built_at_once(large: Path) -> None:
    params = [tensor(4), tensor(BELOW)]
    grown, at_once = HRNN(params[:1], weights=large), HRNN(deepcopy(params), weights=large)
    grown.add_param_group({"params": params[1:]})
    take_steps(grown, 3)
    take_steps(at_once, 3)
    for one, other in zip(params, at_once.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


def test_a_rule_that_is_given_is_copied(large: Path) -> None:
    rule = load_pretrained(large)
    optimizer, twin = HRNN([tensor(4)], weights=rule), HRNN([tensor(4)], weights=large)
    with torch.no_grad():
        rule.decay_bias.add_(100)
    for one in (optimizer, twin):
        one.add_param_group({"params": [tensor(BELOW)]})
    assert fingerprint(optimizer.rule) == fingerprint(twin.rule)


def test_given_rates_stand_after_growing(large: Path) -> None:
    """Rates that had been put before are put again."""
    optimizer = HRNN([param := tensor(4)], weights=large, rate="given", lr=1e-2)
    optimizer._put_rate(param, math.log(1e-2))  # as in a first step that is then skipped
    optimizer.add_param_group({"params": [tensor(BELOW)]})
    before = param.detach().clone()
    take_steps(optimizer, 1)
    assert (param - before).square().mean().sqrt().item() == pytest.approx(1e-2, rel=1e-4)


def test_a_group_that_is_refused_changes_nothing(large: Path) -> None:
    optimizer = HRNN([tensor(4)], weights=large)
    with pytest.raises(ValueError, match="is complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(BELOW, dtype=torch.complex64))]})
    assert optimizer.weights_name == "mine-small"
    take_steps(optimizer, 1)


def test_saved_states_belong_to_the_rule_in_use(large: Path) -> None:
    small = HRNN([param := tensor(4)], weights=large)
    take_steps(small, 3)
    resumed = HRNN([deepcopy(param)], weights=large)
    resumed.load_state_dict(small.state_dict())
    take_steps(small, 2, 1)
    take_steps(resumed, 2, 1)
    assert torch.equal(param, resumed.param_groups[0]["params"][0])
    other = HRNN([tensor(4)], weights=load_pretrained_alone(large))
    with pytest.raises(ValueError, match=r"made with the weights 'mine-small' .* and the optimizer has 'custom'"):
        other.load_state_dict(small.state_dict())


def test_copies_and_pickles_go_on(large: Path) -> None:
    optimizer = HRNN([tensor(4)], weights=large)
    take_steps(optimizer, 2)
    twins = [deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for twin in (optimizer, *twins):
        take_steps(twin, 2, 1)
        twin.add_param_group({"params": [tensor(BELOW)]})
        take_steps(twin, 1, 2)
    values = [[param for group in one.param_groups for param in group["params"]] for one in (optimizer, *twins)]
    for twin in values[1:]:
        assert all(torch.equal(one, other) for one, other in zip(values[0], twin, strict=True))


def test_after_falling_back_a_model_may_grow(large: Path) -> None:
    optimizer = HRNNWithFallback([tensor(4)], weights=large)
    take_steps(optimizer, 2)
    state = optimizer.state_dict()
    optimizer.fall_back()
    optimizer.add_param_group({"params": [tensor(BELOW)]})
    take_steps(optimizer, 2)
    back = HRNNWithFallback([tensor(4)], weights=large)
    back.fall_back()
    back.load_state_dict(state)
    take_steps(back, 1)
    assert (back.fallen_back, back.weights_name) == (False, "mine-small")


def edit_small(path: Path, small: object) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, "small": small}))


GOOD = {"below": BELOW, "weights": "mine-small", "sha256": "0" * 64}


@pytest.mark.parametrize(
    "small",
    [None, 3, [], {}, *({**GOOD, "below": bad} for bad in (0, -1, True, "x", 1.5)), {**GOOD, "weights": 3}],
    ids=str,
)
def test_a_card_whose_small_weights_are_no_such_thing_is_refused(large: Path, small: object) -> None:
    edit_small(large, small)
    with pytest.raises(WeightsError, match="'small' must name weights for small models"):
        load_pretrained(large)


def test_small_weights_that_are_missing_damaged_or_others_are_refused(large: Path, tmp_path: Path) -> None:
    beside = tmp_path / "mine-small.safetensors"
    content = beside.read_bytes()
    beside.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsError, match=r"mine-small\.safetensors is damaged"):
        load_pretrained(large)
    beside.unlink()
    with pytest.raises(
        WeightsError, match=r"no weights file .*mine-small\.safetensors beside mine.* fewer than 12 parameters: copy it"
    ):
        load_pretrained(large)
    save_pretrained(HierarchicalRNN(), beside, {})
    with pytest.raises(WeightsError, match=r"mine-small\.safetensors is another one than the card of mine means"):
        load_pretrained(large)
    with pytest.raises(WeightsError, match="another one"):
        HRNN([tensor(BELOW)], weights=large)


@pytest.mark.parametrize("name", ["../tiny", "sub/tiny", "/tiny", ".", ""])
def test_small_weights_lie_beside_the_others(large: Path, name: str) -> None:
    edit_small(large, {**GOOD, "weights": name})
    with pytest.raises(WeightsError):
        load_pretrained(large)


def test_weights_for_small_models_name_no_others(large: Path) -> None:
    inner = {**GOOD, "weights": "mine", "sha256": load_pretrained(large).card["sha256"]}
    shutil.copy(large, outer := large.with_name("outer.safetensors"))
    shutil.copy(large.with_suffix(".json"), outer.with_suffix(".json"))
    edit_small(outer, inner)
    with pytest.raises(WeightsError, match="names yet others itself"):
        load_pretrained(outer)
    edit_small(large, inner)  # itself
    with pytest.raises(WeightsError, match="names yet others itself"):
        load_pretrained(large)


def test_average_writes_both(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, out = str(large.with_name("mine-small.safetensors")), tmp_path / "new" / "both.safetensors"
    command = ["average", str(out), str(large)]
    assert main([*command, "--small", small, "--small-below", "7"]) == 0
    made = load_pretrained(out)
    assert made.small is not None
    assert (made.small.below, made.small.rule.card["initial_rate"]) == (7, 0.02)
    assert made.small.rule.card["name"] == "both-small"
    assert fingerprint(made) == fingerprint(load_pretrained(large))
    before = out.read_bytes(), out.with_name("both-small.safetensors").read_bytes()
    out.unlink()
    assert main([*command, "--small", small]) == 1  # the file beside it is there still
    assert "both-small.safetensors is there already" in capsys.readouterr().err
    assert main([*command, "--small", small, "--overwrite"]) == 0
    assert (out.read_bytes(), out.with_name("both-small.safetensors").read_bytes()) == before
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 0
    assert load_pretrained(out).small is None  # only what was asked for
    assert "It steps models of all sizes" in " ".join(capsys.readouterr().out.split())
    for wrong, why in (
        (["--small", "none"], "Unknown weights 'none'"),
        (["--small", str(large)], "name yet others themselves"),
        (["--small-below", "7"], "give --small"),
    ):
        kept = out.read_bytes()
        assert main([*command, "--overwrite", *wrong]) == 1
        assert why in " ".join(capsys.readouterr().err.split())
        assert out.read_bytes() == kept


@pytest.mark.parametrize(
    "config", [RuleConfig(timescales=5), RuleConfig.preset("paper"), RuleConfig.preset("summary")], ids=str
)
def test_rules_between_which_no_model_could_grow_are_refused(large: Path, tmp_path: Path, config: RuleConfig) -> None:
    rule = load_pretrained(large)
    other = HierarchicalRNN(config)
    rule.small = SmallModels(BELOW, other)
    with pytest.raises(WeightsError, match="a model that grows past the bound could not go on"):
        save_pretrained(rule, tmp_path / "odd" / "odd.safetensors", {})
    saved = save_pretrained(other, large.with_name("odd.safetensors"), {})
    edit_small(large, {**GOOD, "weights": "odd", "sha256": load_pretrained(saved).card["sha256"]})
    with pytest.raises(WeightsError, match="a model that grows past the bound could not go on"):
        load_pretrained(large)


def test_meta_training_goes_on_from_one_rule(large: Path, tmp_path: Path) -> None:
    """What is exported is for models of all sizes."""
    learner = MetaLearner(weights=str(large))
    assert learner.rule.small is None
    exported = load_pretrained(learner.export(tmp_path / "out" / "next.safetensors"))
    assert exported.small is None
    assert "small" not in exported.card


def test_evaluation_takes_the_rule_for_the_size_of_the_task(large: Path) -> None:
    """A quadratic of 20 numbers or more, and a bowl of two."""
    rule = load_pretrained(large)
    assert rule.small is not None

    def final(task: str, rule: HierarchicalRNN) -> list[float]:
        return Trial(Setting("corpus", 20, 2, 1), task, OURS).run(Learned(rule)).final

    assert final("bowl/1", rule) == final("bowl/1", rule.small.rule)
    assert final("quadratic/1", rule) == final("quadratic/1", load_pretrained_alone(large))
    assert final("bowl/1", rule) != final("bowl/1", load_pretrained_alone(large))
    assert len({_version(rule), _version(rule.small.rule), _version(load_pretrained_alone(large))}) == 3


def test_shipped_weights_descend_on_both_sides_of_the_size() -> None:
    rule = load_pretrained(DEFAULT_WEIGHTS)
    assert rule.small is not None
    for features in (rule.small.below - 1, rule.small.below):
        param, target = tensor(features), torch.linspace(0.5, -0.5, features)
        optimizer, losses = HRNN([param]), list[Tensor]()
        assert (optimizer.weights_name == DEFAULT_WEIGHTS) == (features == rule.small.below)
        for _ in range(50):
            optimizer.zero_grad()
            losses.append((loss := (param - target).square().mean()).detach())
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("suite", ["nets", "vision"])
def test_networks_of_the_suites_are_no_small_models(suite: str) -> None:
    """So what was measured there with `hrnn-v10` is true of `hrnn-v11`."""
    rule, setting = load_pretrained("hrnn-v11"), Setting(suite, 10)
    assert fingerprint(rule) == fingerprint(load_pretrained("hrnn-v10"))
    for task in setting.families():
        if not task.startswith(("validation", "fashion")):  # Fashion-MNIST may not be here
            assert rule.for_model(setting.draw(task, "report", 1).size) is rule, task
