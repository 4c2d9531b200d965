"""Copies of a model that share its weights: to be edited, or to be run in its place.

A copy is a deep copy whose memo holds what is to be shared. What a deep copy takes as it is, and would lead back to the
original, is mended: functions that call a module of the model, and the classes of parametrized modules.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from neuronsurgery.caches import ABSENT, Attributes, blank_caches
from neuronsurgery.errors import inline
from neuronsurgery.objects import held_by_attributes, kept_attributes, uncopyable_within
from neuronsurgery.parametrized import (
    TENSOR_ORDER,
    give_own_class,
    originals,
    parametrizations,
    remove_parametrization,
    tensor_attributes,
)
from neuronsurgery.surveys import Survey, refuse_unrunnable, survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Buffers
from neuronsurgery.wrappers import is_a, is_checkpointed, unwrap


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of a model, and which of its modules is the copy of which.

    Attributes:
        model: the copy.
        modules: module of the original -> module of the copy.
    """

    model: nn.Module
    modules: Mapping[nn.Module, nn.Module]


@torch.inference_mode(mode=False)  # a copy outlives the caller's mode
def copy_structure(
    surveyed: Survey,
    *,
    replace: Mapping[int, Tensor] | None = None,
    buffers: Buffers = "own",
    blank: bool = True,
) -> Copy:
    """Return a new module of the same classes whose parameters are the model's own.

    It is a deep copy in which parameters, hooks, tensors that are not leaves of autograd (cached activations), and what
    refuses a copy and holds no part of a model (locks, files, process groups) are shared. Nothing of the model changes,
    and wrappers (DDP, torch.compile) are taken off everywhere.

    Args:
        surveyed: the model.
        replace: the tensor to use in place of a parameter, by the parameter's id.
        buffers: "own" copies the buffers, "shared" shares them.
        blank: whether what the modules have computed and keep (see `caches`) is left out.

    Raises:
        TypeError: if an attribute of a module cannot be copied, nor shared; names module and attribute.
        ValueError: if a parameter or buffer is not yet initialised; lists them.
    """
    names = surveyed.modules
    memo: dict[int, Any] = {}
    for module in names:
        # Not __new__ of the class: a torch.fx.GraphModule makes a new class there and loses its forward.
        memo[id(module)] = object.__new__(type(module))
    _refuse_uninitialised(names)
    for module in names:
        _share(module, memo, buffers, optimizers=not replace)
    memo.update(replace or {})
    known = {id(module): None for module in names}
    for module, name in names.items():
        _fill(memo[id(module)], module, name, memo, blank_caches(module, known) if blank else {})
    copied = {module: memo[id(module)] for module in names}
    for new in copied.values():
        _detach_from_original(new)
    return Copy(copied[surveyed.model], copied)


def _refuse_uninitialised(names: Mapping[nn.Module, str]) -> None:
    """Raise for lazy modules: the first run of a copy would initialise the model itself, and only half of it."""
    wrong = [
        f"{name}.{attribute}".removeprefix(".")
        for module, name in names.items()
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]
        if isinstance(tensor, UninitializedTensorMixin)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the model's tensors are not yet initialised (lazy modules): {inline(wrong, 10)}; run the "
            f"model on one batch first"
        )


def _share(module: nn.Module, memo: dict[int, Any], buffers: Buffers, *, optimizers: bool) -> None:
    """Enter into the memo of a deep copy, which has the modules already, what the copy of this one is to share."""
    for parameter in module._parameters.values():
        if parameter is not None:
            memo[id(parameter)] = parameter
    for buffer in module._buffers.values():
        if buffer is not None:
            memo[id(buffer)] = buffer if buffers == "shared" else _clone(buffer)
    for child in module._modules.values():
        if child is not None and unwrap(child) is not child:
            memo[id(child)] = memo[id(unwrap(child))]
    for key, value in vars(module).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            for hook in value.values():
                owner = getattr(hook, "__self__", hook)
                # A hook that is a method of one of the model's modules follows that module into the copy;
                # torch's own wrapper holds such a module weakly and knows how to be copied with it.
                if not isinstance(hook, _WrappedHook):
                    memo.setdefault(id(owner), owner)
    for held in held_by_attributes(module, memo):
        if isinstance(held, Optimizer):
            if optimizers:
                memo.setdefault(id(held), held)
        elif isinstance(held, nn.Parameter) or not held.is_leaf:
            memo.setdefault(id(held), held)


def _clone(buffer: Tensor) -> Tensor:
    return buffer if buffer.is_meta else buffer.detach().clone()


