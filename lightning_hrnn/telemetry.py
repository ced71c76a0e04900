"""What the learned optimizer does during a fit, for any logger: rates, timescales, sizes of updates, skipped steps.

Nothing is computed but in the steps that are logged, every `log_every_n_steps` of the Trainer; then the numbers of all
tensors are gathered on the device and copied to the host once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.measures import Measures, adam_bytes, measure, seconds_of_a_step, state_bytes
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.sharding import is_sharded, local

Detail = Literal["off", "model", "tensor"]
BY_TENSOR = ("log_lr", "update_to_param", "timescale", "hidden_norm")  # of `Measures`
OF_MODEL = ("log_lr", "log_lr_spread", "update_to_param", "timescale", "hidden_norm")
COLUMNS = ["tensor", "shape", "learned rate", "update / param", "timescale", "hidden norm"]


class Telemetry:
    """Log metrics named `hrnn/...` to the loggers of a Trainer.

    Args:
        detail: `"model"` logs one number each for the model, `"tensor"` also one for each tensor, `"off"` nothing.
        kernel: what computes the step, for the estimate of its time.
    """

    def __init__(self, detail: Detail, kernel: str = "auto") -> None:
        self.detail, self.kernel = detail, kernel
        self._names: dict[Tensor, str] = {}
        self._before: dict[HRNN, dict[Tensor, Tensor]] = {}
        self._rows: dict[str, list[list[Any]]] = {}  # of the table, by prefix

    # -- when

    def start(self, trainer: Trainer, module: LightningModule, optimizers: list[HRNN]) -> None:
        """Say what the optimizers cost."""
        self._before, self._rows = {}, {}
        self._names = {param: name for name, param in module.named_parameters()}
        if self.detail == "off":
            return
        for optimizer in optimizers if trainer.is_global_zero else []:
            rank_zero_info(cost(optimizer, self.kernel))

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Keep the parameters, if this step is to be logged."""
        if self.detail == "off" or not isinstance(optimizer, HRNN) or not _is_due(trainer):
            return
        params = [param for group in optimizer.param_groups for param in group["params"] if param.numel()]
        if trainer.is_global_zero or any(is_sharded(param) for param in params):  # else rank zero knows all
            self._before[optimizer] = {param: local(param.detach()).clone() for param in params}

    def after_batch(self, trainer: Trainer, optimizers: list[HRNN]) -> None:
        """Log the steps for which the parameters were kept."""
        for index, optimizer in enumerate(optimizers):
            if optimizer in self._before:
                prefix = "hrnn" if index == 0 else f"hrnn-{index}"
                self._log(trainer, optimizer, self._before.pop(optimizer), prefix)

    def end(self, trainer: Trainer) -> None:
        """Leave Weights & Biases the table of all tensors, as last measured."""
        for logger in trainer.loggers if self._rows and trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                for prefix, rows in self._rows.items():
                    logger.log_table(f"{prefix}/tensors", columns=COLUMNS, data=rows)

    def clear(self) -> None:
        """Forget what was kept."""
        self._before, self._rows, self._names = {}, {}, {}

    # -- what

    def _log(self, trainer: Trainer, optimizer: HRNN, before: dict[Tensor, Tensor], prefix: str) -> None:
        metrics: dict[str, Any] = {f"{prefix}/skipped_steps": float(optimizer.skipped_steps)}
        histograms: dict[str, list[float]] = {}
        if isinstance(optimizer, HRNNWithFallback) and optimizer.fallen_back:
            metrics[f"{prefix}/fallen_back"] = 1.0
        elif (measures := measure(optimizer, before)) is not None:
            model, tensors = _on_host(measures)
            names = [self._names.get(param, f"tensor {index}") for index, param in enumerate(before)]
            metrics.update({f"{prefix}/{key}": value for key, value in zip(OF_MODEL, model, strict=True)})
            if self.detail == "tensor":
                for key, values in tensors.items():
                    metrics.update({f"{prefix}/{key}/{name}": v for name, v in zip(names, values, strict=True)})
            histograms = {f"{prefix}/{key}/histogram": tensors[key] for key in ("log_lr", "update_to_param")}
            self._rows[prefix] = _table(names, list(before), tensors)
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of Lightning's own metrics
        for logger in trainer.loggers:
            extra = _wandb_histograms(histograms) if isinstance(logger, WandbLogger) else {}
            logger.log_metrics({**metrics, **extra}, step=step)


def cost(optimizer: HRNN, kernel: str = "auto") -> str:
    """Say in one line what an optimizer costs: memory of its state, and an estimate of the time of a step."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    text = (
        f"HRNN: {sum(param.numel() for param in params):,} parameters in {len(params)} tensors; state "
        f"{state_bytes(optimizer) / 1e6:,.2f} MB (Adam's would be {adam_bytes(optimizer) / 1e6:,.2f} MB)"
    )
    seconds = seconds_of_a_step(optimizer, kernel)
    return f"{text}." if seconds is None else f"{text}; a step takes about {1e3 * seconds:,.2g} ms here."


def _is_due(trainer: Trainer) -> bool:
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def _on_host(measures: Measures) -> tuple[list[float], dict[str, list[float]]]:
    """Return what concerns the model, in the order of `OF_MODEL`, and the tensors, by one copy from the device."""
    weight, log_lr = measures.weight, measures.log_lr
    model = torch.stack(
        [
            log_lr.mean(),
            log_lr.std(correction=0),
            ((weight * measures.update).sum() / (weight * measures.param).sum()).sqrt(),
            (weight * measures.timescale.log()).sum().exp(),
            (weight * measures.hidden_norm.square()).sum().sqrt(),
        ]
    )
    by_tensor = torch.stack([getattr(measures, key) for key in BY_TENSOR])
    flat = torch.cat([model, by_tensor.flatten()]).tolist()
    count, rest = len(log_lr), flat[len(OF_MODEL) :]
    return flat[: len(OF_MODEL)], {
        key: rest[index * count : (index + 1) * count] for index, key in enumerate(BY_TENSOR)
    }


def _table(names: list[str], params: list[Tensor], tensors: dict[str, list[float]]) -> list[list[Any]]:
    rates = [math.exp(value) for value in tensors["log_lr"]]
    shapes = [str(list(param.shape)) for param in params]
    columns = [rates, *(tensors[key] for key in BY_TENSOR[1:])]
    return [list(row) for row in zip(names, shapes, *columns, strict=True)]


def _wandb_histograms(values: dict[str, list[float]]) -> dict[str, Any]:
    import wandb

    return {key: wandb.Histogram(one) for key, one in values.items()}
