"""The one table of a run: every number is a row of `table.csv`, beside `results.json`, which says what was done.

Report, claims, comparisons over seeds and printed tables are queries of it. `Run.of` makes it from what the stages
return; `write_run` and `read_run` are its two files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import polars as pl
import polars.selectors as cs

Results: TypeAlias = Mapping[str, Any]
Row: TypeAlias = dict[str, Any]

SCHEMA: Final = 2
TABLE: Final = "table.csv"
RESULTS: Final = "results.json"

COLUMNS: Final[Mapping[str, Any]] = {
    "seed": pl.Int64,
    **dict.fromkeys(("stage", "experiment", "split", "selector", "chosen_for", "edit"), pl.String),
    "k": pl.Int64,
    **dict.fromkeys(("fraction", "std", "relative_std"), pl.Float64),
    "layer": pl.String,
    "distance": pl.Int64,
    "with_norm": pl.Boolean,
    "draw": pl.Int64,
    "rule": pl.String,
    **dict.fromkeys(("epoch", "neurons"), pl.Int64),
    **dict.fromkeys(("names", "group", "measure"), pl.String),
    **dict.fromkeys(("value", "low", "high", "p"), pl.Float64),
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
    """What one run came to, or several seeds together."""

    about: Results  # what `results.json` holds: settings, groups, counts, and what else is no result
    table: pl.DataFrame  # one row per number, with `COLUMNS`

    @classmethod
    def of(cls, results: Results) -> Run:
        """Return the run of what its stages returned: the entries of `describe_run` and of each stage."""
        rows = itertools.chain(_accuracies(results), _stage_one(results), _stage_two(results), _fragility(results))
        seed = results["settings"].get("seed", 0)
        return cls(_about(results), pl.DataFrame([{"seed": seed, **row} for row in rows], schema=dict(COLUMNS)))

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
        about = _without(self.about, ("kind", "seeds"))
        return Run({**about, "settings": {**about["settings"], "seed": seed}}, self.rows(seed=seed))


def where(table: pl.DataFrame, **equal: Any) -> pl.DataFrame:
    """Return the rows of a table whose columns are equal to these values; None: empty; a tuple: one of these."""
    chosen = (
        pl.col(name).is_in(value) if isinstance(value, tuple) else pl.col(name).eq_missing(value)
        for name, value in equal.items()
    )
    return table.filter(*chosen)


def combine(runs: Mapping[int, Run]) -> Run:
    """Return the runs of several seeds, by seed, as one.

    Raises:
        ValueError: if there are fewer than two, or they are not of one data set and one way of training.
    """
    if len(runs) < 2:
        raise ValueError(f"combine needs the results of at least two seeds, not of {len(runs)}")
    abouts = {seed: run.about for seed, run in runs.items()}
    first = next(iter(abouts.values()))
    asked = {key: value for key, value in sorted(first["settings"].items()) if key != "seed"}
    differing = [key for about in abouts.values() for key in asked if about["settings"].get(key) != asked[key]]
    if differing:
        raise ValueError(f"the runs differ in {', '.join(dict.fromkeys(differing))}: only the seed may differ")
    about = {**first, "kind": "seeds", "seeds": list(runs)}
    if "stage_two" in first:
        arms = _every_arm([one["stage_two"]["arms"] for one in abouts.values()])
        not_inferred = _said_by_seeds(abouts, "stage_two", "not_inferred")
        about["stage_two"] = {**first["stage_two"], "arms": arms, "not_inferred": not_inferred}
    if impossible := _said_by_seeds(abouts, "fragility", "impossible"):
        about["fragility"] = {**first["fragility"], "impossible": impossible}
    return Run(about, pl.concat([run.table.with_columns(seed=pl.lit(seed)) for seed, run in runs.items()]))


def _every_arm(stages: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the arms of all seeds, in the order of the seed that has most; "impossible" says in how many seeds."""
    every: dict[str, list[Row]] = {}
    for arm in itertools.chain(*sorted(stages, key=len, reverse=True)):
        every.setdefault(arm["name"], []).append(arm)
    found = []
    for arms in every.values():
        lacking = len(stages) - sum("impossible" not in arm for arm in arms)
        why = next((arm["impossible"] for arm in arms if arm.get("impossible")), "no variant could be trained")
        said = {"impossible": f"in {lacking} of {len(stages)} seeds: {why}"} if lacking else {}
        found.append({**_without(arms[-1], ("impossible",)), **said})
    return found


