"""Real data sets from disk: Waterbirds, CelebA, the WILDS folders of both, and any folder of images with a table.

A reader looks at the tables and at the names of the files, and stops with one error that lists all that is wrong:
nothing is trained on half a data set. Images are read when a batch asks for them.

`ImageData` and `ImageSplit` stand where `data.DataSet` and `data.Split` stand, and `batches` here takes either split.
Needs torchvision and Pillow (the extra `[study]`), which are imported when a reader is called.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neuronsurgery.study import data
from neuronsurgery.study.data import Augmentation, Batches, Counts, DataSet, Split, permutation, raw_bits
from neuronsurgery.study.training import Embedded

if TYPE_CHECKING:
    from PIL.Image import Image

PathLike: TypeAlias = str | os.PathLike[str]

# Of the published data sets, as their papers and generators give them; groups in the order of `group_names`.
EXPECTED_COUNTS: Final[Mapping[str, Mapping[str, Counts]]] = MappingProxyType(
    {
        "waterbirds": MappingProxyType(
            {"train": (3498, 184, 56, 1057), "validation": (467, 466, 133, 133), "test": (2255, 2255, 642, 642)}
        ),
        "celeba": MappingProxyType(
            {
                "train": (71629, 66874, 22880, 1387),
                "validation": (8535, 8276, 2874, 182),
                "test": (9767, 7535, 2480, 180),
            }
        ),
    }
)
_ALIASES: Final = {
    "train": ("0", "train", "training"),
    "validation": ("1", "val", "valid", "validation"),
    "test": ("2", "test"),
}
SPLIT_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {name: split for split, names in _ALIASES.items() for name in names}
)
"""What a table may say, in any case, and the split that it means."""

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


# What a data set on disk is


@dataclass(frozen=True)
class Framing:
    """How an image is brought to its size for evaluation; ImageNet's normalisation follows.

    Attributes:
        steps: from first to last, ("resize", s): both sides to s pixels, the aspect not kept; or ("crop", s): the
            s x s pixels in the middle.
    """

    steps: tuple[tuple[Literal["resize", "crop"], int], ...]

    @property
    def size(self) -> int:
        """Height and width of the result."""
        return self.steps[-1][1]


@dataclass(frozen=True)
class RandomCrop:
    """How a training image varies from epoch to epoch: a random part of it, resized; ImageNet's normalisation follows.

    Attributes:
        size: height and width of the result.
        scale: smallest and largest share of the image's area, before resizing.
        ratio: smallest and largest width / height of the part, before resizing.
        flip: mirror left and right, for one image in two.
    """

    size: int = 224
    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


@dataclass(frozen=True)
class Loading:
    """How images are fetched; the batches are the same whatever it says.

    Attributes:
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: hand out pinned memory, where there is a GPU.
    """

    workers: int = 0
    pin_memory: bool = False


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """The images of one split, in the order of the table.

    Attributes:
        folder: what `paths` are relative to.
        paths: one per image.
        targets: int64 (N,), the class `y`.
        groups: int64 (N,), `y * attributes + a`.
        group_count: how many groups the whole data set has.
        framing: how images are evaluated, and trained on without an augmentation.
        loading: how they are fetched.
    """

    folder: Path
    paths: tuple[str, ...]
    targets: Tensor
    groups: Tensor
    group_count: int
    framing: Framing
    loading: Loading

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        counts = "/".join(str(count) for count in self.counts)
        return f"ImageSplit({len(self)} images of (3, {self.framing.size}, {self.framing.size}), {counts} per group)"

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images in each group."""
        return tuple(torch.bincount(self.groups, minlength=self.group_count).tolist())

    @property
    def digest(self) -> str:
        """16 hex digits that depend on paths, targets, groups and framing; not on the folder, nor on the pixels."""
        said = hashlib.sha256(repr((self.framing, self.group_count)).encode())
        for path, target, group in zip(self.paths, self.targets.tolist(), self.groups.tolist(), strict=True):
            said.update(f"{path}\0{target}\0{group}\n".encode())
        return said.hexdigest()[:16]

    def subset(self, indices: Tensor) -> ImageSplit:
        """The images at `indices` (int64, or a boolean mask of length N), as a split of their own."""
        where = torch.arange(len(self))[indices]
        paths = tuple(self.paths[index] for index in where.tolist())
        return replace(self, paths=paths, targets=self.targets[where], groups=self.groups[where])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A named data set whose images are files.

    Attributes:
        name: "waterbirds", "celeba", or what `image_folder` was told.
        class_names: what class 0, 1, ... shows.
        group_names: what group 0, 1, ... shows, such as "landbird on water".
        augmentation: what may be done to its training images.
        splits: split name to `ImageSplit`; "train", "validation" and "test" are always there, the last two perhaps
            without images.
    """

    name: str
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    augmentation: RandomCrop
    splits: Mapping[str, ImageSplit]

    def __repr__(self) -> str:
        lines = [f"ImageData {self.name!r}; groups: {', '.join(self.group_names)}"]
        return "\n".join(lines + [f"  {name}: {split!r}" for name, split in self.splits.items()])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def expected_counts(self) -> dict[str, list[int]] | None:
        """The published number of images per group, by split; None where nothing was published."""
        expected = EXPECTED_COUNTS.get(self.name)
        return None if expected is None else {split: list(counts) for split, counts in expected.items()}

    @property
    def minority(self) -> tuple[int, ...]:
        """The groups of fewer training images than half an equal share, those without any left out.

        On Waterbirds and the embedded data these are the groups in which class and attribute disagree; on CelebA it is
        the blond men alone.
        """
        counts = self.train.counts
        return tuple(group for group, count in enumerate(counts) if 0 < count < sum(counts) / len(counts) / 2)

    @property
    def train(self) -> ImageSplit:
        """The training images."""
        return self.splits["train"]

    @property
    def validation(self) -> ImageSplit:
        """The validation images."""
        return self.splits["validation"]

    @property
    def test(self) -> ImageSplit:
        """The test images."""
        return self.splits["test"]

    def loaders(self, split: str, size: int = 64) -> dict[str, ImageBatches]:
        """One loader per group of a split, by group name; groups without images are left out."""
        part = self.splits[split]
        counts = part.counts
        return {
            name: ImageBatches(part.subset(part.groups == group), size)
            for group, name in enumerate(self.group_names)
            if counts[group]
        }


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """A re-iterable of `(images, targets, groups)`: the same batches each time it is iterated. See `batches`."""

    split: ImageSplit
    size: int
    shuffle: bool = False
    augmentation: RandomCrop | None = None
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = list(range(len(self.split)))
        if self.shuffle:
            order = permutation(len(self.split), "order", self.seed, self.epoch).tolist()
        images = Images(self.split, augmentation=self.augmentation, seed=self.seed, epoch=self.epoch)
        loading = self.split.loading
        loader = DataLoader(
            images,
            batch_sampler=[order[start : start + self.size] for start in range(0, len(order), self.size)],
            num_workers=loading.workers,
            pin_memory=loading.pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # the seeds of the workers come from here, not from the global state
        )
        for batch in loader:
            yield tuple(batch)  # a DataLoader hands out lists


class Images(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The images of a split as a torch `Dataset` of `(image, target, group)`, for loaders of one's own.

    An image is float32 (3, size, size), normalised; what happens to it depends on `(seed, epoch)` and its place in the
    split alone, whatever the worker, the batch and the global random state, which is left alone.

    Args:
        split: the images.
        augmentation: how to vary them; None frames them for evaluation.
        seed: of the augmentation.
        epoch: another epoch is another augmentation.
    """

    def __init__(
        self, split: ImageSplit, *, augmentation: RandomCrop | None = None, seed: int = 0, epoch: int = 0
    ) -> None:
        self.split = split
        self.key = None if augmentation is None else ("augmentation", seed, epoch)
        chosen = evaluation_transform(split.framing) if augmentation is None else training_transform(augmentation)
        self.transform = chosen

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = _read_image(self.split.folder / self.split.paths[index])
        target, group = self.split.targets[index], self.split.groups[index]
        if self.key is None:
            return self.transform(image), target, group
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global state
            torch.default_generator.manual_seed(int(raw_bits(1, *self.key, int(index))[0]) >> 1)
            return self.transform(image), target, group


