"""`configure_optimizers` of a module that is to be trained by `HRNN`: written anew, or wrapped.

The user's method is called as ever and its answer converted, see `conversion`. It is wrapped on the instance by a
`functools.partial` of a function of this module, which Lightning looks through, and which survives pickling (ddp_spawn)
and deepcopy (weight averaging).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_hrnn.conversion import Conversion
from lightning_hrnn.optimizer.adapt import OtherWeights
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN, Rate
from lightning_hrnn.optimizer.pretrained import DEFAULT_WEIGHTS
from lightning_hrnn.options import HRNNOptions


def hrnn_optimizers(
    module: LightningModule,
    weights: str | Path | HierarchicalRNN = DEFAULT_WEIGHTS,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    kernel: str = "auto",
    initial_rate: float | None = None,
    rate: Rate = "learned",
    other_weights: OtherWeights = "refuse",
) -> HRNN:
    """Return `HRNN` over the trainable parameters of a module, for its own `configure_optimizers`.

    Args:
        module: the LightningModule.
        weights: name of shipped weights, path of a weights file, or a loaded rule.
        lr: multiplier of the learned rates; with `rate="given"` the learning rate itself.
        weight_decay: decoupled weight decay, in units of the learned rate.
        kernel: what computes the step; see `HRNN`.
        initial_rate: first learned rate; see `HRNN`.
        rate: `"learned"`, or `"given"`; see `HRNN`.
        other_weights: what becomes of a saved state made with other weights; see `HRNN`.

    Raises:
        ValueError: nothing in the module is trainable, or an argument is out of range.

    Example::

        class Classifier(LightningModule):
            def configure_optimizers(self):
                return hrnn_optimizers(self)
    """
    options = HRNNOptions(
        weights,
        lr,
        weight_decay,
        kernel=kernel,
        initial_rate=initial_rate,
        rate=rate,
        other_weights=other_weights,
    )
    return _over_all(module, options)


def _over_all(module: LightningModule, options: HRNNOptions) -> HRNN:
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter. Unfreeze some, or build layers made in "
            "`configure_model` before the optimizer."
        )
    if options.rate == "given" and options.lr >= 1:
        raise ValueError(
            f"{type(module).__name__} configures no optimizer whose learning rate could be taken with rate='given': "
            "say it by lr, such as lr=1e-3."
        )
    return options.build(params, options.weight_decay or 0.0)


def wrap_for_fit(module: LightningModule, options: HRNNOptions) -> None:
    """Put a conversion in the place of `module.configure_optimizers`; a second call replaces the first."""
    unwrap_after_fit(module)
    module.configure_optimizers = partial(  # type: ignore[method-assign]
        _convert_for_fit, module, vars(module).get("configure_optimizers"), options
    )


def unwrap_after_fit(module: LightningModule) -> None:
    """Give the module back the `configure_optimizers` it had before `wrap_for_fit`, if it was wrapped."""
    if (own := _wrapped_by(_convert_for_fit, vars(module).get("configure_optimizers"))) is not None:
        del module.configure_optimizers
        if own[0] is not None:
            module.configure_optimizers = own[0]  # type: ignore[method-assign]


def wrap_for_good(module: LightningModule, options: HRNNOptions) -> None:
    """Make `module.configure_optimizers` return `HRNN`, whoever calls it; a second call replaces the first."""
    current = vars(module).get("configure_optimizers")
    (own,) = _wrapped_by(_convert_always, current) or (current,)
    module.configure_optimizers = partial(  # type: ignore[method-assign]
        _convert_always, module, own, options
    )


def _wrapped_by(function: Callable[..., Any], current: Any) -> tuple[Any] | None:
    """Return, in a tuple, what an instance had in place of its class's method before `function` wrapped it."""
    return (current.args[1],) if isinstance(current, partial) and current.func is function else None


def _convert_for_fit(module: LightningModule, own: Callable[[], Any] | None, options: HRNNOptions) -> Any:
    conversion = Conversion(own() if own else type(module).configure_optimizers(module), options)
    if conversion.new or _wrapped_by(_convert_always, own) is None:  # else configure_hrnn has spoken
        rank_zero_info(f"HRNNOptimizerCallback: {conversion}")
    return conversion.result


def _convert_always(module: LightningModule, own: Callable[[], Any] | None, options: HRNNOptions) -> Any:
    if own is None and type(module).configure_optimizers is LightningModule.configure_optimizers:
        optimizer = _over_all(module, options)
        weights = options.weights_in_use([optimizer])
        rank_zero_info(f"configure_hrnn: HRNN (weights: {weights}) for all trainable parameters.")
        return optimizer
    conversion = Conversion(own() if own else type(module).configure_optimizers(module), options)
    rank_zero_info(f"configure_hrnn: {conversion}")
    return conversion.result
