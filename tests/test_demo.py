"""The demo: a fair comparison, its report, its figure."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_hrnn.cli import main
from lightning_hrnn.cli.demo import BASELINES, OURS, ranked, summarise
from lightning_hrnn.evaluation.comparison import Entrant, Exam, Run, Score, ScoreCurve, train_entrant
from lightning_hrnn.evaluation.plots import Panel, plot_panels
from lightning_hrnn.evaluation.report import Column, Report
from lightning_hrnn.vision.batches import ImageSet, TensorBatches

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


# -- the command, once, cut short


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a short demo."""
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert main(["demo", "--steps", "16", "--seed", "3", "--out", str(out)]) == 0
    assert torch.get_num_threads() == 1  # several wait for each other on a busy machine
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo / "report.json").read_text())


def test_ours_and_four_baselines_ran(report):
    assert {row["name"] for row in report["results"]} == {OURS, *BASELINES}
    for row in report["results"]:
        assert [score["step"] for score in row["curve"]] == list(range(17))
        assert row["step"] == 16
        assert row["steps_per_second"] == pytest.approx(16 / row["seconds"])


def test_all_start_from_the_same_weights(report):
    starts = [row["curve"][0] for row in report["results"]]
    assert all(start == starts[0] for start in starts)
    assert 2.0 < starts[0]["train_loss"] < 3.0  # about log 10, as of a net that knows nothing


def test_all_but_slow_sgd_learn(report):
    for row in report["results"]:
        if row["name"] != "SGD+momentum":
            assert row["train_loss"] < row["curve"][0]["train_loss"] - 0.005


def test_the_curve_ends_in_the_final_score(report):
    for row in report["results"]:  # digits are few: the curve's sample is all of them
        for key in ("train_loss", "test_loss", "test_accuracy"):
            assert row["curve"][-1][key] == pytest.approx(row[key])


def test_the_table_is_sorted_by_training_loss(demo, report):
    losses = [row["train_loss"] for row in report["results"]]
    assert losses == sorted(losses)
    table = [line for line in (demo / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [row["name"] for row in report["results"]]


def test_the_report_says_how_to_repeat_it(demo, report):
    assert report["command"] == f"lightning-hrnn demo --steps 16 --seed 3 --out {demo}"
    assert report["settings"]["steps"] == 16
    assert report["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert report["command"] in (demo / "report.md").read_text()


def test_the_figures_named_are_there(demo, report):
    assert report["figures"]
    for name in report["figures"]:
        assert (demo / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (demo / "report.md").read_text()


def test_the_same_seed_gives_the_same_numbers(tmp_path, report):
    assert main(["demo", "--steps", "16", "--seed", "3", "--threads", "1", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert [row["curve"] for row in again["results"]] == [row["curve"] for row in report["results"]]


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(tmp_path):
    began = time.process_time()  # on a busy machine the wall clock says little
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert time.process_time() - began < 180
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    names = [row["name"] for row in results]
    assert names.index(OURS) <= 1  # below every baseline's training loss but one at most
    assert results[names.index(OURS)]["test_accuracy"] >= 0.95


# -- training side by side


class Point(LightningModule):
    """A linear classifier of 2 classes that notes its batches and draws random numbers of its own."""

    def __init__(self, draws=0, sleep=0.0):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)
        self.draws, self.sleep, self.seen = draws, sleep, []

    def forward(self, images):
        return self.net(images.flatten(1))

    def training_step(self, batch, batch_idx):
        torch.rand(self.draws)
        time.sleep(self.sleep)
        self.seen.append(batch[1].tolist())
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images(count=24):
    generator = torch.Generator().manual_seed(1)
    data = ImageSet(
        torch.randint(0, 256, (count, 1, 2, 2), dtype=torch.uint8, generator=generator), torch.arange(count) % 2
    )
    return TensorBatches(data, 8, lambda stored: stored / 255, shuffle_seed=5)


def compete(steps=7, every=3, exam=None, **options):
    module = []
    entrant = Entrant("a", "", lambda: module.append(Point(**options)) or module[0])
    exam = exam or Exam(images(), images(), num_classes=2)
    batches = images()
    run = train_entrant(entrant, batches, steps, ScoreCurve(exam, every), exam, seed=4)
    return run, module[0]


def test_entrants_see_the_same_batches_whatever_they_draw():
    one, other = compete(draws=0)[1], compete(draws=13)[1]
    assert len(one.seen) == 7
    assert one.seen == other.seen
    assert one.seen[:3] != one.seen[3:6]  # another order in the second epoch
    assert torch.equal(one.net.weight, other.net.weight)


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7])])
def test_scores_come_at_the_start_between_and_at_the_end(every, steps):
    assert [score.step for score in compete(every=every)[0].curve] == steps


def test_scores_cover_all_images():
    run, module = compete()
    data = images().data
    with torch.no_grad():
        logits = module(data.images / 255)
    assert run.final.train_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, data.labels)))
    assert run.final.test_accuracy == pytest.approx(float((logits.argmax(1) == data.labels).float().mean()))


