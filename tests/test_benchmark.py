"""The benchmark: what it measures, the rows it writes, its report."""

import itertools
import json
import time

import pytest
import torch
from torch import nn

from lightning_hrnn.cli import main
from lightning_hrnn.evaluation.benchmark import (
    Iteration,
    Timings,
    UnrollSize,
    interleave,
    load_model,
    measure_steps,
    measure_unrolls,
    peak_temporary_bytes,
    state_bytes,
    variants,
)
from lightning_hrnn.evaluation.benchmark import steps as steps_module
from lightning_hrnn.evaluation.benchmark.steps import BASELINES
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, RuleConfig
from lightning_hrnn.optimizer.kernels import available_kernels, build
from lightning_hrnn.optimizer.optimizer import HRNN

CPU = torch.device("cpu")
STEP_KEYS = {
    "optimizer",
    "device",
    "kernel",
    "threads",
    "model",
    "params",
    "ns_per_param",
    "ratio_to_adam_fused",
    "share_of_iteration",
    "state_bytes_per_param",
    "peak_temp_bytes",
}
UNROLL_KEYS = {"estimator", "engine", "task_param_steps_per_s", "ratio_to_eager"}
SHARE_KEYS = {
    "optimizer",
    "device",
    "kernel",
    "threads",
    "model",
    "params",
    "batch_size",
    "image_size",
    "share_of_iteration",
}
THREAD_KEYS = {"optimizer", "device", "kernel", "threads", "model", "params", "ns_per_param", "speedup"}
needs_proc = pytest.mark.skipif(
    peak_temporary_bytes(lambda: None, CPU) is None, reason="the system does not say how much memory is resident"
)


