"""The rest of what a Trainer can be given: monitors, profilers, finders, progress bars, timers, modes of running."""

import pytest
import torch
from helpers.modules import Batches, Regression, Validated, attentive_rule, quiet_trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN


def columns(tmp_path):
    return set((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(","))


def ages(trainer):
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, HRNN)
    return {int(state["age"]) for state in optimizer.state.values()}


class Sized(Regression):
    batch_size, lr = 2, 3e-4

    def train_dataloader(self):
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
        return torch.utils.data.DataLoader(data, self.batch_size)


# ---------------------------------------------------------------- monitors


def test_throughput_and_device_monitors(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", True)
    monkeypatch.setattr(CPUAccelerator, "get_device_stats", lambda *_: {"cpu_percent": 1.0})
    monitors = [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2), DeviceStatsMonitor()]
    trainer = quiet_trainer(
        tmp_path, HRNNOptimizerCallback(), *monitors, logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    module = Regression()
    module.flops_per_batch = 100
    trainer.fit(module, Batches(4))
    named = columns(tmp_path)
    assert "hrnn/log_lr" in named
    for part in ("batches_per_sec", "cpu_percent"):
        assert any(part in name for name in named), part
    assert ages(trainer) == {8}


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: SimpleProfiler(folder, "out"),
        lambda folder: AdvancedProfiler(folder, "out"),
        lambda folder: PyTorchProfiler(folder, "out", export_to_chrome=False, sort_by_key="cpu_time_total"),
    ],
    ids=["simple", "advanced", "pytorch"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning's profilers, about torch's
@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*:UserWarning")
def test_profilers(tmp_path, make):
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), profiler=make(tmp_path), max_epochs=1)
    trainer.fit(Regression(), Batches(4))
    text = "".join(path.read_text() for path in tmp_path.glob("*out*.txt"))
    assert "optimizer_step" in text or "HRNN" in text
    assert ages(trainer) == {4}


def test_rich_progress_and_summaries(tmp_path):
    callbacks = [RichProgressBar(), RichModelSummary(), HRNNOptimizerCallback()]
    trainer = quiet_trainer(tmp_path, *callbacks, enable_progress_bar=True, enable_model_summary=True)
    trainer.fit(Validated(), Batches(3), Batches(1))
    assert ages(trainer) == {6}
    assert not any(type(callback) is ModelSummary for callback in trainer.callbacks)


# ---------------------------------------------------------------- what ends or changes a fit


def test_a_timer_ends_the_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: trainer.global_step)  # a second a step
    timer = Timer(duration={"seconds": 2}, interval="step")
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), timer, max_epochs=-1)
    trainer.fit(Regression(), Batches(5))
    assert ages(trainer) == {trainer.global_step} == {2}


def test_early_stopping_can_watch_the_optimizer(tmp_path):
    """By a threshold on the validation loss, as anyone would."""
    stop = EarlyStopping("val_loss", mode="min", stopping_threshold=1e9, patience=1)
    trainer = quiet_trainer(tmp_path, stop, HRNNOptimizerCallback(), max_epochs=9)
    trainer.fit(Validated(), Batches(3), Batches(1))
    assert (trainer.current_epoch, ages(trainer)) == (1, {3})


def test_accumulation_that_changes(tmp_path):
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), HRNNOptimizerCallback(attentive_rule())]
    trainer = quiet_trainer(tmp_path, *callbacks)
    trainer.fit(Regression(), Batches(4))
    assert ages(trainer) == {4 + 2}


def test_pruned_weights_stay_pruned(tmp_path):
    module = Regression()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.backbone, "weight")], amount=0.5)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), pruning)
    trainer.fit(module, Batches(3))
    assert (module.backbone.weight == 0).float().mean() >= 0.5
    assert ages(trainer) == {6}


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"fast_dev_run": 2}, 2),
        ({"overfit_batches": 1}, 2),
        ({"limit_train_batches": 0.5}, 4),
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"detect_anomaly": True}, 8),
        ({"barebones": True}, 8),
        ({"inference_mode": False, "num_sanity_val_steps": 1, "val_check_interval": 2}, 8),
    ],
    ids=lambda value: "" if isinstance(value, int) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly")
def test_modes_of_running(tmp_path, arguments, steps):
    if "barebones" in arguments:
        arguments |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), **arguments)
    trainer.fit(*((Regression(), Batches(4)) if "barebones" in arguments else (Validated(), Batches(4), Batches(2))))
    assert ages(trainer) == {trainer.global_step} == {steps}


# ---------------------------------------------------------------- finders


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_learning_rate_finder_as_a_callback(tmp_path):
    module = Sized()
    finder = LearningRateFinder(min_lr=0.1, max_lr=10, num_training_steps=20, update_attr=False)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), finder, max_epochs=1)
    trainer.fit(module)
    swept = finder.optimal_lr.results["lr"]
    assert swept == sorted(swept)
    assert len(swept) > 5
    assert ages(trainer) == {32}  # nothing of the sweep
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_scale_batch_size(tmp_path):
    module = Sized()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(attentive_rule()), max_epochs=1)
    size = Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2, init_val=2)
    assert size == module.batch_size == 4
    assert "configure_optimizers" not in vars(module)
    trainer.fit(module)
    assert ages(trainer) == {16}
