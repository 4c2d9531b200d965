"""Layouts: the layers of a model in a fixed order, with their neurons numbered; how to select some by hand."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.checks import are_strings, make_tuples, refuse, unfit
from neuronsurgery.digests import digest
from neuronsurgery.errors import checked, counted, listed, nearest
from neuronsurgery.layers import Layer
from neuronsurgery.neurons import Neuron, Neurons, checked_neurons
from neuronsurgery.types import Indices
from neuronsurgery.wrappers import same_names


@dataclass(frozen=True, repr=False)
class Layout:
    """The layers of a model in a fixed order, its neurons numbered 0 to `count` - 1 through all of them.

    Iterating gives its layers; both a layer and a parameter's name may be `in` it.

    Attributes:
        layers: the layers, in the order of `named_parameters()`, one for each parameter.
        aliases: (other name, layer's name) of parameters that several modules share.
        count: the number of neurons M.
        starts: the flat number of each layer's first neuron.

    Raises:
        ValueError: if two layers are of one parameter, or the layers and aliases are something else (lists all).

    Example:
        >>> from torch import nn
        >>> from neuronsurgery import find_layout
        >>> layout = find_layout(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> layout
        Layout: 6 neurons in 2 layers
          0.weight: 4 neurons of 3
          2.weight: 2 neurons of 4
        >>> layout.neuron(5).index, layout["2.weight"] in layout, "2.weight" in layout
        (1, True, True)
    """

    layers: tuple[Layer, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    count: int = field(init=False, compare=False)
    starts: Mapping[Layer, int] = field(init=False, compare=False)
    _by_name: Mapping[str, Layer] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        make_tuples(self, "layers", "aliases")
        for layer in self.layers if isinstance(self.layers, tuple) else ():
            checked(layer, Layer, "a layout is made of layers, not of a {}: write find_layout(model)")
        refuse("a layout", _unfit_fields(self), "Make it with find_layout")
        starts, flat = {}, 0
        for layer in self.layers:
            starts[layer] = flat
            flat += layer.count
        named = {layer.parameter: layer for layer in self.layers}
        if len(named) < len(self.layers):
            twice = sorted({layer.parameter for layer in self.layers if named[layer.parameter] is not layer})
            raise ValueError(f"a layout cuts each parameter in one way only, but has several for {', '.join(twice)}")
        named |= {alias: named[name] for alias, name in self.aliases if name in named}
        for name, value in (("count", flat), ("starts", MappingProxyType(starts)), ("_by_name", named)):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.layers, self.aliases)

    @property
    def digest(self) -> str:
        """A SHA-256 of the layers' names, shapes and cuts: equal for models of one architecture."""
        return digest(json.dumps([layer.identity for layer in self.layers]))

    @property
    def kinds(self) -> dict[str, int]:
        """What its neurons are called, and how many layers have neurons of that kind."""
        kinds = [layer.kind for layer in self.layers]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.starts if isinstance(layer, Layer) else layer in self._by_name

    def __getitem__(self, name: str) -> Layer:
        """Return the layer of a parameter, by any of its names.

        Raises:
            KeyError: if there is none; names the nearest.
        """
        if name not in self._by_name:
            raise KeyError(f"no layer named '{name}'{nearest(str(name), self._by_name)}")
        return self._by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of a layer's parameter."""
        return tuple(self._by_name)

    def neuron(self, flat: int) -> Neuron:
        """Return the neuron of a flat number.

        Raises:
            IndexError: if the number is not in 0..M-1.
        """
        if not 0 <= flat < self.count:
            raise IndexError(f"flat number {flat} is outside 0..{self.count - 1}")
        starts = list(self.starts.values())
        position = int(np.searchsorted(starts, flat, side="right")) - 1
        return Neuron(self.layers[position], int(flat) - starts[position])

    def neurons(self, flat: Iterable[int]) -> Neurons:
        """Return the set of neurons of some flat numbers.

        Raises:
            IndexError: if a number is not in 0..M-1.
        """
        numbers = np.unique(np.fromiter(flat, dtype=np.int64))
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < self.count:
            raise IndexError(f"flat numbers {numbers[0]}..{numbers[-1]} are not all in 0..{self.count - 1}")
        bounds = np.searchsorted(numbers, [*self.starts.values(), self.count]).tolist()
        within = zip(self.starts.items(), bounds, bounds[1:], strict=False)
        return Neurons({layer: (numbers[low:high] - at).tolist() for (layer, at), low, high in within if low < high})

    def flat(self, neurons: Neurons) -> Tensor:
        """Return the flat numbers of some neurons in this layout, int64, in their order.

        Raises:
            ValueError: if a layer of theirs is missing here or is cut otherwise; lists all.
        """
        wrong: list[str] = []
        numbers: list[int] = []
        for layer, indices in checked_neurons(neurons, "a layout").by_layer().items():
            if layer.parameter not in self:
                wrong.append(f"{layer.parameter}: not in the layout{nearest(layer.parameter, self.names)}")
            elif (found := self[layer.parameter]).slicing != layer.slicing:
                wrong.append(
                    f"{layer.parameter}: expected {layer.count} of {layer.row_shape} by {layer.pattern!r}, the layout "
                    f"has {found.count} of {found.row_shape} by {found.pattern!r}"
                )
            else:
                numbers.extend(self.starts[found] + index for index in indices)
        if wrong:
            raise ValueError(
                f"the neurons do not fit the layout, {len(wrong)} mismatched:\n{listed(wrong)}\nThey were made for "
                f"another model or another version of it: select or score them again on this one"
            )
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def __repr__(self) -> str:
        lines = [f"  {layer!r}" for layer in self.layers]
        if len(lines) > 18:
            lines = [*lines[:9], f"  ... and {len(lines) - 17} more", *lines[-8:]]
        said = f"{counted(self.count, 'neuron')} in {counted(len(self), 'layer')}"
        return "\n".join([f"Layout: {said}", *lines])


def _unfit_fields(layout: Layout) -> list[str]:
    layers = isinstance(layout.layers, tuple) and all(isinstance(layer, Layer) for layer in layout.layers)
    aliases, names = layout.aliases, {layer.parameter for layer in layout.layers} if layers else set()
    paired = isinstance(aliases, tuple) and all(are_strings(pair) and len(pair) == 2 for pair in aliases)
    if paired:
        known = dict(aliases)
        paired = len(known) == len(aliases) and names.isdisjoint(known)
    return [
        *unfit("layers", layers, "a tuple of layers", layout.layers),
        *unfit("aliases", paired, "pairs of another name, which is no layer's, and a layer's name", aliases),
    ]


# Selecting by hand


CHOSEN = "select takes a mapping from globs or names to indices, not a {}: write {{'fc.weight': (0, 3)}}"


def select(layout: Layout, chosen: Mapping[str, Indices]) -> Neurons:
    """Return the set of neurons that a mapping names.

    Args:
        layout: the model's layers, see `find_layout`.
        chosen: glob or name of a layer (any of its names) -> indices (non-negative), a slice, a boolean mask (one per
            neuron, or as `Neurons.masks` gives it) or `...` for all. Entries that name one layer twice are united.

    Raises:
        KeyError: if a glob matches nothing; names the nearest layers.
        IndexError: if an index is out of range.
        ValueError: if a mask has another shape.
        TypeError: if the layout is none, what is chosen is no mapping, or indices are of another type.

    Example:
        >>> from neuronsurgery import find_layout
        >>> layout = find_layout(torch.nn.Linear(2, 5))
        >>> select(layout, {"weight": slice(1, 4)})
        3 neurons in 1 layer: weight[1, 2, 3]
        >>> select(layout, select(layout, {"weight": 4}).masks())
        1 neuron in 1 layer: weight[4]
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"select takes a Layout, not a {type(layout).__name__}: write select(find_layout(model), ...)")
    picked: dict[Layer, list[Sequence[int]]] = {}
    for glob, indices in checked(chosen, Mapping, CHOSEN).items():
        matched = dict.fromkeys(layout[name] for name in ([glob] if glob in layout else matching(glob, layout.names)))
        if not matched:
            raise KeyError(f"no layer matches '{glob}'{nearest(glob, layout.names)}")
        for layer in matched:
            picked.setdefault(layer, []).append(_indices(layer, indices))
    # One entry is handed on as it is: all of a layer is a range, which is in order.
    return Neurons({layer: each[0] if len(each) == 1 else chain(*each) for layer, each in picked.items()})


def _indices(layer: Layer, indices: Indices) -> Sequence[int]:
    if indices is ...:
        return range(layer.count)
    if isinstance(indices, slice):
        return range(layer.count)[indices]
    array = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if array.dtype == bool:
        return _masked(layer, array)
    if array.size == 0:
        return ()
    if array.ndim > 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{layer.parameter}: neurons are chosen by integers, a slice, a boolean mask or ..., not by "
            f"{array.dtype} of shape {array.shape}"
        )
    array = np.atleast_1d(array)
    outside = array[(array < 0) | (array >= layer.count)].tolist()
    if outside:
        raise IndexError(f"{layer.parameter} has neurons 0..{layer.count - 1}; out of range: {outside[:10]}")
    return array.tolist()  # type: ignore[no-any-return]


def _masked(layer: Layer, array: np.ndarray) -> Sequence[int]:
    full = tuple(layer.mask(()).shape)
    fits = array.shape in (full, layer.shape)
    if not fits and array.shape == (layer.count,):
        return np.flatnonzero(array).tolist()
    if not fits:
        raise ValueError(
            f"{layer.parameter}: a mask has shape ({layer.count},) or {full}, not {array.shape}: give one entry per "
            f"neuron"
        )
    rows = layer.slices(torch.from_numpy(array).expand(layer.shape)).reshape(layer.count, -1)
    partial = (rows.any(1) & ~rows.all(1)).nonzero().flatten().tolist()
    if partial:
        raise ValueError(f"{layer.parameter}: the mask marks a part of neurons {partial[:10]} only: mark all or none")
    return rows.all(1).nonzero().flatten().tolist()


def matching(glob: str, names: Iterable[str]) -> list[str]:
    """Return the names that a glob matches: the very name alone, where there is one.

    Where nothing matches, its brackets stand for themselves (`blocks[0].*`), as they do in keys of a `ModuleDict`, and
    then it may be a name with the prefixes of wrappers.
    """
    every = list(names)
    if glob in every:
        return [glob]
    globs = (glob, glob.replace("[", "[[]"))
    found = next(filter(None, ([name for name in every if fnmatch.fnmatchcase(name, said)] for said in globs)), [])
    return found or [name for name in same_names([glob], every).values() if name is not None]
