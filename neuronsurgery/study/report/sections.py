"""What stands below the answers: a figure for each thing that was measured, of one run or over seeds.

A section is a function of a run to its figures, and one entry of `SECTIONS`. What it draws are rows of the table, in
points or percent; what it says is how to read them, for what was found stands in the answers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from neuronsurgery.study.claims import KNOCKOUT, RETRAINED
from neuronsurgery.study.pages.charts import (
    OTHER_COLOURS,
    Choice,
    Figure,
    Look,
    columns_of_layers,
    dots,
    interval,
    lines,
    points,
    scatter,
    strips,
)
from neuronsurgery.study.queries import control_p_values, differences, over_draws, over_seeds
from neuronsurgery.study.table import Run, where

Row = dict[str, Any]

FAMILIES: Final[Mapping[str, str]] = {
    "paper": "the paper's fine-tuning",
    "control": "controls",
    "comparison": "other methods",
}
INTERVAL: Final = "95 % interval"
SPLITS: Final = ("train", "held-out", "validation", "test")
BIN: Final = 5
"""Percentiles in a bar of 1b."""


@dataclass(frozen=True)
class Section:
    """A heading of the page with its figures.

    Attributes:
        heading: of the page.
        build: a run -> the figures that it has the rows for.
    """

    heading: str
    build: Callable[[Run], list[Figure]]


def look_of(run: Run) -> Look:
    """Return how the groups of a run are drawn: in the order of the data, the rare ones named so."""
    return Look(run.groups, labels={name: f"{name} (rare)" for name in run.minority})


# Rows


def _rows(run: Run, table: pl.DataFrame, **more: Callable[[Row], Any]) -> list[Row]:
    """Return the rows of a table as a figure has them: in points or percent, with what hovering says.

    Args:
        run: of one seed or of several.
        table: with the seeds taken together.
        more: fields to add, by functions of a row.

    Numbers that some seed lacks are left out: their mean would be of other seeds than the rest.
    """
    look = look_of(run)
    made = []
    for row in table.iter_rows(named=True):
        if row.get("seeds", len(run.seeds)) < len(run.seeds):
            continue
        label = look.label(row["group"]) if row.get("group") else None
        found: Row = {"group": label} | {name: points(row[name]) for name in ("value", "low", "high")}
        found["values"] = [points(value) for value in row["values"] or ()]
        found["interval"] = interval(row)
        found["n"], found["p"] = row.get("n"), p_text(row.get("p"))
        found["neurons"] = names_of(row.get("names"))
        made.append(found | {name: make(row) for name, make in more.items()})
    return made


def p_text(p: float | None) -> str | None:
    """Return a p-value as it is read."""
    return None if p is None else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def names_of(names: str | None) -> str | None:
    """Return the first neurons of an edit."""
    if not names:
        return None
    every = names.split(";")
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


CHANGE: Final = {"group": "group", "value": "change, points", "interval": INTERVAL, "p": "p", "n": "images"}
"""The columns of a figure of changes: p is McNemar's exact test, of several draws their median."""

DIFFERENCE: Final = {"value": "difference, points", "interval": INTERVAL}
"""The columns of a figure of differences, beside those that say between what."""


def _comparisons(rows: Sequence[Row]) -> str:
    count = sum(row["low"] is not None for row in rows)
    return f"{count} intervals in all, of which about {0.05 * count:.0f} exclude 0 by chance alone."


def _over(run: Run) -> str:
    if len(run.seeds) > 1:
        return f"Dot: mean of {len(run.seeds)} seeds; line: Student's 95 % interval; strokes: the seeds."
    return "Line: 95 % interval over the images."


def _chosen_for(name: str) -> str:
    return "largest magnitude" if name == "all" else f"gradient of {name}"


def _split_choice(table: pl.DataFrame) -> Choice:
    return Choice("split", "images:", next((split for split in SPLITS if split in set(table["split"])), None))


