"""State in bfloat16 against single precision: what training arrives at does not move.

`pytest -s tests/test_state_precision.py` prints the numbers.
"""

import random

import pytest
import torch
from torch import nn

from lightning_hrnn.evaluation.nets import VALIDATION_NETS
from lightning_hrnn.meta.population import TaskBatch
from lightning_hrnn.optimizer.kernels import build
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.tasks.corpus import FAMILIES

STEPS, INSTANCES = 300, 8
FROM_CORPUS = ("norm-mlp", "autoencoder", "softmax-regression", "quadratic-noisy")


def family_of(name):
    return VALIDATION_NETS[name]() if name in VALIDATION_NETS else FAMILIES[name](random.Random(0))


def final_losses(name, state_dtype, scale=1.0):
    """Train instances of a task side by side, as one model; return the full loss of each. [B]"""
    batch = TaskBatch.draw(family_of(name), INSTANCES, seed=1)
    params = [nn.Parameter(scale * value) for value in batch.params]
    optimizer = HRNN(params, state_dtype=state_dtype)
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch.family.loss(params, batch.data, batch.generator).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return batch.family.loss(params, batch.data)


@pytest.mark.skipif(build.why_unavailable() is not None, reason="the eager kernel does not round stochastically")
@pytest.mark.parametrize("name", ["conv", *FROM_CORPUS])
def test_final_losses_do_not_move(name):
    """They differ as those of runs do whose first parameters differ by a millionth."""
    full = final_losses(name, torch.float32)
    shift = (final_losses(name, torch.bfloat16) / full).log()
    chance = (final_losses(name, torch.float32, scale=1 + 1e-6) / full).log()
    print(f"\n{name}: loss {full.mean():.4g}, log ratio of bfloat16 {shift.mean():+.4f} (median size", end=" ")
    print(f"{shift.abs().median():.4f}), of a perturbed run {chance.mean():+.4f} ({chance.abs().median():.4f})")
    assert shift.isfinite().all()
    assert abs(shift.mean()) < 0.1 + 2 * chance.abs().mean()
