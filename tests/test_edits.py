"""What each edit makes of a row: against the reference, in every dtype, with golden draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from kinds import KINDS, SEED, Kind, Site, built, draw, earlier, few, layer_of, sites, tensor_of
from torch import Tensor, nn
from zoo import CASES, Case, Rows, every_case

import neuronsurgery as ns
from neuronsurgery import Edit, Layout, Neurons
from neuronsurgery.edits import Compose

LAYOUT = Layout((layer_of("w", Rows(0, 6, (4, 3))), layer_of("b", Rows(0, 6, ()))))
SOME = ns.select(LAYOUT, {"w": (1, 4)})
OTHER = ns.select(LAYOUT, {"w": 2, "b": (0, 5)})
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)


class Weights(nn.Module):
    """The parameters of `LAYOUT`, and nothing to run."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4, 3).to(dtype))
        self.b = nn.Parameter(torch.randn(6).to(dtype))


def after(edit: Edit, model: nn.Module, name: str = "w") -> Tensor:
    return ns.edited_parameters(edit, model)[name].detach()


def then() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"w": torch.randn(6, 4, 3, generator=generator), "b": torch.randn(6, generator=generator)}


# --- rows -----------------------------------------------------------------------------------------------------------


@every_case
def test_every_edit_of_every_architecture_is_the_reference_s(case: Case) -> None:
    model, checkpoint = built(case.name), earlier(case)
    neurons = few(ns.find_layout(model))
    for name, kind in KINDS.items():
        view = ns.apply(kind.make(neurons, checkpoint), model)
        for site in sites(case, neurons, checkpoint):
            expected = kind.expect(tensor_of(model, site.name), site)
            found = tensor_of(view, site.name)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), f"{name} of {site.name}"


@every_kind
@every_dtype
@pytest.mark.parametrize("name", ["w", "b"])
def test_every_edit_in_every_dtype(kind: Kind, dtype: torch.dtype, name: str) -> None:
    model, checkpoint = Weights(dtype), {key: value.to(dtype) for key, value in then().items()}
    neurons = ns.select(LAYOUT, {name: (1, 4)})
    found = after(kind.make(neurons, checkpoint), model, name)
    old = tensor_of(model, name)
    assert (found.dtype, found.shape) == (dtype, old.shape)
    expected = kind.expect(old, Site(name, 0, 1, (1, 4), checkpoint[name]))
    ulps = {"rtol": 4 * max(torch.finfo(dtype).eps, 2**-23), "atol": 1e-6}  # draws are float32 even for float64
    torch.testing.assert_close(found, expected, **ulps)
    kept = [0, 2, 3, 5]
    assert torch.equal(found[kept], old[kept])
    assert not torch.equal(found[[1, 4]], old[[1, 4]])


