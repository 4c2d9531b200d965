"""The page of a study: what stands on it, that it is made from the table alone, and what becomes of it in a browser."""

from __future__ import annotations

import dataclasses
import errno
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from neuronsurgery.study import pages, readers
from neuronsurgery.study.claims import judge
from neuronsurgery.study.pages.charts import COLOURS, SHAPES
from neuronsurgery.study.report import write_report
from neuronsurgery.study.report.figures import CHARTS, QUERIES, figures_of
from neuronsurgery.study.report.writing import page_of
from neuronsurgery.study.run import write_results
from neuronsurgery.study.table import Run, read_run
from study.forking import Forked
from study.made_up import MadeUp, fragility, html_of, one_run, report_of, seeds_of, stage_two, text_of

EXPERIMENTS = ("1a", "1b", "1c", "1d", "1e", "1f", "1g")


def every_stage(seed: int = 0, effect: float = -0.25, paper: float = 0.6) -> dict[str, Any]:
    made = MadeUp(effect, draws=3).results() | {"stage_two": stage_two(paper), "fragility": fragility()}
    made["settings"] |= {"seed": seed}
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A whole made-up run, and the folder of its report."""
    run, folder = Run.of(every_stage()), tmp_path_factory.mktemp("report")
    assert write_report(run, folder) == folder / "report.html"
    return run, folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Three seeds of the same, and the folder of their report."""
    run = seeds_of([every_stage(seed, -0.25 - seed / 50, 0.6 + seed / 50) for seed in range(3)])
    folder = tmp_path_factory.mktemp("seeds")
    write_report(run, folder)
    return run, folder


# The first screen


class Answer(NamedTuple):
    verdict: str
    link: str
    question: str
    number: str
    interval: str
    told: str


ANSWER = re.compile(
    r'<li><span class="verdict \w+">(.*?)</span>\s*<span class="question"><a href="#(.*?)">(.*?)</a></span>\s*'
    r'<span class="said">(?:<b class="number">(.*?)</b>)?(?: <span class="number">(.*?)</span>)?(?:: )?(.*?)</span></li'
)


def answers(run: Run) -> list[Answer]:
    """What the first screen says."""
    page = html_of(run)
    found = [Answer(*map(html.unescape, one)) for one in ANSWER.findall(page)]
    assert len(found) == page.count('<span class="question">')
    return found


def test_one_seed_has_numbers_and_no_verdicts(whole: tuple[Run, Path]) -> None:
    found = answers(whole[0])
    assert {answer.verdict for answer in found} == {"one seed only"}
    assert [answer.link for answer in found] == ["accuracy", "cuts", "detection", "mitigation"]
    assert found[0].question == "Is the rare group remembered rather than learned?"
    # Its accuracy is 90 % in training and 40 % in test, and 100 % in the majority groups.
    assert found[0].number == "+50.0 points"
    assert found[2].number == "99.0 %" and found[3].number == "+40.0 points"
    low, high = map(float, re.findall(r"[+-][0-9.]+", found[0].interval))
    assert low < 50 < high


def test_several_seeds_have_verdicts(several: tuple[Run, Path]) -> None:
    by_link = {answer.link: answer for answer in answers(several[0])}
    assert by_link["accuracy"].verdict == "holds"
    assert by_link["cuts"].verdict == "holds"  # the made-up cuts change the minority groups alone
    assert by_link["cuts"].told.endswith("; mean of 3 seeds")


def test_no_answer_is_longer_than_thirty_words(whole: tuple[Run, Path], several: tuple[Run, Path]) -> None:
    for run, _ in (whole, several):
        for answer in answers(run):
            words = f"{answer.number} {answer.interval} {answer.told}".split()
            assert len(words) <= 30, words


def test_a_null_result_is_printed_as_one() -> None:
    run = seeds_of([every_stage(seed, effect=0.0) for seed in range(3)])
    by_link = {answer.link: answer for answer in answers(run)}
    assert (by_link["cuts"].verdict, by_link["cuts"].number) == ("does not hold", "+0.0 points")
    assert "does not hold Does the paper's cut hit it more than any other group?" in report_of(run)


def test_the_answers_are_about_the_rarest_group(whole: tuple[Run, Path]) -> None:
    page = (whole[1] / "report.html").read_text()
    assert "<b>waterbird on land</b>" in page  # 28 images; of landbirds on water there are 92
    assert whole[0].minority == ("waterbird on land", "landbird on water")


