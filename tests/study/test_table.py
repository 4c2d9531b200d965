"""The table of a run against the results that it is made of, and what is asked of it against hand-worked numbers."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from neuronsurgery.study.claims import judge
from neuronsurgery.study.queries import (
    auc_interval,
    control_p_values,
    differences,
    over_draws,
    over_seeds,
    sensitive_layers,
    sum_interval,
    verdict,
)
from neuronsurgery.study.summary import summary
from neuronsurgery.study.table import COLUMNS, Run, combine, csv_of, read_csv, read_run, share, where, write_run
from study.made_up import RULES, MadeUp, arm, fragility, one_run, seeds_of, stage_two

ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["whole seed first", "lacking seed first"])


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A made-up run of every stage."""
    return MadeUp().results() | {"stage_two": stage_two(), "fragility": fragility()}


# Rows


@pytest.mark.parametrize("experiment", ["1a", "1c", "1d", "1e", "1f", "1g"])
def test_changes_are_the_records(whole: dict[str, Any], experiment: str) -> None:
    rows = Run.of(whole).rows(experiment=experiment).to_dicts()
    records = [(r, change) for r in whole["experiments"][experiment]["train"] for change in r["changes"]]
    assert len(rows) == len(records)
    for row, (record, change) in zip(rows, records, strict=True):
        assert (row["selector"], row["chosen_for"], row["k"]) == (
            record["criterion"],
            record["chosen_for"],
            record["k"],
        )
        assert (row["group"], row["value"], row["low"]) == (change["group"], change["change"], change["low"])
        assert (row["high"], row["p"], row["n"]) == (change["high"], change["p"], change["count"])
        assert row["names"] == ";".join(record["names"]) and row["neurons"] == record["neurons"]


def test_accuracies_have_wilson_intervals(whole: dict[str, Any]) -> None:
    rows = Run.of(whole).rows(experiment="accuracy", split="test").to_dicts()
    assert [row["value"] for row in rows] == whole["accuracy"]["test"]
    # 100 of 250, by the formula of Wilson (1927).
    share, n, z = 0.4, 250, 1.959963984540054
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert (rows[1]["value"], rows[1]["n"]) == (share, n)
    assert (rows[1]["low"], rows[1]["high"]) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_a_group_that_a_split_lacks_is_left_out_and_the_others_keep_their_accuracies() -> None:
    made = MadeUp(draws=2).results(["1a"])
    made["counts"]["test"] = [250, 0, 250, 250]
    made["accuracy"]["test"] = [1.0, 0.4, 0.99]
    rows = Run.of(made).rows(experiment="accuracy", split="test")
    assert rows["value"].to_list() == [1.0, 0.4, 0.99]
    assert rows["group"].to_list() == [made["groups"][place] for place in (0, 2, 3)]


def test_arms_are_the_results(whole: dict[str, Any]) -> None:
    run = Run.of(whole)
    judged = [one for one in whole["stage_two"]["arms"] if one["selected"]]
    for one in judged:
        for rule in RULES:
            rows = run.rows(experiment="arms", selector=one["name"], rule=rule)
            chosen = one["selected"][rule]
            assert where(rows, measure="accuracy")["value"].to_list() == chosen["test"]
            worst = where(rows, measure="worst group").to_dicts()[0]
            assert (worst["value"], worst["epoch"]) == (chosen["worst"], chosen["epoch"])
            assert worst["note"] == whole["groups"][chosen["test"].index(chosen["worst"])]
            assert where(rows, measure="balanced average")["value"].item() == chosen["balanced"]
    epochs = run.rows(experiment="epochs", measure="accuracy")
    assert len(epochs) == sum(len(one["trajectory"]) for one in judged) * 2 * 4
    said = {one["name"]: one for one in run.about["stage_two"]["arms"]}
    assert said["CnC"]["impossible"] == "no image <is> an anchor" and "selected" not in said["ERM"]


def test_fragility_is_the_results(whole: dict[str, Any]) -> None:
    run, stage = Run.of(whole), whole["fragility"]
    assert run.rows(experiment="detection", measure="AUC")["value"].to_list() == [0.99, 0.99, 0.9, 0.9]
    flagged = run.rows(experiment="flagged", measure="flagged")
    assert flagged["value"].to_list() == [3 / 1749, 60 / 92, 20 / 28, 5 / 528]
    assert run.rows(experiment="flagged", measure="threshold")["value"].to_list() == [-1.25, 0.75]
    points = run.rows(experiment="points", measure="fragility")
    assert points["value"].to_list() == [value for row in stage["points"] for value in row["fragility"]]
    worst = run.rows(experiment="mitigation", measure="worst group")
    assert dict(zip(worst["selector"], worst["value"], strict=True)) == {
        row["name"]: row["worst"] for row in stage["mitigation"] if "worst" in row
    }
    assert run.about["fragility"]["audit"] == stage["audit"]


