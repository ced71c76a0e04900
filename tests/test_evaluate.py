"""The fair evaluation: baselines, statistics, the protocol, its cache, the command and its report."""

import io
import json
import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.images import write_idx_set
from matplotlib.image import imread
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from lightning_hrnn.cli import main
from lightning_hrnn.cli.evaluate import parse, show
from lightning_hrnn.evaluation.baselines import BASELINES, CONSTANT, train, warm_up_cosine
from lightning_hrnn.evaluation.evaluation_report import LOSS_COLUMNS, EvaluationReport
from lightning_hrnn.evaluation.figures import plot_curves, plot_rates, plot_win_rates
from lightning_hrnn.evaluation.given import train_given
from lightning_hrnn.evaluation.nets import VALIDATION_NETS
from lightning_hrnn.evaluation.protocol import ANYTIME, DEFAULT_ADAM, GIVEN, OURS, RATES, Learned, Outcome, Trial
from lightning_hrnn.evaluation.setting import Setting
from lightning_hrnn.evaluation.statistics import (
    came_back,
    diverged,
    interquartile_mean,
    interval,
    mean_log,
    reached,
    speedup,
)
from lightning_hrnn.evaluation.trials import Cache, run_trials
from lightning_hrnn.evaluation.unseen import unseen_nets
from lightning_hrnn.evaluation.verdict import judge, summarise, tuned_parts
from lightning_hrnn.meta.population import Population, TaskBatch
from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, load_pretrained, reconfigured
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.functions import Quadratic
from lightning_hrnn.vision import FashionMNISTData

SMALL = Setting("nets", steps=4, seeds=2, tuning_seeds=2)
RULE = load_pretrained()
TORCH = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr),
    "adam": lambda params, lr: torch.optim.Adam(params, lr),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder(TaskFamily):
    """A bowl that remembers the noise of every stochastic gradient."""

    name = "recorder"

    def __init__(self):
        self.noise = []

    def init(self, count, generator):
        return [torch.randn(count, 3, generator=generator)], {"centre": torch.randn(count, 3, generator=generator)}

    def loss(self, params, data, generator=None):
        loss = (params[0] - data["centre"]).square().sum(-1)
        if generator is not None:
            self.noise.append(torch.randn(params[0].shape, generator=generator))
            loss = loss + 0.1 * (self.noise[-1] * (params[0] - params[0].detach())).sum(-1)
        return loss


# -- baselines


