"""Edits that are run as one behind their layers give the bits that each gives alone, or are not run as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from test_fills import data_of, zeroing
from test_sweeps import assert_equal_one_by_one, every_kind, fingerprint, one_by_one
from torch import Tensor, nn
from zoo import Case, tiered

import neuronsurgery as ns
from neuronsurgery.graph import stacks, trust
from neuronsurgery.graph.stacks import Stacks, Tail
from neuronsurgery.sweeps import ROUNDED


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often so many edits were run as one, wherever the bits allow it: the clock has no say."""
    monkeypatch.setattr(trust, "WORTH", 0.0)  # a capture for whatever there is to run
    monkeypatch.setattr(stacks, "_is_quicker", lambda stacked, alone: True)
    monkeypatch.setattr(stacks, "WORTH", 0)
    found: Counter[int] = Counter()
    logits = Stacks.logits

    def noted(self: Stacks, graph: Any, tail: Tail, runs: Sequence[list[Any]], inputs: Any) -> list[Tensor]:
        found[len(runs) if (tail, len(runs)) in self._known else 0] += 1  # 0: a check, which runs each alone
        return logits(self, graph, tail, runs, inputs)

    monkeypatch.setattr(Stacks, "logits", noted)
    return found


def alone(widths: Mapping[int, int]) -> bool:
    return not any(width > 1 for width in widths)


class Wide(nn.Module):
    """Convolutions with a skip connection, whose head writes the size of the batch out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, 3)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.relu(self.norm(self.first(x)))
        own = own + torch.relu(self.second(own))
        return self.head(own.reshape(x.shape[0], -1))


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


# Equality


@tiered("mlp", "residual", "unet_grouped", "attention", "custom", "keyword", "bilinear", "shared_module")
def test_the_zoo_gives_the_bits_of_one_by_one(case: Case, widths: Counter[int]) -> None:
    model = case.build()
    edits = zeroing(model) | every_kind(model)
    assert_equal_one_by_one(model, edits, case.batches(sizes=(4, 4, 3, 4, 3)))


@pytest.mark.parametrize("size", [2, 5, 16])
def test_edits_of_a_small_batch_are_run_as_one(size: int, widths: Counter[int]) -> None:
    model = built(Wide)
    swept = assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(size, size, size)))
    assert swept.reasons == ()
    assert max(widths) == min(8, 128 // size)


def test_edited_layers_themselves_are_run_for_each_edit(widths: Counter[int]) -> None:
    model = built(Wide)
    layout = ns.find_layout(model, where=["first*", "second*"])
    edits = {f"{i} {by}": ns.scale(layout.neurons([i]), by) for i in range(layout.count) for by in (0.5, 2.0)}
    edits |= {f"{i}, {i + 8}": ns.scale(layout.neurons([i, i + 8]), 3.0) for i in range(8)}
    assert_equal_one_by_one(model, edits, data_of(*images(4, 4, 4)))
    assert not alone(widths)


def test_what_starts_from_an_edited_run_is_run_as_one(widths: Counter[int]) -> None:
    model = built(Wide)
    layout = ns.find_layout(model)
    first = [ns.zero_out(ns.select(layout, {"first.weight": i})) for i in range(2)]
    second = [ns.zero_out(ns.select(layout, {"second.weight": i})) for i in range(8)]
    edits = {f"{i} {j}": ns.compose(a, b) for i, a in enumerate(first) for j, b in enumerate(second)}
    assert_equal_one_by_one(model, edits, data_of(*images(4, 4, 4)))
    assert set(widths) == {0, 8}


# Where they are not


def test_a_batch_that_fills_the_caches_is_run_alone(widths: Counter[int]) -> None:
    model = built(Wide)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(65, 65)))
    assert not widths


class OfTheBatch(Wide):
    """Its logits are relative to the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - logits.mean(0)


@pytest.mark.parametrize("exact", [True, False])
def test_examples_that_depend_on_each_other_are_run_alone(exact: bool, widths: Counter[int]) -> None:
    model, data = built(OfTheBatch), data_of(*images(4, 4, 4))
    edits = zeroing(model, most=8)
    swept = ns.sweep(model, edits, data, metric=fingerprint, exact=exact)
    for label, values in one_by_one(model, edits, data).items():
        assert torch.equal(swept.values(label), values), label
    assert alone(widths)
    assert swept.reasons == ()


class OfTheBatchInside(Wide):
    """One of its operators looks at the whole batch; its logits do not show it."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0 * logits.abs().cumsum(0)


def test_logits_that_agree_are_not_enough(widths: Counter[int]) -> None:
    model = built(OfTheBatchInside)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))
    assert alone(widths)


class OfTwo(Wide):
    """Its head takes batches of one size only."""

    def forward(self, x: Tensor) -> Tensor:
        own = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(own.reshape(4, -1))


def test_a_size_that_is_written_into_the_model_is_no_error(widths: Counter[int]) -> None:
    model = built(OfTwo)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))
    assert alone(widths)


def test_what_takes_longer_is_run_alone(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_is_quicker", lambda stacked, alone: False)
    model = built(Wide)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))
    assert set(widths) == {0}


def test_a_few_stacks_are_not_worth_a_look(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "WORTH", 4)
    model = built(Wide)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))  # one stack of 8 a batch
    assert not widths
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4, 4)))
    assert not alone(widths)


def test_what_does_not_fit_the_memory_is_run_alone(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stacks, "_stacked", full)
    model = built(Wide)
    assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))
    assert alone(widths)


# Rounding


def rounded(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Have what is run as one differ in every entry."""
    stacked = Stacks._stacked

    def off(self: Stacks, *args: Any) -> list[Tensor]:
        return [logits * (1 + by) for logits in stacked(self, *args)]

    monkeypatch.setattr(Stacks, "_stacked", off)


def test_other_bits_are_refused(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rounded(monkeypatch, 1e-6)
    model = built(Wide)
    swept = assert_equal_one_by_one(model, zeroing(model, most=8), data_of(*images(4, 4, 4)))
    assert alone(widths)
    assert swept.reasons == ()


def test_other_bits_are_taken_where_that_is_asked_for_and_said(
    widths: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded(monkeypatch, 1e-6)
    model, data = built(Wide), data_of(*images(4, 4, 4))
    edits = zeroing(model, most=8)
    swept = ns.sweep(model, edits, data, metric=ns.margin, exact=False)
    exact = ns.sweep(model, edits, data, metric=ns.margin)
    assert swept.reasons == (ROUNDED,)
    assert exact.reasons == ()
    for label in edits:
        torch.testing.assert_close(swept.values(label), exact.values(label), rtol=1e-4, atol=1e-4)
    assert not all(torch.equal(swept.values(label), exact.values(label)) for label in edits)


def test_more_than_rounding_is_never_taken(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rounded(monkeypatch, 1e-3)
    model, data = built(Wide), data_of(*images(4, 4, 4))
    edits = zeroing(model, most=8)
    swept = ns.sweep(model, edits, data, metric=ns.margin, exact=False)
    assert swept.reasons == ()
    assert all(torch.equal(ns.sweep(model, edits, data, metric=ns.margin).values(e), swept.values(e)) for e in edits)


def test_a_share_is_asked_anew(widths: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rounded(monkeypatch, 1e-6)
    model, data = built(Wide), data_of(*images(4, 4, 4))
    edits, shared = zeroing(model, most=8), ns.share(model, data[0])
    assert ns.sweep(shared, edits, data, metric=ns.margin, exact=False).reasons == (ROUNDED,)
    assert ns.sweep(shared, edits, data, metric=ns.margin).reasons == ()
