"""Edits that hold the rows that they write: values of the caller's, or what else was computed or read beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import override

from neuronsurgery.checks import is_tensor, refuse, unfit
from neuronsurgery.digests import digest
from neuronsurgery.edits import Edit, file_kind, without_overlap
from neuronsurgery.errors import inline, listed
from neuronsurgery.layers import Layer
from neuronsurgery.neurons import Neurons, checked_neurons


@dataclass(frozen=True, repr=False)
class HeldRows(Edit):
    """An edit that holds rows. Equal are those of the same neurons and rows, by a digest.

    Attributes:
        neurons: the neurons that change.
        digest: of the neurons and the rows.
        kept: for each touched layer, in the order of `neurons.by_layer()`, rows of shape (k, *row_shape), on the CPU.
    """

    neurons: Neurons
    digest: str
    kept: tuple[Tensor, ...] = field(compare=False)

    def unfit_rows(self) -> list[str]:
        """Return what is wrong with the rows and their digest."""
        checked_neurons(self.neurons)
        shapes = [(len(indices), *layer.row_shape) for layer, indices in self.neurons.by_layer().items()]
        kept = self.kept if isinstance(self.kept, tuple) else ()
        rows = len(kept) == len(shapes) and all(map(is_tensor, kept, shapes))
        return [
            *unfit("kept", rows, f"floating-point rows of the shapes {shapes}", self.kept),
            *unfit("digest", isinstance(self.digest, str), "a string", self.digest),
        ]

    @override
    def constants(self, layer: Layer, indices: Sequence[int]) -> Tensor:
        """Return the rows that the edit holds."""
        every = self.neurons.by_layer()
        position = {index: i for i, index in enumerate(every[layer])}
        return self.kept[list(every).index(layer)][[position[index] for index in indices]]


def rows_digest(neurons: Neurons, rows: Iterable[Tensor]) -> str:
    """Return what says whether two sets of rows are the same: a SHA-256 of their neurons and values."""
    pieces: list[str | Tensor] = []
    for (layer, indices), tensor in zip(neurons.by_layer().items(), rows, strict=True):
        pieces += [f"{layer.key}\0{indices}\0{tuple(tensor.shape)}\0{tensor.dtype}\0", tensor]
    return digest(*pieces)


@file_kind("set_rows")
@dataclass(frozen=True, repr=False)
class SetRows(HeldRows):
    """See `set_rows`."""

    def __post_init__(self) -> None:
        wrong = self.unfit_rows()
        refuse("rows to set", wrong, "Make it with set_rows(neurons, values)")
        without_overlap(self.neurons, "setting rows")

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return the rows that are held, in the dtype of the weight."""
        held = self.constants(layer, indices.tolist()) if constants is None else constants
        return held.to(weight.device, weight.dtype)

    @override
    def content(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Return the digest and the rows."""
        return {"digest": self.digest}, self.kept

    @classmethod
    @override
    def restored(cls, neurons: Neurons, values: Mapping[str, Any], tensors: Sequence[Tensor]) -> Edit:
        """Return the edit of which a file keeps this."""
        edit = cls(neurons, values["digest"], tuple(tensors))
        if rows_digest(neurons, edit.kept) != edit.digest:
            raise ValueError(f"the rows of {neurons} are not those of the digest beside them")
        return edit

    def __repr__(self) -> str:
        return f"set_rows({self.neurons})"


def set_rows(neurons: Neurons, values: Tensor | Mapping[Layer | str, Tensor]) -> SetRows:
    """Return the edit z -> z', z' a row of the caller's own, written in the dtype of the weight.

    Args:
        neurons: which neurons, no two of which share entries.
        values: for each touched layer (the `Layer`, or the name of its parameter) rows of shape (k, *row_shape), in the
            ascending order of the layer's chosen indices; for neurons of a single layer its rows alone. Copied.

    Raises:
        TypeError: if `neurons` are not a set of neurons, or the values are neither a tensor nor a mapping.
        ValueError: if a layer has no rows, or ones of another shape or that are no plain floating-point numbers, if
            rows are given for a layer that is not touched (lists all), or if two neurons share entries.

    Example:
        >>> import torch
        >>> from neuronsurgery import apply, find_layout, select
        >>> model = torch.nn.Linear(2, 3)
        >>> edit = set_rows(select(find_layout(model), {"weight": (0, 2)}), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> edit
        set_rows(2 neurons in 1 layer: weight[0, 2])
        >>> apply(edit, model).weight[2].tolist()
        [3.0, 4.0]
    """
    layers = checked_neurons(neurons, "set_rows").by_layer()
    if isinstance(values, Tensor):
        if len(layers) != 1:
            raise ValueError(
                f"one tensor of rows is for neurons of one layer, these are of {len(layers)}: give a mapping from "
                f"layers to rows"
            )
        values = {next(iter(layers)): values}
    if not isinstance(values, Mapping):
        raise TypeError(f"values are a tensor, or a mapping from layers to tensors, not a {type(values).__name__}")
    named = _by_name(layers, values)
    wrong = []
    for layer, indices in layers.items():
        shape, given = (len(indices), *layer.row_shape), named.get(layer)
        if given is None:
            wrong.append(f"{layer.parameter}: no rows given")
        elif not is_tensor(given, shape):
            wrong += unfit(layer.parameter, False, f"floating-point rows of shape {shape}", given)
    if wrong:
        raise ValueError(
            f"{len(wrong)} layers have no fitting rows:\n{listed(wrong)}\nGive (k, *row_shape) of each, ascending"
        )
    kept = tuple(named[layer].detach().cpu().clone() for layer in layers)
    return SetRows(neurons, rows_digest(neurons, kept), kept)


def _by_name(layers: Iterable[Layer], values: Mapping[Layer | str, Tensor]) -> dict[Layer, Tensor]:
    every = list(layers)
    named: dict[Layer, Tensor] = {}
    unknown = []
    for key, rows in values.items():
        fitting = [layer for layer in every if key in (layer, layer.parameter)]
        if len(fitting) != 1:
            unknown.append(str(key))
        named |= dict.fromkeys(fitting, rows)
    if unknown:
        raise ValueError(
            f"values= has rows for {inline(unknown)}, no one touched layer; the neurons are of "
            f"{inline(layer.parameter for layer in every)}"
        )
    return named
