"""Examples told apart by their content: halves to search on and to judge on, and controls of matched margins."""

from __future__ import annotations

import dataclasses
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuronsurgery.batches import Batch, Examples, Unpack, by_key, group_members, group_names, inseparable
from neuronsurgery.digests import digest, rows_of_bytes
from neuronsurgery.draws import checked_seed, random_bits
from neuronsurgery.errors import checked_function, inline, nearest
from neuronsurgery.loaders import iterate, iterate_groups, named_loaders
from neuronsurgery.losses import margin
from neuronsurgery.pools import spared_names
from neuronsurgery.sweeps import sweep
from neuronsurgery.types import Group, Loader, Loaders, Metric, Predict

Key: TypeAlias = Callable[[Batch], Sequence[Any]]
"""A batch -> what tells each of its examples from others."""

FARTHEST = 0.5
"""No two examples are matched whose margins differ by more."""


def example_keys(batch: Batch, key: Key | None = None) -> list[str]:
    """Return for each example of a batch a digest of its inputs, or of what the caller knows it by.

    Raises:
        ValueError: if the batch cannot be taken apart, or `key` gives another number.
    """
    whole_only = inseparable(batch)
    if whole_only:
        raise ValueError(
            f"examples cannot be told apart in a batch that holds {whole_only}: give dense inputs (padded, or by "
            f"to_dense) in the loader"
        )
    if key is not None:
        names = list(key(batch))
        if len(names) != len(batch):
            raise ValueError(f"key= gave {len(names)} names for a batch of {len(batch)} examples: give one for each")
        # A row as a list, since numpy and torch show long ones in part and round.
        return [digest(str(name.tolist() if isinstance(name, Tensor | np.ndarray) else name)) for name in names]
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    rows = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(batch)]
    if not rows:
        raise ValueError(
            "no input of a batch has one entry per example, so that examples cannot be told apart: pass key=, a "
            "function batch -> one name per example"
        )
    kinds = [f"{leaf.dtype}{tuple(leaf.shape[1:])}" for leaf in rows]
    own = zip(*map(rows_of_bytes, rows), strict=True)
    return [digest(*(piece for pair in zip(kinds, pieces, strict=True) for piece in pair)) for pieces in own]


# Halves


def halves(
    loaders: Loaders,
    *,
    seed: int = 0,
    key: Key | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
) -> tuple[Loaders, Loaders]:
    """Return two loaders over disjoint halves of every group's examples: one to search on, one to judge on.

    An example's half depends on the seed and its content alone, not on the order of the loader. Copies of an example
    fall into one half, whatever their groups and labels; the halves of a group are equal up to one set of copies.

    Args:
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example; to
            be iterated again, with the same examples each time. Passed over once now.
        seed: an integer of at least 0.
        key: batch -> one name per example, for data whose content varies from pass to pass (augmented, padded to the
            longest of a batch). By default examples are known by their inputs.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.

    Returns:
        Two loaders of the form of the one given, which read it anew each time they are iterated.

    Raises:
        TypeError: if a batch has an unknown form.
        ValueError: if the loader cannot be iterated twice, has no examples, gives others the second time (names
            `key=`; later passes are checked as they come), or batches cannot be taken apart.

    Example:
        >>> import torch
        >>> data = [(torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.int64), torch.arange(8) % 2)]
        >>> first, second = halves(data)
        >>> [sum(len(batch) for batch in half) for half in (first, second)]
        [4, 4]
    """
    seed, unpack = checked_seed(seed), by_key(unpack, group_key)
    checked_function(key, "key")
    named = named_loaders(loaders)
    members: dict[Group, dict[str, int]] = {}
    for groups, batch in iterate_groups(named, unpack=unpack):
        for group, name in zip(groups, example_keys(batch, key), strict=True):
            copies = members.setdefault(group, {})
            copies[name] = copies.get(name, 0) + 1
    if not members:
        raise ValueError("the loader yielded no batch. Give one that has examples, and can be iterated again")
    assigned = _assigned(members, seed)
    sides = []
    for side in (False, True):
        counts = {group: sum(n for name, n in own.items() if assigned[name] is side) for group, own in members.items()}
        sides.append(_half(named, assigned, side, counts, key, unpack))
    for loader in named.values() if isinstance(named, Mapping) else [named]:
        _refuse_other_examples(loader, assigned, key, unpack)
    return sides[0], sides[1]


def _assigned(members: Mapping[Group, Mapping[str, int]], seed: int) -> dict[str, bool]:
    """Return the half of every distinct example: one after the other to the half that has fewer of its group."""
    assigned: dict[str, bool] = {}
    for group in sorted(members, key=lambda group: (isinstance(group, str), group)):
        own = members[group]
        sizes = [sum(own[name] for name in own if assigned.get(name) is side) for side in (False, True)]
        tickets = {name: digest(f"halves\0{seed}\0{name}") for name in own if name not in assigned}
        # The largest sets of copies first, so that what is left evens out the difference.
        for name in sorted(tickets, key=lambda name: (-own[name], tickets[name])):
            side = sizes[1] < sizes[0] if sizes[0] != sizes[1] else int(tickets[name][-1], 16) % 2 == 1
            assigned[name] = side
            sizes[side] += own[name]
    return assigned


