"""`WeightsExport`: write the best meta-parameters of a meta-training run, as they come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_hrnn.module import MetaLearner
from lightning_hrnn.optimizer.pretrained import set_aside


class WeightsExport(Callback):
    """Export the averaged weights after each validation of a fit that is the best so far.

    The last checkpoint of a meta-training is seldom its best: more training on a corpus can transfer worse. Weights of
    an earlier run at the same path are kept: the first export that does not go on from that run renames them.

    Args:
        path: of the `.safetensors` file; its card lies beside it.
        monitor: metric to minimise.
        notes: entries to add to the card.
        keep_all: also write every validated checkpoint beside it, as `step_N.safetensors`: for averaging.

    Example::

        Trainer(callbacks=[WeightsExport("mine.safetensors")])
    """

    def __init__(
        self,
        path: str = "weights.safetensors",
        monitor: str = "val/regret",
        notes: dict[str, Any] | None = None,
        keep_all: bool = False,
    ) -> None:
        self.path, self.monitor, self.notes, self.keep_all = Path(path), monitor, notes or {}, keep_all
        self.best = math.inf

    @property
    def state_key(self) -> str:
        """Tell exports by different metrics apart, so that a trainer may have several."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules and other suffixes before the work starts.

        Raises:
            TypeError: the module is not a `MetaLearner`.
            ValueError: the path does not end in `.safetensors`.
        """
        if not isinstance(pl_module, MetaLearner):
            raise TypeError(f"WeightsExport exports a MetaLearner, not {type(pl_module).__name__}.")
        if self.path.suffix != ".safetensors":
            raise ValueError(f"Weights are exported as .safetensors, not to {self.path}.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export if the metric improved, or always; the sanity check tells already whether there is such a metric.

        Raises:
            ValueError: there is no metric of that name.
        """
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(f"No metric {self.monitor!r} says which weights are best: WeightsExport knows {known}.")
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:  # type: ignore[attr-defined]
            return
        if self.keep_all and trainer.is_global_zero and isinstance(pl_module, MetaLearner):
            beside = self.path.with_name(f"step_{trainer.global_step}.safetensors")
            pl_module.export(beside, {**self.notes, self.monitor: round(float(value), 4)})
        if not float(value) < self.best:
            return
        first, self.best = self.best == math.inf, float(value)
        if trainer.is_global_zero and isinstance(pl_module, MetaLearner):
            if first and (kept := set_aside(self.path)):
                rank_zero_info(f"{self.path} was there already, of another run: kept as {kept}")
            pl_module.export(self.path, {**self.notes, self.monitor: round(self.best, 4)})
            rank_zero_info(f"{self.monitor} {self.best:.4f} is the best so far: wrote {self.path}")

    def state_dict(self) -> dict[str, float]:
        """Return the best value."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on comparing with the best value before a stop."""
        self.best = state_dict["best"]
