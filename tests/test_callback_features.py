"""What a Trainer can do, it can do with HRNN."""

import itertools

import pytest
import torch
from helpers.modules import Batches, Regression, adamw, attentive_rule, by_hand, quiet_trainer, same_state
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import StepLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN


def state_of(trainer):
    return trainer.optimizers[0].state_dict()["state"]


def weights(module):
    return torch.cat([param.detach().flatten() for param in module.parameters()])


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        ({"gradient_clip_val": 0.05}, lambda params: clip_grad_norm_(params, 0.05)),
        (
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            lambda params: clip_grad_value_(params, 0.01),
        ),
    ],
    ids=["norm", "value"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_and_a_ragged_last_window(tmp_path, arguments, clip, accumulate):
    module, plain, unclipped, batches = Regression(), Regression(), Regression(), Batches(7)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), accumulate_grad_batches=accumulate, **arguments)
    trainer.fit(module, batches)
    optimizer = by_hand(plain, batches, accumulate=accumulate, before_step=clip, weight_decay=0.01)
    assert same_state(module.state_dict(), plain.state_dict())
    assert same_state(state_of(trainer), optimizer.state_dict()["state"])
    assert trainer.global_step == 2 * -(-7 // accumulate)
    by_hand(unclipped, batches, accumulate=accumulate, weight_decay=0.01)
    assert not torch.equal(weights(module), weights(unclipped))


class Closure:
    """Ways in which modules call the optimizer."""

    class Plain(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)

    class Beforehand(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.step()

    class WithoutLoss(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            def closure():
                optimizer_closure()

            assert optimizer.step(closure=closure) is None

    class PastLightning(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            loss = optimizer.optimizer.step(optimizer_closure)
            assert loss.requires_grad is False


@pytest.mark.parametrize("way", ["Plain", "Beforehand", "WithoutLoss", "PastLightning"])
def test_closures(tmp_path, way):
    calls = []

    class Counted(getattr(Closure, way)):
        def training_step(self, batch, batch_idx):
            assert torch.is_grad_enabled()
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    module, plain, batches = Counted(), Regression(), Batches(4)
    quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1).fit(module, batches)
    by_hand(plain, batches, epochs=1, weight_decay=0.01)
    assert calls == [0, 1, 2, 3]
    assert same_state(module.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("when", ["every", "second"])
def test_a_training_step_may_return_none(tmp_path, when):
    class Silent(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if when == "every" or batch_idx == 1 else loss

    module, plain, batches = Silent(), Regression(), Batches(3)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(cooldown=0), max_epochs=1)
    trainer.fit(module, batches)
    batches.items = [] if when == "every" else batches.items[::2]
    optimizer = by_hand(plain, batches, epochs=1, weight_decay=0.01, cool=False)
    assert same_state(module.state_dict(), plain.state_dict())
    assert same_state(state_of(trainer), optimizer.state_dict()["state"])


class Overflows(Regression):
    """Has a gradient without bounds in its third batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1.0)


class Snapshots(Callback):
    """Copies weights and state after every batch."""

    def __init__(self):
        self.taken = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state
        self.taken.append((weights(pl_module), [v.clone() for s in state.values() for v in s.values()]))


@pytest.mark.parametrize("scaled", [True, False])
def test_an_overflow_skips_one_step_and_touches_nothing(tmp_path, scaled):
    module, snapshots = Overflows(), Snapshots()
    plugins = [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=128.0))] if scaled else []
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), snapshots, max_epochs=1, plugins=plugins)
    if scaled:
        trainer.fit(module, Batches(5))
    else:
        with pytest.warns(UserWarning, match="HRNN skipped a step"):
            trainer.fit(module, Batches(5))
    assert [same_state(before, after) for before, after in itertools.pairwise(snapshots.taken)] == [
        False,
        True,
        False,
        False,
    ]
    assert trainer.optimizers[0].skipped_steps == (0 if scaled else 1)
    if scaled:
        assert plugins[0].scaler.get_scale() == 64.0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_precisions(tmp_path, precision, dtype):
    module, batches = Regression(), Batches()
    before = [module.loss(batch).item() for batch in batches]
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), precision=precision, max_epochs=20)
    trainer.fit(module, batches)
    assert {param.dtype for param in module.parameters()} == {dtype}
    assert {value.dtype for state in trainer.optimizers[0].state.values() for value in state.values()} == {
        torch.float32
    }
    module.float()
    assert sum(module.loss(batch).item() for batch in batches) < 0.9 * sum(before)


# ---------------------------------------------------------------- callbacks that deal with optimizers or weights


def test_learning_rate_monitor(tmp_path):
    def configure(module):
        groups = [
            {"params": module.backbone.parameters(), "name": "backbone", "lr": 1e-4},
            {"params": module.head.parameters(), "name": "head"},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.02)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "name": "rate"}}

    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    callback = HRNNOptimizerCallback(schedulers="keep")
    trainer = quiet_trainer(tmp_path, callback, monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.warns(RuntimeWarning, match="do not have momentum"):
        trainer.fit(Regression(configure), Batches(2))
    assert monitor.lrs == {"rate/backbone": pytest.approx([0.1, 0.1, 0.05, 0.05]), "rate/head": [1.0, 1.0, 0.5, 0.5]}
    assert set(monitor.last_weight_decay_values.values()) == {0.02}
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "rate/head-weight_decay" in text.splitlines()[0]


def test_learning_rate_monitor_without_schedulers(tmp_path):
    monitor = LearningRateMonitor("step")
    trainer = quiet_trainer(
        tmp_path, HRNNOptimizerCallback(lr=0.5), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    trainer.fit(Regression(), Batches(2))
    assert monitor.lrs == {"lr-HRNN": [0.5] * 4}


@pytest.mark.parametrize("average_first", [True, False])
def test_stochastic_weight_averaging(tmp_path, average_first):
    """Averages the weights of the last epochs; its learning rate is a multiplier as any other."""
    epochs = []

    class Keep(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append((weights(pl_module), trainer.optimizers[0].param_groups[0]["lr"]))

    module = Regression(lambda module: ([adamw(module)], []))
    callbacks = [StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=2), HRNNOptimizerCallback()]
    trainer = quiet_trainer(tmp_path, *(callbacks if average_first else callbacks[::-1]), Keep(), max_epochs=5)
    trainer.fit(module, Batches(3))
    torch.testing.assert_close(weights(module), torch.stack([value for value, _ in epochs[1:]]).mean(0))
    assert [lr for _, lr in epochs] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])


def test_step_lengths_given_to_weight_averaging_are_pointed_out(tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), averaging, max_epochs=3)
    with pytest.warns(UserWarning, match=r"lr of param group 0 to 0.001.*StochasticWeightAveraging"):
        trainer.fit(Regression(), Batches(2))


def test_a_step_length_given_to_a_new_group_is_pointed_out(tmp_path):
    module = Regression(lambda module: torch.optim.Adam(module.head.parameters(), lr=1e-3))
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), finetuning)
    with pytest.warns(UserWarning, match=r"lr of param group 1 to 0.0001.*BackboneFinetuning"):
        trainer.fit(module, Batches(2))


def test_exponential_moving_average_resumes(tmp_path):
    def run(max_epochs, **fit):
        module = Regression()
        trainer = quiet_trainer(tmp_path, EMAWeightAveraging(decay=0.5), HRNNOptimizerCallback(), max_epochs=max_epochs)
        saved = tmp_path / "ema.ckpt"

        class Save(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 0 and not fit:
                    trainer.save_checkpoint(saved)

        trainer.callbacks.append(Save())
        trainer.fit(module, Batches(3), **fit)
        return module, saved

    whole, saved = run(3)
    resumed, _ = run(3, ckpt_path=saved)
    assert same_state(whole.state_dict(), resumed.state_dict())


def test_learning_rate_finder_leaves_no_trace(tmp_path):
    class WithRate(Regression):
        lr = 3e-4

    module, plain, batches = WithRate(), Regression(), Batches(5)
    callback = HRNNOptimizerCallback()
    found = Tuner(quiet_trainer(tmp_path, callback, max_epochs=20)).lr_find(
        module, batches, min_lr=0.01, max_lr=10, num_training=30, update_attr=False
    )
    assert len(found.results["lr"]) > 20
    assert found.results["lr"][-1] > 1
    assert 0.01 <= found.suggestion() <= 10
    assert "configure_optimizers" not in vars(module)
    quiet_trainer(tmp_path, callback).fit(module, batches)
    by_hand(plain, batches, weight_decay=0.01)
    assert same_state(module.state_dict(), plain.state_dict())


def test_batch_size_finder(tmp_path):
    class Sized(Regression):
        batch_size = 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), self.batch_size
            )

    module = Sized()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=2)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), finder, max_epochs=1)
    trainer.fit(module)
    assert finder.optimal_batch_size == module.batch_size == 4
    assert trainer.global_step == 16
    assert {int(state["age"]) for state in trainer.optimizers[0].state.values()} == {16}  # nothing of the trials


def test_early_stopping_and_progress(tmp_path):
    class Logged(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            return loss

    stop = EarlyStopping("loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), stop, max_epochs=9, enable_progress_bar=True)
    trainer.fit(Logged(), Batches(2))
    assert trainer.current_epoch == 2


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("what", ["module", "layer"])
def test_torch_compile(tmp_path, what):
    module, plain, batches = Regression(), Regression(), Batches(3)
    if what == "layer":
        module.backbone = torch.compile(module.backbone, backend="aot_eager")
        fitted = module
    else:
        fitted = torch.compile(module, backend="aot_eager")
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()))
    trainer.fit(fitted, batches)
    by_hand(plain, batches, weights=attentive_rule(), weight_decay=0.01)
    torch.testing.assert_close(weights(module), weights(plain))
    assert isinstance(trainer.optimizers[0], HRNN)
