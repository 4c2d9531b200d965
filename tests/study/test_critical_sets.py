"""Experiment 1h: its records, that a kill changes nothing, and what its claims say of made-up records."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import neuronsurgery as ns
from neuronsurgery.study import critical_sets as module
from neuronsurgery.study import data, models
from neuronsurgery.study.claims import CLAIMS, QUESTIONS_LEVEL, judge
from neuronsurgery.study.cli import main
from neuronsurgery.study.critical_sets import Case, Protocol, critical_sets
from neuronsurgery.study.program import QUICK
from neuronsurgery.study.queries import mean_interval
from neuronsurgery.study.run import Parts
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.summary import summary
from neuronsurgery.study.table import Run, read_run
from neuronsurgery.study.training import Recipe
from study.little_study import tiny_resnet
from study.made_up import report_of, seeds_of
from study.test_readers import make_birds, write_image
from study.test_reliability import KilledError, files_in, killed_after

pytestmark = pytest.mark.xdist_group("critical sets")  # its fixtures are made once, by one process

COUNTS = {"train": (60, 24, 8, 44), "held-out": (24, 8, 6, 12), "validation": (4,) * 4, "test": (20,) * 4}
GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
RARE, RARER = GROUPS[1:3]
COMMAND = ("study", "--quick", "--stages", "1", "--experiments", "1h")


@pytest.fixture(scope="module", autouse=True)
def short_search() -> Iterator[None]:
    """Few candidates and one set of each size: a second instead of ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ns, "find_critical", functools.partial(ns.find_critical, pool=6, width=1))
        yield


@pytest.fixture(scope="module")
def dataset() -> data.DataSet:
    return data.synthetic(0, counts=COUNTS)


