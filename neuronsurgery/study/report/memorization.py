"""The chapter of memorisation: the estimated memorisation score of training examples, by group."""

from __future__ import annotations

import math
from html import escape

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
    return [section, *_relation(found, groups)]


def _finding(found: Results, groups: Groups) -> str:
    """Return the mean scores, whether the minority groups are memorised more than each other group, and a relation."""
    rows = {row["group"]: row for row in found["groups"]}
    means = [
        f"{groups.label(name)} {number(rows[name]['mean'], 2)}"
        + ("" if rows[name]["standard_error"] is None else f" ± {number(rows[name]['standard_error'], 2)}")
        for name in groups.names
        if name in rows
    ]
    said = found["minority_difference"]["text"]
    return f"Mean memorisation score ± its standard error: {listed(means, 12)}. {said[0].upper()}{said[1:]}."


def _relation(found: Results, groups: Groups) -> list[Section]:
    """Return the section of how the scores go with what each cut does to an image."""
    related = list(found.get("relation", ()))
    if not related:
        return []
    rows, seen = [], 0
    for row in related:
        among = "all images" if row["group"] == "all" else escape(groups.label(row["group"]))
        if row.get("spearman") is None:
            said = [f"not given: {escape(row.get('impossible', ''))}", ""]
        else:
            shown = row["low"] > 0 or row["high"] < 0
            seen += shown
            ends = f"[{number(row['low'], 2)}, {number(row['high'], 2)}]"
            said = [f"{number(row['spearman'], 2)}<small>{ends}</small>", "seen" if shown else "no relation seen"]
        rows.append([among, escape(row["cut"]), str(row["count"]), *said])
    finding = (
        f"Of {times(len(related), 'rank correlation')} between the score and what a cut does to an image, {seen} have "
        f"an interval that excludes 0. Among all images a relation may be no more than that of the groups."
    )
    section = Section(finding, heading="What goes with the score")
    section.table = html_table(["among", "cut, and what is measured", "images", "Spearman's correlation", ""], rows)
    section.rows = {"memorization_relation": related}
    return [section]


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
            "&ndash;" if row["standard_error"] is None else number(row["standard_error"], 3),
            str(row["count"]),
        ]
        for row in found["groups"]
    ]
    return html_table(["group", "mean score", "standard error", "examples"], rows)
