"""Plans: an edit as a pure function of tensors, which torch.func differentiates like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS, built, earlier, few, run
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrizations
from zoo import CASES, Case, fast_case, small_case

import neuronsurgery as ns
from neuronsurgery.copies import eval_copy
from neuronsurgery.surgery import with_grad_flag
from neuronsurgery.surveys import survey

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2] * 2)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
SMOOTH = ("zero_out", "scale", "random_init", "random_noise", "rewind", "rewind_half")


def edits_of(model: nn.Module, kind: Any) -> ns.Edit:
    """An edit of rows and, in the last layer, of its columns in pairs."""
    layout = ns.find_layout(model)
    columns = ns.select(ns.find_layout(model, patterns={"2.weight": "e i -> i e"}), {"2.weight": (1, 4)})
    rows = ns.select(layout, {"0.weight": (0, 5)})
    return kind.make(rows | columns, earlier(CASES["mlp"]))


def loss_through(edit: ns.Edit, model: nn.Module, params: Mapping[str, Tensor], x: Tensor = X, y: Tensor = Y) -> Tensor:
    edited = ns.plan(edit, model)(params)
    return F.cross_entropy(functional_call(model, {**params, **edited}, x), y)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loss_by_hand(edit: ns.Edit, model: nn.Module, params: Mapping[str, Tensor], x: Tensor = X, y: Tensor = Y) -> Tensor:
    """The loss of a model that has these parameters, and the edit baked into it."""
    plain = CASES["mlp"].build().eval()
    plain.load_state_dict(dict(params))
    return F.cross_entropy(ns.bake(edit, plain)(x), y)


@every_kind
def test_it_gives_the_edited_tensors_alone_as_baking_does(kind: Any) -> None:
    model = built("mlp")
    edit = edits_of(model, kind)
    before, params = snapshot(model), params_of(model)
    kept = {name: value.clone() for name, value in params.items()}
    edited = ns.plan(edit, model)(params)
    assert edited.keys() == {"0.weight", "2.weight"}
    baked = ns.bake(edit, model).state_dict()
    assert all(torch.equal(value, baked[name]) for name, value in edited.items())
    assert all(torch.equal(value, kept[name]) for name, value in params.items())
    again = ns.edited_parameters(edit, model, params)
    assert all(torch.equal(again[name], edited[name]) for name in edited) and again.keys() == edited.keys()
    assert_unchanged(before, model)


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name in SMOOTH], ids=SMOOTH)
def test_the_gradient_through_it_is_that_of_finite_differences(kind: Any) -> None:
    """In float64, of a loss through a planned edit against the loss of a baked model.

    Scales that are relative to what stands there are constants for autograd, and no case for this.
    """
    model = CASES["mlp"].build().eval().double()
    edit = edits_of(model, kind)
    params, x = params_of(model), X.double()
    found = grad(lambda p: loss_through(edit, model, p, x))(params)
    generator = torch.Generator().manual_seed(0)
    for name in ("0.weight", "2.weight", "2.bias"):
        direction = torch.randn(params[name].shape, generator=generator, dtype=torch.float64)
        moved = []
        for step in (1e-6, -1e-6):
            plain = CASES["mlp"].build().eval().double()
            plain.load_state_dict({**params, name: params[name] + step * direction})
            with torch.no_grad():
                moved.append(F.cross_entropy(ns.bake(edit, plain)(x), Y))
        slope = (moved[0] - moved[1]) / 2e-6
        assert abs((found[name] * direction).sum() - slope) < 1e-7 * max(1, abs(slope)), name


@every_kind
def test_grad_jacrev_and_a_view_agree(kind: Any) -> None:
    model = CASES["mlp"].build().eval()
    edit = edits_of(model, kind)
    params = params_of(model)
    found = grad(lambda p: loss_through(edit, model, p))(params)
    view = ns.apply(edit, model)
    F.cross_entropy(view(X), Y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    jacobian = jacrev(lambda p: functional_call(model, {**p, **ns.plan(edit, model)(p)}, X[:2]))(params)
    softmax = view(X[:2]).detach().softmax(1) - F.one_hot(Y[:2], 3)
    by_jacobian = torch.einsum("bc,bcij->ij", softmax, jacobian["0.weight"]) / 2
    pair = grad(lambda p: loss_through(edit, model, p, X[:2], Y[:2]))(params)
    torch.testing.assert_close(pair["0.weight"], by_jacobian, rtol=1e-4, atol=1e-6)


@every_kind
def test_vmap_over_stacked_parameters_is_the_loop(kind: Any) -> None:
    model = built("mlp")
    edit = edits_of(model, kind)
    planned = ns.plan(edit, model)
    models = [params_of(CASES["mlp"].build(seed)) for seed in range(3)]
    stacked = {name: torch.stack([params[name] for params in models]) for name in models[0]}
    together = vmap(planned)(stacked)
    for i, params in enumerate(models):
        for name, value in planned(params).items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-6, atol=1e-7)
    losses = vmap(lambda p: loss_through(edit, model, p))(stacked)
    by_hand = torch.stack([loss_by_hand(edit, model, params) for params in models])
    torch.testing.assert_close(losses, by_hand, rtol=1e-5, atol=1e-6)


def test_per_example_gradients_through_an_edit() -> None:
    model = built("mlp")
    edit, params = edits_of(model, KINDS["zero_out"]), params_of(model)
    each = vmap(grad(lambda p, x, y: loss_through(edit, model, p, x[None], y[None])), in_dims=(None, 0, 0))(
        params, X, Y
    )
    whole = grad(lambda p: loss_through(edit, model, p))(params)
    torch.testing.assert_close(each["0.weight"].mean(0), whole["0.weight"], rtol=1e-5, atol=1e-7)
    assert each["0.weight"][:, [0, 5]].abs().max() == 0, "a zeroed row gets no gradient"
    assert each["2.weight"][..., [1, 4]].abs().max() == 0
    assert each["2.weight"][..., [0, 2]].abs().max() > 0


@fast_case
def test_it_fits_every_architecture(case: Case) -> None:
    model, batch = built(case.name), case.batches()[0]
    neurons = few(ns.find_layout(model))
    edit = ns.scale(neurons, -0.5)
    before = snapshot(model)
    edited = ns.plan(edit, model)(params_of(eval_copy(model)))
    baked = ns.bake(edit, model)
    for name, parameter in baked.named_parameters():
        assert torch.equal(edited.get(name, parameter), parameter), name
    assert run(baked, batch).isfinite().all()
    assert_unchanged(before, model)


@small_case
def test_a_survey_serves_in_the_model_s_place(case: Case) -> None:
    model = built(case.name)
    surveyed = survey(model)
    edit = ns.zero_out(few(ns.find_layout(model)))
    assert ns.plan(edit, surveyed).tensors.keys() == ns.plan(edit, model).tensors.keys()


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "_checkpoint_wrapped_module."])
def test_names_with_prefixes_come_back_as_they_came(prefix: str) -> None:
    model = built("mlp")
    planned = ns.plan(edits_of(model, KINDS["zero_out"]), model)
    params = {f"{prefix}{name}": value for name, value in params_of(model).items()}
    assert planned(params).keys() == {f"{prefix}0.weight", f"{prefix}2.weight"}


@pytest.mark.parametrize("name", ["tied", "shared_parameter", "shared_module"])
def test_every_name_of_a_tied_tensor_is_answered(name: str) -> None:
    model = built(name)
    layout = ns.find_layout(model, extra="*weight")
    other, first = layout.aliases[0]
    planned = ns.plan(ns.zero_out(ns.select(layout, {first: 0})), model)
    value = model.get_parameter(first).detach()
    assert planned({first: value}).keys() == {first}
    assert planned({other: value}).keys() == {other}
    both = planned({first: value, other: value})
    assert both.keys() == {first, other} and both[first] is both[other]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_or_of_another_shape_are_listed() -> None:
    model = built("mlp")
    planned = ns.plan(edits_of(model, KINDS["zero_out"]), model)
    with pytest.raises(KeyError, match=r"params lack 2 of the tensors that the edit changes: 0\.weight, 2\.weight"):
        planned({"0.bias": torch.zeros(7)})
    wrong = {"0.weight": torch.zeros(7, 4), "2.weight": torch.zeros(4, 7)}
    message = (
        r"2 of the tensors have another shape than the model's:\n  0\.weight: expected shape \(7, 5\), given \(7, 4\)\n"
        r"  2\.weight: expected shape \(3, 7\), given \(4, 7\)\n.*torch\.func\.vmap"
    )
    for edit in (planned, lambda params: ns.edited_parameters(planned.edit, model, params)):
        with pytest.raises(ValueError, match=message):
            edit(wrong)
    with pytest.raises(TypeError, match=r"a model is a torch\.nn\.Module, not a dict"):
        ns.plan(planned.edit, {})  # type: ignore[arg-type]


def test_a_plan_prints_its_edit() -> None:
    model = nn.Linear(2, 3)
    planned = ns.plan(ns.zero_out(ns.select(ns.find_layout(model), {"weight": 1})), model)
    assert repr(planned) == "plan of zero_out(1 neuron in 1 layer: weight[1])"


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("computed", [True, False])
def test_a_plan_says_which_tensors_are_computed_from_what_is_trained(computed: bool, frozen: bool) -> None:
    model = nn.Linear(2, 3)
    if computed:
        parametrizations.weight_norm(model)
    model.requires_grad_(not frozen)
    planned = ns.plan(ns.zero_out(ns.select(ns.find_layout(model), {"weight": 1})), model)
    assert planned.tensors["weight"].trainable == (computed and not frozen)


def test_without_gradients_an_edited_tensor_keeps_the_flag_of_its_weight() -> None:
    edited, frozen = torch.zeros(2), nn.Parameter(torch.ones(2), requires_grad=False)
    with torch.no_grad():
        assert not with_grad_flag(edited, frozen).requires_grad
        assert with_grad_flag(edited, frozen, trainable=True).requires_grad
        assert with_grad_flag(edited, nn.Parameter(torch.ones(2))).requires_grad
    assert with_grad_flag(edited, nn.Parameter(torch.ones(2))) is edited


def test_a_copy_to_run_is_parametrized_nowhere() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 2))
    copied = eval_copy(model)
    assert [name for name, _ in copied.named_modules()] == ["", "0", "1"]
    assert type(copied[0]) is nn.Linear  # type: ignore[index]
