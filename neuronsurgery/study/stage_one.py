"""Stage 1 as a part of a run: every experiment done, or read from the run folder where it was done before."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.critical_sets import DRAWS, Protocol, critical_sets
from neuronsurgery.study.experiments import DISTANCES, EXPERIMENTS, Subject, measure, rank_percentiles
from neuronsurgery.study.run import Parts, RunFolder
from neuronsurgery.study.training import digest

INTERVALS: Final = {
    "level": 0.95,
    "method": "Bonett and Price (2012) for paired proportions: the same images before and after an edit",
    "p": "exact McNemar test",
}


@dataclass(frozen=True, eq=False)
class Trained:
    """What training leaves: a checkpoint for every epoch (0 before training), by epoch loss and accuracy as met in it.

    `where` is the predicate of the layers that are studied.
    """

    model: nn.Module
    checkpoints: Mapping[int, Path]
    trajectory: list[dict[str, Any]]
    where: Callable[[str, nn.Module, Tensor], bool]


def stage_one(folder: RunFolder, data: Any, trained: Trained) -> dict[str, Any]:
    """Return what the experiments of Stage 1 came to, as entries of a run, see `Run.of`.

    What the folder holds is not done again. 1h has splits of its own: halves of the training images, and test images.
    """
    settings = folder.settings
    batch = next(iter(next(iter(data.loaders("train").values()))))
    subject = Subject(
        trained.model,
        _gradients(folder, data, trained, "train"),
        folder.scores("magnitudes", lambda: ns.magnitudes(trained.model, where=trained.where)),
        settings.draws,
        settings.control_draws,
        trained.checkpoints,
        tuple(part[:2] for part in batch),  # two show what follows what, and are run once for every layer
    )
    done: dict[str, dict[str, Any]] = {}
    for name in settings.experiments:
        done[name] = {}
        for split in ("train",) if name == "1h" else settings.splits:
            run = functools.partial(_run, folder, data, trained, subject, name, split)
            done[name][split] = folder.remember(f"{name}-{split}", run)
    found: dict[str, Any] = {
        "layers": [{"name": layer.parameter, "neurons": layer.count} for layer in subject.layout],
        "neurons": subject.layout.count,
        "intervals": INTERVALS,
        "experiments": done,
    }
    if "1f" in done:
        found["missing_distances"] = [distance for distance in DISTANCES if distance > max(trained.checkpoints)]
    return found


def _gradients(folder: RunFolder, data: Any, trained: Trained, split: str) -> ns.Scores:
    return folder.scores(
        "gradients" if split == "train" else f"gradients-{split}",
        lambda: ns.group_grad_norms(trained.model, data.loaders(split), where=trained.where, progress=True),
    )


def _run(
    folder: RunFolder, data: Any, trained: Trained, subject: Subject, name: str, split: str
) -> list[dict[str, Any]]:
    """Return the records of one experiment."""
    started = time.perf_counter()
    kept = folder.parts(f"{name}-{split}", digest(trained.model.state_dict().values()))
    if name == "1b":
        records = rank_percentiles(_gradients(folder, data, trained, split), subject.magnitudes)
    elif name == "1h":
        records = critical_sets(_protocol(folder, data, trained, kept))
    else:
        interventions = EXPERIMENTS[name](replace(subject, kept=kept))
        records = measure(trained.model, interventions, data.loaders(split), kept)
    folder.note_seconds(f"{name} on {split}", time.perf_counter() - started)
    return records


def _protocol(folder: RunFolder, data: Any, trained: Trained, kept: Parts) -> Protocol:
    settings = folder.settings
    return Protocol(
        trained.model,
        trained.where,
        data.loaders("train"),
        data.loaders("test") if len(data.splits.get("test", ())) else {},
        [data.group_names[place] for place in data.minority],
        settings.control_draws if settings.quick else DRAWS,
        kept,
        folder.path / "specs",
    )
