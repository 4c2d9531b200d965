"""The charts of a report: a figure for each thing that was measured, of one run or over seeds.

A figure is a query of a run's table and an entry of `figures.json`: how its rows are drawn, see `pages.charts.Figure`,
with the `field` that has a colour for each value, and of each choice the title and what is chosen at first, if it is
there. It has no rows where nothing was measured. What is said of it stands in the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import polars as pl

from neuronsurgery.study.claims import KNOCKOUT, RETRAINED
from neuronsurgery.study.pages.charts import OTHER_COLOURS, Figure, Look, interval, points
from neuronsurgery.study.queries import control_p_values, differences, over_draws, over_seeds
from neuronsurgery.study.table import Run

CHARTS: Final[Mapping[str, Mapping[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text())

FAMILIES: Final = {"paper": "the paper's fine-tuning", "control": "controls", "comparison": "other methods"}
MEASURES: Final = {
    "net": "net: own loss beyond the worst other's",
    "own": "change of its own accuracy",
    "worst_other": "change of the other group that loses most",
    "right_lost": "share of its right images that are lost, judged half",
    "test_right_lost": "share of its right images that are lost, test",
}
SPLITS: Final = ["train", "held-out", "validation", "test"]
BIN: Final = 5
"""Percentiles in a bar of 1b."""


def figures_of(run: Run) -> dict[str, Figure]:
    """Return the figures that a run has the rows for, by name."""
    tables = {name: query(run) for name, query in QUERIES.items()}
    return {name: _figure(run, table, **CHARTS[name]) for name, table in tables.items() if len(table)}


def _figure(run: Run, table: pl.DataFrame, field: str = "group", **how: Any) -> Figure:
    """Return a figure of the rows of a table: numbers in points or percent; groups, p-values and neurons in words."""
    labels = {name: f"{name} (rare)" for name in run.minority}
    words: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("value", "low", "high"), points),
        **dict.fromkeys(("values", "drawn"), lambda shares: [*map(points, shares)]),
        "group": lambda name: labels.get(name, name),
        "p": p_text,
        "names": names_of,
    }
    rows = [
        {**row, **{name: word(row[name]) for name, word in words.items() if name in row}, "interval": interval(row)}
        for row in table.iter_rows(named=True)
    ]
    if field == "group":  # which has its colour everywhere, whoever is shown
        look = Look(list(dict.fromkeys([*run.groups, *table["group"]])), labels=labels)
    else:
        names = list(dict.fromkeys(table[field]))
        look = Look(names, field, colours=OTHER_COLOURS, fixed=how.get("kind") != "lines")
    return Figure(rows, look, **how)


def p_text(p: float | None) -> str | None:
    """Return a p-value as it is read."""
    return None if p is None else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def names_of(names: str | None) -> str | None:
    """Return the first neurons of an edit."""
    every = (names or "").split(";")
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "") or None


def _together(run: Run, table: pl.DataFrame) -> pl.DataFrame:
    """Return rows with the seeds taken together, but for numbers that some seed lacks: of others than the rest."""
    return over_seeds(run, table).filter(pl.col("seeds") == len(run.seeds))


def _said(run: Run, stage: str, of: str, key: str) -> pl.Expr:
    """Return what results.json says of the method of a row."""
    return pl.col("selector").replace({row["name"]: row[key] for row in run.about.get(stage, {}).get(of, ())})


def _by_family(run: Run, table: pl.DataFrame) -> pl.DataFrame:
    """Return rows of arms in the order of their families, with these in words."""
    known = table.with_columns(family=_said(run, "stage_two", "arms", "family"))
    ordered = known.sort(pl.col("family").cast(pl.Enum(list(FAMILIES))), maintain_order=True)
    return ordered.with_columns(pl.col("family").replace(FAMILIES))


def _of_one_seed(run: Run, column: str) -> pl.Expr:
    return pl.col(column) if len(run.seeds) == 1 else pl.lit(None)


def _plain(number: pl.Expr) -> pl.Expr:
    return number.cast(pl.String).str.strip_suffix(".0")


SHARE: Final = pl.format("{} %", _plain((100 * pl.col("fraction")).round(6)))


def accuracy(run: Run) -> pl.DataFrame:
    """Return the accuracies of the trained network."""
    found = _together(run, run.rows(experiment="accuracy"))
    return found.sort(pl.col("split").cast(pl.Enum(SPLITS)), maintain_order=True)


# Stage 1


def changed(run: Run, experiments: tuple[str, ...]) -> pl.DataFrame:
    """Return the changes of some experiments, draws and seeds taken together, and what was done in words."""
    found = _together(run, over_draws(run.rows(experiment=experiments, measure="change")))
    std, relative = _plain(pl.col("std")), _plain(pl.col("relative_std"))
    own = pl.format("gradient of {}", "chosen_for")
    return found.with_columns(
        pl.col("layer").str.strip_suffix(".weight"),
        chosen=pl.when(chosen_for="all").then(pl.lit("largest magnitude")).otherwise(own),
        edit=pl.concat_str(
            "edit", pl.format(", std {}", std), pl.format(", std {} x RMS", relative), ignore_nulls=True
        ),
        norm=pl.when("with_norm").then(pl.lit("layer and norm")).otherwise(pl.lit("layer alone")),
        share=SHARE,
        # In how many draws, over all seeds, the interval excludes 0.
        draws=pl.when(draws=1).then(pl.lit("1")).otherwise(pl.format("{}; {} exclude 0", "draws", "seen")),
    )


def controls(run: Run) -> pl.DataFrame:
    """Return 1a beside 1g: as many random neurons as critical ones."""
    own = control_p_values(run.table).filter(
        pl.col("group") == pl.col("chosen_for"), pl.col("draws") > 0, criterion="gradient"
    )
    words = own.with_columns(pl.col("p").map_elements(p_text, pl.String))
    return words.group_by("group", "k", "kind", "split", maintain_order=True).agg(
        pl.col("value").mean(),
        pl.col("drawn").list.explode(),
        ps=pl.col("p").str.join(", "),
        draws=pl.format("{} ({} different)", pl.col("draws").first(), pl.col("distinct").min()),
    )


def shares(run: Run) -> pl.DataFrame:
    """Return 1g: random shares of the model."""
    return changed(run, ("1g",)).drop_nulls("fraction").filter(split=run.split)


def sets(run: Run) -> pl.DataFrame:
    """Return 1h: sets that were searched on one half of the images, and judged on the other."""
    found = _together(run, run.rows(experiment="1h", measure=tuple(MEASURES)))
    alike = pl.format("{}\nlike {}", "group", "chosen_for")  # in two lines, or the second is cut off
    return found.drop_nulls("k").with_columns(
        pl.col("measure").replace(MEASURES),
        images=pl.when(selector="critical").then("group").otherwise(alike),
        draws=pl.when(pl.col("n") > 0).then("n"),
    )


def layers(run: Run) -> pl.DataFrame:
    """Return 1e: the top neurons within each layer zeroed, those of the rarest group first."""
    return changed(run, ("1e",)).sort(~pl.col("chosen_for").is_in(list(run.minority[:1])), maintain_order=True)


def ranks(run: Run) -> pl.DataFrame:
    """Return 1b: where the top neurons by one criterion rank by the other."""
    by, place = ("selector", "fraction", "group"), (pl.col("value") / BIN).ceil().clip(1, 100 // BIN).cast(pl.Int64)
    rows = run.rows(experiment="1b", split=run.split)
    counted = rows.group_by(*by, place.alias("place"), maintain_order=True).len().sort("place", maintain_order=True)
    of, last = pl.col("len").sum().over(by), BIN * pl.col("place")
    return counted.with_columns(
        chosen=pl.format("top {} by {}", SHARE, "selector"),
        ranked=pl.when(selector="gradient").then(pl.lit("magnitude")).otherwise(pl.lit("gradient")),
        bin=pl.format("{} to {}", last - BIN, last),
        value=pl.col("len") / of,
        count=pl.format("{} of {}", "len", of),
    )


# Stage 2


def arms(run: Run) -> pl.DataFrame:
    """Return the worst group of every way to train."""
    found = _together(run, run.rows(experiment="arms", measure=("worst group", "plain average")))
    return _by_family(run, found).with_columns(
        labels=_said(run, "stage_two", "arms", "labels"),
        worst=pl.when(measure="worst group").then(_of_one_seed(run, "note")),
    )


def arm_differences(run: Run) -> pl.DataFrame:
    """Return over seeds how far each of the paper's arms is above each control in the worst group."""
    said = run.about.get("stage_two", {}).get("arms", ())
    own, others = ([arm["name"] for arm in said if arm["family"] == family] for family in ("paper", "control"))
    rows = run.rows(experiment="arms", measure="worst group")
    return differences(run, rows, [(one, other) for one in own for other in others])


