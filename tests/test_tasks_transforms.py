"""Transforms change what they say and nothing else."""

import random

import pytest
import torch

from lightning_hrnn.tasks import FAMILIES, get_family
from lightning_hrnn.tasks.functions import Bowl, Norm, Quadratic
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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(family, params, data, source=None):
    leaves = [p.clone().requires_grad_() for p in params]
    return torch.autograd.grad(family.loss(leaves, data, source).sum(), leaves)


TWO_TENSORS = SumOf((Quadratic(6), Bowl(5.0)))


@pytest.mark.parametrize("wrap", [lambda f: Rescaled(f, 1e-3, 1e3), lambda f: RescaledEntries(f, 1e-3, 1e3)])
def test_rescaling_keeps_losses_and_divides_gradients(wrap):
    plain, _ = TWO_TENSORS.init(50, generator())
    seen, data = wrap(TWO_TENSORS).init(50, generator())
    inner = {key[3:]: value for key, value in data.items() if key.startswith("of/")}
    scales = [data["scale/0"], data["scale/1"]]
    own = [s / scale for s, scale in zip(seen, scales, strict=True)]
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(wrap(TWO_TENSORS).loss(seen, data), TWO_TENSORS.loss(plain, inner), rtol=1e-4, atol=1e-5)
    pairs = zip(gradients(wrap(TWO_TENSORS), seen, data), gradients(TWO_TENSORS, own, inner), scales, strict=True)
    for grad, grad_own, scale in pairs:
        torch.testing.assert_close(grad * scale, grad_own, rtol=1e-4, atol=1e-4)
    for scale in scales:
        assert 1e-3 * (1 - 1e-5) <= scale.min() < 1e-2
        assert 1e2 < scale.max() <= 1e3 * (1 + 1e-5)


def test_rescaling_draws_one_scale_for_a_tensor_or_for_every_entry():
    per_tensor = Rescaled(TWO_TENSORS, 0.1, 10).init(4, generator())[1]
    per_entry = RescaledEntries(TWO_TENSORS, 0.1, 10).init(4, generator())[1]
    assert per_tensor["scale/0"].shape == (4, 1)
    assert per_entry["scale/0"].shape == (4, 6)
    assert per_entry["scale/0"].unique().numel() == 24
    fixed = Rescaled(Norm(3), 50.0, 50.0).init(2, generator())[1]["scale/0"]
    torch.testing.assert_close(fixed, torch.full((2, 1), 50.0))


def test_gradient_noise_has_its_deviation_and_leaves_values():
    plain, noisy = Quadratic(50), GradientNoise(Quadratic(50), 0.3)
    params, data = noisy.init(200, generator())
    assert torch.equal(noisy.loss(params, data, generator(1)), plain.loss(params, data))
    noise = gradients(noisy, params, data, generator(1))[0] - gradients(plain, params, data)[0]
    assert noise.mean().abs() < 0.3 * 4 / 100
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    (full,) = gradients(noisy, params, data)
    assert torch.equal(full, gradients(plain, params, data)[0])  # the full loss has no noise


def test_sparse_gradient_drops_entries_and_keeps_values():
    plain, sparse = Quadratic(50), SparseGradient(Quadratic(50), 0.9)
    params, data = sparse.init(200, generator())
    assert torch.equal(sparse.loss(params, data, generator(1)), plain.loss(params, data))
    (masked,), (full,) = gradients(sparse, params, data, generator(1)), gradients(plain, params, data)
    kept = masked != 0
    assert kept.double().mean().item() == pytest.approx(0.1, abs=0.015)
    torch.testing.assert_close(masked[kept], 10 * full[kept], rtol=1e-4, atol=1e-3)
    other = gradients(sparse, params, data, generator(2))[0] != 0
    assert (kept & other).double().mean().item() == pytest.approx(0.01, abs=0.005)  # drawn anew each time


def test_bfloat16_gradient_rounds_gradients_alone():
    plain, rounded = Quadratic(10), Bfloat16Gradient(Quadratic(10))
    params, data = rounded.init(5, generator())
    assert torch.equal(rounded.loss(params, data, generator(1)), plain.loss(params, data))
    (grad,), (full,) = gradients(rounded, params, data, generator(1)), gradients(plain, params, data)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, full.bfloat16().float())
    assert not torch.equal(grad, full)


def test_log_objective():
    plain, log = Quadratic(10), LogObjective(Quadratic(10))
    params, data = log.init(5, generator())
    losses = plain.loss(params, data)
    torch.testing.assert_close(log.loss(params, data), (losses.double() + 1e-6).log().float() + 13.815511)
    assert log.loss([torch.zeros(1, 10)], {"matrix": torch.zeros(1, 10, 10), "target": torch.zeros(1, 10, 1)}) == 0


def test_sum_adds_losses_and_keeps_parts_apart():
    parts = (Quadratic(4), SURFACES["rosenbrock"], SumOf((Bowl(2.0), Quadratic(3))), Quadratic(4))
    total = SumOf(parts)
    params, data = total.init(3, generator())
    assert [tuple(p.shape) for p in params] == [(3, 4), (3, 2), (3, 2), (3, 3), (3, 4)]
    source = generator()
    drawn = [family.init(3, source) for family in parts]
    expected = sum(family.loss(p, d) for family, (p, d) in zip(parts, drawn, strict=True))
    torch.testing.assert_close(total.loss(params, data), expected)
    moved = [p + (k == 3) for k, p in enumerate(params)]
    grads = gradients(total, params, data), gradients(total, moved, data)
    changed = [not torch.equal(a, b) for a, b in zip(*grads, strict=True)]
    assert changed == [False, False, False, True, False]


def test_stacked_transforms_keep_their_data_apart():
    family = Rescaled(RescaledEntries(Rescaled(Quadratic(5), 10.0, 10.0), 0.1, 10.0), 0.5, 0.5)
    params, data = family.init(4, generator())
    plain, plain_data = Quadratic(5).init(4, generator())
    torch.testing.assert_close(family.loss(params, data), Quadratic(5).loss(plain, plain_data), rtol=1e-4, atol=1e-5)


def test_augmented_families_use_every_transform():
    text = "\n".join(repr(get_family("augmented-network", random.Random(seed))) for seed in range(60))
    assert "augmented-network" in FAMILIES
    for transform in (Rescaled, RescaledEntries, GradientNoise, SparseGradient, Bfloat16Gradient):
        assert f"{transform.__name__}(" in text
