"""The registry of task families, and the named corpora that meta-training draws from.

`FAMILIES` maps a name to a factory; a factory draws a concrete family (sizes, noise, batch size, activation) from a
`random.Random`. A `Corpus` is a weighted mixture of registered names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_hrnn.tasks.base import TaskFamily, named
from lightning_hrnn.tasks.datasets import Clusters, Dataset, Manifold, Teacher, TeacherRegression
from lightning_hrnn.tasks.draws import log_integer, log_uniform
from lightning_hrnn.tasks.functions import SURFACES, Bowl, ConditionedQuadratic, Quadratic
from lightning_hrnn.tasks.networks import (
    ACTIVATIONS,
    LAYERS,
    NetworkTask,
    NormPerceptron,
    Perceptron,
    ResidualPerceptron,
)
from lightning_hrnn.tasks.transforms import GradientNoise, Rescaled

Factory = Callable[[random.Random], TaskFamily]

FAMILIES: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Enter a factory into `FAMILIES` under `name`; the families it draws carry that name.

    Raises:
        ValueError: the name is taken.
    """

    def enter(factory: Factory) -> Factory:
        if name in FAMILIES:
            raise ValueError(f"task family {name!r} is registered already; choose another name")
        FAMILIES[name] = lambda rng: named(name, factory(rng))
        return factory

    return enter


@dataclass(frozen=True)
class Corpus:
    """A weighted mixture of task families.

    Args:
        name: what recipes and weight cards call it.
        version: changes whenever the weights or a family's factory change.
        weights: registered family name -> relative weight, positive.

    Raises:
        ValueError: empty, an unregistered name, or a weight that is not positive.

    Example::

        >>> import random
        >>> get_corpus("quick").sample(random.Random(0)).name in get_corpus("quick").weights
        True
    """

    name: str
    version: str
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"corpus {self.name!r} has no families; give at least one name and weight")
        for family, weight in self.weights.items():
            if family not in FAMILIES:
                raise ValueError(f"corpus {self.name!r}: {unknown('task family', family, FAMILIES)}")
            if not 0 < weight < math.inf:
                raise ValueError(f"corpus {self.name!r}: the weight of {family!r} must be positive, got {weight}")

    def sample(self, rng: random.Random) -> TaskFamily:
        """Draw a family's name by weight, then its configuration."""
        (name,) = rng.choices(list(self.weights), weights=list(self.weights.values()))
        return FAMILIES[name](rng)


def unknown(kind: str, name: str, known: Mapping[str, object]) -> str:
    """Say that `name` is not a `kind`, and list those that are."""
    return f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}"


def get_family(name: str, rng: random.Random) -> TaskFamily:
    """Draw a concrete family registered under `name`.

    Raises:
        ValueError: no family has that name; the message lists all.
    """
    if name not in FAMILIES:
        raise ValueError(unknown("task family", name, FAMILIES))
    return FAMILIES[name](rng)


def get_corpus(name: str) -> Corpus:
    """Return the corpus called `name`.

    Raises:
        ValueError: no corpus has that name; the message lists all.
    """
    if name not in CORPORA:
        raise ValueError(unknown("corpus", name, CORPORA))
    return CORPORA[name]


@register("random-quadratic")
def random_quadratic(rng: random.Random) -> TaskFamily:
    """Quadratics of 5-100 dimensions, Gaussian or of known condition, half of them with noise."""
    dim = log_integer(rng, 5, 100)
    family = rng.choice([Quadratic(dim), ConditionedQuadratic(dim, log_uniform(rng, 3, 1e4))])
    return family if rng.random() < 0.5 else GradientNoise(family, log_uniform(rng, 0.01, 2))


@register("random-bowl")
def random_bowl(rng: random.Random) -> TaskFamily:
    """Bowls of condition 0.01-100 at any angle, some noisy."""
    family = Bowl(log_uniform(rng, 0.01, 100), rng.uniform(0, math.pi))
    return family if rng.random() < 0.7 else GradientNoise(family, log_uniform(rng, 0.01, 0.3))


@register("rescaled-quadratic")
def rescaled_quadratic(rng: random.Random) -> TaskFamily:
    """Random quadratics whose parameters are multiplied by 1e-3 .. 1e3."""
    return Rescaled(random_quadratic(rng), 1e-3, 1e3)


@register("valley")
def valley(rng: random.Random) -> TaskFamily:
    """Rosenbrock or Beale, exact or with small noise."""
    family = rng.choice([SURFACES["rosenbrock"], SURFACES["beale"]])
    return family if rng.random() < 0.7 else GradientNoise(family, log_uniform(rng, 0.01, 1))


