"""Loaders: any iterable of batches that can be iterated again, of one group or of mixed ones.

Batches come unpacked, on the model's device, with a line of progress if it is wanted, and regrouped where each pass is
to see examples of one group only.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import sys
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, RandomSampler

from neuronsurgery.batches import (
    Batch,
    Examples,
    Unpack,
    group_members,
    group_names,
    inseparable,
    join,
    move,
    signature,
    unpack_batch,
)
from neuronsurgery.errors import warn
from neuronsurgery.types import Group, Loader, Loaders

CACHED = 128
"""More examples at once are slower on a CPU, whose caches hold no more of what lies between the layers."""

SMALL = 1 / 4
"""Groups of at most this part of a full batch share batches: larger ones run as fast by themselves."""

FEWEST = 8
"""Fewer small groups of one shape run by themselves: to see whether they can share a batch, one of them runs twice."""

MANY = 16
"""More examples than this, of as many groups, are taken for a sign that the groups are none."""

Regrouped: TypeAlias = tuple[Mapping[Group, Batch], Batch, bool]
"""The batch of each group, all of them in one, whether they are the last of their groups."""


def iterate(
    loader: Loader,
    *,
    device: torch.device | None = None,
    unpack: Unpack | None = None,
    progress: str | None = None,
    edits: int = 0,
    grouped: bool = True,
) -> Iterator[Batch]:
    """Yield the batches of a loader, unpacked and moved to a device, with a line of progress on standard error.

    Batches without examples are left out.

    Args:
        loader: any iterable of batches.
        device: where tensors go; None leaves them.
        unpack: see `unpack_batch`.
        progress: the label of the progress line, or None for silence.
        edits: how many edited models each batch goes through; named in the line if there are any.
        grouped: whether groups are wanted; if not, what stands in their place is not looked at.
    """
    started = shown = time.monotonic()
    examples = 0
    total = _total(loader)
    for number, raw in enumerate(loader, start=1):
        batch = unpack_batch(raw, unpack, grouped=grouped)
        if len(batch) == 0:
            continue
        yield batch if device is None else move(batch, device)
        examples += len(batch)
        now = time.monotonic()
        if progress is not None and (now - shown > pause_between_lines() or total == f"/{number}"):
            shown = now
            elapsed = max(now - started, 1e-9)
            rate = f"{examples / elapsed:.0f}/s" + (f", {edits * number / elapsed:.0f} edits/s" if edits else "")
            end = line_end(last=total == f"/{number}")
            sys.stderr.write(f"{progress}: batch {number}{total}, {examples} examples, {rate}{end}")
            sys.stderr.flush()


def pause_between_lines() -> float:
    """Seconds between two lines of progress: fewer of them in a file, where none is written over."""
    return 0.5 if sys.stderr.isatty() else 10.0


def line_end(*, last: bool) -> str:
    """What ends a line of progress: on a terminal the next one is written over it."""
    return "\r" if sys.stderr.isatty() and not last else "\n"


def _total(loader: Loader) -> str:
    try:
        return f"/{len(loader)}" if isinstance(loader, Sized) else ""
    except TypeError:  # a DataLoader over a stream says only here that it has no length
        return ""


def expected_batches(loaders: Loaders) -> int:
    """Return about how many batches there are, as far as the loaders say; 0 of those that do not."""
    return sum(map(operator.length_hint, loaders.values() if isinstance(loaders, Mapping) else [loaders]))


def named_loaders(loaders: Loaders) -> Loaders:
    """Return a mapping of loaders with its keys as groups, those of numpy and torch made Python's; others as they are.

    Raises:
        TypeError: if a key is no integer or string, or what is given cannot be iterated.
        ValueError: if two keys come to one name.
    """
    if not isinstance(loaders, Mapping):
        return checked_loader(loaders)
    for loader in loaders.values():
        checked_loader(loader)
    keys = list(loaders)
    try:
        names = group_names(keys)
    except TypeError as error:
        raise TypeError(f"the mapping of loaders: {error}") from error
    if len(set(names)) < len(names):
        raise ValueError(f"two loaders of the mapping have one name: {', '.join(map(repr, names))}")
    return dict(zip(names, loaders.values(), strict=True))


def checked_loader(loader: Loader) -> Loader:
    """Return one loader.

    Raises:
        TypeError: if it cannot be iterated, or is a mapping of loaders.
    """
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, Mapping | str) or not iterable:
        instead = "one of its values" if isinstance(loader, Mapping) else "a list of batches or a DataLoader"
        raise TypeError(f"a loader is an iterable of batches, not a {type(loader).__name__}: give {instead}")
    return loader


def iterate_groups(
    loaders: Loaders,
    *,
    device: torch.device | None = None,
    unpack: Unpack | None = None,
    progress: str | None = None,
    edits: int = 0,
) -> Iterator[tuple[Sequence[Group], Batch]]:
    """Yield (group of each example, batch) of a mapping of loaders or of one loader of mixed batches.

    Args:
        loaders: a mapping group -> loader, or one loader; batches without groups are one group "all".
        device: where tensors go; None leaves them.
        unpack: see `unpack_batch`.
        progress: the label of the progress line, or None for silence.
        edits: how many edited models each batch goes through; named in the line if there are any.

    Raises:
        ValueError: if some batches of one loader carry groups and some do not.
    """
    if not isinstance(loaders, Mapping):
        batches = iterate(loaders, device=device, unpack=unpack, progress=progress, edits=edits)
        for batch in refuse_partly_grouped(batches):
            yield batch.groups or ["all"] * len(batch), batch
        return
    for name, loader in loaders.items():
        label = None if progress is None else f"{progress} of {name}"
        for batch in iterate(loader, device=device, unpack=unpack, progress=label, edits=edits, grouped=False):
            yield [name] * len(batch), batch


def refuse_partly_grouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a mixed stream as they are.

    Raises:
        ValueError: if some carry groups and some do not.

    Warns:
        UserWarning: once, if there are about as many groups as examples.
    """
    grouped, warned, examples = None, False, 0
    seen: set[Group] = set()
    for batch in batches:
        if grouped is not None and grouped != (batch.groups is not None):
            raise ValueError("some batches carry groups and some do not: give every batch its groups, or none")
        grouped = batch.groups is not None
        if batch.groups is not None and not warned:
            seen.update(batch.groups)
            examples += len(batch)
            warned = _warn_of_names(len(seen), examples)
        yield batch


