"""Scores of neurons, and how to choose by them.

A `Scores` has one row of numbers per group, one number per neuron of a layout. Sets of neurons are chosen from it by
`topk` and `top_fraction`; controls are drawn by `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from neuronsurgery.neurons import Layer, Layout, Neurons, Where, find_layout, layer_tensors, random_bits
from neuronsurgery.structure import plain
from neuronsurgery.types import Group

Per: TypeAlias = Literal["model", "layer"]


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """One number per group and neuron.

    Attributes:
        values: float32, shape (G, M), on the CPU.
        groups: the names of the G groups.
        counts: the number of examples of each group that the scores were computed from; 0 where none were needed.
        layout: the layers, whose flat numbering the columns follow.
        criterion: what the numbers are.

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> scores = magnitudes(nn.Linear(2, 3, bias=False))
        >>> scores.values.shape, scores.groups
        (torch.Size([1, 3]), ('all',))
    """

    values: Tensor
    groups: tuple[Group, ...]
    counts: tuple[int, ...]
    layout: Layout
    criterion: str

    def __post_init__(self) -> None:
        expected = (len(self.groups), self.layout.count)
        if self.values.shape != expected or len(self.counts) != len(self.groups):
            raise ValueError(
                f"scores of {len(self.groups)} groups and {self.layout.count} neurons have shape {expected}, not "
                f"{tuple(self.values.shape)}, and as many counts as groups, not {len(self.counts)}"
            )

    def __getitem__(self, group: Group) -> Scores:
        """Return the scores of one group, by name and never by position.

        Raises:
            KeyError: if there is no such group; lists those there are.
        """
        row = self._row(group)
        return Scores(self.values[row : row + 1], (group,), (self.counts[row],), self.layout, self.criterion)

    def _row(self, group: Group) -> int:
        if group not in self.groups:
            raise KeyError(f"no group {group!r}; there are {', '.join(map(repr, self.groups))}")
        return self.groups.index(group)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scores):
            return NotImplemented
        mine = (self.groups, self.counts, self.layout, self.criterion)
        theirs = (other.groups, other.counts, other.layout, other.criterion)
        return mine == theirs and torch.equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]  # holds a tensor

    def by_layer(self) -> dict[str, Tensor]:
        """Return each layer's scores, shape (G, count)."""
        counts = [layer.count for layer in self.layout]
        return dict(zip(self.layout.starts, torch.split(self.values, counts, dim=1), strict=True))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per group and neuron, for any data frame."""
        return [
            {"group": group, "parameter": layer.parameter, "index": index, "criterion": self.criterion, "value": value}
            for group, row in zip(self.groups, self.values.tolist(), strict=True)
            for layer in self.layout
            for index, value in enumerate(row[self.layout.starts[layer.parameter] :][: layer.count])
        ]

    def __repr__(self) -> str:
        lines = [f"Scores: {self.criterion} of {self.layout.count} neurons in {len(self.layout)} layers"]
        for group, count, row in list(zip(self.groups, self.counts, self.values, strict=True))[:16]:
            largest = self.layout.neuron(int(row.argmax()))
            examples = f" ({count} examples)" if count else ""
            lines.append(f"  {group}{examples}: largest {row.max():.4g} at {largest}, median {row.median():.4g}")
        if len(self.groups) > 16:
            lines.append(f"  ... {len(self.groups) - 16} more groups")
        return "\n".join(lines)


def row_norms(layer: Layer, tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of each neuron's slice of a tensor, shape (count,), in float32 or wider.

    Rows are scaled by their largest entry first: gradients of a confident model are so small that their squares
    vanish in float32, and with them the ranking.
    """
    rows = layer.rows(tensor.detach()).reshape(layer.count, -1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(dim=1)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    lengths: Tensor = torch.linalg.vector_norm(rows / safe[:, None], dim=1)
    return lengths * safe


def norms(tensors: Mapping[str, Tensor | None], layout: Layout) -> Tensor:
    """Return the norm of every neuron of a layout, float32, shape (M,), on the CPU; 0 where a tensor is None."""
    values = torch.zeros(layout.count, dtype=torch.float32, device="cpu")
    for layer in layout:
        tensor = tensors[layer.parameter]
        if tensor is not None:
            start = layout.starts[layer.parameter]
            values[start : start + layer.count] = row_norms(layer, tensor).float().cpu()
    return values


def refuse_non_finite(values: Tensor, layout: Layout, what: str) -> None:
    """Raise if a row of scores has a NaN or an infinity; names the layers and how many neurons of each.

    Raises:
        ValueError: if it has.
    """
    if torch.isfinite(values).all():
        return
    wrong = []
    for layer in layout:
        start = layout.starts[layer.parameter]
        number = int((~torch.isfinite(values[start : start + layer.count])).sum())
        if number:
            wrong.append(f"  {layer.parameter}: {number} of {layer.count} neurons")
    more = [f"  ... and {len(wrong) - 10} more layers"] if len(wrong) > 10 else []
    raise ValueError(
        f"{what} NaN or infinite in {len(wrong)} layers:\n"
        + "\n".join([*wrong[:10], *more])
        + "\nFind the example or the step of training that made it so, or leave these layers out with where="
    )


def magnitudes(model: nn.Module, where: Where | None = None, extra: str | Sequence[str] | None = None) -> Scores:
    """Return the magnitude of every neuron, ||z_i||_2, as the scores of one group named "all".

    Args:
        model: any module; not changed.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.

    Returns:
        Scores of shape (1, M).

    Raises:
        KeyError: if a glob matches nothing.
        ValueError: if there is no layer, or a weight is NaN or infinite; names the layers.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> magnitudes(model).values.tolist()
        [[5.0, 2.0]]

    Source:
        You et al., "The Silent Majority", 2025.
    """
    layout = find_layout(model, where, extra)
    values = norms(layer_tensors(plain(model), layout), layout)
    refuse_non_finite(values, layout, "the model's weights are")
    return Scores(values[None], ("all",), (0,), layout, "magnitude")


# Choosing


def topk(scores: Scores, k: int, per: Per = "model") -> Neurons:
    """Return the union over the scores' groups of each group's k largest neurons.

    Ties go to the lower flat number.

    Args:
        scores: of one group or several; `topk(scores[group], k)` is the paper's set for one group.
        k: how many per group, at least 1.
        per: "model" takes the k largest of the whole model, "layer" of each layer (all of a layer that has fewer).

    Raises:
        ValueError: if k is less than 1, or larger than the model with `per="model"`, or `per` is unknown.

    Example:
        >>> scores = magnitudes(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> len(topk(scores, 3)), len(topk(scores, 3, per="layer"))
        (3, 5)

    Source:
        You et al., "The Silent Majority", 2025 (top-1/2/3 in the whole model and within a layer).
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, not {k!r}")
    if per == "model" and k > scores.layout.count:
        raise ValueError(f"k = {k} is more than the {scores.layout.count} neurons of the model: choose fewer")
    return _largest(scores, lambda count: min(int(k), count), per)


def top_fraction(scores: Scores, fraction: float, per: Per = "model") -> Neurons:
    """Return the union over the scores' groups of each group's largest share of neurons, max(1, round(fraction * M)).

    Ties go to the lower flat number.

    Args:
        scores: of one group or several.
        fraction: in (0, 1]; the paper's 0.01 % is 1e-4.
        per: "model" takes the share of the whole model, "layer" of each layer.

    Raises:
        ValueError: if `fraction` is not in (0, 1], or `per` is unknown.

    Example:
        >>> len(top_fraction(magnitudes(nn.Linear(4, 8)), 0.25))
        2

    Source:
        You et al., "The Silent Majority", 2025.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}: 0.01 % is 1e-4")
    return _largest(scores, lambda count: max(1, round(fraction * count)), per)


