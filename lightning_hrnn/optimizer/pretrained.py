"""Save and load meta-parameters, with the card that says how they came about.

A file `NAME.safetensors` holds the tensors, `NAME.json` beside it the card: the rule's configuration, the corpus, the
length of the meta-training, an evaluation, and the checksum of the tensors' file. Shipped weights lie in `weights/`.
A card may name other weights beside it for models of few parameters, as `SMALL_KEYS` says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, SmallModels
from lightning_hrnn.optimizer.rates import BoundedRate

DEFAULT_WEIGHTS = "hrnn-v11"
WEIGHTS_FOLDER = Path(__file__).parent / "weights"
CARD_KEYS = {"config": dict, "sha256": str}
SMALL_KEYS = {"below": int, "weights": str, "sha256": str}  # parameters; name of a file beside it; its checksum
FIRST_RATE = 1e-3  # where a card says none
POSITIVE_KEYS = ("initial_rate", "horizon")  # of a card, where it has them
RESULT_KEYS = {"net": str, "regret": int | float, **dict.fromkeys(("steps", "hrnn", "tuned_adam"), list)}


class WeightsError(ValueError):
    """Say that weights are unknown, damaged, or not of this package."""


def available_weights() -> list[str]:
    """List the names of the shipped weights.

    Example:
        >>> DEFAULT_WEIGHTS in available_weights()
        True
    """
    names = (path.stem for path in WEIGHTS_FOLDER.glob("*.safetensors"))
    return sorted(names, key=lambda name: (len(name), name))  # v9 before v10


def load_pretrained(weights: str | Path = DEFAULT_WEIGHTS) -> HierarchicalRNN:
    """Load a rule; its card is the attribute `card`, and the rule for small models that the card may name `small`.

    Args:
        weights: name of shipped weights, or path of a `.safetensors` file with its card beside it.

    Raises:
        WeightsError: there are no such weights, the file differs from its card's checksum, or is not a rule; or so it
            is with the weights for small models.

    Example:
        >>> load_pretrained().card["name"]
        'hrnn-v11'
    """
    path = _find(weights)
    card = read_card(path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != card["sha256"]:
        raise WeightsError(
            f"{path} is damaged: its checksum is {digest[:12]}..., its card says {card['sha256'][:12]}... "
            "Install the package again, or fetch the file again from where it came."
        )
    try:
        rule = HierarchicalRNN(RuleConfig(**card["config"])).float()  # whatever torch's default type is
        rule.load_state_dict(load(content))
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} does not hold the rule that its card describes ({_first_line(error)}). It may come from another "
            "version of lightning-hrnn: use the version that its card names."
        ) from error
    if not all(bool(value.isfinite().all()) for value in rule.parameters()):
        raise WeightsError(f"{path} holds values that are not finite. Export it again from a sound checkpoint.")
    rule.card = card
    if "small" in card:
        small = _load_small(path, card["small"])
        _check_pair(rule, small)
        rule.small = SmallModels(card["small"]["below"], small)
    return rule.eval()


def _load_small(path: Path, named: dict[str, Any]) -> HierarchicalRNN:
    """Load the weights for small models that the card of those at `path` names."""
    beside = path.parent / f"{named['weights']}.safetensors"
    mend = (
        f"{path.stem} uses it for models of fewer than {named['below']:,} parameters: copy it there, or take 'small' "
        "out of its card."
    )
    if beside.parent != path.parent or not beside.is_file():
        raise WeightsError(f"There is no weights file {beside} beside {path.name}. {mend}")
    card = read_card(beside)
    if card["sha256"] != named["sha256"]:
        raise WeightsError(f"{beside} is another one than the card of {path.stem} means, by its checksum. {mend}")
    if "small" in card:
        raise WeightsError(f"{beside} is for small models and names yet others itself: take 'small' out of its card.")
    return load_pretrained(beside)


def _check_pair(rule: HierarchicalRNN, small: HierarchicalRNN) -> None:
    """Refuse rules between which no model can grow: what their states keep of gradients and rates must be alike."""
    if small.small is not None:
        raise WeightsError("The weights for small models name yet others themselves: take those alone.")
    for field in ("timescales", "rate"):
        if (one := getattr(rule.config, field)) != (other := getattr(small.config, field)):
            raise WeightsError(
                f"The weights for small models have {field} {other!r}, those for larger ones {one!r}: a model that "
                "grows past the bound could not go on."
            )


def read_card(weights: str | Path = DEFAULT_WEIGHTS) -> dict[str, Any]:
    """Read the card of weights.

    Raises:
        WeightsError: there is no card, or it is not one.
    """
    path = _find(weights).with_suffix(".json")
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(
            f"{path.with_suffix('.safetensors')} has no card: {path.name} should lie beside it."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not a card ({_first_line(error)}).") from error
    if missing := _missing(card, CARD_KEYS):
        raise WeightsError(f"{path} is not a card: it lacks {missing}, or what it has there is of another kind.")
    for key in POSITIVE_KEYS:
        if not _is_positive(value := card.get(key, 1)):
            raise WeightsError(f"{path} is damaged: {key!r} must be a positive number, not {value!r}. Export it again.")
    if not _are_results(card.get("evaluation", [])):
        raise WeightsError(
            f"{path} is damaged: 'evaluation' must list networks, each with {sorted(RESULT_KEYS)}. Export it again, or "
            "leave 'evaluation' out."
        )
    small = card.get("small", {"below": 1, "weights": "", "sha256": ""})
    if _missing(small, SMALL_KEYS) or not _is_positive(small["below"]):
        raise WeightsError(
            f"{path} is damaged: 'small' must name weights for small models by {sorted(SMALL_KEYS)}, the first a "
            "number of parameters. Export it again, or leave 'small' out."
        )
    if not _names_tasks(card.get("looked_at", {})):
        raise WeightsError(f"{path} is damaged: 'looked_at' must list names of tasks for each suite. Export it again.")
    return card


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _names_tasks(value: Any) -> bool:
    """Tell whether a value lists names, those of each suite."""
    return isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    )


def _missing(value: Any, kinds: dict[str, Any]) -> list[str]:
    """Return the keys that a value lacks, or has as something of another kind."""
    return [key for key, kind in kinds.items() if not isinstance(value, dict) or not isinstance(value.get(key), kind)]


def _are_results(evaluation: Any) -> bool:
    """Tell whether a value lists results of validation runs, whose losses were taken at the same steps."""
    if not isinstance(evaluation, list):
        return False
    return all(
        not _missing(row, RESULT_KEYS)
        and len(row["hrnn"]) == len(row["tuned_adam"]) == len(row["steps"]) == len(evaluation[0]["steps"])
        for row in evaluation
    )


def first_rate(rule: HierarchicalRNN) -> float:
    """Return the first learned rate that the card of a rule asks for, or that of a rule without one."""
    return float(rule.card.get("initial_rate", FIRST_RATE))


FAR = 10  # times the horizon of weights: a run as long as that is worth a warning


def horizon(card: dict[str, Any]) -> float:
    """Return the longest run, in steps, that weights were meta-trained on; infinite where their card does not say."""
    return float(card.get("horizon", math.inf))


def save_pretrained(rule: HierarchicalRNN, path: str | Path, card: dict[str, Any]) -> Path:
    """Write a rule and its card, completing the card with name, configuration and checksum.

    The rule for small models that it may have is written beside it, as `small_beside` says.

    Args:
        rule: what to save.
        path: of the `.safetensors` file; the card lies beside it.
        card: how the weights came about; values must be plain.

    Returns:
        The path of the tensors' file.

    Raises:
        ValueError: the path has another suffix, or the card says what could not be loaded.
        WeightsError: a model could not grow from the rule for small models to this one.
    """
    path = Path(path)
    files = _files(rule, path, card)
    parts = {file: file.with_suffix(file.suffix + ".part") for file in files}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for file, data in files.items():
            parts[file].write_bytes(data)
        for file, part in parts.items():  # one right after the other, all whole: one without the others is of no use
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return path


def _files(rule: HierarchicalRNN, path: Path, card: dict[str, Any]) -> dict[Path, bytes]:
    """Return what the files of a rule hold: tensors, card, and those of the rule for small models."""
    if path.suffix != ".safetensors":
        raise ValueError(f"Weights are saved as .safetensors, not {path.suffix or 'without a suffix'}: {path}.")
    for key in POSITIVE_KEYS:
        if not _is_positive(value := card.get(key, 1)):
            raise ValueError(f"{key} must be positive and finite, not {value!r}: such weights could not be loaded.")
    looked_at(card)
    content = save({name: value.detach().float().cpu().contiguous() for name, value in rule.state_dict().items()})
    full = {
        "name": path.stem,
        **card,
        "config": rule.config.to_dict(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    full.pop("small", None)  # of the weights that it was made from
    others: dict[Path, bytes] = {}
    if rule.small is not None:
        _check_pair(rule, rule.small.rule)
        beside = small_beside(path)
        others = _files(rule.small.rule, beside, inherited(rule.small.rule.card))
        digest = hashlib.sha256(others[beside]).hexdigest()
        full["small"] = {"below": rule.small.below, "weights": beside.stem, "sha256": digest}
    return {**others, path: content, path.with_suffix(".json"): (json.dumps(full, indent=2) + "\n").encode()}


def set_aside(path: Path) -> Path | None:
    """Rename weights and their card, so that others can be written where they are.

    Args:
        path: of a `.safetensors` file, which need not be there.

    Returns:
        Its new path, `NAME-before-1.safetensors` or the next number that is free; None if there is nothing.
    """
    if not path.exists():
        return None
    numbered = (path.with_name(f"{path.stem}-before-{number}{path.suffix}") for number in itertools.count(1))
    kept = next(other for other in numbered if not other.exists() and not other.with_suffix(".json").exists())
    for file in (path, path.with_suffix(".json")):
        if file.exists():
            file.rename(kept.with_suffix(file.suffix))
    return kept


def inherited(card: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says that holds for a copy as well: all but the file's name and the run that wrote it."""
    return {key: value for key, value in card.items() if key not in ("name", "run")}


