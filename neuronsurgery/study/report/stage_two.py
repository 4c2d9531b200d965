"""The chapter of Stage 2: every arm under every rule that chooses its epoch, of one run or over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Mark, Series
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import (
    Found,
    Level,
    by_group,
    level_of,
    standing,
    verdicts,
    worst_group,
)
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import group_headers, html_table, level_cell, words_table
from neuronsurgery.study.report.wording import listed, times

FAMILIES: Final[Mapping[str, str]] = {
    "paper": "The paper's fine-tuning",
    "control": "Controls",
    "comparison": "Other methods",
}
AVERAGES: Final = ("plain", "balanced", "train-weighted")
ACCURACY: Final = "accuracy of the worst test group, %"


@dataclass(frozen=True)
class _Judged:
    """The test accuracies of an arm at the epoch that one rule chose: the worst group's, averages, and every group's.

    Attributes:
        worst: with its interval.
        worst_in: which group; empty over seeds, where it may differ.
        averages: of `AVERAGES`.
        groups: by name.
        chosen: the epoch in words; empty over seeds.
        free: whether there was an epoch or a rate to choose.
    """

    worst: Level
    worst_in: str
    averages: Mapping[str, Level]
    groups: Mapping[str, Level]
    chosen: str
    free: bool


@dataclass(frozen=True)
class _Found:
    """Stage 2 of a run, or of several."""

    run: Results
    groups: Groups

    @property
    def stage(self) -> Results:
        stage: Results = self.run["stage_two"]
        return stage

    @property
    def over_seeds(self) -> bool:
        return self.run.get("kind") == "seeds"

    @property
    def arms(self) -> list[Results]:
        """The arms in the order of the families."""
        order = list(FAMILIES)
        return sorted(self.stage["arms"], key=lambda arm: order.index(arm["family"]))

    @property
    def rules(self) -> dict[str, str]:
        """The rules that some arm was judged by, with the labels that each takes."""
        unlabelled = self.stage["class_labels_of"]
        return {
            rule: labels.replace("held-out", unlabelled)
            for rule, labels in self.stage["selections"].items()
            if any(rule in arm["selected"] for arm in self.arms)
        }

    def judged(self, arm: Results, rule: str) -> _Judged:
        """Return what an arm came to under a rule."""
        chosen = arm["selected"][rule]
        levels = by_group(self.run, self.groups, "test", chosen["test"])
        count = sum(self.run["counts"]["test"])
        averages: dict[str, Level] = {name: level_of(chosen[name]) for name in AVERAGES}
        if self.over_seeds:
            free = len(arm["trajectory"]) != 1
            return _Judged(level_of(chosen["worst"]), "", averages, levels, "", free)
        worst, other = worst_group(levels), chosen["arm"] if chosen["arm"] != arm["name"] else ""
        epoch = f"epoch {chosen['epoch']}" + (f" of {other}" if other else "")
        averages["plain"] = level_of(chosen["plain"], count)
        return _Judged(levels[worst], worst, averages, levels, epoch, len(arm["trajectory"]) != 1)

    def under(self, rule: str) -> dict[str, tuple[Results, _Judged]]:
        """Return the arms that a rule judged, by name."""
        return {arm["name"]: (arm, self.judged(arm, rule)) for arm in self.arms if rule in arm["selected"]}


def stage_two(run: Results, groups: Groups) -> list[Section]:
    """Return the sections of Stage 2: all arms at one look, then one section per rule that chooses the epoch."""
    if not run.get("stage_two"):
        return []
    found = _Found(run, groups)
    return [_whole(found), *(_by_rule(found, rule) for rule in found.rules)]


# All arms at one look


def _whole(found: _Found) -> Section:
    section = Section(_finding(found))
    section.figures = [_worst_figure(found), *_trajectory_figures(found)] if found.rules else []
    section.more_figures = [] if found.over_seeds else _group_trajectories(found)
    section.table = _arms_table(found)
    section.remarks = _remarks(found)
    section.rows = {
        "stage_two": [row for rule in found.rules for row in _rows(found, rule)],
        "stage_two_trajectory": _trajectory_rows(found),
    }
    return section


def _finding(found: _Found) -> str:
    """Return the worst group before fine-tuning, how often the paper's arms beat every control, and the best arm."""
    start = next((arm for arm in found.arms if arm["name"] == "ERM" and arm["selected"]), None)
    before = ""
    if start is not None:
        judged = found.judged(start, next(iter(start["selected"])))
        where = f", {found.groups.label(judged.worst_in)}" if judged.worst_in else ""
        before = f"ERM, which fine-tuning starts from, is right on {judged.worst} of its worst test group{where}. "
    best = [(judged.worst, arm, rule) for rule in found.rules for arm, judged in found.under(rule).values()]
    if not best:
        return f"{before}No arm could be judged."
    # One fixed rule: a maximum over the rules, too, would choose a rule by test images.
    rule = list(found.rules)[-1]
    level, arm = max(((one, arm) for one, arm, by in best if by == rule), key=lambda entry: entry[0].value)
    highest = (
        f' Of all arms whose epoch is chosen by the rule "{rule}" ({found.rules[rule]}), {arm["name"]} is the highest '
        f"with {level}, as these test images have it; it trains with labels of: {arm['labels']}."
    )
    return before + _beaten_words(found, list(found.rules)) + highest


