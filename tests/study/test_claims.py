"""The claims of the paper: measures against hand-made results, verdicts against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from neuronsurgery.study.claims import CLAIMS, MEASURES, Number, judge
from neuronsurgery.study.queries import mean_interval
from neuronsurgery.study.table import Run
from study.made_up import seeds_of

GROUPS = ["a", "b", "c", "d"]
MINORITY = [1, 2]


def record(changes: tuple[float, ...], **said: Any) -> dict[str, Any]:
    """One intervention with the changes of the four groups, in points."""
    empty = {"criterion": "gradient", "chosen_for": "a", "k": 1, "fraction": None, "std": None}
    return {
        **empty,
        **said,
        "changes": [{"group": group, "change": change / 100} for group, change in zip(GROUPS, changes, strict=True)],
    }


def by_gradient(own: tuple[float, ...], **said: Any) -> list[dict[str, Any]]:
    """The four top sets by gradient, each of which changes its own group by so many points and no other."""
    return [
        record(tuple(own[i] if i == j else 0.0 for j in range(4)), chosen_for=group, **said)
        for i, group in enumerate(GROUPS)
    ]


def rewinds() -> list[dict[str, Any]]:
    """Layers that change by two points where they are sensitive: so many of nine for each group."""
    counts = {(5, False): (0, 1, 4, 2), (10, False): (2, 3, 6, 0), (10, True): (9, 9, 9, 9)}
    return [
        record(
            tuple(2.0 * (layer < count) for count in sensitive),
            criterion="rewind",
            layer=f"layer{layer}",
            distance=distance,
            with_norm=with_norm,
        )
        for (distance, with_norm), sensitive in counts.items()
        for layer in range(9)
    ]


def results(own: tuple[float, ...] = (1.0, -9.0, 21.0, -3.0), seed: int = 0) -> dict[str, Any]:
    """Made-up results: zeroing changes the groups by `own`, everything else by what is read off below."""
    percentiles = [99.0, 100.0, 96.0, 90.1, 90.0, 0.3, 1.0, 2.0]  # three and one in the last two of twenty bins
    ranks = [
        {"chosen_by": chooser, "group": group, "share": 0.05, "percentiles": percentiles}
        for chooser in ("gradient", "magnitude")
        for group in GROUPS
    ]
    return {
        "settings": {"splits": ["train"], "seed": seed},
        "groups": GROUPS,
        "minority": MINORITY,
        "counts": {"train": [10] * 4, "test": [10] * 4},
        "accuracy": {"train": [1.0, 0.99, 0.9, 1.0], "test": [0.98, 0.7, 0.4, 0.96]},
        "experiments": {
            "1a": {"train": [*by_gradient(own), record((1.0, 2.0, 3.0, 5.0), criterion="magnitude", chosen_for="all")]},
            "1b": {"train": ranks},
            "1c": {
                "train": [
                    r
                    for std, part in ((0.02, 0.5), (0.01, 9.0))
                    for r in by_gradient(tuple(part * value for value in own), std=std)
                ]
            },
            "1d": {"train": by_gradient((0.0, 1.0, 2.0, 0.0), std=0.02)},
            "1e": {"train": by_gradient((1.0, 1.0, 3.0, 1.0), layer="x")},
            "1f": {"train": rewinds()},
            "1g": {
                "train": [
                    *(record((0.0, 4.0, 1.0, 0.0), criterion="same layers", chosen_for=group) for group in GROUPS),
                    record((0.1, 0.2, -0.5, 0.0), criterion="random", chosen_for="all", fraction=0.001),
                    record((9.0, 9.0, 9.0, 9.0), criterion="random", chosen_for="all", fraction=0.03),
                ]
            },
        },
    }


# Worked by hand from the numbers above, for the groups b and c; majority a and d.
EXPECTED = {
    "training accuracy is near": (99.0, 90.0),
    "the gap between": (29.0 - 3.0, 50.0 - 3.0),  # 100 - 98 = 2 and 100 - 96 = 4 in a and d
    "zeroing the top-1 to 3 by the group's gradient changes": (9.0 - 2.0, 21.0 - 2.0),
    "zeroing the top-1 to 3 by magnitude": (2.0 - 3.0, 3.0 - 3.0),
    "most of the top 5 % by gradient": (50.0, 50.0),
    "most of the top 5 % by magnitude": (50.0, 50.0),
    "random initialisation (std": (4.5 - 1.0, 10.5 - 1.0),
    "random initialisation changes it at least": (0.0, 0.0),
    "random noise (std": (1.0, 2.0),
    "random noise changes it less": (8.0, 19.0),
    "zeroing the top-1 to 3 within": (0.0, 2.0),
    "more layers are sensitive": (2.0 - 1.0, 5.0 - 1.0),
    "its critical neurons change it more than random": (5.0, 20.0),
    "random neurons, up to 0.3 %": (0.2, 0.5),
    # A gain is no loss: b loses 9 points, and nobody else any; c gains 21.
    "zeroing the top-1 to 3 by the group's gradient takes": (9.0, -21.0),
}


STAGE_ONE = [claim for claim in CLAIMS if claim["experiment"] not in ("1h", "arms", "detection", "mitigation")]


@pytest.mark.parametrize("claim", STAGE_ONE, ids=lambda claim: f"{claim['experiment']}: {claim['text'][:40]}")
def test_every_measure_against_numbers_worked_by_hand(claim: Any) -> None:
    (expected,) = (values for start, values in EXPECTED.items() if claim["text"].startswith(start))
    found = [MEASURES[claim["measure"]](Run.of(results()), group) for group in ("b", "c")]
    assert [one.value if isinstance(one, Number) else one for one in found] == pytest.approx(expected, abs=1e-9)


def test_every_claim_has_a_measure_and_every_measure_a_claim() -> None:
    assert [claim["measure"] for claim in CLAIMS] == list(dict.fromkeys(claim["measure"] for claim in CLAIMS))
    assert {claim["measure"] for claim in CLAIMS} == set(MEASURES)


def test_interval_of_a_mean_is_students() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729749464 / math.sqrt(3)  # the 0.975 quantile of two degrees of freedom, standard deviation 1
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert mean_interval([5.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((7.0, 8.0, 9.0), "holds"), ((-7.0, -8.0, -9.0), "does not hold"), ((-7.0, 8.0, 1.0), "undecided")],
)
def test_a_verdict_is_the_side_on_which_the_whole_interval_lies(values: tuple[float, ...], verdict: str) -> None:
    # The majority groups change by 2 points on the mean.
    runs = [results(own=(1.0, 2.0 + value if value > -2 else 0.0, 0.0, -3.0), seed=i) for i, value in enumerate(values)]
    if verdict == "does not hold":  # a change has no sign: less than in the majority is as low as -2
        runs = [results(own=(10.0 + i, 1.0, 0.0, 10.0 + i), seed=i) for i in range(3)]
    judged = next(
        r for r in judge(seeds_of(runs)) if r["text"].startswith("zeroing the top-1 to 3 by the") and r["group"] == "b"
    )
    assert judged["verdict"] == verdict
    assert len(judged["values"]) == 3


def test_no_effect_in_any_run_does_not_hold() -> None:
    judged = judge(seeds_of([results(own=(0.0, 0.0, 0.0, 0.0), seed=seed) for seed in range(3)]))
    effects = [r for r in judged if r["experiment"] == "1a" and "gradient" in r["text"]]
    assert [r["verdict"] for r in effects] == ["does not hold"] * 4  # two claims about two groups


def test_claims_of_experiments_that_a_run_lacks_are_left_out() -> None:
    runs = [results(seed=seed) for seed in range(2)]
    for run in runs:
        del run["experiments"]["1c"]
    assert {r["experiment"] for r in judge(seeds_of(runs))} == {"accuracy", "1a", "1b", "1d", "1e", "1f", "1g"}


def test_a_claim_about_every_group_names_each_and_is_below_its_bound() -> None:
    judged = [r for r in judge(seeds_of([results(seed=s) for s in range(2)])) if r["text"].startswith("random neurons")]
    assert [r["group"] for r in judged] == GROUPS
    assert {r["verdict"] for r in judged} == {"holds"}


def test_claims_about_a_split_that_lacks_a_group_are_left_out() -> None:
    whole, partly, without = results(), results(seed=1), results(seed=1)
    partly["counts"]["test"][3] = 0
    partly["accuracy"]["test"].pop()
    del without["counts"]["test"], without["accuracy"]["test"]
    for other in (partly, without):
        texts = {record["text"] for record in judge(seeds_of([whole, other]))}
        assert {record["text"] for record in judge(seeds_of([whole, whole]))} - texts == {
            "the gap between training and test accuracy is larger than in majority groups"
        }
