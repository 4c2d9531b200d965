"""What the paper claims and what is asked beside it, each as one number per run, and what several runs say.

A claim is a measure of one run and the side of a bound on which it is claimed to lie. Over several seeds it *holds*
where the whole 95 % interval of the mean lies on that side, it *does not hold* where all of it lies on the other, and
else it is *undecided*. The interval is Student's, over the seeds; every measure and bound stood before the seeds were
looked at. The claims of 1h have rules of their own, see `Question`. The claims of the first screen of a report are
those with a `question`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import polars as pl

from neuronsurgery.study.queries import auc_interval, mean_interval, sensitive_layers, sum_interval, verdict
from neuronsurgery.study.table import Run, where

CONTINUED: Final = "ERM continued"
PRUNED: Final = "pruned by gradient"
KNOCKOUT: Final = "knockout"
RETRAINED: Final = "inferred by knockout"
RULES: Final = ("worst group", "inferred groups", "class labels", "last epoch")
"""Rules that choose an epoch: the one that looks at most labels comes first."""


@dataclass(frozen=True)
class Claim:
    """One claim about some groups.

    Attributes:
        experiment: what the table must have rows of: "accuracy", "1a" to "1g", "arms", "detection", "mitigation".
        text: the claim, in words.
        unit: of the measure: "points", "layers" or "%".
        measure: (run of one seed, group) -> the number; None where this run has none.
        of: about which groups the claim is: "minority" or "every group".
        splits: whose accuracies of every group it needs.
        side: on which side of the bound the number is claimed to be.
        bound: in the unit.
        question: what the first screen of the report asks by it; empty: it is not on it.
        told: what the number is, for the first screen.
        interval: (run of one seed, group) -> the 95 % interval over the examples of a single run; None where there is
            none. Over seeds it is Student's.
        paper: whether the paper claims it.
    """

    experiment: str
    text: str
    unit: Literal["points", "layers", "%"]
    measure: Callable[[Run, str], float | None]
    of: Literal["minority", "every group"] = "minority"
    splits: tuple[str, ...] = ()
    side: Literal["above", "below"] = "above"
    bound: float = 0.0
    question: str = ""
    told: str = ""
    interval: Callable[[Run, str], tuple[float, float] | None] = lambda run, group: None
    paper: bool = True


def judge(run: Run) -> list[dict[str, Any]]:
    """Return one record per claim and group: the value of every seed, their mean, interval and a verdict.

    Args:
        run: of one seed or of several; claims are left out that some seed has no rows for, or images of any group in a
            split whose accuracies they need. A claim of 1h that some seed has no number for has none, and the reason as
            its verdict.
    """
    runs = [run.of_seed(seed) for seed in run.seeds]
    records = []
    for claim in CLAIMS:
        if all(_can_be_judged(claim, one) for one in runs):
            for group in run.minority if claim.of == "minority" else run.groups:
                values = [claim.measure(one, group) for one in runs]
                if None not in values:
                    judged = _judged(claim, [float(value or 0) for value in values])
                    alone = claim.interval(run, group) if len(runs) == 1 else None
                    judged |= {} if alone is None else {"low": alone[0], "high": alone[1]}
                    records.append({**_said(claim), "group": group, **judged})
    if all("1h" in one.experiments for one in runs):
        records += [_answered(question, runs, group) for question in QUESTIONS for group in run.minority]
    return records


def _can_be_judged(claim: Claim, run: Run) -> bool:
    known = run.rows(experiment="accuracy")
    complete = all(set(where(known, split=split)["group"]) == set(run.groups) for split in claim.splits)
    return claim.experiment in run.experiments and complete


def _said(claim: Claim) -> dict[str, Any]:
    said = ("experiment", "text", "unit", "side", "bound", "question", "told", "paper")
    return {name: getattr(claim, name) for name in said}


def _judged(claim: Claim, values: Sequence[float]) -> dict[str, Any]:
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    found = {"values": list(values), "mean": statistics.fmean(values), "low": low, "high": high}
    return {**found, "verdict": verdict(values, bound=claim.bound, side=claim.side)}


# Measures


def _changes(run: Run, experiment: str, **which: Any) -> pl.DataFrame:
    return run.rows(experiment=experiment, split=run.split, measure="change", **which)


def _mean(table: pl.DataFrame) -> float | None:
    """Return the mean size of changes in points: the paper's measure has no sign."""
    return None if table.is_empty() else 100 * float(table["value"].abs().to_numpy().mean())