def _beaten_words(found: _Found, rules: Sequence[str]) -> str:
    """Return how often the paper's arms beat every control, by the intervals or on the mean."""
    settled = higher = total = 0
    for rule in rules:
        under = found.under(rule)
        controls = {name: judged.worst for name, (arm, judged) in under.items() if arm["family"] == "control"}
        for name, (arm, judged) in under.items():
            if arm["family"] == "paper" and controls:
                said = _outcome(found, judged.worst, controls, _differences(found, name, rule))
                total, settled, higher = total + 1, settled + (said == "better"), higher + (said == "higher")
    if not total:
        return "The paper's arms and their controls cannot be compared: one of the two is missing."
    mean = "on the mean, but some difference is undecided" if found.over_seeds else "but some intervals overlap"
    failed = total - settled - higher
    things = f"{times(total, 'arm')} of the paper"
    things = things if len(rules) == 1 else f"{times(total, 'combination')} of one of the paper's arms and a rule"
    return (
        f"Of {things}, {settled} {'is' if settled == 1 else 'are'} better than every control in the worst "
        f"group, {higher} {'is' if higher == 1 else 'are'} higher than every control {mean}, and for {failed} some "
        f"control does as well or better{' on the mean' if found.over_seeds else ''}."
    )


def _outcome(
    found: _Found, worst: Level, controls: Mapping[str, Level], differences: Sequence[Results]
) -> Literal["better", "higher", "not better"]:
    """Return how an arm stands to all of its controls at once."""
    if found.over_seeds:
        verdicts_met = {one["verdict"] for one in differences}
        above = bool(differences) and all(one["mean"] > 0 for one in differences)
    else:
        highest = [standing(worst, {name: control}) for name, control in controls.items()]
        verdicts_met = {"better" if said.startswith("better") else "undecided" for said in highest}
        above = all(worst.value > control.value for control in controls.values())
    return "better" if verdicts_met == {"better"} else "higher" if above else "not better"


def _differences(found: _Found, arm: str, rule: str) -> list[Results]:
    return [one for one in found.stage.get("differences", ()) if (one["arm"], one["selection"]) == (arm, rule)]


def _worst_figure(found: _Found) -> tuple[str, str, str]:
    """Return the worst group of every arm under every rule."""
    arms = [arm for arm in found.arms if arm["selected"]]
    series, each = [], []
    for place, rule in enumerate(found.rules):
        under = found.under(rule)
        levels = [under[arm["name"]][1].worst if arm["name"] in under else None for arm in arms]
        colour = figures.GROUP_COLOURS[place % len(figures.GROUP_COLOURS)]
        series.append(Series(rule, tuple(level.mark if level else None for level in levels), colour))
        each.append([[100 * value for value in level.values] if level else [] for level in levels])
    families = [arm["family"] for arm in arms]
    headings = {families.index(family): words for family, words in FAMILIES.items() if family in families}
    whiskers = "Student's 95 % interval over the seeds; strokes: the seeds" if found.over_seeds else WILSON
    svg = figures.dot_rows(
        "Worst group of the test images, by the rule that chooses the epoch",
        [arm["name"] for arm in arms],
        series,
        axis=ACCURACY,
        headings=headings,
        each=each,
        limits=(0.0, 100.0),
    )
    return "stage-two-worst", f"Lines: {whiskers}. What lies beyond 0 and 100 % is cut.", svg


