"""The chapter of fragility: who stands out without group labels, what to look at first, and what it is good for."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from neuronsurgery.study import figures
from neuronsurgery.study.figures import Picture, Series, number, signed
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.levels import Found, Level, by_group, level_of, standing, verdicts, worst_group
from neuronsurgery.study.report.page import folded
from neuronsurgery.study.report.section import Results, Section
from neuronsurgery.study.report.tables import group_headers, html_table, level_cell
from neuronsurgery.study.report.wording import listed, percent, times
from neuronsurgery.study.seeds import KNOCKOUT, RETRAINED


@dataclass(frozen=True)
class _Found:
    """The stage of a run, or of several."""

    run: Results
    groups: Groups

    @property
    def stage(self) -> Results:
        stage: Results = self.run["fragility"]
        return stage

    @property
    def over_seeds(self) -> bool:
        return self.run.get("kind") == "seeds"

    def class_of(self, name: str) -> int | None:
        """Return the class of a group, groups being ordered by class and then by attribute; None if they are not."""
        classes = max((len(found.get("thresholds", ())) for found in self.flags()), default=0)
        classes = classes or len(self.stage.get("audit", ()))
        if not classes or len(self.groups.names) % classes:
            return None
        return self.groups.names.index(name) * classes // len(self.groups.names)

    def flags(self, split: str | None = None) -> list[Results]:
        """Return what the fence flags, of every seed where there are several, on one split or on all."""
        flagged = self.stage["flagged"]
        chosen = [flagged[split]] if split else list(flagged.values())
        return [one for found in chosen for one in (found if isinstance(found, list) else [found])]


def fragility(run: Results, groups: Groups) -> list[Section]:
    """Return the sections of fragility: detection, the audit's images, and mitigation; or why there are none."""
    stage = run.get("fragility")
    if not stage:
        return []
    if "impossible" in stage and not stage.get("detection"):
        return [Section(f"Fragility could not be measured: {stage['impossible']}")]
    found = _Found(run, groups)
    sections = [_detection(found), *([_audit(found)] if stage.get("audit") else []), _mitigation(found)]
    return sections


# Detection


def _detection(found: _Found) -> Section:
    section = Section(_detection_finding(found), heading="Who stands out")
    section.figures, section.more_figures = _strips(found)
    section.table = _detection_table(found) + _differences_table(found) + _flagged_table(found)
    section.remarks = _detection_remarks(found)
    section.rows = {
        "fragility_detection": [
            {
                "split": split,
                **{key: value for key, value in row.items() if key not in ("auc", "average_precision")},
                **_flat(row),
            }
            for split, rows in found.stage["detection"].items()
            for row in rows
        ],
        "fragility_detection_differences": [
            {"split": split, **row}
            for split, rows in found.stage.get("detection_differences", {}).items()
            for row in rows
        ],
        "fragility_flagged": [
            {"split": split, **({"seed": seed} if found.over_seeds else {}), **one}
            for split in found.stage["flagged"]
            for seed, one in zip(found.run.get("seeds", [0]), found.flags(split), strict=True)
        ],
        "fragility_damage": [
            {"split": split, "cut": row["cut"], "neurons": _neurons(row), "flips": level_of(row["flips"]).value}
            for split, rows in found.stage.get("damage", {}).items()
            for row in rows
        ],
    }
    return section


def _flat(row: Results) -> Results:
    """Return the two measures of a row as columns; over seeds mean and interval of each."""
    columns: dict[str, object] = {}
    for key in ("auc", "average_precision"):
        value = row[key]
        parts = {f"{key} {part}": one for part, one in value.items()} if isinstance(value, Mapping) else {key: value}
        columns |= parts
    return columns


def _detection_finding(found: _Found) -> str:
    """Return how well the knockout tells each minority from the rest of its class, and what does at least as well."""
    if not found.stage["edit"]:
        return _finding_without_cut(found)
    layers = listed([str(layer) for layer in found.stage["edit"]])
    parts = []
    for split, rows in found.stage["detection"].items():
        for name in dict.fromkeys(row["group"] for row in rows):
            aucs = {row["score"]: level_of(row["auc"]) for row in rows if row["group"] == name}
            own = aucs[KNOCKOUT]
            better = [
                f"{score} ({number(level.value, 3)})"
                for score, level in aucs.items()
                if score != KNOCKOUT and level.value >= own.value
            ]
            than = f"not better than {listed(better, 12)}" if better else "higher than every other score asked"
            parts.append(f"{found.groups.label(name)} on the {split} images with AUC {_auc_text(own)}, {than}")
    if not parts:
        return "No minority group has examples beside others of its class: nothing to detect."
    mean = "On the mean over the seeds, the" if found.over_seeds else "The"
    return f"{mean} fragility under the knockout of {layers} finds, within its class, {'; '.join(parts)}."