def looked_at(*cards: dict[str, Any]) -> dict[str, list[str]]:
    """Return which tasks of each suite had a part in choosing any of some weights.

    Raises:
        ValueError: a card names them in another form.

    Example:
        >>> looked_at({"looked_at": {"nets": ["gru"]}}, {}, {"looked_at": {"nets": ["lstm", "gru"]}})
        {'nets': ['gru', 'lstm']}
    """
    found: dict[str, list[str]] = {}
    for card in cards:
        named = card.get("looked_at", {})
        if not _names_tasks(named):
            raise ValueError(
                f"looked_at lists names of tasks for each suite, such as {{'nets': ['gru']}}, not {named!r}."
            )
        for suite, tasks in named.items():
            found[suite] = [*dict.fromkeys([*found.get(suite, []), *tasks])]
    return found


def small_beside(path: Path) -> Path:
    """Return where the weights for small models are written that belong to those at a path.

    Example:
        >>> small_beside(Path("runs/mine.safetensors")).name
        'mine-small.safetensors'
    """
    return path.with_name(f"{path.stem}-small{path.suffix}")


def average_weights(rules: Sequence[HierarchicalRNN], changes: dict[str, Any] | None = None) -> HierarchicalRNN:
    """Return a rule whose meta-parameters are the means of those of others.

    Parts that the changed configuration does without, such as attention, are left out.

    Args:
        rules: at least one, of the same meta-parameters; the configuration is the last one's.
        changes: fields of that configuration to replace; all in which the rules differ must be among them.

    Raises:
        ValueError: the rules, or the changes, are of different shapes, a field is unknown, or the rules differ in one
            that is not replaced.
    """
    states = [rule.state_dict() for rule in rules]
    if not states or any(state.keys() != states[0].keys() for state in states):
        raise ValueError(
            "These rules cannot be averaged: one has parts that another does without. Take checkpoints of one run, or "
            "leave the parts out of each first."
        )
    config, changes = rules[-1].config, changes or {}
    wanted = config.changed(**changes)
    others = [rule.config.to_dict() for rule in rules]
    differing = {key for one in others for key, value in one.items() if value != others[-1][key]}
    if unsaid := sorted(differing - changes.keys()):
        raise ValueError(
            f"These rules cannot be averaged as they are: they differ in {unsaid}. Say what the average is to have, by "
            f"--bounds; the last one has { ({key: others[-1][key] for key in unsaid}) }."
        )
    try:
        averaged = HierarchicalRNN(config)
        averaged.load_state_dict({key: torch.stack([s[key] for s in states]).mean(0) for key in averaged.state_dict()})
        averaged = reconfigured(averaged, wanted)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"These rules cannot be averaged ({_first_line(error)}): take checkpoints of one run, and change only "
            "bounds, such as drift_rise, or leave parts out."
        ) from error
    return averaged.eval()


