"""Time meta-training: inner steps of many tasks side by side, with and without the way back."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch

from lightning_hrnn.evaluation.benchmark.clock import Tick, Timings, interleave
from lightning_hrnn.meta.estimators import PES, Window
from lightning_hrnn.meta.loss import LogRatio
from lightning_hrnn.meta.memory import keep_freed_memory
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.meta.truncation import Lives, Place, TaskPool
from lightning_hrnn.meta.unroll import begin, unroll
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine
from lightning_hrnn.optimizer.kernels import choose_engine
from lightning_hrnn.tasks.corpus import get_corpus

ENGINES = {"cpu": ("eager", "cpp"), "cuda": ("eager",)}
BACKPROP, FORWARD, STRATEGY = "truncated_backprop", "forward_only", "pes"
BASE = f"{BACKPROP} eager"
RUNS = {BACKPROP: 1, FORWARD: 1, STRATEGY: 2}
"""How often a window takes the inner steps of a task: evolution strategies, with and against a perturbation."""
LOG_RATE = -7.0  # of the first learned rates


class UnrollSize(NamedTuple):
    """Say how much is unrolled at once."""

    corpus: str
    places: int  # families, drawn from the corpus
    instances: int  # of each family
    window: int  # inner steps


def measure_unrolls(
    rule: HierarchicalRNN,
    device: torch.device,
    size: UnrollSize,
    *,
    rounds: int,
    shortest: float,
    tick: Tick = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time truncation windows in turns, the tasks' own gradients and losses included.

    `"truncated_backprop"` is a window with the meta-gradient, `"forward_only"` one without, `"pes"` one of persistent
    evolution strategies, which take every task's steps twice. Every ratio is of inner steps per second, to truncated
    backprop on the eager engine.

    Args:
        rule: the update rule.
        device: where.
        size: how much to unroll.
        rounds: see `interleave`.
        shortest: see `interleave`.
        tick: see `interleave`.
    """
    keep_freed_memory()
    rule = deepcopy(rule).to(device).requires_grad_(True)
    corpus = get_corpus(size.corpus)
    population = Population(
        [
            TaskBatch.draw(corpus.sample(random.Random(seed)), size.instances, seed, device)
            for seed in range(size.places)
        ]
    )
    calls: dict[str, Callable[[], object]] = {}
    names = []
    for engine, level in _engines(rule, device).items():
        for estimator, window in ((BACKPROP, _backprop), (FORWARD, _forward), (STRATEGY, _pes)):
            calls[f"{estimator} {engine}"] = partial(window, rule, population, size.window, level)
            names.append((estimator, engine))
    timings = interleave(calls, device, rounds, shortest, tick)
    steps = size.window * population.initial_params().numel()
    return [_row(estimator, engine, steps, timings) for estimator, engine in names]


def _engines(rule: HierarchicalRNN, device: torch.device) -> dict[str, ParamLevelEngine | None]:
    engines = {}
    for name in ENGINES[device.type]:
        try:
            engines[name] = choose_engine(name, rule)
        except ValueError:  # it cannot run here
            continue
    return engines


def _backprop(rule: HierarchicalRNN, population: Population, steps: int, engine: ParamLevelEngine | None) -> None:
    result = unroll(rule, population, begin(rule, population, LOG_RATE), steps, {steps - 1}, engine)
    result.losses.log1p().mean().backward()
    rule.zero_grad(set_to_none=True)


@torch.no_grad()
def _forward(rule: HierarchicalRNN, population: Population, steps: int, engine: ParamLevelEngine | None) -> None:
    unroll(rule, population, begin(rule, population, LOG_RATE), steps, {steps - 1}, engine)


@torch.no_grad()
def _pes(rule: HierarchicalRNN, population: Population, steps: int, engine: ParamLevelEngine | None) -> None:
    """Estimate the meta-gradient of tasks at the start of their runs."""
    pool = TaskPool(len(population.batches), Lives(), rates=(1.0, 1.0))
    for seed, batch in enumerate(population.batches):
        alone = Population([batch])
        progress, losses = begin(rule, alone, LOG_RATE), alone.losses(alone.initial_params(), fused=engine is not None)
        pool.places.append(Place(seed, batch, progress, losses, age=0, life=steps, cools=False))
    PES()(rule, pool, Window(steps, {steps - 1}, LogRatio(), engine))


def _row(estimator: str, engine: str, steps: int, timings: Timings) -> dict[str, Any]:
    name = f"{estimator} {engine}"
    return {
        "estimator": estimator,
        "engine": engine,
        "task_param_steps_per_s": RUNS[estimator] * steps / timings.median(name),
        "ratio_to_eager": RUNS[estimator] * timings.ratio(BASE, name),
    }
