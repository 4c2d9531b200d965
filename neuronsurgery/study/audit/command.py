"""`neuronsurgery audit`: from options to a network and examples, and from these to the files of an audit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronsurgery.study.audit.auditing import audit, plan
from neuronsurgery.study.audit.examples import Examples, Table, from_folders, from_table, from_texts
from neuronsurgery.study.audit.networks import Network, from_arch, from_folder, from_function, is_folder_of_transformers
from neuronsurgery.study.audit.page import write_audit
from neuronsurgery.study.models import input_size
from neuronsurgery.study.readers import Framing, Loading
from neuronsurgery.study.readers.layouts import middle
from neuronsurgery.study.settings import AuditOptions
from neuronsurgery.study.table import RESULTS


def run(options: AuditOptions) -> None:
    """Print the plan, or make the report and print its answers; what does not fit is an error before any long work."""
    for name in (RESULTS, "run.json"):
        if (options.out / name).exists():
            raise FileExistsError(f"--out {options.out} is the folder of a run, {name} is in it: choose another one")
    network = network_of(options)
    examples = examples_of(options, network)
    how: dict[str, Any] = {"budget": options.budget, "batch": options.batch_size, "anyway": options.anyway}
    if options.plan:
        sys.stdout.write(f"{plan(network.model, examples, **how)}\n")
        return
    early = None if options.early is None else network_of(replace(options, weights=options.early)).model
    how |= {"early": early, "seed": options.seed, "out": options.out, "progress": True, "note": network.note}
    found = audit(network.model, examples, **how)
    sys.stdout.write("\n".join([*found.answers, str(write_audit(found, examples, options.out)), ""]))


def network_of(options: AuditOptions) -> Network:
    """Return the network that the options name, with its weights."""
    if options.model is not None:
        return from_function(options.model, options.weights)
    assert options.weights is not None  # or the command line was refused
    if options.arch is not None:
        return from_arch(options.arch, options.weights)
    if is_folder_of_transformers(options.weights):
        return from_folder(options.weights)
    raise ValueError(
        f"--weights {options.weights} is no folder of transformers: say with --arch which network it is of, such as "
        f"resnet50, or with --model package:function"
    )


def examples_of(options: AuditOptions, network: Network) -> Examples:
    """Return the examples that the options name, checked: a ValueError lists all that is wrong."""
    if network.tokenizer is not None:
        if options.table is None or options.text_column is None:
            raise ValueError("this network reads texts: pass --table FILE and --text-column NAME")
        table = _table(options, options.table)
        return from_texts(table, network.encoder(table.columns()["path"]), network.class_names)
    if options.text_column is not None:
        raise ValueError("--text-column is for networks that read texts: this one takes images, leave it out")
    assert options.root is not None  # or the command line was refused
    if not options.root.is_dir():
        raise FileNotFoundError(f"--root {options.root}: no such folder")
    how = _framing(options), Loading(options.workers), network.class_names
    if options.table is None:
        return from_folders(options.root, *how)
    return from_table(options.root, _table(options, options.table), *how)


def _framing(options: AuditOptions) -> Framing:
    """Return how images are brought to size: both sides resized where a size is given, the middle of it else."""
    if options.size is None:
        framing = middle(input_size(options.arch or "resnet50"))
    else:
        framing = Framing((("resize", options.size),))
    return replace(framing, mean=options.mean or framing.mean, std=options.std or framing.std)


def _table(options: AuditOptions, file: Path) -> Table:
    if not file.is_file() and options.root is not None:
        file = options.root / file
    if not file.is_file():
        raise FileNotFoundError(f"--table {options.table}: no such file")
    split = None if options.split is None else (options.split_column, options.split)
    return Table(file, options.label_column, options.text_column or options.path_column, options.group_column, split)
