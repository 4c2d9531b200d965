"""From the columns of a table to a data set: codes of classes and attributes, splits, and whether files are there."""

from __future__ import annotations

import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from neuronsurgery.study.readers.disk import ImageData, ImageSplit, Loading
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
_AT_ONCE: Final = 10_000  # images looked at between two lines of progress


def assemble(
    source: Path,
    folder: Path,
    columns: Mapping[str, Sequence[str]],
    *,
    name: str,
    group_name: Callable[[str, str], str],
    known: tuple[list[str], list[str]] | None = None,
    framing: Framing,
    loading: Loading,
    verify: bool,
    splits: Mapping[str, str] = SPLIT_NAMES,
) -> ImageData:
    """The data set of a table, after everything in it was checked.

    Args:
        source: the file of the table, for messages.
        folder: of the images.
        columns: "path", "y", "attribute", "split" and "row" (the line that it begins in) of each image, as text.
        name: of the data set.
        group_name: of (class, attribute).
        known: what the classes and the attributes 0 and 1 are called; None: they are the values in the table, any
            number of them, and pairs that no image has are no groups.
        framing: how images are brought to size.
        loading: how they are fetched.
        verify: decode every image too.
        splits: what the column of splits says, in lower case, to "train", "validation" or "test".

    Raises:
        ValueError: if anything is not as it should be; lists all that is wrong.
    """
    torchvision_transforms()  # an error now rather than at the first batch
    names = [f"line {row}: {path}" for path, row in zip(columns["path"], columns["row"], strict=True)]
    encode = encode_values if known is None else _encode_binary
    y, classes, wrong_y = encode(columns["y"], "label", names)
    a, attributes, wrong_a = encode(columns["attribute"], "attribute", names)
    split_of, wrong_splits = _name_splits(columns["split"], names, splits)
    contradictions, repeated = _check_repetitions(columns, split_of)
    wrong_files = _check_files(folder, columns, verify, loading.workers)
    raise_for(source, {**wrong_y, **wrong_a, **wrong_splits, **contradictions, **wrong_files})
    if repeated:
        warnings.warn(
            f"{source}: {len(repeated)} rows say again what others say ({first_of(repeated)}): their images count "
            f"as often as they are listed; take these rows out if that is not meant",
            stacklevel=3,
        )
    if known is not None:
        classes, attributes = known
    targets = torch.tensor(y)
    groups = targets * len(attributes) + torch.tensor(a)
    group_names = [group_name(label, attribute) for label in classes for attribute in attributes]
    if known is None:
        present, groups = torch.unique(groups, return_inverse=True)
        group_names = [group_names[group] for group in present.tolist()]
    whole = ImageSplit(folder, tuple(columns["path"]), targets, groups, len(group_names), framing, loading)
    parts = {part: whole.subset(torch.tensor([place == part for place in split_of])) for part in SPLITS}
    return ImageData(name, tuple(group_names), RandomCrop(framing.size), MappingProxyType(parts), tuple(classes))


