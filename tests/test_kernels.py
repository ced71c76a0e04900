"""Fused kernels against the pure rule: values over many steps, and meta-gradients."""

import pytest
import torch

from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, RuleConfig
from lightning_hrnn.optimizer.kernels import available_kernels, build, cpp

needs_compiler = pytest.mark.skipif(
    build.why_unavailable() is not None, reason=f"no compiled kernels here: {build.why_unavailable()}"
)

SIZES = [1, 2, 5, 130, 1, 1, 17, 2500, 40, 7, 900, 3]  # crosses tiles of 128 and chunks of 2048; ends between


def random_rule(dtype, **changes):
    """Return a rule whose readouts at zero have moved, so that every meta-parameter matters."""
    torch.manual_seed(3)
    rule = HierarchicalRNN(RuleConfig(**changes)).to(dtype)
    with torch.no_grad():
        for param in rule.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return rule


def wild_gradients(steps, count, dtype):
    """Draw gradients over ten orders of magnitude, some exactly zero."""
    scale = 10 ** (torch.rand(count, dtype=dtype) * 10 - 8)
    grads = [torch.randn(count, dtype=dtype).pow(3) * scale for _ in range(steps)]
    for step, grad in enumerate(grads):
        grad[step % 3 :: 7] = 0
    return grads


def unroll(rule, engine, grads, layout, ages):
    """Unroll a rule; return its updates, last state, and gradients of a loss that looks at everything."""
    dtype, tensors = grads[0].dtype, len(layout.params_in)
    rule.zero_grad()
    state = rule.init(layout, torch.linspace(-5, -3, tensors, dtype=dtype))
    state = state._replace(age=ages.to(dtype))
    weights = torch.cos(torch.arange(len(grads[0]), dtype=dtype))
    loss, updates = torch.zeros((), dtype=dtype), []
    for grad in grads:
        output = rule(grad, torch.ones(tensors, dtype=dtype), state, layout, engine)
        state = output.state
        updates.append(output.update)
        loss = loss + (output.update * weights).sum()
        if output.lookahead is not None:
            loss = loss + (output.lookahead * weights.flip(0)).sum()
    loss = loss + (state.hidden * weights).sum() + (state.average * weights).sum() + (state.square * weights).sum()
    loss.backward()
    return [update.detach() for update in updates], state.detach(), loss.detach()


def distance(value, reference, floor=1e-30):
    return ((value - reference).norm() / reference.norm().clamp(min=floor)).item()


def gradients(rule):
    return {name: param.grad.clone() for name, param in rule.named_parameters()}


LAYOUTS = {
    "mixed": (SIZES, [0] * 5 + [1] * 7),
    "one parameter": ([1], [0]),
    "one tensor over chunks": ([5000], [0]),
    "whole tiles": ([128, 1920, 2048], [0, 0, 1]),
    "many of size 1": ([1] * 300, list(range(300))),
}


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readouts", [("direction",), ("direction", "attention")], ids="-".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
def test_param_level_equals_the_rule(layout, readouts, dtype, tolerance):
    """Updates, states and meta-gradients after 25 steps, tensors at their first and at later steps side by side."""
    sizes, models = LAYOUTS[layout]
    rule = random_rule(dtype, readouts=readouts)
    flat = Layout.of(sizes, models, dtype=dtype)
    grads, ages = wild_gradients(25, sum(sizes), dtype), torch.arange(len(sizes)) % 2
    expected = unroll(rule, None, grads, flat, ages)
    expected_gradients = gradients(rule)
    actual = unroll(rule, cpp.param_level, grads, flat, ages)
    actual_gradients = gradients(rule)
    assert all(value.isfinite().all() for value in expected_gradients.values())
    assert max(distance(*pair) for pair in zip(actual[0], expected[0], strict=True)) < tolerance
    for name, value, reference in zip(expected[1]._fields, actual[1], expected[1], strict=True):
        assert distance(value, reference) < tolerance, name
    # where the direction of a tensor of one parameter is divided by its own size, nothing but rounding gets through
    floor = 1e-3 * max(value.norm() for value in expected_gradients.values())
    for name, reference in expected_gradients.items():
        assert distance(actual_gradients[name], reference, floor) < tolerance, name


@needs_compiler
def test_param_level_gradients_of_inputs():
    """Gradients with respect to gradient, state and bias, as second order meta-training needs them."""
    rule, layout = random_rule(torch.float64), Layout.of(SIZES, dtype=torch.float64)
    count, tensors = sum(SIZES), len(SIZES)
    state = rule.init(layout, torch.linspace(-2, 2, tensors, dtype=torch.float64))
    leaves = {
        "hidden": torch.randn(10, count, dtype=torch.float64),
        "average": torch.randn(4, count, dtype=torch.float64),
        "square": torch.rand(4, count, dtype=torch.float64),
        "log_rate": torch.randn(tensors, dtype=torch.float64),
    }
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    state = state._replace(age=torch.arange(tensors, dtype=torch.float64) % 3, **leaves)
    grad = torch.randn(count, dtype=torch.float64)
    grad[::9] = -3e15
    grad.requires_grad_()
    bias = torch.randn(30, tensors, dtype=torch.float64, requires_grad=True)
    everything = [grad, bias, *leaves.values()]

    def differentiate(engine):
        level = engine(rule, grad, state, bias, layout)[:5]
        torch.manual_seed(1)
        return torch.autograd.grad(level, everything, [torch.randn_like(value) for value in level])

    expected = differentiate(HierarchicalRNN.param_level)
    for value, reference in zip(differentiate(cpp.param_level), expected, strict=True):
        assert distance(value, reference) < 1e-12