def trained(batch, index, make_optimizer, schedule, steps):
    """Losses after each step of training one instance in a plain loop."""
    params = [value[index : index + 1].clone().requires_grad_() for value in batch.params]
    data = {key: value[index : index + 1] for key, value in batch.data.items()}
    optimizer, losses = make_optimizer(params), []
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        batch.family.loss(params, data).sum().backward()
        optimizer.step()
        scheduler.step()
        losses.append(batch.family.loss(params, data)[0].detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_torchs_own(name):
    batch = TaskBatch.draw(Quadratic(6), 3, seed=1)
    rates, steps = torch.tensor([1e-3, 3e-3, 1e-2]), 30
    baseline = BASELINES[name]
    found = train(baseline.rule, Population([batch]), rates, steps, set(range(steps)), baseline.schedule)
    for index, rate in enumerate(rates.tolist()):
        losses = trained(batch, index, lambda params, rate=rate: TORCH[name](params, rate), baseline.schedule, steps)
        torch.testing.assert_close(found[:, index], losses, rtol=1e-4, atol=1e-6)


def test_given_rates_are_those_of_the_optimizer():
    batch = TaskBatch.draw(Quadratic(6), 3, seed=1)
    rates, steps, rule = torch.tensor([1e-3, 3e-3, 1e-2]), 20, load_pretrained().for_model(6)
    found = train_given(rule.without_rate(), Population([batch]), rates, steps, set(range(steps)))
    for index, rate in enumerate(rates.tolist()):
        make = partial(HRNN, weights=rule, lr=rate, rate="given")
        losses = trained(batch, index, make, warm_up_cosine, steps)
        torch.testing.assert_close(found[:, index], losses, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_rate_is_tuned_and_kept(name):
    setting = Setting("corpus", steps=30, seeds=2, tuning_seeds=2)
    outcome = Trial(setting, "bowl/1", name).run()
    assert outcome.lr == RATES[min(range(15), key=outcome.tuning.__getitem__)]
    batch, make = setting.draw("bowl/1", "report", 2), TORCH[name.removesuffix("_constant")]
    for index in range(2):
        losses = trained(batch, index, lambda params: make(params, outcome.lr), lambda step, steps: 1.0, 30)
        assert outcome.curve[-1][index] == pytest.approx(losses[-1].item(), rel=1e-3)


def test_given_rates_are_tuned_like_a_baselines(recorder):
    setting = Setting("nets", steps=40, seeds=3, tuning_seeds=2)
    outcome = Trial(setting, "recorder", GIVEN).run(Learned(load_pretrained()))
    assert outcome.lr == RATES[min(range(15), key=outcome.tuning.__getitem__)]
    assert max(outcome.final) < min(outcome.initial) / 5
    with pytest.raises(ValueError, match="learned optimizer"):
        Trial(setting, "recorder", GIVEN).run()


def test_the_schedule_rises_for_a_twentieth_and_ends_at_nothing():
    factors = [warm_up_cosine(step, 1000) for step in range(1000)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert all(later < earlier for earlier, later in pairwise(factors[50:]))
    assert 0 < factors[-1] < 1e-5
    assert [warm_up_cosine(0, 1), warm_up_cosine(0, 2)] == [1.0, 1.0]


# -- statistics


def test_a_failed_run_is_the_worst():
    initial = torch.ones(2)
    levels = mean_log(torch.tensor([[1.0, math.nan], [1.0, math.inf], [5.0, 5.0], [0.0, 0.0]]), initial)
    assert levels[:2].tolist() == [math.inf, math.inf]
    assert levels[2] == pytest.approx(math.log(5))
    assert levels[3] == pytest.approx(math.log(1e-12))  # nothing is lower than what single precision can tell


def test_runs_that_blow_up_or_end_above_their_start_have_diverged():
    curve = torch.tensor([[1.0, math.nan, 3.0, 0.5], [0.5, 0.5, 2.0, math.inf], [0.2, 0.2, 2.0, 0.5]])
    assert diverged(curve, curve[-1], torch.ones(4)).tolist() == [False, True, True, True]


def test_speed_up_swaps_the_roles_when_the_target_is_never_reached():
    steps = [1, 10, 20, 50, 100]
    fast, slow = [9.0, 4.0, 1.0, 1.0, 1.0], [9.0, 8.0, 6.0, 4.0, 3.0]
    assert speedup(steps, fast, 1.0, slow, 3.0) == pytest.approx(100 / 20)
    assert speedup(steps, slow, 3.0, fast, 1.0) == pytest.approx(20 / 100)
    assert speedup(steps, fast, 1.0, fast, 1.0) == pytest.approx(100 / 20)
    assert speedup(steps, [math.inf] * 5, math.inf, slow, 3.0) == pytest.approx(1 / 100)
    assert speedup(steps, fast, 1.0, [math.inf] * 5, math.inf) == pytest.approx(100)
    assert reached(steps, [9.0, 1.0, 9.0, 9.0, 9.0], 2.0) is None  # one lucky score


def test_the_interval_holds_the_mean_and_narrows_with_seeds():
    values = torch.randn(8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert interquartile_mean(torch.tensor([-100.0, 1, 2, 3, 4, 5, 6, 1000])).item() == 3.5
    widths = []
    for seeds in (5, 40):
        low, high = interval(values[:, :seeds])
        assert low < interquartile_mean(values[:, :seeds].flatten()) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert interval(values[:, :1]) == pytest.approx([interquartile_mean(values[:, :1].flatten()).item()] * 2)


# -- tasks


@pytest.mark.parametrize("name", [*unseen_nets(), "digits-conv", "digits-norm-conv", "digits-resnet-v2"])
def test_instances_of_a_net_do_not_mix(name):
    suite = "vision" if "conv" in name or "resnet" in name else "nets"
    family = Setting(suite, 1).families()[name]()
    params, data = family.init(2, torch.Generator().manual_seed(0))
    params = [value.requires_grad_() for value in params]
    losses = family.loss(params, data, torch.Generator().manual_seed(1))
    assert losses.shape == (2,)
    assert not torch.equal(losses[0], losses[1])
    for value, grad in zip(params, torch.autograd.grad(losses[0], params), strict=True):
        assert grad[0].isfinite().all()
        assert not grad[1].any()
        assert value.shape == grad.shape
    assert family.name == name


def test_full_losses_of_a_real_data_set_do_not_depend_on_the_order():
    family = Setting("nets", 1).families()["digits-relu-mlp"]()
    params, data = family.init(2, torch.Generator().manual_seed(0))
    swapped = family.loss([value.flip(0) for value in params], data)
    torch.testing.assert_close(family.loss(params, data).flip(0), swapped)
    assert len(family.load().classes) == 1437


def test_reported_nets_are_none_that_checkpoints_are_picked_by():
    tasks = SMALL.choose(None)
    assert {name for name in tasks if name.startswith("validation/")} == {
        f"validation/{name}" for name in VALIDATION_NETS
    }
    assert SMALL.choose(["validation"]) == [f"validation/{name}" for name in VALIDATION_NETS]
    assert not unseen_nets().keys() & VALIDATION_NETS.keys()


def test_fashion_mnist_is_read_from_its_folder_or_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "none")
    setting = Setting("vision", 1, data_dir=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        setting.draw("fashion-conv", "report", 1)
    write_idx_set(tmp_path / "data" / "FashionMNIST" / "raw", train=40, test=10)
    batch = setting.draw("fashion-resnet-v2", "report", 2)
    assert Population([batch]).losses(Population([batch]).initial_params()).isfinite().all()


def test_a_corpus_is_its_families():
    setting = Setting("corpus", 1, corpus="quick", draws=2)
    tasks = setting.choose(None)
    assert len(tasks) == 12 == len(set(tasks))
    assert setting.choose(["mlp"]) == ["mlp/1", "mlp/2"]
    assert setting.choose(["mlp"], without=["mlp/1"]) == ["mlp/2"]
    assert setting.choose(None, without=["mlp"]) == [task for task in tasks if not task.startswith("mlp/")]
    with pytest.raises(ValueError, match="No task is left"):
        setting.choose(["mlp"], without=["mlp"])
    with pytest.raises(ValueError, match="no tasks \\['cats'\\]"):
        setting.choose(None, without=["cats"])
    shapes = [[value.shape for value in setting.draw(task, "report", 1).params] for task in ("mlp/1", "mlp/1", "mlp/2")]
    assert shapes[0] == shapes[1] != shapes[2]


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"'cats'.*'vision'"):
        Setting("cats", 1)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        Setting("nets", 1, seeds=0)
    with pytest.raises(ValueError, match=r"no tasks \['cats'\].*deep-relu-mlp"):
        SMALL.choose(["cats", "gru"])


# -- the protocol


@pytest.fixture
def recorder(monkeypatch):
    family = Recorder()
    monkeypatch.setattr(Setting, "families", lambda self: {"recorder": lambda: family})
    return family


def test_all_optimizers_see_the_same_instances_and_batches(recorder):
    setting = Setting("nets", steps=12, seeds=3, tuning_seeds=2)
    learned, seen, initial = Learned(load_pretrained()), [], []
    for name in (OURS, DEFAULT_ADAM, "sgd"):
        recorder.noise.clear()
        initial.append(Trial(setting, "recorder", name).run(learned).initial)
        seen.append(torch.stack(recorder.noise[-12:]))
    assert initial[0] == initial[1] == initial[2]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    tuned_on, reported_on = (setting.draw("recorder", purpose, 2).params[0] for purpose in ("tune", "report"))
    assert not torch.equal(tuned_on, reported_on)


def test_the_best_rate_of_the_grid_is_kept(recorder):
    setting = Setting("nets", steps=25, seeds=2, tuning_seeds=3)
    shares = []
    outcome = Trial(setting, "recorder", "sgd").run(tick=shares.append)
    assert len(RATES) == len(outcome.tuning) == 15
    assert outcome.lr == RATES[min(range(15), key=outcome.tuning.__getitem__)]
    assert outcome.tuning[-1] == math.inf or outcome.tuning[-1] > min(outcome.tuning) + 10  # 10 is far too much
    assert sum(shares) == pytest.approx(1)
    trial = Trial(setting, "recorder", "sgd")
    slow = trial._train(trial._runner(None), outcome.lr / 100, lambda share: None)
    assert max(outcome.final) < min(slow.final)


def test_the_learned_rate_cools_down_over_the_last_half_unless_the_length_is_unknown():
    setting = Setting("nets", steps=20, seeds=2)
    learned = Learned(load_pretrained("hrnn-v1"))
    cooled, anytime = (Trial(setting, "wide-relu-mlp", name).run(learned) for name in (OURS, ANYTIME))
    assert cooled.steps == anytime.steps
    halfway = cooled.steps.index(max(step for step in cooled.steps if step <= 10)) + 1
    assert cooled.curve[:halfway] == anytime.curve[:halfway]
    assert all(ours != other for ours, other in zip(cooled.final, anytime.final, strict=True))
    moved = [
        [abs(last - before) for last, before in zip(outcome.curve[-1], outcome.curve[-2], strict=True)]
        for outcome in (cooled, anytime)
    ]
    assert max(moved[0]) < max(moved[1])  # at the last step the rate is next to nothing


def test_a_rule_that_reads_the_length_of_a_run_is_told_it_unless_it_is_unknown():
    rule = HierarchicalRNN(RuleConfig(drift_inputs=("tensor", "length")))
    with torch.no_grad():
        rule.rate.drift[-2] = 5.0  # rates rise where the length is known
    setting = Setting("nets", steps=20, seeds=1)
    told, untold = (Trial(setting, "wide-relu-mlp", name).run(Learned(rule)) for name in (OURS, ANYTIME))
    assert all(rate > 1.5 * other for rate, other in zip(told.rates[-1], untold.rates[-1], strict=True))
    rule = reconfigured(rule, replace(rule.config, drift_horizon=19.0))  # of longer runs it makes nothing
    beyond = Trial(setting, "wide-relu-mlp", OURS).run(Learned(rule))
    before_the_cooldown = sum(step <= 10 for step in untold.steps)
    assert beyond.rates[:before_the_cooldown] == untold.rates[:before_the_cooldown]
    assert beyond.final != untold.final


def test_tuning_in_parts_gives_each_rate_its_due(recorder, monkeypatch):
    setting = Setting("nets", steps=25, seeds=2, tuning_seeds=2)
    whole = Trial(setting, "recorder", "adam").run()
    monkeypatch.setattr("lightning_hrnn.evaluation.protocol.FLOATS_AT_ONCE", 50)
    parts = Trial(setting, "recorder", "adam").run()
    assert parts.lr == whole.lr
    assert parts.tuning[:8] == pytest.approx(whole.tuning[:8], abs=0.05)  # other noise, the same small steps
    assert parts.final == whole.final


def test_scores_are_spread_and_end_with_those_of_the_final_loss():
    setting = Setting("nets", 1000)
    assert setting.final() == [960, 970, 980, 990, 1000]
    assert setting.scored()[-5:] == setting.final()
    assert setting.scored()[0] == 1
    assert Setting("nets", 1).scored() == Setting("nets", 1).final() == [1]
    losses = torch.tensor([[9.0, 9.0]] + [[1.0, 1.0]] * 4 + [[2.0, math.nan]])
    assert setting.final_loss(losses).tolist() == pytest.approx([1.2, math.inf])


def test_the_learned_rates_are_recorded():
    outcome = Trial(SMALL, "wide-relu-mlp", OURS).run(Learned(load_pretrained()))
    assert outcome.steps == [1, 2, 3, 4]
    assert [len(rates) for rates in outcome.rates] == [4] * 4
    rule = load_pretrained()
    population = Population([SMALL.draw("wide-relu-mlp", "report", SMALL.seeds)])
    sizes = population.param_rms(population.initial_params()).view(4, SMALL.seeds).mean(1)
    counts = population.layout.params_in.view(4, SMALL.seeds)[:, 0]
    powers = dict(zip(rule.config.first_inputs, rule.rate.first.flatten().tolist(), strict=True))
    for rate, size, count in zip(outcome.rates[0], sizes.tolist(), counts.tolist(), strict=True):  # after a step
        larger = math.hypot(size, rule.config.size_floor) / rule.config.size_floor
        fewer = (
            max(1.0, 1e4 / count) ** powers["tensor_count"]
            * max(1.0, 1e4 / counts.sum().item()) ** powers["model_count"]
        )
        first = rule.card["initial_rate"] * larger ** powers["size"] * fewer
        assert first / 2 < rate < first * 2
    with pytest.raises(ValueError, match="learned optimizer"):
        Trial(SMALL, "wide-relu-mlp", OURS).run()


# -- the verdict


def outcome(final, seeds=5, start=4.0, lr=None):
    steps = [1, 10, 50, 100]
    curve = [[start] * seeds, [(start + final) / 2] * seeds, [final] * seeds, [final] * seeds]
    return Outcome(lr, [start] * seeds, [final] * seeds, steps, curve, seconds=1.0)


def record(ours, adam=1.0, task="net", given=None, constant=None):
    others = {"sgd": 3.0, "rmsprop": 2.0, "adam": adam, "adamw": 1.5}
    outcomes = {name: outcome(final, lr=RATES[3]) for name, final in others.items()}
    learned = {OURS: outcome(ours), ANYTIME: outcome(1.4 * ours)}
    if given is not None:
        learned[GIVEN] = outcome(given, lr=RATES[4])
    if constant is not None:
        outcomes |= {f"{name}_constant": outcome(constant * final, lr=RATES[5]) for name, final in others.items()}
    return judge(Setting("nets", 100), task, {**learned, DEFAULT_ADAM: outcome(2.5, lr=1e-3), **outcomes})


def test_given_rates_have_a_record_of_their_own():
    found = record(1.8, given=1.2)
    assert found[GIVEN]["lr"] == RATES[4]
    assert found[GIVEN]["beats"] == {"sgd": True, "rmsprop": True, "adam": False, "adamw": True}
    report = EvaluationReport.of([found], title="t", command="c", settings={}, figures={})
    assert "its direction ends lower than AdamW on 100% and than Adam on 0%" in report.summary
    assert "its direction" not in EvaluationReport.of([record(1.8)], title="t", command="c", settings={}).summary


def test_without_cooldown_ours_is_compared_with_constant_rates(tmp_path):
    found = record(1.8, constant=2.0)["constant"]  # without cooldown 2.52, against 2 (Adam), 3, 4, 6
    assert found["baselines"]["adam_constant"]["mean"] == pytest.approx(2.0)
    assert [name for name, won in found["beats"].items() if won] == [
        "sgd_constant",
        "rmsprop_constant",
        "adamw_constant",
    ]
    assert not found["within_5_percent_of_adam"]
    records = [record(1.8, constant=2.0), record(1.2, constant=2.0), record(1.45, constant=2.0), record(1.8)]
    report = EvaluationReport.of(records, title="t", command="c", settings={}, figures={})
    rates = {"sgd": 1.0, "rmsprop": 1.0, "adam": 1 / 3, "adamw": 1.0, "best": 1 / 3}
    assert report.verdict["constant"] == {
        **{f"win_rate_{name}": pytest.approx(rate) for name, rate in rates.items()},
        "within_5_percent_of_adam": pytest.approx(2 / 3),
    }
    assert "tuned at constant rates, it then ends lower than Adam on 33%" in report.summary
    (section,) = [part for part in report.markdown().split("## ") if part.startswith("Without cooldown, against")]
    assert section.count("| net |") == 3
    tuned = {name: part["tuning_seconds"] for name, part in tuned_parts(records[0]).items()}
    assert list(tuned) == [*BASELINES, *CONSTANT]
    everything = sum(part["tuning_seconds"] for one in records for part in tuned_parts(one).values())
    assert report.verdict["seconds"]["tuning"] == pytest.approx(everything)
    plot_win_rates(report.verdict, tmp_path / "both.png")
    alone = EvaluationReport.of(records[3:], title="t", command="c", settings={}, figures={})
    assert "constant rates" not in alone.summary + alone.markdown()
    plot_win_rates(alone.verdict, tmp_path / "one.png")
    assert imread(tmp_path / "both.png").shape[1] == 2 * imread(tmp_path / "one.png").shape[1]


@pytest.mark.parametrize("width", [70, 110, 120])
def test_every_task_has_one_line_of_the_terminal(width):
    records = [record(factor) | {"task": "two-block-transformer"} for factor in (1.04e-13, 1.8)]
    console = Console(width=width, record=True, file=io.StringIO())
    show(EvaluationReport.of(records, title="t", command="c", settings={}), console)
    lines = console.export_text().splitlines()
    assert sum("two-block-transformer" in line for line in lines) == 2
    (head,) = [line for line in lines if "task" in line]
    assert head.split()[1:5] == ["HRNN", *(["no", "cooldown", "SGD"] if width > 70 else ["SGD", "RMSProp", "Adam"])]
    assert ("AdamW" in head, "speed-up" in head, "diverged" in head) == (True, width > 70, width > 70)


@pytest.mark.parametrize("width", range(60, 100, 4))
def test_headings_are_whole_in_terminals_of_any_width(width):
    records = [record(factor) | {"task": "gru"} for factor in (1.04e-13, 1.8)]
    console = Console(width=width, record=True, file=io.StringIO())
    show(EvaluationReport.of(records, title="t", command="c", settings={}), console)
    (head,) = [line for line in console.export_text().splitlines() if "task" in line]
    assert set(head.split()) <= set(" ".join(column.title for column in LOSS_COLUMNS).split())


def test_a_record_says_who_was_beaten():
    found = record(1.8)
    assert found["beats"] == {"sgd": True, "rmsprop": True, "adam": False, "adamw": False}
    assert found["hrnn_anytime"]["beats"] == {"sgd": True, "rmsprop": False, "adam": False, "adamw": False}
    assert (found["within_5_percent_of_adam"], found["beats_default_adam"]) == (False, True)
    assert record(1.04)["within_5_percent_of_adam"]
    assert found["loss_ratio_to_adam"] == pytest.approx(1.8)
    assert found["speedup_vs_adam"] == pytest.approx(50 / 100)
    failed = record(math.nan)
    assert failed["hrnn"]["diverged"] == 5
    assert not any(failed["beats"].values())
    assert record(9.0)["hrnn"]["diverged"] == 5
    assert record(1.0)["beats"]["adam"] is False  # a tie is no win
    solved = record(0.0, adam=1e-30)  # both are below what single precision can tell
    assert (solved["beats"]["adam"], solved["speedup_vs_adam"]) == (False, 2.0)


def test_a_run_that_loses_what_it_knew_is_counted():
    curve = [[1.0] * 4, [1e-5, 1e-5, 1e-3, math.nan], [0.5, 1e-3, 0.5, 1e-5], [1e-6, 1e-6, 1e-6, 1.0]]
    assert came_back(torch.tensor(curve), torch.ones(4)).tolist() == [True, False, False, False]
    assert came_back(torch.tensor(curve), torch.full((4,), 1e3)).sum() == 0  # all is low beside the first
    good, bad = record(0.5), record(0.5)
    bad["hrnn_anytime"]["came_back"] = 2
    report = EvaluationReport.of([good, bad], title="t", command="c", settings={})
    assert "0 runs diverged, and 2 lost again what they had learned." in report.summary
    assert report.verdict["anytime"]["came_back"] == 2
    assert report.verdict["came_back"] == 0
    assert "0 of 10 runs diverged. Without cooldown" in report.summary


def test_tasks_that_were_looked_at_are_told_apart():
    seen, unseen = record(0.5) | {"looked_at": True}, record(1.8)
    report = EvaluationReport.of([seen, unseen], title="t", command="c", settings={})
    assert report.verdict["win_rate_adam"] == 0.5
    assert report.verdict["not_looked_at"]["tasks"] == 1
    assert "never looked at, 1 in number: lower than Adam on 0%, than" in report.summary
    assert "no evidence" in EvaluationReport.of([seen], title="t", command="c", settings={}).summary
    assert "looked at" not in EvaluationReport.of([unseen], title="t", command="c", settings={}).summary


def test_a_process_that_is_killed_is_explained(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool("A child process terminated abruptly"))
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr("lightning_hrnn.evaluation.trials.ProcessPoolExecutor", Broken)
    with pytest.raises(RuntimeError, match=r"was killed from outside.* give the same command again, with fewer"):
        run_trials([Trial(SMALL, "gru", name) for name in BASELINES], RULE, Cache(tmp_path), 2)


def test_records_add_up():
    summary = summarise([record(0.5), record(1.2), record(1.8), record(math.inf)])
    assert (summary["tasks"], summary["runs"], summary["diverged"]) == (4, 20, 5)
    assert set(summary["constant"].values()) == {None}
    assert summary["given"] == dict.fromkeys([f"win_rate_{name}" for name in BASELINES])
    rates = [summary[f"win_rate_{name}"] for name in ("adam", "adamw", "rmsprop", "sgd", "best", "default_adam")]
    assert rates == [0.25, 0.5, 0.75, 0.75, 0.25, 0.75]
    without = summary["anytime"]
    assert [without[f"win_rate_{name}"] for name in ("adam", "adamw", "rmsprop", "sgd")] == [0.25, 0.25, 0.5, 0.75]
    assert without["diverged"] == 5
    low, high = summary["speedup_iqm_interval"]
    assert low <= summary["speedup_iqm"] <= high
    assert summarise([])["win_rate_adam"] is None


# -- the cache


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ran, killed_at = [], [2]

    def run(trial, learned, tick):
        if len(ran) in killed_at:
            raise KeyboardInterrupt
        ran.append(trial)
        return outcome(1.0, seeds=2, lr=0.1)

    monkeypatch.setattr(Trial, "run", run)
    trials = [Trial(SMALL, "gru", name) for name in BASELINES]
    with pytest.raises(KeyboardInterrupt):
        run_trials(trials, DEFAULT_WEIGHTS, Cache(tmp_path), 1)
    assert ran == trials[:2]
    killed_at.clear()
    seen = []
    found = run_trials(trials, DEFAULT_WEIGHTS, Cache(tmp_path), 1, lambda done, trial: seen.append((done, trial)))
    assert ran == trials
    assert list(found) == trials
    assert seen[0] == (2.0, None)
    run_trials(trials, DEFAULT_WEIGHTS, Cache(tmp_path), 2)  # nothing is missing: no process starts
    assert len(ran) == 4


def test_only_what_an_outcome_depends_on_makes_it_stale(tmp_path):
    cache, trial = Cache(tmp_path), Trial(SMALL, "gru", "adam")
    kept = replace(outcome(1.0, seeds=2, lr=0.1), final=[1.0, math.inf], tuning=[1.0], rates=[[0.1]])
    cache.write(trial, kept)
    assert cache.read(trial) == kept
    assert cache.read(replace(trial, setting=replace(SMALL, data_dir="elsewhere", corpus="paper"))) == kept
    for change in ({"steps": 5}, {"seeds": 3}, {"tuning_seeds": 3}, {"seed": 1}, {"device": "cuda"}):
        assert cache.read(replace(trial, setting=replace(SMALL, **change))) is None
    assert cache.read(replace(trial, optimizer=OURS, weights="abc")) is None
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    short = {"final": [1.0], "initial": [1.0], "curve": [[1.0]] * len(kept.steps)}  # of one instance, not of two
    for damage in (
        {"final": "abc"},
        {"final": ["abc"]},
        {"final": [1.0]},
        {"curve": []},
        {"curve": [[1.0]] * len(kept.steps)},
        {"steps": None},
        {"initial": 3},
        {"lr": None},
        {"lr": 0.0},
        {"seconds": None},
        {"tuning_seconds": "abc"},
        short,
    ):
        file.write_text(json.dumps({**content, "outcome": {**content["outcome"], **damage}}))
        assert cache.read(trial) is None
    file.write_text(json.dumps(content)[:-9])
    assert cache.read(trial) is None


def test_a_run_that_fails_at_once_is_drawn_all_the_same(tmp_path):
    failed = replace(outcome(1.0, seeds=1), steps=[1, 2], curve=[[math.nan], [math.nan]], rates=([math.nan], [0.0]))
    by_name = dict.fromkeys((OURS, *BASELINES), failed)
    plot_rates({"net": by_name}, tmp_path / "rates.png")
    plot_curves({"net": by_name}, tmp_path / "curves.png")
    assert {path.name for path in tmp_path.iterdir()} == {"rates.png", "curves.png"}


# -- the command


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a very short evaluation."""
    folder = tmp_path_factory.mktemp("evaluate")
    budget = ["--steps", "6", "--seeds", "5", "--tuning-seeds", "1", "--processes", "1", "--constant"]
    tasks = ["--suite", "nets", "--tasks", "wide-relu-mlp", "digits-wide-tanh-mlp", "validation/wide-mlp"]
    assert main(["evaluate", *tasks, *budget, "--out", str(folder)]) == 0
    return folder


def test_the_report_is_as_promised(out):
    report = json.loads((out / "report.json").read_text())
    for found in report["results"]:
        assert {"suite", "task", "steps", "hrnn", "baselines", "speedup_vs_adam", "beats"} <= found.keys()
        assert len(found["hrnn"]["final"]) == 5
        assert found["hrnn"]["diverged"] in range(6)
        assert found["baselines"].keys() == found["beats"].keys() == set(BASELINES)
        for name, baseline in found["baselines"].items():
            assert baseline["lr"] in RATES
            levels = [sum(map(math.log, one["final"])) for one in (found["hrnn"], baseline)]
            assert found["beats"][name] == (levels[0] < levels[1])
        levels = [
            sum(map(math.log, one["final"]))
            for one in (found["hrnn_anytime"], *found["constant"]["baselines"].values())
        ]
        assert list(found["constant"]["beats"].values()) == [levels[0] < level for level in levels[1:]]
    reported = [found for found in report["results"] if not found["used_for_selection"]]
    assert [found["task"] for found in reported] == ["wide-relu-mlp", "digits-wide-tanh-mlp"]
    summary = report["summary"]
    assert summary["tasks"] == 2
    assert summary["win_rate_adam"] == sum(found["beats"]["adam"] for found in reported) / 2
    assert summary["win_rate_best"] == sum(all(found["beats"].values()) for found in reported) / 2
    assert {"win_rate_rmsprop", "speedup_iqm", "speedup_iqm_interval", "diverged", "seconds"} <= summary.keys()
    assert report["selection"]["tasks"] == 1


def test_the_report_can_be_read(out):
    text = (out / "report.md").read_text()
    first, second = text.index("| wide-relu-mlp "), text.index("| validation/wide-mlp ")
    assert first < text.index("## Nets by which checkpoints were picked") < second
    for name in ("curves.png", "win_rates.png", "rates.png"):
        assert f"({name})" in text
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_command_finds_everything_in_the_cache(out, monkeypatch):
    monkeypatch.setattr(Trial, "run", None)  # a trial that runs fails
    before = json.loads((out / "report.json").read_text())
    assert main(before["command"].split()[1:]) == 0
    assert json.loads((out / "report.json").read_text())["results"] == before["results"]


def test_no_task_of_a_corpus_counts_as_untouched(tmp_path):
    budget = ["--steps", "2", "--seeds", "1", "--tuning-seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert (
        main(["evaluate", "--suite", "corpus", "--tasks", "bowl", "bowl-noisy", "--without", "bowl-noisy", *budget])
        == 0
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"]["not_looked_at"]["tasks"] == 0
    assert [(found["task"], found["looked_at"]) for found in report["results"]] == [("bowl/1", True)]


def test_suites_and_lengths_and_seeds_have_folders_of_their_own():
    for arguments, folder in (
        ([], "nets-1000"),
        (["--suite", "vision", "--steps", "3000"], "vision-3000"),
        (["--quick", "--seed", "40"], "nets-50-seed-40"),
    ):
        assert parse(arguments).out == Path("hrnn-evaluation", folder)
    assert parse(["--out", "mine"]).out == Path("mine")


def test_the_command_complains_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    for arguments, named in (
        (["--suite", "vision", "--tasks", "fashion-resnet-v2", "--data-dir", "nowhere"], "nowhere"),
        (["--tasks", "cats"], "'cats'"),
        (["--weights", "cats"], "'cats'"),
        (["--suite", "corpus", "--corpus", "cats"], "'cats'"),
        (["--suite", "nets", "--draws", "2"], "--draws would change nothing"),
        (["--suite", "nets", "--data-dir", "nowhere"], "--data-dir would change nothing"),
        (["--suite", "vision", "--corpus", "paper", "--draws", "2"], "--corpus and --draws would change nothing"),
    ):
        assert main(["evaluate", *arguments]) == 1
        complaint = capsys.readouterr().err
        assert complaint.startswith("lightning-hrnn: error: ")
        assert named in complaint
        assert complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_make_no_difference(tmp_path):
    trials = [Trial(SMALL, "wide-relu-mlp", name) for name in ("adam", "sgd", DEFAULT_ADAM)]
    seen = []
    found = run_trials(trials, DEFAULT_WEIGHTS, Cache(tmp_path / "a"), 2, lambda done, trial: seen.append(done))
    alone = run_trials(trials, DEFAULT_WEIGHTS, Cache(tmp_path / "b"), 1)
    for trial in trials:
        assert found[trial].lr == alone[trial].lr
        assert found[trial].curve == alone[trial].curve
    assert seen[-1] == pytest.approx(3)
