"""The Triton kernel against the eager one, by Triton's interpreter on the CPU and, where there is one, on a GPU.

The interpreter must be asked for before Triton is imported, so its tests run in a process of their own, which the first
test here starts over this file.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from lightning_hrnn.optimizer import optimizer as optimizer_module
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, RuleConfig
from lightning_hrnn.optimizer.kernels import available_kernels, choose_kernel, triton_device
from lightning_hrnn.optimizer.kernels import triton as triton_kernel
from lightning_hrnn.optimizer.kernels.eager import EagerKernel
from lightning_hrnn.optimizer.kernels.triton_tables import dimensions
from lightning_hrnn.optimizer.optimizer import HRNN

INTERPRETED = triton_kernel.interpreted()
MISSING = triton_device.triton is None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_by_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED or MISSING, reason="needs Triton's compiler")

SMALL = {"param_hidden": 2, "timescales": 2}  # the interpreter's time goes by operations
SHAPES = [(), (4, 5, 3, 3), (30, 9), (1,), (2, 0), (256,), (2, 2, 3, 2, 3)]
# what rounding of parameters or of states leaves of the moves of all steps, as a share of them
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
STATE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 4e-2}


def random_rule(**changes):
    """Return a rule whose readouts at zero have moved, so that every meta-parameter matters."""
    torch.manual_seed(3)
    rule = HierarchicalRNN(RuleConfig(**changes))
    with torch.no_grad():
        for param in rule.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return rule


def like(value, index):
    """Lay a tensor out in memory in one of several ways."""
    if value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if value.dim() == 5:
        return value.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)  # no two dimensions lie as one
    if value.dim() == 2 and index % 2 == 0:
        return value.t().contiguous().t()
    if value.dim() == 1 and index % 2:
        return value.repeat_interleave(2)[::2]
    return value


class Training:
    """Feed random gradients to an optimizer, over ten orders of magnitude and some of them zero."""

    def __init__(self, kernel, rule, shapes, dtypes, state_dtype, device, monkeypatch):
        monkeypatch.setattr(optimizer_module, "choose_kernel", lambda *_: kernel)
        self.generator = torch.Generator().manual_seed(1)
        values = [torch.randn(shape, generator=self.generator).to(dtype) for dtype in dtypes for shape in shapes]
        self.params = [torch.nn.Parameter(like(value, i).to(device)) for i, value in enumerate(values)]
        self.start = [param.detach().clone() for param in self.params]
        half = len(self.params) // 2
        groups = [{"params": self.params[:half], "weight_decay": 0.3}, {"params": self.params[half:], "lr": 2.0}]
        self.optimizer = HRNN(groups, rule, state_dtype=state_dtype, initial_rate=0.01)

    def run(self, steps):
        for step in range(steps):
            for index, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=self.generator).pow(3) * 10.0 ** (index % 10 - 7)
                grad.view(-1)[step % 3 :: 7] = 0
                param.grad = like(grad.to(param.dtype), index + step % 2).to(param.device)
            self.optimizer.step()
        return self


def distance(value, reference):
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def check_equal(actual, expected, state_dtype):
    for param, reference, first in zip(actual.params, expected.params, expected.start, strict=True):
        tolerance = TOLERANCE[param.dtype] + STATE_TOLERANCE[state_dtype]
        moved = (reference - first).detach().double()
        assert param.stride() == reference.stride()
        assert param.numel() == 0 or moved.norm() > 0
        assert (param - reference).detach().double().norm() <= tolerance * moved.norm()
        for key, value in expected.optimizer.state[reference].items():
            found = actual.optimizer.state[param][key]
            assert found.dtype == value.dtype
            if state_dtype == torch.float32 and value.numel():
                assert distance(found.double(), value.double()) < max(1e-4, TOLERANCE[param.dtype]), key


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or MISSING, reason="starts the interpreter, or there is no Triton")
def test_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.fixture
def nearest_bfloat16(monkeypatch):
    """Let the interpreter round to the nearest bfloat16, as GPUs do; by itself it cuts off."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    cut = interpreter.InterpreterBuilder.create_fp_trunc

    def rounded(self, value, dtype):
        if str(dtype.scalar) != "bf16" or value.data.dtype != "float32":
            return cut(self, value, dtype)
        nearest = torch.tensor(value.data).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(nearest.numpy().view("uint16"), dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounded)


