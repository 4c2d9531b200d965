"""Sets of neurons: values with the algebra of sets, whatever layout they came from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.checks import is_integer, refuse
from neuronsurgery.errors import checked, counted, first, inline, listed
from neuronsurgery.layers import Layer

MADE_OF = "Neurons are made of a mapping Layer -> indices, not of a {}: choose them with topk, sample or select"


@dataclass(frozen=True)
class Neuron:
    """One neuron: a layer and an index. Printed with the names of its axes: `o_proj.weight[head 5]`."""

    layer: Layer
    index: int

    @property
    def parameter(self) -> str:
        """The name of the layer's parameter."""
        return self.layer.parameter

    def __str__(self) -> str:
        return f"{self.layer.parameter}[{self.layer.label(self.index)}]"


class Neurons:
    """An immutable set of neurons, which remembers only the layers it touches.

    Equal, with equal hashes, are sets of the same slices of the same parameters, whatever layout they came from.
    `|`, `&` and `-` work across layouts of one model. One parameter may be cut in several ways (heads and rows); then
    `&` and `-` count a neuron as one of another set where that set covers all of its entries.

    Args:
        chosen: layer -> indices of its neurons, in any order. Layers without indices are left out.

    Raises:
        TypeError: if `chosen` is no mapping.
        ValueError: if a key is no layer, an index is no integer or not one of its layer's, or two layers say that one
            parameter has different shapes; lists all.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> layout = find_layout(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)))
        >>> some = select(layout, {"0.weight": (0, 3), "2.*": ...})
        >>> some
        4 neurons in 2 layers: 0.weight[0, 3], 2.weight[0, 1]
        >>> Neuron(layout["0.weight"], 3) in some, len(some - select(layout, {"2.weight": 1}))
        (True, 3)
    """

    __slots__ = ("_chosen", "_hash")
    _chosen: Mapping[Layer, tuple[int, ...]]
    _hash: int

    def __init__(self, chosen: Mapping[Layer, Iterable[int]] | None = None) -> None:
        given = checked({} if chosen is None else chosen, Mapping, MADE_OF)
        ascending = {checked(layer, Layer, MADE_OF): _ascending(indices) for layer, indices in given.items()}
        refuse("a set of neurons", _unfit_indices(ascending), "Choose neurons with select, topk or sample")
        pairs = [(layer, indices) for layer, indices in ascending.items() if indices]
        pairs.sort(key=lambda pair: (pair[0].position, pair[0].parameter, pair[0].slicing))
        object.__setattr__(self, "_chosen", dict(pairs))
        object.__setattr__(self, "_hash", hash(frozenset(pairs)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Neurons are immutable; '{name}' cannot be set. Build another set with select, | or -")

    def __reduce__(self) -> tuple[Any, ...]:
        return Neurons, (self.by_layer(),)

    def __deepcopy__(self, memo: object) -> Neurons:
        return self

    def __iter__(self) -> Iterator[Neuron]:
        return (Neuron(layer, index) for layer, indices in self._chosen.items() for index in indices)

    def __len__(self) -> int:
        return sum(map(len, self._chosen.values()))

    def __contains__(self, neuron: object) -> bool:
        if not isinstance(neuron, Neuron):
            return False
        indices = self._chosen.get(neuron.layer, ())
        at = bisect_left(indices, neuron.index)
        return at < len(indices) and indices[at] == neuron.index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Neurons):
            return NotImplemented
        return self._chosen == other._chosen

    def __hash__(self) -> int:
        return self._hash

    def __or__(self, other: Neurons) -> Neurons:
        if not isinstance(other, Neurons):
            return NotImplemented
        _refuse_other_shapes(self, other)
        layers = {**self._chosen, **other._chosen}
        return Neurons({layer: (*self._chosen.get(layer, ()), *other._chosen.get(layer, ())) for layer in layers})

    def __and__(self, other: Neurons) -> Neurons:
        if not isinstance(other, Neurons):
            return NotImplemented
        _refuse_other_shapes(self, other)
        return _covered(self, other) | _covered(other, self)

    def __sub__(self, other: Neurons) -> Neurons:
        if not isinstance(other, Neurons):
            return NotImplemented
        _refuse_other_shapes(self, other)
        within = _covered(self, other)._chosen
        return Neurons(
            {layer: set(indices).difference(within.get(layer, ())) for layer, indices in self._chosen.items()}
        )

    def where(self, keep: np.ndarray) -> Neurons:
        """Return those neurons whose entry in a boolean array, in the order of iteration, is true."""
        kept, at = {}, 0
        for layer, indices in self._chosen.items():
            kept[layer] = np.array(indices)[keep[at : at + len(indices)]].tolist()
            at += len(indices)
        return Neurons(kept)

    def by_layer(self) -> dict[Layer, tuple[int, ...]]:
        """Return the chosen indices of each touched layer, ascending."""
        return dict(self._chosen)

    def by_parameter(self) -> dict[str, dict[Layer, tuple[int, ...]]]:
        """Return the chosen indices by the name of the parameter, then by layer."""
        found: dict[str, dict[Layer, tuple[int, ...]]] = {}
        for layer, indices in self._chosen.items():
            found.setdefault(layer.parameter, {})[layer] = indices
        return found

    def renamed(self, names: Mapping[str, str] | Callable[[str], str]) -> Neurons:
        """Return the same neurons of layers that are called otherwise, for a wrapper whose names are not understood.

        Draws go by names: a random edit of the renamed neurons is another draw.

        Args:
            names: old name of a parameter -> new name, others staying as they are; or a function of the old name.

        Raises:
            TypeError: if a new name is no string.
            ValueError: if a mapping renames nothing, or two parameters come to one name; lists these.

        Example:
            >>> from neuronsurgery import find_layout, select
            >>> neurons = select(find_layout(torch.nn.Linear(3, 4)), {"weight": (0, 3)})
            >>> neurons.renamed(lambda name: f"backbone.{name}")
            2 neurons in 1 layer: backbone.weight[0, 3]
        """
        if not isinstance(names, Mapping):
            checked(names, Callable, "names are a mapping old -> new or a function old -> new, not a {}")
        old = list(self.by_parameter())
        if isinstance(names, Mapping) and old and not set(names).intersection(old):
            raise ValueError(f"names= renames none of the layers of these neurons, which are {inline(old)}")
        new = {name: names.get(name, name) if isinstance(names, Mapping) else names(name) for name in old}
        wrong = [f"{name} -> {other!r}" for name, other in new.items() if not isinstance(other, str)]
        if wrong:
            raise TypeError(f"a layer is renamed to a string, not {inline(wrong)}")
        collisions = [f"{name} -> {other}" for name, other in new.items() if list(new.values()).count(other) > 1]
        if collisions:
            raise ValueError(f"several layers come to one name: {inline(collisions)}; give each a name of its own")
        return Neurons(
            {
                Layer(new[layer.parameter], layer.pattern, layer.sizes, layer.shape, layer.position): indices
                for layer, indices in self._chosen.items()
            }
        )

    def masks(self) -> dict[str, Tensor]:
        """Return the paper's binary mask of each touched parameter: bool, True where chosen, broadcastable to it."""
        masks: dict[str, Tensor] = {}
        for layer, indices in self._chosen.items():
            mask = layer.mask(indices)
            masks[layer.parameter] = masks[layer.parameter] | mask if layer.parameter in masks else mask
        return masks

    def overlapping(self) -> list[str]:
        """Return the parameters of which two chosen neurons share an entry, which takes two ways to cut them."""
        found = []
        for parameter, layers in self.by_parameter().items():
            if len(layers) > 1:
                times = sum(layer.mask(indices).expand(layer.shape).int() for layer, indices in layers.items())
                found += [parameter] if bool((times > 1).any()) else []  # type: ignore[union-attr]  # a sum of tensors
        return found

    def __repr__(self) -> str:
        shown = []
        for layer, indices in self._chosen.items():
            labels = [layer.label(index) for index in indices[:8]]
            if not layer.has_default_pattern and " " not in layer.kind:  # "head 0, 5", not "head 0, head 5"
                labels[1:] = [label.rpartition(" ")[2] for label in labels[1:]]
            shown.append(f"{layer.parameter}[{', '.join(labels)}{', ...' * (len(indices) > 8)}]")
        said = f"{counted(len(self), 'neuron')} in {counted(len(self._chosen), 'layer')}"
        return said + (": " + ", ".join(first(shown, 12)) if shown else "")


def _ascending(indices: object) -> tuple[int, ...] | None:
    """Return indices in ascending order, each once, or None where these are no integers."""
    given = tuple(indices) if isinstance(indices, Iterable) else (None,)
    if isinstance(indices, range) and indices.step > 0:
        return given
    if not set(map(type, given)) <= {int}:  # by their types: there may be a million
        if not all(is_integer(index) for index in given):
            return None
        given = tuple(map(int, given))
    return tuple(sorted(set(given)))


def _unfit_indices(chosen: Mapping[Any, tuple[int, ...] | None]) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, indices in chosen.items():
        if indices is None:
            yield f"{layer.parameter}: expected integers"
        elif indices and not 0 <= indices[0] <= indices[-1] < layer.count:
            yield f"{layer.parameter}: expected indices in 0..{layer.count - 1}, given {indices[0]}..{indices[-1]}"
        elif shapes.setdefault(layer.parameter, layer.shape) != layer.shape:
            yield f"{layer.parameter}: of shape {shapes[layer.parameter]} in one layer and {layer.shape} in another"


def checked_neurons(neurons: Neurons, taker: str = "an edit") -> Neurons:
    """Return the neurons.

    Raises:
        TypeError: if they are something else; the message begins with who takes them.
    """
    instead = "choose them with topk, top_fraction, sample or select"
    return checked(neurons, Neurons, f"{taker} takes a set of Neurons, not a {{}}: {instead}")


def _refuse_other_shapes(mine: Neurons, theirs: Neurons) -> None:
    shapes = {layer.parameter: layer.shape for layer in mine.by_layer()}
    wrong = [
        f"{layer.parameter}: of shape {shapes[layer.parameter]} against {layer.shape}"
        for layer in theirs.by_layer()
        if shapes.get(layer.parameter, layer.shape) != layer.shape
    ]
    if wrong:
        raise ValueError(
            f"the two sets of neurons come from different models:\n{listed(wrong)}\nSelect or score both on one model"
        )


def _covered(neurons: Neurons, by: Neurons) -> Neurons:
    """Return those neurons all of whose entries another set has."""
    theirs = by.by_parameter()
    within = {}
    for layer, indices in neurons.by_layer().items():
        layers = theirs.get(layer.parameter, {})
        same = set(indices).intersection(layers.get(layer, ()))
        if any(other != layer for other in layers):
            marked = torch.stack([other.mask(chosen).expand(layer.shape) for other, chosen in layers.items()]).any(0)
            same.update(np.array(indices)[layer.covered(marked)[list(indices)].numpy()].tolist())
        within[layer] = same
    return Neurons(within)
