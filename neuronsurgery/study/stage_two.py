"""Stage 2: the paper's fine-tuning, the controls that tell what in it helps, and the methods it is compared with.

Every method is an `Arm`: what it starts from, on which images, minimising what, for how long. An arm is trained in a
folder of its own, taken up where it was killed, and judged after every epoch on validation and test images. Which epoch
counts is decided afterwards, by each rule of `SELECTIONS`, so that no arm gets more labels than another in silence.

Rules that set sizes look at the training images alone; nothing is tuned on test images.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.objectives import jtt_weights
from neuronsurgery.study import readers
from neuronsurgery.study.last_layer import REFITS, STRENGTHS, dfr, extract_features, retrained
from neuronsurgery.study.methods import (
    FINE_TUNING,
    IDENTIFICATION_SHARES,
    ContrastiveBatches,
    ContrastivePruning,
    CorrectNContrast,
    GroupBalanced,
    GroupDro,
    SplitSource,
    Upsampled,
    error_set,
    group_dro_step_size,
    identification_epoch,
    jtt_upsampling,
    predictions,
    refuse_other_heads,
    unaugmented,
)
from neuronsurgery.study.run import RunFolder
from neuronsurgery.study.stage_fragility import infer, inferred_places, knockout
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import (
    Erm,
    Hardware,
    Method,
    Recipe,
    Source,
    checkpoint_epochs,
    checkpoint_path,
    digest,
    load_checkpoint,
    read_trajectory,
    train,
)

Row: TypeAlias = dict[str, Any]

SELECTIONS: Final[Mapping[str, str]] = {
    "last epoch": "no labels",
    "class labels": "class labels of held-out images",
    "inferred groups": "class labels of held-out images; their groups are inferred from the ERM model",
    "worst group": "group labels of validation images",
}
"""How the epoch of an arm is chosen, and which labels that takes beyond those of training."""

RATES: Final = (2e-4, 1e-3)
MORE_RATES: Final = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3)
"""Rates of ERM continued, the fair baseline; with `--full` a wider search."""

CONTINUED: Final = "ERM continued"
HELD_OUT_TOO: Final = "held-out images too"


@dataclass(frozen=True, eq=False)
class Training:
    """What an arm is trained with.

    Attributes:
        start: the weights before training.
        source: the images.
        method: what is minimised.
        recipe: how, and for how many epochs.
        given: what else the results are to say of it, as JSON values.
    """

    start: nn.Module
    source: Source
    method: Method
    recipe: Recipe
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Row:
        """All that the results say of it."""
        return {"recipe": asdict(self.recipe), **self.method.describe(), **self.given}


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train.

    Attributes:
        name: short, for tables and figures.
        family: "paper", "control" (what separates the paper's ingredients) or "comparison" (other methods).
        text: what is done.
        labels: which labels training takes.
        make: what it is trained with; called when the arm is trained, since some make a first pass over the images,
            or train a first stage.
        choice: arms of one choice are one method, whose rate or first stage is chosen together with the epoch.
        held_out: whether it is also trained on the held-out images, which then cannot choose its epoch.
    """

    name: str
    family: str
    text: str
    labels: str
    make: Callable[[], Training]
    choice: str | None = None
    held_out: bool = False

    @property
    def slug(self) -> str:
        """The name as that of a folder."""
        return _slug(self.name)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, eq=False)
