"""Two estimators of the meta-gradient behind one interface: truncated backprop and persistent evolution strategies.

Each advances the tasks of a pool by one window and returns a scalar whose gradient with respect to the rule's
meta-parameters is its estimate. So automatic optimization, clipping and DDP treat both alike.

Legend: `W` meta-parameters, `N` scored steps, `B` instances of a task batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_hrnn.meta.loss import LogRatio
from lightning_hrnn.meta.population import Population, Progress, join
from lightning_hrnn.meta.truncation import Place, TaskPool, schedule_of, started
from lightning_hrnn.meta.unroll import Point, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine


@dataclass(frozen=True)
class Window:
    """Describe one truncation window.

    Args:
        steps: inner steps.
        scored: after which of them the meta-loss is taken.
        loss: the meta-loss.
        engine: a fused equivalent of the rule's param level.
        point: where losses are taken, see `unroll`.
        index: a number that no two windows share, of any rank: evolution strategies draw their perturbations by it.
        meta_step: of all ranks together.
    """

    steps: int
    scored: Collection[int]
    loss: LogRatio
    engine: ParamLevelEngine | None = None
    point: Point = "last"
    index: int = 0
    meta_step: int = 0


class Estimate(NamedTuple):
    """Hold the outcome of a window."""

    surrogate: Tensor  # [] its value is the meta-loss, its gradient the estimate
    scores: list[Tensor]  # [N, B] meta-losses of each task batch of the pool


class Estimator(Protocol):
    """Advance a pool by a window and estimate the meta-gradient."""

    def __call__(self, rule: HierarchicalRNN, pool: TaskPool, window: Window) -> Estimate:
        """Return the estimate; the pool's tasks are a window older."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the estimator remembers between windows, as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what `state_dict` returned."""


class TruncatedBackprop:
    """Differentiate through the window; cut the graph between windows.

    Low variance, but biased: what a step does to the loss beyond its window does not count (short-horizon bias).

    Args:
        second_order: differentiate through the tasks' gradients too, instead of taking them as constants.
    """

    def __init__(self, second_order: bool = False) -> None:
        self.second_order = second_order

    def __call__(self, rule: HierarchicalRNN, pool: TaskPool, window: Window) -> Estimate:
        """Unroll all tasks at once."""
        population = pool.population()
        result = unroll(
            rule,
            population,
            pool.start(rule),
            window.steps,
            window.scored,
            window.engine,
            self.second_order,
            window.point,
            schedule_of(pool.places, population),
        )
        scores = window.loss(result.losses, pool.initial_losses())
        pool.advance(population, result.progress, window.steps)
        return Estimate(scores.mean() + _in_the_graph(rule), population.by_batch(scores.detach()))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all that lasts is the pool's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on nothing."""


