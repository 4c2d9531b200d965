"""From the rows of a table to a data set: codes of classes and attributes, splits, and whether every file is there."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor

from neuronsurgery.study.readers.disk import EXPECTED_COUNTS, ImageData, ImageSplit, Loading
from neuronsurgery.study.readers.pixels import Framing, RandomCrop, fault_of, torchvision_transforms
from neuronsurgery.study.readers.tables import Problems, first_of, raise_for, whole_number

SPLITS: Final = {
    "train": ("0", "train", "training"),
    "validation": ("1", "val", "valid", "validation"),
    "test": ("2", "test"),
}
SPLIT_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {name: split for split, names in SPLITS.items() for name in names}
)
"""What a table may say, in any case, and the split that it means."""
_MOST_VALUES: Final = 100  # of a class or an attribute: above it is another column
_AT_ONCE: Final = 10_000  # images decoded between two lines of progress


@dataclass(frozen=True)
class Rows:
    """The four columns as the table says them, one entry per image, and the line that its row begins in."""

    source: Path
    folder: Path
    path: list[str]
    y: list[str]
    attribute: list[str]
    split: list[str]
    row: list[str]

    @property
    def names(self) -> list[str]:
        """What an error calls each image."""
        return [f"line {row}: {path}" for path, row in zip(self.path, self.row, strict=True)]


Encode: TypeAlias = Callable[[Sequence[str], str, Sequence[str]], tuple[list[int], list[str], Problems]]
"""(values, what they are, names of the images) -> (codes from 0, the value of each code, what is wrong)."""


def assemble(
    rows: Rows,
    *,
    name: str,
    encode: Encode,
    describe: Callable[[Sequence[str], Sequence[str]], tuple[tuple[str, ...], tuple[str, ...]]],
    framing: Framing,
    loading: Loading,
    verify: bool,
    splits: Mapping[str, str] = SPLIT_NAMES,
) -> ImageData:
    """The data set of a table, after everything in it was checked.

    Args:
        rows: the table.
        name: of the data set.
        encode: the values of a column to codes.
        describe: the values of class and attribute to the names of classes and groups.
        framing: how images are brought to size.
        loading: how they are fetched.
        verify: decode every image too.
        splits: what the column of splits says, in lower case, to "train", "validation" or "test".

    Raises:
        ValueError: if anything is not as it should be; lists all that is wrong.
    """
    torchvision_transforms()  # an error now rather than at the first batch
    y, y_values, wrong_y = encode(rows.y, "label", rows.names)
    a, a_values, wrong_a = encode(rows.attribute, "attribute", rows.names)
    split_of, wrong_splits = _name_splits(rows, splits)
    contradictions, repeated = _check_repetitions(rows, split_of)
    wrong_files = _check_files(rows, verify, loading.workers)
    raise_for(rows.source, {**wrong_y, **wrong_a, **wrong_splits, **contradictions, **wrong_files})
    if repeated:
        warnings.warn(
            f"{rows.source}: {len(repeated)} rows say again what others say ({first_of(repeated)}): their images count "
            f"as often as they are listed; take these rows out if that is not meant",
            stacklevel=3,
        )
    class_names, group_names = describe(y_values, a_values)
    targets = torch.tensor(y)
    groups = targets * len(a_values) + torch.tensor(a)
    if name not in EXPECTED_COUNTS:  # the groups of published data keep their numbers
        groups, group_names = _without_empty(groups, group_names)
    whole = ImageSplit(rows.folder, tuple(rows.path), targets, groups, len(group_names), framing, loading)
    parts = {part: whole.subset(torch.tensor([place == part for place in split_of])) for part in SPLITS}
    return ImageData(name, class_names, group_names, RandomCrop(framing.size), MappingProxyType(parts))


def _without_empty(groups: Tensor, names: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
    """The groups numbered anew, and their names, without those that no image of any split belongs to."""
    present, numbers = torch.unique(groups, return_inverse=True)
    return numbers, tuple(names[group] for group in present.tolist())


def encode_binary(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes 0 and 1 of values 0 and 1, or -1 and 1."""
    numbers = {value: whole_number(value) for value in set(values)}
    allowed = (-1, 1) if -1 in numbers.values() else (0, 1)
    problems = {
        f"images whose {what} is no whole number": _saying(values, names, lambda v: numbers[v] is None),
        f"images whose {what} is neither {allowed[0]} nor 1": _saying(
            values, names, lambda v: numbers[v] is not None and numbers[v] not in allowed
        ),
    }
    codes = [int(numbers[value] == 1) for value in values]
    return codes, ["0", "1"], problems


