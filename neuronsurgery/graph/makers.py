"""What makes an activation that a layer reads: heads, layers, gates; and which of its channels belong to which unit."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from neuronsurgery.graph.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    LOOKUPS,
    NORMS,
    POOLS,
    RECURRENT,
    RESHAPES,
    SHAPES,
    SUMS,
    operator_name,
)
from neuronsurgery.graph.readers import LINEAR, Reader, Walk

Made: TypeAlias = Literal["head", "unit", "channel", "recurrent", "stream", "other"]

ATTENTION = "scaled_dot_product_attention"
MIXES = {"matmul": 0, "bmm": 0, "baddbmm": 1, "einsum": 1}
"""Products of two activations, and where their factors begin among the arguments."""

SOFTMAX = {"softmax", "_softmax"}
SPLITS = {"chunk", "split", "split_with_sizes"}
GATES = {"mul", "glu"}
LAYERS = CONVOLUTIONS | LINEAR | {"einsum"}
COPYING = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
"""Operators that read of their second tensor no more than its form."""

PADS = {"pad", "constant_pad_nd"}
MOVES = RESHAPES | POOLS | {"roll", "expand_as", "view_as", "reshape_as"}
PASSED = ELEMENTWISE | MOVES | PADS | {"batch_norm"}
STREAMS = SUMS | (LOOKUPS - CONVOLUTIONS - LINEAR - {"bmm", "bilinear", ATTENTION})
"""Operators whose results are no units: a sum has several makers, and what is looked up has none."""


@dataclass(frozen=True, eq=False)
class Making:
    """How an activation that a layer reads was made.

    Attributes:
        kind: of what its channels are: of "head", "unit" and "channel" they are units, if nothing is in the way.
        node: where it was made.
        path: the operators from there to its reader, none of which mixes channels.
        axes: those of the node's value along which its units may be counted, the likeliest first.
        alone: whether nobody else reads it, there or on the way.
        norm: the normalisation on the way, "" for none.
    """

    kind: Made
    node: fx.Node
    path: tuple[fx.Node, ...]
    axes: tuple[int, ...]
    alone: bool
    norm: str


class Makers:
    """The makers of what the readers of a graph read.

    Attributes:
        attended: the softmaxes and operators of attention that were met.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self.attended: set[fx.Node] = set()

    def of(self, reader: Reader) -> Making:
        """Return how what a layer reads was made."""
        return self._back(reader, reader.activation, (), alone=True, norm="")

    def _back(self, reader: Reader, node: fx.Node, path: tuple[fx.Node, ...], alone: bool, norm: str) -> Making:
        """Return how the value of a node was made, from which a path leads to a reader."""
        within: set[fx.Node] = set()  # a norm that is written out reads what it scales twice, or more often
        while True:
            alone &= self._is_alone(node, within)
            kind = self._kind(node)
            if kind is not None:
                return Making(kind, node, path, self._axes(kind, node), alone, norm)
            name, sources = operator_name(node), self._moving(node)
            gate = Making("unit", node, path, self._gated_axes(node), alone, norm)
            if self._is_gate(gate, reader):
                return self._gated(gate, reader)
            within = set()
            if self._is_scaling(node):
                follows, within = self._scaled(node)
                norm = norm or ("a norm" if within else operator_name(node) if name in NORMS else "")
            elif self._is_passed(node, sources):
                follows = sources[0]
            else:
                is_stream = name in STREAMS or not self._comes_of_tensors(node)
                return Making("stream" if is_stream else "other", node, path, (), alone, norm)
            path = (node, *path)
            node = follows

    def _moving(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that an operator reads and that depend on the inputs."""
        read = node.args[:1] if operator_name(node) in COPYING else node.all_input_nodes
        moving = [source for source in read if isinstance(source, fx.Node) and source in self._walk.moving]
        return [source for source in moving if isinstance(self._walk.value(source), Tensor)]

    def _comes_of_tensors(self, node: fx.Node) -> bool:
        """Return whether an operator reads more of the inputs than their sizes; an input itself reads nothing."""
        return any(
            source in self._walk.moving and operator_name(source) not in SHAPES for source in node.all_input_nodes
        )

    def _is_alone(self, node: fx.Node, within: set[fx.Node]) -> bool:
        users = [user for user in node.users if operator_name(user) not in SHAPES and user not in within]
        return len(users) < 2 and node is not self._walk.graph.output

    def _is_passed(self, node: fx.Node, sources: Sequence[fx.Node]) -> bool:
        """Return whether an operator keeps channels apart: a bias or a table of positions is part of what it is on."""
        if len(sources) != 1:
            return False
        same = self._walk.value(node).shape == self._walk.value(sources[0]).shape
        return operator_name(node) in PASSED or (operator_name(node) in SUMS and same)

    # What a node is

    def _kind(self, node: fx.Node) -> Made | None:
        """Return what a node makes, None where one has to look further back."""
        name = operator_name(node)
        if self.attention(node):
            return "head"
        # A product of two activations is no layer.
        if node.op == "call_function" and name in LAYERS and len(self._moving(node)) == 1:
            return "channel" if name in CONVOLUTIONS else "unit"
        return "recurrent" if source_name(node) in RECURRENT else None

    def attention(self, node: fx.Node) -> bool:
        """Return whether a node is the result of attention: of torch's operator, or a softmax times the values."""
        name = operator_name(node)
        if name == ATTENTION:
            self.attended.add(node)
            return True
        if name not in MIXES:
            return False
        found = [softmax for factor in self.factors(node) if (softmax := self._softmax(factor)) is not None]
        self.attended.update(found)
        return bool(found)

    def factors(self, node: fx.Node) -> list[fx.Node]:
        """Return the two factors of a product."""
        start = MIXES[operator_name(node)]
        given: Any = node.args[1] if operator_name(node) == "einsum" else node.args[start : start + 2]
        return [factor for factor in given if isinstance(factor, fx.Node)]

    def _softmax(self, node: fx.Node) -> fx.Node | None:
        """Return the softmax that a factor comes of."""
        while node.op == "call_function":
            name = operator_name(node)
            if name in SOFTMAX:
                return node
            if name not in RESHAPES | ELEMENTWISE | {"masked_fill"} or not self._moving(node):
                return None
            node = self._moving(node)[0]
        return None

    def _axes(self, kind: Made, node: fx.Node) -> tuple[int, ...]:
        made = self._walk.value(node)
        if not isinstance(made, Tensor):
            return ()
        if kind == "head":
            return self._batched(node, made.dim())
        if kind == "channel":
            weight = self._walk.value(node.all_input_nodes[1])
            return (made.dim() - weight.dim() + 1,)
        return (made.dim() - 1,)

    def _batched(self, node: fx.Node, dims: int) -> tuple[int, ...]:
        """Return the axes of attention's result that its softmax and its values share: one of them counts heads."""
        if operator_name(node) != "einsum":
            return tuple(range(dims - 2))
        operands, _, result = str(node.args[0]).replace(" ", "").partition("->")
        left, _, right = operands.partition(",")
        return tuple(at for at, letter in enumerate(result) if letter in left and letter in right)

    # Products

    def _gated_axes(self, node: fx.Node) -> tuple[int, ...]:
        """Return the axes of a product of two activations along which no factor is one for many, likeliest first."""
        dims = self._walk.value(node).dim() if operator_name(node) in GATES else 0
        shapes = [self._walk.value(source).shape for source in self._moving(node)]
        if operator_name(node) == "mul" and (len(shapes) != 2 or len(shapes[0]) != len(shapes[1])):
            return ()
        likely = (1, dims - 1) if self._is_of_convolutions(node) else (dims - 1, 1)
        return tuple(at for at in dict.fromkeys(likely) if 0 < at < dims and len({own[at] for own in shapes}) == 1)

    def _is_gate(self, making: Making, reader: Reader) -> bool:
        """Return whether a product is one of two activations, channel by channel: a norm's factor is one for all."""
        shapes = [self._walk.value(source).shape for source in self._moving(making.node)] if making.axes else []
        if len(set(shapes)) < 2:
            return bool(making.axes)
        return any(isinstance(self.labels(making, reader, axis), Tensor) for axis in making.axes)

    def _gated(self, gate: Making, reader: Reader) -> Making:
        """Return how a product of two activations was made: its entries are units, or heads that are gated."""
        if operator_name(gate.node) == "mul":
            for factor in self._moving(gate.node):
                made = self._back(reader, factor, (gate.node, *gate.path), gate.alone, gate.norm)
                if made.kind == "head":
                    return made
        return replace(gate, kind="channel" if self._is_of_convolutions(gate.node) else "unit")

    def _is_scaling(self, node: fx.Node) -> bool:
        """Return whether an operator multiplies all channels of a place alike."""
        name = operator_name(node)
        return (name in ("mul", "div") and len(self._moving(node)) == 2) or (name in NORMS and name != "batch_norm")

    def _is_of_convolutions(self, node: fx.Node) -> bool:
        """Return whether the factors of a product come of a convolution, as one sees it by the first of each."""
        while True:
            sources = self._moving(node) or [source for source in node.all_input_nodes if source in self._walk.moving]
            name = operator_name(node)
            if name in CONVOLUTIONS or not sources:
                return name in CONVOLUTIONS
            if name not in PASSED | GATES | SPLITS | SUMS and node.target is not operator.getitem:
                return False
            node = sources[0]

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
        """Return what an operator scales, and between the two the operators that make its factor of it."""
        sources = self._moving(node)
        if len(sources) < 2:
            return sources[0], set()
        sizes = [self._walk.value(source).numel() for source in sources]
        scaled, factor = sources if sizes[0] >= sizes[1] else sources[::-1]
        return scaled, self._between(scaled, factor)

    def _between(self, first: fx.Node, last: fx.Node) -> set[fx.Node]:
        """Return the operators on the ways from one node to another, the last included; none where there is no way."""
        slots, found = self._walk.graph.slots, {first}
        for node in self._walk.graph.nodes[slots[first] + 1 : slots[last] + 1]:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        if last not in found or last is first:
            return set()
        leading = {last}
        for node in reversed(self._walk.graph.nodes[slots[first] + 1 : slots[last] + 1]):
            if node in leading:
                leading.update(found.intersection(node.all_input_nodes))
        return leading - {first}

    # Which channel is whose

    def labels(self, making: Making, reader: Reader, axis: int) -> Tensor | str:
        """Return the unit of each channel that a reader reads, by sending labels from where the units are made.

        Where they do not get there, or not in one way, the reason.
        """
        made = self._walk.value(making.node)
        shape = [-1 if at == axis else 1 for at in range(made.dim())]
        labels = torch.arange(made.shape[axis], dtype=torch.float64, device=made.device).reshape(shape)
        moved = self._sent(making, labels.expand(made.shape).clone())
        wanted = self._walk.value(reader.activation)
        if not isinstance(moved, Tensor) or moved.shape != wanted.shape:
            return "labels of its units do not come through to it"
        rows = moved.movedim(reader.channels, -1).reshape(-1, wanted.shape[reader.channels])
        if making.kind == "head" and made.dim() == 3:  # heads of all examples on one axis
            rows = rows - rows.amin(1, keepdim=True)
        if not bool((rows == rows[:1]).all()):
            return "which unit an input belongs to differs from place to place"
        found = rows[0].round().long()
        return found.cpu() if bool((rows[0] - found).abs().max() < 1e-6) else "its units are averaged"

    def _sent(self, making: Making, labels: Tensor) -> Any:
        """Return what the operators of a path make of labels; all that keep entries where they are leave them be."""
        graph = self._walk.graph
        own, before = list(self._walk.values), making.node
        own[graph.slots[before]] = labels
        with torch.no_grad():
            for node in making.path:
                at = graph.slots[node]
                name, moved, shape = operator_name(node), own[graph.slots[before]], self._walk.value(node).shape
                if name in MOVES:
                    args, kwargs = graph.fetches[at](own)
                    call: Any = torch.reshape if name in ("view", "_unsafe_view") else node.target
                    moved = call(*args, **kwargs)
                elif name in PADS:  # what stands in the padding is nobody's
                    padded = [axis for axis in range(len(shape)) if shape[axis] != moved.shape[axis]]
                    moved = moved.amax(padded, keepdim=True) if padded else moved
                own[at] = moved if name in MOVES else moved.expand(shape)
                before = node
        return own[graph.slots[before]]

    # What no reader is found for

    def unmet(self) -> Iterator[tuple[str, str]]:
        """Yield where attention is whose heads no reader was found for, and why."""
        for node in self._walk.graph.nodes:
            name = operator_name(node)
            if node in self._walk.moving and (name in SOFTMAX or name == ATTENTION) and node not in self.attended:
                stop = self._onward(node)
                if name == ATTENTION:
                    yield place(node), f"its heads go through {stop or 'nothing that is read'}"
                elif stop in MIXES:
                    yield place(node), "its softmax is multiplied with values, and no layer is seen to read the result"
                elif stop in LINEAR or stop in CONVOLUTIONS or (stop == "mul" and not self._is_router(node)):
                    yield place(node), f"its softmax goes through {stop} before it meets the values"

    def _onward(self, node: fx.Node) -> str:
        """Return the first operator behind a node that does more than to keep entries as they are."""
        while node.users:
            node = next(iter(node.users))
            name = operator_name(node)
            if name == "mul" and len(self._moving(node)) == 2:
                return name
            if name not in RESHAPES | ELEMENTWISE and node.op != "output":
                return name
        return ""

    def _is_router(self, node: fx.Node) -> bool:
        """Return whether a softmax is over the few experts that were chosen before."""
        while node.op == "call_function" and node.all_input_nodes:
            if operator_name(node) in ("topk", "sort"):
                return True
            if operator_name(node) not in RESHAPES | ELEMENTWISE | SOFTMAX and node.target is not operator.getitem:
                return False
            node = node.all_input_nodes[0]
        return False


def source_name(node: fx.Node) -> str:
    """Return the name of a node's operator; of a part of what several are made by at once, of that operator."""
    return operator_name(node.all_input_nodes[0] if node.target is operator.getitem else node)


def place(node: fx.Node) -> str:
    """Return the path of the module that a node was captured in, the node's own name where that is not known."""
    stack: Any = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("model").removeprefix(".") or node.name
