"""With `rate="given"`, `lr` is the root mean square of every tensor's update; the rule gives the direction."""

import copy
import math

import pytest
import torch
from helpers.modules import Batches, NoOptimizer, Regression, quiet_trainer, same_state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from lightning_hrnn import configure_hrnn
from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import available_kernels
from lightning_hrnn.optimizer.optimizer import HRNN

KERNELS = [name for name in ("eager", "cpp") if available_kernels().get(name) == "available"]


def wild_rule(preset="default"):
    """A rule whose rates would go far from where they start."""
    torch.manual_seed(7)
    rule = HierarchicalRNN(RuleConfig.preset(preset))
    with torch.no_grad():
        for value in rule.rate.parameters():
            value.add_(torch.randn_like(value))
    return rule


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def take(module, optimizer, steps=1, seed=0):
    """Take steps; return the changes of the parameters in each."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for _ in range(steps):
        before = [param.detach().clone() for param in module.parameters()]
        optimizer.zero_grad()
        module(torch.randn(16, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        changes.append([new.detach() - old for new, old in zip(module.parameters(), before, strict=True)])
    return changes


def rms(tensor):
    return tensor.square().mean().sqrt().item()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_every_tensor_moves_by_lr(kernel, preset):
    if preset == "paper" and kernel == "cpp":
        kernel = "auto"
    module = model()
    optimizer = HRNN(module.parameters(), wild_rule(preset), lr=3e-3, rate="given", kernel=kernel)
    for step, changes in enumerate(take(module, optimizer, 12)):
        for change in changes:
            assert rms(change) == pytest.approx(3e-3, rel=2e-3), step
    assert [value.item() for value in optimizer.log_rates()] == pytest.approx([math.log(3e-3)] * 4, abs=1e-5)
    other = model()
    learned = HRNN(other.parameters(), wild_rule(preset), initial_rate=3e-3)
    last = take(other, learned, 12)[-1]
    assert any(abs(math.log(rms(change) / 3e-3)) > 0.1 for change in last)  # the same rule, left to itself


def test_the_length_of_the_run_changes_nothing():
    torch.manual_seed(7)
    inputs = ("tensor", "peak", "length")
    changes = {"anneals": True, "warm_up": 0.5, "vanished": 0.99, "far_fall": 1, "drift_horizon": 2}
    rule = HierarchicalRNN(RuleConfig(drift_inputs=inputs, slows=True, **changes))
    with torch.no_grad():
        for value in rule.rate.parameters():
            value.add_(torch.randn_like(value).abs())
    ends = {}
    for rate in ("given", "learned"):
        for length in (0, 10):
            module = model()
            optimizer = HRNN(module.parameters(), rule, lr=3e-3 if rate == "given" else 1.0, rate=rate)
            optimizer.run_length = length
            take(module, optimizer, 5)
            ends[rate, length] = nn.utils.parameters_to_vector(module.parameters())
    assert torch.equal(ends["given", 0], ends["given", 10])
    assert not torch.equal(ends["learned", 0], ends["learned", 10])


@pytest.mark.parametrize("rate", ["given", "learned"])
def test_bounds_of_the_learned_rate_do_not_bind_given_ones(rate):
    module = model()
    rule = HierarchicalRNN(RuleConfig(size_bound=1e-3, step_bound=1e-3))
    options = {"lr": 0.5, "rate": "given"} if rate == "given" else {"initial_rate": 0.5}
    first, second = take(module, HRNN(module.parameters(), rule, **options), 2)
    for change in (*first, *second):
        assert (rms(change) > 0.49) == (rate == "given")


def test_a_scheduler_sets_the_step():
    module = model()
    optimizer = HRNN(module.parameters(), lr=1e-2, rate="given")
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=5)
    for _ in range(6):
        expected = optimizer.param_groups[0]["lr"]
        (changes,) = take(module, optimizer)
        assert all(rms(change) == pytest.approx(expected, rel=2e-3) for change in changes)
        schedule.step()
    assert expected == pytest.approx(1e-3)


def test_groups_have_rates_of_their_own_and_zero_rests():
    module = model()
    first, second = module[0], module[2]
    groups = [{"params": first.parameters(), "lr": 1e-3}, {"params": second.parameters(), "lr": 0.0}]
    optimizer = HRNN(groups, rate="given")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    changes = take(module, optimizer)[0]
    assert [rms(change) for change in changes[:2]] == pytest.approx([1e-3, 1e-3], rel=2e-3)
    assert all(not change.any() for change in changes[2:])
    after = optimizer.state_dict()["state"]
    shared = {"global_hidden": None}  # the model's, which goes on
    assert all(same_state(after[index] | shared, before[index] | shared) for index in (2, 3))


def test_weight_decay_is_adamws():
    with_decay, without = model(), model()
    take(with_decay, HRNN(with_decay.parameters(), lr=1e-2, weight_decay=0.1, rate="given"))
    take(without, HRNN(without.parameters(), lr=1e-2, rate="given"))
    for one, other, start in zip(with_decay.parameters(), without.parameters(), model().parameters(), strict=True):
        torch.testing.assert_close(other - one, 1e-2 * 0.1 * start, rtol=1e-3, atol=1e-8)


def test_a_run_comes_back_and_copies_go_their_own_way():
    whole, half = model(), model()
    optimizer = HRNN(whole.parameters(), lr=1e-3, rate="given")
    take(whole, optimizer, 3)
    before = HRNN(half.parameters(), lr=1e-3, rate="given")
    take(half, before, 3)
    resumed = HRNN(half.parameters(), lr=5e-3, rate="given")
    resumed.load_state_dict(before.state_dict())
    assert resumed.param_groups[0]["lr"] == 1e-3
    assert same_state(take(half, resumed, 2, seed=1), take(whole, optimizer, 2, seed=1))
    twin_module, twin = copy.deepcopy((whole, optimizer))
    twin.param_groups[0]["lr"] = 2e-3
    assert all(rms(change) == pytest.approx(2e-3, rel=2e-3) for change in take(twin_module, twin)[0])
    assert all(rms(change) == pytest.approx(1e-3, rel=2e-3) for change in take(whole, optimizer)[0])


def test_learned_goes_on_where_given_stopped():
    """The state is the same; the learned rates begin at what was given last."""
    module = model()
    given = HRNN(module.parameters(), lr=2e-3, rate="given")
    take(module, given, 4)
    learned = HRNN(module.parameters())
    learned.load_state_dict(given.state_dict())
    assert [value.item() for value in learned.log_rates()] == pytest.approx([math.log(2e-3)] * 4, abs=1e-5)


def test_bad_uses_name_the_mend():
    params = list(model().parameters())
    with pytest.raises(ValueError, match=r"lr must be a number: with rate='given' it is the rate itself"):
        HRNN(params, rate="given")
    with pytest.raises(ValueError, match="drop initial_rate, and set lr"):
        HRNN(params, lr=1e-3, rate="given", initial_rate=1e-3)
    with pytest.raises(ValueError, match=r"rate must be one of \('learned', 'given'\), not 'mine'"):
        HRNN(params, rate="mine")
    with pytest.raises(ValueError, match="rate must be one of"):
        HRNNOptimizerCallback(rate="mine")
    with pytest.raises(ValueError, match="drop initial_rate"):
        HRNNOptimizerCallback(rate="given", initial_rate=1e-3)
    with pytest.raises(ValueError, match="NoOptimizer configures no optimizer whose learning rate"):
        configure_hrnn(NoOptimizer(), rate="given").configure_optimizers()
    assert HRNN(params).param_groups[0]["lr"] == 1.0


class Watch(Callback):
    """Record learning rates and the size of the updates of one tensor."""

    def __init__(self):
        self.rates, self.moved, self.before = [], [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"] * optimizer.cooldown)
        self.before = pl_module.backbone.weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.moved.append(rms(pl_module.backbone.weight.detach() - self.before))


def test_a_modules_schedule_is_taken_at_its_word(tmp_path):
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = OneCycleLR(optimizer, max_lr=4e-3, total_steps=10)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3)
    schedule, expected = OneCycleLR(plain, max_lr=4e-3, total_steps=10), []
    for _ in range(10):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        if len(expected) < 10:
            schedule.step()
    watch = Watch()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(rate="given"), watch).fit(Regression(configure), Batches(5))
    assert watch.rates == pytest.approx(expected)
    assert watch.moved[:-1] == pytest.approx(expected[:-1], rel=5e-3)  # the last is below single precision


def test_lr_multiplies_the_modules_rates_and_nothing_cools_down(tmp_path):
    watch = Watch()
    callback = HRNNOptimizerCallback(rate="given", lr=0.5)
    quiet_trainer(tmp_path, callback, watch).fit(Regression(), Batches(5))
    assert watch.rates == pytest.approx([1.5e-4] * 10)  # the module's AdamW has 3e-4

    class Rateless(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=1.0)
            for group in self.param_groups:
                group["lr"] = None

    with pytest.raises(MisconfigurationException, match="rate='given' takes the learning rates of Rateless"):
        module = Regression(lambda module: Rateless(module.parameters()))
        quiet_trainer(tmp_path, HRNNOptimizerCallback(rate="given")).fit(module, Batches(2))


def test_the_fallback_takes_the_given_rate():
    optimizer = HRNNWithFallback(model().parameters(), lr=1e-3, rate="given")
    assert optimizer.fallback_lr == 1.0
