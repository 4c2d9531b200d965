"""Edits and low-rank adapters: an edit as an adapter, and the slices of a weight that has one.

An adapter (LoRA) adds s B A to a weight W of shape (out, in), B of shape (out, r) and A of shape (r, in). Nothing here
imports peft; the files are those that it reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from neuronsurgery.atomic import write_atomically
from neuronsurgery.discovery import is_conv1d
from neuronsurgery.edits import Edit, zero_out
from neuronsurgery.errors import counted, listed
from neuronsurgery.layers import COLUMNS, ROWS, Layer
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.plans import TensorPlan, plan
from neuronsurgery.precision import widened
from neuronsurgery.surveys import Survey, SurveyedTensor, refuse_spread, survey
from neuronsurgery.switches import restoring
from neuronsurgery.wrappers import is_a

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter."""


# An edit as an adapter


class _Factors(NamedTuple):
    """What an adapter adds to a weight: b @ a."""

    b: Tensor
    a: Tensor


@restoring
def save_adapter(edit: Edit, model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, int]:
    """Write an edit of linear layers as a low-rank adapter in the format of peft; return the rank of each layer.

    Of k edited rows an adapter of rank k is made: B says which rows (one 1 in each column), A is the change of each,
    scaled by 1; of edited columns, such as heads, the other way round. In float32, or float64 for a float64 model.
    Loaded and merged into the same weights, a zero-out gives the bits of `bake` in any dtype, since W + (-W) is exactly
    0 (on a GPU not where products of float32 are made in TF32); other edits, and what is not merged, agree to rounding.

    Args:
        edit: what to do; of weights of `nn.Linear` and of transformers' `Conv1D` alone.
        model: whose weights the edit is computed from; not changed.
        folder: for `adapter_config.json` and `adapter_model.safetensors`, made if it is missing. What it has under
            these names is replaced.

    Raises:
        TypeError: if `edit` is not an edit.
        ValueError: if the edit does not fit the model, changes nothing, or changes what an adapter cannot hold (lists
            all, with the reasons).
        OSError: if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> cut = zero_out(select(find_layout(model), {"0.weight": (1, 6)}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(cut, model, folder)  # then peft.PeftModel.from_pretrained(model, folder)
        {'0': 2}

    Source:
        Hu et al., "LoRA: low-rank adaptation of large language models", 2022.
    """
    surveyed = survey(model)
    planned = plan(edit, surveyed).tensors
    refuse_spread({name: surveyed.tensors[name].parameter for name in planned})
    _refuse_unadaptable([surveyed.tensors[name] for name in planned], surveyed)
    factors, transposed = {}, []
    for name, tensor_plan in planned.items():
        tensor = surveyed.tensors[name]
        found = _factors(tensor_plan, tensor.parameter.detach(), is_conv1d(tensor.uses[0].module))
        if found.b.numel():
            factors[name.removesuffix(".weight")] = found
            transposed.append(is_conv1d(tensor.uses[0].module))
    if not factors:
        raise ValueError(f"{edit!r} changes no weight of this model, and an adapter has at least rank 1")
    ranks = {name: found.b.shape[1] for name, found in factors.items()}
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor.cpu().contiguous()
        for name, found in factors.items()
        for side, tensor in (("A", found.a), ("B", found.b))
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_config(ranks), "fan_in_fan_out": all(transposed), "base_model_name_or_path": _name_of(surveyed.model)}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return ranks


def _factors(tensor_plan: TensorPlan, weight: Tensor, transposed: bool) -> _Factors:
    """Return the factors of a weight's change, of as few rows or columns as have one.

    Raises:
        ValueError: if an entry becomes infinite or NaN: so would the whole column when B and A are multiplied.
    """
    with torch.no_grad():
        change = widened(tensor_plan(weight)) - widened(weight)
    if not bool(torch.isfinite(change).all()):
        raise ValueError(f"{tensor_plan.name}: the edit gives numbers that are not finite, which no adapter can hold")
    if transposed:
        change = change.T
    changed = change != 0
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    if len(rows) <= len(columns):
        return _Factors(_one_hot(rows, change.shape[0], change).T, change[rows])
    return _Factors(change[:, columns], _one_hot(columns, change.shape[1], change))


def _one_hot(index: Tensor, count: int, like: Tensor) -> Tensor:
    return nn.functional.one_hot(index, count).to(like.dtype)


def _config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return what peft reads of an adapter; its patterns are regular expressions for the ends of names."""
    largest = max(ranks.values())
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": largest,
        "lora_alpha": largest,  # the scale is alpha / r: 1
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": "|".join(map(re.escape, ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _name_of(model: nn.Module) -> str | None:
    """Return the name or path that a model of transformers was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _refuse_unadaptable(tensors: Iterable[SurveyedTensor], surveyed: Survey) -> None:
    wrong = [f"{tensor.name}: {reason}" for tensor in tensors if (reason := _unadaptable(tensor, surveyed))]
    if wrong:
        raise ValueError(
            f"an adapter cannot hold the edit of {counted(len(wrong), 'tensor')}:\n{listed(wrong)}\nSave the edit "
            f"with save_file, or the edited model with bake"
        )


