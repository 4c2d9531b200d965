"""Pools: random examples of each group, kept from one pass over the data, and the order in which steps come to them."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.batches import (
    Batch,
    Examples,
    Unpack,
    group_members,
    group_names,
    inseparable,
    join,
    map_tensors,
    move,
    ordered_groups,
    signature,
)
from neuronsurgery.draws import random_bits
from neuronsurgery.errors import EXHAUSTED, inline
from neuronsurgery.loaders import iterate_groups
from neuronsurgery.types import Group, Loaders


@dataclass(frozen=True, eq=False)
class Unit:
    """One example, or a batch that cannot be taken apart.

    Attributes:
        signature: units of one signature may be joined into a batch.
        held: what it is.
    """

    signature: Hashable
    held: Examples | Batch

    def __len__(self) -> int:
        return len(self.held)


class Pool:
    """Some examples of one group, at random, and the order in which steps come to them.

    Both depend on a key and on the places that the examples have among those of their group alone, not on batches.
    """

    def __init__(self, key: str, most: int) -> None:
        self.key, self.most, self.seen = key, most, 0
        self._kept: list[tuple[int, int, Unit]] = []

    def add(self, batch: Batch, members: Sequence[int]) -> None:
        """Keep those of some examples of a batch whose tickets are among the smallest so far, as copies.

        Raises:
            ValueError: if they are a part of a batch that cannot be taken apart.
        """
        makers = list(_units(batch, members))
        tickets = random_bits(self.key, len(makers), start=self.seen).tolist()
        for ticket, make in zip(tickets, makers, strict=True):
            if len(self._kept) < self.most:
                heapq.heappush(self._kept, (-ticket, self.seen, make()))
            elif -ticket > self._kept[0][0]:
                heapq.heapreplace(self._kept, (-ticket, self.seen, make()))
            self.seen += 1

    @property
    def units(self) -> list[Unit]:
        """What is kept, in the order it came."""
        return [unit for _, _, unit in sorted(self._kept, key=lambda entry: entry[1])]

    def __len__(self) -> int:
        return sum(map(len, self.units))

    def steps(self, share: int) -> Iterator[list[Unit]]:
        """Yield what each step gets, for ever: all, where these are no more than `share` examples, or the next so many.

        All have come once before one comes again.
        """
        units = self.units
        if len(self) <= share:
            yield from itertools.repeat(units)
        orders = (np.argsort(random_bits(f"{self.key}\0{epoch}", len(units))) for epoch in itertools.count())
        endless = (units[place] for order in orders for place in order)
        while True:
            drawn: list[Unit] = []
            while sum(map(len, drawn)) < share:
                drawn.append(next(endless))
            yield drawn


def _units(batch: Batch, members: Sequence[int]) -> Iterator[Callable[[], Unit]]:
    """Yield how to make a unit of each of some examples: of what is not kept nothing is copied."""
    whole_only = inseparable(batch)
    if whole_only and len(members) < len(batch):
        raise ValueError(
            f"a batch of several groups holds {whole_only}, which cannot be taken apart into examples: give a mapping "
            f"group -> loader"
        )
    if whole_only:
        yield functools.partial(_whole, batch)
        return
    kind, examples = signature(batch), Examples.of(batch)
    yield from (functools.partial(_single, kind, examples, index) for index in members)


def _single(kind: Hashable, examples: Examples, index: int) -> Unit:
    return Unit(kind, examples.take([index]))


def _whole(batch: Batch) -> Unit:
    """Return a batch in memory of its own, since a loader may reuse its memory."""
    args, kwargs, targets = map_tensors((batch.args, dict(batch.kwargs), batch.targets), Tensor.clone)
    return Unit(object(), Batch(args, kwargs, targets))


def joined(units: Iterable[tuple[Unit, float]], device: torch.device | None) -> Iterator[tuple[Batch, list[float]]]:
    """Yield units with weights as batches of one signature on a device, with the weight of each example."""
    kinds: dict[Hashable, list[tuple[Unit, float]]] = {}
    for unit, weight in units:
        kinds.setdefault(unit.signature, []).append((unit, weight))
    for alike in kinds.values():
        first = alike[0][0].held
        parts = [unit.held for unit, _ in alike if isinstance(unit.held, Examples)]
        batch = first if isinstance(first, Batch) else join(parts).batch()
        yield move(batch, device), [weight for unit, weight in alike for _ in range(len(unit))]


# Reading them


def read_pools(
    loaders: Loaders,
    group: Group,
    against: Sequence[Group] | None,
    *,
    key: str,
    most: int,
    unpack: Unpack | None = None,
    progress: bool = False,
) -> tuple[Pool, list[Pool]]:
    """Return a pool of one group and pools of others, read in one pass over the data.

    Args:
        loaders: a mapping group -> loader, of which only those needed are read; or one loader of mixed batches.
        group: the one.
        against: the others; None for all others there are.
        key: what draws depend on.
        most: how many units to keep of each group.
        unpack: what a loader yields -> `Batch`.
        progress: whether to write a line of progress to standard error.

    Raises:
        KeyError: if there is no such group; lists those there are.
        ValueError: if there are no examples, no others, or the one is among them.
    """
    if isinstance(loaders, Mapping):
        if not loaders:
            raise ValueError("the mapping of loaders is empty: give at least two groups")
        wanted = _wanted(list(loaders), group, against)
        loaders = {name: loaders[name] for name in wanted}
    pools: dict[Group, Pool] = {}
    for groups, batch in iterate_groups(loaders, unpack=unpack, progress="examples" if progress else None):
        for name, members in group_members(groups).items():
            pool = pools.setdefault(name, Pool(f"{key}\0{name!r}", most))
            if against is None or name == group or name in against:  # of any other the name is all that matters
                pool.add(batch, members)
    if not isinstance(loaders, Mapping):
        if not pools:
            raise ValueError(f"the loader yielded no batch. {EXHAUSTED}")
        wanted = _wanted(ordered_groups(pools), group, against)
    for name in wanted:
        if name not in pools:
            raise ValueError(f"group {name!r} has no examples: its loader yielded no batch. {EXHAUSTED}")
    return pools[group], [pools[name] for name in wanted[1:]]


def spared_names(against: Group | Iterable[Group] | None) -> tuple[Group, ...] | None:
    """Return the groups to spare as Python's integers and strings, one or several given; None for all others.

    Raises:
        TypeError: if one is neither an integer nor a string.
    """
    if against is None:
        return None
    if isinstance(against, int | str | np.integer) or (isinstance(against, Tensor) and against.dim() == 0):
        return group_names([against])
    return group_names(list(against))


def _wanted(present: Sequence[Group], group: Group, against: Sequence[Group] | None) -> list[Group]:
    """Return the one and the others."""
    others = [name for name in present if name != group] if against is None else list(dict.fromkeys(against))
    for name in (group, *others):
        if name not in present:
            raise KeyError(f"no group {name!r}; there are {inline(map(repr, present), 10)}")
    if group in others:
        raise ValueError(f"group {group!r} cannot be broken and spared: leave it out of against=")
    if not others:
        raise ValueError(f"there is no group to spare beside {group!r}: give the examples of another group, too")
    return [group, *others]
