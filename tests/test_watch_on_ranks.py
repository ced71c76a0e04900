"""Telemetry and the watch for divergence on several ranks: whole tensors are measured, and all ranks decide alike."""

import csv

import pytest
import torch
from helpers.modules import Batches, Regression, quiet_trainer
from helpers.ranks import run_on_ranks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.divergence import DivergenceError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
EXPECTED = {}


class Halves(Regression):
    """Each rank takes its part of every batch."""

    def loss(self, batch):
        return super().loss(tuple(value.chunk(self.trainer.world_size)[self.global_rank] for value in batch))


class Sharded(Halves):
    def configure_model(self):
        for layer in (self.backbone, self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class DivergesOnOneRank(Halves):
    """The loss of the second rank alone is not finite; its gradients are."""

    seen = 0

    def loss(self, batch):
        self.seen += 1
        loss = super().loss(batch)
        return loss + float("inf") if self.seen > 3 and self.global_rank == 1 else loss


def logged(folder, module, **arguments):
    """Train, and return what the logger was given."""
    callback, logger = HRNNOptimizerCallback(telemetry="tensor"), CSVLogger(folder, "csv", 0)
    quiet_trainer(folder, callback, logger=logger, log_every_n_steps=2, **arguments).fit(module, Batches(4))
    logger.save()
    if module.global_rank:
        return None
    with (folder / "csv/version_0/metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_as_expected(rows):
    for row, expected in zip(rows or EXPECTED["rows"], EXPECTED["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-5)


def check_telemetry_under_ddp(folder):
    assert_as_expected(logged(folder, Halves(), devices=2, strategy="ddp"))


def check_telemetry_of_shards(folder):
    assert_as_expected(logged(folder, Sharded(), devices=2, strategy=ModelParallelStrategy(2, 1)))


def check_one_rank_diverges_and_all_stop(folder):
    module, callback = DivergesOnOneRank(), HRNNOptimizerCallback(telemetry="off", patience=4)
    with pytest.raises(DivergenceError, match="for 4 steps in a row"):
        quiet_trainer(folder, callback, max_epochs=1, devices=2, strategy="ddp").fit(module, Batches(30))
    assert module.seen == 8


def check_shards_cannot_fall_back(folder):
    callback = HRNNOptimizerCallback(telemetry="off", on_divergence="adamw")
    trainer = quiet_trainer(folder, callback, devices=2, strategy=ModelParallelStrategy(2, 1))
    with pytest.raises(MisconfigurationException, match=r"under ModelParallelStrategy.*Choose on_divergence='stop'"):
        trainer.fit(Sharded(), Batches(2))


def test_on_two_ranks(tmp_path):
    EXPECTED["rows"] = logged(tmp_path / "single", Regression())
    assert len(EXPECTED["rows"]) == 4
    assert torch.tensor([row["hrnn/update_to_param"] for row in EXPECTED["rows"]]).gt(0).all()
    checks = [
        check_telemetry_under_ddp,
        check_telemetry_of_shards,
        check_one_rank_diverges_and_all_stop,
        check_shards_cannot_fall_back,
    ]
    told = run_on_ranks(checks, tmp_path)
    assert not any(told.values()), "\n".join(told.values())
