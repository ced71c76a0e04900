"""The deployment step on a GPU: two passes in Triton, each one launch for all tensors of a type.

Parameters, gradients and states stay where they are; tables on the device say where. They are built when an address is
new and kept for when it comes back, as gradients do that are freed and made anew. A step copies nothing to the host and
never waits for the device, and what it allocates depends on shapes alone: it can be captured in a CUDA graph after an
ordinary step.

The functions that run on the device are in `triton_device.py`.

Legend: `T` tensors, `B` chunks of all tensors, `R` readouts, `S` timescales, `H0` param hidden size, `F` features.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_hrnn.optimizer.features import GRAD_LIMIT, SQUARE_FLOOR, LongScale
from lightning_hrnn.optimizer.hierarchical_rnn import MAX_DECAY_LOGIT, HierarchicalRNN
from lightning_hrnn.optimizer.kernels import FromAbove, Sums, TensorWork, triton_device
from lightning_hrnn.optimizer.kernels.cpp import packed, why_unsupported
from lightning_hrnn.optimizer.kernels.eager import EagerKernel
from lightning_hrnn.optimizer.kernels.triton_tables import (
    Tables,
    Types,
    build_tables,
    describable,
    types_of,
    upload,
    whereabouts,
)

__all__ = ["TritonKernel", "kernel", "why_unavailable", "why_unsupported"]

OLDEST = (3, 3)  # the first version that has tuples
CHUNK = 1024  # parameters of a program
TILE = 128  # parameters that a program takes at once: four to a thread of its one warp
TABLES = 256  # kept at most
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Made = TypeVar("Made")


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernel, on the CPU."""
    return triton_device.triton is not None and not isinstance(triton_device.measure, triton_device.triton.JITFunction)


def why_unavailable() -> str | None:
    """Return why Triton cannot run here, or `None`; nothing is compiled to find out."""
    return _why_missing() or kernel().failure


@cache
def _why_missing() -> str | None:
    if triton_device.triton is None:
        return "There is no Triton: it comes with torch's builds for CUDA on Linux."
    version = triton_device.triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"It needs Triton {'.'.join(map(str, OLDEST))}, not {version}: install a newer torch."
    if not interpreted() and not torch.cuda.is_available():
        return "There is no CUDA device."
    return None


@cache
def kernel() -> TritonKernel:
    """Return the process's kernel, which keeps its tables between steps."""
    return TritonKernel()


class Pending(NamedTuple):
    """Hold what `measure` leaves for `apply`."""

    tables: Tables
    steps: Tensor  # [R, n] of each tensor, end to end: directions times factors, not yet normalised
    log_rate: Tensor  # [T]
    work: list[TensorWork]  # with copies in the place of what lies in memory as the tables cannot say
    proceed: Tensor  # [] 1, or 0 for a step that changes nothing


