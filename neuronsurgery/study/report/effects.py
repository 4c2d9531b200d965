"""From the records of a run to effects: what an intervention did to a group, with its interval or over its draws."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series, signed

POINT: Final = 0.01
"""The paper's threshold of a sensitive layer, and what is called "next to nothing" here."""


POINTS: Final = "change, percentage points"
COLUMNS: Final = ("criterion", "chosen_for", "k", "fraction", "std", "relative_std", "layer", "distance", "with_norm")
"""What tells one intervention from another, draws aside."""


@dataclass(frozen=True)
class Groups:
    """The groups of a run, and how they are called in the report.

    Attributes:
        names: in the run's order.
        minority: the names of those that are rare in training.
    """

    names: tuple[str, ...]
    minority: frozenset[str]

    def label(self, name: str) -> str:
        """Return "G2 waterbird on land (minority)"."""
        return f"G{self.names.index(name)} {name}" + (" (minority)" if name in self.minority else "")

    @property
    def places(self) -> tuple[int, ...]:
        """The positions of the minority groups."""
        return tuple(place for place, name in enumerate(self.names) if name in self.minority)

    @property
    def majority(self) -> tuple[str, ...]:
        """The names of the others."""
        return tuple(name for name in self.names if name not in self.minority)

    def series(self, marks: Mapping[str, Sequence[Mark | None]]) -> list[Series]:
        """Return one entry of a figure's legend per group that has marks, in the group's own colour."""
        colours = figures.GROUP_COLOURS
        return [
            Series(
                f"G{place} {name}", tuple(marks[name]), colours[place % len(colours)], f"{place}", name in self.minority
            )
            for place, name in enumerate(self.names)
            if name in marks
        ]


@dataclass(frozen=True)
class Effect:
    """What one intervention did to one group: a change with its interval, or the summary of several random draws.

    Attributes:
        group: whose accuracy.
        setting: the intervention in words, such as "top-1".
        change: in accuracy, after minus before, a share; the mean over the draws.
        low: lower end of the interval; with several draws, of the change over the draws.
        high: upper end.
        p: of the change; with several draws, their median; None where a record has none.
        draws: how many.
        seen_in: draws whose interval excludes 0, on the side where more of them do.
        within_a_point: whether every draw's interval lies within one point of 0.
        spread: standard deviation over the draws, 0 for one.
        widest: lowest and highest end of any draw's interval.
    """

    group: str
    setting: str
    change: float
    low: float
    high: float
    p: float | None
    draws: int
    seen_in: int
    within_a_point: bool
    spread: float
    widest: tuple[float, float]

    @property
    def seen(self) -> bool:
        """Whether the interval excludes 0; with several draws, in more than half of them and on the same side."""
        return 2 * self.seen_in > self.draws

    @property
    def mark(self) -> Mark:
        """The effect as a mark of a figure, in points."""
        return Mark(100 * self.change, 100 * self.low, 100 * self.high, self.seen)

    def __str__(self) -> str:
        if self.draws == 1:
            return f"{signed(100 * self.change)} points [{signed(100 * self.low)}, {signed(100 * self.high)}]"
        return f"{signed(100 * self.change)} points on the mean, seen in {self.seen_in} of {self.draws} draws"


class Cell(NamedTuple):
    """One intervention, draws taken together: columns, effects by group, neurons edited, and their names."""

    setting: Mapping[str, Any]
    effects: Mapping[str, Effect]
    neurons: int
    names: Sequence[str]


def cells_of(records: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Return the interventions in the order of their first record, the draws of each taken together."""
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        together.setdefault(tuple(record.get(column) for column in COLUMNS), []).append(record)
    cells = []
    for key, drawn in together.items():
        setting = dict(zip(COLUMNS, key, strict=True))
        words = setting_words(setting)
        names = [change["group"] for change in drawn[0]["changes"]]
        effects = {
            name: _effect(words, [next(c for c in one["changes"] if c["group"] == name) for one in drawn])
            for name in names
        }
        first = drawn[0].get("names", ())
        same = all(one.get("names", ()) == first for one in drawn)
        cells.append(Cell(setting, effects, drawn[0].get("neurons", 0), first if same else ()))
    return cells


def _effect(setting: str, changes: Sequence[Mapping[str, Any]]) -> Effect:
    values = [change["change"] for change in changes]
    lows, highs = [change["low"] for change in changes], [change["high"] for change in changes]
    ps = [change["p"] for change in changes if change.get("p") is not None]
    alone = len(changes) == 1
    return Effect(
        group=changes[0]["group"],
        setting=setting,
        change=statistics.fmean(values),
        low=lows[0] if alone else min(values),
        high=highs[0] if alone else max(values),
        p=statistics.median(ps) if ps else None,
        draws=len(changes),
        seen_in=max(sum(low > 0 for low in lows), sum(high < 0 for high in highs)),
        within_a_point=all(max(abs(low), abs(high)) < POINT for low, high in zip(lows, highs, strict=True)),
        spread=0.0 if alone else statistics.stdev(values),
        widest=(min(lows), max(highs)),
    )


def own_effects(cells: Iterable[Cell], criterion: str) -> list[Effect]:
    """Return each group's effect under the neurons chosen for it: its own gradient's, or those chosen for all."""
    return [
        effect
        for cell in cells
        if cell.setting["criterion"] == criterion
        for name, effect in cell.effects.items()
        if cell.setting["chosen_for"] in (name, "all")
    ]


def sizes_of(cells: Iterable[Cell]) -> list[int]:
    """Return the k of every top-k among the interventions, ascending."""
    return sorted({cell.setting["k"] for cell in cells if cell.setting["k"] is not None})


def setting_words(setting: Mapping[str, Any]) -> str:
    """Return an intervention's size, scale, layer and distance in words."""
    words = []
    if setting.get("layer") is not None:
        words.append(str(setting["layer"]))
    if setting.get("distance") is not None:
        words.append(f"{setting['distance']} epochs back" + (" with the norm" if setting.get("with_norm") else ""))
    if setting.get("k") is not None:
        words.append(f"top-{setting['k']}")
    if setting.get("fraction") is not None:
        words.append(f"{100 * setting['fraction']:g} %")
    if scale_words(setting):
        words.append(scale_words(setting))
    return ", ".join(words)


def scale_words(setting: Mapping[str, Any]) -> str:
    """Return the standard deviation of a random draw in words; nothing of an edit without one."""
    if setting.get("std") is not None:
        return f"std {setting['std']:g}"
    if setting.get("relative_std") is not None:
        return f"std {setting['relative_std']:g} x RMS"
    return ""
