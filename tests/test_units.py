"""Units are slices of the layer that reads them: cutting a slice is cutting the unit where it is made, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from architectures import SMALL
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.switches import without_mha_fastpath

IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros(3, dtype=torch.int64)


def build(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return build(transformers.LlamaForCausalLM(config))


def bert() -> nn.Module:
    return build(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))


def gpt2() -> nn.Module:
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64, "bos_token_id": 1}
    return build(transformers.GPT2LMHeadModel(transformers.GPT2Config(**names, eos_token_id=2)))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    return build(transformers.MixtralForCausalLM(config))


def vit() -> nn.Module:
    return build(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return build(
        nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64, 3))
    )


TEXT: Any = ({"input_ids": IDS}, IDS)
LABELLED: Any = ({"input_ids": IDS}, ZEROS)
PICTURES: Any = (IMAGES, ZEROS)
VECTORS: Any = (torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1)), ZEROS)


def logits(model: nn.Module, batch: Any) -> Tensor:
    inputs = batch[0]
    with torch.no_grad(), without_mha_fastpath():  # which would call neither the attention nor the layers
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


@contextmanager
def cut_heads(call: int, head: int) -> Iterator[None]:
    """The output of one head is zero in one call of torch's attention."""
    real, calls = functional.scaled_dot_product_attention, iter(range(10**6))

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        output = real(*args, **kwargs)
        if next(calls) == call:
            output = output.clone()
            output[:, head] = 0
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        yield


HEADS: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "llama": (llama, TEXT, [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]),
    "bert": (bert, LABELLED, [f"bert.encoder.layer.{i}.attention.output.dense.weight" for i in (0, 1)]),
    "gpt2": (gpt2, TEXT, [f"transformer.h.{i}.attn.c_proj.weight" for i in (0, 1)]),
    "mixtral": (mixtral, TEXT, [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]),
    "vit": (vit, PICTURES, [f"blocks.{i}.attn.proj.weight" for i in (0, 1)]),
    "encoder": (encoder, VECTORS, [f"0.layers.{i}.self_attn.out_proj.weight" for i in (0, 1)]),
}
tier = pytest.mark.architectures
head_case = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("llama", "encoder") else tier) for n in HEADS]
)


@head_case
def test_a_cut_slice_is_a_head_that_is_cut_in_the_attention(name: str) -> None:
    make, batch, layers = HEADS[name]
    model = make()
    before = snapshot(model, batch)
    found = ns.find_units(model, batch, "head")
    assert_unchanged(before, model, batch)
    assert [layer.parameter for layer in found] == layers
    base = logits(model, batch)
    for call, layer in enumerate(found):
        for head in range(layer.count):
            edited = logits(ns.apply(ns.zero_out(ns.Neurons({layer: [head]})), model), batch)
            with cut_heads(call, head):
                assert torch.equal(edited, logits(model, batch))
            assert not torch.equal(edited, base)
    assert str(next(iter(found.neurons([0])))).endswith("[head 0]")


UNITS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, str]]] = {
    "llama": (llama, TEXT, {f"model.layers.{i}.mlp.down_proj": "weight" for i in (0, 1)}),
    "gpt2": (gpt2, TEXT, {f"transformer.h.{i}.mlp.c_proj": "weight" for i in (0, 1)}),
    "vit": (vit, PICTURES, {f"blocks.{i}.mlp.fc2": "weight" for i in (0, 1)}),
    "encoder": (encoder, VECTORS, {f"0.layers.{i}.linear2": "weight" for i in (0, 1)}),
}


def without_input(model: nn.Module, name: str, channel: int, axis: int, batch: Any) -> Tensor:
    """The logits where a module is given zeros in one channel."""

    def zeroed(module: nn.Module, args: Any) -> Any:
        value = args[0].clone()
        value.select(axis, channel).zero_()
        return (value, *args[1:])

    copied = copy.deepcopy(model)
    copied.get_submodule(name).register_forward_pre_hook(zeroed)
    return logits(copied, batch)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "llama" else tier) for n in UNITS])
def test_a_cut_slice_is_a_hidden_unit_that_is_cut_before_the_layer_that_reads_it(name: str) -> None:
    make, batch, readers = UNITS[name]
    model = make()
    found = ns.find_units(model, batch, "unit")
    assert [layer.parameter for layer in found] == [f"{module}.{weight}" for module, weight in readers.items()]
    for layer in found:
        for unit in (0, layer.count - 1):
            edited = logits(ns.apply(ns.zero_out(ns.Neurons({layer: [unit]})), model), batch)
            wanted = without_input(model, layer.parameter.rpartition(".")[0], unit, -1, batch)
            assert torch.equal(edited, wanted)


