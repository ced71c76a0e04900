"""Under FSDP2 every rank holds a shard of each tensor, and the steps are those of one process with all of them."""

import pytest
import torch
from helpers.modules import Batches, Regression, attentive_rule, by_hand, quiet_trainer
from helpers.ranks import assert_same_on_all_ranks, run_on_ranks, whole
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN


class Halves(Regression):
    """Each rank takes its half of every batch. Uneven: 4 inputs, 6 hidden units, of the head rank 1 has nothing."""

    def loss(self, batch):
        return super().loss(tuple(value.chunk(self.trainer.world_size)[self.global_rank] for value in batch))


class Sharded(Halves):
    """The same under FSDP2."""

    def configure_model(self):
        if not isinstance(self.head.weight, DTensor):
            for layer in (self.backbone, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def strategy(**arguments):
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **arguments)


def state_of(optimizer):
    """All that an optimizer remembers, gathered."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{key: whole(value) for key, value in optimizer.state[param].items()} for param in params]


def check_one_trajectory(folder):
    """Single process, DDP and FSDP2 take the same steps on the same global batches."""
    rule, batches = attentive_rule(), Batches(5)
    single = Regression()
    alone = by_hand(single, batches, accumulate=2, weights=rule, weight_decay=0.01)
    for module, kind in ((Halves(), "ddp"), (Sharded(), strategy())):
        callback = HRNNOptimizerCallback(rule, cooldown=0)
        trainer = quiet_trainer(folder, callback, devices=2, strategy=kind, accumulate_grad_batches=2)
        trainer.fit(module, batches)
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, HRNN)
        assert trainer.global_step == 6
        for ours, theirs in zip(module.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(ours), theirs.detach(), rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(state_of(optimizer), state_of(alone), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-6)
                assert_same_on_all_ranks(ours[key])


TWO_RANKS = [check_one_trajectory]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_on_ranks(TWO_RANKS, tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("check", [check.__name__ for check in TWO_RANKS])
def test_on_two_ranks(two_ranks, check):
    assert not two_ranks[check], two_ranks[check]
