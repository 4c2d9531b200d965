"""What bad input says: one table for neurons, edits and the three ways to apply them. Nothing changes on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kinds import built
from snapshot import assert_unchanged, snapshot
from torch import nn

import neuronsurgery as ns
from neuronsurgery.errors import inline, nearest

MODEL = built("residual")
LAYOUT = ns.find_layout(MODEL)
NEURONS = ns.select(LAYOUT, {"fc.weight": (0, 2), "b1.weight": 7})
STATE = MODEL.state_dict()


def other_model() -> nn.Module:
    """The same names; another width, a layer less, a transposed one."""
    model = nn.Module()
    model.fc = nn.Linear(8, 2)
    model.b1 = nn.ConvTranspose2d(6, 8, 3)
    model.stem = nn.Conv2d(3, 6, 3)
    return model


OTHER = other_model()
HEADLESS = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2))


def select(chosen: Any) -> Callable[[], object]:
    return lambda: ns.select(LAYOUT, chosen)


NEURON_ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown layer": (select({"fc.wieght": 0}), KeyError, r"no layer matches 'fc\.wieght'; nearest are 'fc\.weight'"),
    "glob without a match": (select({"layer4.*": ...}), KeyError, r"no layer matches 'layer4\.\*'; nearest are '"),
    "index out of range": (
        select({"fc.weight": (0, 3, -1)}),
        IndexError,
        r"fc\.weight has neurons 0\.\.2; out of range: \[3, -1\]",
    ),
    "mask of another shape": (
        select({"fc.weight": torch.ones(4, dtype=torch.bool)}),
        ValueError,
        r"fc\.weight: a mask has shape \(3,\) or \(3, 1\), not \(4,\)",
    ),
    "indices that are no integers": (
        select({"fc.weight": 1.5}),
        TypeError,
        r"fc\.weight: neurons are chosen by integers, a slice, a boolean mask or \.\.\., not by float64 of shape \(\)",
    ),
    "indices in a matrix": (select({"fc.weight": [[0, 1]]}), TypeError, r"not by int64 of shape \(1, 2\)"),
    "a name as an index": (select({"fc.weight": "first"}), TypeError, r"not by <U5 of shape \(\)"),
    "where without a match": (
        lambda: ns.find_layout(MODEL, where="head.*"),
        KeyError,
        r"no layer matches 'head\.\*'; nearest are",
    ),
    "extra without a match": (
        lambda: ns.find_layout(MODEL, extra=["fc.bias", "fc.bais"]),
        KeyError,
        r"no layer matches 'fc\.bais'; nearest are 'fc\.bias'",
    ),
    "predicate that keeps nothing": (
        lambda: ns.find_layout(MODEL, where=lambda *_: False),
        ValueError,
        "the predicate where= keeps none of the 7 layers",
    ),
    "no layer at all": (
        lambda: ns.find_layout(HEADLESS),
        ValueError,
        "no layer found in Sequential: .* name what you want with extra=",
    ),
    "no module": (lambda: ns.find_layout(STATE), TypeError, r"a model is a torch\.nn\.Module, not a OrderedDict"),
    "unknown layer of a layout": (lambda: LAYOUT["fc.wight"], KeyError, r"no layer named 'fc\.wight'; nearest are"),
    "flat numbers of another model": (
        lambda: ns.find_layout(OTHER).flat(NEURONS),
        ValueError,
        "the neurons do not fit the layout, 2 mismatched",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), NEURON_ERRORS.values(), ids=NEURON_ERRORS)
def test_neurons(act: Callable[[], object], error: type[Exception], message: str) -> None:
    before = snapshot(MODEL)
    with pytest.raises(error, match=message):
        act()
    assert_unchanged(before, MODEL)


EDIT_ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "scores for neurons": (
        lambda: ns.zero_out(ns.magnitudes(MODEL)),  # type: ignore[arg-type]
        TypeError,
        "an edit takes a set of Neurons, not a Scores: choose them with topk, top_fraction, sample or select",
    ),
    "a mapping for neurons": (
        lambda: ns.scale({"fc.weight": 0}, 2),  # type: ignore[arg-type]
        TypeError,
        "a set of Neurons, not a dict",
    ),
    "both scales": (
        lambda: ns.random_init(NEURONS, std=1, relative_std=1, seed=0),
        ValueError,
        "give exactly one of std= and relative_std=, not std=1, relative_std=1",
    ),
    "neither scale": (
        lambda: ns.random_noise(NEURONS, seed=0),
        ValueError,
        "give exactly one of std= and relative_std=, not std=None, relative_std=None",
    ),
    "a negative scale": (
        lambda: ns.random_noise(NEURONS, std=-0.1, seed=0),
        ValueError,
        r"std must be a finite number of at least 0, not -0\.1",
    ),
    "an infinite scale": (
        lambda: ns.random_init(NEURONS, relative_std=float("inf"), seed=0),
        ValueError,
        "relative_std must be a finite number, not inf",
    ),
    "a negative seed": (
        lambda: ns.random_init(NEURONS, std=1, seed=-1),
        ValueError,
        "seed must be an integer of at least 0, not -1",
    ),
    "a seed that is no integer": (
        lambda: ns.random_init(NEURONS, std=1, seed=0.5),  # type: ignore[arg-type]
        ValueError,
        r"seed must be an integer of at least 0, not 0\.5",
    ),
    "a factor that is not finite": (
        lambda: ns.scale(NEURONS, float("nan")),
        ValueError,
        "factor must be a finite number, not nan",
    ),
    "an alpha that is not finite": (
        lambda: ns.rewind(NEURONS, STATE, float("inf")),
        ValueError,
        "alpha must be a finite number, not inf",
    ),
    "a factor that is no number": (
        lambda: ns.scale(NEURONS, "2"),  # type: ignore[arg-type]
        TypeError,
        "factor must be a finite number, not '2'",
    ),
    "a composition of something else": (
        lambda: ns.compose(ns.zero_out(NEURONS), NEURONS),  # type: ignore[arg-type]
        TypeError,
        "an edit is made by zero_out, scale, .*, not a Neurons",
    ),
    "a checkpoint that is a model": (
        lambda: ns.rewind(NEURONS, MODEL),  # type: ignore[arg-type]
        TypeError,
        r"a checkpoint is a path or a mapping of tensors, not a Residual: of a model give model\.state_dict\(\)",
    ),
    "a checkpoint that is not there": (
        lambda: ns.rewind(NEURONS, "/nowhere/then.pt"),
        FileNotFoundError,
        r"no checkpoint at /nowhere/then\.pt: give the path of",
    ),
    "a checkpoint of another model": (
        lambda: ns.rewind(NEURONS, OTHER.state_dict()),
        ValueError,
        r"2 layers cannot be rewound to the given mapping:\n"
        r"  b1\.weight: expected shape \(8, 6, 3, 3\), the checkpoint has \(6, 8, 3, 3\)\n"
        r"  fc\.weight: expected shape \(3, 8\), the checkpoint has \(2, 8\)",
    ),
    "a checkpoint without the layer": (
        lambda: ns.rewind(NEURONS, {"fc.weights": STATE["fc.weight"], "b1.weight": STATE["b1.weight"]}),
        ValueError,
        r"1 layers cannot be .*\n  fc\.weight: not in the checkpoint; nearest are 'fc\.weights'",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), EDIT_ERRORS.values(), ids=EDIT_ERRORS)
def test_edits(act: Callable[[], object], error: type[Exception], message: str) -> None:
    before = snapshot(MODEL, STATE)
    with pytest.raises(error, match=message):
        act()
    assert_unchanged(before, MODEL, STATE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("then.safetensors", b"garbage", r"then\.safetensors is no readable safetensors file .*: write it again"),
        ("then.pt", b"garbage", r"then\.pt is neither a safetensors file nor a state dict that torch\.load"),
    ],
)
def test_damaged_checkpoints(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ns.rewind(NEURONS, tmp_path / name)


def test_a_checkpoint_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "then.pt")
    with pytest.raises(ValueError, match=r"then\.pt holds a list, not a state dict: save model\.state_dict\(\)"):
        ns.rewind(NEURONS, tmp_path / "then.pt")


# --- applying -------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any, Any], object]] = {
    "apply": ns.apply,
    "bake": ns.bake,
    "edited_parameters": ns.edited_parameters,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
def test_an_edit_for_another_model_lists_every_mismatch(way: Callable[[Any, Any], object]) -> None:
    neurons = ns.select(LAYOUT, {"fc.weight": 0, "b1.weight": 0, "stem.weight": 0, "down.weight": 1})
    edit = ns.compose(ns.zero_out(neurons), ns.scale(NEURONS, 2.0))
    other = other_model()
    before = snapshot(other)
    message = (
        r"the neurons do not fit the model, 3 mismatched:\n"
        r"  b1\.weight: expected shape \(8, 6, 3, 3\), the model has \(6, 8, 3, 3\)\n"
        r"  down\.weight: not in the model; nearest are .*\n"
        r"  fc\.weight: expected shape \(3, 8\), the model has \(2, 8\)\n"
        r"They were made for another model"
    )
    with pytest.raises(ValueError, match=message):
        way(edit, other)
    assert_unchanged(before, other)
    way(ns.zero_out(ns.select(LAYOUT, {"stem.weight": 0})), other)  # other layers do not matter


@every_way
def test_other_shapes_of_a_row_and_groups_do_not_fit(way: Callable[[Any, Any], object]) -> None:
    grouped = ns.find_layout(nn.ConvTranspose1d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 2, 3\), the model has \(4, 4, 3\)"):
        way(ns.zero_out(ns.select(grouped, {"weight": 0})), nn.ConvTranspose1d(4, 4, 3))


@every_way
def test_two_edits_of_two_models_do_not_compose(way: Callable[[Any, Any], object]) -> None:
    other = ns.zero_out(ns.select(ns.find_layout(other_model()), {"fc.weight": 0}))
    with pytest.raises(
        ValueError,
        match=r"do not fit the model, 1 mismatched:\n  fc\.weight: expected shape \(2, 8\), the model has \(3, 8\)",
    ):
        way(ns.compose(ns.zero_out(NEURONS), other), MODEL)


@every_way
@pytest.mark.parametrize("wrong", ["zero_out", NEURONS, None, MODEL], ids=["a string", "neurons", "None", "a model"])
def test_what_is_no_edit(way: Callable[[Any, Any], object], wrong: object) -> None:
    with pytest.raises(TypeError, match=rf"an edit is made by zero_out, .*, not a {type(wrong).__name__}: write for"):
        way(wrong, MODEL)


@every_way
def test_what_is_no_model(way: Callable[[Any, Any], object]) -> None:
    with pytest.raises(TypeError, match=r"a model is a torch\.nn\.Module, not a dict"):
        way(ns.zero_out(NEURONS), {"fc.weight": torch.ones(3, 8)})


def test_unknown_buffers() -> None:
    with pytest.raises(ValueError, match="buffers must be 'own' or 'shared', not 'copy'"):
        ns.apply(ns.zero_out(NEURONS), MODEL, buffers="copy")  # type: ignore[arg-type]


# --- parameters that cannot be edited: one shared refusal -----------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def on_meta(mesh: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))


def quantised(mesh: Any) -> nn.Module:
    model = plain()
    values = torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.qint8)
    model[1].weight = nn.Parameter(values, requires_grad=False)
    return model


def in_bytes(mesh: Any) -> nn.Module:
    model = plain()
    model[1].weight = nn.Parameter(torch.ones(2, 3, dtype=torch.uint8), requires_grad=False)
    return model


def complex_(mesh: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, dtype=torch.complex64))


def lazy(mesh: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))


def in_sums(mesh: Any) -> nn.Module:
    from torch.distributed.tensor import DTensor, Partial

    model = plain()
    model[1].weight = nn.Parameter(DTensor.from_local(model[1].weight.detach(), mesh, [Partial()]))
    return model


UNSUPPORTED: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "meta": (on_meta, "on the meta device, so it has no values; load the weights first"),
    "quantised": (quantised, r"quantised or otherwise packed \(Parameter\); dequantise it first"),
    "bytes": (in_bytes, "of dtype uint8; only real floating-point weights have neurons"),
    "complex": (complex_, "of dtype complex64; only real"),
    "lazy": (lazy, r"not yet initialised \(a lazy module\); run the model on one batch first"),
    "in sums": (in_sums, r"spread over processes as sums of which each has a part .*; redistribute it"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(("build", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_parameters_that_cannot_be_edited_share_one_refusal(
    build: Callable[[Any], nn.Module], reason: str, mesh: Any
) -> None:
    model = build(mesh)
    message = rf"1 of the model's tensors cannot be read or edited:\n  1\.weight: {reason}.*\nGive a model with plain"
    edit = ns.zero_out(ns.select(ns.find_layout(plain()), {"1.weight": 1}))
    for act in (ns.find_layout, ns.magnitudes, *(lambda m, way=way: way(edit, m) for way in WAYS.values())):
        with pytest.raises(ValueError, match=message):
            act(model)
    others = ns.find_layout(model, where="0.*")
    assert [layer.parameter for layer in others] == ["0.weight"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("build", [on_meta, quantised, in_bytes, complex_], ids=lambda build: build.__name__)
def test_what_an_edit_does_not_touch_may_be_of_any_kind(build: Callable[[Any], nn.Module]) -> None:
    model = build(None)
    edit = ns.zero_out(ns.select(ns.find_layout(model, where="0.*"), {"0.weight": 1}))
    view = ns.apply(edit, model)
    assert view[0].weight[1].abs().max() == 0 and view[1].weight is model[1].weight
    assert ns.bake(edit, model)[0].weight[1].abs().max() == 0


def test_the_refusal_lists_all_and_stays_short() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, device="meta") for _ in range(12)))
    message = (
        r"12 of the model's tensors cannot .*:\n  0\.weight(.*\n)+  9\.weight.*\n  \.\.\. and 2 more\nGive a model"
    )
    with pytest.raises(ValueError, match=message):
        ns.find_layout(model)


def test_long_lists_within_a_sentence_end_after_five_and_three_names_are_near() -> None:
    layout = ns.find_layout(nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))))
    with pytest.raises(KeyError) as unknown:
        layout["9.weight"]
    assert str(unknown.value).count(".weight") == 1 + 3
    assert inline("abcdefg") == "a, b, c, d, e, ... and 2 more"
    assert inline("abcde") == "a, b, c, d, e"


def test_three_names_are_near_at_most() -> None:
    assert nearest("layer", [f"layer{i}" for i in range(9)]).count("layer") == 3
    assert nearest("xyz", ["a", "b", "c", "d"]) == "; nearest are 'a', 'b', 'c'"
