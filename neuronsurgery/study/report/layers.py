"""The sections of 1e and 1f: one layer at a time is edited or put back, and the changes are drawn over depth."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final, NamedTuple

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, number
from neuronsurgery.study.report.effects import POINT, POINTS, Cell, Effect, Groups, cells_of, own_effects, sizes_of
from neuronsurgery.study.report.section import Section
from neuronsurgery.study.report.tables import effect_cell, full_table, group_headers, html_table
from neuronsurgery.study.report.wording import (
    by_both,
    chance_remark,
    comparison,
    listed,
    outcome,
    overview,
    preset_remark,
    step_remark,
    strongest,
    times,
)

LINES_READ: Final = "Filled markers: the interval excludes 0 (drawn). Hollow: it includes 0. Thick: minority groups."


def within_layers(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1e: the top neurons of each layer in turn."""
    cells = cells_of(run["experiments"]["1e"][split])
    layers = _layer_order(run, cells)
    gradient, magnitude = own_effects(cells, "gradient"), own_effects(cells, "magnitude")
    tops = listed([f"top-{k}" for k in sizes_of(cells)])
    done = f"In each of {times(len(layers), 'layer')} in turn the {tops} neurons were set to zero"
    section = Section(by_both(done, gradient, magnitude, groups), overview=overview(gradient or magnitude, groups))
    section.figures = _depth_figures(_own_plots(cells, f"1e-{split}"), layers, groups)
    section.more_figures = _depth_figures(_choice_plots(cells, groups, f"1e-{split}"), layers, groups)
    section.table = _layer_table(gradient, magnitude, groups)
    section.full_table = full_table(cells, groups, "tables/1e.csv")
    section.remarks = [comparison(gradient, groups), *step_remark(run, split, groups)]
    section.remarks += preset_remark(run, magnitude, groups) + chance_remark(run, gradient + magnitude)
    return section


def _own_plots(cells: Sequence[Cell], slug: str) -> Iterator[Depth]:
    """Yield the plots of each group's change under its own neurons, one per k."""
    for k in sizes_of(cells):
        chosen = [cell for cell in cells if cell.setting["k"] == k]
        effects = [(cell.setting["layer"], effect) for cell in chosen for effect in own_effects([cell], "gradient")]
        yield Depth(f"{slug}-own-top{k}", f"Top-{k} of each layer by each group's own gradient", effects)


def _choice_plots(cells: Sequence[Cell], groups: Groups, slug: str) -> Iterator[Depth]:
    """Yield the plots of every group's change under one choice: by magnitude, by the gradient of each group."""
    choices = [("magnitude", "all", "magnitude", "magnitude")]
    for place, name in enumerate(groups.names):
        choices.append(("gradient", name, f"the gradient of {groups.label(name)}", f"group{place}"))
    for k in sizes_of(cells):
        for criterion, chosen_for, words, short in choices:
            wanted = (criterion, chosen_for, k)
            chosen = [c for c in cells if tuple(c.setting[key] for key in ("criterion", "chosen_for", "k")) == wanted]
            effects = [(cell.setting["layer"], effect) for cell in chosen for effect in cell.effects.values()]
            yield Depth(f"{slug}-{short}-top{k}", f"Top-{k} of each layer by {words}", effects)


def _layer_table(gradient: Sequence[Effect], magnitude: Sequence[Effect], groups: Groups) -> str:
    """Return per group in how many layers (and top-k) an effect is seen, and the strongest."""
    rows = []
    for words, effects in (("each group's own gradient", gradient), ("magnitude", magnitude)):
        for name in groups.names:
            found = [effect for effect in effects if effect.group == name]
            if found:
                best = strongest(found)
                seen = sum(effect.seen for effect in found)
                rows.append(
                    [
                        words,
                        escape(groups.label(name)),
                        f"{seen} of {len(found)}",
                        effect_cell(best),
                        escape(best.setting),
                    ]
                )
    return html_table(["chosen by", "effect on", "seen in", "largest change", "where"], rows, heads=2)


def rewinding(run: Mapping[str, Any], groups: Groups, split: str) -> Section:
    """Return the section of 1f: sensitive layers per group and distance, and the changes over depth."""
    cells = cells_of(run["experiments"]["1f"][split])
    plain = [effect for cell in cells if not cell.setting["with_norm"] for effect in cell.effects.values()]
    layers = _layer_order(run, cells)
    distances = sorted({cell.setting["distance"] for cell in cells})
    sensitive = run.get("sensitive_layers", {}).get(split, [])
    back = listed([str(distance) for distance in distances], 12)
    done = f"Each of {times(len(layers), 'layer')} in turn was put back by {back} epochs, the rest unchanged"
    section = Section(f"{done}: {outcome(plain, groups)}.{_sensitive_words(sensitive, groups)}")
    section.overview = overview(plain, groups)
    section.figures = _sensitive_figures(sensitive, groups, split)
    section.table = _sensitive_table(sensitive, groups)
    section.full_table = full_table(cells, groups, "tables/1f.csv")
    section.figures += _depth_figures(_rewind_plots(cells, f"1f-{split}", with_norm=False), layers, groups)
    section.more_figures = _depth_figures(_rewind_plots(cells, f"1f-{split}", with_norm=True), layers, groups)
    section.remarks = [*_missing_remark(run), comparison(plain, groups), *_lucky_layers(run, cells, split, groups)]
    section.remarks += chance_remark(run, plain)
    section.rows["sensitive_layers"] = [{"split": split} | row for row in sensitive]
    return section


