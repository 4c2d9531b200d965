"""Residual branches are those that a reader of the model's code would name; scores and groups equal slow loops."""

from __future__ import annotations

import fnmatch
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES, CLASSES, marked

import neuronsurgery as ns
from neuronsurgery import CaptureError

# --- branches of real architectures ---------------------------------------------------------------------------------


def layers(branches: Sequence[ns.Branch]) -> list[str]:
    return [branch.layer for branch in branches]


def stages(branches: Sequence[ns.Branch]) -> list[int]:
    return [branch.stage for branch in branches]


def chosen_by(model: nn.Module, *globs: str) -> list[str]:
    """The parameters that a reader would name, in the order of the model's code."""
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def resnet50() -> nn.Module:
    """One bottleneck block per stage, narrow inside."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=4)


def deit() -> nn.Module:
    """With a second token and a second head."""
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformerDistilled(**sizes, num_classes=CLASSES)


def nf_resnet() -> nn.Module:
    """Its convolutions read a weight and a gain per channel."""
    from timm.models.nfnet import NfCfg, NormFreeNet

    return NormFreeNet(NfCfg(depths=(1, 1), channels=(16, 24), stem_type="3x3", attn_layer=None), num_classes=CLASSES)


def parallel_vit() -> nn.Module:
    """Two attentions side by side, stacked and summed, then two feed-forward parts."""
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=CLASSES, block_fn=ParallelThingsBlock)


def cait() -> nn.Module:
    """Its last blocks add to the class token alone, which at first is a parameter."""
    from timm.models.cait import Cait

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return Cait(**sizes, num_classes=CLASSES, depth_token_only=2)


HERE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (resnet50, 32),
    "deit": (deit, 16),
    "nf_resnet": (nf_resnet, 16),
    "parallel_vit": (parallel_vit, 16),
    "cait": (cait, 16),
}
"""Networks that this test alone asks for, and the size of their images; all others are of the zoo."""

TRANSFORMER = ("*.attn.proj.weight", "*.mlp.fc2.weight")

ENDS: dict[str, tuple[tuple[str, ...], list[int]]] = {
    "residual": (("a2.weight", "b2.weight"), [0, 1]),
    "encoder": (("*.out_proj.weight", "*.linear2.weight"), [0] * 4),
    "resnet18": (("layer*.conv2.weight",), [0, 0, 1, 1, 2, 2, 3, 3]),
    "resnext": (("layer*.conv3.weight",), [0, 1, 2, 3]),
    "mobilenet": (("features.3.block.3.0.weight",), [0]),
    "vit": (TRANSFORMER, [0] * 4),
    "vit_torchvision": (("*.self_attention.out_proj.weight", "*.mlp.3.weight"), [0] * 4),
    "swin": (("layers.*.attn.proj.weight", "layers.*.mlp.fc2.weight"), [0] * 4 + [1] * 4),
    "swin_torchvision": (("features.*.attn.proj.weight", "features.*.mlp.3.weight"), [0] * 4 + [1] * 4),
    "convnext": (("stages.*.mlp.fc2.weight",), [0, 1, 2, 2, 3]),
    "convnext_torchvision": (("features.*.block.5.weight",), [0, 1]),
    "bert": (("*.output.dense.weight",), [0] * 4),
    "gpt2": (("*.c_proj.weight",), [0] * 4),
    "gpt2_lm": (("*.c_proj.weight",), [0] * 4),
    "resnet50": (("layer*.conv3.weight",), [0, 1, 2, 3]),
    "deit": (TRANSFORMER, [0] * 4),
    "nf_resnet": (("stages.*.conv3.weight",), [0, 1]),
    "parallel_vit": (TRANSFORMER, [0] * 8),
    "cait": (TRANSFORMER, [0] * 2 + [1] * 4),
}


@pytest.mark.parametrize("name", marked(ENDS))
def test_branches_of_known_architectures(name: str) -> None:
    if name in HERE:
        build, size = HERE[name]
        model, batch = build(), (torch.randn(2, 3, size, size), torch.zeros(2).long())
    else:
        model, batch = CASES[name].build(), CASES[name].batches()[0]
    found = ns.residual_branches(model, batch)
    globs, expected = ENDS[name]
    assert layers(found) == chosen_by(model, *globs)
    assert stages(found) == expected


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(256, 2, 2), (512, 1, 1)], [0, 1]),
        ([(64, 8, 8), (256, 4, 4)], [0, 1]),  # as many entries
        ([(8, 8, 12), (64, 12), (8, 8, 12)], [0, 0, 0]),
        ([(12, 8, 8), (8, 8, 12)], [0, 0]),
        ([(8, 8, 12), (64, 12), (4, 4, 24), (16, 24), (8, 8, 12)], [0, 0, 1, 1, 2]),
        ([(16,), (16,), (8,)], [0, 0, 1]),
        ([(64, 4, 4), (1024, 1, 1), (1024,)], [0, 1, 1]),  # positions become channels
        ([(8, 4, 4), (128,)], [0, 1]),
        ([(1, 1, 12), (1, 12), (12,)], [0, 0, 0]),
    ],
)
def test_stages(shapes: list[tuple[int, ...]], expected: list[int]) -> None:
    """A net whose blocks add to values of these shapes."""

    class Block(nn.Module):
        def __init__(self, before: int, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.shape, width = shape, math.prod(shape)
            self.resize = nn.AdaptiveAvgPool1d(width) if before != width else nn.Identity()
            self.layer = nn.Linear(shape[-1], shape[-1])

        def forward(self, x: Tensor) -> Tensor:
            x = self.resize(x).reshape(-1, *self.shape)
            return (x + self.layer(x)).flatten(1)  # type: ignore[no-any-return]

    widths = [math.prod(shape) for shape in shapes]
    blocks = [Block(before, shape) for before, shape in zip([widths[0], *widths], shapes, strict=False)]
    found = ns.residual_branches(nn.Sequential(*blocks), (torch.randn(3, widths[0]), torch.zeros(3).long()))
    assert [branch.shape for branch in found] == shapes
    assert stages(found) == expected


def test_shapes_are_those_of_one_example() -> None:
    case = CASES["residual"]
    assert [branch.shape for branch in ns.residual_branches(case.build(), case.batches()[0])] == [(6, 8, 8), (8, 4, 4)]


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "grouped", "unet", "gru_cell", "tied", "shared_module", "attention", "custom"),
        *(pytest.param(name, marks=pytest.mark.architectures) for name in ("lstm", "cross_attention")),
    ],
)
def test_networks_without_branches_are_told_what_to_use_instead(name: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=r"no residual branch: .* Cut neurons instead.*sample\(layout, k, seed\)"):
        ns.residual_branches(case.build(), case.batches()[0])


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=CLASSES)


def test_a_densely_connected_network_has_none() -> None:
    with pytest.raises(ValueError, match="no residual branch"):
        ns.residual_branches(densenet(), (torch.randn(2, 3, 32, 32), torch.zeros(2).long()))


TOKENS = {"vocab_size": 30, "num_labels": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 16}


def eager_bert() -> nn.Module:
    """One head, so that the scores and the mask added to them have one shape."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**TOKENS, **SMALL, num_attention_heads=1, attn_implementation="eager")
    return BertForSequenceClassification(config)


