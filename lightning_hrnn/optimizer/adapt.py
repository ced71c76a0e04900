"""A saved state, made with other weights, in the form that an optimizer with its own weights can go on from.

What the gradients left behind means the same to every rule: averages, peaks, the learned rates, the ages. A hidden
state is the private language of the weights that wrote it, so it starts anew.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hrnn.optimizer.state import GRADIENT_SIZE, LOG_PEAK, NOTE, note_of

OtherWeights = Literal["refuse", "adapt"]
CARRIED = ("average", "square", "log_rate", "age", LOG_PEAK, GRADIENT_SIZE)


def adapt_state(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `saved` with the hidden states, and the note of the weights, of `own`.

    Args:
        saved: the `state_dict` of an `HRNN` with other weights.
        own: the `state_dict` of a new `HRNN` over the same parameters.

    Raises:
        ValueError: the state of a tensor has no counterpart, so it is of another model.
    """
    ids = dict(zip(_ids(saved), _ids(own), strict=False))  # in order of parameters: saved ones may be names
    if strangers := sorted(map(str, saved["state"].keys() - ids.keys())):
        raise ValueError(f"The saved state has parameters that this optimizer has not: {strangers}. The model differs.")
    state = {}
    for index, values in saved["state"].items():
        state[index] = carried(values, own["state"][ids[index]])
    skipped = note_of(saved).get("skipped_steps", 0)
    return {**saved, "state": state, NOTE: {**own[NOTE], "skipped_steps": skipped}}


def carried(values: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a tensor for other weights: what means the same to every rule, and the rest of a new one's.

    Args:
        values: its state so far.
        fresh: its state as these weights begin it.
    """
    state = {**fresh, **{key: values[key] for key in CARRIED if key in values and key in fresh}}
    state["square"] = _with_rows(state["square"], len(fresh["square"]))
    return state


def _with_rows(square: Tensor, rows: int) -> Tensor:
    """Let a long average of squares begin with what its first average is, or leave it out.

    Args:
        square: mean squares of the averages, with a long one or without. [S, ...] or [S + 1, ...]
        rows: how many are needed.
    """
    if square.shape[:1] == (rows - 1,):
        return torch.cat([square, square[:1]])
    return square[:rows] if square.shape[:1] == (rows + 1,) else square


def _ids(state_dict: dict[str, Any]) -> list[Any]:
    return [index for group in state_dict["param_groups"] for index in group["params"]]
