"""The protocol of every claim: each baseline tuned for each task, the learned optimizer not at all, on fresh seeds.

A `Trial` is one optimizer on one task. A baseline's trial first trains `tuning_seeds` instances at every rate of a
grid, all side by side, keeps the rate that ends lowest, then trains `seeds` other instances at that rate. The learned
optimizer trains those same instances, from the same first parameters, on the same batches. All know the length of the
run: baselines by warm-up and cosine, the learned optimizer by its cooldown; once more it runs without knowing.

Legend: `N` scored steps, `K` seeds, `R` rates, `I` tuning seeds, `T` tensors of a task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hrnn.evaluation.baselines import BASELINES, CONSTANT, constant, train
from lightning_hrnn.evaluation.given import train_given
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.evaluation.statistics import mean_log
from lightning_hrnn.meta.population import Population, Progress, TaskBatch
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine
from lightning_hrnn.optimizer.pretrained import first_rate
from lightning_hrnn.optimizer.schedule import cooldown
from lightning_hrnn.tasks.corpus import get_corpus

VERSION = 2
"""Of the protocol; outcomes of another version are not taken from a cache."""
OURS, ANYTIME, GIVEN = "hrnn", "hrnn_anytime", "hrnn_given"
DEFAULT_ADAM, DEFAULT_RATE = "default_adam", 1e-3
RATES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""The grid: 15 rates from 1e-6 to 10, half a decade apart."""
FLOATS_AT_ONCE = 2**25  # of parameters and data while tuning

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """Hold how one optimizer fared on one task; plain values, for a cache on disk.

    Args:
        lr: the tuned rate; None for the learned optimizer.
        initial: losses before the first step. [K]
        final: mean losses over the last steps. [K]
        steps: at which the curve was scored. [N]
        curve: losses. [N][K]
        seconds: that the runs took.
        tuning_seconds: that the tuning took.
        tuning: mean log final loss at each rate of the grid; empty without tuning. [R]
        rates: learned rates of the tensors, geometric means over the seeds; empty for a baseline. [N][T]
    """

    lr: float | None
    initial: list[float]
    final: list[float]
    steps: list[int]
    curve: list[list[float]]
    seconds: float
    tuning_seconds: float = 0.0
    tuning: tuple[float, ...] = ()
    rates: tuple[list[float], ...] = ()

    def __post_init__(self) -> None:
        curve = [value for losses in self.curve for value in losses]
        numbers = [self.seconds, self.tuning_seconds, *self.initial, *self.final, *self.steps, *curve]
        if not all(isinstance(value, int | float) for value in numbers) or len(self.curve) != len(self.steps):
            raise TypeError("An outcome holds losses and times as numbers, those of each scored step.")
        if {len(losses) for losses in (self.initial, *self.curve)} != {len(self.final)}:
            raise ValueError("An outcome holds as many losses before, at each scored step and at the end.")


class Learned(NamedTuple):
    """Hold the learned optimizer."""

    rule: HierarchicalRNN
    engine: ParamLevelEngine | None = None


