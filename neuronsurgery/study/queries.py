"""What is asked of the table of a run again and again: draws taken together, seeds taken together, pairs, p-values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

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
    """Return one row per intervention, group and seed of a table of changes, the draws of each taken together.

    "value" is the mean, "low" and "high" are the lowest and the highest draw (of a single draw, its interval), "p" is
    the median. New are "draws", and "seen": in how many of them the interval excludes 0, on the side where more do.
    """
    value, low, high, alone = pl.col("value"), pl.col("low"), pl.col("high"), pl.len() == 1
    return table.group_by("seed", *(name for name in KEYS if name != "draw"), maintain_order=True).agg(
        pl.col("neurons", "n").first(),
        _if_alike("names"),
        value.mean(),
        low=pl.when(alone).then(low.first()).otherwise(value.min()),
        high=pl.when(alone).then(high.first()).otherwise(value.max()),
        p=pl.col("p").median(),
        draws=pl.len(),
        seen=pl.max_horizontal((low > 0).sum(), (high < 0).sum()),
    )


def _if_alike(name: str) -> pl.Expr:
    """Return the one value that all rows have; nothing where they differ."""
    return pl.when(pl.col(name).n_unique() == 1).then(pl.col(name).first()).alias(name)


def over_seeds(run: Run, table: pl.DataFrame) -> pl.DataFrame:
    """Return one row per number of some rows of a run, perhaps with draws taken together, the seeds taken together.

    Of one seed, the rows are as they were. Of several, "value" is the mean, "low" and "high" Student's 95 % interval of
    it, and "p" is empty. New are "values", those of the seeds, and "seeds", how many have the number.
    """
    if run.about.get("kind") != "seeds":
        return table.with_columns(pl.concat_list("value").alias("values"), pl.lit(1).alias("seeds"))
    keys, first, alike, counted = (
        [name for name in names if name in table.columns]
        for names in (KEYS, ("neurons", "n", "note", "draws"), ("names", "epoch"), ("seen",))
    )
    together = table.group_by(keys, maintain_order=True).agg(
        pl.col("value").drop_nulls().alias("values"),
        pl.col(first).first(),
        *map(_if_alike, alike),
        pl.col(counted).sum(),
    )
    return _with_means(together).with_columns(p=pl.lit(None, pl.Float64))


def _with_means(table: pl.DataFrame) -> pl.DataFrame:
    """Return a table of "values" with their mean, its interval where there are several, and the number of "seeds"."""
    every = table["values"].to_list()
    ends = [mean_interval(values) if len(values) > 1 else (None, None) for values in every]
    return table.with_columns(
        pl.col("values").list.mean().alias("value"),
        pl.Series("low", [low for low, _ in ends], pl.Float64),
        pl.Series("high", [high for _, high in ends], pl.Float64),
        pl.col("values").list.len().alias("seeds"),
    )


def differences(run: Run, table: pl.DataFrame, pairs: Iterable[tuple[str, str]]) -> pl.DataFrame:
    """Return by how much the number of one selector is above that of another, seed by seed, of a run of several seeds.

    The rows of the table are of one measure, each selector with at most one for each rule and group. The columns are
    "selector", "control", "rule", "group" and those of `over_seeds`; pairs that some seed lacks are left out.
    """
    on = ["seed", "rule", "group"]
    asked = pl.DataFrame(list(pairs), {"selector": pl.String, "control": pl.String}, orient="row")
    numbers = table.select("selector", *on, "value")
    others = numbers.rename({"selector": "control", "value": "other"})
    both = asked.join(numbers, on="selector", maintain_order="left_right").join(
        others, on=["control", *on], nulls_equal=True, maintain_order="left"
    )
    by_seed = both.group_by("selector", "control", "rule", "group", maintain_order=True).agg(
        values=pl.col("value") - pl.col("other")
    )
    several = pl.lit(len(run.seeds) > 1)
    return _with_means(by_seed.filter(several, pl.col("values").list.len() == len(run.seeds)))


def sensitive_layers(table: pl.DataFrame) -> pl.DataFrame:
    """Return by seed, distance, norm and group how many layers of 1f are "sensitive"."""
    # A hundredth itself counts, whatever its last bit.
    hit = pl.col("value").abs() >= SENSITIVE - 1e-9
    rows = where(table, experiment="1f", measure="change")
    keys = ("seed", "split", "distance", "with_norm", "group")
    return rows.group_by(keys, maintain_order=True).agg(sensitive=hit.sum())


def control_p_values(table: pl.DataFrame) -> pl.DataFrame:
    """Return for each set of 1a and each group the share of controls of 1g that change it as much.

    That is (1 + as much) / (1 + draws). Draws of a few neurons from a small layer repeat: "distinct" says how many
    different ones there were; "kind" where they are from: "same layers" or "whole model"; "drawn" what they change.
    """
    kinds = pl.DataFrame({"selector": ["same layers", "random"], "kind": ["same layers", "whole model"]})
    on = ["seed", "split", "chosen_for", "k", "group"]
    chosen = where(table, experiment="1a", measure="change").select(*on, "value", criterion="selector")
    drawn = where(table, experiment="1g", measure="change").select(*on, "selector", "names", drawn="value")
    paired = kinds.join(chosen, how="cross").join(drawn, on=[*on, "selector"], how="left", maintain_order="left_right")
    as_much = (pl.col("drawn").abs() >= pl.col("value").abs() - 1e-12).sum()
    draws = pl.col("drawn").count()
    return paired.group_by(*on, "criterion", "value", "kind", maintain_order=True).agg(
        pl.col("drawn").drop_nulls(),
        draws=draws,
        distinct=pl.col("names").drop_nulls().n_unique(),
        p=(1 + as_much) / (1 + draws),
    )


def verdict(values: Sequence[float], *, bound: float = 0.0, side: str = "above", level: float = LEVEL) -> Verdict:
    """Return whether the mean over seeds lies "above" or "below" a bound, as far as its interval tells."""
    if len(values) < 2:
        return "one seed only"
    low, high = mean_interval(values, level)
    inside, outside = (low > bound, high <= bound) if side == "above" else (high < bound, low >= bound)
    return "holds" if inside else "does not hold" if outside else "undecided"


def sum_interval(terms: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Return the interval of a weighted sum of independent estimates: of each its weight, value, low and high.

    The lower end is sum(c x) - sqrt(sum(d ** 2)), d being how far c x may be too high by its own interval; the upper
    end likewise. Of estimates on the same images it is, as a rule, wider than it need be.

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