def roberta() -> nn.Module:
    """Its positions are counted from the token ids."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**TOKENS, **SMALL, num_attention_heads=2))


def gptj() -> nn.Module:
    """Attention and feed-forward branch in parallel: one sum of three."""
    from transformers import GPTJConfig, GPTJForSequenceClassification

    config = GPTJConfig(
        **TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=12, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    return GPTJForSequenceClassification(config)


class SharedBias(nn.Module):
    """T5's way: a learned bias is added to the mask, and the sum of the two to the scores of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position_bias_table = nn.Embedding(30, 4), nn.Parameter(torch.randn(8, 8))
        self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        added = self.position_bias_table + 9 * (attention_mask.float() - 1)[:, None]
        x = self.embed(input_ids)
        for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
            scores = q(x) @ k(x).mT + added
            x = x + o(scores.softmax(-1) @ v(x))
        return self.fc(x.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "globs"),
    [
        (eager_bert, ("*.output.dense.weight",)),
        pytest.param(roberta, ("*.output.dense.weight",), marks=pytest.mark.architectures),
        pytest.param(gptj, ("*.attn.out_proj.weight", "*.mlp.fc_out.weight"), marks=pytest.mark.architectures),
        (SharedBias, ("o.*.weight",)),
    ],
)
def test_masks_biases_and_positions_are_no_branches(build: Callable[[], nn.Module], globs: tuple[str, ...]) -> None:
    model = build()
    mask = torch.ones(2, 8).long()
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(3, 30, (2, 8)), "attention_mask": mask, "labels": torch.zeros(2).long()}
    found = ns.residual_branches(model, batch)
    assert layers(found) == chosen_by(model, *globs)
    assert set(stages(found)) == {0}


# --- branches of nets made for one question -------------------------------------------------------------------------


class Net(nn.Module):
    """`parts` and how they are put together."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)
        self.stem, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.how(self, self.stem(x).relu()))  # type: ignore[no-any-return]


def net(forward: Callable[[Any, Tensor], Tensor], *names: str) -> Net:
    return Net(forward, **{name: nn.Linear(4, 4) for name in names})


def write_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x).relu())
    y += x
    return y


def write_in_place_wider(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x).relu()).double()
    y += x
    return y.float()


def sum_of_three(self: Any, x: Tensor) -> Tensor:
    return x + self.b(self.a(x).relu()) + self.d(self.c(x).relu())


def sum_of_three_the_other_way(self: Any, x: Tensor) -> Tensor:
    return (self.b(self.a(x).relu()) + self.d(self.c(x).relu())) + x


def gated_by_another_path(self: Any, x: Tensor) -> Tensor:
    return x + self.a(x) * self.c(self.b(x).relu()).sigmoid()


def squeeze_and_excitation(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return x + y * self.c(self.b(y).relu()).sigmoid()


def side_by_side(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x).relu()) + self.d(self.c(x).relu())


def side_by_side_and_longer(self: Any, x: Tensor) -> Tensor:
    """Two layers are more than a projection: neither path is a skip."""
    return self.b(self.a(x).relu()) + self.d(self.c(self.a(x).tanh()).relu())


def reparametrised() -> Net:
    """RepVGG: two layers of other sizes and a normalisation side by side."""
    parts = {"norm": nn.LayerNorm(4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    return Net(lambda self, x: self.a(x) + self.b(x) + self.norm(x), **parts)


def shared_input_layer() -> Net:
    """Attention and feed-forward path leave each other so late that the rest of them is equally long."""

    def forward(self: Any, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return x + (self.b(left * left.mean(1, keepdim=True)) + self.c(right.relu()))

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(2, 4), c=nn.Linear(2, 4))


def lstm() -> nn.Module:
    return nn.LSTM(4, 4, batch_first=True)


def long_skip(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).relu()
    return x + self.c(y + self.b(y))


def recurrent(self: Any, x: Tensor) -> Tensor:
    return x + self.a(self.rnn(x[:, None])[0][:, 0])


def gelu(self: Any, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (0.8 * (x + 0.04 * x**3)).tanh())


def chunked(self: Any, x: Tensor) -> Tensor:
    left, right = self.a(x).chunk(2, 1)
    return torch.cat([left + right.tanh(), right], 1)


class Weighted(nn.Module):
    """A layer of a weight and another tensor, the weight made of them by a function."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.make, self.other, self.weight = make, nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.make(self.weight, self.other)


