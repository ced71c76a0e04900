"""The argument parser of our commands."""

from __future__ import annotations

import argparse
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

PROGRAM = "lightning-hrnn"


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults and types, and keep the line breaks of descriptions and examples."""


def parser_options(examples: str = "") -> dict[str, Any]:
    """Return how all our parsers behave: full option names, errors raised, examples below the help.

    Args:
        examples: Command lines, one per line, indented by two spaces.
    """
    return {
        "formatter_class": HelpFormatter,
        "exit_on_error": False,
        "allow_abbrev": False,
        "epilog": f"examples:\n{examples}" if examples else None,
    }


class CommandParser(ArgumentParser):
    """A parser that raises `argparse.ArgumentError` on wrong arguments.

    Args:
        examples: Command lines to show below the help, one per line, indented by two spaces.
        options: Passed on to jsonargparse's parser.
    """

    def __init__(self, *args: Any, examples: str = "", **options: Any) -> None:
        super().__init__(*args, **{**parser_options(examples), **options})
