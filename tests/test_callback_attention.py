"""Weights that use attention: gradients elsewhere, and the true weights in the module at all other times."""

import itertools

import pytest
import torch
from helpers.modules import (
    GAN,
    Batches,
    Regression,
    Validated,
    adamw,
    attentive_rule,
    by_hand,
    quiet_trainer,
    same_state,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.amp import GradScaler

from lightning_hrnn.callbacks import HRNNOptimizerCallback

HOOKS_AT_TRUE_WEIGHTS = (
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
)


def weights(module):
    return torch.cat([param.detach().flatten() for param in module.parameters()])


class Probe(Callback):
    """Write down the weights whenever a hook runs."""

    def __init__(self):
        self.seen = []
        for name in HOOKS_AT_TRUE_WEIGHTS:
            setattr(self, name, self._note(name))

    def _note(self, name):
        def note(trainer, pl_module, *_, **__):
            self.seen.append((name, weights(pl_module)))

        return note


class Attended(Validated):
    """Writes down the weights at which it is differentiated."""

    def __init__(self, configure=adamw):
        super().__init__(configure)
        self.at = []

    def training_step(self, batch, batch_idx):
        self.at.append(weights(self))
        return super().training_step(batch, batch_idx)


def true_weights(rule, batches, epochs, accumulate):
    """The weights before the first step and after each, by a plain loop."""
    module, seen = Regression(), []
    seen.append(weights(module))

    def before_step(params):
        seen.append(torch.cat([param.detach().flatten() for param in params]))

    by_hand(module, batches, epochs, accumulate, before_step, weights=rule, weight_decay=0.01)
    return [*seen[2:], weights(module)], seen[0]


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_hook_but_the_gradients_own_sees_the_true_weights(tmp_path, accumulate, probe_first):
    rule, batches, module, probe = attentive_rule(), Batches(5), Attended(), Probe()
    callbacks = [probe, HRNNOptimizerCallback(rule)] if probe_first else [HRNNOptimizerCallback(rule), probe]
    trainer = quiet_trainer(tmp_path, *callbacks, accumulate_grad_batches=accumulate, val_check_interval=0.5)
    trainer.fit(module, batches, Batches(2, seed=1))
    after, start = true_weights(rule, batches, 2, accumulate)
    known = {tuple(value.tolist()) for value in [start, *after]}
    assert {name for name, _ in probe.seen} == set(HOOKS_AT_TRUE_WEIGHTS)
    wrong = [name for name, value in probe.seen if tuple(value.tolist()) not in known]
    assert wrong == []
    away = [tuple(value.tolist()) not in known for value in module.at]
    assert away == [False] * accumulate + [True] * (len(away) - accumulate)  # the first step has nowhere to look ahead
    assert torch.equal(weights(module), after[-1])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_taken_where_the_plain_loop_takes_them(tmp_path, accumulate):
    rule, module, plain, batches = attentive_rule(), Regression(), Regression(), Batches(7)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(rule), accumulate_grad_batches=accumulate)
    trainer.fit(module, batches)
    optimizer = by_hand(plain, batches, accumulate=accumulate, weights=rule, weight_decay=0.01)
    assert same_state(module.state_dict(), plain.state_dict())
    assert same_state(trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"])


def test_attention_changes_the_run(tmp_path):
    """Else the tests of this file would show nothing."""
    rule = attentive_rule()
    with_it, without = Regression(), Regression()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(rule)).fit(with_it, Batches())
    optimizer_less = [HRNNOptimizerCallback(rule)]
    optimizer_less[0].on_train_batch_start = lambda *_: None

    class AtTheWeights(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.step()

    without = AtTheWeights()
    quiet_trainer(tmp_path, *optimizer_less).fit(without, Batches())
    assert not torch.allclose(weights(with_it), weights(without), atol=1e-6)


def test_a_step_that_the_scaler_skips_returns_to_the_true_weights(tmp_path):
    class Overflows(Attended):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if self.trainer.global_step == 3 else 1)

    module, probe = Overflows(), Probe()
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=128.0))
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), probe, plugins=[precision], max_epochs=1)
    trainer.fit(module, Batches(5), Batches(1))
    ends = [value for name, value in probe.seen if name == "on_train_batch_end"]
    same = [torch.equal(a, b) for a, b in itertools.pairwise(ends)]
    assert same == [False, False, True, False]  # the fourth step was skipped, and it was taken away from the weights
    assert not torch.equal(module.at[3], ends[2])


