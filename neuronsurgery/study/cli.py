"""The command line: `neuronsurgery study`, `neuronsurgery report`, `neuronsurgery show`."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

import neuronsurgery as ns
from neuronsurgery.study import data
from neuronsurgery.study.claims import render
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.falsifications import falsifications
from neuronsurgery.study.methods import FINE_TUNING
from neuronsurgery.study.models import DEFAULTS, Built, build_model
from neuronsurgery.study.readers import READERS, Loading, describe_counts, training_source
from neuronsurgery.study.run import (
    EXPERIMENTS,
    STAGES,
    RunFolder,
    Settings,
    describe_run,
    read_results,
    refuse_missing_groups,
    write_results,
)
from neuronsurgery.study.seeds import combine, refuse_other_files
from neuronsurgery.study.stage_fragility import stage_fragility
from neuronsurgery.study.stage_memorization import stage_memorization
from neuronsurgery.study.stage_one import Trained, stage_one
from neuronsurgery.study.stage_two import MORE_RATES, RATES, Setting, beside_last_layers, stage_two
from neuronsurgery.study.training import (
    RECIPES,
    Embedded,
    Hardware,
    Recipe,
    checkpoint_epochs,
    checkpoint_path,
    distributed,
    print_progress,
    read_trajectory,
    train,
)

EMBEDDED = {"synthetic": data.synthetic, "digits": data.digits}
QUICK = {
    "epochs": 5,
    "draws": 2,
    "control_draws": 5,
    "fine_tuning_epochs": 1,
    "comparison_epochs": 2,
    "quick": True,
}
QUICK_COUNTS = {"train": (350, 18, 8, 106), "validation": (20,) * 4, "test": (50,) * 4}
QUICK_HELD_OUT = {"held-out": (175, 9, 4, 53)}


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
    study.add_argument(
        "--data",
        choices=[*EMBEDDED, *READERS],
        default="synthetic",
        help="embedded data, or images on disk in --root (default: %(default)s)",
    )
    study.add_argument(
        "--experiments",
        nargs="+",
        choices=(*EXPERIMENTS, "all"),
        default=["all"],
        help="which experiments of Stage 1 (default: all)",
    )
    study.add_argument("--out", type=Path, help="the run folder (default: runs/DATA-seed-N)")
    study.add_argument("--seed", type=_seed, default=0, help="of data, weights and batches (default: %(default)s)")
    study.add_argument(
        "--seeds", type=_count, default=1, metavar="N", help="run this many seeds, from --seed on, and compare them"
    )
    study.add_argument("--preset", choices=list(RECIPES), help="how to train (default: adam; on disk, the data's own)")
    study.add_argument("--epochs", type=int, help="passes over the training images (default: the preset's)")
    study.add_argument(
        "--split",
        action="append",
        choices=("train", "validation", "test"),
        help="measure the changes on this split; may be given more than once (default: train)",
    )
    study.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages (default: all)")
    study.add_argument(
        "--memorization", action="store_true", help="also the memorisation score of every training image: 40 trainings"
    )
    study.add_argument(
        "--full",
        action="store_true",
        help="Stage 2 at the paper's lengths and with more rates; and where fragility should fail (embedded data)",
    )
    study.add_argument("--quick", action="store_true", help="few epochs and draws: does it run, not what comes out")
    _add_disk_options(study.add_argument_group("images on disk"))
    _add_hardware_options(study.add_argument_group("hardware"))
    study.add_argument("--overwrite", action="store_true", help="delete another run in the folder")
    study.set_defaults(run=_study)
    report = commands.add_parser("report", help="make the report of a run folder again")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.set_defaults(run=_report)
    show = commands.add_parser("show", help="print what a file of ours holds: neurons, scores, an edit, metrics")
    show.add_argument("file", type=Path, metavar="FILE")
    show.set_defaults(run=_show)
    return parser


def _add_disk_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--root", type=Path, metavar="DIR", help="the folder of the data set")
    group.add_argument("--arch", help="small_resnet, or any name of torchvision or timm (default: resnet50)")
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="initial weights: safetensors or a torch state dict"
    )
    group.add_argument("--batch-size", type=int, help="images per step (default: the data's own)")
    group.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    group.add_argument("--pin-memory", action="store_true", help="for a faster way to the device")
    group.add_argument("--no-verify", action="store_true", help="do not decode every image before training starts")
    group.add_argument("--table", help="--data folder: the CSV file (default: metadata.csv)")
    for column in ("path", "label", "attribute", "split"):
        group.add_argument(f"--{column}-column", help=f"--data folder: the column's name (default: {column})")


def _add_hardware_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="for instance cuda (default: the CPU)")
    group.add_argument("--bf16", action="store_true", help="train under autocast to bfloat16")
    group.add_argument("--channels-last", action="store_true", help="lay images and weights out channels last")


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"a seed is a whole number of at least 0, not {seed}")
    return seed


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"a number of seeds is at least 1, not {count}")
    return count


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
    seeds = range(settings.seed, settings.seed + options.seeds)
    name = settings.data + ("-quick" if settings.quick else "")
    last = f"s-{seeds[0]}-{seeds[-1]}" if options.seeds > 1 else f"-{settings.seed}"
    path = options.out or Path("runs") / f"{name}-seed{last}"
    if options.seeds > 1:
        refuse_other_files(path)
        runs = {n: _run(options, replace(settings, seed=n), path / f"seed-{n}") for n in seeds}
    else:
        runs = {settings.seed: _run(options, settings, path)}
    finished = {seed: results for seed, results in runs.items() if results is not None}
    if not finished:
        return 0  # another process of torchrun: the first one goes on alone
    if options.seeds > 1:
        write_results(path, together := combine(finished))
        print(render(together["claims"]))
    else:
        print(summary(finished[settings.seed]))
    _report(argparse.Namespace(folder=path))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _run(options: argparse.Namespace, settings: Settings, path: Path) -> dict[str, Any] | None:
    """Return the results of one run, which is taken up where its folder has it; None on all processes but the first.

    Under `torchrun` the processes share the training by empirical risk minimisation.
    """
    dataset = _dataset(options, settings)
    refuse_missing_groups(dataset, settings)
    built = build_model(settings.arch, len(set(dataset.train.targets.tolist())), settings.weights, settings.seed)
    with distributed(options.device) as rank:
        if rank == 0:
            folder = RunFolder(path, settings, overwrite=options.overwrite)
            print(f"{dataset}\n{built.note}\nrun folder: {path}", flush=True)
        if dist.is_initialized():
            dist.barrier()
        if rank > 0:
            folder = RunFolder(path, settings)
        trained = _train(options, folder, dataset, built)
    return _surgery(options, folder, dataset, built, trained) if rank == 0 else None


def _surgery(
    options: argparse.Namespace, folder: RunFolder, dataset: Any, built: Built, trained: Trained
) -> dict[str, Any]:
    """Return the results of every stage, written down after each."""
    settings = folder.settings
    results = describe_run(folder, dataset, trained.model, trained.trajectory, built.note)
    setting = _setting(options, settings, dataset, trained, built)
    how: dict[str, Any] = {"recipe": setting.recipe, "hardware": _hardware(options)}
    few: dict[str, Any] = {"epochs": 1} if settings.quick else {}
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "1": lambda: stage_one(folder, dataset, trained),
        "2": lambda: {"stage_two": stage_two(folder, dataset, setting, _hardware(options))},
        "fragility": lambda: {"fragility": stage_fragility(folder, dataset, trained)},
        "memorization": lambda: {"memorization": stage_memorization(folder, dataset, trained, **few, **how)},
        "falsifications": lambda: {"falsifications": falsifications(folder, seed=settings.seed)},
    }
    for name, stage in stages.items():
        if name in settings.stages:
            results |= stage()
            if name == "fragility" and "stage_two" in results and "mitigation" in results["fragility"]:
                results["fragility"]["mitigation"] += beside_last_layers(results["stage_two"])
            write_results(folder.path, results)
    if options.seeds > 1:
        _report(argparse.Namespace(folder=folder.path))
    return results


def _train(options: argparse.Namespace, folder: RunFolder, dataset: Any, built: Built) -> Trained:
    started = time.perf_counter()
    model = train(
        built.model,
        training_source(dataset),
        folder.path,
        recipe=replace(_recipe(options), epochs=folder.settings.epochs),
        seed=folder.settings.seed,
        hardware=_hardware(options),
        progress=print_progress,
    )
    folder.note_seconds("training", time.perf_counter() - started)
    checkpoints = {epoch: checkpoint_path(folder.path, epoch) for epoch in checkpoint_epochs(folder.path)}
    return Trained(model, checkpoints, read_trajectory(folder.path), studied(built.head))


def _setting(options: argparse.Namespace, settings: Settings, dataset: Any, trained: Trained, built: Built) -> Setting:
    return Setting(
        trained,
        training_source(dataset),
        replace(_recipe(options), epochs=settings.epochs),
        settings.seed,
        tuple(dataset.train.counts),
        built.pretrained,
        settings.fine_tuning_epochs,
        settings.comparison_epochs,
        MORE_RATES if settings.full else RATES,
        _joined(dataset) if settings.full else None,
        *_published(options, built),
    )


def _published(options: argparse.Namespace, built: Built) -> tuple[Mapping[str, Recipe], float]:
    """Return the recipes of comparison methods for this data set, which are for pre-trained weights; or none."""
    defaults = DEFAULTS[options.data]
    if not built.pretrained:
        return {}, defaults.contrast_temperature
    return defaults.comparisons, defaults.contrast_temperature


def _joined(dataset: Any) -> Embedded | None:
    if not isinstance(dataset, data.DataSet) or "held-out" not in dataset.splits:
        return None
    return Embedded(data.join(dataset.train, dataset.splits["held-out"]), dataset.augmentation)


def _hardware(options: argparse.Namespace) -> Hardware:
    return Hardware(options.device, options.bf16, options.channels_last)


def _dataset(options: argparse.Namespace, settings: Settings) -> Any:
    if settings.data in EMBEDDED:
        held_out = QUICK_HELD_OUT if settings.data == "synthetic" else {}
        counts = QUICK_COUNTS | held_out if settings.quick else None
        return EMBEDDED[settings.data](settings.seed, counts=counts)
    loading = Loading(options.workers, options.pin_memory)
    chosen = {name: getattr(options, f"{name}_column") for name in ("path", "label", "attribute", "split")}
    columns = {name: value for name, value in {"table": options.table, **chosen}.items() if value is not None}
    if columns and settings.data != "folder":
        raise ValueError(f"--table and the columns are for --data folder; {settings.data} has its own")
    dataset = READERS[settings.data](options.root, loading=loading, verify=_verifies(options, settings), **columns)
    print(describe_counts(dataset))
    return dataset


def _verifies(options: argparse.Namespace, settings: Settings) -> bool:
    """Whether to decode every image now: once, by the first process and for the first seed."""
    first = int(os.environ.get("RANK", "0")) == 0 and settings.seed == options.seed
    return first and not options.no_verify


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = RECIPES[options.preset] if options.preset else DEFAULTS[options.data].recipe
    return recipe if options.batch_size is None else replace(recipe, batch_size=options.batch_size)


def _settings(options: argparse.Namespace) -> Settings:
    if options.seeds > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--seeds is for one process: under torchrun give one --seed at a time")
    if (options.root is None) != (options.data in EMBEDDED):
        needed = "is embedded and takes no" if options.data in EMBEDDED else "is read from disk and needs"
        raise ValueError(f"--data {options.data} {needed} --root DIR")
    chosen: dict[str, Any] = {
        "data": options.data,
        "root": None if options.root is None else str(options.root),
        "arch": options.arch or DEFAULTS[options.data].arch,
        "weights": None if options.weights is None else str(options.weights),
        "preset": options.preset or ("adam" if options.data in EMBEDDED else options.data),
        "seed": options.seed,
        "epochs": _recipe(options).epochs,
        "splits": tuple(dict.fromkeys(options.split or ["train"])),
        "experiments": EXPERIMENTS if "all" in options.experiments else tuple(sorted(set(options.experiments))),
    }
    more = ["memorization"] * options.memorization + ["falsifications"] * (options.full and options.data in EMBEDDED)
    chosen["stages"] = tuple([stage for stage in STAGES if stage in options.stages] + more)
    if options.epochs is not None:
        chosen["epochs"] = options.epochs
    chosen["comparison_epochs"] = max(1, chosen["epochs"] // 2)
    if options.full:
        chosen |= {"fine_tuning_epochs": FINE_TUNING.epochs, "comparison_epochs": chosen["epochs"], "full": True}
    if options.quick:
        chosen |= QUICK if options.epochs is None else {**QUICK, "epochs": options.epochs}
    return Settings(**chosen)


# What is printed


def summary(results: Mapping[str, Any]) -> str:
    """Return the printed tables of a run: accuracy per group, what 1a and 1g change, the worst groups of Stage 2."""
    groups = results["groups"]
    header = ["", *groups]
    accuracy = [[f"{part} images", *map(str, results["counts"][part])] for part in results["counts"]] + [
        [f"{part} accuracy, %", *(f"{100 * value:.1f}" for value in values)]
        for part, values in results["accuracy"].items()
    ]
    tables = [_table("Empirical risk minimisation", header, accuracy)]
    split = results["settings"]["splits"][0]
    done = results.get("experiments", {})
    if "1a" in done:
        title = f"1a  Zero the top neurons of the model: change of {split} accuracy, points"
        tables.append(_table(title, header, [_cut(record) for record in done["1a"][split]]))
    if "1g" in done:
        title = "1g  Zero random other neurons: mean change (largest), points"
        tables.append(_table(title, header, _controls(done["1g"][split])))
    if "stage_two" in results:
        rules = list(results["stage_two"]["selections"])
        title = "Stage 2  Worst group of the test images, %; epoch chosen by"
        tables.append(_table(title, ["", *rules], [_worst(arm, rules) for arm in results["stage_two"]["arms"]]))
    if "mitigation" in results.get("fragility", {}):
        title = "Last layer retrained: test accuracy, %"
        rows = [
            [row["name"], *(f"{100 * a:.1f}" for a in row.get("test", ()))]
            for row in results["fragility"]["mitigation"]
        ]
        tables.append(_table(title, header, [row + ["-"] * (len(header) - len(row)) for row in rows]))
    steps = ", ".join(f"{100 / count:.2g}" if count else "-" for count in results["counts"][split])
    return "\n\n".join([*tables, f"One image is {steps} points in these groups. Every number is in the report."])


def _worst(arm: Mapping[str, Any], rules: Sequence[str]) -> list[str]:
    selected = arm["selected"]
    return [arm["name"], *(f"{100 * selected[rule]['worst']:.1f}" if rule in selected else "-" for rule in rules)]


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
