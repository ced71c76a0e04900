"""`lightning-hrnn meta-train`: fit the learned optimizer's own weights, by Lightning's command line."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hrnn.cli.lightning import run_lightning
from lightning_hrnn.cli.parser import PROGRAM

EXAMPLES = f"""\
  {PROGRAM} meta-train fit --config recipes/meta_train/quick.yaml
  {PROGRAM} meta-train fit --config recipes/meta_train/default.yaml --ckpt_path runs/default/last.ckpt
  {PROGRAM} meta-train fit --config recipes/meta_train/quick.yaml --print_config"""


def run(arguments: Sequence[str]) -> None:
    """Meta-train or meta-validate."""
    from lightning_hrnn.datamodule import TaskDataModule
    from lightning_hrnn.module import MetaLearner

    run_lightning(
        arguments,
        MetaLearner,
        TaskDataModule,
        prog=f"{PROGRAM} meta-train",
        description="Meta-train the learned optimizer on a corpus of tasks; `fit --help` shows the options.",
        examples=EXAMPLES,
    )
