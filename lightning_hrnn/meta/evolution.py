"""Evolution strategies over whole runs, for the meta-parameters that backprop through windows cannot judge.

Backprop through windows teaches a rule good directions, but it sees rates through a window: it cannot know what a rate
of today does to the loss in a thousand steps. Nor does it see how a step changes the gradients after it, unless it
differentiates through them, which explodes. Evolution sees whole runs and nothing but their ends. The variance of its
estimate grows with the number of meta-parameters, so it moves those that make the lengths of steps
(`HierarchicalRNN.evolving`), and if asked the param level's as well. Every instance of every task tries a perturbation
of its own, at the cost of two plain runs; in the same runs learned rates may be explored, see `meta.exploration`.

Legend: `D` meta-parameters that evolve, `B` instances of a task batch, `M` models, `T` tensors, `W` meta-parameters of
the param level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hrnn.meta.estimators import Estimate, Window, perturbations, surrogate
from lightning_hrnn.meta.exploration import Exploration
from lightning_hrnn.meta.kernels.param_levels import OwnParamLevels
from lightning_hrnn.meta.population import Population
from lightning_hrnn.meta.rivals import Rivals, Standing
from lightning_hrnn.meta.truncation import TaskPool, schedule_of
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import cpp
from lightning_hrnn.optimizer.rates import BoundedRate
from lightning_hrnn.tasks.base import describe

LAST_STEPS = (0, 1, 2, 4, 6)  # before the end of a run, where its loss is taken

LARGEST_WEIGHTED = 2.0  # root mean square of the differences of a batch with rivals, so that none owns the estimate
UNRIVALLED = 0.7  # the same of a batch without, among others that have rivals; and the least: nothing is given up
COMPARED = 10  # instances of a batch that the rivals train, too

NEGLIGIBLE = 2e-3  # difference of meta-losses that is not worth to be balanced with others

EXPLORED = ("rate.drift", "rate.drift_bias", "rate.first")  # not perturbed themselves, where what they do is

SPREADS = {
    "param_rnn.gate_weight": 0.3,
    "param_rnn.candidate_weight": 0.3,
    "param_rnn.gate_bias": 0.6,
    "param_rnn.candidate_bias": 0.6,
    "decay_bias": 4.0,
    "tensor_rnn": 0.3,
    "global_rnn": 0.3,
    "global_to_tensor": 0.3,
}
"""By how much more or less than those of rates other meta-parameters move in a meta-step, by the beginnings of their
names, and how wide those are spread that are perturbed: weights are many, and the decays, near one, hardly move with
their biases."""


class Evolution:
    """Perturb meta-parameters, and weigh perturbations by the losses at the end of whole runs.

    Each window is one run of every task of the pool, from its start. Each instance runs twice, with a perturbation `e`
    and with `-e`, on the same minibatches; the estimate is the mean of `e (L+ - L-) / (2 sigma)` for `e ~ N(0, 1)`,
    with differences clipped, so that a task that diverges says which way not to go and no more.

    Args:
        sigma: standard deviation of a perturbation.
        shares: of the window, which runs last by turns: short ones, long ones.
        clip: largest difference of two meta-losses that counts; if `balance`, in units of their root mean square
            over the batch, so that 2 to 3 is as much as a clip as 1 is without.
        balance: whether each task batch weighs the same: differences are divided by their root mean square over the
            batch. Else those of tasks whose losses vary most own the estimate, with their noise.
        param_level: whether the param level's meta-parameters evolve too, all but its initial state: timescales and
            directions. Takes the compiled kernels, whatever the engine, and runs on the CPU.
        spreads: how wide meta-parameters are spread beside others, and with `param_level` or `explore` how fast they
            move, by the beginnings of their names, the longest of which counts: before `SPREADS`; 0 leaves them as they
            are. Fewer that move are known better.
        rivals: optimizers to end lower than. Where a run is as long as theirs and cools down as they do, differences
            count by how much they change who ends lower, see `Standing`.
        explore: standard deviation of nudges of log rates; above 0, what moves learned rates (their drift and all that
            it depends on) learns from these instead of perturbations of its own.
        seed: of the perturbations and nudges.

    Raises:
        ValueError: an argument is out of range.

    Reference:
        Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017,
        https://arxiv.org/abs/1703.03864; antithetic pairs and clipped differences make it rank-like.
    """

    def __init__(
        self,
        sigma: float = 0.06,
        shares: Sequence[float] = (0.2, 0.5, 1.0),
        clip: float = 1.0,
        param_level: bool = False,
        explore: float = 0.0,
        balance: bool = False,
        spreads: Mapping[str, float] | None = None,
        rivals: Rivals | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= explore < math.inf:
            raise ValueError(f"explore must be finite and not negative, not {explore}.")
        if not (0 < sigma < math.inf and 0 < clip < math.inf):
            raise ValueError(f"sigma and clip must be positive and finite, not {sigma} and {clip}.")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares of the window must be above 0 and at most 1, not {list(shares)}.")
        self.sigma, self.shares, self.clip, self.seed = sigma, tuple(shares), clip, seed
        self.param_level, self.explore, self.balance = param_level, explore, balance
        self.own_spreads = dict(spreads or {})
        if wrong := {name: width for name, width in self.own_spreads.items() if not 0 <= float(width) < math.inf}:
            raise ValueError(f"spreads must be finite and not negative, not {wrong}.")
        self.rivals, self.standing = rivals, Standing()

    def check(self, rule: HierarchicalRNN, steps: int) -> None:
        """Refuse a rule that it cannot move, or rivals that it never meets.

        Args:
            rule: to be moved.
            steps: of a window.

        Raises:
            ValueError: its rates are not bounded; or its param level is to evolve, and the compiled kernels do not know
                it or cannot be had; or `spreads` names what it has not; or no run is as long as those of the rivals.
        """
        if not isinstance(rule.rate, BoundedRate):
            raise ValueError("Evolution moves bounded rates: this rule's rates are 'smoothed'.")
        names = [name for name, _ in rule.named_parameters()]
        if unknown := [start for start in self.own_spreads if not any(name.startswith(start) for name in names)]:
            raise ValueError(f"spreads names {unknown}, with which no meta-parameter begins: they are {names}.")
        lengths = sorted({self._length(steps, share) for share in self.shares})
        if self.rivals is not None and self.rivals.steps not in lengths:
            raise ValueError(
                f"The rivals were tuned for runs of {self.rivals.steps} steps, and those of shares {list(self.shares)} "
                f"of a window of {steps} have {lengths}: none would ever meet them."
            )
        if not self.param_level:
            return
        reason = cpp.why_unavailable() or cpp.why_unsupported(rule)
        if reason:
            raise ValueError(f"Evolution(param_level=True) needs the compiled kernels: {reason} Leave param_level out.")

    @torch.no_grad()
    def __call__(self, rule: HierarchicalRNN, pool: TaskPool, window: Window) -> Estimate:
        """Run every task of the pool from its start to its end, both ways."""
        self.check(rule, window.steps)
        length = self._length(window.steps, self.shares[window.meta_step % len(self.shares)])
        places = [replace(place, tasks=place.tasks.twice(), age=0, life=length) for place in pool]
        population = Population([place.tasks for place in places])
        layout = population.layout
        spread = self.sigma * self.spreads(rule)  # [D]
        generator = perturbations(spread.device, self.seed, window.index)
        noises = [_draw(spread, place.tasks.count, generator) for place in pool]
        both = spread[:, None] * torch.cat([torch.cat([e, -e], 1) for e in noises], 1)  # [D, M]
        of_rates = sum(len(value) for value in rule.evolving)
        probe, engine = perturbed(rule, population, both[:of_rates]), window.engine
        exploration = Exploration(rule, population, length, self.explore, generator) if self.explore else None
        if self.param_level:
            engine = OwnParamLevels(rule, layout, cpp.packed(rule) + both[of_rates:].T)
        with exploration.watching(probe) if exploration else nullcontext():
            losses = unroll(
                probe,
                population,
                begin(
                    probe,
                    population,
                    layout.to_tensors(_first_log_rates(pool)),
                    population.to_tensors([place.known_length for place in places]),
                ),
                length,
                _last_steps(length),
                engine,
                schedule=schedule_of(places, population),
            ).losses
        initial = torch.cat([place.initial_loss.repeat(2) for place in places])
        scores = population.by_batch(window.loss(losses, initial).mean(0))
        weights = self._weights(pool, window, length, scores)
        differences = [self._difference(score, weight) for score, weight in zip(scores, weights, strict=True)]
        estimate = torch.zeros_like(spread)
        for noise, difference in zip(noises, differences, strict=True):
            estimate += (noise * difference).mean(1) / (2 * len(noises))
        estimate = torch.where(spread > 0, estimate / spread, 0.0)
        for place in pool:
            place.age = place.life  # this run was its whole life
        total = surrogate(rule, self.moved(rule), estimate, torch.stack([score.mean() for score in scores]).mean())
        if exploration is not None:
            total = exploration.surrogate(rule, differences, total)
        return Estimate(total, [score[None] for score in scores])

    @staticmethod
    def _length(steps: int, share: float) -> int:
        """Return the number of steps of a run that takes a share of a window."""
        return max(1, round(steps * share))

    def _difference(self, score: Tensor, weight: float | None = None) -> Tensor:  # [2 B] -> [B]
        """Compare the meta-losses of the pairs of a batch, which counts as much as its rivals say if it has any."""
        plus, minus = score.chunk(2)
        difference = plus - minus
        size = difference.square().mean().sqrt() + NEGLIGIBLE
        if weight is not None:
            difference = difference * min(max(weight, UNRIVALLED / float(size)), LARGEST_WEIGHTED / float(size))
        elif self.balance:
            difference = difference / size * (UNRIVALLED if self.rivals else 1.0)
        return difference.clamp(-self.clip, self.clip)

    def _weights(self, pool: TaskPool, window: Window, length: int, scores: Sequence[Tensor]) -> Sequence[float | None]:
        """Return how much a difference counts in each batch; None where there are no rivals."""
        if self.rivals is None or self.rivals.steps != length:
            return [None] * len(scores)
        places = list(pool)
        theirs = self.rivals.losses([place.tasks.first(COMPARED) for place in places], _last_steps(length))
        floor = float(window.loss(torch.zeros(1), torch.ones(1)))
        return [
            self.standing.weight(
                describe(place.tasks.family),
                score.view(2, -1).mean(0)[:COMPARED],
                {name: window.loss(losses, place.initial_loss[:COMPARED]).mean(0) for name, losses in rivals.items()},
                floor,
            )
            if rivals and place.cools
            else None
            for place, score, rivals in zip(places, scores, theirs, strict=True)
        ]

    def moved(self, rule: HierarchicalRNN) -> list[nn.Parameter]:
        """Return the meta-parameters that evolve."""
        return [*rule.evolving, *(cpp.param_level_parts(rule) if self.param_level else [])]

    def spreads(self, rule: HierarchicalRNN) -> Tensor:
        """Return how wide their entries are spread, in units of sigma; those that a rule does without are not. [D]"""
        names = {value: name for name, value in rule.named_parameters()}
        still = EXPLORED if self.explore else ()
        parts = [
            torch.full(
                (value.numel(),), self.spread_of(names[value]) * (value.requires_grad and names[value] not in still)
            )
            for value in self.moved(rule)
        ]
        return torch.cat(parts).to(rule.evolving[0])

    def spread_of(self, name: str) -> float:
        """Return how wide a meta-parameter is spread beside others, by the longest known beginning of its name."""
        for spreads in (self.own_spreads, SPREADS):
            if known := [start for start in spreads if name.startswith(start)]:
                return float(spreads[max(known, key=len)])
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return how the rule stands beside its rivals; no run outlasts its window."""
        return self.standing.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that on."""
        self.standing.load_state_dict(state)


def _last_steps(length: int) -> set[int]:
    """Return the steps after which the losses of a run are taken."""
    return {max(0, length - 1 - before) for before in LAST_STEPS}


def perturbed(rule: HierarchicalRNN, population: Population, noise: Tensor) -> HierarchicalRNN:
    """Return a copy of the rule whose steps are made longer or shorter in each model.

    Args:
        rule: with bounded rates.
        population: of models.
        noise: what to add to the meta-parameters that evolve, end to end. [D, M]
    """
    probe = deepcopy(rule)
    assert isinstance(probe.rate, BoundedRate)
    parts = population.layout.to_tensors(noise).split([len(value) for value in probe.evolving])  # [k, T] each
    for value, part in zip(probe.evolving, parts, strict=True):
        value.requires_grad_(False).data = value + (part if value.dim() == 2 else part[0])
    return probe


def _draw(like: Tensor, count: int, generator: torch.Generator) -> Tensor:  # [D, B]
    return torch.randn(len(like), count, generator=generator, device=like.device, dtype=like.dtype)


def _first_log_rates(pool: TaskPool) -> Tensor:
    """Return the first log rate of each model of the pool, twice for each batch. [M]"""
    return torch.cat(
        [Population([place.tasks]).layout.mean_per_model(place.progress.state.log_rate).repeat(2) for place in pool]
    )
