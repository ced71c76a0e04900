"""A learned optimizer for people who train networks with Lightning.

Example::

    from lightning import Trainer
    from lightning_hrnn import HRNNOptimizerCallback

    Trainer(callbacks=[HRNNOptimizerCallback()]).fit(model, data)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hrnn.version import __version__

if TYPE_CHECKING:
    from lightning_hrnn.callbacks import HRNNOptimizerCallback, configure_hrnn, hrnn_optimizers
    from lightning_hrnn.datamodule import TaskDataModule
    from lightning_hrnn.divergence import DivergenceError
    from lightning_hrnn.module import MetaLearner
    from lightning_hrnn.optimizer.fallback import HRNNWithFallback
    from lightning_hrnn.optimizer.optimizer import HRNN
    from lightning_hrnn.optimizer.pretrained import available_weights, load_pretrained

_HOME = {
    "DivergenceError": "divergence",
    "HRNN": "optimizer.optimizer",
    "HRNNOptimizerCallback": "callbacks",
    "HRNNWithFallback": "optimizer.fallback",
    "MetaLearner": "module",
    "TaskDataModule": "datamodule",
    "available_weights": "optimizer.pretrained",
    "configure_hrnn": "callbacks",
    "hrnn_optimizers": "callbacks",
    "load_pretrained": "optimizer.pretrained",
}

__all__ = [
    "HRNN",
    "DivergenceError",
    "HRNNOptimizerCallback",
    "HRNNWithFallback",
    "MetaLearner",
    "TaskDataModule",
    "__version__",
    "available_weights",
    "configure_hrnn",
    "hrnn_optimizers",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    """Import on first use: whoever wants the optimizer alone does not wait for Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
