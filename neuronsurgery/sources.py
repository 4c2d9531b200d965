"""What the source of some functions does with the attributes of a module. Nothing is run.

What is followed are the methods and properties of the class that a function mentions, those of its base classes, and
functions of its file that are given the module.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

FORWARD = ("forward", "__call__")
SWITCHES = ("train", "eval")
"""The methods that a model runs by itself, and those that it runs between training and evaluation."""

RECORDING = {"append", "appendleft", "extend", "insert", "add", "update", "__setitem__", "clear"}
FILLING = RECORDING | {"setdefault", "pop"}
"""Methods that change a container; the first read nothing from it."""

IN_PLACE = {name for name in (*dir(Tensor), *dir(nn.init)) if name.endswith("_") and not name.endswith("__")}
IN_PLACE -= {"requires_grad_", "detach_", "retain_grad_", "rename_", "share_memory_"}
"""Functions that write into a tensor."""

DATA = ".data"
"""Stands for the `.data` of anything that is no attribute of the module, among the paths written to."""

GATHERING = {"parameters", "named_parameters", "modules", "named_modules", "children", "state_dict", "_parameters"}
"""What gets at parameters without naming them."""

HANDING_ON = {"apply", "vector_to_parameters"}
"""Functions that write into the parameters of what they are given, or may."""


class Start(NamedTuple):
    """What a constructor sets an attribute to: a constant, something empty, or something else."""

    kind: Literal["constant", "empty", "filled"]
    value: Any = None


class Code:
    """What was found in the source of some functions of a class.

    Attributes:
        methods: the names that were followed.
        assigned: attributes of the module that are assigned.
        cleared: those that are assigned None.
        filled: those whose content is changed.
        accumulated: those that are changed by `+=` and the like.
        given: the paths of attributes of other objects that are assigned or filled.
        sources: what is mentioned in what an attribute is assigned or filled with: paths of attributes, methods too.
        read: those that are read.
        starts: what those assigned are assigned last.
        in_place: the paths of attributes from the module that are written to in place in evaluation mode, or `DATA`.
        paths: the paths that are read.
        writes: whether anything is written to in place.
        gathers: whether it gets at parameters by `parameters()` and the like.
        of_torch: whether it is torch's own code.
        hands_on: whether it gives modules to functions that may write into their parameters.
    """

    def __init__(self) -> None:
        self.methods: set[str] = set()
        self.assigned: set[str] = set()
        self.cleared: set[str] = set()
        self.filled: set[str] = set()
        self.read: set[str] = set()
        self.accumulated: set[str] = set()
        self.given: set[str] = set()
        self.sources: dict[str, set[str]] = {}
        self.starts: dict[str, Start] = {}
        self.in_place: set[str] = set()
        self.paths: set[str] = set()
        self.writes = self.gathers = self.hands_on = self.of_torch = False

    @classmethod
    def of(cls, kind: Any, entries: Iterable[str]) -> Code:
        """Return what is found in some methods, those that they mention, and so on; torch's own are not looked at."""
        code, queue = cls(), list(entries)
        while queue:
            name = queue.pop()
            if name in code.methods:
                continue
            code.methods.add(name)
            for base in reversed(kind.__mro__):
                held = vars(base).get(name)
                for function in filter(None, map(function_of, (held, getattr(held, "fset", None)))):
                    if not f"{function.__module__}.".startswith("torch."):
                        queue += code.look_at(function, base)
        return code

    def look_at(self, function: types.FunctionType, owner: type) -> set[str]:
        """Add what is found in a function; return the names of methods that it mentions."""
        tree = tree_of(function)
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        if tree is None or not arguments:
            self.starts |= {name: Start("filled") for name in function.__code__.co_names if tree is None}
            return set()
        found = _Visitor(self, arguments[0], owner)
        found.visit(tree)
        for helper in found.helpers:
            inner = function.__globals__.get(helper)
            ours = isinstance(inner, types.FunctionType) and inner.__module__ == function.__module__
            if ours and helper not in self.methods:
                self.methods.add(helper)
                found.mentioned |= self.look_at(inner, owner)  # type: ignore[arg-type]  # it is a function
        return found.mentioned


