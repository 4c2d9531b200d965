"""The command line: `neuronsurgery study`, `neuronsurgery report`, `neuronsurgery show`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neuronsurgery.study import data
from neuronsurgery.study.claims import render
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.falsifications import falsifications
from neuronsurgery.study.methods import FINE_TUNING
from neuronsurgery.study.models import DEFAULTS, Built, build_model, input_size
from neuronsurgery.study.readers import (
    READERS,
    Loading,
    batches,
    describe_counts,
    digests,
    joined_source,
    training_source,
)
from neuronsurgery.study.run import (
    EXPERIMENTS,
    STAGES,
    RunFolder,
    Settings,
    at_work,
    describe_file,
    describe_run,
    read_results,
    refuse_files,
    refuse_missing_groups,
    write_results,
)
from neuronsurgery.study.seeds import combine, delete_other_seeds, refuse_other_files
from neuronsurgery.study.stage_fragility import stage_fragility
from neuronsurgery.study.stage_memorization import stage_memorization
from neuronsurgery.study.stage_one import Trained, stage_one
from neuronsurgery.study.stage_two import MORE_RATES, RATES, Setting, beside_last_layers, stage_two
from neuronsurgery.study.training import (
    RECIPES,
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
QUICK_COUNTS = {"train": (350, 24, 8, 106), "validation": (20,) * 4, "test": (50,) * 4}
QUICK_HELD_OUT = {"held-out": (175, 12, 4, 53)}
COLUMNS = ("path", "label", "attribute", "split")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0, 1 after an error that names the next step, 2 where the arguments cannot be understood, and 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print(f"neuronsurgery: stopped: {_how_to_go_on(options)}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        room = isinstance(error, OSError) and error.errno in NO_ROOM
        step = ": make room there or give leave to write, and start again to go on" if room else ""
        print(f"neuronsurgery: error: {error}{step}", file=sys.stderr)
        return 1


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.run is not _study:
        return "start it again"
    return f"the same command{', without --overwrite,' if options.overwrite else ''} goes on from here"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuronsurgery", description="Model surgery and the study built on it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    study = commands.add_parser(
        "study",
        help="train a network on data with a spurious correlation and operate on its critical neurons",
        description="The paper from front to back. Stage 1: train by empirical risk minimisation with a checkpoint an "
        "epoch, score every neuron for every group, then zero, replace, disturb and rewind the critical ones, and "
        "random ones beside them. Stage 2: fine-tune against the pruned twin, beside its controls and other methods. "
        "Fragility: who is memorised, without group labels. A run that was killed goes on where it was.",
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
    study.add_argument("--seed", type=_whole(0), default=0, help="of data, weights and batches (default: %(default)s)")
    study.add_argument(
        "--seeds", type=_whole(1), default=1, metavar="N", help="run this many seeds, from --seed on, and compare them"
    )
    study.add_argument("--preset", choices=list(RECIPES), help="how to train (default: adam; on disk, the data's own)")
    study.add_argument("--epochs", type=_whole(1), help="passes over the training images (default: the data's own)")
    study.add_argument("--batch-size", type=_whole(1), help="images per step (default: the preset's)")
    study.add_argument(
        "--fine-tuning-epochs",
        type=_whole(1),
        metavar="N",
        help="Stage 2: passes of the paper's method and its controls (default: 4; 20 with --full)",
    )
    study.add_argument(
        "--comparison-epochs",
        type=_whole(1),
        metavar="N",
        help="Stage 2: passes of methods that start from the first weights (default: two fifths of --epochs; all of "
        "them with --full)",
    )
    study.add_argument(
        "--held-out",
        type=_share,
        metavar="SHARE",
        help="hold this share of the training images out of training, to choose and retrain with; for data without "
        "held-out images of their own (default: none)",
    )
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
        help="Stage 2 at the paper's lengths and with more rates and arms; and where fragility should fail (embedded "
        "data)",
    )
    study.add_argument("--quick", action="store_true", help="few epochs and draws: does it run, not what comes out")
    _add_network_options(study.add_argument_group("network"))
    _add_disk_options(study.add_argument_group("images on disk"))
    _add_hardware_options(study.add_argument_group("hardware"))
    study.add_argument("--overwrite", action="store_true", help="delete the files of another run in the folder")
    study.set_defaults(run=_study)
    report = commands.add_parser("report", help="make the report of a run folder again")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.set_defaults(run=_report)
    show = commands.add_parser(
        "show", help="print what a file of ours holds: neurons, scores, an edit, a checkpoint, results, settings"
    )
    show.add_argument("file", type=Path, metavar="FILE")
    show.set_defaults(run=_show)
    return parser


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--arch",
        help="small_resnet, or any name of torchvision or timm (default: small_resnet; of images on disk, resnet50)",
    )
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="initial weights: safetensors, a torch state dict or a folder"
    )


def _add_disk_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--root", type=Path, metavar="DIR", help="the folder of the data set")
    group.add_argument(
        "--image-size",
        type=_whole(1),
        metavar="N",
        help="height and width that the network is given (default: what timm says of the network, else 224)",
    )
    group.add_argument(
        "--workers", type=_whole(0), default=0, help="processes that decode images (default: %(default)s)"
    )
    group.add_argument("--pin-memory", action="store_true", help="for a faster way to the device")
    group.add_argument("--no-verify", action="store_true", help="do not decode every image before training starts")
    group.add_argument("--table", help="--data folder: the CSV file (default: metadata.csv)")
    for column in COLUMNS:
        group.add_argument(f"--{column}-column", help=f"--data folder: the column's name (default: {column})")


def _add_hardware_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="for instance cuda (default: the CPU)")
    group.add_argument("--bf16", action="store_true", help="train under autocast to bfloat16")
    group.add_argument("--channels-last", action="store_true", help="lay images and weights out channels last")


def _whole(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from the least that makes sense."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, not {text!r}")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 0.5, such as 0.2, not {text!r}")
    return share


def _show(options: argparse.Namespace) -> int:
    print(describe_file(options.file))
    return 0


def _report(options: argparse.Namespace) -> int:
    from neuronsurgery.study.report import write_report

    print(write_report(read_results(options.folder), options.folder))
    return 0


def _study(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    settings = _settings(options)
    _refuse_missing_packages(settings)
    _refuse_missing_device(settings.device)
    seeds = range(settings.seed, settings.seed + options.seeds)
    name = settings.data + ("-quick" if settings.quick else "")
    last = f"s-{seeds[0]}-{seeds[-1]}" if options.seeds > 1 else f"-{settings.seed}"
    path = options.out or Path("runs") / f"{name}-seed{last}"
    if options.seeds > 1:
        refuse_other_files(path, None if options.overwrite else seeds)
    with contextlib.ExitStack() as held:
        if options.seeds > 1:
            runs = {n: _run(options, replace(settings, seed=n), path / f"seed-{n}", held) for n in seeds}
        else:
            runs = {settings.seed: _run(options, settings, path, held)}
        finished = {seed: results for seed, results in runs.items() if results is not None}
        if not finished:
            return 0  # another process of torchrun: the first one goes on alone
        if options.seeds > 1:
            write_results(path, together := combine(finished))
            print(summary_of_seeds(together))
        else:
            print(summary(finished[settings.seed]))
        _report(argparse.Namespace(folder=path))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _run(
    options: argparse.Namespace, settings: Settings, path: Path, held: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Return the results of one run, which is taken up where its folder has it; None on all processes but the first.

    Under `torchrun` the processes share the training by empirical risk minimisation, and the first one keeps other runs
    out of the folder, until `held` is closed.
    """
    dataset = _dataset(options, settings)
    refuse_missing_groups(dataset, settings)
    built = build_model(settings.arch, len(set(dataset.train.targets.tolist())), settings.weights, settings.seed)
    _refuse_misfit(built.model, dataset, settings)
    with distributed(options.device) as rank:
        if rank == 0:
            folder = _taken_up(options, settings, path, digests(dataset), held)
            print(f"{dataset}\n{built.note}\nrun folder: {path}", flush=True)
        if dist.is_initialized():
            dist.barrier()
        if rank > 0:
            folder = RunFolder(path, settings)
        trained = _train(options, folder, dataset, built)
    return _surgery(options, folder, dataset, built, trained) if rank == 0 else None


