"""The figures of the report: values in, one SVG document out, as text.

Every function is pure, draws by hand (no plotting library), and gives the same bytes for the same values. Colours are
those of Okabe and Ito (2008), told apart with any colour vision; what colour says is said again by a hatch, a marker, a
number or a word, so that a grey print reads the same. Minority groups are hatched in bars and drawn thick in lines.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Final

GROUP_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#B8A800")
"""One per group, in order, then again from the first: the marker or the number under a bar tells those apart."""

ORDERED_COLOURS: Final = ("#A6D5F2", "#3D93C9", "#0B4A75")
"""Light to dark, for series that have an order such as top-1, top-2 and top-3."""

HIGHLIGHT: Final = "#D55E00"
INK: Final = "#1A1A1A"
GREY: Final = "#6B6B6B"
FAINT: Final = "#DDDDDD"
BAND: Final = "#FFF4E5"

CROWDED: Final = 400
"""Marks of a line plot above which every line has a panel of its own."""

LEFT: Final = 68.0
RIGHT: Final = 14.0
WIDEST: Final = 60.0
LEAST: Final = 520.0
SMALL: Final = 14
TINY: Final = 12
LINE: Final = 20
CHARACTER: Final = 0.54
"""Mean width of a character, in font sizes."""

MINUS: Final = "\N{MINUS SIGN}"

CORNERS: Final[Mapping[str, Sequence[tuple[float, float]]]] = {
    "circle": (),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1.3), (1.2, 1), (-1.2, 1)),
    "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    "inverted": ((0, 1.3), (1.2, -1), (-1.2, -1)),
    "hourglass": ((-1.2, -1.2), (1.2, -1.2), (-1.2, 1.2), (1.2, 1.2)),
    "bow": ((-1.3, -1.1), (-1.3, 1.1), (1.3, -1.1), (1.3, 1.1)),
    "plate": ((-1.5, -0.6), (1.5, -0.6), (1.5, 0.6), (-1.5, 0.6)),
}
"""The markers of lines, by position: corners in half-widths, none for a circle."""


@dataclass(frozen=True)
class Mark:
    """One value of a figure, in the unit of its axis.

    Attributes:
        value: where it stands.
        low: lower end of its interval or range; None where there is none.
        high: upper end.
        solid: whether its marker is filled in a line plot: the interval excludes 0.
    """

    value: float
    low: float | None = None
    high: float | None = None
    solid: bool = True


@dataclass(frozen=True)
class Series:
    """The marks of one entry of the legend, one per category; None where a category has none.

    Attributes:
        name: the legend's text.
        marks: one per category.
        colour: CSS colour.
        tick: short text under its bars, such as "1"; none when empty.
        minority: whether it is a minority group's.
    """

    name: str
    marks: tuple[Mark | None, ...]
    colour: str
    tick: str = ""
    minority: bool = False


@dataclass(frozen=True)
class _Area:
    """The rectangle that data is drawn in, and its scale."""

    left: float
    top: float
    width: float
    height: float
    low: float
    high: float

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def y(self, value: float) -> float:
        return self.top + (self.high - value) / (self.high - self.low) * self.height


Key = Callable[[Series, int, float, float], str]
"""What draws an entry of a legend: the series, its position, and where."""


# Numbers


def number(value: float, decimals: int = 1) -> str:
    """Return a number as read: one decimal, or two digits where that would hide it; a true minus, and never -0.0.

    Example:
        >>> number(24.96), number(-0.0), number(0.0013), number(1e-12)
        ('25.0', '0.0', '0.0013', '0.0')
    """
    if abs(value) < 1e-9:
        value = 0.0
    text = f"{value:.{decimals}f}"
    if value and float(text) == 0:
        text = f"{float(f'{value:.1e}'):.{1 - math.floor(math.log10(abs(value)))}f}"
    return text.replace("-", MINUS)


def signed(value: float, decimals: int = 1) -> str:
    """Return a change as read: `number` with a plus sign where it is above 0.

    Example:
        >>> signed(3.57), signed(-0.0), signed(-2) == MINUS + "2.0"
        ('+3.6', '0.0', True)
    """
    text = number(value, decimals)
    return f"+{text}" if value >= 1e-9 else text


def limits_of(series: Iterable[Series]) -> tuple[float, float]:
    """Return the lowest and highest end of all marks and 0: for figures that are to share a scale."""
    ends = [0.0]
    for mark in (mark for one in series for mark in one.marks if mark):
        ends += [end for end in (mark.value, mark.low, mark.high) if end is not None]
    return min(ends), max(ends)


def drawn_limits(series: Iterable[Series]) -> tuple[float, float]:
    """Return `limits_of` what a line plot draws, which is no interval of a hollow mark."""
    return limits_of(
        Series(one.name, tuple(m if m is None or m.solid else Mark(m.value) for m in one.marks), one.colour)
        for one in series
    )


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * position, 10) for position in range(first, last + 1)]


def _tick_text(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


# Pieces


def _n(value: float) -> str:
    """Return a coordinate: at most one decimal."""
    text = f"{value:.1f}"
    return "0" if text in ("-0.0", "0.0") else text.removesuffix(".0")


def _text(x: float, y: float, text: str, *, size: int = SMALL, anchor: str = "start", extra: str = "") -> str:
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" text-anchor="{anchor}"{" " * bool(extra)}{extra}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1, extra: str = "") -> str:
    return (
        f'<path d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}" stroke="{colour}" stroke-width="{width:g}" fill="none"'
        f"{' ' * bool(extra)}{extra}/>"
    )


def _rectangle(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"'
        f"{' ' * bool(extra)}{extra}/>"
    )


def _bar(x: float, y: float, width: float, height: float, colour: str, hatched: bool, note: str) -> str:
    """Return one bar with its tooltip, hatched for a minority group."""
    drawn = f"<g><title>{escape(note)}</title>{_rectangle(x, y, width, height, colour)}"
    drawn += _rectangle(x, y, width, height, "url(#HATCH)") if hatched else ""
    return f"{drawn}{_rectangle(x, y, width, height, 'none', _stroke(INK, 0.8))}</g>"


def _stroke(colour: str, width: float) -> str:
    return f'stroke="{colour}" stroke-width="{width:g}"'


def _whisker(x: float, area: _Area, mark: Mark, colour: str = INK, cap: float = 4.0) -> str:
    """Return the interval of a mark as a line with two caps; nothing where it has none."""
    if mark.low is None or mark.high is None:
        return ""
    low, high = area.y(mark.low), area.y(mark.high)
    path = f"M{_n(x)} {_n(low)}V{_n(high)}M{_n(x - cap)} {_n(low)}h{_n(2 * cap)}M{_n(x - cap)} {_n(high)}h{_n(2 * cap)}"
    halo = f'<path d="{path}" {_stroke("#FFFFFF", 3.4)} fill="none"/>'
    return f'{halo}<path d="{path}" {_stroke(colour, 1.5)} fill="none"/>'


def _outline(shape: str, x: float, y: float, r: float) -> str:
    """Return the path of a marker of half-width r; several may be joined in one path."""
    if shape == "circle":
        return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0z"
    return "M" + "L".join(f"{_n(x + r * dx)} {_n(y + r * dy)}" for dx, dy in CORNERS[shape]) + "z"


def _shape(position: int) -> str:
    return list(CORNERS)[position % len(CORNERS)]


def _marker(position: int, x: float, y: float, r: float, colour: str, fill: str) -> str:
    outline = _outline(_shape(position), x, y, r)
    return f'<path d="{outline}" fill="{fill}" {_stroke(colour, 1.6)}/>'


def _dashes(position: int, minority: bool) -> str:
    """Return the dashes of a group's line: none for a minority group, others differ by cycle of the colours."""
    if minority:
        return ""
    return f'stroke-dasharray="{"7 4" if position < len(GROUP_COLOURS) else "2 4"}"'


