"""The command line: help, errors in one line, info, Lightning's subcommands."""

import atexit
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.images import write_idx_set
from helpers.modules import SMALL_WEIGHTS
from lightning.pytorch import Callback

from lightning_hrnn.cli import COMMANDS, main
from lightning_hrnn.cli.errors import explain, reporting_errors
from lightning_hrnn.cli.every_run import leave_process_group
from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.run_report import panels_of
from lightning_hrnn.evaluation.runs import optimizer_of, read_curves
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, WEIGHTS_FOLDER, WeightsError
from lightning_hrnn.version import __version__
from lightning_hrnn.vision import FashionMNISTData

DIGITS = str(Path(__file__).parents[1] / "recipes" / "digits.yaml")
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with one line of complaint; return that line."""

    def run(*arguments, status=1):
        assert main(list(arguments)) == status
        complaints = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
        assert "Traceback" not in "\n".join(complaints)
        assert complaints[-1].startswith("lightning-hrnn: error: ")
        assert [line for line in complaints[:-1] if not line.startswith("Seed set")] == []
        return complaints[-1]

    return run


# -- help and start-up


def test_help_comes_without_torch():
    code = (
        "import sys; from lightning_hrnn.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'lightning', 'torchvision', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else status)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    for name in COMMANDS:
        assert f"\n    {name} " in shown.stdout
    assert "lightning-hrnn train fit --config recipes/digits.yaml" in shown.stdout


def test_the_module_runs_as_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "lightning_hrnn", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["lightning-hrnn", __version__]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: lightning-hrnn {command} ")
    assert f"examples:\n  lightning-hrnn {command}" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "{demo,train,meta-train,average,benchmark"),
        (["fly"], "'fly'"),
        (["info", "--jsn"], "--jsn"),
        (["train"], "{fit,validate,test,predict}"),
        (["demo", "--data", "cats"], "cats"),
        (["demo", "--steps", "0"], "steps"),
    ],
)
def test_wrong_arguments_are_named(fails, arguments, named):
    assert named in fails(*arguments, status=2)


# -- errors


def test_a_missing_extra_is_named():
    text = explain(ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics"))
    assert text.endswith("Install it with `pip install 'lightning-hrnn[vision]'`.")
    assert explain(ModuleNotFoundError("No module named 'foo'", name="foo")) == "No module named 'foo'"


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(TypeError), reporting_errors():
        raise TypeError("a bug")


def test_debug_shows_the_traceback():
    with pytest.raises(WeightsError, match="nope"):
        main(["info", "--weights", "nope", "--debug"])
    with pytest.raises(WeightsError, match="nope"):
        main(["--debug", "info", "--weights", "nope"])


def test_an_interrupt_is_no_traceback(capsys):
    with reporting_errors() as outcome:
        raise KeyboardInterrupt
    assert outcome.status == 130
    assert capsys.readouterr().err == "lightning-hrnn: error: interrupted\n"


# -- info


def test_info_shows_weights_kernels_and_versions(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        f"weights {DEFAULT_WEIGHTS} (default)",
        "verified, sha256",
        "kernels",
        "eager",
        torch.__version__[:5],
    ):
        assert expected in shown


def test_info_as_json_holds_the_cards(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (default,) = [weights for weights in facts["weights"] if weights["default"]]
    assert default["name"] == DEFAULT_WEIGHTS
    assert default["card"] == json.loads((WEIGHTS_FOLDER / f"{DEFAULT_WEIGHTS}.json").read_text())
    assert default["meta_parameters"] > 5000
    assert facts["kernels"]["eager"] == "available"
    assert facts["versions"]["lightning-hrnn"] == __version__


def copy_of_weights(folder):
    for suffix in (".safetensors", ".json"):
        (folder / f"mine{suffix}").write_bytes((WEIGHTS_FOLDER / f"{DEFAULT_WEIGHTS}{suffix}").read_bytes())
        shutil.copy(WEIGHTS_FOLDER / f"{SMALL_WEIGHTS}{suffix}", folder)
    return folder / "mine.safetensors"


def test_info_verifies_a_file(tmp_path, capsys):
    assert main(["info", "--json", "--weights", str(copy_of_weights(tmp_path))]) == 0
    (weights,) = json.loads(capsys.readouterr().out)["weights"]
    assert weights["checksum"] == "verified"


@pytest.mark.parametrize("command", [["info"], ["demo"]])
def test_damaged_weights_are_named(tmp_path, fails, command):
    weights = copy_of_weights(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert f"{weights} is damaged: its checksum is" in fails(*command, "--weights", str(weights))


# -- train


@pytest.mark.parametrize(
    ("arguments", "named", "status"),
    [
        (["--model.widht", "3"], "'widht' is not accepted", 2),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch", 2),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs", 2),
        (["--config", "nowhere.yaml"], "nowhere.yaml", 2),
        (["--model", "nowhere.Module"], "No module named 'nowhere'", 2),
        (["--model.model", "resnet188"], "similar names: resnet18", 1),
        (
            ["--trainer.callbacks+=HRNNOptimizerCallback", "--trainer.callbacks.weights", "nope"],
            "Unknown weights 'nope'",
            1,
        ),
    ],
)
def test_train_names_what_is_wrong(fails, arguments, named, status):
    assert named in fails("train", "fit", "--config", DIGITS, *arguments, status=status)


@pytest.mark.parametrize("command", [["demo", "--data", "fashion-mnist", "--data-dir", "gone"], ["train", "fit"]])
def test_missing_data_are_one_clear_error(tmp_path, fails, monkeypatch, command):
    monkeypatch.setattr(FashionMNISTData, "debian", tmp_path / "debian")
    write_idx_set(tmp_path / "debian", train=4, test=4)  # not what was asked for
    if command[0] == "train":
        recipe = DIGITS.replace("digits", "fashion_mnist")
        command += ["--config", recipe, "--data.data_dir", "gone", "--trainer.logger", "false", *QUIET]
    complaint = fails(*command)
    assert "FashionMNIST not found: neither 'gone'" in complaint
    assert "apt-get install dataset-fashion-mnist" in complaint


@pytest.mark.parametrize(
    "command", [["demo", "--steps", "1"], ["benchmark", "--quick"], ["evaluate", "--quick"], ["train"], ["meta-train"]]
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, fails, monkeypatch, command):
    def work(*_, **__):
        raise AssertionError("the work began")

    for place in (
        "demo.train_all",
        "benchmark.measure",
        "evaluate.compare",
        "lightning.CommandCLI.instantiate_trainer",
    ):
        monkeypatch.setattr(f"lightning_hrnn.cli.{place}", work)
    if "train" in command[0]:
        recipe = {"train": DIGITS, "meta-train": DIGITS.replace("digits", "meta_train/quick")}[command[0]]
        command = [*command, "fit", "--config", recipe]
    (tmp_path / "afile").touch()
    assert fails(*command, "--out", "afile") == (
        "lightning-hrnn: error: Nothing can be written to the folder 'afile': it is a file. "
        "Name another with `--out DIR`."
    )
    assert "Name another with `--out DIR`." in fails(*command, "--out", "afile/below")


def test_a_folder_that_cannot_be_made_says_why(tmp_path):
    with pytest.raises(OSError, match=r"'/proc/hrnn': no such file or directory\. Name another with `--out DIR`"):
        ready_folder("/proc/hrnn")  # where even the superuser makes none
    assert ready_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_printed_configuration_prints_itself_again(tmp_path, capsys):
    assert main(["train", "fit", "--config", DIGITS, "--model.lr", "0.5", "--print_config"]) == 0
    first = capsys.readouterr().out
    assert "lr: 0.5" in first
    (tmp_path / "mine.yaml").write_text(first)
    assert main(["train", "fit", "--config", "mine.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a second run
def test_train_reports_and_its_checkpoint_tests_alike(tmp_path):
    assert main(["train", "fit", "--config", DIGITS, "--trainer.max_epochs", "2", "--out", "out", *QUIET]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    metrics = {row["metric"]: row["value"] for row in report["results"]}
    assert {"train/loss", "val/loss", "val/acc", "val/acc_top5"} <= metrics.keys()
    curves = read_curves(tmp_path / "out" / "metrics.csv")
    assert curves["val/acc"][1][-1] == pytest.approx(metrics["val/acc"])
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")

    checkpoint, last = sorted((tmp_path / "runs" / "digits").rglob("*.ckpt"))
    assert (checkpoint.name, last.name) == ("epoch=1-step=78.ckpt", "last.ckpt")
    config = next((tmp_path / "runs" / "digits").rglob("config.yaml"))
    assert str(config.relative_to(tmp_path)) in report["command"]
    assert optimizer_of(tmp_path / "out") == "HRNN"
    again = ["--config", str(config), "--ckpt_path", str(checkpoint), "--out", "again", *QUIET]
    assert main(["train", "validate", *again]) == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert {row["metric"]: row["value"] for row in report["results"]}["val/loss"] == pytest.approx(metrics["val/loss"])


def test_at_its_exit_a_process_leaves_its_group(monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    fit = ["train", "fit", "--config", DIGITS, "--trainer.fast_dev_run", "true", "--trainer.callbacks", "null", *QUIET]
    assert main(fit) == 0
    assert leave_process_group in at_exit
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    for _ in range(2):  # the second time there is none to leave
        leave_process_group()
        assert not torch.distributed.is_initialized()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning's
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_what_hrnn_began_no_other_optimizer_goes_on_with(fails):
    fit = ["train", "fit", "--config", DIGITS, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", *QUIET]
    assert main(fit) == 0
    (saved,) = Path("runs/digits").rglob("last.ckpt")
    said = fails(*fit, "--trainer.callbacks", "null", "--trainer.max_steps", "4", "--ckpt_path", str(saved))
    assert "the state of HRNN, from which AdamW cannot go on. Resume with --trainer.callbacks+=HRNN" in said


def test_a_trial_of_a_few_batches_leaves_no_checkpoint(tmp_path):
    assert main(["train", "fit", "--config", DIGITS, "--trainer.fast_dev_run", "2", *QUIET]) == 0
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's
def test_the_module_is_the_checkpoints_and_what_that_overrules_is_said(fails, caplog):
    fit = ["train", "fit", "--config", DIGITS, "--trainer.limit_val_batches", "0", *QUIET]
    assert main([*fit, "--trainer.max_steps", "1"]) == 0
    (saved,) = Path("runs/digits").rglob("last.ckpt")
    go_on = [*fit, "--trainer.max_steps", "2", "--ckpt_path"]
    overruled = "Taken from the checkpoint, whatever was given"
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert main([*go_on, str(saved)]) == 0
        assert overruled not in caplog.text
        assert main([*go_on, str(saved), "--model.model", "conv_bn", "--model.lr", "0.1"]) == 0
        assert f"{overruled}: model=conv (not conv_bn), lr=None (not 0.1)." in caplog.text
    Path("cut.ckpt").write_bytes(saved.read_bytes()[:30000])
    Path("words.ckpt").write_text("hello")
    Path("empty.ckpt").touch()
    torch.save([1], "list.ckpt")
    torch.save({"a": 1}, "dict.ckpt")
    whole = torch.load(saved, weights_only=True)
    torch.save({key: whole[key] for key in whole if key not in ("optimizer_states", "lr_schedulers")}, "light.ckpt")
    for name, why in (
        ("cut.ckpt", "Error"),
        ("words.ckpt", ""),
        ("empty.ckpt", "EOFError"),
        ("list.ckpt", "it holds a list, no dict"),
        ("dict.ckpt", "it lacks ['pytorch-lightning_version', 'state_dict', 'loops', 'opt"),
        ("light.ckpt", "it holds the weights alone, from which no fit goes on"),
    ):
        error = fails(*go_on, name)
        assert f"The checkpoint '{name}' is not Lightning's, or not whole." in error
        assert why in error
        assert "EOFError:" not in error
        assert "weights_only" not in error  # torch's advice, which is not for a file that is damaged


def test_what_belongs_together_shares_a_panel():
    curve, constant = ([0.0, 1.0], [1.0, 0.5]), ([0.0, 1.0], [0.0, 0.0])
    names = ["acc", "train/loss", "val/loss", "meta_loss", "meta_loss/bowl", "val/acc"]
    panels = panels_of({**dict.fromkeys(names, curve), "skipped": constant})
    assert {panel.title: sorted(panel.curves) for panel in panels} == {
        "loss": ["train/loss", "val/loss"],
        "meta_loss": ["meta_loss", "meta_loss/bowl"],
        "acc": ["acc", "val/acc"],
    }
    assert [panel.title for panel in panels] == ["loss", "meta_loss", "acc"]  # losses first


def test_any_module_trains_by_its_class_path(tmp_path):
    boring = "lightning.pytorch.demos.boring_classes.BoringModel"
    options = ["--trainer.max_steps", "2", "--trainer.logger", "false", *QUIET]
    assert main(["train", "fit", "--model", boring, "--trainer.callbacks+=HRNNOptimizerCallback", *options]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2


def test_fashion_mnist_trains_from_generated_files(tmp_path):
    write_idx_set(tmp_path / "data" / "FashionMNIST" / "raw", train=64, test=20)
    recipe = DIGITS.replace("digits", "fashion_mnist")
    sizes = [
        "--data.validation",
        "10",
        "--data.batch_size",
        "16",
        "--trainer.max_epochs",
        "1",
        "--trainer.log_every_n_steps",
        "1",
    ]
    assert main(["train", "fit", "--config", recipe, *sizes, "--out", "out", *QUIET]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["summary"].startswith("3 optimizer steps")


# -- Ctrl-C


class CtrlC(Callback):
    """Send this process what Ctrl-C sends, once, in the middle of a batch."""

    sent = False

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2 and not CtrlC.sent:
            CtrlC.sent = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Name of the callback; the handler that Lightning takes away comes back."""
    CtrlC.sent = False
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield f"{CtrlC.__module__}.{CtrlC.__qualname__}"
    signal.signal(signal.SIGINT, handler)


