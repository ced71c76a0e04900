"""A module's schedulers under HRNN: held still, scaling the learned rates, or refused."""

import copy

import pytest
from helpers.modules import GAN, Batches, Regression, Validated, quiet_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.optim import Adam
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.conversion import Conversion
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.options import HRNNOptions
from lightning_hrnn.schedulers import HeldLR

BASE = 3e-4


class WarmupFromFloor(LRScheduler):
    """A user's own scheduler, with learning rates of its own inside."""

    def __init__(self, optimizer, floor=1e-5, steps=4):
        self.floor, self.steps = floor, steps
        super().__init__(optimizer)

    def get_lr(self):
        share = min(1.0, self.last_epoch / self.steps)
        return [self.floor + share * (base - self.floor) for base in self.base_lrs]


def sequential(optimizer):
    warmup = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch_schedulers.CosineAnnealingLR(optimizer, T_max=6, eta_min=1e-5)
    return torch_schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[3])


def chained(optimizer):
    return torch_schedulers.ChainedScheduler(
        [torch_schedulers.ConstantLR(optimizer, 0.5, total_iters=2), torch_schedulers.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {  # name -> factory, learning rate that stands for a multiplier of one
    "StepLR": (lambda opt: torch_schedulers.StepLR(opt, 2, 0.5), BASE),
    "MultiStepLR": (lambda opt: torch_schedulers.MultiStepLR(opt, [1, 4]), BASE),
    "LambdaLR": (lambda opt: torch_schedulers.LambdaLR(opt, lambda step: 1 / (1 + step)), BASE),
    "LambdaLR from zero": (lambda opt: torch_schedulers.LambdaLR(opt, lambda step: step / 8), BASE),
    "MultiplicativeLR": (lambda opt: torch_schedulers.MultiplicativeLR(opt, lambda step: 0.8), BASE),
    "CosineAnnealingLR": (lambda opt: torch_schedulers.CosineAnnealingLR(opt, 5, eta_min=1e-5), BASE),
    "CosineAnnealingWarmRestarts": (lambda opt: torch_schedulers.CosineAnnealingWarmRestarts(opt, 3), BASE),
    "PolynomialLR": (lambda opt: torch_schedulers.PolynomialLR(opt, 7), BASE),
    "OneCycleLR": (lambda opt: torch_schedulers.OneCycleLR(opt, 2e-3, total_steps=12), 2e-3),
    "CyclicLR": (lambda opt: torch_schedulers.CyclicLR(opt, 1e-4, 1e-3, step_size_up=3, cycle_momentum=False), 1e-3),
    "SequentialLR": (sequential, BASE),
    "ChainedScheduler": (chained, BASE),
    "SWALR": (lambda opt: SWALR(opt, swa_lr=1e-4, anneal_epochs=3), BASE),
    "a user's own": (WarmupFromFloor, BASE),
}


def learning_rates(scheduler, optimizer, steps=10, metrics=None):
    """The learning rate of each group at the start of every step."""
    rates = []
    for step in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*(() if metrics is None else (metrics[step],)))
    return rates


def two_groups(module, ratio):
    return Adam(
        [{"params": module.backbone.parameters(), "lr": BASE * ratio}, {"params": module.head.parameters()}], BASE
    )


@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_keep_multiplies_the_learned_rates_by_scheduled_over_base(name, lr):
    make, base = SCHEDULERS[name]
    old, reference = Adam(Regression().parameters(), BASE), Adam(Regression().parameters(), BASE)
    expected = [[lr * rate / base for rate in rates] for rates in learning_rates(make(reference), reference)]
    [new], [scheduler] = Conversion(([old], [make(old)]), HRNNOptions(lr=lr, schedulers="keep")).result
    seen = learning_rates(scheduler, new)
    assert seen == [pytest.approx(rates, rel=1e-9, abs=1e-15) for rates in expected]
    assert len({tuple(rates) for rates in seen}) > 1, "a schedule that does not move shows nothing"
    assert [type(rate) for rate in scheduler.get_last_lr()] == [float]


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "SequentialLR", "LambdaLR"])
def test_keep_preserves_ratios_between_groups(name):
    make, base = SCHEDULERS[name]
    old, reference = two_groups(Regression(), 0.1), two_groups(Regression(), 0.1)
    expected = [[rate / base for rate in rates] for rates in learning_rates(make(reference), reference)]
    [new], [scheduler] = Conversion(([old], [make(old)]), HRNNOptions(schedulers="keep")).result
    assert learning_rates(scheduler, new) == [pytest.approx(rates, rel=1e-9, abs=1e-15) for rates in expected]