def test_results_are_not_changed(whole: dict[str, Any]) -> None:
    before = json.dumps(whole)
    Run.of(whole)
    assert json.dumps(whole) == before


@pytest.mark.parametrize("present", [[], ["1a"], ["1b"], ["1b", "1e"], ["1g"]])
def test_any_subset_of_experiments(present: list[str]) -> None:
    run = Run.of(MadeUp(draws=2).results(present))
    assert {name for name in run.experiments if name.startswith("1")} == set(present)


def test_a_column_that_is_not_explained_is_found() -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    named = set(re.findall(r"`([^`\n]+)`", page))
    assert sorted(set(COLUMNS) - named) == []
    made = Run.of(MadeUp().results() | {"stage_two": stage_two(), "fragility": fragility()})
    assert sorted(set(made.table["measure"]) - named) == []
    assert sorted(made.experiments - named) == []


# Files


def test_written_and_read_is_the_same(whole: dict[str, Any], tmp_path: Path) -> None:
    run = Run.of(whole)
    for name, data in write_run(run).items():
        (tmp_path / name).write_bytes(data)
    back = read_run(tmp_path)
    assert back.table.equals(run.table)
    assert back.about == json.loads(json.dumps(run.about))
    assert write_run(back) == write_run(run)


def test_names_are_no_formulas_and_come_back_as_they_were() -> None:
    names = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "'quoted", "a=b", "", 'two "words"', "a,b", "a\nb"]
    rows = [
        {"seed": 0, "group": name, "value": value} for name, value in zip(names, [-0.5, *[1 / 3] * 11], strict=True)
    ]
    table = pl.DataFrame(rows, schema=dict(COLUMNS))
    data = csv_of(table)
    assert read_csv(data).equals(table)
    found = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    assert not any(row["group"][:1] in ("=", "+", "-", "@", "\t", "\r") for row in found)
    assert [row["value"] for row in found][:2] == ["-0.5", "0.3333333333333333"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone is not there: name the folder of a run"):
        read_run(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"has no results\.json and no table\.csv: run `neuronsurgery study"):
        read_run(tmp_path)
    for name, data in write_run(Run.of(MadeUp(draws=1).results(["1a"]))).items():
        (tmp_path / name).write_bytes(data)
    about = json.loads((tmp_path / "results.json").read_text())
    wrong = {
        json.dumps([1]): r"results\.json is damaged \(a list, where an object was expected\): delete it and run",
        "{": r"results\.json is damaged \(.*\): delete it",
        json.dumps(about | {"schema": 1}): r"has schema 1, and this version reads schema 2: make the report with the",
        json.dumps(about | {"kind": "folds"}): r"is of kind 'folds'; this version knows one run, and \"seeds\"",
        json.dumps({"schema": 2}): "lacks settings, groups, counts: it is not of a finished",
    }
    for text, said in wrong.items():
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(about))
    (tmp_path / "table.csv").write_text("seed,stage\n0,1,2\n")
    with pytest.raises(ValueError, match=r"table\.csv is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(("page", "run"), [("results.md", "runs/third"), ("report.md", "runs/synthetic-seed-0")])
def test_what_the_documentation_does_with_a_run(page: str, run: str, whole: dict[str, Any], tmp_path: Path) -> None:
    for name, data in write_run(Run.of(whole)).items():
        (tmp_path / name).write_bytes(data)
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert run in block
    names: dict[str, Any] = {}
    exec(block.replace(run, str(tmp_path)), names)
    assert len(names["worst"] if page == "results.md" else names["table"])


# What is asked again and again


def changes(values: list[tuple[float, float, float]], **said: Any) -> pl.DataFrame:
    """Rows of changes: value, low, high, one draw each."""
    known = {"seed": 0, "stage": "1", "split": "train", "measure": "change", "group": "a", "chosen_for": "a", **said}
    rows = [
        {**known, "draw": place, "value": v, "low": low, "high": high} for place, (v, low, high) in enumerate(values)
    ]
    return pl.DataFrame(rows, schema=dict(COLUMNS))


def test_draws_are_taken_together() -> None:
    drawn = [(-0.1, -0.4, 0.2), (-0.2, -0.3, -0.1), (0.3, 0.1, 0.5)]
    (row,) = over_draws(changes(drawn, experiment="1c")).to_dicts()
    assert row["value"] == pytest.approx(statistics.fmean(v for v, _, _ in drawn))
    assert (row["low"], row["high"], row["draws"], row["seen"]) == (-0.2, 0.3, 3, 1)  # one draw on either side
    (alone,) = over_draws(changes(drawn[:1], experiment="1c")).to_dicts()
    assert (alone["low"], alone["high"], alone["draws"]) == (-0.4, 0.2, 1)


def test_p_values_count_the_draws_that_do_as_much_and_say_how_many_differ() -> None:
    critical = changes([(0.2, 0, 0)], experiment="1a", selector="gradient", k=1, names="z")
    drawn = [(0.0, 0, 0), (-0.3, 0, 0), (0.0, 0, 0)]
    controls = changes(drawn, experiment="1g", selector="same layers", k=1)
    controls = controls.with_columns(pl.Series("names", ["x", "y", "x"]))
    first, second = control_p_values(pl.concat([critical, controls])).to_dicts()
    assert (first["kind"], first["draws"], first["distinct"], first["p"]) == ("same layers", 3, 2, 2 / 4)
    assert (second["kind"], second["draws"], second["p"]) == ("whole model", 0, 1.0)


def test_sensitive_layers_change_by_a_point_or_more() -> None:
    values = [(0.01, 0, 0), (-0.0099, 0, 0), (-0.5, 0, 0), (0.1 * 3 - 0.31, 0, 0)]
    (row,) = sensitive_layers(changes(values, experiment="1f", distance=5, with_norm=False)).to_dicts()
    assert (row["sensitive"], row["distance"]) == (3, 5)  # a hundredth itself counts


def test_one_seed_is_as_it_is_and_several_have_students_interval(whole: dict[str, Any]) -> None:
    run = Run.of(whole)
    alone = over_seeds(run, run.rows(experiment="accuracy"))
    assert alone["value"].to_list() == run.rows(experiment="accuracy")["value"].to_list()
    runs = [copy.deepcopy(MadeUp(draws=1).results([])) for _ in range(3)]
    for place, one in enumerate(runs):
        one["accuracy"]["test"][1] = 0.4 + 0.1 * place
    together = seeds_of(runs)
    found = over_seeds(together, together.rows(experiment="accuracy", split="test"))
    row = found.to_dicts()[1]
    half = 4.302652729749464 * 0.1 / math.sqrt(3)
    assert row["values"] == pytest.approx([0.4, 0.5, 0.6]) and row["value"] == pytest.approx(0.5)
    assert (row["low"], row["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert together.of_seed(2).table.equals(Run.of(runs[2]).table.with_columns(seed=pl.lit(2)))


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0], "one seed only"), ([1.0, 1.1], "holds"), ([-1.0, -1.1], "does not hold"), ([-1.0, 2.0], "undecided")],
)
def test_a_verdict_goes_by_the_whole_interval(values: list[float], said: str) -> None:
    assert verdict(values) == said


