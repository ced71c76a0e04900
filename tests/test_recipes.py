"""Every recipe says what it is, parses, and runs: its own launch command, cut short."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from helpers.images import StoredCIFAR, write_idx_set
from helpers.ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from lightning_hrnn.cli import main
from lightning_hrnn.evaluation.runs import read_curves
from lightning_hrnn.optimizer.config import PARTS, RuleConfig
from lightning_hrnn.optimizer.kernels import build
from lightning_hrnn.tracking import LogWeightsCard
from lightning_hrnn.vision import MODELS, build_model, write_image_folder
from lightning_hrnn.vision.models import conv_bn

ROOT = Path(__file__).parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
HEADINGS = ["What", "Prerequisites", "Launch", "Override", "Limits"]
# What a test machine lacks, or would take too long.
ON_CPU = "--trainer.accelerator cpu --trainer.precision 32-true"
FORKED = shlex.split(f"{ON_CPU} --trainer.devices 2 --trainer.strategy ddp_fork")
ALONE = shlex.split("--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto")
SMALL_IMAGES = shlex.split("--data.data_dir images --data.image_size 32 --data.batch_size 2 --data.workers 0")
SMALL_RESNET = [
    "--model.model_options",
    '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_chs": 8}',
]
SMALL_SETS = shlex.split("--data.validation 40 --data.batch_size 32 --model.model conv_bn --model.model_options null")
INSTEAD = {
    "recipes/cifar10.yaml": SMALL_SETS,
    "recipes/mnist.yaml": SMALL_SETS,
    "recipes/fashion_mnist.yaml": SMALL_SETS,
    "recipes/trainer/gpu.yaml": ALONE,
    "recipes/trainer/ddp2.yaml": FORKED,
    "recipes/trainer/ddp8.yaml": FORKED,
    "recipes/trainer/slurm.yaml": [*FORKED, "--trainer.num_nodes", "1"],
    "recipes/trainer/fsdp2.yaml": ALONE,
    "recipes/imagenet/resnet": [*FORKED, *SMALL_IMAGES, *SMALL_RESNET],
    "recipes/imagenet/inception": [*FORKED, *SMALL_IMAGES, "--model.model", "two_heads"],
    "recipes/imagenet/resnet101v2_hrnn_fsdp2.yaml": ALONE,
    "recipes/meta_train/evolve.yaml": [
        *shlex.split("--model.places 2 --model.window 10 --data.instances 2 --data.validation_steps 20"),
        *(["--model.estimator.init_args.param_level", "false"] if build.why_unavailable() else []),
    ],
    **dict.fromkeys(
        ("recipes/meta_train/default.yaml", "recipes/meta_train/refine.yaml"),
        shlex.split(
            "--model.places 2 --model.window 4 --model.scored_steps 2 --data.instances 2 --data.validation_steps 4"
        ),
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


def instead(arguments):
    """What to run in place of what the recipes that a command names ask for; later ones win."""
    named = [part.removeprefix(f"{ROOT}/") for part in arguments if "recipes/" in part]
    return [
        option for part in named for start, options in INSTEAD.items() if part.startswith(start) for option in options
    ]


class TwoHeads(torch.nn.Module):
    """Gives auxiliary logits while it trains, like Inception V3, which cannot be made small."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.trunk = conv_bn(in_channels, 16, width=4)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(16, num_classes) for _ in range(2))

    def forward(self, images):
        logits = [head(self.trunk(images)) for head in self.heads]
        return tuple(logits) if self.training else logits[0]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", classes=3, train=8, val=4, size=40)


@pytest.fixture
def workplace(tmp_path, monkeypatch, image_folder):
    """An empty working directory with generated data where recipes look for theirs."""
    monkeypatch.chdir(tmp_path)
    for name in ("FashionMNIST", "MNIST"):
        write_idx_set(tmp_path / "data" / name / "raw", train=400, test=50)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", StoredCIFAR)
    (tmp_path / "images").symlink_to(image_folder)
    rivals = {
        "configuration": "Quadratic(dim=20)",
        "steps": 3,
        "baselines": {name: {"lr": 0.1} for name in ("adam", "rmsprop")},
    }
    (tmp_path / "runs" / "rivals").mkdir(parents=True)
    (tmp_path / "runs" / "rivals" / "report.json").write_text(json.dumps({"results": [rivals]}))
    monkeypatch.setitem(MODELS, "two_heads", TwoHeads)
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


def overrides(recipe):
    """The options that a recipe's heading offers; words in capitals stand for the user's own."""
    own = {"DIR": "there", "NAME": "mine", "FILE": "mine.safetensors"}
    lines = [line for line in heading(recipe)["Override"].splitlines() if line.startswith("--")]
    words = [own.get(word, word) for line in lines for word in shlex.split(re.split(" {2,}", line)[0])]
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in words]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "meta_train/" not in recipe])  # prose there
def test_what_the_heading_offers_to_override_can_be(recipe, capsys):
    offered = overrides(recipe)
    assert offered
    assert main([*launch(recipe), *offered, "--print_config"]) == 0, (offered, capsys.readouterr().err)


