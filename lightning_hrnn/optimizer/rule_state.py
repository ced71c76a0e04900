"""What the rule remembers between steps.

Legend: `P` scalar parameters, `T` tensors, `M` models, `S` timescales, `H0 H1 H2` hidden sizes of the param, tensor and
global level.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_hrnn.optimizer.features import Layout

GRAD_RMS_FLOOR = 1e-15


class RuleState(NamedTuple):
    """Hold what the rule remembers between steps."""

    hidden: Tensor  # [H0, P]
    average: Tensor  # [S, P] gradient averages
    square: Tensor  # [S, P] mean squares of the averages; [S + 1, P] with a `scale_memory`
    log_rate: Tensor  # [T] (bounded) or [P] (smoothed)
    tensor_hidden: Tensor  # [H1, T]
    global_hidden: Tensor  # [H2, M]
    age: Tensor  # [T] steps taken
    log_peak: Tensor  # [T] log of the largest recent gradient, see `BoundedRate.peak`
    run_length: Tensor  # [T] steps of the run at whose end rates will have cooled down to zero; 0 where nobody knows
    gradient_size: Tensor  # [3, T] mean squares of late and for long, and over how many steps, see `averaged_sizes`

    def detach(self) -> RuleState:
        """Cut the state from the graph that made it."""
        return RuleState(*(value.detach() for value in self))


def progress(state: RuleState) -> Tensor:  # -> [T]
    """Say how much of a run is over, from 0 to 1; 0 where nobody knows how long it is, or it went on for longer."""
    return state.age / state.run_length.clamp(min=1.0) * (state.age < state.run_length)


def tensor_log_rate(state: RuleState, layout: Layout) -> Tensor:
    """Return the log rate of each tensor: its own, or the mean of its parameters'. [T]"""
    own = state.log_rate.shape == state.age.shape
    return state.log_rate if own else layout.mean_per_tensor(state.log_rate)
