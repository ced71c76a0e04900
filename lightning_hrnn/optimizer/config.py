"""The parts of an update rule, by name: what a rule is built from, and what its card records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_hrnn.optimizer.features import FEATURES

DIRECTIONS = ("gated", "additive")
RATES = ("bounded", "smoothed")
READOUTS = ("direction", "attention")
TENSOR_FEATURES = ("relative_update",)
PARTS = ("input_scaling", "output_scaling", "gradient_shortcut", "tensor_level", "global_level")
FIRST_INPUTS = ("size", "tensor_count", "model_count")
DRIFT_INPUTS = ("tensor", "means", "global", "peak", "length")
COUNTS = ("tensor_count", "model_count")  # the rows of `Layout.smallness`
SCALE_INPUTS = (*COUNTS, "trend")
NAMES: dict[str, tuple[str, ...]] = {
    "features": tuple(FEATURES),
    "tensor_features": TENSOR_FEATURES,
    "readouts": READOUTS,
    "without": PARTS,
    "first_inputs": FIRST_INPUTS,
    "drift_inputs": DRIFT_INPUTS,
    "scale_inputs": SCALE_INPUTS,
}  # fields that list names, and what they may name
TREND_MEMORY = 10.0  # steps that count as of late
POSITIVE = (
    "drift_rise",
    "drift_fall",
    "drift_delay",
    "drift_horizon",
    "drift_settles",
    "size_floor",
    "size_bound",
    "momentary_bound",
    "peak_memory",
)


@dataclass(frozen=True)
class RuleConfig:
    """Configure the parts of a rule; an ablation swaps or drops a part.

    Args:
        param_hidden: size of the param RNN, `H0`.
        tensor_hidden: size of the tensor RNN, `H1`.
        global_hidden: size of the global RNN, `H2`.
        timescales: number of gradient averages, `S`.
        features: inputs of the param RNN, names of `FEATURES`.
        tensor_features: inputs of the tensor RNN beside the means of the param level; `"relative_update"` or none.
        direction: how the direction is read out, `"gated"` or `"additive"`.
        rate: how the log rate moves, `"bounded"` or `"smoothed"`.
        readouts: `("direction",)`, or with `"attention"` a second direction that says where to take the next gradient.
        without: parts to do without, for ablations: `"input_scaling"` (averages are compressed as they are, not divided
            by their root mean square), `"output_scaling"` (directions are not divided by theirs), `"gradient_shortcut"`
            (a direction is the hidden state's alone), `"tensor_level"` or `"global_level"` (an RNN that says nothing).
        drift_inputs: `"bounded"` only: what the drift of a rate is read from: the state of the tensor RNN (`"tensor"`),
            also the means that this RNN sees (`"means"`), the state of the global RNN (`"global"`), how far the
            gradient is below its peak (`"peak"`), and how long the run is, where rates cool down at its end
            (`"length"`).
        drift_rise: `"bounded"` only: a tensor's rate rises at most like this power of the number of steps.
        drift_fall: `"bounded"` only: it falls at most like this power.
        drift_delay: `"bounded"` only: steps before these power laws set in.
        drift_horizon: `"bounded"` only: steps after which a rate may fall but no longer rise; the length of the longest
            runs that the rule was meta-trained on is a safe choice.
        drift_settles: `"bounded"` only: steps after which rates of a run of known length settle; where nobody knows the
            length they keep drifting.
        first_inputs: `"bounded"` only: what a tensor's first rate depends on, each by a learned power: the tensor's
            size, counted in size floors (`"size"`), how few parameters it has (`"tensor_count"`), and how few the
            model has that move in its first step (`"model_count"`); nothing begins all tensors at one rate.
        size_floor: `"bounded"` only: a tensor's size is the root mean square of its parameters, and not less than about
            this.
        size_bound: `"bounded"` only: a rate is at most this share of the tensor's size.
        step_bound: `"bounded"` only: no parameter moves in a step by more than this share of its tensor's size; 0 for
            no such bound. Rates are root mean squares over a tensor: where few of its parameters have a gradient, those
            move by many times the rate.
        momentary_bound: `"bounded"` only: a parameter's rate departs from its tensor's at most by this log factor.
        slows: `"bounded"` only: whether steps are multiplied by a learned power of the size of a tensor's gradient
            beside its largest recent one; else every step is as long as its rate. That power depends on the length of
            the run too, if `drift_inputs` names it.
        anneals: `"bounded"` only: whether steps of a run of known length are multiplied by a learned power of the share
            of it that is left. That power depends on how few parameters a tensor and the model have.
        warm_up: `"bounded"` only: share of a run of known length over which steps grow to their full length; less for
            models of less than ten thousand parameters, in proportion to the log of their number, and `drift_settles`
            steps at most: rates that settle during a warm-up are too high after it.
        scale_memory: steps over which the first of a parameter's mean squares is averaged once more; its direction is
            scaled by a learned power of the first over that long average. 0 does without: directions are scaled by
            the short averages alone that the param RNN sees, and many small steps follow the median of a skewed
            gradient rather than its mean.
        scale_inputs: what that power depends on, each by a learned number: how few parameters the tensor has
            (`"tensor_count"`), how few the model has (`"model_count"`), and how large the tensor's gradient is of late
            beside what it has long been (`"trend"`): where it falls away, all examples can be fitted, and the short
            averages get further.
        peak_memory: steps in which that largest one fades to 1/e.
        peak_fall: where it is not known how long a run is, that one fades at most like this power of the number of
            steps, so that it is not forgotten; 0 sets no such bound.
        vanished: in such runs, the share of its peak below which a tensor's gradient counts as vanished, so that its
            rate falls as fast as it may: where all examples are fitted, steps that stay as long lead away again. 0 for
            never.
        far_fall: `"bounded"` only: where nobody knows how long a run is, steps beyond `drift_horizon` are multiplied by
            this power of the share that the horizon is of the steps taken: 0.5 halves them at four times the horizon.
            0 leaves them as long as they are.

    Raises:
        ValueError: a name is unknown, a size is not positive, or a field is of another kind.
    """

    param_hidden: int = 10
    tensor_hidden: int = 20
    global_hidden: int = 20
    timescales: int = 4
    features: tuple[str, ...] = tuple(FEATURES)
    tensor_features: tuple[str, ...] = TENSOR_FEATURES
    direction: str = "gated"
    rate: str = "bounded"
    readouts: tuple[str, ...] = ("direction",)
    without: tuple[str, ...] = ()
    drift_inputs: tuple[str, ...] = ("tensor",)
    drift_rise: float = 2.0
    drift_fall: float = 0.5
    drift_delay: float = 20.0
    drift_horizon: float = 1e9
    drift_settles: float = 1e9
    first_inputs: tuple[str, ...] = ()
    size_floor: float = 0.03
    size_bound: float = 1e9
    step_bound: float = 0.0
    momentary_bound: float = 2.0
    slows: bool = False
    anneals: bool = False
    warm_up: float = 0.0
    scale_memory: float = 0.0
    scale_inputs: tuple[str, ...] = COUNTS
    peak_memory: float = 600.0
    peak_fall: float = 0.0
    vanished: float = 0.0
    far_fall: float = 0.0

    def __post_init__(self) -> None:
        for field in NAMES:
            if not isinstance(value := getattr(self, field), list | tuple):
                raise ValueError(f"{field} must be a list of names, not {value!r}.")
            object.__setattr__(self, field, tuple(value))
        for field in ("param_hidden", "tensor_hidden", "global_hidden", "timescales"):
            if not isinstance(size := getattr(self, field), int) or size < 1:
                raise ValueError(f"{field} must be an integer of at least 1, not {size!r}.")
        for field in POSITIVE:
            if not 0 < (bound := _number(given := getattr(self, field))) < math.inf:
                raise ValueError(f"{field} must be positive and finite, not {given!r}.")
            object.__setattr__(self, field, bound)  # 7 and 7.0 are one rule, with one fingerprint
        bounded = self.rate == "bounded"
        read = {"peak_fall": self.reads_peak, "vanished": self.reads_peak, "far_fall": bounded, "step_bound": bounded}
        for field, is_read in read.items():
            most = 1.0 if field == "vanished" else math.inf
            if not 0 <= (bound := _number(given := getattr(self, field))) < most:
                below = "finite" if most == math.inf else f"less than {most:g}"
                raise ValueError(f"{field} must be positive and {below}, or 0 for none, not {given!r}.")
            object.__setattr__(self, field, bound if is_read else 0.0)
        for field in ("slows", "anneals"):
            if not isinstance(flag := getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, not {flag!r}.")
        for field, known in NAMES.items():
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown:
                raise ValueError(f"Unknown {field} {unknown}: choose from {list(known)}.")
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field} names one thing twice: {list(getattr(self, field))}.")
        if not 0 <= (share := _number(self.warm_up)) < 1:
            raise ValueError(f"warm_up must be a share of a run, from 0 to less than 1, not {self.warm_up!r}.")
        object.__setattr__(self, "warm_up", share)
        if not ((memory := _number(self.scale_memory)) == 0 or 1 <= memory < math.inf):
            given = self.scale_memory
            raise ValueError(f"scale_memory must be a number of steps, 1 or more, or 0 for none, not {given!r}.")
        object.__setattr__(self, "scale_memory", memory)
        if "trend" in self.scale_inputs and 0 < memory <= TREND_MEMORY:
            raise ValueError(
                f"A trend is that of the last {TREND_MEMORY:g} steps beside scale_memory: make it more than that, "
                f"not {memory:g}, or leave 'trend' out of scale_inputs."
            )
        if not memory:
            object.__setattr__(self, "scale_inputs", COUNTS)  # which nothing reads: all rules without are one
        own = [field for field in ("slows", "anneals", "warm_up", "first_inputs") if getattr(self, field)]
        if self.rate != "bounded" and own:
            raise ValueError(f"Only 'bounded' rates slow down, anneal, warm up or begin differently: leave out {own}.")
        if self.drift_inputs[:1] != ("tensor",):
            raise ValueError("The drift of a rate needs the input 'tensor' first.")
        if self.readouts[:1] != ("direction",) or not self.features:
            raise ValueError("A rule needs the readout 'direction' first and at least one feature.")
        for field, choices in (("direction", DIRECTIONS), ("rate", RATES)):
            if getattr(self, field) not in choices:
                raise ValueError(f"Unknown {field} {getattr(self, field)!r}: choose from {list(choices)}.")

    @property
    def squares(self) -> int:
        """Count the averages of squared gradients."""
        return self.timescales + (self.scale_memory > 0)

    @property
    def knows_trend(self) -> bool:
        """Tell whether the power of the long average depends on what becomes of the tensor's gradient."""
        return self.scale_memory > 0 and "trend" in self.scale_inputs

    @property
    def reads_peak(self) -> bool:
        """Tell whether the rule depends on how far gradients are below their largest recent ones."""
        return self.rate == "bounded" and (self.slows is True or "peak" in self.drift_inputs)

    @property
    def slows_by_length(self) -> bool:
        """Tell whether the power by which steps slow down depends on the length of the run."""
        return self.slows and "length" in self.drift_inputs

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RuleConfig:
        """Return a named configuration, with changes.

        Args:
            name: `"default"`; `"paper"`, the paper's rule at the sizes of its released code (10/20/20); or
                `"summary"`, the same at 10/30/20.
            changes: fields to replace.

        Example:
            >>> RuleConfig.preset("summary").tensor_hidden
            30
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose from {sorted(PRESETS)}.")
        return PRESETS[name].changed(**changes)

    def changed(self, **changes: Any) -> RuleConfig:
        """Return this configuration with some fields replaced.

        Raises:
            ValueError: there is no such field, or a value is out of range.
        """
        known = sorted(type(self).__dataclass_fields__)
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(f"The configuration of a rule has no fields {unknown}: it has {known}.")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _number(value: object) -> float:
    """Return what a card holds as a float: NaN for what is no number, infinity for one that is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) + 0.0  # -0.0 and 0.0 are one rule, too
    except OverflowError:
        return math.inf


PRESETS = {
    "default": RuleConfig(),
    "paper": RuleConfig(tensor_features=(), direction="additive", rate="smoothed"),
    "summary": RuleConfig(tensor_hidden=30, tensor_features=(), direction="additive", rate="smoothed"),
}
