"""Exploration of learned rates: nudge them as runs go, and learn from the ends of the runs how they should move.

Evolution perturbs meta-parameters, and the variance of what it finds grows with their number. Exploration perturbs what
they *do*. A log rate is nudged in some stretch of a run, and the loss at the end of the run says whether that was good;
backprop through the few steps before it says which meta-parameters would have moved the log rate so. That is a policy
gradient, whose actions are the moves of log rates. It reaches all that rates depend on, the tensor RNN and the global
RNN included, however many meta-parameters they have.

Legend: `K` stretches of a run, `T` tensors, `M` models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.meta.population import Population
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import BoundedRate, HierarchicalRNN, ParamLevel, RuleState

STRETCH = 0.7  # length of a stretch in log time: a rate that rises like t^2 gains a factor of 4
MEMORY = 6  # steps that backprop goes back from a sampled one
SHARED = 0.5  # share of a nudge's variance that all tensors of a model have in common


class Seen(NamedTuple):
    """Hold the arguments of `HierarchicalRNN.upper_levels` at a step, less what only the param level needs."""

    param: ParamLevel
    param_rms: Tensor  # [T]
    state: RuleState
    below: Tensor | None  # [T]


class Exploration:
    """Nudge the log rates of runs, and remember what the rule saw at a step of each stretch.

    A run is divided into stretches of equal length in log time, since log rates drift by so much in each at most. In a
    stretch the log rate of each tensor is nudged by a normal variate, spread over its steps as the drift is; one more
    nudges the first rate. Runs come in pairs whose nudges are opposite.

    Args:
        rule: with bounded rates, whose runs they are.
        population: of the runs; in each batch, the second half of the models are the first half's opposites.
        length: of the runs, in steps.
        sigma: standard deviation of a nudge.
        generator: of the nudges.

    Reference:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992, for
        the estimate; Salimans et al., 2017, https://arxiv.org/abs/1703.03864, section 3.1, for how exploration in the
        space of actions compares with evolution.
    """

    def __init__(
        self, rule: HierarchicalRNN, population: Population, length: int, sigma: float, generator: torch.Generator
    ) -> None:
        assert isinstance(rule.rate, BoundedRate)
        self.sigma, self.layout, self.delay = sigma, population.layout, rule.rate.delay
        self.tensors = [len(batch.params) for batch in population.batches]
        device, dtype = population.layout.params_in.device, population.layout.params_in.dtype
        ages = torch.arange(length, dtype=torch.float64)
        whole = math.log1p(length / self.delay)
        count = max(1, round(whole / STRETCH))
        stretches = ((ages / self.delay).log1p() / whole * count).long()  # [length]
        reach = torch.zeros(count, dtype=torch.float64).index_add(0, stretches, 1 / (self.delay + ages))
        self.stretches, self.reach = stretches.tolist(), reach.tolist()
        self.sampled = {_draw(1 / (self.delay + ages) * (stretches == k), generator) for k in set(self.stretches)}
        pairs = [batch.count // 2 for batch in population.batches]
        nudges = [self._pairs(*shape, count + 1, generator) for shape in zip(pairs, self.tensors, strict=True)]
        self.nudges = torch.cat(nudges, 1).to(device, dtype)  # [K + 1, T], the last of first rates
        self.recent: deque[Seen] = deque(maxlen=MEMORY)
        self.kept: list[tuple[int, list[Seen]]] = []  # number of the stretch, and the steps up to one of its
        self.step = 0

    def _pairs(self, instances: int, tensors: int, count: int, generator: torch.Generator) -> Tensor:
        """Draw nudges for a batch of pairs. [count, tensors of all its models]"""
        of_model, of_tensor = (
            torch.randn(count, rows, instances, generator=generator, device=generator.device) for rows in (1, tensors)
        )
        nudges = self.sigma * (math.sqrt(SHARED) * of_model + math.sqrt(1 - SHARED) * of_tensor)
        return torch.cat([nudges, -nudges], 2).reshape(count, -1)

    def watch(self, rule: HierarchicalRNN) -> None:
        """Nudge the log rates of a rule from its first step on: its upper levels answer to this from now on."""
        upper_levels = rule.upper_levels

        def nudged(
            param: ParamLevel, param_rms: Tensor, state: RuleState, layout: Layout, below: Tensor | None = None
        ) -> RuleState:
            after = upper_levels(param, param_rms, state, layout, below)
            self.recent.append(_seen(param, param_rms, state, below))
            return after._replace(log_rate=after.log_rate + self._nudge())

        rule.upper_levels = nudged  # type: ignore[method-assign]

    def _nudge(self) -> Tensor:
        """Keep the last steps if one is sampled, and return what to add to log rates after it. [T]"""
        step, stretch = self.step, self.stretches[self.step]
        if step == 0:
            self.kept.append((-1, list(self.recent)))
        if step in self.sampled:
            self.kept.append((stretch, list(self.recent)))
        self.step += 1
        nudge = self.nudges[stretch] / (self.delay + step) / self.reach[stretch]
        return nudge + self.nudges[-1] if step == 0 else nudge

    @torch.enable_grad()
    def surrogate(self, rule: HierarchicalRNN, differences: Sequence[Tensor]) -> Tensor:
        """Return a scalar of value 0 whose gradient is the estimate of the meta-gradient.

        Args:
            rule: whose meta-parameters get it.
            differences: of the meta-losses of the pairs of each batch. `[pairs]` each
        """
        parts = zip(differences, self.tensors, strict=True)
        advantage = torch.cat([_to_tensors(value, tensors) for value, tensors in parts]) / len(differences)  # [T]
        total = advantage.new_zeros(())
        for stretch, steps in self.kept:
            before, after = self._replayed(rule, steps)
            moved = after.log_rate - before.log_rate
            if stretch >= 0:  # one step stands for all of the stretch
                moved = moved * (self.delay + before.age) * self.reach[stretch]
            total = total + (advantage * self.nudges[stretch] / self.sigma**2 * moved).sum()
        return total - total.detach()

    def _replayed(self, rule: HierarchicalRNN, steps: Sequence[Seen]) -> tuple[RuleState, RuleState]:
        """Take the steps of the upper levels again, differentiably; return the states before and after the last."""
        before = after = steps[0].state
        for seen in steps:
            before = seen.state._replace(tensor_hidden=after.tensor_hidden, global_hidden=after.global_hidden)
            after = rule.upper_levels(seen.param, seen.param_rms, before, self.layout, seen.below)
        return before, after


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
