"""Results in, the files of a report out: all of them, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from neuronsurgery.atomic import locked, write_atomically
from neuronsurgery.study.report.contents import STAGE_ONE, chapters_of, contents_of
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import by_group
from neuronsurgery.study.report.opening import model_figures, opening_html, title_of
from neuronsurgery.study.report.page import document, section_html
from neuronsurgery.study.report.section import Chapter, Results
from neuronsurgery.study.report.tables import csv_table
from neuronsurgery.study.run import LOCK

SCHEMA: Final = 1


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Return the path of `report.html`, written to a folder with `tables/*.csv` and `figures/*.svg`.

    The page holds its styles and figures and loads nothing. The same results give the same bytes.

    Args:
        results: the content of a `results.json` (schema 1), of one run, where experiments may be missing, or of kind
            "seeds".
        folder: made if it is not there. Files of these names are replaced, others left alone.

    Raises:
        ValueError: if the results are of another schema or kind, or are not a run's.
        OSError: if the folder cannot be written to, or is full; a report that was there is as it was.
    """
    run, groups = _checked(results)
    chapters = chapters_of(run, groups)
    sections = [section for chapter in chapters for section in chapter.sections]
    drawn = [figure for section in sections for figure in section.figures + section.more_figures]
    files = _figure_files([*drawn, *model_figures(run, groups)])
    files |= {f"tables/{name}.csv": csv_table(rows) for name, rows in _tables(run, groups, chapters).items() if rows}
    # The page last: whoever finds a new page finds new figures and tables beside it.
    write_files(folder, {**files, "report.html": _page(run, groups, chapters).encode()})
    return folder / "report.html"


def _figure_files(drawn: Sequence[tuple[str, str, str]]) -> dict[str, bytes]:
    """Return the content of every figure's file.

    Raises:
        ValueError: if two figures have one name: the second would take the place of the first.
    """
    counts = Counter(name for name, _, _ in drawn)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"two figures of the report are called {', '.join(twice)}: give each section names of its own")
    return {f"figures/{name}.svg": svg.encode() for name, _, svg in drawn}


def _checked(results: Results) -> tuple[Results, Groups]:
    """Return the results with what an unfinished run may lack filled in, and its groups.

    Raises:
        ValueError: if the schema is another, or parts are missing that every run has.
    """
    schema = results.get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"results.json has schema {schema!r}, and this version reads schema {SCHEMA}: make the report with the "
            f"version of neuronsurgery that wrote it ({results.get('version', 'unknown')}), or run the study again"
        )
    kind = results.get("kind")
    if kind not in (None, "seeds"):
        raise ValueError(f'results.json is of kind {kind!r}; this version knows one run, without a kind, and "seeds"')
    needed = ("settings", "groups", "counts", *(("seeds",) if kind == "seeds" else ()))
    missing = [key for key in needed if key not in results]
    if missing:
        raise ValueError(f"results.json lacks {', '.join(missing)}: it is not of a finished or interrupted study run")
    run = {"accuracy": {}, "experiments": {}, "minority": []} | dict(results)
    known = [entry.identifier for entry in STAGE_ONE]
    unknown = sorted(set(run["experiments"]) - set(known))
    if unknown:
        raise ValueError(f"results.json has experiments {', '.join(unknown)}; this version knows {', '.join(known)}")
    names = tuple(map(str, run["groups"]))
    return run, Groups(names, frozenset(names[place] for place in run["minority"]))


def _page(run: Results, groups: Groups, chapters: Sequence[Chapter]) -> str:
    body = [opening_html(run, groups, chapters, contents_of(run))]
    for chapter in chapters:
        body.append(f'<h2 id="e{chapter.entry.identifier}">{escape(chapter.entry.heading)}</h2>')
        body += [section_html(section) for section in chapter.sections]
    settings, title = run["settings"], title_of(run, chapters)
    return document(title if run.get("kind") else f"{title}; {settings.get('data')}, seed {settings.get('seed')}", body)


def _tables(run: Results, groups: Groups, chapters: Sequence[Chapter]) -> dict[str, list[Results]]:
    """Return the rows of every CSV file by its name."""
    tables: dict[str, list[Results]] = {}
    for chapter in chapters:
        for section in chapter.sections:
            for name, rows in section.rows.items():
                tables.setdefault(name, []).extend(rows)
    if run.get("kind") == "seeds":
        return tables
    return {**tables, "groups": _group_rows(run, groups), "training": list(run.get("trajectory") or [])}


def _group_rows(run: Results, groups: Groups) -> list[Results]:
    """Return one row per split and group: the count found, the paper's, and the accuracy."""
    rows: list[Results] = []
    for split, counts in run["counts"].items():
        expected = (run.get("expected_counts") or {}).get(split)
        accuracy = by_group(run, groups, split, run["accuracy"][split]) if split in run["accuracy"] else {}
        for place, name in enumerate(groups.names):
            row = {"split": split, "group": name, "minority": name in groups.minority, "count": counts[place]}
            row["expected"] = expected[place] if expected else None
            rows.append(row | {"accuracy": accuracy[name].value if name in accuracy else None})
    return rows


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