# The trained network


def accuracy(run: Run) -> list[Figure]:
    """Return the accuracies of the trained network."""
    found = over_seeds(run, run.rows(experiment="accuracy"))
    rows = _rows(run, found, split=lambda row: row["split"])
    if not rows:
        return []
    columns = {"split": "images", "group": "group", "value": "accuracy, %", "interval": INTERVAL, "n": "number"}
    return [
        dots(
            "accuracy",
            "Accuracy of the trained network",
            f"{_over(run)} A rare group that is right in training and wrong in test is remembered.",
            rows,
            look_of(run),
            axis="accuracy, %",
            by="split",
            columns=columns,
            limits=(0.0, 100.0),
            line=None,
            order=[split for split in SPLITS if split in set(found["split"])],
        )
    ]


# Stage 1


def _change_rows(run: Run, experiments: tuple[str, ...], **more: Callable[[Row], Any]) -> list[Row]:
    changes = run.rows(experiment=experiments, measure="change")
    if changes.is_empty():
        return []
    return _rows(run, over_seeds(run, over_draws(changes)), **more)


def _edit_words(row: Row) -> str:
    if row["std"] is not None:
        return f"{row['edit']}, std {row['std']:g}"
    return str(row["edit"]) + (f", std {row['relative_std']:g} x RMS" if row["relative_std"] is not None else "")


def _draws(row: Row) -> str:
    """Return how many draws there were, and in how many, over all seeds, the interval excludes 0."""
    return str(row["draws"]) if row["draws"] == 1 else f"{row['draws']}; {row['seen']} exclude 0"


def cuts(run: Run) -> list[Figure]:
    """Return 1a, 1c and 1d: the top neurons of the model zeroed, drawn anew, disturbed."""
    rows = _change_rows(
        run,
        ("1a", "1c", "1d"),
        edit=_edit_words,
        k=lambda row: row["k"],
        chosen=lambda row: _chosen_for(row["chosen_for"]),
        split=lambda row: row["split"],
        draws=_draws,
    )
    if not rows:
        return []
    columns = {"chosen": "chosen by", "edit": "edit", "k": "k", **CHANGE, "draws": "draws", "neurons": "neurons"}
    return [
        dots(
            "cuts",
            "What editing the most critical neurons does to every group",
            f"{_over(run)} Of several draws: their mean, lowest and highest. {_comparisons(rows)} A cut of what "
            f"carries one group moves that group alone.",
            rows,
            look_of(run),
            axis="change of accuracy, points",
            by="chosen",
            columns=columns,
            choices=(Choice("edit", "edit:", "zero"), Choice("k", "top", 3), Choice("split", "images:", run.split)),
        )
    ]


def controls(run: Run) -> list[Figure]:
    """Return 1g: as many random neurons as critical ones, and shares of the model."""
    return [*_matched(run), *_shares(run)]


def _matched(run: Run) -> list[Figure]:
    tests = control_p_values(run.table) if {"1a", "1g"} <= run.experiments else pl.DataFrame()
    if tests.is_empty():
        return []
    drawn = run.rows(experiment="1g", measure="change").filter(pl.col("k").is_not_null())
    look, rows = look_of(run), []
    own = tests.filter((pl.col("group") == pl.col("chosen_for")) & (pl.col("criterion") == "gradient"))
    keys = ("chosen_for", "k", "kind", "split")
    for (name, k, kind, split), found in own.group_by(keys, maintain_order=True):
        selector = "random" if kind == "whole model" else str(kind)
        values = where(drawn, selector=selector, chosen_for=name, group=name, k=k, split=split)["value"]
        ps, draws, distinct = found["p"].to_list(), found["draws"].to_list(), found["distinct"].to_list()
        rows.append(
            {
                "group": look.label(str(name)),
                "k": k,
                "kind": kind,
                "split": split,
                "value": points(float(found["value"].to_numpy().mean())),
                "drawn": [points(value) for value in values],
                "p": ", ".join(str(p_text(p)) for p in ps),
                "draws": f"{draws[0]} ({min(distinct)} different)",
            }
        )
    columns = {
        "group": "group",
        "k": "k",
        "kind": "random from",
        "value": "critical, points",
        "p": "p",
        "draws": "draws",
    }
    return [
        strips(
            "controls",
            "Critical neurons beside random ones",
            f"Dot: what a group's own top neurons change it by; strokes: as many random ones. p: the share of draws "
            f"that change it as much, (1 + as many) / (1 + draws). {len(rows)} tests.",
            [row for row in rows if row["drawn"]],
            look,
            axis="change of the group's own accuracy, points",
            by="group",
            columns=columns,
            choices=(
                Choice("k", "top", 3),
                Choice("kind", "random from the", "same layers"),
                Choice("split", "images:", run.split),
            ),
        )
    ]