def test_every_claim_is_on_the_page_with_its_verdict(several: tuple[Run, Path]) -> None:
    run, folder = several
    page = (folder / "report.html").read_text().split('<h2 id="claims">')[1]
    records = judge(run)
    assert len(records) > 30
    rows = re.findall(r"<tr><td>.*?</tr>", page.split("</table>")[0], re.S)
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert (
            f"<td>{record['verdict']}</td>" in row and f"<td>{record['mean']:.1f}</td>".replace("-0.0", "-0.0") in row
        )


# What must be said before any number


def test_quick_runs_missing_parts_and_impossible_stages_are_warned_of() -> None:
    made = MadeUp().results(["1a", "1f"])
    made["settings"] |= {"quick": True, "stages": ["1", "2"], "experiments": list(EXPERIMENTS)}
    made["fragility"] = {"impossible": "no residual branches"}
    said = report_of(made)
    assert "A quick run" in said
    assert "This run has no result yet of: 1b, 1c, 1d, 1e, 1g, arms." in said
    assert "Fragility: no residual branches" in said


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"stages": ["1"], "experiments": ["1a"]}, ""),
        ({"stages": ["1"], "experiments": ["1a", "1g"]}, "1g"),
        ({"stages": ["1", "2"], "experiments": ["1a"]}, "arms"),
        ({"stages": ["2", "fragility"], "experiments": ["1a", "1b"]}, "arms, detection"),
    ],
)
def test_only_what_a_run_was_asked_for_is_missing(settings: dict[str, Any], missing: str) -> None:
    made = MadeUp(draws=2).results(["1a"])
    made["settings"] |= settings
    warned = re.findall(r"This run has no result yet of: (.*?)\.", report_of(made))
    assert warned == ([missing] if missing else [])


def test_two_seeds_are_warned_of(several: tuple[Run, Path]) -> None:
    assert "Two seeds make wide intervals" in report_of(seeds_of([every_stage(0), every_stage(1)]))
    assert "Two seeds" not in (several[1] / "report.html").read_text()


def test_what_was_impossible_and_what_labels_are_needed_is_said(whole: tuple[Run, Path]) -> None:
    page = (whole[1] / "report.html").read_text()
    said = text_of(page)
    assert "Could not be trained: CnC (no image <is> an anchor)." in said
    assert "worst group: group labels of validation images" in said
    assert "Impossible: AFR (it did not <converge>)." in said
    rows = figures_of(whole[0])["arms"].rows
    assert {row["labels"] for row in rows if row["selector"] == "Group DRO"} == {"class, group"}
    assert "no image &lt;is&gt; an anchor" in page and "<is>" not in page
    assert "No groups are inferred: nobody stands out" in page


def test_balanced_validation_images_are_named_where_they_stand_in() -> None:
    made = one_run(stage_two=stage_two() | {"class_labels_of": "validation"})
    said = report_of(made)
    assert "class labels: class labels of validation images" in said
    assert "balanced over groups, which is itself knowledge of the groups" in said
    made["counts"]["validation"] = [90, 5, 5, 90]
    assert "balanced" not in report_of(made)


def test_settings_counts_and_seconds_are_folded_away() -> None:
    made = MadeUp(draws=2).results([])
    made["settings"] |= {"splits": ["train", "test"]}
    made["expected_counts"] = {"train": [1749, 92, 56, 528]}
    made["intervals"] = {"level": 0.95, "method": "of A & B (1999)"}
    run = Run.of(made)
    said = report_of(dataclasses.replace(run, about={**run.about, "seconds": {"training": 30.1}}))
    assert "splits train, test" in said and "images in the paper, train 1749, 92, 56, 528" in said
    assert "intervals, method of A & B (1999)" in said and "seconds, training 30.1" in said


# Charts


