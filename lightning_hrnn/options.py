"""How the optimizers of a module become `HRNN`: the options of the callback and of the helpers."""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_hrnn.divergence import OnDivergence
from lightning_hrnn.optimizer.adapt import OtherWeights
from lightning_hrnn.optimizer.fallback import DEFAULT_FALLBACK_LR, HRNNWithFallback
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import check_kernel
from lightning_hrnn.optimizer.optimizer import HRNN, Rate
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, load_pretrained
from lightning_hrnn.optimizer.schedule import SHARE

SchedulerPolicy = Literal["drop", "keep", "refuse"]


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
            load_pretrained(self.weights)  # says now what is wrong with them

    @property
    def keeps_schedulers(self) -> bool:
        """Tell whether the module's schedulers go on."""
        return (self.schedulers == "keep" or (self.rate == "given" and self.schedulers == "drop")) and self.lr > 0

    @property
    def rates_are_its_own(self) -> bool:
        """Tell whether the rates are the learned ones, and no scheduler of the module moves them."""
        return self.rate == "learned" and not self.keeps_schedulers

    def weights_in_use(self, optimizers: Iterable[HRNN]) -> str:
        """Name the weights by which optimizers of these options step: for small models they may be others."""
        if isinstance(self.weights, HierarchicalRNN):
            return "a rule of your own"
        return ", ".join(sorted({optimizer.weights_name for optimizer in optimizers}))

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