quiet = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",  # of a few images
    "ignore:This process .* is multi-threaded, use of fork",
)


@quiet
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_launch_command_runs(recipe, workplace):
    arguments = launch(recipe)
    assert main([*arguments, *instead(arguments), *SHORT]) == 0


STAGES = ["default", "refine", "attend", "evolve", "explore", "small"]
STAND_IN = f"""#!{sys.executable}
# Stands in for lightning-hrnn: writes down what it is asked for, and leaves the files that would come of it.
import json, os, pathlib, sys

with open("asked", "a") as asked:
    print(json.dumps(sys.argv[1:]), file=asked)
if sys.argv[1] == "average":
    left = pathlib.Path(sys.argv[2])
elif sys.argv[1] == "evaluate":
    left = pathlib.Path(sys.argv[-1], "report.json")
else:
    *_, recipe = (pathlib.Path(word) for word in sys.argv if word.endswith(".yaml"))
    left = pathlib.Path("runs", recipe.stem, "last.ckpt")
left.parent.mkdir(parents=True, exist_ok=True)
left.touch()
sys.exit(left.parent.name == os.environ.get("STOPPED"))
"""


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Run the whole chain of meta-training with a stand-in for our program; return what that was asked for."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "lightning-hrnn"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)

    def chain(*options, stopped=""):
        environment = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "STOPPED": stopped}
        script = ["bash", str(ROOT / "recipes/meta_train/shipped.sh"), *options]
        ended = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == bool(stopped), ended.stderr
        asked = [json.loads(line) for line in Path("asked").read_text().splitlines()] if Path("asked").exists() else []
        Path("asked").unlink(missing_ok=True)
        return asked

    return chain


def configs_of(command):
    return [value for option, value in itertools.pairwise(command) if option == "--config"]


def test_the_chain_of_shipped_weights_parses(chain, parse):
    commands = chain("--data.seed", "5")
    runs = [command for command in commands if command[0] == "meta-train"]
    assert [Path(configs_of(run)[-1]).stem for run in runs] == STAGES
    assert all(run[-2:] == ["--data.seed", "5"] for run in runs)
    for command in commands:
        parse(command)


def test_the_chain_of_shipped_weights_finds_what_each_run_leaves(chain):
    """Where checkpoints and weights are looked for is where the recipes put them."""
    for run in (command for command in chain() if command[0] == "meta-train"):
        recipe = yaml.safe_load(Path(configs_of(run)[-1]).read_text(encoding="utf-8"))
        kept, exported = recipe["trainer"]["callbacks"]
        assert kept["init_args"]["dirpath"] == f"runs/{Path(configs_of(run)[-1]).stem}"
        assert kept["init_args"]["save_last"]
        assert exported["init_args"]["path"] == f"{kept['init_args']['dirpath']}/weights.safetensors"


def test_the_chain_of_shipped_weights_goes_on_where_it_stopped(chain):
    whole = chain()
    shutil.rmtree("runs")
    before = chain(stopped="attend")
    assert before == whole[: len(before)]
    stopped, *after = chain()
    assert stopped == [*before[-1], "--ckpt_path", "runs/attend/last.ckpt"]
    assert after == whole[len(before) :]
    assert chain() == []


def resnet101_sharded(place):
    """The recipe, on one of two processes; each holds its share of every parameter."""

    def look(self, trainer, module):
        (optimizer,) = trainer.optimizers
        assert type(optimizer).__name__ == "HRNN"
        params = list(module.parameters())
        assert all(isinstance(param, DTensor) for param in params)
        here, whole = sum(p.to_local().numel() for p in params), sum(p.numel() for p in params)
        assert 0.45 < here / whole < 0.55
        looked.append(here)

    looked = []
    recipe = str(ROOT / "recipes/imagenet/resnet101v2_hrnn_fsdp2.yaml")
    here = shlex.split(f"{ON_CPU} --trainer.devices 2 --trainer.strategy.data_parallel_size 2")
    with patch.object(LogWeightsCard, "on_train_start", look):
        assert main(["train", "fit", "--config", recipe, *here, *SMALL_IMAGES, *SMALL_RESNET, *SHORT]) == 0
    assert len(looked) == 1


@quiet
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # nobody writes into the logits
def test_resnet101_trains_sharded(workplace):
    assert run_on_ranks([resnet101_sharded], workplace)["resnet101_sharded"] == ""


