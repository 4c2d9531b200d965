"""Functions that call a module of a model, rebound so that in a copy they call the copy's.

A deep copy takes functions as they are, and with a forward that was replaced by a closure (by `torch.compile`, by
autocast, by hand) the original would go on to run in the copy. Modules count wherever such a function holds them: in
its closure, among its defaults, in containers and objects of these.
"""

from __future__ import annotations

import copy
import dis
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any

from torch import Tensor, nn

CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


def rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return what an attribute of a module holds with its functions rebound; the value itself where none has to be.

    What a function keeps in its closure, in a mutable container or a variable of its own, is the copy's own.

    Args:
        value: what the attribute holds.
        memo: the copies of the modules, by the id of the original, as for a deep copy; what is rebound is added.
    """
    rebinding = _Rebinding(memo, own=True)
    return rebinding.new(value) if rebinding.leads(value, called=False) else value


def rebound_hooks(hooks: Mapping[int, Any], memo: dict[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks of a module, rebound; what they note outside of the model they go on to note there.

    Args:
        hooks: by the id of their handles.
        memo: see `rebound`; hooks that are to be shared may be in it.
    """
    # An ordered dictionary, as torch's handles want it.
    rebinding, new = _Rebinding(memo, own=False), OrderedDict(hooks)
    for key, hook in hooks.items():
        if isinstance(hook, types.FunctionType | functools.partial) and rebinding.leads(hook):
            if memo.get(id(hook)) is hook:
                del memo[id(hook)]
            new[key] = rebinding.new(hook)
    return new


def functions_within(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the functions that some values hold at any depth, each once: plain ones and those of `lru_cache`."""
    queue, seen = list(values), {}
    while queue:
        value = queue.pop()
        if id(value) in seen or isinstance(value, (nn.Module, *_ATOMIC)):
            continue
        seen[id(value)] = value
        if isinstance(value, types.FunctionType | functools._lru_cache_wrapper):
            yield value
        queue += _parts(value)


def closure_of(function: Any) -> dict[str, types.CellType]:
    """Return the variables in the closure of a function of the caller's, by name; those that hold something."""
    if not isinstance(function, types.FunctionType) or _is_of_torch(function):
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell for name, cell in cells if _is_filled(cell)}


class _Rebinding:
    """What is rebound, and how.

    Args:
        memo: see `rebound`.
        own: whether what functions keep in their closures is copied, too.
    """

    def __init__(self, memo: dict[int, Any], *, own: bool) -> None:
        self.memo = memo
        self.own = own

    def leads(self, value: Any, *, called: bool = True, seen: dict[Any, Any] | None = None) -> bool:
        """Return whether a value calls a module of the model, or holds what does.

        Args:
            value: at any depth.
            called: whether a function holds it; a module that none holds is copied by a deep copy.
            seen: what was looked at.
        """
        seen = {} if seen is None else seen
        if isinstance(value, nn.Module):
            return called and id(value) in self.memo
        if isinstance(value, _ATOMIC) or (called, id(value)) in seen:
            return False
        seen[called, id(value)] = value
        if self.own and isinstance(value, types.FunctionType) and _keeps(value):
            return True
        called = called or isinstance(value, _FUNCTIONS) or _compiled(value) is not None
        return any(self.leads(part, called=called, seen=seen) for part in _parts(value))

    def new(self, value: Any) -> Any:
        """Return a value that leads to the model, rebound; anything else as it is."""
        if isinstance(value, nn.Module):
            return self.memo.get(id(value), value)
        if (compiled := _compiled(value)) is not None:
            return self.new(compiled)
        if isinstance(value, _ATOMIC) or not self.leads(value):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, types.MethodType):
            return types.MethodType(self.new(value.__func__), self.new(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {key: self.new(part) for key, part in value.keywords.items()}
            return functools.partial(self.new(value.func), *map(self.new, value.args), **keywords)
        if isinstance(value, functools._lru_cache_wrapper):
            return functools.lru_cache(**value.cache_parameters())(self.new(value.__wrapped__))
        return self._function(value) if isinstance(value, types.FunctionType) else self._container(value)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = [self.memo.setdefault(id(cell), types.CellType()) for cell in value.__closure__ or ()]
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, tuple(cells) or None)
        self.memo[id(value)] = made  # first: it may call itself
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if _is_filled(old) and not _is_filled(cell):
                kept = self.own and isinstance(old.cell_contents, CONTAINERS) and not _is_of_torch(value)
                cell.cell_contents = self._container(old.cell_contents) if kept else self.new(old.cell_contents)
        made.__defaults__ = value.__defaults__ and tuple(map(self.new, value.__defaults__))
        made.__kwdefaults__ = value.__kwdefaults__ and {k: self.new(part) for k, part in value.__kwdefaults__.items()}
        made.__dict__.update(vars(value))
        return made

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = map(self.new, value)
            return type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts)
        if isinstance(value, frozenset):
            return type(value)(map(self.new, value))
        if id(value) in self.memo:
            return self.memo[id(value)]
        made = self.memo[id(value)] = copy.copy(value)
        if isinstance(value, MutableMapping):
            made.update({key: self.new(item) for key, item in value.items()})
        elif isinstance(value, MutableSequence):
            for place, item in enumerate(value):
                made[place] = self.new(item)
        elif isinstance(value, MutableSet):
            made.clear()
            made |= set(map(self.new, value))
        elif made is not value:
            vars(made).update({name: self.new(part) for name, part in vars(value).items()})
        return made


_ATOMIC = (str, bytes, int, float, complex, type(None), type, Tensor, types.ModuleType, types.BuiltinFunctionType)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, functools._lru_cache_wrapper)


def _keeps(function: types.FunctionType) -> bool:
    """Return whether a function of the caller's keeps something in its closure: in a container, or by `nonlocal`."""
    held = any(isinstance(cell.cell_contents, CONTAINERS) for cell in closure_of(function).values())
    return held or bool(assigned_outside(function.__code__))


@functools.lru_cache(maxsize=4096)
def assigned_outside(code: types.CodeType) -> frozenset[str]:
    """Return the variables of its closure that a function assigns (`nonlocal`)."""
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    return frozenset(stored.intersection(code.co_freevars))


def _is_of_torch(function: types.FunctionType) -> bool:
    return f"{function.__module__}.".startswith("torch.")


def _compiled(value: Any) -> Any:
    """Return the function that one made by `torch.compile` was made of, or None: a copy runs uncompiled."""
    return getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None


def _parts(value: Any) -> list[Any]:
    """Return what a function, a container or an object holds."""
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), _compiled(value)]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, functools._lru_cache_wrapper):
        return [value.__wrapped__]
    if isinstance(value, MutableMapping):
        return list(value.values())
    if isinstance(value, tuple | frozenset | MutableSequence | MutableSet):
        return list(value)
    if type(value).__module__.startswith("neuronsurgery."):  # ours know how to be copied, and each view has hundreds
        return []
    return [*(own_attributes(value) or {}).values(), _compiled(value)]


def own_attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object of a class of the caller's, or of a namespace; None of any other."""
    home = type(value).__module__.partition(".")[0]
    foreign = home in ("torch", "numpy", *sys.stdlib_module_names) and not isinstance(value, types.SimpleNamespace)
    attributes = None if foreign or isinstance(value, nn.Module) else getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # it raises
    except ValueError:  # not assigned yet
        return False
    return True
