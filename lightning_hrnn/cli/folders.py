"""The folder that a command writes to, tried before the work that fills it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile


def ready_folder(path: str | Path) -> Path:
    """Make the folder that `--out` names and write to it, so that hours of work do not end in an error.

    Args:
        path: the folder; folders above it are made too.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be made or written to; the message says why and how to name another.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is a file" if folder.is_file() else (error.strerror or str(error)).lower()
        raise OSError(
            f"Nothing can be written to the folder {str(folder)!r}: {why}. Name another with `--out DIR`."
        ) from error
    return folder
