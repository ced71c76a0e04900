"""Families of our own, wide in size, scale, noise, conditioning, batch, depth and architecture.

Where a released set is a short list, these factories draw every number anew.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.datasets import (
    Clusters,
    Dataset,
    GaussianInputs,
    Manifold,
    Teacher,
    TeacherRegression,
    TokenInputs,
    TokenPairs,
    TokenTeacher,
)
from lightning_hrnn.tasks.draws import log_integer, log_uniform
from lightning_hrnn.tasks.functions import Bowl, ConditionedQuadratic, Quadratic
from lightning_hrnn.tasks.networks import (
    ACTIVATIONS,
    LAYERS,
    Attention,
    BatchNormPerceptron,
    Embedding,
    Network,
    NetworkTask,
    NormPerceptron,
    Perceptron,
    ResidualPerceptron,
)
from lightning_hrnn.tasks.registry import register
from lightning_hrnn.tasks.structured import DependencyChain, MinMaxWell, OutwardSnake
from lightning_hrnn.tasks.surfaces import SURFACES
from lightning_hrnn.tasks.transforms import (
    Bfloat16Gradient,
    GradientNoise,
    LogObjective,
    Rescaled,
    RescaledEntries,
    SparseGradient,
    SumOf,
)


@register("random-quadratic")
def random_quadratic(rng: random.Random) -> TaskFamily:
    """Quadratics of 5-100 dimensions, Gaussian or of condition 3-10000, half of them noisy."""
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
    """Rosenbrock or Beale, exact or with a little noise."""
    family = rng.choice([SURFACES["rosenbrock"], SURFACES["beale"]])
    return family if rng.random() < 0.7 else GradientNoise(family, log_uniform(rng, 0.01, 1))


def random_inputs(rng: random.Random, low: int, high: int) -> GaussianInputs:
    """500-2000 points of `low` to `high` features, white or correlated, centred or not."""
    features, points = log_integer(rng, low, high), log_integer(rng, 500, 2000)
    return GaussianInputs(features, points, rng.choice([0.0, 0.5, 1.0, 1.5]), rng.choice([0.0, 0.0, 0.5, 1.0]))


def random_classification(rng: random.Random, low: int, high: int) -> Dataset:
    """Teacher or cluster data with 2-10 classes and few wrong labels."""
    inputs, classes = random_inputs(rng, low, high), rng.randint(2, 10)
    label_noise = rng.choice([0.0, 0.0, 0.05, 0.2])
    if rng.random() < 0.5:
        return Teacher(inputs, classes, label_noise, hidden=log_integer(rng, 4, 32))
    separation = log_uniform(rng, 1, 6) / math.sqrt(inputs.features)  # centres lie about 1.4-8 deviations apart
    return Clusters(inputs, classes, label_noise, rng.randint(1, 4), separation)


def random_activation(rng: random.Random) -> str:
    """Any activation; ReLU and GELU, which most nets use, more often."""
    return rng.choice([*ACTIVATIONS, "relu", "relu", "gelu"])


def random_start(rng: random.Random) -> str:
    """Any initialisation; torch's own, which most nets keep, more often."""
    return rng.choice([*LAYERS, "uniform"])


def random_widths(rng: random.Random, layers: tuple[int, int], units: tuple[int, int]) -> tuple[int, ...]:
    """Widths of so many hidden layers, each log-uniform."""
    return tuple(log_integer(rng, *units) for _ in range(rng.randint(*layers)))


def fit(rng: random.Random, dataset: Dataset, network: Network) -> TaskFamily:
    """Fit a network to a data set on minibatches of 4-128 examples."""
    return NetworkTask(dataset, network, log_integer(rng, 4, 128))


@register("softmax-regression")
def softmax_regression(rng: random.Random) -> TaskFamily:
    """Softmax regression on 5-100 features, 2-10 classes."""
    return fit(rng, random_classification(rng, 5, 100), Perceptron((), start=random_start(rng)))


