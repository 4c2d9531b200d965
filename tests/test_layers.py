"""Patterns: what is taken and put back, by laws that hold for any shape and any pattern."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import built
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery import Layer, Layout

law = settings(deadline=None, max_examples=150, derandomize=True)


# --- random patterns ------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A pattern with the sizes of all of its axes, and the shape that it is for."""

    pattern: str
    sizes: dict[str, int]
    shape: tuple[int, ...]

    @property
    def layer(self) -> Layer:
        return Layer("w", self.pattern, self.sizes, self.shape)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Up to three dimensions, each of one or two axes; the neuron is one to three of these, the rest its row."""
    names = iter("abcdefgh")
    dims = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=1, max_size=3))
    axes = [[(next(names), size) for size in dim] for dim in dims]
    flat = draw(st.permutations([axis for dim in axes for axis in dim]))
    count = draw(st.integers(1, min(3, len(flat))))
    left = " ".join(f"({' '.join(n for n, _ in dim)})" if len(dim) > 1 else dim[0][0] for dim in axes)
    neuron = " ".join(name for name, _ in flat[:count])
    right = " ".join([f"({neuron})" if count > 1 else neuron, *(name for name, _ in flat[count:])])
    return Cut(f"{left} -> {right}", dict(flat), tuple(prod(dim) for dim in dims))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(prod(shape))).reshape(shape)


def reference_rows(cut: Cut, weight: Tensor) -> Tensor:
    """The rows as einops alone gives them, with the neuron in parentheses as it is written."""
    return rearrange(weight, cut.pattern, **cut.sizes)


@law
@given(cuts())
def test_the_rows_are_those_of_einops(cut: Cut) -> None:
    weight, layer = numbered(cut.shape), cut.layer
    expected = reference_rows(cut, weight)
    assert (layer.count, layer.row_shape) == (len(expected), tuple(expected.shape[1:]))
    assert torch.equal(layer.take(weight, torch.arange(layer.count)), expected)


@law
@given(cuts(), st.data())
def test_taking_and_putting_back_is_the_identity(cut: Cut, data: st.DataObject) -> None:
    weight, layer = numbered(cut.shape), cut.layer
    some = data.draw(st.lists(st.integers(0, layer.count - 1), unique=True, max_size=5))
    index = torch.tensor(some, dtype=torch.int64)
    before = weight.clone()
    assert torch.equal(layer.put(weight, index, layer.take(weight, index)), weight)
    marked = layer.put(weight, index, torch.full((len(some), *layer.row_shape), -1.0))
    assert torch.equal(marked == -1, layer.mask(some).expand(cut.shape))
    assert torch.equal(torch.where(marked == -1, weight, marked), before)
    assert torch.equal(weight, before), "the weight itself is never changed"


@law
@given(cuts(), st.data())
def test_the_strides_stay_whatever_they_are(cut: Cut, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(cut.shape))))
    back = [order.index(i) for i in range(len(order))]
    weight = torch.randn([cut.shape[i] for i in order]).permute(back)
    edited = cut.layer.put(weight, torch.tensor([0]), torch.zeros(1, *cut.layer.row_shape))
    assert edited.stride() == weight.stride()
    apart = torch.randn(*cut.shape, 2)[..., 1]
    assert cut.layer.put(apart, torch.tensor([0]), torch.zeros(1, *cut.layer.row_shape)).stride() == apart.stride()


@law
@given(cuts())
def test_slices_are_a_view(cut: Cut) -> None:
    """Where einops gives a view: always, with the neuron's axes unjoined."""
    weight = numbered(cut.shape)
    slices = cut.layer.slices(weight)
    assert slices.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert torch.equal(slices.reshape(cut.layer.count, *cut.layer.row_shape), reference_rows(cut, weight))


@law
@given(cuts(), st.data())
def test_masks_of_disjoint_neurons_are_disjoint_and_cover_the_parameter(cut: Cut, data: st.DataObject) -> None:
    layer = cut.layer
    parts = [[i for i in range(layer.count) if i % 3 == part] for part in range(3)]
    masks = [layer.mask(part) for part in parts]
    assert all(mask.dim() == len(cut.shape) and torch.broadcast_to(mask, cut.shape) is not None for mask in masks)
    assert torch.equal(sum(mask.expand(cut.shape).int() for mask in masks), torch.ones(cut.shape, dtype=torch.int32))
    layout = Layout((layer,))
    some = ns.select(layout, {"w": data.draw(st.sampled_from(parts))})
    assert ns.select(layout, some.masks()) == some


