"""Data sets: what they are, parts held out, batches; and two small ones, drawn on the spot, the same bits everywhere.

Both have a class `y` (what the image shows) and a spurious attribute `a` (what it is shown on: 0 land, vertical
streaks; 1 water, horizontal ones); the group of an image is `2 * y + a`, and most training images have `y == a`.

Every draw comes from Philox raw bits under a key of its own, and an image is made with `+ - * / sqrt`, comparisons and
rounding only, element by element. IEEE 754 rounds all of these correctly, so that no BLAS, libm or vector unit shows.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Generic, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self, TypeVar

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Counts = Sequence[int]
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Images float32 (B, 3, H, W), targets int64 (B,), groups int64 (B,)."""

SYNTHETIC_COUNTS: Final[Mapping[str, Counts]] = {
    "train": (1749, 92, 28, 528),
    "held-out": (875, 46, 14, 264),  # distributed as the training images, which the other two are not
    "validation": (60,) * 4,
    "test": (250,) * 4,
}
DIGITS_COUNTS: Final[Mapping[str, Counts]] = {"train": (600, 32, 10, 180), "validation": (30,) * 4, "test": (100,) * 4}


# What a data set is, in memory or on disk


class Labelled(ABC):
    """The images of a split, each with its class in `targets` and its group in `groups`, int64 (N,)."""

    targets: Tensor
    groups: Tensor
    group_count: int
    varied_by: ClassVar[type]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images in each group."""
        return tuple(torch.bincount(self.groups, minlength=self.group_count).tolist())

    def described(self, shape: Sequence[int]) -> str:
        """How the split prints, given the shape of an image."""
        counts = "/".join(map(str, self.counts))
        return f"{type(self).__name__}({len(self)} images of {tuple(shape)}, {counts} per group)"

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The images at `indices` (int64, or a boolean mask of length N), as a split of their own."""

    @abstractmethod
    def fetch(self, places: Sequence[Integers], augmentation: Any, seed: int, epoch: int) -> Iterator[Batch]:
        """A batch of the images at each of some places."""


@dataclass(frozen=True)
class Augmentation:
    """How a training image may vary: mirrored, one in two, and moved by -shift ... shift pixels along each axis."""

    flip: bool = True
    shift: int = 1


@dataclass(frozen=True, eq=False)
class Split(Labelled):
    """A split in memory, in ascending order of its groups; `images` are multiples of 1/255, float32 (N, 3, H, W)."""

    images: Tensor
    targets: Tensor
    groups: Tensor
    group_count = 4
    varied_by = Augmentation

    def __repr__(self) -> str:
        return self.described(self.images.shape[1:])

    def subset(self, indices: Tensor) -> Split:
        """The images at `indices` (int64, or a boolean mask of length N), as a split of their own."""
        return replace(self, images=self.images[indices], targets=self.targets[indices], groups=self.groups[indices])

    def fetch(
        self, places: Sequence[Integers], augmentation: Augmentation | None, seed: int, epoch: int
    ) -> Iterator[Batch]:
        """A batch of the images at each of some places."""
        moves = None if augmentation is None else _draw_moves(len(self), augmentation, seed, epoch)
        for some in map(torch.from_numpy, places):
            images = self.images[some] if moves is None else _move(self.images[some], moves[some])
            yield images, self.targets[some], self.groups[some]


def join(*splits: Split) -> Split:
    """The images of several splits as one, again in ascending order of their groups."""
    groups = torch.cat([split.groups for split in splits])
    whole = Split(torch.cat([s.images for s in splits]), torch.cat([s.targets for s in splits]), groups)
    return whole.subset(torch.argsort(groups, stable=True))


AnySplit = TypeVar("AnySplit", bound=Labelled, default=Split)


