"""The only stateful edge: views of a model under an edit, and edits baked into a copy.

`plan` checks an edit against a model once, with every error there is; a `LayerPlan` is then one pure function of a
weight. The parametrization of a view, `bake`, `edited_parameters` and the sweep all call that same function, so they
agree bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from neuronsurgery.edits import Edit, Rewind, leaves
from neuronsurgery.neurons import Layer, touched_layout
from neuronsurgery.structure import (
    TENSOR_ORDER,
    Buffers,
    NamedTensor,
    bare,
    copy_structure,
    held_elsewhere,
    named_tensors,
    own_class,
    parametrizations,
    plain,
    take_off,
    tensors_in_attributes,
)

SHARED = (
    "this view shares its weights with the model it was made from: convert the model and apply again, or use bake for "
    "an independent copy"
)


# Plans: edits checked against a model


@dataclass(frozen=True, eq=False)
class Step:
    """One edit of one layer, ready to run: its indices and constants are on the device that the weight had."""

    edit: Edit
    indices: Tensor
    constants: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What an edit does to one layer: a pure function of its weight.

    Attributes:
        layer: the layer as the model has it.
        steps: the edits from left to right.
        trainable: whether the weight is computed by a parametrization from a parameter that requires a gradient.
    """

    layer: Layer
    steps: tuple[Step, ...]
    trainable: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the edited weight: the same shape, dtype and strides, all other rows bit for bit as they were."""
        rows = self.layer.rows(weight)
        for step in self.steps:
            # A deep copy of a view may have gone to another device, and no module holds these to take them along.
            indices = step.indices.to(weight.device)
            constants = None if step.constants is None else step.constants.to(weight.device)
            new = step.edit.rows(self.layer, indices, self.layer.weight(rows), constants)
            rows = rows.index_copy(0, indices, new)
        edited = self.layer.weight(rows)
        if edited.stride() != weight.stride() and 0 not in weight.stride():
            # Kernels, and so the last bits of their results, are chosen by the strides.
            strided = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
            edited = strided.copy_(edited)
        if not torch.is_grad_enabled() and (weight.requires_grad or self.trainable):
            # matmul folds its batch, and so changes the last bits, where this flag is set, also without a graph.
            return nn.Parameter(edited)
        return edited


@torch.inference_mode(mode=False)  # what it makes outlives the caller's mode
def plan(edit: Edit, model: nn.Module) -> dict[str, LayerPlan]:
    """Return what an edit does to each layer of a model that it touches, by the layer's first name in the model.

    Draws are made and checkpoints read here, once.

    Raises:
        TypeError: if `edit` is not an edit or `model` not a module.
        ValueError: if the edit does not fit the model; lists every mismatch.
    """
    parts = leaves(edit)
    layout = touched_layout(model, edit.neurons)
    tensors = named_tensors(model)
    steps: dict[str, list[Step]] = {}
    for leaf in parts:
        loaded = leaf.load() if isinstance(leaf, Rewind) else leaf
        for part in leaf.neurons.parts:
            name = layout[part.layer.parameter].parameter
            constants = loaded.constants(part)
            device = tensors[name].parameter.device
            steps.setdefault(name, []).append(
                Step(
                    loaded,
                    torch.tensor(part.indices, device=device),
                    None if constants is None else constants.to(device),
                )
            )
    plans = {}
    for layer in layout:
        tensor = tensors[layer.parameter]
        plans[layer.parameter] = LayerPlan(
            layer, tuple(steps[layer.parameter]), tensor.parametrized and tensor.trainable
        )
    return plans


class EditedRows(nn.Module):
    """The parametrization of a view: the edited weight as a function of the shared one."""

    def __init__(self, layer_plan: LayerPlan) -> None:
        super().__init__()
        self.plan = layer_plan

    def forward(self, weight: Tensor) -> Tensor:
        """Return the edited weight."""
        return self.plan(weight)

    def extra_repr(self) -> str:
        """Return the edits in words."""
        return ", ".join(repr(step.edit) for step in self.plan.steps)


# The three ways to apply


def apply(edit: Edit, model: nn.Module, *, buffers: Buffers = "own") -> nn.Module:
    """Return a view of the model under an edit: a new module of the same classes that shares its parameters.

    `model` is not changed, and no weight is copied: the edited weights are computed from the shared ones at every
    forward pass. So training the view trains the shared weights, the rows that an edit hides getting no gradient where
    it replaces them (an optimiser with weight decay or momentum moves them all the same). `apply(b, apply(a, m))`
    equals `apply(compose(a, b), m)`; parametrizations that the model has stay and come first.

    `train()` and `eval()` are the view's own. `requires_grad_` and `zero_grad` reach the shared parameters, and hooks
    are shared and fire in both. A wrapper (DDP, torch.compile) is taken off: the result is a view of the bare module.
    What would change the original is refused: conversion (`.to`, `.half` ...), `load_state_dict`, and assigning an
    edited tensor. `state_dict` has torch's names for parametrized tensors; for a plain checkpoint use `bake`. A deep
    copy of a view is independent of the model and keeps the edit.

    Args:
        edit: what to do, see `zero_out`, `scale`, `random_init`, `random_noise`, `rewind`, `compose`.
        model: any module.
        buffers: "own" copies the buffers (batch norm's statistics) at the call, "shared" shares them.

    Raises:
        TypeError: if `edit` is not an edit, or an attribute of a module cannot be copied; names module and attribute.
        ValueError: if the edit does not fit the model (lists every mismatch), if `buffers` is unknown, or if a touched
            parameter is also held where an edit would not reach it.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 3)
        >>> view = apply(zero_out(select(find_layout(model), {"weight": 1})), model)
        >>> view.weight[1].tolist(), view.bias is model.bias
        ([0.0, 0.0], True)
        >>> view.half()
        Traceback (most recent call last):
        ...
        RuntimeError: this view shares its weights with the model it was made from: convert the model and apply \