def _warn_of_names(groups: int, examples: int) -> bool:
    """Warn where what is taken for groups tells the examples apart, as an index or a path does; return whether."""
    if not (groups == examples > MANY or groups > max(examples / 2, 100)):
        return False
    warn(
        f"the first {examples} examples of a mixed stream are of {groups} groups: the third of a batch, or what it has "
        f"under 'group', is taken for the group of each example. If it is an index, a path or the like, leave it out: "
        f"pass for instance unpack=lambda batch: neuronsurgery.Batch((batch[0],), {{}}, batch[1])"
    )
    return True


def regrouped(batches: Iterable[Batch]) -> Iterator[tuple[Group, Batch]]:
    """Yield (group, batch of that group alone): see `regrouped_to_the_last`."""
    return (pair for groups, _, _ in regrouped_to_the_last(batches) for pair in groups.items())


def regrouped_to_the_last(batches: Iterable[Batch], *, joint: bool = False) -> Iterator[Regrouped]:
    """Yield (batch of each group, all of them in one, whether their last), examples joined into full batches by shape.

    Of a group whose last examples fill a batch it is not known that this is the last.

    A full batch is as large as the largest of the stream. Where the shapes vary, at most as many examples wait as with
    one shape: then the ones that have waited longest run as they are.

    Args:
        batches: a mixed stream.
        joint: whether several groups may share a batch, of which each has all of its examples there: see `SMALL`.
            Otherwise each batch is of one group.
    """
    waiting: dict[tuple[Group, Any], _Waiting] = {}
    counts: Counter[Group] = Counter()
    full = 0
    for batch in refuse_partly_grouped(batches):
        full = max(full, len(batch))
        members = group_members(batch.groups or ["all"] * len(batch))
        counts.update({group: len(indices) for group, indices in members.items()})
        whole_only = inseparable(batch)
        if whole_only and len(members) > 1:
            raise ValueError(
                f"a batch of several groups holds {whole_only}, which cannot be taken apart into examples: pass "
                f"regroup=False, with which each batch runs as it comes, or give a mapping group -> loader"
            )
        if whole_only:
            yield _alone(next(iter(members)), batch, False)
            continue
        shape = signature(batch)
        examples = Examples.of(batch)
        for group, indices in members.items():
            whole = len(members) == 1 and len(batch) == full and (group, shape) not in waiting
            part = examples if whole else examples.take(indices)  # what waits is a copy: a loader may reuse its memory
            together = waiting.pop((group, shape), _Waiting()).with_more(part)
            if together.count >= full:
                part = together.examples()
                while len(part) >= full:
                    yield _alone(group, part.take(range(full)).batch(), False)
                    part = part.take(range(full, len(part)))
                together = _Waiting()
                if len(part):
                    together.with_more(part.take(list(range(len(part)))))  # a copy, not a view of all that ran
            if together.count:
                waiting[group, shape] = together
        while sum(part.count for part in waiting.values()) > len(counts) * full:
            oldest = next(iter(waiting))
            yield _alone(oldest[0], waiting.pop(oldest).examples().batch(), False)
    last = dict(waiting.keys())
    for keys in _shared(waiting, counts, full) if joint else ():
        yield _joined({group: waiting.pop((group, shape)) for group, shape in keys})
    for group, shape in list(waiting):
        yield _alone(group, waiting.pop((group, shape)).examples().batch(), shape == last[group])


