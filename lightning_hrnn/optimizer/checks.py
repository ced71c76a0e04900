"""What `HRNN` refuses, each with its cause and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.optimizer.sharding import local, why_unsupported
from lightning_hrnn.optimizer.state import FALLBACK_LR, OPTIONAL_KEYS, STATE_KEYS, note_of

LARGEST_LOG_RATE = 100.0  # beyond what a float holds
MEND = "Resume from an earlier one."


def check_group(group: dict[str, Any]) -> None:
    """Refuse numbers out of range and parameters for which the rule is not defined."""
    if math.isnan(group["lr"]):
        raise ValueError(
            "lr must be a number: with rate='given' it is the rate itself, 1e-3 perhaps, without a default."
        )
    check_numbers(group)
    for index, param in enumerate(group["params"]):
        if param.is_complex():
            raise ValueError(
                f"Parameter {index} of shape {list(param.shape)} is complex, and the rule is defined for real "
                "numbers. Optimize torch.view_as_real of it, or give it to another optimizer."
            )
        if reason := why_unsupported(param):
            raise ValueError(
                f"Parameter {index} of shape {list(param.shape)} {reason}, or give it to another optimizer."
            )


def check_numbers(group: dict[str, Any]) -> None:
    """Refuse numbers of a group that are out of range."""
    for key in ("lr", "weight_decay"):
        if not 0 <= float(group[key]) < math.inf:
            raise ValueError(f"{key} must be zero or more, not {group[key]}.")
    rate = group["initial_rate"]
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"initial_rate must be positive, not {rate}.")


def check_gradient(index: int, param: Tensor) -> None:
    """Refuse a sparse gradient."""
    if param.grad is not None and param.grad.layout != torch.strided:
        raise RuntimeError(
            f"The gradient of parameter {index} of shape {list(param.shape)} is sparse, and HRNN needs "
            "dense ones. Build the embedding with sparse=False, or give this parameter to "
            "torch.optim.SparseAdam."
        )


def check_one_device(params: Sequence[Tensor]) -> None:
    """Refuse to step parameters of several devices together."""
    if len(devices := {str(param.device) for param in params}) > 1:
        raise RuntimeError(
            f"The parameters lie on several devices, {sorted(devices)}, and an HRNN steps those of one: give the "
            "parameters of each device an optimizer of their own."
        )


def check_kind(state_dict: dict[str, Any]) -> None:
    """Refuse what is not the state of an `HRNN`."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"This is not an optimizer's state: it has the keys {sorted(map(str, state_dict))}.")
    states, groups = state_dict["state"], state_dict["param_groups"]
    maps = [states, *states.values()] if isinstance(states, dict) else [states]
    maps += groups if isinstance(groups, list) else [groups, None]
    if not all(isinstance(part, dict) for part in maps) or not all("params" in group for group in groups):
        raise ValueError(
            "This is no optimizer's state, or a damaged one: it must hold a dict for each parameter and a list of "
            f"groups, dicts with 'params'. {MEND}"
        )
    if not isinstance(note := note_of(state_dict), dict):
        raise ValueError(f"The note in the saved state is {note!r}: the checkpoint is damaged. {MEND}")
    if not isinstance(skipped := note.get("skipped_steps", 0), int) or skipped < 0:
        raise ValueError(f"The saved state says that {skipped!r} steps were skipped: it is damaged. {MEND}")
    if FALLBACK_LR in note:
        raise ValueError(
            "This state is AdamW's, to which HRNN had fallen back. Go on from it with HRNNWithFallback, in Lightning "
            "by HRNNOptimizerCallback(on_divergence='adamw')."
        )
    for index, state in states.items():
        missing = [key for key in STATE_KEYS if key not in state]
        foreign = sorted(str(key) for key in state if key not in (*STATE_KEYS, *OPTIONAL_KEYS))
        if missing or foreign:
            raise ValueError(
                f"This is not the state of HRNN: parameter {index} has {sorted(map(str, state))}, of which HRNN does "
                f"not know {foreign}, and lacks {missing}. It looks like another optimizer's; load it into that one, "
                "or start HRNN without it."
            )
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = f"of type {value.dtype}" if isinstance(value, Tensor) else f"no tensor but {value!r}"
                raise ValueError(f"The saved {key} is {what}: the checkpoint is damaged. {MEND}")
    if any("initial_rate" not in group for group in groups):  # SGD's state may be empty
        raise ValueError(
            "This is not the state of HRNN: its param groups have no initial_rate. It looks like another optimizer's; "
            "load it into that one, or start HRNN without it."
        )
    for index, group in enumerate(groups):
        try:
            check_numbers(group)
        except (KeyError, TypeError, ValueError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"Group {index} of the saved state cannot be used: {why}") from error


def check_members(saved: Collection[Any], known: Sequence[Any]) -> None:
    """Refuse a saved state that has not just the parameters that its groups name.

    Args:
        saved: which parameters have a state.
        known: which the groups name.
    """
    if lacking := [index for index in known if index not in saved]:
        raise ValueError(f"The saved state lacks that of the parameters {lacking}: the checkpoint is damaged. {MEND}")
    if strange := sorted(map(str, set(saved) - set(known))):
        raise ValueError(
            f"The saved state has that of parameters {strange}, which no group of it names: the checkpoint is damaged. "
            f"{MEND}"
        )


def check_fit(param: Tensor, state: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Refuse a saved state of other shapes, with other parts than these weights keep, or with values not finite."""
    if saved and (lacking := sorted(state.keys() - saved.keys())):
        raise ValueError(
            f"The saved state lacks {lacking}, which these weights need: it was made with others. Build the optimizer "
            "with the weights it was saved with."
        )
    if state and (strange := sorted(saved.keys() - state.keys())):  # Lightning's finetuning adds groups without state
        raise ValueError(
            f"The saved state has {strange}, which these weights do not keep: it was made with others. Build the "
            "optimizer with the weights it was saved with."
        )
    for key, value in state.items():
        if key in saved and saved[key].shape != value.shape:
            raise ValueError(
                f"The saved {key} has shape {list(saved[key].shape)} where a parameter of shape "
                f"{list(param.shape)} needs {list(value.shape)}: the model or the weights differ from those saved."
            )
        if key in saved and not local(saved[key]).isfinite().all():
            raise ValueError(
                f"The saved {key} of a parameter of shape {list(param.shape)} has values that are not finite, which "
                f"HRNN never writes: the checkpoint is damaged. {MEND}"
            )
    if "square" in saved and (local(saved["square"]) < 0).any():
        raise ValueError(f"The saved square has values below zero: the checkpoint is damaged. {MEND}")
    if "log_rate" in saved and (local(saved["log_rate"]).abs() > LARGEST_LOG_RATE).any():
        raise ValueError(f"The saved log_rate is beyond {LARGEST_LOG_RATE:g}: the checkpoint is damaged. {MEND}")
