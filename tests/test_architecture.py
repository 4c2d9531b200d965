"""Promises about the code itself: imports run one way, the core is small, everything public is documented."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import neuronsurgery

PACKAGE = Path(neuronsurgery.__file__).parent
ORDER = [
    *("types", "errors", "checks", "results", "digests", "draws", "atomic", "precision", "switches"),
    *("wrappers", "spread", "serving", "distributed", "paired", "objects", "parametrized", "guards", "gathering"),
    *("rebinding", "sources", "habits", "caches"),
    *("batches", "loaders", "losses", "objectives", "surveys", "copies", "forward"),
    *("layers", "neurons", "layouts", "discovery", "scores", "comparisons", "independence", "differentiation"),
    *("sums", "segments", "gradients", "hard"),
    *("edits", "rows", "state_dicts", "checkpoints", "plans", "refusals", "surgery"),
    *("training", "lora"),
    *("evaluation", "graph", "experts", "units", "silencing", "outcomes", "sharing", "sweeps", "fragile"),
    *("outputs", "normed", "means", "terms", "first_order", "effects", "pools", "masks"),
    *("splits", "searches", "critical", "judgement"),
    *("memorization", "files", "folders", "study"),
]
GRAPH_ORDER = [
    *("inputs", "writes", "operators", "replay", "readers", "recurrent", "makers", "export"),
    *("fills", "stacks", "schedules", "trust", "residual"),
]
LINES = 450
"""A longer file holds more than one idea."""
CORE = {"torch", "einops", "safetensors", "numpy", "typing_extensions"}
FOREIGN = {"sklearn", "torchvision", "timm", "transformers", "matplotlib", "scipy", "pandas", "PIL", "pytest"}
FOREIGN |= {"peft", "accelerate", "lightning"}
PUBLIC = [name for name in neuronsurgery.__all__ if name != "Group"]


def imports(source: str) -> Iterator[str]:
    """Every module that a file imports, inside functions and under TYPE_CHECKING too; relative ones as ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            prefix = "neuronsurgery" + (f".{node.module}" if node.module else "")
            yield from ([prefix] if node.module else [f"{prefix}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module == "neuronsurgery":
            yield from (f"neuronsurgery.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def wrong_ways(name: str, source: str) -> list[str]:
    """The imports of a module of ours that do not come before it in `ORDER`, within `graph` in `GRAPH_ORDER`."""
    ours = [module.split(".")[1:] for module in imports(source) if module.startswith("neuronsurgery.")]
    room, _, part = name.partition(".")
    before = ORDER[: ORDER.index(room)]
    within = GRAPH_ORDER[: GRAPH_ORDER.index(part)] if part else []
    return [
        ".".join(other)
        for other in ours
        if other[0] not in before and not (part and other[1:2] in [[w] for w in within])
    ]


def foreign(source: str) -> list[str]:
    allowed = CORE | set(sys.stdlib_module_names) | {"neuronsurgery"}
    return [module for module in imports(source) if module.split(".")[0] not in allowed]


CORE_FILES = sorted(path for folder in ("", "graph") for path in (PACKAGE / folder).glob("[!_]*.py"))
core_file = pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.name)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@core_file
def test_imports_run_one_way(path: Path) -> None:
    room, _, part = name_of(path).partition(".")
    assert part in GRAPH_ORDER if part else room in ORDER, f"{path.name} has no place in the order of imports"
    assert wrong_ways(name_of(path), path.read_text()) == []


@core_file
def test_a_file_is_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_functions_fit_on_a_screen() -> None:
    lengths = sorted(length for path in CORE_FILES for length in function_lengths(path.read_text()))
    assert lengths[len(lengths) * 9 // 10] <= 20


def function_lengths(source: str) -> Iterator[int]:
    """The lines of every function, its docstring aside."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert node.end_lineno is not None
                yield node.end_lineno - body[0].lineno + 1


@core_file
def test_no_module_is_called_like_what_it_exports(path: Path) -> None:
    module = importlib.import_module(f"neuronsurgery.{name_of(path)}")
    assert not hasattr(module, path.stem) or inspect.getmodule(getattr(module, path.stem)) is not module
    assert path.stem not in neuronsurgery.__all__ or inspect.ismodule(getattr(neuronsurgery, path.stem))


@core_file
def test_the_core_imports_nothing_else(path: Path) -> None:
    assert foreign(path.read_text()) == []


def test_the_tests_above_can_fail() -> None:
    assert wrong_ways("neurons", "from neuronsurgery.surgery import apply") == ["surgery"]
    assert wrong_ways("graph.replay", "from neuronsurgery.graph.trust import CheckedForward") == ["graph.trust"]
    assert wrong_ways("graph.trust", "from neuronsurgery.graph.replay import Graph") == []
    assert wrong_ways("graph.trust", "from neuronsurgery.sweeps import sweep") == ["sweeps"]
    assert list(function_lengths('def f():\n    """Doc."""\n    a = 1\n    return a\n')) == [2]
    assert wrong_ways("neurons", "def f():\n    import neuronsurgery.scores") == ["scores"]
    assert wrong_ways("neurons", "from . import edits") == ["edits"]
    assert wrong_ways("neurons", "from .edits import zero_out") == ["edits"]
    assert wrong_ways("neurons", "from neuronsurgery import study") == ["study"]
    assert wrong_ways("neurons", "from neuronsurgery.neurons import Layer") == ["neurons"]
    assert wrong_ways("neurons", "from neuronsurgery.layers import Layer\nimport torch") == []
    assert foreign("def f():\n    from sklearn.datasets import load_digits") == ["sklearn.datasets"]
    assert foreign("import torch.nn, json, numpy as np, einops") == []


PROBE = """
import json, sys
import neuronsurgery
loaded = sorted(set(sys.modules))
import torch, einops, safetensors.torch, numpy, typing_extensions
state = lambda: (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads())
alone, before = set(sys.modules), state()
names = {}
exec("from neuronsurgery import *", names)
ours, after = set(sys.modules), state()
import sklearn
print(json.dumps({
    "loaded": loaded, "new": sorted({name.split(".")[0] for name in ours - alone}),
    "modules": sorted(ours), "costly": sorted(ours - alone - {n for n in ours if n.startswith("neuronsurgery")}),
    "unchanged": before == after, "star": sorted(set(names) - {"__builtins__"}), "seen": "sklearn" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What importing the package does, and then asking for every name of it, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.xdist_group("imports")  # which are looked at once
def test_importing_it_loads_nothing_before_a_name_is_asked_for(imported: dict[str, Any]) -> None:
    packages = {name.split(".")[0] for name in imported["loaded"]}
    assert not packages & (CORE | FOREIGN)
    assert [name for name in imported["loaded"] if name.startswith("neuronsurgery")] == ["neuronsurgery"]


@pytest.mark.xdist_group("imports")  # which are looked at once
def test_using_it_loads_neither_the_study_nor_anything_foreign(imported: dict[str, Any]) -> None:
    assert set(imported["new"]) - set(sys.stdlib_module_names) == {"neuronsurgery"}
    assert not FOREIGN & {name.split(".")[0] for name in imported["modules"]}
    assert not [name for name in imported["modules"] if name.startswith("neuronsurgery.study")]
    assert imported["seen"], "this test sees what is loaded"


@pytest.mark.xdist_group("imports")  # which are looked at once
def test_using_it_loads_nothing_costly_that_few_need(imported: dict[str, Any]) -> None:
    assert not [name for name in imported["costly"] if name.split(".")[0] == "torch"]


@pytest.mark.xdist_group("imports")  # which are looked at once
def test_importing_it_prints_nothing_and_changes_no_switch(imported: dict[str, Any]) -> None:
    assert imported["unchanged"]


@pytest.mark.xdist_group("imports")  # which are looked at once
def test_a_star_import_gives_exactly_the_api(imported: dict[str, Any]) -> None:
    assert imported["star"] == neuronsurgery.__all__ == sorted(set(neuronsurgery.__all__))


def test_the_listing_of_the_api_says_the_same_three_times() -> None:
    """Type checkers read imports, Python reads where a name is from, and `__all__` is one literal list."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    said: dict[str, str] = {}
    for node in typed.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        said |= {alias.asname or alias.name: node.module for alias in node.names}
    assert sorted(said) == neuronsurgery.__all__
    modules = {name for name, module in said.items() if module == "neuronsurgery"}
    assert {name: f"neuronsurgery.{home}" for name, home in neuronsurgery._HOME.items()} == {
        name: module for name, module in said.items() if name not in modules
    }
    assert all(inspect.ismodule(getattr(neuronsurgery, name)) for name in modules)
    listed = next(
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert ast.literal_eval(listed.value) == neuronsurgery.__all__, "one literal list"


def test_names_that_are_asked_for_late_are_whole() -> None:
    """In a process of its own: modules as attributes, a listing, pickles, and every kind of edit for `load_file`."""
    probe = """
import pickle, sys
import neuronsurgery as ns
assert set(ns.__all__) <= set(dir(ns)) and "torch" not in sys.modules
ns.load_file
kinds = set(ns.edits.KINDS)
from neuronsurgery import *
assert kinds == set(ns.edits.KINDS) and {"rewind", "set_rows"} <= kinds
assert ns.graph.trust.CheckedForward and ns.surveys.survey and ns.apply is apply
assert pickle.loads(pickle.dumps(ns.Neuron)) is ns.Neuron
for name in ("finde", "_homes", "__wrapped__"):
    assert not hasattr(ns, name)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.returncode == 0


# --- the study is a user --------------------------------------------------------------------------------------------

PAGES = "\n".join(page.read_text() for page in (PACKAGE.parent / "docs" / "api").glob("*.md"))


def documented(module: str, name: str) -> bool:
    """Whether a page of the API documents a name of a module, by its whole name or under the current module."""
    whole = re.escape(f"neuronsurgery.{module}.{name}") if module else re.escape(f"neuronsurgery.{name}")
    if re.search(rf":: {whole}\b", PAGES):
        return True
    return any(
        re.search(rf":: {re.escape(name)}\b", part.split("currentmodule::")[0])
        for part in PAGES.split(f"currentmodule:: neuronsurgery.{module}\n")[1:]
    )


def undocumented(source: str) -> list[str]:
    """What a file imports of the core that no page of the API documents."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "neuronsurgery":
            module = str(node.module).partition(".")[2]
            if module.split(".")[0] != "study":
                found += [f"{module}.{alias.name}" for alias in node.names if not documented(module, alias.name)]
    return found


@pytest.mark.parametrize("path", sorted((PACKAGE / "study").rglob("*.py")), ids=lambda path: path.name)
def test_the_study_imports_public_names_only(path: Path) -> None:
    assert undocumented(path.read_text()) == []


def test_the_test_of_public_names_can_fail() -> None:
    assert undocumented("from neuronsurgery.wrappers import is_a, unwrap") == ["wrappers.is_a"]
    assert undocumented("from neuronsurgery.study.data import synthetic\nimport neuronsurgery as ns") == []


def test_no_file_is_called_for_what_it_is_not() -> None:
    names = {path.name for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils.py", "helpers.py", "base.py", "common.py", "misc.py"}
    assert (PACKAGE / "py.typed").exists()
    assert not [path for path in PACKAGE.rglob("*.py") if "import *" in path.read_text()]


# --- documentation --------------------------------------------------------------------------------------------------

EXPLAINED_BY_THEIR_FIRST_LINE = 2
"""A function of so many parameters needs no list of arguments where its first lines name each of them."""


def parameters(function: object) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [parameter for parameter in found if parameter.name not in ("self", "cls")]


def missing_sections(function: object) -> list[str]:
    """What the docstring of a function lacks."""
    text = inspect.getdoc(function) or ""
    first = text.split("\n", 1)[0]
    missing = [] if text else ["a docstring"]
    if "Returns:" not in text and not first.startswith(("Return ", "Raise ", "Write ", "Yield ")):
        missing.append("what comes back")
    unnamed = [p.name for p in parameters(function) if p.name not in text.replace("`", "")]
    if len(parameters(function)) > EXPLAINED_BY_THEIR_FIRST_LINE and "Args:" not in text:
        missing.append("Args")
    if "Args:" in text:
        missing += [f"argument {name}" for name in unnamed]
    if "Example:" not in text or ">>>" not in text:
        missing.append("an example")
    return missing


def unannotated(function: object) -> list[str]:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    missing = [p.name for p in parameters(function) if p.annotation is inspect.Parameter.empty]
    return missing + (["return"] if signature.return_annotation is inspect.Signature.empty else [])


def public_methods(kind: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            inner = getattr(member, "fget", None) or getattr(member, "func", None) or member
            if inspect.isfunction(inner):
                yield name, inner


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_and_annotated(name: str) -> None:
    thing = getattr(neuronsurgery, name)
    assert inspect.getdoc(thing), "no docstring"
    if inspect.isclass(thing):
        assert inspect.getdoc(thing) != inspect.getdoc(thing.__mro__[1]), "an inherited docstring"
        for method, function in public_methods(thing):
            assert inspect.getdoc(function), method
            assert unannotated(function) == [], method
    elif inspect.isfunction(thing):
        assert missing_sections(thing) == []
        assert unannotated(thing) == []


def test_the_test_of_documentation_can_fail() -> None:
    def silent(a, b, c):  # type: ignore[no-untyped-def]
        """Do something."""

    assert missing_sections(silent) == ["what comes back", "Args", "an example"]
    assert unannotated(silent) == ["a", "b", "c", "return"]


def test_every_module_says_what_it_is() -> None:
    for module in pkgutil.walk_packages([str(PACKAGE)], "neuronsurgery."):
        if not module.name.startswith("neuronsurgery.study"):
            assert importlib.import_module(module.name).__doc__, module.name


def test_every_value_is_frozen() -> None:
    """What a caller holds never changes under him: any dataclass of the core but running tallies."""
    modules = [importlib.import_module(f"neuronsurgery.{path.stem}") for path in PACKAGE.glob("[a-z]*.py")]
    classes = {value for module in modules for value in vars(module).values() if dataclasses.is_dataclass(value)}
    assert len(classes) > 20
    open_ = {value.__qualname__ for value in classes if not value.__dataclass_params__.frozen}  # type: ignore[union-attr]
    assert open_ == {"_Seen", "_Waiting"}
