"""Metrics per group: how well a model does on each group of examples, and their averages, every one by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from neuronsurgery.batches import Unpack, by_key, group_members, ordered_groups
from neuronsurgery.checks import are_groups, are_integers, are_numbers, make_tuples, refuse, size_of, unfit
from neuronsurgery.copies import make_runner
from neuronsurgery.distributed import exchange
from neuronsurgery.errors import EXHAUSTED, checked, inline, listed
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.loaders import iterate_groups, named_loaders
from neuronsurgery.losses import accuracy, example_values, is_larger_better, refuse_unshifted_metrics
from neuronsurgery.results import ByName
from neuronsurgery.surveys import survey
from neuronsurgery.switches import restoring, without_mha_fastpath
from neuronsurgery.types import Group, Loaders, Metric, Predict


@dataclass(frozen=True, repr=False)
class GroupMetrics(ByName[Group, float]):
    """The mean of a metric over each group; behaves as a mapping group -> mean.

    Attributes:
        groups: the names of the groups.
        values: the mean over each group.
        counts: the number of examples of each group.
        larger_is_better: the direction of the metric; None where nobody knows it, and then there is no `worst`.

    Raises:
        ValueError: if there is no group or example, a group is there twice, there is not one mean and one count for
            each, or an argument is of another type; lists all.

    Example:
        >>> metrics = GroupMetrics(("landbird", "waterbird"), (0.9, 0.5), (30, 10), larger_is_better=True)
        >>> metrics["waterbird"], metrics.worst, metrics.average, metrics.balanced
        (0.5, 0.5, 0.8, 0.7)
        >>> dict(metrics), "waterbird" in metrics
        ({'landbird': 0.9, 'waterbird': 0.5}, True)
    """

    groups: tuple[Group, ...]
    values: tuple[float, ...]
    counts: tuple[int, ...]
    larger_is_better: bool | None = None

    def __post_init__(self) -> None:
        make_tuples(self, "groups", "values", "counts")
        refuse("a value of GroupMetrics", self._unfit(), "evaluate makes metrics")
        # One and the same NaN equals itself within a tuple, so metrics that are loaded equal those that were saved.
        object.__setattr__(self, "values", tuple(math.nan if math.isnan(value) else value for value in self.values))

    def _unfit(self) -> list[str]:
        size, direction = size_of(self.groups), self.larger_is_better
        counted = are_integers(self.counts, size, 0) and any(self.counts)
        return [
            *unfit("groups", are_groups(self.groups) and size > 0, "distinct integers or strings", self.groups),
            *unfit("values", are_numbers(self.values, size), f"{size} numbers", self.values),
            *unfit("counts", counted, f"{size} integers of at least 0, one of them larger", self.counts),
            *unfit("larger_is_better", isinstance(direction, bool | None), "True, False or None", direction),
        ]

    @override
    def _names(self) -> tuple[Group, ...]:
        return self.groups

    @override
    def __getitem__(self, name: Group) -> float:
        """Return the mean over one group, by its name.

        Raises:
            KeyError: if there is no such group; lists those there are.
        """
        self.refuse_unknown(name, "group")
        return self.values[self.groups.index(name)]

    @property
    def worst(self) -> float:
        """The mean over the worst group, by the direction of the metric; NaN if one of the means is.

        Raises:
            ValueError: if the direction of the metric is not known.
        """
        if self.larger_is_better is None:
            raise ValueError(
                "whether larger values of this metric are better is not known, so no group is the worst: pass "
                "larger_is_better= to evaluate or sweep, or ask for min or max"
            )
        return self.min if self.larger_is_better else self.max

    @property
    def min(self) -> float:
        """The smallest of the groups' means; NaN if one of them is."""
        return math.nan if any(map(math.isnan, self.values)) else min(self.values)

    @property
    def max(self) -> float:
        """The largest of the groups' means; NaN if one of them is."""
        return math.nan if any(map(math.isnan, self.values)) else max(self.values)

    @property
    def average(self) -> float:
        """The mean over all examples."""
        return self.weighted(dict(zip(self.groups, self.counts, strict=True)))

    @property
    def balanced(self) -> float:
        """The mean over the groups, each counting the same."""
        return sum(self.values) / len(self.values)

    def weighted(self, proportions: Mapping[Group, float]) -> float:
        """Return the mean over the groups weighted by given proportions, for instance the training set's counts.

        Args:
            proportions: a non-negative weight per group; they need not sum to 1.

        Raises:
            ValueError: if the groups are not the same, or the weights are negative or all zero.
        """
        weights = list(proportions.values())
        if set(proportions) != set(self.groups) or min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                f"proportions are one non-negative weight for each of the groups {list(self.groups)}, not "
                f"{dict(proportions)}"
            )
        total = sum(value * proportions[group] for group, value in zip(self.groups, self.values, strict=True))
        return total / sum(weights)

    @override
    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per group, for any data frame."""
        rows = zip(self.groups, self.values, self.counts, strict=True)
        return [{"group": group, "value": value, "count": count} for group, value, count in rows]

    def __repr__(self) -> str:
        rows = zip(self.groups, self.values, self.counts, strict=True)
        lines = listed((f"{group}: {value:.4f} ({count} examples)" for group, value, count in rows), 14)
        known = self.larger_is_better is not None
        ends = f"worst {self.worst:.4f}" if known else f"min {self.min:.4f}, max {self.max:.4f}"
        said = f"{ends}, average {self.average:.4f}, balanced {self.balanced:.4f}"
        return f"GroupMetrics of {len(self)} groups: {said}\n{lines}"


def member_indices(groups: Sequence[Group]) -> dict[Group, Tensor]:
    """Return the positions of each group's examples in a batch, int64, on the CPU."""
    return {group: torch.tensor(indices, device="cpu") for group, indices in group_members(groups).items()}


