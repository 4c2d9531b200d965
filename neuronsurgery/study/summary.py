"""What a run prints when it is done: the accuracy of every group, and the answers that its report begins with."""

from __future__ import annotations

from collections.abc import Sequence

from neuronsurgery.study.claims import judge
from neuronsurgery.study.queries import over_seeds
from neuronsurgery.study.table import Row, Run


def summary(run: Run) -> str:
    """Return accuracies in percent, and an answer to each question about the rarest group, with its 95 % interval.

    Of several seeds numbers are means, and intervals Student's; else intervals are over the images.
    """
    several = f", mean of {len(run.seeds)} seeds [95 % interval]" if len(run.seeds) > 1 else ""
    found = over_seeds(run, run.rows(experiment="accuracy"))
    rows = []
    for (split,), one in found.group_by("split", maintain_order=True):
        by_group = one.rows_by_key("group", named=True, unique=True)
        rows.append([str(split), *(_share(run, by_group.get(name)) for name in run.groups)])
    parts = [_table([f"accuracy, %{several}", *run.groups], rows)]
    claims = [claim for claim in judge(run) if claim["question"] and claim["group"] in run.minority[:1]]
    if claims:
        header = [f"{run.minority[0]}, the rarest group in training", "", "", ""]
        parts.append(_table(header, [[claim["question"], claim["verdict"], *_number(claim)] for claim in claims]))
    return "\n\n".join([*parts, "report.html shows what these rest on; every number is in table.csv."])


def _share(run: Run, row: Row | None) -> str:
    """A share in percent, or its mean over seeds with the interval; a dash where some seed has none."""
    if row is None or row["value"] is None or row["seeds"] < len(run.seeds):
        return "-"
    ends = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if len(run.seeds) > 1 else ""
    return f"{100 * row['value']:.1f}{ends}"


def _number(claim: Row) -> tuple[str, str]:
    """The number of a claim and its interval; dashes where there is none."""
    if claim["mean"] is None:
        return "-", "-"
    ends = "-" if claim["low"] is None else f"[{claim['low']:.1f}, {claim['high']:.1f}]"
    return f"{claim['mean']:.1f} {claim['unit']}", ends


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [header, *rows])
    return "\n".join(line.rstrip() for line in lines)
