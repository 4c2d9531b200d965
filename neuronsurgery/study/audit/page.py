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
from neuronsurgery.study.pages.charts import dots, interval, points
from neuronsurgery.study.table import COLUMNS, csv_of

SHOWN: Final = 12
"""Fragile examples of each class on the page."""

TOLD: Final = "Line: 95 % interval over the examples."


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
    for name, edit in audit.edits.items():
        ns.save_file(edit, folder / "edits" / f"{name}.safetensors")
    figures = figures_of(audit)
    files = {"table.csv": csv_of(pl.DataFrame(audit.table, schema=dict(COLUMNS)))}
    files |= {"fragile.csv": csv_of(pl.DataFrame(audit.fragile))} if audit.fragile else {}
    files |= {**exports(figures), "report.html": html_of(audit, examples, figures).encode()}
    for name, data in files.items():
        write_atomically(folder / name, data)
    return folder / "report.html"


def figures_of(audit: Audit) -> list[Figure]:
    """Return the accuracy of every class and group, and what the set that was found does to whom."""
    figures = []
    accuracies = [row for row in audit.table if row["stage"] == "accuracy"]
    flagged = {(row["experiment"], row["group"]): row["value"] for row in audit.table if row["stage"] == "fragile"}
    kinds = list(dict.fromkeys(row["experiment"] for row in accuracies))
    if accuracies:
        rows = [
            {
                **_row(row),
                "kind": row["experiment"],
                "fragile": points(flagged.get((row["experiment"], row["group"]))),
            }
            for row in accuracies
        ]
        columns = {"name": "", "value": "accuracy, %", "interval": "95 % interval", "n": "examples"}
        figures.append(
            dots(
                "accuracy",
                "How right is it?",
                TOLD,
                rows,
                Look(kinds, field="kind"),
                axis="accuracy, %",
                by="name",
                columns={**columns, "fragile": "fragile, %"},
                limits=(0.0, 100.0),
                line=None,
                aside=False,
            )
        )
    changes = [row for row in audit.table if row["stage"] == "critical" and row["measure"] != "net"]
    if changes and changes[0]["k"]:
        rows = [{**_row(row), "kind": "change", "neurons": row["names"].replace(";", ", ")} for row in changes]
        columns = {"name": "group", "value": "change, points", "interval": "95 % interval", "n": "examples"}
        figures.append(
            dots(
                "critical",
                "What cutting that set does to every group",
                f"{TOLD} On examples that were not searched.",
                rows,
                Look(["change"], field="kind"),
                axis="change of accuracy, points",
                by="name",
                columns={**columns, "neurons": "neurons"},
                aside=False,
            )
        )
    return figures


def _row(row: Row) -> dict[str, Any]:
    numbers = {name: points(row[name]) for name in ("value", "low", "high")}
    return {"name": row["group"], **numbers, "values": [], "interval": interval(row), "n": row["n"]}


def html_of(audit: Audit, examples: Examples, figures: list[Figure]) -> str:
    """Return the page."""
    return render(
        "audit.html",
        title="Audit of a trained network",
        audit=audit,
        figures={figure.name: figure for figure in figures},
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