@tier
@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("mobilenet_v2", 37)])
def test_channels_with_a_single_reader(name: str, count: int) -> None:
    model = build(getattr(torchvision.models, name)(num_classes=3))
    with pytest.warns(UserWarning, match="its input is read by others, too"):
        found = ns.find_units(model, PICTURES, "channel")
    assert len(found) == count
    for layer in list(found)[:: max(1, count // 6)]:
        edited = logits(ns.apply(ns.zero_out(ns.Neurons({layer: [1]})), model), PICTURES)
        assert torch.equal(edited, without_input(model, layer.parameter.rpartition(".")[0], 1, 1, PICTURES)), layer


def test_channels_through_norms_pools_and_a_flattening() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()]
    model = build(nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(6 * 49, 3)))
    found = ns.find_units(model, PICTURES, "channel")
    assert [(layer.parameter, layer.pattern) for layer in found] == [
        ("3.weight", "(g o) channel k0 k1 -> (g channel) o k0 k1"),
        ("7.weight", "o (channel d) -> channel o d"),
    ]
    for layer, module, axis in ((found.layers[0], "3", 1), (found.layers[1], "5", 1)):
        for channel in range(layer.count):
            edited = logits(ns.apply(ns.zero_out(ns.Neurons({layer: [channel]})), model), PICTURES)
            assert torch.allclose(edited, without_input(model, module, channel, axis, PICTURES), atol=1e-6)


def test_experts_of_a_fused_mixture() -> None:
    model = mixtral()
    units, experts = (ns.find_units(model, TEXT, kind) for kind in ("expert unit", "expert"))  # type: ignore[arg-type]
    assert (units.count, experts.count) == (2 * 4 * 48, 2 * 4)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.model.layers[1].mlp.experts.down_proj[2, :, 5] = 0
    cut = ns.apply(ns.zero_out(ns.Neurons({units.layers[1]: [2 * 48 + 5]})), model)
    assert torch.equal(logits(cut, TEXT), logits(wanted, TEXT))
    with torch.no_grad():
        wanted.model.layers[1].mlp.experts.down_proj[2] = 0
    cut = ns.apply(ns.zero_out(ns.Neurons({experts.layers[1]: [2]})), model)
    assert torch.equal(logits(cut, TEXT), logits(wanted, TEXT))


def test_effects_are_minus_the_gradient_to_a_gate_of_the_head() -> None:
    model = llama().double()
    found = ns.find_units(model, TEXT, "head")
    effects = ns.group_effects(model, [TEXT], layout=found, metric=ns.causal_lm_loss)
    real, gates = functional.scaled_dot_product_attention, torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    calls = iter(gates)
    with pytest.MonkeyPatch.context() as patch:
        gated = lambda *args, **kwargs: real(*args, **kwargs) * next(calls)[:, None, None]  # noqa: E731
        patch.setattr(functional, "scaled_dot_product_attention", gated)
        loss = ns.causal_lm_loss(model(input_ids=IDS).logits, IDS).mean()
    (gradient,) = torch.autograd.grad(loss, gates)
    assert torch.allclose(effects.values[0].double(), -gradient.flatten(), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", pytest.param("vit", marks=tier)])
def test_sweeps_of_all_heads_are_what_one_by_one_gives(name: str) -> None:
    make, batch, _ = HEADS[name]
    model, data = make(), [batch]
    metric = ns.causal_lm_loss if name == "llama" else ns.margin
    found = ns.find_units(model, batch, "head")
    edits = {str(i): ns.zero_out(found.neurons([i])) for i in range(found.count)}
    swept = ns.sweep(model, edits, data, metric=metric)
    for label, edit in edits.items():
        assert swept[label] == ns.evaluate(ns.apply(edit, model), data, metric=metric)
    assert len({swept[label]["all"] for label in edits}) == found.count


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=4), nn.ReLU()]
    return build(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))


def classifying_mixture() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_labels=3)
    return build(transformers.MixtralForSequenceClassification(config))


WORKED: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "head": (bert, "text", 8),
    "channel": (convolutions, "pictures", 14),
    "expert unit": (classifying_mixture, "text", 2 * 4 * 48),
}


