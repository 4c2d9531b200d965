"""What a view of a model refuses: to write into the weights that it shares, and to go on after they were replaced."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from neuronsurgery.errors import inline
from neuronsurgery.guards import Guard, is_guarded
from neuronsurgery.habits import doubtful, overwriting, written_by_forward
from neuronsurgery.parametrized import TENSOR_ORDER, give_own_class
from neuronsurgery.precision import same_bits
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.wrappers import is_a, unwrap

SAVING = (
    ("PreTrainedModel", "transformers.modeling_utils"),
    ("ModelHubMixin", "huggingface_hub.hub_mixin"),
)
"""Classes that write their state dict to files, by `save_pretrained` and `push_to_hub`, and where they are defined."""

ADAPTED = ("PeftModel", "peft.peft_model")
"""A class whose files have its adapter alone, and where it is defined."""

UNEDITED = (
    "it would write the adapter alone, without what the edit does to the model under it: bake the edit first, then "
    "merge_and_unload(), and save that model"
)

SHARED = (
    "this view shares its weights with the model it was made from: convert the model and apply again, or use bake for "
    "an independent copy"
)


LOADED = (
    "this view shares its weights with the model it was made from: load into that model (or into one of its class) and "
    "apply again, or use bake for an independent copy"
)

WRITES = (
    "it would write into {}, and this view shares its weights with the model it was made from: change the model and "
    "apply again, or use bake for an independent copy"
)


class Origin:
    """The parameters that a view shares with the model it was made from, and that one's modules, all held weakly."""

    def __init__(self, surveyed: Survey) -> None:
        self.shared = [
            (weakref.ref(use.module), use.attribute, weakref.ref(parameter), tensor.name)
            for tensor in surveyed.tensors.values()
            if not tensor.parametrized and tensor.name not in surveyed.gathered  # which FSDP swaps, and swaps back
            for use, parameter in zip(tensor.uses, tensor.parameters, strict=True)
        ]
        self.children = [
            (weakref.ref(module), key, weakref.ref(unwrap(child)), path)
            for module, path in surveyed.modules.items()
            for key, child in module._modules.items()
            if child is not None
        ]
        chains = [module for module in surveyed.modules if isinstance(module, nn.Sequential | nn.ModuleList)]
        self.lengths = [(weakref.ref(module), len(module), surveyed.modules[module]) for module in chains]
        self.met: set[int] = set()
        # Alive as long as the view is, which asks.
        self.parameters = {id(parameter()) for _, _, parameter, _ in self.shared}

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def refuse_replaced(self, weight: Tensor) -> None:
        """Raise if the model has another parameter or module now in the place of one that the view goes on to use.

        Args:
            weight: of the view; where it is none of the shared parameters, the view is independent by now.

        Raises:
            RuntimeError: if there is one; names them.
        """
        if id(weight) not in self.parameters:
            return
        if self.met and id(weight) not in self.met:
            self.met.add(id(weight))  # looked at with another weight, in the same forward pass
            return
        self.met = {id(weight)}
        replaced = [
            name
            for reference, attribute, parameter, name in self.shared
            if (module := reference()) is not None and module._parameters.get(attribute) is not parameter()
        ]
        if replaced:
            raise RuntimeError(
                f"the model that this view was made from has other parameters now: {inline(replaced)} were replaced "
                f"(load_state_dict(assign=True), a parametrization?), and the view has the old ones: apply the edit "
                f"again"
            )
        replaced = [
            f"{path}.{key}".removeprefix(".")
            for reference, key, child, path in self.children
            if (module := reference()) is not None and not _is_still(module._modules.get(key), child())
        ] + [
            path or "the model" for reference, length, path in self.lengths if len(reference() or "") not in (0, length)
        ]
        if replaced:
            raise RuntimeError(
                f"the model that this view was made from has other modules now: {inline(replaced)} were replaced, "
                f"taken out or added to, and the view has the old ones: apply the edit again"
            )


def _is_still(child: nn.Module | None, before: nn.Module | None) -> bool:
    """Return whether a child is what it was before, maybe in another wrapper."""
    if child is None or before is None:
        return False
    return child is before or unwrap(child) is before


SharedWeights: TypeAlias = "Mapping[str, weakref.ref[Tensor]]"
"""The weights that a view shares with its model, by name."""


