"""The settings of a run, each of which is written once: what it means, its default and how it is asked for.

`Settings` is what the numbers of a run depend on, and is kept in its `run.json`; `Options` adds how the work is done,
on which no number depends. A field made by `option` is an option of `neuronsurgery study`; what has none follows from
the others.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from neuronsurgery.study.options import UsageError, flag_of, one_of, option, whole

if TYPE_CHECKING:  # it imports torch
    from neuronsurgery.study.training import Recipe

EXPERIMENTS: Final = ("1a", "1b", "1c", "1d", "1e", "1f", "1g", "1h")
STAGES: Final = ("1", "2", "fragility")

EMBEDDED: Final = ("synthetic", "digits")
ON_DISK: Final = ("waterbirds", "celeba", "folder")
PRESETS: Final = ("adam", "sgd")
SPLITS: Final = ("train", "validation", "test")
COLUMNS: Final = ("path", "label", "attribute", "split")

DISK: Final = "images on disk"
NETWORK: Final = "network"
HARDWARE: Final = "hardware"
EXAMPLES: Final = "examples"
OF_A_TABLE: Final = ("label_column", "path_column", "group_column", "split_column", "split")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 0.5, such as 0.2, not {text!r}")
    return share


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, such as 0.2, not {text!r}") from None


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, such as 0.2, not {text!r}")
    return number


def _path_text(text: str) -> str:
    return str(Path(text))


def _size(group: str) -> Any:
    said = "height and width that the network is given"
    otherwise = "what timm says of the network, else 224"
    return option(None, said, values=whole(1), metavar="N", otherwise=otherwise, group=group)


def _channels(help: str, imagenet: str, **how: Any) -> Any:
    said = {"otherwise": f"ImageNet's, {imagenet}", "several": True, "count": 3, "metavar": "R G B", "group": DISK}
    return option(None, help, **{**said, **how})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on; two runs are the same run if all but `run.ADDED_TO` is equal.

    Attributes:
        data: the name of the data set.
        root: the folder of a data set that is not embedded, or None.
        arch: the architecture.
        weights: the file of initial weights, or None.
        preset: "adam" or "sgd", or the data set whose own recipe it is.
        epochs: passes over the training images.
        seed: of data, weights and batches.
        splits: on which splits the experiments are measured.
        stages: which stages, of `STAGES`.
        experiments: which ones of Stage 1, "1a" to "1h".
        draws: how many random draws are averaged.
        control_draws: how many matched controls a p-value rests on.
        fine_tuning_epochs: of Stage 2.
        comparison_epochs: of the methods of Stage 2 that train from the first weights again.
        full: whether Stage 2 has more rates and arms.
        quick: whether this is only to see that it runs.
        optimizer: of empirical risk minimisation, as the rest of its recipe; see `training.Recipe`.
        learning_rate: of its first step.
        weight_decay: of its optimiser.
        momentum: of SGD.
        batch_size: images per step.
        schedule: of the learning rate.
        held_out: the share of the training images that is held out of training, or None.
        size: height and width to which images on disk are brought; None for embedded data.
        mean: what is taken from the red, green and blue of images on disk; None for ImageNet's, or embedded data.
        std: what they are then divided by, the same.
        table: the table of a folder of one's own; None for other data, as the columns are.
        path_column: its column of paths.
        label_column: its column of classes.
        attribute_column: its column of attributes.
        split_column: its column of splits.
        device: of training; None is the CPU.
        bf16: whether training was under autocast to bfloat16.
        channels_last: whether images and weights were laid out channels last.
    """

    data: str = option(
        "synthetic",
        "embedded data, or images on disk in --root",
        choices=(*EMBEDDED, *ON_DISK),
        metavar="NAME",
        otherwise="synthetic",
    )
    stages: tuple[str, ...] = option(
        STAGES, "which stages", choices=(*STAGES, "all"), several=True, metavar="NAME", otherwise="all"
    )
    experiments: tuple[str, ...] = option(
        EXPERIMENTS,
        "which experiments of Stage 1",
        choices=(*EXPERIMENTS, "all"),
        several=True,
        metavar="NAME",
        otherwise="all",
    )
    splits: tuple[str, ...] = option(
        ("train",),
        "measure the changes on these splits",
        flag="split",
        choices=SPLITS,
        values=one_of(SPLITS, {"val": "validation", "valid": "validation", "training": "train"}),
        several=True,
        metavar="NAME",
        otherwise="train",
    )
    seed: int = option(0, "of data, weights and batches", values=whole(0), metavar="N", otherwise="0")
    preset: str = option(
        "adam", "how to train", choices=PRESETS, metavar="NAME", otherwise="adam; of images on disk, the data's own"
    )
    epochs: int = option(
        30, "passes over the training images", values=whole(1), metavar="N", otherwise="the data's own"
    )
    batch_size: int = option(64, "images per step", values=whole(1), metavar="N", otherwise="the preset's")
    fine_tuning_epochs: int = option(
        4,
        "Stage 2: passes of the paper's method and its controls",
        values=whole(1),
        metavar="N",
        otherwise="4; 20 with --full",
    )
    comparison_epochs: int = option(
        12,
        "Stage 2: passes of methods that start from the first weights",
        values=whole(1),
        metavar="N",
        otherwise="two fifths of --epochs; all of them with --full",
    )
    held_out: float | None = option(
        None,
        "hold this share of the training images out of training, to choose and retrain with; for data without held-out "
        "images of their own",
        values=_share,
        metavar="SHARE",
        otherwise="none",
    )
    full: bool = option(
        False,
        "Stage 2 at the paper's lengths and with more rates and arms",
    )
    quick: bool = option(False, "few epochs and draws: does it run, not what comes out")
    arch: str = option(
        "small_resnet",
        "small_resnet, or any name of torchvision or timm",
        metavar="NAME",
        otherwise="small_resnet; of images on disk, resnet50",
        group=NETWORK,
    )
    weights: str | None = option(
        None,
        "initial weights: safetensors, a torch state dict or a folder",
        values=_path_text,
        metavar="FILE",
        otherwise="random",
        group=NETWORK,
    )
    root: str | None = option(None, "the folder of the data set", values=_path_text, metavar="DIR", group=DISK)
    size: int | None = _size(DISK)
    mean: tuple[float, ...] | None = _channels(
        "taken from red, green and blue in [0, 1]", "0.485,0.456,0.406", values=_number
    )
    std: tuple[float, ...] | None = _channels("what they are then divided by", "0.229,0.224,0.225", values=_positive)
    table: str | None = option(
        None, "--data folder: the CSV file", metavar="FILE", otherwise="metadata.csv", group=DISK
    )
    path_column: str | None = option(
        None, "--data folder: the column of paths", metavar="NAME", otherwise="path", group=DISK
    )
    label_column: str | None = option(
        None, "--data folder: the column of classes", metavar="NAME", otherwise="label", group=DISK
    )
    attribute_column: str | None = option(
        None, "--data folder: the column of attributes", metavar="NAME", otherwise="attribute", group=DISK
    )
    split_column: str | None = option(
        None, "--data folder: the column of splits", metavar="NAME", otherwise="split", group=DISK
    )
    device: str | None = option(None, "for instance cuda", otherwise="the CPU", group=HARDWARE)
    bf16: bool = option(False, "train under autocast to bfloat16", group=HARDWARE)
    channels_last: bool = option(False, "lay images and weights out channels last", group=HARDWARE)
    draws: int = 10
    control_draws: int = 30
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"

    @property
    def recipe(self) -> Recipe:
        """How the network is trained by empirical risk minimisation."""
        from neuronsurgery.study.training import Recipe

        return Recipe(**{one.name: getattr(self, one.name) for one in fields(Recipe)})


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What `neuronsurgery study` is asked for: the settings of its runs, and how the work is done.

    Attributes:
        out: the run folder, or None for one under `runs/`.
        seeds: how many runs there are, of as many seeds from `seed` on.
        overwrite: whether to delete the files of another run in the folder.
        workers: processes that decode images.
        pin_memory: whether batches are handed out in pinned memory.
        no_verify: whether training starts without decoding every image before.
    """

    out: Path | None = option(None, "the run folder", values=Path, metavar="DIR", otherwise="runs/DATA-seed-N")
    seeds: int = option(
        1, "run this many seeds, from --seed on, and compare them", values=whole(1), metavar="N", otherwise="1"
    )
    overwrite: bool = option(False, "delete the files of another run in the folder")
    workers: int = option(0, "processes that decode images", values=whole(0), metavar="N", otherwise="0", group=DISK)
    pin_memory: bool = option(False, "for a faster way to the device", group=DISK)
    no_verify: bool = option(False, "do not decode every image before training starts", group=DISK)


def _seconds(text: str) -> float:
    """Return the seconds of a time such as 90s, 10m or 1.5h; infinity for "none".

    Example:
        >>> _seconds("1.5h")
        5400.0
    """
    if text.lower() == "none":
        return math.inf
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10m or 1.5h, or none, not {text!r}")
    return float(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What `neuronsurgery audit` is asked for.

    Attributes:
        weights: a file of weights, or a folder of transformers.
        arch: a network of torchvision or timm.
        model: "package.module:function" that makes the network.
        early: weights of the same network after its first epochs.
        root: the folder of the images.
        table: a CSV file of paths (or texts) and classes; None: one subfolder of `root` per class.
        label_column: of the classes.
        path_column: of the images' paths.
        text_column: of the texts, for a network that reads texts.
        group_column: of the groups, or of an attribute; None where nobody knows them.
        split_column: of the splits.
        split: which one to take; None takes all rows.
        size: height and width that the network is given; None: what it is made for.
        mean: that pixels are normalised with, by channel; None: ImageNet's.
        std: the same.
        budget: seconds to keep to; infinity for no limit.
        plan: only say what it will cost.
        out: the folder of the report.
        batch_size: None: the one that goes fastest.
        workers: processes that decode images.
        anyway: go on where the network is no better than chance.
        seed: of the halves, the parts and the controls.
    """

    weights: Path | None = option(
        None,
        "the trained weights: safetensors, a torch state dict, or a folder of transformers",
        values=Path,
        metavar="FILE",
        group=NETWORK,
    )
    arch: str | None = option(None, "any name of torchvision or timm", metavar="NAME", group=NETWORK)
    model: str | None = option(
        None, "a function that makes the network, package.module:function", metavar="NAME", group=NETWORK
    )
    early: Path | None = option(
        None,
        "its weights after the first epochs, to rank the examples by what it had wrong then",
        values=Path,
        metavar="FILE",
        group=NETWORK,
    )
    root: Path | None = option(
        None,
        "the folder of the images, with one subfolder per class or a table",
        values=Path,
        metavar="DIR",
        group=EXAMPLES,
    )
    table: Path | None = option(None, "a CSV file of paths or texts", values=Path, metavar="FILE", group=EXAMPLES)
    label_column: str = option("label", "the column of classes", metavar="NAME", otherwise="label", group=EXAMPLES)
    path_column: str = option("path", "the column of paths", metavar="NAME", otherwise="path", group=EXAMPLES)
    text_column: str | None = option(None, "the column of texts", metavar="NAME", group=EXAMPLES)
    group_column: str | None = option(
        None,
        "the column of groups, or of an attribute",
        metavar="NAME",
        otherwise="none, groups are inferred",
        group=EXAMPLES,
    )
    split_column: str = option("split", "the column of splits", metavar="NAME", otherwise="split", group=EXAMPLES)
    split: str | None = option(
        None, "take the rows of this split", metavar="NAME", otherwise="all rows", group=EXAMPLES
    )
    size: int | None = _size(EXAMPLES)
    mean: tuple[float, ...] | None = _channels(
        "taken from red, green and blue in [0, 1]", "0.485,0.456,0.406", values=_number, group=EXAMPLES
    )
    std: tuple[float, ...] | None = _channels(
        "what they are then divided by", "0.229,0.224,0.225", values=_positive, group=EXAMPLES
    )
    budget: float = option(
        1800.0,
        "keep to this time: 90s, 10m, 1.5h, or none for no limit",
        values=_seconds,
        metavar="TIME",
        otherwise="30m",
    )
    plan: bool = option(False, "say what it will cost, and do nothing")
    out: Path = option(Path("audit"), "the folder of the report", values=Path, metavar="DIR", otherwise="audit")
    batch_size: int | None = option(
        None, "examples in a batch", values=whole(1), metavar="N", otherwise="the size that goes fastest"
    )
    workers: int = option(0, "processes that decode images", values=whole(0), metavar="N", otherwise="0")
    anyway: bool = option(False, "go on where the network is no better than chance")
    seed: int = option(0, "of the halves, the parts and the controls", values=whole(0), metavar="N", otherwise="0")


