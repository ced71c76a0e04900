"""Reports of measured numbers: `report.json` for programs, `report.md` for people, next to the figures."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_hrnn.version import __version__

PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "timm")


@dataclass(frozen=True)
class Column:
    """A column of a report's table.

    Args:
        key: The key of the value in each row.
        title: The heading, with the unit.
        format: A format specification, such as `.1f`; values that are None or not finite are written as a
            dash or as they are.
    """

    key: str
    title: str
    format: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        """Return a row's value as text."""
        value = row.get(self.key)
        if value is None:
            return "–"
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return format(value, self.format)


@dataclass(frozen=True)
class Report:
    """What a command measured.

    Args:
        title: One line.
        summary: A paragraph: what was measured and what came out.
        command: The command that makes this report again.
        settings: What the numbers depend on.
        columns: Which values the table shows.
        rows: One mapping per row of the table; values that no column shows, such as curves, go to the JSON
            file only.
        figures: File name -> caption of the figures that lie next to the report.
        environment: Where it was measured.
    """

    title: str
    summary: str
    command: str
    settings: Mapping[str, Any]
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=lambda: environment())

    def write(self, folder: str | Path) -> list[Path]:
        """Write `report.json` and `report.md` into a folder, which is made if need be.

        Returns:
            The files written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "report.json", folder / "report.md"]
        paths[0].write_text(json.dumps(_plain(self.content()), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        paths[1].write_text(self.markdown(), encoding="utf-8")
        return paths

    def content(self) -> dict[str, Any]:
        """Return what `report.json` holds."""
        return {
            "title": self.title,
            "summary": self.summary,
            "command": self.command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "results": [dict(row) for row in self.rows],
            "figures": dict(self.figures),
        }

    def markdown(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# {self.title}", "", self.summary, ""]
        lines.append("| " + " | ".join(column.title for column in self.columns) + " |")
        lines.append("| " + " | ".join("---:" if column.format else "---" for column in self.columns) + " |")
        lines += ["| " + " | ".join(column.cell(row) for column in self.columns) + " |" for row in self.rows]
        for name, caption in self.figures.items():
            lines += ["", f"![{caption}]({name})"]
        lines += ["", "## How to repeat it", "", "```bash", self.command, "```", ""]
        for title, facts in (("Settings", self.settings), ("Measured on", self.environment)):
            lines += [f"## {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
        return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Return what measurements depend on: versions, processor, threads."""
    import torch

    facts: dict[str, Any] = {"lightning-hrnn": __version__, "python": platform.python_version()}
    facts.update({name: found for name in PACKAGES if (found := installed_version(name))})
    facts["platform"] = platform.platform()
    facts["processor"] = _processor()
    facts["cores"] = os.cpu_count()
    facts["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """Return a value that strict JSON can hold: numbers that are not finite become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
