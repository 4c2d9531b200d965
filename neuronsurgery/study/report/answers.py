"""The first screen of a report: a few questions about the rarest group, each with one number and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from neuronsurgery.study.claims import judge
from neuronsurgery.study.table import Run

LINKS: Final[Mapping[str, str]] = {
    "accuracy": "accuracy",
    "1a": "cuts",
    "1h": "sets",
    "arms": "arms",
    "detection": "detection",
    "mitigation": "mitigation",
}
"""By experiment, the figure that shows more of it."""


@dataclass(frozen=True)
class Answer:
    """One question with its answer.

    Attributes:
        question: as it is asked.
        verdict: "holds", "does not hold", "undecided", "one seed only", or why there is no number.
        number: with its unit; empty where there is none.
        interval: in brackets; empty where there is none.
        told: what the number is, in at most 30 words.
        link: the name of the figure that shows more.
    """

    question: str
    verdict: str
    number: str
    interval: str
    told: str
    link: str


def answers(run: Run, records: Sequence[Mapping[str, Any]] | None = None) -> list[Answer]:
    """Return the answers that a run has, about the rarest group.

    Args:
        run: of one seed or of several.
        records: of `claims.judge`, if they are at hand.
    """
    if not run.minority:
        return []
    rarest = run.minority[0]
    asked = [record for record in (records or judge(run)) if record["question"] and record["group"] == rarest]
    order = list(LINKS)
    asked.sort(key=lambda record: order.index(record["experiment"]))
    return [_answer(run, record) for record in asked]


def _answer(run: Run, record: Mapping[str, Any]) -> Answer:
    number = "" if record["mean"] is None else f"{_signed(record['mean'], record['unit'])} {record['unit']}"
    return Answer(
        record["question"],
        record["verdict"],
        number,
        _interval(record),
        f"{record['told']}{_seeds(run)}",
        LINKS[record["experiment"]],
    )


def _interval(record: Mapping[str, Any]) -> str:
    if record["low"] is None:
        return ""
    level = f" ({100 * record['level']:.4g} %)" if "level" in record else ""
    return f"[{_signed(record['low'], record['unit'])}, {_signed(record['high'], record['unit'])}]{level}"


def _seeds(run: Run) -> str:
    return f"; mean of {len(run.seeds)} seeds" if len(run.seeds) > 1 else ""


def _signed(value: float, unit: str) -> str:
    rounded = round(value, 1) or 0.0  # no negative zero
    return f"{rounded:+.1f}" if unit == "points" else f"{rounded:.1f}"