def random_classification(rng: random.Random, features: int) -> Dataset:
    """Teacher or cluster data with 2-10 classes, 500-2000 points, white or correlated inputs, few wrong labels."""
    classes, points = rng.randint(2, 10), log_integer(rng, 500, 2000)
    decay = rng.choice([0.0, 0.5, 1.0, 1.5])
    label_noise = rng.choice([0.0, 0.0, 0.05, 0.2])
    if rng.random() < 0.5:
        return Teacher(features, classes, points, log_integer(rng, 4, 32), decay, label_noise)
    separation = log_uniform(rng, 0.3, 3)
    return Clusters(features, classes, points, rng.randint(1, 4), separation, decay, label_noise)


def random_batch_size(rng: random.Random) -> int:
    """4-128 examples."""
    return log_integer(rng, 4, 128)


@register("softmax-regression")
def softmax_regression(rng: random.Random) -> TaskFamily:
    """Softmax regression on 5-100 features."""
    dataset = random_classification(rng, log_integer(rng, 5, 100))
    return NetworkTask(dataset, Perceptron((), start=rng.choice(list(LAYERS))), random_batch_size(rng))


def random_activation(rng: random.Random) -> str:
    """Any activation; ReLU as often as all the others of one kind together would be in practice."""
    return rng.choice([*ACTIVATIONS, "relu", "relu", "gelu"])


@register("mlp")
def mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with 1-2 hidden layers of 4-32 units."""
    hidden = tuple(log_integer(rng, 4, 32) for _ in range(rng.randint(1, 2)))
    dataset = random_classification(rng, log_integer(rng, 5, 48))
    network = Perceptron(hidden, random_activation(rng), rng.choice(list(LAYERS)))
    return NetworkTask(dataset, network, random_batch_size(rng))


@register("deep-mlp")
def deep_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with 3-5 hidden layers of 6-24 units."""
    hidden = tuple(log_integer(rng, 6, 24) for _ in range(rng.randint(3, 5)))
    dataset = random_classification(rng, log_integer(rng, 5, 32))
    network = Perceptron(hidden, random_activation(rng), rng.choice(["uniform", "he"]))
    return NetworkTask(dataset, network, random_batch_size(rng))


@register("norm-mlp")
def norm_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with layer norm before each of 1-4 activations."""
    hidden = tuple(log_integer(rng, 6, 32) for _ in range(rng.randint(1, 4)))
    dataset = random_classification(rng, log_integer(rng, 5, 32))
    network = NormPerceptron(hidden, random_activation(rng), rng.choice(list(LAYERS)))
    return NetworkTask(dataset, network, random_batch_size(rng))


@register("residual-mlp")
def residual_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers of 1-3 pre-norm residual blocks."""
    width = log_integer(rng, 6, 20)
    network = ResidualPerceptron(
        width, rng.choice([width, 2 * width]), rng.randint(1, 3), random_activation(rng), rng.choice(["uniform", "he"])
    )
    return NetworkTask(random_classification(rng, log_integer(rng, 5, 32)), network, random_batch_size(rng))


@register("regression-mlp")
def regression_mlp(rng: random.Random) -> TaskFamily:
    """MLPs with 1-3 hidden layers, fitted to a random network's outputs by squared error."""
    hidden = tuple(log_integer(rng, 6, 32) for _ in range(rng.randint(1, 3)))
    dataset = TeacherRegression(
        log_integer(rng, 2, 32),
        rng.randint(1, 4),
        log_integer(rng, 500, 2000),
        log_integer(rng, 4, 32),
        rng.choice([0.0, 0.5, 1.0]),
        rng.choice([0.0, 0.1, 0.5]),
    )
    network = Perceptron(hidden, random_activation(rng), rng.choice(list(LAYERS)))
    return NetworkTask(dataset, network, random_batch_size(rng))


@register("autoencoder")
def autoencoder(rng: random.Random) -> TaskFamily:
    """Autoencoders of 6-32 features with a bottleneck of 2-6 units, shallow or with an outer layer each side."""
    features, code, outer = log_integer(rng, 6, 32), rng.randint(2, 6), log_integer(rng, 8, 24)
    hidden = rng.choice([(code,), (outer, code, outer)])
    dataset = Manifold(features, rng.randint(1, 4), log_integer(rng, 500, 2000))
    network = Perceptron(hidden, random_activation(rng), rng.choice(["uniform", "gaussian"]))
    return NetworkTask(dataset, network, random_batch_size(rng))


def _equal(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in [
        Corpus(
            "quick",
            "1",
            _equal("random-quadratic", "random-bowl", "rescaled-quadratic", "valley", "softmax-regression", "mlp"),
        ),
    ]
}