@dataclass(frozen=True, eq=False, repr=False)
class DataSet(Generic[AnySplit]):
    """A named data set, in memory if nothing else is said; "train", "validation" and "test" are always there.

    Group 0, 1, ... shows what `group_names` say, such as "landbird on water"; training images may be varied as the
    augmentation says.
    """

    name: str
    group_names: tuple[str, ...]
    augmentation: Any
    splits: Mapping[str, AnySplit]
    usual_size: ClassVar[int] = 1000

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} {self.name!r}; groups: {', '.join(self.group_names)}"]
        return "\n".join(lines + [f"  {name}: {split!r}" for name, split in self.splits.items()])

    @property
    def minority(self) -> tuple[int, ...]:
        """The groups in which class and attribute disagree."""
        return (1, 2)

    @property
    def train(self) -> AnySplit:
        """The training images."""
        return self.splits["train"]

    @property
    def validation(self) -> AnySplit:
        """The validation images."""
        return self.splits["validation"]

    @property
    def test(self) -> AnySplit:
        """The test images."""
        return self.splits["test"]

    def loaders(self, split: str, size: int | None = None) -> dict[str, Batches]:
        """One loader per group of a split, by group name; groups without images are left out."""
        part, size = self.splits[split], self.usual_size if size is None else size
        return {
            name: batches(part.subset(part.groups == group), size)
            for group, name in enumerate(self.group_names)
            if part.counts[group]
        }


AnyData = TypeVar("AnyData", bound=DataSet[Any])


