"""The embedded data sets: what they hold, and that they are the same bits everywhere."""

import hashlib
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from neuronsurgery.study import data
from neuronsurgery.study.data import Augmentation, DataSet, Split, batches, digits, synthetic

TINY = {"train": (2, 2, 2, 2), "validation": (1, 1, 1, 1), "test": (1, 1, 1, 1)}
TINY_BIRDS = TINY | {"held-out": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def birds() -> DataSet:
    return synthetic(0)


@pytest.fixture(scope="module")
def numerals() -> DataSet:
    pytest.importorskip("sklearn")
    return digits(0)


def pixel_hash(images: Tensor) -> str:
    return hashlib.sha256((images * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()


def same(a: Split, b: Split) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("images", "targets", "groups"))


def streak_statistic(images: Tensor) -> Tensor:
    """Variation along the rows minus variation along the columns: positive for vertical streaks."""
    grey = images.mean(dim=1)
    return grey.diff(dim=2).abs().mean(dim=(1, 2)) - grey.diff(dim=1).abs().mean(dim=(1, 2))


# Golden values: a change here is a change of everybody's data


def test_synthetic_images_are_the_golden_ones() -> None:
    assert (
        pixel_hash(synthetic(0, counts=TINY_BIRDS).train.images)
        == "62e75cb00832f4ba8922363a81f021406d58adb6fc01066604d6dff63707801e"
    )


def test_digits_images_are_the_golden_ones() -> None:
    pytest.importorskip("sklearn")
    assert (
        pixel_hash(digits(0, counts=TINY).train.images)
        == "791aec1ef4db2aa86b698ea5739abcaed0dd3db66c7afc8b81aba3baf53f60dc"
    )


def test_draws_are_the_golden_ones() -> None:
    assert data.raw_bits(2, "golden", 0).tolist() == [7233129146420192585, 15975744078088766495]
    assert data.uniforms((2,), "golden", 0).tolist() == [0.3921087167208497, 0.8660468218268136]
    assert data.bells((2,), "golden", 0).tolist() == [-0.3166193950972101, -0.5584447260771327]


# What is in a data set


def test_synthetic_has_the_counts_and_types_of_the_contract(birds: DataSet) -> None:
    assert birds.train.counts == (1749, 92, 28, 528)
    assert birds.validation.counts == (60,) * 4
    assert birds.test.counts == (250,) * 4
    assert birds.train.images.shape == (2397, 3, 32, 32)
    assert birds.group_names[1] == "landbird on water"


def test_digits_has_the_counts_and_types_of_the_contract(numerals: DataSet) -> None:
    assert numerals.train.counts == (600, 32, 10, 180)
    assert numerals.validation.counts == (30,) * 4
    assert numerals.test.counts == (100,) * 4
    assert numerals.train.images.shape == (822, 3, 16, 16)
    assert not numerals.augmentation.flip


@pytest.mark.parametrize("name", ["birds", "numerals"])
def test_splits_are_float32_multiples_of_one_255th_with_consistent_groups(
    name: str, request: pytest.FixtureRequest
) -> None:
    dataset: DataSet = request.getfixturevalue(name)
    for split in dataset.splits.values():
        assert split.images.dtype == torch.float32
        assert split.targets.dtype == split.groups.dtype == torch.int64
        assert split.images.min() >= 0
        assert split.images.max() <= 1
        assert torch.equal((split.images * 255).round() / 255, split.images)
        assert torch.equal(split.targets, split.groups // 2)


@pytest.mark.parametrize("name", ["birds", "numerals"])
def test_backgrounds_carry_the_attribute(name: str, request: pytest.FixtureRequest) -> None:
    split = request.getfixturevalue(name).test
    # The outermost three pixels: a digit fills its image, and ink has edges of its own.
    strips = [split.images[..., :3, :], split.images[..., -3:, :]]
    strips += [split.images[..., :3], split.images[..., -3:]]
    guessed_water = sum(map(streak_statistic, strips)) < 0
    assert (guessed_water == (split.groups % 2 == 1)).float().mean() > 0.92


def test_no_digit_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    seen: list[bytes] = []
    draw = data._draw_digits

    def record(sources: data.Doubles, groups: data.Integers, seed: int, split: str) -> Split:
        seen.extend(source.tobytes() for source in sources)
        return draw(sources, groups, seed, split)

    monkeypatch.setattr(data, "_draw_digits", record)
    digits(0)
    assert len(seen) == 822 + 120 + 400
    assert len(set(seen)) == len(seen)


def test_digits_are_of_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    sources, labels = data.load_digits()
    classes = {source.tobytes(): int(label) for source, label in zip(sources, labels, strict=True)}

    def check(sources: data.Doubles, groups: data.Integers, seed: int, split: str) -> Split:
        assert [classes[source.tobytes()] for source in sources] == (groups // 2).tolist()
        return Split(torch.zeros(len(groups), 3, 16, 16), torch.from_numpy(groups // 2), torch.from_numpy(groups))

    monkeypatch.setattr(data, "_draw_digits", check)
    digits(3)


# What a group changes, and what it does not


def in_group(group: int) -> Tensor:
    counts = tuple(40 if number == group else 0 for number in range(4))
    return synthetic(0, counts=TINY_BIRDS | {"train": counts}).train.images


def test_colour_carries_no_class_information(monkeypatch: pytest.MonkeyPatch) -> None:
    palettes: list[data.Doubles] = []
    draw = data._draw_colours

    def record(count: int, *key: str | int) -> data.Doubles:
        palettes.append(draw(count, *key))
        return palettes[-1]

    monkeypatch.setattr(data, "_draw_colours", record)
    land, water = in_group(0), in_group(2)
    # Every split of either call: the same birds, but for their class, have the same colours.
    splits = len(palettes) // 2
    assert all(np.array_equal(a, b) for a, b in zip(palettes[:splits], palettes[splits:], strict=True))
    assert not torch.equal(land, water)


def test_class_changes_only_pixels_that_a_bird_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    land, water = in_group(0), in_group(2)
    monkeypatch.setattr(data, "_paint", lambda *_: None)
    bare = in_group(0)
    assert torch.equal(bare, in_group(2))
    uncovered = (land == bare).all(dim=1) & (water == bare).all(dim=1)
    assert 0.5 < uncovered.float().mean() < 0.95


def test_attribute_changes_only_the_background() -> None:
    on_land, on_water = in_group(0), in_group(1)
    shared = (on_land == on_water).all(dim=1).flatten(1).sum(dim=1)
    assert shared.min() > 20  # the pixels that the bird covers wholly


# Seeds and streams


def test_same_seed_same_bits_and_another_seed_other_images() -> None:
    first, again, other = (synthetic(seed, counts=TINY_BIRDS) for seed in (0, 0, 1))
    assert all(same(first.splits[name], again.splits[name]) for name in first.splits)
    assert (first.train.images != other.train.images).float().mean() > 0.9


def test_splits_come_from_streams_of_their_own() -> None:
    counts = TINY_BIRDS | {"test": TINY["train"], "extra": TINY["train"]}
    dataset = synthetic(0, counts=counts)
    images = [dataset.splits[name].images for name in ("train", "test", "extra")]
    assert all((a != b).float().mean() > 0.9 for a, b in ((images[0], images[1]), (images[1], images[2])))
    assert same(dataset.train, synthetic(0, counts=TINY_BIRDS).train)


def test_bells_have_mean_0_and_variance_1() -> None:
    numbers = data.bells((100_000,), "moments")
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.var() - 1) < 0.01


def test_a_longer_stream_begins_with_the_shorter_one() -> None:
    assert np.array_equal(data.raw_bits(100, "prefix")[:7], data.raw_bits(7, "prefix"))
    assert np.array_equal(data.bells((70_000,), "prefix")[:7], data.bells((7,), "prefix"))


def test_an_integer_of_numpy_is_the_same_seed() -> None:
    assert np.array_equal(data.raw_bits(3, "key", int(np.int64(5))), data.raw_bits(3, "key", np.int64(5)))  # type: ignore[arg-type]


def test_global_random_states_stay() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    dataset = synthetic(0, counts=TINY_BIRDS)
    list(batches(dataset.train, 4, shuffle=True, augmentation=Augmentation()))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state(legacy=False)["state"]["key"])


# Batches


def numbered(count: int, size: int = 6) -> Split:
    images = torch.arange(count * 3 * size * size, dtype=torch.float32).view(count, 3, size, size)
    return Split(images, torch.arange(count) % 2, torch.arange(count))


def test_plain_batches_are_the_split_in_order() -> None:
    split = numbered(10)
    loader = batches(split, 4)
    assert [len(targets) for _, targets, _ in loader] == [4, 4, 2]
    assert len(loader) == 3
    images, targets, groups = (torch.cat(part) for part in zip(*loader, strict=True))
    assert same(Split(images, targets, groups), split)


def test_shuffled_batches_hold_every_image_once_and_repeat() -> None:
    loader = batches(numbered(50), 8, seed=1, epoch=2, shuffle=True)
    first, again = (torch.cat([groups for *_, groups in loader]) for _ in range(2))
    assert torch.equal(first, again)
    assert first.tolist() != list(range(50))
    assert sorted(first.tolist()) == list(range(50))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_another_seed_or_epoch_is_another_order_and_another_augmentation(seed: int, epoch: int) -> None:
    split = numbered(50)
    here, there = batches(split, 50, shuffle=True), batches(split, 50, shuffle=True, seed=seed, epoch=epoch)
    assert next(iter(here))[2].tolist() != next(iter(there))[2].tolist()
    here = batches(split, 50, augmentation=Augmentation())
    there = batches(split, 50, augmentation=Augmentation(), seed=seed, epoch=epoch)
    assert not torch.equal(next(iter(here))[0], next(iter(there))[0])


def test_moves_equal_padding_and_cropping() -> None:
    images = numbered(3).images
    moves = torch.tensor([[0, 1, -2], [1, 0, 0], [1, -2, 2]])
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    expected = torch.stack(
        [
            padded[0, :, 1:7, 4:10],
            images[1].flip(-1),
            padded[2].flip(-1)[:, 4:10, 0:6],  # mirrored first, then shifted
        ]
    )
    assert torch.equal(data._move(images, moves), expected)


def test_augmentation_of_an_image_does_not_depend_on_its_batch() -> None:
    split = numbered(20)
    small, large = batches(split, 3, augmentation=Augmentation()), batches(split, 20, augmentation=Augmentation())
    assert torch.equal(torch.cat([images for images, *_ in small]), next(iter(large))[0])


def test_augmentation_of_nothing_is_nothing() -> None:
    split = numbered(20)
    loader = batches(split, 20, augmentation=Augmentation(flip=False, shift=0))
    assert torch.equal(next(iter(loader))[0], split.images)


def test_augmentation_reaches_all_moves() -> None:
    moves = data._draw_moves(2000, Augmentation(flip=True, shift=2), 0, 0)
    assert [sorted(set(column.tolist())) for column in moves.T] == [[0, 1], [-2, -1, 0, 1, 2], [-2, -1, 0, 1, 2]]


def test_loaders_of_a_split_are_named_and_leave_out_empty_groups() -> None:
    loaders = synthetic(0, counts=TINY_BIRDS | {"train": (3, 0, 1, 2)}).loaders("train", size=2)
    assert list(loaders) == ["landbird on land", "waterbird on land", "waterbird on water"]
    assert [len(loader) for loader in loaders.values()] == [2, 1, 1]
    assert all(set(groups.tolist()) == {0} for *_, groups in loaders["landbird on land"])


# Errors and manners


def test_bad_counts_are_named() -> None:
    with pytest.raises(ValueError, match=r"counts of split 'extra': expected four whole numbers .* found \(1, 2\)"):
        synthetic(0, counts={"extra": (1, 2)})
    with pytest.raises(ValueError, match=r"counts of split 'train'.*found \(1, -2, 3, 4\)"):
        synthetic(0, counts={"train": (1, -2, 3, 4)})


def test_too_many_digits_are_refused() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=r"split 'extra' asks for 10 images of class 0, found 9 that no earlier"):
        digits(0, counts={"extra": (5, 5, 1, 1)})


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"batches: size must be at least 1, found 0"):
        batches(numbered(2), 0)


def test_values_are_frozen_and_print_as_what_they_are() -> None:
    dataset = synthetic(0, counts=TINY_BIRDS)
    with pytest.raises(FrozenInstanceError, match="cannot assign"):
        dataset.name = "other"  # type: ignore[misc]
    assert "train: Split(8 images of (3, 32, 32), 2/2/2/2 per group)" in repr(dataset)


# Held-out images


def test_held_out_images_are_a_plain_random_part_of_the_training_images(birds: DataSet) -> None:
    without = replace(birds, splits={name: split for name, split in birds.splits.items() if name != "held-out"})
    parted = data.hold_out(without, 0.2, seed=3)
    assert list(parted.splits) == ["train", "held-out", "validation", "test"]
    assert list(without.splits) == ["train", "validation", "test"]
    train, held = parted.train, parted.splits["held-out"]
    assert len(held) == round(0.2 * len(birds.train))
    assert same(data.join(held, train).subset(torch.argsort(rank(data.join(held, train)))), by_rank(birds.train))
    assert same(parted.test, birds.test)
    assert same(data.hold_out(without, 0.2, seed=3).train, train)
    assert not same(data.hold_out(without, 0.2, seed=4).train, train)
    more = data.hold_out(without, 0.4, seed=3).splits["held-out"]
    assert set(rank(held).tolist()) < set(rank(more).tolist())


def rank(split: Split) -> Tensor:
    """A number per image that depends on its pixels alone."""
    return split.images.double().mul(torch.arange(1.0, 3073.0).view(3, 32, 32).sqrt()).sum(dim=(1, 2, 3))


def by_rank(split: Split) -> Split:
    return split.subset(torch.argsort(rank(split)))


@pytest.mark.parametrize("share", [0, -0.1, 0.51, 1.0, float("nan")])
def test_shares_that_hold_out_nothing_or_most_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"hold_out: share must be in \(0, 0\.5\], found"):
        data.hold_out(synthetic(counts=TINY_BIRDS), share, 0)


def test_held_out_images_are_not_held_out_twice(birds: DataSet) -> None:
    with pytest.raises(ValueError, match=r"has held-out images of its own \(1199\): .* leave out --held-out"):
        data.hold_out(birds, 0.2, 0)
    few = replace(birds, splits={"train": birds.train.subset(torch.arange(3))})
    with pytest.raises(ValueError, match=r"0\.1 of 3 training images is none: choose a larger share"):
        data.hold_out(few, 0.1, 0)
