"""Weigh optimizers: what they keep, and what they need for the moment of a step."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): reset the largest resident set to the present one


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state, without parameters and gradients.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(10))], momentum=0.9)
        >>> optimizer.param_groups[0]["params"][0].grad = torch.ones(10)
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        40
    """
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def peak_temporary_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most memory that a call needs beyond what is in use before it.

    On a GPU, as torch's allocator counts it. On the CPU, as the system does, in pages: whatever allocates it counts,
    compiled kernels too. Memory that the call keeps counts as well, so call it once before.

    Returns:
        Bytes, or None where the system does not say: outside Linux, or where it may not be asked.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would be used unseen
        CLEAR_REFS.write_text(RESET_PEAK)
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, LookupError, TypeError):  # no Linux, no glibc, no permission; Windows: TypeError
        return None


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(key)
    return int(found.group(1)) * 1024
