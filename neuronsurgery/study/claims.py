"""What the paper claims and what is asked beside it, each as one number per run, and what several runs say.

A claim is a row of `claims.csv`: a measure of one run, and the side of a bound on which it is claimed to lie. Over
several seeds it *holds* where the whole 95 % interval of the mean lies on that side, it *does not hold* where all of it
lies on the other, and else it is *undecided*. The interval is Student's, over the seeds; every measure and bound stood
before the seeds were looked at. Claims of 1h have rules of their own. Those with a question are the first screen of a
report, with what their number is told to be.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import polars as pl

from neuronsurgery.study.queries import LEVEL, auc_interval, mean_interval, sensitive_layers, sum_interval, verdict
from neuronsurgery.study.table import Row, Run, where

CONTINUED: Final = "ERM continued, chosen"
PRUNED: Final = "pruned by gradient"
KNOCKOUT: Final = "knockout"
RETRAINED: Final = "inferred by knockout"
RULES: Final = ("worst group", "inferred groups", "class labels", "last epoch")
"""Rules that choose an epoch: the one that looks at most labels comes first."""


class Number(NamedTuple):
    """What a measure comes to in one run, with its 95 % interval over the examples; or why it is lacking."""

    value: float | None
    low: float | None = None
    high: float | None = None
    lacking: str = ""


Amount: TypeAlias = Callable[[Run, str], float | None]
Measure: TypeAlias = Callable[[Run, str], Number | float | None]
"""(run of one seed, group) -> a number; None where the run has no rows for it."""

CLAIMS: Final[Sequence[Row]] = [
    {**row, "bound": float(row["bound"]), "paper": row["paper"] == "true"}
    for row in csv.DictReader(Path(__file__).with_suffix(".csv").read_text().splitlines())
]
"""By column: of which experiment the table must have rows; the key of `MEASURES`, its unit, the side of the bound;
whether it is about every group or the minority; whether the paper claims it; the figure that shows more; the texts."""


def judge(run: Run) -> list[Row]:
    """Return one record per claim and group of a run of one or more seeds: every seed's value, the mean, a verdict.

    Claims are left out that some seed has no rows for. A claim of 1h that some seed has no number for has none, and the
    reason as its verdict.
    """
    runs = [run.of_seed(seed) for seed in run.seeds]
    records = (
        _judged(claim, runs, group)
        for claim in CLAIMS
        if all(claim["experiment"] in one.experiments for one in runs)
        for group in (run.minority if claim["of"] == "minority" else run.groups)
    )
    return [record for record in records if record]


def _judged(claim: Row, runs: Sequence[Run], group: str) -> Row | None:
    found = [MEASURES[claim["measure"]](run, group) for run in runs]
    numbers = [one if isinstance(one, Number) else Number(one) for one in found if one is not None]
    if len(numbers) < len(runs):
        return None
    record = {**claim, "group": group, "values": [number.value for number in numbers]}
    record |= dict.fromkeys(("mean", "low", "high"))
    values = [number.value for number in numbers if number.value is not None]
    if len(values) < len(runs):
        return {**record, "verdict": next(number.lacking for number in numbers if number.lacking)}
    record["mean"] = statistics.fmean(values)
    if len(runs) == 1:
        return {**record, "low": numbers[0].low, "high": numbers[0].high, "verdict": "one seed only"}
    level = QUESTIONS_LEVEL if claim["experiment"] == "1h" else LEVEL
    record["low"], record["high"] = mean_interval(values, level)
    record |= {} if level == LEVEL else {"level": level}
    if rule := VERDICTS.get(claim["measure"]):
        return {**record, "verdict": rule(record, runs)}
    return {**record, "verdict": verdict(values, bound=claim["bound"], side=claim["side"], level=level)}


# Measures: the paper's have no sign, and are means over k, layers and draws


def _mean(values: pl.Series) -> float | None:
    return 100 * statistics.fmean(values.to_list()) if len(values) else None


def _changes(run: Run, experiment: str, **which: Any) -> pl.DataFrame:
    return run.rows(experiment=experiment, split=run.split, measure="change", **which)


def _effect(run: Run, group: str, experiment: str, **which: Any) -> float | None:
    """Return how much a group changes, in points, under neurons that its own gradient chose."""
    which = {"selector": "gradient", "chosen_for": group, **which}
    return _mean(_changes(run, experiment, group=group, **which)["value"].abs())


def _minus(run: Run, group: str, one: Amount, other: Amount, times: float = 1.0) -> float | None:
    """Return how far one measure is above another, or above a part of it."""
    first, second = one(run, group), other(run, group)
    return None if first is None or second is None else first - times * second


def _over_majority(run: Run, group: str, measure: Amount) -> float | None:
    """Return how much larger a measure is for a group than for the majority groups on their mean."""
    own, others = measure(run, group), [measure(run, name) for name in run.majority]
    known = [other for other in others if other is not None]
    return None if own is None or not known or len(known) < len(others) else own - statistics.fmean(known)


def _training_accuracy(run: Run, group: str) -> float | None:
    return _mean(run.rows(experiment="accuracy", split="train", group=group)["value"])


def _random_control(run: Run, group: str) -> float | None:
    """Return the mean change of a group under random neurons, up to 0.3 % of the model."""
    return _mean(_changes(run, "1g", group=group).filter(pl.col("fraction") <= 0.003)["value"].abs())


def _in_last_bins(run: Run, group: str, chosen_by: str) -> float | None:
    """Return how many, in percent, of a group's top 5 % are in the top tenth by the other criterion."""
    ranks = run.rows(experiment="1b", split=run.split, group=group, selector=chosen_by, fraction=0.05)["value"]
    return _mean(ranks > 90)