@needs_compiler
def test_outputs_nobody_uses():
    """A loss of one output alone gets the right gradient: the others' are absent, not zeros."""
    rule, layout = random_rule(torch.float64), Layout.of(SIZES, dtype=torch.float64)
    grad = wild_gradients(1, sum(SIZES), torch.float64)[0]
    state = rule.init(layout, -3.0)
    for index in range(5):
        found = []
        for engine in (HierarchicalRNN.param_level, cpp.param_level):
            rule.zero_grad()
            engine(rule, grad, state, rule.param_bias(state, layout), layout)[index].square().sum().backward()
            found.append(rule.param_rnn.initial.grad.clone() if index not in (1, 2) else state.age)
        assert distance(*found) < 1e-11


@needs_compiler
def test_result_does_not_depend_on_threads():
    """Sums over chunks are added in one order, whoever made them."""
    rule, layout = random_rule(torch.float32), Layout.of(SIZES * 3)
    grad, state = torch.randn(3 * sum(SIZES)), rule.init(layout, -3.0)
    bias = rule.param_bias(state, layout).detach().requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            level = cpp.param_level(rule, grad, state, bias, layout)[:5]
            wanted = [bias, rule.param_rnn.gate_weight]
            found.append((*level, *torch.autograd.grad(level, wanted, [torch.ones_like(value) for value in level])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, first) for value, first in zip(other, found[0], strict=True))


@needs_compiler
def test_huge_gradients_are_clipped():
    rule, layout = random_rule(torch.float32), Layout.of([200])
    grad, state = torch.full((200,), 1e30), rule.init(layout, -3.0)
    grad[::3] = -1e-30
    arguments = (rule, grad, state, rule.param_bias(state, layout), layout)
    expected = HierarchicalRNN.param_level(*arguments)
    for value, reference in zip(cpp.param_level(*arguments)[:5], expected, strict=False):
        assert reference.isfinite().all()
        assert distance(value, reference) < 1e-6


@needs_compiler
def test_nothing_is_kept_without_gradients():
    rule, layout = random_rule(torch.float32), Layout.of(SIZES)
    state = rule.init(layout, -3.0)
    with torch.no_grad():
        level = cpp.param_level(rule, torch.randn(sum(SIZES)), state, rule.param_bias(state, layout), layout)
    assert not any(value.requires_grad for value in level[:5])


@pytest.mark.parametrize(
    "changes",
    [{"direction": "additive"}, {"rate": "smoothed"}, {"features": ("scaled_gradient",)}, {"param_hidden": 40}],
    ids=str,
)
def test_unsupported_rules_run_by_themselves(changes):
    """A rule that the kernels do not know takes its own step, and they say which part they lack."""
    rule, layout = HierarchicalRNN(RuleConfig(**changes)), Layout.of([3, 2])
    state = rule.init(layout, -3.0)
    arguments = (torch.randn(5), state, rule.param_bias(state, layout), layout)
    assert cpp.why_unsupported(rule).startswith("The compiled kernels")
    assert torch.equal(cpp.param_level(rule, *arguments).steps, rule.param_level(*arguments).steps)


@pytest.fixture
def no_compiler(monkeypatch):
    build.operators.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    yield
    build.operators.cache_clear()


def test_without_a_compiler_the_rule_runs_by_itself(no_compiler):
    rule, layout = HierarchicalRNN(), Layout.of([3, 2])
    state = rule.init(layout, -3.0)
    arguments = (torch.randn(5), state, rule.param_bias(state, layout), layout)
    assert torch.equal(cpp.param_level(rule, *arguments).steps, rule.param_level(*arguments).steps)
    assert "compiler" in available_kernels()["cpp"]
    with pytest.raises(build.BuildError, match="install g"):
        build.operators(10, 4)


def test_a_failed_build_is_reported_and_not_repeated(monkeypatch):
    calls = []

    def fail(*sizes):
        calls.append(sizes)
        raise RuntimeError("Error building extension\nlanes.h:1: fatal error: too old a compiler")

    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(build, "why_unavailable", lambda: None)
    monkeypatch.setattr(build, "_load", fail)
    build.operators.cache_clear()
    for _ in range(2):
        with pytest.raises(build.BuildError, match="Building it failed"):
            build.operators(10, 4)
    assert len(calls) == 1
    build.operators.cache_clear()