def _wrapped(text: str, width: float, size: int = SMALL, lines: int = 4) -> list[str]:
    characters = max(5, int(width / (size * CHARACTER)))
    return textwrap.wrap(text, characters, max_lines=lines, placeholder="…") or [""]


# Frames


def _document(title: str, width: float, height: float, body: Sequence[str]) -> str:
    """Return the whole SVG, titled for people who hear it; the hatch's name is its own, whatever page it stands in."""
    drawn = "\n".join(part for part in body if part)
    hatch = f"hatch-{zlib.crc32(f'{title}{drawn}'.encode()):08x}"
    pattern = ""
    if "url(#HATCH)" in drawn:
        pattern = (
            f'<defs><pattern id="{hatch}" width="7" height="7" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="2.2" height="7" fill="#FFFFFF"/></pattern></defs>\n'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_n(width)} {_n(height)}" '
        f'width="{_n(width)}" height="{_n(height)}" font-family="Helvetica, Arial, sans-serif" fill="{INK}">\n'
        f"<title>{escape(title)}</title>\n"
        f"{pattern}{_rectangle(0, 0, width, height, '#FFFFFF')}\n"
        f"{drawn.replace('#HATCH', f'#{hatch}')}\n</svg>\n"
    )


def _heading(title: str, width: float) -> tuple[list[str], float]:
    """Return the title's lines and the height they take."""
    lines = _wrapped(title, width - 24, 17)
    drawn = [_text(12, 25 + 22 * place, line, size=17, extra='font-weight="bold"') for place, line in enumerate(lines)]
    return drawn, 12.0 + 22 * len(lines)