def test_training_is_timed_without_scoring():
    class SlowExam(Exam):
        def score(self, module, step):
            time.sleep(0.3)
            return super().score(module, step)

    run, _ = compete(steps=6, every=1, sleep=0.02, exam=SlowExam(images(), images(), num_classes=2))
    assert 0.12 <= run.seconds < 1.0  # 6 steps of 0.02 s, and not the 6 scores of 0.3 s
    assert run.steps_per_second == pytest.approx(6 / run.seconds)


def test_scoring_leaves_the_training_mode():
    module = Point().train()
    Exam(images(), images(), num_classes=2).score(module, 0)
    assert module.training


# -- the verdict


def outcome(name, loss, accuracy=0.5):
    score = Score(10, loss, loss, accuracy)
    return Run(name, "", [score], score, 1.0)


def test_diverged_runs_come_last():
    runs = [outcome("a", math.nan), outcome("b", 2.0), outcome("c", math.inf), outcome("d", 0.5)]
    assert [run.name for run in ranked(runs)][:2] == ["d", "b"]


def test_the_summary_counts_the_baselines_behind():
    runs = [outcome("Adam", 0.1), outcome(OURS, 0.2, accuracy=0.975), outcome("SGD", 0.3), outcome("RMSProp", math.nan)]
    summary = summarise(runs)
    assert "training loss of 2.00e-01, below 2 of 3 baselines" in summary
    assert "test accuracy of 97.50%" in summary


# -- reports and figures


def test_reports_hold_what_is_not_finite_as_text(tmp_path):
    rows = [{"name": "a", "loss": math.nan, "curve": [1.0, math.inf]}, {"name": "b"}]
    columns = (Column("name", "optimizer"), Column("loss", "loss", ".2e"))
    written = Report("T", "S.", "do it", {"x": Path("y")}, columns, rows).write(tmp_path / "new")
    content = json.loads(written[0].read_text())
    assert content["results"] == [{"name": "a", "loss": "nan", "curve": [1.0, "inf"]}, {"name": "b"}]
    assert content["settings"] == {"x": "y"}
    assert re.findall(r"^\| [ab] .*$", written[1].read_text(), re.MULTILINE) == ["| a | nan |", "| b | – |"]


def test_a_figure_names_every_curve_once(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    loss = Panel(
        "Loss", "steps", "nats", {"a": ([0, 1, 2], [1.0, math.nan, 0.1]), "ours": ([0, 1], [1.0, 0.01])}, log=True
    )
    share = Panel("Accuracy", "steps", "share", {"a": ([0], [0.5]), "b": ([0], [0.6])}, percent=True)
    plot_panels([loss, share], tmp_path / "x" / "f.png", "Title", highlight="ours")
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "ours", "b"]
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert lines["ours"].get_linewidth() > lines["a"].get_linewidth()
    assert len({line.get_color() for line in lines.values()}) == 3
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [0, 2]  # what is not finite is left out
