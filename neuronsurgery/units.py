"""Units found in the graph: heads, hidden units and channels, each a slice of the only layer that reads it.

An input slice of the only layer that reads a unit silences it exactly: no bias and no norm is left standing behind it.
Where a unit is read is seen by walking back from each layer to what made its input, and which columns are a unit's by
sending labels the same way forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from neuronsurgery.batches import Examples, Unpack, by_key, inseparable, move, unpack_batch
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.errors import checked_function, inline, listed, warn
from neuronsurgery.experts import FUSED, expert_layers
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import captured
from neuronsurgery.graph.makers import Makers, Making, source_name
from neuronsurgery.graph.operators import CONVOLUTIONS, ELEMENTWISE, RECURRENT, RESHAPES, SHAPES, operator_name
from neuronsurgery.graph.readers import COPIES, LINEAR, TURNS, Reader, Walk
from neuronsurgery.graph.recurrent import Recurrent
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Predict

UnitKind: TypeAlias = Literal["head", "unit", "channel", "expert unit", "expert"]

KINDS = ("head", "unit", "channel", "expert unit", "expert")
FEW = 2
"""Examples that the graph is run on."""

PRODUCTS = {"bmm", "baddbmm", "bilinear", "einsum"}
GROUPED = "grouped_mm"
"""Operators, but for layers, that multiply with a parameter."""

PARTS = {"index", "index_select"}


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
    - "unit": a hidden unit of a feed-forward part, gated or not, as a column of the linear layer that reads it; of an
      LSTM with a projection, as a column of that.
    - "channel": of a convolution, as an input channel of the only convolution or linear layer that reads it, behind its
      batch norm, activation, pooling and gate.
    - "expert unit" and "expert": of fused mixtures (tensors of all experts in one), by the shapes of `gate_up_proj` and
      `down_proj`.

    A layer that is used several times is cut in every use, where all of them read units of the kind.

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
        UserWarning: once, listing with the reasons all layers that read such an activation, or one whose maker is not
            seen, but whose slices are no units; for heads every attention that no layer is seen to read.

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
        layers, reasons = _Units(walk(runner, batch, predict, by_key(unpack, group_key)), surveyed, runner).of(kind)
    if not layers:
        looked = (
            f":\n{listed((f'{name}: {why}' for name, why in reasons.items()), len(reasons))}\n" if reasons else ". "
        )
        raise ValueError(
            f"no {kind} is found in {type(surveyed.model).__name__}{looked}Say by hand which slices they are: "
            f"find_layout(model, patterns={{'*.o_proj.weight': ('e (head d) -> head e d', {{'d': 64}})}})"
        )
    if reasons:
        every = inline((f"{name} ({why})" for name, why in reasons.items()), len(reasons))
        warn(f"no units were made of {every}")
    return Layout(tuple(layers))


READ_BY_OTHERS = "its input is read by others, too"
IN_EXPERTS = "its units are of the kind 'expert unit'"
SEVERAL = "it is used several times"
FED_BACK = "its units are read by the recurrent layer, too: silence() makes them nothing by their rows"


def walk(runner: Runner, batch: Any, predict: Predict | None, unpack: Unpack | None) -> Walk:
    """Return the captured graph of a model, run on a few examples of a batch as a loader yields it.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
    """
    given = move(unpack_batch(batch, unpack), runner.device)
    if not inseparable(given):
        given = Examples.of(given).take(range(min(FEW, len(given)))).batch()
    return Walk(captured(runner, given, checked_function(predict, "predict") or default_predict), given)


class _Units:
    """The units of a graph: which readers of activations they are found at, and which slices of their weights."""

    def __init__(self, walk: Walk, surveyed: Survey, runner: Runner) -> None:
        self._walk, self._surveyed, self._runner = walk, surveyed, runner
        self._makers = Makers(walk)

    def of(self, kind: str) -> tuple[list[Layer], dict[str, str]]:
        """Return the layers whose slices are units of a kind, and why others that read such activations are none."""
        uses: dict[str, list[Layer | str | None]] = {}
        readers = list(self._walk.readers())
        for reader in readers:
            uses.setdefault(reader.parameter, []).append(self._use(reader, kind))
        if kind == "unit":
            for name, _, use in self._recurrent():
                uses.setdefault(name, []).append(use)
        layers, reasons = [], {}
        nodes = {reader.node for reader in readers} | {node for _, node, _ in self._recurrent()}
        for name, found in uses.items():
            one = self._one(name, found, nodes)
            if isinstance(one, Layer):
                layers.append(one)
            elif one:
                reasons[name] = one
        reasons |= dict(self._makers.unmet()) if kind == "head" else dict(self._otherwise(nodes, kind))
        return sorted(layers, key=lambda layer: layer.position), reasons

    def _one(self, name: str, found: Sequence[Layer | str | None], nodes: set[fx.Node]) -> Layer | str | None:
        """Return what all uses of a parameter come to: a shared layer's slice must be the unit in every one."""
        said = [use for use in found if isinstance(use, str)]
        if said or all(use is None for use in found):
            return said[0] if said else None
        users = set().union(*(self._users(node) for node in self._walk.graph.parameters[name]))
        several = not users <= nodes or any(use != found[0] for use in found)
        return SEVERAL if several else found[0]

    def _users(self, node: fx.Node) -> set[fx.Node]:
        """Return the operators that read a parameter, transposed or not."""
        users: set[fx.Node] = set()
        for user in node.users:
            name = operator_name(user)
            if name not in SHAPES:
                users |= self._users(user) if name in TURNS | COPIES else {user}
        return users

    def _use(self, reader: Reader, kind: str) -> Layer | str | None:
        """Return the layer that a reader's weight is if it is cut into units of a kind, or why it is none.

        None where what it reads is of no kind, or of another.
        """
        making = self._makers.of(reader)
        own = "channel" if operator_name(reader.node) in CONVOLUTIONS else "unit"
        if making.kind in ("other", "recurrent") and kind == own and not making.norm:
            through = f"its input comes through {source_name(making.node)}, which is not seen through"
            return FED_BACK if making.kind == "recurrent" else through
        if making.kind != kind:
            return None
        if making.norm and not making.alone:
            return None  # a residual stream begins there
        if making.norm:
            return f"its input goes through {making.norm}, which is of all units together"
        return self._layer(reader, making, kind) if making.alone else READ_BY_OTHERS

    # Which slices

    def _layer(self, reader: Reader, making: Making, kind: str) -> Layer | str:
        """Return the layer of a reader's weight cut into units, or why it is none."""
        found: Layer | str = "its units are not counted along one axis"
        for axis in making.axes:
            labels = self._makers.labels(making, reader, axis)
            found = labels if isinstance(labels, str) else self._cut(reader, labels, kind)
            if isinstance(found, Layer):
                break
        return found

    def _cut(self, reader: Reader, labels: Tensor, kind: str) -> Layer | str:
        """Return the layer of a weight whose inputs belong to these units."""
        count = int(labels.max()) + 1
        size = len(labels) // max(count, 1)
        every = torch.arange(count)
        if count < 2:
            return f"it reads a single {kind}"
        if count * size != len(labels):
            return f"its {len(labels)} inputs are not those of equal units"
        if torch.equal(labels, every.repeat_interleave(size)):
            inner = [kind, "d"]
        elif torch.equal(labels, every.repeat(size)):
            inner = ["d", kind]
        else:
            return "the entries of a unit do not stand in a regular order"
        shape = tuple(self._runner.parameters[reader.parameter].shape)
        return _cut(reader, shape, kind, inner, size, self._surveyed.tensors[reader.parameter].position)

    # What is read in other ways

    def _recurrent(self) -> Iterator[tuple[str, fx.Node, Layer | str]]:
        """Yield for each direction of each recurrent layer the parameter that reads its units, and what it is."""
        for node in self._walk.graph.nodes:
            if operator_name(node) in RECURRENT:
                for own, projected in _recurrent_weights(node):
                    name = self._walk.graph.parameter(own)
                    if name is not None:
                        yield name, node, self._projection(name) if projected else FED_BACK

    def _projection(self, name: str) -> Layer:
        shape = tuple(self._runner.parameters[name].shape)
        return Layer(name, "p unit -> unit p", {}, shape, self._surveyed.tensors[name].position)

    def _otherwise(self, seen: set[fx.Node], kind: str) -> Iterator[tuple[str, str]]:
        """Yield the parameters that activations of a kind are multiplied with in other ways than by a layer."""
        for node in self._walk.graph.nodes:
            name = operator_name(node)
            multiplies = name in CONVOLUTIONS | LINEAR | PRODUCTS or GROUPED in name
            if node in seen or not multiplies or ("channel" if name in CONVOLUTIONS else "unit") != kind:
                continue
            held = {read: self._held(read) for read in node.all_input_nodes}
            activation = next((read for read, name in held.items() if name is None and read in self._walk.moving), None)
            if activation is None:
                continue
            making = self._makers.of(Reader(node, activation, "", 0, -1, 1))
            for parameter in filter(None, held.values()):
                if making.kind in (kind, "other") and self._walk.graph.originals[parameter].dim() > 1:
                    fused = parameter.rpartition(".")[2] in FUSED
                    yield parameter, IN_EXPERTS if fused else f"{name} reads it, not as a layer's weight"

    def _held(self, node: fx.Node) -> str | None:
        """Return the parameter that a node is, or a part or a form of."""
        while self._walk.graph.parameter(node) is None:
            # What moves is a part of a parameter only where the part is chosen by the inputs, as by the ids of experts.
            known = TURNS | RESHAPES | PARTS | (set() if node in self._walk.moving else COPIES | ELEMENTWISE)
            if node.op != "call_function" or operator_name(node) not in known or not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        return self._walk.graph.parameter(node)


