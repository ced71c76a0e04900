"""Hand-designed optimizers over flat parameters, for many tasks and many learning rates at once.

Legend: `P` parameters of all instances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population

Schedule = Callable[[int, int], float]  # step, steps -> factor on the learning rate


WARM_UP = 0.05  # of all steps


def constant(step: int, steps: int) -> float:
    """Keep the learning rate."""
    return 1.0


def warm_up_cosine(step: int, steps: int) -> float:
    """Raise the learning rate linearly over the first 5 % of the steps, then lower it along a half cosine to zero.

    Example:
        >>> [round(warm_up_cosine(step, 100), 3) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


class HandDesigned(Protocol):
    """A hand-designed update rule over flat parameters."""

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step."""

    def update(self, step: int, theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], lr: Tensor) -> Tensor:
        """Return the next parameters; the state changes in place."""


@dataclass
class Momentum:
    """Stochastic gradient descent with momentum, as torch has it: `v <- m v + g; theta <- theta - lr v`."""

    momentum: float = 0.9

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step."""
        return (torch.zeros_like(theta),)

    def update(self, step: int, theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], lr: Tensor) -> Tensor:
        """Return the next parameters; the state changes in place."""
        (velocity,) = state
        velocity.mul_(self.momentum).add_(grad)
        return theta - lr * velocity


@dataclass
class RMSProp:
    """RMSProp (Tieleman and Hinton 2012) with torch's defaults."""

    smoothing: float = 0.99
    epsilon: float = 1e-8

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step."""
        return (torch.zeros_like(theta),)

    def update(self, step: int, theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], lr: Tensor) -> Tensor:
        """Return the next parameters; the state changes in place."""
        (square,) = state
        square.mul_(self.smoothing).addcmul_(grad, grad, value=1 - self.smoothing)
        return theta - lr * grad / square.sqrt().add_(self.epsilon)


@dataclass
class Adam:
    """Adam (Kingma and Ba 2015) with torch's defaults; with `decay`, AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    decay: float = 0.0

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step."""
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def update(self, step: int, theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], lr: Tensor) -> Tensor:
        """Return the next parameters; the state changes in place."""
        first, second = state
        first.lerp_(grad, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
        scale = (second / (1 - self.betas[1] ** (step + 1))).sqrt_().add_(self.epsilon)
        return theta * (1 - lr * self.decay) - lr / (1 - self.betas[0] ** (step + 1)) * first / scale


class Baseline(NamedTuple):
    """Describe a hand-designed optimizer with its schedule."""

    title: str
    rule: HandDesigned
    schedule: Schedule = warm_up_cosine


BASELINES: dict[str, Baseline] = {
    "sgd": Baseline("SGD, momentum 0.9", Momentum()),
    "rmsprop": Baseline("RMSProp", RMSProp()),
    "adam": Baseline("Adam", Adam()),
    "adamw": Baseline("AdamW, decay 0.01", Adam(decay=0.01)),
}

CONSTANT: dict[str, Baseline] = {
    f"{name}_constant": Baseline(f"{baseline.title}, constant rate", baseline.rule, constant)
    for name, baseline in BASELINES.items()
}
"""The same without a schedule, for those who do not know how long a run will be."""


@torch.no_grad()
def train(
    rule: HandDesigned,
    population: Population,
    lr: Tensor,
    steps: int,
    scored: set[int],
    schedule: Schedule = constant,
    tick: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Train tasks with a hand-designed rule.

    Args:
        rule: the optimizer.
        population: the tasks.
        lr: learning rate of each task. [M]
        steps: inner steps.
        scored: after which steps (0 is the first) to compute full losses.
        schedule: factor on the learning rate.
        tick: called after each step with its number, 0 the first.

    Returns:
        Losses. [N, M]
    """
    layout = population.layout
    rates = layout.to_params(layout.to_tensors(lr))
    theta = population.initial_params()
    state, losses = rule.begin(theta), []
    for step in range(steps):
        grad = population.gradient(theta)
        theta = rule.update(step, theta, grad, state, rates * schedule(step, steps))
        if step in scored:
            losses.append(population.losses(theta))
        tick(step)
    return torch.stack(losses)
