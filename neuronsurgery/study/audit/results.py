"""What an audit gives back: its answers and its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import neuronsurgery as ns

COLUMNS: Final = ("stage", "experiment", "group", "measure", "value", "low", "high", "n", "k", "names", "p", "note")
"""Of the table, see `Audit.table`: those of `study.table` that an audit has something for."""

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found; prints as its answers.

    Attributes:
        answers: in words, one sentence each: how right the network is, who is fragile, which neurons carry whom.
        table: one row per number: `stage`, `experiment` (classes, groups), `group`, `measure`, `value`, `low` and
            `high` (95 %), `n`, `k`, `names` (of the neurons that are cut), `p`, `note`.
        fragile: one row per example that was scored: `path`, `class`, `score` (higher is more fragile), `flag` (1 where
            it stands out within its class), most fragile first within each class.
        places: of the examples of `fragile` among all.
        edits: by name: "critical", the set that was found, and "knockout", the cut that says who is fragile, if any.
        caveats: what these numbers do not say.
        note: the network, the examples and the time that were used, one line each.
    """

    answers: tuple[str, ...]
    table: tuple[Row, ...]
    fragile: tuple[Row, ...]
    places: tuple[int, ...]
    edits: Mapping[str, ns.Edit]
    caveats: tuple[str, ...]
    note: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(["Audit", *(f"  {answer}" for answer in self.answers)])


def row_of(
    stage: str, experiment: str, group: str, measure: str, value: float, low: float, high: float, **more: Any
) -> Row:
    """Return a row of the table; the value and its lower and upper limit are NaN where there is none."""
    numbers = {"value": value, "low": low, "high": high}
    row = {"stage": stage, "experiment": experiment, "group": group, "measure": measure, **more}
    row |= {name: None if math.isnan(number) else number for name, number in numbers.items()}
    return {column: row.get(column) for column in COLUMNS}
