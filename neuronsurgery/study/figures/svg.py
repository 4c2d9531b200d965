"""The pieces of every figure: text, lines, bars and markers, the frame they stand in, its axis and its legend.

Nothing here knows what a figure is of. Coordinates are pixels, y down; an `Area` maps values to them.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from neuronsurgery.study.figures.marks import BAND, FAINT, GROUP_COLOURS, INK, MINUS, Mark, Series

LEFT: Final = 68.0
RIGHT: Final = 14.0
WIDEST: Final = 60.0
LEAST: Final = 520.0
WHOLE_ROW: Final = 720.0
"""From this width on a figure has a row of the page for itself."""

SMALL: Final = 14
TINY: Final = 12
LINE: Final = 20
CHARACTER: Final = 0.54
"""Mean width of a character, in font sizes."""

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
class Area:
    """The rectangle that data is drawn in, and its scale."""

    left: float
    top: float
    width: float
    height: float
    low: float
    high: float

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return self.top + self.height

    def y(self, value: float) -> float:
        """Return how far down a value is."""
        return self.top + (self.high - value) / (self.high - self.low) * self.height


Key = Callable[[Series, int, float, float], str]
"""What draws an entry of a legend: the series, its position, and where."""


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * position, 10) for position in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Return the number at a tick."""
    return f"{value:g}".replace("-", MINUS)


def px(value: float) -> str:
    """Return a coordinate as text: at most one decimal."""
    text = f"{value:.1f}"
    return "0" if text in ("-0.0", "0.0") else text.removesuffix(".0")


