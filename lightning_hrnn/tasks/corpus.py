"""Corpora: named, versioned, weighted mixtures of registered task families.

Convolutional nets, recurrent nets and real data sets never enter a corpus: they are what the rule is judged on. Batch
norm and attention stay out as well, of all but `wide`, `full` and `balanced`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_hrnn.tasks import augmented, released  # noqa: F401 - importing registers the families
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.registry import FAMILIES, unknown

__all__ = ["CORPORA", "FAMILIES", "Corpus", "get_corpus"]


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
        >>> mine = Corpus("mine", "1", {"mlp": 3.0, "random-quadratic": 1.0})
        >>> mine.sample(random.Random(0)).name
        'random-quadratic'
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
            if not _is_positive(weight):
                raise ValueError(f"corpus {self.name!r}: the weight of {family!r} must be positive, got {weight!r}")

    def sample(self, rng: random.Random) -> TaskFamily:
        """Draw a family's name by weight, then its configuration."""
        (name,) = rng.choices(list(self.weights), weights=list(self.weights.values()))
        return FAMILIES[name](rng)


def _is_positive(weight: object) -> bool:
    return isinstance(weight, int | float) and 0 < weight < math.inf


def get_corpus(name: str) -> Corpus:
    """Return the corpus called `name`.

    Raises:
        ValueError: no corpus has that name; the message lists all.
    """
    if name not in CORPORA:
        raise ValueError(unknown("corpus", name, CORPORA))
    return CORPORA[name]


def _equal(names: Iterable[str], weight: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(names, weight)


LARGE = {"quadratic-large": 0.1}  # up to 2048 x 2048 numbers an instance: kept, but rare

SMALL_RELEASED = [name for name in released.RELEASED if name not in LARGE]

EXTENDED = _equal(SMALL_RELEASED, 0.15) | {
    "random-quadratic": 1.0,
    "random-bowl": 0.5,
    "rescaled-quadratic": 0.5,
    "valley": 0.5,
    "augmented-function": 1.5,
    "augmented-sum": 1.0,
    "softmax-regression": 1.5,
    "mlp": 4.0,
    "deep-mlp": 3.0,
    "wide-mlp": 1.5,
    "norm-mlp": 2.0,
    "residual-mlp": 2.0,
    "regression-mlp": 1.5,
    "autoencoder": 1.5,
    "embedding-mlp": 1.0,
    "augmented-network": 4.0,
}

WIDE = EXTENDED | {"batch-norm-mlp": 3.0, "attention": 4.0}

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "quick",
            "2",
            _equal(
                (
                    "random-quadratic",
                    "random-bowl",
                    "rescaled-quadratic",
                    "valley",
                    "softmax-regression",
                    "mlp",
                )
            ),
        ),
        Corpus(
            "paper",
            "2",
            _equal(name for name in released.RELEASED if name not in released.NEURAL_NETS) | LARGE,
        ),
        Corpus("released", "2", _equal(released.RELEASED) | LARGE),
        Corpus("extended", "3", EXTENDED),
        Corpus("wide", "2", WIDE),
        Corpus("full", "2", WIDE | _equal(SMALL_RELEASED, 0.5)),
        Corpus(
            "balanced",
            "2",
            {name: 0.35 * weight for name, weight in WIDE.items()} | _equal(SMALL_RELEASED) | {"few-epochs": 5.0},
        ),
    )
}
