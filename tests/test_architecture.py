"""Promises about the code itself: imports run one way, the core is small, everything public is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuronsurgery

PACKAGE = Path(neuronsurgery.__file__).parent
ORDER = [
    *("types", "structure", "neurons", "scores", "gradients", "edits", "surgery", "evaluation", "capture"),
    *("sweep", "coupling", "fragility", "objectives", "artifacts", "memorization", "study"),
]
CORE = {"torch", "einops", "safetensors", "numpy", "typing_extensions"}
FOREIGN = {"sklearn", "torchvision", "timm", "transformers", "matplotlib", "scipy", "pandas", "PIL", "pytest"}
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
    """The imports of a module of ours that do not come before it in `ORDER`."""
    ours = [module.split(".")[1] for module in imports(source) if module.startswith("neuronsurgery.")]
    before = ORDER[: ORDER.index(name)]
    return [other for other in ours if other not in before]


def foreign(source: str) -> list[str]:
    allowed = CORE | set(sys.stdlib_module_names) | {"neuronsurgery"}
    return [module for module in imports(source) if module.split(".")[0] not in allowed]


CORE_FILES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
core_file = pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.name)


@core_file
def test_imports_run_one_way(path: Path) -> None:
    assert path.stem in ORDER, f"{path.name} has no place in the order of imports"
    assert wrong_ways(path.stem, path.read_text()) == []


@core_file
def test_the_core_imports_nothing_else(path: Path) -> None:
    assert foreign(path.read_text()) == []


def test_the_tests_above_can_fail() -> None:
    assert wrong_ways("neurons", "from neuronsurgery.surgery import apply") == ["surgery"]
    assert wrong_ways("neurons", "def f():\n    import neuronsurgery.scores") == ["scores"]
    assert wrong_ways("neurons", "from . import edits") == ["edits"]
    assert wrong_ways("neurons", "from .edits import zero_out") == ["edits"]
    assert wrong_ways("neurons", "from neuronsurgery import study") == ["study"]
    assert wrong_ways("neurons", "from neuronsurgery.neurons import Layer") == ["neurons"]
    assert wrong_ways("neurons", "from neuronsurgery.structure import bare\nimport torch") == []
    assert foreign("def f():\n    from sklearn.datasets import load_digits") == ["sklearn.datasets"]
    assert foreign("import torch.nn, json, numpy as np, einops") == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_importing_it_loads_neither_the_study_nor_anything_foreign() -> None:
    report = "print(*sorted({name.split('.')[0] for name in sys.modules} | {n for n in sys.modules if 'study' in n}))"
    loaded = set(run(f"import sys, neuronsurgery; {report}").split())
    assert "neuronsurgery" in loaded
    assert not loaded & (FOREIGN | {"neuronsurgery.study"})
    bare = set(run(f"import sys, torch, einops, safetensors.torch, numpy, typing_extensions; {report}").split())
    assert loaded - bare - set(sys.stdlib_module_names) == {"neuronsurgery"}
    assert "sklearn" in run(f"import sys, neuronsurgery, sklearn; {report}").split()


def test_importing_it_prints_nothing_and_changes_no_switch() -> None:
    state = (
        "(torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())"
    )
    assert run(f"import torch; a = {state}; import neuronsurgery; print({state} == a)") == "True"


def test_a_star_import_gives_exactly_the_api() -> None:
    names = run("from neuronsurgery import *; print(*sorted(n for n in dir() if not n.startswith('__')))").split()
    assert names == sorted(neuronsurgery.__all__)
    assert neuronsurgery.__all__ == sorted(neuronsurgery.__all__)
    assert len(set(neuronsurgery.__all__)) == len(neuronsurgery.__all__)


def test_the_listing_of_the_api_holds_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    docstring, *statements, last = tree.body
    assert isinstance(docstring, ast.Expr) and isinstance(last, ast.Assign)
    assert all(isinstance(node, ast.ImportFrom) and len(node.names) == 1 for node in statements)
    assert all(node.names[0].asname == node.names[0].name for node in statements)  # type: ignore[attr-defined]
    assert {node.names[0].name for node in statements} == set(neuronsurgery.__all__)  # type: ignore[attr-defined]


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
