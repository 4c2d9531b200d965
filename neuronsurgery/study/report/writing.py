"""Results in, the files of a report out: all of them, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from neuronsurgery.atomic import locked, write_atomically
from neuronsurgery.study.claims import judge
from neuronsurgery.study.pages import Figure, exports, render
from neuronsurgery.study.report.figures import figures_of
from neuronsurgery.study.run import LOCK
from neuronsurgery.study.table import Run, checked


def write_report(run: Run, folder: Path) -> Path:
    """Return the path of `report.html`, written to a folder with its charts as `figures/*.svg`.

    The page holds all that it needs and loads nothing. The same results give the same bytes. Files of these names are
    replaced, others left alone; experiments may be missing.

    Raises:
        ValueError: if the results are of another schema or kind, or are not a run's.
        OSError: if the folder cannot be written to, or is full; a report that was there is as it was.
    """
    checked(run.about)
    figures = figures_of(run)
    # The page last: whoever finds a new page finds new charts beside it.
    write_files(folder, {**exports(figures), "report.html": page_of(run, figures).encode()})
    return folder / "report.html"


def page_of(run: Run, figures: Mapping[str, Figure]) -> str:
    """Return the page of a run with its figures by name."""
    flags = run.rows(experiment="flagged", measure="flagged", split="train").group_by("group", maintain_order=True)
    return render(
        "study.html",
        run=run,
        figures=figures,
        claims=judge(run),
        flagged=flags.agg(pl.col("value").mean()).rows(),
        settings_words=settings_words,
    )


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


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by their names within a folder, all of them or none: beside it first, then renamed in their order.

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
                for place in (new, old, folder):
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(new / name, content)
                if (folder / name).exists():
                    shutil.copy2(folder / name, old / name)
            _replace(folder, list(files), new, old)
    except OSError as error:
        said = (
            f"the report in {folder} was not written ({error.strerror or error}), and what was there is as it was: "
            f"make room there or give leave to write, then run `neuronsurgery report {folder}`"
        )
        raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error


def _replace(folder: Path, names: list[str], new: Path, old: Path) -> None:
    """Put the new files in place, or the old ones back if that fails on the way."""
    try:
        for name in names:
            os.replace(new / name, folder / name)
    except BaseException:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