BANDED: Final = 3
"""Lines up to which each has its interval as a band: more bands hide one another."""

WILSON: Final = "Wilson's 95 % interval over the images of that group"


def _trajectory_figures(found: _Found) -> list[tuple[str, str, str]]:
    """Return the worst test group per epoch: of the arms that start from ERM, and of those trained anew."""
    drawn = []
    for slug, title, families in (
        ("fine-tuned", "Fine-tuned from ERM: worst test group by epoch", ("paper", "control")),
        ("anew", "Trained from the first weights: worst test group by epoch", ("comparison",)),
    ):
        lines = {arm["name"]: _worst_by_epoch(found, arm) for arm in _trained(found, families)}
        start = _start(found) if slug == "fine-tuned" else None
        start = Level(start.value) if start and not found.over_seeds else start
        svg = _trajectories(title, lines, start, ACCURACY)
        caption = "Epoch 0 is ERM. " if slug == "fine-tuned" else ""
        if found.over_seeds:
            banded = len(lines) <= BANDED
            caption += "Bands: Student's 95 % intervals over the seeds." if banded else "Means over the seeds."
            caption += " A line ends with the shortest seed."
        drawn += [(f"stage-two-{slug}", caption.strip(), svg)] if svg else []
    return drawn


def _trained(found: _Found, families: Sequence[str]) -> list[Results]:
    """Return the arms of some families that were trained, epoch by epoch: not ERM itself, nor a refitted last layer."""
    return [
        arm
        for arm in found.arms
        if arm["family"] in families and arm["name"] not in ("ERM", "DFR") and len(arm["trajectory"])
    ]


def _worst_by_epoch(found: _Found, arm: Results) -> dict[int, Level]:
    if found.over_seeds:
        return {point["epoch"]: level_of(point["worst"]) for point in arm["trajectory"]}
    return {point["epoch"]: Level(min(point["test"])) for point in arm["trajectory"]}


def _start(found: _Found) -> Level | None:
    """Return the worst group of ERM."""
    starts = [found.judged(arm, rule).worst for arm in found.arms if arm["name"] == "ERM" for rule in arm["selected"]]
    return starts[0] if starts else None


def _trajectories(title: str, lines: Mapping[str, Mapping[int, Level]], start: Level | None, axis: str) -> str:
    """Return lines over the epochs as SVG, from a common start where there is one; "" of nothing."""
    last = max((epoch for line in lines.values() for epoch in line), default=0)
    if not lines or last + (start is not None) < 2:
        return ""
    epochs = range(0 if start else 1, last + 1)
    series = []
    for place, (name, line) in enumerate(lines.items()):
        levels = {**({0: start} if start else {}), **line}
        ends = len(lines) <= BANDED
        marks = tuple(_cut(levels[epoch].mark, ends) if epoch in levels else None for epoch in epochs)
        series.append(Series(name, marks, figures.GROUP_COLOURS[place % len(figures.GROUP_COLOURS)]))
    return figures.trajectories(title, [str(epoch) for epoch in epochs], series, axis=axis)


def _cut(mark: Mark, ends: bool) -> Mark:
    """Return a mark whose interval ends at 0 and 100 %, or that has none."""
    if mark.low is None or mark.high is None or not ends:
        return Mark(mark.value)
    return Mark(mark.value, max(0.0, mark.low), min(100.0, mark.high))


def _group_trajectories(found: _Found) -> list[tuple[str, str, str]]:
    """Return the test accuracy of every group per epoch, a figure per group, of the arms that start from ERM."""
    drawn = []
    present = [name for name, count in zip(found.groups.names, found.run["counts"]["test"], strict=True) if count]
    start = next((arm["trajectory"][-1] for arm in found.arms if arm["name"] == "ERM"), None)
    for place, name in enumerate(present):
        lines = {
            arm["name"]: {point["epoch"]: Level(point["test"][place]) for point in arm["trajectory"]}
            for arm in _trained(found, ("paper", "control"))
        }
        before = Level(start["test"][place]) if start else None
        label = found.groups.label(name)
        svg = _trajectories(f"Fine-tuned from ERM: {label}, test images", lines, before, "accuracy, %")
        drawn += [(f"stage-two-group{found.groups.names.index(name)}", "Epoch 0 is ERM.", svg)] if svg else []
    return drawn