def _taken_up(
    options: argparse.Namespace, settings: Settings, path: Path, data: Mapping[str, str], held: contextlib.ExitStack
) -> RunFolder:
    """Return the folder of a run, held until `held` is closed; of several seeds the folder above it is, too."""
    if not (path / "run.json").exists():
        refuse_files(path)  # before there is a file of ours
    if options.seeds > 1 and settings.seed == options.seed:
        held.enter_context(at_work(path.parent))
        if options.overwrite:
            delete_other_seeds(path.parent, range(options.seed, options.seed + options.seeds))
    held.enter_context(at_work(path))
    folder = RunFolder(path, settings, overwrite=options.overwrite, data=data)
    folder.remove_abandoned()
    return folder


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
    _refuse_missing_checkpoints(folder.path)
    started = time.perf_counter()
    model = train(
        built.model,
        training_source(dataset),
        folder.path,
        recipe=folder.settings.recipe,
        seed=folder.settings.seed,
        hardware=_hardware(options),
        progress=print_progress,
    )
    folder.note_seconds("training", time.perf_counter() - started)
    checkpoints = {epoch: checkpoint_path(folder.path, epoch) for epoch in checkpoint_epochs(folder.path)}
    return Trained(model, checkpoints, read_trajectory(folder.path), studied(built.head))


