"""The paper's question turned round: what does it do to *train* a critical set, and nothing else?

    python benchmarks/train_only.py                 # seeds 0 to 4, about 3 minutes of one core each
    python benchmarks/train_only.py --seeds 0 1     # some of them; what is in the results already is not done again
    python benchmarks/train_only.py --table         # the table of what is there

For each seed the study's network is trained on its drawn birds as ever. Then, for each of the two rare groups, some
neurons are trained on and everything else keeps its bits (`train_only`): the same images in the same order, drawn so
that each group is a quarter of every batch, norms in evaluation mode. The sets, all of the same size for one group:

- critical: what `find_critical` finds on one half of the training images;
- gradient norm: the largest gradient norms of the group, as in the paper;
- random: random neurons of the same layers as the critical ones;
- matched: the largest gradient norms of as many images of the common group of the same class, matched by their margins;
- everything: all parameters, for comparison.

What is kept is the accuracy of each group before and after, on the training and the test images. The table has means
over the two groups, and over seeds with an interval at 95 % (Student's t).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

import neuronsurgery as ns
from neuronsurgery.atomic import write_atomically
from neuronsurgery.study.data import Batches, DataSet, batches, synthetic
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.training import train

SEEDS = (0, 1, 2, 3, 4)
SIZE = 3
EPOCHS, STEPS, QUARTER = 4, 37, 16
RATE = 1e-3
COMMON = {"landbird on water": "landbird on land", "waterbird on land": "waterbird on water"}
"""For each rare group the common one of its class."""

SETS = ("critical", "gradient norm", "random", "matched")
FIELDS = ("seed", "group", "set", "neurons", "split", "name", "before", "after")
Row = dict[str, str]


# Which neurons


def chosen(model: nn.Module, data: DataSet, group: str, seed: int) -> dict[str, ns.Neurons]:
    """The sets of one group."""
    loaders = data.loaders("train", 600)
    search, _ = ns.halves(loaders, seed=seed)
    found = ns.find_critical(model, search, group, k=SIZE)
    critical = found.neurons or found.path[-1].neurons  # where nothing keeps within the cap, what the search went on to
    control = ns.matched(loaders, group, COMMON[group], model, seed=seed)
    own, others = (ns.group_grad_norms(model, given) for given in (loaders, control))
    return {
        "critical": critical,
        "gradient norm": ns.topk(own[group], len(critical)),
        "random": redrawn(critical, f"{seed} {group}"),
        "matched": ns.topk(others[control.name], len(critical)),
    }


def redrawn(neurons: ns.Neurons, key: str) -> ns.Neurons:
    """As many random neurons of the same layers, none of them among these."""
    generator = np.random.default_rng(list(key.encode()))
    drawn = {}
    for layer, indices in neurons.by_layer().items():
        left = [index for index in range(layer.count) if index not in indices]
        drawn[layer] = generator.choice(left, min(len(indices), len(left)), replace=False).tolist()
    return ns.Neurons(drawn)


# Training them


def balanced(data: DataSet, seed: int, epoch: int) -> Batches:
    """Batches of as many images of each group, drawn with replacement."""
    generator = np.random.default_rng([seed, epoch])
    members = [(data.train.groups == group).nonzero().flatten().numpy() for group in range(4)]
    draws = [[generator.choice(own, QUARTER) for own in members] for _ in range(STEPS)]
    order = torch.from_numpy(np.concatenate([part for step in draws for part in step]))
    split = data.train.subset(order)
    return batches(split, 4 * QUARTER, seed=seed, epoch=1000 + epoch, augmentation=data.augmentation)


def trained(model: nn.Module, neurons: ns.Neurons | None, data: DataSet, seed: int) -> nn.Module:
    """A copy of the model after training some neurons, or everything; its norms stay in evaluation mode."""
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    with contextlib.nullcontext() if neurons is None else ns.train_only(neurons, optimizer, model):
        for epoch in range(EPOCHS):
            for images, targets, _ in balanced(data, seed, epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), targets).backward()
                optimizer.step()
    return model


def measured(seed: int, folder: Path, known: set[tuple[str, ...]]) -> Iterator[list[Row]]:
    """The rows of each set of a seed that are not known yet."""
    data = synthetic(seed)
    wanted = [(str(seed), group, name) for group in COMMON for name in SETS] + [(str(seed), "", "everything")]
    if known.issuperset(wanted):
        return
    said(f"seed {seed}: the network")
    model = train(small_resnet(seed), data.train, folder / f"seed-{seed}", seed=seed, augmentation=data.augmentation)
    before = accuracies(model, data)
    for group in (*COMMON, ""):
        left = [name for _, own, name in wanted if own == group and (str(seed), group, name) not in known]
        sets: dict[str, ns.Neurons] = {}
        if left and group:
            said(f"seed {seed}, {group}: the search")
            sets = chosen(model, data, group, seed)
        for name in left:
            said(f"seed {seed}, {group or 'everything'}: {name}")
            after = accuracies(trained(model, sets.get(name), data, seed), data)
            neurons = " ".join(map(str, sets.get(name, ())))
            yield [
                dict(zip(FIELDS, map(str, (seed, group, name, neurons, *place, old, after[place])), strict=True))
                for place, old in before.items()
            ]


def accuracies(model: nn.Module, data: DataSet) -> dict[tuple[str, str], float]:
    """The accuracy of each group on the training and the test images."""
    return {
        (split, group): accuracy
        for split in ("train", "test")
        for group, accuracy in ns.evaluate(model, data.loaders(split)).items()
    }


# What came of it


def table(rows: Sequence[Row]) -> str:
    """The changes by set, in points: means over seeds with their intervals."""
    lines = ["|trained|own, train|own, test|worst other, train|worst other, test|", "|---|--:|--:|--:|--:|"]
    for name in (*SETS, "everything"):
        cells = [interval(changes(rows, name, split, who)) for who in ("own", "other") for split in ("train", "test")]
        lines.append(f"|{name}|{'|'.join(cells)}|")
    for name in SETS[1:]:
        cells = []
        for who in ("own", "other"):
            for split in ("train", "test"):
                one, two = changes(rows, "critical", split, who), changes(rows, name, split, who)
                cells.append(interval({seed: one[seed] - two[seed] for seed in one.keys() & two.keys()}))
        lines.append(f"|critical minus {name}|{'|'.join(cells)}|")
    return "\n".join(lines)


def changes(rows: Sequence[Row], name: str, split: str, who: str) -> dict[str, float]:
    """By seed the mean over the rare groups of the change of the group's own accuracy, or of the worst other one."""
    found: dict[str, list[float]] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if (row["seed"], row["set"], row["split"]) == (seed, name, split)]
        for group in COMMON:
            here = {
                row["name"]: float(row["after"]) - float(row["before"]) for row in own if row["group"] in (group, "")
            }
            if here:
                value = here[group] if who == "own" else min(v for other, v in here.items() if other != group)
                found.setdefault(seed, []).append(100 * value)
    return {seed: statistics.mean(values) for seed, values in found.items() if len(values) == len(COMMON)}


def interval(by_seed: dict[str, float]) -> str:
    """The mean, and how far its interval at 95 % reaches to either side."""
    values = list(by_seed.values())
    if len(values) < 2:
        return " ".join(f"{value:+.1f}" for value in values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1f}±{half:.1f}"


def said(what: str) -> None:
    sys.stderr.write(f"{time.process_time():6.0f} s  {what}\n")
    sys.stderr.flush()


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    lines = [FIELDS, *([row[name] for name in FIELDS] for row in rows)]
    write_atomically(path, "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("runs/train-only"), help="the networks and the results")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and do nothing else")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.csv"
    warnings.simplefilter("ignore", UserWarning)  # of groups of few images
    rows = read(path)
    if not arguments.table:
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            known = {(row["seed"], row["group"], row["set"]) for row in rows}
            for own in measured(seed, arguments.out, known):
                rows += own
                write(path, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
