"""Tiny models as data: what to build, what to feed it, and the neurons that must be found in it.

`layers` is written from the architecture, by hand; nothing in this file looks for neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations

SIZES = (4, 3, 1)
GROUPS = (0, 1, 0, 2, 3, 1, 0, 2)  # repeated along the stream: with SIZES no batch holds all four
CLASSES = 3
VOCABULARY = 30
SMALL, LARGE = (3, 8, 8), (3, 32, 32)  # images


class Rows(NamedTuple):
    """The neurons of one parameter: `count` slices of `row_shape` along `axis`.

    `groups` is that of a grouped transposed convolution, whose channel c is slice c % (count / groups) of the block
    c // (count / groups) along axis 0. It is 1 everywhere else.
    """

    axis: int
    count: int
    row_shape: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        build: `build(seed=0)` gives a fresh float32 model in training mode, as `nn.Module` leaves it.
        batches: `batches(seed=0, sizes=SIZES)` gives a list of batches; each carries targets and groups.
        layers: plain name of a parameter -> its neurons, in the order of `named_parameters()`.
            It lists all of the default layout.
        layer_count: its layers, counted by hand.
        neuron_count: its neurons (M), counted by hand.
        causal: whether logits and labels are those of a causal language model, one position apart.
        tokens: whether the inputs are integers (they cannot be perturbed or cast).
    """

    name: str
    build: Callable[..., nn.Module]
    batches: Callable[..., list[Any]]
    layers: dict[str, Rows]
    layer_count: int
    neuron_count: int
    causal: bool = False
    tokens: bool = False

    @property
    def axes(self) -> dict[str, tuple[int, int]]:
        """(axis, groups) of every listed layer: what `reference.py` asks for."""
        return {name: (rows.axis, rows.groups) for name, rows in self.layers.items()}


# --- building -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Move everything off the start values that hide bugs: zero biases, unit norms, 1e-6 scales, faint weights."""
    for parameter in model.parameters():
        if sum(size > 1 for size in parameter.shape) <= 1:
            faint = bool(parameter.abs().max() < 1e-3)
            parameter.copy_((0 if faint else parameter) + (0.3 if faint else 0.1) * torch.randn(parameter.shape))
        elif parameter.std() < 0.8 / math.sqrt(parameter[0].numel()):
            parameter.normal_(0, 1.4 / math.sqrt(parameter[0].numel()))