def weighted(make: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Net:
    return Net(lambda s, x: x + s.a(x).relu(), a=Weighted(make, *shape))


class Table(nn.Module):
    """A layer and a table of numbers that is added to what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prompts = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.prompts[0]  # type: ignore[no-any-return]


def path(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x).relu())  # type: ignore[no-any-return]


JOINS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "difference": (lambda s, x: x - path(s, x), ["b.weight"]),
    "difference the other way": (lambda s, x: path(s, x) - x, ["b.weight"]),
    "rsub": (lambda s, x: torch.rsub(x, path(s, x)), ["b.weight"]),
    "sum of a list": (lambda s, x: sum([x, path(s, x)]), ["b.weight"]),  # type: ignore[dict-item, return-value]
    "stack, sum": (lambda s, x: torch.stack([x, path(s, x)]).sum(0), ["b.weight"]),
    "stack, mean": (lambda s, x: torch.stack([x, path(s, x)], -1).mean(2), ["b.weight"]),
    "stack in a sum": (lambda s, x: x + torch.stack([s.a(x), s.b(x)], 1).sum(1), ["a.weight", "b.weight"]),
    "stack, sum over another axis": (lambda s, x: torch.stack([x, path(s, x)], 1).sum(2).repeat(1, 2), []),
    "stack, sum over all": (lambda s, x: torch.stack([x, path(s, x)], 1).sum() + 0 * x, []),
    "lerp": (lambda s, x: torch.lerp(x, path(s, x), 0.5), ["b.weight"]),
    "lerp to the skip": (lambda s, x: torch.lerp(path(s, x), x, torch.tensor(0.5)), ["b.weight"]),
    "lerp by a gate": (lambda s, x: torch.lerp(x, path(s, x), s.c(x).sigmoid()), []),
    "lerp of a gate": (lambda s, x: torch.lerp(x, torch.ones(4), path(s, x)), []),
    "addcmul": (lambda s, x: torch.addcmul(x, path(s, x), torch.full_like(x, 0.5)), ["b.weight"]),
    "addcmul by a gate": (lambda s, x: torch.addcmul(x, path(s, x), s.c(x).sigmoid()), []),
    "addcmul of the skip": (lambda s, x: torch.addcmul(x, x, path(s, x)), []),
    "addcmul onto a constant": (lambda s, x: torch.addcmul(torch.ones(4), x, path(s, x)), []),
    "addmm": (lambda s, x: torch.addmm(x, s.a(x).relu(), s.b.weight.T), []),
    "concatenation": (lambda s, x: torch.cat([x, path(s, x)], 1)[:, ::2], []),
    "onto zeros of its shape": (lambda s, x: torch.zeros_like(x) + path(s, x), []),
}


@pytest.mark.parametrize("name", JOINS)
def test_which_joins_are_seen(name: str) -> None:
    forward, expected = JOINS[name]
    model, batch = net(forward, "a", "b", "c"), (torch.randn(5, 3), torch.zeros(5).long())
    if expected:
        assert layers(ns.residual_branches(model, batch)) == expected
    else:
        with pytest.raises(ValueError, match=r"by \+, -, lerp, addcmul or the sum of a stack\..*is not seen"):
            ns.residual_branches(model, batch)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(weighted(lambda w, gain: w * gain[:, :1], 4, 2), ["a.weight"], id="gain"),
        pytest.param(weighted(lambda w, gain: gain[:, :1] * w, 4, 2), ["a.weight"], id="gain first"),
        pytest.param(weighted(lambda w, other: w @ other, 4, 4), ["a.weight"], id="product"),
        pytest.param(weighted(lambda w, other: w + other @ other.T, 4, 2), [], id="a sum, which zeroing one leaves"),
        pytest.param(weighted(lambda w, other: torch.cat([w, other])[::2], 4, 4), [], id="joined"),
        pytest.param(Net(lambda s, x: x + s.a(x).relu(), a=Table()), ["a.layer.weight"], id="a table added"),
    ],
)
def test_which_tensor_ends_a_branch(model: nn.Module, expected: list[str]) -> None:
    """One whose zeros cut it: then what the branch gives does not depend on its input."""
    batch = (torch.randn(5, 3), torch.zeros(5).long())
    if not expected:
        with pytest.raises(ValueError, match="no residual branch"):
            ns.residual_branches(model, batch)
        return
    assert layers(ns.residual_branches(model, batch)) == expected
    cut = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {expected[0]: ...})), model)
    assert torch.equal(cut.a(torch.randn(5, 4)), cut.a(torch.randn(5, 4)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(net(lambda s, x: x + s.b(s.a(x).relu()), "a", "b"), ["b.weight"], id="identity"),
        pytest.param(net(lambda s, x: s.b(s.a(x).relu()) + x, "a", "b"), ["b.weight"], id="skip last"),
        pytest.param(net(lambda s, x: torch.add(x, s.a(x), alpha=2), "a"), ["a.weight"], id="alpha"),
        pytest.param(net(write_in_place, "a", "b"), ["b.weight"], id="in place"),
        pytest.param(net(write_in_place_wider, "a", "b"), ["b.weight"], id="in place, of another type"),
        pytest.param(net(lambda s, x: s.c(x) + s.b(s.a(x).relu()), "a", "b", "c"), ["b.weight"], id="projection"),
        pytest.param(net(lambda s, x: s.b(s.a(x).relu()) + s.c(x), "a", "b", "c"), ["b.weight"], id="projection last"),
        pytest.param(net(gated_by_another_path, "a", "b", "c"), [], id="two layers end it"),
        pytest.param(net(squeeze_and_excitation, "a", "b", "c"), ["a.weight"], id="squeeze and excitation"),
        pytest.param(net(sum_of_three, "a", "b", "c", "d"), ["b.weight", "d.weight"], id="parallel"),
        pytest.param(
            net(sum_of_three_the_other_way, "a", "b", "c", "d"), ["b.weight", "d.weight"], id="parallel first"
        ),
        pytest.param(reparametrised(), ["a.weight", "b.weight"], id="normalised skip"),
        pytest.param(shared_input_layer(), ["b.weight", "c.weight"], id="parallel behind one layer"),
        pytest.param(net(long_skip, "a", "b", "c"), ["b.weight", "c.weight"], id="nested"),
        pytest.param(Net(recurrent, rnn=lstm(), a=nn.Linear(4, 4)), ["a.weight"], id="recurrent, then a layer"),
        pytest.param(Net(lambda s, x: x + s.rnn(x[:, None])[0][:, 0], rnn=lstm()), [], id="recurrent alone"),
        pytest.param(net(lambda s, x: s.a(x) + s.b(x), "a", "b"), [], id="two layers side by side"),
        pytest.param(net(side_by_side, "a", "b", "c", "d"), [], id="two paths side by side"),
        pytest.param(net(side_by_side_and_longer, "a", "b", "c", "d"), [], id="a short path beside a longer one"),
        pytest.param(net(gelu), [], id="tanh gelu"),
        pytest.param(net(chunked, "a"), [], id="halves"),
        pytest.param(net(lambda s, x: s.a(x) * x.sigmoid() + x * (1 - x.sigmoid()), "a"), [], id="highway"),
        pytest.param(net(lambda s, x: x + s.a(x).mean(1, keepdim=True), "a"), ["a.weight"], id="broadcast branch"),
        pytest.param(net(lambda s, x: x.mean(1, keepdim=True) + s.a(x), "a"), [], id="broadcast skip"),
        pytest.param(net(lambda s, x: s.a(s.a(x).relu() + x) + x, "a"), ["a.weight"] * 2, id="one layer twice"),
    ],
)
def test_what_is_a_branch(model: nn.Module, expected: list[str]) -> None:
    batch = (torch.randn(5, 3), torch.zeros(5).long())
    if expected:
        assert layers(ns.residual_branches(model, batch)) == expected
    else:
        with pytest.raises(ValueError, match="no residual branch"):
            ns.residual_branches(model, batch)


def test_a_block_on_the_bare_input_counts() -> None:
    class OnInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.a(x))  # type: ignore[no-any-return]

    assert layers(ns.residual_branches(OnInput(), (torch.randn(5, 3), torch.zeros(5).long()))) == ["a.weight"]


def test_computed_embeddings_and_any_place_of_the_batch() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            x = nn.functional.embedding(ids, 2 * self.embed.weight).transpose(0, 1)
            return self.fc((x + self.a(x)).mean(0))  # type: ignore[no-any-return]

    (found,) = ns.residual_branches(SequenceFirst(), (torch.randint(9, (5, 3)), torch.zeros(5).long()))
    assert found == ns.Branch("a.weight", 0, (3, 4))


INSIDE = {
    "residual": {"a2.weight": "a1.weight", "b2.weight": "b1.weight"},
    "resnet18": {"layer2.0.conv2.weight": "layer2.0.conv1.weight", "layer4.1.conv2.weight": "layer4.1.conv1.weight"},
    "vit": {
        "blocks.0.attn.proj.weight": "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc2.weight": "blocks.1.mlp.fc1.weight",
    },
    "bert": {
        "bert.encoder.layer.1.attention.output.dense.weight": "bert.encoder.layer.1.attention.self.value.weight",
        "bert.encoder.layer.0.output.dense.weight": "bert.encoder.layer.0.intermediate.dense.weight",
    },
}


@pytest.mark.parametrize("name", marked(INSIDE))
def test_zeroing_the_layer_cuts_the_branch_and_nothing_else(name: str) -> None:
    """Then nothing reaches the logits from inside the branch, and everything that did from before it still does."""
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    branches = ns.residual_branches(model, batch)
    before = named(ns.group_grad_norms(model, [batch]).by_layer())
    first = next(iter(before))
    for layer, inside in INSIDE[name].items():
        assert layer in layers(branches)
        cut = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {layer: ...})), model)
        after = named(ns.group_grad_norms(cut, [batch]).by_layer())
        assert before[inside].max() > 0 and torch.count_nonzero(after[inside]) == 0
        assert after[first].max() > 0


@pytest.mark.parametrize("name", marked(["residual", "encoder", "bert"]))
def test_finding_branches_changes_nothing(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    before = snapshot(model, batch)
    ns.residual_branches(model, batch)
    assert_unchanged(before, model, batch)


def test_what_cannot_be_captured_is_said() -> None:
    case = CASES["residual"]
    model = case.build()
    model.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(CaptureError, match="hooks"):
        ns.residual_branches(model, case.batches()[0])


# --- margins --------------------------------------------------------------------------------------------------------


def slow_margin(logits: Sequence[float], target: int) -> float:
    return logits[target] - max(value for position, value in enumerate(logits) if position != target)


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_margin_equals_the_loop_and_its_sign_is_accuracy(classes: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, dtype=torch.float64, generator=generator)
    targets = torch.randint(classes, (count,), generator=generator)
    found = ns.margin(logits, targets)
    assert found.tolist() == [slow_margin(row, int(c)) for row, c in zip(logits.tolist(), targets, strict=True)]
    assert torch.equal((found > 0).float(), ns.accuracy(logits, targets))


def test_margins_of_half_precision_are_float32() -> None:
    logits = torch.tensor([[256.0, 1.0, -1.0]], dtype=torch.bfloat16)
    assert ns.margin(logits, torch.tensor([0], dtype=torch.int32)).dtype == torch.float32
    assert ns.margin(logits, torch.tensor([0])).item() == 255.0  # bfloat16 has no 255
    assert ns.margin(logits, torch.tensor([2])).item() == -257.0


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3).long(), r"two or more classes.*for one logit z the two logits \(0, z\)"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "for probabilities pass their argmax"),
        (torch.zeros(3, 4, 5), torch.zeros(3, 4).long(), "for tokens causal_margin"),
        (torch.zeros(3, 2), torch.zeros(4).long(), r"one class index \(int\) per example"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"labels must be 0..1 for 2 classes, found \[2\]"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -100]), r"found \[-100\]"),
    ],
)
def test_margin_refuses(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ns.margin(logits, targets)


# --- fragility ------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], at: float) -> float:
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def slow_fragility(rows: Sequence[Sequence[float]], targets: Sequence[int]) -> list[float]:
    if len(rows) == 1:
        return [-value for value in rows[0]]
    scores = []
    for i, target in enumerate(targets):
        total = 0.0
        for row in rows:
            mates = [value for value, other in zip(row, targets, strict=True) if other == target]
            spread = quantile(mates, 0.75) - quantile(mates, 0.25)
            total += 0.0 if spread == 0 else (row[i] - statistics.median(mates)) / spread
        scores.append(-total / len(rows))
    return scores


def draw(edits: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    return torch.randn(edits, count, dtype=torch.float64, generator=generator), targets


problems = given(st.integers(1, 4), st.integers(1, 25), st.integers(0, 10_000))
few = settings(max_examples=40, deadline=None)


@problems
@few
def test_fragility_equals_the_loop(edits: int, count: int, seed: int) -> None:
    values, targets = draw(edits, count, seed)
    expected = torch.tensor(slow_fragility(values.tolist(), targets.tolist()), dtype=torch.float64)
    torch.testing.assert_close(ns.fragility(values, targets), expected, rtol=1e-10, atol=1e-12)


@problems
@few
def test_another_unit_of_a_class_changes_nothing(edits: int, count: int, seed: int) -> None:
    values, targets = draw(edits + 1, count, seed)
    units, origins = 0.1 + 3 * torch.rand(edits + 1, 3).double(), torch.randn(edits + 1, 3).double()
    moved = values * units[:, targets] + origins[:, targets]
    torch.testing.assert_close(ns.fragility(moved, targets), ns.fragility(values, targets), rtol=1e-7, atol=1e-9)


@problems
@few
def test_the_order_of_examples_and_of_edits_does_not_matter(edits: int, count: int, seed: int) -> None:
    values, targets = draw(edits, count, seed)
    order, edit_order = torch.randperm(count), torch.randperm(edits)
    torch.testing.assert_close(
        ns.fragility(values[edit_order][:, order], targets[order]), ns.fragility(values, targets)[order]
    )


def test_hand_worked() -> None:
    targets = torch.tensor([0, 0, 0, 0, 0, 4, 4])
    one = torch.tensor([[5.0, 1.0, 2.0, 3.0, 4.0, -1.0, 1.0]])
    assert ns.fragility(one, targets).tolist() == [-5, -1, -2, -3, -4, 1, -1]
    # Class 0 has median 3 and IQR 4 - 2; class 4 has median 0 and IQR 0.5 - -0.5.
    twice = ns.fragility(torch.cat([one, one]), targets)
    assert twice.tolist() == [-1.0, 1.0, 0.5, 0.0, -0.5, 1.0, -1.0]
    # An edit that is a hundred times as large does not outweigh the other; one that leaves a constant says nothing.
    assert torch.equal(ns.fragility(torch.cat([one, 100 * one]), targets), twice)
    blind = torch.full((1, 7), 0.3)
    assert torch.equal(ns.fragility(torch.cat([one, one, blind]), targets), twice * 2 / 3)


def test_an_edit_that_is_constant_to_rounding_says_nothing() -> None:
    targets = torch.zeros(9).long()
    values = torch.randn(1, 9)
    noise = torch.tensor([[1.0, 1.0 + 1e-7, 1.0 - 1e-7] * 3], dtype=torch.float64)
    found = ns.fragility(torch.cat([values.double(), noise]), targets)
    assert torch.equal(found, ns.fragility(torch.cat([values.double(), torch.ones(1, 9).double()]), targets))


def test_a_smaller_margin_is_more_fragile() -> None:
    values, targets = draw(1, 20, 0)
    score = ns.fragility(values, targets)
    values[0, 7] -= 1
    lower = ns.fragility(values, targets)
    assert lower[7] > score[7]
    assert torch.equal(lower[torch.arange(20) != 7], score[torch.arange(20) != 7])


GOOD = (torch.zeros(2, 3), torch.zeros(3).long())


# --- fragility of a sweep -------------------------------------------------------------------------------------------


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return layer


def rows_cut(model: nn.Module, *rows: int) -> dict[str, ns.Edit]:
    layout = ns.find_layout(model)
    return {f"row {row}": ns.zero_out(ns.select(layout, {"weight": row})) for row in rows}


def test_a_sweep_is_read_in_the_order_of_its_loaders() -> None:
    model = linear([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    inputs, labels = torch.randn(9, 2), torch.randint(3, (9,))
    batches = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    mapping = {"b": [batches[1]], "a": [batches[0]]}
    order = torch.tensor([4, 5, 6, 7, 8, 0, 1, 2, 3])
    edits = rows_cut(model, 2)
    cut = ns.apply(edits["row 2"], model)
    expected = torch.tensor([-slow_margin(cut(x).tolist(), int(y)) for x, y in zip(inputs, labels, strict=True)])
    plain = ns.fragility(ns.sweep(model, edits, batches, metric=ns.margin), labels)
    grouped = ns.fragility(ns.sweep(model, edits, mapping, metric=ns.margin), labels[order])
    torch.testing.assert_close(plain, expected.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(grouped, plain[order])


def test_flips_by_hand() -> None:
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    inputs = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-3.0, 1.0], [-1.0, -2.0]])
    targets = torch.tensor([0, 1, 0, 1])
    # Margins before: 1, -3, -4, -1. Row 0 cut: -1, -1, -1, -2 (one flips). Row 1 cut: 2, -2, -3, 1 (one flips).
    result = ns.sweep(model, rows_cut(model, 0, 1), [(inputs, targets)], metric=ns.margin)
    assert result.values().tolist() == [1, -3, -4, -1]
    assert result.values("row 0").tolist() == [-1, -1, -1, -2]
    assert result.values("row 1").tolist() == [2, -2, -3, 1]
    assert ns.fragility(result, targets, score="flips").tolist() == [0.5, 0, 0, 0.5]
    assert ns.fragility(result, targets, score="flips").dtype == torch.float64


def multi_margin(logits: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
    return weight * nn.functional.multi_margin_loss(logits, targets, reduction="none")


class CosineMargin:
    """A margin of one's own, as an object that is called."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return ns.margin(nn.functional.normalize(logits), targets)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (ns.accuracy, "accuracy"),
        (ns.cross_entropy, "cross_entropy"),
        (partial(nn.functional.cross_entropy, reduction="none"), "cross_entropy"),
        (partial(nn.functional.multi_margin_loss, reduction="none"), "multi_margin_loss"),
        (nn.CrossEntropyLoss(reduction="none"), "CrossEntropyLoss"),
        (lambda logits, targets: ns.margin(logits, targets), "<lambda>"),
    ],
)
def test_a_sweep_of_another_metric_is_refused(metric: Any, name: str) -> None:
    """A loss would rank backwards."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    data = [(torch.randn(6, 2), torch.randint(2, (6,)))]
    swept = ns.sweep(model, rows_cut(model, 0), data, metric=metric)
    for score in ("margin", "flips"):
        with pytest.raises(ValueError, match=f"with the metric '{name}', .*, so it is no margin: run it with "):
            ns.fragility(swept, data[0][1], score=score)
    values = torch.stack([swept.values(label) for label in swept.labels])
    assert torch.equal(ns.fragility(values, data[0][1]), -values[0])


@pytest.mark.parametrize("metric", [CosineMargin(), partial(multi_margin, weight=-1.0)])
def test_a_margin_of_ones_own(metric: Any) -> None:
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    data = [(torch.randn(6, 2), torch.randint(2, (6,)))]
    swept = ns.sweep(model, rows_cut(model, 0), data, metric=metric, larger_is_better=True)
    assert torch.equal(ns.fragility(swept, data[0][1]), -swept.values("row 0"))


def test_an_accuracy_is_no_margin_whatever_it_is_called() -> None:
    def margin_free_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
        return ns.accuracy(logits, targets)

    model, data = linear([[1.0, 0.0], [0.0, 1.0]]), [(torch.randn(6, 2), torch.randint(2, (6,)))]
    swept = ns.sweep(model, rows_cut(model, 0), data, metric=margin_free_accuracy, larger_is_better=True)
    with pytest.raises(ValueError, match="'margin_free_accuracy', whose values are all 0 or 1, so it is no margin"):
        ns.fragility(swept, data[0][1])


def test_a_sweep_without_edits_is_refused() -> None:
    with pytest.raises(ValueError, match="the sweep has no edits"):
        ns.fragility(ns.sweep(nn.Linear(2, 2), {}, [(torch.zeros(3, 2), GOOD[1])], metric=ns.margin), GOOD[1])


@pytest.mark.parametrize(
    ("values", "targets", "options", "error", "message"),
    [
        ([[0.0]], torch.zeros(1).long(), {}, TypeError, "takes a Sweep or a tensor.*not list"),
        (torch.zeros(3), GOOD[1], {}, ValueError, r"shape \(edits, examples\), not \(3,\): for one edit write values"),
        (torch.zeros(0, 3), GOOD[1], {}, ValueError, r"shape \(edits, examples\), not \(0, 3\)"),
        (GOOD[0], torch.zeros(2).long(), {}, ValueError, r"3 examples need targets of shape \(3,\), not \(2,\)"),
        (GOOD[0], torch.zeros(3), {}, TypeError, "targets are class indices.*argmax"),
        (GOOD[0], GOOD[1], {"score": "flips"}, ValueError, "flips need the margins under no edit.*pass the Sweep"),
        (GOOD[0], GOOD[1], {"score": "drop"}, ValueError, "score is 'margin' or 'flips', not 'drop'"),
        (
            torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), float("inf")]]),
            GOOD[1],
            {},
            ValueError,
            "2 of 3 values under edit 1 of 2 are NaN or infinite",
        ),
    ],
)
def test_fragility_refuses(
    values: Any, targets: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ns.fragility(values, targets, **options)


# --- groups ---------------------------------------------------------------------------------------------------------


def slow_groups(scores: Sequence[float], targets: Sequence[int], share: float | None) -> list[int]:
    classes = sorted(set(targets))
    groups = []
    for score, target in zip(scores, targets, strict=True):
        mates = [other for other, c in zip(scores, targets, strict=True) if c == target]
        if share is None:
            low, high = quantile(mates, 0.25), quantile(mates, 0.75)
            fragile = score > high + 1.5 * (high - low)
        else:
            fragile = sum(other >= score for other in mates) <= max(1, round(share * len(mates)))
        groups.append(2 * classes.index(target) + fragile)
    return groups


def outliers(seed: int, count: int = 40, few: int = 4) -> tuple[Tensor, Tensor]:
    """Two classes, 3 and 7, in random order, each with some scores far above the others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2 * (count + few), dtype=torch.float64, generator=generator)
    targets = torch.tensor([3] * (count + few) + [7] * (count + few))
    scores[:few] += 9
    scores[-few:] += 9
    order = torch.randperm(len(scores), generator=generator)
    return scores[order], targets[order]


