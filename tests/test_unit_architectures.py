"""Units of many architectures: found where the configuration says, cut bit for bit, or refused with the reason."""

from __future__ import annotations

import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from architectures import ALL, Architecture
from torch import Tensor, nn
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.effects import prepared
from neuronsurgery.first_order import mean_effects
from neuronsurgery.graph.readers import Walk
from neuronsurgery.switches import without_mha_fastpath
from neuronsurgery.terms import terms_of
from neuronsurgery.units import walk

pytestmark = pytest.mark.architectures

Expected = tuple[str, int, int, int]
"""Layers by a pattern of their names: how many there are, and of each the units and the inputs of a unit."""

BY_OTHERS = "its input is read by others, too"


def decoder(
    heads: str = "*.self_attn.o_proj.weight", units: str = "*.mlp.down_proj.weight"
) -> dict[str, list[Expected]]:
    """What all with 2 layers of 4 heads of 8 and 48 hidden units have in common."""
    return {"head": [(heads, 2, 4, 8)], "unit": [(units, 2, 48, 1)]}


def classifying(classifier: str) -> dict[str, list[Expected]]:
    """The same of an encoder whose pooled tokens are classified by two layers."""
    found = decoder("*.attention.output.dense.weight", "*.layer.?.output.dense.weight")
    return {**found, "unit": [*found["unit"], (classifier, 1, 32, 1)]}


ENCODER = classifying("classifier.weight")