def _rebound(value: Any, memo: Mapping[int, Any], within: tuple[int, ...] = ()) -> Any:
    """Return a function so that it calls the copy where it called the model, as an uncompiled one; else the value.

    A deep copy takes functions as they are, and with a forward that was replaced by a closure (by `torch.compile`, by
    autocast, by hand) the original would go on to run in the copy. Modules in containers of a closure and among the
    defaults of a function count as well.

    Args:
        value: what an attribute or a closure holds.
        memo: the copies of the modules, by the id of the original.
        within: the ids of the functions that this one is in the closure of.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    compiled = getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None
    if compiled is not None:
        return _rebound(compiled, memo, within)
    if isinstance(value, types.MethodType):
        function, owner = _rebound(value.__func__, memo, within), memo.get(id(value.__self__), value.__self__)
        same = function is value.__func__ and owner is value.__self__
        return value if same else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        inner = [value.func, *value.args]
        function, *args = (_rebound(part, memo, within) for part in inner)
        same = all(new is old for new, old in zip([function, *args], inner, strict=True))
        return value if same else functools.partial(function, *args, **value.keywords)
    if type(value) in (list, tuple, set, dict) and id(value) not in within and (within or _holds_functions(value)):
        return _rebound_container(value, memo, (*within, id(value)))
    if not isinstance(value, types.FunctionType) or id(value) in within:
        return value
    return _rebound_function(value, memo, (*within, id(value)))


def _rebound_container(value: Any, memo: Mapping[int, Any], within: tuple[int, ...]) -> Any:
    """Return a container with what it holds rebound; the container itself where nothing is."""
    items = list(value.values()) if isinstance(value, dict) else list(value)
    rebound = [_rebound(item, memo, within) for item in items]
    if all(new is old for new, old in zip(rebound, items, strict=True)):
        return value
    return dict(zip(value, rebound, strict=True)) if isinstance(value, dict) else type(value)(rebound)


def _rebound_function(value: types.FunctionType, memo: Mapping[int, Any], within: tuple[int, ...]) -> Any:
    """Return a function whose closure and defaults are rebound; the function itself where nothing is."""
    contents = [_content(cell) for cell in value.__closure__ or ()]
    rebound = [_rebound(content, memo, within) for content in contents]
    defaults = _rebound(value.__defaults__, memo, within)
    named = _rebound(value.__kwdefaults__, memo, within)
    same = all(new is old for new, old in zip(rebound, contents, strict=True))
    if same and defaults is value.__defaults__ and named is value.__kwdefaults__:
        return value
    cells = tuple(types.CellType(content) for content in rebound) or None
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    function.__kwdefaults__ = named
    function.__dict__.update(vars(value))
    return function


def _holds_functions(container: Any) -> bool:
    """Return whether a container has functions that may call a module; what else is in it is copied afterwards."""
    items = container.values() if isinstance(container, dict) else container
    return any(isinstance(item, types.FunctionType | types.MethodType | functools.partial) for item in items)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    rebound = _rebound(value, memo)
    if rebound is not value:
        return copy.deepcopy(rebound, memo) if isinstance(value, list | tuple | set | dict) else rebound
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for half_done in list(memo)[known:]:
            del memo[half_done]
        shared = {id(held): held for held in uncopyable_within(value, memo)}
        if not shared:
            raise
        memo.update(shared)
        return copy.deepcopy(value, memo)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _fill(new: nn.Module, module: nn.Module, name: str, memo: dict[int, Any], blank: Mapping[str, Any]) -> None:
    attributes = {key: value for key, value in blank.items() if value is not ABSENT}
    for key, value in kept_attributes(module).items():
        if key in blank:
            continue
        try:
            # A compiled forward is bound to the original; the copy runs uncompiled.
            attributes[key] = None if key == "_compiled_call_impl" else _copied(value, memo)
        except Exception as error:
            raise TypeError(
                f"cannot make a view of the model: attribute '{key}' of module '{name or type(module).__name__}' "
                f"({type(module).__name__}) cannot be copied: {error}. Remove it before the call, or give its class a "
                f"__deepcopy__"
            ) from error
    attributes.setdefault(TENSOR_ORDER, tuple(tensor_attributes(module)))
    new.__dict__.update(attributes)


def _detach_from_original(new: nn.Module) -> None:
    if is_parametrized(new):
        give_own_class(new)
    if isinstance(new, nn.RNNBase):
        # On CUDA it would move the shared weights into one block of memory.
        new.__dict__["flatten_parameters"] = _keep_parameters


def _keep_parameters() -> None:
    """Stand in for RNNBase.flatten_parameters on a copy that shares its weights."""


# Copies to run


@dataclass(frozen=True, eq=False)
class Runner:
    """A copy in evaluation mode that shares the parameters and in which no tensor is parametrized any more.

    Attributes:
        model: the copy. What it caches of its own is its own.
        parameters: its parameters by the names of the survey.
        places: for each parameter one path to every module and attribute that hold it, for `functional_call`.
        device: of its first parameter, or None.
        attributes: of its modules, to be given back after each forward pass.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    places: Mapping[str, tuple[str, ...]]
    device: torch.device | None
    attributes: Attributes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", Attributes(self.model))