def reconfigured(rule: HierarchicalRNN, config: RuleConfig) -> HierarchicalRNN:
    """Return a rule of another configuration with the meta-parameters of a given one.

    What rates are read from is matched by name. Inputs that are new to the rule begin without a say, and other parts
    that it did without begin as in a new rule, attention as a copy of its direction. Parts of the configuration's own
    that may be left out are attention, what rates are read from, slowing down, annealing and the long memory of scales.

    Raises:
        RuntimeError: the configuration needs meta-parameters of other shapes.
    """
    changed, old = HierarchicalRNN(config), rule.config
    values = {key: value for key, value in rule.state_dict().items() if not _left_out(key, config)}
    if isinstance(changed.rate, BoundedRate) and isinstance(rule.rate, BoundedRate):
        blocks = dict(
            zip(rule.drift_widths, rule.rate.drift.detach().split([*rule.drift_widths.values()]), strict=True)
        )
        widths = changed.drift_widths.items()
        values["rate.drift"] = torch.cat([blocks.get(name, torch.zeros(width, 1)) for name, width in widths])
        if old.first_inputs and config.first_inputs:
            powers = dict(zip(old.first_inputs, rule.rate.first.detach(), strict=True))
            values["rate.first"] = torch.stack([powers.get(name, torch.zeros(1)) for name in config.first_inputs])
    if old.scale_memory and config.scale_memory:
        weights = dict(zip(old.scale_inputs, rule.long_scaling.detach()[1:], strict=True))
        rows = [weights.get(name, torch.zeros(1)) for name in config.scale_inputs]
        values["long_scaling"] = torch.stack([rule.long_scaling.detach()[0], *rows])
    for key, value in changed.state_dict().items():
        values.setdefault(key, values.get(key.replace("directions.attention", "directions.direction"), value))
    changed.load_state_dict(values)
    changed.card = rule.card
    return changed


