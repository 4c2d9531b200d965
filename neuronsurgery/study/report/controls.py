"""The section of 1g: neurons that are not critical, a share of the model or matched to each critical set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, signed
from neuronsurgery.study.report.effects import (
    POINTS,
    Cell,
    Effect,
    Groups,
    cells_of,
    own_effects,
    setting_words,
    sizes_of,
)
from neuronsurgery.study.report.section import Section
from neuronsurgery.study.report.tables import effect_cell, full_table, group_headers, html_table, p_text
from neuronsurgery.study.report.wording import listed, outcome, plain_p, step_remark, strongest, times, where

MATCHED: Final = (("same layers", "same layers", figures.GREY), ("random", "whole model", figures.GROUP_COLOURS[0]))
"""Of the controls matched in number to a critical set: criterion, what they are drawn from, colour."""


def controls(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1g: random neurons, neurons of the same layers, and the empirical p-value."""
    cells = cells_of(run["experiments"]["1g"][split])
    random = _shares(cells)
    effects = [effect for cell in random for effect in cell.effects.values()]
    tests = run.get("control_p", {}).get(split, [])
    section = Section(_control_finding(random, effects, groups) + _test_words(tests, groups))
    section.overview = _single_overview(random, groups) if effects else ("", "")
    section.figures = _control_figures(run, cells, groups, split) + _test_figures(cells, tests, groups, split)
    section.table = _own_columns(random, groups) + _test_table(tests, groups)
    section.full_table = full_table(cells, groups, "tables/1g.csv")
    section.remarks = step_remark(run, split, groups)
    section.rows["control_p"] = [{"split": split} | test for test in tests]
    if tests:
        draws = max(test["draws"] for test in tests)
        repeated = [test for test in tests if test.get("distinct", test["draws"]) < test["draws"]]
        if repeated:
            fewest = min(test["distinct"] for test in repeated)
            section.remarks.append(
                f"A small layer has few sets to draw: of {times(draws, 'draw')}, as few as {fewest} are different."
            )
        section.remarks.append(
            f"The empirical p-value is (1 + draws that change as much or more) / (1 + draws): with {draws} draws it "
            f"cannot be below {plain_p(1 / (1 + draws))}. The effect of a group's neurons on the other groups is in "
            f"tables/control_p.csv."
        )
    return section


def _shares(cells: Iterable[Cell]) -> list[Cell]:
    """Return the paper's controls, a share of the model: not those matched in number to a critical set."""
    return [cell for cell in cells if cell.setting["criterion"] == "random" and cell.setting["fraction"] is not None]


def _control_finding(random: Sequence[Cell], effects: Sequence[Effect], groups: Groups) -> str:
    if not effects:
        return "No control of random neurons was recorded."
    shares = [f"{100 * cell.setting['fraction']:g} %" for cell in random if cell.setting["fraction"] is not None]
    span = f"{shares[0]} to {shares[-1]}" if len(shares) > 1 else listed(shares)
    draws = times(max(effect.draws for effect in effects), "draw")
    largest = strongest(effects)
    said = f"the largest mean change is {signed(100 * largest.change)} points, on {groups.label(largest.group)}"
    said = f"{said} {where(largest)}" if abs(largest.change) > 1e-9 else "no example of any group changed"
    singles = [f"{groups.label(name)}, {_single_words(random, [name])}" for name in groups.names]
    return (
        f"Random neurons that are not critical, {span} of the model, were set to zero in {draws} each. By most of the "
        f"draws of a size: {outcome(effects, groups)}; {said}. Single draws whose interval excludes 0, a size counted "
        f"once: {'; '.join(singles)}."
    )


def _single_words(random: Sequence[Cell], names: Sequence[str]) -> str:
    """Return in how many draws an effect on some groups is seen, and the furthest change of any draw.

    Shares that come to as many neurons are the same draws, and count once.
    """
    different = {cell.neurons: cell for cell in random}.values()
    effects = [cell.effects[name] for cell in different for name in names if name in cell.effects]
    seen, draws = sum(effect.seen_in for effect in effects), sum(effect.draws for effect in effects)
    # Of one draw, low and high are the ends of its interval.
    changes = [(e.change,) if e.draws == 1 else (e.low, e.high) for e in effects]
    furthest = max((change for ends in changes for change in ends), key=abs, default=0.0)
    return f"seen in {seen} of {times(draws, 'draw')}; furthest change {signed(100 * furthest)} points"


def _single_overview(random: Sequence[Cell], groups: Groups) -> tuple[str, str]:
    """Return what single draws did to the minority groups and to the others, for the table at the top."""
    rare = [name for name in groups.names if name in groups.minority]
    few, many = (_single_words(random, side) if side else "no such group" for side in (rare, groups.majority))
    return few, many