def _legend(
    series: Sequence[Series], top: float, width: float, key: Key, left: float = 14.0
) -> tuple[list[str], float]:
    """Return the legend in as many rows as it needs, and where it ends."""
    drawn: list[str] = []
    x, y = left, top + 16
    for position, one in enumerate(series):
        label = one.name + (" (minority)" if one.minority else "")
        wide = 44 + len(label) * SMALL * CHARACTER
        if x > left and x + wide > width - 8:
            x, y = left, y + LINE
        drawn += [key(one, position, x, y), _text(x + 31, y, label, size=SMALL)]
        x += wide + 8
    return drawn, y + 10


def _bar_key(one: Series, position: int, x: float, y: float) -> str:
    return _bar(x + 6, y - 12, 20, 14, one.colour, one.minority, one.name)


def _dot_key(one: Series, position: int, x: float, y: float) -> str:
    return _marker(position, x + 18, y - 5, 4.4, one.colour, one.colour)


def _line_key(one: Series, position: int, x: float, y: float) -> str:
    line = _line(x, y - 5, x + 26, y - 5, one.colour, _weight(one), _dashes(position, one.minority))
    return line + _marker(position, x + 13, y - 5, 4.2, one.colour, one.colour)


def _panel_key(place: int, one: Series, position: int, x: float, y: float) -> str:
    return _line_key(one, place, x, y)


def _weight(one: Series) -> float:
    """Return the width of a line: thick for a minority group."""
    return 3.2 if one.minority else 1.8


def _axes(area: _Area, ticks: Sequence[float], axis: str) -> list[str]:
    """Return the horizontal grid with its numbers, a strong line at 0, and the name and unit of the axis."""
    drawn = []
    for tick in ticks:
        y = area.y(tick)
        drawn.append(
            _line(area.left, y, area.left + area.width, y, INK if tick == 0 else FAINT, 1.6 if tick == 0 else 1)
        )
        drawn.append(_text(area.left - 7, y + 5, _tick_text(tick), size=SMALL, anchor="end"))
    middle = area.top + area.height / 2
    drawn.append(_text(17, middle, axis, size=SMALL, anchor="middle", extra=f'transform="rotate(-90 17 {_n(middle)})"'))
    return drawn


def _scaled(
    limits: tuple[float, float], top: float, width: float, height: float, about: int = 6
) -> tuple[_Area, list[float]]:
    low, high = limits
    if low == high:
        low, high = (-1.0, 1.0) if low == 0 else (min(0.0, low), max(0.0, high))
    ticks = _ticks(low, high, about)
    return _Area(LEFT, top, width - LEFT - RIGHT, height, ticks[0], ticks[-1]), ticks


