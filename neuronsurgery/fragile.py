"""Which examples a network remembers instead of understanding, found by cutting it and without group labels.

In a residual network the skip paths alone are a shallower classifier: they keep what was learnt first and most cheaply.
`graph.residual` says which layers end the branches beside them. Once the last of these are cut, the examples that only
they held right are those with the smallest margins: `fragility` ranks the examples of each class by it, and
`infer_groups` draws the line. Neither looks at a group label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.checks import are_integers, are_numbers, is_tensor, make_tuples, refuse, size_of, unfit
from neuronsurgery.errors import first, inline, listed, warn
from neuronsurgery.outcomes import Sweep
from neuronsurgery.results import Table, same_fields

Score: TypeAlias = Literal["margin", "flips"]
"""How fragility is scored: by the margins that remain, or by the predictions that change."""

ROUNDING = 1e-6
"""A spread that is smaller, relative to the largest value, is what float32 leaves of a constant."""

SMALLEST_CELL = 3
"""Of fewer examples, nothing can be said."""


# Scores


def fragility(sweep_or_values: Sweep | Tensor, targets: Tensor, *, score: Score = "margin") -> Tensor:
    """Return how little of each example survives some edits, float64, shape (N,), on the CPU; higher is more fragile.

    For one edit: minus the margin that remains, so compare examples of one class only. For E edits, so that none
    outweighs the others, each is centred and scaled within the class c of the example:

        - (1 / E) sum_e (m_e(x) - median_c(m_e)) / IQR_c(m_e)

    An edit whose margins have no spread within a class (an IQR of 0, to rounding) counts 0 there. For "flips", the
    share of the edits that turn the example from right to wrong or back; with two classes, that change its prediction.

    By how much a margin falls is not offered: examples with a large margin have more to lose, and those that are
    remembered need not be among them.

    Args:
        sweep_or_values: a `Sweep` with `metric=margin`, or with a metric of your own that is above 0 where an example
            is right, and `larger_is_better=True`; or, for "margin", the remaining margins, float, shape (E, N).
        targets: class indices, int, shape (N,), in the order of the sweep's values: that of the loaders, one after the
            other where they are a mapping (`sweep.members` says the group of each).
        score: "margin" or "flips".

    Raises:
        TypeError: if the first argument is neither a sweep nor a tensor, or the targets are not integers.
        ValueError: if the shapes do not fit, there is no edit, a margin is not finite, the sweep's metric is no
            margin (larger is not known to be better, or all values are 0 or 1), "flips" is asked of a tensor, or the
            score is unknown.

    Example:
        >>> remaining = torch.tensor([[2.0, 2.5, -1.0, 1.5, 0.5]])
        >>> fragility(remaining, torch.tensor([0, 0, 0, 1, 1]))
        tensor([-2.0000, -2.5000,  1.0000, -1.5000, -0.5000], dtype=torch.float64)
    """
    if score not in ("margin", "flips"):
        raise ValueError(f"score is 'margin' or 'flips', not {score!r}")
    edits, examples = _refuse_unfit(sweep_or_values, score)
    classes = _class_indices(targets, examples)
    was_right = sweep_or_values.values() > 0 if isinstance(sweep_or_values, Sweep) else None
    total = torch.zeros(examples, dtype=torch.float64, device="cpu")
    for edit in range(edits):
        remaining = _remaining(sweep_or_values, edit)
        _refuse_non_finite(remaining, f"under edit {edit} of {edits}")
        if score == "flips":
            total += (remaining > 0) != was_right
        else:
            total -= remaining if edits == 1 else _standardised(remaining, classes)
    return total / edits


def _refuse_unfit(given: Sweep | Tensor, score: Score) -> tuple[int, int]:
    """Return the number of edits and of examples, or raise where there are no margins to read."""
    if isinstance(given, Sweep):
        if not given.labels:
            raise ValueError("the sweep has no edits: give it at least one, e.g. the last residual branch zeroed")
        if given.baseline.larger_is_better is not True or given.is_binary:
            why = "whose values are all 0 or 1" if given.is_binary else "of which larger is not known to be better"
            raise ValueError(
                f"the sweep was run with the metric '{given.metric}', {why}, so it is no margin: run it with "
                f"metric=margin, or with a margin of your own and larger_is_better=True"
            )
        return len(given.labels), len(given.members)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"fragility takes a Sweep or a tensor of margins (edit, example), not {type(given).__name__}: write "
            f"fragility(sweep(model, edits, loaders, metric=margin), targets)"
        )
    if given.dim() != 2 or len(given) == 0:
        found = tuple(given.shape)
        raise ValueError(f"margins have shape (edits, examples), not {found}: for one edit write values[None]")
    if score == "flips":
        raise ValueError("flips need the margins under no edit, which a tensor does not have: pass the Sweep")
    return len(given), given.shape[1]


def _remaining(given: Sweep | Tensor, edit: int) -> Tensor:
    """Return the margins under one edit, float64: one at a time, since hundreds of them may not fit into memory."""
    return given.values(given.labels[edit]) if isinstance(given, Sweep) else given[edit].detach().double().cpu()


def _class_indices(targets: Tensor, count: int) -> Tensor:
    """Return the targets as int64, shape (count,), on the CPU."""
    if not isinstance(targets, Tensor | np.ndarray | list | tuple):
        raise TypeError(f"targets are a tensor of class indices, one per example, not a {type(targets).__name__}")
    classes = torch.as_tensor(targets, device="cpu").detach()
    if classes.is_floating_point() or classes.is_complex():
        raise TypeError(f"targets are class indices (int), not {classes.dtype}: pass the argmax of probabilities")
    if classes.shape != (count,):
        raise ValueError(
            f"{count} examples need targets of shape ({count},), not {tuple(classes.shape)}: one class per example, in "
            f"the order of the values"
        )
    return classes.long()


def _refuse_non_finite(values: Tensor, where: str) -> None:
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(values)} values {where} are NaN or infinite, and have no rank: edit less")


def _standardised(values: Tensor, classes: Tensor) -> Tensor:
    """Return the values of one edit minus the median of their class, in units of its interquartile range."""
    result = torch.zeros_like(values)
    for position in torch.unique(classes):
        of_class = classes == position
        part = values[of_class]
        low, median, high = _quantiles(part, 0.25, 0.5, 0.75)
        if high - low > ROUNDING * float(part.abs().max()):
            result[of_class] = (part - median) / (high - low)
    return result


def _quantiles(values: Tensor, *at: float) -> list[float]:
    # numpy's: torch.quantile refuses more than 16 million values.
    return [float(quantile) for quantile in np.quantile(values.numpy(), at)]


# Groups


@dataclass(frozen=True, eq=False, repr=False)
class InferredGroups(Table):
    """Classes split into examples that are fragile and examples that are not.

    Attributes:
        groups: int64, shape (N,): 2 * (position of the class in `classes`) + (1 if fragile).
        fragile: bool, shape (N,).
        classes: the classes, ascending.
        counts: the number of examples of each class that are (not fragile, fragile).
        thresholds: of each class; fragile is what lies above.

    Raises:
        ValueError: if the groups are not what the classes, `fragile` and the counts say, or an argument is of another
            type; lists all.

    Example:
        >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 7.0, 8.0, 9.0])
        >>> infer_groups(scores, torch.zeros(9).long(), rule=1 / 3).groups
        tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    """

    groups: Tensor
    fragile: Tensor
    classes: tuple[int, ...]
    counts: tuple[tuple[int, int], ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        make_tuples(self, "classes", "counts", "thresholds")
        refuse("a value of InferredGroups", self._unfit(), "infer_groups makes inferred groups")

    def _unfit(self) -> list[str]:
        size, classes, examples = size_of(self.classes), self.classes, size_of(self.groups)
        pairs = isinstance(self.counts, tuple) and all(are_integers(pair, 2, 0) for pair in self.counts)
        bounds = are_numbers(self.thresholds, size) and not any(map(math.isnan, self.thresholds))
        ascending = are_integers(classes, size) and list(classes) == sorted(set(classes))
        wrong = [
            *unfit("groups", is_tensor(self.groups, (examples,), torch.int64), "int64, one per example", self.groups),
            *unfit("fragile", is_tensor(self.fragile, (examples,), torch.bool), f"bool, ({examples},)", self.fragile),
            *unfit("classes", ascending, "ascending integers", classes),
            *unfit("counts", pairs and len(self.counts) == size, f"{size} pairs of integers", self.counts),
            *unfit("thresholds", bounds, f"{size} numbers, none of them NaN", self.thresholds),
        ]
        if not wrong:
            cells = torch.tensor(self.counts, dtype=torch.int64, device="cpu").flatten().tolist()
            same = bool((self.groups % 2 == self.fragile).all()) and _counted(self.groups, 2 * size) == cells
            wrong = unfit("groups", same, f"2 * place of the class + fragile, {self.counts} of them", self.groups)
        return wrong

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    @override
    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per inferred group, for any data frame."""
        rows = zip(self.classes, self.counts, self.thresholds, strict=True)
        return [
            {"group": 2 * i + fragile, "class": c, "fragile": bool(fragile), "count": counts[fragile], "threshold": at}
            for i, (c, counts, at) in enumerate(rows)
            for fragile in (0, 1)
        ]

    def __repr__(self) -> str:
        rows = zip(self.classes, self.counts, self.thresholds, strict=True)
        lines = listed(
            (f"class {c}: {own} of {others + own} fragile (above {at:.4g})" for c, (others, own), at in rows), 18
        )
        return f"InferredGroups of {len(self.groups)} examples, {int(self.fragile.sum())} fragile\n{lines}"


