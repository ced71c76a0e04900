"""What every test gets: fixed seeds, one thread, no display, no network, no process left; no GPU test without one."""

import multiprocessing
import os
import random
import shlex
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import jsonargparse
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def double_precision():
    """Make double precision torch's default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Parsed(Exception):
    """The arguments are right; the command would now begin."""


@pytest.fixture
def parse():
    """Run a command of ours up to the point where its arguments are parsed."""
    from lightning_hrnn import cli  # takes seconds, which tests without it need not wait for

    parse_args = jsonargparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    def parse(words):
        with patch.object(jsonargparse.ArgumentParser, "parse_args", parse_and_stop), pytest.raises(Parsed):
            assert cli.main([*words, "--debug"]) == 0, f"wrong arguments: {shlex.join(words)}"

    return parse


@pytest.fixture(autouse=True)
def no_process_left():
    """End the processes that a failed or timed-out test left behind: pytest would wait for them at its own end."""
    yield
    for process in multiprocessing.active_children():
        if not process.daemon:  # workers of DataLoaders are daemons, and live as long as their loaders
            process.kill()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