@given(st.integers(0, 10_000), st.sampled_from(["tukey", 0.1, 0.25]))
@few
def test_groups_equal_the_loop(seed: int, rule: Any) -> None:
    scores, targets = outliers(seed)
    found = ns.infer_groups(scores, targets, rule)
    share = None if rule == "tukey" else rule
    assert found.groups.tolist() == slow_groups(scores.tolist(), targets.tolist(), share)
    assert torch.equal(found.fragile, found.groups % 2 == 1)
    assert found.classes == (3, 7)
    per_group = [int((found.groups == g).sum()) for g in range(4)]
    assert [count for counts in found.counts for count in counts] == per_group
    assert [record["count"] for record in found.to_records()] == per_group


@given(st.integers(0, 10_000), st.sampled_from(["tukey", 0.1]))
@few
def test_laws_of_the_flags(seed: int, rule: Any) -> None:
    scores, targets = outliers(seed)
    found = ns.infer_groups(scores, targets, rule).fragile
    units, origins = torch.tensor([0.5, 8.0]).double(), torch.tensor([-2.0, 16.0]).double()
    position = (targets == 7).long()
    assert torch.equal(ns.infer_groups(scores * units[position] + origins[position], targets, rule).fragile, found)
    order = torch.randperm(len(scores))
    assert torch.equal(ns.infer_groups(scores[order], targets[order], rule).fragile, found[order])
    for c in (3, 7):  # whoever is more fragile than a fragile example is fragile
        mine = targets == c
        assert scores[mine & found].min() > scores[mine & ~found].max()


