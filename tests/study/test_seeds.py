"""What several seeds say together, on results made up for it: nothing that a seed lacks goes without a word."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.study.cli import summary_of_seeds
from neuronsurgery.study.seeds import combine
from study.test_report import report_of
from study.test_report_schema import PAGE, keys_of
from study.test_report_stages import DASH, arm, fragility, memorising, memorization, one_run, seeds_of, stage_two

TABLES = ("memorization", "memorization_difference", "memorization_relation")
ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["whole seed first", "lacking seed first"])


def in_order(order: tuple[int, ...], runs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Runs of seeds 0, 1 ..., in this order."""
    runs = copy.deepcopy(runs)
    for seed, run in enumerate(runs):
        run["settings"]["seed"] = seed
    return {seed: runs[seed] for seed in order}


# Stage 2


def with_chosen(*chosen: dict[str, Any]) -> dict[str, Any]:
    """Stage 2 with Group DRO last, and before it what was chosen from several variants."""
    made = stage_two()
    kept = [one for one in made["arms"] if one["name"] != "CnC"]
    return one_run(stage_two={**made, "arms": [*kept[:-1], *chosen, kept[-1]]})


@ORDERS
def test_an_arm_that_a_seed_lacks_is_counted_in_its_place(order: tuple[int, ...], tmp_path: Path) -> None:
    runs = [with_chosen(arm("CnC, chosen", "comparison", 0.5)), with_chosen()]
    together = combine(in_order(order, runs))
    names = ["ERM", "pruned by gradient", "nothing pruned", "CnC, chosen", "Group DRO"]
    assert [one["name"] for one in together["stage_two"]["arms"]] == names
    found = {one["name"]: one for one in together["stage_two"]["arms"]}
    said = {"name": "CnC, chosen", "family": "comparison", "text": "what CnC, chosen does", "labels": "class"}
    assert found["CnC, chosen"] == {**said, "impossible": 1, "selected": {}, "trajectory": []}
    assert found["Group DRO"]["impossible"] == 0 and set(found["Group DRO"]["selected"])
    assert "CnC, chosen was impossible in 1 seed." in report_of(together, tmp_path)


@ORDERS
def test_a_control_that_a_seed_lacks_is_in_no_difference(order: tuple[int, ...]) -> None:
    runs = [with_chosen(arm("ERM continued, chosen", "control", 0.5)), with_chosen()]
    together = combine(in_order(order, runs))["stage_two"]
    assert {one["control"] for one in together["differences"]} == {"ERM", "nothing pruned"}
    assert {one["name"]: one["impossible"] for one in together["arms"]}["ERM continued, chosen"] == 1


def inferring(*reasons: str | None) -> list[dict[str, Any]]:
    """Runs of which those without a reason have inferred groups, and an epoch chosen by them."""
    runs = []
    for reason in reasons:
        made = stage_two()
        rules = dict(made["selections"])
        made["selections"] = {**rules, "inferred groups": "class labels; inferred groups"}
        made["not_inferred"] = reason
        if reason is None:
            for one in made["arms"]:
                if one["selected"]:
                    one["selected"]["inferred groups"] = one["selected"]["worst group"]
        runs.append(one_run(stage_two=made))
    return runs


@ORDERS
def test_seeds_that_inferred_no_groups_are_named_with_the_reason(order: tuple[int, ...], tmp_path: Path) -> None:
    together = combine(in_order(order, inferring(None, "nobody <stands> out")))
    assert together["stage_two"]["not_inferred"] == [{"seed": 1, "impossible": "nobody <stands> out"}]
    assert not any("inferred groups" in one["selected"] for one in together["stage_two"]["arms"])
    said = report_of(together, tmp_path)
    why = "because in 1 of 2 seeds none could be inferred (seed 1: nobody <stands> out)."
    assert said.count(f"No epoch is chosen by inferred groups, {why}") == 1
    assert 'Epoch chosen by the rule "inferred groups"' not in said


def test_where_all_seeds_inferred_groups_nothing_is_said_of_it(tmp_path: Path) -> None:
    together = seeds_of(inferring(None, None))
    assert together["stage_two"]["not_inferred"] == []
    said = report_of(together, tmp_path)
    assert "none could be inferred" not in said and 'Epoch chosen by the rule "inferred groups"' in said


# Memorisation


def memorising_seeds(*minority: float | None, **changes: Any) -> dict[int, dict[str, Any]]:
    return in_order(tuple(range(len(minority))), [memorising(minority=each, **changes) for each in minority])


def test_memorisation_is_summarised_over_the_seeds() -> None:
    found = combine(memorising_seeds(0.1, 0.2, 0.3))["memorization"]
    assert (found["models"], found["share"], found["epochs"]) == (40, 0.7, 15)
    whole = found["minority_difference"]
    half = 0.1 * 4.302653 / math.sqrt(3)  # Student's quantile of two degrees of freedom
    assert whole["values"] == [0.1, 0.2, 0.3] and whole["impossible"] == 0
    assert [whole["mean"], whole["sd"]] == pytest.approx([0.2, 0.1])
    assert [whole["low"], whole["high"]] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-4)
    assert "is not shown: +0.200" in whole["text"]
    assert [one["group"] for one in whole["groups"]] == ["landbird on water", "waterbird on land"]
    assert all(one["values"] == [0.1, 0.2, 0.3] for one in whole["groups"])
    assert found["groups"][1]["group"] == "landbird on water" and found["groups"][1]["mean"]["values"] == [0.3] * 3
    assert found["groups"][1]["right_when_not_seen"]["mean"] == pytest.approx(0.6)
    related = {(row["cut"], row["group"]): row for row in found["relation"]}
    assert related["critical", "landbird on water"]["spearman"]["values"] == [0.4] * 3
    assert related["random", "all"] == {"cut": "random", "group": "all", "impossible": 3}
    shown = combine(memorising_seeds(0.2, 0.21, 0.2))["memorization"]["minority_difference"]["text"]
    assert shown.startswith(
        "that minority images are memorised more than the rest of their class is shown: +0.203 (95 %"
    )