@pytest.mark.parametrize("net", ["resnet50v2", "inception_v3"])
def test_twins_differ_in_nothing_but_the_optimizer(net):
    """The paper's comparison is fair: same net, data, precision and length."""
    twins = []
    for path in sorted((ROOT / "recipes/imagenet").glob(f"{net}_*_ddp.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in ("optimizer", "lr", "momentum", "weight_decay", "optimizer_options", "schedule", "warmup_steps"):
            config["model"]["init_args"].pop(key, None)
        for key in ("decay_epochs", "decay_rate"):
            config["model"]["init_args"].pop(key, None)
        callbacks = [c for c in config["trainer"].pop("callbacks") if not c["class_path"].endswith("OptimizerCallback")]
        assert callbacks[0]["init_args"].pop("dirpath").endswith(path.name.removesuffix("_ddp.yaml"))
        config["trainer"].pop("gradient_clip_val", None)
        config["trainer"]["logger"]["init_args"].pop("name")
        twins.append((config, callbacks))
    assert len(twins) == 4
    assert all(twin == twins[0] for twin in twins)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "/narrow/" in recipe])
def test_a_narrow_net_is_as_large_as_it_says_and_takes_its_images(recipe):
    config = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))
    own = config["model"]["init_args"]
    net = build_model(own["model"], 1, 10, **own["model_options"])
    assert f"({sum(param.numel() for param in net.parameters()):,} parameters" in heading(recipe)["What"].replace(
        "\n", " "
    )
    size = config["data"]["init_args"]["image_size"]
    assert net(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "ablate_" in recipe])
def test_an_ablation_differs_from_the_default_rule_by_what_it_names(recipe):
    changes = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))["model"]["init_args"]["rule_changes"]
    default, ablated = RuleConfig().to_dict(), RuleConfig(**changes).to_dict()
    assert {name for name in default if default[name] != ablated[name]} == set(changes)
    part = recipe.partition("ablate_")[2].partition(".")[0]
    if part in default["features"]:
        assert set(default["features"]) - set(ablated["features"]) == {part}
    elif part in ("relative_update", "attention", *PARTS):
        assert (part in str(default)) != (part in str(ablated))
    else:
        assert default[part] != ablated[part]


@pytest.mark.parametrize("recipe", ["recipes/digits.yaml", "recipes/fashion_mnist.yaml"])
def test_without_the_callback_the_baseline_trains(recipe, workplace, capsys):
    arguments = launch(recipe)
    assert main([*arguments, "--trainer.callbacks", "null", *instead(arguments), *SHORT]) == 0
    assert "HRNN" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["hrnn", "sgd", "rmsprop", "adam", "adamw"])
def test_an_optimizer_fragment_decides_who_trains(name, workplace, monkeypatch):
    trained = []
    monkeypatch.setattr(
        LogWeightsCard, "on_train_start", lambda self, trainer, module: trained.extend(trainer.optimizers)
    )
    arguments = ["train", "fit", "--config", str(ROOT / "recipes/digits.yaml")]
    arguments += ["--config", str(ROOT / f"recipes/optimizer/{name}.yaml")]
    assert main([*arguments, *SHORT]) == 0
    assert [type(optimizer).__name__.lower() for optimizer in trained] == [name]


@quiet
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # Lightning's, of a resumed run
def test_two_processes_are_killed_and_go_on(workplace):
    """The ImageNet recipe with fragments for the processor and two processes, killed within an epoch."""
    (workplace / "often.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "callbacks": [
                        {"class_path": "lightning_hrnn.HRNNOptimizerCallback"},
                        {
                            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                            "init_args": {"dirpath": "kept", "every_n_train_steps": 4, "save_top_k": -1},
                        },
                    ]
                }
            }
        )
    )
    fragments = ["imagenet/resnet50v2_hrnn_ddp", "trainer/cpu", "trainer/ddp2"]
    configs = [part for name in fragments for part in ("--config", str(ROOT / f"recipes/{name}.yaml"))]
    arguments = ["train", "fit", *configs, "--config", "often.yaml", *SMALL_IMAGES, *SMALL_RESNET, *SHORT[2:]]
    arguments += ["--trainer.log_every_n_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("said.txt", "w") as said:
        running = subprocess.Popen(
            [sys.executable, "-m", "lightning_hrnn", *arguments, "--trainer.max_epochs", "100000"],
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,
        )
        try:
            while running.poll() is None and not list(Path("kept").glob("*step=8.ckpt")):
                time.sleep(0.2)
            assert running.poll() is None, Path("said.txt").read_text()
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert "MEMBER: 2/2" in Path("said.txt").read_text()
    (saved,) = Path("kept").glob("*step=8.ckpt")  # a later one may have been under way
    stopped = torch.load(saved, weights_only=False)
    assert stopped["global_step"] % 6  # 24 images, 2 processes, batches of 2: within an epoch
    epochs = stopped["epoch"] + 2
    again = ["--ckpt_path", str(saved), "--trainer.max_epochs", str(epochs), "--trainer.strategy", "ddp_fork"]
    assert main([*arguments, *again]) == 0
    steps, _ = read_curves(Path("runs/imagenet/resnet50v2_hrnn/version_1/metrics.csv"))["train/loss"]
    assert steps == list(range(stopped["global_step"], 6 * epochs))