@pytest.fixture(scope="module")
def trained(dataset: data.DataSet, erm: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return erm(dataset, tmp_path_factory.mktemp("erm"), Recipe(epochs=3, batch_size=16))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def protocol(dataset: data.DataSet, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    loaders = (dataset.loaders("train"), dataset.loaders("test"))
    specs = tmp_path_factory.mktemp("sets") / "specs"
    return Protocol(trained.model, trained.where, *loaders, (RARE, RARER), 5, Parts(), specs)


@pytest.fixture(scope="module")
def records(protocol: Protocol) -> list[dict[str, Any]]:
    """Of three epochs of a tiny network; for reading only."""
    return critical_sets(protocol)


@pytest.fixture
def little_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on few images and a tiny network."""
    made: Callable[..., data.DataSet] = data.synthetic
    few = {"synthetic": lambda seed, counts=None: made(seed, counts=COUNTS)}
    monkeypatch.setattr("neuronsurgery.study.program.EMBEDDED", few)
    monkeypatch.setattr(models, "small_resnet", tiny_resnet)


# Records


def test_each_group_and_its_controls_have_a_record_per_size_and_a_group_of_few_images_says_so(
    records: list[dict[str, Any]],
) -> None:
    own = [(r["chosen_for"], r["control"], r["k"]) for r in records]
    cases = [(RARE, None), (RARE, GROUPS[0]), (RARE, GROUPS[3])]
    impossible = {(r["chosen_for"], r["control"]) for r in records if "impossible" in r}
    assert (RARE, None) not in impossible
    expected = [(*case, k) for case in cases for k in ((None,) if case in impossible else (1, 2, 3))]
    assert own == [*expected, (RARER, None, None)]
    assert records[-1]["impossible"] == "too few: 4 and 4 images in the halves, 10 are asked for"
    assert [records[0]["searched"], records[0]["judged"]] == [12, 12]
    assert json.loads(json.dumps(records)) == records


def test_the_numbers_of_a_record_are_those_of_its_file_on_the_other_half(
    protocol: Protocol, records: list[dict[str, Any]], dataset: data.DataSet
) -> None:
    _, rest = ns.halves(dataset.loaders("train"))
    files = sorted(protocol.specs.glob("*"))
    found = [(number, record) for number, record in enumerate(records) if record.get("neurons")]
    assert [file.name for file in files] == [f"1h-{number:03d}.safetensors" for number, _ in found]
    assert any(record["control"] is None for _, record in found)
    for number, record in found:
        if record["control"] is None:
            edit = ns.load_file(protocol.specs / f"1h-{number:03d}.safetensors")
            assert isinstance(edit, ns.Edit)
            cut = ns.sweep(protocol.model, {"cut": edit}, rest).change("cut")
            assert record["own"] == cut[RARE] == next(c["change"] for c in record["changes"] if c["group"] == RARE)
            assert record["worst_other"] == min(change for group, change in cut.items() if group != RARE)
            assert record["net"] == pytest.approx(record["worst_other"] - record["own"])
            assert record["neurons"] == len(record["names"]) == len(record["kinds"]) <= record["k"]
            assert record["draws"] == 5 and record["sentence"]
            seen = ns.sweep(protocol.model, {"cut": edit}, dataset.loaders("test")).change("cut")
            assert record["test_own"] == seen[RARE]
        else:
            assert record["test_own"] is record["test_right_lost"] is None
            assert record["examples"] == f"{record['control']} like {RARE}" and 0 <= record["gap"] <= 0.5


def test_what_is_kept_of_a_search_is_judged_as_the_search(protocol: Protocol, records: list[dict[str, Any]]) -> None:
    del records
    case = Case(protocol, RARE)
    searched, remade = case._found(), case.critical
    for k in (1, 2, 3):
        a, b = searched.within(k), remade.within(k)
        assert (a.edit, a.neurons, a.sentence, a.searched) == (b.edit, b.neurons, b.sentence, b.searched)
        with pytest.warns(UserWarning, match="fewer than 10 examples"):
            verdicts = [ns.judge(one, protocol.model, case.halves[1], RARE, draws=5) for one in (a, b)]
        assert str(verdicts[0]) == str(verdicts[1]) and verdicts[0].controls == verdicts[1].controls


def test_without_test_images_or_matches_the_rest_is_there(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_near(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no example is near enough")

    monkeypatch.setattr(ns, "matched", none_near)
    changed = {"test": {}, "kept": Parts(), "draws": 2, "minority": (RARE,)}  # the other one is a control then
    found = critical_sets(Protocol(**{**vars_of(protocol), **changed}))
    assert [record["k"] for record in found] == [1, 2, 3, None, None, None]
    assert [record["impossible"] for record in found[3:]] == ["no example is near enough"] * 3
    assert {record["test_own"] for record in found[:3]} == {None}


def vars_of(protocol: Protocol) -> dict[str, Any]:
    return {name: getattr(protocol, name) for name in Protocol.__dataclass_fields__}


# A run


@pytest.mark.usefixtures("little_study")
def test_a_run_killed_after_every_part_comes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*COMMAND, "--out", str(whole)]) == 0
    shutil.copytree(whole, broken)
    for file in (broken / "experiments" / "1h-train.json", broken / "results.json", *(broken / "specs").glob("*")):
        file.unlink()
    done: list[str] = []
    kills = 0
    while not (broken / "results.json").exists():
        try:
            with killed_after(1, done):
                assert main([*COMMAND, "--out", str(broken)]) == 0
        except KilledError:
            kills += 1
    assert kills == len(done) == len(set(done)) >= 5
    assert (broken / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert files_in(broken) == files_in(whole)
    for file in (whole / "specs").glob("*"):
        assert (broken / "specs" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.usefixtures("little_study")
def test_two_quick_seeds_have_the_claims_and_the_table_of_1h(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--split", "test", "--seed", "20", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Does a set of three neurons carry it and nobody else?" in printed
    together = read_run(tmp_path)
    claims = [(record["group"], record["verdict"]) for record in judge(together) if record["experiment"] == "1h"]
    assert len(claims) == 6 and all(verdict == "too few" for group, verdict in claims if group == RARER)
    nets = together.rows(experiment="1h", measure="net", selector="critical")
    assert set(nets.select("group", "k").iter_rows()) == {(RARE, k) for k in (1, 2, 3)}
    few = together.rows(experiment="1h", measure="impossible", selector="critical")
    assert set(few["group"]) == {RARER} and len(few) == 2
    one = read_run(tmp_path / "seed-20")
    assert set(one.rows(experiment="1h")["split"]) == {"train"}  # whatever the split
    assert one.rows(experiment="1h", measure="net")["n"][0] in (0, QUICK["control_draws"])
    page = (tmp_path / "report.html").read_text()
    assert "Critical sets, searched and judged" in page and "(a) three neurons found on half A" in page
    assert "no result yet" not in page + (tmp_path / "seed-20" / "report.html").read_text()


@pytest.mark.usefixtures("little_study")
def test_images_on_disk_are_searched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEWEST", "FEWEST_MATCHED"):
        monkeypatch.setattr(module, name, 1)
    table = make_birds(tmp_path / "birds")
    rows = []
    for index, y in enumerate([1] * 2 + [0] * 14):  # two of the rare group, beside the one that there is
        write_image(tmp_path / "birds" / f"more-{index}.jpg", 3 * index, (50, 40))
        rows.append(f"{100 + index},more-{index}.jpg,{y},0,0,/l/lake/{100 + index}.jpg\n")
    table.write_text(table.read_text() + "".join(rows))
    small = ("--data", "waterbirds", "--root", str(tmp_path / "birds"), "--arch", "small_resnet", "--size", "16")
    assert main([*COMMAND, "--epochs", "1", *small, "--out", str(tmp_path / "run")]) == 0
    assert len(read_run(tmp_path / "run").rows(experiment="1h", measure="net"))


# Claims


def made_up(
    net: float, worst: float = 0.0, controls: tuple[float, ...] | None = (0.0, 0.0), lost: tuple[Any, Any] = (0.5, 0.5)
) -> dict[str, Any]:
    """A run's results with this net (a share) at three neurons, and nothing at fewer; a net of 0 is of no set."""

    def record(net: float, k: int, control: str | None = None) -> dict[str, Any]:
        said = {
            "chosen_for": RARE,
            "control": control,
            "k": k,
            "net": net,
            "neurons": 3 * bool(net),
            "own": worst - net,
        }
        more = {"worst_other": worst, "right_lost": lost[0], "test_right_lost": lost[1], "p_value": 0.01}
        shown = {"examples": control or RARE, "net_low": net, "net_high": net, "sentence": "said", "changes": []}
        counts = {"searched": 12, "judged": 12, "draws": 100, "distinct": 100}
        return {**said, **more, **shown, **counts}

    own = [record(net if k == 3 else 0.0, k) for k in (1, 2, 3)]
    pairs = zip(GROUPS[::3], controls or (), strict=False)
    matched = [record(value, k, name) for name, value in pairs for k in (1, 2, 3)]
    if controls is None:
        matched = [
            {"chosen_for": RARE, "control": name, "k": None, "examples": None, "impossible": "not alike"}
            for name in GROUPS[::3]
        ]
    few = {"chosen_for": RARER, "control": None, "k": None, "examples": RARER, "impossible": "too few: 4 and 4"}
    return {
        "version": "0",
        "settings": {"splits": ["train"], "data": "synthetic", "seed": 0, "stages": ["1"], "experiments": ["1h"]},
        "groups": list(GROUPS),
        "minority": [1, 2],
        "counts": {"train": [60, 24, 8, 44]},
        "accuracy": {},
        "experiments": {"1h": {"train": [*own, *matched, few]}},
    }


def together_of(runs: Sequence[dict[str, Any]]) -> Run:
    """One run as it is, or several as those of the seeds 0, 1 ..."""
    return Run.of(runs[0]) if len(runs) == 1 else seeds_of(list(runs))


def verdicts(*runs: dict[str, Any], group: str = RARE) -> list[str]:
    """Of (a), (b) and (c)."""
    found = [record for record in judge(together_of(runs)) if record["group"] == group]
    assert [record["text"][:3] for record in found] == ["(a)", "(b)", "(c)"]
    return [record["verdict"] for record in found]


def seeds(*nets: float, **same: Any) -> list[dict[str, Any]]:
    return [made_up(net, **same) for net in nets]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (seeds(0.50, 0.51, 0.52), "holds"),
        (seeds(0.50, 0.51, 0.52, worst=-0.02), "holds"),
        (seeds(0.50, 0.51, 0.52, worst=-0.021), "undecided"),  # others lose too much
        (seeds(0.30, 0.30, 0.30), "holds"),
        (seeds(0.29, 0.29, 0.29), "does not hold"),
        (seeds(0.20, 0.21, 0.22), "does not hold"),
        (seeds(0.0, 0.0, 0.0), "does not hold"),  # no set was found
        (seeds(0.9, 0.0, 0.5), "undecided"),
        (seeds(0.2, 0.0, 0.5), "undecided"),  # a mean below 30, an interval that reaches above it
        (seeds(0.5), "one seed only"),
    ],
)
def test_a_small_selective_set_exists(runs: list[dict[str, Any]], expected: str) -> None:
    assert verdicts(*runs)[0] == expected


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (seeds(0.50, 0.51, 0.52, controls=(0.2, 0.4)), "holds"),
        (seeds(0.50, 0.51, 0.52, controls=(0.9, 0.7)), "does not hold"),
        (seeds(0.5, 0.5, 0.5, controls=(0.5, 0.5)), "does not hold"),
        (seeds(0.50, 0.10, 0.52, controls=(0.2, 0.4)), "undecided"),
        (seeds(0.0, 0.0, 0.0), "does not hold"),
        ([*seeds(0.5, 0.5), made_up(0.5, controls=None)], "no control"),
        (seeds(0.5), "one seed only"),
    ],
)
def test_beyond_margin(runs: list[dict[str, Any]], expected: str) -> None:
    assert verdicts(*runs)[1] == expected


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ([(0.6, 0.2), (0.61, 0.2), (0.62, 0.2)], "holds"),
        ([(0.6, 0.58), (0.6, 0.6), (0.6, 0.59)], "does not hold"),  # surely below 15 points
        ([(0.6, 0.6), (0.6, 0.2), (0.6, 0.5)], "undecided"),
        ([(0.6, 0.5), (0.6, 0.5), (0.6, 0.5)], "holds"),  # above 0 comes before below 15
        ([(0.6, 0.6), (0.6, None), (0.6, 0.5)], "none right"),
        ([(0.6, 0.2)], "one seed only"),
    ],
)
def test_it_is_memory(lost: list[tuple[float, Any]], expected: str) -> None:
    assert verdicts(*(made_up(0.5, lost=one) for one in lost))[2] == expected