class Tally:
    """Running sums of a metric per group; what they come to is a `GroupMetrics`."""

    def __init__(self) -> None:
        self.sums: dict[Group, float] = {}
        self.counts: dict[Group, int] = {}

    def add(self, members: Mapping[Group, Tensor], values: Tensor) -> None:
        """Add the values of some examples; `members` are the places of each group's, see `member_indices`."""
        for group, indices in members.items():
            self.sums[group] = self.sums.get(group, 0.0) + float(values[indices].sum())
            self.counts[group] = self.counts.get(group, 0) + len(indices)

    def result(
        self,
        order: list[Group] | None,
        larger_is_better: bool | None,
        error: Exception | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> GroupMetrics:
        """Return the means over the groups, summed over the ranks.

        Args:
            larger_is_better: the direction of the metric.
            order: the groups in the order they are to have; None is ascending.
            error: what went wrong on this rank; raised after the other ranks have heard of it.
            process_group: the ranks, or None.

        Raises:
            ValueError: if a group has no examples.
            RuntimeError: if another rank failed.
        """
        shares = exchange(process_group, error, (order, self.sums, self.counts))
        present = [group for _, sums, _ in shares for group in sums]
        groups = ordered_groups(present) if order is None else list(dict.fromkeys(g for o, _, _ in shares for g in o))
        totals = {group: sum(counts.get(group, 0) for _, _, counts in shares) for group in groups}
        if order is not None and not groups:
            raise ValueError("the mapping of loaders is empty: give at least one group")
        empty = [group for group, count in totals.items() if count == 0]
        if empty or not groups:
            raise ValueError(
                f"no examples of {', '.join(map(repr, empty)) or 'any group'}: the loader yielded no batch. {EXHAUSTED}"
            )
        means = tuple(sum(sums.get(group, 0.0) for _, sums, _ in shares) / totals[group] for group in groups)
        return GroupMetrics(tuple(groups), means, tuple(totals.values()), larger_is_better)


@overload
def evaluate(
    model: nn.Module,
    loaders: Loaders,
    *,
    metric: Metric = ...,
    larger_is_better: bool | None = ...,
    predict: Predict | None = ...,
    unpack: Unpack | None = ...,
    group_key: str | None = ...,
    progress: bool = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> GroupMetrics: ...


@overload
def evaluate(
    model: nn.Module,
    loaders: Loaders,
    *,
    metric: Mapping[str, Metric],
    larger_is_better: bool | Mapping[str, bool] | None = ...,
    predict: Predict | None = ...,
    unpack: Unpack | None = ...,
    group_key: str | None = ...,
    progress: bool = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> dict[str, GroupMetrics]: ...


@restoring
def evaluate(
    model: nn.Module,
    loaders: Loaders,
    *,
    metric: Metric | Mapping[str, Metric] = accuracy,
    larger_is_better: bool | Mapping[str, bool] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> GroupMetrics | dict[str, GroupMetrics]:
    """Return the mean of a metric over each group.

    The model runs in evaluation mode on a copy that shares its weights, without gradient, under the caller's autocast,
    batch by batch as the loaders give them; nothing of it changes.

    Args:
        model: any module, a view too.
        loaders: a mapping group -> iterable of batches (whose own groups are then ignored), or one iterable of batches
            that carry a group per example. Batches without groups are one group "all".
        metric: (logits, targets) -> one value per example, shape (n,); or a mapping name -> such functions, all of
            which see the same forward pass.
        larger_is_better: the direction of a metric of your own, which decides what `worst` is; of several, by name.
            Those of the library know theirs.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        progress: whether to write a line of progress to standard error.
        process_group: sum over its ranks, each of which gives its share of the data. None communicates nothing.

    Returns:
        The group metrics; for a mapping of metrics, a dict of them by name.

    Raises:
        RuntimeError: if another rank failed.
        TypeError: if a batch has an unknown form, the name of a group is no integer or string, or an argument is of
            another kind.
        ValueError: if a group has no examples, or a metric is not one value per example.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> evaluate(model, [(torch.eye(2), torch.tensor([0, 0]), torch.tensor([3, 5]))])
        GroupMetrics of 2 groups: worst 0.0000, average 0.5000, balanced 0.5000
          3: 1.0000 (1 examples)
          5: 0.0000 (1 examples)
    """
    metrics = named_metrics(metric)
    unpack = by_key(unpack, group_key)
    directions = named_directions(metrics, larger_is_better)
    tallies: dict[str, Tally] = {name: Tally() for name in metrics}
    named = named_loaders(loaders)
    error = None
    try:
        runner = make_runner(survey(model), blank=False, spread=True, process_group=process_group)
        with torch.no_grad(), without_mha_fastpath():
            label = "evaluation" if progress else None
            for groups, batch in iterate_groups(named, device=runner.device, unpack=unpack, progress=label):
                logits = extract_logits(isolated_forward(runner, batch), predict, len(batch))
                refuse_unshifted_metrics(metrics.values(), logits, batch)
                members = member_indices(groups)
                for key, function in metrics.items():
                    tallies[key].add(members, example_values(function, logits, batch.targets))
    except Exception as raised:
        error = raised
    order = list(named) if isinstance(named, Mapping) else None
    results = {key: tally.result(order, directions[key], error, process_group) for key, tally in tallies.items()}
    return results if isinstance(metric, Mapping) else results[""]


METRIC = (
    "a metric is a function (logits, targets) -> one value per example, not a {}: pass accuracy, margin or your own"
)


def named_metrics(metric: Metric | Mapping[str, Metric]) -> dict[str, Metric]:
    """Return metrics by name; a single one is called "".

    Raises:
        TypeError: if one is no function.
        ValueError: if the mapping is empty.
    """
    metrics = dict(metric) if isinstance(metric, Mapping) else {"": metric}
    if not metrics:
        raise ValueError("the mapping of metrics is empty: give at least one, or leave metric= at its default")
    for function in metrics.values():
        checked(function, Callable, METRIC)
    return metrics


def named_directions(metrics: Mapping[str, Metric], said: bool | Mapping[str, bool] | None) -> dict[str, bool | None]:
    """Return for each metric whether larger is better, None where nobody knows.

    Raises:
        ValueError: if the caller speaks of a metric that there is none of.
    """
    unknown = sorted(set(said) - set(metrics)) if isinstance(said, Mapping) else []
    if unknown:
        raise ValueError(
            f"larger_is_better= names {inline(map(repr, unknown))}; there are {inline(map(repr, metrics))}"
        )
    return {
        name: is_larger_better(metric, said.get(name) if isinstance(said, Mapping) else said)
        for name, metric in metrics.items()
    }
