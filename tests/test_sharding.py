"""Sharded parameters without Lightning: steps, states and checkpoints are those of one process that holds all."""

import copy
import io
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.modules import EVERY_PART
from helpers.ranks import assert_same_on_all_ranks, run_on_ranks, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),  # over tensor parallelism
]

RULES = {
    "default": RuleConfig(),
    "attention": EVERY_PART,
    "paper": RuleConfig.preset("paper"),
    "mixed": RuleConfig(rate="smoothed", features=("scaled_gradient", "relative_rate")),
}
SHARDS = {  # shape -> placement on a mesh of two; None for a tensor that is no DTensor
    (4, 3): Shard(0),
    (5, 3): Shard(0),  # uneven
    (1, 3): Shard(0),  # the second rank has nothing
    (3, 4): Shard(1),
    (2, 3, 3, 2): Shard(2),
    (7,): Shard(0),
    (6,): Replicate(),
    (2, 2): None,
    (): None,
}


def make_rule(name="default"):
    torch.manual_seed(0)
    rule = HierarchicalRNN(RULES[name])
    with torch.no_grad():  # the rates of a new rule stand still
        for value in rule.rate.parameters():
            value += 0.3 * torch.randn_like(value)
        if rule.config.anneals:
            rule.rate.annealing.abs_()  # a power below zero would be none
    return rule


def make_values(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHARDS]