def _alone(group: Group, batch: Batch, last: bool) -> Regrouped:
    return {group: batch}, batch, last


def _joined(waiting: Mapping[Group, _Waiting]) -> Regrouped:
    """Return the examples of several groups as views of one batch."""
    together = join([part for one in waiting.values() for part in one.parts])
    stops = itertools.accumulate(one.count for one in waiting.values())
    ranges = [range(stop - one.count, stop) for one, stop in zip(waiting.values(), stops, strict=True)]
    own = {group: together.take(part).batch() for group, part in zip(waiting, ranges, strict=True)}
    return own, together.batch(), True


def _shared(
    waiting: Mapping[tuple[Group, Any], _Waiting], counts: Mapping[Group, int], full: int
) -> Iterator[list[tuple[Group, Any]]]:
    """Yield which groups share a batch.

    Args:
        waiting: by group and shape, what is left when the stream has ended.
        counts: how many examples each group has.
        full: how many a batch holds.
    """
    small: dict[Any, list[tuple[Group, Any]]] = {}
    for group, shape in waiting:
        if counts[group] == waiting[group, shape].count <= full * SMALL:
            small.setdefault(shape, []).append((group, shape))
    for keys in small.values():
        if len(keys) < FEWEST:
            continue
        share: list[tuple[Group, Any]] = []
        free = full
        for key, count in [(key, waiting[key].count) for key in keys]:
            if count > free:
                yield share
                share, free = [], full
            share.append(key)
            free -= count
        yield share