def _counted(groups: Tensor, number: int) -> list[int] | None:
    """Return how many examples are in each of so many groups, or None where one is in another."""
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < number:
        return None
    counts: list[int] = groups.cpu().bincount(minlength=number).tolist()
    return counts


def infer_groups(fragility: Tensor, targets: Tensor, rule: Literal["tukey"] | float = "tukey") -> InferredGroups:
    """Return class x fragile as groups: who stands out within a class by its score.

    By Tukey's fence, an example is fragile if its score lies above Q3 + 1.5 (Q3 - Q1) of its class (quartiles with
    linear interpolation). A number instead is the share of each class to take: the max(1, round(share * n)) highest
    scores of its n examples, less those that tie with the next one.

    Args:
        fragility: one score per example, float, shape (N,), higher is more fragile: see `fragility`.
        targets: class indices, int, shape (N,).
        rule: "tukey", or a share in (0, 1).

    Returns:
        The groups, with their counts and thresholds.

    Warns:
        UserWarning: if the scores of a class of 3 examples or more are constant (to rounding): the edit left the
            network blind.

    Raises:
        TypeError: if the scores or targets are no tensor, or the targets are not integers.
        ValueError: if the shapes do not fit, a score is not finite, the rule is unknown, or a group would have fewer
            than 3 examples: lists all of these.

    Example:
        >>> scores = torch.cat([torch.linspace(-1, 1, 20), torch.tensor([8.0, 9.0, 9.5])])
        >>> infer_groups(scores, torch.zeros(23).long())
        InferredGroups of 23 examples, 3 fragile
          class 0: 3 of 23 fragile (above 2.474)

    Source:
        Tukey, "Exploratory Data Analysis", 1977 (the fence).
    """
    if rule != "tukey" and (not isinstance(rule, float) or not 0 < rule < 1):
        raise ValueError(f"rule is 'tukey' or a share of each class in (0, 1), not {rule!r}")
    if not isinstance(fragility, Tensor | np.ndarray | list | tuple):
        raise TypeError(
            f"infer_groups takes what fragility(sweep, targets) returns, one score per example, not a "
            f"{type(fragility).__name__}"
        )
    scores = torch.as_tensor(fragility, device="cpu").detach().double()
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"fragility is one score per example, shape (N,), not {tuple(scores.shape)}")
    _refuse_non_finite(scores, "of the fragility")
    positions = _class_indices(targets, len(scores))
    classes = torch.unique(positions)
    parts = [scores[positions == position] for position in classes]
    _warn_of_constants(classes, parts)
    thresholds = [fence(part) if rule == "tukey" else _share(part, float(rule)) for part in parts]
    above = [int((part > at).sum()) for part, at in zip(parts, thresholds, strict=True)]
    counts = [(len(part) - fragile, fragile) for part, fragile in zip(parts, above, strict=True)]
    _refuse_small_cells(classes, counts)
    at = torch.searchsorted(classes, positions)
    fragile = scores > torch.tensor(thresholds, dtype=torch.float64, device="cpu")[at]
    return InferredGroups(2 * at + fragile, fragile, tuple(classes.tolist()), tuple(counts), tuple(thresholds))