def _setting(options: argparse.Namespace, settings: Settings, dataset: Any, trained: Trained, built: Built) -> Setting:
    return Setting(
        trained=trained,
        source=training_source(dataset),
        recipe=settings.recipe,
        seed=settings.seed,
        groups=tuple(dataset.train.counts),
        pretrained=built.pretrained,
        fine_tuning_epochs=settings.fine_tuning_epochs,
        comparison_epochs=settings.comparison_epochs,
        rates=MORE_RATES if settings.full else RATES,
        joined=joined_source(dataset) if settings.full else None,
        full=settings.full,
        **_published(options, built),
    )


def _published(options: argparse.Namespace, built: Built) -> dict[str, Any]:
    """Return the settings that methods were published with for this data set; recipes are for pre-trained weights."""
    defaults = DEFAULTS[options.data]
    return {
        "comparisons": defaults.comparisons if built.pretrained else {},
        "contrast_temperature": defaults.contrast_temperature,
        "strengths": defaults.strengths,
    }


def _hardware(options: argparse.Namespace) -> Hardware:
    return Hardware(options.device, options.bf16, options.channels_last)


def _dataset(options: argparse.Namespace, settings: Settings) -> Any:
    if settings.data in EMBEDDED:
        held_out = QUICK_HELD_OUT if settings.data == "synthetic" else {}
        counts = QUICK_COUNTS | held_out if settings.quick else None
        dataset: Any = EMBEDDED[settings.data](settings.seed, counts=counts)
    else:
        chosen = {name: getattr(settings, f"{name}_column") for name in COLUMNS} | {"table": settings.table}
        dataset = READERS[settings.data](
            options.root,
            size=settings.image_size,
            loading=Loading(options.workers, options.pin_memory),
            verify=_verifies(options, settings),
            **{name: value for name, value in chosen.items() if value is not None},
        )
        print(describe_counts(dataset))
    return dataset if settings.held_out is None else data.hold_out(dataset, settings.held_out, settings.seed)


def _verifies(options: argparse.Namespace, settings: Settings) -> bool:
    """Whether to decode every image now: once, by the first process and for the first seed."""
    first = int(os.environ.get("RANK", "0")) == 0 and settings.seed == options.seed
    return first and not options.no_verify


def _settings(options: argparse.Namespace) -> Settings:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.seeds > 1 and processes > 1:
        raise ValueError("--seeds is for one process: under torchrun give one --seed at a time")
    _refuse_other_options(options)
    recipe, arch = _recipe(options), options.arch or DEFAULTS[options.data].arch
    chosen: dict[str, Any] = {
        **vars(recipe),
        "data": options.data,
        "root": None if options.root is None else str(options.root),
        "arch": arch,
        "weights": None if options.weights is None else str(options.weights),
        "preset": options.preset or ("adam" if options.data in EMBEDDED else options.data),
        "seed": options.seed,
        "splits": tuple(dict.fromkeys(options.split or ["train"])),
        "experiments": EXPERIMENTS if "all" in options.experiments else tuple(sorted(set(options.experiments))),
        "held_out": options.held_out,
        "image_size": None if options.data in EMBEDDED else options.image_size or input_size(arch),
        "device": options.device,
        "bf16": options.bf16,
        "channels_last": options.channels_last,
        "processes": processes,
    }
    if options.data == "folder":
        chosen["table"] = options.table or "metadata.csv"
        chosen |= {f"{name}_column": getattr(options, f"{name}_column") or name for name in COLUMNS}
    more = ["memorization"] * options.memorization + ["falsifications"] * (options.full and options.data in EMBEDDED)
    chosen["stages"] = tuple([stage for stage in STAGES if stage in options.stages] + more)
    return Settings(**chosen | _lengths(options, recipe.epochs))


