"""The pure rule against its equations, worked out one scalar parameter at a time, and the properties it should have.

The reference below knows nothing of flat vectors, layouts or segment sums: a model is a list of tensors, a tensor a
list of parameters, and each level is a loop over the one below.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.features import FEATURES, Layout, count_features
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN

MODELS = [[4, 1, 3], [2], [5, 2]]  # sizes of the tensors of three models
SIZES = [size for model in MODELS for size in model]
MODEL_OF = [index for index, model in enumerate(MODELS) for _ in model]
STEPS = 6
RULES = {
    "default": ("default", {}),
    "default with attention": ("default", {"readouts": ("direction", "attention")}),
    "paper": ("paper", {}),
    "paper with attention": ("paper", {"readouts": ("direction", "attention")}),
    "summary": ("summary", {}),
    "other sizes": ("default", {"param_hidden": 3, "tensor_hidden": 4, "global_hidden": 2, "timescales": 3}),
    "a short horizon": ("default", {"drift_horizon": 3, "drift_fall": 0.1}),
    "rates by size": (
        "default",
        {
            "drift_inputs": ("tensor", "means", "global"),
            "first_inputs": ("size", "tensor_count", "model_count"),
            "size_floor": 0.5,
            "size_bound": 0.03,
        },
    ),
    "slowing": (
        "default",
        {"slows": True, "peak_memory": 3, "drift_inputs": ("tensor", "peak")},
    ),
    "slowing with peaks that fall like a power": ("default", {"slows": True, "peak_memory": 2, "peak_fall": 0.7}),
    "rates that fall with vanished gradients": (
        "default",
        {"slows": True, "peak_memory": 3, "vanished": 0.7, "drift_horizon": 10_000, "drift_fall": 3},
    ),
    "told the length": (
        "default",
        {"slows": True, "peak_memory": 3, "drift_inputs": ("tensor", "length")},
    ),
    "told a length beyond the horizon": ("default", {"drift_inputs": ("tensor", "length"), "drift_horizon": 2000}),
    "annealing": ("default", {"anneals": True}),
    "warming up until rates settle": ("default", {"warm_up": 0.1, "drift_settles": 4.5}),
    "warming up": ("default", {"warm_up": 0.1}),
    "falling beyond the horizon": ("default", {"far_fall": 0.7, "drift_horizon": 2.5}),
    "warming up, and falling beyond the horizon": ("default", {"far_fall": 1, "drift_horizon": 2, "warm_up": 0.1}),
    "no parameter far at once": ("default", {"step_bound": 0.5, "readouts": ("direction", "attention")}),
    "settling": ("default", {"drift_settles": 2.0}),
    "a long memory of scales": ("default", {"scale_memory": 3, "readouts": ("direction", "attention")}),
    "the paper's with a long memory": ("paper", {"scale_memory": 100}),
    "long scales by trend": ("default", {"scale_memory": 12, "scale_inputs": ("trend", "tensor_count")}),
    "the paper's by trend": ("paper", {"scale_memory": 100, "scale_inputs": ("model_count", "trend")}),
    "without scaling": ("default", {"without": ("input_scaling", "output_scaling")}),
    "without levels": ("default", {"without": ("tensor_level", "global_level", "gradient_shortcut")}),
    "without the global level": ("paper", {"without": ("global_level", "gradient_shortcut")}),
    "fewer features": ("default", {"features": ("scaled_gradient", "relative_rate"), "tensor_features": ()}),
}


IDLE_WITHOUT = {  # what a level that says nothing leaves without a use
    "tensor_level": [
        *(f"tensor_rnn.{key}" for key in ("gate_weight", "gate_bias", "candidate_weight", "candidate_bias")),
        "tensor_to_param",
        "global_to_tensor",
        "rate.drift",
    ],
    "global_level": [
        *(f"global_rnn.{key}" for key in ("gate_weight", "gate_bias", "candidate_weight", "candidate_bias")),
        "global_to_param",
        "global_to_tensor",
    ],
}


def make_rule(name):
    """Return a rule in double precision, none of whose meta-parameters is zero but for parts that it does without."""
    preset, changes = RULES[name]
    torch.manual_seed(5)
    rule = HierarchicalRNN(RuleConfig.preset(preset, **changes)).double()
    with torch.no_grad():
        for param in rule.parameters():
            if param.requires_grad:  # not those of parts that it does without
                param.add_(torch.randn_like(param) * 0.2)
    return rule


def layout():
    return Layout.of(SIZES, MODEL_OF, dtype=torch.float64)


def gradients(steps=STEPS):
    """Draw gradients over many orders of magnitude, with zeros and one beyond the limit."""
    rng = np.random.default_rng(7)
    grads = rng.standard_normal((steps, sum(SIZES))) * 10.0 ** rng.uniform(-6, 3, sum(SIZES))
    grads[1:3, 0] = 0.0
    grads[:, 5] = 0.0
    grads[2, 7] = 1e17
    return grads


class Equations:
    """Step one model; state is kept as nested lists of scalars and small vectors."""

    def __init__(self, rule, sizes, log_rates, length):
        self.length = length
        self.known = 0 < length <= rule.config.drift_horizon
        self.told = np.array([1.0, math.log10(length / 1000)] if self.known else [0.0, 0.0])
        self.w = {name: value.detach().numpy() for name, value in rule.named_parameters()}
        self.config = rule.config
        self.tensors = [
            {
                "t": self.w["tensor_rnn.initial"],
                "age": 0,
                "l": log_rate,
                "peak": 1e-15,
                "gradient sizes": [0.0, 0.0, 0.0],
                "params": [
                    {
                        "h": self.w["param_rnn.initial"],
                        "m": [0.0] * rule.config.timescales,
                        "v": [0.0] * rule.config.timescales,
                        "long v": 0.0,
                        "l": log_rate,
                    }
                    for _ in range(size)
                ],
            }
            for size, log_rate in zip(sizes, log_rates, strict=True)
        ]
        self.u = self.w["global_rnn.initial"]

    def gru(self, name, x, h, bias):
        w, n = self.w, len(h)
        r, z = np.empty(n), np.empty(n)
        for i in range(n):
            row = np.concatenate([x, h])
            r[i] = sigmoid(w[f"{name}.gate_weight"][i] @ row + w[f"{name}.gate_bias"][i] + bias[i])
            z[i] = sigmoid(w[f"{name}.gate_weight"][n + i] @ row + w[f"{name}.gate_bias"][n + i] + bias[n + i])
        row = np.concatenate([x, r * h])
        candidate = np.tanh(w[f"{name}.candidate_weight"] @ row + w[f"{name}.candidate_bias"] + bias[2 * n :])
        return z * h + (1 - z) * candidate

    def log_rate_of(self, tensor):
        if self.config.rate == "bounded":
            return tensor["l"]
        return sum(param["l"] for param in tensor["params"]) / len(tensor["params"])

    def features(self, x, v, relative_rate):
        logs = [math.log(value) for value in v]
        made = {
            "scaled_gradient": x,
            "neighbour_products": [a * b for a, b in pairwise(x)],
            "relative_magnitudes": [value - sum(logs) / len(logs) for value in logs],
            "relative_rate": [relative_rate],
        }
        return np.array([value for name in self.config.features for value in made[name]])

    def long_scale(self, param, tensor):
        """Update the long average of a parameter's squares; return what directions are multiplied by."""
        if not self.config.scale_memory:
            return 1.0
        decay = min(tensor["age"] / (tensor["age"] + 1), 1 - 1 / self.config.scale_memory)
        param["long v"] = decay * param["long v"] + (1 - decay) * param["v"][0]
        count, of_model = len(tensor["params"]), sum(len(other["params"]) for other in self.tensors)
        of_late, for_long = (math.sqrt(square + 1e-30) for square in tensor["gradient sizes"][:2])
        known = {
            "tensor_count": math.log(1e4 / count),
            "model_count": math.log(1e4 / of_model),
            "trend": math.log(of_late / for_long),
        }
        power = self.w["long_scaling"][:, 0] @ [1.0, *(known[name] for name in self.config.scale_inputs)]
        return (param["v"][0] / param["long v"]) ** (0.5 * min(max(power, 0.0), 1.0))

    def step_param(self, param, g, bias, tensor, relative_rate):
        """Update one parameter's state; return its inputs, directions and the factor on exp(l)."""
        w, h = self.w, param["h"]
        g = min(max(g, -1e15), 1e15)
        decay, scale_decay = (sigmoid(min(w["decay_weight"][k] @ h + w["decay_bias"][k], 9.2)) for k in range(2))
        x = []
        for s in range(self.config.timescales):
            b, c = (0.0, 0.0) if tensor["age"] == 0 else (decay ** (1 / 2**s), scale_decay)
            param["m"][s] = b * param["m"][s] + (1 - b) * g
            param["v"][s] = c * param["v"][s] + (1 - c) * (param["m"][s] ** 2 + 1e-18)
            scale = 1.0 if "input_scaling" in self.config.without else math.sqrt(param["v"][s])
            x.append(math.asinh(param["m"][s] / scale))
        inputs = self.features(x, param["v"], relative_rate)
        param["h"] = h = self.gru("param_rnn", inputs, h, bias)
        directions, long_scale = [], self.long_scale(param, tensor)
        for name in self.config.readouts:
            weight, shortcut = w[f"directions.{name}.weight"], w[f"directions.{name}.shortcut"]
            if self.config.direction == "gated":
                directions.append(sum((shortcut[s] + weight[s] @ h) * x[s] for s in range(len(x))))
            else:
                directions.append(weight[0] @ h + sum(shortcut[s] * x[s] for s in range(len(x))))
        directions = [direction * long_scale for direction in directions]
        if self.config.rate == "bounded":
            bound = self.config.momentary_bound
            raw = w["rate.momentary"][0] @ h + w["rate.momentary_bias"][0]
            factor = math.exp(bound * math.tanh(raw / bound))
        else:
            moved = min(max(param["l"] + w["rate.weight"][0] @ h + w["rate.bias"][0], -33.0), 33.0)
            factor = math.exp(moved - param["l"] + w["rate.offset"])
            k = sigmoid(w["rate.smoothing"])
            param["next_l"] = k * param["l"] + (1 - k) * moved
        return inputs, directions, factor

    def step(self, grads, param_rms):
        """Take a step with a list of gradients for each tensor; return the moves of each readout, in order."""
        w, updates = self.w, []
        mean_log_rate = sum(self.log_rate_of(tensor) for tensor in self.tensors) / len(self.tensors)
        for tensor, tensor_grads, rms in zip(self.tensors, grads, param_rms, strict=True):
            bias = w["tensor_to_param"] @ tensor["t"] + w["global_to_param"] @ self.u
            log_rate, count = self.log_rate_of(tensor), len(tensor["params"])
            results, rates = [], []
            for param, g in zip(tensor["params"], tensor_grads, strict=True):
                own = tensor["l"] if self.config.rate == "bounded" else param["l"]
                results.append(self.step_param(param, g, bias, tensor, own - mean_log_rate))
                rates.append(math.exp(own))
            size = math.sqrt(sum(g**2 for g in tensor_grads) / count + 1e-30)
            size = min(size, 1e15)
            fade = 1 / self.config.peak_memory
            if self.config.peak_fall and not self.known:
                fade = min(fade, self.config.peak_fall / max(tensor["age"], 1))
            tensor["peak"] = max(tensor["peak"] * math.exp(-fade), size)
            tensor["gone"] = any(tensor_grads) and size < self.config.vanished * tensor["peak"] and not self.known
            tensor["below"] = math.log(size / tensor["peak"])
            square, steps = min(sum(g**2 for g in tensor_grads) / count, 1e30), tensor["gradient sizes"][2]
            for row, memory in enumerate((10.0, self.config.scale_memory or math.inf)):
                decay = min(steps / (steps + 1), 1 - 1 / memory)
                tensor["gradient sizes"][row] = decay * tensor["gradient sizes"][row] + (1 - decay) * square
            tensor["gradient sizes"][2] += bool(steps or square)
            if self.config.slows:
                power = w["rate.slowing"][0]
                if "length" in self.config.drift_inputs:
                    power += w["rate.slowing_by_length"][:, 0] @ self.told
                power = min(max(power, 0.0), 1.0)
                rates = [rate * math.exp(power * tensor["below"]) for rate in rates]
            if self.config.warm_up and self.length:
                of_model = sum(len(other["params"]) for other in self.tensors)
                last = self.config.warm_up * math.log(of_model) / math.log(1e4) * self.length
                last = max(1.0, min(last, self.config.drift_settles))
                rates = [rate * min(1.0, (tensor["age"] + 1) / last) for rate in rates]
            if self.config.anneals and self.length:
                of_model = sum(len(other["params"]) for other in self.tensors)
                power = w["rate.annealing"][:, 0] @ [1.0, math.log(1e4 / count), math.log(1e4 / of_model)]
                left = 1 - tensor["age"] / self.length if tensor["age"] < self.length else 1.0
                rates = [rate * left ** min(max(power, 0.0), 2.0) for rate in rates]
            if not self.length and tensor["age"] > self.config.drift_horizon:
                rates = [rate * (self.config.drift_horizon / tensor["age"]) ** self.config.far_fall for rate in rates]
            for r in range(len(self.config.readouts)):
                size = math.sqrt(sum(d[r] ** 2 for _, d, _ in results) / count + 1e-20)
                size = 1.0 if "output_scaling" in self.config.without else size
                reach = w["reach"][0] if r else 1.0
                steps = [rate * f * d[r] / size for (_, d, f), rate in zip(results, rates, strict=True)]
                if self.config.step_bound:
                    most = self.config.step_bound * math.sqrt(rms**2 + self.config.size_floor**2)
                    steps = [min(max(step, -most), most) for step in steps]
                updates += [(r, reach * step) for step in steps]
            seen = [np.concatenate([p["h"], x]) for p, (x, _, _) in zip(tensor["params"], results, strict=True)]
            tensor["x"] = sum(seen) / count
            if self.config.tensor_features:
                relative = min(max(log_rate - math.log(rms + 1e-12), -12.0), 4.0) / 4
                tensor["x"] = np.append(tensor["x"], relative)
            tensor["size"] = math.sqrt(rms**2 + self.config.size_floor**2)
        self.step_above()
        return [[value for index, value in updates if index == r] for r in range(len(self.config.readouts))]

    def step_above(self):
        w, config = self.w, self.config
        for tensor in self.tensors:
            if "tensor_level" not in config.without:
                tensor["t"] = self.gru("tensor_rnn", tensor["x"], tensor["t"], w["global_to_tensor"] @ self.u)
            if config.rate == "bounded":
                seen = {"tensor": tensor["t"], "means": tensor["x"], "global": self.u, "peak": [tensor["below"]]}
                seen["length"] = self.told
                seen = np.clip(np.concatenate([seen[name] for name in config.drift_inputs]), -5.0, 5.0)
                direction = math.tanh(w["rate.drift"][:, 0] @ seen + w["rate.drift_bias"][0])
                direction = -1.0 if tensor["gone"] else direction
                rise = config.drift_rise if tensor["age"] < config.drift_horizon else 0.0
                power = rise if direction > 0 else config.drift_fall
                power /= 1 + (tensor["age"] / config.drift_settles) ** 2 if self.length > 0 else 1
                tensor["l"] += power / (config.drift_delay + tensor["age"]) * direction
                if tensor["age"] == 0 and config.first_inputs:
                    count = len(tensor["params"])
                    of_model = sum(len(other["params"]) for other in self.tensors)
                    known = {
                        "size": math.log(tensor["size"] / config.size_floor),
                        "tensor_count": math.log(1e4 / count),
                        "model_count": math.log(1e4 / of_model),
                    }
                    tensor["l"] += w["rate.first"][:, 0] @ np.array([known[name] for name in config.first_inputs])
                tensor["l"] = min(tensor["l"], math.log(config.size_bound * tensor["size"]))
                tensor["l"] = min(max(tensor["l"], -33.0), 33.0)
            else:
                for param in tensor["params"]:
                    param["l"] = param["next_l"]
            tensor["age"] += 1
        mean = sum(tensor["t"] for tensor in self.tensors) / len(self.tensors)
        if "global_level" not in self.config.without:
            self.u = self.gru("global_rnn", mean, self.u, np.zeros(3 * len(self.u)))


