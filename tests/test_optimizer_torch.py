"""`HRNN` where torch and its users expect an optimizer: hooks, profiler, scaler, compiled models, wrappers."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.modules import SMALL_WEIGHTS, Batches, Regression, attentive_rule, same_state
from torch import nn
from torch.amp import GradScaler
from torch.profiler import ProfilerActivity, profile

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN


def steps(optimizer, module, batches):
    for batch in batches:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()


def plainly(module, batches, accumulate=1, **options):
    """The steps that all others are to equal."""
    optimizer = HRNN(module.parameters(), **options)
    for index, batch in enumerate(batches):
        with optimizer.attend():
            (module.loss(batch) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def trained(count=3, **options):
    module = Regression()
    optimizer = HRNN(module.parameters(), **options)
    steps(optimizer, module, Batches(count))
    return module, optimizer


def other_rule(**config):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return HierarchicalRNN(RuleConfig(**config))


# ---------------------------------------------------------------- hooks


def test_step_hooks_run_around_the_step():
    module, seen = Regression(), []
    optimizer = HRNN(module.parameters())

    def note(name):
        return lambda opt, args, kwargs: seen.append((name, opt is optimizer, module.head.weight.detach().clone()))

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    steps(optimizer, module, Batches(1))
    assert [(name, mine) for name, mine, _ in seen] == [("before", True), ("after", True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(seen[1][2], module.head.weight)
    for handle in handles:
        handle.remove()
    steps(optimizer, module, Batches(1))
    assert len(seen) == 2


def test_a_pre_hook_may_give_the_closure():
    module, plain, (batch,) = Regression(), Regression(), Batches(1)
    optimizer = HRNN(module.parameters())
    calls = []

    def closure():
        calls.append(1)
        loss = module.loss(batch)
        loss.backward()
        return loss

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() > 0
    plainly(plain, [batch])
    assert calls == [1]
    assert same_state(dict(module.state_dict()), dict(plain.state_dict()))


def test_state_dict_hooks_see_and_change_what_is_saved():
    _, optimizer = trained()
    order = []
    optimizer.register_state_dict_pre_hook(lambda opt: order.append(opt is optimizer))

    def add(opt, state_dict):
        order.append(sorted(state_dict))
        state_dict["mine"] = 7

    optimizer.register_state_dict_post_hook(add)
    saved = optimizer.state_dict()
    assert order == [True, ["param_groups", "state"]]
    assert saved["mine"] == 7
    assert saved["hrnn"]["weights"] == SMALL_WEIGHTS


@pytest.mark.parametrize("returns", [True, False])
def test_load_hooks_see_and_change_what_is_loaded(returns):
    _, optimizer = trained()
    saved = optimizer.state_dict()
    packed = {**saved, "state": {f"p{index}": values for index, values in saved["state"].items()}}
    _, twin = trained(0)
    seen = []

    def unpack(opt, state_dict):
        unpacked = {int(index[1:]): values for index, values in state_dict["state"].items()}
        if returns:
            return {**state_dict, "state": unpacked}
        state_dict["state"] = unpacked

    def after(opt):
        seen.append(same_state(list(opt.state.values()), list(optimizer.state.values())))
        opt.state[opt.param_groups[0]["params"][0]]["age"] += 1  # a hook may have the last word

    twin.register_load_state_dict_pre_hook(unpack)
    twin.register_load_state_dict_post_hook(after)
    twin.load_state_dict(packed)
    assert seen == [True]
    assert [int(state["age"]) for state in twin.state.values()] == [4, 3, 3, 3]
    assert len(twin._optimizer_load_state_dict_pre_hooks) == 1  # none of its own stays behind
    assert len(twin._optimizer_load_state_dict_post_hooks) == 1


def test_hooks_that_load_sees_are_of_full_precision():
    """Not of the parameters' bfloat16, to which torch's own loading casts."""
    module, optimizer = trained()
    twin = HRNN([nn.Parameter(param.detach().bfloat16()) for param in module.parameters()])
    seen = []
    twin.register_load_state_dict_post_hook(lambda opt: seen.extend(opt.state.values()))
    twin.load_state_dict(optimizer.state_dict())
    assert same_state(seen, list(optimizer.state.values()))


# ---------------------------------------------------------------- around the step


def test_zero_grad_and_the_names_in_a_profile():
    module, optimizer = trained(1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in module.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
        optimizer.zero_grad()
    assert all(param.grad is None for param in module.parameters())
    names = {event.key for event in recorded.key_averages()}
    assert {"Optimizer.step#HRNN.step", "Optimizer.zero_grad#HRNN.zero_grad"} <= names


def test_a_thousand_tensors_are_a_thousand_tensors():
    """Lists of tensors are stepped together; each must get its own."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3)) for _ in range(1000)]
    optimizer = HRNN(params)
    before = torch.stack([param.detach().clone() for param in params])
    for step in range(2):
        for index, param in enumerate(params):
            param.grad = torch.full((3,), float((-1) ** (index + step)))
        optimizer.step()
    moved = torch.stack([param.detach() for param in params]) - before
    assert (moved != 0).all()
    for parity in (0, 1):  # the same gradients, so the same first steps but for what their own size says
        signs = moved[parity::2].sign()
        assert torch.equal(signs, signs[:1].expand_as(signs))
    assert not torch.equal(moved[0].sign(), moved[1].sign())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps(backend):
    module, plain, batches = Regression(), Regression(), Batches(3)
    compiled = torch.compile(module.forward, backend=backend)
    optimizer = HRNN(module.parameters())
    for inputs, targets in batches:
        optimizer.zero_grad()
        (compiled(inputs) - targets).square().mean().backward()
        optimizer.step()
    plainly(plain, batches)
    torch.testing.assert_close(list(module.parameters()), list(plain.parameters()))