@torch.no_grad()
def calibrate(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Running statistics near those of the data, and logits of order one.

    With statistics of (0, 1) a deep network shrinks to nothing. They are not those of the data to the last bit either.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(torch.randn(64, *shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.25 * norm.running_var.mean())  # a channel that was dead here may wake later
        norm.running_mean.add_(0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features))
        norm.running_var.mul_(0.5 + torch.rand(norm.num_features))
    spread = model.eval()(torch.randn(8, *shape)).std()
    if spread > 1:  # losses of hundreds have gradients of zero
        list(model.parameters())[-2].div_(spread)
    model.train()


def fresh(make: Callable[[], nn.Module], shape: tuple[int, ...] | None = None) -> Callable[..., nn.Module]:
    """`build(seed=0)` from a function without arguments; the global RNG is as it was afterwards.

    `shape` is that of one example, for models with batch or spectral normalisation.
    """

    def build(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            model = make()
            settle(model)
            if shape is not None:
                calibrate(model, shape)
        return model

    return build


# --- batches --------------------------------------------------------------------------------------------------------

Draw = Callable[[Generator, int], tuple[Any, Tensor]]


def stream(draw: Draw) -> Callable[..., list[Any]]:
    """`batches(seed, sizes)` from `draw(generator, n) -> inputs, targets`, as (inputs, targets, groups)."""

    def batches(seed: int = 0, sizes: Sequence[int] = SIZES) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        made: list[Any] = []
        start = 0
        for size in sizes:
            groups = torch.tensor([GROUPS[i % len(GROUPS)] for i in range(start, start + size)])
            made.append((*draw(generator, size), groups))
            start += size
        return made

    return batches


def hf_stream(draw: Draw) -> Callable[..., list[Any]]:
    """The same as mappings: the model's keyword arguments beside `labels` and `groups`."""

    def batches(seed: int = 0, sizes: Sequence[int] = SIZES) -> list[Any]:
        return [{**inputs, "labels": labels, "groups": groups} for inputs, labels, groups in tuples(seed, sizes)]

    tuples = stream(draw)
    return batches


def classes(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=generator)


def dense(*shape: int) -> Draw:
    """Normal inputs of `shape` per example, with class targets."""
    return lambda generator, n: (torch.randn(n, *shape, generator=generator), classes(generator, n))


def dense_tuple(*shapes: tuple[int, ...]) -> Draw:
    """Several positional inputs per example, with class targets."""
    return lambda generator, n: (
        tuple(torch.randn(n, *shape, generator=generator) for shape in shapes),
        classes(generator, n),
    )


def soft(generator: Generator, n: int) -> tuple[Tensor, Tensor]:
    """Probabilities as targets."""
    logits = torch.randn(n, CLASSES, generator=generator)
    return torch.randn(n, 5, generator=generator), logits.softmax(1)


def pixels(generator: Generator, n: int) -> tuple[Tensor, Tensor]:
    """Images with a class per pixel; some pixels are ignored."""
    targets = classes(generator, n, 8, 8)
    targets[:, 0, :3] = -100
    return torch.randn(n, 3, 8, 8, generator=generator), targets


def ragged(generator: Generator, n: int) -> tuple[Tensor, Tensor]:
    """Token sequences whose common length differs from batch to batch."""
    return torch.randint(11, (n, 4 + n % 3), generator=generator), classes(generator, n)


def next_tokens(generator: Generator, n: int) -> tuple[Tensor, Tensor]:
    """Tokens with a target per token; a different number of them is ignored in each example."""
    targets = torch.randint(11, (n, 6), generator=generator)
    for i in range(n):
        targets[i, : i % 3] = -100
    return torch.randint(11, (n, 6), generator=generator), targets


def keyword(generator: Generator, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """Keyword inputs; `table` belongs to the whole batch (7 rows: take no batch of 7)."""
    inputs = {"x": torch.randn(n, 5, generator=generator), "table": torch.randn(7, 5, generator=generator)}
    return inputs, classes(generator, n)


def text(generator: Generator, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids from 3 up, padded at the right by token 0 to different lengths."""
    ids = torch.randint(3, VOCABULARY, (n, 8), generator=generator)
    mask = torch.ones(n, 8, dtype=torch.long)
    for i in range(n):
        mask[i, 8 - 2 * (i % 3) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}, classes(generator, n)


def text_itself(generator: Generator, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """Text whose labels are its own tokens, -100 where it is padded."""
    inputs, _ = text(generator, n)
    return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


# --- hand-made models -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two residual blocks, the last normalisation of each zero at the start as trained networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.a1, self.a2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.abn1, self.abn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.b1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.b2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bbn1, self.bbn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.fc = nn.Linear(8, CLASSES)
        nn.init.zeros_(self.abn2.weight)
        nn.init.zeros_(self.bbn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.abn2(self.a2(self.abn1(self.a1(x)).relu()))).relu()
        x = (self.down(x) + self.bbn2(self.b2(self.bbn1(self.b1(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """One step down, one transposed convolution up, a skip connection, logits per pixel."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
        self.merge = nn.Conv2d(12, 6, 3, padding=1)
        self.out = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.bn(self.down(x)).relu()
        x = self.middle(nn.functional.max_pool2d(skip, 2)).relu()
        x = self.merge(torch.cat([self.up(x), skip], 1)).relu()
        return self.out(x)


class Recurrent(nn.Module):
    """A recurrent module over a sequence, the mean of its outputs, a head; token ids are embedded first."""

    def __init__(self, rnn: nn.RNNBase, width: int, tokens: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5) if tokens else nn.Identity()
        self.rnn = rnn
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(self.embed(x))
        return self.fc(outputs.mean(1))


class Cell(nn.Module):
    """A GRU cell stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state)


class Tied(nn.Module):
    """Token logits from a head that is the embedding; either of the two may be registered first."""

    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        head, embed = nn.Linear(6, 11, bias=False), nn.Embedding(11, 6)
        if head_first:
            self.head, self.embed = head, embed
        else:
            self.embed, self.head = embed, head
        self.body = nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).tanh())


class SharedModule(nn.Module):
    """One Linear under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).tanh()).tanh())


class SharedParameter(nn.Module):
    """Two Linears with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).tanh()).tanh())


class Attention(nn.Module):
    """Self-attention, the mean over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


class CrossAttention(nn.Module):
    """Attention with keys and values of other widths (three projections instead of one) and extra key, value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=7, add_bias_kv=True, batch_first=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fc(self.attention(query, key, value)[0].mean(1))


class Encoder(nn.Module):
    """torch's own transformer encoder, which has a fused path of its own where no gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


class TwoInputs(nn.Module):
    """A bilinear form of two inputs; the logits are the first of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 5, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.form(left, right).tanh()
        return self.fc(hidden), hidden


class Keyword(nn.Module):
    """Keyword inputs, of which `table` is not per example; the logits come in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(5, 5)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, *, x: Tensor, table: Tensor) -> dict[str, Tensor]:
        weights = (self.look(x) @ table.T).softmax(1)
        return {"logits": self.fc(weights @ table)}


