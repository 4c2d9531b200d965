"""The chapters that only several seeds have: accuracy over the seeds, and what the paper claims of Stage 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Final

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import by_group
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import html_table
from neuronsurgery.study.report.wording import NO_SELECTIVITY, listed, times

VERDICTS: Final = ("holds", "does not hold", "undecided")
UNITS: Final = {"points": "percentage points", "layers": "layers", "%": "%"}


CLAIMS_OF_1H: Final = (
    "The claims of 1h are not the paper's, and have rules and intervals (99.17 %, for six of them) of their own: (a) "
    "holds where the mean is at least 30, the interval above 0, and the worst other group loses at most 2 points on "
    "the mean, and does not hold where the whole interval is below 30; (c) does not hold where it is below 15."
)


def accuracies(run: Results, groups: Groups) -> list[Section]:
    """Return the section of the accuracy of the trained models, over the seeds."""
    found = {split: by_group(run, groups, split, rows) for split, rows in run["accuracy"].items()}
    if not found:
        return []
    lowest = []
    for name in (name for name in groups.names if name in groups.minority):
        said = [f"{split} {by_name[name]}" for split, by_name in found.items() if name in by_name]
        lowest.append(f"{groups.label(name)}: {', '.join(said)}")
    section = Section(f"Over {times(len(run['seeds']), 'seed')}, {'; '.join(lowest) or 'no group is a minority'}.")
    section.figures = [
        ("accuracy", "Lines: Student's 95 % interval; strokes: the seeds.", _accuracy_figure(run, groups))
    ]
    rows = []
    for name in groups.names:
        row = [escape(groups.label(name))]
        for split, by_name in found.items():
            level = by_name.get(name)
            spread = run["accuracy"][split][list(by_name).index(name)]["sd"] if level else 0.0
            cell = (
                f"{number(100 * level.value)} &plusmn; {number(100 * spread)}<small>{level.interval}</small>"
                if level
                else ""
            )
            row.append(cell or "&ndash;")
        rows.append(row)
    section.table = html_table(["group", *(f"{escape(split)} accuracy, %" for split in found)], rows)
    section.remarks = [
        "After the sign ±: the standard deviation over the seeds; in brackets Student's interval of the mean."
    ]
    section.rows = {
        "accuracy": [
            {"split": split, "group": name, **one}
            for split, by_name in found.items()
            for name, one in zip(by_name, run["accuracy"][split], strict=True)
        ]
    }
    return [section]


def _accuracy_figure(run: Results, groups: Groups) -> str:
    splits = [split for split in ("train", "test") if split in run["accuracy"]] or list(run["accuracy"])
    series, each = [], []
    for place, split in enumerate(splits):
        levels = by_group(run, groups, split, run["accuracy"][split])
        marks = tuple(levels[name].mark if name in levels else None for name in groups.names)
        series.append(Series(split, marks, figures.GROUP_COLOURS[place]))
        each.append([[100 * v for v in levels[name].values] if name in levels else [] for name in groups.names])
    names = [groups.label(name) for name in groups.names]
    title = "Accuracy of the trained models per group"
    return figures.dot_rows(title, names, series, axis="accuracy, %", each=each, limits=(0.0, 100.0))


# Claims


def claims(run: Results, groups: Groups) -> list[Section]:
    """Return the section of the claims: a verdict for each claim and group, by its interval over the seeds."""
    records = run.get("claims") or []
    if not records:
        return []
    section = Section(_finding(records, len(run["seeds"]), groups))
    usual = sum("level" not in record for record in records)
    given = [record for record in records if record["mean"] is not None]
    section.figures = _figures(given, groups)
    section.table = _table(records, groups)
    section.remarks = [
        "A claim is one number per run and the side of a bound on which the paper sees it. It holds where the whole "
        "Student's 95 % interval of the mean over the seeds lies on that side, it does not hold where all of it lies "
        "on the other, and else it is undecided.",
        f"Of {times(usual, 'interval')} of 95 %, about {0.05 * usual:.1f} miss the true mean by chance.",
        *([NO_SELECTIVITY] if any(record["experiment"] == "1a" for record in records) else []),
        *([CLAIMS_OF_1H] if any(record["experiment"] == "1h" for record in records) else []),
    ]
    section.rows = {"claims": records}
    return [section]


def _finding(records: Sequence[Results], seeds: int, groups: Groups) -> str:
    counts = Counter(record["verdict"] for record in records)
    parts = [
        f"{counts[verdict]} {words}"
        for verdict, words in zip(VERDICTS, ("hold", "do not hold", "are undecided"), strict=True)
    ]
    lacking = sum(record["mean"] is None for record in records)
    parts += [f"{lacking} lack a number in some seed"] if lacking else []
    text = f"Of {times(len(records), 'claim')} about a group, over {times(seeds, 'seed')}, {listed(parts)}."
    for verdict, words in zip(VERDICTS[:2], ("Holds", "Does not hold"), strict=True):
        found = dict.fromkeys(
            f"{record['experiment']} {record['text']}" for record in records if record["verdict"] == verdict
        )
        about = [f"{claim} ({_groups_of(records, claim, verdict, groups)})" for claim in found]
        text += f" {words}: {'; '.join(about)}." if about else ""
    return text


def _groups_of(records: Sequence[Results], claim: str, verdict: str, groups: Groups) -> str:
    named = [
        f"G{groups.names.index(record['group'])}"
        for record in records
        if (f"{record['experiment']} {record['text']}", record["verdict"]) == (claim, verdict)
    ]
    return listed(named, 12)


def _bound(record: Results) -> str:
    """Return on which side of what the paper sees a number."""
    return f"{record['side']} {record['bound']:g} {record['unit']}"


def _figures(records: Sequence[Results], groups: Groups) -> list[tuple[str, str, str]]:
    """Return one figure per unit: a row per claim, its groups one below the other."""
    drawn = []
    for unit, words in UNITS.items():
        of_unit = [record for record in records if record["unit"] == unit]
        rows = list(dict.fromkeys(_row_of(record) for record in of_unit))
        if not rows:
            continue
        by_row = {(*_row_of(record), record["group"]): record for record in of_unit}
        series, each = [], []
        for place, name in enumerate(groups.names):
            found = [by_row.get((*row, name)) for row in rows]
            if any(found):
                colour = figures.GROUP_COLOURS[place % len(figures.GROUP_COLOURS)]
                series.append(Series(groups.label(name), tuple(_mark(one) if one else None for one in found), colour))
                each.append([one["values"] if one else [] for one in found])
        values = [value for record in of_unit for value in record["values"]]
        limits = _limits(values, of_unit)
        caption = (
            "Filled: the claim holds. Claims are of numbers above 0 where they name no bound. Lines: Student's 95 % "
            "interval, cut at the edge; strokes: the seeds."
        )
        svg = figures.dot_rows(
            f"Claims measured in {words}",
            [f"{experiment} {text}{f' ({bound})' if said else ''}" for experiment, text, bound, said in rows],
            series,
            axis=words,
            each=each,
            limits=limits,
            names=290.0,
        )
        drawn.append((f"claims-{ {'%': 'percent'}.get(unit, unit) }", caption, svg))
    return drawn


def _row_of(record: Results) -> tuple[str, str, str, bool]:
    """Return what a row of a figure is of: experiment, claim, bound, and whether the bound needs saying."""
    return record["experiment"], record["text"], _bound(record), (record["side"], record["bound"]) != ("above", 0)


def _limits(values: Sequence[float], records: Sequence[Results]) -> tuple[float, float]:
    """Return a scale that holds every seed and bound; wider for intervals only as far again as the seeds reach."""
    low, high = min([0.0, *values, *(r["bound"] for r in records)]), max([0.0, *values, *(r["bound"] for r in records)])
    room = (high - low) / 2
    return max(min(low, *(r["low"] for r in records)), low - room), min(
        max(high, *(r["high"] for r in records)), high + room
    )


def _mark(record: Results) -> Mark:
    return Mark(record["mean"], record["low"], record["high"], record["verdict"] == "holds")


def _table(records: Sequence[Results], groups: Groups) -> str:
    rows = []
    for record in records:
        mean = "&ndash;"
        if record["mean"] is not None:
            mean = f"{number(record['mean'])}<small>[{number(record['low'])}, {number(record['high'])}]</small>"
        verdict = escape(record["verdict"])
        rows.append(
            [
                escape(record["experiment"]),
                escape(record["text"]),
                escape(groups.label(record["group"])),
                ", ".join("&ndash;" if value is None else number(value) for value in record["values"]),
                mean,
                escape(_bound(record)),
                f"<b>{verdict}</b>" if record["verdict"] != "undecided" else verdict,
            ]
        )
    header = ["", "claim", "group", "per seed", "mean over the seeds", "the paper sees it", "verdict"]
    return html_table(header, rows, heads=3)
