"""The opening of the page: the trained model before any edit, what came out, how to read it, and the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, number, signed
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.page import bullets, figures_html, folded, paragraph
from neuronsurgery.study.report.section import Chapter, Entry
from neuronsurgery.study.report.tables import html_table
from neuronsurgery.study.report.wording import PRESETS, level_of, listed, percent, times

PLAIN_RULES: Final = (
    "A change is accuracy after the edit minus accuracy before it, of the same examples, in percentage points.",
    "An effect on a group is seen where the interval of its change excludes 0 (of several random draws: in more than "
    "half of them). No effect of a point or more: the interval lies within one point of 0. Undecided: neither.",
    "A group's own gradient: the neurons whose gradient of that group's mean loss is largest were edited, and the "
    "figure shows the accuracy of that same group. Magnitude chooses the same neurons for every group.",
    "In a table, bold: an effect is seen; in brackets the interval; p of McNemar's exact test. Of several draws: "
    "mean and standard deviation, in how many an effect is seen, the outermost ends of the intervals, the median p.",
    "Minority groups, where class and attribute disagree, are hatched or drawn thick, and named so.",
)


def opening_html(
    run: Mapping[str, Any], groups: Groups, chapters: Sequence[Chapter], awaited: Sequence[Entry] = ()
) -> str:
    """Return all that stands above the sections.

    Args:
        run: the results.
        groups: of the run.
        chapters: what the run has, for the table of what came out.
        awaited: what a whole run has: the page names those that this one lacks.
    """
    settings = run["settings"]
    found = {chapter.entry.identifier for chapter in chapters}
    missing = [f"{entry.identifier} ({entry.title})" for entry in awaited if entry.identifier not in found]
    quick = "A quick run: few epochs and draws. It shows that the program runs; its numbers mean little."
    unfinished = f"This run has no result yet of {listed(missing, 7)}."
    told = [str(settings.get(key)) for key in ("data", "arch")] + [f"preset {settings.get('preset')}"]
    told += [f"{settings.get('epochs')} epochs", f"seed {settings.get('seed')}"]
    table = html_table(["setting", ""], _settings_rows(run)).replace(
        '<div class="scroll">', '<div class="scroll words">'
    )
    return "\n".join(
        part
        for part in (
            "<h1>Critical neurons: Stage 1</h1>",
            paragraph(", ".join(told)),
            paragraph(quick, "warning") if settings.get("quick") else "",
            paragraph(unfinished, "warning") if missing else "",
            paragraph(_accuracy_words(run, groups), "finding"),
            figures_html(model_figures(run, groups)),
            _groups_table(run, groups),
            paragraph(_counts_words(run)),
            bullets([_seconds_words(run)]),
            "<h2>What came out</h2>" if chapters else "",
            _overview_html(chapters),
            "<h3>How to read this</h3>",
            bullets(_how_to_read(run)),
            folded("Setting and environment", table),
        )
        if part
    )


def _how_to_read(run: Mapping[str, Any]) -> list[str]:
    """Return the rules that the sentences of the page follow, and how its intervals are made where the run says so."""
    made = run.get("intervals") or {}
    said = (
        f"Intervals are {percent(level_of(run))} intervals over the examples of one training run. They are not over "
        f"seeds: another seed trains another network, and only several runs can say how far that varies."
    )
    how = [f"{kind}: {made[key]}." for kind, key in (("Intervals", "method"), ("p-values", "p")) if made.get(key)]
    return [PLAIN_RULES[0], said, *how, *PLAIN_RULES[1:]]


def _seconds_words(run: Mapping[str, Any]) -> str:
    """Return how long each part of the run took; nothing where the run did not note it."""
    seconds = run.get("seconds") or {}
    if not seconds:
        return ""
    each = ", ".join(f"{key} {number(value)}" for key, value in seconds.items())
    return f"Seconds: {each}; {number(sum(seconds.values()))} together."


def _overview_html(chapters: Sequence[Chapter]) -> str:
    rows = [
        [
            f'<a href="#e{chapter.entry.identifier}">{escape(chapter.entry.heading)}</a>',
            escape(section.split),
            *map(escape, section.overview),
        ]
        for chapter in chapters
        for section in chapter.sections
        if any(section.overview)
    ]
    table = html_table(["experiment", "split", "minority groups", "majority groups"], rows)
    return table.replace('<div class="scroll">', '<div class="scroll words">') if rows else ""


def model_figures(run: Mapping[str, Any], groups: Groups) -> list[tuple[str, str, str]]:
    """Return the figures of the trained model before any edit: accuracy per group, and how training went."""
    if not run["accuracy"]:
        return _training_figures(run)
    caption = "Whiskers: Wilson's 95 % intervals. Hatched: minority groups."
    return [("accuracy", caption, _accuracy_figure(run, groups)), *_training_figures(run)]


def _accuracy_figure(run: Mapping[str, Any], groups: Groups) -> str:
    series = []
    splits = [split for split in ("train", "test") if split in run["accuracy"]] or list(run["accuracy"])
    for place, split in enumerate(splits):
        counts = run["counts"].get(split, [0] * len(groups.names))
        marks = []
        for share, count in zip(run["accuracy"][split], counts, strict=True):
            low, high = wilson(share, count)
            marks.append(Mark(100 * share, 100 * low, 100 * high))
        series.append(
            Series(split, tuple(marks), figures.ORDERED_COLOURS[2 * place % 3], split if len(split) < 6 else "")
        )
    names = list(groups.names)
    title = "Accuracy of the trained model per group"
    return figures.grouped_bars(title, names, series, axis="accuracy, %", minority=groups.places, limits=(0.0, 100.0))


def _training_figures(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures of loss and accuracy as met in training, where the run recorded them."""
    steps = run.get("trajectory") or []
    drawn = []
    for key, axis, factor in (("accuracy", "accuracy, %", 100.0), ("loss", "cross entropy", 1.0)):
        marks = [None if step.get(key) is None else Mark(factor * step[key]) for step in steps]
        if sum(mark is not None for mark in marks) > 1:
            one = Series(f"{key} of the training batches as met", tuple(marks), figures.GROUP_COLOURS[0])
            title = f"{key.capitalize()} during training"
            places = [str(step["epoch"]) for step in steps]
            drawn.append(
                (f"training-{key}", "", figures.depth_lines(title, places, [one], axis=axis, below="epoch", spacing=14))
            )
    return drawn


