"""Stage 1 as a part of a run: every experiment done, or read from the run folder where it was done before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.critical_sets import DRAWS, Protocol, critical_sets
from neuronsurgery.study.experiments import (
    DISTANCES,
    EXPERIMENTS,
    Subject,
    measure,
    rank_percentiles,
)
from neuronsurgery.study.run import RunFolder
from neuronsurgery.study.training import digest

INTERVALS: Final = {
    "level": 0.95,
    "method": "Bonett and Price (2012) for paired proportions: the same images before and after an edit",
    "p": "exact McNemar test",
}


@dataclass(frozen=True, eq=False)
class Trained:
    """What training leaves for the stages that follow it.

    Attributes:
        model: the trained model.
        checkpoints: the checkpoint of every epoch, 0 before training.
        trajectory: by epoch, loss and accuracy as met in training.
        where: which layers are studied.
    """

    model: nn.Module
    checkpoints: Mapping[int, Path]
    trajectory: list[dict[str, Any]]
    where: Callable[[str, nn.Module, Tensor], bool]


def stage_one(folder: RunFolder, data: Any, trained: Trained, *, progress: bool = True) -> dict[str, Any]:
    """Return what the experiments of Stage 1 came to, as entries of a run, see `Run.of`.

    Args:
        folder: the run folder; an experiment that it holds is not done again.
        data: the data set, embedded or read from disk: group names, counts and loaders per split.
        trained: the trained model and its checkpoints.
        progress: whether to write lines of progress to standard error.
    """
    settings = folder.settings
    subject = _subject(folder, data, trained, progress)
    done: dict[str, dict[str, Any]] = {}
    for name in settings.experiments:
        if name == "1h":
            done[name] = {"train": folder.remember("1h-train", lambda: _critical_sets(folder, data, trained, progress))}
            continue
        done[name] = {split: _experiment(folder, data, subject, name, split, progress) for split in settings.splits}
    found: dict[str, Any] = {
        "layers": [{"name": layer.parameter, "neurons": layer.count} for layer in subject.layout],
        "neurons": subject.layout.count,
        "intervals": INTERVALS,
        "experiments": done,
    }
    if "1f" in done:
        found["missing_distances"] = [distance for distance in DISTANCES if distance > subject.epochs]
    return found


def _subject(folder: RunFolder, data: Any, trained: Trained, progress: bool) -> Subject:
    batch = next(iter(next(iter(data.loaders("train").values()))))
    return Subject(
        trained.model,
        _gradients(folder, data, trained.model, "train", trained.where, progress),
        folder.scores("magnitudes", lambda: ns.magnitudes(trained.model, where=trained.where)),
        folder.settings.draws,
        folder.settings.control_draws,
        trained.checkpoints,
        tuple(part[:2] for part in batch),  # two show what follows what, and are run once for every layer
    )


def _gradients(folder: RunFolder, data: Any, model: nn.Module, split: str, where: Any, progress: bool) -> ns.Scores:
    name = "gradients" if split == "train" else f"gradients-{split}"
    return folder.scores(name, lambda: ns.group_grad_norms(model, data.loaders(split), where=where, progress=progress))


def _experiment(folder: RunFolder, data: Any, subject: Subject, name: str, split: str, progress: bool) -> Any:
    def ranked() -> list[dict[str, Any]]:
        layers = {layer.parameter for layer in subject.layout}
        own = _gradients(folder, data, subject.model, split, lambda name, *_: name in layers, progress)
        return rank_percentiles(own, subject.magnitudes)

    def measured() -> list[dict[str, Any]]:
        return _measure(folder, data, subject, name, split, progress)

    return folder.remember(f"{name}-{split}", ranked if name == "1b" else measured)


def _measure(
    folder: RunFolder, data: Any, subject: Subject, name: str, split: str, progress: bool
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    kept = folder.parts(f"{name}-{split}", digest(subject.model.state_dict().values()))
    interventions = EXPERIMENTS[name](replace(subject, kept=kept))
    records = measure(subject.model, interventions, data.loaders(split), kept=kept, progress=progress)
    folder.note_seconds(f"{name} on {split}", time.perf_counter() - started)
    return records


def _critical_sets(folder: RunFolder, data: Any, trained: Trained, progress: bool) -> list[dict[str, Any]]:
    """Return the records of 1h, which has splits of its own: halves of the training images, and the test images."""
    started = time.perf_counter()
    settings = folder.settings
    protocol = Protocol(
        trained.model,
        trained.where,
        data.loaders("train"),
        data.loaders("test") if len(data.splits.get("test", ())) else {},
        [data.group_names[place] for place in data.minority],
        settings.control_draws if settings.quick else DRAWS,
        folder.parts("1h-train", digest(trained.model.state_dict().values())),
        folder.path / "specs",
        progress,
    )
    records = critical_sets(protocol)
    folder.note_seconds("1h", time.perf_counter() - started)
    return records
