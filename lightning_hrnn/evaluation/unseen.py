"""Networks that neither a corpus holds nor meta-training's validation: what results are reported on.

Classes come from synthetic data or from the real digits of scikit-learn. Recurrent nets and attention are written in
plain tensor operations, because `torch.func.vmap` has no rule for torch's fused ones.

Legend: `B` instances, `N` examples, `n` examples in a minibatch, `L` length, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lightning_hrnn.evaluation.images import digits
from lightning_hrnn.evaluation.nets import FixedDataTask, ModuleTask, images, reconstruction, sequences
from lightning_hrnn.tasks.base import TaskFamily

WAVE_INPUTS, WAVE_CLASSES = 10, 6
TOKENS, LENGTH = 8, 12  # of `sequences`


def waves(count: int, generator: torch.Generator, points: int = 1500) -> tuple[Tensor, Tensor]:
    """Draw points in 10 dimensions; the class is the largest of six random sums of sine waves.

    Returns:
        Inputs `[B, N, 10]` and classes `[B, N]`.
    """
    device = generator.device
    inputs = torch.randn(count, points, WAVE_INPUTS, generator=generator, device=device)
    frequency = torch.randn(count, WAVE_INPUTS, 4 * WAVE_CLASSES, generator=generator, device=device) / 3
    phase = 6.3 * torch.rand(count, 1, 4 * WAVE_CLASSES, generator=generator, device=device)
    height = torch.sin(inputs @ frequency + phase).unflatten(-1, (WAVE_CLASSES, 4)).sum(-1)
    return inputs, height.argmax(-1)


def mlp(
    inputs: int,
    hidden: list[int],
    outputs: int,
    activation: Callable[[], nn.Module],
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Build a multilayer perceptron; a norm, if any, stands before each activation."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in zip([inputs, *hidden], hidden, strict=False):
        layers += [nn.Linear(before, width), *([norm(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], outputs))


class ResidualMLP(nn.Module):
    """Blocks of layer norm, GELU layer and linear layer, each added to its input."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:  # [n, ...] -> [n, C]
        """Classify."""
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Recurrent(nn.Module):
    """A recurrent cell over a sequence, and a linear layer on its last state.

    Args:
        embed: turns the input into a sequence of vectors. [n, ...] -> [n, L, inputs]
        inputs: size of those vectors.
        hidden: size of the state.
        outputs: number of classes.
        cell: `"gru"` or `"lstm"`.
    """

    def __init__(self, embed: nn.Module, inputs: int, hidden: int, outputs: int, cell: str) -> None:
        super().__init__()
        self.embed, self.hidden = embed, hidden
        self.gates = nn.Linear(inputs + hidden, (2 if cell == "gru" else 3) * hidden)
        self.candidate = nn.Linear(inputs + hidden, hidden)
        self.head = nn.Linear(hidden, outputs)
        self.step = self._gru if cell == "gru" else self._lstm

    def forward(self, x: Tensor) -> Tensor:  # [n, ...] -> [n, C]
        """Classify sequences."""
        sequence = self.embed(x)
        hidden = cell = sequence.new_zeros(len(sequence), self.hidden)
        for vector in sequence.unbind(1):
            hidden, cell = self.step(vector, hidden, cell)
        return self.head(hidden)

    def _gru(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        reset, keep = self.gates(torch.cat([x, hidden], -1)).sigmoid().chunk(2, -1)
        new = self.candidate(torch.cat([x, reset * hidden], -1)).tanh()
        return keep * hidden + (1 - keep) * new, cell

    def _lstm(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, hidden], -1)
        forget, write, show = self.gates(both).sigmoid().chunk(3, -1)
        cell = forget * cell + write * self.candidate(both).tanh()
        return show * cell.tanh(), cell


class Transformer(nn.Module):
    """Pre-norm transformer blocks with two heads and learned positions; classifies by the mean over the sequence.

    Args:
        embed: turns the input into a sequence of vectors. [n, ...] -> [n, L, width]
        length: of the sequence.
        width: of the vectors.
        outputs: number of classes.
        blocks: number of blocks.
    """

    def __init__(self, embed: nn.Module, length: int, width: int, outputs: int, blocks: int = 2) -> None:
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.attentions = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, width)) for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:  # [n, ...] -> [n, C]
        """Classify sequences."""
        x = self.embed(x) + self.positions
        for index, (attention, mix, feed) in enumerate(zip(self.attentions, self.mixes, self.feeds, strict=True)):
            heads = attention(self.norms[2 * index](x)).unflatten(-1, (2, -1)).transpose(1, 2)  # [n, 2, L, ...]
            query, key, value = heads.chunk(3, -1)
            weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
            x = x + mix((weights @ value).transpose(1, 2).flatten(2))
            x = x + feed(self.norms[2 * index + 1](x))
        return self.head(x.mean(1))


