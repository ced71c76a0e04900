"""`lightning-hrnn train`: any LightningModule with any data module, by Lightning's command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from lightning.pytorch import LightningModule

from lightning_hrnn.cli.lightning import run_lightning
from lightning_hrnn.cli.parser import PROGRAM
from lightning_hrnn.tracking import LogWeightsCard, RunClock

EXAMPLES = f"""\
  {PROGRAM} train fit --config recipes/digits.yaml
  {PROGRAM} train fit --config recipes/digits.yaml --trainer.callbacks null   # its own AdamW
  {PROGRAM} train fit --config recipes/fashion_mnist.yaml --config recipes/trainer/ddp2.yaml --out fashion
  {PROGRAM} train fit --model my.Module --data my.Data --trainer.callbacks+=HRNNOptimizerCallback
  {PROGRAM} train test --config recipes/digits.yaml --ckpt_path FILE.ckpt
  {PROGRAM} train fit --config recipes/digits.yaml --print_config > mine.yaml
"""


def run(arguments: Sequence[str]) -> None:
    """Fit, validate, test or predict."""
    _make_short_names_known()
    run_lightning(
        arguments,
        LightningModule,
        None,
        prog=f"{PROGRAM} train",
        description="Train, validate, test or predict with any LightningModule; `fit --help` shows the options.",
        examples=EXAMPLES,
        callbacks=[RunClock(), LogWeightsCard()],
    )


def _make_short_names_known() -> None:
    """Import our classes: jsonargparse finds by their bare names the classes that are imported."""
    import lightning_hrnn.callbacks

    with suppress(ModuleNotFoundError):  # without the extra `vision`, other modules can be trained all the same
        import lightning_hrnn.vision  # noqa: F401
