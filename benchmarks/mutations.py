"""Do the tests bite? Each of some small mutations of the core is to make one of them fail.

    python benchmarks/mutations.py                      # 3 to 5 mutants of every module: half an hour of one core
    python benchmarks/mutations.py --quick              # 20 mutants: a few minutes
    python benchmarks/mutations.py --only graph.trust --per-module 20
    python benchmarks/mutations.py --list               # the mutants alone, nothing is run

A mutant is the package with one place changed: a comparison, an operator, `and`, `not`, a number, the bound of a slice
or of a range, a statement or a guard left out, another value returned. Which places is drawn by a digest of the seed
and of the place's text, so that a change elsewhere in the code leaves the others as they are. Text is not mutated
(docstrings, messages, `__repr__`), nor are annotations and assertions.

Each mutant runs in a fork of a process that has imported torch and the tests' other needs, with a copy of the package
in front of the installed one: first the doctests of the module, then the files of `TESTS`, up to the first failure. It
is caught if one fails, or if it runs into the limit. The package as it is has to pass all of them first. What survives
has to be in `SURVIVORS`, with the reason why no test can see it; at least 95 % have to be caught.

Needs Linux or macOS, and what the tests need.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "neuronsurgery"
OUTCOMES = {0: "survived", 1: "caught", 2: "caught", None: "timeout"}
"""What the exit status of pytest says; 2 is a test file that cannot be imported."""

TESTS = {
    "atomic": "atomic files memorization",
    "batches": "batches errors_scoring evaluation gradients obscure",
    "caches": "faults surgery copies",
    "checkpoints": "errors_surgery files edits surgery state_dicts",
    "checks": "values files errors_surgery errors_scoring",
    "comparisons": "scores errors_scoring layers",
    "copies": "architecture errors_surgery plans surveys copies training_code surgery capture faults",
    "silencing": "silence surveys",
    "digests": "batches neurons files edits layers",
    "discovery": "errors_surgery errors_scoring neurons surveys layers gradients obscure",
    "distributed": "evaluation training_code gradients processes",
    "draws": "errors_scoring errors_surgery memorization scores edits gradients",
    "edits": "errors_surgery plans files edits layers surgery",
    "errors": "errors_surgery errors_scoring neurons results silence evaluation training_code gradients obscure",
    "evaluation": "errors_scoring results evaluation sweeps processes",
    "files": "files fuzz",
    "forward": "batches errors_scoring evaluation training_code gradients capture faults obscure",
    "fragile": "errors_scoring results files fragile",
    "gradients": "errors_scoring faults scores gradients training_code processes",
    "habits": "faults",
    "hard": "errors_scoring training_code gradients processes obscure",
    "independence": "faults gradients",
    "layers": "errors_surgery neurons files edits layers surgery",
    "layouts": "errors_surgery neurons files layers obscure",
    "loaders": "batches errors_scoring evaluation gradients obscure",
    "losses": "errors_scoring evaluation gradients sweeps obscure",
    "masks": "masks",
    "memorization": "memorization files",
    "neurons": "errors_surgery neurons scores files layers obscure",
    "objectives": "objectives mitigation_examples",
    "objects": "faults batches plans surveys copies training_code surgery capture",
    "outcomes": "values errors_scoring results files fragile sweeps",
    "paired": "sweeps",
    "parametrized": "plans surveys copies training_code surgery",
    "plans": "errors_surgery plans edits surgery ddp",
    "pools": "masks",
    "precision": "evaluation scores objectives edits gradients",
    "results": "results evaluation memorization scores fragile",
    "scores": "errors_scoring errors_surgery scores files gradients processes values",
    "state_dicts": "state_dicts edits errors_surgery surveys",
    "surgery": "errors_surgery plans training_code ddp surgery faults",
    "surveys": "errors_surgery neurons plans surveys copies training_code ddp gradients surgery obscure",
    "switches": "calls faults training_code",
    "sweeps": "sweeps_in_parts errors_scoring training_code processes sweeps",
    "wrappers": "surveys copies obscure surgery",
    "graph.export": "silence surveys capture fragile sweeps faults",
    "graph.inputs": "capture sweeps",
    "graph.operators": "silence units fragile capture",
    "graph.replay": "capture sweeps",
    "graph.residual": "fragile",
    "graph.trust": "capture sweeps",
    "graph.writes": "capture sweeps",
}
"""The tests that should notice, by module; the fast ones first."""

SURVIVORS: dict[tuple[str, str], str] = {
    ("atomic.replaced_atomically", "0 -> 1"): "the mask is read by setting any, and set back at once",
    (
        "checkpoints.checkpoint_rows",
        "len(wrong) < SHOWN -> len(wrong) <= SHOWN",
    ): "one more name is looked for, and its line is cut off all the same",
    (
        "habits._written_paths",
        "kind.__mro__.index(nn.Module) -> kind.__mro__.index(nn.Module) + 1",
    ): "those of nn.Module itself that write into parameters are refused by their names",
    (
        "independence.dependence",
        "difference > TOLERANCE * (50 if half else 1) -> difference >= TOLERANCE * (50 if half else 1)",
    ): "no difference is the tolerance itself",
    ("files._read_neurons", "0 -> 1"): "a position for files that carry their own",
    (
        "loaders.iterate",
        "now - shown > 0.5 -> now - shown >= 0.5",
    ): "of the clock: no two readings are half a second apart",
    (
        "graph.replay._fetch",
        "_has_nodes(value) and (not isinstance(value, fx.Node)) -> _has_nodes(value) or not isinstance(value, fx.Node)",
    ): "what has no nodes in it is put in as it is, one way or the other",
    (
        "graph.residual._Flow.__init__",
        "self.layers |= {token: set() for token in tokens} -> pass",
    ): "a walk ends at a token, and no walk asks which layers one has passed",
    ("memorization._is_kept", "return True -> return run"): "true as well; the type checker refuses it",
}
"""Mutants that no test can see, by the place and the change, and why."""


# What can be changed


def both_ways(*pairs: tuple[type[ast.AST], type[ast.AST]]) -> dict[type[ast.AST], type[ast.AST]]:
    return {old: new for pair in pairs for old, new in (pair, pair[::-1])}


COMPARED = both_ways(
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)
)
COMPUTED = both_ways((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.BitOr, ast.BitAnd))
COMPUTED |= both_ways((ast.LShift, ast.RShift)) | {ast.Pow: ast.Mult}
SPOKEN = ("__repr__", "_repr_html_", "_describe")
"""Functions that only make text to look at."""

Change = tuple[ast.AST, "ast.AST | str"]
"""A node, and what to put in its place."""


def comparison(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """`<` to `<=`, `==` to `!=`, `in` to `not in`."""
    for i, operator in enumerate(node.ops if isinstance(node, ast.Compare) else ()):
        changed = copy.deepcopy(node)
        changed.ops[i] = COMPARED[type(operator)]()
        yield node, changed


def arithmetic(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """`+` to `-`, `*` to `/`, `-x` to `x`."""
    text = isinstance(node, ast.BinOp) and any(map(is_text, (node.left, node.right)))
    union = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and not functions(within)
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in COMPUTED and not text and not union:
        changed = copy.deepcopy(node)
        changed.op = COMPUTED[type(node.op)]()
        yield node, changed
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node, node.operand


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def boolean(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """`and` to `or`, and `not` left out."""
    if isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, node.operand


def constant(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """`True` to `False`, a number to the next one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, ast.Constant(node.value + 1)


