"""What runs record: time, the weights' card, pictures of predictions, with CSV, TensorBoard and Weights & Biases."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from lightning_hrnn import HRNNOptimizerCallback
from lightning_hrnn.cli import main
from lightning_hrnn.evaluation.runs import read_curves
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, load_pretrained
from lightning_hrnn.tracking import LogWeightsCard, RunClock
from lightning_hrnn.vision import DigitsData, ImageClassifier, LogPredictions
from lightning_hrnn.vision.pictures import draw_confusion, draw_predictions, most_confused

RECIPES = Path(__file__).parents[1] / "recipes"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def trainer(logger, *callbacks, **options):
    return Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), log_every_n_steps=1, **QUIET, **options)


class Recorder(Logger):
    """A logger whose experiment takes images as TensorBoard's writer does."""

    name, version = "recorder", 0

    def __init__(self):
        self.images = {}
        self.experiment = self

    def add_image(self, name, picture, step, dataformats):
        assert (picture.dtype, picture.shape[2], dataformats) == (torch.uint8, 3, "HWC")
        self.images[name, step] = picture

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *_, **__):
        pass


def test_time_goes_on_after_a_resume(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lightning_hrnn.tracking.time.monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    first = trainer(CSVLogger(tmp_path, "a", 0), RunClock(), max_steps=3, limit_val_batches=0)
    first.fit(ImageClassifier(), datamodule=DigitsData())
    first.save_checkpoint(tmp_path / "a.ckpt")
    steps, seconds = read_curves(tmp_path / "a" / "version_0" / "metrics.csv")["seconds"]
    assert steps == [0, 1, 2]
    assert seconds == [1, 2, 3]
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"]["RunClock"]["seconds"]
    now[0] = 1000.0
    again = trainer(CSVLogger(tmp_path, "a", 1), RunClock(), max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    again.fit(ImageClassifier(), datamodule=DigitsData(), ckpt_path=tmp_path / "a.ckpt")
    _, seconds = read_curves(tmp_path / "a" / "version_1" / "metrics.csv")["seconds"]
    assert seconds == [saved + 1, saved + 2, saved + 3]


def test_the_card_of_the_weights_lies_beside_the_metrics(tmp_path):
    logger = CSVLogger(tmp_path, "a")
    runner = trainer(logger, HRNNOptimizerCallback(), LogWeightsCard(), max_steps=1, limit_val_batches=0)
    runner.fit(ImageClassifier(), datamodule=DigitsData())
    saved = json.loads((tmp_path / "a" / "version_0" / f"{DEFAULT_WEIGHTS}.json").read_text())
    assert saved == load_pretrained().card


def test_another_optimizer_has_no_card(tmp_path):
    trainer(CSVLogger(tmp_path, "a"), LogWeightsCard(), max_steps=1, limit_val_batches=0).fit(
        ImageClassifier(), datamodule=DigitsData()
    )
    assert not list(tmp_path.rglob("*.json"))


def test_pictures_go_to_every_logger_on_their_epochs(tmp_path):
    recorder = Recorder()
    callback = LogPredictions(every_n_epochs=2, images=9)
    runner = trainer([CSVLogger(tmp_path, "a"), recorder], callback, max_epochs=4, limit_train_batches=2)
    runner.fit(ImageClassifier(), datamodule=DigitsData(eval_batch_size=5))
    names = {"val/predictions", "val/confusion"}
    assert set(recorder.images) == {(name, step) for name in names for step in (4, 8)}
    files = sorted(path.name for path in (tmp_path / "a" / "version_0" / "pictures").iterdir())
    assert files == [f"val-{name}-{step:07d}.png" for name in ("confusion", "predictions") for step in (4, 8)]
    with Image.open(tmp_path / "a" / "version_0" / "pictures" / "val-confusion-0000008.png") as picture:
        logged = recorder.images["val/confusion", 8]
        assert picture.size == (logged.shape[1], logged.shape[0])


def test_the_matrix_covers_the_whole_set(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lightning_hrnn.vision.pictures.draw_confusion",
        lambda counts, names: seen.append((counts, names)) or torch.zeros(2, 2, 3, dtype=torch.uint8),
    )
    data, module = DigitsData(eval_batch_size=50), ImageClassifier()
    trainer(Recorder(), LogPredictions()).validate(module, datamodule=data, verbose=False)
    ((counts, names),) = seen
    with torch.no_grad():
        taken = module.eval()(data.eval_transform()(data.images("val").images)).argmax(1)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    expected.index_put_((data.images("val").labels, taken), torch.tensor(1), accumulate=True)
    assert torch.equal(counts, expected)
    assert names == [str(digit) for digit in range(10)]


def of_both_processes(counts, names):
    """Stands in for drawing, which only the first process does."""
    assert torch.distributed.get_rank() == 0
    assert counts.sum() == 180
    Path("drawn").touch()
    return torch.zeros(2, 2, 3, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_processes_count_into_one_matrix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_hrnn.vision.pictures.draw_confusion", of_both_processes)
    runner = trainer(Recorder(), LogPredictions(), max_epochs=1, limit_train_batches=1, devices=2, strategy="ddp_fork")
    runner.fit(ImageClassifier(), datamodule=DigitsData(eval_batch_size=45))
    assert Path("drawn").exists()


def test_a_module_that_returns_no_logits_is_told():
    class Silent(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    with pytest.raises(TypeError, match=r"let Silent\.validation_step return them"):
        trainer(Recorder(), LogPredictions()).validate(Silent(), datamodule=DigitsData())


def test_wrong_predictions_are_told_apart():
    images = torch.zeros(2, 1, 8, 8)
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    right = draw_predictions(images, logits, torch.tensor([0, 1]), ["cat", "dog"])
    wrong = draw_predictions(images, logits, torch.tensor([1, 1]), ["cat", "dog"])

    def has_orange(picture):
        return bool((picture[..., 0].int() - picture[..., 2].int() > 100).any())

    assert (has_orange(right), has_orange(wrong)) == (False, True)
    colours = draw_predictions(torch.rand(17, 3, 8, 8), torch.rand(17, 2), torch.zeros(17).long(), ["cat", "dog"])
    assert colours.shape[2] == 3


def test_of_many_classes_the_confused_ones_are_shown():
    counts = torch.diag(torch.full((100,), 50))
    counts[3, 97] = 9
    chosen = most_confused(counts)
    assert len(chosen) == 20
    assert {3, 97} <= set(chosen.tolist())
    small, large = (draw_confusion(counts[:k, :k], [f"class {i}" for i in range(k)]) for k in (4, 100))
    assert small.numel() < large.numel() < 3_000_000


def test_weights_and_biases_gets_everything(tmp_path, monkeypatch):
    """Through the command line, offline: what would be uploaded."""
    import wandb

    monkeypatch.chdir(tmp_path)
    logged = []
    real = wandb.Run.log_artifact
    monkeypatch.setattr(
        wandb.Run, "log_artifact", lambda self, *a, **kw: logged.append((a, kw)) or real(self, *a, **kw)
    )
    configs = [part for name in ("digits", "wandb") for part in ("--config", str(RECIPES / f"{name}.yaml"))]
    short = ["--trainer.max_epochs", "5", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["train", "fit", *configs, *short, *quiet]) == 0
    config = dict(wandb.run.config)
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert config["trained_by"] == "HRNN"
    assert config["optimizer_weights"] == load_pretrained().card
    assert config["configuration"]["data"]["init_args"]["batch_size"] == 32
    ((path,), options) = logged[0]
    assert options == {"name": DEFAULT_WEIGHTS, "type": "optimizer-weights"}
    assert path.endswith(f"{DEFAULT_WEIGHTS}.json")
    assert {"train/loss", "val/loss", "val/acc", "seconds"} <= summary.keys()
    pictures = [p.name for p in tmp_path.rglob("media/images/val/*.png")]
    assert {name.split("_")[0] for name in pictures} == {"confusion", "predictions"}
