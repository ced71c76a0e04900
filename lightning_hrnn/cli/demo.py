"""`lightning-hrnn demo`: the learned optimizer against four baselines on real images."""

from __future__ import annotations

import logging
import math
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.evaluation.comparison import Entrant, Exam, Run, ScoreCurve, train_entrant
from lightning_hrnn.evaluation.plots import Panel, plot_panels
from lightning_hrnn.evaluation.report import Column, Report
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, load_pretrained
from lightning_hrnn.vision import DigitsData, FashionMNISTData, ImageClassifier, ImageData
from lightning_hrnn.vision.baselines import OptimizerName
from lightning_hrnn.vision.batches import TensorBatches

OURS = "HRNN"
BASELINES: dict[str, tuple[OptimizerName, str]] = {
    "SGD+momentum": ("sgd", "lr 0.001, momentum 0.9"),
    "RMSProp": ("rmsprop", "lr 0.01"),
    "Adam": ("adam", "lr 0.001"),
    "AdamW": ("adamw", "lr 0.001, decay 0.01"),
}
DEFAULT_EPOCHS = {"digits": 20, "fashion-mnist": 1}
BATCH_SIZE = {"digits": 32, "fashion-mnist": 64}
SCORES = 50
"""Points on a curve."""
SCORED_IMAGES = 1500
"""Training and test images that a point of a curve covers at most; the table's numbers cover all."""
COLUMNS = (
    Column("name", "optimizer"),
    Column("settings", "settings"),
    Column("train_loss", "train loss", ".2e"),
    Column("test_accuracy", "test accuracy", ".2%"),
    Column("steps_per_second", "steps/s", ".0f"),
)
DATA_DIR_HELP = "Folder of Fashion-MNIST's idx files; if null, data, or where Debian's package puts them."
EXAMPLES = f"""\
  {PROGRAM} demo
  {PROGRAM} demo --epochs 5 --seed 1 --out /tmp/demo
  {PROGRAM} demo --data fashion-mnist --data-dir data --steps 1000
  {PROGRAM} demo --weights my-run/hrnn.safetensors"""


