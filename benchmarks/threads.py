"""Do two calls at once give what each gives alone, and leave the process as it was?

    python benchmarks/threads.py                # every pair of public calls: some minutes
    python benchmarks/threads.py --only sweep evaluate

Every two calls of `tests/calls.py` run at the same time in two threads, several times each, on one model and on two.
Their results have to be, bit for bit, those of each alone, and everything that belongs to the process (the switches of
torch, the filters of warnings, standard error, the levels of its loggers) has to be as before. Then each call runs
beside a thread that trains with dropout: the weights after training have to be those of training alone, so that no
random number was taken from it or given to it twice. Beside a call that captures a forward they are equal to rounding:
while torch.export traces, other kernels run in the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from calls import CALLS, CAPTURING, Drawing, Setting, at_once, process, run, same, setting  # noqa: E402

STEPS = 60


def wrong_pairs(names: tuple[str, str], alone: dict[str, Any], shared: bool) -> list[str]:
    """Run two calls at once, as often as the quicker one fits into some runs; return what is not as it should be."""
    first = setting()
    givens = (first, first if shared else setting())
    times = 1 if set(names) & set(CAPTURING) else 4
    before = process()

    def repeated(name: str, given: Setting) -> Callable[[], Any]:
        return lambda: [run(name, given) for _ in range(times)]

    results = at_once(*(repeated(name, given) for name, given in zip(names, givens, strict=True)))
    wrong = [f"{name}: {found!r}" for name, found in zip(names, results, strict=True) if isinstance(found, Exception)]
    wrong += [
        f"{name} differs"
        for name, found in zip(names, results, strict=True)
        if not isinstance(found, Exception) and not all(same(one, alone[name]) for one in found)
    ]
    after = process()
    return wrong + [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def trained() -> Tensor:
    """Return the weights after some steps of training with dropout, from the global random state."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).reshape(parameter.shape) + place).float().sin())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(6, 5)), torch.randint(2, (6,))).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def wrong_training(name: str, expected: Tensor, alone: Any) -> list[str]:
    """Run a call again and again beside training; return what is not as it should be."""
    given, done = setting(), threading.Event()

    def train() -> Tensor:
        torch.manual_seed(3)
        try:
            return trained()
        finally:
            done.set()

    def call() -> list[Any]:
        found = [run(name, given)]
        while not done.is_set():
            found.append(run(name, given))
        return found

    weights, results = at_once(train, call)
    rounding = 1e-4 if name in CAPTURING else 0.0
    fine = isinstance(weights, Tensor) and torch.allclose(weights, expected, rtol=rounding, atol=rounding)
    wrong = [] if fine else ["the training differs"]
    fine = not isinstance(results, Exception) and all(same(one, alone) for one in results)
    return wrong if fine else [*wrong, f"the call differs: {results if isinstance(results, Exception) else ''}"]


def main() -> int:
    """Run all pairs, then each call beside training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CALLS), choices=list(CALLS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    alone = {name: run(name, setting()) for name in options.only}
    run("evaluate", setting(Drawing))
    torch.manual_seed(3)
    expected = trained()
    pairs = list(itertools.combinations_with_replacement(options.only, 2))
    failed = 0
    for place, names in enumerate(pairs):
        for shared in (True, False):
            found = wrong_pairs(names, alone, shared)
            failed += bool(found)
            if found:
                print(
                    f"{' + '.join(names)} on {'one model' if shared else 'two models'}: {'; '.join(found)}", flush=True
                )
        if place % 50 == 49:
            print(f"{place + 1} of {len(pairs)} pairs, {failed} wrong", flush=True)
    beside = {name: wrong_training(name, expected, alone[name]) for name in options.only}
    for name, found in beside.items():
        print(f"{name} beside training: {'; '.join(found) or 'right'}")
    wrong = failed + sum(map(bool, beside.values()))
    print(f"{len(pairs)} pairs, each on one model and on two, and {len(beside)} calls beside training: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
