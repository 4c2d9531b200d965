"""Studies that are killed at random moments and taken up again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from study.little_study import study


def run(arguments: list[str], kill_after: float | None = None) -> bool:
    """Run the study in a child; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the child's life
        os._exit(study(*arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def kill_and_go_on(folder: str, runs: str, kills: str, *arguments: str) -> None:
    """Run the study unbroken in FOLDER/whole, then in FOLDER/broken-N, each of which is killed so often.

    It is killed (SIGKILL) at random moments, of what was left to do before, and then run to its end. To be called in a
    fork (see `forking`), so that the moments fall into the work and not into loading torch.
    """
    started = time.perf_counter()
    assert run([*arguments, "--out", str(Path(folder, "whole"))])
    took = time.perf_counter() - started
    for number in range(int(runs)):
        out = ["--out", str(Path(folder, f"broken-{number}"))]
        left = took
        for _ in range(int(kills)):
            moment = random.SystemRandom().uniform(0, 0.95) * left
            sys.stdout.write(f"broken-{number}: killed after {moment:.2f} of {left:.2f} s\n")
            run([*arguments, *out], kill_after=moment)
            left -= moment
        assert run([*arguments, *out]), f"broken-{number} does not go on"
