"""Edits: small frozen values that say which neurons change and how.

Every edit is one pure function `rows(layer, indices, weight) -> new rows`. It may read the whole weight as it stands,
writes only its rows, computes in float32 (float64 for float64) and rounds to the weight's dtype. What it draws or reads
from a checkpoint (`constants`) can be had once and handed in again, so that a view does not draw at every forward pass.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.neurons import Layer, LayerNeurons, Neurons, nearest, random_bits
from neuronsurgery.scores import checked_seed

Constants: TypeAlias = "Tensor | None"
Checkpoint: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""A safetensors file, a state dict saved by torch, or a mapping of tensors."""


class Edit(ABC):
    """A frozen value: some neurons and what becomes of them.

    Attributes:
        neurons: the neurons that change.
    """

    neurons: Neurons

    def constants(self, part: LayerNeurons) -> Constants:
        """Return what the edit draws or reads for these neurons, shape (k, *row_shape), float32, or None."""
        return None

    @abstractmethod
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return the new rows of some neurons.

        Args:
            layer: the layer.
            indices: the neurons' indices, int64, shape (k,).
            weight: the layer's parameter as it stands.
            constants: what `constants` gave for them, to save drawing or reading again.

        Returns:
            The rows, shape (k, *row_shape), in the dtype of `weight`.
        """


def leaves(edit: Edit) -> tuple[Edit, ...]:
    """Return the edits that an edit is composed of, in order: itself, unless it was composed."""
    if not isinstance(edit, Edit):
        raise TypeError(
            f"an edit is made by zero_out, scale, random_init, random_noise, rewind or compose, not a "
            f"{type(edit).__name__}: write for instance zero_out(topk(scores, 3))"
        )
    return edit.edits if isinstance(edit, Compose) else (edit,)


# The edits


@dataclass(frozen=True, repr=False)
class ZeroOut(Edit):
    """See `zero_out`."""

    neurons: Neurons

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return zeros; never by multiplication, since 0 * NaN is NaN."""
        return weight.new_zeros((len(indices), *layer.row_shape))

    def __repr__(self) -> str:
        return f"zero_out({self.neurons})"


@dataclass(frozen=True, repr=False)
class Scale(Edit):
    """See `scale`."""

    neurons: Neurons
    factor: float

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return factor * z."""
        return (self.factor * _wide(layer, indices, weight)).to(weight.dtype)

    def __repr__(self) -> str:
        return f"scale({self.neurons}, factor={self.factor:g})"


@dataclass(frozen=True, repr=False)
class RandomEdit(Edit):
    """An edit that draws one standard normal number per entry, scaled by `std` or relative to what stands there."""

    neurons: Neurons
    seed: int
    std: float | None = None
    relative_std: float | None = None

    @override
    def constants(self, part: LayerNeurons) -> Constants:
        """Return one standard normal draw per entry."""
        return draws(self.seed, part)


@dataclass(frozen=True, repr=False)
class RandomInit(RandomEdit):
    """See `random_init`."""

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return s * e, e a standard normal draw, s absolute or relative to the root mean square of the layer."""
        drawn = _drawn(self, layer, indices, weight, constants)
        return (_scale(self, weight.reshape(1, -1)).squeeze() * drawn).to(weight.dtype)

    def __repr__(self) -> str:
        return f"random_init({self.neurons}, {_scale_text(self)}, seed={self.seed})"