@register("mlp")
def mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with 1-2 hidden layers of 4-32 units, seven activations, 2-10 classes."""
    network = Perceptron(random_widths(rng, (1, 2), (4, 32)), random_activation(rng), random_start(rng))
    return fit(rng, random_classification(rng, 5, 48), network)


@register("deep-mlp")
def deep_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with 3-5 hidden layers of 6-24 units."""
    start = rng.choice(["uniform", "he"])
    network = Perceptron(random_widths(rng, (3, 5), (6, 24)), random_activation(rng), start)
    return fit(rng, random_classification(rng, 5, 32), network)


@register("wide-mlp")
def wide_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with 1-2 hidden layers of 32-80 units on 16-64 features."""
    network = Perceptron(random_widths(rng, (1, 2), (32, 80)), random_activation(rng), random_start(rng))
    return fit(rng, random_classification(rng, 16, 64), network)


@register("norm-mlp")
def norm_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with layer norm before each of 1-4 activations."""
    network = NormPerceptron(random_widths(rng, (1, 4), (6, 32)), random_activation(rng), random_start(rng))
    return fit(rng, random_classification(rng, 5, 32), network)


@register("residual-mlp")
def residual_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers of 1-3 pre-norm residual blocks."""
    width, start = log_integer(rng, 6, 20), rng.choice(["uniform", "he"])
    inner = width * rng.randint(1, 2)
    network = ResidualPerceptron(width, inner, rng.randint(1, 3), random_activation(rng), start)
    return fit(rng, random_classification(rng, 5, 32), network)


@register("regression-mlp")
def regression_mlp(rng: random.Random) -> TaskFamily:
    """MLPs with 1-3 hidden layers, fitted to a random network's outputs by squared error."""
    noise = rng.choice([0.0, 0.1, 0.5])
    dataset = TeacherRegression(random_inputs(rng, 2, 32), rng.randint(1, 4), log_integer(rng, 4, 32), noise)
    network = Perceptron(random_widths(rng, (1, 3), (6, 32)), random_activation(rng), random_start(rng))
    return fit(rng, dataset, network)


@register("autoencoder")
def autoencoder(rng: random.Random) -> TaskFamily:
    """Autoencoders of 6-32 features with a bottleneck of 2-6 units, shallow or deep."""
    code, outer = rng.randint(2, 6), log_integer(rng, 8, 24)
    dataset = Manifold(log_integer(rng, 6, 32), rng.randint(1, 4), log_integer(rng, 500, 2000))
    network = Perceptron(rng.choice([(code,), (outer, code, outer)]), random_activation(rng), random_start(rng))
    return fit(rng, dataset, network)


