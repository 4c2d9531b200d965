"""The readers: where the tables and images of Waterbirds, CelebA and any other folder lie, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from neuronsurgery.study.readers.assembly import SPLIT_NAMES, SPLITS, assemble
from neuronsurgery.study.readers.disk import ImageData, Loading
from neuronsurgery.study.readers.pixels import Framing
from neuronsurgery.study.readers.tables import first_of, raise_for, read_columns, unreadable

PathLike: TypeAlias = str | os.PathLike[str]
IN_THIS_PROCESS: Final = Loading()


def middle(size: int = 224) -> Framing:
    """The middle of an image, resized a seventh larger than `size` before: 256 x 256 for 224."""
    return Framing((("resize", int(size * 256 / 224)), ("crop", size)))


def waterbirds(
    root: PathLike, *, size: int = 224, loading: Loading = IN_THIS_PROCESS, verify: bool = True
) -> ImageData:
    """The Waterbirds data set of a folder, as group_DRO, WILDS or SubpopBench lay it out.

    The folder, or one a step or two below (`waterbird_complete95_forest2water2`, `waterbirds_v1.0`, `waterbirds`), has
    `metadata.csv` (`img_id,img_filename,y,split,place,place_filename`), or `metadata_waterbirds.csv`
    (`id,filename,split,y,a`), which may lie above the images. Evaluated at 256 x 256, cropped to 224; with another
    `size` the resizing grows, too. Arguments and errors are those of `image_folder`.
    """
    below = ("waterbird_complete95_forest2water2", "waterbirds_v*", "waterbirds", "waterbirds/waterbird_complete95_*")
    source = _find("Waterbirds", root, ("metadata.csv", "metadata_waterbirds.csv"), below)
    aliases = {"path": ("img_filename", "filename"), "y": ("y",), "attribute": ("place", "a"), "split": ("split",)}
    columns = read_columns(source, aliases)
    return assemble(
        source,
        _image_folder(source.parent, below, columns["path"]),
        columns,
        name="waterbirds",
        known=(["landbird", "waterbird"], ["land", "water"]),
        group_name="{} on {}".format,
        framing=middle(size),
        loading=loading,
        verify=verify,
    )


def celeba(root: PathLike, *, size: int = 224, loading: Loading = IN_THIS_PROCESS, verify: bool = True) -> ImageData:
    """The CelebA data set of a folder, blond hair or not against man or woman, in any of the forms in use.

    The folder, or one below (`data`, `celebA_v1.0`, `celeba`, `Anno`), has `list_attr_celeba` and
    `list_eval_partition` as `.csv` or `.txt`, separated by commas or blanks whatever they are called; or one merged
    table, `metadata.csv`, `celeba_metadata.csv` or `metadata_celeba.csv`, with the columns `img_filename` (`filename`,
    `image_id`), `y` (`Blond_Hair`), `place` (`a`, `Male`), `split` (`partition`). Attributes are -1/1 or 0/1. Images
    are in `img_align_celeba`, once or twice nested, or beside the table. Evaluated cropped to 178 x 178, then resized.
    Arguments and errors are those of `image_folder`.
    """
    source, columns = _read_celeba_tables(root)
    around = [f"{above}img_align_celeba" for above in ("celeba/", "img_align_celeba/", "", "../", "../Img/")]
    return assemble(
        source,
        _image_folder(source.parent, around, columns["path"]),
        columns,
        name="celeba",
        known=(["non-blond", "blond"], ["woman", "man"]),
        group_name="{} {}".format,
        framing=Framing((("crop", 178), ("resize", size))),
        loading=loading,
        verify=verify,
    )


_CELEBA_COLUMNS: Final[Mapping[str, Sequence[str]]] = {
    "path": ("img_filename", "filename", "image_id"),
    "y": ("y", "Blond_Hair"),
    "attribute": ("place", "a", "Male"),
    "split": ("split", "partition"),
}


def _read_celeba_tables(root: PathLike) -> tuple[Path, dict[str, list[str]]]:
    """The table that names the images, and the columns for `assemble`."""
    below = ("data", "celebA_v*", "celeba", "celebA", "CelebA", "Anno", "celeba/data", "img_align_celeba")
    merged = ("metadata.csv", "celeba_metadata.csv", "metadata_celeba.csv")
    source = _find("CelebA", root, ("list_attr_celeba.csv", "list_attr_celeba.txt", *merged), below)
    if source.name in merged:
        return source, read_columns(source, _CELEBA_COLUMNS)
    beside = source.parent
    splits = [
        folder / f"list_eval_partition.{end}" for folder in (beside, beside.parent / "Eval") for end in ("csv", "txt")
    ]
    table = next(filter(Path.is_file, [*splits, *(beside / name for name in merged)]), None)
    if table is None:
        raise FileNotFoundError(
            f"{source}: expected list_eval_partition.csv or .txt beside it, found neither: without it there are no "
            f"splits"
        )
    return (source, _join(source, table)) if table in splits else (table, read_columns(table, _CELEBA_COLUMNS))


def _join(attributes: Path, partition: Path) -> dict[str, list[str]]:
    """The columns for `assemble`, from the table of attributes and that of splits, by the names of the images."""
    aliases = dict(_CELEBA_COLUMNS)
    split = {"path": aliases["path"], "split": aliases.pop("split")}
    columns = read_columns(attributes, aliases)
    places = read_columns(partition, split, header=("image_id", "partition"))
    split_of = dict(zip(places["path"], places["split"], strict=True))
    known = set(columns["path"])
    raise_for(
        attributes,
        {
            f"images without a split in {partition.name}": [name for name in columns["path"] if name not in split_of],
            f"images of {partition.name} without attributes": [name for name in split_of if name not in known],
            f"images in more than one split in {partition.name}": [
                name for name, value in zip(places["path"], places["split"], strict=True) if split_of[name] != value
            ],
        },
    )
    return {**columns, "split": [split_of[name] for name in columns["path"]]}


def image_folder(
    root: PathLike,
    table: PathLike = "metadata.csv",
    *,
    path: str = "path",
    label: str = "label",
    attribute: str = "attribute",
    split: str = "split",
    splits: Mapping[str, str] = SPLIT_NAMES,
    name: str = "folder",
    size: int = 224,
    framing: Framing | None = None,
    loading: Loading = IN_THIS_PROCESS,
    verify: bool = True,
) -> ImageData:
    """The data set of any folder of images with a table, such as CXR-14 with pneumothorax against chest drain.

    Classes and attributes are in ascending order of their values, counted over the whole table. Groups, in the order of
    `y * attributes + a`, are called "label=value attribute=value", after the columns; combinations that no image of any
    split has are no groups. Rows that repeat others are taken as they are, with one warning that counts them.

    Args:
        root: the folder; paths in the table are relative to it, or absolute.
        table: its CSV file, with a header, relative to `root`; separated by commas, semicolons, tabs or blanks.
        path: the column of the images' paths.
        label: the column of the classes: whole numbers or words, at most 100 different ones.
        attribute: the column of the spurious attribute, the same.
        split: the column of the splits.
        splits: what that column says, in any case, to "train", "validation" or "test".
        name: what to call the data set.
        size: height and width that the network takes, where no framing is given.
        framing: how images are brought to size for evaluation; training crops have the same size. None: `middle(size)`.
        loading: how images are fetched.
        verify: decode every image now, so that a broken one is no surprise in training.

    Raises:
        FileNotFoundError: if there is no such folder or table.
        ValueError: if `splits` leads elsewhere, or the table or the images are not as they should be; lists all that is
            wrong.
        OSError: if the folder or the table cannot be read.
    """
    others = sorted(set(splits.values()) - set(SPLITS))
    if others:
        raise ValueError(f"image_folder: splits must lead to {', '.join(SPLITS)}, found {', '.join(others)}")
    source = _find(name, root, (os.fspath(table),), ())
    aliases = {"path": (path,), "y": (label,), "attribute": (attribute,), "split": (split,)}
    return assemble(
        source,
        Path(root),
        read_columns(source, aliases),
        name=name,
        group_name=lambda value, other: f"{label}={value} {attribute}={other}",
        framing=middle(size) if framing is None else framing,
        loading=loading,
        verify=verify,
        splits=splits,
    )


READERS: Final[Mapping[str, Callable[..., ImageData]]] = {
    "waterbirds": waterbirds,
    "celeba": celeba,
    "folder": image_folder,
}


def _find(what: str, root: PathLike, names: Sequence[str], below: Sequence[str]) -> Path:
    """The first table of those names in `root`, or else in the folders below it that match the patterns."""
    root = Path(root)
    if not os.path.isdir(root):
        said = "is a file, no folder" if os.path.lexists(root) else "no such folder"
        raise FileNotFoundError(f"{root}: {said}: name the folder that the data set is in")
    for folder in [root, *(match for pattern in below for match in sorted(root.glob(pattern)))]:
        for name in names:
            if os.path.isfile(folder / name):
                return folder / name
    try:
        inside = sorted(name + "/" * os.path.isdir(root / name) for name in os.listdir(root))
    except OSError as error:
        raise unreadable(root, error) from error
    places = f"there or in {', '.join(below)}" if below else "there"
    raise FileNotFoundError(
        f"{root} has no table of {what}: expected {' or '.join(names)} {places}, found "
        f"{first_of(inside) or 'nothing'}: name the folder that has it"
    )


def _image_folder(beside: Path, patterns: Sequence[str], paths: Sequence[str]) -> Path:
    """The folder, near a table, that has any of the first hundred images; the first that there is, if none has."""
    found = [match for pattern in patterns for match in sorted(beside.glob(pattern)) if match.is_dir()]
    folders = [*found, beside]
    has_some = (folder for folder in folders if any(os.path.isfile(folder / path) for path in paths[:100]))
    return next(has_some, folders[0])
