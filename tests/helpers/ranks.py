"""Checks that several processes run together, as ranks of one gloo group, forked from this one."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Check = Callable[[Path], Any]
NOT_RUN = "Not run, for the ranks failed before"


def run_on_ranks(checks: Sequence[Check], folder: Path, ranks: int = 2, timeout: float = 300) -> dict[str, str]:
    """Let ranks run the checks one after the other; return the tracebacks of each, empty if it passed on all ranks.

    The first failure ends the run, for the ranks are out of step then. The processes look to Lightning like those of
    torchrun, so that `devices=ranks` launches nothing.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (ranks, port, checks, folder)
    context = torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, join=False, start_method="fork")
    until = time.monotonic() + timeout
    while not context.join(5):
        if time.monotonic() > until:
            for process in context.processes:
                process.kill()
            break
    files = [file for rank in range(ranks) if (file := folder / f"rank{rank}.pt").exists()]
    if len(files) < ranks:
        return dict.fromkeys(
            (check.__name__ for check in checks), f"{len(files)} of {ranks} ranks told how they fared."
        )
    told = [torch.load(file) for file in files]
    for file in files:
        file.unlink()
    return {
        check.__name__: "\n".join(one.get(check.__name__, f"{NOT_RUN}: {list(one)}") for one in told).strip()
        for check in checks
    }


def _rank(rank: int, ranks: int, port: int, checks: Sequence[Check], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    told: dict[str, str] = {}
    for check in checks:
        torch.manual_seed(0)
        place = folder / check.__name__
        place.mkdir(exist_ok=True)
        try:
            check(place)
            torch.distributed.barrier()
            told[check.__name__] = ""
        except Exception:
            told[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
            break
    torch.save(told, folder / f"rank{rank}.pt")
    if not any(told.values()):
        torch.distributed.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same_on_all_ranks(value: Tensor) -> None:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, value.contiguous())
    assert all(torch.equal(value, other) for other in gathered), "the ranks have drifted apart"