def _finding_without_cut(found: _Found) -> str:
    """Return why nothing was knocked out, and what ranks each minority highest all the same."""
    parts = []
    for split, rows in found.stage["detection"].items():
        for name in dict.fromkeys(row["group"] for row in rows):
            best = max((row for row in rows if row["group"] == name), key=lambda row: level_of(row["auc"]).value)
            said = f"{best['score']} for {found.groups.label(name)} on the {split} images"
            parts.append(f"{said} with AUC {_auc_text(level_of(best['auc']))}")
    highest = f" Of the other scores the highest is {'; '.join(parts)}." if parts else ""
    return f"Nothing was knocked out: {found.stage['impossible']}.{highest}"


def _auc_text(level: Level) -> str:
    return number(level.value, 3) + (f" {_auc_interval(level)}" if level.low is not None else "")


def _auc_interval(level: Level) -> str:
    """Return the interval of an AUC over seeds, cut at 0 and 1."""
    if level.low is None or level.high is None:
        return ""
    return f"[{number(max(0.0, level.low), 3)}, {number(min(1.0, level.high), 3)}]"


def _detection_table(found: _Found) -> str:
    """Return AUC and average precision of every score, a column per split and minority group, with what it needs."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    needs: dict[str, list[str]] = {}
    columns: dict[tuple[str, str], str] = {}
    for split, rows in found.stage["detection"].items():
        for row in rows:
            column = (split, row["group"])
            columns[column] = f"{escape(found.groups.label(row['group']))}, {escape(split)}" + (
                f"<small>{row['count']} of {row['of']} of its class</small>"
            )
            auc, precision = level_of(row["auc"]), level_of(row["average_precision"])
            interval = f"<small>{_auc_interval(auc)}</small>" if found.over_seeds else ""
            cell = f"{number(auc.value, 3)}{interval}<small>AP {number(precision.value, 3)}</small>"
            cells.setdefault(row["score"], {})[column] = cell
            needs.setdefault(row["score"], []).append(row["needs"])
    body = [
        [
            escape(score),
            f"<small>{escape('; '.join(dict.fromkeys(needs[score])))}</small>",
            *(by_column.get(column, "&ndash;") for column in columns),
        ]
        for score, by_column in cells.items()
    ]
    return html_table(["score", "needs", *columns.values()], body, heads=2) if body else ""


def _differences_table(found: _Found) -> str:
    """Return how far the AUC of the knockout is above that of each other score; nothing of one run."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    columns: dict[tuple[str, str], str] = {}
    for split, rows in found.stage.get("detection_differences", {}).items():
        for row in rows:
            column = (split, row["group"])
            columns[column] = f"{escape(found.groups.label(row['group']))}, {escape(split)}"
            ends = f"[{signed(row['low'], 3)}, {signed(row['high'], 3)}] {row['verdict']}"
            cells.setdefault(row["control"], {})[column] = f"{signed(row['mean'], 3)}<small>{ends}</small>"
    body = [
        [escape(score), *(by_column.get(column, "&ndash;") for column in columns)] for score, by_column in cells.items()
    ]
    table = html_table(["AUC of the knockout minus that of", *columns.values()], body) if body else ""
    return folded("The knockout against each other score, seed by seed", table)


def _flagged_table(found: _Found) -> str:
    """Return how many examples of every true group lie above the fence of their class, per split."""
    rows = []
    for split in found.stage["flagged"]:
        flags = found.flags(split)
        if not any("fragile" in one for one in flags):
            continue
        row = [f"above the fence, {escape(split)}"]
        for place, count in enumerate(found.run["counts"][split]):
            shown = ", ".join(str(one["fragile"][place]) if "fragile" in one else "none inferred" for one in flags)
            row.append(f"{shown}<small>of {count}</small>")
        rows.append(row)
    return html_table(["examples called fragile", *group_headers(found.groups)], rows) if rows else ""