def epochs(run: Run) -> pl.DataFrame:
    """Return the worst group of every arm from epoch to epoch, of those that were trained for several."""
    found = run.rows(experiment="epochs", split="test", measure="accuracy")
    by_seed = found.group_by("seed", "selector", "epoch", maintain_order=True).agg(
        pl.col("value", "group").sort_by("value").first()
    )
    means = by_seed.group_by("selector", "epoch", maintain_order=True).agg(
        pl.col("value").mean(), worst=_of_one_seed(run, "group").first(), seeds=pl.len()
    )
    return _by_family(run, means.filter(pl.len().over("selector") > 1))


# Fragility


def detection(run: Run) -> pl.DataFrame:
    """Return who stands out without group labels."""
    return _together(run, run.rows(experiment="detection", measure=("AUC", "average precision")))


def _against_others(run: Run, own: str, **which: Any) -> pl.DataFrame:
    """Return over seeds how far one selector is above every other."""
    rows = run.rows(**which)
    others = rows["selector"].unique(maintain_order=True).to_list()
    return differences(run, rows, [(own, other) for other in others if other != own])


def cloud(run: Run) -> pl.DataFrame:
    """Return the fragility of single images beside how wrong they are, of the first seed."""
    found, measures = run.rows(experiment="points", seed=run.seeds[0]), ["minus final margin", "fragility"]
    wide = found.pivot("measure", on_columns=measures, index=["group", "draw"], values="value", maintain_order=True)
    return wide.select("group", x=measures[0], y=measures[1])


