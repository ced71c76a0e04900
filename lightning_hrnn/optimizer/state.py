"""What `HRNN` remembers of each parameter tensor, in `optimizer.state[p]`: how it begins, and how it is saved.

All in single precision unless `state_dtype` says otherwise:

=============== =============== ================================================
`hidden`        `[H0, *shape]`  param RNN
`average`       `[S, *shape]`   gradient averages
`square`        `[S, *shape]`   mean squares of the averages; one more of rules with a long memory of scales
`log_rate`      `[]`            log of the learned rate (`[*shape]` for a rule with a rate of each parameter)
`tensor_hidden` `[H1]`          tensor RNN
`global_hidden` `[H2]`          global RNN: one for the model, repeated with each tensor
`age`           `[]`            steps this tensor has taken
`lookahead`     `[*shape]`      with attention only: true weights less the attended ones
`log_peak`      `[]`            of rules that ask for it only: log of the largest recent gradient
`gradient_size` `[3]`           likewise: mean squares of late, for long; steps
=============== =============== ================================================

What has `shape` in it is sharded as the parameter is, see `sharding`; the rest is whole, and equal, on every rank.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.rule_state import GRAD_RMS_FLOOR
from lightning_hrnn.optimizer.sharding import converted, local, sharded_like

STATE_DTYPES = (torch.float32, torch.bfloat16)
STATE_KEYS = ("hidden", "average", "square", "log_rate", "tensor_hidden", "global_hidden", "age")
LOOKAHEAD = "lookahead"
LOG_PEAK = "log_peak"
GRADIENT_SIZE = "gradient_size"
OPTIONAL_KEYS = (LOOKAHEAD, LOG_PEAK, GRADIENT_SIZE)
NOTE = "hrnn"  # of a saved state: the weights it belongs to, and the steps skipped
FALLBACK_LR = "fallback_lr"  # in that note: the state is AdamW's, which the optimizer fell back to


def initial_state(
    param: Tensor, rule: HierarchicalRNN, log_rate: float, global_hidden: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    config, shard = rule.config, local(param.detach())

    def rows(count: int) -> Tensor:
        return torch.zeros((count, *shard.shape), dtype=dtype, device=shard.device)

    hidden = rows(config.param_hidden)
    hidden += rule.param_rnn.initial.view(-1, *[1] * shard.dim())
    one: dict[str, Any] = {"dtype": torch.float32, "device": shard.device}  # whatever torch's default type is
    rates = torch.full(shard.shape if rule.rate_per_param else (), log_rate, **one)
    state = {
        "hidden": sharded_like(param, hidden),
        "average": sharded_like(param, rows(config.timescales)),
        "square": sharded_like(param, rows(config.squares)),
        "log_rate": sharded_like(param, rates) if rule.rate_per_param else rates,
        "tensor_hidden": rule.tensor_rnn.initial.clone(),
        "global_hidden": global_hidden,
        "age": torch.zeros((), **one),
    }
    if "attention" in config.readouts:
        state[LOOKAHEAD] = sharded_like(param, torch.zeros_like(shard, memory_format=torch.contiguous_format))
    if rule.rate_by_peak is not None:
        state[LOG_PEAK] = torch.full((), math.log(GRAD_RMS_FLOOR), **one)
    if config.knows_trend:
        state[GRADIENT_SIZE] = torch.zeros(3, **one)
    return state


def loaded_state(saved: dict[str, Any], fresh: dict[str, Tensor]) -> dict[str, Any]:
    """Copy a saved state to where, in the precision and in the shards that a fresh one is kept."""
    return {
        key: converted(value, fresh[key]) if isinstance(value, Tensor) and key in fresh else deepcopy(value)
        for key, value in saved.items()
    }


def note_of(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the note of a saved state, empty if it has none.

    It stands beside the state and in its first group: `torch.distributed.checkpoint` keeps nothing but groups.
    """
    groups = state_dict.get("param_groups") or [{}]
    note: dict[str, Any] = state_dict.get(NOTE) or groups[0].get(NOTE) or {}
    return note
