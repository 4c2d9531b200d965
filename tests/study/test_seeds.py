"""What several seeds say together, on results made up for it: nothing that a seed lacks goes without a word."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.study.seeds import combine
from neuronsurgery.study.summary import summary_of_seeds
from study.test_report import report_of
from study.test_report_stages import arm, fragility, one_run, seeds_of, stage_two

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


# What is printed


def test_seeds_without_stage_one_print_what_there_is() -> None:
    runs = [with_chosen(arm("CnC, chosen", "comparison", 0.5)), with_chosen()]
    together = combine(in_order((0, 1), runs))
    printed = summary_of_seeds(together)
    assert "| claim |" not in printed and "Last layer" not in printed
    lines = printed.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("Stage 2  Worst group"))
    assert lines[start + 1].split("  ")[-1] == "worst group"
    rows = {line[2:].split("  ")[0]: line for line in lines[start + 2 :]}
    assert rows["pruned by gradient"].count("60.0 [60.0, 60.0]") == 3
    assert rows["CnC, chosen"].split()[-3:] == ["-", "-", "-"]
    assert "Means over 2 seeds [Student's 95 % interval]" in lines[-1]


def test_claims_and_retraining_of_seeds_are_printed() -> None:
    runs = in_order((0, 1), [one_run(fragility=fragility()) for _ in range(2)])
    together = combine(runs)
    together["claims"] = [
        {"experiment": "1a", "text": "a claim", "unit": "points", "side": "above", "bound": 0.0, "group": "rare"}
        | {"values": [1.0, 2.0], "mean": 1.5, "low": -4.9, "high": 7.9, "verdict": "undecided"}
    ]
    printed = summary_of_seeds(together)
    assert "| 1a | a claim | rare | 1.0, 2.0 |" in printed
    assert "inferred by knockout  60.0 [60.0, 60.0]" in printed
    assert re.search(r"\n  AFR +-\n", printed)
