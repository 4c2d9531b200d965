"""What is asked of the table of a run again and again: draws taken together, seeds taken together, pairs, p-values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias

import polars as pl

from neuronsurgery.study.table import KEYS, Run, where

Verdict: TypeAlias = Literal["holds", "does not hold", "undecided", "one seed only"]

LEVEL: Final = 0.95
SENSITIVE: Final = 0.01
"""A layer is sensitive for a group whose accuracy changes by one point or more when it is rewound."""


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return Student's confidence interval of the mean of independent values; infinite for a single one."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return (-math.inf, math.inf)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread
    mean = statistics.fmean(values)
    return (mean - half, mean + half)


def over_draws(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row per intervention, group and seed, the draws of each taken together.

    Args:
        table: rows of changes.

    Returns:
        The columns of the table without "draw"; "value" is the mean, "low" and "high" the lowest and the highest draw
        (of a single draw, its interval), "p" the median; and "sd" (null for one draw), "draws", and "seen": in how many
        draws the interval excludes 0 on the side where more of them do.
    """
    keys = ["seed", *(name for name in KEYS if name != "draw")]
    alone = pl.len() == 1
    return table.group_by(keys, maintain_order=True).agg(
        pl.col("neurons").first(),
        _if_alike("names"),
        pl.col("value").mean(),
        pl.when(alone).then(pl.col("low").first()).otherwise(pl.col("value").min()).alias("low"),
        pl.when(alone).then(pl.col("high").first()).otherwise(pl.col("value").max()).alias("high"),
        pl.col("value").std().alias("sd"),
        pl.col("p").median(),
        pl.col("n").first(),
        pl.len().alias("draws"),
        pl.max_horizontal((pl.col("low") > 0).sum(), (pl.col("high") < 0).sum()).alias("seen"),
    )


def _if_alike(name: str) -> pl.Expr:
    """Return the one value that all rows have; nothing where they differ."""
    return pl.when(pl.col(name).n_unique() == 1).then(pl.col(name).first()).alias(name)


def over_seeds(run: Run, table: pl.DataFrame, *, epochs: bool = False) -> pl.DataFrame:
    """Return one row per number, the seeds taken together.

    Args:
        run: whose table it is of.
        table: some of its rows, perhaps with draws taken together.
        epochs: whether "epoch" tells numbers apart, as in a trajectory.

    Returns:
        Of one seed, the rows as they are. Of several, "value" is the mean, "low" and "high" Student's 95 % interval of
        it, "p" is empty. Always with "values", those of the seeds; "seeds", how many have the number.
    """
    if run.about.get("kind") != "seeds":
        return table.with_columns(pl.concat_list("value").alias("values"), pl.lit(1).alias("seeds"))
    keys = [name for name in KEYS if name in table.columns] + ["epoch"] * epochs
    more = [pl.col(name).first() for name in ("neurons", "n", "note", "draws") if name in table.columns]
    more += [_if_alike("names")] if "names" in table.columns else []
    counted = [pl.col("seen").sum()] if "seen" in table.columns else []
    values = pl.col("value").drop_nulls().alias("values")
    together = table.group_by(keys, maintain_order=True).agg(values, *more, *counted)
    finite = [mean_interval(values) if len(values) > 1 else (None, None) for values in together["values"].to_list()]
    return together.with_columns(
        pl.col("values").list.mean().alias("value"),
        pl.Series("low", [low for low, _ in finite], dtype=pl.Float64),
        pl.Series("high", [high for _, high in finite], dtype=pl.Float64),
        pl.lit(None, dtype=pl.Float64).alias("p"),
        pl.col("values").list.len().alias("seeds"),
    )


def differences(run: Run, table: pl.DataFrame, pairs: Iterable[tuple[str, str]]) -> pl.DataFrame:
    """Return by how much the number of one selector is above that of another, seed by seed.

    Args:
        run: of several seeds; of one there are none.
        table: rows of one measure, each selector with at most one for each rule and group.
        pairs: of selectors; those that some seed lacks are left out.

    Returns:
        The columns "selector", "control", "rule", "group", "value" (the mean), "low" and "high" (Student's 95 %
        interval of it), "values".
    """
    rows: list[dict[str, Any]] = []
    keys = ["seed", "rule", "group"]
    for one, other in pairs if len(run.seeds) > 1 else ():
        both = where(table, selector=one).join(where(table, selector=other), on=keys, suffix="_other", nulls_equal=True)
        for (rule, group), found in both.group_by("rule", "group", maintain_order=True):
            values = (found["value"] - found["value_other"]).to_list()
            if len(values) == len(run.seeds):
                low, high = mean_interval(values)
                said = {"selector": one, "control": other, "rule": rule, "group": group, "values": values}
                rows.append({**said, "value": statistics.fmean(values), "low": low, "high": high})
    return pl.DataFrame(rows)