def hold_out(dataset: AnyData, share: float, seed: int) -> AnyData:
    """A data set in which round(share * N) of the N training images are a split of their own, "held-out".

    The draw depends on the seed and on N alone and looks at no class and no group, so that both parts are distributed
    alike; each keeps its order. A smaller share is a part of a larger one.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"hold_out: share must be in (0, 0.5], found {share}: 0.2 holds out a fifth of the images")
    if "held-out" in dataset.splits:
        raise ValueError(
            f"hold_out: the data set has held-out images of its own ({len(dataset.splits['held-out'])}): use these and "
            f"leave out --held-out"
        )
    train = dataset.train
    count = round(share * len(train))
    if not count:
        raise ValueError(f"hold_out: {share} of {len(train)} training images is none: choose a larger share")
    held = torch.zeros(len(train), dtype=torch.bool)
    held[torch.from_numpy(permutation(len(train), "held-out", seed)[:count])] = True
    others = {name: split for name, split in dataset.splits.items() if name != "train"}
    splits = {"train": train.subset(~held), "held-out": train.subset(held), **others}
    return replace(dataset, splits=splits)


# Batches


@dataclass(frozen=True, eq=False)
class Batches:
    """A re-iterable of `(images, targets, groups)`: the same batches each time it is iterated. See `batches`."""

    split: Labelled
    places: Sequence[Integers]
    augmentation: Any
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        return self.split.fetch(self.places, self.augmentation, self.seed, self.epoch)


def batches(
    split: Labelled, size: int = 64, *, seed: int = 0, epoch: int = 0, shuffle: bool = False, augmentation: Any = None
) -> Batches:
    """Batches `(images, targets, groups)` of a split, in memory or on disk, as a re-iterable with a length.

    Order and augmentation depend on `(seed, epoch)` alone; what happens to an image does not depend on its batch.

    Args:
        split: the images.
        size: images per batch, at least 1; the last batch may be smaller.
        seed: of the shuffling and the augmentation.
        epoch: another epoch is another order and another augmentation.
        shuffle: in random order instead of that of the split.
        augmentation: how to vary the images, of the kind that belongs to the data set; None leaves them as they are.
    """
    if size < 1:
        raise ValueError(f"batches: size must be at least 1, found {size}: pass the number of images per batch")
    if not isinstance(augmentation, split.varied_by | None):
        raise TypeError(
            f"batches: found {augmentation!r} for a split of class {type(split).__name__}: pass the "
            f"`.augmentation` of the data set that the split is from"
        )
    order = permutation(len(split), "order", seed, epoch) if shuffle else np.arange(len(split))
    places = [order[start : start + size] for start in range(0, len(order), size)]
    return Batches(split, places, augmentation, seed, epoch)


def _draw_moves(count: int, augmentation: Augmentation, seed: int, epoch: int) -> Tensor:
    """int64 (count, 3): mirrored or not, and the shift down and to the right."""
    draws = uniforms((count, 3), "augmentation", seed, epoch)
    flips = (draws[:, 0] < 0.5) & augmentation.flip
    shifts = np.floor(draws[:, 1:] * (2 * augmentation.shift + 1)) - augmentation.shift
    return torch.from_numpy(np.column_stack([flips, shifts]).astype(np.int64))


def _move(images: Tensor, moves: Tensor) -> Tensor:
    """The images, mirrored and then shifted by gathering pixels; the border is repeated."""
    height, width = images.shape[-2:]
    flip, down, right = moves[:, :, None].unbind(1)  # (B, 1)
    rows = (torch.arange(height) - down).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) - right).clamp(0, width - 1)  # (B, W)
    columns = torch.where(flip == 1, width - 1 - columns, columns)
    sources = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (B, H * W)
    return images.flatten(2).gather(2, sources[:, None].expand(-1, images.shape[1], -1)).view_as(images)


# Random numbers


def raw_bits(count: int, *key: str | int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words that depend on `key` alone; a longer stream begins with the shorter one."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's integers print otherwise
    digest = hashlib.sha256(repr(plain).encode()).digest()
    # Philox's raw output is fixed by its specification; what numpy's Generator makes of it may change.
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def uniforms(shape: tuple[int, ...], *key: str | int) -> Doubles:
    """Uniform numbers in [0, 1), float64, multiples of 2**-53, that depend on `key` alone."""
    words = raw_bits(int(np.prod(shape)), *key)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def bells(shape: tuple[int, ...], *key: str | int) -> Doubles:
    """Bell-shaped numbers of mean 0 and variance 1 within +-3.47, float64, that depend on `key` alone.

    The sum of four uniform 16-bit integers, scaled: a normal distribution to the eye, without a logarithm or a cosine
    whose last bit is a matter of the machine.
    """
    quarters = raw_bits(int(np.prod(shape)), *key).view(np.uint16).reshape(-1, 4)
    sums = quarters[:, 0].astype(np.float64) + quarters[:, 1] + quarters[:, 2] + quarters[:, 3]
    scale = 1 / np.sqrt(4 * (2.0**32 - 1) / 12)
    numbers: Doubles = (sums - 2 * 65535) * scale
    return numbers.reshape(shape)


def permutation(count: int, *key: str | int) -> Integers:
    """The numbers 0 ... count - 1 in an order that depends on `key` alone, int64."""
    return np.argsort(raw_bits(count, *key), kind="stable").astype(np.int64)


# Synthetic Waterbirds

SPECIES: Final = 12  # per class
# The knob of difficulty: the distance of the class means, in units of the table below. Set so that a balanced training
# set of 4x600 teaches every group to about 97 %: a low accuracy of a minority is then not for want of a signal.
SEPARATION: Final = 0.6

# One row per trait of a bird: landbird mean, waterbird mean, spread of the species, spread of the individuals.
# Lengths are in pixels before scaling, angles in radians, against the horizontal.
TRAITS: Final[Mapping[str, tuple[float, float, float, float]]] = {
    "body length": (5.0, 7.5, 0.8, 0.5),
    "body tilt": (0.6, 0.1, 0.12, 0.1),
    "neck length": (1.0, 4.5, 0.8, 0.5),
    "beak length": (1.6, 4.0, 0.6, 0.4),
    "tail length": (6.0, 2.5, 0.9, 0.5),
    "tail angle": (0.1, -0.3, 0.15, 0.12),
    "leg length": (4.5, 2.5, 0.6, 0.4),
}
PALETTE: Final = np.array([3, 3, 1, 0, 0, 2, 3, 1])
"""The colour of each part of a bird: 0 of body and neck, 1 of wing and tail, 2 of the head, 3 of beak and legs."""
_PIXEL_NOISE: Final = 0.03


def synthetic(seed: int = 0, *, counts: Mapping[str, Counts] | None = None) -> DataSet:
    """Synthetic Waterbirds: 32x32 drawings of land and water birds, on land and on water.

    Birds differ in shape only: body, neck, beak, tail and legs vary around 12 species per class. Colours are drawn
    without regard to the class. A split is drawn from a stream of its own, named after it: image `i` of a split
    depends on `(seed, split, i)` and its group alone. `counts` are the images per group of splits that are other than
    in `SYNTHETIC_COUNTS`, such as `{"train": (600,) * 4}`, or new.
    """
    wanted = check_counts(SYNTHETIC_COUNTS, counts)
    names = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
    splits = {split: _draw_birds(groups, seed, split) for split, groups in wanted.items()}
    return DataSet("synthetic", names, Augmentation(), splits)


def check_counts(default: Mapping[str, Counts], counts: Mapping[str, Counts] | None) -> dict[str, Integers]:
    """The group of every image, int64 in ascending order, for each split."""
    wanted = {**default, **(counts or {})}
    for split, numbers in wanted.items():
        if len(numbers) != 4 or any(not isinstance(number, int) or number < 0 for number in numbers):
            raise ValueError(
                f"counts of split {split!r}: expected four whole numbers of at least 0, one per group 2 * y + a, "
                f"found {tuple(numbers)}: pass for example (600, 600, 600, 600)"
            )
    return {split: np.repeat(np.arange(4, dtype=np.int64), numbers) for split, numbers in wanted.items()}


def noisy_split(canvas: Floats, groups: Integers, *key: str | int) -> Split:
    """A split of the canvas, made noisy, clipped and rounded to multiples of 1/255."""
    canvas += bells(canvas.shape, *key, "pixels") * _PIXEL_NOISE
    pixels = np.rint(np.clip(canvas, 0, 1) * 255) / 255
    return Split(torch.from_numpy(pixels), torch.from_numpy(groups // 2), torch.from_numpy(groups))


def _draw_birds(groups: Integers, seed: int, split: str) -> Split:
    key = ("synthetic", seed, split)
    canvas = _draw_backgrounds(groups % 2, 32, 0.06, 0.06, *key)
    capsules = _place(_build_birds(_draw_traits(groups // 2, seed, split)), *key)
    colours = _draw_colours(len(groups), *key)[:, PALETTE]
    _paint(canvas, capsules, colours)
    return noisy_split(canvas, groups, *key)


def _draw_traits(targets: Integers, seed: int, split: str) -> Doubles:
    """(N, traits): class mean, plus the deviation of one of the 12 species, plus that of the individual."""
    land, water, among, within = np.array(list(TRAITS.values())).T
    half = bells((2, SPECIES // 2, len(TRAITS)), "synthetic", seed, "species")
    draws = np.concatenate([half, -half], axis=1)  # in opposite pairs: the class means are as far apart for every seed
    side = SEPARATION * np.array([-0.5, 0.5])[:, None, None]
    species = (land + water) / 2 + side * (water - land) + draws * among
    which = np.floor(uniforms((len(targets),), "synthetic", seed, split, "species") * SPECIES).astype(np.int64)
    individuals: Doubles = bells((len(targets), len(TRAITS)), "synthetic", seed, split, "traits") * within
    individuals += species[targets, which]
    return individuals


def _direction(angles: Doubles) -> Doubles:
    """(..., 2): the unit vector at an angle, x to the right and y up; the angle is met within 1 % up to 1 radian."""
    half = angles / 2
    tangent = half * (1 + half * half / 3 * (1 + half * half * 0.4))  # a series, because tan() differs by machine
    squared = tangent * tangent
    return np.stack([(1 - squared) / (1 + squared), 2 * tangent / (1 + squared)], axis=-1)


def _build_birds(traits: Doubles) -> Doubles:
    """(N, parts, 6): the capsules of birds that look to the right, as start x, y, end x, y, start and end radius."""
    body, tilt, neck, beak, tail, droop, leg = traits.T
    body, neck, beak, tail, leg = (np.maximum(length, 0.3)[:, None] for length in (body, neck, beak, tail, leg))
    down, along = np.array([0.0, -1.0]), _direction(tilt)
    front, rear = along * body / 2, -along * body / 2
    crown = front + _direction(np.ones(len(traits))) * (neck + 1.2)
    face = crown + np.array([1.0, -0.1])
    far_hip, near_hip = along * 0.8 + down * 1.5, -along * 0.8 + down * 1.5
    parts: list[tuple[Doubles, Doubles, float, float]] = [  # in the order of painting, see PALETTE
        (far_hip, far_hip + down * (leg + 1.0) + np.array([0.4, 0.0]), 0.5, 0.45),  # far leg
        (near_hip, near_hip + down * (leg + 1.0), 0.5, 0.45),  # near leg
        (rear, rear - _direction(tilt + droop) * (tail + 1.5), 1.3, 0.9),  # tail
        (rear, front, 2.2, 2.7),  # body
        (front, crown, 1.9, 1.3),  # neck
        (crown, face, 1.8, 1.6),  # head
        (face, face + np.array([1.0, -0.12]) * (beak + 1.2), 0.8, 0.35),  # beak
        (rear * 1.15 + np.array([0.0, 0.3]), front * 0.3 + np.array([0.0, 0.5]), 0.9, 1.5),  # wing
    ]
    ends = np.stack([np.hstack([start, end]) for start, end, _, _ in parts], axis=1)
    radii = np.broadcast_to([radii for _, _, *radii in parts], (len(traits), len(parts), 2))
    return np.concatenate([ends, radii], axis=2)


def _place(capsules: Doubles, *key: str | int) -> Floats:
    """The capsules in pixels of the image (y down): mirrored, turned, scaled and moved, each bird by its own draw."""
    draws = uniforms((len(capsules), 5), *key, "place")
    mirror = np.where(draws[:, 0] < 0.5, -1.0, 1.0)
    cosine, sine = _direction((draws[:, 1] - 0.5) * 0.3).T
    scale = 1.1 + 0.3 * draws[:, 2]
    centre = 15.5 + (draws[:, 3:] - 0.5) * 5.0
    placed = np.empty_like(capsules)
    for x, y in ((0, 1), (2, 3)):
        across, up = capsules[..., x].T, capsules[..., y].T
        placed[..., x] = (centre[:, 0] + mirror * scale * (cosine * across - sine * up)).T
        placed[..., y] = (centre[:, 1] - scale * (sine * across + cosine * up)).T
    placed[..., 4:] = capsules[..., 4:] * scale[:, None, None]
    return placed.astype(np.float32)


def _draw_colours(count: int, *key: str | int) -> Doubles:
    """(count, 4, 3): a palette per bird, dark or light. The class is not an argument, so that it cannot show."""
    draws = uniforms((count, 2), *key, "lightness")
    light = np.where(draws[:, 0] < 0.5, 0.1, 0.8) + (draws[:, 1] - 0.5) * 0.2
    offsets = np.array([0.0, -0.18, 0.1, 0.0]) * np.where(draws[:, :1] < 0.5, -1.0, 1.0)
    colours: Doubles = light[:, None, None] + offsets[:, :, None] + bells((count, 4, 3), *key, "colours") * 0.1
    return colours


def _paint(canvas: Floats, capsules: Floats, colours: Doubles) -> None:
    """Paints the capsules (n, parts, 6) over the canvas (n, 3, size, size) in their order, with soft edges."""
    grid = np.arange(canvas.shape[-1], dtype=np.float32)
    columns, rows = grid[None, None, :], grid[None, :, None]
    for part in range(capsules.shape[1]):
        x, y, end_x, end_y, radius, end_radius = capsules[:, part].T[:, :, None, None]
        dx, dy = end_x - x, end_y - y
        across, down = columns - x, rows - y
        position = np.clip((across * dx + down * dy) / (dx * dx + dy * dy), 0, 1)
        across, down = across - position * dx, down - position * dy
        distance = np.sqrt(across * across + down * down) - (radius + position * (end_radius - radius))
        cover = np.clip(np.float32(0.5) - distance, 0, 1)[:, None]  # an edge one pixel wide
        canvas += cover * (colours[:, part, :, None, None].astype(np.float32) - canvas)


# Backgrounds


def _draw_backgrounds(attributes: Integers, size: int, noise: float, contrast: float, *key: str | int) -> Floats:
    """(N, 3, size, size): smooth noise under vertical streaks, greenish (land), or horizontal ones, bluish (water)."""
    count = len(attributes)
    smooth = enlarge(bells((count, size // 8 + 1, size // 8 + 1), *key, "smooth"), size)
    streaks = enlarge(bells((count, size // 16 + 1, size // 2), *key, "streaks"), size)
    water = (attributes == 1)[:, None, None]
    streaks = np.where(water, streaks.swapaxes(1, 2), streaks)
    field = np.float32(noise) * smooth + np.float32(contrast) * streaks
    tint = 0.5 * np.array([[-0.06, 0.10, -0.06], [-0.08, 0.02, 0.12]])
    hue = 0.45 + tint[attributes] + 0.03 * bells((count, 3), *key, "hue")
    return field[:, None] + hue.astype(np.float32)[:, :, None, None]


def enlarge(grids: Doubles, size: int) -> Floats:
    """(n, size, size): grids of any shape (n, h, w), interpolated linearly along both axes."""
    enlarged = grids.astype(np.float32)
    for axis, spread in ((1, (1, -1, 1)), (2, (1, 1, -1))):
        knots = grids.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * (knots / size) - 0.5, 0, knots - 1)
        left = np.minimum(np.floor(position).astype(np.int64), knots - 2)
        share = (position - left).astype(np.float32).reshape(spread)
        before, after = enlarged.take(left, axis), enlarged.take(left + 1, axis)
        enlarged = before + share * (after - before)
    return enlarged


# Digits


def digits(seed: int = 0, *, counts: Mapping[str, Counts] | None = None) -> DataSet:
    """Handwritten digits of scikit-learn, 0-4 (`y = 0`) against 5-9 (`y = 1`), 16x16, on land and on water.

    The digits of a class are put in an order that depends on the seed; the splits take theirs from it one after the
    other, and so do the groups of a split. So each source image is used at most once, and every split has digits of
    its own (but not writers of its own: the source does not say who wrote what). `counts` are the images per group of
    splits that are other than in `DIGITS_COUNTS`, or new: of the 901 digits 0-4 these take 892, of the 896 digits 5-9
    they take 450.
    """
    wanted = check_counts(DIGITS_COUNTS, counts)
    sources, labels = load_digits()
    pools = [np.flatnonzero(labels == y) for y in (0, 1)]
    pools = [pool[permutation(len(pool), "digits", seed, y)] for y, pool in enumerate(pools)]
    splits = {}
    for split, groups in wanted.items():
        chosen = []
        for y, pool in enumerate(pools):
            count = int((groups // 2 == y).sum())
            if count > len(pool):
                raise ValueError(
                    f"digits: split {split!r} asks for {count} images of class {y}, found {len(pool)} that no "
                    f"earlier split uses: lower its counts"
                )
            chosen.append(pool[:count])
            pools[y] = pool[count:]
        splits[split] = _draw_digits(sources[np.concatenate(chosen)], groups, seed, split)
    names = ("digit 0-4 on land", "digit 0-4 on water", "digit 5-9 on land", "digit 5-9 on water")
    return DataSet("digits", names, Augmentation(flip=False), splits)


def load_digits() -> tuple[Doubles, Integers]:
    """The source images (1797, 8, 8) in [0, 1], and their classes (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits: the data set needs scikit-learn, which is not installed: pip install 'neuronsurgery[study]'"
        ) from error
    source = load_digits()
    return source.images / 16, (source.target >= 5).astype(np.int64)


def _draw_digits(sources: Doubles, groups: Integers, seed: int, split: str) -> Split:
    key = ("digits", seed, split)
    canvas = _draw_backgrounds(groups % 2, 16, 0.05, 0.12, *key)
    ink = _draw_colours(len(groups), *key)[:, 0, :, None, None].astype(np.float32)
    canvas += enlarge(sources, 16)[:, None] * (ink - canvas)
    return noisy_split(canvas, groups, *key)
