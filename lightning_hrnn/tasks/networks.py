"""Networks trained on minibatches of synthetic data: softmax regression, MLPs, residual MLPs, autoencoders.

A `NetworkTask` joins a network to a data set. Networks hold no state: they draw initial parameters and map
parameters and inputs to outputs. Convolutional nets are held out on purpose.

Shapes: B instances, N examples, n examples in a minibatch, I inputs and O outputs of a layer, F features, C outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.datasets import Dataset
from lightning_hrnn.tasks.draws import lookup, minibatch, normal, uniform

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
}


def uniform_layer(generator: torch.Generator, count: int, inputs: int, outputs: int) -> Params:
    """Draw weights `[B, I, O]` and biases `[B, 1, O]` uniform in +-1/sqrt(I), as `torch.nn.Linear` does."""
    bound = 1 / math.sqrt(inputs)
    weight = uniform(generator, count, inputs, outputs, low=-bound, high=bound)
    return [weight, uniform(generator, count, 1, outputs, low=-bound, high=bound)]


def gaussian_layer(generator: torch.Generator, count: int, inputs: int, outputs: int) -> Params:
    """Draw weights `[B, I, O]` normal with variance 1/I; biases `[B, 1, O]` are zero."""
    weight = normal(generator, count, inputs, outputs) / math.sqrt(inputs)
    return [weight, weight.new_zeros(count, 1, outputs)]


def he_layer(generator: torch.Generator, count: int, inputs: int, outputs: int) -> Params:
    """Draw weights `[B, I, O]` normal with variance 2/I (He et al., ICCV 2015); biases `[B, 1, O]` are zero."""
    weight, bias = gaussian_layer(generator, count, inputs, outputs)
    return [math.sqrt(2) * weight, bias]


LAYERS: dict[str, Callable[[torch.Generator, int, int, int], Params]] = {
    "uniform": uniform_layer,
    "gaussian": gaussian_layer,
    "he": he_layer,
}


NORM_FLOOR = 1e-5


def affine(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `inputs @ weight + bias`, `[B, n, O]`."""
    return torch.baddbmm(bias, inputs, weight)


class Network(ABC):
    """A map from parameters and inputs to outputs."""

    @abstractmethod
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        """Draw initial parameters, each `[B, *shape]`."""

    @abstractmethod
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        """Map inputs `[B, n, F]` to outputs `[B, n, C]`."""


@dataclass(frozen=True)
class Perceptron(Network):
    """A multi-layer perceptron; without hidden layers, a linear map (softmax regression).

    Args:
        hidden: width of each hidden layer.
        activation: a key of `ACTIVATIONS`.
        start: how layers are initialised, a key of `LAYERS`.
    """

    hidden: tuple[int, ...] = ()
    activation: str = "relu"
    start: str = "uniform"

    @override
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        widths = (features, *self.hidden, outputs)
        layers = [LAYERS[self.start](generator, count, i, o) for i, o in pairwise(widths)]
        return [tensor for layer in layers for tensor in layer]

    @override
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        for k in range(0, len(params) - 2, 2):
            inputs = activation(affine(inputs, params[k], params[k + 1]))
        return affine(inputs, params[-2], params[-1])


