"""Weights and their cards: saved, found, checked."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_hrnn.cli import main
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, SmallModels
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import (
    DEFAULT_WEIGHTS,
    WEIGHTS_FOLDER,
    WeightsError,
    available_weights,
    average_weights,
    fingerprint,
    load_pretrained,
    read_card,
    reconfigured,
    save_pretrained,
)
from lightning_hrnn.optimizer.rates import ANNEALING


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_pretrained(HierarchicalRNN(), tmp_path / "mine.safetensors", {"initial_rate": 0.01, "corpus": "quick"})


@pytest.mark.parametrize("preset", ["default", "paper", "summary"])
def test_what_is_saved_is_loaded(tmp_path: Path, preset: str) -> None:
    rule = HierarchicalRNN(RuleConfig.preset(preset, readouts=("direction", "attention")))
    loaded = load_pretrained(save_pretrained(rule, tmp_path / "deep" / "mine.safetensors", {"seed": 3}))
    assert loaded.config == rule.config
    assert fingerprint(loaded) == fingerprint(rule)
    assert loaded.card["seed"] == 3
    assert loaded.card["name"] == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_a_field_that_a_later_version_adds_leaves_fingerprints_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = load_pretrained()
    before, fields = fingerprint(rule), RuleConfig.to_dict
    monkeypatch.setattr(RuleConfig, "to_dict", lambda config: {**fields(config), "added": False})
    assert fingerprint(rule) == before


def test_fingerprint_tells_rules_apart() -> None:
    rule = HierarchicalRNN()
    before = fingerprint(rule)
    with torch.no_grad():
        rule.decay_bias[0] += 1e-6
    assert fingerprint(rule) != before


def test_whole_numbers_and_others_are_one_rule() -> None:
    whole, rule = (HierarchicalRNN(RuleConfig(drift_delay=delay)) for delay in (7, 7.0))
    whole.load_state_dict(rule.state_dict())
    assert fingerprint(whole) == fingerprint(rule)


@pytest.mark.parametrize("name", available_weights())
def test_shipped_weights_load_offline_with_a_true_card(name: str) -> None:
    rule = load_pretrained(name)
    card = read_card(name)
    assert card["name"] == name
    for key in ("corpus", "corpus_version", "seed", "meta_steps", "horizon", "package_version", "initial_rate"):
        assert key in card, key
    assert (WEIGHTS_FOLDER / f"{name}.safetensors").stat().st_size < 100_000
    assert rule.config == RuleConfig(**card["config"])


def test_default_weights_are_shipped() -> None:
    assert DEFAULT_WEIGHTS in available_weights()


def test_optimizer_starts_from_the_rate_on_the_card(saved: Path) -> None:
    optimizer = HRNN([torch.nn.Parameter(torch.ones(3))], weights=saved)
    assert optimizer.log_rates()[0].exp().item() == pytest.approx(0.01)
    assert optimizer.weights_name == str(saved)


def test_a_damaged_file_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is damaged: its checksum is .* Install the package again"):
        HRNN([torch.nn.Parameter(torch.ones(3))], weights=saved)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(WeightsError, match="is damaged"):
        load_pretrained(saved)


def edit_card(path: Path, **changes: object) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, **changes}))


def test_a_card_of_another_rule_is_refused(saved: Path) -> None:
    config = json.loads(saved.with_suffix(".json").read_text())["config"]
    edit_card(saved, config={**config, "param_hidden": 11})
    with pytest.raises(WeightsError, match="does not hold the rule that its card describes"):
        load_pretrained(saved)
    edit_card(saved, config={**config, "flavour": "vanilla"})
    with pytest.raises(WeightsError, match="another version of lightning-hrnn"):
        load_pretrained(saved)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    rule = HierarchicalRNN()
    with torch.no_grad():
        rule.decay_bias[0] = float("nan")
    path = save_pretrained(rule, tmp_path / "bad.safetensors", {})
    with pytest.raises(WeightsError, match="not finite"):
        load_pretrained(path)


def test_missing_card_missing_file_unknown_name(saved: Path, tmp_path: Path) -> None:
    copied = tmp_path / "alone" / "mine.safetensors"
    copied.parent.mkdir()
    shutil.copy(saved, copied)
    with pytest.raises(WeightsError, match=r"has no card: mine\.json should lie beside it"):
        load_pretrained(copied)
    with pytest.raises(WeightsError, match="There is no weights file"):
        load_pretrained(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=rf"Unknown weights 'hrnn-v99': choose from .*{DEFAULT_WEIGHTS}"):
        load_pretrained("hrnn-v99")
    with pytest.raises(WeightsError, match="Unknown weights"):
        load_pretrained("../weights/hrnn-v0")


@pytest.mark.parametrize(
    "name",
    [
        "../weights/hrnn-v0",
        "weights/../hrnn-v0",
        "./hrnn-v0",
        "hrnn-v0/",
        "hrnn-v0.json",
        str(WEIGHTS_FOLDER / DEFAULT_WEIGHTS),
        "HRNN-V0",
        "hrnn-*",
        "",
        ".",
        "..",
        "~",
        "hrnn-v0\0",
        "https://example.com/hrnn-v0",
    ],
)
def test_a_name_is_one_of_the_list_and_nothing_else(name: str) -> None:
    with pytest.raises(WeightsError, match=rf"Unknown weights .*: choose from \[.*'{DEFAULT_WEIGHTS}'.*\], or give"):
        load_pretrained(name)


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    folder = tmp_path / "mine.safetensors"
    folder.mkdir()
    with pytest.raises(WeightsError, match=r"There is no weights file .*mine\.safetensors"):
        load_pretrained(folder)
    with pytest.raises(WeightsError, match="There is no weights file"):
        load_pretrained("https://example.com/hrnn-v0.safetensors")


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a weights file was unpickled",)


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write(pickle.dumps(value))])
def test_a_pickle_under_another_name_is_never_opened_as_one(saved: Path, write: Callable[..., object]) -> None:
    """Even if somebody made its card's checksum right."""
    with saved.open("wb") as file:
        write({"param_rnn.initial": Harmful()}, file)
    with pytest.raises(WeightsError, match="is damaged"):
        load_pretrained(saved)
    edit_card(saved, sha256=hashlib.sha256(saved.read_bytes()).hexdigest())
    with pytest.raises(WeightsError, match="does not hold the rule that its card describes"):
        load_pretrained(saved)