def test_zero_is_exact_where_the_row_is_not_finite() -> None:
    model = Weights()
    with torch.no_grad():
        model.w[1, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    found = after(ns.zero_out(SOME), model)
    assert found[1].flatten().tolist() == [0.0] * 12
    assert not torch.signbit(found[[1, 4]]).any()


def test_float64_weights_are_edited_in_float64() -> None:
    model = Weights(torch.float64)
    third = 1 / 3
    assert torch.equal(after(ns.scale(SOME, third), model)[1], third * model.w[1].detach())
    earlier_rows = {"w": torch.randn(6, 4, 3, dtype=torch.float64)}
    old, new = model.w[1].detach(), earlier_rows["w"][1]
    assert torch.equal(after(ns.rewind(SOME, earlier_rows, 0.3), model)[1], old + 0.3 * (new - old))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stacking_rounds_after_every_edit_as_compose_does(kind: Kind, dtype: torch.dtype) -> None:
    model = Weights(dtype)
    first, second = ns.random_noise(SOME, relative_std=0.3, seed=1), kind.make(SOME, then())
    stacked = tensor_of(ns.apply(second, ns.apply(first, model)), "w")
    assert torch.equal(stacked, tensor_of(ns.apply(ns.compose(first, second), model), "w"))
    baked = ns.bake(second, ns.bake(first, model))
    assert torch.equal(stacked, tensor_of(baked, "w"))


def test_relative_scales_are_of_the_whole_layer_and_of_the_row() -> None:
    model = Weights()
    with torch.no_grad():
        model.w.fill_(1).mul_(torch.arange(1.0, 7).reshape(6, 1, 1))
    layer_rms = math.sqrt(sum(i * i for i in range(1, 7)) / 6)
    drawn = draw(SEED, "w", 4, (4, 3))
    init = after(ns.random_init(SOME, relative_std=2, seed=SEED), model)[4]
    noise = after(ns.random_noise(SOME, relative_std=2, seed=SEED), model)[4]
    torch.testing.assert_close(init, 2 * layer_rms * drawn)
    torch.testing.assert_close(noise, 5 + 2 * 5 * drawn)
    same = after(ns.random_noise(SOME, relative_std=0, seed=SEED), model)
    assert torch.equal(same, model.w)


# --- draws ----------------------------------------------------------------------------------------------------------


def drawn(edit_seed: int, neurons: Neurons, model: nn.Module | None = None, name: str = "w") -> Tensor:
    return after(ns.random_init(neurons, std=1, seed=edit_seed), model or Weights(), name)


def test_golden_draws() -> None:
    """Files and papers name seeds: these numbers must never change."""
    golden = [0.3030865788459778, 0.43895700573921204, 0.07620332390069962, 2.2107253074645996, -0.7366971373558044]
    assert drawn(0, SOME)[1].flatten()[:5].tolist() == pytest.approx(golden, rel=1e-6)
    large = [-0.4491783380508423, 0.29831406474113464, -0.3131309747695923]
    assert drawn(2**80 + 1, SOME)[4, 0].tolist() == pytest.approx(large, rel=1e-6)
    biases = [0.5855258703231812, 0.09918121248483658]
    assert drawn(7, OTHER, name="b")[[0, 5]].tolist() == pytest.approx(biases, rel=1e-6)


def test_draws_are_the_published_recipe() -> None:
    torch.testing.assert_close(drawn(3, SOME)[4], draw(3, "w", 4, (4, 3)), rtol=1e-6, atol=1e-7)


def test_a_draw_depends_on_seed_layer_and_index_alone() -> None:
    alone = drawn(3, ns.select(LAYOUT, {"w": 4}))[4]
    everybody = ns.select(LAYOUT, {"*": ...})
    assert torch.equal(drawn(3, everybody)[4], alone)
    assert torch.equal(drawn(np.int64(3), everybody)[4], alone)
    twice = ns.compose(ns.random_init(SOME, std=9, seed=8), ns.random_init(SOME, std=1, seed=3))
    assert torch.equal(after(twice, Weights())[4], alone)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(drawn(3, SOME, Weights(dtype))[4], alone.to(dtype))
    differing = [drawn(4, SOME)[4], drawn(3, everybody)[3]]
    renamed = nn.Module()
    renamed.v = nn.Parameter(torch.zeros(6, 4, 3))
    differing.append(drawn(3, ns.select(ns.find_layout(renamed), {"v": 4}), renamed, "v")[4])
    assert all((other - alone).abs().min() > 0 for other in differing)


def test_a_longer_row_begins_like_a_shorter_one() -> None:
    values = []
    for size in (15, 16):
        model = nn.Linear(size, 2)
        values.append(drawn(0, ns.select(ns.find_layout(model), {"weight": 0}), model, "weight")[0])
    assert torch.equal(values[0], values[1][:15])


def test_draws_are_standard_normal_and_independent() -> None:
    model = nn.Linear(1000, 100)
    values = drawn(11, ns.select(ns.find_layout(model), {"weight": ...}), model, "weight").double()
    assert values.mean().abs() < 0.015 and (values.std() - 1).abs() < 0.01
    assert (values.pow(4).mean() - 3).abs() < 0.1
    correlations = torch.corrcoef(values) - torch.eye(100)
    assert correlations.abs().max() < 0.17
    assert torch.corrcoef(torch.stack([values[:, 0::2].flatten(), values[:, 1::2].flatten()]))[0, 1].abs() < 0.02


# --- values ---------------------------------------------------------------------------------------------------------

MAKERS: list[Callable[[Neurons], Edit]] = [
    ns.zero_out,
    lambda n: ns.scale(n, 2),
    lambda n: ns.scale(n, 3),
    lambda n: ns.random_init(n, std=0.1, seed=1),
    lambda n: ns.random_init(n, std=0.1, seed=2),
    lambda n: ns.random_init(n, relative_std=0.1, seed=1),
    lambda n: ns.random_noise(n, std=0.1, seed=1),
    lambda n: ns.random_noise(n, std=0.2, seed=1),
    lambda n: ns.rewind(n, then()),
    lambda n: ns.rewind(n, then(), 0.5),
    lambda n: ns.rewind(n, {name: value + 1 for name, value in then().items()}),
    lambda n: ns.compose(ns.zero_out(n), ns.scale(n, 2)),
    lambda n: ns.compose(ns.scale(n, 2), ns.zero_out(n)),
]


def test_edits_are_equal_exactly_when_they_say_the_same() -> None:
    edits = [make(neurons) for neurons in (SOME, OTHER) for make in MAKERS]
    again = [make(neurons) for neurons in (SOME, OTHER) for make in MAKERS]
    for i, one in enumerate(edits):
        assert [one == other for other in again] == [i == j for j in range(len(edits))]
    assert len({*edits, *again}) == len(edits)
    assert ns.scale(SOME, 2) == ns.scale(SOME, 2.0) and ns.scale(SOME, 2) != "scale"


@pytest.mark.parametrize("make", MAKERS)
def test_edits_are_frozen_and_print_in_one_readable_line(make: Callable[[Neurons], Edit]) -> None:
    edit = make(SOME)
    assert "\n" not in repr(edit) and "2 neurons in 1 layer: w[1, 4]" in repr(edit)
    for attribute in ("neurons", "factor", "edits"):
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
            setattr(edit, attribute, None)


def test_what_they_print(tmp_path: Path) -> None:
    path = tmp_path / "then.safetensors"
    safetensors.torch.save_file(then(), path)
    w = "2 neurons in 1 layer: w[1, 4]"
    assert repr(ns.scale(SOME, 0.5)) == f"scale({w}, factor=0.5)"
    assert repr(ns.random_noise(SOME, relative_std=0.1, seed=3)) == f"random_noise({w}, relative_std=0.1, seed=3)"
    assert repr(ns.rewind(SOME, path, 0.5)) == f"rewind({w}, {path}, alpha=0.5)"
    assert repr(ns.compose()) == "compose()"
    many = ns.compose(*[ns.scale(SOME, factor) for factor in range(10)])
    assert repr(many).endswith("factor=5), ... and 4 more)")


leaf_edits = st.sampled_from([ns.zero_out(SOME), ns.scale(OTHER, 2), ns.scale(Neurons(), 2), ns.zero_out(OTHER)])
any_edits = st.recursive(leaf_edits, lambda inner: st.lists(inner, max_size=3).map(lambda edits: ns.compose(*edits)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(any_edits, any_edits, any_edits)
def test_compose_is_associative_with_an_identity(a: Edit, b: Edit, c: Edit) -> None:
    flat = ns.compose(a, b, c)
    assert ns.compose(a, ns.compose(b, c)) == ns.compose(ns.compose(a, b), c) == flat
    assert hash(ns.compose(a, ns.compose(b, c))) == hash(flat)
    assert ns.compose(ns.compose(), a) == ns.compose(a, ns.compose()) == ns.compose(a)
    assert flat.neurons == a.neurons | b.neurons | c.neurons


def test_compose_keeps_everything_that_matters() -> None:
    double, half = ns.scale(SOME, 2), ns.scale(SOME, 0.5)
    assert ns.compose(double) == double
    assert isinstance(ns.compose(double, double), Compose) and ns.compose(double, double) != double
    assert ns.compose(double, ns.zero_out(Neurons())) == double
    assert torch.equal(after(ns.compose(double, half, ns.zero_out(OTHER)), Weights())[2], torch.zeros(4, 3))
    model = Weights()
    assert torch.equal(after(ns.compose(double, double), model)[1], 4 * model.w[1])


def test_the_rows_of_a_composition_are_those_of_its_plan() -> None:
    weight, layer = torch.randn(6, 4, 3), LAYOUT["w"]
    edit = ns.compose(ns.scale(SOME, 2), ns.zero_out(OTHER), ns.random_noise(SOME, relative_std=1, seed=1))
    model = Weights()
    model.w.data.copy_(weight)
    assert torch.equal(edit.rows(layer, torch.tensor([4, 2, 0]), weight), after(edit, model)[[4, 2, 0]])


# --- rewinding ------------------------------------------------------------------------------------------------------


def write(form: str, folder: Path) -> Any:
    """The tensors of `then` in one of the forms that a checkpoint comes in."""
    tensors = then()
    nested: dict[str, Any] = {
        "torch": tensors,
        "nested state_dict": {"epoch": 3, "state_dict": tensors},
        "nested model": {"model": tensors, "optimizer": {"w": torch.zeros(1)}},
        "DDP": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "compiled": {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()}},
    }
    if form == "mapping":
        return tensors
    if form == "DDP mapping":
        return nested["DDP"]
    path = folder / f"{form}.{'safetensors' if form.startswith('safetensors') else 'pt'}"
    if form == "safetensors of DDP":
        safetensors.torch.save_file(nested["DDP"], path)
    elif form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(nested[form], path)
    return str(path) if form == "torch" else path


FORMS = ["mapping", "DDP mapping", "safetensors", "safetensors of DDP", "torch", "nested state_dict", "nested model"]
FORMS += ["DDP", "compiled"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0, 0.5, 1, -1.5])
def test_rewinding_from_every_form_of_checkpoint(form: str, alpha: float, tmp_path: Path) -> None:
    model, neurons = Weights(), SOME | OTHER
    edit = ns.rewind(neurons, write(form, tmp_path), alpha)
    old, new = tensor_of(model, "w"), then()["w"]
    found = after(edit, model)
    expected = new if alpha == 1 else old if alpha == 0 else old + alpha * (new - old)
    rows = [1, 2, 4]
    torch.testing.assert_close(found[rows], expected[rows], **({"rtol": 0, "atol": 0} if alpha in (0, 1) else {}))
    assert torch.equal(found[[0, 3, 5]], old[[0, 3, 5]])
    assert edit == ns.rewind(neurons, then(), alpha) and hash(edit) == hash(ns.rewind(neurons, then(), alpha))
    assert (edit.path is None) == ("mapping" in form)


def test_a_model_may_have_a_part_called_module() -> None:
    """Only a wrapper's prefix is taken off."""
    model = nn.Module()
    model.module = nn.Linear(3, 2)
    neurons = ns.select(ns.find_layout(model), {"module.weight": 1})
    other = {name: value + 1 for name, value in model.state_dict().items()}
    assert torch.equal(ns.apply(ns.rewind(neurons, other), model).module.weight[1], model.module.weight[1] + 1)


def test_a_mapping_that_changes_later_does_not_matter() -> None:
    tensors = then()
    edit = ns.rewind(SOME, tensors)
    tensors["w"].zero_()
    tensors.clear()
    assert torch.equal(after(edit, Weights())[1], then()["w"][1])


def test_a_file_that_changed_or_went_is_a_clear_error(tmp_path: Path) -> None:
    """Not for the edit, which has its rows, but for whoever loads it from a file, which has only the path."""
    path, saved = tmp_path / "then.safetensors", tmp_path / "edit.safetensors"
    safetensors.torch.save_file(then(), path)
    edit, model = ns.rewind(SOME, path), Weights()
    ns.save_file(edit, saved)
    changed = then()
    changed["w"][0] += 1  # not one of the rows
    safetensors.torch.save_file(changed, path)
    assert torch.equal(after(ns.load_file(saved), model)[1], then()["w"][1])
    changed["w"][1, 0, 0] += 1
    safetensors.torch.save_file(changed, path)
    with pytest.raises(ValueError, match=r"rows of 2 neurons .* in .*then\.safetensors are no longer those"):
        ns.load_file(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*then\.safetensors: give the path of"):
        ns.load_file(saved)
    assert torch.equal(after(edit, model)[1], then()["w"][1])


def test_a_checkpoint_may_be_in_another_dtype() -> None:
    model = Weights(torch.bfloat16)
    edit = ns.rewind(SOME, {"w": then()["w"].double()})
    assert torch.equal(after(edit, model)[1], then()["w"][1].to(torch.bfloat16))


def test_layers_of_other_models_in_a_checkpoint_do_not_matter() -> None:
    case = CASES["residual"]
    model = built("residual")
    neurons = ns.select(ns.find_layout(model), {"b1.weight": 2})
    checkpoint = {**case.build(1).state_dict(), "fc.weight": torch.zeros(99, 1), "new": torch.zeros(1)}
    found = after(ns.rewind(neurons, checkpoint), model, "b1.weight")
    assert torch.equal(found[2], checkpoint["b1.weight"][2])
