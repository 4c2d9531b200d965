"""Command lines from dataclasses: each option is written once, as a field with its default, its help and its values.

Nothing here imports torch, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, Final, NoReturn

PROGRAM: Final = "neuronsurgery"


class UsageError(ValueError):
    """A command line that cannot be meant as it is; whatever the files and the machine are like."""


def option(
    default: Any = MISSING, help: str = "", otherwise: str = "", flag: str | None = "", group: str = "", **how: Any
) -> Any:
    """Return a field of a dataclass that is an option.

    Args:
        default: of the field; False for an option without a value.
        help: what it is, without its default.
        otherwise: the default in words, for the help.
        flag: the option's name; "" is that of the field with hyphens. None: a value without a name, of the command.
        group: the title under which the help lists it.
        how: what `ArgumentParser.add_argument` takes, such as `metavar`, `type`, and as `action` `Several`. `words`: it
            is one of these.
    """
    if "words" in how:
        words = how.pop("words")
        help += f": {', '.join(words)}"
        how = {"type": one_of(words), **how}
    if "action" in how:
        how |= {"type": _between_commas(how["type"]), "nargs": "+"}
    help += f" (default: {otherwise})" if otherwise else ""
    how = {"action": "store_true"} if default is False else {"metavar": "NAME", **how}
    how["help"] = help.replace("%", "%%")
    return field(default=default, metadata={"flag": flag, "group": group, "how": how})


def flag_of(name: str, kind: type[Any]) -> str:
    """Return the option that sets a field of a dataclass, "--out" of "out"; the field's name where none does."""
    flag = next((one.metadata.get("flag") for one in fields(kind) if one.name == name), None)
    return name if flag is None else f"--{flag or name.replace('_', '-')}"


# Values


def one_of(words: Sequence[str], also: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a reader of one of some words, or `also` of others for them, which says which is near a mistyped one."""
    meant = {**{word: word for word in words}, **(also or {})}

    def read(text: str) -> str:
        if text not in meant:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(words)}, not {text!r}{near(text, meant)}")
        return meant[text]

    return read


def number(expected: str, above: float = -math.inf, most: float = math.inf, kind: Any = float) -> Callable[[str], Any]:
    """Return a reader of numbers above one and up to another, which errors call what is expected."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return value

    return read


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from the least that makes sense."""
    return number(f"a whole number of at least {least}", above=least - 1, kind=int)


def near(text: str, words: Iterable[str]) -> str:
    """Return ": did you mean ...?" with the word that is nearest to a text; nothing where none is near.

    Example:
        >>> near("sythetic", ["synthetic", "digits"])
        ': did you mean synthetic?'
        >>> near("xyz", ["synthetic", "digits"])
        ''
    """
    known = {word.lower(): word for word in words}
    begun = [word for word in known if text and word.startswith(text.lower())]
    found = begun if len(begun) == 1 else difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.65)
    return f": did you mean {known[found[0]]}?" if found else ""


def _between_commas(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [read(part.strip()) for part in text.split(",") if part.strip()]


class Several(argparse.Action):
    """Values with blanks or commas between them, each kept once and added to those before; or `const` of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set a tuple of the values."""
        found = [value for part in values for value in part]
        if not found:
            raise argparse.ArgumentError(self, "a value is missing")
        if self.const is None:
            found = list(dict.fromkeys((*getattr(namespace, self.dest, ()), *found)))
        elif len(found) != self.const:
            raise argparse.ArgumentError(self, f"expected {self.const} numbers, found {len(found)}")
        setattr(namespace, self.dest, tuple(found))


# A command line


def fail(message: str) -> NoReturn:
    """Write an error of usage, in one line, and exit with status 2."""
    sys.stderr.write(f"{PROGRAM}: error: {message}\n")
    raise SystemExit(2)


REWORDED: Final = (
    (r"argument (\S+): expected (?:one|at least one|\d+) arguments?", r"\1: a value is missing"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1 takes no value, found \2: leave the value out"),
    (r"the following arguments are required: (.*)", r"\1 is missing, see --help"),
    (r"argument (\S+): (.*)", r"\1: \2"),
    (r"(.*)", r"\1"),
)
"""Errors of argparse, and what to say in the place of its jargon."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, the last thing that it says; how to use it is said on `--help` only."""

    def error(self, message: str) -> NoReturn:
        """Write an error and exit with status 2."""
        fail(next(found.expand(ours) for theirs, ours in REWORDED if (found := re.fullmatch(theirs, message, re.S))))


def parse(kind: type[Any], name: str, description: str, words: Sequence[str]) -> dict[str, Any]:
    """Return what is given of the options of a dataclass, by field; exits after an error (2) or the help (0)."""
    options = [one for one in fields(kind) if "how" in one.metadata]
    places = " ".join(one.metadata["how"]["metavar"] for one in options if one.metadata["flag"] is None)
    usage = f"%(prog)s {places or '[OPTION ...]'}"
    parser = Parser(prog=f"{PROGRAM} {name}", usage=usage, description=description, allow_abbrev=False)
    groups: dict[str, Any] = {"": parser}
    for one in options:
        title, flag, how = one.metadata["group"], flag_of(one.name, kind), one.metadata["how"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag, default=argparse.SUPPRESS, **how)
    flags = [flag_of(one.name, kind) for one in options if one.metadata["flag"] is not None]
    # Before anything that is missing: an option that is not there may be why.
    known = {*flags, "-h", "--help", "--", "-"}
    mistyped = [word for word in words if re.match(r"-[^\d.]", word) and word.partition("=")[0] not in known]
    given, unknown = parser.parse_known_args(words) if not mistyped else (argparse.Namespace(), mistyped)
    if unknown:
        fail(_unknown(unknown[0], name, flags))
    return vars(given)


def _unknown(word: str, name: str, flags: Iterable[str]) -> str:
    """What to say of a word that belongs to no option."""
    if word.startswith("-"):
        flag = word.partition("=")[0]
        return f"there is no option {flag}{near(flag, flags) or f': {PROGRAM} {name} --help lists them'}"
    return f"{word!r} belongs to no option: {PROGRAM} {name} --help lists them"
