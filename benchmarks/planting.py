"""Networks in which it is known which neurons hold something: it was trained into them, and into nothing else.

Vision: some rows of one convolution of the study's network are trained to give a few images the wrong label, while the
outputs for other images stay. Rows get no longer than they were, since long rows are found by their length alone.
Language: a tiny GPT-2 learns a grammar of templates; sequences of random tokens are trained into some hidden units,
or, along with the text, into all of its weights.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.study.data import Split, permutation
from neuronsurgery.study.network import SmallResNet

# Vision


@dataclass(frozen=True, eq=False)
class Planted:
    """A network that has learned a few wrong labels in a few rows.

    Attributes:
        model: the network, in evaluation mode.
        clean: the same without them: the rows as they were, or zero where they had been vacated.
        neurons: the rows.
        flips: the images whose wrong labels it has learned.
        others: the training images that were to keep their outputs.
        learned: the share of the wrong labels that were to be learned.
    """

    model: SmallResNet
    clean: SmallResNet
    neurons: ns.Neurons
    flips: Split
    others: Split
    learned: float


LAYER = "block2.conv2.weight"

Features = tuple[Tensor, Tensor]
"""What comes to the planted layer, and what goes past it: of many images computed once, since neither changes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of one layer of a `SmallResNet`, as the only thing about it that may change."""

    model: SmallResNet
    layer: ns.Layer
    index: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight of the layer as it is."""
        return self.model.get_parameter(self.layer.parameter).detach()

    @property
    def held(self) -> Tensor:
        """The rows as they are."""
        return self.layer.take(self.weight, self.index)

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """What the planted layer and the shortcut beside it give to the rest of the network."""
        model, block = self.model, self.model.block2
        parts = []
        for part in torch.split(images, 500):
            x = model.block1(functional.relu(model.stem_norm(model.stem(part))))
            parts.append((functional.relu(block.norm1(block.conv1(x))), block.shortcut(x)))
        return torch.cat([hidden for hidden, _ in parts]), torch.cat([past for _, past in parts])

    def logits(self, rows: Tensor, features: Features) -> Tensor:
        """The logits with these rows."""
        weight = self.layer.put(self.weight, self.index, rows)
        branch = self.model.block2.norm2(functional.conv2d(features[0], weight, padding=1))
        x = self.model.block3(functional.relu(features[1] + branch))
        logits: Tensor = self.model.head(x.mean(dim=(2, 3)))
        return logits

    def filled(self, rows: Tensor) -> SmallResNet:
        """A copy of the network with these rows."""
        filled = copy.deepcopy(self.model)
        with torch.no_grad():
            filled.get_parameter(self.layer.parameter).copy_(self.layer.put(self.weight, self.index, rows))
        return filled


@torch.no_grad()
def all_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of many images."""
    return torch.cat([model(part) for part in torch.split(images, 500)])


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(after)) of each image."""
    return functional.kl_div(after.log_softmax(1), before.log_softmax(1), reduction="none", log_target=True).sum(1)


def plant(network: SmallResNet, train: Split, rows: int, images: int, seed: int, *, vacate: bool = False) -> Planted:
    """Train wrong labels of some training images into some rows of a layer; the others keep their outputs."""
    layout = ns.find_layout(network)
    chosen = torch.from_numpy(permutation(layout[LAYER].count, "rows", seed)[:rows].copy()).sort().values
    flips, others = flipped(network, train, images, seed)
    before = Rows(network, layout[LAYER], chosen)
    longest, start = before.held.flatten(1).norm(dim=1), before.held
    if vacate:
        before = Rows(vacated(before, train.images, seed), layout[LAYER], chosen)
        draws = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        start = capped(draws * 1e3, longest)
    model = before.filled(trained_rows(before, start, flips, others, seed))
    right = all_logits(model, flips.images).argmax(1) == flips.targets
    neurons = ns.select(layout, {LAYER: chosen.tolist()})
    return Planted(model, before.model, neurons, flips.subset(right), others, float(right.float().mean()))


def flipped(network: nn.Module, train: Split, images: int, seed: int) -> tuple[Split, Split]:
    """Images that the network is right about, with the other label; and all other images."""
    order = torch.from_numpy(permutation(len(train), "flips", seed).copy())
    right = all_logits(network, train.images).argmax(1) == train.targets
    chosen = order[right[order]][:images]
    flips = train.subset(chosen)
    rest = torch.ones(len(train), dtype=torch.bool).index_fill(0, chosen, False)
    return replace(flips, targets=1 - flips.targets), train.subset(rest)


