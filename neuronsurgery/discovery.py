"""Where the layers of a model are found, and whether some layers fit another model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list

from neuronsurgery.copies import readable
from neuronsurgery.errors import checked, first, listed, nearest
from neuronsurgery.layers import COLUMNS, GROUPED_COLUMNS, ROWS, Layer
from neuronsurgery.layouts import Layout, matching
from neuronsurgery.surveys import Survey, SurveyedTensor, refuse_unsupported, survey
from neuronsurgery.types import Patterns, Where
from neuronsurgery.wrappers import is_a

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Bilinear),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
"""Modules whose every weight is a layer, even one of a single neuron."""

NOT_A_LAYER = ("*position_bias_table", "pos_embed*", "position*", "*token")
"""Own parameters of custom modules that have two dimensions but are tables or learnt inputs, by their last name."""


PATTERNS = "patterns= is a mapping from globs or names to patterns, not a {}: write {{'fc.weight': 'i n -> n i'}}"


def find_layout(
    model: nn.Module,
    *,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    patterns: Patterns | None = None,
) -> Layout:
    """Return the layers of a model.

    The default takes the weights of Linear, Conv, ConvTranspose, Bilinear, RNN, LSTM, GRU, MultiheadAttention and
    Hugging Face's Conv1D; and, of any other module, its own parameters that keep two or more dimensions when size-1
    ones are dropped, with more than one entry on the output axis, unless their name says that they are position tables
    or tokens. Stacked experts (E, out, in) are E neurons. Parameters owned by an Embedding are left out, a tied head
    too.

    A neuron is an entry of the first dimension, of the second one in transposed convolutions and in Conv1D. A module
    may say otherwise of its own parameters in an attribute `neuron_patterns`, a mapping like `patterns` by the
    parameter's own name: `neuron_patterns = {"weight": "i n -> n i"}`.

    Args:
        model: any module; wrappers (DDP, torch.compile, checkpoints, adapters) are looked through.
        where: a glob, globs, or a predicate (name, module, parameter) -> bool that filters the default set. A tied
            parameter matches by any of its names.
        extra: a glob or globs of parameters to add, 1-D ones included: each of their entries is a neuron of row
            shape ().
        patterns: name or glob of layers -> how to cut them, a pattern or (pattern, sizes), see `Layer`. It adds no
            layer; the first entry that matches counts.

    Raises:
        KeyError: if a glob matches nothing; names the nearest parameters.
        ValueError: if nothing is left, a pattern does not fit, or a layer is on the meta device, quantised, sharded, or
            owned by an old weight-norm hook; lists all.
        TypeError: if the model is no module or cannot be copied (only tried where it is parametrized), or another
            argument is of another kind.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> find_layout(model, extra="*.bias").count
        28
        >>> find_layout(model, where="3.*")
        Layout: 2 neurons in 1 layer
          3.weight: 2 neurons of 8
        >>> find_layout(nn.LSTM(3, 5), patterns={"weight_*": ("(gate unit) i -> unit gate i", {"gate": 4})})
        Layout: 10 neurons in 2 layers
          weight_ih_l0: 5 units of 4x3
          weight_hh_l0: 5 units of 4x5
    """
    surveyed = survey(model)
    return layout_of(surveyed, readable(surveyed), where=where, extra=extra, patterns=patterns)


def layout_of(
    surveyed: Survey,
    values: Mapping[str, Tensor],
    *,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    patterns: Patterns | None = None,
) -> Layout:
    """Return the layers of a surveyed model whose tensors, parametrized ones computed, are at hand: see `find_layout`.

    Args:
        surveyed: the model.
        values: its tensors by first name.
        where: see `find_layout`.
        extra: see `find_layout`.
        patterns: see `find_layout`.
    """
    tensors = list(surveyed.tensors.values())
    chosen = [tensor for tensor in tensors if _is_layer(tensor, values[tensor.name])]
    if where is not None:
        chosen = _filter(chosen, values, where)
    if extra is not None:
        wanted = _globbed([tensor for tensor in tensors if _has_rows(values[tensor.name])], extra)
        wanted |= {tensor.name for tensor in chosen}
        chosen = [tensor for tensor in tensors if tensor.name in wanted]
    if not chosen:
        raise ValueError(
            f"no layer found in {type(surveyed.model).__name__}: it has no weight of two or more dimensions outside "
            f"embeddings; name what you want with extra="
        )
    refuse_unsupported(chosen)
    by_hand = _by_hand(chosen, checked({} if patterns is None else patterns, Mapping, PATTERNS))
    return Layout(
        _layers(chosen, values, by_hand), tuple((a, tensor.name) for tensor in chosen for a in tensor.aliases)
    )


def given_layout(
    surveyed: Survey,
    values: Mapping[str, Tensor],
    layout: Layout | None,
    where: Where | None,
    extra: str | Sequence[str] | None,
) -> Layout:
    """Return the layout that a caller gives, once it fits the model, or the one that `where` and `extra` describe.

    Raises:
        TypeError: if the layout is none.
        ValueError: if both are given, or the layout does not fit the model; lists every mismatch.
    """
    if layout is None:
        return layout_of(surveyed, values, where=where, extra=extra)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout= is what find_layout returns, not a {type(layout).__name__}")
    if where is not None or extra is not None:
        raise ValueError("layout= says already which layers: give where= and extra= to find_layout instead")
    refuse_unfit(layout.layers, surveyed, values, "the layout does not fit the model")
    return layout


def refuse_unfit(layers: Sequence[Layer], surveyed: Survey, values: Mapping[str, Tensor] | None, what: str) -> None:
    """Raise one error that lists every layer that a model does not have, has in another shape, or cannot have edited.

    Args:
        layers: the layers.
        surveyed: the model.
        values: its tensors by first name, parametrized ones computed; None where no parametrized one is touched.
        what: how the message begins.

    Raises:
        ValueError: if there is such a layer.
    """
    found = surveyed.first_names(layer.parameter for layer in layers)
    wrong = []
    for layer in layers:
        if layer.parameter not in found:
            wrong.append(f"{layer.parameter}: not in the model{nearest(layer.parameter, surveyed.names)}")
            continue
        tensor = surveyed.tensors[found[layer.parameter]]
        value = tensor.parameter if values is None else values[tensor.name]
        if not isinstance(value, UninitializedTensorMixin) and tuple(value.shape) != layer.shape:
            wrong.append(f"{layer.parameter}: expected shape {layer.shape}, the model has {tuple(value.shape)}")
    if wrong:
        raise ValueError(
            f"{what}, {len(wrong)} mismatched:\n{listed(wrong)}\nThey were made for another model or another version "
            f"of it: select or score them again on this one"
        )
    refuse_unsupported(surveyed.tensors[name] for name in found.values())


def _has_rows(value: Tensor) -> bool:
    """Return whether it has a first dimension; one that is not yet initialised is refused later."""
    return isinstance(value, UninitializedTensorMixin) or value.dim() > 0


def _is_layer(tensor: SurveyedTensor, value: Tensor) -> bool:
    module, attribute, _ = tensor.uses[0]
    if any(attribute in getattr(module, "neuron_patterns", ()) for module, attribute, _ in tensor.uses):
        return True
    if any(isinstance(use.module, nn.Embedding | nn.EmbeddingBag) for use in tensor.uses):
        return False
    if isinstance(value, UninitializedTensorMixin):
        return isinstance(module, WEIGHTED) and "bias" not in attribute
    shape = value.shape
    if len([size for size in shape if size > 1]) >= 2 and shape[_axis(module, attribute, len(shape))] > 1:
        return isinstance(module, WEIGHTED) or not any(fnmatch.fnmatchcase(attribute, glob) for glob in NOT_A_LAYER)
    # A weight of one neuron or of one input is a layer all the same, in a module whose weights are known.
    return (isinstance(module, WEIGHTED) or is_conv1d(module)) and len(shape) >= 2 and "bias" not in attribute


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is Hugging Face's Conv1D, a linear layer stored (in, out), without importing transformers."""
    return is_a(module, "Conv1D", "transformers.pytorch_utils")


