"""The opening of the page: the trained model before any edit, what came out, how to read it, and the setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, number, signed
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import Level, by_group
from neuronsurgery.study.report.levels import level_of as accuracy_level
from neuronsurgery.study.report.page import bullets, figures_html, folded, paragraph
from neuronsurgery.study.report.section import Chapter, Entry
from neuronsurgery.study.report.tables import html_table, words_table
from neuronsurgery.study.report.wording import PRESETS, level_of, listed, percent, times

STAGE_ONE_RULES: Final = (
    "A change is accuracy after the edit minus accuracy before it, of the same examples, in percentage points.",
    "An effect on a group is seen where the interval of its change excludes 0 (of several random draws: in more than "
    "half of them). No effect of a point or more: the interval lies within one point of 0. Undecided: neither.",
    "A group's own gradient: the neurons whose gradient of that group's mean loss is largest were edited, and the "
    "figure shows the accuracy of that same group. Magnitude chooses the same neurons for every group.",
    "In a table, bold: an effect is seen; in brackets the interval; p of McNemar's exact test. Of several draws: "
    "mean and standard deviation, in how many an effect is seen, the outermost ends of the intervals, the median p.",
)
MINORITY: Final = (
    "Minority groups, those that are rare in training, are hatched, tinted, framed or drawn thick, and named so."
)
PARTS: Final[Mapping[str, str]] = {"1": "Stage 1", "2": "Stage 2", "fragility": "fragility"}


def title_of(run: Mapping[str, Any], chapters: Sequence[Chapter]) -> str:
    """Return the title of the page: the stages that it has something of."""
    stages = dict.fromkeys(chapter.entry.stage for chapter in chapters)
    parts = [PARTS[stage] for stage in stages if stage in PARTS]
    over = f"{times(len(run['seeds']), 'seed')} of {run['settings'].get('data')}" if run.get("kind") == "seeds" else ""
    return ": ".join(["Critical neurons", *([listed(parts)] if parts else [])]) + (f", {over}" if over else "")


def opening_html(
    run: Mapping[str, Any], groups: Groups, chapters: Sequence[Chapter], entries: Sequence[Entry] = ()
) -> str:
    """Return all that stands above the sections.

    Args:
        run: the results, of one run or over several seeds.
        groups: of the run.
        chapters: what the run has, for the table of contents and for what came out.
        entries: what a run may have: the page names those that this one was asked for and lacks.
    """
    settings = run["settings"]
    found = {chapter.entry.identifier for chapter in chapters}
    missing = [entry.heading for entry in entries if entry.asked_for(settings) and entry.identifier not in found]
    quick = "A quick run: few epochs and draws. It shows that the program runs; its numbers mean little."
    unfinished = f"This run has no result yet of: {'; '.join(missing)}."
    return "\n".join(
        part
        for part in (
            f"<h1>{escape(title_of(run, chapters))}</h1>",
            paragraph(_told(run)),
            _seed_links(run),
            paragraph(quick, "warning") if settings.get("quick") else "",
            paragraph(unfinished, "warning") if missing else "",
            _contents_html(chapters),
            *(_seeds_opening(run) if run.get("kind") == "seeds" else _model_opening(run, groups)),
            '<h2 id="out">What came out</h2>' if chapters else "",
            _overview_html(chapters),
            "<h3>How to read this</h3>",
            bullets(_how_to_read(run, chapters)),
            folded("Setting and environment", words_table(["setting", ""], _settings_rows(run))),
        )
        if part
    )


def _told(run: Mapping[str, Any]) -> str:
    """Return the run in a line: data, network, training and seeds."""
    settings = run["settings"]
    told = [str(settings.get(key)) for key in ("data", "arch")] + [f"preset {settings.get('preset')}"]
    seeds = f"seeds {listed([str(seed) for seed in run['seeds']], 12)}" if run.get("kind") == "seeds" else ""
    return ", ".join([*told, f"{settings.get('epochs')} epochs", seeds or f"seed {settings.get('seed')}"])


def _seed_links(run: Mapping[str, Any]) -> str:
    """Return the links to the reports of the single seeds, which lie in folders beside this page."""
    if run.get("kind") != "seeds":
        return ""
    links = ", ".join(f'<a href="seed-{seed}/report.html">seed {seed}</a>' for seed in run["seeds"])
    return f"<p>Every seed has a report of its own: {links}.</p>"


def _contents_html(chapters: Sequence[Chapter]) -> str:
    """Return the table of contents."""
    links = [
        f'<li><a href="#e{chapter.entry.identifier}">{escape(chapter.entry.heading)}</a></li>' for chapter in chapters
    ]
    newline = "\n"
    return f'<nav aria-label="Contents"><ul class="contents">\n{newline.join(links)}\n</ul></nav>' if links else ""


def _model_opening(run: Mapping[str, Any], groups: Groups) -> list[str]:
    """Return what is said of the trained model before any edit."""
    return [
        paragraph(_accuracy_words(run, groups), "finding"),
        figures_html(model_figures(run, groups)),
        _groups_table(run, groups),
        paragraph(_counts_words(run)),
        _seconds_html(run),
    ]


def _seeds_opening(run: Mapping[str, Any]) -> list[str]:
    few = "Two seeds say next to nothing of a mean: Student's interval reaches six times their distance to each side."
    return [paragraph(few, "warning")] if len(run["seeds"]) == 2 else []


def _how_to_read(run: Mapping[str, Any], chapters: Sequence[Chapter]) -> list[str]:
    """Return the rules that the sentences of the page follow, and how its intervals are made where the run says so."""
    if run.get("kind") == "seeds":
        said = (
            "Every seed is another data draw, network and order of batches. Intervals are Student's 95 % intervals of "
            "the mean over the seeds, which they take for independent and about normal."
        )
        return [said, MINORITY]
    said = (
        f"Intervals are {percent(level_of(run))} intervals over the examples of one training run. They are not over "
        f"seeds: another seed trains another network, and only several runs can say how far that varies."
    )
    made = run.get("intervals") or {}
    how = [f"{kind}: {made[key]}." for kind, key in (("Intervals", "method"), ("p-values", "p")) if made.get(key)]
    rules = STAGE_ONE_RULES if any(chapter.entry.stage == "1" for chapter in chapters) else ()
    return [*rules[:1], said, *how, *rules[1:], MINORITY]


def _seconds_html(run: Mapping[str, Any]) -> str:
    """Return how long each part of the run took; nothing where the run did not note it."""
    seconds = run.get("seconds") or {}
    rows = [[escape(key), number(value)] for key, value in seconds.items()]
    table = html_table(["part", "seconds"], rows) if rows else ""
    return folded(f"Its parts took {sum(seconds.values()):.0f} seconds", table)


def _overview_html(chapters: Sequence[Chapter]) -> str:
    """Return the table of the experiments, and the first sentence of every chapter that has no row in it."""
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
    others = [chapter for chapter in chapters if not any(any(section.overview) for section in chapter.sections)]
    items = [
        f'<li><a href="#e{chapter.entry.identifier}">{escape(chapter.entry.heading)}</a>. '
        f"{escape(chapter.sections[0].finding)}</li>"
        for chapter in others
    ]
    newline = "\n"
    table = words_table(["experiment", "split", "minority groups", "majority groups"], rows) if rows else ""
    return table + (f"<ul>\n{newline.join(items)}\n</ul>" if items else "")


def model_figures(run: Mapping[str, Any], groups: Groups) -> list[tuple[str, str, str]]:
    """Return the figures of one run's model before any edit: accuracy per group, and how training went."""
    if run.get("kind") == "seeds":
        return []
    if not run["accuracy"]:
        return _training_figures(run)
    caption = "Whiskers: Wilson's 95 % intervals. Hatched: minority groups."
    return [("accuracy", caption, _accuracy_figure(run, groups)), *_training_figures(run)]


