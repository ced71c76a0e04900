"""Hand-designed optimizers over flat parameters, for many tasks and many learning rates at once.

Legend: `P` parameters of all instances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population

Schedule = Callable[[int, int], float]  # step, steps -> factor on the learning rate


def constant(step: int, steps: int) -> float:
    """Keep the learning rate."""
    return 1.0


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


@torch.no_grad()
def train(
    rule: Adam, population: Population, lr: Tensor, steps: int, scored: set[int], schedule: Schedule = constant
) -> Tensor:
    """Train tasks with a hand-designed rule.

    Args:
        rule: the optimizer.
        population: the tasks.
        lr: learning rate of each task. [M]
        steps: inner steps.
        scored: after which steps (0 is the first) to compute full losses.
        schedule: factor on the learning rate.

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
    return torch.stack(losses)