@dataclass(frozen=True)
class NormPerceptron(Perceptron):
    """A perceptron with layer norm before every activation; gain and shift take the place of the bias."""

    @override
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        params = super().init(generator, count, features, outputs)
        hidden: Params = []
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            hidden += [weight, torch.ones_like(bias), torch.zeros_like(bias)]
        return hidden + params[-2:]

    @override
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        for k in range(0, len(params) - 2, 3):
            inputs = activation(self.normalise(torch.bmm(inputs, params[k]), *params[k + 1 : k + 3]))
        return affine(inputs, params[-2], params[-1])

    def normalise(self, inputs: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Normalise `[B, n, O]`; gain and shift are `[B, 1, O]`."""
        return layer_norm(inputs, gain, shift)


@dataclass(frozen=True)
class BatchNormPerceptron(NormPerceptron):
    """A perceptron with batch norm, by the statistics of the batch at hand, before every activation."""

    @override
    def normalise(self, inputs: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        variance, mean = torch.var_mean(inputs, 1, correction=0, keepdim=True)
        return torch.addcmul(shift, (inputs - mean) * (variance + NORM_FLOOR).rsqrt(), gain)


@dataclass(frozen=True)
class ResidualPerceptron(Network):
    """Pre-norm residual blocks `h + W activation(V norm(h))` between two linear maps.

    Args:
        width: width of the residual stream.
        inner: width inside a block.
        blocks: number of blocks.
        activation: a key of `ACTIVATIONS`.
        start: how layers are initialised, a key of `LAYERS`.
    """

    width: int
    inner: int
    blocks: int
    activation: str = "gelu"
    start: str = "uniform"

    @override
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        layer = LAYERS[self.start]
        params = layer(generator, count, features, self.width)
        for _ in range(self.blocks):
            params += [params[1].new_ones(count, 1, self.width), params[1].new_zeros(count, 1, self.width)]
            params += layer(generator, count, self.width, self.inner)
            params += layer(generator, count, self.inner, self.width)
        return params + layer(generator, count, self.width, outputs)

    @override
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        stream = affine(inputs, params[0], params[1])
        for k in range(2, len(params) - 2, 6):
            gain, shift, weight_in, bias_in, weight_out, bias_out = params[k : k + 6]
            inner = activation(affine(layer_norm(stream, gain, shift), weight_in, bias_in))
            stream = stream + affine(inner, weight_out, bias_out)
        return affine(stream, params[-2], params[-1])


@dataclass(frozen=True)
class Embedding(Network):
    """Embeds tokens, averages over the example, and hands the result to a head.

    A row of the table gets a gradient only when its token is in the minibatch.

    Args:
        width: numbers in an embedding.
        head: maps embeddings to outputs.
    """

    width: int
    head: Perceptron = Perceptron()

    @override
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        table = normal(generator, count, features, self.width)
        return [table, *self.head.init(generator, count, self.width, outputs)]

    @override
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        return self.head.forward(params[1:], self.embed(params[0], inputs).mean(2))

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Map tokens `[B, n, L]` to embeddings `[B, n, L, width]`."""
        return lookup(table, tokens)


@dataclass(frozen=True)
class Attention(Network):
    """Embeds tokens and places, lets tokens attend to each other, and hands the mean of the sequence to a linear map.

    Blocks are pre-norm with one head: `h + attend(norm(h))`, then `h + W activation(V norm(h))`.

    Args:
        length: tokens per example, L.
        width: numbers in an embedding, w.
        inner: width inside a block's perceptron.
        blocks: number of blocks.
        activation: a key of `ACTIVATIONS`.
        scale: standard deviation of the first embeddings.
    """

    length: int
    width: int
    inner: int
    blocks: int = 1
    activation: str = "gelu"
    scale: float = 0.3

    @override
    def init(self, generator: torch.Generator, count: int, features: int, outputs: int) -> Params:
        width = self.width
        params = [self.scale * normal(generator, count, entries, width) for entries in (features, self.length)]
        ones, zeros = params[0].new_ones(count, 1, width), params[0].new_zeros(count, 1, width)
        for _ in range(self.blocks):
            params += [ones.clone(), zeros.clone()]
            params += uniform_layer(generator, count, width, 3 * width)
            params += uniform_layer(generator, count, width, width)
            params += [ones.clone(), zeros.clone()]
            params += uniform_layer(generator, count, width, self.inner)
            params += uniform_layer(generator, count, self.inner, width)
        return [*params, ones.clone(), zeros.clone(), *uniform_layer(generator, count, width, outputs)]

    @override
    def forward(self, params: Params, inputs: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        examples = inputs.shape[1:]  # n, L
        stream = (lookup(params[0], inputs) + params[1].unsqueeze(1)).flatten(1, 2)  # [B, n L, w]
        for k in range(2, len(params) - 4, 12):
            block = params[k : k + 12]
            query, key, value = affine(layer_norm(stream, *block[:2]), *block[2:4]).unflatten(1, examples).chunk(3, -1)
            weights = (query @ key.transpose(-1, -2) / math.sqrt(self.width)).softmax(-1)  # [B, n, L, L]
            stream = stream + affine((weights @ value).flatten(1, 2), *block[4:6])
            inner = activation(affine(layer_norm(stream, *block[6:8]), *block[8:10]))
            stream = stream + affine(inner, *block[10:12])
        pooled = stream.unflatten(1, examples).mean(2)  # [B, n, w]
        return affine(layer_norm(pooled, *params[-4:-2]), *params[-2:])


@dataclass(frozen=True)
class OneHotEmbedding(Embedding):
    """The same function as `Embedding`, computed as one-hot vectors times the table."""

    @override
    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        one_hot = functional.one_hot(tokens, table.shape[1]).to(table.dtype)
        return torch.bmm(one_hot.flatten(1, 2), table).unflatten(1, tokens.shape[1:])


def layer_norm(inputs: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Normalise `[B, n, O]` over its last dimension; gain and shift are `[B, 1, O]`."""
    return torch.addcmul(shift, functional.layer_norm(inputs, inputs.shape[-1:]), gain)


@dataclass(frozen=True)
class NetworkTask(TaskFamily):
    """A network fitted to a data set; the stochastic loss sees a minibatch drawn with replacement.

    Args:
        dataset: draws the examples and scores the outputs.
        network: the model.
        batch_size: examples in a minibatch, n.
    """

    name = "network"
    dataset: Dataset
    network: Network
    batch_size: int

    @override
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        data = self.dataset.draw(count, generator)
        return self.network.init(generator, count, self.dataset.features, self.dataset.outputs), data

    @override
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        inputs, targets = data["inputs"], data["targets"]
        if generator is not None:
            inputs, targets = minibatch(inputs, targets, size=self.batch_size, generator=generator)
        return self.dataset.loss(self.network.forward(params, inputs), targets)
