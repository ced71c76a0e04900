"""Any `nn.Module` as a task family, and the small networks on synthetic data that meta-training is validated on.

Instances of a module run side by side under `torch.func.vmap`. No corpus holds these networks, but checkpoints are
chosen by the last four, `VALIDATION_NETS`; `unseen` holds networks that no choice ever saw.

Legend: `B` instances, `N` examples, `n` examples in a minibatch, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from lightning_hrnn.tasks.base import Data, Params, TaskFamily

Dataset = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # B, generator -> inputs [B, N, ...], classes [B, N]
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # outputs, inputs, classes of a batch -> its loss []

SCORED_AT_ONCE = 125
"""Examples of a fixed data set that go through a network together when only scored; more would take much memory."""


def cross_entropy(outputs: Tensor, inputs: Tensor, classes: Tensor) -> Tensor:
    """Score logits `[n, C]` against classes `[n]`."""
    return functional.cross_entropy(outputs, classes)


def reconstruction(outputs: Tensor, inputs: Tensor, classes: Tensor) -> Tensor:
    """Score outputs `[n, features]` against the inputs themselves: mean squared error."""
    return functional.mse_loss(outputs, inputs.flatten(1))


class ModuleTask(TaskFamily):
    """Train a module on minibatches, as a classifier by default.

    Args:
        name: of the family.
        build: makes a module; it must hold no buffers that change (batch norm without running statistics).
        dataset: draws the data of `B` instances.
        batch_size: examples in a minibatch.
        criterion: what scores the module's outputs.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        dataset: Dataset,
        batch_size: int,
        criterion: Criterion = cross_entropy,
    ) -> None:
        self.name, self.dataset, self.batch_size, self.criterion = name, dataset, batch_size, criterion
        self._build = build
        self._module = build().to("meta")
        self._names = [key for key, _ in self._module.named_parameters()]

    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        """Build `count` modules and draw their data."""
        params = self._init_params(count, generator)
        inputs, classes = self.dataset(count, generator)
        return params, {"inputs": inputs, "classes": classes}

    def _init_params(self, count: int, generator: torch.Generator) -> Params:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
            modules = [self._build() for _ in range(count)]
        columns = zip(*(module.parameters() for module in modules), strict=True)
        return [torch.stack([value.detach() for value in column]).to(generator.device) for column in columns]

    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        """Return the criterion's value, of a minibatch if there is a generator. [B]"""
        inputs, classes = data["inputs"], data["classes"]
        if generator is not None:
            size = (len(classes), self.batch_size)
            chosen = torch.randint(classes.shape[1], size, generator=generator, device=classes.device)
            rows = torch.arange(len(classes), device=classes.device)[:, None]
            inputs, classes = inputs[rows, chosen], classes[rows, chosen]
        return vmap(self._loss_of_one, randomness="error")(params, inputs, classes)

    def _loss_of_one(self, params: Params, inputs: Tensor, classes: Tensor) -> Tensor:
        outputs = functional_call(self._module, dict(zip(self._names, params, strict=True)), (inputs,))
        return self.criterion(outputs, inputs, classes)


class Examples(NamedTuple):
    """Hold a real data set as stored, in few bytes; `(stored - mean) / std` is a network's input."""

    stored: Tensor  # [N, ...]
    classes: Tensor  # [N]
    mean: float
    std: float

    def to(self, device: torch.device) -> Examples:
        """Return the same on a device."""
        return self._replace(stored=self.stored.to(device), classes=self.classes.to(device))

    def inputs(self, chosen: Tensor | slice) -> Tensor:
        """Return some examples as a network takes them. [*chosen.shape, ...]"""
        return (self.stored[chosen].to(torch.get_default_dtype()) - self.mean) / self.std


