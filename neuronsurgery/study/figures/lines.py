"""Lines: over the layers in order of depth, and over the epochs of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from neuronsurgery.study.figures import svg
from neuronsurgery.study.figures.marks import GROUP_COLOURS, Mark, Series, drawn_limits, extent_of

CROWDED: Final = 400
"""Marks of a line plot above which every line has a panel of its own."""


def depth_lines(
    title: str,
    places: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    below: str = "layers in order of depth",
    spacing: float = 46.0,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return one line per series over places in order, as SVG; a mark's interval is drawn where the mark is solid.

    More than `CROWDED` marks are drawn in one panel per line instead of one panel for all.

    Args:
        title: above the figure.
        places: names along the horizontal axis; every second, third ... is left out where they would touch.
        series: one mark per place; None leaves a gap.
        axis: name and unit of the vertical axis.
        below: name of the horizontal axis.
        spacing: width of a place, less where all would not fit.
        limits: lowest and highest value shown; default: those of the marks and 0.
    """
    width = min(1180.0, svg.width_for(len(places), spacing))
    slot = (width - svg.LEFT - svg.RIGHT) / len(places)
    drawn, top = svg.heading(title, width)
    limits = limits or drawn_limits(series)
    if len(series) * len(places) > CROWDED:
        panels, area = _line_panels(series, top, width, slot, axis, limits)
    else:
        panels, area = _one_line_panel(series, top, width, slot, axis, limits)
    names, bottom = _place_names(area, places, slot, below)
    return svg.document(title, width, bottom, drawn + panels + names)


def _one_line_panel(
    series: Sequence[Series], top: float, width: float, slot: float, axis: str, limits: tuple[float, float]
) -> tuple[list[str], svg.Area]:
    """Return all lines in one panel with a legend, a little beside one another, and the panel's area."""
    drawn, top = svg.legend(series, top, width, svg.line_key)
    area, ticks = svg.scaled(limits, top + 14, width, 270)
    drawn += svg.axes(area, ticks, axis)
    for position in sorted(range(len(series)), key=lambda position: series[position].minority):
        aside = (position - (len(series) - 1) / 2) * min(3.0, 0.5 * slot / len(series))
        drawn += _drawn_line(
            area, series[position], position, slot, aside, svg.dashes(position, series[position].minority)
        )
    return drawn, area


