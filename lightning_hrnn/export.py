"""`WeightsExport`: write the best meta-parameters of a meta-training run, as they come."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_hrnn.module import MetaLearner
from lightning_hrnn.optimizer.pretrained import WeightsError, looked_at, read_card, set_aside


class WeightsExport(Callback):
    """Export the averaged weights after each validation of a fit that is the best so far.

    The last checkpoint of a meta-training is seldom its best: more training on a corpus can transfer worse. Weights of
    another run that are there already are renamed; those of the run that a fit goes on from are replaced by better ones
    only. Validation by itself, sanity checks and dry runs export nothing.

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
        self.run = uuid.uuid4().hex  # tells the files of this run, resumed or not, from those of others
        self._ready = False

    @property
    def state_key(self) -> str:
        """Tell exports by different metrics apart, so that a trainer may have several."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules and other suffixes before the work starts.

        Raises:
            TypeError: the module is not a `MetaLearner`.
            ValueError: the path does not end in `.safetensors`, or the notes name tasks in another form than cards do.
        """
        if not isinstance(pl_module, MetaLearner):
            raise TypeError(f"WeightsExport exports a MetaLearner, not {type(pl_module).__name__}.")
        if self.path.suffix != ".safetensors":
            raise ValueError(f"Weights are exported as .safetensors, not to {self.path}.")
        looked_at(self.notes)

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
        if trainer.is_global_zero and isinstance(pl_module, MetaLearner):
            self._make_room()
            card = {**self.notes, "run": self.run, self.monitor: round(float(value), 4)}
            if self.keep_all:
                pl_module.export(self.path.with_name(f"step_{trainer.global_step}.safetensors"), card)
            if float(value) < self.best:
                pl_module.export(self.path, card)
                rank_zero_info(f"{self.monitor} {float(value):.4f} is the best so far: wrote {self.path}")
        self.best = min(self.best, float(value))

    def _make_room(self) -> None:
        """Rename what another run left where this one writes; of this one's own, take the best value."""
        if self._ready:
            return
        self._ready = True
        beside = sorted(self.path.parent.glob("step_*.safetensors")) if self.keep_all else []
        for file in (self.path, *(step for step in beside if step.stem.removeprefix("step_").isdecimal())):
            card = _card_of(file)
            if card.get("run") != self.run and (kept := set_aside(file)):
                rank_zero_info(f"{file} was there already, of another run: kept as {kept}")
            elif file == self.path:
                self.best = min(self.best, float(card.get(self.monitor, math.inf)))

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and which run it is."""
        return {"best": self.best, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best value before a stop."""
        self.best, self.run = state_dict["best"], state_dict.get("run", self.run)


def _card_of(file: Path) -> dict[str, Any]:
    """Return the card of weights, empty if there is none."""
    try:
        return read_card(file)
    except WeightsError:
        return {}
