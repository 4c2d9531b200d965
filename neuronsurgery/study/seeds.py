"""Several runs that differ in their seed alone: what they say together.

Each seed is a run in a folder of its own, `seed-0`, `seed-1` ..., and can be looked at alone. The folder above them
gets a `results.json` of kind "seeds", `claims.md`, and a report.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuronsurgery.study.claims import judge, mean_interval
from neuronsurgery.study.run import SCHEMA

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
        if run["settings"][key] != first["settings"][key]
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
        "accuracy": {split: _accuracies(every, split) for split in first["accuracy"]},
        "claims": judge(every) if "experiments" in first else [],
    }


def refuse_other_files(path: Path) -> None:
    """Raise a ValueError if a folder cannot hold the runs of several seeds, because it holds something else."""
    if (path / "run.json").exists():
        raise ValueError(f"{path} holds a run of one seed: choose another folder for several with --out")
    if path.exists() and any(path.iterdir()) and not any(path.glob("seed-*/run.json")):
        raise ValueError(f"{path} holds files that are no runs of this study: choose another folder with --out")


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


def _accuracies(runs: Sequence[Results], split: str) -> list[dict[str, Any]]:
    columns = zip(*(run["accuracy"][split] for run in runs), strict=True)
    return [summarise(column) for column in columns]