def bound(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """A bound of a slice or the end of a range, moved by one."""
    ends: list[ast.expr | None] = [node.lower, node.upper] if isinstance(node, ast.Slice) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        ends = node.args[:2][-1:]
    for end in ends:
        if end is not None and not isinstance(end, ast.Starred):
            yield end, ast.BinOp(end, ast.Add(), ast.Constant(1))


def statement(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """A call, a guard, or an assignment to an attribute or an entry, left out."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    assigned = isinstance(node, ast.Assign) and isinstance(target, ast.Attribute | ast.Subscript)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    guard = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and not node.orelse
    if assigned or called or guard or isinstance(node, ast.AugAssign | ast.Delete):
        yield node, ast.Pass()


def result(node: ast.AST, within: list[ast.AST]) -> Iterator[Change]:
    """Another value returned: the first argument, or None."""
    if isinstance(node, ast.Return) and node.value is not None:
        arguments = functions(within)[-1].args
        names = [entry.arg for entry in (*arguments.posonlyargs, *arguments.args) if entry.arg not in ("self", "cls")]
        other = next((name for name in names[:1] if ast.unparse(node.value) != name), "None")
        if ast.unparse(node.value) != other:
            yield node, f"return {other}"


KINDS: tuple[Callable[[ast.AST, list[ast.AST]], Iterator[Change]], ...] = (
    *(comparison, arithmetic, boolean, constant, bound, statement, result),
)


# Where

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(within: list[ast.AST]) -> list[Function]:
    """Return the functions that a node is in, the innermost last."""
    return [node for node in within if isinstance(node, Function)]


def skipped(node: ast.AST) -> bool:
    """Return whether nothing in a node is behaviour: text, what is raised, assertions, types, the size of a cache."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.arg | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, Function):
        return node.name in SPOKEN or "overload" in map(ast.unparse, node.decorator_list)
    if isinstance(node, ast.ClassDef):
        return any(ast.unparse(base).startswith("Protocol") for base in node.bases)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in (
            "TypeVar",
            "cast",
            "functools.lru_cache",
        )  # how much is cached is no behaviour
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation) == "TypeAlias"
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.keyword) and node.arg == "strict"  # of zip: as good as an assertion


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node holds, annotations and the classes of `isinstance` left out."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        yield node.args[0]
        return
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST))