class Rows(nn.Module):
    """See an image of one channel as the sequence of its rows. [n, 1, H, W] -> [n, H, W]"""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the channel."""
        return x.squeeze(1)


def patches(width: int) -> nn.Module:
    """Build a map from 8x8 images to 16 embedded 2x2 patches. [n, 1, 8, 8] -> [n, 16, width]"""
    unfold = nn.Sequential(nn.Unflatten(2, (4, 2)), nn.Unflatten(4, (4, 2)))  # [n, 1, 4, 2, 4, 2]
    return nn.Sequential(unfold, Patches(), nn.Linear(4, width))


class Patches(nn.Module):
    """Gather the pixels of patches. [n, 1, h, a, w, b] -> [n, h w, a b]"""

    def forward(self, x: Tensor) -> Tensor:
        """Bring patches to the front."""
        return x.squeeze(1).transpose(2, 3).flatten(3).flatten(1, 2)


def embeddings() -> nn.Module:
    """Build an embedding of each token and a layer over all of them."""
    return nn.Sequential(
        nn.Embedding(TOKENS, 12), nn.Flatten(), nn.Linear(12 * LENGTH, 32), nn.ReLU(), nn.Linear(32, TOKENS)
    )


def autoencoder() -> nn.Module:
    """Build an autoencoder of 8x8 images through twelve numbers."""
    return mlp(64, [48, 12, 48], 64, nn.Tanh)


def batch_norm(width: int) -> nn.Module:
    """Build a batch norm that knows the statistics of its batch alone."""
    return nn.BatchNorm1d(width, track_running_stats=False)


tokens = partial(sequences, points=600)

_SYNTHETIC: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, Tensor]], int]] = {
    "deep-relu-mlp": (partial(mlp, WAVE_INPUTS, [24] * 6, WAVE_CLASSES, nn.ReLU), waves, 32),
    "deep-tanh-mlp": (partial(mlp, WAVE_INPUTS, [32] * 4, WAVE_CLASSES, nn.Tanh), waves, 64),
    "wide-relu-mlp": (partial(mlp, WAVE_INPUTS, [256], WAVE_CLASSES, nn.ReLU), waves, 32),
    "layer-norm-mlp": (partial(mlp, 144, [48, 48], 10, nn.GELU, nn.LayerNorm), images, 32),
    "residual-mlp": (partial(ResidualMLP, 144, 32, 3, 10), images, 32),
    "gru": (lambda: Recurrent(nn.Embedding(TOKENS, 8), 8, 24, TOKENS, "gru"), tokens, 32),
    "lstm": (lambda: Recurrent(nn.Embedding(TOKENS, 8), 8, 24, TOKENS, "lstm"), tokens, 32),
    "two-block-transformer": (lambda: Transformer(nn.Embedding(TOKENS, 24), LENGTH, 24, TOKENS), tokens, 32),
    "embeddings": (embeddings, tokens, 32),
}

_DIGITS: dict[str, Callable[[], nn.Module]] = {
    "digits-relu-mlp": partial(mlp, 64, [64, 32], 10, nn.ReLU),
    "digits-deep-gelu-mlp": partial(mlp, 64, [32] * 5, 10, nn.GELU),
    "digits-wide-tanh-mlp": partial(mlp, 64, [192], 10, nn.Tanh),
    "digits-batch-norm-mlp": partial(mlp, 64, [48, 48], 10, nn.ReLU, batch_norm),
    "digits-residual-mlp": partial(ResidualMLP, 64, 32, 4, 10),
    "digits-row-gru": lambda: Recurrent(Rows(), 8, 32, 10, "gru"),
    "digits-transformer": lambda: Transformer(patches(16), 16, 16, 10),
}


def unseen_nets() -> dict[str, Callable[[], TaskFamily]]:
    """Return the families by name; each is made when called."""
    nets: dict[str, Callable[[], TaskFamily]] = {
        name: partial(ModuleTask, name, build, dataset, batch_size)
        for name, (build, dataset, batch_size) in _SYNTHETIC.items()
    }
    nets |= {name: partial(FixedDataTask, name, build, digits, 32) for name, build in _DIGITS.items()}
    name = "digits-autoencoder"
    return nets | {name: partial(FixedDataTask, name, autoencoder, digits, 32, reconstruction)}
