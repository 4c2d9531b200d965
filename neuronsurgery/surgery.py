"""The only stateful edge: views of a model under an edit, and edits baked into a copy.

`plan` checks an edit against a model; the parametrization of a view, `bake`, `edited_parameters` and the sweep all call
what it returns, one pure function of the model's tensors, so they agree bit for bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from typing_extensions import override

from neuronsurgery.copies import computed_copy, copy_structure
from neuronsurgery.edits import Edit, compose
from neuronsurgery.gathering import GATHERED
from neuronsurgery.guards import guard_edited
from neuronsurgery.objects import tensors_in_attributes
from neuronsurgery.parametrized import (
    give_own_class,
    parametrizations,
    remove_parametrization,
    share_class,
)
from neuronsurgery.plans import Plan, TensorPlan, plan
from neuronsurgery.refusals import Origin, refuse_writing, release
from neuronsurgery.surveys import (
    Survey,
    SurveyedTensor,
    Use,
    computed_elsewhere,
    held_elsewhere,
    refuse_ungatherable,
    survey,
)
from neuronsurgery.switches import restoring
from neuronsurgery.types import Buffers


def with_grad_flag(edited: Tensor, weight: Tensor, *, trainable: bool = False) -> Tensor:
    """Return an edited tensor that says, where no gradient is recorded, whether the weight would get one.

    matmul folds its batch, and so changes the last bits, where this flag is set, also without a graph.
    """
    if not torch.is_grad_enabled() and (weight.requires_grad or trainable):
        return nn.Parameter(edited)
    return edited


class EditedRows(nn.Module):
    """The parametrization of a view: the edited weight as a function of the shared one."""

    def __init__(self, tensor_plan: TensorPlan, origin: Origin) -> None:
        super().__init__()
        self.plan = tensor_plan
        self.origin = origin

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Return the edited weight."""
        edited = with_grad_flag(self.plan(weight), weight, trainable=self.plan.trainable)
        if not torch.compiler.is_compiling():
            self.origin.refuse_replaced(weight)
            guard_edited(edited)
        return edited

    @override
    def extra_repr(self) -> str:
        """Return the edits in words."""
        return ", ".join(repr(edit) for edit, _ in self.plan.steps)


UNBAKED = (
    "a fully sharded model has no plain copy: use a view, apply(edit, model); to save the edited weights, put them in "
    "the place of the model's, {**model.state_dict(), **edited_parameters(edit, model)}"
)


# The three ways to apply


