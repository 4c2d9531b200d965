"""What `neuronsurgery show` prints: what a file of a run folder or of the library holds, in few lines."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import polars as pl
from safetensors import SafetensorError, safe_open

import neuronsurgery as ns
from neuronsurgery.study.run import read_json
from neuronsurgery.study.table import TABLE, read_csv, where

LINES: Final = 20
WIDTH: Final = 120
TORCH: Final = (b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
"""How files of torch begin: archives and pickles."""


def describe_file(path: Path) -> str:
    """What a JSON, CSV or safetensors file holds, in at most `LINES` lines."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, such as {path / 'results.json'}")
    lines = _lines(path)
    shown = lines if len(lines) <= LINES else [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} more"]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in shown)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return _library_lines(path)
    with path.open("rb") as file:
        if file.read(4).startswith(TORCH):
            raise ValueError(
                f"{path} was written by torch.save, and show prints JSON and safetensors: look into it with "
                f"torch.load(path, weights_only=True); `neuronsurgery study --weights` takes it as it is"
            )
    return {".json": _json_lines, ".csv": _table_lines}.get(path.suffix, _tensor_lines)(path)


def _json_lines(path: Path) -> list[str]:
    found = read_json(path)
    if isinstance(found, list):
        entries = (f"  {number}: {_record(entry)}" for number, entry in enumerate(found))
        return [f"{path.name}: {len(found)} records", *entries]
    if not isinstance(found, dict):
        return [path.name, f"  {json.dumps(found)}"]
    settings = found.get("settings")
    if not isinstance(settings, dict):
        return [f"{path.name}:", *_outline(found)]
    if "counts" not in found:
        more = {"version": found.get("version"), "digests of the data": found.get("data")}
        return [f"{path.name}: the settings of a run", *_packed(settings), *_outline(more)]
    seeds = found.get("seeds", [settings.get("seed")])
    title = f"results of {settings.get('data')}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    rest = {key: value for key, value in found.items() if key not in ("groups", "schema", "seeds")}
    return [title, f"  groups: {', '.join(map(str, found.get('groups', ())))}", *_outline(rest)]


def _record(record: Any) -> str:
    """A record of an experiment: the changes in points first, group by group, then what was done."""
    if not isinstance(record, dict):
        return _text(record)
    said = {key: value for key, value in record.items() if value is not None and key not in ("changes", "names")}
    changes = [f"{100 * one['change']:+.1f}" for one in record.get("changes", ())]
    return f"{', '.join(changes)}{'; ' * bool(changes)}{_text(said)}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _outline(found: Mapping[str, Any]) -> list[str]:
    """One line per entry: its value where that is short, else how much there is."""
    lines = []
    for key, value in found.items():
        text = _text(value)
        if len(text) > WIDTH - 20 and isinstance(value, dict | list):
            names = f": {', '.join(map(str, value))}" if isinstance(value, dict) else ""
            text = f"{len(value)} entries{names}"
        lines.append(f"  {key}: {text}")
    return lines


def _packed(found: Mapping[str, Any]) -> list[str]:
    """Entries of short values, as many to a line as fit."""
    said = "; ".join(f"{key} {_text(value)}" for key, value in found.items())
    return textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _table_lines(path: Path) -> list[str]:
    """The accuracies of a run's table, and how many rows it has of what."""
    if path.name != TABLE:
        raise ValueError(f"{path} is no table of a run, which is called {TABLE}: see what it is in an editor")
    table = read_csv(path.read_bytes())
    lines = [f"{TABLE}: {len(table)} numbers"]
    for (split,), rows in where(table, experiment="accuracy").group_by("split", maintain_order=True):
        means = rows.group_by("group", maintain_order=True).agg(pl.col("value").mean())
        said = ", ".join(f"{group} {100 * value:.1f}" for group, value in means.iter_rows())
        lines.append(f"  {split} accuracy, %: {said}")
    counted = table.group_by("stage", "experiment", maintain_order=True).len()
    return [*lines, *(f"  {stage}, {experiment}: {count}" for stage, experiment, count in counted.iter_rows())]


def _tensor_lines(path: Path) -> list[str]:
    """What a safetensors file holds; what is none, or of the library, is left to `ns.load_file` and its errors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError):
        return _library_lines(path)
    if "neuronsurgery" in header:
        return _library_lines(path)
    title = f"{len(shapes)} tensors, {sum(map(math.prod, shapes.values())):,} numbers"
    if "run" in header and "epoch" in header:
        title = f"the optimiser's state after epoch {header['epoch']}: {title}"
        return [title, *_packed(json.loads(header["run"]))]
    if "epoch" in header:
        known = [(name, float(header[name])) for name in ("loss", "accuracy") if name in header]
        met = "; " * bool(known) + ", ".join(f"{name} {value:.4f}" for name, value in known)
        title = f"checkpoint after epoch {header['epoch']}{met}: {title}"
    return [title, *(f"  {name}: {'x'.join(map(str, shape)) or 'a number'}" for name, shape in shapes.items())]


def _library_lines(path: Path) -> list[str]:
    return str(ns.load_file(path)).splitlines()
