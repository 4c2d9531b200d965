"""Which selector finds the neurons that hold something? Here it is known which do, since it was trained into them.

Three tables, each of means over several plantings (see `planting.py`); all selectors get the same data and the same k:

- vision: rows of one convolution in which a few images have the wrong label, in three settings;
- planted language: hidden units in which a tiny GPT-2 recites two sequences;
- natural language: sequences that it memorised along with text, in whatever neurons they went to.

For each selector: the recall of the planted neurons, what cutting the chosen ones undoes, what that costs everybody
else on data that nobody has seen, and the seconds of processor time. Beside them stand selectors that know nothing of
what was planted: random neurons, long ones, and those in which the *other* data have the largest gradient. What is no
better than these has found nothing.

    python benchmarks/planted.py                    # all tables: 15 to 20 minutes of one core
    python benchmarks/planted.py --quick              # one planting for vision, one for language: about 2 minutes
    python benchmarks/planted.py --only vision --networks FOLDER       # networks are kept there for the next time
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from planting import (
    IGNORED,
    Planted,
    PlantedText,
    all_logits,
    hidden_units,
    lines,
    plant,
    plant_sequences,
    sequences,
    suffixes,
    tiny_gpt2,
    train_language,
)
from torch import Tensor, nn
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.batches import unpack_batch
from neuronsurgery.forward import default_predict
from neuronsurgery.study.data import DataSet, Split, synthetic
from neuronsurgery.study.network import SmallResNet, small_resnet
from neuronsurgery.study.training import Recipe, train

Loaders = dict[str, list[Any]]

Row = dict[str, float]
"""Numbers by the headings of a table."""

OWN = "own"
"""The group of what is to be undone; all other groups are to be spared."""

DRAWS = 5
"""So many random sets are averaged for each planting."""


# What selectors are given, and give


@dataclass(frozen=True, eq=False)
class Task:
    """What a selector is given.

    Attributes:
        model: the network.
        layout: the neurons to choose from.
        loaders: examples by group, those of `OWN` among them.
        metric: how right an example is, differentiable.
        loss: of an example.
    """

    model: nn.Module
    layout: ns.Layout
    loaders: Loaders
    metric: Callable[[Tensor, Tensor], Tensor] = ns.margin
    loss: Callable[[Tensor, Tensor], Tensor] = ns.cross_entropy

    @property
    def others(self) -> list[str]:
        """The groups to spare."""
        return [group for group in self.loaders if group != OWN]

    @property
    def rest(self) -> list[Any]:
        """The batches of all groups to spare."""
        return [batch for group in self.others for batch in self.loaders[group]]


class Found(NamedTuple):
    """What a selector chose, and the cut that it means."""

    neurons: ns.Neurons
    edit: ns.Edit


Choice = Callable[[int], list[Found]]
"""How many -> the chosen set; several where it is drawn."""


def ranked(task: Task, values: Tensor) -> Choice:
    """The choice of the largest of some values, one for each neuron."""
    scores = ns.Scores(values.reshape(1, -1).float(), (OWN,), (0,), task.layout, "")
    return lambda k: [cut(ns.topk(scores, k))]


def cut(neurons: ns.Neurons) -> Found:
    return Found(neurons, ns.zero_out(neurons))


# Selectors: each family gives choices by name, which have their cost in common


def uninformed(task: Task) -> dict[str, Choice]:
    seeds = range(10_000, 10_000 + DRAWS)  # none by which units to plant in are drawn
    return {
        "random": lambda k: [cut(ns.sample(task.layout, k, seed=seed)) for seed in seeds],
        "magnitude": ranked(task, ns.magnitudes(task.model, layout=task.layout).values),
    }


def gradient_norm(task: Task) -> dict[str, Choice]:
    """The paper's."""
    own = {OWN: task.loaders[OWN]}
    scores = ns.group_grad_norms(task.model, own, layout=task.layout, loss=task.loss)
    return {"gradient norm": ranked(task, scores.values)}


def gradient_norms_of_others(task: Task) -> dict[str, Choice]:
    loaders = {OWN: task.loaders[OWN], "others": task.rest}
    scores = ns.group_grad_norms(task.model, loaders, layout=task.layout, loss=task.loss)
    return {
        "gradient norm of the others (a control)": ranked(task, scores["others"].values),
        "contrast of gradient norms": ranked(task, ns.contrast(scores, OWN, "others").values),
    }