def _rewind_plots(cells: Sequence[Cell], slug: str, *, with_norm: bool) -> Iterator[Depth]:
    """Yield the plots of every group's change under rewinding each layer, one per distance."""
    for distance in sorted({cell.setting["distance"] for cell in cells}):
        chosen = [c for c in cells if c.setting["distance"] == distance and bool(c.setting["with_norm"]) == with_norm]
        effects = [(cell.setting["layer"], effect) for cell in chosen for effect in cell.effects.values()]
        title = f"Each layer put back by {distance} epochs" + (", its norm with it" if with_norm else "")
        yield Depth(f"{slug}-{distance}{'-norm' if with_norm else ''}", title, effects)


def _missing_remark(run: Mapping[str, Any]) -> list[str]:
    missing = run.get("missing_distances") or []
    if not missing:
        return []
    epochs = run["settings"].get("epochs")
    named = listed([str(distance) for distance in missing], 12)
    return [
        f"Distances of the paper that this run of {epochs} epochs does not have: {named} epochs. They are not shown."
    ]


def _sensitive_words(sensitive: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    """Return the mean number of sensitive layers of minority and majority groups, and whether it grows."""
    rows = sorted((row for row in sensitive if not row["with_norm"]), key=lambda row: row["distance"])
    if not rows or not groups.minority or not groups.majority:
        return ""
    sides = []
    for names in (groups.minority, groups.majority):
        counts = [row["sensitive"][groups.names.index(name)] for row in rows for name in names]
        sides.append(statistics.fmean(counts))
    order = "more often than" if sides[0] > sides[1] else "less often than" if sides[0] < sides[1] else "as often as"
    totals = [sum(row["sensitive"]) for row in rows]
    growth = ""
    if len(rows) > 1:
        grows = all(a <= b for a, b in itertools.pairwise(totals)) and totals[0] < totals[-1]
        growth = f"; the count {'grows' if grows else 'does not grow steadily'} with the distance"
    return (
        f" A layer is sensitive for a group where the change is 1 point or more: minority groups {order} majority "
        f"groups ({number(sides[0])} against {number(sides[1])} layers on the mean over distances){growth}."
    )


def _sensitive_figures(
    sensitive: Sequence[Mapping[str, Any]], groups: Groups, split: str
) -> list[tuple[str, str, str]]:
    drawn = []
    for norm in (False, True):
        rows = sorted((row for row in sensitive if bool(row["with_norm"]) == norm), key=lambda row: row["distance"])
        if rows:
            marks = {name: [Mark(row["sensitive"][place]) for row in rows] for place, name in enumerate(groups.names)}
            title = "Sensitive layers per group" + (", the norm put back too" if norm else "")
            places = [f"{row['distance']} epochs back" for row in rows]
            svg = figures.sensitive_bars(title, places, groups.series(marks), layers=max(row["layers"] for row in rows))
            caption = (
                "Layers whose change is 1 point or more. The number under a bar is its group's. Hatched: minority."
            )
            drawn.append((f"1f-{split}-sensitive{'-norm' if norm else ''}", caption, svg))
    return drawn


def _sensitive_table(sensitive: Sequence[Mapping[str, Any]], groups: Groups) -> str:
    if not sensitive:
        return ""
    rows = [
        [
            f"{row['distance']} epochs" + (", with the norm" if row["with_norm"] else ""),
            str(row["layers"]),
            *map(str, row["sensitive"]),
        ]
        for row in sensitive
    ]
    return html_table(["put back by", "layers", *group_headers(groups)], rows)


def _lucky_layers(run: Mapping[str, Any], cells: Sequence[Cell], split: str, groups: Groups) -> list[str]:
    """Return where one example alone makes a layer sensitive, and how many such changes an interval backs."""
    counts = dict(zip(groups.names, run["counts"].get(split, ()), strict=False))
    said = []
    for name in groups.names:
        effects = [cell.effects[name] for cell in cells if name in cell.effects and not cell.setting["with_norm"]]
        large = [effect for effect in effects if abs(effect.change) >= POINT - 1e-12]
        if large and counts.get(name) and 100 / counts[name] >= 1:
            seen = sum(effect.seen for effect in large)
            said.append(
                f"{groups.label(name)} has {counts[name]} examples, one of which is {number(100 / counts[name])} "
                f"points: a single one makes a layer sensitive; of its {len(large)} changes of a point or more, the "
                f"interval excludes 0 in {seen}."
            )
    return said


def _layer_order(run: Mapping[str, Any], cells: Sequence[Cell]) -> list[str]:
    """Return the layers that the cells touch, in order of depth; of appearance where the run does not know one."""
    met = list(dict.fromkeys(cell.setting["layer"] for cell in cells))
    known = [layer["name"] for layer in run.get("layers", ())]
    return [name for name in known if name in met] if set(met) <= set(known) else met


def _short(layer: str) -> str:
    return layer.removesuffix(".weight")


class Depth(NamedTuple):
    """One line plot over depth to be drawn: its file, its title, and the effects with their layers."""

    name: str
    title: str
    effects: Sequence[tuple[str, Effect]]


def _depth_figures(plots: Iterable[Depth], layers: Sequence[str], groups: Groups) -> list[tuple[str, str, str]]:
    """Return lines over depth, one per group, all plots on one vertical scale; plots without effects are left out."""
    drawn = []
    for plot in plots:
        found = {(layer, effect.group): effect.mark for layer, effect in plot.effects}
        marks = {name: [found.get((layer, name)) for layer in layers] for name in groups.names}
        drawn.append((plot, groups.series({name: line for name, line in marks.items() if any(line)})))
    limits = figures.drawn_limits(one for _, series in drawn for one in series)
    places = [_short(layer) for layer in layers]
    return [
        (plot.name, LINES_READ, figures.depth_lines(plot.title, places, series, axis=POINTS, limits=limits))
        for plot, series in drawn
        if series
    ]
