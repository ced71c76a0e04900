"""Imports run downward only: each layer of the package may import the layers named here and no others."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "lightning_hrnn"
ROOT = Path(__file__).parents[1] / PACKAGE

# Layer -> what it may import from the package besides itself. A layer is a folder, a file at the package's root, or a
# folder within a folder that may import more.
MAY_IMPORT = {
    "version": set(),
    "optimizer": {"version"},
    "tasks": {"version"},
    "tracking": {"version", "optimizer"},
    "vision": {"version", "tracking"},
    "meta": {"version", "optimizer", "tasks"},
    # The unroll and what it takes; real models to measure on.
    "evaluation": {
        "version",
        "optimizer",
        "tasks",
        "meta.unroll",
        "meta.population",
        "meta.memory",
        "meta.rivals",
        "vision",
    },
    "schedulers": set(),
    "divergence": {"optimizer"},
    "telemetry": {"optimizer"},
    "options": {"optimizer", "divergence"},
    "conversion": {"optimizer", "options", "schedulers"},
    "configure": {"optimizer", "options", "conversion"},
    "progress": set(),
    "suitability": {"optimizer", "progress"},
    "numbering": set(),
    "callbacks": {
        "optimizer",
        "options",
        "configure",
        "suitability",
        "progress",
        "numbering",
        "telemetry",
        "divergence",
    },
    "datamodule": {"version", "tasks", "meta", "evaluation"},
    "module": {"version", "optimizer", "tasks", "meta", "evaluation", "datamodule"},
    "export": {"version", "optimizer", "module"},
    "__init__": {"version", "optimizer", "configure", "callbacks", "divergence", "module", "datamodule"},
}
MAY_IMPORT["evaluation.benchmark"] = MAY_IMPORT["evaluation"] | {"evaluation", "meta"}  # whatever can be timed
MAY_IMPORT["cli"] = MAY_IMPORT.keys() - {"__init__"}
MAY_IMPORT["__main__"] = {"cli"}

READS_PATH = f"{PACKAGE}.optimizer.kernels.build"  # torch's extension loader finds ninja on the PATH alone

# Layer -> other projects' packages it may import: plain torch below, the core dependencies, the extra `vision`.
TORCH = {"torch", "typing_extensions"}
CORE = TORCH | {"jsonargparse", "lightning", "rich", "safetensors", "yaml"}
VISION = CORE | {"PIL", "matplotlib", "sklearn", "timm", "torchmetrics", "torchvision"}
TORCH_ONLY = {"optimizer": TORCH | {"safetensors", "triton"}, "tasks": TORCH, "meta": TORCH}
MAY_NEED = TORCH_ONLY | {
    "telemetry": CORE | {"wandb"},
    "tracking": CORE | {"matplotlib"},
    "vision": VISION,
    "evaluation": VISION,
}


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything that the text of `module` imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def offences(source: str, module: str) -> list[str]:
    """The imports of one module (a package is `name.__init__`) that point upward or sideways, in words."""
    outer, inner = module.split(".")[1], ".".join(module.split(".")[1:3])
    layer = inner if inner in MAY_IMPORT else outer
    allowed = MAY_IMPORT[layer] | {layer}
    bad = []
    for line, name in imports(source, module):
        top, _, inside = name.partition(".")
        if top == PACKAGE and not any(f"{inside}.".startswith(f"{ok}.") for ok in allowed):
            bad.append(f"{module}, line {line}: `{layer}` imports {name}; it may import {sorted(allowed)}")
        if top not in {PACKAGE} | sys.stdlib_module_names | MAY_NEED.get(outer, CORE):
            bad.append(f"{module}, line {line}: `{layer}` imports {name}, which it may not need")
    return bad


def modules() -> dict[str, str]:
    """Dotted name -> text of every file of the package."""
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.rglob("*.py"))
    }


def test_every_layer_has_its_place():
    unplaced = {module.split(".")[1] for module in modules()} - MAY_IMPORT.keys()
    assert not unplaced, f"say in MAY_IMPORT what these may import: {sorted(unplaced)}"


def test_imports_run_downward_only():
    bad = [fault for module, source in modules().items() for fault in offences(source, module)]
    assert not bad, "\n".join(bad)


def test_the_table_has_no_cycle():
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        free = {k for k, below in MAY_IMPORT.items() if {name.split(".")[0] for name in below} <= placed}
        assert free > placed, f"a cycle among {sorted(MAY_IMPORT.keys() - placed)}"
        placed = free


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("optimizer.kernels.cpp", "from ...tasks import base", "tasks.base"),
        ("tasks.base", "import lightning_hrnn.optimizer", "optimizer"),
        ("tasks.base", "def f():\n    from lightning_hrnn import optimizer", "optimizer"),
        ("callbacks", "from lightning_hrnn.meta.unroll import unroll", "meta.unroll.unroll"),
        ("callbacks", "from . import meta", "meta"),
        ("evaluation.protocol", "from lightning_hrnn.meta.truncation import windows", "meta.truncation.windows"),
        ("meta.__init__", "from ..callbacks import HRNNOptimizerCallback", "callbacks.HRNNOptimizerCallback"),
        ("meta.loss", "from lightning_hrnn import HRNN", "HRNN"),
    ],
)
def test_an_import_that_points_upward_is_named(module, source, named):
    (fault,) = offences(source, f"{PACKAGE}.{module}")
    line = len(source.splitlines())
    assert fault.startswith(f"{PACKAGE}.{module}, line {line}: ")
    assert f" imports {PACKAGE}.{named};" in fault


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("meta.loss", "import lightning.pytorch as pl", "lightning.pytorch"),
        ("callbacks", "def f():\n    import wandb", "wandb"),
        ("optimizer.features", "from numpy import array", "numpy.array"),
    ],
)
def test_an_import_beyond_the_dependencies_is_named(module, source, named):
    (fault,) = offences(source, f"{PACKAGE}.{module}")
    assert f" imports {named}, " in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "lightning_hrnn.meta.loss",
            "import torch\nfrom ..tasks.base import Params\nfrom .unroll import a",
        ),
        ("lightning_hrnn.optimizer.__init__", "from .features import features\nfrom . import kernels"),
        ("lightning_hrnn.optimizer.kernels.__init__", "from ..features import features"),
        ("lightning_hrnn.evaluation.protocol", "from ..meta.unroll import unroll"),
        ("lightning_hrnn.evaluation.benchmark.unrolls", "from lightning_hrnn.meta.estimators import PES"),
        ("lightning_hrnn.__init__", "from .callbacks import HRNNOptimizerCallback"),
    ],
)
def test_a_downward_import_is_fine(module, source):
    assert offences(source, module) == []


@pytest.mark.parametrize("layer", TORCH_ONLY)
def test_torch_folders_never_read_the_environment(layer):
    bad = [
        f"{module}, line {node.lineno}: {ast.unparse(node)}"
        for module, source in modules().items()
        if module.split(".")[1] == layer and module != READS_PATH
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not bad, "\n".join(bad)
