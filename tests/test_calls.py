"""Whatever comes between: an interrupt leaves nothing changed, and calls at once give what each alone gives.

A few points and pairs; `interrupts.py` and `threads.py` in the benchmarks try hundreds.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from calls import CALLS, CAPTURING, Drawing, at_once, interrupted, process, run, same, setting, world, world_changes

from neuronsurgery.switches import restoring, undoing

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", [name for name in CALLS if name not in CAPTURING])
def test_an_interrupt_leaves_nothing_changed(name: str) -> None:
    given = setting(Drawing)
    run(name, given)  # what is kept of the first call for later ones is not run again
    lines, where = interrupted(name, given, None)
    assert where == ""
    for share in (0.4, 0.97):
        before = world(given)
        assert interrupted(name, given, max(1, int(share * lines)))[1]
        gc.collect(1)  # what the interrupt left suspended is young
        assert world_changes(before, world(given)) == []


PAIRS = [("evaluate", "evaluate"), ("group_grad_norms", "hard_batch"), ("apply", "bake")]


@pytest.mark.parametrize(
    ("names", "shared"), [*((pair, shared) for pair in PAIRS for shared in (True, False)), (("sweep", "silence"), True)]
)
def test_two_calls_at_once_are_each_of_them_alone(names: tuple[str, str], shared: bool) -> None:
    alone = [run(name, setting()) for name in names]
    first = setting()
    givens = (first, first if shared else setting())
    before = process()
    found = at_once(*(lambda n=name, g=given: run(n, g) for name, given in zip(names, givens, strict=True)))  # type: ignore[misc]
    assert all(same(one, other) for one, other in zip(found, alone, strict=True)), found
    assert process() == before


def test_what_is_undone_is_undone_once() -> None:
    """A context that an interrupt has cut short may be closed at any time later."""
    done: list[int] = []

    @restoring
    def interrupted_within() -> object:
        context = undoing(lambda: done.append(1))
        context.__enter__()
        return context

    context = interrupted_within()
    assert done == [1]
    context.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert done == [1]


def test_evaluation_beside_a_thread_that_draws_takes_no_number_from_it() -> None:
    given, done = setting(), threading.Event()
    torch.manual_seed(5)
    expected = torch.stack([torch.rand(3) for _ in range(2000)])

    def draw() -> torch.Tensor:
        torch.manual_seed(5)
        found = torch.stack([torch.rand(3) for _ in range(2000)])
        done.set()
        return found

    def work() -> None:
        while not done.is_set():
            run("evaluate", given)

    drawn, _ = at_once(draw, work)
    assert torch.equal(drawn, expected)
