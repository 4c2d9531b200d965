"""The charts of a report: a figure for each thing that was measured, of one run or over seeds.

A figure is made from a run's rows of the table, in points or percent; it has no rows where these were not measured.
What is said of it stands in the template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import polars as pl

from neuronsurgery.study import queries
from neuronsurgery.study.claims import KNOCKOUT, RETRAINED
from neuronsurgery.study.pages.charts import OTHER_COLOURS, Choice, Figure, Look, interval, points
from neuronsurgery.study.queries import control_p_values, over_draws, over_seeds
from neuronsurgery.study.table import Row, Run

FAMILIES: Final[Mapping[str, str]] = {
    "paper": "the paper's fine-tuning",
    "control": "controls",
    "comparison": "other methods",
}
MEASURES: Final[Mapping[str, str]] = {
    "net": "net: own loss beyond the worst other's",
    "own": "change of its own accuracy",
    "worst_other": "change of the other group that loses most",
    "right_lost": "share of its right images that are lost, judged half",
    "test_right_lost": "share of its right images that are lost, test",
}
SPLITS: Final = ("train", "held-out", "validation", "test")
BIN: Final = 5
"""Percentiles in a bar of 1b."""

PERCENT: Final = (0.0, 100.0)
OF_CHANGES: Final = "change of accuracy, points"
INTERVAL: Final = {"interval": "95 % interval"}
ACCURACY: Final = {"value": "accuracy, %", **INTERVAL}
CHANGE: Final = {"group": "group", "value": "change, points", **INTERVAL, "p": "p", "n": "images"}
"""The columns of a figure of changes: p is McNemar's exact test, of several draws their median."""


def look_of(run: Run) -> Look:
    """Return how the groups of a run are drawn: in the order of the data, the rare ones named so."""
    return Look(run.groups, labels={name: f"{name} (rare)" for name in run.minority})


def _rows(run: Run, table: pl.DataFrame) -> list[Row]:
    """Return the rows of a table, the seeds taken together, as figures have them: in points or percent, and in words.

    Numbers that some seed lacks are left out: their mean would be of other seeds than the rest.
    """
    look = look_of(run)
    return [
        {
            **row,
            **{name: points(row[name]) for name in ("value", "low", "high")},
            "group": look.label(row["group"]) if row["group"] else None,
            "values": [points(value) for value in row["values"]],
            "interval": interval(row),
            "p": p_text(row.get("p")),
            "neurons": names_of(row.get("names")),
        }
        for row in table.filter(pl.col("seeds") == len(run.seeds)).iter_rows(named=True)
    ]


def p_text(p: float | None) -> str | None:
    """Return a p-value as it is read."""
    return None if p is None else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def names_of(names: str | None) -> str | None:
    """Return the first neurons of an edit."""
    if not names:
        return None
    every = names.split(";")
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def _changed(run: Run, *experiments: str, **which: Any) -> list[Row]:
    """Return the changes of some experiments, draws and seeds taken together."""
    rows = _rows(run, over_seeds(run, over_draws(run.rows(experiment=experiments, measure="change", **which))))
    for row in rows:
        row["chosen"] = _chosen_for(row["chosen_for"])
        row["layer"] = (row["layer"] or "").removesuffix(".weight")
        row["norm"] = "layer and norm" if row["with_norm"] else "layer alone"
        row["edit"] += "" if row["std"] is None else f", std {row['std']:g}"
        row["edit"] += "" if row["relative_std"] is None else f", std {row['relative_std']:g} x RMS"
        row["share"] = f"{100 * (row['fraction'] or 0):g} %"
        # In how many draws, over all seeds, the interval excludes 0.
        row["draws"] = str(row["draws"]) if row["draws"] == 1 else f"{row['draws']}; {row['seen']} exclude 0"
    return rows


def _chosen_for(name: str) -> str:
    return "largest magnitude" if name == "all" else f"gradient of {name}"


def _said(run: Run, stage: str, key: str) -> dict[str, Row]:
    """Return the methods of a stage by name, as results.json has them."""
    return {row["name"]: row for row in run.about.get(stage, {}).get(key, ())}


def _each(said: Mapping[str, Any]) -> pl.Expr:
    """Return what is said of the method of a row."""
    return pl.col("selector").replace(dict(said))


# The trained network


def accuracy(run: Run) -> Figure:
    """Return the accuracies of the trained network."""
    found = over_seeds(run, run.rows(experiment="accuracy"))
    return Figure(
        _rows(run, found),
        look_of(run),
        axis="accuracy, %",
        by="split",
        columns={"split": "images", "group": "group", **ACCURACY, "n": "number"},
        limits=PERCENT,
        line=None,
        order=[split for split in SPLITS if split in set(found["split"])],
    )


