"""What a neuron is: one slice of a parameter along its output axis; sets of them; where to find them in a model.

A layer is one parameter. A convolution of weight 256x256x3x3 has 256 neurons of 256x3x3, a linear layer (out, in) has
`out` neurons of `in`. Everything else in the library sees a weight only through `Layer.rows`, neurons first.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list

from neuronsurgery.structure import NamedTensor, bare, named_tensors, plain, refuse_unsupported

Where: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module, Tensor], bool]
"""A glob, several globs, or a predicate (name, module, parameter) -> bool."""

Indices: TypeAlias = int | Sequence[int] | slice | Tensor | np.ndarray | EllipsisType
"""Which neurons of a layer: one or more indices, a slice, a boolean mask, or ... for all."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NOT_A_LAYER = ("*position_bias_table", "pos_embed*", "position*", "*token")
"""Own parameters of custom modules that have two dimensions but are tables or learnt inputs, by their last name."""


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron: the name of a parameter and an index along its output axis."""

    parameter: str
    index: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.index}]"


@dataclass(frozen=True)
class Layer:
    """One parameter as a stack of neurons.

    Attributes:
        parameter: its name in the bare model.
        axis: the output axis.
        count: the number of neurons.
        row_shape: the shape of one neuron.
        groups: the groups of a transposed convolution, whose output channels are (group, slice of axis 1); else 1.
    """

    parameter: str
    axis: int
    count: int
    row_shape: tuple[int, ...]
    groups: int = 1

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.row_shape)) or "scalar"
        return f"{self.parameter}: {self.count} neurons of {shape}"

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight with its neurons first, shape (count, *row_shape); a view unless `groups` > 1."""
        if self.groups > 1:
            return rearrange(weight, "(g i) o ... -> (g o) i ...", g=self.groups)
        return weight.movedim(self.axis, 0)

    def weight(self, rows: Tensor) -> Tensor:
        """Return the weight whose neurons are `rows`: the inverse of `Layer.rows`."""
        if self.groups > 1:
            return rearrange(rows, "(g o) i ... -> (g i) o ...", g=self.groups)
        return rows.movedim(0, self.axis)

    def mask(self, indices: Sequence[int]) -> Tensor:
        """Return the paper's binary mask: True at `indices`, bool, broadcastable to the parameter."""
        rows = torch.zeros(self.count, dtype=torch.bool, device="cpu")
        rows[list(indices)] = True
        if self.groups > 1:
            inner = (self.row_shape[0], *[1] * (len(self.row_shape) - 1))
            return self.weight(rows.reshape(-1, *[1] * len(inner)).expand(-1, *inner))
        return self.weight(rows.reshape(-1, *[1] * len(self.row_shape)))


