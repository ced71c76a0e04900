"""What inner training minimises: the interface that every task family keeps.

A task family is a distribution over tasks. It makes `B` instances at once, side by side, and scores them with few
tensor operations. Instances never mix: loss `i` depends on `params[...][i]` and `data[...][i]` alone.

Shapes: B instances.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

Params = list[Tensor]  # each [B, *shape]: what the optimizer moves
Data = dict[str, Tensor]  # each [B, ...]: everything else that defines the instances


class TaskFamily(ABC):
    """A distribution over tasks; a family of your own is a subclass with a `name` and two methods.

    Example::

        >>> import torch
        >>> class Sphere(TaskFamily):
        ...     name = "sphere"
        ...
        ...     def init(self, count, generator):
        ...         return [torch.randn(count, 3, generator=generator, device=generator.device)], {}
        ...
        ...     def loss(self, params, data, generator=None):
        ...         return params[0].square().sum(-1)
        >>> sphere = Sphere()
        >>> params, data = sphere.init(8, torch.Generator().manual_seed(0))
        >>> sphere.loss(params, data).shape
        torch.Size([8])
    """

    name: str

    @abstractmethod
    def init(self, count: int, generator: torch.Generator) -> tuple[Params, Data]:
        """Draw `count` instances.

        Args:
            count: the number of instances B.
            generator: source of all randomness; the tensors live on its device, in torch's default dtype.

        Returns:
            The initial parameters (each `[B, *shape]`) and the data that define the instances (each `[B, ...]`).
        """

    @abstractmethod
    def loss(self, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
        """Return the non-negative loss of every instance, shape `[B]`.

        Args:
            params: current parameters, as `init` shaped them.
            data: the data of the same instances.
            generator: None asks for the full, deterministic loss, which the meta-loss scores. A generator asks for
                the stochastic loss whose gradient the optimizer sees (a minibatch, a noisy or masked gradient);
                on average that gradient is the full loss's.
        """


Family = TypeVar("Family", bound=TaskFamily)


def describe(family: TaskFamily) -> str:
    """Say what a family is made of, in the same words in every process.

    Example:
        >>> from lightning_hrnn.tasks.functions import Quadratic
        >>> describe(Quadratic(20))
        'Quadratic(dim=20)'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(family))  # of functions, where they lie in memory


def named(name: str, family: Family) -> Family:
    """Return a copy of `family` that carries `name`; families are frozen, so the original keeps its own."""
    twin = copy.copy(family)
    vars(twin)["name"] = name
    return twin


def pack(prefix: str, data: Data) -> Data:
    """Put `data` under `prefix/`, so that several families can share one dictionary."""
    return {f"{prefix}/{key}": value for key, value in data.items()}


def unpack(prefix: str, data: Data) -> Data:
    """Return what `pack` put under `prefix/`."""
    start = len(prefix) + 1
    return {key[start:]: value for key, value in data.items() if key.startswith(f"{prefix}/")}