TINY = shlex.split(
    "--trainer.max_steps 6 --model.places 2 --model.window 4 --model.scored_steps 2 --data.instances 2"
    " --trainer.limit_val_batches 0 --trainer.logger false"
)


# Lightning's, of a resumed run: an epoch begun anew, files of the first part.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("command", "recipe", "options"),
    [
        (
            "train",
            "digits",
            ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4", "--trainer.log_every_n_steps", "1"],
        ),
        ("meta-train", "meta_train/quick", TINY),
    ],
)
def test_ctrl_c_says_how_to_go_on_and_that_works(tmp_path, fails, ctrl_c, command, recipe, options):
    config = DIGITS.replace("digits", recipe)
    complaint = fails(
        *[command, "fit", "--config", config, *options, *QUIET],
        *["--trainer.callbacks+", ctrl_c],
        status=130,
    )
    assert complaint.startswith(
        f"lightning-hrnn: error: interrupted; go on with `lightning-hrnn {command} fit --config "
    )
    _, *again = shlex.split(complaint.partition("`")[2].removesuffix("`"))
    saved = torch.load(again[-1], weights_only=False)
    assert (again[-2], saved["global_step"]) == ("--ckpt_path", 2)
    assert main(again) == 0
    steps = {torch.load(path, weights_only=False)["global_step"] for path in tmp_path.rglob("last.ckpt")}
    assert max(steps) == (8 if command == "train" else 6)
