"""Fits that diverge: stopped with a clear message, or gone on with as AdamW from the last good weights."""

import copy

import pytest
import torch
from helpers.modules import GAN, Batches, Regression, adamw, attentive_rule, quiet_trainer, same_state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback, configure_hrnn
from lightning_hrnn.divergence import DivergenceError
from lightning_hrnn.optimizer.fallback import HRNNWithFallback
from lightning_hrnn.optimizer.optimizer import HRNN

pytestmark = pytest.mark.filterwarnings("ignore:HRNN skipped a step")


class Diverges(Regression):
    """Has no finite loss from its `at`-th batch on, for as long as HRNN trains it (or for ever, or for `batches`)."""

    def __init__(self, configure=adamw, at=3, batches=10**9, for_ever=False, what="loss"):
        super().__init__(configure)
        self.at, self.until, self.for_ever, self.what = at, at + batches, for_ever, what
        self.norm = nn.BatchNorm1d(4)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        index, self.seen = self.seen, self.seen + 1
        optimizers = self.trainer.optimizers
        fallen = all(getattr(optimizer, "fallen_back", False) for optimizer in optimizers)
        bad = self.at <= index < self.until and (self.for_ever or not fallen)
        self.norm(batch[0] * (float("nan") if bad else 1.0))  # statistics go bad too
        loss = self.loss(batch)
        if not bad:
            return loss
        return loss * float("nan") if self.what == "loss" else loss + (loss * float("inf")).detach()

    def configure_optimizers(self):
        return self.configure(self)


def fit(tmp_path, module, batches=30, callbacks=(), **options):
    trainer_options = {key: options.pop(key) for key in ("plugins", "accumulate_grad_batches") if key in options}
    callback = HRNNOptimizerCallback(**{"cooldown": 0.0, "telemetry": "off", **options})
    trainer = quiet_trainer(tmp_path, callback, *callbacks, max_epochs=1, **trainer_options)
    trainer.fit(module, Batches(batches))
    return trainer


def params(module):
    return [param.detach().clone() for param in module.parameters()]


