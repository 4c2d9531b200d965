"""The tables that a run prints when it is done, of one seed or of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from neuronsurgery.study.claims import judge, render
from neuronsurgery.study.queries import over_draws, over_seeds
from neuronsurgery.study.table import Run, where


def summary(run: Run) -> str:
    """Return the printed tables of a run, of what it has.

    Accuracy per group, what 1a and 1g change, the sets of 1h, the claims, the worst groups of Stage 2 and of retrained
    last layers; of several seeds each number is a mean, with Student's 95 % interval.
    """
    several = run.about.get("kind") == "seeds"
    tables = [_accuracies(run)]
    if not several:
        tables += [_cuts(run), _controls(run)]
    tables += [_sets(run)]
    if several and not {f"1{letter}" for letter in "abcdefgh"}.isdisjoint(run.experiments):
        tables.append(render(judge(run)))
    tables += [_arms(run), _retrained(run)]
    return "\n\n".join([*filter(None, tables), _last_line(run)])


def _last_line(run: Run) -> str:
    if run.about.get("kind") == "seeds":
        said = f"Means over {len(run.seeds)} seeds [Student's 95 % interval]; - where some seed has none."
    else:
        counts = run.about["counts"][run.split]
        steps = ", ".join(f"{100 / count:.2g}" if count else "-" for count in counts)
        said = f"One image is {steps} points in these groups."
    return f"{said} Every number is in table.csv."


def _accuracies(run: Run) -> str:
    found = over_seeds(run, run.rows(experiment="accuracy"))
    rows = [[f"{split} images", *map(str, counts)] for split, counts in run.about["counts"].items()]
    for split in found["split"].unique(maintain_order=True):
        rows.append([f"{split} accuracy, %", *_per_group(run, where(found, split=split))])
    return _table("Empirical risk minimisation", ["", *run.groups], rows)


def _per_group(run: Run, rows: pl.DataFrame) -> list[str]:
    """The accuracies in percent, and a dash for groups without images, which have none."""
    by_group = {row["group"]: row for row in rows.iter_rows(named=True)}
    return [_percent(run, by_group.get(name)) for name in run.groups]


def _percent(run: Run, row: dict[str, Any] | None) -> str:
    """A share in percent, or its mean over seeds with the interval; a dash where some seed has none."""
    if row is None or row["value"] is None or row["seeds"] < len(run.seeds):
        return "-"
    ends = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if len(run.seeds) > 1 else ""
    return f"{100 * row['value']:.1f}{ends}"


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
    together = over_draws(changes) if len(changes) else changes
    rows = []
    for (fraction, neurons), cut in together.group_by("fraction", "neurons", maintain_order=True):
        draws, means = cut["draws"][0], cut["value"]
        far = [max(low, high, key=abs) for low, high in zip(cut["low"], cut["high"], strict=True)]
        cells = [f"{_points(mean)} ({_points(one)})" for mean, one in zip(means, far, strict=True)]
        rows.append(
            [f"{100 * float(str(fraction)):g} % ({neurons} neuron{'s' * (neurons != 1)}, {draws} draws)", *cells]
        )
    return _table("1g  Zero random other neurons: mean change (largest), points", ["", *run.groups], rows)


def _sets(run: Run) -> str:
    found = over_seeds(run, run.rows(experiment="1h"))
    rows = []
    keys = ("chosen_for", "selector", "group", "k")
    for (chosen_for, selector, group, k), one in found.filter(pl.col("measure") != "change").group_by(
        keys, maintain_order=True
    ):
        by_measure = {row["measure"]: row for row in one.iter_rows(named=True)}
        name = f"{group} like {chosen_for}" if selector == "matched" else str(group)
        if "net" not in by_measure:
            rows.append([f"{name}: {by_measure['impossible']['note']}", *("-" * 4)])
            continue
        p = by_measure["net"]["p"]
        cells = [_signed(run, by_measure.get(measure)) for measure in ("own", "worst_other", "net")]
        size = "" if len(run.seeds) > 1 else f" ({by_measure['net']['neurons']} found)"
        rows.append([f"{name}, k = {k}{size}", *cells, "-" if p is None else f"{p:.2f}"])
    title = "1h  Critical sets found on half A: what they take on half B, points; p among random sets"
    return _table(title, ["", "own", "worst other", "net", "p"], rows)


def _signed(run: Run, row: dict[str, Any] | None) -> str:
    if row is None or row["seeds"] < len(run.seeds):
        return "-"
    ends = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if len(run.seeds) > 1 else ""
    return f"{_points(row['value'])}{ends}"


def _arms(run: Run) -> str:
    found = over_seeds(run, run.rows(experiment="arms", measure="worst group"))
    rules = list(run.about.get("stage_two", {}).get("selections", ()))
    rows = []
    for arm in run.about.get("stage_two", {}).get("arms", ()) and found["selector"].unique(maintain_order=True):
        by_rule = {row["rule"]: row for row in where(found, selector=arm).iter_rows(named=True)}
        rows.append([str(arm), *(_percent(run, by_rule.get(rule)) for rule in rules)])
    return _table("Stage 2  Worst group of the test images, %; epoch chosen by", ["", *rules], rows)


def _retrained(run: Run) -> str:
    rows = []
    every = over_seeds(run, run.rows(experiment="mitigation", split="test"))
    for row in run.about.get("fragility", {}).get("mitigation", ()):
        own = where(every, selector=row["name"])
        worst = where(own, measure="worst group").to_dicts()
        cells = _per_group(run, where(own, measure="accuracy"))
        rows.append([row["name"], _percent(run, worst[0] if worst else None), *cells])
    return _table("Last layer retrained: test accuracy, %", ["", "worst group", *run.groups], rows)


def _points(change: float) -> str:
    return f"{100 * change:+.1f}" if round(100 * change, 1) else "0.0"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text; nothing of one without rows."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])