def _effect(run: Run, group: str, experiment: str, **which: Any) -> float | None:
    """Return the mean change of a group under the neurons that its own gradient chose, over k, layers and draws."""
    which = {"selector": "gradient", "chosen_for": group, **which}
    return _mean(_changes(run, experiment, group=group, **which))


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _over_majority(run: Run, group: str, measure: Callable[[Run, str], float | None]) -> float | None:
    """Return how much larger a measure is for a group than for the majority groups on their mean."""
    others = [measure(run, name) for name in run.majority]
    if not others or None in others:
        return None
    return _difference(measure(run, group), statistics.fmean(float(value or 0) for value in others))


def _accuracy(run: Run, group: str, split: str) -> float:
    return 100 * float(run.rows(experiment="accuracy", split=split, group=group)["value"].item())


def _gap(run: Run, group: str) -> float:
    return _accuracy(run, group, "train") - _accuracy(run, group, "test")


def _matched_control(run: Run, group: str) -> float | None:
    """Return the mean change of a group under random neurons of the same layers, as many as its critical ones."""
    return _effect(run, group, "1g", selector="same layers")


def _random_control(run: Run, group: str) -> float | None:
    """Return the mean change of a group under random neurons, up to 0.3 % of the model."""
    return _mean(_changes(run, "1g", group=group).filter(pl.col("fraction") <= 0.003))


def _in_last_bins(run: Run, group: str, chosen_by: str) -> float | None:
    ranks = run.rows(experiment="1b", split=run.split, group=group, selector=chosen_by, fraction=0.05)["value"]
    return 100 * float((ranks > 90).to_numpy().mean()) if len(ranks) else None


def _sensitive(run: Run, group: str) -> float | None:
    """Return the number of layers that are sensitive for a group, on the mean over the distances of 1f."""
    counted = where(sensitive_layers(run.table), split=run.split, with_norm=False, group=group)["sensitive"]
    return float(counted.to_numpy().mean()) if len(counted) else None


LARGEST: Final = {"std": 0.02}
"""The largest of the paper's scales: where its random edits show the most."""


def _more_than_majority(experiment: str, **which: Any) -> Callable[[Run, str], float | None]:
    return functools.partial(_over_majority, measure=lambda run, group: _effect(run, group, experiment, **which))


def _by_magnitude(run: Run, group: str) -> float | None:
    return _effect(run, group, "1a", selector="magnitude", chosen_for="all")


def _beyond_others(run: Run, group: str) -> float | None:
    """Return how much more a group loses under its own top neurons than the other group that loses most, mean of k."""
    cut = _changes(run, "1a", selector="gradient", chosen_for=group)
    own, others = where(cut, group=group), cut.filter(pl.col("group") != group)
    worst = others.group_by("k").agg(pl.col("value").min().alias("worst"))
    nets = own.join(worst, on="k").select(pl.col("worst") - pl.col("value")).to_series()
    return 100 * float(nets.to_numpy().mean()) if len(nets) else None


def _fine_tuned(run: Run, _: str) -> float | None:
    """Return by how much the pruned twin's worst group is above that of ERM continued at its best rate, in points."""
    for rule in RULES:
        arms = run.rows(experiment="arms", rule=rule, measure="worst group")
        paper, plain = (where(arms, selector=name)["value"] for name in (PRUNED, f"{CONTINUED}, chosen"))
        if len(paper) and len(plain):
            return 100 * float(paper.item() - plain.item())
    return None


def _detected(run: Run, group: str) -> float | None:
    """Return the AUC of the knockout within a group's class, among the training images, in percent."""
    found = run.rows(experiment="detection", split="train", selector=KNOCKOUT, measure="AUC", group=group)["value"]
    return 100 * float(found.item()) if len(found) else None


def _retrained(run: Run, _: str) -> float | None:
    """Return by how much retraining on inferred groups lifts the worst test group above that of ERM, in points."""
    rows = run.rows(experiment="mitigation", measure="worst group")
    own, plain = (where(rows, selector=name)["value"] for name in (RETRAINED, "ERM"))
    return 100 * float(own.item() - plain.item()) if len(own) and len(plain) else None


# Intervals over the examples of a single run


