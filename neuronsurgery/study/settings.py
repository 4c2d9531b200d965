"""The settings of a run, each of which is written once: what it means, its default and how it is asked for.

`Settings` is what the numbers of a run depend on, and is kept in its `run.json`; `Options` adds how the work is done,
on which no number depends. A field made by `option` is an option of the command, and its help says what it is; what has
none follows from the others.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from neuronsurgery.study.options import Several, UsageError, flag_of, number, one_of, option, whole

if TYPE_CHECKING:  # it imports torch
    from neuronsurgery.study.training import Recipe

EXPERIMENTS: Final = ("1a", "1b", "1c", "1d", "1e", "1f", "1g", "1h")
STAGES: Final = ("1", "2", "fragility")
EMBEDDED: Final = ("synthetic", "digits")
ON_DISK: Final = ("waterbirds", "celeba", "folder")
PRESETS: Final = ("adam", "sgd")
SPLITS: Final = ("train", "validation", "test")
COLUMNS: Final = ("path", "label", "attribute", "split")
OF_A_TABLE: Final = ("label_column", "path_column", "group_column", "split_column", "split")


def _path_text(text: str) -> str:
    return str(Path(text))


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


Kind: TypeAlias = dict[str, Any]
"""What several options have in common, see `option`."""

DISK: Final[Kind] = {"group": "images on disk"}
NETWORK: Final[Kind] = {"group": "network"}
HARDWARE: Final[Kind] = {"group": "hardware"}
EXAMPLES: Final[Kind] = {"group": "examples"}

COUNT: Final[Kind] = {"type": whole(1), "metavar": "N"}
FROM_ZERO: Final[Kind] = {"type": whole(0), "metavar": "N", "otherwise": "0"}
SHARE: Final[Kind] = {"type": number("a share above 0 and up to 0.5, such as 0.2", 0, 0.5), "metavar": "SHARE"}
FILE: Final[Kind] = {"type": Path, "metavar": "FILE"}
FOLDER: Final[Kind] = {"type": Path, "metavar": "DIR"}
SPLIT: Final[Kind] = {
    "flag": "split",
    "dest": "splits",
    "words": SPLITS,
    "type": one_of(SPLITS, {"val": "validation", "valid": "validation", "training": "train"}),
    "action": Several,
}
SIZE: Final[Kind] = {
    "help": "height and width that the network is given",
    "otherwise": "what timm says of the network, else 224",
    **COUNT,
}
CHANNELS: Final[Kind] = {"action": Several, "const": 3, "metavar": "R G B"}
MEAN: Final[Kind] = {
    "help": "taken from red, green and blue in [0, 1]",
    "otherwise": "ImageNet's, 0.485,0.456,0.406",
    "type": number("a number, such as 0.2"),
    **CHANNELS,
}
STD: Final[Kind] = {
    "help": "what they are then divided by",
    "otherwise": "ImageNet's, 0.229,0.224,0.225",
    "type": number("a number above 0, such as 0.2", 0, sys.float_info.max),
    **CHANNELS,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on; two runs are the same run if all but `run.ADDED_TO` is equal."""

    data: str = option("synthetic", "embedded data, or images on disk in --root", "synthetic", words=EMBEDDED + ON_DISK)
    stages: tuple[str, ...] = option(STAGES, "which stages", "all", words=(*STAGES, "all"), action=Several)
    experiments: tuple[str, ...] = option(
        EXPERIMENTS, "which experiments of Stage 1", "all", words=(*EXPERIMENTS, "all"), action=Several
    )
    splits: tuple[str, ...] = option(("train",), "measure the changes on these splits", "train", **SPLIT)
    seed: int = option(0, "of data, weights and batches", **FROM_ZERO)
    preset: str = option("adam", "how to train", "adam; of images on disk, the data's own", words=PRESETS)
    epochs: int = option(30, "passes over the training images", "the data's own", **COUNT)
    batch_size: int = option(64, "images per step", "the preset's", **COUNT)
    fine_tuning_epochs: int = option(
        4, "Stage 2: passes of the paper's method and its controls", "4; 20 with --full", **COUNT
    )
    comparison_epochs: int = option(
        12,
        "Stage 2: passes of methods that start from the first weights",
        "two fifths of --epochs; all of them with --full",
        **COUNT,
    )
    held_out: float | None = option(
        None,
        "hold this share of the training images out of training, to choose and retrain with; for data without held-out "
        "images of their own",
        "none",
        **SHARE,
    )
    full: bool = option(False, "Stage 2 at the paper's lengths and with more rates and arms")
    quick: bool = option(False, "few epochs and draws: does it run, not what comes out")
    arch: str = option(
        "small_resnet",
        "small_resnet, or any name of torchvision or timm",
        "small_resnet; of images on disk, resnet50",
        **NETWORK,
    )
    weights: str | None = option(
        None,
        "initial weights: safetensors, a torch state dict or a folder",
        "random",
        **{**FILE, "type": _path_text, **NETWORK},
    )
    root: str | None = option(None, "the folder of the data set", type=_path_text, metavar="DIR", **DISK)
    size: int | None = option(None, **SIZE, **DISK)
    mean: tuple[float, ...] | None = option(None, **MEAN, **DISK)
    std: tuple[float, ...] | None = option(None, **STD, **DISK)
    table: str | None = option(None, "--data folder: the CSV file", "metadata.csv", metavar="FILE", **DISK)
    path_column: str | None = option(None, "--data folder: the column of paths", "path", **DISK)
    label_column: str | None = option(None, "--data folder: the column of classes", "label", **DISK)
    attribute_column: str | None = option(None, "--data folder: the column of attributes", "attribute", **DISK)
    split_column: str | None = option(None, "--data folder: the column of splits", "split", **DISK)
    device: str | None = option(None, "for instance cuda", "the CPU", metavar="DEVICE", **HARDWARE)
    bf16: bool = option(False, "train under autocast to bfloat16", **HARDWARE)
    channels_last: bool = option(False, "lay images and weights out channels last", **HARDWARE)
    draws: int = 10  # random ones that are averaged
    control_draws: int = 30  # matched controls that a p-value rests on
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
    """What `neuronsurgery study` is asked for: the settings of its runs, and how the work is done."""

    out: Path | None = option(None, "the run folder", "runs/DATA-seed-N", **FOLDER)
    seeds: int = option(1, "run this many seeds, from --seed on, and compare them", "1", **COUNT)
    overwrite: bool = option(False, "delete the files of another run in the folder")
    workers: int = option(0, "processes that decode images", **FROM_ZERO, **DISK)
    no_verify: bool = option(False, "do not decode every image before training starts", **DISK)


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What `neuronsurgery audit` is asked for."""

    weights: Path | None = option(
        None, "the trained weights: safetensors, a torch state dict, or a folder of transformers", **FILE, **NETWORK
    )
    arch: str | None = option(None, "any name of torchvision or timm", **NETWORK)
    model: str | None = option(None, "a function that makes the network, package.module:function", **NETWORK)
    early: Path | None = option(
        None, "its weights after the first epochs, to rank the examples by what it had wrong then", **FILE, **NETWORK
    )
    root: Path | None = option(
        None, "the folder of the images, with one subfolder per class or a table", **FOLDER, **EXAMPLES
    )
    table: Path | None = option(None, "a CSV file of paths or texts", **FILE, **EXAMPLES)
    label_column: str = option("label", "the column of classes", "label", **EXAMPLES)
    path_column: str = option("path", "the column of paths", "path", **EXAMPLES)
    text_column: str | None = option(None, "the column of texts", **EXAMPLES)
    group_column: str | None = option(
        None, "the column of groups, or of an attribute", "none, groups are inferred", **EXAMPLES
    )
    split_column: str = option("split", "the column of splits", "split", **EXAMPLES)
    split: str | None = option(None, "take the rows of this split", "all rows", **EXAMPLES)
    size: int | None = option(None, **SIZE, **EXAMPLES)
    mean: tuple[float, ...] | None = option(None, **MEAN, **EXAMPLES)
    std: tuple[float, ...] | None = option(None, **STD, **EXAMPLES)
    budget: float = option(
        1800.0, "keep to this time: 90s, 10m, 1.5h, or none for no limit", "30m", type=_seconds, metavar="TIME"
    )
    plan: bool = option(False, "say what it will cost, and do nothing")
    out: Path = option(Path("audit"), "the folder of the report", "audit", **FOLDER)
    batch_size: int | None = option(None, "examples in a batch", "the size that goes fastest", **COUNT)
    workers: int = option(0, "processes that decode images", **FROM_ZERO)
    anyway: bool = option(False, "go on where the network is no better than chance")
    seed: int = option(0, "of the halves, the parts and the controls", **FROM_ZERO)


def refuse_contradictory_audit(given: Mapping[str, Any]) -> None:
    """Raise a UsageError if options of an audit, by field, miss or contradict each other, whatever the files are."""
    of_a_table = [flag_of(name, AuditOptions) for name in OF_A_TABLE if name in given]
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
    if "table" not in given and of_a_table:
        raise UsageError(f"{', '.join(of_a_table)}: of a table, and there is none: pass --table FILE, or leave it out")


def refuse_contradictions(given: Mapping[str, Any]) -> None:
    """Raise a UsageError if options of a study, by field, do not go together, whatever the files are."""
    data = given.get("data", "synthetic")
    own = ("table", *(f"{name}_column" for name in COLUMNS))
    if data in EMBEDDED:
        found = _flags(given, ("root", "size", "mean", "std", "workers", "no_verify", *own))
        if found:
            raise UsageError(
                f"--data {data} is embedded and takes no {found}: leave it out, or choose --data {', '.join(ON_DISK)}"
            )
    elif "root" not in given:
        raise UsageError(f"--data {data} is read from disk and needs --root DIR")
    elif data != "folder" and _flags(given, own):
        raise UsageError(f"{_flags(given, own)}: only for --data folder, {data} has its own: leave it out")


def _flags(given: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(flag_of(name, Options) for name in names if name in given)