def encode_values(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes 0, 1, ... of whole numbers in ascending order; of words in theirs, if any value is no number at all."""
    missing = {value for value in set(values) if value.lower() in ("", "nan")}
    given = set(values) - missing
    keys, broken = {value: value for value in given}, set()
    if all(_is_number(value) for value in given):
        broken = {value for value in given if whole_number(value) is None}
        keys = {value: str(whole_number(value)) for value in given - broken}
    order = sorted(set(keys.values()), key=int if all(map(_is_number, given)) else str)
    code = {key: number for number, key in enumerate(order)}
    problems = {
        f"images whose {what} is missing": _saying(values, names, missing.__contains__),
        f"images whose {what} is no whole number": _saying(values, names, broken.__contains__),
        f"different values of the {what}, of which {_MOST_VALUES} are allowed: is it the right column?": (
            order if len(order) > _MOST_VALUES else []
        ),
    }
    return [code[keys[value]] if value in keys else 0 for value in values], order, problems


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _saying(values: Sequence[str], names: Sequence[str], is_wrong: Callable[[str], bool]) -> list[str]:
    """The images whose value is wrong, with that value."""
    return [f"{name} ({value!r})" for name, value in zip(names, values, strict=True) if is_wrong(value)]


def _name_splits(rows: Rows, splits: Mapping[str, str]) -> tuple[list[str], Problems]:
    """The split of each image, "" where unknown, and what is wrong."""
    splits = {name.lower(): split for name, split in splits.items()}

    def look_up(value: str) -> str:
        return splits.get(value.lower(), splits.get(str(whole_number(value)), ""))

    meaning = {value: look_up(value) for value in set(rows.split)}
    named = [meaning[value] for value in rows.split]
    known = ", ".join(splits)
    problems = {
        f"images in an unknown split, known are {known}": _saying(rows.split, rows.names, lambda v: not meaning[v]),
        "splits without images": [] if "train" in named else ["train"],
    }
    return named, problems


def _check_repetitions(rows: Rows, split_of: Sequence[str]) -> tuple[Problems, list[str]]:
    """The images of which several rows say different things, and the rows that say only what an earlier one says."""
    listed: dict[str, list[int]] = {}
    for place, path in enumerate(rows.path):
        listed.setdefault(os.path.normpath(path), []).append(place)
    several = [places for places in listed.values() if len(places) > 1]
    columns = {
        "with more than one label": (rows.y, list(map(_without_spelling, rows.y))),
        "with more than one attribute": (rows.attribute, list(map(_without_spelling, rows.attribute))),
        "in more than one split": (rows.split, split_of),
    }
    problems = {
        f"images {what}": [
            f"{rows.path[places[0]]} ({first_of([f'line {rows.row[at]}: {said[at]!r}' for at in differing], 3)})"
            for places in several
            for differing in [_first_of_each(places, meant)]
            if len(differing) > 1
        ]
        for what, (said, meant) in columns.items()
    }
    whole = list(zip(*(meant for _, meant in columns.values()), strict=True))
    repeated = [place for places in several for place in set(places).difference(_first_of_each(places, whole))]
    return problems, [f"line {rows.row[place]}" for place in sorted(repeated)]


def _first_of_each(places: Sequence[int], values: Sequence[object]) -> list[int]:
    """The first place of each different value, ascending."""
    return sorted({values[place]: place for place in reversed(places)}.values())


def _without_spelling(value: str) -> str:
    """A value as codes tell it from others: 1.0 is 1."""
    number = whole_number(value)
    return value if number is None else str(number)


def _check_files(rows: Rows, verify: bool, workers: int) -> Problems:
    """Missing files, found by listing each directory once; what cannot be read too, images only with `verify`."""
    folder, paths = rows.folder, rows.path
    split = [os.path.split(path) for path in paths]
    listed = {parent: _list(folder / parent) for parent in {parent for parent, _ in split}}
    is_there = [name in listed[parent][0] for parent, name in split]
    refused = [
        "" if there else listed[parent][1] or _refusal(folder / path)
        for path, (parent, _), there in zip(paths, split, is_there, strict=True)
    ]
    problems = {
        "images whose path or folder cannot be read": [
            f"{path} (line {row}: {why})" for path, row, why in zip(paths, rows.row, refused, strict=True) if why
        ],
        f"images missing in {folder}": [
            name for name, there, why in zip(rows.names, is_there, refused, strict=True) if not there and not why
        ],
    }
    if verify:
        present = [(path, name) for path, name, there in zip(paths, rows.names, is_there, strict=True) if there]
        faults = _find_faults(folder, [path for path, _ in present], workers)
        broken = [f"{name} ({fault})" for (_, name), fault in zip(present, faults, strict=True) if fault]
        problems["files that are no readable images"] = broken
    return problems


def _find_faults(folder: Path, paths: Sequence[str], workers: int) -> list[str]:
    """What is wrong with each image, or "", found by decoding them all; says how far it is with large sets."""
    faults: list[str] = []
    # Pillow decodes outside the interpreter's lock: threads are as fast as processes, which take seconds to start.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, len(paths), _AT_ONCE):
            faults += pool.map(fault_of, [folder / path for path in paths[start : start + _AT_ONCE]])
            if len(paths) > _AT_ONCE:
                sys.stderr.write(f"checking images: {len(faults)} of {len(paths)}\n")
    return faults


def _list(folder: Path) -> tuple[set[str], str]:
    """The names of the files in a folder, a link that leads nowhere being none; and why it could not be read, or ""."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}, ""
    except (FileNotFoundError, NotADirectoryError):
        return set(), ""
    except OSError as error:
        return set(), error.strerror or str(error)


def _refusal(path: Path) -> str:
    """Why the system does not look for a file at all, such as a name that is too long; "" where it does."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _is_file(entry: os.DirEntry[str]) -> bool:
    # For a link the entry's own answer is an error where links lead in a circle.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