def sensitive_layers(table: pl.DataFrame) -> pl.DataFrame:
    """Return by seed, distance, norm and group how many layers of 1f are "sensitive", of how many "layers"."""
    keys = ["seed", "split", "distance", "with_norm", "group"]
    # A hundredth itself counts, whatever its last bit.
    hit = pl.col("value").abs() >= SENSITIVE - 1e-9
    rows = where(table, experiment="1f", measure="change")
    return rows.group_by(keys, maintain_order=True).agg(hit.sum().alias("sensitive"), pl.len().alias("layers"))


def control_p_values(table: pl.DataFrame) -> pl.DataFrame:
    """Return for each set of 1a and each group the share of controls of 1g that change it as much.

    That is (1 + as much) / (1 + draws). Draws of a few neurons from a small layer repeat: "distinct" says how many
    different ones there were; "kind" where they are from: "same layers" or "whole model".
    """
    on = ["seed", "split", "chosen_for", "k", "group"]
    matched = where(table, experiment="1g", measure="change").filter(pl.col("k").is_not_null())
    controls = matched.group_by([*on, "selector"]).agg(pl.col("value").alias("drawn"), pl.col("names").n_unique())
    chosen = where(table, experiment="1a", measure="change").select(*on, pl.col("selector").alias("criterion"), "value")
    rows = []
    for kind, words in (("same layers", "same layers"), ("random", "whole model")):
        own = where(controls, selector=kind).drop("selector")
        for row in chosen.join(own, on=on, how="left", maintain_order="left").to_dicts():
            drawn = row.pop("drawn") or []
            as_much = sum(abs(value) >= abs(row["value"]) - 1e-12 for value in drawn)
            found = {"kind": words, "draws": len(drawn), "distinct": row.pop("names") or 0}
            rows.append({**row, **found, "p": (1 + as_much) / (1 + len(drawn))})
    schema = {name: table.schema[name] for name in ("seed", "split", "chosen_for", "k", "group")}
    return pl.DataFrame(rows, schema=None if rows else {**schema, "kind": pl.String, "p": pl.Float64})


def verdict(values: Sequence[float], *, bound: float = 0.0, side: str = "above", level: float = LEVEL) -> Verdict:
    """Return whether the mean over seeds lies on one side of a bound, as far as its interval tells.

    Args:
        values: one per seed.
        bound: of the claim.
        side: "above" or "below": where the claim has it.
        level: of Student's interval.
    """
    if len(values) < 2:
        return "one seed only"
    low, high = mean_interval(values, level)
    inside, outside = (low > bound, high <= bound) if side == "above" else (high < bound, low >= bound)
    return "holds" if inside else "does not hold" if outside else "undecided"


def sum_interval(terms: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Return the interval of a weighted sum of independent estimates, from the interval of each.

    The lower end is sum(c x) - sqrt(sum(d ** 2)), d being how far c x may be too high by its own interval; the upper
    end likewise. Of estimates on the same images it is, as a rule, wider than it need be.

    Args:
        terms: weight c, estimate x, lower and upper end.

    Source: Zou and Donner (2008), the method of variance estimates recovery; of two proportions, Newcombe (1998).

    Example:
        >>> sum_interval([(1.0, 0.5, 0.2, 0.8), (-1.0, 0.5, 0.1, 0.9)])
        (-0.5, 0.5)
    """
    total = sum(weight * value for weight, value, _, _ in terms)
    ends = [sorted((weight * low, weight * high)) for weight, _, low, high in terms]
    below = math.hypot(*(weight * value - low for (weight, value, _, _), (low, _) in zip(terms, ends, strict=True)))
    above = math.hypot(*(high - weight * value for (weight, value, _, _), (_, high) in zip(terms, ends, strict=True)))
    return total - below, total + above


def auc_interval(auc: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the normal 95 % interval of an area under the curve, within [0, 1].

    Source: Hanley and McNeil (1982).
    """
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    half = 1.959964 * math.sqrt(max(0.0, variance) / (positives * negatives))
    return max(0.0, auc - half), min(1.0, auc + half)
