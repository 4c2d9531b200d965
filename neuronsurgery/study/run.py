"""The run folder: what a study has done so far, what it came to, and how it goes on where it was killed.

`run.json` says which run it is, on which images; `checkpoints/` and `optimizer.safetensors` are the training's; scores
and `experiments/*.json` are written when each is done and read instead of being done again, and `parts/` holds what one
of them has come to so far; `table.csv` gathers every number, `results.json` says of what, and the report is made from
these two alone. Each file is there whole or not at all. While a run is at work in the folder, `.lock` is locked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.atomic import locked, remove_abandoned, write_atomically
from neuronsurgery.study.options import flag_of
from neuronsurgery.study.progress import Steps
from neuronsurgery.study.settings import EXPERIMENTS, STAGES, Settings
from neuronsurgery.study.table import SCHEMA, Run, read_run, write_run

ADDED_TO: Final = ("splits", "experiments", "stages")
"""Settings that may differ from those of a run that is there: what is asked for is added to what it has."""

MADE: Final = (
    "optimizer.safetensors",
    "checkpoints/epoch-*.safetensors",
    "results.json",
    "table.csv",
    "parts/*/*.json",
    "experiments/*.json",
    "gradients*.safetensors",
    "magnitudes.safetensors",
    "specs/*.safetensors",
    "stage-2/*/optimizer.safetensors",
    "stage-2/*/checkpoints/epoch-*.safetensors",
    "timings.json",
    "report.html",
    "figures/*.svg",
    "run.json",
)
"""The files that the study makes in a run folder, in the order in which they are deleted: without the optimiser's file
a training starts anew, and while `run.json` is there the folder is known as a run."""

LOCK: Final = ".lock"
"""The file that a run has locked while it is at work in a folder."""


class Parts(dict[str, Any]):
    """The parts of something that takes long, JSON values by name, each written down when it is done.

    A part should be done in seconds: a run that is killed again and again must get past it. Without a folder they are
    kept in memory. A file of another `key`, what they depend on, or a damaged one is as good as none.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        super().__init__()
        self._folder, self._key = folder, key
        for file in [] if folder is None else sorted(folder.glob("*.json")):
            with contextlib.suppress(ValueError):
                found = read_json(file)
                if isinstance(found, dict) and found.get("depends on") == key:
                    self.update(found["parts"])

    def keep(self, parts: Mapping[str, Any]) -> None:
        """Write down some parts in one file, and have them from now on as they will be read from it."""
        data = json.dumps({"depends on": self._key, "parts": parts})
        if self._folder is not None:
            number = sum(1 for _ in self._folder.glob("*.json"))
            _write(self._folder / f"{number:05d}.json", data.encode())
        self.update(json.loads(data)["parts"])

    def of(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return one part: as it was kept, or compute and keep it."""
        if name not in self:
            self.keep({name: compute()})
        return self[name]


class RunFolder:
    """A folder that holds one run.

    `settings` are those asked for, with the stages, experiments and splits that the run there has. `overwrite` deletes
    the files of another run that is there, instead of refusing; files that no run makes stay. `data` has a digest of
    each split, by name, to be the same whenever the run is taken up; None where they are not known. A ValueError
    refuses a run of other settings, of other images or another version, and files that are no run.
    """

    def __init__(
        self, path: Path, settings: Settings, *, overwrite: bool = False, data: Mapping[str, str] | None = None
    ) -> None:
        said = {"schema": SCHEMA, "version": version("neuronsurgery"), "settings": _plain(settings)}
        held = path / "run.json"
        if not held.exists():
            refuse_files(path)
        elif overwrite:
            _read_run(path)  # refuses what is of something else
            _delete(path, [file for file in made_files(path) if file != held])  # which is replaced below
        else:
            found = _read_run(path)
            _refuse_other(path, said, found)
            data = _same_data(path, data, found.get("data"))
            settings = _added(settings, found["settings"])
        self.path, self.settings, self.steps = path, settings, Steps()
        self.data = None if data is None else dict(data)
        said |= {"settings": _plain(settings)} | ({} if data is None else {"data": dict(data)})
        _write(held, json.dumps(said, indent=1).encode())

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of an earlier time, or compute it and write it down."""
        file = self._kept_in(name)
        if not file.exists():
            self.steps.begin(name)
            _write(file, json.dumps(compute()).encode())
            self.steps.end(name)
        self.steps.end(name, worked=False)
        parts = self.path / "parts" / name
        for file_of_part in (*parts.glob("*.json"), *parts.glob(".*.json.*")):
            file_of_part.unlink(missing_ok=True)
        for empty in (parts, parts.parent):
            with contextlib.suppress(OSError):  # there is none, or it has parts of something else
                empty.rmdir()
        # Read back, so that a resumed run and an unbroken one go on with the very same values.
        return read_json(file)

    def holds(self, name: str) -> bool:
        """Whether `remember` need not compute it."""
        return self._kept_in(name).exists()

    def _kept_in(self, name: str) -> Path:
        return self.path / "experiments" / f"{name}.json"

    def parts(self, whole: str, depends_on: Any) -> Parts:
        """Return what an earlier time, killed on the way, had of what `remember` is computing; deleted with its end.

        Parts of other JSON values that they depend on are not looked at.
        """
        key = hashlib.sha256(json.dumps([self.data, depends_on], sort_keys=True).encode()).hexdigest()
        return Parts(self.path / "parts" / whole, key)

    def remove_abandoned(self) -> None:
        """Remove what killed processes left of the files that they were writing; a report that is being made stays."""
        for pattern in MADE:
            remove_abandoned(self.path, pattern)
        for unfinished in self.path.glob(".report-????????"):
            with contextlib.suppress(OSError):  # the report is done meanwhile
                if {entry.name for entry in unfinished.iterdir()} <= {"new", "old", LOCK}:
                    with locked(unfinished / LOCK) as held:
                        if held is not None:
                            shutil.rmtree(unfinished)

    def note_seconds(self, what: str, seconds: float) -> None:
        """Note in `timings.json` how long something took, if that is not there: once done, a thing is only read again.

        Apart from the results, which a resumed run must repeat.
        """
        file = self.path / "timings.json"
        timings = read_json(file) if file.exists() else {}
        timings.setdefault(what, round(seconds, 1))
        _write(file, json.dumps(timings, indent=1).encode())

    def scores(self, name: str, compute: Callable[[], ns.Scores]) -> ns.Scores:
        """Return the scores of an earlier time, or compute them and write them down."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            scores = compute()
            with _writing(file):
                ns.save_file(scores, file)
        loaded = ns.load_file(file)
        assert isinstance(loaded, ns.Scores), "this name is only ever given to scores"
        return loaded


@contextlib.contextmanager
def at_work(path: Path) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile, and make it if it is missing; reports may be made all the same.

    A RuntimeError says that another run is at work in it, and which process that is, where it is known.
    """
    file = path / LOCK
    with contextlib.ExitStack() as stack:
        with _writing(file):
            path.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(locked(file))
        if held is None:
            raise RuntimeError(
                f"another run is at work in {path}{_process_of(file)}: wait for its end or stop it and start again, "
                f"which goes on from what it did; or choose another folder with --out"
            )
        held.truncate(0)  # what a process was called that was killed
        held.write(f"{os.getpid()}\n".encode())
        yield


def _process_of(file: Path) -> str:
    """The process that has locked a file, in words; nothing where it has not said so, or is gone meanwhile."""
    try:
        return f" (process {int(file.read_text())})"
    except (OSError, ValueError):
        return ""


# Results


def read_results(path: Path) -> Run:
    """Return the results of a run folder, with the seconds that its parts took.

    Raises:
        FileNotFoundError: if it has none yet.
        ValueError: if they are damaged or of another schema.
    """
    run = read_run(path)
    timings = path / "timings.json"
    return Run({**run.about, "seconds": read_json(timings)}, run.table) if timings.exists() else run


def write_results(path: Path, run: Run) -> None:
    """Write the two files of a run's results to its folder; that which says what the other is of comes last."""
    for name, data in write_run(run).items():
        _write(path / name, data)


def refuse_missing_groups(data: Any, settings: Settings) -> None:
    """Raise a ValueError, before any training, if a group has no images in a split of a data set that a run looks at.

    Stage 1 looks at the splits that it is measured on, the others at all.
    """
    looked_at = {"train", *settings.splits} | (set() if settings.stages == ("1",) else set(data.splits))
    empty = []
    for split in [split for split in data.splits if split in looked_at]:
        counts = zip(data.group_names, data.splits[split].counts, strict=True)
        if names := [name for name, count in counts if not count]:
            empty.append(f"{split}: {', '.join(names)}")
    if empty:
        raise ValueError(
            f"groups without images in {'; '.join(empty)}: give the data set images of them, leave them out of its "
            f"table, or, if they are only missing in validation or test, run --stages 1 on the splits that have them"
            + ("; another --held-out may leave some in both parts" if settings.held_out else "")
        )


def describe_run(folder: RunFolder, data: Any, model: nn.Module, trajectory: Any, note: str) -> dict[str, Any]:
    """Return what belongs to no stage, see `Run.of`: what was trained on what, and how well.

    `trajectory` is loss and accuracy as met in training, by epoch; `note` says where the first weights came from.
    """

    def accuracy(split: str) -> Any:
        return folder.remember(f"accuracy-{split}", lambda: list(ns.evaluate(model, data.loaders(split)).values))

    splits = [split for split in data.splits if len(data.splits[split])]  # an empty one has no accuracy
    return {
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


# What is in a folder


def made_files(path: Path) -> list[Path]:
    """The files of a folder that have the names of `MADE`, in its order, with those of a write that was killed."""
    names = [(made, str(Path(made).with_name(f".{Path(made).name}.*"))) for made in MADE]
    found = [file for pair in names for name in pair for file in sorted(path.glob(name)) if file.is_file()]
    return list(dict.fromkeys(found))


def delete_run(path: Path) -> None:
    """Delete the run of a folder: the files that the study made, and the folders that are then empty."""
    _read_run(path)
    with at_work(path):
        _delete(path, made_files(path))
    if not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()


def _delete(path: Path, files: Iterable[Path]) -> None:
    """Delete files of a folder, in their order, and then the folders in it that are empty."""
    folders = set()
    for file in files:
        file.unlink()
        folders |= {path / parent for parent in file.relative_to(path).parents} - {path}
    for unfinished in path.glob(".report-*"):
        shutil.rmtree(unfinished)
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def is_begun(entry: Path) -> bool:
    """Whether a file is what a run leaves that is killed before it has written its `run.json`."""
    return entry.name == LOCK or entry.match(".run.json.*")


def refuse_files(path: Path) -> None:
    """Raise a ValueError if a folder without a `run.json` holds anything but what a kill in its first write left."""
    names = sorted(entry.name for entry in path.iterdir() if not is_begun(entry)) if path.is_dir() else []
    refuse_others(path, names, "no run of this study, for it has no run.json")


def refuse_others(path: Path, names: Sequence[str], what: str) -> None:
    """Raise a ValueError if a folder holds other files, which are named, and said to be what they are not."""
    if names:
        raise ValueError(
            f"{path} holds files that are {what} ({len(names)}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}): "
            f"choose another folder with --out"
        )


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values; of options, only those that numbers depend on."""
    said: dict[str, Any] = json.loads(json.dumps({one.name: getattr(settings, one.name) for one in fields(Settings)}))
    return said


def _added(settings: Settings, held: Mapping[str, Any]) -> Settings:
    """The settings with those of a run that is there added: what it has is kept in its results."""
    both = {key: dict.fromkeys((*held.get(key, ()), *getattr(settings, key))) for key in ADDED_TO}
    return replace(
        settings,
        splits=tuple(both["splits"]),
        experiments=tuple(name for name in EXPERIMENTS if name in both["experiments"]),
        stages=tuple(name for name in STAGES if name in both["stages"]),
    )


def _refuse_other(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    now, then = _in_words(expected), _in_words(found)
    differing = [
        f"{what}: this run {said}, the folder {then.get(what, 'none')}"
        for what, said in now.items()
        if then.get(what, "none") != said
    ]
    if differing:
        raise ValueError(
            f"{path} holds another run; {'; '.join(differing)}: choose another folder with --out, or delete that run "
            f"with --overwrite"
        )


def _in_words(run: Mapping[str, Any]) -> dict[str, str]:
    """What two runs in one folder must have in common, by option."""
    said = {flag_of(key, Settings): _said(value) for key, value in run["settings"].items() if key not in ADDED_TO}
    return said | {key: repr(run.get(key)) for key in ("schema", "version")}


def _said(value: Any) -> str:
    """A setting as it would be written on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _same_data(path: Path, data: Mapping[str, str] | None, held: Any) -> Mapping[str, str] | None:
    """The digests of the run's splits, after those of now were compared with those of the run that is there."""
    if data is None or held is None:
        return held if data is None else data
    differing = [split for split in dict.fromkeys([*data, *held]) if data.get(split) != held.get(split)]
    if differing:
        raise ValueError(
            f"{path} holds a run of other data: images, classes or groups are not what they were in "
            f"{', '.join(differing)}: put the data back as it was, choose another folder with --out, or delete that "
            f"run with --overwrite"
        )
    return data


# Reading and writing


def read_json(file: Path, step: str = "delete it, and it is made again") -> Any:
    """Return what a file holds; a ValueError says that it is damaged, and the next step."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {step}") from error


def _read_run(path: Path) -> Mapping[str, Any]:
    """The content of a `run.json`, of any version of this study."""
    found = read_json(path / "run.json", "choose another folder with --out")
    known = isinstance(found, dict) and isinstance(found.get("schema"), int)
    if not known or not isinstance(found.get("settings"), dict) or not {"data", "seed"} <= set(found["settings"]):
        raise ValueError(f"{path} holds a run.json that is not of this study: choose another folder with --out")
    run: Mapping[str, Any] = found
    return run


def _write(file: Path, data: bytes) -> None:
    """Write a file, and its folder if that is missing."""
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Have an OSError within say which file could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file} could not be written ({error.strerror or error}): {next_step(error)}") from error


NEXT_STEPS: Final = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room there, and start again to go on",
    (errno.EACCES, errno.EPERM, errno.EROFS): "give leave to write there, or choose another folder with --out",
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR): "a file is where a folder should be: choose another folder with --out",
}


def next_step(error: OSError) -> str:
    """Return what to do where something cannot be written, by what kept it."""
    known = (step for numbers, step in NEXT_STEPS.items() if error.errno in numbers)
    return next(known, "see that it can be written, and start again to go on")