def fence(scores: Tensor) -> float:
    """Return Tukey's upper fence, Q3 + 1.5 (Q3 - Q1), of scores: float64 on the CPU, shape (N,)."""
    low, high = _quantiles(scores, 0.25, 0.75)
    return high + 1.5 * (high - low)


def _share(scores: Tensor, share: float) -> float:
    """Return the highest score that is not to be taken."""
    taken = min(max(1, round(share * len(scores))), len(scores) - 1)
    return float(scores.sort(descending=True).values[taken])


def _warn_of_constants(classes: Tensor, parts: list[Tensor]) -> None:
    constant = [
        str(int(position))
        for position, part in zip(classes, parts, strict=True)
        if len(part) >= SMALLEST_CELL and float(part.max() - part.min()) <= ROUNDING * float(part.abs().max())
    ]
    if constant:
        warn(
            f"the scores of class {inline(constant, 10)} are constant: the edit left nothing of the input (in a "
            f"network without skip connections any whole layer does), so no example stands out. Cut less"
        )


def _refuse_small_cells(classes: Tensor, counts: list[tuple[int, int]]) -> None:
    small = [
        f"class {int(position)} has {cell} examples that are{' not' * (not fragile)} fragile"
        for position, cells in zip(classes, counts, strict=True)
        for fragile, cell in enumerate(cells)
        if cell < SMALLEST_CELL
    ]
    if small:
        raise ValueError(
            f"a group needs {SMALLEST_CELL} examples or more, but {'; '.join(first(small, 5))}. Where nobody stands "
            f"out, there may be no shortcut that is simpler than the class: look at the scores before you take a fixed "
            f"share of each class with rule=0.05"
        )
