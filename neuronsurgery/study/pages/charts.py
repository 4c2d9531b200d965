"""The few kinds of chart that the pages have, all of Altair: dots, columns, bars, lines, strips, a cloud.

Every group has one colour and one marker, everywhere. A chart shows on hover what its marks are; its legend takes
groups away and brings them back; and what would be many charts alike is one with choices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

import altair as alt

Row = Mapping[str, Any]

COLOURS: Final = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#5E4FA2")
SHAPES: Final = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "stroke")
OTHER_COLOURS: Final = ("#4A3A78", "#7D8590", "#B0447C", "#2F7F86", "#A06A1B", "#5B8C2A", "#9C4A3C", "#3C5A99")
"""For what is no group, so that it is not taken for one."""

GREY: Final = "#6b7680"
BAND: Final = 13
"""Pixels of one mark, where several stand in one row."""

WHOLE: Final = "datum.value % 1 ? '' : datum.label"
"""Labels of whole numbers alone: of two epochs Vega also marks the middle."""

LINES: Final = "split(datum.label, '\\n')"
"""Labels with a line for each of theirs."""

FONT: Final = "Helvetica, Arial, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Look:
    """How the members of a field are drawn: each has a colour and a marker by its place."""

    names: Sequence[str]  # in the order of the legend
    field: str = "group"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)  # in the legend, if not the names
    colours: Sequence[str] = COLOURS  # from the first again where they are fewer
    fixed: bool = True  # whether the legend names all members, and not only those that are shown

    @property
    def members(self) -> list[str]:
        """What the legend calls them, in its order."""
        return [self.labels.get(name, name) for name in self.names]

    @property
    def toggle(self) -> Any:
        """The selection that a click on the legend makes."""
        return alt.selection_point(name="legend", fields=[self.field], bind="legend")

    def encoded(self, *, shape: bool = True) -> dict[str, Any]:
        """Return colour, marker and opacity: a click on the legend takes the others back."""
        # Of the page: the width of the chart follows from its labels too late for the room that the legend gets.
        columns = alt.ExprRef("containerSize()[0] < 600 ? 1 : 2")
        legend = alt.Legend(title=None, orient="top", columns=columns, labelLimit=260, symbolOpacity=1)
        shown, places = legend if len(self.names) > 1 else None, range(len(self.names))
        colours: dict[str, Any] = {"range": [self.colours[place % len(self.colours)] for place in places]}
        colours |= {"domain": self.members} if self.fixed else {}
        channels: dict[str, Any] = {
            "color": alt.Color(f"{self.field}:N", legend=shown, sort=self.members).scale(**colours),
            "opacity": alt.condition(self.toggle, alt.value(1.0), alt.value(0.08)),
        }
        if shape:
            shapes = [SHAPES[place % len(SHAPES)] for place in places]
            channels["shape"] = alt.Shape(f"{self.field}:N", legend=shown).scale(domain=self.members, range=shapes)
        return channels


@dataclass(frozen=True, eq=False)
class Figure:
    """A chart and the rows that it draws.

    Each row, of JSON values, has a mark at "value", with the interval "low" to "high" (or None) and the "values" of the
    seeds; in strips with the values "drawn"; in a cloud at "x" and "y".
    """

    rows: Sequence[Row]
    look: Look  # of what stands side by side
    _: KW_ONLY
    columns: Mapping[str, str]  # of the table below it, and of what hovering shows: field to heading
    axis: str  # what the values are
    by: str = ""  # the field whose values have a place each on the other axis
    kind: str = "dots"  # of `KINDS`
    heading: str | None = None  # of the other axis
    choices: Mapping[str, Sequence[Any]] = dataclasses.field(
        default_factory=dict
    )  # by field: its title, what is chosen at first
    order: Sequence[str] | None = None  # of the values of `by`; None: as they come
    limits: tuple[float, float] | None = None  # of the axis; None: as the values ask for
    line: float | None = 0.0  # where one is drawn; None: nowhere
    aside: bool = True  # whether several members of `look` stand in one row, each in a place of its own

    @functools.cached_property
    def menus(self) -> dict[str, list[Any]]:
        """The values of each choice that there are several for."""
        values = {name: list(dict.fromkeys(row[name] for row in self.rows)) for name in self.choices}
        return {name: found for name, found in values.items() if len(found) > 1}

    @property
    def chosen(self) -> dict[str, Any]:
        """What is chosen at first: the first of what is asked for that is there."""
        asked = {name: [*self.choices[name][1:], values[0]] for name, values in self.menus.items()}
        return {name: next(one for one in asked[name] if one in values) for name, values in self.menus.items()}

    @property
    def shown(self) -> list[Row]:
        """The rows of the choices that are made at first."""
        return [row for row in self.rows if all(row[name] == value for name, value in self.chosen.items())]

    @property
    def places(self) -> list[str]:
        """The values of `by`, in their order."""
        return list(self.order or dict.fromkeys(row[self.by] for row in self.rows))

    @property
    def tooltip(self) -> list[Any]:
        """What hovering shows."""
        return [alt.Tooltip(name, type="nominal", title=heading) for name, heading in self.columns.items()]

    def specification(self, width: int | None = None) -> dict[str, Any]:
        """Return the Vega-Lite specification, of a width in pixels, or as wide as what it stands in."""
        height, (first, *others) = KINDS[self.kind](self)
        # Altair would name the views of a process one after another; a page has its own.
        chart = alt.layer(first.properties(name="view-0"), *others, data=alt.NamedData(name="rows"))
        for name, values in self.menus.items():
            menu = alt.binding_select(options=values, name=f"{self.choices[name][0]} ")
            parameter = alt.param(name=f"choice_{name}", bind=menu, value=self.chosen[name])
            chart = chart.add_params(parameter).transform_filter(f"datum[{name!r}] === {parameter.name}")
        chart = chart.add_params(self.look.toggle).properties(width=width or "container", height=height)
        chart = chart.configure(font=FONT).configure_axis(labelFontSize=12, titleFontSize=12)
        chart = chart.configure_legend(labelFontSize=12, symbolSize=80).configure_view(stroke=None)
        # The data come last: Altair would check every value.
        drawn = {"value", "low", "high", "values", "drawn", "x", "y", self.by, self.look.field}
        drawn |= {*self.columns, *self.choices}
        rows = [{name: value for name, value in row.items() if name in drawn} for row in self.rows]
        return {**chart.to_dict(), "data": {"values": rows}}


def points(share: float | None) -> float | None:
    """Return a share or a change in percent, with two digits and no negative zero."""
    return None if share is None else round(100 * share, 2) + 0.0


def interval(row: Row) -> str | None:
    """Return the ends of a row's interval, "low" and "high", in percent; None where it has none."""
    if row.get("low") is None:
        return None
    return f"{100 * row['low'] + 0.0:.1f} to {100 * row['high'] + 0.0:.1f}"