def _accuracy_figure(run: Mapping[str, Any], groups: Groups) -> str:
    series = []
    splits = [split for split in ("train", "test") if split in run["accuracy"]] or list(run["accuracy"])
    for place, split in enumerate(splits):
        levels = _accuracies(run, groups, split)
        marks = tuple(levels[name].mark if name in levels else None for name in groups.names)
        series.append(Series(split, marks, figures.ORDERED_COLOURS[2 * place % 3], split if len(split) < 6 else ""))
    names = list(groups.names)
    title = "Accuracy of the trained model per group"
    return figures.grouped_bars(title, names, series, axis="accuracy, %", minority=groups.places, limits=(0.0, 100.0))


def _accuracies(run: Mapping[str, Any], groups: Groups, split: str) -> dict[str, Level]:
    """Return the accuracy of every group that a split has images of."""
    if split in run["counts"]:
        return by_group(run, groups, split, run["accuracy"][split])
    return {name: accuracy_level(share, 0) for name, share in zip(groups.names, run["accuracy"][split], strict=True)}


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
    train, test = (_accuracies(run, groups, split) for split in ("train", "test"))
    gap = {name: 100 * (train[name].value - test[name].value) for name in groups.names if {name} <= {*train} & {*test}}
    parts = [
        f"{groups.label(name)} reaches {number(100 * train[name].value)} % in training and "
        f"{number(100 * test[name].value)} % in test (gap {signed(gap[name])})"
        for name in gap
        if name in groups.minority
    ]
    gaps = [gap[name] for name in groups.majority if name in gap]
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
    levels = {split: _accuracies(run, groups, split) for split in accuracy}
    rows = []
    for place, name in enumerate(groups.names):
        row = [escape(f"G{place} {name}"), "minority" if name in groups.minority else "majority"]
        for split, found in counts.items():
            row.append(_count_cell(found, expected.get(split), place))
        own = {split: found[name] for split, found in levels.items() if name in found}
        row += [
            f"{number(own[s].mark.value)}<small>{own[s].interval}</small>" if s in own else "&ndash;" for s in levels
        ]
        both = {"train", "test"} <= set(own)
        row.append(signed(100 * (own["train"].value - own["test"].value)) if both else "&ndash;")
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
    if run.get("layers"):
        rows.append(["neurons", f"{run.get('neurons', '?')} in {times(len(run['layers']), 'studied layer')}"])
    rows += [[escape(str(key)), escape(str(value))] for key, value in environment.items()]
    rows.append(["neuronsurgery", escape(str(run.get("version", "?")))])
    return rows


def _setting_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
