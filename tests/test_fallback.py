"""`HRNNWithFallback` is `HRNN`, and after its fall AdamW, for whoever holds it."""

import copy
import io
import pickle

import pytest
import torch
from helpers.modules import Batches, Regression, attentive_rule, same_state
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.optimizer import HRNN


def groups(module):
    return [
        {"params": list(module.backbone.parameters()), "lr": 0.1, "weight_decay": 0.0},
        {"params": list(module.head.parameters()), "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def adamws(module, lr):
    """The same groups in AdamW's own unit."""
    return AdamW([{**group, "lr": group.get("lr", 1.0) * lr} for group in groups(module)])


def train(optimizer, module, batches, scheduler=None):
    for batch in batches:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def fallen():
    """A module, its optimizer three steps before and two after the fall, and AdamW's run from the same weights."""
    module, plain = Regression(), Regression()
    optimizer = HRNNWithFallback(groups(module), fallback_lr=1e-2)
    train(optimizer, module, Batches(3))
    optimizer.fall_back()
    plain.load_state_dict(weights(module))
    adamw = adamws(plain, 1e-2)
    for opt, net in ((optimizer, module), (adamw, plain)):
        train(opt, net, Batches(2, seed=1))
    return module, optimizer, plain, adamw


def test_until_it_falls_it_is_hrnn():
    ours, theirs = Regression(), Regression()
    optimizer, plain = HRNNWithFallback(groups(ours)), HRNN(groups(theirs))
    train(optimizer, ours, Batches(3))
    train(plain, theirs, Batches(3))
    assert same_state(weights(ours), weights(theirs))
    assert same_state(optimizer.state_dict(), plain.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    assert not optimizer.fallen_back


def test_from_then_on_it_is_adamw_group_by_group(fallen):
    module, optimizer, plain, adamw = fallen
    assert same_state(weights(module), weights(plain))
    assert same_state(optimizer.state_dict()["state"], adamw.state_dict()["state"])
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert [rate.exp().item() for rate in optimizer.log_rates()] == pytest.approx([1e-2] * 4)


def test_a_schedule_and_the_cooldown_go_on():
    module, plain = Regression(), Regression()
    optimizer, adamw = HRNNWithFallback(groups(module), fallback_lr=1e-2), adamws(plain, 1e-2)
    scheduler = CosineAnnealingLR(optimizer, 10)
    train(optimizer, module, Batches(4), scheduler)
    optimizer.fall_back()
    plain.load_state_dict(weights(module))
    optimizer.cooldown = 0.5
    for batch in Batches(3, seed=1):
        for mine, theirs in zip(optimizer.param_groups, adamw.param_groups, strict=True):
            theirs["lr"] = mine["lr"] * 0.5 * 1e-2
        train(adamw, plain, [batch])
        train(optimizer, module, [batch], scheduler)
    assert same_state(weights(module), weights(plain))
    assert optimizer.param_groups[1]["lr"] < 0.7


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_going_on_from_a_copy_equals_no_stop(fallen, way):
    module, optimizer, *_ = fallen
    if way in ("state_dict", "torch.save"):
        saved = copy.deepcopy(optimizer.state_dict())
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        net = Regression()
        net.load_state_dict(weights(module))
        twin = HRNNWithFallback(groups(net), fallback_lr=0.5)
        twin.load_state_dict(saved)
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        net, twin = copied((module, optimizer))
    assert twin.fallen_back
    assert twin.fallback_lr == 1e-2
    train(optimizer, module, Batches(3, seed=2))
    train(twin, net, Batches(3, seed=2))
    assert same_state(weights(module), weights(net))
    assert same_state(optimizer.state_dict(), twin.state_dict())


def test_a_state_from_before_the_fall_undoes_it(fallen):
    _, optimizer, *_ = fallen
    module = Regression()
    before = HRNN(groups(module))
    train(before, module, Batches(2))
    optimizer.load_state_dict(before.state_dict())
    assert not optimizer.fallen_back
    assert same_state(optimizer.state_dict(), before.state_dict())


@pytest.mark.parametrize("foreign", ["another optimizer's", "other weights'"])
def test_a_refused_state_leaves_the_fall_as_it_was(fallen, foreign):
    module, optimizer, plain, adamw = fallen
    other = Regression()
    theirs = AdamW(groups(other)) if foreign.startswith("another") else HRNN(groups(other), attentive_rule())
    train(theirs, other, Batches(1))
    with pytest.raises(ValueError, match=r"another optimizer's|made with the weights"):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.fallen_back
    for opt, net in ((optimizer, module), (adamw, plain)):
        train(opt, net, Batches(2, seed=3))
    assert same_state(weights(module), weights(plain))


def test_a_refused_state_of_a_fall_leaves_the_rule_as_it_was(fallen):
    _, optimizer, *_ = fallen
    module, twin = Regression(), Regression()
    stepping, other = HRNNWithFallback(groups(module), fallback_lr=0.3), HRNNWithFallback(groups(twin))
    for opt, net in ((stepping, module), (other, twin)):
        train(opt, net, Batches(2))
    saved = optimizer.state_dict()
    saved["param_groups"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        stepping.load_state_dict(saved)
    assert not stepping.fallen_back
    assert stepping.fallback_lr == 0.3
    for opt, net in ((stepping, module), (other, twin)):
        train(opt, net, Batches(2, seed=3))
    assert same_state(weights(module), weights(twin))
    assert same_state(stepping.state_dict(), other.state_dict())


def test_plain_hrnn_refuses_the_state_with_the_mend(fallen):
    _, optimizer, *_ = fallen
    with pytest.raises(ValueError, match=r"state is AdamW's, to which HRNN had fallen back.*HRNNWithFallback.*'adamw'"):
        HRNN(groups(Regression())).load_state_dict(optimizer.state_dict())


def test_a_group_added_after_the_fall_joins_adamw():
    module = Regression()
    optimizer = HRNNWithFallback(groups(module)[:1])
    train(optimizer, module, Batches(1))
    optimizer.fall_back()
    optimizer.add_param_group(groups(module)[1])
    before = weights(module)
    train(optimizer, module, Batches(1))
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 4


def test_no_multiplier_no_move_and_nothing_from_a_gradient_that_is_not_finite(fallen):
    module, optimizer, *_ = fallen
    before = copy.deepcopy((weights(module), optimizer.state_dict()["state"]))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, module, Batches(1))
    assert same_state(before, (weights(module), optimizer.state_dict()["state"]))
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    module.head.bias.grad.fill_(float("nan"))
    with pytest.warns(UserWarning, match="HRNN skipped a step"):
        optimizer.step()
    assert same_state(before, (weights(module), optimizer.state_dict()["state"]))
    assert optimizer.skipped_steps == 1


def test_closure_and_hooks_once_and_no_more_attention():
    module = Regression()
    optimizer = HRNNWithFallback(module.parameters(), weights=attentive_rule())
    train(optimizer, module, Batches(2))
    optimizer.begin_attention()
    true = [param.detach().clone() for param in optimizer._true_weights.values()]
    optimizer.fall_back()
    assert same_state([param.detach() for param in module.parameters()], true)
    assert not optimizer.uses_attention
    calls, (batch,) = [], Batches(1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == ["before", True]


def test_out_of_range():
    with pytest.raises(ValueError, match="fallback_lr must be positive, not 0"):
        HRNNWithFallback(Regression().parameters(), fallback_lr=0)
