"""Callbacks that are part of every run of Lightning's subcommands."""

from __future__ import annotations

import atexit
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.state import note_of


class LeaveProcessGroup(Callback):
    """Let every process leave the group of processes before its interpreter ends.

    The threads of Gloo may otherwise still hold Python objects then, and the process is aborted after all its work is
    done. Lightning does this for NCCL alone. After an error it is left undone: a collective that the other processes
    never enter would hold the exit up until it times out.
    """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have it done at the exit, for a program may run several trainers."""
        atexit.unregister(leave_process_group)
        atexit.register(leave_process_group)


def leave_process_group() -> None:
    """Destroy the group of processes, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class GoOnWithHRNN(Callback):
    """Refuse to resume what `HRNN` began with another optimizer, which cannot read its state and says a `KeyError`."""

    def __init__(self) -> None:
        self.begun: list[bool] = []  # by HRNN, for each optimizer of the checkpoint

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whose states they are; some strategies have their optimizers by now."""
        self.begun = [bool(note_of(state)) for state in checkpoint.get("optimizer_states", [])]
        self._compare(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the optimizers, which are there now and not yet restored."""
        self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        for by_hrnn, optimizer in zip(self.begun, trainer.optimizers, strict=False):
            if by_hrnn and not isinstance(optimizer, HRNN):
                raise MisconfigurationException(
                    f"The checkpoint holds the state of HRNN, from which {type(optimizer).__name__} cannot go on. "
                    "Resume with --trainer.callbacks+=HRNNOptimizerCallback and the weights of the first run."
                )
