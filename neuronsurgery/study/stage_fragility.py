"""The stage beside Stage 2: who is memorised, found without group labels, and what that is good for.

Detection: how well the minority of each class stands out, by the knockout of the last residual stage and by what else
could be asked. Mitigation: last-layer retraining on the groups so inferred, beside retraining on other groups of the
same images. Audit: the most fragile images of each class. Group labels are used to judge, never to infer.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study import readers
from neuronsurgery.study.data import permutation
from neuronsurgery.study.experiments import identity
from neuronsurgery.study.last_layer import (
    Features,
    LinearRule,
    afr,
    balanced_logistic,
    dfr,
    extract_features,
    last_logits,
    retrained,
    tuned_afr,
    weighted_logistic,
)
from neuronsurgery.study.pictures import shown
from neuronsurgery.study.run import Parts, RunFolder
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import digest, load_checkpoint
from neuronsurgery.sweeps import sweep_in_parts

Row: TypeAlias = dict[str, Any]

ROUNDING: Final = 1e-6
"""A spread that is smaller, relative to the largest value, is what float32 leaves of a constant."""

EARLY: Final = (1, 2, 3, 5, 10)
"""Epochs whose checkpoints are asked, where the run has them."""

SEARCHED: Final = 2
"""How many draws of a size the search for equal damage looks at."""

POOL: Final = 0.1
"""The most critical tenth of the neurons; a quarter of them is cut at a time."""

CLOSE: Final = 1.2
"""How far apart two numbers of random neurons are when the search for equal damage ends."""

GAMMAS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)
GAMMA: Final = 4.0
"""Of AFR where nothing chooses it; a prototype found it by labelled validation images of one data seed."""

AUDITED: Final = 12
SHOWN: Final = 2000
"""Points per group in the picture, all of a smaller group: the embedded data has every training image in it."""

SEED: Final = 20250201


# Inference


def knockout(model: nn.Module, batch: Any, predict: ns.types.Predict | None = None) -> ns.Edit:
    """Return the edit that zeroes the layers that end the last residual branches of a model.

    These are the branches of its last stage. Where all are of one stage, as in a transformer, they are the last quarter
    of them: about as large a part as the last stage of a ResNet is, whose cut was measured.

    Args:
        model: a network with skip connections.
        batch: one batch, to see the residual branches.
        predict: the model's output -> logits.

    Raises:
        ValueError: if the model has no residual branches.
    """
    branches = ns.residual_branches(model, batch, predict=predict)
    last = [branch.layer for branch in branches if branch.stage == branches[-1].stage]
    if len(last) == len(branches):
        last = last[-max(1, len(branches) // 4) :]
    return ns.zero_out(ns.select(ns.find_layout(model), dict.fromkeys(last, ...)))


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a split in the order of its loaders: one group after the other.

    Attributes:
        order: int64 (N,), their places in the split.
        targets: int64 (N,).
        groups: int64 (N,), true ones: to judge by.
    """

    order: Tensor
    targets: Tensor
    groups: Tensor

    @classmethod
    def of(cls, split: Any) -> Examples:
        """Return the examples of a split."""
        order = torch.argsort(split.groups, stable=True)
        return cls(order, split.targets[order], split.groups[order])


def infer(model: nn.Module, data: Any, split: str, edit: ns.Edit) -> ns.InferredGroups:
    """Return class x fragile for the examples of a split, in the order of its loaders.

    Raises:
        ValueError: if a cell has fewer than three examples.
    """
    swept = ns.sweep(model, {"knockout": edit}, data.loaders(split), metric=ns.margin)
    targets = Examples.of(data.splits[split]).targets
    return ns.infer_groups(ns.fragility(swept, targets), targets)


def inferred_loaders(data: Any, split: str, inferred: ns.InferredGroups) -> dict[str, Any]:
    """Return one loader per inferred group of a split: for worst inferred-group accuracy as a validation metric."""
    places = inferred_places(data, split, inferred)
    return {name: readers.batches(data.splits[split].subset(own), 250) for name, own in places.items()}


def inferred_places(data: Any, split: str, inferred: ns.InferredGroups) -> dict[str, Tensor]:
    """Return the places in a split of the examples of each inferred group, int64, by what the group is called."""
    order = Examples.of(data.splits[split]).order
    return {
        f"class {row['class']}, {'fragile' if row['fragile'] else 'not fragile'}": order[
            inferred.groups == row["group"]
        ]
        for row in inferred.to_records()
    }


# The stage