def test_groups_by_hand() -> None:
    # Quartiles 1 and 3 of 0, 1, 2, 3, 4; with 20, 30, 40 they are 1.75 and 22.5, and the fence is 53.6: nobody.
    scores = torch.tensor([0.0, 1, 2, 3, 4, 20, 30, 40])
    with pytest.raises(ValueError, match="class 0 has 0 examples that are fragile"):
        ns.infer_groups(scores, torch.zeros(8).long())
    # 0..11 and 50, 60, 70: quartiles 3.5 and 10.5, fence 21.
    scores = torch.tensor([*range(12), 50, 60, 70]).float()
    found = ns.infer_groups(scores, torch.zeros(15).long())
    assert found.thresholds == (21.0,)
    assert found.counts == ((12, 3),)
    # An example on the fence is not above it.
    scores[12:] = torch.tensor([21.0, 60, 70])
    with pytest.raises(ValueError, match="class 0 has 2 examples that are fragile"):
        ns.infer_groups(scores, torch.zeros(15).long())


def test_ties_with_the_next_one_are_not_taken() -> None:
    scores = torch.tensor([9.0, 9, 9, 5, 5, 5, 1, 1, 1, 1])
    assert ns.infer_groups(scores, torch.zeros(10).long(), 0.4).counts == ((7, 3),)
    assert ns.infer_groups(scores, torch.zeros(10).long(), 0.6).counts == ((4, 6),)