def test_under_a_grad_scaler_an_overflow_touches_nothing():
    module, plain, batches = Regression(), Regression(), Batches(4)
    optimizer, scaler = HRNN(module.parameters()), GradScaler("cpu", init_scale=2.0**10)
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(module.loss(batch) * (float("inf") if index == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        before = copy.deepcopy((module.state_dict(), list(optimizer.state.values())))
        scaler.step(optimizer)
        scaler.update()
        after = (module.state_dict(), list(optimizer.state.values()))
        assert same_state(before, after) == (index == 1)
    assert (optimizer.skipped_steps, scaler.get_scale()) == (0, 2.0**9)
    items = [batch for index, batch in enumerate(batches) if index != 1]
    plainly(plain, items)
    assert same_state(dict(module.state_dict()), dict(plain.state_dict()))


class Accelerated(torch.optim.Optimizer):
    """A wrapper as Hugging Face Accelerate's: an optimizer by name, whose every word comes from the one inside."""

    def __init__(self, optimizer, scaler=None):
        self.optimizer, self.scaler, self.gradients_are_ready = optimizer, scaler, True

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none=None):
        if self.gradients_are_ready:
            self.optimizer.zero_grad()

    def step(self, closure=None):
        if not self.gradients_are_ready:
            return
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer, closure)
            self.scaler.update()


