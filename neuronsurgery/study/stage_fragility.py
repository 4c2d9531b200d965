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
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study import last_layer
from neuronsurgery.study.data import permutation
from neuronsurgery.study.experiments import identity
from neuronsurgery.study.last_layer import GAMMAS, Features, LinearRule, Tuned
from neuronsurgery.study.pictures import shown
from neuronsurgery.study.run import Parts, RunFolder
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import digest, load_checkpoint
from neuronsurgery.sweeps import sweep_in_parts

Row: TypeAlias = dict[str, Any]

ROUNDING: Final = 1e-6  # relative to the largest value: a smaller spread is what float32 leaves of a constant
EARLY: Final = (1, 2, 3, 5, 10)  # epochs whose checkpoints are asked, where the run has them
POOL: Final = 0.1  # the most critical tenth of the neurons, of which a quarter is cut at a time
SEARCHED: Final = 2  # draws of a size that the search for equal damage looks at
CLOSE: Final = 1.2  # how far apart two numbers of random neurons are when it ends
GAMMA: Final = 4.0  # of AFR where nothing chooses it: a prototype's, by labelled validation images of one data seed
AUDITED: Final = 12  # images of each class
SHOWN: Final = 2000  # points per group in the picture, all of a smaller group
SEED: Final = 20250201


# Inference