def _line_panels(
    series: Sequence[Series], top: float, width: float, slot: float, axis: str, limits: tuple[float, float]
) -> tuple[list[str], svg.Area]:
    """Return one panel per line, one above the other on one scale, and the area of the last."""
    drawn: list[str] = []
    area, _ = svg.scaled(limits, top, width, 96, 3)
    for position, one in enumerate(series):
        keys, end = svg.legend([one], top, width, partial(_panel_key, position), svg.LEFT - 30)
        area, ticks = svg.scaled(limits, end + 8, width, 96, 3)
        drawn += keys + svg.axes(area, ticks, axis if position == len(series) // 2 else "")
        drawn += _drawn_line(area, one, position, slot, 0.0, svg.dashes(position, one.minority))
        top = area.bottom + 12
    return drawn, area


def _panel_key(place: int, one: Series, position: int, x: float, y: float) -> str:
    return svg.line_key(one, place, x, y)


def _drawn_line(area: svg.Area, one: Series, position: int, slot: float, aside: float, dashes: str) -> list[str]:
    """Return a line that stops at gaps, its intervals, and all of its markers in two paths: filled and hollow."""
    shape, radius = svg.shape(position), 4.2 if slot > 14 else 2.4
    pen, path, filled, hollow, whiskers = "M", "", "", "", ""
    for place, mark in enumerate(one.marks):
        if mark is None:
            pen = "M"
            continue
        x, y = area.left + slot * (place + 0.5) + aside, area.y(mark.value)
        path, pen = f"{path}{pen}{svg.px(x)} {svg.px(y)}", "L"
        filled += svg.outline(shape, x, y, radius) if mark.solid else ""
        hollow += "" if mark.solid else svg.outline(shape, x, y, radius)
        if mark.solid and mark.low is not None and mark.high is not None:
            whiskers += f"M{svg.px(x)} {svg.px(area.y(mark.low))}V{svg.px(area.y(mark.high))}"
    weight = svg.weight(one) if slot > 14 else 1.4
    drawn = [f'<path d="{path}" {svg.stroke(one.colour, weight)} fill="none" {dashes}/>']
    drawn += [f'<path d="{whiskers}" {svg.stroke(one.colour, 1.3)} fill="none"/>'] if whiskers else []
    drawn += [f'<path d="{hollow}" fill="#FFFFFF" {svg.stroke(one.colour, 1.3)}/>'] if hollow else []
    return drawn + ([f'<path d="{filled}" fill="{one.colour}" {svg.stroke(one.colour, 1.3)}/>'] if filled else [])


def _place_names(area: svg.Area, places: Sequence[str], slot: float, below: str) -> tuple[list[str], float]:
    """Return the slanted names of the places, thinned until none touches the next, and where they end."""
    every = max(1, math.ceil(17 / slot))
    short = [name if len(name) <= 26 else f"…{name[-25:]}" for name in places]
    flat = every == 1 and max(len(name) for name in short) * svg.SMALL * svg.CHARACTER < slot - 4
    drawn = []
    for place in range(0, len(places), every):
        x = area.left + slot * (place + 0.5)
        if flat:
            drawn.append(svg.text(x, area.bottom + 17, short[place], size=svg.SMALL, anchor="middle"))
            continue
        y = area.bottom + 14
        turn = f'transform="rotate(-60 {svg.px(x + 4)} {svg.px(y)})"'
        drawn.append(svg.text(x + 4, y, short[place], size=svg.SMALL, anchor="end", extra=turn))
    deep = 22.0 if flat else 14 + max(len(name) for name in short) * svg.SMALL * svg.CHARACTER * 0.82 + 6
    said = below if every == 1 else f"{below} (one name in {every} shown)"
    bottom = area.bottom + deep + 18
    drawn.append(svg.text(area.left + area.width / 2, bottom, said, size=svg.SMALL, anchor="middle"))
    return drawn, bottom + 12


CYCLES: Final = ("", 'stroke-dasharray="7 4"', 'stroke-dasharray="2 4"')
"""Dashes of the lines of `trajectories`, by cycle of the colours."""

APART: Final = 17.0
"""Least distance of two labels at the ends of lines."""


def trajectories(
    title: str,
    places: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    below: str = "epoch",
    limits: tuple[float, float] | None = None,
) -> str:
    """Return one line per series over the epochs, each named at its end instead of in a legend, as SVG.

    Intervals are a band of the line's colour. What colour says, marker, dashes and name say again.

    Args:
        title: above the figure.
        places: names along the horizontal axis, at least one; some are left out where they would touch.
        series: one mark per place; None leaves a gap, and a line that ends early is named where it ends.
        axis: name and unit of the vertical axis.
        below: name of the horizontal axis.
        limits: lowest and highest value shown; default: those of the marks and their intervals, without 0.

    Raises:
        ValueError: if no series has a mark.
    """
    drawn_series = [(position, one) for position, one in enumerate(series) if any(one.marks)]
    if not drawn_series:
        raise ValueError(f"trajectories: {title!r} has no marks: leave the figure out")
    names = max(len(_end_name(one)) for _, one in drawn_series) * svg.SMALL * svg.CHARACTER + 34
    slot = max(14.0, min(64.0, 640 / len(places)))
    width = max(svg.WHOLE_ROW, svg.LEFT + len(places) * slot + names)
    drawn, top = svg.heading(title, width)
    plot, ticks = svg.scaled(limits or extent_of(series), top + 14, width - names + svg.RIGHT, 320)
    slot = plot.width / len(places)
    drawn += svg.axes(plot, ticks, axis)
    drawn += [_band(plot, one, slot) for _, one in drawn_series]
    for position, one in drawn_series:
        plain = replace(one, marks=tuple(mark and Mark(mark.value, solid=mark.solid) for mark in one.marks))
        drawn += _drawn_line(plot, plain, position, slot, 0.0, CYCLES[position // len(GROUP_COLOURS) % len(CYCLES)])
    drawn += _end_names(plot, drawn_series, slot)
    named, bottom = _place_names(plot, places, slot, below)
    return svg.document(title, width, bottom, drawn + named)


def _end_name(one: Series) -> str:
    return one.name + (" (minority)" if one.minority else "")


def _band(area: svg.Area, one: Series, slot: float) -> str:
    """Return the intervals of a line as one band per stretch without a gap."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for place, mark in enumerate(one.marks):
        if mark is None or mark.low is None or mark.high is None:
            stretches.append([])
        else:
            stretches[-1].append((area.left + slot * (place + 0.5), area.y(mark.low), area.y(mark.high)))
    path = ""
    for stretch in stretches:
        if len(stretch) > 1:
            around = [(x, high) for x, _, high in stretch] + [(x, low) for x, low, _ in reversed(stretch)]
            path += "M" + "L".join(f"{svg.px(x)} {svg.px(y)}" for x, y in around) + "z"
    return f'<path d="{path}" fill="{one.colour}" fill-opacity="0.14"/>' if path else ""


def _end_names(area: svg.Area, lines: Sequence[tuple[int, Series]], slot: float) -> list[str]:
    """Return the name of every line beside its end, moved apart where two would touch, with a thin line to it."""
    ends = []
    for position, one in lines:
        place, mark = [(place, mark) for place, mark in enumerate(one.marks) if mark is not None][-1]
        ends.append((area.y(mark.value), area.left + slot * (place + 0.5), position, one))
    ends.sort(key=lambda end: end[0])
    drawn = []
    x = area.left + area.width + 14
    for y, (end, start, position, one) in zip(_apart([end[0] for end in ends], area), ends, strict=True):
        drawn.append(svg.line(start + 6, end, x - 4, y, one.colour, 1, 'stroke-opacity="0.6"'))
        drawn.append(svg.marker(position, x + 3, y, 4.2, one.colour, one.colour))
        weight = 'font-weight="bold"' if one.minority else ""
        drawn.append(svg.text(x + 13, y + 5, _end_name(one), size=svg.SMALL, extra=weight))
    return drawn


def _apart(heights: Sequence[float], area: svg.Area) -> list[float]:
    """Return ascending heights moved apart by `APART` at least, back into the area as far as they have room."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + APART) if moved else height)
    most = area.bottom
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], most)
        most = moved[place] - APART
    return moved
