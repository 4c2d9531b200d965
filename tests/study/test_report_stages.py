"""The chapters after Stage 1, of one run and over seeds: every sentence against numbers made up for it."""

from __future__ import annotations

import base64
import copy
import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from neuronsurgery.study.figures import png
from neuronsurgery.study.report import write_report
from neuronsurgery.study.report.levels import Level, level_of, standing, wilson
from neuronsurgery.study.seeds import combine
from study.test_report import MadeUp, report_of

RULES = {
    "last epoch": "no labels",
    "class labels": "class labels of held-out images",
    "worst group": "group labels of validation images",
}
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def chosen(arm: str, worst: float, epoch: int = 1) -> dict[str, Any]:
    test = [0.98, 0.9, worst, 0.96]
    average = sum(test) / 4
    means = {"plain": average, "balanced": average, "train-weighted": 0.97}
    return {"arm": arm, "epoch": epoch, "test": test, "worst": worst, **means}


def arm(name: str, family: str, worst: float, epochs: int = 2, **columns: Any) -> dict[str, Any]:
    path = [
        {"epoch": epoch, "loss": 0.1, "test": [0.98, 0.9, worst * epoch / epochs, 0.96], "validation": [0.5] * 4}
        for epoch in range(1, epochs + 1)
    ]
    return {
        "name": name,
        "family": family,
        "text": f"what {name} does",
        "labels": "class",
        "choice": None,
        "settings": {},
        "trajectory": path,
        "selected": {rule: chosen(name, worst, epochs) for rule in RULES},
        **columns,
    }


def stage_two(paper: float = 0.6, control: float = 0.3, more: int = 0) -> dict[str, Any]:
    """Stage 2 whose arm of the paper and whose controls are this good in the worst group."""
    arms = [
        arm("ERM", "control", 0.2, 1),
        arm("pruned by gradient", "paper", paper),
        arm("nothing pruned", "control", control),
        *(arm(f"control {place}", "control", control) for place in range(more)),
        arm("Group DRO", "comparison", 0.7, 3, labels="class, group"),
        arm("CnC", "comparison", 0.0, impossible="no image <is> an anchor", trajectory=[], selected={}),
    ]
    return {
        "fine_tuning_epochs": 2,
        "comparison_epochs": 3,
        "splits": ["validation", "test"],
        "selections": RULES,
        "class_labels_of": "held-out",
        "not_inferred": "nobody stands out",
        "train_counts": [1749, 92, 28, 528],
        "arms": arms,
    }


def fragility(knockout: float = 0.99, margin: float = 0.9, inferred: float = 0.6) -> dict[str, Any]:
    image = base64.b64encode(png(np.full((4, 4, 3), 90, np.uint8))).decode()

    def detected(score: str, needs: str, auc: float) -> list[dict[str, Any]]:
        return [
            {"score": score, "needs": needs, "group": name, "auc": auc, "average_precision": 0.5, "count": 9, "of": 99}
            for name in ("landbird on water", "waterbird on land")
        ]

    def row(name: str, worst: float, labels: str = "class") -> dict[str, Any]:
        test = [0.98, 0.9, worst, 0.96]
        return {"name": name, "labels": labels, "images": "train", "chosen": None, "test": test, "worst": worst}

    return {
        "edit": ["block3.conv2.weight"],
        "detection": {
            "train": [*detected("knockout", "one edit", knockout), *detected("final margin", "the model", margin)]
        },
        "flagged": {"train": {"fragile": [3, 60, 20, 5], "thresholds": [-1.25, 0.75]}},
        "damage": {"train": [{"cut": "critical", "neurons": 8, "flips": 0.07}]},
        "points": [
            {"group": name, "of": count, "fragility": [-3.0 + place, -2.0], "final": [-4.0, -3.5]}
            for place, (name, count) in enumerate(
                {
                    "landbird on land": 1749,
                    "landbird on water": 2,
                    "waterbird on land": 2,
                    "waterbird on water": 2,
                }.items()
            )
        ],
        "audit": [
            {
                "class": target,
                "images": [
                    {"index": 7, "group": group, "fragility": 0.5, "png": image}
                    for group in ("landbird on water", "landbird on land")
                ],
            }
            for target in (0, 1)
        ],
        "images": "train",
        "mitigation": [
            row("ERM", 0.2),
            row("inferred by knockout", inferred),
            row("true groups", 0.9, "class, group"),
            {"name": "AFR", "labels": "class", "images": "train", "impossible": "it did not <converge>"},
        ],
    }


def one_run(**stages: Any) -> dict[str, Any]:
    made = MadeUp(draws=2).results([])
    made["settings"] |= {"stages": ["2", "fragility"]}
    for key in ("layers", "neurons", "experiments", "sensitive_layers", "missing_distances", "control_p"):
        del made[key]
    return made | stages


