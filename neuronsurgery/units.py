"""Units found in the graph: heads, hidden units and channels, each a slice of the only layer that reads it.

An input slice of the only layer that reads a unit silences it exactly: no bias and no norm is left standing behind it.
Where a unit is read is seen by walking back from each layer to what made its input, and which columns are a unit's by
sending labels the same way forward. Fused experts, which no graph tells apart, are known by their tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from neuronsurgery.batches import Batch, Examples, Unpack, by_key, inseparable, move, unpack_batch
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.errors import checked_function, inline, listed, warn
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import captured
from neuronsurgery.graph.operators import CONVOLUTIONS, ELEMENTWISE, argument, operator_name
from neuronsurgery.graph.replay import Graph
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Predict

UnitKind: TypeAlias = Literal["head", "unit", "channel", "expert unit", "expert"]

KINDS = ("head", "unit", "channel", "expert unit", "expert")
FEW = 2
"""Examples that the graph is run on."""

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "contiguous", "squeeze"}
RESHAPES |= {"unsqueeze", "movedim", "clone", "t", "expand", "slice", "select"}
"""Operators that only say otherwise where an entry stands."""

POOLS = {
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "mean",
    "max_pool2d_with_indices",
}
POOLS |= {
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
}
"""Operators that keep channels apart."""

LINEAR = {"linear", "addmm", "mm", "matmul"}
MIXES = {"matmul", "bmm", "baddbmm"}
ATTENTION = "scaled_dot_product_attention"
SHAPES = {"sym_size", "sym_numel", "sym_stride"}
"""Operators that read no more of a tensor than its shape."""


@dataclass(frozen=True, eq=False)
class _Reader:
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


@restoring
def find_units(
    model: nn.Module,
    batch: Any,
    kind: UnitKind,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
) -> Layout:
    """Return the units of one kind as a layout: each unit a slice of the only layer that reads it.

    Zeroing such a slice is zeroing the unit, bit for bit: neither a bias of its own nor a norm that it goes through
    alone leaves anything behind. What can be found:

    - "head": of attention, as the columns of the projection behind it; with grouped queries the heads of the queries.
    - "unit": a hidden unit of a feed-forward part, gated or not, as a column of the linear layer that reads it.
    - "channel": of a convolution, as an input channel of the only convolution or linear layer that reads it, behind its
      batch norm, activation and pooling.
    - "expert unit" and "expert": of fused mixtures (tensors of all experts in one), by the shapes of `gate_up_proj` and
      `down_proj`.

    Rewinding, noise and random values on an input slice touch the outgoing weights alone, not those that make the unit.

    Args:
        model: any module that can be captured (see `sweep`); not changed. For experts it need not be.
        batch: one batch of two examples or more, as a loader yields it.
        kind: of the units.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.

    Returns:
        A layout with a pattern for each layer, whose neurons are the units; for scores, effects, searches and edits.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
        ValueError: if the kind is unknown, or no unit of it is found; lists what was looked at, with the reasons.

    Warns:
        UserWarning: once, listing the layers that read an activation of the kind but whose slices are no units, with
            the reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> find_units(model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)), "unit")
        Layout: 8 neurons in 1 layer
          2.weight: 8 neurons of 2

    Source:
        Michel et al., "Are sixteen heads really better than one?", 2019 (heads as units).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    surveyed = survey(model)
    runner = make_runner(surveyed)
    if kind in ("expert unit", "expert"):
        layers, reasons = _experts(surveyed, runner, kind)
    else:
        given = move(unpack_batch(batch, by_key(unpack, group_key)), runner.device)
        if not inseparable(given):
            given = Examples.of(given).take(range(min(FEW, len(given)))).batch()
        graph = captured(runner, given, checked_function(predict, "predict") or default_predict)
        layers, reasons = _Walk(graph, given, surveyed, runner).units(kind)
    if not layers:
        looked = f":\n{listed(f'{name}: {why}' for name, why in reasons.items())}\n" if reasons else ". "
        raise ValueError(
            f"no {kind} is found in {type(surveyed.model).__name__}{looked}Say by hand which slices they are: "
            f"find_layout(model, patterns={{'*.o_proj.weight': ('e (head d) -> head e d', {{'d': 64}})}})"
        )
    if reasons:
        warn(f"no units were made of {inline(f'{name} ({why})' for name, why in reasons.items())}")
    return Layout(tuple(layers))


