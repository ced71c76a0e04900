"""`lightning-hrnn info`: weights, cards, checksums, versions, kernels."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_hrnn.cli.parser import PROGRAM, CommandParser
from lightning_hrnn.evaluation.report import installed_version
from lightning_hrnn.version import __version__

PACKAGES = ("torch", "lightning", "safetensors", "torchvision", "torchmetrics", "timm", "triton", "wandb")
EXAMPLES = f"""\
  {PROGRAM} info
  {PROGRAM} info --weights my-run/hrnn.safetensors
  {PROGRAM} info --json | jq '.weights[0].card.corpus'"""


def run(arguments: Sequence[str]) -> None:
    """Show what is installed and whether it is sound.

    Raises:
        WeightsError: If a weights file is damaged.
    """
    parser = CommandParser(
        prog=f"{PROGRAM} info",
        description="Show the weights with their cards, after verifying their checksums; versions; kernels.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="Verify and show only these: a name or a .safetensors file."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    options = parser.parse_args(list(arguments))
    facts = collect(options.weights)
    if options.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(facts, Console())


def collect(weights: str | None = None) -> dict[str, Any]:
    """Return the facts as plain values, every checksum verified.

    Args:
        weights: Name or path of the weights to look at; None looks at all that are shipped.

    Raises:
        WeightsError: If a weights file is unknown or damaged.
    """
    from lightning_hrnn.optimizer.kernels import available_kernels
    from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, available_weights, load_pretrained

    found = []
    for name in [weights] if weights else available_weights():
        rule = load_pretrained(name)
        found.append(
            {
                "name": name,
                "default": name == DEFAULT_WEIGHTS,
                "meta_parameters": sum(parameter.numel() for parameter in rule.parameters()),
                "checksum": "verified",
                "card": rule.card,
            }
        )
    versions = {"lightning-hrnn": __version__, "python": platform.python_version()}
    versions.update({name: installed_version(name) or "not installed" for name in PACKAGES})
    return {"weights": found, "kernels": available_kernels(), "versions": versions}


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts as tables."""
    for weights in facts["weights"]:
        default = " (default)" if weights["default"] else ""
        table = _table(f"weights {weights['name']}{default}")
        table.add_row("meta-parameters", f"{weights['meta_parameters']:,}")
        table.add_row("checksum", f"{weights['checksum']}, sha256 {weights['card']['sha256'][:16]}…")
        for key, value in weights["card"].items():
            if key not in ("name", "sha256", "evaluation"):
                table.add_row(key.replace("_", " "), _text(value))
        console.print(table)
        if weights["card"].get("evaluation"):
            console.print(_evaluation(weights["card"]["evaluation"]))
    for title in ("kernels", "versions"):
        table = _table(title)
        for key, value in facts[title].items():
            table.add_row(key, value)
        console.print(table)


def _evaluation(rows: list[dict[str, Any]]) -> Table:
    """Lay out losses on unseen networks, HRNN's beside those of Adam at its best constant rate."""
    chosen = range(len(rows[0]["steps"]))[3::2]
    table = Table(title="loss on unseen networks: HRNN / tuned Adam", title_justify="left", title_style="bold")
    table.add_column("net", style="cyan", no_wrap=True)
    for index in chosen:
        table.add_column(f"step {rows[0]['steps'][index]}", justify="right")
    table.add_column("regret", justify="right")
    for row in rows:
        losses = [f"{row['hrnn'][index]:.2g} / {row['tuned_adam'][index]:.2g}" for index in chosen]
        table.add_row(row["net"], *losses, f"{row['regret']:+.2f}")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
