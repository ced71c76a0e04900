"""`MetaLearner`: the meta-training of the update rule as a LightningModule.

One batch is one truncation window of the whole task pool, and automatic optimization does the rest, so clipping,
accumulation, schedulers, loggers, checkpoints and every strategy of Lightning work on meta-training as on any other.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_hrnn.evaluation.suites import ValidationResult
from lightning_hrnn.meta.estimators import PES, Estimator, TruncatedBackprop, Window
from lightning_hrnn.meta.evolution import Evolution
from lightning_hrnn.meta.loss import LogRatio
from lightning_hrnn.meta.memory import keep_freed_memory
from lightning_hrnn.meta.truncation import Lives, TaskPool, TaskStream
from lightning_hrnn.meta.unroll import Point
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevelEngine
from lightning_hrnn.optimizer.kernels import choose_engine
from lightning_hrnn.optimizer.pretrained import (
    first_rate,
    inherited,
    load_pretrained,
    looked_at,
    reconfigured,
    save_pretrained,
)
from lightning_hrnn.version import __version__

SKIPS = 10  # meta-steps dropped in a row that are worth a warning
RECENT = 30  # windows of the running mean: which tasks are in flight, and how old, makes single windows jump
FAMILIES_SHOWN = 8  # the progress bar names the meta-loss of each family of corpora up to this size


class MetaLearner(LightningModule):
    """Meta-train the update rule, by truncated backprop or by evolution strategies.

    Args:
        preset: configuration of a new rule, see `RuleConfig.preset`.
        rule_changes: fields of `RuleConfig` that differ from the preset's, or from those of `weights`.
        weights: start from these instead of a new rule: a shipped name or a path.
        places: task batches in flight.
        window: inner steps in a truncation window.
        scored_steps: how many of a window's steps the meta-loss scores, drawn at random, the last always.
        lives: how long tasks live.
        rates: range of first learned rates that tasks start from.
        initial_rate: first learned rate in validation, and of the exported weights; if None, that of `weights`, or
            1e-3 without.
        loss: the meta-loss.
        scored_point: where it is taken: at the parameters themselves (`"last"`), at their trailing average
            (`"average"`), which does not pay the rule for settling early but lets it rush, or at `"both"`.
        cooling: share of the task batches whose learned rates cool down over the last half of their lives.
        estimator: of the meta-gradient: `TruncatedBackprop` (the default), `PES`, or `Evolution`, whose windows are
            whole runs that are scored at their ends alone.
        learning_rate: of the meta-optimizer, Adam; with `Evolution` of the param level or with exploration, times the
            how wide the meta-parameter is spread.
        warmup_steps: meta-steps of linear warm-up; then a cosine falls to a tenth at the end of the run.
        averaging: decay of the weight average that is validated and exported.
        engine: `"auto"`, `"eager"`, or `"cpp"`: how the param level is computed.
        threads: of each process on the CPU. Inner steps are many small operations: use processes (DDP), not threads.

    Example::

        Trainer(max_steps=1000, gradient_clip_val=0.1).fit(MetaLearner(), TaskDataModule("quick"))
    """

    def __init__(
        self,
        preset: str = "default",
        rule_changes: dict[str, Any] | None = None,
        weights: str | None = None,
        places: int = 12,
        window: int = 50,
        scored_steps: int = 5,
        lives: Lives | None = None,
        rates: tuple[float, float] = (1e-5, 1e-2),
        initial_rate: float | None = None,
        loss: LogRatio | None = None,
        scored_point: Point = "last",
        cooling: float = 0.5,
        estimator: TruncatedBackprop | PES | Evolution | None = None,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        averaging: float = 0.98,
        engine: str = "auto",
        threads: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= scored_steps <= window:
            raise ValueError(f"scored_steps must be between 1 and window={window}, not {scored_steps}.")
        if not 0 <= averaging < 1:
            raise ValueError(f"averaging must be in [0, 1), not {averaging}.")
        for name, count, least in (("warmup_steps", warmup_steps, 0), ("threads", threads, 1)):
            if count < least:
                raise ValueError(f"{name} must be at least {least}, not {count}.")
        for name, rate in (("learning_rate", learning_rate), ("initial_rate", initial_rate)):
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {rate}.")
        self.rule = _starting_rule(preset, rule_changes or {}, weights)
        self.average = AveragedModel(self.rule, multi_avg_fn=get_ema_multi_avg_fn(averaging)).requires_grad_(False)
        self.started_from = weights
        self.window, self.scored_steps = window, scored_steps
        self.estimator: Estimator = estimator or TruncatedBackprop()
        self.meta_loss = loss or LogRatio()
        if scored_point not in get_args(Point):
            raise ValueError(f"scored_point must be one of {list(get_args(Point))}, not {scored_point!r}.")
        self.scored_point = scored_point
        self.pool = TaskPool(places, lives or Lives(), rates, cooling)
        self.initial_rate = first_rate(self.rule) if initial_rate is None else initial_rate
        self.threads = threads
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.engine: ParamLevelEngine | None = choose_engine(engine, self.rule)
        if isinstance(self.estimator, Evolution):
            self.estimator.check(self.rule, window)
        self.skipped_meta_steps = 0
        self._skipped_in_a_row = 0
        self._stored_pool: dict[str, Any] | None = None
        self._evaluation: dict[str, ValidationResult] = {}
        self._recent: deque[Tensor] = deque(maxlen=RECENT)

    # ------------------------------------------------------------------ a meta-step

    def setup(self, stage: str) -> None:
        """Prepare the process for unrolls: many small operations, which threads only slow down, on much memory."""
        torch.set_num_threads(self.threads)
        keep_freed_memory()

    def training_step(self, batch: TaskStream, batch_idx: int) -> STEP_OUTPUT:
        """Advance every task of the pool by one window and return the meta-loss of the window."""
        self._restore_pool(batch)
        self.pool.refill(batch, self.rule, self.global_step, self.device)
        names = [place.tasks.family.name for place in self.pool]
        window = Window(
            self.window,
            self._draw_scored(),
            self.meta_loss,
            self.engine,
            self.scored_point,
            self._window_number(batch),
            self.global_step,
        )
        estimate = self.estimator(self.rule, self.pool, window)
        self._log_window(names, estimate.scores, few_families=batch.families <= FAMILIES_SHOWN)
        return estimate.surrogate

    def _window_number(self, stream: TaskStream) -> int:
        """Number the windows of all ranks apart, so that no two draw the same perturbations."""
        return self.global_step * stream.shards + stream.shard

    def _draw_scored(self) -> set[int]:
        """Choose the steps of a window that are scored: others each time, the same on every rank."""
        rng = random.Random(self.global_step)
        return {self.window - 1, *rng.sample(range(self.window - 1), self.scored_steps - 1)}

    def _log_window(self, names: list[str], scores: list[Tensor], few_families: bool) -> None:
        by_family = defaultdict(list)
        for name, values in zip(names, scores, strict=True):
            by_family[name].append(values.mean())
        every = torch.cat(scores, -1)
        self.log("meta_loss", every.mean(), sync_dist=True)
        self._recent.append(every.mean())
        self.log("meta_loss_mean", torch.stack(list(self._recent)).mean(), prog_bar=True, sync_dist=True)
        self.log("diverged", self.meta_loss.diverged(every[-1]).float().mean(), prog_bar=True, sync_dist=True)
        self.log("skipped", float(self.skipped_meta_steps))
        for family, means in sorted(by_family.items()):
            self.log(f"meta_loss/{family}", torch.stack(means).mean(), prog_bar=few_families, rank_zero_only=True)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Drop a meta-gradient that is not finite, count it, and clip the others as the Trainer says."""
        grads = [value.grad for value in self.rule.parameters() if value.grad is not None]
        if all(bool(grad.isfinite().all()) for grad in grads):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            self._skipped_in_a_row = 0
            return
        self.skipped_meta_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == SKIPS:
            families = sorted({place.tasks.family.name for place in self.pool})
            rank_zero_warn(
                f"{SKIPS} meta-steps in a row were dropped, since their meta-gradients are not finite: nothing is "
                f"learned. In flight, in this process, are tasks of {families}. If the loss of one can be NaN, "
                "mend it; else go on from an earlier checkpoint, with a lower learning_rate."
            )
        optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the meta-step, and move the weight average before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.rule)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam with warm-up and cosine; what evolves moves as wide as it is spread."""
        moved = defaultdict(list)
        for name, value in self.rule.named_parameters():
            moved[self._spread_of(name)].append(value)
        groups = [{"params": values, "lr": self.learning_rate * spread} for spread, values in moved.items()]
        optimizer = torch.optim.Adam(groups, lr=self.learning_rate, betas=(0.9, 0.99))
        total = max(1, int(self.trainer.estimated_stepping_batches)) if self._length_is_known() else None
        warmup = self.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if total is None:
                return 1.0
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _spread_of(self, name: str) -> float:
        """Return how far a meta-parameter moves beside others."""
        estimator = self.estimator
        if isinstance(estimator, Evolution) and (estimator.param_level or estimator.explore > 0):
            return estimator.spread_of(name)
        return 1.0

    def _length_is_known(self) -> bool:
        return self.trainer.max_steps > 0 or (self.trainer.max_epochs or -1) > 0

    @property
    def averaged_rule(self) -> HierarchicalRNN:
        """The rule with averaged meta-parameters: what is validated and exported."""
        rule = self.average.module
        assert isinstance(rule, HierarchicalRNN)
        return rule

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Train one unseen network with the averaged rule over a whole run, beside tuned Adam."""
        with torch.inference_mode(False), torch.no_grad():
            result = batch.run(self.averaged_rule, self.initial_rate, self.engine, self.device)
        self._evaluation[batch.name] = result
        self.log(f"val/{batch.name}", result.regret, sync_dist=True, batch_size=1)
        self.log("val/diverged", result.diverged, sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log the score that chooses the best checkpoint, and that of the ends of runs alone."""
        for name in ("regret", "final"):
            score = torch.stack([getattr(result, name) for result in self._evaluation.values()]).mean()
            self.log(f"val/{name}", score, prog_bar=name == "regret", sync_dist=True)

    # ------------------------------------------------------------------ what is kept

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the tasks in flight."""
        checkpoint["task_pool"] = self.pool.state_dict()
        checkpoint["estimator"] = self.estimator.state_dict()
        checkpoint["skipped_meta_steps"] = self.skipped_meta_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tasks in flight, at the first window, when the stream that draws them is at hand."""
        values = checkpoint.get("state_dict", {}).values()
        if not all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor)):
            raise ValueError("The checkpoint has meta-parameters that are not finite: go on from an earlier one.")
        self._stored_pool = checkpoint.get("task_pool")
        self.estimator.load_state_dict(checkpoint.get("estimator", {}))
        self.skipped_meta_steps = checkpoint.get("skipped_meta_steps", 0)

    def _restore_pool(self, stream: TaskStream) -> None:
        if self._stored_pool is not None and self.global_rank == 0:  # other ranks' tasks are not in the checkpoint
            self.pool.load_state_dict(self._stored_pool, stream, self.device)
        self._stored_pool = None

    def export(self, path: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Write the averaged meta-parameters and their card.

        Weights that were only validated here keep what their card said of their meta-training.

        Args:
            path: of the `.safetensors` file.
            card: what the caller knows of how they came about.
        """
        if self.global_step == 0 and self.started_from:
            history = inherited(self.rule.card)
        else:
            datamodule = getattr(self._trainer, "datamodule", None)
            history = {
                "package_version": __version__,
                **(datamodule.description if datamodule is not None else {}),
                "meta_steps": self.global_step,
                "horizon": max(round(self.pool.lives.upper(self.global_step)), self.rule.card.get("horizon", 0)),
                "window": self.window,
                "started_from": self.started_from,
            }
        evaluation = [result.row(name) for name, result in sorted(self._evaluation.items())]
        full = {**history, "initial_rate": self.initial_rate, "evaluation": evaluation, **(card or {})}
        if seen := looked_at(self.rule.card, card or {}):
            full["looked_at"] = seen
        return save_pretrained(self.averaged_rule, path, full)


def _starting_rule(preset: str, changes: dict[str, Any], weights: str | None) -> HierarchicalRNN:
    if weights is not None and preset != "default":
        raise ValueError(f"Weights have a configuration already: leave out preset={preset!r}, or weights={weights!r}.")
    if weights is None:
        return HierarchicalRNN(RuleConfig.preset(preset, **changes))
    loaded = load_pretrained(weights)
    loaded.small = None  # one rule learns, on tasks of whatever size
    if not changes:
        return loaded.train()
    try:
        return reconfigured(loaded, loaded.config.changed(**changes)).train()
    except RuntimeError as error:
        raise ValueError(
            f"rule_changes {sorted(changes)} need other meta-parameters than the weights {weights!r} have: change "
            "bounds such as drift_rise alone, or meta-train a new rule without `weights`."
        ) from error
