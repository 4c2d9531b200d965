"""Applying an edit: three ways that agree bit for bit, a view that shares every weight, and nothing else changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from kinds import KINDS, built, earlier, few, named, run, tensor_of
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from zoo import CASES, FAST, Case, Custom, Tied, fast_case, small_case

import neuronsurgery as ns
from neuronsurgery.surgery import EditedRows

SHARED = (
    "this view shares its weights with the model it was made from: (convert the|load into that) model.*apply again, or"
)
PARAMETRIZED = ("weight_norm", "spectral_norm")
NOT_BY_CALL = (*PARAMETRIZED, "shared_module")  # functional_call would overwrite their weights


def cut(model: nn.Module, chosen: dict[str, Any] | None = None, extra: str | None = None) -> ns.Edit:
    """Half of every layer zeroed, or what is chosen."""
    layout = ns.find_layout(model, extra=extra)
    return ns.zero_out(ns.select(layout, chosen or {"*": slice(0, None, 2)}))


def parameters(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters()}


def mlp() -> nn.Module:
    return CASES["mlp"].build()


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))


# --- the three ways -------------------------------------------------------------------------------------------------


@small_case
def test_apply_bake_and_edited_parameters_agree_bit_for_bit(case: Case) -> None:
    model, batch, checkpoint = built(case.name), case.batches(sizes=(2,))[0], earlier(case)
    args, kwargs, _, _ = reference.unpack(batch)
    neurons = few(ns.find_layout(model))
    with torch.no_grad():
        before = run(model, batch)
        for name, kind in KINDS.items():
            edit = kind.make(neurons, checkpoint)
            view, baked = ns.apply(edit, model), ns.bake(edit, model)
            outputs = run(view, batch)
            assert torch.equal(outputs, run(baked, batch)), name
            assert (outputs - before).abs().max() > 1e-4, name
            if case.name not in NOT_BY_CALL:
                edited = ns.edited_parameters(edit, model)
                by_call = functional_call(model, edited, args, kwargs)
                assert torch.equal(outputs, reference.logits_of(by_call)), name
                assert list(edited) == list(case.layers)
                assert all(same_bits(edited[layer], tensor_of(view, layer)) for layer in case.layers), name
            assert all(same_bits(tensor_of(view, layer), tensor_of(baked, layer)) for layer in case.layers), name


@pytest.mark.parametrize("name", NOT_BY_CALL)
def test_edited_parameters_are_refused_where_functional_call_would_overwrite_the_weights(name: str) -> None:
    model = CASES[name].build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"overwrite the .*: (0\.weight, 2|first)\.weight; bake the edit"):
        ns.edited_parameters(cut(model, None if name in PARAMETRIZED else {"first.weight": 1}), model)
    assert_unchanged(before, model)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(a, b)


@small_case
def test_a_view_shares_every_weight_and_has_the_same_neurons(case: Case) -> None:
    model = built(case.name)
    before = snapshot(model)
    view = ns.apply(cut(model), model)
    assert parameters(view) == parameters(model)
    assert len(list(view.parameters())) == len(list(model.parameters()))
    assert ns.find_layout(view) == ns.find_layout(model)
    assert isinstance(view, type(model))
    owned = {id(buffer) for buffer in model.buffers()} & {id(buffer) for buffer in view.buffers()}
    assert not owned
    assert_unchanged(before, model)


@small_case
def test_a_baked_model_is_plain_and_its_own(case: Case) -> None:
    model = built(case.name)
    baked = ns.bake(cut(model), model)
    assert not {tensor.untyped_storage().data_ptr() for tensor in baked.state_dict().values()} & {
        tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values() if tensor.numel()
    }
    if case.name not in PARAMETRIZED:
        assert list(baked.state_dict()) == list(model.state_dict())
        assert [type(module) for module in baked.modules()] == [type(module) for module in model.modules()]
    assert ns.find_layout(baked) == ns.find_layout(model)
    assert not any(parametrize.is_parametrized(module) for module in baked.modules())


@pytest.mark.parametrize("format_", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["residual", "unet", "unet_grouped"])
def test_an_edited_tensor_keeps_its_strides(name: str, format_: torch.memory_format) -> None:
    case = CASES[name]
    model = case.build().eval().to(memory_format=format_)
    edit = cut(model)
    view, baked, edited = ns.apply(edit, model), ns.bake(edit, model), ns.edited_parameters(edit, model)
    for layer in case.layers:
        strides = tensor_of(model, layer).stride()
        assert tensor_of(view, layer).stride() == tensor_of(baked, layer).stride() == edited[layer].stride() == strides
    x = case.batches()[0][0].to(memory_format=format_)
    assert torch.equal(view(x), baked(x)) and torch.equal(view(x), functional_call(model, edited, x))


def test_a_transposed_weight_keeps_its_strides() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.randn(4, 3).T)
    edit = cut(model)
    assert ns.apply(edit, model).weight.stride() == ns.bake(edit, model).weight.stride() == (1, 3)


@fast_case
def test_the_empty_set_is_the_identity(case: Case) -> None:
    model, batch = built(case.name), case.batches()[0]
    for edit in (ns.zero_out(ns.Neurons()), ns.compose(), ns.scale(ns.select(ns.find_layout(model), {"*": ()}), 3)):
        view = ns.apply(edit, model)
        assert torch.equal(run(view, batch), run(model, batch))
        assert list(view.state_dict()) == list(model.state_dict())
        assert torch.equal(run(ns.bake(edit, model), batch), run(model, batch))
        assert ns.edited_parameters(edit, model) == {}


# --- laws -----------------------------------------------------------------------------------------------------------


def weights(model: nn.Module, case: Case) -> list[Tensor]:
    return [tensor_of(model, name) for name in case.layers]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@fast_case
def test_zeroing_twice_is_zeroing_once(case: Case) -> None:
    model = built(case.name)
    once = ns.apply(cut(model), model)
    assert equal(weights(once, case), weights(ns.apply(cut(model), once), case))


# Every kind on two architectures, one kind that reads and scales on every other one.
TWICE = [(case, name) for case in ("residual", "tied") for name in KINDS]
TWICE += [(case, "rewind_half") for case in FAST if case not in ("residual", "tied")]


@pytest.mark.parametrize(("case", "name"), [pytest.param(CASES[c], name, id=f"{c}-{name}") for c, name in TWICE])
def test_applying_twice_is_applying_the_composition(case: Case, name: str) -> None:
    model, batch, checkpoint = built(case.name), case.batches()[0], earlier(case)
    layout = ns.find_layout(model)
    first = ns.random_noise(ns.select(layout, {"*": slice(0, None, 2)}), relative_std=0.4, seed=2)
    second = KINDS[name].make(few(layout), checkpoint)
    stacked = ns.apply(second, ns.apply(first, model))
    composed = ns.apply(ns.compose(first, second), model)
    assert equal(weights(stacked, case), weights(composed, case))
    assert torch.equal(run(stacked, batch), run(composed, batch))
    assert parameters(stacked) == parameters(model)
    baked = ns.bake(second, ns.apply(first, model))
    assert equal(weights(baked, case), weights(composed, case))
    assert not parameters(baked) & parameters(model)


@fast_case
def test_edits_of_disjoint_neurons_commute(case: Case) -> None:
    model = built(case.name)
    layout = ns.find_layout(model)
    chosen = few(layout)
    rest = ns.select(layout, {"*": ...}) - chosen
    a, b = ns.random_noise(chosen, relative_std=0.5, seed=1), ns.scale(rest, 0.5)
    assert equal(weights(ns.apply(ns.compose(a, b), model), case), weights(ns.apply(ns.compose(b, a), model), case))


@pytest.mark.parametrize("head_first", [False, True])
def test_an_edit_of_a_tied_weight_acts_on_every_use(head_first: bool) -> None:
    case = CASES["tied_head_first" if head_first else "tied"]
    model, tokens = case.build().eval(), case.batches()[0][0]
    edit = cut(model, {"head.weight": (1, 3)}, extra="embed.weight")
    edited = reference.zeroed(model.head.weight, 0, 1, [1, 3])
    expected = reference.with_tensors(model, {"head.weight": edited})(tokens)
    again = ns.apply(ns.scale(edit.neurons, 2.0), ns.apply(edit, model))
    for changed in (ns.apply(edit, model), ns.bake(edit, model), again):
        torch.testing.assert_close(changed(tokens).double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(changed.head.weight, edited) and torch.equal(changed.embed.weight, edited)
        assert ns.find_layout(changed, extra="embed.*") == ns.find_layout(model, extra="embed.*")
    by_call = functional_call(model, ns.edited_parameters(edit, model), tokens)
    assert torch.equal(by_call, ns.apply(edit, model)(tokens))
    assert ns.bake(edit, model).head.weight is not model.head.weight
    tied = ns.bake(edit, model)
    assert tied.head.weight is tied.embed.weight


def test_biases_and_tables_can_be_edited() -> None:
    model = CASES["custom"].build().eval()
    edit = cut(model, {"*bias": ..., "scale": 2, "cls_token": 1}, extra="*")
    view = ns.apply(edit, model)
    assert view.fc.bias.tolist() == [0, 0, 0] and view.scale.tolist()[2] == 0
    assert torch.equal(view(X), ns.bake(edit, model)(X)) and not torch.equal(view(X), model(X))


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[name] for name in FAST if name != "weight_norm"], ids=lambda case: case.name)
def test_gradients_reach_the_shared_weights_and_not_the_hidden_rows(case: Case) -> None:
    model, batches = case.build().eval(), case.batches(sizes=(3,))
    neurons = few(ns.find_layout(model))
    edit = ns.zero_out(neurons)
    gradients = reference.group_gradients(ns.bake(edit, model), {"all": batches}, case.layers)["all"]
    targets = reference.unpack(batches[0])[2]
    reference.cross_entropy(run(ns.apply(edit, model), batches[0]), targets).mean().backward()
    for name, gradient in gradients.items():
        site = case.layers[name]
        hidden = named(neurons.by_layer())[name]
        expected = reference.zeroed(gradient, site.axis, site.groups, hidden).float()
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        rows = reference.rows(found, site.axis, site.groups)
        assert all(rows[i].abs().max() == 0 for i in hidden)


def test_gradients_pass_through_every_kind_of_edit() -> None:
    """d/dz of factor z, z + noise, z + alpha (z' - z), and of what replaces z."""
    model = nn.Linear(3, 4, bias=False)
    neurons = ns.select(ns.find_layout(model), {"weight": (1, 2)})
    slopes = {"zero_out": 0, "scale": -1.7, "random_init": 0, "random_init_relative": 0, "random_noise": 1}
    slopes |= {"random_noise_relative": 1, "rewind": 0, "rewind_half": 0.5, "compose": 0}
    for name, kind in KINDS.items():
        view = ns.apply(kind.make(neurons, {"weight": torch.ones(4, 3)}), model)
        (gradient,) = torch.autograd.grad(view.weight.sum(), model.weight)
        expected = torch.tensor([1, slopes[name], slopes[name], 1]).reshape(4, 1).expand(4, 3)
        assert torch.equal(gradient, expected.float()), name


def test_a_weight_normed_model_trains_through_its_view() -> None:
    model = CASES["weight_norm"].build().eval()
    view = ns.apply(cut(model, {"0.weight": (0, 1)}), model)
    view(X).square().sum().backward()
    g = model[0].parametrizations.weight.original0
    assert g.grad is not None and g.grad[:2].abs().max() == 0 and g.grad[2:].abs().min() > 0


def test_training_the_view_trains_the_model() -> None:
    model = mlp()
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    old = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    view(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight[1], old["0.weight"][1])
    assert not torch.equal(model[0].weight[0], old["0.weight"][0])
    assert torch.equal(view[0].weight[0], model[0].weight[0]) and view[0].weight[1].abs().max() == 0


# --- what a view can do ---------------------------------------------------------------------------------------------


@fast_case
def test_flags_are_the_view_s_own(case: Case) -> None:
    model = case.build()
    model[0].eval() if isinstance(model, nn.Sequential) else None
    flags = [module.training for module in model.modules()]
    view = ns.apply(cut(model), model)
    assert view.training and ns.bake(cut(model), model).training
    view.eval()
    assert [module.training for module in model.modules()] == flags
    model.eval()
    assert not any(module.training for module in ns.apply(cut(model), model).modules())


def test_buffers_are_own_or_shared() -> None:
    case = CASES["residual"]
    x = case.batches()[0][0]
    model = case.build()
    before = model.bn.running_mean.clone()
    own = ns.apply(cut(model, {"stem.weight": ...}), model)
    own(x)
    assert torch.equal(model.bn.running_mean, before) and not torch.equal(own.bn.running_mean, before)
    shared = ns.apply(cut(model), model, buffers="shared")
    assert shared.bn.running_mean is model.bn.running_mean
    shared(x)
    assert not torch.equal(model.bn.running_mean, before)
    baked = ns.bake(cut(model), shared)
    assert baked.bn.running_mean is not model.bn.running_mean


@fast_case
def test_a_deep_copy_of_a_view_is_independent_and_can_be_converted(case: Case) -> None:
    model, batch = built(case.name), case.batches()[0]
    before = snapshot(model)
    view = ns.apply(cut(model), model)
    copied = copy.deepcopy(view)
    assert torch.equal(run(copied, batch), run(view, batch))
    assert not parameters(copied) & parameters(model)
    copied.double()
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float64}
    for one, other in zip(weights(copied, case), weights(view, case), strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-5, atol=1e-6)
    copied.load_state_dict(copied.state_dict())
    with pytest.raises(RuntimeError, match=SHARED):
        view.double()
    assert_unchanged(before, model)


