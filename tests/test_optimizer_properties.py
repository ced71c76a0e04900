"""Whatever the parameters and whatever happens to them, `HRNN` takes the steps of the pure rule and stays finite."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers.modules import EVERY_PART
from hypothesis import HealthCheck, event, given, settings
from torch import Tensor, nn

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import load_pretrained
from lightning_hrnn.optimizer.rule_state import RuleState

FIRST_RATE = 1e-2
SHAPES = [(), (1,), (7,), (0,), (3, 0), (5, 4), (2, 3, 2, 3), (4, 1, 1, 6)]
RUN_LENGTH = 30.0
MEMORY = ["contiguous", "turned", "strided", "channels last"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RULES = {
    "attention": EVERY_PART,
    "paper": RuleConfig.preset("paper"),
    "mixed": RuleConfig(rate="smoothed", features=("scaled_gradient", "relative_rate"), timescales=2),
}
ACTIONS = ["step"] * 5 + ["nothing has a gradient", "poison", "add", "save and load", "pickle", "deepcopy"]

searched = settings(max_examples=30, suppress_health_check=list(HealthCheck))


@functools.cache
def make_rule(name: str) -> HierarchicalRNN:
    if name.startswith("shipped"):
        rule = load_pretrained()
        small, rule.small = rule.small, None
        return small.rule if small and name == "shipped, small" else rule
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = HierarchicalRNN(RULES[name])
        with torch.no_grad():  # the rates of a new rule stand still; let every part of this one matter
            for value in rule.rate.parameters():
                value += 0.3 * torch.randn_like(value)
            if rule.config.anneals:
                rule.rate.annealing.abs_()  # a power below zero would be none
    return rule


class Reference:
    """The pure rule over flat vectors: one state for each tensor, of which a step takes those with a gradient."""

    def __init__(self, rule: HierarchicalRNN) -> None:
        self.rule, self.states = rule, []
        self.global_hidden = rule.global_rnn.initial_state(1)

    def add(self, size: int) -> None:
        layout = Layout.of([max(size, 1)])
        self.states.append(self.rule.init(layout, torch.tensor(FIRST_RATE).log(), RUN_LENGTH)._asdict())

    @torch.no_grad()
    def step(self, moving: list[int], grads: list[Tensor], params: list[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return update and learned rate of each tensor that moves."""
        sizes = [grad.numel() for grad in grads]
        layout = Layout.of(sizes)
        states = [self.states[index] for index in moving]
        joined = {key: torch.cat([state[key] for state in states], -1) for key in states[0] if key != "global_hidden"}
        state = RuleState(**joined, global_hidden=self.global_hidden)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        rms = torch.stack([param.square().mean().sqrt() for param in params])
        output = self.rule(flat, rms, state, layout)
        self.global_hidden = output.state.global_hidden
        of_tensors = {"tensor_hidden", "age", "log_peak", "run_length", "gradient_size"}
        of_tensors |= set() if self.rule.rate_per_param else {"log_rate"}
        for place, index in enumerate(moving):
            for key in self.states[index].keys() - {"global_hidden"}:
                own = layout.tensor_of == place if key not in of_tensors else [place]
                self.states[index][key] = getattr(output.state, key)[..., own]
        rates = output.rate if self.rule.rate_per_param else layout.to_params(output.rate)
        pairs = zip(output.update.split(sizes), rates.split(sizes), strict=True)
        return dict(zip(moving, pairs, strict=True))


def make_param(shape: tuple[int, ...], dtype: torch.dtype, memory: str, generator: torch.Generator) -> nn.Parameter:
    value = torch.randn(shape, generator=generator).to(dtype)
    if memory == "turned":
        backwards = tuple(reversed(range(len(shape))))
        value = value.permute(backwards).contiguous().permute(backwards)
    elif memory == "strided" and shape:
        value = torch.stack([value, value], -1)[..., 0]
    elif memory == "channels last" and len(shape) == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value)


