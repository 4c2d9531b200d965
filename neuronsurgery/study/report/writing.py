"""Results in, the files of a report out: all of them, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuronsurgery.atomic import locked, write_atomically
from neuronsurgery.study.claims import judge
from neuronsurgery.study.pages import Figure, exports, render
from neuronsurgery.study.report.answers import answers
from neuronsurgery.study.report.sections import every_figure, figures_of
from neuronsurgery.study.run import LOCK
from neuronsurgery.study.table import Run, checked


def write_report(run: Run, folder: Path) -> Path:
    """Return the path of `report.html`, written to a folder with its charts as `figures/*.svg`.

    The page holds all that it needs and loads nothing. The same results give the same bytes.

    Args:
        run: of one seed, where experiments may be missing, or of several.
        folder: made if it is not there. Files of these names are replaced, others left alone.

    Raises:
        ValueError: if the results are of another schema or kind, or are not a run's.
        OSError: if the folder cannot be written to, or is full; a report that was there is as it was.
    """
    checked(run.about)
    sections = figures_of(run)
    drawn = exports(every_figure(sections))
    # The page last: whoever finds a new page finds new charts beside it.
    write_files(folder, {**drawn, "report.html": page_of(run, sections).encode()})
    return folder / "report.html"


def page_of(run: Run, sections: Sequence[tuple[str, Sequence[Figure]]]) -> str:
    """Return the page of a run.

    Args:
        run: of one seed or of several.
        sections: its figures under their headings.
    """
    records = judge(run)
    return render(
        "study.html",
        title=_title(run),
        told=_told(run),
        warnings=_warnings(run),
        seeds=[f"seed-{seed}" for seed in run.seeds] if len(run.seeds) > 1 else [],
        answers=answers(run, records),
        rarest=run.minority[0] if run.minority else "",
        pictures=run.about.get("pictures", []),
        minority=run.minority,
        sections=sections,
        sheets=run.about.get("fragility", {}).get("audit", []),
        claims=records,
        methods=[
            (arm["name"], arm["text"], arm["labels"], settings_words(arm.get("settings", {})))
            for arm in run.about.get("stage_two", {}).get("arms", ())
        ],
        several=len(run.seeds) > 1,
        settings=_settings(run),
    )


def _title(run: Run) -> str:
    settings = run.about["settings"]
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else f"seed {run.seeds[0]}"
    return f"Critical neurons: {settings.get('data')}, {seeds}"


def _told(run: Run) -> str:
    """Return the run in a line: network, training, images."""
    settings, counts = run.about["settings"], run.about["counts"].get("train", [])
    rarest = f", {min(counts)} of them of the rarest group" if counts else ""
    return (
        f"{settings.get('arch')} trained for {settings.get('epochs')} epochs ({settings.get('preset')}) on "
        f"{sum(counts):,} images{rarest}."
    )


def _warnings(run: Run) -> list[str]:
    """Return what the reader must know before any number."""
    about, settings = run.about, run.about["settings"]
    said = []
    if settings.get("quick"):
        said.append("A quick run: few epochs and draws. It shows that the program runs; its numbers mean little.")
    asked = {name for name in settings.get("experiments", ()) if "1" in settings.get("stages", ())}
    asked |= {
        name for stage, name in (("2", "arms"), ("fragility", "detection")) if stage in settings.get("stages", ())
    }
    missing = sorted(asked - run.experiments)
    if missing:
        said.append(f"This run has no result yet of: {', '.join(missing)}.")
    if not run.minority:
        said.append("No group is rare in training, so there is no question to answer about one.")
    if len(run.seeds) == 2:
        said.append("Two seeds make wide intervals: three to five are usual.")
    said += [f"Fragility: {text}" for text in [about.get("fragility", {}).get("impossible")] if text]
    said += [f"No groups are inferred: {text}" for text in [about.get("stage_two", {}).get("not_inferred")] if text]
    return said


def settings_words(settings: Mapping[str, Any]) -> str:
    """Return the settings of a method in a line; those of a recipe within them, too.

    Example:
        >>> settings_words({"recipe": {"learning_rate": 0.0002, "epochs": 4}, "criterion": "random"})
        'learning rate 0.0002, epochs 4, criterion random'
    """
    parts = []
    for name, value in settings.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            said = settings_words(value)
            parts.append(said if name == "recipe" else f"{words} ({said})")
        elif isinstance(value, float):
            parts.append(f"{words} {value:g}")
        elif value is not None:
            parts.append(f"{words} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(parts)


def _settings(run: Run) -> list[tuple[str, Any]]:
    """Return what a run depends on, and where it ran, as rows of two."""
    about = run.about
    counts = [
        (f"images, {split}", ", ".join(f"{name} {count}" for name, count in zip(run.groups, found, strict=True)))
        for split, found in about["counts"].items()
    ]
    expected = about.get("expected_counts") or {}
    counts += [(f"images in the paper, {split}", ", ".join(map(str, found))) for split, found in expected.items()]
    rows = [*about["settings"].items(), *about.get("environment", {}).items()]
    rows += [("network", about.get("network")), ("neurons studied", about.get("neurons")), *counts]
    rows += [(f"intervals, {key}", value) for key, value in about.get("intervals", {}).items()]
    rows += [(f"seconds, {key}", value) for key, value in about.get("seconds", {}).items()]
    known = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in rows)
    return [(name.replace("_", " "), value) for name, value in known if value is not None]


# All files or none


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder, all of them or none: they are written beside it first, then renamed in their order.

    Args:
        folder: made if it is not there.
        files: name, relative to the folder, to content; files of these names are replaced, others left alone.

    Raises:
        OSError: if the folder cannot be made or written to, or is full; the files that were there are as they were.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".report-", ignore_cleanup_errors=True) as made,
            locked(Path(made, LOCK)),  # or a run that begins in the folder would take it for one that a kill left
        ):
            new, old = Path(made, "new"), Path(made, "old")
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(new / name, content)
            _replace(folder, list(files), new, old)
    except OSError as error:
        said = (
            f"the report in {folder} was not written ({error.strerror or error}), and what was there is as it was: "
            f"make room there or give leave to write, then run `neuronsurgery report {folder}`"
        )
        raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error


def _replace(folder: Path, names: Sequence[str], new: Path, old: Path) -> None:
    """Put the new files in place, or the old ones back if that fails on the way."""
    done: list[str] = []
    try:
        for name in names:
            for parent in (folder / name, old / name):
                parent.parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                _keep(folder / name, old / name)
            done.append(name)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in reversed(done):
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


def _keep(file: Path, copy: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copy2(file, copy)