def _detection_remarks(found: _Found) -> list[str]:
    said = [
        "Fragility is minus the margin of the true class that remains under an edit: higher is more fragile. AUC: the "
        "chance that an example of the minority group stands above another of its class; 0.5 is chance. AP: average "
        "precision; chance is the share of the group in its class. Group labels judge here and infer nothing.",
        "The AUCs of one run have no interval: differences between scores may be chance."
        if not found.over_seeds
        else "Intervals are Student's over the seeds.",
    ]
    for split in found.stage["flagged"]:
        flags = found.flags(split)
        failed = [one for one in flags if "impossible" in one]
        if failed:
            where = f", in {len(failed)} of {times(len(flags), 'seed')}" if found.over_seeds else ""
            said.append(f"On the {split} images no groups could be inferred{where}: {failed[0]['impossible']}")
    for split, rows in found.stage.get("damage", {}).items():
        if not rows:
            continue
        cuts = [f"{row['cut']} ({_neurons(row)}) {level_of(row['flips'])}" for row in rows]
        said.append(f"Share of {split} predictions that one draw of a cut changes: {listed(cuts, 12)}.")
    return said


def _neurons(row: Results) -> str:
    """Return how many neurons a cut takes; of several seeds, how many in each."""
    sizes = row["neurons"]
    return times(sizes, "neuron") if isinstance(sizes, int) else f"{', '.join(map(str, sizes))} neurons"


def _strips(found: _Found) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return the picture of every training example's fragility, and the one of its final margin, by group."""
    points = {row["group"]: row for row in found.stage.get("points", ())}
    flags = found.stage["flagged"].get("train", {}) if not found.over_seeds else {}
    names = [name for name in found.groups.names if name in points]
    fences = [_fence(found, name, flags) for name in names]
    places = [place for place, name in enumerate(names) if name in found.groups.minority]
    thinned = [f"{len(points[n]['fragility'])} of {points[n]['of']} of G{found.groups.names.index(n)}" for n in names]
    shown = (
        f"Evenly thinned: {listed(thinned, 12)}. "
        if any(len(points[n]["fragility"]) < points[n]["of"] for n in names)
        else ""
    )
    drawn = []
    for key, title, axis in (
        ("fragility", "Fragility of the training images under the knockout", "minus the remaining margin"),
        ("final", "The same images without any edit", "minus the final margin"),
    ):
        values = [[value for value in points[name][key] if math.isfinite(value)] for name in names]
        if not any(values):
            continue
        dashed = fences if key == "fragility" else ()
        words = "Dashed: the fence of the class, above which an example is called fragile." if any(dashed) else ""
        heights = [*(one for some in values for one in some), *(fence for fence in dashed if fence is not None)]
        limits = (min(heights), max(heights))
        svg = figures.strips(title, names, values, axis=axis, minority=places, thresholds=dashed, limits=limits)
        drawn.append((f"fragility-{key}", f"{shown}Bar: median. {words}".strip(), svg))
    return drawn[:1], drawn[1:]


def _fence(found: _Found, name: str, flags: Results) -> float | None:
    place, thresholds = found.class_of(name), flags.get("thresholds")
    return None if place is None or thresholds is None else float(thresholds[place])


# Audit


def _audit(found: _Found) -> Section:
    """Return the section of the most fragile training images of each class."""
    rows, parts = [], []
    for row in found.stage["audit"]:
        pictures = [_picture(found, image) for image in row["images"]]
        rows.append((f"Class {row['class']}, most fragile first", pictures))
        members = [name for name in found.groups.names if found.class_of(name) == row["class"]]
        counts = dict(zip(found.groups.names, found.run["counts"]["train"], strict=True))
        total = sum(counts[name] for name in members)
        few = sum(counts[name] for name in members if name in found.groups.minority)
        caught = sum(image["group"] in found.groups.minority for image in row["images"])
        rate = f" (share in the class: {percent(round(few / total, 3))})" if total else ""
        parts.append(f"{caught} of the {len(row['images'])} of class {row['class']} are of minority groups{rate}")
    section = Section(f"Of the most fragile training images, {listed(parts, 12)}.", heading="What to look at first")
    if any(pictures for _, pictures in rows):
        svg = figures.image_rows("The most fragile training images of each class", rows, side=76)
        section.figures = [("fragility-audit", "Framed: of a minority group. Below: group and fragility.", svg)]
    section.rows = {
        "fragility_audit": [
            {"class": row["class"], **{key: value for key, value in image.items() if key != "png"}}
            for row in found.stage["audit"]
            for image in row["images"]
        ]
    }
    return section


def _picture(found: _Found, image: Results) -> Picture:
    label = found.groups.label(image["group"])
    return Picture(
        base64.b64decode(image["png"]),
        f"{label.split()[0]}  {number(image['fragility'], 2)}",
        f"image {image['index']}, {label}, fragility {number(image['fragility'], 2)}",
        image["group"] in found.groups.minority,
    )