def peers(task: Task) -> dict[str, Choice]:
    """What pruning ranks by: |w dl/dw| of the mean loss, and the mean square of w dl/dw over the examples."""
    examples = [gradient for batch in task.loaders[OWN] for gradient in example_gradients(task, batch)]
    products = torch.stack([weighted(task, gradient) for gradient in examples])
    return {
        "absolute Taylor": ranked(task, products.mean(0).abs()),
        "Fisher": ranked(task, products.square().mean(0)),
    }


def example_gradients(task: Task, raw: Any) -> Iterator[Mapping[str, Tensor]]:
    """The gradient of the loss of each example, by the name of the layer."""
    batch = unpack_batch(raw)
    weights = {layer.parameter: task.model.get_parameter(layer.parameter) for layer in task.layout}
    required = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    losses = task.loss(default_predict(task.model(*batch.args, **batch.kwargs)), batch.targets)
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        yield dict(zip(weights, gradients, strict=True))
    for name, weight in weights.items():
        weight.requires_grad_(required[name])


def weighted(task: Task, gradient: Mapping[str, Tensor]) -> Tensor:
    """The product of each neuron's weights and gradient, shape (neurons,)."""
    parts = []
    for layer in task.layout:
        weight = task.model.get_parameter(layer.parameter).detach()
        parts.append(layer.slices(weight * gradient[layer.parameter]).reshape(layer.count, -1).sum(1))
    return torch.cat(parts)


def spared(changes: Mapping[str, Tensor], task: Task, sign: float, weight: float) -> Tensor:
    """What the own group loses, minus a multiple of what the worst other one loses, by the change of a metric."""
    worst = torch.stack([sign * changes[group] for group in task.others]).amax(0)
    return sign * changes[OWN] - weight * worst.clamp(min=0)


def effects_by_group(task: Task, **options: Any) -> dict[str, Tensor]:
    options = {"metric": task.metric, **options}
    found = ns.group_effects(task.model, task.loaders, layout=task.layout, **options)
    return {group: found[group].values[0] for group in task.loaders}


def effects(task: Task) -> dict[str, Choice]:
    """Signed first-order effects of zeroing."""
    found = effects_by_group(task)
    return {
        "effects on the margin, own": ranked(task, -found[OWN]),
        "effects on the margin, own minus worst other": ranked(task, spared(found, task, -1.0, 1.0)),
    }


def effects_on_the_loss(task: Task) -> dict[str, Choice]:
    found = effects_by_group(task, metric=task.loss)
    return {
        "effects on the loss, own": ranked(task, found[OWN]),
        "effects on the loss, own minus worst other": ranked(task, spared(found, task, 1.0, 1.0)),
    }


def effects_on_errors(task: Task) -> dict[str, Choice]:
    found = effects_by_group(task, transform=ns.error_probability)
    return {"effects on the error probability, weight 2": ranked(task, spared(found, task, 1.0, 2.0))}


def effects_of_means(task: Task) -> dict[str, Choice]:
    """As `effects`, each output held at its mean in the place of zeroing."""
    values = spared(effects_by_group(task, edit="mean"), task, -1.0, 1.0)

    def held(k: int) -> list[Found]:
        (found,) = ranked(task, values)(k)
        return [Found(found.neurons, ns.mean_out(found.neurons, task.model, task.loaders))]

    return {"effects of means, own minus worst other": held}


def exact(task: Task) -> dict[str, Choice]:
    """What each neuron does when it is cut alone."""
    neurons = {str(flat): task.layout.neurons([flat]) for flat in range(task.layout.count)}
    metrics = {"margin": task.metric, "error": lambda logits, targets: torch.sigmoid(-task.metric(logits, targets))}
    swept = ns.sweep(
        task.model, {name: ns.zero_out(own) for name, own in neurons.items()}, task.loaders, metric=metrics
    )
    changes = {}
    for metric, found in swept.items():
        rows = [found.change(name) for name in neurons]
        changes[metric] = {group: torch.tensor([row[group] for row in rows]) for group in task.loaders}
    return {
        "exact sweep, own": ranked(task, -changes["margin"][OWN]),
        "exact sweep, margin, weight 1": ranked(task, spared(changes["margin"], task, -1.0, 1.0)),
        "exact sweep, error probability, weight 10": ranked(task, spared(changes["error"], task, 1.0, 10.0)),
    }


