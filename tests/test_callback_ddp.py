"""Two processes take the same steps, bit by bit, and those of one process over both their batches."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.modules import Batches, Regression, adamw, attentive_rule, by_hand, quiet_trainer
from helpers.ranks import assert_same_on_all_ranks
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path[:0] = {path!r}
from test_callback_ddp import train

if __name__ == "__main__":
    train(sys.argv[1], "ddp")
"""


def adamw_and_cosine(module):
    optimizer = adamw(module)
    return [optimizer], [CosineAnnealingLR(optimizer, T_max=10)]


class Halves(Regression):
    """Each rank takes its half of every batch; at the end they compare weights and state, and part."""

    def __init__(self, folder):
        super().__init__(adamw_and_cosine)
        self.folder = Path(folder)

    def loss(self, batch):
        return super().loss(tuple(value.chunk(self.trainer.world_size)[self.global_rank] for value in batch))

    def on_train_end(self):
        (optimizer,) = self.trainer.optimizers
        assert isinstance(optimizer, HRNN)
        assert (self.trainer.world_size, self.global_step) == (2, 6)
        for param in self.parameters():
            for value in (param.detach(), *optimizer.state[param].values()):
                assert_same_on_all_ranks(value)
        if self.global_rank == 0:
            torch.save([param.detach() for param in self.parameters()], self.folder / "weights.pt")
        # Gloo's threads may not outlive the interpreter. Forked ranks never end theirs: they run no such handlers.
        atexit.register(torch.distributed.destroy_process_group)


def train(folder, strategy):
    callback = HRNNOptimizerCallback(attentive_rule())
    trainer = quiet_trainer(folder, callback, devices=2, strategy=strategy, accumulate_grad_batches=2)
    trainer.fit(Halves(folder), Batches(5))


def launch_a_script(folder):
    """Lightning launches the second process by running the script once more."""
    script = folder / "train.py"
    script.write_text(SCRIPT.format(path=[str(HERE), str(HERE.parent)]))
    run = [sys.executable, str(script), str(folder)]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp_fork",
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
        pytest.param("ddp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(tmp_path, strategy):
    launch_a_script(tmp_path) if strategy == "ddp" else train(tmp_path, strategy)
    single = Regression()
    by_hand(single, Batches(5), accumulate=2, weights=attentive_rule(), weight_decay=0.01)
    for ours, theirs in zip(torch.load(tmp_path / "weights.pt"), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
