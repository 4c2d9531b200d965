"""The command line: `neuronsurgery study`."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import neuronsurgery as ns
from neuronsurgery.artifacts import write_atomically
from neuronsurgery.study import data
from neuronsurgery.study.experiments import (
    CONTROL_FRACTIONS,
    Outcome,
    critical_neurons,
    global_zero_out,
    is_convolution,
    measure,
    random_controls,
)
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.training import RECIPES, print_progress, train

DATA = {"digits": data.digits, "synthetic": data.synthetic}
QUICK_EPOCHS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after an error that names the next step."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"neuronsurgery: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuronsurgery", description="Model surgery and the study built on it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    study = commands.add_parser(
        "study",
        help="train a network on data with a spurious correlation and cut its critical neurons",
        description="Train a small residual network by empirical risk minimisation, score every neuron for every group, "
        "zero the top ones (experiment 1a) and random ones (1g), and print what that changes on the training set.",
    )
    study.add_argument("--data", choices=list(DATA), default="digits", help="the embedded data set (default: digits)")
    study.add_argument("--out", type=Path, help="the run folder (default: runs/DATA-seed-N)")
    study.add_argument("--seed", type=_seed, default=0, help="of the data, the weights and the batches (default: 0)")
    study.add_argument("--quick", action="store_true", help="few epochs and draws: does it run, not what comes out")
    study.set_defaults(run=_study)
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"a seed is a whole number of at least 0, not {seed}")
    return seed


def _study(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    name = f"{options.data}-seed-{options.seed}" + ("-quick" if options.quick else "")
    folder: Path = options.out or Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    dataset = DATA[options.data](options.seed)
    recipe = replace(RECIPES["adam"], epochs=QUICK_EPOCHS) if options.quick else RECIPES["adam"]
    print(f"{dataset}\nrun folder: {folder}", flush=True)
    model = train(
        small_resnet(options.seed),
        dataset.train,
        folder,
        recipe=recipe,
        seed=options.seed,
        augmentation=dataset.augmentation,
        progress=print_progress,
    )
    loaders = dataset.loaders("train")
    scores = ns.group_grad_norms(model, loaders, where=is_convolution, progress=True)
    cut = global_zero_out(scores, ns.magnitudes(model, where=is_convolution))
    controls = random_controls(scores.layout, critical_neurons(cut), draws=2 if options.quick else 10)
    baseline, outcomes = measure(model, cut + controls, loaders, progress=True)
    test = ns.evaluate(model, dataset.loaders("test"))
    _write(folder, options, scores, baseline, test, outcomes, recipe.epochs)
    print(_report(baseline, test, outcomes))
    print(f"{time.perf_counter() - started:.0f} s; everything is in {folder}")
    return 0


def _write(
    folder: Path,
    options: argparse.Namespace,
    scores: ns.Scores,
    baseline: ns.GroupMetrics,
    test: ns.GroupMetrics,
    outcomes: Sequence[Outcome],
    epochs: int,
) -> None:
    specs = folder / "specs"
    specs.mkdir(exist_ok=True)
    ns.save_file(scores, folder / "scores.safetensors")
    for outcome in outcomes:
        ns.save_file(outcome.intervention.edit, specs / f"{outcome.intervention.label}.safetensors")
    results: dict[str, Any] = {
        "schema": 1,
        "data": options.data,
        "seed": options.seed,
        "epochs": epochs,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "train accuracy": baseline.to_records(),
        "test accuracy": test.to_records(),
        "outcomes": [outcome.to_record() for outcome in outcomes],
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1).encode())


# The printed report


def _report(baseline: ns.GroupMetrics, test: ns.GroupMetrics, outcomes: Sequence[Outcome]) -> str:
    groups = [str(group) for group in baseline.groups]
    header = ["", *groups]
    accuracy = [
        ["training images", *map(str, baseline.counts)],
        ["training accuracy, %", *(f"{100 * value:.1f}" for value in baseline.values)],
        ["test accuracy, %", *(f"{100 * value:.1f}" for value in test.values)],
    ]
    cut = [
        [f"top-{outcome.intervention.size:g} by {_criterion(outcome)}", *_points(outcome.change[g] for g in groups)]
        for outcome in outcomes
        if outcome.intervention.experiment == "1a"
    ]
    controls = []
    for fraction in CONTROL_FRACTIONS:
        draws = [o for o in outcomes if o.intervention.experiment == "1g" and o.intervention.size == fraction]
        means = _points(statistics.mean(outcome.change[group] for outcome in draws) for group in groups)
        largest = _points(max((outcome.change[group] for outcome in draws), key=abs) for group in groups)
        neurons = len(draws[0].intervention.edit.neurons)
        cells = [f"{mean} ({far})" for mean, far in zip(means, largest, strict=True)]
        controls.append([f"{100 * fraction:g} % ({neurons} neuron{'s' * (neurons > 1)}, {len(draws)} draws)", *cells])
    steps = ", ".join(f"{100 / count:.2g}" for count in baseline.counts)
    return "\n\n".join(
        [
            _table("Empirical risk minimisation", header, accuracy),
            _table("1a  Zero the top neurons of the model: change of training accuracy, points", header, cut),
            _table("1g  Zero random other neurons: mean change (largest), points", header, controls),
            f"One image is {steps} points in the four groups.",
        ]
    )


def _criterion(outcome: Outcome) -> str:
    said = outcome.intervention
    return said.criterion if said.chosen_for == "all" else f"{said.criterion} of {said.chosen_for}"


def _points(changes: Any) -> list[str]:
    return [f"{change:+.1f}" if round(change, 1) else "0.0" for change in changes]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