def knockout(model: nn.Module, batch: Any, predict: ns.types.Predict | None = None) -> ns.Edit:
    """Return the edit that zeroes the layers that end the last residual branches of a model, seen on a batch.

    These are the branches of its last stage. Where all are of one stage, as in a transformer, they are the last quarter
    of them: about as large a part as the last stage of a ResNet is, whose cut was measured. Without residual branches,
    it raises a ValueError.
    """
    branches = ns.residual_branches(model, batch, predict=predict)
    last = [branch.layer for branch in branches if branch.stage == branches[-1].stage]
    if len(last) == len(branches):
        last = last[-max(1, len(branches) // 4) :]
    return ns.zero_out(ns.select(ns.find_layout(model), dict.fromkeys(last, ...)))


class Examples(NamedTuple):
    """The examples of a split in the order of its loaders, one group after the other, int64 (N,) each.

    `order` are their places in the split, and `groups` the true ones: to judge by.
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

    A cell of fewer than three examples raises a ValueError.
    """
    swept = ns.sweep(model, {"knockout": edit}, data.loaders(split), metric=ns.margin)
    targets = Examples.of(data.splits[split]).targets
    return ns.infer_groups(ns.fragility(swept, targets), targets)


def inferred_places(data: Any, split: str, inferred: ns.InferredGroups) -> dict[str, Tensor]:
    """Return the places in a split of the examples of each inferred group, int64, by what the group is called."""
    order = Examples.of(data.splits[split]).order
    names = [f"class {row['class']}, {'not ' * (not row['fragile'])}fragile" for row in inferred.to_records()]
    return {name: order[inferred.groups == group] for group, name in enumerate(names)}


# The stage


def stage_fragility(folder: RunFolder, data: Any, trained: Trained) -> Row:
    """Return detection, audit and mitigation, as the entry "fragility" of a run, see `Run.of`.

    For a network without residual branches, "impossible" says so; what needs no cut of them is there all the same. Last
    layers are retrained on the "held-out" images, distributed as the training images but never trained on, or else on
    the training images. What the folder holds is not done again.
    """
    edit, why = None, {}
    try:
        edit = knockout(trained.model, next(iter(next(iter(data.loaders("train").values())))))
    except (ValueError, ns.CaptureError) as error:
        why = {"impossible": str(error)}
    splits = [split for split in ("train", "held-out") if split in data.splits]
    weights = digest(trained.model.state_dict().values())

    def detected(split: str) -> Row:
        started = time.perf_counter()
        found = _detect(data, trained, edit, split, folder.settings.draws, folder.parts(f"fragility-{split}", weights))
        folder.note_seconds(f"fragility of the {split} images", time.perf_counter() - started)
        return found

    def mitigated() -> list[Row]:
        kept = folder.parts("fragility-mitigation", weights)
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


class Asked(NamedTuple):
    """What a model says of the examples of a split, as it is, under cuts, and as it was early.

    `scores` are, by name, what the score needs, and the score of each example, (N,), higher for those that stand out;
    `damage` by cut, the share of predictions that it changes, of several draws the mean.
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
    """Return every score that could tell who is memorised, of the examples in the order of the loaders.

    Cuts `alone` are scores of their own, the draws of a random cut are one together, and so is each early checkpoint,
    by its epoch. `kept` has the scores that there were before a kill; those that are made are written down in it.
    """
    loaders, targets = data.loaders(split), Examples.of(data.splits[split]).targets
    kept = Parts() if kept is None else kept
    every = {"final margin": [], **{name: [edit] for name, edit in alone.items()}, **drawn}
    weights = digest(model.state_dict().values())
    keys = {name: f"{split}, {weights}, {name}, {' '.join(map(identity, edits))}" for name, edits in every.items()}
    left = [name for name in every if keys[name] not in kept]
    parts = ({str(draw): edit for draw, edit in enumerate(every[name])} for name in left)
    for name, swept in zip(left, sweep_in_parts(model, parts, loaders, metric=ns.margin), strict=True):
        margins = torch.stack([swept.values(label) for label in swept.labels or [None]])
        flips = ((margins > 0) != (swept.values() > 0)).double().mean()
        kept.keep({keys[name]: [ns.fragility(margins, targets).tolist(), float(flips)]})
    values = {name: torch.tensor(kept[key][0], dtype=torch.float64) for name, key in keys.items()}
    scores = {name: ("final model, one edit", values[name]) for name in alone}
    scores["final margin"] = ("final model", values["final margin"])
    for epoch, path in checkpoints.items():
        early = ask(load_checkpoint(model, path.parents[1], epoch), data, split, {}, {}, {}, kept)
        scores[f"margin after epoch {epoch}"] = (f"checkpoint of epoch {epoch}", early.scores["final margin"][1])
    for name, edits in drawn.items():
        scores[name] = (f"final model, {len(edits)} draws of {len(edits[0].neurons)}", values[name])
    return Asked(scores, {name: kept[keys[name]][1] for name in (*alone, *drawn)})


def _detect(data: Any, trained: Trained, edit: ns.Edit | None, split: str, draws: int, kept: Parts) -> Row:
    """Return every score of the examples of one split, and how well each finds the minorities."""
    examples = Examples.of(data.splits[split])
    alone = {} if edit is None else {"knockout": edit}
    # What critical and random neurons do is asked of the training images alone.
    drawn = _draw_cuts(data, trained, draws, kept) if split == "train" else {}
    early = {epoch: trained.checkpoints[epoch] for epoch in EARLY if epoch in trained.checkpoints}
    scores, flips = ask(trained.model, data, split, alone, drawn, early, kept)
    said: Row = {
        "rows": [
            {"score": name, "needs": needs, **judged}
            for name, (needs, values) in scores.items()
            for judged in judge_scores(values, examples, data)
        ],
        "damage": [
            {"cut": name, "neurons": len(cuts[0].neurons), "flips": flips[name]} for name, cuts in drawn.items()
        ],
        "flagged": {},
        "points": [],
        "audit": [],
    }
    if edit is not None:
        remaining = scores["knockout"][1]
        said["flagged"] = _flagged(remaining, examples, data)
        if split == "train":
            said["points"] = _points(remaining, scores["final margin"][1], examples, data)
            said["audit"] = audit(data, remaining)
    return said


def _draw_cuts(data: Any, trained: Trained, draws: int, kept: Parts) -> dict[str, list[ns.Edit]]:
    """Return cuts of critical neurons, of as many random ones, and of so many random ones that they do as much damage.

    How many that are is found by halving.
    """
    model, loaders = trained.model, data.loaders("train")
    hard = ns.hard_batch(model, itertools.chain.from_iterable(loaders.values()))
    scores = ns.group_grad_norms(model, {"hard": [hard]}, where=trained.where)
    pool = ns.top_fraction(scores, POOL)

    def cuts(source: ns.Layout | ns.Neurons, size: int) -> list[ns.Edit]:
        return [ns.zero_out(ns.sample(source, size, seed=SEED + draw)) for draw in range(draws)]

    def damage(edits: Sequence[ns.Edit]) -> float:
        return ask(model, data, "train", {}, {"cut": edits[:SEARCHED]}, {}, kept).damage["cut"]

    critical, alike = (cuts(source, max(1, len(pool) // 4)) for source in (pool, scores.layout))
    target, tried = damage(critical), dict[int, float]()
    low, high = 1, scores.layout.count
    while low not in tried or high > CLOSE * low:
        size = max(low, min(high, round(math.sqrt(low * high))))
        if size in tried:
            break
        tried[size] = damage(cuts(scores.layout, size))
        low, high = (size, high) if tried[size] < target else (low, size)
    nearest = min(tried, key=lambda size: abs(tried[size] - target))
    return {
        "critical neurons": critical,
        "random neurons, equal count": alike,
        "random neurons, equal damage": cuts(scores.layout, nearest),
    }


def judge_scores(scores: Tensor, examples: Examples, data: Any) -> list[Row]:
    """Return, for each minority of the data, how well a score, (N,), tells it from the rest of its class.

    Scores that are constant (to rounding) tell nothing; a group of several classes is not foreseen.
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
        fragility, final = ([round(value, 4) for value in values[kept].tolist()] for values in (scores, margins))
        points.append({"group": name, "of": len(members), "fragility": fragility, "final": final})
    return points


def audit(data: Any, scores: Tensor, count: int = AUDITED) -> list[Row]:
    """Return the most fragile training images of each class, each as a PNG: what a person should look at first.

    The scores are the fragility of all training images, (N,), in the order of the loaders.
    """
    split = data.splits["train"]
    examples = Examples.of(split)
    rows = []
    for target in sorted(set(examples.targets.tolist())):
        members = (examples.targets == target).nonzero().flatten()
        images = [
            {
                "index": int(examples.order[at]),
                "group": data.group_names[int(examples.groups[at])],
                "fragility": float(scores[at]),
                "png": shown(split, examples.order[at]),
            }
            for at in members[scores[members].argsort(descending=True, stable=True)[:count]]
        ]
        rows.append({"class": target, "images": images})
    return rows


# Mitigation


def mitigate(
    data: Any, model: nn.Module, edit: ns.Edit | None, split: str, seed: int, kept: Parts | None = None
) -> list[Row]:
    """Return every way to retrain the last layer on the images of a split, with the labels that each takes.

    `edit` is what is cut to infer groups, see `knockout`; None where there is no branch to cut. The seed is that of the
    balanced subsets. `kept` has the rows that there were before a kill.
    """
    kept = Parts() if kept is None else kept
    start = {"name": "ERM", "labels": "class", "images": "-", "chosen": None, **_accuracies(model, data)}
    try:
        held = last_layer.extract_features(model, data.loaders(split))
    except ValueError as error:  # the network does not end in a linear layer
        return [start, {"name": "last layer", "labels": "class", "images": split, "impossible": str(error)}]
    ways = _ways_to_retrain(data, model, edit, split, seed, held)

    def row(name: str) -> Row:
        labels, fit = ways[name]
        said = {"name": name, "labels": labels, "images": "validation" if name == "DFR" else split}
        try:
            fitted = fit()
            rule, chosen = (fitted.rule, fitted.chosen) if isinstance(fitted, Tuned) else (fitted, None)
            edited = ns.apply(last_layer.retrained(model, *rule, head=held.head), model)
        except ValueError as error:
            return {**said, "impossible": str(error)}
        return {**said, "chosen": chosen, **_accuracies(edited, data)}

    return [start, *(kept.of(name, functools.partial(row, name)) for name in ways)]


def _ways_to_retrain(
    data: Any, model: nn.Module, edit: ns.Edit | None, split: str, seed: int, held: Features
) -> dict[str, tuple[str, Callable[[], LinearRule | Tuned]]]:
    """Return by name the labels that a way takes, and its fit, which raises a ValueError where it is impossible."""
    validation = last_layer.extract_features(model, data.loaders("validation"))
    train_features = last_layer.extract_features(model, data.loaders("train")).features
    logits = last_layer.last_logits(model, held.features, head=held.head)
    examples = held.features, held.targets

    def balanced(groups: Tensor) -> LinearRule:
        return last_layer.balanced_logistic(*examples, groups, seed=seed)

    def knocked_out() -> Tensor:
        if edit is None:
            raise ValueError("no groups are inferred: the network has no residual branch to cut")
        return infer(model, data, split, edit).groups

    def by_final_loss() -> Tensor:
        margins = ns.sweep(model, {}, data.loaders(split), metric=ns.margin).values()
        return ns.infer_groups(-margins, held.targets).groups

    return {
        "class-balanced": ("class", lambda: balanced(held.targets)),
        "inferred by final loss": ("class", lambda: balanced(by_final_loss())),
        "inferred by knockout": ("class", lambda: balanced(knocked_out())),
        "inferred by knockout, weighted": ("class", lambda: last_layer.weighted_logistic(*examples, knocked_out())),
        "true groups": ("class, group", lambda: balanced(Examples.of(data.splits[split]).groups)),
        f"AFR, gamma {GAMMA:g}": (
            "class (gamma: group labels of other data)",
            lambda: last_layer.afr(*examples, logits, gamma=GAMMA),
        ),
        "AFR, gamma by inferred groups": ("class", lambda: tuned_on_halves(held, logits, knocked_out(), seed)),
        "AFR, gamma by worst class": ("class", lambda: tuned_on_halves(held, logits, held.targets, seed)),
        "AFR, gamma by validation groups": (
            "class; group of validation images",
            lambda: last_layer.tuned_afr(*examples, logits, validation),
        ),
        "DFR": ("class and group of validation images", lambda: last_layer.dfr(validation, train_features, seed=seed)),
    }


def _accuracies(model: nn.Module, data: Any) -> Row:
    """Return the accuracies per group on validation and test images, and the worst of the latter."""
    found = {split: list(ns.evaluate(model, data.loaders(split)).values) for split in ("validation", "test")}
    return {**found, "worst": min(found["test"])}


def tuned_on_halves(held: Features, logits: Tensor, groups: Tensor, seed: int) -> Tuned:
    """Return AFR with the gamma that does best for the worst group of the half that it is not fitted on.

    Both halves are fitted in turn, of three splits. The groups, int (N,), need not be true ones.
    """
    total = dict.fromkeys(GAMMAS, 0.0)
    for number in range(3):
        order = torch.from_numpy(permutation(len(groups), "halves", seed, number))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for fitted, judged in (halves, halves[::-1]):
            by = Features(held.features[judged], held.targets[judged], groups[judged])
            part = last_layer.tuned_afr(held.features[fitted], held.targets[fitted], logits[fitted], by)
            total = {gamma: total[gamma] + part.accuracies[gamma] for gamma in GAMMAS}
    chosen = max(total, key=total.__getitem__)
    accuracies = {gamma: value / 6 for gamma, value in total.items()}
    return Tuned(last_layer.afr(held.features, held.targets, logits, gamma=chosen), chosen, accuracies)