class Setting:
    """What the arms are made from.

    Attributes:
        trained: the ERM model and its checkpoints.
        source: the training images, picked one by one.
        recipe: of the ERM run.
        seed: of the run.
        groups: the training images of each group.
        pretrained: whether the first weights came from a file.
        fine_tuning_epochs: of the paper's method and its controls.
        comparison_epochs: of the methods that train from the first weights again.
        rates: of ERM continued.
        joined: the training and the held-out images together, to give those methods the images that last layers are
            retrained on; None leaves these arms out.
        comparisons: the recipes of comparison methods that have one of their own, for their first stages too; the
            others have that of the ERM run, which then is their first stage.
        contrast_temperature: of Correct-n-Contrast.
        strengths: values of C that DFR chooses from.
        full: whether there is time for the arms of `MORE_VARIANTS` as well.
    """

    trained: Trained
    source: SplitSource
    recipe: Recipe
    seed: int
    groups: tuple[int, ...]
    pretrained: bool
    fine_tuning_epochs: int
    comparison_epochs: int
    rates: Sequence[float] = RATES
    joined: SplitSource | None = None
    comparisons: Mapping[str, Recipe] = field(default_factory=dict)
    contrast_temperature: float = 0.1
    strengths: Sequence[float] = STRENGTHS
    full: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the ERM run."""
        return self.trained.checkpoints[0].parents[1]

    def checkpoint(self, epoch: int) -> nn.Module:
        """The ERM model after an epoch."""
        return load_checkpoint(self.trained.model, self.folder, epoch)

    @property
    def early(self) -> list[int]:
        """The epochs of the first stage whose mistakes JTT and CnC go by, as shares of the ERM run."""
        return sorted({identification_epoch(self.recipe.epochs, share) for share in IDENTIFICATION_SHARES})

    def comparison(self, method: str) -> Recipe:
        """The recipe of a method that trains from the first weights: its own where it has one."""
        return replace(self.comparisons.get(method, self.recipe), epochs=self.comparison_epochs)

    def first_stage(self, method: str) -> Recipe | None:
        """The recipe of the first stage that a method trains for itself; None where it goes by the ERM run."""
        own = self.comparisons.get(method)
        return None if own is None else replace(own, epochs=max(self.early))


def make_arms(setting: Setting, hardware: Hardware | None = None) -> list[Arm]:
    """Return every arm that is trained: the paper's, its controls, and the comparisons.

    Args:
        setting: what they are made from.
        hardware: of first stages that have to be trained; default as that of `train`.
    """
    hardware = hardware or Hardware()
    arms = [*_continued(setting), *_contrastive(setting), *_comparisons(setting, setting.source, hardware)]
    if setting.joined is None:
        return arms
    more = [_from_scratch(setting, setting.joined), *_comparisons(setting, setting.joined, hardware)]
    return arms + [
        replace(
            arm,
            name=f"{arm.name}, {HELD_OUT_TOO}",
            text=f"{arm.text}; on training and held-out images",
            choice=arm.choice and f"{arm.choice}, {HELD_OUT_TOO}",
            held_out=True,
        )
        for arm in more
    ]


def _from_scratch(setting: Setting, source: SplitSource) -> Arm:
    def make() -> Training:
        recipe = replace(setting.recipe, epochs=setting.comparison_epochs)
        return Training(setting.checkpoint(0), source, Erm(), recipe)

    return Arm("ERM", "comparison", "empirical risk minimisation from the first weights", "class", make)


def _continued(setting: Setting) -> list[Arm]:
    def make(rate: float) -> Training:
        recipe = replace(FINE_TUNING, learning_rate=rate, epochs=setting.fine_tuning_epochs)
        return Training(setting.trained.model, setting.source, Erm(), recipe)

    return [
        Arm(
            f"{CONTINUED}, rate {rate:g}",
            "control",
            f"the ERM model trained on by cross entropy alone, for as many epochs, at a rate of {rate:g}",
            "class",
            functools.partial(make, rate),
            choice=CONTINUED,
        )
        for rate in setting.rates
    ]


VARIANTS: Final[Sequence[tuple[str, str, str, Mapping[str, Any]]]] = (
    (
        "pruned by gradient",
        "paper",
        "the neurons of largest gradient on the hardest images pruned; the supervised term is the cross entropy of the "
        "logits, with a weight of 1",
        {},
    ),
    ("pruned by magnitude", "paper", "the neurons of largest magnitude pruned", {"criterion": "magnitude"}),
    (
        "slides' objective",
        "paper",
        "pruned by gradient, the supervised term being 0.2 times the squared error of the softmax outputs",
        {"supervised": "mse", "weight": 0.2},
    ),
    (
        "pruned, own statistics",
        "paper",
        "pruned by gradient, the twin's pass kept out of the batch-norm statistics that the network is judged with",
        {"statistics": "own"},
    ),
    ("nothing pruned", "control", "the same loss, the twin having all neurons", {"criterion": "none"}),
    ("random pruned", "control", "the same loss, as many random neurons pruned", {"criterion": "random"}),
)
"""Name, family, text, and what differs from `ContrastivePruning`'s defaults."""

