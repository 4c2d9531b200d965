"""Networks by name: the head that they get, the weights that fit, and what is said about those that do not."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from neuronsurgery.study import models
from neuronsurgery.study.models import DEFAULTS, Built, build_model

pytest.importorskip("torchvision")
pytest.importorskip("timm")

SHUFFLENET = "shufflenet_v2_x0_5"
HEADS = {SHUFFLENET: "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3"}
HEADS |= {"test_vit": "head", "regnet_x_400mf": "fc"}  # timm's; and one that cannot be made on the meta device


def weights_of(built: Built) -> dict[str, Tensor]:
    return built.model.state_dict()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    """The weights of a pre-trained network of 1000 classes, in a manner of speaking."""
    return weights_of(build_model(SHUFFLENET, 1000, seed=7))


@pytest.fixture(scope="module")
def fresh() -> dict[str, Tensor]:
    """The weights that the network of two classes has without a file, by seed 5."""
    return weights_of(build_model(SHUFFLENET, 2, seed=5))


def save(tensors: object, path: Path) -> Path:
    torch.save(tensors, path)
    return path


# Names


@pytest.mark.parametrize("arch", ["small_resnet", "resnet18", "mobilenet_v3_small", "squeezenet1_1", "test_vit"])
def test_any_network_gets_a_head_for_the_classes(arch: str) -> None:
    built = build_model(arch, 3)
    size = 160 if arch == "test_vit" else 64
    with torch.no_grad():
        assert built.model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert not built.pretrained
    assert re.fullmatch(rf"{arch}, [\d,]+ parameters: RANDOM weights \(seed 0\), nothing pre-trained", str(built))
    assert arch != "small_resnet" or str(built).startswith("small_resnet, 77,587 parameters: ")


def test_names_in_both_libraries_are_torchvisions_unless_timm_is_named() -> None:
    assert type(build_model("resnet18", 2).model).__module__.startswith("torchvision.")
    assert type(build_model("timm:resnet18", 2).model).__module__.startswith("timm.")
    assert type(build_model("test_vit.r160_in1k", 2).model).__module__.startswith("timm.")


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_the_inceptions_return_logits_in_training_too(arch: str) -> None:
    with torch.device("meta"):
        model = models._find_constructor(arch)(2, 0)
        assert model.training
        assert model.transform_input
        assert model(torch.zeros(2, 3, 299, 299)).shape == (2, 2)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no network is called 'resnet5O'; the nearest of \d+ names: .*resnet50.*Pass small"
    ):
        build_model("resnet5O", 2)
    with pytest.raises(ValueError, match=r"'fasterrcnn_resnet50_fpn'; the nearest"):  # no classifier
        build_model("fasterrcnn_resnet50_fpn", 2)
    with pytest.raises(ValueError, match=r"names: none is near"):
        build_model("hf-hub:QQQQQQ/%%%%%%%%%%%%%%%%%%%%%%%", 2)


def test_without_the_libraries_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torchvision", "timm"):
        monkeypatch.setitem(__import__("sys").modules, library, None)
    assert build_model("small_resnet", 2).model is not None
    with pytest.raises(
        ValueError, match=r"the nearest of 1 names: .*\(not all installed: pip install 'neuronsurgery\[study\]'"
    ):
        build_model("resnet50", 2)
    with pytest.raises(ImportError, match=r"timm is not installed: pip install 'neuronsurgery\[study\]'"):
        build_model("timm:resnet50", 2)


def test_a_classifier_has_at_least_two_classes() -> None:
    with pytest.raises(ValueError, match="classes must be at least 2, found 1"):
        build_model("small_resnet", 1)


# Seeds


@pytest.mark.parametrize("arch", ["small_resnet", SHUFFLENET, "test_vit"])
def test_weights_depend_on_the_seed_alone_and_the_global_state_stays(arch: str) -> None:
    before = torch.random.get_rng_state()
    first = weights_of(build_model(arch, 2, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(first, weights_of(build_model(arch, 2, seed=3)))
    assert not same(first, weights_of(build_model(arch, 2, seed=4)))


# Weights


def in_module(tensors: dict[str, Tensor]) -> object:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def compiled_in_ddp(tensors: dict[str, Tensor]) -> object:
    return {"epoch": 3, "state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}}


def lightning(tensors: dict[str, Tensor]) -> object:
    return {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "hyper_parameters": {"lr": 0.1},
    }


def backbone(tensors: dict[str, Tensor]) -> object:
    return {"model": {f"backbone.{name}": tensor for name, tensor in tensors.items() if not name.startswith("fc.")}}


def nested_twice(tensors: dict[str, Tensor]) -> object:
    return {"model": {"state_dict": tensors}}


def half(tensors: dict[str, Tensor]) -> object:
    return {name: t.to(torch.float64) if t.is_floating_point() else t for name, t in tensors.items()}


STYLES = [dict, in_module, compiled_in_ddp, lightning, backbone, nested_twice, half]


@pytest.mark.parametrize("style", STYLES)
def test_a_state_dict_in_every_style(
    style: Callable[[dict[str, Tensor]], object], source: dict[str, Tensor], fresh: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(style(source), tmp_path / "weights.pth")
    before = torch.random.get_rng_state()
    built = build_model(SHUFFLENET, 2, path, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in weights_of(built).items():
        assert torch.equal(tensor, fresh[name] if name.startswith("fc.") else source[name]), name
    assert built.pretrained
    assert built.note.endswith(f"weights of {path}, new head for 2 classes (seed 5)")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_by_whatever_name(name: str, source: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(source, tmp_path / name)
    built = build_model(SHUFFLENET, 1000, tmp_path / name)
    assert same(weights_of(built), source)
    assert built.note.endswith("head included")


@pytest.mark.parametrize("arch", HEADS)
def test_a_head_for_other_classes_is_left_out_and_nothing_else(arch: str, tmp_path: Path) -> None:
    given = weights_of(build_model(arch, 5, seed=1))
    built = build_model(arch, 2, save(given, tmp_path / "w.pt"))
    changed = {name for name, tensor in weights_of(built).items() if not torch.equal(tensor, given[name])}
    assert changed <= {f"{HEADS[arch]}.weight", f"{HEADS[arch]}.bias"}
    assert "new head" in built.note


def test_the_studys_own_network_takes_weights_too(tmp_path: Path) -> None:
    given = weights_of(build_model("small_resnet", 2, seed=1))
    assert same(weights_of(build_model("small_resnet", 2, save(given, tmp_path / "w.pt"))), given)


def test_both_heads_of_a_distilled_transformer_are_found() -> None:
    construct = models._find_constructor("deit_tiny_distilled_patch16_224")
    assert models._head_names(construct, 2) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_name_that_begins_like_a_prefix_is_left_alone() -> None:
    one = torch.ones(1)
    assert models._strip_prefixes({"module.model.weight": one}, {"model.weight"}).keys() == {"model.weight"}
    assert models._strip_prefixes({"model.weight": one}, {"weight"}).keys() == {"weight"}
    assert models._strip_prefixes({"model.other": one}, {"weight"}).keys() == {"model.other"}
    with pytest.raises(ValueError, match=r"the file has 'weight' twice, once as 'module.weight': keep only"):
        models._strip_prefixes({"weight": one, "module.weight": one}, {"weight"})


def test_old_files_of_densenets_and_auxiliary_heads_fit() -> None:
    old, new = "features.denseblock1.denselayer1.norm.1.weight", "features.denseblock1.denselayer1.norm1.weight"
    assert models._bare_name(f"module.{old}", {new}) == new
    network, head = nn.Linear(2, 3), {"weight", "bias"}
    given = {"weight": torch.ones(3, 2), "bias": torch.ones(3), "AuxLogits.fc.weight": torch.ones(3)}
    assert models._fit(network, given, head, "no").keys() == head


def test_weights_from_before_batches_were_counted_fit(source: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")}
    assert build_model(SHUFFLENET, 2, save(old, tmp_path / "old.pt")).pretrained


def net(tensors: dict[str, Tensor]) -> object:
    return {"state_dict": {f"net.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3}


def averaged(tensors: dict[str, Tensor]) -> object:
    return {"ema": {"shadow": tensors}, "critic": {"x": torch.ones(2)}, "optimizer": {"stem.weight": torch.ones(1)}}


def cyclic(tensors: dict[str, Tensor]) -> object:
    checkpoint: dict[str, object] = {"model": tensors}
    checkpoint["state_dict"] = checkpoint
    return checkpoint


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return weights_of(build_model("small_resnet", 2, seed=1))


@pytest.mark.parametrize("style", [net, averaged, cyclic])
def test_what_is_unambiguous_is_read(
    style: Callable[[dict[str, Tensor]], object], small: dict[str, Tensor], tmp_path: Path
) -> None:
    assert same(weights_of(build_model("small_resnet", 2, save(style(small), tmp_path / "w.pt"))), small)


def test_of_two_dictionaries_that_fit_none_is_taken(small: dict[str, Tensor], tmp_path: Path) -> None:
    path = save({"net": {f"module.{name}": t for name, t in small.items()}, "ema": dict(small)}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"w\.pt holds the dictionaries 'net', 'ema', each of which fits: pass the one"
    ):
        build_model("small_resnet", 2, path)


def test_a_folder_in_shards(small: dict[str, Tensor], tmp_path: Path) -> None:
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(small)}
    for file in set(files.values()):
        part = {name: small[name].contiguous() for name in small if files[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    built = build_model("small_resnet", 2, tmp_path)
    assert same(weights_of(built), small) and built.note.endswith(f"weights of {tmp_path}, head included")


def test_a_name_of_a_million_prefixes_takes_little_time() -> None:
    started = time.monotonic()
    assert models._bare_name("module." * 200_000 + "x", {"weight"}) == "module." * 200_000 + "x"
    assert models._bare_name("module." * 200_000 + "weight", {"weight"}) == "weight"
    assert time.monotonic() - started < 5


# Files that do not do


def test_tensors_of_no_plain_numbers_are_listed(small: dict[str, Tensor], tmp_path: Path) -> None:
    path = save({**small, "stem.weight": small["stem.weight"].cfloat()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"  1 of no plain numbers: stem\.weight \(complex64, strided, on cpu\)"):
        build_model("small_resnet", 2, path)


def test_every_misfit_is_listed_at_once(source: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = dict(source)
    del wrong["conv1.1.bias"], wrong["conv5.0.weight"]
    wrong |= {"head.weight": torch.ones(2), "conv1.0.weight": torch.ones(24, 1, 3, 3)}
    path = save({f"module.{name}": tensor for name, tensor in wrong.items()}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="does not fit") as caught:
        build_model(SHUFFLENET, 2, path)
    assert str(caught.value).splitlines() == [
        f"{path} does not fit {SHUFFLENET}:",
        "  2 missing in the file: conv1.1.bias, conv5.0.weight",
        "  1 in the file only: module.head.weight",
        "  1 of another shape: conv1.0.weight (file 24x1x3x3, network 24x3x3x3)",
        "Pass weights of the same network",
    ]


def test_the_weights_of_another_network_are_summed_up(source: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(source, tmp_path / "shufflenet.pt")
    with pytest.raises(
        ValueError, match=r"does not fit small_resnet:\n  \d\d missing in the file: stem.weight, .*, \.\.\.\n"
    ):
        build_model("small_resnet", 2, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, r"w.pt holds no tensors: save model.state_dict\(\)"),
        (torch.ones(3), r"w.pt holds a Tensor, not a state dict: save model.state_dict\(\)"),
        (nn.Linear(2, 2), r"neither a safetensors file nor a state dict that torch.load\(weights_only=True\) reads \("),
        (
            {"args": argparse.Namespace(), "model": {}},
            r"neither a safetensors file nor .*save model.state_dict\(\) alone",
        ),
    ],
)
def test_files_without_a_state_dict(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("small_resnet", 2, save(content, tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"<html>", r"w.safetensors is no readable safetensors file .*: write it again"),
        ("w.pt", b"\x08\0\0\0\0\0\0\0{broken}", r"w.pt is no readable safetensors file "),
        ("w.pt", b"<html>not found</html>", r"w.pt is neither a safetensors file nor a state dict"),
        ("w.pt", b"", r"w.pt is neither a safetensors file nor a state dict"),
    ],
)
def test_files_that_are_something_else(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_model("small_resnet", 2, tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.pt: give the path of a safetensors file"):
        build_model("small_resnet", 2, tmp_path / "none.pt")


# Defaults


def test_defaults_are_those_of_the_sources() -> None:
    assert {name: (default.arch, default.recipe.epochs) for name, default in DEFAULTS.items()} == {
        "synthetic": ("small_resnet", 30),
        "digits": ("small_resnet", 30),
        "waterbirds": ("resnet50", 40),
        "celeba": ("resnet50", 20),
        "folder": ("resnet50", 40),
    }
    birds, faces = DEFAULTS["waterbirds"].recipe, DEFAULTS["celeba"].recipe
    assert (birds.optimizer, birds.learning_rate, birds.weight_decay, birds.batch_size) == ("sgd", 1e-3, 1e-3, 32)
    assert (faces.optimizer, faces.learning_rate, faces.weight_decay, faces.batch_size) == ("sgd", 1e-3, 1e-4, 128)
    assert birds.momentum == faces.momentum == 0.9