def test_the_interval_of_a_difference_of_shares_is_newcombes() -> None:
    # Newcombe (1998), method 10, example (a): 56 of 70 and 48 of 80.
    first, second = (tuple(share(hits / of, of).values()) for hits, of in ((56, 70), (48, 80)))
    found = sum_interval([(1.0, *first), (-1.0, *second)])  # type: ignore[list-item]
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_interval_of_an_area_is_that_of_the_rank_sum_where_nothing_is_told_apart() -> None:
    low, high = auc_interval(0.5, 51, 58)
    assert (high - low) / (2 * 1.959964) == pytest.approx(math.sqrt((51 + 58 + 1) / (12 * 51 * 58)))
    assert auc_interval(1.0, 10, 10) == (1.0, 1.0)


# Several seeds


def in_order(order: tuple[int, ...], runs: list[dict[str, Any]]) -> Run:
    """Runs of seeds 0, 1 ..., taken together in this order."""
    runs = copy.deepcopy(runs)
    for seed, run in enumerate(runs):
        run["settings"]["seed"] = seed
    return combine({seed: Run.of(runs[seed]) for seed in order})


def with_chosen(*chosen: dict[str, Any]) -> dict[str, Any]:
    """Stage 2 with Group DRO last, and before it what was chosen from several variants."""
    made = stage_two()
    kept = [one for one in made["arms"] if one["name"] != "CnC"]
    return one_run(stage_two={**made, "arms": [*kept[:-1], *chosen, kept[-1]]})


def test_seeds_of_other_runs_are_refused() -> None:
    one = Run.of(MadeUp(draws=1).results([]))
    with pytest.raises(ValueError, match="at least two seeds, not of 1"):
        combine({0: one})
    other = MadeUp(draws=1).results([])
    other["settings"] |= {"epochs": 3, "preset": "sgd"}
    with pytest.raises(ValueError, match="the runs differ in epochs, preset: only the seed may differ"):
        combine({0: one, 1: Run.of(other)})


