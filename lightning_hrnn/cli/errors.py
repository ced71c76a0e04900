"""Errors of users: one clear line on standard error and an exit status, no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_hrnn.cli.parser import PROGRAM

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

EXTRAS = {
    "torchvision": "vision",
    "torchmetrics": "vision",
    "timm": "vision",
    "sklearn": "vision",
    "matplotlib": "vision",
    "wandb": "wandb",
}
"""Which extra of this package brings a module."""


UNION_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type:",
)
"""How lines begin with which jsonargparse explains optional values."""


@dataclass
class Ending:
    """How a command ended: its exit status."""

    status: int = 0


@contextmanager
def reporting_errors(debug: bool = False) -> Iterator[Ending]:
    """Report in one line the errors that a user can cause and mend; let others, our bugs, through.

    Args:
        debug: Let every error through, with its traceback.
    """
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt as interrupt:
        ending.status = INTERRUPTED
        _say("; ".join(["interrupted", *map(str, filter(None, interrupt.args))]))
    except SystemExit as leaving:  # of `--help`, `--version` and `--print_config`
        ending.status = leaving.code if isinstance(leaving.code, int) else FAILURE if leaving.code else 0
    except Exception as error:
        if debug or not _is_users(error):
            raise
        ending.status = USAGE if isinstance(error, argparse.ArgumentError) else FAILURE
        _say(explain(error))


def explain(error: Exception) -> str:
    """Return an error as one line.

    Example:
        >>> explain(ModuleNotFoundError("No module named 'timm'", name="timm"))
        "No module named 'timm'. Install it with `pip install 'lightning-hrnn[vision]'`."
    """
    text = " ".join(_condense(str(error)).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        text = f"{text}. Install it with `pip install '{PROGRAM}[{EXTRAS[error.name]}]'`."
    return text


def _condense(text: str) -> str:
    """Reduce jsonargparse's account of why a value is of none of several types to what the user can act on."""
    if "Union subtypes" not in text:
        return text
    lines = (line.strip().removeprefix("- ") for line in text.splitlines())
    kept = (line for line in lines if not line.startswith(UNION_NOISE))
    return " ".join(line for line in kept if not (line.startswith("Given value:") and "(" in line))


def _is_users(error: Exception) -> bool:
    """Whether what the user gave can cause the error: arguments, files, options that do not fit together."""
    if isinstance(error, (argparse.ArgumentError, ValueError, OSError, RuntimeError, ImportError)):
        return True
    return type(error).__name__ == "MisconfigurationException"  # Lightning's; not imported for it may not be loaded


def _say(message: str) -> None:
    sys.stderr.write(f"{PROGRAM}: error: {message}\n")