@pytest.mark.parametrize("minority", [(0.1, None), (None, 0.1)])
def test_a_seed_without_a_difference_of_memorisation_is_counted(minority: tuple[float | None, ...]) -> None:
    whole = combine(memorising_seeds(*minority))["memorization"]["minority_difference"]
    text = "is not shown: it could not be given in 1 of 2 seeds"
    assert whole["impossible"] == 1 and "mean" not in whole and whole["text"].endswith(text)
    assert [one["group"] for one in whole["groups"]] == ["landbird on water", "waterbird on land"]
    assert all(one["impossible"] == 1 and one["text"].endswith(text) for one in whole["groups"])


def test_results_of_a_version_without_shares_of_right_answers_are_still_combined() -> None:
    runs = memorising_seeds(0.1, 0.2)
    for row in runs[0]["memorization"]["groups"]:
        del row["right_when_seen"], row["right_when_not_seen"]
    for row in combine(runs)["memorization"]["groups"]:
        assert set(row) == {"group", "impossible", "mean"} and row["impossible"] == 0


def test_every_key_of_memorisation_is_explained() -> None:
    of_one, of_seeds = PAGE.read_text().split("## Several seeds")
    runs = memorising_seeds(0.1, None)
    for text, found in ((of_one, runs[0]), (of_one + of_seeds, combine(runs)), (of_seeds, {"memorization": 0})):
        named = set(re.findall(r"`([^`\n]+)`", text))
        assert sorted(set(keys_of({"memorization": found["memorization"]})) - named) == []


def test_memorisation_over_seeds_has_a_chapter(tmp_path: Path) -> None:
    said = " ".join(report_of(combine(memorising_seeds(0.2, 0.21, 0.2)), tmp_path).split())
    assert "Mean memorisation score over 3 seeds and its interval: G0 landbird on land 0.00 [0.00, 0.00], G1" in said
    assert "That minority images are memorised more than the rest of their class is shown: +0.203" in said
    assert "Minorities and the rest of their class" in said and "0.200, 0.210, 0.200" in said
    assert "Of 2 rank correlations between the score and what a cut does to an image, 2 have" in said
    assert f"all images random {DASH} not given in 3 seeds" in said
    assert "all images knockout 0.10, 0.10, 0.10 0.10 [0.10, 0.10] seen" in said
    assert "These models trained for 15 epochs, the run's own for 30." in said
    assert (tmp_path / "figures" / "memorization.svg").is_file()
    tables = {name: (tmp_path / "tables" / f"{name}.csv").read_text().splitlines() for name in TABLES}
    assert len(tables["memorization"]) == 1 + 4 * 3
    assert tables["memorization"][0] == "group,impossible,measure,values,mean,sd,low,high"
    assert len(tables["memorization_difference"]) == len(tables["memorization_relation"]) == 1 + 3


# What is printed


def test_seeds_without_stage_one_print_what_there_is() -> None:
    runs = [with_chosen(arm("CnC, chosen", "comparison", 0.5)), with_chosen()]
    together = combine(in_order((0, 1), runs))
    printed = summary_of_seeds(together)
    assert "| claim |" not in printed and "Memorisation" not in printed and "Last layer" not in printed
    lines = printed.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("Stage 2  Worst group"))
    assert lines[start + 1].split("  ")[-1] == "worst group"
    rows = {line[2:].split("  ")[0]: line for line in lines[start + 2 :]}
    assert rows["pruned by gradient"].count("60.0 [60.0, 60.0]") == 3
    assert rows["CnC, chosen"].split()[-3:] == ["-", "-", "-"]
    assert "Means over 2 seeds [Student's 95 % interval]" in lines[-1]


def test_claims_retraining_and_memorisation_of_seeds_are_printed() -> None:
    runs = in_order((0, 1), [one_run(fragility=fragility(), memorization=memorization(each)) for each in (0.2, 0.3)])
    together = combine(runs)
    together["claims"] = [
        {"experiment": "1a", "text": "a claim", "unit": "points", "side": "above", "bound": 0.0, "group": "rare"}
        | {"values": [1.0, 2.0], "mean": 1.5, "low": -4.9, "high": 7.9, "verdict": "undecided"}
    ]
    printed = summary_of_seeds(together)
    assert "| 1a | a claim | rare | 1.0, 2.0 |" in printed
    assert "inferred by knockout  60.0 [60.0, 60.0]" in printed
    assert re.search(r"\n  AFR +-\n", printed)
    assert re.search(r"\n  all minorities +25\.0 \[-38\.5, 88\.5\]\n", printed)
    lacking = copy.deepcopy(runs)
    lacking[0]["memorization"] = memorization(None)
    assert re.search(r"\n  waterbird on land +-\n", summary_of_seeds(combine(lacking)))