@dataclass(frozen=True, repr=False)
class RandomNoise(RandomEdit):
    """See `random_noise`."""

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return z + s * e, e a standard normal draw, s absolute or relative to the root mean square of z."""
        drawn = _drawn(self, layer, indices, weight, constants)
        old = _wide(layer, indices, weight)
        return (old + _scale(self, old) * drawn).to(weight.dtype)

    def __repr__(self) -> str:
        return f"random_noise({self.neurons}, {_scale_text(self)}, seed={self.seed})"


@dataclass(frozen=True, repr=False)
class Rewind(Edit):
    """See `rewind`. Equal are rewinds of the same neurons by the same share to the same values, wherever these lie."""

    neurons: Neurons
    alpha: float
    digest: str
    path: str | None = field(default=None, compare=False)
    kept: tuple[Tensor, ...] | None = field(default=None, compare=False)

    def load(self) -> Rewind:
        """Return this edit with its rows in memory, read from its file and checked where it keeps only a path.

        Raises:
            FileNotFoundError: if the file is gone.
            ValueError: if the rows in it are no longer those that the edit was made with.
        """
        if self.kept is not None:
            return self
        rows = _checkpoint_rows(self.neurons, str(self.path))
        if _digest(self.neurons, rows) != self.digest:
            raise ValueError(
                f"the rows of {self.neurons} in {self.path} are no longer those that this rewind was made with: make "
                f"it again with rewind(neurons, path), or give the original file back"
            )
        return Rewind(self.neurons, self.alpha, self.digest, self.path, rows)

    @override
    def constants(self, part: LayerNeurons) -> Constants:
        """Return the rows of the checkpoint."""
        loaded = self.load()
        own = {kept.layer.parameter: rows for kept, rows in zip(self.neurons.parts, loaded.kept or (), strict=True)}
        position = {index: i for i, index in enumerate(self.neurons.by_layer()[part.layer.parameter])}
        return own[part.layer.parameter][[position[index] for index in part.indices]]

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return z + alpha (z' - z), exactly z' for alpha = 1."""
        if constants is None:
            constants = self.constants(LayerNeurons(layer, tuple(indices.tolist())))
        assert constants is not None
        then = constants.to(weight.device)
        if self.alpha == 1:
            return then.to(weight.dtype)
        old = _wide(layer, indices, weight)
        return (old + self.alpha * (then.to(old.dtype) - old)).to(weight.dtype)

    def __repr__(self) -> str:
        source = self.path if self.path is not None else f"{self.digest[:12]}..."
        return f"rewind({self.neurons}, {source}, alpha={self.alpha:g})"


@dataclass(frozen=True, repr=False)
class Compose(Edit):
    """See `compose`."""

    edits: tuple[Edit, ...]

    @property
    def neurons(self) -> Neurons:  # type: ignore[override]
        """The neurons of all of the edits."""
        united = Neurons()
        for edit in self.edits:
            united |= edit.neurons
        return united

    @override
    def rows(self, layer: Layer, indices: Tensor, weight: Tensor, constants: Constants = None) -> Tensor:
        """Return the rows after all of the edits, from left to right."""
        rows = layer.rows(weight)
        for edit in self.edits:
            touched = edit.neurons.by_layer().get(layer.parameter, ())
            kept = torch.tensor([i for i in indices.tolist() if i in touched], device=weight.device, dtype=torch.int64)
            if len(kept):
                rows = rows.index_copy(0, kept, edit.rows(layer, kept, layer.weight(rows)))
        return rows.index_select(0, indices)

    def __repr__(self) -> str:
        shown = [repr(edit) for edit in self.edits[:6]]
        if len(self.edits) > 6:
            shown.append(f"... {len(self.edits) - 6} more")
        return f"compose({', '.join(shown)})"


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
    return ZeroOut(_checked(neurons))


def scale(neurons: Neurons, factor: float) -> Scale:
    """Return the edit z -> factor * z.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if `factor` is not finite.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> scale(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), 0.5)
        scale(1 neuron in 1 layer: weight[0], factor=0.5)
    """
    return Scale(_checked(neurons), _finite("factor", factor))


def random_init(
    neurons: Neurons, *, std: float | None = None, relative_std: float | None = None, seed: int
) -> RandomInit:
    """Return the edit z -> e, e ~ N(0, s^2).

    Args:
        neurons: which neurons.
        std: s, absolute.
        relative_std: s relative to the root mean square of the whole layer as it stands. Exactly one of the two.
        seed: the draw for a neuron depends on (seed, layer name, index) alone, on any device and in any company.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if not exactly one scale is given, or a scale or the seed is out of range.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> random_init(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), std=0.02, seed=1)
        random_init(1 neuron in 1 layer: weight[0], std=0.02, seed=1)

    Source:
        You et al., "The Silent Majority", 2025.
    """
    return RandomInit(_checked(neurons), checked_seed(seed), *_one_scale(std, relative_std))


