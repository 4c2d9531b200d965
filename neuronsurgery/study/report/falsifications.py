"""The chapter of the falsifications: where the knockout should fail, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from neuronsurgery.study.figures import number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import html_table
from neuronsurgery.study.report.wording import times

SHOWN = ("knockout", "final margin", "margin after epoch 2")


def falsifications(run: Results, groups: Groups) -> list[Section]:
    """Return the section of the falsifications: each condition with the AUC of three scores for each minority."""
    found = run.get("falsifications")
    if not found:
        return []
    ahead = [row["condition"] for row in found if _ahead(row)]
    section = Section(
        f"Of {times(len(found), 'condition')}, the knockout ranks both minorities above the rest of their class better "
        f"than the final margin does in {len(ahead)}: {escape(', '.join(ahead)) or 'none'}."
    )
    header = ["condition", "score", "AUC of the minorities", "flagged by the fence", "worst test group, %"]
    section.table = html_table(header, [row for one in found for row in _rows(one)])
    section.remarks = [escape(f"{one['condition']}: {one['text']}.") for one in found]
    section.rows = {"falsifications": [_flat(one, row) for one in found for row in one["detection"]["train"]["rows"]]}
    return [section]


def _ahead(one: Mapping[str, Any]) -> bool:
    auc = {(row["score"], row["group"]): row["auc"] for row in one["detection"]["train"]["rows"]}
    knocked = {group: value for (score, group), value in auc.items() if score == "knockout"}
    return bool(knocked) and all(value > auc["final margin", group] for group, value in knocked.items())


def _rows(one: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per score of a condition; what is not of a score stands in the first."""
    detection = one["detection"]["train"]
    flagged = {row["score"]: row for row in detection["flagged"]}
    retrained = {row["name"]: row.get("worst") for row in one["mitigation"] or ()}
    worst = "; ".join(
        f"{escape(name)} {'refused' if retrained[name] is None else number(100 * retrained[name])}"
        for name in ("ERM", "class-balanced", "inferred by knockout", "true groups")
        if name in retrained
    )
    rows = []
    for score in SHOWN:
        own = [row for row in detection["rows"] if row["score"] == score]
        if not own and score == "knockout":
            rows.append([escape(one["condition"]), "knockout", "no residual branch", "", worst])
        elif own:
            said = flagged.get(score)
            flags = "" if said is None else "/".join(map(str, said["fragile"])) + _wrong(said)
            values = ", ".join(f"{number(row['auc'], 3)}" for row in own)
            first = not rows
            rows.append(
                [escape(one["condition"]) if first else "", escape(score), values, flags, worst if first else ""]
            )
    return rows


def _wrong(flagged: Mapping[str, Any]) -> str:
    wrong = f" and {flagged['wrong_labels']} wrong labels" if flagged.get("wrong_labels") else ""
    return wrong + (" (too few: refused)" if flagged.get("refused") else "")


def _flat(one: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {"condition": one["condition"], "seed": one["seed"], **row}
