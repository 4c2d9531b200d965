"""What an audit costs: a few batches are timed, and from these numbers each step's time and the share that fits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples

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

    def critical(self, count: int, edits: int = EDITS, draws: int = DRAWS) -> float:
        """Return the seconds that a search on half of some examples and a judgement on the other half take."""
        reads = 1 if count * self.size <= HELD else 1 + SEARCH_PASSES + JUDGE_PASSES
        half = count / 2
        search = half * (self.effects + SEARCH_PASSES * self.forward + edits * self.edit)
        judge = half * (self.forward + (1 + draws) * self.edit)
        return 2 * self.capture + count * reads * self.load + search + judge

    def fitting(self, seconds: float, count: int) -> int:
        """Return how many of some examples a search and a judgement get through in a time."""
        while count > 0 and self.critical(count) > seconds:
            count = int(count * 0.95)
        return count


def measure(
    model: nn.Module, examples: Examples, knockout: ns.Edit | None, how: Mapping[str, Any], batch: int | None = None
) -> Costs:
    """Return what reading, forward passes, effects and edits cost, timed on a few examples.

    Args:
        model: in evaluation mode; not changed.
        examples: what is audited; some of them are read.
        knockout: the cut whose time is taken, or None.
        how: arguments of the library's functions that say how the model is called.
        batch: examples in a batch; None looks for the size of most examples a second.
    """
    count = len(examples.targets)
    places = torch.linspace(0, count - 1, min(count, 2 * (batch or BATCHES[-1]))).long()
    load, held = _timed(lambda: list(examples.batches(places, len(places))))
    whole = held[0]
    best = batch or _batch(model, whole, how)
    few = _few(whole, best)
    size = len(few[1])
    forward, _ = _timed(lambda: ns.evaluate(model, [few], **how), again=2)
    effects, found = _timed(lambda: ns.group_effects(model, [few], **how), again=1)
    layout = found.layout
    order = found.values[0].abs().argsort(descending=True)[:TIMED].tolist()
    edits = {str(place): ns.zero_out(layout.neurons([place])) for place in order}
    started = time.perf_counter()
    shared = shared_or_not(model, few, how)
    capture = time.perf_counter() - started
    base, _ = _timed(lambda: ns.sweep(shared, {}, [few], **how), again=1)
    several, _ = _timed(lambda: ns.sweep(shared, edits, [few], **how), again=1)
    cut = 0.0
    if knockout is not None:
        cut = max(0.0, _timed(lambda: ns.sweep(shared, {"cut": knockout}, [few], **how), again=1)[0] - base)
    return Costs(
        load / len(places),
        forward / size,
        effects / size,
        max(0.0, several - base) / max(1, len(edits)) / size,
        cut / size,
        capture + base,
        best,
        sum(leaf.numel() * leaf.element_size() for leaf in _leaves(whole)) // len(places),
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
        few = _few(whole, size)
        seconds, _ = _timed(lambda few=few: ns.evaluate(model, [few], **how), again=1)
        if seconds / len(few[1]) > 0.97 * least or len(few[1]) < size:
            break
        best, least = size, seconds / size
    return best


def _few(batch: Any, count: int) -> Any:
    inputs, targets = batch
    picked = {k: v[:count] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[:count]
    return picked, targets[:count]


def _leaves(batch: Any) -> Iterable[Tensor]:
    inputs, _ = batch
    return inputs.values() if isinstance(inputs, Mapping) else [inputs]


def _timed(call: Any, again: int = 0) -> tuple[float, Any]:
    """Return the seconds of a call, the least of some, and what it returned."""
    least, value = float("inf"), None
    for _ in range(1 + again):
        started = time.perf_counter()
        value = call()
        least = min(least, time.perf_counter() - started)
    return least, value
