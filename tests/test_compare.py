"""`lightning-hrnn compare`: runs are found, read, put side by side; what is none is named."""

import csv
import json

import pytest

from lightning_hrnn.cli import main
from lightning_hrnn.evaluation.runs import find_runs, interpolate, panels_of_runs, read_runs, smoothed


def write_run(folder, config=None, seconds=True, scale=1.0, steps=40):
    """A run as CSVLogger writes it: the loss falls, time passes at a quarter of a second a step."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(9, steps, 10):
        rows.append({"step": step, "epoch": 0, "train/loss": scale / (step + 1), "seconds": (step + 1) / 4})
        rows.append({"step": step, "epoch": 0, "val/loss": 2 * scale / (step + 1), "val/acc": step / 100})
    names = ["epoch", "seconds", "step", "train/loss", "val/acc", "val/loss"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [name for name in names if seconds or name != "seconds"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


HRNN = """
trainer: {callbacks: [{class_path: lightning_hrnn.callbacks.HRNNOptimizerCallback, init_args: {lr: 1.0}}]}
model: {class_path: x, init_args: {optimizer: adamw, lr: null}}
"""
SGD = "trainer: {callbacks: null}\nmodel: {class_path: x, init_args: {optimizer: sgd, lr: 0.1}}\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a" / "version_0", HRNN)
    write_run(tmp_path / "runs" / "b" / "version_0", SGD, scale=3.0, steps=60)
    return tmp_path / "runs"


def test_the_command_writes_table_and_figure(runs, capsys, tmp_path):
    assert main(["compare", "runs/b", "runs/a", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "Comparison of 2 runs" in shown
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert [(row["run"], row["optimizer"], row["steps"], row["seconds"]) for row in rows] == [
        ("a/version_0", "HRNN", 40, 10.0),  # the lower training loss comes first
        ("b/version_0", "sgd lr 0.1", 60, 15.0),
    ]
    assert rows[0]["train/loss"] == pytest.approx(1 / 40)
    assert rows[0]["val/loss"] == pytest.approx(2 / 40)
    assert rows[1]["val/acc"] == pytest.approx(0.59)
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["train/loss"]) for row in table] == [row["train/loss"] for row in rows]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_over_steps_and_over_time(runs):
    logged = read_runs(find_runs([runs]))
    panels = panels_of_runs(logged, ["val/loss"])
    assert [panel.xlabel for panel in panels] == ["optimizer steps", "seconds of training"]
    assert list(panels[0].curves) == ["HRNN (a/version_0)", "sgd lr 0.1 (b/version_0)"]
    assert panels[1].curves["HRNN (a/version_0)"][0] == [2.5, 5.0, 7.5, 10.0]


def test_runs_without_time_say_so(runs, tmp_path, capsys):
    write_run(runs / "c", seconds=False)
    assert main(["compare", "runs", "--out", "out"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "Without time: c; lightning_hrnn.tracking.RunClock logs it." in report["summary"]
    by_name = {row["run"]: row for row in report["results"]}
    assert (by_name["c"]["seconds"], by_name["c"]["optimizer"]) == (None, None)
    assert len(panels_of_runs([run for run in read_runs(find_runs([runs])) if run.name == "c"], ["val/loss"])) == 1


def test_metrics_can_be_chosen(runs, tmp_path):
    assert main(["compare", "runs", "--metrics", "val/acc", "--out", "out"]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert [row["run"] for row in rows] == ["b/version_0", "a/version_0"]  # the highest accuracy first


def test_a_run_that_broke_down_comes_last(runs, tmp_path):
    broken = write_run(runs / "0")
    (broken / "metrics.csv").write_text("step,train/loss\n9,nan\n19,nan\n")
    assert main(["compare", "runs", "--metrics", "train/loss", "--out", "out"]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert [row["run"] for row in rows] == ["a/version_0", "b/version_0", "0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gone"], "There is no folder 'gone'."),
        (["empty"], "'empty' holds no run: no metrics.csv in it or below."),
        (["foreign"], "is no file of Lightning's CSVLogger: it has no column 'step'"),
        (["words"], "line 2: loss is 'low', no number"),
        (["young"], "metrics.csv holds no metric yet"),
        (
            ["runs", "--metrics", "train/los"],
            "a/version_0 has no metric 'train/los'; it has train/loss, val/acc",
        ),
        (["runs", "other"], "The runs share no metric."),
    ],
)
def test_what_is_no_run_is_named(runs, tmp_path, capsys, arguments, named):
    files = {
        "foreign": "name,age\nann,4\n",
        "words": "step,loss\n1,low\n",
        "young": "step,epoch\n",
        "other": "step,speed\n1,2\n",
    }
    (tmp_path / "empty").mkdir()
    for folder, text in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.csv").write_text(text)
    assert main(["compare", *arguments]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "hrnn-comparison").exists()


@pytest.mark.parametrize(
    "config",
    [
        "model: !!python/object:x.Y {}",
        "- a list",
        "words",
        "trainer: {callbacks: [words, {lr: 1}]}",
        "trainer: fast\nmodel: small",
        "trainer: {callbacks: {class_path: null}}\nmodel: {init_args: 3}",
    ],
)
def test_a_configuration_that_cannot_be_read_does_no_harm(runs, config):
    (runs / "a" / "version_0" / "config.yaml").write_text(config)
    assert [run.label for run in read_runs(find_runs([runs / "a"]))] == ["version_0"]


def test_the_module_tells_where_the_command_line_does_not(runs):
    write_run(runs / "c")
    (runs / "c" / "hparams.yaml").write_text("optimizer: adam\nlr: 0.003\n")
    (found,) = read_runs(find_runs([runs / "c"]))
    assert found.label == "adam lr 0.003 (c)"


def test_one_logged_time_is_enough():
    assert interpolate(39, [9], [2.5]) == pytest.approx(10.0)


def test_a_smoothed_curve_looks_back_only():
    noisy = [float(i % 2) for i in range(200)]
    assert smoothed(noisy)[4:] == [0.5] * 196  # over four values
    assert smoothed(noisy)[:2] == [0.0, 0.5]