def run(arguments: Sequence[str]) -> None:
    """Train every entrant, print the table, write the report.

    Raises:
        DataNotFoundError: If the data set is not there.
        OSError: If `--out` cannot be written to.
        WeightsError: If the weights are unknown or damaged.
    """
    options = parse(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    load_pretrained(options.weights)  # says at once what is wrong with them
    data = load_data(options)
    ready_folder(options.out)
    batches = data.train_dataloader()
    steps = options.steps or (options.epochs or DEFAULT_EPOCHS[options.data]) * len(batches)
    described = (
        f"{len(batches.data):,} training images of {options.data}, {steps:,} steps of {batches.batch_size} images"
    )
    console.print(f"Training the same convolutional net five times: {described}.")
    runs = train_all(data, batches, steps, options, console)
    show(runs, console)
    report = write(runs, described, steps, options, arguments)
    console.print(report.summary)
    console.print(f"Written to {options.out}: report.md, report.json, {', '.join(report.figures)}")


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options of the command line."""
    parser = CommandParser(
        prog=f"{PROGRAM} demo",
        description=(
            "Train a small convolutional net on real images through Lightning's Trainer, with the learned optimizer\n"
            "(no tuning) and with SGD+momentum, RMSProp, Adam and AdamW at torch's default rates; same first weights,\n"
            "same batches. Ends with a table; saves the curves and a report."
        ),
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--data", type=Literal["digits", "fashion-mnist"], default="digits", help="Digits come with scikit-learn.")
    add("--data-dir", type=str | None, default=None, help=DATA_DIR_HELP)
    add("--epochs", type=PositiveInt | None, default=None, help="Epochs; 20 of digits, 1 of Fashion-MNIST if null.")
    add("--steps", type=PositiveInt | None, default=None, help="Optimizer steps, instead of --epochs.")
    add("--seed", type=NonNegativeInt, default=0, help="Seed of the first weights and of the batches.")
    add("--weights", type=str, default=DEFAULT_WEIGHTS, help="Of the learned optimizer: a name or a .safetensors file.")
    add("--threads", type=PositiveInt, default=1, help="Processor threads; more lose much on a busy machine.")
    add("--out", type=Path, default=Path("hrnn-demo"), help="Folder for report.json, report.md and curves.png.")
    return parser.parse_args(list(arguments))


def load_data(options: Namespace) -> ImageData:
    """Return the chosen data set; all training images train, none are set aside.

    Raises:
        DataNotFoundError: If its files are not there.
    """
    common: dict[str, Any] = {
        "batch_size": BATCH_SIZE[options.data],
        "eval_batch_size": 100,  # larger ones leave the processor's cache: half as fast
        "validation": 0,
        "seed": options.seed,
    }
    data = DigitsData(**common) if options.data == "digits" else FashionMNISTData(options.data_dir, **common)
    data.setup()
    return data


def entrants(weights: str) -> list[Entrant]:
    """Return the learned optimizer and the baselines."""
    from lightning_hrnn.callbacks import HRNNOptimizerCallback

    def module(optimizer: OptimizerName = "adamw") -> LightningModule:
        return ImageClassifier("conv", optimizer=optimizer)

    ours = Entrant(OURS, f"{weights}, untuned", module, lambda: [HRNNOptimizerCallback(weights=weights)])
    return [ours, *(Entrant(name, how, partial(module, key)) for name, (key, how) in BASELINES.items())]


def train_all(data: ImageData, batches: TensorBatches, steps: int, options: Namespace, console: Console) -> list[Run]:
    """Train every entrant behind progress bars."""
    whole, sample = exam(data), exam(data, SCORED_IMAGES)
    with _quiet_lightning(), _progress(console) as bars:
        runs = []
        for entrant in entrants(options.weights):
            bar = bars.add_task(entrant.name, total=steps, loss="")
            curve = ScoreCurve(sample, every=math.ceil(steps / SCORES), progress=_advance(bars, bar))
            runs.append(train_entrant(entrant, batches, steps, curve, whole, options.seed))
    return runs


def exam(data: ImageData, images: int | None = None) -> Exam:
    """Return batches of the first `images` training and test images to score on; None takes all."""
    train, test = (
        TensorBatches(data.images(split).first(images), data.eval_batch_size, data.eval_transform())
        for split in ("train", "test")
    )
    return Exam(train, test)


def show(runs: Sequence[Run], console: Console) -> None:
    """Print the table, best training loss first."""
    table = Table(title="After training", title_justify="left", title_style="bold")
    for index, column in enumerate(COLUMNS):
        table.add_column(column.title, justify="left" if index < 2 else "right")
    for run_ in ranked(runs):
        cells = (column.cell(run_.row()) for column in COLUMNS)
        table.add_row(*cells, style="bold" if run_.name == OURS else None)
    console.print(table)


def ranked(runs: Sequence[Run]) -> list[Run]:
    """Return the runs by final training loss; those that diverged last."""
    return sorted(runs, key=lambda run: (not math.isfinite(run.final.train_loss), run.final.train_loss))


def summarise(runs: Sequence[Run]) -> str:
    """Return in a sentence how the learned optimizer fared."""
    order = [run.name for run in ranked(runs)]
    ours = next(run for run in runs if run.name == OURS)
    behind = order[order.index(OURS) + 1 :]
    return (
        f"{OURS} ended with a training loss of {ours.final.train_loss:.2e}, below {len(behind)} of "
        f"{len(runs) - 1} baselines, and a test accuracy of {ours.final.test_accuracy:.2%}. "
        "All baselines ran at torch's default rates; none was tuned."
    )


def write(runs: Sequence[Run], described: str, steps: int, options: Namespace, arguments: Sequence[str]) -> Report:
    """Save the curves and the report, and return the report."""
    title = f"Learned optimizer against untuned baselines on {options.data}"
    panels = [
        _panel(runs, "Training loss", "cross-entropy [nats]", "train_loss", log=True),
        _panel(runs, "Test accuracy", "images classified rightly", "test_accuracy", percent=True),
    ]
    plot_panels(panels, options.out / "curves.png", f"A small conv net on {options.data}", highlight=OURS)
    report = Report(
        title=title,
        summary=f"{summarise(runs)} The same convolutional net was trained from the same first weights: {described}.",
        command=shlex.join([PROGRAM, "demo", *arguments]),
        settings={
            "data": options.data,
            "steps": steps,
            "batch size": BATCH_SIZE[options.data],
            "seed": options.seed,
            "weights": options.weights,
            "net": "conv (lightning_hrnn.vision.models)",
        },
        columns=COLUMNS,
        rows=[run.row() for run in ranked(runs)],
        figures={"curves.png": "Training loss and test accuracy against steps"},
    )
    report.write(options.out)
    return report


def _panel(runs: Sequence[Run], title: str, ylabel: str, key: str, log: bool = False, percent: bool = False) -> Panel:
    curves = {
        run.name: ([score.step for score in run.curve], [getattr(score, key) for score in run.curve]) for run in runs
    }
    return Panel(title, "optimizer steps", ylabel, curves, log=log, percent=percent)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )


def _advance(bars: Progress, bar: Any) -> Callable[[int, float], None]:
    return lambda step, loss: bars.update(bar, completed=step, loss=f"train loss {loss:.2e}")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hold back Lightning's remarks on devices, on why training stopped, and on scores that we take ourselves."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
            yield
    finally:
        logger.setLevel(level)