@pytest.mark.parametrize("scaled", [True, False])
def test_a_wrapper_that_steps_without_closure(scaled):
    rule, module, plain, batches = attentive_rule(), Regression(), Regression(), Batches(6)
    optimizer, scaler = HRNN(module.parameters(), weights=rule), GradScaler("cpu", init_scale=1.0, enabled=scaled)
    wrapper = Accelerated(optimizer, scaler if scaled else None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for index, batch in enumerate(batches):
        wrapper.gradients_are_ready = index % 2 == 1
        with optimizer.attend():
            scaler.scale(module.loss(batch) / 2).backward()
        if scaled and wrapper.gradients_are_ready:
            scaler.unscale_(optimizer)
        wrapper.step()
        wrapper.zero_grad()
        if wrapper.gradients_are_ready:
            schedule.step()
    plainly(plain, batches, accumulate=2, weights=rule)
    assert same_state(dict(module.state_dict()), dict(plain.state_dict()))
    fresh = HRNN(Regression().parameters(), weights=rule)
    Accelerated(fresh).load_state_dict(wrapper.state_dict())
    assert same_state(list(fresh.state.values()), list(optimizer.state.values()))


def test_a_closure_that_does_nothing_is_a_step_on_the_gradients_there_are():
    module, plain, batches = Regression(), Regression(), Batches(2)
    optimizer = HRNN(module.parameters())
    for batch in batches:
        optimizer.zero_grad()
        module.loss(batch).backward()
        assert optimizer.step(lambda: None) is None
    plainly(plain, batches)
    assert same_state(dict(module.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_module_and_its_optimizer_are_copied_together(copied):
    module, optimizer = trained()
    holder = SimpleNamespace(module=module.backbone, head=module.head, optimizer=optimizer)
    twin = copied(holder)
    mine = [*twin.module.parameters(), *twin.head.parameters()]
    assert [id(param) for param in twin.optimizer.param_groups[0]["params"]] == [id(param) for param in mine]
    for param in mine:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in module.parameters()]
    twin.optimizer.step()
    assert same_state(before, [param.detach() for param in module.parameters()])
    assert all(not torch.equal(ours, theirs) for ours, theirs in zip(before, mine, strict=True))


def test_it_says_what_it_is():
    _, optimizer = trained(0, lr=0.5)
    assert repr(optimizer).startswith("HRNN (\nParameter Group 0\n")
    assert "lr: 0.5" in repr(optimizer)


# ---------------------------------------------------------------- a state made with other weights


def test_other_weights_are_refused_with_the_two_mends():
    _, optimizer = trained()
    twin = HRNN(Regression().parameters(), weights=other_rule())
    mends = rf"weights '{SMALL_WEIGHTS}'.*same weights to resume, or with other_weights='adapt'"
    with pytest.raises(ValueError, match=mends):
        twin.load_state_dict(optimizer.state_dict())


def test_other_weights_are_adapted_if_asked_for():
    module, optimizer = trained()
    rule = other_rule(param_hidden=7, tensor_hidden=5, scale_memory=100)
    twin = HRNN(module.parameters(), weights=rule, other_weights="adapt")
    start = copy.deepcopy(list(twin.state.values()))
    told = rf"made with the weights '{SMALL_WEIGHTS}'.*'custom'.*hidden states start anew"
    with pytest.warns(UserWarning, match=told):
        twin.load_state_dict(optimizer.state_dict())
    for fresh, theirs, mine in zip(start, optimizer.state.values(), twin.state.values(), strict=True):
        for key in ("average", "square", "log_rate", "age"):
            assert torch.equal(mine[key], theirs[key]), key
        for key in ("hidden", "tensor_hidden", "global_hidden"):
            assert torch.equal(mine[key], fresh[key]), key
    steps(twin, module, Batches(3))
    assert all(value.isfinite().all() for state in twin.state.values() for value in state.values())
    again = HRNN(Regression().parameters(), weights=rule)
    again.load_state_dict(twin.state_dict())  # which is now of these weights
    assert int(again.state[again.param_groups[0]["params"][0]]["age"]) == 6


def adapted(before, after):
    """Return a module, an optimizer that took three steps of it, and one with other weights that took on its state."""
    module = Regression()
    optimizer = HRNN(module.parameters(), weights=before)
    steps(optimizer, module, Batches(3))
    twin = HRNN(module.parameters(), weights=after, other_weights="adapt")
    with pytest.warns(UserWarning, match="hidden states start anew"):
        twin.load_state_dict(optimizer.state_dict())
    return module, optimizer, twin


@pytest.mark.parametrize("memories", [(0, 20), (20, 0), (5, 20)])
def test_weights_with_and_without_a_long_memory_are_adapted_to(memories):
    """A long average that was not kept begins with what the short one is."""
    before, after = (other_rule(scale_memory=memory) for memory in memories)
    module, optimizer, twin = adapted(before, after)
    for theirs, mine in zip(optimizer.state.values(), twin.state.values(), strict=True):
        long = theirs["square"][-1:] if memories[0] else theirs["square"][:1]
        assert torch.equal(mine["square"], torch.cat([theirs["square"][:4], *([long] if memories[1] else [])]))
    steps(twin, module, Batches(3))
    assert all(value.isfinite().all() for state in twin.state.values() for value in state.values())


@pytest.mark.parametrize(("before", "after"), [("hrnn-v6", "hrnn-v7"), ("hrnn-v7", "hrnn-v6")])
def test_shipped_weights_with_and_without_the_trend_are_adapted_to(before, after):
    """What was not kept begins with the next gradient, at any age."""
    module, _, twin = adapted(before, after)
    steps(twin, module, Batches(2))
    for state in twin.state.values():
        assert int(state["age"]) == 5
        assert all(value.isfinite().all() for value in state.values())
        if after == "hrnn-v7":
            of_late, for_long, count = state["gradient_size"].tolist()
            assert count == 2
            assert of_late == pytest.approx(for_long)  # over the same two steps
        else:
            assert "gradient_size" not in state


@pytest.mark.parametrize("value", [[1.0, 1.0, 1.0], None])
def test_a_state_that_is_no_tensor_is_refused(value):
    optimizer = HRNN([torch.nn.Parameter(torch.ones(2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["gradient_size"] = value
    with pytest.raises(ValueError, match=r"The saved gradient_size is no tensor but .*: the checkpoint is damaged"):
        optimizer.load_state_dict(saved)


def damaged(change):
    """Return what a saved state of two parameters becomes."""
    saved = copy.deepcopy(HRNN([torch.nn.Parameter(torch.ones(2)) for _ in range(2)]).state_dict())
    return change(saved) or saved


DAMAGE = {
    "a missing parameter": (lambda saved: saved["state"].pop(1) and None, r"lacks that of the parameters \[1\]"),
    "an additional one": (lambda saved: saved["state"].update({7: saved["state"][0]}), r"\['7'\]"),
    "no parameter": (lambda saved: saved["state"].clear(), "lacks that of the parameters"),
    "a note that is text": (lambda saved: saved.update(hrnn="yes"), "The note in the saved state is 'yes'"),
    "skipped steps in words": (lambda saved: saved["hrnn"].update(skipped_steps="many"), "says that 'many' steps"),
    "states in a list": (lambda saved: saved.update(state=[1, 2]), "no optimizer's state, or a damaged one"),
    "no state of a parameter": (lambda saved: saved["state"].update({0: None}), "no optimizer's state, or a damaged"),
    "groups that are numbers": (lambda saved: saved.update(param_groups=[1]), "no optimizer's state, or a damaged"),
    "one group alone": (lambda saved: saved.update(param_groups={"params": [0, 1]}), "no optimizer's state, or a dam"),
    "a group of nothing": (lambda saved: saved["param_groups"][0].pop("params") and None, "dicts with 'params'"),
    "an absurd rate": (lambda saved: saved["state"][0].update(log_rate=torch.tensor(1e30)), "log_rate is beyond 100"),
    "complex averages": (
        lambda saved: saved["state"][0].update(average=saved["state"][0]["average"] * 1j),
        "average is of type torch.complex64",
    ),
}


@pytest.mark.parametrize("other_weights", ["refuse", "adapt"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_states_are_refused_and_nothing_is_lost(kind, other_weights):
    change, complaint = DAMAGE[kind]
    rule = None if other_weights == "refuse" else other_rule()
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = HRNN(params, **({} if rule is None else {"weights": rule}), other_weights=other_weights)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=complaint):
        optimizer.load_state_dict(damaged(change))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[index][key]) for index in before for key, value in before[index].items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["hidden", "square", "log_rate", "gradient_size"])
def test_a_state_that_is_not_finite_is_refused(key, value):
    optimizer = HRNN([torch.nn.Parameter(torch.ones(2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key].view(-1)[-1] = value
    before = copy.deepcopy(list(optimizer.state.values()))
    with pytest.raises(ValueError, match=rf"The saved {key} of .* not finite.* Resume from an earlier one"):
        optimizer.load_state_dict(saved)
    assert same_state(before, list(optimizer.state.values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": math.nan}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": "x"}, "'x'"),
        ({"weight_decay": math.inf}, "weight_decay"),
    ],
)
def test_a_state_whose_groups_are_out_of_range_is_refused(change, named):
    optimizer = HRNN([torch.nn.Parameter(torch.ones(2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= change
    with pytest.raises(ValueError, match=f"Group 0 of the saved state cannot be used: .*{named}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1.0
    del saved["param_groups"][0]["lr"]
    with pytest.raises(ValueError, match="Group 0 of the saved state cannot be used: there is no 'lr'"):
        optimizer.load_state_dict(saved)


def test_a_state_with_negative_squares_is_refused():
    optimizer = HRNN([torch.nn.Parameter(torch.ones(2))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["square"][0, 0] = -1.0
    with pytest.raises(ValueError, match="square has values below zero"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("config", [{"timescales": 3}, {"rate": "smoothed"}])
def test_other_weights_of_another_shape_cannot_be_adapted(config):
    _, optimizer = trained()
    module = Regression()
    twin = HRNN(module.parameters(), weights=other_rule(**config), other_weights="adapt")
    before = copy.deepcopy(list(twin.state.values()))
    with pytest.raises(ValueError, match=r"The saved (average|log_rate) has shape .* the weights differ"):
        twin.load_state_dict(optimizer.state_dict())
    assert same_state(before, list(twin.state.values()))


def test_a_state_of_more_tensors_cannot_be_adapted():
    _, optimizer = trained()
    twin = HRNN(Regression().head.parameters(), weights=other_rule(), other_weights="adapt")
    with pytest.raises(ValueError, match=r"parameters that this optimizer has not: \['2', '3'\]"):
        twin.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("key", ["lookahead", "log_peak", "gradient_size"])
def test_a_state_with_other_parts_than_the_weights_keep_is_refused(key):
    config = RuleConfig(readouts=("direction", "attention"), slows=True, scale_memory=20, scale_inputs=("trend",))
    optimizer = HRNN([torch.nn.Parameter(torch.ones(2))], weights=HierarchicalRNN(config))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=f"The saved state lacks \\['{key}'\\]"):
        optimizer.load_state_dict(saved)
    plain = HRNN([torch.nn.Parameter(torch.ones(2))], weights=HierarchicalRNN(RuleConfig()))
    saved = copy.deepcopy(plain.state_dict())
    saved["state"][0][key] = torch.zeros(())
    with pytest.raises(ValueError, match=f"The saved state has \\['{key}'\\], which these weights do not keep"):
        plain.load_state_dict(saved)


def test_sizes_of_gradients_are_carried_over_to_other_weights_that_know_them():
    config = RuleConfig(slows=True, scale_memory=20, scale_inputs=("trend",))
    rules = [HierarchicalRNN(config), HierarchicalRNN(config), HierarchicalRNN()]
    params = [torch.nn.Parameter(torch.ones(2)) for _ in rules]
    one, other, without = (
        HRNN([p], weights=rule, other_weights="adapt") for p, rule in zip(params, rules, strict=True)
    )
    params[0].grad = torch.full((2,), 3.0)
    one.step()
    for optimizer in (other, without):
        with pytest.warns(UserWarning, match="Averages, learned rates and ages are kept"):
            optimizer.load_state_dict(one.state_dict())
    assert other.state[params[1]]["log_peak"].item() == pytest.approx(math.log(3))
    assert other.state[params[1]]["gradient_size"].tolist() == pytest.approx([9.0, 9.0, 1.0])
    assert not {"log_peak", "gradient_size"} & without.state[params[2]].keys()


def test_other_weights_must_be_one_of_two():
    with pytest.raises(ValueError, match=r"other_weights must be one of \('refuse', 'adapt'\), not 'hope'"):
        HRNN(Regression().parameters(), other_weights="hope")


def test_a_run_far_beyond_the_horizon_is_warned_of_once(monkeypatch):
    """Also where it goes on from a checkpoint; and not at given rates, where nothing learned is at stake."""
    monkeypatch.setattr("lightning_hrnn.optimizer.optimizer.horizon", lambda card: 0.5)

    def run(steps, optimizer=None, **options):
        param = torch.nn.Parameter(torch.ones(2))
        mine = HRNN([param], **options)
        if optimizer is not None:
            mine.load_state_dict(optimizer.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                param.grad = param.detach().clone()
                mine.step()
        return mine, [warning for warning in caught if "HRNN has taken" in str(warning.message)]

    some, none = run(5)
    assert none == []
    assert run(3, rate="given", lr=1e-3)[1] == run(9, rate="given", lr=1e-3)[1] == []
    for optimizer, steps in ((None, 9), (some, 3)):
        (warning,) = run(steps, optimizer)[1]
        assert f"taken 6 steps with the weights '{SMALL_WEIGHTS}'" in str(warning.message)
        assert warning.filename == __file__
