"""Describe task families to the compiled operator: a network is a list of operations on rows.

Only the very classes named here are described: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from lightning_hrnn.tasks.base import Data, Params, TaskFamily, unpack
from lightning_hrnn.tasks.datasets import Classification, Dataset, Regression
from lightning_hrnn.tasks.functions import ConditionedQuadratic, Quadratic
from lightning_hrnn.tasks.networks import (
    Embedding,
    Network,
    NetworkTask,
    NormPerceptron,
    OneHotEmbedding,
    Perceptron,
    ResidualPerceptron,
)
from lightning_hrnn.tasks.transforms import (
    Bfloat16Gradient,
    GradientNoise,
    LogObjective,
    Rescaled,
    RescaledEntries,
    SparseGradient,
)

WRAPPERS = (Rescaled, RescaledEntries, GradientNoise, SparseGradient, Bfloat16Gradient, LogObjective)

# Numbers that network_tasks.h and activations.h give them.
ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu")


class Kind(IntEnum):
    """Name an operation."""

    AFFINE = 0
    ACTIVATE = 1
    NORMALISE = 2
    ADD = 3
    EMBED = 4


class Score(IntEnum):
    """Name a loss."""

    CROSS_ENTROPY = 0
    HALF_SQUARE = 1
    QUADRATIC = 2


class Rows(NamedTuple):
    """Name a run of rows."""

    first: int
    width: int


@dataclass
class Builder:
    """Write a network's operations, finding places for the rows that they make.

    Args:
        offsets: where each parameter tensor of the first instance begins.
        rows: number of rows so far, at first those of the inputs.
    """

    offsets: Sequence[int]
    rows: int
    operations: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, kind: Kind, given: Rows, width: int, first: int = -1, second: int = -1, spare: int = 0) -> Rows:
        """Append an operation; return the rows that it makes, of which `spare` more are its own."""
        made = Rows(self.rows, width)
        self.operations.append((kind, *given, *made, first, second))
        self.rows += width + spare
        return made

    def affine(self, given: Rows, width: int, weight: int, bias: int | None = None) -> Rows:
        """Multiply by a parameter tensor, by its number, and add another."""
        return self.add(Kind.AFFINE, given, width, self.offsets[weight], -1 if bias is None else self.offsets[bias])

    def activate(self, given: Rows, activation: str) -> Rows:
        """Apply an activation."""
        return self.add(Kind.ACTIVATE, given, given.width, ACTIVATIONS.index(activation))

    def normalise(self, given: Rows, gain: int, shift: int) -> Rows:
        """Normalise over the rows."""
        return self.add(Kind.NORMALISE, given, given.width, self.offsets[gain], self.offsets[shift], spare=2)


def _perceptron(network: Perceptron, build: Builder, rows: Rows, widths: Sequence[int], first: int = 0) -> Rows:
    for k, width in enumerate(widths[:-1]):
        rows = build.activate(build.affine(rows, width, first + 2 * k, first + 2 * k + 1), network.activation)
    last = first + 2 * len(widths) - 2
    return build.affine(rows, widths[-1], last, last + 1)


def _of_perceptron(network: Perceptron, build: Builder, inputs: Rows, outputs: int) -> Rows:
    return _perceptron(network, build, inputs, (*network.hidden, outputs))


def _of_norm_perceptron(network: NormPerceptron, build: Builder, rows: Rows, outputs: int) -> Rows:
    for k, width in enumerate(network.hidden):
        rows = build.normalise(build.affine(rows, width, 3 * k), 3 * k + 1, 3 * k + 2)
        rows = build.activate(rows, network.activation)
    last = 3 * len(network.hidden)
    return build.affine(rows, outputs, last, last + 1)


def _of_residual(network: ResidualPerceptron, build: Builder, inputs: Rows, outputs: int) -> Rows:
    stream = build.affine(inputs, network.width, 0, 1)
    for k in range(2, 2 + 6 * network.blocks, 6):
        inner = build.affine(build.normalise(stream, k, k + 1), network.inner, k + 2, k + 3)
        branch = build.affine(build.activate(inner, network.activation), network.width, k + 4, k + 5)
        stream = build.add(Kind.ADD, stream, network.width, branch.first)
    last = 2 + 6 * network.blocks
    return build.affine(stream, outputs, last, last + 1)


def _of_embedding(network: Embedding, build: Builder, tokens: Rows, outputs: int) -> Rows:
    embedded = build.add(Kind.EMBED, tokens, network.width, build.offsets[0])
    return _perceptron(network.head, build, embedded, (*network.head.hidden, outputs), first=1)


NETWORKS: dict[type[Network], Callable[..., Rows]] = {
    Perceptron: _of_perceptron,
    NormPerceptron: _of_norm_perceptron,
    ResidualPerceptron: _of_residual,
    Embedding: _of_embedding,
    OneHotEmbedding: _of_embedding,
}
TOKENS = (Embedding, OneHotEmbedding)


def _score(dataset: Dataset) -> Score | None:
    for base, score in ((Classification, Score.CROSS_ENTROPY), (Regression, Score.HALF_SQUARE)):
        if type(dataset).loss is base.loss:
            return score
    return None


@dataclass
class Program:
    """Describe one task batch.

    Args:
        family: what is left when all wrappers are taken off.
        wrappers: from the outermost to the innermost, each with its own data.
        data: of the family.
        numbers: what the operator is told, but for the number of examples.
        batch_size: examples of a minibatch, or `None` where there are none.
    """

    family: TaskFamily
    wrappers: list[tuple[TaskFamily, Data]]
    data: Data
    numbers: list[int]
    batch_size: int | None

    @property
    def points(self) -> int:
        """Examples of the data, of each instance."""
        return self.numbers[2]

    def encoded(self, whole: bool) -> list[int]:
        """Return what the operator is told for the full loss, or for that of a minibatch."""
        examples = self.points if whole or self.batch_size is None else self.batch_size
        return [*self.numbers[:3], examples, *self.numbers[3:]]

    def inputs(self) -> Tensor:
        """Return inputs; of a quadratic, its matrix."""
        return self.data["matrix" if self.batch_size is None else "inputs"].contiguous()

    def targets(self) -> Tensor:
        """Return targets; of a quadratic, its vector."""
        return self.data["target" if self.batch_size is None else "targets"].contiguous()


def describe(family: TaskFamily, params: Params, data: Data, first_param: int, first_model: int) -> Program | None:
    """Return the program of a task batch, or `None` if the operator does not know the family.

    Args:
        family: of the batch.
        params: the initial parameters, for their shapes. Each `[B, ...]`.
        data: of the batch.
        first_param: where its parameters begin in the vector of all.
        first_model: number of its first instance among all.
    """
    wrappers = []
    while type(family) in WRAPPERS:
        wrappers.append((family, data))
        if isinstance(family, Rescaled):
            data = unpack("of", data)
        family = family.family  # type: ignore[attr-defined]
    if any(isinstance(wrapper, LogObjective) for wrapper, _ in wrappers[:-1]):
        return None  # its factor would come before what the wrappers within it do
    offsets = [first_param]
    for param in params[:-1]:
        offsets.append(offsets[-1] + param.numel())
    count = len(params[0])
    if type(family) in (Quadratic, ConditionedQuadratic):
        size = params[0].shape[1]
        numbers = [first_model, count, size, size, 0, Score.QUADRATIC, 1, 0, 0, 1]
        return Program(family, wrappers, data, [*numbers, Kind.AFFINE, 0, 0, 0, 0, *offsets, -1], None)
    if type(family) is not NetworkTask or type(family.network) not in NETWORKS:
        return None
    score, tokens = _score(family.dataset), type(family.network) in TOKENS
    if score is None or (tokens and type(family.network.head) is not Perceptron):  # type: ignore[attr-defined]
        return None
    points, features = data["inputs"].shape[1:]
    vocabulary, outputs = family.dataset.features, family.dataset.outputs
    build = Builder(offsets, 0 if tokens else features)
    made = NETWORKS[type(family.network)](family.network, build, Rows(0, vocabulary), outputs)
    numbers = [first_model, count, points, features, tokens, score, outputs, made.first, build.rows]
    operations = [number for operation in build.operations for number in operation]
    return Program(family, wrappers, data, [*numbers, len(build.operations), *operations], family.batch_size)
