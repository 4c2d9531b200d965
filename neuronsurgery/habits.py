"""What the code of a module's class does with its attributes and parameters, read off its source."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from neuronsurgery.gathering import plain_class
from neuronsurgery.parametrized import tensor_attributes
from neuronsurgery.sources import DATA, FORWARD, SWITCHES, Code, Start, function_of, tree_of


@dataclass(frozen=True)
class Habits:
    """What the code of a class does with attributes, by their names.

    Attributes:
        assigned: those that its forward or a switch assigns.
        filled: those whose content these change.
        switched: those that a switch assigns; it has no inputs to compute them from.
        accumulated: those that these change by `+=` and the like.
        given: the paths of attributes of other objects that these assign or fill.
        read: those that its forward reads.
        starts: what its constructor sets them to; those that it does not mention are missing.
    """

    assigned: frozenset[str]
    filled: frozenset[str]
    switched: frozenset[str]
    accumulated: frozenset[str]
    given: frozenset[str]
    read: frozenset[str]
    starts: Mapping[str, Start]


def type_of(module: nn.Module) -> Any:  # a class: mypy does not take those for hashable
    """Return the module's class; of a parametrized one, or one that FSDP shards, that which it was derived from."""
    return plain_class(type(module).__bases__[0] if is_parametrized(module) else type(module))


@functools.lru_cache(maxsize=1024)
def _forward(kind: Any) -> Code:
    return Code.of(kind, FORWARD)


@functools.lru_cache(maxsize=1024)
def habits_of(kind: Any) -> Habits:
    """Return what the code of a class does with attributes."""
    forward, switches = _forward(kind), Code.of(kind, SWITCHES)
    constructor = Code.of(kind, ("__init__",))
    starts = dict(constructor.starts)
    for name in (forward.cleared | switches.cleared) - starts.keys():
        starts[name] = Start("constant", None)  # some method sets it back to None
    return Habits(
        frozenset(forward.assigned | switches.assigned),
        frozenset(forward.filled | switches.filled),
        frozenset(switches.assigned),
        frozenset(forward.accumulated | switches.accumulated),
        frozenset(forward.given | switches.given),
        frozenset(forward.read),
        starts,
    )


def overwriting(module: nn.Module) -> list[str]:
    """Return the methods of a module, but for those that its forward mentions, that write into memory of parameters.

    That is to assign `.data`, or to call a function that works in place on `.data` or on a parameter: merging an
    adapter, resizing a table, initialising anew.
    """
    methods = _other_methods(type_of(module))
    return [name for name, code in methods.items() if any(_is_parameter(module, path) for path in code.in_place)]


def doubtful(module: nn.Module) -> list[str]:
    """Return the methods of a module, but for those that its forward mentions, that may write into parameters.

    They get at parameters, or hand a module on, and write into something in place or hand on whatever it is.
    """
    return [
        name
        for name, code in _other_methods(type_of(module)).items()
        if not code.of_torch
        and (code.hands_on or (code.writes and (code.gathers or any(_is_parameter(module, p) for p in code.paths))))
    ]


def computed_by_methods(module: nn.Module) -> set[str]:
    """Return the attributes that other methods of a module than its forward set to something made of parameters."""
    kind, found = type_of(module), set()
    for code in _other_methods(kind).values():
        found |= {name for name, paths in code.sources.items() if any(_is_made(module, path) for path in paths)}
    return found


def _is_made(module: nn.Module, path: str) -> bool:
    """Return whether a path is that of a parameter, or of a method or property that reads one."""
    if _is_parameter(module, path):
        return True
    method = function_of(inspect.getattr_static(type_of(module), path, None)) if path.isidentifier() else None
    return method is not None and any(_is_parameter(module, inner) for inner in Code.of(type_of(module), [path]).paths)


def given_to(modules: Iterable[nn.Module]) -> dict[int, set[str]]:
    """Return for each module of a model, by its id, the attributes that the forward of another one writes."""
    found: dict[int, set[str]] = {id(module): set() for module in modules}
    for module in modules:
        for path in habits_of(type_of(module)).given:
            holder, name = _holder(module, path)
            if id(holder) in found:
                found[id(holder)].add(name)
    return found


def written_by_forward(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return what a module's forward writes into in evaluation mode: the holder of a parameter, and its name there."""
    paths = _forward(type_of(module)).in_place
    return [_holder(module, path) for path in sorted(paths) if path != DATA and _is_parameter(module, path)]


CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")
"""Attributes that say whether a module's forward runs parts of it again in the backward pass."""


@functools.lru_cache(maxsize=1024)
def checkpoints_in_training(kind: Any) -> Literal["no", "alone", "with more"]:
    """Return whether the forward of a class checkpoints in training mode alone, and what else that mode does there.

    "no" is of a forward that goes by the flag whatever the mode; "alone" of one that looks at the mode only together
    with the flag; "with more" of one in which dropout or the like would wake, too.
    """
    tree = tree_of(kind.forward) if inspect.isfunction(kind.forward) else None
    if tree is None:
        return "no"
    modes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "training"]
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.BoolOp) and _mentions(node, CHECKPOINTING)]
    guarded = {id(node) for guard in guards for node in ast.walk(guard)}
    if not any(id(node) in guarded for node in modes):
        return "no"
    return "alone" if all(id(node) in guarded for node in modes) else "with more"


def _mentions(tree: ast.AST, names: Collection[str]) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr in names for node in ast.walk(tree))


def _holder(module: nn.Module, path: str) -> tuple[Any, str]:
    """Return what a path of attributes ends in, as far as it leads without running a property, and its last name."""
    *parents, name = path.split(".")
    holder: Any = module
    for parent in parents:
        held = holder._modules if isinstance(holder, nn.Module) and parent in holder._modules else None
        holder = (getattr(holder, "__dict__", {}) if held is None else held).get(parent)
    return holder, name


def _is_parameter(module: nn.Module, path: str) -> bool:
    holder, name = _holder(module, path)
    return path == DATA or (isinstance(holder, nn.Module) and name in tensor_attributes(holder))


@functools.lru_cache(maxsize=1024)
def _other_methods(kind: Any) -> dict[str, Code]:
    """Return what is found in each method of a class that neither its forward nor a switch mentions."""
    names = {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}
    reached = Code.of(kind, (*FORWARD, *SWITCHES)).methods
    found = {}
    for name in sorted(names - reached):
        function = None if name.startswith("__") else function_of(inspect.getattr_static(kind, name, None))
        if function is not None:
            found[name] = Code()
            found[name].of_torch = f"{function.__module__}.".startswith("torch.")
            found[name].look_at(function, kind)
    return found
