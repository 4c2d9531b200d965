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
from neuronsurgery.study import last_layer, methods, readers, training
from neuronsurgery.study.methods import FINE_TUNING, unaugmented
from neuronsurgery.study.run import RunFolder
from neuronsurgery.study.stage_fragility import infer, inferred_places, knockout
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import Erm, Recipe, Source, checkpoint_epochs, checkpoint_path, load_checkpoint

Row: TypeAlias = dict[str, Any]
Judge: TypeAlias = Callable[[nn.Module], Row]

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
    """What an arm is trained with; `given` is what else the results are to say of it, as JSON values."""

    start: nn.Module
    source: Source
    method: training.Method
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
        family: "paper", "control" (what separates the paper's ingredients) or "comparison" (other methods).
        text: what is done.
        labels: which labels training takes.
        make: what it is trained with; may make a pass over the images, or train a first stage.
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


VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "pruned by gradient": (
        "the neurons of largest gradient on the hardest images pruned; the supervised term is the cross entropy of the "
        "logits, with a weight of 1",
        {},
    ),
    "pruned by magnitude": ("the neurons of largest magnitude pruned", {"criterion": "magnitude"}),
    "slides' objective": (
        "pruned by gradient, the supervised term being 0.2 times the squared error of the softmax outputs",
        {"supervised": "mse", "weight": 0.2},
    ),
    "pruned, own statistics": (
        "pruned by gradient, the twin's pass kept out of the batch-norm statistics that the network is judged with",
        {"statistics": "own"},
    ),
    "nothing pruned": ("the same loss, the twin having all neurons", {"criterion": "none"}),
    "random pruned": ("the same loss, as many random neurons pruned", {"criterion": "random"}),
    "random pruned, own statistics": (
        "random neurons pruned, the twin's pass kept out of the batch-norm statistics that the network is judged with",
        {"criterion": "random", "statistics": "own"},
    ),
}
"""The paper's fine-tuning and its controls: text, and what differs from `ContrastivePruning`'s defaults; the last one
only with `--full`."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What the arms are made from, and how.

    Attributes:
        recipe: of the ERM run.
        pretrained: whether the first weights came from a file.
        comparison_epochs: of the methods that train from the first weights again.
        joined: training and held-out images, to give those methods what last layers are retrained on; None does not.
        comparisons: the recipes of methods that have one of their own, for their first stages too; the others have that
            of the ERM run, which then is their first stage.
        strengths: values of C that DFR chooses from.
        full: whether there is time for all `VARIANTS`, and to search for the rate of ERM continued.
    """

    trained: Trained
    source: Source
    recipe: Recipe
    seed: int
    pretrained: bool
    fine_tuning_epochs: int
    comparison_epochs: int
    joined: Source | None = None
    comparisons: Mapping[str, Recipe] = field(default_factory=dict)
    contrast_temperature: float = 0.1
    strengths: Sequence[float] = last_layer.STRENGTHS
    full: bool = False
    hardware: training.Hardware = field(default_factory=training.Hardware)

    @property
    def folder(self) -> Path:
        """The folder of the ERM run."""
        return self.trained.checkpoints[0].parents[1]

    def checkpoint(self, epoch: int) -> nn.Module:
        """The ERM model after an epoch."""
        return load_checkpoint(self.trained.model, self.folder, epoch)

    def fine_tuned(self) -> list[Arm]:
        """The paper's method and its controls, which start from the ERM model."""
        recipe = replace(FINE_TUNING, epochs=self.fine_tuning_epochs)
        trained = functools.partial(Training, self.trained.model, self.source)
        arms = []
        for rate in MORE_RATES if self.full else RATES:
            text = f"the ERM model trained on by cross entropy alone, for as many epochs, at a rate of {rate:g}"
            make = functools.partial(trained, Erm(), replace(recipe, learning_rate=rate))
            arms.append(Arm(f"{CONTINUED}, rate {rate:g}", "control", text, "class", make, choice=CONTINUED))
        for name, (difference, options) in list(VARIANTS.items())[: None if self.full else -1]:
            text = f"fine-tuned against a twin that shares the weights: {difference}"
            family = "control" if options.get("criterion") in ("none", "random") else "paper"
            method = methods.ContrastivePruning(unaugmented(self.source), self.trained.where, **options)
            arms.append(Arm(name, family, text, "class", functools.partial(trained, method, recipe)))
        return arms

    def from_scratch(self) -> list[Arm]:
        """The methods to compare with, which start from the first weights."""
        arms = []
        for early in self._early:
            text = f"the images that {self._first_words('JTT', early)} gets wrong being half of an epoch"
            text = f"Just Train Twice: from the first weights, {text}"
            make = functools.partial(self._jtt, early)
            arms.append(Arm(f"JTT, T = {early}", "comparison", text, "class", make, choice="JTT"))
        for early in self._early:
            text = f"features of a class brought together across the predictions of {self._first_words('CnC', early)}"
            text = f"Correct-n-Contrast: from the first weights, {text}"
            make = functools.partial(self._cnc, early)
            arms.append(Arm(f"CnC, T = {early}", "comparison", text, "class", make, choice="CnC"))
        text = "Group DRO: from the first weights, groups sampled alike and weighted by their losses"
        return [*arms, Arm("Group DRO", "comparison", text, "class, group", self._group_dro)]

    def with_held_out(self) -> list[Arm]:
        """These, and ERM, on the training and the held-out images."""
        if self.joined is None:
            return []
        setting = replace(self, source=self.joined)
        erm = Arm("ERM", "comparison", "empirical risk minimisation from the first weights", "class", setting._erm)
        return [
            replace(
                arm,
                name=f"{arm.name}, {HELD_OUT_TOO}",
                text=f"{arm.text}; on training and held-out images",
                choice=arm.choice and f"{arm.choice}, {HELD_OUT_TOO}",
                held_out=True,
            )
            for arm in (erm, *setting.from_scratch())
        ]

    def _erm(self) -> Training:
        return Training(self.checkpoint(0), self.source, Erm(), self._recipe("ERM"))

    def _jtt(self, early: int) -> Training:
        errors = methods.error_set(self._first_stage("JTT", early), unaugmented(self.source))
        upsampling = methods.jtt_upsampling(errors)
        upsampled = methods.upsampled(self.source, jtt_weights(errors, upsampling))
        recipe = self._recipe("JTT")
        # As many steps as the others make: an epoch with copies has more.
        recipe = replace(recipe, epochs=max(1, round(recipe.epochs * len(self.source) / len(upsampled))))
        given = {"name": "just train twice", "errors": int(errors.sum()), "upsampling": upsampling}
        return Training(self.checkpoint(0), upsampled, Erm(), recipe, given | self._first_settings("JTT", early))

    def _cnc(self, early: int) -> Training:
        start = self.checkpoint(0)
        images, *_ = next(iter(unaugmented(self.source, size=2)))
        with torch.no_grad():  # contrast needs a linear head: said before a first stage is trained
            methods.logits_and_features(start, images.to(next(start.parameters()).device))
        predicted = methods.predictions(self._first_stage("CnC", early), unaugmented(self.source))
        contrasted = methods.ContrastiveBatches(self.source.split, self.source.augmentation, predicted)
        statistics: Literal["frozen", "batch"] = "frozen" if self.pretrained else "batch"
        method = methods.CorrectNContrast(temperature=self.contrast_temperature, statistics=statistics)
        return Training(start, contrasted, method, self._recipe("CnC"), self._first_settings("CnC", early))

    def _group_dro(self) -> Training:
        recipe, split = self._recipe("Group DRO"), self.source.split
        steps = recipe.epochs * -(-len(split) // recipe.batch_size)
        method = methods.GroupDro(len(split.counts), methods.group_dro_step_size(steps))
        balanced = methods.GroupBalanced(split, self.source.augmentation)
        return Training(self.checkpoint(0), balanced, method, recipe)

    def _recipe(self, method: str) -> Recipe:
        return replace(self.comparisons.get(method, self.recipe), epochs=self.comparison_epochs)

    @property
    def _early(self) -> list[int]:
        """The epochs of the first stage whose mistakes JTT and CnC go by, as shares of the ERM run."""
        shares = methods.IDENTIFICATION_SHARES
        return sorted({methods.identification_epoch(self.recipe.epochs, share) for share in shares})

    def _first_words(self, method: str, early: int) -> str:
        if method not in self.comparisons:
            return f"the ERM model of epoch {early}"
        return f"the model of epoch {early} of a first stage with the method's own settings"

    def _first_settings(self, method: str, early: int) -> Row:
        recipe = self._first_recipe(method)
        return {"epoch": early} | ({} if recipe is None else {"first_stage": asdict(recipe)})

    def _first_recipe(self, method: str) -> Recipe | None:
        """The recipe of a first stage of the method's own; None where it goes by the ERM run."""
        own = self.comparisons.get(method)
        return None if own is None else replace(own, epochs=max(self._early))

    def _first_stage(self, method: str, early: int) -> nn.Module:
        """The network of an early epoch by which JTT or CnC goes: of the ERM run, or of a first stage of its own.

        Such a stage is trained once for all early epochs, by empirical risk minimisation on the method's images, and of
        its checkpoints only theirs are kept. With a constant rate, as all recipes of `comparisons` have, an early epoch
        is what a shorter training ends with.
        """
        recipe = self._first_recipe(method)
        if recipe is None:
            return self.checkpoint(early)
        name = f"{method} first stage" + (f", {HELD_OUT_TOO}" if self.source is self.joined else "")
        folder, start = self.folder / "stage-2" / _slug(name), self.checkpoint(0)
        try:
            training.train(start, self.source, folder, recipe=recipe, seed=self.seed, hardware=self.hardware)
        except ValueError as error:  # which of an arm would be taken for a finding about the data
            raise RuntimeError(f"the first stage of {method} could not be trained: {error}") from error
        for epoch in set(checkpoint_epochs(folder)).difference(self._early):
            checkpoint_path(folder, epoch).unlink()
        return load_checkpoint(start, folder, early)


def make_arms(setting: Setting) -> list[Arm]:
    """Return every arm that is trained: the paper's, its controls, and the comparisons."""
    return [*setting.fine_tuned(), *setting.from_scratch(), *setting.with_held_out()]


# Running


def stage_two(folder: RunFolder, data: Any, setting: Setting) -> Row:
    """Return what every arm came to, as the entry "stage_two" of a run; arms that its folder holds are not trained."""
    unlabelled = "held-out" if "held-out" in data.splits else "validation"
    inferred, not_inferred = _inferred(folder, data, setting.trained.model, unlabelled)
    # By inferred group they are the same images as those of `unlabelled`, which are seen once.
    splits = ["validation", "test"] + ["held-out"] * (not inferred and unlabelled == "held-out")
    counts = {split: list(data.splits[split].counts) for split in ("train", *splits)}
    loaders = {split: data.loaders(split) for split in splits}
    if inferred:
        counts["inferred"] = [len(loader.split) for loader in inferred.values()]
        loaders["inferred"] = inferred

    def judge(model: nn.Module) -> Row:
        """Accuracy per group on all images that are looked at, by split."""
        return {name: list(ns.evaluate(model, part).values) for name, part in loaders.items()}

    rows = [
        _start(folder, judge, setting),
        *(_train_arm(folder, judge, setting, arm) for arm in make_arms(setting)),
        folder.remember("stage-2-dfr", lambda: _dfr(judge, setting, data)),
    ]
    return {
        "fine_tuning_epochs": setting.fine_tuning_epochs,
        "comparison_epochs": setting.comparison_epochs,
        "splits": splits,
        "selections": dict(SELECTIONS),
        "class_labels_of": unlabelled,
        "not_inferred": not_inferred,
        "arms": select(rows, counts, unlabelled),
    }


def _inferred(folder: RunFolder, data: Any, model: nn.Module, unlabelled: str) -> tuple[dict[str, Any], str | None]:
    """Return loaders of the groups of a split that the ERM model's fragility infers, or why it infers none."""

    def infer_places() -> Row:
        try:
            edit = knockout(model, next(iter(next(iter(data.loaders("train").values())))))
            places = inferred_places(data, unlabelled, infer(model, data, unlabelled, edit))
        except (ValueError, ns.CaptureError) as error:  # no skip connections, or nobody stands out
            return {"impossible": str(error)}
        return {"places": {name: own.tolist() for name, own in places.items()}}

    found = folder.remember("stage-2-inferred", infer_places)
    places = {name: torch.tensor(own, dtype=torch.int64) for name, own in found.get("places", {}).items()}
    loaders = {name: readers.batches(data.splits[unlabelled].subset(own), 250) for name, own in places.items()}
    return loaders, found.get("impossible")


def _untrained(name: str, family: str, text: str, labels: str, found: Row) -> Row:
    """Return the row of an arm that needs no training."""
    said = {"name": name, "family": family, "text": text, "labels": labels, "choice": None, "held_out": False}
    return {**said, **found}


def _start(folder: RunFolder, judge: Judge, setting: Setting) -> Row:
    accuracies = folder.remember("stage-2-start", lambda: judge(setting.trained.model))
    trajectory = [{"epoch": setting.recipe.epochs, "loss": None, **accuracies}]
    found = {"settings": {"recipe": asdict(setting.recipe)}, "trajectory": trajectory}
    return _untrained("ERM", "control", "the model that the others start from or are compared with", "class", found)


def _dfr(judge: Judge, setting: Setting, data: Any) -> Row:
    model = setting.trained.model
    try:
        validation = last_layer.extract_features(model, data.loaders("validation"))
        train_features = last_layer.extract_features(model, data.loaders("train")).features
        tuned = last_layer.dfr(validation, train_features, strengths=setting.strengths, seed=setting.seed)
        edit = last_layer.retrained(model, *tuned.rule, head=validation.head)
    except ValueError as error:  # a network that does not end in a linear layer, or hardly any images of a group
        found: Row = {"impossible": str(error), "settings": {}, "trajectory": []}
    else:
        last = {"epoch": setting.recipe.epochs, "loss": None, **judge(ns.apply(edit, model))}
        found = {"settings": {"C": tuned.chosen, "refits": last_layer.REFITS}, "trajectory": [last]}
    text = "deep feature reweighting: the last layer fitted anew to group-balanced validation images"
    return _untrained("DFR", "comparison", text, "class; class and group of validation images", found)


def _train_arm(folder: RunFolder, judge: Judge, setting: Setting, arm: Arm) -> Row:
    path, name = folder.path / "stage-2" / arm.slug, f"stage-2-{arm.slug}"

    def run() -> Row:
        started = time.perf_counter()
        _say(f"Stage 2, {arm.name}: ")
        try:
            how = arm.make()
        except ValueError as error:  # no error set, no anchors: a finding about the data, not a fault of the run
            _say("impossible\n")
            return {"impossible": str(error), "settings": {}, "trajectory": []}
        _say(f"{how.recipe.epochs} epoch{'s' * (how.recipe.epochs != 1)}\n")
        arguments: Row = {"recipe": how.recipe, "seed": setting.seed, "hardware": setting.hardware}
        training.train(how.start, how.source, path, method=how.method, **arguments)
        losses = {met["epoch"]: met["loss"] for met in training.read_trajectory(path)}
        kept = folder.parts(name, losses)
        judged = []
        for epoch in filter(None, checkpoint_epochs(path)):
            model = load_checkpoint(how.start, path, epoch)
            key = training.digest(model.state_dict().values())
            judged.append({"epoch": epoch, "loss": losses[epoch], **kept.of(key, functools.partial(judge, model))})
        folder.note_seconds(f"Stage 2, {arm.name}", time.perf_counter() - started)
        return {"settings": how.settings, "trajectory": judged}

    row: Row = folder.remember(name, run)
    for epoch in checkpoint_epochs(path)[:-1]:  # only once the row is written: what was judged is not needed again
        checkpoint_path(path, epoch).unlink()
    return {key: value for key, value in vars(arm).items() if key != "make"} | row


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()  # the line goes on once the arm is made


# Which epoch counts


def select(rows: Sequence[Row], counts: Mapping[str, Sequence[int]], unlabelled: str) -> list[Row]:
    """Return the arms with the epoch that each rule of `SELECTIONS` picks; arms of one choice also as one arm.

    `counts` are the images of each group, by split; "class labels" looks at those of the split `unlabelled`.
    """
    chosen = [{**row, "selected": _selected([row], counts, unlabelled)} for row in rows]
    for choice in dict.fromkeys(row["choice"] for row in rows if row["choice"]):
        variants = [row for row in rows if row["choice"] == choice]
        together = [row for row in variants if row["trajectory"]]
        if len(variants) > 1 and together:
            selected = _selected(together, counts, unlabelled)
            del selected["last epoch"]  # which chooses none of several variants
            said: Row = {
                "name": f"{choice}, chosen",
                "text": f"{choice}: which of {len(together)} variants is chosen together with the epoch",
                "choice": None,
                "settings": {"of": [row["name"] for row in together]},
                "trajectory": [],
            }
            chosen.append({**together[0], **said, "selected": selected})
    return chosen


def _selected(rows: Sequence[Row], counts: Mapping[str, Sequence[int]], unlabelled: str) -> dict[str, Row]:
    """Return by rule the chosen epoch of one arm, or of several among which is chosen, and its test accuracies."""
    points = [(row["name"], point) for row in rows for point in row["trajectory"]]
    if not points:
        return {}
    last, whole = points[-1][1], "inferred" if "inferred" in counts else unlabelled
    rules: dict[str, Callable[[Row], float]] = {"last epoch": lambda point: float(point is last)}
    if not any(row.get("held_out") for row in rows):  # those are trained on the images that these two go by
        # All images of a split, whatever groups they are counted by; rounded, for equal accuracies to be equal.
        present = [count for count in counts[whole] if count]
        rules["class labels"] = lambda point: round(average(point[whole], present), 12)
        if "inferred" in last:
            rules["inferred groups"] = lambda point: min(point["inferred"])
    rules["worst group"] = lambda point: min(point["validation"])
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
    """Return methods as rows of the fragility stage's table, each with the rule that looks at most labels."""
    rows = []
    names = {arm["name"] for arm in stage["arms"]} - {"DFR"}
    for arm in stage["arms"]:
        rule = list(arm["selected"])[-1:]
        stands_alone = arm["name"] in names and f"{arm['choice']}, chosen" not in names
        if arm["family"] == "comparison" and rule and stands_alone:
            chosen = arm["selected"][rule[0]]
            row = {
                "name": arm["name"],
                "labels": f"{arm['labels']}; {stage['selections'][rule[0]]} (epoch)",
                "images": "train and held-out" if arm.get("held_out") else "train",
                "chosen": f"epoch {chosen['epoch']}",
                "test": chosen["test"],
                "worst": chosen["worst"],
            }
            rows.append(row)
    return rows