def text(x: float, y: float, text: str, *, size: int = SMALL, anchor: str = "start", extra: str = "") -> str:
    """Return a line of text, escaped; `anchor` is "start", "middle" or "end"."""
    return (
        f'<text x="{px(x)}" y="{px(y)}" font-size="{size}" text-anchor="{anchor}"{" " * bool(extra)}{extra}>'
        f"{escape(text)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1, extra: str = "") -> str:
    """Return a straight line."""
    return (
        f'<path d="M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}" stroke="{colour}" stroke-width="{width:g}" fill="none"'
        f"{' ' * bool(extra)}{extra}/>"
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    """Return a rectangle without an outline."""
    return (
        f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" fill="{fill}"'
        f"{' ' * bool(extra)}{extra}/>"
    )


def bar(x: float, y: float, width: float, height: float, colour: str, hatched: bool, note: str) -> str:
    """Return one bar with its tooltip, hatched for a minority group."""
    drawn = f"<g><title>{escape(note)}</title>{rectangle(x, y, width, height, colour)}"
    drawn += rectangle(x, y, width, height, "url(#HATCH)") if hatched else ""
    return f"{drawn}{rectangle(x, y, width, height, 'none', stroke(INK, 0.8))}</g>"


def stroke(colour: str, width: float) -> str:
    """Return the attributes of an outline."""
    return f'stroke="{colour}" stroke-width="{width:g}"'


def whisker(x: float, area: Area, mark: Mark, colour: str = INK, cap: float = 4.0) -> str:
    """Return the interval of a mark as a line with two caps; nothing where it has none."""
    if mark.low is None or mark.high is None:
        return ""
    low, high = area.y(mark.low), area.y(mark.high)
    path = f"M{px(x)} {px(low)}V{px(high)}M{px(x - cap)} {px(low)}h{px(2 * cap)}M{px(x - cap)} {px(high)}h{px(2 * cap)}"
    halo = f'<path d="{path}" {stroke("#FFFFFF", 3.4)} fill="none"/>'
    return f'{halo}<path d="{path}" {stroke(colour, 1.5)} fill="none"/>'


def outline(shape: str, x: float, y: float, r: float) -> str:
    """Return the path of a marker of half-width r; several may be joined in one path."""
    if shape == "circle":
        return f"M{px(x - r)} {px(y)}a{px(r)} {px(r)} 0 1 0 {px(2 * r)} 0a{px(r)} {px(r)} 0 1 0 {px(-2 * r)} 0z"
    return "M" + "L".join(f"{px(x + r * dx)} {px(y + r * dy)}" for dx, dy in CORNERS[shape]) + "z"


def shape(position: int) -> str:
    """Return the name of the marker of the series at a position."""
    return list(CORNERS)[position % len(CORNERS)]


def marker(position: int, x: float, y: float, r: float, colour: str, fill: str) -> str:
    """Return the marker of the series at a position."""
    return f'<path d="{outline(shape(position), x, y, r)}" fill="{fill}" {stroke(colour, 1.6)}/>'


def dashes(position: int, minority: bool) -> str:
    """Return the dashes of a group's line: none for a minority group, others differ by cycle of the colours."""
    if minority:
        return ""
    return f'stroke-dasharray="{"7 4" if position < len(GROUP_COLOURS) else "2 4"}"'


def weight(one: Series) -> float:
    """Return the width of a line: thick for a minority group."""
    return 3.2 if one.minority else 1.8


def wrapped(text: str, width: float, size: int = SMALL, lines: int = 4) -> list[str]:
    """Return a text broken into lines of a width, the last cut short where there are more."""
    characters = max(5, int(width / (size * CHARACTER)))
    return textwrap.wrap(text, characters, max_lines=lines, placeholder="…") or [""]


def document(title: str, width: float, height: float, body: Sequence[str]) -> str:
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
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {px(width)} {px(height)}" '
        f'width="{px(width)}" height="{px(height)}" font-family="Helvetica, Arial, sans-serif" fill="{INK}">\n'
        f"<title>{escape(title)}</title>\n"
        f"{pattern}{rectangle(0, 0, width, height, '#FFFFFF')}\n"
        f"{drawn.replace('#HATCH', f'#{hatch}')}\n</svg>\n"
    )


def heading(title: str, width: float) -> tuple[list[str], float]:
    """Return the title's lines and the height they take."""
    lines = wrapped(title, width - 24, 17)
    drawn = [text(12, 25 + 22 * place, line, size=17, extra='font-weight="bold"') for place, line in enumerate(lines)]
    return drawn, 12.0 + 22 * len(lines)


def legend(series: Sequence[Series], top: float, width: float, key: Key, left: float = 14.0) -> tuple[list[str], float]:
    """Return the legend in as many rows as it needs, and where it ends."""
    drawn: list[str] = []
    x, y = left, top + 16
    for position, one in enumerate(series):
        label = one.name + (" (minority)" if one.minority else "")
        wide = 44 + len(label) * SMALL * CHARACTER
        if x > left and x + wide > width - 8:
            x, y = left, y + LINE
        drawn += [key(one, position, x, y), text(x + 31, y, label, size=SMALL)]
        x += wide + 8
    return drawn, y + 10


def bar_key(one: Series, position: int, x: float, y: float) -> str:
    """Return the legend's entry of bars."""
    return bar(x + 6, y - 12, 20, 14, one.colour, one.minority, one.name)


def dot_key(one: Series, position: int, x: float, y: float) -> str:
    """Return the legend's entry of dots."""
    return marker(position, x + 18, y - 5, 4.4, one.colour, one.colour)


def line_key(one: Series, position: int, x: float, y: float) -> str:
    """Return the legend's entry of a line."""
    drawn = line(x, y - 5, x + 26, y - 5, one.colour, weight(one), dashes(position, one.minority))
    return drawn + marker(position, x + 13, y - 5, 4.2, one.colour, one.colour)


def axes(area: Area, ticks: Sequence[float], axis: str) -> list[str]:
    """Return the horizontal grid with its numbers, a strong line at 0, and the name and unit of the axis."""
    drawn = []
    for tick in ticks:
        y = area.y(tick)
        drawn.append(
            line(area.left, y, area.left + area.width, y, INK if tick == 0 else FAINT, 1.6 if tick == 0 else 1)
        )
        drawn.append(text(area.left - 7, y + 5, tick_text(tick), size=SMALL, anchor="end"))
    middle = area.top + area.height / 2
    drawn.append(text(17, middle, axis, size=SMALL, anchor="middle", extra=f'transform="rotate(-90 17 {px(middle)})"'))
    return drawn


def ticks_of(limits: tuple[float, float], about: int = 6) -> list[float]:
    """Return the ticks of a scale, which begins and ends at a tick; with 0 where both limits are equal."""
    low, high = limits
    if low == high:
        low, high = (-1.0, 1.0) if low == 0 else (min(0.0, low), max(0.0, high))
    return _ticks(low, high, about)


def scaled(
    limits: tuple[float, float], top: float, width: float, height: float, about: int = 6
) -> tuple[Area, list[float]]:
    """Return the area of a figure and the ticks of its scale, which begins and ends at a tick."""
    ticks = ticks_of(limits, about)
    return Area(LEFT, top, width - LEFT - RIGHT, height, ticks[0], ticks[-1]), ticks


def bands(area: Area, categories: int, minority: Collection[int]) -> list[str]:
    """Return a tinted column behind every minority category."""
    slot = area.width / categories
    return [rectangle(area.left + slot * place, area.top, slot, area.height, BAND) for place in sorted(minority)]


def category_names(
    area: Area, categories: Sequence[str], minority: Collection[int], top: float
) -> tuple[list[str], float]:
    """Return the wrapped names under the slots, the word "minority" with them, and where they end."""
    slot = area.width / len(categories)
    drawn, longest = [], 0
    for place, name in enumerate(categories):
        lines = wrapped(name, slot - 6) + (["(minority)"] if place in minority else [])
        longest = max(longest, len(lines))
        for row, line in enumerate(lines):
            weight = 'font-weight="bold"' if place in minority else ""
            x = area.left + slot * (place + 0.5)
            drawn.append(text(x, top + 15 + 16 * row, line, size=SMALL, anchor="middle", extra=weight))
    return drawn, top + 15 + 16 * longest


def width_for(categories: int, each: float, least: float = LEAST) -> float:
    """Return the width of a figure of so many categories."""
    return max(least, LEFT + RIGHT + categories * each)
