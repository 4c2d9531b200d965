"""The files of an audit: one page, the table, the fragile examples, the edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import neuronsurgery as ns
from neuronsurgery.atomic import write_atomically
from neuronsurgery.study.audit.examples import Examples
from neuronsurgery.study.audit.results import Audit, csv_of

SHOWN: Final = 12
"""Fragile examples of each class on the page."""


def write_audit(audit: Audit, examples: Examples, folder: Path | str) -> Path:
    """Return the path of `report.html`, written with `table.csv`, `fragile.csv` and `edits/*.safetensors`.

    The page holds its styles and pictures and loads nothing.

    Args:
        audit: what was found.
        examples: what it was found on, for the pictures.
        folder: made if it is not there.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder = Path(folder)
    (folder / "edits").mkdir(parents=True, exist_ok=True)
    for name, edit in audit.edits.items():
        ns.save_file(edit, folder / "edits" / f"{name}.safetensors")
    write_atomically(folder / "table.csv", csv_of(audit.table))
    write_atomically(folder / "fragile.csv", csv_of(audit.fragile))
    write_atomically(folder / "report.html", html_of(audit, examples).encode())
    return folder / "report.html"


def html_of(audit: Audit, examples: Examples) -> str:
    """Return the page."""
    import jinja2  # torch brings it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("neuronsurgery.study.audit", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "" if value is None else f"{100 * value:.1f}"
    return environment.get_template("page.html").render(
        audit=audit,
        accuracy=[row for row in audit.table if row["stage"] == "accuracy"],
        flagged={(row["split_of"], row["group"]): row["value"] for row in audit.table if row["stage"] == "fragile"},
        changes=[row for row in audit.table if row["stage"] == "critical"],
        sheets=_sheets(audit, examples),
    )


def _sheets(audit: Audit, examples: Examples) -> Mapping[str, list[dict[str, Any]]]:
    """Return by class its most fragile examples, each as HTML with its name and score."""
    import markupsafe

    sheets: dict[str, list[dict[str, Any]]] = {}
    for row, place in zip(audit.fragile, audit.places, strict=True):
        sheet = sheets.setdefault(row["class"], [])
        if len(sheet) < SHOWN:
            sheet.append({**row, "shown": markupsafe.Markup(examples.shown(place))})  # noqa: S704  # our own HTML
    return sheets
