"""Files give back what was saved, whole or not at all, and run no code."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from kinds import built, few
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import neuronsurgery as ns
from neuronsurgery import files

LAYOUT = ns.find_layout(built("unet_grouped"), extra="*.bias")
NEURONS = ns.select(LAYOUT, {"up.weight": (0, 5), "out.weight": 1})
THEN = {name: parameter.detach() + 1 for name, parameter in built("unet_grouped").named_parameters()}
NAN = ns.GroupMetrics(("a", 3, "3"), (math.nan, 0.1, math.inf), (0, 2, 7))


ATTENTION = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3)})
HEADS = ns.find_layout(ATTENTION, patterns={"a.out_proj.weight": ("e (head d) -> head e d", {"d": 4})})


@ns.file_kind("clamp")
@dataclass(frozen=True)
class Clamp(ns.Edit):
    """Every entry at most so far from 0."""

    neurons: ns.Neurons
    bound: float

    def rows(self, layer: ns.Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
        return layer.take(weight, indices).clamp(-self.bound, self.bound)


def swept(edits: dict[str, ns.Edit] | None = None, **options: Any) -> ns.Sweep:
    model, layout = built("mlp"), ns.find_layout(built("mlp"))
    cuts = {"a": ns.zero_out(ns.select(layout, {"0.weight": ...})), "b": ns.scale(ns.select(layout, {"*": 0}), 2.0)}
    data = [(torch.eye(5)[:3], torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])), (torch.eye(5)[3:], [1, 2], [2, 0])]
    return ns.sweep(model, cuts if edits is None else edits, data, **options)


def scores(groups: tuple[int | str, ...]) -> ns.Scores:
    values = torch.randn(len(groups), LAYOUT.count)
    return ns.Scores(values, groups, tuple(range(len(groups))), LAYOUT, "gradient norm")


def rewound(alpha: float = 0.5) -> ns.Edit:
    return ns.rewind(NEURONS, THEN, alpha)


OBJECTS: dict[str, Callable[[], Any]] = {
    "neurons": lambda: NEURONS,
    "no neurons": ns.Neurons,
    "tied neurons": lambda: ns.select(ns.find_layout(built("tied"), extra="head.*"), {"head.weight": 2}),
    "scores": lambda: scores((3, 0, 1)),
    "scores of strings": lambda: scores(("blond man", "ü")),
    "scores of both": lambda: scores(("1", 1)),
    "scores of a tied model": lambda: ns.magnitudes(built("tied"), extra="embed.*"),
    "metrics": lambda: ns.GroupMetrics((0, 1), (0.1, 1 / 3), (10, 3)),
    "zero_out": lambda: ns.zero_out(NEURONS),
    "zero_out of nothing": lambda: ns.zero_out(ns.Neurons()),
    "scale": lambda: ns.scale(NEURONS, 1 / 3),
    "random_init": lambda: ns.random_init(NEURONS, std=0.1, seed=2**90),
    "random_noise": lambda: ns.random_noise(NEURONS, relative_std=0.1, seed=0),
    "rewind": rewound,
    "rewind of nothing": lambda: ns.rewind(ns.Neurons(), {}),
    "rewind in bfloat16": lambda: ns.rewind(NEURONS, {name: tensor.bfloat16() for name, tensor in THEN.items()}),
    "the identity": ns.compose,
    "compose": lambda: ns.compose(rewound(), ns.zero_out(few(LAYOUT)), rewound(1.0), ns.scale(NEURONS, 2)),
    "compose of one rewind twice": lambda: ns.compose(rewound(), ns.scale(NEURONS, 2), rewound()),
    "compose of the same object twice": lambda: (lambda edit: ns.compose(edit, edit))(rewound()),
    "heads": lambda: ns.select(HEADS, {"a.out_proj.weight": (1, 2)}),
    "heads and rows": lambda: ns.zero_out(
        ns.select(HEADS, {"a.out_proj.weight": 1}) | ns.select(ns.find_layout(ATTENTION), {"a.out_proj.weight": 3})
    ),
    "metrics with a direction": lambda: ns.GroupMetrics((0, 1), (0.1, 1 / 3), (10, 3), larger_is_better=False),
    "layout": lambda: LAYOUT,
    "layout of heads": lambda: HEADS,
    "sweep": lambda: swept(),
    "sweep of numbers": lambda: swept(metric=ns.cross_entropy),
    "sweep of nothing": lambda: swept({}),
    "inferred groups": lambda: ns.infer_groups(torch.arange(30.0), torch.tensor([4, 9, 9] * 10), rule=0.3),
    "memorization": lambda: ns.memorization.memorization_scores(lambda i: torch.arange(6) < 3, 6, 20, 0.5, seed=2),
    "an edit of one's own": lambda: ns.compose(Clamp(NEURONS, 0.25), ns.zero_out(NEURONS)),
}
every_object = pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)


@every_object
def test_what_is_saved_is_loaded(make: Callable[[], Any], tmp_path: Path) -> None:
    made, path = make(), tmp_path / "it.safetensors"
    before = snapshot(built("unet_grouped"), made, THEN)
    ns.save_file(made, path)
    assert_unchanged(before, built("unet_grouped"), made, THEN)
    loaded = ns.load_file(str(path))
    assert loaded == made and type(loaded) is type(made)
    assert repr(loaded) == repr(made)
    assert os.listdir(tmp_path) == ["it.safetensors"]
    if isinstance(loaded, ns.Edit):
        model = ATTENTION if "a.out_proj.weight" in loaded.neurons.masks() else built("unet_grouped")
        one, other = ns.bake(made, model).state_dict(), ns.bake(loaded, model).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_name_of_a_kind_is_given_once() -> None:
    with pytest.raises(ValueError, match="files call Clamp 'clamp' already: choose another name"):

        @ns.file_kind("clamp")
        @dataclass(frozen=True)
        class Other(ns.Edit):
            neurons: ns.Neurons

            def rows(self, layer: ns.Layer, indices: Tensor, weight: Tensor, constants: Tensor | None = None) -> Tensor:
                return layer.take(weight, indices)


def test_metrics_that_are_not_finite_and_groups_of_both_kinds(tmp_path: Path) -> None:
    ns.save_file(NAN, tmp_path / "metrics")
    loaded = ns.load_file(tmp_path / "metrics")
    assert isinstance(loaded, ns.GroupMetrics)
    assert (loaded.groups, loaded.counts) == (NAN.groups, NAN.counts)
    assert math.isnan(loaded["a"]) and loaded[3] == 0.1 and loaded["3"] == math.inf


def test_a_rewind_from_a_path_keeps_the_path(tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "then.safetensors", tmp_path / "edit"
    safetensors.torch.save_file(THEN, checkpoint)
    edit = ns.compose(ns.rewind(NEURONS, checkpoint, 0.5), rewound(1.0))
    ns.save_file(edit, path)
    loaded = ns.load_file(path)
    assert loaded == edit and str(checkpoint) in repr(loaded)
    model = built("unet_grouped")
    assert torch.equal(ns.apply(loaded, model).up.weight, ns.apply(edit, model).up.weight)
    checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ns.load_file(path)
    assert torch.equal(ns.apply(loaded, model).up.weight, ns.apply(edit, model).up.weight)


def test_scores_keep_their_order_and_choose_the_same(tmp_path: Path) -> None:
    made = scores((2, 0, 1))
    ns.save_file(made, tmp_path / "scores")
    loaded = ns.load_file(tmp_path / "scores")
    assert ns.topk(loaded, 3) == ns.topk(made, 3) and loaded.layout.digest == LAYOUT.digest
    assert ns.topk(loaded[0], 3) == ns.topk(made[0], 3)


# --- bad files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "edit.safetensors"
    ns.save_file(rewound(), path)
    return path


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with our part of its header changed."""
    (length,) = struct.unpack("<Q", data[:8])
    header = header_of(data)
    ours = json.loads(header["__metadata__"]["neuronsurgery"])
    change(ours)
    header["__metadata__"]["neuronsurgery"] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at:][1:]


