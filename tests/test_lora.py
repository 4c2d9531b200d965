"""Edits as adapters that peft reads, and models with adapters: scored, cut, merged and unmerged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS, "labels": torch.tensor([0, 1, 0, 1]), "groups": torch.tensor([0, 0, 1, 1])}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=2, num_labels=2, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).to(dtype).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def rows(model: nn.Module) -> ns.Neurons:
    wanted = {"*0.self_attn.q_proj.weight": (1, 5), "*0.mlp.up_proj.weight": 3, "*1.mlp.down_proj.weight": (0, 2, 4)}
    return ns.select(ns.find_layout(model), wanted)


def heads(model: nn.Module) -> ns.Neurons:
    layout = ns.find_layout(model, patterns={"*o_proj.weight": ("e (head d) -> head e d", {"d": 4})})
    return ns.select(layout, {"*1.self_attn.o_proj.weight": 2})


def adapted(model: Any, folder: Path) -> Any:
    """The model, in a copy, with the adapter in a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


# --- an edit as an adapter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_out_merged_is_what_bake_gives_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    edit = ns.zero_out(rows(model) | heads(model))
    before = snapshot(model)
    ranks = ns.lora.save_adapter(edit, model, tmp_path / "cut")
    assert_unchanged(before, model)
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.mlp.up_proj": 1,
        "model.layers.1.self_attn.o_proj": 4,
        "model.layers.1.mlp.down_proj": 3,
    }
    expected, whole = logits(ns.bake(edit, model)), logits(model)
    loaded = adapted(model, tmp_path / "cut")
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(logits(loaded), expected, rtol=tolerance, atol=tolerance)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), expected) and not torch.equal(expected, whole)
    baked = dict(ns.bake(edit, model).named_parameters())
    assert all(torch.equal(parameter, baked[name]) for name, parameter in merged.named_parameters())


def test_transformers_loads_it_too(tmp_path: Path) -> None:
    model = llama()
    edit = ns.zero_out(rows(model) | heads(model))
    ns.lora.save_adapter(edit, model, tmp_path)
    loaded = copy.deepcopy(model)
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(loaded.eval()), logits(ns.bake(edit, model)), rtol=1e-6, atol=1e-6)


def test_nothing_else_gets_an_adapter_and_the_scale_is_one(tmp_path: Path) -> None:
    model = llama()
    ranks = ns.lora.save_adapter(ns.zero_out(rows(model)), model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = adapted(model, tmp_path)
    layers = {name: module for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert {name.removeprefix("base_model.model."): m.r["default"] for name, m in layers.items()} == ranks
    assert {m.scaling["default"] for m in layers.values()} == {1.0}
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.inner = nn.Linear(4, 4), nn.ModuleDict({"a_b": nn.Linear(4, 4), "axb": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["axb"](self.inner["a_b"](self.a_b(x)))  # type: ignore[no-any-return]

    model = Nested()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"a_b.weight": (0, 1), "inner.axb.weight": 1}))
    assert ns.lora.save_adapter(edit, model, tmp_path) == {"a_b": 2, "inner.axb": 1}
    loaded = adapted(model, tmp_path)
    assert [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")] == [
        "base_model.model.a_b",
        "base_model.model.inner.axb",
    ]
    x = torch.randn(3, 4)
    assert torch.equal(loaded.merge_and_unload()(x), ns.bake(edit, model)(x))
    other = ns.zero_out(ns.select(ns.find_layout(model), {"a_b.weight": 1, "inner.a_b.weight": (0, 1)}))
    assert ns.lora.save_adapter(other, model, tmp_path) == {"a_b": 1, "inner.a_b": 2}
    assert torch.equal(adapted(model, tmp_path).merge_and_unload()(x), ns.bake(other, model)(x))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_the_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    model = gpt2()
    layout = ns.find_layout(model, patterns={"*1.attn.c_proj.weight": ("(head d) e -> head d e", {"d": 4})})
    edit = ns.zero_out(ns.select(layout, {"*0.mlp.c_fc.weight": (1, 2), "*1.attn.c_proj.weight": 3}))
    ranks = ns.lora.save_adapter(edit, model, tmp_path)
    assert ranks == {"transformer.h.0.mlp.c_fc": 2, "transformer.h.1.attn.c_proj": 4}
    assert torch.equal(logits(adapted(model, tmp_path).merge_and_unload()), logits(ns.bake(edit, model)))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_other_edits_agree_to_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    neurons = rows(model)
    edit = ns.compose(ns.scale(neurons, 0.3), ns.random_noise(neurons, relative_std=0.5, seed=1))
    ns.lora.save_adapter(edit, model, tmp_path)
    merged = adapted(model, tmp_path).merge_and_unload()
    baked = dict(ns.bake(edit, model).named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, baked[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_rank_is_that_of_the_change(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[2].zero_()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": (1, 2, 4)}))
    assert ns.lora.save_adapter(edit, model, tmp_path) == {"0": 2}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    assert torch.linalg.matrix_rank(change) == 2
    assert torch.equal(model[0].weight + change, ns.bake(edit, model)[0].weight)  # type: ignore[index]


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.tied = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.tied.weight = self.table.weight
            self.conv, self.norm, self.fine = nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.wrong = nn.Linear(4, 4)

    model = Mixed()
    with torch.no_grad():
        model.wrong.weight[0, 0] = torch.nan
    layout = ns.find_layout(model, extra=["*.bias", "norm.weight", "table.weight"])
    with pytest.raises(ValueError, match="an adapter cannot hold the edit of 11 tensors") as raised:
        ns.lora.save_adapter(ns.zero_out(ns.select(layout, {"*": 0})), model, tmp_path / "cut")
    said = str(raised.value)
    for reason in (
        "table.weight: weight of Embedding; an adapter changes weights of linear layers alone",
        "conv.weight: weight of Conv1d;",
        "fine.bias: bias of Linear;",
        "attention.out_proj.weight: within a MultiheadAttention, which reads the weight past the adapter",
        "Save the edit with save_file, or the edited model with bake",
    ):
        assert reason in said, said
    assert not (tmp_path / "cut").exists()
    for name, reason in {
        "wrong.weight": "it has entries that are not finite",
        "attention.in_proj_weight": "in_proj_weight of MultiheadAttention",
    }.items():
        with pytest.raises(ValueError, match=reason):
            ns.lora.save_adapter(ns.zero_out(ns.select(layout, {name: 0})), model, tmp_path)


def test_an_edit_that_overflows_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    with pytest.raises(ValueError, match=r"0\.weight: the edit gives numbers that are not finite, which no adapter"):
        ns.lora.save_adapter(ns.scale(ns.select(ns.find_layout(model), {"*": 0}), 1e9), model, tmp_path)


def test_what_is_tied_computed_adapted_or_nothing_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"*": 0}))
    with pytest.raises(ValueError, match=r"(?s)0\.weight: tied \(1\.weight\).*2\.weight: computed by a paramet"):
        ns.lora.save_adapter(cut, model, tmp_path)
    alone = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="the model is this layer"):
        ns.lora.save_adapter(ns.zero_out(ns.select(ns.find_layout(alone), {"*": 0})), alone, tmp_path)
    with pytest.raises(ValueError, match="changes no weight of this model, and an adapter has at least rank 1"):
        ns.lora.save_adapter(ns.compose(), model, tmp_path)
    model = lora()
    with pytest.raises(ValueError, match="within an adapter already; merge that first"):
        ns.lora.save_adapter(ns.zero_out(ns.select(ns.find_layout(model), {"*0*q_proj.weight": 0})), model, tmp_path)
    assert not list(tmp_path.iterdir())


