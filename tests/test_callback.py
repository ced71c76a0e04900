"""The callback puts HRNN in the place of what a module configures, for the time of a fit and no longer."""

import copy
import inspect
import logging
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.modules import (
    SMALL_WEIGHTS,
    Batches,
    NoOptimizer,
    Regression,
    Validated,
    adamw,
    attentive_rule,
    by_hand,
    quiet_trainer,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_hrnn.callbacks import HRNNOptimizerCallback, configure_hrnn, hrnn_optimizers
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, WeightsError


class Unlucky(Regression):
    """Fails in its fourth batch, as long as it is asked to."""

    fails = True

    def training_step(self, batch, batch_idx):
        if self.fails and self.global_step == 3:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def assert_equal_params(left, right):
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def said(caplog):
    """What was replaced; what it costs is the telemetry's to say."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "HRNN" in message and not message.startswith("HRNN: ")]


# ---------------------------------------------------------------- what a fit does


def test_a_users_module_with_adamw_and_cosine_trains_by_adding_the_callback_alone(tmp_path, caplog):
    def adamw_and_cosine(module):
        optimizer = adamw(module)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]

    module, batches = Validated(adamw_and_cosine), Batches()
    before = sum(module.loss(batch).item() for batch in batches)
    with caplog.at_level(logging.INFO):
        trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=20)
        trainer.fit(module, batches, batches)
    assert isinstance(trainer.optimizers[0], HRNN)
    assert sum(module.loss(batch).item() for batch in batches) < 0.8 * before
    (message,) = said(caplog)
    start = f"HRNNOptimizerCallback: AdamW -> HRNN (weights: {SMALL_WEIGHTS}, lr: 1 x the learned rates)"
    assert message.startswith(start)
    assert "Dropped: CosineAnnealingLR" in message


def test_a_fit_is_the_plain_loop_bit_by_bit(tmp_path):
    module, plain, batches = Regression(), Regression(), Batches()
    quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(module, batches)
    by_hand(plain, batches, weight_decay=0.01)
    assert_equal_params(module, plain)


def test_options_reach_the_optimizer(tmp_path):
    rule = attentive_rule()
    module, plain, batches = Regression(), Regression(), Batches()
    callback = HRNNOptimizerCallback(weights=rule, lr=0.5, weight_decay=0.1, initial_rate=1e-2, kernel="eager")
    quiet_trainer(tmp_path, callback).fit(module, batches)
    by_hand(plain, batches, weights=rule, lr=0.5, weight_decay=0.1, initial_rate=1e-2, kernel="eager")
    assert_equal_params(module, plain)


def test_the_module_is_left_as_it_was(tmp_path):
    module, untouched = Regression(), Regression()
    names, layers = list(module.state_dict()), len(list(module.modules()))
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((list(pl_module.state_dict()), len(list(pl_module.modules()))))

    quiet_trainer(tmp_path, HRNNOptimizerCallback(), Look(), max_epochs=1).fit(module, Batches(2))
    assert seen == [(names, layers)] * 2
    quiet_trainer(tmp_path, max_epochs=1).fit(untouched, Batches(2))
    assert vars(module).keys() == vars(untouched).keys()
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_a_second_fit_wraps_once(tmp_path, monkeypatch):
    module, plain, batches, callback = Regression(), Regression(), Batches(), HRNNOptimizerCallback()
    for _ in range(2):
        quiet_trainer(tmp_path, callback).fit(module, batches)
        by_hand(plain, batches, weight_decay=0.01)
    assert_equal_params(module, plain)
    assert "configure_optimizers" not in vars(module)


def test_a_setup_without_teardown_is_forgotten(tmp_path):
    """As after a run that was torn away."""
    module, callback = Regression(), HRNNOptimizerCallback()
    trainer = quiet_trainer(tmp_path, callback)
    for _ in range(2):
        callback.setup(trainer, module, "fit")
    assert isinstance(module.configure_optimizers(), HRNN)
    callback.teardown(trainer, module, "fit")
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_the_same_trainer_fits_again(tmp_path):
    module, trainer = Regression(), quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    trainer.fit(module, Batches(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Batches(2))
    assert trainer.global_step == 4
    assert isinstance(trainer.optimizers[0], HRNN)


def test_after_an_exception_the_module_is_as_before_and_fits(tmp_path):
    module, plain, batches = Unlucky(), Regression(), Batches()
    rule = attentive_rule()
    with pytest.raises(RuntimeError, match="out of luck"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback(rule)).fit(module, batches)
    assert "configure_optimizers" not in vars(module)
    batches.items = batches.items[:3]
    by_hand(plain, batches, epochs=1, weights=rule, weight_decay=0.01, cool=False)  # it ended before the cooldown
    assert_equal_params(module, plain)  # the true weights, though the exception came at the attended ones
    module.fails = False
    quiet_trainer(tmp_path, HRNNOptimizerCallback(rule)).fit(module, batches)
    by_hand(plain, batches, weights=rule, weight_decay=0.01)
    assert_equal_params(module, plain)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_without_a_fit_nothing_happens(tmp_path, run):
    class Evaluated(Validated):
        def setup(self, stage):  # runs after the callback's
            assert "configure_optimizers" not in vars(self)

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module, batches = Evaluated(lambda module: pytest.fail("asked for optimizers")), Batches(2)
    before = copy.deepcopy(module.state_dict())
    result = getattr(quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1), run)(
        module, batches, **({} if run == "predict" else {"verbose": False})
    )
    assert len(result) == (2 if run == "predict" else 1)
    assert "configure_optimizers" not in vars(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_method_set_on_the_instance_is_wrapped_and_comes_back(tmp_path):
    """As LightningCLI's `--optimizer` does."""
    module = Regression(lambda module: pytest.fail("the class's own was called"))
    own = partial(adamw, module)
    module.configure_optimizers = own
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), max_epochs=1)
    trainer.fit(module, Batches(2))
    assert isinstance(trainer.optimizers[0], HRNN)
    assert module.configure_optimizers is own


