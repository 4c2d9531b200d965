"""The few kinds of chart that the pages have: dots with intervals, lines, bars, strips and a scatter, all of Altair.

Every group has one colour and one marker, everywhere. A chart shows on hover what its marks are; its legend takes
groups away and brings them back; and what would be many charts alike is one with a `Choice`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import altair as alt

Row = Mapping[str, Any]

COLOURS: Final = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#5E4FA2")
SHAPES: Final = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "stroke")
OTHER_COLOURS: Final = ("#4A3A78", "#7D8590", "#B0447C", "#2F7F86", "#A06A1B", "#5B8C2A", "#9C4A3C", "#3C5A99")
"""For what is no group, so that it is not taken for one."""

GREY: Final = "#6b7680"
BAND: Final = 13
"""Pixels of one mark, where several stand in one row."""

FONT: Final = "Helvetica, Arial, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Look:
    """How the members of a field are drawn.

    Attributes:
        names: in the order of the legend.
        field: of the rows.
        labels: what the legend calls them, if not by their names.
        colours: of the members; from the first again where they are fewer.
        fixed: whether the legend names all members, and not only those that are shown.
    """

    names: Sequence[str]
    field: str = "group"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    colours: Sequence[str] = COLOURS
    fixed: bool = True

    def label(self, name: str) -> str:
        """Return what the legend calls a member."""
        return self.labels.get(name, name)

    def encoded(self, *, shape: bool = True) -> dict[str, Any]:
        """Return colour, marker and opacity: a click on the legend takes the others back."""
        domain, places = list(map(self.label, self.names)), range(len(self.names))
        columns = alt.ExprRef("width < 400 ? 1 : 2")
        shown = alt.Legend(title=None, orient="top", columns=columns, labelLimit=260, symbolOpacity=1)
        legend = shown if len(domain) > 1 else None
        colours: dict[str, Any] = {"range": [self.colours[place % len(self.colours)] for place in places]}
        colours |= {"domain": domain} if self.fixed else {}
        said: dict[str, Any] = {
            "color": alt.Color(f"{self.field}:N", legend=legend, sort=domain).scale(**colours),
            "opacity": alt.condition(self.toggle, alt.value(1.0), alt.value(0.08)),
        }
        if shape:
            shapes = [SHAPES[place % len(SHAPES)] for place in places]
            said["shape"] = alt.Shape(f"{self.field}:N", legend=legend).scale(domain=domain, range=shapes)
        return said

    @property
    def toggle(self) -> Any:
        """The selection that a click on the legend makes."""
        return alt.selection_point(name="legend", fields=[self.field], bind="legend")


@dataclass(frozen=True)
class Choice:
    """What the reader chooses: a value of a field of the rows.

    Attributes:
        field: of the rows.
        title: what stands before the choice.
        default: chosen at first; None: the first value of the rows.
    """

    field: str
    title: str
    default: Any = None


@dataclass(frozen=True, eq=False)
class Figure:
    """A chart with what is said of it, and the rows that it draws.

    Attributes:
        name: of its file and its place in the page.
        title: above it.
        note: how to read it, in a sentence or two.
        chart: of Altair, without its data.
        rows: what it draws.
        columns: of the table below it: field to heading.
        choices: with the values that are chosen at first.
    """

    name: str
    title: str
    note: str
    chart: Any
    rows: Sequence[Row]
    columns: Mapping[str, str]
    choices: Mapping[str, Any]

    @property
    def shown(self) -> list[Row]:
        """The rows of the choices that are made at first."""
        return [row for row in self.rows if all(row[name] == value for name, value in self.choices.items())]

    def specification(self, width: int | None = None) -> dict[str, Any]:
        """Return the Vega-Lite specification, the same for the same rows.

        Args:
            width: in pixels; None: of what it stands in.
        """
        text = json.dumps(self.chart.properties(width=width or "container").to_dict())
        # Altair counts the views of a process; a page counts its own.
        for place, name in enumerate(dict.fromkeys(re.findall(r'"(view_\d+)"', text))):
            text = text.replace(f'"{name}"', f'"view-{place}"')
        # The data come last: Altair would check every value.
        return {**json.loads(text), "data": {"values": self.rows}}


def figure(
    name: str,
    title: str,
    note: str,
    layers: Sequence[Any],
    rows: Sequence[Row],
    *,
    columns: Mapping[str, str],
    height: int,
    look: Look | None = None,
    choices: Sequence[Choice] = (),
) -> Figure:
    """Return a figure of some layers, with its choices and its legend.

    Args:
        name: of its file and its place in the page.
        title: above it.
        note: how to read it.
        layers: charts of Altair without data.
        rows: JSON values; what a choice is made by is in each of them.
        columns: of the table below: field to heading.
        height: in pixels.
        look: whose legend takes members away; None: there is no legend.
        choices: each is left out where there is but one value.
    """
    values = {choice.field: list(dict.fromkeys(row[choice.field] for row in rows)) for choice in choices}
    made = [choice for choice in choices if len(values[choice.field]) > 1]
    chosen = {one.field: one.default if one.default in values[one.field] else values[one.field][0] for one in made}
    chart = alt.layer(*layers, data=alt.NamedData(name="rows"))
    for choice in made:
        menu = alt.binding_select(options=values[choice.field], name=f"{choice.title} ")
        parameter = alt.param(name=f"choice_{choice.field}", bind=menu, value=chosen[choice.field])
        chart = chart.add_params(parameter).transform_filter(f"datum[{choice.field!r}] === {parameter.name}")
    if look is not None:
        chart = chart.add_params(look.toggle)
    chart = chart.properties(height=height).configure(font=FONT).configure_axis(labelFontSize=12, titleFontSize=12)
    chart = chart.configure_legend(labelFontSize=12, symbolSize=80).configure_view(stroke=None)
    return Figure(name, title, note, chart, rows, columns, chosen)


def points(share: float | None) -> float | None:
    """Return a share or a change in percent, with two digits and no negative zero."""
    return None if share is None else round(100 * share, 2) + 0.0


def interval(row: Row) -> str | None:
    """Return the ends of a row's interval, "low" and "high", in percent; None where it has none."""
    if row["low"] is None:
        return None
    return f"{100 * row['low'] + 0.0:.1f} to {100 * row['high'] + 0.0:.1f}"