def _recurrent_weights(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Yield for each direction of each recurrent layer the weight that reads its units, and whether that is all."""
    given: Any = node.args
    if operator_name(node).endswith("_cell"):
        yield given[3], False
    for part in Recurrent.every(node):
        yield part.weights[-1 if part.projected else 1], part.projected


def _cut(reader: Reader, shape: tuple[int, ...], kind: str, inner: list[str], size: int, position: int) -> Layer | str:
    """Return the layer of a weight whose input axis is cut into units."""
    rest = [f"k{at}" for at in range(len(shape) - 2)]
    parts = [name for name in inner if size > 1 or name == kind]
    joined = f"({' '.join(parts)})" if len(parts) > 1 else parts[0]
    sizes = {"d": size} if size > 1 else {}
    row = ["d"] if size > 1 else []
    if reader.groups > 1:
        if reader.axis == 0 or size > 1:
            return "it is a grouped convolution of another form"
        left = f"(g o) {kind} {' '.join(rest)}"
        return Layer(
            reader.parameter, f"{left} -> (g {kind}) o {' '.join(rest)}", {"g": reader.groups}, shape, position
        )
    axes = ["o", *rest]
    axes.insert(reader.axis, joined)
    pattern = f"{' '.join(axes)} -> {kind} {' '.join(['o', *row, *rest])}"
    return Layer(reader.parameter, pattern, sizes, shape, position)
