"""The edit that makes units exactly silent: what else must be zero so that a zeroed neuron gives nothing.

A zeroed row leaves its bias, and a normalisation behind it turns even a constant zero into its own shift. Which entries
belong to a unit is not guessed from names: the output of its zeroed row is followed through the captured graph to those
who read it, and is zero there or the reason is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from neuronsurgery.batches import Unpack, by_key
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.discovery import layout_of, refuse_unfit
from neuronsurgery.edits import ZeroOut, zero_out
from neuronsurgery.errors import listed
from neuronsurgery.experts import expert_layers
from neuronsurgery.graph.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    JOINS,
    MOVES,
    NORMS,
    RECURRENT,
    SCALINGS,
    SHAPES,
    SOFTMAXES,
    SUMS,
    WEIGHTED,
    argument,
    operator_name,
)
from neuronsurgery.graph.readers import Reader, Walk
from neuronsurgery.graph.recurrent import Recurrent
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.neurons import Neuron, Neurons, checked_neurons
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import KERNELS, restoring
from neuronsurgery.types import Predict
from neuronsurgery.units import walk


@restoring
def silence(
    neurons: Neurons,
    model: nn.Module,
    batch: Any,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
) -> ZeroOut:
    """Return the edit that makes the outputs of some units exactly zero: their neurons and what belongs to them.

    Whether a unit is silent is looked at where its output is read: by the next layer, by the sum of a residual stream,
    or as the logits. Zeroed with a neuron are

    - the bias entry of its own;
    - the scale and shift entries of a normalisation that reads its output alone, and the entry of any other parameter
      that is added to this channel, through whatever moves entries, pools them or works on each by itself;
    - of a row of a recurrent layer, whichever gate's: the rows and biases of the gate that its hidden unit is made of,
      so that its state stays at zero;
    - of an expert of a fused mixture, its bias.

    A slice of inputs, as `find_units` gives them, needs nothing more where nobody else reads its input.

    Args:
        neurons: rows of the default layout, units from `find_units`, or any slices that are whole rows or columns.
        model: any module that can be captured (see `sweep`); not changed. For experts it need not be.
        batch: one batch of two examples or more, as a loader yields it.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.

    Returns:
        A zero-out; its `neurons` are those given and the entries of 1-D parameters, each of row shape (), or rows that
        were added.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
        TypeError: if `neurons` are no set of neurons, or the model is no module.
        ValueError: if the neurons do not fit the model, or some of the units cannot be made silent by zeros, since
            their output is shifted by a buffer or a number, mixed with others' before a normalisation, or given to
            a function that is not zero at zero; lists them with the reasons.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        >>> batch = (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> _ = model(batch[0])
        >>> silence(select(find_layout(model), {"0.weight": 2}), model, batch)
        zero_out(4 neurons in 4 layers: 0.weight[2], 0.bias[2], 1.weight[2], 1.bias[2])
    """
    checked_neurons(neurons, "silence")
    surveyed = survey(model)
    runner = make_runner(surveyed)
    refuse_unfit(list(neurons.by_layer()), surveyed, runner.parameters, "the neurons do not fit the model")
    every = layout_of(surveyed, runner.parameters, extra="*")
    found, left = _experts(neurons, surveyed, runner, every)
    reasons: dict[str, str] = {}
    if left:
        graph = walk(runner, batch, predict, by_key(unpack, group_key))
        entries = Neurons({layer: indices for layer, indices in left.items() if len(layer.shape) == 1})
        for layer, indices in left.items():
            if len(layer.shape) > 1:
                name = surveyed.first_names([layer.parameter])[layer.parameter]
                unit = _Unit(graph, every, name, layer, indices)
                found |= unit.neurons
                reasons |= {str(Neuron(layer, index)): unit.reason for index in indices if unit.reason}
        reasons |= {
            str(entry): "an entry alone makes no unit: give the row that it belongs to" for entry in entries - found
        }
    if reasons:
        said = listed(f"{name}: {why}" for name, why in reasons.items())
        raise ValueError(
            f"zeros do not make {len(reasons)} units silent:\n{said}\n"
            f"Zero their weights alone with zero_out, or cut them where they are read: find_units says where"
        )
    return zero_out(neurons | found)


@restoring
def beside_layers(layers: Iterable[Layer], model: nn.Module, batch: Any) -> dict[Layer, Neurons]:
    """Return what `silence` zeroes beside the whole of each layer, the layer too; one capture serves all of them.

    A layer that zeros do not make silent is left out.

    Args:
        layers: rows of the default layout.
        model: any module that can be captured (see `sweep`); not changed.
        batch: one batch of two examples or more, as a loader yields it.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
    """
    surveyed = survey(model)
    runner = make_runner(surveyed)
    every, graph = layout_of(surveyed, runner.parameters, extra="*"), walk(runner, batch, None, None)
    names = {layer: surveyed.first_names([layer.parameter])[layer.parameter] for layer in layers}
    units = {layer: _Unit(graph, every, name, layer, range(layer.count)) for layer, name in names.items()}
    return {layer: unit.neurons for layer, unit in units.items() if not unit.reason}


def _experts(
    neurons: Neurons, surveyed: Survey, runner: Runner, every: Layout
) -> tuple[Neurons, dict[Layer, tuple[int, ...]]]:
    """Return what belongs to those of the neurons that are experts or their units, and the other neurons by layer."""
    whole, units = (expert_layers(surveyed, runner, kind)[0] for kind in ("expert", "expert unit"))
    found, left = Neurons(), {}
    for layer, indices in neurons.by_layer().items():
        bias = f"{layer.parameter}_bias"
        if layer in whole and bias in runner.parameters:
            found |= Neurons({every[bias]: indices})
        elif layer not in whole and layer not in units:
            left[layer] = indices
    return found, left


class _Unit:
    """Some units of one layer, followed from their zeroed rows to those who read them.

    Attributes:
        neurons: what must be zero with the layer's own neurons.
        reason: why they are not silent even so, "" where they are.
    """

    def __init__(self, walk: Walk, layout: Layout, name: str, layer: Layer, indices: Sequence[int]) -> None:
        self.neurons = Neurons()
        self.reason = ""
        self._walk, self._graph, self._layout = walk, walk.graph, layout
        self._values = list(walk.values)
        self._mine: dict[fx.Node, Any] = {}
        self._layer, self._indices = layer, indices
        self._zero(name, layer, indices)
        readers = [reader for reader in walk.readers() if reader.parameter == name]
        held = self._graph.parameters[name]
        mine = [node for node in self._graph.nodes if not {*held}.isdisjoint(node.all_input_nodes)]
        recurrent = [node for node in mine if operator_name(node) in RECURRENT]
        other = self._other_use(held, {reader.node for reader in readers} | set(recurrent))
        if other or not held:
            self.reason = f"{other} reads its weight" if other else "the forward pass does not use its weight"
            return
        self._starts = [reader.node for reader in readers]
        for reader in readers:
            self._start(reader)
        for node in recurrent:
            self._start_recurrent(node, held)
        if not self.reason:
            self._follow()

    # Where a unit starts

    def _other_use(self, held: Iterable[fx.Node], known: set[fx.Node]) -> str:
        """Return the operator that reads a parameter in another way than as a layer's weight, "" for none."""
        queue = list(held)
        while queue:
            for user in queue.pop().users:
                if user in known or operator_name(user) in SHAPES:
                    continue
                if operator_name(user) not in ("t", "transpose", "permute", "contiguous", "to", "clone"):
                    return operator_name(user)
                queue.append(user)
        return ""

    def _start(self, reader: Reader) -> None:
        """Mark the channels that some rows make, or look who else reads the input of some columns."""
        rows, columns = (self._chosen(axis, reader.groups) for axis in (1 - reader.axis, reader.axis))
        if rows is not None and (columns is None or self._layer.has_default_pattern):
            self._mark(reader.node, rows, _channel_axis(reader.node))
            position, keyword = (0, "input") if operator_name(reader.node) == "addmm" else (2, "bias")
            self._add(argument(reader.node, position, keyword), self._starts, rows)
            self._run(reader.node)
        elif columns is None:
            self.reason = "it is neither whole rows nor whole columns of its weight"
        elif not self._walk.origin(reader).alone:
            self.reason = "its input is read by others, too"

    def _start_recurrent(self, node: fx.Node, held: Sequence[fx.Node]) -> None:
        """Mark the hidden units of a recurrent layer, whose candidate gate's rows are zeroed."""
        operator, own = operator_name(node), Recurrent.of(node, held)
        if own is None:
            self.reason = f"the state of {operator} is not seen"
            return
        hidden = self._graph.originals[str(self._graph.parameter(own.weights[-1 if own.projected else 1]))].shape[1]
        rows = self._chosen(0)
        if own.projected and own.weights[-1] in held:  # its rows write to what is projected, its columns read the units
            outputs = rows or []
            if rows is None and self._chosen(1) is None:
                self.reason = "it is neither whole rows nor whole columns of its weight"
        elif rows is None:
            self.reason = "it is not whole rows of its weight"
        else:
            units = sorted({row % hidden for row in rows})
            gate = 2 if operator in ("lstm", "gru") else 0
            for weight in own.weights[: len(own.weights) - own.projected]:
                self._add(weight, [node], [gate * hidden + unit for unit in units])
            outputs = [] if own.projected else units
            states = [state for state in pytree.tree_leaves(own.states) if isinstance(state, fx.Node)]
            if any(bool(self._walk.value(state).any()) for state in states):
                self.reason = "its first state is not zero"
        self._run(node)
        for user in node.users if own.is_last and outputs and not self.reason else ():
            if user.args[1] == 0:
                width = self._walk.value(user).shape[-1] // own.directions
                self._mark(user, [own.direction * width + unit for unit in outputs], -1)
                self._run(user)

    def _chosen(self, axis: int, groups: int = 1) -> list[int] | None:
        """Return the channels that the neurons are along an axis of the weight, None if one of them is none."""
        every = torch.arange(self._layer.count)
        numbers = every.double().reshape(-1, *[1] * len(self._layer.row_shape)).expand(-1, *self._layer.row_shape)
        labels = self._layer.put(torch.full(self._layer.shape, -1.0, dtype=torch.float64), every, numbers)
        if axis == 1 and groups > 1:  # whose channels are counted through the groups
            labels = labels.reshape(groups, -1, *labels.shape[1:]).transpose(1, 2).flatten(0, 1)
        labels = labels.movedim(0 if groups > 1 else axis, 0).flatten(1)
        chosen = torch.isin(labels, torch.tensor(self._indices, dtype=torch.float64))
        whole = chosen.all(1) & (labels == labels[:, :1]).all(1)
        return whole.nonzero().flatten().tolist() if bool((whole == chosen.any(1)).all()) else None

    def _mark(self, node: fx.Node, channels: Iterable[int], axis: int) -> None:
        mine = torch.zeros_like(self._walk.value(node), dtype=torch.bool)
        mine.index_fill_(axis, torch.tensor(list(channels), device=mine.device), True)
        self._mine[node] = mine

    # The way to those who read it

    def _follow(self) -> None:
        """Follow the marked entries to those who read them, adding what belongs to them on the way."""
        for node in self._graph.nodes:
            marked = [source for source in node.all_input_nodes if source in self._mine]
            if node in self._mine or not marked or operator_name(node) in SHAPES:
                continue
            mine = self._passed(node, marked)
            if mine is None:
                for source in marked:
                    self._look(source, node)
            else:
                self._run(node)
                self._mine[node] = mine
        if self._graph.output in self._mine:
            self._look(self._graph.output, None)

    def _passed(self, node: fx.Node, marked: Sequence[fx.Node]) -> Any:
        """Return which entries of an operator's value are the units', or None where it reads them."""
        name, value = operator_name(node), self._walk.value(node)
        moving = [source for source in node.all_input_nodes if source in self._walk.moving]
        others = [source for source in moving if source not in marked and isinstance(self._walk.value(source), Tensor)]
        if name in NORMS and not others:
            self._add_norm(node, marked[0])
            return self._mine[marked[0]]
        if name in MOVES:
            return self._moved(node)
        alike = [self._mine[source] for source in marked if _shape(self._mine[source]) == _shape(value)]
        if not alike or len(alike) < len(marked):
            return None
        if name in SUMS and not others:
            if not self._add_shifts(node, marked, alike[0]):
                return None
        elif name not in ELEMENTWISE and name not in SCALINGS:
            return None
        return torch.stack(alike).any(0)

    def _moved(self, node: fx.Node) -> Any:
        """Return where an operator puts the units' entries, or None if it mixes them with others'."""
        mine = self._with(node, lambda source: source.to(torch.float32), 0.0)
        others = self._with(node, lambda source: 1 - source.to(torch.float32), 1.0)
        pairs = list(zip(pytree.tree_leaves(mine), pytree.tree_leaves(others), strict=True))
        if any(bool(((one != 0) & (other != 0)).any()) for one, other in pairs if isinstance(one, Tensor)):
            return None
        return pytree.tree_map(lambda one: one != 0 if isinstance(one, Tensor) else one, mine)

    def _with(self, node: fx.Node, marks: Callable[[Tensor], Tensor], elsewhere: float) -> Any:
        """Return what an operator makes of marks in the place of values."""
        own = list(self._values)
        for source in node.all_input_nodes:
            slot = self._graph.slots[source]
            given = self._mine.get(source)
            if given is not None:
                own[slot] = pytree.tree_map(marks, given)
            elif isinstance(own[slot], Tensor):
                own[slot] = torch.full(own[slot].shape, elsewhere, device=own[slot].device)
        args, kwargs = self._graph.fetches[self._graph.slots[node]](own)
        call: Any = node.target
        with torch.no_grad():
            return call(*args, **kwargs)

    def _look(self, source: fx.Node, reader: fx.Node | None) -> None:
        """Note the reason where the units' entries are not zero for the operator that reads them."""
        values, marks = (pytree.tree_leaves(of) for of in (self._values[self._graph.slots[source]], self._mine[source]))
        loud = any(bool((value[mark] != 0).any()) for value, mark in zip(values, marks, strict=True))
        if loud:
            self.reason = (
                "its output is shifted by what is no entry of a parameter of its own (a buffer, a number, a norm that "
                "others share), or goes through a function that is not zero at zero"
            )
        elif reader is None or operator_name(reader) in WEIGHTED | RECURRENT | SUMS:
            return
        elif operator_name(reader) in SOFTMAXES or self._reads_constant(reader) or self._reaches_shift(reader):
            self.reason = f"{operator_name(reader)} mixes it with others, shifts it, or comes before what does"

    def _reads_constant(self, node: fx.Node) -> bool:
        return any(other not in self._walk.moving for other in node.all_input_nodes)

    def _reaches_shift(self, node: fx.Node) -> bool:
        """Return whether a norm reads what comes of a node, or a constant is added to it, before a layer does."""
        queue, seen = [node], {node}
        while queue:
            current = queue.pop()
            operator = operator_name(current)
            if operator in NORMS or (operator in SUMS and self._reads_constant(current)):
                return True
            if operator not in WEIGHTED and not (operator in JOINS and current is not node):
                new = set(current.users) - seen
                seen |= new
                queue.extend(new)
        return False

    # What is zeroed

    def _zero(self, name: str, layer: Layer, indices: Iterable[int]) -> None:
        index = torch.tensor(list(indices))
        for node in self._graph.parameters[name]:
            slot = self._graph.slots[node]
            weight = self._values[slot].detach()
            zeros = weight.new_zeros((len(index), *layer.row_shape))
            zeroed = layer.put(weight, index.to(weight.device), zeros)
            self._values[slot] = zeroed.requires_grad_(self._values[slot].requires_grad)

    def _add(self, node: Any, readers: Collection[fx.Node], channels: Sequence[int]) -> None:
        """Zero some entries (or rows) of what operators are given, if it is a parameter's and nobody else's."""
        labels = self._walk.entries(node, readers) if isinstance(node, fx.Node) else None
        if labels is not None and channels:
            self._zero_entries(node, labels[channels])

    def _zero_entries(self, node: fx.Node, rows: Tensor) -> None:
        """Zero some rows of the parameter that a node comes of, and what is made of it on the way."""
        start, *passed = self._walk.back(node)
        name = str(self._graph.parameter(start))
        layer, chosen = self._layout[name], sorted(set(rows.long().flatten().tolist()))
        wide = [axis for axis, size in enumerate(layer.shape) if size > 1]
        if len(wide) == 1 and wide[0] > 0:  # a shift of shape (1, channels, 1, 1)
            names = [f"a{axis}" for axis in range(len(layer.shape))]
            own = [names.pop(wide[0]), *names]
            left = " ".join(f"a{axis}" for axis in range(len(layer.shape)))
            layer = Layer(name, f"{left} -> {' '.join(own)}", {}, layer.shape, layer.position)
        self.neurons |= Neurons({layer: chosen})
        self._zero(name, layer, chosen)
        for moved in passed:
            self._run(moved)

    def _add_norm(self, node: fx.Node, source: fx.Node) -> None:
        """Zero the scale and shift of a norm that treats the units entry for entry, if nobody else is given them."""
        operator = operator_name(node)
        at_scale, at_shift = NORMS[operator]
        affine = [argument(node, at_scale, "weight"), None if at_shift is None else argument(node, at_shift, "bias")]
        mine, shape = self._mine[source], node.args[1]
        if operator in ("layer_norm", "rms_norm") and len(shape) > 1:  # type: ignore[arg-type]
            return
        channels = _whole(mine, mine.dim() - 1 if operator in ("layer_norm", "rms_norm") else 1)
        given = [entry for entry in affine if isinstance(entry, fx.Node)]
        if channels is None or affine[0] is None or any(self._walk.entries(entry, [node]) is None for entry in given):
            return
        for entry in given:
            self._add(entry, [node], channels)

    def _add_shifts(self, node: fx.Node, marked: Sequence[fx.Node], mine: Tensor) -> bool:
        """Zero what a sum adds to the units alone; return False if it adds a table, which is another writer."""
        for other in node.all_input_nodes:
            start = self._walk.back(other)[0]
            if other in marked or self._graph.parameter(start) is None:
                continue
            if sum(size > 1 for size in self._values[self._graph.slots[start]].shape) > 1:
                return False
            labels = self._walk.entries(other, [node])
            if labels is not None and labels.numel() > 1:
                placed = labels.expand(mine.shape)
                own, others = placed[mine], placed[~mine]
                if not torch.isin(own, others).any():
                    self._zero_entries(other, own)
        return True

    def _run(self, node: fx.Node) -> None:
        """Compute an operator anew."""
        slot = self._graph.slots[node]
        args, kwargs = self._graph.fetches[slot](self._values)
        call: Any = node.target
        with KERNELS.steady(), torch.no_grad():
            self._values[slot] = call(*args, **kwargs)


def _channel_axis(node: fx.Node) -> int:
    return 1 if operator_name(node) in CONVOLUTIONS else -1


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _whole(cut: Tensor, axis: int) -> list[int] | None:
    """Return the indices along an axis at which every entry is cut, None if some are cut in part."""
    rows = cut.movedim(axis, 0).reshape(cut.shape[axis], -1)
    whole = rows.all(1)
    return whole.nonzero().flatten().tolist() if bool((whole == rows.any(1)).all()) else None