def stage_fragility(folder: RunFolder, data: Any, trained: Trained) -> Row:
    """Return detection, audit and mitigation, as the entry "fragility" of a run, see `Run.of`.

    For a network without residual branches, "impossible" says so; what needs no cut of them is there all the same.

    Args:
        folder: the run folder; what it holds is not done again.
        data: the data set: splits, loaders and group names. Its "held-out" images, distributed as the training images
            but never trained on, are what last layers are retrained on; without them the training images are.
        trained: the trained model and its checkpoints.
    """
    edit, why = None, {}
    try:
        edit = knockout(trained.model, next(iter(next(iter(data.loaders("train").values())))))
    except (ValueError, ns.CaptureError) as error:
        why = {"impossible": str(error)}
    splits = [split for split in ("train", "held-out") if split in data.splits]

    def detected(split: str) -> Row:
        started = time.perf_counter()
        kept = folder.parts(f"fragility-{split}", digest(trained.model.state_dict().values()))
        found = _Detection(folder.settings.draws, data, trained, edit, split, kept).run()
        folder.note_seconds(f"fragility of the {split} images", time.perf_counter() - started)
        return found

    def mitigated() -> list[Row]:
        kept = folder.parts("fragility-mitigation", digest(trained.model.state_dict().values()))
        return mitigate(data, trained.model, edit, splits[-1], folder.settings.seed, kept)

    detection = {split: folder.remember(f"fragility-{split}", functools.partial(detected, split)) for split in splits}
    return {
        **why,
        "edit": [] if edit is None else [layer.parameter for layer in edit.neurons.by_layer()],
        "detection": {split: found["rows"] for split, found in detection.items()},
        "flagged": {split: found["flagged"] for split, found in detection.items()},
        "damage": {split: found["damage"] for split, found in detection.items()},
        "points": detection["train"]["points"],
        "audit": detection["train"]["audit"],
        "images": splits[-1],
        "mitigation": folder.remember("fragility-mitigation", mitigated),
    }