def walk(node: ast.AST, within: list[ast.AST]) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Yield every node that may be changed, and the nodes around it."""
    if skipped(node):
        return
    yield node, within
    for part in parts(node):
        yield from walk(part, [*within, node])


@dataclass(frozen=True)
class Mutant:
    """One changed place of a module; `start` and `end` are counted in bytes."""

    module: str
    place: str
    line: int
    kind: str
    change: str
    start: int
    end: int
    text: str

    def source(self, original: str) -> str:
        """Return the module with the change made."""
        data = original.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def said(self) -> str:
        """Return the mutant in one line."""
        return f"{file_of(self.module)}:{self.line}: {self.place}: {self.change}"


def mutants(module: str, source: str) -> list[Mutant]:
    """Return every mutant of a module that can be parsed."""
    begins = [0]
    for line in source.encode().splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = []
    for node, within in walk(ast.parse(source), []):
        names = [outer.name for outer in within if isinstance(outer, Function | ast.ClassDef)]
        for kind in KINDS:
            for old, new in kind(node, within):
                start = begins[old.lineno - 1] + old.col_offset
                end = begins[old.end_lineno - 1] + old.end_col_offset
                text = new if isinstance(new, str) else ast.unparse(new)
                change = f"{short(ast.unparse(old))} -> {short(text)}"
                text = f"({text})" if isinstance(new, ast.expr) else text
                place = ".".join((module, *names))
                found.append(Mutant(module, place, old.lineno, kind.__name__, change, start, end, text))
    return [mutant for mutant in found if parses(mutant.source(source))]


def short(text: str, length: int = 60) -> str:
    """Return text on one line, its end cut off; where it was cut, a digest of all of it keeps it apart from others."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 10]}... #{hashlib.sha256(line.encode()).hexdigest()[:4]}"


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


