"""Many edits in one pass over the data.

Each batch is loaded once. The part of the forward pass that an edit does not touch is computed once and shared between
all edits (see `capture.py`), equal edits are evaluated once, and the outcome of every example is kept, so that every
change has a paired interval and a p-value: the same examples before and after.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.capture import CheckedForward
from neuronsurgery.edits import Edit, compose
from neuronsurgery.evaluation import (
    GroupMetrics,
    Tally,
    accuracy,
    example_values,
    refuse_default_metric,
)
from neuronsurgery.gradients import exchange
from neuronsurgery.structure import held_elsewhere, named_tensors, one_numerical_path, plain
from neuronsurgery.surgery import LayerPlan, plan, refuse_unreachable
from neuronsurgery.types import (
    Group,
    Loaders,
    Metric,
    Predict,
    Unpack,
    default_predict,
    extract_logits,
    group_members,
    iterate_groups,
    model_device,
    named_loaders,
)

BASELINE = compose()
"""The identity: the model as it is."""


class Outcomes:
    """The metric of every example under one edit; one bit each while all are 0 or 1."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, bool, np.ndarray]] = []

    def add(self, values: Tensor) -> None:
        """Add the values of some examples, float64, shape (n,)."""
        array = values.numpy()
        binary = bool(((array == 0) | (array == 1)).all())
        self._parts.append((len(array), binary, np.packbits(array.astype(bool)) if binary else array.copy()))

    def extend(self, other: Outcomes) -> None:
        """Add the values of another one behind these."""
        self._parts.extend(other._parts)

    def values(self) -> Tensor:
        """Return the values in the order they came, float64, shape (n,)."""
        parts = [np.unpackbits(part, count=n).astype(float) if bits else part for n, bits, part in self._parts]
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
            raise KeyError(f"no edit is labelled {label!r}; there are {', '.join(map(repr, self.labels[:10]))}")

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
        return {group: function(before, after[chosen]) for group, (chosen, before) in self._unedited.items()}

    @functools.cached_property
    def _unedited(self) -> dict[Group, tuple[np.ndarray, np.ndarray]]:
        """The positions of each group's examples and their values under no edit: the same for every edit."""
        values, members = self.values().numpy(), group_members(self.members)
        positions = {group: np.array(members.get(group, ()), dtype=np.int64) for group in self.baseline.groups}
        return {group: (chosen, values[chosen]) for group, chosen in positions.items()}

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
        lines = [f"Sweep of {len(self.labels)} edits over {len(self.members)} examples; changes by group"]
        for label in self.labels[:18]:
            changes = ", ".join(f"{group}: {change:+.4f}" for group, change in list(self.change(label).items())[:8])
            lines.append(f"  {label}: {changes}")
        if len(self.labels) > 18:
            lines.append(f"  ... {len(self.labels) - 18} more edits")
        return "\n".join(lines)


class _Edited(Mapping[str, Tensor]):
    """The edited tensors of one edit, computed when they are looked up: hundreds of edits are never held at once."""

    def __init__(self, plans: Mapping[str, LayerPlan], weights: Mapping[str, Tensor]) -> None:
        self._plans = plans
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._plans[name](self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)


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
    refuse_default_metric(model, metric)
    run = _Run({BASELINE, *edits.values()}, metric)
    error = None
    try:
        run.plan(model, edits)
        with torch.no_grad(), one_numerical_path():
            run.over(loaders, predict, unpack, progress)
    except Exception as raised:
        error = raised
    return run.result(edits, list(loaders) if isinstance(loaders, Mapping) else None, error, process_group)