def _largest(scores: Scores, share: Callable[[int], int], per: Per) -> Neurons:
    if per not in ("model", "layer"):
        raise ValueError(f"per must be 'model' or 'layer', not {per!r}")
    total = scores.layout.count
    spans = [(0, total)]
    if per == "layer":
        spans = [(scores.layout.starts[layer.parameter], layer.count) for layer in scores.layout]
    chosen: set[int] = set()
    for row in scores.values:
        for start, count in spans:
            # A stable sort, since torch.topk says nothing of ties.
            order = row[start : start + count].sort(descending=True, stable=True).indices
            chosen.update((order[: share(count)] + start).tolist())
    return scores.layout.neurons(chosen)


def sample(population: Layout | Neurons, k: int, seed: int, exclude: Neurons | None = None) -> Neurons:
    """Return k neurons drawn at random without replacement: the control group.

    The draw depends on the seed and the neurons' names alone; of one population and seed, a smaller sample is a part of
    a larger one.

    Args:
        population: the layout, or a set to draw from (all neurons of some layers: the same-layer control).
        k: how many, at least 1.
        seed: an integer of at least 0.
        exclude: neurons never drawn.

    Raises:
        TypeError: if the population is neither a layout nor a set of neurons.
        ValueError: if k is less than 1 or more than there are to draw from, or the seed is negative.

    Example:
        >>> from neuronsurgery import find_layout
        >>> layout = find_layout(nn.Linear(4, 100))
        >>> few, many = sample(layout, 3, seed=0), sample(layout, 9, seed=0)
        >>> len(few & many)
        3
    """
    if isinstance(population, Layout):
        population = population.neurons(range(population.count))
    if not isinstance(population, Neurons):
        raise TypeError(f"sample draws from a Layout or from Neurons, not from a {type(population).__name__}")
    seed = checked_seed(seed)
    left = population - exclude if exclude is not None else population
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(left):
        raise ValueError(f"k must be an integer from 1 to the {len(left)} neurons there are to draw from, not {k!r}")
    # Every neuron has a random number of its own; the k smallest are drawn.
    ticket = np.concatenate(
        [
            random_bits(f"sample\0{seed}\0{part.layer.parameter}", part.layer.count)[list(part.indices)]
            for part in left.parts
        ]
    )
    drawn = np.zeros(len(left), dtype=bool)
    drawn[np.argsort(ticket, kind="stable")[:k]] = True
    return left.where(drawn)


