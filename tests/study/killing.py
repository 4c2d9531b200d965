"""A study that is killed at random points and taken up again, in a process of its own.

Usage: python -m study.killing FOLDER KILLS ARGUMENT... Runs the study unbroken in FOLDER/whole, then KILLS times in
FOLDER/broken-N: killed (SIGKILL) at a random moment, then run to its end. Children are forked after the imports, so
that the moments fall into the work and not into loading torch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from neuronsurgery.study import cli
from study.little_study import make_little


def run(arguments: list[str], kill_after: float | None = None) -> bool:
    """Run the study in a child; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the child's life
        os._exit(cli.main(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    make_little()
    folder, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    started = time.perf_counter()
    assert run([*arguments, "--out", str(folder / "whole")])
    took = time.perf_counter() - started
    for number in range(kills):
        out = ["--out", str(folder / f"broken-{number}")]
        moment = random.SystemRandom().uniform(0, 0.95) * took
        sys.stdout.write(f"broken-{number}: killed after {moment:.2f} of {took:.2f} s\n")
        run([*arguments, *out], kill_after=moment)
        assert run([*arguments, *out]), f"broken-{number} does not go on"


if __name__ == "__main__":
    main()
