"""Many edits in one pass over the data.

Each batch is loaded once. The part of the forward pass that an edit does not touch is computed once and shared between
all edits (see `graph`), equal edits are evaluated once, and the outcome of every example is kept, so that every change
has a paired interval and a p-value: the same examples before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from neuronsurgery.batches import Unpack, group_members, named_loaders
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.distributed import exchange, without_mha_fastpath
from neuronsurgery.edits import Edit, compose
from neuronsurgery.errors import inline, listed
from neuronsurgery.evaluation import GroupMetrics, Tally
from neuronsurgery.forward import default_predict, extract_logits
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.loaders import iterate_groups
from neuronsurgery.losses import accuracy, example_values, refuse_default_metric
from neuronsurgery.paired import paired_interval, paired_p_value
from neuronsurgery.plans import Plan, plan
from neuronsurgery.surgery import refuse_unreachable
from neuronsurgery.surveys import held_elsewhere, survey
from neuronsurgery.types import Group, Loaders, Metric, Predict

BASELINE = compose()
"""The identity: the model as it is."""


@dataclass(frozen=True)
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

    def values(self) -> Tensor:
        """Return the values, float64, shape (n,)."""
        parts = [np.unpackbits(part, count=n).astype(float) if bits else part for n, bits, part in self.parts]
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0))


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What some edits change, per group, against the same examples under no edit.

    `sweep[label]` are the metrics under an edit, `sweep.baseline` those of the model as it is.

    Attributes:
        baseline: the metrics of the model as it is.
        metrics: the metrics under each edit, by its label.
        members: the group of every example, in the order of `values`.
        reasons: why the forward pass could not be shared, where it could not; empty if it always was, or if no edit
            changes anything.
        metric: the name of the function that was the metric; of an object that is called, its class's.
    """

    baseline: GroupMetrics
    metrics: Mapping[str, GroupMetrics]
    members: tuple[Group, ...]
    reasons: tuple[str, ...]
    metric: str
    _outcomes: Mapping[str, Outcomes]
    _before: Outcomes
    _positions: Mapping[Group, np.ndarray]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the edits."""
        return tuple(self.metrics)

    def __getitem__(self, label: str) -> GroupMetrics:
        """Return the metrics under an edit.

        Raises:
            KeyError: if there is no such label.
        """
        self._refuse_unknown(label)
        return self.metrics[label]

    def _refuse_unknown(self, label: str) -> None:
        if label not in self.metrics:
            raise KeyError(f"no edit is labelled {label!r}; there are {inline(map(repr, self.labels), 10)}")

    def values(self, label: str | None = None) -> Tensor:
        """Return the metric of every example under an edit (None: under none), float64, shape (examples,).

        Raises:
            KeyError: if there is no such label.
        """
        if label is None:
            return self._before.values()
        self._refuse_unknown(label)
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
        before = self.values().numpy()
        return {group: function(before[chosen], after[chosen]) for group, chosen in self._positions.items()}

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
        return ", ".join(f"{group}: {change:+.4f}" for group, change in list(self.change(label).items())[:8])


# Running


class _Edited(Mapping[str, Tensor]):
    """The edited tensors of one edit, computed when they are looked up: hundreds of edits are never held at once."""

    def __init__(self, planned: Plan, weights: Mapping[str, Tensor]) -> None:
        self._planned = planned
        self._weights = weights

    @override
    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._planned.tensors[name](self._weights[name])

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._planned.tensors)

    @override
    def __len__(self) -> int:
        return len(self._planned.tensors)


def sweep(
    model: nn.Module,
    edits: Mapping[str, Edit],
    loaders: Loaders,
    *,
    metric: Metric = accuracy,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Sweep:
    """Return what each of many edits changes, in one pass over the data.

    The results equal those of `evaluate(apply(edit, model), loaders)` bit for bit per example. The forward pass is
    captured as a graph, trusted for an input shape only where its replay gives the model's own output bit for bit;
    elsewhere one warning says why, and every edit costs a forward pass of its own. Nothing of the model changes.

    Args:
        model: any module.
        edits: the edits by a label of the caller's.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example.
        metric: (logits, targets) -> one value per example, shape (n,).
        predict: the model's output -> logits; it becomes a part of the graph.
        unpack: what a loader yields -> `Batch`.
        progress: whether to write a line of progress to standard error.
        process_group: gather over its ranks, each of which gives its share of the data. None communicates nothing.

    Raises:
        TypeError: if `edits` is not a mapping of edits, or a batch has an unknown form.
        ValueError: if an edit does not fit the model (names its label, lists every mismatch), a group has no examples,
            or the metric is not one value per example.
        RuntimeError: if another rank failed.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> layout = find_layout(model)
        >>> edits = {"first": zero_out(select(layout, {"weight": 0})), "all": zero_out(select(layout, {"weight": ...}))}
        >>> data = [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))]
        >>> sweep(model, edits, data)
        Sweep of 2 edits over 2 examples; changes by group
          first: 0: +0.0000, 1: +0.0000
          all: 0: +0.0000, 1: -1.0000

    Source:
        Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data", 2012; McNemar, 1947.
    """
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits are a mapping label -> edit, not a {type(edits).__name__}: write {{'name': edit}}")
    wrong = [f"'{label}': {type(edit).__name__}" for label, edit in edits.items() if not isinstance(edit, Edit)]
    if wrong:
        raise TypeError(f"edits are what zero_out, scale and the like return, not {', '.join(wrong[:5])}")
    loaders = named_loaders(loaders)
    tallies = {edit: _Tally() for edit in dict.fromkeys((BASELINE, *edits.values()))}
    seen = _Seen([], ())
    error = None
    try:
        runner, edited = _planned(model, edits, metric)
        with torch.no_grad(), without_mha_fastpath():
            seen = _run(runner, edited, tallies, loaders, metric, predict, unpack, progress)
    except Exception as raised:
        error = raised
    order = list(loaders) if isinstance(loaders, Mapping) else None
    return _gathered(edits, tallies, seen, metric, order, error, process_group)


class _Tally:
    """What was measured of one edit so far: sums by group, and every example's value."""

    def __init__(self) -> None:
        self.means = Tally()
        self.outcomes: list[Outcomes] = []

    def add(self, groups: Sequence[Group], values: Tensor) -> None:
        self.means.add(groups, values)
        self.outcomes.append(Outcomes.of(values))


