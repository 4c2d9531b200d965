"""What an audit will do and what it costs: a few batches are timed, and from these the share that fits the time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples, picked
from neuronsurgery.study.audit.fragile import FEWEST

FIRST: Final = 200
"""Examples that are looked at before anything long begins; so many are always cut."""

SECONDS: Final = 10.0
"""About how long the examples of one part take, which are written down together."""

EDITS: Final = 190
"""What a search for three neurons tries, about."""

DRAWS: Final = 100
"""Random sets that a found set is held to."""

BATCHES: Final = (16, 32, 64, 128)
TIMED: Final = 6
"""Edits that are timed: those of the largest effect, as a search tries them."""

SEARCH_PASSES, JUDGE_PASSES = 6, 2
"""How often a search and a judgement read their examples."""

HELD: Final = 2**30
"""Bytes of examples that are kept in memory rather than read again for each pass."""


@dataclass(frozen=True)
class Plan:
    """What an audit will do and how long it takes; prints as that.

    Attributes:
        scored: how many examples are cut to see who is fragile.
        searched: how many examples a set is searched and judged on, half each.
        seconds: by step.
        batch: examples in a batch.
        part: examples whose margins are written down together.
        held: examples of a group that are kept in memory rather than read again for each pass.
    """

    scored: int
    searched: int
    seconds: Mapping[str, float]
    batch: int
    part: int
    held: int

    def __str__(self) -> str:
        lines = [f"  {name}: about {_spoken(seconds)}" for name, seconds in self.seconds.items()]
        return "\n".join([f"about {_spoken(sum(self.seconds.values()))} in batches of {self.batch}:", *lines])


def make_plan(
    model: nn.Module,
    examples: Examples,
    knockout: ns.Edit | None,
    how: Mapping[str, Any],
    batch: int | None,
    until: float,
) -> Plan:
    """Return what will be done by a time of `perf_counter`, by what a few examples took.

    `knockout` is the cut of the last branches, `how` says how the library calls the model. Without a `batch` the size
    of most examples a second is looked for.
    """
    count = len(examples.targets)
    places = torch.linspace(0, count - 1, min(count, 2 * (batch or BATCHES[-1]))).long()
    load, (whole, *_) = _timed(lambda: list(examples.batches(places, len(places))))
    batch = batch or _batch(model, whole, how)
    load, few = load / len(places), picked(whole, slice(batch))
    leaves = whole[0].values() if isinstance(whole[0], Mapping) else [whole[0]]
    held = HELD * len(places) // max(1, sum(leaf.numel() * leaf.element_size() for leaf in leaves))
    fixed, cut, critical = _costs(model, few, knockout, how)

    def of_fragile(count: int) -> float:
        return fixed + count * (load + cut)

    def of_critical(count: int) -> float:
        reads = 1 if count <= held else 1 + SEARCH_PASSES + JUDGE_PASSES
        return 2 * fixed + count * (reads * load + critical)

    left, scored = until - time.perf_counter(), count
    while scored > FIRST and of_fragile(scored) > left / 2:
        scored = max(FIRST, int(scored * 0.9))
    searched = scored
    least = min(scored, FEWEST * (len(examples.group_names) or 2 * len(examples.class_names)))
    while searched > least and of_fragile(scored) + of_critical(searched) > left:
        searched = max(least, int(searched * 0.95))
    steps = {
        f"accuracy, and who is fragile, on {scored} of {count} examples": of_fragile(scored),
        f"a critical set, searched and judged on at most {searched} examples": of_critical(searched),
    }
    part = max(batch, int(SECONDS / max(load + cut, 1e-9)))
    return Plan(scored, searched, steps, batch, part, held // 8)


def _costs(model: nn.Module, few: Any, knockout: ns.Edit | None, how: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the seconds of a capture, and of an example: cut, and in half of a search and half of a judgement."""
    size = len(few[1])
    forward, _ = _timed(lambda: ns.evaluate(model, [few], **how), times=3)
    effects, found = _timed(lambda: ns.group_effects(model, [few], **how), times=2)
    order = found.values[0].abs().argsort(descending=True)[:TIMED].tolist()
    edits = {str(place): ns.zero_out(found.layout.neurons([place])) for place in order}
    capture, shared = _timed(lambda: ns.share(model, few, **how))

    def swept(edits: Mapping[str, ns.Edit]) -> float:
        return _timed(lambda: ns.sweep(shared, edits, [few], **how), times=2)[0]

    base = swept({})
    cut = 0.0 if knockout is None else max(0.0, swept({"cut": knockout}) - base)
    edit = max(0.0, swept(edits) - base) / max(1, len(edits))
    search, judgement = effects + SEARCH_PASSES * forward + EDITS * edit, forward + (1 + DRAWS) * edit
    return capture + base, (forward + cut) / size, (search + judgement) / 2 / size


def _batch(model: nn.Module, whole: Any, how: Mapping[str, Any]) -> int:
    """Return the size at which an example costs least, among those that there are examples for."""
    best, least = BATCHES[0], float("inf")
    for size in BATCHES:
        few = picked(whole, slice(size))
        seconds, _ = _timed(functools.partial(ns.evaluate, model, [few], **how), times=2)
        if seconds / len(few[1]) > 0.97 * least or len(few[1]) < size:
            break
        best, least = size, seconds / size
    return best


def _timed(call: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """Return the seconds of a call, the least of some, and what it returned."""
    least = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        value = call()
        least = min(least, time.perf_counter() - started)
    return least, value


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