class _Walk:
    """A graph that was run once, from whose layers one walks back to what made their inputs."""

    def __init__(self, graph: Graph, batch: Batch, surveyed: Survey, runner: Runner) -> None:
        self._graph, self._surveyed, self._runner = graph, surveyed, runner
        self._values = graph.values(batch.args, batch.kwargs)
        self._moving = set(graph.inputs)
        for node in graph.nodes:
            if not self._moving.isdisjoint(node.all_input_nodes):
                self._moving.add(node)

    def units(self, kind: str) -> tuple[list[Layer], dict[str, str]]:
        """Return the layers whose slices are units of a kind, and why others that read such activations are none."""
        layers, reasons = [], {}
        uses: dict[str, int] = {}
        readers = list(self._readers())
        for reader in readers:
            uses[reader.parameter] = uses.get(reader.parameter, 0) + 1
        for reader in readers:
            origin, path, why = self._origin(reader)
            if self._kind(origin, reader) != kind:
                continue
            found = why or ("it is used several times" if uses[reader.parameter] > 1 else "")
            layer = found or self._layer(reader, origin, path, kind)
            if isinstance(layer, Layer):
                layers.append(layer)
            else:
                reasons[reader.parameter] = layer
        order = {name: tensor.position for name, tensor in self._surveyed.tensors.items()}
        return sorted(layers, key=lambda layer: order[layer.parameter]), reasons

    # Who reads what

    def _readers(self) -> Iterator[_Reader]:
        for node in self._graph.nodes:
            name = operator_name(node)
            if node.op != "call_function" or not (name in LINEAR or name in CONVOLUTIONS):
                continue
            first, second = (node.args[1], node.args[2]) if name == "addmm" else (node.args[0], node.args[1])
            if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first not in self._moving:
                continue
            parameter, transposed = self._parameter(second)
            if parameter is None or second in self._moving:
                continue
            if name in CONVOLUTIONS:
                turned = "transpose" in name or bool(name == "convolution" and node.args[6])
                dims = len(self._runner.parameters[parameter].shape)
                groups = int(argument(node, 8 if name == "convolution" else 6, "groups") or 1)
                yield _Reader(node, first, parameter, 0 if turned else 1, 1 - dims, groups)
            else:
                axis = int((name == "linear") != transposed)
                yield _Reader(node, first, parameter, axis, -1, 1)

    def _parameter(self, node: fx.Node) -> tuple[str | None, bool]:
        """Return the two-dimensional parameter that a node is, and whether transposed."""
        transposed = False
        while operator_name(node) in ("t", "transpose", "permute", "contiguous", "to", "clone") and node.args:
            transposed ^= operator_name(node) in ("t", "transpose", "permute")
            (node,) = node.all_input_nodes[:1]
        return self._graph.parameter(node), transposed

    def _users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if operator_name(user) not in SHAPES]

    def _origin(self, reader: _Reader) -> tuple[fx.Node, list[fx.Node], str]:
        """Return what made an activation, the operators from there to its reader, and why it is no unit's, or ""."""
        node = reader.activation
        path: list[fx.Node] = []
        why = ""
        while True:
            if len(self._users(node)) > 1 or node is self._graph.output:
                why = "its input is read by others, too"
            name, sources = operator_name(node), [n for n in node.all_input_nodes if n in self._moving]
            tensors = [source for source in sources if isinstance(self._values[self._graph.slots[source]], Tensor)]
            passed = name in ELEMENTWISE or name in RESHAPES or name in POOLS or name in ("batch_norm", "getitem")
            if name == "mul" and len(tensors) > 1:
                return node, path, why  # a gate perhaps: then the product is the unit
            if not passed or len(tensors) != 1:
                return node, path, why
            path.insert(0, node)
            node = tensors[0]

    def _kind(self, origin: fx.Node, reader: _Reader) -> str:
        """Return what kind of unit an activation is made of, "" for none."""
        name = operator_name(origin)
        if name == ATTENTION or (name in MIXES and self._is_softmax(origin)):
            return "head"
        if name in CONVOLUTIONS:
            return "channel"
        if name in LINEAR and origin not in self._graph.inputs:
            return "unit"
        if name == "mul" and self._is_gate(origin):
            return "channel" if operator_name(reader.node) in CONVOLUTIONS else "unit"
        return ""

    def _is_gate(self, node: fx.Node) -> bool:
        """Return whether a product is one of two activations, entry by entry: a norm's factor is one for many."""
        shapes = [self._values[self._graph.slots[factor]].shape for factor in node.all_input_nodes]
        return len(shapes) == 2 and shapes[0] == shapes[1]

    def _is_softmax(self, node: fx.Node) -> bool:
        """Return whether the first factor of a product comes of a softmax."""
        first = node.args[1] if operator_name(node) == "baddbmm" else node.args[0]
        while isinstance(first, fx.Node) and first.op == "call_function":
            name = operator_name(first)
            if name in ("softmax", "_softmax"):
                return True
            if name not in RESHAPES and name not in ELEMENTWISE:
                return False
            first = next(iter(n for n in first.all_input_nodes if n in self._moving), None)
        return False

    # Which slices

    def _layer(self, reader: _Reader, origin: fx.Node, path: Sequence[fx.Node], kind: str) -> Layer | str:
        """Return the layer of a reader's weight cut into units, or why it is none."""
        labels = self._labels(reader, origin, path, kind)
        if isinstance(labels, str):
            return labels
        count = int(labels.max()) + 1
        size = len(labels) // max(count, 1)
        every = torch.arange(count)
        shape = tuple(self._runner.parameters[reader.parameter].shape)
        if count * size != len(labels) or count < 2:
            return f"its {len(labels)} inputs are not those of equal units"
        if torch.equal(labels, every.repeat_interleave(size)):
            inner = [kind, "d"]
        elif torch.equal(labels, every.repeat(size)):
            inner = ["d", kind]
        else:
            return "the entries of a unit do not stand in a regular order"
        return _cut(reader, shape, kind, inner, size, self._surveyed.tensors[reader.parameter].position)

    def _labels(self, reader: _Reader, origin: fx.Node, path: Sequence[fx.Node], kind: str) -> Tensor | str:
        """Return the unit of each channel that a reader reads, by sending labels from where the units are made."""
        made = self._values[self._graph.slots[origin]]
        axis = (1 if made.dim() > 3 else 0) if kind == "head" else _channel_axis(origin, made)
        labels = torch.arange(made.shape[axis], dtype=torch.float64, device="cpu")
        labels = labels.reshape([-1 if at == axis % made.dim() else 1 for at in range(made.dim())]).expand(made.shape)
        moved = self._graph.replayed(origin, labels.clone(), path, self._values, skipped=ELEMENTWISE | {"batch_norm"})
        wanted = self._values[self._graph.slots[reader.activation]]
        if not isinstance(moved, Tensor) or moved.shape != wanted.shape:
            return "labels of its units do not come through to it"
        rows = moved.movedim(reader.channels, -1).reshape(-1, wanted.shape[reader.channels])
        if kind == "head" and axis == 0:  # heads of all examples on one axis
            rows = rows - rows.amin(1, keepdim=True)
        if not bool((rows == rows[:1]).all()):
            return "which unit an input belongs to differs from place to place"
        return rows[0].round().long()


