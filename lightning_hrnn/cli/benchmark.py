"""`lightning-hrnn benchmark`: what the learned optimizer costs, beside SGD, Adam and AdamW."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.evaluation.benchmark import (
    Iteration,
    Model,
    Tick,
    UnrollSize,
    load_model,
    measure_steps,
    measure_threads,
    measure_unrolls,
    variants,
)
from lightning_hrnn.evaluation.benchmark.report import BenchmarkReport, Measured, Part
from lightning_hrnn.evaluation.benchmark.steps import BASE
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, load_pretrained


class Effort(NamedTuple):
    """Say what is measured, and for how long."""

    models: tuple[str, ...]
    rounds: int
    shortest: float  # seconds of a measurement
    iterations: tuple[Iteration, ...]
    unroll: UnrollSize


FULL = {
    "cpu": Effort(
        models=("1e5", "1e6", "resnet18", "resnet50"),
        rounds=5,
        shortest=0.1,
        iterations=(Iteration(2, 64), Iteration(8, 64), Iteration(32, 64)),
        unroll=UnrollSize("extended", places=12, instances=8, window=20),
    ),
    "cuda": Effort(
        models=("1e5", "1e6", "resnet18", "resnet50", "vit_b_16"),
        rounds=9,
        shortest=0.1,
        iterations=(Iteration(8, 224), Iteration(32, 224), Iteration(128, 224)),
        unroll=UnrollSize("extended", places=48, instances=32, window=20),
    ),
}
QUICK = Effort(
    models=("1e4", "1e5", "conv"),
    rounds=3,
    shortest=0.01,
    iterations=(Iteration(2, 32), Iteration(8, 32)),
    unroll=UnrollSize("quick", places=4, instances=4, window=5),
)
NOT_SHOWN = ("params", "image_size")
"""Values that only the report's tables have room for."""
EXAMPLES = f"""\
  {PROGRAM} benchmark
  {PROGRAM} benchmark --quick --out /tmp/benchmark
  {PROGRAM} benchmark --threads 1 2
  {PROGRAM} benchmark --device cuda --models resnet50 vit_b_16"""


def run(arguments: Sequence[str]) -> None:
    """Measure, print the tables, write the report.

    Raises:
        OSError: If `--out` cannot be written to.
        ValueError: If there is no such model, or no GPU where one is asked for.
        WeightsError: If the weights are unknown or damaged.
    """
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: take --device cpu, or install a build of torch for CUDA.")
    effort = QUICK if options.quick else FULL[options.device]
    effort = effort._replace(models=tuple(options.models or effort.models), rounds=options.rounds or effort.rounds)
    rule, console = load_pretrained(options.weights), Console()
    torch.set_num_threads(options.threads[0])
    models = [load_model(name) for name in effort.models]  # all at first: a wrong name ends the run now
    ready_folder(options.out)
    measured = measure(rule, models, effort, torch.device(options.device), options.threads, console)
    for part in measured.parts:
        show(part, console)
    report = BenchmarkReport.of(
        measured,
        command=shlex.join([PROGRAM, "benchmark", *arguments]),
        settings=settings(options, effort),
        figures=measured.plot(options.out),
    )
    report.write(options.out)
    console.print(report.summary)
    console.print(f"Written to {options.out}: report.md, report.json, {', '.join(report.figures)}")


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    parser = CommandParser(
        prog=f"{PROGRAM} benchmark",
        description=(
            "Measure what a step of the learned optimizer costs with every kernel that runs here, beside SGD, Adam\n"
            "and AdamW: time, share of a training iteration, memory; and how fast meta-training is. All take turns in\n"
            "one process: trust the ratios more than the seconds. Takes ten minutes or more on one thread of a CPU."
        ),
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("hrnn-benchmark"), help="Folder for report.json, report.md and the figures.")
    add(
        "--threads",
        type=PositiveInt,
        nargs="+",
        default=[1],
        help="Processor threads. With several numbers the first is everything's; on the others steps are timed again.",
    )
    add(
        "--models",
        type=str,
        nargs="+",
        default=None,
        help=(
            "Networks of torchvision, timm/NAME, or numbers of parameters, such as 1e6, for ResNet-18's tensors at "
            "other widths. If null: 1e5 1e6 resnet18 resnet50, on a GPU also vit_b_16."
        ),
    )
    add("--quick", action="store_true", help="Take small models and few rounds: under a minute.")
    add("--device", type=Literal["cpu", "cuda"], default="cpu", help="Where to measure.")
    add("--rounds", type=PositiveInt | None, default=None, help="Rounds to take medians of; 5, or 9 on a GPU, if null.")
    add("--weights", type=str, default=DEFAULT_WEIGHTS, help="A name or a .safetensors file.")
    return parser.parse_args(list(arguments))


def measure(
    rule: HierarchicalRNN,
    models: Sequence[Model],
    effort: Effort,
    device: torch.device,
    threads: Sequence[int],
    console: Console,
) -> Measured:
    """Measure everything behind progress bars."""
    measured = Measured([], [], [], [], spread=0.0)
    common: dict[str, Any] = {"rounds": effort.rounds, "shortest": effort.shortest}
    with _progress(console) as bars:
        compared = variants(rule, device)
        for model in models:
            found = measure_steps(model, compared, device, effort.iterations, **common, tick=_ticker(bars, model.name))
            measured.steps.extend(found.steps)
            measured.shares.extend(found.shares)
            measured.spread = max(measured.spread, found.spread)
            if len(threads) > 1 and device.type == "cpu":
                fastest = [variant for variant in compared if variant.name in (BASE, compared[-2].name)]
                tick = _ticker(bars, f"{model.name}, threads")
                measured.threads.extend(measure_threads(model, fastest, threads, **common, tick=tick))
        measured.unrolls.extend(
            measure_unrolls(rule, device, effort.unroll, **common, tick=_ticker(bars, "meta-training"))
        )
    return measured


def settings(options: Namespace, effort: Effort) -> dict[str, Any]:
    """Return what the numbers depend on and how they are to be read."""
    on_cpu, unrolled = options.device == "cpu", effort.unroll
    return {
        "device": options.device,
        "threads": options.threads[0],
        "rounds": effort.rounds,
        "clock": "processor time" if on_cpu and options.threads[0] == 1 else "time on the wall",
        "weights": options.weights,
        "sgd": "with momentum",
        "hrnn-bf16": "the fastest kernel with state in bfloat16",
        "share": "step / (forward + backward + step); in the first table at the largest batch",
        "iterations": "float32" if on_cpu else "bfloat16 autocast, channels last",
        "meta-training": f"{unrolled.places} x {unrolled.instances} tasks of the corpus {unrolled.corpus} at once, "
        f"windows of {unrolled.window} inner steps; gradients and losses of the tasks included",
    }


def show(part: Part, console: Console) -> None:
    """Print a table, with a line between models; narrower than the report's."""
    columns = [column for column in part.columns if column.key not in NOT_SHOWN]
    table = Table(title=part.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="right" if column.format else "left")
    for row, after in zip(part.rows, [*part.rows[1:], {}], strict=True):
        table.add_row(
            *(column.cell(row) for column in columns),
            style="bold" if str(row.get("optimizer", "")).startswith("hrnn") else None,
            end_section=row.get("model") != after.get("model"),
        )
    console.print(table)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<17}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _ticker(bars: Progress, description: str) -> Tick:
    bar = bars.add_task(description, total=None)

    def tick(done: int, total: int) -> None:
        bars.update(bar, completed=done, total=total)

    return tick
