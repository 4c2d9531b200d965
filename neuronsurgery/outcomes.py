"""What a sweep came to: the metrics under every edit, and the outcome of every example."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.batches import group_members
from neuronsurgery.checks import are_names, are_strings, is_tensor, make_tuples, refuse, size_of, unfit
from neuronsurgery.errors import first, inline, listed
from neuronsurgery.evaluation import GroupMetrics
from neuronsurgery.paired import paired_interval, paired_p_value
from neuronsurgery.results import ROWS_SHOWN, ByName, same_fields
from neuronsurgery.types import Group

GROUPS_SHOWN = 8
"""So many groups are columns of the table in a notebook."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The metric of every example under one edit, in the order they came; one bit each while all are 0 or 1.

    Attributes:
        parts: for each batch its number of examples, whether they are bits, and the values or packed bits.
    """

    parts: tuple[tuple[int, bool, np.ndarray], ...] = ()

    @classmethod
    def of(cls, values: Tensor) -> Outcomes:
        """Return the outcomes of one batch, float64, shape (n,)."""
        array = values.numpy()
        binary = bool(((array == 0) | (array == 1)).all())
        return cls(((len(array), binary, np.packbits(array.astype(bool)) if binary else array.copy()),))

    @classmethod
    def joined(cls, outcomes: Iterable[Outcomes]) -> Outcomes:
        """Return outcomes one after the other."""
        return cls(tuple(part for each in outcomes for part in each.parts))

    @property
    def is_binary(self) -> bool:
        """Whether all values are 0 or 1."""
        return all(bits for _, bits, _ in self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcomes) and np.array_equal(self.values(), other.values(), equal_nan=True)

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def values(self) -> Tensor:
        """Return the values, float64, shape (n,)."""
        parts = [np.unpackbits(part, count=n).astype(float) if bits else part for n, bits, part in self.parts]
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0))


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(ByName[str, GroupMetrics]):
    """What some edits change, per group, against the same examples under no edit.

    It behaves as a mapping label -> metrics under that edit; `sweep.baseline` are those of the model as it is.

    Attributes:
        baseline: the metrics of the model as it is.
        metrics: the metrics under each edit, by its label.
        members: the group of every example, in the order of `values`.
        indices: the place of every example in its data set, int64, shape (examples,): as the batches say it
            (`Batch.indices`), or counted as the examples came on their rank.
        ranks: the rank that every example came from, int64, shape (examples,); 0 for a single process. Under torch's
            `DistributedSampler(shuffle=False)` the place in the whole data set is `indices * world_size + ranks`.
        reasons: why the forward pass was not shared, where it was not: it could not be, or a capture would have taken
            longer than all edits one by one; and, with `exact=False`, that logits may differ by rounding. Empty if it
            always was shared, or if no edit changes anything.
        metric: the name of the function that was the metric; of an object that is called, its class's.

    Raises:
        ValueError: if the metrics are not all of the same groups, there is not one outcome under each edit, one member,
            index and rank for each example, or an argument is of another type; lists all.
    """

    baseline: GroupMetrics
    metrics: Mapping[str, GroupMetrics]
    members: tuple[Group, ...]
    indices: Tensor
    ranks: Tensor
    reasons: tuple[str, ...]
    metric: str
    _outcomes: Mapping[str, Outcomes]
    _before: Outcomes

    def __post_init__(self) -> None:
        make_tuples(self, "members", "reasons")
        refuse("a Sweep", [*self._unfit_metrics(), *self._unfit_examples()], "sweep makes sweeps")

    def _unfit_metrics(self) -> list[str]:
        one, every = self.baseline, dict(self.metrics)
        of_one_kind = all(isinstance(each, GroupMetrics) for each in (one, *every.values()))
        if not of_one_kind:
            return unfit("baseline and metrics", of_one_kind, "GroupMetrics", [one, every])
        same = all(
            (other.groups, other.counts, other.larger_is_better) == (one.groups, one.counts, one.larger_is_better)
            for other in every.values()
        )
        examples = dict(zip(one.groups, one.counts, strict=True))
        members = are_names(self.members) and +Counter(self.members) == +Counter(examples)
        return [
            *unfit("metrics", same, "GroupMetrics of the baseline's groups, counts and direction", every),
            *unfit("members", members, f"the group of every example, {examples}", self.members),
        ]

    def _unfit_examples(self) -> list[str]:
        size = size_of(self.members)
        outcomes = [self._before, *self._outcomes.values()]
        lengths = {sum(n for n, _, _ in each.parts) for each in outcomes}
        same = tuple(self._outcomes) == tuple(self.metrics) and lengths == {size}
        ranked = is_tensor(self.ranks, (size,), torch.int64) and bool((self.ranks >= 0).all())
        return [
            *unfit(
                "outcomes", same, f"{size} under each edit and none", f"{sorted(lengths)} of {list(self._outcomes)}"
            ),
            *unfit("indices", is_tensor(self.indices, (size,), torch.int64), f"int64, shape ({size},)", self.indices),
            *unfit("ranks", ranked, f"int64, shape ({size},), none negative", self.ranks),
            *unfit("reasons", are_strings(self.reasons), "strings", self.reasons),
            *unfit("metric", isinstance(self.metric, str), "the name of a metric", self.metric),
        ]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the edits."""
        return tuple(self.metrics)

    @override
    def _names(self) -> tuple[str, ...]:
        return self.labels

    @override
    def __getitem__(self, name: str) -> GroupMetrics:
        """Return the metrics under an edit.

        Raises:
            KeyError: if there is no such label.
        """
        self.refuse_unknown(name, "edit labelled")
        return self.metrics[name]

    def __eq__(self, other: object) -> bool:
        """Return whether the outcomes are the same, however they came about: `reasons` depend on the clock."""
        if not isinstance(other, Sweep):
            return False
        return same_fields(dataclasses.replace(self, reasons=()), dataclasses.replace(other, reasons=()))

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    @property
    def is_binary(self) -> bool:
        """Whether all values are 0 or 1, under every edit and under none."""
        return all(outcomes.is_binary for outcomes in (self._before, *self._outcomes.values()))

    def values(self, label: str | None = None) -> Tensor:
        """Return the metric of every example under an edit (None: under none), float64, shape (examples,).

        Raises:
            KeyError: if there is no such label.
        """
        if label is None:
            return self._before.values()
        self.refuse_unknown(label, "edit labelled")
        return self._outcomes[label].values()

    def change(self, label: str) -> dict[Group, float]:
        """Return by group the metric under an edit minus the metric without: signed, `abs()` of it is the paper's.

        Raises:
            KeyError: if there is no such label.
        """
        after = self[label]
        return {group: after[group] - self.baseline[group] for group in self.baseline.groups}

    def interval(self, label: str, level: float = 0.95) -> dict[Group, tuple[float, float]]:
        """Return by group a paired confidence interval of the change.

        Of Bonett and Price (2012) for values of 0 and 1, so that no change among 28 examples is not an interval of
        width 0; of the paired t-test otherwise (infinite for a single example).

        Args:
            label: of the edit.
            level: the coverage, in (0, 1).

        Raises:
            KeyError: if there is no such label.
            ValueError: if `level` is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), not {level}: 0.95 is usual")
        return self._per_group(label, lambda before, after: paired_interval(before, after, level))

    def p_value(self, label: str) -> dict[Group, float]:
        """Return by group the two-sided p-value of no change: McNemar's exact test for 0 and 1, paired t otherwise.

        Raises:
            KeyError: if there is no such label.
        """
        return self._per_group(label, paired_p_value)

    def _per_group(self, label: str, function: Callable[[np.ndarray, np.ndarray], Any]) -> dict[Group, Any]:
        after = self.values(label).numpy()
        before, members = self.values().numpy(), group_members(self.members)
        chosen = {group: np.array(members.get(group, ()), dtype=np.int64) for group in self.baseline.groups}
        return {group: function(before[own], after[own]) for group, own in chosen.items()}

    @override
    def to_records(self, level: float = 0.95) -> list[dict[str, Any]]:
        """Return one row per edit and group, for any data frame: value, change, its interval and p-value."""
        records = []
        for label in self.labels:
            change, interval, p = self.change(label), self.interval(label, level), self.p_value(label)
            for row in self[label].to_records():
                group = row["group"]
                low, high = interval[group]
                records.append(
                    {"label": label, **row, "change": change[group], "low": low, "high": high, "p": p[group]}
                )
        return records

    def __repr__(self) -> str:
        said = f"Sweep of {len(self.labels)} edits over {len(self.members)} examples; changes by group"
        lines = listed((f"{label}: {self._changes_in_words(label)}" for label in self.labels), 18)
        return f"{said}\n{lines}" if lines else said

    def _changes_in_words(self, label: str) -> str:
        return inline((f"{group}: {change:+.4f}" for group, change in self.change(label).items()), 8)

    @override
    def _shown(self) -> tuple[str, list[str], list[list[str]]]:
        """The largest changes first; bold is a change whose 95 % interval leaves 0 out."""
        groups = self.baseline.groups[:GROUPS_SHOWN]
        changes = {label: self.change(label) for label in self.labels}
        order = sorted(self.labels, key=lambda label: -max(map(abs, changes[label].values()), default=0.0))
        intervals = {label: self.interval(label) for label in order[:ROWS_SHOWN]}
        rows = [
            [str(label), *(_change_in_a_cell(changes[label][g], intervals[label][g]) for g in groups)]
            for label in intervals
        ]
        rows += [[str(label)] for label in order[ROWS_SHOWN:]]
        caption = f"{len(order)} edits over {len(self.members)} examples: change of {self.metric}; bold is settled"
        return caption, ["edit", *first(map(str, self.baseline.groups), GROUPS_SHOWN)], rows


def _change_in_a_cell(change: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{'*' * (low > 0 or high < 0)}{change:+.3f} [{low:+.3f}, {high:+.3f}]"
