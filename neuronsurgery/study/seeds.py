"""Several runs that differ in their seed alone: what they say together.

Each seed is a run in a folder of its own, `seed-0`, `seed-1` ..., and can be looked at alone. The folder above them
gets a `results.json` of kind "seeds" and a report of its own.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from neuronsurgery.study.claims import judge, mean_interval
from neuronsurgery.study.experiments import SIZES
from neuronsurgery.study.run import LOCK, SCHEMA, delete_run, is_begun

Results = Mapping[str, Any]


def combine(runs: Mapping[int, Results]) -> dict[str, Any]:
    """Return the results of several seeds as one value: the content of the upper `results.json`.

    Args:
        runs: the results of every run, by seed.

    Raises:
        ValueError: if there are fewer than two, or they are not of one data set and one way of training.
    """
    if len(runs) < 2:
        raise ValueError(f"combine needs the results of at least two seeds, not of {len(runs)}")
    first = next(iter(runs.values()))
    ignored = {"seed", "environment"}
    differing = sorted(
        key
        for run in runs.values()
        for key in set(first["settings"]) - ignored
        if run["settings"].get(key) != first["settings"][key]
    )
    if differing:
        raise ValueError(f"the runs differ in {', '.join(dict.fromkeys(differing))}: only the seed may differ")
    every = list(runs.values())
    kept = ("schema", "version", "settings", "environment", "network", "groups", "minority", "counts", "intervals")
    return {
        **{key: first[key] for key in kept if key in first},
        "schema": SCHEMA,
        "kind": "seeds",
        "seeds": list(runs),
        "accuracy": {split: _accuracies(every, split) for split in first["accuracy"] if _same_groups(every, split)},
        "claims": judge(every) if "experiments" in first else [],
        **_critical_sets(every),
        **{stage: together(_of_each(runs, stage)) for stage, together in STAGES.items() if stage in first},
    }


def _of_each(runs: Mapping[int, Results], stage: str) -> dict[int, Results]:
    return {seed: run[stage] for seed, run in runs.items()}


def refuse_other_files(path: Path, seeds: Sequence[int] | None = None) -> None:
    """Raise a ValueError if a folder cannot hold the runs of several seeds, because it holds something else.

    Args:
        path: the folder above `seed-0`, `seed-1` ...
        seeds: that are asked for: runs of others would fall out of the folder's results and are refused. None: runs of
            any seeds may be there.
    """
    if (path / "run.json").exists():
        raise ValueError(f"{path} holds a run of one seed: choose another folder for several with --out")
    held = _held_seeds(path)
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() and not held else []
    others = [name for name in names if name != LOCK and not _is_begun(path / name)]
    if others:
        raise ValueError(
            f"{path} holds files that are no runs of this study ({len(others)}: {', '.join(others[:5])}"
            f"{', ...' * (len(others) > 5)}): choose another folder with --out"
        )
    lost = [] if seeds is None else sorted(held - set(seeds))
    if lost:
        both = held.union(seeds or ())
        raise ValueError(
            f"{path} holds runs of the seeds {', '.join(map(str, sorted(held)))}, of which {', '.join(map(str, lost))} "
            f"would fall out of its results: ask for all of them (--seed {min(both)} --seeds "
            f"{max(both) - min(both) + 1}), choose another folder with --out, or delete these runs with --overwrite"
        )


def delete_other_seeds(path: Path, seeds: Sequence[int]) -> None:
    """Delete the runs of all seeds but these, and of them only what the study made."""
    for seed in sorted(_held_seeds(path) - set(seeds)):
        delete_run(path / f"seed-{seed}")


def _held_seeds(path: Path) -> set[int]:
    """The seeds whose runs a folder holds, finished or not."""
    found = (re.fullmatch(r"seed-(\d+)", held.parent.name) for held in path.glob("seed-*/run.json"))
    return {int(match[1]) for match in found if match}


def _is_begun(path: Path) -> bool:
    """Whether this is the folder of a seed in which nothing is but what a kill in its first write left."""
    named = path.is_dir() and re.fullmatch(r"seed-\d+", path.name) is not None
    return named and all(map(is_begun, path.iterdir()))


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Return the values of all seeds with their mean, standard deviation and Student's 95 % interval of the mean."""
    low, high = mean_interval(values)
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "low": low,
        "high": high,
    }


def _same_groups(runs: Sequence[Results], split: str) -> bool:
    """Whether the same groups have images in a split of every run; a random part may lack one in some."""
    return len({tuple(bool(count) for count in run["counts"].get(split, ())) for run in runs}) == 1


def _accuracies(runs: Sequence[Results], split: str) -> list[dict[str, Any]]:
    columns = zip(*(run["accuracy"][split] for run in runs), strict=True)
    return [summarise(column) for column in columns]


# Stage 1


SET_MEASURES: Final = ("net", "own", "worst_other", "control_net", "right_lost", "test_right_lost")
ON_RIGHT: Final = ("right_lost", "test_right_lost")