def test_copies_made_during_a_fit_are_whole(tmp_path):
    """Weight averaging copies the module after `setup`, ddp_spawn pickles it before."""
    copies = []

    class Copy(Callback):
        def on_train_start(self, trainer, pl_module):
            copies.append(copy.deepcopy(pl_module))

    module = Regression()
    quiet_trainer(tmp_path, HRNNOptimizerCallback(), Copy(), max_epochs=1).fit(module, Batches(2))
    mine = {id(param) for param in copies[0].parameters()}
    optimizer = copies[0].configure_optimizers()
    assert isinstance(optimizer, HRNN)
    assert {id(param) for group in optimizer.param_groups for param in group["params"]} == mine


def test_the_callback_pickles():
    callback = pickle.loads(pickle.dumps(HRNNOptimizerCallback(lr=0.5, schedulers="keep")))
    assert callback.options == HRNNOptimizerCallback(lr=0.5, schedulers="keep").options


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # what Lightning uses
def test_the_command_line_knows_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    config = {
        "class_path": "lightning_hrnn.HRNNOptimizerCallback",
        "init_args": {"lr": 0.25, "schedulers": "keep", "weight_decay": 0.0, "on_divergence": "adamw"},
    }
    cli = LightningCLI(
        NoOptimizer,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args={"trainer": {"callbacks": [config], "logger": False, "default_root_dir": str(tmp_path)}},
    )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, HRNNOptimizerCallback)]
    assert callback.options == HRNNOptimizerCallback(**config["init_args"]).options
    assert cli.parser.parse_string(cli.parser.dump(cli.config)) == cli.config


# ---------------------------------------------------------------- helpers