# -- the command, once


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of the smallest benchmark."""
    folder = tmp_path_factory.mktemp("benchmark")
    threads = torch.get_num_threads()
    began = time.monotonic()
    options = ["--quick", "--rounds", "2", "--models", "1e4", "conv", "--threads", "1", "2"]
    assert main(["benchmark", *options, "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    assert time.monotonic() - began < 240  # under a minute on a machine that does nothing else, kernels built
    return folder


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def rows(report):
    """The rows of steps, of shares, of meta-training and of threads."""
    of_steps, of_shares, of_unrolls, of_threads = [], [], [], []
    for row in report["results"]:
        kind = next(
            rows
            for keys, rows in (
                (STEP_KEYS, of_steps),
                (SHARE_KEYS, of_shares),
                (UNROLL_KEYS, of_unrolls),
                (THREAD_KEYS, of_threads),
            )
            if row.keys() == keys
        )
        kind.append(row)
    return of_steps, of_shares, of_unrolls, of_threads


def test_every_variant_was_measured_on_every_model(rows):
    found = [(row["model"], row["optimizer"], row["kernel"]) for row in rows[0]]
    kernels = [name for name in ("eager", "cpp") if available_kernels()[name] == "available"]
    expected = [
        ("sgd", "foreach"),
        ("adam", "foreach"),
        ("adam", "fused"),
        ("adamw", "fused"),
        *(("hrnn", kernel) for kernel in kernels),
        ("hrnn-bf16", kernels[-1]),
    ]
    assert found == [(model, *variant) for model in ("1e4", "conv") for variant in expected]
    assert {(row["device"], row["threads"]) for row in rows[0]} == {("cpu", 1)}


def test_ratios_are_to_fused_adam(rows):
    for row in rows[0]:
        assert row["ns_per_param"] > 0
        if (row["optimizer"], row["kernel"]) == ("adam", "fused"):
            assert row["ratio_to_adam_fused"] == 1
        if row["optimizer"].startswith("hrnn"):
            assert 1.5 < row["ratio_to_adam_fused"] < 5000


def test_state_is_what_the_optimizers_say(rows):
    bytes_of = {"sgd": 4, "adam": 8, "adamw": 8, "hrnn": 76, "hrnn-bf16": 38}
    for row in rows[0]:
        assert 0 <= row["state_bytes_per_param"] - bytes_of[row["optimizer"]] < 3  # counters, tensor and global states


def test_a_real_network_has_shares_of_an_iteration(rows):
    of_steps, of_shares, *_ = rows
    assert len(of_shares) == len(of_steps)  # two batch sizes, of one of the two models
    assert {row["model"] for row in of_shares} == {"conv"}
    assert all(0 < row["share_of_iteration"] < 1 for row in of_shares)
    for row in of_steps:
        same = [
            share["share_of_iteration"]
            for share in of_shares
            if (share["model"], share["optimizer"], share["kernel"], share["batch_size"])
            == (row["model"], row["optimizer"], row["kernel"], 8)
        ]
        assert same == ([] if row["share_of_iteration"] is None else [row["share_of_iteration"]])


def test_both_estimators_ran_on_every_engine(rows):
    engines = [name for name in ("eager", "cpp") if available_kernels()[name] == "available"]
    found = [(row["engine"], row["estimator"]) for row in rows[2]]
    assert found == list(itertools.product(engines, ("truncated_backprop", "forward_only", "pes")))
    speeds = {(row["engine"], row["estimator"]): row["task_param_steps_per_s"] for row in rows[2]}
    assert rows[2][0]["ratio_to_eager"] == 1
    assert min(speeds.values()) > 1000


def test_threads_are_compared_on_every_model(rows):
    fastest = [name for name in ("eager", "cpp") if available_kernels()[name] == "available"][-1]
    found = [(row["model"], row["optimizer"], row["kernel"], row["threads"]) for row in rows[3]]
    compared = (("adam", "fused"), ("hrnn", fastest))
    assert found == [(m, *variant, n) for m in ("1e4", "conv") for variant in compared for n in (1, 2)]
    for row in rows[3]:
        assert row["ns_per_param"] > 0
        assert row["speedup"] == 1 if row["threads"] == 1 else row["speedup"] > 0
    assert torch.get_num_threads() == 1


def test_the_report_holds_all_tables_figures_and_settings(out, report):
    text = (out / "report.md").read_text()
    for title in ("Share of a training iteration", "Threads", "Meta-training"):
        assert text.count(f"\n## {title}\n") == 1
    table_rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(table_rows) == len(report["results"]) + 4  # the headings
    assert text.index("# What the learned optimizer costs") < text.index("## Meta-training") < text.index("## How to")
    assert set(report["figures"]) == {"cost.png", "ratios.png"}
    for name in report["figures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert report["settings"]["clock"] == "processor time"
    assert report["command"] in text
    assert report["summary"].startswith("On conv a step takes this many times as long as one of fused Adam: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--models", "resnet188"], "resnet18"),
        (["--models", "3"], "A model has from"),
        (["--weights", "nope"], "nope"),
        pytest.param(
            ["--device", "cuda"],
            "take --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, named, capsys, tmp_path):
    assert main(["benchmark", *arguments, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert named in said[0]
    assert not (tmp_path / "out").exists()


# -- timing


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    ticks = []
    timings = interleave(calls, CPU, rounds=2, shortest=0.0, tick=lambda *counts: ticks.append(counts))
    assert "".join(order) == "aabbcc" + "abc" + "cba"
    assert ticks == [(done, 9) for done in range(1, 10)]
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_quick_calls_are_repeated():
    calls = 0

    def work():
        nonlocal calls
        calls += 1
        sum(range(20_000))

    timings = interleave({"work": work}, CPU, rounds=1, shortest=0.05)
    assert calls > 20
    assert 0.01 < timings.median("work") * (calls - 2) < 1  # the mean of a call, not the whole


def test_the_clock_of_one_thread_does_not_run_while_it_waits():
    timings = interleave({"sleep": lambda: time.sleep(0.05)}, CPU, rounds=1, shortest=0.0)
    assert torch.get_num_threads() == 1
    assert timings.median("sleep") < 0.03


def test_ratios_pair_the_calls_of_a_round():
    timings = Timings({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 2.0]})
    assert timings.median("a") == 6
    assert timings.ratio("a", "b") == 2  # of 2, 2, 3
    assert timings.share("a", "b") == pytest.approx(2 / 3)
    assert timings.spread("a", "b") == 0
    assert timings.spread("b", "b") == 0


# -- memory


@needs_proc
def test_temporary_memory_is_what_a_call_needs_at_once():
    kept = [None]
    count = 12_000_000  # 48 MB: the system gives blocks of this size one by one and takes them back

    def work():
        for _ in range(3):  # one after the other: three times as much is never there at once
            torch.ones(count).sum()

    def keep():
        kept[0] = torch.ones(count)

    for call in (work, keep):
        assert peak_temporary_bytes(call, CPU) == pytest.approx(4 * count, rel=0.1)
        kept[0] = None
    assert peak_temporary_bytes(lambda: None, CPU) < 1e6


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_hrnn.evaluation.benchmark.memory.CLEAR_REFS", tmp_path / "none" / "none")
    assert peak_temporary_bytes(lambda: None, CPU) is None


def test_state_bytes_count_every_tensor():
    param = nn.Parameter(torch.ones(3, 5))
    param.grad = torch.ones(3, 5)
    optimizer = torch.optim.Adam([param])
    optimizer.step()
    assert state_bytes(optimizer) == 15 * 8 + 4


# -- models


@pytest.mark.parametrize(("name", "params"), [("2e4", 2e4), ("1e6", 1e6), ("11689512", 11_689_512)])
def test_a_number_is_resnet18_at_another_width(name, params):
    model = load_model(name)
    assert model.params == pytest.approx(params, rel=0.05)
    assert len(model.shapes) == 62
    assert model.module is None
    assert model.shapes[0][1:] == (3, 7, 7)


def test_the_width_of_resnet18_is_found_again():
    assert load_model("11689512").shapes == load_model("resnet18").shapes


# -- steps and unrolls


def small_rule(**changes):
    torch.manual_seed(0)
    return HierarchicalRNN(RuleConfig(**changes))


def test_a_kernel_that_cannot_be_built_is_left_out(monkeypatch):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no compiler")
    monkeypatch.setattr(steps_module, "available_kernels", lambda: {"eager": "available", "cpp": "no compiler"})
    assert [variant.name for variant in variants(small_rule(), CPU)[-2:]] == ["hrnn eager", "hrnn-bf16 eager"]


def test_a_kernel_that_does_not_know_the_rule_is_left_out():
    found = variants(small_rule(rate="smoothed", direction="additive"), CPU)
    assert [variant.kernel for variant in found if variant.optimizer == "hrnn"] == ["eager"]


def test_iterations_leave_gradients_and_parameters_alone():
    model = load_model("conv")
    before = [param.detach().clone() for param in model.module.parameters()]
    found = measure_steps(model, BASELINES, CPU, [Iteration(2, 8)], rounds=1, shortest=0.0)
    assert all(torch.equal(*pair) for pair in zip(before, model.module.parameters(), strict=True))
    assert len(found.steps) == len(found.shares) == len(BASELINES)
    assert all(row["share_of_iteration"] > 0 for row in found.shares)


def test_no_step_is_skipped_for_a_gradient_that_is_not_finite(monkeypatch):
    built = []
    rule = small_rule()

    class Watched(HRNN):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            built.append(self)

    monkeypatch.setattr(steps_module, "HRNN", Watched)
    ours = [variant for variant in variants(rule, CPU) if variant.name in ("hrnn eager", steps_module.BASE)]
    measure_steps(load_model("1e4"), ours, CPU, rounds=3, shortest=0.0)
    assert built[-1].skipped_steps == 0
    param = built[-1].param_groups[0]["params"][0]
    assert built[-1].state[param]["age"] == 6  # two to begin with, three rounds, one to weigh
    assert param.isfinite().all()


def test_unrolls_leave_the_rule_alone():
    rule = small_rule().requires_grad_(False)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    found = measure_unrolls(rule, CPU, UnrollSize("quick", 1, 2, 2), rounds=1, shortest=0.0)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert not any(param.requires_grad or param.grad is not None for param in rule.parameters())
    assert found[0] == {
        "estimator": "truncated_backprop",
        "engine": "eager",
        "task_param_steps_per_s": found[0]["task_param_steps_per_s"],
        "ratio_to_eager": 1.0,
    }
