"""Numbers of parameters in a checkpoint: by the module's order, whatever the order of the optimizer's param groups.

A state says by numbers which parameter it is of. Torch counts through the param groups; `ModelParallelStrategy` reads
and writes places in `module.parameters()`, and sorts each group by them. Where a group lists its parameters in another
order, each would give the state of one parameter to another, silently if they have the same shape. Numbers that are the
module's, in the optimizer's order, are read right by both: torch goes by the place in the groups alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def number_by_module(state: dict[str, Any], optimizer: Optimizer, module: nn.Module, numbered: bool) -> None:
    """Let a saved state of an optimizer name each parameter by its place in the module's parameters, in place.

    Args:
        state: as it is to be written; one whose parameters are named by strings, or another rank writes, stays as it
            is, and so does one of parameters that the module does not have.
        optimizer: the one it is of.
        module: what a strategy would number the parameters of.
        numbered: whether the numbers are the module's already, and their order alone is not the optimizer's.
    """
    places = {param: place for place, param in enumerate(module.parameters())}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    saved = [number for group in state.get("param_groups", []) for number in group["params"]]
    if len(saved) != len(params) or not places.keys() >= set(params) or any(isinstance(one, str) for one in saved):
        return
    if not numbered:
        new = {number: places[param] for number, param in zip(saved, params, strict=True)}
        state["state"] = {new[number]: values for number, values in state["state"].items()}
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group["params"] = [places[param] for param in own["params"]]