def _bands(area: _Area, categories: int, minority: Collection[int]) -> list[str]:
    """Return a tinted column behind every minority category."""
    slot = area.width / categories
    return [_rectangle(area.left + slot * place, area.top, slot, area.height, BAND) for place in sorted(minority)]


def _category_names(
    area: _Area, categories: Sequence[str], minority: Collection[int], top: float
) -> tuple[list[str], float]:
    """Return the wrapped names under the slots, the word "minority" with them, and where they end."""
    slot = area.width / len(categories)
    drawn, longest = [], 0
    for place, name in enumerate(categories):
        lines = _wrapped(name, slot - 6) + (["(minority)"] if place in minority else [])
        longest = max(longest, len(lines))
        for row, line in enumerate(lines):
            weight = 'font-weight="bold"' if place in minority else ""
            x = area.left + slot * (place + 0.5)
            drawn.append(_text(x, top + 15 + 16 * row, line, size=SMALL, anchor="middle", extra=weight))
    return drawn, top + 15 + 16 * longest


def _width_for(categories: int, each: float, least: float = LEAST) -> float:
    return max(least, LEFT + RIGHT + categories * each)


# Figures


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
    width = _width_for(len(categories), max(84.0, 15.0 * len(series) + 18))
    drawn, top = _heading(title, width)
    if len(series) > 1:
        keys, top = _legend(series, top, width, _bar_key)
        drawn += keys
    area, ticks = _scaled(limits or limits_of(series), top + 14, width, 250)
    drawn += _bands(area, len(categories), minority) + _axes(area, ticks, axis)
    slot = area.width / len(categories)
    step = min(slot * 0.84 / len(series), WIDEST)
    for position, one in enumerate(series):
        for place, mark in enumerate(one.marks):
            x = area.left + slot * (place + 0.5) + step * (position - len(series) / 2)
            if mark is not None:
                note, hatched = (
                    f"{categories[place]}, {one.name}: {_described(mark)}",
                    place in minority or one.minority,
                )
                drawn.append(_column(area, x + step * 0.06, step * 0.88, mark, one.colour, hatched, note))
                drawn.append(_value(area, x + step * 0.06, step * 0.88, mark, decimals))
            if one.tick and step > 8:
                drawn.append(_text(x + step / 2, area.bottom + 14, one.tick, size=SMALL, anchor="middle"))
    below = area.bottom + (18 if any(one.tick for one in series) else 4)
    names, bottom = _category_names(area, categories, minority, below)
    return _document(title, width, bottom + 8, drawn + names)


def _column(area: _Area, x: float, width: float, mark: Mark, colour: str, hatched: bool, note: str) -> str:
    """Return a bar and its interval."""
    top, bottom = sorted((area.y(mark.value), area.y(0)))
    return _bar(x, top, width, bottom - top, colour, hatched, note) + _whisker(x + width / 2, area, mark)


def _value(area: _Area, x: float, width: float, mark: Mark, decimals: int) -> str:
    """Return a bar's value in figures, beyond its interval; nothing where there is no room."""
    text = number(mark.value, decimals)
    if len(text) * TINY * 0.5 > width / 0.88:
        return ""
    ends = [end for end in (mark.low, mark.high, mark.value) if end is not None]
    y = area.y(max(ends)) - 5 if mark.value >= 0 else area.y(min(ends)) + 14
    halo = 'stroke="#FFFFFF" stroke-width="3" paint-order="stroke"'
    return _text(x + width / 2, min(y, area.bottom - 3), text, size=TINY, anchor="middle", extra=halo)


def _described(mark: Mark) -> str:
    interval = "" if mark.low is None or mark.high is None else f" [{number(mark.low)}, {number(mark.high)}]"
    return number(mark.value) + interval


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
    width = LEAST
    drawn, top = _heading(title, width)
    for name, counts in (upper, lower):
        panel, top = _histogram(name, counts, top, width)
        drawn += panel
    return _document(title, width, top, drawn)


