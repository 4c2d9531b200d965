"""A beam search over sets of neurons and ways to edit them, by exact sweeps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
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
from neuronsurgery.sweeps import Part
from neuronsurgery.types import Group, Loaders

T = TypeVar("T")

Kind: TypeAlias = "Literal['zero', 'mean'] | Callable[[Neurons], Edit]"
"""How a neuron is edited: by `zero_out`, by `mean_out`, or by a function neurons -> edit."""

Objective: TypeAlias = Callable[[Tensor, Tensor, Sequence[Group]], float]
"""(metric of each example before, after, its group) -> how good an edit is: larger is better."""

LEADERS = 8
"""So many sets of a size are run on all examples first: what they come to is what the others have to reach."""

ROUNDING = 1e-9
"""Sums of the same numbers in another order differ by less."""

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
        worst = max((float(rise[members[name]].mean()) for name in others), default=0.0)
        nudge = softplus(-after[own]) - softplus(-before[own])
        return float(rise[own].mean()) - weight * max(0.0, worst) + NUDGE * float(nudge.mean())

    return objective


class Measured(NamedTuple):
    """The metric of some examples without and with an edit, float64, shape (n,), and the groups of these."""

    before: Tensor
    after: Tensor
    groups: tuple[Group, ...]

    def joined(self, more: Measured) -> Measured:
        """Return these examples and some more."""
        before, after = torch.cat([self.before, more.before]), torch.cat([self.after, more.after])
        return Measured(before, after, self.groups + more.groups)

    def gains(self) -> dict[Group, float]:
        """Return by group the change of the share of examples that are right."""
        return self._means((self.after > 0).double() - (self.before > 0).double())

    def rises(self) -> dict[Group, float]:
        """Return by group the change of the error probability."""
        return self._means(error_probability(self.after) - error_probability(self.before))

    def _means(self, values: Tensor) -> dict[Group, float]:
        return {name: float(values[own].mean()) for name, own in group_members(self.groups).items()}


@dataclass(frozen=True, eq=False)
class Race:
    """How a search leaves a set alone once it can no longer matter: it finds what it would have found without.

    What a set does to its own group bounds how good it can be, since what it does to others only counts against it. So
    the group comes first. Then a few sets are run on all others, and the rest for as long as they may still be better.

    Attributes:
        own: the examples of the group.
        rest: those of the groups to spare.
        weight: of the objective, see `selective`.
        harm: by candidate the predicted rise of the error probability of the group that suffers most.
    """

    own: Loaders
    rest: Loaders
    weight: float
    harm: Mapping[Candidate, float]


class Needed(NamedTuple):
    """What a set has to reach to matter: an objective among all, one among those within the cap, or a change."""

    score: float
    score_within: float
    own: float


class Bounds:
    """Which sets may still matter while they are run on the groups to spare; see `Race`."""

    def __init__(
        self, others: Sequence[Group], weight: float, cap: float, needed: Needed, own: Mapping[str, tuple[float, float]]
    ) -> None:
        """Begin with what is known of the group itself.

        Args:
            others: the groups to spare.
            weight: of the objective.
            cap: the share of its examples that any of these may lose.
            needed: what is to be reached.
            own: by label the objective if nobody else were harmed, and the change of the share of right examples.
        """
        self._others, self._weight, self._cap, self._needed, self._own = others, weight, cap, needed, own
        # By group: its size, and what its error probabilities and its wrong answers come to, without an edit, among the
        # examples ahead, where they can still get better; by label what they have changed by so far.
        self._sizes, self._doubt, self._wrong = (np.zeros(len(others)) for _ in range(3))
        self._rise, self._gain = ({label: np.zeros(len(others)) for label in own} for _ in range(2))

    def expect(self, groups: Iterable[Group], before: Tensor) -> None:
        """Take note of examples ahead, by their metric without an edit."""
        for place, own in self._members(groups):
            self._sizes[place] += len(own)
            self._doubt[place] += float(error_probability(before[own]).sum())
            self._wrong[place] += int((before[own] <= 0).sum())

    def __call__(self, groups: Iterable[Group], before: Tensor, after: Mapping[str, Tensor]) -> set[str]:
        """Return the labels to go on with after some of these examples."""
        for place, own in self._members(groups):
            doubt, right = error_probability(before[own]), int((before[own] > 0).sum())
            self._doubt[place] -= float(doubt.sum())
            self._wrong[place] -= len(own) - right
            for label, values in after.items():
                self._rise[label][place] += float((error_probability(values[own]) - doubt).sum())
                self._gain[label][place] += int((values[own] > 0).sum()) - right
        return {label for label in after if self.matters(label)}

    def _members(self, groups: Iterable[Group]) -> list[tuple[int, list[int]]]:
        members = group_members(groups)
        return [(place, members[name]) for place, name in enumerate(self._others) if name in members]

    def matters(self, label: str) -> bool:
        """Return whether a set may still reach what is needed."""
        limit, own = self._own[label]
        limit -= self._weight * max(0.0, float(((self._rise[label] - self._doubt) / self._sizes).max()))
        if not limit < self._needed.score - ROUNDING:
            return True
        if float(((self._gain[label] + self._wrong) / self._sizes).min()) < -self._cap - ROUNDING:
            return False
        return not limit < self._needed.score_within - ROUNDING or (own < 0 and own <= self._needed.own + ROUNDING)


class Search:
    """A beam search over sets of candidates.

    Attributes:
        looked: how many sets were looked at.
        scores: the objective of those that were run on all examples.
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
        self.looked = 0
        self.scores: dict[Chosen, float] = {}
        self.path: list[Step] = []
        self._changes: dict[Chosen, tuple[float, float]] = {}
        self._made, self._group, self._others = made, group, tuple(others)
        self._objective = objective
        self._k, self._cap, self._pool, self._width = k, cap, pool, width
        self._harm: dict[Chosen, float] = {}  # the rise of the error probability where it is largest, or its prediction
        self._asked: dict[str, Chosen] = {}
        self._swept: dict[Chosen, Measured] = {}

    def parts(self, candidates: Sequence[Candidate], loaders: Loaders, race: Race | None = None) -> Iterator[Part]:
        """Yield the edits to sweep for each size in turn, the sets of one size made when the last are known.

        Args:
            candidates: to make sets of.
            loaders: all examples.
            race: how to leave out what cannot matter, for the objective `selective`, a cap, and no more candidates than
                the pool holds.
        """
        beam: list[Chosen] = [frozenset()]
        if race is not None:
            self._harm.update({frozenset({candidate}): harm for candidate, harm in race.harm.items()})
        for size in range(1, self._k + 1):
            made = (one | {c} for one in beam for c in candidates if all(c[1:] != other[1:] for other in one))
            sets = list(dict.fromkeys(made))
            if not sets:
                return
            self.looked += len(sets)
            if race is None:
                yield self._part(_labelled(sets), loaders)
                self._note(self._swept)
            else:
                yield from self._raced(sets, race)
            ranked = self._ranked(chosen for chosen in sets if chosen in self.scores)
            if size == 1 and len(candidates) > self._pool:
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
        return in_turn([chosen for chosen in ranked if self._is_within(chosen)], ranked)

    def take(self, swept: Sweep) -> None:
        """Take note of what the edits of the last part came to."""
        before = swept.values()
        self._swept = {
            self._asked[label]: Measured(before, swept.values(label), swept.members) for label in swept.labels
        }

    def _part(self, sets: Mapping[str, Chosen], loaders: Loaders, bounds: Bounds | None = None) -> Part:
        self._asked = dict(sets)
        return Part({label: self._made.edit(chosen) for label, chosen in self._asked.items()}, loaders, bounds)

    def _raced(self, sets: Sequence[Chosen], race: Race) -> Iterator[Part]:
        """Yield the edits of sets of one size on their own group, of a few of them on the others, and of the rest."""
        assert self._cap is not None  # a race is for searches with one
        yield self._part(_labelled(sets), race.own)
        own, alone = self._swept, selective(self._group, (), race.weight)
        known = {chosen: (alone(*measured), measured.gains()[self._group]) for chosen, measured in own.items()}
        harm = {chosen: self._expected_harm(chosen) for chosen in sets}
        likely = sorted(sets, key=lambda chosen: race.weight * max(0.0, harm[chosen]) - known[chosen][0])
        first = in_turn([chosen for chosen in likely if harm[chosen] <= self._cap], likely)[:LEADERS]
        yield self._part(_labelled(first), race.rest)
        whole = {chosen: own[chosen].joined(measured) for chosen, measured in self._swept.items()}
        self._note(whole)
        left = _labelled(chosen for chosen in sets if chosen not in whole)
        needed = self._needed(whole)
        bounds = Bounds(self._others, race.weight, self._cap, needed, {label: known[c] for label, c in left.items()})
        bounds.expect(self._swept[first[0]].groups, self._swept[first[0]].before)
        left = {label: left[label] for label in left if bounds.matters(label)}
        if left:
            yield self._part(left, race.rest, bounds)
            self._note({chosen: own[chosen].joined(measured) for chosen, measured in self._swept.items()})

    def _expected_harm(self, chosen: Chosen) -> float:
        """Return what a set may do to the group that suffers most, as if its last neuron added what it does alone."""
        whole = [self._harm[chosen]] if chosen in self._harm else []
        rest = [(chosen - {last}, frozenset({last})) for last in chosen]
        return max(whole + [self._harm[most] + self._harm[last] for most, last in rest if most in self._harm])

    def _needed(self, sets: Iterable[Chosen]) -> Needed:
        """Return what other sets of this size have to reach, by those that are known."""

        def last(scores: Iterable[float]) -> float:
            best = sorted(scores, reverse=True)[: self._width]
            return best[-1] if len(best) == self._width else -math.inf

        within = [chosen for chosen in self.scores if self._is_within(chosen)]
        return Needed(
            last(self.scores[chosen] for chosen in sets),
            last(self.scores[chosen] for chosen in sets if chosen in within),
            min((self._changes[chosen][0] for chosen in within), default=0.0),
        )

    def _is_within(self, chosen: Chosen) -> bool:
        return self._cap is not None and self._changes[chosen][1] >= -self._cap

    def _note(self, measured: Mapping[Chosen, Measured]) -> None:
        """Score sets that were run on all examples."""
        for chosen, values in measured.items():
            score, gains, rises = self._objective(*values), values.gains(), values.rises()
            self.scores[chosen] = -math.inf if math.isnan(score) else float(score)
            self._changes[chosen] = gains[self._group], min(gains[name] for name in self._others)
            self._harm[chosen] = max(rises[name] for name in self._others)

    def best(self, size: int) -> Step | None:
        """Return the set of at most so many neurons whose group loses most within the cap; the best, without a cap."""
        looked = [chosen for chosen in self.scores if len(chosen) <= size]
        if self._cap is None:
            best = max(looked, key=lambda chosen: (self.scores[chosen], -len(chosen)))
            return self._step(best) if self.scores[best] > 0 else None
        allowed = [chosen for chosen in looked if self._is_within(chosen) and self._changes[chosen][0] < 0]
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


def _labelled(sets: Iterable[Chosen]) -> dict[str, Chosen]:
    return {str(number): chosen for number, chosen in enumerate(sets)}
