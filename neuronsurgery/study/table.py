"""The one table of a run: every number is a row of `table.csv`, beside `results.json`, which says what was done.

Report, claims, comparisons over seeds and printed tables are queries of it. `Run.of` makes it from what the stages
return; `write_run` and `read_run` are its two files.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import polars as pl

Results: TypeAlias = Mapping[str, Any]
Row: TypeAlias = dict[str, Any]

SCHEMA: Final = 2
TABLE: Final = "table.csv"
RESULTS: Final = "results.json"

COLUMNS: Final[Mapping[str, Any]] = {
    "seed": pl.Int64,
    "stage": pl.String,
    "experiment": pl.String,
    "split": pl.String,
    "selector": pl.String,
    "chosen_for": pl.String,
    "edit": pl.String,
    "k": pl.Int64,
    "fraction": pl.Float64,
    "std": pl.Float64,
    "relative_std": pl.Float64,
    "layer": pl.String,
    "distance": pl.Int64,
    "with_norm": pl.Boolean,
    "draw": pl.Int64,
    "rule": pl.String,
    "epoch": pl.Int64,
    "neurons": pl.Int64,
    "names": pl.String,
    "group": pl.String,
    "measure": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p": pl.Float64,
    "n": pl.Int64,
    "note": pl.String,
}
"""The columns of `table.csv`, in their order; what does not apply is empty. Shares and changes are in [-1, 1]."""

FOUND: Final = ("seed", "epoch", "neurons", "names", "value", "low", "high", "p", "n", "note")
KEYS: Final = tuple(name for name in COLUMNS if name not in FOUND)
"""The columns by which the rows of one seed are found in another. A trajectory has "epoch", too."""

EDITS: Final = {"1a": "zero", "1c": "random init", "1d": "random noise", "1e": "zero", "1f": "rewind", "1g": "zero"}
SETTING: Final = ("chosen_for", "k", "fraction", "std", "relative_std", "layer", "distance", "with_norm", "draw")
FORMULA: Final = r"^[=+\-@\t\r']"


@dataclass(frozen=True, eq=False)
class Run:
    """What one run came to, or several seeds together.

    Attributes:
        about: what `results.json` holds: settings, groups, counts, and what else is no result.
        table: one row per number, with `COLUMNS`.
    """

    about: Results
    table: pl.DataFrame

    @classmethod
    def of(cls, results: Results) -> Run:
        """Return the run of what its stages returned: the entries of `describe_run` and of each stage."""
        seed = results["settings"].get("seed", 0)
        rows = itertools.chain(_accuracies(results), _stage_one(results), _stage_two(results), _fragility(results))
        about = {**_about(results), "schema": SCHEMA}
        return cls(about, pl.DataFrame([{"seed": seed, **row} for row in rows], schema=dict(COLUMNS)))

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups, in the order of the data."""
        return tuple(map(str, self.about["groups"]))

    @functools.cached_property
    def minority(self) -> tuple[str, ...]:
        """The groups that are rare in training, the rarest first."""
        counts = self.about["counts"].get("train") or [0] * len(self.groups)
        places = sorted(self.about.get("minority", ()), key=lambda place: counts[place])
        return tuple(self.groups[place] for place in places)

    @property
    def majority(self) -> tuple[str, ...]:
        """The names of the others."""
        return tuple(name for name in self.groups if name not in self.minority)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in their order."""
        return tuple(self.about.get("seeds", (self.about["settings"].get("seed", 0),)))

    @property
    def split(self) -> str:
        """The split that the claims about Stage 1 look at: the first that it was measured on."""
        splits: Sequence[str] = self.about["settings"].get("splits") or ("train",)
        return splits[0]

    @functools.cached_property
    def experiments(self) -> frozenset[str]:
        """What the table has rows of: "accuracy", "1a" to "1h", "arms", "detection", "mitigation" ..."""
        return frozenset(self.table["experiment"].unique().to_list())

    def rows(self, **equal: Any) -> pl.DataFrame:
        """Return the rows whose columns are equal to these values; None: empty; a tuple: one of these."""
        return where(self.table, **equal)

    def of_seed(self, seed: int) -> Run:
        """Return one of several seeds as a run."""
        about = {key: value for key, value in self.about.items() if key not in ("kind", "seeds")}
        return Run({**about, "settings": {**about["settings"], "seed": seed}}, self.rows(seed=seed))


def where(table: pl.DataFrame, **equal: Any) -> pl.DataFrame:
    """Return the rows of a table whose columns are equal to these values; None: empty; a tuple: one of these."""
    for name, value in equal.items():
        if value is None:
            chosen = pl.col(name).is_null()
        else:
            chosen = pl.col(name).is_in(value) if isinstance(value, tuple) else pl.col(name) == value
        table = table.filter(chosen)
    return table


def combine(runs: Mapping[int, Run]) -> Run:
    """Return the runs of several seeds as one.

    Args:
        runs: by seed.

    Raises:
        ValueError: if there are fewer than two, or they are not of one data set and one way of training.
    """
    if len(runs) < 2:
        raise ValueError(f"combine needs the results of at least two seeds, not of {len(runs)}")
    first = next(iter(runs.values())).about
    differing = [
        key
        for run in runs.values()
        for key in sorted(set(first["settings"]) - {"seed"})
        if run.about["settings"].get(key) != first["settings"][key]
    ]
    if differing:
        raise ValueError(f"the runs differ in {', '.join(dict.fromkeys(differing))}: only the seed may differ")
    about = {**first, "kind": "seeds", "seeds": list(runs)}
    if "stage_two" in first:
        about["stage_two"] = {**first["stage_two"], **_every_arm([run.about["stage_two"] for run in runs.values()])}
        about["stage_two"]["not_inferred"] = _said_by_seeds(runs, "stage_two", "not_inferred")
    if any("impossible" in run.about.get("fragility", {}) for run in runs.values()):
        about["fragility"] = {**first["fragility"], "impossible": _said_by_seeds(runs, "fragility", "impossible")}
    return Run(about, pl.concat([run.table.with_columns(seed=pl.lit(seed)) for seed, run in runs.items()]))


def _every_arm(stages: Sequence[Results]) -> dict[str, list[Row]]:
    """Return the arms of all seeds, in the order of the seed that has most; "impossible" says in how many seeds."""
    ordered = sorted((stage["arms"] for stage in stages), key=len, reverse=True)
    arms = {arm["name"]: arm for column in ordered for arm in reversed(column)}
    names = dict.fromkeys(arm["name"] for column in ordered for arm in column)
    found = []
    for name in names:
        arm = {key: value for key, value in arms[name].items() if key != "impossible"}
        every = [next((one for one in stage["arms"] if one["name"] == name), {"impossible": ""}) for stage in stages]
        failed = [one["impossible"] for one in every if "impossible" in one]
        why = next(filter(None, failed), "no variant could be trained")
        found.append({**arm, **({"impossible": f"in {len(failed)} of {len(stages)} seeds: {why}"} if failed else {})})
    return {"arms": found}


def _said_by_seeds(runs: Mapping[int, Run], stage: str, key: str) -> str | None:
    said = {seed: run.about[stage].get(key) for seed, run in runs.items()}
    found = "; ".join(f"seed {seed}: {text}" for seed, text in said.items() if text)
    return found or None


# Files


def write_run(run: Run) -> dict[str, bytes]:
    """Return the two files of a run, by name."""
    return {TABLE: csv_of(run.table), RESULTS: json.dumps(run.about, indent=1).encode()}


def read_run(folder: Path) -> Run:
    """Return the run of a folder.

    Raises:
        FileNotFoundError: if it has no results yet.
        ValueError: if they are damaged, of another schema, or of no run.
    """
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "is not there"
        raise FileNotFoundError(f"{folder} {what}: name the folder of a run, as given to `neuronsurgery study --out`")
    missing = [name for name in (RESULTS, TABLE) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: run `neuronsurgery study --out {folder}` to its end first"
        )
    try:
        about = json.loads((folder / RESULTS).read_text())
    except ValueError as error:
        raise _damaged(folder / RESULTS, str(error)) from error
    if not isinstance(about, dict):
        raise _damaged(folder / RESULTS, f"a {type(about).__name__}, where an object was expected")
    checked(about)
    try:
        table = read_csv((folder / TABLE).read_bytes())
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise _damaged(folder / TABLE, str(error).splitlines()[0]) from error
    return Run(about, table)


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is damaged ({why}): delete it and run the study again, which goes on from what is in the folder"
    )


def checked(about: Results) -> Results:
    """Return what `results.json` holds, after it was looked at.

    Raises:
        ValueError: if the schema or the kind is another, or parts are missing that every run has.
    """
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"results.json has schema {about.get('schema')!r}, and this version reads schema {SCHEMA}: make the report "
            f"with the version of neuronsurgery that wrote it ({about.get('version', 'unknown')}), or study again"
        )
    if about.get("kind") not in (None, "seeds"):
        raise ValueError(f'results.json is of kind {about["kind"]!r}; this version knows one run, and "seeds"')
    missing = [key for key in ("settings", "groups", "counts") if key not in about]
    if missing:
        raise ValueError(f"results.json lacks {', '.join(missing)}: it is not of a finished or interrupted study run")
    return about


def csv_of(table: pl.DataFrame) -> bytes:
    """Return a table as CSV, numbers in full, empty where there is none.

    Names that a spreadsheet would take for a formula stand behind an apostrophe: they come from tables and folders.
    """
    safe = table.with_columns(
        pl.when(pl.col(name).str.contains(FORMULA)).then("'" + pl.col(name)).otherwise(pl.col(name)).alias(name)
        for name, dtype in table.schema.items()
        if dtype == pl.String
    )
    file = io.BytesIO()
    safe.write_csv(file)
    return file.getvalue()


def read_csv(data: bytes) -> pl.DataFrame:
    """Return the table of which `csv_of` gave these bytes."""
    table = pl.read_csv(io.BytesIO(data), schema=dict(COLUMNS))
    return table.with_columns(
        pl.col(name).str.strip_prefix("'") for name, dtype in COLUMNS.items() if dtype == pl.String
    )


# From results to rows


def _about(results: Results) -> Row:
    """Return the entries that are no numbers of a result."""
    named = [*("version", "settings", "environment", "network", "groups", "minority", "counts", "expected_counts")]
    named += ["layers", "neurons", "intervals", "missing_distances", "pictures"]
    about = {name: results[name] for name in named if name in results}
    if results.get("stage_two"):
        about["stage_two"] = _about_stage_two(results["stage_two"])
    if results.get("fragility"):
        about["fragility"] = _about_fragility(results["fragility"])
    return about


def _about_stage_two(stage: Results) -> Row:
    kept = ("name", "family", "text", "labels", "choice", "held_out", "settings", "impossible")
    said = {key: value for key, value in stage.items() if key != "arms"}
    return {**said, "arms": [{key: arm[key] for key in kept if key in arm} for arm in stage["arms"]]}


def _about_fragility(stage: Results) -> Row:
    numbers = ("detection", "flagged", "damage", "points", "mitigation")
    said = {key: value for key, value in stage.items() if key not in numbers}
    kept = ("name", "labels", "images", "chosen", "impossible")
    rows = stage.get("mitigation", ())
    return {**said, "mitigation": [{key: row[key] for key in kept if key in row} for row in rows]}


def _accuracies(results: Results) -> Iterator[Row]:
    said = {"stage": "training", "experiment": "accuracy", "measure": "accuracy"}
    for split, values in results.get("accuracy", {}).items():
        yield from ({**said, "split": split, **row} for row in _by_group(results, split, values))
    for point in results.get("trajectory") or ():
        for measure in ("loss", "accuracy"):
            if point.get(measure) is not None:
                row = {"stage": "training", "experiment": "trajectory", "split": "train", "epoch": point["epoch"]}
                yield {**row, "measure": measure, "value": point[measure]}


def _by_group(results: Results, split: str, values: Sequence[float]) -> Iterator[Row]:
    """Yield the accuracy of every group that has examples in a split, with Wilson's 95 % interval."""
    counts = dict(zip(map(str, results["groups"]), results["counts"][split], strict=True))
    present = [name for name, count in counts.items() if count]
    for name, value in zip(present, values, strict=True):
        yield {"group": name, "n": counts[name], **share(value, counts[name])}