class After(Callback):
    """Copies the weights after every batch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(params(pl_module))


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize("what", ["loss", "value alone"])
def test_a_fit_that_diverges_stops_and_says_what_to_do(tmp_path, what):
    """By gradients that are not finite, or by a loss whose gradients are."""
    module, after = Diverges(what=what, for_ever=True), After()
    with pytest.raises(DivergenceError, match=r"not finite for 4 steps in a row.*detect_anomaly.*'adamw'.*'ignore'"):
        fit(tmp_path, module, patience=4, callbacks=[after])
    assert module.seen == 8  # seen at the next look: three good ones, then five
    assert "configure_optimizers" not in vars(module)
    assert all(param.isfinite().all() for param in module.parameters())
    assert same_state(params(module), after.weights[2]) == (what == "loss")  # skipped since


def test_the_device_is_asked_every_few_steps_only(tmp_path, monkeypatch):
    asked, read = [], []
    monkeypatch.setattr("lightning_hrnn.divergence._any_rank", lambda trainer, bad: asked.append(trainer.global_step))
    monkeypatch.setattr(HRNN, "skipped_steps", property(lambda self: read.append(1) or 0))  # on a GPU it has to wait
    fit(tmp_path, Regression(), 30, patience=50)
    assert asked == [10, 20, 30]
    assert len(read) == 4  # at the start, and with each question


@pytest.mark.parametrize(("batches", "patience"), [(10**9, "ignore"), (3, 4), (19, 20)])
def test_what_is_ignored_or_passes_goes_on(tmp_path, batches, patience):
    module = Diverges(batches=batches, for_ever=True)
    options = {"on_divergence": "ignore"} if patience == "ignore" else {"patience": patience}
    trainer = fit(tmp_path, module, **options)
    assert module.seen == trainer.global_step == 30
    assert trainer.optimizers[0].skipped_steps == min(27, batches)
    assert type(trainer.optimizers[0]) is HRNN


def test_a_scaler_that_skips_for_ever_is_noticed(tmp_path):
    """It does not call the optimizer at all, so the optimizer counts nothing."""
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=128.0))
    module = Diverges(for_ever=True)
    with pytest.raises(DivergenceError, match="for 5 steps in a row"):
        fit(tmp_path, module, patience=5, plugins=[plugin])
    assert module.seen == 10


def test_a_gan_by_hand_is_watched_by_its_gradients(tmp_path):
    class Broken(GAN):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            real, target = batch
            super().training_step((real * float("nan"), target), batch_idx)

    module = Broken()
    with pytest.raises(DivergenceError, match="for 3 steps in a row"):
        fit(tmp_path, module, patience=3)
    assert module.seen == 3


# ---------------------------------------------------------------- fall back


def with_groups(module):
    groups = [
        {"params": module.backbone.parameters(), "lr": 1e-3, "weight_decay": 0.0},
        {"params": [*module.head.parameters(), *module.norm.parameters()]},
    ]
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 60), "interval": "step"}}


@pytest.mark.parametrize("schedulers", ["drop", "keep"])
def test_it_goes_on_as_adamw_from_the_last_good_weights(tmp_path, monkeypatch, schedulers):
    monkeypatch.setattr("lightning_hrnn.divergence.COPIED_EVERY", 5)
    module, after = Diverges(with_groups, at=13), After()
    with pytest.warns(UserWarning, match=r"for 4 steps in a row, up to step 20\. Going on as AdamW \(lr 0\.01"):
        trainer = fit(tmp_path, module, on_divergence="adamw", patience=4, schedulers=schedulers, callbacks=[after])
    (optimizer,) = trainer.optimizers
    assert optimizer.fallen_back
    good = after.weights[4]  # copied before the sixth batch; the copy of the eleventh was not yet proved
    by_hand = Diverges(with_groups)
    nn.utils.vector_to_parameters(torch.cat([value.flatten() for value in good]), by_hand.parameters())
    configured = with_groups(by_hand)
    adam = configured["optimizer"]
    batches = [(inputs, targets) for inputs, targets in Batches(30)][20:]
    for index, batch in enumerate(batches):
        if schedulers == "keep":  # the module's own schedule, which has come as far as the fit
            for group, base in zip(adam.param_groups, (1e-3, 1e-2), strict=True):
                group["lr"] = base * 0.5 * (1 + torch.tensor((20 + index) / 60 * torch.pi).cos().item())
        adam.zero_grad()
        by_hand.loss(batch).backward()
        adam.step()
    torch.testing.assert_close(params(module), params(by_hand), rtol=1e-4, atol=1e-6)
    assert all(buffer.isfinite().all() for buffer in module.buffers())  # statistics went back as well
    assert "configure_optimizers" not in vars(module)


def test_before_any_copy_is_proved_it_starts_over_from_the_first(tmp_path):
    module, start = Diverges(at=0), params(Diverges())
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.optimizers[0].fallen_back and not seen:
                seen.append(params(pl_module))

    with pytest.warns(UserWarning, match="Going on as AdamW"):
        fit(tmp_path, module, on_divergence="adamw", patience=2, weights=attentive_rule(), callbacks=[Look()])
    assert same_state(seen[0], start)


def test_a_second_divergence_stops(tmp_path):
    with (
        pytest.warns(UserWarning, match="Going on as AdamW"),
        pytest.raises(DivergenceError, match="HRNN had fallen back to AdamW already"),
    ):
        fit(tmp_path, Diverges(for_ever=True), on_divergence="adamw", patience=3)


def test_the_scale_of_16_bit_precision_recovers(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=128.0))
    module = Diverges()
    with pytest.warns(UserWarning, match="Going on as AdamW"):
        trainer = fit(tmp_path, module, on_divergence="adamw", patience=10, plugins=[plugin])
    assert plugin.scaler.get_scale() == 128.0
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values() if state} == {10}


def test_copies_are_made_once_a_step_however_much_is_accumulated(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_hrnn.divergence.COPIED_EVERY", 2)
    copies = []
    callback = HRNNOptimizerCallback(on_divergence="adamw", telemetry="off")
    original = callback._watch._values
    monkeypatch.setattr(callback._watch, "_values", lambda module: copies.append(1) or original(module))
    quiet_trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=3).fit(Regression(), Batches(18))
    assert len(copies) == 3  # before steps 1, 3 and 5


# ---------------------------------------------------------------- resume


def resume(tmp_path, path, **options):
    module = Diverges(with_groups, at=10**9)
    callback = HRNNOptimizerCallback(cooldown=0.0, telemetry="off", **options)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, Batches(30), ckpt_path=path)
    return module, trainer


def test_a_fallen_run_resumes_as_adamw_or_is_refused(tmp_path):
    module = Diverges(with_groups)
    with pytest.warns(UserWarning, match="Going on as AdamW"):
        trainer = fit(tmp_path, module, on_divergence="adamw", patience=4, schedulers="keep")
    trainer.save_checkpoint(tmp_path / "fallen.ckpt")
    content = torch.load(tmp_path / "fallen.ckpt", weights_only=True)
    assert content["optimizer_states"][0]["hrnn"]["fallback_lr"] == pytest.approx(1e-2)
    twice = [resume(tmp_path, tmp_path / "fallen.ckpt", on_divergence="adamw", schedulers="keep") for _ in range(2)]
    for _, second in twice:
        (optimizer,) = second.optimizers
        assert optimizer.fallen_back
        assert second.global_step == 60
        steps = {float(state["step"]) for param, state in optimizer.state.items() if param.grad is not None}
        assert steps == {52.0}  # 22 before, 30 after
    assert same_state(params(twice[0][0]), params(twice[1][0]))
    assert not same_state(params(twice[0][0]), params(module))
    with pytest.raises(MisconfigurationException, match=r"diverged and fell back to AdamW.*on_divergence='adamw'\)"):
        resume(tmp_path, tmp_path / "fallen.ckpt")


def test_a_run_that_may_fall_resumes_where_it_has_not(tmp_path):
    module = Regression()
    trainer = fit(tmp_path, module, 4, on_divergence="adamw")
    trainer.save_checkpoint(tmp_path / "sound.ckpt")
    assert isinstance(trainer.optimizers[0], HRNNWithFallback)
    callback = HRNNOptimizerCallback(cooldown=0.0)
    second = quiet_trainer(tmp_path, callback, max_epochs=2)
    second.fit(Regression(), Batches(4), ckpt_path=tmp_path / "sound.ckpt")
    assert type(second.optimizers[0]) is HRNN
    assert second.global_step == 8


# ---------------------------------------------------------------- options


def test_the_learning_rate_to_fall_back_to():
    def lr(configure, **options):
        callback = HRNNOptimizerCallback(on_divergence="adamw", **options)
        module = configure_hrnn(Regression(configure), on_divergence="adamw", **options)
        assert callback.options.on_divergence == "adamw"
        optimizer = module.configure_optimizers()
        return optimizer.fallback_lr * optimizer.param_groups[0]["lr"]

    assert lr(adamw) == pytest.approx(3e-4)
    assert lr(adamw, lr=0.5) == pytest.approx(3e-4)  # as the module has it, whatever multiplies the learned rates
    assert lr(lambda module: SGD(module.parameters(), lr=0.5)) == pytest.approx(1e-3)
    assert lr(adamw, rate="given") == pytest.approx(3e-4)


def test_an_hrnn_of_the_modules_own_cannot_fall_back(tmp_path):
    module = Regression(lambda module: HRNN(module.parameters()))
    with pytest.raises(MisconfigurationException, match=r"plain HRNN\. Return torch.optim.AdamW.*HRNNWithFallback"):
        fit(tmp_path, module, on_divergence="adamw")
    capable = Regression(lambda module: HRNNWithFallback(module.parameters()))
    assert fit(tmp_path, capable, 2, on_divergence="adamw").global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_divergence": "pray"}, r"on_divergence must be one of \('stop', 'adamw', 'ignore'\), not 'pray'"),
        ({"patience": 0}, "patience is a number of steps and must be at least 1, not 0"),
        ({"other_weights": "hope"}, r"other_weights must be one of \('refuse', 'adapt'\), not 'hope'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        HRNNOptimizerCallback(**options)


def test_a_watch_leaves_nothing_behind(tmp_path):
    module, callback = Regression(), HRNNOptimizerCallback(on_divergence="adamw", telemetry="off")
    trainer = quiet_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, Batches(2))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    fresh = HRNNOptimizerCallback(on_divergence="adamw", telemetry="off")._watch
    assert vars(callback._watch) == vars(fresh)
    assert copy.deepcopy(callback).options == callback.options
