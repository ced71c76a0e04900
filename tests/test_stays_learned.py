"""What the shipped weights have learned they keep, and they do not walk away from where they began."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_hrnn import HRNN
from lightning_hrnn.evaluation.protocol import ANYTIME, OURS, Learned, Trial
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.evaluation.verdict import count_came_back
from lightning_hrnn.optimizer.kernels import choose_engine
from lightning_hrnn.optimizer.pretrained import load_pretrained


def test_a_loss_that_has_vanished_stays_away():
    """With `hrnn-v7` this network loses by step 2,700 what it had learned by step 2,000."""
    rule = load_pretrained().requires_grad_(False)
    trial = Trial(Setting("nets", 2800, seeds=1), "embeddings", ANYTIME)
    outcome = trial.run(Learned(rule, choose_engine("auto", rule)))
    assert min(loss for (loss,) in outcome.curve) < 1e-6
    assert count_came_back(outcome) == 0


@pytest.mark.parametrize("told", [True, False], ids=["told the length", "untold"])
def test_gradients_seen_once_in_a_hundred_steps_lead_down(told):
    """With `hrnn-v9` three of these runs of known length end above their first loss."""
    rule = load_pretrained().requires_grad_(False)
    trial = Trial(Setting("corpus", 300, seed=2), "sparse-gradient/1", OURS if told else ANYTIME)
    outcome = trial.run(Learned(rule, choose_engine("auto", rule)))
    assert all(final < 0.6 * initial for final, initial in zip(outcome.final, outcome.initial, strict=True))


def test_another_task_is_learned_once_the_first_has_vanished():
    torch.manual_seed(0)
    inputs = torch.randn(128, 16)
    tasks = [(inputs @ torch.randn(16, 5)).argmax(1) for _ in range(2)]
    hidden = torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 5))
    optimizer = HRNN(model.parameters())
    ends = []
    for labels in tasks:
        for _ in range(600):
            loss = cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 1e-6
    assert ends[1] < 1e-3