@dataclass(frozen=True)
class Trial:
    """One optimizer on one task.

    Args:
        setting: what is run.
        task: name of a task of the suite.
        optimizer: `"hrnn"`, `"hrnn_anytime"` (without cooldown, the length of the run unknown), `"hrnn_given"` (its
            direction at rates tuned like a baseline's), `"default_adam"` (at 1e-3 throughout), or a name of
            `BASELINES` or `CONSTANT`.
        weights: what tells the learned optimizer's weights from others; empty for a baseline.
    """

    setting: Setting
    task: str
    optimizer: str
    weights: str = ""

    def key(self) -> dict[str, Any]:
        """Return all that the outcome depends on."""
        setting = asdict(self.setting)
        del setting["data_dir"]
        if self.setting.suite == "corpus":
            setting["corpus_version"] = get_corpus(self.setting.corpus).version
        else:
            del setting["corpus"], setting["draws"]
        return {"version": VERSION, **setting, "task": self.task, "optimizer": self.optimizer, "weights": self.weights}

    @property
    def is_learned(self) -> bool:
        """Tell whether the optimizer is the learned one."""
        return self.learns_rates or self.optimizer == GIVEN

    @property
    def learns_rates(self) -> bool:
        """Tell whether it steps at its learned rates, so that there is none to tune or to name."""
        return self.optimizer in (OURS, ANYTIME)

    def run(self, learned: Learned | None = None, tick: Tick = lambda share: None) -> Outcome:
        """Tune, if it is a baseline, and train.

        Args:
            learned: needed where the optimizer is learned.
            tick: called with the share of the work just done; all shares add up to 1.

        Raises:
            ValueError: the learned optimizer is not given.
        """
        if self.is_learned and learned is None:
            raise ValueError("A trial of the learned optimizer needs the learned optimizer.")
        if learned is not None and self.learns_rates:
            return self._train_learned(learned, tick)
        if self.optimizer == DEFAULT_ADAM:
            return self._train(partial(train, BASELINES["adam"].rule, schedule=constant), DEFAULT_RATE, tick)
        runner = self._runner(learned)
        began = time.perf_counter()
        tuning = self._tune(runner, lambda share: tick(share / 2))
        seconds = time.perf_counter() - began
        best = min(range(len(RATES)), key=tuning.__getitem__)
        outcome = self._train(runner, RATES[best], lambda share: tick(share / 2))
        return Outcome(**{**vars(outcome), "tuning_seconds": seconds, "tuning": tuple(tuning)})

    def _runner(self, learned: Learned | None) -> Callable[..., Tensor]:
        """Return what trains a population at given rates: see `baselines.train` and `given.train_given`."""
        if self.optimizer == GIVEN and learned is not None:
            return lambda population, **how: train_given(
                self._rule(learned, population).without_rate(), population, engine=learned.engine, **how
            )
        baseline = (BASELINES | CONSTANT)[self.optimizer]
        return partial(train, baseline.rule, schedule=baseline.schedule)

    def _rule(self, learned: Learned, population: Population) -> HierarchicalRNN:
        """Return the rule for models of the size that the instances of the task have."""
        (tasks,) = population.batches
        return learned.rule.for_model(tasks.size // tasks.count).to(self.setting.device)

    def _tune(self, runner: Callable[..., Tensor], tick: Tick) -> list[float]:
        """Return the mean log final loss at each rate of the grid, infinite if a run failed. [R]"""
        setting, scores = self.setting, []
        tasks = self._tuning_tasks()
        initial = Population([tasks]).losses(Population([tasks]).initial_params())
        size = tasks.size + sum(value.numel() for value in tasks.data.values())
        at_once = max(1, min(len(RATES), FLOATS_AT_ONCE // size))
        for first in range(0, len(RATES), at_once):
            part = RATES[first : first + at_once]
            population = Population([self._tuning_tasks().repeat(len(part))])
            rates = torch.tensor(part, device=setting.device).repeat_interleave(tasks.count)
            share = len(part) / len(RATES) / setting.steps
            losses = runner(
                population=population,
                lr=rates,
                steps=setting.steps,
                scored={step - 1 for step in setting.final()},
                tick=lambda step, share=share: tick(share),
            )
            scores += mean_log(setting.final_loss(losses).view(len(part), tasks.count), initial).tolist()
        return scores

    def _tuning_tasks(self) -> TaskBatch:
        return self.setting.draw(self.task, "tune", self.setting.tuning_seeds)

    def _train(self, runner: Callable[..., Tensor], rate: float, tick: Tick) -> Outcome:
        setting = self.setting
        population = Population([setting.draw(self.task, "report", setting.seeds)])
        steps = setting.scored()
        initial = population.losses(population.initial_params())
        began = time.perf_counter()
        losses = runner(
            population=population,
            lr=torch.full((setting.seeds,), rate, device=setting.device),
            steps=setting.steps,
            scored={step - 1 for step in steps},
            tick=lambda step: tick(1 / setting.steps),
        )
        return self._outcome(rate, initial, losses, time.perf_counter() - began)

    @torch.no_grad()
    def _train_learned(self, learned: Learned, tick: Tick) -> Outcome:
        setting = self.setting
        population = Population([setting.draw(self.task, "report", setting.seeds)])
        rule = self._rule(learned, population)
        initial = population.losses(population.initial_params())
        progress = begin(rule, population, math.log(first_rate(rule)), self._known_length)
        began, before, losses, rates = time.perf_counter(), 0, [], []
        for step in setting.scored():
            part = unroll(
                rule,
                population,
                progress,
                step - before,
                {step - before - 1},
                learned.engine,
                schedule=partial(self._multiplier, before),
            )
            progress = part.progress
            losses.append(part.losses[0])
            rates.append(_rates(rule, population, progress))
            tick((step - before) / setting.steps)
            before = step
        outcome = self._outcome(None, initial, torch.stack(losses), time.perf_counter() - began)
        return Outcome(**{**vars(outcome), "rates": tuple(rates)})

    @property
    def _known_length(self) -> int:
        """Number of steps after which learned rates are zero; 0 if nobody knows how long the run is."""
        return 0 if self.optimizer == ANYTIME else self.setting.steps

    def _multiplier(self, before: int, step: int) -> float:
        """Return the multiplier of the learned rate, `step` steps after the first `before`."""
        return cooldown(before + step, self._known_length) if self._known_length else 1.0

    def _outcome(self, lr: float | None, initial: Tensor, losses: Tensor, seconds: float) -> Outcome:
        final = self.setting.final_loss(losses)
        return Outcome(lr, initial.tolist(), final.tolist(), self.setting.scored(), losses.tolist(), seconds)


def _rates(rule: HierarchicalRNN, population: Population, progress: Progress) -> list[float]:
    """Return the learned rate of each tensor of a task: geometric mean over its parameters and instances. [T]"""
    log_rate = progress.state.log_rate
    per_tensor = population.layout.mean_per_tensor(log_rate) if rule.rate_per_param else log_rate
    (tasks,) = population.batches
    return per_tensor.view(len(tasks.params), tasks.count).mean(1).exp().tolist()