def _unadaptable(tensor: SurveyedTensor, surveyed: Survey) -> str:
    """Return why an adapter cannot hold an edit of a tensor, or ""."""
    use = tensor.uses[0]
    linear = isinstance(use.module, nn.Linear) or is_conv1d(use.module)
    if not linear or use.attribute != "weight":
        return f"{use.attribute} of {type(use.module).__name__}; an adapter changes weights of linear layers alone"
    if tensor.name == "weight":
        return "the model is this layer, and an adapter is for layers within a model; put it into a Sequential"
    if tensor.parametrized:
        return "computed by a parametrization (an edit of a view?); bake that first"
    if len(tensor.uses) > 1:
        return f"tied ({', '.join(tensor.aliases)}); an adapter of one place would not change the other"
    if _adapter_of(use.module, surveyed) is not None:
        return "within an adapter already; merge that first (merge_and_unload)"
    if any(isinstance(m, nn.MultiheadAttention) and m.out_proj is use.module for m in surveyed.modules):
        return "within a MultiheadAttention, which reads the weight past the adapter"
    return "" if bool(torch.isfinite(tensor.parameter).all()) else "it has entries that are not finite"


# What an adapter adds to


@restoring
def effective(neurons: Neurons, model: nn.Module) -> Neurons:
    """Return neurons with what adapters add to them: the same slices of W and of the factors of W + s B A.

    For each row of a weight with an adapter the row of B, for each column (a head, a unit) the column of A. A
    zero-out or a scale of these is one of the effective weight, merged or not; of the row of W alone it would leave
    what the adapter adds. Neurons without an adapter stay as they are.

    Args:
        neurons: of the weights that adapters are put on, whose names are those of the bare model.
        model: with adapters of peft (LoRA), active or not, merged or not.

    Raises:
        TypeError: if `neurons` are not a set of neurons.
        ValueError: if the neurons do not fit the model, or are of a weight with an adapter of another kind, or neither
            whole rows nor whole columns of it; lists all.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> effective(select(find_layout(model), {"0.weight": 1}), model)  # no adapter here
        1 neuron in 1 layer: 0.weight[1]
    """
    surveyed = survey(model)
    layers = checked_neurons(neurons, "effective").by_layer()
    plan(zero_out(neurons), surveyed)  # which checks that they fit
    names = surveyed.first_names(layer.parameter for layer in layers)
    by_id = {id(parameter): tensor for tensor in surveyed.tensors.values() for parameter in tensor.parameters}
    added, wrong = neurons, []
    for layer, indices in layers.items():
        module = surveyed.tensors[names[layer.parameter]].uses[0].module
        adapter = _adapter_of(module, surveyed)
        if adapter is None:
            continue
        mask = layer.mask(indices).expand(layer.shape)
        mask = mask.T if is_conv1d(module) else mask
        reason = _unfit_adapter(adapter, mask)
        if reason:
            wrong.append(f"{layer.parameter}: {reason}")
            continue
        by_row = bool(mask.all(1).any())
        for factor in (adapter.lora_B if by_row else adapter.lora_A).values():
            tensor = by_id[id(factor.weight)]
            part = Layer(tensor.name, ROWS if by_row else COLUMNS, {}, tuple(factor.weight.shape), tensor.position)
            added |= Neurons({part: mask.any(1 if by_row else 0).nonzero().flatten().tolist()})
    if wrong:
        raise ValueError(
            f"what adapters add to neurons of {counted(len(wrong), 'layer')} cannot be said in neurons:\n"
            f"{listed(wrong)}\nMerge the adapter first (merge_and_unload)"
        )
    return added


def _unfit_adapter(adapter: Any, mask: Tensor) -> str:
    """Return why slices of an adapted weight are not slices of its factors, or ""."""
    if not is_a(adapter, "LoraLayer", "peft.tuners.lora.layer") or not adapter.lora_A:
        return f"its adapter is a {type(adapter).__name__} without factors B and A of a linear layer"
    if getattr(adapter, "lora_variant", None) or adapter.lora_magnitude_vector:
        return "its adapter does more than to add B A (DoRA and the like)"
    whole = torch.equal(mask, mask.all(1, keepdim=True).expand_as(mask)) or torch.equal(
        mask, mask.all(0, keepdim=True).expand_as(mask)
    )
    return "" if whole else "neither whole rows nor whole columns"


def _adapter_of(module: nn.Module, surveyed: Survey) -> Any:
    """Return the adapter that is put on a module, or None."""
    for other in surveyed.modules:
        if is_a(other, "BaseTunerLayer", "peft.tuners.tuners_utils") and other.base_layer is module:
            return other
    return None
