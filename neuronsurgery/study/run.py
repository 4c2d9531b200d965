"""The run folder: what a study has done so far, what it came to, and how it goes on where it was killed.

`run.json` says which run it is; `checkpoints/` and `optimizer.safetensors` are the training's; `scores.safetensors` and
`experiments/*.json` are written when each is done and read instead of being done again; `results.json` gathers every
number, and the report is made from it alone. Each file is there whole or not at all.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.artifacts import write_atomically
from neuronsurgery.study.experiments import (
    DISTANCES,
    EXPERIMENTS,
    Subject,
    control_p_values,
    is_studied,
    measure,
    rank_histograms,
    sensitive_layers,
)

SCHEMA: Final = 1


@dataclass(frozen=True)
class Settings:
    """What a run depends on; two runs of equal settings are the same run.

    Attributes:
        data: the name of the data set.
        root: the folder of a data set that is not embedded, or None.
        arch: the architecture.
        weights: the file of initial weights, or None.
        preset: "adam" or "sgd".
        epochs: passes over the training images.
        seed: of data, weights and batches.
        splits: on which splits the experiments are measured.
        experiments: which ones, "1a" to "1g".
        draws: how many random draws are averaged.
        control_draws: how many matched controls a p-value rests on.
        quick: whether this is only to see that it runs.
    """

    data: str = "synthetic"
    root: str | None = None
    arch: str = "small_resnet"
    weights: str | None = None
    preset: str = "adam"
    epochs: int = 30
    seed: int = 0
    splits: tuple[str, ...] = ("train",)
    experiments: tuple[str, ...] = ("1a", "1g")
    draws: int = 10
    control_draws: int = 100
    quick: bool = False


class RunFolder:
    """A folder that holds one run.

    Args:
        path: the folder; made if it is missing.
        settings: of the run.
        overwrite: delete another run that is there, instead of refusing.

    Raises:
        ValueError: if the folder holds a run of other settings or another version, or files that are no run.
        OSError: if it cannot be written to.
    """

    def __init__(self, path: Path, settings: Settings, *, overwrite: bool = False) -> None:
        self.path = path
        self.settings = settings
        said = {"schema": SCHEMA, "version": version("neuronsurgery"), "settings": _plain(settings)}
        held = path / "run.json"
        if overwrite and (held.exists() or _is_empty(path)):
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        if held.exists():
            _refuse_other(path, said, _read_json(held))
        elif not _is_empty(path):
            raise ValueError(f"{path} holds files that are no run of this study: choose another folder with --out")
        write_atomically(held, json.dumps(said, indent=1).encode())

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of an earlier time, or compute it and write it down."""
        file = self.path / "experiments" / f"{name}.json"
        if file.exists():
            return _read_json(file)
        value = compute()
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(value).encode())
        # Read back, so that a resumed run and an unbroken one go on with the very same values.
        return _read_json(file)

    def note_seconds(self, what: str, seconds: float) -> None:
        """Add to `timings.json` how long something took; apart from the results, which a resumed run must repeat."""
        file = self.path / "timings.json"
        timings = _read_json(file) if file.exists() else {}
        write_atomically(file, json.dumps({**timings, what: round(seconds, 1)}, indent=1).encode())

    def scores(self, name: str, compute: Callable[[], ns.Scores]) -> ns.Scores:
        """Return the scores of an earlier time, or compute them and write them down."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            ns.save_file(compute(), file)
        loaded = ns.load_file(file)
        assert isinstance(loaded, ns.Scores), "this name is only ever given to scores"
        return loaded


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of a run folder.

    Raises:
        FileNotFoundError: if it has none yet.
        ValueError: if they are damaged or of another schema.
    """
    file = path / "results.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} has no results.json: run `neuronsurgery study --out {path}` to its end first")
    results: dict[str, Any] = _read_json(file)
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{file} is of schema {results.get('schema')}; this version reads schema {SCHEMA}")
    timings = path / "timings.json"
    return {**results, "seconds": _read_json(timings)} if timings.exists() else results


def _is_empty(path: Path) -> bool:
    return not path.exists() or not any(path.iterdir())


def _plain(settings: Settings) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return said


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from error


def _refuse_other(path: Path, expected: Mapping[str, Any], found: Any) -> None:
    if not isinstance(found, Mapping) or "settings" not in found:
        raise ValueError(f"{path} holds a run.json that is not of this study: choose another folder with --out")
    differing = [
        f"{key}: this run {value!r}, the folder {found['settings'].get(key)!r}"
        for key, value in expected["settings"].items()
        if found["settings"].get(key) != value
    ]
    differing += [
        f"{key}: this run {expected[key]!r}, the folder {found.get(key)!r}"
        for key in ("schema", "version")
        if found.get(key) != expected[key]
    ]
    if differing:
        raise ValueError(
            f"{path} holds another run; {'; '.join(differing)}: choose another folder with --out, or delete that run "
            f"with --overwrite"
        )