def _term(weight: float, row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    return 100 * weight, row["value"], row["low"], row["high"]


def _gap_interval(run: Run, group: str) -> tuple[float, float]:
    weights = {group: 1.0, **dict.fromkeys(run.majority, -1.0 / len(run.majority))}
    rows = run.rows(experiment="accuracy", split=("train", "test"), group=tuple(weights)).to_dicts()
    return sum_interval([_term(weights[row["group"]] * (1 if row["split"] == "train" else -1), row) for row in rows])


def _beyond_others_interval(run: Run, group: str) -> tuple[float, float]:
    """Return the mean over k of the ends of each net: the cuts of one, two and three neurons rise and fall together."""
    cut = _changes(run, "1a", selector="gradient", chosen_for=group)
    ends = []
    for _, rows in cut.group_by("k"):
        own = where(rows, group=group).to_dicts()[0]
        worst = min(rows.filter(pl.col("group") != group).to_dicts(), key=lambda row: float(row["value"]))
        ends.append(sum_interval([_term(-1.0, own), _term(1.0, worst)]))
    return statistics.fmean(low for low, _ in ends), statistics.fmean(high for _, high in ends)


def _worst_interval(rows: pl.DataFrame, one: str, other: str) -> tuple[float, float]:
    found = [where(rows, selector=name).to_dicts()[0] for name in (one, other)]
    return sum_interval([_term(1.0, found[0]), _term(-1.0, found[1])])


def _fine_tuned_interval(run: Run, _: str) -> tuple[float, float] | None:
    for rule in RULES:
        arms = run.rows(experiment="arms", rule=rule, measure="worst group")
        if {PRUNED, f"{CONTINUED}, chosen"} <= set(arms["selector"]):
            return _worst_interval(arms, PRUNED, f"{CONTINUED}, chosen")
    return None


def _detected_interval(run: Run, group: str) -> tuple[float, float]:
    row = run.rows(experiment="detection", split="train", selector=KNOCKOUT, measure="AUC", group=group).to_dicts()[0]
    counts = run.rows(experiment="detection", split="train", selector=KNOCKOUT, measure="of its class", group=group)
    low, high = auc_interval(row["value"], row["n"], int(counts["value"].item()) - row["n"])
    return 100 * low, 100 * high


def _retrained_interval(run: Run, _: str) -> tuple[float, float]:
    return _worst_interval(run.rows(experiment="mitigation", measure="worst group"), RETRAINED, "ERM")


CLAIMS: Final = (
    Claim(
        "accuracy",
        "training accuracy is near 100 %",
        "%",
        lambda run, group: _accuracy(run, group, "train"),
        splits=("train",),
        bound=95.0,
    ),
    Claim(
        "accuracy",
        "the gap between training and test accuracy is larger than in majority groups",
        "points",
        lambda run, group: _over_majority(run, group, _gap),
        splits=("train", "test"),
        question="Is the rare group remembered rather than learned?",
        told="training minus test accuracy, beyond what it is in the majority groups",
        interval=_gap_interval,
    ),
    Claim(
        "1a",
        "zeroing the top-1 to 3 by the group's gradient changes it more than majority groups change under theirs",
        "points",
        _more_than_majority("1a"),
    ),
    Claim(
        "1a",
        "zeroing the top-1 to 3 by magnitude changes it more than majority groups",
        "points",
        lambda run, group: _over_majority(run, group, _by_magnitude),
    ),
    Claim(
        "1a",
        "zeroing the top-1 to 3 by the group's gradient takes more from it than from any other group",
        "points",
        _beyond_others,
        question="Does the paper's cut hit it more than any other group?",
        told="what its top 1 to 3 neurons by gradient take from it, beyond what they take from any other group",
        interval=_beyond_others_interval,
        paper=False,
    ),
    Claim(
        "1b",
        "most of the top 5 % by gradient are among the top tenth by magnitude",
        "%",
        lambda run, group: _in_last_bins(run, group, "gradient"),
        bound=50.0,
    ),
    Claim(
        "1b",
        "most of the top 5 % by magnitude are among the top tenth by gradient",
        "%",
        lambda run, group: _in_last_bins(run, group, "magnitude"),
        bound=50.0,
    ),
    Claim(
        "1c",
        "random initialisation (std 0.02) of its critical neurons changes it more than majority groups",
        "points",
        _more_than_majority("1c", **LARGEST),
    ),
    Claim(
        "1c",
        "random initialisation changes it at least half as much as zeroing",
        "points",
        lambda run, group: _difference(_effect(run, group, "1c", **LARGEST), (_effect(run, group, "1a") or 0) / 2),
    ),
    Claim(
        "1d",
        "random noise (std 0.02) on its critical neurons changes it more than majority groups",
        "points",
        _more_than_majority("1d", **LARGEST),
    ),
    Claim(
        "1d",
        "random noise changes it less than zeroing",
        "points",
        lambda run, group: _difference(_effect(run, group, "1a"), _effect(run, group, "1d", **LARGEST)),
    ),
    Claim(
        "1e",
        "zeroing the top-1 to 3 within a layer changes it more than majority groups, on the mean over layers",
        "points",
        _more_than_majority("1e"),
    ),
    Claim(
        "1f",
        "more layers are sensitive to rewinding for it than for majority groups, on the mean over distances",
        "layers",
        lambda run, group: _over_majority(run, group, _sensitive),
    ),
    Claim(
        "1g",
        "its critical neurons change it more than random ones of the same layers",
        "points",
        lambda run, group: _difference(_effect(run, group, "1a"), _matched_control(run, group)),
    ),
    Claim(
        "1g",
        "random neurons, up to 0.3 % of the model, change it by less than a point",
        "points",
        _random_control,
        "every group",
        side="below",
        bound=1.0,
    ),
    Claim(
        "arms",
        "fine-tuning against the pruned twin has a better worst group than ERM continued at its best rate",
        "points",
        _fine_tuned,
        question="Does fine-tuning against the pruned twin beat ERM at its best rate?",
        told="worst test group, against ERM trained on for as many epochs",
        interval=_fine_tuned_interval,
    ),
    Claim(
        "detection",
        "the cut of the last residual stage ranks it above the rest of its class (AUC)",
        "%",
        _detected,
        bound=50.0,
        question="Does fragility, which needs no group labels, find the rare group?",
        told="area under the curve within its class; 50 is chance",
        interval=_detected_interval,
        paper=False,
    ),
    Claim(
        "mitigation",
        "the last layer retrained on inferred groups has a better worst group than ERM",
        "points",
        _retrained,
        question="Does retraining the last layer on inferred groups help the worst group?",
        told="worst test group, against the trained network",
        interval=_retrained_interval,
        paper=False,
    ),
)


# Experiment 1h

QUESTIONS_LEVEL: Final = 1 - 0.05 / 6
"""Three claims about two groups: each interval misses its mean in a sixth of 5 % of all cases."""

SIZE: Final = 3
NET: Final = 30.0
WORST_OTHER: Final = -2.0
NOT_MEMORY: Final = 15.0


@dataclass(frozen=True)
class Question:
    """One claim of 1h, about sets of at most three neurons, found on half A and judged on half B.

    Attributes:
        text: the claim, in words.
        question: what the first screen of the report asks by it.
        told: what the number is, for the first screen.
        measure: the rows of a run's 1h, and a group -> its number in points; or why it has none: the verdict then.
        verdict: what the numbers of the seeds, their limits and what the sets took from others say.
    """

    text: str
    question: str
    told: str
    measure: Callable[[pl.DataFrame, str], float | str]
    verdict: Callable[[Mapping[str, Any]], str]


def _answered(question: Question, runs: Sequence[Run], group: str) -> dict[str, Any]:
    """Return the record of a claim of 1h about a group, as those of the paper's, with its level."""
    tables = [where(run.table, experiment="1h") for run in runs]
    values = [question.measure(table, group) for table in tables]
    said = {"experiment": "1h", "text": question.text, "unit": "points", "side": "above", "bound": 0.0, "group": group}
    said |= {"question": question.question, "told": question.told, "paper": False}
    lacking = [value for value in values if isinstance(value, str)]
    if lacking:
        given = [None if isinstance(value, str) else value for value in values]
        return {**said, "values": given, "mean": None, "low": None, "high": None, "verdict": lacking[0]}
    numbers = [float(value) for value in values]
    low, high = mean_interval(numbers, QUESTIONS_LEVEL) if len(numbers) > 1 else (None, None)
    others = [100 * _of_set(table, group)["worst_other"] for table in tables]
    if len(runs) == 1 and question.measure is _net:
        rows = where(tables[0], selector="critical", group=group, k=SIZE, measure="net").to_dicts()
        low, high = (100 * rows[0][end] if rows else None for end in ("low", "high"))
    found = {"values": numbers, "mean": statistics.fmean(numbers), "low": low, "high": high, "worst_other": others}
    if len(runs) == 1:
        return {**said, **found, "verdict": "one seed only"}
    return {**said, **found, "level": QUESTIONS_LEVEL, "verdict": question.verdict(found)}


def _of_set(table: pl.DataFrame, group: str, control: str | None = None) -> dict[str, float]:
    """Return the numbers of a set of three neurons by measure, of a group or of one of its controls."""
    which = {"selector": "matched" if control else "critical", "group": control or group}
    # A change of another group's accuracy has that group's name.
    rows = where(table, chosen_for=group, **which).filter(pl.col("k").is_null() | (pl.col("k") == SIZE))
    return {
        **{row["measure"]: row["value"] for row in rows.iter_rows(named=True) if row["measure"] != "change"},
        "neurons": (rows["neurons"].drop_nulls().to_list() or [0])[0],
    }


def _net(table: pl.DataFrame, group: str) -> float | str:
    """Return the net of a group on half B; 0 where no set was found."""
    own = _of_set(table, group)
    return "too few" if "net" not in own else 100 * own["net"] if own["neurons"] else 0.0


def _beyond_controls(table: pl.DataFrame, group: str) -> float | str:
    """Return by how much the net of a group is above the mean net of its controls, of the one that there is perhaps."""
    net, rows = _net(table, group), where(table, chosen_for=group, selector="matched")
    every = [_of_set(table, group, name) for name in rows["group"].unique().sort().to_list()]
    controls = [control for control in every if "net" in control]
    if isinstance(net, str) or not controls:
        return net if isinstance(net, str) else "no control"
    return net - statistics.fmean(100 * control["net"] if control["neurons"] else 0.0 for control in controls)


def _memory(table: pl.DataFrame, group: str) -> float | str:
    """Return by how much the share of right images that are lost is higher on half B than on the test images."""
    own = _of_set(table, group)
    if "net" not in own:
        return "too few"
    if not own["neurons"]:
        return 0.0  # nothing is cut, and nothing lost
    if own.get("right_lost") is None or own.get("test_right_lost") is None:
        return "none right"
    return 100 * (own["right_lost"] - own["test_right_lost"])


def _selective(found: Mapping[str, Any]) -> str:
    """Return the verdict of (a): a mean net of 30 points or more, certainly above 0, and at most 2 from any other."""
    # Two points and thirty themselves count, whatever their last bit.
    spared = statistics.fmean(found["worst_other"]) >= WORST_OTHER - 1e-9
    if found["mean"] >= NET - 1e-9 and found["low"] > 0 and spared:
        return "holds"
    return "does not hold" if found["high"] < NET else "undecided"


def _above(found: Mapping[str, Any]) -> str:
    return "holds" if found["low"] > 0 else "does not hold" if found["high"] <= 0 else "undecided"


def _more_where_seen(found: Mapping[str, Any]) -> str:
    return "holds" if found["low"] > 0 else "does not hold" if found["high"] < NOT_MEMORY else "undecided"


QUESTIONS: Final = (
    Question(
        "(a) three neurons found on half A take at least 30 points more from it than from any other group on half B, "
        "where no other group loses more than 2",
        "Does a set of three neurons carry it and nobody else?",
        "what a set found on other images takes from it, beyond what it takes from any other group",
        _net,
        _selective,
    ),
    Question(
        "(b) they take more from it than sets found alike for majority images of the same margins take from these",
        "Is that more than sets found alike for majority images that are as hard?",
        "its net beyond that of the controls",
        _beyond_controls,
        _above,
    ),
    Question(
        "(c) they are memory: a larger share of its right images is lost on half B than on test images",
        "Is what the set carries memory of training images?",
        "its right images that are lost: training images minus test images",
        _memory,
        _more_where_seen,
    ),
)
"""What 1h asks of each minority group. Where nothing was found for a group, its net is 0."""


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the records of `judge` as a Markdown table: claim, group, every run's value, mean, interval, verdict.

    Intervals of another level than 95 % name it.
    """
    lines = ["| | claim | group | per seed | mean [95 %] | |", "|---|---|---|---|---|---|"]
    for record in records:
        bound = "" if record["bound"] == 0 else f" ({record['side']} {record['bound']:g} {record['unit']})"
        values = ", ".join("-" if value is None else f"{value:.1f}" for value in record["values"])
        interval = "-"
        if record["low"] is not None:
            level = f" ({100 * record['level']:.2f} %)" if "level" in record else ""
            interval = f"{record['mean']:.1f} [{record['low']:.1f}, {record['high']:.1f}]{level} {record['unit']}"
        lines.append(
            f"| {record['experiment']} | {record['text']}{bound} | {record['group']} | {values} | {interval} | "
            f"**{record['verdict']}** |"
        )
    return "\n".join(lines)
