"""What `configure_optimizers` returns, with every optimizer turned into `HRNN`.

The user's method is called as ever and its answer converted, not replaced: the same shape (Lightning knows seven), the
same number and order of optimizers, the same param groups with all their keys. Learning rates alone change meaning,
see `HRNNOptions.lr`. The method is wrapped on the instance by a `functools.partial` of a function of this module, which
Lightning looks through, and which survives pickling (ddp_spawn) and deepcopy (weight averaging).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from lightning_hrnn.divergence import OnDivergence
from lightning_hrnn.optimizer.adapt import OtherWeights
from lightning_hrnn.optimizer.fallback import DEFAULT_FALLBACK_LR, HRNNWithFallback
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import check_kernel
from lightning_hrnn.optimizer.optimizer import HRNN, Rate
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, read_card
from lightning_hrnn.optimizer.schedule import SHARE
from lightning_hrnn.schedulers import LR_KEYS, base_rates, hold, keep

SchedulerPolicy = Literal["drop", "keep", "refuse"]

# Optimizers that cannot be stood in for, and why.
REFUSED: dict[type[Optimizer], str] = {
    LBFGS: "it evaluates the closure many times in one step, which only code written for it allows for",
    SparseAdam: "it takes sparse gradients, which HRNN cannot; build the embeddings with `sparse=False`",
}


@dataclass(frozen=True)
class HRNNOptions:
    """How the optimizers of a module become `HRNN`.

    Args:
        weights: name of shipped weights, path of a weights file, or a loaded rule.
        lr: multiplier of the learned rates for the param group with the largest learning rate of its optimizer; the
            others keep their ratio to it, so that a backbone at a tenth of the head's rate stays at a tenth.
        weight_decay: decoupled weight decay, in units of the learned rate; None leaves to each param group its own. A
            group that switches it off where others have it, as is usual for biases, keeps it off.
        schedulers: `"drop"` holds the learning rate still, `"keep"` lets the module's schedulers scale the learned
            rates (a schedule at half of its base rate halves them), `"refuse"` makes a scheduler an error.
        kernel: what computes the step; see `HRNN`.
        initial_rate: first learned rate; see `HRNN`.
        cooldown: share of the run, its last part, over which the learned rates go down to zero, from 0 to 1; see
            `HRNNOptimizerCallback`.
        rate: `"given"` takes the module's learning rates and schedulers for what they say; see
            `HRNNOptimizerCallback`.
        other_weights: what becomes of a saved state made with other weights; see `HRNN`.
        on_divergence: `"adamw"` builds optimizers that can fall back to AdamW, at the learning rate of the one they
            stand in for if that is of Adam's family; see `HRNNOptimizerCallback`.

    Raises:
        ValueError: a number out of range, an unknown policy, or unknown weights.
    """

    weights: str | Path | HierarchicalRNN = DEFAULT_WEIGHTS
    lr: float = 1.0
    weight_decay: float | None = None
    schedulers: SchedulerPolicy = "drop"
    kernel: str = "auto"
    initial_rate: float | None = None
    cooldown: float = SHARE
    rate: Rate = "learned"
    other_weights: OtherWeights = "refuse"
    on_divergence: OnDivergence = "stop"

    def __post_init__(self) -> None:
        for name, optional in (("lr", False), ("cooldown", False), ("weight_decay", True), ("initial_rate", True)):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (optional and value is None):
                raise TypeError(f"{name} must be a number{' or None' if optional else ''}, not {value!r}")
        if not isinstance(self.weights, (str, Path, HierarchicalRNN)):
            raise TypeError(
                "weights must be a name, the path of a .safetensors file, or a rule that `load_pretrained` returned, "
                f"not {self.weights!r}"
            )
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr is a multiplier of the learned rates and must be >= 0 and finite, not {self.lr}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be None or >= 0 and finite, not {self.weight_decay}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share of the run and must be from 0 to 1, not {self.cooldown}")
        for name, choices in (
            ("schedulers", SchedulerPolicy),
            ("rate", Rate),
            ("other_weights", OtherWeights),
            ("on_divergence", OnDivergence),
        ):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, not {value!r}")
        if self.initial_rate is not None and not 0 < self.initial_rate < float("inf"):
            raise ValueError(f"initial_rate must be None or positive and finite, not {self.initial_rate}")
        check_kernel(self.kernel)
        if self.rate == "given" and self.initial_rate is not None:
            raise ValueError("with rate='given' there is no learned rate to begin: drop initial_rate")
        if not isinstance(self.weights, HierarchicalRNN):
            read_card(self.weights)

    @property
    def keeps_schedulers(self) -> bool:
        """Tell whether the module's schedulers go on."""
        return (self.schedulers == "keep" or (self.rate == "given" and self.schedulers == "drop")) and self.lr > 0

    @property
    def rates_are_its_own(self) -> bool:
        """Tell whether the rates are the learned ones, and no scheduler of the module moves them."""
        return self.rate == "learned" and not self.keeps_schedulers

    @property
    def weights_name(self) -> str:
        """Name the weights."""
        return "a rule of your own" if isinstance(self.weights, HierarchicalRNN) else str(self.weights)

    def build(self, params: Any, weight_decay: float = 0.0, fallback_lr: float = DEFAULT_FALLBACK_LR) -> HRNN:
        """Return the optimizer of these options over parameters or param groups."""
        options: dict[str, Any] = {
            "weights": self.weights,
            "lr": self.lr,
            "weight_decay": weight_decay,
            "kernel": self.kernel,
            "initial_rate": self.initial_rate,
            "rate": self.rate,
            "other_weights": self.other_weights,
        }
        if self.on_divergence == "adamw":
            return HRNNWithFallback(params, fallback_lr=fallback_lr, **options)
        return HRNN(params, **options)