def test_small_cells_are_refused_all_at_once() -> None:
    scores, targets = outliers(0)
    extra = torch.cat([scores, torch.tensor([0.0, 1.0]).double()]), torch.cat([targets, torch.tensor([9, 9])])
    with pytest.raises(
        ValueError, match=r"needs 3 examples.*class 9 has 1 examples that are not fragile; class 9 has 1 "
    ):
        ns.infer_groups(*extra, rule=0.2)
    with pytest.raises(ValueError, match=r"there may be no shortcut that is simpler than the class.*rule=0.05"):
        ns.infer_groups(torch.arange(20.0), torch.zeros(20).long())


def test_of_a_class_of_two_no_blindness_is_inferred() -> None:
    scores, targets = outliers(1)
    for count, warned in ((1, False), (2, False), (3, True)):
        more = torch.cat([scores, torch.ones(count).double()]), torch.cat([targets, torch.full((count,), 9)])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="class 9 has 0 examples that are fragile"):
                ns.infer_groups(*more)
        assert [str(warning.message)[:37] for warning in said] == ["the scores of class 9 are constant: t"] * warned


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_constant_scores_are_warned_of(noise: float) -> None:
    scores, targets = outliers(1)
    scores[targets == 7] = 2 + noise * torch.arange(44).double() / 44
    with (
        pytest.warns(UserWarning, match="the scores of class 7 are constant: the edit left nothing of the input"),
        pytest.raises(ValueError, match="class 7 has 0 examples that are fragile"),
    ):
        ns.infer_groups(scores, targets)


