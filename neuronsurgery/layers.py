"""What a layer is: a parameter, and a pattern that cuts it into neurons.

A pattern is an einops rearrangement whose first element right of the arrow is the neuron and whose rest is its row.
Everything else in the library sees a weight only through `Layer.take` and `Layer.put`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from neuronsurgery.checks import LARGEST, is_integer, refuse, unfit
from neuronsurgery.precision import widened

ROWS = "n ... -> n ..."
COLUMNS = "i n ... -> n i ..."
GROUPED_COLUMNS = "(g i) n ... -> (g n) i ..."
"""The patterns that layers have unless somebody says otherwise."""

MOST_AXES = 32
"""More than anybody has, and less than what torch can compute with."""

SMALL = 2**16
"""Entries of a tensor up to which calls take longer than what they compute."""

SHORT, LONG = 1e-12, 1e18
"""Between these no square of an entry overflows, and those that vanish in float32 add up to nothing."""

Axes = tuple[tuple[int, int], ...]
"""For each axis its size and its stride in the parameter, were that contiguous: together they say what is cut."""


# A layer


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """A parameter and the pattern that cuts it into neurons.

    The pattern is a rearrangement in the language of einops: left of the arrow the dimensions of the parameter, right
    of it first the neuron (in parentheses where it has several axes), then its row.

    | pattern | a neuron is |
    |---|---|
    | `n ... -> n ...` | a row of a linear weight, a filter of a convolution |
    | `i n -> n i` | a column: an output of `x @ W` |
    | `(g i) n ... -> (g n) i ...` | an output channel of a grouped transposed convolution |
    | `(gate unit) i -> unit gate i` | all gates of a recurrent unit |
    | `e (head d) -> head e d` | a head, as the columns of the projection that reads it |
    | `e h i -> (e i) h` | a hidden unit of an expert among stacked ones |

    Equal are layers that cut the same parameter in the same way, however their patterns are spelt.

    Attributes:
        parameter: its name in the bare model.
        pattern: the rearrangement.
        sizes: of the axes that the shape alone does not say, for instance `{"d": 64}`.
        shape: of the parameter.
        position: where the parameter stands among the model's: sets of neurons are in this order, nothing else is.
        count: the number of neurons.
        row_shape: the shape of one neuron.

    Raises:
        ValueError: if the pattern does not fit the shape, or has no neuron (says why in one line), or an argument is of
            another type or out of range (lists all).

    Example:
        >>> heads = Layer("o_proj.weight", "e (head d) -> head e d", {"d": 2}, (3, 8))
        >>> heads
        o_proj.weight: 4 heads of 3x2
        >>> weight = torch.arange(24.0).reshape(3, 8)
        >>> heads.take(weight, torch.tensor([3]))[0]
        tensor([[ 6.,  7.],
                [14., 15.],
                [22., 23.]])
        >>> heads.put(weight, torch.tensor([3]), torch.zeros(1, 3, 2))[0]
        tensor([0., 1., 2., 3., 4., 5., 0., 0.])
    """

    parameter: str
    pattern: str
    sizes: Mapping[str, int]
    shape: tuple[int, ...]
    position: int = 0
    count: int = field(init=False)
    row_shape: tuple[int, ...] = field(init=False)
    _cut: _Cut = field(init=False)

    def __post_init__(self) -> None:
        refuse("a layer", _unfit_fields(self), "find_layout makes layers")
        sizes = {name: int(size) for name, size in self.sizes.items()}
        shape = tuple(map(int, self.shape))
        try:
            cut = _cut_of(self.pattern, tuple(sizes.items()), shape)
        # einops raises a RuntimeError of its own, torch any; a name that is no axis is whatever Python says of it.
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
            raise ValueError(
                f"{self.parameter}: the pattern {self.pattern!r} does not fit shape {shape} with sizes {sizes}: "
                f"{reason}"
            ) from None
        for name, value in (
            *(("sizes", MappingProxyType(sizes)), ("shape", shape), ("_cut", cut)),
            *(("count", math.prod(cut.neuron_shape)), ("row_shape", cut.row_shape)),
        ):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layer, (self.parameter, self.pattern, dict(self.sizes), self.shape, self.position)

    def __deepcopy__(self, memo: object) -> Layer:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layer):
            return NotImplemented
        return self.parameter == other.parameter and self.slicing == other.slicing

    def __hash__(self) -> int:
        return hash((self.parameter, self.shape, self._cut.neuron))

    @property
    def slicing(self) -> tuple[tuple[int, ...], Axes, Axes]:
        """What the pattern does, however it is spelt: the shape, the axes of the neuron, the axes of its row."""
        return self.shape, self._cut.neuron, self._cut.row

    @property
    def kind(self) -> str:
        """What a neuron is called: "neuron", or the names of its axes in a pattern of one's own."""
        return "neuron" if self.has_default_pattern else " ".join(self._cut.names)

    @property
    def has_default_pattern(self) -> bool:
        """Whether the neurons are those that `find_layout` finds by itself in a layer of some type."""
        return self._cut.default is not None

    @property
    def default_cut(self) -> tuple[int, int] | None:
        """The axis of the neurons and the groups that the other axes are cut in, of a default pattern; else None."""
        return self._cut.default

    @property
    def identity(self) -> list[Any]:
        """What a digest says of the layer: the same for however the pattern is spelt."""
        if self._cut.default is None:
            return [self.parameter, *self.slicing]
        axis, groups = self._cut.default
        return [self.parameter, axis, self.count, self.row_shape, groups]

    @property
    def key(self) -> str:
        """What draws depend on besides their seed: the parameter's name and, where it is cut otherwise, how."""
        return self.parameter if self.has_default_pattern else f"{self.parameter}\0{json.dumps(self.slicing)}"

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.row_shape)) or "scalar"
        alone = " " not in self.kind
        return f"{self.parameter}: {self.count} {f'{self.kind}s' if alone else f'neurons ({self.kind})'} of {shape}"

    def label(self, index: int) -> str:
        """Return a neuron's index as it is printed, with the names of its axes in a pattern of one's own."""
        if self.has_default_pattern:
            return str(index)
        places = []
        for name, size in reversed(list(zip(self._cut.names, self._cut.neuron_shape, strict=True))):
            index, place = divmod(index, size)
            places.append(f"{name} {place}")
        return " ".join(reversed(places))

    # What edits know

    def slices(self, weight: Tensor) -> Tensor:
        """Return a view of the weight with the axes of the neuron first, then its row."""
        if self._cut.rows_first:
            return weight
        view: Tensor = rearrange(weight, self._cut.apart, **self._cut.sizes)
        return view

    def take(self, weight: Tensor, index: Tensor) -> Tensor:
        """Return the rows of some neurons, shape (k, *row_shape).

        Args:
            weight: of the parameter's shape.
            index: the neurons, int64, shape (k,).
        """
        slices = self.slices(weight)
        return slices.index_select(0, index) if self._cut.single else slices[self._places(index)]

    def put(self, weight: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Return a copy of the weight, of its strides, in which some neurons have other rows.

        Args:
            weight: of the parameter's shape.
            index: the neurons, int64, shape (k,), each once.
            rows: shape (k, *row_shape), of the weight's dtype.
        """
        if self._cut.rows_first:
            return _strided(weight.index_copy(0, index, rows), weight)
        edited = _strided(weight.clone(), weight)
        # Not index_copy_, for which vmap has no rule.
        self.slices(edited).index_put_((index,) if self._cut.single else self._places(index), rows)
        return edited

    def zeroed(self, weight: Tensor, index: Tensor) -> Tensor:
        """Return what `put` gives for rows of zeros, in less time."""
        if self._cut.rows_first:
            return _strided(weight.index_fill(0, index, 0), weight)
        return self.put(weight, index, weight.new_zeros((len(index), *self.row_shape)))

    def _places(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return the index of each axis of the neuron; torch.unravel_index takes ten times as long."""
        places = []
        for size in reversed(self._cut.neuron_shape):
            places.append(index % size)
            index = index // size
        return tuple(reversed(places))

    def norms(self, tensor: Tensor) -> Tensor:
        """Return the Euclidean norm of each neuron's slice of a tensor, shape (count,), in float32 or wider."""
        lengths = self.lengths(tensor)
        if not is_squared_wide(tensor):
            index = doubtful(lengths).nonzero().flatten()
            if len(index):
                lengths[index] = self.safe_lengths(tensor, index)
        return lengths

    def lengths(self, tensor: Tensor) -> Tensor:
        """Return what `norms` does, in less time, but for squares that vanish or overflow: see `doubtful`."""
        slices, wide = self.slices(widened(tensor)), torch.float64 if is_squared_wide(tensor) else None
        row = tuple(range(len(self._cut.neuron_shape), slices.dim()))
        if self._cut.rows_first:  # contiguous rows are summed fastest as such
            slices, row = slices.reshape(self.count, -1), (1,)
        lengths: Tensor = torch.linalg.vector_norm(slices, dim=row, dtype=wide) if row else slices.abs()
        return lengths.to(slices.dtype).reshape(-1)

    def safe_lengths(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Return the norms of some neurons' slices, shape (k,), whatever their size, in float32 or wider.

        Rows are scaled by their largest entry first: gradients of a confident model are so small that their squares
        vanish in float32, and with them the ranking.
        """
        rows = widened(self.take(tensor, index)).reshape(len(index), -1)
        largest = rows.abs().amax(dim=1, keepdim=True)
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        lengths: Tensor = torch.linalg.vector_norm(rows / safe, dim=1, keepdim=True)
        return (lengths * safe).flatten()

    def mask(self, indices: Sequence[int]) -> Tensor:
        """Return the paper's binary mask: True at `indices`, bool, broadcastable to the parameter."""
        chosen = torch.zeros(self.count, dtype=torch.bool, device="cpu")
        chosen[list(indices)] = True
        cut = self._cut
        chosen = chosen.reshape(*cut.neuron_shape, *[1] * len(cut.row_shape))
        mask: Tensor = rearrange(chosen.expand(*cut.neuron_shape, *cut.mask_row), cut.together)
        return mask

    def covered(self, mask: Tensor) -> Tensor:
        """Return which neurons have only entries that a mask of the parameter's shape marks, bool, shape (count,)."""
        return self.slices(mask).reshape(self.count, -1).all(1)


def is_squared_wide(tensor: Tensor) -> bool:
    """Return whether the squares of a tensor are summed in float64, in which those of float32 all have a place.

    It is where that takes no time, and the device can.
    """
    return tensor.numel() <= SMALL and tensor.dtype != torch.float64 and tensor.device.type != "mps"


def doubtful(lengths: Tensor) -> Tensor:
    """Return which lengths are so small or large, or NaN, that they are to be had of `Layer.safe_lengths`."""
    return ~((lengths > SHORT) & (lengths < LONG))  # so written, NaN is among them


def _unfit_fields(layer: Layer) -> list[str]:
    sizes, shape = layer.sizes, layer.shape
    named = isinstance(sizes, Mapping) and all(isinstance(k, str) and is_integer(v, 1) for k, v in sizes.items())
    sized = isinstance(shape, tuple | list) and all(is_integer(size, 0) for size in shape)
    return [
        *unfit("parameter", isinstance(layer.parameter, str), "the name of a parameter", layer.parameter),
        *unfit("pattern", isinstance(layer.pattern, str), "a string", layer.pattern),
        *unfit("sizes", named, "a mapping from axes to integers of at least 1", sizes),
        *unfit(
            "shape", sized and math.prod(shape) <= LARGEST, "integers of at least 0, with a product below 2**63", shape
        ),
        *unfit("position", is_integer(layer.position, 0), "an integer of at least 0", layer.position),
    ]


def _strided(edited: Tensor, weight: Tensor) -> Tensor:
    """Return an edited tensor with the strides of the weight: by them kernels are chosen, and so the last bits."""
    if edited.stride() == weight.stride() or 0 in weight.stride():
        return edited
    strided = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return strided.copy_(edited)


# What a pattern does


class _PatternError(ValueError):
    """A pattern that is no way to cut neurons, whatever the shape."""


@dataclass(frozen=True)
class _Cut:
    """What a pattern does to a parameter of one shape.

    Attributes:
        names: the axes of the neuron.
        apart: the pattern that puts the axes of the neuron first, unjoined, so that the result is a view.
        together: its inverse.
        sizes: of the axes that the shape alone does not say.
        neuron_shape: the sizes of the neuron's axes.
        row_shape: the shape of one neuron.
        single: whether the neuron has one axis.
        neuron: the axes of the neuron, neighbours joined where that makes no difference.
        row: the axes of the row.
        mask_row: the row of a mask that is as small as it can be and still broadcasts to the parameter.
        default: the axis and the groups of the pattern, where it is one that layers have by themselves.
        rows_first: whether the neurons are the entries of the first dimension as it stands.
    """

    names: tuple[str, ...]
    apart: str
    together: str
    sizes: dict[str, int]
    neuron_shape: tuple[int, ...]
    row_shape: tuple[int, ...]
    single: bool
    neuron: Axes
    row: Axes
    mask_row: tuple[int, ...]
    default: tuple[int, int] | None
    rows_first: bool


@functools.lru_cache(maxsize=4096)
def _cut_of(pattern: str, sizes: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> _Cut:
    left, names, row = _parts(pattern)
    apart, together = f"{left} -> {' '.join((*names, *row))}", f"{' '.join((*names, *row))} -> {left}"
    # Of a contiguous tensor, the strides of a view say which of its entries each axis runs through.
    view: Tensor = rearrange(torch.empty(shape, device="meta"), apart, **dict(sizes))
    if view.dim() > MOST_AXES:
        raise _PatternError(f"it has {view.dim()} axes, more than {MOST_AXES}")
    axes = tuple(zip(view.shape, view.stride(), strict=True))
    neuron, rows = _joined(axes[: len(names)]), tuple(axis if axis[0] != 1 else (1, 0) for axis in axes[len(names) :])
    defaults = _default_cuts(shape, rows)
    return _Cut(
        names,
        apart,
        together,
        dict(sizes),
        tuple(size for size, _ in axes[: len(names)]),
        tuple(size for size, _ in rows),
        len(names) == 1,
        neuron,
        rows,
        _mask_row(left, names, row, tuple(size for size, _ in rows)),
        defaults.get((neuron, rows)),
        len(names) == 1 and [size for size, _ in axes] == list(shape) and defaults.get((neuron, rows)) == (0, 1),
    )


def _parts(pattern: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the left side of a pattern, the axes of the neuron and those of its row."""
    left, arrow, right = (part.strip() for part in pattern.partition("->"))
    elements = re.findall(r"\([^()]*\)|[^\s()]+|[()]", right)
    if not arrow or not elements:
        raise _PatternError("a pattern has an arrow with the neuron behind it, as in 'n ... -> n ...'")
    names = tuple(elements[0].strip("()").split())
    if not names or not all(name.isidentifier() for name in names):
        raise _PatternError(f"the neuron, the first element right of the arrow, has named axes, not {elements[0]!r}")
    if any(set(element) & set("()") for element in elements[1:]):
        raise _PatternError("only the neuron, the first element right of the arrow, may stand in parentheses")
    return left, names, tuple(elements[1:])


def _joined(axes: Axes) -> Axes:
    """Return axes that count through entries in the same order, as few as there can be."""
    joined: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return tuple(joined)


def _mask_row(left: str, names: Sequence[str], row: Sequence[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a mask's row: 1, but for axes that share a dimension of the parameter with the neuron's."""
    shared = {
        axis
        for dimension in re.findall(r"\([^()]*\)|\S+", left)
        if not set(names).isdisjoint(axes := dimension.strip("()").split())
        for axis in axes
    }
    ellipsis = len(shape) - len(row) + 1
    every = [axis for name in row for axis in ([name] * ellipsis if name == "..." else [name])]
    return tuple(size if axis in shared else 1 for axis, size in zip(every, shape, strict=True))


def _default_cuts(shape: tuple[int, ...], row: Axes) -> dict[tuple[Axes, Axes], tuple[int, int]]:
    """Return what the default patterns do to a shape, and for each the axis of its neurons and its groups."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    dims = tuple((size, stride) if size != 1 else (1, 0) for size, stride in zip(shape, strides, strict=True))
    cuts = {(_joined(dims[:1]), dims[1:]): (0, 1)}
    if len(shape) > 1:
        cuts.setdefault((_joined(dims[1:2]), (dims[0], *dims[2:])), (1, 1))
        inner = row[0][0] if row else 1  # of a transposed convolution, the input channels of one group
        if inner and shape[0] % inner == 0:
            groups = shape[0] // inner
            axes = _joined(((groups, inner * strides[0]), dims[1]))
            cuts.setdefault((axes, ((inner, strides[0] if inner > 1 else 0), *dims[2:])), (1, groups))
    return cuts
