"""The embedded data sets: small, made on the spot, and the same bits everywhere.

Both have a class `y` (what the image shows) and a spurious attribute `a` (what it is shown on: 0 land, vertical
streaks; 1 water, horizontal ones); the group of an image is `2 * y + a`, and most training images have `y == a`.
Two more are there to see where a method fails: `pair`, whose attribute is as hard to see as its class, and
`with_label_noise`, which makes some classes wrong.

Every draw comes from Philox raw bits under a key of its own, and an image is made with `+ - * / sqrt`, comparisons and
rounding only, element by element. IEEE 754 rounds all of these correctly, so that no BLAS, libm or vector unit shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Counts = Sequence[int]

SYNTHETIC_COUNTS: Final[Mapping[str, Counts]] = MappingProxyType(
    {
        "train": (1749, 92, 28, 528),
        "held-out": (875, 46, 14, 264),  # distributed as the training images, which the other two are not
        "validation": (60,) * 4,
        "test": (250,) * 4,
    }
)
DIGITS_COUNTS: Final[Mapping[str, Counts]] = MappingProxyType(
    {"train": (600, 32, 10, 180), "validation": (30,) * 4, "test": (100,) * 4}
)
PAIR_COUNTS: Final[Mapping[str, Counts]] = MappingProxyType(
    {"train": (420, 22, 7, 127), "held-out": (210, 11, 3, 63), "validation": (30,) * 4, "test": (80,) * 4}
)


# What a data set is


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, in ascending order of their groups.

    Attributes:
        images: float32 (N, 3, size, size), multiples of 1/255 in [0, 1].
        targets: int64 (N,), the class `y`.
        groups: int64 (N,), `2 * y + a`.
    """

    images: Tensor
    targets: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        counts = "/".join(str(count) for count in self.counts)
        return f"Split({len(self)} images of {tuple(self.images.shape[1:])}, {counts} per group)"

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images in each of the four groups."""
        return tuple(torch.bincount(self.groups, minlength=4).tolist())

    def subset(self, indices: Tensor) -> Split:
        """The images at `indices` (int64, or a boolean mask of length N), as a split of their own."""
        return replace(self, images=self.images[indices], targets=self.targets[indices], groups=self.groups[indices])


@dataclass(frozen=True)
class Augmentation:
    """How a training image may vary from epoch to epoch without changing its class.

    Attributes:
        flip: mirror left and right, for one image in two.
        shift: move by -shift ... shift pixels along each axis; the border is repeated.
    """

    flip: bool = True
    shift: int = 1


def join(*splits: Split) -> Split:
    """The images of several splits as one, again in ascending order of their groups."""
    groups = torch.cat([split.groups for split in splits])
    whole = Split(torch.cat([s.images for s in splits]), torch.cat([s.targets for s in splits]), groups)
    return whole.subset(torch.argsort(groups, stable=True))


@dataclass(frozen=True, eq=False)
class DataSet:
    """A named data set.

    Attributes:
        name: "synthetic", "digits" or "pair".
        group_names: what group 0, 1, 2, 3 shows, such as "landbird on water".
        augmentation: what may be done to its training images.
        splits: split name to `Split`; "train", "validation" and "test" are always there.
    """

    name: str
    group_names: tuple[str, ...]
    augmentation: Augmentation
    splits: Mapping[str, Split]

    def __repr__(self) -> str:
        lines = [f"DataSet {self.name!r}; groups: {', '.join(self.group_names)}"]
        return "\n".join(lines + [f"  {name}: {split!r}" for name, split in self.splits.items()])

    @property
    def train(self) -> Split:
        """The training images."""
        return self.splits["train"]

    @property
    def validation(self) -> Split:
        """The validation images."""
        return self.splits["validation"]

    @property
    def test(self) -> Split:
        """The test images."""
        return self.splits["test"]

    @property
    def minority(self) -> tuple[int, ...]:
        """The groups in which class and attribute disagree."""
        return (1, 2)

    def loaders(self, split: str, size: int = 1000) -> dict[str, Batches]:
        """One loader per group of a split, by group name; groups without images are left out."""
        part = self.splits[split]
        return {
            name: batches(part.subset(part.groups == group), size)
            for group, name in enumerate(self.group_names)
            if part.counts[group]
        }


@dataclass(frozen=True, eq=False)
class Batches:
    """A re-iterable of `(images, targets, groups)`: the same batches each time it is iterated. See `batches`."""

    split: Split
    size: int
    order: Tensor | None
    moves: Tensor | None

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.arange(len(self.split)) if self.order is None else self.order
        for start in range(0, len(order), self.size):
            chosen = order[start : start + self.size]
            images = self.split.images[chosen]
            if self.moves is not None:
                images = _move(images, self.moves[chosen])
            yield images, self.split.targets[chosen], self.split.groups[chosen]


def batches(
    split: Split,
    size: int = 64,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    augmentation: Augmentation | None = None,
) -> Batches:
    """Batches of a split, as a re-iterable with a length; the last batch may be smaller.

    Order and augmentation depend on `(seed, epoch)` alone; what happens to an image does not depend on its batch.

    Args:
        split: the images.
        size: images per batch, at least 1.
        seed: of the shuffling and the augmentation.
        epoch: another epoch is another order and another augmentation.
        shuffle: in random order instead of that of the split.
        augmentation: how to vary the images; None leaves them as they are.

    Returns:
        Batches of `(images, targets, groups)`: float32 (B, 3, H, W), int64 (B,), int64 (B,).

    Raises:
        ValueError: if `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"batches: size must be at least 1, found {size}: pass the number of images per batch")
    order = moves = None
    if shuffle:
        order = torch.from_numpy(permutation(len(split), "order", seed, epoch))
    if augmentation is not None:
        moves = torch.from_numpy(_draw_moves(len(split), augmentation, seed, epoch))
    return Batches(split, size, order, moves)


def _draw_moves(count: int, augmentation: Augmentation, seed: int, epoch: int) -> Integers:
    """int64 (count, 3): mirrored or not, and the shift down and to the right."""
    draws = uniforms((count, 3), "augmentation", seed, epoch)
    flips = (draws[:, 0] < 0.5) & augmentation.flip
    shifts = np.floor(draws[:, 1:] * (2 * augmentation.shift + 1)) - augmentation.shift
    return np.column_stack([flips, shifts]).astype(np.int64)


def _move(images: Tensor, moves: Tensor) -> Tensor:
    """The images, mirrored and shifted by gathering pixels: exact, and one operation for the whole batch."""
    height, width = images.shape[-2:]
    flip, down, right = moves[:, :, None].unbind(1)  # (B, 1)
    rows = (torch.arange(height) - down).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) - right).clamp(0, width - 1)  # (B, W)
    columns = torch.where(flip == 1, width - 1 - columns, columns)
    sources = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (B, H * W)
    return images.flatten(2).gather(2, sources[:, None].expand(-1, images.shape[1], -1)).view_as(images)


# Held-out images for a data set that has none


class Splits(Protocol):
    """A data set of any kind, embedded or on disk: a dataclass with named splits."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def splits(self) -> Mapping[str, Any]:
        """Split name to split, each with a length and `subset`."""
        ...


AnyData = TypeVar("AnyData", bound=Splits)


def hold_out(dataset: AnyData, share: float, seed: int) -> AnyData:
    """A data set in which a part of the training images is a split of its own, "held-out".

    The part is a plain random one: the draw depends on the seed and on the number of training images alone and looks at
    no class and no group, so that both parts are distributed alike. A smaller share is a part of a larger one.

    Args:
        dataset: embedded or read from disk; it stays as it is.
        share: of the training images, in (0, 0.5]; round(share * N) of them are held out.
        seed: of the draw.

    Returns:
        A data set of the same kind; the images of each part are in the order that they had.

    Raises:
        ValueError: if the share is not in (0, 0.5], it comes to no image, or the data set has held-out images already.

    Example:
        >>> hold_out(digits(seed=0), 0.25, seed=0)
        DataSet 'digits'; groups: digit 0-4 on land, digit 0-4 on water, digit 5-9 on land, digit 5-9 on water
          train: Split(616 images of (3, 16, 16), 446/27/7/136 per group)
          held-out: Split(206 images of (3, 16, 16), 154/5/3/44 per group)
          validation: Split(120 images of (3, 16, 16), 30/30/30/30 per group)
          test: Split(400 images of (3, 16, 16), 100/100/100/100 per group)
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"hold_out: share must be in (0, 0.5], found {share}: 0.2 holds out a fifth of the images")
    if "held-out" in dataset.splits:
        raise ValueError(
            f"hold_out: the data set has held-out images of its own ({len(dataset.splits['held-out'])}): use these and "
            f"leave out --held-out"
        )
    train = dataset.splits["train"]
    count = round(share * len(train))
    if not count:
        raise ValueError(f"hold_out: {share} of {len(train)} training images is none: choose a larger share")
    held = torch.zeros(len(train), dtype=torch.bool)
    held[torch.from_numpy(permutation(len(train), "held-out", seed)[:count])] = True
    others = {name: split for name, split in dataset.splits.items() if name != "train"}
    splits = {"train": train.subset(~held), "held-out": train.subset(held), **others}
    return replace(dataset, splits=MappingProxyType(splits))


# Random numbers

_IN_CACHE: Final = 2**15  # numbers worked on at once


def raw_bits(count: int, *key: str | int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words that depend on `key` alone; a longer stream begins with the shorter one."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's integers print otherwise
    digest = hashlib.sha256(repr(plain).encode()).digest()
    # Philox's raw output is fixed by its specification; what numpy's Generator makes of it may change.
    words: npt.NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return words


def uniforms(shape: tuple[int, ...], *key: str | int) -> Doubles:
    """Uniform numbers in [0, 1), float64, multiples of 2**-53, that depend on `key` alone."""
    words = raw_bits(int(np.prod(shape)), *key)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def bells(shape: tuple[int, ...], *key: str | int) -> Doubles:
    """Bell-shaped numbers of mean 0 and variance 1 within +-3.47, float64, that depend on `key` alone.

    The sum of four uniform 16-bit integers, scaled: a normal distribution to the eye, without a logarithm or a cosine
    whose last bit is a matter of the machine.
    """
    low, half = np.uint64(0x0000FFFF0000FFFF), np.uint64(16)
    scale = 1 / np.sqrt(4 * (2.0**32 - 1) / 12)
    words = raw_bits(int(np.prod(shape)), *key)
    numbers = np.empty(words.size)
    for start in range(0, words.size, _IN_CACHE):
        some = words[start : start + _IN_CACHE]
        pairs = (some & low) + ((some >> half) & low)
        sums = (pairs + (pairs >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
        numbers[start : start + _IN_CACHE] = (sums.astype(np.float64) - 2 * 65535) * scale
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
TRAITS: Final[Mapping[str, tuple[float, float, float, float]]] = MappingProxyType(
    {
        "body length": (5.0, 7.5, 0.8, 0.5),
        "body tilt": (0.6, 0.1, 0.12, 0.1),
        "neck length": (1.0, 4.5, 0.8, 0.5),
        "beak length": (1.6, 4.0, 0.6, 0.4),
        "tail length": (6.0, 2.5, 0.9, 0.5),
        "tail angle": (0.1, -0.3, 0.15, 0.12),
        "leg length": (4.5, 2.5, 0.6, 0.4),
    }
)
# Painted in this order, each with a colour of the bird's palette.
PARTS: Final = ("far leg", "near leg", "tail", "body", "neck", "head", "beak", "wing")
PALETTE: Final = np.array([3, 3, 1, 0, 0, 2, 3, 1])  # 0 body and neck, 1 wing and tail, 2 head, 3 beak and legs

_PIXEL_NOISE: Final = 0.03
_CHUNK: Final = 32  # images painted at once: small enough for the cache


def synthetic(seed: int = 0, *, counts: Mapping[str, Counts] | None = None) -> DataSet:
    """Synthetic Waterbirds: 32x32 drawings of land and water birds, on land and on water.

    Birds differ in shape only: body, neck, beak, tail and legs vary around 12 species per class. Colours are drawn
    without regard to the class. A split is drawn from a stream of its own, named after it: image `i` of a split
    depends on `(seed, split, i)` and its group alone.

    Args:
        seed: of everything, the species included.
        counts: images per group of splits to change or to add, such as `{"train": (600,) * 4}` for a balanced
            training set or `{"extra": (100,) * 4}` for one more held-out split. Default: `SYNTHETIC_COUNTS`.

    Returns:
        The data set, with the default splits and those of `counts`.

    Raises:
        ValueError: if counts are not four whole numbers of at least 0.
    """
    wanted = _check_counts(SYNTHETIC_COUNTS, counts)
    names = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
    splits = {split: _draw_birds(groups, seed, split) for split, groups in wanted.items()}
    return DataSet("synthetic", names, Augmentation(), MappingProxyType(splits))


def _check_counts(default: Mapping[str, Counts], counts: Mapping[str, Counts] | None) -> dict[str, Integers]:
    """The group of every image, int64 in ascending order, for each split."""
    wanted = {**default, **(counts or {})}
    for split, numbers in wanted.items():
        if len(numbers) != 4 or any(not isinstance(number, int) or number < 0 for number in numbers):
            raise ValueError(
                f"counts of split {split!r}: expected four whole numbers of at least 0, one per group 2 * y + a, "
                f"found {tuple(numbers)}: pass for example (600, 600, 600, 600)"
            )
    return {split: np.repeat(np.arange(4, dtype=np.int64), numbers) for split, numbers in wanted.items()}


def _finish(canvas: Floats, groups: Integers, *key: str | int) -> Split:
    """A split of the canvas, made noisy, clipped and rounded to multiples of 1/255."""
    canvas += bells(canvas.shape, *key, "pixels") * _PIXEL_NOISE
    np.clip(canvas, 0, 1, out=canvas)
    canvas *= 255
    np.rint(canvas, out=canvas)
    canvas /= 255
    return Split(torch.from_numpy(canvas), torch.from_numpy(groups // 2), torch.from_numpy(groups))


def _draw_birds(groups: Integers, seed: int, split: str) -> Split:
    key = ("synthetic", seed, split)
    canvas = _draw_backgrounds(groups % 2, 32, 0.06, 0.06, *key)
    capsules = _place(_build_birds(_draw_traits(groups // 2, seed, split)), *key)
    colours = _draw_colours(len(groups), *key)[:, PALETTE]
    for start in range(0, len(groups), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _paint(canvas[chunk], capsules[chunk], colours[chunk])
    return _finish(canvas, groups, *key)


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
    directions: Doubles = np.stack([(1 - squared) / (1 + squared), 2 * tangent / (1 + squared)], axis=-1)
    return directions


def _build_birds(traits: Doubles) -> Doubles:
    """(N, parts, 6): the capsules of birds that look to the right, as start x, y, end x, y, start and end radius."""
    body, tilt, neck, beak, tail, droop, leg = traits.T
    body, neck, beak, tail, leg = (np.maximum(length, 0.3)[:, None] for length in (body, neck, beak, tail, leg))
    down, along = np.array([0.0, -1.0]), _direction(tilt)
    front, rear = along * body / 2, -along * body / 2
    crown = front + _direction(np.ones(len(traits))) * (neck + 1.2)
    face = crown + np.array([1.0, -0.1])
    far_hip, near_hip = along * 0.8 + down * 1.5, -along * 0.8 + down * 1.5
    ends: dict[str, tuple[Doubles, Doubles, float, float]] = {
        "far leg": (far_hip, far_hip + down * (leg + 1.0) + np.array([0.4, 0.0]), 0.5, 0.45),
        "near leg": (near_hip, near_hip + down * (leg + 1.0), 0.5, 0.45),
        "tail": (rear, rear - _direction(tilt + droop) * (tail + 1.5), 1.3, 0.9),
        "body": (rear, front, 2.2, 2.7),
        "neck": (front, crown, 1.9, 1.3),
        "head": (crown, face, 1.8, 1.6),
        "beak": (face, face + np.array([1.0, -0.12]) * (beak + 1.2), 0.8, 0.35),
        "wing": (rear * 1.15 + np.array([0.0, 0.3]), front * 0.3 + np.array([0.0, 0.5]), 0.9, 1.5),
    }
    capsules = np.empty((len(traits), len(PARTS), 6))
    for part, name in enumerate(PARTS):
        capsules[:, part, :2], capsules[:, part, 2:4], capsules[:, part, 4], capsules[:, part, 5] = ends[name]
    return capsules


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
    in_pixels: Floats = placed.astype(np.float32)
    return in_pixels


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
    smooth = _enlarge(bells((count, size // 8 + 1, size // 8 + 1), *key, "smooth"), size)
    streaks = _enlarge(bells((count, size // 16 + 1, size // 2), *key, "streaks"), size)
    water = (attributes == 1)[:, None, None]
    streaks = np.where(water, streaks.swapaxes(1, 2), streaks)
    field = np.float32(noise) * smooth + np.float32(contrast) * streaks
    tint = 0.5 * np.array([[-0.06, 0.10, -0.06], [-0.08, 0.02, 0.12]])
    hue = 0.45 + tint[attributes] + 0.03 * bells((count, 3), *key, "hue")
    backgrounds: Floats = np.add(field[:, None], hue[:, :, None, None], dtype=np.float32, casting="same_kind")
    return backgrounds


def _enlarge(grids: Doubles, size: int) -> Floats:
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
    its own (but not writers of its own: the source does not say who wrote what).

    Args:
        seed: of everything.
        counts: images per group of splits to change or to add. Default: `DIGITS_COUNTS`, which uses 892 of the 901
            digits 0-4 and 450 of the 896 digits 5-9.

    Returns:
        The data set, with the default splits and those of `counts`.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if counts are not four whole numbers of at least 0, or ask for more digits than there are.
    """
    wanted = _check_counts(DIGITS_COUNTS, counts)
    sources, labels = _load_digits()
    pools = [np.flatnonzero(labels == y) for y in (0, 1)]
    pools = [pool[permutation(len(pool), "digits", seed, y)] for y, pool in enumerate(pools)]
    splits = {}
    for split, groups in wanted.items():
        taken = [int((groups // 2 == y).sum()) for y in (0, 1)]
        for y, pool in enumerate(pools):
            if taken[y] > len(pool):
                raise ValueError(
                    f"digits: split {split!r} asks for {taken[y]} images of class {y}, found {len(pool)} that no "
                    f"earlier split uses: lower its counts"
                )
        chosen = np.concatenate([pool[:number] for pool, number in zip(pools, taken, strict=True)])
        pools = [pool[number:] for pool, number in zip(pools, taken, strict=True)]
        splits[split] = _draw_digits(sources[chosen], groups, seed, split)
    names = ("digit 0-4 on land", "digit 0-4 on water", "digit 5-9 on land", "digit 5-9 on water")
    return DataSet("digits", names, Augmentation(flip=False), MappingProxyType(splits))


def _load_digits() -> tuple[Doubles, Integers]:
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
    canvas += _enlarge(sources, 16)[:, None] * (ink - canvas)
    return _finish(canvas, groups, *key)


# A shortcut that is as hard as the class


def pair(seed: int = 0, *, counts: Mapping[str, Counts] | None = None) -> DataSet:
    """Two handwritten digits of scikit-learn in one 16x16 image: class and attribute are equally hard to see.

    The class is the half (0-4 or 5-9) of the digit in the red channel, the attribute that of the digit in the blue one;
    green is empty. The two are drawn alike, so that nothing but the training images says which one is asked for.

    The digits of a half are put in an order that depends on the seed. Each split takes the first ones that no earlier
    split shows in red for its red digits, then the first that none shows in blue, and that it does not itself show in
    red, for its blue ones. So within a split no digit is used twice, and over all splits none twice in the same
    channel; one that is red in a split may be blue in another. A split of (n0, n1, n2, n3) images takes 2 n0 + n1 + n2
    digits 0-4 and n1 + n2 + 2 n3 digits 5-9, of which there are 901 and 896.

    Args:
        seed: of everything.
        counts: images per group of splits to change or to add. Default: `PAIR_COUNTS`, in the proportions of
            `SYNTHETIC_COUNTS`; the training images take 869 of the digits 0-4, all splits together 883 in red.

    Returns:
        The data set, with the default splits and those of `counts`.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if counts are not four whole numbers of at least 0, or ask for more digits than there are.
    """
    wanted = _check_counts(PAIR_COUNTS, counts)
    sources, labels = _load_digits()
    orders = [np.flatnonzero(labels == half) for half in (0, 1)]
    orders = [order[permutation(len(order), "pair", seed, half)] for half, order in enumerate(orders)]
    shown: tuple[Integers, Integers] = (np.empty(0, np.int64), np.empty(0, np.int64))  # in red, in blue
    splits = {}
    for split, groups in wanted.items():
        red = _take(orders, groups // 2, shown[0], split, "red")
        blue = _take(orders, groups % 2, np.concatenate([shown[1], red]), split, "blue")
        shown = np.concatenate([shown[0], red]), np.concatenate([shown[1], blue])
        splits[split] = _draw_pairs(sources[red], sources[blue], groups, seed, split)
    names = tuple(f"red {red} with blue {blue}" for red in ("0-4", "5-9") for blue in ("0-4", "5-9"))
    return DataSet("pair", names, Augmentation(flip=False), MappingProxyType(splits))


def _take(orders: Sequence[Integers], halves: Integers, barred: Integers, split: str, channel: str) -> Integers:
    """The digits of one channel of a split, int64 (N,): of each half the first ones that are not barred."""
    taken = np.empty(len(halves), np.int64)
    for half, order in enumerate(orders):
        free, places = order[~np.isin(order, barred)], np.flatnonzero(halves == half)
        if len(places) > len(free):
            raise ValueError(
                f"pair: split {split!r} asks for {len(places)} digits {('0-4', '5-9')[half]} in {channel}, found "
                f"{len(free)} that neither it nor, in {channel}, an earlier split uses: lower its counts"
            )
        taken[places] = free[: len(places)]
    return taken


def _draw_pairs(red: Doubles, blue: Doubles, groups: Integers, seed: int, split: str) -> Split:
    canvas = np.zeros((len(groups), 3, 16, 16), np.float32)
    canvas[:, 0], canvas[:, 2] = _enlarge(red, 16), _enlarge(blue, 16)
    return _finish(canvas, groups, "pair", seed, split)


# Wrong labels


def with_label_noise(split: Split, share: float, seed: int) -> tuple[Split, Tensor]:
    """A split in which some images have the wrong one of two classes, and which ones these are.

    The draw depends on the seed and on the number of images alone, and a smaller share is a part of a larger one.

    Args:
        split: the images, of the classes 0 and 1; it stays as it is.
        share: of all images, in [0, 1]; round(share * N) of them are given the other class.
        seed: of the draw.

    Returns:
        `(noisy, flipped)`: the split with images and groups as they were, so that `targets` is not `groups // 2`
        throughout; and bool (N,), true where the class is wrong.

    Raises:
        ValueError: if the share is not in [0, 1], or there are other classes than 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label noise: share must be in [0, 1], found {share}: 0.03 makes 3 images in 100 wrong")
    if not bool(((split.targets == 0) | (split.targets == 1)).all()):
        raise ValueError(
            f"label noise: expected the classes 0 and 1, found {sorted(set(split.targets.tolist()))}: give a split of "
            f"these two"
        )
    flipped = torch.zeros(len(split), dtype=torch.bool)
    drawn = permutation(len(split), "label noise", seed)[: round(share * len(split))]
    flipped[torch.from_numpy(drawn)] = True
    return replace(split, targets=torch.where(flipped, 1 - split.targets, split.targets)), flipped
