"""Writes in place undone: a graph in which no operator changes another one's value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuronsurgery.errors import CaptureError


class AliasedWriteError(Exception):
    """A node writes into a value that others see under another name."""


def make_functional(module: fx.GraphModule, *, strict: bool = False, nested: bool = False) -> None:
    """Replace every write in place by an operator that returns a new value, in the graph and in graphs nested in it.

    Right where nobody else sees the value written to, which the storages of the recorded values tell: views of it that
    were taken before and are read after would keep the old content.

    Args:
        module: what to change.
        strict: raise a CaptureError where it cannot be done, instead of AliasedWriteError.
        nested: whether the placeholders are values of an outer graph.
    """
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    family: dict[Any, list[fx.Node]] = {}
    for node in position:
        for storage in _storages(node):
            family.setdefault(storage, []).append(node)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and isinstance(inner := attribute(module, node), fx.GraphModule):
            make_functional(inner, strict=strict, nested=True)
        written = _written(node)
        if not written:
            continue
        target = node.args[0]
        kin = {n for storage in _storages(target) for n in family[storage] if position[n] < position[node]} | {target}
        seen = [n for n in kin - {target} if any(position[user] > position[node] for user in n.users)]
        outer = nested and any(n.op == "placeholder" for n in kin)
        if written != [0] or seen or outer:
            if strict:
                raise CaptureError(f"{node.target} writes into a value that others see")
            raise AliasedWriteError
        target.replace_all_uses_with(node, delete_user_cb=lambda user, at=position[node]: position[user] > at)
        node.target = _functional(node)


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """Return the value of a node that fetches an attribute of the module."""
    return operator.attrgetter(str(node.target))(module)


def _storages(node: fx.Node) -> set[Any]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}


def _written(node: fx.Node) -> list[int]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _functional(node: fx.Node) -> Callable[..., Any]:
    """Return the operator that computes what `node` writes: its twin without the underscore, or itself on a copy."""
    write: Any = node.target
    namespace, name = write._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    twin = getattr(packet, write._overloadname, None) if name.endswith("_") else None
    dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
    # With mixed dtypes the twin would promote where the write keeps the dtype of its target.
    return twin if twin is not None and len(dtypes) == 1 else OnCopy(write)


@dataclass(frozen=True)
class OnCopy:
    """An operator that writes into its first argument, run on a copy of that."""

    operator: Callable[..., Tensor]

    @property
    def __name__(self) -> str:
        return str(self.operator)

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `target` would hold afterwards."""
        return self.operator(target.clone(), *args, **kwargs)