def _arms_table(found: _Found) -> str:
    """Return what every arm is, which labels its training takes and, of one run, the settings that it was given."""
    header = ["method", "kind", "what is done", "training labels"]
    rows = [
        [escape(arm["name"]), FAMILIES[arm["family"]], escape(arm["text"]), escape(arm["labels"])] for arm in found.arms
    ]
    if not found.over_seeds:  # where they may differ
        header.append("settings")
        rows = [
            [*row, f"<small>{escape(_settings_words(arm['settings']))}</small>"]
            for row, arm in zip(rows, found.arms, strict=True)
        ]
    return words_table(header, rows)


GIVEN: Final[Mapping[str, str]] = {
    "epoch": "T = {}",
    "errors": "{} images wrong",
    "upsampling": "{} more copies of each",
    "criterion": "criterion {}",
    "fraction": "fraction {:g}",
    "temperature": "temperature {:g}",
    "weight": "weight {:g}",
    "statistics": "{} statistics",
    "step_size": "step size {:.2g}",
    "C": "C = {:g}",
    "refits": "{} refits",
}
"""The settings of a method that the table shows, in this order; its recipe goes before them."""


def _settings_words(settings: Results) -> str:
    """Return what a method was given, in short; a dash where that is nothing."""
    said = [_recipe_words(settings["recipe"])] if "recipe" in settings else []
    unused = {"fraction"} if settings.get("criterion") == "none" else set()
    said += [words.format(settings[key]) for key, words in GIVEN.items() if key in settings and key not in unused]
    if "first_stage" in settings:
        said.append(f"first stage: {_recipe_words(settings['first_stage'])}")
    return "; ".join(said) or "\N{EN DASH}"


def _recipe_words(recipe: Results) -> str:
    decay = f", weight decay {recipe['weight_decay']:g}" if recipe["weight_decay"] else ""
    return (
        f"{times(recipe['epochs'], 'epoch')}, {recipe['optimizer']} at {recipe['learning_rate']:g}{decay}, batches of "
        f"{recipe['batch_size']}"
    )


def _remarks(found: _Found) -> list[str]:
    stage, counts = found.stage, found.run["counts"]
    twice = any(arm["name"].startswith("JTT") for arm in found.arms)
    said = [
        f"The paper's arms and their controls train on for {times(stage['fine_tuning_epochs'], 'epoch')} from ERM; the "
        f"methods that begin from the first weights train for {times(stage['comparison_epochs'], 'epoch')}"
        + ("; JTT, whose epochs have copies, makes as many steps in fewer." if twice else "."),
        "Plain: over the test images as they are; balanced: the mean of the groups; train-weighted: the groups in the "
        "proportions of the training images.",
    ]
    if found.over_seeds:
        said.append(
            "Intervals are Student's 95 % intervals of the mean over the seeds. Better and worse: the interval of the "
            "difference, seed by seed, excludes 0; else undecided."
        )
    else:
        said.append(
            f"One run gives no interval over seeds. In brackets: {WILSON}. Better: higher, and the two intervals do "
            f"not overlap; not better: not higher. The lowest of several measured accuracies is, on the mean, below "
            f"the lowest true one."
        )
    if stage["class_labels_of"] == "validation":
        validation = counts["validation"]
        balanced = len(set(validation)) == 1
        kind = "balanced over groups" if balanced else f"of {listed([str(count) for count in validation], 12)} images"
        said.append(
            f"There are no held-out images: the class labels are those of the validation images, which are {kind}"
            + (". That balance is itself knowledge of the groups." if balanced else " per group.")
        )
    if found.over_seeds and stage.get("not_inferred"):
        why = "; ".join(f"seed {one['seed']}: {one['impossible']}" for one in stage["not_inferred"])
        some = f"in {len(stage['not_inferred'])} of {times(len(found.run['seeds']), 'seed')}"
        said.append(f"No epoch is chosen by inferred groups, because {some} none could be inferred ({why}).")
    elif stage.get("not_inferred"):
        said.append(f"No epoch is chosen by inferred groups, because none could be inferred: {stage['not_inferred']}")
    for arm in found.arms:
        if arm.get("impossible"):
            why = f" in {times(arm['impossible'], 'seed')}." if found.over_seeds else f": {arm['impossible']}"
            said.append(f"{arm['name']} was impossible{why}")
    return said