def test_configure_hrnn_trains_a_module_that_configures_nothing(tmp_path, caplog):
    module = NoOptimizer()
    assert configure_hrnn(module, lr=0.5) is module
    before = copy.deepcopy(module.net.weight)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, Batches())
    assert said(caplog) == [f"configure_hrnn: HRNN (weights: {SMALL_WEIGHTS}) for all trainable parameters."]
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is HRNN
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    assert not torch.equal(module.net.weight, before)
    assert list(module.state_dict()) == ["net.weight", "net.bias"]


def test_configure_hrnn_converts_for_good_and_attends(tmp_path, caplog):
    rule, module, plain, batches = attentive_rule(), Regression(), Regression(), Batches()
    configure_hrnn(configure_hrnn(module, lr=0.1), weights=rule)  # the last word counts
    assert isinstance(module.configure_optimizers(), HRNN)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            trainer.fit(module, batches)
    message = "configure_hrnn: AdamW -> HRNN (weights: a rule of your own, lr: 1 x the learned rates)."
    assert said(caplog) == [message] * 3  # one of them for the call above
    by_hand(plain, batches, accumulate=2, weights=rule, weight_decay=0.01)
    assert_equal_params(module, plain)
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, HRNNOptimizerCallback)]
    assert callback.options.weights is rule
    assert isinstance(module.configure_optimizers(), HRNN)


def test_configure_hrnn_and_the_callback_together(tmp_path):
    module = configure_hrnn(NoOptimizer(), lr=0.5)
    callback = HRNNOptimizerCallback()
    trainer = quiet_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, Batches(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert [c for c in trainer.callbacks if isinstance(c, HRNNOptimizerCallback)] == [callback]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_configured_module_can_be_copied(copied):
    twin = copied(configure_hrnn(NoOptimizer(), lr=0.5))
    (group,) = twin.configure_optimizers().param_groups
    assert group["lr"] == 0.5
    assert {id(param) for param in group["params"]} == {id(param) for param in twin.parameters()}


def test_configure_hrnn_looks_through_torch_compile(tmp_path):
    module = NoOptimizer()
    compiled = torch.compile(module, backend="eager")
    assert configure_hrnn(compiled) is compiled
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(compiled, Batches(2))
    assert isinstance(trainer.optimizers[0], HRNN)


def test_configure_hrnn_takes_what_the_callback_takes(tmp_path):
    module, *options = inspect.signature(configure_hrnn).parameters.values()
    assert module.name == "module"
    assert options == list(inspect.signature(HRNNOptimizerCallback).parameters.values())
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(configure_hrnn(NoOptimizer(), telemetry="off", patience=7), Batches(1))
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, HRNNOptimizerCallback)]
    assert (callback._telemetry.detail, callback._watch.patience) == ("off", 7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate_of_learning'"):
        configure_hrnn(NoOptimizer(), rate_of_learning=1)
    with pytest.raises(ValueError, match="lr is a multiplier"):
        configure_hrnn(NoOptimizer(), lr=-1.0)


def test_configure_hrnn_takes_lightning_modules_only():
    with pytest.raises(TypeError, match=r"LightningModule, not Linear.*HRNN\(module.parameters\(\)\)"):
        configure_hrnn(torch.nn.Linear(2, 1))


def test_hrnn_optimizers_is_a_modules_own_line(tmp_path):
    module, plain, batches = Regression(lambda module: hrnn_optimizers(module, lr=0.5)), Regression(), Batches()
    quiet_trainer(tmp_path).fit(module, batches)
    by_hand(plain, batches, lr=0.5, cool=False)  # who wants the cooldown adds the callback
    assert_equal_params(module, plain)


def test_hrnn_optimizers_takes_given_rates():
    module, rate = Regression(), 1e-3
    optimizer = hrnn_optimizers(module, lr=rate, rate="given")
    assert optimizer.param_groups[0]["lr"] == rate
    module.loss(Batches().items[0]).backward()
    optimizer.step()
    assert [float(log_rate) for log_rate in optimizer.log_rates()] == pytest.approx([math.log(rate)] * 4)
    with pytest.raises(ValueError, match="say it by lr, such as lr=1e-3"):
        hrnn_optimizers(module, rate="given")


def test_hrnn_optimizers_adapts_the_state_of_other_weights():
    saved = hrnn_optimizers(Regression(), weights="hrnn-v0").state_dict()
    with pytest.warns(UserWarning, match="hidden states start anew"):
        hrnn_optimizers(Regression(), other_weights="adapt").load_state_dict(saved)
    with pytest.raises(ValueError, match="other_weights='adapt'"):
        hrnn_optimizers(Regression()).load_state_dict(saved)


def test_hrnn_optimizers_leaves_out_what_is_frozen():
    module = Regression()
    module.backbone.requires_grad_(False)
    (group,) = hrnn_optimizers(module).param_groups
    assert [id(param) for param in group["params"]] == [id(param) for param in module.head.parameters()]
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Regression has no trainable parameter"):
        hrnn_optimizers(module)


# ---------------------------------------------------------------- errors that name cause and mend


def test_a_module_without_optimizers_is_pointed_to_configure_hrnn(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"(?s)No `configure_optimizers.*configure_hrnn\(module\)"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(NoOptimizer(), Batches())


def test_two_callbacks_are_one_too_many(tmp_path):
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(), HRNNOptimizerCallback(lr=0.5))
    with pytest.raises(MisconfigurationException, match=r"2 HRNNOptimizerCallbacks.*Leave one"):
        trainer.fit(Regression(), Batches())


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [(FSDPStrategy, "flattens"), (DeepSpeedStrategy, "takes the step")],
)
def test_strategies_that_cannot_be_served(strategy, reason):
    callback, module = HRNNOptimizerCallback(), Regression()
    trainer = SimpleNamespace(callbacks=[callback], strategy=strategy.__new__(strategy))  # neither runs on a CPU
    with pytest.raises(
        MisconfigurationException,
        match=f"under {strategy.__name__}: .*{reason}.*ModelParallelStrategy, .*strategy='ddp'",
    ):
        callback.setup(trainer, module, "fit")
    assert "configure_optimizers" not in vars(module)


