"""Build the compiled kernels on first use, with torch's own extension loader, and keep them.

A library holds operators for one instruction set, those of the rule also for its sizes, and its name has a
digest of everything it is made from: sources, flags, torch. So one folder serves different machines and versions, and
what is there need not be checked again. Processes that want the same library at once take turns on a lock that the
system releases when its holder dies, however it dies.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lightning_hrnn.optimizer.config import RuleConfig

FOLDER = Path(__file__).parent  # whose headers any library may include
SOURCES = ("param_level.cpp", "step.cpp", "param_level.h", "step.h", "backward.h", "rule.h", "segments.h", "lanes.h")
OPTIMIZE = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
INSTRUCTIONS = {"AVX512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"), "AVX2": AVX2}


class Library(NamedTuple):
    """Say what a library is made from."""

    sources: tuple[Path, ...]  # headers too
    defines: tuple[str, ...] = ()


_failures: dict[Library, str] = {}


class BuildError(RuntimeError):
    """Say why the kernels could not be built or loaded."""


def why_unavailable() -> str | None:
    """Return why compiled kernels cannot be built here, or `None`; nothing is built to find out."""
    if _failures:
        return next(iter(_failures.values()))
    if sys.platform == "win32":
        return "It is built with GCC or Clang, on Linux or macOS."
    compiler = _extension_loader().get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"There is no C++ compiler {compiler!r}: install g++."
    if _ninja() is None:
        return "There is no ninja: pip install ninja."
    return None


def _ninja() -> str | None:
    """Find ninja on the PATH, or among this environment's scripts, which need not be on it."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def operators(config: RuleConfig) -> Any:
    """Return the compiled operators for a rule's sizes.

    Raises:
        BuildError: see `compiled`.
    """
    return compiled(rule_library(config))


@cache
def rule_library(config: RuleConfig) -> Library:
    """Describe the library of the operators for a rule's sizes."""
    sizes = {"HIDDEN": config.param_hidden, "TIMESCALES": config.timescales, "SQUARES": config.squares}
    return Library(
        tuple(FOLDER / source for source in SOURCES), tuple(f"HRNN_{name}={size}" for name, size in sizes.items())
    )


@cache
def compiled(library: Library) -> Any:
    """Return a library's operators, building them the first time (about half a minute).

    Raises:
        BuildError: there is no compiler, or it failed; the second call fails at once.
    """
    reason = _failures.get(library) or why_unavailable()
    if reason:
        raise BuildError(reason)
    try:
        return _load(library)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        said = [
            line for line in str(error).splitlines() if "error:" in line
        ] or f"{type(error).__name__}: {error}".splitlines()
        mend = " Name a folder for it in TORCH_EXTENSIONS_DIR." if isinstance(error, OSError) else ""
        _failures[library] = f"Building it failed: {said[0].strip()}{mend}"
        logging.getLogger("lightning_hrnn").warning(
            "Compiled kernels cannot be had, and torch operations run instead, much slower. %s", _failures[library]
        )
        raise BuildError(_failures[library]) from error


def _load(library: Library) -> Any:
    loader = _extension_loader()
    flags = [*_flags(), *(f"-D{define}" for define in library.defines)]
    digest = hashlib.sha256(repr((flags, torch.__version__, platform.machine())).encode())
    for source in library.sources:
        digest.update(source.read_bytes())
    name = f"lightning_hrnn_{digest.hexdigest()[:16]}"
    directory = Path(loader._get_build_directory(name, verbose=False))
    built, done = directory / f"{name}.so", directory / "done"
    if _loaded(built, done):  # without the lock, for which a folder that can only be read has no place
        return getattr(torch.ops, name)
    with _alone(directory / "building"):
        if _loaded(built, done):  # by who held the lock before
            return getattr(torch.ops, name)
        done.unlink(missing_ok=True)  # damaged, or gone: build it again
        # Nobody else is building: what lies here, torch's own lock included, is from a process that died.
        for remains in (directory / "lock", built, *directory.glob("*.o")):
            remains.unlink(missing_ok=True)
        logging.getLogger("lightning_hrnn").warning("Compiling the CPU kernel, once: this takes about half a minute.")
        with _ninja_on_path():
            loader.load(
                name,
                [str(source) for source in library.sources if source.suffix == ".cpp"],
                extra_include_paths=[str(FOLDER)],
                extra_cflags=[*flags, f"-DHRNN_LIBRARY={name}"],
                build_directory=str(directory),
                is_python_module=False,
            )
        done.write_text(str(built.stat().st_size))
    return getattr(torch.ops, name)


def _loaded(library: Path, done: Path) -> bool:
    """Load a library, if it is there and whole: of the size that is noted, since one cut short may kill the process."""
    try:
        if done.read_text() not in ("", str(library.stat().st_size)):  # nothing was noted before
            return False
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def _flags() -> list[str]:
    """Ask for the instruction set that torch itself uses on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return list(OPTIMIZE)
    capability = torch.backends.cpu.get_cpu_capability()
    return [*OPTIMIZE, *next((flags for name, flags in INSTRUCTIONS.items() if capability.startswith(name)), ())]


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch's loader, which calls ninja by its name, find it."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(_ninja() or "ninja").parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@lru_cache(maxsize=1)
def _extension_loader() -> ModuleType:
    """Import torch's loader without its remark, on a machine with CUDA's compiler but no GPU, that it found no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils import cpp_extension
    finally:
        logger.setLevel(level)
    return cpp_extension


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system releases it if this process dies."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
