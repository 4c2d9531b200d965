"""The command line: `neuronsurgery study`, `neuronsurgery report`, `neuronsurgery show`."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import neuronsurgery as ns
from neuronsurgery.study import data
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import RunFolder, Settings, Trained, read_results, stage_one
from neuronsurgery.study.training import (
    RECIPES,
    checkpoint_epochs,
    checkpoint_path,
    print_progress,
    read_trajectory,
    train,
)

EMBEDDED = {"synthetic": data.synthetic, "digits": data.digits}
EVERY_EXPERIMENT = ("1a", "1b", "1c", "1d", "1e", "1f", "1g")
QUICK = {"epochs": 5, "draws": 2, "control_draws": 5, "quick": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after an error that names the next step."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"neuronsurgery: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuronsurgery", description="Model surgery and the study built on it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    study = commands.add_parser(
        "study",
        help="train a network on data with a spurious correlation and operate on its critical neurons",
        description="Stage 1 of the paper: train by empirical risk minimisation with a checkpoint an epoch, score "
        "every neuron for every group, then zero, replace, disturb and rewind the critical ones, and random ones "
        "beside them. A run that was killed goes on where it was.",
    )
    study.add_argument("--data", choices=list(EMBEDDED), default="digits", help="the data (default: %(default)s)")
    study.add_argument(
        "--experiments",
        nargs="+",
        choices=(*EVERY_EXPERIMENT, "all"),
        default=["1a", "1g"],
        help="which experiments of Stage 1 (default: 1a 1g)",
    )
    study.add_argument("--out", type=Path, help="the run folder (default: runs/DATA-seed-N)")
    study.add_argument("--seed", type=_seed, default=0, help="of data, weights and batches (default: %(default)s)")
    study.add_argument("--preset", choices=list(RECIPES), default="adam", help="how to train (default: %(default)s)")
    study.add_argument("--epochs", type=int, help="passes over the training images (default: the preset's)")
    study.add_argument(
        "--split",
        action="append",
        choices=("train", "validation", "test"),
        help="measure the changes on this split; may be given more than once (default: train)",
    )
    study.add_argument("--quick", action="store_true", help="few epochs and draws: does it run, not what comes out")
    study.add_argument("--overwrite", action="store_true", help="delete another run in the folder")
    study.set_defaults(run=_study)
    report = commands.add_parser("report", help="make the report of a run folder again")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.set_defaults(run=_report)
    show = commands.add_parser("show", help="print what a file of ours holds: neurons, scores, an edit, metrics")
    show.add_argument("file", type=Path, metavar="FILE")
    show.set_defaults(run=_show)
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"a seed is a whole number of at least 0, not {seed}")
    return seed


def _show(options: argparse.Namespace) -> int:
    print(ns.load_file(options.file))
    return 0


def _report(options: argparse.Namespace) -> int:
    from neuronsurgery.study.report import write_report

    print(write_report(read_results(options.folder), options.folder))
    return 0


def _study(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    settings = _settings(options)
    name = f"{settings.data}-seed-{settings.seed}" + ("-quick" if settings.quick else "")
    folder = RunFolder(options.out or Path("runs") / name, settings, overwrite=options.overwrite)
    dataset = EMBEDDED[settings.data](settings.seed)
    print(f"{dataset}\nrun folder: {folder.path}", flush=True)
    training = time.perf_counter()
    model = train(
        small_resnet(settings.seed),
        dataset.train,
        folder.path,
        recipe=replace(RECIPES[settings.preset], epochs=settings.epochs),
        seed=settings.seed,
        augmentation=dataset.augmentation,
        progress=print_progress,
    )
    folder.note_seconds("training", time.perf_counter() - training)
    checkpoints = {epoch: checkpoint_path(folder.path, epoch) for epoch in checkpoint_epochs(folder.path)}
    results = stage_one(folder, dataset, Trained(model, checkpoints, read_trajectory(folder.path)))
    print(summary(results))
    _report(argparse.Namespace(folder=folder.path))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    chosen: dict[str, Any] = {
        "data": options.data,
        "preset": options.preset,
        "seed": options.seed,
        "epochs": RECIPES[options.preset].epochs,
        "splits": tuple(dict.fromkeys(options.split or ["train"])),
        "experiments": EVERY_EXPERIMENT if "all" in options.experiments else tuple(sorted(set(options.experiments))),
    }
    if options.quick:
        chosen |= QUICK
    if options.epochs is not None:
        chosen["epochs"] = options.epochs
    return Settings(**chosen)


# What is printed


def summary(results: Mapping[str, Any]) -> str:
    """Return the printed tables of a run: accuracy per group, what 1a changes, what the controls of 1g change."""
    groups = results["groups"]
    split = results["settings"]["splits"][0]
    header = ["", *groups]
    accuracy = [[f"{part} images", *map(str, results["counts"][part])] for part in results["counts"]] + [
        [f"{part} accuracy, %", *(f"{100 * value:.1f}" for value in values)]
        for part, values in results["accuracy"].items()
    ]
    steps = ", ".join(f"{100 / count:.2g}" if count else "-" for count in results["counts"][split])
    tables = [_table("Empirical risk minimisation", header, accuracy)]
    done = results["experiments"]
    if "1a" in done:
        title = f"1a  Zero the top neurons of the model: change of {split} accuracy, points"
        tables.append(_table(title, header, [_cut(record) for record in done["1a"][split]]))
    if "1g" in done:
        title = "1g  Zero random other neurons: mean change (largest), points"
        tables.append(_table(title, header, _controls(done["1g"][split])))
    return "\n\n".join([*tables, f"One image is {steps} points in these groups. Every number is in the report."])


def _cut(record: Mapping[str, Any]) -> list[str]:
    chosen_for = "" if record["chosen_for"] == "all" else f" of {record['chosen_for']}"
    points = _points(change["change"] for change in record["changes"])
    return [f"top-{record['k']} by {record['criterion']}{chosen_for}", *points]


def _controls(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    records = [record for record in records if record["fraction"] is not None]
    for fraction in dict.fromkeys(record["fraction"] for record in records):
        draws = [record for record in records if record["fraction"] == fraction]
        columns = list(zip(*([c["change"] for c in record["changes"]] for record in draws), strict=True))
        means = _points(statistics.mean(column) for column in columns)
        largest = _points(max(column, key=abs) for column in columns)
        neurons = draws[0]["neurons"]
        cells = [f"{mean} ({far})" for mean, far in zip(means, largest, strict=True)]
        rows.append([f"{100 * fraction:g} % ({neurons} neuron{'s' * (neurons > 1)}, {len(draws)} draws)", *cells])
    return rows


def _points(changes: Iterable[float]) -> list[str]:
    return [f"{100 * change:+.1f}" if round(100 * change, 1) else "0.0" for change in changes]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