def seeds_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(combine(dict(enumerate(runs)))))
    return found


# Stage 2


def test_an_arm_above_every_interval_is_better(tmp_path: Path) -> None:
    said = report_of(one_run(stage_two=stage_two(paper=0.6, control=0.3)), tmp_path)
    assert "Of 3 combinations of one of the paper's arms and a rule, 3 are better than every control" in said
    assert (
        "Pruned by gradient, 60.0 % [53.8, 65.9] in the worst group: better than all of nothing pruned (30.0 %)" in said
    )
    assert "ERM, which fine-tuning starts from, is right on 20.0 %" in said
    assert "of its worst test group, G2 waterbird on land (minority)." in said
    assert 'chosen by the rule "worst group" (group labels of validation images), Group DRO is the highest' in said
    assert "with 70.0 % [64.1, 75.3], as these test images have it; it trains with labels of: class, group." in said


def test_an_arm_that_does_not_beat_its_controls_is_said_to(tmp_path: Path) -> None:
    said = report_of(one_run(stage_two=stage_two(paper=0.6, control=0.7)), tmp_path)
    assert "for 3 some control does as well or better" in said
    assert "not better than nothing pruned (70.0 %); better than ERM (20.0 %)." in said


def test_an_equal_control_is_not_beaten_and_a_near_one_not_settled(tmp_path: Path) -> None:
    equal = report_of(one_run(stage_two=stage_two(paper=0.6, control=0.6)), tmp_path)
    assert "for 3 some control does as well or better" in equal
    near = report_of(one_run(stage_two=stage_two(paper=0.6, control=0.58)), tmp_path)
    assert "3 are higher than every control but some intervals overlap, and for 0 some control" in near
    assert "higher than nothing pruned (58.0 %), but the intervals overlap; better than ERM (20.0 %)." in near


def test_stage_two_names_labels_intervals_and_what_was_impossible(tmp_path: Path) -> None:
    page = write_report(one_run(stage_two=stage_two()), tmp_path).read_text()
    said = report_of(one_run(stage_two=stage_two()), tmp_path)
    assert "One run gives no interval over seeds." in said
    assert "CnC was impossible: no image <is> an anchor" in said and "no image &lt;is&gt; an anchor" in page
    assert "No epoch is chosen by inferred groups, because none could be inferred: nobody stands out" in said
    assert 'Epoch chosen by the rule "class labels" (class labels of held-out images)' in said
    assert "labels to choose the epoch" in said
    table = page.split("rule &quot;worst group&quot;")[-1].split("</table>")[0]
    row = next(line for line in table.splitlines() if "Group DRO" in line)
    assert "<small>class, group</small>" in row and "<small>group labels of validation images</small>" in row
    row = next(line for line in table.splitlines() if ">ERM<" in line)
    assert "nothing to choose" in row


def test_balanced_validation_images_are_named_where_they_stand_in(tmp_path: Path) -> None:
    made = stage_two() | {"class_labels_of": "validation"}
    said = report_of(one_run(stage_two=made), tmp_path)
    assert 'Epoch chosen by the rule "class labels" (class labels of validation images)' in said
    assert "which are balanced over groups. That balance is itself knowledge of the groups." in said
    skewed = one_run(stage_two=made)
    skewed["counts"]["validation"] = [90, 5, 5, 90]
    assert "of 90, 5, 5 and 90 images per group" in report_of(skewed, tmp_path)


def test_many_arms_stay_apart_and_legible(tmp_path: Path) -> None:
    write_report(one_run(stage_two=stage_two(more=18)), tmp_path)
    svg = (tmp_path / "figures" / "stage-two-worst.svg").read_text()
    heights = sorted(float(y) for y in re.findall(r'<text x="14" y="([\d.]+)"', svg))
    assert len(heights) == 22
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 17
    assert float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0]) <= 620
    for name in ("stage-two-fine-tuned", "stage-two-anew", "stage-two-group2"):
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")


def test_rows_of_stage_two_are_the_results(tmp_path: Path) -> None:
    made = one_run(stage_two=stage_two())
    write_report(made, tmp_path)
    with (tmp_path / "tables" / "stage_two.csv").open() as file:
        rows = list(csv.DictReader(file))
    arms = [one for one in made["stage_two"]["arms"] if one["selected"]]
    assert len(rows) == len(arms) * len(RULES)
    for row in rows:
        expected = next(one for one in arms if one["name"] == row["method"])["selected"][row["selection"]]
        assert float(row["worst"]) == expected["worst"] and row["selection_labels"] == RULES[row["selection"]]
        assert float(row["test waterbird on land"]) == expected["test"][2]
    with (tmp_path / "tables" / "stage_two_trajectory.csv").open() as file:
        assert len(list(csv.DictReader(file))) == sum(len(one["trajectory"]) for one in arms) * 2 * 4