def _sensitive(run: Run, group: str) -> float | None:
    """Return the number of layers that are sensitive for a group, on the mean over the distances of 1f."""
    counted = where(sensitive_layers(run.table), split=run.split, with_norm=False, group=group)["sensitive"]
    return statistics.fmean(counted.to_list()) if len(counted) else None


# Measures with an interval over the examples of a single run


def _sum(*terms: tuple[float, Mapping[str, Any]]) -> Number:
    """Return a weighted sum of shares in points, its interval from those of its rows where all have one."""
    value = 100 * sum(weight * row["value"] for weight, row in terms)
    if any(row["low"] is None for _, row in terms):
        return Number(value)
    low, high = sum_interval([(100 * weight, row["value"], row["low"], row["high"]) for weight, row in terms])
    return Number(value, low, high)


def _gap(run: Run, group: str) -> Number | None:
    """Return by how much training accuracy is above test accuracy, beyond the majority groups on their mean."""
    weights = {group: 1.0, **{name: -1 / len(run.majority) for name in run.majority}}
    rows = run.rows(experiment="accuracy", split=("train", "test"), group=tuple(weights)).to_dicts()
    if len(weights) == 1 or len(rows) < 2 * len(weights):
        return None
    return _sum(*((weights[row["group"]] * (1 if row["split"] == "train" else -1), row) for row in rows))


def _beyond_others(run: Run, group: str) -> Number | None:
    """Return how much more a group loses under its own top neurons than the other group that loses most.

    It is the mean over k, and so are its ends: the cuts of one, two and three neurons rise and fall together.
    """
    nets: list[Number] = []
    for _, rows in _changes(run, "1a", selector="gradient", chosen_for=group).group_by("k", maintain_order=True):
        worst = rows.filter(pl.col("group") != group).sort("value").to_dicts()[0]
        nets.append(_sum((-1.0, where(rows, group=group).to_dicts()[0]), (1.0, worst)))
    means = pl.DataFrame(nets, Number._fields, orient="row").mean()
    return Number(*means.row(0)[:3]) if nets else None


def _lift(run: Run, _: str, one: str, other: str, **which: Any) -> Number | None:
    """Return by how much the worst group of one method is above that of another."""
    rows = {row["selector"]: row for row in run.rows(measure="worst group", **which).to_dicts()}
    return _sum((1.0, rows[one]), (-1.0, rows[other])) if one in rows and other in rows else None


def _fine_tuned(run: Run, group: str) -> Number | None:
    """Return by how much the pruned twin is above ERM continued at its best rate, by the first rule that has both."""
    lifts = (_lift(run, group, PRUNED, CONTINUED, experiment="arms", rule=rule) for rule in RULES)
    return next(filter(None, lifts), None)


def _detected(run: Run, group: str) -> Number | None:
    """Return the AUC of the knockout within a group's class, among the training images, in percent."""
    found = run.rows(experiment="detection", split="train", selector=KNOCKOUT, group=group).to_dicts()
    rows = {row["measure"]: row for row in found}
    if "AUC" not in rows:
        return None
    auc, positives = rows["AUC"]["value"], rows["AUC"]["n"]
    low, high = auc_interval(auc, positives, int(rows["of its class"]["value"]) - positives)
    return Number(100 * auc, 100 * low, 100 * high)


