"""The classifier's own optimizers: the usual baselines with their usual schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

OptimizerName = Literal["adamw", "adam", "rmsprop", "rmsprop_tf", "sgd"]


def rmsprop_tf(params: Iterable[Any], **options: Any) -> Optimizer:
    """Build TensorFlow's RMSProp, whose epsilon lies inside the root and whose mean square starts at one."""
    from timm.optim.rmsprop_tf import RMSpropTF

    return RMSpropTF(params, **options)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "rmsprop": RMSprop,
    "rmsprop_tf": rmsprop_tf,
    "sgd": SGD,
}


def build_baseline(net: nn.Module, name: str, weight_decay: float | None, **options: Any) -> Optimizer:
    """Build a baseline optimizer for all parameters of a net.

    Args:
        net: The net.
        name: One of `OPTIMIZERS`.
        weight_decay: Decay of the weights of convolutions and linear layers; biases and norms, whose tensors
            have one dimension, are spared. None means torch's default, for all parameters alike.
        options: Passed on to the optimizer's constructor.

    Returns:
        The optimizer; under a weight decay its param groups are named `decayed` and `spared`.

    Example:
        >>> optimizer = build_baseline(nn.Linear(3, 2), "sgd", weight_decay=1e-4, lr=0.1)
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('decayed', 0.0001), ('spared', 0.0)]
    """
    params = [param for param in net.parameters() if param.requires_grad]
    if weight_decay is None:
        return OPTIMIZERS[name](params, **options)
    decayed = [param for param in params if param.dim() > 1]
    spared = [param for param in params if param.dim() <= 1]
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "spared", "params": spared, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]], **options)


def rate_factor(
    step: int,
    warmup_steps: int,
    total_steps: int | None = None,
    decay_steps: float | None = None,
    decay_rate: float = 0.1,
) -> float:
    """Return the learning rate at a step as a multiple of the base rate.

    Args:
        step: Number of steps done.
        warmup_steps: Steps of linear growth, the first of which already moves: (step + 1) / warmup_steps.
        total_steps: Steps of the whole run, for a cosine from 1 after the warm-up to 0 at the end; None for
            no cosine.
        decay_steps: Steps between two decays, for a staircase that counts the warm-up too; None for none.
        decay_rate: What each decay multiplies by.

    Example:
        >>> [round(rate_factor(step, warmup_steps=2, total_steps=6), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
        >>> [rate_factor(step, warmup_steps=0, decay_steps=2, decay_rate=0.5) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is not None:
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 if decay_steps is None else decay_rate ** (step // decay_steps)