def test_charts_are_the_same_from_a_table_that_was_read_back(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run = whole[0]
    write_results(tmp_path, run)
    back = figures_of(read_run(tmp_path))
    for name, figure in figures_of(run).items():
        assert figure.specification() == back[name].specification()


def test_same_results_give_the_same_bytes(whole: tuple[Run, Path], tmp_path: Path) -> None:
    write_report(whole[0], tmp_path)
    assert files_of(tmp_path) == files_of(whole[1])


def test_every_number_of_a_chart_is_in_the_table(whole: tuple[Run, Path]) -> None:
    run, figures = whole[0], figures_of(whole[0])
    numbers = {round(100 * value, 2) + 0.0 for value in run.table["value"].drop_nulls()}
    for name in ("accuracy", "layers", "rewinding", "arms", "mitigation", "detection"):
        assert {row["value"] for row in figures[name].rows} <= numbers, name


def test_groups_keep_their_colour_and_marker_and_labels(whole: tuple[Run, Path]) -> None:
    labels = [f"{name} (rare)" if name in whole[0].minority else name for name in whole[0].groups]
    for figure in figures_of(whole[0]).values():
        text = json.dumps(figure.specification())
        for channel, values in (("color", COLOURS), ("shape", SHAPES)):
            for found in re.findall(rf'"{channel}": (\{{"field": "group".*?"range": \[.*?\]\}})', text):
                assert json.dumps(labels)[1:-1] in found and json.dumps(list(values[:4]))[1:-1] in found, figure.name


def test_a_choice_takes_the_place_of_many_charts(whole: tuple[Run, Path]) -> None:
    figures = figures_of(whole[0])
    assert figures["cuts"].chosen == {"edit": "zero", "k": 3}
    assert figures["layers"].chosen == {"chosen": "gradient of waterbird on land", "k": 3}
    text = json.dumps(figures["cuts"].specification())
    assert '"name": "choice_k"' in text and "datum['k'] === choice_k" in text
    assert {row["k"] for row in figures["cuts"].shown} == {3}
    assert len({row["edit"] for row in figures["cuts"].rows}) == 9  # zeroed, and two random edits of four scales


def test_numbers_that_a_seed_lacks_are_in_no_chart() -> None:
    lacking = every_stage(1)
    lacking["stage_two"]["arms"] = [one for one in lacking["stage_two"]["arms"] if one["name"] != "Group DRO"]
    rows = figures_of(seeds_of([every_stage(0), lacking]))["arms"].rows
    names = {row["selector"] for row in rows}
    assert "Group DRO" not in names and "nothing pruned" in names


def test_seeds_are_compared_with_every_control(several: tuple[Run, Path]) -> None:
    figures = figures_of(several[0])
    controls = {row["control"]: row for row in figures["differences"].shown}
    assert set(controls) == {"ERM", "nothing pruned"}
    assert controls["nothing pruned"]["value"] == pytest.approx(32.0)  # 60, 62 and 64 minus 30
    assert {row["control"] for row in figures["retraining-differences"].rows} == {"ERM", "true groups"}
    assert "seed-2/report.html" in (several[1] / "report.html").read_text()


def test_no_negative_zero(whole: tuple[Run, Path]) -> None:
    assert not re.search(r"[^0-9.]-0(\.0+)?[^0-9.]", json.dumps([f.rows for f in figures_of(whole[0]).values()]))


def test_every_chart_is_drawn_and_stands_on_the_page_once(several: tuple[Run, Path]) -> None:
    assert list(CHARTS) == list(QUERIES)
    page = (several[1] / "report.html").read_text()
    assert re.findall(r'<h3 id="([a-z-]+)">', page) == [*figures_of(several[0]), "sheets"]
    template = (Path(pages.__file__).parent / "study.html").read_text()
    assert re.findall(r'call chart\("([a-z-]+)"', template) == list(CHARTS)


# Any run


@pytest.mark.parametrize("present", [[], *([name] for name in EXPERIMENTS), ["1b", "1e"]])
def test_any_subset_of_experiments(present: list[str]) -> None:
    named = set(figures_of(Run.of(MadeUp(draws=2).results(present))))
    wanted = {
        "1a": "cuts",
        "1b": "ranks",
        "1c": "cuts",
        "1d": "cuts",
        "1e": "layers",
        "1f": "rewinding",
        "1g": "shares",
    }
    assert named == {"accuracy", *(wanted[name] for name in present)}


def test_bare_run_without_the_optional_parts() -> None:
    made = MadeUp(draws=2).results(["1a", "1f", "1g"])
    for key in ("trajectory", "missing_distances", "expected_counts", "seconds", "accuracy", "environment", "network"):
        made.pop(key, None)
    assert "Critical neurons: synthetic, seed 0" in report_of(made)


@pytest.mark.parametrize(("groups", "layers"), [(2, 1), (12, 36)])
def test_any_number_of_groups_layers_and_splits(groups: int, layers: int) -> None:
    names = [f"class {place // 2} & <attribute {place % 2}>" for place in range(groups)]
    counts, minority = [500, 20] * (groups // 2), list(range(1, groups, 2))
    made = MadeUp(groups=names, counts=counts, minority=minority, layers=layers, splits=("train", "test"), draws=2)
    run = Run.of(made.results(["1a", "1b", "1e", "1f", "1g"]))
    page = page_of(run, figures_of(run))
    assert "<attribute" not in page
    assert "class 0 &amp; &lt;attribute 1&gt;" in page
    assert figures_of(run)["cuts"].chosen["split"] == "train"


def test_no_minority_groups() -> None:
    said = report_of(MadeUp(minority=(), draws=2).results(["1a", "1b", "1f"]))
    assert "No group is rare in training" in said


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    run = Run.of(MadeUp(draws=1).results([]))
    with pytest.raises(ValueError, match="has schema 9, and this version reads schema 2"):
        write_report(dataclasses.replace(run, about={**run.about, "schema": 9}), tmp_path)
    with pytest.raises(ValueError, match="lacks settings, groups, counts"):
        write_report(dataclasses.replace(run, about={"schema": 2}), tmp_path)
    assert not list(tmp_path.iterdir())


ORDERS = [
    ("report", ["figures", "writing"]),
    ("pages", ["charts", "rendering"]),
    ("readers", ["pixels", "disk", "tables", "assembly", "layouts"]),
]


@pytest.mark.parametrize(("package", "order"), ORDERS)
def test_imports_inside_a_package_run_one_way(package: str, order: list[str]) -> None:
    folder = Path(readers.__file__).parent.parent / package
    assert sorted(file.stem for file in folder.glob("*.py")) == sorted(["__init__", *order])
    for name in order:
        source = (folder / f"{name}.py").read_text()
        named = re.findall(rf"neuronsurgery\.study\.{package}(?:\.| import )(\w+)", source)
        assert [other for other in named if other not in order[: order.index(name)]] == []


# Faults


def files_of(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, dict[Path, bytes], Run]:
    """A folder with a report and a file of someone else, what is in it, and results that would change all of it."""
    write_report(Run.of(MadeUp(draws=2).results(["1a", "1b"])), tmp_path)
    (tmp_path / "figures" / "own.csv").write_text("mine")
    return tmp_path, files_of(tmp_path), Run.of(MadeUp(effect=-0.5, draws=2).results(["1a", "1b", "1f"]))


@pytest.mark.parametrize("fails_at", ["figures/accuracy.svg", "figures/rewinding.svg", "report.html"])
def test_report_that_cannot_be_put_in_place_leaves_the_old_one_whole(
    two_runs: tuple[Path, dict[Path, bytes], Run], monkeypatch: pytest.MonkeyPatch, fails_at: str
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
    assert (folder / "figures" / "own.csv").read_text() == "mine"


def test_report_without_hard_links_is_put_back_as_well(
    two_runs: tuple[Path, dict[Path, bytes], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_report_that_cannot_be_put_in_place_leaves_the_old_one_whole(two_runs, monkeypatch, "report.html")


@pytest.mark.xdist_group("forked")
def test_full_disk_leaves_the_old_report_whole(forked: Forked, two_runs: tuple[Path, dict[Path, bytes], Run]) -> None:
    folder, before, results = two_runs
    write_results(folder, results)
    assert len(before[Path("report.html")]) > 50_000
    done = forked("study.little_study.report_on_a_full_disk", str(folder))
    assert done.returncode == 1
    assert f"the report in {folder} was not written (File too large)" in done.stderr
    assert f"give leave to write, then run `neuronsurgery report {folder}`" in done.stderr
    for name in ("results.json", "table.csv"):
        (folder / name).unlink()
    assert files_of(folder) == before
    assert not list(folder.glob(".report-*"))


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"the report in .*taken/run was not written"):
        write_report(Run.of(MadeUp(draws=2).results([])), tmp_path / "taken" / "run")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_leave_to_write_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="give leave to write"):
        write_report(Run.of(MadeUp(draws=2).results([])), folder)
    assert not list(folder.iterdir())


# The form of the files


def test_page_is_well_formed_and_loads_nothing(whole: tuple[Run, Path]) -> None:
    page = (whole[1] / "report.html").read_text()
    alone = {"meta", "br", "img"}

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.links: list[str] = []
            self.anchors: set[str] = set()

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in {"link", "iframe", "object", "use"}
            self.links += [value or "" for key, value in attributes if key in {"href", "src"}]
            self.anchors |= {value or "" for key, value in attributes if key == "id"}
            self.open += [tag] if tag not in alone else []

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    inner = [link[1:] for link in checker.links if link.startswith("#")]
    assert inner and set(inner) <= checker.anchors
    others = [link for link in checker.links if not link.startswith("#")]
    assert all(link == "table.csv" or link.startswith("data:image/png;base64,") for link in others)
    assert "@import" not in page


def test_each_chart_is_a_file_of_its_own(whole: tuple[Run, Path]) -> None:
    files = {file.stem: file for file in (whole[1] / "figures").iterdir()}
    assert set(files) == set(figures_of(whole[0]))
    for file in files.values():
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "NaN" not in file.read_text()


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PROBE = """
<script>
window.faults = [];
window.addEventListener("error", event => faults.push(event.message));
for (const kind of ["error", "warn"]) {
  const old = console[kind];
  console[kind] = (...words) => { faults.push(words.join(" ")); old.apply(console, words); };
}
function beyond() {  // text that ends outside of its chart or of the page
  const found = [];
  for (const text of document.querySelectorAll(".chart svg text")) {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    const [wide, high] = [box.left < frame.left - 1 || box.right > frame.right + 1,
                          box.top < frame.top - 1 || box.bottom > frame.bottom + 1];
    if (box.width && (wide || high)) found.push(text.textContent);
  }
  if (document.documentElement.scrollWidth > window.innerWidth + 1) found.push("the page is wider than the window");
  return found;
}
function marks(name) { return document.querySelectorAll("#chart-" + name + " svg .mark-symbol.role-mark path").length; }
async function probe() {
  const pause = () => new Promise(done => setTimeout(done, 400));
  await pause();
  const found = {charts: document.querySelectorAll(".chart svg").length, beyond: beyond()};
  const menu = [...document.querySelectorAll("#chart-cuts .vega-bind")].map(e => e.querySelector("select"))[1];
  if (menu) {
    const shapes = () => document.querySelector("#chart-cuts svg .mark-symbol.role-mark").innerHTML;
    const before = shapes();
    menu.selectedIndex = 0;
    menu.dispatchEvent(new Event("input", {bubbles: true}));
    menu.dispatchEvent(new Event("change", {bubbles: true}));
    await pause();
    found.chosen = before !== shapes();
  }
  const faint = () => [...document.querySelectorAll("#chart-accuracy svg .mark-symbol.role-mark path")]
    .filter(path => Number(path.getAttribute("opacity") ?? 1) < 0.5).length;
  found.faint = [faint()];
  const symbol = document.querySelector("#chart-accuracy svg .role-legend-symbol path");
  symbol.dispatchEvent(new MouseEvent("click", {bubbles: true, view: window}));
  await pause();
  found.faint.push(faint());
  found.faults = window.faults;
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
}
window.addEventListener("load", () => setTimeout(probe, 200));
</script>
"""


def in_browser(page: Path, width: int, folder: Path, fonts: bool = True) -> dict[str, Any]:
    """What the page says of itself in a browser of this width, after a choice and a click on a legend."""
    text = page.read_text().replace("<body>", f"<body>{PROBE}", 1)
    if not fonts:
        text = re.sub(r"Helvetica, Arial", "Nothing Such", text)
    probed = folder / "probed.html"
    probed.write_text(text)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        f"--window-size={width},2000",
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *options, profile, "--dump-dom", probed.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    (said,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    found: dict[str, Any] = json.loads(said.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("kind", "width", "fonts"), [("whole", 1280, True), ("whole", 500, True), ("several", 1280, False)]
)
def test_in_a_browser_nothing_is_cut_off_and_the_controls_work(
    kind: str, width: int, fonts: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run, folder = request.getfixturevalue(kind)
    found = in_browser(folder / "report.html", width, tmp_path, fonts)
    assert found["charts"] == len(figures_of(run))
    assert (found["beyond"], found["faults"]) == ([], [])
    assert found["chosen"]
    before, after = found["faint"]
    assert before == 0 and after > 0  # a click on one group of the legend takes the others back


def test_the_script_is_of_the_package_and_ends_no_tag_early() -> None:
    page = page_of(Run.of(MadeUp(draws=1).results([])), {})
    assert page.count("</script>") == 2
    with pytest.raises(Exception, match="undefined"):
        pages.render("study.html")
