"""`lightning-hrnn evaluate`: the learned optimizer, untuned, against baselines tuned for each task."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.evaluation.baselines import BASELINES, CONSTANT
from lightning_hrnn.evaluation.evaluation_report import LOSS_COLUMNS, EvaluationReport, losses_row
from lightning_hrnn.evaluation.figures import plot_curves, plot_rates, plot_win_rates
from lightning_hrnn.evaluation.protocol import ANYTIME, DEFAULT_ADAM, GIVEN, OURS, RATES, Outcome, Trial
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.evaluation.trials import Cache, run_trials
from lightning_hrnn.evaluation.verdict import judge
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import choose_engine
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, fingerprint, first_rate, load_pretrained, looked_at

QUICK: dict[str, Any] = {"steps": 50, "seeds": 2, "tuning_seeds": 1, "tasks": 2}
NOT_SHOWN = ("default_adam", "given", "beaten")
"""Values that only the report's tables have room for."""
NOT_SHOWN_IF_NARROW = ("anytime", "speedup", "diverged", "came_back")
"""Values that terminals of 80 columns have no room for; the sentences below the table sum them up."""
WIDE = 1000
DATA_DIR_HELP = "Folder of Fashion-MNIST's idx files; if null, data, or where Debian's package puts them."
EXAMPLES = f"""\
  {PROGRAM} evaluate --suite nets --quick
  {PROGRAM} evaluate --suite corpus --steps 1000
  {PROGRAM} evaluate --suite nets --steps 3000 --tasks deep-relu-mlp digits-transformer --out /tmp/nets
  {PROGRAM} evaluate --suite vision --steps 1000 --data-dir data --weights my-run/hrnn.safetensors"""