@dataclasses.dataclass
class _Waiting:
    """Examples that wait to be run, in parts that are joined only then: joined at every part, they would be copied."""

    parts: list[Examples] = dataclasses.field(default_factory=list)
    count: int = 0

    def with_more(self, part: Examples) -> _Waiting:
        self.parts.append(part)
        self.count += len(part)
        return self

    def examples(self) -> Examples:
        return join(self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """Loaders as one stream of full batches, whatever their groups: few shapes, so that few captures are needed.

    A batch is as large as the largest that came so far, on a CPU at most `CACHED`. What cannot be taken apart comes as
    it is.

    Attributes:
        loaders: a mapping group -> loader, or one loader.
        unpack: what they yield -> `Batch`.
        device: where they will be run; None is the CPU.
        groups: only the examples of these, and what cannot be taken apart if it holds one; None for all.
    """

    loaders: Loaders
    unpack: Unpack | None = None
    device: torch.device | None = None
    groups: Container[Group] | None = None

    def __length_hint__(self) -> int:
        """About how many batches there are."""
        return expected_batches(self.loaders)

    def __iter__(self) -> Iterator[Batch]:
        waiting: dict[Any, Examples] = {}
        full = 0
        most = CACHED if self.device is None or self.device.type == "cpu" else None
        for groups, batch in iterate_groups(self.loaders, unpack=self.unpack):
            named = dataclasses.replace(batch, groups=tuple(groups))
            full = max(full, len(batch) if most is None else min(most, len(batch)))
            wanted = [at for at, group in enumerate(groups) if self.groups is None or group in self.groups]
            if not wanted:
                continue
            if inseparable(batch):
                yield named
                continue
            shape = signature(batch), batch.indices is None
            part = Examples.of(named)
            part = part if len(wanted) == len(part) else part.take(wanted)
            # What waits is a copy: a loader may reuse its memory.
            part = join([waiting.pop(shape), part]) if shape in waiting else part
            while len(part) >= full:
                yield part.take(range(full)).batch()
                part = part.take(range(full, len(part)))
            if len(part):
                waiting[shape] = part.take(list(range(len(part))))
        for part in waiting.values():
            yield part.batch()


# Groups from elsewhere


def with_groups(loader: Loader, groups: Any, *, unpack: Unpack | None = None) -> Iterable[Batch]:
    """Return the batches of a loader with a group for each example, as a loader that can be iterated as often.

    Args:
        loader: an iterable of batches that yields its examples in one order, each time; not changed. Groups that its
            batches have are replaced.
        groups: one integer or string per example, in that order, in a tensor, an array or a sequence.
        unpack: what the loader yields -> `Batch`.

    Returns:
        An iterable of `Batch`, with a length where the loader has one.

    Raises:
        TypeError: if it is not one loader, or a group is neither an integer nor a string.
        ValueError: if a `DataLoader` shuffles, or has another number of examples than there are groups. Of any other
            loader this is raised when an iteration comes to it.

    Example:
        >>> data = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.ones(1, 3), torch.tensor([1]))]
        >>> places = with_groups(data, ["land", "water", "land"])
        >>> [batch.groups for batch in places], len(places)
        ([('land', 'water'), ('land',)], 2)
    """
    checked_loader(loader)
    names = group_names(groups)
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, Sized) and loader.batch_size is not None:
        if isinstance(loader.sampler, RandomSampler):
            raise ValueError(
                "the DataLoader shuffles, so no order of groups is that of its examples: make it with shuffle=False, "
                "or let its data set yield the groups"
            )
        examples = len(loader.sampler)
        _refuse_other_number(names, examples - examples % loader.batch_size if loader.drop_last else examples)
    return _Grouped(loader, names, unpack)


def _refuse_other_number(groups: Sequence[Group], examples: int, more: str = "") -> None:
    if len(groups) != examples:
        raise ValueError(
            f"{len(groups)} groups for a loader of {examples} examples{more}: give one group per example, in the order "
            f"of the loader"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Grouped:
    """See `with_groups`."""

    loader: Loader
    groups: tuple[Group, ...]
    unpack: Unpack | None

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for raw in self.loader:
            batch = unpack_batch(raw, self.unpack, grouped=False)
            stop = start + len(batch)
            if stop > len(self.groups):
                _refuse_other_number(self.groups, stop, " or more")
            yield dataclasses.replace(batch, groups=self.groups[start:stop])
            start = stop
        _refuse_other_number(self.groups, start)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a TypeError where it has no length, as of a DataLoader
