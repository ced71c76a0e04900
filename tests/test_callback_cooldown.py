"""The learned rates cool down over the last part of a fit whose length the Trainer knows."""

import math

import pytest
import torch
from helpers.modules import GAN, Batches, Regression, by_hand, quiet_trainer, same_state
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.optim.lr_scheduler import StepLR

from lightning_hrnn import configure_hrnn
from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import load_pretrained
from lightning_hrnn.optimizer.schedule import cooldown


class Watch(Callback):
    """Record the multiplier of every batch."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[float] = []
        self.lengths: set[float] = set()
        self.stop_after = stop_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.cooldown)
        self.lengths.add(optimizer.run_length)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt


def multipliers(tmp_path, module, batches=5, options=None, **arguments):
    watch = Watch()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(**options or {}), watch, **arguments)
    trainer.fit(module, Batches(batches))
    assert all((optimizer.cooldown, optimizer.run_length) == (1.0, 0.0) for optimizer in trainer.optimizers)
    return watch.seen


def cosine(*shares):
    """Half a cosine that has these shares of its way left."""
    return [(1 - math.cos(math.pi * share)) / 2 for share in shares]


CURVE = [1.0] * 6 + cosine(0.8, 0.6, 0.4, 0.2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 2},
        {"max_epochs": -1, "max_steps": 10},
        {"max_epochs": 7, "max_steps": 10},
        {"max_epochs": 2, "max_steps": 99},
        {"max_epochs": 4, "limit_train_batches": 0.5},
    ],
    ids=["epochs", "steps", "steps first", "epochs first", "limited"],
)
def test_the_last_half_goes_down_on_a_cosine(tmp_path, arguments):
    seen = multipliers(tmp_path, Regression(), **arguments)
    if "limit_train_batches" in arguments:  # 2 of 5 batches in 4 epochs
        assert seen == pytest.approx([1.0] * 5 + cosine(0.75, 0.5, 0.25))
    else:
        assert seen == pytest.approx(CURVE)


def test_accumulation_counts_batches(tmp_path):
    seen = multipliers(tmp_path, Regression(), batches=4, accumulate_grad_batches=2)
    assert seen == pytest.approx([1.0, 1.0, *cosine(0.75, 0.25)])


def test_two_optimizers_by_hand_cool_down_together(tmp_path):
    seen = multipliers(tmp_path, GAN())
    assert seen == pytest.approx([value for value in CURVE for _ in range(2)])


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": -1, "max_steps": 12}, 12),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
    ],
    ids=["epochs", "steps", "first of both", "limited", "accumulated"],
)
def test_weights_are_told_how_many_steps_there_will_be(tmp_path, arguments, steps):
    watch = Watch()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), watch, **arguments)
    trainer.fit(Regression(), Batches(5))
    assert watch.lengths == {steps}
    assert trainer.global_step == steps


@pytest.mark.parametrize("arguments", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 20}], ids=str)
def test_who_steps_by_hand_may_step_any_number_of_times_so_nothing_is_told(tmp_path, arguments):
    watch = Watch()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(), watch, **arguments).fit(GAN(), Batches(5))
    assert watch.lengths == {0.0}


@pytest.mark.parametrize(("factors", "steps"), [({0: 1, 3: 4}, 30), ({0: 4, 3: 1}, 30), ({0: 3}, 18), ({2: 5}, 24)])
def test_accumulation_that_changes_is_counted_epoch_by_epoch(tmp_path, factors, steps):
    watch = Watch()
    callbacks = [GradientAccumulationScheduler(factors), HRNNOptimizerCallback(), watch]
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=6)
    trainer.fit(Regression(), Batches(8))
    assert watch.lengths == {steps}
    assert trainer.global_step == steps


@pytest.mark.parametrize(
    ("options", "arguments"),
    [({"cooldown": 0}, {}), ({"rate": "given"}, {}), ({}, {"max_epochs": -1, "max_time": {"seconds": 1}})],
    ids=["no cooldown", "given", "time alone"],
)
def test_weights_are_told_nothing_where_rates_do_not_cool_down(tmp_path, options, arguments):
    watch = Watch()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(**options), watch, **{"max_epochs": 1, **arguments})
    trainer.fit(Regression(), Batches(5))
    assert watch.lengths == {0.0}


def test_a_length_that_is_taken_back_leaves_nothing_behind(tmp_path):
    class TakeBack(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 3
            if trainer.current_epoch == 2:  # of four, where the cooldown begins
                trainer.fit_loop.max_epochs = -1

    watch = Watch()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(), watch, TakeBack(), max_epochs=4).fit(Regression(), Batches(5))
    assert watch.lengths == {20.0, 0.0}
    assert watch.seen == [1.0] * len(watch.seen)


@pytest.mark.parametrize("multiplier", [math.inf, math.nan, -1.0, "1", None])
def test_a_multiplier_out_of_range_is_refused(multiplier):
    optimizer = HRNN(Regression().parameters())
    with pytest.raises(ValueError, match="cooldown is a multiplier of learned rates, from 0 upwards"):
        optimizer.cooldown = multiplier
    assert optimizer.cooldown == 1.0


@pytest.mark.parametrize("steps", [math.inf, math.nan, -1.0, 1e40, "30", None])
def test_a_length_out_of_range_is_refused(steps):
    optimizer = HRNN(Regression().parameters())
    with pytest.raises(ValueError, match="run_length is a number of steps, 0 where nobody knows"):
        optimizer.run_length = steps
    assert optimizer.run_length == 0.0


def test_no_length_no_cooldown(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 6

    watch = Watch()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), watch, Stop(), max_epochs=-1, min_epochs=0)
    trainer.fit(Regression(), Batches(5))
    assert watch.seen == [1.0] * len(watch.seen)
    assert len(watch.seen) >= 6


@pytest.mark.parametrize(("share", "expected"), [(0, [1.0] * 10), (0.2, [1.0] * 9 + [0.5]), (1, None)])
def test_the_share_is_an_option(tmp_path, share, expected):
    seen = multipliers(tmp_path, Regression(), options={"cooldown": share})
    assert seen == pytest.approx(expected or cosine(*(1 - step / 10 for step in range(10))))


def test_schedulers_that_are_kept_take_its_place(tmp_path):
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        return [optimizer], [StepLR(optimizer, 1)]

    assert multipliers(tmp_path, Regression(configure), options={"schedulers": "keep"}) == [1.0] * 10


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="cooldown is a share of the run"):
        HRNNOptimizerCallback(cooldown=share)
    with pytest.raises(ValueError, match="cooldown is a share of the run"):
        configure_hrnn(Regression(), cooldown=share)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_was_cut_short_goes_on_cooling_down(tmp_path):
    whole, half, resumed = Regression(), Regression(), Regression()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=3)
    trainer.fit(whole, Batches(4))
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    watch = Watch(stop_after=8)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(tmp_path, HRNNOptimizerCallback(), saves, watch, max_epochs=3, enable_checkpointing=True).fit(
            half, Batches(4)
        )
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    end = quiet_trainer(tmp_path, HRNNOptimizerCallback(), saves, max_epochs=3, enable_checkpointing=True)
    end.fit(resumed, Batches(4), ckpt_path=tmp_path / "saved" / "last.ckpt", weights_only=False)
    assert watch.seen[-1] < 1
    assert same_state(resumed.state_dict(), whole.state_dict())
    assert same_state(end.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


@pytest.mark.filterwarnings("ignore:This fit plans")
@pytest.mark.parametrize(("horizon", "warns"), [(1, True), (2, False), (None, False)])
def test_a_run_far_past_the_horizon_warns(tmp_path, horizon, warns, recwarn):
    rule = load_pretrained()
    rule.card, rule.small = {"horizon": horizon} if horizon else {}, None
    multipliers(tmp_path, Regression(), batches=6, options={"weights": rule}, max_epochs=2)  # 12 steps
    found = [str(warning.message) for warning in recwarn if "meta-trained on runs of at most" in str(warning.message)]
    assert len(found) == warns
    if warns:
        assert "plans 12 steps" in found[0]
        assert "rate='given'" in found[0]


def test_it_is_a_multiplier_like_lr():
    """A step at half is half the step; at zero nothing moves, state included."""

    def stepped(multiplier, lr):
        module = Regression()
        optimizer = HRNN(module.parameters(), lr=lr)
        optimizer.cooldown = multiplier
        module.loss(next(iter(Batches()))).backward()
        optimizer.step()
        return module.state_dict(), optimizer.state_dict()["state"]

    half, other = stepped(0.5, 1.0), stepped(1.0, 0.5)
    assert same_state(half, other)
    assert same_state(stepped(0.0, 1.0)[0], Regression().state_dict())
    assert same_state(stepped(0.0, 1.0)[1], HRNN(Regression().parameters()).state_dict()["state"])
    assert not same_state(half[0], stepped(1.0, 1.0)[0])


def test_the_curve():
    assert [cooldown(step, 4) for step in range(6)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert [cooldown(step, 4, share=0) for step in range(6)] == [1.0] * 4 + [0.0] * 2
    assert cooldown(0.75, 1) == pytest.approx(0.5)
    assert cooldown(0.99, 1) < 1e-3  # it ends flat


def test_a_fit_equals_the_loop_written_out(tmp_path):
    module, plain, without = Regression(), Regression(), Regression()
    quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(module, Batches())
    by_hand(plain, Batches(), weight_decay=0.01)
    by_hand(without, Batches(), weight_decay=0.01, cool=False)
    assert same_state(module.state_dict(), plain.state_dict())
    assert not same_state(module.state_dict(), without.state_dict())