def wild_gradient(param: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A finite gradient in the precision of its parameter."""
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    exponents = {"plain": 0.0, "tiny": -30.0, "huge": 30.0, "denormal": -42.0, "zero": -400.0}
    if kind == "mixed":
        scale = 10 ** (60 * torch.rand(param.shape, generator=generator, dtype=torch.float64) - 30)
    else:
        scale = torch.tensor(10.0 ** exponents[kind], dtype=torch.float64)
    most = torch.finfo(param.dtype).max if param.dtype != torch.float64 else 1e38
    grad = torch.empty_like(param.detach())
    grad.copy_((noise * scale).clamp(-most, most))
    return grad


KINDS = ["plain", "plain", "tiny", "huge", "denormal", "zero", "mixed"]


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    one = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(MEMORY))
    return draw(st.lists(one, min_size=1, max_size=4))


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "tensors": draw(tensors()),
        "lr": draw(st.sampled_from([1.0, 1.0, 0.25, 0.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
    }


class Run:
    """An optimizer and its reference, taken through the same events."""

    def __init__(self, rule: HierarchicalRNN, kernel: str, group: dict[str, Any], seed: int) -> None:
        self.rule, self.kernel, self.generator = rule, kernel, torch.Generator().manual_seed(seed)
        self.reference = Reference(rule)
        self.optimizer = HRNN([self.made(group)], weights=rule, initial_rate=FIRST_RATE, kernel=kernel)
        self.optimizer.run_length = RUN_LENGTH
        self.skipped = 0

    def made(self, group: dict[str, Any]) -> dict[str, Any]:
        params = [make_param(*tensor, self.generator) for tensor in group["tensors"]]
        for param in params:
            self.reference.add(param.numel())
        return {"params": params, "lr": group["lr"], "weight_decay": group["weight_decay"]}

    @property
    def params(self) -> list[nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def give_gradients(self, data: st.DataObject) -> None:
        for param in self.params:
            kind = data.draw(st.sampled_from([*KINDS, "missing"]), label="gradient")
            param.grad = None if kind == "missing" else wild_gradient(param, kind, self.generator)

    def step(self) -> None:
        """Take a step and compare it with the reference's."""
        before = [param.detach().clone() for param in self.params]
        settings = [(g["lr"], g["weight_decay"]) for g in self.optimizer.param_groups for _ in g["params"]]
        moving = [
            index
            for index, (param, (lr, _)) in enumerate(zip(self.params, settings, strict=True))
            if lr and param.grad is not None and param.numel()
        ]
        grads = [self.params[index].grad.float() for index in moving]
        self.optimizer.step()
        expected = self.reference.step(moving, grads, [before[i].float() for i in moving]) if moving else {}
        for index, (old, param, (lr, decay)) in enumerate(zip(before, self.params, settings, strict=True)):
            if index not in expected:
                assert torch.equal(old, param)
                continue
            update, rate = (value.view(param.shape) for value in expected[index])
            decayed = rate * decay * old.float()
            new = old.double() - lr * (update + decayed).double()
            moves = 1e-3 * update.abs().max() + 1e-5 * decayed.abs().max()
            close = 2 * torch.finfo(param.dtype).eps * old.double().abs().max() + lr * moves + 1e-9
            assert (param.detach().double() - new).abs().max() <= close, f"tensor {index} went elsewhere"
        self.check_state()

    def check_state(self) -> None:
        """State of the reference, and finite."""
        for param, theirs in zip(self.params, self.reference.states, strict=True):
            state = self.optimizer.state[param]
            assert all(bool(value.isfinite().all()) for value in state.values())
            assert all(value.dtype in (torch.float32, param.dtype) for value in state.values())
            assert param.isfinite().all()
            if param.numel() == 0:
                continue
            for key in ("hidden", "tensor_hidden", "log_rate", "age"):
                ours, expected = state[key].reshape(-1), theirs[key].reshape(-1)
                torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3, msg=lambda text, key=key: key + text)
            hidden = self.reference.global_hidden[:, 0]
            torch.testing.assert_close(state["global_hidden"], hidden, rtol=2e-3, atol=2e-3)

    def poison(self, data: st.DataObject) -> None:
        """A gradient that is not finite leaves everything as it is."""
        self.give_gradients(data)
        groups = [(group["lr"], param) for group in self.optimizer.param_groups for param in group["params"]]
        able = [param for lr, param in groups if lr and param.numel() and param.grad is not None]
        if not able:
            return
        victim = data.draw(st.sampled_from(range(len(able))), label="victim")
        able[victim].grad[(-1,) * able[victim].dim()] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        before = copy.deepcopy([(param.detach(), self.optimizer.state[param]) for param in self.params])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.optimizer.step()
        self.skipped += 1
        for (old, old_state), param in zip(before, self.params, strict=True):
            assert torch.equal(old, param)
            assert all(torch.equal(value, self.optimizer.state[param][key]) for key, value in old_state.items())

    def act(self, action: str, data: st.DataObject) -> None:
        if action == "step":
            self.give_gradients(data)
            self.step()
        elif action == "nothing has a gradient":
            self.optimizer.zero_grad()
            self.step()
        elif action == "poison":
            self.poison(data)
        elif action == "add":
            self.optimizer.add_param_group(self.made(data.draw(groups(), label="group")))
        elif action == "save and load":
            saved = self.optimizer.state_dict()
            fresh = [
                {"params": [nn.Parameter(param.detach().clone()) for param in group["params"]]}
                for group in self.optimizer.param_groups
            ]
            self.optimizer = HRNN(fresh, weights=self.rule, initial_rate=FIRST_RATE, kernel=self.kernel)
            self.optimizer.load_state_dict(saved)
            self.optimizer.run_length = RUN_LENGTH  # not part of what is saved
        else:
            copied = copy.deepcopy if action == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
            self.optimizer = copied(self.optimizer)
        assert self.optimizer.skipped_steps == self.skipped


@pytest.mark.parametrize("kernel", ["eager", "auto"])
@pytest.mark.parametrize("rule", ["shipped", "shipped, small", *RULES])
@searched
@given(data=st.data())
def test_any_run_is_that_of_the_pure_rule(kernel: str, rule: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16), label="seed")
    run = Run(make_rule(rule), kernel, data.draw(groups(), label="first group"), seed)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=6), label="actions"):
        event(action)
        run.act(action, data)
