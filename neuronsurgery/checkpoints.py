"""Rewinding neurons to a checkpoint, whose rows are read once, when the edit is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.digests import digest
from neuronsurgery.edits import Edit, file_kind, finite, without_overlap
from neuronsurgery.errors import listed, nearest
from neuronsurgery.layers import Layer
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.precision import widened
from neuronsurgery.surveys import SHARDED_REASON, is_sharded, same_names
from neuronsurgery.types import Checkpoint

# The edit


@file_kind("rewind")
@dataclass(frozen=True, repr=False)
class Rewind(Edit):
    """See `rewind`. Equal are rewinds of the same neurons by the same share to the same values, wherever these lie."""

    neurons: Neurons
    alpha: float
    digest: str
    kept: tuple[Tensor, ...] = field(compare=False)
    path: str | None = field(default=None, compare=False)

    @override
    def constants(self, layer: Layer, indices: Sequence[int]) -> Tensor:
        """Return the rows of the checkpoint."""
        every = self.neurons.by_layer()
        position = {index: i for i, index in enumerate(every[layer])}
        return self.kept[list(every).index(layer)][[position[index] for index in indices]]

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
        kept = tuple(tensors) if path is None else checkpoint_rows(neurons, path)
        if path is not None and rows_digest(neurons, kept) != values["digest"]:
            raise ValueError(
                f"the rows of {neurons} in {path} are no longer those that this rewind was made with: make it again "
                f"with rewind(neurons, path), or give the original file back"
            )
        return cls(neurons, values["alpha"], values["digest"], kept, path)

    def __repr__(self) -> str:
        source = self.path if self.path is not None else f"{self.digest[:12]}..."
        return f"rewind({self.neurons}, {source}, alpha={self.alpha:g})"


def rewind(neurons: Neurons, checkpoint: Checkpoint, alpha: float = 1.0) -> Rewind:
    """Return the edit z -> z + alpha (z' - z), z' the same row in a checkpoint; exactly z' for alpha = 1.

    Args:
        neurons: which neurons.
        checkpoint: the path of a safetensors file or of a state dict saved by torch, or a mapping of tensors. Prefixes
            of wrappers and a nested `state_dict` or `model` entry are understood. The rows are read now, once; a file
            of an edit that was made from a path keeps the path.
        alpha: the share of the way back; 0 changes nothing.

    Raises:
        TypeError: if `neurons` are not a set of neurons, or the checkpoint is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, a layer is missing in it or has another shape (lists all), `alpha` is not
            finite, or two neurons share entries with alpha other than 1.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> then = torch.nn.Linear(3, 2)
        >>> rewind(select(find_layout(then), {"weight": 0}), then.state_dict(), alpha=0.5)  # doctest: +ELLIPSIS
        rewind(1 neuron in 1 layer: weight[0], ...

    Source:
        Zhang et al., "Are all layers created equal?", 2019; You et al., "The Silent Majority", 2025.
    """
    neurons = checked_neurons(neurons)
    alpha = finite("alpha", alpha)
    if alpha != 1:
        without_overlap(neurons, "a rewind by a share")
    rows = checkpoint_rows(neurons, checkpoint)
    path = None if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    return Rewind(neurons, alpha, rows_digest(neurons, rows), rows, path)


# Reading


def checkpoint_rows(neurons: Neurons, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Return copies of the rows of each touched layer, in the order of the layers, on the CPU.

    Raises:
        TypeError: if the checkpoint is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or a layer is missing in it or has another shape; lists all.
    """
    tensors = _read(checkpoint, {layer.parameter for layer in neurons.by_layer()})
    rows, wrong = [], []
    for layer, indices in neurons.by_layer().items():
        tensor = tensors.get(layer.parameter)
        if not isinstance(tensor, Tensor):
            wrong.append(f"{layer.parameter}: not in the checkpoint{nearest(layer.parameter, tensors)}")
        elif is_sharded(tensor):
            wrong.append(f"{layer.parameter}: {SHARDED_REASON}")
        elif tuple(tensor.shape) != layer.shape:
            wrong.append(f"{layer.parameter}: expected shape {layer.shape}, the checkpoint has {tuple(tensor.shape)}")
        else:
            index = torch.tensor(indices, device=tensor.device)
            rows.append(layer.take(tensor.detach(), index).cpu().clone())
    if wrong:
        where = "the given mapping" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
        raise ValueError(
            f"{len(wrong)} layers cannot be rewound to {where}:\n{listed(wrong)}\nGive a checkpoint of this model"
        )
    return tuple(rows)


def rows_digest(neurons: Neurons, rows: Iterable[Tensor]) -> str:
    """Return what says whether two sets of rows are the same: a SHA-256 of their neurons and values."""
    pieces: list[str | Tensor] = []
    for (layer, indices), tensor in zip(neurons.by_layer().items(), rows, strict=True):
        pieces += [f"{layer.key}\0{indices}\0{tuple(tensor.shape)}\0{tensor.dtype}\0", tensor]
    return digest(*pieces)


def _read(checkpoint: Checkpoint, wanted: set[str]) -> Mapping[str, Any]:
    """Return the checkpoint's tensors by name, those that are wanted by the names they are wanted by."""
    if isinstance(checkpoint, Mapping):
        return _by_wanted_name(_state_dict(checkpoint), wanted)
    try:
        path = Path(os.fspath(checkpoint))
    except TypeError:
        raise TypeError(
            f"a checkpoint is a path or a mapping of tensors, not a {type(checkpoint).__name__}: of a model give "
            f"model.state_dict()"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a safetensors file or a torch state dict")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = dict.fromkeys(file.keys())
            found = {name: key for name, key in same_names(wanted, keys).items() if key is not None}
            return keys | {name: file.get_tensor(key) for name, key in found.items()}
    except safetensors.SafetensorError as not_safetensors:
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is no readable safetensors file ({not_safetensors}): write it again") from None
    return _by_wanted_name(_state_dict(_unpickled(path)), wanted)


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is neither a safetensors file nor a state dict that torch.load(weights_only=True) reads: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    return loaded


def _state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    return {str(name): tensor for name, tensor in checkpoint.items()}


def _by_wanted_name(tensors: Mapping[str, Any], wanted: set[str]) -> dict[str, Any]:
    found = same_names(wanted, tensors)
    return {**tensors, **{name: tensors[key] for name, key in found.items() if key is not None}}
