"""What `falsifications.py` changes: a shortcut that is as hard as the class, wrong labels, other networks.

The pairs of digits are drawn as `neuronsurgery.study.data` draws, and are the same bits everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from neuronsurgery.study import data
from neuronsurgery.study.data import Augmentation, Counts, DataSet, Doubles, Integers, Split, permutation
from neuronsurgery.study.network import Block, initialised

PAIR_COUNTS: Final[Mapping[str, Counts]] = MappingProxyType(
    {"train": (420, 22, 7, 127), "held-out": (210, 11, 3, 63), "validation": (30,) * 4, "test": (80,) * 4}
)


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
    wanted = data.check_counts(PAIR_COUNTS, counts)
    sources, labels = data.load_digits()
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
    canvas[:, 0], canvas[:, 2] = data.enlarge(red, 16), data.enlarge(blue, 16)
    return data.noisy_split(canvas, groups, "pair", seed, split)


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


# Other networks


class PlainBlock(nn.Sequential):
    """The layers of a `Block` without the path beside them: relu(norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                norm1=nn.BatchNorm2d(outputs),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(outputs),
                relu2=nn.ReLU(),
            )
        )


def deep_resnet(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """A freshly initialised `SmallResNet` of twice as many blocks, two in each stage; as `small_resnet` otherwise.

    Args:
        seed: of the weights.
        classes: the number of logits.

    Returns:
        The network, float32, on the CPU, 174,738 parameters for two classes: "stem" and "stem_norm", "block1" to
        "block6", "head".
    """
    with torch.random.fork_rng(devices=[]):
        shapes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        network = _chain([Block(*shape) for shape in shapes], classes)
    return initialised(network, "deep_resnet", seed)


def plain_cnn(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """A freshly initialised network of the convolutions of a `SmallResNet` without its skip connections.

    Args:
        seed: of the weights.
        classes: the number of logits.

    Returns:
        The network, float32, on the CPU, 74,770 parameters for two classes: "stem" and "stem_norm", "block1" to
        "block3", "head".
    """
    with torch.random.fork_rng(devices=[]):
        network = _chain([PlainBlock(*shape) for shape in ((16, 16, 1), (16, 32, 2), (32, 64, 2))], classes)
    return initialised(network, "plain_cnn", seed)


def _chain(blocks: Sequence[nn.Module], classes: int) -> nn.Sequential:
    """The stem of a `SmallResNet`, blocks that end in 64 channels, and its head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), stem_norm=nn.BatchNorm2d(16), stem_relu=nn.ReLU()
    )
    layers |= {f"block{number}": block for number, block in enumerate(blocks, start=1)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, classes)}
    return nn.Sequential(layers)
