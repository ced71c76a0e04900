"""Under FSDP2 every rank holds a shard of each tensor, and the steps are those of one process with all of them."""

import csv

import pytest
import torch
from helpers.modules import Batches, Regression, attentive_rule, by_hand, quiet_trainer, same_state
from helpers.ranks import assert_same_on_all_ranks, run_on_ranks, whole
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),  # over tensor parallelism
]

CLIP = 0.05


class Halves(Regression):
    """Each rank takes its part of every batch."""

    def loss(self, batch):
        return super().loss(tuple(value.chunk(self.trainer.world_size)[self.global_rank] for value in batch))


class Sharded(Halves):
    """The same under FSDP2; of the head, whose one row the first rank has, the second has nothing."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments)
        self.options = options

    def configure_model(self):
        if not isinstance(self.head.weight, DTensor):
            for layer in (self.backbone, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"], **self.options)


def shards(ranks=2, **arguments):
    return {"devices": ranks, "strategy": ModelParallelStrategy(ranks, 1, **arguments)}


def state_of(optimizer):
    """All that an optimizer remembers, gathered."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{key: whole(value).clone() for key, value in optimizer.state[param].items()} for param in params]


def weights_of(module):
    return {name: whole(param).clone() for name, param in module.named_parameters()}


def fit(folder, module, ckpt_path=None, **arguments):
    """Four epochs of training with everything on, a checkpoint after each."""
    saves = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    callback = HRNNOptimizerCallback(attentive_rule())
    options = {"max_epochs": 4, "enable_checkpointing": True, "accumulate_grad_batches": 2, "gradient_clip_val": CLIP}
    trainer = quiet_trainer(folder, callback, saves, **options, **arguments)
    trainer.fit(module, Batches(5), ckpt_path=ckpt_path)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, HRNN)
    return module, optimizer


def assert_close_to_one_device(module, folder):
    for name, value in torch.load(folder / "one_device" / "weights.pt").items():
        torch.testing.assert_close(weights_of(module)[name], value, rtol=1e-4, atol=1e-6)


# -- two ranks


def check_one_trajectory(folder):
    """Single process, DDP and FSDP2 take the same steps on the same global batches."""
    rule, batches = attentive_rule(), Batches(5)
    single = Regression()
    alone = by_hand(single, batches, accumulate=2, weights=rule, weight_decay=0.01)
    for module, how in ((Halves(), {"devices": 2, "strategy": "ddp"}), (Sharded(), shards())):
        callback = HRNNOptimizerCallback(rule)
        trainer = quiet_trainer(folder, callback, accumulate_grad_batches=2, **how)
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
    assert module.head.weight.to_local().numel() == (6, 0)[module.global_rank]


def resume_is_exact(folder, distributed):
    how = shards(save_distributed_checkpoint=distributed)
    module, optimizer = fit(folder, Sharded(), **how)
    assert_close_to_one_device(module, folder.parent)
    path = folder / "epoch=1.ckpt"
    assert path.is_dir() == distributed
    resumed, second = fit(folder, Sharded(), path, **shards(save_distributed_checkpoint=distributed))
    assert same_state(weights_of(module), weights_of(resumed))
    assert same_state(state_of(optimizer), state_of(second))
    assert second.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert second.state[resumed.backbone.weight]["hidden"].placements == (Shard(1),)


def check_full_checkpoints(folder):
    resume_is_exact(folder, distributed=False)


def check_sharded_checkpoints(folder):
    resume_is_exact(folder, distributed=True)


def check_going_on_from_one_device(folder):
    path = folder.parent / "one_device" / "epoch=1.ckpt"
    module, _ = fit(folder, Sharded(), path, **shards())
    assert_close_to_one_device(module, folder.parent)


def backwards(module):
    """AdamW over two groups, against the order of the module."""
    layers = (module.head, module.backbone)
    return torch.optim.AdamW([{"params": [layer.bias, layer.weight]} for layer in layers], lr=3e-4)


def check_params_in_another_order(folder):
    """Each parameter finds its own state, whichever strategy wrote it and in whatever order the groups have it."""
    path = folder.parent / "one_device" / "backwards" / "epoch=1.ckpt"
    module, optimizer = fit(folder, Sharded(backwards), path, **shards(save_distributed_checkpoint=False))
    assert_close_to_one_device(module, folder.parent)
    assert [param.numel() for group in optimizer.param_groups for param in group["params"]] == [1, 6, 6, 24]


def check_precisions(folder):
    """What moves in 16 bits moves almost like what moves in 32, and the state stays in 32."""
    start, moved = weights_of(Regression()), {}
    cases = {
        "32-true": Sharded(),
        "bf16-true": Sharded(),
        "bf16-mixed": Sharded(),
        "policy": Sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)),
    }
    for name, module in cases.items():
        precision = "32-true" if name == "policy" else name
        _, optimizer = fit(folder / name, module, precision=precision, **shards())
        assert module.backbone.weight.dtype == (torch.bfloat16 if name == "bf16-true" else torch.float32)
        assert {value.dtype for value in optimizer.state[module.backbone.weight].values()} <= {
            torch.float32,
            module.backbone.weight.dtype,  # of the look-ahead
        }
        after = weights_of(module)
        moved[name] = torch.cat([(after[key].float() - start[key]).flatten() for key in start])
    for name, share in (("bf16-true", 0.5), ("bf16-mixed", 0.2), ("policy", 0.2)):  # the first moves by few last bits
        assert (moved[name] - moved["32-true"]).norm() < share * moved["32-true"].norm()


