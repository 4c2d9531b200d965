"""Where finding the memorised by a knockout should fail, and whether it does: one change at a time to data or network.

The knockout of the last residual stage was chosen on one data set and one network. Each `Condition` takes away one
thing that it may owe its success to: the augmentation, right labels, a shallow network, skip connections, a shortcut
that is simpler than the class. Whatever comes out is reported; group labels and wrong labels are used to judge only.

    python benchmarks/falsifications.py                     # seed 0, all conditions: about an hour of one core
    python benchmarks/falsifications.py --seeds 5 --out runs/falsifications
    python benchmarks/falsifications.py --only "label noise" --quick       # few images and epochs: does it run

What is done is kept in the folder, and a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from conditions import deep_resnet, pair, plain_cnn, with_label_noise
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.data import Counts, DataSet, synthetic
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import Parts, RunFolder, at_work
from neuronsurgery.study.settings import Settings
from neuronsurgery.study.stage_fragility import ROUNDING, SEED, Asked, Examples, Row, ask, judge_scores, mitigate
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import (
    RECIPES,
    EpochReport,
    Recipe,
    checkpoint_epochs,
    checkpoint_path,
    digest,
    read_trajectory,
    train,
)

SMALLEST_CELL: Final = 3
"""Of a group of fewer examples `infer_groups` says nothing."""

EARLY: Final = 2
"""The epoch whose checkpoint is asked: with two classes, its margins rank as its losses do."""

SHARES: Final = (0.025, 0.1, 0.2)
"""Of the neurons, how many are cut at random."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What a network is trained on, and which one.

    Attributes:
        name: short, for tables.
        text: what it takes away.
        data: the data set of (seed, counts=...).
        network: of (seed, classes), freshly initialised.
        augmented: whether training images vary from epoch to epoch.
        noise: the share of the training and of the held-out images that are given a wrong class.
        counts: images per group of splits to change, or None.
        recipe: how to train.
    """

    name: str
    text: str
    data: Callable[..., DataSet] = synthetic
    network: Callable[[int, int], nn.Module] = small_resnet
    augmented: bool = True
    noise: float = 0.0
    counts: Mapping[str, Counts] | None = None
    recipe: Recipe = RECIPES["adam"]

    @property
    def slug(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


CONDITIONS: Final = (
    Condition("as is", "the default data and network, for comparison"),
    Condition(
        "no augmentation", "training images are the same in every epoch, so that all are remembered", augmented=False
    ),
    Condition(
        "label noise",
        "3 % of the training and of the held-out images have the wrong class: they are remembered, too",
        noise=0.03,
    ),
    Condition("deeper network", "two blocks in each stage: how deep should the cut be?", network=deep_resnet),
    Condition("plain network", "no skip connections: nothing is left where a layer is cut", network=plain_cnn),
    Condition(
        "equally hard shortcut", "class and attribute are two digits, drawn alike: neither is simpler", data=pair
    ),
)


def falsifications(
    folder: RunFolder, *, seed: int, conditions: Sequence[Condition] = CONDITIONS, progress: bool = True
) -> list[Row]:
    """Return what became of detection and mitigation under each condition.

    Networks are trained in `falsifications/` of the folder.

    Args:
        folder: the run folder; a condition that it holds is not done again, half a training is taken up.
        seed: of data, weights and batches.
        conditions: what to try.
        progress: whether to write lines of progress to standard error.

    Returns:
        One row per condition: what it is ("condition", "text", "seed", "parameters", "groups", "minority", "counts"),
        "accuracy" per split and group (of the rightly labelled images), "wrong_labels" (how many, and the share of them
        that was learnt; None without label noise), "cuts" (the layers of each knockout) or "impossible" (why there is
        none), "detection" per split, and "mitigation" (None without held-out images). Detection has "rows" (AUC and
        average precision of each score for each minority within its class, wrong labels left out), "flagged" (by
        Tukey's fence, per true group without the wrong labels, and of these; "refused" where they are so few in a class
        that `infer_groups` makes no groups of them) and "damage" (the share of predictions that each cut changes).

    Raises:
        ValueError: if two conditions have one name.
    """
    slugs = [condition.slug for condition in conditions]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"two conditions have one name among {', '.join(sorted(slugs))}: give each a name of its own")
    return [
        folder.remember(
            _name(condition, seed),
            functools.partial(_falsify, folder, condition, seed, progress),
        )
        for condition in conditions
    ]


def _name(condition: Condition, seed: int) -> str:
    return f"falsification-{condition.slug}-seed-{seed}"


def _falsify(folder: RunFolder, condition: Condition, seed: int, progress: bool) -> Row:
    if progress:
        sys.stderr.write(f"falsification, {condition.name}: {condition.recipe.epochs} epochs\n")
    started = time.perf_counter()
    data, wrong = _make_data(condition, seed)
    trained = _train(folder, condition, data, seed, progress)
    cuts, impossible = _knockouts(trained.model, data)
    kept = folder.parts(_name(condition, seed), digest(trained.model.state_dict().values()))
    case = _Case(data, wrong, trained, cuts, folder.settings.draws, kept)
    row = {
        "condition": condition.name,
        "text": condition.text,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "groups": list(data.group_names),
        "minority": list(data.minority),
        "counts": {name: list(split.counts) for name, split in data.splits.items()},
        "accuracy": {name: case.accuracy(name) for name in data.splits},
        "wrong_labels": case.learnt_wrong_labels(),
        "cuts": {name: [layer.parameter for layer in edit.neurons.by_layer()] for name, edit in cuts.items()},
        "impossible": impossible,
        "detection": {name: case.detect(name) for name in ("train", "held-out") if name in data.splits},
        "mitigation": mitigate(data, trained.model, cuts.get("knockout"), "held-out", seed, kept)
        if "held-out" in data.splits
        else None,
    }
    folder.note_seconds(f"falsification, {condition.name}, seed {seed}", time.perf_counter() - started)
    return row


def _make_data(condition: Condition, seed: int) -> tuple[DataSet, dict[str, Tensor]]:
    """The data set, and by split which of its images have a wrong class, bool (N,).

    Held-out images come from where the training images come from, and so have as many wrong classes. Validation images,
    which have group labels, and test images were looked at more closely.
    """
    data = condition.data(seed, counts=condition.counts)
    noise = {split: condition.noise if split in ("train", "held-out") else 0.0 for split in data.splits}
    noisy = {name: with_label_noise(split, noise[name], seed) for name, split in data.splits.items()}
    splits = MappingProxyType({name: split for name, (split, _) in noisy.items()})
    return replace(data, splits=splits), {name: wrong for name, (_, wrong) in noisy.items()}


def _train(folder: RunFolder, condition: Condition, data: DataSet, seed: int, progress: bool) -> Trained:
    path = folder.path / "falsifications" / f"{condition.slug}-seed-{seed}"
    model = train(
        condition.network(seed, len(set(data.train.targets.tolist()))),
        data.train,
        path,
        recipe=condition.recipe,
        seed=seed,
        augmentation=data.augmentation if condition.augmented else None,
        progress=_print_epoch if progress else None,
    )
    checkpoints = {epoch: checkpoint_path(path, epoch) for epoch in checkpoint_epochs(path)}
    return Trained(model, checkpoints, read_trajectory(path), studied(("head.weight", "head.bias")))


def _print_epoch(report: EpochReport) -> None:
    sys.stderr.write(f"{report}\n")


def _knockouts(model: nn.Module, data: DataSet) -> tuple[dict[str, ns.Edit], str | None]:
    """The cuts of residual branches by name, of which the first is the method's; or none, and why."""
    try:
        branches = ns.residual_branches(model, next(iter(next(iter(data.loaders("train").values())))))
    except ValueError as error:
        return {}, str(error)
    last = branches[-1].stage
    layers = {
        "knockout": [branch.layer for branch in branches if branch.stage == last],
        "knockout, last branch only": [branches[-1].layer],
        "knockout, last two stages": [branch.layer for branch in branches if branch.stage >= last - 1],
    }
    # In a stage of one branch the first two are one.
    different = {name: chosen for name, chosen in layers.items() if name == "knockout" or chosen != layers["knockout"]}
    layout = ns.find_layout(model)
    return {name: _zeroed(layout, *chosen) for name, chosen in different.items()}, None


