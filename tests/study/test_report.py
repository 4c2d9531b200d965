"""The report: every sentence against numbers made up for it, and the form of the files."""

import base64
import csv
import errno
import io
import itertools
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronsurgery.study import data, figures
from neuronsurgery.study.figures import Mark, Picture, Series, contact_sheet, number, pixels_of, png, signed
from neuronsurgery.study.report import contents, write_report
from neuronsurgery.study.report.controls import _single_words
from neuronsurgery.study.report.effects import Groups, cells_of
from neuronsurgery.study.report.section import Entry, Section
from study.forking import Forked

BIRDS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
COUNTS = (1749, 92, 28, 528)
EXPERIMENTS = ("1a", "1b", "1c", "1d", "1e", "1f", "1g")


# A run made up: the schema's shape, with an effect of a known size


class MadeUp:
    """Results of the schema. `effect` is the change of a minority group's accuracy where its own neurons are cut."""

    def __init__(
        self,
        effect: float = -0.25,
        groups: Sequence[str] = BIRDS,
        counts: Sequence[int] = COUNTS,
        minority: Sequence[int] = (1, 2),
        layers: int = 10,
        splits: Sequence[str] = ("train",),
        draws: int = 10,
    ) -> None:
        self.effect, self.groups, self.counts, self.minority = effect, list(groups), list(counts), list(minority)
        self.layers = [f"block{place}.conv.weight" for place in range(layers)]
        self.splits, self.draws, self.random = list(splits), draws, random.Random(0)

    def change(self, place: int, size: float) -> dict[str, Any]:
        """A change in whole examples, with an interval that shrinks as the group grows."""
        n = self.counts[place]
        change = round(size * n) / n
        half = 0.0 if size == 0 and n > 1000 else (abs(change) * 0.5 + 1.5 / n)
        return {
            "group": self.groups[place],
            "before": 1.0,
            "after": 1.0 + change,
            "change": change,
            "low": change - half,
            "high": change + half,
            "p": 0.01 if abs(change) > half else 1.0,
            "count": n,
        }

    def record(self, criterion: str, chosen: int | None, scale: float = 1.0, **columns: Any) -> dict[str, Any]:
        empty = dict.fromkeys(("k", "fraction", "std", "relative_std", "layer", "distance"))
        changes = []
        for place in range(len(self.groups)):
            own = place in self.minority and chosen == place
            jitter = self.random.uniform(0.6, 1.4)
            changes.append(self.change(place, self.effect * scale * jitter if own else 0.0))
        return {
            "criterion": criterion,
            "chosen_for": "all" if chosen is None else self.groups[chosen],
            **empty,
            "with_norm": False,
            "draw": 0,
            "neurons": 1,
            "names": ["block1.conv.weight[13]"],
            **columns,
            "changes": changes,
        }

    def tops(self, scale: float = 1.0, **columns: Any) -> list[dict[str, Any]]:
        choices = [("gradient", place) for place in range(len(self.groups))] + [("magnitude", None)]
        return [
            self.record(criterion, chosen, scale * (1 + k) / 3, k=k, neurons=k, **columns)
            for criterion, chosen in choices
            for k in (1, 2, 3)
        ]

    def drawn(self, scale: float) -> list[dict[str, Any]]:
        scales = [{"std": 0.005}, {"std": 0.01}, {"std": 0.02}, {"relative_std": 1.0}]
        return [
            record
            for place, std in enumerate(scales)
            for draw in range(self.draws)
            for record in self.tops(scale * (place + 1) / 4, draw=draw, **std)
        ]

    def ranks(self) -> list[dict[str, Any]]:
        records = []
        for name in self.groups:
            for share, neurons in ((0.0001, 1), (0.05, 17)):
                for by, other in (("gradient", "magnitude"), ("magnitude", "gradient")):
                    power = 0.3 if by == "gradient" else 1
                    percentiles = [100 * self.random.random() ** power or 1.0 for _ in range(neurons)]
                    histogram = [0] * 20
                    for percentile in percentiles:
                        histogram[min(19, int(percentile // 5))] += 1
                    records.append(
                        {
                            "chosen_by": by,
                            "ranked_by": other,
                            "group": name,
                            "share": share,
                            "neurons": neurons,
                            "percentiles": percentiles,
                            "histogram": histogram,
                        }
                    )
        return records

    def rewinds(self) -> list[dict[str, Any]]:
        records = []
        for distance in (5, 10, 20, 30):
            for with_norm in (False, True):
                for place, layer in enumerate(self.layers):
                    size = distance / 30 * (place % 3) / 2
                    records.append(
                        self.record("rewind", None, layer=layer, distance=distance, with_norm=with_norm)
                        | {
                            "changes": [
                                self.change(g, self.effect * size * (g in self.minority) or 0.0)
                                for g in range(len(self.groups))
                            ]
                        }
                    )
        return records

    def controls(self) -> list[dict[str, Any]]:
        shares = (0.0001, 0.0002, 0.0003, 0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
        records = [
            self.record("random", None, fraction=share, neurons=max(1, round(336 * share)), draw=draw)
            for share in shares
            for draw in range(self.draws)
        ]
        for place in range(len(self.groups)):
            for k in (1, 2, 3):
                for draw in range(self.draws):
                    scale = self.random.uniform(-0.2, 0.6)
                    records.append(self.record("same layers", place, scale, k=k, neurons=k, draw=draw))
                    records.append(self.record("random", place, scale / 4, k=k, neurons=k, draw=draw))
        return records

    def tests(self) -> list[dict[str, Any]]:
        return [
            {
                "criterion": "gradient",
                "chosen_for": name,
                "k": k,
                "group": name,
                "change": self.effect if place in self.minority else 0.0,
                "draws": 200,
                "p": 0.0149 if place in self.minority and self.effect else 1.0,
                "kind": kind,
            }
            for place, name in enumerate(self.groups)
            for k in (1, 2, 3)
            for kind in ("same layers", "whole model")
        ]

    def sensitive(self, rewinds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for distance in (5, 10, 20, 30):
            for with_norm in (False, True):
                found = [r for r in rewinds if r["distance"] == distance and r["with_norm"] == with_norm]
                counts = [
                    sum(abs(r["changes"][place]["change"]) >= 0.01 for r in found) for place in range(len(self.groups))
                ]
                rows.append({"distance": distance, "with_norm": with_norm, "layers": len(found), "sensitive": counts})
        return rows

    def results(self, experiments: Sequence[str] = EXPERIMENTS) -> dict[str, Any]:
        rewinds = self.rewinds()
        made = {
            "1a": self.tops,
            "1b": self.ranks,
            "1c": lambda: self.drawn(0.8),
            "1d": lambda: self.drawn(0.2),
            "1e": lambda: [
                record for place, layer in enumerate(self.layers) for record in self.tops((place % 4) / 3, layer=layer)
            ],
            "1f": lambda: rewinds,
            "1g": self.controls,
        }
        low = [0.9 if place in self.minority else 1.0 for place in range(len(self.groups))]
        return {
            "schema": 1,
            "version": "0.1.0",
            "settings": {
                "data": "synthetic",
                "arch": "small_resnet",
                "preset": "adam",
                "seed": 0,
                "epochs": 30,
                "splits": self.splits,
                "quick": False,
                "weights": None,
            },
            "environment": {"torch": "2.14.1", "python": "3.11.7", "threads": 2, "platform": "Linux-x86_64"},
            "seconds": {"train": 30.1, **dict.fromkeys(experiments, 2.25)},
            "groups": self.groups,
            "minority": self.minority,
            "counts": {"train": self.counts, "validation": [60] * len(self.groups), "test": [250] * len(self.groups)},
            "expected_counts": None,
            "accuracy": {
                "train": low,
                "validation": [x - 0.4 * (x < 1) for x in low],
                "test": [x - 0.5 * (x < 1) for x in low],
            },
            "trajectory": [{"epoch": 0, "loss": None}]
            + [{"epoch": e, "loss": 0.6 / e, "accuracy": 1 - 0.2 / e} for e in range(1, 31)],
            "layers": [{"name": name, "neurons": 32} for name in self.layers],
            "neurons": 32 * len(self.layers),
            "experiments": {name: {split: made[name]() for split in self.splits} for name in experiments},
            "sensitive_layers": {split: self.sensitive(rewinds) for split in self.splits}
            if "1f" in experiments
            else {},
            "missing_distances": [40] if "1f" in experiments else [],
            "control_p": {split: self.tests() for split in self.splits} if "1g" in experiments else {},
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A whole made-up run, and the folder of its report."""
    results = MadeUp().results()
    folder = tmp_path_factory.mktemp("report")
    assert write_report(results, folder) == folder / "report.html"
    return results, folder


def text_of(page: str) -> str:
    """The page's text as read: no tags, single spaces."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.parts: list[str] = []

        def handle_data(self, data: str) -> None:
            self.parts.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.parts).split())


def report_of(results: dict[str, Any], folder: Path) -> str:
    return text_of(write_report(results, folder).read_text())


def one_change(
    change: float, low: float, high: float, other: tuple[float, float, float] = (0.0, -0.002, 0.002)
) -> dict[str, Any]:
    """Results of 1a in which every cut changes each minority group by this much, and each other group by `other`."""
    made = MadeUp().results(["1a"])
    for record in made["experiments"]["1a"]["train"]:
        for place, found in enumerate(record["changes"]):
            found["change"], found["low"], found["high"] = (change, low, high) if place in (1, 2) else other
    return made


# What the page says


@pytest.mark.parametrize(
    "sentence",
    [
        "The top-1, top-2 and top-3 neurons of the whole model were set to zero",
        "The critical neurons were ranked by the other criterion. Of the top 0.01 % (1 neuron per group)",
        "were replaced by Gaussian noise (std 0.005, std 0.01, std 0.02 and std 1 x RMS) in 10 draws each",
        "Gaussian noise (std 0.005, std 0.01, std 0.02 and std 1 x RMS) was added to the top-1",
        "In each of 10 layers in turn the top-1, top-2 and top-3 neurons were set to zero",
        "Each of 10 layers in turn was put back by 5, 10, 20 and 30 epochs, the rest unchanged",
        "Random neurons that are not critical, 0.01 % to 3 % of the model, were set to zero in 10 draws each",
        "of as many neurons of the same layers, the neurons chosen by a group's own gradient stand out for",
        "G2 waterbird on land (minority) (28 examples): 3.6 points",
        "that this run of 30 epochs does not have: 40 epochs",
        "They are not over seeds",
        "the preset adam (Adam without weight decay); over five seeds of the embedded data the magnitude",
        "By magnitude, this run: no effect seen on any group",
        "G2 waterbird on land (minority) reaches 90.0 % in training and 40.0 % in test (gap +50.0)",
        "with 200 draws it cannot be below 0.0050",
    ],
)
def test_page_says(whole: tuple[dict[str, Any], Path], sentence: str) -> None:
    assert sentence in text_of((whole[1] / "report.html").read_text())


def test_effect_is_seen_where_the_interval_excludes_zero(tmp_path: Path) -> None:
    said = report_of(one_change(-0.25, -0.4, -0.1), tmp_path)
    assert "an effect is seen on G1 landbird on water (minority), 3 of 3 times (" in said
    assert "\N{MINUS SIGN}25.0 points [\N{MINUS SIGN}40.0, \N{MINUS SIGN}10.0]" in said
    assert "no effect of a point or more on G0 landbird on land and G3 waterbird on water" in said
    assert "An effect is seen on minority groups only" in said
    assert "is larger in size than that of a majority group" in said
    assert "the intervals of their sizes do not overlap" in said


def test_null_result_says_no_effect(tmp_path: Path) -> None:
    said = report_of(one_change(0.0, -0.002, 0.002), tmp_path)
    assert "chosen by each group's own gradient, no effect seen on any group. And" in said
    assert "Neither the minority nor the majority groups show an effect." in said
    assert "an effect is seen" not in said.split("1a Zero the top neurons of the whole model", 3)[3]


def test_wide_interval_is_undecided(tmp_path: Path) -> None:
    said = report_of(one_change(-0.1, -0.25, 0.05), tmp_path)
    assert "no effect seen on any group; undecided on G1 landbird on water (minority) and G2 waterbird on land" in said


def test_majority_effect_is_not_hidden(tmp_path: Path) -> None:
    said = report_of(one_change(-0.1, -0.25, 0.05, other=(-0.3, -0.4, -0.2)), tmp_path)
    assert "An effect is seen on majority groups only" in said
    assert "is not larger in size than that of a majority group" in said
    assert "overlap: this run does not settle it" in said


def test_draws_of_both_signs_are_no_effect(tmp_path: Path) -> None:
    made = MadeUp(draws=4).results(["1c"])
    for record in made["experiments"]["1c"]["train"]:
        sign = 1 if record["draw"] % 2 else -1
        for found in record["changes"]:
            found |= {"change": 0.3 * sign, "low": 0.3 * sign - 0.1, "high": 0.3 * sign + 0.1}
    assert "no effect seen on any group; undecided on" in report_of(made, tmp_path)


def test_whole_null_run_says_so_everywhere(tmp_path: Path) -> None:
    made = MadeUp(effect=0.0).results()
    said = report_of(made, tmp_path)
    assert "an effect is seen" not in said.replace("in how many an effect is seen", "").replace(
        "bold: an effect is seen", ""
    )
    assert said.count("no effect seen on any group") >= 10
    assert "do not stand out for any group (every p at least 0.05)" in said


def test_too_few_draws_for_a_p_value_are_named(tmp_path: Path) -> None:
    made = MadeUp(effect=0.0, draws=2).results(["1g"])
    for test in made["control_p"]["train"]:
        test["draws"] = 5
    assert "gradient cannot stand out: 5 draws are too few for a p below 0.05" in report_of(made, tmp_path)


def test_quick_run_and_missing_experiments_are_named(tmp_path: Path) -> None:
    made = MadeUp().results(["1a", "1f"])
    made["settings"]["quick"] = True
    said = report_of(made, tmp_path)
    assert "A quick run" in said
    assert "This run has no result yet of: 1b Where the critical neurons rank; 1c" in said


def test_expected_counts_stand_beside_those_found(tmp_path: Path) -> None:
    made = MadeUp().results([])
    made["expected_counts"] = {"train": [1749, 92, 56, 528]}
    said = report_of(made, tmp_path)
    assert "the paper has 56" in said
    assert "The group counts of train differ from the paper's" in said
    made["expected_counts"] = {"train": list(COUNTS)}
    assert "The group counts of train are the paper's." in report_of(made, tmp_path)


def test_level_and_method_of_the_intervals_are_those_of_the_run(tmp_path: Path) -> None:
    made = MadeUp(effect=0.0, draws=2).results(["1a"])
    plain = report_of(made, tmp_path)
    assert "Intervals are 95 % intervals over the examples" in plain
    assert "Of 24 intervals of 95 %, up to about 1 exclude 0 by chance alone." in plain
    assert "Intervals: " not in plain
    made["intervals"] = {"level": 0.875, "method": "of A & B (1999)", "p": "a sign test"}
    said = report_of(made, tmp_path)
    assert "Intervals are 87.5 % intervals over the examples" in said
    assert "Intervals: of A & B (1999). p-values: a sign test." in said
    assert "Of 24 intervals of 87.5 %, up to about 3 exclude 0 by chance alone." in said


def test_seconds_of_each_part_are_folded_away(tmp_path: Path) -> None:
    made = MadeUp(draws=2).results(["1a"])
    made["seconds"] = {"training": 30.1, "1a on train": 2.25}
    report_of(made, tmp_path)
    assert "<summary>Its parts took 32 seconds</summary>" in (page := (tmp_path / "report.html").read_text())
    assert page.index("<td>30.1</td>") < page.index("<td>2.2</td>")
    del made["seconds"]
    assert "parts took" not in report_of(made, tmp_path)


def test_settings_that_are_lists_read_as_lists(tmp_path: Path) -> None:
    made = MadeUp(draws=2).results([])
    made["settings"] |= {"splits": ["train", "test"], "stages": []}
    said = report_of(made, tmp_path)
    assert "splits train, test" in said and "stages none" in said


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"stages": ["1"], "experiments": ["1a"]}, []),
        ({"stages": ["1"], "experiments": ["1a", "1g"]}, ["1g Controls"]),
        ({"stages": ["1", "2"], "experiments": ["1a"]}, ["Stage 2"]),
        ({"stages": ["2", "fragility"], "experiments": ["1a", "1b"]}, ["Stage 2", "Fragility"]),
    ],
)
def test_only_what_a_run_was_asked_for_is_missing(tmp_path: Path, settings: dict[str, Any], missing: list[str]) -> None:
    made = MadeUp(draws=2).results(["1a"])
    made["settings"] |= settings
    warned = re.findall(r"This run has no result yet of: ([^<]*)\.</p>", write_report(made, tmp_path).read_text())
    assert len(warned) == bool(missing)
    assert [entry.startswith(name) for entry, name in zip("".join(warned).split("; "), missing, strict=False)] == [
        True for _ in missing
    ]
    assert "".join(warned).count(";") == max(0, len(missing) - 1)