# --- a model with an adapter ----------------------------------------------------------------------------------------


def lora(**options: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(llama(), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


def in_both(model: nn.Module) -> ns.Neurons:
    layout = ns.find_layout(model, patterns={"*o_proj.weight": ("e (head d) -> head e d", {"d": 4})})
    wanted = {"*0*q_proj.weight": (1, 5), "*1*o_proj.weight": 2, "*0*up_proj.weight": 3}
    return ns.select(layout, wanted)


def test_names_and_scores_are_those_of_the_merged_model() -> None:
    model = lora()
    plain = merged(model)
    scores, expected = ns.group_grad_norms(model, DATA, where="*_proj.weight"), ns.group_grad_norms(plain, DATA)
    for layer, values in expected.by_layer().items():
        name = layer.parameter
        if "_proj" in name:  # the gradient to W is that of the effective weight
            own = next(own for other, own in scores.by_layer().items() if other.parameter == name)
            torch.testing.assert_close(own, values, rtol=1e-4, atol=1e-6)
    one, other = (ns.evaluate(m, DATA, metric=ns.cross_entropy) for m in (model, plain))
    torch.testing.assert_close(torch.tensor(one.values), torch.tensor(other.values))


@pytest.mark.parametrize("edit", [ns.zero_out, lambda neurons: ns.scale(neurons, 0.4)], ids=["zero_out", "scale"])
def test_a_cut_of_the_effective_weight_is_one_of_the_merged(edit: Any) -> None:
    model = lora()
    plain = merged(model)
    before = snapshot(model)
    effective = ns.lora.effective(in_both(model), model)
    assert_unchanged(before, model)
    assert len(effective) == len(in_both(model)) + 2 + 4  # two rows of B, four columns of A
    view, expected = ns.apply(edit(effective), model), ns.apply(edit(in_both(plain)), plain)
    torch.testing.assert_close(logits(view), logits(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(ns.bake(edit(effective), model).merge_and_unload()), logits(expected))
    alone = ns.apply(edit(in_both(model)), model)
    assert (logits(alone) - logits(expected)).abs().max() > 1e-4, "the row of W alone is not enough"


def test_what_is_merged_is_cut_as_well_and_stays_cut_unmerged() -> None:
    model, plain = lora(), merged(lora())
    model.merge_adapter()
    edit = ns.zero_out(ns.lora.effective(in_both(model), model))
    baked = ns.bake(edit, model)
    expected = logits(ns.bake(ns.zero_out(in_both(plain)), plain))
    torch.testing.assert_close(logits(baked), expected, rtol=1e-5, atol=1e-6)
    baked.unmerge_adapter()
    torch.testing.assert_close(logits(baked), expected, rtol=1e-5, atol=1e-6)


def test_without_an_adapter_neurons_stay_as_they_are() -> None:
    model = llama()
    assert ns.lora.effective(in_both(model), model) == in_both(model)


def test_adapters_that_do_more_are_refused() -> None:
    model = lora(use_dora=True)
    with pytest.raises(ValueError, match=r"does more than to add B A \(DoRA") as raised:
        ns.lora.effective(in_both(model), model)
    assert "Merge the adapter first (merge_and_unload)" in str(raised.value)
    model = lora()
    layout = ns.find_layout(model, patterns={"*0*q_proj.weight": ("(a b) (c d) -> (a c) b d", {"a": 2, "c": 2})})
    with pytest.raises(ValueError, match="neither whole rows nor whole columns"):
        ns.lora.effective(ns.select(layout, {"*0*q_proj.weight": 0}), model)
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.lora.effective(in_both(model), nn.Linear(2, 2))


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    model = llama()
    ns.lora.save_adapter(ns.zero_out(rows(model)), model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] and sorted(config["rank_pattern"].values()) == [1, 2]
