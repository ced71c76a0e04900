"""What goes to the loggers: right numbers, in the steps that are logged, by one copy from the device."""

import json
import math

import pytest
import torch
from helpers.modules import GAN, Batches, Regression, attentive_rule, quiet_trainer, same_state
from helpers.offline_runs import history
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import nn

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import MAX_DECAY_LOGIT, HierarchicalRNN
from lightning_hrnn.optimizer.measures import adam_bytes, measure, seconds_of_a_step, state_bytes
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.telemetry import OF_MODEL, cost

MODEL = {f"hrnn/{key}" for key in ("skipped_steps", *OF_MODEL)}
NAMES = ["backbone.weight", "backbone.bias", "head.weight", "head.bias"]


class Memory(Logger):
    """Keeps what it is given."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def of_hrnn(self):
        return [(step, metrics) for step, metrics in self.logged if any(key.startswith("hrnn") for key in metrics)]


def fit(tmp_path, module, batches, *callbacks, telemetry="model", **arguments):
    memory = Memory()
    arguments = {"logger": memory, "log_every_n_steps": 1, "max_epochs": 1, **arguments}
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(telemetry=telemetry), *callbacks, **arguments)
    trainer.fit(module, batches)
    return memory.of_hrnn(), trainer


# ---------------------------------------------------------------- the numbers


def rms(value):
    return value.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("rate", ["bounded", "smoothed"])
def test_the_measures_are_what_their_names_say(rate, monkeypatch):
    monkeypatch.setattr("lightning_hrnn.optimizer.measures.CHUNK", 5)  # so that tensors are cut, with a rest
    torch.manual_seed(0)
    rule = HierarchicalRNN(RuleConfig(rate=rate, timescales=3))
    with torch.no_grad():
        rule.decay_bias[0] = 20.0  # some decays beyond the limit
    params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (7,), ())]
    optimizer = HRNN(params, weights=rule)
    for _ in range(3):
        before = {param: param.detach().clone() for param in params}
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    found = measure(optimizer, before)
    for index, param in enumerate(params):
        state = optimizer.state[param]
        hidden = state["hidden"].double().reshape(rule.config.param_hidden, -1)
        logits = rule.decay_weight[0].double() @ hidden + rule.decay_bias[0].double()
        decay = logits.clamp(max=MAX_DECAY_LOGIT).sigmoid()
        lengths = torch.stack([1 / (1 - decay ** (1 / 2**s)) for s in range(3)])
        assert found.log_lr[index].item() == pytest.approx(state["log_rate"].mean().item(), rel=1e-5)
        assert found.update_to_param[index].item() == pytest.approx(
            rms(param - before[param]) / rms(before[param]), 1e-4
        )
        assert found.timescale[index].item() == pytest.approx(lengths.log().mean().exp().item(), rel=1e-3)
        assert found.hidden_norm[index].item() == pytest.approx(math.sqrt(hidden.square().sum(0).mean()), rel=1e-5)
    assert found.weight.tolist() == pytest.approx([12 / 20, 7 / 20, 1 / 20])
    assert measure(optimizer, {}) is None


def test_parameters_at_zero_have_a_ratio():
    param = nn.Parameter(torch.zeros(3))
    optimizer = HRNN([param])
    param.grad = torch.ones(3)
    before = {param: param.detach().clone()}
    optimizer.step()
    assert measure(optimizer, before).update_to_param.isfinite().all()


def test_the_model_is_its_tensors_taken_together(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.before, self.ratios, self.log_rates = None, [], []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            after = nn.utils.parameters_to_vector(pl_module.parameters()).detach()
            self.ratios.append(((after - self.before).norm() / self.before.norm()).item())
            self.log_rates.append(torch.stack(trainer.optimizers[0].log_rates()))

    watch = Watch()
    logged, _ = fit(tmp_path, Regression(), Batches(4), watch, telemetry="tensor")
    assert [step for step, _ in logged] == [0, 1, 2, 3]
    for (_, metrics), ratio, log_rates in zip(logged, watch.ratios, watch.log_rates, strict=True):
        assert metrics.keys() == MODEL | {
            f"hrnn/{key}/{name}" for key in ("log_lr", "update_to_param", "timescale", "hidden_norm") for name in NAMES
        }
        assert metrics["hrnn/update_to_param"] == pytest.approx(ratio, rel=1e-4)
        assert metrics["hrnn/log_lr"] == pytest.approx(log_rates.mean().item(), rel=1e-5)
        assert metrics["hrnn/log_lr_spread"] == pytest.approx(log_rates.std(correction=0).item(), rel=1e-3, abs=1e-6)
        by_tensor = [metrics[f"hrnn/log_lr/{name}"] for name in NAMES]
        assert by_tensor == pytest.approx(log_rates.tolist(), rel=1e-5)
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


# ---------------------------------------------------------------- when


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_often_as_the_trainer_logs(tmp_path, accumulate):
    logged, trainer = fit(tmp_path, Regression(), Batches(12), log_every_n_steps=3, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 12 // accumulate
    assert [step for step, _ in logged] == list(range(2, 12 // accumulate, 3))
    assert all(metrics.keys() == MODEL for _, metrics in logged)


def test_off_means_off_and_nothing_changes_the_run(tmp_path, caplog):
    modules = {}
    for telemetry in ("off", "tensor"):
        module = modules[telemetry] = Regression()
        caplog.clear()
        with caplog.at_level("INFO"):
            logged, _ = fit(tmp_path, module, Batches(4), telemetry=telemetry)
        assert len(logged) == (0 if telemetry == "off" else 4)
        assert ("a step takes about" in caplog.text) == (telemetry != "off")
    assert same_state(dict(modules["off"].state_dict()), dict(modules["tensor"].state_dict()))


def test_without_a_logger_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_hrnn.telemetry.measure", lambda *_: pytest.fail("measured"))
    fit(tmp_path, Regression(), Batches(2), logger=False)
    fit(tmp_path, Regression(), Batches(4), log_every_n_steps=0)


def test_one_copy_to_the_host_for_all_tensors(tmp_path, monkeypatch):
    copies = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, name=name, original=original):
            copies.append(name)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = {}

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts[batch_idx], copies[:] = list(copies), []

    fit(tmp_path, Regression(), Batches(9), Count(), log_every_n_steps=2, telemetry="tensor")
    quiet, logged = counts[6], counts[7]
    assert sorted(logged) == sorted([*quiet, "tolist"])


def test_a_skipped_step_is_counted_and_moves_nothing(tmp_path):
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

    with pytest.warns(UserWarning, match="skipped a step"):
        logged, _ = fit(tmp_path, Overflows(), Batches(3))
    assert [metrics["hrnn/skipped_steps"] for _, metrics in logged] == [0.0, 1.0, 1.0]
    assert [metrics["hrnn/update_to_param"] > 0 for _, metrics in logged] == [True, False, True]


def test_several_optimizers_have_prefixes_of_their_own(tmp_path):
    logged, _ = fit(tmp_path, GAN(), Batches(3))
    assert {key for _, metrics in logged for key in metrics} == MODEL | {key.replace("hrnn", "hrnn-1") for key in MODEL}


def test_attention_is_not_taken_for_an_update(tmp_path):
    memory, ratios = Memory(), []
    callback = HRNNOptimizerCallback(attentive_rule())

    class True_(Callback):
        before = None

        def on_train_batch_end(self, trainer, pl_module, *_):
            after = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
            if self.before is not None:
                ratios.append(((after - self.before).norm() / self.before.norm()).item())
            self.before = after

    trainer = quiet_trainer(tmp_path, callback, True_(), logger=memory, log_every_n_steps=1, max_epochs=1)
    trainer.fit(Regression(), Batches(4))
    logged = [metrics["hrnn/update_to_param"] for _, metrics in memory.of_hrnn()]
    assert logged[1:] == pytest.approx(ratios, rel=1e-4)


# ---------------------------------------------------------------- where


def test_a_csv_file(tmp_path):
    fit(tmp_path, Regression(), Batches(4), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    header, *rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert set(header.split(",")) >= MODEL
    assert len(rows) == 2


def test_weights_and_biases_reads_back(tmp_path):
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    fit(tmp_path, Regression(), Batches(4), logger=logger, log_every_n_steps=2)
    logger.experiment.finish()
    rows = history(tmp_path)
    (first, second) = [row for row in rows if "hrnn/log_lr" in row]
    assert first.keys() >= MODEL | {"hrnn/log_lr/histogram.values", "hrnn/update_to_param/histogram.values"}
    assert (first["trainer/global_step"], second["trainer/global_step"]) == (1, 3)
    assert sum(first["hrnn/log_lr/histogram.values"]) == 4  # tensors
    (table,) = [row["hrnn/tensors.path"] for row in rows if "hrnn/tensors.path" in row]
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{table}")
    content = json.loads(file.read_text())
    assert content["columns"] == ["tensor", "shape", "learned rate", "update / param", "timescale", "hidden norm"]
    assert [row[:2] for row in content["data"]] == [[n, s] for n, s in zip(NAMES, SHAPES, strict=True)]
    rates = [math.log(row[2]) for row in content["data"]]
    assert sum(rates) / 4 == pytest.approx(second["hrnn/log_lr"], rel=1e-5)


SHAPES = ["[6, 4]", "[6]", "[1, 6]", "[1]"]

# ---------------------------------------------------------------- what it costs


def test_the_line_at_the_start_says_memory_and_time():
    model = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 10))
    optimizer = HRNN(model.parameters())
    count = 100 * 200 + 200 + 200 * 10 + 10
    assert adam_bytes(optimizer) == 8 * count
    per_tensor = 4 * (1 + 20 + 20 + 1 + 1 + 3)  # rate, tensor and global state, age, peak, sizes of gradients
    assert state_bytes(optimizer) == 76 * count + 4 * per_tensor
    text = cost(optimizer)
    assert text.startswith(
        "HRNN: 22,210 parameters in 4 tensors; state 1.69 MB (Adam's would be 0.18 MB); a step takes"
    )
    assert text.endswith(" ms here.")


def test_the_estimate_is_of_the_size_of_a_step(monkeypatch):
    """Of the time that a clock would show: here one that goes by the parameters and tensors stepped."""
    now = [0.0]

    def step(self, *_):
        params = [param for group in self.param_groups for param in group["params"]]
        now[0] += 1e-4 * len(params) + 1e-8 * sum(param.numel() for param in params)

    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(3)))
    optimizer = HRNN(model.parameters())
    monkeypatch.setattr(HRNN, "step", step)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert seconds_of_a_step(optimizer) == pytest.approx(6e-4 + 3 * 400 * 401 * 1e-8, rel=0.01)


def test_nothing_to_step_takes_no_time():
    assert seconds_of_a_step(HRNN([nn.Parameter(torch.empty(0))])) is None


def test_unknown_detail():
    with pytest.raises(ValueError, match=r"telemetry must be one of \('off', 'model', 'tensor'\), not 'all'"):
        HRNNOptimizerCallback(telemetry="all")