def _lengths(options: argparse.Namespace, epochs: int) -> dict[str, Any]:
    """The settings that say how long a run takes."""
    lengths: dict[str, Any] = {"comparison_epochs": max(1, 2 * epochs // 5)}
    if options.full:
        lengths = {"fine_tuning_epochs": FINE_TUNING.epochs, "comparison_epochs": epochs, "full": True}
    if options.quick:
        lengths |= QUICK
    asked = {name: getattr(options, name) for name in ("epochs", "fine_tuning_epochs", "comparison_epochs")}
    return lengths | {name: value for name, value in asked.items() if value is not None}


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the preset, at the length that is the data set's own, or what was asked for instead."""
    own = DEFAULTS[options.data].recipe
    recipe = replace(RECIPES[options.preset], epochs=own.epochs) if options.preset else own
    asked = {"epochs": options.epochs, "batch_size": options.batch_size}
    return replace(recipe, **{name: value for name, value in asked.items() if value is not None})


# What is found before any work


def _refuse_other_options(options: argparse.Namespace) -> None:
    """Raise a ValueError if options are given that are for other data, or the root is missing."""
    names = ("table", *(f"{name}_column" for name in COLUMNS))
    given = [name for name in names if getattr(options, name) is not None]
    if options.data in EMBEDDED:
        of_disk = [*("root", "image_size", "workers", "pin_memory", "no_verify"), *given]
        found = ", ".join(f"--{name.replace('_', '-')}" for name in of_disk if getattr(options, name))
        if found:
            raise ValueError(
                f"--data {options.data} is embedded and takes no {found}: leave it out, or choose --data "
                f"{', '.join(READERS)}"
            )
        return
    if options.root is None:
        raise ValueError(f"--data {options.data} is read from disk and needs --root DIR")
    if given and options.data != "folder":
        found = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{found}: only for --data folder, {options.data} has its own: leave it out")


def _refuse_missing_packages(settings: Settings) -> None:
    """Raise one ImportError if packages are missing that the data or the stages need, while nothing is done yet."""
    learned = settings.data == "digits" or not {"2", "fragility", "falsifications"}.isdisjoint(settings.stages)
    needed = {"sklearn": "scikit-learn"} if learned else {}
    needed |= {} if settings.data in EMBEDDED else {"torchvision": "torchvision", "PIL": "Pillow"}
    missing = []
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{package} ({error})")
    if missing:
        raise ImportError(
            f"--data {settings.data} with the stages {', '.join(settings.stages)} needs packages that are not "
            f"installed, {', '.join(missing)}: pip install 'neuronsurgery[study]'"
        )


def _refuse_missing_device(device: str | None) -> None:
    """Raise a ValueError if nothing can be computed on a device."""
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # the former where torch was built without the device
        said = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({said}): leave it out to use the CPU") from error


def _refuse_misfit(model: nn.Module, dataset: Any, settings: Settings) -> None:
    """Raise a ValueError if a network does not take the images of a data set; found on a copy of the network."""
    few = dataset.train.subset(torch.arange(min(2, len(dataset.train))))
    if settings.data not in EMBEDDED:
        few = replace(few, loading=Loading())  # without workers, which take longer to start than two images
    images, _, _ = next(iter(batches(few, 2)))
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(images)
    except Exception as error:  # whatever a network says to images of the wrong size: timm asserts
        size, made_for = images.shape[-1], input_size(settings.arch)
        on_disk = settings.data not in EMBEDDED and size != made_for
        step = f"pass --image-size {made_for}, for which it is made" if on_disk else "choose another one with --arch"
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{settings.arch} does not take images of {size} x {size} ({said}): {step}") from error


def _refuse_missing_checkpoints(path: Path) -> None:
    """Raise a FileNotFoundError if checkpoints were taken out of the middle of a training."""
    held = checkpoint_epochs(path)
    missing = sorted(set(range(max(held, default=0))) - set(held))
    if missing:
        raise FileNotFoundError(
            f"{path}: the checkpoints of epochs {', '.join(map(str, missing))} are missing, the first of them "
            f"{checkpoint_path(path, missing[0])}: put them back, or train again with --overwrite"
        )


# What is printed


def summary(results: Mapping[str, Any]) -> str:
    """Return the printed tables of a run: accuracy per group, what 1a and 1g change, the worst groups of Stage 2."""
    groups = results["groups"]
    header = ["", *groups]
    accuracy = [[f"{part} images", *map(str, results["counts"][part])] for part in results["counts"]] + [
        [f"{part} accuracy, %", *_per_group(values, results["counts"][part])]
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
    if "1h" in done:
        title = "1h  Critical sets found on half A: what they take on half B, points; p among random sets"
        rows = [_set(record) for record in done["1h"]["train"]]
        tables.append(_table(title, ["", "own", "worst other", "net", "p"], rows))
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


def summary_of_seeds(together: Mapping[str, Any]) -> str:
    """Return the printed tables of several seeds, of what they have: accuracy, claims, worst groups, memorisation."""
    accuracy = [
        [f"{split} accuracy, %", *_per_group(values, together["counts"][split])]
        for split, values in together["accuracy"].items()
    ]
    tables = [_table("Empirical risk minimisation", ["", *together["groups"]], accuracy)] if accuracy else []
    if together["claims"]:
        tables.append(render(together["claims"]))
    if "critical_sets" in together:
        names = ("own", "worst_other", "net", "control_net")
        rows = [
            [f"{row['group']}, k = {row['k']}", *(_percent(row.get(name, {})) for name in names)]
            for row in together["critical_sets"]
        ]
        title = "1h  Critical sets found on half A: what they take on half B, points"
        tables.append(_table(title, ["", "own", "worst other", "net", "net of the controls"], rows))
    if "stage_two" in together:
        rules = list(together["stage_two"]["selections"])
        title = "Stage 2  Worst group of the test images, %; epoch chosen by"
        tables.append(_table(title, ["", *rules], [_worst(arm, rules) for arm in together["stage_two"]["arms"]]))
    if "mitigation" in together.get("fragility", {}):
        retrained = together["fragility"]
        rows = [[row["name"], _percent(row["worst"])] for row in retrained["mitigation"]]
        rows += [[name, "-"] for name in retrained["impossible_rows"]]
        tables.append(_table("Last layer retrained: worst group of the test images, %", ["", "worst group"], rows))
    if "memorization" in together:
        whole = together["memorization"]["minority_difference"]
        named = [("all minorities", whole), *((row["group"], row) for row in whole["groups"])]
        title = "Memorisation: score above the rest of the class, points"
        tables.append(_table(title, ["", "difference"], [[name, _percent(row)] for name, row in named]))
    said = f"Means over {len(together['seeds'])} seeds [Student's 95 % interval]; - where some seed has none."
    return "\n\n".join([*tables, f"{said} Every number is in the report."])


def _per_group(accuracies: Iterable[float | Mapping[str, Any]], counts: Iterable[int]) -> list[str]:
    """The accuracies in percent, and a dash for groups without images, which have none."""
    values = iter(accuracies)
    return [_percent(next(values)) if count else "-" for count in counts]


def _percent(found: float | Mapping[str, Any]) -> str:
    """A share in percent, or its mean over seeds with the interval; a dash for a summary that some seed lacks."""
    if not isinstance(found, Mapping):
        return f"{100 * found:.1f}"
    ends = ", ".join(f"{100 * found[end]:.1f}" for end in ("low", "high") if end in found)
    return f"{100 * found['mean']:.1f} [{ends}]" if ends else "-"


def _worst(arm: Mapping[str, Any], rules: Sequence[str]) -> list[str]:
    selected = arm["selected"]
    return [arm["name"], *(_percent(selected[rule]["worst"]) if rule in selected else "-" for rule in rules)]


def _cut(record: Mapping[str, Any]) -> list[str]:
    chosen_for = "" if record["chosen_for"] == "all" else f" of {record['chosen_for']}"
    points = _points(change["change"] for change in record["changes"])
    return [f"top-{record['k']} by {record['criterion']}{chosen_for}", *points]


def _set(record: Mapping[str, Any]) -> list[str]:
    name = record["examples"] or f"{record['control']} like {record['chosen_for']}"
    if "impossible" in record:
        return [f"{name}: {record['impossible']}", *("-" * 4)]
    p = "-" if record["p_value"] is None else f"{record['p_value']:.2f}"
    points = _points(record[key] for key in ("own", "worst_other", "net"))
    return [f"{name}, k = {record['k']} ({record['neurons']} found)", *points, p]


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