def share(value, like):
    """Give a whole tensor the shards of a parameter."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value.clone()


class Pair:
    """The same parameters twice, whole and in shards, each with an optimizer."""

    def __init__(self, rule=None, dtype=torch.float32, **options):
        mesh = init_device_mesh("cpu", (2,))
        values = [value.to(dtype) for value in make_values(1)]
        self.wholes = [nn.Parameter(value) for value in values]
        self.shards = [
            nn.Parameter(value.clone() if kind is None else distribute_tensor(value.clone(), mesh, [kind]))
            for value, kind in zip(values, SHARDS.values(), strict=True)
        ]
        self.options = {"weights": rule or make_rule(), "initial_rate": 1e-2, **options}
        self.alone, self.together = self.optimizer(self.wholes), self.optimizer(self.shards)

    def optimizer(self, params):
        groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 0.5}]
        return HRNN(groups, **self.options)

    def step(self, *seeds, missing=()):
        for seed in seeds:
            grads = make_values(100 + seed)
            for index, (param, shard, grad) in enumerate(zip(self.wholes, self.shards, grads, strict=True)):
                absent = index in missing
                param.grad = None if absent else grad.to(param.dtype)
                shard.grad = None if absent else share(grad.to(param.dtype), shard)
            self.alone.step()
            self.together.step()

    def compare(self, rtol=1e-4, atol=1e-6):
        for param, shard in zip(self.wholes, self.shards, strict=True):
            torch.testing.assert_close(whole(shard), param.detach(), rtol=rtol, atol=atol)
            ours, theirs = self.together.state[shard], self.alone.state[param]
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                sharded = key in ("hidden", "average", "square", "lookahead") or value.shape == shard.shape != ()
                assert isinstance(value, DTensor) == (isinstance(shard, DTensor) and sharded)
                torch.testing.assert_close(whole(value), theirs[key], rtol=10 * rtol, atol=10 * atol)
                if not isinstance(value, DTensor):
                    assert_same_on_all_ranks(value)

    def snapshot(self):
        state = [{k: whole(v).clone() for k, v in self.together.state[p].items()} for p in self.shards]
        return [whole(shard).clone() for shard in self.shards], state


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return len(left) == len(right) and all(map(same, left, right))


def check_steps(folder):
    for name in RULES:
        for kernel in ("auto", "eager"):
            pair = Pair(make_rule(name), kernel=kernel)
            pair.step(0, 1, 2, 3)
            pair.compare()


def check_state_has_the_shards_of_its_parameter(folder):
    pair = Pair(make_rule("attention"))
    param = pair.shards[1]
    state = pair.together.state[param]
    rank = torch.distributed.get_rank()
    for key in ("hidden", "average", "square"):
        assert state[key].placements == (Shard(1),)
        assert state[key].to_local().shape[1:] == ((3, 3), (2, 3))[rank]
        assert state[key].shape[1:] == (5, 3)
    assert state["lookahead"].placements == (Shard(0),)
    assert pair.together.state[pair.shards[6]]["hidden"].placements == (Replicate(),)


def check_autograd_notices_the_step(folder):
    pair = Pair()
    before = [shard._version for shard in pair.shards]
    product = (pair.shards[0] * pair.shards[0]).sum()
    pair.step(0)
    assert all(shard._version > version for shard, version in zip(pair.shards, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def check_parts(folder):
    """Large models are measured in parts, with one sum for all of them."""
    with mock.patch("lightning_hrnn.optimizer.levels.GROUP_SIZE", 9):
        pair = Pair()
        pair.step(0, 1, 2)
        pair.compare()


def check_two_collectives_a_step(folder):
    """However many tensors there are: one to agree who has a gradient, one for all sums."""
    pair = Pair()
    with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as reduce:
        pair.step(0)
    assert [call.args[0].numel() for call in reduce.call_args_list] == [len(SHARDS) + 1, (10 + 12 + 4) * len(SHARDS)]


def check_missing_gradients(folder):
    pair = Pair()
    pair.step(0, 1, missing=(0, 4))
    pair.compare()
    assert pair.together.state[pair.shards[0]]["age"] == 0
    assert pair.together.state[pair.shards[1]]["age"] == 2
    before = pair.snapshot()
    pair.together.zero_grad()
    pair.together.step()  # nothing has a gradient
    assert same(before, pair.snapshot())


def check_a_gradient_missing_on_one_rank_is_zero_there(folder):
    pair = Pair()
    pair.step(0)
    grads = make_values(7)
    for param, shard, grad in zip(pair.wholes, pair.shards, grads, strict=True):
        param.grad, shard.grad = grad.clone(), share(grad, shard)
    pair.wholes[1].grad[3:] = 0  # the second rank's rows
    if torch.distributed.get_rank() == 1:
        pair.shards[1].grad = None
    pair.alone.step()
    pair.together.step()
    pair.compare()


def check_a_gradient_not_finite_on_one_rank_skips_the_step_on_all(folder):
    pair = Pair()
    pair.step(0)
    before = pair.snapshot()
    for shard, grad in zip(pair.shards, make_values(7), strict=True):
        shard.grad = share(grad, shard)
    if torch.distributed.get_rank() == 1:
        pair.shards[1].grad.to_local()[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pair.together.step()
    assert "skipped a step" in str(told[0].message)
    assert pair.together.skipped_steps == 1
    assert same(before, pair.snapshot())


def check_zero_lr_is_an_exact_no_op(folder):
    pair = Pair(make_rule("attention"))
    pair.step(0)
    before = pair.snapshot()
    for group in pair.together.param_groups:
        group["lr"] = 0.0
    for shard in pair.shards:
        shard.grad = torch.zeros_like(shard)
    with pair.together.attend():
        assert same(before[0], [whole(shard) for shard in pair.shards])
    pair.together.step()
    assert same(before, pair.snapshot())


def check_bfloat16(folder):
    pair = Pair(dtype=torch.bfloat16)
    pair.step(0, 1, 2)
    for param, shard in zip(pair.wholes, pair.shards, strict=True):
        assert shard.dtype == torch.bfloat16
        torch.testing.assert_close(whole(shard), param.detach(), rtol=1e-2, atol=1e-2)  # a bit or two
    assert all(v.dtype == torch.float32 for state in pair.together.state.values() for v in state.values())
    small = Pair(state_dtype=torch.bfloat16, kernel="eager")
    small.step(0)
    assert small.together.state[small.shards[0]]["hidden"].dtype == torch.bfloat16
    small.compare(rtol=1e-2, atol=1e-2)


def check_attention_moves_and_restores_bit_for_bit(folder):
    pair = Pair(make_rule("attention"))
    pair.step(0, 1, 2)
    true = [whole(shard).clone() for shard in pair.shards]
    with pair.together.attend(), pair.alone.attend():
        for param, shard, before in zip(pair.wholes, pair.shards, true, strict=True):
            torch.testing.assert_close(whole(shard), param.detach(), rtol=1e-4, atol=1e-6)
            assert not torch.equal(whole(shard), before)
    assert same(true, [whole(shard) for shard in pair.shards])


def check_log_rates_and_late_groups(folder):
    pair = Pair(make_rule("paper"))
    pair.step(0, 1)
    torch.testing.assert_close(torch.stack(pair.together.log_rates()), torch.stack(pair.alone.log_rates()))
    late = nn.Parameter(distribute_tensor(torch.ones(5, 2), pair.shards[0].device_mesh, [Shard(0)]))
    pair.together.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    pair.together.step()
    assert whole(late).isfinite().all()
    assert not torch.equal(whole(late), torch.ones(5, 2))


def check_going_on_from_a_saved_state_is_bit_exact(folder):
    for name in ("attention", "paper"):
        pair = Pair(make_rule(name))
        pair.step(0, 1)
        twins = [nn.Parameter(shard.detach().clone()) for shard in pair.shards]
        twin = pair.optimizer(twins)
        twin.load_state_dict(pair.together.state_dict())
        assert "hrnn" not in twin.param_groups[0]
        for param, other in zip(pair.shards, twins, strict=True):
            for key, value in twin.state[other].items():
                assert type(value) is type(pair.together.state[param][key])
        pair.step(2)
        for param, other in zip(pair.shards, twins, strict=True):
            other.grad = param.grad.clone()
        twin.step()
        assert same([whole(a) for a in twins], [whole(a) for a in pair.shards])


def check_whole_states_load_into_shards_and_back(folder):
    pair = Pair(make_rule("paper"))
    pair.step(0, 1)
    fresh = pair.optimizer(pair.shards)
    fresh.load_state_dict(pair.alone.state_dict())
    again = pair.optimizer(pair.wholes)
    again.load_state_dict(fresh.state_dict())
    for param, shard in zip(pair.wholes, pair.shards, strict=True):
        for key, value in pair.alone.state[param].items():
            assert torch.equal(whole(fresh.state[shard][key]), value)
            assert torch.equal(again.state[param][key], value)


def check_copies(folder):
    pair = Pair()
    pair.step(0)
    twin = copy.deepcopy(pair.together)
    params = [param for group in twin.param_groups for param in group["params"]]
    pair.step(1)
    for param, shard in zip(params, pair.shards, strict=True):
        param.grad = shard.grad.clone()
    twin.step()
    assert same([whole(a) for a in params], [whole(a) for a in pair.shards])


def check_refusals(folder):
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"Parameter 0 of shape \[3\] is placed as .*Redistribute the parameter"):
        HRNN([partial], weights=make_rule())
    with torch.device("meta"):
        net = fully_shard(nn.Linear(3, 4), mesh=mesh)
    with pytest.raises(ValueError, match=r"of shape \[4, 3\] lies on meta while its mesh is of cpu.*Offload"):
        HRNN(net.parameters(), weights=make_rule())


class Net(nn.Module):
    """Uneven layers, one of which is narrower than the mesh, and a scale that FSDP2 may be told to leave whole."""

    def __init__(self, width=7):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first = nn.Linear(4, width)
            self.second = nn.Linear(width, 5)
            self.last = nn.Linear(5, 1)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.last(self.norm(self.second(self.first(x).tanh()))).square().mean()


def batch(seed):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def train(net, optimizer, steps, rank=0, ranks=1, accumulate=1, clip=None):
    optimizer.run_length = 30.0
    for step in steps:
        for micro in range(accumulate):
            with optimizer.attend():
                (net(batch(10 * step + micro).chunk(ranks)[rank]) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def sharded_net(mesh=None, **options):
    net = Net()
    for layer in (net.first, net.second):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def assert_same_nets(net, other, rtol=1e-4, atol=1e-6):
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=rtol, atol=atol)


def check_fully_shard(folder):
    rank = torch.distributed.get_rank()
    rule, how = make_rule("attention"), {"accumulate": 2, "clip": 0.01}
    alone = Net()
    train(alone, HRNN(alone.parameters(), weights=rule, initial_rate=1e-2), range(5), **how)
    net = sharded_net()
    optimizer = HRNN(net.parameters(), weights=rule, initial_rate=1e-2)
    train(net, optimizer, range(5), rank, 2, **how)
    assert_same_nets(net, alone)
    assert net.last.weight.to_local().numel() == (5, 0)[rank]


def check_mixed_precision_policy(folder):
    rank = torch.distributed.get_rank()
    alone, net = Net(), sharded_net(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    start = [whole(param).clone() for param in net.parameters()]
    train(alone, HRNN(alone.parameters(), weights=make_rule(), initial_rate=1e-2), range(4))
    train(net, HRNN(net.parameters(), weights=make_rule(), initial_rate=1e-2), range(4), rank, 2)
    moved = torch.cat([(whole(p) - s).flatten() for p, s in zip(net.parameters(), start, strict=True)])
    twin = torch.cat([(p.detach() - s).flatten() for p, s in zip(alone.parameters(), start, strict=True)])
    assert (moved - twin).norm() < 0.1 * twin.norm()


def check_parameters_left_out_of_the_shards(folder):
    rank = torch.distributed.get_rank()
    alone, net = Net(), Net()
    fully_shard(net, ignored_params=set(net.norm.parameters()))
    mine, theirs = (HRNN(n.parameters(), weights=make_rule(), initial_rate=1e-2) for n in (net, alone))
    for step in range(3):
        alone(batch(step)).backward()
        net(batch(step).chunk(2)[rank]).backward()
        for param in net.norm.parameters():  # FSDP2 leaves their gradients to the user
            torch.distributed.all_reduce(param.grad)
            param.grad /= 2
        for optimizer in (theirs, mine):
            optimizer.step()
            optimizer.zero_grad()
    assert not isinstance(net.norm.weight, DTensor)
    assert_same_nets(net, alone)


def saved_options(full):
    return StateDictOptions(full_state_dict=full, cpu_offload=True)


def check_distributed_checkpoint(folder):
    """Saved by two ranks, in shards and whole, and gone on from, bit by bit."""
    rank = torch.distributed.get_rank()
    rule = make_rule("attention")
    net = sharded_net()
    optimizer = HRNN(net.parameters(), weights=rule, initial_rate=1e-2)
    train(net, optimizer, range(3), rank, 2)
    dcp.save({"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    full = get_optimizer_state_dict(net, optimizer, options=saved_options(full=True))
    if rank == 0:
        assert full["state"]["second.weight"]["hidden"].shape == (10, 5, 7)
        file = io.BytesIO()
        torch.save(full, file)
        file.seek(0)
        full = torch.load(file, weights_only=True)
    values = {name: whole(param).clone() for name, param in net.named_parameters()}

    def again(load):
        twin = sharded_net()
        other = HRNN(twin.parameters(), weights=rule, initial_rate=0.5)
        load(twin, other)
        train(twin, other, range(3, 5), rank, 2)
        return twin, other

    def load_shards(twin, other):
        state = {"net": twin.state_dict(), "optimizer": get_optimizer_state_dict(twin, other)}
        dcp.load(state, checkpoint_id=folder)
        twin.load_state_dict(state["net"])
        set_optimizer_state_dict(twin, other, state["optimizer"])

    def load_whole(twin, other):
        for name, param in twin.named_parameters():
            param.data.copy_(share(values[name], param))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(twin, other, full, options=options)

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    in_one_level = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=flat))

    def load_flat(twin, other):
        load_shards(twin, HRNN(twin.parameters(), weights=rule))
        set_optimizer_state_dict(twin, other, in_one_level, options=flat)

    resumed = [again(load) for load in (load_shards, load_whole, load_flat)]
    train(net, optimizer, range(3, 5), rank, 2)
    for twin, other in resumed:
        assert same([whole(a) for a in twin.parameters()], [whole(a) for a in net.parameters()])
        for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
            assert same({k: whole(v) for k, v in ours.items()}, {k: whole(v) for k, v in theirs.items()})
        assert other.param_groups[0]["initial_rate"] == 1e-2


def check_a_checkpoint_of_other_weights_or_another_optimizer(folder):
    net = sharded_net()
    optimizer = HRNN(net.parameters(), weights=make_rule("attention"))
    train(net, optimizer, range(1), torch.distributed.get_rank(), 2)
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    other = make_rule("attention")
    with torch.no_grad():
        other.rate.momentary += 1
    load = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises(ValueError, match=r"made with the weights 'custom'.*same weights to resume"):
        set_optimizer_state_dict(net, HRNN(net.parameters(), weights=other), copy.deepcopy(full), options=load)
    with pytest.warns(UserWarning, match="hidden states start anew"):
        adapted = HRNN(net.parameters(), weights=other, other_weights="adapt")
        set_optimizer_state_dict(net, adapted, copy.deepcopy(full), options=load)
    average = full["state"]["first.weight"]["average"]
    assert torch.equal(whole(adapted.state[net.first.weight]["average"]), average)
    adam = torch.optim.AdamW(net.parameters())
    adam_state = get_optimizer_state_dict(net, adam, options=StateDictOptions(full_state_dict=True))
    with pytest.raises(ValueError, match=r"not the state of HRNN.*exp_avg.*another optimizer's"):
        set_optimizer_state_dict(net, optimizer, adam_state, options=load)


TWO_RANKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def check_hybrid_mesh(folder):
    """Two copies of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    alone, net = Net(), sharded_net(mesh)
    train(alone, HRNN(alone.parameters(), weights=make_rule(), initial_rate=1e-2), range(4))
    optimizer = HRNN(net.parameters(), weights=make_rule(), initial_rate=1e-2)
    train(net, optimizer, range(4), torch.distributed.get_rank(), 4)
    assert net.first.weight.placements == (Replicate(), Shard(0))
    assert_same_nets(net, alone)