def _shares(run: Run) -> list[Figure]:
    changes = run.rows(experiment="1g", split=run.split, measure="change").filter(pl.col("fraction").is_not_null())
    if changes.is_empty():
        return []
    rows = _rows(
        run,
        over_seeds(run, over_draws(changes)),
        fraction=lambda row: f"{100 * row['fraction']:g} %",
        draws=_draws,
    )
    columns = {"fraction": "of the model", **CHANGE, "draws": "draws"}
    return [
        columns_of_layers(
            "shares",
            "Random neurons, a share of the model at a time",
            "Mean, lowest and highest of the draws." if len(run.seeds) == 1 else _over(run),
            rows,
            look_of(run),
            axis="change of accuracy, points",
            by="fraction",
            columns=columns,
            heading="neurons cut, of the model",
        )
    ]


def sets(run: Run) -> list[Figure]:
    """Return 1h: sets that were searched on one half of the images, and judged on the other."""
    found = over_seeds(run, run.rows(experiment="1h"))
    measures = {
        "net": "net: own loss beyond the worst other's",
        "own": "change of its own accuracy",
        "worst_other": "change of the other group that loses most",
        "right_lost": "share of its right images that are lost, judged half",
        "test_right_lost": "share of its right images that are lost, test",
    }
    found = where(found, measure=tuple(measures)).filter(pl.col("k").is_not_null())
    rows = _rows(
        run,
        found,
        images=lambda row: (
            row["group"] if row["selector"] == "critical" else f"{row['group']} like {row['chosen_for']}"
        ),
        k=lambda row: row["k"],
        measure=lambda row: measures[row["measure"]],
        draws=lambda row: row["n"] or None,
    )
    if not rows:
        return []
    for row in rows:
        row["n"] = None
    columns = {"images": "searched and judged", "k": "at most", "measure": "measure", "value": "points"}
    columns |= {"interval": INTERVAL, "p": "p", "draws": "random sets", "neurons": "neurons"}
    return [
        dots(
            "sets",
            "Sets of few neurons, found on one half of the images and judged on the other",
            f"{_over(run)} The search has not seen the half that judges. Controls: images of a majority group, as hard "
            f"as a rare group's, searched alike. p: random sets of the same layers with at least this net.",
            rows,
            look_of(run),
            axis="points, on images that were not searched",
            by="images",
            columns=columns,
            choices=(Choice("measure", "show", measures["net"]), Choice("k", "at most", 3)),
        )
    ]