@dataclass(frozen=True)
class Layout:
    """The layers of a model in a fixed order, its neurons numbered 0 to `count` - 1 through all of them.

    Attributes:
        layers: the layers, in the order of `named_parameters()`.
        aliases: (other name, layer's name) of parameters that several modules share.

    Example:
        >>> layout = find_layout(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> layout
        Layout: 6 neurons in 2 layers
          0.weight: 4 neurons of 3
          2.weight: 2 neurons of 4
        >>> layout.neuron(5)
        Neuron(parameter='2.weight', index=1)
    """

    layers: tuple[Layer, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def count(self) -> int:
        """The number of neurons M."""
        return sum(layer.count for layer in self.layers)

    @functools.cached_property
    def starts(self) -> dict[str, int]:
        """The flat number of each layer's first neuron."""
        starts, flat = {}, 0
        for layer in self.layers:
            starts[layer.parameter] = flat
            flat += layer.count
        return starts

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 of the layers' names and shapes: equal for models of one architecture."""
        said = [[layer.parameter, layer.axis, layer.count, layer.row_shape, layer.groups] for layer in self.layers]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @functools.cached_property
    def _by_name(self) -> dict[str, Layer]:
        named = {layer.parameter: layer for layer in self.layers}
        return named | {alias: named[name] for alias, name in self.aliases if name in named}

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Layer:
        if name not in self._by_name:
            raise KeyError(f"no layer named '{name}'{nearest(name, self._by_name)}")
        return self._by_name[name]

    def neuron(self, flat: int) -> Neuron:
        """Return the neuron of a flat number.

        Raises:
            IndexError: if the number is not in 0..M-1.
        """
        if not 0 <= flat < self.count:
            raise IndexError(f"flat number {flat} is outside 0..{self.count - 1}")
        position = int(np.searchsorted(list(self.starts.values()), flat, side="right")) - 1
        layer = self.layers[position]
        return Neuron(layer.parameter, int(flat) - self.starts[layer.parameter])

    def neurons(self, flat: Iterable[int]) -> Neurons:
        """Return the set of neurons of some flat numbers.

        Raises:
            IndexError: if a number is not in 0..M-1.
        """
        numbers = np.unique(np.fromiter(flat, dtype=np.int64))
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < self.count:
            raise IndexError(f"flat numbers {numbers[0]}..{numbers[-1]} are not all in 0..{self.count - 1}")
        chosen = []
        for layer in self.layers:
            start = self.starts[layer.parameter]
            low, high = np.searchsorted(numbers, (start, start + layer.count))
            if high > low:
                chosen.append(LayerNeurons(layer, tuple((numbers[low:high] - start).tolist()), start))
        return Neurons(tuple(chosen))

    def flat(self, neurons: Neurons) -> Tensor:
        """Return the flat numbers of some neurons in this layout, int64, in their order.

        Raises:
            ValueError: if a layer of theirs is missing here or has another shape; lists all.
        """
        refuse_misfit(neurons.parts, self)
        numbers = [
            self.starts[self[part.layer.parameter].parameter] + index
            for part in neurons.parts
            for index in part.indices
        ]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def __repr__(self) -> str:
        lines = [f"  {layer!r}" for layer in self.layers]
        if len(lines) > 18:
            lines = [*lines[:9], f"  ... {len(lines) - 17} more ...", *lines[-8:]]
        return "\n".join([f"Layout: {_number(self.count, 'neuron')} in {_number(len(self), 'layer')}", *lines])


@dataclass(frozen=True)
class LayerNeurons:
    """The chosen neurons of one layer, their indices ascending, and where it stood in the layout they are from."""

    layer: Layer
    indices: tuple[int, ...]
    start: int = 0


class Neurons:
    """An immutable set of neurons, which remembers only the layers it touches.

    Equal, with equal hashes, are sets of the same indices of the same layers, whatever layout they came from.
    `|`, `&` and `-` work across layouts of one model.

    Attributes:
        parts: the chosen neurons, layer by layer, in the order of the layout.

    Example:
        >>> layout = find_layout(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> some = select(layout, {"0.weight": (0, 3), "2.*": ...})
        >>> some
        4 neurons in 2 layers: 0.weight[0, 3], 2.weight[0, 1]
        >>> Neuron("0.weight", 3) in some, len(some - select(layout, {"2.weight": 1}))
        (True, 3)
    """

    __slots__ = ("_hash", "parts")
    parts: tuple[LayerNeurons, ...]
    _hash: int

    def __init__(self, parts: Iterable[LayerNeurons] = ()) -> None:
        kept = sorted((part for part in parts if part.indices), key=lambda part: (part.start, part.layer.parameter))
        object.__setattr__(self, "parts", tuple(kept))
        object.__setattr__(self, "_hash", hash(frozenset((part.layer, part.indices) for part in kept)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Neurons are immutable; '{name}' cannot be set. Build another set with select, | or -")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Neurons, (self.parts,))

    def __deepcopy__(self, memo: object) -> Neurons:
        return self

    def __iter__(self) -> Iterator[Neuron]:
        return (Neuron(part.layer.parameter, index) for part in self.parts for index in part.indices)

    def __len__(self) -> int:
        return sum(len(part.indices) for part in self.parts)

    def __contains__(self, neuron: object) -> bool:
        return isinstance(neuron, Neuron) and any(
            neuron.parameter == part.layer.parameter and neuron.index in part.indices for part in self.parts
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Neurons):
            return NotImplemented
        return {(p.layer, p.indices) for p in self.parts} == {(p.layer, p.indices) for p in other.parts}

    def __hash__(self) -> int:
        return self._hash

    def __or__(self, other: Neurons) -> Neurons:
        return self._combine(other, set.union)

    def __and__(self, other: Neurons) -> Neurons:
        return self._combine(other, set.intersection)

    def __sub__(self, other: Neurons) -> Neurons:
        return self._combine(other, set.difference)

    def _combine(self, other: Neurons, operation: Callable[[set[int], set[int]], set[int]]) -> Neurons:
        if not isinstance(other, Neurons):
            return NotImplemented
        mine = {part.layer.parameter: part for part in self.parts}
        theirs = {part.layer.parameter: part for part in other.parts}
        wrong = [
            f"  {mine[name].layer!r} (axis {mine[name].layer.axis}) against {theirs[name].layer!r} "
            f"(axis {theirs[name].layer.axis})"
            for name in mine
            if name in theirs and mine[name].layer != theirs[name].layer
        ]
        if wrong:
            raise ValueError("the two sets of neurons come from different models:\n" + "\n".join(wrong))
        combined = []
        for name, part in {**theirs, **mine}.items():
            left = set(mine[name].indices) if name in mine else set()
            right = set(theirs[name].indices) if name in theirs else set()
            combined.append(LayerNeurons(part.layer, tuple(sorted(operation(left, right))), part.start))
        return Neurons(combined)

    def where(self, keep: np.ndarray) -> Neurons:
        """Return those neurons whose entry in a boolean array, in the order of iteration, is true."""
        kept, at = [], 0
        for part in self.parts:
            indices = np.array(part.indices)[keep[at : at + len(part.indices)]]
            kept.append(LayerNeurons(part.layer, tuple(indices.tolist()), part.start))
            at += len(part.indices)
        return Neurons(kept)

    def by_layer(self) -> dict[str, tuple[int, ...]]:
        """Return the chosen indices of each touched layer."""
        return {part.layer.parameter: part.indices for part in self.parts}

    def masks(self) -> dict[str, Tensor]:
        """Return the paper's binary mask of each touched layer: bool, True where chosen, broadcastable to it."""
        return {part.layer.parameter: part.layer.mask(part.indices) for part in self.parts}

    def __repr__(self) -> str:
        shown = []
        for part in self.parts[:12]:
            indices = ", ".join(map(str, part.indices[:8])) + (", ..." if len(part.indices) > 8 else "")
            shown.append(f"{part.layer.parameter}[{indices}]")
        if len(self.parts) > 12:
            shown.append("...")
        said = f"{_number(len(self), 'neuron')} in {_number(len(self.parts), 'layer')}"
        return said + (": " + ", ".join(shown) if shown else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the nearest of some names as the end of an error message."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return "; nearest are " + ", ".join(f"'{other}'" for other in close) if close else "; there are none at all"


def refuse_misfit(parts: Iterable[LayerNeurons], layout: Layout, names: Iterable[str] = ()) -> None:
    """Raise one error that lists every touched layer that a layout does not have, or has in another shape.

    Args:
        parts: the touched layers with their neurons.
        layout: the layers that there are.
        names: the names to look for a near one in; the layout's own by default.

    Raises:
        ValueError: if there is such a layer.
    """
    wrong = []
    for part in parts:
        wanted = part.layer
        if wanted.parameter not in layout:
            wrong.append(
                f"  {wanted.parameter}: not in the model{nearest(wanted.parameter, list(names) or layout.starts)}"
            )
            continue
        found = layout[wanted.parameter]
        if (wanted.axis, wanted.count, wanted.row_shape, wanted.groups) != (
            found.axis,
            found.count,
            found.row_shape,
            found.groups,
        ):
            wrong.append(
                f"  {wanted.parameter}: expected {wanted.count} neurons of {wanted.row_shape} along axis {wanted.axis}"
                f", the model has {found.count} of {found.row_shape} along axis {found.axis}"
            )
    if wrong:
        raise ValueError(
            f"the neurons do not fit the model, {len(wrong)} mismatched:\n"
            + "\n".join(wrong)
            + "\nThey were made for another model or another version of it: select or score them again on this one"
        )


# Selecting by hand


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
        TypeError: if indices are of another type.

    Example:
        >>> layout = find_layout(nn.Linear(2, 5))
        >>> select(layout, {"weight": slice(1, 4)})
        3 neurons in 1 layer: weight[1, 2, 3]
        >>> select(layout, select(layout, {"weight": 4}).masks())
        1 neuron in 1 layer: weight[4]
    """
    result = Neurons()
    for pattern, indices in chosen.items():
        for layer in _matching(layout, pattern):
            picked = tuple(sorted(set(_indices(layer, indices))))
            result |= Neurons((LayerNeurons(layer, picked, layout.starts[layer.parameter]),))
    return result


def _matching(layout: Layout, pattern: str) -> list[Layer]:
    if pattern in layout:
        return [layout[pattern]]
    names = [*layout.starts, *(alias for alias, _ in layout.aliases)]
    matched = {layout[name].parameter: layout[name] for name in names if fnmatch.fnmatchcase(name, pattern)}
    if not matched:
        raise KeyError(f"no layer matches '{pattern}'{nearest(pattern, names)}")
    return list(matched.values())


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
    outside = [int(index) for index in np.atleast_1d(array) if not 0 <= index < layer.count]
    if outside:
        raise IndexError(f"{layer.parameter} has neurons 0..{layer.count - 1}; out of range: {outside[:10]}")
    return [int(index) for index in np.atleast_1d(array)]


def _masked(layer: Layer, array: np.ndarray) -> Sequence[int]:
    full = tuple(layer.mask(()).shape)
    if array.shape == (layer.count,):
        return [int(index) for index in np.flatnonzero(array)]
    if array.shape == full:
        rows = layer.rows(torch.from_numpy(array)).reshape(layer.count, -1)
        partial = (rows.any(1) & ~rows.all(1)).nonzero().flatten().tolist()
        if partial:
            raise ValueError(
                f"{layer.parameter}: the mask marks a part of neurons {partial[:10]} only: mark all or none"
            )
        return [int(index) for index in rows[:, 0].nonzero().flatten()]
    raise ValueError(
        f"{layer.parameter}: a mask has shape ({layer.count},) or {full}, not {array.shape}: give one entry per neuron"
    )


# Finding the layers of a model


def find_layout(model: nn.Module, where: Where | None = None, extra: str | Sequence[str] | None = None) -> Layout:
    """Return the layers of a model.

    The default takes the weights of Linear, Conv, ConvTranspose, Bilinear, RNN, LSTM, GRU, MultiheadAttention and
    Hugging Face's Conv1D; and, of any other module, its own parameters that keep two or more dimensions when size-1
    ones are dropped, with more than one entry on the output axis, unless their name says that they are position tables
    or tokens. Stacked experts (E, out, in) are E neurons. Parameters owned by an Embedding are left out, a tied head
    too.

    Args:
        model: any module; wrappers (DDP, torch.compile) are looked through.
        where: a glob, globs, or a predicate (name, module, parameter) -> bool that filters the default set. A tied
            parameter matches by any of its names.
        extra: a glob or globs of parameters to add, 1-D ones included: each of their entries is a neuron of row
            shape ().

    Raises:
        KeyError: if a glob matches nothing; names the nearest parameters.
        ValueError: if nothing is left, or a layer is on the meta device, quantised, sharded, or owned by an old
            weight-norm hook; lists all.
        TypeError: if the model is no module or cannot be copied (only tried where it is parametrized).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> find_layout(model, extra="*.bias").count
        28
        >>> find_layout(model, where="3.*")
        Layout: 2 neurons in 1 layer
          3.weight: 2 neurons of 8
    """
    tensors = _readable(model)
    chosen = [tensor for tensor in tensors.values() if _is_layer(tensor)]
    if where is not None:
        chosen = _filter(chosen, where)
    if extra is not None:
        wanted = {tensor.name for tensor in _glob([t for t in tensors.values() if _has_rows(t)], extra)}
        wanted |= {tensor.name for tensor in chosen}
        chosen = [tensor for name, tensor in tensors.items() if name in wanted]
    if not chosen:
        raise ValueError(
            f"no layer found in {type(bare(model)).__name__}: it has no weight of two or more dimensions outside "
            f"embeddings; name what you want with extra="
        )
    return _layout(chosen)


def _readable(model: nn.Module) -> dict[str, NamedTensor]:
    """Return the model's tensors by name, parametrized ones as computed on a copy."""
    tensors = named_tensors(model)
    return named_tensors(plain(model)) if any(tensor.parametrized for tensor in tensors.values()) else tensors


def _layout(tensors: Iterable[NamedTensor]) -> Layout:
    chosen = list(tensors)
    refuse_unsupported(chosen)
    layers = tuple(_layer(tensor) for tensor in chosen)
    return Layout(layers, tuple((alias, tensor.name) for tensor in chosen for alias in tensor.aliases))


def touched_layout(model: nn.Module, neurons: Neurons) -> Layout:
    """Return the layers of a model that some neurons touch, whether or not its default layout has them.

    Raises:
        ValueError: if the neurons do not fit the model, or a touched tensor cannot be edited; lists all.
    """
    named = {name: tensor for tensor in _readable(model).values() for name in (tensor.name, *tensor.aliases)}
    wanted = {part.layer.parameter for part in neurons.parts}
    touched = {tensor.name: tensor for name, tensor in named.items() if name in wanted and _has_rows(tensor)}
    layout = _layout(touched.values())
    refuse_misfit(neurons.parts, layout, named)
    return layout


def _has_rows(tensor: NamedTensor) -> bool:
    """Return whether it has a first dimension; one that is not yet initialised is refused later."""
    return isinstance(tensor.parameter, UninitializedTensorMixin) or tensor.parameter.dim() > 0


def _is_layer(tensor: NamedTensor) -> bool:
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in tensor.uses):
        return False
    module, attribute = tensor.uses[0]
    if isinstance(tensor.parameter, UninitializedTensorMixin):
        return isinstance(module, WEIGHTED) and "bias" not in attribute
    shape = tensor.parameter.shape
    if len([size for size in shape if size > 1]) >= 2 and shape[_axis(module, attribute, len(shape))] > 1:
        return isinstance(module, WEIGHTED) or not any(fnmatch.fnmatchcase(attribute, glob) for glob in NOT_A_LAYER)
    # A weight of one neuron or of one input is a layer all the same, in a module whose weights are known.
    return (isinstance(module, WEIGHTED) or _is_conv1d(module)) and len(shape) >= 2 and "bias" not in attribute


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether it is Hugging Face's Conv1D, a linear layer stored (in, out), without importing transformers."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _axis(module: nn.Module, attribute: str, dims: int) -> int:
    if isinstance(module, TRANSPOSED) and attribute == "weight":
        return 1
    return 1 if _is_conv1d(module) and attribute == "weight" and dims == 2 else 0


def _layer(tensor: NamedTensor) -> Layer:
    module, attribute = tensor.uses[0]
    shape = tuple(tensor.parameter.shape)
    axis = _axis(module, attribute, len(shape))
    if isinstance(module, TRANSPOSED) and axis == 1 and module.groups > 1:
        row = (shape[0] // module.groups, *shape[2:])
        return Layer(tensor.name, 1, shape[1] * module.groups, row, module.groups)
    return Layer(tensor.name, axis, shape[axis], shape[:axis] + shape[axis + 1 :])


def _filter(tensors: list[NamedTensor], where: Where) -> list[NamedTensor]:
    if not callable(where):
        return _glob(tensors, where)
    kept = [tensor for tensor in tensors if where(tensor.name, tensor.uses[0][0], tensor.parameter)]
    if not kept:
        raise ValueError(f"the predicate where= keeps none of the {len(tensors)} layers")
    return kept


def _glob(tensors: list[NamedTensor], globs: str | Sequence[str]) -> list[NamedTensor]:
    patterns = [globs] if isinstance(globs, str) else list(globs)
    names = {name: tensor.name for tensor in tensors for name in (tensor.name, *tensor.aliases)}
    kept: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise KeyError(f"no layer matches '{pattern}'{nearest(pattern, names)}")
        kept |= {names[name] for name in matched}
    return [tensor for tensor in tensors if tensor.name in kept]


def layer_tensors(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of a layout's layers in a bare, unparametrized model, by name.

    Raises:
        ValueError: if a layer is not in the model in that shape; lists all.
    """
    tensors = named_tensors(model)
    every = {name: tensor for tensor in tensors.values() for name in (tensor.name, *tensor.aliases)}
    found = {}
    wrong = []
    for layer in layout:
        if layer.parameter not in every:
            wrong.append(f"  {layer.parameter}: not in the model{nearest(layer.parameter, every)}")
            continue
        found[layer.parameter] = every[layer.parameter].parameter
    if wrong:
        raise ValueError("the layout does not fit the model:\n" + "\n".join(wrong))
    return found


def random_bits(key: str, size: int) -> np.ndarray:
    """Return `size` random 64-bit integers (uint64) that depend on the key alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Philox(key=number).random_raw(size)
