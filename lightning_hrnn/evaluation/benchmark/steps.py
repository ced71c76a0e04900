"""Time and weigh optimizer steps, alone and as a share of a training iteration.

Legend: `B` images of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_hrnn.evaluation.benchmark.clock import Tick, Timings, interleave
from lightning_hrnn.evaluation.benchmark.memory import peak_temporary_bytes, state_bytes
from lightning_hrnn.evaluation.benchmark.models import CLASSES, Model
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import available_kernels
from lightning_hrnn.optimizer.optimizer import HRNN

KERNELS = {"cpu": ("eager", "cpp"), "cuda": ("eager", "triton")}
"""Which kernels are made for a device, the fastest last."""

Row = dict[str, Any]


class Variant(NamedTuple):
    """Name one way of taking a step."""

    optimizer: str
    kernel: str
    build: Callable[[Sequence[Tensor]], Optimizer]

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        return f"{self.optimizer} {self.kernel}"


BASELINES = (
    Variant("sgd", "foreach", partial(SGD, lr=1e-3, momentum=0.9, foreach=True)),
    Variant("adam", "foreach", partial(Adam, foreach=True)),
    Variant("adam", "fused", partial(Adam, fused=True)),
    Variant("adamw", "fused", partial(AdamW, fused=True)),
)
BASE = "adam fused"


class Iteration(NamedTuple):
    """Describe forward and backward of a batch of images."""

    batch_size: int
    image_size: int

    @property
    def name(self) -> str:
        """What timings call it."""
        return f"forward and backward of {self.batch_size}"


class StepRows(NamedTuple):
    """Hold what was measured on one model."""

    steps: list[Row]  # one for each variant
    shares: list[Row]  # one for each variant and batch size
    spread: float  # the largest of any ratio to fused Adam, see `Timings.spread`


def variants(rule: HierarchicalRNN, device: torch.device) -> list[Variant]:
    """Return the baselines, then ours: every kernel that runs the rule on the device, the fastest also in bfloat16.

    Args:
        rule: the update rule.
        device: where the parameters are. A kernel that must be compiled is compiled now.
    """
    ours = [
        Variant("hrnn", kernel, partial(HRNN, weights=rule, kernel=kernel))
        for kernel in KERNELS[device.type]
        if _runs(kernel, rule, device)
    ]
    fastest = ours[-1].kernel
    small = Variant("hrnn-bf16", fastest, partial(HRNN, weights=rule, kernel=fastest, state_dtype=torch.bfloat16))
    return [*BASELINES, *ours, small]


def _runs(kernel: str, rule: HierarchicalRNN, device: torch.device) -> bool:
    """Whether a step by a kernel is that kernel's, and not the eager one that stands in for it."""
    if kernel == "eager":
        return True
    if available_kernels().get(kernel) != "available":
        return False
    param = nn.Parameter(torch.zeros(3, device=device))
    param.grad = torch.ones_like(param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # which says that the eager one runs instead
            HRNN([param], weights=rule, kernel=kernel).step()
    except UserWarning:
        return False
    return available_kernels()[kernel] == "available"  # no longer if it could not be built


def measure_steps(
    model: Model,
    compared: Sequence[Variant],
    device: torch.device,
    iterations: Sequence[Iteration] = (),
    *,
    rounds: int,
    shortest: float,
    tick: Tick = lambda done, total: None,
) -> StepRows:
    """Time a model's steps and iterations in turns, then weigh the steps.

    All variants move the same parameters along the same gradients.

    Args:
        model: what is optimized.
        compared: the variants, `BASE` among them.
        device: where.
        iterations: timed for a real network only.
        rounds: see `interleave`.
        shortest: see `interleave`.
        tick: see `interleave`.
    """
    params = made_params(model, device)
    optimizers = {variant.name: variant.build(params) for variant in compared}
    calls: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    iterations = _fitting(iterations, model.module)
    for iteration in iterations:
        calls[iteration.name] = _training(model.module, iteration, device)
    timings = interleave(calls, device, rounds, shortest, tick)
    whole = iterations[-1].name if iterations else None
    steps = [_step_row(variant, model, timings, whole, optimizers[variant.name], device) for variant in compared]
    shares = [
        {
            **_place(variant, model, device),
            **iteration._asdict(),
            "share_of_iteration": timings.share(variant.name, iteration.name),
        }
        for iteration in iterations
        for variant in compared
    ]
    return StepRows(steps, shares, max(timings.spread(variant.name, BASE) for variant in compared))


def made_params(model: Model, device: torch.device) -> list[Tensor]:
    """Draw parameters and gradients of a model's shapes, always the same."""
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in model.shapes:
        param = nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device))
        param.grad = (1e-3 * torch.randn(shape, generator=generator)).to(device)
        params.append(param)
    return params


def _place(variant: Variant, model: Model, device: torch.device) -> Row:
    return {
        "optimizer": variant.optimizer,
        "device": device.type,
        "kernel": variant.kernel,
        "threads": torch.get_num_threads(),
        "model": model.name,
        "params": model.params,
    }


def _step_row(
    variant: Variant, model: Model, timings: Timings, whole: str | None, optimizer: Optimizer, device: torch.device
) -> Row:
    return {
        **_place(variant, model, device),
        "ns_per_param": 1e9 * timings.median(variant.name) / model.params,
        "ratio_to_adam_fused": timings.ratio(variant.name, BASE),
        "share_of_iteration": None if whole is None else timings.share(variant.name, whole),
        "state_bytes_per_param": state_bytes(optimizer) / model.params,
        "peak_temp_bytes": peak_temporary_bytes(optimizer.step, device),
    }


def _fitting(iterations: Sequence[Iteration], module: nn.Module | None) -> list[Iteration]:
    """Return the iterations that a module can do: none without a module; vision transformers take one size alone."""
    if module is None:
        return []
    size = getattr(module, "image_size", None)
    return [iteration._replace(image_size=size or iteration.image_size) for iteration in iterations]


def _training(module: nn.Module | None, iteration: Iteration, device: torch.device) -> Callable[[], None]:
    """Return forward and backward of a batch; on a GPU as one trains there, in bfloat16 and channels last."""
    on_gpu = device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    assert module is not None
    module = module.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    batch, size = iteration
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.arange(batch, device=device) % CLASSES  # [B]

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        module.zero_grad(set_to_none=True)

    return train