def hrnn_optimizers(
    module: LightningModule,
    weights: str | Path | HierarchicalRNN = DEFAULT_WEIGHTS,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    kernel: str = "auto",
    initial_rate: float | None = None,
) -> HRNN:
    """Return `HRNN` over the trainable parameters of a module, for its own `configure_optimizers`.

    Args:
        module: the LightningModule.
        weights: name of shipped weights, path of a weights file, or a loaded rule.
        lr: multiplier of the learned rates.
        weight_decay: decoupled weight decay, in units of the learned rate.
        kernel: what computes the step; see `HRNN`.
        initial_rate: first learned rate; see `HRNN`.

    Raises:
        ValueError: nothing in the module is trainable.

    Example::

        class Classifier(LightningModule):
            def configure_optimizers(self):
                return hrnn_optimizers(self)
    """
    return _over_all(module, HRNNOptions(weights, lr, weight_decay, kernel=kernel, initial_rate=initial_rate))


def _over_all(module: LightningModule, options: HRNNOptions) -> HRNN:
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter. Unfreeze some, or build layers made in "
            "`configure_model` before the optimizer."
        )
    if options.rate == "given" and options.lr >= 1:
        raise ValueError(
            f"{type(module).__name__} configures no optimizer whose learning rate could be taken with rate='given': "
            "say it by lr, such as lr=1e-3."
        )
    return options.build(params, options.weight_decay or 0.0)


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
        text = f"{_names(self.new)} -> HRNN (weights: {options.weights_name}, lr: {rates})."
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


def wrap_for_fit(module: LightningModule, options: HRNNOptions) -> None:
    """Put a conversion in the place of `module.configure_optimizers`; a second call replaces the first."""
    unwrap_after_fit(module)
    module.configure_optimizers = partial(  # type: ignore[method-assign]
        _convert_for_fit, module, vars(module).get("configure_optimizers"), options
    )


def unwrap_after_fit(module: LightningModule) -> None:
    """Give the module back the `configure_optimizers` it had before `wrap_for_fit`, if it was wrapped."""
    if (own := _wrapped_by(_convert_for_fit, vars(module).get("configure_optimizers"))) is not None:
        del module.configure_optimizers
        if own[0] is not None:
            module.configure_optimizers = own[0]  # type: ignore[method-assign]


def wrap_for_good(module: LightningModule, options: HRNNOptions) -> None:
    """Make `module.configure_optimizers` return `HRNN`, whoever calls it; a second call replaces the first."""
    current = vars(module).get("configure_optimizers")
    (own,) = _wrapped_by(_convert_always, current) or (current,)
    module.configure_optimizers = partial(  # type: ignore[method-assign]
        _convert_always, module, own, options
    )


def _wrapped_by(function: Callable[..., Any], current: Any) -> tuple[Any] | None:
    """Return, in a tuple, what an instance had in place of its class's method before `function` wrapped it."""
    return (current.args[1],) if isinstance(current, partial) and current.func is function else None


def _convert_for_fit(module: LightningModule, own: Callable[[], Any] | None, options: HRNNOptions) -> Any:
    conversion = Conversion(own() if own else type(module).configure_optimizers(module), options)
    if conversion.new or _wrapped_by(_convert_always, own) is None:  # else configure_hrnn has spoken
        rank_zero_info(f"HRNNOptimizerCallback: {conversion}")
    return conversion.result


def _convert_always(module: LightningModule, own: Callable[[], Any] | None, options: HRNNOptions) -> Any:
    if own is None and type(module).configure_optimizers is LightningModule.configure_optimizers:
        rank_zero_info(f"configure_hrnn: HRNN (weights: {options.weights_name}) for all trainable parameters.")
        return _over_all(module, options)
    conversion = Conversion(own() if own else type(module).configure_optimizers(module), options)
    rank_zero_info(f"configure_hrnn: {conversion}")
    return conversion.result