MORE_VARIANTS: Final[Sequence[tuple[str, str, str, Mapping[str, Any]]]] = (
    (
        "random pruned, own statistics",
        "control",
        "random neurons pruned, the twin's pass kept out of the batch-norm statistics that the network is judged with",
        {"criterion": "random", "statistics": "own"},
    ),
)
"""With `--full`."""


def _contrastive(setting: Setting) -> list[Arm]:
    def make(options: Mapping[str, Any]) -> Training:
        method = ContrastivePruning(unaugmented(setting.source), setting.trained.where, **options)
        recipe = replace(FINE_TUNING, epochs=setting.fine_tuning_epochs)
        return Training(setting.trained.model, setting.source, method, recipe)

    return [
        Arm(
            name,
            family,
            f"fine-tuned against a twin that shares the weights: {text}",
            "class",
            functools.partial(make, options),
        )
        for name, family, text, options in (*VARIANTS, *(MORE_VARIANTS if setting.full else ()))
    ]


def _comparisons(setting: Setting, source: SplitSource, hardware: Hardware) -> list[Arm]:
    return [
        *(_jtt(setting, source, early, hardware) for early in setting.early),
        *(_cnc(setting, source, early, hardware) for early in setting.early),
        Arm(
            "Group DRO",
            "comparison",
            "Group DRO: from the first weights, groups sampled alike and weighted by their losses",
            "class, group",
            functools.partial(_group_dro, setting, source),
        ),
    ]


def _jtt(setting: Setting, source: SplitSource, early: int, hardware: Hardware) -> Arm:
    text = (
        f"Just Train Twice: from the first weights, the images that {_first_words(setting, 'JTT', early)} gets wrong "
        f"being half of an epoch"
    )
    make = functools.partial(_train_twice, setting, source, early, hardware)
    return Arm(f"JTT, T = {early}", "comparison", text, "class", make, choice="JTT")


def _train_twice(setting: Setting, source: SplitSource, early: int, hardware: Hardware) -> Training:
    errors = error_set(_first_stage(setting, source, "JTT", early, hardware), unaugmented(source))
    upsampling = jtt_upsampling(errors)
    upsampled = Upsampled(source, jtt_weights(errors, upsampling))
    # As many steps as the others make: an epoch with copies has more.
    fewer = max(1, round(setting.comparison_epochs * len(source) / len(upsampled)))
    recipe = replace(setting.comparison("JTT"), epochs=fewer)
    given = {"name": "just train twice", "errors": int(errors.sum()), "upsampling": upsampling}
    given |= _first_settings(setting, "JTT", early)
    return Training(setting.checkpoint(0), upsampled, Erm(), recipe, given)


def _cnc(setting: Setting, source: SplitSource, early: int, hardware: Hardware) -> Arm:
    text = (
        f"Correct-n-Contrast: from the first weights, features of a class brought together across the predictions of "
        f"{_first_words(setting, 'CnC', early)}"
    )
    make = functools.partial(_contrast, setting, source, early, hardware)
    return Arm(f"CnC, T = {early}", "comparison", text, "class", make, choice="CnC")


def _contrast(setting: Setting, source: SplitSource, early: int, hardware: Hardware) -> Training:
    start = setting.checkpoint(0)
    refuse_other_heads(start, unaugmented(source, size=2))
    predicted = predictions(_first_stage(setting, source, "CnC", early, hardware), unaugmented(source))
    statistics: Literal["frozen", "batch"] = "frozen" if setting.pretrained else "batch"
    method = CorrectNContrast(temperature=setting.contrast_temperature, statistics=statistics)
    given = _first_settings(setting, "CnC", early)
    return Training(start, ContrastiveBatches(source, predicted), method, setting.comparison("CnC"), given)


