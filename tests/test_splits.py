"""Halves are disjoint, equal and the same in any order; controls are as hard as what they are matched to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuronsurgery as ns

N = 60
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 2
G = (torch.arange(N) % 7 == 0).long()


def stream(order: Tensor, size: int = 16) -> list[Any]:
    return [(X[part], Y[part], G[part]) for part in order.split(size)]


def contents(loader: Any) -> list[tuple[float, ...]]:
    return [tuple(row) for batch in loader for row in batch.args[0].tolist()]


def test_halves_are_disjoint_complete_and_equal_in_every_group() -> None:
    first, second = (contents(half) for half in ns.halves(stream(torch.arange(N))))
    assert not set(first) & set(second)
    assert Counter(first + second) == Counter(map(tuple, X.tolist()))
    groups = {tuple(row): int(g) for row, g in zip(X.tolist(), G, strict=True)}
    for group in (0, 1):
        assert abs(sum(groups[r] == group for r in first) - sum(groups[r] == group for r in second)) <= 1


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(N)), st.integers(1, 40))
def test_the_order_and_the_batches_make_no_difference(order: list[int], size: int) -> None:
    first, _ = ns.halves(stream(torch.tensor(order), size))
    assert set(contents(first)) == set(contents(ns.halves(stream(torch.arange(N)))[0]))


def test_a_half_says_what_it_is() -> None:
    assert repr(ns.halves(stream(torch.arange(N)))[0]) == "half of a list: 31 examples"


def test_another_seed_is_another_split() -> None:
    assert set(contents(ns.halves(stream(torch.arange(N)), seed=1)[0])) != set(
        contents(ns.halves(stream(torch.arange(N)))[0])
    )


def test_copies_stay_together_whatever_their_group_and_label() -> None:
    twice = torch.cat([torch.arange(N), torch.arange(0, N, 3)])
    data = [(X[twice], torch.arange(len(twice)) % 2, torch.arange(len(twice)) % 3)]
    first, second = (contents(half) for half in ns.halves(data))
    assert not set(first) & set(second)
    assert len(first) + len(second) == len(twice)


def test_a_mapping_gives_mappings() -> None:
    loaders = {g: [(X[group == g], Y[group == g])] for group in [G] for g in (0, 1)}
    first, second = ns.halves(loaders)
    assert isinstance(first, dict)
    assert list(first) == [0, 1]
    assert [len(contents(first[g])) + len(contents(second[g])) for g in (0, 1)] == [int((g == G).sum()) for g in (0, 1)]


def test_a_shuffling_loader_is_read_anew() -> None:
    loader = DataLoader(TensorDataset(X, Y, G), batch_size=8, shuffle=True)
    first, second = ns.halves(loader)
    for _ in range(2):
        assert not set(contents(first)) & set(contents(second))
        assert len(contents(first)) + len(contents(second)) == N


class Augmented:
    """Another noise in every pass; its examples are known by their indices."""

    def __iter__(self) -> Iterator[ns.Batch]:
        for part in torch.arange(N).split(16):
            noise = torch.randn(len(part), 3)
            yield ns.Batch((X[part] + noise,), {}, Y[part], tuple(G[part].tolist()), tuple(part.tolist()))


def test_what_varies_needs_a_key() -> None:
    with pytest.raises(ValueError, match=r"other examples than the first one did .* pass key="):
        ns.halves(Augmented())
    first, second = ns.halves(Augmented(), key=lambda batch: batch.indices)
    indices = [{i for batch in half for i in batch.indices} for half in (first, second)]
    assert not indices[0] & indices[1]
    assert indices[0] | indices[1] == set(range(N))


def test_a_later_pass_that_differs_is_refused() -> None:
    data = stream(torch.arange(N))
    first, _ = ns.halves(data)
    data[0] = (data[0][0] + 1, *data[0][1:])
    with pytest.raises(ValueError, match="pass key="):
        list(first)
    data = stream(torch.arange(N))
    first, _ = ns.halves(data)
    del data[1]
    with pytest.raises(ValueError, match="examples of this half, not"):
        list(first)


@pytest.mark.parametrize(
    ("loaders", "options", "said"),
    [
        ([], {}, "the loader yielded no batch"),
        (iter(stream(torch.arange(N))), {}, "nothing in a second pass"),
        (stream(torch.arange(N)), {"key": lambda batch: [1]}, "gave 1 names for a batch of 16 examples"),
        (stream(torch.arange(N)), {"seed": -1}, "seed must be an integer of at least 0"),
        ([((X.to_sparse(),), Y)], {}, "cannot be told apart in a batch that holds"),
        ([((torch.zeros(2, 3),), Y[:5])], {}, "no input of a batch has one entry per example"),
    ],
)
def test_what_cannot_be_halved(loaders: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ns.halves(loaders, **options)


# Controls


def line() -> nn.Module:
    """Its margin is the one input, for class 0."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5], [-0.5]]))
    return model


