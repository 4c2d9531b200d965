"""Units found in the graph: heads, hidden units and channels, each a slice of the only layer that reads it.

An input slice of the only layer that reads a unit silences it exactly: no bias and no norm is left standing behind it.
Where a unit is read is seen by walking back from each layer to what made its input, and which columns are a unit's by
sending labels the same way forward. Fused experts, which no graph tells apart, are known by their tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from neuronsurgery.batches import Examples, Unpack, by_key, inseparable, move, unpack_batch
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.errors import checked_function, inline, listed, warn
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import captured
from neuronsurgery.graph.operators import CONVOLUTIONS, ELEMENTWISE, RESHAPES, operator_name
from neuronsurgery.graph.readers import LINEAR, Reader, Walk
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Predict

UnitKind: TypeAlias = Literal["head", "unit", "channel", "expert unit", "expert"]

KINDS = ("head", "unit", "channel", "expert unit", "expert")
FEW = 2
"""Examples that the graph is run on."""

MIXES = {"matmul", "bmm", "baddbmm"}
ATTENTION = "scaled_dot_product_attention"


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
        layers, reasons = expert_layers(surveyed, runner, kind)
    else:
        given = move(unpack_batch(batch, by_key(unpack, group_key)), runner.device)
        if not inseparable(given):
            given = Examples.of(given).take(range(min(FEW, len(given)))).batch()
        graph = captured(runner, given, checked_function(predict, "predict") or default_predict)
        layers, reasons = _Units(Walk(graph, given), surveyed, runner).of(kind)
    if not layers:
        looked = f":\n{listed(f'{name}: {why}' for name, why in reasons.items())}\n" if reasons else ". "
        raise ValueError(
            f"no {kind} is found in {type(surveyed.model).__name__}{looked}Say by hand which slices they are: "
            f"find_layout(model, patterns={{'*.o_proj.weight': ('e (head d) -> head e d', {{'d': 64}})}})"
        )
    if reasons:
        warn(f"no units were made of {inline(f'{name} ({why})' for name, why in reasons.items())}")
    return Layout(tuple(layers))


class _Units:
    """The units of a graph: which readers of activations they are found at, and which slices of their weights."""

    def __init__(self, walk: Walk, surveyed: Survey, runner: Runner) -> None:
        self._walk, self._surveyed, self._runner = walk, surveyed, runner

    def of(self, kind: str) -> tuple[list[Layer], dict[str, str]]:
        """Return the layers whose slices are units of a kind, and why others that read such activations are none."""
        layers, reasons = [], {}
        uses: dict[str, int] = {}
        readers = list(self._walk.readers())
        for reader in readers:
            uses[reader.parameter] = uses.get(reader.parameter, 0) + 1
        for reader in readers:
            origin = self._walk.origin(reader)
            if self._kind(origin.node, reader) != kind:
                continue
            found = "" if origin.alone else "its input is read by others, too"
            found = found or ("it is used several times" if uses[reader.parameter] > 1 else "")
            layer = found or self._layer(reader, origin.node, origin.path, kind)
            if isinstance(layer, Layer):
                layers.append(layer)
            else:
                reasons[reader.parameter] = layer
        order = {name: tensor.position for name, tensor in self._surveyed.tensors.items()}
        return sorted(layers, key=lambda layer: order[layer.parameter]), reasons

    def _kind(self, origin: fx.Node, reader: Reader) -> str:
        """Return what kind of unit an activation is made of, "" for none."""
        name = operator_name(origin)
        if name == ATTENTION or (name in MIXES and self._is_softmax(origin)):
            return "head"
        if name in CONVOLUTIONS:
            return "channel"
        if name in LINEAR and origin not in self._walk.graph.inputs:
            return "unit"
        if name == "mul" and self._is_gate(origin):
            return "channel" if operator_name(reader.node) in CONVOLUTIONS else "unit"
        return ""

    def _is_gate(self, node: fx.Node) -> bool:
        """Return whether a product is one of two activations, entry by entry: a norm's factor is one for many."""
        shapes = [self._walk.value(factor).shape for factor in node.all_input_nodes]
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
            first = next(iter(n for n in first.all_input_nodes if n in self._walk.moving), None)
        return False

    # Which slices

    def _layer(self, reader: Reader, origin: fx.Node, path: Sequence[fx.Node], kind: str) -> Layer | str:
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

    def _labels(self, reader: Reader, origin: fx.Node, path: Sequence[fx.Node], kind: str) -> Tensor | str:
        """Return the unit of each channel that a reader reads, by sending labels from where the units are made."""
        made = self._walk.value(origin)
        axis = (1 if made.dim() > 3 else 0) if kind == "head" else _channel_axis(origin, made)
        labels = torch.arange(made.shape[axis], dtype=torch.float64, device="cpu")
        labels = labels.reshape([-1 if at == axis % made.dim() else 1 for at in range(made.dim())]).expand(made.shape)
        graph, values = self._walk.graph, self._walk.values
        moved = graph.replayed(origin, labels.clone(), path, values, skipped=ELEMENTWISE | {"batch_norm"})
        wanted = self._walk.value(reader.activation)
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


def _cut(reader: Reader, shape: tuple[int, ...], kind: str, inner: list[str], size: int, position: int) -> Layer | str:
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


def expert_layers(surveyed: Survey, runner: Runner, kind: str) -> tuple[list[Layer], dict[str, str]]:
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