def _group_dro(setting: Setting, source: SplitSource) -> Training:
    recipe = setting.comparison("Group DRO")
    steps = recipe.epochs * -(-len(source) // recipe.batch_size)
    method = GroupDro(len(setting.groups), group_dro_step_size(steps))
    return Training(setting.checkpoint(0), GroupBalanced(source), method, recipe)


# First stages


def _first_stage(setting: Setting, source: SplitSource, method: str, early: int, hardware: Hardware) -> nn.Module:
    """Return the network of an early epoch by which JTT or CnC goes: of the ERM run, or of a first stage of its own.

    Such a stage is trained once for all early epochs, by empirical risk minimisation on the method's images, and of its
    checkpoints only theirs are kept. With a constant rate, as all recipes of `comparisons` have, an early epoch is what
    a shorter training ends with.

    Raises:
        RuntimeError: where `train` raises a ValueError, which of an arm would be taken for a finding about the data.
    """
    recipe = setting.first_stage(method)
    if recipe is None:
        return setting.checkpoint(early)
    name = f"{method} first stage" + (f", {HELD_OUT_TOO}" if source is setting.joined else "")
    folder, start = setting.folder / "stage-2" / _slug(name), setting.checkpoint(0)
    try:
        train(start, source, folder, recipe=recipe, seed=setting.seed, hardware=hardware)
    except ValueError as error:
        raise RuntimeError(f"the first stage of {method} could not be trained: {error}") from error
    for epoch in set(checkpoint_epochs(folder)).difference(setting.early):
        checkpoint_path(folder, epoch).unlink()
    return load_checkpoint(start, folder, early)


def _first_words(setting: Setting, method: str, early: int) -> str:
    if setting.first_stage(method) is None:
        return f"the ERM model of epoch {early}"
    return f"the model of epoch {early} of a first stage with the method's own settings"


def _first_settings(setting: Setting, method: str, early: int) -> Row:
    recipe = setting.first_stage(method)
    return {"epoch": early} | ({} if recipe is None else {"first_stage": asdict(recipe)})


# Running


def stage_two(folder: RunFolder, data: Any, setting: Setting, hardware: Hardware, *, progress: bool = True) -> Row:
    """Return what every arm came to, as the entry "stage_two" of a run, see `Run.of`.

    Args:
        folder: the run folder; arms that it holds are not trained again.
        data: the data set: loaders, group names and counts per split.
        setting: what the arms are made from.
        hardware: of training.
        progress: whether to write lines of progress to standard error.
    """
    judge = _Judge.by(folder, data, setting.trained.model)
    counts = {split: data.splits[split].counts for split in ("train", *judge.splits)} | judge.inferred_counts
    rows = [
        _start(folder, judge, setting),
        *(_train_arm(folder, judge, setting, arm, hardware, progress) for arm in make_arms(setting, hardware)),
        folder.remember("stage-2-dfr", lambda: _dfr(judge, setting, data)),
    ]
    return {
        "fine_tuning_epochs": setting.fine_tuning_epochs,
        "comparison_epochs": setting.comparison_epochs,
        "splits": judge.splits,
        "selections": dict(SELECTIONS),
        "class_labels_of": judge.unlabelled,
        "not_inferred": judge.not_inferred,
        "train_counts": list(setting.groups),
        "arms": select(rows, counts, judge.unlabelled),
    }


class _Judge:
    """Accuracy per group of a model on all images that Stage 2 looks at."""

    def __init__(
        self, data: Any, unlabelled: str, inferred: Mapping[str, Any], not_inferred: str | None = None
    ) -> None:
        self.data = data
        self.unlabelled = unlabelled
        self.inferred = inferred
        self.not_inferred = not_inferred
        self.splits = ["validation", "test"]
        if not inferred and unlabelled == "held-out":  # else by inferred group: the same images, seen once
            self.splits.append("held-out")

    @classmethod
    def by(cls, folder: RunFolder, data: Any, model: nn.Module) -> _Judge:
        """Return a judge that also goes by the groups that the ERM model's fragility infers, where it infers any."""
        unlabelled = "held-out" if "held-out" in data.splits else "validation"

        def inferred() -> Row:
            try:
                edit = knockout(model, next(iter(next(iter(data.loaders("train").values())))))
                places = inferred_places(data, unlabelled, infer(model, data, unlabelled, edit))
            except (ValueError, ns.CaptureError) as error:  # no skip connections, or nobody stands out
                return {"impossible": str(error)}
            return {"places": {name: own.tolist() for name, own in places.items()}}

        found = folder.remember("stage-2-inferred", inferred)
        if "impossible" in found:
            return cls(data, unlabelled, {}, found["impossible"])
        split = data.splits[unlabelled]
        places = {name: torch.tensor(own, dtype=torch.int64) for name, own in found["places"].items()}
        return cls(data, unlabelled, {name: readers.batches(split.subset(own), 250) for name, own in places.items()})

    @property
    def inferred_counts(self) -> dict[str, list[int]]:
        """The number of images in each inferred group, under "inferred"; nothing where there are none."""
        return {"inferred": [len(loader.split) for loader in self.inferred.values()]} if self.inferred else {}

    def __call__(self, model: nn.Module) -> dict[str, list[float]]:
        loaders = {split: self.data.loaders(split) for split in self.splits}
        loaders |= {"inferred": self.inferred} if self.inferred else {}
        return {name: list(ns.evaluate(model, part).values) for name, part in loaders.items()}


def _start(folder: RunFolder, judge: _Judge, setting: Setting) -> Row:
    accuracies = folder.remember("stage-2-start", lambda: judge(setting.trained.model))
    return {
        "name": "ERM",
        "family": "control",
        "text": "the model that the others start from or are compared with",
        "labels": "class",
        "choice": None,
        "held_out": False,
        "settings": {"recipe": asdict(setting.recipe)},
        "trajectory": [{"epoch": setting.recipe.epochs, "loss": None, **accuracies}],
    }


def _train_arm(folder: RunFolder, judge: _Judge, setting: Setting, arm: Arm, hardware: Hardware, progress: bool) -> Row:
    path, name = folder.path / "stage-2" / arm.slug, f"stage-2-{arm.slug}"

    def say(text: str) -> None:
        if progress:
            sys.stderr.write(text)
            sys.stderr.flush()  # the line goes on once the arm is made

    def run() -> Row:
        started = time.perf_counter()
        say(f"Stage 2, {arm.name}: ")
        try:
            how = arm.make()
        except ValueError as error:  # no error set, no anchors: a finding about the data, not a fault of the run
            say("impossible\n")
            return {"impossible": str(error), "settings": {}, "trajectory": []}
        say(f"{how.recipe.epochs} epoch{'s' * (how.recipe.epochs != 1)}\n")
        train(how.start, how.source, path, recipe=how.recipe, seed=setting.seed, method=how.method, hardware=hardware)
        losses = {met["epoch"]: met["loss"] for met in read_trajectory(path)}
        kept = folder.parts(name, [judge.splits, losses])
        judged = []
        for epoch in filter(None, checkpoint_epochs(path)):
            model = load_checkpoint(how.start, path, epoch)
            key = digest(model.state_dict().values())
            judged.append({"epoch": epoch, "loss": losses[epoch], **kept.of(key, functools.partial(judge, model))})
        folder.note_seconds(f"Stage 2, {arm.name}", time.perf_counter() - started)
        return {"settings": how.settings, "trajectory": judged}

    row = folder.remember(name, run)
    for epoch in checkpoint_epochs(path)[:-1]:  # only once the row is written: what was judged is not needed again
        checkpoint_path(path, epoch).unlink()
    said = {key: getattr(arm, key) for key in ("name", "family", "text", "labels", "choice", "held_out")}
    return {**said, **row}


def _dfr(judge: _Judge, setting: Setting, data: Any) -> Row:
    model = setting.trained.model
    said: Row = {
        "name": "DFR",
        "family": "comparison",
        "text": "deep feature reweighting: the last layer fitted anew to group-balanced validation images",
        "labels": "class; class and group of validation images",
        "choice": None,
        "held_out": False,
    }
    try:
        validation = extract_features(model, data.loaders("validation"))
        train_features = extract_features(model, data.loaders("train")).features
        tuned = dfr(validation, train_features, strengths=setting.strengths, seed=setting.seed)
        edited = ns.apply(retrained(model, *tuned.rule, head=validation.head), model)
    except ValueError as error:  # a network that does not end in a linear layer, or hardly any images of a group
        return {**said, "impossible": str(error), "settings": {}, "trajectory": []}
    settings = {"C": tuned.chosen, "refits": REFITS}
    last = {"epoch": setting.recipe.epochs, "loss": None, **judge(edited)}
    return {**said, "settings": settings, "trajectory": [last]}


# Which epoch counts


def select(rows: Sequence[Row], counts: Mapping[str, Sequence[int]], unlabelled: str) -> list[Row]:
    """Return the arms with the epoch that each rule of `SELECTIONS` picks; arms of one choice also as one arm.

    Args:
        rows: the arms with their trajectories.
        counts: the images of each group, by split.
        unlabelled: the split whose class labels "class labels" may look at.
    """
    chosen = [{**row, "selected": _selected([row], counts, unlabelled)} for row in rows]
    for choice in dict.fromkeys(row["choice"] for row in rows if row["choice"]):
        variants = [row for row in rows if row["choice"] == choice]
        together = [row for row in variants if row["trajectory"]]
        if len(variants) > 1 and together:
            chosen.append(
                {
                    **together[0],
                    "name": f"{choice}, chosen",
                    "text": f"{choice}: which of {len(together)} variants is chosen together with the epoch",
                    "choice": None,
                    "settings": {"of": [row["name"] for row in together]},
                    "trajectory": [],
                    "selected": _without_last_epoch(_selected(together, counts, unlabelled)),
                }
            )
    return chosen


def _without_last_epoch(selected: Mapping[str, Row]) -> dict[str, Row]:
    """Return what the rules chose without the last epoch, which chooses none of several variants."""
    return {rule: chosen for rule, chosen in selected.items() if rule != "last epoch"}


def _selected(rows: Sequence[Row], counts: Mapping[str, Sequence[int]], unlabelled: str) -> dict[str, Row]:
    """Return by rule the chosen epoch of one arm, or of several among which is chosen, and its test accuracies."""
    points = [(row["name"], point) for row in rows for point in row["trajectory"]]
    last: list[Row] = next((row["trajectory"][-1:] for row in rows if row["trajectory"]), [])
    if not points:
        return {}
    whole = "inferred" if "inferred" in counts else unlabelled
    rules: dict[str, Callable[[Row], float]] = {
        "last epoch": lambda point: float(point is last[0]),
        # All images of a split, whatever groups they are counted by; rounded, for equal accuracies to be equal.
        "class labels": lambda point: round(average(point[whole], [count for count in counts[whole] if count]), 12),
        "inferred groups": lambda point: min(point["inferred"]),
        "worst group": lambda point: min(point["validation"]),
    }
    if "inferred" not in points[0][1]:
        del rules["inferred groups"]
    if any(row.get("held_out") for row in rows):  # trained on the images that these two go by
        rules = {rule: score for rule, score in rules.items() if rule in ("last epoch", "worst group")}
    tested = [place for place, count in enumerate(counts["test"]) if count]  # a group without images has no accuracy
    found = {}
    for rule, score in rules.items():
        name, point = max(points, key=lambda entry: score(entry[1]))  # of equals the first
        test = point["test"]
        found[rule] = {
            "arm": name,
            "epoch": point["epoch"],
            "test": test,
            "worst": min(test),
            "plain": average(test, [counts["test"][place] for place in tested]),
            "balanced": average(test, [1] * len(test)),
            "train-weighted": average(test, [counts["train"][place] for place in tested]),
        }
    return found


def average(accuracies: Sequence[float], weights: Sequence[float]) -> float:
    """Return the mean of the groups' accuracies; by counts it is the accuracy over all images."""
    return sum(w * a for w, a in zip(weights, accuracies, strict=True)) / sum(weights)


def beside_last_layers(stage: Row) -> list[Row]:
    """Return methods of Stage 2 as rows of the fragility stage's table: each with the rule that looks at most labels.

    Args:
        stage: the entry "stage_two" of the results.
    """
    rows = []
    chosen_arms = {arm["name"] for arm in stage["arms"]}
    for arm in stage["arms"]:
        rule = list(arm["selected"])[-1:]
        stands_alone = arm["name"] != "DFR" and f"{arm['choice']}, chosen" not in chosen_arms
        if arm["family"] == "comparison" and rule and stands_alone:
            chosen = arm["selected"][rule[0]]
            images = "train and held-out" if arm.get("held_out") else "train"
            labels = f"{arm['labels']}; {stage['selections'][rule[0]]} (epoch)"
            said = {"name": arm["name"], "labels": labels, "images": images, "chosen": f"epoch {chosen['epoch']}"}
            rows.append({**said, "test": chosen["test"], "worst": chosen["worst"]})
    return rows
