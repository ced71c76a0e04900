"""Lightning's command line as our commands use it: errors raised, and `--out` for a report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_hrnn.cli.every_run import GoOnWithHRNN, LeaveProcessGroup
from lightning_hrnn.cli.folders import ready_folder
from lightning_hrnn.cli.parser import parser_options
from lightning_hrnn.cli.run_report import write_run_report

WEIGHTS_ONLY = ("pytorch-lightning_version", "state_dict")  # parts of a checkpoint that is not whole
WHOLE = (*WEIGHTS_ONLY, "loops", "optimizer_states", "lr_schedulers")


class SaveConfig(SaveConfigCallback):
    """Save the whole configuration: `config.yaml` in the run's folder and in `--out`, and with Weights & Biases."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand it on; Lightning writes the file in the folder of the run."""
        if (out := self.config.get("out")) is not None:
            path = Path(out, self.config_filename)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"configuration": config}, allow_val_change=True)


class CommandCLI(LightningCLI):
    """`LightningCLI` with `--out DIR` for metrics, a report and its figure."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--out`; a concrete class of module or data is what runs unless the user names a subclass."""
        for key, given in (("model", self.model_class), ("data", self.datamodule_class)):
            if isinstance(given, type) and given is not LightningModule:
                parser.set_defaults({key: {"class_path": f"{given.__module__}.{given.__qualname__}"}})
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="Folder for metrics.csv, report.json, report.md and curves.png; also the trainer's default root.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments that our command passes on, without Lightning's warning that it does."""
        assert isinstance(args, list)
        self.arguments = args
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take the module's options from the checkpoint, as Lightning does, and say which ones that changes.

        Raises:
            ValueError: if the file cannot be read, or nothing can be gone on with from it.
        """
        given = self._module_options()
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        try:
            if path and Path(path).is_file():
                needed = WHOLE if self.config.subcommand == "fit" else WEIGHTS_ONLY
                _check_parts(torch.load(path, weights_only=True, map_location="meta"), needed)
            super()._parse_ckpt_path()
        except (OSError, RuntimeError, EOFError, LookupError, UnpicklingError) as error:
            why = f"{type(error).__name__}: {error}".partition(". ")[0].splitlines()[0].rstrip(".: ")
            raise ValueError(f"The checkpoint {str(path)!r} is not Lightning's, or not whole. {why}.") from error
        taken = self._module_options()
        if changed := [f"{name}={taken[name]} (not {given[name]})" for name in given if given[name] != taken.get(name)]:
            rank_zero_info(f"Taken from the checkpoint, whatever was given: {', '.join(changed)}.")

    def _module_options(self) -> dict[str, Any]:
        return dict(vars(self.config[self.config.subcommand].model.get("init_args", Namespace())))

    def instantiate_classes(self) -> None:
        """Make the folder that `--out` names, then everything else."""
        if self.out is not None:
            ready_folder(self.out)
        super().instantiate_classes()
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_last = False  # Lightning would write it all the same, over that of a true run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let the trainer log to `--out` too."""
        if self.out is None:
            return super().instantiate_trainer(**kwargs)
        if self._get(self.config, "trainer").default_root_dir is None:
            kwargs["default_root_dir"] = self.out
        chosen = self._get(self.config_init, "trainer").logger
        others = chosen if isinstance(chosen, list) else [] if chosen in (None, True, False) else [chosen]
        kwargs["logger"] = [*others, CSVLogger(self.out, name="", version="")]
        return super().instantiate_trainer(**kwargs)

    @property
    def out(self) -> str | None:
        """The folder for the report, if one is wanted."""
        return self._get(self.config, "out")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; where Lightning ends the program after Ctrl-C, say how to go on instead."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            saved = last_checkpoint(self.trainer) if subcommand == "fit" else None
            raise KeyboardInterrupt(resuming(self.parser.prog, self.arguments, saved) if saved else "") from None

    def after_fit(self) -> None:
        """Write the report."""
        self._write_report()

    def after_validate(self) -> None:
        """Write the report."""
        self._write_report()

    def after_test(self) -> None:
        """Write the report."""
        self._write_report()

    def _write_report(self) -> None:
        if self.out is not None and self.trainer.is_global_zero:
            command = f"{self.parser.prog} {self.subcommand}"
            write_run_report(Path(self.out), command, self.trainer)


def _check_parts(checkpoint: Any, needed: Sequence[str]) -> None:
    """Refuse what is no checkpoint, or lacks parts.

    Raises:
        LookupError: it says which.
    """
    if not isinstance(checkpoint, dict):
        raise LookupError(f"it holds a {type(checkpoint).__name__}, no dict")
    if lacking := [part for part in needed if part not in checkpoint]:
        alone = set(WEIGHTS_ONLY) <= checkpoint.keys() and "optimizer_states" in lacking
        raise LookupError("it holds the weights alone, from which no fit goes on" if alone else f"it lacks {lacking}")


def last_checkpoint(trainer: Trainer) -> str | None:
    """Return the newest checkpoint that the trainer wrote, if it wrote any; relative to the working directory."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (path := callback.last_model_path or callback.best_model_path):
            here = Path.cwd()
            return str(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path)
    return None


def resuming(prog: str, arguments: Sequence[str], checkpoint: str) -> str:
    """Say how to go on from a checkpoint.

    Example:
        >>> resuming("lightning-hrnn train", ["fit", "--ckpt_path", "old.ckpt", "--out", "x"], "last.ckpt")
        'go on with `lightning-hrnn train fit --out x --ckpt_path last.ckpt`'
    """
    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--ckpt_path" not in (before, argument) and not argument.startswith("--ckpt_path=")
    ]
    return f"go on with `{shlex.join([*prog.split(), *kept, '--ckpt_path', checkpoint])}`"


def run_lightning(
    arguments: Sequence[str],
    module: type[LightningModule],
    data: type[LightningDataModule] | None,
    prog: str,
    description: str,
    examples: str,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run one of Lightning's subcommands.

    Args:
        arguments: The subcommand and its options.
        module: The module's class; the user may name any subclass.
        data: The data module's class; the user may name any subclass. None lets the user name any or none.
        prog: The command, as the user types it.
        description: What the help says first.
        examples: What the help says last.
        callbacks: Part of every run, besides those that the user names.
    """
    subcommands = {name: parser_options() for name in CommandCLI.subcommands()}
    CommandCLI(
        module,
        data,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [*callbacks, GoOnWithHRNN(), LeaveProcessGroup()]},
        parser_kwargs={"prog": prog, "description": description, **parser_options(examples), **subcommands},
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=list(arguments),
    )