def tooltip(columns: Mapping[str, str]) -> list[Any]:
    """Return what hovering shows: every column of the table."""
    return [alt.Tooltip(name, type="nominal", title=heading) for name, heading in columns.items()]


def dots(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Row],
    look: Look,
    *,
    axis: str,
    by: str,
    columns: Mapping[str, str],
    choices: Sequence[Choice] = (),
    limits: tuple[float, float] | None = None,
    line: float | None = 0.0,
    order: Sequence[str] | None = None,
    aside: bool = True,
) -> Figure:
    """Return dots with intervals, a row for each value of a field; strokes are the seeds, where there are several.

    Args:
        name: of its file and its place in the page.
        title: above it.
        note: how to read it.
        rows: with "value", "low", "high" (None where there is none), "values" (of the seeds), and what else is named.
        look: of what stands side by side in a row.
        axis: what the values are.
        by: the field of the rows.
        columns: of the table below: field to heading.
        choices: what the reader chooses.
        limits: of the axis; None: as the values ask for.
        line: where a line is drawn; None: nowhere.
        order: of the values of `by`; None: as they come.
        aside: whether several members of `look` stand in one row, each in a place of its own.
    """
    order = order or list(dict.fromkeys(row[by] for row in rows))
    scale = alt.Scale(domain=list(limits)) if limits else alt.Scale(zero=False, nice=True)
    y = alt.Y(f"{by}:N", sort=list(order), title=None, axis=alt.Axis(labelLimit=190, grid=True, tickBand="extent"))
    place: dict[str, Any] = {"y": y}
    if aside:
        place["yOffset"] = alt.YOffset(f"{look.field}:N", sort=list(map(look.label, look.names)))
    plain = look.encoded(shape=False)
    few = alt.Axis(tickCount=8)
    across = alt.X("value:Q", title=axis, scale=scale, axis=few)
    layers = [
        alt.Chart().mark_rule(color=GREY, strokeDash=[4, 3]).encode(x=alt.datum(line)) if line is not None else None,
        alt.Chart()
        .mark_rule(strokeWidth=1.6, clip=True)
        .encode(x=alt.X("low:Q", title=axis, scale=scale, axis=few), x2="high:Q", **place, **plain)
        if any(row["low"] is not None for row in rows)
        else None,
        alt.Chart()
        .transform_flatten(["values"])
        .mark_tick(thickness=1.5, size=8, clip=True)
        .encode(x=alt.X("values:Q", title=axis, scale=scale, axis=few), **place, **plain)
        if any(len(row["values"]) > 1 for row in rows)
        else None,
        alt.Chart()
        .mark_point(filled=True, size=60)
        .encode(x=across, tooltip=tooltip(columns), **place, **look.encoded()),
    ]
    height = max(90, len(order) * (BAND * len(look.names) + 12 if aside else 26))
    made = [layer for layer in layers if layer is not None]
    return figure(name, title, note, made, rows, columns=columns, height=height, look=look, choices=choices)