def _histogram(name: str, counts: Sequence[int], top: float, width: float) -> tuple[list[str], float]:
    """Return one histogram with the level that chance would give, and where it ends."""
    total = sum(counts)
    step = max(1, math.ceil(max([*counts, 1]) / 4))
    ticks = [float(step * place) for place in range(math.ceil(max([*counts, 1]) / step) + 1)]
    lines = _wrapped(f"{name}; {sum(counts[-2:])} of {total} above 90", width - 24)
    drawn = [_text(12, top + 16 + 17 * row, line, size=SMALL) for row, line in enumerate(lines)]
    area = _Area(LEFT, top + 10 + 17 * len(lines), width - LEFT - RIGHT, 118, 0.0, ticks[-1])
    drawn += _axes(area, ticks, "neurons")
    slot = area.width / len(counts)
    for place, count in enumerate(counts):
        low, high = 100 * place // len(counts), 100 * (place + 1) // len(counts)
        if count:
            last, y = place >= len(counts) - 2, area.y(count)
            note = f"percentile above {low} to {high}: {count}"
            x = area.left + slot * place + 1
            drawn.append(_bar(x, y, slot - 2, area.bottom - y, HIGHLIGHT if last else ORDERED_COLOURS[1], last, note))
    if total:
        chance = area.y(total / len(counts))
        drawn.append(_line(area.left, chance, area.left + area.width, chance, GREY, 1.5, 'stroke-dasharray="6 4"'))
    for percent in range(0, 101, 10):
        x = area.left + area.width * percent / 100
        drawn.append(_text(x, area.bottom + 16, str(percent), size=SMALL, anchor="middle"))
    drawn.append(
        _text(area.left + area.width / 2, area.bottom + 34, "percentile, 100 = largest", size=SMALL, anchor="middle")
    )
    return drawn, area.bottom + 46


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
    width = min(1180.0, _width_for(len(places), spacing))
    slot = (width - LEFT - RIGHT) / len(places)
    drawn, top = _heading(title, width)
    limits = limits or drawn_limits(series)
    if len(series) * len(places) > CROWDED:
        panels, area = _line_panels(series, top, width, slot, axis, limits)
    else:
        panels, area = _one_line_panel(series, top, width, slot, axis, limits)
    names, bottom = _place_names(area, places, slot, below)
    return _document(title, width, bottom, drawn + panels + names)


def _one_line_panel(
    series: Sequence[Series], top: float, width: float, slot: float, axis: str, limits: tuple[float, float]
) -> tuple[list[str], _Area]:
    """Return all lines in one panel with a legend, a little beside one another, and the panel's area."""
    drawn, top = _legend(series, top, width, _line_key)
    area, ticks = _scaled(limits, top + 14, width, 270)
    drawn += _axes(area, ticks, axis)
    for position in sorted(range(len(series)), key=lambda position: series[position].minority):
        aside = (position - (len(series) - 1) / 2) * min(3.0, 0.5 * slot / len(series))
        drawn += _drawn_line(area, series[position], position, slot, aside)
    return drawn, area


