"""Tensors that are spread over processes: torch's DTensors, and how one becomes whole and is spread again.

What is here is collective: every process of the tensor's mesh has to do it, in one order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from neuronsurgery.wrappers import is_a

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

OTHER_KINDS = (
    ("FlatParameter", "torch.distributed.fsdp._flat_param", "use torch.distributed.fsdp.fully_shard (FSDP2)"),
    ("ShardedTensor", "torch.distributed._shard.sharded_tensor", "use DTensors"),
)
"""Older classes of tensors that are spread over processes, the modules that define them, and what to use instead."""


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    return is_a(tensor, "DTensor", "torch.distributed.tensor")


def unreadable_spread(tensor: Tensor) -> str:
    """Return why a tensor is spread over processes in a way that cannot be read, or ""."""
    for kind, module, instead in OTHER_KINDS:
        if is_a(tensor, kind, module):
            return f"sharded over processes as a {kind}; {instead}"
    if is_spread(tensor) and any(placement.is_partial() for placement in tensor.placements):
        return f"spread over processes as sums of which each has a part ({tensor.placements}); redistribute it"
    return ""


def is_one_way(tensor: DTensor) -> bool:
    """Return whether a tensor is spread along the last dimension of its mesh alone, replicas being along any other."""
    mesh, (*others, last) = tensor.device_mesh, tensor.placements
    alone = not others or (len(others) == 1 and others[0].is_replicate() and mesh.size() == dist.get_world_size())
    return alone and type(last).__name__ == "Shard"


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole on every process; itself where it is."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, like: DTensor) -> Tensor:
    """Return a tensor that every process has as a whole, spread as another one is."""
    from torch.distributed.tensor import DTensor, Replicate

    replicated = [Replicate()] * like.device_mesh.ndim
    everywhere = DTensor.from_local(tensor, like.device_mesh, replicated, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that is to be spread as `like` is; all of it where that is whole."""
    if not is_spread(like) or not is_spread(tensor):
        return tensor
    return tensor.redistribute(placements=like.placements).to_local()


def of_parts(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which every process has the part that it has of `like`."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor


def refuse_different_data(tensors: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Raise if ranks that compute with parts of some tensors are to give different data.

    Raises:
        ValueError: if there are several of them in the group.
    """
    if process_group is None:
        return
    own = set(dist.get_process_group_ranks(process_group))
    together = (own.intersection(t.device_mesh.mesh.flatten().tolist()) for t in tensors if is_spread(t))
    ranks = max(together, key=len, default=own - own)
    if len(ranks) > 1:
        raise ValueError(
            f"the ranks {sorted(ranks)} of process_group= compute with parts of one model, so they have to give the "
            f"same data: leave process_group= out, or give the group of the replicas"
        )


def parts_of(tensor: Tensor, like: DTensor) -> list[Tensor]:
    """Return the part of a whole tensor that each process along the last dimension of a mesh has of `like`."""
    placement: Any = like.placements[-1]
    count = like.device_mesh.size(like.device_mesh.ndim - 1)
    parts = list(torch.chunk(tensor, count, dim=placement.dim))
    empty = tensor.narrow(placement.dim, 0, 0)
    return [*parts, *[empty] * (count - len(parts))]