# Stage 1


def cuts(run: Run) -> Figure:
    """Return 1a, 1c and 1d: the top neurons of the model zeroed, drawn anew, disturbed."""
    return Figure(
        _changed(run, "1a", "1c", "1d"),
        look_of(run),
        axis=OF_CHANGES,
        by="chosen",
        columns={"chosen": "chosen by", "edit": "edit", "k": "k", **CHANGE, "draws": "draws", "neurons": "neurons"},
        choices=(Choice("edit", "edit:", "zero"), Choice("k", "top", 3), Choice("split", "images:", run.split)),
    )


def controls(run: Run) -> Figure:
    """Return 1a beside 1g: as many random neurons as critical ones."""
    own = control_p_values(run.table).filter(
        pl.col("group") == pl.col("chosen_for"), pl.col("draws") > 0, criterion="gradient"
    )
    found = own.group_by("group", "k", "kind", "split", maintain_order=True).agg(
        "p", pl.col("value").mean(), pl.col("drawn").list.explode(), pl.col("draws").first(), pl.col("distinct").min()
    )
    rows = [
        {
            **row,
            "group": look_of(run).label(row["group"]),
            "value": points(row["value"]),
            "drawn": [points(value) for value in row["drawn"]],
            "p": ", ".join(str(p_text(p)) for p in row["p"]),
            "draws": f"{row['draws']} ({row['distinct']} different)",
        }
        for row in found.iter_rows(named=True)
    ]
    columns = {"group": "group", "k": "k", "kind": "random from", "value": "critical, points", "p": "p"}
    kind = Choice("kind", "random from the", "same layers")
    return Figure(
        rows,
        look_of(run),
        kind="strips",
        axis="change of the group's own accuracy, points",
        by="group",
        columns={**columns, "draws": "draws"},
        choices=(Choice("k", "top", 3), kind, Choice("split", "images:", run.split)),
    )


def shares(run: Run) -> Figure:
    """Return 1g: random shares of the model."""
    return Figure(
        [row for row in _changed(run, "1g", split=run.split) if row["fraction"] is not None],
        look_of(run),
        kind="columns",
        axis=OF_CHANGES,
        by="share",
        columns={"share": "of the model", **CHANGE, "draws": "draws"},
        heading="neurons cut, of the model",
    )


def sets(run: Run) -> Figure:
    """Return 1h: sets that were searched on one half of the images, and judged on the other."""
    of_sets = run.rows(experiment="1h", measure=tuple(MEASURES)).filter(pl.col("k").is_not_null())
    found = over_seeds(run, of_sets).with_columns(
        pl.col("measure").replace(dict(MEASURES)),
        images=pl.when(selector="critical").then("group").otherwise(pl.format("{} like {}", "group", "chosen_for")),
        draws=pl.when(pl.col("n") > 0).then("n"),
    )
    columns = {"images": "searched and judged", "k": "at most", "measure": "measure", "value": "points", **INTERVAL}
    return Figure(
        _rows(run, found),
        look_of(run),
        axis="points, on images that were not searched",
        by="images",
        columns={**columns, "p": "p", "draws": "random sets", "neurons": "neurons"},
        choices=(Choice("measure", "show", MEASURES["net"]), Choice("k", "at most", 3)),
    )


def layers(run: Run) -> Figure:
    """Return 1e: the top neurons within each layer zeroed."""
    rarest = _chosen_for(run.minority[0]) if run.minority else None
    return Figure(
        _changed(run, "1e"),
        look_of(run),
        kind="columns",
        axis=OF_CHANGES,
        by="layer",
        columns={"layer": "layer", "chosen": "chosen by", "k": "k", **CHANGE, "neurons": "neurons"},
        choices=(Choice("chosen", "chosen by", rarest), Choice("k", "top", 3), Choice("split", "images:", run.split)),
    )


def rewinding(run: Run) -> Figure:
    """Return 1f: each layer put back to an earlier epoch."""
    distance, norm = Choice("distance", "epochs back:", 10), Choice("norm", "rewound:", "layer alone")
    return Figure(
        _changed(run, "1f"),
        look_of(run),
        kind="columns",
        axis=OF_CHANGES,
        by="layer",
        columns={"layer": "layer", "distance": "epochs back", "norm": "rewound", **CHANGE},
        choices=(distance, norm, Choice("split", "images:", run.split)),
    )


