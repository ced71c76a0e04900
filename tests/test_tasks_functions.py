"""Closed-form tasks: values known from elsewhere, minima, and the structure each family is named for."""

import math

import numpy as np
import pytest
import torch

from lightning_hrnn.tasks.functions import Bowl, ConditionedQuadratic, Norm, Quadratic
from lightning_hrnn.tasks.structured import (
    DependencyChain,
    MatrixMultiplication,
    MinMaxWell,
    OutwardSnake,
    ProjectionQuadratic,
    SumOfQuadratics,
)
from lightning_hrnn.tasks.surfaces import SURFACES

# The textbook formulas, unshifted, and their minima.
TEXTBOOK = {
    "ackley": (
        lambda x, y: (
            -20 * np.exp(-0.2 * np.sqrt((x**2 + y**2) / 2))
            - np.exp((np.cos(2 * np.pi * x) + np.cos(2 * np.pi * y)) / 2)
            + 20
            + np.e
        ),
        0.0,
    ),
    "beale": (
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        0.0,
    ),
    "booth": (lambda x, y: (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2, 0.0),
    "branin": (
        lambda x, y: (
            (y - 5.1 * x**2 / (4 * np.pi**2) + 5 * x / np.pi - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(x) + 10
        ),
        0.39788735772973816,
    ),
    "log-sum-exp": (
        lambda x, y: np.log(np.exp(x + 3 * y - 0.1) + np.exp(x - 3 * y - 0.1) + np.exp(-x - 0.1)),
        0.9397207708399179,
    ),
    "matyas": (lambda x, y: 0.26 * (x**2 + y**2) - 0.48 * x * y, 0.0),
    "michalewicz": (
        lambda x, y: -np.sin(x) * np.sin(x**2 / np.pi) ** 10 - np.sin(y) * np.sin(2 * y**2 / np.pi) ** 10,
        -1.806622885347196,
    ),
    "rosenbrock": (lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2, 0.0),
    "styblinski-tang": (
        lambda x, y: 0.5 * (x**4 - 16 * x**2 + 5 * x + y**4 - 16 * y**2 + 5 * y),
        -78.33233140754282,
    ),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(family, params, data, source=None):
    leaves = [p.clone().requires_grad_() for p in params]
    return torch.autograd.grad(family.loss(leaves, data, source).sum(), leaves)


def test_every_surface_has_a_textbook_formula():
    assert TEXTBOOK.keys() == SURFACES.keys()


@pytest.mark.parametrize("name", SURFACES)
def test_surface_is_the_textbook_formula_less_its_minimum(name):
    surface, (formula, minimum) = SURFACES[name], TEXTBOOK[name]
    params, _ = surface.init(1000, generator())
    points = params[0].double()
    expected = formula(*points.numpy().T) - minimum
    np.testing.assert_allclose(surface.loss([points], {}).numpy(), expected, rtol=1e-9, atol=1e-5)


@pytest.mark.parametrize("name", SURFACES)
def test_surface_starts_in_its_box_and_has_its_minimum_there(name):
    surface = SURFACES[name]
    starts = surface.init(2000, generator())[0][0]
    low, high = torch.tensor(surface.low), torch.tensor(surface.high)
    assert ((starts >= low) & (starts <= high)).all()
    width = high - low
    assert ((starts.amin(0) - low) < 0.01 * width).all()
    assert ((high - starts.amax(0)) < 0.01 * width).all()
    around = torch.tensor(surface.minimizer) + torch.randn(4000, 2, generator=generator()) * torch.logspace(
        -8, -3, 4000
    ).unsqueeze(-1)
    near = surface.loss([around], {})
    assert (near >= 0).all()  # in float32: rounding makes no loss negative
    assert surface.loss([torch.tensor([surface.minimizer])], {}).item() < 2e-5
    assert (surface.loss([starts], {}) >= 0).all()


def test_quadratic_is_half_the_squared_residual():
    family = Quadratic(7)
    (x,), data = family.init(3, generator())
    for i in range(3):
        w, y = data["matrix"][i].numpy(), data["target"][i, :, 0].numpy()
        expected = 0.5 * np.sum((w @ x[i].numpy() - y) ** 2)
        assert family.loss([x], data)[i].item() == pytest.approx(expected, rel=1e-5)


def test_conditioned_quadratic_keeps_its_condition():
    _, data = ConditionedQuadratic(30, condition=100.0).init(4, generator())
    eigenvalues = torch.linalg.eigvalsh(data["matrix"].mT @ data["matrix"])
    assert eigenvalues.min() >= 0.01 * (1 - 1e-4)
    assert eigenvalues.max() <= 1 + 1e-4
    assert (eigenvalues[:, -1] / eigenvalues[:, 0] > 30).all()  # 30 log-uniform draws span most of it


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_norm_is_numpys_norm(power):
    family = Norm(9, power)
    (x,), data = family.init(2, generator())
    residual = (data["matrix"] @ x.unsqueeze(-1) - data["target"]).squeeze(-1).numpy()
    np.testing.assert_allclose(family.loss([x], data), np.linalg.norm(residual, power, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(("condition", "angle"), [(0.1, 0.0), (5.0, 0.0), (5.0, math.pi / 4)])
def test_bowl_curvatures_and_axes(condition, angle):
    def loss(x):
        return Bowl(condition, angle).loss([x.unsqueeze(0)], {}).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(2, dtype=torch.float64))
    first = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    second = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
    torch.testing.assert_close(hessian @ first, first)
    torch.testing.assert_close(hessian @ second, condition * second)


def test_chain_moves_in_order():
    family = DependencyChain(3)
    (blocked,) = gradient(family, [torch.tensor([[1e6, 1.0, 1.0]])], {})
    (opened,) = gradient(family, [torch.tensor([[0.0, 1.0, 1.0]])], {})
    assert blocked.abs()[0, 1] < 1e-9
    assert opened.abs()[0, 1] > 0.1
    assert opened[0, 0] == 0  # solved
    assert opened.abs()[0, 2] < opened.abs()[0, 1]
    losses = family.loss([torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])], {})
    assert losses.tolist() == pytest.approx([(1 / 2 + 3 / 4 + 7 / 8) / 3, (0.5 + 0.75) / 3, 0.5 / 3, 0])


def test_snake_gradients_fade_along_the_valley_while_its_turns_do_not():
    family = OutwardSnake(5)
    _, data = family.init(1, generator())
    along = torch.linspace(3, 300, 200).unsqueeze(-1)
    valley = torch.cat([along, 2 * torch.cos(along + data["phase"])], 1)
    every = {"phase": data["phase"].expand(200, -1)}
    losses = family.loss([valley], every)
    assert (losses.diff() < 0).all()
    torch.testing.assert_close(losses, (1 + along.squeeze(-1) ** 2).rsqrt(), rtol=1e-3, atol=1e-6)
    (grads,) = gradient(family, [valley], every)
    assert grads[-1].norm() < 1e-3 * grads[0].norm()
    aside = valley.clone()
    aside[:, 1] += 1
    torch.testing.assert_close(family.loss([aside], every) - losses, torch.full((200,), 0.25), rtol=1e-3, atol=1e-5)


def test_well_moves_the_extremes_only():
    family = MinMaxWell(6)
    x = torch.tensor([[0.5, -3.0, 1.0, 2.0, -0.1, 1.5]])
    (grad,) = gradient(family, [x], {})
    assert grad.nonzero()[:, 1].tolist() == [1, 4]
    assert grad[0, 1] < 0 < grad[0, 4]  # the largest, -3, shrinks; the smallest, -0.1, grows
    assert 0 <= family.loss([torch.tensor([[1.0, -1.0, 1.0]])], {}).item() < 1e-4
    assert (family.loss([1 + 1e-3 * torch.randn(1000, 3, generator=generator())], {}) >= 0).all()


def test_sum_of_quadratics_ends_at_the_mean():
    family = SumOfQuadratics(4, batch_size=8, points=50)
    _, data = family.init(2, generator())
    centre = data["points"].mean(1)
    assert family.loss([centre], data).max() < 1e-12
    assert family.loss([centre], data, generator()).min() > 0  # a minibatch has another centre
    torch.testing.assert_close(family.loss([centre + 1], data), torch.full((2,), 2.0))


def test_projection_quadratic_sees_its_minibatch_only():
    family = ProjectionQuadratic(20, batch_size=3)
    (x,), data = family.init(2, generator())
    grads = torch.stack([gradient(family, [x], data, generator(s))[0][0] for s in range(2)])
    assert torch.linalg.matrix_rank(grads) == 2
    assert family.loss([torch.zeros_like(x)], data).max() == 0
    one = torch.stack([gradient(family, [x * k], data, generator(1))[0][0] for k in (1, 2)])
    torch.testing.assert_close(one[1], 2 * one[0])  # same directions: linear


def strassen():
    """Strassen's seven products, as the forms of A and B and the gathering of C; rows: 11, 12, 21, 22."""
    a = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]]
    b = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    c = [[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    return [torch.tensor(m, dtype=torch.float32).T.unsqueeze(0) for m in (a, b, c)]


def test_strassens_algorithm_solves_matrix_multiplication():
    family = MatrixMultiplication(2, 7)
    assert [p.shape for p in family.init(1, generator())[0]] == [p.shape for p in strassen()]
    assert family.loss(strassen(), {}).item() == 0
    spoilt = strassen()
    spoilt[2][0, 0, 0] = 0
    assert family.loss(spoilt, {}).item() == 4  # the lost product, (A11 + A22)(B11 + B22), has four terms
    zero = [torch.zeros(1, 9, 23)] * 3
    assert MatrixMultiplication(3, 23).loss(zero, {}).item() == 27  # n^3 products make up the whole tensor
