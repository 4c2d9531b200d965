"""Mean ablation by weights is what a hook that holds the activation at its mean does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns

IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = [(IMAGES[:8], torch.arange(8) % 2), (IMAGES[8:], torch.arange(4) % 2)]


class Residual(nn.Module):
    """The norm reads the convolution's output, and so does a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (z + self.norm(z)).mean((2, 3))


def settled(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*layers).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def held(model: nn.Module, name: str, where: Any, value: Tensor, side: str = "output") -> Tensor:
    """The logits where a hook holds some channels of a module."""
    copied = copy.deepcopy(model)
    module = copied.get_submodule(name)

    def hold(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, where] = value
        return tensor

    if side == "output":
        module.register_forward_hook(lambda _, args, output: hold(output))
    else:
        module.register_forward_pre_hook(lambda _, args: (hold(args[0]),))
    with torch.no_grad():
        return copied(IMAGES)


def outputs(model: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    copied = copy.deepcopy(model)
    copied.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        copied(IMAGES)
    return seen[0]


def edited(model: nn.Module, edit: ns.Edit) -> Tensor:
    with torch.no_grad():
        return ns.apply(edit, model)(IMAGES)


def chosen(model: nn.Module, name: str, index: Any) -> ns.Neurons:
    return ns.select(ns.find_layout(model), {name: index})


def test_behind_a_batch_norm_the_channel_becomes_its_shift() -> None:
    model = settled(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)
    )
    edit = ns.mean_out(chosen(model, "0.weight", (1, 3)), model, DATA)
    assert repr(edit) == "zero_out(2 neurons in 1 layer: 1.weight[1, 3])"
    norm: nn.BatchNorm2d = model[1]
    mean = norm.running_mean[[1, 3], None, None].expand(2, 4, 4)
    assert torch.allclose(edited(model, edit), held(model, "0", [1, 3], mean), atol=1e-12)


def test_without_a_norm_the_bias_is_the_mean() -> None:
    model = settled(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    before = snapshot(model, DATA)
    edit = ns.mean_out(chosen(model, "0.weight", 2), model, DATA)
    assert_unchanged(before, model, DATA)
    mean = outputs(model, "0")[:, 2].mean()
    assert torch.allclose(edited(model, edit), held(model, "0", 2, mean), atol=1e-12)


def test_a_norm_that_is_not_all_that_reads_an_output_holds_nothing() -> None:
    model = settled(Residual())
    with pytest.raises(ValueError, match="it has no bias, and no norm with a shift alone reads its output"):
        ns.mean_out(chosen(model, "0.conv.weight", 0), model, DATA)


def test_another_norm_is_held_by_its_scale_and_shift() -> None:
    model = settled(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    edit = ns.mean_out(chosen(model, "0.weight", 1), model, DATA)
    mean = outputs(model, "1")[:, 1].mean()
    assert torch.allclose(edited(model, edit), held(model, "1", 1, mean), atol=1e-12)


def test_the_columns_of_a_projection_go_into_its_bias() -> None:
    """Two heads at once: their shares add up."""
    model = settled(nn.Flatten(), nn.Linear(108, 8), nn.Tanh(), nn.Linear(8, 2))
    heads = ns.find_layout(model, where="3.*", patterns={"3.weight": ("o (head d) -> head o d", {"d": 2})})
    edit = ns.mean_out(heads.neurons([0, 2]), model, DATA)
    columns = [0, 1, 4, 5]
    mean = outputs(model, "2")[:, columns].mean(0)
    assert torch.allclose(edited(model, edit), held(model, "3", columns, mean, "input"), atol=1e-12)


def test_the_mean_is_over_all_batches_whatever_their_sizes_and_groups() -> None:
    model = settled(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 2))
    neurons = chosen(model, "1.weight", ...)
    whole = ns.mean_out(neurons, model, [(IMAGES, torch.zeros(12, dtype=torch.int64))])
    parts = ns.mean_out(neurons, model, {"a": [DATA[0]], "b": [DATA[1]]})
    assert torch.allclose(edited(model, whole), edited(model, parts), atol=1e-12)


class Routed(nn.Module):
    """An expert for images that are bright, and another for those that are dark."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        bright = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 4)
        for expert, own in ((self.bright, bright), (self.dark, ~bright)):
            if own.any():
                hidden[own] = expert(x[own])
        return self.head(hidden.relu())


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1] * 12, [5, 4, 3]])
def test_the_mean_of_an_expert_is_over_what_comes_to_it(sizes: list[int]) -> None:
    model = settled(Routed())
    order = IMAGES.mean((2, 3))[:, 0].argsort()  # so that batches come to one expert alone
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in IMAGES[order].split(sizes)]
    edit = ns.mean_out(chosen(model, "0.bright.weight", 1), model, batches)
    pixels = IMAGES.mean((2, 3))
    mean = model[0].bright(pixels[pixels[:, 0] > 0])[:, 1].mean()
    assert torch.allclose(ns.bake(edit, model)[0].bright.bias[1], mean, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "patterns", "said"),
    [
        (nn.Sequential(nn.LSTM(3, 4)), {}, "it is no linear layer, convolution or the like"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
            {"0.weight": ("(head d) i -> head d i", {"d": 2})},
            r"each of its neurons \(head\) is several rows",
        ),
    ],
)
def test_what_cannot_be_held_says_why(model: nn.Module, patterns: Any, said: str) -> None:
    layout = ns.find_layout(model, patterns=patterns)
    data = [(torch.randn(4, 5, 3), torch.zeros(4, 5, dtype=torch.int64))]
    with pytest.raises(ValueError, match=said):
        ns.mean_out(layout.neurons([0]), model, data)


def test_a_layer_within_a_fused_operator_is_not_seen() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 2)).eval()
    data = [(torch.randn(4, 3, 4), torch.zeros(4, dtype=torch.int64))]
    neurons = ns.select(ns.find_layout(model), {"0.self_attn.out_proj.weight": 1})
    with pytest.raises(ValueError, match="it is never called: no example comes to it, or a fused operator"):
        ns.mean_out(neurons, model, data)


def test_bad_arguments() -> None:
    model = settled(nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(TypeError, match="mean_out takes a set of Neurons"):
        ns.mean_out([1], model, DATA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the loader yielded no batch"):
        ns.mean_out(chosen(model, "1.weight", 0), model, [])
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.mean_out(chosen(settled(nn.Linear(3, 2)), "0.weight", 0), model, DATA)