def test_the_state_dict_of_a_view_has_torch_s_names_and_the_shared_values() -> None:
    model = mlp()
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    state = view.state_dict()
    assert set(state) == {"0.parametrizations.weight.original", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(state["0.parametrizations.weight.original"], model[0].weight)
    assert set(ns.bake(ns.compose(), view).state_dict()) == set(model.state_dict())


def test_functional_call_of_a_view() -> None:
    model = mlp()
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"'weight' is computed by a parametrization in this view.*Use the key"):
        functional_call(view, {"0.weight": torch.ones(7, 5)}, X)
    assert_unchanged(before, model)
    other = mlp()
    other[0].weight = nn.Parameter(torch.ones(7, 5))
    outputs = functional_call(view, {"0.parametrizations.weight.original": torch.ones(7, 5)}, X)
    assert torch.equal(outputs, ns.apply(cut(other, {"0.weight": 1}), other)(X))
    assert_unchanged(before, model)


def test_assigning_an_edited_tensor_is_refused_and_others_are_the_view_s_own() -> None:
    model = mlp()
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    before = snapshot(model)
    for value in (torch.ones(7, 5), nn.Parameter(torch.ones(7, 5))):
        with pytest.raises(
            RuntimeError, match=r"assigning it, or passing it to functional_call .* bake the edit first"
        ):
            view[0].weight = value
    view[0].bias = nn.Parameter(torch.zeros(7))
    assert_unchanged(before, model)
    copied = copy.deepcopy(ns.bake(cut(model), view))
    copied[0].weight = nn.Parameter(torch.ones(7, 5))
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["mlp", "weight_norm"])
def test_caching_around_several_views_gives_right_results(name: str) -> None:
    model = built(name)
    edits = [cut(model, {"0.weight": i}) for i in range(4)]
    expected = [ns.bake(edit, model)(X) for edit in edits]
    with parametrize.cached():
        views = [ns.apply(edit, model) for edit in edits]
        first, base, second = [view(X) for view in views], model(X), [view(X) for view in views]
        fresh = [ns.apply(edit, model)(X) for edit in edits]  # ids of dead modules are used again
    assert equal(first, expected) and equal(second, expected) and equal(fresh, expected)
    assert torch.equal(base, model(X))