def tensor_parallel(net, mesh):
    return parallelize_module(net, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def check_tensor_parallelism(folder):
    mesh = init_device_mesh("cpu", (4,))
    alone, net = Net(8), tensor_parallel(Net(8), mesh)
    train(alone, HRNN(alone.parameters(), weights=make_rule(), initial_rate=1e-2), range(4))
    train(net, HRNN(net.parameters(), weights=make_rule(), initial_rate=1e-2), range(4))
    assert net.second.weight.placements == (Shard(1),)
    assert_same_nets(net, alone)


def check_fsdp_over_tensor_parallelism(folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone, net = Net(8), tensor_parallel(Net(8), mesh["tensor"])
    for layer in (net.first, net.second, net):
        fully_shard(layer, mesh=mesh["data"])
    single = HRNN(alone.parameters(), weights=make_rule(), initial_rate=1e-2)
    train(alone, single, range(3))
    optimizer = HRNN(net.parameters(), weights=make_rule(), initial_rate=1e-2)
    train(net, optimizer, range(3), mesh["data"].get_local_rank(), 2)
    assert (net.first.weight.device_mesh.ndim, net.last.weight.device_mesh.ndim) == (2, 1)
    assert_same_nets(net, alone)
    for ours, theirs in zip(optimizer.state.values(), single.state.values(), strict=True):
        for key, value in ours.items():
            torch.testing.assert_close(whole(value), theirs[key], rtol=1e-3, atol=1e-5)
            assert_same_on_all_ranks(whole(value))
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    again = HRNN(net.parameters(), weights=make_rule())
    load = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(net, again, full, options=load)
    for ours, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert same({k: whole(v) for k, v in ours.items()}, {k: whole(v) for k, v in theirs.items()})


def check_a_mesh_of_some_of_the_ranks(folder):
    """As in pipelines: each stage has an optimizer of its own, over its own ranks."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("stage", "data", "tensor"))["data", "tensor"]
    stage = torch.distributed.get_rank() // 2
    values, grads = make_values(stage), make_values(10 + stage)
    wholes = [nn.Parameter(value.clone()) for value in values[:2]]
    shards = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0), Replicate()])) for value in values[:2]]
    alone, together = (HRNN(params, weights=make_rule(), initial_rate=1e-2) for params in (wholes, shards))
    for _ in range(2 + stage):  # the stages do not wait for each other
        for param, shard, grad in zip(wholes, shards, grads, strict=False):
            param.grad, shard.grad = grad.clone(), distribute_tensor(grad, mesh, shard.placements)
        alone.step()
        together.step()
    for param, shard in zip(wholes, shards, strict=True):
        torch.testing.assert_close(whole(shard), param.detach(), rtol=1e-4, atol=1e-6)


def check_meshes_of_which_none_holds_the_others(folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh[name], [Shard(0)])) for name in ("one", "other")]
    with pytest.raises(ValueError, match=r"neither holds all ranks of the other.*an optimizer of their own"):
        HRNN(params, weights=make_rule())


FOUR_RANKS = [value for name, value in list(globals().items()) if name.startswith("check_") and value not in TWO_RANKS]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    HRNN([param]).step()  # compiles the kernel, if need be, before ranks wait for each other
    two = run_on_ranks(TWO_RANKS, tmp_path_factory.mktemp("two"))
    return two | run_on_ranks(FOUR_RANKS, tmp_path_factory.mktemp("four"), ranks=4)


@pytest.mark.parametrize("check", [check.__name__ for check in TWO_RANKS + FOUR_RANKS])
def test_on_ranks(reports, check):
    assert not reports[check], reports[check]