# Which

Sources = dict[str, str]


def sources() -> Sources:
    """Return the text of every module of the core."""
    folder = ROOT / PACKAGE
    paths = [path for pattern in ("*.py", "graph/*.py") for path in sorted(folder.glob(pattern))]
    found = {".".join(path.relative_to(folder).with_suffix("").parts): path.read_text() for path in paths}
    return {name: text for name, text in found.items() if name.split(".")[-1] not in ("__init__", "types")}


def code_lines(source: str) -> int:
    """Return on how many lines there is code."""
    return len({node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr | ast.stmt)})


def drawn(module: str, source: str, seed: int, count: int) -> list[Mutant]:
    """Return mutants of a module, on lines of their own and of as many kinds as there are."""
    waiting: dict[str, list[Mutant]] = {}
    for _, mutant in sorted(ticketed(mutants(module, source), seed), key=lambda pair: pair[0]):
        waiting.setdefault(mutant.kind, []).append(mutant)
    chosen: dict[int, Mutant] = {}
    while waiting and len(chosen) < count:
        for kind in list(waiting):
            mutant = waiting[kind].pop(0)
            if len(chosen) < count:
                chosen.setdefault(mutant.line, mutant)
            if not waiting[kind]:
                del waiting[kind]
    return list(chosen.values())


def ticketed(found: list[Mutant], seed: int) -> Iterator[tuple[str, Mutant]]:
    """Yield each mutant with its ticket, which depends on the seed, the place and the change alone."""
    met: Counter[tuple[str, str]] = Counter()
    for mutant in found:
        key = mutant.place, mutant.change
        met[key] += 1
        yield hashlib.sha256("\0".join((str(seed), *key, str(met[key]))).encode()).hexdigest(), mutant