class TritonKernel:
    """Run the fused step on a GPU; where Triton cannot, say so once and run the eager one.

    State in bfloat16 is rounded stochastically: a moving average that changes by less than half of its last bit in a
    step would stand still otherwise. The randomness is a hash of what the levels above say, the gradient and the place
    of the parameter, so it is the same on every rank and after a resume.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: list[Any] = []  # CUDA graphs read these for as long as they live
        self._packed: WeakKeyDictionary[HierarchicalRNN, tuple[Hashable, Tensor]] = WeakKeyDictionary()
        self._reasons: dict[Hashable, str | None] = {}
        self._warned = False
        self.failure: str | None = None  # what went wrong when it was tried out

    def measure(self, rule: HierarchicalRNN, work: Sequence[TensorWork], above: FromAbove) -> tuple[Sums, Any]:
        """Update the states in place; return sums over tensors and what `apply` needs."""
        reason = self._why_not(rule, work)
        if reason is None:
            return self._measure(rule, work, above)
        if not self._warned:
            warnings.warn(f"The Triton kernel does not run, the eager one does: {reason}", UserWarning, stacklevel=2)
            self._warned = True
        return EagerKernel().measure(rule, work, above)

    def apply(self, work: Sequence[TensorWork], pending: Any, inverse_rms: Tensor, limits: Tensor) -> None:
        """Move the parameters and lookaheads."""
        if not isinstance(pending, Pending):
            EagerKernel().apply(work, pending, inverse_rms, limits)
            return
        self._apply(pending, inverse_rms, limits)
        for tensor, done in zip(work, pending.work, strict=True):
            if done.param is not tensor.param:
                tensor.param.copy_(done.param)
        increment_version([tensor.param for tensor in work])
        increment_version([tensor.lookahead for tensor in work if tensor.lookahead is not None])

    # ------------------------------------------------------------------ can it run

    def _why_not(self, rule: HierarchicalRNN, work: Sequence[TensorWork]) -> str | None:
        """Return why these tensors cannot be stepped here, or `None`. The first time, try on tensors of one element."""
        device, types = work[0].param.device, {types_of(tensor) for tensor in work}
        key = (device, rule.config, frozenset(types))
        if key not in self._reasons:
            reason = _why_missing() or self.failure or why_unsupported(rule)
            if reason is None and device.type != "cuda" and not interpreted():
                reason = f"The parameters are on {device}, not on a CUDA device."
            unknown = [dtype for kinds in types for dtype in kinds if dtype not in DTYPES]
            if reason is None and unknown:
                reason = f"It knows no tensors of type {unknown[0]}."
            self._reasons[key] = reason or self._why_failing(rule, device, sorted(types, key=str))
        return self._reasons[key]

    def _why_failing(self, rule: HierarchicalRNN, device: torch.device, types: Sequence[Types]) -> str | None:
        """Compile and launch everything once, away from the user's tensors."""
        config = rule.config
        work = [
            TensorWork(
                param=torch.zeros(1, dtype=param, device=device),
                grad=torch.zeros(1, dtype=grad, device=device),
                hidden=torch.zeros(config.param_hidden, 1, dtype=state, device=device),
                average=torch.zeros(config.timescales, 1, dtype=state, device=device),
                square=torch.zeros(config.squares, 1, dtype=state, device=device),
                log_rate=torch.zeros((), dtype=torch.float32, device=device),
                lookahead=torch.zeros(1, dtype=param, device=device) if len(config.readouts) > 1 else None,
                lr=0.0,
                weight_decay=0.0,
            )
            for param, grad, state in types
        ]
        zeros = torch.zeros(3 * config.param_hidden, len(work), dtype=torch.float32, device=device)
        try:
            long_scale = LongScale(zeros[0], zeros[0]) if config.scale_memory else None
            sums, pending = self._measure(rule, work, FromAbove(zeros, zeros[0], zeros[0], zeros[0], long_scale))
            self._apply(pending, torch.ones_like(sums.squares), torch.ones_like(sums.squares))
        except Exception as error:  # a compiler or a driver that is not as Triton expects
            self.failure = f"It failed with {type(error).__name__}: {error}"
        return self.failure

    # ------------------------------------------------------------------ the launches

    def _measure(self, rule: HierarchicalRNN, work: Sequence[TensorWork], above: FromAbove) -> tuple[Sums, Pending]:
        config = rule.config
        h0, scales, readouts = config.param_hidden, config.timescales, len(config.readouts)
        rows = h0 + 3 * scales + readouts + 1
        width = 1 << (rows - 1).bit_length()
        work = [describable(tensor) for tensor in work]
        tables, meta = self._tables(work, readouts), self._meta(rule)
        gate_bias = 3 * h0 * (3 * scales + h0) + h0 * (3 + readouts * scales)  # where it begins: see `packed`
        bias = above.bias + meta[gate_bias : gate_bias + 3 * h0, None]
        log_rate, mean_log_rate, remembers = (value.contiguous() for value in above[1:4])
        long_scale = above.long_scale or LongScale(remembers, remembers)  # which nobody looks at
        long_decay, long_power = (value.contiguous() for value in long_scale)
        proceed = log_rate.new_ones((), dtype=torch.int32) if above.proceed is None else above.proceed.to(torch.int32)
        steps = meta.new_empty(tables.steps)
        partial = meta.new_empty(len(tables.chunks), width)
        sums = meta.new_empty(rows, len(work))
        with torch.cuda.device_of(meta):
            for types, first, chunks in tables.launches:
                triton_device.measure[(chunks,)](
                    tables.tensors, tables.chunks, partial, steps, meta, bias, log_rate, mean_log_rate, remembers,
                    long_decay, long_power, proceed, len(work), first, GRAD_LIMIT, SQUARE_FLOOR, MAX_DECAY_LOGIT,
                    config.momentary_bound, h0, scales, readouts, config.squares - scales, width,
                    *map(_language, types), CHUNK, TILE, num_warps=1, enable_fp_fusion=True,
                )  # fmt: skip
            triton_device.reduce[(len(work),)](
                tables.tensors, partial, sums, len(work), rows, width, 256, num_warps=8, enable_fp_fusion=True
            )
        pooled, squares, param_square = sums.split([rows - readouts - 1, readouts, 1])
        return Sums(pooled, squares, param_square[0]), Pending(tables, steps, log_rate, work, proceed)

    def _apply(self, pending: Pending, inverse_rms: Tensor, limits: Tensor) -> None:
        tables, steps, log_rate, work, proceed = pending
        scales = self._scales(work, inverse_rms.device)
        with torch.cuda.device_of(steps):
            for types, first, chunks in tables.launches:
                triton_device.apply[(chunks,)](
                    tables.tensors, tables.chunks, steps, inverse_rms.contiguous(), limits.contiguous(), log_rate,
                    scales, proceed, len(work), first, len(inverse_rms), _language(types[0]), CHUNK, CHUNK,
                    num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip

    # ------------------------------------------------------------------ what is kept on the device

    def _tables(self, work: Sequence[TensorWork], readouts: int) -> Tables:
        key = (readouts, *(whereabouts(tensor) for tensor in work))
        return self._keep(key, work[0].param.device, lambda: build_tables(work, readouts, CHUNK))

    def _scales(self, work: Sequence[TensorWork], device: torch.device) -> Tensor:
        """Return multiplier of the rate and weight decay of each tensor. [2, T]"""
        values = (tuple(tensor.lr for tensor in work), tuple(tensor.weight_decay for tensor in work))

        def make() -> tuple[Tensor, Tensor]:
            return upload(torch.tensor(values), device)

        return self._keep((values, device), device, make)[0]

    def _keep(self, key: Hashable, device: torch.device, make: Callable[[], Made]) -> Made:
        """Return what was made for the key, or make it.

        What a CUDA graph has recorded the use of stays for good; what was made while it recorded, which has not been
        copied to the device yet, is for the graph alone.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        made: Made = self._kept[key] if key in self._kept else make()
        if capturing:
            self._captured.append(made)
            return made
        self._kept[key] = made
        self._kept.move_to_end(key)
        if len(self._kept) > TABLES:
            self._kept.popitem(last=False)
        return made

    def _meta(self, rule: HierarchicalRNN) -> Tensor:
        """Return the rule's meta-parameters as `packed` lays them out, again if one has changed."""
        version = tuple((param.data_ptr(), param._version) for param in rule.parameters())
        before = self._packed.get(rule)
        if before is None or before[0] != version:
            before = (version, packed(rule).detach().float())
            self._packed[rule] = before
        return before[1]


def _language(dtype: torch.dtype) -> Any:
    """Return Triton's name of a type."""
    return getattr(triton_device.tl, str(dtype).removeprefix("torch."))