class _Visitor(ast.NodeVisitor):
    """Sees what the source of one function does with the attributes of the module, which goes by one name in it."""

    def __init__(self, code: Code, module: str, owner: type) -> None:
        self.code, self.module, self.owner = code, module, owner
        self.mentioned: set[str] = set()
        self.helpers: set[str] = set()
        self.variables: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.taken: dict[str, set[str]] = {}
        self.training = False

    def attribute(self, node: ast.AST | None) -> str | None:
        """Return the attribute of the module that an expression is, perhaps by a variable's name."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.module:
            private = node.attr.startswith("__") and not node.attr.endswith("__")
            return f"_{self.owner.__name__.lstrip('_')}{node.attr}" if private else node.attr
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._store(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._store(node.target, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._store(node.target, None)
        name = self.attribute(node.target)
        self.code.read |= {name} if name else set()
        self.code.accumulated |= {name} if name else set()
        self._note_in_place(node.target)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
        outer = self.training
        self.training |= any(self.attribute(test) == "training" for test in tests)
        for statement in node.body:
            self.visit(statement)
        self.training = outer
        for statement in node.orelse:
            self.visit(statement)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._store(target, None)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.attribute(node)
        if name is not None:
            self.mentioned.add(name)
            if isinstance(node.ctx, ast.Load):
                self.code.read.add(name)
        elif isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
            self.mentioned.add(node.attr)
        path = self.path(node)
        self.code.paths |= {path} if path and isinstance(node.ctx, ast.Load) else set()
        self.code.gathers |= node.attr in GATHERING
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.id if isinstance(function, ast.Name) else ""
        of_module = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == self.module
        if of_module and name:
            self.helpers.add(name)
            said = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
            if name == "setattr" and isinstance(said, str):
                self.code.assigned.add(said)
            elif name in ("getattr", "hasattr") and isinstance(said, str):
                self.code.read.add(said)
        if isinstance(function, ast.Attribute):
            receiver = self.attribute(_whole(function.value))
            if function.attr in FILLING:
                self._store_within(function.value, *node.args)
                self._note_given(_whole(function.value))
            if receiver is not None and function.attr in RECORDING:
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    self.visit(argument)
                return
            if function.attr in IN_PLACE:
                # init.zeros_(x), or x.mul_(...)
                of_torch = ast.unparse(function.value).rpartition(".")[2] in ("init", "torch", "F", "functional")
                self._note_in_place(node.args[0] if of_torch and node.args else function.value)
        if any(keyword.arg == "max_norm" for keyword in node.keywords) and len(node.args) > 1:
            self._note_in_place(node.args[1])  # F.embedding(x, weight, max_norm=...)
        self._note_handed_on(node)
        self.generic_visit(node)

    def _store(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            fits = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            values: list[Any] = value.elts if fits else [None] * len(target.elts)  # type: ignore[union-attr]  # it fits
            for part, of_it in zip(target.elts, values, strict=True):
                self._store(part, of_it)
        elif isinstance(target, ast.Name):
            named, path = self.attribute(value), self.path(value)
            if named is not None:
                self.variables[target.id] = named
            self.aliases.pop(target.id, None)
            if path is not None:
                self.aliases[target.id] = path
            self.taken[target.id] = self._mentions(value)
        elif isinstance(target, ast.Subscript):
            self._store_within(target.value, value)
            self._note_given(_whole(target.value))
            self._note_in_place(target.value)
        elif isinstance(target, ast.Attribute):
            name = self.attribute(target)
            if name is not None:
                start = _start(value)
                self.code.assigned.add(name)
                self.code.cleared |= {name} if start == Start("constant", None) else set()
                self.code.starts[name] = start
                self.code.sources.setdefault(name, set()).update(self._mentions(value))
            else:
                self._store_within(target.value, value)
                self._note_given(target)
                if target.attr == "data":
                    self._note_in_place(target)

    def _store_within(self, container: ast.expr, *values: ast.expr | None) -> None:
        """Note that the content of an attribute changes: self.cache[key] = ..., self.store.value = ..."""
        name = self.attribute(_whole(container))
        if name is not None:
            self.code.filled.add(name)
            for value in values:
                self.code.sources.setdefault(name, set()).update(self._mentions(value))

    def _mentions(self, value: ast.AST | None) -> set[str]:
        """Return the paths of attributes from the module in an expression, those of its variables too."""
        nodes = list(ast.walk(value)) if value is not None else []
        own = {path for node in nodes if (path := self.path(node)) is not None}
        return own.union(*(self.taken.get(node.id, ()) for node in nodes if isinstance(node, ast.Name)))

    def _note_given(self, node: ast.expr) -> None:
        """Note what is written into an attribute of something within the module: self.child.cached = ..."""
        path = self.path(node)
        if path is not None and "." in path:
            self.code.given.add(path)

    def path(self, node: ast.AST | None) -> str | None:
        """Return the path of attributes from the module that an expression is, without a `.data` at its end."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        own = isinstance(node.value, ast.Name) and node.value.id == self.module
        if own:
            return node.attr
        parent = self.path(node.value)
        return parent if parent is None or node.attr == "data" else f"{parent}.{node.attr}"

    def _note_in_place(self, node: ast.AST | None) -> None:
        """Note what is written to in place: `.data` of anything, or a path of attributes from the module."""
        node = node.value if isinstance(node, ast.Subscript) else node
        path = self.path(node)
        self.code.writes |= path is None
        if path is None and isinstance(node, ast.Attribute) and node.attr == "data":
            path = DATA
        if path is not None and not self.training:
            self.code.in_place.add(path)

    def _note_handed_on(self, node: ast.Call) -> None:
        """Note where the module, or a part of it, is given to a function that is not Python's own."""
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = any(self._is_module(argument) for argument in node.args)
        other = isinstance(node.func, ast.Name) and not hasattr(builtins, name) and given
        self.code.hands_on |= name in HANDING_ON or other

    def _is_module(self, node: ast.expr) -> bool:
        return (isinstance(node, ast.Name) and node.id == self.module) or self.path(node) is not None


