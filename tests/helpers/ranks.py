"""Checks that several processes run together, as ranks of one gloo group, forked from this one: nothing is imported anew."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Check = Callable[[Path], Any]


def run_on_ranks(checks: Sequence[Check], folder: Path, ranks: int = 2) -> dict[str, str]:
    """Let ranks run the checks one after the other; return the tracebacks of each, empty if it passed on all ranks.

    The processes look to Lightning like those of torchrun, so that `devices=ranks` launches nothing.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (ranks, port, checks, folder), nprocs=ranks, start_method="fork")
    told = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    return {check.__name__: "\n".join(filter(None, (one[check.__name__] for one in told))) for check in checks}


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
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    told = {}
    for check in checks:
        torch.manual_seed(0)
        place = folder / check.__name__
        place.mkdir(exist_ok=True)
        try:
            check(place)
            told[check.__name__] = ""
        except Exception:
            told[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
        torch.distributed.barrier()
    torch.save(told, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same_on_all_ranks(value: Tensor) -> None:
    gathered = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, value.contiguous())
    assert all(torch.equal(value, other) for other in gathered), "the ranks have drifted apart"
