"""What a data set on disk is: its splits, how images of them are fetched, and the source that training reads."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from neuronsurgery.study import data
from neuronsurgery.study.data import Batch, Counts, DataSet, Integers, Labelled, Split
from neuronsurgery.study.readers.pixels import Framing, RandomCrop, evaluation_transform, read_image, training_transform
from neuronsurgery.study.training import Source, digest

if TYPE_CHECKING:
    from PIL.Image import Image

EXPECTED_COUNTS: Final[Mapping[str, Mapping[str, Counts]]] = {
    "waterbirds": {
        "train": (3498, 184, 56, 1057),
        "validation": (467, 466, 133, 133),
        "test": (2255, 2255, 642, 642),
    },
    "celeba": {
        "train": (71629, 66874, 22880, 1387),
        "validation": (8535, 8276, 2874, 182),
        "test": (9767, 7535, 2480, 180),
    },
}
"""Of the published data sets, as their papers and generators give them; groups in the order of `group_names`."""


@dataclass(frozen=True)
class Loading:
    """How images are fetched: by how many processes that read ahead (0: this one), and into pinned memory or not.

    The batches are the same whatever it says.
    """

    workers: int = 0
    pin_memory: bool = False


@dataclass(frozen=True, eq=False)
class ImageSplit(Labelled):
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
    varied_by = RandomCrop

    def __repr__(self) -> str:
        return self.described((3, self.framing.size, self.framing.size))

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

    def fetch(
        self, places: Sequence[Integers], augmentation: RandomCrop | None, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """A batch of the images at each of some places."""
        loader = DataLoader(
            _Batched(Images(self, augmentation, seed, epoch)),
            batch_size=None,  # the sampler says which images make a batch
            sampler=places,
            num_workers=self.loading.workers,
            pin_memory=self.loading.pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # the seeds of the workers come from here, not from the global state
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            images, targets, groups = batch
            yield images, targets, groups


@dataclass(frozen=True, eq=False)
class Images(Dataset[Batch]):
    """The images of a split as a torch `Dataset` of `(image, target, group)`, for loaders of one's own.

    An image is float32 (3, size, size), normalised; without an augmentation it is framed for evaluation. What happens
    to it depends on `(seed, epoch)` and its place in the split alone, whatever the worker, the batch and the global
    random state, which is left alone.
    """

    split: ImageSplit
    augmentation: RandomCrop | None = None
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Any:
        image = read_image(self.split.folder / self.split.paths[index])
        varied = self.augmentation is not None
        with torch.random.fork_rng(devices=[], enabled=varied):  # torchvision draws from the global state
            if varied:
                bits = data.raw_bits(1, "augmentation", self.seed, self.epoch, int(index))
                torch.default_generator.manual_seed(int(bits[0]) >> 1)
            return self._transform(image), self.split.targets[index], self.split.groups[index]

    @functools.cached_property
    def _transform(self) -> Callable[[Image], Tensor]:
        framing = self.split.framing
        if self.augmentation is None:
            return evaluation_transform(framing)
        return training_transform(self.augmentation, framing.mean, framing.std)


@dataclass(frozen=True, eq=False)
class _Batched(Dataset[Any]):
    """Batches of images by their places, or the error of the first one that cannot be read."""

    images: Images

    def __getitem__(self, places: Integers) -> Any:
        try:
            return default_collate([self.images[place] for place in places.tolist()])
        except ValueError as error:
            return error  # a worker that raised it would make a text of it, with its traceback


@dataclass(frozen=True, eq=False, repr=False)
class ImageData(DataSet[ImageSplit]):
    """A named data set whose images are files.

    Attributes:
        name: "waterbirds", "celeba", or what `image_folder` was told.
        group_names: what group 0, 1, ... shows, such as "landbird on water".
        augmentation: what may be done to its training images.
        splits: split name to `ImageSplit`: "train", and "validation" and "test", perhaps without images.
        class_names: what class 0, 1, ... shows.
    """

    class_names: tuple[str, ...]
    usual_size = 64

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def expected_counts(self) -> dict[str, list[int]] | None:
        """The published number of images per group, by split; None where nothing was published."""
        return {split: list(counts) for split, counts in EXPECTED_COUNTS.get(self.name, {}).items()} or None

    @property
    def minority(self) -> tuple[int, ...]:
        """The groups of fewer training images than half an equal share, those without any left out.

        On Waterbirds and the embedded data these are the groups in which class and attribute disagree; on CelebA it is
        the blond men alone.
        """
        counts = self.train.counts
        return tuple(group for group, count in enumerate(counts) if 0 < count < sum(counts) / len(counts) / 2)

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageData:
        """The same images with their red, green and blue less `mean` and divided by `std`."""
        splits = {
            name: replace(split, framing=replace(split.framing, mean=tuple(mean), std=tuple(std)))
            for name, split in self.splits.items()
        }
        return replace(self, splits=splits)


def training_source(dataset: DataSet | ImageData) -> Source:
    """The training images of any data set with its own augmentation, for `training.train`."""
    return Source(dataset.train, dataset.augmentation)


def joined_source(dataset: DataSet | ImageData) -> Source | None:
    """The training and the held-out images of any data set together, for `training.train`; None without the latter."""
    if "held-out" not in dataset.splits:
        return None
    if not isinstance(dataset, ImageData):
        return Source(data.join(dataset.train, dataset.splits["held-out"]), dataset.augmentation)
    train, held = dataset.train, dataset.splits["held-out"]
    targets, groups = torch.cat([train.targets, held.targets]), torch.cat([train.groups, held.groups])
    whole = replace(train, paths=train.paths + held.paths, targets=targets, groups=groups)
    return Source(whole, dataset.augmentation)


def digests(dataset: DataSet | ImageData) -> dict[str, str]:
    """16 hex digits per split, by name, that change with its images, targets and groups.

    Of images on disk names and sizes of the files count, not the pixels: that takes no longer than to list them.
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


def describe_counts(dataset: DataSet | ImageData) -> str:
    """A table of the images per split and group, the published number beside it where it is another one."""
    expected = EXPECTED_COUNTS.get(dataset.name, {})
    rows = [[f"{'images':10}", *dataset.group_names]]
    for name, split in dataset.splits.items():
        pairs = zip(split.counts, expected.get(name, split.counts), strict=True)
        cells = (str(found) if found == count else f"{found} (not {count})" for found, count in pairs)
        rows.append([f"{name:10}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    if expected:
        differing = [name for name in expected if dataset.splits[name].counts != expected[name]]
        said = f"other than those published in {', '.join(differing)}" if differing else "those published"
        lines.append(f"{dataset.name}: the counts are {said}")
    return "\n".join(lines)