@pytest.mark.parametrize("name", ["mlp", "tied", "weight_norm", "shared_module"])
def test_caching_computes_each_edited_weight_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = built(name), CASES[name]
    view, inputs = ns.apply(cut(model), model).eval(), case.batches()[0][0]
    computed: list[str] = []
    plan = EditedRows.forward
    monkeypatch.setattr(EditedRows, "forward", lambda own, x: computed.append(own.plan.name) or plan(own, x))
    with torch.no_grad():
        expected = view(inputs)
        once = sorted(set(computed))
        computed.clear()
        with parametrize.cached():
            for _ in range(3):
                assert torch.equal(view(inputs), expected)
        assert sorted(computed) == once
        computed.clear()
        assert torch.equal(view(inputs), expected)
        assert computed  # nothing is kept outside


def test_gradients_go_through_cached_weights() -> None:
    model = mlp()
    view = ns.apply(cut(model), model)
    gradients = []
    for context in (contextlib.nullcontext(), parametrize.cached()):
        model.zero_grad()
        with context:
            (view(X).sum() + view(X).square().sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    assert not gradients[1][0][::2].any() and gradients[1][0][1::2].all()


# --- models that are hard to copy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_two_views_of_one_parametrized_model(name: str) -> None:
    model = built(name)
    before, base = snapshot(model), model(X)
    first, second = (ns.apply(cut(model, {"0.weight": i}), model) for i in (1, 2))
    third = ns.apply(cut(model, {"0.bias": ...}, extra="0.bias"), model)
    stacked = ns.apply(cut(model, {"0.weight": 3}), first)
    assert [row.abs().max() == 0 for row in first[0].weight[1:3]] == [True, False]
    assert [row.abs().max() == 0 for row in second[0].weight[1:3]] == [False, True]
    assert third[0].bias.abs().max() == 0 and torch.equal(third[0].weight, model[0].weight)
    assert stacked[0].weight[[1, 3]].abs().max() == 0
    assert_unchanged(before, model)
    assert torch.equal(model(X), base)


def test_a_second_edit_on_another_parameter_of_the_same_module_leaves_the_first_view_working() -> None:
    model = built("mlp")
    before, base = snapshot(model), model(X)
    first = ns.apply(cut(model, {"0.weight": 1}), model)
    outputs = first(X)
    second = ns.apply(cut(model, {"0.bias": (0, 2)}, extra="0.bias"), first)
    third = ns.apply(cut(model, {"0.bias": 5}, extra="0.bias"), second)
    assert torch.equal(first(X), outputs) and torch.equal(first[0].bias, model[0].bias)
    assert (third[0].bias == 0).nonzero().flatten().tolist() == [0, 2, 5]
    composed = ns.compose(*(cut(model, {"0.weight": 1}), cut(model, {"0.bias": (0, 2, 5)}, extra="0.bias")))
    assert torch.equal(third(X), ns.bake(composed, model)(X))
    backwards = ns.compose(*reversed(composed.edits))
    assert list(ns.edited_parameters(backwards, model)) == ["0.weight", "0.bias"]
    assert_unchanged(before, model)
    assert torch.equal(model(X), base)


def test_a_parametrization_registered_on_the_model_afterwards_does_not_reach_the_view_which_says_so() -> None:
    model = mlp()
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    view(X)
    parametrizations.weight_norm(model[0], "weight")
    with pytest.raises(RuntimeError, match=r"other parameters now: 0\.weight were replaced .*: apply the edit again"):
        view(X)


@pytest.mark.parametrize("name", ["lstm", "lstm_projected", "gru"])
def test_a_recurrent_model_that_has_run(name: str) -> None:
    case = CASES[name]
    model, batch = case.build().eval(), case.batches()[0]
    run(model, batch).sum().backward()
    edit = cut(model)
    view = ns.apply(edit, model)
    outputs = run(view, batch)
    assert torch.equal(outputs, run(ns.bake(edit, model), batch))
    again = ns.apply(ns.scale(edit.neurons, 5.0), view)
    assert torch.equal(run(again, batch), outputs) and parameters(again) == parameters(model)
    assert all(held is own for held, own in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))


