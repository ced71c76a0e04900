"""HRNN in Lightning: a callback that puts it into any training run, and helpers that put it into a module.

The callback wraps `configure_optimizers` for the time of a fit (see `configure`), because every strategy calls that
method at the one moment when parameters are in their final place and no state has been restored yet. Where the weights
use attention, it also moves the parameters to the point where the next gradient is to be taken, and back: they hold the
true weights at all times except between the start of a training batch and the end of its backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_hrnn.configure import hrnn_optimizers, unwrap_after_fit, wrap_for_fit, wrap_for_good
from lightning_hrnn.divergence import DivergenceWatch, OnDivergence
from lightning_hrnn.numbering import number_by_module
from lightning_hrnn.optimizer.adapt import OtherWeights
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN, Rate
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS
from lightning_hrnn.optimizer.schedule import SHARE, cooldown
from lightning_hrnn.optimizer.state import FALLBACK_LR, note_of
from lightning_hrnn.options import HRNNOptions, SchedulerPolicy
from lightning_hrnn.progress import known_steps, progress
from lightning_hrnn.suitability import StepLengthWatch, check_strategy, warn_of_length
from lightning_hrnn.telemetry import Detail, Telemetry

__all__ = ["HRNNOptimizerCallback", "configure_hrnn", "hrnn_optimizers"]


class HRNNOptimizerCallback(Callback):
    """Train with `HRNN` in the place of the optimizers that the module configures.

    Nothing else changes: number and order of optimizers, param groups with their names and weight decays, clipping,
    accumulation, checkpoints and their resumption. What was replaced is said once, when the fit starts.

    Args:
        weights: name of shipped weights, path of a weights file, or a loaded rule.
        lr: multiplier of the learned rates, 1 for the rates as learned; whatever sets `lr` in the param groups from
            outside sets this multiplier. In an optimizer whose param groups differ in learning rate the one with the
            largest gets `lr` and the others keep their ratio to it.
        weight_decay: decoupled weight decay, in units of the learned rate; None leaves to each param group its own.
        schedulers: what becomes of the module's learning-rate schedulers. `"drop"`: the learning rate stays where it
            is (the scheduler objects make room for one that does nothing). `"keep"`: they scale the learned rates; a
            schedule written for a base rate of 3e-4 that stands at 1e-4 makes it a third. `"refuse"`: an error.
        kernel: what computes the step; see `HRNN`.
        initial_rate: first learned rate; see `HRNN`.
        cooldown: share of the run, its last part, over which the learned rates go down to zero along half a cosine: the
            noise of the steps settles, and the loss with it. Where `max_steps` or `max_epochs` says when the fit
            ends, and weights that read it are told; with `schedulers="keep"` the module's schedulers do it instead.
            0 for none.
        rate: `"learned"`, or `"given"`: the learning rates and schedulers of the module mean what they say, and HRNN
            supplies the direction of a step alone: see `HRNN`. `lr` multiplies them, and there is no cooldown.
        telemetry: what goes to the Trainer's loggers as `hrnn/...` every `log_every_n_steps`: `"model"`, one number
            each for the model; `"tensor"`, also one for each tensor; `"off"`, nothing. Unless off, one line at the
            start of a fit says what memory and time the optimizer takes.
        on_divergence: what happens when loss or gradients have not been finite for `patience` steps in a row.
            `"stop"`: a `DivergenceError`. `"adamw"`: the fit goes on as AdamW, from weights of before; two copies of
            the weights stay on the device for it. `"ignore"`: such steps are skipped for ever.
        patience: steps in a row, after which a fit counts as diverged.
        other_weights: what happens on resuming from a checkpoint made with other weights. `"refuse"`: an error.
            `"adapt"`: averages and learned rates are kept, hidden states start anew.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: at the start of a fit, if the strategy, an optimizer or a scheduler of the module
            cannot be served; the message says why and what to do.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[HRNNOptimizerCallback()], barebones=True)
    """

    def __init__(
        self,
        weights: str | Path | HierarchicalRNN = DEFAULT_WEIGHTS,
        lr: float = 1.0,
        weight_decay: float | None = None,
        schedulers: SchedulerPolicy = "drop",
        kernel: str = "auto",
        initial_rate: float | None = None,
        cooldown: float = SHARE,
        rate: Rate = "learned",
        telemetry: Detail = "model",
        on_divergence: OnDivergence = "stop",
        patience: int = 50,
        other_weights: OtherWeights = "refuse",
    ) -> None:
        if telemetry not in get_args(Detail):
            raise ValueError(f"telemetry must be one of {get_args(Detail)}, not {telemetry!r}")
        if patience < 1 or patience != int(patience):
            raise ValueError(f"patience is a number of steps and must be at least 1, not {patience}")
        self.options = HRNNOptions(
            weights, lr, weight_decay, schedulers, kernel, initial_rate, cooldown, rate, other_weights, on_divergence
        )
        self._telemetry = Telemetry(telemetry, kernel)
        self._watch = DivergenceWatch(on_divergence, patience)
        self._step_lengths = StepLengthWatch()

    # -- injection

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap `configure_optimizers` when a fit begins."""
        if stage != TrainerFn.FITTING:
            return
        _check_trainer(trainer)
        wrap_for_fit(pl_module, self.options)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own `configure_optimizers` back."""
        self._leave(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was, for `teardown` does not follow an exception."""
        self._leave(trainer, pl_module)
        if isinstance(exception, MisconfigurationException) and not is_overridden("configure_optimizers", pl_module):
            exception.args = (
                f"{exception} HRNNOptimizerCallback converts what `configure_optimizers` returns, and Lightning asks "
                f"for one before any callback can act. Train all parameters of {type(pl_module).__name__} by "
                "`trainer.fit(lightning_hrnn.configure_hrnn(module))`, or give it\n"
                "    def configure_optimizers(self):\n        return lightning_hrnn.hrnn_optimizers(self)",
            )

    # -- attention: at the true weights by default, away from them from the start of a batch to its gradient

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move the parameters to the point where the gradient is to be taken, and see how far the fit has come."""
        self._watch.before_batch(trainer, pl_module)
        multiplier, run_length = self._cooldown(trainer)
        for optimizer in _hrnns(trainer):
            optimizer.begin_attention()
            optimizer.cooldown, optimizer.run_length = multiplier, run_length

    def _cooldown(self, trainer: Trainer) -> tuple[float, float]:
        """Return the multiplier of the learned rates, and at the end of how many steps it will be zero, if known."""
        cools = self.options.rates_are_its_own and self.options.cooldown > 0
        done = progress(trainer) if cools else None
        return (1.0, 0.0) if done is None else (cooldown(done, 1, self.options.cooldown), known_steps(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the true weights; by hand there may be more to differentiate, and the step will see to it."""
        if pl_module.automatic_optimization:
            _end_attention(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Return to the true weights, even if a gradient scaler skips the step."""
        if isinstance(optimizer, HRNN):
            optimizer.end_attention()
        self._telemetry.before_step(trainer, optimizer)
        self._watch.before_step(optimizer)
        self._step_lengths.look(_hrnns(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Return to the true weights, whatever the batch did; log and watch."""
        _end_attention(trainer)
        self._telemetry.after_batch(trainer, _hrnns(trainer))
        self._watch.after_batch(trainer, pl_module, outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the true weights, should a hook have cut the epoch short."""
        _end_attention(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the true weights."""
        _end_attention(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the true weights."""
        _end_attention(trainer)
        self._telemetry.end(trainer)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _end_attention(trainer)
        for optimizer in _hrnns(trainer):
            optimizer.cooldown, optimizer.run_length = 1.0, 0.0
        self._telemetry.clear()
        self._watch.clear()
        unwrap_after_fit(pl_module)

    # -- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave a trace by which Lightning asks for this callback if the checkpoint is resumed without it.

        Not a `state_dict`: Lightning would then refuse a second instance before `setup` can say why. And number the
        parameters so that every strategy reads the same.
        """
        numbered = isinstance(trainer.strategy, ModelParallelStrategy)
        for state, optimizer in zip(checkpoint.get("optimizer_states", []), trainer.optimizers, strict=False):
            if isinstance(optimizer, HRNN):
                number_by_module(state, optimizer, pl_module, numbered)
        if names := [optimizer.weights_name for optimizer in _hrnns(trainer)]:
            checkpoint.setdefault("callbacks", {})[self.state_key] = {"weights": names}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume what another optimizer began, and what fell back without a way to go on."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        notes = [note_of(state) for state in checkpoint.get("optimizer_states", []) if state]
        if self.options.on_divergence != "adamw" and any(FALLBACK_LR in note for note in notes):
            raise MisconfigurationException(
                "The run of this checkpoint diverged and fell back to AdamW, whose state it holds. Resume it with "
                "HRNNOptimizerCallback(on_divergence='adamw'), or from a checkpoint of before the divergence."
            )
        if not all(notes):
            raise MisconfigurationException(
                "The checkpoint holds the state of another optimizer than HRNN, which cannot go on from it. Resume "
                "without HRNNOptimizerCallback; or start HRNN from its weights alone, by "
                f"`{type(pl_module).__name__}.load_from_checkpoint(path)` and `trainer.fit(module)` without ckpt_path."
            )

    # -- learning rates written by others

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the multipliers, to notice who takes them for step lengths; begin to log and to watch."""
        warn_of_length(trainer, _hrnns(trainer))
        self._step_lengths.start(_hrnns(trainer) if self.options.rates_are_its_own else [])
        self._telemetry.start(trainer, pl_module, _hrnns(trainer))
        self._watch.start(trainer, _hrnns(trainer))


Options = ParamSpec("Options")
MakeCallback = Callable[[], HRNNOptimizerCallback]


def _takes_options_of(
    make: Callable[Options, HRNNOptimizerCallback],
) -> Callable[
    [Callable[[LightningModule, MakeCallback], LightningModule]],
    Callable[Concatenate[LightningModule, Options], LightningModule],
]:
    """Give a function of a module and of what makes a callback the arguments of the callback."""

    def decorate(
        function: Callable[[LightningModule, MakeCallback], LightningModule],
    ) -> Callable[Concatenate[LightningModule, Options], LightningModule]:
        @wraps(function)
        def wrapper(module: LightningModule, /, *args: Options.args, **kwargs: Options.kwargs) -> LightningModule:
            return function(module, partial(make, *args, **kwargs))

        own, options = signature(function), signature(make).parameters.values()
        wrapper.__signature__ = own.replace(parameters=[own.parameters["module"], *options])  # type: ignore[attr-defined]
        return wrapper

    return decorate


@_takes_options_of(HRNNOptimizerCallback)
def configure_hrnn(module: LightningModule, make_callback: MakeCallback) -> LightningModule:
    """Make `HRNN` the optimizer of a module for good, also one that has no `configure_optimizers`.

    Takes the module, and all arguments of `HRNNOptimizerCallback`. A module without `configure_optimizers` is trained
    in all its trainable parameters, without weight decay unless asked for; any other has its optimizers converted as
    by the callback, which the module brings along to every Trainer that has none. It gains neither parameters nor
    submodules.

    Returns:
        The module, changed in place.

    Raises:
        TypeError: not a LightningModule.
        ValueError: as `HRNNOptimizerCallback`.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = configure_hrnn(BoringModel(), lr=0.5)
        >>> (optimizer,), schedulers = module.configure_optimizers()
        >>> type(optimizer).__name__
        'HRNN'
    """
    target = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(target, LightningModule):
        raise TypeError(
            f"configure_hrnn takes a LightningModule, not {type(module).__name__}. In a plain loop write "
            "`optimizer = HRNN(module.parameters())`."
        )
    wrap_for_good(target, make_callback().options)
    current = vars(target).get("configure_callbacks")
    if isinstance(current, partial) and current.func is _bring_callback:
        current = current.args[1]
    target.configure_callbacks = partial(  # type: ignore[method-assign]
        _bring_callback, target, current, make_callback
    )
    return module


def _bring_callback(module: LightningModule, own: Any, make_callback: MakeCallback) -> list[Callback]:
    """Stand in for `module.configure_callbacks`; `own` is what the instance had in its place, if anything."""
    returned = own() if own else type(module).configure_callbacks(module)
    callbacks = list(returned) if isinstance(returned, Sequence) else [returned]
    if any(isinstance(callback, HRNNOptimizerCallback) for callback in [*callbacks, *_callbacks(module.trainer)]):
        return callbacks
    return [*callbacks, make_callback()]


def _check_trainer(trainer: Trainer) -> None:
    count = sum(isinstance(callback, HRNNOptimizerCallback) for callback in _callbacks(trainer))
    if count > 1:
        raise MisconfigurationException(
            f"The Trainer has {count} HRNNOptimizerCallbacks, and each would replace all optimizers. Leave one."
        )
    check_strategy(trainer)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _hrnns(trainer: Trainer) -> list[HRNN]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, HRNN)]


def _end_attention(trainer: Trainer) -> None:
    for optimizer in _hrnns(trainer):
        optimizer.end_attention()