def layers(run: Run) -> list[Figure]:
    """Return 1e and 1f: the top neurons within each layer zeroed, and each layer rewound."""
    more = {"layer": lambda row: row["layer"].removesuffix(".weight"), "split": lambda row: row["split"]}
    cut = _change_rows(run, ("1e",), k=lambda row: row["k"], chosen=lambda row: _chosen_for(row["chosen_for"]), **more)
    rewound = _change_rows(
        run,
        ("1f",),
        distance=lambda row: row["distance"],
        norm=lambda row: "layer and norm" if row["with_norm"] else "layer alone",
        **more,
    )
    figures = []
    rarest = _chosen_for(run.minority[0]) if run.minority else None
    split = Choice("split", "images:", run.split)
    if cut:
        figures.append(
            columns_of_layers(
                "layers",
                "The top neurons of one layer zeroed",
                f"{_over(run)} {_comparisons(cut)}",
                cut,
                look_of(run),
                axis="change of accuracy, points",
                by="layer",
                columns={"layer": "layer", "chosen": "chosen by", "k": "k", **CHANGE, "neurons": "neurons"},
                choices=(Choice("chosen", "chosen by", rarest), Choice("k", "top", 3), split),
            )
        )
    if rewound:
        missing = run.about.get("missing_distances") or []
        lacking = f" This run is too short for {', '.join(map(str, missing))} epochs back." if missing else ""
        figures.append(
            columns_of_layers(
                "rewinding",
                "One layer put back to an earlier epoch",
                f"{_over(run)} {_comparisons(rewound)}{lacking}",
                rewound,
                look_of(run),
                axis="change of accuracy, points",
                by="layer",
                columns={"layer": "layer", "distance": "epochs back", "norm": "rewound", **CHANGE},
                choices=(Choice("distance", "epochs back:", 10), Choice("norm", "rewound:", "layer alone"), split),
            )
        )
    return figures


