"""What a figure is made of: marks, series of them, the colours, and numbers as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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

MINUS: Final = "\N{MINUS SIGN}"


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


def extent_of(series: Iterable[Series]) -> tuple[float, float]:
    """Return the lowest and highest end of all marks, without 0: for figures of levels rather than of changes."""
    ends: list[float] = []
    for mark in (mark for one in series for mark in one.marks if mark):
        ends += [end for end in (mark.value, mark.low, mark.high) if end is not None]
    return min(ends), max(ends)


def drawn_limits(series: Iterable[Series]) -> tuple[float, float]:
    """Return `limits_of` what a line plot draws, which is no interval of a hollow mark."""
    return limits_of(
        Series(one.name, tuple(m if m is None or m.solid else Mark(m.value) for m in one.marks), one.colour)
        for one in series
    )


def described(mark: Mark) -> str:
    """Return a mark's value with its interval, in words for a tooltip."""
    interval = "" if mark.low is None or mark.high is None else f" [{number(mark.low)}, {number(mark.high)}]"
    return number(mark.value) + interval