def batches(
    split: Split | ImageSplit,
    size: int = 64,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    augmentation: Augmentation | RandomCrop | None = None,
) -> Batches | ImageBatches:
    """Batches of a split, in memory or on disk, as a re-iterable with a length; the last batch may be smaller.

    Order and augmentation depend on `(seed, epoch)` alone; what happens to an image does not depend on its batch.

    Args:
        split: the images; a `data.Split` goes to `data.batches`.
        size: images per batch, at least 1.
        seed: of the shuffling and the augmentation.
        epoch: another epoch is another order and another augmentation.
        shuffle: in random order instead of that of the split.
        augmentation: how to vary the images, of the kind that belongs to the data set; None leaves them as they are.

    Returns:
        Batches of `(images, targets, groups)`: float32 (B, 3, H, W), int64 (B,), int64 (B,).

    Raises:
        ValueError: if `size` is below 1.
        TypeError: if the augmentation is of the other kind of data set.
    """
    if isinstance(split, Split) and not isinstance(augmentation, RandomCrop):
        return data.batches(split, size, seed=seed, epoch=epoch, shuffle=shuffle, augmentation=augmentation)
    if isinstance(split, Split) or isinstance(augmentation, Augmentation):
        raise TypeError(
            f"batches: found {augmentation!r} for a split of class {type(split).__name__}: pass the "
            f"`.augmentation` of the data set that the split is from"
        )
    if size < 1:
        raise ValueError(f"batches: size must be at least 1, found {size}: pass the number of images per batch")
    return ImageBatches(split, size, shuffle, augmentation, seed, epoch)