def ranks(run: Run) -> list[Figure]:
    """Return 1b: where the top neurons by one criterion rank by the other."""
    found = run.rows(experiment="1b", split=run.split)
    if found.is_empty():
        return []
    bins = (pl.col("value") / BIN).ceil().cast(pl.Int64).clip(1, 100 // BIN)
    counted = found.group_by("selector", "fraction", "group", bins.alias("bin"), maintain_order=True).len()
    totals = counted.group_by("selector", "fraction", "group").agg(pl.col("len").sum().alias("of"))
    look, rows = look_of(run), []
    for row in counted.join(totals, on=["selector", "fraction", "group"]).sort("bin").iter_rows(named=True):
        other = "magnitude" if row["selector"] == "gradient" else "gradient"
        rows.append(
            {
                "group": look.label(row["group"]),
                "chosen": f"top {100 * row['fraction']:g} % by {row['selector']}",
                "bin": f"{BIN * (row['bin'] - 1)} to {BIN * row['bin']}",
                "ranked": other,
                "value": round(100 * row["len"] / row["of"], 2),
                "count": f"{row['len']} of {row['of']}",
            }
        )
    columns = {"chosen": "neurons", "group": "group", "ranked": "ranked by", "bin": "percentile", "value": "share, %"}
    return [
        columns_of_layers(
            "ranks",
            "Where the critical neurons rank by the other criterion",
            "100 is the largest of the model. Bars far right: the two criteria choose the same neurons.",
            rows,
            look,
            axis="share of the chosen neurons, %",
            by="bin",
            columns={**columns, "count": "neurons"},
            choices=(Choice("chosen", "neurons:", "top 5 % by gradient"),),
            kind="bars",
            heading="percentile by the other criterion",
            order=[f"{low} to {low + BIN}" for low in range(0, 100, BIN)],
        )
    ]


# Stage 2


def arms(run: Run) -> list[Figure]:
    """Return the worst group of every way to train, and how it went from epoch to epoch."""
    said = {arm["name"]: arm for arm in run.about.get("stage_two", {}).get("arms", ())}
    found = over_seeds(run, run.rows(experiment="arms", measure=("worst group", "plain average")))
    if found.is_empty():
        return []
    rows = _rows(
        run,
        found,
        arm=lambda row: row["selector"],
        family=lambda row: FAMILIES[said[row["selector"]]["family"]],
        rule=lambda row: row["rule"],
        measure=lambda row: row["measure"],
        labels=lambda row: said[row["selector"]]["labels"],
        epoch=lambda row: row.get("epoch"),
        worst=lambda row: row["note"] if len(run.seeds) == 1 and row["measure"] == "worst group" else None,
    )
    order = sorted(said, key=lambda name: list(FAMILIES).index(said[name]["family"]))
    unlabelled = run.about["stage_two"].get("class_labels_of", "held-out")
    rules = run.about["stage_two"].get("selections", {})
    told = "; ".join(f"{rule}: {labels.replace('held-out', unlabelled)}" for rule, labels in rules.items())
    columns = {"arm": "method", "value": "accuracy, %", "interval": INTERVAL, "worst": "worst group", "epoch": "epoch"}
    columns |= {"labels": "labels of training", "family": "kind", "rule": "epoch chosen by"}
    failed = "; ".join(f"{arm['name']}: {arm['impossible']}" for arm in said.values() if "impossible" in arm)
    lost = f" Could not be trained: {failed}." if failed else ""
    if unlabelled == "validation" and len(set(run.about["counts"].get("validation", ()))) == 1:
        lost += " These validation images are balanced over groups, which is itself knowledge of the groups."
    return [
        dots(
            "arms",
            "Accuracy of the worst test group, by method",
            f"{_over(run)} Labels that choose the epoch: {told}.{lost}",
            rows,
            Look(list(FAMILIES.values()), field="family", colours=OTHER_COLOURS),
            axis="accuracy, %",
            by="arm",
            columns=columns,
            choices=(Choice("rule", "epoch chosen by", _rule(found)), Choice("measure", "of the", "worst group")),
            limits=(0.0, 100.0),
            line=None,
            order=order,
            aside=False,
        ),
        *_differences(run, said),
        *_epochs(run, said),
    ]


def _differences(run: Run, said: Mapping[str, Row]) -> list[Figure]:
    """Return over seeds how far each of the paper's arms is above each control in the worst group."""
    own, controls = ([arm for arm in said if said[arm]["family"] == family] for family in ("paper", "control"))
    columns = {"arm": "method", "control": "control", "rule": "epoch chosen by", **DIFFERENCE}
    return _compared(
        run,
        run.rows(experiment="arms", measure="worst group"),
        [(arm, control) for arm in own for control in controls],
        "differences",
        "The paper's fine-tuning minus its controls, seed by seed",
        "Right of 0 the worst test group is better than under the control.",
        look=Look(own, field="arm", colours=OTHER_COLOURS),
        axis="difference of the worst test group, points",
        columns=columns,
    )


def _compared(
    run: Run,
    table: pl.DataFrame,
    pairs: Sequence[tuple[str, str]],
    name: str,
    title: str,
    note: str,
    *,
    look: Look,
    axis: str,
    columns: Mapping[str, str],
    aside: bool = True,
) -> list[Figure]:
    """Return a figure of `differences`, with what it is called and drawn as by `dots`; none of one seed."""
    found = differences(run, table, pairs)
    if found.is_empty():
        return []
    fields = {"arm": "selector", "control": "control", "rule": "rule"}
    rows = _rows(run, found, **{field: operator.itemgetter(column) for field, column in fields.items()})
    said, choices = f"{_over(run)} {note} {_comparisons(rows)}", (Choice("rule", "epoch chosen by", _rule(found)),)
    return [dots(name, title, said, rows, look, axis=axis, by="control", columns=columns, choices=choices, aside=aside)]


def _rule(found: pl.DataFrame) -> str | None:
    return next((rule for rule in ("worst group", "class labels") if rule in set(found["rule"])), None)


def _epochs(run: Run, said: Mapping[str, Row]) -> list[Figure]:
    found = run.rows(experiment="epochs", split="test", measure="accuracy")
    worst = found.group_by("seed", "selector", "epoch", maintain_order=True).agg(
        pl.col("value").min(), pl.col("group").sort_by("value").first().alias("worst")
    )
    means = worst.group_by("selector", "epoch", maintain_order=True).agg(
        pl.col("value").mean(), pl.col("worst").first(), pl.len().alias("seeds")
    )
    trained = means.filter(pl.len().over("selector") > 1)
    if trained.is_empty():
        return []
    rows = [
        {
            "arm": row["selector"],
            "family": FAMILIES[said[row["selector"]]["family"]],
            "epoch": row["epoch"],
            "value": points(row["value"]),
            "worst": row["worst"] if len(run.seeds) == 1 else None,
            "seeds": row["seeds"],
        }
        for row in trained.iter_rows(named=True)
    ]
    return [
        lines(
            "epochs",
            "The worst test group, epoch by epoch",
            "What an arm would have come to, had it been stopped there.",
            rows,
            Look(list(dict.fromkeys(row["arm"] for row in rows)), field="arm", colours=OTHER_COLOURS, fixed=False),
            x="epoch",
            axes=("epoch", "accuracy of the worst test group, %"),
            columns={"arm": "method", "epoch": "epoch", "value": "worst group, %", "worst": "which", "seeds": "seeds"},
            choices=(Choice("family", "show", FAMILIES["paper"]),),
        )
    ]


# Fragility


def fragility(run: Run) -> list[Figure]:
    """Return who stands out without group labels, and what retraining on groups so inferred comes to."""
    return [*_detection(run), *_detection_differences(run), *_cloud(run), *_mitigation(run)]


def _detection(run: Run) -> list[Figure]:
    found = over_seeds(run, run.rows(experiment="detection", measure=("AUC", "average precision")))
    if found.is_empty():
        return []
    rows = _rows(
        run,
        found,
        score=lambda row: row["selector"],
        measure=lambda row: row["measure"],
        split=lambda row: row["split"],
        needs=lambda row: row["note"],
    )
    shown = [name for name in run.groups if name in set(found["group"])]
    columns = {"score": "score", "group": "group", "value": "%", "interval": INTERVAL, "n": "of the group"}
    flags = run.rows(experiment="flagged", measure="flagged", split="train").group_by("group", maintain_order=True)
    told = ", ".join(f"{100 * float(rows['value'].to_numpy().mean()):.0f} % of {name}" for (name,), rows in flags)
    return [
        dots(
            "detection",
            "Which score finds a rare group within its class",
            f"{_over(run)} 50 is chance. No score sees group labels; {len(shown)} groups are judged by them."
            + (f" The fence calls fragile: {told}." if told else ""),
            rows,
            look_of(run),
            axis="%, among the images of the class",
            by="score",
            columns={**columns, "needs": "needs"},
            choices=(Choice("measure", "measure:", "AUC"), _split_choice(found)),
            line=50.0,
        )
    ]


def _detection_differences(run: Run) -> list[Figure]:
    """Return over seeds how far the AUC of the knockout is above that of every other score."""
    found = run.rows(experiment="detection", measure="AUC", split="train")
    return _compared(
        run,
        found,
        [(KNOCKOUT, name) for name in found["selector"].unique(maintain_order=True) if name != KNOCKOUT],
        "detection-differences",
        "AUC of the knockout minus that of every other score, seed by seed",
        "Right of 0 the knockout finds the group better.",
        look=look_of(run),
        axis="difference of the AUC, points",
        columns={"control": "other score", "group": "group", **DIFFERENCE},
    )


def _cloud(run: Run) -> list[Figure]:
    found = run.rows(experiment="points", seed=run.seeds[0])
    if found.is_empty():
        return []
    look = look_of(run)
    wide = found.pivot("measure", index=["group", "draw"], values="value", maintain_order=True)
    rows = [
        {"group": look.label(row["group"]), "x": row["minus final margin"], "y": row["fragility"]}
        for row in wide.iter_rows(named=True)
    ]
    seed = f" Of seed {run.seeds[0]}." if len(run.seeds) > 1 else ""
    return [
        scatter(
            "cloud",
            "Fragility and the final margin",
            f"A dot is a training image. High: wrong once the last residual stage is cut; right: wrong as it is.{seed}",
            rows,
            look,
            axes=("minus the final margin", "fragility"),
            columns={"group": "group", "x": "minus the final margin", "y": "fragility"},
        )
    ]


def _mitigation(run: Run) -> list[Figure]:
    found = over_seeds(run, run.rows(experiment="mitigation", split="test"))
    said = {row["name"]: row for row in run.about.get("fragility", {}).get("mitigation", ())}
    rows = _rows(
        run,
        found,
        way=lambda row: row["selector"],
        of=lambda row: row["group"] or "worst group",
        labels=lambda row: said[row["selector"]]["labels"],
        images=lambda row: said[row["selector"]]["images"],
        worst=lambda row: row["note"] if len(run.seeds) == 1 else None,
    )
    if not rows:
        return []
    failed = "; ".join(f"{row['name']}: {row['impossible']}" for row in said.values() if "impossible" in row)
    look = Look([*run.groups, "worst group"], labels=look_of(run).labels)  # a group has its colour everywhere
    for row in rows:
        row["group"] = look.label(row["of"])
    columns = {"way": "last layer", "of": "group", "value": "accuracy, %", "interval": INTERVAL, "n": "images"}
    columns |= {"worst": "which", "labels": "labels", "images": "retrained on"}
    return [
        dots(
            "mitigation",
            "The last layer retrained: test accuracy",
            f"{_over(run)} Each needs the labels that its row names." + (f" Impossible: {failed}." if failed else ""),
            rows,
            look,
            axis="accuracy, %",
            by="way",
            columns=columns,
            choices=(Choice("of", "of the", "worst group"),),
            limits=(0.0, 100.0),
            line=None,
            order=[name for name in said if name in {row["way"] for row in rows}],
            aside=False,
        ),
        *_retraining_differences(run),
    ]


def _retraining_differences(run: Run) -> list[Figure]:
    """Return over seeds how far retraining on inferred groups is above every other way."""
    worst = run.rows(experiment="mitigation", measure="worst group")
    return _compared(
        run,
        worst,
        [(RETRAINED, name) for name in worst["selector"].unique(maintain_order=True) if name != RETRAINED],
        "retraining-differences",
        "Retrained on inferred groups, minus every other way, seed by seed",
        "Right of 0 the worst test group is better than with the other way.",
        look=Look([RETRAINED], field="arm", colours=OTHER_COLOURS),
        axis="difference of the worst test group, points",
        columns={"control": "other way", **DIFFERENCE},
        aside=False,
    )


SECTIONS: Final = (
    Section("The trained network", accuracy),
    Section("The paper's critical neurons", cuts),
    Section("Random neurons beside them", controls),
    Section("Critical sets, searched and judged", sets),
    Section("Layer by layer", layers),
    Section("Gradient and magnitude", ranks),
    Section("Mitigation without group labels", arms),
    Section("Fragility", fragility),
)
"""Every section of a report, in the order of the page."""


def figures_of(run: Run) -> list[tuple[str, list[Figure]]]:
    """Return the sections that a run has figures for, each with its heading."""
    built = ((section.heading, section.build(run)) for section in SECTIONS)
    return [(heading, figures) for heading, figures in built if figures]


def every_figure(sections: Iterable[tuple[str, Sequence[Figure]]]) -> list[Figure]:
    """Return the figures of all sections.

    Raises:
        ValueError: if two have one name: the second would take the place of the first.
    """
    figures = [figure for _, of_section in sections for figure in of_section]
    names = [figure.name for figure in figures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two figures of the report are called {', '.join(twice)}: give each section names of its own")
    return figures