# Detection


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model says of the examples of a split, as it is, under cuts, and as it was early.

    Attributes:
        scores: by name, what the score needs, and the score of each example, (N,), higher for those that stand out.
        damage: by cut, the share of predictions that it changes; of several draws the mean.
    """

    scores: Mapping[str, tuple[str, Tensor]]
    damage: Mapping[str, float]


def ask(
    model: nn.Module,
    data: Any,
    split: str,
    alone: Mapping[str, ns.Edit],
    drawn: Mapping[str, Sequence[ns.Edit]],
    checkpoints: Mapping[int, Path],
    kept: Parts | None = None,
) -> Asked:
    """Return every score that could tell who is memorised: a pass for each that is not kept.

    Args:
        model: the trained model.
        data: the data set.
        split: whose examples are scored, in the order of its loaders.
        alone: by name, cuts that are scores of their own.
        drawn: by name, the draws of a random cut, which are a score together.
        checkpoints: by epoch, early ones to ask.
        kept: the scores that there were before a kill; those that are made are written down in it.
    """
    loaders, targets = data.loaders(split), Examples.of(data.splits[split]).targets
    kept = Parts() if kept is None else kept
    every: dict[str, Sequence[ns.Edit]] = {
        "final margin": [],
        **{name: [edit] for name, edit in alone.items()},
        **drawn,
    }
    cuts = {name: {f"{name}, {draw}": edit for draw, edit in enumerate(edits)} for name, edits in every.items()}
    keys = {name: _key(split, name, edits) for name, edits in cuts.items()}
    left = {name: edits for name, edits in cuts.items() if keys[name] not in kept}
    for name, swept in zip(left, sweep_in_parts(model, left.values(), loaders, metric=ns.margin), strict=True):
        values, flips = joint_fragility(swept, name, targets) if left[name] else (-swept.values(), 0.0)
        kept.keep({keys[name]: [values.tolist(), flips]})
    found = {name: (torch.tensor(kept[key][0], dtype=torch.float64), kept[key][1]) for name, key in keys.items()}
    scores = {name: ("final model, one edit", found[name][0]) for name in alone}
    scores["final margin"] = ("final model", found["final margin"][0])
    for epoch, path in checkpoints.items():
        margins = _margins(load_checkpoint(model, path.parents[1], epoch), loaders, split, kept)
        scores[f"margin after epoch {epoch}"] = (f"checkpoint of epoch {epoch}", -margins)
    for name, edits in drawn.items():
        scores[name] = (f"final model, {len(edits)} draws of {len(edits[0].neurons)}", found[name][0])
    return Asked(scores, {name: found[name][1] for name in (*alone, *drawn)})


def _margins(model: nn.Module, loaders: Mapping[str, Any], split: str, kept: Parts) -> Tensor:
    """The margins of a model as it is, float64 (N,)."""
    key = f"{split}, {digest(model.state_dict().values())}"
    margins = kept.of(key, lambda: ns.sweep(model, {}, loaders, metric=ns.margin).values().tolist())
    return torch.tensor(margins, dtype=torch.float64)


def _key(split: str, name: str, edits: Mapping[str, ns.Edit]) -> str:
    """What a score is kept by: all that it depends on beside the model."""
    return f"{split}, {name}, {' '.join(map(identity, edits.values()))}"


@dataclass(frozen=True, eq=False)
class _Detection:
    """Every score of the examples of one split, and how well each finds the minorities."""

    draws: int
    data: Any
    trained: Trained
    edit: ns.Edit | None
    split: str
    kept: Parts

    def run(self) -> Row:
        examples = Examples.of(self.data.splits[self.split])
        alone = {} if self.edit is None else {"knockout": self.edit}
        # What critical and random neurons do is asked of the training images alone.
        drawn = self._drawn() if self.split == "train" else {}
        early = {epoch: self.trained.checkpoints[epoch] for epoch in EARLY if epoch in self.trained.checkpoints}
        asked = ask(self.trained.model, self.data, self.split, alone, drawn, early, self.kept)
        rows = [
            {"score": name, "needs": needs, **judged}
            for name, (needs, values) in asked.scores.items()
            for judged in judge_scores(values, examples, self.data)
        ]
        sizes = {name: len(edits[0].neurons) for name, edits in drawn.items()}
        damage = [{"cut": name, "neurons": sizes[name], "flips": asked.damage[name]} for name in sizes]
        said: Row = {"rows": rows, "damage": damage, "flagged": {}, "points": [], "audit": []}
        if self.edit is None:
            return said
        remaining = asked.scores["knockout"][1]
        said["flagged"] = _flagged(remaining, examples, self.data)
        if self.split == "train":
            said["points"] = _points(remaining, asked.scores["final margin"][1], examples, self.data)
            said["audit"] = audit(self.data, remaining)
        return said

    def _drawn(self) -> dict[str, list[ns.Edit]]:
        """Return cuts of critical neurons, of as many random ones, and of so many random ones that they do as much."""
        loaders = self.data.loaders("train")
        hard = ns.hard_batch(self.trained.model, itertools.chain.from_iterable(loaders.values()))
        scores = ns.group_grad_norms(self.trained.model, {"hard": [hard]}, where=self.trained.where)
        pool = ns.top_fraction(scores, POOL)
        count = max(1, len(pool) // 4)
        critical = self._cuts(pool, count)
        return {
            "critical neurons": critical,
            "random neurons, equal count": self._cuts(scores.layout, count),
            "random neurons, equal damage": self._as_damaging(critical, scores.layout),
        }

    def _cuts(self, pool: ns.Layout | ns.Neurons, size: int) -> list[ns.Edit]:
        return [ns.zero_out(ns.sample(pool, size, seed=SEED + draw)) for draw in range(self.draws)]

    def _as_damaging(self, critical: Sequence[ns.Edit], layout: ns.Layout) -> list[ns.Edit]:
        """Return the random cuts that come nearest to the damage of the critical ones, found by halving their size."""
        target = self._damage(critical[:SEARCHED])
        low, high = 1, layout.count
        tried: dict[int, float] = {}
        while low not in tried or high > CLOSE * low:
            size = max(low, min(high, round(math.sqrt(low * high))))
            if size in tried:
                break
            tried[size] = self._damage(self._cuts(layout, size)[:SEARCHED])
            low, high = (size, high) if tried[size] < target else (low, size)
        return self._cuts(layout, min(tried, key=lambda size: abs(tried[size] - target)))

    def _damage(self, cuts: Sequence[ns.Edit]) -> float:
        return ask(self.trained.model, self.data, self.split, {}, {"cut": cuts}, {}, self.kept).damage["cut"]


def joint_fragility(swept: ns.Sweep, name: str, targets: Tensor) -> tuple[Tensor, float]:
    """Return the fragility over all draws of one kind of cut, and the mean share of examples that a draw flips.

    Args:
        swept: margins under edits that are called "name, draw".
        name: of the kind.
        targets: the classes, int64 (N,).
    """
    labels = [label for label in swept.labels if label.rpartition(",")[0] == name]
    margins = torch.stack([swept.values(label) for label in labels])
    flips = ((margins > 0) != (swept.values() > 0)).double().mean()
    return ns.fragility(margins, targets), float(flips)


def judge_scores(scores: Tensor, examples: Examples, data: Any) -> list[Row]:
    """Return, for each minority, how well a score tells it from the rest of its class.

    Args:
        scores: (N,), higher for those that should belong to a minority; constant (to rounding) ones tell nothing.
        examples: the N examples; a group of several classes is not foreseen.
        data: the data set, for the names of its groups and for which are minorities.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    rows = []
    for group in data.minority:
        members = examples.groups == group
        if not members.any():
            continue
        within = examples.targets == examples.targets[members][0]
        truth, values = members[within].numpy(), scores[within]
        if truth.all():
            continue
        if values.max() - values.min() <= ROUNDING * values.abs().max():
            values = torch.zeros_like(values)  # rounding differs from batch to batch, and would tell groups apart
        rows.append(
            {
                "group": data.group_names[group],
                "auc": float(roc_auc_score(truth, values)),
                "average_precision": float(average_precision_score(truth, values)),
                "count": int(truth.sum()),
                "of": len(truth),
            }
        )
    return rows