def chosen(originals: Sources, options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants to run: about `per_module` of each module, more of those that have more lines of code."""
    lines = {module: code_lines(source) for module, source in originals.items()}
    mean = sum(lines.values()) / len(lines)
    found: list[Mutant] = []
    for module, source in originals.items():
        share = round(options.per_module * lines[module] / mean)
        count = min(max(share, options.per_module - 1, 1), options.per_module + 1)
        if not options.only or module in options.only:
            found += drawn(module, source, options.seed, count)
    if options.quick:
        found = [mutant for _, mutant in sorted(ticketed(found, options.seed), key=lambda pair: pair[0])[:20]]
    return found


# Running them


def prepare() -> None:
    """Import what the tests need, once for all children, and have hypothesis draw the same examples every time."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import einops  # noqa: F401
    import hypothesis
    import lightning  # noqa: F401
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import timm.models  # noqa: F401
    import torch.export
    import torch.func
    import torchvision.models  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    torch.set_num_threads(1)
    hypothesis.settings.register_profile("mutations", database=None, derandomize=True)
    assert PACKAGE not in sys.modules, "the children could not import another one"


def file_of(module: str) -> str:
    return f"{PACKAGE}/{module.replace('.', '/')}.py"


def arguments(modules: list[str], folder: Path) -> list[str]:
    """Return what pytest is given: the doctests of some modules, and the tests that should notice."""
    names = sorted({name for module in modules for name in TESTS[module].split()})
    if len(modules) == 1:
        names = TESTS[modules[0]].split()
    return [
        *("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-m", "not slow and not architectures"),
        *("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutations"),
        *(str(folder / file_of(module)) for module in modules),
        *(str(ROOT / "tests" / f"test_{name}.py") for name in names),
    ]


def child(folder: Path, given: list[str], log: Path) -> int:
    """Run pytest on the package in a folder, and return its exit status; the output goes to a file."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    import pytest

    module = __import__(PACKAGE)
    assert Path(module.__file__).is_relative_to(folder), f"{module.__file__} is not the mutated copy"
    return int(pytest.main(given))


def run(folder: Path, given: list[str], log: Path, limit: float) -> int | None:
    """Return the exit status of a child, None where it took longer than the limit; nothing that it started stays."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            status = child(folder, given, log)
        os._exit(status)
    until = time.monotonic() + limit
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < until:
        time.sleep(0.02)
        done, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def mutated(mutant: Mutant, original: str, folder: Path) -> Iterator[None]:
    """Have the mutant in the copy of the package, then the original again; no bytecode of the one is the other's."""
    path = folder / file_of(mutant.module)
    bytecode = Path(importlib.util.cache_from_source(str(path)))
    try:
        path.write_text(mutant.source(original))
        bytecode.unlink(missing_ok=True)
        yield
    finally:
        path.write_text(original)
        bytecode.unlink(missing_ok=True)


def outcome(mutant: Mutant, original: str, folder: Path, limit: float) -> str:
    """Return what became of a mutant: caught, timeout or survived."""
    log = folder / "log"
    with mutated(mutant, original, folder):
        status = run(folder, arguments([mutant.module], folder), log, limit)
    if status is not None and status < 0:  # killed by a signal: it crashed
        return "caught"
    if status not in OUTCOMES:
        raise RuntimeError(f"pytest ended with {status}: {mutant.said()}\n{log.read_text()[-3000:]}")
    return OUTCOMES[status]


def checked_package(originals: Sources, chosen: list[Mutant], folder: Path, limit: float) -> None:
    """Raise if the package as it is does not pass the tests: then a failure would say nothing about a mutant."""
    modules = [module for module in originals if any(mutant.module == module for mutant in chosen)]
    if run(folder, arguments(modules, folder), folder / "log", 10 * limit) != 0:
        raise SystemExit(f"the package as it is fails:\n{(folder / 'log').read_text()[-3000:]}")


# What came of it


def report(outcomes: dict[Mutant, str]) -> bool:
    """Print the table, and return whether enough was caught and every survivor is explained."""
    made = Counter(mutant.module for mutant in outcomes)
    caught = Counter(mutant.module for mutant, outcome in outcomes.items() if outcome != "survived")
    print(f"\n{'module':20} {'mutants':>8} {'caught':>8}")
    for module, count in made.items():
        print(f"{module:20} {count:8} {caught[module]:8}")
    share = caught.total() / max(made.total(), 1)
    slow = sum(outcome == "timeout" for outcome in outcomes.values())
    print(f"{'all':20} {made.total():8} {caught.total():8}   {100 * share:.1f} %, {slow} of them by the time limit")
    survivors = [mutant for mutant, outcome in outcomes.items() if outcome == "survived"]
    print("\nsurvivors:" if survivors else "\nno survivors")
    for mutant in survivors:
        print(f"  {mutant.said()}\n    {SURVIVORS.get((mutant.place, mutant.change), 'NOT EXPLAINED')}")
    return share >= 0.95 and all((mutant.place, mutant.change) in SURVIVORS for mutant in survivors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-module", type=int, default=4, help="on average; each module has one less to one more")
    parser.add_argument("--only", action="append", help="a module, for instance graph.trust; may be repeated")
    parser.add_argument("--quick", action="store_true", help="20 mutants of all")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of one mutant")
    options = parser.parse_args()
    originals = sources()
    found = chosen(originals, options)
    if options.list:
        print("\n".join(mutant.said() for mutant in found))
        return
    prepare()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "docs").symlink_to(ROOT / "docs")  # a test reads the pages of the API beside the package
        checked_package(originals, found, folder, options.limit)
        outcomes = {}
        for number, mutant in enumerate(found, start=1):
            started = time.perf_counter()
            outcomes[mutant] = outcome(mutant, originals[mutant.module], folder, options.limit)
            seconds = time.perf_counter() - started
            print(f"{number}/{len(found)} {outcomes[mutant]} in {seconds:.1f} s: {mutant.said()}", flush=True)
        if not report(outcomes):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