# Each kind: the height in pixels, and the layers


def _rule(**where: Any) -> Any:
    return alt.Chart().mark_rule(color=GREY, strokeDash=[4, 3]).encode(**where)


def _dots(figure: Figure) -> tuple[int, list[Any]]:
    """A row for each place: dots with intervals; strokes are the seeds, where there are several."""
    look, by = figure.look, figure.by
    axis = alt.Axis(labelLimit=190, labelExpr=LINES, grid=True, tickBand="extent")
    place: dict[str, Any] = {"y": alt.Y(f"{by}:N", sort=figure.places, title=None, axis=axis)}
    if figure.aside:
        place["yOffset"] = alt.YOffset(f"{look.field}:N", sort=look.members)
    scale = alt.Scale(domain=list(figure.limits)) if figure.limits else alt.Scale(zero=False, nice=True)
    value, low, values = (
        alt.X(f"{field}:Q", title=figure.axis, scale=scale, axis=alt.Axis(tickCount=8))
        for field in ("value", "low", "values")
    )
    plain = {**place, **look.encoded(shape=False)}
    layers = [_rule(x=alt.datum(figure.line))] if figure.line is not None else []
    if any(row["low"] is not None for row in figure.rows):
        layers.append(alt.Chart().mark_rule(strokeWidth=1.6, clip=True).encode(x=low, x2="high:Q", **plain))
    if any(len(row["values"]) > 1 for row in figure.rows):
        strokes = alt.Chart().transform_flatten(["values"]).mark_tick(thickness=1.5, size=8, clip=True)
        layers.append(strokes.encode(x=values, **plain))
    marks = alt.Chart().mark_point(filled=True, size=60)
    layers.append(marks.encode(x=value, tooltip=figure.tooltip, **place, **look.encoded()))
    return max(90, len(figure.places) * (BAND * len(look.names) + 12 if figure.aside else 26)), layers


