"""Choosing by scores: the laws of topk, sample, ranks and contrast, and what `Scores` shows of itself."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import named
from torch import Tensor, nn
from zoo import CASES, Case, small_case

import neuronsurgery as ns
from neuronsurgery import Layout, Neurons, Scores

WIDTHS = (2, 5, 1, 4)  # neurons of the layers of `layout()`
COUNT = sum(WIDTHS)
few_values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=COUNT, max_size=COUNT)  # many ties
settled = settings(deadline=None, max_examples=60)


def layout(widths: Sequence[int] = WIDTHS) -> Layout:
    return ns.find_layout(nn.ModuleList([nn.Linear(2, width) for width in widths]))


LAYOUT = layout()


def scores(*rows: Sequence[float], names: tuple[int | str, ...] | None = None, of: Layout = LAYOUT) -> Scores:
    groups = names or tuple(range(len(rows)))
    return Scores(torch.tensor(rows, dtype=torch.float32), groups, (0,) * len(rows), of, "made up")


def numbers(chosen: Neurons, of: Layout = LAYOUT) -> list[int]:
    return of.flat(chosen).tolist()


def as_layers(row: Sequence[float]) -> dict[str, Tensor]:
    values = torch.tensor(row).split(list(WIDTHS))
    return dict(zip((layer.parameter for layer in LAYOUT), values, strict=True))


# --- topk and top_fraction ------------------------------------------------------------------------------------------


@settled
@given(row=few_values, k=st.integers(1, COUNT))
def test_topk_is_the_reference_with_ties_to_the_lower_number(row: list[float], k: int) -> None:
    assert numbers(ns.topk(scores(row), k)) == reference.topk(row, k)
    assert numbers(ns.topk(scores(row), k, per="layer")) == reference.topk_per_layer(as_layers(row), k)


@settled
@given(rows=st.lists(few_values, min_size=1, max_size=3), k=st.integers(1, COUNT))
def test_topk_of_groups_is_the_union_and_grows_with_k(rows: list[list[float]], k: int) -> None:
    many = scores(*rows)
    chosen = ns.topk(many, k)
    assert numbers(chosen) == reference.union(reference.topk(row, k) for row in rows)
    assert chosen == ns.topk(many, k, per="model")
    assert all(not len(ns.topk(many[group], k) - chosen) for group in many.groups)
    assert not len(ns.topk(many, max(1, k - 1)) - chosen)


def test_topk_per_layer_takes_small_layers_whole() -> None:
    chosen = ns.topk(scores(range(COUNT)), 3, per="layer")
    assert [len(indices) for indices in named(chosen.by_layer()).values()] == [2, 3, 1, 3]
    assert len(ns.topk(scores(range(COUNT)), 10**9, per="layer")) == COUNT
    assert len(ns.topk(scores(range(COUNT)), np.int64(2))) == 2  # type: ignore[arg-type]


@settled
@given(row=few_values, fraction=st.floats(1e-6, 1.0))
def test_top_fraction_is_topk_of_the_rounded_share(row: list[float], fraction: float) -> None:
    k = max(1, round(fraction * COUNT))
    assert ns.top_fraction(scores(row), fraction) == ns.topk(scores(row), k)
    per_layer = [reference.topk(v.tolist(), max(1, round(fraction * len(v)))) for v in as_layers(row).values()]
    found = named(ns.top_fraction(scores(row), fraction, per="layer").by_layer())
    assert [list(indices) for indices in found.values()] == per_layer


def test_the_fraction_one_is_everything_and_a_tiny_one_is_one_neuron() -> None:
    assert len(ns.top_fraction(scores(range(COUNT)), 1)) == COUNT
    assert numbers(ns.top_fraction(scores(range(COUNT)), 1e-4)) == [COUNT - 1]


# --- ranks, contrast, overlap ---------------------------------------------------------------------------------------


@settled
@given(rows=st.lists(few_values, min_size=1, max_size=3), chosen=st.sets(st.integers(0, COUNT - 1)))
def test_ranks_are_the_share_of_neurons_that_score_no_more(rows: list[list[float]], chosen: set[int]) -> None:
    found = ns.ranks(scores(*rows), of=LAYOUT.neurons(chosen))
    expected = [[reference.percentile_ranks(row)[i] for i in sorted(chosen)] for row in rows]
    assert found.shape == (len(rows), len(chosen))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).reshape(found.shape))


def test_the_largest_ranks_100_and_all_equal_rank_100() -> None:
    row = list(range(COUNT))
    assert ns.ranks(scores(row), of=ns.topk(scores(row), 1)).tolist() == [[100.0]]
    assert ns.ranks(scores([1.0] * COUNT), of=LAYOUT.neurons([0, 5])).tolist() == [[100.0, 100.0]]


def test_ranks_follow_the_order_of_the_set_and_refuse_another_model() -> None:
    smaller = ns.find_layout(nn.ModuleDict({"3": nn.Linear(2, 4), "0": nn.Linear(2, 2)}))
    of = ns.select(smaller, {"0.weight": 1, "3.weight": 0})
    expected = [100 * (LAYOUT.flat(ns.select(LAYOUT, {n.parameter: n.index})).item() + 1) / COUNT for n in of]
    assert ns.ranks(scores(range(COUNT)), of=of).tolist() == [pytest.approx(expected)]
    with pytest.raises(ValueError, match=r"the neurons do not fit the layout, 1 mismatched:\n  9\.weight: not in the"):
        ns.ranks(scores(range(COUNT)), of=ns.select(layout([2] * 10), {"9.weight": 0}))


def test_contrast_is_the_log_ratio() -> None:
    a, b = torch.rand(COUNT).tolist(), torch.rand(COUNT).tolist()
    both = scores(a, b, names=("blond man", "dark man"))
    found = ns.contrast(both, of="blond man", against="dark man")
    expected = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(found.values, torch.tensor([expected]))
    assert found.groups == ("blond man / dark man",)
    back = ns.contrast(both, of="dark man", against="blond man")
    torch.testing.assert_close(found.values, -back.values)


def test_contrast_of_signed_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ratio of scores of at least 0, and some of these .* are negative"):
        ns.contrast(scores([1.0] * (COUNT - 1) + [-1.0], [2.0] * COUNT), of=1, against=0)


def test_contrast_of_zeros_is_finite() -> None:
    row = [1.0, 0.0] + [0.0] * (COUNT - 2)
    found = ns.contrast(scores(row, row[::-1]), of=0, against=1).values[0]
    assert found[0].item() == pytest.approx(math.log(1e12), rel=1e-5)
    assert found[1].item() == 0
    assert not ns.contrast(scores([0.0] * COUNT), of=0, against=0).values.any()
    tiny = scores([1e-30] * COUNT, [2e-30] * COUNT)
    assert ns.contrast(tiny, of=1, against=0).values[0, 0].item() == pytest.approx(math.log(2), rel=1e-5)


@settled
@given(a=st.sets(st.integers(0, COUNT - 1)), b=st.sets(st.integers(0, COUNT - 1)))
def test_overlap_is_jaccards(a: set[int], b: set[int]) -> None:
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert ns.overlap(LAYOUT.neurons(a), LAYOUT.neurons(b)) == expected
    assert ns.overlap(LAYOUT.neurons(b), LAYOUT.neurons(a)) == expected


# --- sample ---------------------------------------------------------------------------------------------------------


@settled
@given(seed=st.integers(0, 2**70), k=st.integers(1, COUNT), more=st.integers(0, COUNT))
def test_a_smaller_sample_is_a_part_of_a_larger(seed: int, k: int, more: int) -> None:
    few, many = ns.sample(LAYOUT, k, seed=seed), ns.sample(LAYOUT, min(COUNT, k + more), seed=seed)
    assert len(few) == k
    assert not len(few - many)
    assert few == ns.sample(LAYOUT, k, seed=seed)


@settled
@given(population=st.sets(st.integers(0, COUNT - 1), min_size=2), without=st.sets(st.integers(0, COUNT - 1)))
def test_what_is_excluded_is_never_drawn_and_the_population_is_never_left(
    population: set[int], without: set[int]
) -> None:
    left = population - without
    neurons, exclude = LAYOUT.neurons(population), LAYOUT.neurons(without)
    if left:
        assert set(numbers(ns.sample(neurons, len(left), seed=3, exclude=exclude))) == left
        assert set(numbers(ns.sample(neurons, 1, seed=3, exclude=exclude))) <= left
    with pytest.raises(ValueError, match=f"k must be an integer from 1 to the {len(left)} neurons there are to draw"):
        ns.sample(neurons, len(left) + 1, seed=3, exclude=exclude)


def test_the_draw_depends_on_names_and_seed_alone() -> None:
    """Leaving out neurons or layers does not change the order in which the others come."""
    everything = ns.sample(LAYOUT, 6, seed=1)
    rest = ns.sample(LAYOUT, 5, seed=1, exclude=LAYOUT.neurons([numbers(everything)[0]]))
    assert everything - LAYOUT.neurons([numbers(everything)[0]]) == rest
    alone = ns.select(LAYOUT, {"1.weight": ...})
    drawn = ns.sample(alone, 2, seed=1)
    assert drawn == ns.sample(layout((9, 5, 9)), 19, seed=1) & drawn


def test_golden_samples() -> None:
    """The same on every machine and in every version: a published control group stays that group."""
    golden = {0: [2, 6, 8, 10], 1: [1, 4, 8, 10], 2**64: [0, 3, 4, 8]}
    assert {seed: numbers(ns.sample(LAYOUT, 4, seed=seed)) for seed in golden} == golden


def test_samples_are_uniform() -> None:
    """Each of the 12 neurons in a quarter of 2000 draws of 3: 500, with a standard deviation below 20."""
    counts = [0] * COUNT
    for seed in range(2000):
        for number in numbers(ns.sample(LAYOUT, 3, seed=seed)):
            counts[number] += 1
    assert sum(counts) == 6000
    assert all(400 < count < 600 for count in counts)
    assert sum((count - 500) ** 2 / 500 for count in counts) < 31  # chi-square of 11 degrees: 1 in 1000


def test_samples_touch_no_global_generator() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    first = ns.sample(LAYOUT, 3, seed=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tobytes())
    torch.manual_seed(99)
    assert ns.sample(LAYOUT, 3, seed=5) == first


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_groups_are_found_by_name_and_never_by_position() -> None:
    both = scores([1.0] * COUNT, [2.0] * COUNT, names=(1, 0))
    assert both[0].values.unique().item() == 2
    assert both[1].groups == (1,)
    named = scores([1.0] * COUNT, names=("blond man",))
    for group in (0, -1, "blond"):
        with pytest.raises(KeyError, match=f"no group {group!r}; there are 'blond man'"):
            named[group]


def test_by_layer_and_records_say_the_same() -> None:
    both = scores(range(COUNT), range(0, -COUNT, -1), names=("a", "b"))
    split = named(both.by_layer())
    assert [tuple(values.shape) for values in split.values()] == [(2, width) for width in WIDTHS]
    records = both.to_records()
    assert len(records) == 2 * COUNT
    where = {"parameter": "1.weight", "pattern": "n ... -> n ...", "index": 1}
    assert records[3] == {"group": "a", **where, "criterion": "made up", "value": 3.0}
    for record in records:
        row = both.groups.index(record["group"])
        assert split[record["parameter"]][row, record["index"]] == record["value"]


def test_scores_are_values() -> None:
    one, other = scores(range(COUNT)), scores(range(COUNT))
    assert one == other
    assert one != scores(range(1, COUNT + 1))
    assert one != scores(range(COUNT), names=("x",))
    assert one != 3
    with pytest.raises(TypeError, match="unhashable type: 'Scores'"):
        hash(one)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        one.counts = (1,)  # type: ignore[misc]


def test_scores_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"scores of 1 groups and 12 neurons have shape \(1, 12\), not \(1, 3\)"):
        scores([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="as many counts as groups, not 2"):
        Scores(torch.zeros(1, COUNT), (0,), (1, 2), LAYOUT, "made up")


@pytest.mark.parametrize("groups", [1, 16, 17, 200])
def test_repr_has_at_most_20_lines(groups: int) -> None:
    text = repr(scores(*[range(COUNT)] * groups))
    assert len(text.splitlines()) <= 20
    assert text.splitlines()[0] == "Scores: made up of 12 neurons in 4 layers"
    assert text.splitlines()[1] == "  0: largest 11 at 3.weight[3], median 5"
    assert (f"... and {groups - 16} more" in text) == (groups > 16)


# --- magnitudes and norms -------------------------------------------------------------------------------------------


@small_case
def test_magnitudes_are_the_reference(case: Case) -> None:
    model = case.build()
    found = ns.magnitudes(model)
    assert (found.groups, found.counts, found.layout.count) == (("all",), (0,), case.neuron_count)
    expected = reference.magnitudes(model, case.axes)
    for name, values in named(found.by_layer()).items():
        torch.testing.assert_close(values[0].double(), expected[name], rtol=1e-6, atol=0)


def test_magnitudes_of_some_layers_and_of_biases() -> None:
    model = CASES["mlp"].build()
    assert ns.magnitudes(model, where="0.*").layout.count == 7
    biases = named(ns.magnitudes(model, extra="*.bias").by_layer())["2.bias"][0]
    torch.testing.assert_close(biases, model[2].bias.detach().abs())  # type: ignore[index,union-attr]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_keep_their_ranking_where_squares_leave_the_range(scale: float, dtype: torch.dtype) -> None:
    layer = ns.find_layout(nn.Linear(2, 4))["weight"]
    rows = scale * torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 1.0]], dtype=torch.float64)
    found = layer.norms(rows.to(dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double() / scale, torch.tensor([5.0, 0, 10, 1]).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_named(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1:3, 0] = bad
    with pytest.raises(ValueError, match=r"weights are NaN or infinite in 1 layers:\n  0\.weight: 2 of 4 neurons"):
        ns.magnitudes(model)
    assert ns.magnitudes(model, where="1.*").layout.count == 2
