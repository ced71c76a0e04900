"""Every recipe says what it is, parses, and runs: its own launch command, cut short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.images import write_idx_set

from lightning_hrnn.cli import main

ROOT = Path(__file__).parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
HEADINGS = ["What", "Prerequisites", "Launch", "Override", "Limits"]
# What a test machine lacks, or would take too long.
INSTEAD = {
    "recipes/trainer/gpu.yaml": ["--trainer.accelerator", "cpu"],
    "recipes/trainer/ddp2.yaml": ["--trainer.strategy", "auto", "--trainer.devices", "1"],
    "recipes/meta_train/default.yaml": shlex.split(
        "--model.places 2 --model.window 4 --model.scored_steps 2 --data.instances 2 --data.validation_steps 4"
    ),
}
SHORT = [
    "--trainer.fast_dev_run",
    "2",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]


def heading(recipe):
    """The comment on top of a recipe, as heading -> text."""
    lines = (ROOT / recipe).read_text(encoding="utf-8").splitlines()
    comment = [line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    found = {}
    for line in comment:
        if match := re.match(r" (\w+):\s+(.+)", line):
            found[match[1]] = match[2]
        else:
            found[list(found)[-1]] += f"\n{line.strip()}"
    return found


def launch(recipe):
    """The arguments of a recipe's launch command."""
    program, *arguments = shlex.split(heading(recipe)["Launch"], comments=True)
    assert program == "lightning-hrnn"
    return [str(ROOT / part) if part.startswith("recipes/") else part for part in arguments]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with generated data where recipes look for theirs."""
    monkeypatch.chdir(tmp_path)
    write_idx_set(tmp_path / "data" / "FashionMNIST" / "raw", train=400, test=50)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_heading_says_all(recipe):
    assert [name for name in heading(recipe) if name in HEADINGS] == HEADINGS
    assert any(part.endswith(recipe) for part in launch(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_prints_as_a_whole_configuration(recipe, capsys):
    """What the launch command resolves to holds every value that the recipe sets."""
    assert main([*launch(recipe), "--print_config"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)

    def check(part, within, where):
        for key, value in part.items():
            inside = within.get("init_args", {}) if key not in within and "class_path" in within else within
            if isinstance(value, dict):
                check(value, inside[key], f"{where}.{key}")
            elif isinstance(value, list):
                assert len(inside[key]) == len(value), f"{where}.{key}"
            elif key == "class_path":
                assert inside[key].rpartition(".")[2] == value.rpartition(".")[2]
            else:
                assert inside[key] == value, f"{where}.{key}"

    check(yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8")), whole, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_launch_command_runs(recipe, workplace):
    options = [*INSTEAD.get(recipe, []), *SHORT]
    if any("fashion_mnist" in part for part in launch(recipe)):
        options += ["--data.validation", "40"]
    assert main([*launch(recipe), *options]) == 0


@pytest.mark.parametrize("recipe", ["recipes/digits.yaml", "recipes/fashion_mnist.yaml"])
def test_without_the_callback_the_baseline_trains(recipe, workplace, capsys):
    sizes = ["--data.validation", "40"] if "fashion" in recipe else []
    assert main([*launch(recipe), "--trainer.callbacks", "null", *sizes, *SHORT]) == 0
    assert "HRNN" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_two_processes_train_together(workplace):
    """The real thing: `ddp2` launches its second process and both end well."""
    arguments = ["train", "fit", "--config", str(ROOT / "recipes/digits.yaml"), *SHORT]
    arguments += ["--config", str(ROOT / "recipes/trainer/ddp2.yaml"), "--trainer.accelerator", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "lightning_hrnn", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "MEMBER: 2/2" in ran.stderr