def _critical_sets(runs: Sequence[Results]) -> dict[str, Any]:
    """Return under "critical_sets" what 1h came to over the seeds, by group and size; nothing where a run lacks it."""
    if not all("1h" in run.get("experiments", {}) for run in runs):
        return {}
    sets = [_sets_of(run) for run in runs]
    rows = _rows(sets, ("group", "k"), SET_MEASURES)
    for row in rows:
        same = [one for of_run in sets for one in of_run if (one["group"], one["k"]) == (row["group"], row["k"])]
        row["found"] = sum(bool(one.get("neurons")) for one in same)
        row["p_value"] = [one.get("p_value") for one in same]
    return {"critical_sets": rows}


def _sets_of(run: Results) -> list[dict[str, Any]]:
    """Return one row per group and size of one run's 1h: zeros where no set was found, nothing of too few images."""
    records = run["experiments"]["1h"]["train"]
    rows = []
    for own in (record for record in records if record["control"] is None):
        for k in SIZES if own["k"] is None else (own["k"],):
            row = {"group": own["chosen_for"], "k": k}
            every = [r for r in records if r["chosen_for"] == row["group"] and r["control"] is not None]
            controls = [control for control in every if "impossible" not in control]
            if "impossible" not in own:
                row |= {name: own[name] for name in ("neurons", "p_value", "net", "own", "worst_other", *ON_RIGHT)}
                if not own["neurons"]:
                    row |= dict.fromkeys(ON_RIGHT, 0.0)
            if controls:
                row["control_net"] = statistics.fmean(control["net"] for control in controls if control["k"] == k)
            rows.append(row)
    return rows


# Stage 2

MEASURES = ("worst", "plain", "balanced", "train-weighted")


UNTRAINED: Final[Results] = {"impossible": "", "selected": {}, "trajectory": []}
"""What stands for an arm in a seed that has none of this name: one of several variants, where none could be trained."""


def _stage_two(runs: Mapping[int, Results]) -> dict[str, Any]:
    first = next(iter(runs.values()))
    columns = [{arm["name"]: arm for arm in run["arms"]} for run in runs.values()]
    # From the seed of most arms, so that none moves to the end only because the first seed lacks it.
    names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    arms = {name: [column.get(name, UNTRAINED) for column in columns] for name in names}
    families = {name: _said(same)["family"] for name, same in arms.items()}
    kept = ("fine_tuning_epochs", "comparison_epochs", "splits", "selections", "class_labels_of", "train_counts")
    why = {seed: run.get("not_inferred") for seed, run in runs.items()}
    return {
        **{key: first[key] for key in kept},
        "not_inferred": [{"seed": seed, "impossible": reason} for seed, reason in why.items() if reason],
        "arms": [_arm(same) for same in arms.values()],
        "differences": [
            {"arm": name, "control": control, "selection": rule, **_difference(arms[name], arms[control], rule)}
            for name in arms
            if families[name] == "paper"
            for control in arms
            if families[control] == "control"
            for rule in first["selections"]
            if all(rule in arm["selected"] for arm in (*arms[name], *arms[control]))
        ],
    }


def _said(runs: Sequence[Results]) -> dict[str, Any]:
    """Return what an arm is, in the words of the first seed that has it."""
    one = next(run for run in runs if run is not UNTRAINED)
    return {key: one[key] for key in ("name", "family", "text", "labels")}


def _arm(runs: Sequence[Results]) -> dict[str, Any]:
    """Return one arm over the seeds; a rule of selection that a seed lacks is left out, and so many are counted."""
    rules = [rule for rule in runs[0]["selected"] if all(rule in run["selected"] for run in runs)]
    return {
        **_said(runs),
        "impossible": sum("impossible" in run for run in runs),
        "selected": {rule: _measures([run["selected"][rule] for run in runs]) for rule in rules},
        "trajectory": [
            {"epoch": points[0]["epoch"], "worst": summarise([min(point["test"]) for point in points])}
            for points in zip(*(run["trajectory"] for run in runs), strict=False)  # JTT's lengths differ
        ],
    }


def _measures(chosen: Sequence[Results]) -> dict[str, Any]:
    tests = zip(*(one["test"] for one in chosen), strict=True)
    found: dict[str, Any] = {measure: summarise([one[measure] for one in chosen]) for measure in MEASURES}
    return {**found, "test": [summarise(column) for column in tests]}


def _difference(arm: Sequence[Results], control: Sequence[Results], rule: str) -> dict[str, Any]:
    """Return by how much an arm's worst group is better than a control's, seed by seed, and what that says."""
    pairs = zip(arm, control, strict=True)
    return compare([a["selected"][rule]["worst"] - b["selected"][rule]["worst"] for a, b in pairs])