def _columns(figure: Figure) -> tuple[int, list[Any]]:
    """A column for each place: points with intervals, or bars."""
    places, look = figure.places, figure.look
    axis, scale = alt.Axis(labelAngle=-40, labelLimit=150), alt.Scale(domain=places)
    x = alt.X(f"{figure.by}:N", sort=places, scale=scale, title=figure.heading, axis=axis)
    place = {"x": x, "xOffset": alt.XOffset(f"{look.field}:N", sort=look.members)}
    value, low = (alt.Y(f"{field}:Q", title=figure.axis) for field in ("value", "low"))
    plain = {**place, **look.encoded(shape=False)}
    if figure.kind == "bars":
        return 300, [alt.Chart().mark_bar().encode(y=value, tooltip=figure.tooltip, **plain)]
    marks = alt.Chart().mark_point(filled=True, size=45)
    return 300, [
        _rule(y=alt.datum(0)),
        alt.Chart().mark_rule(strokeWidth=1.4).encode(y=low, y2="high:Q", **plain),
        marks.encode(y=value, tooltip=figure.tooltip, **place, **look.encoded()),
    ]


def _lines(figure: Figure) -> tuple[int, list[Any]]:
    """A line for each member over a whole number."""
    lines = alt.Chart().mark_line(point=alt.OverlayMarkDef(size=36, filled=True))
    return 320, [
        lines.encode(
            x=alt.X(f"{figure.by}:Q", title=figure.heading, axis=alt.Axis(tickMinStep=1, labelExpr=WHOLE)),
            y=alt.Y("value:Q", title=figure.axis, scale=alt.Scale(zero=False)),
            tooltip=figure.tooltip,
            **figure.look.encoded(shape=False),
        )
    ]


def _cloud(figure: Figure) -> tuple[int, list[Any]]:
    """A dot at each "x" and "y"."""
    x, y = alt.X("x:Q", title=figure.heading), alt.Y("y:Q", title=figure.axis)
    marks = alt.Chart().mark_point(filled=True, size=16)
    return 340, [marks.encode(x=x, y=y, tooltip=figure.tooltip, **figure.look.encoded())]


def _strips(figure: Figure) -> tuple[int, list[Any]]:
    """A strip of values for each place, and a dot for one more."""
    y = alt.Y(f"{figure.by}:N", sort=figure.places, title=None, axis=alt.Axis(labelLimit=190))
    drawn, value = (alt.X(f"{field}:Q", title=figure.axis) for field in ("drawn", "value"))
    ticks = alt.Chart().transform_flatten(["drawn"]).mark_tick(thickness=1, size=18, color=GREY, opacity=0.6)
    marks = alt.Chart().mark_point(filled=True, size=90)
    return max(90, 40 * len(figure.places)), [
        _rule(x=alt.datum(0)),
        ticks.encode(x=drawn, y=y),
        marks.encode(x=value, y=y, tooltip=figure.tooltip, **figure.look.encoded()),
    ]


KINDS: Final[Mapping[str, Callable[[Figure], tuple[int, list[Any]]]]] = {
    "dots": _dots,
    "columns": _columns,
    "bars": _columns,
    "lines": _lines,
    "strips": _strips,
    "cloud": _cloud,
}
