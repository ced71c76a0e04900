"""The 26 task sets of the released code (Wichrowska et al., ICML 2017), one registered family each.

A set is a fixed list of configurations; the factory picks one of them. Formulas that the paper only names (chain,
snake, well) are our own, see `structured`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.datasets import Clusters, GaussianInputs, Parity, Teacher, TokenInputs
from lightning_hrnn.tasks.functions import Bowl, Norm, Quadratic
from lightning_hrnn.tasks.networks import Embedding, NetworkTask, OneHotEmbedding, Perceptron
from lightning_hrnn.tasks.registry import register
from lightning_hrnn.tasks.structured import (
    DependencyChain,
    MatrixMultiplication,
    MinMaxWell,
    OutwardSnake,
    ProjectionQuadratic,
    SumOfQuadratics,
)
from lightning_hrnn.tasks.surfaces import SURFACES
from lightning_hrnn.tasks.transforms import GradientNoise, LogObjective, Rescaled, SparseGradient, SumOf


@dataclass(frozen=True)
class ReleasedSet:
    """A list of concrete families.

    Args:
        description: one line for the docs.
        families: the configurations, equally likely.
    """

    description: str
    families: tuple[TaskFamily, ...]


def softmax_regression(features: int, batch_size: int) -> TaskFamily:
    """Two Gaussian blobs of 1000 points in all, told apart by a linear map."""
    return NetworkTask(Clusters(GaussianInputs(features)), Perceptron(), batch_size)


def token_classifier(network: Embedding) -> TaskFamily:
    """The noisy parity of one of five tokens, told by an embedding."""
    return NetworkTask(Parity(TokenInputs(5), label_noise=0.5), network, batch_size=23)


def sigmoid_mlp(features: int, hidden: tuple[int, ...], batch_size: int) -> TaskFamily:
    """A sigmoid MLP on the two classes of a random teacher."""
    return NetworkTask(Teacher(GaussianInputs(features)), Perceptron(hidden, "sigmoid", "gaussian"), batch_size)


def rescaled(family: TaskFamily, scale: float) -> TaskFamily:
    """Multiply the parameters that the optimizer sees by `scale`."""
    return Rescaled(family, scale, scale)


def noisy(deviation: float, *families: TaskFamily) -> tuple[TaskFamily, ...]:
    """Add Gaussian noise to the gradients of each family."""
    return tuple(GradientNoise(family, deviation) for family in families)


DIMS: Final = (12, 13, 20, 56, 64)  # of the structured sets
QUADRATICS: Final = (Quadratic(20), Quadratic(50), Quadratic(100))
BOWLS: Final = (Bowl(0.1), Bowl(1.0), Bowl(5.0))
TEST_FUNCTIONS: Final = tuple(SURFACES.values())
NORMS: Final = (Norm(22, 1.0), Norm(25, 2.0), Norm(27, 3.0))
MLPS: Final = (
    sigmoid_mlp(8, (8, 5), 10),
    sigmoid_mlp(12, (8, 5, 3), 200),
    sigmoid_mlp(5, (4, 4, 4, 4), 100),
    sigmoid_mlp(11, (4, 5, 6), 64),
    sigmoid_mlp(9, (8,), 128),
    sigmoid_mlp(7, (8, 5), 16),
    sigmoid_mlp(8, (32, 64), 32),
    sigmoid_mlp(12, (16, 8, 3), 50),
    sigmoid_mlp(5, (8, 8, 8, 8), 100),
    sigmoid_mlp(11, (10, 12, 12), 64),
    sigmoid_mlp(9, (32,), 128),
)
SUMS: Final = (
    SumOf((Quadratic(11), Quadratic(3), Quadratic(9), Quadratic(7), Quadratic(5), Quadratic(13))),
    SumOf(TEST_FUNCTIONS),
    SumOf((Quadratic(20), *BOWLS, SURFACES["rosenbrock"])),
    SumOf((softmax_regression(10, 100), Quadratic(10), SURFACES["booth"])),
)

RELEASED: dict[str, ReleasedSet] = {
    "quadratic": ReleasedSet(
        "Gaussian quadratics of 20-100 dimensions", tuple(Quadratic(d) for d in (20, 25, 50, 100))
    ),
    "quadratic-noisy": ReleasedSet(
        "Gaussian quadratics, noise 0-2 on the gradient",
        tuple(GradientNoise(Quadratic(d), s) for d, s in zip((20, 25, 50, 100), (0.5, 0.0, 1.0, 2.0), strict=True)),
    ),
    "quadratic-large": ReleasedSet(
        "Gaussian quadratics of 784, 1024 and 2048 dimensions",
        (Quadratic(784), Quadratic(1024), Quadratic(2048)),
    ),
    "bowl": ReleasedSet("bowls of condition 0.1-5, one turned", (*BOWLS, Bowl(5.0, math.pi / 4))),
    "bowl-noisy": ReleasedSet("bowls, noise 0.1 on the gradient", noisy(0.1, *BOWLS, Bowl(5.0, math.pi / 4))),
    "sparse-softmax": ReleasedSet("noisy parity of one token, by table look-up", (token_classifier(Embedding(5)),)),
    "one-hot-softmax": ReleasedSet("the same, by one-hot vectors", (token_classifier(OneHotEmbedding(5)),)),
    "softmax": ReleasedSet(
        "softmax regression on 10-256 features, two Gaussian blobs",
        tuple(softmax_regression(*c) for c in ((10, 100), (100, 50), (200, 20), (256, 100))),
    ),
    "softmax-noisy": ReleasedSet(
        "softmax regression, more noise on the gradient",
        tuple(
            GradientNoise(softmax_regression(f, n), s)
            for f, n, s in ((10, 100, 0.5), (100, 50, 0.1), (200, 20, 0.1), (256, 100, 0.5))
        ),
    ),
    "test-functions": ReleasedSet("nine classical test functions of two variables", TEST_FUNCTIONS),
    "test-functions-noisy": ReleasedSet("the test functions, noise 1 on the gradient", noisy(1.0, *TEST_FUNCTIONS)),
    "sigmoid-mlp": ReleasedSet("sigmoid MLPs of 1-4 hidden layers on a random teacher's two classes", MLPS),
    "matrix-multiplication": ReleasedSet(
        "algorithms that multiply 2x2 or 3x3 matrices",
        tuple(MatrixMultiplication(n, k) for n, ks in ((2, range(5, 9)), (3, range(19, 25))) for k in ks),
    ),
    "log-objective": ReleasedSet(
        "logarithms of quadratics and bowls", tuple(LogObjective(f) for f in (*QUADRATICS, *BOWLS))
    ),
    "rescaled": ReleasedSet(
        "norms and quadratics whose parameters are scaled by 0.1-1000",
        (
            *(
                rescaled(Norm(18, p), s)
                for p, s in ((2.5, 0.123), (1.5, 8.0), (2.0, 50.0), (3.0, 200.0), (1.0, 1000.0))
            ),
            *(rescaled(Quadratic(d), s) for d, s in ((20, 0.1), (25, 10.0), (50, 350.0), (100, 132.0))),
        ),
    ),
    "norm": ReleasedSet("p-norms of a Gaussian linear system, p = 1, 2, 3", NORMS),
    "norm-noisy": ReleasedSet("p-norms, noise 0.1 on the gradient", noisy(0.1, *NORMS)),
    "sum": ReleasedSet("sums of independent quadratics, test functions and mixtures", SUMS),
    "sum-noisy": ReleasedSet("the sums, noise 0.1 on the gradient", noisy(0.1, *SUMS)),
    "sparse-gradient": ReleasedSet(
        "quadratics and bowls, 99 % of each gradient zero",
        tuple(SparseGradient(f) for f in (*QUADRATICS, *BOWLS)),
    ),
    "sparse-gradient-mlp": ReleasedSet(
        "sigmoid MLPs, 99 % of each gradient zero", tuple(SparseGradient(f) for f in MLPS[:3])
    ),
    "dependency-chain": ReleasedSet(
        "parameters that can only be solved in order", tuple(DependencyChain(d) for d in DIMS)
    ),
    "outward-snake": ReleasedSet(
        "a coiled valley with fading gradients and a constant ideal step",
        tuple(OutwardSnake(d) for d in DIMS),
    ),
    "min-max-well": ReleasedSet(
        "gradients at the largest and the smallest entry only", tuple(MinMaxWell(d) for d in DIMS)
    ),
    "sum-of-quadratics": ReleasedSet(
        "quadratics about 500 points, seen in minibatches of 10-128",
        tuple(SumOfQuadratics(d, n) for d, n in zip(DIMS, (10, 20, 50, 100, 128), strict=True)),
    ),
    "projection-quadratic": ReleasedSet(
        "quadratics along 500 directions, seen in minibatches of 10-128",
        tuple(ProjectionQuadratic(d, n) for d, n in zip(DIMS, (10, 20, 50, 100, 128), strict=True)),
    ),
}

NEURAL_NETS: Final = ("sigmoid-mlp", "sparse-gradient-mlp")  # what the paper's corpus leaves out


def _register(name: str, released: ReleasedSet) -> None:
    def choose(rng: random.Random) -> TaskFamily:
        return rng.choice(released.families)

    choose.__doc__ = f"{released.description[0].upper()}{released.description[1:]}."
    register(name)(choose)


for _name, _released in RELEASED.items():
    _register(_name, _released)
