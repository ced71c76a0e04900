"""A run that is killed in the middle of a save goes on from the checkpoint before, bit by bit."""

import multiprocessing
import os
import signal
import tempfile

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from helpers.modules import Batches, Regression, adamw, attentive_rule, quiet_trainer, same_state
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SAVES_BEFORE = 3


def configure(module):
    optimizer = adamw(module)
    return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 12), "interval": "step"}]


def run(folder, **fit):
    """Train for six epochs, saving after each, over the one before."""
    module = Regression(configure)
    saves = ModelCheckpoint(folder / "saved", filename="latest", every_n_epochs=1, enable_version_counter=False)
    callback = HRNNOptimizerCallback(attentive_rule(), schedulers="keep", on_divergence="adamw")
    trainer = quiet_trainer(folder, callback, saves, max_epochs=6, enable_checkpointing=True)
    trainer.fit(module, Batches(2), **fit)
    return module, trainer


def kill_in_mid_save(folder, where):
    """Train, and die by SIGKILL at the fourth save: no handler runs, nothing is flushed."""
    tempfile.tempdir = str(folder)  # the file system of the checkpoints, so that Lightning's last move is atomic
    original, saves = getattr(LocalFileOpener, where), []

    def die(self, *args):
        saves.append(1)
        if len(saves) <= SAVES_BEFORE:
            return original(self, *args)
        if where == "write":
            self.f.write(args[0][: len(args[0]) // 2])
            self.f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(LocalFileOpener, where, die)
    run(folder)


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_run_killed_in_mid_save_goes_on_from_the_save_before(tmp_path, where):
    process = multiprocessing.get_context("fork").Process(target=kill_in_mid_save, args=(tmp_path, where))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    path = tmp_path / "saved" / "latest.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2 * SAVES_BEFORE
    assert [file for file in tmp_path.iterdir() if file.name.startswith("tmp")], "it was not killed within a save"
    resumed, second = run(tmp_path, ckpt_path=path)
    whole, first = run(tmp_path / "whole")
    assert second.global_step == first.global_step == 12
    assert same_state(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert same_state(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())
    schedules = [trainer.lr_scheduler_configs[0].scheduler.state_dict() for trainer in (second, first)]
    assert same_state(*schedules)
