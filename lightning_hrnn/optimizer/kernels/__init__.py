"""The deployment step, fused or not: one interface, chosen at run time.

A step of `HRNN` has two passes over the parameters, because a direction is divided by its root mean square over the
whole tensor. `measure` takes every parameter's step and sums over tensors; `apply` moves the parameters. Between them
the sums of all tensors are at hand in one small buffer, which is also where sharded training adds up its shards.

Legend: `T` tensors of one call, `R` readouts, `H0` param hidden size, `F` features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_hrnn.optimizer.features import LongScale
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine


class TensorWork(NamedTuple):
    """Hold one parameter tensor and its state, which a kernel updates in place."""

    param: Tensor  # [...]
    grad: Tensor  # [...]
    hidden: Tensor  # [H0, ...]
    average: Tensor  # [S, ...]
    square: Tensor  # [S, ...] or [S + 1, ...], see `RuleConfig.squares`
    log_rate: Tensor  # [...] for a rule with a rate of each parameter, else a scalar that kernels leave alone
    lookahead: Tensor | None  # [...] with attention: subtract it from the parameter to get the attended point
    lr: float  # multiplier of the learned rate
    weight_decay: float


class FromAbove(NamedTuple):
    """Hold what the levels above say to each tensor."""

    bias: Tensor  # [3 H0, T] on the gates of the param RNN
    log_rate: Tensor  # [T] of the tensor (or its mean)
    mean_log_rate: Tensor  # [T] of the model
    remembers: Tensor  # [T] 0 at a tensor's first step, else 1
    long_scale: LongScale | None = None  # where the rule has a `scale_memory`
    proceed: Tensor | None = None  # [] false where a gradient is not finite: nothing changes then; `None` is true

    def part(self, tensors: slice) -> FromAbove:
        """Return what is said to some of the tensors."""
        said = (self.bias, self.log_rate, self.mean_log_rate, self.remembers)
        bias, log_rate, mean_log_rate, remembers = (value[..., tensors] for value in said)
        long_scale = self.long_scale and LongScale(*(value[tensors] for value in self.long_scale))
        return FromAbove(bias, log_rate, mean_log_rate, remembers, long_scale, self.proceed)


class Sums(NamedTuple):
    """Hold sums over the parameters of each tensor."""

    pooled: Tensor  # [H0 + F, T] of hidden states and inputs
    squares: Tensor  # [R, T] of directions
    param_square: Tensor  # [T] of the parameters before the step


def where(proceed: Tensor | None, after: Tensor, before: Tensor) -> Tensor:
    """Return what a step makes, or what was before if it does not proceed, as the device finds out by itself."""
    return after if proceed is None else torch.where(proceed, after, before)


class StepKernel(Protocol):
    """Take one step of some tensors, all on one device, in two passes."""

    def measure(self, rule: HierarchicalRNN, work: Sequence[TensorWork], above: FromAbove) -> tuple[Sums, Any]:
        """Update the states in place; return sums over tensors and what `apply` needs."""

    def apply(self, work: Sequence[TensorWork], pending: Any, inverse_rms: Tensor, limits: Tensor) -> None:
        """Move the parameters (and lookaheads) by steps scaled and then limited, decaying weights.

        Args:
            work: the tensors, in order.
            pending: what `measure` left.
            inverse_rms: what steps are multiplied by before their rate. [R, T]
            limits: how far a parameter may move, before the multiplier `TensorWork.lr`. [R, T]
        """


def available_kernels() -> dict[str, str]:
    """Say of each kernel `"available"`, or why this machine cannot run it."""
    from lightning_hrnn.optimizer.kernels import cpp, triton

    return {
        "eager": "available",
        "cpp": cpp.why_unavailable() or "available",
        "triton": triton.why_unavailable() or "available",
    }


KERNELS = ("auto", "eager", "cpp", "triton")


def check_kernel(name: str) -> None:
    """Refuse a name that no kernel has.

    Raises:
        ValueError: there is no such kernel.
    """
    if name not in KERNELS:
        raise ValueError(f"Unknown kernel {name!r}: choose from {list(KERNELS)}.")


def choose_kernel(name: str, rule: HierarchicalRNN, device_type: str) -> StepKernel:
    """Return the named kernel, or with `"auto"` the fastest one that can run the rule on the device.

    A kernel that cannot be had falls back to the eager one; asked for by name, it warns.

    Raises:
        ValueError: no kernel has that name.
    """
    from lightning_hrnn.optimizer.kernels import cpp
    from lightning_hrnn.optimizer.kernels.eager import EagerKernel

    check_kernel(name)
    if name == "triton" or (name == "auto" and device_type == "cuda"):
        from lightning_hrnn.optimizer.kernels import triton

        if name == "triton" or not (triton.why_unavailable() or triton.why_unsupported(rule)):
            return triton.kernel()  # which warns itself, when it knows the tensors
    if name == "eager" or (name == "auto" and device_type != "cpu"):
        return EagerKernel()
    reason = cpp.why_unavailable() or cpp.why_unsupported(rule)
    if device_type != "cpu":
        reason = f"It runs on the CPU, not on {device_type}."
    if reason is None:
        return cpp.CppKernel()
    if name == "cpp":
        warnings.warn(f"The kernel 'cpp' cannot be had: {reason} The eager one runs instead.", stacklevel=3)
    return EagerKernel()


def choose_engine(name: str, rule: HierarchicalRNN) -> ParamLevelEngine | None:
    """Return the named differentiable param level for meta-training; `None` stands for the rule's own.

    Raises:
        ValueError: no engine has that name, or it cannot run here.
    """
    if name not in ("auto", "eager", "cpp"):
        raise ValueError(f"Unknown engine {name!r}: choose from ['auto', 'eager', 'cpp'].")
    if name == "eager":
        return None
    from lightning_hrnn.optimizer.kernels import cpp

    reason = cpp.why_unavailable() or cpp.why_unsupported(rule)
    if reason and name == "cpp":
        raise ValueError(f"The engine 'cpp' cannot run here: {reason} Choose 'eager', or 'auto'.")
    return None if reason else cpp.param_level