class _Seen(NamedTuple):
    """The group of every example that went by, and why a forward pass was not shared."""

    members: list[Group]
    reasons: tuple[str, ...]


def _planned(
    model: nn.Module, edits: Mapping[str, Edit], metric: Metric
) -> tuple[Runner, dict[Edit, Mapping[str, Tensor]]]:
    """Return the model to run, and the edited tensors of each distinct edit."""
    surveyed = survey(model)
    refuse_default_metric(surveyed.model, metric)
    runner = make_runner(surveyed)
    held = held_elsewhere(surveyed)
    edited: dict[Edit, Mapping[str, Tensor]] = {BASELINE: {}}
    for label, edit in edits.items():
        if edit not in edited:
            try:
                planned = plan(edit, surveyed)
                refuse_unreachable(planned, held)
            except (ValueError, TypeError) as error:
                raise type(error)(f"edit '{label}': {error}") from error
            edited[edit] = _Edited(planned, runner.parameters)
    return runner, edited


def _run(
    runner: Runner,
    edited: Mapping[Edit, Mapping[str, Tensor]],
    tallies: Mapping[Edit, _Tally],
    loaders: Loaders,
    metric: Metric,
    predict: Predict | None,
    unpack: Unpack | None,
    progress: bool,
) -> _Seen:
    """Run the edited models over the data, and add what is measured to the tallies."""
    forward = CheckedForward(runner, predict or default_predict)
    # A capture takes as long as many batches of a small network, and no edits share nothing.
    run = forward.run if any(edited.values()) else forward.one_by_one
    members: list[Group] = []
    label = "sweep" if progress else None
    batches = iterate_groups(loaders, device=runner.device, unpack=unpack, progress=label, edits=len(edited))
    for groups, batch in batches:
        members.extend(groups)
        for edit, logits in run(batch.args, batch.kwargs, edited):
            tallies[edit].add(groups, example_values(metric, extract_logits(logits, None, len(batch)), batch.targets))
    return _Seen(members, tuple(sorted(forward.reasons)))


def _gathered(
    edits: Mapping[str, Edit],
    tallies: Mapping[Edit, _Tally],
    seen: _Seen,
    metric: Metric,
    order: list[Group] | None,
    error: Exception | None,
    process_group: dist.ProcessGroup | None,
) -> Sweep:
    """Return the sweep over all ranks; `tallies` are in an order that these share."""
    own = {edit: Outcomes.joined(tally.outcomes) for edit, tally in tallies.items()}
    shares = exchange(process_group, error, (seen.members, list(own.values())))
    outcomes = dict(zip(own, map(Outcomes.joined, zip(*(share for _, share in shares), strict=True)), strict=True))
    metrics = {edit: tally.means.result(order, None, process_group) for edit, tally in tallies.items()}
    members = tuple(group for share, _ in shares for group in share)
    positions = group_members(members)
    return Sweep(
        metrics[BASELINE],
        {label: metrics[edit] for label, edit in edits.items()},
        members,
        seen.reasons,
        _name(metric),
        {label: outcomes[edit] for label, edit in edits.items()},
        outcomes[BASELINE],
        {group: np.array(positions.get(group, ()), dtype=np.int64) for group in metrics[BASELINE].groups},
    )


def _name(metric: Metric) -> str:
    """Return what a metric is called, that of its function where arguments were bound to it."""
    function = metric.func if isinstance(metric, functools.partial) else metric
    return str(getattr(function, "__name__", type(function).__name__))