def sigmoid(x):
    return 1 / (1 + math.exp(min(-x, 700.0)))


def cut(values, sizes):
    ends = np.cumsum(sizes)
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("name", RULES)
def test_rule_equals_its_equations(name):
    """Updates, lookaheads and all states of three models over several steps."""
    rule, rng = make_rule(name), np.random.default_rng(11)
    log_rates, rms = rng.uniform(-9, -2, len(SIZES)), rng.uniform(0, 2, len(SIZES))
    rms[1] = 0.0
    lengths = [0, 4, 20_000]  # of the runs; the first is unknown, the second soon over
    references = [
        Equations(rule, sizes, rates, length)
        for sizes, rates, length in zip(MODELS, cut(log_rates, [len(m) for m in MODELS]), lengths, strict=True)
    ]
    of_tensors = layout().to_tensors(torch.tensor(lengths, dtype=torch.float64))
    state = rule.init(layout(), torch.from_numpy(log_rates), of_tensors)
    for grads in gradients():
        output = rule(torch.from_numpy(grads), torch.from_numpy(rms), state, layout())
        state = output.state
        per_model = cut(cut(grads, SIZES), [len(m) for m in MODELS])
        rms_per_model = cut(rms, [len(m) for m in MODELS])
        moves = [ref.step(g, r) for ref, g, r in zip(references, per_model, rms_per_model, strict=True)]
        for index, actual in enumerate([output.update, output.lookahead][: len(rule.config.readouts)]):
            expected = np.concatenate([model[index] for model in moves])
            np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-14)
    tensors = [tensor for reference in references for tensor in reference.tensors]
    params = [param for tensor in tensors for param in tensor["params"]]
    per_param = rule.config.rate == "smoothed"
    expected_state = {
        "hidden": np.stack([param["h"] for param in params], 1),
        "average": np.array([param["m"] for param in params]).T,
        "square": np.array([param["v"] + [param["long v"]] * (rule.config.scale_memory > 0) for param in params]).T,
        "log_rate": np.array([value["l"] for value in (params if per_param else tensors)]),
        "tensor_hidden": np.stack([tensor["t"] for tensor in tensors], 1),
        "global_hidden": np.stack([reference.u for reference in references], 1),
        "age": np.full(len(SIZES), float(STEPS)),
    }
    if rule.rate_by_peak is not None:
        expected_state["log_peak"] = np.log([tensor["peak"] for tensor in tensors])
    if rule.config.knows_trend:
        expected_state["gradient_size"] = np.array([tensor["gradient sizes"] for tensor in tensors]).T
    for key, expected in expected_state.items():
        np.testing.assert_allclose(getattr(state, key).detach().numpy(), expected, rtol=1e-9, atol=1e-13, err_msg=key)