def _accuracy_words(run: Mapping[str, Any], groups: Groups) -> str:
    """Return the train and test accuracy of minority and majority groups, and the gaps, in one sentence."""
    if not {"train", "test"} <= set(run["accuracy"]):
        return "The run has no accuracy on both training and test set yet."
    train, test = (dict(zip(groups.names, run["accuracy"][split], strict=True)) for split in ("train", "test"))
    parts = [
        f"{groups.label(name)} reaches {number(100 * train[name])} % in training and {number(100 * test[name])} % in "
        f"test (gap {signed(100 * (train[name] - test[name]))})"
        for name in groups.names
        if name in groups.minority
    ]
    gaps = [100 * (train[name] - test[name]) for name in groups.majority]
    rest = ""
    if gaps:
        ends = list(dict.fromkeys(f"{signed(gap)}" for gap in (min(gaps), max(gaps))))
        rest = f"the gap of the majority groups is {' to '.join(ends)} points"
    said = "; ".join(part for part in (listed(parts, 6) if parts else "", rest) if part)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _groups_table(run: Mapping[str, Any], groups: Groups) -> str:
    """Return the table of the groups: counts found (expected), accuracy, the gap, and what one example is worth."""
    counts, accuracy, expected = run["counts"], run["accuracy"], run.get("expected_counts") or {}
    header = ["group", "kind", *(f"{escape(split)} examples" for split in counts)]
    header += [f"{escape(split)} accuracy, %" for split in accuracy] + [
        "gap train &minus; test",
        "one train example, points",
    ]
    rows = []
    for place, name in enumerate(groups.names):
        row = [escape(f"G{place} {name}"), "minority" if name in groups.minority else "majority"]
        for split, found in counts.items():
            row.append(_count_cell(found, expected.get(split), place))
        for split, shares in accuracy.items():
            low, high = wilson(shares[place], counts.get(split, {place: 0})[place])
            row.append(f"{number(100 * shares[place])}<small>[{number(100 * low)}, {number(100 * high)}]</small>")
        both = {"train", "test"} <= set(accuracy)
        row.append(signed(100 * (accuracy["train"][place] - accuracy["test"][place])) if both else "&ndash;")
        size = counts.get("train", {}) and counts["train"][place]
        row.append(number(100 / size, 2) if size else "&ndash;")
        rows.append(row)
    return html_table(header, rows)


def _count_cell(found: Sequence[int], expected: Sequence[int] | None, place: int) -> str:
    share = 100 * found[place] / sum(found) if sum(found) else 0.0
    cell = f"{found[place]}<small>{number(share)} %</small>"
    if expected is None:
        return cell
    match = "as the paper's" if expected[place] == found[place] else f"<b>the paper has {expected[place]}</b>"
    return f"{cell}<small>{match}</small>"


def _counts_words(run: Mapping[str, Any]) -> str:
    expected = run.get("expected_counts") or {}
    if not expected:
        return ""
    wrong = [split for split, counts in expected.items() if list(counts) != list(run["counts"].get(split, ()))]
    if wrong:
        return f"The group counts of {listed(wrong)} differ from the paper's: both are in the table."
    return f"The group counts of {listed(list(expected))} are the paper's."


def _settings_rows(run: Mapping[str, Any]) -> list[list[str]]:
    """Return the setting and the environment as rows of name and value."""
    settings, environment = run["settings"], run.get("environment", {})
    preset = str(settings.get("preset"))
    told = {
        "preset": f"{preset} ({PRESETS[preset]})" if preset in PRESETS else preset,
        "weights": settings.get("weights") or "none: random initialisation",
        "quick": "yes: few epochs and draws" if settings.get("quick") else "no",
    }
    rows = [[escape(str(key)), escape(told.get(key, _setting_text(value)))] for key, value in settings.items()]
    rows.append(["neurons", f"{run.get('neurons', '?')} in {times(len(run.get('layers', ())), 'studied layer')}"])
    rows += [[escape(str(key)), escape(str(value))] for key, value in environment.items()]
    rows.append(["neuronsurgery", escape(str(run.get("version", "?")))])
    return rows


def _setting_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