def _left_out(key: str, config: RuleConfig) -> bool:
    """Tell whether a meta-parameter is of a part that a configuration leaves out."""
    attention = key == "reach" or key.startswith("directions.attention")
    return (
        (attention and "attention" not in config.readouts)
        or (key == "rate.first" and not config.first_inputs)
        or (key == "rate.slowing" and not config.slows)
        or (key == "rate.annealing" and not config.anneals)
        or (key == "rate.slowing_by_length" and not config.slows_by_length)
        or (key == "long_scaling" and not config.scale_memory)
    )


def fingerprint(rule: HierarchicalRNN) -> str:
    """Return a checksum of a rule's configuration and values, whatever file or device they are on.

    Of the configuration, what differs from the default has a part in it: a field that a later version adds changes no
    rule that does without.
    """
    default = RuleConfig().to_dict()
    changes = {key: value for key, value in rule.config.to_dict().items() if value != default[key]}
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode())
    for name, value in sorted(rule.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _find(weights: str | Path) -> Path:
    if not isinstance(weights, str | Path):
        raise WeightsError(f"Weights are a name, one of {available_weights()}, or a path, not {weights!r}.")
    path = Path(weights)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise WeightsError(f"There is no weights file {path}: mend the path, or choose from {available_weights()}.")
        return path
    shipped = WEIGHTS_FOLDER / f"{weights}.safetensors"
    if str(weights) not in available_weights():
        raise WeightsError(
            f"Unknown weights {str(weights)!r}: choose from {available_weights()}, or give the path of a .safetensors "
            "file with its card beside it."
        )
    return shipped


def _first_line(error: Exception) -> str:
    """Return what an error says first; torch names what it could not load in the line after."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
