"""What a data set on disk is: its splits, how batches of them are fetched, and the source that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from neuronsurgery.study import data
from neuronsurgery.study.data import Augmentation, Batches, Counts, DataSet, Split, permutation, raw_bits
from neuronsurgery.study.readers.pixels import Framing, RandomCrop, evaluation_transform, read_image, training_transform
from neuronsurgery.study.training import Embedded, digest

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
        groups: int64 (N,), `y * attributes + a`, without gaps where a data set has no image of some pair.
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

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageData:
        """The same images with their red, green and blue less `mean` and divided by `std`."""
        splits = {
            name: replace(split, framing=replace(split.framing, mean=tuple(mean), std=tuple(std)))
            for name, split in self.splits.items()
        }
        return replace(self, splits=MappingProxyType(splits))

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
            _WithFaults(images),
            batch_sampler=[order[start : start + self.size] for start in range(0, len(order), self.size)],
            num_workers=loading.workers,
            pin_memory=loading.pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # the seeds of the workers come from here, not from the global state
            collate_fn=_collate,
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield tuple(batch)  # a DataLoader hands out lists


class _WithFaults(Dataset[Any]):
    """Images, and in place of one that cannot be read its error.

    Raised in a worker, the error would come as the text of a traceback.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor] | ValueError:
        try:
            return self.images[index]
        except ValueError as error:
            return error


def _collate(rows: list[Any]) -> Any:
    """A batch of the rows, or the first error among them."""
    faults = [row for row in rows if isinstance(row, ValueError)]
    return faults[0] if faults else default_collate(rows)


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
        framing = split.framing
        self.transform = (
            evaluation_transform(framing)
            if augmentation is None
            else training_transform(augmentation, framing.mean, framing.std)
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = read_image(self.split.folder / self.split.paths[index])
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


def joined_source(dataset: DataSet | ImageData) -> Embedded | FromDisk | None:
    """The training and the held-out images of any data set together, for `training.train`; None without the latter."""
    if "held-out" not in dataset.splits:
        return None
    if isinstance(dataset, DataSet):
        return Embedded(data.join(dataset.train, dataset.splits["held-out"]), dataset.augmentation)
    parts = (dataset.train, dataset.splits["held-out"])
    whole = replace(
        dataset.train,
        paths=tuple(path for part in parts for path in part.paths),
        targets=torch.cat([part.targets for part in parts]),
        groups=torch.cat([part.groups for part in parts]),
    )
    return FromDisk(whole, dataset.augmentation)


def digests(dataset: DataSet | ImageData) -> dict[str, str]:
    """16 hex digits per split, by name, that change with its images, targets and groups.

    Of images on disk names and sizes of the files count, not the pixels: that takes no longer than to list them.

    Raises:
        OSError: if an image on disk is missing.
    """
    return {
        name: digest([split.images, split.targets, split.groups]) if isinstance(split, Split) else _disk_digest(split)
        for name, split in dataset.splits.items()
    }


def _disk_digest(split: ImageSplit) -> str:
    said = hashlib.sha256(split.digest.encode())
    for path in split.paths:
        said.update(f"{(split.folder / path).stat().st_size}\n".encode())
    return said.hexdigest()[:16]


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
