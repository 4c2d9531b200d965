"""The names of a model's tensors, whatever is wrapped around it; copies that share its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kinds import built, few, run
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from zoo import CASES, Case, Residual, SharedModule, fast_case, small_case

import neuronsurgery as ns
from neuronsurgery.copies import copy_structure, eval_copy
from neuronsurgery.surveys import survey
from neuronsurgery.wrappers import unwrap

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    """The wrapper object alone: nothing is compiled before it is called."""
    return torch.compile(model)  # type: ignore[return-value]


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "compile of DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


# --- names ----------------------------------------------------------------------------------------------------------


@small_case
def test_tensors_are_named_as_in_a_plain_model(case: Case) -> None:
    model = built(case.name)
    names = list(survey(model).tensors)
    assert names == [name for name, _ in eval_copy(model).named_parameters()]
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        assert names == [name for name, _ in model.named_parameters()]
        assert all(tensor.parameter is model.get_parameter(name) for name, tensor in survey(model).tensors.items())
    aliases = [alias for tensor in survey(model).tensors.values() for alias in tensor.aliases]
    every = [name for name, _ in eval_copy(model).named_parameters(remove_duplicate=False)]
    assert sorted(names + aliases) == sorted(every)


@every_wrapper
@pytest.mark.usefixtures("one_rank")
def test_a_wrapper_never_shows(wrap: Any) -> None:
    model = Residual().eval()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert ns.find_layout(wrapped) == ns.find_layout(model)
    assert ns.find_layout(wrapped, where="fc.*", extra="bn.bias").count == 9
    edit = ns.zero_out(ns.select(ns.find_layout(wrapped), {"fc.weight": 1, "b?.weight": (0, 2)}))
    x = torch.randn(2, 3, 8, 8)
    view, baked = ns.apply(edit, wrapped), ns.bake(edit, wrapped)
    assert type(view) is type(baked) is Residual
    assert torch.equal(view(x), baked(x)) and not torch.equal(view(x), model(x))
    assert view.stem.weight is model.stem.weight
    assert ns.edited_parameters(edit, wrapped).keys() == {"fc.weight", "b1.weight", "b2.weight"}


@every_wrapper
@pytest.mark.usefixtures("one_rank")
def test_a_wrapper_around_a_part_never_shows(wrap: Any) -> None:
    model = CASES["mlp"].build()
    outer = nn.Sequential(wrap(model), nn.Linear(3, 2))
    assert [layer.parameter for layer in ns.find_layout(outer)] == ["0.0.weight", "0.2.weight", "1.weight"]
    before = snapshot(outer)
    edit = ns.zero_out(ns.select(ns.find_layout(outer), {"0.0.weight": 1}))
    view = ns.apply(edit, outer)
    assert torch.equal(view(X), ns.bake(edit, outer)(X))
    assert view[0][0].weight[1].abs().max() == 0 and type(view[0]) is nn.Sequential
    assert_unchanged(before, outer)


def test_a_module_compiled_in_place_runs_uncompiled_in_the_view() -> None:
    model = CASES["mlp"].build()
    model.compile()
    model[0].compile()
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 1})), model)
    assert view._compiled_call_impl is None and view[0]._compiled_call_impl is None
    assert view(X).shape == (4, 3)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_tensor_has_its_plain_name(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(5, 7)), nn.Tanh(), norm(nn.Conv1d(7, 3, 1), "weight"))
    layout = ns.find_layout(model, extra="*.bias")
    assert {layer.parameter for layer in layout} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert layout["2.weight"].row_shape == (7, 1)
    with pytest.raises(KeyError, match=r"no layer matches '\*original\*'; nearest are '0\.weight'"):
        ns.find_layout(model, where="*original*")


@pytest.mark.parametrize("old", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_an_old_weight_norm_is_refused_with_the_modern_name(old: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), getattr(nn.utils, old)(nn.Linear(5, 7)))
    message = rf"1\.weight_\w+: only what a hook computes .*; use torch\.nn\.utils\.parametrizations\.{old}"
    with pytest.raises(ValueError, match=message):
        ns.find_layout(model)
    assert [layer.parameter for layer in ns.find_layout(model, where="0.*")] == ["0.weight"]


def test_shared_tensors_list_their_other_names() -> None:
    tensors = survey(SharedModule()).tensors
    assert tensors["first.weight"].aliases == ("second.weight",)
    assert len(tensors["first.weight"].uses) == 1
    shared = survey(CASES["shared_parameter"].build()).tensors
    assert [attribute for _, attribute, _ in shared["first.weight"].uses] == ["weight", "weight"]


# --- copies ---------------------------------------------------------------------------------------------------------


@fast_case
def test_a_copy_shares_parameters_owns_buffers_and_leaves_the_model_alone(case: Case) -> None:
    model, batch = case.build(), case.batches()[0]
    run(model, batch)
    before = snapshot(model)
    copied = copy_structure(survey(model)).model
    assert [id(parameter) for parameter in copied.parameters()] == [id(parameter) for parameter in model.parameters()]
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not {id(module) for module in copied.modules()} & {id(module) for module in model.modules()}
    assert not {id(buffer) for buffer in copied.buffers()} & {id(buffer) for buffer in model.buffers()}
    assert [module.training for module in copied.modules()] == [module.training for module in model.modules()]
    with torch.no_grad():
        run(copied, batch)
    assert_unchanged(before, model)


@fast_case
def test_a_plain_copy_is_in_evaluation_mode_and_computes_the_same(case: Case) -> None:
    model, batch = case.build().train(), case.batches()[0]
    before = snapshot(model)
    copied = eval_copy(model)
    assert_unchanged(before, model)
    assert not any(module.training for module in copied.modules())
    assert not any(parametrize.is_parametrized(module) for module in copied.modules())
    torch.testing.assert_close(run(copied, batch), run(model.eval(), batch))


def test_a_plain_copy_of_a_view_has_the_edited_values_in_the_model_s_order() -> None:
    for name in ("mlp", "residual", "attention", "weight_norm", "tied"):
        model = built(name)
        view = ns.apply(ns.scale(few(ns.find_layout(model)), 3.0), model)
        copied, batch = eval_copy(view), CASES[name].batches()[0]
        assert [name for name, _ in copied.named_parameters()] == [
            name for name, _ in eval_copy(model).named_parameters()
        ]
        assert torch.equal(run(copied, batch), run(view, batch))


def test_a_tie_between_parametrized_uses_is_kept() -> None:
    model = built("shared_parameter")
    view = ns.apply(ns.scale(few(ns.find_layout(model)), 3.0), model)
    copied = eval_copy(view)
    assert copied.first.weight is copied.second.weight
    again = copy_structure(survey(view)).model
    assert again.first.parametrizations.weight is again.second.parametrizations.weight
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_a_spectral_norm_does_not_iterate_when_it_is_looked_at() -> None:
    model = CASES["spectral_norm"].build().train()
    vector = model[0].parametrizations.weight[0]._u.clone()
    before = snapshot(model)
    ns.find_layout(model)
    ns.apply(ns.zero_out(few(ns.find_layout(model))), model)
    ns.bake(ns.zero_out(few(ns.find_layout(model))), model)
    assert_unchanged(before, model)
    assert torch.equal(model[0].parametrizations.weight[0]._u, vector)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight


def test_parametrizations_of_the_model_stay_and_come_first() -> None:
    model = CASES["mlp"].build().eval()
    parametrize.register_parametrization(model[0], "weight", Gain())
    edit = ns.random_noise(ns.select(ns.find_layout(model), {"0.weight": (0, 1)}), std=1, seed=0)
    view, copied = ns.apply(edit, model), copy.deepcopy(ns.apply(edit, model))
    expected = view[0].weight.detach() + model[0].weight.detach()
    with torch.no_grad():
        model[0].parametrizations.weight[0].gain.mul_(2)
    torch.testing.assert_close(view[0].weight, expected)
    assert view[0].parametrizations.weight[0].gain is model[0].parametrizations.weight[0].gain
    assert copied[0].parametrizations.weight[0].gain.item() == 2
