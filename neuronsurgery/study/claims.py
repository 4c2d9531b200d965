"""What the paper claims of Stage 1 and what 1h asks, each claim as one number per run, and what several runs say.

A claim is a measure of one run's results and the side of a bound on which the paper sees it. Over several seeds it
*holds* where the whole 95 % interval of the mean lies on that side, it *does not hold* where all of it lies on the
other, and else it is *undecided*. The interval is Student's, over the seeds; every measure and bound stood before the
seeds were looked at. The claims of 1h have rules of their own, see `Question`.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

LEVEL: Final = 0.95
Records = Sequence[Mapping[str, Any]]
Results = Mapping[str, Any]


def student_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, p))


@dataclass(frozen=True)
class Claim:
    """One claim of the paper about some groups.

    Attributes:
        experiment: "ERM" or "1a" to "1g": what a run must have done.
        text: the claim, in words.
        unit: of the measure: "points", "layers" or "%".
        measure: (results, group) -> the number of one run.
        of: about which groups the claim is: "minority" or "every group".
        splits: whose accuracies of every group it needs.
        side: on which side of the bound the paper sees the number.
        bound: in the unit.
    """

    experiment: str
    text: str
    unit: Literal["points", "layers", "%"]
    measure: Callable[[Results, str], float]
    of: Literal["minority", "every group"] = "minority"
    splits: tuple[str, ...] = ()
    side: Literal["above", "below"] = "above"
    bound: float = 0.0


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return Student's confidence interval of the mean of independent values; infinite for a single one."""
    if len(values) < 2:
        return (-math.inf, math.inf)
    half = student_quantile((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return (mean - half, mean + half)


def judge(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """Return one record per claim and group: the value of every run, their mean, interval and a verdict.

    Args:
        runs: the results of the runs, of one data set and other seeds; claims are left out whose experiment any of
            them lacks, or images of any group in a split whose accuracies they need. A claim of 1h that some run has no
            number for has none, and the reason as its verdict.
    """
    names, minority = runs[0]["groups"], [runs[0]["groups"][place] for place in runs[0]["minority"]]
    records = []
    for claim in CLAIMS:
        if all(_can_be_judged(claim, run) for run in runs):
            for group in minority if claim.of == "minority" else names:
                values = [claim.measure(run, group) for run in runs]
                records.append({**_said(claim), "group": group, **_judged(claim, values)})
    if all("1h" in run["experiments"] for run in runs):
        records += [_answered(question, runs, group) for question in QUESTIONS for group in minority]
    return records


def _can_be_judged(claim: Claim, results: Results) -> bool:
    done = claim.experiment == "ERM" or claim.experiment in results["experiments"]
    complete = [split for split in results["accuracy"] if all(results["counts"][split])]
    return done and set(claim.splits) <= set(complete)


def _said(claim: Claim) -> dict[str, Any]:
    said = {name: getattr(claim, name) for name in ("experiment", "text", "unit", "side", "bound")}
    return said


def _judged(claim: Claim, values: Sequence[float]) -> dict[str, Any]:
    low, high = mean_interval(values)
    inside, outside = (low > claim.bound, high <= claim.bound)
    if claim.side == "below":
        inside, outside = high < claim.bound, low >= claim.bound
    verdict = "holds" if inside else "does not hold" if outside else "undecided"
    return {"values": list(values), "mean": statistics.fmean(values), "low": low, "high": high, "verdict": verdict}


# Measures


def _change(record: Mapping[str, Any], group: str) -> float:
    """Return the change of a group's accuracy in points, without its sign: the paper's measure."""
    changes = {change["group"]: float(change["change"]) for change in record["changes"]}
    return 100 * abs(changes[group])


def _first_split(results: Results, experiment: str) -> Records:
    records: Records = results["experiments"][experiment][results["settings"]["splits"][0]]
    return records


def _effect(results: Results, group: str, experiment: str, **which: Any) -> float:
    """Return the mean change of a group under the neurons that its own gradient chose, over k, layers and draws."""
    which = {"criterion": "gradient", "chosen_for": group, **which}
    records = _first_split(results, experiment)
    chosen = [record for record in records if all(record[key] == value for key, value in which.items())]
    return statistics.fmean(_change(record, group) for record in chosen)


def _over_majority(results: Results, group: str, measure: Callable[[Results, str], float]) -> float:
    """Return how much larger a measure is for a group than for the majority groups on their mean."""
    majority = [name for place, name in enumerate(results["groups"]) if place not in results["minority"]]
    return measure(results, group) - statistics.fmean(measure(results, name) for name in majority)


def _accuracy(results: Results, group: str, split: str) -> float:
    return 100 * float(results["accuracy"][split][results["groups"].index(group)])  # of a split with all groups


def _gap(results: Results, group: str) -> float:
    return _accuracy(results, group, "train") - _accuracy(results, group, "test")


def _matched_control(results: Results, group: str) -> float:
    """Return the mean change of a group under random neurons of the same layers, as many as its critical ones."""
    return _effect(results, group, "1g", criterion="same layers")


def _random_control(results: Results, group: str) -> float:
    """Return the mean change of a group under random neurons, up to 0.3 % of the model."""
    records = [r for r in _first_split(results, "1g") if r["fraction"] is not None and r["fraction"] <= 0.003]
    return statistics.fmean(_change(record, group) for record in records)


def _in_last_bins(results: Results, group: str, chosen_by: str) -> float:
    records = [
        r for r in _first_split(results, "1b") if (r["group"], r["chosen_by"], r["share"]) == (group, chosen_by, 0.05)
    ]
    return statistics.fmean(100 * sum(r["histogram"][-2:]) / sum(r["histogram"]) for r in records)


def _sensitive(results: Results, group: str) -> float:
    """Return the number of layers that are sensitive for a group, on the mean over the distances of 1f."""
    counted = results["sensitive_layers"][results["settings"]["splits"][0]]
    place = results["groups"].index(group)
    return statistics.fmean(row["sensitive"][place] for row in counted if not row["with_norm"])


LARGEST: Final = {"std": 0.02}
"""The largest of the paper's scales: where its random edits show the most."""


def _more_than_majority(experiment: str, **which: Any) -> Callable[[Results, str], float]:
    return functools.partial(
        _over_majority, measure=lambda results, group: _effect(results, group, experiment, **which)
    )


def _by_magnitude(results: Results, group: str) -> float:
    return _effect(results, group, "1a", criterion="magnitude", chosen_for="all")


CLAIMS: Final = (
    Claim(
        "ERM",
        "training accuracy is near 100 %",
        "%",
        lambda r, g: _accuracy(r, g, "train"),
        splits=("train",),
        bound=95.0,
    ),
    Claim(
        "ERM",
        "the gap between training and test accuracy is larger than in majority groups",
        "points",
        lambda r, g: _over_majority(r, g, _gap),
        splits=("train", "test"),
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
        lambda r, g: _over_majority(r, g, _by_magnitude),
    ),
    Claim(
        "1b",
        "most of the top 5 % by gradient are among the top tenth by magnitude",
        "%",
        lambda r, g: _in_last_bins(r, g, "gradient"),
        bound=50.0,
    ),
    Claim(
        "1b",
        "most of the top 5 % by magnitude are among the top tenth by gradient",
        "%",
        lambda r, g: _in_last_bins(r, g, "magnitude"),
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
        lambda r, g: _effect(r, g, "1c", **LARGEST) - _effect(r, g, "1a") / 2,
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
        lambda r, g: _effect(r, g, "1a") - _effect(r, g, "1d", **LARGEST),
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
        lambda r, g: _over_majority(r, g, _sensitive),
    ),
    Claim(
        "1g",
        "its critical neurons change it more than random ones of the same layers",
        "points",
        lambda r, g: _effect(r, g, "1a") - _matched_control(r, g),
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
        measure: the records of a run's 1h, and a group -> its number in points; or why it has none: the verdict then.
        verdict: what the numbers of the seeds, their limits and what the sets took from others say.
    """

    text: str
    measure: Callable[[Records, str], float | str]
    verdict: Callable[[Mapping[str, Any]], str]


def _answered(question: Question, runs: Sequence[Results], group: str) -> dict[str, Any]:
    """Return the record of a claim of 1h about a group, as those of the paper's, with its level."""
    records: list[Records] = [run["experiments"]["1h"]["train"] for run in runs]
    values = [question.measure(of_run, group) for of_run in records]
    said = {"experiment": "1h", "text": question.text, "unit": "points", "side": "above", "bound": 0.0, "group": group}
    lacking = [value for value in values if isinstance(value, str)]
    if lacking:
        given = [None if isinstance(value, str) else value for value in values]
        return {**said, "values": given, "mean": None, "low": None, "high": None, "verdict": lacking[0]}
    numbers = [float(value) for value in values]
    low, high = mean_interval(numbers, QUESTIONS_LEVEL)
    others = [100 * float(_set_of(of_run, group)["worst_other"]) for of_run in records]
    found = {"values": numbers, "mean": statistics.fmean(numbers), "low": low, "high": high, "worst_other": others}
    verdict = "one seed only" if len(runs) == 1 else question.verdict(found)
    return {**said, **found, "level": QUESTIONS_LEVEL, "verdict": verdict}


def _sets(records: Records, group: str) -> Records:
    """Return the records of a group's own images and of its controls: those of three neurons, or why there are none."""
    return [r for r in records if r["chosen_for"] == group and r["k"] in (SIZE, None)]


def _set_of(records: Records, group: str) -> Mapping[str, Any]:
    return next(record for record in _sets(records, group) if record["control"] is None)


def _net(records: Records, group: str) -> float | str:
    """Return the net of a group on half B; 0 where no set was found."""
    own = _set_of(records, group)
    return "too few" if "impossible" in own else 100 * float(own["net"]) if own["neurons"] else 0.0


def _beyond_controls(records: Records, group: str) -> float | str:
    """Return by how much the net of a group is above the mean net of its controls, of the one that there is perhaps."""
    net, every = _net(records, group), [r for r in _sets(records, group) if r["control"] is not None]
    controls = [control for control in every if "impossible" not in control]
    if isinstance(net, str) or not controls:
        return net if isinstance(net, str) else "no control"
    return net - statistics.fmean(100 * float(c["net"]) if c["neurons"] else 0.0 for c in controls)


def _memory(records: Records, group: str) -> float | str:
    """Return by how much the share of right images that are lost is higher on half B than on the test images."""
    own = _set_of(records, group)
    if "impossible" in own:
        return "too few"
    if not own["neurons"]:
        return 0.0  # nothing is cut, and nothing lost
    if own["right_lost"] is None or own["test_right_lost"] is None:
        return "none right"
    return 100 * (float(own["right_lost"]) - float(own["test_right_lost"]))


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
        _net,
        _selective,
    ),
    Question(
        "(b) they take more from it than sets found alike for majority images of the same margins take from these",
        _beyond_controls,
        _above,
    ),
    Question(
        "(c) they are memory: a larger share of its right images is lost on half B than on test images",
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
        if record["mean"] is not None:
            level = f" ({100 * record['level']:.2f} %)" if "level" in record else ""
            interval = f"{record['mean']:.1f} [{record['low']:.1f}, {record['high']:.1f}]{level} {record['unit']}"
        lines.append(
            f"| {record['experiment']} | {record['text']}{bound} | {record['group']} | {values} | {interval} | "
            f"**{record['verdict']}** |"
        )
    return "\n".join(lines)