# Mitigation


def _levels(found: _Found) -> dict[str, dict[str, Level]]:
    """Return the test accuracies per group of every row that could be fitted, the worst group's under ""."""
    levels = {}
    for row in found.stage["mitigation"]:
        if "test" in row:
            each = by_group(found.run, found.groups, "test", row["test"])
            levels[row["name"]] = {**each, "": level_of(row["worst"]) if found.over_seeds else each[worst_group(each)]}
    return levels


def _mitigation(found: _Found) -> Section:
    levels = _levels(found)
    section = Section(
        _mitigation_finding(found, levels),
        heading=f"What it is good for: the last layer retrained on the {found.stage['images']} images",
    )
    section.figures = _mitigation_figure(found, levels)
    section.table = _mitigation_table(found, levels)
    for row in found.stage["mitigation"]:
        if "impossible" in row:
            section.remarks.append(f"{row['name']} was impossible: {row['impossible']}")
    for name, count in found.stage.get("impossible_rows", {}).items():
        section.remarks.append(f"{name} was impossible in {times(count, 'seed')}, and is left out.")
    section.remarks.append(
        "Better and worse: the interval of the difference, seed by seed, excludes 0; else undecided."
        if found.over_seeds
        else "One run gives no interval over seeds: in brackets Wilson's 95 % intervals over the test images. Better: "
        "higher, and the intervals do not overlap; not better: not higher."
    )
    section.rows = {
        "fragility_mitigation": [_mitigation_row(found, row) for row in found.stage["mitigation"]],
        "fragility_differences": found.stage.get("differences", []),
    }
    return section


def _mitigation_finding(found: _Found, levels: Mapping[str, Mapping[str, Level]]) -> str:
    if RETRAINED not in levels:
        return "The last layer could not be retrained on groups inferred by the knockout: the table has the other ways."
    own = levels[RETRAINED][""]
    if found.over_seeds:
        said = verdicts([one for one in found.stage["differences"] if one["arm"] == RETRAINED])
    else:
        said = standing(own, {name: level[""] for name, level in levels.items() if name != RETRAINED})
    return (
        f"With the last layer retrained on balanced groups that the knockout inferred, the worst test group reaches "
        f"{own}: {said}."
    )


def _mitigation_figure(found: _Found, levels: Mapping[str, Mapping[str, Level]]) -> list[tuple[str, str, str]]:
    if not levels:
        return []
    series = [Series("worst group", tuple(level[""].mark for level in levels.values()), figures.GROUP_COLOURS[0])]
    each = [[[100 * value for value in level[""].values] for level in levels.values()]]
    whiskers = "Student's interval over the seeds; strokes: the seeds" if found.over_seeds else "Wilson's 95 % interval"
    svg = figures.dot_rows(
        "Worst test group, last layer retrained",
        list(levels),
        series,
        axis="accuracy of the worst test group, %",
        each=each,
        limits=(0.0, 100.0),
    )
    return [("fragility-mitigation", f"Lines: {whiskers}.", svg)]


def _mitigation_table(found: _Found, levels: Mapping[str, Mapping[str, Level]]) -> str:
    rows = []
    for row in found.stage["mitigation"]:
        cells = [escape(row["name"]), *(f"<small>{escape(row[key])}</small>" for key in ("labels", "images"))]
        own = levels.get(row["name"])
        if own is None:
            rows.append([*cells, "impossible", *("&ndash;" for _ in found.groups.names)])
            continue
        cells.append(f"<b>{level_cell(own[''])}</b>")
        rows.append(cells + [level_cell(own[name]) if name in own else "&ndash;" for name in found.groups.names])
    header = ["method", "labels it takes", "images it takes", "worst group, %"]
    return html_table([*header, *(f"{name}, %" for name in group_headers(found.groups))], rows, heads=3)


def _mitigation_row(found: _Found, row: Results) -> Results:
    said = {key: row[key] for key in ("name", "labels", "images", "chosen", "impossible") if key in row}
    if "test" not in row:
        return said
    measures: dict[str, Found] = {"worst": row["worst"]}
    names = by_group(found.run, found.groups, "test", row["test"])
    measures |= {f"test {name}": value for name, value in zip(names, row["test"], strict=True)}
    columns: dict[str, object] = {}
    for key, value in measures.items():
        columns |= {f"{key} {part}": one for part, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return {**said, **columns}