def run(arguments: Sequence[str]) -> None:
    """Run what the cache lacks, print the table, write the report.

    Raises:
        DataNotFoundError: If a task's data set is not there.
        OSError: If `--out` cannot be written to.
        ValueError: If there is no such task or corpus, or no GPU where one is asked for.
        WeightsError: If the weights are unknown or damaged.
    """
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: take --device cpu, or install a build of torch for CUDA.")
    console = Console()
    rule = load_pretrained(options.weights)
    choose_engine("auto", rule)  # builds the compiled one now, not in every process at once
    setting = Setting(**{name: options[name] for name in Setting.__dataclass_fields__})
    tasks = setting.choose(options.tasks, options.without or ())
    if options.quick and options.tasks is None:
        tasks = tasks[: QUICK["tasks"]]
    for task in tasks:
        setting.draw(task, "report", 1)  # says now if a data set is missing
    ready_folder(ready_folder(options.out) / "cache")
    outcomes = compare(setting, tasks, rule, options, console)
    rules = [rule, *([rule.small.rule] if rule.small else [])]
    seen = looked_at(*(one.card for one in rules)).get(options.suite, [])
    known = tasks if options.suite == "corpus" else seen  # a corpus is what rules learn from
    records = [judge(setting, task, outcomes[task], known) for task in tasks]
    report = EvaluationReport.of(
        records,
        title=f"{options.weights} on the suite {options.suite}, {options.steps:,} steps",
        command=shlex.join([PROGRAM, "evaluate", *arguments]),
        settings=settings(options, rule),
        figures={
            "curves.png": "Training loss over steps: median over seeds, band from lowest to highest",
            "win_rates.png": "Share of tasks on which the learned optimizer ends lower",
            "rates.png": "Learned rate of each tensor over steps",
        },
    )
    report.write(options.out)
    show(report, console)
    console.print(report.summary)
    with console.status(f"Drawing curves and rates of {len(tasks)} task(s)"):  # a minute where there are hundreds
        draw(report, outcomes, options.out)
    console.print(f"Written to {options.out}: report.md, report.json, {', '.join(report.figures)}")


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the options of the command line, those that `--quick` stands for filled in."""
    parser = CommandParser(
        prog=f"{PROGRAM} evaluate",
        description=(
            "Compare the learned optimizer, untuned, with SGD+momentum, RMSProp, Adam and AdamW, all with warm-up and\n"
            "cosine and tuned for each task over 15 rates on other seeds. Outcomes are kept in OUT/cache: the same\n"
            "command goes on where it was stopped, and other weights meet the same tuned baselines at once."
        ),
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--weights", type=str, default=DEFAULT_WEIGHTS, help="A name or a .safetensors file.")
    add("--suite", type=Literal["corpus", "nets", "vision"], default="nets", help="Which tasks to compare on.")
    add("--steps", type=PositiveInt | None, default=None, help="Steps of every run; 1000 if null.")
    add("--seeds", type=PositiveInt | None, default=None, help="Instances of each task to report on; 5 if null.")
    add("--tuning-seeds", type=PositiveInt | None, default=None, help="Others, to tune baselines on; 3 if null.")
    add("--seed", type=NonNegativeInt, default=0, help="Moves all seeds.")
    add("--tasks", type=str, nargs="+", default=None, help="Names of tasks; all of the suite if null.")
    add("--without", type=str, nargs="+", default=None, help="Names of tasks to leave out.")
    add("--corpus", type=str, default="released", help="Corpus whose families make the suite 'corpus'.")
    add("--draws", type=PositiveInt, default=1, help="Configurations to draw from each family of the corpus.")
    add("--data-dir", type=str | None, default=None, help=DATA_DIR_HELP)
    out_help = "Folder for the report, the figures and the cache; hrnn-evaluation/SUITE-STEPS, with the seed, if null."
    add("--out", type=Path | None, default=None, help=out_help)
    add("--processes", type=PositiveInt | None, default=None, help="Each on one thread; as many as cores if null.")
    given_help = "Also the rule's direction at given rates, tuned and scheduled like the baselines; it costs like two."
    add("--given", action="store_true", help=given_help)
    constant_help = "Also the baselines tuned at constant rates, against HRNN without cooldown; it costs twice as much."
    add("--constant", action="store_true", help=constant_help)
    add("--device", type=Literal["cpu", "cuda"], default="cpu", help="Where to run.")
    add("--quick", action="store_true", help="Two tasks, 50 steps, two seeds, one to tune: shows that all works.")
    options = parser.parse_args(list(arguments))
    of_corpus = [f"--{name}" for name in ("corpus", "draws") if options[name] != parser.get_default(name)]
    of_vision = [] if options.data_dir is None else ["--data-dir"]
    for suite, others in (("corpus", of_corpus), ("vision", of_vision)):
        if others and options.suite != suite:
            raise ValueError(
                f"{' and '.join(others)} would change nothing: the suite is {options.suite!r}. Leave it out, or take "
                f"--suite {suite}."
            )
    for name, usual in (("steps", 1000), ("seeds", 5), ("tuning_seeds", 3)):
        if options[name] is None:
            options[name] = QUICK[name] if options.quick else usual
    seed = f"-seed-{options.seed}" if options.seed else ""
    options.out = options.out or Path("hrnn-evaluation", f"{options.suite}-{options.steps}{seed}")
    options.processes = options.processes or (1 if options.device == "cuda" else os.cpu_count() or 1)
    return options


def compare(
    setting: Setting, tasks: Sequence[str], rule: HierarchicalRNN, options: Namespace, console: Console
) -> dict[str, dict[str, Outcome]]:
    """Return outcomes by task and optimizer, run behind a progress bar.

    Raises:
        KeyboardInterrupt: It says that nothing is lost.
    """
    version = _version(rule)
    others = (DEFAULT_ADAM, *BASELINES, *(CONSTANT if options.constant else ()))
    baselines = [Trial(setting, task, name) for task in tasks for name in others]
    ours = (OURS, ANYTIME, GIVEN) if options.given else (OURS, ANYTIME)
    learned = [Trial(setting, task, name, version) for task in tasks for name in ours]
    trials = [*learned, *baselines]
    with _progress(console) as bars:
        bar = bars.add_task(f"{len(trials)} trials", total=len(trials), last="")

        def report(done: float, ended: Trial | None) -> None:
            bars.update(bar, completed=done)
            if ended is not None:
                bars.update(bar, last=f"{ended.task}: {ended.optimizer} done")

        try:
            found = run_trials(trials, rule, Cache(options.out / "cache"), options.processes, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what has ended is kept, and the same command goes on from there") from None
        bars.update(bar, completed=len(trials))
    return {
        task: {trial.optimizer: outcome for trial, outcome in found.items() if trial.task == task} for task in tasks
    }


def _version(rule: HierarchicalRNN) -> str:
    """Return what tells weights from others, those for small models included."""
    own = f"{fingerprint(rule)}, first rate {first_rate(rule):g}"
    return f"{own}; below {rule.small.below}: {_version(rule.small.rule)}" if rule.small else own


def settings(options: Namespace, rule: HierarchicalRNN) -> dict[str, Any]:
    """Return what the numbers depend on."""
    facts = {name: options[name] for name in ("suite", "steps", "seeds", "tuning_seeds", "seed", "device", "processes")}
    if options.suite == "corpus":
        facts |= {"corpus": options.corpus, "draws": options.draws}
    small = {}
    if rule.small is not None:
        card = rule.small.rule.card
        used = f"the weights {card.get('name')}, which saw the corpus {card.get('corpus')}"
        small[f"below {rule.small.below:,} parameters"] = used
    return {
        **facts,
        "rates": f"{len(RATES)}, from {RATES[0]:g} to {RATES[-1]:g}, half a decade apart",
        "weights": options.weights,
        "corpus the weights saw": rule.card.get("corpus"),
        "longest runs the weights saw": rule.card.get("horizon"),
        **small,
        "quick": options.quick,
    }


def draw(report: EvaluationReport, outcomes: dict[str, dict[str, Outcome]], folder: Path) -> None:
    """Save the figures."""
    plot_curves(outcomes, folder / "curves.png")
    plot_win_rates(report.verdict, folder / "win_rates.png")
    plot_rates(outcomes, folder / "rates.png")


def show(report: EvaluationReport, console: Console) -> None:
    """Print the table of final losses; nets by which checkpoints were picked are dimmed."""
    table = _losses_table(report, NOT_SHOWN)
    if console.measure(table, options=console.options.update(width=WIDE)).maximum > console.width:
        table = _losses_table(report, (*NOT_SHOWN, *NOT_SHOWN_IF_NARROW))
    console.print(table)


def _losses_table(report: EvaluationReport, left_out: Sequence[str]) -> Table:
    table = Table(title="Final training loss", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    columns = [column for column in LOSS_COLUMNS if column.key not in left_out]
    for column in columns:
        table.add_column(column.title, justify="right" if column.format else "left", no_wrap=True, overflow="fold")
    for record in report.rows:
        row = losses_row(record)
        table.add_row(*(column.cell(row) for column in columns), style="dim" if record["used_for_selection"] else None)
    return table


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
        console=console,
    )