def make_runner(surveyed: Survey, *, checkpoints: bool = False, blank: bool = True) -> Runner:
    """Return the copy of a model that scores, evaluation and sweeps run: see `computed_copy`.

    Args:
        surveyed: the model.
        checkpoints: see `computed_copy`.
        blank: see `computed_copy`.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
        ValueError: if a tensor is on the meta device or sharded, or not yet initialised; lists all.
    """
    refuse_unrunnable(surveyed)
    return computed_copy(surveyed, checkpoints=checkpoints, blank=blank)


@restoring
def computed_copy(surveyed: Survey, *, checkpoints: bool = False, blank: bool = True) -> Runner:
    """Return a copy of a model in which a parametrized tensor stands as a parameter, computed once, in its plain place.

    Args:
        surveyed: the model.
        checkpoints: whether modules that are checkpointed in training are so in the copy, too, though it evaluates.
        blank: whether what the modules have computed and keep is left out: it need not be where the weights stay.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
    """
    copied = copy_structure(surveyed, replace=_renormalised(surveyed), blank=blank)
    _set_eval(copied.model)
    if checkpoints:
        children = [child for module in surveyed.modules for child in module._modules.values() if child is not None]
        for child in filter(is_checkpointed, children):
            _checkpoint(copied.modules[unwrap(child)])
    computed: dict[int, Tensor] = {}
    for module in [module for module in copied.model.modules() if is_parametrized(module)]:
        for attribute, held in parametrizations(module).items():
            if id(held) not in computed:
                computed[id(held)] = _computed(module, attribute)
            remove_parametrization(module, attribute, computed[id(held)])
    parameters = {
        name: copied.modules[tensor.uses[0].module]._parameters[tensor.uses[0].attribute]
        for name, tensor in surveyed.tensors.items()
    }
    places = {name: tuple(use.path for use in tensor.uses) for name, tensor in surveyed.tensors.items()}
    return Runner(copied.model, parameters, places, surveyed.device)  # type: ignore[arg-type]  # none is None


def eval_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode that shares its parameters, for a loop of one's own.

    It is what scores, evaluation and sweeps run: wrappers and parametrizations are taken off, buffers are copies, and
    whatever is done to the modules (hooks, flags) stays with the copy. What is written into a parameter does not.

    Args:
        model: any module; not changed.

    Raises:
        TypeError: if an attribute of a module cannot be copied; names module and attribute.
        ValueError: if a parameter or buffer is not yet initialised, on the meta device, or sharded; lists them.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = eval_copy(model)
        >>> copied.training, model.training, copied[0].weight is model[0].weight
        (False, True, True)
    """
    return make_runner(survey(model)).model


def readable(surveyed: Survey) -> Mapping[str, Tensor]:
    """Return the model's tensors by first name; where one is parametrized, as they are computed on a copy.

    Raises:
        TypeError: if a model with parametrized tensors cannot be copied.
    """
    if any(tensor.parametrized for tensor in surveyed.tensors.values()):
        return computed_copy(surveyed).parameters
    return {name: tensor.parameter for name, tensor in surveyed.tensors.items()}


def _set_eval(module: nn.Module) -> None:
    """Set evaluation mode on a copy by its flags alone.

    Some classes override `train()` to merge weights or to freeze parameters, which would reach the shared ones.
    """
    for child in module.modules():
        child.training = False


def _checkpoint(module: nn.Module) -> None:
    """Have a module of a copy run again in the backward pass, without a cache of keys, which it would fill twice."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        cached = [key for key, value in kwargs.items() if is_a(value, "Cache", "transformers.cache_utils")]
        return checkpoint(forward, *args, use_reentrant=False, **kwargs | dict.fromkeys(cached))

    module.__dict__["forward"] = run


def _renormalised(surveyed: Survey) -> dict[int, Tensor]:
    """Return own copies of the weights that a forward pass itself changes: those of embeddings with `max_norm`."""
    own: dict[int, Tensor] = {}
    for module in surveyed.modules:
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None and weight is not None:
            own[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return own


def _computed(module: nn.Module, attribute: str) -> Tensor:
    with torch.no_grad():
        value: Tensor = getattr(module, attribute).detach()
    held = originals(module, attribute)
    if not any(isinstance(original, nn.Parameter) for original in held):
        return value
    return nn.Parameter(value, requires_grad=any(original.requires_grad for original in held))