def _zeroed(layout: ns.Layout, *layers: str) -> ns.Edit:
    return ns.zero_out(ns.select(layout, dict.fromkeys(layers, ...)))


def fence_flags(scores: Tensor, targets: Tensor) -> Tensor:
    """Who lies above Tukey's fence of the class, bool (N,): as by `infer_groups`, which refuses groups of a few.

    Args:
        scores: (N,), of a class all constant (to rounding) if they tell nothing: then none is flagged.
        targets: the classes, int64 (N,).
    """
    flags = torch.zeros(len(scores), dtype=torch.bool)
    for target in sorted(set(targets.tolist())):
        own = scores[targets == target].double()
        if own.max() - own.min() > ROUNDING * own.abs().max():
            low, high = np.quantile(own.numpy(), (0.25, 0.75))
            flags[targets == target] = own > high + 1.5 * (high - low)
    return flags


@dataclass(frozen=True, eq=False)
class _Case:
    """A trained network and what it is asked.

    Attributes:
        data: the data set, wrong classes included.
        wrong: by split, which images have one, bool (N,).
        trained: the network and its checkpoints.
        cuts: the knockouts by name; none where there is no residual branch.
        draws: how many random draws are averaged.
        kept: what it was asked before a kill.
    """

    data: DataSet
    wrong: Mapping[str, Tensor]
    trained: Trained
    cuts: Mapping[str, ns.Edit]
    draws: int
    kept: Parts = field(default_factory=Parts)

    def accuracy(self, split: str) -> list[float | None]:
        """The accuracy of each group, images with a wrong class left out; None for a group without images."""
        right = self.data.splits[split].subset(~self.wrong[split])
        loaders = replace(self.data, splits={split: right}).loaders(split)
        found = ns.evaluate(self.trained.model, loaders)
        return [float(found[name]) if name in loaders else None for name in self.data.group_names]

    def learnt_wrong_labels(self) -> Row | None:
        """How many wrong classes there are, per true group, and the share of them that the network gives back."""
        if not self.wrong["train"].any():
            return None
        noisy = self.data.train.subset(self.wrong["train"])
        found = ns.evaluate(self.trained.model, replace(self.data, splits={"train": noisy}).loaders("train"))
        return {"counts": list(noisy.counts), "learnt": float(found.average)}

    def detect(self, split: str) -> Row:
        """How well each score finds the minorities of a split, and who is flagged by it."""
        examples = Examples.of(self.data.splits[split])
        wrong = self.wrong[split][examples.order]
        right = Examples(examples.order[~wrong], examples.targets[~wrong], examples.groups[~wrong])
        asked = self._ask(split)
        return {
            "rows": [
                {"score": name, "needs": needs, **judged}
                for name, (needs, values) in asked.scores.items()
                for judged in judge_scores(values[~wrong], right, self.data)
            ],
            "flagged": [
                {"score": name, **self._count_flagged(values, examples, wrong)}
                for name, (_, values) in asked.scores.items()
            ],
            "damage": [{"cut": name, "flips": flips} for name, flips in asked.damage.items()],
        }

    def _count_flagged(self, values: Tensor, examples: Examples, wrong: Tensor) -> Row:
        """The flags per true group, wrong classes apart; and whether `infer_groups` would refuse so few."""
        flags = fence_flags(values, examples.targets)
        cells = [int((flags[examples.targets == target] == flag).sum()) for target in (0, 1) for flag in (False, True)]
        return {
            "fragile": torch.bincount(examples.groups[flags & ~wrong], minlength=4).tolist(),
            "wrong_labels": int((flags & wrong).sum()),
            "refused": min(cells) < SMALLEST_CELL,
        }

    def _ask(self, split: str) -> Asked:
        """Every score with what it needs, and the share of predictions that each cut changes."""
        alone, redrawn = (self.cuts, {}) if self.cuts else self._cuts_without_branches()
        early = {epoch: path for epoch, path in self.trained.checkpoints.items() if epoch == EARLY}
        return ask(self.trained.model, self.data, split, alone, self._random_cuts() | redrawn, early, self.kept)

    def _random_cuts(self) -> dict[str, list[ns.Edit]]:
        layout = ns.find_layout(self.trained.model, where=self.trained.where)
        return {
            f"random neurons, {100 * share:g} %": [
                ns.zero_out(ns.sample(layout, max(1, round(share * layout.count)), seed=SEED + draw))
                for draw in range(self.draws)
            ]
            for share in SHARES
        }

    def _cuts_without_branches(self) -> tuple[Mapping[str, ns.Edit], dict[str, list[ns.Edit]]]:
        """What could be cut instead: the last convolution; and the last two, each with weights drawn anew."""
        layout = ns.find_layout(self.trained.model, where=self.trained.where)
        before, last = [layer.parameter for layer in layout][-2:]
        redrawn: dict[str, list[ns.Edit]] = {
            f"{layer} re-initialised": [
                ns.random_init(ns.select(layout, {layer: ...}), relative_std=1.0, seed=SEED + draw)
                for draw in range(self.draws)
            ]
            for layer in (before, last)
        }
        return {f"{last} zeroed": _zeroed(layout, last)}, redrawn


