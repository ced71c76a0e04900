"""From the inputs of the param RNN, up the hierarchy, to the update: the learned rule as a pure function.

Three recurrent levels share one small set of meta-parameters over every model: a *param* RNN for each scalar
parameter, a *tensor* RNN for each parameter tensor, one *global* RNN. Each level averages what the level below saw
and speaks back to it as a bias on its gates. `HierarchicalRNN.forward` is the whole rule, top to bottom; the
differentiable unroll of meta-training and `HRNN.step` both call it, and every fused kernel is checked against it.

Two rules are described by configuration. `paper` follows Wichrowska et al. 2017 (arXiv 1703.04813) closely. The
`default` differs in two parts, for the reasons in `GatedDirection` and `BoundedRate`.

Legend: `P` scalar parameters, `T` tensors, `M` models, `S` timescales, `F` features, `H0 H1 H2` hidden sizes of the
param, tensor and global level. Features come first: `[F, P]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_hrnn.optimizer.config import COUNTS, TREND_MEMORY, RuleConfig
from lightning_hrnn.optimizer.features import (
    GRAD_LIMIT,
    Inputs,
    Layout,
    LongScale,
    Moments,
    count_features,
    param_inputs,
    present_size,
    scaled_gradient,
    update_moments,
)
from lightning_hrnn.optimizer.rates import LENGTH_INPUTS, BoundedRate, SmoothedRate, read_power
from lightning_hrnn.optimizer.rule_state import GRAD_RMS_FLOOR, RuleState, tensor_log_rate

GATE_BIAS = 2.2
RMS_FLOOR = 1e-20
PARAM_RMS_FLOOR = 1e-12
LONG_SCALING = {"constant": 0.95, "tensor_count": 0.0, "model_count": -0.15, "trend": 1.0}  # that powers start from
TREND_FREE = 0.5  # added to the constant for each unit of `trend`: only a fall by more than about this lowers a power
INPUT_RANGE = 5.0  # of what a drift is read from: a mean of log magnitudes may be far out
MAX_DECAY_LOGIT = 9.2  # a decay of at most 0.9999: an average never freezes


class ParamStep(NamedTuple):
    """Hold what a param RNN makes of its gradient, each parameter by itself."""

    hidden: Tensor  # [H0, P]
    average: Tensor  # [S, P]
    square: Tensor  # [S, P] or [S + 1, P]
    inputs: Tensor  # [F, P] of the param RNN
    directions: Tensor  # [R, P] one row a readout, not yet normalised
    factor: Tensor  # [P] of this parameter on its tensor's rate
    log_rate: Tensor | None  # [P] next log rate, where a rate has one for each parameter


class ParamLevel(NamedTuple):
    """Hold what the param level makes of all gradients: the part of a step that costs, and that kernels fuse."""

    hidden: Tensor  # [H0, P]
    average: Tensor  # [S, P]
    square: Tensor  # [S, P] or [S + 1, P]
    pooled: Tensor  # [H0 + F, T] means over each tensor, for the tensor RNN
    steps: Tensor  # [R, P] directions of root mean square 1 over their tensor, times the parameter's factor
    log_rate: Tensor | None  # [P]


class RuleOutput(NamedTuple):
    """Hold the outcome of one step."""

    update: Tensor  # [P] to subtract from the parameters
    lookahead: Tensor | None  # [P] subtract from the *new* parameters to get the point of the next gradient
    rate: Tensor  # [P] or [T], the learned rate of this step: root mean square of a tensor's update, unless it slows
    state: RuleState


class GRU(nn.Module):
    """Step a gated recurrent unit whose gates take a bias from the level above.

    ::

        r, z = sigmoid(W [x, h] + c + bias)
        n = tanh(W' [x, r h] + c' + bias')
        h <- z h + (1 - z) n
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        width = inputs + hidden
        self.gate_weight = nn.Parameter(torch.randn(2 * hidden, width) * 0.5 / math.sqrt(width))
        self.gate_bias = nn.Parameter(torch.full((2 * hidden,), GATE_BIAS))
        self.candidate_weight = nn.Parameter(torch.randn(hidden, width) * 0.5 / math.sqrt(width))
        self.candidate_bias = nn.Parameter(torch.zeros(hidden))
        self.initial = nn.Parameter(torch.rand(hidden) * 2 - 1)

    def initial_state(self, count: int) -> Tensor:
        """Return the learned initial state, once for each unit. [H, N]"""
        return self.initial[:, None].repeat(1, count)

    def forward(
        self,
        x: Tensor,  # [I, N]
        hidden: Tensor,  # [H, N]
        bias: Tensor | None = None,  # [3H, N]: reset gate, update gate, candidate
    ) -> Tensor:  # [H, N]
        """Return the next hidden state."""
        size = len(hidden)
        gates = self.gate_weight @ torch.cat([x, hidden]) + self.gate_bias[:, None]
        if bias is not None:
            gates = gates + bias[: 2 * size]
        reset, keep = gates.sigmoid().split(size)
        candidate = self.candidate_weight @ torch.cat([x, reset * hidden]) + self.candidate_bias[:, None]
        if bias is not None:
            candidate = candidate + bias[2 * size :]
        return keep * hidden + (1 - keep) * candidate.tanh()


def _projection(out: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(out, inputs) * 0.5 / math.sqrt(inputs))


class GatedDirection(nn.Module):
    """Read a direction from the hidden state as weights on the scaled gradients: `sum_s (c_s + w_s . h) x_s`.

    The hidden state chooses among timescales and turns them up or down; a parameter that never had a gradient never
    moves (dead units, unused embeddings), which the additive form does not promise.
    """

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.shortcut = nn.Parameter(torch.full((config.timescales,), 1 / config.timescales))
        self.weight = _projection(config.timescales, config.param_hidden)

    def forward(self, hidden: Tensor, scaled: Tensor) -> Tensor:  # [H0, P], [S, P] -> [P]
        """Return the direction, not yet normalised."""
        return ((self.weight @ hidden + self.shortcut[:, None]) * scaled).sum(0)


class AdditiveDirection(nn.Module):
    """Read a direction as the paper does: `w . h + sum_s c_s x_s`, the second term being the gradient shortcut."""

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.shortcut = nn.Parameter(torch.full((config.timescales,), 1 / config.timescales))
        self.weight = _projection(1, config.param_hidden)

    def forward(self, hidden: Tensor, scaled: Tensor) -> Tensor:  # [H0, P], [S, P] -> [P]
        """Return the direction, not yet normalised."""
        return (self.weight @ hidden)[0] + self.shortcut @ scaled


class HierarchicalRNN(nn.Module):
    """Map a gradient and a state to an update and the next state.

    Args:
        config: the parts of the rule; the default preset if left out.

    Attributes:
        card: how these meta-parameters came about, as loaded; empty for a new rule.
        small: another rule, for models of few parameters, if the card names one; see `for_model`.

    Example:
        >>> rule = HierarchicalRNN()
        >>> layout = Layout.of([3, 2])
        >>> output = rule(torch.randn(5), torch.ones(2), rule.init(layout, log_rate=-7.0), layout)
        >>> output.update.shape
        torch.Size([5])

    Reference:
        Wichrowska et al., Learned Optimizers that Scale and Generalize, ICML 2017, section 3.
    """

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self.card: dict[str, Any] = {}
        self.small: SmallModels | None = None
        self.config = config = config or RuleConfig()
        h0, h1, h2 = config.param_hidden, config.tensor_hidden, config.global_hidden
        features = count_features(config.features, config.timescales)
        tensor_inputs = h0 + features + len(config.tensor_features)
        self.param_rnn = GRU(features, h0)
        self.tensor_rnn = GRU(tensor_inputs, h1)
        self.global_rnn = GRU(h1, h2)
        self.tensor_to_param = _projection(3 * h0, h1)
        self.global_to_param = _projection(3 * h0, h2)
        self.global_to_tensor = _projection(3 * h1, h2)
        self.decay_weight = _projection(2, h0)  # of the gradient averages, of their squares
        self.decay_bias = nn.Parameter(torch.tensor([2.2, 3.2]))
        direction = GatedDirection if config.direction == "gated" else AdditiveDirection
        self.directions = nn.ModuleDict({name: direction(config) for name in config.readouts})
        for name in config.readouts[1:]:  # attention starts equal to the update
            self.directions[name].load_state_dict(self.directions["direction"].state_dict())
            self.reach = nn.Parameter(torch.ones(1))
        if config.scale_memory:
            start = torch.tensor([LONG_SCALING[name] for name in ("constant", *config.scale_inputs)])
            start[0] += TREND_FREE * LONG_SCALING["trend"] * config.knows_trend
            self.long_scaling = nn.Parameter(start[:, None])
        widths = {"tensor": h1, "means": tensor_inputs, "global": h2, "peak": 1, "length": LENGTH_INPUTS}
        self.drift_widths = {name: widths[name] for name in config.drift_inputs}  # rows of the drift's readout
        drift_inputs = sum(self.drift_widths.values())
        self.rate = BoundedRate(config, drift_inputs) if config.rate == "bounded" else SmoothedRate(config)
        self._drop(config.without)

    def _drop(self, parts: Sequence[str]) -> None:
        """Put the meta-parameters of parts that the rule does without to zero, for good."""
        of_part: dict[str, list[Tensor]] = {
            "gradient_shortcut": [cast(Tensor, readout.shortcut) for readout in self.directions.values()],
            "tensor_level": [self.tensor_rnn.initial],
            "global_level": [self.global_rnn.initial],
        }
        for value in (value for part in parts for value in of_part.get(part, [])):
            value.detach().zero_()
            value.requires_grad_(False)

    def for_model(self, params: int) -> HierarchicalRNN:
        """Return the rule for a model of so many parameters: this one, or the one for small models if it has one."""
        return self.small.rule if self.small and params < self.small.below else self

    def without_rate(self) -> HierarchicalRNN:
        """Return a copy that leaves log rates where they are put: it supplies direction and timescales alone."""
        copy = deepcopy(self)
        with torch.no_grad():
            copy.rate.stand_still()
        return copy

    @property
    def rate_per_param(self) -> bool:
        """Tell whether every parameter has a log rate of its own, or every tensor."""
        return isinstance(self.rate, SmoothedRate)

    @property
    def evolving(self) -> list[nn.Parameter]:
        """The few meta-parameters that make the lengths of steps, each `[k, 1]` or `[1]`: what evolution always moves.

        Where tensors try different ones, the last dimension is theirs.
        """
        lengths = {name: value for name, value in self.rate.named_parameters() if not name.startswith("momentary")}
        reach = [self.reach] if "attention" in self.config.readouts else []
        return [*lengths.values(), *reach, *([self.long_scaling] if self.config.scale_memory else [])]

    @property
    def rate_by_peak(self) -> BoundedRate | None:
        """The rate, if it depends on how far gradients are below their largest recent ones."""
        return self.rate if isinstance(self.rate, BoundedRate) and self.config.reads_peak else None

    @property
    def sees_gradient_size(self) -> bool:
        """Tell whether the rule looks at the size of each tensor's gradient."""
        return self.rate_by_peak is not None or self.config.knows_trend

    @property
    def pacing_rate(self) -> BoundedRate | None:
        """The rate, if steps grow and shrink as a run goes on."""
        paces = self.config.anneals or self.config.warm_up > 0 or self.config.far_fall > 0
        return self.rate if isinstance(self.rate, BoundedRate) and paces else None

    def init(self, layout: Layout, log_rate: Tensor | float, run_length: Tensor | float = 0.0) -> RuleState:
        """Return the state before the first step.

        Args:
            layout: of the models.
            log_rate: natural log of the first learned rate; a number, or one for each tensor `[T]`.
            run_length: steps of the run, if rates cool down to zero at its end; a number, or one for each tensor `[T]`.
        """
        tensors, like = len(layout.params_in), self.param_rnn.initial
        rates, lengths = (
            torch.as_tensor(value, device=like.device, dtype=like.dtype).expand(tensors)
            for value in (log_rate, run_length)
        )
        params = len(layout.tensor_of)
        return RuleState(
            hidden=self.param_rnn.initial_state(params),
            average=like.new_zeros(self.config.timescales, params),
            square=like.new_zeros(self.config.squares, params),
            log_rate=layout.to_params(rates) if self.rate_per_param else rates.clone(),
            tensor_hidden=self.tensor_rnn.initial_state(tensors),
            global_hidden=self.global_rnn.initial_state(len(layout.tensors_in)),
            age=like.new_zeros(tensors),
            log_peak=like.new_full((tensors,), math.log(GRAD_RMS_FLOOR)),
            run_length=lengths.clone(),
            gradient_size=like.new_zeros(3, tensors),
        )

    def forward(
        self,
        grad: Tensor,  # [P]
        param_rms: Tensor,  # [T] root mean square of each parameter tensor
        state: RuleState,
        layout: Layout,
        engine: ParamLevelEngine | None = None,
    ) -> RuleOutput:
        """Take one step.

        Args:
            grad: gradients of all parameters, end to end. [P]
            param_rms: root mean square of each parameter tensor. [T]
            state: of the step before, or `init`'s.
            layout: of the models.
            engine: a fused equivalent of `HierarchicalRNN.param_level` that takes its place.
        """
        param = (engine or HierarchicalRNN.param_level)(self, grad, state, self.param_bias(state, layout), layout)
        rate = state.log_rate.exp()
        rates = rate if self.rate_per_param else layout.to_params(rate)
        below = None
        if self.sees_gradient_size:
            state, below = self.with_gradient_size(layout.mean_per_tensor(grad.detach().square()), state)
        if below is not None and (rate_by_peak := self.rate_by_peak) is not None:
            rates = rates * layout.to_params(rate_by_peak.slowed(below, state.run_length))
        if (pacing_rate := self.pacing_rate) is not None:
            rates = rates * layout.to_params(pacing_rate.paced(state, layout))
        steps = param.steps * rates  # [R, P]
        if (limits := self.step_limits(param_rms)) is not None:
            limits = layout.to_params(limits)
            steps = steps.clamp(-limits, limits)
        return RuleOutput(
            update=steps[0],
            lookahead=steps[1] * layout.to_params(self.reach.expand_as(state.age)) if len(steps) > 1 else None,
            rate=rate,
            state=self.upper_levels(param, param_rms, state, layout, below),
        )

    def step_limits(self, param_rms: Tensor) -> Tensor | None:
        """Return what `BoundedRate.step_limits` does, where the rule has such a rate. [T]"""
        return self.rate.step_limits(param_rms) if isinstance(self.rate, BoundedRate) else None

    def param_bias(self, state: RuleState, layout: Layout) -> Tensor:
        """Return what the levels above say to the gates of the param RNN. [3 H0, T]"""
        from_global = layout.to_tensors(self.global_to_param @ state.global_hidden)
        return self.tensor_to_param @ state.tensor_hidden + from_global

    def param_level(self, grad: Tensor, state: RuleState, bias: Tensor, layout: Layout) -> ParamLevel:
        """Take every parameter's step and average over tensors."""
        log_rate = state.log_rate if self.rate_per_param else layout.to_params(state.log_rate)
        long_scale = self.long_scale(state, layout)
        param = self.param_step(
            grad,
            state.hidden,
            state.average,
            state.square,
            log_rate,
            log_rate - layout.to_params(self.mean_log_rate(state, layout)),
            layout.to_params(bias),
            layout.to_params((state.age > 0).to(grad.dtype)),
            long_scale and LongScale(*map(layout.to_params, long_scale)),
        )
        mean_square = layout.mean_per_tensor(param.directions.square())  # [R, T]
        unit = param.directions
        if "output_scaling" not in self.config.without:
            unit = unit * layout.to_params((mean_square + RMS_FLOOR).rsqrt())
        pooled = layout.mean_per_tensor(torch.cat([param.hidden, param.inputs]))
        return ParamLevel(param.hidden, param.average, param.square, pooled, unit * param.factor, param.log_rate)

    def param_step(
        self,
        grad: Tensor,  # [P]
        hidden: Tensor,  # [H0, P]
        average: Tensor,  # [S, P]
        square: Tensor,  # [S, P]
        log_rate: Tensor,  # [P]
        relative_rate: Tensor,  # [P]
        bias: Tensor,  # [3 H0, P]
        remembers: Tensor,  # [P] 0 at a tensor's first step, else 1
        long_scale: LongScale | None = None,  # where the rule has a `scale_memory`
    ) -> ParamStep:
        """Take the step of parameters that know of each other only by their arguments.

        The arguments after `square` may also be `[..., 1]`, where all parameters are of one tensor.
        """
        decay_logits = self.decay_weight @ hidden + self.decay_bias[:, None]
        input_decay, scale_decay = decay_logits.clamp(max=MAX_DECAY_LOGIT).sigmoid()
        long_decay = None if long_scale is None else long_scale.decay
        moments = update_moments(grad, Moments(average, square), input_decay, scale_decay, remembers, long_decay)
        scaled = scaled_gradient(moments, divide="input_scaling" not in self.config.without)
        inputs = Inputs(scaled, moments.square[: self.config.timescales], relative_rate.expand_as(grad))
        x = param_inputs(self.config.features, inputs)
        hidden = self.param_rnn(x, hidden, bias)
        directions = torch.stack([readout(hidden, scaled) for readout in self.directions.values()])
        if long_scale is not None:
            directions = directions * (long_scale.power * present_size(moments)).exp()
        factor, next_log_rate = self.rate.factor(hidden, log_rate)
        return ParamStep(hidden, moments.average, moments.square, x, directions, factor, next_log_rate)

    def long_scale(self, state: RuleState, layout: Layout) -> LongScale | None:
        """Return how directions are scaled by long averages, if they are; the clip of the power passes gradients.

        The average is over all steps at first, and later over about `scale_memory` of them. The power is read from what
        `scale_inputs` names.

        Args:
            state: before the step.
            layout: of the models.
        """
        if not (memory := self.config.scale_memory):
            return None
        known = dict(zip(COUNTS, layout.smallness.split(1), strict=True))
        if self.config.knows_trend:
            of_late, for_long = (state.gradient_size[:2] + GRAD_RMS_FLOOR**2).log().split(1)
            known["trend"] = 0.5 * (of_late - for_long)
        inputs = torch.cat([layout.smallness[:0], *(known[name] for name in self.config.scale_inputs)])
        return LongScale(_decay(state.age, memory), power=read_power(self.long_scaling, inputs, 1.0))

    def with_gradient_size(self, mean_square: Tensor, state: RuleState) -> tuple[RuleState, Tensor | None]:
        """Note the size of each tensor's gradient, as far as the rule looks at it.

        Args:
            mean_square: of the gradient over each tensor. [T]
            state: before the step.

        Returns:
            the state with it, and how far the gradient is below its peak, see `BoundedRate.peak`. [T]
        """
        below = None
        if (rate := self.rate_by_peak) is not None:
            state, below = rate.peak(mean_square, state)
        if self.config.knows_trend:
            state = state._replace(gradient_size=self.averaged_sizes(mean_square, state))
        return state, below

    def averaged_sizes(self, mean_square: Tensor, state: RuleState) -> Tensor:
        """Average the size of each tensor's gradient over a few steps, and over `scale_memory` of them.

        Both begin with the first gradient that is not zero, whatever the age of the tensor is.

        Args:
            mean_square: of the gradient over each tensor. [T]
            state: before the step.

        Returns:
            the averages, and the number of steps that they are over. [3, T]
        """
        squares, count = state.gradient_size[:2], state.gradient_size[2:]
        decay = torch.cat([_decay(count, memory) for memory in (TREND_MEMORY, self.config.scale_memory)])
        squares = decay * squares + (1 - decay) * mean_square.clamp(max=GRAD_LIMIT**2)
        return torch.cat([squares, count + ((count > 0) | (mean_square > 0))])

    def mean_log_rate(self, state: RuleState, layout: Layout) -> Tensor:
        """Average the log rate over each tensor, and that over the model. [T]"""
        return layout.to_tensors(layout.mean_per_model(tensor_log_rate(state, layout)))

    def upper_levels(
        self,
        param: ParamLevel,
        param_rms: Tensor,  # [T]
        state: RuleState,  # before the step, but for what `with_gradient_size` notes
        layout: Layout,
        below: Tensor | None = None,  # [T] see `BoundedRate.peak`, where the rule asks for it
    ) -> RuleState:
        """Step the tensor RNN, the global RNN and the rates, and gather the next state."""
        x = param.pooled
        if self.config.tensor_features:
            x = torch.cat([x, relative_update(tensor_log_rate(state, layout), param_rms)[None]])
        bias = layout.to_tensors(self.global_to_tensor @ state.global_hidden)
        tensor_hidden, global_hidden = state.tensor_hidden, state.global_hidden
        if "tensor_level" not in self.config.without:
            tensor_hidden = self.tensor_rnn(x, tensor_hidden, bias)
        if "global_level" not in self.config.without:
            global_hidden = self.global_rnn(layout.mean_per_model(tensor_hidden), global_hidden)
        log_rate = state.log_rate if param.log_rate is None else param.log_rate
        if isinstance(self.rate, BoundedRate):
            seen = {"tensor": tensor_hidden, "means": x, "global": layout.to_tensors(state.global_hidden)}
            if "length" in self.config.drift_inputs:
                seen["length"] = self.rate.length_inputs(state.run_length)
            if below is not None:
                seen["peak"] = below[None]
            inputs = torch.cat([seen[name] for name in self.config.drift_inputs]).clamp(-INPUT_RANGE, INPUT_RANGE)
            log_rate = self.rate.drifted(state, inputs, param_rms, layout, below)
        return RuleState(
            hidden=param.hidden,
            average=param.average,
            square=param.square,
            log_rate=log_rate,
            tensor_hidden=tensor_hidden,
            global_hidden=global_hidden,
            age=state.age + 1,
            log_peak=state.log_peak,
            run_length=state.run_length,
            gradient_size=state.gradient_size,
        )


class SmallModels(NamedTuple):
    """Hold a rule for models of few parameters, which is no part of the one that names it: no module of it."""

    below: int  # parameters
    rule: HierarchicalRNN


ParamLevelEngine = Callable[[HierarchicalRNN, Tensor, RuleState, Tensor, Layout], ParamLevel]


def relative_update(log_rate: Tensor, param_rms: Tensor) -> Tensor:  # [T], [T] -> [T]
    """Compare the size of a tensor's update with the tensor's own, as a log from about -3 to 1.

    Well-trained networks of every kind move by about a thousandth of a tensor's size in a step, so this anchors a rule
    that otherwise knows rates only relative to each other. The size is treated as constant by meta-gradients.
    """
    return (log_rate - (param_rms.detach() + PARAM_RMS_FLOOR).log()).clamp(-12.0, 4.0) / 4.0


def _decay(age: Tensor, memory: float) -> Tensor:
    """Return the decay of an average over all steps at first, and over about `memory` of them later. [T]"""
    return (age / (age + 1)).clamp(max=1 - 1 / memory)
