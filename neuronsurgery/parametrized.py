"""Parametrizations of torch: the tensors that they compute, and how a copy of a module gets or loses one.

The dynamic class that torch gives a parametrized module holds the properties of all its parametrized tensors: a copy
that kept that class would change the original when a further tensor is parametrized. So every copy gets a class of its
own, and a finished view one that it shares with other views, and on which that does no harm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

TENSOR_ORDER = "_neuronsurgery_tensor_order"
"""Name of the attribute in which a copy remembers the order of a module's tensors, which parametrizing would change."""


def tensor_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, parametrized ones included, in their original order."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if is_parametrized(module):
        names += [
            name
            for name in parametrizations(module)
            if any(isinstance(original, nn.Parameter) for original in originals(module, name))
        ]
    order = vars(module).get(TENSOR_ORDER, ())
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def parametrizations(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the parametrizations of a module's tensors, by the tensor's name."""
    held = module._modules.get("parametrizations") if is_parametrized(module) else None
    return {} if held is None else dict(held._modules)  # type: ignore[arg-type]  # torch registers nothing else there


def originals(module: nn.Module, attribute: str) -> list[Tensor]:
    """Return the tensors that a parametrized one is computed from."""
    held = parametrizations(module)[attribute]
    names = ["original"] if held.is_tensor else [f"original{i}" for i in range(held.ntensors)]
    return [getattr(held, name) for name in names]


def give_own_class(module: nn.Module, *, assignable: bool = False) -> None:
    """Give a parametrized copy a class of its own, whose properties compute the tensor at every access.

    torch's own property would cache under the id of the module it was made for (`parametrize.cached()`), which is
    another module's, or a dead one's; and its setter would write into the shared parameter.

    Args:
        module: the copy.
        assignable: whether assigning the tensor is allowed, as torch does it: for copies that own their weights.
    """
    kind = type(module)
    namespace = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    setter = _assign if assignable else _refuse_assignment
    for name in parametrizations(module):
        namespace[name] = property(_named(_compute, name), _named(setter, name))
    namespace.pop("register_parameter", None)
    if not assignable:
        namespace["register_parameter"] = functools.partialmethod(_register_parameter, kind.__bases__[0])
    metaclass: Callable[..., type[nn.Module]] = type(kind.__bases__[0])  # not that of a shared class
    module.__class__ = metaclass(kind.__name__, kind.__bases__, namespace)


_SHARED: dict[Any, type[nn.Module]] = {}
"""The classes that finished views share, by the class that they are of and the names of the parametrized tensors."""

MOST_SHARED = 1024
"""So many are kept at most."""


def share_class(module: nn.Module) -> None:
    """Give a parametrized module of a finished view the class that all such modules have.

    A compiled function goes by classes: so it is not compiled anew for a view that differs in its neurons alone.
    """
    if not is_parametrized(module):
        return
    kind = type(module)
    key = (kind.__bases__, tuple(parametrizations(module)))
    if key not in _SHARED:
        if len(_SHARED) >= MOST_SHARED:
            _SHARED.clear()
        shared = _metaclass(type(kind.__bases__[0]))(kind.__name__, kind.__bases__, {})
        for name, value in vars(kind).items():
            if name not in ("__dict__", "__weakref__"):
                setattr(shared, name, value)
        _SHARED[key] = shared
    module.__class__ = _SHARED[key]


@functools.lru_cache(maxsize=64)
def _metaclass(kind: Any) -> Any:
    """Return the metaclass of shared classes: what torch does to one for the sake of a module is nothing to others.

    torch puts properties on the class of a module and takes them off again. Here a property stays, and counts for those
    modules alone that have such a parametrization.
    """

    def put(cls: Any, name: str, value: Any) -> None:
        kind.__setattr__(cls, name, _if_parametrized(name, value) if isinstance(value, property) else value)

    def take(cls: Any, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):
            kind.__delattr__(cls, name)

    return type(kind)("Shared", (kind,), {"__setattr__": put, "__delattr__": take})


def _if_parametrized(name: str, made: Any) -> property:
    """Return a property that is none for modules in which the tensor of that name is not parametrized."""

    def get(module: nn.Module) -> Any:
        return made.fget(module) if name in parametrizations(module) else nn.Module.__getattr__(module, name)

    def put(module: nn.Module, value: Any) -> None:
        if name in parametrizations(module):
            made.fset(module, value)
        else:
            nn.Module.__setattr__(module, name, value)

    return property(get, put)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda module, *value: function(name, module, *value)


def _compute(name: str, module: nn.Module) -> Tensor:
    held = parametrizations(module)[name]
    if not parametrize._cache_enabled:
        value: Tensor = held()
        return value
    # Within `cached()`. What computes it is kept beside it, so that nothing else can come to have its number.
    cache: dict[Any, Any] = parametrize._cache
    key = (id(held), name)
    if key not in cache:
        cache[key] = held, held()
    kept: Tensor = cache[key][1]
    return kept


def _assign(name: str, module: nn.Module, value: Tensor) -> None:
    parametrizations(module)[name].right_inverse(value)


def _refuse_assignment(name: str, module: nn.Module, value: object) -> None:
    raise RuntimeError(
        f"'{name}' is computed by a parametrization in this view, which shares its weights with the model it was made "
        f"from; assigning it, or passing it to functional_call under its plain name, would overwrite the original. "
        f"Use the key 'parametrizations.{name}.original', or bake the edit first"
    )


def _register_parameter(module: nn.Module, base: type[nn.Module], name: str, parameter: nn.Parameter | None) -> None:
    """Refuse to assign a parameter as a tensor is refused; torch would only say that the attribute exists."""
    if name in parametrizations(module):
        _refuse_assignment(name, module, parameter)
    base.register_parameter(module, name, parameter)


def remove_parametrization(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Put `value` in the place of a parametrized tensor of a copy, as the plain parameter (or buffer) it once was."""
    del module._modules["parametrizations"]._modules[attribute]  # type: ignore[union-attr]
    if not parametrizations(module):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    else:
        give_own_class(module)
        delattr(type(module), attribute)
    if isinstance(value, nn.Parameter):
        module._parameters[attribute] = value
        order = tensor_attributes(module)
        module._parameters = {name: module._parameters[name] for name in order if name in module._parameters} | {
            name: None for name, parameter in module._parameters.items() if parameter is None
        }
    else:
        module.register_buffer(attribute, value)
