"""Sharding a net by FSDP2: which of its modules are gathered and freed as one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

LARGEST_SHARE = 0.25
"""Of all parameters, in one block: memory for two blocks at once is what sharding cannot save."""
SMALLEST_SHARE = 0.001
"""Of all parameters, in a block of its own; less is left to the block around it, for each gather has its price."""


def shard_blocks(net: nn.Module, mesh: Any) -> None:
    """Shard the parameters of a net over a device mesh, block by block; once, however often it is called.

    Args:
        net: The net; its parameters become `DTensor`s.
        mesh: A one-dimensional device mesh.
    """
    if isinstance(net, FSDPModule):
        return
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that hold between `SMALLEST_SHARE` and `LARGEST_SHARE` of a net's parameters.

    A layer that alone holds more is a block too. Mere lists of modules, which are never called, are none.

    Example:
        >>> net = nn.Sequential(nn.Linear(9, 9), nn.ModuleList([nn.Linear(9, 9) for _ in range(19)]), nn.ReLU())
        >>> len(blocks(net))
        20
    """
    total = _size(net)
    found: list[nn.Module] = []

    def descend(module: nn.Module) -> None:
        for child in module.children():
            share = _size(child) / total
            if share < SMALLEST_SHARE:
                continue
            callable_whole = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if callable_whole and (share <= LARGEST_SHARE or not any(child.children())):
                found.append(child)
            else:
                descend(child)

    descend(net)
    return found


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