def masks(task: Task, name: str, **options: Any) -> dict[str, Choice]:
    options = {"metric": task.metric, **options}
    return {name: ranked(task, ns.learned_mask(task.model, task.loaders, OWN, layout=task.layout, **options).values)}


def searched(task: Task, name: str, **options: Any) -> dict[str, Choice]:
    """What a search returns, which may be fewer than k, and beside it the k that it went on to."""
    found = ns.find_critical(task.model, task.loaders, OWN, layout=task.layout, metric=task.metric, **options)
    return {
        name: lambda k: [Found(found.within(k).neurons, found.within(k).edit)],
        f"{name}, all k": lambda k: [Found(found.path[:k][-1].neurons, found.path[:k][-1].edit)],
    }


Family = Callable[[Task], dict[str, Choice]]

ANY: tuple[Family, ...] = (*(uninformed, gradient_norm, gradient_norms_of_others, peers, effects_on_the_loss, effects),)
"""What is tried everywhere."""

# Measuring

Judge = Callable[[Found], Row]


def measured(
    task: Task, tried: Sequence[Family], judge: Callable[[Found], Row], sizes: Sequence[int]
) -> dict[str, Row]:
    """For each selector what its sets of these sizes come to, and the seconds that it took."""
    rows = {}
    for family in tried:
        started = time.process_time()
        choices = family(task)
        seconds = time.process_time() - started
        for name, choice in choices.items():
            rows[name] = {**judged(choice, judge, sizes), "seconds": seconds}
    return rows


def judged(choice: Choice, judge: Judge, sizes: Sequence[int]) -> Row:
    """The mean over the sets of each size, by heading."""
    row = {}
    for k in sizes:
        every = [judge(found) for found in choice(k)]
        for heading in every[0]:
            name = heading if len(sizes) == 1 else f"{heading} {k}"
            row[name] = statistics.mean(one[heading] for one in every)
    return row


def show(title: str, plantings: Sequence[Mapping[str, Row]]) -> None:
    """Print the means over plantings."""
    rows = {
        name: {heading: statistics.mean(one[name][heading] for one in plantings) for heading in row}
        for name, row in plantings[0].items()
    }
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    widths = {heading: max(len(heading), 7) for heading in headings}
    print(f"\n{title}; means over {len(plantings)}\n")
    print(" " * 44 + "".join(f"  {heading:>{width}s}" for heading, width in widths.items()))
    for name, row in rows.items():
        cells = [f"{row[heading]:{width}.2f}" if heading in row else " " * width for heading, width in widths.items()]
        print(f"{name:44s}" + "".join(f"  {cell}" for cell in cells))
    sys.stdout.flush()


def said(what: str) -> None:
    """Say on standard error how far it has come."""
    sys.stderr.write(f"{time.process_time():6.0f} s  {what}\n")
    sys.stderr.flush()


# Vision

SETTINGS = {
    "8 rows, 8 images": (8, 8, False),
    "8 rows, 8 images, rows vacated first": (8, 8, True),
    "3 rows, 4 images": (3, 4, False),
}
"""How many rows hold how many images, and whether the network was first made to do without them."""


SEARCHES: dict[str, dict[str, Any]] = {
    "find_critical": {},
    "find_critical, no cap": {"cap": 1.0},
    "find_critical, no cap, by a mask": {"cap": 1.0, "screen": "mask"},
}


def vision_networks(count: int, epochs: int, folder: Path) -> Iterator[tuple[DataSet, SmallResNet]]:
    """The study's network, trained on its synthetic data."""
    for seed in range(count):
        data = synthetic(seed)
        recipe = Recipe(epochs=epochs)
        model = train(
            small_resnet(seed), data.train, folder / f"vision-{seed}", recipe=recipe, seed=seed,
            augmentation=data.augmentation,
        )  # fmt: skip
        assert isinstance(model, SmallResNet)
        said(f"network {seed} is trained")
        yield data, model


def vision(networks: Sequence[tuple[DataSet, SmallResNet]], settings: Sequence[str], each: int) -> None:
    for title in settings:
        rows, images, vacate = SETTINGS[title]
        plantings = []
        for seed, (data, network) in enumerate(networks):
            for number in range(each):
                planted = plant(network, data.train, rows, images, each * seed + number, vacate=vacate)
                said(f"{title}: planted, {planted.learned:.0%} of the images learned")
                if len(planted.flips):
                    plantings.append(vision_planting(planted, data.test))
        show(f"Vision: {title} of block2.conv2, of 336 rows in all", plantings)