@pytest.mark.parametrize("average_first", [True, False])
def test_moving_averages_are_of_the_true_weights(tmp_path, average_first):
    rule, batches, module = attentive_rule(), Batches(), Regression()
    callbacks = [EMAWeightAveraging(decay=0.5), HRNNOptimizerCallback(rule)]
    quiet_trainer(tmp_path, *(callbacks if average_first else callbacks[::-1]), accumulate_grad_batches=2).fit(
        module, batches
    )
    after, _ = true_weights(rule, batches, 2, 2)
    average = after[0]
    for value in after[1:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(weights(module), average)


def test_manual_optimization_attends_and_returns(tmp_path):
    seen = []

    class Watched(GAN):
        def training_step(self, batch, batch_idx):
            seen.append(weights(self))
            super().training_step(batch, batch_idx)
            seen.append(weights(self))

    gan, probe = Watched(), Probe()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), probe, max_epochs=1).fit(gan, Batches(4))
    ends = [value for name, value in probe.seen if name == "on_train_batch_end"]
    before_generator = [value for name, value in probe.seen if name == "on_before_optimizer_step"][::2]
    begins, stepped = seen[::2], seen[1::2]
    assert [torch.equal(a, b) for a, b in zip(ends[:-1], begins[1:], strict=True)] == [False] * 3  # both nets attended
    assert all(torch.equal(a, b) for a, b in zip(ends, stepped, strict=True))  # both steps went back by themselves
    generator = slice(sum(param.numel() for param in gan.generator.parameters()))
    for end, before in zip(ends[:-1], before_generator[1:], strict=True):
        assert torch.equal(end[generator], before[generator])


class ByHand(Attended):
    """Differentiates two losses one after the other and steps with every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        other = self(batch[0]).square().mean()
        self.manual_backward(loss)
        self.manual_backward(other)  # through the same weights, which must not have moved
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_manual_optimization_of_two_losses_and_without_a_step(tmp_path):
    module, probe = ByHand(), Probe()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), probe, max_epochs=1)
    trainer.fit(module, Batches(6), Batches(1))
    ends = [value for name, value in probe.seen if name == "on_train_batch_end"]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(ends)] == [False, True, False, True, False]
    assert [torch.equal(at, end) for at, end in zip(module.at[1:], ends[:-1], strict=True)] == [True, *[False] * 4]
    assert torch.equal(weights(module), ends[-1])


def test_an_epoch_cut_short_ends_at_the_true_weights(tmp_path):
    class Stops(Attended):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    module, probe = Stops(), Probe()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), probe, max_epochs=1).fit(
        module, Batches(5), Batches(1)
    )
    last = [value for name, value in probe.seen if name == "on_train_batch_end"][-1]
    assert len(module.at) == 2
    assert all(torch.equal(value, last) for name, value in probe.seen if name in ("on_train_epoch_end", "teardown"))
    assert torch.equal(weights(module), last)


def test_attention_left_on_by_hand_ends_with_the_batch_the_epoch_and_the_fit(tmp_path):
    class Careless(Attended):
        def attend(self, *_):
            (optimizer,) = self.trainer.optimizers
            optimizer.begin_attention()

        on_train_batch_end = on_train_epoch_end = on_validation_end = attend

    module, plain, probe, batches, rule = Careless(), Regression(), Probe(), Batches(3), attentive_rule()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(rule), probe).fit(module, batches, Batches(1))
    after, start = true_weights(rule, batches, 2, 1)
    known = {tuple(value.tolist()) for value in [start, *after]}
    assert [name for name, value in probe.seen if tuple(value.tolist()) not in known] == []
    by_hand(plain, batches, weights=rule, weight_decay=0.01)
    assert same_state(module.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_loss_leaves_the_weights(tmp_path):
    class Silent(Attended):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    module, probe = Silent(), Probe()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), probe, max_epochs=1)
    trainer.fit(module, Batches(4), Batches(1))
    ends = [value for name, value in probe.seen if name == "on_train_batch_end"]
    assert len(ends) == 4
    assert not torch.equal(module.at[3], ends[2])
    assert torch.equal(ends[3], ends[2])