# Fragility


def test_fragility_says_what_finds_the_minorities_and_what_does_not(tmp_path: Path) -> None:
    said = report_of(one_run(fragility=fragility(knockout=0.99, margin=0.9)), tmp_path)
    assert "on the train images with AUC 0.990, higher than every other score asked" in said
    beaten = report_of(one_run(fragility=fragility(knockout=0.8, margin=0.9)), tmp_path)
    assert "with AUC 0.800, not better than final margin (0.900)" in beaten
    tied = report_of(one_run(fragility=fragility(knockout=0.9, margin=0.9)), tmp_path)
    assert "not better than final margin (0.900)" in tied


def test_fence_of_a_class_is_drawn_in_its_groups(tmp_path: Path) -> None:
    made = one_run(fragility=fragility())
    write_report(made, tmp_path)
    svg = (tmp_path / "figures" / "fragility-fragility.svg").read_text()
    dashed = [float(y) for y in re.findall(r'<path d="M[\d.]+ ([\d.]+)L[^>]*stroke-dasharray', svg)]
    assert len(dashed) == 4
    assert dashed[0] == dashed[1] > dashed[2] == dashed[3]  # class 0 has the lower fence
    assert "Evenly thinned: 2 of 1749 of G0" in (tmp_path / "report.html").read_text()
    made["fragility"]["flagged"]["train"] = {"impossible": "nobody stands out"}
    said = report_of(made, tmp_path)
    assert "On the train images no groups could be inferred: nobody stands out" in said
    assert "stroke-dasharray" not in (tmp_path / "figures" / "fragility-fragility.svg").read_text()


def test_audit_counts_minorities_and_frames_them(tmp_path: Path) -> None:
    said = report_of(one_run(fragility=fragility()), tmp_path)
    assert "1 of the 2 of class 0 are of minority groups (share in the class: 5 %)" in said  # 92 of 1841
    assert "1 of the 2 of class 1 are of minority groups (share in the class: 5 %)" in said  # 28 of 556
    svg = (tmp_path / "figures" / "fragility-audit.svg").read_text()
    assert svg.count("<image") == 4 and svg.count('stroke="#D55E00"') == 2
    assert "png" not in (tmp_path / "tables" / "fragility_audit.csv").read_text()


def test_mitigation_is_compared_with_every_other_way(tmp_path: Path) -> None:
    said = report_of(one_run(fragility=fragility(inferred=0.6)), tmp_path)
    assert "reaches 60.0 % [53.8, 65.9]: not better than true groups (90.0 %); better than ERM (20.0 %)." in said
    assert "AFR was impossible: it did not <converge>" in said
    missing = fragility()
    missing["mitigation"][1] = {**missing["mitigation"][3], "name": "inferred by knockout"}
    said = report_of(one_run(fragility=missing), tmp_path)
    assert "The last layer could not be retrained on groups inferred by the knockout" in said


def test_a_network_without_branches_has_one_sentence(tmp_path: Path) -> None:
    said = report_of(one_run(fragility={"impossible": "no residual branches"}), tmp_path)
    assert "Fragility could not be measured: no residual branches" in said


def test_the_setting_has_no_row_of_neurons_where_none_were_studied(tmp_path: Path) -> None:
    assert "studied layer" not in report_of(one_run(), tmp_path)
    run = {**one_run(), "layers": [{"name": "conv", "neurons": 7}], "neurons": 7}
    assert "7 in 1 studied layer" in report_of(run, tmp_path / "studied")


# Several seeds


def three_seeds(**changes: list[float]) -> list[dict[str, Any]]:
    runs = []
    for place in range(3):
        chosen_values = {name: values[place] for name, values in changes.items()}
        paper, control = chosen_values.get("paper", 0.6), chosen_values.get("control", 0.3)
        inferred = chosen_values.get("inferred", 0.6)
        runs.append(one_run(stage_two=stage_two(paper, control), fragility=fragility(inferred=inferred)))
        runs[-1]["settings"]["seed"] = place
    return copy.deepcopy(runs)


def test_seeds_are_compared_pair_by_pair(tmp_path: Path) -> None:
    better = report_of(seeds_of(three_seeds(paper=[0.6, 0.61, 0.62], control=[0.3, 0.31, 0.32])), tmp_path)
    assert "3 are better than every control in the worst group" in better
    assert "better than ERM (+41.0 points [38.5, 43.5]) and nothing pruned (+30.0 points [30.0, 30.0])" in better
    worse = report_of(seeds_of(three_seeds(paper=[0.3, 0.31, 0.33], control=[0.6, 0.61, 0.62])), tmp_path)
    assert f"worse than nothing pruned ({MINUS}29.7 points" in worse
    undecided = report_of(seeds_of(three_seeds(paper=[0.3, 0.6, 0.4], control=[0.4, 0.3, 0.35])), tmp_path)
    assert "undecided against ERM (+23.3 points" in undecided and "and nothing pruned (+8.3 points" in undecided
    assert "3 are higher than every control on the mean, but some difference is undecided" in undecided