def labelled(values: dict[str, list[float]]) -> dict[str, list[Any]]:
    return {g: [(torch.tensor(v)[:, None], torch.zeros(len(v), dtype=torch.int64))] for g, v in values.items()}


def test_each_example_takes_the_nearest_that_is_left() -> None:
    data = labelled({"few": [1.0, 3.0, 9.0], "many": [0.9, 1.4, 3.3, 5.0, -2.0], "rest": [1.0]})
    control = ns.matched(data, "few", "many", line())
    assert (control.count, control.unmatched) == (2, 1)
    assert control.gap == pytest.approx(0.2)
    assert control.largest_gap == pytest.approx(0.3)
    groups: dict[Any, list[float]] = {}
    for batch in control:
        for group, value in zip(batch.groups, batch.args[0][:, 0].tolist(), strict=True):
            groups.setdefault(group, []).append(round(value, 4))
    assert groups == {
        "few": [1.0, 3.0, 9.0],
        "many like few": [0.9, 3.3],
        "many": [1.4, 5.0, -2.0],
        "rest": [1.0],
    }
    assert repr(control) == "many like few: 2 examples, 1 unmatched, margins 0.200 apart on average"


def margins_of(control: ns.Matched) -> list[float]:
    """The margins of the examples that were matched, under the model `line`."""
    return sorted(
        value
        for batch in control
        for group, value in zip(batch.groups or (), batch.args[0][:, 0].tolist(), strict=True)
        if group == control.name
    )


def test_a_loader_that_shuffles_is_matched_by_its_own_margins() -> None:
    generator = torch.Generator().manual_seed(3)
    x, zeros = torch.randn(200, 1, generator=generator), torch.zeros(200, dtype=torch.int64)
    own = x[:30, 0].tolist()
    data = TensorDataset(x, zeros, (torch.arange(200) >= 30).long())
    control = ns.matched(DataLoader(data, 16, shuffle=True, generator=generator), 0, 1, line())
    found = margins_of(control)
    assert len(found) == control.count
    assert control.unmatched == 0
    # As a sorted pairing is never worse on average than the one that was made.
    assert sum(abs(a - b) for a, b in zip(found, sorted(own), strict=True)) / 30 <= control.gap + 1e-6


def test_a_control_of_examples_that_vary_is_refused() -> None:
    data = {"few": [(torch.zeros(2, 1), torch.zeros(2).long())], "many": Varying()}
    control = ns.matched(data, "few", "many", line())
    with pytest.raises(ValueError, match=r"gives other examples than those that were matched \(0 of 1 come again\)"):
        list(control)


class Varying:
    """Other inputs in each pass, of much the same margins."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield torch.full((4, 1), 0.01 * self.passes) + 0.001 * torch.arange(4)[:, None], torch.zeros(4).long()


def test_groups_may_be_numbers_of_numpy_and_torch() -> None:
    data = [(X, Y, G)]
    expected = ns.matched(data, 1, 0, nn.Linear(3, 2))
    for number in (np.int64, torch.tensor):
        control = ns.matched(data, number(1), number(0), nn.Linear(3, 2))
        assert control.name == expected.name


def test_no_example_is_a_control_of_itself() -> None:
    data = labelled({"few": [1.0, 3.0], "many": [1.0, 1.2, 3.0, 3.3, 5.0]})
    assert margins_of(ns.matched(data, "few", "many", line())) == pytest.approx([1.2, 3.3])
    with pytest.raises(ValueError, match="no example of 'many' has a margin within"):
        ns.matched(data | {"many": data["few"]}, "few", "many", line())


@pytest.mark.parametrize("form", [Tensor.numpy, Tensor.clone, Tensor.tolist])
def test_a_key_may_be_a_row_of_numbers(form: Any) -> None:
    long = [(torch.arange(8)[:, None] * 1e-9 + torch.ones(2000, dtype=torch.float64), torch.zeros(8).long())]
    expected = set(contents(ns.halves(long, key=lambda batch: [str(row.tolist()) for row in batch.args[0]])[0]))
    assert len(expected) == 4
    assert set(contents(ns.halves(long, key=lambda batch: form(batch.args[0]))[0])) == expected


def test_what_cannot_be_matched() -> None:
    data = labelled({"few": [1.0], "many": [7.0]})
    with pytest.raises(ValueError, match=r"no example of 'many' has a margin within 0\.5 of one of 'few'"):
        ns.matched(data, "few", "many", line())
    with pytest.raises(ValueError, match="cannot be matched by its own examples"):
        ns.matched(data, "few", "few", line())
    with pytest.raises(KeyError, match="no group 'other'"):
        ns.matched(data, "other", "many", line())