again, or use bake for an independent copy

    Source:
        You et al., "The Silent Majority", 2025 (the masked model f(m * theta)).
    """
    if buffers not in ("own", "shared"):
        raise ValueError(f"buffers must be 'own' or 'shared', not {buffers!r}")
    plans = plan(edit, model)
    refuse_unreachable(plans, held_elsewhere(model))
    view = copy_structure(model, buffers=buffers)
    tensors = named_tensors(view)
    for name, layer_plan in plans.items():
        _parametrize(tensors[name], EditedRows(layer_plan))
    for module in view.modules():
        for method in ("_apply", "load_state_dict", "_load_from_state_dict"):
            module.__dict__[method] = _Refusal(module, method)
    return view


@torch.inference_mode(mode=False)  # its weights outlive the caller's mode
def bake(edit: Edit, model: nn.Module) -> nn.Module:
    """Return an independent, plain copy of the model with the edit in its own weights.

    Its `state_dict` has the original's keys, but that a parametrization is taken off the edited tensors (the edits of a
    view always are). Parameters, buffers and flags are copies; hooks are shared.

    Args:
        edit: what to do.
        model: any module, a view too; wrappers are taken off.

    Raises:
        TypeError: if `edit` is not an edit, or an attribute of a module cannot be copied; names module and attribute.
        ValueError: if the edit does not fit the model; lists every mismatch.

    Example:
        >>> from neuronsurgery import find_layout, scale, select
        >>> model = nn.Linear(2, 3)
        >>> baked = bake(scale(select(find_layout(model), {"weight": ...}), 2.0), model)
        >>> torch.equal(baked.weight, 2 * model.weight), list(baked.state_dict())
        (True, ['weight', 'bias'])
    """
    plans = plan(edit, model)
    tensors = named_tensors(model)
    readable = named_tensors(plain(model))
    values = {}
    for name, tensor in tensors.items():
        if name in plans or _is_view_of(tensor):
            weight = readable[name].parameter.detach()
            edited = plans[name](weight) if name in plans else weight.clone()
            values[name] = nn.Parameter(edited, requires_grad=readable[name].parameter.requires_grad)
    replace = {id(parameter): _own(parameter) for parameter in _every_parameter(model)}
    replace |= {id(tensors[name].parameter): value for name, value in values.items() if not tensors[name].parametrized}
    baked = copy_structure(model, replace=replace)
    for name, tensor in named_tensors(baked).items():
        if tensor.parametrized and name in values:
            for module, attribute in tensor.uses:
                take_off(module, attribute, values[name])
    for module in baked.modules():
        _release(module)
    return baked


def edited_parameters(edit: Edit, model: nn.Module) -> dict[str, Tensor]:
    """Return the edited tensors alone, by their names in the bare model, for `torch.func.functional_call`.

    They are functions of the model's parameters: gradients flow through them.

    Args:
        edit: what to do.
        model: any module; give `functional_call` the bare one.

    Raises:
        TypeError: if `edit` is not an edit.
        ValueError: if the edit does not fit the model (lists every mismatch), an edited tensor is also held by a plain
            attribute, or is parametrized or in a module that has several names: `functional_call` would overwrite the
            caller's weights.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 3)
        >>> edited = edited_parameters(zero_out(select(find_layout(model), {"weight": ...})), model)
        >>> output = torch.func.functional_call(model, edited, torch.ones(1, 2))
        >>> torch.equal(output[0], model.bias)
        True
    """
    plans = plan(edit, model)
    refuse_unreachable(plans, held_elsewhere(model))
    tensors = named_tensors(model)
    wrong = [name for name in plans if tensors[name].parametrized]
    if wrong:
        raise ValueError(
            f"parametrized tensors cannot be passed to functional_call under their plain names, it would overwrite the "
            f"model's weights: {', '.join(wrong)}; bake the edit first, bake(edit, model)"
        )
    # functional_call swaps such a tensor once for each name, and puts the edited one back in the end.
    wrong = [name for name in plans if 1 + len(tensors[name].aliases) > len(tensors[name].uses)]
    if wrong:
        raise ValueError(
            f"functional_call would overwrite the tensors of a module that is in the model under several names: "
            f"{', '.join(wrong)}; bake the edit, bake(edit, model), or use a view, apply(edit, model)"
        )
    return {name: layer_plan(tensors[name].parameter) for name, layer_plan in plans.items()}


# The edge


def _parametrize(tensor: NamedTensor, edited: EditedRows) -> None:
    """Put an edit on every use of one tensor of a copy, the uses sharing one list of parametrizations."""
    module, attribute = tensor.uses[0]
    if tensor.parametrized:
        register_parametrization(module, attribute, edited, unsafe=True)
        return
    shared = tensor.parameter
    held = None
    for module, attribute in tensor.uses:
        # torch calls set_ on the parameter it registers on, which breaks a pending backward pass and DDP's hooks.
        # So it is given an empty stand-in, and the shared parameter takes that one's place afterwards.
        module._parameters[attribute] = nn.Parameter(torch.empty(0, dtype=shared.dtype, device=shared.device))
        register_parametrization(module, attribute, edited, unsafe=True)
        if held is None:
            held = parametrizations(module)[attribute]
            held._parameters["original"] = shared  # type: ignore[assignment]  # a Parameter, since it is not computed
            held.training = module.training
        every: nn.Module = module._modules["parametrizations"]  # type: ignore[assignment]  # just registered
        every._modules[attribute] = held
        every.training = module.training
        made_by_torch = type(module)
        own_class(module)
        # Its property holds the module, in a cycle, and a view is to be freed as soon as it is dropped.
        delattr(made_by_torch, attribute)


def refuse_unreachable(plans: Mapping[str, LayerPlan], held: Mapping[str, str]) -> None:
    """Raise if an edited parameter is also held by a plain attribute, whose use an edit would not reach.

    Args:
        plans: what is edited, by the first name in the model.
        held: see `structure.held_elsewhere`.

    Raises:
        ValueError: if there is one; names it and the module.
    """
    for name in plans:
        if name in held:
            raise ValueError(
                f"{name} is also held by a plain attribute of {held[name]}, where an edit of the view would not reach "
                f"it: use bake, which does"
            )


class _Refusal:
    """Stands in the instance of a view's module for a method that would change the shared weights.

    An attribute of the instance, so that the module keeps its class; a weak reference, so that a view is freed as soon
    as it is dropped. In a deep copy, which owns its weights, the method works again.
    """

    def __init__(self, module: nn.Module, method: str, *, shared: bool = True) -> None:
        self.module = weakref.ref(module)
        self.method = method
        self.shared = shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared:
            raise RuntimeError(SHARED)
        module = self.module()
        method: Callable[..., Any] = getattr(type(module), self.method)
        return method(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        copied = memo.get(id(self.module()))
        return self if copied is None else _Refusal(copied, self.method, shared=False)


def _is_view_of(tensor: NamedTensor) -> bool:
    """Return whether the tensor is computed by an edit of a view."""
    module, attribute = tensor.uses[0]
    return tensor.parametrized and any(isinstance(step, EditedRows) for step in parametrizations(module)[attribute])


def _every_parameter(model: nn.Module) -> list[nn.Parameter]:
    """Return the model's parameters and those that its modules' plain attributes hold."""
    modules = list(bare(model).modules())
    known = {id(module): None for module in modules}
    held = [tensor for module in modules for tensor in tensors_in_attributes(module, known)]
    return [*model.parameters(), *(tensor for tensor in held if isinstance(tensor, nn.Parameter))]


def _own(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _release(module: nn.Module) -> None:
    """Take off a copy that owns its weights whatever kept it from changing them."""
    for name in ("_apply", "load_state_dict", "_load_from_state_dict"):
        if isinstance(vars(module).get(name), _Refusal):
            del module.__dict__[name]
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("flatten_parameters", None)
    if is_parametrized(module):
        own_class(module, assignable=True)
    else:
        module.__dict__.pop(TENSOR_ORDER, None)