def vision_planting(planted: Planted, test: Split) -> dict[str, Row]:
    """What every selector makes of one planting."""
    k = len(planted.neurons)
    layout = ns.find_layout(planted.model, where=["stem*", "block*"])
    task = Task(planted.model, layout, vision_loaders(planted))
    judge = partial(judge_cut, planted, test)
    true = {
        "planted, zeroed": cut(planted.neurons),
        "planted, rewound": Found(planted.neurons, ns.rewind(planted.neurons, planted.clean.state_dict())),
    }
    tried: tuple[Family, ...] = (*ANY, effects_on_errors, effects_of_means, exact, partial(masks, name="learned mask"))
    for name, options in SEARCHES.items():
        tried += (partial(searched, name=name, k=k, pool=24, width=1, **options),)
    return {name: judge(found) for name, found in true.items()} | measured(task, tried, judge, [k])


def vision_loaders(planted: Planted, most: int = 100) -> Loaders:
    """The wrong labels, and as groups of their own some of the other training images."""
    loaders: Loaders = {OWN: [(planted.flips.images, planted.flips.targets)]}
    for group in range(4):
        members = (planted.others.groups == group).nonzero().flatten()[:most]
        loaders[f"others {group}"] = [(planted.others.images[members], planted.others.targets[members])]
    return loaders


def judge_cut(planted: Planted, test: Split, found: Found) -> Row:
    """The recall; the share of the learned wrong labels that are gone; what the worst group of new images loses."""
    after = ns.bake(found.edit, planted.model)
    own = [
        all_logits(model, planted.flips.images).argmax(1) == planted.flips.targets for model in (planted.model, after)
    ]
    right = [all_logits(model, test.images).argmax(1) == test.targets for model in (planted.model, after)]
    lost = (right[0].float() - right[1].float()).reshape(-1)
    return {
        "recall": len(found.neurons & planted.neurons) / len(planted.neurons),
        "undone": 1 - float(own[1].float().mean()),
        "worst other": max(float(lost[test.groups == group].mean()) for group in range(4)),
    }


# Language