FOUND: dict[str, dict[str, list[Expected]]] = {
    "timm ViT": {"head": [("blocks.*.attn.proj.weight", 2, 3, 16)], "unit": [("blocks.*.mlp.fc2.weight", 2, 192, 1)]},
    "timm DeiT": {"head": [("blocks.*.attn.proj.weight", 2, 3, 16)], "unit": [("blocks.*.mlp.fc2.weight", 2, 192, 1)]},
    "timm Swin": {
        "head": [(f"layers.{i}.blocks.0.attn.proj.weight", 1, 3 * 2**i, 32) for i in range(4)],
        "unit": [(f"layers.{i}.blocks.0.mlp.fc2.weight", 1, 384 * 2**i, 1) for i in range(4)],
    },
    "timm EVA02": {"head": [("blocks.*.attn.proj.weight", 2, 3, 64)], "unit": [("blocks.*.mlp.fc2.weight", 2, 512, 1)]},
    "timm EVA02 base": {"head": [("blocks.*.attn.proj.weight", 2, 4, 12)]},
    "ViT": decoder("*.attention.o_proj.weight", "*.mlp.fc2.weight"),
    "BERT": ENCODER,
    "GPT-NeoX": decoder("*.attention.dense.weight", "*.mlp.dense_4h_to_h.weight"),
    **{name: decoder() for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi-3", "StableLM", "Granite")},
    **{name: {"head": decoder()["head"]} for name in ("Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS")},
    "T5": {
        "head": [("*.SelfAttention.o.weight", 4, 4, 8), ("*.EncDecAttention.o.weight", 2, 4, 8)],
        "unit": [("*.DenseReluDense.wo.weight", 4, 48, 1)],
    },
    "Whisper": {
        "head": [("*.self_attn.out_proj.weight", 4, 4, 8), ("*.encoder_attn.out_proj.weight", 2, 4, 8)],
        "unit": [("*.fc2.weight", 4, 48, 1)],
        "channel": [("model.encoder.conv2.weight", 1, 32, 1)],
    },
    "CLIP": {"head": [("*.self_attn.out_proj.weight", 4, 4, 8)], "unit": [("*.mlp.fc2.weight", 4, 48, 1)]},
    "Falcon": {
        "head": [("*.self_attention.dense.weight", 2, 4, 8)],
        "unit": [("*.mlp.dense_4h_to_h.weight", 2, 128, 1)],
    },
    "Bloom": {
        "head": [("*.self_attention.dense.weight", 2, 4, 8)],
        "unit": [("*.mlp.dense_4h_to_h.weight", 2, 128, 1)],
    },
    "OPT": decoder("*.self_attn.out_proj.weight", "*.fc2.weight"),
    "ALBERT": {
        "head": [("*.attention.dense.weight", 1, 4, 8)],
        "unit": [("*.ffn_output.weight", 1, 48, 1), ("classifier.weight", 1, 32, 1)],
    },
    "DeepSeek-V3": {
        "head": [("*.self_attn.o_proj.weight", 2, 4, 6)],
        "unit": [("*.layers.0.mlp.down_proj.weight", 1, 48, 1), ("*.shared_experts.down_proj.weight", 1, 20, 1)],
    },
    "torch encoder": {
        "head": [("*.self_attn.out_proj.weight", 2, 4, 4)],
        "unit": [("*.linear2.weight", 2, 24, 1)],
    },
    "GPT-2": {"head": [("*.attn.c_proj.weight", 2, 4, 8)], "unit": [("*.mlp.c_proj.weight", 2, 128, 1)]},
    "ResNet-18": {"channel": [("layer?.?.conv2.weight", 8, 0, 1)]},
    "MobileNetV2": {
        "channel": [
            ("features.*.conv.?.0.weight", 18, 0, 1),
            ("features.*.conv.?.weight", 17, 0, 1),
            ("features.18.0.weight", 1, 0, 1),
            ("classifier.1.weight", 1, 0, 1),
        ]
    },
    "DenseNet": {"channel": [("features.denseblock?.denselayer*.conv2.weight", 58, 0, 1)]},
    "EfficientNet": {
        "channel": [
            ("features.*.block.?.fc2.weight", 16, 0, 1),
            ("features.*.block.?.0.weight", 33, 0, 1),
            ("features.8.0.weight", 1, 0, 1),
            ("classifier.1.weight", 1, 0, 1),
        ]
    },
    "MobileNetV3": {
        "channel": [
            ("features.*.block.?.fc2.weight", 9, 0, 1),
            ("features.*.block.?.0.weight", 23, 0, 1),
            ("classifier.0.weight", 1, 0, 1),
        ],
        "unit": [("classifier.3.weight", 1, 1024, 1)],
    },
    "RegNet": {"channel": [(f"*.f.{part}.weight", 16, 0, 1) for part in ("b.0", "se.fc2", "c.0")]},
    "Inception": {"channel": [("conv?.conv.weight", 2, 0, 1), ("inception*.branch?.1.conv.weight", 18, 0, 1)]},
    "ConvNeXt": {
        "unit": [
            (f"features.{stage}.*.block.5.weight", blocks, 384 * 2**i, 1)
            for i, (stage, blocks) in enumerate([(1, 3), (3, 3), (5, 9), (7, 3)])
        ]
    },
    "torchvision ViT": decoder("*.self_attention.out_proj.weight", "*.mlp.3.weight"),
    "torchvision Swin v2": {
        "head": [("features.1.?.attn.proj.weight", 2, 2, 8), ("features.3.?.attn.proj.weight", 2, 4, 8)],
        "unit": [("features.1.?.mlp.3.weight", 2, 64, 1), ("features.3.?.mlp.3.weight", 2, 128, 1)],
    },
    "Mixer": {"unit": [("blocks.?.mlp_tokens.fc2.weight", 2, 16, 1), ("blocks.?.mlp_channels.fc2.weight", 2, 128, 1)]},
    "CaiT": {
        "head": [("blocks_token_only.?.attn.proj.weight", 2, 4, 8)],
        "unit": [("blocks*.?.mlp.fc2.weight", 4, 128, 1)],
    },
    "XCiT": {
        "head": [("blocks.?.attn.proj.weight", 2, 4, 8), ("cls_attn_blocks.?.attn.proj.weight", 2, 4, 8)],
        "unit": [("*blocks.?.mlp.fc2.weight", 4, 128, 1)],
        "channel": [("patch_embed.proj.?.0.weight", 3, 0, 1), ("blocks.?.local_mp.conv2.weight", 2, 0, 1)],
    },
    "DistilBERT": {
        "head": [("*.attention.out_lin.weight", 2, 4, 8)],
        "unit": [("*.ffn.lin2.weight", 2, 48, 1), ("classifier.weight", 1, 32, 1)],
    },
    "RoBERTa": classifying("classifier.out_proj.weight"),
    "ELECTRA": classifying("classifier.out_proj.weight"),
    "DeBERTa-v2": ENCODER,
    "GPT-J": {"head": [("*.attn.out_proj.weight", 2, 4, 8)], "unit": [("*.mlp.fc_out.weight", 2, 128, 1)]},
    "Mamba": {"unit": [("*.mixer.out_proj.weight", 2, 64, 1)]},
    "XLNet": {
        "head": [("*.rel_attn.o", 2, 4, 8)],
        "unit": [("*.ff.layer_2.weight", 2, 48, 1), ("logits_proj.weight", 1, 32, 1)],
    },
    "Wav2Vec2": {
        "head": [("*.attention.out_proj.weight", 2, 4, 8)],
        "unit": [("*.feed_forward.output_dense.weight", 2, 48, 1), ("classifier.weight", 1, 16, 1)],
    },
    "BART": decoder("*.self_attn.out_proj.weight", "*.fc2.weight"),
}
FED_BACK = "its units are read by the recurrent layer, too: silence() makes them nothing by their rows"
LAYER_NORM = "its input goes through layer_norm, which is of all units together"
CAT = "its input comes through cat, which is not seen through"
FUSED = "its units are of the kind 'expert unit'"
REFUSED: dict[tuple[str, str], dict[str, str]] = {
    ("timm EVA02 base", "unit"): {f"blocks.{i}.mlp.fc2.weight": LAYER_NORM for i in (0, 1)},
    ("ALBERT", "unit"): {
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{name}.weight": BY_OTHERS
        for name in ("query", "key", "value")
    },
    ("DeepSeek-V3", "unit"): {
        "model.layers.0.self_attn.q_b_proj.weight": "its input goes through a norm, which is of all units together",
        "model.layers.1.self_attn.kv_b_proj.weight": CAT,
        "model.layers.1.mlp.experts.down_proj": FUSED,
    },
    **{
        (name, "unit"): {f"model.layers.{i}.mlp.experts.down_proj": FUSED for i in (0, 1)}
        for name in ("Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS")
    },
    **{(n, "unit"): {"cell.weight_hh_l0": FED_BACK, "head.weight": FED_BACK} for n in ("LSTM", "GRU", "RNN")},
    **{(n, "unit"): {"head.weight": FED_BACK} for n in ("LSTM, projected", "LSTM, projected, deep")},
    ("CaiT", "head"): {
        f"blocks.{i}.attn": "its softmax goes through linear before it meets the values" for i in (0, 1)
    },
    ("CaiT", "unit"): {
        "blocks.0.attn.proj_l.weight": "its input comes through matmul, which is not seen through",
        "blocks.0.attn.proj_w.weight": "its input comes through softmax, which is not seen through",
        "blocks.1.attn.proj.weight": "its input comes through matmul, which is not seen through",
    },
    ("Mamba", "unit"): {"backbone.layers.0.mixer.dt_proj.weight": "matmul reads it, not as a layer's weight"},
    ("Mamba", "channel"): {
        "backbone.layers.0.mixer.x_proj.weight": BY_OTHERS,
        "backbone.layers.1.mixer.conv1d.weight": "conv1d reads it, not as a layer's weight",
    },
    ("ConvNeXt", "channel"): {
        "features.1.0.block.3.weight": LAYER_NORM,
        "features.3.0.block.0.weight": BY_OTHERS,
        "features.7.2.block.3.weight": LAYER_NORM,
    },
    ("DenseNet", "channel"): {
        "features.denseblock1.denselayer1.conv1.weight": CAT,
        "features.transition3.conv.weight": CAT,
    },
    ("DenseNet", "unit"): {"classifier.weight": CAT},
    ("Inception", "channel"): {"inception3a.branch1.conv.weight": BY_OTHERS, "inception5b.branch1.conv.weight": CAT},
    ("Inception", "unit"): {"fc.weight": CAT},
    ("ResNet-18", "channel"): {"layer1.0.conv1.weight": BY_OTHERS},
    ("MobileNetV2", "channel"): {"features.15.conv.0.0.weight": BY_OTHERS},
    ("EfficientNet", "channel"): {"features.1.0.block.1.fc1.weight": BY_OTHERS},
    ("MobileNetV3", "channel"): {"features.1.block.1.fc1.weight": BY_OTHERS},
    ("RegNet", "channel"): {"trunk_output.block4.block4-0.f.se.fc1.weight": BY_OTHERS},
    ("torchvision Swin v2", "unit"): {"features.2.reduction.weight": CAT},
    ("XCiT", "unit"): {"cls_attn_blocks.0.mlp.fc1.weight": CAT},
    ("Wav2Vec2", "channel"): {"wav2vec2.feature_projection.projection.weight": LAYER_NORM},
    ("Wav2Vec2", "unit"): {"wav2vec2.encoder.pos_conv_embed.conv.weight": BY_OTHERS},
    ("ELECTRA", "unit"): {
        f"electra.encoder.layer.0.attention.self.{name}.weight": BY_OTHERS for name in ("query", "key", "value")
    },
}
OTHERWISE = {"ALBERT": "*", "XCiT": "blocks.*"}
"""Layers that are behind every attention, or behind one that is not torch's."""


def asked(name: str, *more: str) -> Any:
    """What is asked of an architecture; by one process, since it is captured once in each."""
    return pytest.param(name, *more, marks=pytest.mark.xdist_group(name))


CASES = [asked(name, kind) for name, kinds in FOUND.items() for kind in kinds]


@functools.cache
def walked_once(name: str) -> Callable[..., Walk]:
    """The capture of an architecture, the same for every kind of its units: it takes longer than all the rest."""
    kept: list[Walk] = []

    def once(*args: Any) -> Walk:
        if not kept:
            kept.append(walk(*args))
        return kept[0]

    return once


@functools.cache
def found_units(name: str, kind: str) -> tuple[ns.Layout | None, str]:
    """The units, if there are any, and what is said of others."""
    case = ALL[name]
    with patch("neuronsurgery.units.walk", walked_once(name)), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = ns.find_units(case.build(), case.batch, kind, predict=case.predict)  # type: ignore[arg-type]
        except ValueError as error:
            return None, str(error).partition("Say by hand")[0]
    return found, " ".join(str(w.message) for w in said if "no units were made" in str(w.message))


def output(case: Architecture, model: nn.Module, batch: Any = None) -> Tensor:
    inputs = (batch or case.batch)[0]
    with without_mha_fastpath():  # which would call neither the attention nor the layers
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if case.predict is not None:
        return case.predict(out)
    return out if isinstance(out, Tensor) else out.logits


READING = [(functional, name, 0) for name in ("linear", "conv1d", "conv2d")]
READING += [(torch, "conv1d", 0), (torch, "conv2d", 0), (torch, "addmm", 1), (Tensor, "__matmul__", 0)]


@contextmanager
def reading(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[list[int]]:
    """What every operator that reads with a parameter reads is changed; the list counts them."""
    calls: list[int] = []

    def patched(real: Callable[..., Tensor], at: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            others = (*args, *kwargs.values())
            if any(isinstance(other, Tensor) and other.data_ptr() == parameter.data_ptr() for other in others):
                args = (*args[:at], change(args[at]), *args[at + 1 :])
                calls.append(at)
            return real(*args, **kwargs)

        return call

    def einsum(equation: str, *operands: Tensor) -> Tensor:
        own = [operand.data_ptr() == parameter.data_ptr() for operand in operands]
        calls.extend([0] * sum(own))
        changed = any(own)
        return real_einsum(
            equation, *[change(x) if changed and not mine else x for x, mine in zip(operands, own, strict=True)]
        )

    real_einsum = torch.einsum
    with pytest.MonkeyPatch.context() as patch:
        for module, name, at in READING:
            patch.setattr(module, name, patched(getattr(module, name), at))
        patch.setattr(torch, "einsum", einsum)
        yield calls


def channels(layer: ns.Layer, kind: str, size: int) -> tuple[int, Callable[[int], Any]]:
    """The axis of a reader's input that its units are on, from the end, and the channels of one: by the configuration.

    Not by the pattern: the heads of an attention stand one after the other.
    """
    if "rel_attn" in layer.parameter:
        return -2, lambda unit: unit
    axis = 1 if kind == "channel" and len(layer.shape) > 2 else -1
    return axis, lambda unit: slice(unit * size, (unit + 1) * size)


def zeroing(axis: int, at: Any) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.movedim(axis, 0)[at] = 0
        return x

    return change


@contextmanager
def cut_heads(call: int, head: int) -> Iterator[list[int]]:
    """The output of one head is zero in one call of torch's attention; the list counts the calls."""
    real = functional.scaled_dot_product_attention
    calls: list[int] = []

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        result = real(*args, **kwargs)
        if len(calls) == call:
            result = result.clone()
            result[:, head] = 0
        calls.append(len(calls))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        yield calls


def matched(found: ns.Layout, expected: Sequence[Expected]) -> dict[str, Expected]:
    """The expectation of each layer; every layer has one, and every expectation its number of layers."""
    own: dict[str, Expected] = {}
    for layer in found:
        own[layer.parameter] = next(e for e in expected if fnmatch.fnmatch(layer.parameter, e[0]))
    for one in expected:
        assert sum(e is one for e in own.values()) == one[1], one
    return own


def some(layers: Sequence[ns.Layer], most: int = 4) -> list[ns.Layer]:
    return list(layers)[:: max(1, len(layers) // most)]


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_a_cut_slice_is_a_unit_that_is_zero_where_it_is_read(name: str, kind: str) -> None:
    case = ALL[name]
    model = case.build()
    found, said = found_units(name, kind)
    assert found is not None, said
    assert bool(said) == ((name, kind) in REFUSED), said
    own = matched(found, FOUND[name][kind])
    base = output(case, model)
    with cut_heads(-1, 0) as attentions:  # of which none is cut
        output(case, model)
    seen: list[bool] = []
    for layer in some(found.layers):
        _, _, count, size = own[layer.parameter]
        parameter = model.get_parameter(layer.parameter)
        axis, at = channels(layer, kind, size)
        if count:
            assert (layer.count, math.prod(layer.row_shape)) == (count, parameter.numel() // count)
            assert size in (1, *layer.row_shape)
        effects = []
        for unit in sorted({0, layer.count // 3, 2 * layer.count // 3, layer.count - 1}):
            cut = output(case, ns.apply(ns.zero_out(ns.Neurons({layer: [unit]})), model))
            with reading(parameter, zeroing(axis, at(unit))) as calls:
                assert torch.equal(cut, output(case, model)), (layer, unit)
            assert calls
            effects.append(not torch.equal(cut, base))
        assert any(effects) or kind == "channel", layer
        assert all(effects) or kind != "head", layer
        seen.append(any(effects))
        if kind == "head" and attentions and not fnmatch.fnmatch(layer.parameter, OTHERWISE.get(name, "")):
            assert _is_a_head_in_the_attention(case, model, cut, layer.count - 1, len(attentions)), layer
    assert 2 * sum(seen) >= len(seen), seen  # a channel behind a ReLU may be off for all of a few pictures


def _is_a_head_in_the_attention(case: Architecture, model: nn.Module, cut: Tensor, head: int, calls: int) -> bool:
    """Whether cutting a head within one call of torch's attention gives the same."""
    for call in range(calls):
        with cut_heads(call, head):
            if torch.equal(cut, output(case, model)):
                return True
    return False


@pytest.mark.parametrize(("name", "kind"), [asked(*case) for case in REFUSED])
def test_what_is_no_unit_is_listed_with_the_reason(name: str, kind: str) -> None:
    _, said = found_units(name, kind)
    for layer, reason in REFUSED[name, kind].items():
        assert f"{layer} ({reason})" in said or f"  {layer}: {reason}\n" in said, (layer, said)


# --- scores ---------------------------------------------------------------------------------------------------------


def waves(logits: Tensor, targets: Tensor) -> Tensor:
    """One number per example, that every logit has a part in."""
    return logits.flatten(1).sin().mean(1)


def doubled(batch: Any) -> Any:
    inputs, targets = batch
    if isinstance(inputs, Tensor):
        return inputs.double(), targets
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, targets


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_norms_and_effects_are_those_by_hand(name: str, kind: str) -> None:
    """Norms to 1e-5, since scores are kept in single precision; effects before that, to 1e-9 of the largest."""
    case = ALL[name]
    model, batch = case.build().double(), doubled(case.batch)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no double precision
    found, _ = found_units(name, kind)
    assert found is not None
    own = matched(found, FOUND[name][kind])
    norms = ns.group_grad_norms(model, [batch], layout=found, loss=waves, predict=case.predict).values[0].double()
    scores = ns.group_effects(model, [batch], layout=found, metric=waves, predict=case.predict).values[0]
    effects = exact_effects(model, batch, found, case.predict)
    assert torch.equal(scores, effects.float())
    for layer in some(found.layers, 3):
        parameter = model.get_parameter(layer.parameter)
        axis, at = channels(layer, kind, own[layer.parameter][3])
        gates = torch.ones(layer.count, dtype=torch.float64, requires_grad=True)
        size = own[layer.parameter][3] if axis == -1 else 1
        shape = [-1] + [1] * (-1 - axis if axis < 0 else len(layer.shape) - 2)

        def gated(x: Tensor, gates: Tensor = gates, size: int = size, shape: list[int] = shape) -> Tensor:
            return x * gates.repeat_interleave(size).reshape(shape)

        with reading(parameter, gated):
            total = waves(output(case, model, batch), batch[1]).mean()
        weights, gate = torch.autograd.grad(total, [parameter, gates])
        wanted = torch.stack([by_hand(weights, layer, kind, at(unit)) for unit in range(layer.count)])
        given = slice(found.starts[layer], found.starts[layer] + layer.count)
        assert torch.allclose(norms[given], wanted, rtol=1e-5, atol=1e-5 * float(wanted.max())), layer
        assert gate.abs().max() > 0
        assert torch.allclose(effects[given], -gate, rtol=1e-9, atol=1e-9 * float(gate.abs().max())), layer


def exact_effects(model: nn.Module, batch: Any, layout: ns.Layout, predict: Any) -> Tensor:
    """What `group_effects` computes, before it is brought to single precision."""
    surveyed, runner, layout = prepared(model, layout, None, None)
    terms = terms_of(surveyed, runner, layout, "zero", None)
    values, _ = mean_effects(runner, surveyed, terms, [batch], waves, None, predict, None)
    (own,) = values.values()
    assert own.dtype == torch.float64
    return own


def by_hand(gradient: Tensor, layer: ns.Layer, kind: str, at: Any) -> Tensor:
    """The norm of the gradient to a unit's entries: the inputs are the second dimension, but of groups."""
    if "(g o)" in layer.pattern:
        groups = layer.sizes["g"]
        inner = gradient.shape[1]
        outer = gradient.shape[0] // groups
        group, place = divmod(at.start, inner)
        return gradient[group * outer : (group + 1) * outer, place].norm()
    first = ".c_proj." in layer.parameter  # of GPT-2, whose weights are (inputs, outputs)
    return gradient[at].norm() if first else gradient[:, at].norm()


# --- recurrent layers and experts, by loops that are written by hand ------------------------------------------------


def stepped(model: nn.Module, x: Tensor, cut: tuple[str, int] | None) -> Tensor:
    """A projected LSTM between two linear layers, step by step; one unit may be zero where it is projected."""
    cell: Any = model.cell
    hidden: Tensor = model.embed(x)  # type: ignore[operator]
    for layer in range(cell.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + cell.bidirectional]:
            own = {name: getattr(cell, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "weight_hr")}
            bias = getattr(cell, f"bias_ih_l{layer}{suffix}") + getattr(cell, f"bias_hh_l{layer}{suffix}")
            state, memory, steps = torch.zeros(len(x), cell.proj_size), torch.zeros(len(x), cell.hidden_size), []
            for step in hidden.unbind(1)[:: -1 if suffix else 1]:
                gates = step @ own["weight_ih"].T + state @ own["weight_hh"].T + bias
                opened, kept, new, shown = gates.chunk(4, 1)
                memory = kept.sigmoid() * memory + opened.sigmoid() * new.tanh()
                units = shown.sigmoid() * memory.tanh()
                if cut is not None and cut[0] == f"cell.weight_hr_l{layer}{suffix}":
                    units = units.clone()
                    units[:, cut[1]] = 0
                state = units @ own["weight_hr"].T
                steps.append(state)
            outputs.append(torch.stack(steps[:: -1 if suffix else 1], 1))
        hidden = torch.cat(outputs, 2)
    logits: Tensor = model.head(hidden[:, -1])  # type: ignore[operator]
    return logits


@pytest.mark.parametrize(("name", "layers"), [("LSTM, projected", 1), ("LSTM, projected, deep", 4)])
@torch.no_grad()
def test_units_of_a_projected_lstm_are_columns_of_its_projections(name: str, layers: int) -> None:
    case = ALL[name]
    model, x = case.build(), case.batch[0]
    found, _ = found_units(name, "unit")
    assert found is not None
    assert [(layer.pattern, layer.count) for layer in found] == [("p unit -> unit p", 8)] * layers
    base = output(case, model)
    assert torch.allclose(base, stepped(model, x, None), atol=1e-5)
    for layer in found:
        for unit in range(layer.count):
            cut = output(case, ns.apply(ns.zero_out(ns.Neurons({layer: [unit]})), model))
            assert torch.allclose(cut, stepped(model, x, (layer.parameter, unit)), atol=1e-5)
            assert not torch.allclose(cut, base, atol=1e-5)


def looped(experts: Any, expert: int, cut: slice) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of fused experts, token by token; some units of one of them are zero."""

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for token, state in enumerate(hidden):
            for place, chosen in enumerate(index[token].tolist()):
                if hasattr(experts, "_apply_gate") and hasattr(experts, "down_proj_bias"):  # GPT-OSS: (in, out)
                    units = experts._apply_gate(
                        state @ experts.gate_up_proj[chosen] + experts.gate_up_proj_bias[chosen]
                    )
                else:
                    gate, up = (experts.gate_up_proj[chosen] @ state).chunk(2)
                    units = experts.act_fn(gate) * up
                if chosen == expert:
                    units = units.clone()
                    units[cut] = 0
                if hasattr(experts, "down_proj_bias"):
                    result = units @ experts.down_proj[chosen] + experts.down_proj_bias[chosen]
                else:
                    result = experts.down_proj[chosen] @ units
                total[token] += weights[token, place] * result
        return total

    return forward


EXPERTS = {"Mixtral": 48, "Qwen3-MoE": 20, "OLMoE": 48, "GPT-OSS": 48, "DeepSeek-V3": 20}


@pytest.mark.parametrize("name", [asked(name) for name in EXPERTS])
@torch.no_grad()
def test_experts_and_their_units_against_loops_and_against_copies(name: str) -> None:
    case, size = ALL[name], EXPERTS[name]
    model = case.build()
    (units, _), (experts, said) = found_units(name, "expert unit"), found_units(name, "expert")
    assert units is not None and experts is not None
    layers = 1 if name == "DeepSeek-V3" else 2
    assert (units.count, experts.count) == (layers * 4 * size, layers * 4)
    assert ("down_proj_bias (an expert's bias stays" in said) == (name == "GPT-OSS")
    base, path = output(case, model), units.layers[-1].parameter.rpartition(".")[0]
    used = model.get_submodule(path)
    calls: list[Tensor] = []
    handle = used.register_forward_pre_hook(lambda _, args: calls.append(args[1]))
    output(case, model)
    handle.remove()
    expert = int(calls[0].flatten()[0])
    for cut, edit in (
        (slice(5, 6), ns.zero_out(ns.Neurons({units.layers[-1]: [expert * size + 5]}))),
        (slice(None), ns.zero_out(ns.Neurons({experts.layers[-1]: [expert]}))),
    ):
        edited = output(case, ns.apply(edit, model))
        copied = case.build()
        weights: Any = copied.get_submodule(path).down_proj
        (weights[expert] if name == "GPT-OSS" else weights[expert].T)[cut] = 0
        assert torch.equal(edited, output(case, copied))
        assert not torch.allclose(edited, base, atol=1e-4)
        written = case.build()
        module: Any = written.get_submodule(path)
        module.forward = looped(module, expert, cut)
        assert torch.allclose(edited, output(case, written), rtol=1e-3, atol=1e-4)
