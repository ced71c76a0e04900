"""The command line `lightning-hrnn`: finds the command and imports only what that command needs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from lightning_hrnn.cli.errors import reporting_errors
from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.version import __version__

COMMANDS = {
    "demo": "Train a small conv net on real digits with the learned optimizer and with four baselines.",
    "train": "Train any LightningModule by Lightning's command line: fit, validate, test, predict.",
    "meta-train": "Meta-train the learned optimizer's own weights: fit, validate.",
    "average": "Average several checkpoints of meta-training into one set of weights.",
    "benchmark": "Measure what a step costs, beside SGD, Adam and AdamW, and how fast meta-training is.",
    "evaluate": "Compare the learned optimizer, untuned, with baselines tuned for each task.",
    "compare": "Put training runs side by side: losses over steps and over time, as a figure and a table.",
    "info": "Show the shipped weights, their cards and checksums, versions, and what can run here.",
}
"""Commands and what they do; `x-y` lives in the module `lightning_hrnn.cli.x_y` as `run(arguments)`."""

BETWEEN_LIBRARIES: tuple[tuple[str, type[Warning]], ...] = (
    (".*LeafSpec.* is deprecated", FutureWarning),  # of torch
    (r"(?s).*(JsonargparseDeprecationWarning|removed\s+in\s+v5\.0\.0)", DeprecationWarning),
)
"""Warnings that Lightning 2.6 does things as other libraries no longer like; a user cannot mend them."""

EXAMPLES = f"""\
  {PROGRAM} demo
  {PROGRAM} train fit --config recipes/digits.yaml
  {PROGRAM} meta-train fit --config recipes/meta_train/quick.yaml
  {PROGRAM} info --json
  {PROGRAM} COMMAND --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0 if all went well, 2 if the arguments were wrong, 1 for any other error.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    for message, category in BETWEEN_LIBRARIES:
        warnings.filterwarnings("ignore", message, category)
    with reporting_errors(debug) as ending:
        if arguments and arguments[0] in COMMANDS:
            command = import_module(f"{__name__}.{arguments[0].replace('-', '_')}")
            command.run(arguments[1:])
        else:
            _parser().parse_args(arguments)  # shows the help or the version, or says what is wrong
    return ending.status


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=PROGRAM,
        description="A learned optimizer for PyTorch and Lightning: see it work, use it, meta-train your own.",
        examples=EXAMPLES,
        version=__version__,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error; goes with every command.")
    commands = parser.add_subcommands(metavar="COMMAND", title="commands", description="")
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, CommandParser(), help=summary)
    return parser
