"""A watch over a fit that diverges: losses or gradients that are not finite, step after step.

`HRNN` leaves such steps out by itself, so that its state stays sound; the watch notices when nothing else comes any
more, and stops the fit or goes on as AdamW from the last good weights. It asks the device every few steps only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.sharding import local

OnDivergence = Literal["stop", "adamw", "ignore"]

ASKED_EVERY = 10  # steps, at most, between two looks at the device
COPIED_EVERY = 100  # steps between two copies of the weights


class DivergenceError(RuntimeError):
    """Say that a fit has stopped because its loss or gradients were not finite for many steps in a row."""


class DivergenceWatch:
    """Count the steps without a finite loss and finite gradients, and act when there are too many in a row.

    For `"adamw"` two copies of weights and buffers stay on the device: the younger is at most `COPIED_EVERY` steps
    old, the older is known to have been followed by as many steps at whose end the training was finite. A divergence
    goes back to the older one.

    Args:
        action: `"stop"` raises `DivergenceError`, `"adamw"` falls back once, `"ignore"` does nothing.
        patience: steps in a row.
    """

    def __init__(self, action: OnDivergence, patience: int) -> None:
        self.action, self.patience = action, patience
        self.clear()

    def clear(self) -> None:
        """Forget a fit."""
        for handle in getattr(self, "_handles", []):
            handle.remove()
        self._handles: list[Any] = []
        self._skips: dict[HRNN, int] = {}  # skipped steps at the last look
        self._asked: set[HRNN] = set()  # for a step since then
        self._stepped: Counter[HRNN] = Counter()  # how often, which a gradient scaler may leave out
        self._batch_asks = False
        self._steps = self._looked_at = self._streak = 0
        self._copied_at = -1  # step
        self._losses: Tensor | None = None  # streak of losses that were not finite, on the device
        self._good: dict[str | Tensor, Tensor] = {}
        self._candidate: dict[str | Tensor, Tensor] = {}
        self._scale: float | None = None

    # -- during the fit

    def start(self, trainer: Trainer, optimizers: list[HRNN]) -> None:
        """Watch the optimizers of a fit.

        Raises:
            MisconfigurationException: one cannot fall back.
        """
        self.clear()
        if self.action == "ignore":
            return
        if self.action == "adamw":
            _check(trainer, optimizers)
        for optimizer in optimizers:
            self._skips[optimizer] = optimizer.skipped_steps
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def before_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Copy the weights now and then, while all is well."""
        if self._steps % COPIED_EVERY or self._steps == self._copied_at or not self._may_fall():
            return
        self._copied_at = self._steps
        if _any_rank(trainer, self._length() > 0):
            return  # not sound; the next copy is due in a while
        self._good, self._candidate = (
            self._candidate,
            {key: local(value.detach()).clone() for key, value in self._values(module)},
        )
        scaler = _scaler(trainer)
        self._scale = scaler.get_scale() if scaler is not None else None

    def before_step(self, optimizer: Optimizer) -> None:
        """Note that a step is asked for, which a gradient scaler may leave out."""
        if isinstance(optimizer, HRNN) and optimizer in self._skips:
            self._asked.add(optimizer)
            self._batch_asks = True

    def _after_step(self, optimizer: HRNN, *_: Any) -> None:
        self._stepped[optimizer] += 1

    def after_batch(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Count, and act if it is time.

        Raises:
            DivergenceError: too many steps in a row were not finite.
        """
        if not self._batch_asks:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            before = loss.new_zeros((), dtype=torch.int64) if self._losses is None else self._losses
            self._losses = torch.where(loss.detach().isfinite().all(), 0, before + 1)
        self._batch_asks, self._steps = False, self._steps + 1
        if self._steps % min(self.patience, ASKED_EVERY) == 0 and _any_rank(trainer, self._length() >= self.patience):
            self._act(trainer, module)

    def _length(self) -> int:
        """Look at the device, and return how many steps in a row were not finite, on this rank.

        Gradients count by the whole interval since the last look: skips are counted on the device, not listed.
        """
        if self._steps > self._looked_at:
            skips = {optimizer: optimizer.skipped_steps for optimizer in self._skips}
            bad = any(self._stepped[opt] <= skips[opt] - self._skips[opt] for opt in self._asked)  # none was taken
            self._streak = self._streak + self._steps - self._looked_at if bad else 0
            self._skips, self._looked_at = skips, self._steps
            self._asked.clear()
            self._stepped.clear()
        return max(self._streak, int(self._losses) if self._losses is not None else 0)

    # -- what to do

    def _may_fall(self) -> list[HRNNWithFallback]:
        """Return the optimizers that can still fall back."""
        able = (opt for opt in self._skips if isinstance(opt, HRNNWithFallback) and not opt.fallen_back)
        return list(able) if self.action == "adamw" else []

    def _act(self, trainer: Trainer, module: LightningModule) -> None:
        what = (
            f"The loss or a gradient was not finite for {self.patience} steps in a row, up to step "
            f"{trainer.global_step}."
        )
        if not (falling := self._may_fall()):
            again = "" if self.action == "stop" else " HRNN had fallen back to AdamW already."
            raise DivergenceError(
                f"{what}{again} Steps with such gradients were left out. Look for the operation that overflows with "
                "Trainer(detect_anomaly=True); resume from a checkpoint before it with a smaller `lr` or gradient "
                "clipping; or let HRNNOptimizerCallback(on_divergence='adamw') go on as AdamW from the last good "
                "weights, on_divergence='ignore' wait longer."
            )
        self._restore(module)
        for optimizer in falling:
            optimizer.fall_back()
        if (scaler := _scaler(trainer)) is not None and self._scale is not None:
            scaler.update(self._scale)
        self._streak, self._losses, self._good, self._candidate = 0, None, {}, {}
        lrs = ", ".join(f"{optimizer.fallback_lr:g}" for optimizer in falling)
        rank_zero_warn(
            f"{what} Going on as AdamW (lr {lrs} for a multiplier of 1) from the last good weights, to the end of the "
            "run: checkpoints from here on hold AdamW's state and resume with on_divergence='adamw' only."
        )

    @torch.no_grad()
    def _restore(self, module: LightningModule) -> None:
        saved = self._good or self._candidate
        for key, value in self._values(module):
            if key in saved:
                local(value.detach()).copy_(saved[key])
        for optimizer in self._skips:
            optimizer.zero_grad()

    def _values(self, module: LightningModule) -> Iterator[tuple[str | Tensor, Tensor]]:
        """Yield what training changes: parameters by themselves, buffers by name, for modules replace them."""
        for optimizer in self._skips:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    yield param, param
        yield from module.named_buffers()


def _check(trainer: Trainer, optimizers: list[HRNN]) -> None:
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "on_divergence='adamw' cannot serve under ModelParallelStrategy: a sharded checkpoint of AdamW cannot be "
            "resumed by HRNN. Choose on_divergence='stop', which is the default."
        )
    if not all(isinstance(optimizer, HRNNWithFallback) for optimizer in optimizers):
        raise MisconfigurationException(
            "on_divergence='adamw' needs optimizers that can fall back, and configure_optimizers returns a plain HRNN. "
            "Return torch.optim.AdamW, which the callback converts, or HRNNWithFallback; or choose "
            "on_divergence='stop'."
        )


def _any_rank(trainer: Trainer, decision: bool) -> bool:
    """Decide alike on all ranks: losses are local to each."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def _scaler(trainer: Trainer) -> Any:
    """Return the gradient scaler of 16-bit mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)