def refuse_contradictory_audit(given: Mapping[str, Any]) -> None:
    """Raise a UsageError if options of an audit miss or contradict each other, whatever the files are like.

    Args:
        given: the options of `AuditOptions` that stand on the command line, by field.
    """
    if "model" in given and "arch" in given:
        raise UsageError("--model and --arch name two networks: leave one out")
    if "model" not in given and "weights" not in given:
        raise UsageError(
            "an audit needs a trained network: --weights FILE with --arch NAME, or --model package:function"
        )
    if "model" in given and not re.fullmatch(r"[^:]+:[^:]+", given["model"]):
        raise UsageError(
            f"--model {given['model']}: expected a function as package.module:function, such as my_package:make_network"
        )
    if "text_column" in given and "table" not in given:
        raise UsageError("--text-column is a column of a table: pass --table FILE")
    if "text_column" not in given and "root" not in given:
        raise UsageError("the images need --root DIR: a folder with one subfolder per class, or what --table is of")
    if "table" not in given:
        found = [f"--{name.replace('_', '-')}" for name in OF_A_TABLE if name in given]
        if found:
            raise UsageError(f"{', '.join(found)}: of a table, and there is none: pass --table FILE, or leave it out")


def refuse_contradictions(given: Mapping[str, Any]) -> None:
    """Raise a UsageError if options are given that do not go together, whatever the files and the machine are like.

    Args:
        given: the options of `Options` that stand on the command line, by field.
    """
    data = given.get("data", "synthetic")
    own = ("table", *(f"{name}_column" for name in COLUMNS))
    if data in EMBEDDED:
        found = _flags(given, ("root", "size", "mean", "std", "workers", "pin_memory", "no_verify", *own))
        if found:
            raise UsageError(
                f"--data {data} is embedded and takes no {found}: leave it out, or choose --data {', '.join(ON_DISK)}"
            )
    elif "root" not in given:
        raise UsageError(f"--data {data} is read from disk and needs --root DIR")
    elif data != "folder" and _flags(given, own):
        raise UsageError(f"{_flags(given, own)}: only for --data folder, {data} has its own: leave it out")


def _flags(given: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(flag_of(name, Options) for name in names if name in given)