def _encode_binary(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """As `encode_values`, of values 0 and 1, or -1 and 1."""
    numbers = {value: whole_number(value) for value in set(values)}
    low = -1 if -1 in numbers.values() else 0
    problems = {
        f"images whose {what} is no whole number": _saying(values, names, {v for v in numbers if numbers[v] is None}),
        f"images whose {what} is neither {low} nor 1": _saying(
            values, names, {v for v in numbers if numbers[v] not in (None, low, 1)}
        ),
    }
    return [int(numbers[value] == 1) for value in values], ["0", "1"], problems


def encode_values(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes from 0 of the values of a column, what has each code, and what is wrong with which of the named images.

    Whole numbers are in ascending order; words in theirs, if any value is no number at all.
    """
    missing = {value for value in set(values) if value.lower() in ("", "nan")}
    given = set(values) - missing
    numeric = all(map(_is_number, given))
    broken = {value for value in given if numeric and whole_number(value) is None}
    keys = {value: _plain(value) if numeric else value for value in given - broken}
    order = sorted(set(keys.values()), key=int if numeric else str)
    code = {key: number for number, key in enumerate(order)}
    problems = {
        f"images whose {what} is missing": _saying(values, names, missing),
        f"images whose {what} is no whole number": _saying(values, names, broken),
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


def _plain(value: str) -> str:
    """A value as codes tell it from others: 1.0 is 1."""
    number = whole_number(value)
    return value if number is None else str(number)


def _saying(values: Sequence[str], names: Sequence[str], wrong: Collection[str]) -> list[str]:
    """The images whose value is one of the wrong ones, with that value."""
    return [f"{name} ({value!r})" for name, value in zip(names, values, strict=True) if value in wrong]


def _name_splits(values: Sequence[str], names: Sequence[str], splits: Mapping[str, str]) -> tuple[list[str], Problems]:
    """The split of each image, "" where unknown, and what is wrong."""
    splits = {name.lower(): split for name, split in splits.items()}
    meaning = {value: splits.get(value.lower(), splits.get(_plain(value), "")) for value in set(values)}
    unknown = {value for value, split in meaning.items() if not split}
    problems = {
        f"images in an unknown split, known are {', '.join(splits)}": _saying(values, names, unknown),
        "splits without images": [] if "train" in meaning.values() else ["train"],
    }
    return [meaning[value] for value in values], problems


def _check_repetitions(columns: Mapping[str, Sequence[str]], split_of: Sequence[str]) -> tuple[Problems, list[str]]:
    """The images of which several rows say different things, and the lines that only say what an earlier one says."""
    files = list(map(os.path.normpath, columns["path"]))
    labels, attributes = ([_plain(value) for value in columns[column]] for column in ("y", "attribute"))
    problems = {
        "images with more than one label": _contradictions(columns, "y", files, labels),
        "images with more than one attribute": _contradictions(columns, "attribute", files, attributes),
        "images in more than one split": _contradictions(columns, "split", files, split_of),
    }
    seen: set[tuple[str, ...]] = set()
    repeated = []
    for line, *said in zip(columns["row"], files, labels, attributes, split_of, strict=True):
        if tuple(said) in seen:
            repeated.append(f"line {line}")
        seen.add(tuple(said))
    return problems, repeated


def _contradictions(
    columns: Mapping[str, Sequence[str]], column: str, files: Sequence[str], meant: Sequence[str]
) -> list[str]:
    """The images of which rows mean different things by a column, with the first row for each meaning."""
    first: dict[str, dict[str, int]] = {}
    for place, (file, meaning) in enumerate(zip(files, meant, strict=True)):
        first.setdefault(file, {}).setdefault(meaning, place)
    contradicting = [list(places.values()) for places in first.values() if len(places) > 1]
    lines = [f"line {row}: {value!r}" for row, value in zip(columns["row"], columns[column], strict=True)]
    return [
        f"{columns['path'][places[0]]} ({first_of([lines[place] for place in places], 3)})" for places in contradicting
    ]


def _check_files(folder: Path, columns: Mapping[str, Sequence[str]], verify: bool, workers: int) -> Problems:
    """The files that are missing or cannot be read, as images only with `verify`; says how far it is with many."""
    paths, found = [folder / path for path in columns["path"]], list[tuple[str, str]]()
    # Pillow decodes outside the interpreter's lock: threads are as fast as processes, which take seconds to start.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, len(paths), _AT_ONCE):
            found += pool.map(_look_at, paths[start : start + _AT_ONCE], itertools.repeat(verify))
            if verify and len(paths) > _AT_ONCE:
                sys.stderr.write(f"checking images: {len(found)} of {len(paths)}\n")
    rows = [(*row, *fault) for *row, fault in zip(columns["row"], columns["path"], found, strict=True)]
    return {
        "images whose path or folder cannot be read": [
            f"{path} (line {row}: {why})" for row, path, kind, why in rows if kind == "refused"
        ],
        f"images missing in {folder}": [f"line {row}: {path}" for row, path, kind, _ in rows if kind == "missing"],
        "files that are no readable images": [
            f"line {row}: {path} ({why})" for row, path, kind, why in rows if kind == "broken"
        ],
    }


def _look_at(path: Path, verify: bool) -> tuple[str, str]:
    """Whether a file is "refused", "missing" or "broken", or "" where nothing is wrong, and why."""
    if os.path.isfile(path):
        fault = fault_of(path) if verify else ""
        return "broken" if fault else "", fault
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing", ""
    except OSError as error:  # the system does not even look for it: a name that is too long, a folder that is closed
        return "refused", error.strerror or str(error)
    return "missing", ""  # a folder, or a link that leads nowhere