def test_report_over_seeds_has_its_chapters_and_links(tmp_path: Path) -> None:
    results = seeds_of(three_seeds(inferred=[0.6, 0.7, 0.65]))
    page = write_report(results, tmp_path).read_text()
    said = report_of(results, tmp_path)
    assert "<h1>Critical neurons: Stage 2 and fragility, 3 seeds of synthetic</h1>" in page
    for seed in range(3):
        assert f'<a href="seed-{seed}/report.html">seed {seed}</a>' in page
    assert "undecided against" not in said.split("What it is good for")[1].split("method labels")[0]
    assert "CnC was impossible in 3 seeds" in said
    assert "AFR was impossible in 3 seeds, and is left out." in said
    assert "worse than true groups" in said and "better than ERM" in said
    assert "AUC of the knockout minus that of" in said and "final margin +0.090" in said
    assert {file.stem for file in (tmp_path / "tables").iterdir()} >= {
        "accuracy",
        "stage_two",
        "stage_two_differences",
        "fragility_detection",
        "fragility_detection_differences",
        "fragility_mitigation",
    }
    for file in (tmp_path / "figures").iterdir():
        ElementTree.parse(file)


def claim(verdict: str, group: str = "landbird on water", **columns: Any) -> dict[str, Any]:
    values = {"values": [1.0, 2.0, 3.0], "mean": 2.0, "low": -0.5, "high": 4.5}
    said = {"experiment": "1a", "text": f"claim that {verdict}", "unit": "points", "side": "above", "bound": 0.0}
    return {**said, "group": group, **values, "verdict": verdict, **columns}


def test_claims_have_their_verdicts_in_words(tmp_path: Path) -> None:
    records = [
        claim("holds"),
        claim("does not hold"),
        claim("undecided"),
        claim("undecided", "waterbird on land", unit="layers"),
        claim("undecided", unit="%", bound=95.0),
    ]
    results = seeds_of(three_seeds()) | {"claims": records}
    page = write_report(results, tmp_path).read_text()
    said = report_of(results, tmp_path)
    assert "Of 5 claims about a group, over 3 seeds, 1 hold, 1 do not hold and 3 are undecided." in said
    assert "Holds: 1a claim that holds (G1)." in said
    assert "Does not hold: 1a claim that does not hold (G1)." in said
    assert "<td><b>holds</b></td>" in page and "<td><b>does not hold</b></td>" in page and "<td>undecided</td>" in page
    assert {"claims-points.svg", "claims-layers.svg", "claims-percent.svg"} <= {
        file.name for file in (tmp_path / "figures").iterdir()
    }
    svg = (tmp_path / "figures" / "claims-points.svg").read_text()
    assert "(above 95" not in svg and "(above 95 %)" in (tmp_path / "figures" / "claims-percent.svg").read_text()
    assert "<h1>Critical neurons: Stage 1, Stage 2 and fragility, 3 seeds of synthetic</h1>" in page


def test_two_seeds_are_warned_of(tmp_path: Path) -> None:
    assert "Two seeds say next to nothing of a mean" in report_of(seeds_of(three_seeds()[:2]), tmp_path / "two")
    assert "Two seeds" not in report_of(seeds_of(three_seeds()), tmp_path / "three")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of kind 'folds'; this version knows one run, without a kind, and"):
        write_report(one_run(kind="folds"), tmp_path)
    with pytest.raises(ValueError, match=r"results.json lacks seeds"):
        write_report(one_run(kind="seeds"), tmp_path)


# Levels


def test_wilson_of_hand_worked_cases() -> None:
    assert wilson(0.5, 0) == (0.5, 0.5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_a_level_is_of_one_run_or_of_seeds() -> None:
    assert str(level_of(0.5, 10)) == "50.0 % [23.7, 76.3]"
    assert str(level_of(0.5)) == "50.0 %"
    seeds = level_of({"values": [0.4, 0.6], "mean": 0.5, "sd": 0.1, "low": -0.1, "high": 1.1})
    assert (seeds.value, seeds.low, seeds.high, seeds.values) == (0.5, -0.1, 1.1, (0.4, 0.6))


def test_standing_sorts_the_others_in_three() -> None:
    own = Level(0.5, 0.4, 0.6)
    others = {"a": Level(0.1, 0.0, 0.2), "b": Level(0.45, 0.35, 0.55), "c": Level(0.5, 0.4, 0.6)}
    assert standing(own, others) == (
        "not better than c (50.0 %); higher than b (45.0 %), but the intervals overlap; better than a (10.0 %)"
    )
    assert standing(own, {}) == "there is nothing to compare it with"
