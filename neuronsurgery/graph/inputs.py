"""The inputs of a forward pass: their tensors in a fixed order, and what of them a graph depends on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuronsurgery.batches import is_dense
from neuronsurgery.errors import CaptureError

Dims: TypeAlias = tuple[frozenset[int], ...]
"""For each tensor among the inputs, the dimensions whose size may change from batch to batch."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a model: its tensors in a fixed order, and the structure that held them."""

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Return the inputs; the order of keyword arguments does not matter."""
        leaves, structure = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), structure)

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with other tensors in the place of these."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.others]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    @property
    def kind(self) -> Hashable:
        """What one graph can serve: everything but the sizes of the tensors."""
        kinds = tuple((tensor.dtype, tensor.device, tensor.dim(), tensor.layout) for tensor in self.tensors)
        devices = sorted({tensor.device.type for tensor in self.tensors})
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices)
        return repr(self.structure), repr(self.others), kinds, autocast

    @property
    def signature(self) -> Hashable:
        """What a check holds for: the kind, and the shapes and strides of the tensors."""
        return self.kind, tuple(_measures(tensor) for tensor in self.tensors)

    def refuse_objects(self) -> None:
        """Raise where an input is neither a dense tensor nor a plain value, and cannot be told from another one."""
        if any(tensor.is_nested for tensor in self.tensors):
            raise CaptureError("an input is a nested tensor")
        if any(tensor.layout != torch.strided for tensor in self.tensors):
            raise CaptureError("an input is a sparse tensor")
        plain = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
        odd = sorted(
            {type(leaf).__name__ for leaf in self.others if leaf is not _TENSOR and not isinstance(leaf, plain)}
        )
        if odd:
            raise CaptureError(f"an input of type {', '.join(odd)} is neither a tensor nor a plain value")


_TENSOR = type("_Tensor", (), {"__repr__": lambda _: "<tensor>"})()


def _measures(tensor: Tensor) -> Hashable:
    """Return shape and strides, as far as a tensor has any; none of a nested one, which no graph is made for."""
    if tensor.is_nested:
        return None
    return tensor.shape, tensor.stride() if is_dense(tensor) else None


def batch_dims(tensors: Sequence[Tensor]) -> Dims:
    """Return the first dimension of every tensor that has as many entries as the first tensor has, if any."""
    size = next((len(tensor) for tensor in tensors if tensor.dim() > 0), None)
    return tuple(frozenset({0} if tensor.dim() > 0 and len(tensor) == size else ()) for tensor in tensors)


def varying(dims: Dims, shapes: Sequence[Sequence[torch.Size]]) -> Dims:
    """Return `dims` and every dimension in which the shapes (of the same tensors in several batches) differ."""
    return tuple(
        d.union(i for i, sizes in enumerate(zip(*seen, strict=True)) if len(set(sizes)) > 1)
        for d, seen in zip(dims, zip(*shapes, strict=True), strict=True)
    )
