"""A table of the registered task families, for the docs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lightning_hrnn.tasks.corpus import CORPORA
from lightning_hrnn.tasks.registry import FAMILIES, get_family


class Entry(NamedTuple):
    """What the table says of one family."""

    name: str
    description: str
    parameters: tuple[int, int]  # fewest and most that some draws had
    tensors: tuple[int, int]
    shares: dict[str, float]  # corpus -> the family's share of its draws


def describe(name: str, draws: int = 20) -> Entry:
    """Describe a registered family, by its factory's docstring and some draws from it."""
    parameters, tensors = [], []
    for seed in range(draws):
        params, _ = get_family(name, random.Random(seed)).init(1, torch.Generator().manual_seed(seed))
        parameters.append(sum(p.numel() for p in params))
        tensors.append(len(params))
    shares = {
        corpus.name: corpus.weights[name] / sum(corpus.weights.values())
        for corpus in CORPORA.values()
        if name in corpus.weights
    }
    description = (FAMILIES[name].__doc__ or "").strip().split("\n")[0].rstrip(".")
    return Entry(name, description, _range(parameters), _range(tensors), shares)


def catalogue(names: Iterable[str] | None = None) -> str:
    """Return a Markdown table of the families called `names`, or of all that are registered."""
    columns = ["family", "what", "parameters", "tensors", *CORPORA]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for entry in map(describe, FAMILIES if names is None else names):
        shares = [f"{entry.shares[c]:.1%}" if c in entry.shares else "" for c in CORPORA]
        counts = [_span(entry.parameters), _span(entry.tensors)]
        lines.append(_row([f"`{entry.name}`", entry.description, *counts, *shares]))
    return "\n".join(lines) + "\n"


def _range(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)


def _span(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