# Experiment 1h: sets of at most three neurons, found on half A and judged on half B

QUESTIONS_LEVEL: Final = 1 - 0.05 / 6
"""Three claims about two groups: each interval misses its mean in a sixth of 5 % of all cases."""

SIZE: Final = 3
NET: Final = 30.0
WORST_OTHER: Final = -2.0
NOT_MEMORY: Final = 15.0


def _of_set(run: Run, group: str) -> dict[str, Row]:
    """Return the rows of a group's set of three neurons by measure."""
    # A change of another group's accuracy has that group's name.
    rows = run.rows(experiment="1h", selector="critical", chosen_for=group, group=group, k=SIZE)
    return {row["measure"]: row for row in rows.to_dicts()}


def _net(run: Run, group: str) -> Number:
    """Return the net of a group on half B; 0 where no set was found."""
    net = _of_set(run, group).get("net")
    return _sum((1.0, net)) if net else Number(None, lacking="too few")


def _beyond_controls(run: Run, group: str) -> Number:
    """Return by how much the net of a group is above the mean net of its controls, of the one that there is perhaps."""
    net = _net(run, group).value
    controls = run.rows(experiment="1h", selector="matched", chosen_for=group, measure="net", k=SIZE)
    mean = _mean(controls["value"])
    if net is None or mean is None:
        return Number(None, lacking="too few" if net is None else "no control")
    return Number(net - mean)


def _memory(run: Run, group: str) -> Number:
    """Return by how much the share of right images that are lost is higher on half B than on the test images."""
    own = _of_set(run, group)
    if "net" not in own:
        return Number(None, lacking="too few")
    if not own["net"]["neurons"]:
        return Number(0.0)  # nothing is cut, and nothing lost
    if not {"right_lost", "test_right_lost"} <= own.keys():
        return Number(None, lacking="none right")
    return Number(100 * (own["right_lost"]["value"] - own["test_right_lost"]["value"]))


def _selective(record: Row, runs: Sequence[Run]) -> str:
    """Return the verdict of (a): a mean net of 30 points or more, certainly above 0, and at most 2 from any other."""
    others = [100 * _of_set(run, record["group"])["worst_other"]["value"] for run in runs]
    # Two points and thirty themselves count, whatever their last bit.
    if record["mean"] >= NET - 1e-9 and record["low"] > 0 and statistics.fmean(others) >= WORST_OTHER - 1e-9:
        return "holds"
    return "does not hold" if record["high"] < NET else "undecided"


def _more_where_seen(record: Row, _: Sequence[Run]) -> str:
    return "holds" if record["low"] > 0 else "does not hold" if record["high"] < NOT_MEMORY else "undecided"


LARGEST: Final = 0.02
"""Of the paper's scales: where its random edits show the most."""

CUT: Final = partial(_effect, experiment="1a")
INIT: Final = partial(_effect, experiment="1c", std=LARGEST)
NOISE: Final = partial(_effect, experiment="1d", std=LARGEST)
SAME_LAYERS: Final = partial(_effect, experiment="1g", selector="same layers")

MEASURES: Final[Mapping[str, Measure]] = {
    "training accuracy": _training_accuracy,
    "gap": _gap,
    "own cut": partial(_over_majority, measure=CUT),
    "magnitude": partial(_over_majority, measure=partial(CUT, selector="magnitude", chosen_for="all")),
    "own cut beyond others": _beyond_others,
    "gradient by magnitude": partial(_in_last_bins, chosen_by="gradient"),
    "magnitude by gradient": partial(_in_last_bins, chosen_by="magnitude"),
    "random init": partial(_over_majority, measure=INIT),
    "random init and zeroing": partial(_minus, one=INIT, other=CUT, times=0.5),
    "noise": partial(_over_majority, measure=NOISE),
    "noise and zeroing": partial(_minus, one=CUT, other=NOISE),
    "own cut by layer": partial(_over_majority, measure=partial(_effect, experiment="1e")),
    "rewinding": partial(_over_majority, measure=_sensitive),
    "random of the same layers": partial(_minus, one=CUT, other=SAME_LAYERS),
    "random of the model": _random_control,
    "fine-tuning": _fine_tuned,
    "knockout": _detected,
    "retraining": partial(_lift, one=RETRAINED, other="ERM", experiment="mitigation"),
    "net": _net,
    "net beyond controls": _beyond_controls,
    "memory": _memory,
}

VERDICTS: Final = {"net": _selective, "memory": _more_where_seen}
"""By measure, the verdict of several seeds where it is not by the bound alone."""
