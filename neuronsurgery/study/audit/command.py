"""`neuronsurgery audit`: from options to a network and examples, and from these to the files of an audit."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from neuronsurgery.study.audit.auditing import audit, plan
from neuronsurgery.study.audit.examples import Examples, Table, from_folders, from_table, from_texts
from neuronsurgery.study.audit.networks import Network, from_arch, from_folder, from_function, is_folder_of_transformers
from neuronsurgery.study.audit.page import write_audit
from neuronsurgery.study.models import input_size
from neuronsurgery.study.readers import Loading
from neuronsurgery.study.readers.layouts import middle
from neuronsurgery.study.readers.pixels import Framing
from neuronsurgery.study.settings import AuditOptions


def run(options: AuditOptions) -> int:
    """Print the plan, or make the report and print its answers; return the exit status, 0.

    Raises:
        ValueError: if options miss or contradict each other, or what they name does not fit; before any long work.
        OSError: if a file is missing or cannot be read or written.
    """
    budget = None if math.isinf(options.budget) else options.budget
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


def network_of(options: AuditOptions) -> Network:
    """Return the network that the options name.

    Raises:
        ValueError: if its weights do not fit, or nothing says which network they are of.
        OSError: if a file is missing.
    """
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


def examples_of(options: AuditOptions, network: Network) -> Examples:
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
    assert options.root is not None  # or the command line was refused
    if not options.root.is_dir():
        raise FileNotFoundError(f"--root {options.root}: no such folder")
    loading, framing = Loading(options.workers), framing_of(options)
    if options.table is None:
        return from_folders(options.root, framing, loading, network.class_names)
    return from_table(options.root, _table(options, options.path_column), framing, loading, network.class_names)


def framing_of(options: AuditOptions) -> Framing:
    """Return how images are brought to size: both sides resized where a size is given, the middle of it else."""
    normal: dict[str, Any] = {
        name: value for name, value in (("mean", options.mean), ("std", options.std)) if value is not None
    }
    if options.size is not None:
        return replace(Framing((("resize", options.size),)), **normal)
    return replace(middle(input_size(options.arch or "resnet50")), **normal)


def _table(options: AuditOptions, path: str) -> Table:
    assert options.table is not None
    file = options.table
    if not file.is_file() and options.root is not None and (options.root / file).is_file():
        file = options.root / file
    if not file.is_file():
        raise FileNotFoundError(f"--table {options.table}: no such file")
    split = None if options.split is None else (options.split_column, options.split)
    return Table(file, options.label_column, path, options.group_column, split)
