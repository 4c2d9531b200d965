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
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from neuronsurgery.study import readers
from neuronsurgery.study.readers.assembly import encode_values
from neuronsurgery.study.readers.disk import ImageSplit, Loading
from neuronsurgery.study.readers.pixels import Framing, fault_of, read_image
from neuronsurgery.study.readers.tables import raise_for, read_columns, whole_number

IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
SIDE: Final = 96
"""Pixels of a picture on the page."""


@runtime_checkable
class Examples(Protocol):
    """Examples with a class each, in an order of their own."""

    @property
    def names(self) -> Sequence[str]:
        """The name of each example: a path, or its place."""

    @property
    def targets(self) -> Tensor:
        """The class of each, int64 (N,)."""

    @property
    def groups(self) -> Tensor | None:
        """The group of each, int64 (N,), or None where nobody knows groups."""

    @property
    def class_names(self) -> Sequence[str]:
        """What class 0, 1, ... is called."""

    @property
    def group_names(self) -> Sequence[str]:
        """What group 0, 1, ... is called; none without groups."""

    @property
    def digest(self) -> str:
        """16 hex digits that change with the examples."""

    def batches(self, places: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Return a re-iterable of (inputs, targets) of the examples in some places, int64, in that order."""

    def shown(self, place: int) -> str:
        """Return an example as HTML: a picture, or its text."""


@dataclass(frozen=True, eq=False)
class _Pairs:
    """A re-iterable of the first two parts of each batch of another one."""

    loader: Iterable[Any]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.loader:
            yield batch[0], batch[1]


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files: see `Examples`."""

    split: ImageSplit
    class_names: Sequence[str]
    group_names: Sequence[str] = ()

    @property
    def names(self) -> Sequence[str]:
        """The paths, relative to the folder."""
        return self.split.paths

    @property
    def targets(self) -> Tensor:
        """The classes."""
        return self.split.targets

    @property
    def groups(self) -> Tensor | None:
        """The groups, if they have names."""
        return self.split.groups if self.group_names else None

    @property
    def digest(self) -> str:
        """Of paths, classes, groups, framing and the files' sizes."""
        said = hashlib.sha256(self.split.digest.encode())
        for path in self.split.paths:
            said.update(f"{(self.split.folder / path).stat().st_size}\n".encode())
        return said.hexdigest()[:16]

    def batches(self, places: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Return (images, targets) of some places: float32 (B, 3, H, W), int64 (B,)."""
        return _Pairs(readers.batches(self.split.subset(places), size))

    def shown(self, place: int) -> str:
        """Return the image, small."""
        image = read_image(self.split.folder / self.split.paths[place])
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        name = escape(Path(self.split.paths[place]).name, quote=True)
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{name}">'


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts of a table, all brought to one length: see `Examples`."""

    names: Sequence[str]
    texts: Sequence[str]
    targets: Tensor
    groups: Tensor | None
    class_names: Sequence[str]
    group_names: Sequence[str]
    encode: Callable[[Sequence[str]], Mapping[str, Tensor]]

    @property
    def digest(self) -> str:
        """Of texts, classes and groups."""
        groups = [] if self.groups is None else self.groups.tolist()
        return hashlib.sha256(repr((self.texts, self.targets.tolist(), groups)).encode()).hexdigest()[:16]

    def batches(self, places: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Return (what the tokenizer makes of the texts, targets) of some places."""
        parts = [places[start : start + size] for start in range(0, len(places), size)]
        return _Made([functools.partial(self._batch, part) for part in parts])

    def _batch(self, places: Tensor) -> tuple[Any, Tensor]:
        return dict(self.encode([self.texts[place] for place in places.tolist()])), self.targets[places]

    def shown(self, place: int) -> str:
        """Return the text, cut where it is long."""
        text = self.texts[place]
        return f"<p>{escape(text[:400])}{'...' if len(text) > 400 else ''}</p>"


@dataclass(frozen=True, eq=False)
class _Made:
    """A re-iterable of batches that are made when they are asked for."""

    make: Sequence[Callable[[], Any]]

    def __iter__(self) -> Iterator[Any]:
        for make in self.make:
            yield make()


class Loaded:
    """The batches of a loader that gives the same ones each time: see `Examples`.

    Args:
        loader: a re-iterable of (inputs, targets) or (inputs, targets, groups), inputs a tensor or a mapping of them.
        class_names: of class 0, 1, ...; None: the numbers.
        group_names: of group 0, 1, ...; None: the numbers.
        names: of each example; None: its place.

    Raises:
        ValueError: if there is no batch, or the names are not as many as the examples.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        class_names: Sequence[str] | None = None,
        group_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._loader = loader
        parts = [(batch[1], batch[2] if len(batch) > 2 else None) for batch in loader]
        if not parts:
            raise ValueError("audit: the loader has no batch: give images, or a loader that can be iterated again")
        self.targets = torch.cat([torch.as_tensor(targets) for targets, _ in parts]).long()
        known = all(groups is not None for _, groups in parts)
        self.groups = torch.cat([torch.as_tensor(groups) for _, groups in parts]).long() if known else None
        count = len(self.targets)
        self.names = [str(place) for place in range(count)] if names is None else list(names)
        if len(self.names) != count:
            raise ValueError(f"audit: {len(self.names)} names for {count} examples: one each, in the loader's order")
        self.class_names = class_names or [str(number) for number in range(int(self.targets.max()) + 1)]
        numbers = [] if self.groups is None else range(int(self.groups.max()) + 1)
        self.group_names = group_names or [f"group {number}" for number in numbers]
        self.digest = hashlib.sha256(repr((self.targets.tolist(), self.names)).encode()).hexdigest()[:16]

    def batches(self, places: Tensor, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Return (inputs, targets) of some places, ascending, in the batches that the loader has them in."""
        return _Chosen(self._loader, places)

    def shown(self, place: int) -> str:
        """Return the name."""
        return f"<p>{escape(self.names[place])}</p>"


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Some examples of a loader, by their places."""

    loader: Iterable[Any]
    places: Tensor

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        begin = 0
        for inputs, targets, *_ in self.loader:
            own = self.places[(self.places >= begin) & (self.places < begin + len(targets))] - begin
            begin += len(targets)
            if len(own):
                picked = {k: v[own] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[own]
                yield picked, torch.as_tensor(targets)[own]


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
        wanted = {"path": (self.path,), "label": (self.label,)}
        wanted |= {} if self.group is None else {"group": (self.group,)}
        wanted |= {} if self.split is None else {"split": (self.split[0],)}
        found = read_columns(self.file, wanted)
        if self.split is None:
            return found
        names = {readers.assembly.SPLIT_NAMES.get(value.lower(), value) for value in {self.split[1]}}
        splits = [readers.assembly.SPLIT_NAMES.get(value.lower(), value) for value in found["split"]]
        kept = [place for place, value in enumerate(splits) if value in names]
        if not kept:
            said = ", ".join(sorted(set(found["split"]))[:10])
            raise ValueError(f"{self.file}: no row has the split {self.split[1]!r}: its splits are {said}")
        return {name: [values[place] for place in kept] for name, values in found.items()}


def from_table(
    root: Path, table: Table, framing: Framing, loading: Loading, class_names: Sequence[str] | None
) -> ImageFiles:
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
    targets, names, wrong = classes_of(columns["label"], where, class_names)
    groups, group_names, wrong_groups = groups_of(columns.get("group"), table, targets, names, where)
    faults = _faults(root, columns["path"], where)
    raise_for(table.file, {**wrong, **wrong_groups, **faults})
    split = ImageSplit(root, tuple(columns["path"]), targets, groups, max(1, len(group_names)), framing, loading)
    return ImageFiles(split, names, group_names)


def from_folders(root: Path, framing: Framing, loading: Loading, class_names: Sequence[str] | None) -> ImageFiles:
    """Return the images of a folder with one subfolder per class, in the order of their paths.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no two subfolders with images, or an image cannot be read; lists all that is wrong.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder: pass --root, the folder of the images")
    found = [
        (folder.name, str(file.relative_to(root)))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if len({name for name, _ in found}) < 2:
        raise ValueError(
            f"{root} has no two subfolders with images: pass a folder with one subfolder per class, or --table"
        )
    paths = [path for _, path in found]
    targets, names, wrong = classes_of([name for name, _ in found], paths, class_names)
    raise_for(root, {**wrong, **_faults(root, paths, paths)})
    split = ImageSplit(root, tuple(paths), targets, torch.zeros_like(targets), 1, framing, loading)
    return ImageFiles(split, names)


def from_texts(
    table: Table, encode: Callable[[Sequence[str]], Mapping[str, Tensor]], class_names: Sequence[str] | None
) -> Texts:
    """Return the texts that a table lists.

    Raises:
        ValueError: if anything is not as it should be; lists all that is wrong.
    """
    columns = table.columns()
    where = [f"line {row}" for row in columns["row"]]
    targets, names, wrong = classes_of(columns["label"], where, class_names)
    groups, group_names, wrong_groups = groups_of(columns.get("group"), table, targets, names, where)
    raise_for(table.file, {**wrong, **wrong_groups})
    own = groups if group_names else None
    return Texts(where, columns["path"], targets, own, names, group_names, encode)


def classes_of(
    values: Sequence[str], where: Sequence[str], class_names: Sequence[str] | None
) -> tuple[Tensor, list[str], dict[str, list[str]]]:
    """Return the class of each example, the names of the classes, and what is wrong.

    Whole numbers are the classes themselves. Words are looked up among the model's names, if it has any, and else
    numbered in the order of the alphabet.
    """
    numbers = [whole_number(value) for value in values]
    known = {name: number for number, name in enumerate(class_names or ())}
    if known and all(value in known for value in values):
        return torch.tensor([known[value] for value in values]), list(class_names or ()), {}
    if all(number is not None for number in numbers):
        low = [place for place, number in zip(where, numbers, strict=True) if number is not None and number < 0]
        count = max([number for number in numbers if number is not None], default=0) + 1
        names = list(class_names or ()) or [str(number) for number in range(count)]
        return torch.tensor([number or 0 for number in numbers]), names, {"images of a class below 0": low}
    if known:
        other = [f"{place} ({value!r})" for place, value in zip(where, values, strict=True) if value not in known]
        return torch.zeros(len(values), dtype=torch.int64), [], {"classes that the model does not know": other}
    codes, names, wrong = encode_values(values, "label", where)
    return torch.tensor(codes), names, {what: list(those) for what, those in wrong.items()}


def groups_of(
    values: Sequence[str] | None, table: Table, targets: Tensor, class_names: Sequence[str], where: Sequence[str]
) -> tuple[Tensor, list[str], dict[str, list[str]]]:
    """Return the group of each example (0 where there are none), the names of the groups, and what is wrong.

    A value that several classes have is an attribute: then the groups are class x attribute.
    """
    if values is None:
        return torch.zeros(len(where), dtype=torch.int64), [], {}
    codes, names, wrong = encode_values(values, "group", where)
    named = [f"{table.group}={name}" if whole_number(name) is not None else name for name in names]
    groups = torch.tensor(codes)
    pairs = sorted(set(zip(targets.tolist(), codes, strict=True)))
    if len(pairs) > len(names) and class_names:
        number = {pair: place for place, pair in enumerate(pairs)}
        groups = torch.tensor([number[pair] for pair in zip(targets.tolist(), codes, strict=True)])
        named = [f"{_class_name(class_names, target, table.label)}, {named[code]}" for target, code in pairs]
    return groups, named, {what: list(those) for what, those in wrong.items()}


def _class_name(names: Sequence[str], target: int, column: str) -> str:
    name = names[target] if target < len(names) else str(target)
    return f"{column}={name}" if whole_number(name) is not None else name


def _faults(root: Path, paths: Sequence[str], where: Sequence[str]) -> dict[str, list[str]]:
    """Return the images that are missing or cannot be read."""
    missing, broken = [], []
    for path, name in zip(paths, where, strict=True):
        if not (root / path).is_file():
            missing.append(name)
        elif fault := fault_of(root / path):
            broken.append(f"{name} ({fault})")
    return {"images that are missing": missing, "images that cannot be read": broken}