@register("embedding-mlp")
def embedding_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers of averaged embeddings, 20-200 tokens of very different frequency."""
    tokens = TokenInputs(log_integer(rng, 20, 200), log_integer(rng, 500, 2000), rng.randint(2, 6), rng.uniform(0, 1.2))
    head = Perceptron(random_widths(rng, (0, 1), (6, 16)), random_activation(rng), random_start(rng))
    dataset = TokenTeacher(tokens, rng.randint(2, 6), rng.choice([0.0, 0.1]))
    return fit(rng, dataset, Embedding(log_integer(rng, 4, 12), head))


@register("batch-norm-mlp")
def batch_norm_mlp(rng: random.Random) -> TaskFamily:
    """Classifiers with batch norm before each of 1-4 activations, on minibatches of 16-128 examples."""
    network = BatchNormPerceptron(random_widths(rng, (1, 4), (6, 32)), random_activation(rng), random_start(rng))
    return NetworkTask(random_classification(rng, 5, 32), network, log_integer(rng, 16, 128))


@register("few-epochs")
def few_epochs(rng: random.Random) -> TaskFamily:
    """MLPs of 5 kinds on 4000-16000 examples, so many that a run sees each a few times, on minibatches of 8-64.

    The other families have so few examples that a run of a thousand steps learns them by heart; here the noise of
    minibatches sets how low the loss gets, as it does on large sets of real data.
    """
    family = rng.choice([mlp, deep_mlp, wide_mlp, norm_mlp, residual_mlp])(rng)
    assert isinstance(family, NetworkTask)
    assert isinstance(family.dataset, Clusters | Teacher)
    inputs = replace(family.dataset.inputs, points=log_integer(rng, 4000, 16000))
    return replace(family, dataset=replace(family.dataset, inputs=inputs), batch_size=log_integer(rng, 8, 64))


@register("attention")
def attention(rng: random.Random) -> TaskFamily:
    """Classifiers of 1-2 blocks of attention over 3-8 tokens; the label may hang on a pair of them."""
    length, width = rng.randint(3, 8), rng.choice([8, 12])
    tokens = TokenInputs(log_integer(rng, 6, 32), log_integer(rng, 200, 500), length, rng.uniform(0, 0.8))
    classes, label_noise = rng.randint(2, 6), rng.choice([0.0, 0.0, 0.1])
    of_pairs = rng.random() < 0.7
    dataset: Dataset = (TokenPairs if of_pairs else TokenTeacher)(tokens, classes, label_noise)
    inner = width * rng.randint(1, 2)
    blocks, scale = rng.choice([1, 1, 2]), log_uniform(rng, 0.05, 1.0)
    network = Attention(length, width, inner, blocks, random_activation(rng), scale)
    return NetworkTask(dataset, network, log_integer(rng, 8, 24))


def augment(rng: random.Random, family: TaskFamily, noise: tuple[float, float]) -> TaskFamily:
    """Wrap a family in a random choice of transforms.

    Args:
        rng: source of the choices.
        family: what to wrap.
        noise: range of the gradient noise, on the family's own scale.

    Returns:
        The family with, each by chance: gradient noise, a sparse gradient, rescaled entries (up to 30 either way),
        rescaled tensors (up to 1000 either way in all), a gradient rounded to bfloat16.
    """
    if rng.random() < 0.3:
        family = GradientNoise(family, log_uniform(rng, *noise))
    if rng.random() < 0.1:
        family = SparseGradient(family, rng.uniform(0.3, 0.95))
    if rng.random() < 0.3:
        spread = log_uniform(rng, 1, 30)
        family = RescaledEntries(family, 1 / spread, spread)
    if rng.random() < 0.7:
        spread = log_uniform(rng, 1, 30)
        scale = log_uniform(rng, 1e-3 * spread, 1e3 / spread)
        family = Rescaled(family, scale / spread, scale * spread)
    return Bfloat16Gradient(family) if rng.random() < 0.3 else family


@register("augmented-network")
def augmented_network(rng: random.Random) -> TaskFamily:
    """Any of the small networks above, rescaled, noisy, sparse or rounded."""
    factories = [softmax_regression, mlp, mlp, deep_mlp, norm_mlp, residual_mlp, regression_mlp, autoencoder]
    return augment(rng, rng.choice(factories)(rng), noise=(1e-3, 0.1))


def random_function(rng: random.Random) -> TaskFamily:
    """A quadratic, a test function or a structured task."""
    dim = log_integer(rng, 4, 64)
    return rng.choice(
        [
            Quadratic(dim),
            ConditionedQuadratic(dim, log_uniform(rng, 3, 1e4)),
            LogObjective(Quadratic(dim)),
            DependencyChain(dim),
            OutwardSnake(dim),
            MinMaxWell(dim),
            rng.choice(list(SURFACES.values())),
        ]
    )


@register("augmented-function")
def augmented_function(rng: random.Random) -> TaskFamily:
    """Quadratics, test functions and structured tasks, rescaled, noisy, sparse or rounded."""
    return augment(rng, random_function(rng), noise=(1e-2, 1.0))


@register("augmented-sum")
def augmented_sum(rng: random.Random) -> TaskFamily:
    """Sums of 2-5 such functions, one tensor each, every tensor on a scale of its own."""
    return augment(rng, SumOf(tuple(random_function(rng) for _ in range(rng.randint(2, 5)))), noise=(1e-2, 1.0))
