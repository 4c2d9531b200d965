"""The files of an audit: one page, the table, the fragile examples, the edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import polars as pl

import neuronsurgery as ns
from neuronsurgery.atomic import write_atomically
from neuronsurgery.study.audit.examples import Examples
from neuronsurgery.study.audit.results import Audit, Row
from neuronsurgery.study.pages import Figure, Look, exports, render
from neuronsurgery.study.pages.charts import interval, points
from neuronsurgery.study.table import COLUMNS, csv_of

KEPT: Final = ("edits/critical.safetensors", "edits/knockout.safetensors", "figures/critical.svg")
"""What not every audit has, beside its page and tables."""

SHOWN: Final = 12
"""Fragile examples of each class on the page."""


def write_audit(audit: Audit, examples: Examples, folder: Path | str) -> Path:
    """Return the path of `report.html`, written with its tables, `edits/*.safetensors` and `figures/*.svg`.

    The page holds its styles, pictures and charts and loads nothing.

    Args:
        audit: what was found.
        examples: what it was found on, for the pictures.
        folder: made if it is not there.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder = Path(folder)
    for name in ("edits", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in KEPT:  # of an audit before this one
        (folder / name).unlink(missing_ok=True)
    for name, edit in audit.edits.items():
        ns.save_file(edit, folder / "edits" / f"{name}.safetensors")
    figures = figures_of(audit)
    files = {"table.csv": csv_of(pl.DataFrame(audit.table, schema=dict(COLUMNS)))}
    files |= {"fragile.csv": csv_of(pl.DataFrame(audit.fragile)), **exports(figures)}
    page = render("audit.html", audit=audit, figures=figures, sheets=_sheets(audit, examples), points=points)
    files |= {"report.html": page.encode()}
    for name, data in files.items():
        write_atomically(folder / name, data)
    return folder / "report.html"


def figures_of(audit: Audit) -> dict[str, Figure]:
    """Return the accuracy of every class and group, and what the set that was found does to whom."""
    accuracies = [row for row in audit.table if row["stage"] == "accuracy"]
    flagged = {(row["experiment"], row["group"]): row["value"] for row in audit.table if row["stage"] == "fragile"}
    columns = {"interval": "95 % interval", "n": "examples"}
    kinds = [(row["experiment"], row["group"]) for row in accuracies]
    rows = [
        {**_row(row), "kind": kind[0], "fragile": points(flagged.get(kind))}
        for kind, row in zip(kinds, accuracies, strict=True)
    ]
    figures = {
        "accuracy": Figure(
            rows,
            Look(list(dict.fromkeys(kind for kind, _ in kinds)), field="kind"),
            axis="accuracy, %",
            by="name",
            columns={"name": "", "value": "accuracy, %", **columns, "fragile": "fragile, %"},
            limits=(0.0, 100.0),
            line=None,
            aside=False,
        )
    }
    changes = [row for row in audit.table if row["stage"] == "critical" and row["measure"] != "net"]
    if changes and changes[0]["k"]:
        figures["critical"] = Figure(
            [{**_row(row), "kind": "change", "neurons": row["names"].replace(";", ", ")} for row in changes],
            Look(["change"], field="kind"),
            axis="change of accuracy, points",
            by="name",
            columns={"name": "group", "value": "change, points", **columns, "neurons": "neurons"},
            aside=False,
        )
    return figures


def _row(row: Row) -> dict[str, Any]:
    numbers = {name: points(row[name]) for name in ("value", "low", "high")}
    return {"name": row["group"], **numbers, "values": [], "interval": interval(row), "n": row["n"]}


def _sheets(audit: Audit, examples: Examples) -> Mapping[str, list[dict[str, Any]]]:
    """Return by class its most fragile examples, each as HTML with its name and score."""
    import markupsafe

    sheets: dict[str, list[dict[str, Any]]] = {}
    for row, place in zip(audit.fragile, audit.places, strict=True):
        sheet = sheets.setdefault(row["class"], [])
        if len(sheet) < SHOWN:
            sheet.append({**row, "shown": markupsafe.Markup(examples.shown(place))})  # noqa: S704  # our own HTML
    return sheets