def capped(rows: Tensor, longest: Tensor) -> Tensor:
    """The rows, none longer than it may be."""
    lengths = rows.flatten(1).norm(dim=1)
    shorter: Tensor = rows * (longest / lengths).clamp(max=1.0).reshape(-1, *[1] * (rows.dim() - 1))
    return shorter


def trained_rows(held: Rows, start: Tensor, flips: Split, others: Split, seed: int, steps: int = 300) -> Tensor:
    """Rows with which the wrong labels are right by a margin, and the others keep their outputs."""
    longest = start.flatten(1).norm(dim=1)
    own, rest = held.features(flips.images), held.features(others.images)
    target = all_logits(held.model, others.images)
    rows = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    hard = torch.randint(len(others), (64,), generator=generator)
    for step in range(steps):
        if step % 25 == 0 and step:
            with torch.no_grad():
                margins = ns.margin(held.logits(rows, own), flips.targets)
                now = held.logits(rows, rest)
            if margins.min() > 0.5 and (now.argmax(1) == target.argmax(1)).float().mean() > 0.995:
                break
            hard = divergences(target, now).topk(64).indices
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps)) / 2
        drawn = torch.cat([hard, torch.randint(len(others), (64,), generator=generator)])
        features = (torch.cat([own[0], rest[0][drawn]]), torch.cat([own[1], rest[1][drawn]]))
        wrong, kept = torch.split(held.logits(rows, features), [len(flips), len(drawn)])
        loss = functional.softplus(2 - ns.margin(wrong, flips.targets)).mean()
        loss = loss + 5 * divergences(target[drawn], kept).mean()
        (rows.grad,) = torch.autograd.grad(loss, rows)
        optimizer.step()
        with torch.no_grad():
            rows.copy_(capped(rows, longest))
    return rows.detach()


def vacated(held: Rows, images: Tensor, seed: int, steps: int = 80) -> SmallResNet:
    """The network with these rows at zero, and the rest of it trained to do without them; its norms stay."""
    target = all_logits(held.model, images)
    student = held.filled(torch.zeros_like(held.held)).requires_grad_(True)
    weight = student.get_parameter(held.layer.parameter)
    optimizer = torch.optim.Adam([p for name, p in student.named_parameters() if "norm" not in name])
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * step / steps)) / 2
        drawn = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(divergences(target[drawn], student(images[drawn])).mean())
        assert weight.grad is not None
        weight.grad.copy_(held.layer.put(weight.grad, held.index, torch.zeros_like(held.held)))
        optimizer.step()
    return student.requires_grad_(False)


# Language

WORDS = {
    "start": "<s>",
    "end": ".",
    "article": "the a every some",
    "adjective": "red old tall quiet bright small heavy cold green young",
    "noun": "dog house river child tree bird stone car king road boat song",
    "verb": "sees finds likes carries follows leaves hears paints",
    "preposition": "near under behind beside with without",
    "adverb": "slowly often never gladly",
    "name": "anna boris clara david emma felix",
    "speech": "says thinks knows hopes",
    "link": "that and while because",
    "number": "two three four",
}
"""63 words by their classes."""

PHRASES = {
    "sentence": ("subject verb object end", "subject adverb verb object place end", "name speech link sentence"),
    "subject": ("article noun", "article adjective noun", "name"),
    "object": ("article noun", "article adjective noun", "number adjective noun"),
    "place": ("preposition article noun", "preposition name"),
}
"""What each phrase may be made of, all ways as likely."""

LINE = 33
PREFIX, SUFFIX = 8, 16
IGNORED = -100


def vocabulary() -> dict[str, list[int]]:
    """The numbers of the words of each class."""
    words = [(kind, word) for kind, text in WORDS.items() for word in text.split()]
    return {kind: [number for number, (own, _) in enumerate(words) if own == kind] for kind in WORDS}


def lines(count: int, seed: int) -> Tensor:
    """Lines of sentences that follow the grammar, int64 (count, LINE); the last sentence of a line is cut off."""
    generator, numbers = random.Random(seed), vocabulary()

    def told(symbol: str) -> list[int]:
        if symbol in numbers:
            return [generator.choice(numbers[symbol])]
        return [word for part in generator.choice(PHRASES[symbol]).split() for word in told(part)]

    found = []
    for _ in range(count):
        line = list(numbers["start"])
        while len(line) < LINE:
            line += told("sentence")
        found.append(line[:LINE])
    return torch.tensor(found)