def columns_of_layers(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Row],
    look: Look,
    *,
    axis: str,
    by: str,
    columns: Mapping[str, str],
    choices: Sequence[Choice] = (),
    kind: Literal["points", "bars"] = "points",
    heading: str | None = None,
    order: Sequence[str] | None = None,
) -> Figure:
    """Return points with intervals, or bars, over a field in its order: layers, shares of the model, bins.

    Args:
        name: of its file and its place in the page.
        title: above it.
        note: how to read it.
        rows: as those of `dots`; bars need "value" alone.
        look: of what stands side by side.
        axis: what the values are.
        by: the field that the x axis has.
        columns: of the table below: field to heading.
        choices: what the reader chooses.
        kind: of the marks.
        heading: of the x axis.
        order: of the values of `by`; None: as they come.
    """
    order = order or list(dict.fromkeys(row[by] for row in rows))
    every = alt.Scale(domain=list(order))
    x = alt.X(f"{by}:N", sort=list(order), scale=every, title=heading, axis=alt.Axis(labelAngle=-40, labelLimit=150))
    place = {"x": x, "xOffset": alt.XOffset(f"{look.field}:N", sort=list(map(look.label, look.names)))}
    plain = look.encoded(shape=False)
    y = alt.Y("value:Q", title=axis)
    if kind == "bars":
        layers = [alt.Chart().mark_bar().encode(y=y, tooltip=tooltip(columns), **place, **plain)]
    else:
        layers = [
            alt.Chart().mark_rule(color=GREY, strokeDash=[4, 3]).encode(y=alt.datum(0)),
            alt.Chart().mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", title=axis), y2="high:Q", **place, **plain),
            alt.Chart()
            .mark_point(filled=True, size=45)
            .encode(y=y, tooltip=tooltip(columns), **place, **look.encoded()),
        ]
    return figure(name, title, note, layers, rows, columns=columns, height=300, look=look, choices=choices)


def lines(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Row],
    look: Look,
    *,
    x: str,
    axes: tuple[str, str],
    columns: Mapping[str, str],
    choices: Sequence[Choice] = (),
) -> Figure:
    """Return a line for each member of a field; arguments as those of `dots`, `axes` being what x and y are."""
    layers = [
        alt.Chart()
        .mark_line(point=alt.OverlayMarkDef(size=36, filled=True))
        .encode(
            x=alt.X(f"{x}:Q", title=axes[0], axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=axes[1], scale=alt.Scale(zero=False)),
            tooltip=tooltip(columns),
            **look.encoded(shape=False),
        )
    ]
    return figure(name, title, note, layers, rows, columns=columns, height=320, look=look, choices=choices)


def scatter(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Row],
    look: Look,
    *,
    axes: tuple[str, str],
    columns: Mapping[str, str],
) -> Figure:
    """Return dots of "x" and "y"; `axes` is what these are."""
    layers = [
        alt.Chart()
        .mark_point(filled=True, size=16)
        .encode(
            x=alt.X("x:Q", title=axes[0]), y=alt.Y("y:Q", title=axes[1]), tooltip=tooltip(columns), **look.encoded()
        )
    ]
    return figure(name, title, note, layers, rows, columns=columns, height=340, look=look)


def strips(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Row],
    look: Look,
    *,
    axis: str,
    by: str,
    columns: Mapping[str, str],
    choices: Sequence[Choice] = (),
) -> Figure:
    """Return a strip of "drawn" values for each value of a field, and a dot for "value"; else as `dots`."""
    order = list(dict.fromkeys(row[by] for row in rows))
    y = alt.Y(f"{by}:N", sort=order, title=None, axis=alt.Axis(labelLimit=190))
    layers = [
        alt.Chart().mark_rule(color=GREY, strokeDash=[4, 3]).encode(x=alt.datum(0)),
        alt.Chart()
        .transform_flatten(["drawn"])
        .mark_tick(thickness=1, size=18, color=GREY, opacity=0.6)
        .encode(x=alt.X("drawn:Q", title=axis), y=y),
        alt.Chart()
        .mark_point(filled=True, size=90)
        .encode(x=alt.X("value:Q", title=axis), y=y, tooltip=tooltip(columns), **look.encoded()),
    ]
    height = max(90, 40 * len(order))
    return figure(name, title, note, layers, rows, columns=columns, height=height, look=look, choices=choices)