# One rule


def _by_rule(found: _Found, rule: str) -> Section:
    """Return the section of one rule: how the paper's arms stand to their controls, and the table of all arms."""
    under = found.under(rule)
    controls = {name: judged.worst for name, (arm, judged) in under.items() if arm["family"] == "control"}
    section = Section(_beaten_words(found, [rule]), heading=f'Epoch chosen by the rule "{rule}" ({found.rules[rule]})')
    for name, (arm, judged) in under.items():
        if arm["family"] == "paper":
            said = verdicts(_differences(found, name, rule)) if found.over_seeds else standing(judged.worst, controls)
            section.remarks.append(f"{name[0].upper()}{name[1:]}, {judged.worst} in the worst group: {said}.")
    section.table = _rule_table(found, rule)
    if found.over_seeds:
        section.rows = {
            "stage_two_differences": [one for one in found.stage["differences"] if one["selection"] == rule]
        }
    return section


def _rule_table(found: _Found, rule: str) -> str:
    averages = [f"{name}, %" for name in AVERAGES]
    header = ["method", "training labels", "labels to choose the epoch", "worst group, %", *averages]
    header += [f"{name}, %" for name in group_headers(found.groups)]
    rows = []
    for name, (arm, judged) in found.under(rule).items():
        labels = found.rules[rule] if judged.free or rule == "last epoch" else "nothing to choose"
        where = f"G{found.groups.names.index(judged.worst_in)}" if judged.worst_in else ""
        chosen = f"<small>{escape(judged.chosen)}</small>" if judged.chosen else ""
        row = [f"{escape(name)}{chosen}", f"<small>{escape(arm['labels'])}</small>", f"<small>{escape(labels)}</small>"]
        row.append(f"<b>{level_cell(judged.worst, where)}</b>")
        row += [level_cell(judged.averages[average]) for average in AVERAGES]
        row += [level_cell(judged.groups[one]) if one in judged.groups else "&ndash;" for one in found.groups.names]
        rows.append(row)
    return html_table(header, rows, heads=3)


# CSV


def _rows(found: _Found, rule: str) -> list[Results]:
    """Return one row per arm: labels, epoch, and the test accuracies; over seeds one more per seed."""
    rows: list[Results] = []
    for name, (arm, _) in found.under(rule).items():
        chosen = arm["selected"][rule]
        said = {"method": name, "family": arm["family"], "training_labels": arm["labels"], "selection": rule}
        said["selection_labels"] = found.rules[rule]
        measures: dict[str, Found] = {key: chosen[key] for key in ("worst", *AVERAGES)}
        measures |= {
            f"test {one}": value
            for one, value in zip(
                by_group(found.run, found.groups, "test", chosen["test"]), chosen["test"], strict=True
            )
        }
        if found.over_seeds:
            rows += [
                {**said, "measure": key, **value} for key, value in measures.items() if not isinstance(value, float)
            ]
        else:
            rows.append({**said, "chosen": chosen["arm"], "epoch": chosen["epoch"], **measures})
    return rows


def _trajectory_rows(found: _Found) -> list[Results]:
    rows: list[Results] = []
    for arm in found.arms:
        for point in arm["trajectory"]:
            said = {"method": arm["name"], "epoch": point["epoch"]}
            if found.over_seeds:
                rows.append({**said, "split": "test", **point["worst"]})
                continue
            for split in found.stage["splits"]:
                accuracy = by_group(found.run, found.groups, split, point[split])
                rows += [
                    {**said, "split": split, "group": name, "accuracy": one.value} for name, one in accuracy.items()
                ]
    return rows
