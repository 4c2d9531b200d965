"""What an audit looks at: images in files, texts of a table, or the batches of a loader, each example by its place."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from neuronsurgery.study import readers
from neuronsurgery.study.readers import SPLIT_NAMES, Framing, ImageSplit, Loading
from neuronsurgery.study.readers.assembly import encode_values
from neuronsurgery.study.readers.pixels import fault_of, read_image
from neuronsurgery.study.readers.tables import Problems, raise_for, read_columns, whole_number

IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
SIDE: Final = 96
"""Pixels of a picture on the page."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples with a class each, in an order of their own.

    Attributes:
        names: the name of each: a path, a line of a table, or its place.
        targets: the class of each, int64 (N,).
        groups: the group of each, int64 (N,), or None where nobody knows groups.
        class_names: what class 0, 1, ... is called.
        group_names: what group 0, 1, ... is called; none without groups.
        read: (places, size) -> (inputs, targets) of the examples in some places, int64, in that order, by the batch.
        shown: place -> the example as HTML, a picture or its text.
        content: what the examples depend on beside names, classes and groups.
    """

    names: Sequence[str]
    targets: Tensor
    groups: Tensor | None
    class_names: Sequence[str]
    group_names: Sequence[str]
    read: Callable[[Tensor, int], Iterator[tuple[Any, Tensor]]]
    shown: Callable[[int], str]
    content: Any = None

    def batches(self, places: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Return what `read` yields as a re-iterable."""
        return _Again(functools.partial(self.read, places, size))

    @property
    def digest(self) -> str:
        """16 hex digits that change with the examples."""
        groups = None if self.groups is None else self.groups.tolist()
        said = repr((list(self.names), self.targets.tolist(), groups, self.content))
        return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Again:
    """A re-iterable of what a function yields."""

    read: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def from_loader(
    loader: Iterable[Any],
    class_names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Examples:
    """Return the examples of a loader that gives the same batches each time.

    Args:
        loader: a re-iterable of (inputs, targets) or (inputs, targets, groups), inputs a tensor or a mapping of them.
        class_names: of class 0, 1, ...; None: the numbers.
        group_names: of group 0, 1, ...; None: the numbers.
        names: of each example; None: its place.

    Raises:
        ValueError: if there is no batch, or the names are not as many as the examples.
    """
    parts = [(torch.as_tensor(batch[1]), *map(torch.as_tensor, batch[2:3])) for batch in loader]
    if not parts:
        raise ValueError("audit: the loader has no batch: give images, or a loader that can be iterated again")
    targets = torch.cat([part[0] for part in parts]).long()
    groups = torch.cat([part[1] for part in parts]).long() if all(len(part) == 2 for part in parts) else None
    called = names or [str(place) for place in range(len(targets))]
    if len(called) != len(targets):
        raise ValueError(f"audit: {len(called)} names for {len(targets)} examples: one each, in the loader's order")
    class_names = class_names or [str(number) for number in range(int(targets.max()) + 1)]
    numbers = range(0 if groups is None else int(groups.max()) + 1)
    group_names = group_names or [f"group {number}" for number in numbers]

    def read(places: Tensor, size: int) -> Iterator[tuple[Any, Tensor]]:
        begin = 0
        for inputs, targets, *_ in loader:
            own = places[(places >= begin) & (places < begin + len(targets))] - begin
            begin += len(targets)
            if len(own):
                yield picked((inputs, torch.as_tensor(targets)), own)

    def shown(place: int) -> str:
        return f"<p>{escape(called[place])}</p>"

    return Examples(called, targets, groups, class_names, group_names, read, shown)


def picked(batch: tuple[Any, Tensor], which: Any) -> tuple[Any, Tensor]:
    """Return some examples of a batch, whose inputs are a tensor or a mapping of tensors."""
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return {name: tensor[which] for name, tensor in inputs.items()}, targets[which]
    return inputs[which], targets[which]


# From tables and folders


@dataclass(frozen=True)
class Table:
    """Which rows and columns of a table are meant.

    Attributes:
        file: the CSV file.
        label: the column of the class.
        path: the column of the images' paths, or of the texts.
        group: the column of the group, or None.
        split: (column, value) of the rows to take, or None for all.
    """

    file: Path
    label: str
    path: str
    group: str | None = None
    split: tuple[str, str] | None = None

    def columns(self) -> dict[str, list[str]]:
        """Return the chosen columns of the chosen rows, with the line that each begins in as "row".

        Raises:
            ValueError: if the table cannot be read, lacks a column, or has no row of the split; lists what is wrong.
        """
        wanted = {"path": self.path, "label": self.label, "group": self.group, "split": self.split and self.split[0]}
        found = read_columns(self.file, {name: (column,) for name, column in wanted.items() if column is not None})
        if self.split is None:
            return found
        meant, *splits = [SPLIT_NAMES.get(value.lower(), value) for value in (self.split[1], *found["split"])]
        kept = [place for place, split in enumerate(splits) if split == meant]
        if not kept:
            said = ", ".join(sorted(set(found["split"]))[:10])
            raise ValueError(f"{self.file}: no row has the split {self.split[1]!r}: its splits are {said}")
        return {name: [values[place] for place in kept] for name, values in found.items()}


def from_table(
    root: Path, table: Table, framing: Framing, loading: Loading, class_names: Sequence[str] | None
) -> Examples:
    """Return the images that a table lists, checked: every class known, every file there and readable.

    Args:
        root: what the paths are relative to.
        table: which rows and columns.
        framing: how images are brought to size.
        loading: how they are fetched.
        class_names: what the model calls its classes, or None.

    Raises:
        ValueError: if anything is not as it should be; lists all that is wrong.
    """
    columns = table.columns()
    where = [f"line {row}: {path}" for row, path in zip(columns["row"], columns["path"], strict=True)]
    return _images(root, table, columns, where, framing, loading, class_names)


def from_folders(root: Path, framing: Framing, loading: Loading, class_names: Sequence[str] | None) -> Examples:
    """Return the images of a folder with one subfolder per class, in the order of their paths.

    Raises:
        ValueError: if it has no two subfolders with images, or an image cannot be read; lists all that is wrong.
    """
    files = [file for file in sorted(root.glob("*/**/*")) if file.suffix.lower() in IMAGES]
    paths = [file.relative_to(root) for file in files]
    columns = {"label": [path.parts[0] for path in paths], "path": [str(path) for path in paths]}
    if len(set(columns["label"])) < 2:
        raise ValueError(
            f"{root} has no two subfolders with images: pass a folder with one subfolder per class, or --table"
        )
    return _images(root, Table(root, "label", "path"), columns, columns["path"], framing, loading, class_names)


def _images(
    root: Path,
    table: Table,
    columns: Mapping[str, list[str]],
    where: Sequence[str],
    framing: Framing,
    loading: Loading,
    class_names: Sequence[str] | None,
) -> Examples:
    """Return images whose paths and labels are known, and what an error calls each."""
    paths = columns["path"]
    missing, broken = [], []
    for path, name in zip(paths, where, strict=True):
        if not (root / path).is_file():
            missing.append(name)
        elif fault := fault_of(root / path):
            broken.append(f"{name} ({fault})")
    faults = {"images that are missing": missing, "images that cannot be read": broken}
    known = _known(table, columns, where, class_names, faults)
    targets = known["targets"]
    split = ImageSplit(root, tuple(paths), targets, torch.zeros_like(targets), 1, framing, loading)

    def read(places: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, _ in readers.batches(split.subset(places), size):
            yield images, targets

    def shown(place: int) -> str:
        image, file = read_image(root / paths[place]), io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.save(file, "JPEG", quality=80)
        name = escape(Path(paths[place]).name, quote=True)
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{name}">'

    sizes = [(root / path).stat().st_size for path in paths]
    return Examples(paths, **known, read=read, shown=shown, content=(framing, sizes))


def from_texts(
    table: Table, encode: Callable[[list[str]], Mapping[str, Tensor]], class_names: Sequence[str] | None
) -> Examples:
    """Return the texts that a table lists.

    Args:
        table: which rows and columns.
        encode: texts -> what the network takes, tensors by name, all of one length.
        class_names: what the model calls its classes, or None.

    Raises:
        ValueError: if anything is not as it should be; lists all that is wrong.
    """
    columns = table.columns()
    where, texts = [f"line {row}" for row in columns["row"]], columns["path"]
    known = _known(table, columns, where, class_names, {})
    targets = known["targets"]

    def read(places: Tensor, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for part in torch.split(places, size):
            yield dict(encode([texts[place] for place in part.tolist()])), targets[part]

    def shown(place: int) -> str:
        return f"<p>{escape(texts[place][:400])}{'...' if len(texts[place]) > 400 else ''}</p>"

    return Examples(where, **known, read=read, shown=shown, content=texts)


def _known(
    table: Table,
    columns: Mapping[str, list[str]],
    where: Sequence[str],
    class_names: Sequence[str] | None,
    faults: Problems,
) -> dict[str, Any]:
    """Return classes and groups of examples and their names; a ValueError lists all that is wrong, `faults` among it.

    A value of a group that several classes have is an attribute: then the groups are class x attribute.
    """
    targets, names, wrong = _classes(columns["label"], where, class_names)
    codes, values, wrong_groups = (
        encode_values(columns["group"], "group", where) if "group" in columns else ([], [], {})
    )
    raise_for(table.file, {**wrong, **wrong_groups, **faults})
    known: dict[str, Any] = {"targets": torch.tensor(targets), "groups": None, "class_names": names, "group_names": []}
    if "group" not in columns:
        return known
    named = [_named(str(table.group), value) for value in values]
    pairs = sorted(set(zip(targets, codes, strict=True)))
    if len(pairs) > len(values):
        number = {pair: place for place, pair in enumerate(pairs)}
        codes = [number[pair] for pair in zip(targets, codes, strict=True)]
        called = {target: names[target] if target < len(names) else str(target) for target in targets}
        named = [f"{_named(table.label, called[target])}, {named[code]}" for target, code in pairs]
    return {**known, "groups": torch.tensor(codes), "group_names": named}


def _named(column: str, value: str) -> str:
    """A value as the name of a group, with its column where it is a mere number."""
    return value if whole_number(value) is None else f"{column}={value}"


def _classes(
    values: Sequence[str], where: Sequence[str], class_names: Sequence[str] | None
) -> tuple[list[int], list[str], Problems]:
    """Return the class of each example, the names of the classes, and what is wrong.

    Words are looked up among the model's names, if it has any, and else numbered in the order of the alphabet. Whole
    numbers are the classes themselves.
    """
    known = {name: number for number, name in enumerate(class_names or ())}
    numbers = [number for number in map(whole_number, values) if number is not None]
    if known and known.keys() >= set(values):
        return [known[value] for value in values], list(class_names or ()), {}
    if len(numbers) == len(values):
        low = [place for place, number in zip(where, numbers, strict=True) if number < 0]
        names = list(class_names or ()) or [str(number) for number in range(max(numbers, default=0) + 1)]
        return numbers, names, {"images of a class below 0": low}
    if known:
        other = [f"{place} ({value!r})" for place, value in zip(where, values, strict=True) if value not in known]
        return [], [], {"classes that the model does not know": other}
    return encode_values(values, "label", where)
