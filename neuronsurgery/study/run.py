"""The run folder: what a study has done so far, what it came to, and how it goes on where it was killed.

`run.json` says which run it is; `checkpoints/` and `optimizer.safetensors` are the training's; `scores.safetensors` and
`experiments/*.json` are written when each is done and read instead of being done again; `results.json` gathers every
number, and the report is made from it alone. Each file is there whole or not at all.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.artifacts import write_atomically

SCHEMA: Final = 1
ADDED_TO: Final = ("splits", "experiments", "stages")
"""Settings that may differ from those of a run that is there: what is asked for is added to what it has."""


EXPERIMENTS: Final = ("1a", "1b", "1c", "1d", "1e", "1f", "1g")
STAGES: Final = ("1", "2", "fragility")
ON_REQUEST: Final = ("memorization", "falsifications")
"""Stages that a run does only where it is asked to."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; two runs are the same run if all but `ADDED_TO` is equal.

    Attributes:
        data: the name of the data set.
        root: the folder of a data set that is not embedded, or None.
        arch: the architecture.
        weights: the file of initial weights, or None.
        preset: "adam" or "sgd".
        epochs: passes over the training images.
        seed: of data, weights and batches.
        splits: on which splits the experiments are measured.
        stages: which stages, of `STAGES` and `ON_REQUEST`.
        experiments: which ones of Stage 1, "1a" to "1g".
        draws: how many random draws are averaged.
        control_draws: how many matched controls a p-value rests on.
        fine_tuning_epochs: of Stage 2.
        comparison_epochs: of the methods of Stage 2 that train from the first weights again.
        full: whether Stage 2 searches more rates.
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
    stages: tuple[str, ...] = STAGES
    experiments: tuple[str, ...] = EXPERIMENTS
    draws: int = 10
    control_draws: int = 30
    fine_tuning_epochs: int = 5
    comparison_epochs: int = 15
    full: bool = False
    quick: bool = False


class RunFolder:
    """A folder that holds one run.

    Attributes:
        path: the folder.
        settings: of the run: those asked for, and the stages, experiments and splits of earlier times.

    Args:
        path: the folder; made if it is missing.
        settings: what is asked for.
        overwrite: delete another run that is there, instead of refusing.

    Raises:
        ValueError: if the folder holds a run of other settings or another version, or files that are no run.
        OSError: if it cannot be written to.
    """

    def __init__(self, path: Path, settings: Settings, *, overwrite: bool = False) -> None:
        self.path = path
        said = {"schema": SCHEMA, "version": version("neuronsurgery"), "settings": _plain(settings)}
        held = path / "run.json"
        if overwrite and (held.exists() or _is_empty(path)):
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        if held.exists():
            found = _read_json(held)
            _refuse_other(path, said, found)
            settings = _added(settings, found["settings"])
        elif not _is_empty(path):
            raise ValueError(f"{path} holds files that are no run of this study: choose another folder with --out")
        self.settings = settings
        write_atomically(held, json.dumps({**said, "settings": _plain(settings)}, indent=1).encode())

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
        """Add to `timings.json` how long something took; apart from the results, which a resumed run must repeat.

        What is there stays: once done, a thing is only read again.
        """
        file = self.path / "timings.json"
        timings = _read_json(file) if file.exists() else {}
        write_atomically(file, json.dumps({what: round(seconds, 1), **timings}, indent=1).encode())

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


def refuse_missing_groups(data: Any, settings: Settings) -> None:
    """Raise a ValueError, before any training, if a group has no images in a split that the run looks at.

    Args:
        data: the data set: group names and counts per split.
        settings: of the run; Stage 1 looks at the splits that it is measured on, the others at all.
    """
    looked_at = {"train", *settings.splits} | (set() if settings.stages == ("1",) else set(data.splits))
    empty = [
        f"{split}: {', '.join(names)}"
        for split in data.splits
        if split in looked_at
        for names in [[n for n, count in zip(data.group_names, data.splits[split].counts, strict=True) if not count]]
        if names
    ]
    if empty:
        raise ValueError(
            f"groups without images in {'; '.join(empty)}: give the data set images of them, leave them out of its "
            f"table, or, if they are only missing in validation or test, run --stages 1 on the splits that have them"
        )


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` of a run folder: every number of the report."""
    write_atomically(path / "results.json", json.dumps(results, indent=1).encode())


def describe_run(folder: RunFolder, data: Any, model: nn.Module, trajectory: Any, note: str) -> dict[str, Any]:
    """Return the entries of `results.json` that belong to no stage: what was trained on what, and how well.

    Args:
        folder: the run folder.
        data: the data set: group names, minority, counts and loaders per split.
        model: the trained model.
        trajectory: by epoch, loss and accuracy as met in training.
        note: where the model's first weights came from.
    """

    def accuracy(split: str) -> list[float]:
        values: list[float] = folder.remember(
            f"accuracy-{split}", lambda: list(ns.evaluate(model, data.loaders(split)).values)
        )
        return values

    splits = [split for split in data.splits if all(data.splits[split].counts)]
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
        "network": note,
        "groups": list(data.group_names),
        "minority": list(data.minority),
        "counts": {split: list(data.splits[split].counts) for split in splits},
        "expected_counts": getattr(data, "expected_counts", None),
        "accuracy": {split: accuracy(split) for split in splits},
        "trajectory": trajectory,
    }


def _added(settings: Settings, held: Mapping[str, Any]) -> Settings:
    """Return the settings with those of a run that is there added: what it has is kept in its results."""
    splits, experiments, stages = (
        (*held.get(key, ()), *asked)
        for key, asked in zip(ADDED_TO, (settings.splits, settings.experiments, settings.stages), strict=True)
    )
    return replace(
        settings,
        splits=tuple(dict.fromkeys(splits)),
        experiments=tuple(name for name in EXPERIMENTS if name in experiments),
        stages=tuple(name for name in (*STAGES, *ON_REQUEST) if name in stages),
    )


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
    if not isinstance(found, Mapping) or not isinstance(found.get("settings"), Mapping):
        raise ValueError(f"{path} holds a run.json that is not of this study: choose another folder with --out")
    differing = [
        f"{key}: this run {value!r}, the folder {found['settings'].get(key)!r}"
        for key, value in expected["settings"].items()
        if found["settings"].get(key) != value and key not in ADDED_TO
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