def roll(rule, grads, log_rate=-4.0):
    """Take steps from the start; return the last output."""
    state = rule.init(layout(), log_rate, run_length=50.0)
    rms = torch.linspace(0.1, 2, len(SIZES), dtype=torch.float64)
    for grad in grads:
        output = rule(grad, rms, state, layout())
        state = output.state
    return output


def meta_loss(rule):
    """Score an unroll by everything that it leaves behind."""
    output = roll(rule, torch.from_numpy(gradients(4)).clamp(-50, 50))
    weights = torch.cos(torch.arange(len(output.update), dtype=torch.float64))
    loss = (output.update * weights).sum() * 30 + output.state.log_rate.square().sum()
    loss = loss + (output.state.hidden * weights).sum() + output.state.global_hidden.sum()
    return loss if output.lookahead is None else loss + 20 * (output.lookahead * weights.flip(0)).sum()


@pytest.mark.parametrize(
    "name", ["default with attention", "paper with attention", "a long memory of scales", "long scales by trend"]
)
def test_meta_gradient_equals_finite_differences(name):
    """Along a random direction of every meta-parameter, one by one, which also says that each receives gradient."""
    rule, width = make_rule(name), 1e-5
    if rule.config.scale_memory:
        with torch.no_grad():  # powers of 0 to 1: a clip lets gradients through that differences do not see
            rule.long_scaling.copy_(torch.tensor([0.5, 0.02, -0.03])[: len(rule.long_scaling), None])
    meta_loss(rule).backward()
    for key, param in rule.named_parameters():
        direction, start, values = torch.randn_like(param), param.detach().clone(), []
        with torch.no_grad():
            for reach in (-2, -1, 1, 2):
                param.copy_(start + reach * width * direction)
                values.append(meta_loss(rule).item())
            param.copy_(start)
        slope = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * width)  # right to the fourth order
        assert param.grad is not None and param.grad.norm() > 0, key
        assert (param.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize("name", RULES)
def test_every_meta_parameter_receives_gradient(name):
    """In a fresh rule too; but as long as the paper's rates do not move, it does not matter how they are smoothed."""
    torch.manual_seed(0)
    preset, changes = RULES[name]
    rule = HierarchicalRNN(RuleConfig.preset(preset, **changes)).double()
    without = rule.config.without
    idle = {"rate.smoothing", *(key for part in without for key in IDLE_WITHOUT.get(part, []))}
    meta_loss(rule).backward()
    for key, param in rule.named_parameters():
        heard = param.grad is not None and bool(param.grad.norm() > 0)
        assert heard == (param.requires_grad and key not in idle), key
        assert param.grad is None or param.grad.isfinite().all(), key


@pytest.mark.parametrize("name", [name for name in RULES if name != "without scaling"])
@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_scale_of_the_gradient_does_not_matter(name, scale):
    """Loss functions may be multiplied by a constant: nothing changes but the averages."""
    rule = make_rule(name)
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(STEPS, sum(SIZES), dtype=torch.float64, generator=generator)
    expected, actual = roll(rule, grads), roll(rule, grads * scale)
    torch.testing.assert_close(actual.update, expected.update, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(actual.state.hidden, expected.state.hidden, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(actual.state.average, expected.state.average * scale, rtol=1e-6, atol=1e-12 * scale)


@pytest.mark.parametrize("name", RULES)
def test_order_of_the_parameters_in_a_tensor_does_not_matter(name):
    """Permuted gradients give permuted updates; the levels above see no difference."""
    rule, order = make_rule(name), torch.tensor([2, 0, 3, 1, 4, 7, 5, 6, 9, 8, *range(10, sum(SIZES))])
    grads = torch.from_numpy(gradients())
    expected, actual = roll(rule, grads), roll(rule, grads[:, order])
    assert not torch.allclose(expected.update[order], expected.update)
    torch.testing.assert_close(actual.update, expected.update[order], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(actual.state.tensor_hidden, expected.state.tensor_hidden, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual.state.global_hidden, expected.state.global_hidden, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tensor", range(len(SIZES)))
def test_sign_of_every_gradient_reaches_its_own_global_state(tensor):
    """Each tensor, the first and the last alike, moves its model's global RNN and no other model's."""
    rule = make_rule("default")
    grads = torch.from_numpy(gradients())
    flipped = grads * torch.where(layout().tensor_of == tensor, -1.0, 1.0)
    change = (roll(rule, grads).state.global_hidden - roll(rule, flipped).state.global_hidden).abs().amax(0)
    for model in range(len(MODELS)):
        if model == MODEL_OF[tensor]:
            assert change[model] > 1e-4
        else:
            assert change[model] == 0


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_matters(feature):
    """The update changes when the param RNN no longer sees the first row of a feature: none is dead weight."""
    rule = make_rule("default")
    grads = torch.from_numpy(gradients())
    rates = torch.linspace(-6, -3, len(SIZES), dtype=torch.float64)
    expected = roll(rule, grads, rates).update
    names = list(FEATURES)
    start = count_features(names[: names.index(feature) + 1], 4) - count_features([feature], 4)
    with torch.no_grad():
        rule.param_rnn.gate_weight[:, start] = 0
        rule.param_rnn.candidate_weight[:, start] = 0
    assert (roll(rule, grads, rates).update - expected).abs().max() > 1e-6 * expected.abs().max()


def test_a_rate_begins_with_the_size_of_its_tensor_and_never_outgrows_it():
    rule = HierarchicalRNN(RuleConfig(first_inputs=("size",), size_floor=0.1, size_bound=0.05))
    layout, rms = Layout.of([4, 4, 4]), torch.tensor([0.0, 1.0, 1.0])
    with torch.no_grad():
        rule.rate.drift_bias.fill_(0.0)
        rule.rate.first.fill_(0.5)
        state = rule(torch.ones(12), rms, rule.init(layout, torch.tensor([-7.0, -7.0, -1.0])), layout).state
        assert state.log_rate[:2].tolist() == pytest.approx([-7.0, -7.0 + 0.25 * math.log(101)])
        rule.rate.drift_bias.fill_(5.0)
        for _ in range(200):
            state = rule(torch.ones(12), rms, state, layout).state
    limits = 0.05 * (rms.square() + 0.01).sqrt()
    torch.testing.assert_close(state.log_rate.exp(), limits)
    still = rule.without_rate()
    state = still(torch.ones(12), rms, still.init(layout, 0.0), layout).state
    assert state.log_rate.tolist() == [0.0, 0.0, 0.0]


def test_a_rate_begins_high_where_there_are_few_parameters():
    rule = HierarchicalRNN(RuleConfig(first_inputs=("tensor_count", "model_count")))
    layout = Layout.of([10, 1000, 20_000, 10], [0, 0, 0, 1])
    with torch.no_grad():
        rule.rate.first.copy_(torch.tensor([[0.5], [0.25]]))
        state = rule(torch.ones(21_020), torch.ones(4), rule.init(layout, -7.0), layout).state
    powers = [0.5 * math.log(1000), 0.5 * math.log(10), 0.0, 0.75 * math.log(1000)]
    assert (state.log_rate + 7).tolist() == pytest.approx(powers, abs=1e-5)


def test_long_scales_fade_as_gradients_fall_away():
    """The power follows the size of the gradient over the last steps beside that over the long memory."""
    config = RuleConfig(scale_memory=100, scale_inputs=("trend",))
    rule, layout, powers = HierarchicalRNN(config), Layout.of([3, 4]), []
    with torch.no_grad():
        rule.long_scaling.copy_(torch.tensor([[0.8], [0.5]]))
        state = rule.init(layout, -3.0)
        state = state._replace(age=state.age + torch.tensor([0.0, 1000.0]))  # which has no part in it
        for step in range(100):
            sizes = torch.tensor([1.0, 1.0 if step < 50 else 1e-3])  # the gradient of the second tensor falls away
            grad = layout.to_params(sizes if step else 0 * sizes)  # which does not count while it is zero
            state = rule(grad, torch.ones(2), state, layout).state
            powers.append(rule.long_scale(state, layout).power.tolist())
        bare = HierarchicalRNN(replace(config, scale_inputs=()))
        assert bare.long_scale(bare.init(layout, -3.0), layout).power.tolist() == pytest.approx([0.95, 0.95])
    assert [power for power, _ in powers] == pytest.approx([0.8] * 100, abs=1e-6)
    assert powers[49][1] == pytest.approx(0.8, abs=1e-6)
    of_late, for_long = 0.9**10 + (1 - 0.9**10) * 1e-6, 49 / 59 + 10 / 59 * 1e-6
    assert powers[59][1] == pytest.approx(0.8 + 0.25 * math.log(of_late / for_long), abs=1e-2)
    assert powers[99][1] == 0.0  # not below


def test_steps_slow_down_with_the_gradient_and_peaks_fade():
    rule = HierarchicalRNN(RuleConfig(slows=True, peak_memory=10.0))
    layout, ones = Layout.of([5]), torch.ones(5)
    sizes = []
    with torch.no_grad():
        rule.rate.slowing.fill_(0.5)
        state = rule.init(layout, -3.0)
        for size in (1.0, 0.01, 0.01, 4.0, 0.0):
            output = rule(size * ones, torch.ones(1), state, layout)
            state = output.state
            sizes.append(output.update.square().mean().sqrt().item() / math.exp(-3.0))
    fades = math.exp(0.1)
    expected = [1.0, (0.01 * fades) ** 0.5, 0.1 * fades, 1.0, (1e-15 * fades / 4) ** 0.5]
    assert sizes == pytest.approx(expected, rel=1e-4)
    assert state.log_peak.item() == pytest.approx(math.log(4) - 0.1)


def slowing_sizes(config, sizes):
    """Return the size of each step beside its rate, for gradients of these sizes, at a power of one half."""
    rule, layout, steps = HierarchicalRNN(config), Layout.of([5]), []
    with torch.no_grad():
        rule.rate.slowing.fill_(0.5)
        state = rule.init(layout, -3.0)
        for size in sizes:
            output = rule(size * torch.ones(5), torch.ones(1), state, layout)
            state = output.state
            steps.append(output.update.square().mean().sqrt().item() / math.exp(-3.0))
    return steps, state


def test_rates_fall_where_gradients_have_vanished_and_nobody_knows_the_length():
    """One of zero is none that vanished: experts have one now and then only."""
    config = RuleConfig(slows=True, vanished=1e-3, drift_rise=2.0, drift_fall=1.0, drift_horizon=1000, drift_delay=20)
    rule, rates = HierarchicalRNN(config), []
    layout = Layout.of([5, 5, 5, 5], model_of=[0, 1, 2, 3])
    gradients = torch.tensor([[1.0, 1.0, 1.0, 1.0]] + 60 * [[1e-4, 1e-2, 0.0, 1e-4]]).repeat_interleave(5, dim=1)
    with torch.no_grad():
        rule.rate.drift.zero_()
        rule.rate.drift_bias.fill_(9.0)  # as fast up as the bounds allow
        state = rule.init(layout, -8.0, run_length=torch.tensor([0.0, 0.0, 0.0, 300.0]))
        for gradient in gradients:
            state = rule(gradient, torch.ones(4), state, layout).state
            rates.append(state.log_rate)
    fell, *rose = (rates[-1] - rates[0]).tolist()
    assert fell == pytest.approx(-sum(1 / (20 + age) for age in range(1, 61)), rel=1e-4)
    assert rose == pytest.approx([2 * -fell] * 3, rel=1e-4)


def test_peaks_of_long_runs_fall_like_a_power_of_the_number_of_steps():
    gradients = [1.0] + [1e-6] * 400
    _, forgets = slowing_sizes(RuleConfig(slows=True, peak_memory=20.0), gradients)
    _, remembers = slowing_sizes(RuleConfig(slows=True, peak_memory=20.0, peak_fall=1.0), gradients)
    assert forgets.log_peak.item() == pytest.approx(math.log(1e-6))
    expected = -20 / 20 - sum(1 / age for age in range(21, 401))
    assert remembers.log_peak.item() == pytest.approx(expected, abs=0.01)


def test_rates_of_a_run_of_known_length_settle():
    rule = HierarchicalRNN(RuleConfig(drift_rise=2.0, drift_delay=7, drift_settles=10))
    layout, changes = Layout.of([4, 4], model_of=[0, 1]), []
    with torch.no_grad():
        rule.rate.drift.zero_()
        rule.rate.drift_bias.fill_(9.0)  # as fast up as the bounds allow
        state = rule.init(layout, -20.0, run_length=torch.tensor([0.0, 300.0]))
        for _ in range(300):
            before = state.log_rate
            state = rule(torch.ones(8), torch.ones(2), state, layout).state
            changes.append(state.log_rate - before)
    unknown, known = torch.stack(changes).unbind(1)
    age = torch.arange(300.0)
    torch.testing.assert_close(unknown, 2 / (7 + age), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(known, unknown / (1 + (age / 10) ** 2), rtol=1e-2, atol=1e-5)
    assert known[50:].sum() < 0.05 < 3 < unknown[50:].sum()


def test_past_the_horizon_a_rate_falls_but_does_not_rise():
    rule = HierarchicalRNN(RuleConfig(drift_horizon=3))
    layout = Layout.of([4, 4])
    with torch.no_grad():
        rule.rate.drift.zero_()
        for bias, moves_on in ((5.0, False), (-5.0, True)):
            rule.rate.drift_bias.fill_(bias)
            state, rates = rule.init(layout, -7.0), []
            for _ in range(6):
                state = rule(torch.ones(8), torch.ones(2), state, layout).state
                rates.append(state.log_rate[0].item())
            assert all(abs(b) != abs(a) for a, b in pairwise(rates[:3]))
            assert (len(set(rates[2:])) > 1) == moves_on