def _axis(module: nn.Module, attribute: str, dims: int) -> int:
    if isinstance(module, TRANSPOSED) and attribute == "weight":
        return 1
    return 1 if is_conv1d(module) and attribute == "weight" and dims == 2 else 0


def _layers(
    tensors: Iterable[SurveyedTensor],
    values: Mapping[str, Tensor],
    by_hand: Mapping[str, tuple[str, Mapping[str, int]]],
) -> tuple[Layer, ...]:
    """Return the layers of some tensors.

    Raises:
        ValueError: if a pattern does not fit; lists all that do not.
    """
    layers, wrong = [], []
    for tensor in tensors:
        shape = tuple(values[tensor.name].shape)
        pattern, sizes = by_hand.get(tensor.name) or _declared(tensor) or _default_pattern(tensor, len(shape))
        try:
            layers.append(Layer(tensor.name, pattern, sizes, shape, tensor.position))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(first(wrong)))
    return tuple(layers)


def _default_pattern(tensor: SurveyedTensor, dims: int) -> tuple[str, Mapping[str, int]]:
    module, attribute, _ = tensor.uses[0]
    if _axis(module, attribute, dims) == 0:
        return ROWS, {}
    if isinstance(module, TRANSPOSED) and module.groups > 1:
        return GROUPED_COLUMNS, {"g": module.groups}
    return COLUMNS, {}


