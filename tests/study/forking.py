"""A process that has the study imported, and forks what tests want done in a process of its own.

Usage: python -m study.forking, which reads calls from its standard input, [function, arguments...] in JSON on a line
each, and answers each on a line with [exit status, what was printed, what was said of errors].
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

import neuronsurgery as ns
from neuronsurgery.study import cli, program, report  # noqa: F401  # for all that they import
from study.little_study import tiny_resnet

TIMEOUT = 600
LATE_IMPORTS = ("sklearn.datasets", "sklearn.linear_model", "sklearn.metrics")

Forked: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"
"""Calls a function "module.name" with strings in a process of its own, and returns how it ended."""


@contextmanager
def forker() -> Iterator[Forked]:
    """Start the process; within, have it fork."""
    command = [sys.executable, "-m", "study.forking"]
    tests = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        calls, answers = process.stdin, process.stdout

        def call(*function_and_arguments: str) -> subprocess.CompletedProcess[str]:
            calls.write(json.dumps(function_and_arguments) + "\n")
            calls.flush()
            return subprocess.CompletedProcess(function_and_arguments, *json.loads(answers.readline()))

        yield call


def warm_up() -> None:
    """Have what is imported when it is first needed imported, the parts of torch that capture graphs among it."""
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    model = tiny_resnet().eval()
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"stem.weight": 0}))}
    ns.sweep(model, edits, {"a": [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]})


def run_forked(function: str, *arguments: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            call_and_exit(function, *arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (output, errors):
            file.seek(0)
        return status, output.read().decode(), errors.read().decode()


def call_and_exit(function: str, *arguments: str) -> None:
    signal.alarm(TIMEOUT)
    torch.set_num_threads(1)  # makes anew the pool of torch's threads, which is broken in a fork
    module, _, name = function.rpartition(".")
    status = 1
    try:
        status = getattr(importlib.import_module(module), name)(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    warm_up()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_forked(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
