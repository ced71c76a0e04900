"""Synthetic data sets for the network tasks; no real data ever enters a corpus.

A data set draws the examples of every instance and names the loss that a network's outputs are scored by.

Shapes: B instances, N examples, n examples in a minibatch, F features, L tokens, C classes or outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_hrnn.tasks.base import Data
from lightning_hrnn.tasks.draws import integers, lookup, normal, rotation, uniform


@dataclass(frozen=True)
class Inputs(ABC):
    """A distribution of inputs.

    Args:
        features: numbers per example, F; for tokens, the size of the vocabulary.
        points: examples per instance, N.
    """

    features: int
    points: int = 1000

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw inputs `[B, N, ...]`."""


@dataclass(frozen=True)
class GaussianInputs(Inputs):
    """Gaussian inputs `[B, N, F]` of unit mean variance with spectrum `1 / k^decay`, about a random mean.

    `decay` 0 gives white inputs; about 1 resembles natural images, whose first principal components carry most of the
    variance and make the Hessian ill-conditioned, as a mean far from zero does.

    Args:
        features: F.
        points: N.
        decay: exponent of the spectrum.
        offset: standard deviation, over features, of the mean.
    """

    decay: float = 0.0
    offset: float = 0.0

    @override
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        inputs = normal(generator, count, self.points, self.features)
        if self.decay > 0:
            rank = torch.arange(1, self.features + 1, device=inputs.device, dtype=inputs.dtype)
            spectrum = rank.pow(-0.5 * self.decay)
            spectrum = spectrum / spectrum.square().mean().sqrt()
            inputs = torch.bmm(inputs * spectrum, rotation(generator, count, self.features))
        return inputs + self.offset * normal(generator, count, 1, self.features)


@dataclass(frozen=True)
class TokenInputs(Inputs):
    """Sequences of tokens `[B, N, L]`, token k of the vocabulary being drawn about `k^-skew` as often as the first.

    Args:
        features: size of the vocabulary, F.
        points: N.
        length: tokens per example, L.
        skew: 0 draws all tokens alike; 1 is Zipf's law, which makes most rows of an embedding rare.
    """

    length: int = 1
    skew: float = 0.0

    @override
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        rank = torch.arange(1, self.features + 1, device=generator.device, dtype=torch.get_default_dtype())
        odds = rank.pow(-self.skew).expand(count, -1)
        tokens = torch.multinomial(odds, self.points * self.length, replacement=True, generator=generator)
        return tokens.view(count, self.points, self.length)


class Dataset(ABC):
    """What a network task learns from."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Numbers per example, F; for tokens, the size of the vocabulary."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of outputs that the network must have, C."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Data:
        """Draw `inputs` `[B, N, ...]` and `targets` `[B, N, ...]`."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Score outputs `[B, n, C]` against the targets of the same `n` examples; returns `[B]`."""


@dataclass(frozen=True)
class Classification(Dataset):
    """Integer targets `[B, N]`, scored by the mean cross-entropy in nats.

    Args:
        inputs: the distribution of the inputs.
        classes: C.
        label_noise: chance that a label is replaced by a uniform draw.
    """

    inputs: Inputs
    classes: int = 2
    label_noise: float = 0.0

    @property
    @override
    def features(self) -> int:
        return self.inputs.features

    @property
    @override
    def outputs(self) -> int:
        return self.classes

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(-1)

    def spoil(self, generator: torch.Generator, labels: Tensor) -> Tensor:
        """Replace some labels by uniform draws."""
        drawn = integers(generator, *labels.shape, below=self.classes)
        return torch.where(uniform(generator, *labels.shape) < self.label_noise, drawn, labels)


class Regression(Dataset):
    """Real targets `[B, N, C]`, scored by half the mean squared error."""

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().mean((-2, -1))


@dataclass(frozen=True)
class Clusters(Classification):
    """Mixtures of Gaussians: every class owns `per_class` clusters, of the shape that `inputs` gives.

    Args:
        inputs: the distribution about a centre.
        classes: C.
        label_noise: chance that a label is replaced by a uniform draw.
        per_class: clusters of each class; 1 gives Gaussian blobs.
        separation: standard deviation of the centres, in units of a cluster's own.
    """

    per_class: int = 1
    separation: float = 1.0

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        clusters = self.classes * self.per_class
        centres = self.separation * normal(generator, count, clusters, self.features)
        member = integers(generator, count, self.inputs.points, below=clusters)  # [B, N]
        chosen = centres.gather(1, member.unsqueeze(-1).expand(-1, -1, self.features))
        inputs = (chosen + self.inputs.draw(count, generator)) / math.sqrt(1 + self.separation**2)
        return {"inputs": inputs, "targets": self.spoil(generator, member % self.classes)}