def token_margins(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of every token, and which of them count."""
    labels = targets[:, 1:]
    flat = ns.margin(logits[:, :-1].flatten(0, 1), labels.clamp(min=0).flatten())
    return flat.reshape(labels.shape), labels != IGNORED


def mean_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean margin over the tokens of each sequence."""
    margins, counted = token_margins(logits, targets)
    return (margins * counted).sum(1) / counted.sum(1)


def soft_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The margin m for which log(1 + exp(m + 1)) is the mean of that over the tokens: the large ones count most."""
    margins, counted = token_margins(logits, targets)
    mean = (functional.softplus(margins + 1) * counted).sum(1) / counted.sum(1)
    return mean + (-torch.expm1(-mean)).log() - 1


@dataclass(frozen=True, eq=False)
class Texts:
    """Text that follows the grammar: to train on, to choose by, and to judge on."""

    train: Tensor
    search: Tensor
    held_out: Tensor

    @classmethod
    def drawn(cls) -> Texts:
        """The same texts every time."""
        return cls(lines(4000, 0), lines(64, 1), lines(256, 2))


def batch(tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "labels": labels}


def language_task(model: nn.Module, layout: ns.Layout, own: Tensor, texts: Texts, spared: Tensor | None = None) -> Task:
    loaders = {OWN: [batch(own, suffixes(own))], "text": [batch(texts.search, texts.search.clone())]}
    if spared is not None:
        loaders["other sequences"] = [batch(spared, suffixes(spared))]
    return Task(model, layout, loaders, mean_margin, ns.causal_lm_loss)


@torch.no_grad()
def recitation(model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """The share of sequences that are recited, and that of their tokens that are right."""
    labels = suffixes(tokens)
    logits = model(input_ids=tokens).logits
    counted = labels[:, 1:] != IGNORED
    right = (logits[:, :-1].argmax(2) == labels[:, 1:])[counted]
    return float(ns.recited(logits, labels).mean()), float(right.float().mean())


@torch.no_grad()
def perplexity(model: nn.Module, texts: Texts) -> float:
    losses = ns.causal_lm_loss(model(input_ids=texts.held_out).logits, texts.held_out)
    return float(losses.mean().exp())


def judge_text(model: nn.Module, texts: Texts, own: Tensor, other: Tensor | None, found: Found) -> Row:
    """What is still recited, and by what factor the perplexity of new text grows."""
    after = ns.bake(found.edit, model)
    exact_share, tokens = recitation(after, own)
    row = {"exact": exact_share, "tokens": tokens, "factor": perplexity(after, texts) / perplexity(model, texts)}
    return row if other is None else {**row, "others": recitation(after, other)[0]}


def judge_units(planted: PlantedText, texts: Texts, found: Found) -> Row:
    recall = len(found.neurons & planted.neurons) / len(planted.neurons)
    return {"recall": recall, **judge_text(planted.model, texts, planted.memorised, None, found)}


MASK: dict[str, Any] = {"name": "learned mask", "metric": soft_margin, "penalty": 0.01}


LAYOUTS: dict[str, Callable[[nn.Module], ns.Layout]] = {
    "512 hidden units": hidden_units,
    "all 1152 rows": ns.find_layout,
}


def language(models: int, each: int, layouts: Sequence[str]) -> None:
    """Both tables of language models: the planted ones start from models of text alone, which then memorise more."""
    texts = Texts.drawn()
    planted: list[dict[str, Row]] = []
    natural: dict[str, list[dict[str, Row]]] = {title: [] for title in layouts}
    for seed in range(models):
        model, memorised = tiny_gpt2(seed), sequences(16, seed)
        train_language(model, texts.train, memorised[:0], 400, seed)
        said(f"language model {seed} has learned the grammar: perplexity {perplexity(model, texts):.2f}")
        for number in range(each * seed, each * (seed + 1)):
            planting = plant_sequences(model, sequences(2, 1000 + number), texts.train, 50, number)
            planted.append(planted_language(planting, texts))
            said(f"planting {number}: {recitation(planting.model, planting.memorised)[0]:.0%} recited")
        if layouts:
            train_language(model, texts.train, memorised, 450, seed + 1000)
            said(f"{recitation(model, memorised)[0]:.0%} memorised, perplexity {perplexity(model, texts):.2f}")
        for title in layouts:
            natural[title].append(natural_language(model, LAYOUTS[title](model), memorised, texts))
    show("Planted language: 50 of 512 hidden units recite two sequences", planted)
    for title, models_of in natural.items():
        show(f"Natural language: {title}; exact, tokens of sequences 0-7, others is exact of 8-15", models_of)


def planted_language(planted: PlantedText, texts: Texts) -> dict[str, Row]:
    task = language_task(planted.model, hidden_units(planted.model), planted.memorised, texts)
    judge = partial(judge_units, planted, texts)
    true = {"nothing": Found(ns.Neurons(), ns.compose()), "planted, zeroed": cut(planted.neurons)}
    tried: tuple[Family, ...] = (*ANY, exact, partial(masks, **MASK))
    rows = {name: judge(found) for name, found in true.items()}
    return rows | measured(task, tried, judge, [len(planted.neurons)])


def natural_language(model: nn.Module, layout: ns.Layout, memorised: Tensor, texts: Texts) -> dict[str, Row]:
    own, other = memorised[:8], memorised[8:]
    judge = partial(judge_text, model, texts, own, other)
    task = language_task(model, layout, own, texts)
    tried: tuple[Family, ...] = (*ANY, partial(masks, **MASK))
    if layout.count == 512:  # of all rows it takes too long
        tried += (exact,)
    rows = {"nothing": judged(lambda k: [Found(ns.Neurons(), ns.compose())], judge, [20, 50])}
    rows |= measured(task, tried, judge, [20, 50])
    guarded = language_task(model, layout, own, texts, other)
    spared = partial(masks, **MASK | {"name": "learned mask, sequences 8-15 spared"})
    return rows | measured(guarded, [spared], judge, [20, 50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one planting for vision, one for language")
    parser.add_argument("--only", choices=["vision", "language"], help="one half of the tables")
    parser.add_argument("--networks", type=Path, help="where to keep the networks for vision, for the next time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {platform.machine()}; seconds are of processor time")
    networks, each = (1, 1) if options.quick else (3, 2)
    if options.only != "language":
        with tempfile.TemporaryDirectory() as folder:
            kept = options.networks or Path(folder)
            trained = list(vision_networks(networks, 10 if options.quick else 30, kept))
            vision(trained, list(SETTINGS)[: 1 if options.quick else None], each)
    if options.only != "vision":
        language(networks, each, [] if options.quick else list(LAYOUTS))


if __name__ == "__main__":
    main()