def test_a_view_never_moves_the_shared_weights_of_a_recurrent_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does so on CUDA, to have them in one block of memory."""
    model, moved = CASES["lstm"].build(), []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda module: moved.append(module))
    view, baked = ns.apply(cut(model), model), ns.bake(cut(model), model)
    view.rnn.flatten_parameters()
    assert not moved
    baked.rnn.flatten_parameters()
    assert moved == [baked.rnn]


@fast_case
def test_a_view_that_has_run_can_be_viewed_and_baked(case: Case) -> None:
    model, batch = case.build(), case.batches()[0]
    view = ns.apply(cut(model), model)
    run(view, batch).sum().backward()
    assert parameters(ns.apply(ns.compose(), view)) == parameters(model)
    assert not parameters(ns.bake(ns.compose(), view)) & parameters(model)


class Unique:
    """Refuses a copy, and holds a module."""

    def __init__(self, held: nn.Module) -> None:
        self.held = held

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("there is one of it")


class Caching(nn.Module):
    """Keeps an activation, a parameter in a list, and something that cannot be copied if asked to."""

    def __init__(self, guarded: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
        self.kept: list[Tensor] = []
        self.loose = [nn.Parameter(torch.ones(3))]
        if guarded:
            self.inner[1].guard = Unique(nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[0](x)
        self.kept.append(hidden)
        return self.inner[1](hidden) * self.loose[0]


def test_a_cached_activation_and_a_parameter_in_a_plain_list_are_shared() -> None:
    model = Caching()
    model(X)
    before = snapshot(model)
    view = ns.apply(cut(model), model)
    assert view.kept is not model.kept and view.kept[0] is model.kept[0]
    assert view.loose[0] is model.loose[0]
    view(X)
    assert_unchanged(before, model)
    baked = ns.bake(cut(model), model)
    assert baked.loose[0] is not model.loose[0] and torch.equal(baked(X), view(X))


def test_a_touched_parameter_that_a_plain_attribute_holds_too_is_refused_by_the_view() -> None:
    model = Caching()
    model.loose.append(model.inner[1].weight)
    with pytest.raises(ValueError, match=r"inner\.1\.weight is also held by a plain attribute of module .*use bake"):
        ns.apply(cut(model), model)
    baked = ns.bake(cut(model), model)
    assert baked.loose[1] is baked.inner[1].weight and baked.loose[1][0].abs().max() == 0
    assert ns.apply(cut(model, {"inner.0.weight": 1}), model).loose[1] is model.inner[1].weight


def test_what_cannot_be_copied_is_an_error_that_names_module_and_attribute() -> None:
    model = Caching(guarded=True)
    for function in (ns.apply, ns.bake):
        with pytest.raises(TypeError, match=r"attribute 'guard' of module 'inner\.1' \(Linear\) cannot be copied"):
            function(cut(model), model)


class Listener:
    def __init__(self) -> None:
        self.heard: list[nn.Module] = []

    def hear(self, module: nn.Module, *_: Any) -> None:
        self.heard.append(module)


class Counting(nn.Linear):
    """Counts its own calls by a hook that is a method of its own."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.calls = 0
        self.handle = self.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def test_hooks_fire_in_both_and_methods_of_the_model_follow_their_module() -> None:
    outside, called, model = Listener(), [], Counting()
    model.register_forward_hook(outside.hear)
    model.register_forward_pre_hook(functools.partial(lambda tag, module, x: called.append((tag, module)), "tag"))
    model.register_full_backward_hook(lambda module, *_: called.append(("back", module)))
    before = snapshot(model)
    view = ns.apply(cut(model), model)
    assert_unchanged(before, model)
    view(X.clone().requires_grad_()).sum().backward()
    assert (view.calls, model.calls) == (1, 0)
    assert outside.heard == [view]
    assert called == [("tag", view), ("back", view)]
    model(X)
    assert (view.calls, model.calls) == (1, 1) and outside.heard == [view, model]
    view.handle.remove()
    model(X)
    assert model.calls == 2


