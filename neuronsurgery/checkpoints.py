"""Rewinding neurons to a checkpoint, whose rows are read once, when the edit is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.checks import finite, is_tensor, refuse, unfit
from neuronsurgery.edits import Edit, file_kind, without_overlap
from neuronsurgery.errors import listed, nearest
from neuronsurgery.layers import Layer
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.precision import widened
from neuronsurgery.rows import HeldRows, rows_digest
from neuronsurgery.spread import is_spread
from neuronsurgery.state_dicts import CheckpointError, choose_dictionary, find_dictionaries, wanted_names
from neuronsurgery.types import Checkpoint

SHOWN = 10
"""So many layers that do not fit are listed."""


# The edit


@file_kind("rewind")
@dataclass(frozen=True, repr=False)
class Rewind(HeldRows):
    """See `rewind`. Equal are rewinds of the same neurons by the same share to the same values, wherever these lie."""

    alpha: float = 1.0
    path: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _checked_share(self.neurons, self.alpha))
        wrong = [*self.unfit_rows(), *unfit("path", isinstance(self.path, str | None), "a string or None", self.path)]
        refuse("a rewind", wrong, "Make it with rewind(neurons, checkpoint)")

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        """Return z + alpha (z' - z), exactly z' for alpha = 1."""
        then = self.constants(layer, indices.tolist()) if constants is None else constants
        then = then.to(weight.device)
        if self.alpha == 1:
            return then.to(weight.dtype)
        old = widened(layer.take(weight, indices))
        return (old + self.alpha * (then.to(old.dtype) - old)).to(weight.dtype)

    @override
    def content(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Return the path and the digest, and the rows where there is no path."""
        values = {"alpha": self.alpha, "digest": self.digest, "path": self.path}
        return values, self.kept if self.path is None else ()

    @classmethod
    @override
    def restored(cls, neurons: Neurons, values: Mapping[str, Any], tensors: Sequence[Tensor]) -> Edit:
        """Return the edit, its rows read from its file where it keeps only a path.

        Raises:
            FileNotFoundError: if that file is gone.
            ValueError: if the rows are no longer those that the edit was made with.
        """
        path = values["path"]
        if not isinstance(path, str | None):
            raise ValueError(f"the path of a rewind is a string, not {path!r}")
        kept = tuple(tensors) if path is None else checkpoint_rows(neurons, path)
        edit = cls(neurons, values["digest"], kept, values["alpha"], path)
        if rows_digest(neurons, kept) == edit.digest:
            return edit
        if path is None:
            raise ValueError(f"the rows of {neurons} are not those of the digest beside them")
        raise CheckpointError(
            f"the rows of {neurons} in {path} are no longer those that this rewind was made with: make it again with "
            f"rewind(neurons, path), or give the original file back"
        )

    def __repr__(self) -> str:
        source = self.path if self.path is not None else f"{self.digest[:12]}..."
        return f"rewind({self.neurons}, {source}, alpha={self.alpha:g})"


def rewind(neurons: Neurons, checkpoint: Checkpoint, alpha: float = 1.0) -> Rewind:
    """Return the edit z -> z + alpha (z' - z), z' the same row in a checkpoint; exactly z' for alpha = 1.

    Args:
        neurons: which neurons.
        checkpoint: the path of a safetensors file, of a state dict saved by torch, of the index of a sharded one or of
            a folder of Hugging Face's, or a mapping of tensors. Prefixes of wrappers and of trainers are understood,
            and so is a nested dictionary (`state_dict`, `model`, `net`, `ema`, ...) if no other one fits. The rows are
            read now, once; a file of an edit that was made from a path keeps the path.
        alpha: the share of the way back; 0 changes nothing.

    Raises:
        TypeError: if `neurons` are not a set of neurons, or the checkpoint is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, several dictionaries in it fit, a layer is missing in it or has another
            shape (lists all), `alpha` is not finite, or two neurons share entries with alpha other than 1.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> then = torch.nn.Linear(3, 2)
        >>> rewind(select(find_layout(then), {"weight": 0}), then.state_dict(), alpha=0.5)  # doctest: +ELLIPSIS
        rewind(1 neuron in 1 layer: weight[0], ...

    Source:
        Zhang et al., "Are all layers created equal?", 2019; You et al., "The Silent Majority", 2025.
    """
    alpha = _checked_share(neurons, alpha)
    rows = checkpoint_rows(neurons, checkpoint)
    path = None if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    return Rewind(neurons, rows_digest(neurons, rows), rows, alpha, path)


def _checked_share(neurons: Neurons, alpha: float) -> float:
    """Return the share as a float, or raise where it is none or would go to shared entries twice."""
    checked_neurons(neurons)
    share = finite("alpha", alpha)
    if share != 1:
        without_overlap(neurons, "a rewind by a share")
    return share


# Reading


def checkpoint_rows(neurons: Neurons, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Return copies of the rows of each touched layer, in the order of the layers, on the CPU.

    Raises:
        TypeError: if the checkpoint is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, several dictionaries in it fit, or a layer is missing or is no plain
            floating-point tensor of its shape; lists all.
    """
    layers = neurons.by_layer()
    dictionaries = find_dictionaries(checkpoint)
    where = "the given mapping" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    tensors = choose_dictionary(dictionaries, lambda found: _fitting(layers, found), where)
    keys = wanted_names([layer.parameter for layer in layers], tensors)
    rows: list[Tensor] = []
    wrong: list[str] = []
    for layer, indices in layers.items():
        key = keys[layer.parameter]
        tensor = None if key is None else tensors[key]
        if tensor is None:
            near = nearest(layer.parameter, tensors) if len(wrong) < SHOWN else ""  # it looks at every name
            wrong.append(f"{layer.parameter}: not in the checkpoint{near}")
        elif reason := _misfit(layer, tensor):
            wrong.append(f"{layer.parameter}: {reason}")
        else:
            index = torch.tensor(indices, device=tensor.device)
            rows.append(layer.take(tensor.detach(), index).cpu().clone())
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} layers cannot be rewound to {where}:\n{listed(wrong, SHOWN)}\nGive a checkpoint of this "
            f"model"
        )
    return tuple(rows)


def _misfit(layer: Layer, tensor: Tensor) -> str:
    """Return why a tensor has no rows for a layer, or ""."""
    if is_spread(tensor):
        return "spread over processes; gather it first, tensor.full_tensor()"
    if tuple(tensor.shape) != layer.shape:
        return f"expected shape {layer.shape}, the checkpoint has {tuple(tensor.shape)}"
    if not is_tensor(tensor, layer.shape) or tensor.is_meta:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
        return f"expected plain floating-point numbers, the checkpoint has {kind}"
    return ""


def _fitting(layers: Iterable[Layer], tensors: Mapping[str, Tensor]) -> int:
    """Return how many of some layers have rows in a dictionary."""
    every = list(layers)
    keys = wanted_names([layer.parameter for layer in every], tensors)
    found = [(layer, keys[layer.parameter]) for layer in every]
    return sum(key is not None and not _misfit(layer, tensors[key]) for layer, key in found)
