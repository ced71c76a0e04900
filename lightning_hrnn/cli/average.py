"""`lightning-hrnn average`: one set of weights out of several checkpoints of meta-training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.optimizer.hierarchical_rnn import SmallModels
from lightning_hrnn.optimizer.pretrained import (
    average_weights,
    inherited,
    load_pretrained,
    looked_at,
    save_pretrained,
    small_beside,
)

SMALL_BELOW = 2000  # parameters
EXAMPLES = f"""\
  {PROGRAM} average mine.safetensors runs/refine/step_100.safetensors runs/refine/step_200.safetensors
  {PROGRAM} average bold.safetensors hrnn-v0 --bounds '{{"drift_rise": 5}}' --initial-rate 5e-4
  {PROGRAM} average both.safetensors hrnn-v10 --small runs/small/weights.safetensors --small-below 2000"""


def run(arguments: Sequence[str]) -> None:
    """Average weights and write them with a card.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the weights are of rules of different shapes, a bound is unknown, or OUT is there already.
        WeightsError: If weights are unknown or damaged.
    """
    parser = CommandParser(
        prog=f"{PROGRAM} average",
        description=(
            "Average weights, usually checkpoints of one meta-training run: what their noise has in common goes, what\n"
            "they learned stays. With one set of weights, only bounds, parts or the first rate change."
        ),
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="The .safetensors file to write; its card lies beside it.")
    add("weights", type=str, nargs="+", metavar="WEIGHTS", help="Names of shipped weights, or .safetensors files.")
    add(
        "--bounds",
        type=dict[str, bool | int | float | list[str]],
        default={},
        help="Fields of RuleConfig to change: bounds such as drift_rise, or readouts, to leave attention out.",
    )
    add(
        "--initial-rate",
        type=PositiveFloat | None,
        default=None,
        help="First learned rate; the last weights' own if null.",
    )
    add(
        "--looked-at",
        type=dict[str, list[str]],
        default={},
        help="Tasks of each suite of `evaluate` by which bounds were chosen, besides those that the cards name.",
    )
    small_help = "Weights for small models, to be written beside OUT as OUT-small."
    add("--small", type=str | None, default=None, help=small_help)
    below_help = f"Models of fewer parameters are small; {SMALL_BELOW} if null."
    add("--small-below", type=PositiveInt | None, default=None, help=below_help)
    add("--overwrite", action="store_true", help="Write OUT even if it is there already.")
    options = parser.parse_args(list(arguments))
    for file in (options.out, *([small_beside(options.out)] if options.small else [])):
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file} is there already, and it is a file to write: give --overwrite, or another.")
    if options.small_below is not None and options.small is None:
        raise ValueError("--small-below says which models are small, and there are no weights for them: give --small.")
    rules = [load_pretrained(name) for name in options.weights]
    rule = average_weights(rules, dict(options.bounds))
    if options.small is not None:
        rule.small = SmallModels(options.small_below or SMALL_BELOW, load_pretrained(options.small))
    card = inherited(rules[-1].card)
    card.pop("evaluation", None)
    if seen := looked_at(*(one.card for one in rules), {"looked_at": options.looked_at}):
        card["looked_at"] = seen
    card["averaged"] = [{"name": one.card["name"], "sha256": one.card["sha256"]} for one in rules]
    if options.initial_rate is not None:
        card["initial_rate"] = options.initial_rate
    console = Console()
    console.print(f"Wrote {save_pretrained(rule, options.out, card)}, the average of {len(rules)}.")
    if options.small is None and rules[-1].small is not None:
        console.print(
            f"It steps models of all sizes. {options.weights[-1]} has others for small ones: --small takes them."
        )