ATTENTION = {"readouts": ("direction", "attention")}
CASES = {  # types of parameters that live together, shapes, type of the state, parts of the rule
    "single": ([torch.float32], SHAPES, torch.float32, ATTENTION),
    "double": ([torch.float64], SHAPES[1:3], torch.float32, {}),
    "half": ([torch.bfloat16, torch.float16], SHAPES[1:3], torch.float32, {}),
    "bfloat16 state": ([torch.float32], SHAPES[1:3], torch.bfloat16, ATTENTION),
    "long scale": ([torch.float32], SHAPES, torch.float32, {"scale_memory": 7.0}),
    "long scale by trend": (
        [torch.float32],
        SHAPES[:2],
        torch.float32,
        {"scale_memory": 12.0, "scale_inputs": ("trend",)},
    ),
    "bounded": ([torch.float32, torch.float64], SHAPES[1:3], torch.float32, {"step_bound": 0.02, **ATTENTION}),
    "long scale in bfloat16": ([torch.float32], SHAPES[1:3], torch.bfloat16, {"scale_memory": 7.0, **ATTENTION}),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_eager_steps(case, nearest_bfloat16, monkeypatch):
    """Parameters, state and lookaheads after many steps, over shapes, layouts in memory and types."""
    monkeypatch.setattr(triton_kernel, "CHUNK", 256)  # tensors end within tiles of 128, between tiles, between chunks
    dtypes, shapes, state_dtype, parts = CASES[case]
    kernel = triton_kernel.TritonKernel()
    given = (random_rule(**parts, **SMALL), shapes, dtypes, state_dtype, "cpu", monkeypatch)
    expected = Training(EagerKernel(), *given).run(20)
    actual = Training(kernel, *given).run(20)
    assert set(kernel._reasons.values()) == {None}
    check_equal(actual, expected, state_dtype)


@interpreted
def test_steps_of_the_default_rule(monkeypatch):
    monkeypatch.setattr(triton_kernel, "TILE", 512)  # the interpreter's time goes by tiles
    case = (random_rule(), [(20, 25), (5,)], [torch.float32], torch.float32, "cpu", monkeypatch)
    expected = Training(EagerKernel(), *case).run(20)
    check_equal(Training(triton_kernel.TritonKernel(), *case).run(20), expected, torch.float32)


@interpreted
def test_huge_gradients_are_clipped(monkeypatch):
    rule, moved = random_rule(**SMALL), []
    for kernel in (EagerKernel(), triton_kernel.TritonKernel()):
        training = Training(kernel, rule, [(100,)], [torch.float32], torch.float32, "cpu", monkeypatch)
        training.params[0].grad = torch.full((100,), -1e-30)
        training.params[0].grad[::3] = 1e30
        training.optimizer.step()
        moved.append(training.params[0].detach() - training.start[0])
        assert moved[-1].isfinite().all()
    assert distance(moved[1], moved[0]) < 1e-5


@interpreted
def test_rounding_of_small_states_is_unbiased(monkeypatch):
    """Averages kept in bfloat16 follow those in single precision on average, and do not stand still."""
    monkeypatch.setattr(triton_kernel, "CHUNK", 8192)
    monkeypatch.setattr(triton_kernel, "TILE", 8192)
    rule, squares = HierarchicalRNN(RuleConfig(**SMALL)), {}
    with torch.no_grad():
        rule.decay_bias.copy_(torch.tensor([3.0, 7.0]))  # the squares are averages over a thousand steps
    for state_dtype in (torch.float32, torch.bfloat16):
        kernel = EagerKernel() if state_dtype == torch.float32 else triton_kernel.TritonKernel()
        training = Training(kernel, rule, [(8000,)], [torch.float32], state_dtype, "cpu", monkeypatch)
        param = training.params[0]
        param.grad = torch.randn(8000, generator=training.generator)
        for _ in range(60):
            training.optimizer.step()
            param.grad = torch.full((8000,), 0.01)
        squares[state_dtype] = training.optimizer.state[param]["square"].float().mean(1)
    assert (squares[torch.float32] < 0.97).all()  # from 1; each step changes less than bfloat16's last bit
    assert distance(squares[torch.bfloat16], squares[torch.float32]) < 3e-3


@interpreted
def test_same_steps_twice_are_the_same_bits(monkeypatch):
    rule, found = random_rule(**SMALL), []
    for _ in range(2):
        kernel = triton_kernel.TritonKernel()
        training = Training(kernel, rule, SHAPES, [torch.float32], torch.bfloat16, "cpu", monkeypatch).run(2)
        found.append([*training.params, *(state["square"] for state in training.optimizer.state.values())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@interpreted
def test_a_step_that_does_not_proceed_changes_nothing(monkeypatch):
    """The flag stays on the device; what is found out there is said when it is asked for."""
    monkeypatch.setattr(optimizer_module, "_waits_for", lambda device: False)
    rule = random_rule(**SMALL, readouts=("direction", "attention"))
    training = Training(triton_kernel.TritonKernel(), rule, SHAPES, [torch.float32], torch.bfloat16, "cpu", monkeypatch)
    training.run(2)
    optimizer, params = training.optimizer, training.params
    before = [param.detach().clone() for param in params]
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    params[2].grad[3, 4] = float("inf")
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(*pair) for pair in zip(after, states, strict=True))
    with pytest.warns(UserWarning, match="skipped a step"):
        assert optimizer.skipped_steps == 1
    training.run(1)
    assert not any(torch.equal(*pair) for pair in zip(params, before, strict=True) if pair[0].numel())


@interpreted
def test_tables_are_kept_while_addresses_stay(monkeypatch):
    built = []
    make = triton_kernel.build_tables
    monkeypatch.setattr(triton_kernel, "build_tables", lambda *given: built.append(given) or make(*given))
    kernel = triton_kernel.TritonKernel()
    training = Training(kernel, random_rule(**SMALL), [(5,), (7,)], [torch.float32], torch.float32, "cpu", monkeypatch)
    for param in training.params:
        param.grad = torch.ones_like(param)
    training.optimizer.step()
    first = len(built)
    assert first == 2  # one of them to try the kernel out
    training.optimizer.step()
    assert len(built) == first
    training.params[0].grad = training.params[0].grad.repeat(2)[::2]
    training.optimizer.step()
    assert len(built) == first + 1


@interpreted
def test_a_rule_that_changes_is_read_again(monkeypatch):
    rule, kernel = random_rule(**SMALL), triton_kernel.TritonKernel()
    before = kernel._meta(rule)
    assert kernel._meta(rule) is before
    with torch.no_grad():
        rule.param_rnn.gate_weight.mul_(2)
    width = rule.param_rnn.gate_weight.numel()
    assert torch.equal(kernel._meta(rule)[:width], 2 * before[:width])


@interpreted
def test_autograd_is_told_that_parameters_changed(monkeypatch):
    monkeypatch.setattr(optimizer_module, "choose_kernel", lambda *_: triton_kernel.TritonKernel())
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = HRNN([param], random_rule(**SMALL))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
@pytest.mark.parametrize("changes", [{"rate": "smoothed", "tensor_features": ()}, {"direction": "additive"}], ids=str)
def test_unsupported_rules_run_eagerly_with_one_warning(changes, monkeypatch):
    kernel = triton_kernel.TritonKernel()
    case = (random_rule(**changes, **SMALL), [(5,)], [torch.float32], torch.float32, "cpu", monkeypatch)
    training = Training(kernel, *case)
    with pytest.warns(UserWarning, match="Triton kernel does not run, the eager one does: The compiled kernels know"):
        training.run(1)
    training.run(1)  # a second warning would be an error
    expected = Training(EagerKernel(), *case).run(1).run(1)
    assert torch.equal(training.params[0], expected.params[0])


@interpreted
def test_a_failing_compiler_leaves_the_state_alone(monkeypatch):
    kernel = triton_kernel.TritonKernel()
    case = (random_rule(**SMALL), [(5,)], [torch.float32], torch.float32, "cpu", monkeypatch)
    expected = Training(EagerKernel(), *case).run(1)
    training = Training(kernel, *case)
    monkeypatch.setattr(triton_device, "apply", None)  # the last of the three to be launched
    with pytest.warns(UserWarning, match="It failed with TypeError"):
        training.run(1)
    assert torch.equal(training.params[0], expected.params[0])
    monkeypatch.setattr(triton_kernel, "kernel", lambda: kernel)
    assert "It failed with TypeError" in available_kernels()["triton"]
    assert isinstance(choose_kernel("auto", random_rule(**SMALL), "cuda"), EagerKernel)


@pytest.mark.parametrize(
    ("shape", "param_strides", "grad_strides", "expected"),
    [
        ((2, 3, 4), (12, 4, 1), (12, 4, 1), None),
        ((), (), (), None),
        ((5, 1), (1, 1), (1, 7), None),
        ((6,), (2,), (1,), [1, 6, 0, 0, 2, 0, 0, 1]),
        ((2, 3, 4, 5), (60, 1, 15, 3), (60, 20, 5, 1), [3, 20, 60, 1, 3, 60, 20, 1]),  # channels-last
        ((3, 4), (4, 1), (0, 0), [1, 12, 0, 0, 1, 0, 0, 0]),  # an expanded gradient
    ],
)
def test_dimensions_that_lie_as_one_are_merged(shape, param_strides, grad_strides, expected):
    assert dimensions(shape, param_strides, grad_strides) == expected


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="on a machine without a GPU")
def test_without_a_gpu_another_kernel_runs(monkeypatch):
    reason = available_kernels()["triton"]
    assert "There is no" in reason
    kernel = choose_kernel("triton", random_rule(), "cuda")
    training = Training(kernel, random_rule(), [(5,)], [torch.float32], torch.float32, "cpu", monkeypatch)
    monkeypatch.setattr(kernel, "_warned", False)
    with pytest.warns(UserWarning, match="There is no"):
        training.run(1)
    assert not isinstance(choose_kernel("auto", random_rule(), "cuda"), triton_kernel.TritonKernel)


def test_auto_takes_it_for_cuda_tensors_alone(monkeypatch):
    monkeypatch.setattr(triton_kernel, "why_unavailable", lambda: None)
    assert isinstance(choose_kernel("auto", random_rule(), "cuda"), triton_kernel.TritonKernel)
    assert not isinstance(choose_kernel("auto", random_rule(), "cpu"), triton_kernel.TritonKernel)
    assert isinstance(choose_kernel("auto", random_rule(rate="smoothed"), "cuda"), EagerKernel)


@compiled
@pytest.mark.parametrize(("param", "state", "long"), [("float32", "float32", 0), ("float64", "bfloat16", 1)])
def test_it_compiles_for_an_h200(param, state, long, tmp_path, monkeypatch):
    """Down to machine code, by the compiler that Triton brings; the interpreter takes more than the compiler does."""
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"PARAM": getattr(tl, param), "GRAD": getattr(tl, param), "STATE": getattr(tl, state)}
    numbers = {"GRAD_LIMIT": 1e15, "SQUARE_FLOOR": 1e-18, "MAX_LOGIT": 9.2, "BOUND": 2.0, "LONG": long}
    constants = {**types, **numbers, "H0": 2, "S": 2, "R": 2, "ROWS": 11, "WIDTH": 16, "CHUNK": 256, "TILE": 128}
    scalars = {"tensors": "*i64", "chunks": "*i32", "proceed": "*i32"}
    scalars |= {"tensor_count": "i32", "first_chunk": "i32"}
    for function in (triton_device.measure, triton_device.reduce, triton_device.apply):
        names = function.arg_names
        signature = {name: "constexpr" if name in constants else scalars.get(name, "*fp32") for name in names}
        values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
        source = ASTSource(function, signature=signature, constexprs=values)
        options = {"num_warps": 1, "enable_fp_fusion": True}
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert binary.asm["cubin"]
        assert function is triton_device.reduce or "fma.rn.f" in binary.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_steps_on_a_gpu_equal_the_eager_steps(case, monkeypatch):
    dtypes, _, state_dtype, parts = CASES[case]
    kernel = triton_kernel.TritonKernel()
    given = (random_rule(**parts), [*SHAPES, (130, 170)], dtypes, state_dtype, "cuda", monkeypatch)
    expected = Training(EagerKernel(), *given).run(20)
    actual = Training(kernel, *given).run(20)
    assert set(kernel._reasons.values()) == {None}
    check_equal(actual, expected, state_dtype)


@pytest.mark.gpu
def test_a_cuda_graph_of_both_passes_steps_again():
    """Captured once and replayed, the passes do what they do when called."""
    from lightning_hrnn.optimizer.kernels import FromAbove, TensorWork

    rule, kernel, found = random_rule().cuda(), triton_kernel.TritonKernel(), []
    for replay in (False, True):
        torch.manual_seed(0)
        states = [torch.zeros(rows, 5000, device="cuda") for rows in (10, 4, 4)]
        param, grad = torch.randn(5000).cuda(), torch.randn(5000).cuda()
        work = [TensorWork(param, grad, *states, torch.zeros((), device="cuda"), None, 1.0, 0.1)]
        above = FromAbove(*(torch.zeros(*rows, 1, device="cuda") for rows in ((30,), (), (), ())))

        def step(work=work, above=above):
            sums, pending = kernel.measure(rule, work, above)
            kernel.apply(work, pending, (sums.squares / 5000).rsqrt(), torch.full_like(sums.squares, math.inf))

        step()
        torch.cuda.synchronize()
        if replay:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                step()
        found.append([param.clone(), *states])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