@dataclass(frozen=True, eq=False)
class FromDisk:
    """A split on disk and how its images vary from epoch to epoch, for `training.train`: a `training.Source`.

    Attributes:
        split: the training images.
        augmentation: how they vary; None frames them as for evaluation.
    """

    split: ImageSplit
    augmentation: RandomCrop | None

    def __len__(self) -> int:
        return len(self.split)

    def describe(self) -> dict[str, object]:
        """All that the batches depend on but size, seed and epoch, as JSON values; pixels only by their paths."""
        return {
            "augmentation": None if self.augmentation is None else json.loads(json.dumps(asdict(self.augmentation))),
            "images and targets": self.split.digest,
        }

    def epoch(self, size: int, seed: int, epoch: int) -> ImageBatches:
        """Batches of `(images, targets, groups)` of one epoch, as (seed, epoch) alone decide."""
        return ImageBatches(self.split, size, True, self.augmentation, seed, epoch)


def training_source(dataset: DataSet | ImageData) -> Embedded | FromDisk:
    """The training images of any data set with its own augmentation, for `training.train`."""
    if isinstance(dataset, DataSet):
        return Embedded(dataset.train, dataset.augmentation)
    return FromDisk(dataset.train, dataset.augmentation)


def describe_counts(dataset: DataSet | ImageData) -> str:
    """A table of the images per split and group, the published number beside it where it is another one.

    Args:
        dataset: any data set; those of `EXPECTED_COUNTS` are compared with it, by name.

    Returns:
        Lines of text without a newline at the end.
    """
    expected = EXPECTED_COUNTS.get(dataset.name, {})
    rows = [["images", *dataset.group_names]]
    for name, split in dataset.splits.items():
        published = expected.get(name, split.counts)
        pairs = zip(split.counts, published, strict=True)
        rows.append([name, *(str(found) if found == count else f"{found} (not {count})" for found, count in pairs)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    if expected:
        differing = [name for name in expected if dataset.splits[name].counts != expected[name]]
        said = f"other than those published in {', '.join(differing)}" if differing else "those published"
        lines.append(f"{dataset.name}: the counts are {said}")
    return "\n".join(lines)


# Images


def evaluation_transform(framing: Framing) -> Callable[[Image], Tensor]:
    """A function from a PIL image to float32 (3, size, size): framed, then normalised as for ImageNet."""
    v2 = _torchvision_transforms()
    table = {"resize": lambda size: v2.Resize((size, size)), "crop": v2.CenterCrop}
    return _compose([table[step](size) for step, size in framing.steps])


def training_transform(crop: RandomCrop) -> Callable[[Image], Tensor]:
    """A function from a PIL image to float32 (3, size, size), normalised, that draws from torch's global state."""
    v2 = _torchvision_transforms()
    steps = [v2.RandomResizedCrop((crop.size, crop.size), scale=crop.scale, ratio=crop.ratio)]
    return _compose(steps + [v2.RandomHorizontalFlip()] * crop.flip)


def _compose(steps: list[Any]) -> Callable[[Image], Tensor]:
    v2 = _torchvision_transforms()
    ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    # The plain tensor: torchvision's subclass of Tensor would go with the batch into the caller's model.
    composed: Callable[[Image], Tensor] = v2.Compose([*steps, *ends, v2.ToPureTensor()])
    return composed


def _torchvision_transforms() -> Any:
    try:
        import PIL.Image  # noqa: F401  # torchvision imports without it
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            f"images on disk need torchvision and Pillow ({error}): pip install 'neuronsurgery[study]'"
        ) from error
    return v2


def _read_image(path: Path) -> Image:
    """The image in three channels of 8 bits."""
    try:
        with _open_image(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all three for broken files
        raise ValueError(f"{path}: not a readable image ({error}): replace the file or leave out its row") from error


def _open_image(path: Path) -> Image:
    """The image with only its header read."""
    from PIL import Image

    image = Image.open(path)
    if image.mode[0] in "IF":  # convert("RGB") would clip these at 255
        image.close()
        raise ValueError(f"its pixels are of mode {image.mode}, not 8 bits per channel")
    return image


# The readers


def waterbirds(root: PathLike, *, size: int = 224, loading: Loading = Loading(), verify: bool = False) -> ImageData:
    """The Waterbirds data set of a folder, as group_DRO, WILDS or SubpopBench lay it out.

    The folder, or one a step or two below (`waterbird_complete95_forest2water2`, `waterbirds_v1.0`, `waterbirds`), has
    `metadata.csv` (`img_id,img_filename,y,split,place,place_filename`), or `metadata_waterbirds.csv`
    (`id,filename,split,y,a`), which may lie above the images. Evaluated at 256 x 256, cropped to 224.

    Args:
        root: the folder.
        size: height and width that the network takes; the resizing before the crop grows with it.
        loading: how images are fetched.
        verify: open every image's header too. The bodies are read in training only.

    Returns:
        Classes landbird and waterbird; groups as in the paper, from "landbird on land" to "waterbird on water".

    Raises:
        FileNotFoundError: if there is no such folder or no table in it.
        ValueError: if the table or the images are not as they should be; lists all that is wrong.
    """
    below = ("waterbird_complete95_forest2water2", "waterbirds_v*", "waterbirds", "waterbirds/waterbird_complete95_*")
    source = _find("Waterbirds", root, ("metadata.csv", "metadata_waterbirds.csv"), below)
    aliases = {"path": ("img_filename", "filename"), "y": ("y",), "attribute": ("place", "a"), "split": ("split",)}
    columns = _read_columns(source, aliases)
    classes, places = ("landbird", "waterbird"), ("land", "water")
    return _assemble(
        _Rows(source, _image_folder(source.parent, below, columns["path"]), **columns),
        name="waterbirds",
        encode=_encode_binary,
        describe=lambda y, a: (classes, tuple(f"{bird} on {place}" for bird in classes for place in places)),
        framing=Framing((("resize", int(size * 256 / 224)), ("crop", size))),
        loading=loading,
        verify=verify,
    )


def celeba(root: PathLike, *, size: int = 224, loading: Loading = Loading(), verify: bool = False) -> ImageData:
    """The CelebA data set of a folder, blond hair or not against man or woman, in any of the forms in use.

    The folder, or one below (`data`, `celebA_v1.0`, `celeba`, `Anno`), has `list_attr_celeba` and
    `list_eval_partition` as `.csv` or `.txt`, separated by commas or blanks whatever they are called; or one merged
    table, `metadata.csv`, `celeba_metadata.csv` or `metadata_celeba.csv`, with the columns `img_filename` (`filename`,
    `image_id`), `y` (`Blond_Hair`), `place` (`a`, `Male`), `split` (`partition`). Attributes are -1/1 or 0/1. Images
    are in `img_align_celeba`, once or twice nested, or beside the table. Evaluated cropped to 178 x 178, then resized.

    Args:
        root: the folder.
        size: height and width that the network takes.
        loading: how images are fetched.
        verify: open every image's header too. The bodies are read in training only.

    Returns:
        Classes non-blond and blond; groups as in the paper: non-blond woman, non-blond man, blond woman, blond man.

    Raises:
        FileNotFoundError: if there is no such folder or no table in it.
        ValueError: if the tables or the images are not as they should be; lists all that is wrong.
    """
    source, columns = _read_celeba_tables(Path(root))
    around = (
        "celeba/img_align_celeba",
        "img_align_celeba/img_align_celeba",
        "img_align_celeba",
        "../img_align_celeba",
        "../Img/img_align_celeba",
    )
    classes, people = ("non-blond", "blond"), ("woman", "man")
    return _assemble(
        _Rows(source, _image_folder(source.parent, around, columns["path"]), **columns),
        name="celeba",
        encode=_encode_binary,
        describe=lambda y, a: (classes, tuple(f"{hair} {person}" for hair in classes for person in people)),
        framing=Framing((("crop", 178), ("resize", size))),
        loading=loading,
        verify=verify,
    )


def _read_celeba_tables(root: Path) -> tuple[Path, dict[str, list[str]]]:
    """The table that names the images, and the columns of `_Rows`."""
    below = ("data", "celebA_v*", "celeba", "celebA", "CelebA", "Anno", "celeba/data", "img_align_celeba")
    lists = [f"list_attr_celeba.{end}" for end in ("csv", "txt")]
    merged = ("metadata.csv", "celeba_metadata.csv", "metadata_celeba.csv")
    source = _find("CelebA", root, (*lists, *merged), below)
    if source.name in merged:
        return source, _read_columns(source, _CELEBA_COLUMNS)
    folders = (source.parent, source.parent.parent / "Eval")
    partitions = [folder / f"list_eval_partition.{end}" for folder in folders for end in ("csv", "txt")]
    partition = next(filter(Path.is_file, partitions), None)
    if partition is not None:
        return source, _join_celeba(source, partition)
    with_splits = next(filter(Path.is_file, (source.parent / name for name in merged)), None)
    if with_splits is not None:
        return with_splits, _read_columns(with_splits, _CELEBA_COLUMNS)
    raise FileNotFoundError(
        f"{source}: expected list_eval_partition.csv or .txt beside it, found neither: without it there are no splits"
    )


_CELEBA_COLUMNS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "path": ("img_filename", "filename", "image_id"),
        "y": ("y", "Blond_Hair"),
        "attribute": ("place", "a", "Male"),
        "split": ("split", "partition"),
    }
)