class _Run:
    """The running outcomes of a sweep: one `Outcomes` and one `Tally` per distinct edit."""

    def __init__(self, distinct: set[Edit], metric: Metric) -> None:
        self.outcomes = {edit: Outcomes() for edit in distinct}
        self.tallies = {edit: Tally() for edit in distinct}
        self.members: list[Group] = []
        self.reasons: list[str] = []
        self.metric = metric

    def plan(self, model: nn.Module, edits: Mapping[str, Edit]) -> None:
        self.runner = plain(model)
        weights = {name: tensor.parameter for name, tensor in named_tensors(self.runner).items()}
        held = held_elsewhere(self.runner)
        self.edited: dict[Edit, Mapping[str, Tensor]] = {BASELINE: {}}
        for label, edit in edits.items():
            if edit not in self.edited:
                try:
                    plans = plan(edit, self.runner)
                    refuse_unreachable(plans, held)
                    self.edited[edit] = _Edited(plans, weights)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"edit '{label}': {error}") from error

    def over(self, loaders: Loaders, predict: Predict | None, unpack: Unpack | None, progress: bool) -> None:
        forward = CheckedForward(self.runner, predict or default_predict)
        # A capture takes as long as many batches of a small network, and no edits share nothing.
        run = forward.run if any(self.edited.values()) else forward.one_by_one
        label = "sweep" if progress else None
        device = model_device(self.runner)
        batches = iterate_groups(loaders, device=device, unpack=unpack, progress=label, edits=len(self.edited))
        for groups, batch in batches:
            self.members.extend(groups)
            for edit, logits in run(batch.args, batch.kwargs, self.edited):
                logits = extract_logits(logits, None, len(batch))
                values = example_values(self.metric, logits, batch.targets)
                self.outcomes[edit].add(values)
                self.tallies[edit].add(groups, values)
        self.reasons = sorted(forward.reasons)

    def result(
        self,
        edits: Mapping[str, Edit],
        order: list[Group] | None,
        error: Exception | None,
        process_group: dist.ProcessGroup | None,
    ) -> Sweep:
        share = (self.members, [self.outcomes[edit] for edit in (BASELINE, *edits.values())])
        shares = exchange(process_group, error, share)
        gathered = [Outcomes() for _ in range(1 + len(edits))]
        for _, outcomes in shares:
            for total, part in zip(gathered, outcomes, strict=True):
                total.extend(part)
        metrics = {edit: tally.result(order, None, process_group) for edit, tally in self._in_order(edits)}
        return Sweep(
            metrics[BASELINE],
            {label: metrics[edit] for label, edit in edits.items()},
            tuple(group for members, _ in shares for group in members),
            tuple(self.reasons),
            _name(self.metric),
            dict(zip(edits, gathered[1:], strict=True)),
            gathered[0],
        )

    def _in_order(self, edits: Mapping[str, Edit]) -> list[tuple[Edit, Tally]]:
        """Return the tallies in an order that all ranks share, which a set does not have."""
        return [(edit, self.tallies[edit]) for edit in dict.fromkeys((BASELINE, *edits.values()))]


def _name(metric: Metric) -> str:
    """Return what a metric is called, that of its function where arguments were bound to it."""
    function = metric.func if isinstance(metric, functools.partial) else metric
    return str(getattr(function, "__name__", type(function).__name__))


# Paired statistics


def _is_binary(*arrays: np.ndarray) -> bool:
    return all(bool(((array == 0) | (array == 1)).all()) for array in arrays)


def paired_interval(before: np.ndarray, after: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the mean of after - before, of the same examples.

    For values of 0 and 1, with b examples that rise and c that fall of n: d +- z sqrt((p + q - d^2) / (n + 2)),
    p = (b + 1) / (n + 2), q = (c + 1) / (n + 2), d = p - q. Otherwise mean +- t sd / sqrt(n).

    Args:
        before: values, shape (n,).
        after: values, shape (n,).
        level: the coverage, in (0, 1).

    Source:
        Bonett and Price, 2012.
    """
    n = len(before)
    if _is_binary(before, after):
        rise = (float((after > before).sum()) + 1) / (n + 2)
        fall = (float((after < before).sum()) + 1) / (n + 2)
        d = rise - fall
        half = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((rise + fall - d * d) / (n + 2))
        return max(-1.0, d - half), min(1.0, d + half)
    if n < 2:
        return -math.inf, math.inf
    difference = after - before
    half = student_quantile((1 + level) / 2, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return float(difference.mean()) - half, float(difference.mean()) + half


def paired_p_value(before: np.ndarray, after: np.ndarray) -> float:
    """Return the two-sided p-value of no change between the same examples.

    McNemar's exact test for values of 0 and 1 (binomial in the examples that changed), the paired t-test otherwise.

    Args:
        before: values, shape (n,).
        after: values, shape (n,).

    Source:
        McNemar, 1947.
    """
    if _is_binary(before, after):
        rise, fall = int((after > before).sum()), int((after < before).sum())
        changed = rise + fall
        logs = [
            math.lgamma(changed + 1) - math.lgamma(i + 1) - math.lgamma(changed - i + 1) - changed * math.log(2)
            for i in range(min(rise, fall) + 1)
        ]
        return min(1.0, 2 * math.fsum(map(math.exp, logs)))
    difference = after - before
    if len(difference) < 2 or not difference.any():
        return 1.0
    spread = float(difference.std(ddof=1))
    if spread == 0:
        return 0.0
    t = float(difference.mean()) / (spread / math.sqrt(len(difference)))
    return max(0.0, 2 * (1 - student_cdf(abs(t), len(difference) - 1)))  # to about 1e-15: rounding could pass 0


def student_cdf(t: float, degrees: int) -> float:
    """Return the distribution function of Student's t for a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, in powers of cos(theta)^2,
    theta = atan(t / sqrt(degrees)).
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    steps = np.arange((degrees - 2 - odd) // 2 if degrees > 1 else 0, dtype=float)
    ratios = (2 * steps + 1 + odd) / (2 * steps + 2 + odd)
    series = 1 + float(np.cumprod(ratios * cosine**2).sum())
    if odd:
        series = 2 / math.pi * (theta + (sine * cosine * series if degrees > 1 else 0.0))
        return (1 + series) / 2
    return (1 + sine * series) / 2


@functools.lru_cache
def student_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's t, p in (0.5, 1), by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        if student_cdf(middle, degrees) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2