# Stage 1


@dataclass(frozen=True, eq=False)
class Trained:
    """What training leaves for the experiments.

    Attributes:
        model: the trained model.
        checkpoints: the checkpoint of every epoch, 0 before training.
        trajectory: by epoch, loss and accuracy as met in training.
    """

    model: nn.Module
    checkpoints: Mapping[int, Path]
    trajectory: list[dict[str, Any]]


def stage_one(folder: RunFolder, data: Any, trained: Trained, *, progress: bool = True) -> dict[str, Any]:
    """Return the results of Stage 1, every experiment done or read from the folder, and write `results.json`.

    Args:
        folder: the run folder.
        data: the data set, embedded or read from disk: group names, counts and loaders per split.
        trained: the trained model and its checkpoints.
        progress: whether to write lines of progress to standard error.
    """
    model = trained.model
    loaders = data.loaders("train")
    gradients = folder.scores(
        "gradients", lambda: ns.group_grad_norms(model, loaders, where=is_studied, progress=progress)
    )
    magnitudes = folder.scores("magnitudes", lambda: ns.magnitudes(model, where=is_studied))
    settings = folder.settings
    batch = next(iter(next(iter(loaders.values()))))
    subject = Subject(model, gradients, magnitudes, settings.draws, settings.control_draws, trained.checkpoints, batch)
    results = _describe(folder, data, trained, subject)
    done: dict[str, dict[str, Any]] = {
        name: {split: _remembered(folder, data, subject, name, split, progress) for split in settings.splits}
        for name in EXPERIMENTS
        if name in settings.experiments
    }
    if "1b" in settings.experiments:
        done["1b"] = {"train": folder.remember("1b-train", lambda: rank_histograms(subject))}
    results["experiments"] = done
    if "1f" in done:
        results["sensitive_layers"] = {split: sensitive_layers(done["1f"][split]) for split in settings.splits}
        results["missing_distances"] = [distance for distance in DISTANCES if distance > subject.epochs]
    if "1a" in done and "1g" in done:
        results["control_p"] = {
            split: control_p_values(done["1a"][split], done["1g"][split]) for split in settings.splits
        }
    write_atomically(folder.path / "results.json", json.dumps(results, indent=1).encode())
    return results


def _remembered(folder: RunFolder, data: Any, subject: Subject, name: str, split: str, progress: bool) -> Any:
    return folder.remember(f"{name}-{split}", lambda: _measure(folder, data, subject, name, split, progress))


def _measure(folder: RunFolder, data: Any, subject: Subject, name: str, split: str, progress: bool) -> Any:
    started = time.perf_counter()
    interventions = EXPERIMENTS[name](subject)
    if progress:
        sys.stderr.write(f"experiment {name} on {split}: {len(interventions)} edits\n")
    records = measure(subject.model, interventions, data.loaders(split), progress=progress)
    specs = folder.path / "specs"
    specs.mkdir(exist_ok=True)
    if name in ("1a", "1e"):  # the sets that the report names; random edits are a seed away
        for number, said in enumerate(interventions):
            ns.save_file(said.edit, specs / f"{name}-{number:03d}.safetensors")
    folder.note_seconds(f"{name} on {split}", time.perf_counter() - started)
    return records


def _describe(folder: RunFolder, data: Any, trained: Trained, subject: Subject) -> dict[str, Any]:
    def accuracy(split: str) -> list[float]:
        values: list[float] = folder.remember(
            f"accuracy-{split}", lambda: list(ns.evaluate(trained.model, data.loaders(split)).values)
        )
        return values

    splits = list(data.splits)
    return {
        "schema": SCHEMA,
        "version": version("neuronsurgery"),
        "settings": _plain(folder.settings),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "platform": platform.machine(),
        },
        "groups": list(data.group_names),
        "minority": list(data.minority),
        "counts": {split: list(data.splits[split].counts) for split in splits},
        "expected_counts": getattr(data, "expected_counts", None),
        "accuracy": {split: accuracy(split) for split in splits},
        "trajectory": trained.trajectory,
        "layers": [{"name": layer.parameter, "neurons": layer.count} for layer in subject.layout],
        "neurons": subject.layout.count,
    }
