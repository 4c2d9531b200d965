"""Scores: one number per group and neuron, and what is chosen from them.

Scores are plain data. Where they come from is the business of `magnitudes` (here) and of `gradients`; sets of neurons
are chosen from them by `topk` and `top_fraction`; controls are drawn by `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from neuronsurgery.checks import are_groups, are_integers, is_tensor, make_tuples, refuse, size_of, unfit
from neuronsurgery.copies import readable
from neuronsurgery.discovery import given_layout
from neuronsurgery.draws import checked_seed, random_bits, smallest_tickets
from neuronsurgery.errors import GRADIENTS, LAYOUT, SCORES, checked, counted, listed
from neuronsurgery.layers import Layer, doubtful, is_squared_wide
from neuronsurgery.layouts import Layout
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.results import ByName, same_fields
from neuronsurgery.spread import is_spread, whole
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.types import Group, Per, Where
from neuronsurgery.wrappers import same_names

WORTH_NARROWING = 10_000
"""Of fewer neurons, sorting all of them is faster than finding the least of the largest."""


@dataclass(frozen=True, eq=False, repr=False)
class Scores(ByName[Group, "Scores"]):
    """One number per group and neuron; behaves as a mapping group -> the scores of that group.

    Attributes:
        values: float32, shape (G, M), on the CPU.
        groups: the names of the G groups.
        counts: the number of examples of each group that the scores were computed from; 0 where none were needed.
        layout: the layers, whose flat numbering the columns follow.
        criterion: what the numbers are.

    Raises:
        ValueError: if the shapes do not agree, or an argument is of another type; lists all.

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
        make_tuples(self, "groups", "counts")
        neurons = self.layout.count if isinstance(self.layout, Layout) else 0
        refuse("a value of Scores", self._unfit(neurons), "group_grad_norms, grad_norms and magnitudes make scores")
        expected = (len(self.groups), neurons)
        if self.values.shape != expected or len(self.counts) != len(self.groups):
            raise ValueError(
                f"scores of {len(self.groups)} groups and {neurons} neurons have shape {expected}, not "
                f"{tuple(self.values.shape)}, and as many counts as groups, not {len(self.counts)}"
            )

    def _unfit(self, neurons: int) -> list[str]:
        shape = tuple(getattr(self.values, "shape", ()))
        counted = are_integers(self.counts, size_of(self.counts), 0)
        return [
            *unfit("values", is_tensor(self.values, shape, torch.float32), "a plain float32 tensor", self.values),
            *unfit("groups", are_groups(self.groups), "distinct integers or strings", self.groups),
            *unfit("counts", counted, "integers of at least 0", self.counts),
            *unfit("layout", neurons > 0, "a Layout that has a neuron", self.layout),
            *unfit("criterion", isinstance(self.criterion, str), "what the numbers are", self.criterion),
        ]

    @override
    def _names(self) -> tuple[Group, ...]:
        return self.groups

    @override
    def __getitem__(self, name: Group) -> Scores:
        """Return the scores of one group, by name and never by position.

        Raises:
            KeyError: if there is no such group; lists those there are.
        """
        self.refuse_unknown(name, "group")
        row = self.groups.index(name)
        return Scores(self.values[row : row + 1], (name,), (self.counts[row],), self.layout, self.criterion)

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds a tensor

    def by_layer(self) -> dict[Layer, Tensor]:
        """Return each layer's scores, shape (G, count)."""
        counts = [layer.count for layer in self.layout]
        return dict(zip(self.layout, torch.split(self.values, counts, dim=1), strict=True))

    @override
    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per group and neuron, for any data frame."""
        columns = ("group", "parameter", "pattern", "index", "criterion", "value")
        return [
            dict(zip(columns, (group, layer.parameter, layer.pattern, index, self.criterion, value), strict=True))
            for group, row in zip(self.groups, self.values.tolist(), strict=True)
            for layer, start in self.layout.starts.items()
            for index, value in enumerate(row[start : start + layer.count])
        ]

    @override
    def _shown(self) -> tuple[str, list[str], list[list[str]]]:
        rows = [
            [
                str(group),
                str(count or ""),
                f"{row.max():.4g}",
                str(self.layout.neuron(int(row.argmax()))),
                f"{row.median():.4g}",
            ]
            for group, count, row in zip(self.groups, self.counts, self.values, strict=True)
        ]
        return repr(self).splitlines()[0], ["group", "examples", "largest", "at", "median"], rows

    def __repr__(self) -> str:
        lines = []
        for group, count, row in zip(self.groups, self.counts, self.values, strict=True):
            largest = self.layout.neuron(int(row.argmax()))
            examples = f" ({count} examples)" if count else ""
            lines.append(f"{group}{examples}: largest {row.max():.4g} at {largest}, median {row.median():.4g}")
        said = f"Scores: {self.criterion} of {self.layout.count} neurons in {len(self.layout)} layers"
        return f"{said}\n{listed(lines, 16)}" if lines else said


# Computing


def norms(
    tensors: Mapping[str, Tensor | None], layout: Layout, read: Callable[[str, Tensor], Tensor] | None = None
) -> Tensor:
    """Return the norm of every neuron of a layout, float32, shape (M,), on the CPU; 0 where a tensor is None.

    Args:
        tensors: by the names of the layers.
        layout: the layers.
        read: (name, tensor) -> what to take the norms of. By default the tensor, which is gathered, one at a time, if
            it is spread over processes.
    """
    values = torch.zeros(layout.count, dtype=torch.float32, device="cpu")
    read = read or (lambda name, tensor: whole(tensor))
    given = [
        (layer, at, t.detach()) for layer, at in layout.starts.items() if (t := tensors[layer.parameter]) is not None
    ]
    for layer, start, tensor in given:
        values[start : start + layer.count] = layer.lengths(read(layer.parameter, tensor))
    for layer, start, tensor in given:
        if is_squared_wide(tensor):
            continue
        index = doubtful(values[start : start + layer.count]).nonzero().flatten()
        if len(index):
            own = read(layer.parameter, tensor)
            values[start + index] = layer.safe_lengths(own, index.to(own.device)).float().cpu()
    return values


def refuse_non_finite(values: Tensor, layout: Layout, what: str) -> None:
    """Raise if a row of scores has a NaN or an infinity; names the layers and how many neurons of each.

    Raises:
        ValueError: if it has.
    """
    if torch.isfinite(values).all():
        return
    wrong = []
    for layer, start in layout.starts.items():
        number = int((~torch.isfinite(values[start : start + layer.count])).sum())
        if number:
            wrong.append(f"{layer.parameter}: {number} of {layer.count} neurons")
    raise ValueError(
        f"{what} NaN or infinite in {len(wrong)} layers:\n{listed(wrong)}\nFind the example or the step of training "
        f"that made it so, or leave these layers out with where="
    )


def magnitudes(
    model: nn.Module,
    *,
    layout: Layout | None = None,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
) -> Scores:
    """Return the magnitude of every neuron, ||z_i||_2, as the scores of one group named "all".

    Args:
        model: any module; not changed.
        layout: the layers to score, see `find_layout`; `where` and `extra` are the short way to one.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.

    Returns:
        Scores of shape (1, M).

    Raises:
        KeyError: if a glob matches nothing.
        ValueError: if there is no layer, the layout does not fit the model, or a weight is NaN or infinite; names the
            layers.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> magnitudes(model).values.tolist()
        [[5.0, 2.0]]

    Source:
        You et al., "The Silent Majority", 2025.
    """
    surveyed = survey(model)
    values = readable(surveyed)
    layout = given_layout(surveyed, values, layout, where, extra)
    first = surveyed.first_names(layer.parameter for layer in layout)

    def read(name: str, weight: Tensor) -> Tensor:
        gathered = surveyed.gathered.get(first[name])
        return whole(weight) if gathered is None else gathered.after_steps(whole(weight))  # a view's are edits

    lengths = norms(by_layout(values, layout, surveyed), layout, read)
    refuse_non_finite(lengths, layout, "the model's weights are")
    return Scores(lengths[None], ("all",), (0,), layout, "magnitude")


def grad_norms(gradients: Mapping[str, Tensor | None], layout: Layout) -> Scores:
    """Return the norms ||g_i||_2 of every neuron's slice of gradients that the caller has already, group "all".

    Args:
        gradients: a gradient per layer, of the parameter's shape, by any of its names, with the prefixes of wrappers or
            without: for instance `{name: p.grad for name, p in model.named_parameters()}`. None counts as zero; other
            entries are ignored.
        layout: the layers to score, see `find_layout`.

    Returns:
        Scores of shape (1, M).

    Raises:
        TypeError: if the gradients are no mapping, or the layout is none.
        ValueError: if a layer has no entry, one of another shape (lists all), or a gradient is NaN or
            infinite.

    Example:
        >>> from neuronsurgery import find_layout
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> grad_norms({"weight": model.weight.grad}, find_layout(model)).values
        tensor([[5., 5.]])
    """
    first = [layer.parameter for layer in checked(layout, Layout, LAYOUT)]
    every = (same_names(names, checked(gradients, Mapping, GRADIENTS)) for names in (first, layout.names))
    keys = {layout[name].parameter: key for found in every for name, key in found.items() if key is not None}
    named: dict[str, Tensor | None] = {}
    wrong = []
    for layer in layout:
        if layer.parameter not in keys:
            wrong.append(f"{layer.parameter}: no gradient given")
            continue
        gradient = gradients[keys[layer.parameter]]
        named[layer.parameter] = gradient if gradient is None or is_spread(gradient) else gradient.to_dense()
        if gradient is not None and tuple(gradient.shape) != layer.shape:
            wrong.append(f"{layer.parameter}: expected shape {layer.shape}, given {tuple(gradient.shape)}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} layers of the layout have no fitting gradient:\n{listed(wrong)}\nGive one entry per layer, "
            f"or make the layout smaller with where="
        )
    values = norms(named, layout)
    refuse_non_finite(values, layout, "the gradients are")
    return Scores(values[None], ("all",), (0,), layout, "gradient norm")


def by_layout(values: Mapping[str, Tensor], layout: Layout, surveyed: Survey) -> dict[str, Tensor]:
    """Return values by first name by the names that a layout of the model uses, others of a tied tensor perhaps."""
    return {name: values[known] for name, known in surveyed.first_names(layer.parameter for layer in layout).items()}


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
    if per == "model" and k > checked(scores, Scores, SCORES).layout.count:
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
    if not isinstance(fraction, int | float | np.number) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}: 0.01 % is 1e-4")
    return _largest(scores, lambda count: max(1, round(fraction * count)), per)


def _largest(scores: Scores, share: Callable[[int], int], per: Per) -> Neurons:
    if per not in ("model", "layer"):
        raise ValueError(f"per must be 'model' or 'layer', not {per!r}")
    layout = checked(scores, Scores, SCORES).layout
    if per == "model" and len(layout.kinds) > 1:
        found = ", ".join(f"{kind} ({counted(number, 'layer')})" for kind, number in layout.kinds.items())
        raise ValueError(
            f"the layout mixes neurons of several kinds: {found}. The largest of all would be those of the largest "
            f"kind: choose per='layer', or score one kind at a time"
        )
    spans = [(start, layer.count) for layer, start in layout.starts.items()] if per == "layer" else [(0, layout.count)]
    chosen = (
        start + _first_largest(row[start : start + count], min(share(count), count))
        for row in scores.values
        for start, count in spans
        if count
    )
    marked = torch.zeros(layout.count, dtype=torch.bool, device="cpu")
    for indices in chosen:
        marked[indices.cpu()] = True
    return layout.neurons(marked.nonzero().flatten().tolist())


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values, in any order, ties to the lower index, NaN being the largest."""
    if len(values) < WORTH_NARROWING:
        return values.sort(descending=True, stable=True).indices[:k]
    place = len(values) - k
    least = np.partition(values.detach().cpu().numpy(), place)[place]  # NaN comes last
    tied = values.isnan() if np.isnan(least) else values == float(least)
    larger = values.new_zeros(len(values), dtype=torch.bool) if np.isnan(least) else ~(values <= float(least))
    above = larger.nonzero().flatten()
    return torch.cat([above, tied.nonzero().flatten()[: k - len(above)]])


def sample(population: Layout | Neurons, k: int, *, seed: int = 0, exclude: Neurons | None = None) -> Neurons:
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
        >>> few, many = sample(layout, 3), sample(layout, 9)
        >>> len(few & many)
        3
    """
    if isinstance(population, Layout):
        population = population.neurons(range(population.count))
    checked(population, Neurons, "sample draws from a Layout or from Neurons, not from a {}: write find_layout(model)")
    seed = checked_seed(seed)
    left = population - checked_neurons(exclude, "exclude=") if exclude is not None else population
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(left):
        raise ValueError(f"k must be an integer from 1 to the {len(left)} neurons there are to draw from, not {k!r}")
    # Every neuron has a random number of its own; the k smallest are drawn.
    tickets = [
        random_bits(f"sample\0{seed}\0{layer.key}", layer.count)[list(indices)]
        for layer, indices in left.by_layer().items()
    ]
    return left.where(smallest_tickets(np.concatenate(tickets), int(k)))