def test_two_figures_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svg = figures.strips("Title", ["a"], [[1.0]], axis="points")

    def twice(run: Mapping[str, Any], groups: Groups) -> list[Section]:
        return [Section("One.", figures=[("same", "", svg)]), Section("Two.", more_figures=[("same", "", svg)])]

    monkeypatch.setattr(contents, "CONTENTS", (*contents.CONTENTS, Entry("twice", "Twice", twice)))
    with pytest.raises(ValueError, match="two figures of the report are called same: give each section names of its"):
        write_report(MadeUp(draws=2).results([]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Any run


@pytest.mark.parametrize("present", [[], *([name] for name in EXPERIMENTS), ["1b", "1e"]])
def test_any_subset_of_experiments(tmp_path: Path, present: list[str]) -> None:
    write_report(MadeUp(draws=2).results(present), tmp_path)
    tables = {file.stem for file in (tmp_path / "tables").iterdir()}
    assert {name for name in EXPERIMENTS if name in tables} == set(present)


def test_bare_run_without_the_optional_parts(tmp_path: Path) -> None:
    made = MadeUp(draws=2).results(["1a", "1f", "1g"])
    for key in (
        "trajectory",
        "sensitive_layers",
        "missing_distances",
        "control_p",
        "expected_counts",
        "seconds",
        "accuracy",
    ):
        del made[key]
    assert "The run has no accuracy on both" in report_of(made, tmp_path)


@pytest.mark.parametrize(("groups", "layers"), [(2, 1), (12, 36)])
def test_any_number_of_groups_layers_and_splits(tmp_path: Path, groups: int, layers: int) -> None:
    names = [f"class {place // 2} & <attribute {place % 2}>" for place in range(groups)]
    counts, minority = [500, 20] * (groups // 2), list(range(1, groups, 2))
    made = MadeUp(groups=names, counts=counts, minority=minority, layers=layers, splits=("train", "test"), draws=2)
    path = write_report(made.results(["1a", "1b", "1e", "1f", "1g"]), tmp_path)
    page = path.read_text()
    assert "On the test split" in page
    assert "<attribute" not in page
    assert "class 0 &amp; &lt;attribute 1&gt;" in page
    for file in (tmp_path / "figures").iterdir():
        ElementTree.parse(file)


def test_no_minority_groups(tmp_path: Path) -> None:
    assert "no such group" in report_of(MadeUp(minority=(), draws=2).results(["1a", "1b", "1f"]), tmp_path)


def test_other_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has schema 2, and this version reads schema 1: make the report with the version"
    ):
        write_report({"schema": 2, "version": "0.9"}, tmp_path)
    with pytest.raises(ValueError, match="has schema None"):
        write_report({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks settings, groups, counts"):
        write_report({"schema": 1}, tmp_path)
    with pytest.raises(ValueError, match="has experiments 9z; this version knows 1a, 1b"):
        write_report(MadeUp().results([]) | {"experiments": {"9z": {}}}, tmp_path)


# Sections to come


def test_a_further_section_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)

    def arms(run: Mapping[str, Any], groups: Groups) -> list[Section]:
        if "arms" not in run:
            return []
        svg = figures.image_rows("Of <each> arm", [("first", [Picture(pixels, "0.1")])])
        section = Section("An arm & another.", figures=[("arms", "", svg)], rows={"arms": run["arms"]})
        return [section, Section("More.", heading="By epoch", rows={"arms": [{"arm": "last"}], "none": []})]

    entries = (*contents.CONTENTS, Entry("arms", "Arms of <any kind>", arms))
    monkeypatch.setattr(contents, "CONTENTS", entries)
    made = MadeUp(draws=2).results(["1a"])
    write_report(made, tmp_path / "without")
    assert "any kind" not in (tmp_path / "without" / "report.html").read_text()
    page = write_report(made | {"arms": [{"arm": "first"}]}, tmp_path / "with").read_text()
    assert '<h2 id="earms">Arms of &lt;any kind&gt;</h2>\n<p class="finding">An arm &amp; another.</p>' in page
    assert "<h3>By epoch</h3>" in page
    assert (tmp_path / "with" / "tables" / "arms.csv").read_text() == "arm\nfirst\nlast\n"
    assert not (tmp_path / "with" / "tables" / "none.csv").exists()
    assert 'All rows: <a href="tables/arms.csv">tables/arms.csv</a></p>' in page
    assert "none.csv" not in page
    assert (tmp_path / "with" / "figures" / "arms.svg").read_text() in page
    assert page.count('href="#earms"') == 2  # in the contents, and with its first sentence in what came out


REPORT_MODULES = [
    *("effects", "wording", "levels", "tables", "section", "page", "whole_model", "ranks", "layers", "controls"),
    *(
        "critical_sets",
        "stage_two",
        "fragility",
        "seeds",
        "opening",
        "contents",
        "writing",
    ),
]


@pytest.mark.parametrize(
    ("package", "order"),
    [
        ("report", REPORT_MODULES),
        ("figures", ["marks", "svg", "bars", "lines", "dots", "rows", "images"]),
        ("readers", ["pixels", "disk", "tables", "assembly", "layouts"]),
    ],
)
def test_imports_inside_a_package_run_one_way(package: str, order: list[str]) -> None:
    folder = Path(figures.__file__).parent.parent / package
    assert sorted(file.stem for file in folder.glob("*.py")) == sorted(["__init__", *order])
    for name in order:
        source = (folder / f"{name}.py").read_text()
        named = re.findall(rf"neuronsurgery\.study\.{package}(?:\.| import )(\w+)", source)
        assert [other for other in named if other not in order[: order.index(name)]] == []


def test_a_group_that_a_split_lacks_is_left_out_and_the_others_keep_their_accuracies(tmp_path: Path) -> None:
    made = MadeUp(draws=2).results(["1a"])
    made["counts"]["test"] = [250, 0, 250, 250]
    made["accuracy"]["test"] = [1.0, 0.4, 0.99]
    page = write_report(made, tmp_path).read_text()
    rows = list(csv.DictReader((tmp_path / "tables" / "groups.csv").read_text().splitlines()))
    test = {row["group"]: row["accuracy"] for row in rows if row["split"] == "test"}
    assert list(test.values()) == ["1.0", "", "0.4", "0.99"]
    assert "G1 landbird on water (minority) reaches" not in page
    assert "G2 waterbird on land (minority) reaches" in page


@pytest.mark.parametrize(("draws", "said"), [(1, "seen in 0 of 1 draw; "), (2, "seen in 1 of 2 draws; ")])
def test_single_draws_of_controls_are_told_by_their_change_and_not_by_the_ends_of_its_interval(
    draws: int, said: str
) -> None:
    changes = [{"group": "a", "change": -0.1, "low": -0.4, "high": 0.2}, {"group": "a", "change": -0.2, "low": -0.3}]
    changes[1]["high"] = -0.1
    record = {"criterion": "random", "fraction": 0.01, "neurons": 3}
    cells = cells_of([{**record, "changes": [change]} for change in changes[:draws]])
    twice = [*cells, *cells_of([{**record, "fraction": 0.02, "changes": [change]} for change in changes[:draws]])]
    furthest = {1: "10.0", 2: "20.0"}[draws]
    assert _single_words(twice, ["a"]) == f"{said}furthest change \N{MINUS SIGN}{furthest} points"  # a size counts once


# Faults


def files_of(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, dict[Path, bytes], dict[str, Any]]:
    """A folder with a report and a file of someone else, what is in it, and results that would change all of it."""
    write_report(MadeUp(draws=2).results(["1a", "1b"]), tmp_path)
    (tmp_path / "tables" / "own.csv").write_text("mine")
    return tmp_path, files_of(tmp_path), MadeUp(effect=-0.5, draws=2).results(["1a", "1b", "1f"])


@pytest.mark.parametrize("fails_at", ["figures/accuracy.svg", "tables/sensitive_layers.csv", "report.html"])
def test_report_that_cannot_be_put_in_place_leaves_the_old_one_whole(
    two_runs: tuple[Path, dict[Path, bytes], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    folder, before, results = two_runs
    replace = os.replace

    def failing(source: str | Path, target: str | Path) -> None:
        if Path(target) == folder / fails_at and Path(source).parts[-len(Path(fails_at).parts) - 1] == "new":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(
        OSError, match=r"the report in .* was not written \(Input/output error\), and what was there is as it was"
    ):
        write_report(results, folder)
    assert files_of(folder) == before
    assert not list(folder.glob(".report-*"))
    monkeypatch.undo()
    write_report(results, folder)
    assert (folder / "report.html").read_bytes() != before[Path("report.html")]
    assert (folder / "tables" / "own.csv").read_text() == "mine"


def test_report_without_hard_links_is_put_back_as_well(
    two_runs: tuple[Path, dict[Path, bytes], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_report_that_cannot_be_put_in_place_leaves_the_old_one_whole(two_runs, monkeypatch, "report.html")


@pytest.mark.xdist_group("forked")
def test_full_disk_leaves_the_old_report_whole(
    forked: Forked, two_runs: tuple[Path, dict[Path, bytes], dict[str, Any]]
) -> None:
    folder, before, results = two_runs
    (folder / "results.json").write_text(json.dumps(results))
    assert len(before[Path("report.html")]) > 50_000
    done = forked("study.little_study.report_on_a_full_disk", str(folder))
    assert done.returncode == 1
    assert f"the report in {folder} was not written (File too large)" in done.stderr
    assert f"give leave to write, then run `neuronsurgery report {folder}`" in done.stderr
    (folder / "results.json").unlink()
    assert files_of(folder) == before
    assert not list(folder.glob(".report-*"))


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"the report in .*taken/run was not written"):
        write_report(MadeUp(draws=2).results([]), tmp_path / "taken" / "run")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_leave_to_write_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="give leave to write"):
        write_report(MadeUp(draws=2).results([]), folder)
    assert not list(folder.iterdir())


# The form of the files


def test_page_is_well_formed_and_loads_nothing(whole: tuple[dict[str, Any], Path]) -> None:
    page = (whole[1] / "report.html").read_text()
    alone = {"meta", "br"}

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.links: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "link", "img", "iframe", "object", "use"}
            self.links += [value or "" for key, value in attributes if key in {"href", "src", "xlink:href"}]
            self.open += [tag] if tag not in alone else []

        def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith(("#e1", "tables/", "data:image/png;base64,")) for link in checker.links)
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in re.findall(r'id="(hatch-\w+)"', page)}
    for linked in (link for link in checker.links if link.startswith("tables/")):
        assert (whole[1] / linked).is_file()


def test_each_figure_is_well_formed_titled_and_in_the_page(whole: tuple[dict[str, Any], Path]) -> None:
    page = (whole[1] / "report.html").read_text()
    files = sorted((whole[1] / "figures").iterdir())
    assert {file.name[:2] for file in files} >= set(EXPERIMENTS)
    for file in files:
        root = ElementTree.parse(file).getroot()
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.text
        assert file.read_text() in page
        for number_text in re.findall(r'(?: d|x|y|width|height)="([^"]*)"', file.read_text()):
            assert "nan" not in number_text and "inf" not in number_text


def test_csv_rows_equal_the_records(whole: tuple[dict[str, Any], Path]) -> None:
    results, folder = whole
    for name in ("1a", "1c", "1d", "1e", "1f", "1g"):
        with (folder / "tables" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        records = [(r, change) for r in results["experiments"][name]["train"] for change in r["changes"]]
        assert len(rows) == len(records)
        for row, (record, change) in zip(rows, records, strict=True):
            expected = {"split": "train"} | {k: v for k, v in record.items() if k != "changes"} | change
            expected["names"] = ";".join(record["names"])
            assert row == {key: "" if value is None else str(value) for key, value in expected.items()}


def test_csv_of_ranks_counts_tests_and_training(whole: tuple[dict[str, Any], Path]) -> None:
    results, folder = whole

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / "tables" / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    first = results["experiments"]["1b"]["train"][0]
    assert rows("1b")[0]["percentiles"] == ";".join(map(str, first["percentiles"]))
    assert len(rows("1b")) == len(results["experiments"]["1b"]["train"])
    assert [float(row["p"]) for row in rows("control_p")] == [test["p"] for test in results["control_p"]["train"]]
    assert [row["sensitive"] for row in rows("sensitive_layers")][:1] == ["0;6;6;0"]
    assert [int(row["count"]) for row in rows("groups")][:4] == list(COUNTS)
    assert len(rows("training")) == 31


def test_same_results_give_the_same_bytes(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results, folder = whole
    write_report(json.loads(json.dumps(results)), tmp_path)
    written = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_results_are_not_changed(tmp_path: Path) -> None:
    made = MadeUp(draws=2).results()
    before = json.dumps(made)
    write_report(made, tmp_path)
    assert json.dumps(made) == before


def test_no_negative_zero(whole: tuple[dict[str, Any], Path]) -> None:
    assert not re.search(r"[-\N{MINUS SIGN}]0\.0+(?![0-9])", text_of((whole[1] / "report.html").read_text()))


# Figures and numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.04, "-0.040"),
        (-0.0, "0.0"),
        (0.0, "0.0"),
        (-24.96, "-25.0"),
        (1e-12, "0.0"),
        (0.0013, "0.0013"),
        (99.96, "100.0"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text.replace("-", "\N{MINUS SIGN}")
    assert signed(value) == ("+" if value > 1e-9 else "") + text.replace("-", "\N{MINUS SIGN}")


def test_bars_stand_where_their_values_are() -> None:
    series = [Series("top-1", (Mark(-10.0, -20.0, -5.0), None, Mark(20.0)), "#000000")]
    svg = figures.grouped_bars("Title", ["a", "b", "c"], series, axis="points", minority=[0])
    bars = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="#000000"/>', svg)
    heights = [float(height) for _, height in bars]
    assert len(bars) == 2
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert float(bars[0][0]) == pytest.approx(float(bars[1][0]) + heights[1], abs=0.2)  # both stand on the zero line
    assert svg.count("url(#hatch-") == 1
    assert "a, top-1: \N{MINUS SIGN}10.0 [\N{MINUS SIGN}20.0, \N{MINUS SIGN}5.0]" in svg


def test_line_plot_fills_seen_marks_thins_names_and_leaves_gaps() -> None:
    names = [f"layer{place}" for place in range(100)]
    marks = (Mark(0.0, solid=False), None, *(Mark(-float(place), -place - 1.0, -place + 1.0) for place in range(98)))
    svg = figures.depth_lines("Title", names, [Series("G0 a", marks, "#123456")], axis="points")
    assert ">layer0<" in svg and ">layer1<" not in svg
    assert "(one name in 2 shown)" in svg
    line = re.search(r'<path d="([^"]*)" stroke="#123456" stroke-width="1.4" fill="none"', svg)
    assert line is not None and line[1].count("M") == 2
    assert svg.count('fill="#FFFFFF" stroke="#123456"') == 1


def test_crowded_line_plot_has_a_panel_per_line() -> None:
    lines = [Series(f"G{place} a", (Mark(1.0),) * 101, "#123456") for place in range(4)]
    few = figures.depth_lines(
        "Title", ["x"] * 20, [Series(s.name, s.marks[:20], s.colour) for s in lines], axis="points"
    )
    many = figures.depth_lines("Title", ["x"] * 101, lines, axis="points")
    assert (few.count(">0</text>"), many.count(">0</text>")) == (1, 4)


def test_histogram_pair_marks_the_last_two_bins() -> None:
    svg = figures.histogram_pair("Title", ("upper", [0] * 18 + [2, 3]), ("lower", [1] + [0] * 19))
    assert "upper; 5 of 5 above 90" in svg and "lower; 0 of 1 above 90" in svg
    assert svg.count(f'fill="{figures.HIGHLIGHT}"') == 2


def test_figures_of_nothing_but_zeros_are_drawn() -> None:
    zeros = [Series("G0 a", (Mark(0.0, 0.0, 0.0),), "#000000", "0")]
    for svg in (
        figures.grouped_bars("Title", ["a"], zeros, axis="points"),
        figures.dot_ranges("Title", ["a"], zeros, axis="points"),
        figures.depth_lines("Title", ["a"], zeros, axis="points"),
        figures.trajectories("Title", ["a"], zeros, axis="points"),
        figures.strips("Title", ["a"], [[0.0]], axis="points"),
        figures.sensitive_bars("Title", ["5 epochs back"], zeros, layers=9),
        figures.histogram_pair("Title", ("upper", [0] * 20), ("lower", [0] * 20)),
        figures.dot_rows("Title", ["a"], zeros, axis="points"),
    ):
        ElementTree.fromstring(svg)


def test_names_are_escaped_in_figures() -> None:
    nasty = '<b>&"quoted"'
    series = [Series(nasty, (Mark(1.0),), "#000000")] * 2
    for draw in (
        figures.grouped_bars,
        figures.dot_ranges,
        figures.dot_rows,
        figures.depth_lines,
        figures.trajectories,
    ):
        root = ElementTree.fromstring(draw(nasty, [nasty], series, axis=nasty))
        assert nasty in [element.text for element in root.iter()]


# Lines over epochs, dots of examples, pictures


@pytest.mark.parametrize("limits", [(0.0, 100.0), (49.0, 149.0), (-49.0, 51.0)], ids=["middle", "bottom", "top"])
def test_lines_are_named_at_their_ends_and_kept_apart(limits: tuple[float, float]) -> None:
    series = [Series(f"arm {place}", (Mark(50.0), Mark(50.0 + place / 100)), "#123456") for place in range(12)]
    svg = figures.trajectories("Title", ["0", "1"], series, axis="accuracy, %", limits=limits)
    ends = {text: float(y) for y, text in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>(arm \d+)<', svg)}
    heights = [ends[f"arm {place}"] for place in reversed(range(12))]
    assert all(after - before >= 17 - 0.11 for before, after in itertools.pairwise(heights))
    grid = [float(y) for y in re.findall(r'<path d="M68 ([\d.]+)L', svg)]
    assert min(grid) <= heights[0] - 5 and heights[-1] - 5 <= max(grid) + 0.11
    assert svg.count('stroke-dasharray="7 4"') == 4  # from the ninth line on, colours come again


def test_lines_end_and_stop_where_their_marks_do() -> None:
    marks = (Mark(1.0, 0.5, 1.5), Mark(2.0, 1.5, 2.5), None, Mark(3.0, 2.5, 3.5), Mark(4.0, 3.0, 5.0), None)
    series = [Series("arm", marks, "#123456", "", True), Series("never run", (None,) * 6, "#654321")]
    svg = figures.trajectories("Title", list("abcdef"), series, axis="points")
    line = re.search(r'<path d="([^"]*)" stroke="#123456" stroke-width="3.2"', svg)
    band = re.search(r'<path d="([^"]*)" fill="#123456" fill-opacity', svg)
    assert line is not None and line[1].count("M") == 2 and line[1].count("L") == 2
    assert band is not None and band[1].count("M") == 2 and band[1].count("z") == 2
    assert "arm (minority)" in svg and "never run" not in svg
    high = figures.trajectories("Title", ["a"], [Series("arm", (Mark(90.0, 85.0, 95.0),), "#123456")], axis="%")
    assert ">84<" in high and ">0<" not in high  # a scale of levels need not begin at 0


def test_no_marks_no_values_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="trajectories: 'Title' has no marks: leave the figure out"):
        figures.trajectories("Title", ["0"], [Series("a", (None,), "#123456")], axis="points")
    with pytest.raises(ValueError, match="strips: 'Title' has no values: leave the figure out"):
        figures.strips("Title", ["a"], [[]], axis="points")
    with pytest.raises(ValueError, match="strips: 'Title' has values that are not finite in b: leave those out"):
        figures.strips("Title", ["a", "b"], [[1.0], [float("nan")]], axis="points")
    with pytest.raises(ValueError, match="image_rows: 'Title' has no images: leave the figure out"):
        figures.image_rows("Title", [("a", [])])


def dots_of(svg: str) -> list[list[tuple[float, float]]]:
    """Where the dots of each strip are."""
    paths = re.findall(r'<path d="([^"]*h0)" [^>]*stroke-linecap="round"', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path)] for path in paths]


@given(st.lists(st.lists(st.floats(-5, 5), max_size=60), min_size=1, max_size=5).filter(any))
def test_every_value_is_a_dot_in_its_strip_at_its_height(values: list[list[float]]) -> None:
    svg = figures.strips("Title", [f"g{place}" for place in range(len(values))], values, axis="points", limits=(-5, 5))
    strips = dots_of(svg)
    full = [some for some in values if some]
    assert [len(strip) for strip in strips] == [len(some) for some in full]
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    slot = (width - 68 - 14) / len(values)
    places = [place for place, some in enumerate(values) if some]
    for place, strip, some in zip(places, strips, full, strict=True):
        middle = 68 + slot * (place + 0.5)
        assert all(abs(x - middle) <= slot / 2 for x, _ in strip)
        highest, lowest = min(y for _, y in strip), max(y for _, y in strip)
        assert lowest - highest == pytest.approx((max(some) - min(some)) / 12 * 300, abs=0.11)


def test_strips_show_median_threshold_and_minority() -> None:
    values = [[1.0, 2.0, 9.0], [3.0]]
    svg = figures.strips("Title", ["a", "b"], values, axis="points", minority=[1], thresholds=[5.0, None])
    assert "a: median 2.0" in svg and "b: median 3.0" in svg
    assert svg.count("stroke-dasharray") == 1
    assert ">a, 3<" in svg and ">b, 1<" in svg and ">(minority)<" in svg
    assert svg.count(f'fill="{figures.marks.BAND}"') == 1


def test_dots_of_one_height_lie_side_by_side() -> None:
    (few,) = dots_of(figures.strips("Title", ["a"], [[1.0] * 5], axis="points"))
    assert sorted(x - few[0][0] for x, _ in few) == [-8.0, -4.0, 0.0, 4.0, 8.0]
    (many,) = dots_of(figures.strips("Title", ["a"], [[1.0] * 1000], axis="points"))
    assert max(x for x, _ in many) - min(x for x, _ in many) <= 0.85 * (520 - 68 - 14)


def test_rows_have_a_marker_for_each_series_where_its_value_is() -> None:
    series = [
        Series("first", (Mark(10.0, 0.0, 20.0), None, Mark(90.0, 80.0, 130.0, solid=False)), "#123456"),
        Series("second", (Mark(50.0), Mark(50.0), Mark(50.0)), "#654321"),
    ]
    each = [[[5.0, 15.0], [], []], [[], [], []]]
    rows = ["a", "b", "c"]
    svg = figures.dot_rows(
        "Title", rows, series, axis="accuracy, %", headings={1: "More"}, each=each, limits=(0.0, 100.0)
    )
    circles = [(float(x) + 4.2, float(y)) for x, y in re.findall(r'd="M([\d.]+) ([\d.]+)a4\.2', svg)]
    grid = sorted(
        {float(x) for x in re.findall(r'<path d="M([\d.]+) [\d.]+L\1 [\d.]+" stroke="#(?:DDDDDD|1A1A1A)"', svg)}
    )
    scale = (grid[-1] - grid[0]) / 100
    assert [x for x, _ in circles] == pytest.approx([grid[0] + 10 * scale, grid[0] + 90 * scale], abs=0.11)
    lines = re.findall(r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) \2" stroke="#123456"', svg)
    ends = [(float(left), float(right)) for left, _, right in lines]
    assert ends[0] == pytest.approx((grid[0], grid[0] + 20 * scale), abs=0.11)
    assert ends[1] == pytest.approx((grid[0] + 80 * scale, grid[-1]), abs=0.11)  # cut at the edge
    heights = {text: float(y) for y, text in re.findall(r'y="([\d.]+)" font-size="14"[^>]*>(a|b|c|More)<', svg)}
    assert heights["a"] < heights["More"] < heights["b"] < heights["c"]
    assert svg.count('stroke="#123456" stroke-width="1.6" fill="none"') == 4  # two intervals, two single values
    assert "c, first: 90.0 [80.0, 130.0]" in svg
    with pytest.raises(ValueError, match="dot_rows: 'Title' has no marks: leave the figure out"):
        figures.dot_rows("Title", ["a"], [Series("first", (None,), "#123456")], axis="points")


def test_a_picture_may_be_a_png_file_and_framed() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    plain = figures.image_rows("Title", [("row", [Picture(pixels, "a")])])
    assert figures.image_rows("Title", [("row", [Picture(png(pixels), "a")])]) == plain
    framed = figures.image_rows("Title", [("row", [Picture(pixels, "a", framed=True)])])
    assert framed.count(f'stroke="{figures.HIGHLIGHT}"') == plain.count(f'stroke="{figures.HIGHLIGHT}"') + 1
    with pytest.raises(ValueError, match="image_rows: the image 'a' is bytes, but no PNG file"):
        figures.image_rows("Title", [("row", [Picture(b"GIF89a", "a")])])


def decoded(file: bytes) -> np.ndarray:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(file))
    assert image.mode == "RGB"
    return np.asarray(image)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_png_is_read_back_as_it_was(height: int, width: int, scale: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    assert np.array_equal(decoded(png(large)), large)


def test_png_of_something_else_is_refused() -> None:
    for wrong in (np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"png: expected uint8 of shape \(height, width, 3\), found"):
            png(wrong)


def test_pixels_are_rounded_and_normalised_images_refused() -> None:
    images = torch.tensor([0.0, 1 / 255, 0.5, 1.0]).repeat(3, 1).reshape(1, 3, 2, 2)
    assert pixels_of(images)[0, :, :, 0].tolist() == [[0, 1], [128, 255]]
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], found -2 to 0: undo the normalisation first"):
        pixels_of(torch.tensor([-2.0, 0.0, 0.0]).reshape(3, 1, 1))
    with pytest.raises(ValueError, match=r"expected images \(..., 3, height, width\), found \(1, 28, 28\)"):
        pixels_of(torch.zeros(1, 28, 28))


def birds(*counts: int) -> data.Split:
    """Images of the synthetic data, as many of each group."""
    none = dict.fromkeys(data.SYNTHETIC_COUNTS, (0,) * 4)
    return data.synthetic(0, counts={**none, "few": counts}).splits["few"]  # type: ignore[dict-item]


def test_contact_sheet_shows_the_first_images_of_each_group() -> None:
    split = birds(3, 1, 0, 2)
    sheet = decoded(contact_sheet(split, per_group=2, scale=2, gap=5))
    assert sheet.shape == (4 * (64 + 10), 2 * 69 + 5, 3)
    expected = np.full(sheet.shape, 255, np.uint8)
    pixels = (split.images * 255).round().byte().numpy()
    for group, place, image in ((0, 0, 0), (0, 1, 1), (1, 0, 3), (3, 0, 4), (3, 1, 5)):
        top, left = 5 + group * 74, 5 + place * 69
        for row in range(64):
            for column in range(64):
                expected[top + row, left + column] = pixels[image, :, row // 2, column // 2]
    assert np.array_equal(sheet, expected)


def test_contact_sheet_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="per_group must be at least 1, found 0; gap must be at least 0, found -1"):
        contact_sheet(birds(1, 1, 1, 1), per_group=0, gap=-1)
    with pytest.raises(ValueError, match="the split has no images: pass one that has"):
        contact_sheet(birds(0, 0, 0, 0))


@pytest.mark.parametrize(("name", "per_group", "scale"), [("synthetic", 9, 3), ("digits", 10, 4)])
def test_pictures_of_the_documentation_are_those_of_the_data(name: str, per_group: int, scale: int) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    split = {"synthetic": data.synthetic, "digits": data.digits}[name](0).train
    file = (Path(__file__).parents[2] / "docs" / "images" / f"{name}.png").read_bytes()
    assert np.array_equal(decoded(file), decoded(contact_sheet(split, per_group=per_group, scale=scale)))
    assert len(file) < 150_000


def test_images_of_a_figure_are_held_by_it() -> None:
    pixels = pixels_of(birds(1, 1, 1, 1).images)
    rows = [("first & second", [Picture(p, f"{place}.5", f"image {place}") for place, p in enumerate(pixels[:2])])]
    svg = figures.image_rows("Title", [*rows, ("third", [Picture(pixels[2])])])
    ElementTree.fromstring(svg)
    held = re.findall(r'href="data:image/png;base64,([^"]*)"', svg)
    assert len(held) == 3
    for file, image in zip(held, pixels, strict=False):
        assert np.array_equal(decoded(base64.b64decode(file)), image)
    assert "first &amp; second" in svg and ">1.5<" in svg and "<title>image 1</title>" in svg