def _flagged(scores: Tensor, examples: Examples, data: Any) -> Row:
    """Return how many examples of each true group the fence calls fragile; or why it cannot be drawn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant scores: the error that follows says more
            inferred = ns.infer_groups(scores, examples.targets)
    except ValueError as error:
        return {"impossible": str(error)}
    flagged = [int((inferred.fragile & (examples.groups == group)).sum()) for group in range(len(data.group_names))]
    return {"fragile": flagged, "thresholds": list(inferred.thresholds)}


def _points(scores: Tensor, margins: Tensor, examples: Examples, data: Any) -> list[Row]:
    """Return the dots of the picture by group: fragility and minus the final margin, evenly thinned."""
    points = []
    for group, name in enumerate(data.group_names):
        members = (examples.groups == group).nonzero().flatten()
        kept = members[torch.linspace(0, len(members) - 1, min(SHOWN, len(members))).round().long()]
        points.append(
            {
                "group": name,
                "of": len(members),
                "fragility": [round(value, 4) for value in scores[kept].tolist()],
                "final": [round(value, 4) for value in margins[kept].tolist()],
            }
        )
    return points


# Audit


def audit(data: Any, scores: Tensor, count: int = AUDITED) -> list[Row]:
    """Return the most fragile training images of each class, each as a PNG: what a person should look at first.

    Args:
        data: the data set.
        scores: the fragility of its training images, (N,), in the order of the loaders.
        count: images per class.
    """
    split = data.splits["train"]
    examples = Examples.of(split)
    rows = []
    for target in sorted(set(examples.targets.tolist())):
        members = (examples.targets == target).nonzero().flatten()
        top = members[scores[members].argsort(descending=True, stable=True)[:count]]
        places = examples.order[top]
        rows.append(
            {
                "class": target,
                "images": [
                    {
                        "index": int(place),
                        "group": data.group_names[int(examples.groups[at])],
                        "fragility": float(scores[at]),
                        "png": shown(split, place),
                    }
                    for at, place in zip(top, places, strict=True)
                ],
            }
        )
    return rows


# Mitigation


@dataclass(frozen=True, eq=False)
class _Bench:
    """Last layers retrained on the same features, judged on the same test images."""

    data: Any
    model: nn.Module
    held: Features
    seed: int
    kept: Parts

    def row(self, name: str, labels: str, images: str, make: Callable[[], LinearRule | tuple[LinearRule, Any]]) -> Row:
        """Return the accuracies of one rule, or why it cannot be fitted."""
        row: Row = self.kept.of(name, lambda: self._row({"name": name, "labels": labels, "images": images}, make))
        return row

    def _row(self, said: Row, make: Callable[[], LinearRule | tuple[LinearRule, Any]]) -> Row:
        try:
            made = make()
            rule, chosen = made if not isinstance(made, LinearRule) else (made, None)
            edited = ns.apply(retrained(self.model, *rule, head=self.held.head), self.model)
        except ValueError as error:
            return {**said, "impossible": str(error)}
        accuracies = {
            split: list(ns.evaluate(edited, self.data.loaders(split)).values) for split in ("validation", "test")
        }
        return {**said, "chosen": chosen, **accuracies, "worst": min(accuracies["test"])}

    def balanced(self, groups: Tensor) -> LinearRule:
        """Return the last layer fitted to balanced subsets of these groups."""
        return balanced_logistic(self.held.features, self.held.targets, groups, seed=self.seed)

    def weighted(self, groups: Tensor) -> LinearRule:
        """Return the last layer fitted to all images, each of these groups weighing the same."""
        return weighted_logistic(self.held.features, self.held.targets, groups)


def mitigate(
    data: Any, model: nn.Module, edit: ns.Edit | None, split: str, seed: int, kept: Parts | None = None
) -> list[Row]:
    """Return every way to retrain the last layer on a split, with the labels that each takes.

    Args:
        data: the data set.
        model: the trained model.
        edit: what is cut to infer groups, see `knockout`; None where there is no branch to cut.
        split: the images to retrain on.
        seed: of the balanced subsets.
        kept: the rows that there were before a kill; those that are made are written down in it.
    """
    start = {"name": "ERM", "labels": "class", "images": "-", "chosen": None, **_accuracies(model, data)}
    try:
        held = extract_features(model, data.loaders(split))
    except ValueError as error:  # the network does not end in a linear layer
        return [start, {"name": "last layer", "labels": "class", "images": split, "impossible": str(error)}]
    bench = _Bench(data, model, held, seed, Parts() if kept is None else kept)
    validation = extract_features(model, data.loaders("validation"))
    train_features = extract_features(model, data.loaders("train")).features
    logits = last_logits(model, held.features, head=held.head)
    true = Examples.of(data.splits[split]).groups

    def inferred() -> Tensor:
        if edit is None:
            raise ValueError("no groups are inferred: the network has no residual branch to cut")
        return infer(model, data, split, edit).groups

    def by_final_loss() -> Tensor:
        margins = ns.sweep(model, {}, data.loaders(split), metric=ns.margin).values()
        return ns.infer_groups(-margins, held.targets).groups

    def by_validation() -> tuple[LinearRule, Any]:
        found = tuned_afr(held.features, held.targets, logits, validation, gammas=GAMMAS)
        return found.rule, found.chosen

    return [
        start,
        bench.row("class-balanced", "class", split, lambda: bench.balanced(held.targets)),
        bench.row("inferred by final loss", "class", split, lambda: bench.balanced(by_final_loss())),
        bench.row("inferred by knockout", "class", split, lambda: bench.balanced(inferred())),
        bench.row("inferred by knockout, weighted", "class", split, lambda: bench.weighted(inferred())),
        bench.row("true groups", "class, group", split, lambda: bench.balanced(true)),
        bench.row(
            f"AFR, gamma {GAMMA:g}",
            "class (gamma: group labels of other data)",
            split,
            lambda: afr(held.features, held.targets, logits, gamma=GAMMA),
        ),
        bench.row(
            "AFR, gamma by inferred groups",
            "class",
            split,
            lambda: tuned_on_halves(held, logits, inferred(), seed),
        ),
        bench.row(
            "AFR, gamma by worst class",
            "class",
            split,
            lambda: tuned_on_halves(held, logits, held.targets, seed),
        ),
        bench.row("AFR, gamma by validation groups", "class; group of validation images", split, by_validation),
        bench.row(
            "DFR", "class and group of validation images", "validation", lambda: _dfr(validation, train_features, seed)
        ),
    ]


def _accuracies(model: nn.Module, data: Any) -> Row:
    """Return the accuracies per group on validation and test images, and the worst of the latter."""
    found = {split: list(ns.evaluate(model, data.loaders(split)).values) for split in ("validation", "test")}
    return {**found, "worst": min(found["test"])}


def tuned_on_halves(held: Features, logits: Tensor, groups: Tensor, seed: int) -> tuple[LinearRule, float]:
    """Return AFR's rule and its gamma, which does best for the worst group of the half that it is not fitted on.

    Args:
        held: the images to retrain on.
        logits: (N, C), of the model before retraining.
        groups: int (N,), to judge by; no true ones are needed.
        seed: of the halves; both are fitted in turn, of three splits.
    """
    total = dict.fromkeys(GAMMAS, 0.0)
    for number in range(3):
        order = torch.from_numpy(permutation(len(groups), "halves", seed, number))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for fitted, judged in (halves, halves[::-1]):
            by = Features(held.features[judged], held.targets[judged], groups[judged])
            part = tuned_afr(held.features[fitted], held.targets[fitted], logits[fitted], by, gammas=GAMMAS)
            total = {gamma: total[gamma] + part.accuracies[gamma] for gamma in GAMMAS}
    chosen = max(total, key=total.__getitem__)
    return afr(held.features, held.targets, logits, gamma=chosen), chosen


def _dfr(validation: Features, train_features: Tensor, seed: int) -> tuple[LinearRule, Any]:
    found = dfr(validation, train_features, seed=seed)
    return found.rule, found.chosen
