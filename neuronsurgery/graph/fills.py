"""Fills: the output of a layer under an edit that zeroes its channels, without running the layer.

Where a row of a weight is zero, the channel that it makes is the entry of the bias, or 0: the output is that of the
unedited layer with one channel filled. That is so for finite inputs, and as long as the operator adds its products up
from 0.0 (from the first product it may come to -0.0). So it is seen before it is believed: `Fills` compares a fill with
the operator itself, bit for bit, and takes no fill where an input could overflow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from neuronsurgery.graph.operators import ACTIVATIONS, CONVOLUTIONS, argument, convolution_form, operator_name
from neuronsurgery.graph.replay import Graph, Instruction, as_parameter, execute
from neuronsurgery.graph.writes import OnCopy
from neuronsurgery.plans import Edited
from neuronsurgery.precision import same_bits

CLIPS = {"relu", "relu6", "hardtanh"}
"""Activations that choose among numbers and compute none, so that they give the same bits for one entry as for many."""


class Fill(NamedTuple):
    """A layer that need not be run where rows of its weight are zero.

    Attributes:
        slots: the layer's operator, and those that follow and keep channels apart: the value of the last is filled.
        source: the slot of the activation that the layer reads.
        weight: the first name of its weight.
        shift: the slot of its bias; None where it has none.
        edited: whether the bias is edited, too.
        axis: the axis of the channels, counted from the end.
    """

    slots: tuple[int, ...]
    source: int
    weight: str
    shift: int | None
    edited: bool
    axis: int

    @property
    def end(self) -> int:
        """The slot of the value that is filled."""
        return self.slots[-1]


class _Roles(NamedTuple):
    """Which argument of an operator is what; the axis and groups of its weight's rows; the axis of its channels."""

    activation: Any
    weight: Any
    shift: Any
    cut: tuple[int, int]
    axis: int


# Which layers


def find_fill(
    graph: Graph, slot: int, names: Collection[str], zeroed: Collection[tuple[str, tuple[int, int]]], needed: set[int]
) -> Fill | None:
    """Return how an operator can be left out under an edit, or None where it cannot.

    Args:
        graph: the graph.
        slot: an operator that reads nothing that the edit reaches but parameters.
        names: the edited parameters.
        zeroed: those that have nothing but rows set to zero, and how these are cut.
        needed: slots whose values somebody else needs.
    """
    node = graph.nodes[slot]
    roles = _roles(graph, node)
    if roles is None or not isinstance(roles.activation, fx.Node) or not isinstance(roles.weight, fx.Node):
        return None
    weight = graph.parameter(roles.weight)
    # The only use of the weight, whose edited values nobody else needs.
    alone = weight is not None and len(graph.parameters[weight]) == 1 and len(roles.weight.users) == 1
    if weight is None or not alone or (weight, roles.cut) not in zeroed:
        return None
    reached = {graph.slots[own] for name in names for own in graph.parameters[name]}
    source, shift = graph.slots[roles.activation], None if roles.shift is None else graph.slots[roles.shift]
    if source in reached or roles.shift is roles.weight or not (shift is None or roles.shift in graph.constants):
        return None
    edited = shift in reached
    slots = _followed(graph, node, reached, needed, clips=edited)
    return Fill(slots, source, weight, shift, edited, roles.axis)


def _roles(graph: Graph, node: fx.Node) -> _Roles | None:
    if node.op != "call_function" or isinstance(node.target, OnCopy):
        return None
    name = operator_name(node)
    first, second, third = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    if name == "linear":
        return _Roles(first, second, third, (0, 1), -1)
    if name == "addmm" and not node.kwargs and len(node.args) == 3:
        return _Roles(second, third, first, (1, 1), -1)
    if name in ("mm", "matmul") and _dims(graph, second) == 2:
        return _Roles(first, second, None, (1, 1), -1)
    if name in CONVOLUTIONS:
        turned, groups = convolution_form(node)
        return _Roles(first, second, third, (1, groups) if turned else (0, 1), 1 - _dims(graph, second))
    if name == "batch_norm" and argument(node, 5, "training") is False:
        return _Roles(first, second, third, (0, 1), 1 - _dims(graph, first))
    return None


def _dims(graph: Graph, node: Any) -> int:
    shape = graph.shape(node) if isinstance(node, fx.Node) else None
    return 0 if shape is None else len(shape)


def _followed(graph: Graph, node: fx.Node, reached: set[int], needed: set[int], *, clips: bool) -> tuple[int, ...]:
    """Return the slots of an operator and of those that follow, each the only reader of the last, channel by channel.

    Args:
        graph: the graph.
        node: the operator.
        reached: the placeholders of the edited parameters.
        needed: slots whose values somebody else needs.
        clips: whether an operator that computes may not follow: values that were never seen come to it.
    """
    slots = [graph.slots[node]]
    while node is not graph.output and len(node.users) == 1 and slots[-1] not in needed:
        (after,) = node.users
        name = operator_name(after)
        norm = name == "batch_norm" and argument(after, 5, "training") is False
        others = [own for own in after.all_input_nodes if own is not node]
        if after.op != "call_function" or isinstance(after.target, OnCopy) or after.args[:1] != (node,):
            break
        if not (name in CLIPS or (not clips and (norm or name in ACTIVATIONS))):
            break
        if node in after.args[1:] or any(own not in graph.constants or graph.slots[own] in reached for own in others):
            break
        node = after
        slots.append(graph.slots[node])
    return tuple(slots)


