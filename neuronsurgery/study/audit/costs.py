"""What an audit costs: a few batches are timed, and from these numbers each step's time and the share that fits."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples, picked

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

T = TypeVar("T")


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on a few batches.

    Attributes:
        load: to read an example.
        forward: of an example, by the model as it is.
        effects: of an example, a forward and backward pass.
        edit: of an example, for an edit of a search.
        knockout: of an example, for the cut of the last branches.
        capture: once for each of the steps.
        batch: examples in a batch.
        size: bytes of an example.
    """

    load: float
    forward: float
    effects: float
    edit: float
    knockout: float
    capture: float
    batch: int
    size: int

    def fragile(self, count: int) -> float:
        """Return the seconds that cutting the last branches takes for some examples."""
        return self.capture + count * (self.load + self.forward + self.knockout)

    def critical(self, count: int) -> float:
        """Return the seconds that a search on half of some examples and a judgement on the other half take."""
        reads = 1 if count * self.size <= HELD else 1 + SEARCH_PASSES + JUDGE_PASSES
        search = self.effects + SEARCH_PASSES * self.forward + EDITS * self.edit
        judge = self.forward + (1 + DRAWS) * self.edit
        return 2 * self.capture + count * reads * self.load + count / 2 * (search + judge)

    def fitting(self, seconds: float, count: int) -> int:
        """Return how many of some examples a search and a judgement get through in a time."""
        while count > 0 and self.critical(count) > seconds:
            count = int(count * 0.95)
        return count


def measure(
    model: nn.Module, examples: Examples, knockout: ns.Edit | None, how: Mapping[str, Any], batch: int | None = None
) -> Costs:
    """Return what reading, forward passes, effects and edits cost, timed on a few examples.

    `knockout` is the cut whose time is taken, `how` says how the library calls the model. Without a `batch` the size of
    most examples a second is looked for.
    """
    count = len(examples.targets)
    places = torch.linspace(0, count - 1, min(count, 2 * (batch or BATCHES[-1]))).long()
    load, (whole, *_) = _timed(lambda: list(examples.batches(places, len(places))))
    best = batch or _batch(model, whole, how)
    few = picked(whole, slice(best))
    size = len(few[1])
    forward, _ = _timed(lambda: ns.evaluate(model, [few], **how), times=3)
    effects, found = _timed(lambda: ns.group_effects(model, [few], **how), times=2)
    order = found.values[0].abs().argsort(descending=True)[:TIMED].tolist()
    edits = {str(place): ns.zero_out(found.layout.neurons([place])) for place in order}
    capture, shared = _timed(lambda: shared_or_not(model, few, how))

    def swept(edits: Mapping[str, ns.Edit]) -> float:
        return _timed(lambda: ns.sweep(shared, edits, [few], **how), times=2)[0]

    base = swept({})
    cut = 0.0 if knockout is None else max(0.0, swept({"cut": knockout}) - base)
    leaves = whole[0].values() if isinstance(whole[0], Mapping) else [whole[0]]
    return Costs(
        load / len(places),
        forward / size,
        effects / size,
        max(0.0, swept(edits) - base) / max(1, len(edits)) / size,
        cut / size,
        capture + base,
        best,
        sum(leaf.numel() * leaf.element_size() for leaf in leaves) // len(places),
    )


def shared_or_not(model: nn.Module, batch: Any, how: Mapping[str, Any]) -> Any:
    """Return a capture of a model, or the model where it cannot be captured: then each edit costs a forward pass."""
    try:
        return ns.share(model, batch, **how)
    except ns.CaptureError:
        return model


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


def _timed(call: Callable[[], T], times: int = 1) -> tuple[float, T]:
    """Return the seconds of a call, the least of some, and what it returned."""
    least = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        value = call()
        least = min(least, time.perf_counter() - started)
    return least, value
