"""What else must be zero for a zeroed neuron to be silent: its bias entry, and the norm that reads it alone.

A zeroed weight row leaves the bias, and a normalisation behind it turns even a constant zero into its own shift. Which
entries belong to a neuron is read off the captured graph of the forward pass, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from neuronsurgery.batches import Unpack, move, unpack_batch
from neuronsurgery.copies import make_runner
from neuronsurgery.discovery import layout_of, refuse_unfit
from neuronsurgery.errors import checked_function, inline, warn
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import captured
from neuronsurgery.graph.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    JOINS,
    NORMS,
    SCALINGS,
    SUMS,
    WEIGHTED,
    argument,
    operator_name,
)
from neuronsurgery.graph.replay import Graph
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.neurons import Neuron, Neurons, checked_neurons
from neuronsurgery.surveys import survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Predict


@restoring
def coupled(
    neurons: Neurons,
    model: nn.Module,
    batch: Any,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
) -> Neurons:
    """Return the neurons and whatever must be zeroed with them for their units to be silent.

    Added are the neuron's own bias entry, the scale and shift entries of an affine normalisation that reads this output
    and nothing else, channel for channel, perhaps through element-wise operators and dropout, and the entry of any
    other parameter that is added to this channel. Zeroing the result makes the normalised (or biased) output of each
    unit exactly zero. Where the output is first added to something (a residual), its channels are mixed before a
    normalisation, or it is shifted by a buffer or a number (a frozen norm), the unit stays loud, which is warned of.

    Args:
        neurons: the neurons, as `topk` or `select` give them.
        model: any module that can be captured (see `sweep`); not changed.
        batch: one batch of two examples or more, as a loader yields it.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.

    Returns:
        The widened set; it has entries of 1-D parameters, each a neuron of row shape ().

    Warns:
        UserWarning: once, listing the neurons whose unit will not be silent.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
        TypeError: if `neurons` are no set of neurons, or the model is no module.
        ValueError: if the neurons do not fit the model, or are no output channels but cut by a pattern of one's own.

    Example:
        >>> import torch
        >>> from neuronsurgery import find_layout, select
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        >>> batch = (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> _ = model(batch[0])
        >>> coupled(select(find_layout(model), {"0.weight": 2}), model, batch)
        4 neurons in 4 layers: 0.weight[2], 0.bias[2], 1.weight[2], 1.bias[2]
    """
    checked_neurons(neurons, "coupled")
    surveyed = survey(model)
    runner = make_runner(surveyed)
    unpacked = move(unpack_batch(batch, checked_function(unpack, "unpack")), runner.device)
    _refuse_other_patterns(neurons)
    graph = captured(runner, unpacked, predict or default_predict)
    refuse_unfit(list(neurons.by_layer()), surveyed, runner.parameters, "the neurons do not fit the model")
    found = _Found(graph, layout_of(surveyed, runner.parameters, extra="*"))
    names = surveyed.first_names(layer.parameter for layer in neurons.by_layer())
    for layer, indices in neurons.by_layer().items():
        found.couple(names[layer.parameter], layer, indices)
    if found.standing:
        warn(
            f"the units of {inline(found.standing, 8)} are joined with others before anything normalises them, or "
            f"shifted by what is no entry of a parameter of their own (a buffer, a number): they will not be silent. "
            f"What else belongs to them was added"
        )
    return neurons | found.neurons


def _refuse_other_patterns(neurons: Neurons) -> None:
    other = [layer for layer in neurons.by_layer() if not layer.has_default_pattern]
    if other:
        raise ValueError(
            f"what belongs to a neuron is known of output channels only, not of {inline(map(repr, other))}: select "
            f"rows of the default layout"
        )


class _Norm(NamedTuple):
    """The affine entries of a normalisation, or of a shift alone; None where it has none."""

    scale: fx.Node | None
    shift: fx.Node | None


class _Found:
    """What has been found to belong to some neurons, and those whose unit is left standing."""

    def __init__(self, graph: Graph, layout: Layout) -> None:
        self.graph = graph
        self.layout = layout
        self.moving = _depending(graph)
        self.neurons = Neurons()
        self.standing: list[str] = []

    def couple(self, name: str, layer: Layer, indices: tuple[int, ...]) -> None:
        """Add what belongs to the chosen neurons of one layer."""
        silent = True
        for node in (user for held in self.graph.parameters[name] for user in held.users):
            bias, channel = _unit(node, self.graph.parameters[name])
            if channel is None:
                silent = False
                continue
            found = [_Norm(None, bias), *self._followers(node, channel)]
            for norm in found:
                silent &= norm is not None and self._is_parameter(norm.scale) and self._is_parameter(norm.shift)
            for entry in (entry for norm in found if norm is not None for entry in norm if self._is_parameter(entry)):
                self._add(entry, indices)
        if not silent:
            self.standing += [str(Neuron(layer, index)) for index in indices]

    def _is_parameter(self, node: fx.Node | None) -> bool:
        """Return whether an entry can be zeroed, or is not there."""
        return node is None or self.graph.parameter(node) is not None

    def _followers(self, node: fx.Node, channel: int) -> Iterator[_Norm | None]:
        """Yield what else belongs to a unit's output, and None where it is joined with others, or shifted for good."""
        for user in node.users:
            operator = operator_name(user)
            others = [other for other in user.all_input_nodes if other is not node]
            constant = bool(others) and all(other not in self.moving for other in others)
            if operator in NORMS:
                yield _affine(user, node, channel)
            elif operator in WEIGHTED or operator == "sym_size":
                continue  # the next layer: what comes after reads other units
            elif operator in ("permute", "transpose"):
                yield from self._followers(user, _moved(user, channel))
            elif (operator in ELEMENTWISE and not others) or (
                operator in SCALINGS and user.args[0] is node and constant
            ):
                yield from self._followers(user, channel)
            elif operator in SUMS and constant:
                shift = _shift(others[0], node, channel)
                yield None if shift is None else _Norm(None, shift)
                if shift is not None:
                    yield from self._followers(user, channel)
            elif operator in SUMS and not others and any(isinstance(arg, int | float) and arg for arg in user.args):
                yield None  # by a number
            elif (operator in JOINS and others) or constant or self._reaches_shift(user):
                yield None

    def _reaches_shift(self, node: fx.Node) -> bool:
        """Return whether a norm reads what comes of a node, or a constant is added to it, before a layer does."""
        queue, seen = [node], {node}
        while queue:
            current = queue.pop()
            operator = operator_name(current)
            constant = any(other not in self.moving for other in current.all_input_nodes)
            if operator in NORMS or (operator in SUMS and constant):
                return True
            if operator not in WEIGHTED:
                new = set(current.users) - seen
                seen |= new
                queue.extend(new)
        return False

    def _add(self, node: fx.Node | None, indices: tuple[int, ...]) -> None:
        name = None if node is None else self.graph.parameter(node)
        if name is not None:
            self.neurons |= Neurons({self.layout[name]: indices})


def _depending(graph: Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the inputs."""
    moving = set(graph.inputs)
    for node in graph.nodes:
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return moving


def _dims(node: fx.Node) -> int:
    return len(Graph.shape(node) or ())


def _unit(node: fx.Node, held: tuple[fx.Node, ...]) -> tuple[fx.Node | None, int | None]:
    """Return (bias, channel axis) of an operator that reads a weight as its weight; (None, None) for any other."""
    operator = operator_name(node)
    if operator in CONVOLUTIONS and node.args[1] in held:
        return _node(argument(node, 2, "bias")), 1
    if operator == "linear" and node.args[1] in held:
        return _node(argument(node, 2, "bias")), _dims(node) - 1
    if operator == "addmm" and node.args[2] in held:
        return _node(node.args[0]), _dims(node) - 1
    return None, None


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _shift(other: fx.Node, source: fx.Node, channel: int) -> fx.Node | None:
    """Return the parameter whose entries are added channel by channel, reshaped perhaps; None for anything else."""
    shape, dims = Graph.shape(other) or (), _dims(source)
    placed = (1,) * (dims - len(shape)) + tuple(shape)
    size = (Graph.shape(source) or ())[channel]
    fits = all(entry == (size if axis == channel else 1) for axis, entry in enumerate(placed))
    while operator_name(other) in ("reshape", "view", "unsqueeze") and len(other.users) == 1:
        other = other.all_input_nodes[0]
    return other if fits and _dims(other) == 1 and len(other.users) == 1 and other.op == "placeholder" else None


def _moved(node: fx.Node, channel: int) -> int:
    """Return where a permutation puts an axis."""
    dims = _dims(node)
    if operator_name(node) == "permute":
        order: Any = node.args[1]
        return [axis % dims for axis in order].index(channel)
    axes: Any = node.args[1:3]
    first, second = (axis % dims for axis in axes)
    moved: int = {first: second, second: first}.get(channel, channel)
    return moved


def _affine(norm: fx.Node, source: fx.Node, channel: int) -> _Norm | None:
    """Return the affine entries of a norm if it treats axis `channel` of `source` entry for entry, else None."""
    operator = operator_name(norm)
    at_scale, at_shift = NORMS[operator]
    scale = _node(argument(norm, at_scale, "weight"))
    shift = None if at_shift is None else _node(argument(norm, at_shift, "bias"))
    if operator in ("layer_norm", "rms_norm"):
        shape: Any = norm.args[1]
        fits = len(shape) == 1 and channel == _dims(source) - 1
    else:
        fits = channel == 1
    # A norm that is used twice would silence this unit's neighbour, too.
    alone = all(len(node.users) == 1 for node in (scale, shift) if node is not None)
    return _Norm(scale, shift) if fits and alone and scale is not None else None