@ORDERS
def test_an_arm_that_a_seed_lacks_is_counted_in_its_place(order: tuple[int, ...]) -> None:
    together = in_order(order, [with_chosen(arm("CnC, chosen", "comparison", 0.5)), with_chosen()])
    names = ["ERM", "pruned by gradient", "nothing pruned", "CnC, chosen", "Group DRO"]
    arms = {one["name"]: one for one in together.about["stage_two"]["arms"]}
    assert list(arms) == names
    assert arms["CnC, chosen"]["impossible"] == "in 1 of 2 seeds: no variant could be trained"
    assert "impossible" not in arms["Group DRO"]
    found = over_seeds(together, together.rows(experiment="arms", measure="worst group", rule="worst group"))
    assert dict(zip(found["selector"], found["seeds"], strict=True)) == dict.fromkeys(names, 2) | {"CnC, chosen": 1}


@ORDERS
def test_a_control_that_a_seed_lacks_is_in_no_difference(order: tuple[int, ...]) -> None:
    together = in_order(order, [with_chosen(arm("ERM continued, chosen", "control", 0.5)), with_chosen()])
    worst = together.rows(experiment="arms", measure="worst group").with_columns(group=pl.lit(None, pl.String))
    pairs = [("pruned by gradient", name) for name in ("ERM", "nothing pruned", "ERM continued, chosen")]
    found = differences(together, worst, pairs)
    assert set(found["control"]) == {"ERM", "nothing pruned"}


def test_seeds_are_compared_pair_by_pair() -> None:
    runs = [one_run(stage_two=stage_two(*pair)) for pair in ((0.6, 0.3), (0.61, 0.31), (0.62, 0.33))]
    together = seeds_of(runs)
    worst = together.rows(experiment="arms", measure="worst group").with_columns(group=pl.lit(None, pl.String))
    found = differences(together, worst, [("pruned by gradient", "nothing pruned")]).to_dicts()
    assert [row["rule"] for row in found] == list(RULES)
    half = 4.302652729749464 * statistics.stdev([0.3, 0.3, 0.29]) / math.sqrt(3)
    mean = statistics.fmean([0.3, 0.3, 0.29])
    assert found[0]["values"] == pytest.approx([0.3, 0.3, 0.29])
    assert (found[0]["low"], found[0]["high"]) == pytest.approx((mean - half, mean + half))
    assert differences(Run.of(runs[0]), worst, [("pruned by gradient", "nothing pruned")]).is_empty()


@ORDERS
def test_seeds_that_inferred_no_groups_are_named_with_the_reason(order: tuple[int, ...]) -> None:
    runs = [one_run(stage_two=stage_two() | {"not_inferred": why}) for why in (None, "nobody <stands> out")]
    assert in_order(order, runs).about["stage_two"]["not_inferred"] == "seed 1: nobody <stands> out"
    assert in_order(order, [runs[0], runs[0]]).about["stage_two"]["not_inferred"] is None


# What is printed


def test_accuracies_and_answers_are_printed(whole: dict[str, Any]) -> None:
    run = Run.of(whole)
    lines = summary(run).splitlines()
    cells = (f"{100 * value:.1f}" for value in whole["accuracy"]["test"])
    assert re.fullmatch(r"test +" + r" +".join(map(re.escape, cells)), lines[1 + list(whole["accuracy"]).index("test")])
    asked = [claim for claim in judge(run) if claim["question"] and claim["group"] == run.minority[0]]
    start = lines.index(f"{run.minority[0]}, the rarest group in training") + 1
    assert len(asked) == 4
    for line, claim in zip(lines[start:], asked, strict=False):
        number, ends = f"{claim['mean']:.1f} {claim['unit']}", f"[{claim['low']:.1f}, {claim['high']:.1f}]"
        assert re.fullmatch(rf"{re.escape(claim['question'])} +one seed only +{number} +{re.escape(ends)}", line)
    assert lines[-1] == "report.html shows what these rest on; every number is in table.csv."


def test_of_seeds_means_are_printed_with_their_intervals() -> None:
    runs = [MadeUp(draws=1).results(["1a"]) | {"fragility": fragility()} for _ in range(2)]
    printed = summary(seeds_of(runs))
    assert printed.startswith("accuracy, %, mean of 2 seeds [95 % interval]")
    mean = 100 * runs[0]["accuracy"]["train"][0]
    assert re.search(rf"\ntrain +{mean:.1f} \[{mean:.1f}, {mean:.1f}\]", printed)
    assert re.search(r"hit it more than any other group\? +(holds|does not hold) ", printed)


def test_nobody_rare_means_no_answers(whole: dict[str, Any]) -> None:
    assert "rarest" not in summary(Run.of({**whole, "minority": []}))