class PES:
    """Perturb the meta-parameters, and weigh perturbations by the losses they lead to, over whole runs.

    In each window every pair of a positive and a negative perturbation `e ~ N(0, sigma^2)` advances its tasks. A task
    remembers the sum `x` of all perturbations since its run began, and the estimate is the mean over tasks of
    `x (L+ - L-) / (2 sigma^2)`. Unbiased however short the window, since late losses are credited to early
    perturbations; needs no backward pass; of higher variance than backprop.

    Args:
        sigma: standard deviation of a perturbation.
        pairs: antithetic pairs; the task batches of the pool are dealt out among them.
        seed: of the perturbations; ranks of a distributed run need different ones.

    Raises:
        ValueError: an argument is not positive.

    Reference:
        Vicol, Metz and Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
        Evolution Strategies, ICML 2021, https://arxiv.org/abs/2112.13835
    """

    def __init__(self, sigma: float = 0.01, pairs: int = 4, seed: int = 0) -> None:
        if sigma <= 0 or pairs < 1:
            raise ValueError(f"sigma must be positive and pairs at least 1, not {sigma} and {pairs}.")
        self.sigma, self.pairs, self.seed = sigma, pairs, seed
        self._twins: dict[int, _Twin] = {}  # by the seed of the task

    @torch.no_grad()
    def __call__(self, rule: HierarchicalRNN, pool: TaskPool, window: Window) -> Estimate:
        """Unroll each pair's tasks twice."""
        center, probe = parameters_to_vector(rule.parameters()), deepcopy(rule)
        places = list(pool)
        self._twins = {
            place.seed: self._twins.get(place.seed) or _Twin(place.progress, torch.zeros_like(center))
            for place in places
        }
        estimate, scores = torch.zeros_like(center), {}
        for pair in range(self.pairs):
            group = places[pair :: self.pairs]
            if not group:
                continue
            noise = self.sigma * self._draw(center, window.index, pair)
            for place in group:
                self._twins[place.seed].noise += noise
            plus, minus = self._both_ways(probe, center, noise, group, window)
            for place, high, low in zip(group, plus, minus, strict=True):
                weight = (high.mean() - low.mean()) / (2 * self.sigma**2)
                estimate += self._twins[place.seed].noise * weight / len(places)
                scores[place.seed] = (high + low) / 2
        ordered = [scores[place.seed] for place in places]
        value = torch.stack([score.mean() for score in ordered]).mean()
        return Estimate(surrogate(rule, list(rule.parameters()), estimate, value), ordered)

    def _draw(self, like: Tensor, index: int, pair: int) -> Tensor:  # [W]
        generator = perturbations(like.device, self.seed, index, pair)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def _both_ways(
        self, probe: HierarchicalRNN, center: Tensor, noise: Tensor, group: Sequence[Place], window: Window
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Unroll some tasks with the perturbation and against it, on the same minibatches; `probe` takes them on."""
        population = Population([place.tasks for place in group])
        initial = torch.cat([place.initial_loss for place in group])
        before = [place.tasks.generator.get_state() for place in group]
        outcomes = []
        for sign in (1, -1):
            vector_to_parameters(center + sign * noise, probe.parameters())
            for place, state in zip(group, before, strict=True):
                place.tasks.generator.set_state(state)
            progress = [place.progress if sign > 0 else self._twins[place.seed].progress for place in group]
            start = join([started(part, place, probe) for part, place in zip(progress, group, strict=True)])
            result = unroll(
                probe,
                population,
                start,
                window.steps,
                window.scored,
                window.engine,
                point=window.point,
                schedule=schedule_of(group, population),
            )
            outcomes.append(population.by_batch(window.loss(result.losses, initial)))
            for place, part in zip(group, population.split(result.progress), strict=True):
                if sign > 0:
                    place.progress = part
                else:
                    self._twins[place.seed].progress = part
        for place in group:
            place.age += window.steps
        return outcomes[0], outcomes[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of perturbations and the negative runs of all tasks in flight."""
        return {
            "twins": [
                {
                    "seed": seed,
                    "noise": twin.noise.clone(),
                    "progress": twin.progress.state_dict(),
                }
                for seed, twin in self._twins.items()
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._twins = {
            twin["seed"]: _Twin(Progress.from_state_dict(twin["progress"]), twin["noise"])
            for twin in state.get("twins", [])
        }


@dataclass
class _Twin:
    """Hold the negative run of a task batch, and the sum of its perturbations."""

    progress: Progress
    noise: Tensor  # [W]


def perturbations(device: torch.device, *key: int) -> torch.Generator:
    """Return a source of perturbations that depends on its key alone: a seed, the number of the window, and so on."""
    return torch.Generator(device).manual_seed(hash(key) & (2**62 - 1))


@torch.enable_grad()
def surrogate(rule: HierarchicalRNN, moved: Sequence[Tensor], estimate: Tensor, value: Tensor) -> Tensor:
    """Return a scalar of a given value whose gradient with respect to some meta-parameters is the estimate.

    Args:
        rule: whose other meta-parameters get a gradient of zero.
        moved: the meta-parameters.
        estimate: of all their entries, end to end.
        value: of the scalar.
    """
    linear = parameters_to_vector(moved) @ estimate + _in_the_graph(rule)
    return value + linear - linear.detach()


def _in_the_graph(rule: HierarchicalRNN) -> Tensor:
    """Return zero, with every meta-parameter in its graph: DDP wants them all, and not every window uses all."""
    return 0.0 * parameters_to_vector(rule.parameters()).sum()
