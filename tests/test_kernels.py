"""Fused kernels against the pure rule: values over many steps, and meta-gradients."""

import warnings
from pathlib import Path

import pytest
import torch

from lightning_hrnn.optimizer import optimizer as optimizer_module
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.features import Layout
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import available_kernels, build, cpp
from lightning_hrnn.optimizer.kernels.eager import EagerKernel
from lightning_hrnn.optimizer.optimizer import HRNN

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


RULES = {
    "direction": {},
    "attention": {"readouts": ("direction", "attention")},
    "unscaled": {"readouts": ("direction", "attention"), "without": ("output_scaling",)},
    "long scale": {"scale_memory": 7.0},
    "long scale by trend": {"scale_memory": 12.0, "scale_inputs": ("trend",)},
    "slowing": {
        "slows": True,
        "vanished": 0.5,
        "peak_memory": 5.0,
        "peak_fall": 1.0,
        "far_fall": 0.5,
        "drift_horizon": 4,
    },
    "long scale and attention": {"scale_memory": 7.0, "readouts": ("direction", "attention")},
    "bounded": {"step_bound": 0.02, "readouts": ("direction", "attention")},
}


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
def test_param_level_equals_the_rule(layout, changes, dtype, tolerance):
    """Updates, states and meta-gradients after 25 steps, tensors at their first and at later steps side by side."""
    sizes, models = LAYOUTS[layout]
    rule = random_rule(dtype, **RULES[changes])
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
@pytest.mark.parametrize("changes", RULES)
def test_param_level_gradients_of_inputs(changes):
    """Gradients with respect to gradient, state and bias, as second order meta-training needs them."""
    rule, layout = random_rule(torch.float64, **RULES[changes]), Layout.of(SIZES, dtype=torch.float64)
    count, tensors = sum(SIZES), len(SIZES)
    state = rule.init(layout, torch.linspace(-2, 2, tensors, dtype=torch.float64))
    leaves = {
        "hidden": torch.randn(10, count, dtype=torch.float64),
        "average": torch.randn(4, count, dtype=torch.float64),
        "square": torch.rand(rule.config.squares, count, dtype=torch.float64),
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
    [
        {"direction": "additive"},
        {"rate": "smoothed"},
        {"features": ("scaled_gradient",)},
        {"without": ("input_scaling",)},
        {"param_hidden": 40},
    ],
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
    build.compiled.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    yield
    build.compiled.cache_clear()


def test_without_a_compiler_the_rule_runs_by_itself(no_compiler):
    rule, layout = HierarchicalRNN(), Layout.of([3, 2])
    state = rule.init(layout, -3.0)
    arguments = (torch.randn(5), state, rule.param_bias(state, layout), layout)
    assert torch.equal(cpp.param_level(rule, *arguments).steps, rule.param_level(*arguments).steps)
    assert "compiler" in available_kernels()["cpp"]
    with pytest.raises(build.BuildError, match="install g"):
        build.operators(RuleConfig())


def test_a_failed_build_is_reported_and_not_repeated(monkeypatch, caplog):
    calls = []

    def fail(*sizes):
        calls.append(sizes)
        raise RuntimeError("Error building extension\nlanes.h:1: fatal error: too old a compiler")

    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(build, "why_unavailable", lambda: None)
    monkeypatch.setattr(build, "_load", fail)
    build.compiled.cache_clear()
    for _ in range(2):
        with pytest.raises(build.BuildError, match="Building it failed"):
            build.operators(RuleConfig())
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Compiled kernels cannot be had, and torch operations run instead, much slower. "
        "Building it failed: lanes.h:1: fatal error: too old a compiler"
    ]
    build.compiled.cache_clear()