class Weight(nn.Module):
    """One parameter, and nothing to run."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))


@law
@given(cuts())
def test_zeroing_all_neurons_zeroes_the_parameter(cut: Cut) -> None:
    model = Weight(cut.shape)
    everything = ns.select(Layout((cut.layer,)), {"w": ...})
    assert ns.bake(ns.zero_out(everything), model).w.abs().max() == 0
    assert torch.equal(ns.bake(ns.scale(everything, 2.0), model).w, 2 * model.w)


@law
@given(cuts())
def test_norms_equal_those_of_the_rows(cut: Cut) -> None:
    weight = torch.randn(cut.shape)
    expected = reference_rows(cut, weight.double()).flatten(1).norm(dim=1) if cut.layer.row_shape else None
    expected = reference_rows(cut, weight.double()).abs() if expected is None else expected
    torch.testing.assert_close(cut.layer.norms(weight).double(), expected, rtol=1e-6, atol=1e-7)


@law
@given(cuts())
def test_norms_over_a_coarse_pattern_are_the_root_of_the_sum_of_squares_over_a_finer_one(cut: Cut) -> None:
    left, right = cut.pattern.split(" -> ")
    neuron = re.match(r"\(([^)]*)\)|(\w+)", right)
    assert neuron is not None
    names = (neuron[1] or neuron[2]).split()
    row = right[neuron.end() :].split()
    if not row:
        return
    finer = Layer("w", f"{left} -> ({' '.join([*names, row[0]])}) {' '.join(row[1:])}", cut.sizes, cut.shape)
    weight = torch.randn(cut.shape)
    split = finer.norms(weight).reshape(cut.layer.count, cut.sizes[row[0]])
    torch.testing.assert_close(cut.layer.norms(weight), split.square().sum(1).sqrt(), rtol=1e-5, atol=1e-6)


@law
@given(cuts(), st.permutations("pqrstuvw"))
def test_layers_spelt_otherwise_are_equal_and_have_one_digest(cut: Cut, letters: list[str]) -> None:
    other = cut.pattern.translate(str.maketrans("abcdefgh", "".join(letters)))
    sizes = {name.translate(str.maketrans("abcdefgh", "".join(letters))): size for name, size in cut.sizes.items()}
    one, two = cut.layer, Layer("w", f"  {other} ", sizes, cut.shape)
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    assert Layout((one,)).digest == Layout((two,)).digest
    assert one != Layer("v", cut.pattern, cut.sizes, cut.shape)


@law
@given(cuts(), cuts())
def test_layers_are_equal_only_if_they_take_the_same(one: Cut, two: Cut) -> None:
    if one.shape != two.shape:
        assert one.layer != two.layer
        return
    weight = numbered(one.shape)
    rows = [reference_rows(cut, weight) for cut in (one, two)]
    same = rows[0].shape == rows[1].shape and torch.equal(*rows)
    assert (one.layer == two.layer) == same
    assert (Layout((one.layer,)).digest == Layout((two.layer,)).digest) == same


def test_a_digest_is_that_of_a_default_pattern_however_it_is_spelt() -> None:
    for pattern, spelt, sizes in (
        ("n ... -> n ...", "out i h w -> out i h w", {}),
        ("n ... -> n ...", "(a b) i h w -> (a b) i h w", {"b": 2}),
        ("i n ... -> n i ...", "a b h w -> b a h w", {}),
        ("i n ... -> n i ...", "(g i) n ... -> (g n) i ...", {"g": 1}),
    ):
        layers = Layer("w", pattern, {}, (4, 6, 3, 3)), Layer("w", spelt, sizes, (4, 6, 3, 3))
        assert layers[0] == layers[1] and layers[0].key == layers[1].key == "w"
        assert Layout(layers[:1]).digest == Layout(layers[1:]).digest
        assert layers[1].kind == "neuron"


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1), (1, 4), (6, 1), (4, 4), (6, 2, 3)])
def test_every_default_pattern_is_told_from_every_other(shape: tuple[int, ...]) -> None:
    layers = [Layer("w", "n ... -> n ...", {}, shape), Layer("w", "i n ... -> n i ...", {}, shape)]
    layers += [Layer("w", "(g i) n ... -> (g n) i ...", {"g": g}, shape) for g in (2, 3) if shape[0] % g == 0]
    weight = numbered(shape)
    for i, one in enumerate(layers):
        for other in layers[i + 1 :]:
            mine, theirs = (layer.take(weight, torch.arange(layer.count)) for layer in (one, other))
            assert (one == other) == (mine.shape == theirs.shape and torch.equal(mine, theirs))


# --- one layer ------------------------------------------------------------------------------------------------------

HEADS = ("e (head d) -> head e d", {"d": 4})


def test_what_a_layer_prints() -> None:
    heads = Layer("o.weight", *HEADS, (8, 12))
    assert repr(heads) == "o.weight: 3 heads of 8x4" and heads.kind == "head"
    experts = Layer("down", "e h i -> (e i) h", {}, (2, 3, 4))
    assert repr(experts) == "down: 8 neurons (e i) of 3" and experts.kind == "e i"
    layout = Layout((heads,))
    assert repr(ns.select(layout, {"o.weight": (0, 2)})) == "2 neurons in 1 layer: o.weight[head 0, 2]"
    assert str(layout.neuron(2)) == "o.weight[head 2]"
    assert repr(ns.select(Layout((experts,)), {"down": 7})) == "1 neuron in 1 layer: down[e 1 i 3]"
    assert repr(Layer("w", "n ... -> n ...", {}, (4, 3))) == "w: 4 neurons of 3"


def test_a_layer_survives_copying_and_pickling() -> None:
    heads = Layer("o.weight", *HEADS, (8, 12), position=3)
    for again in (pickle.loads(pickle.dumps(heads)), copy.deepcopy(heads), copy.copy(heads)):
        assert again == heads and again.position == 3 and dict(again.sizes) == {"d": 4}
    with pytest.raises(TypeError, match="does not support item assignment"):
        heads.sizes["d"] = 3  # type: ignore[index]


UNFIT: dict[str, tuple[Any, str]] = {
    "no arrow": (("n i", {}), "a pattern has an arrow with the neuron behind it"),
    "nothing behind the arrow": (("n i ->", {}), "a pattern has an arrow with the neuron behind it"),
    "an ellipsis first": (("n i -> ... n i", {}), r"the neuron, .*, has named axes, not '\.\.\.'"),
    "no axis": (("n i -> () n i", {}), r"has named axes, not '\(\)'"),
    "a number": (("n i -> 1 n i", {}), "has named axes, not '1'"),
    "parentheses in the row": (("n (a b) -> n (a b)", {"a": 2}), "only the neuron, .* may stand in parentheses"),
    "a lost axis": (("n i -> n", {}), "only on one side"),
    "an unknown axis": (("n i -> n i j", {}), "only on one side"),
    "twice": (("n n -> n n", {}), "contains duplicate dimension"),
    "a size that does not divide": (("e (head d) -> head e d", {"d": 5}), "divide axis"),
    "a size that is not there": (("e (head d) -> head e d", {}), "Could not infer sizes"),
    "a size of nothing": (("n i -> n i", {"k": 2}), "k"),
    "too many dimensions": (("n i j -> n i j", {}), "Wrong shape"),
    "too few": (("n -> n", {}), "Wrong shape"),
}


@pytest.mark.parametrize(("said", "reason"), UNFIT.values(), ids=UNFIT)
def test_a_pattern_that_does_not_fit_says_why_in_one_line(said: Any, reason: str) -> None:
    pattern, sizes = said
    message = rf"^w: the pattern {re.escape(repr(pattern))} does not fit shape \(8, 12\) with sizes .*: .*{reason}"
    with pytest.raises(ValueError, match=message) as raised:
        Layer("w", pattern, sizes, (8, 12))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=rf"0\.weight: the pattern .*\n1\.weight: the pattern .*{reason}"):
        ns.find_layout(nn.Sequential(nn.Linear(12, 8), nn.Linear(12, 8)), patterns={"*": said})


# --- in a model -----------------------------------------------------------------------------------------------------


def test_patterns_by_hand_recut_what_is_found() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    layout = ns.find_layout(model, patterns={"0.weight": HEADS})
    assert [layer.count for layer in layout] == [3, 3] and layout["0.weight"].kind == "head"
    both = ns.find_layout(model, patterns={"0.weight": "n i -> n i", "*.weight": "i n -> n i"})
    assert [layer.count for layer in both] == [8, 8], "the first entry that matches counts"
    with pytest.raises(
        KeyError, match=r"no layer matches '2\.\*'; nearest are .*; patterns= adds no layer, extra= does"
    ):
        ns.find_layout(model, patterns={"2.*": "i n -> n i"})


def test_a_module_says_how_its_parameters_are_cut() -> None:
    class Right(nn.Module):
        """x @ W; and a table of one dimension, which nobody else would take for a layer."""

        neuron_patterns: ClassVar = {"weight": "i n -> n i", "gain": ("(n two) -> n two", {"two": 2})}

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(14))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * self.gain.reshape(7, 2).sum(1)

    model, x = nn.Sequential(Right(), nn.Linear(7, 2)), torch.randn(4, 5)
    layout = ns.find_layout(model)
    assert {layer.parameter: layer.count for layer in layout} == {"0.weight": 7, "0.gain": 7, "1.weight": 2}
    silent = ns.apply(ns.zero_out(ns.select(layout, {"0.weight": 6})), model)[0](x)
    assert silent[:, 6].abs().max() == 0 and silent[:, :6].abs().min() > 0
    by_hand = ns.find_layout(model, patterns={"0.weight": "n i -> n i"})
    assert by_hand["0.weight"].count == 5, "what the caller says stands above what the module says"


def test_every_scorer_takes_a_layout() -> None:
    model, data = built("mlp"), [(torch.randn(6, 5), torch.tensor([0, 1, 2] * 2), torch.tensor([0, 1] * 3))]
    columns = ns.find_layout(model, where="0.*", patterns={"*": "n i -> i n"})
    found = ns.group_grad_norms(model, data, layout=columns)
    assert found.layout == columns and found.values.shape == (2, 5)
    whole = ns.group_grad_norms(model, data, where="0.*")
    torch.testing.assert_close(found.values.square().sum(1), whole.values.square().sum(1))
    weight = model[0].weight.detach()  # type: ignore[index,union-attr]
    torch.testing.assert_close(ns.magnitudes(model, layout=columns).values[0], weight.norm(dim=0))
    gradients = {"0.weight": torch.ones(7, 5)}
    torch.testing.assert_close(ns.grad_norms(gradients, columns).values, torch.full((1, 5), 7**0.5))


def test_a_layout_of_another_model_is_refused_with_every_mismatch() -> None:
    other = ns.find_layout(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 2)))
    data = [(torch.randn(6, 5), torch.tensor([0, 1, 2] * 2))]
    message = (
        r"the layout does not fit the model, 3 mismatched:\n  0\.weight: expected shape \(6, 5\), the model has "
        r"\(7, 5\)\n  2\.weight: expected .*\n  3\.weight: not in the model; nearest are"
    )
    for refused in (
        lambda **o: ns.group_grad_norms(built("mlp"), data, **o),
        lambda **o: ns.magnitudes(built("mlp"), **o),
    ):
        with pytest.raises(ValueError, match=message):
            refused(layout=other)
        with pytest.raises(
            ValueError, match="layout= says already which layers: give where= and extra= to find_layout"
        ):
            refused(layout=ns.find_layout(built("mlp")), where="0.*")
        with pytest.raises(TypeError, match="layout= is what find_layout returns, not a str"):
            refused(layout="0.*")


def test_the_largest_of_a_mixed_layout_is_refused_but_not_of_each_layer() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    mixed = ns.magnitudes(model, layout=ns.find_layout(model, patterns={"0.weight": HEADS}))
    for choose in (lambda **o: ns.topk(mixed, 2, **o), lambda **o: ns.top_fraction(mixed, 0.5, **o)):
        with pytest.raises(ValueError, match=r"mixes neurons of several kinds: head \(1 layer\), neuron \(1 layer\)"):
            choose()
        assert len(choose(per="layer")) == 4


def test_one_parameter_has_one_pattern_in_a_layout() -> None:
    layers = Layer("w", "n i -> n i", {}, (2, 2)), Layer("w", "i n -> n i", {}, (2, 2))
    with pytest.raises(ValueError, match="a layout cuts each parameter in one way only, but has several for w"):
        Layout(layers)


# --- sets that mix patterns -----------------------------------------------------------------------------------------

MODEL = Weight((4, 6))
ROWS, PAIRS = (
    Layout((Layer("w", "n i -> n i", {}, (4, 6)),)),
    Layout((Layer("w", "e (pair d) -> pair e d", {"d": 2}, (4, 6)),)),
)
COLUMNS = Layout((Layer("w", "e c -> c e", {}, (4, 6)),))


def entries(neurons: ns.Neurons) -> set[tuple[int, int]]:
    """The entries that some neurons cover, by their marks alone."""
    return {tuple(at) for mask in neurons.masks().values() for at in mask.expand(4, 6).nonzero().tolist()}


mixed_sets = st.builds(
    lambda *chosen: functools.reduce(
        ns.Neurons.__or__,
        (ns.select(layout, {"w": some}) for layout, some in zip((ROWS, PAIRS, COLUMNS), chosen, strict=True)),
    ),
    *(st.lists(st.integers(0, top), max_size=3) for top in (3, 2, 5)),
)


@law
@given(mixed_sets, mixed_sets)
def test_the_algebra_of_mixed_sets_is_that_of_their_entries(a: ns.Neurons, b: ns.Neurons) -> None:
    assert entries(a | b) == entries(a) | entries(b)
    assert a & b == b & a and entries(a & b) <= entries(a) & entries(b)
    assert {str(n) for n in a - b} == {str(n) for n in a if n not in b and not entries(only(n)) <= entries(b)}
    assert (a - b) | (a & b) | a == a | (a & b)
    union = len(entries(a) | entries(b))
    if len({layer.kind for layer in (a | b).by_layer()}) > 1:
        assert ns.overlap(a, b) == pytest.approx(len(entries(a) & entries(b)) / union)
    assert bool((a | b).overlapping()) == (sum(len(entries(only(n))) for n in a | b) > union)


def only(neuron: ns.Neuron) -> ns.Neurons:
    return ns.Neurons({neuron.layer: (neuron.index,)})


def test_a_head_is_its_columns() -> None:
    head, columns = ns.select(PAIRS, {"w": 1}), ns.select(COLUMNS, {"w": (2, 3)})
    assert head != columns and entries(head) == entries(columns)
    assert not head - columns and not columns - head
    assert len(head & columns) == 3 and ns.overlap(head, columns) == 1.0
    assert head - ns.select(COLUMNS, {"w": 2}) == head, "a part of it does not cover it"
    assert ns.overlap(ns.select(ROWS, {"w": 0}), ns.select(COLUMNS, {"w": 0})) == pytest.approx(1 / 9)


def test_edits_of_sets_that_share_entries_are_refused_unless_twice_is_once() -> None:
    both = ns.select(ROWS, {"w": 0}) | ns.select(COLUMNS, {"w": 0})
    then = {"w": torch.zeros(4, 6) - 1}
    for refused in (
        lambda: ns.scale(both, 2.0),
        lambda: ns.random_init(both, std=1.0),
        lambda: ns.random_noise(both, std=1.0),
        lambda: ns.rewind(both, then, 0.5),
    ):
        with pytest.raises(ValueError, match=r"would edit these twice: w is cut in several ways; .*compose"):
            refused()
    cut = ns.bake(ns.zero_out(both), MODEL).w
    assert torch.equal(cut == 0, both.masks()["w"].expand(4, 6))
    back = ns.bake(ns.rewind(both, then), MODEL).w
    assert torch.equal(back == -1, both.masks()["w"].expand(4, 6))


def test_disjoint_parts_of_one_parameter_read_it_as_it_stood() -> None:
    """A draw relative to the whole layer must not see the other part's draw."""
    one, two = ns.select(PAIRS, {"w": 0}), ns.select(COLUMNS, {"w": 5})
    together = ns.bake(ns.random_init(one | two, relative_std=3.0, seed=1), MODEL).w
    apart = [ns.bake(ns.random_init(part, relative_std=3.0, seed=1), MODEL).w for part in (one, two)]
    expected = torch.where(one.masks()["w"].expand(4, 6), apart[0], apart[1])
    assert torch.equal(together, torch.where(two.masks()["w"].expand(4, 6), apart[1], expected))