def test_tensors_that_are_missing_or_too_many_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    for changed in (
        {name: value for name, value in tensors.items() if name != "decay_bias"},
        {**tensors, "stranger": torch.zeros(1)},
        {**tensors, "decay_bias": torch.zeros(3)},
    ):
        save_file(changed, saved)
        edit_card(saved, sha256=hashlib.sha256(saved.read_bytes()).hexdigest())
        with pytest.raises(WeightsError, match="does not hold the rule that its card describes"):
            load_pretrained(saved)


@pytest.mark.parametrize("text", ["not json", "[]", '{"config": {}}', '{"config": {}, "sha256": null}', "\x00\x01"])
def test_a_card_that_is_not_one_is_refused(saved: Path, text: str) -> None:
    saved.with_suffix(".json").write_text(text)
    with pytest.raises(WeightsError, match="is not a card"):
        load_pretrained(saved)


RESULT = {"net": "conv", "regret": 0.1, "steps": [1, 2], "hrnn": [2.0, 1.0], "tuned_adam": [2.0, 1.5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({key: value}, key)
            for key in ("initial_rate", "horizon")
            for value in (math.nan, math.inf, -1, 0, "x", None)
        ),
        *(
            ({"evaluation": value}, "evaluation")
            for value in (3, {}, [1], [{}], [RESULT, RESULT | {"steps": [1]}], [RESULT | {"regret": "low"}])
        ),
    ],
    ids=str,
)
def test_a_card_whose_numbers_are_none_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    edit_card(saved, evaluation=[RESULT, RESULT], horizon=300)
    assert load_pretrained(saved).card["horizon"] == 300
    edit_card(saved, **changes)
    with pytest.raises(WeightsError, match=f"'{message}' must"):
        load_pretrained(saved)


