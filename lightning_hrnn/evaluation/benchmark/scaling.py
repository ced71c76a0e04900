"""Time steps on several numbers of processor threads, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lightning_hrnn.evaluation.benchmark.clock import Tick, interleave
from lightning_hrnn.evaluation.benchmark.models import Model
from lightning_hrnn.evaluation.benchmark.steps import Variant, made_params


def measure_threads(
    model: Model,
    compared: Sequence[Variant],
    threads: Sequence[int],
    *,
    rounds: int,
    shortest: float,
    tick: Tick = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time a model's steps on the CPU by the clock on the wall, which needs a machine that does nothing else.

    Args:
        model: what is optimized.
        compared: the variants.
        threads: numbers of threads; speed-ups are over the first.
        rounds: see `interleave`.
        shortest: see `interleave`.
        tick: see `interleave`.

    Returns:
        A row for each variant and number of threads. torch's own number is left as it was.
    """
    device, before = torch.device("cpu"), torch.get_num_threads()
    params = made_params(model, device)
    calls: dict[str, Callable[[], object]] = {}
    for variant in compared:
        optimizer = variant.build(params)
        for count in threads:
            calls[_name(variant, count)] = partial(_on_threads, count, optimizer.step)
    try:
        torch.set_num_threads(max(threads))  # so that the clock is the one on the wall
        timings = interleave(calls, device, rounds, shortest, tick)
    finally:
        torch.set_num_threads(before)
    return [
        {
            "optimizer": variant.optimizer,
            "device": device.type,
            "kernel": variant.kernel,
            "threads": count,
            "model": model.name,
            "params": model.params,
            "ns_per_param": 1e9 * timings.median(_name(variant, count)) / model.params,
            "speedup": timings.ratio(_name(variant, threads[0]), _name(variant, count)),
        }
        for variant in compared
        for count in threads
    ]


def _name(variant: Variant, threads: int) -> str:
    return f"{variant.name}, {threads} threads"


def _on_threads(count: int, step: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    step()
