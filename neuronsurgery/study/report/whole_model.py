"""The sections of 1a, 1c and 1d: the top neurons of the whole model are edited."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Series, number
from neuronsurgery.study.report.effects import (
    POINTS,
    Cell,
    Effect,
    Groups,
    cells_of,
    own_effects,
    scale_words,
    sizes_of,
)
from neuronsurgery.study.report.section import Section
from neuronsurgery.study.report.tables import full_table, own_table
from neuronsurgery.study.report.wording import (
    NO_SELECTIVITY,
    by_both,
    chance_remark,
    comparison,
    listed,
    overview,
    preset_remark,
    step_remark,
    times,
)


def whole_model(run: Mapping[str, Any], groups: Groups, identifier: str, split: str) -> Section:
    """Return the section of 1a, 1c or 1d: the top neurons of the whole model are edited."""
    records = run["experiments"][identifier][split]
    cells = cells_of(records)
    gradient, magnitude = own_effects(cells, "gradient"), own_effects(cells, "magnitude")
    tops = listed([f"top-{k}" for k in sizes_of(cells)])
    draws = max((effect.draws for effect in gradient + magnitude), default=1)
    each = f" in {times(draws, 'draw')} each" if draws > 1 else ""
    scales = list(dict.fromkeys(scale_words(cell.setting) for cell in cells))
    done = {
        "1a": f"The {tops} neurons of the whole model were set to zero",
        "1c": f"The {tops} neurons of the whole model were replaced by Gaussian noise ({listed(scales, 8)}){each}",
        "1d": f"Gaussian noise ({listed(scales, 8)}) was added to the {tops} neurons of the whole model{each}",
    }[identifier]
    section = Section(by_both(done, gradient, magnitude, groups), overview=overview(gradient or magnitude, groups))
    drawn = _top_figures(cells, groups, f"{identifier}-{split}", scales)
    section.figures = [figure for figure in drawn if identifier == "1a" or figure[0].endswith("-gradient")]
    section.more_figures = [figure for figure in drawn if figure not in section.figures]
    section.table = own_table(cells, groups)
    section.full_table = full_table(cells, groups, f"tables/{identifier}.csv")
    section.remarks = [
        comparison(gradient, groups),
        *([NO_SELECTIVITY] if identifier == "1a" else []),
        *_against_zero(run, groups, identifier, split, gradient),
    ]
    section.remarks += step_remark(run, split, groups) + preset_remark(run, magnitude, groups)
    section.remarks += chance_remark(run, gradient + magnitude)
    return section


def _top_figures(cells: Sequence[Cell], groups: Groups, slug: str, scales: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return one figure of grouped bars per scale and criterion, all on one vertical scale."""
    drawn: list[tuple[str, str, list[Series]]] = []
    for place, scale in enumerate(scales):
        for criterion, words in (("gradient", "by each group's own gradient"), ("magnitude", "by magnitude")):
            found = [cell for cell in cells if scale_words(cell.setting) == scale]
            series = [_top_series(found, criterion, k, shade, groups) for shade, k in enumerate(sizes_of(found))]
            if any(mark for one in series for mark in one.marks):
                title = f"Change of accuracy, neurons chosen {words}" + (f", {scale}" if scale else "")
                drawn.append((f"{slug}{f'-scale{place}' if scale else ''}-{criterion}", title, series))
    limits = figures.limits_of(one for _, _, series in drawn for one in series)
    whisker = "ranges over the draws" if any(e.draws > 1 for c in cells for e in c.effects.values()) else "intervals"
    names = list(groups.names)
    return [
        (
            name,
            f"Bars: top-k, from light to dark. Whiskers: {whisker}. Hatched: minority groups.",
            figures.grouped_bars(title, names, series, axis=POINTS, minority=groups.places, limits=limits),
        )
        for name, title, series in drawn
    ]


def _top_series(cells: Sequence[Cell], criterion: str, k: int, shade: int, groups: Groups) -> Series:
    own = {e.group: e.mark for e in own_effects([cell for cell in cells if cell.setting["k"] == k], criterion)}
    colours = figures.ORDERED_COLOURS
    marks = tuple(own.get(name) for name in groups.names)
    return Series(f"top-{k}", marks, colours[shade % len(colours)], str(k))


def _against_zero(
    run: Mapping[str, Any], groups: Groups, identifier: str, split: str, effects: Sequence[Effect]
) -> list[str]:
    """Return how large 1c or 1d are beside 1a on the minority groups: means of the absolute change."""
    zeroed = own_effects(cells_of(run["experiments"].get("1a", {}).get(split, [])), "gradient")
    before = [abs(effect.change) for effect in zeroed if effect.group in groups.minority]
    after = [abs(effect.change) for effect in effects if effect.group in groups.minority]
    if identifier == "1a" or not before or not after:
        return []
    return [
        f"On the minority groups the mean absolute change over all scales and top-k is "
        f"{number(100 * statistics.fmean(after))} points here, and {number(100 * statistics.fmean(before))} points "
        f"where the same neurons were set to zero (1a)."
    ]
