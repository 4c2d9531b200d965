"""What objects hold at any depth: those among the inputs of a model, and those in the attributes of its modules."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import types
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from neuronsurgery.wrappers import without_fsdp


def tensors_within(values: Iterable[Any], known: Container[int] = ()) -> Iterator[Tensor]:
    """Yield the tensors that some objects hold at any depth, each once; modules are not entered.

    Args:
        values: the objects.
        known: ids of objects that are not entered either.
    """
    return (found for found in objects_within(values, (Tensor,), (nn.Module,), known))


def objects_within(
    values: Iterable[Any], wanted: tuple[type, ...], closed: tuple[type, ...] = (), known: Container[int] = ()
) -> Iterator[Any]:
    """Yield the objects of some classes that others hold at any depth, each once and without looking inside them.

    Args:
        values: where to look.
        wanted: the classes to find.
        closed: classes that are neither found nor entered.
        known: ids of objects that are not entered either.
    """
    # What a deep copy takes as it is needs no look inside, and classes and functions lead everywhere.
    atomic = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType, weakref.ref)
    plain = (str, bytes, int, float, complex, bool, type(None))
    queue = list(values)
    seen: dict[int, Any] = {}
    while queue:
        value = queue.pop()
        if id(value) in seen or id(value) in known or isinstance(value, plain + atomic + closed):
            continue
        seen[id(value)] = value
        if isinstance(value, wanted):
            yield value
        else:
            queue.extend(gc.get_referents(value))


def uncopyable_within(value: Any, known: Container[int] = ()) -> Iterator[Any]:
    """Yield the objects within a value that refuse a copy and hold no tensor or module: locks, files, process groups.

    A thread or a pool of them counts as one object: a copy of its parts would be no thread.

    Args:
        value: what cannot be copied.
        known: ids of objects that are not entered.
    """
    queue, seen = [value], set()
    while queue:
        held = queue.pop()
        if id(held) in seen or id(held) in known or isinstance(held, Tensor | nn.Module | type | types.FunctionType):
            continue
        seen.add(id(held))
        if _refuses_copies(held) and not any(True for _ in objects_within([held], (Tensor, nn.Module))):
            yield held
        else:
            queue.extend(gc.get_referents(held))


def _refuses_copies(value: Any) -> bool:
    if isinstance(value, threading.Thread | concurrent.futures.Executor):
        return True
    try:
        value.__reduce_ex__(4)
    except Exception:
        return not hasattr(value, "__deepcopy__")
    return False


def kept_attributes(module: nn.Module) -> Mapping[str, Any]:
    """Return the attributes that a copy of a module takes over: those that its class pickles, where it says which.

    A Lightning module leaves its trainer out, which holds the data, the optimiser and the model once more.
    """
    # The class that torch gives a parametrized module refuses to be pickled.
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    attributes = without_fsdp(vars(module))
    pickled, restored = getattr(kind, "__getstate__", None), getattr(kind, "__setstate__", None)
    default = getattr(object, "__getstate__", None)
    if pickled is None or pickled is default or restored is not nn.Module.__setstate__:
        return attributes
    state = pickled(module)
    registered = ("_parameters", "_buffers", "_modules")
    whole = isinstance(state, dict) and all(state.get(key) is vars(module).get(key) for key in registered)
    return without_fsdp(state) if whole else attributes


def held_by_attributes(module: nn.Module, known: Container[int]) -> Iterator[Tensor | Optimizer]:
    """Yield the tensors and optimisers that a module's plain attributes hold; objects of a known id are not entered.

    Optimisers hold parameters to update them, not to compute with them: these are not looked for.
    """
    registered = ("_parameters", "_buffers", "_modules")
    attributes = kept_attributes(module).items()
    values = [value for key, value in attributes if key not in registered and not key.endswith("_hooks")]
    return objects_within(values, (Tensor, Optimizer), known=known)


def held_by_functions(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a replaced method of a module holds: in its closure, defaults, or containers of these."""
    functions = (types.FunctionType, types.MethodType)
    queue: list[Any] = [value for value in vars(module).values() if isinstance(value, functions)]
    seen: dict[int, Any] = {}
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, types.MethodType):
            queue.append(value.__func__)
        elif isinstance(value, types.FunctionType):
            queue += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            queue += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, list | tuple | set):
            queue += value
        elif isinstance(value, dict):
            queue += value.values()


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def tensors_in_attributes(module: nn.Module, known: Container[int]) -> Iterator[Tensor]:
    """Yield the tensors that a module's plain attributes hold at any depth; objects of a known id are not entered."""
    return (held for held in held_by_attributes(module, known) if isinstance(held, Tensor))
