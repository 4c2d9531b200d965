"""The section of 1h: sets found on half A and judged on half B, of one run and over seeds."""

from __future__ import annotations

from html import escape

from neuronsurgery.study.figures import number, signed
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import html_table, p_text
from neuronsurgery.study.report.wording import listed, times

HEADER = ("images", "at most", "own", "worst other", "net", "p", "net of the controls", "right images lost: B", "test")
READ = (
    "Found on half A of the training images, and judged on half B, which the search has not seen. Own: the change of "
    "the group's accuracy in points; worst other: that of the other group that loses most; net: how much more the "
    "group loses, with its interval; p: the share of random sets of the same layers and kinds with at least this net.",
    "A control is as many images of a majority group of the same margins, searched and judged alike: random sets are "
    "not searched for, so that a small p does not say that the group is special.",
)


def critical_sets(run: Results, groups: Groups, split: str) -> Section:
    """Return the section of 1h of one run."""
    records = run["experiments"]["1h"][split]
    own = [record for record in records if record["control"] is None]
    sizes = (None, max(record["k"] or 0 for record in own))
    largest = [record for record in own if record["k"] in sizes]
    section = Section(" ".join(_sentence(record, groups) for record in largest))
    rows = [_row(record, _controls(records, record)) for record in records]
    section.table = html_table(HEADER, rows)
    section.remarks = [*READ, *_impossible(records), "One run is no evidence about others: verdicts are over seeds."]
    section.overview = _nets(largest), "controls: " + _nets([r for r in records if r["control"] and r["k"] in sizes])
    return section


def _nets(records: list[Results]) -> str:
    said = [signed(100 * record["net"]) if "net" in record else "too few images" for record in records]
    return f"net on images not searched: {listed(said)} points" if said else "none"


def _sentence(record: Results, groups: Groups) -> str:
    if "impossible" in record:
        return f"{groups.label(record['chosen_for'])}: {record['impossible']}."
    sentence = record["sentence"]
    return f"{sentence[0].upper()}{sentence[1:]}."


def _controls(records: list[Results], record: Results) -> list[float]:
    """Return the nets of a group's controls with sets of the same size; none for a control."""
    return [
        control["net"]
        for control in records
        if record["control"] is None and control["control"] is not None and "net" in control
        if (control["chosen_for"], control["k"]) == (record["chosen_for"], record["k"])
    ]


def _row(record: Results, controls: list[float]) -> list[str]:
    name = escape(record["examples"] or f"{record['control']} like {record['chosen_for']}")
    if "impossible" in record:
        return [name, *["&ndash;"] * (len(HEADER) - 1)]
    interval = f"<small>[{signed(100 * record['net_low'])}, {signed(100 * record['net_high'])}]</small>"
    return [
        name,
        times(record["k"], "neuron") + ("" if record["neurons"] else "<small>none found</small>"),
        signed(100 * record["own"]),
        signed(100 * record["worst_other"]),
        signed(100 * record["net"]) + interval,
        "&ndash;" if record["p_value"] is None else p_text(record["p_value"]),
        ", ".join(signed(100 * net) for net in controls) or "&ndash;",
        *(_percent(record[name]) for name in ("right_lost", "test_right_lost")),
    ]


def _percent(share: float | None) -> str:
    return "&ndash;" if share is None else f"{number(100 * share)} %"


def _impossible(records: list[Results]) -> list[str]:
    return [
        f"{record['examples'] or record['control']}, for {record['chosen_for']}: {record['impossible']}."
        for record in records
        if "impossible" in record
    ]


def critical_sets_over_seeds(run: Results, groups: Groups) -> list[Section]:
    """Return the section of 1h over seeds: the verdicts, and the means of each size."""
    rows = run.get("critical_sets") or []
    if not rows:
        return []
    verdicts: dict[str, list[str]] = {}
    for record in run["claims"]:
        if record["experiment"] == "1h":
            verdicts.setdefault(record["text"], []).append(f"{record['verdict']} for {groups.label(record['group'])}")
    said = [f"{text}: {listed(found, 12)}" for text, found in verdicts.items()]
    section = Section(f"Over {times(len(run['seeds']), 'seed')}: {'; '.join(said)}.")
    table = [
        [
            escape(groups.label(row["group"])),
            f"{times(row['k'], 'neuron')}<small>found in {row['found']} of {len(run['seeds'])}</small>",
            *(_mean(row.get(name)) for name in ("own", "worst_other", "net")),
            ", ".join("&ndash;" if p is None else p_text(p) for p in row["p_value"]),
            *(_mean(row.get(name)) for name in ("control_net", "right_lost", "test_right_lost")),
        ]
        for row in rows
    ]
    section.table = html_table(HEADER, table)
    section.remarks = [*READ, "Means over the seeds with Student's 95 % intervals; the claims have 99.17 %."]
    section.rows = {"critical_sets": _flat(rows)}
    return [section]


def _mean(found: Results | None) -> str:
    if found is None:
        return "&ndash;"
    low, high = signed(100 * found["low"]), signed(100 * found["high"])
    return f"{signed(100 * found['mean'])}<small>[{low}, {high}]</small>"


def _flat(rows: list[Results]) -> list[Results]:
    """Return one row per group, size and measure."""
    return [
        {"group": row["group"], "k": row["k"], "found": row["found"], "measure": name, **found}
        for row in rows
        for name, found in row.items()
        if isinstance(found, dict)
    ]