def check_telemetry(folder):
    """What is logged of shards is what one device logs of all."""
    said = []
    for name, module, how in (("ddp", Halves(), {"devices": 2, "strategy": "ddp"}), ("fsdp2", Sharded(), shards())):
        callback = HRNNOptimizerCallback(attentive_rule(), telemetry="tensor")
        logger = CSVLogger(folder, name=name, version=0)
        options = {"enable_checkpointing": False, "log_every_n_steps": 1, "logger": logger}
        quiet_trainer(folder, callback, **options, **how).fit(module, Batches(5))
        torch.distributed.barrier()  # rank 0 writes the file
        rows = list(csv.DictReader((folder / name / "version_0" / "metrics.csv").open()))
        said.append([{key: float(value) for key, value in row.items() if value} for row in rows])
    assert len(said[0]) == len(said[1]) == 10
    for theirs, ours in zip(*said, strict=True):
        assert {"hrnn/log_lr", "hrnn/hidden_norm/head.bias", "hrnn/skipped_steps"} < ours.keys()
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def check_checkpoints_of_another_optimizer(folder):
    for distributed, kind, match in (
        (False, ValueError, r"not the state of HRNN.*exp_avg"),
        (True, CheckpointException, r"Missing key in checkpoint state_dict: optimizer_0.state.*hidden"),
    ):
        saves = ModelCheckpoint(folder / str(distributed), filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        how = shards(save_distributed_checkpoint=distributed)
        quiet_trainer(folder, saves, max_epochs=1, enable_checkpointing=True, **how).fit(Sharded(), Batches(5))
        how = shards(save_distributed_checkpoint=distributed)
        with pytest.raises(kind, match=match):
            fit(folder, Sharded(), folder / str(distributed) / "epoch=0.ckpt", **how)


TWO_RANKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


# -- one rank, after them


def check_shards_of_two_ranks_go_on_at_one(folder):
    path = folder.parent / "check_sharded_checkpoints" / "epoch=1.ckpt"
    module, _ = fit(folder, Sharded(), path, **shards(ranks=1))
    assert_close_to_one_device(module, folder.parent)


# -- four ranks


class InTwoDimensions(Regression):
    """Two shards of the data, each on two ranks that divide the layers."""

    def configure_model(self):
        if not isinstance(self.head.weight, DTensor):
            plan = {"backbone": ColwiseParallel(), "head": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
            for layer in (self.backbone, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        mesh = self.device_mesh["data_parallel"]
        return super().loss(tuple(value.chunk(mesh.size())[mesh.get_local_rank()] for value in batch))


def check_tensor_parallelism(folder):
    weights = []
    for path in (None, folder / "epoch=1.ckpt"):
        module, _ = fit(folder, InTwoDimensions(), path, devices=4, strategy=ModelParallelStrategy(2, 2))
        assert_close_to_one_device(module, folder.parent)
        weights.append(weights_of(module))
    assert same_state(*weights)


FOUR_RANKS = [check_tensor_parallelism]
ONE_RANK = [check_shards_of_two_ranks_go_on_at_one]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def reports(folder):
    one_device, _ = fit(folder / "one_device", Regression())
    torch.save(weights_of(one_device), folder / "one_device" / "weights.pt")
    fit(folder / "one_device" / "backwards", Regression(backwards))
    told = run_on_ranks(TWO_RANKS, folder)
    return told | run_on_ranks(ONE_RANK, folder, ranks=1) | run_on_ranks(FOUR_RANKS, folder, ranks=4)


@pytest.mark.parametrize("check", [check.__name__ for check in TWO_RANKS + ONE_RANK + FOUR_RANKS])
def test_on_ranks(reports, check):
    assert not reports[check], reports[check]


def test_a_full_checkpoint_goes_on_at_one_device(reports, folder, tmp_path):
    path = folder / "check_full_checkpoints" / "epoch=1.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["optimizer_states"][0]["param_groups"][0]["hrnn"]["weights"] == "custom"
    module, optimizer = fit(tmp_path, Regression(), path)
    assert_close_to_one_device(module, folder)
    assert not any(isinstance(value, DTensor) for state in optimizer.state.values() for value in state.values())


def test_a_full_checkpoint_of_params_in_another_order_goes_on_at_one_device(reports, folder, tmp_path):
    path = folder / "check_params_in_another_order" / "epoch=2.ckpt"
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["params"] for group in groups] == [[3, 2], [1, 0]]  # of the module, in the optimizer's order
    module, _ = fit(tmp_path, Regression(backwards), path)
    assert_close_to_one_device(module, folder)
