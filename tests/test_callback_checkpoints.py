"""A run that is stopped and resumed is the run that was not; checkpoints of other optimizers are told apart."""

import pytest
import torch
from helpers.modules import SMALL_WEIGHTS, Batches, Regression, adamw, attentive_rule, quiet_trainer, same_state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.hierarchical_rnn import SmallModels
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import fingerprint, load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Logged(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("swing", abs(self.current_epoch - 1.0))  # best in the second epoch, which ends with the save
        return loss


def every_epoch(folder):
    return ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)


def scheduled(make):
    def configure(module):
        optimizer = adamw(module)
        scheduler = {"scheduler": make(optimizer), "interval": "epoch", "monitor": "swing"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return configure


def by_steps(module):
    optimizer = adamw(module)
    scheduler = OneCycleLR(optimizer, 1e-3, total_steps=30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


CASES = {  # name -> configure_optimizers, options, weights
    "plain": (adamw, {}, None),
    "dropped StepLR": (scheduled(lambda opt: StepLR(opt, 1, 0.5)), {}, None),
    "kept StepLR": (scheduled(lambda opt: StepLR(opt, 1, 0.5)), {"schedulers": "keep"}, None),
    "kept OneCycleLR": (by_steps, {"schedulers": "keep", "lr": 0.7}, None),
    "kept plateau": (scheduled(lambda opt: ReduceLROnPlateau(opt, patience=0)), {"schedulers": "keep"}, None),
    "attention": (adamw, {}, attentive_rule),
}


@pytest.mark.parametrize("case", CASES)
def test_two_and_two_epochs_are_four(tmp_path, case):
    configure, options, weights = CASES[case]
    options = {**options, **({"weights": weights()} if weights else {})}

    def run(**fit):
        module = Logged(configure)
        trainer = quiet_trainer(
            tmp_path,
            HRNNOptimizerCallback(**options),
            every_epoch(tmp_path / "saved"),
            max_epochs=4,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
        )
        trainer.fit(module, Batches(5), **fit)
        return module, trainer

    whole, trainer = run()
    path = tmp_path / "saved" / "epoch=1.ckpt"
    resumed, second = run(ckpt_path=path)
    assert same_state(whole.state_dict(), resumed.state_dict())
    assert same_state(trainer.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    states = [[config.scheduler.state_dict() for config in t.lr_scheduler_configs] for t in (trainer, second)]
    if case == "kept plateau":  # Lightning steps it after it has saved: with any optimizer that step is forgotten
        assert [state.pop("last_epoch") for [state] in states] == [4, 3]
        assert [state.pop("best") for [state] in states] == [0.0, 1.0]
        assert states[0][0]["_last_lr"][0] < 0.02  # of a multiplier of 1: lowered twice since
    assert same_state(*states)
    assert second.global_step == trainer.global_step == 12
    content = torch.load(path, weights_only=True)  # tensors and plain values only
    assert content["optimizer_states"][0]["state"][0]["age"] == 6
    early = content["state_dict"]
    assert not same_state(early, dict(whole.state_dict()))


def test_checkpoints_hold_the_true_weights(tmp_path):
    """Also those written between batches of an accumulation window, and without the optimizer."""
    true = []

    class Snapshots(Regression):
        def on_train_batch_end(self, *_):
            true.append({name: value.clone() for name, value in self.state_dict().items()})

    full, light = tmp_path / "full", tmp_path / "light"
    saves = [
        ModelCheckpoint(full, every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(light, every_n_train_steps=3, save_weights_only=True),
    ]
    trainer = quiet_trainer(
        tmp_path, *saves, HRNNOptimizerCallback(attentive_rule()), max_epochs=1, enable_checkpointing=True
    )
    trainer.fit(Snapshots(), Batches(3))
    files = sorted(full.glob("*.ckpt"))
    assert len(files) == 3
    for file, weights in zip(files, true, strict=True):
        assert same_state(dict(torch.load(file, weights_only=True)["state_dict"]), weights)
    (file,) = light.glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    assert same_state(dict(content["state_dict"]), true[-1])
    assert "optimizer_states" not in content


def test_a_checkpoint_written_on_an_exception_holds_the_true_weights(tmp_path):
    class Fails(Regression):
        def on_before_backward(self, loss):
            if self.global_step == 2:
                raise RuntimeError("at the attended weights")

    module, rule = Fails(), attentive_rule()
    trainer = quiet_trainer(
        tmp_path, OnExceptionCheckpoint(tmp_path), HRNNOptimizerCallback(rule), enable_checkpointing=True
    )
    with (
        pytest.warns(UserWarning, match="no last checkpoint available|last model of the previous"),
        pytest.raises(RuntimeError, match="at the attended weights"),
    ):
        trainer.fit(module, Batches())
    reference = Regression()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(rule), max_epochs=1).fit(reference, Batches(2))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    assert same_state(dict(saved), dict(reference.state_dict()))
    assert same_state(dict(module.state_dict()), dict(reference.state_dict()))


class Unfreeze(BaseFinetuning):
    """Train the head first, the backbone from the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, current_epoch, optimizer):
        if current_epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
        elif current_epoch > 1:  # resumed: Lightning restores the group, but not `requires_grad`
            self.make_trainable(pl_module.backbone)


@pytest.mark.parametrize("options", [{}, {"rate": "given"}, {"on_divergence": "adamw"}], ids=str)
@pytest.mark.parametrize("below", [0, 8, 1000])  # parameters; the head has 7
def test_finetuning_adds_a_group_and_resumes(tmp_path, below, options):
    rule = load_pretrained()
    small, rule.small = rule.small.rule, SmallModels(below, rule.small.rule)

    def head_first(module):
        return torch.optim.Adam(filter(lambda param: param.requires_grad, module.parameters()), lr=1e-3)

    def run(**fit):
        module = Regression(head_first)
        frozen = module.backbone.weight.detach().clone()
        trainer = quiet_trainer(
            tmp_path,
            HRNNOptimizerCallback(rule, **options),
            Unfreeze(),
            every_epoch(tmp_path / "saved"),
            max_epochs=4,
            enable_checkpointing=True,
        )
        trainer.fit(module, Batches(2), **fit)
        assert not torch.equal(module.backbone.weight, frozen)
        return module, trainer

    module, trainer = run()
    (optimizer,) = trainer.optimizers
    assert (fingerprint(optimizer.rule) == fingerprint(small)) == (below == 1000 and "rate" not in options)
    assert [group["lr"] for group in optimizer.param_groups] == ([1e-3, 1e-4] if "rate" in options else [1.0, 0.1])
    assert {int(optimizer.state[param]["age"]) for param in module.head.parameters()} == {8}
    assert {int(optimizer.state[param]["age"]) for param in module.backbone.parameters()} == {6}
    resumed, second = run(ckpt_path=tmp_path / "saved" / "epoch=2.ckpt")
    assert same_state(module.state_dict(), resumed.state_dict())
    assert same_state(optimizer.state_dict(), second.optimizers[0].state_dict())
    early, third = run(ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")  # before the backbone joined
    assert same_state(module.state_dict(), early.state_dict())
    assert same_state(optimizer.state_dict()["state"], third.optimizers[0].state_dict()["state"])


# ---------------------------------------------------------------- other optimizers' checkpoints


def checkpoint(tmp_path, module, *callbacks):
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=1)
    trainer.fit(module, Batches(2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


@pytest.mark.parametrize("configure", [adamw, lambda module: torch.optim.SGD(module.parameters(), lr=0.1)])
def test_another_optimizers_checkpoint_is_refused(tmp_path, configure):
    path, module = checkpoint(tmp_path, Regression(configure)), Regression(configure)
    with pytest.raises(MisconfigurationException, match=r"(?s)another optimizer.*without HRNN.*load_from_checkpoint"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(module, Batches(2), ckpt_path=path)
    assert "configure_optimizers" not in vars(module)
    quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1).fit(  # the mend it names
        Regression.load_from_checkpoint(path, configure=configure), Batches(2)
    )


def test_evaluation_does_not_mind_whose_checkpoint_it_is(tmp_path):
    class Tested(Regression):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

    path = checkpoint(tmp_path, Tested())
    (result,) = quiet_trainer(tmp_path, HRNNOptimizerCallback()).test(
        Tested(), Batches(2), ckpt_path=path, verbose=False
    )
    assert result["test_loss"] > 0


def test_resuming_without_the_callback_names_it(tmp_path):
    path = checkpoint(tmp_path, Regression(), HRNNOptimizerCallback())
    with (
        pytest.raises(KeyError, match="step"),
        pytest.warns(UserWarning, match="Please add the following callbacks: .*HRNNOptimizerCallback"),
    ):
        quiet_trainer(tmp_path).fit(Regression(), Batches(2), ckpt_path=path)


def test_other_weights_are_told_apart_when_resuming(tmp_path):
    path = checkpoint(tmp_path, Regression(), HRNNOptimizerCallback())
    other = HRNNOptimizerCallback(attentive_rule())
    with pytest.raises(ValueError, match=f"made with the weights '{SMALL_WEIGHTS}'"):
        quiet_trainer(tmp_path, other).fit(Regression(), Batches(2), ckpt_path=path)


def test_other_weights_are_adapted_if_asked_for(tmp_path):
    path, module = checkpoint(tmp_path, Regression(), HRNNOptimizerCallback()), Regression()
    callback = HRNNOptimizerCallback(attentive_rule(), other_weights="adapt")
    trainer = quiet_trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=rf"made with the weights '{SMALL_WEIGHTS}'.*hidden states start anew"):
        trainer.fit(module, Batches(2), ckpt_path=path)
    (optimizer,) = trainer.optimizers
    assert optimizer.uses_attention
    assert {int(state["age"]) for state in optimizer.state.values()} == {trainer.global_step} == {4}


def test_the_state_keeps_single_precision(tmp_path):
    def run(max_epochs, **fit):
        module = Regression()
        callback = HRNNOptimizerCallback(cooldown=0)  # which the half run would end with
        trainer = quiet_trainer(tmp_path, callback, max_epochs=max_epochs, precision="bf16-true")
        trainer.fit(module, Batches(3), **fit)
        return module, trainer

    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = run(2, ckpt_path=tmp_path / "half.ckpt")
    whole, _ = run(2)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, HRNN)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert {param.dtype for param in resumed.parameters()} == {torch.bfloat16}
    assert same_state(resumed.state_dict(), whole.state_dict())


def backwards(module):
    """Two groups against the order of the module, two tensors of one shape among them."""
    layers = (module.twin, module.backbone)
    return torch.optim.AdamW([{"params": [layer.bias, layer.weight]} for layer in layers], lr=3e-4)


class Twins(Regression):
    """The twin has the shapes of the backbone, and the head is not trained."""

    def __init__(self):
        super().__init__(backwards)
        self.twin = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.head((self.backbone(x) + self.twin(-x)).tanh())


def test_a_file_numbers_parameters_as_the_module_does(tmp_path):
    """So that a strategy that goes by the module's order reads it right; torch goes by the places in the groups."""
    module = Twins()
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    trainer.fit(module, Batches(3))
    (optimizer,) = trainer.optimizers
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    (saved,) = torch.load(tmp_path / "file.ckpt", weights_only=True)["optimizer_states"]
    assert [group["params"] for group in saved["param_groups"]] == [[5, 4], [1, 0]]
    for place, param in enumerate(module.parameters()):
        assert (place in saved["state"]) == (param in optimizer.state)
        if param in optimizer.state:
            assert same_state(saved["state"][place], optimizer.state[param])
    again = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    other = Twins()
    again.fit(other, Batches(3), ckpt_path=tmp_path / "file.ckpt")
    for theirs, ours in zip(other.parameters(), module.parameters(), strict=True):
        if ours in optimizer.state:
            assert same_state(again.optimizers[0].state[theirs], optimizer.state[ours])