def _half(
    loaders: Loaders,
    assigned: Mapping[str, bool],
    side: bool,
    counts: Mapping[Group, int],
    key: Key | None,
    unpack: Unpack | None,
) -> Loaders:
    if isinstance(loaders, Mapping):
        return {
            group: _Half(loader, assigned, side, counts.get(group, 0), key, unpack, False)
            for group, loader in loaders.items()
        }
    return _Half(loaders, assigned, side, sum(counts.values()), key, unpack, True)


OTHER = (
    "a pass over the loader gives other examples than the first one did (augmented, padded to the batch, drawn anew), "
    "so no half is known of them: pass key=, a function batch -> one name per example that stays the same"
)


@dataclass(frozen=True, eq=False, repr=False)
class _Half:
    """One half of a loader: see `halves`."""

    loader: Loader
    assigned: Mapping[str, bool]
    side: bool
    count: int
    key: Key | None
    unpack: Unpack | None
    grouped: bool

    def __repr__(self) -> str:
        return f"half of a {type(self.loader).__name__}: {self.count} examples"

    def __length_hint__(self) -> int:
        """About how many batches there are: as many as of the whole, if each has some of this half."""
        return operator.length_hint(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in iterate(self.loader, unpack=self.unpack, grouped=self.grouped):
            sides = [self.assigned.get(name) for name in example_keys(batch, self.key)]
            if None in sides:
                raise ValueError(OTHER)
            own = [at for at, side in enumerate(sides) if side is self.side]
            count += len(own)
            if own:
                yield Examples.of(batch).take(own).batch()
        if count != self.count:
            raise ValueError(f"{OTHER} ({count} examples of this half, not {self.count})")


def _refuse_other_examples(
    loader: Loader, assigned: Mapping[str, bool], key: Key | None, unpack: Unpack | None
) -> None:
    """Raise if the first batch of a second pass has an example that the first pass had not."""
    batch = next(iterate(loader, unpack=unpack, grouped=False), None)
    if batch is None:
        raise ValueError("the loader yields nothing in a second pass: give a list or a DataLoader, no generator")
    if not assigned.keys() >= set(example_keys(batch, key)):
        raise ValueError(OTHER)


# Controls


@dataclass(frozen=True, eq=False)
class Matched:
    """A loader in which examples of one group, matched to another's by their margins, are a group of their own.

    Attributes:
        name: of the new group.
        count: its number of examples.
        unmatched: how many examples of the other group found none near enough.
        gap: the mean difference of the margins of a pair.
        largest_gap: the largest one.
    """

    name: str
    count: int
    unmatched: int
    gap: float
    largest_gap: float
    _loaders: Loaders
    _chosen: frozenset[str]
    _by: Group
    _unpack: Unpack | None

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for groups, batch in iterate_groups(self._loaders, unpack=self._unpack):
            own = [
                group == self._by and key in self._chosen
                for group, key in zip(groups, example_keys(batch), strict=True)
            ]
            count += sum(own)
            names = [self.name if chosen else group for group, chosen in zip(groups, own, strict=True)]
            yield dataclasses.replace(batch, groups=tuple(names))
        if count != self.count:
            raise ValueError(
                f"a pass over the loader gives other examples than those that were matched ({count} of {self.count} "
                f"come again): give a loader whose examples stay the same (no augmentation, no padding to the batch)"
            )

    def __repr__(self) -> str:
        left = f", {self.unmatched} unmatched" if self.unmatched else ""
        return f"{self.name}: {self.count} examples{left}, margins {self.gap:.3f} apart on average"


def matched(
    loaders: Loaders,
    group: Group,
    by: Group,
    model: nn.Module,
    *,
    seed: int = 0,
    metric: Metric = margin,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
) -> Matched:
    """Return a loader in which as many examples of one group, as hard as another's, are a group of their own.

    It is the control for `find_critical`: if a set is found for these too, and does as much to them, the group is
    nothing special. Each example of `group`, in an order drawn by the seed, takes the example of `by` of the nearest
    margin that is left, unless that is farther than 0.5. Copies of an example count as one and go together; those of
    an example of `group` are none of `by`.

    Args:
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example; to
            be iterated again, with the same examples each time, in any order.
        group: the group to match.
        by: the group that the matched examples are taken out of.
        model: any module; not changed.
        seed: an integer of at least 0.
        metric: the margin: (logits, targets) -> one value per example.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.

    Returns:
        A loader of mixed batches, in which the matched examples have the group `name` and all others their own.

    Raises:
        KeyError: if there is no such group; lists those there are.
        ValueError: if the two are one, no example of `by` is near enough, or batches cannot be taken apart; and, as
            the loader is iterated, if a pass gives other examples.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2)
        >>> data = {"few": [(torch.randn(2, 1), torch.zeros(2, dtype=torch.int64))],
        ...         "many": [(torch.randn(64, 1), torch.zeros(64, dtype=torch.int64))]}
        >>> control = matched(data, "few", "many", model)
        >>> control.name, control.count + control.unmatched
        ('many like few', 2)
    """
    group, by = group_names([group, by])
    if group == by:
        raise ValueError(f"group {group!r} cannot be matched by its own examples: give another one as by=")
    seed, unpack = checked_seed(seed), by_key(unpack, group_key)
    named = named_loaders(loaders)
    keys: list[str] = []  # of the examples in the order of this one pass: the next may have another one
    measured = sweep(model, {}, _noting(named, unpack, keys), metric=metric, predict=predict)
    for name in (group, by):
        if name not in measured.baseline:
            raise KeyError(f"no group {name!r}{nearest(str(name), map(str, measured.baseline))}")
    values, members = measured.values().numpy(), group_members(measured.members)
    own, others = ({keys[at]: float(values[at]) for at in members[name]} for name in (group, by))
    others = {key: value for key, value in others.items() if key not in own}  # no example is a control of itself
    order = np.argsort(random_bits(f"matched\0{seed}", len(own)), kind="stable")
    gaps = _nearest([list(own.values())[at] for at in order], others)
    if not gaps:
        raise ValueError(
            f"no example of {by!r} has a margin within {FARTHEST} of one of {group!r}: the groups are not alike, and "
            f"no control can be made of them"
        )
    count = sum(keys[at] in gaps for at in members[by])
    distances = list(gaps.values())
    return Matched(
        f"{by} like {group}",
        count,
        len(own) - len(gaps),
        sum(distances) / len(distances),
        max(distances),
        named,
        frozenset(gaps),
        by,
        unpack,
    )


def _noting(loaders: Loaders, unpack: Unpack | None, keys: list[str]) -> Loaders:
    """Return loaders for one pass, which adds to `keys` what tells each example apart as it comes."""

    def noted(loader: Loader, grouped: bool) -> Iterator[Batch]:
        for batch in iterate(loader, unpack=unpack, grouped=grouped):
            keys.extend(example_keys(batch))
            yield batch

    if isinstance(loaders, Mapping):
        return {group: noted(loader, False) for group, loader in loaders.items()}
    return noted(loaders, True)


def _nearest(wanted: Iterable[float], others: Mapping[str, float]) -> dict[str, float]:
    """Return which of the others is the nearest left to each of the wanted values, and how far it is."""
    left = sorted((value, name) for name, value in others.items())
    found: dict[str, float] = {}
    for value in wanted:
        at = bisect_left(left, (value, ""))
        near = [place for place in (at - 1, at) if 0 <= place < len(left)]
        if near and (best := min(near, key=lambda place: abs(left[place][0] - value))) is not None:
            distance = abs(left[best][0] - value)
            if distance <= FARTHEST:
                found[left.pop(best)[1]] = distance
    return found


class Counted(NamedTuple):
    """The examples of some loaders: how many each group has, what tells them apart, and whether groups come apart.

    What a batch holds that cannot be taken apart into examples has no keys.
    """

    counts: dict[Group, int]
    keys: frozenset[str]
    separable: bool


def groups_of(loaders: Loaders, unpack: Unpack | None) -> Counted:
    """Return what there is of each group."""
    counts: dict[Group, int] = {}
    keys: set[str] = set()
    separable = True
    for groups, batch in iterate_groups(loaders, unpack=unpack):
        for group in groups:
            counts[group] = counts.get(group, 0) + 1
        whole = bool(inseparable(batch))
        keys.update(() if whole else example_keys(batch))
        separable &= not whole or len(set(groups)) == 1
    return Counted(counts, frozenset(keys), separable)


def checked_groups(
    group: Group, against: Group | Iterable[Group] | None, known: Iterable[Group]
) -> tuple[Group, tuple[Group, ...]]:
    """Return the group, and those to spare: those that are named, or all others. Numbers of torch are made Python's.

    Raises:
        KeyError: if a group is unknown; lists those there are.
        ValueError: if there is none to spare, or the group itself is among them.
    """
    every, (group,) = list(known), group_names([group])
    named = spared_names(against)
    others = tuple(name for name in every if name != group) if named is None else named
    unknown = [name for name in (group, *others) if name not in every]
    if unknown:
        raise KeyError(f"no group {', '.join(map(repr, unknown))}; there are {inline(map(repr, every), 10)}")
    if group in others or not others:
        raise ValueError(
            f"against= names the groups to spare, one or more, without {group!r}; there are "
            f"{inline(map(repr, every), 10)}"
        )
    return group, others
