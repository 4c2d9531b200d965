"""What the code of a module computes in one forward pass and keeps in a plain attribute for the next one.

A cache that was computed from a parameter is wrong as soon as that parameter is another one: in a copy with edited
weights, in a replay, in a second backward pass. Whether an attribute is one says the code of the module's class (see
`habits`): its forward, or its `train`, writes it, and its forward reads it. Where the constructor leaves such an
attribute empty it can be emptied again. What the constructor or the caller has put into an attribute is no cache.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import types
from collections.abc import Collection, Iterator, Mapping, MutableSequence, MutableSet
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronsurgery.habits import computed_by_methods, habits_of, type_of
from neuronsurgery.objects import kept_attributes, tensors_within
from neuronsurgery.rebinding import CONTAINERS, assigned_outside, closure_of, functions_within, own_attributes
from neuronsurgery.sources import filled_outside

ABSENT = object()
"""Stands for an attribute that is not there."""


def blank_caches(module: nn.Module, known: Mapping[int, Collection[str]]) -> dict[str, Any]:
    """Return the caches of a module, as they were before anything was computed: the value, or `ABSENT`.

    With a cache goes whatever else of the kind the forward writes and reads: a flag, or for how many it was computed.

    Args:
        module: of a model; not changed.
        known: the model's modules, see `habits.given_to`.
    """
    # A container of the class is one of all instances, where those of a copy would meet those of the model.
    shared = _of_the_class(type_of(module))
    blank = {name: _emptied(value) for name, value in shared.items() if name not in vars(module)}
    for name, value in _holding_numbers(module, known):
        if isinstance(inspect.getattr_static(type_of(module), name, None), functools.cached_property):
            blank[name] = ABSENT
        elif _is_cache(module, name, value, known.get(id(module), ())):
            start = habits_of(type_of(module)).starts.get(name)
            if start is None:
                blank[name] = ABSENT
            elif start.kind == "constant":
                blank[name] = start.value
            elif start.kind == "empty" and isinstance(value, CONTAINERS):
                blank[name] = _emptied(value)
    if blank.keys() - shared.keys():
        habits = habits_of(type_of(module))
        starts = {name: habits.starts.get(name) for name in habits.assigned & habits.read if name not in blank}
        blank |= {name: start.value for name, start in starts.items() if start is not None and start.kind == "constant"}
    return blank


def computed_attributes(module: nn.Module, known: Mapping[int, Any]) -> list[str]:
    """Return the attributes of a module that its forward computes with and that may come of a parameter.

    These are tensors that autograd says were computed; those that `train` computes, which has no inputs, or another
    method does from a parameter; and objects of other classes than a container's that the constructor has made empty.
    Nobody knows what they were before.

    Args:
        module: of a model; not changed.
        known: the model's modules, see `habits.given_to`.
    """
    blank, found = blank_caches(module, known), []
    for name, value in _holding_tensors(module, known):
        habits = habits_of(type_of(module))
        if name not in blank and name in habits.read:
            start, held = habits.starts.get(name), list(tensors_within([value], known))
            made_empty = start is not None and start.kind == "empty" and not isinstance(value, Tensor)
            computed = made_empty or name in habits.switched or not all(tensor.is_leaf for tensor in held)
            # A mask is a choice, and no number that would be another one now.
            numbers = any(t.is_floating_point() and not isinstance(t, nn.Parameter) for t in held)
            if computed or (numbers and name in computed_by_methods(module)):
                found.append(name)
    return [*found, *_kept_in_closures(module, known)]


def _kept_in_closures(module: nn.Module, known: Mapping[int, Any]) -> Iterator[str]:
    """Yield the variables in closures of a module's functions that these fill, and that hold tensors."""
    for function in functions_within(_attributes(module).values()):
        closure = closure_of(function)
        for name in (assigned_outside(function.__code__) | filled_outside(function)) if closure else ():
            held = tensors_within([closure[name].cell_contents], known) if name in closure else ()
            if any(not isinstance(tensor, nn.Parameter) for tensor in held):
                yield name


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not _is_registry(name)}