# What is printed

SHOWN: Final = ("knockout", "final margin", "margin after epoch 2")
RETRAINED: Final = ("ERM", "class-balanced", "inferred by knockout", "true groups", "DFR")
FEW: Final[Mapping[str, Counts]] = {
    "train": (60, 10, 8, 30),
    "held-out": (24, 6, 5, 12),
    "validation": (6,) * 4,
    "test": (8,) * 4,
}


def table(rows: Sequence[Row]) -> str:
    """Return the conditions as a table: AUC of each score for each minority, the flags, the worst groups retrained.

    Args:
        rows: what `falsifications` returns.
    """
    header = ["condition", "seed", *SHOWN, "flagged", *RETRAINED]
    cells = [header, *([row["condition"], str(row["seed"]), *_cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    ahead = [row["condition"] for row in rows if is_ahead(row)]
    said = f"the knockout ranks every minority better than the final margin in {len(ahead)} of {len(rows)}"
    return "\n".join([*lines, f"{said}: {', '.join(ahead) or 'none'}"])


def is_ahead(row: Row) -> bool:
    """Whether the knockout ranks every minority above the rest of its class better than the final margin does."""
    auc = {(found["score"], found["group"]): found["auc"] for found in row["detection"]["train"]["rows"]}
    knocked = {group: value for (score, group), value in auc.items() if score == "knockout"}
    return bool(knocked) and all(value > auc["final margin", group] for group, value in knocked.items())


def _cells(row: Row) -> list[str]:
    found = row["detection"]["train"]
    scores = [
        " / ".join(f"{one['auc']:.3f}" for one in found["rows"] if one["score"] == score) or "no branch"
        for score in SHOWN
    ]
    flags = next((one for one in found["flagged"] if one["score"] == "knockout"), None)
    said = "-" if flags is None else "/".join(map(str, flags["fragile"])) + f" + {flags['wrong_labels']} wrong"
    worst = {one["name"]: one.get("worst") for one in row["mitigation"] or ()}
    retrained = ["refused" if worst.get(name) is None else f"{100 * worst[name]:.1f}" for name in RETRAINED]
    return [*scores, said + " (too few)" * bool(flags and flags["refused"]), *retrained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/falsifications"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=[condition.name for condition in CONDITIONS], nargs="+")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    chosen = [condition for condition in CONDITIONS if options.only is None or condition.name in options.only]
    if options.quick:
        chosen = [
            replace(one, recipe=replace(one.recipe, epochs=3), counts=None if one.data is pair else FEW)
            for one in chosen
        ]
    rows = []
    for seed in range(options.seed, options.seed + options.seeds):
        path = options.out / f"seed-{seed}"
        with at_work(path):
            rows += falsifications(
                RunFolder(path, Settings(seed=seed, quick=options.quick)), seed=seed, conditions=chosen
            )
    print(table(rows))


if __name__ == "__main__":
    main()