def two_groups(kind: str) -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(12) % 2
    if kind == "pictures":
        inputs: Any = [torch.randn(12, 3, 32, 32, generator=generator) for _ in range(2)]
    else:
        inputs = [{"input_ids": torch.randint(5, 60, (12, 9), generator=generator)} for _ in range(2)]
    return {group: [(x, labels)] for group, x in zip(("left", "right"), inputs, strict=True)}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "channel" else tier) for k in WORKED])
def test_units_are_scored_searched_judged_swept_and_saved(kind: str, tmp_path: Path) -> None:
    make, inputs, count = WORKED[kind]
    model, data = make(), two_groups(inputs)
    found = ns.find_units(model, data["left"][0], kind)  # type: ignore[arg-type]
    assert found.count == count
    scores = ns.group_grad_norms(model, data, layout=found)
    effects = ns.group_effects(model, data, layout=found)
    assert scores.values.shape == effects.values.shape == (2, count)
    cut = ns.zero_out(ns.topk(scores["left"], 2))
    critical = ns.find_critical(model, data, "left", layout=found, edits="zero", k=2)
    assert {neuron.layer for neuron in critical.neurons} <= set(found)
    verdict = ns.judge(cut, model, data, "left", draws=20)
    swept = ns.sweep(model, {"cut": cut}, data)
    assert swept["cut"] == ns.evaluate(ns.apply(cut, model), data)
    assert verdict.change["left"] == pytest.approx(swept.change("cut")["left"])
    for number, value in enumerate((found, scores, effects, cut, swept, critical.edit, critical.neurons)):
        path = tmp_path / f"{number}.safetensors"
        ns.save_file(value, path)
        assert same(ns.load_file(path), value)


def same(loaded: Any, saved: Any) -> bool:
    """Scores hold tensors, which have no one truth."""
    if isinstance(saved, ns.Scores):
        return loaded.layout == saved.layout and torch.equal(loaded.values, saved.values)
    return type(loaded) is type(saved) and bool(loaded == saved)


def test_cutting_all_units_of_a_residual_branch_is_cutting_the_branch() -> None:
    model = llama()  # whose projections have no bias
    branches = {branch.layer for branch in ns.residual_branches(model, TEXT)}
    found = [*ns.find_units(model, TEXT, "head"), *ns.find_units(model, TEXT, "unit")]
    assert {layer.parameter for layer in found} == branches
    for layer in found:
        copied = copy.deepcopy(model)
        module = copied.get_submodule(layer.parameter.rpartition(".")[0])
        module.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
        cut = ns.apply(ns.zero_out(ns.Neurons({layer: range(layer.count)})), model)
        assert torch.equal(logits(cut, TEXT), logits(copied, TEXT))


class Shared(nn.Module):
    """Its hidden units are read by two layers; its head is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.twice = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.twice(self.twice(self.left(hidden) + self.right(hidden)).relu())  # type: ignore[no-any-return]


def test_what_is_no_unit_is_said() -> None:
    data = (torch.randn(3, 4), ZEROS)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is looked at
        ns.find_units(Shared().eval(), data, "unit")
    said = str(raised.value)
    assert said.startswith("no unit is found in Shared:\n")
    assert "left.weight: its input is read by others, too" in said
    assert "twice.weight: it is used several times" in said
    assert "find_layout(model, patterns=" in said
    with pytest.raises(ValueError, match=r"kind must be one of 'head', 'unit', 'channel'.*not 'layer'"):
        ns.find_units(Shared(), data, "layer")  # type: ignore[arg-type]


class Gated(nn.Module):
    """A squeeze-and-excitation between convolutions, then a norm and a norm that is written out between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze, self.excite = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.second = nn.Conv2d(6, 5, 3)
        self.hidden, self.normed, self.written, self.head = (nn.Linear(5, 5) for _ in range(4))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.hidden(self.second(x).mean((2, 3)))
        x = self.normed(self.norm(x.relu()))
        x = self.written(x * (x.pow(2).mean(1, keepdim=True) + 1).rsqrt())
        return self.head(x * x.sigmoid())  # type: ignore[no-any-return]


def test_a_gate_of_channels_is_seen_through_and_a_norm_is_not() -> None:
    model = build(Gated())
    with pytest.warns(UserWarning, match=r"squeeze.weight \(its input is read by others, too\)"):
        channels = ns.find_units(model, PICTURES, "channel")
    assert [layer.parameter for layer in channels] == ["excite.weight", "second.weight", "hidden.weight"]
    for layer in channels:
        for channel in range(layer.count):
            edited = logits(ns.apply(ns.zero_out(ns.Neurons({layer: [channel]})), model), PICTURES)
            wanted = without_input(model, layer.parameter.partition(".")[0], channel, 1, PICTURES)
            assert torch.equal(edited, wanted), (layer, channel)
    with pytest.warns(UserWarning, match="no units were made of") as said:
        units = ns.find_units(model, PICTURES, "unit")
    assert [layer.parameter for layer in units] == ["head.weight"]
    assert "normed.weight (its input goes through layer_norm, which is of all units together)" in str(said[0].message)
    assert "written.weight (its input goes through a norm, which is of all units together)" in str(said[0].message)


