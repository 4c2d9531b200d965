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
import gc
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from calls import CALLS, Drawing, interrupted, run, setting, world, world_changes  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60, help="so many lines of each call are interrupted")
    parser.add_argument("--only", nargs="*", default=list(CALLS), choices=list(CALLS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
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
            found = world_changes(before, world(given))
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