def test_where_no_set_is_found_net_and_difference_are_nothing_and_the_controls_still_count() -> None:
    found = {
        r["text"][:3]: r
        for r in judge(together_of(seeds(0.0, 0.0, controls=(0.1, 0.3), lost=(None, None))))
        if r["mean"] is not None
    }
    assert found["(a)"]["values"] == found["(c)"]["values"] == [0.0, 0.0]
    assert found["(b)"]["values"] == pytest.approx([-20.0, -20.0])


def test_limits_are_students_at_a_sixth_of_five_percent() -> None:
    record = next(one for one in judge(together_of(seeds(0.4, 0.5, 0.6))) if one["group"] == RARE)
    assert record["level"] == QUESTIONS_LEVEL == 1 - 0.05 / 6
    assert (record["low"], record["high"]) == mean_interval(record["values"], 1 - 0.05 / 6)
    half = 10 / 3**0.5 * 10.886  # the quantile .99583 of two degrees of freedom
    assert record["low"] == pytest.approx(50 - half, abs=0.05)


def test_a_group_of_few_images_has_no_numbers_and_too_few_as_its_verdict() -> None:
    runs = seeds(0.4, 0.5)
    assert verdicts(*runs, group=RARER) == ["too few"] * 3
    together = together_of(runs)
    assert re.search(r"nobody else\? +too few +- +-\n", summary(together))
    said = report_of(together)
    assert "too few" in said and said.count("(a) three neurons found") == 2
    assert "too few: 4 and 4" in Run.of(runs[0]).rows(measure="impossible")["note"].item()


def test_every_question_is_about_three_neurons() -> None:
    texts = [claim["text"] for claim in CLAIMS if claim["experiment"] == "1h"]
    assert all(re.match(r"\([abc]\) ", text) for text in texts) and len(texts) == 3