class FixedDataTask(ModuleTask):
    """Train a module on a real data set, the same for all instances, which differ in first weights and batches.

    Args:
        name: of the family.
        build: see `ModuleTask`.
        load: returns the data set, called when instances are drawn.
        batch_size: examples in a minibatch.
        criterion: what scores the module's outputs.
        scored: the full loss is that of so many examples, the first.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        load: Callable[[], Examples],
        batch_size: int,
        criterion: Criterion = cross_entropy,
        scored: int = 1000,
    ) -> None:
        super().__init__(name, build, _no_dataset, batch_size, criterion)
        self.load, self.scored = load, scored
        self._held: dict[torch.device, Examples] = {}

    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        """Build `count` modules; their data are this object's."""
        instance = torch.arange(count, device=generator.device)
        self._held[instance.device] = self.load().to(instance.device)
        return self._init_params(count, generator), {"instance": instance}

    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        """Return the criterion's value, of a minibatch if there is a generator. [B]"""
        device = data["instance"].device
        examples = self._held[device]
        if generator is not None:
            size = (len(data["instance"]), self.batch_size)
            chosen = torch.randint(len(examples.classes), size, generator=generator, device=device)
            batch = examples.inputs(chosen), examples.classes[chosen]
            return vmap(self._loss_of_one, randomness="error")(params, *batch)
        total = torch.zeros((), device=device)
        count = min(self.scored, len(examples.classes))
        for first in range(0, count, SCORED_AT_ONCE):
            part = slice(first, min(first + SCORED_AT_ONCE, count))
            inputs, classes = examples.inputs(part), examples.classes[part]
            losses = vmap(self._loss_of_one, in_dims=(0, None, None), randomness="error")(params, inputs, classes)
            total = total + losses * len(classes)
        return total / count


def _no_dataset(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("A fixed data set is not drawn.")


def images(count: int, generator: torch.Generator, side: int = 12, points: int = 1500) -> tuple[Tensor, Tensor]:
    """Draw images of ten classes: smooth patterns, two to a class, shifted, faded and under noise.

    Returns:
        Images `[B, N, 1, side, side]` and classes `[B, N]`.
    """
    device = generator.device
    coarse = torch.randn(count, 20, side // 3, side // 3, generator=generator, device=device)
    patterns = functional.interpolate(coarse, size=(side, side), mode="bicubic").flatten(0, 1)  # [20 B, side, side]
    which = torch.randint(20, (count, points), generator=generator, device=device)
    chosen = patterns[which + 20 * torch.arange(count, device=device)[:, None]]  # [B, N, side, side]
    shift = torch.randint(-2, 3, (2, count, points, 1, 1), generator=generator, device=device)
    rows = (torch.arange(side, device=device)[:, None] + shift[0]) % side
    columns = (torch.arange(side, device=device)[None, :] + shift[1]) % side
    flat = (rows * side + columns).flatten(2)
    moved = chosen.flatten(2).gather(2, flat).view_as(chosen)
    fade = 0.5 + torch.rand(count, points, 1, 1, generator=generator, device=device)
    noise = 0.5 * torch.randn(chosen.shape, generator=generator, device=device)
    return (fade * moved + noise).unsqueeze(2), which % 10


def sequences(count: int, generator: torch.Generator, length: int = 12, points: int = 1500) -> tuple[Tensor, Tensor]:
    """Draw sequences of 8 tokens; the class is the token that follows the last marker (token 0).

    Returns:
        Tokens `[B, N, length]` and classes `[B, N]` (0 where nothing follows a marker).
    """
    device = generator.device
    tokens = torch.randint(8, (count, points, length), generator=generator, device=device)
    tokens[..., 1] = 0
    position = torch.arange(length, device=device).expand_as(tokens)
    marker = torch.where(tokens[..., :-1] == 0, position[..., :-1], 0).amax(-1, keepdim=True)
    return tokens, tokens.gather(-1, marker + 1).squeeze(-1)


def conv_net() -> nn.Module:
    """Build a plain three-layer convolutional net with ReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def norm_conv_net() -> nn.Module:
    """Build a convolutional net with batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class TokenMixer(nn.Module):
    """A one-block transformer with learned positions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(8, width) / 4)
        self.positions = nn.Parameter(torch.randn(12, width) / 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 8)

    def forward(self, tokens: Tensor) -> Tensor:  # [n, length] -> [n, 8]
        """Classify sequences of tokens."""
        x = self.tokens[tokens] + self.positions
        query, key, value = self.attention(self.norms[0](x)).chunk(3, -1)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.mix(weights @ value)
        x = x + self.feed_forward(self.norms[1](x))
        return self.head(self.norms[2](x).mean(-2))


def wide_mlp() -> nn.Module:
    """Build a wide multilayer perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


VALIDATION_NETS: dict[str, Callable[[], TaskFamily]] = {
    "conv": lambda: ModuleTask("conv", conv_net, images, 32),
    "norm-conv": lambda: ModuleTask("norm-conv", norm_conv_net, images, 64),
    "transformer": lambda: ModuleTask("transformer", TokenMixer, sequences, 32),
    "wide-mlp": lambda: ModuleTask("wide-mlp", wide_mlp, images, 16),
}