def _channel_axis(origin: fx.Node, made: Tensor) -> int:
    return 1 if operator_name(origin) in CONVOLUTIONS or made.dim() == 4 else made.dim() - 1


def _cut(reader: _Reader, shape: tuple[int, ...], kind: str, inner: list[str], size: int, position: int) -> Layer | str:
    """Return the layer of a weight whose input axis is cut into units."""
    rest = [f"k{at}" for at in range(len(shape) - 2)]
    parts = [name for name in inner if size > 1 or name == kind]
    joined = f"({' '.join(parts)})" if len(parts) > 1 else parts[0]
    sizes = {"d": size} if size > 1 else {}
    row = [name for name in ("d",) if size > 1]
    if reader.groups > 1:
        if reader.axis == 0 or size > 1:
            return "it is a grouped convolution of another form"
        left = f"(g o) {kind} {' '.join(rest)}"
        return Layer(
            reader.parameter, f"{left} -> (g {kind}) o {' '.join(rest)}", {"g": reader.groups}, shape, position
        )
    axes = ["o", joined] if reader.axis == 1 else [joined, "o"]
    pattern = f"{' '.join([*axes, *rest])} -> {kind} {' '.join(['o', *row, *rest])}"
    return Layer(reader.parameter, pattern, sizes, shape, position)


# Experts of fused mixtures


def _experts(surveyed: Survey, runner: Runner, kind: str) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of fused experts, by the shapes of the two tensors that a mixture keeps them in."""
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, tensor in surveyed.tensors.items():
        path, _, attribute = name.rpartition(".")
        shape = tuple(runner.parameters[name].shape)
        if attribute != "down_proj" or len(shape) != 3:
            continue
        prefix = f"{path}." if path else ""
        other = runner.parameters.get(f"{prefix}gate_up_proj")
        form = None if other is None else _form(tuple(other.shape), shape)
        if form is None:
            reasons[name] = "the shapes of gate_up_proj and down_proj do not say which axis is which"
        elif kind == "expert":
            layers.append(Layer(name, "expert h i -> expert h i", {}, shape, tensor.position))
            if f"{prefix}down_proj_bias" in runner.parameters:
                reasons[f"{prefix}down_proj_bias"] = "an expert's bias stays: add its entries with extra="
        else:
            left = "expert h unit" if form == "rows" else "expert unit h"
            layers.append(Layer(name, f"{left} -> (expert unit) h", {}, shape, tensor.position))
    return layers, reasons


def _form(gate_up: tuple[int, ...], down: tuple[int, ...]) -> Literal["rows", "columns"] | None:
    """Return whether the experts' weights are (out, in) or (in, out); None where the shapes allow both or neither."""
    if len(gate_up) != 3 or gate_up[0] != down[0]:
        return None
    rows = gate_up[1] == 2 * down[2] and gate_up[2] == down[1]
    columns = gate_up[2] == 2 * down[1] and gate_up[1] == down[2]
    if rows == columns:
        return None
    return "rows" if rows else "columns"
