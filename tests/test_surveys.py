"""Surveys: a model's tensors under all of their names, whatever wraps it, and made once for each call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kinds import built, few
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from zoo import CASES

import neuronsurgery as ns
from neuronsurgery import surveys
from neuronsurgery.surveys import survey
from neuronsurgery.wrappers import same_names

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2] * 2)
DATA = [(X, Y, torch.tensor([0, 1] * 3))]


# --- made once ------------------------------------------------------------------------------------------------------

MODEL = built("mlp")
CUT = ns.zero_out(ns.select(ns.find_layout(MODEL), {"0.weight": (0, 1)}))
CUTS = {f"{i}": ns.zero_out(ns.select(ns.find_layout(MODEL), {"0.weight": i})) for i in range(5)}
RESIDUAL = CASES["residual"].build().eval()
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "find_layout": ns.find_layout,
    "magnitudes": ns.magnitudes,
    "group_grad_norms": lambda model: ns.group_grad_norms(model, DATA),
    "hard_batch": lambda model: ns.hard_batch(model, DATA),
    "evaluate": lambda model: ns.evaluate(model, DATA),
    "plan": lambda model: ns.plan(CUT, model),
    "apply": lambda model: ns.apply(CUT, model),
    "bake": lambda model: ns.bake(CUT, model),
    "edited_parameters": lambda model: ns.edited_parameters(CUT, model),
    "sweep": lambda model: ns.sweep(model, CUTS, DATA),
}


def walks(call: Callable[[], object]) -> int:
    """How often a model was walked through to name its tensors."""
    seen = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal seen
        seen += event == "call" and frame.f_code is surveys._found.__code__

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_is_surveyed_once_for_each_call(call: Callable[[nn.Module], object]) -> None:
    assert walks(lambda: call(MODEL)) == 1


def test_reading_the_graph_takes_one_survey() -> None:
    batch = CASES["residual"].batches()[0]
    neurons = ns.select(ns.find_layout(RESIDUAL), {"b1.weight": 1})
    assert walks(lambda: ns.residual_branches(RESIDUAL, batch)) == 1
    assert walks(lambda: ns.silence(neurons, RESIDUAL, batch)) == 1


def test_the_count_above_can_fail() -> None:
    assert walks(lambda: (ns.find_layout(MODEL), ns.find_layout(MODEL))) == 2


def test_planning_with_a_survey_walks_no_more() -> None:
    surveyed = survey(MODEL)
    assert walks(lambda: [ns.plan(edit, surveyed) for edit in CUTS.values()]) == 0


def test_a_survey_is_immutable() -> None:
    surveyed = survey(MODEL)
    assert survey(surveyed) is surveyed
    for mapping in (surveyed.tensors, surveyed.names, surveyed.modules):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["new"] = None  # type: ignore[index]


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "compiled": torch.compile,  # type: ignore[dict-item]
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "checkpointed and averaged": lambda model: AveragedModel(checkpoint_wrapper(model)),
    "compiled and checkpointed": lambda model: torch.compile(checkpoint_wrapper(model)),  # type: ignore[arg-type]
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@every_wrapper
def test_names_do_not_show_a_wrapper_at_any_depth(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = nn.Sequential(CASES["mlp"].build(), nn.Sequential(nn.Linear(3, 4), nn.ReLU())).eval()
    names = [layer.parameter for layer in ns.find_layout(plain)]
    outer = nn.Sequential(wrap(plain[0]), nn.Sequential(wrap(plain[1][0]), nn.ReLU())).eval()
    whole = wrap(outer)
    for model in (outer, whole):
        assert [layer.parameter for layer in ns.find_layout(model)] == names
        edit = ns.zero_out(few(ns.find_layout(plain)))
        before = snapshot(model)
        expected = ns.bake(edit, outer)(X)
        assert torch.equal(ns.apply(edit, model)(X), expected)
        assert torch.equal(ns.bake(edit, model)(X), expected)
        assert list(ns.bake(edit, model).state_dict()) == list(plain.state_dict())
        assert_unchanged(before, model)


@every_wrapper
def test_what_has_a_wrapper_s_names_is_understood(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Gradients, a checkpoint, and parameters of the wrapped model, for neurons of the plain one; and the other way."""
    plain = CASES["mlp"].build().eval()
    wrapped = wrap(CASES["mlp"].build(1).eval())
    layout = ns.find_layout(plain)
    gradients = {name: torch.ones_like(parameter) for name, parameter in wrapped.named_parameters()}
    assert ns.grad_norms(gradients, layout).values.shape == (1, 10)
    neurons = few(layout)
    back = ns.bake(ns.rewind(neurons, wrapped.state_dict()), plain)
    row = wrapped.get_parameter(same_names(["0.weight"], dict(wrapped.named_parameters()))["0.weight"] or "")[0]
    assert torch.equal(back[0].weight[0], row)
    params = dict(wrapped.named_parameters())
    assert ns.plan(ns.zero_out(neurons), plain)(params).keys() <= params.keys()
    assert ns.find_layout(wrapped) == layout