def _own_tests(tests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the tests of each group's own neurons, or of neurons chosen for all."""
    return [test for test in tests if test["chosen_for"] in (test["group"], "all")]


def _test_words(tests: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return against which controls the critical neurons stand out, in words."""
    said = []
    for kind, words in (
        ("same layers", "as many neurons of the same layers"),
        ("whole model", "as many of the whole model"),
    ):
        found = [test for test in _own_tests(tests) if test["kind"] == kind and test["criterion"] == "gradient"]
        if not found:
            continue
        small = []
        for name in groups.names:
            of_group = [test for test in found if test["group"] == name and test["p"] < 0.05]
            if of_group:
                tops = ", ".join(f"top-{test['k']} p = {plain_p(test['p'])}" for test in of_group)
                small.append(f"{groups.label(name)} ({tops})")
        draws = max(test["draws"] for test in found)
        stand = "do not stand out for any group (every p at least 0.05)"
        if small:
            stand = f"stand out for {listed(small, 6)}"
        elif 1 / (1 + draws) >= 0.05:
            stand = f"cannot stand out: {times(draws, 'draw')} are too few for a p below 0.05"
        said.append(f" Against random draws of {words}, the neurons chosen by a group's own gradient {stand}.")
    return "".join(said)


def _own_columns(cells: Sequence[Cell], groups: Groups) -> str:
    """Return the table of the random controls: one row per share."""
    rows = [
        [
            escape(setting_words(cell.setting)),
            str(cell.neurons),
            *(effect_cell(cell.effects.get(name)) for name in groups.names),
        ]
        for cell in cells
    ]
    return html_table(["share", "neurons", *group_headers(groups)], rows) if rows else ""


def _test_table(tests: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return the table of empirical p-values of each group's own neurons, and of those chosen for all."""
    kinds = list(dict.fromkeys(test["kind"] for test in tests))
    by_row: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    for test in _own_tests(tests):
        by_row.setdefault((test["criterion"], test["group"], test["k"]), {})[test["kind"]] = test
    rows = []
    for (criterion, name, k), found in by_row.items():
        change = next(iter(found.values()))["change"]
        row = [escape(groups.label(name)), f"top-{k} by {escape(criterion)}", signed(100 * change)]
        rows.append(row + [_test_cell(found.get(kind)) for kind in kinds])
    header = ["effect on", "critical neurons", "change, points", *(f"p, draws from the {escape(k)}" for k in kinds)]
    return html_table(header, rows, heads=2) if rows else ""


def _test_cell(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "&ndash;"
    p = f"<b>{p_text(test['p'])}</b>" if test["p"] < 0.05 else p_text(test["p"])
    return f"{p}<small>{times(test['draws'], 'draw')}</small>"


def _control_figures(
    run: Mapping[str, Any], cells: Sequence[Cell], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    """Return the figure of share against change, with the cuts of 1a at its right end where the run has them."""
    random = _shares(cells)
    if not random:
        return []
    places = [f"{setting_words(cell.setting)} random" for cell in random]
    marks: dict[str, list[Mark | None]] = {
        name: [cell.effects[name].mark if name in cell.effects else None for cell in random] for name in groups.names
    }
    zeroed = cells_of(run["experiments"].get("1a", {}).get(split, []))
    for k in sizes_of(zeroed):
        own = {e.group: e.mark for e in own_effects([c for c in zeroed if c.setting["k"] == k], "gradient")}
        places.append(f"critical top-{k}")
        for name in groups.names:
            marks[name].append(own.get(name))
    svg = figures.dot_ranges("Random neurons, and the critical ones", places, groups.series(marks), axis=POINTS)
    caption = (
        "Random neurons: mean and range over the draws; filled where more than half of the intervals exclude 0. "
        "Critical: each group's own, with its interval."
    )
    return [(f"1g-{split}-shares", caption, svg)]


def _test_figures(
    cells: Sequence[Cell], tests: Sequence[Mapping[str, Any]], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    """Return one figure per k, all on one scale: every group's critical change beside the draws matched to it."""
    own = [test for test in tests if test["chosen_for"] == test["group"] and test["criterion"] == "gradient"]
    plots = []
    for k in sorted({test["k"] for test in own}):
        found = {(test["group"], test["kind"]): test for test in own if test["k"] == k}
        cuts = {name: Mark(100 * test["change"]) for (name, _), test in found.items()}
        series = [Series("critical neurons", tuple(cuts.get(name) for name in groups.names), figures.HIGHLIGHT)]
        for criterion, source, colour in MATCHED:
            marks = tuple(_matched_mark(cells, criterion, name, k) for name in groups.names)
            series += [Series(f"draws from the {source}", marks, colour)] if any(marks) else []
        same = {name: found[name, "same layers"]["p"] for name in groups.names if (name, "same layers") in found}
        places = [
            f"{name}, p\N{NO-BREAK SPACE}{plain_p(same[name])}" if name in same else name for name in groups.names
        ]
        plots.append((k, places, series))
    limits = figures.limits_of(one for _, _, series in plots for one in series)
    caption = "Whiskers: range of the draws, of as many neurons. Under a group: empirical p against the same layers."
    return [
        (
            f"1g-{split}-matched-top{k}",
            caption,
            figures.dot_ranges(
                f"Top-{k} against as many random neurons",
                places,
                series,
                axis=POINTS,
                minority=groups.places,
                limits=limits,
            ),
        )
        for k, places, series in plots
    ]


def _matched_mark(cells: Iterable[Cell], criterion: str, name: str, k: int) -> Mark | None:
    """Return the mean and range of the draws matched to a group's own top-k, on that group."""
    wanted = (criterion, name, k)
    return next(
        (
            cell.effects[name].mark
            for cell in cells
            if tuple(cell.setting[key] for key in ("criterion", "chosen_for", "k")) == wanted and name in cell.effects
        ),
        None,
    )