class Merging(nn.Linear):
    """Its train() merges something into the weight, as LoRA layers do."""

    def train(self, mode: bool = True) -> Merging:
        with torch.no_grad():
            self.weight.mul_(2)
        return super().train(mode)


def test_a_train_method_with_side_effects_is_never_called() -> None:
    model = nn.Sequential(Merging(5, 3))
    before = snapshot(model)
    edit = cut(model)
    for made in (ns.apply(edit, model), ns.bake(edit, model)):
        assert torch.equal(made[0].weight[1], model[0].weight[1])
    assert_unchanged(before, model)


class Slotted(nn.Module):
    """Registers a module under two names, holds None for a child and for a parameter, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = self.alias = nn.Linear(5, 3)
        self.nothing: nn.Module | None = None
        self.register_module("none", None)
        self.register_parameter("missing", None)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scratch + self.alias(x)


def test_empty_entries_and_buffers_stay_what_they_are() -> None:
    model = Slotted()
    for made in (ns.apply(cut(model), model), ns.bake(cut(model), model)):
        assert made.none is None and made.missing is None and made.late is None
        assert made.fc is made.alias and "scratch" not in made.state_dict()
        assert made(X)[:, 0].allclose(2 * model.fc.bias[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused() -> None:
    for compiled in (torch.jit.script(nn.Linear(5, 3)), torch.jit.trace(nn.Linear(5, 3), X)):
        model = nn.Sequential(nn.Linear(5, 5), compiled)
        with pytest.raises(TypeError, match=r"module '1' is a compiled TorchScript module.*before torch\.jit\.script"):
            ns.apply(cut(model, {"0.weight": 1}), model)


def test_a_traced_graph_module_keeps_its_forward() -> None:
    model = torch.fx.symbolic_trace(mlp())
    edit = cut(model)
    assert torch.equal(ns.apply(edit, model)(X), ns.bake(edit, model)(X))
    assert not torch.equal(ns.apply(edit, model)(X), model(X))


# --- the end of a view ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "residual", "lstm", "tied", "weight_norm", "attention"])
def test_views_are_freed_as_soon_as_they_are_dropped(name: str) -> None:
    model, batch = built(name), CASES[name].batches()[0]
    gc.disable()
    try:
        made: list[nn.Module] = [ns.apply(cut(model), model)]
        made += [ns.apply(ns.scale(few(ns.find_layout(model)), 2.0), made[0]), ns.bake(cut(model), model)]
        with torch.no_grad():
            run(made[0], batch)
        dying = [weakref.ref(module) for one in made for module in one.modules()]
        made.clear()
        assert [type(ref()).__name__ for ref in dying if ref() is not None] == []
    finally:
        gc.enable()


# --- refusals -------------------------------------------------------------------------------------------------------


def other(module: nn.Module) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in module.state_dict().items()}


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda view: view.to(torch.float64),
    "to device": lambda view: view.to("meta"),
    "half": lambda view: view.half(),
    "cuda": lambda view: view.cuda(),
    "to_empty": lambda view: view.to_empty(device="cpu"),
    "share_memory": lambda view: view.share_memory(),
    "load_state_dict": lambda view: view.load_state_dict(other(view)),
    "load and assign": lambda view: view.load_state_dict(view.state_dict(), assign=True),
    "load what lacks a tensor": lambda view: view.load_state_dict({}),
    "of a part": lambda view: view[2].half(),
    "load into a part": lambda view: view[2].load_state_dict(other(view[2])),
    "of the whole": lambda view: nn.ModuleDict({"view": view}).half(),
    "load into the whole": lambda view: nn.ModuleDict({"view": view}).load_state_dict(
        {f"view.{key}": torch.zeros_like(value) for key, value in view.state_dict().items()}
    ),
}


@pytest.mark.parametrize("name", ["mlp", "weight_norm"])
@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_original_is_refused(act: Callable[[nn.Module], object], name: str) -> None:
    model = CASES[name].build()
    before = snapshot(model)
    for view in (ns.apply(cut(model, {"0.weight": 1}), model), ns.apply(ns.compose(), model)):
        with pytest.raises(RuntimeError, match=SHARED):
            act(view)
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["mlp", "weight_norm", "norm_dropout"])
def test_what_would_change_nothing_is_loaded(name: str) -> None:
    """Its own state dict, and that of the model, whose names are others where a tensor is edited."""
    model = CASES[name].build()
    before = snapshot(model)
    view = ns.apply(cut(model, {"0.weight": 1}), model)
    for given in (view.state_dict(), model.state_dict()):
        assert view.load_state_dict(given) == ([], [])
        assert view.load_state_dict({**given, "more": torch.ones(1)}, strict=False).unexpected_keys == ["more"]
        first = next(iter(given))
        without = {key: value for key, value in given.items() if key != first}
        assert len(view.load_state_dict(without, strict=False).missing_keys) == 1
    assert_unchanged(before, model)
    with pytest.raises(RuntimeError, match=SHARED):
        view.load_state_dict(dict.fromkeys(view.state_dict(), 1.0))


def test_a_baked_model_converts_and_loads() -> None:
    model = mlp()
    baked = ns.bake(cut(model), ns.apply(cut(model), model))
    baked.load_state_dict(model.state_dict())
    assert torch.equal(baked.double()[0].weight, model[0].weight.double())


def test_requires_grad_and_zero_grad_reach_the_shared_weights() -> None:
    model = mlp()
    view = ns.apply(cut(model), model)
    model(X).sum().backward()
    view.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    view.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- purity ---------------------------------------------------------------------------------------------------------


@fast_case
def test_nothing_of_the_model_or_the_world_changes(case: Case) -> None:
    model, batch, checkpoint = case.build(), case.batches()[0], earlier(case)
    output = run(model, batch)
    output.sum().backward()
    model.register_forward_hook(lambda *_: None)
    next(model.parameters()).register_hook(lambda gradient: gradient)
    before = snapshot(model, batch, checkpoint)
    neurons = few(ns.find_layout(model))
    for kind in KINDS.values():
        edit = kind.make(neurons, checkpoint)
        view = ns.apply(edit, model)
        with torch.no_grad():
            run(view, batch)
        ns.bake(edit, model)
        if case.name not in PARAMETRIZED:
            ns.edited_parameters(edit, model)
    del view
    assert_unchanged(before, model, batch, checkpoint)


@pytest.mark.parametrize("name", ["mlp", "residual", "lstm", "tied", "weight_norm", "attention", "unet"])
def test_apply_between_forward_and_backward(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    twin = copy.deepcopy(model)
    run(twin, batch).square().sum().backward()
    loss = run(model, batch).square().sum()
    view = ns.apply(cut(model), model)
    ns.bake(cut(model), view)
    loss.backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(own.grad, other.grad) for own, other in pairs if other.grad is not None)


def test_model_and_twin_train_in_one_backward() -> None:
    """The contrastive step: both terms reach the shared weights, and only once."""
    model = CASES["residual"].build()
    x = CASES["residual"].batches()[0][0]
    view = ns.apply(cut(model), model)
    (model(x).sum() + view(x).sum()).backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    view(x).sum().backward()
    apart = [parameter.grad for parameter in model.parameters()]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_grad_mode(mode: Callable[[], Any]) -> None:
    model = built("mlp")
    expected = ns.bake(cut(model), model)(X)
    with mode():
        view = ns.apply(cut(model), model)
        assert torch.equal(view(X), expected)
        assert torch.equal(functional_call(model, ns.edited_parameters(cut(model), model), X), expected)
    view(X).sum().backward()
    model.zero_grad()


def test_frozen_weights_stay_frozen() -> None:
    model = CASES["mlp_frozen"].build()
    view, baked = ns.apply(cut(model), model), ns.bake(cut(model), model)
    for made in (view, baked):
        assert [parameter.requires_grad for _, parameter in sorted(parameters_of(made).items())] == [
            False,
            False,
            True,
            True,
        ]


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace("parametrizations.", "").replace(".original", ""): p for name, p in model.named_parameters()}


def test_a_parameter_of_one_neuron_and_one_input() -> None:
    model = nn.Sequential(nn.Linear(1, 1), Custom())
    assert ns.apply(cut(model, {"0.weight": 0}), model)[0].weight.item() == 0


def test_the_view_prints_its_edits() -> None:
    model = Tied()
    text = repr(ns.apply(cut(model, {"body.weight": 2}), model))
    assert "zero_out(1 neuron in 1 layer: body.weight[2])" in text