def _said_by_seeds(abouts: Mapping[int, Results], stage: str, key: str) -> str | None:
    said = {seed: about.get(stage, {}).get(key) for seed, about in abouts.items()}
    return "; ".join(f"seed {seed}: {text}" for seed, text in said.items() if text) or None


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
    if missing and (folder / "fragile.csv").exists():
        raise FileNotFoundError(
            f"{folder} is the folder of an audit: the same `neuronsurgery audit` makes its page again"
        )
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: run `neuronsurgery study --out {folder}` to its end first"
        )
    with _named_if_damaged(folder / RESULTS) as file:
        about = json.loads(file.read_text())
        if not isinstance(about, dict):
            raise ValueError(f"a {type(about).__name__}, where an object was expected")
    checked(about)
    with _named_if_damaged(folder / TABLE) as file:
        return Run(about, read_csv(file.read_bytes()))


@contextlib.contextmanager
def _named_if_damaged(file: Path) -> Iterator[Path]:
    try:
        yield file
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({str(error).splitlines()[0]}): delete it and run the study again, which goes on from "
            f"what is in the folder"
        ) from error


def checked(about: Results) -> None:
    """Check what `results.json` holds.

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


def csv_of(table: pl.DataFrame) -> bytes:
    """Return a table as CSV, numbers in full, empty where there is none.

    Names that a spreadsheet would take for a formula stand behind an apostrophe: they come from tables and folders.
    """
    text = cs.string()
    quoted = pl.when(text.str.contains(FORMULA)).then(pl.lit("'") + text).otherwise(text)
    return table.with_columns(quoted.name.keep()).write_csv().encode()


def read_csv(data: bytes) -> pl.DataFrame:
    """Return the table of which `csv_of` gave these bytes."""
    return pl.read_csv(io.BytesIO(data), schema=dict(COLUMNS)).with_columns(cs.string().str.strip_prefix("'"))


# From results to rows


def _only(entries: Results, names: Iterable[str]) -> Row:
    return {name: entries[name] for name in names if name in entries}


def _without(entries: Results, names: Collection[str]) -> Row:
    return {name: value for name, value in entries.items() if name not in names}


def _about(results: Results) -> Row:
    """Return the entries that are no numbers of a result."""
    named = [*("version", "settings", "environment", "network", "groups", "minority", "counts", "expected_counts")]
    named += ["layers", "neurons", "intervals", "missing_distances", "pictures"]
    about = _only(results, named)
    if stage := results.get("stage_two"):
        kept = ["name", "family", "text", "labels", "choice", "held_out", "settings", "impossible"]
        arms = [_only(arm, kept) for arm in stage["arms"]]
        about["stage_two"] = {**_without(stage, ["arms"]), "arms": arms}
    if stage := results.get("fragility"):
        said = _without(stage, ("detection", "flagged", "damage", "points", "mitigation"))
        kept = ["name", "labels", "images", "chosen", "impossible"]
        about["fragility"] = {**said, "mitigation": [_only(row, kept) for row in stage.get("mitigation", ())]}
    return {**about, "schema": SCHEMA}


def _accuracies(results: Results) -> Iterator[Row]:
    for split, values in results.get("accuracy", {}).items():
        yield from _by_group(results, split, values, stage="training", experiment="accuracy")
    for point in results.get("trajectory") or ():
        said = {"stage": "training", "experiment": "trajectory", "split": "train", "epoch": point["epoch"]}
        yield from _measured(said, _only(point, ("loss", "accuracy")))


def _measured(said: Row, values: Mapping[str, float | None]) -> Iterator[Row]:
    yield from ({**said, "measure": name, "value": value} for name, value in values.items() if value is not None)


def _by_group(results: Results, split: str, values: Sequence[float], **said: Any) -> Iterator[Row]:
    """Yield the accuracy of every group that has examples in a split, with Wilson's 95 % interval."""
    counts = dict(zip(map(str, results["groups"]), results["counts"][split], strict=True))
    present = {name: count for name, count in counts.items() if count}
    for (name, count), value in zip(present.items(), values, strict=True):
        yield {**said, "split": split, "measure": "accuracy", "group": name, "n": count, **share(value, count)}


def _worst(by_group: Iterable[Row]) -> Row:
    """Return a row about the worst group, whose name is its note."""
    worst = min(by_group, key=lambda row: row["value"])
    return {**worst, "measure": "worst group", "group": None, "note": worst["group"]}


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
        said = {**_only(record, SETTING), "selector": record["criterion"], "edit": EDITS[experiment]}
        yield from _changes(record, {**said, **_neurons(record)})


