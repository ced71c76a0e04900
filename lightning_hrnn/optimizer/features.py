"""From gradient to the inputs of the param RNN: momentum on several timescales, scaled dynamically.

The first half of the way from gradient to update; `hierarchical_rnn` is the second. Everything is a pure function
over flat parameters, features first, so that each feature of all parameters is one contiguous row.

Legend: `P` scalar parameters, `T` tensors, `M` models, `S` timescales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SQUARE_FLOOR = 1e-18
"""Added to a squared average gradient, so that a parameter that never had a gradient divides zero by something."""
MANY = 1e4
"""Parameters; whether a model has these or more makes no difference to how small it counts as."""


class Layout(NamedTuple):
    """Say which tensor each parameter belongs to, and which model each tensor.

    Any number of models (tasks in meta-training, one in deployment) of any shapes lie end to end in one flat
    vector; the three levels of the rule are then three calls, however many tensors there are.

    Example:
        >>> layout = Layout.of([3, 1])
        >>> layout.mean_per_tensor(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2., 4.]])
    """

    tensor_of: Tensor  # [P] index of each parameter's tensor
    model_of: Tensor  # [T] index of each tensor's model
    params_in: Tensor  # [T] number of parameters of each tensor, as a float
    tensors_in: Tensor  # [M] number of tensors of each model, as a float
    smallness: Tensor  # [2, T] of each tensor and of its model, see `smallness`

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        model_of: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Layout:
        """Lay tensors of the given sizes end to end.

        Args:
            sizes: number of parameters of each tensor, all positive. [T]
            model_of: index of the model of each tensor; one model if left out. [T]
            device: where the index tensors live.
            dtype: type of the counts.

        Raises:
            ValueError: a tensor is empty, or the lengths differ.
        """
        models = list(model_of) if model_of is not None else [0] * len(sizes)
        if len(models) != len(sizes):
            raise ValueError(f"{len(sizes)} sizes but {len(models)} model indices: give one model to each tensor.")
        if any(size < 1 for size in sizes):
            raise ValueError("An empty tensor has no mean: leave tensors of size 0 out of the layout.")
        counts = torch.tensor(sizes, device=device)
        model_index, params_in = torch.tensor(models, device=device, dtype=torch.int64), counts.to(dtype)
        tensors_in = torch.bincount(model_index).to(dtype)
        return cls(
            tensor_of=torch.repeat_interleave(torch.arange(len(sizes), device=device), counts),
            model_of=model_index,
            params_in=params_in,
            tensors_in=tensors_in,
            smallness=smallness(params_in, model_index, len(tensors_in)),
        )

    def mean_per_tensor(self, rows: Tensor) -> Tensor:
        """Average rows over the parameters of each tensor: `[..., P] -> [..., T]`."""
        return _segment_sum(rows, self.tensor_of, len(self.params_in)) / self.params_in

    def mean_per_model(self, rows: Tensor) -> Tensor:
        """Average rows over the tensors of each model: `[..., T] -> [..., M]`."""
        return _segment_sum(rows, self.model_of, len(self.tensors_in)) / self.tensors_in

    def to_params(self, rows: Tensor) -> Tensor:
        """Hand a tensor's value to each of its parameters: `[..., T] -> [..., P]`."""
        return rows.index_select(-1, self.tensor_of)

    def to_tensors(self, rows: Tensor) -> Tensor:
        """Hand a model's value to each of its tensors: `[..., M] -> [..., T]`."""
        return rows.index_select(-1, self.model_of)


def smallness(params_in: Tensor, model_of: Tensor, models: int) -> Tensor:
    """Say how few parameters each tensor and its model have, as natural logs from 0 upwards.

    Args:
        params_in: number of parameters of each tensor. [T]
        model_of: index of each tensor's model. [T]
        models: number of models.

    Returns:
        A row for the tensor, a row for its model. [2, T]

    Example:
        >>> smallness(torch.tensor([1e4, 1e3]), torch.tensor([0, 1]), models=2).exp()
        tensor([[ 1., 10.],
                [ 1., 10.]])
    """
    in_model = _segment_sum(params_in, model_of, models)[model_of]
    return (MANY / torch.stack([params_in, in_model])).log().clamp(min=0.0)


