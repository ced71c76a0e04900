"""How long a step is: what makes the learned rates of tensors and the factors of single parameters.

`HierarchicalRNN` asks a rate for the factor of each parameter on the way down to the update, and for the next log rates
once the tensor and the global level have spoken. `BoundedRate` is the default rule's, `SmoothedRate` the paper's.

Legend: `P` scalar parameters, `T` tensors, `H0` hidden size of the param level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_hrnn.optimizer.config import COUNTS, RuleConfig
from lightning_hrnn.optimizer.features import GRAD_LIMIT, MANY, Layout
from lightning_hrnn.optimizer.rule_state import GRAD_RMS_FLOOR, RuleState, progress

SIZE_POWER = 0.75  # of a tensor's size, that a first rate starts from in meta-training
LOG_RATE_RANGE = 33.0
ANNEALING = (-0.3, 0.0, 0.2)  # that powers start from in meta-training: a constant, and for each of `COUNTS`
MAX_ANNEALING = 2.0
LENGTH_INPUTS = 2  # see `BoundedRate.length_inputs`


class BoundedRate(nn.Module):
    """Move one log rate a tensor, slowly, and let each parameter depart from it for the moment.

    The tensor's log rate drifts with what the levels above the parameters say; the momentary factor is a function of
    the param RNN's present state and leaves no trace::

        a = A tanh((w . h + b) / A)                       momentary, of each parameter
        l <- l + p / (d + n) tanh(w' . s + b')            drift, of each tensor
        l <- min(l, log(B size))                          size = sqrt(param_rms**2 + floor**2)

    with `s` what `drift_inputs` names, `n` the number of steps taken, `d` the delay, and `p` one power where the rate
    rises and another where it falls. The bounds up to step `n` add up to `p log(1 + n/d)`: a rate rises or falls at
    most like a power of time, a schedule that is safe at any age, and never outgrows its tensor. After
    `drift_horizon` steps, of which the rule may know nothing, a rate no longer rises. Where the length of a run is
    known, so that rates cool down at its end, the bound is divided by `1 + (n / drift_settles)**2`: rates settle.

    A first rate is that of a tensor of zeros in a large model; after the first step it is multiplied by learned powers
    of what `first_inputs` names: larger parameters bear larger steps, and so do small problems.

    Where the rule `slows`, a step is multiplied by `(gradient / peak) ** k`, both root mean squares over the tensor,
    with a learned `k` from 0 to 1 and the peak the largest recent gradient, which fades. Without, steps are as long as
    their rate however small the gradient has become; on smooth losses that is a walk to and fro around the minimum.
    Where `drift_inputs` names `length`, `k` depends on it as well: who will be cooled down need not slow down. Where
    nobody knows the length and a gradient has `vanished` beside its peak, the rate falls as fast as it may: what is
    left is noise, and long steps along it end where nothing is learned any more.

    Where it is known how long a run is, a step is multiplied by its pace, a function of the share of the run that is
    over. Over the first `warm_up` of it, less the fewer parameters the model has and not longer than rates take to
    settle, it rises along a line: the first gradients do not say which rates a network can bear, and ReLUs that long
    steps switch off do not come back. Where the rule `anneals` it falls like `(1 - progress) ** q`; `q`, from 0 to 2,
    is read from how few parameters tensor and model have. Where nobody knows how long it is, a step beyond the horizon
    is multiplied by `(drift_horizon / n) ** far_fall`.

    A rate is the root mean square of a tensor's step, which parameters whose gradient is rarely other than zero exceed
    by far. None moves by more than `step_bound` times its tensor's size.
    """

    def __init__(self, config: RuleConfig, inputs: int) -> None:
        super().__init__()
        self.rise, self.fall, self.delay = config.drift_rise, config.drift_fall, config.drift_delay
        self.horizon, self.settles = config.drift_horizon, config.drift_settles
        self.floor, self.size_bound, self.step_bound = config.size_floor, config.size_bound, config.step_bound
        self.first_inputs, self.slows = config.first_inputs, config.slows
        self.peak_memory, self.peak_fall, self.vanished = config.peak_memory, config.peak_fall, config.vanished
        self.anneals, self.warm_up, self.far_fall = config.anneals, config.warm_up, config.far_fall
        self.slows_by_length = config.slows_by_length
        self.bound = config.momentary_bound
        self.momentary = nn.Parameter(torch.zeros(1, config.param_hidden))
        self.momentary_bias = nn.Parameter(torch.zeros(1))
        self.drift = nn.Parameter(torch.zeros(inputs, 1))
        self.drift_bias = nn.Parameter(torch.zeros(1))
        if config.first_inputs:
            self.first = nn.Parameter(torch.tensor([[SIZE_POWER * (name == "size")] for name in config.first_inputs]))
        if config.slows:
            self.slowing = nn.Parameter(torch.zeros(1))
        if config.anneals:
            self.annealing = nn.Parameter(torch.tensor(ANNEALING)[:, None])
        if config.slows_by_length:
            self.slowing_by_length = nn.Parameter(torch.zeros(LENGTH_INPUTS, 1))

    def factor(self, hidden: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the momentary factor of each parameter, `[P]`; none has a log rate of its own."""
        raw = (self.momentary @ hidden)[0] + self.momentary_bias
        return (self.bound * torch.tanh(raw / self.bound)).exp(), None

    def drifted(
        self, state: RuleState, seen: Tensor, param_rms: Tensor, layout: Layout, below: Tensor | None = None
    ) -> Tensor:
        """Return each tensor's log rate after the step. [T]

        Args:
            state: before the step, but for the peaks.
            seen: what `drift_inputs` names. [inputs, T]
            param_rms: root mean square of each parameter tensor; taken as constant. [T]
            layout: of the models.
            below: how far gradients are below their peak, see `peak`, where the rule looks at it. [T]
        """
        log_size = 0.5 * self.squared_size(param_rms).log()
        direction = torch.tanh((self.drift * seen).sum(0) + self.drift_bias)
        if self.vanished and below is not None:
            some = state.log_peak + below > math.log(GRAD_RMS_FLOOR) + 0.5  # one of zero says nothing
            gone = some & (below < math.log(self.vanished)) & ~self.knows_length(state.run_length)
            direction = torch.where(gone, -1.0, direction)
        power = torch.where(direction > 0, self.rise * (state.age < self.horizon).to(direction.dtype), self.fall)
        power = power / (1 + (state.run_length > 0) * (state.age / self.settles).square())
        log_rate = state.log_rate + power / (self.delay + state.age) * direction
        if self.first_inputs:
            first = (self.first * self._first_inputs(log_size, layout)).sum(0)
            log_rate = log_rate + torch.where(state.age == 0, first, 0.0)
        return log_rate.minimum(log_size + math.log(self.size_bound)).clamp(-LOG_RATE_RANGE, LOG_RATE_RANGE)

    def squared_size(self, param_rms: Tensor) -> Tensor:
        """Return the square of each tensor's size, at least the floor's; meta-gradients take it as constant. [T]"""
        return param_rms.detach().square() + self.floor**2

    def step_limits(self, param_rms: Tensor) -> Tensor | None:
        """Return how far a parameter of each tensor may move in a step, if there is such a bound. [T]"""
        return self.step_bound * self.squared_size(param_rms).sqrt() if self.step_bound else None

    def _first_inputs(self, log_size: Tensor, layout: Layout) -> Tensor:
        """Return what first rates depend on, as logs from 0 upwards. [k, T]"""
        known = {"size": log_size - math.log(self.floor), **dict(zip(COUNTS, layout.smallness, strict=True))}
        return torch.stack([known[name] for name in self.first_inputs])

    def peak(self, mean_square: Tensor, state: RuleState) -> tuple[RuleState, Tensor]:
        """Compare each tensor's gradient with its largest recent one, which fades with time.

        Args:
            mean_square: of the gradient over each tensor. [T]
            state: before the step.

        Returns:
            the state with the next peak, and how far below it the gradient is, as a log not above 0. [T]
        """
        log_rms = 0.5 * (mean_square + GRAD_RMS_FLOOR**2).log().clamp(max=2 * math.log(GRAD_LIMIT))
        fade = torch.full_like(log_rms, 1 / self.peak_memory)
        if self.peak_fall:
            slower = fade.minimum(self.peak_fall / state.age.clamp(min=1.0))
            fade = torch.where(self.knows_length(state.run_length), fade, slower)
        log_peak = torch.maximum(state.log_peak - fade, log_rms)
        return state._replace(log_peak=log_peak), log_rms - log_peak

    def knows_length(self, run_length: Tensor) -> Tensor:
        """Tell of which tensors it is known how long their run is; beyond `drift_horizon` is as good as unknown. [T]"""
        return (run_length > 0) & (run_length <= self.horizon)

    def length_inputs(self, run_length: Tensor) -> Tensor:  # [T] -> [2, T]
        """Say whether the length of a run is known, and if so its order of magnitude, 0 at a thousand steps."""
        known = self.knows_length(run_length).to(run_length.dtype)
        return torch.stack([known, known * (run_length.clamp(min=1.0) / 1000).log10()])

    def slowed(self, below: Tensor, run_length: Tensor) -> Tensor:
        """Return what steps are multiplied by. [T]

        The clip of the power passes gradients straight through.

        Args:
            below: how far gradients are below their peak, see `peak`. [T]
            run_length: of the run, see `RuleState`. [T]
        """
        if not self.slows:
            return torch.ones_like(below)
        by_length = (self.slowing_by_length * self.length_inputs(run_length)).sum(0) if self.slows_by_length else 0.0
        return (_clipped(self.slowing + by_length, 1.0) * below).exp()

    def paced(self, state: RuleState, layout: Layout) -> Tensor:
        """Return what steps are multiplied by as a run goes on; 1 up to the horizon in one of unknown length. [T]

        The clip of the power passes gradients straight through.
        """
        pace = torch.ones_like(state.age)
        if self.warm_up:
            share = self.warm_up * (1 - layout.smallness[1] / math.log(MANY))
            pace = ((state.age + 1) / (share * state.run_length).clamp(1.0, max(1.0, self.settles))).clamp(max=1.0)
        if self.anneals:
            pace = pace * (1 - progress(state)) ** read_power(self.annealing, layout.smallness, MAX_ANNEALING)
        if self.far_fall:
            far = (self.horizon / state.age.clamp(min=1.0)).clamp(max=1.0) ** self.far_fall
            pace = torch.where(state.run_length > 0, pace, far)
        return pace

    def stand_still(self) -> None:
        """Leave log rates where they are put, and let no parameter depart from them."""
        self.size_bound, self.step_bound, self.warm_up, self.vanished, self.far_fall = math.inf, 0.0, 0.0, 0.0, 0.0
        for value in self.parameters():
            value.zero_()