def test_a_folder_is_no_card(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    saved.with_suffix(".json").mkdir()
    with pytest.raises(WeightsError, match="is not a card"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("param_hidden", 10.5),
        ("drift_rise", "2"),
        ("drift_rise", None),
        ("slows", None),
        ("anneals", "yes"),
        ("warm_up", "5 %"),
        ("warm_up", 1.0),
        ("warm_up", False),
        ("peak_memory", True),
        ("scale_inputs", None),
        ("scale_inputs", "trend"),
        ("drift_inputs", 5),
        *(
            (field, value)
            for field in ("peak_fall", "vanished", "far_fall", "step_bound")
            for value in (-1, math.inf, math.nan, True, "x")
        ),
        ("vanished", 1.0),
        *(("scale_memory", value) for value in (-1, 0.5, math.inf, math.nan, True, "x", None)),
    ],
)
def test_fields_of_another_kind_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, not {value!r}"):
        RuleConfig(**{field: value})  # type: ignore[arg-type]


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as \.safetensors, not \.pt"):
        save_pretrained(HierarchicalRNN(), tmp_path / "mine.pt", {})


def test_unknown_presets_parts_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown preset 'big': choose from \['default', 'paper', 'summary'\]"):
        RuleConfig.preset("big")
    with pytest.raises(ValueError, match=r"Unknown features \['loss'\]"):
        RuleConfig(features=("loss",))
    with pytest.raises(ValueError, match="Unknown direction 'up'"):
        RuleConfig(direction="up")
    with pytest.raises(ValueError, match="param_hidden must be an integer of at least 1"):
        RuleConfig(param_hidden=0)
    with pytest.raises(ValueError, match="drift_rise must be positive"):
        RuleConfig(drift_rise=-1.0)
    with pytest.raises(ValueError, match="first_inputs names one thing twice"):
        RuleConfig(first_inputs=("size", "size"))
    with pytest.raises(ValueError, match="last 10 steps beside scale_memory: make it more than that, not 7"):
        RuleConfig(scale_memory=7, scale_inputs=("trend",))
    assert RuleConfig(scale_inputs=("trend",)) == RuleConfig()  # nothing reads it
    assert RuleConfig(peak_fall=1, vanished=0.1) == RuleConfig()  # likewise
    assert RuleConfig.preset("paper", far_fall=1, step_bound=1) == RuleConfig.preset("paper")
    slow = RuleConfig(slows=True, peak_fall=1)
    assert slow == RuleConfig(slows=True, peak_fall=1.0) != RuleConfig(slows=True)
    with pytest.raises(ValueError, match=r"Unknown scale_inputs \['size'\]"):
        RuleConfig(scale_inputs=("size",))
    with pytest.raises(ValueError, match="Only 'bounded' rates slow down"):
        RuleConfig.preset("paper", slows=True)
    with pytest.raises(ValueError, match="needs the readout 'direction' first"):
        RuleConfig(readouts=("attention",))