@dataclass(frozen=True)
class Teacher(Classification):
    """Labels by the largest output of a random tanh network.

    Args:
        inputs: the distribution of the inputs.
        classes: C.
        label_noise: chance that a label is replaced by a uniform draw.
        hidden: hidden units of the teacher.
    """

    hidden: int = 16

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        inputs = self.inputs.draw(count, generator)
        labels = random_network(generator, inputs, self.hidden, self.classes).argmax(-1)
        return {"inputs": inputs, "targets": self.spoil(generator, labels)}


@dataclass(frozen=True)
class TokenTeacher(Classification):
    """Labels by the class whose random weights, summed over the tokens of the example, are largest."""

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        tokens = self.inputs.draw(count, generator)  # [B, N, L]
        weight = normal(generator, count, self.features, self.classes)
        scores = lookup(weight, tokens).sum(2)  # [B, N, C]
        return {"inputs": tokens, "targets": self.spoil(generator, scores.argmax(-1))}


@dataclass(frozen=True)
class TokenPairs(Classification):
    """Labels by a random table of the tokens at two random places, which no place alone tells much about."""

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        tokens = self.inputs.draw(count, generator)  # [B, N, L]
        places = uniform(generator, count, tokens.shape[2]).argsort(1)[:, :2]  # [B, 2]
        pair = tokens.gather(2, places[:, None].expand(-1, tokens.shape[1], -1))  # [B, N, 2]
        table = integers(generator, count, self.features**2, 1, below=self.classes)
        labels = lookup(table, pair[..., 0] * self.features + pair[..., 1]).squeeze(-1)
        return {"inputs": tokens, "targets": self.spoil(generator, labels)}


@dataclass(frozen=True)
class Parity(Classification):
    """Labels by the sum of the tokens, modulo the number of classes."""

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        tokens = self.inputs.draw(count, generator)  # [B, N, L]
        return {"inputs": tokens, "targets": self.spoil(generator, tokens.sum(-1) % self.classes)}


@dataclass(frozen=True)
class TeacherRegression(Regression):
    """Targets are the standardised outputs of a random tanh network, plus noise.

    Args:
        inputs: the distribution of the inputs.
        targets: C.
        hidden: hidden units of the teacher.
        noise: standard deviation of the noise on the targets.
    """

    inputs: Inputs
    targets: int = 1
    hidden: int = 16
    noise: float = 0.0

    @property
    @override
    def features(self) -> int:
        return self.inputs.features

    @property
    @override
    def outputs(self) -> int:
        return self.targets

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        inputs = self.inputs.draw(count, generator)
        targets = random_network(generator, inputs, self.hidden, self.targets)
        return {"inputs": inputs, "targets": targets + self.noise * normal(generator, *targets.shape)}


@dataclass(frozen=True)
class Manifold(Regression):
    """Inputs on a curved manifold, which are their own targets: the data of an autoencoder.

    Args:
        width: F, also the number of outputs.
        latent: dimension of the manifold.
        points: N.
        noise: standard deviation of the inputs off the manifold.
    """

    width: int
    latent: int = 2
    points: int = 1000
    noise: float = 0.05

    @property
    @override
    def features(self) -> int:
        return self.width

    @property
    @override
    def outputs(self) -> int:
        return self.width

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        latent = normal(generator, count, self.points, self.latent)
        inputs = random_network(generator, latent, 4 * self.latent, self.width)
        inputs = inputs + self.noise * normal(generator, *inputs.shape)
        return {"inputs": inputs, "targets": inputs}


def random_network(generator: torch.Generator, inputs: Tensor, hidden: int, outputs: int) -> Tensor:
    """Return the standardised outputs `[B, N, C]` of a random tanh network with one hidden layer."""
    count, _, features = inputs.shape
    first = normal(generator, count, features, hidden) * (2 / math.sqrt(features))
    bias = normal(generator, count, 1, hidden)
    result = torch.bmm(torch.tanh(torch.bmm(inputs, first) + bias), normal(generator, count, hidden, outputs))
    return (result - result.mean(1, keepdim=True)) / result.std(1, keepdim=True)
