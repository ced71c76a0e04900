"""Exploration of learned rates: nudge them as runs go, and learn from the ends of the runs how they should move.

Evolution perturbs meta-parameters, and the variance of what it finds grows with their number. Exploration perturbs what
they *do*. A log rate is nudged in some stretch of a run, and the loss at the end of the run says whether that was good;
backprop through the few steps before it says which meta-parameters would have moved the log rate so. That is a policy
gradient, whose actions are the moves of log rates. It reaches all that moves them, the tensor RNN and the global RNN
included, however many meta-parameters they have. What those RNNs say to the param level is not credited.

Legend: `K` stretches of a run, `T` tensors, `M` models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevel
from lightning_hrnn.optimizer.rates import BoundedRate
from lightning_hrnn.optimizer.rule_state import RuleState

STRETCH = 0.7  # length of a stretch in log time: a rate that rises like t^2 gains a factor of 4
MEMORY = 6  # steps that backprop goes back, the sampled one included
SHARED = 0.5  # share of a nudge's variance that all tensors of a model have in common


class Seen(NamedTuple):
    """Hold the arguments of `HierarchicalRNN.upper_levels` at a step, less what only the param level needs."""

    param: ParamLevel
    param_rms: Tensor  # [T]
    state: RuleState
    below: Tensor | None  # [T]


class Exploration:
    """Nudge the log rates of runs, and remember what the rule saw at a step of each stretch.

    A run is divided into stretches of equal length in log time, since log rates drift by so much in each at most; the
    first step, whose move makes the first rate where that is learned, is one by itself. In a stretch the log rate of
    each tensor is nudged by a normal variate, spread over its steps as the drift is. Runs come in pairs whose nudges
    are opposite. A nudge comes on top of the bounds of a rate, which hold again from the next step on.

    Args:
        rule: with bounded rates, whose runs they are.
        population: of the runs; in each batch, the second half of the models are the first half's opposites.
        length: of the runs, in steps.
        sigma: standard deviation of a nudge.
        generator: of the nudges.

    Raises:
        ValueError: a batch has an odd number of models.

    Reference:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992, for
        the estimate; Salimans et al., 2017, https://arxiv.org/abs/1703.03864, section 3.1, for how exploration in the
        space of actions compares with evolution.
    """

    def __init__(
        self, rule: HierarchicalRNN, population: Population, length: int, sigma: float, generator: torch.Generator
    ) -> None:
        if any(batch.count % 2 for batch in population.batches):
            raise ValueError("Runs are explored in pairs: each batch needs an even number of models.")
        assert isinstance(rule.rate, BoundedRate)
        self.layout, self.delay = population.layout, rule.rate.delay
        self.tensors = [len(batch.params) for batch in population.batches]
        self.stretches = _stretches(length, self.delay, alone=bool(rule.rate.first_inputs))
        count = self.stretches[-1] + 1
        speed = [1 / (self.delay + age) for age in range(length)]  # of the drift
        self.reach = [0.0] * count  # of the drift in a stretch
        for stretch, value in zip(self.stretches, speed, strict=True):
            self.reach[stretch] += value
        of_step = torch.tensor(self.stretches)
        self.sampled = {_draw(torch.tensor(speed) * (of_step == stretch), generator) for stretch in range(count)}
        pairs = [batch.count // 2 for batch in population.batches]
        drawn = [_nudges(count, *shape, sigma, generator) for shape in zip(self.tensors, pairs, strict=True)]
        self.nudges, self.log_odds = (  # [K, T]
            torch.cat(parts, 1).to(self.layout.params_in) for parts in zip(*drawn, strict=True)
        )
        self.recent: deque[Seen] = deque(maxlen=MEMORY)
        self.kept: list[tuple[int, list[Seen]]] = []  # number of the stretch, and the steps up to one of its
        self.step = 0

    @contextmanager
    def watching(self, rule: HierarchicalRNN) -> Iterator[None]:
        """Nudge the log rates of a rule in a run: for now its upper levels answer to this."""
        upper_levels = rule.upper_levels

        def nudged(
            param: ParamLevel, param_rms: Tensor, state: RuleState, layout: Layout, below: Tensor | None = None
        ) -> RuleState:
            after = upper_levels(param, param_rms, state, layout, below)
            self.recent.append(_seen(param, param_rms, state, below))
            return after._replace(log_rate=after.log_rate + self._nudge())

        rule.upper_levels = nudged  # type: ignore[method-assign]
        try:
            yield
        finally:
            del rule.upper_levels

    def _nudge(self) -> Tensor:
        """Keep the last steps if one is sampled, and return what to add to log rates after it. [T]"""
        step, stretch = self.step, self.stretches[self.step]
        if step in self.sampled:
            self.kept.append((stretch, list(self.recent)))
        self.step += 1
        return self.nudges[stretch] / (self.delay + step) / self.reach[stretch]

    @torch.enable_grad()
    def surrogate(self, rule: HierarchicalRNN, differences: Sequence[Tensor], value: Tensor) -> Tensor:
        """Return a scalar of a given value, to whose gradient the estimate of the meta-gradient is added.

        Args:
            rule: whose meta-parameters get it.
            differences: of the meta-losses of the pairs of each batch. `[pairs]` each
            value: of the scalar, with the gradient that it has already.
        """
        parts = zip(differences, self.tensors, strict=True)
        advantage = torch.cat([_to_tensors(part, tensors) for part, tensors in parts]) / len(differences)  # [T]
        linear = advantage.new_zeros(())
        for stretch, steps in self.kept:
            before, after = self._replayed(rule, steps)
            moved = (after.log_rate - before.log_rate) * (self.delay + before.age) * self.reach[stretch]  # in all of it
            linear = linear + (advantage * self.log_odds[stretch] * moved).sum()
        return value + linear - linear.detach()

    def _replayed(self, rule: HierarchicalRNN, steps: Sequence[Seen]) -> tuple[RuleState, RuleState]:
        """Take the steps of the upper levels again, differentiably; return the states before and after the last."""
        before = after = steps[0].state
        for seen in steps:
            before = seen.state._replace(tensor_hidden=after.tensor_hidden, global_hidden=after.global_hidden)
            after = rule.upper_levels(seen.param, seen.param_rms, before, self.layout, seen.below)
        return before, after


def _stretches(length: int, delay: float, alone: bool) -> list[int]:
    """Return the number of the stretch of each step of a run.

    Args:
        length: of the run.
        delay: of the drift, which sets how fast log time goes.
        alone: whether the first step is a stretch by itself.
    """
    start = int(alone and length > 1)
    whole = math.log((delay + length) / (delay + start))
    count = max(1, round(whole / STRETCH))
    found = [int(math.log((delay + age) / (delay + start)) / whole * count) for age in range(start, length)]
    numbers = {number: rank for rank, number in enumerate(sorted(set(found)))}  # a short run may leave some empty
    return [0] * start + [start + numbers[number] for number in found]


def _nudges(
    count: int, tensors: int, pairs: int, sigma: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # [count, tensors of all models] each
    """Draw the nudges of a batch, and the gradients of their log densities with respect to their means."""
    of_model, of_tensor = (
        torch.randn(count, rows, pairs, generator=generator, device=generator.device) for rows in (1, tensors)
    )
    nudges = sigma * (math.sqrt(SHARED) * of_model + math.sqrt(1 - SHARED) * of_tensor)
    in_common = SHARED * tensors / (1 - SHARED + SHARED * tensors) * nudges.mean(1, keepdim=True)
    log_odds = (nudges - in_common) / ((1 - SHARED) * sigma**2)
    return _opposed(nudges), _opposed(log_odds)


def _opposed(value: Tensor) -> Tensor:  # [count, tensors, pairs] -> [count, tensors of all models]
    """Give the second half of the models the opposite of the first half's."""
    return torch.cat([value, -value], 2).flatten(1)


def _to_tensors(difference: Tensor, tensors: int) -> Tensor:
    """Weigh the nudges of a batch by the mean over its models of half of what sets them apart. [T of the batch]"""
    return torch.cat([difference, -difference]).repeat(tensors) / (4 * len(difference))


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """Draw a position by weight."""
    return int(torch.multinomial(weights.to(generator.device), 1, generator=generator))


def _seen(param: ParamLevel, param_rms: Tensor, state: RuleState, below: Tensor | None) -> Seen:
    """Keep what the upper levels need, and let go of what is as large as the models."""
    none = param.pooled.new_zeros(0)
    small = ParamLevel(none, none, none, param.pooled, none, None)
    return Seen(small, param_rms, state._replace(hidden=none, average=none, square=none), below)