def test_another_configuration_finds_its_meta_parameters_by_name() -> None:
    torch.manual_seed(0)
    rule = HierarchicalRNN(RuleConfig(drift_inputs=("tensor", "means"), first_inputs=("size", "model_count")))
    with torch.no_grad():
        for value in rule.rate.parameters():
            value.normal_()
    turned = RuleConfig(
        drift_inputs=("tensor", "peak", "global", "means"),
        first_inputs=("tensor_count", "model_count", "size"),
        slows=True,
        readouts=("direction", "attention"),
    )
    other = reconfigured(rule, turned)
    tensor, means = rule.rate.drift.split(list(rule.drift_widths.values()))
    rows = dict(zip(turned.drift_inputs, other.rate.drift.split(list(other.drift_widths.values())), strict=True))
    assert torch.equal(rows["tensor"], tensor)
    assert torch.equal(rows["means"], means)
    assert not rows["peak"].any()
    assert not rows["global"].any()
    size, model_count = rule.rate.first.flatten().tolist()
    assert other.rate.first.flatten().tolist() == [0.0, model_count, size]
    assert torch.equal(other.directions["attention"].weight, rule.directions["direction"].weight)
    assert (other.rate.slowing.item(), other.reach.item()) == (0.0, 1.0)
    back = reconfigured(other, rule.config)
    assert all(torch.equal(value, rule.state_dict()[key]) for key, value in back.state_dict().items())
    told = reconfigured(other, replace(turned, drift_inputs=("tensor", "length", "means")))
    assert not told.rate.slowing_by_length.any()
    assert not told.rate.drift.split(list(told.drift_widths.values()))[1].any()
    annealed = reconfigured(told, replace(told.config, anneals=True))
    assert annealed.rate.annealing.flatten().tolist() == pytest.approx(ANNEALING)
    assert "rate.annealing" not in reconfigured(annealed, told.config).state_dict()
    untold = reconfigured(told, replace(turned, drift_inputs=("tensor", "means")))
    assert "rate.slowing_by_length" not in untold.state_dict()
    bare = reconfigured(other, RuleConfig())
    assert torch.equal(bare.rate.drift, tensor)
    with pytest.raises(RuntimeError, match="size mismatch"):
        reconfigured(rule, RuleConfig(tensor_hidden=30))


def test_a_long_memory_of_scales_comes_and_goes() -> None:
    """With the powers of `hrnn-v6`, which is `hrnn-v5` with one."""
    before, after = load_pretrained("hrnn-v5"), load_pretrained("hrnn-v6")
    made = reconfigured(before, after.config)
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in made.state_dict().items())
    back = reconfigured(after, before.config)
    assert back.state_dict().keys() == before.state_dict().keys()


def test_powers_of_the_long_memory_find_their_inputs_by_name() -> None:
    """What is new says nothing; a rule that had no long memory starts from the powers of a new one."""
    v6 = load_pretrained("hrnn-v6")
    turned = reconfigured(v6, replace(v6.config, scale_inputs=("trend", "model_count")))
    constant, _, model_count = v6.long_scaling.flatten().tolist()
    assert turned.long_scaling.flatten().tolist() == [constant, 0.0, model_count]
    fewer = reconfigured(v6, replace(v6.config, scale_inputs=()))
    assert fewer.long_scaling.flatten().tolist() == [constant]
    new = reconfigured(load_pretrained("hrnn-v5"), turned.config)
    assert new.long_scaling.flatten().tolist() == pytest.approx([1.45, 1.0, -0.15])


