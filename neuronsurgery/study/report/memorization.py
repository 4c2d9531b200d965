"""The chapter of memorisation: the estimated memorisation score of training examples, by group."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from neuronsurgery.study import figures
from neuronsurgery.study.figures import number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import html_table
from neuronsurgery.study.report.wording import listed, percent, times


def memorization(run: Results, groups: Groups) -> list[Section]:
    """Return the section of memorisation: scores by group, and how they go with fragility where the run says so."""
    found = run.get("memorization")
    if not found:
        return []
    if "impossible" in found:
        return [Section(f"Memorisation could not be estimated: {found['impossible']}")]
    section = Section(_finding(found, groups))
    section.figures = _strips(found, groups)
    section.table = _table(found, groups)
    section.remarks = [
        f"The score of an example: of {times(found['models'], 'model')}, the accuracy on it of those that saw it minus "
        f"that of those that did not (Feldman and Zhang, 2020); every model saw {percent(found['share'])} of the "
        f"training images. Near 0: learnt from the others; near 1: right only because it was seen.",
    ]
    section.rows = {"memorization": found["groups"]}
    return [section]


def _finding(found: Results, groups: Groups) -> str:
    """Return the mean scores, whether the minority groups are memorised more than each other group, and a relation."""
    rows = {row["group"]: row for row in found["groups"]}
    means = [
        f"{groups.label(name)} {number(rows[name]['mean'], 2)} ± {number(rows[name]['standard_error'], 2)}"
        for name in groups.names
        if name in rows
    ]
    text = f"Mean memorisation score ± its standard error: {listed(means, 12)}."
    few = [rows[name]["mean"] for name in groups.names if name in rows and name in groups.minority]
    many = [rows[name]["mean"] for name in groups.majority if name in rows]
    if few and many:
        above = sum(mean > max(many) for mean in few)
        lie = "lies" if above == 1 else "lie"
        text += f" {above} of {times(len(few), 'minority group')} {lie} above every majority group."
    return f"{text} {_relation_words(found)}".strip()


def _relation_words(found: Results) -> str:
    relation: Any = found.get("relation")
    if not relation:
        return ""
    ends = f"[{number(relation['low'], 2)}, {number(relation['high'], 2)}]"
    seen = "" if relation["low"] > 0 or relation["high"] < 0 else ": no relation is seen, its interval includes 0"
    return (
        f"{relation['text']} (Spearman's rank correlation {number(relation['spearman'], 2)} {ends} over "
        f"{relation['count']} examples{seen})."
    )


def _strips(found: Results, groups: Groups) -> list[tuple[str, str, str]]:
    points = {row["group"]: [score for score in row["scores"] if math.isfinite(score)] for row in found["points"]}
    names = [name for name in groups.names if name in points]
    if not any(points.values()):
        return []
    minority = [place for place, name in enumerate(names) if name in groups.minority]
    svg = figures.strips(
        "Memorisation score of the training images",
        names,
        [points[name] for name in names],
        axis="memorisation score",
        minority=minority,
    )
    return [("memorization", "Bar: median.", svg)]


def _table(found: Results, groups: Groups) -> str:
    rows = [
        [
            escape(groups.label(row["group"])),
            number(row["mean"], 3),
            number(row["standard_error"], 3),
            str(row["count"]),
        ]
        for row in found["groups"]
    ]
    return html_table(["group", "mean score", "standard error", "examples"], rows)