def mitigation(run: Run) -> pl.DataFrame:
    """Return what retraining the last layer on groups comes to, inferred or true."""
    of = pl.col("group").fill_null("worst group")
    return _together(run, run.rows(experiment="mitigation", split="test")).with_columns(
        labels=_said(run, "fragility", "mitigation", "labels"),
        images=_said(run, "fragility", "mitigation", "images"),
        worst=_of_one_seed(run, "note"),
        group=of,
        of=of,
    )


QUERIES: Final[Mapping[str, Callable[[Run], pl.DataFrame]]] = {
    "accuracy": accuracy,
    "cuts": partial(changed, experiments=("1a", "1c", "1d")),
    "controls": controls,
    "shares": shares,
    "sets": sets,
    "layers": layers,
    "rewinding": partial(changed, experiments=("1f",)),
    "ranks": ranks,
    "arms": arms,
    "differences": arm_differences,
    "epochs": epochs,
    "detection": detection,
    "detection-differences": partial(
        _against_others, own=KNOCKOUT, experiment="detection", measure="AUC", split="train"
    ),
    "cloud": cloud,
    "mitigation": mitigation,
    "retraining-differences": partial(_against_others, own=RETRAINED, experiment="mitigation", measure="worst group"),
}
"""By figure, in the order of the page."""