def set_(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.__setitem__(key, value)


ALTERED = r"edit\.safetensors was altered or damaged after it was saved"
DAMAGED = r"edit\.safetensors is damaged or no safetensors file .*: save it again"
BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", DAMAGED),
    "cut in the header": (lambda data: data[:100], DAMAGED),
    "cut in the tensors": (lambda data: data[:-4], DAMAGED),
    "longer": (lambda data: data + b"\0" * 8, DAMAGED),
    "text": (lambda data: b"not a file of tensors at all", DAMAGED),
    "pickle": (lambda data: pickle.dumps({"a": 1}), DAMAGED),
    "a byte of a tensor": (lambda data: flipped(data, len(data) - 3), ALTERED),
    "another factor": (lambda data: with_header(data, lambda h: h["content"].update(alpha=0.75)), ALTERED),
    "another neuron": (lambda data: data.replace(b"[0, 5]", b"[0, 4]"), ALTERED),
    "no digest": (lambda data: with_header(data, lambda h: h.pop("sha256")), ALTERED),
    "another kind": (lambda data: with_header(data, set_("kind", "zero_out")), ALTERED),
    "newer": (lambda data: with_header(data, set_("schema", 3)), r"is of schema 3, kind 'rewind'; .*up to schema 2"),
    "unknown kind": (lambda data: with_header(data, set_("kind", "graft")), r"kind 'graft'; .*update neuronsurgery"),
    "no kind": (lambda data: with_header(data, lambda h: h.pop("kind")), r"header of .* is damaged \(KeyError"),
    "foreign": (lambda data: safetensors.torch.save(THEN), r"but none that neuronsurgery wrote: for a checkpoint"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_a_clear_error(change: Callable[[bytes], bytes], message: str, path: Path) -> None:
    data = path.read_bytes()
    assert ns.load_file(path) == rewound()
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match=message):
        ns.load_file(path)


def test_the_changes_above_are_what_is_noticed(path: Path) -> None:
    """A header that is written again as it was is accepted."""
    path.write_bytes(with_header(path.read_bytes(), lambda header: None))
    assert ns.load_file(path) == rewound()


Content = dict[str, Any]


def with_content(data: bytes, change: Callable[[Content, dict[str, Tensor]], Any]) -> bytes:
    """The file with what is in it changed, and a digest that is right for that."""
    ours, tensors = json.loads(header_of(data)["__metadata__"]["neuronsurgery"]), safetensors.torch.load(data)
    ours.pop("sha256")
    change(ours["content"], tensors)
    ours["sha256"] = files._content_digest(ours, tensors)
    return safetensors.torch.save(tensors, metadata={"neuronsurgery": json.dumps(ours)})


IS = r"edit\.safetensors is damaged: "
TENSORS = r"edit\.safetensors was altered .*, its tensors are not those of its kind, 'compose':\n  "
CONSISTENT: dict[str, tuple[Callable[[Content, dict[str, Tensor]], Any], str]] = {
    "a layer twice": (
        lambda c, t: c["edits"][1]["neurons"].append(c["edits"][1]["neurons"][0]),
        "a layer is there twi",
    ),
    "a neuron too far": (
        lambda c, t: c["edits"][1]["neurons"][0][1].append(99),
        r"a set of neurons cannot be made of th",
    ),
    "a neuron that is a bool": (lambda c, t: c["edits"][1]["neurons"][0][1].append(True), r"[\w.]+: expected integers"),
    "a factor that is text": (
        lambda c, t: c["edits"][2].update(factor="2"),
        r"factor must be a finite number, not '2'",
    ),
    "an infinite factor": (
        lambda c, t: c["edits"][2].update(factor=math.inf),
        "factor must be a finite number, not inf",
    ),
    "an argument too many": (
        lambda c, t: c["edits"][2].update(power=2),
        r"unexpected keyword argument 'power'",
    ),
    "an argument too few": (lambda c, t: c["edits"][2].pop("factor"), r"missing 1 required .*'factor'"),
    "a path that is none": (lambda c, t: c["edits"][0].update(path={}), r"the path of a rewind is a string, not \{\}"),
    "rows of another digest": (
        lambda c, t: c["edits"][0].update(digest="0"),
        r"are not those of the digest beside them",
    ),
    "rows of another shape": (
        lambda c, t: t.update({min(t): t[min(t)][None]}),
        r"a rewind cannot be made of this, 1 wrong:\n  kept: .*\nMake it with rewind.*\nSave it again$",
    ),
    "composed within composed": (
        lambda c, t: c["edits"].append({"kind": "compose", "edits": [], "neurons": []}),
        r"KeyError\('compose'\)\nSave it again",
    ),
}
UNLIKE: dict[str, tuple[Callable[[Content, dict[str, Tensor]], Any], str]] = {
    "a tensor too many": (lambda c, t: t.update(x=torch.ones(1)), f"{TENSORS}x: unknown\nSave it again$"),
    "a tensor too few": (lambda c, t: t.pop(min(t)), rf"{TENSORS}rows\.\w+: missing\nSave it again$"),
    "a tensor of no numbers": (
        lambda c, t: t.update({min(t): t[min(t)].to(torch.complex64)}),
        rf"{TENSORS}rows\.\w+: expected BOOL U8 .* F8_E5M2, found C64 of shape \[",
    ),
    "an unknown kind within": (
        lambda c, t: c["edits"][1].update(kind="graft"),
        "kind 'graft'; .*registers a kind of your",
    ),
    "a kind that is no name": (lambda c, t: c["edits"][1].update(kind=3), r"the header of .* is damaged \(TypeError"),
    "rows without names": (lambda c, t: c["edits"][0].update(rows=[3, "a"]), rf"{TENSORS}3: missing\n  a: missing\n"),
    "no edits": (lambda c, t: c.pop("edits"), r"the header of .* is damaged \(KeyError\('edits'\)\): save it again"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [*((change, f"{IS}(.*\n)*.*{said}") for change, said in CONSISTENT.values()), *UNLIKE.values()],
    ids=[*CONSISTENT, *UNLIKE],
)
def test_a_digest_that_is_right_makes_no_value(
    change: Callable[[Content, dict[str, Tensor]], Any], message: str, path: Path
) -> None:
    ns.save_file(ns.compose(rewound(), ns.zero_out(NEURONS), ns.scale(NEURONS, 2.0)), path)
    data = path.read_bytes()
    path.write_bytes(with_content(data, lambda content, tensors: None))
    assert isinstance(ns.load_file(path), ns.Edit)
    path.write_bytes(with_content(data, change))
    with pytest.raises(ValueError, match=message):
        ns.load_file(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema": 1e400, "kind": "neurons"}', "[]", "NaN", "null", '{"a": ' * 2000]
)
def test_a_header_that_is_no_header(text: str, path: Path) -> None:
    path.write_bytes(safetensors.torch.save({}, metadata={"neuronsurgery": text}))
    with pytest.raises(ValueError, match=r"the header of .*edit\.safetensors is damaged \(\w+"):
        ns.load_file(path)


def test_the_header_is_looked_at_before_a_tensor_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ns.save_file(ns.GroupMetrics((0,), (0.5,), (2,)), path)
    read, original = [], safetensors.safe_open

    class Watched:
        """An open file that says what is read of it."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.inner = original(*args, **options)

        def __enter__(self) -> Watched:
            self.inner.__enter__()
            return self

        def __exit__(self, *_: Any) -> None:
            self.inner.__exit__(*_)

        def __getattr__(self, name: str) -> Any:
            read.append(name)
            return getattr(self.inner, name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert ns.load_file(path)[0] == 0.5 and "get_tensor" in read
    read.clear()
    tensors = {"values": torch.zeros(1000, 1000)}
    path.write_bytes(safetensors.torch.save(tensors, metadata=header_of(path.read_bytes())["__metadata__"]))
    with pytest.raises(ValueError, match=r"values: expected F64 of 1 dimensions, found F32 of shape \[1000, 1000\]"):
        ns.load_file(path)
    assert "get_slice" in read and "get_tensor" not in read


def test_every_byte_of_the_tensors_and_of_our_header_counts(path: Path) -> None:
    data = path.read_bytes()
    ours = data.index(b"neuronsurgery")
    for at in [*range(ours, ours + 300, 7), *range(len(data) - 60, len(data), 7)]:
        path.write_bytes(flipped(data, at))
        with pytest.raises(ValueError, match=r"edit\.safetensors"):
            ns.load_file(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no file at {path}"):
            ns.load_file(path)


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_value_without_a_format_is_refused(tmp_path: Path) -> None:
    for value in (torch.ones(2), {"a": 1}, built("mlp")):
        with pytest.raises(TypeError, match=r"no file format for a \w+; there is one for neurons, scores, metrics"):
            ns.save_file(value, tmp_path / "it")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_disk_that_is_full_leaves_the_old_file(call: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    old = path.read_bytes()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device"):
        ns.save_file(ns.zero_out(NEURONS), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there_or_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing to write edit\.safetensors to: make it"):
        ns.save_file(NEURONS, tmp_path / "missing" / "edit.safetensors")
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # root may write anywhere
        monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(PermissionError, match="denied"):
        ns.save_file(NEURONS, tmp_path / "edit.safetensors")
    tmp_path.chmod(0o700)
    assert not os.listdir(tmp_path)


def test_a_file_may_be_read_by_others_as_one_that_open_made(tmp_path: Path) -> None:
    ns.save_file(NEURONS, tmp_path / "ours")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- no code --------------------------------------------------------------------------------------------------------


@every_object
def test_nothing_is_pickled(make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read or written")

    made = make()
    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (pickle, "dumps"),
        (torch, "load"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    ns.save_file(made, tmp_path / "it")
    assert ns.load_file(tmp_path / "it") == made


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"up.weight": Bomb()}}, tmp_path / "then.pt")
    with pytest.raises(ValueError, match=r"neither a safetensors file nor a state dict that torch\.load"):
        ns.rewind(NEURONS, tmp_path / "then.pt")
    assert not (tmp_path / "ran").exists()


def test_anyone_can_read_the_header(path: Path) -> None:
    with safetensors.safe_open(path, framework="np") as file:
        ours = json.loads(file.metadata()["neuronsurgery"])
    assert (ours["schema"], ours["kind"]) == (2, "rewind")


# --- files of version 0.1 -------------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "files_of_0_1"


class Right(Conv1D):
    """x @ W, and no bias."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        del self.bias


def model_of_0_1() -> nn.Module:
    """What those files were made of."""
    up = nn.ConvTranspose1d(4, 6, 2, groups=2), nn.ConvTranspose1d(4, 3, 2)
    parts = {"conv": nn.Conv2d(2, 5, 3), "up": up[0], "plain_up": up[1], "right": Right(), "head": nn.Linear(6, 2)}
    return nn.ModuleDict(parts)


def test_files_of_version_0_1_are_read() -> None:
    model = model_of_0_1()
    layout = ns.find_layout(model, extra="*.bias")
    some = ns.select(layout, {"*.weight": (0, 1), "up.weight": 5, "conv.bias": 4})
    loaded = ns.load_file(OLD / "neurons.safetensors")
    assert loaded == some and list(loaded) == list(some) and repr(loaded) == repr(some)
    scores = ns.load_file(OLD / "scores.safetensors")
    values = (torch.arange(2 * layout.count).reshape(2, -1) / 7).float()
    assert scores == ns.Scores(values, ("a", 3), (4, 5), layout, "gradient norm")
    assert scores.layout.digest == layout.digest
    metrics = ns.load_file(OLD / "metrics.safetensors")
    assert (metrics.groups, metrics.counts, metrics["a"]) == (("a", 3), (4, 5), 0.25) and math.isnan(metrics[3])


def test_an_edit_of_version_0_1_does_what_it_did() -> None:
    model = model_of_0_1()
    layout = ns.find_layout(model, extra="*.bias")
    some = ns.select(layout, {"*.weight": (0, 1), "up.weight": 5, "conv.bias": 4})
    then = {n: 0.5 + torch.arange(p.numel()).reshape(p.shape) / 100 for n, p in model.named_parameters()}
    edit = ns.compose(
        ns.random_noise(some, relative_std=0.5, seed=3),
        ns.rewind(some, then, 0.25),
        ns.scale(some, 2.0),
        ns.random_init(some, std=0.1, seed=2**70),
        ns.zero_out(ns.select(layout, {"head.weight": 1})),
    )
    loaded = ns.load_file(OLD / "edit.safetensors")
    assert loaded == edit and hash(loaded) == hash(edit)
    for name, value in ns.bake(edit, model).state_dict().items():
        assert torch.equal(ns.bake(loaded, model).state_dict()[name], value)
