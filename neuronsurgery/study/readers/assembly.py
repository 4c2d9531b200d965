"""From the columns of a table to a data set: codes of classes and attributes, splits, and whether files are there."""

from __future__ import annotations

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from neuronsurgery.study.readers.disk import ImageData, ImageSplit, Loading
from neuronsurgery.study.readers.pixels import Framing, RandomCrop, fault_of, torchvision_transforms
from neuronsurgery.study.readers.tables import Problems, first_of, number_in, raise_for, whole_number

SPLITS: Final = {
    "train": ("0", "train", "training"),
    "validation": ("1", "val", "valid", "validation"),
    "test": ("2", "test"),
}
SPLIT_NAMES: Final[Mapping[str, str]] = {name: split for split in SPLITS for name in SPLITS[split]}
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
    """The data set of a table, after everything in it was checked; a ValueError lists all that is wrong.

    The columns are "path", "y", "attribute", "split" and "row", the line that it begins in. Where the names of classes
    and attributes are `known`, these are two each, and all four pairs are groups. Otherwise they are the values in the
    table, and the groups are the pairs that some image has. With `verify` every image is decoded. `splits` is what the
    column of splits says, in any case, to one of `SPLITS`.
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
    return ImageData(name, tuple(group_names), RandomCrop(framing.size), parts, tuple(classes))


def _encode_binary(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """As `encode_values`, of values 0 and 1, or -1 and 1."""
    numbers = {value: whole_number(value) for value in set(values)}
    low = -1 if -1 in numbers.values() else 0
    wrong = {
        value: f"images whose {what} is " + ("no whole number" if number is None else f"neither {low} nor 1")
        for value, number in numbers.items()
        if number not in (low, 1)
    }
    return [int(numbers[value] == 1) for value in values], ["0", "1"], _saying(values, names, wrong)


def encode_values(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes from 0 of the values of a column, what has each code, and what is wrong with which of the named images.

    Whole numbers are in ascending order; words in theirs, if any value is no number at all.
    """
    wrong = {value: f"images whose {what} is missing" for value in set(values) if value.lower() in ("", "nan")}
    given = set(values) - wrong.keys()
    numeric = all(math.isfinite(number_in(value)) for value in given)
    if numeric:
        wrong |= {value: f"images whose {what} is no whole number" for value in given if whole_number(value) is None}
    keys = {value: _plain(value) if numeric else value for value in given - wrong.keys()}
    order = sorted(set(keys.values()), key=int if numeric else str)
    code = {key: number for number, key in enumerate(order)}
    many = f"different values of the {what}, of which {_MOST_VALUES} are allowed: is it the right column?"
    problems = {**_saying(values, names, wrong), many: order if len(order) > _MOST_VALUES else []}
    return [code[keys[value]] if value in keys else 0 for value in values], order, problems


def _plain(value: str) -> str:
    """A value as codes tell it from others: 1.0 is 1."""
    number = whole_number(value)
    return value if number is None else str(number)


def _saying(values: Sequence[str], names: Sequence[str], wrong: Mapping[str, str]) -> Problems:
    """By what is wrong with some values, the images that have these."""
    return _grouped((wrong[v], f"{name} ({v!r})") for name, v in zip(names, values, strict=True) if v in wrong)


def _grouped(faults: Iterable[tuple[str, str]]) -> Problems:
    """By what is wrong, all that is wrong in that way."""
    problems: dict[str, list[str]] = {}
    for what, name in faults:
        problems.setdefault(what, []).append(name)
    return problems


def _name_splits(values: Sequence[str], names: Sequence[str], splits: Mapping[str, str]) -> tuple[list[str], Problems]:
    """The split of each image, "" where unknown, and what is wrong."""
    splits = {name.lower(): split for name, split in splits.items()}
    meaning = {value: splits.get(value.lower(), splits.get(_plain(value), "")) for value in set(values)}
    unknown = f"images in an unknown split, known are {', '.join(splits)}"
    wrong = _saying(values, names, {value: unknown for value, split in meaning.items() if not split})
    empty = [] if "train" in meaning.values() else ["train"]
    return [meaning[value] for value in values], {**wrong, "splits without images": empty}


def _check_repetitions(columns: Mapping[str, Sequence[str]], split_of: Sequence[str]) -> tuple[Problems, list[str]]:
    """The images of which several rows say different things, and the lines that only say what an earlier one says."""
    import polars as pl

    kinds = {
        "y": "with more than one label",
        "attribute": "with more than one attribute",
        "split": "in more than one split",
    }
    meant = {column: [_plain(value) for value in columns[column]] for column in kinds} | {"split": split_of}
    table = pl.DataFrame({**meant, "file": [os.path.normpath(path) for path in columns["path"]]}).with_row_index(
        "place"
    )
    problems = {}
    for column, what in kinds.items():
        lines = [f"line {row}: {value!r}" for row, value in zip(columns["row"], columns[column], strict=True)]
        first_of_each = table.unique(["file", column], keep="first", maintain_order=True)
        by_file = first_of_each.group_by("file", maintain_order=True).agg("place")["place"].to_list()
        problems[f"images {what}"] = [
            f"{columns['path'][places[0]]} ({first_of([lines[place] for place in places], 3)})"
            for places in by_file
            if len(places) > 1
        ]
    again = table.filter(~pl.struct(pl.exclude("place")).is_first_distinct())["place"]
    return problems, [f"line {columns['row'][place]}" for place in again]


def _check_files(folder: Path, columns: Mapping[str, Sequence[str]], verify: bool, workers: int) -> Problems:
    """The files that are missing or cannot be read, as images only with `verify`; says how far it is with many."""
    rows = list(zip(columns["row"], columns["path"], strict=True))
    faults: list[tuple[str, str] | None] = []
    # Pillow decodes outside the interpreter's lock: threads are as fast as processes, which take seconds to start.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            faults += pool.map(functools.partial(_fault, folder, verify), rows[start : start + _AT_ONCE])
            if verify and len(rows) > _AT_ONCE:
                sys.stderr.write(f"checking images: {len(faults)} of {len(rows)}\n")
    return _grouped(filter(None, faults))


def _fault(folder: Path, verify: bool, image: tuple[str, str]) -> tuple[str, str] | None:
    """What is wrong with the file of an image (line, path), and which image that is."""
    row, path = image
    if os.path.isfile(folder / path):
        fault = fault_of(folder / path) if verify else ""
        return ("files that are no readable images", f"line {row}: {path} ({fault})") if fault else None
    try:
        os.lstat(folder / path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # the system does not even look for it: a name that is too long, a folder that is closed
        why = error.strerror or str(error)
        return "images whose path or folder cannot be read", f"{path} (line {row}: {why})"
    return f"images missing in {folder}", f"line {row}: {path}"
