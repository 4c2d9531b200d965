"""`neuronsurgery audit`: from options to a network and examples, and from these to the files of an audit."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuronsurgery.study.audit.auditing import audit, plan
from neuronsurgery.study.audit.examples import Examples, Table, from_folders, from_table, from_texts
from neuronsurgery.study.audit.networks import Network, from_arch, from_folder, from_function, is_folder_of_transformers
from neuronsurgery.study.audit.page import write_audit
from neuronsurgery.study.models import input_size
from neuronsurgery.study.readers import Loading
from neuronsurgery.study.readers.layouts import middle
from neuronsurgery.study.readers.pixels import Framing

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Options:
    """What `neuronsurgery audit` is asked for; the names are those of its options.

    Attributes:
        weights: a file of weights, or a folder of transformers.
        arch: a network of torchvision or timm.
        model: "package.module:function" that makes the network.
        root: the folder of the images.
        table: a CSV file of paths (or texts) and classes; None: one subfolder of `root` per class.
        label_column: of the classes.
        path_column: of the images' paths.
        text_column: of the texts, for a network that reads texts.
        group_column: of the groups, or of an attribute; None where nobody knows them.
        split_column: of the splits.
        split: which one to take; None takes all rows.
        early: weights of the same network after its first epochs.
        size: height and width that the network is given; None: what it is made for.
        mean: that pixels are normalised with, by channel; None: ImageNet's.
        std: the same.
        budget: a time such as "10m" to keep to, or "none".
        plan: only say what it will cost.
        out: the folder of the report.
        batch_size: None: the one that goes fastest.
        workers: processes that decode images.
        anyway: go on where the network is no better than chance.
        seed: of the halves, the parts and the controls.
    """

    weights: Path | None = None
    arch: str | None = None
    model: str | None = None
    root: Path | None = None
    table: Path | None = None
    label_column: str = "label"
    path_column: str = "path"
    text_column: str | None = None
    group_column: str | None = None
    split_column: str = "split"
    split: str | None = None
    early: Path | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    budget: str = "30m"
    plan: bool = False
    out: Path = Path("audit")
    batch_size: int | None = None
    workers: int = 0
    anyway: bool = False
    seed: int = 0


def run(options: Options) -> int:
    """Print the plan, or make the report and print its answers; return the exit status, 0.

    Raises:
        ValueError: if options miss or contradict each other, or what they name does not fit; before any long work.
        OSError: if a file is missing or cannot be read or written.
    """
    budget = seconds_of(options.budget)
    network = network_of(options)
    examples = examples_of(options, network)
    if options.plan:
        planned = plan(network.model, examples, budget=budget, batch=options.batch_size, anyway=options.anyway)
        sys.stdout.write(f"{planned}\n")
        return 0
    early = None if options.early is None else network_of(replace(options, weights=options.early)).model
    found = audit(
        network.model,
        examples,
        early=early,
        budget=budget,
        seed=options.seed,
        batch=options.batch_size,
        out=options.out,
        anyway=options.anyway,
        progress=True,
        note=network.note,
    )
    page = write_audit(found, examples, options.out)
    sys.stdout.write("\n".join([*found.answers, str(page), ""]))
    return 0


def seconds_of(text: str) -> float | None:
    """Return the seconds of a time such as 90s, 10m or 1.5h; None for "none".

    Raises:
        ValueError: if it is no such time.

    Example:
        >>> seconds_of("1.5h")
        5400.0
    """
    if text.lower() == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"--budget {text}: expected a time such as 90s, 10m or 1.5h, or none")
    return float(found[1]) * UNITS[found[2]]


def network_of(options: Options) -> Network:
    """Return the network that the options name.

    Raises:
        ValueError: if they name none or several, or its weights do not fit.
        OSError: if a file is missing.
    """
    if options.model is not None and options.arch is not None:
        raise ValueError("--model and --arch name two networks: leave one out")
    if options.model is not None:
        return from_function(options.model, options.weights)
    if options.weights is None:
        raise ValueError(
            "an audit needs a trained network: --weights FILE with --arch NAME, or --model package:function"
        )
    if options.arch is not None:
        return from_arch(options.arch, options.weights)
    if is_folder_of_transformers(options.weights):
        return from_folder(options.weights)
    raise ValueError(
        f"--weights {options.weights} is no folder of transformers: say with --arch which network it is of, such as "
        f"resnet50, or with --model package:function"
    )


def examples_of(options: Options, network: Network) -> Examples:
    """Return the examples that the options name, checked.

    Raises:
        ValueError: if they name none, or a table or an image cannot be used; lists all that is wrong.
        OSError: if a file is missing.
    """
    if network.encode is not None:
        if options.table is None or options.text_column is None:
            raise ValueError("this network reads texts: pass --table FILE and --text-column NAME")
        texts = from_texts(_table(options, options.text_column), network.encode, network.class_names)
        return replace(texts, encode=network.encode.fitted(texts.texts))
    if options.text_column is not None:
        raise ValueError("--text-column is for networks that read texts: this one takes images, leave it out")
    if options.root is None:
        raise ValueError("the images need --root DIR: a folder with one subfolder per class, or what --table is of")
    if not options.root.is_dir():
        raise FileNotFoundError(f"--root {options.root}: no such folder")
    loading, framing = Loading(options.workers), framing_of(options)
    if options.table is None:
        return from_folders(options.root, framing, loading, network.class_names)
    return from_table(options.root, _table(options, options.path_column), framing, loading, network.class_names)


def framing_of(options: Options) -> Framing:
    """Return how images are brought to size: both sides resized where a size is given, the middle of it else."""
    normal: dict[str, Any] = {
        name: value for name, value in (("mean", options.mean), ("std", options.std)) if value is not None
    }
    if options.size is not None:
        return replace(Framing((("resize", options.size),)), **normal)
    return replace(middle(input_size(options.arch or "resnet50")), **normal)


def _table(options: Options, path: str) -> Table:
    assert options.table is not None
    file = options.table
    if not file.is_file() and options.root is not None and (options.root / file).is_file():
        file = options.root / file
    if not file.is_file():
        raise FileNotFoundError(f"--table {options.table}: no such file")
    split = None if options.split is None else (options.split_column, options.split)
    return Table(file, options.label_column, path, options.group_column, split)


def numbers_of(values: Sequence[str]) -> tuple[float, ...]:
    """Return three numbers given as "a b c" or "a,b,c".

    Raises:
        ValueError: if they are not three numbers.
    """
    parts = [part for value in values for part in value.split(",") if part]
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise ValueError(f"expected three numbers, such as 0.5,0.5,0.5, not {' '.join(values)}")
    return numbers