def _whole(node: ast.expr) -> ast.expr:
    """Return what an expression is an entry of, or the expression itself."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node


def _start(value: ast.expr | None) -> Start:
    if isinstance(value, ast.Constant):
        return Start("constant", value.value)
    if isinstance(value, ast.List | ast.Set | ast.Dict):
        return Start("filled" if (value.keys if isinstance(value, ast.Dict) else value.elts) else "empty")
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        given = [*value.args, *(keyword.value for keyword in value.keywords)]
        bare = all(isinstance(part, ast.Constant) and part.value is None for part in given) or name.endswith(
            ("defaultdict", "deque")
        )
        return Start("empty" if bare and not name.startswith("self.") else "filled")
    return Start("filled")


def function_of(value: Any) -> types.FunctionType | None:
    """Return the function behind a method, a property or decorators."""
    value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, types.FunctionType) else None


@functools.lru_cache(maxsize=4096)
def tree_of(function: types.FunctionType) -> ast.AST | None:
    """Return the syntax tree of a function; None if it was made from a string."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.lru_cache(maxsize=1024)
def filled_outside(function: types.FunctionType) -> frozenset[str]:
    """Return the variables of its closure whose content a function changes, and that it does more with than that."""
    names, tree = function.__code__.co_freevars, tree_of(function)
    changed, written = set(), set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Subscript | ast.Attribute):
            stored = isinstance(node.ctx, ast.Store)
            target = _whole(node.value)
            if isinstance(target, ast.Name) and (stored or getattr(node, "attr", "") in FILLING):
                changed.add(target.id)
                written |= {id(target)} if stored or getattr(node, "attr", "") in RECORDING else set()
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name)] if tree is not None else []
    read = {node.id for node in loads if id(node) not in written}
    return frozenset(changed & read).intersection(names)
