"""Synthetic data sets for the network tasks; no real data ever enters a corpus.

A data set draws the examples of every instance and names the loss that a network's outputs are scored by.

Shapes: B instances, N examples, F features, C classes or outputs.
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
from lightning_hrnn.tasks.draws import integers, normal, rotation, uniform


class Dataset(ABC):
    """What a network task learns from.

    Attributes:
        features: numbers per example, F.
        outputs: outputs that the network must have, C.
        points: examples per instance, N.
    """

    features: int
    points: int

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of outputs that the network must have."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Data:
        """Draw `inputs` `[B, N, ...]` and `targets` `[B, N, ...]`."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Score outputs `[B, n, C]` against the targets of the same `n` examples; returns `[B]`."""


class Classification(Dataset):
    """Integer targets `[B, N]`, scored by the mean cross-entropy in nats."""

    classes: int

    @property
    @override
    def outputs(self) -> int:
        return self.classes

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(-1)


class Regression(Dataset):
    """Real targets `[B, N, C]`, scored by half the mean squared error."""

    @override
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().mean((-2, -1))


def correlated_inputs(generator: torch.Generator, count: int, points: int, features: int, decay: float) -> Tensor:
    """Draw Gaussian inputs `[B, N, F]` of unit mean variance with spectrum `1 / k^decay`.

    `decay` 0 gives white inputs; about 1 resembles natural images, whose first principal components carry most of
    the variance and make the Hessian ill-conditioned.
    """
    inputs = normal(generator, count, points, features)
    if decay == 0:
        return inputs
    spectrum = torch.arange(1, features + 1, device=generator.device).to(inputs.dtype).pow(-0.5 * decay)
    spectrum = spectrum / spectrum.square().mean().sqrt()
    return torch.bmm(inputs * spectrum, rotation(generator, count, features))


def random_network(generator: torch.Generator, inputs: Tensor, hidden: int, outputs: int) -> Tensor:
    """Return the standardised outputs `[B, N, C]` of a random tanh network with one hidden layer."""
    count, _, features = inputs.shape
    first = normal(generator, count, features, hidden) * (2 / math.sqrt(features))
    bias = normal(generator, count, 1, hidden)
    result = torch.bmm(torch.tanh(torch.bmm(inputs, first) + bias), normal(generator, count, hidden, outputs))
    return (result - result.mean(1, keepdim=True)) / result.std(1, keepdim=True)


def flip_labels(generator: torch.Generator, labels: Tensor, classes: int, chance: float) -> Tensor:
    """Replace each label by a uniform draw with probability `chance`."""
    flipped = uniform(generator, *labels.shape) < chance
    return torch.where(flipped, integers(generator, *labels.shape, below=classes), labels)


@dataclass(frozen=True)
class Clusters(Classification):
    """Mixtures of Gaussians: every class owns `per_class` clusters.

    Args:
        features: F.
        classes: C.
        points: N.
        per_class: clusters of each class; 1 gives Gaussian blobs.
        separation: standard deviation of the centres, in units of a cluster's own.
        decay: spectrum of the inputs, see `correlated_inputs`.
        label_noise: chance that a label is drawn afresh.
    """

    features: int
    classes: int = 2
    points: int = 1000
    per_class: int = 1
    separation: float = 1.0
    decay: float = 0.0
    label_noise: float = 0.0

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        clusters = self.classes * self.per_class
        centres = self.separation * normal(generator, count, clusters, self.features)
        member = integers(generator, count, self.points, below=clusters)
        chosen = centres.gather(1, member.unsqueeze(-1).expand(-1, -1, self.features))
        inputs = chosen + correlated_inputs(generator, count, self.points, self.features, self.decay)
        inputs = inputs / math.sqrt(1 + self.separation**2)
        return {
            "inputs": inputs,
            "targets": flip_labels(generator, member % self.classes, self.classes, self.label_noise),
        }


@dataclass(frozen=True)
class Teacher(Classification):
    """Labels by the largest output of a random tanh network.

    Args:
        features: F.
        classes: C.
        points: N.
        hidden: hidden units of the teacher.
        decay: spectrum of the inputs, see `correlated_inputs`.
        label_noise: chance that a label is drawn afresh.
    """

    features: int
    classes: int = 2
    points: int = 1000
    hidden: int = 16
    decay: float = 0.0
    label_noise: float = 0.0

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        inputs = correlated_inputs(generator, count, self.points, self.features, self.decay)
        labels = random_network(generator, inputs, self.hidden, self.classes).argmax(-1)
        return {"inputs": inputs, "targets": flip_labels(generator, labels, self.classes, self.label_noise)}


@dataclass(frozen=True)
class TeacherRegression(Regression):
    """Targets are the standardised outputs of a random tanh network, plus noise.

    Args:
        features: F.
        targets: C.
        points: N.
        hidden: hidden units of the teacher.
        decay: spectrum of the inputs, see `correlated_inputs`.
        noise: standard deviation of the noise on the targets.
    """

    features: int
    targets: int = 1
    points: int = 1000
    hidden: int = 16
    decay: float = 0.0
    noise: float = 0.0

    @property
    @override
    def outputs(self) -> int:
        return self.targets

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        inputs = correlated_inputs(generator, count, self.points, self.features, self.decay)
        targets = random_network(generator, inputs, self.hidden, self.targets)
        return {"inputs": inputs, "targets": targets + self.noise * normal(generator, *targets.shape)}


@dataclass(frozen=True)
class Manifold(Regression):
    """Inputs on a curved manifold, which are their own targets: the data of an autoencoder.

    Args:
        features: F, also the number of outputs.
        latent: dimension of the manifold.
        points: N.
        noise: standard deviation of the inputs off the manifold.
    """

    features: int
    latent: int = 2
    points: int = 1000
    noise: float = 0.05

    @property
    @override
    def outputs(self) -> int:
        return self.features

    @override
    def draw(self, count: int, generator: torch.Generator) -> Data:
        latent = normal(generator, count, self.points, self.latent)
        inputs = random_network(generator, latent, 4 * self.latent, self.features)
        inputs = inputs + self.noise * normal(generator, *inputs.shape)
        return {"inputs": inputs, "targets": inputs}
