"""The command line: `neuronsurgery study`, `audit`, `report`, `show`.

A command is an entry of `COMMANDS`; what it runs is imported when it is run, since that brings torch.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, Final

from neuronsurgery.study.options import PROGRAM, UsageError, fail, near, option, parse
from neuronsurgery.study.settings import AuditOptions, Options, refuse_contradictions, refuse_contradictory_audit

Given = Mapping[str, Any]
"""The options that stand on a command line, by the fields of their dataclass."""


_OF_A_RUN = option(help="of a run", flag=None, type=Path, metavar="DIR")
_OF_OURS = option(help="safetensors or JSON, of a run or of the library", flag=None, type=Path, metavar="FILE")
Report = make_dataclass("Report", [("folder", Path, _OF_A_RUN)])
Show = make_dataclass("Show", [("file", Path, _OF_OURS)])
"""What `neuronsurgery report` and `neuronsurgery show` are asked for."""


def _study(given: Given) -> None:
    """Train a network on data with a spurious correlation and operate on its critical neurons.

    The paper from front to back. Stage 1: train by empirical risk minimisation with a checkpoint an epoch, score every
    neuron for every group, then zero, replace, disturb and rewind the critical ones, and random ones beside them.
    Stage 2: fine-tune against the pruned twin, beside its controls and other methods. Fragility: who is memorised,
    without group labels. A run that was killed goes on where it was.
    """
    refuse_contradictions(given)
    from neuronsurgery.study.program import study

    study(given)


def _audit(given: Given) -> None:
    """Look at a trained network: whom it remembers, and which few neurons carry its worst group.

    Nothing is trained, and no group labels are needed. Leaves one page with the accuracy of every class and group, the
    most fragile examples of each class, and a set of neurons that was searched on one half of the examples and judged
    on the other. An audit that was stopped goes on where it was.
    """
    refuse_contradictory_audit(given)
    from neuronsurgery.study.audit.command import run

    run(AuditOptions(**given))


def _report(given: Given) -> None:
    """Make the report of a run folder again."""
    from neuronsurgery.study.program import report

    print(report(given["folder"]))


def _show(given: Given) -> None:
    """Print what a file of ours holds: neurons, scores, an edit, a checkpoint, results, settings."""
    from neuronsurgery.study.show import describe_file

    print(describe_file(given["file"]))


COMMANDS: Final[Mapping[str, tuple[type[Any], Callable[[Given], None]]]] = {
    "study": (Options, _study),
    "audit": (AuditOptions, _audit),
    "report": (Report, _report),
    "show": (Show, _show),
}
"""The options of each command, and what it does, of which the help has the docstring."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0; 1 after an error that names the next step; 130 after Ctrl-C. Wrong usage, whatever the files and the machine are
    like, is 2: by SystemExit where a word is not understood.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if words[:1] == ["--version"]:
        from importlib.metadata import version  # which takes a third of the time of a help

        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    if not words:
        fail(f"no command: {PROGRAM} {'|'.join(COMMANDS)}, or {PROGRAM} --help")
    name = words[0]
    if name not in COMMANDS:
        step = near(name, (*COMMANDS, "--help", "--version")) or f": the commands are {', '.join(COMMANDS)}"
        fail(f"there is no command {name!r}{step}")
    options, run = COMMANDS[name]
    title, _, text = (inspect.getdoc(run) or "").partition("\n\n")
    given = parse(options, name, text or title, words[1:])
    try:
        run(given)
        return 0
    except KeyboardInterrupt:
        without = ", without --overwrite," if given.get("overwrite") else ""
        sys.stderr.write(f"{PROGRAM}: stopped: the same command{without} goes on from here\n")
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    titles = {name: (inspect.getdoc(run) or ".").splitlines()[0] for name, (_, run) in COMMANDS.items()}
    lines = [f"  {name:{width}}  {title[0].lower()}{title[1:-1]}" for name, title in titles.items()]
    said = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Model surgery and the study built on it.",
        "",
        "commands:",
        *(textwrap.fill(line, 100, subsequent_indent=" " * (width + 4)) for line in lines),
        "",
        f"{PROGRAM} COMMAND --help has the options of a command; {PROGRAM} --version the version.",
    ]
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