def test_keep_a_plateau_with_its_floor():
    def make(optimizer):
        return torch_schedulers.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, min_lr=5e-5)

    metrics = [1.0, 0.9, 0.95, 0.95, 0.8, 0.9, 0.9, 0.9]
    old, reference = Adam(Regression().parameters(), BASE), Adam(Regression().parameters(), BASE)
    expected = [[r / BASE for r in rates] for rates in learning_rates(make(reference), reference, 8, metrics)]
    [new], [scheduler] = Conversion(([old], [make(old)]), HRNNOptions(schedulers="keep")).result
    assert isinstance(scheduler, torch_schedulers.ReduceLROnPlateau)
    seen = learning_rates(scheduler, new, 8, metrics)
    assert seen == [pytest.approx(rates) for rates in expected]
    assert seen[-1] == pytest.approx([5e-5 / BASE])


def test_a_kept_schedule_does_not_drift():
    """Its numbers are converted there and back at every step."""
    old = Adam(Regression().parameters(), BASE)
    returned = [old], [torch_schedulers.StepLR(old, 10_000)]
    [new], [scheduler] = Conversion(returned, HRNNOptions(lr=0.7, schedulers="keep")).result
    for _ in range(9_999):
        scheduler.optimizer._opt_called = True  # torch's own mark of a step, which would take longer
        scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.7, rel=1e-15)
    assert new.param_groups[0]["initial_lr"] == pytest.approx(0.7, rel=1e-15)


def test_a_kept_scheduler_resumes():
    make, _ = SCHEDULERS["SequentialLR"]

    def converted():
        old = Adam(Regression().parameters(), BASE)
        [new], [scheduler] = Conversion(([old], [make(old)]), HRNNOptions(schedulers="keep")).result
        return new, scheduler

    new, scheduler = converted()
    learning_rates(scheduler, new, 4)
    again, again_scheduler = converted()
    again.load_state_dict(copy.deepcopy(new.state_dict()))
    again_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert learning_rates(again_scheduler, again, 5) == learning_rates(scheduler, new, 5)


@pytest.mark.parametrize("name", [*SCHEDULERS, "ReduceLROnPlateau"])
def test_drop_leaves_no_warm_up_behind(name):
    make = torch_schedulers.ReduceLROnPlateau if name == "ReduceLROnPlateau" else SCHEDULERS[name][0]
    old = Adam(Regression().parameters(), BASE)
    conversion = Conversion(([old], [make(old)]), HRNNOptions(lr=0.5))
    [new], [scheduler] = conversion.result
    assert learning_rates(scheduler, new, 3, metrics=[1, 1, 1]) == [[0.5]] * 3
    assert new.param_groups[0].get("initial_lr", 0.5) == 0.5
    assert scheduler.get_last_lr() == [0.5]
    assert f"Dropped: {type(make(old)).__name__}; schedulers='keep'" in str(conversion)


def test_a_multiplier_of_zero_has_nothing_to_schedule():
    old = Adam(Regression().parameters(), BASE)
    returned = [old], [torch_schedulers.StepLR(old, 1)]
    [new], [scheduler] = Conversion(returned, HRNNOptions(lr=0.0, schedulers="keep")).result
    assert learning_rates(scheduler, new, 3) == [[0.0]] * 3