@pytest.mark.parametrize(
    ("scores", "targets", "rule", "error", "message"),
    [
        (
            torch.zeros(3, 1),
            torch.zeros(3).long(),
            "tukey",
            ValueError,
            r"one score per example, shape \(N,\), not \(3, 1\)",
        ),
        (torch.zeros(0), torch.zeros(0).long(), "tukey", ValueError, r"shape \(N,\), not \(0,\)"),
        (torch.zeros(3), torch.zeros(4).long(), "tukey", ValueError, r"need targets of shape \(3,\), not \(4,\)"),
        (torch.zeros(3), torch.zeros(3), "tukey", TypeError, "class indices"),
        (
            torch.tensor([0.0, float("nan")]),
            torch.zeros(2).long(),
            "tukey",
            ValueError,
            "1 of 2 values of the fragility",
        ),
        (torch.zeros(3), torch.zeros(3).long(), "otsu", ValueError, "'tukey' or a share.*not 'otsu'"),
        (torch.zeros(3), torch.zeros(3).long(), 1.0, ValueError, r"in \(0, 1\), not 1.0"),
        (torch.zeros(3), torch.zeros(3).long(), 5, ValueError, r"in \(0, 1\), not 5"),
    ],
)
def test_infer_groups_refuses(scores: Tensor, targets: Tensor, rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ns.infer_groups(scores, targets, rule)


def test_groups_print_as_a_small_table() -> None:
    scores, targets = outliers(2)
    found = ns.infer_groups(scores, targets)
    assert repr(found).splitlines()[0] == "InferredGroups of 88 examples, 8 fragile"
    assert repr(found).splitlines()[1].startswith("  class 3: 4 of 44 fragile (above ")
    many = ns.infer_groups(scores[targets == 3].repeat(30), torch.arange(30).repeat_interleave(44))
    assert len(repr(many).splitlines()) == 20
    assert repr(many).splitlines()[-1] == "  ... and 12 more"


def test_inputs_are_not_changed() -> None:
    values, targets = draw(3, 12, 0)
    scores, classes = outliers(3)
    copies = [tensor.clone() for tensor in (values, targets, scores, classes)]
    ns.fragility(values, targets)
    ns.infer_groups(scores, classes)
    assert all(torch.equal(a, b) for a, b in zip(copies, (values, targets, scores, classes), strict=True))


# --- from end to end ------------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """The skip reads the background (features 0, 1); the branch knows two marks (2, 3) that overrule it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear([[0, 0, 1, 0], [0, 0, 0, 1]]), linear([[3, -3], [-3, 3], [0, 0], [0, 0]])
        self.head = linear([[1, -1, 0, 0], [-1, 1, 0, 0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.outer(self.inner(x).relu()))  # type: ignore[no-any-return]


def birds() -> tuple[Tensor, Tensor, Tensor]:
    """Features, classes and true groups of 132 examples of which 12 contradict their background."""
    bright = [(0,)] * 60 + [(1, 2)] * 6 + [(0, 3)] * 6 + [(1,)] * 60
    features = torch.zeros(132, 4)
    features[:, :2] = 0.1 * torch.randn(132, 2)
    for row, marks in zip(features, bright, strict=True):
        row[list(marks)] += 1
    groups = torch.tensor([0] * 60 + [1] * 6 + [2] * 6 + [3] * 60)
    return features, groups // 2, groups


def test_the_cut_finds_who_is_remembered_and_gives_a_validation_metric() -> None:
    model = Shortcut()
    features, labels, groups = birds()
    branch = ns.residual_branches(model, (features, labels))[-1]
    cut = ns.zero_out(ns.select(ns.find_layout(model), {branch.layer: ...}))
    result = ns.sweep(model, {"cut": cut}, [(features, labels)], metric=ns.margin)
    inferred = ns.infer_groups(ns.fragility(result, labels), labels)
    minority = (groups == 1) | (groups == 2)
    assert result.values().min() > 0
    assert inferred.fragile[minority].all()
    assert int(inferred.fragile[~minority].sum()) <= 2
    shallow = ns.apply(cut, model)
    found = ns.evaluate(shallow, [(features, labels, inferred.groups)])
    right = (shallow(features).argmax(1) == labels).double()
    for group in range(4):
        assert found[group] == pytest.approx(float(right[inferred.groups == group].mean()))
    assert found.worst < 0.3 < 0.95 < min(found[0], found[2])
