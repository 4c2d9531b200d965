"""Who reads an activation: the operators that read one with a parameter, and the way back from there to its maker."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuronsurgery.batches import Batch
from neuronsurgery.graph.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    MOVES,
    POOLS,
    RESHAPES,
    SHAPES,
    convolution_form,
    operator_name,
)
from neuronsurgery.graph.replay import Graph

LINEAR = {"linear", "addmm", "mm", "matmul"}
TURNS = {"t", "transpose", "permute", "numpy_T"}
COPIES = {"contiguous", "to", "clone"}
"""What a parameter may go through and still be read as it is."""


@dataclass(frozen=True, eq=False)
class Reader:
    """An operator that reads an activation with a parameter.

    Attributes:
        node: the operator.
        activation: what it reads.
        parameter: the first name of its weight.
        axis: the axis of the weight that meets the activation's channels.
        channels: the axis of the activation's channels, from the end.
        groups: of a convolution.
    """

    node: fx.Node
    activation: fx.Node
    parameter: str
    axis: int
    channels: int
    groups: int


@dataclass(frozen=True, eq=False)
class Origin:
    """Where an activation comes from.

    Attributes:
        node: what made it.
        path: the operators from there to its reader, none of which mixes entries.
        alone: whether nobody else reads it, there or on the way.
    """

    node: fx.Node
    path: tuple[fx.Node, ...]
    alone: bool


class Walk:
    """A graph that was run once, in which one walks from readers back to what made their inputs.

    Attributes:
        graph: the graph.
        moving: the nodes whose values depend on the inputs.
    """

    def __init__(self, graph: Graph, batch: Batch) -> None:
        self.graph = graph
        self.moving = depending(graph)
        self.values = graph.values(batch.args, batch.kwargs)

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node."""
        return self.values[self.graph.slots[node]]

    def readers(self) -> Iterator[Reader]:
        """Yield the linear layers and convolutions that read an activation, in the order of execution."""
        for node in self.graph.nodes:
            name = operator_name(node)
            if node.op == "call_function" and (name in LINEAR or name in CONVOLUTIONS or name == "einsum"):
                reader = self._summed(node) if name == "einsum" else self._reader(node, name)
                if reader is not None:
                    yield reader

    def _reader(self, node: fx.Node, name: str) -> Reader | None:
        """Return a linear layer or a convolution as a reader, None where it multiplies otherwise."""
        first, second = (node.args[1], node.args[2]) if name == "addmm" else (node.args[0], node.args[1])
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first not in self.moving:
            return None
        parameter, transposed = self.parameter(second)
        if parameter is None or second in self.moving:
            return None
        dims = self.graph.originals[parameter].dim()
        if name in CONVOLUTIONS:
            turned, groups = convolution_form(node)
            return None if transposed else Reader(node, first, parameter, 0 if turned else 1, 1 - dims, groups)
        if dims != 2:
            return None
        return Reader(node, first, parameter, int((name == "linear") != transposed), -1, 1)

    def _summed(self, node: fx.Node) -> Reader | None:
        """Return a sum over products (einsum) of an activation and a parameter as a reader of the first summed axis."""
        operands: Any = node.args[1]
        terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
        letters = terms.split(",")
        if len(operands) != 2 or "." in terms or not result:
            return None
        for (first, second), (read, weight) in ((operands, letters), (operands[::-1], letters[::-1])):
            parameter, transposed = self.parameter(second)
            summed = [letter for letter in weight if letter in read and letter not in result]
            if first in self.moving and parameter is not None and not transposed and summed:
                each = not set(weight) & set(read) & set(result)  # else there is a weight for each example or place
                axis, channels = weight.index(summed[0]), read.index(summed[0]) - len(read)
                return Reader(node, first, parameter, axis, channels, 1) if each else None
        return None

    def parameter(self, node: fx.Node) -> tuple[str | None, bool]:
        """Return the parameter that a node is, and whether transposed."""
        transposed = False
        while operator_name(node) in TURNS | COPIES and node.args:
            transposed ^= operator_name(node) in TURNS
            (node,) = node.all_input_nodes[:1]
        return self.graph.parameter(node), transposed

    def origin(self, reader: Reader) -> Origin:
        """Return where what a layer reads comes from."""
        node = reader.activation
        path: list[fx.Node] = []
        alone = True
        while True:
            users = [user for user in node.users if operator_name(user) not in SHAPES]
            alone &= len(users) < 2 and node is not self.graph.output
            name, sources = operator_name(node), [n for n in node.all_input_nodes if n in self.moving]
            tensors = [source for source in sources if isinstance(self.value(source), Tensor)]
            passed = name in ELEMENTWISE or name in RESHAPES or name in POOLS or name in ("batch_norm", "getitem")
            if not passed or len(tensors) != 1:  # a product of two is a gate perhaps: then the product is the unit
                return Origin(node, tuple(path), alone)
            path.insert(0, node)
            node = tensors[0]

    # What is given of a parameter

    def back(self, node: fx.Node) -> list[fx.Node]:
        """Return the way to a node from where its entries stood at first."""
        path = [node]
        while operator_name(path[0]) in MOVES - {"cat", "stack"} and path[0].all_input_nodes:
            path.insert(0, path[0].all_input_nodes[0])
        return path

    def entries(self, node: fx.Node, readers: Collection[fx.Node]) -> Tensor | None:
        """Return the numbers of a parameter's entries in the places where a node has them, float64.

        Of a weight with several axes, the numbers of its rows. None if the node has no parameter's entries, those of a
        table, or some that are given to others than the readers.
        """
        path = self.back(node)
        start = path[0]
        if self.graph.parameter(start) is None:
            return None
        shape = self.value(start).shape
        numbers = torch.arange(math.prod(shape), dtype=torch.float64, device=self.value(start).device).reshape(shape)
        if sum(size > 1 for size in shape) > 1:
            return torch.arange(shape[0], dtype=torch.float64) if path == [start] else None

        def moved(way: Sequence[fx.Node]) -> Any:
            return self.graph.replayed(start, numbers, way, self.values, skipped=())

        labels: Tensor = moved(path[1:])
        for at, passed in enumerate(path):
            known = path[at + 1 : at + 2] or readers
            for user in passed.users:
                if user in known:
                    continue
                given = (
                    pytree.tree_leaves(moved([*path[1 : at + 1], user])) if operator_name(user) in MOVES else [labels]
                )
                if any(bool(torch.isin(labels, leaf).any()) for leaf in given):
                    return None
        return labels


def depending(graph: Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the inputs."""
    moving = set(graph.inputs)
    for node in graph.nodes:
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return moving
