"""Loaders: any iterable of batches that can be iterated again, of one group or of mixed ones.

Batches come unpacked, on the model's device, with a line of progress if it is wanted, and regrouped where each pass is
to see examples of one group only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch

from neuronsurgery.batches import Batch, Examples, Unpack, group_members, join, move, signature, unpack_batch
from neuronsurgery.types import Group, Loader, Loaders


def iterate(
    loader: Loader,
    *,
    device: torch.device | None = None,
    unpack: Unpack | None = None,
    progress: str | None = None,
    edits: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of a loader, unpacked and moved to a device, with a line of progress on standard error.

    Batches without examples are left out.

    Args:
        loader: any iterable of batches.
        device: where tensors go; None leaves them.
        unpack: see `unpack_batch`.
        progress: the label of the progress line, or None for silence.
        edits: how many edited models each batch goes through; named in the line if there are any.
    """
    started = shown = time.monotonic()
    examples = 0
    total = _total(loader)
    for number, raw in enumerate(loader, start=1):
        batch = unpack_batch(raw, unpack)
        if len(batch) == 0:
            continue
        yield batch if device is None else move(batch, device)
        examples += len(batch)
        now = time.monotonic()
        if progress is not None and (now - shown > 0.5 or total == f"/{number}"):
            shown = now
            elapsed = max(now - started, 1e-9)
            rate = f"{examples / elapsed:.0f}/s" + (f", {edits * number / elapsed:.0f} edits/s" if edits else "")
            end = "\n" if total == f"/{number}" else "\r"
            sys.stderr.write(f"{progress}: batch {number}{total}, {examples} examples, {rate}{end}")
            sys.stderr.flush()


def _total(loader: Loader) -> str:
    try:
        return f"/{len(loader)}" if isinstance(loader, Sized) else ""
    except TypeError:  # a DataLoader over a stream says only here that it has no length
        return ""


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
        for batch in iterate(loader, device=device, unpack=unpack, progress=label, edits=edits):
            yield [name] * len(batch), batch


def refuse_partly_grouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a mixed stream as they are.

    Raises:
        ValueError: if some carry groups and some do not.
    """
    grouped = None
    for batch in batches:
        if grouped is not None and grouped != (batch.groups is not None):
            raise ValueError("some batches carry groups and some do not: give every batch its groups, or none")
        grouped = batch.groups is not None
        yield batch


def regrouped(batches: Iterable[Batch]) -> Iterator[tuple[Group, Batch]]:
    """Yield (group, batch of that group alone), examples joined with others of the same shapes into full batches.

    A full batch is as large as the largest of the stream. Where the shapes vary, at most as many examples wait as with
    one shape: then the ones that have waited longest run as they are.
    """
    waiting: dict[tuple[Group, Any], Examples] = {}
    groups: set[Group] = set()
    full = 0
    for batch in refuse_partly_grouped(batches):
        full = max(full, len(batch))
        members = group_members(batch.groups or ["all"] * len(batch))
        groups |= set(members)
        shape = signature(batch)
        examples = Examples.of(batch)
        for group, indices in members.items():
            whole = len(members) == 1 and len(batch) == full and (group, shape) not in waiting
            part = examples if whole else examples.take(indices)  # what waits is a copy: a loader may reuse its memory
            if (group, shape) in waiting:
                part = join([waiting.pop((group, shape)), part])
            while len(part) >= full:
                yield group, part.take(range(full)).batch()
                part = part.take(range(full, len(part)))
            if len(part):
                waiting[group, shape] = part
        while sum(map(len, waiting.values())) > len(groups) * full:
            oldest = next(iter(waiting))
            yield oldest[0], waiting.pop(oldest).batch()
    for (group, _), part in waiting.items():
        yield group, part.batch()
