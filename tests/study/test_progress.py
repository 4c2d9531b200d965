"""What a run says of how far it is: every step once, what was found, and lines where it goes to a file."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from neuronsurgery.study import progress
from neuronsurgery.study.progress import TRAINING, Count, Steps, steps_of
from neuronsurgery.study.settings import STAGES, Settings


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_what_is_left_is_estimated_by_the_steps_that_are_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps({TRAINING: 10, "a": 4, "b": 6}, {"a": "first"}, per_epoch=30.0)
    steps.announce([], 0)
    steps.epoch("epoch 5", 5, 10, 60.0)
    steps.end(TRAINING, worked=False)
    steps.begin("a")
    clock.now += 800
    steps.end("a")
    steps.begin("b")
    steps.begin("unknown")
    assert capsys.readouterr().err.splitlines() == [
        "3 steps to do, about 10 min in all",  # 20 epochs of half a minute
        "epoch 5, about 15 min left",  # 5 epochs and 10 more, of a minute
        "[2/3] first, about 10 min left",
        "[3/3] b, about 20 min left",  # 6 epochs of 200 seconds each
    ]


def test_what_the_folder_holds_is_said_and_not_counted_again(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps({TRAINING: 10, "a": 5, "b": 5}, per_epoch=60.0)
    steps.announce(["a"], 4)
    steps.announce([TRAINING, "a", "b"], 0)
    steps.announce([], 3)
    assert capsys.readouterr().err.splitlines() == [
        "found in the folder, and not done again: the training after epoch 4 and 1 step",
        "2 steps to do, about 11 min in all",
        "found in the folder, and not done again: 3 steps",
        "0 steps to do",
        "found in the folder, and not done again: the training after epoch 3",
        "3 steps to do, about 17 min in all",
    ]


def test_every_step_of_a_run_has_a_cost_and_a_name() -> None:
    arms = {"stage-2-erm": ("ERM", 4.0)}
    steps = steps_of(Settings(splits=("train", "test")), arms, ["train", "held-out"])
    assert steps.costs.keys() == steps.names.keys()
    assert min(steps.costs.values()) > 0
    assert len(steps.costs) == 1 + 7 * 2 + 1 + 2 + 3
    assert steps.names["1a-test"] == "1a on test" and "1h-test" not in steps.costs
    alone = steps_of(Settings(stages=(STAGES[0],), experiments=("1a",)), arms, [])
    assert list(alone.costs) == [TRAINING, "1a-train"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_count_is_one_line_on_a_terminal_and_few_lines_in_a_file(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    count = Count(4, "edits")
    for done in (1, 2, 3, 4):
        clock.now += 6
        count.at(done)
    said: Any = capsys.readouterr().err
    written_over = "\r  1 of 4 edits\r  2 of 4 edits\r  3 of 4 edits\r  4 of 4 edits\n"
    assert said == (written_over if terminal else "  2 of 4 edits\n  4 of 4 edits\n")
