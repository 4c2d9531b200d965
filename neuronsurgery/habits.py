"""What the code of a module's class does with attributes and parameters, read off its bytecode and its constructor.

Nothing is run. What is followed are the methods and properties of the class that its forward mentions.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

FORWARD = ("forward", "__call__")
SWITCHES = ("train", "eval")
"""The methods that a model runs by itself, and those that it runs between training and evaluation."""

RECORDING = {"append", "appendleft", "extend", "insert", "add", "update", "__setitem__", "clear"}
FILLING = RECORDING | {"setdefault", "pop"}
"""Methods that change a container; the first read nothing from it."""

IN_PLACE = {name for name in (*dir(Tensor), *dir(nn.init)) if name.endswith("_") and not name.endswith("__")}
IN_PLACE -= {"requires_grad_", "detach_", "retain_grad_", "rename_", "share_memory_"}
"""Functions that write into a tensor."""


class Start(NamedTuple):
    """What a constructor sets an attribute to: a constant, something empty, or something else."""

    kind: Literal["constant", "empty", "filled"]
    value: Any = None


@dataclass(frozen=True)
class Habits:
    """What the code of a class does with attributes, by their names.

    Attributes:
        written: those that its forward or a switch assigns, or whose content these change.
        read: those that its forward reads.
        starts: what its constructor sets them to; those that it does not mention are missing.
    """

    written: frozenset[str]
    read: frozenset[str]
    starts: Mapping[str, Start]


def type_of(module: nn.Module) -> Any:  # a class: mypy does not take those for hashable
    """Return the module's class; of a parametrized one that which torch has derived from."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


@functools.lru_cache(maxsize=1024)
def habits_of(kind: type[Any]) -> Habits:
    """Return what the code of a class does with attributes."""
    written: set[str] = set()
    read: set[str] = set()
    for code in _reached(kind, FORWARD):
        changed, loaded = _written_and_read(code)
        written |= changed
        read |= loaded
    for code in _reached(kind, SWITCHES):
        written |= _written_and_read(code)[0]
    starts: dict[str, Start] = {}
    for base in reversed(kind.__mro__):
        constructor = _function(vars(base).get("__init__"))
        if constructor is not None and not _is_of_torch(constructor):
            starts.update(_starts(constructor))
    return Habits(frozenset(written), frozenset(read), starts)


@functools.lru_cache(maxsize=1024)
def overwriting(kind: type[Any], parameters: frozenset[str]) -> frozenset[str]:
    """Return the methods of a class, but for its forward, that write into the memory of parameters.

    That is a line with `.data =`, with `.data` and a function that works in place, or with such a function and the name
    of a parameter: merging an adapter, resizing a table, initialising anew.

    Args:
        kind: the class.
        parameters: the names of its own parameters.
    """
    found = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = _function(value) if name not in (*FORWARD, *SWITCHES) and not name.startswith("__") else None
            if function is not None and any(_overwrites(code, parameters) for code in _nested(function.__code__)):
                found.add(name)
    return frozenset(found)


def _reached(kind: type[Any], entries: Iterable[str]) -> Iterator[types.CodeType]:
    """Yield the code of some methods, and of the methods and properties of the class that it mentions, and so on."""
    queue = list(entries)
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        function = _function(inspect.getattr_static(kind, name, None)) if name not in seen else None
        seen.add(name)
        if function is not None and not _is_of_torch(function):
            for code in _nested(function.__code__):
                yield code
                queue += code.co_names


def _function(value: Any) -> types.FunctionType | None:
    """Return the function behind a method, a property or decorators."""
    value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, types.FunctionType) else None


