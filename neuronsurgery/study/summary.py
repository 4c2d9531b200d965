"""The tables that a run prints when it is done, of one seed or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from neuronsurgery.study.claims import judge, render
from neuronsurgery.study.queries import over_draws, over_seeds
from neuronsurgery.study.table import Row, Run, where


def summary(run: Run) -> str:
    """Return the printed tables of a run, of what it has.

    Accuracy per group, what 1a and 1g change, the sets of 1h, the claims, the worst groups of Stage 2 and of retrained
    last layers; of several seeds each number is a mean, with Student's 95 % interval.
    """
    several = run.about.get("kind") == "seeds"
    tables = [_accuracies(run), *([] if several else [_cuts(run), _controls(run)]), _sets(run)]
    if several and not {f"1{letter}" for letter in "abcdefgh"}.isdisjoint(run.experiments):
        tables.append(render(judge(run)))
    said = f"Means over {len(run.seeds)} seeds [Student's 95 % interval]; - where some seed has none."
    if not several:
        counts = run.about["counts"][run.split]
        steps = ", ".join(f"{100 / count:.2g}" if count else "-" for count in counts)
        said = f"One image is {steps} points in these groups."
    tables += [_arms(run), _retrained(run), f"{said} Every number is in table.csv."]
    return "\n\n".join(filter(None, tables))


def _accuracies(run: Run) -> str:
    found = over_seeds(run, run.rows(experiment="accuracy"))
    rows = [[f"{split} images", *map(str, counts)] for split, counts in run.about["counts"].items()]
    for (split,), one in found.group_by("split", maintain_order=True):
        rows.append([f"{split} accuracy, %", *_cells(run, one, "group", run.groups)])
    return _table("Empirical risk minimisation", ["", *run.groups], rows)


def _cells(run: Run, rows: pl.DataFrame, column: str, names: Iterable[str], sign: str = "") -> list[str]:
    """The numbers of some rows, in the order of these names in a column."""
    by_name = rows.rows_by_key(column, named=True, unique=True)
    return [_number(run, by_name.get(name), sign) for name in names]


def _number(run: Run, row: Row | None, sign: str = "") -> str:
    """A share in percent or points, or its mean over seeds with the interval; a dash where some seed has none."""
    if row is None or row["value"] is None or row["seeds"] < len(run.seeds):
        return "-"
    ends = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if len(run.seeds) > 1 else ""
    return (_points(row["value"]) if sign else f"{100 * row['value']:.1f}") + ends


def _points(change: float) -> str:
    return f"{100 * change:+.1f}" if round(100 * change, 1) else "0.0"


def _cuts(run: Run) -> str:
    changes = run.rows(experiment="1a", split=run.split, measure="change")
    rows = []
    for (selector, chosen_for, k), cut in changes.group_by("selector", "chosen_for", "k", maintain_order=True):
        of = "" if chosen_for == "all" else f" of {chosen_for}"
        rows.append([f"top-{k} by {selector}{of}", *map(_points, cut["value"])])
    title = f"1a  Zero the top neurons of the model: change of {run.split} accuracy, points"
    return _table(title, ["", *run.groups], rows)


def _controls(run: Run) -> str:
    changes = run.rows(experiment="1g", split=run.split, measure="change").filter(pl.col("fraction").is_not_null())
    far = pl.when(pl.col("low").abs() >= pl.col("high").abs()).then("low").otherwise("high")
    rows = []
    for (share, count), cut in over_draws(changes).group_by("fraction", "neurons", maintain_order=True):
        name = f"{100 * float(str(share)):g} % ({count} neuron{'s' * (count != 1)}, {cut['draws'][0]} draws)"
        pairs = cut.select("value", far).iter_rows()
        rows.append([name, *(f"{_points(mean)} ({_points(farthest)})" for mean, farthest in pairs)])
    return _table("1g  Zero random other neurons: mean change (largest), points", ["", *run.groups], rows)


def _sets(run: Run) -> str:
    found = over_seeds(run, run.rows(experiment="1h")).filter(pl.col("measure") != "change")
    rows = []
    for (chosen_for, selector, group, k), one in found.group_by(
        "chosen_for", "selector", "group", "k", maintain_order=True
    ):
        name = f"{group} like {chosen_for}" if selector == "matched" else str(group)
        net = where(one, measure="net").to_dicts()
        if not net:
            rows.append([f"{name}: {where(one, measure='impossible')['note'].item()}", *("-" * 4)])
            continue
        size = "" if len(run.seeds) > 1 else f" ({net[0]['neurons']} found)"
        cells = _cells(run, one, "measure", ("own", "worst_other", "net"), sign="+")
        rows.append([f"{name}, k = {k}{size}", *cells, "-" if net[0]["p"] is None else f"{net[0]['p']:.2f}"])
    title = "1h  Critical sets found on half A: what they take on half B, points; p among random sets"
    return _table(title, ["", "own", "worst other", "net", "p"], rows)


def _arms(run: Run) -> str:
    rules = list(run.about.get("stage_two", {}).get("selections", ()))
    found = over_seeds(run, run.rows(experiment="arms", measure="worst group"))
    by_arm = found.group_by("selector", maintain_order=True)
    rows = [[str(arm), *_cells(run, one, "rule", rules)] for (arm,), one in by_arm]
    return _table("Stage 2  Worst group of the test images, %; epoch chosen by", ["", *rules], rows)


def _retrained(run: Run) -> str:
    every = over_seeds(run, run.rows(experiment="mitigation", split="test"))
    worst, accuracies = where(every, measure="worst group"), where(every, measure="accuracy")
    names = [row["name"] for row in run.about.get("fragility", {}).get("mitigation", ())]
    rows = [
        [name, shown, *_cells(run, where(accuracies, selector=name), "group", run.groups)]
        for name, shown in zip(names, _cells(run, worst, "selector", names), strict=True)
    ]
    return _table("Last layer retrained: test accuracy, %", ["", "worst group", *run.groups], rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text; nothing of one without rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])