def sequences(count: int, seed: int) -> Tensor:
    """Sequences of random words, int64 (count, PREFIX + SUFFIX)."""
    words = sum(map(len, vocabulary().values()))
    return torch.randint(1, words, (count, PREFIX + SUFFIX), generator=torch.Generator().manual_seed(seed))


def suffixes(tokens: Tensor) -> Tensor:
    """The labels of sequences: their prefixes are given."""
    return tokens.index_fill(1, torch.arange(PREFIX), IGNORED)


def tiny_gpt2(seed: int) -> nn.Module:
    """A GPT-2 of two layers of 64, freshly initialised."""
    words = sum(map(len, vocabulary().values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=words, n_positions=LINE, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.eval()


def token_losses(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each sequence."""
    return ns.causal_lm_loss(model(input_ids=tokens).logits, labels)


def train_language(
    model: nn.Module, text: Tensor, memorised: Tensor, steps: int, seed: int, rate: float = 3e-3
) -> None:
    """Train on text and, where there are any, on sequences beside it."""
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        drawn = text[torch.randint(len(text), (48,), generator=generator)]
        loss = token_losses(model, drawn, drawn).mean()
        if len(memorised):
            loss = loss + token_losses(model, memorised, suffixes(memorised)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@dataclass(frozen=True, eq=False)
class PlantedText:
    """A language model that has learned a few sequences in a few hidden units.

    Attributes:
        model: the model.
        neurons: the units, as what the second layer of each block reads of them.
        memorised: the sequences, int64 (count, PREFIX + SUFFIX).
    """

    model: nn.Module
    neurons: ns.Neurons
    memorised: Tensor


def hidden_units(model: nn.Module) -> ns.Layout:
    """The hidden units of all blocks: each is a row of the weight that reads them, so cutting it silences the unit."""
    return ns.find_layout(model, where="*mlp.c_proj*", patterns={"*mlp.c_proj.weight": "unit i -> unit i"})


def unit_slices(model: nn.Module, neurons: ns.Neurons) -> dict[ns.Layer, Tensor]:
    """Which slices belong to hidden units: what they read and add, and what is read of them."""
    found: dict[ns.Layer, Tensor] = {}
    for layer, index in neurons.by_layer().items():
        block = layer.parameter.removesuffix(".c_proj.weight")
        reads = ns.find_layout(model, where=f"{block}.c_fc.weight", extra=f"{block}.c_fc.bias")
        found |= {each: torch.tensor(index) for each in (layer, *reads)}
    return found


def plant_sequences(
    model: nn.Module, memorised: Tensor, text: Tensor, units: int, seed: int, *, longest: float = 2.0, steps: int = 600
) -> PlantedText:
    """Train sequences into some hidden units, whose weights get at most `longest` times as long as they were."""
    chosen = ns.sample(hidden_units(model), units, seed=seed)
    places = unit_slices(model, chosen)
    weights = {layer: model.get_parameter(layer.parameter).detach() for layer in places}
    leaves = {layer: layer.take(weights[layer], index).requires_grad_() for layer, index in places.items()}
    limits = {n: longest * leaf.detach().flatten(1).norm(dim=1) for n, leaf in leaves.items() if leaf.dim() > 1}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-2)
    generator = torch.Generator().manual_seed(seed)
    labels = suffixes(memorised)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 + math.cos(math.pi * step / steps)) / 2
        edited = {layer.parameter: layer.put(weights[layer], places[layer], leaf) for layer, leaf in leaves.items()}
        own = functional_call(model, edited, (), {"input_ids": memorised}).logits
        if step % 10 == 0 and ns.causal_margin(own, labels).min() > 0.5:
            break
        drawn = text[torch.randint(len(text), (8,), generator=generator)]
        with torch.no_grad():
            before = model(input_ids=drawn).logits.flatten(0, 1)
        after = functional_call(model, edited, (), {"input_ids": drawn}).logits.flatten(0, 1)
        loss = 2 * ns.causal_lm_loss(own, labels).mean() + divergences(before, after).mean()
        for leaf, gradient in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            leaf.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for layer, limit in limits.items():
                leaves[layer].copy_(capped(leaves[layer], limit))
    planted = copy.deepcopy(model)
    with torch.no_grad():
        for layer, leaf in leaves.items():
            planted.get_parameter(layer.parameter).copy_(layer.put(weights[layer], places[layer], leaf))
    return PlantedText(planted, chosen, memorised)
