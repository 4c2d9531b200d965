"""Dots: one with its range per series and category, or one per example."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from html import escape
from typing import Final

from neuronsurgery.study.figures import svg
from neuronsurgery.study.figures.marks import FAINT, GREY, GROUP_COLOURS, INK, Series, described, limits_of, number


def dot_ranges(
    title: str,
    categories: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    minority: Collection[int] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """Return a marker and its range for each series in each category, side by side, as SVG: controls against cuts.

    Args:
        title: above the figure.
        categories: along the horizontal axis, at least one.
        series: one mark per category; None leaves its place empty.
        axis: name and unit of the vertical axis.
        minority: positions of the categories that are minority groups.
        limits: lowest and highest value shown; default: those of the marks and 0.
    """
    width = svg.width_for(len(categories), max(74.0, 14.0 * len(series) + 18))
    drawn, top = svg.heading(title, width)
    keys, top = svg.legend(series, top, width, svg.dot_key)
    area, ticks = svg.scaled(limits or limits_of(series), top + 14, width, 270)
    drawn += keys + svg.bands(area, len(categories), minority) + svg.axes(area, ticks, axis)
    slot = area.width / len(categories)
    step = slot * 0.8 / len(series)
    for place in range(1, len(categories)):
        x = area.left + slot * place
        drawn.append(svg.line(x, area.top, x, area.bottom, FAINT))
    for position, one in enumerate(series):
        for place, mark in enumerate(one.marks):
            if mark is not None:
                x = area.left + slot * (place + 0.1) + step * (position + 0.5)
                note = f"<g><title>{escape(f'{categories[place]}, {one.name}: {described(mark)}')}</title>"
                fill = one.colour if mark.solid else "#FFFFFF"
                dot = svg.marker(position, x, area.y(mark.value), 4.4, one.colour, fill)
                drawn.append(f"{note}{svg.whisker(x, area, mark, one.colour)}{dot}</g>")
    names, bottom = svg.category_names(area, categories, minority, area.bottom + 4)
    return svg.document(title, width, bottom + 8, drawn + names)


DOT: Final = 4.0
"""Diameter of an example's dot."""


def strips(
    title: str,
    categories: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    axis: str,
    minority: Collection[int] = (),
    thresholds: Sequence[float | None] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """Return one dot per example, a strip per category, dots of about the same value side by side, as SVG.

    A bar across a strip is its median. Dots overlap where a strip is too narrow for all of one height. The dots of a
    strip are one path, so that some thousand examples make a file of some ten kilobytes.

    Args:
        title: above the figure.
        categories: along the horizontal axis, such as the groups, at least one.
        values: the examples of each category, finite; a category may have none.
        axis: name and unit of the vertical axis.
        minority: positions of the categories that are minority groups.
        thresholds: a value per category that is drawn dashed across its strip, or None; default: none anywhere.
        limits: lowest and highest value shown; default: those of all values.

    Raises:
        ValueError: if there is no value at all, or one is not finite.
    """
    everything = [value for some in values for value in some]
    _check_values(title, categories, values)
    width = svg.width_for(len(categories), 132.0)
    drawn, top = svg.heading(title, width)
    area, ticks = svg.scaled(limits or (min(everything), max(everything)), top + 14, width, 300)
    drawn += svg.bands(area, len(categories), minority) + svg.axes(area, ticks, axis)
    slot = area.width / len(categories)
    for place, some in enumerate(values):
        middle = area.left + slot * (place + 0.5)
        colour = GROUP_COLOURS[place % len(GROUP_COLOURS)]
        drawn.append(_dots(sorted(map(area.y, some)), middle, slot * 0.84, colour))
        if some:
            median = area.y(statistics.median(some))
            note = f"<title>{escape(f'{categories[place]}: median {number(statistics.median(some))}')}</title>"
            bar = svg.rectangle(middle - slot * 0.3, median - 1.5, slot * 0.6, 3, INK, svg.stroke("#FFFFFF", 1))
            drawn.append(f"<g>{note}{bar}</g>")
        threshold = thresholds[place] if thresholds else None
        if threshold is not None:
            y, ends = area.y(threshold), (middle - slot * 0.46, middle + slot * 0.46)
            drawn.append(svg.line(ends[0], y, ends[1], y, GREY, 1.8, 'stroke-dasharray="6 4"'))
    named = [f"{name}, {len(some)}" for name, some in zip(categories, values, strict=True)]
    names, bottom = svg.category_names(area, named, minority, area.bottom + 4)
    return svg.document(title, width, bottom + 8, drawn + names)


def _check_values(title: str, categories: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    wrong = [name for name, some in zip(categories, values, strict=True) if not all(map(math.isfinite, some))]
    if wrong:
        raise ValueError(f"strips: {title!r} has values that are not finite in {', '.join(wrong)}: leave those out")
    if not any(values):
        raise ValueError(f"strips: {title!r} has no values: leave the figure out")


def _dots(heights: Sequence[float], middle: float, width: float, colour: str) -> str:
    """Return dots at ascending heights as one path, those within a dot of one another spread over the width."""
    rows: dict[int, list[float]] = {}
    for height in heights:
        rows.setdefault(math.floor(height / DOT), []).append(height)
    path, step = "", min(DOT, width / max(map(len, rows.values()), default=1))
    for row in rows.values():
        for place, height in enumerate(row):
            # From the middle outwards, left and right in turn.
            aside = (place + 1) // 2 * (1 if place % 2 else -1) * step
            path += f"M{svg.px(middle + aside)} {svg.px(height)}h0"
    pen = f'{svg.stroke(colour, DOT - 0.4)} stroke-linecap="round" stroke-opacity="0.75"'
    return f'<path d="{path}" {pen} fill="none"/>' if path else ""
