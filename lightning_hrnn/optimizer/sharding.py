"""Parameters of which each rank holds a shard (FSDP2, tensor parallelism), and sums that span the shards.

A sharded parameter is a `DTensor`, and so is every state tensor of its shape, on the same mesh: a dimension in front
moves the sharded ones back by one. Whatever concerns single parameters happens on local shards. The levels above see
sums over whole tensors; those of all tensors lie in one buffer, which `Ranks.sum` adds up in one `all_reduce`.

Every rank adds what it holds, and how many elements that is. Where ranks hold copies (a replicated dimension of the
mesh, a tensor that is not sharded at all beside others that are), sum and count are multiples of the true ones alike,
and their quotient is the mean: copies and shards, even ones or not, empty ones too, need no telling apart. Thus the
upper levels, which every rank steps for itself, stay equal on all ranks bit by bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Tell a `DTensor`, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(value: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory; the tensor itself if it is whole."""
    return value.to_local() if is_sharded(value) else value


def local_grad(param: Tensor) -> Tensor | None:
    """Return this rank's shard of a gradient, in the shards of the parameter."""
    grad = param.grad
    if grad is None:
        return None
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)  # tensor parallelism leaves some to be summed
    return local(grad)


def why_unsupported(param: Tensor) -> str | None:
    """Return why a sharded parameter cannot be optimized, or `None`."""
    if not is_sharded(param):
        return None
    for placement in param.placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            return (
                f"is placed as {placement}, and HRNN knows Shard and Replicate alone. Redistribute the parameter "
                "before it is given to the optimizer"
            )
    if (device := local(param.detach()).device.type) != param.device_mesh.device_type:
        return (
            f"lies on {device} while its mesh is of {param.device_mesh.device_type}, where sums are added up. "
            "Use fully_shard without CPUOffloadPolicy, and build the optimizer when nothing lies on meta any more"
        )
    return None


def sharded_like(param: Tensor, shard: Tensor) -> Tensor:
    """Join the ranks' shards, `[*shard]` or `[K, *shard]`, to a tensor that is sharded as the parameter is."""
    if not is_sharded(param):
        return shard
    rows = shard.shape[: shard.dim() - param.dim()]
    shape = torch.Size((*rows, *param.shape))
    return _joined(shard, param, [_moved(placement, len(rows)) for placement in param.placements], shape)


def converted(value: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor to the device, precision and sharding of another of the same shape."""
    if not is_sharded(like):
        whole = value.full_tensor() if is_sharded(value) else value
        return whole.detach().to(device=like.device, dtype=like.dtype, copy=True)
    if not is_sharded(value) or (value.device_mesh, value.placements) != (like.device_mesh, like.placements):
        from torch.distributed.tensor import distribute_tensor

        whole = value.full_tensor() if is_sharded(value) else value
        value = distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements)
    shard = local(value.detach()).to(device=like.device, dtype=like.dtype, copy=True)
    return _joined(shard.contiguous(), like, like.placements, like.shape)


def _joined(shard: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _moved(placement: Placement, by: int) -> Placement:
    """Return the placement of a tensor with `by` more dimensions in front."""
    if placement.is_replicate():
        return placement
    changed: dict[str, Any] = {"dim": placement.dim + by}  # type: ignore[attr-defined]
    if hasattr(placement, "split_factor"):  # FSDP over tensor parallelism, along one dimension
        changed["split_factor"] = placement.split_factor
    return type(placement)(**changed)


def _are_finite(values: list[Tensor], wait: bool) -> Tensor:
    """Return whether all of some tensors are finite."""
    if wait and values[0].device.type == "cpu":  # where a sum takes a tenth of the time that a norm does
        sums = torch.stack([value.sum() for value in values]).isfinite().all()
        if sums:  # no sum over what is not finite is; one over what is may overflow
            return sums
    return torch.stack([norm.isfinite() for norm in torch._foreach_norm(values, math.inf)]).all()


class Ranks(NamedTuple):
    """The ranks that hold the parameters of one optimizer together, by process groups; none if each holds all."""

    groups: tuple[ProcessGroup | None, ...] = ()  # None is the group of all

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Ranks:
        """Return the ranks of the widest mesh.

        Raises:
            ValueError: no mesh contains all others.
        """
        meshes = list(dict.fromkeys(param.device_mesh for param in params if is_sharded(param)))
        if not meshes:
            return cls()
        widest = max(meshes, key=lambda mesh: mesh.size())
        members = set(widest.mesh.flatten().tolist())
        for mesh in meshes:
            if not members.issuperset(mesh.mesh.flatten().tolist()):
                raise ValueError(
                    f"The parameters are sharded over {mesh} and over {widest}, and neither holds all ranks of the "
                    "other, so no rank sees all sums. Shard them over slices of one mesh of which one parameter spans "
                    "the whole, or give the parameters of each mesh an optimizer of their own."
                )
        if widest.ndim > 1 and widest.size() == torch.distributed.get_world_size():
            return cls((None,))
        return cls(tuple(widest.get_all_groups()))

    @property
    def several(self) -> bool:
        """Tell whether there is anybody to add up with."""
        return bool(self.groups)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place: on each the same bits."""
        for group in self.groups:
            torch.distributed.all_reduce(values, group=group)
        return values

    def mean(self, shards: Sequence[Tensor]) -> Tensor:
        """Average over each of some tensors, of which the ranks hold shards. [T]"""
        sums = torch.stack([shard.sum() for shard in shards])
        counts = sums.new_tensor([float(shard.numel()) for shard in shards])
        total, count = self.sum(torch.stack([sums, counts]))
        return total / count

    def agree(
        self, grads: Sequence[Tensor | None], device: torch.device, wait: bool = True
    ) -> tuple[list[bool], bool | Tensor]:
        """Say of which tensors some rank has a gradient, and whether all are finite on all ranks.

        One synchronisation with the device, however many tensors and ranks there are; none where there is one rank
        and `wait` is false, and a tensor says whether all are finite.
        """
        given = [grad is not None for grad in grads]
        here = [grad for grad in grads if grad is not None and grad.numel()]
        finite = torch.ones((), dtype=torch.bool)
        if here:
            finite = _are_finite(here, wait)
        if not self.several:
            return given, bool(finite) if wait or not here else finite
        counts = torch.tensor([*map(float, given), 0.0], device=device)
        counts[-1] = ~finite
        *anywhere, bad = self.sum(counts).tolist()
        return [count > 0 for count in anywhere], bad == 0