def _line_panels(
    series: Sequence[Series], top: float, width: float, slot: float, axis: str, limits: tuple[float, float]
) -> tuple[list[str], _Area]:
    """Return one panel per line, one above the other on one scale, and the area of the last."""
    drawn: list[str] = []
    area, _ = _scaled(limits, top, width, 96, 3)
    for position, one in enumerate(series):
        keys, end = _legend([one], top, width, partial(_panel_key, position), LEFT - 30)
        area, ticks = _scaled(limits, end + 8, width, 96, 3)
        drawn += keys + _axes(area, ticks, axis if position == len(series) // 2 else "")
        drawn += _drawn_line(area, one, position, slot, 0.0)
        top = area.bottom + 12
    return drawn, area


def _drawn_line(area: _Area, one: Series, position: int, slot: float, aside: float) -> list[str]:
    """Return a line that stops at gaps, its intervals, and all of its markers in two paths: filled and hollow."""
    shape, radius = _shape(position), 4.2 if slot > 14 else 2.4
    pen, path, filled, hollow, whiskers = "M", "", "", "", ""
    for place, mark in enumerate(one.marks):
        if mark is None:
            pen = "M"
            continue
        x, y = area.left + slot * (place + 0.5) + aside, area.y(mark.value)
        path, pen = f"{path}{pen}{_n(x)} {_n(y)}", "L"
        filled += _outline(shape, x, y, radius) if mark.solid else ""
        hollow += "" if mark.solid else _outline(shape, x, y, radius)
        if mark.solid and mark.low is not None and mark.high is not None:
            whiskers += f"M{_n(x)} {_n(area.y(mark.low))}V{_n(area.y(mark.high))}"
    weight = _weight(one) if slot > 14 else 1.4
    drawn = [f'<path d="{path}" {_stroke(one.colour, weight)} fill="none" {_dashes(position, one.minority)}/>']
    drawn += [f'<path d="{whiskers}" {_stroke(one.colour, 1.3)} fill="none"/>'] if whiskers else []
    drawn += [f'<path d="{hollow}" fill="#FFFFFF" {_stroke(one.colour, 1.3)}/>'] if hollow else []
    return drawn + ([f'<path d="{filled}" fill="{one.colour}" {_stroke(one.colour, 1.3)}/>'] if filled else [])


def _place_names(area: _Area, places: Sequence[str], slot: float, below: str) -> tuple[list[str], float]:
    """Return the slanted names of the places, thinned until none touches the next, and where they end."""
    every = max(1, math.ceil(17 / slot))
    short = [name if len(name) <= 26 else f"…{name[-25:]}" for name in places]
    flat = every == 1 and max(len(name) for name in short) * SMALL * CHARACTER < slot - 4
    drawn = []
    for place in range(0, len(places), every):
        x = area.left + slot * (place + 0.5)
        if flat:
            drawn.append(_text(x, area.bottom + 17, short[place], size=SMALL, anchor="middle"))
            continue
        y = area.bottom + 14
        turn = f'transform="rotate(-60 {_n(x + 4)} {_n(y)})"'
        drawn.append(_text(x + 4, y, short[place], size=SMALL, anchor="end", extra=turn))
    deep = 22.0 if flat else 14 + max(len(name) for name in short) * SMALL * CHARACTER * 0.82 + 6
    said = below if every == 1 else f"{below} (one name in {every} shown)"
    bottom = area.bottom + deep + 18
    drawn.append(_text(area.left + area.width / 2, bottom, said, size=SMALL, anchor="middle"))
    return drawn, bottom + 12


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
    width = _width_for(len(categories), max(74.0, 14.0 * len(series) + 18))
    drawn, top = _heading(title, width)
    keys, top = _legend(series, top, width, _dot_key)
    area, ticks = _scaled(limits or limits_of(series), top + 14, width, 270)
    drawn += keys + _bands(area, len(categories), minority) + _axes(area, ticks, axis)
    slot = area.width / len(categories)
    step = slot * 0.8 / len(series)
    for place in range(1, len(categories)):
        x = area.left + slot * place
        drawn.append(_line(x, area.top, x, area.bottom, FAINT))
    for position, one in enumerate(series):
        for place, mark in enumerate(one.marks):
            if mark is not None:
                x = area.left + slot * (place + 0.1) + step * (position + 0.5)
                note = f"<g><title>{escape(f'{categories[place]}, {one.name}: {_described(mark)}')}</title>"
                fill = one.colour if mark.solid else "#FFFFFF"
                dot = _marker(position, x, area.y(mark.value), 4.4, one.colour, fill)
                drawn.append(f"{note}{_whisker(x, area, mark, one.colour)}{dot}</g>")
    names, bottom = _category_names(area, categories, minority, area.bottom + 4)
    return _document(title, width, bottom + 8, drawn + names)