def share(value: float, count: int) -> dict[str, float]:
    """Return a share of so many examples with the ends of Wilson's 95 % interval."""
    low, high = _wilson(round(value * count), count)
    return {"value": value, "low": low, "high": high}


@functools.cache
def _wilson(hits: int, count: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    ends = binomtest(hits, count).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def _stage_one(results: Results) -> Iterator[Row]:
    for experiment, by_split in (results.get("experiments") or {}).items():
        rows = {"1b": _ranks, "1h": _sets}.get(experiment, functools.partial(_interventions, experiment))
        for split, records in by_split.items():
            yield from ({"stage": "1", "experiment": experiment, "split": split, **row} for row in rows(records))


def _interventions(experiment: str, records: Iterable[Results]) -> Iterator[Row]:
    """Yield the change of each group's accuracy under each edit, after minus before."""
    for record in records:
        said = {name: record.get(name) for name in SETTING}
        said |= {"selector": record["criterion"], "edit": EDITS[experiment], "neurons": record.get("neurons")}
        said["names"] = ";".join(record.get("names", ())) or None
        yield from ({**said, **_changed(change)} for change in record["changes"])


def _changed(change: Results) -> Row:
    found = {name: change.get(name) for name in ("low", "high", "p")}
    return {"group": change["group"], "measure": "change", "value": change["change"], "n": change.get("count"), **found}


def _ranks(records: Iterable[Results]) -> Iterator[Row]:
    """Yield, of every neuron at the top by one criterion, its percentile by the other."""
    for record in records:
        said = {"selector": record["chosen_by"], "chosen_for": record["group"], "fraction": record["share"]}
        for place, percentile in enumerate(record["percentiles"]):
            yield {**said, "draw": place, "group": record["group"], "measure": "percentile", "value": percentile}


def _sets(records: Iterable[Results]) -> Iterator[Row]:
    """Yield what is known of each set of 1h: on the half that it was judged on, and on the test images."""
    shares = ("own", "worst_other", "right_lost", "test_own", "test_worst_other", "test_right_lost")
    for record in records:
        said = {"selector": "matched" if record["control"] else "critical", "chosen_for": record["chosen_for"]}
        said |= {"group": record["control"] or record["chosen_for"], "k": record["k"]}
        said |= {"edit": ";".join(record.get("kinds", ())) or None, "neurons": record.get("neurons")}
        said["names"] = ";".join(record.get("names", ())) or None
        if "impossible" in record:
            yield {**said, "measure": "impossible", "note": record["impossible"]}
            continue
        net = {"value": record["net"], "low": record["net_low"], "high": record["net_high"], "p": record["p_value"]}
        yield {**said, "measure": "net", **net, "n": record["draws"], "note": record["sentence"]}
        counts = {"searched": record["searched"], "judged": record["judged"], "distinct": record["distinct"]}
        gaps = {name: record.get(name) for name in ("gap", "largest_gap", "unmatched")}
        every = {**{name: record.get(name) for name in shares}, **counts, **gaps}
        yield from ({**said, "measure": name, "value": value} for name, value in every.items() if value is not None)
        if record["control"] is None:
            yield from ({**said, **_changed(change)} for change in record["changes"])


AVERAGES: Final = ("plain", "balanced", "train-weighted")


def _stage_two(results: Results) -> Iterator[Row]:
    for arm in (results.get("stage_two") or {}).get("arms", ()):
        said = {"stage": "2", "selector": arm["name"]}
        for rule, chosen in arm["selected"].items():
            by_group = list(_by_group(results, "test", chosen["test"]))
            under = {**said, "experiment": "arms", "rule": rule, "split": "test", "epoch": chosen["epoch"]}
            under["note"] = chosen["arm"] if chosen["arm"] != arm["name"] else None
            yield from ({**under, "measure": "accuracy", **row} for row in by_group)
            worst = min(by_group, key=lambda row: row["value"])
            yield {**under, "measure": "worst group", **worst, "group": None, "note": worst["group"]}
            for average in AVERAGES:
                known = {"value": chosen[average]}
                if average == "plain":
                    count = sum(row["n"] for row in by_group)
                    known = {**share(chosen[average], count), "n": count}
                yield {**under, "measure": f"{average} average", **known}
        for point in arm["trajectory"]:
            yield from _epoch(results, {**said, "experiment": "epochs", "epoch": point["epoch"]}, point)


def _epoch(results: Results, said: Row, point: Results) -> Iterator[Row]:
    if point.get("loss") is not None:
        yield {**said, "split": "train", "measure": "loss", "value": point["loss"]}
    for split, values in point.items():
        if split in results["counts"]:
            rows = _by_group(results, split, values)
            yield from ({**said, "split": split, "measure": "accuracy", **row} for row in rows)
        elif split == "inferred":
            for place, value in enumerate(values):
                row = {"split": split, "measure": "accuracy", "note": f"inferred group {place}", "value": value}
                yield {**said, "draw": place, **row}


def _fragility(results: Results) -> Iterator[Row]:
    stage = results.get("fragility") or {}
    for rows in (_detected(stage), _flagged(results, stage), _points(stage), _retrained(results, stage)):
        yield from ({"stage": "fragility", **row} for row in rows)


def _detected(stage: Results) -> Iterator[Row]:
    for split, rows in stage.get("detection", {}).items():
        for row in rows:
            said = {"experiment": "detection", "split": split, "selector": row["score"], "group": row["group"]}
            said |= {"n": row["count"], "note": row["needs"]}
            yield {**said, "measure": "AUC", "value": row["auc"]}
            yield {**said, "measure": "average precision", "value": row["average_precision"]}
            yield {**said, "measure": "of its class", "value": row["of"]}
    for split, rows in stage.get("damage", {}).items():
        for row in rows:
            said = {"experiment": "detection", "split": split, "selector": row["cut"], "neurons": row["neurons"]}
            yield {**said, "measure": "flipped", "value": row["flips"]}


def _flagged(results: Results, stage: Results) -> Iterator[Row]:
    for split, found in stage.get("flagged", {}).items():
        said = {"experiment": "flagged", "split": split, "selector": "knockout"}
        if "impossible" in found:
            yield {**said, "measure": "impossible", "note": found["impossible"]}
        for name, count, of in zip(results["groups"], found.get("fragile", ()), results["counts"][split], strict=False):
            known = share(count / of, of) if of else {}
            yield {**said, "group": str(name), "measure": "flagged", "n": of, **known}
        for target, threshold in enumerate(found.get("thresholds", ())):
            yield {**said, "measure": "threshold", "value": threshold, "note": f"class {target}"}


def _points(stage: Results) -> Iterator[Row]:
    for row in stage.get("points", ()):
        said = {"experiment": "points", "split": "train", "group": row["group"], "n": row["of"]}
        for place, (fragility, final) in enumerate(zip(row["fragility"], row["final"], strict=True)):
            yield {**said, "draw": place, "measure": "fragility", "value": fragility}
            yield {**said, "draw": place, "measure": "minus final margin", "value": final}


def _retrained(results: Results, stage: Results) -> Iterator[Row]:
    for row in stage.get("mitigation", ()):
        said = {"experiment": "mitigation", "selector": row["name"]}
        for split in ("validation", "test"):
            by_group = list(_by_group(results, split, row[split])) if split in row else []
            yield from ({**said, "split": split, "measure": "accuracy", **one} for one in by_group)
            if by_group and split == "test":
                worst = min(by_group, key=lambda one: one["value"])
                yield {**said, "split": split, "measure": "worst group", **worst, "group": None, "note": worst["group"]}
