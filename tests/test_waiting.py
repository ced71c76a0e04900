"""A step on a GPU never waits for the device: it reads no value, and a flag on the device skips it."""

import warnings

import pytest
import torch
from helpers.modules import EVERY_PART
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hrnn.optimizer import optimizer as optimizer_module
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN

RULES = {
    "default": RuleConfig(),
    "attention": RuleConfig(readouts=("direction", "attention")),
    "paper": RuleConfig.preset("paper"),
    "every part": EVERY_PART,
}


class NoReading(TorchDispatchMode):
    """Refuse to hand a value to Python, for which a GPU would have to finish its work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def make(config, device="cpu", state_dtype=torch.float32):
    torch.manual_seed(0)
    rule = HierarchicalRNN(config)
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.1 * torch.randn_like(value))
    params = [nn.Parameter(torch.randn(shape).to(device)) for shape in ((), (7, 5), (40,))]
    return HRNN(params, rule, weight_decay=0.1, kernel="eager", state_dtype=state_dtype), params


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)


def everything(optimizer, params):
    return [*params, *(value for param in params for value in optimizer.state[param].values())]


@pytest.fixture
def elsewhere(monkeypatch):
    """Step tensors on the CPU as those of a GPU are."""
    monkeypatch.setattr(optimizer_module, "_waits_for", lambda device: False)


@pytest.mark.parametrize("config", RULES.values(), ids=RULES)
def test_a_step_reads_nothing(config, elsewhere):
    optimizer, params = make(config)
    for seed in range(3):
        set_grads(params, seed)
        with NoReading():
            optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("config", RULES.values(), ids=RULES)
def test_a_step_needs_no_values_at_all(config):
    """Tensors on the device `meta` have none."""
    optimizer, params = make(config, "meta")
    for _ in range(2):
        set_grads(params, 0)
        optimizer.step()
    assert {param.device.type for param in params} == {"meta"}


def test_the_check_notices_reading():
    with NoReading(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(2).sum() > 1)
    optimizer, params = make(RULES["default"])
    set_grads(params, 0)
    with NoReading(), pytest.raises(AssertionError, match="waits for the device"):
        optimizer.step()  # on the CPU, where reading costs nothing


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", RULES.values(), ids=RULES)
def test_a_flag_skips_the_step(config, state_dtype, elsewhere):
    """Bit for bit as if it had not been; counted on the device, told when it is read, and once."""
    optimizer, params = make(config, state_dtype=state_dtype)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    before = [value.detach().clone() for value in everything(optimizer, params)]
    for bad in (float("nan"), float("inf")):
        set_grads(params, 2)
        params[1].grad[3, 2] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(everything(optimizer, params), before, strict=True))
    with pytest.warns(UserWarning, match="skipped a step"):
        assert optimizer.skipped_steps == 2
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.state_dict()["hrnn"]["skipped_steps"] == optimizer.skipped_steps == 3
    set_grads(params, 3)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(params, before, strict=False))


@pytest.mark.parametrize("config", RULES.values(), ids=RULES)
def test_steps_are_those_of_the_cpu(config, monkeypatch):
    found = []
    for waits in (True, False):
        monkeypatch.setattr(optimizer_module, "_waits_for", lambda device, waits=waits: waits)
        optimizer, params = make(config)
        for seed in range(4):
            set_grads(params, seed)
            optimizer.step()
        found.append(everything(optimizer, params))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "eager"])
def test_a_whole_step_is_captured_in_a_cuda_graph(kernel):
    """Replayed on gradients that lie where they lay, it moves as if it were called; a bad gradient moves nothing."""
    found = []
    for replay in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((), (7, 5), (3000,))]
        optimizer = HRNN(params, HierarchicalRNN(), kernel=kernel)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if replay:
            with torch.cuda.graph(graph):
                optimizer.step()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for param in params:
                param.grad.copy_(torch.randn(param.shape, generator=generator))
            params[2].grad[5] = float("nan") if seed == 1 else 0.0
            graph.replay() if replay else optimizer.step()
        with pytest.warns(UserWarning, match="skipped a step"):
            assert optimizer.skipped_steps == 1
        found.append([param.detach().clone() for param in params])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