def refuse_writing(module: nn.Module, shared: SharedWeights, plain: Callable[[nn.Module], nn.Module]) -> None:
    """Put refusals in the place of the methods of a view's module that would write into the shared weights.

    Methods that may do so, and a forward that does, run under a guard, which stops them where they do.

    Args:
        module: of the view.
        shared: the weights, by name; one mapping for all modules of the view.
        plain: what gives a plain copy of a view's module, which is to be written to files in its place.
    """
    guarded = {"apply", *doubtful(module), *(["forward"] if written_by_forward(module) else [])}
    for method in guarded:
        # A property or a static method is no attribute of the module to stand in for.
        free = isinstance(vars(module).get(method), _Refusal | None)
        if free and inspect.isfunction(inspect.getattr_static(type(module), method)):
            module.__dict__[method] = _Guarded(module, method, WRITES, shared)
    writing = {"_load_from_state_dict", "share_memory", *overwriting(module)}
    for method in writing:
        module.__dict__[method] = _Refusal(module, method, SHARED)
    module.__dict__["_apply"] = _Conversion(module, "_apply", SHARED)
    module.__dict__["load_state_dict"] = _Loading(module, "load_state_dict", LOADED)
    for method in ("save_pretrained", "push_to_hub"):
        if is_a(module, *ADAPTED):
            module.__dict__[method] = _Refusal(module, method, UNEDITED)
        elif any(is_a(module, kind, at) for kind, at in SAVING):
            module.__dict__[method] = _Saving(module, method, plain)


class _Refusal:
    """Stands in the instance of a view's module for a method that would change the shared weights.

    An attribute of the instance, so that the module keeps its class; a weak reference, so that a view is freed as soon
    as it is dropped. In a deep copy, which owns its weights, the method works again.
    """

    def __init__(self, module: nn.Module, method: str, reason: str) -> None:
        self.module = weakref.ref(module)
        self.method = method
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason:
            raise RuntimeError(self.reason)
        module = self.module()
        method: Callable[..., Any] = getattr(type(module), self.method)
        return method(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        copied = memo.get(id(self.module()))
        return self if copied is None else type(self)(copied, self.method, "")


def _changes_nothing(module: nn.Module, conversion: Callable[[Tensor], Tensor]) -> bool:
    try:
        with torch.no_grad():
            return all(conversion(tensor) is tensor for tensor in (*module.parameters(), *module.buffers()))
    except Exception:  # a device that is not there
        return False


class _Guarded(_Refusal):
    """Stands for a method that may write into the shared weights: it is stopped where it does."""

    def __init__(self, module: nn.Module, method: str, message: str, shared: SharedWeights) -> None:
        super().__init__(module, method, "")
        self.message = message
        self.shared = shared

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_guarded() or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        shared = {name: tensor for name, reference in self.shared.items() if (tensor := reference()) is not None}
        with Guard(shared, self.message):
            return super().__call__(*args, **kwargs)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        copied = memo.get(id(self.module()))
        return self if copied is None else _Refusal(copied, self.method, "")


class _Conversion(_Refusal):
    """Stands for `_apply`, through which a module is converted: trainers move a model to where it is already."""

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if self.reason and module is not None and _changes_nothing(module, args[0]):
            return module
        return super().__call__(*args, **kwargs)


class _Loading(_Refusal):
    """Stands for `load_state_dict`: trainers that resume load what the model has been given already."""

    @override
    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        module = self.module()
        if self.reason and module is not None and not assign:
            names = _names_if_same(module, state_dict)
            if names is not None and not (strict and any(names)):
                return names
        return super().__call__(state_dict, strict=strict, assign=assign)


def _names_if_same(module: nn.Module, state_dict: Mapping[str, Any]) -> _IncompatibleKeys | None:
    """Return which names a state dict lacks and has too many, if what it has is what the module has; else None."""
    held: dict[str, Tensor] = dict(module.state_dict())
    tensors = survey(module).tensors.values()
    plain = {name: tensor.parameter for tensor in tensors for name in (tensor.name, *tensor.aliases)}
    for name, value in state_dict.items():
        own = held.get(name, plain.get(name))
        if own is not None and not (isinstance(value, Tensor) and same_bits(value.to(own), own)):
            return None
    lacking = {name: _without_edit(name) for name in held if name not in state_dict}
    missing = [without for without in lacking.values() if without not in state_dict]
    return _IncompatibleKeys(missing, [name for name in state_dict if name not in held and name not in plain])


def _without_edit(name: str) -> str:
    """Return the name that a tensor of a state dict has where no edit is on it."""
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name)


class _Saving(_Refusal):
    """Stands for a method that writes a model to files: a plain copy, with the edit in its weights, writes its own."""

    def __init__(self, module: nn.Module, method: str, plain: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(module, method, "")
        self.plain = plain

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if module is None:  # nobody holds it while this runs
            raise RuntimeError(f"this view is gone already: view = apply(edit, model), then view.{self.method}(...)")
        given = kwargs.get("state_dict")
        if given is not None and any(".parametrizations." in f".{name}" for name in given):
            del kwargs["state_dict"]  # the view's own, as trainers give it
        return getattr(self.plain(module), self.method)(*args, **kwargs)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        copied = memo.get(id(self.module()))
        return self if copied is None else _Saving(copied, self.method, self.plain)


def release(module: nn.Module) -> None:
    """Take off a copy that owns its weights whatever kept it from changing them."""
    for name in [name for name, value in vars(module).items() if isinstance(value, _Refusal)]:
        del module.__dict__[name]
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("flatten_parameters", None)
    if is_parametrized(module):
        give_own_class(module, assignable=True)
    else:
        module.__dict__.pop(TENSOR_ORDER, None)
