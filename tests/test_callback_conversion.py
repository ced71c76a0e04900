"""What `configure_optimizers` returns comes back in its shape, group by group, with HRNN in it."""

import pytest
import torch
from helpers.modules import GAN, SMALL_WEIGHTS, Batches, Regression, adamw, quiet_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.conversion import Conversion
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.options import HRNNOptions
from lightning_hrnn.schedulers import HeldLR


def convert(returned, **options):
    return Conversion(returned, HRNNOptions(**options)).result


def with_scheduler(module):
    optimizer = adamw(module)
    return optimizer, StepLR(optimizer, 1)


def two_lists(module):
    optimizer, scheduler = with_scheduler(module)
    return [optimizer], [scheduler]


def two_lists_with_settings(module):
    optimizer, scheduler = with_scheduler(module)
    return [optimizer], [{"scheduler": scheduler, "interval": "step", "name": "mine"}]


def list_and_scheduler(module):
    optimizer, scheduler = with_scheduler(module)
    return [optimizer], scheduler


def scheduler_first(module):
    optimizer, scheduler = with_scheduler(module)
    return {"lr_scheduler": {"scheduler": scheduler, "interval": "step"}, "optimizer": optimizer}


def plateau(module):
    optimizer = adamw(module)
    return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"}


SHAPES = {  # name -> configure_optimizers, schedulers that Lightning ends up with
    "one": (adamw, 0),
    "list": (lambda module: [adamw(module)], 0),
    "tuple": (lambda module: (adamw(module),), 0),
    "two lists": (two_lists, 1),
    "two lists, settings": (two_lists_with_settings, 1),
    "two lists, no scheduler": (lambda module: ([adamw(module)], []), 0),
    "list and scheduler": (list_and_scheduler, 1),
    "dict": (lambda module: {"optimizer": adamw(module)}, 0),
    "dict, scheduler first": (scheduler_first, 1),
    "dict, plateau": (plateau, 1),
    "list of dicts": (
        lambda module: [dict(zip(("optimizer", "lr_scheduler"), with_scheduler(module), strict=True))],
        1,
    ),
}


