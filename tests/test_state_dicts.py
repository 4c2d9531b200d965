"""Checkpoints that others wrote: what is unambiguous is read, and what is not is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import MODEL, NEURONS, THEN
from torch import Tensor

import neuronsurgery as ns
from neuronsurgery import state_dicts
from neuronsurgery.state_dicts import choose_dictionary, find_dictionaries, wanted_names
from neuronsurgery.wrappers import without_wrappers

EXPECTED = ns.rewind(NEURONS, THEN)
OTHERS = {name: tensor + 1 for name, tensor in THEN.items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor] = THEN) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def cyclic(**entries: Any) -> dict[str, Any]:
    made = dict(entries)
    made["state_dict"] = made["again"] = made
    return made


READ: dict[str, Callable[[], Mapping[str, Any]]] = {
    **{key: lambda key=key: {"epoch": 3, key: THEN} for key in ("state_dict", "model_state_dict", "net", "ema", "any")},
    "nested deeper": lambda: {"checkpoint": {"ema": {"shadow": THEN}}},
    "beside another network's": lambda: {"generator": THEN, "critic": {"x.weight": torch.ones(2)}},
    "beside tensors of the optimiser": lambda: {"model": THEN, "optimizer": {"up.weight": torch.zeros(1)}},
    "beside one of another size": lambda: {"model": THEN, "wide": {n: torch.cat([t, t]) for n, t in THEN.items()}},
    "beside a part of one": lambda: {"model": THEN, "best": {"up.weight": OTHERS["up.weight"]}},
    "one dictionary under two names": lambda: (lambda one: {"model": one, "ema": one})(dict(THEN)),
    "itself before what is in it": lambda: {**THEN, "ema": OTHERS},
    "Lightning's net": lambda: {"state_dict": prefixed("net."), "hyper_parameters": {"lr": 0.1}},
    "Lightning's model, compiled": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "a cycle": lambda: cyclic(model=THEN, epoch=3),
    "a name of many parts": lambda: {**THEN, "module." * 200_000 + "up.weight.x": torch.ones(1)},
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_unambiguous_is_read(make: Callable[[], Any], saved: bool, tmp_path: Path) -> None:
    checkpoint = make()
    if saved:
        torch.save(checkpoint, tmp_path / "then.pt")
    started = time.monotonic()
    assert ns.rewind(NEURONS, tmp_path / "then.pt" if saved else checkpoint) == EXPECTED
    assert time.monotonic() - started < 5


REFUSED: dict[str, tuple[Any, str]] = {
    "two that fit": (
        {"epoch": 3, "ema": THEN, "net": OTHERS},
        r"holds the dictionaries 'ema', 'net', each of which fits: pass the one you mean, e\.g\. torch\.load\(path\)"
        r"\['ema'\]$",
    ),
    "two deeper ones": (
        {"a": {"model": THEN}, "b": {"model": OTHERS}},
        r"holds the dictionaries 'a\.model', 'b\.model', .*torch\.load\(path\)\['a'\]\['model'\]$",
    ),
    "none": (
        {"epoch": 3},
        r"3 layers cannot be rewound to .*\n  up\.weight: not in the checkpoint; there are none at all",
    ),
    "sparse": ({**THEN, "out.weight": THEN["out.weight"].to_sparse()}, r"out\.weight: expected plain .*sparse_coo"),
    "complex": ({**THEN, "out.weight": THEN["out.weight"].cfloat()}, r"out\.weight: .*the checkpoint has complex64"),
    "without values": ({**THEN, "out.weight": THEN["out.weight"].to("meta")}, r"out\.weight: .* on meta"),
    "integers": ({**THEN, "out.weight": THEN["out.weight"].long()}, r"out\.weight: .*the checkpoint has int64"),
    "a list": ({**THEN, "out.weight": THEN["out.weight"].tolist()}, r"out\.weight: not in the checkpoint"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(("checkpoint", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_is_named(checkpoint: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ns.rewind(NEURONS, checkpoint)
    torch.save(checkpoint, tmp_path / "then.pt")
    with pytest.raises(ValueError, match=message) as caught:
        ns.rewind(NEURONS, tmp_path / "then.pt")
    assert "then.pt" in str(caught.value)


def test_names_are_taken_apart_in_little_time() -> None:
    long = "module." * 200_000 + "x"
    started = time.monotonic()
    assert without_wrappers(long) == "x"
    assert wanted_names(["x", "y"], [long]) == {"x": long, "y": None}
    assert time.monotonic() - started < 2


def test_a_dictionary_is_chosen_by_what_fits() -> None:
    found = {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}
    assert choose_dictionary(found, lambda tensors: "y" in tensors, "it") is found["b"]
    assert choose_dictionary(found, lambda tensors: 0, "it") is found["a"]
    assert choose_dictionary({}, lambda tensors: 0, "it") == {}
    assert find_dictionaries({1: {2: torch.ones(1)}})["1"].keys() == {"2"}


# --- folders and shards ---------------------------------------------------------------------------------------------

SHARDS = [{"up.weight", "up.bias", "head.weight"}, {"head.bias", "out.weight"}, {"out.bias"}]


def sharded(folder: Path, kind: str) -> Path:
    """A folder as Hugging Face's, in three shards; the index is what comes back."""
    suffix, save = (("safetensors", safetensors.torch.save_file), ("bin", torch.save))[kind == "bin"]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = {}
    for number, names in enumerate(SHARDS):
        file = f"{stem}-0000{number + 1}-of-00003.{suffix}"
        save({name: THEN[name] for name in sorted(names)}, folder / file)
        files |= dict.fromkeys(sorted(names), file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_in_shards(kind: str, tmp_path: Path) -> None:
    index = sharded(tmp_path, kind)
    assert ns.rewind(NEURONS, index) == ns.rewind(NEURONS, tmp_path) == EXPECTED
    assert torch.equal(dict(find_dictionaries(tmp_path)[""])["head.bias"], THEN["head.bias"])
    ns.save_file(ns.rewind(NEURONS, tmp_path), tmp_path / "edit")
    assert ns.load_file(tmp_path / "edit") == EXPECTED


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_only_the_shards_with_wanted_tensors_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sharded(tmp_path, kind)
    opened, original = [], state_dicts._file
    monkeypatch.setattr(state_dicts, "_file", lambda path: opened.append(path.name) or original(path))
    some = ns.select(ns.find_layout(MODEL), {"up.weight": 0, "head.weight": 1})
    assert ns.rewind(some, index) == ns.rewind(some, THEN)
    assert len(opened) == 1 and "00001" in opened[0]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    (safetensors.torch.save_file if "safe" in name else torch.save)(THEN, tmp_path / name)
    assert ns.rewind(NEURONS, str(tmp_path)) == EXPECTED


def without_shard(index: Path) -> None:
    (index.parent / "model-00003-of-00003.safetensors").unlink()


def lacking(index: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, index.parent / "model-00003-of-00003.safetensors")


def leading_away(index: Path) -> None:
    index.write_text(index.read_text().replace("model-00003", "../model-00003"))


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a shard that is gone": (without_shard, FileNotFoundError, r"no file .*00003-of-00003.safetensors, which .* says"),
    "a tensor that is not where it should be": (lacking, ValueError, r"00003.safetensors lacks out\.bias, which model"),
    "a file elsewhere": (leading_away, ValueError, r"the index .*json names '\.\./model-00003.*, no file beside it"),
    "no index": (lambda index: index.write_text("{}"), ValueError, r"the index .* is damaged \(KeyError\('weight_map'"),
    "no JSON": (lambda index: index.write_bytes(b"\xff{"), ValueError, r"the index .* is damaged \(UnicodeDecode"),
    "deep JSON": (
        lambda index: index.write_text("[" * 100_000),
        ValueError,
        r"the index .* is damaged \(RecursionError",
    ),
    "a list": (lambda index: index.write_text('{"weight_map": [1]}'), ValueError, r"the index .* is damaged"),
    "numbers": (lambda index: index.write_text('{"weight_map": {"a": 1}}'), ValueError, r"the index .* is damaged"),
    "nothing": (
        lambda index: index.unlink(),
        FileNotFoundError,
        r"no checkpoint in the folder .*: it has none of model",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder(
    change: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    change(sharded(tmp_path, "safetensors"))
    with pytest.raises(error, match=message):
        ns.rewind(NEURONS, tmp_path)


def test_a_path_that_is_no_path() -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ns.rewind(NEURONS, "x" * 5000)
    with pytest.raises(FileNotFoundError, match="no file at"):
        ns.load_file("x" * 5000)


def test_a_dtype_that_is_unknown_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file(THEN, tmp_path / "then.safetensors")
    found = find_dictionaries(tmp_path / "then.safetensors")[""]
    assert set(found) == set(THEN) and len(found) == len(THEN) and "x" not in found

    class Unknown:
        def get_tensor(self, name: str) -> Tensor:
            raise AttributeError("module 'torch' has no attribute 'float4'")

    monkeypatch.setattr(found, "_open", Unknown())
    with pytest.raises(ValueError, match=r"out\.bias of .*then\.safetensors cannot be read \(AttributeError"):
        found["out.bias"]