def _holding_numbers(module: nn.Module, known: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that hold tensors, and numbers and arrays that the forward may have taken out of some."""
    yield from _holding_tensors(module, known)
    habits = habits_of(type_of(module))
    for name in habits.assigned - habits.accumulated:
        if isinstance(vars(module).get(name), float | np.ndarray):
            yield name, vars(module)[name]


def _holding_tensors(module: nn.Module, known: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in kept_attributes(module).items():
        if _is_registry(name) or isinstance(value, _SIMPLE) or (isinstance(module, nn.RNNBase) and name[:5] == "_flat"):
            continue
        if next(tensors_within([value], known), None) is not None:
            yield name, value


_SIMPLE = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.MethodType, nn.Module)


@functools.lru_cache(maxsize=1024)
def _of_the_class(kind: Any) -> Mapping[str, Any]:
    """Return the containers that the forward of a class fills and reads and that belong to the class."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    of_it = {name for base in bases for name, value in vars(base).items() if isinstance(value, CONTAINERS)}
    habits = habits_of(kind) if of_it - IGNORED else None
    filled = habits.filled & habits.read if habits is not None else frozenset()
    return {name: inspect.getattr_static(kind, name) for name in (of_it - IGNORED) & filled}


IGNORED = {"__annotations__", "__constants__", "neuron_patterns"}


def _emptied(container: Any) -> Any:
    empty = copy.copy(container)
    empty.clear()
    return empty


def _is_cache(module: nn.Module, name: str, value: Any, given: Collection[str]) -> bool:
    habits = habits_of(type_of(module))
    changed = name in habits.assigned or name in given or (name in habits.filled and isinstance(value, CONTAINERS))
    return changed and name in habits.read


class Attributes:
    """The attributes of a copy's modules as they are now, to be given back after each forward pass.

    What methods keep by `functools.lru_cache` the copy keeps on its own, and forgets.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._memories = [_own_memory(module, name) for module in modules for name in _memories(type_of(module))]
        self._values = [(vars(module), dict(vars(module))) for module in modules]
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._cells: list[tuple[types.CellType, Any]] = []
        for module in modules:
            if not isinstance(module, nn.RNNBase):
                collect_containers(list(_attributes(module).values()), self._contents)
        for function in functions_within(value for module in modules for value in _attributes(module).values()):
            if isinstance(function, functools._lru_cache_wrapper):
                self._memories.append(function)
            self._cells += [(cell, cell.cell_contents) for cell in closure_of(function).values()]
        collect_containers([content for _, content in self._cells], self._contents)
        self._buffers = [(module._buffers, dict(module._buffers)) for module in modules]

    def restore(self) -> None:
        """Give the modules their attributes back, the containers in these what they held, and cut buffers off."""
        for values, before in self._values:
            if len(values) != len(before) or not all(map(operator.is_, values.values(), before.values())):
                values.clear()
                values.update(before)
        give_contents_back(self._contents)
        for cell, content in self._cells:
            cell.cell_contents = content
        for buffers, before in self._buffers:
            if not buffers:
                continue
            # Made in a forward pass, or computed from a parameter: the graph of that is gone after one backward pass.
            made = [name for name in buffers if before.get(name) is None and buffers[name] is not None]
            if made or any(buffer is not None and buffer.requires_grad for buffer in buffers.values()):
                for name in [name for name in buffers if name not in before]:
                    del buffers[name]
                buffers.update(before)
        for memory in self._memories:
            memory.cache_clear()


@functools.lru_cache(maxsize=1024)
def _memories(kind: Any) -> tuple[str, ...]:
    """Return the methods of a class that keep what they return by `functools.lru_cache`."""
    names = {name for base in kind.__mro__ for name in vars(base)}
    return tuple(n for n in sorted(names) if isinstance(inspect.getattr_static(kind, n), functools._lru_cache_wrapper))


def _own_memory(module: nn.Module, name: str) -> Any:
    """Give a copy such a method with a memory of its own, and return it: that of the class is everybody's."""
    method = inspect.getattr_static(type(module), name)
    own = functools.lru_cache(**method.cache_parameters())(types.MethodType(method.__wrapped__, module))
    vars(module)[name] = own
    return own


def _is_registry(name: str) -> bool:
    """Return whether an attribute is one of torch's own, for what is registered with a module."""
    return "hooks" in name or name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def collect_containers(value: Any, found: dict[int, tuple[Any, Any]], *, entries: bool = True) -> None:
    """Add every container within a value to `found`, by its id, with a copy of what it holds.

    The attributes of an object of the caller's are such a container, and a tensor is one of its entries.

    Args:
        value: what a module holds.
        found: what was found so far; updated.
        entries: whether tensors count.
    """
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.layout == torch.strided and not (value.is_meta or value.is_nested)
        if entries and plain and value.is_leaf and not value.is_inference():
            found.setdefault(id(value), (value, _Entries(value)))
        return
    if not isinstance(value, (tuple, *CONTAINERS)):
        attributes = own_attributes(value)
        if attributes is None:
            return
        value = attributes
    if id(value) in found:
        return
    if not isinstance(value, tuple):
        found[id(value)] = (value, copy.copy(value))
    for item in list(value.values() if isinstance(value, Mapping) else value):
        collect_containers(item, found, entries=entries)


class _Entries:
    """The entries of a tensor, to be written back if it was written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.entries = tensor.detach().clone()
        self.version = tensor._version

    def give_back(self, tensor: Tensor) -> None:
        if tensor._version != self.version:
            with torch.no_grad():
                tensor.copy_(self.entries)
            self.version = tensor._version


def give_contents_back(contents: Mapping[int, tuple[Any, Any]]) -> None:
    """Give the containers that `collect_containers` found what they held then."""
    for container, content in contents.values():
        if isinstance(content, _Entries):
            content.give_back(container)
        elif not _holds_the_same(container, content):
            container.clear()
            if isinstance(container, MutableSequence):
                container.extend(content)
            elif isinstance(container, MutableSet):
                container |= content
            else:
                container.update(content)


def _holds_the_same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if not isinstance(container, Mapping):
        return all(map(operator.is_, container, content))
    return all(map(operator.is_, container, content)) and all(map(operator.is_, container.values(), content.values()))