def _is_of_torch(function: types.FunctionType) -> bool:
    return f"{function.__module__}.".startswith("torch.")


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _written_and_read(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return the names of the attributes that some code assigns, or whose content it changes, and of those it loads."""
    steps = list(dis.get_instructions(code))
    written = {step.argval for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")}
    loads = [step if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for step in steps]
    recorded = [after is not None and after.argval in RECORDING for after in [*loads[1:], None]]
    read = {step.argval for step, only in zip(loads, recorded, strict=True) if step is not None and not only}
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    if {"setattr", "delattr", "__dict__"}.intersection(code.co_names):
        written |= texts
    if {"getattr", "hasattr", "__dict__"}.intersection(code.co_names):
        read |= texts
    return written | _filled(steps), read


def _filled(steps: Sequence[dis.Instruction]) -> set[str]:
    """Return the attributes that stand in one line with what changes a container, perhaps by a variable's name."""
    names: dict[int, set[str]] = {}
    filling: set[int] = set()
    filled: set[str] = set()
    variables: dict[str, str] = {}
    line = 0
    for before, step in zip([None, *steps], steps, strict=False):
        line = _line(step) or line
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.setdefault(line, set()).add(step.argval)
        elif step.opname.startswith("LOAD_FAST") and step.argval in variables:
            names.setdefault(line, set()).add(variables[step.argval])
        elif step.opname == "STORE_ATTR" and before is not None and before.opname == "LOAD_ATTR":
            filled.add(before.argval)  # self.cache.table = ...
        elif step.opname == "STORE_FAST" and before is not None and before.opname == "LOAD_ATTR":
            variables[step.argval] = before.argval
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or (
            step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in FILLING
        ):
            filling.add(line)
    return filled.union(*(names.get(line, set()) for line in filling))


def _overwrites(code: types.CodeType, parameters: frozenset[str]) -> bool:
    """Return whether some code has a line that writes into the memory of a parameter."""
    steps = list(dis.get_instructions(code))
    loaded: dict[int, set[str]] = {}
    subscripts: set[int] = set()
    line = 0
    for before, step in zip([None, *steps], steps, strict=False):
        line = _line(step) or line
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"):
            loaded.setdefault(line, set()).add(step.argval)
        elif step.opname == "STORE_SUBSCR":
            subscripts.add(line)
        elif step.opname == "STORE_ATTR" and step.argval == "data" and not _is_of_itself(before, code):
            return True
    return any(
        ("data" in names and (line in subscripts or names & IN_PLACE)) or (names & IN_PLACE and names & parameters)
        for line, names in loaded.items()
    )


def _is_of_itself(loaded: dis.Instruction | None, code: types.CodeType) -> bool:
    """Return whether what was loaded is the module: it may have an attribute of its own that is called `data`."""
    return loaded is not None and bool(code.co_varnames) and loaded.argval == code.co_varnames[0]


def _line(step: dis.Instruction) -> int | None:
    positions = getattr(step, "positions", None)  # since Python 3.11
    return step.starts_line if positions is None else positions.lineno


# The constructor


def _starts(constructor: types.FunctionType) -> dict[str, Start]:
    """Return what a constructor sets attributes to; the last assignment in the deepest block counts."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):  # made from a string: what it sets is not known
        steps = dis.get_instructions(constructor)
        return {step.argval: Start("filled") for step in steps if step.opname == "STORE_ATTR"}
    starts: dict[str, Start] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                starts.update(_assigned(target, node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            starts.update(_assigned(node.target, node.value))
    return starts


def _assigned(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, Start]]:
    if isinstance(target, ast.Attribute):
        yield target.attr, _start(value)
    elif isinstance(target, ast.Tuple | ast.List):
        fits = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        values: list[Any] = value.elts if fits else [None] * len(target.elts)  # type: ignore[union-attr]  # it fits
        for part, of_it in zip(target.elts, values, strict=True):
            yield from _assigned(part, of_it)


def _start(value: ast.expr | None) -> Start:
    if isinstance(value, ast.Constant):
        return Start("constant", value.value)
    if isinstance(value, ast.List | ast.Set | ast.Dict):
        return Start("filled" if (value.keys if isinstance(value, ast.Dict) else value.elts) else "empty")
    if isinstance(value, ast.Call):
        bare = not (value.args or value.keywords) or ast.unparse(value.func).endswith("defaultdict")
        return Start("empty" if bare else "filled")
    return Start("filled")