@restoring
def apply(edit: Edit, model: nn.Module, *, buffers: Buffers = "own") -> nn.Module:
    """Return a view of the model under an edit: a new module of the same classes that shares its parameters.

    `model` is not changed, and no weight is copied: the edited weights are computed from the shared ones at every
    forward pass. So training the view trains the shared weights, the rows that an edit hides getting no gradient where
    it replaces them (an optimiser with weight decay or momentum moves them all the same). `apply(b, apply(a, m))`
    equals `apply(compose(a, b), m)`; parametrizations that the model has stay and come first.

    `train()` and `eval()` are the view's own. `requires_grad_` and `zero_grad` reach the shared parameters, and hooks
    are shared and fire in both. A wrapper (DDP, torch.compile) is taken off: the result is a view of the bare module.
    What would change the original is refused: conversion (`.to`, `.half` ...), `load_state_dict`, and assigning an
    edited tensor; what would change nothing is not. `state_dict` has torch's names for parametrized tensors; for a
    plain checkpoint use `bake`, as `save_pretrained` of a view does by itself. A deep copy of a view is independent of
    the model and keeps the edit. A compiled function is not compiled anew for a view with other neurons of the same
    layers, as many of each.

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
    surveyed = survey(model)
    refuse_ungatherable(surveyed)
    planned = plan(edit, surveyed)
    refuse_unreachable(planned, held_elsewhere(surveyed))
    refuse_computed(planned, computed_elsewhere(surveyed))
    copied = copy_structure(surveyed, buffers=buffers)
    origin = Origin(surveyed)
    for name, tensor_plan in planned.tensors.items():
        tensor = surveyed.tensors[name]
        uses = [use._replace(module=copied.modules[use.module]) for use in tensor.uses]
        if name in surveyed.gathered:  # it is computed at every access already
            for module, attribute, _ in uses:
                ways = vars(module)[GATHERED]
                ways[attribute] = ways[attribute].then(tensor_plan)
            continue
        _parametrize(uses, EditedRows(tensor_plan, origin), tensor.parametrized)
    shared = {name: weakref.ref(tensor.parameter) for name, tensor in surveyed.tensors.items()}
    for module in copied.model.modules():
        refuse_writing(module, shared, functools.partial(bake, compose()))
        share_class(module)
    return copied.model


@restoring
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
    surveyed = survey(model)
    if surveyed.gathered:
        raise ValueError(UNBAKED)
    whole = plan(edit, surveyed)
    refuse_computed(whole, computed_elsewhere(surveyed))
    planned = whole.tensors
    computed = computed_copy(surveyed).parameters
    values = {}
    for name, tensor in surveyed.tensors.items():
        if name in planned or _is_view_of(tensor):
            weight = computed[name].detach()
            edited = planned[name](weight) if name in planned else weight.clone()
            values[name] = nn.Parameter(edited, requires_grad=computed[name].requires_grad)
    replace = _own_parameters(surveyed)
    for name, value in values.items():
        if not surveyed.tensors[name].parametrized:
            for parameter in surveyed.tensors[name].parameters:
                replace[id(parameter)] = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    copied = copy_structure(surveyed, replace=replace)
    for name, value in values.items():
        if surveyed.tensors[name].parametrized:
            for module, attribute, _ in surveyed.tensors[name].uses:
                remove_parametrization(copied.modules[module], attribute, value)
    for module in copied.model.modules():
        release(module)
    return copied.model


@restoring
def edited_parameters(edit: Edit, model: nn.Module, params: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the edited tensors alone, by their names in the bare model, for `torch.func.functional_call`.

    They are functions of the model's parameters: gradients flow through them.

    Args:
        edit: what to do.
        model: any module; give `functional_call` the bare one.
        params: the tensors to edit in place of the model's own, by name; then the result is that of
            `plan(edit, model)(params)`, by the names that `params` has for them, and nothing of the model is read but
            its structure. Differentiate with respect to these.

    Raises:
        TypeError: if `edit` is not an edit.
        KeyError: if `params` lack an edited tensor; lists all.
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
    surveyed = survey(model)
    planned = plan(edit, surveyed)
    if params is not None:
        return planned(params)
    refuse_unreachable(planned, held_elsewhere(surveyed))
    refuse_computed(planned, computed_elsewhere(surveyed))
    tensors = [surveyed.tensors[name] for name in planned.tensors]
    if any(gathered.steps for gathered in surveyed.gathered.values()):
        raise ValueError("this is a view of a sharded model: compose its edit with this one, and give the model itself")
    wrong = [tensor.name for tensor in tensors if tensor.parametrized]
    if wrong:
        raise ValueError(
            f"parametrized tensors cannot be passed to functional_call under their plain names, it would overwrite the "
            f"model's weights: {', '.join(wrong)}; bake the edit first, bake(edit, model)"
        )
    # functional_call swaps such a tensor once for each name, and puts the edited one back in the end.
    wrong = [tensor.name for tensor in tensors if 1 + len(tensor.aliases) > len(tensor.uses)]
    if wrong:
        raise ValueError(
            f"functional_call would overwrite the tensors of a module that is in the model under several names: "
            f"{', '.join(wrong)}; bake the edit, bake(edit, model), or use a view, apply(edit, model)"
        )
    edited = {}
    for tensor in tensors:
        value = with_grad_flag(planned.tensors[tensor.name](tensor.parameter), tensor.parameter)
        # functional_call ties the places of one parameter by itself, but not parameters that share one memory.
        pairs = zip(reversed(tensor.parameters), reversed(tensor.uses), strict=True)
        places = {id(parameter): use.path for parameter, use in pairs}
        edited.update(dict.fromkeys(reversed(places.values()), value))
    return edited


# The edge


def _parametrize(uses: list[Use], edited: EditedRows, parametrized: bool) -> None:
    """Put an edit on every use of one tensor of a copy, the uses sharing one list of parametrizations."""
    module, attribute, _ = uses[0]
    if parametrized:
        register_parametrization(module, attribute, edited, unsafe=True)
        return
    shared = module._parameters[attribute]
    assert shared is not None  # None entries are never named
    held = None
    for module, attribute, _ in uses:
        # torch calls set_ on the parameter it registers on, which breaks a pending backward pass and DDP's hooks.
        # So it is given an empty stand-in, and the shared parameter takes that one's place afterwards.
        module._parameters[attribute] = nn.Parameter(torch.empty(0, dtype=shared.dtype, device=shared.device))
        register_parametrization(module, attribute, edited, unsafe=True)
        if held is None:
            held = parametrizations(module)[attribute]
            held._parameters["original"] = shared
            held.training = module.training
        every: nn.Module = module._modules["parametrizations"]  # type: ignore[assignment]  # just registered
        every._modules[attribute] = held
        every.training = module.training
        made_by_torch = type(module)
        give_own_class(module)
        # Its property holds the module, in a cycle, and a view is to be freed as soon as it is dropped.
        delattr(made_by_torch, attribute)


def refuse_computed(planned: Plan, computed: Mapping[str, str]) -> None:
    """Raise if a plain attribute may have been computed from an edited parameter, as it was before the edit.

    Args:
        planned: what is edited.
        computed: see `surveys.computed_elsewhere`.

    Raises:
        ValueError: if there is one; names the parameter, the attribute and the module.
    """
    for name in planned.tensors:
        if name in computed:
            raise ValueError(
                f"the forward computes with {computed[name]}, which may come of {name} as it was before the edit, and "
                f"nothing says how to compute it anew: set it back to what it was before the model was first run (None "
                f"or empty, in the constructor, too), or register it as a buffer if it comes of no parameter"
            )


def refuse_unreachable(planned: Plan, held: Mapping[str, str]) -> None:
    """Raise if an edited parameter is also held by a plain attribute, whose use an edit would not reach.

    Args:
        planned: what is edited.
        held: see `surveys.held_elsewhere`.

    Raises:
        ValueError: if there is one; names it and the module.
    """
    for name in planned.tensors:
        if name in held:
            raise ValueError(
                f"{name} is also held by a plain attribute of {held[name]}, where an edit of the view would not reach "
                f"it: use bake, which does"
            )


def _is_view_of(tensor: SurveyedTensor) -> bool:
    """Return whether the tensor is computed by an edit of a view."""
    use = tensor.uses[0]
    return tensor.parametrized and any(
        isinstance(step, EditedRows) for step in parametrizations(use.module)[use.attribute]
    )


def _own_parameters(surveyed: Survey) -> dict[int, Tensor]:
    """Return a copy of each of the model's parameters, by its id; those that share one memory go on sharing one."""
    modules = surveyed.modules
    known = {id(module): None for module in modules}
    held = [tensor for module in modules for tensor in tensors_in_attributes(module, known)]
    tied = [tensor.parameters for tensor in surveyed.tensors.values()]
    single = [(tensor,) for tensor in (*surveyed.model.parameters(), *held) if isinstance(tensor, nn.Parameter)]
    own: dict[int, Tensor] = {}
    for parameters in (*tied, *single):
        values = [own[id(parameter)] for parameter in parameters if id(parameter) in own]
        value = values[0].detach() if values else parameters[0].detach().clone()
        for parameter in parameters:
            if id(parameter) not in own:
                own[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return own