def test_edits_of_two_patterns_compose_in_their_order_in_every_way() -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    layout = ns.find_layout(model)
    rows = ns.select(layout, {"weight": (0, 1)})
    pairs = ns.select(ns.find_layout(model, patterns={"*": ("e (pair d) -> pair e d", {"d": 2})}), {"weight": 1})
    first, second = ns.scale(rows, 3.0), ns.random_noise(pairs, relative_std=1.0, seed=2)
    for edits in ((first, second), (second, first)):
        edit = ns.compose(*edits)
        weight = model.weight.detach().clone()
        for each in edits:  # one after the other, on a plain model
            plain = nn.Linear(6, 4)
            plain.load_state_dict({"weight": weight, "bias": model.bias})
            weight = ns.bake(each, plain).weight.detach()
        views = ns.apply(edit, model), ns.apply(edits[1], ns.apply(edits[0], model)), ns.bake(edit, model)
        assert all(torch.equal(view.weight, weight) for view in views)
        assert torch.equal(ns.edited_parameters(edit, model)["weight"], weight)
        data = [(x, torch.tensor([0, 1, 2]))]
        swept = ns.sweep(model, {"both": edit}, data, metric=ns.cross_entropy)
        assert swept["both"] == ns.evaluate(views[0], data, metric=ns.cross_entropy)
        parts = [torch.tensor(list(indices)) for indices in pairs.by_layer().values()]
        (layer,) = pairs.by_layer()
        assert torch.equal(edit.rows(layer, parts[0], model.weight.detach()), layer.take(weight, parts[0]))


