"""What a neuron is, on every architecture; sets of neurons obey the laws of sets; selecting by hand."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings
from kinds import built, few, layer_of, named, tensor_of
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import CASES, FAST, Case, Custom, Rows, Tied, UNet, every_case, fast_case, small_case

import neuronsurgery as ns
from neuronsurgery import Layer, Layout, Neuron, Neurons

DESCRIBED = {"a.weight": Rows(0, 4, (3,)), "b.weight": Rows(1, 3, (2, 2)), "a.bias": Rows(0, 4, ())}
LAYOUT = Layout(tuple(replace(layer_of(name, rows), position=i) for i, (name, rows) in enumerate(DESCRIBED.items())))
EVERY = [Neuron(layer, index) for layer in LAYOUT for index in range(layer.count)]


def found(layout: Layout) -> dict[str, Rows]:
    """What is found, as the zoo describes it: how a layer cuts a tensor of marks says its axis and its groups."""
    return {layer.parameter: described(layer) for layer in layout}


def described(layer: Layer) -> Rows:
    axis = int("i n" in layer.pattern or "i) n" in layer.pattern)
    return Rows(axis, layer.count, layer.row_shape, layer.sizes.get("g", 1))


def neurons_of(chosen: set[Neuron], layout: Layout = LAYOUT) -> Neurons:
    by_layer: dict[str, Any] = {}
    for neuron in chosen:
        by_layer.setdefault(neuron.parameter, []).append(neuron.index)
    return ns.select(layout, by_layer)


# --- finding them ---------------------------------------------------------------------------------------------------


@every_case
def test_the_layers_are_those_of_the_architecture(case: Case) -> None:
    model = built(case.name)
    before = snapshot(model)
    layout = ns.find_layout(model)
    assert_unchanged(before, model)
    assert list(found(layout).items()) == list(case.layers.items())
    assert (len(layout), layout.count) == (case.layer_count, case.neuron_count)
    assert layout.digest == Layout(tuple(layer_of(name, rows) for name, rows in case.layers.items())).digest


@small_case
def test_rows_are_the_reference_s_and_come_back(case: Case) -> None:
    model = built(case.name)
    for layer in ns.find_layout(model):
        tensor = tensor_of(model, layer.parameter)
        every = torch.arange(layer.count)
        rows, expected = layer.take(tensor, every), case.layers[layer.parameter]
        assert torch.equal(rows, torch.stack(reference.rows(tensor, expected.axis, expected.groups)))
        back = layer.put(torch.zeros_like(tensor), every, rows)
        assert torch.equal(back, tensor) and back.stride() == tensor.stride()


@small_case
def test_a_mask_is_true_where_it_was_selected_and_selects_it_again(case: Case) -> None:
    model = built(case.name)
    layout = ns.find_layout(model)
    neurons = few(layout)
    masks = neurons.masks()
    assert ns.select(layout, masks) == neurons
    for name, indices in named(neurons.by_layer()).items():
        rows = case.layers[name]
        tensor = tensor_of(model, name)
        cut = torch.where(masks[name], torch.zeros_like(tensor), tensor)
        assert masks[name].dtype == torch.bool
        assert torch.equal(cut, reference.zeroed(tensor, rows.axis, rows.groups, indices))


@fast_case
def test_flat_numbers_go_there_and_back(case: Case) -> None:
    layout = ns.find_layout(built(case.name))
    everything = ns.select(layout, {"*": ...})
    assert layout.flat(everything).tolist() == list(range(layout.count))
    assert layout.neurons(range(layout.count)) == everything
    assert [layout.neuron(i) for i in range(layout.count)] == list(everything)
    some = few(layout)
    assert layout.neurons(layout.flat(some).tolist()) == some
    with pytest.raises(IndexError, match=rf"flat number {layout.count} is outside 0..{layout.count - 1}"):
        layout.neuron(layout.count)
    with pytest.raises(IndexError, match=rf"flat numbers -1..0 are not all in 0..{layout.count - 1}"):
        layout.neurons([0, -1])


def test_the_digest_tells_architectures_apart() -> None:
    digests = {name: ns.find_layout(built(name)).digest for name in FAST}
    assert digests.pop("weight_norm") == digests["mlp"]
    assert len(set(digests.values())) == len(digests)
    assert ns.find_layout(nn.Linear(2, 3)).digest != ns.find_layout(nn.Linear(3, 2)).digest


def test_the_digest_does_not_change_between_versions() -> None:
    assert LAYOUT.digest == "45cc226125f6caf22f593aca5ddf10c351aa1d75a33326437ff0ac8c0394d54a"


# --- asking for others ----------------------------------------------------------------------------------------------


def test_where_takes_a_glob_globs_and_a_predicate() -> None:
    model = CASES["residual"].build()
    assert list(found(ns.find_layout(model, where="b?.weight"))) == ["b1.weight", "b2.weight"]
    assert list(found(ns.find_layout(model, where=["fc.*", "stem.*"]))) == ["stem.weight", "fc.weight"]
    asked = []

    def strided(name: str, module: nn.Module, parameter: Tensor) -> bool:
        asked.append((name, module, parameter))
        return isinstance(module, nn.Conv2d) and module.stride == (2, 2)

    assert list(found(ns.find_layout(model, where=strided))) == ["b1.weight", "down.weight"]
    assert [name for name, _, _ in asked] == list(CASES["residual"].layers)
    assert all(model.get_submodule(name[: -len(".weight")]) is module for name, module, _ in asked)
    assert all(parameter is module.weight for _, module, parameter in asked)


def test_a_predicate_sees_the_tensor_that_a_parametrization_computes() -> None:
    model = CASES["weight_norm"].build()
    seen: dict[str, Tensor] = {}
    ns.find_layout(model, where=lambda name, _, parameter: seen.setdefault(name, parameter) is parameter)
    assert torch.equal(seen["0.weight"], model[0].weight)


def test_extra_adds_biases_embeddings_and_tables_in_the_model_s_order() -> None:
    layout = ns.find_layout(CASES["gru"].build(), extra=["embed.weight", "*.bias*"])
    assert found(layout)["embed.weight"] == Rows(0, 11, (5,))
    assert found(layout)["fc.bias"] == Rows(0, 3, ())
    assert list(found(layout)) == [name for name, _ in CASES["gru"].build().named_parameters()]
    custom = ns.find_layout(Custom(), where="fc.weight", extra=["cls_token", "shift", "position_*"])
    assert found(custom) == {
        "shift": Rows(0, 1, (6,)),
        "position_bias_table": Rows(0, 3, (4,)),
        "cls_token": Rows(0, 2, (4,)),
        "fc.weight": Rows(0, 3, (4,)),
    }


@pytest.mark.parametrize("embedding", [nn.Embedding(6, 4), nn.EmbeddingBag(6, 4)], ids=["Embedding", "EmbeddingBag"])
def test_embeddings_are_left_out_unless_asked_for(embedding: nn.Module) -> None:
    model = nn.Sequential(embedding, nn.Linear(4, 2))
    assert list(found(ns.find_layout(model))) == ["1.weight"]
    assert found(ns.find_layout(model, extra="0.*"))["0.weight"] == Rows(0, 6, (4,))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_answers_to_each_of_its_names(head_first: bool) -> None:
    model = Tied(head_first)
    first, second = ("head.weight", "embed.weight") if head_first else ("embed.weight", "head.weight")
    layout = ns.find_layout(model, extra=second)
    assert layout.aliases == ((second, first),)
    assert first in layout and second in layout and layout[second] is layout[first]
    assert ns.select(layout, {second: (0, 3)}) == ns.select(layout, {first: (0, 3)})
    assert ns.select(layout, {first: 0, second: 3}) == ns.select(layout, {first: (0, 3)})
    assert layout == ns.find_layout(model, extra=first)
    assert layout.flat(ns.select(layout, {second: 0})).tolist() == [layout.starts[layout[first]]]


@pytest.mark.parametrize("name", ["shared_module", "shared_parameter"])
def test_a_shared_weight_is_one_layer_under_its_first_name(name: str) -> None:
    layout = ns.find_layout(CASES[name].build(), where="second.weight", extra="*.bias")
    assert next(iter(found(layout))) == "first.weight"
    assert ("second.weight", "first.weight") in layout.aliases
    assert (("second.bias", "first.bias") in layout.aliases) == (name == "shared_module")


def test_hugging_face_s_conv1d_is_known_by_its_class_and_not_by_a_name() -> None:
    class Derived(Conv1D):
        pass

    for kind in (Conv1D, Derived):
        assert found(ns.find_layout(kind(6, 4))) == {"weight": Rows(1, 6, (4,))}
    namesake = type("Conv1D", (nn.Linear,), {})
    assert found(ns.find_layout(namesake(4, 6))) == {"weight": Rows(0, 6, (4,))}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_channel_of_a_transposed_convolution_is_silenced_by_its_neuron(dims: int, groups: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = kind(8, 12, 3, groups=groups, bias=False)
    layout = ns.find_layout(layer)
    x = torch.randn(2, 8, *[4] * dims)
    for channel in (0, 5, 11):
        outputs = ns.apply(ns.zero_out(ns.select(layout, {"weight": channel})), layer)(x)
        silent = outputs.abs().transpose(0, 1).flatten(1).amax(1) == 0
        assert silent.nonzero().flatten().tolist() == [channel]


def test_every_axis_of_an_in_projection_and_of_gates_is_counted() -> None:
    assert ns.find_layout(nn.MultiheadAttention(8, 2))["in_proj_weight"].count == 24
    assert ns.find_layout(nn.LSTM(5, 6))["weight_hh_l0"].count == 24
    assert ns.find_layout(nn.Linear(5, 1))["weight"] == layer_of("weight", Rows(0, 1, (5,)))
    assert ns.find_layout(nn.Linear(1, 5))["weight"] == layer_of("weight", Rows(0, 5, (1,)))


# --- the laws of sets -----------------------------------------------------------------------------------------------

chosen = st.sets(st.sampled_from(EVERY))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(chosen, chosen)
def test_neurons_are_sets(a: set[Neuron], b: set[Neuron]) -> None:
    left, right = neurons_of(a), neurons_of(b)
    for result, expected in [(left | right, a | b), (left & right, a & b), (left - right, a - b)]:
        assert set(result) == expected
        assert len(result) == len(expected)
        assert bool(result) == bool(expected)
        assert list(result) == [neuron for neuron in EVERY if neuron in expected]
        assert result == neurons_of(expected) and hash(result) == hash(neurons_of(expected))
    assert (left == right) == (a == b)
    assert set(left) == a and set(right) == b
    assert all((neuron in left) == (neuron in a) for neuron in EVERY)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(chosen)
def test_neurons_survive_every_other_form(a: set[Neuron]) -> None:
    neurons = neurons_of(a)
    assert ns.select(LAYOUT, named(neurons.by_layer())) == neurons
    assert ns.select(LAYOUT, neurons.masks()) == neurons
    assert LAYOUT.neurons(LAYOUT.flat(neurons).tolist()) == neurons
    assert pickle.loads(pickle.dumps(neurons)) == copy.deepcopy(neurons) == copy.copy(neurons) == neurons
    assert "\n" not in repr(neurons)


def test_a_set_is_the_same_whatever_layout_it_came_from() -> None:
    model = CASES["residual"].build()
    whole, part = ns.find_layout(model), ns.find_layout(model, where=["fc.*", "b2.*"])
    one, other = (ns.select(layout, {"fc.weight": 1, "b2.weight": (2, 0)}) for layout in (whole, part))
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert len(one | other) == 3 and one & other == one and not one - other
    assert list(map(str, one | other)) == ["b2.weight[0]", "b2.weight[2]", "fc.weight[1]"]
    with_bias = ns.select(ns.find_layout(model, extra="fc.bias"), {"fc.bias": ...})
    assert len(one | with_bias) == 6


def test_neurons_are_immutable_and_no_tuple() -> None:
    neurons = neurons_of({EVERY[0]})
    with pytest.raises(AttributeError, match="Neurons are immutable; 'parts' cannot be set"):
        neurons.parts = ()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unsupported operand"):
        neurons | {EVERY[0]}  # type: ignore[operator]
    assert neurons != {EVERY[0]} and "a.weight[0]" not in neurons
    assert Neuron(LAYOUT["a.weight"], 4) not in neurons
    assert Neuron(layer_of("none", Rows(0, 4, (3,))), 0) not in neurons


def test_sets_of_two_models_do_not_mix_and_every_mismatch_is_named() -> None:
    others = {"a.weight": Rows(0, 5, (3,)), "b.weight": Rows(0, 3, (2, 2)), "c": Rows(0, 2, (1,))}
    other = Layout(tuple(layer_of(name, rows) for name, rows in others.items()))
    ours, theirs = neurons_of(set(EVERY)), ns.select(other, {"*": 0})
    for operation in (Neurons.__or__, Neurons.__and__, Neurons.__sub__):
        with pytest.raises(ValueError, match=r"different models:\n  a\.weight: of .*4, 3.*\n  b\.weight: of .*3, 2, 2"):
            operation(ours, theirs)
    assert len(ns.select(LAYOUT, {"a.bias": 0}) | ns.select(other, {"c": 0})) == 2


def test_what_they_print() -> None:
    layout = ns.find_layout(CASES["resnet18"].build())
    assert repr(Neurons()) == "0 neurons in 0 layers"
    assert repr(ns.select(layout, {"conv1.weight": 3})) == "1 neuron in 1 layer: conv1.weight[3]"
    everything = repr(ns.select(layout, {"*": ...}))
    assert everything.startswith("4803 neurons in 21 layers: conv1.weight[0, 1, 2, 3, 4, 5, 6, 7, ...], ")
    assert everything.endswith(", ... and 9 more") and "\n" not in everything
    assert len(repr(layout).splitlines()) <= 20
    assert repr(layout).startswith("Layout: 4803 neurons in 21 layers\n  conv1.weight: 64 neurons of 3x7x7")
    assert repr(LAYOUT["a.bias"]) == "a.bias: 4 neurons of scalar"


# --- selecting by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (2, [2]),
        ((3, 0, 3), [0, 3]),
        ([], []),
        (slice(1, None, 2), [1, 3]),
        (slice(-1, None), [3]),
        (range(2), [0, 1]),
        (torch.tensor([1, 3]), [1, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.tensor([[True], [False], [False], [True]]), [0, 3]),
        ([True, False, False, False], [0]),
        (torch.tensor([1, 2]).numpy(), [1, 2]),
        (..., [0, 1, 2, 3]),
    ],
    ids=repr,
)
def test_every_way_to_write_indices(indices: Any, expected: list[int]) -> None:
    assert [neuron.index for neuron in ns.select(LAYOUT, {"a.weight": indices})] == expected


def test_globs_and_repeated_names_are_united() -> None:
    assert named(ns.select(LAYOUT, {"*.weight": 0, "a.*": (0, 1)}).by_layer()) == {
        "a.weight": (0, 1),
        "b.weight": (0,),
        "a.bias": (0, 1),
    }


def test_a_mask_of_a_grouped_transposed_convolution_marks_whole_neurons() -> None:
    layout = ns.find_layout(UNet(groups=2), where="up.*")
    mask = ns.select(layout, {"up.weight": (1, 4)}).masks()["up.weight"]
    assert mask.shape == (8, 3, 1, 1) and int(mask.sum()) == 8
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match=r"up\.weight: the mask marks a part of neurons \[0, 1, 2\] only"):
        ns.select(layout, {"up.weight": mask})
