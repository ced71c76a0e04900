"""What `configure_optimizers` returns, with every optimizer turned into `HRNN`.

The answer keeps its shape (Lightning knows seven), the number and order of its optimizers, and the param groups with
all their keys. Learning rates alone change meaning, see `HRNNOptions.lr`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from lightning_hrnn.optimizer.fallback import DEFAULT_FALLBACK_LR
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.options import HRNNOptions
from lightning_hrnn.schedulers import LR_KEYS, base_rates, hold, keep

# Optimizers that cannot be stood in for, and why.
REFUSED: dict[type[Optimizer], str] = {
    LBFGS: "it evaluates the closure many times in one step, which only code written for it allows for",
    SparseAdam: "it takes sparse gradients, which HRNN cannot; build the embeddings with `sparse=False`",
}


class Conversion:
    """One conversion of what `configure_optimizers` returned.

    Args:
        returned: any of the shapes that Lightning accepts; what it would not accept is passed on for it to name.
        options: how to convert.

    Attributes:
        result: the same shape, over `HRNN`. Optimizers that are `HRNN` already stay as they are.

    Raises:
        MisconfigurationException: an optimizer or a scheduler that cannot be converted.
    """

    def __init__(self, returned: Any, options: HRNNOptions) -> None:
        self.options = options
        self.schedulers = [found for found in _schedulers_in(returned) if hasattr(found, "optimizer")]
        self.new: dict[Optimizer, HRNN] = {}  # by old optimizer
        self.units: dict[Optimizer, float] = {}  # by old optimizer: its learning rate that makes a multiplier of one
        self.ratios: set[float] = set()  # of base learning rates to the largest of their optimizer
        self.result = self._convert(returned)

    def __str__(self) -> str:
        """Say what was replaced by what, in one line."""
        if not self.new:
            return "nothing to replace: configure_optimizers returned no optimizer that is not HRNN already."
        options = self.options
        rates = f"{options.lr:g} x the {'learned' if options.rate == 'learned' else 'given'} rates"
        text = f"{_names(self.new)} -> HRNN (weights: {options.weights_in_use(self.new.values())}, lr: {rates})."
        if lower := sorted(self.ratios - {1.0}):
            text += f" Param groups of lower learning rate keep the ratio: {', '.join(map('{:g}'.format, lower))}."
        if kept := _names(s for s in self.schedulers if s.optimizer in self.new.values()):
            text += f" {'Scaling the learned rates' if options.rate == 'learned' else 'Scheduling'}: {kept}."
        if dropped := _names(s for s in self.schedulers if s.optimizer in self.new):
            text += f" Dropped: {dropped}; schedulers='keep' would let them scale the learned rates."
        return text

    def _convert(self, returned: Any) -> Any:
        if isinstance(returned, (Optimizer, LightningOptimizer)):
            return self._optimizer(returned)
        if isinstance(returned, dict):
            converters = {"optimizer": self._convert, "lr_scheduler": self._scheduler}
            return {key: converters[key](value) if key in converters else value for key, value in returned.items()}
        if _is_two_lists(returned):
            optimizers, schedulers = returned
            several = isinstance(schedulers, (list, tuple))
            held = [self._scheduler(s) for s in schedulers] if several else self._scheduler(schedulers)
            return [self._convert(optimizers), held]
        if isinstance(returned, (list, tuple)):
            return [self._convert(item) for item in returned]
        return returned

    def _optimizer(self, old: Optimizer | LightningOptimizer) -> HRNN:
        if isinstance(old, LightningOptimizer):
            old = old.optimizer
        if isinstance(old, HRNN):
            return old
        if old not in self.new:
            self._check(old)
            bound = [s for s in self.schedulers if s.optimizer is old]
            groups, unit = self._groups(old, bound), self.units[old]
            as_adam = "betas" in old.defaults and math.isfinite(unit)  # its learning rate suits AdamW
            self.new[old] = self.options.build(groups, fallback_lr=unit if as_adam else DEFAULT_FALLBACK_LR)
        return self.new[old]

    def _groups(self, old: Optimizer, schedulers: list[LRScheduler]) -> list[dict[str, Any]]:
        """Copy the param groups of an optimizer, learning rates as multipliers."""
        bases = base_rates(old, schedulers)
        given = self.options.rate == "given"
        if given and None in bases:
            raise MisconfigurationException(
                f"rate='given' takes the learning rates of {type(old).__name__}, and one of its param groups has none. "
                "Give it an lr, or choose rate='learned'."
            )
        largest = 1.0 if given else max((base for base in bases if base is not None), default=0.0) or 1.0
        unit = self.units[old] = largest / self.options.lr if self.options.lr else float("inf")
        decays = any(group.get("weight_decay") for group in old.param_groups)
        groups = []
        for group, base in zip(old.param_groups, bases, strict=True):
            new = dict(group)
            new.update({key: float(new[key]) / unit for key in LR_KEYS if new.get(key) is not None})
            if base is None:
                new["lr"] = self.options.lr
            elif not self.options.keeps_schedulers:  # a dropped scheduler must not leave its warm-up behind
                new.update({key: base / unit for key in ("lr", "initial_lr") if key in new})
            self.ratios.add(1.0 if base is None or given else base / largest)
            if self.options.weight_decay is not None and (new.get("weight_decay") or not decays):
                new["weight_decay"] = self.options.weight_decay
            groups.append(new)
        return groups

    def _scheduler(self, config: Any) -> Any:
        """Convert a scheduler, or the dictionary with Lightning's settings around it."""
        if isinstance(config, dict):
            return {key: self._scheduler(value) if key == "scheduler" else value for key, value in config.items()}
        old = getattr(config, "optimizer", None)
        if isinstance(old, LightningOptimizer):
            old = old.optimizer
        if not isinstance(old, Optimizer) or isinstance(old, HRNN):
            return config
        name, new = type(config).__name__, self._optimizer(old)
        if self.options.schedulers == "refuse":
            raise MisconfigurationException(
                f"configure_optimizers returned a {name} and schedulers='refuse' was asked for. HRNN learns its own "
                "rates: return no scheduler, or choose schedulers='drop' or 'keep'."
            )
        if not self.options.keeps_schedulers:
            return hold(new)
        if not isinstance(config, LRScheduler):
            raise MisconfigurationException(
                f"schedulers='keep' cannot keep {name}: it is no torch.optim.lr_scheduler.LRScheduler, so what it "
                "writes cannot be told. Choose schedulers='drop', or use one of torch's schedulers."
            )
        return keep(config, new, self.units[old])

    def _check(self, old: Optimizer) -> None:
        name = type(old).__name__
        for kind, reason in REFUSED.items():
            if isinstance(old, kind):
                raise MisconfigurationException(
                    f"HRNN cannot stand in for {name}: {reason}. Return another optimizer, such as torch.optim.AdamW."
                )
        if any(group.get("maximize") for group in old.param_groups):
            raise MisconfigurationException(
                f"HRNN cannot stand in for {name}(maximize=True): it minimises. Negate the loss and drop `maximize`."
            )


def _names(things: Iterable[object]) -> str:
    counts = Counter(type(thing).__name__ for thing in things)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _is_two_lists(returned: Any) -> bool:
    """Tell `[optimizers], [schedulers]` from two optimizers, by Lightning's own rule."""
    return (
        isinstance(returned, (list, tuple))
        and len(returned) == 2
        and isinstance(returned[0], list)
        and all(isinstance(optimizer, (Optimizer, LightningOptimizer)) for optimizer in returned[0])
    )


def _schedulers_in(returned: Any) -> Iterator[Any]:
    """Yield the schedulers of any shape that Lightning accepts."""
    found: list[Any] = []
    if isinstance(returned, dict):
        found.append(returned.get("lr_scheduler"))
    elif _is_two_lists(returned):
        found.extend(returned[1] if isinstance(returned[1], (list, tuple)) else [returned[1]])
    elif isinstance(returned, (list, tuple)):
        for item in returned:
            yield from _schedulers_in(item)
    for config in found:
        scheduler = config.get("scheduler") if isinstance(config, dict) else config
        if scheduler is not None:
            yield scheduler