class Custom(nn.Module):
    """Parameters of its own: a matrix and stacked experts are layers; what is 1-D but for ones, or a table, is not."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 5))
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(1, 6))
        self.column = nn.Parameter(torch.ones(6, 1))
        self.basis = nn.Parameter(torch.randn(1, 6, 6))
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.position_bias_table = nn.Parameter(torch.randn(3, 4))
        self.cls_token = nn.Parameter(torch.randn(2, 4))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.mix.T * self.scale + self.shift) * self.column.T
        x = (x @ self.basis[0]).tanh()
        x = torch.einsum("eoi,ni->neo", self.experts, x) + self.position_bias_table
        return self.fc(x.tanh().mean(1) + self.cls_token.sum(0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7).requires_grad_(False), nn.Tanh(), nn.Linear(7, CLASSES))


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """An MLP whose weights are parametrized already."""
    return nn.Sequential(norm(nn.Linear(5, 7)), nn.Tanh(), norm(nn.Linear(7, CLASSES)))


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)),
    )


def norm_dropout() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten()),
        *(nn.Linear(54, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, CLASSES)),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 5, 2, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, CLASSES)),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, CLASSES)),
    )


# --- models of others (imported when they are built: transformers alone takes seconds) ------------------------------


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def resnext() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=4, width_per_group=4)


def mobilenet() -> nn.Module:
    """MobileNetV3 with four blocks: at full depth and random weights, float32 is not enough for a comparison."""
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1),
        InvertedResidualConfig(8, 3, 24, 16, False, "RE", 1, 1, 1),
        InvertedResidualConfig(16, 5, 32, 16, True, "HS", 1, 1, 1),
        InvertedResidualConfig(16, 5, 48, 16, True, "HS", 2, 1, 1),
    ]
    return MobileNetV3(blocks, last_channel=40, num_classes=CLASSES)


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES, init_values=1e-6
    )


def vit_torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=CLASSES
    )


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=CLASSES
    )


def swin_torchvision() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=CLASSES)


def convnext_torchvision() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def gpt2(head: str) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: nn.Module = getattr(transformers, head)(config)
    return model


# --- what must be found in them -------------------------------------------------------------------------------------


def out(count: int, *row_shape: int) -> Rows:
    """The usual parameter: the output axis comes first."""
    return Rows(0, count, row_shape)


def residual_layers() -> dict[str, Rows]:
    return {
        "stem.weight": out(6, 3, 3, 3),
        "a1.weight": out(6, 6, 3, 3),
        "a2.weight": out(6, 6, 3, 3),
        "b1.weight": out(8, 6, 3, 3),
        "b2.weight": out(8, 8, 3, 3),
        "down.weight": out(8, 6, 1, 1),
        "fc.weight": out(3, 8),
    }


def unet_layers(up: Rows) -> dict[str, Rows]:
    return {
        "down.weight": out(6, 3, 3, 3),
        "middle.weight": out(8, 6, 3, 3),
        "up.weight": up,
        "merge.weight": out(6, 12, 3, 3),
        "out.weight": out(3, 6, 1, 1),
    }


def resnet18_layers() -> dict[str, Rows]:
    layers = {"conv1.weight": out(64, 3, 7, 7)}
    for stage, before, width in [(1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512)]:
        layers[f"layer{stage}.0.conv1.weight"] = out(width, before, 3, 3)
        layers[f"layer{stage}.0.conv2.weight"] = out(width, width, 3, 3)
        if stage > 1:
            layers[f"layer{stage}.0.downsample.0.weight"] = out(width, before, 1, 1)
        layers[f"layer{stage}.1.conv1.weight"] = out(width, width, 3, 3)
        layers[f"layer{stage}.1.conv2.weight"] = out(width, width, 3, 3)
    return layers | {"fc.weight": out(3, 512)}


def resnext_layers() -> dict[str, Rows]:
    layers = {"conv1.weight": out(64, 3, 7, 7)}
    for stage, before, width, after in [(1, 64, 16, 256), (2, 256, 32, 512), (3, 512, 64, 1024), (4, 1024, 128, 2048)]:
        layers[f"layer{stage}.0.conv1.weight"] = out(width, before, 1, 1)
        layers[f"layer{stage}.0.conv2.weight"] = out(width, width // 4, 3, 3)
        layers[f"layer{stage}.0.conv3.weight"] = out(after, width, 1, 1)
        layers[f"layer{stage}.0.downsample.0.weight"] = out(after, before, 1, 1)
    return layers | {"fc.weight": out(3, 2048)}


def mobilenet_layers() -> dict[str, Rows]:
    """Expansion, depthwise convolution, squeeze and excitation (to a multiple of 8), projection."""
    return {
        "features.0.0.weight": out(8, 3, 3, 3),
        "features.1.block.0.0.weight": out(8, 1, 3, 3),
        "features.1.block.1.fc1.weight": out(8, 8, 1, 1),
        "features.1.block.1.fc2.weight": out(8, 8, 1, 1),
        "features.1.block.2.0.weight": out(8, 8, 1, 1),
        "features.2.block.0.0.weight": out(24, 8, 1, 1),
        "features.2.block.1.0.weight": out(24, 1, 3, 3),
        "features.2.block.2.0.weight": out(16, 24, 1, 1),
        "features.3.block.0.0.weight": out(32, 16, 1, 1),
        "features.3.block.1.0.weight": out(32, 1, 5, 5),
        "features.3.block.2.fc1.weight": out(8, 32, 1, 1),
        "features.3.block.2.fc2.weight": out(32, 8, 1, 1),
        "features.3.block.3.0.weight": out(16, 32, 1, 1),
        "features.4.block.0.0.weight": out(48, 16, 1, 1),
        "features.4.block.1.0.weight": out(48, 1, 5, 5),
        "features.4.block.2.fc1.weight": out(16, 48, 1, 1),
        "features.4.block.2.fc2.weight": out(48, 16, 1, 1),
        "features.4.block.3.0.weight": out(16, 48, 1, 1),
        "features.5.0.weight": out(96, 16, 1, 1),
        "classifier.0.weight": out(40, 96),
        "classifier.3.weight": out(3, 40),
    }


def transformer_block(prefix: str, names: Sequence[str], width: int, hidden: int) -> dict[str, Rows]:
    """The four weights of a pre- or post-norm block: queries, keys, values in one; projection; up; down."""
    shapes = [out(3 * width, width), out(width, width), out(hidden, width), out(width, hidden)]
    return {f"{prefix}.{name}": rows for name, rows in zip(names, shapes, strict=True)}


TIMM_BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
TORCHVISION_SWIN_BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.0.weight", "mlp.3.weight")
TORCHVISION_VIT_BLOCK = (
    "self_attention.in_proj_weight",
    "self_attention.out_proj.weight",
    "mlp.0.weight",
    "mlp.3.weight",
)
TORCH_BLOCK = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")


def vit_layers() -> dict[str, Rows]:
    return {
        "patch_embed.proj.weight": out(24, 3, 4, 4),
        **transformer_block("blocks.0", TIMM_BLOCK, 24, 96),
        **transformer_block("blocks.1", TIMM_BLOCK, 24, 96),
        "head.weight": out(3, 24),
    }


def vit_torchvision_layers() -> dict[str, Rows]:
    return {
        "conv_proj.weight": out(24, 3, 4, 4),
        **transformer_block("encoder.layers.encoder_layer_0", TORCHVISION_VIT_BLOCK, 24, 48),
        **transformer_block("encoder.layers.encoder_layer_1", TORCHVISION_VIT_BLOCK, 24, 48),
        "heads.head.weight": out(3, 24),
    }


def swin_layers() -> dict[str, Rows]:
    return {
        "patch_embed.proj.weight": out(12, 3, 4, 4),
        **transformer_block("layers.0.blocks.0", TIMM_BLOCK, 12, 48),
        **transformer_block("layers.0.blocks.1", TIMM_BLOCK, 12, 48),
        "layers.1.downsample.reduction.weight": out(24, 48),
        **transformer_block("layers.1.blocks.0", TIMM_BLOCK, 24, 96),
        **transformer_block("layers.1.blocks.1", TIMM_BLOCK, 24, 96),
        "head.fc.weight": out(3, 24),
    }


def swin_torchvision_layers() -> dict[str, Rows]:
    return {
        "features.0.0.weight": out(12, 3, 4, 4),
        **transformer_block("features.1.0", TORCHVISION_SWIN_BLOCK, 12, 48),
        **transformer_block("features.1.1", TORCHVISION_SWIN_BLOCK, 12, 48),
        "features.2.reduction.weight": out(24, 48),
        **transformer_block("features.3.0", TORCHVISION_SWIN_BLOCK, 24, 96),
        **transformer_block("features.3.1", TORCHVISION_SWIN_BLOCK, 24, 96),
        "head.weight": out(3, 24),
    }


def encoder_layers() -> dict[str, Rows]:
    return {
        **transformer_block("encoder.layers.0", TORCH_BLOCK, 8, 16),
        **transformer_block("encoder.layers.1", TORCH_BLOCK, 8, 16),
        "fc.weight": out(3, 8),
    }


def convnext_layers() -> dict[str, Rows]:
    layers = {"stem.0.weight": out(8, 3, 4, 4)}
    for stage, before, width, depth in [(0, 3, 8, 1), (1, 8, 12, 1), (2, 12, 16, 2), (3, 16, 24, 1)]:
        if stage > 0:
            layers[f"stages.{stage}.downsample.1.weight"] = out(width, before, 2, 2)
        for block in range(depth):
            layers[f"stages.{stage}.blocks.{block}.conv_dw.weight"] = out(width, 1, 7, 7)
            layers[f"stages.{stage}.blocks.{block}.mlp.fc1.weight"] = out(4 * width, width)
            layers[f"stages.{stage}.blocks.{block}.mlp.fc2.weight"] = out(width, 4 * width)
    return layers | {"head.fc.weight": out(3, 24)}


def convnext_torchvision_layers() -> dict[str, Rows]:
    return {  # layer_scale is (8, 1, 1): no layer
        "features.0.0.weight": out(8, 3, 4, 4),
        "features.1.0.block.0.weight": out(8, 1, 7, 7),
        "features.1.0.block.3.weight": out(32, 8),
        "features.1.0.block.5.weight": out(8, 32),
        "features.2.1.weight": out(12, 8, 2, 2),
        "features.3.0.block.0.weight": out(12, 1, 7, 7),
        "features.3.0.block.3.weight": out(48, 12),
        "features.3.0.block.5.weight": out(12, 48),
        "classifier.2.weight": out(3, 12),
    }


def bert_layers() -> dict[str, Rows]:
    layers = {}
    for i in range(2):
        prefix = f"bert.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            layers[f"{prefix}.attention.{name}.weight"] = out(16, 16)
        layers[f"{prefix}.intermediate.dense.weight"] = out(24, 16)
        layers[f"{prefix}.output.dense.weight"] = out(16, 24)
    return layers | {"bert.pooler.dense.weight": out(16, 16), "classifier.weight": out(3, 16)}


def gpt2_layers() -> dict[str, Rows]:
    layers = {}
    for i in range(2):  # Conv1D keeps its weight as (in, out)
        layers[f"transformer.h.{i}.attn.c_attn.weight"] = Rows(1, 48, (16,))
        layers[f"transformer.h.{i}.attn.c_proj.weight"] = Rows(1, 16, (16,))
        layers[f"transformer.h.{i}.mlp.c_fc.weight"] = Rows(1, 64, (16,))
        layers[f"transformer.h.{i}.mlp.c_proj.weight"] = Rows(1, 16, (64,))
    return layers


MLP_LAYERS = {"0.weight": out(7, 5), "2.weight": out(3, 7)}
LSTM_LAYERS = {
    "rnn.weight_ih_l0": out(24, 5),
    "rnn.weight_hh_l0": out(24, 6),
    "rnn.weight_ih_l0_reverse": out(24, 5),
    "rnn.weight_hh_l0_reverse": out(24, 6),
    "fc.weight": out(3, 12),
}
LSTM_PROJECTED_LAYERS = {
    "rnn.weight_ih_l0": out(24, 5),
    "rnn.weight_hh_l0": out(24, 4),
    "rnn.weight_hr_l0": out(4, 6),
    "rnn.weight_ih_l1": out(24, 4),
    "rnn.weight_hh_l1": out(24, 4),
    "rnn.weight_hr_l1": out(4, 6),
    "fc.weight": out(3, 4),
}
GRU_LAYERS = {"rnn.weight_ih_l0": out(18, 5), "rnn.weight_hh_l0": out(18, 6), "fc.weight": out(3, 6)}
CELL_LAYERS = {"cell.weight_ih": out(18, 5), "cell.weight_hh": out(18, 6), "fc.weight": out(3, 6)}
ATTENTION_LAYERS = {
    "attention.in_proj_weight": out(24, 8),
    "attention.out_proj.weight": out(8, 8),
    "fc.weight": out(3, 8),
}
CROSS_ATTENTION_LAYERS = {
    "attention.q_proj_weight": out(8, 8),
    "attention.k_proj_weight": out(8, 5),
    "attention.v_proj_weight": out(8, 7),
    "attention.out_proj.weight": out(8, 8),
    "fc.weight": out(3, 8),
}
GROUPED_LAYERS = {
    "0.weight": out(8, 3, 3, 3),
    "3.weight": out(12, 2, 3, 3),
    "5.weight": out(12, 1, 3, 3),
    "9.weight": out(3, 12),
}
NORM_DROPOUT_LAYERS = {"0.weight": out(6, 3, 3, 3), "5.weight": out(10, 54), "9.weight": out(3, 10)}
CONV1D_LAYERS = {"0.weight": out(6, 4, 3), "2.weight": Rows(1, 5, (6, 2)), "6.weight": out(3, 5)}
CONV3D_LAYERS = {"0.weight": out(4, 2, 3, 3, 3), "3.weight": Rows(1, 3, (4, 2, 2, 2)), "7.weight": out(3, 3)}
CUSTOM_LAYERS = {"mix": out(6, 5), "experts": out(3, 4, 6), "fc.weight": out(3, 4)}
SHARED_LAYERS = {"first.weight": out(5, 5), "fc.weight": out(3, 5)}

FLAT = stream(dense(5))
SEQUENCE = stream(dense(6, 5))
IMAGE = stream(dense(*LARGE))
SMALL_IMAGE = stream(dense(*SMALL))


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM(5, 6, batch_first=True, bidirectional=True), 12)


def lstm_projected() -> nn.Module:
    return Recurrent(nn.LSTM(5, 6, num_layers=2, proj_size=4, batch_first=True), 4)


def gru() -> nn.Module:
    return Recurrent(nn.GRU(5, 6, batch_first=True), 6, tokens=True)


def small_cases() -> list[Case]:
    """Hand-made models, complete to the last neuron."""
    grouped_up, plain_up = Rows(1, 6, (4, 2, 2), groups=2), Rows(1, 6, (8, 2, 2))
    bilinear = {"form.weight": out(6, 4, 5), "fc.weight": out(3, 6)}
    look = {"look.weight": out(5, 5), "fc.weight": out(3, 5)}
    body = {"body.weight": out(6, 6)}
    tokens = stream(next_tokens)
    return [
        Case("linear", fresh(lambda: nn.Linear(5, CLASSES)), FLAT, {"weight": out(3, 5)}, 1, 3),
        Case("mlp", fresh(mlp), FLAT, MLP_LAYERS, 2, 10),
        Case("mlp_soft_targets", fresh(mlp), stream(soft), MLP_LAYERS, 2, 10),
        Case("mlp_frozen", fresh(frozen), FLAT, MLP_LAYERS, 2, 10),
        Case("residual", fresh(Residual, SMALL), SMALL_IMAGE, residual_layers(), 7, 45),
        Case("grouped", fresh(grouped, SMALL), SMALL_IMAGE, GROUPED_LAYERS, 4, 35),
        Case("norm_dropout", fresh(norm_dropout, SMALL), SMALL_IMAGE, NORM_DROPOUT_LAYERS, 3, 19),
        Case("conv1d", fresh(conv1d), stream(dense(4, 9)), CONV1D_LAYERS, 3, 14),
        Case("conv3d", fresh(conv3d), stream(dense(2, 4, 4, 4)), CONV3D_LAYERS, 3, 10),
        Case("unet", fresh(UNet, SMALL), stream(pixels), unet_layers(plain_up), 5, 29),
        Case("unet_grouped", fresh(lambda: UNet(groups=2), SMALL), stream(pixels), unet_layers(grouped_up), 5, 29),
        Case("lstm", fresh(lstm), SEQUENCE, LSTM_LAYERS, 5, 99),
        Case("lstm_projected", fresh(lstm_projected), SEQUENCE, LSTM_PROJECTED_LAYERS, 7, 107),
        Case("gru", fresh(gru), stream(ragged), GRU_LAYERS, 3, 39, tokens=True),
        Case("gru_cell", fresh(Cell), SEQUENCE, CELL_LAYERS, 3, 39),
        Case("tied", fresh(Tied), tokens, body, 1, 6, tokens=True),
        Case("tied_head_first", fresh(lambda: Tied(head_first=True)), tokens, body, 1, 6, tokens=True),
        Case("shared_module", fresh(SharedModule), FLAT, SHARED_LAYERS, 2, 8),
        Case("shared_parameter", fresh(SharedParameter), FLAT, SHARED_LAYERS, 2, 8),
        Case("attention", fresh(Attention), stream(dense(6, 8)), ATTENTION_LAYERS, 3, 35),
        Case("cross_attention", fresh(CrossAttention), CROSS, CROSS_ATTENTION_LAYERS, 5, 35),
        Case("encoder", fresh(Encoder), stream(dense(6, 8)), encoder_layers(), 9, 115),
        Case("bilinear", fresh(TwoInputs), stream(dense_tuple((4,), (5,))), bilinear, 2, 9),
        Case("keyword", fresh(Keyword), stream(keyword), look, 2, 8),
        Case("custom", fresh(Custom), FLAT, CUSTOM_LAYERS, 3, 12),
        Case("weight_norm", fresh(lambda: normed(parametrizations.weight_norm)), FLAT, MLP_LAYERS, 2, 10),
        Case("spectral_norm", fresh(lambda: normed(parametrizations.spectral_norm), (5,)), FLAT, MLP_LAYERS, 2, 10),
    ]


def large_cases() -> list[Case]:
    """Models of torchvision, timm and transformers, as small as their code allows."""
    patches = stream(dense(3, 16, 16))
    score = gpt2_layers() | {"score.weight": out(3, 16)}
    gpt2_classifier = fresh(partial(gpt2, "GPT2ForSequenceClassification"))
    gpt2_lm = fresh(partial(gpt2, "GPT2LMHeadModel"))
    return [
        Case("resnet18", fresh(resnet18, LARGE), IMAGE, resnet18_layers(), 21, 4803),
        Case("resnext", fresh(resnext, LARGE), IMAGE, resnext_layers(), 18, 8227),
        Case("mobilenet", fresh(mobilenet, LARGE), IMAGE, mobilenet_layers(), 21, 539),
        Case("vit", fresh(vit), patches, vit_layers(), 10, 459),
        Case("vit_torchvision", fresh(vit_torchvision), patches, vit_torchvision_layers(), 10, 363),
        Case("swin", fresh(swin), IMAGE, swin_layers(), 19, 687),
        Case("swin_torchvision", fresh(swin_torchvision), IMAGE, swin_torchvision_layers(), 19, 687),
        Case("convnext", fresh(convnext), IMAGE, convnext_layers(), 20, 519),
        Case("convnext_torchvision", fresh(convnext_torchvision), IMAGE, convnext_torchvision_layers(), 9, 143),
        Case("bert", fresh(bert), hf_stream(text), bert_layers(), 14, 227, tokens=True),
        Case("gpt2", gpt2_classifier, hf_stream(text), score, 9, 291, tokens=True),
        Case("gpt2_lm", gpt2_lm, hf_stream(text_itself), gpt2_layers(), 8, 288, causal=True, tokens=True),
    ]


CROSS = stream(dense_tuple((4, 8), (6, 5), (6, 7)))
SMALL_CASES: dict[str, Case] = {case.name: case for case in small_cases()}
LARGE_CASES: dict[str, Case] = {case.name: case for case in large_cases()}
CASES = SMALL_CASES | LARGE_CASES
FAST: tuple[str, ...] = (
    "mlp",
    "residual",
    "grouped",
    "unet",
    "lstm",
    "tied",
    "shared_parameter",
    "attention",
    "bilinear",
    "custom",
    "weight_norm",
)

large = [pytest.param(case, marks=pytest.mark.architectures) for case in LARGE_CASES.values()]
every_case = pytest.mark.parametrize("case", [*SMALL_CASES.values(), *large], ids=CASES)


def marked(names: Iterable[str]) -> list[Any]:
    """Names of cases for `parametrize`; those of large ones, and of what is no case, belong to their tier."""
    tier = pytest.mark.architectures
    return [pytest.param(name, marks=() if name in SMALL_CASES else tier, id=name) for name in names]


def tiered(*names: str) -> Any:
    """Every small case; those that are not named belong to the tier of architectures: each of them is captured."""
    tier = pytest.mark.architectures
    every = [pytest.param(case, marks=() if name in names else tier, id=name) for name, case in SMALL_CASES.items()]
    return pytest.mark.parametrize("case", every)


small_case = pytest.mark.parametrize("case", SMALL_CASES.values(), ids=SMALL_CASES)
fast_case = pytest.mark.parametrize("case", [CASES[name] for name in FAST], ids=FAST)
