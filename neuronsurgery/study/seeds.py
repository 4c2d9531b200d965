"""The folder of several runs that differ in their seed alone.

Each seed is a run in a folder of its own, `seed-0`, `seed-1` ..., and can be looked at alone. The folder above them
has a `table.csv` of all, a `results.json` of kind "seeds" and a report of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from neuronsurgery.study.run import LOCK, delete_run, is_begun, refuse_others


def refuse_other_files(path: Path, seeds: Sequence[int] | None = None) -> None:
    """Raise a ValueError if a folder cannot hold the runs of several seeds, because it holds something else.

    `seeds` are those that are asked for: runs of others would fall out of its results. None: any may be there.
    """
    if (path / "run.json").exists():
        raise ValueError(f"{path} holds a run of one seed: choose another folder for several with --out")
    held = _held_seeds(path)
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() and not held else []
    others = [name for name in names if name != LOCK and not _is_begun(path / name)]
    refuse_others(path, others, "no runs of this study")
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
    names = (held.parent.name.removeprefix("seed-") for held in path.glob("seed-*/run.json"))
    return {int(name) for name in names if name.isdecimal()}


def _is_begun(path: Path) -> bool:
    """Whether this is the folder of a seed in which nothing is but what a kill in its first write left."""
    named = path.is_dir() and re.fullmatch(r"seed-\d+", path.name) is not None
    return named and all(map(is_begun, path.iterdir()))
