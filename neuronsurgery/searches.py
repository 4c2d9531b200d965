"""A beam search over sets of neurons and ways to edit them, by exact sweeps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from torch import Tensor
from torch.nn.functional import softplus

from neuronsurgery.batches import group_members
from neuronsurgery.draws import random_bits
from neuronsurgery.edits import Edit, compose, zero_out
from neuronsurgery.effects import error_probability
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.means import Means
from neuronsurgery.neurons import Neurons
from neuronsurgery.outcomes import Sweep
from neuronsurgery.types import Group

T = TypeVar("T")

Kind: TypeAlias = "Literal['zero', 'mean'] | Callable[[Neurons], Edit]"
"""How a neuron is edited: by `zero_out`, by `mean_out`, or by a function neurons -> edit."""

Objective: TypeAlias = Callable[[Tensor, Tensor, Sequence[Group]], float]
"""(metric of each example before, after, its group) -> how good an edit is: larger is better."""

NUDGE = 1e-3
"""What the rise of log(1 + exp(-m)) counts beside that of the error probability, which is flat far from 1/2."""


class Candidate(NamedTuple):
    """One neuron and how it is edited: the position of the kind among those of the search."""

    kind: int
    layer: Layer
    neuron: int


Chosen: TypeAlias = frozenset[Candidate]


@dataclass(frozen=True, eq=False)
class Kinds:
    """The kinds of edit of a search, and how a set of candidates becomes an edit.

    Attributes:
        kinds: "zero", "mean" or functions of neurons.
        layout: the layers that were searched.
        means: how neurons are held at their means, if that is one of the kinds.
    """

    kinds: tuple[Kind, ...]
    layout: Layout
    means: Means | None

    def edit(self, chosen: Iterable[Candidate]) -> Edit:
        """Return the edit of some candidates, those of a kind together."""
        members = list(chosen)
        edits = []
        for number, kind in enumerate(self.kinds):
            own: dict[Layer, list[int]] = {}
            for candidate in members:
                if candidate.kind == number:
                    own.setdefault(candidate.layer, []).append(candidate.neuron)
            if own:
                edits.append(self._made(kind, Neurons(own)))
        return compose(*edits)

    def _made(self, kind: Kind, neurons: Neurons) -> Edit:
        if kind == "zero":
            return zero_out(neurons)
        if kind == "mean":
            assert self.means is not None  # found where it is one of the kinds
            return self.means.edit(neurons)
        return kind(neurons)

    def name(self, number: int) -> str:
        """Return what a kind is called."""
        kind = self.kinds[number]
        return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)

    def candidates(self) -> Iterator[Candidate]:
        """Yield every neuron with every kind of edit that it can have."""
        for number, kind in enumerate(self.kinds):
            for layer in self.layout:
                if kind != "mean" or (self.means is not None and layer in self.means.holders):
                    yield from (Candidate(number, layer, index) for index in range(layer.count))

    def drawn(self, like: Chosen, key: str) -> Chosen:
        """Return random candidates, as many of each layer and kind as another set has; the key decides which."""
        wanted: dict[Layer, list[int]] = {}
        for candidate in sorted(like, key=lambda c: (c.kind, c.layer.position, c.neuron)):
            wanted.setdefault(candidate.layer, []).append(candidate.kind)
        return frozenset(
            Candidate(kind, layer, int(index))
            for layer, kinds in wanted.items()
            for order in [np.argsort(random_bits(f"{key}\0{layer.key}", layer.count), kind="stable")]
            for kind, index in zip(kinds, order, strict=False)
        )


@dataclass(frozen=True, eq=False)
class Step:
    """One set that a search looked at, with what it does to the examples that it was searched on.

    Attributes:
        neurons: the chosen ones.
        kinds: how each of them is edited, in their order.
        edit: the edit.
        own: the change of the share of the group's examples that are right.
        worst_other: the same of the group to spare that loses most.
        score: the objective.
    """

    neurons: Neurons
    kinds: tuple[str, ...]
    edit: Edit
    own: float
    worst_other: float
    score: float
    chosen: Chosen

    def __repr__(self) -> str:
        named = ", ".join(f"{neuron} {kind}" for neuron, kind in zip(self.neurons, self.kinds, strict=True))
        return f"{named}: {points(self.own)} points, {points(self.worst_other)} elsewhere, where searched"


def points(change: float) -> str:
    """Return a change of a share in points, signed: "-57.1"."""
    return f"{100 * change:+.1f}"


def in_turn(first: Sequence[T], second: Sequence[T]) -> list[T]:
    """Return the entries of two lists, one of each in turn, every one once."""
    length = max(len(first), len(second))
    return list(dict.fromkeys(entry for at in range(length) for part in (first, second) for entry in part[at : at + 1]))


def selective(group: Group, others: Sequence[Group], weight: float) -> Objective:
    """Return the objective J of `find_critical`, ties broken."""
    members_of = functools.lru_cache(maxsize=1)(group_members)  # asked of the same examples for every set

    def objective(before: Tensor, after: Tensor, groups: Sequence[Group]) -> float:
        members = members_of(groups)
        rise = error_probability(after) - error_probability(before)
        own = members[group]
        worst = max(float(rise[members[name]].mean()) for name in others)
        nudge = softplus(-after[own]) - softplus(-before[own])
        return float(rise[own].mean()) - weight * max(0.0, worst) + NUDGE * float(nudge.mean())

    return objective


class Search:
    """A beam search over sets of candidates.

    Attributes:
        scores: the objective of every set that was looked at.
        path: the best set of every size.
    """

    def __init__(
        self,
        made: Kinds,
        group: Group,
        others: Sequence[Group],
        objective: Objective,
        k: int,
        cap: float | None,
        pool: int,
        width: int,
    ) -> None:
        self.scores: dict[Chosen, float] = {}
        self.path: list[Step] = []
        self._changes: dict[Chosen, tuple[float, float]] = {}
        self._made, self._group, self._others = made, group, tuple(others)
        self._objective = objective
        self._k, self._cap, self._pool, self._width = k, cap, pool, width
        self._asked: dict[str, Chosen] = {}

    def parts(self, candidates: Sequence[Candidate]) -> Iterator[dict[str, Edit]]:
        """Yield the edits to sweep for each size in turn, the sets of one size made when the last are known."""
        beam: list[Chosen] = [frozenset()]
        for size in range(1, self._k + 1):
            sets = [one | {c} for one in beam for c in candidates if all(c[1:] != other[1:] for other in one)]
            self._asked = {str(number): chosen for number, chosen in enumerate(dict.fromkeys(sets))}
            if not self._asked:
                return
            yield {label: self._made.edit(chosen) for label, chosen in self._asked.items()}
            ranked = self._ranked(self._asked.values())
            if size == 1:
                candidates = [next(iter(chosen)) for chosen in ranked[: self._pool]]
            beam = ranked[: self._width]
            self.path.append(self._step(beam[0]))

    def _ranked(self, sets: Iterable[Chosen]) -> list[Chosen]:
        """Return sets in the order in which they are worth extending: those within the cap and all, in turn.

        What is over the cap can only be returned if a later neuron undoes the harm; what is within it may be timid.
        """
        ranked = sorted(sets, key=lambda chosen: -self.scores[chosen])
        if self._cap is None:
            return ranked
        return in_turn([chosen for chosen in ranked if self._changes[chosen][1] >= -self._cap], ranked)

    def take(self, swept: Sweep) -> None:
        """Note what the edits of the last part came to."""
        before, members = swept.values(), group_members(swept.members)
        for label in swept.labels:
            chosen, after = self._asked[label], swept.values(label)
            score = self._objective(before, after, swept.members)
            self.scores[chosen] = -math.inf if math.isnan(score) else float(score)
            lost = (after > 0).double() - (before > 0).double()
            worst = min(float(lost[members[name]].mean()) for name in self._others)
            self._changes[chosen] = float(lost[members[self._group]].mean()), worst

    def best(self, size: int) -> Step | None:
        """Return the set of at most so many neurons whose group loses most within the cap; the best, without a cap."""
        looked = [chosen for chosen in self.scores if len(chosen) <= size]
        if self._cap is None:
            best = max(looked, key=lambda chosen: (self.scores[chosen], -len(chosen)))
            return self._step(best) if self.scores[best] > 0 else None
        within = [chosen for chosen in looked if self._changes[chosen][1] >= -self._cap]
        allowed = [chosen for chosen in within if self._changes[chosen][0] < 0]
        if not allowed:
            return None
        return self._step(min(allowed, key=lambda c: (self._changes[c][0], len(c), -self.scores[c])))

    def _step(self, chosen: Chosen) -> Step:
        members = sorted(chosen, key=lambda c: (c.layer.position, c.layer.parameter, c.layer.slicing, c.neuron))
        neurons = Neurons()
        for candidate in members:
            neurons |= Neurons({candidate.layer: [candidate.neuron]})
        kinds = tuple(self._made.name(candidate.kind) for candidate in members)
        own, worst = self._changes[chosen]
        return Step(neurons, kinds, self._made.edit(chosen), own, worst, self.scores[chosen], chosen)