def test_lbfgs_is_refused_and_the_module_left_alone(tmp_path):
    module = Regression(lambda module: torch.optim.LBFGS(module.parameters()))
    with pytest.raises(MisconfigurationException, match=r"LBFGS: it evaluates the closure many times.*AdamW"):
        quiet_trainer(tmp_path, HRNNOptimizerCallback()).fit(module, Batches())
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is a multiplier"),
        ({"lr": float("nan")}, "lr is a multiplier"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"schedulers": "forget"}, "schedulers must be one of .*'drop', 'keep', 'refuse'.*'forget'"),
        ({"initial_rate": 0.0}, "initial_rate must be None or positive and finite, not 0.0"),
        ({"kernel": "cuda"}, r"Unknown kernel 'cuda': choose from \['auto'"),
        ({"patience": 2.5}, "patience is a number of steps and must be at least 1, not 2.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        HRNNOptimizerCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1"}, "lr must be a number, not '1'"),
        ({"cooldown": None}, "cooldown must be a number, not None"),
        ({"weight_decay": "none"}, "weight_decay must be a number or None, not 'none'"),
        ({"weights": None}, "weights must be a name, the path of a .safetensors file, or a rule"),
    ],
)
def test_options_of_another_kind(options, message):
    with pytest.raises(TypeError, match=message):
        HRNNOptimizerCallback(**options)


def test_unknown_weights_are_an_error_at_once():
    with pytest.raises(WeightsError, match=rf"Unknown weights 'hrnn-v99': choose from .*'{DEFAULT_WEIGHTS}'"):
        HRNNOptimizerCallback(weights="hrnn-v99")
