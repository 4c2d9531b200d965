"""Is a model the same after an interrupt, wherever it comes?

    python benchmarks/interrupts.py              # 60 points of every public call: some minutes
    python benchmarks/interrupts.py --points 200 --only sweep evaluate

Ctrl-C raises `KeyboardInterrupt` between two lines of whatever runs. Here it is raised at lines drawn evenly from all
those that a call runs: of the library, of torch's context managers for modes and random states, and of Python's own.
After each, everything of which the tests' snapshots know has to be as before: the model, the data, the random states,
the grad mode, the switches of torch, the warnings' filters, standard error and the stack of dispatch modes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from calls import CALLS, Drawing, Setting, run, setting  # noqa: E402
from snapshot import differences, snapshot  # noqa: E402

import neuronsurgery  # noqa: E402

WATCHED = (
    str(Path(neuronsurgery.__file__).parent),
    contextlib.__file__,
    *(
        str(Path(torch.__file__).parent / name)
        for name in ("utils/_contextlib.py", "autograd/grad_mode.py", "random.py")
    ),
)


class Interrupter:
    """Counts the lines that run in the watched files, and interrupts at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace the frames of the watched files."""
        return self.step if frame.f_code.co_filename.startswith(WATCHED) else None

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Count a line, and interrupt if it is the one."""
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self.step


def world(given: Setting) -> tuple[Any, Any]:
    """What has to be as it was."""
    more = {
        "standard error": sys.stderr,
        "filters of warnings": list(warnings.filters),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "log levels": [
            logging.getLogger(name).level for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")
        ],
    }
    return snapshot(given.model, given.data, given.state), more


def interrupted(name: str, given: Setting, at: int | None) -> tuple[int, str]:
    """Run a call that is interrupted at a line; return the lines that ran, and where it was interrupted or ""."""
    interrupter, where = Interrupter(at), ""
    sys.settrace(interrupter)
    try:
        run(name, given)
    except KeyboardInterrupt as interrupt:
        where = str(interrupt)
    finally:
        sys.settrace(None)
    return interrupter.lines, where


def changes(before: tuple[Any, Any], after: tuple[Any, Any]) -> list[str]:
    other = [key for key in before[1] if before[1][key] != after[1][key]]
    return differences(before[0], after[0]) + other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60, help="so many lines of each call are interrupted")
    parser.add_argument("--only", nargs="*", default=list(CALLS), choices=list(CALLS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    total, wrong = 0, 0
    for name in options.only:
        given = setting(Drawing)
        run(name, given)  # what is imported or cached at the first call is not the model's
        lines, _ = interrupted(name, given, None)
        points = min(options.points, lines)
        failed: list[str] = []
        for point in range(points):
            before = world(given)
            _, where = interrupted(name, given, 1 + point * lines // points)
            gc.collect()
            found = changes(before, world(given))
            total += bool(where)
            if found:
                failed.append(f"  at {where}: {'; '.join(found[:4])}")
                given = setting(Drawing)
        wrong += len(failed)
        print(f"{name}: {points} points of {lines} lines, {len(failed)} that left something changed", flush=True)
        print(*failed[:5], sep="\n", end="\n" if failed else "")
    print(f"{total} interrupts, {wrong} that left something changed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
