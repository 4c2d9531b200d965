"""What `neuronsurgery study` does: the settings that are asked for made whole, data and network, and every stage."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from neuronsurgery.study import data, readers, training
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.methods import FINE_TUNING
from neuronsurgery.study.models import DEFAULTS, Built, build_model, input_size
from neuronsurgery.study.pictures import pictures_of
from neuronsurgery.study.progress import TRAINING, Steps, steps_of
from neuronsurgery.study.report import write_report
from neuronsurgery.study.run import (
    RunFolder,
    at_work,
    describe_run,
    read_results,
    refuse_files,
    refuse_missing_groups,
    write_results,
)
from neuronsurgery.study.seeds import delete_other_seeds, refuse_other_files
from neuronsurgery.study.settings import COLUMNS, EXPERIMENTS, STAGES, Options, Settings
from neuronsurgery.study.stage_fragility import stage_fragility
from neuronsurgery.study.stage_one import Trained, stage_one
from neuronsurgery.study.stage_two import Setting, beside_last_layers, make_arms, stage_two
from neuronsurgery.study.summary import summary
from neuronsurgery.study.table import Run, combine

EMBEDDED = {"synthetic": data.synthetic, "digits": data.digits}
QUICK = {"epochs": 5, "draws": 2, "control_draws": 5, "fine_tuning_epochs": 1, "comparison_epochs": 2, "quick": True}
QUICK_COUNTS = {"train": (350, 24, 8, 106), "validation": (20,) * 4, "test": (50,) * 4}
QUICK_HELD_OUT = {"held-out": (175, 12, 4, 53)}

TIMED: Final = 16
"""Images in the pass that is timed before anything is trained."""


def study(given: Mapping[str, Any]) -> None:
    """Run what is asked for, by the fields of `Options`; write its results and its report, and print them."""
    started = time.perf_counter()
    options = make_options(given)
    _refuse_missing_packages(options)
    _refuse_missing_device(options.device)
    path = options.out or _usual_folder(options)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--out {path} is a file: name a folder, which is made if it is missing")
    with contextlib.ExitStack() as held:
        print(summary(_run_seeds(options, path, held) if options.seeds > 1 else _run(options, path, held)))
        print(report(path))
    print(f"{time.perf_counter() - started:.0f} s")


def report(path: Path) -> Path:
    """Make the report of a run folder again, and return the page."""
    return write_report(read_results(path), path)


def _usual_folder(options: Options) -> Path:
    name = options.data + ("-quick" if options.quick else "")
    last = f"s-{options.seed}-{options.seed + options.seeds - 1}" if options.seeds > 1 else f"-{options.seed}"
    return Path("runs") / f"{name}-seed{last}"


def _run_seeds(options: Options, path: Path, held: contextlib.ExitStack) -> Run:
    """Return the results of several seeds, each of which is a run of its own."""
    seeds = range(options.seed, options.seed + options.seeds)
    refuse_other_files(path, None if options.overwrite else seeds)
    finished = {}
    for place, seed in enumerate(seeds, start=1):
        sys.stderr.write(f"seed {seed}, {place} of {len(seeds)}\n")
        finished[seed] = _run(replace(options, seed=seed), path / f"seed-{seed}", held, first=options.seed)
        report(path / f"seed-{seed}")
    write_results(path, together := combine(finished))
    return together


def _run(options: Options, path: Path, held: contextlib.ExitStack, first: int | None = None) -> Run:
    """Return the results of one run, which is taken up where its folder has it.

    Other runs are kept out of the folder until `held` is closed. Of several seeds, `first` is the first one.
    """
    dataset = _dataset(options, verify=first in (None, options.seed))
    refuse_missing_groups(dataset, options)
    built = build_model(options.arch, len(set(dataset.train.targets.tolist())), options.weights, options.seed)
    per_step = _refuse_misfit(built.model, dataset, options)
    folder = _taken_up(options, path, readers.digests(dataset), held, first)
    print(f"{dataset}\n{built.note}\nrun folder: {path}", flush=True)
    folder.steps = _steps(folder, dataset, built, per_step)
    return _surgery(folder, dataset, built, _train(folder, dataset, built))


def _taken_up(
    options: Options, path: Path, data: Mapping[str, str], held: contextlib.ExitStack, first: int | None
) -> RunFolder:
    """Return the folder of a run, held until `held` is closed; of several seeds the folder above it is, too."""
    if not (path / "run.json").exists():
        refuse_files(path)  # before there is a file of ours
    if options.seed == first:
        held.enter_context(at_work(path.parent))
        if options.overwrite:
            delete_other_seeds(path.parent, range(first, first + options.seeds))
    held.enter_context(at_work(path))
    folder = RunFolder(path, options, overwrite=options.overwrite, data=data)
    folder.remove_abandoned()
    return folder


def _steps(folder: RunFolder, dataset: Any, built: Built, per_step: float) -> Steps:
    """Return the steps of a run, after it was said what of them is left to do and how long that may take."""
    settings = folder.settings
    lengths = {"comparison": float(settings.comparison_epochs)}
    arms = {
        f"stage-2-{arm.slug}": (arm.name, lengths.get(arm.family, 2.0 * settings.fine_tuning_epochs))
        for arm in make_arms(_setting(settings, dataset, Trained(built.model, {}, [], studied(built.head)), built))
    }
    steps = steps_of(settings, arms, [split for split in ("train", "held-out") if split in dataset.splits])
    steps.per_epoch = per_step * -(-len(dataset.train) // settings.batch_size)
    trained = max(training.checkpoint_epochs(folder.path), default=0)
    found = [name for name in steps.costs if folder.holds(name)] + [TRAINING] * (trained >= settings.epochs)
    steps.announce(found, 0 if trained >= settings.epochs else trained)
    return steps


def _train(folder: RunFolder, dataset: Any, built: Built) -> Trained:
    _refuse_missing_checkpoints(folder.path)
    started = time.perf_counter()

    def say(report: training.EpochReport) -> None:
        folder.steps.epoch(report, report.epoch, report.epochs, report.seconds)

    model = training.train(
        built.model,
        readers.training_source(dataset),
        folder.path,
        recipe=folder.settings.recipe,
        seed=folder.settings.seed,
        hardware=_hardware(folder.settings),
        progress=say,
    )
    folder.steps.end(TRAINING, worked=False)  # later steps are timed by one another
    folder.note_seconds("training", time.perf_counter() - started)
    held = training.checkpoint_epochs(folder.path)
    checkpoints = {epoch: training.checkpoint_path(folder.path, epoch) for epoch in held}
    return Trained(model, checkpoints, training.read_trajectory(folder.path), studied(built.head))


def _surgery(folder: RunFolder, dataset: Any, built: Built, trained: Trained) -> Run:
    """Return the results of every stage, written down after each."""
    settings = folder.settings
    results = describe_run(folder, dataset, trained.model, trained.trajectory, built.note)
    results["pictures"] = folder.remember("pictures", lambda: pictures_of(dataset))
    setting = _setting(settings, dataset, trained, built)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "1": lambda: stage_one(folder, dataset, trained),
        "2": lambda: {"stage_two": stage_two(folder, dataset, setting)},
        "fragility": lambda: {"fragility": stage_fragility(folder, dataset, trained)},
    }
    for name in settings.stages:
        results |= stages[name]()
        if name == "fragility" and "stage_two" in results and "mitigation" in results["fragility"]:
            results["fragility"]["mitigation"] += beside_last_layers(results["stage_two"])
        write_results(folder.path, Run.of(results))
    return Run.of(results)


def _setting(settings: Settings, dataset: Any, trained: Trained, built: Built) -> Setting:
    return Setting(
        trained=trained,
        source=readers.training_source(dataset),
        recipe=settings.recipe,
        seed=settings.seed,
        pretrained=built.pretrained,
        fine_tuning_epochs=settings.fine_tuning_epochs,
        comparison_epochs=settings.comparison_epochs,
        joined=readers.joined_source(dataset) if settings.full else None,
        full=settings.full,
        hardware=_hardware(settings),
        **_published(settings, built),
    )


def _published(settings: Settings, built: Built) -> dict[str, Any]:
    """Return the settings that methods were published with for this data set; recipes are for pre-trained weights."""
    defaults = DEFAULTS[settings.data]
    return {
        "comparisons": defaults.comparisons if built.pretrained else {},
        "contrast_temperature": defaults.contrast_temperature,
        "strengths": defaults.strengths,
    }


def _hardware(settings: Settings) -> training.Hardware:
    return training.Hardware(settings.device, settings.bf16, settings.channels_last)


def _dataset(options: Options, verify: bool) -> Any:
    """Return the data set; of images on disk, all are decoded if they are to be verified."""
    if options.data in EMBEDDED:
        held_out = QUICK_HELD_OUT if options.data == "synthetic" else {}
        counts = QUICK_COUNTS | held_out if options.quick else None
        dataset: Any = EMBEDDED[options.data](options.seed, counts=counts)
    else:
        chosen = {name: getattr(options, f"{name}_column") for name in COLUMNS} | {"table": options.table}
        dataset = readers.READERS[options.data](
            options.root,
            size=options.size,
            loading=readers.Loading(options.workers, pin_memory=options.device is not None),
            verify=verify and not options.no_verify,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        dataset = dataset.normalized(options.mean or readers.IMAGENET_MEAN, options.std or readers.IMAGENET_STD)
        print(readers.describe_counts(dataset))
    return dataset if options.held_out is None else data.hold_out(dataset, options.held_out, options.seed)


def make_options(given: Mapping[str, Any]) -> Options:
    """Return all options: what is given, and else what follows from the data, the preset, `--full` and `--quick`."""
    name = given.get("data", "synthetic")
    defaults = DEFAULTS[name]
    recipe = defaults.recipe
    if "preset" in given:
        recipe = replace(training.RECIPES[given["preset"]], epochs=recipe.epochs)
    recipe = replace(recipe, **{key: given[key] for key in ("epochs", "batch_size") if key in given})
    chosen = {**vars(recipe), "arch": defaults.arch, "preset": "adam" if name in EMBEDDED else name}
    chosen["comparison_epochs"] = max(1, 2 * recipe.epochs // 5)
    if given.get("full"):
        chosen |= {"fine_tuning_epochs": FINE_TUNING.epochs, "comparison_epochs": recipe.epochs}
    if given.get("quick"):
        chosen |= QUICK
    if name not in EMBEDDED and "size" not in given:
        chosen["size"] = input_size(given.get("arch", defaults.arch))
    if name == "folder":
        chosen |= {"table": "metadata.csv", **{f"{column}_column": column for column in COLUMNS}}
    chosen |= given
    for key, every in {"experiments": EXPERIMENTS, "stages": STAGES}.items():
        if key in given:
            chosen[key] = tuple(each for each in every if each in given[key] or "all" in given[key])
    return Options(**chosen)


# What is found before any work


def _refuse_missing_packages(settings: Settings) -> None:
    """Raise one ImportError if packages are missing that the data or the stages need, while nothing is done yet."""
    needed = {"scipy": "scipy", "polars": "polars", "altair": "altair", "vl_convert": "vl-convert-python"}
    needed |= {"jinja2": "Jinja2", "PIL": "Pillow"}
    if settings.data == "digits" or not {"2", "fragility"}.isdisjoint(settings.stages):
        needed["sklearn"] = "scikit-learn"
    if settings.data not in EMBEDDED:
        needed["torchvision"] = "torchvision"
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
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # the former where torch was built without the device
        said = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({said}): leave it out to use the CPU") from error


def _refuse_misfit(model: nn.Module, dataset: Any, settings: Settings) -> float:
    """Return about how many seconds a step of training takes, from a pass forward on a copy of the network, or 0.

    Raises:
        ValueError: if the network does not take the images of the data set.
    """
    few = dataset.train.subset(torch.arange(min(2, len(dataset.train))))
    if settings.data not in EMBEDDED:
        few = replace(few, loading=readers.Loading())  # without workers, which take longer to start than two images
    images, _, _ = next(iter(readers.batches(few, 2)))
    network, many = copy.deepcopy(model).eval(), images[:1].expand(TIMED, *images.shape[1:])
    try:
        with torch.no_grad():
            network(images)
            seconds = min(timeit.repeat(functools.partial(network, many), number=1, repeat=3))  # the first one is slow
    except Exception as error:  # whatever a network says to images of the wrong size: timm asserts
        size, made_for = images.shape[-1], input_size(settings.arch)
        on_disk = settings.data not in EMBEDDED and size != made_for
        step = f"pass --size {made_for}, for which it is made" if on_disk else "choose another one with --arch"
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{settings.arch} does not take images of {size} x {size} ({said}): {step}") from error
    passes = 3 * settings.batch_size / TIMED  # a step goes back, too, which takes about twice as long
    return 0.0 if settings.device else passes * seconds  # it was timed on the CPU


def _refuse_missing_checkpoints(path: Path) -> None:
    """Raise a FileNotFoundError if checkpoints were taken out of the middle of a training."""
    held = training.checkpoint_epochs(path)
    missing = sorted(set(range(max(held, default=0))) - set(held))
    if missing:
        raise FileNotFoundError(
            f"{path}: the checkpoints of epochs {', '.join(map(str, missing))} are missing, the first of them "
            f"{training.checkpoint_path(path, missing[0])}: put them back, or train again with --overwrite"
        )