class Adapted(nn.Module):
    """A module of the model's own that is called like a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.base_layer = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(self.module(x))


def test_parts_of_the_model_s_own_keep_their_names() -> None:
    model = Adapted()
    assert [layer.parameter for layer in ns.find_layout(model)] == ["module.weight", "base_layer.weight"]
    assert [layer.parameter for layer in ns.find_layout(nn.DataParallel(model))] == [
        "module.weight",
        "base_layer.weight",
    ]
    neurons = ns.select(ns.find_layout(model), {"module.weight": 1})
    other = {f"module.{name}": torch.zeros_like(value) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"module\.weight: not in the checkpoint"):
        ns.rewind(neurons, other)  # wrapped, module.module.weight and module.base_layer.weight are alike
    assert ns.rewind(neurons, model.state_dict()).alpha == 1


def test_of_two_names_that_fit_none_is_taken() -> None:
    assert same_names(["a.weight"], ["module.a.weight", "b"]) == {"a.weight": "module.a.weight"}
    assert same_names(["a.weight"], ["module.a.weight", "_orig_mod.a.weight"]) == {"a.weight": None}
    assert same_names(["a.weight"], ["a.weight", "module.a.weight"]) == {"a.weight": "a.weight"}
    peft = "base_model.model.a.base_layer.weight"
    assert same_names(["a.weight", peft], [peft]) == {"a.weight": peft, peft: peft}
    assert same_names([peft], ["a.weight"]) == {peft: "a.weight"}


# --- ties -----------------------------------------------------------------------------------------------------------


class TiedByStorage(nn.Module):
    """Two parameters in one memory: an encoder and a decoder, as some checkpoints tie them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.decode.weight.data = self.encode.weight.data
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(self.encode(x).relu()))


def tied_by_object() -> nn.Module:
    model = TiedByStorage()
    model.decode.weight = model.encode.weight
    return model


def pair() -> tuple[nn.Module, nn.Module]:
    one, two = TiedByStorage().eval(), tied_by_object().eval()
    with torch.no_grad():
        for mine, theirs in zip((one.encode.weight, *one.head.parameters()), two.parameters(), strict=True):
            mine.copy_(theirs)
    return one, two


def test_tied_by_storage_is_tied() -> None:
    by_storage, by_object = pair()
    layout = ns.find_layout(by_storage)
    assert layout == ns.find_layout(by_object) and layout.aliases == (("decode.weight", "encode.weight"),)
    scores = [ns.group_grad_norms(model, DATA) for model in (by_storage, by_object)]
    assert torch.equal(scores[0].values, scores[1].values)
    edit = ns.scale(ns.select(layout, {"decode.weight": (0, 2)}), -2.0)
    before = snapshot(by_storage)
    expected = ns.bake(edit, by_object)(X)
    for model in (ns.apply(edit, by_storage), ns.bake(edit, by_storage)):
        assert torch.equal(model(X), expected)
    edited = ns.edited_parameters(edit, by_storage)
    assert edited.keys() == {"encode.weight", "decode.weight"}
    assert torch.equal(torch.func.functional_call(by_storage, edited, X), expected)
    swept = [ns.sweep(model, {"cut": edit}, DATA, metric=ns.cross_entropy) for model in (by_storage, by_object)]
    assert torch.equal(swept[0].values("cut"), swept[1].values("cut"))
    assert not swept[0].reasons
    assert_unchanged(before, by_storage)


def test_a_baked_copy_keeps_a_tie_by_storage() -> None:
    model, _ = pair()
    for layer in ("encode.weight", "head.weight"):
        baked = ns.bake(ns.zero_out(ns.select(ns.find_layout(model), {layer: 0})), model)
        assert baked.encode.weight.data_ptr() == baked.decode.weight.data_ptr() != model.encode.weight.data_ptr()
        assert list(baked.state_dict()) == list(model.state_dict())


def test_training_a_view_of_it_trains_the_one_memory() -> None:
    models = pair()
    for model in models:
        edit = ns.zero_out(ns.select(ns.find_layout(model), {"encode.weight": 1}))
        view = ns.apply(edit, model)
        optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(view(X), Y).backward()
            optimizer.step()
    assert torch.equal(models[0].encode.weight, models[1].encode.weight)
    assert torch.equal(models[0].decode.weight, models[1].encode.weight)


def test_one_memory_cut_in_two_ways_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 2))
    model[1].weight.data = model[0].weight.data.T
    message = (
        r"0\.weight: in the same memory as 1\.weight, but cut in another way \(a transpose\?\), .*\n  1\.weight: in"
    )
    refused: list[Callable[[], Any]] = [
        lambda: ns.find_layout(model),
        lambda: ns.group_grad_norms(model, [(torch.randn(2, 4), torch.tensor([0, 1]))]),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert ns.find_layout(model, where="2.*").count == 2