def test_weights_stay_whole_if_writing_others_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_pretrained(HierarchicalRNN(), tmp_path / "mine.safetensors", {"seed": 1})
    write = Path.write_bytes

    def full(file: Path, data: bytes) -> int:
        if ".json" in file.name:
            raise OSError("No space left on device")
        return write(file, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(HierarchicalRNN(), path, {"seed": 2})
    assert load_pretrained(path).card["seed"] == 1
    assert not list(tmp_path.glob("*.part"))


def test_weights_for_small_models_stay_with_theirs_if_writing_others_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, path = HierarchicalRNN(), tmp_path / "both.safetensors"
    rule.small = SmallModels(2000, HierarchicalRNN())
    save_pretrained(rule, path, {"seed": 1})
    write = Path.write_bytes

    def full(file: Path, data: bytes) -> int:
        if "small" not in file.name:
            raise OSError("No space left on device")
        return write(file, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    rule.small = SmallModels(2000, HierarchicalRNN())
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(rule, path, {"seed": 2})
    loaded = load_pretrained(path)
    assert loaded.card["seed"] == 1
    assert loaded.small is not None
    with pytest.raises(ValueError, match="looked_at lists names of tasks"):
        save_pretrained(rule, path, {"looked_at": {"nets": "gru"}})


def test_weights_that_are_no_name_and_no_path_are_refused() -> None:
    for weights in (None, 3):
        with pytest.raises(WeightsError, match=rf"Weights are a name, one of \[.*\], or a path, not {weights}"):
            load_pretrained(weights)  # type: ignore[arg-type]


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_memory must be"):
        RuleConfig(scale_memory=10**400)
    assert str(RuleConfig(scale_memory=-0.0).scale_memory) == "0.0"


def test_weights_are_averaged_with_other_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [HierarchicalRNN(), HierarchicalRNN(RuleConfig(drift_rise=3.0))]
    with pytest.raises(ValueError, match=r"they differ in \['drift_rise'\].*the last one has \{'drift_rise': 3.0\}"):
        average_weights(rules, {"drift_fall": 0.1})
    mean = average_weights(rules, {"drift_fall": 0.1, "drift_rise": 3})
    for value, one, other in zip(mean.parameters(), *(rule.parameters() for rule in rules), strict=True):
        torch.testing.assert_close(value, (one + other) / 2)
    assert (mean.config.drift_rise, mean.config.drift_fall) == (3.0, 0.1)
    attentive = HierarchicalRNN(RuleConfig(readouts=("direction", "attention")))
    plain = average_weights([attentive], {"readouts": ["direction"]})
    assert torch.equal(plain.directions["direction"].weight, attentive.directions["direction"].weight)
    assert [*plain.directions] == ["direction"]
    with pytest.raises(ValueError, match="cannot be averaged"):
        average_weights([HierarchicalRNN(), HierarchicalRNN(RuleConfig(tensor_hidden=30))])
    slowing = HierarchicalRNN(RuleConfig(slows=True))
    for some in ([slowing, rules[0]], [rules[0], slowing], []):  # in whichever order
        with pytest.raises(ValueError, match="cannot be averaged"):
            average_weights(some)
    with pytest.raises(ValueError, match=r"no fields \['drift_up'\]: it has .*'drift_rise'"):
        average_weights(rules, {"drift_up": 1.0})
    paths = [str(save_pretrained(rule, tmp_path / f"{k}.safetensors", {"seed": k})) for k, rule in enumerate(rules)]
    out = tmp_path / "mean.safetensors"
    bounds = ["--bounds", '{"drift_rise": 4, "readouts": ["direction"]}', "--initial-rate", "2e-4"]
    assert main(["average", str(out), *paths, "--initial-rate", "-1"]) == 2
    assert main(["average", str(out), *paths, *bounds[:2], "--initial-rate", "inf"]) == 1
    assert not out.exists()
    assert main(["average", str(out), *paths, *bounds]) == 0
    before = out.read_bytes()
    assert main(["average", str(out), paths[0]]) == 1  # as who forgets to say where to
    assert "is there already, and it is a file to write: give --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    loaded = load_pretrained(out)
    assert (loaded.config.drift_rise, loaded.card["initial_rate"], loaded.card["seed"]) == (4, 2e-4, 1)
    assert [one["name"] for one in loaded.card["averaged"]] == ["0", "1"]
    assert main(["average", str(out), paths[0], "--overwrite", "--bounds", '{"drift_up": 4}']) == 1
    seen = [save_pretrained(rules[0], tmp_path / f"{net}.safetensors", {"looked_at": {"nets": [net]}}) for net in "ab"]
    assert main(["average", str(out), *map(str, seen), "--overwrite", "--looked-at", '{"vision": ["c"]}']) == 0
    assert read_card(out)["looked_at"] == {"nets": ["a", "b"], "vision": ["c"]}
    exported = str(save_pretrained(rules[0], tmp_path / "exported.safetensors", {"run": "1", "seed": 7}))
    assert main(["average", str(out), exported, "--small", exported, "--overwrite"]) == 0
    cards = [read_card(out), read_card(tmp_path / "mean-small.safetensors")]
    assert [(card["seed"], "run" in card) for card in cards] == [(7, False)] * 2  # no fit takes a copy for its own
    assert main(["average", str(out), paths[0], "--overwrite", "--bounds", '{"timescales": 4, "warm_up": 0.1}']) == 0
    assert (load_pretrained(out).config.warm_up, load_pretrained(out).config.timescales) == (0.1, 4)
