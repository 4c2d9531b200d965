"""Accuracies and what they are worth: each with its interval, and how one stands to others in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuronsurgery.study.figures import Mark, number
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.wording import listed

Found = float | Mapping[str, Any]
"""A share of one run, or its summary over several seeds: values, mean, low and high."""


@dataclass(frozen=True)
class Level:
    """A share, such as an accuracy.

    Attributes:
        value: the share, or its mean over the seeds.
        low: lower end of its interval, over examples or over seeds; None where there is none.
        high: upper end.
        values: of every seed; empty for one run.
    """

    value: float
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()

    @property
    def mark(self) -> Mark:
        """The level as a mark of a figure, in percent."""
        low, high = (None if end is None else 100 * end for end in (self.low, self.high))
        return Mark(100 * self.value, low, high)

    @property
    def interval(self) -> str:
        """The interval in percent, "[30.2, 49.1]"; nothing where there is none."""
        return "" if self.low is None or self.high is None else f"[{number(100 * self.low)}, {number(100 * self.high)}]"

    def __str__(self) -> str:
        return f"{number(100 * self.value)} % {self.interval}".rstrip()


def level_of(found: Found, count: int | None = None) -> Level:
    """Return a share with its interval: Student's over seeds where it is a summary, else Wilson's of `count` examples.

    Args:
        found: the share, or the summary.
        count: examples that a single share is of; None for a share that has no such number.
    """
    if isinstance(found, Mapping):
        return Level(found["mean"], found["low"], found["high"], tuple(found["values"]))
    return Level(found) if count is None else Level(found, *wilson(found, count))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` examples."""
    from scipy.stats import binomtest

    if not count:
        return share, share
    ends = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def by_group(run: Mapping[str, Any], groups: Groups, split: str, found: Sequence[Found]) -> dict[str, Level]:
    """Return the accuracies of a split by group; a group without examples has none."""
    counts = dict(zip(groups.names, run["counts"][split], strict=True))
    present = [name for name, count in counts.items() if count]
    return {name: level_of(one, counts[name]) for name, one in zip(present, found, strict=True)}


def worst_group(levels: Mapping[str, Level]) -> str:
    """Return the name of the group of lowest accuracy, of equals the first."""
    return min(levels, key=lambda name: levels[name].value)


def standing(one: Level, others: Mapping[str, Level]) -> str:
    """Return than which others a level is not better, than which higher without being settled, and than which better.

    Better is higher with an interval that does not overlap the other's.
    """
    above, unsettled, below = [], [], []
    for name in sorted(others, key=lambda name: -others[name].value):
        other = others[name]
        if one.value <= other.value:
            below.append(name)
        elif one.low is None or other.high is None or one.low <= other.high:
            unsettled.append(name)
        else:
            above.append(name)
    parts = [f"not better than {_named(below, others)}"] if below else []
    parts += [f"higher than {_named(unsettled, others)}, but the intervals overlap"] if unsettled else []
    parts += [f"better than {_named(above, others)}"] if above else []
    return "; ".join(parts) or "there is nothing to compare it with"


def _named(names: Sequence[str], others: Mapping[str, Level]) -> str:
    """Return those of the others that are named, highest first, or that it is all of them."""
    said = [f"{name} ({number(100 * others[name].value)} %)" for name in names]
    return f"all of {listed(said, 20)}" if len(said) == len(others) > 1 else listed(said, 20)


def verdicts(differences: Sequence[Mapping[str, Any]]) -> str:
    """Return against which controls an arm is better, worse or undecided over the seeds, with the mean differences."""
    parts = []
    for verdict, words in (("worse", "worse than"), ("undecided", "undecided against"), ("better", "better than")):
        found = [f"{one['control']} ({_difference_words(one)})" for one in differences if one["verdict"] == verdict]
        parts += [f"{words} {listed(found, 20)}"] if found else []
    return "; ".join(parts) or "there is nothing to compare it with"


def _difference_words(one: Mapping[str, Any]) -> str:
    ends = f"[{number(100 * one['low'])}, {number(100 * one['high'])}]"
    sign = "+" if one["mean"] >= 1e-9 else ""
    return f"{sign}{number(100 * one['mean'])} points {ends}"
