"""Dots in rows: as many rows as there are, each with a name that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import Final

from neuronsurgery.study.figures import svg
from neuronsurgery.study.figures.marks import FAINT, GREY, INK, Mark, Series, described, limits_of

LANE: Final = 13.0
"""Height of one series in a row."""

PLOT: Final = 310.0
"""Width that values are drawn in."""

NO_HEADINGS: Final[Mapping[int, str]] = MappingProxyType({})


@dataclass(frozen=True)
class _Scale:
    left: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """How far right a value is; one beyond the scale is at its end."""
        return self.left + (min(max(value, self.low), self.high) - self.low) / (self.high - self.low) * PLOT


def dot_rows(
    title: str,
    rows: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    headings: Mapping[int, str] = NO_HEADINGS,
    each: Sequence[Sequence[Sequence[float]]] = (),
    limits: tuple[float, float] | None = None,
    names: float = 168.0,
) -> str:
    """Return one row per thing, with a marker and its interval for each series one below the other, as SVG.

    Args:
        title: above the figure.
        rows: names at the left, at least one.
        series: one mark per row; None leaves its place empty.
        axis: name and unit of the horizontal axis.
        headings: words above the row at a position.
        each: per series and row, the values that a mark is the mean of: small upright strokes; default: none.
        limits: lowest and highest value shown, where what lies beyond is cut; default: those of the marks and 0.
        names: width of the names.

    Raises:
        ValueError: if no series has a mark.
    """
    if not any(mark for one in series for mark in one.marks):
        raise ValueError(f"dot_rows: {title!r} has no marks: leave the figure out")
    width = names + PLOT + 44
    drawn, top = svg.heading(title, width)
    if len(series) > 1:
        keys, top = svg.legend(series, top, width, svg.dot_key)
        drawn += keys
    ticks = svg.ticks_of(limits or limits_of(series))
    scale = _Scale(names + 22, ticks[0], ticks[-1])
    body: list[str] = []
    first = y = top + 26
    for place, name in enumerate(rows):
        if place in headings:
            body.append(svg.text(12, y + 18, headings[place], extra='font-weight="bold"'))
            y += 26
        lines = svg.wrapped(name, names)
        height = max(LANE * len(series) + 8, 17.0 * len(lines) + 6)
        body.append(svg.line(12, y, width - 12, y, FAINT))
        for row, line in enumerate(lines):
            body.append(svg.text(14, y + height / 2 + 5 + 17 * (row - (len(lines) - 1) / 2), line))
        for position, one in enumerate(series):
            middle = y + height / 2 + LANE * (position - (len(series) - 1) / 2)
            values = each[position][place] if each else ()
            body += _lane(scale, one, position, one.marks[place], middle, name, values)
        y += height
    return svg.document(title, width, y + 48, drawn + _frame(scale, ticks, first, y, axis) + body)


def _lane(
    scale: _Scale, one: Series, position: int, mark: Mark | None, y: float, name: str, values: Sequence[float]
) -> list[str]:
    """Return one series of one row: the single values, the interval and the marker."""
    drawn = [svg.line(scale.x(value), y - 4, scale.x(value), y + 4, one.colour, 1.6) for value in values]
    if mark is None:
        return drawn
    if mark.low is not None and mark.high is not None:
        drawn.append(svg.line(scale.x(mark.low), y, scale.x(mark.high), y, one.colour, 1.6))
    fill = one.colour if mark.solid else "#FFFFFF"
    dot = svg.marker(position, scale.x(mark.value), y, 4.2, one.colour, fill)
    drawn.append(f"<g><title>{escape(f'{name}, {one.name}: {described(mark)}')}</title>{dot}</g>")
    return drawn


def _frame(scale: _Scale, ticks: Sequence[float], top: float, bottom: float, axis: str) -> list[str]:
    """Return the upright grid with its numbers above and below, a strong line at 0, and the name of the axis."""
    drawn = []
    for tick in ticks:
        x, strong = scale.x(tick), tick == 0
        drawn.append(svg.line(x, top - 4, x, bottom + 4, INK if strong else FAINT, 1.4 if strong else 1))
        for y in (top - 9, bottom + 18):
            drawn.append(svg.text(x, y, svg.tick_text(tick), size=svg.TINY, anchor="middle", extra=f'fill="{GREY}"'))
    return [*drawn, svg.text(scale.left + PLOT / 2, bottom + 38, axis, anchor="middle")]