def _segment_sum(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    return rows.new_zeros(*rows.shape[:-1], count).index_add(-1, segment, rows)


GRAD_LIMIT = 1e15
"""Gradients are clipped to this size, so that their squares are finite in single precision."""


class LongScale(NamedTuple):
    """Hold how directions are scaled by what the size of each parameter's gradient has long been."""

    decay: Tensor  # [T] of the long average of squares, 0 at a tensor's first step; [P] where it is told to parameters
    power: Tensor  # [T] or [P], from 0, by the present size alone, to 1, by the long average alone


class Moments(NamedTuple):
    """Hold the moving averages of one step."""

    average: Tensor  # [S, P] of the gradient, fastest timescale first
    square: Tensor  # [S, P] of the squared averages; [S + 1, P] where the fastest one's is averaged for long besides


def update_moments(
    grad: Tensor,  # [P]
    moments: Moments,
    input_decay: Tensor,  # [P]
    scale_decay: Tensor,  # [P]
    remembers: Tensor,  # [P] 0 at a tensor's first step, where all decays are 0, else 1
    long_decay: Tensor | None = None,  # [P] of the long average, if there is one; 0 at a tensor's first step
) -> Moments:
    r"""Average the gradient over `S` timescales, and the square of each average over one.

    The decay of timescale `s` is `b_in ** (1 / 2**s)`: each remembers twice as long as the one before
    (Wichrowska et al. 2017, section 3.2.2)::

        m_s <- b_s m_s + (1 - b_s) g            b_s = b_in ** (1 / 2**s)
        v_s <- b_sc v_s + (1 - b_sc) (m_s**2 + floor)

    One further row of squares, where there is one, is a long average of the first::

        V <- b_long V + (1 - b_long) v_0
    """
    grad = grad.clamp(-GRAD_LIMIT, GRAD_LIMIT)
    scales = len(moments.average)
    exponents = 0.5 ** torch.arange(scales, device=grad.device, dtype=grad.dtype)
    decays = remembers * input_decay ** exponents[:, None]  # [S, P]
    scale_decay = remembers * scale_decay
    average = decays * moments.average + (1 - decays) * grad
    square = scale_decay * moments.square[:scales] + (1 - scale_decay) * (average.square() + SQUARE_FLOOR)
    if long_decay is not None:
        square = torch.cat([square, long_decay * moments.square[scales:] + (1 - long_decay) * square[:1]])
    return Moments(average, square)


def scaled_gradient(moments: Moments, divide: bool = True) -> Tensor:
    """Divide each average by its root mean square and compress it: `asinh(m_s / sqrt(v_s))`. [S, P]

    Invariant to the scale of the gradient (section 3.2.3), unless an ablation does not divide.
    """
    square = moments.square[: len(moments.average)]
    return torch.asinh(moments.average / square.sqrt() if divide else moments.average)


def present_size(moments: Moments) -> Tensor:
    """Compare the size of each parameter's gradient with what it has long been: `log sqrt(v_0 / V)`. [P]"""
    return 0.5 * (moments.square[0].log() - moments.square[-1].log())


class Inputs(NamedTuple):
    """Gather what a feature may look at."""

    scaled: Tensor  # [S, P] scaled gradients
    square: Tensor  # [S, P]
    relative_rate: Tensor  # [P] log rate less its mean over the model


def neighbour_products(inputs: Inputs) -> Tensor:
    """Multiply scaled gradients of neighbouring timescales: curvature against averaging length. [S-1, P]"""
    return inputs.scaled[:-1] * inputs.scaled[1:]


def relative_magnitudes(inputs: Inputs) -> Tensor:
    """Compare log gradient magnitudes between timescales: signal against noise (section 3.2.4). [S, P]"""
    log_square = inputs.square.log()
    return log_square - log_square.mean(0)


FEATURES: dict[str, Callable[[Inputs], Tensor]] = {
    "scaled_gradient": lambda inputs: inputs.scaled,
    "neighbour_products": neighbour_products,
    "relative_magnitudes": relative_magnitudes,
    "relative_rate": lambda inputs: inputs.relative_rate[None],
}
"""Each maps `Inputs` to rows `[k, P]`. A rule names those it uses, in order; an ablation leaves one out."""


def count_features(names: Sequence[str], timescales: int) -> int:
    """Count the rows that the named features make.

    Example:
        >>> count_features(tuple(FEATURES), timescales=4)
        12
    """
    probe = torch.ones(timescales, 1)
    return len(param_inputs(names, Inputs(probe, probe, probe[0])))


def param_inputs(names: Sequence[str], inputs: Inputs) -> Tensor:
    """Stack the named features to the inputs of the param RNN. [F, P]"""
    return torch.cat([FEATURES[name](inputs) for name in names])