class SmoothedRate(nn.Module):
    """Move one log rate a parameter, as the paper does (section 3.2.5)::

        l' = clip(l + w . h + b);   step by exp(l' + o);   l <- k l + (1 - k) l'

    with `k` and the offset `o` learned. The clip passes gradients straight through.
    """

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.param_hidden))
        self.bias = nn.Parameter(torch.zeros(1))
        self.smoothing = nn.Parameter(torch.tensor(3.2))
        self.offset = nn.Parameter(torch.tensor(-1.0))

    def factor(self, hidden: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the factor on the rate of each parameter and its next log rate. [P], [P]"""
        moved = log_rate + (self.weight @ hidden)[0] + self.bias
        change = moved + (moved.clamp(-LOG_RATE_RANGE, LOG_RATE_RANGE) - moved).detach() - log_rate
        return (change + self.offset).exp(), log_rate + (1 - self.smoothing.sigmoid()) * change

    def stand_still(self) -> None:
        """Leave log rates where they are put."""
        for value in (self.weight, self.bias, self.offset):
            value.zero_()


def read_power(readout: Tensor, inputs: Tensor, most: float) -> Tensor:
    """Read a power from what is known of each tensor, clipped as `_clipped` does. [T]

    Args:
        readout: a constant, then a number for each input. [1 + k, 1] or [1 + k, T]
        inputs: what is known. [k, T]
        most: the largest power.
    """
    return _clipped(readout[0] + (readout[1:] * inputs).sum(0), most)


def _clipped(power: Tensor, most: float) -> Tensor:
    """Clip a power to between 0 and `most`, gradients passing straight through."""
    return power + (power.clamp(0.0, most) - power).detach()