class Recursive(nn.Module):
    """A block that is used twice; perhaps the embedding is the last layer, too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(64, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.last = nn.Linear(8, 64, bias=False)
        if tied:
            self.last.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            x = self.down(self.up(x).relu())
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
def test_a_shared_layer_is_cut_in_every_use_and_a_tied_one_is_no_unit(tied: bool) -> None:
    model, data = build(Recursive(tied)), (IDS, IDS)
    with pytest.warns(UserWarning, match="no units were made of") as said:
        found = ns.find_units(model, data, "unit")
    several = ["up.weight (it is used several times)", *(["embed.weight (it is used several times)"] if tied else [])]
    assert all(reason in str(said[0].message) for reason in several), str(said[0].message)
    assert [layer.parameter for layer in found] == ["down.weight", *([] if tied else ["last.weight"])]
    for unit in range(12):
        edited = logits(ns.apply(ns.zero_out(ns.Neurons({found.layers[0]: [unit]})), model), data)
        assert torch.equal(edited, without_input(model, "down", unit, -1, data))


class Attention(nn.Module):
    """An attention that is written out, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv, self.out, self.between = way, nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        if self.way == "mixed":
            scores = self.between(scores.movedim(1, -1)).movedim(-1, 1)
        if self.way == "multiplied":
            heads = (scores[..., None] * v.transpose(1, 2)[:, :, None]).sum(3).transpose(1, 2)
        else:
            heads = torch.einsum("bhts,bshd->bthd", scores, v)
        if self.way == "summed":
            return self.out(heads.sum(2).repeat(1, 1, 4))  # type: ignore[no-any-return]
        if self.way == "gated":
            heads = heads * q.sigmoid()
        return self.out(heads.flatten(2))  # type: ignore[no-any-return]


def attending(way: str) -> nn.Module:
    return build(nn.Sequential(Attention(way), nn.Flatten(), nn.Linear(64, 3)))


@pytest.mark.parametrize("way", ["plain", "gated"])
def test_heads_of_an_attention_that_is_written_with_einsum(way: str) -> None:
    model = attending(way)
    found = ns.find_units(model, VECTORS, "head")
    assert [(layer.parameter, layer.pattern) for layer in found] == [("0.out.weight", "o (head d) -> head o d")]
    for head in range(4):
        edited = logits(ns.apply(ns.zero_out(found.neurons([head])), model), VECTORS)
        wanted = copy.deepcopy(model)
        wanted[0].out.register_forward_pre_hook(
            lambda _, args, head=head: (args[0].unflatten(2, (4, 4)).index_fill(2, torch.tensor(head), 0).flatten(2),)
        )
        assert torch.equal(edited, logits(wanted, VECTORS))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("mixed", "0: its softmax goes through linear before it meets the values"),
        ("multiplied", "0: its softmax goes through mul before it meets the values"),
        ("summed", "0: its softmax is multiplied with values, and no layer is seen to read the result"),
    ],
)
def test_attention_whose_heads_are_not_seen_is_listed(way: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"no head is found in Sequential:\n  {reason}"):
        ns.find_units(attending(way), VECTORS, "head")


@tier
def test_all_heads_of_a_branch_are_the_branch_and_one_is_less() -> None:
    model = vit()
    heads, units = (ns.find_units(model, PICTURES, kind) for kind in ("head", "unit"))  # type: ignore[arg-type]
    rows = ns.find_layout(model)
    branches = ns.residual_branches(model, PICTURES)
    assert {branch.layer for branch in branches} == {layer.parameter for layer in (*heads, *units)}
    for branch in branches:
        layout = heads if branch.layer in heads else units
        cut = logits(ns.apply(ns.zero_out(ns.select(rows, {branch.layer: ...})), model), PICTURES)
        assert torch.equal(logits(ns.apply(ns.zero_out(ns.select(layout, {branch.layer: ...})), model), PICTURES), cut)
        one = logits(ns.apply(ns.zero_out(ns.select(layout, {branch.layer: [0]})), model), PICTURES)
        assert not torch.equal(one, cut)