def test_every_pattern_has_draws_of_its_own() -> None:
    drawn = []
    for layout in (ROWS, PAIRS, COLUMNS):
        edited = ns.bake(ns.random_init(ns.select(layout, {"w": 1}), std=1.0, seed=5), MODEL).w
        drawn.append(edited[layout.layers[0].mask([1]).expand(4, 6)][:4])
    samples = [ns.sample(layout, 1, seed=s) for layout in (PAIRS, ROWS) for s in range(20)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert [n.index for s in samples[:20] for n in s] != [n.index for s in samples[20:] for n in s]
    assert all(a != b for a, b in pairwise(layout.layers[0].key for layout in (ROWS, PAIRS)))


# --- units of real layers, by hand ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_head_cut_by_hand_is_silent() -> None:
    attention, x = nn.MultiheadAttention(12, 3, batch_first=True).eval(), torch.randn(2, 5, 12)
    nn.init.normal_(attention.out_proj.bias)
    heads = ns.find_layout(attention, where="out_proj.*", patterns={"*": HEADS})
    cut = ns.apply(ns.zero_out(ns.select(heads, {"*": 1})), attention)
    inputs: list[Tensor] = []
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = cut(x, x, x)[0]
        q, k, v = (
            (x @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        )
        inputs.append(torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    inputs[0][:, 1] = 0
    by_hand = inputs[0].transpose(1, 2).reshape(2, 5, 12) @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(found, by_hand)


def test_all_gates_of_a_unit_are_one_neuron() -> None:
    lstm = nn.LSTM(3, 5)
    gates = ns.find_layout(lstm, patterns={"weight_*": ("(gate unit) i -> unit gate i", {"gate": 4})})
    rows = ns.find_layout(lstm)
    unit, four = ns.select(gates, {"*": 2}), ns.select(rows, {"*": (2, 7, 12, 17)})
    assert unit.masks().keys() == four.masks().keys()
    assert all(
        torch.equal(unit.masks()[name].expand(20, -1), four.masks()[name].expand(20, -1)) for name in unit.masks()
    )
    for name, parameter in ns.bake(ns.zero_out(unit), lstm).named_parameters():
        if name.startswith("weight"):
            assert parameter.reshape(4, 5, -1)[:, 2].abs().max() == 0


def test_a_unit_of_an_expert_is_cut_alone() -> None:
    experts = Weight((3, 4, 5))
    layout = ns.find_layout(experts, patterns={"w": "e h i -> (e i) h"})
    assert layout["w"].count == 15 and str(layout.neuron(7)) == "w[e 1 i 2]"
    cut = ns.bake(ns.zero_out(ns.select(layout, {"w": 7})), experts).w
    assert torch.equal(
        cut == 0,
        torch.zeros(3, 4, 5).index_put((torch.tensor(1), torch.arange(4), torch.tensor(2)), torch.tensor(1.0)) == 1,
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_has_its_neurons_still() -> None:
    layout = ns.find_layout(nn.Linear(0, 4))
    assert [layer.count for layer in layout] == [4]