def _join_celeba(attributes: Path, partition: Path) -> dict[str, list[str]]:
    """The columns of `_Rows`, from the table of attributes and that of splits, by the names of the images."""
    aliases = dict(_CELEBA_COLUMNS)
    split = {"path": aliases["path"], "split": aliases.pop("split")}
    columns = _read_columns(attributes, aliases)
    places = _read_columns(partition, split, header=("image_id", "partition"))
    split_of = dict(zip(places["path"], places["split"], strict=True))
    known = set(columns["path"])
    _raise_for(
        attributes,
        {
            f"images without a split in {partition.name}": [name for name in columns["path"] if name not in split_of],
            f"images of {partition.name} without attributes": [name for name in split_of if name not in known],
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
    framing: Framing = Framing((("resize", 256), ("crop", 224))),
    loading: Loading = Loading(),
    verify: bool = False,
) -> ImageData:
    """The data set of any folder of images with a table, such as CXR-14 with pneumothorax against chest drain.

    Args:
        root: the folder; paths in the table are relative to it, or absolute.
        table: its CSV file, with a header, relative to `root`; separated by commas, semicolons, tabs or blanks.
        path: the column of the images' paths.
        label: the column of the classes: whole numbers or words, at most 100 different ones.
        attribute: the column of the spurious attribute, the same.
        split: the column of the splits.
        splits: what that column says, in any case, to "train", "validation" or "test".
        name: what to call the data set.
        framing: how images are brought to size for evaluation; training crops have the same size.
        loading: how images are fetched.
        verify: open every image's header too. The bodies are read in training only.

    Returns:
        Classes and attributes in ascending order of their values, counted over the whole table; group
        `y * attributes + a` is called "label=value attribute=value", after the columns.

    Raises:
        FileNotFoundError: if there is no such folder or table.
        ValueError: if `splits` leads elsewhere, or the table or the images are not as they should be; lists all that is
            wrong.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a.png", "b.png"):
        ...     Image.new("L", (300, 300)).save(root / name)
        >>> with open(root / "chest.csv", "w") as table:
        ...     print("file,pneumothorax,drain,part", "a.png,0,no,train", "b.png,1,yes,train", sep=chr(10), file=table)
        >>> columns = dict(path="file", label="pneumothorax", attribute="drain", split="part")
        >>> chest = image_folder(root, "chest.csv", name="chest", **columns)
        >>> chest
        ImageData 'chest'; groups: pneumothorax=0 drain=no, pneumothorax=0 drain=yes, pneumothorax=1 drain=no,
        pneumothorax=1 drain=yes
          train: ImageSplit(2 images of (3, 224, 224), 1/0/0/1 per group)
          validation: ImageSplit(0 images of (3, 224, 224), 0/0/0/0 per group)
          test: ImageSplit(0 images of (3, 224, 224), 0/0/0/0 per group)
    """
    others = sorted(set(splits.values()) - set(_ALIASES))
    if others:
        raise ValueError(f"image_folder: splits must lead to {', '.join(_ALIASES)}, found {', '.join(others)}")
    source = _find(name, root, (os.fspath(table),), ())
    aliases = {"path": (path,), "y": (label,), "attribute": (attribute,), "split": (split,)}
    columns = _read_columns(source, aliases)

    def describe(y: Sequence[str], a: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(y), tuple(f"{label}={value} {attribute}={other}" for value in y for other in a)

    return _assemble(
        _Rows(source, Path(root), **columns),
        name=name,
        encode=_encode_values,
        describe=describe,
        framing=framing,
        loading=loading,
        verify=verify,
        splits=splits,
    )


READERS: Final[Mapping[str, Callable[..., ImageData]]] = MappingProxyType(
    {"waterbirds": waterbirds, "celeba": celeba, "folder": image_folder}
)


# From rows to a data set

Problems: TypeAlias = Mapping[str, Sequence[str]]
"""What is wrong, to the names of everything that is wrong in that way."""

_SHOWN: Final = 5  # names per problem in an error
_MOST_VALUES: Final = 100  # of a class or an attribute: above it is another column


@dataclass(frozen=True)
class _Rows:
    """The four columns as the table says them, one entry per image."""

    source: Path
    folder: Path
    path: list[str]
    y: list[str]
    attribute: list[str]
    split: list[str]


Encode: TypeAlias = Callable[[Sequence[str], str, Sequence[str]], tuple[list[int], list[str], Problems]]
"""(values, what they are, names of the images) -> (codes from 0, the value of each code, what is wrong)."""


def _assemble(
    rows: _Rows,
    *,
    name: str,
    encode: Encode,
    describe: Callable[[Sequence[str], Sequence[str]], tuple[tuple[str, ...], tuple[str, ...]]],
    framing: Framing,
    loading: Loading,
    verify: bool,
    splits: Mapping[str, str] = SPLIT_NAMES,
) -> ImageData:
    _torchvision_transforms()  # an error now rather than at the first batch
    y, y_values, wrong_y = encode(rows.y, "label", rows.path)
    a, a_values, wrong_a = encode(rows.attribute, "attribute", rows.path)
    split_of, wrong_splits = _name_splits(rows, splits)
    wrong_files = _check_files(rows.folder, rows.path, verify)
    _raise_for(rows.source, {**wrong_y, **wrong_a, **wrong_splits, **wrong_files})
    class_names, group_names = describe(y_values, a_values)
    targets = torch.tensor(y)
    groups = targets * len(a_values) + torch.tensor(a)
    whole = ImageSplit(rows.folder, tuple(rows.path), targets, groups, len(group_names), framing, loading)
    parts = {part: whole.subset(torch.tensor([place == part for place in split_of])) for part in _ALIASES}
    return ImageData(name, class_names, group_names, RandomCrop(framing.size), MappingProxyType(parts))


def _raise_for(source: Path, problems: Problems) -> None:
    found = {what: names for what, names in problems.items() if names}
    if not found:
        return
    lines = [f"  {what} ({len(names)}): {_first(names)}" for what, names in found.items()]
    raise ValueError(
        f"{source} cannot be used:\n" + "\n".join(lines) + "\nPut this right and run again; nothing was trained"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _whole_number(text: str) -> int | None:
    """The number that `text` is, pandas' "1.0" included, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _encode_binary(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes 0 and 1 of values 0 and 1, or -1 and 1."""
    numbers = {value: _whole_number(value) for value in set(values)}
    allowed = (-1, 1) if -1 in numbers.values() else (0, 1)
    problems = {
        f"images whose {what} is no whole number": _saying(values, names, lambda v: numbers[v] is None),
        f"images whose {what} is neither {allowed[0]} nor 1": _saying(
            values, names, lambda v: numbers[v] is not None and numbers[v] not in allowed
        ),
    }
    codes = [int(numbers[value] == 1) for value in values]
    return codes, ["0", "1"], problems


def _encode_values(values: Sequence[str], what: str, names: Sequence[str]) -> tuple[list[int], list[str], Problems]:
    """Codes 0, 1, ... of whole numbers in ascending order; of words in theirs, if any value is no number at all."""
    missing = {value for value in set(values) if value.lower() in ("", "nan")}
    given = set(values) - missing
    keys, broken = {value: value for value in given}, set()
    if all(_is_number(value) for value in given):
        broken = {value for value in given if _whole_number(value) is None}
        keys = {value: str(_whole_number(value)) for value in given - broken}
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


def _name_splits(rows: _Rows, splits: Mapping[str, str]) -> tuple[list[str], Problems]:
    """The split of each image, "" where unknown, and what is wrong."""
    splits = {name.lower(): split for name, split in splits.items()}

    def look_up(value: str) -> str:
        return splits.get(value.lower(), splits.get(str(_whole_number(value)), ""))

    meaning = {value: look_up(value) for value in set(rows.split)}
    named = [meaning[value] for value in rows.split]
    first: dict[str, str] = {}
    twice = {path: None for path, split in zip(rows.path, named, strict=True) if first.setdefault(path, split) != split}
    known = ", ".join(splits)
    problems = {
        f"images in an unknown split, known are {known}": _saying(rows.split, rows.path, lambda v: not meaning[v]),
        "images in more than one split": list(twice),
        "splits without images": [] if "train" in named else ["train"],
    }
    return named, problems


def _check_files(folder: Path, paths: Sequence[str], verify: bool) -> Problems:
    """Missing files, found by listing each directory once; unreadable headers too, with `verify`."""
    names = [os.path.split(path) for path in paths]
    listed = {parent: _list(folder / parent) for parent in {parent for parent, _ in names}}
    is_there = [name in listed[parent] for parent, name in names]
    problems = {f"images missing in {folder}": [p for p, there in zip(paths, is_there, strict=True) if not there]}
    if verify:
        present = [path for path, there in zip(paths, is_there, strict=True) if there]
        faults = [_header_fault(folder / path) for path in present]  # threads take five times as long
        broken = [f"{path} ({fault})" for path, fault in zip(present, faults, strict=True) if fault]
        problems["files that are no readable images"] = broken
    return problems


def _list(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _header_fault(path: Path) -> str:
    """What is wrong with the header of an image, or ""."""
    try:
        _open_image(path).close()
    except (OSError, SyntaxError, ValueError) as error:
        return str(error).replace(str(path), path.name) or type(error).__name__
    return ""


# Where things lie


def _find(what: str, root: PathLike, names: Sequence[str], below: Sequence[str]) -> Path:
    """The first table of those names in `root`, or else in the folders below it that match the patterns."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder: pass the one that {what} is in")
    folders = [root, *(match for pattern in below for match in sorted(root.glob(pattern)) if match.is_dir())]
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    places = f"there or in {', '.join(below)}" if below else "there"
    raise FileNotFoundError(
        f"{root}: {what} not found: expected {' or '.join(names)} {places}, found {_first(inside) or 'nothing'}: "
        f"pass the folder that has it"
    )


def _image_folder(beside: Path, patterns: Sequence[str], paths: Sequence[str]) -> Path:
    """The folder, near a table, that has any of the first hundred images; the first that there is, if none has."""
    found = [folder for pattern in patterns for folder in sorted(_glob(beside, pattern))]
    candidates = [*found, beside]
    has_some = (folder for folder in candidates if any((folder / path).is_file() for path in paths[:100]))
    return next(has_some, candidates[0])


def _glob(beside: Path, pattern: str) -> Iterator[Path]:
    """The folders that match; patterns may begin with "../"."""
    if pattern.startswith("../"):
        beside, pattern = beside.parent, pattern[3:]
    return (match for match in beside.glob(pattern) if match.is_dir())


# Tables

Lines: TypeAlias = Iterator[tuple[int, list[str]]]
"""Number and fields of each line that is not blank."""


def _read_columns(
    path: Path, aliases: Mapping[str, Sequence[str]], header: tuple[str, ...] | None = None
) -> dict[str, list[str]]:
    """The columns of a table by the names that we use; of several aliases the first that the table has.

    `header` names the columns of a table that begins with data. Only what is asked for is kept: CelebA's table has
    eight million fields.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file, found {error}: pass the table as text in UTF-8") from error
    columns, lines = _split_header(path, _split_lines(text), header)
    places = _place_columns(path, columns, aliases)
    picked: dict[str, list[str]] = {key: [] for key in places}
    ragged = []
    for number, fields in lines:
        if len(fields) != len(columns):
            ragged.append(f"line {number} ({len(fields)})")
            continue
        for key, place in places.items():
            picked[key].append(fields[place])
    _raise_for(path, {f"rows without the {len(columns)} fields of the header": ragged})
    return picked


def _split_lines(text: str) -> Lines:
    """Lines by the delimiter that the first two use most: comma, semicolon, tab, or else any blanks."""
    head = "\n".join([line for line in io.StringIO(text[:65536]) if line.strip()][:2])
    delimiter = max(",;\t", key=head.count)
    if delimiter not in head:
        return ((number, line.split()) for number, line in enumerate(io.StringIO(text), start=1) if line.strip())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = ((reader.line_num, [field.strip() for field in row]) for row in reader)
    return ((number, row) for number, row in rows if any(row))


def _split_header(path: Path, lines: Lines, header: tuple[str, ...] | None) -> tuple[tuple[str, ...], Lines]:
    """The names of the columns, and the lines that are left."""
    first = next(lines, None)
    if first is not None and len(first[1]) == 1 and first[1][0].isdigit():
        first = next(lines, None)  # CelebA's .txt begins with the number of images
    if first is not None and header is not None and _whole_number(first[1][-1]) is not None:
        return header, itertools.chain([first], lines)
    second = next(lines, None)
    if first is None or second is None:
        raise ValueError(f"{path}: the table is empty: expected a header and one row per image")
    columns = tuple(first[1])
    if len(second[1]) == len(columns) + 1:  # CelebA's .txt names the attributes and not the images
        columns = ("" if "image_id" in columns else "image_id", *columns)
    return columns, itertools.chain([second], lines)


def _place_columns(path: Path, columns: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> dict[str, int]:
    chosen = {key: next((name for name in names if name in columns), None) for key, names in aliases.items()}
    missing = [" or ".join(map(repr, aliases[key])) for key, name in chosen.items() if name is None]
    if missing:
        raise ValueError(
            f"{path}: columns missing ({len(missing)}): expected {', '.join(missing)}, found "
            f"{', '.join(map(repr, columns))}: name the columns as expected, or pass the names that they have to "
            f"image_folder"
        )
    return {key: columns.index(name) for key, name in chosen.items() if name is not None}
