"""Bars: of several series side by side, of numbers of layers, and histograms of percentiles."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from neuronsurgery.study.figures import svg
from neuronsurgery.study.figures.marks import (
    GREY,
    HIGHLIGHT,
    ORDERED_COLOURS,
    Mark,
    Series,
    described,
    limits_of,
    number,
)


def grouped_bars(
    title: str,
    categories: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    minority: Collection[int] = (),
    limits: tuple[float, float] | None = None,
    decimals: int = 1,
) -> str:
    """Return bars side by side in each category, with their intervals, as SVG.

    Args:
        title: above the figure, and read out.
        categories: along the horizontal axis, at least one.
        series: the bars of each category, one mark per category.
        axis: name and unit of the vertical axis.
        minority: positions of the categories that are minority groups: tinted, hatched and named so.
        limits: lowest and highest value shown; default: those of the marks and 0.
        decimals: of the values written on the bars.
    """
    width = svg.width_for(len(categories), max(84.0, 15.0 * len(series) + 18))
    drawn, top = svg.heading(title, width)
    if len(series) > 1:
        keys, top = svg.legend(series, top, width, svg.bar_key)
        drawn += keys
    area, ticks = svg.scaled(limits or limits_of(series), top + 14, width, 250)
    drawn += svg.bands(area, len(categories), minority) + svg.axes(area, ticks, axis)
    slot = area.width / len(categories)
    step = min(slot * 0.88 / len(series), svg.WIDEST)
    for position, one in enumerate(series):
        for place, mark in enumerate(one.marks):
            x = area.left + slot * (place + 0.5) + step * (position - len(series) / 2)
            if mark is not None:
                note, hatched = (
                    f"{categories[place]}, {one.name}: {described(mark)}",
                    place in minority or one.minority,
                )
                drawn.append(_column(area, x + step * 0.06, step * 0.88, mark, one.colour, hatched, note))
                drawn.append(_value(area, x + step * 0.06, step * 0.88, mark, decimals))
            if one.tick and step > 8:
                drawn.append(svg.text(x + step / 2, area.bottom + 14, one.tick, size=svg.SMALL, anchor="middle"))
    below = area.bottom + (18 if any(one.tick for one in series) else 4)
    names, bottom = svg.category_names(area, categories, minority, below)
    return svg.document(title, width, bottom + 8, drawn + names)


def _column(area: svg.Area, x: float, width: float, mark: Mark, colour: str, hatched: bool, note: str) -> str:
    """Return a bar and its interval."""
    top, bottom = sorted((area.y(mark.value), area.y(0)))
    return svg.bar(x, top, width, bottom - top, colour, hatched, note) + svg.whisker(x + width / 2, area, mark)


def _value(area: svg.Area, x: float, width: float, mark: Mark, decimals: int) -> str:
    """Return a bar's value in figures, beyond its interval or at its end; nothing where it is wider than the bar."""
    text = number(mark.value, decimals)
    if len(text) * svg.TINY * 0.5 > width / 0.88:
        return ""
    ends = [end for end in (mark.low, mark.high, mark.value) if end is not None]
    y = area.y(max(ends)) - 5 if mark.value >= 0 else area.y(min(ends)) + 14
    if (
        y > area.bottom - 3
    ):  # beyond a long interval there is no room, and side by side at the bottom values would touch
        y = area.y(mark.value) + 14
    halo = 'stroke="#FFFFFF" stroke-width="3" paint-order="stroke"'
    return svg.text(x + width / 2, min(y, area.bottom - 3), text, size=svg.TINY, anchor="middle", extra=halo)


def sensitive_bars(title: str, distances: Sequence[str], series: Sequence[Series], *, layers: int) -> str:
    """Return the number of sensitive layers per group and distance, as SVG.

    Args:
        title: above the figure.
        distances: along the horizontal axis.
        series: one per group; its marks are numbers of layers, one per distance.
        layers: how many layers were rewound in turn: the top of the scale where few are sensitive is not above it.
    """
    highest = max([mark.value for one in series for mark in one.marks if mark] + [1.0])
    step = max(1, math.ceil(min(highest, layers) / 6))
    top = step * math.ceil(highest / step)
    limits = (0.0, float(max(top, 4 if layers >= 4 else 1)))
    return grouped_bars(title, distances, series, axis=f"sensitive layers, of {layers}", limits=limits, decimals=0)


def histogram_pair(title: str, upper: tuple[str, Sequence[int]], lower: tuple[str, Sequence[int]]) -> str:
    """Return two histograms of percentiles one above the other, the last two bins (above 90 %) marked, as SVG.

    Args:
        title: above the figure.
        upper: what is counted, and its counts over 20 bins of (0, 100].
        lower: the same for the second.
    """
    width = svg.LEAST
    drawn, top = svg.heading(title, width)
    for name, counts in (upper, lower):
        panel, top = _histogram(name, counts, top, width)
        drawn += panel
    return svg.document(title, width, top, drawn)


def _histogram(name: str, counts: Sequence[int], top: float, width: float) -> tuple[list[str], float]:
    """Return one histogram with the level that chance would give, and where it ends."""
    total = sum(counts)
    step = max(1, math.ceil(max([*counts, 1]) / 4))
    ticks = [float(step * place) for place in range(math.ceil(max([*counts, 1]) / step) + 1)]
    lines = svg.wrapped(f"{name}; {sum(counts[-2:])} of {total} above 90", width - 24)
    drawn = [svg.text(12, top + 16 + 17 * row, line, size=svg.SMALL) for row, line in enumerate(lines)]
    area = svg.Area(svg.LEFT, top + 10 + 17 * len(lines), width - svg.LEFT - svg.RIGHT, 118, 0.0, ticks[-1])
    drawn += svg.axes(area, ticks, "neurons")
    slot = area.width / len(counts)
    for place, count in enumerate(counts):
        low, high = 100 * place // len(counts), 100 * (place + 1) // len(counts)
        if count:
            last, y = place >= len(counts) - 2, area.y(count)
            note = f"percentile above {low} to {high}: {count}"
            x = area.left + slot * place + 1
            drawn.append(
                svg.bar(x, y, slot - 2, area.bottom - y, HIGHLIGHT if last else ORDERED_COLOURS[1], last, note)
            )
    if total:
        chance = area.y(total / len(counts))
        drawn.append(svg.line(area.left, chance, area.left + area.width, chance, GREY, 1.5, 'stroke-dasharray="6 4"'))
    for percent in range(0, 101, 10):
        x = area.left + area.width * percent / 100
        drawn.append(svg.text(x, area.bottom + 16, str(percent), size=svg.SMALL, anchor="middle"))
    drawn.append(
        svg.text(
            area.left + area.width / 2, area.bottom + 34, "percentile, 100 = largest", size=svg.SMALL, anchor="middle"
        )
    )
    return drawn, area.bottom + 46