# Whether they may be left out, and what comes out


class Fills:
    """Which fills were seen to be right, for inputs of one signature.

    The first time a layer is filled it is run as well, as it was edited, and with all of its rows zero on inputs none
    of which is positive. If any bit differs, it is run from then on.
    """

    def __init__(self) -> None:
        # What every channel comes to without weights, shape (channels,); None where it is not that.
        self._known: dict[Fill, Tensor | None] = {}

    def taken(
        self, graph: Graph, fill: Fill, before: Sequence[Any], own: list[Any], edited: Edited, calm: dict[int, bool]
    ) -> bool:
        """Return whether a layer was filled; then its value is in its slot, and else nothing was done.

        Args:
            graph: the graph.
            fill: the layer.
            before: the values without the edit, by slot.
            own: those of the edited run so far, with all edited parameters but the weights of fills.
            edited: the edit.
            calm: for each slot that was looked at, whether its value is one that nothing overflows on.
        """
        with torch.inference_mode(False), torch.no_grad():
            if fill.source not in calm:
                calm[fill.source] = _is_calm(before[fill.source])
            if not calm[fill.source]:
                return False
            if fill in self._known:
                filled = self._filled(graph, fill, before, own, edited)
            else:
                filled = self._checked(graph, fill, before, own, edited)
        if filled is None:
            return False
        own[fill.end] = filled
        return True

    def _filled(self, graph: Graph, fill: Fill, before: Sequence[Any], own: list[Any], edited: Edited) -> Tensor | None:
        known, rows = self._known[fill], edited.zeroed[fill.weight].rows
        if known is not None and fill.edited:
            assert fill.shift is not None  # it is edited
            known = _clipped(graph, fill, _changed_only(before[fill.shift], own[fill.shift], rows), known)
        if known is None:
            return None
        filled: Tensor = before[fill.end].clone()
        channels = filled.movedim(fill.axis, 0)
        for row in rows:
            channels[row].copy_(known[row])
        return filled

    def _checked(
        self, graph: Graph, fill: Fill, before: Sequence[Any], own: list[Any], edited: Edited
    ) -> Tensor | None:
        self._known[fill] = _constants(graph, fill, before)
        filled = self._filled(graph, fill, before, own, edited)
        if filled is None:
            return None
        ordinary = _run(graph, fill, own, edited[fill.weight])
        if same_bits(filled, ordinary) and filled.stride() == ordinary.stride():
            return filled
        self._known[fill] = None
        return None


def _is_calm(value: Any) -> bool:
    """Return whether all entries of an activation are finite, and so small that no sum or product of some overflows."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return False
    bound = torch.finfo(value.dtype).max ** 0.75
    least, largest = torch.aminmax(value)  # of a NaN both are NaN
    return bool(least > -bound) and bool(largest < bound)


def _constants(graph: Graph, fill: Fill, before: Sequence[Any]) -> Tensor | None:
    """Return what each channel comes to without weights, whatever the input; None where it is not one number each."""
    own = list(before)
    own[fill.source] = -before[fill.source].abs()
    original = graph.originals[fill.weight]
    nothing = torch.zeros_like(original)
    layer = _run(graph, fill._replace(slots=fill.slots[:1]), own, nothing)
    # -0.0 stands only until something is added to it, which depends on the input.
    if fill.shift is not None and not _is_plain(before[fill.shift]):
        return None
    channels = _lines(_run(graph, fill, own, nothing), fill.axis)
    constants = channels[:, 0].clone()
    if not _is_plain(_lines(layer, fill.axis)) or not bool(constants.isfinite().all()):
        return None
    return constants if same_bits(channels, constants[:, None].expand_as(channels)) else None


def _run(graph: Graph, fill: Fill, values: Sequence[Any], weight: Tensor) -> Tensor:
    """Return the value that is to be filled, by running its operators with another weight."""
    own = list(values)
    (place,) = graph.parameters[fill.weight]
    own[graph.slots[place]] = as_parameter(weight, graph.originals[fill.weight])
    execute(graph, [Instruction(slot, ()) for slot in fill.slots], own)
    result: Tensor = own[fill.end]
    return result


def _lines(value: Tensor, axis: int) -> Tensor:
    channels = value.movedim(axis, 0)
    return channels.reshape(len(channels), -1)


def _is_plain(values: Tensor) -> bool:
    """Return whether all numbers are finite, and none is -0.0."""
    return bool((values.isfinite() & ~((values == 0) & values.signbit())).all())


def _changed_only(before: Tensor, after: Tensor, rows: Sequence[int]) -> Tensor | None:
    """Return an edited bias where only some of its entries were changed, to plain numbers; else None."""
    kept = after.detach().clone()
    kept[list(rows)] = before.detach()[list(rows)]
    return after.detach() if same_bits(kept, before) and _is_plain(after) else None


def _clipped(graph: Graph, fill: Fill, shift: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what the operators behind a layer, none of which computes, make of its bias."""
    if shift is None:
        return None
    own: list[Any] = [None] * len(graph.nodes)
    own[fill.slots[0]] = shift.to(like.dtype)
    execute(graph, [Instruction(slot, ()) for slot in fill.slots[1:]], own)
    clipped: Tensor = own[fill.end]
    return clipped