def test_a_compiler_that_fails_is_no_error(monkeypatch, tmp_path):
    """Torch asks it for its version first."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_failures", {})
    build.compiled.cache_clear()
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"CalledProcessError: Command .*'false'"):
            build.operators(RuleConfig())
    build.compiled.cache_clear()


def test_a_cache_that_cannot_be_made_says_how_to_name_another(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(build, "_failures", {})
    build.compiled.cache_clear()
    with pytest.raises(build.BuildError, match=r"NotADirectoryError.* Name a folder for it in TORCH_EXTENSIONS_DIR"):
        build.operators(RuleConfig())
    build.compiled.cache_clear()


SHAPES = [(), (300,), (4, 5, 3, 3), (130, 17), (1,), (2, 0), (64, 40)]  # of tiles of 128 and chunks of 2048
STEPS = 20


def train(kernel, shapes, dtype, state_dtype, rule, monkeypatch, steps=STEPS, grad_scale=1.0):
    """Feed random gradients to HRNN, some of them and some parameters not contiguous; return it and its parameters."""
    monkeypatch.setattr(optimizer_module, "choose_kernel", lambda *_: kernel)
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for index, param in enumerate(params):
        if param.dim() == 4:
            params[index] = torch.nn.Parameter(param.detach().contiguous(memory_format=torch.channels_last))
        if param.dim() == 2 and index % 2:
            params[index] = torch.nn.Parameter(param.detach().t().contiguous().t())
    half = len(params) // 2
    groups = [{"params": params[:half], "weight_decay": 0.3}, {"params": params[half:], "lr": 2.0}]
    optimizer = HRNN(groups, rule, state_dtype=state_dtype, initial_rate=0.01)
    for _ in range(steps):
        for param in params:
            grad = (torch.randn(param.shape, generator=generator) * grad_scale).to(dtype)
            param.grad = grad.t().contiguous().t() if grad.dim() == 2 else grad
        optimizer.step()
    return optimizer, params


# what rounding of parameters or of states leaves of the moves of 20 steps, as a share of them
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
STATE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 4e-2}


@needs_compiler
@pytest.mark.parametrize("changes", RULES)
@pytest.mark.parametrize("state_dtype", list(STATE_TOLERANCE), ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_step_equals_the_eager_step(dtype, state_dtype, changes, monkeypatch):
    """Parameters, state and lookaheads after many steps, over shapes, layouts in memory and types."""
    rule = random_rule(torch.float32, **RULES[changes])
    expected, expected_params = train(EagerKernel(), SHAPES, dtype, state_dtype, rule, monkeypatch)
    actual, params = train(cpp.CppKernel(), SHAPES, dtype, state_dtype, rule, monkeypatch)
    _, start = train(None, SHAPES, dtype, state_dtype, rule, monkeypatch, steps=0)
    tolerance = TOLERANCE[dtype] + STATE_TOLERANCE[state_dtype]
    for param, reference, first in zip(params, expected_params, start, strict=True):
        moved = (reference - first).detach().double()
        assert param.stride() == reference.stride()
        assert param.numel() == 0 or moved.norm() > 0
        assert (param - reference).detach().double().norm() <= tolerance * moved.norm()
        for key, value in expected.state[reference].items():
            if state_dtype == torch.float32 and value.numel():
                assert actual.state[param][key].dtype == value.dtype
                assert distance(actual.state[param][key].double(), value.double()) < max(1e-4, TOLERANCE[dtype]), key


@needs_compiler
def test_step_does_not_depend_on_threads(monkeypatch):
    """Bit for bit, the random rounding of bfloat16 included; so ranks stay equal."""
    rule, before, found = random_rule(torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer, params = train(cpp.CppKernel(), SHAPES, torch.float32, torch.bfloat16, rule, monkeypatch, 4)
            found.append([*params, *(state["square"] for state in optimizer.state.values())])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, first) for value, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("kernel", [EagerKernel(), pytest.param(cpp.CppKernel(), marks=needs_compiler)])
def test_rounding_of_small_states_is_unbiased(kernel, monkeypatch):
    """Averages kept in bfloat16 follow those in single precision on average, and do not stand still."""
    rule = HierarchicalRNN()
    with torch.no_grad():
        rule.decay_bias.copy_(torch.tensor([3.0, 7.0]))  # the squares are averages over a thousand steps
    shapes, squares = [(20_000,)], {}
    for state_dtype in (torch.float32, torch.bfloat16):
        optimizer, params = train(kernel, shapes, torch.float32, state_dtype, rule, monkeypatch, steps=1)
        for _ in range(200):
            params[0].grad = torch.full((20_000,), 0.01)
            optimizer.step()
        squares[state_dtype] = optimizer.state[params[0]]["square"].float().mean(1)
    start = torch.ones(4)  # the first gradient is a standard normal draw
    assert (squares[torch.float32] / start < 0.97).all()  # each step changes less than bfloat16's last bit
    assert distance(squares[torch.bfloat16], squares[torch.float32]) < 2e-3


@needs_compiler
def test_step_tells_autograd_that_parameters_changed(monkeypatch):
    """A graph made before the step and walked after it is refused, as with torch's own optimizers."""
    monkeypatch.setattr(optimizer_module, "choose_kernel", lambda *_: cpp.CppKernel())
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = HRNN([param], HierarchicalRNN())
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_a_compiler_the_eager_step_runs(no_compiler, monkeypatch):
    rule = random_rule(torch.float32)
    _, expected = train(EagerKernel(), SHAPES, torch.float32, torch.float32, rule, monkeypatch, 2)
    _, actual = train(cpp.CppKernel(), SHAPES, torch.float32, torch.float32, rule, monkeypatch, 2)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kernel", ["eager", "cpp"])
