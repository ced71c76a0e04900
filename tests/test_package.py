"""The package as it is installed: one version, a light import, and a wheel that holds everything it needs."""

import importlib.metadata
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_hrnn
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS, available_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_hrnn"
WEIGHTS = PACKAGE / "optimizer" / "weights"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_written_once():
    assert lightning_hrnn.__version__ == importlib.metadata.version("lightning-hrnn")
    assert "version" in PROJECT["project"]["dynamic"]
    holders = [p for p in PACKAGE.rglob("*.py") if "__version__ = " in p.read_text(encoding="utf-8")]
    assert [p.relative_to(ROOT).as_posix() for p in holders] == [PROJECT["tool"]["hatch"]["version"]["path"]]


def test_the_changelog_opens_with_this_version():
    headings = [
        line for line in (ROOT / "docs/changelog.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "
    ]
    assert headings[0].split()[1] == lightning_hrnn.__version__


def test_the_citation_names_the_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert paper["title"] == "Learned Optimizers that Scale and Generalize"
    assert (paper["year"], paper["volume"], paper["start"], paper["end"]) == (2017, 70, 3751, 3760)
    assert paper["authors"][0]["family-names"] == "Wichrowska"
    assert [item["value"] for item in paper["identifiers"]] == ["arXiv:1703.04813"]


def test_dev_holds_every_extra_that_a_test_needs():
    extras = PROJECT["project"]["optional-dependencies"]
    assert "lightning-hrnn[vision,wandb]" in extras["dev"]
    assert "lightning-hrnn[vision,wandb]" in extras["all"]


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that a new interpreter holds after one statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = ("lightning", "matplotlib", "sklearn", "timm", "torchmetrics", "torchvision", "wandb")


def test_the_optimizer_imports_torch_and_no_more():
    loaded = loaded_by("from lightning_hrnn import HRNN, load_pretrained")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)
    layers = {name.split(".")[1] for name in loaded if name.startswith("lightning_hrnn.")}
    assert layers == {"optimizer", "version"}


def test_the_callback_does_not_load_meta_training():
    loaded = loaded_by("from lightning_hrnn import HRNNOptimizerCallback, configure_hrnn")
    assert "lightning_hrnn.callbacks" in loaded
    assert "wandb" not in loaded
    layers = {name.split(".")[1] for name in loaded if name.startswith("lightning_hrnn.")}
    fit = {"callbacks", "configure", "conversion", "options", "schedulers", "suitability"}
    assert layers == fit | {"divergence", "numbering", "optimizer", "progress", "telemetry", "version"}


def test_every_public_name_is_there():
    for name in lightning_hrnn.__all__:
        assert getattr(lightning_hrnn, name) is not None


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-hrnn")
    assert callable(script.load())


def test_shipped_weights_are_no_stand_ins():
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in WEIGHTS.glob("*.json")]
    assert cards
    for card in cards:
        assert not card.get("development", False)
        assert card["meta_steps"] > 0
        assert card["corpus"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive of this tree."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"lightning_hrnn-{lightning_hrnn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"lightning_hrnn-{lightning_hrnn.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        for weights in WEIGHTS.iterdir():
            assert archive.read(weights.relative_to(ROOT).as_posix()) == weights.read_bytes()
    wanted = {
        p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {name for name in names if not name.startswith(info)} == wanted
    assert "lightning_hrnn/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_the_wheel_holds_the_default_weights_and_their_card(built):
    (wheel,) = built.glob("*.whl")
    folder = "lightning_hrnn/optimizer/weights"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {f"{folder}/{name}.{suffix}" for name in available_weights() for suffix in ("safetensors", "json")}
    assert shipped <= names
    assert f"{folder}/{DEFAULT_WEIGHTS}.json" in shipped
    assert wheel.stat().st_size < 2_000_000  # 8k floats: a bigger wheel holds a stray file


@pytest.mark.slow
def test_the_source_archive_can_be_tested(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "docs/changelog.md"} <= names
    assert "tests/test_package.py" in names
    assert any(name.startswith("recipes/") for name in names)
