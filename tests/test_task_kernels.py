"""Losses and gradients of tasks by the compiled operator are those of autograd."""

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from lightning_hrnn.meta import unroll as unroll_module
from lightning_hrnn.meta.kernels.programs import ACTIVATIONS as NUMBERED
from lightning_hrnn.meta.kernels.tasks import LIBRARY, fuse
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import build, choose_engine
from lightning_hrnn.tasks.corpus import FAMILIES
from lightning_hrnn.tasks.datasets import (
    Clusters,
    GaussianInputs,
    Manifold,
    Teacher,
    TokenInputs,
    TokenTeacher,
)
from lightning_hrnn.tasks.functions import ConditionedQuadratic, Norm, Quadratic
from lightning_hrnn.tasks.networks import (
    ACTIVATIONS,
    BatchNormPerceptron,
    Embedding,
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

pytestmark = pytest.mark.skipif(
    build.why_unavailable() is not None, reason=f"no compiled kernels here: {build.why_unavailable()}"
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
POINTS = GaussianInputs(7, 150)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


def apart(a, b):
    """Distance relative to the length of the second."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def assert_same(families, dtype, count=3):
    """Compare gradients, full losses and their gradients, and where the generators are left."""
    population = Population([TaskBatch.draw(family, count, seed) for seed, family in enumerate(families)])
    theta = population.initial_params()
    found = {}
    for fused in (False, True):
        for batch in population.batches:
            batch.generator.manual_seed(5)
        grads = [population.gradient(theta, fused=fused) for _ in range(2)]
        point = theta.clone().requires_grad_()
        losses = population.losses(point, fused=fused)
        weights = torch.linspace(1, 2, len(losses))
        (of_losses,) = torch.autograd.grad((losses * weights).sum(), point)
        with torch.no_grad():
            alone = population.losses(theta, fused=fused)
        left = torch.stack([batch.generator.get_state() for batch in population.batches])
        found[fused] = (left, *grads, losses.detach(), alone, of_losses)
    assert torch.equal(found[True][0], found[False][0])
    for expected, actual in zip(found[False][1:], found[True][1:], strict=True):
        assert actual.isfinite().all()
        assert apart(actual, expected) < TOLERANCE[dtype]
    return population


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "quadratic-large"])
def test_every_family(name, double):
    assert_same([FAMILIES[name](random.Random(seed)) for seed in range(3)], double)


NETWORKS = {
    "linear": Perceptron(),
    "perceptron": Perceptron((9, 4), "tanh"),
    "norm": NormPerceptron((6, 10), "silu"),
    "residual": ResidualPerceptron(6, 9, 2),
}
EVERYTHING = [
    *(NetworkTask(Teacher(POINTS, 5), Perceptron((12, 3), name, "he"), 33) for name in ACTIVATIONS),
    *(NetworkTask(Clusters(POINTS, 3), network, 20) for network in NETWORKS.values()),
    *(NetworkTask(Manifold(6, points=130), Perceptron((2,), "elu"), size) for size in (1, 16, 17, 300)),
    *(
        NetworkTask(TokenTeacher(TokenInputs(20, 140, 3), 4), network(5, Perceptron((6,))), 30)
        for network in (Embedding, OneHotEmbedding)
    ),
    Quadratic(5),
    ConditionedQuadratic(40, 100.0),
]


def test_every_kind(dtype):
    population = assert_same(EVERYTHING, dtype)
    assert population._fused.known.keys() == set(range(len(EVERYTHING)))
    assert tuple(ACTIVATIONS) == NUMBERED


WRAPPERS = [
    lambda family: Rescaled(family, 0.1, 10.0),
    lambda family: RescaledEntries(family, 0.5, 2.0),
    lambda family: GradientNoise(family, 0.3),
    lambda family: SparseGradient(family, 0.5),
    Bfloat16Gradient,
    LogObjective,
]


@pytest.mark.parametrize("order", [1, -1])
def test_wrappers_in_any_order(order, double):
    """Each alone, all at once, every neighbouring pair."""
    inner = (Quadratic(6), NetworkTask(Teacher(POINTS), Perceptron((4,)), 10))
    chains = [[wrapper] for wrapper in WRAPPERS] + [WRAPPERS, *([a, b] for a, b in pairwise(WRAPPERS))]
    families, known = [], set()
    for chain in chains:
        for family in inner:
            for wrapper in chain[::order]:
                family = wrapper(family)
            if LogObjective not in chain[::order][1:]:  # autograd's, where it is not the innermost
                known.add(len(families))
            families.append(family)
    population = assert_same(families, double)
    assert population._fused.known.keys() == known


@dataclass(frozen=True)
class Doubled(Perceptron):
    """A perceptron of somebody's own."""

    def forward(self, params, inputs):
        return 2 * super().forward(params, inputs)


def test_what_the_operator_does_not_know_is_left_to_autograd(double):
    dataset = Clusters(POINTS, 3)
    families = [
        NetworkTask(dataset, Doubled((4,)), 10),
        NetworkTask(dataset, BatchNormPerceptron((4,)), 10),
        Norm(5, 2.5),
        NetworkTask(dataset, Perceptron((4,)), 10),
    ]
    population = assert_same(families, double)
    assert population._fused.known.keys() == {3}
    assert fuse(population.batches[:3]) is None


def test_a_diverged_instance_does_not_touch_the_others():
    population = Population([TaskBatch.draw(family, 3, 0) for family in EVERYTHING])
    theta = population.initial_params()
    broken = theta.clone()
    views = population.views(broken)
    for params in views:
        params[0][1] = float("inf")
    grads = []
    for point in (theta, broken):
        for batch in population.batches:
            batch.generator.manual_seed(5)
        grads.append(population.views(population.gradient(point, fused=True)))
    assert all(value.isfinite().all() for params in grads[1] for value in params)
    for whole, part in zip(*grads, strict=True):
        for expected, actual in zip(whole, part, strict=True):
            assert torch.equal(actual[[0, 2]], expected[[0, 2]])


def test_the_number_of_threads_changes_nothing():
    population = Population([TaskBatch.draw(family, 3, 0) for family in EVERYTHING])
    theta, before = population.initial_params(), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(population._fused.full(theta, with_grad=True))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_an_unroll_on_the_compiled_engine_takes_fused_gradients(double):
    torch.manual_seed(0)
    rule = HierarchicalRNN()
    results = {}
    for name in ("eager", "cpp"):
        population = Population([TaskBatch.draw(family, 2, seed) for seed, family in enumerate(EVERYTHING[:9])])
        start = unroll_module.begin(rule, population, -5.0)
        result = unroll_module.unroll(rule, population, start, 4, {1, 3}, choose_engine(name, rule))
        grads = torch.autograd.grad(result.losses.log().sum(), list(rule.parameters()), allow_unused=True)
        assert ("_fused" in vars(population)) == (name == "cpp")
        results[name] = [result.losses.detach(), *(grad for grad in grads if grad is not None)]
    assert len(results["eager"]) == len(results["cpp"]) > 10
    for expected, actual in zip(results["eager"], results["cpp"], strict=True):
        assert apart(actual, expected) < 1e-9


def test_without_a_compiler_autograd_does_it_all(monkeypatch):
    build.compiled.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    population = Population([TaskBatch.draw(Quadratic(4), 2, 0)])
    theta = population.initial_params()
    assert fuse(population.batches) is None
    assert torch.equal(population.gradient(theta, fused=True), population.gradient(theta))
    with pytest.raises(build.BuildError, match="install g"):
        build.compiled(LIBRARY)
    build.compiled.cache_clear()
