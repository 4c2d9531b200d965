"""The tables that a run prints when it is done, of one seed or of several."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neuronsurgery.study.claims import render


def summary(results: Mapping[str, Any]) -> str:
    """Return the printed tables of a run: accuracy per group, what 1a and 1g change, the worst groups of Stage 2."""
    groups = results["groups"]
    header = ["", *groups]
    accuracy = [[f"{part} images", *map(str, results["counts"][part])] for part in results["counts"]] + [
        [f"{part} accuracy, %", *_per_group(values, results["counts"][part])]
        for part, values in results["accuracy"].items()
    ]
    tables = [_table("Empirical risk minimisation", header, accuracy)]
    split = results["settings"]["splits"][0]
    done = results.get("experiments", {})
    if "1a" in done:
        title = f"1a  Zero the top neurons of the model: change of {split} accuracy, points"
        tables.append(_table(title, header, [_cut(record) for record in done["1a"][split]]))
    if "1g" in done:
        title = "1g  Zero random other neurons: mean change (largest), points"
        tables.append(_table(title, header, _controls(done["1g"][split])))
    if "1h" in done:
        title = "1h  Critical sets found on half A: what they take on half B, points; p among random sets"
        rows = [_set(record) for record in done["1h"]["train"]]
        tables.append(_table(title, ["", "own", "worst other", "net", "p"], rows))
    if "stage_two" in results:
        rules = list(results["stage_two"]["selections"])
        title = "Stage 2  Worst group of the test images, %; epoch chosen by"
        tables.append(_table(title, ["", *rules], [_worst(arm, rules) for arm in results["stage_two"]["arms"]]))
    if "mitigation" in results.get("fragility", {}):
        title = "Last layer retrained: test accuracy, %"
        rows = [
            [row["name"], *(f"{100 * a:.1f}" for a in row.get("test", ()))]
            for row in results["fragility"]["mitigation"]
        ]
        tables.append(_table(title, header, [row + ["-"] * (len(header) - len(row)) for row in rows]))
    steps = ", ".join(f"{100 / count:.2g}" if count else "-" for count in results["counts"][split])
    return "\n\n".join([*tables, f"One image is {steps} points in these groups. Every number is in the report."])


def summary_of_seeds(together: Mapping[str, Any]) -> str:
    """Return the printed tables of several seeds, of what they have: accuracy, claims and worst groups."""
    accuracy = [
        [f"{split} accuracy, %", *_per_group(values, together["counts"][split])]
        for split, values in together["accuracy"].items()
    ]
    tables = [_table("Empirical risk minimisation", ["", *together["groups"]], accuracy)] if accuracy else []
    if together["claims"]:
        tables.append(render(together["claims"]))
    if "critical_sets" in together:
        names = ("own", "worst_other", "net", "control_net")
        rows = [
            [f"{row['group']}, k = {row['k']}", *(_percent(row.get(name, {})) for name in names)]
            for row in together["critical_sets"]
        ]
        title = "1h  Critical sets found on half A: what they take on half B, points"
        tables.append(_table(title, ["", "own", "worst other", "net", "net of the controls"], rows))
    if "stage_two" in together:
        rules = list(together["stage_two"]["selections"])
        title = "Stage 2  Worst group of the test images, %; epoch chosen by"
        tables.append(_table(title, ["", *rules], [_worst(arm, rules) for arm in together["stage_two"]["arms"]]))
    if "mitigation" in together.get("fragility", {}):
        retrained = together["fragility"]
        rows = [[row["name"], _percent(row["worst"])] for row in retrained["mitigation"]]
        rows += [[name, "-"] for name in retrained["impossible_rows"]]
        tables.append(_table("Last layer retrained: worst group of the test images, %", ["", "worst group"], rows))
    said = f"Means over {len(together['seeds'])} seeds [Student's 95 % interval]; - where some seed has none."
    return "\n\n".join([*tables, f"{said} Every number is in the report."])


def _per_group(accuracies: Iterable[float | Mapping[str, Any]], counts: Iterable[int]) -> list[str]:
    """The accuracies in percent, and a dash for groups without images, which have none."""
    values = iter(accuracies)
    return [_percent(next(values)) if count else "-" for count in counts]


def _percent(found: float | Mapping[str, Any]) -> str:
    """A share in percent, or its mean over seeds with the interval; a dash for a summary that some seed lacks."""
    if not isinstance(found, Mapping):
        return f"{100 * found:.1f}"
    ends = ", ".join(f"{100 * found[end]:.1f}" for end in ("low", "high") if end in found)
    return f"{100 * found['mean']:.1f} [{ends}]" if ends else "-"


def _worst(arm: Mapping[str, Any], rules: Sequence[str]) -> list[str]:
    selected = arm["selected"]
    return [arm["name"], *(_percent(selected[rule]["worst"]) if rule in selected else "-" for rule in rules)]


def _cut(record: Mapping[str, Any]) -> list[str]:
    chosen_for = "" if record["chosen_for"] == "all" else f" of {record['chosen_for']}"
    points = _points(change["change"] for change in record["changes"])
    return [f"top-{record['k']} by {record['criterion']}{chosen_for}", *points]


def _set(record: Mapping[str, Any]) -> list[str]:
    name = record["examples"] or f"{record['control']} like {record['chosen_for']}"
    if "impossible" in record:
        return [f"{name}: {record['impossible']}", *("-" * 4)]
    p = "-" if record["p_value"] is None else f"{record['p_value']:.2f}"
    points = _points(record[key] for key in ("own", "worst_other", "net"))
    return [f"{name}, k = {record['k']} ({record['neurons']} found)", *points, p]


def _controls(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    records = [record for record in records if record["fraction"] is not None]
    for fraction in dict.fromkeys(record["fraction"] for record in records):
        draws = [record for record in records if record["fraction"] == fraction]
        columns = list(zip(*([c["change"] for c in record["changes"]] for record in draws), strict=True))
        means = _points(statistics.mean(column) for column in columns)
        largest = _points(max(column, key=abs) for column in columns)
        neurons = draws[0]["neurons"]
        cells = [f"{mean} ({far})" for mean, far in zip(means, largest, strict=True)]
        rows.append([f"{100 * fraction:g} % ({neurons} neuron{'s' * (neurons > 1)}, {len(draws)} draws)", *cells])
    return rows


def _points(changes: Iterable[float]) -> list[str]:
    return [f"{100 * change:+.1f}" if round(100 * change, 1) else "0.0" for change in changes]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])