def test_defaults_of_torch_change_nothing(kernel):
    """Programs may make float64 the type of new tensors, or another device their place."""

    def trained():
        params = [
            torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype, device="cpu"))
            for dtype in (torch.float32, torch.float64)
        ]
        optimizer = HRNN(params, kernel=kernel, weight_decay=0.1)
        with torch.device("meta"):
            for _ in range(3):
                for param in params:
                    param.grad = param.detach() + 1
                optimizer.step()
        return [param.detach() for param in params]

    expected = trained()
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            actual = trained()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_without_a_compiler_there_is_one_message(no_compiler):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = HRNN([param], kernel="cpp")
        for _ in range(2):
            optimizer.step()
    assert len(said) == 1
    assert "install g++. The eager one runs instead." in str(said[0].message)


class FakeLoader:
    """Stand in for torch's extension loader; a lock that somebody left behind would make it wait for ever."""

    def __init__(self, folder):
        self.folder, self.builds = folder, 0

    def _get_build_directory(self, name, verbose):
        return str(self.folder)

    def load(self, name, sources, build_directory, **_):
        assert not (self.folder / "lock").exists()
        assert all(Path(source).is_file() for source in sources)
        (self.folder / f"{name}.so").write_bytes(b"compiled")
        self.builds += 1


def test_a_lock_left_behind_does_not_block_and_a_library_is_built_once(tmp_path, monkeypatch):
    loader, loaded = FakeLoader(tmp_path), []
    (tmp_path / "lock").touch()
    (tmp_path / "building").touch()
    monkeypatch.setattr(build, "_extension_loader", lambda: loader)
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    for _ in range(2):
        build._load(build.rule_library(RuleConfig()))
    assert loader.builds == 1
    assert [Path(path).suffix for path in loaded] == [".so"]


def test_a_library_is_loaded_from_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    loader, loaded = FakeLoader(tmp_path), []

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(build, "_extension_loader", lambda: loader)
    build._load(build.rule_library(RuleConfig()))
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(build, "_alone", refuse)
    build._load(build.rule_library(RuleConfig()))
    assert len(loaded) == loader.builds == 1


def test_a_build_that_died_is_done_again(tmp_path, monkeypatch):
    """A library without its mark may be half written; one that cannot be loaded is damaged."""
    loader = FakeLoader(tmp_path)
    monkeypatch.setattr(build, "_extension_loader", lambda: loader)
    build._load(build.rule_library(RuleConfig()))
    (tmp_path / "done").unlink()
    build._load(build.rule_library(RuleConfig()))
    assert loader.builds == 2

    (library,) = tmp_path.glob("*.so")
    monkeypatch.setattr(build.torch.ops, "load_library", lambda path: None)
    build._load(build.rule_library(RuleConfig()))
    assert loader.builds == 2
    library.write_bytes(library.read_bytes()[:-1])  # cut short: loading it might kill the process
    build._load(build.rule_library(RuleConfig()))
    assert loader.builds == 3

    def refuse(path):
        raise OSError(f"{path}: file too short")

    monkeypatch.setattr(build.torch.ops, "load_library", refuse)
    build._load(build.rule_library(RuleConfig()))
    assert loader.builds == 4
    assert (tmp_path / "done").exists()


def test_instruction_sets_have_libraries_of_their_own(tmp_path, monkeypatch):
    """One folder serves different machines."""
    names = []
    loader = FakeLoader(tmp_path)
    loader._get_build_directory = lambda name, verbose: names.append(name) or str(tmp_path)
    monkeypatch.setattr(build, "_extension_loader", lambda: loader)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        (tmp_path / "done").unlink(missing_ok=True)
        build._load(build.rule_library(RuleConfig()))
    assert len(set(names)) == 3