def _neurons(record: Results) -> Row:
    return {"neurons": record.get("neurons"), "names": ";".join(record.get("names", ())) or None}


def _changes(record: Results, said: Row) -> Iterator[Row]:
    for change in record["changes"]:
        found = _only(change, ("group", "low", "high", "p"))
        yield {**said, "measure": "change", "value": change["change"], "n": change.get("count"), **found}


def _ranks(records: Iterable[Results]) -> Iterator[Row]:
    """Yield, of every neuron at the top by one criterion, its percentile by the other."""
    for record in records:
        said = {"selector": record["chosen_by"], "chosen_for": record["group"], "fraction": record["share"]}
        for place, percentile in enumerate(record["percentiles"]):
            yield {**said, "draw": place, "group": record["group"], "measure": "percentile", "value": percentile}


OF_SETS: Final = (
    *("own", "worst_other", "right_lost", "test_own", "test_worst_other", "test_right_lost"),
    *("searched", "judged", "distinct", "gap", "largest_gap", "unmatched"),
)
"""What is known of a set of 1h beside its net: on the half that it was judged on, and on the test images."""


def _sets(records: Iterable[Results]) -> Iterator[Row]:
    for record in records:
        control, chosen_for = record["control"], record["chosen_for"]
        said = {"selector": "matched" if control else "critical", "chosen_for": chosen_for, "k": record["k"]}
        said |= {"group": control or chosen_for, "edit": ";".join(record.get("kinds", ())) or None, **_neurons(record)}
        if "impossible" in record:
            yield {**said, "measure": "impossible", "note": record["impossible"]}
            continue
        net = {"value": record["net"], "low": record["net_low"], "high": record["net_high"], "p": record["p_value"]}
        yield {**said, "measure": "net", **net, "n": record["draws"], "note": record["sentence"]}
        yield from _measured(said, _only(record, OF_SETS))
        if control is None:
            yield from _changes(record, said)


def _stage_two(results: Results) -> Iterator[Row]:
    for arm in (results.get("stage_two") or {}).get("arms", ()):
        said = {"stage": "2", "selector": arm["name"]}
        for rule, chosen in arm["selected"].items():
            under = {**said, "experiment": "arms", "rule": rule, "split": "test", "epoch": chosen["epoch"]}
            under["note"] = chosen["arm"] if chosen["arm"] != arm["name"] else None
            by_group = list(_by_group(results, values=chosen["test"], **under))
            yield from [*by_group, _worst(by_group)]
            count = sum(row["n"] for row in by_group)
            yield {**under, "measure": "plain average", "n": count, **share(chosen["plain"], count)}
            yield from _measured(under, {f"{name} average": chosen[name] for name in ("balanced", "train-weighted")})
        for point in arm["trajectory"]:
            yield from _epoch(results, {**said, "experiment": "epochs", "epoch": point["epoch"]}, point)


def _epoch(results: Results, said: Row, point: Results) -> Iterator[Row]:
    yield from _measured({**said, "split": "train"}, _only(point, ["loss"]))
    for split, values in point.items():
        if split in results["counts"]:
            yield from _by_group(results, split, values, **said)
    for place, value in enumerate(point.get("inferred", ())):
        row = {"split": "inferred", "measure": "accuracy", "note": f"inferred group {place}"}
        yield {**said, **row, "draw": place, "value": value}


def _fragility(results: Results) -> Iterator[Row]:
    stage = results.get("fragility") or {}
    rows = itertools.chain(_detected(stage), _flagged(results, stage), _points(stage), _retrained(results, stage))
    yield from ({"stage": "fragility", **row} for row in rows)


def _detected(stage: Results) -> Iterator[Row]:
    for split, rows in stage.get("detection", {}).items():
        for row in rows:
            said = {"experiment": "detection", "split": split, "selector": row["score"], "group": row["group"]}
            said |= {"n": row["count"], "note": row["needs"]}
            shares = {"AUC": row["auc"], "average precision": row["average_precision"], "of its class": row["of"]}
            yield from _measured(said, shares)
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
            yield from _measured({**said, "draw": place}, {"fragility": fragility, "minus final margin": final})


def _retrained(results: Results, stage: Results) -> Iterator[Row]:
    for row in stage.get("mitigation", ()):
        for split in ("validation", "test"):
            if split in row:
                said = {"experiment": "mitigation", "selector": row["name"]}
                by_group = list(_by_group(results, split, row[split], **said))
                yield from [*by_group, _worst(by_group)] if split == "test" else by_group