def ranks(run: Run) -> Figure:
    """Return 1b: where the top neurons by one criterion rank by the other."""
    found, chosen = run.rows(experiment="1b", split=run.split), ("selector", "fraction", "group")
    place = (pl.col("value") / BIN).ceil().cast(pl.Int64).clip(1, 100 // BIN)
    counted = found.group_by(*chosen, place.alias("bin"), maintain_order=True).len()
    every = counted.with_columns(of=pl.col("len").sum().over(chosen)).sort("bin", maintain_order=True)
    bins = [f"{low} to {low + BIN}" for low in range(0, 100, BIN)]
    rows = [
        {
            "group": look_of(run).label(row["group"]),
            "chosen": f"top {100 * row['fraction']:g} % by {row['selector']}",
            "bin": bins[row["bin"] - 1],
            "ranked": "magnitude" if row["selector"] == "gradient" else "gradient",
            "value": points(row["len"] / row["of"]),
            "count": f"{row['len']} of {row['of']}",
        }
        for row in every.iter_rows(named=True)
    ]
    columns = {"chosen": "neurons", "group": "group", "ranked": "ranked by", "bin": "percentile", "value": "share, %"}
    return Figure(
        rows,
        look_of(run),
        kind="bars",
        axis="share of the chosen neurons, %",
        by="bin",
        columns={**columns, "count": "neurons"},
        choices=(Choice("chosen", "neurons:", "top 5 % by gradient"),),
        heading="percentile by the other criterion",
        order=bins,
    )


# Stage 2


def arms(run: Run) -> Figure:
    """Return the worst group of every way to train."""
    said = _said(run, "stage_two", "arms")
    families = {name: FAMILIES[arm["family"]] for name, arm in said.items()}
    found = over_seeds(run, run.rows(experiment="arms", measure=("worst group", "plain average"))).with_columns(
        family=_each(families),
        labels=_each({name: arm["labels"] for name, arm in said.items()}),
        worst=pl.when(pl.lit(len(run.seeds) == 1), measure="worst group").then("note"),
    )
    columns = {"selector": "method", **ACCURACY, "worst": "worst group", "epoch": "epoch"}
    return Figure(
        _rows(run, found),
        Look(list(FAMILIES.values()), field="family", colours=OTHER_COLOURS),
        axis="accuracy, %",
        by="selector",
        columns={**columns, "labels": "labels of training", "family": "kind", "rule": "epoch chosen by"},
        choices=(_rule(found), Choice("measure", "of the", "worst group")),
        limits=PERCENT,
        line=None,
        order=[name for family in FAMILIES.values() for name in said if families[name] == family],
        aside=False,
    )


def _rule(found: pl.DataFrame) -> Choice:
    rules = set(found["rule"])
    return Choice(
        "rule", "epoch chosen by", next((one for one in ("worst group", "class labels") if one in rules), None)
    )


def _compared(run: Run, table: pl.DataFrame, own: Sequence[str], others: Sequence[str], **how: Any) -> Figure:
    """Return how far some selectors are above others, seed by seed; no rows of one seed."""
    found = queries.differences(run, table, [(one, other) for one in own for other in others])
    columns = {**how.pop("columns"), "value": "difference, points", **INTERVAL}
    return Figure(_rows(run, found), by="control", columns=columns, choices=(_rule(found),), **how)


def differences(run: Run) -> Figure:
    """Return over seeds how far each of the paper's arms is above each control in the worst group."""
    said = _said(run, "stage_two", "arms")
    own, others = ([name for name, arm in said.items() if arm["family"] == family] for family in ("paper", "control"))
    return _compared(
        run,
        run.rows(experiment="arms", measure="worst group"),
        own,
        others,
        look=Look(own, field="selector", colours=OTHER_COLOURS),
        axis="difference of the worst test group, points",
        columns={"selector": "method", "control": "control", "rule": "epoch chosen by"},
    )


def epochs(run: Run) -> Figure:
    """Return the worst group of every arm from epoch to epoch, of those that were trained for several."""
    families = {name: FAMILIES[arm["family"]] for name, arm in _said(run, "stage_two", "arms").items()}
    found = run.rows(experiment="epochs", split="test", measure="accuracy")
    by_seed = found.group_by("seed", "selector", "epoch", maintain_order=True).agg(
        pl.col("value").min(), worst=pl.col("group").sort_by("value").first()
    )
    worst = pl.col("worst").first() if len(run.seeds) == 1 else pl.lit(None)
    means = by_seed.group_by("selector", "epoch", maintain_order=True).agg(
        pl.col("value").mean(), worst=worst, seeds=pl.len()
    )
    trained = means.filter(pl.len().over("selector") > 1).with_columns(family=_each(families))
    rows = [{**row, "value": points(row["value"])} for row in trained.iter_rows(named=True)]
    columns = {"selector": "method", "epoch": "epoch", "value": "worst group, %", "worst": "which", "seeds": "seeds"}
    return Figure(
        rows,
        Look(list(dict.fromkeys(trained["selector"])), field="selector", colours=OTHER_COLOURS, fixed=False),
        kind="lines",
        axis="accuracy of the worst test group, %",
        by="epoch",
        columns=columns,
        heading="epoch",
        choices=(Choice("family", "show", FAMILIES["paper"]),),
    )


# Fragility


def detection(run: Run) -> Figure:
    """Return who stands out without group labels."""
    found = over_seeds(run, run.rows(experiment="detection", measure=("AUC", "average precision")))
    split = next((split for split in SPLITS if split in set(found["split"])), None)
    columns = {"selector": "score", "group": "group", "value": "%", **INTERVAL, "n": "of the group", "note": "needs"}
    return Figure(
        _rows(run, found),
        look_of(run),
        axis="%, among the images of the class",
        by="selector",
        columns=columns,
        choices=(Choice("measure", "measure:", "AUC"), Choice("split", "images:", split)),
        line=50.0,
    )


def detection_differences(run: Run) -> Figure:
    """Return over seeds how far the AUC of the knockout is above that of every other score."""
    found = run.rows(experiment="detection", measure="AUC", split="train")
    return _compared(
        run,
        found,
        [KNOCKOUT],
        [name for name in found["selector"].unique(maintain_order=True) if name != KNOCKOUT],
        look=look_of(run),
        axis="difference of the AUC, points",
        columns={"control": "other score", "group": "group"},
    )


def cloud(run: Run) -> Figure:
    """Return the fragility of single images beside how wrong they are, of the first seed."""
    measures = ["minus final margin", "fragility"]
    found = run.rows(experiment="points", seed=run.seeds[0])
    wide = found.pivot("measure", on_columns=measures, index=["group", "draw"], values="value", maintain_order=True)
    return Figure(
        [{"group": look_of(run).label(group), "x": x, "y": y} for group, _, x, y in wide.iter_rows()],
        look_of(run),
        kind="cloud",
        axis="fragility",
        columns={"group": "group", "x": "minus the final margin", "y": "fragility"},
        heading="minus the final margin",
    )


def mitigation(run: Run) -> Figure:
    """Return what retraining the last layer on groups comes to, inferred or true."""
    said, of = _said(run, "fragility", "mitigation"), pl.col("group").fill_null("worst group")
    found = over_seeds(run, run.rows(experiment="mitigation", split="test")).with_columns(
        labels=_each({name: row["labels"] for name, row in said.items()}),
        images=_each({name: row["images"] for name, row in said.items()}),
        worst=pl.col("note") if len(run.seeds) == 1 else pl.lit(None),
        group=of,
        of=of,
    )
    rows = _rows(run, found)
    columns = {"selector": "last layer", "of": "group", **ACCURACY, "n": "images", "worst": "which"}
    return Figure(
        rows,
        Look([*run.groups, "worst group"], labels=look_of(run).labels),  # a group has its colour everywhere
        axis="accuracy, %",
        by="selector",
        columns={**columns, "labels": "labels", "images": "retrained on"},
        choices=(Choice("of", "of the", "worst group"),),
        limits=PERCENT,
        line=None,
        order=[name for name in said if name in {row["selector"] for row in rows}],
        aside=False,
    )


def retraining_differences(run: Run) -> Figure:
    """Return over seeds how far retraining on inferred groups is above every other way."""
    worst = run.rows(experiment="mitigation", measure="worst group")
    return _compared(
        run,
        worst,
        [RETRAINED],
        [name for name in worst["selector"].unique(maintain_order=True) if name != RETRAINED],
        look=Look([RETRAINED], field="selector", colours=OTHER_COLOURS),
        axis="difference of the worst test group, points",
        columns={"control": "other way"},
        aside=False,
    )


FIGURES: Final[Sequence[Callable[[Run], Figure]]] = (
    *(accuracy, cuts, controls, shares, sets, layers, rewinding, ranks, arms, differences, epochs),
    *(detection, detection_differences, cloud, mitigation, retraining_differences),
)


def figures_of(run: Run) -> dict[str, Figure]:
    """Return the figures that a run has the rows for, by name."""
    built = {make.__name__.replace("_", "-"): make(run) for make in FIGURES}
    return {name: figure for name, figure in built.items() if figure.rows}
