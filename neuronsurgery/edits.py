"""Edits: small frozen values that say which neurons change and how.

Every edit is one pure function `rows(layer, indices, weight) -> new rows`. It may read the whole weight as it stands,
writes only its rows, computes in float32 (float64 for float64) and rounds to the weight's dtype. What it draws or reads
from a checkpoint (`constants`) can be had once and handed in again, so that a view does not draw at every forward pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.checks import finite, make_tuples, refuse, unfit
from neuronsurgery.draws import checked_seed, normals
from neuronsurgery.errors import checked, first
from neuronsurgery.layers import Layer
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.precision import wide_dtype, widened

EditT = TypeVar("EditT", bound="type[Edit]")


class Edit(ABC):
    """A frozen value: some neurons and what becomes of them.

    Attributes:
        neurons: the neurons that change.
    """

    neurons: Neurons

    def constants(self, layer: Layer, indices: Sequence[int]) -> Tensor | None:
        """Return what the edit draws or reads for some of its neurons, shape (k, *row_shape), or None."""
        return None

    @abstractmethod
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return the new rows of some neurons.

        Args:
            layer: the layer.
            indices: the neurons' indices, int64, shape (k,).
            weight: the layer's parameter as it stands.
            constants: what `constants` gave for them, to save drawing or reading again.

        Returns:
            The rows, shape (k, *row_shape), in the dtype of `weight`.
        """

    def content(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Return what a file keeps of the edit besides its neurons: JSON values by name, and tensors."""
        names = [entry.name for entry in fields(self) if entry.name != "neurons"]  # type: ignore[arg-type]  # a dataclass
        return {name: getattr(self, name) for name in names}, ()

    @classmethod
    def restored(cls, neurons: Neurons, values: Mapping[str, Any], tensors: Sequence[Tensor]) -> Edit:
        """Return the edit of which a file keeps this: see `content`."""
        return cls(neurons=neurons, **values)  # type: ignore[call-arg]  # edits are dataclasses


KINDS: dict[str, type[Edit]] = {}
"""The kinds of edit by the names that files know them by."""


def file_kind(name: str) -> Callable[[EditT], EditT]:
    """Return a decorator that registers a class of edits, so that `save_file` and `load_file` know it.

    Args:
        name: what files call the kind. Whoever loads such a file must have registered it, too.

    Raises:
        TypeError: if the name is no string.
        ValueError: if another class has the name.

    Example:
        >>> @file_kind("negate")
        ... @dataclass(frozen=True)
        ... class Negate(Edit):
        ...     neurons: Neurons
        ...
        ...     def rows(self, layer, indices, weight, constants=None):
        ...         return -layer.take(weight, indices)
        >>> from neuronsurgery import apply, find_layout, select
        >>> model = torch.nn.Linear(3, 2)
        >>> view = apply(Negate(select(find_layout(model), {"weight": 0})), model)
        >>> torch.equal(view.weight[0], -model.weight[0])
        True
    """
    checked(name, str, "file_kind takes the name that files know an edit by, not a {}: write @file_kind('negate')")

    def register(kind: EditT) -> EditT:
        known = KINDS.setdefault(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"files call {known.__qualname__} '{name}' already: choose another name")
        KINDS[name] = kind
        return kind

    return register


def leaves(edit: Edit) -> tuple[Edit, ...]:
    """Return the edits that an edit is composed of, in order: itself, unless it was composed."""
    if not isinstance(edit, Edit):
        raise TypeError(
            f"an edit is made by zero_out, scale, random_init, random_noise, rewind or compose, not a "
            f"{type(edit).__name__}: write for instance zero_out(topk(scores, 3))"
        )
    return edit.edits if isinstance(edit, Compose) else (edit,)


Part = tuple[Layer, Tensor, "Tensor | None"]
"""A layer, some of its neurons, int64, and what an edit draws or reads for them."""


def edited_weight(edit: Edit, parts: Sequence[Part], weight: Tensor) -> Tensor:
    """Return a parameter with an edit made: the same shape, dtype and strides, all other rows bit for bit as they were.

    Args:
        edit: what to do.
        parts: the layers that cut this parameter, with the neurons to edit; where there are several ways to cut it, all
            of them read the weight as it stands before the edit.
        weight: the parameter.
    """
    if type(edit) is ZeroOut:
        for layer, index, _ in parts:
            weight = layer.zeroed(weight, index)
        return weight
    rows = [edit.rows(layer, index, weight, constants) for layer, index, constants in parts]
    for (layer, index, _), new in zip(parts, rows, strict=True):
        weight = layer.put(weight, index, new)
    return weight


# The edits


@file_kind("zero_out")
@dataclass(frozen=True, repr=False)
class ZeroOut(Edit):
    """See `zero_out`."""

    neurons: Neurons

    def __post_init__(self) -> None:
        checked_neurons(self.neurons)

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return zeros; never by multiplication, since 0 * NaN is NaN."""
        return weight.new_zeros((len(indices), *layer.row_shape))

    def __repr__(self) -> str:
        return f"zero_out({self.neurons})"


@file_kind("scale")
@dataclass(frozen=True, repr=False)
class Scale(Edit):
    """See `scale`."""

    neurons: Neurons
    factor: float

    def __post_init__(self) -> None:
        without_overlap(self.neurons, "a scale")
        object.__setattr__(self, "factor", finite("factor", self.factor))

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return factor * z."""
        return (self.factor * widened(layer.take(weight, indices))).to(weight.dtype)

    def __repr__(self) -> str:
        return f"scale({self.neurons}, factor={self.factor:g})"


@dataclass(frozen=True, repr=False)
class RandomEdit(Edit):
    """An edit that draws one standard normal number per entry, scaled by `std` or relative to what stands there."""

    neurons: Neurons
    seed: int
    std: float | None = None
    relative_std: float | None = None

    def __post_init__(self) -> None:
        without_overlap(self.neurons, "a draw")
        seed, (std, relative_std) = checked_seed(self.seed), _one_scale(self.std, self.relative_std)
        for name, value in (("seed", seed), ("std", std), ("relative_std", relative_std)):
            object.__setattr__(self, name, value)

    @override
    def constants(self, layer: Layer, indices: Sequence[int]) -> Tensor:
        """Return one standard normal draw per entry, float32, on the CPU.

        The draw for a neuron is a function of (seed, layer, index) alone.
        """
        size = math.prod(layer.row_shape)
        drawn = np.empty((len(indices), size), dtype=np.float32)
        for row, index in enumerate(indices):
            drawn[row] = normals(f"{self.seed}\0{layer.key}\0{index}", size)
        return torch.from_numpy(drawn).reshape(len(indices), *layer.row_shape)

    def drawn(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None) -> Tensor:
        """Return the draws in the dtype to compute in, on the device of the weight."""
        given = self.constants(layer, indices.tolist()) if constants is None else constants
        return given.to(weight.device, wide_dtype(weight))

    def spread(self, rows: Tensor) -> Tensor:
        """Return the scale of each row's draw, a constant for autograd, shape (k, 1, ...): relative to its RMS."""
        flat = widened(rows.detach().reshape(len(rows), -1))
        root_mean_square = flat.square().mean(1).sqrt().reshape(-1, *[1] * (rows.dim() - 1))
        if self.relative_std is None:
            return torch.ones_like(root_mean_square) * (self.std or 0.0)  # full_like raises beyond float32, not this
        return self.relative_std * root_mean_square

    @property
    def said(self) -> str:
        """The scale and the seed in words."""
        scale = f"std={self.std:g}" if self.std is not None else f"relative_std={self.relative_std:g}"
        return f"{scale}, seed={self.seed}"


@file_kind("random_init")
@dataclass(frozen=True, repr=False)
class RandomInit(RandomEdit):
    """See `random_init`."""

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return s * e, e a standard normal draw, s absolute or relative to the root mean square of the layer."""
        drawn = self.drawn(layer, indices, weight, constants)
        return (self.spread(weight.reshape(1, -1)).squeeze() * drawn).to(weight.dtype)

    def __repr__(self) -> str:
        return f"random_init({self.neurons}, {self.said})"


@file_kind("random_noise")
@dataclass(frozen=True, repr=False)
class RandomNoise(RandomEdit):
    """See `random_noise`."""

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return z + s * e, e a standard normal draw, s absolute or relative to the root mean square of z."""
        drawn = self.drawn(layer, indices, weight, constants)
        old = widened(layer.take(weight, indices))
        return (old + self.spread(old) * drawn).to(weight.dtype)

    def __repr__(self) -> str:
        return f"random_noise({self.neurons}, {self.said})"


@dataclass(frozen=True, repr=False)
class Compose(Edit):
    """See `compose`."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        make_tuples(self, "edits")
        flat = isinstance(self.edits, tuple) and all(
            isinstance(edit, Edit) and not isinstance(edit, Compose) for edit in self.edits
        )
        refuse(
            "a composed edit", unfit("edits", flat, "edits, none of them composed", self.edits), "Write compose(...)"
        )

    @property
    def neurons(self) -> Neurons:  # type: ignore[override]
        """The neurons of all of the edits."""
        united = Neurons()
        for edit in self.edits:
            united |= edit.neurons
        return united

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return the rows after all of the edits, from left to right."""
        for edit in self.edits:
            touched = edit.neurons.by_parameter().get(layer.parameter, {})
            parts = [(other, torch.tensor(chosen, device=weight.device), None) for other, chosen in touched.items()]
            weight = edited_weight(edit, parts, weight)
        return layer.take(weight, indices)

    def __repr__(self) -> str:
        return f"compose({', '.join(first(map(repr, self.edits), 6))})"


# How to make them


def zero_out(neurons: Neurons) -> ZeroOut:
    """Return the edit that sets every weight of some neurons to exact zero: m * theta, m the binary mask.

    A bias or a normalisation that follows is untouched, so the unit's output need not be zero.

    Raises:
        TypeError: if `neurons` are not a set made by topk, select, sample ...

    Example:
        >>> from neuronsurgery import apply, find_layout, select
        >>> model = torch.nn.Linear(3, 2)
        >>> edit = zero_out(select(find_layout(model), {"weight": 0}))
        >>> edit
        zero_out(1 neuron in 1 layer: weight[0])
        >>> apply(edit, model).weight[0].tolist()
        [0.0, 0.0, 0.0]

    Source:
        You et al., "The Silent Majority", 2025.
    """
    return ZeroOut(neurons)


def scale(neurons: Neurons, factor: float) -> Scale:
    """Return the edit z -> factor * z.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if `factor` is not finite, or two neurons share entries (a head and a row).

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> scale(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), 0.5)
        scale(1 neuron in 1 layer: weight[0], factor=0.5)
    """
    return Scale(neurons, factor)


def random_init(
    neurons: Neurons, *, std: float | None = None, relative_std: float | None = None, seed: int = 0
) -> RandomInit:
    """Return the edit z -> e, e ~ N(0, s^2).

    Args:
        neurons: which neurons.
        std: s, absolute.
        relative_std: s relative to the root mean square of the whole layer as it stands. Exactly one of the two.
        seed: the draw for a neuron depends on (seed, layer, index) alone, on any device and in any company.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if not exactly one scale is given, a scale or the seed is out of range, or two neurons share
            entries.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> random_init(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), std=0.02, seed=1)
        random_init(1 neuron in 1 layer: weight[0], std=0.02, seed=1)

    Source:
        You et al., "The Silent Majority", 2025.
    """
    return RandomInit(neurons, seed, std, relative_std)


def random_noise(
    neurons: Neurons, *, std: float | None = None, relative_std: float | None = None, seed: int = 0
) -> RandomNoise:
    """Return the edit z -> z + e, e ~ N(0, s^2).

    Args:
        neurons: which neurons.
        std: s, absolute.
        relative_std: s relative to the root mean square of that row. Exactly one of the two.
        seed: the draw for a neuron depends on (seed, layer, index) alone, on any device and in any company.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if not exactly one scale is given, a scale or the seed is out of range, or two neurons share
            entries.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> random_noise(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), relative_std=0.5, seed=1)
        random_noise(1 neuron in 1 layer: weight[0], relative_std=0.5, seed=1)

    Source:
        You et al., "The Silent Majority", 2025.
    """
    return RandomNoise(neurons, seed, std, relative_std)


def compose(*edits: Edit) -> Edit:
    """Return the edit that makes some edits from left to right; of none, the identity.

    It is associative: compose(a, compose(b, c)) == compose(compose(a, b), c) == compose(a, b, c).

    Raises:
        TypeError: if one of them is not an edit.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> layout = find_layout(torch.nn.Linear(3, 2))
        >>> compose(zero_out(select(layout, {"weight": 0})), scale(select(layout, {"weight": 1}), 2.0))
        compose(zero_out(1 neuron in 1 layer: weight[0]), scale(1 neuron in 1 layer: weight[1], factor=2))
    """
    flat = tuple(leaf for edit in edits for leaf in leaves(edit) if leaf.neurons)
    return flat[0] if len(flat) == 1 else Compose(flat)


# Checks


def without_overlap(neurons: Neurons, what: str) -> Neurons:
    """Return the neurons, or raise where two of them share an entry, which would be edited twice."""
    overlapping = checked_neurons(neurons).overlapping()
    if overlapping:
        raise ValueError(
            f"{what} of neurons that share entries would edit these twice: {', '.join(overlapping)} is cut in several "
            f"ways; edit one way after the other with compose"
        )
    return neurons


def _one_scale(std: float | None, relative_std: float | None) -> tuple[float | None, float | None]:
    if (std is None) == (relative_std is None):
        raise ValueError(f"give exactly one of std= and relative_std=, not std={std}, relative_std={relative_std}")
    for name, value in (("std", std), ("relative_std", relative_std)):
        if value is not None and finite(name, value) < 0:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
    return (
        None if std is None else float(std),
        None if relative_std is None else float(relative_std),
    )