def random_noise(
    neurons: Neurons, *, std: float | None = None, relative_std: float | None = None, seed: int
) -> RandomNoise:
    """Return the edit z -> z + e, e ~ N(0, s^2).

    Args:
        neurons: which neurons.
        std: s, absolute.
        relative_std: s relative to the root mean square of that row. Exactly one of the two.
        seed: the draw for a neuron depends on (seed, layer name, index) alone, on any device and in any company.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if not exactly one scale is given, or a scale or the seed is out of range.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> random_noise(select(find_layout(torch.nn.Linear(3, 2)), {"weight": 0}), relative_std=0.5, seed=1)
        random_noise(1 neuron in 1 layer: weight[0], relative_std=0.5, seed=1)

    Source:
        You et al., "The Silent Majority", 2025.
    """
    return RandomNoise(_checked(neurons), checked_seed(seed), *_one_scale(std, relative_std))


def rewind(neurons: Neurons, checkpoint: Checkpoint, alpha: float = 1.0) -> Rewind:
    """Return the edit z -> z + alpha (z' - z), z' the same row in a checkpoint; exactly z' for alpha = 1.

    Args:
        neurons: which neurons.
        checkpoint: the path of a safetensors file or of a state dict saved by torch, or a mapping of tensors. Prefixes
            `module.` and `_orig_mod.` and a nested `state_dict` or `model` entry are understood. Of a path the edit
            keeps path and digest and reads the rows again when it is applied; of a mapping it keeps its rows.
        alpha: the share of the way back; 0 changes nothing.

    Raises:
        TypeError: if `neurons` are not a set of neurons, or the checkpoint is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, a layer is missing in it or has another shape (lists all), or `alpha` is not
            finite.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> then = torch.nn.Linear(3, 2)
        >>> rewind(select(find_layout(then), {"weight": 0}), then.state_dict(), alpha=0.5)  # doctest: +ELLIPSIS
        rewind(1 neuron in 1 layer: weight[0], ...

    Source:
        Zhang et al., "Are all layers created equal?", 2019; You et al., "The Silent Majority", 2025.
    """
    neurons = _checked(neurons)
    alpha = _finite("alpha", alpha)
    rows = _checkpoint_rows(neurons, checkpoint)
    digest = _digest(neurons, rows)
    if isinstance(checkpoint, Mapping):
        return Rewind(neurons, alpha, digest, kept=rows)
    return Rewind(neurons, alpha, digest, path=os.fspath(checkpoint))


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


# Draws


def draws(seed: int, part: LayerNeurons) -> Tensor:
    """Return standard normal draws for some neurons, shape (k, *row_shape), float32, on the CPU.

    The draw for a neuron is a function of (seed, layer name, index): a 128-bit key from their SHA-256, the raw stream
    of the counter-based generator Philox, and the transform of Box and Muller in float64.
    """
    size = math.prod(part.layer.row_shape)
    drawn = np.empty((len(part.indices), size), dtype=np.float32)
    for row, index in enumerate(part.indices):
        drawn[row] = _normals(f"{seed}\0{part.layer.parameter}\0{index}", size)
    return torch.from_numpy(drawn).reshape(len(part.indices), *part.layer.row_shape)