def checked_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        ValueError: if it is not an integer of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, not {seed!r}")
    return int(seed)


def ranks(scores: Scores, of: Neurons) -> Tensor:
    """Return where some neurons rank among all, as percentiles in (0, 100], 100 the largest.

    The percentile of a neuron is the share of all neurons that score no more than it does.

    Args:
        scores: of G groups.
        of: the neurons.

    Returns:
        float64, shape (G, len(of)), columns in the order of `of`.

    Raises:
        ValueError: if a neuron is not in the scores' layout.

    Example:
        >>> scores = magnitudes(nn.Linear(4, 8))
        >>> ranks(scores, of=topk(scores, 1)).tolist()
        [[100.0]]

    Source:
        You et al., "The Silent Majority", 2025 (the two histograms).
    """
    columns = scores.layout.flat(of)
    ordered = scores.values.sort(dim=1).values
    no_more = torch.searchsorted(ordered, scores.values[:, columns].contiguous(), right=True)
    return 100.0 * no_more.double() / scores.layout.count


def contrast(scores: Scores, of: Group, against: Group) -> Scores:
    """Return log((a + eps) / (b + eps)) of two groups' scores, eps = 1e-12 of the largest of both.

    Args:
        scores: of at least these two groups, none negative.
        of: the group a.
        against: the group b.

    Returns:
        Scores of one group named "a / b".

    Raises:
        KeyError: if there is no such group.

    Example:
        >>> scores = magnitudes(nn.Linear(4, 8))
        >>> contrast(scores, of="all", against="all").values.abs().max().item()
        0.0
    """
    a, b = scores[of].values.double(), scores[against].values.double()
    eps = 1e-12 * torch.maximum(a.max(), b.max())
    if eps == 0:
        eps = torch.ones((), dtype=torch.float64, device="cpu")  # all scores are zero: no contrast anywhere
    values = torch.log((a + eps) / (b + eps)).float()
    count = scores[of].counts[0] + scores[against].counts[0]
    return Scores(values, (f"{of} / {against}",), (count,), scores.layout, f"log contrast of {scores.criterion}")


def overlap(a: Neurons, b: Neurons) -> float:
    """Return the Jaccard index |a & b| / |a | b| of two sets of neurons; 1 for two empty ones.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> layout = find_layout(nn.Linear(2, 4))
        >>> overlap(select(layout, {"weight": (0, 1)}), select(layout, {"weight": (1, 2)}))
        0.3333333333333333

    Source:
        Jaccard, 1901.
    """
    united = len(a | b)
    return len(a & b) / united if united else 1.0