def _declared(tensor: SurveyedTensor) -> tuple[str, Mapping[str, int]] | None:
    """Return how the module that holds a tensor says that it is cut, if it does."""
    for module, attribute, _ in tensor.uses:
        patterns = getattr(module, "neuron_patterns", {})
        if attribute in patterns:
            return _with_sizes(patterns[attribute])
    return None


def _with_sizes(said: str | tuple[str, Mapping[str, int]]) -> tuple[str, Mapping[str, int]]:
    return (said, {}) if isinstance(said, str) else (said[0], said[1])


def _by_hand(tensors: Sequence[SurveyedTensor], patterns: Patterns) -> dict[str, tuple[str, Mapping[str, int]]]:
    found: dict[str, tuple[str, Mapping[str, int]]] = {}
    for glob, said in patterns.items():
        for name in _globbed(tensors, glob, "; patterns= adds no layer, extra= does"):
            found.setdefault(name, _with_sizes(said))
    return found


def _filter(tensors: list[SurveyedTensor], values: Mapping[str, Tensor], where: Where) -> list[SurveyedTensor]:
    if not callable(where) or isinstance(where, nn.Module):
        names = _globbed(tensors, where)
        return [tensor for tensor in tensors if tensor.name in names]
    kept = [tensor for tensor in tensors if where(tensor.name, tensor.uses[0].module, values[tensor.name])]
    if not kept:
        raise ValueError(f"the predicate where= keeps none of the {len(tensors)} layers")
    return kept


def _globbed(tensors: Sequence[SurveyedTensor], globs: Any, hint: str = "") -> set[str]:
    """Return the first names of the tensors that a glob or globs match by any of their names."""
    names = {name: tensor.name for tensor in tensors for name in (tensor.name, *tensor.aliases)}
    kept: set[str] = set()
    every = list(globs) if isinstance(globs, Iterable) and not isinstance(globs, str) else [globs]
    wrong = sorted({type(glob).__name__ for glob in every if not isinstance(glob, str)})
    if wrong:
        raise TypeError(
            f"layers are chosen by a glob or several, not by a {', '.join(wrong)}; give a Layout as layout=, and "
            f"neurons to an edit"
        )
    for glob in every:
        matched = matching(glob, names)
        if not matched:
            raise KeyError(f"no layer matches '{glob}'{nearest(glob, names)}{hint}")
        kept |= {names[name] for name in matched}
    return kept