def _normals(key: str, size: int) -> np.ndarray:
    pairs = (size + 1) // 2
    uniform = (random_bits(key, 2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # 1 - u lies in (0, 1], so the logarithm is finite.
    radius = np.sqrt(-2.0 * np.log1p(-uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:size]


def _drawn(edit: RandomEdit, layer: Layer, indices: Tensor, weight: Tensor, given: Constants) -> Tensor:
    drawn = draws(edit.seed, LayerNeurons(layer, tuple(indices.tolist()))) if given is None else given
    return drawn.to(weight.device, _wide_dtype(weight))


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _wide(layer: Layer, indices: Tensor, weight: Tensor) -> Tensor:
    """Return the rows as they stand in float32, or float64 for float64."""
    return layer.rows(weight).index_select(0, indices).to(_wide_dtype(weight))


def _scale(edit: RandomEdit, rows: Tensor) -> Tensor:
    """Return the scale of each row's draw, relative to its root mean square, a constant for autograd; (k, 1, ...)."""
    flat = rows.detach().reshape(len(rows), -1).to(_wide_dtype(rows))
    root_mean_square = flat.square().mean(1).sqrt().reshape(-1, *[1] * (rows.dim() - 1))
    if edit.relative_std is None:
        return torch.full_like(root_mean_square, edit.std or 0.0)
    return edit.relative_std * root_mean_square


# Checkpoints


def _checkpoint_rows(neurons: Neurons, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Return copies of the rows of each touched layer; raises one error that lists every layer that is not there."""
    names = [part.layer.parameter for part in neurons.parts]
    tensors = _read(checkpoint, names)
    rows, wrong = [], []
    for part in neurons.parts:
        layer = part.layer
        tensor = tensors.get(layer.parameter, tensors.get(_bare_name(layer.parameter)))
        if not isinstance(tensor, Tensor):
            wrong.append(f"  {layer.parameter}: not in the checkpoint{nearest(layer.parameter, tensors)}")
            continue
        expected = layer.weight(torch.empty((layer.count, *layer.row_shape), device="meta")).shape
        if tensor.shape != expected:
            wrong.append(
                f"  {layer.parameter}: expected shape {tuple(expected)}, the checkpoint has {tuple(tensor.shape)}"
            )
            continue
        index = torch.tensor(part.indices, device=tensor.device)
        rows.append(layer.rows(tensor.detach()).index_select(0, index).cpu().clone())
    if wrong:
        where = "the given mapping" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
        raise ValueError(
            f"{len(wrong)} layers cannot be rewound to {where}:\n"
            + "\n".join(wrong)
            + "\nGive a checkpoint of this model"
        )
    return tuple(rows)


def _read(checkpoint: Checkpoint, names: Iterable[str]) -> Mapping[str, Any]:
    """Return the checkpoint's tensors by name; of a safetensors file only the values of `names` are read."""
    if isinstance(checkpoint, Mapping):
        return _by_name(checkpoint)
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
            wanted = {known for name in names for known in (name, _bare_name(name))}
            keys = _with_bare_names({key: key for key in file.keys()})  # noqa: SIM118  # not a mapping
            return {name: file.get_tensor(key) if name in wanted else None for name, key in keys.items()}
    except safetensors.SafetensorError as not_safetensors:
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is no readable safetensors file ({not_safetensors}): write it again") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is neither a safetensors file nor a state dict that torch.load(weights_only=True) reads: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    return _by_name(loaded)


def _by_name(tensors: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("state_dict", "model"):
        if isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    return _with_bare_names({str(name): tensor for name, tensor in tensors.items()})


def _with_bare_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries under their own names and without wrappers' prefixes; a part may be called "module" too."""
    return {_bare_name(name): entry for name, entry in entries.items()} | dict(entries)


def _bare_name(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")


def _digest(neurons: Neurons, rows: Iterable[Tensor]) -> str:
    said = hashlib.sha256()
    for part, tensor in zip(neurons.parts, rows, strict=True):
        said.update(f"{part.layer.parameter}\0{part.indices}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        said.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return said.hexdigest()


# Checks


def _checked(neurons: Neurons) -> Neurons:
    if not isinstance(neurons, Neurons):
        raise TypeError(
            f"an edit takes a set of Neurons, not a {type(neurons).__name__}: choose them with topk, top_fraction, "
            f"sample or select"
        )
    return neurons


def _finite(name: str, value: float) -> float:
    if not isinstance(value, float | int | np.number):
        raise TypeError(f"{name} must be a finite number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    return float(value)


def _one_scale(std: float | None, relative_std: float | None) -> tuple[float | None, float | None]:
    if (std is None) == (relative_std is None):
        raise ValueError(f"give exactly one of std= and relative_std=, not std={std}, relative_std={relative_std}")
    for name, value in (("std", std), ("relative_std", relative_std)):
        if value is not None and _finite(name, value) < 0:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
    return (
        None if std is None else float(std),
        None if relative_std is None else float(relative_std),
    )


def _scale_text(edit: RandomEdit) -> str:
    return f"std={edit.std:g}" if edit.std is not None else f"relative_std={edit.relative_std:g}"
