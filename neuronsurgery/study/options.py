"""Command lines from dataclasses: each option is written once, as a field with its default, its help and its values.

Nothing here imports torch, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, NoReturn

PROGRAM: Final = "neuronsurgery"
KEY: Final = "option"


class UsageError(ValueError):
    """A command line that cannot be meant as it is; whatever the files and the machine are like."""


@dataclass(frozen=True)
class Option:
    """How a field is written on a command line.

    Attributes:
        help: what it is, without its default.
        otherwise: the default in words, for the help; "" where it goes without saying.
        flag: the option's name; "" is that of the field with hyphens. None: a value without a name, of the command.
        values: of one word; its errors say what was expected.
        choices: the words that it may be, if these are few.
        several: whether it takes several values, apart or with commas, and may be given more than once.
        count: how many values there must be; 0 is any number.
        metavar: what stands for a value in the help.
        group: the title under which the help lists it.
    """

    help: str
    otherwise: str = ""
    flag: str | None = ""
    values: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    several: bool = False
    count: int = 0
    metavar: str | None = None
    group: str = ""


def option(default: Any = MISSING, help: str = "", **how: Any) -> Any:
    """Return a field of a dataclass that is an option; `how` has the other attributes of `Option`."""
    chosen = how.get("choices", ())
    if chosen and "values" not in how:
        how["values"] = one_of(chosen)
    return field(default=default, metadata={KEY: Option(help, **how)})


def flag_of(name: str, kind: type[Any]) -> str:
    """Return the option that sets a field of a dataclass, "--out" of "out"; the field's name where none does."""
    said = next((one.metadata.get(KEY) for one in fields(kind) if one.name == name), None)
    return name if said is None or said.flag is None else _flag(said, name)


def _flag(said: Option, name: str) -> str:
    return f"--{said.flag or name.replace('_', '-')}"


# Values


def one_of(choices: Sequence[str], also: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a reader of one of some words, which says which of them is meant where a word is near one.

    Args:
        choices: the words.
        also: other words for some of them.
    """
    meant = {**{choice: choice for choice in choices}, **(also or {})}

    def values(text: str) -> str:
        if text not in meant:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, not {text!r}{near(text, meant)}")
        return meant[text]

    return values


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from the least that makes sense."""

    def values(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, not {text!r}")
        return int(text)

    return values


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


# A command line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, the last thing that it says; how to use it is said on `--help` only."""

    def error(self, message: str) -> NoReturn:
        """Write an error and exit with status 2."""
        fail(_in_our_words(message))


def fail(message: str) -> NoReturn:
    """Write an error of usage and exit with status 2."""
    sys.stderr.write(f"{PROGRAM}: error: {message}\n")
    raise SystemExit(2)


_REWORDED: Final = (
    (r"argument (\S+): expected (?:one|at least one|\d+) arguments?", r"\1: a value is missing"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1 takes no value, found \2: leave the value out"),
    (r"the following arguments are required: (.*)", r"\1 is missing, see --help"),
    (r"argument (\S+): (.*)", r"\1: \2"),
)


def _in_our_words(message: str) -> str:
    """An error of argparse without its jargon; one that is not known as it is."""
    for pattern, words in _REWORDED:
        if re.fullmatch(pattern, message, re.DOTALL):
            return re.sub(pattern, words, message, flags=re.DOTALL)
    return message


def parse(kind: type[Any], name: str, description: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the options that are given to a command, by the fields of their dataclass.

    Args:
        kind: the dataclass, of which the fields made by `option` count.
        name: of the command.
        description: of the command, for its help.
        words: what follows it on the command line.

    Raises:
        SystemExit: with status 2 after an error, 0 after the help.
    """
    options = [one for one in fields(kind) if KEY in one.metadata]
    flags = [_flag(one.metadata[KEY], one.name) for one in options if one.metadata[KEY].flag is not None]
    known = {*flags, "-h", "--help", "--", "-"}
    # Before anything that is missing: an option that is not there may be why.
    mistyped = [word for word in words if re.match(r"-[^\d.]", word) and word.partition("=")[0] not in known]
    if mistyped:
        fail(_unknown(mistyped[0], name, flags))
    given, unknown = _parser(name, description, options).parse_known_args(words)
    if unknown:
        fail(_unknown(unknown[0], name, flags))
    return {one.name: _value(one, getattr(given, one.name)) for one in options if hasattr(given, one.name)}


def _parser(name: str, description: str, options: Sequence[Field[Any]]) -> Parser:
    places = " ".join(str(one.metadata[KEY].metavar) for one in options if one.metadata[KEY].flag is None)
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        usage=f"%(prog)s {places or '[OPTION ...]'}",
        description=description,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser}
    for one in options:
        said: Option = one.metadata[KEY]
        if said.group not in groups:
            groups[said.group] = parser.add_argument_group(said.group)
        _add(groups[said.group], one, said)
    return parser


def _add(group: Any, one: Field[Any], said: Option) -> None:
    text = f"{said.help}: {', '.join(said.choices)}" if said.choices else said.help
    text += f" (default: {said.otherwise})" if said.otherwise else ""
    how: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if said.flag is None:
        group.add_argument(one.name, type=_reader(said), metavar=said.metavar, help=how["help"])
    elif one.default is False:
        group.add_argument(_flag(said, one.name), dest=one.name, action="store_true", **how)
    else:
        how |= {"nargs": "+", "action": "extend"} if said.several else {}
        shown = said.metavar or one.name.rpartition("_")[2].upper()
        group.add_argument(_flag(said, one.name), dest=one.name, type=_reader(said), metavar=shown, **how)


def _reader(said: Option) -> Callable[[str], Any]:
    if not said.several:
        return said.values
    return lambda text: [said.values(part.strip()) for part in text.split(",") if part.strip()]


def _value(one: Field[Any], given: Any) -> Any:
    said: Option = one.metadata[KEY]
    if not said.several:
        return given
    values = [value for part in given for value in part]
    flag = _flag(said, one.name)
    if not values:
        fail(f"{flag}: a value is missing")
    if said.count and len(values) != said.count:
        fail(f"{flag}: expected {said.count} numbers, found {len(values)}")
    return tuple(values) if said.count else tuple(dict.fromkeys(values))


def _unknown(word: str, name: str, flags: Sequence[str]) -> str:
    """What to say of a word that belongs to no option."""
    if word.startswith("-"):
        flag = word.partition("=")[0]
        return f"there is no option {flag}{near(flag, flags) or f': {PROGRAM} {name} --help lists them'}"
    return f"{word!r} belongs to no option: {PROGRAM} {name} --help lists them"