def compare(differences: Sequence[float]) -> dict[str, Any]:
    """Return paired differences with their interval and a verdict: "better", "worse" or "undecided"."""
    found = summarise(differences)
    verdict = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "undecided"
    return {**found, "verdict": verdict}


# Fragility

KNOCKOUT: Final = "knockout"
RETRAINED: Final = "inferred by knockout"
"""The score, and the way to retrain the last layer, that the others are held against."""


def _fragility(by_seed: Mapping[int, Results]) -> dict[str, Any]:
    runs = list(by_seed.values())
    why = [run["impossible"] for run in runs if "impossible" in run]
    if why and not all("detection" in run for run in runs):
        return {"impossible": why[0]}
    columns = [{row["name"]: row for row in run["mitigation"]} for run in runs]
    # A method of Stage 2 that could not be trained has no row in that seed; what could not be fitted has one without
    # accuracies.
    rows = {
        name: [column[name] for column in columns if name in column]
        for name in dict.fromkeys(name for column in columns for name in column)
    }
    possible = {name: same for name, same in rows.items() if sum("worst" in row for row in same) == len(runs)}
    return {
        **({"impossible": why[0]} if why else {}),
        "edit": runs[0]["edit"],
        "images": runs[0]["images"],
        "detection": {split: _detection([run["detection"][split] for run in runs]) for split in runs[0]["detection"]},
        "detection_differences": {
            split: _detection_differences([run["detection"][split] for run in runs]) for split in runs[0]["detection"]
        },
        "flagged": {split: [run["flagged"][split] for run in runs] for split in runs[0]["flagged"]},
        "damage": {split: _damage([run["damage"][split] for run in runs]) for split in runs[0]["damage"]},
        "mitigation": [
            {
                **{key: same[0][key] for key in ("name", "labels", "images")},
                "worst": summarise([row["worst"] for row in same]),
                "test": [summarise(column) for column in zip(*(row["test"] for row in same), strict=True)],
            }
            for same in possible.values()
        ],
        "impossible_rows": {
            name: len(runs) - sum("worst" in row for row in same) for name, same in rows.items() if name not in possible
        },
        "differences": [
            {
                "arm": RETRAINED,
                "control": name,
                **compare([a["worst"] - b["worst"] for a, b in zip(possible[RETRAINED], same, strict=True)]),
            }
            for name, same in possible.items()
            if RETRAINED in possible and name != RETRAINED
        ],
    }


def _damage(runs: Sequence[Sequence[Results]]) -> list[dict[str, Any]]:
    """Return by cut its neurons in every seed, and the share of predictions that it flips."""
    return [
        {
            "cut": same[0]["cut"],
            "neurons": [row["neurons"] for row in same],
            "flips": summarise([row["flips"] for row in same]),
        }
        for same in zip(*runs, strict=True)
    ]


def _detection(runs: Sequence[Sequence[Results]]) -> list[dict[str, Any]]:
    return [
        {
            **{key: same[0][key] for key in ("score", "group", "count", "of")},
            "needs": "; ".join(dict.fromkeys(row["needs"] for row in same)),
            "auc": summarise([row["auc"] for row in same]),
            "average_precision": summarise([row["average_precision"] for row in same]),
        }
        for same in zip(*runs, strict=True)
    ]


def _detection_differences(runs: Sequence[Sequence[Results]]) -> list[dict[str, Any]]:
    """Return by group how far the AUC of the knockout is above that of each other score, seed by seed."""
    same = {(rows[0]["group"], rows[0]["score"]): [row["auc"] for row in rows] for rows in zip(*runs, strict=True)}
    return [
        {
            "group": group,
            "arm": KNOCKOUT,
            "control": score,
            **compare([a - b for a, b in zip(same[group, KNOCKOUT], values, strict=True)]),
        }
        for (group, score), values in same.items()
        if score != KNOCKOUT and (group, KNOCKOUT) in same
    ]


def _rows(runs: Sequence[Sequence[Results]], names: Sequence[str], measures: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of any seed, told apart by some names: a summary of each measure that all seeds have.

    In how many seeds the first of the measures is missing or null is the row's "impossible".
    """
    same: dict[tuple[str, ...], list[Results]] = {}
    for row in (row for run in runs for row in run):
        same.setdefault(tuple(row[name] for name in names), []).append(row)
    found = []
    for key, rows in same.items():
        values = {measure: [row[measure] for row in rows if row.get(measure) is not None] for measure in measures}
        summaries = {measure: summarise(all_) for measure, all_ in values.items() if len(all_) == len(runs)}
        lacking = len(runs) - len(values[measures[0]])
        found.append({**dict(zip(names, key, strict=True)), "impossible": lacking, **summaries})
    return found


STAGES: Final[Mapping[str, Callable[[Mapping[int, Results]], dict[str, Any]]]] = {
    "stage_two": _stage_two,
    "fragility": _fragility,
}
"""The stages after the first that are looked at over seeds: what each seed has of one -> what they say together."""
