"""The param level of models that have meta-parameters of their own, as evolution strategies try them side by side.

Legend: `P` parameters, `T` tensors, `M` models, `R` readouts, `H0` param hidden size, `F` features, `W` meta-parameters
of the param level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hrnn.optimizer.features import Layout, count_features
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN, ParamLevel
from lightning_hrnn.optimizer.kernels.build import operators
from lightning_hrnn.optimizer.kernels.cpp import DTYPES, rows_from_above, said_from_above
from lightning_hrnn.optimizer.rule_state import RuleState


class OwnParamLevels:
    """Compute param levels of which each model has one of its own: an engine of `unroll`, without a way back.

    From its first step on it keeps what belongs to a model together, so hidden states and averages in the states that
    it returns are in an order that no other engine knows.

    Args:
        rule: whose configuration it is; the compiled kernels must know it.
        layout: of the models.
        metas: meta-parameters of each, in the order of `param_level_parts`. [M, W]

    Raises:
        ValueError: they are not on the CPU, in single or double precision.
        BuildError: the compiled kernels cannot be had.
    """

    def __init__(self, rule: HierarchicalRNN, layout: Layout, metas: Tensor) -> None:
        config = rule.config
        if metas.device.type != "cpu" or metas.dtype not in DTYPES:
            raise ValueError(
                f"Param levels side by side are computed on the CPU in single or double precision, not on "
                f"{metas.device} in {metas.dtype}: meta-train with --trainer.accelerator cpu, or leave param_level out."
            )
        self.library, self.metas = operators(config), metas.detach().contiguous()
        features = count_features(config.features, config.timescales)
        model_of = layout.model_of[layout.tensor_of]
        self.grad_order = _together(1, model_of)
        self.hidden_order = _together(config.param_hidden, model_of)
        self.above_order = _together(rows_from_above(config), layout.model_of)
        self.pooled_back = _together(config.param_hidden + features, layout.model_of).argsort()
        self.steps_back = _together(len(config.readouts), model_of).argsort()
        self.params_in = layout.params_in[layout.model_of.argsort(stable=True)]
        self.started = False

    def __call__(
        self, rule: HierarchicalRNN, grad: Tensor, state: RuleState, bias: Tensor, layout: Layout
    ) -> ParamLevel:
        """Take every parameter's step and average over tensors, see `HierarchicalRNN.param_level`.

        The meta-parameters that are looked up in `rule` are those above the param level.
        """
        config, hidden = rule.config, state.hidden
        if not self.started:
            if state.age.any():
                raise ValueError("Param levels side by side begin at a run's first step, one engine for each run.")
            self.started, hidden = True, hidden.reshape(-1)[self.hidden_order].view_as(hidden)  # averages are zeros
        hidden, average, square, pooled, steps, _ = self.library.param_levels(
            grad[self.grad_order],
            hidden,
            state.average,
            state.square,
            said_from_above(rule, state, bias, layout).reshape(-1)[self.above_order],
            self.params_in,
            layout.tensors_in,
            self.metas,
            config.momentary_bound,
            len(config.readouts),
            "output_scaling" not in config.without,
        )
        pooled = pooled.view(-1)[self.pooled_back].view_as(pooled)
        steps = steps.view(-1)[self.steps_back].view_as(steps)
        return ParamLevel(hidden, average, square, pooled, steps, log_rate=None)


def _together(rows: int, model_of: Tensor) -> Tensor:
    """Return the order in which values `[rows, N]` come to lie model by model, rows first in each.

    Its `argsort` is the way back.

    Args:
        rows: of the values.
        model_of: index of the model that each column belongs to. [N]
    """
    order = (model_of.expand(rows, -1) * rows + torch.arange(rows, device=model_of.device)[:, None]).reshape(-1)
    return order.argsort(stable=True)