# ---------------------------------------------------------------- in a fit


class Rates(Callback):
    """Write down the multiplier of every batch, and the metric that a plateau saw."""

    def __init__(self):
        self.seen, self.metrics = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert isinstance(optimizer, HRNN)
        self.seen.append(optimizer.param_groups[0]["lr"])

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.metrics.append(trainer.callback_metrics["val_loss"].item())


@pytest.mark.parametrize("name", ["StepLR", "LambdaLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"])
def test_keep_in_a_fit(tmp_path, name):
    make, base = SCHEDULERS[name]

    def configure(module):
        optimizer = Adam(module.parameters(), BASE)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    rates, reference = Rates(), Adam(Regression().parameters(), BASE)
    callback = HRNNOptimizerCallback(schedulers="keep")
    quiet_trainer(tmp_path, callback, rates).fit(Regression(configure), Batches(5))
    assert rates.seen == pytest.approx([rate / base for [rate] in learning_rates(make(reference), reference)])


def test_keep_a_plateau_in_a_fit(tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters(), BASE)
        plateau = torch_schedulers.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)  # "max": it falls, so
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}

    rates, batches = Rates(), Batches(2)
    callback = HRNNOptimizerCallback(schedulers="keep")
    quiet_trainer(tmp_path, callback, rates, max_epochs=4).fit(Validated(configure), batches, batches)
    assert rates.metrics == sorted(rates.metrics, reverse=True)
    assert rates.seen == [1.0] * 4 + [0.5] * 2 + [0.25] * 2


def test_schedulers_stepped_and_read_by_hand_go_on_working(tmp_path):
    def configure(module):
        optimizers = Adam(module.generator.parameters(), 1e-4), Adam(module.critic.parameters(), 4e-4)
        return list(optimizers), [torch_schedulers.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]

    for policy, expected in (("drop", 1.0), ("keep", 0.5**3)):
        trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(schedulers=policy), max_epochs=1)
        gan = GAN(configure)
        trainer.fit(gan, Batches(3))
        assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [expected] * 2
        assert [scheduler.get_last_lr() for scheduler in gan.lr_schedulers()] == [[expected]] * 2


def test_refuse_names_the_scheduler(tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters())
        return [optimizer], [torch_schedulers.StepLR(optimizer, 1)]

    callback = HRNNOptimizerCallback(schedulers="refuse")
    with pytest.raises(MisconfigurationException, match=r"returned a StepLR and schedulers='refuse'.*'drop' or 'keep'"):
        quiet_trainer(tmp_path, callback).fit(Regression(configure), Batches())
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(Regression(), Batches(1))


class Foreign:
    """A scheduler of another library, as timm's: the module itself says how it is stepped."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step_update(self, updates):
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 / updates

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_scheduler_that_cannot_be_kept_is_named(tmp_path):
    def configure(module):
        optimizer = Adam(module.parameters())
        return [optimizer], [{"scheduler": Foreign(optimizer), "interval": "step"}]

    class StepsForeign(Regression):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch)

    module = StepsForeign(configure)
    with pytest.raises(MisconfigurationException, match=r"cannot keep Foreign: it is no torch.optim.lr_scheduler"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback(schedulers="keep")).fit(module, Batches())
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback())
    trainer.fit(module, Batches())
    assert isinstance(module.lr_schedulers(), HeldLR)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0


class WarmsUpByHand(Regression):
    """The warm-up of Lightning's own documentation, in steps of AdamW."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.global_step + 1) / 500) * BASE


def test_step_lengths_written_over_the_multiplier_are_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match=r"set the lr of param group 0 to 6e-07.*multiplier.*optimizer_step") as said:
        quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(WarmsUpByHand(), Batches())
    assert len([one for one in said if "multiplier" in str(one.message)]) == 1