@pytest.mark.parametrize("schedulers", ["drop", "keep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains(tmp_path, shape, schedulers):
    configure, count = SHAPES[shape]

    class Logged(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    module = Logged(configure)
    before = module.head.weight.detach().clone()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(schedulers=schedulers))
    trainer.fit(module, Batches(2))
    assert [type(optimizer) for optimizer in trainer.optimizers] == [HRNN]
    assert len(trainer.lr_scheduler_configs) == count
    for config in trainer.lr_scheduler_configs:
        assert config.scheduler.optimizer is trainer.optimizers[0]
        assert isinstance(config.scheduler, HeldLR) == (schedulers == "drop")
    if "settings" in shape:
        assert (trainer.lr_scheduler_configs[0].interval, trainer.lr_scheduler_configs[0].name) == ("step", "mine")
    assert not torch.equal(module.head.weight, before)


def test_none_stays_none(tmp_path, caplog):
    module = Regression(lambda module: None)
    before = module.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="will run with no optimizer"), caplog.at_level("INFO"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(module, Batches(2))
    assert torch.equal(module.head.weight, before)
    assert "nothing to replace" in caplog.text


@pytest.mark.parametrize("returned", ["adam", {"model": 1}, 3, [3]])
def test_what_lightning_refuses_is_left_for_it_to_name(returned):
    assert convert(returned) == returned


def test_optimizers_keep_their_number_and_order(tmp_path):
    gan = GAN()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    before = [module.weight.detach().clone() for module in (gan.generator, gan.critic)]
    trainer.fit(gan, Batches())
    for optimizer, module, old in zip(trainer.optimizers, (gan.generator, gan.critic), before, strict=True):
        assert type(optimizer) is HRNN
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
        assert not torch.equal(module.weight, old)
        assert {int(state["age"]) for state in optimizer.state.values()} == {5}
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.5, 0.9)
    assert trainer.optimizers[1].param_groups[0]["alpha"] == 0.99
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [1.0, 1.0]


def test_schedulers_of_several_optimizers_stay_with_theirs():
    gan = GAN()
    generate, criticise = gan.configure_optimizers()
    returned = [generate, criticise], [StepLR(criticise, 1), StepLR(generate, 1)]
    optimizers, schedulers = convert(returned, schedulers="keep")
    assert [scheduler.optimizer for scheduler in schedulers] == optimizers[::-1]


def test_a_second_mention_is_the_same_optimizer():
    optimizer = adamw(Regression())
    first, second = convert([optimizer, optimizer])
    assert first is second


def test_hrnn_stays_as_it_is():
    module = Regression()
    optimizer = HRNN(module.parameters(), lr=0.3)
    scheduler = StepLR(optimizer, 1)
    for policy in ("drop", "keep", "refuse"):
        assert convert(([optimizer], [scheduler]), lr=0.5, schedulers=policy) == [[optimizer], [scheduler]]
    assert type(scheduler) is StepLR
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_lightnings_own_wrapper_is_opened():
    module = Regression()
    wrapped = LightningOptimizer(adamw(module))
    assert type(convert(wrapped)) is HRNN
    (optimizer,) = convert([wrapped])
    assert type(optimizer) is HRNN


# ---------------------------------------------------------------- param groups


def groups_of(module, **extra):
    backbone, head = list(module.backbone.parameters()), list(module.head.parameters())
    return [
        {"params": backbone, "lr": 1e-4, "weight_decay": 0.0, "name": "backbone", **extra},
        {"params": head, "name": "head"},
    ]


def test_every_key_of_every_group_is_kept():
    module = Regression()
    old = AdamW(groups_of(module, note="mine"), lr=1e-3, weight_decay=0.05)
    new = convert(old)
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        assert before.keys() <= after.keys()
        assert all(a is b for a, b in zip(before["params"], after["params"], strict=True))
        assert after["params"] is not before["params"]
        for key in before.keys() - {"params", "lr"}:
            assert after[key] == before[key], key
    assert [group["lr"] for group in old.param_groups] == [1e-4, 1e-3]


def test_learning_rates_become_ratios_to_the_largest():
    module = Regression()
    conversion = Conversion(AdamW(groups_of(module), lr=1e-3), HRNNOptions(lr=0.5))
    assert [group["lr"] for group in conversion.result.param_groups] == pytest.approx([0.05, 0.5])
    assert "lower learning rate keep the ratio: 0.1" in str(conversion)


@pytest.mark.parametrize("lr", [3e-4, 0.1, 1e-3, 7e-5])
def test_the_largest_learning_rate_becomes_the_multiplier_exactly(lr):
    for multiplier in (1.0, 0.0):
        (group,) = convert(SGD(Regression().parameters(), lr=lr), lr=multiplier).param_groups
        assert group["lr"] == multiplier


def test_learning_rates_may_be_zero_missing_or_tensors():
    module = Regression()
    backbone, head = module.backbone.parameters(), module.head.parameters()
    frozen = convert(SGD([{"params": backbone, "lr": 0.0}, {"params": head}], lr=0.1))
    assert [group["lr"] for group in frozen.param_groups] == [0.0, 1.0]
    assert convert(SGD(module.parameters(), lr=0.0)).param_groups[0]["lr"] == 0.0
    tensor = convert(Adam(module.parameters(), lr=torch.tensor(1e-3), capturable=True, foreach=True))
    assert tensor.param_groups[0]["lr"] == 1.0
    assert type(tensor.param_groups[0]["lr"]) is float
    adafactor = torch.optim.Adafactor(module.parameters())
    adafactor.param_groups[0]["lr"] = None
    assert convert(adafactor).param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ([0.0, 0.05], None, [0.0, 0.05]),
        ([0.0, 0.05], 0.1, [0.0, 0.1]),  # biases stay without
        ([0.0, 0.0], 0.1, [0.1, 0.1]),
        ([0.02, 0.05], 0.0, [0.0, 0.0]),
    ],
)
def test_weight_decay(own, asked, expected):
    groups = groups_of(Regression())
    for group, decay in zip(groups, own, strict=True):
        group["weight_decay"] = decay
    converted = convert(AdamW(groups, lr=1e-3), weight_decay=asked)
    assert [group["weight_decay"] for group in converted.param_groups] == expected


def test_optimizers_without_weight_decay_get_none():
    assert convert(torch.optim.Rprop(Regression().parameters())).param_groups[0]["weight_decay"] == 0.0


def test_named_parameters_keep_their_names():
    module = Regression()
    old = AdamW(module.named_parameters(), lr=1e-3)
    assert convert(old).param_groups[0]["param_names"] == [name for name, _ in module.named_parameters()]


def test_groups_and_frozen_parameters_in_a_fit(tmp_path):
    module = Regression(lambda module: RMSprop(groups_of(module), lr=1e-3))
    module.backbone.bias.requires_grad_(False)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    trainer.fit(module, Batches())
    still = [name for name, param in module.named_parameters() if torch.equal(param, before[name])]
    assert still == ["backbone.bias"]
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["backbone", "head"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "stand in for LBFGS: it evaluates the closure many times"),
        (torch.optim.SparseAdam, "stand in for SparseAdam: it takes sparse gradients.*sparse=False"),
        (lambda params: SGD(params, lr=0.1, maximize=True), r"SGD\(maximize=True\): it minimises. Negate the loss"),
    ],
)
def test_optimizers_that_cannot_be_stood_in_for(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        convert(make(list(Regression().parameters())))


def test_many_optimizers_of_a_kind_are_counted():
    gan = GAN()
    both = [Adam(gan.generator.parameters()), Adam(gan.critic.parameters())]
    said = str(Conversion(both, HRNNOptions(lr=0.5)))
    assert said.startswith(f"2 x Adam -> HRNN (weights: {SMALL_WEIGHTS}, lr: 0.5 x")
