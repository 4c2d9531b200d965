"""What stands in a report, in which order: the one place that knows every section.

A further section is a function of a run's results and its groups to a list of `Section`, in a module of its own, and
one more `Entry` here. Its figures are made by `figures`, its HTML tables by `tables`, its sentences with `wording`; the
files and the page follow from what the section holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from neuronsurgery.study.report.controls import controls
from neuronsurgery.study.report.critical_sets import critical_sets, critical_sets_over_seeds
from neuronsurgery.study.report.effects import Groups
from neuronsurgery.study.report.fragility import fragility
from neuronsurgery.study.report.layers import rewinding, within_layers
from neuronsurgery.study.report.ranks import ranks
from neuronsurgery.study.report.section import Chapter, Entry, Results, Section
from neuronsurgery.study.report.seeds import accuracies, claims
from neuronsurgery.study.report.stage_two import stage_two
from neuronsurgery.study.report.whole_model import whole_model


def _experiment(identifier: str, title: str, build: Callable[[Results, Groups, str], Section]) -> Entry:
    """Return the entry of an experiment of Stage 1, which has one section per split that it was measured on."""

    def sections(run: Results, groups: Groups) -> list[Section]:
        made = []
        for split, records in (run["experiments"].get(identifier) or {}).items():
            if records:
                section = build(run, groups, split)
                section.heading, section.split = f"On the {split} split", split
                section.rows = {identifier: _rows(split, records), **section.rows}
                made.append(section)
        return made

    return Entry(identifier, f"{identifier} {title}", sections, "1")


def _rows(split: str, records: list[Results]) -> list[Results]:
    """Return one row per record and group, or per record where it has no changes (1b)."""
    rows: list[Results] = []
    for record in records:
        plain = {"split": split} | {key: value for key, value in record.items() if key != "changes"}
        rows += [plain | change for change in record.get("changes", [{}])]
    return rows


CRITICAL_SETS: Final = "Critical sets, found on one half of the images and judged on the other"

STAGE_ONE: Final = (
    _experiment(
        "1a",
        "Zero the top neurons of the whole model",
        lambda run, groups, split: whole_model(run, groups, "1a", split),
    ),
    _experiment("1b", "Where the critical neurons rank", ranks),
    _experiment(
        "1c",
        "Random initialisation of the top neurons",
        lambda run, groups, split: whole_model(run, groups, "1c", split),
    ),
    _experiment(
        "1d", "Random noise on the top neurons", lambda run, groups, split: whole_model(run, groups, "1d", split)
    ),
    _experiment("1e", "Zero the top neurons within each layer", within_layers),
    _experiment("1f", "Rewind one layer to an earlier epoch", rewinding),
    _experiment("1g", "Controls: neurons that are not critical", controls),
    _experiment("1h", CRITICAL_SETS, critical_sets),
)

CONTENTS: Final[tuple[Entry, ...]] = (
    *STAGE_ONE,
    Entry("2", "Stage 2: mitigation without group labels", stage_two, "2"),
    Entry("fragility", "Fragility: who is memorised, found without group labels", fragility, "fragility"),
)
"""Every entry of the report of a run, in the order of the page."""

OVER_SEEDS: Final[tuple[Entry, ...]] = (
    Entry("accuracy", "Accuracy of the trained models", accuracies),
    Entry("claims", "What the paper claims of Stage 1", claims, "1"),
    Entry("1h", f"1h {CRITICAL_SETS}", critical_sets_over_seeds, "1"),
    *CONTENTS[len(STAGE_ONE) :],
)
"""Every entry of the report of several seeds."""


def contents_of(run: Results) -> tuple[Entry, ...]:
    """Return the entries that the report of these results may have."""
    return OVER_SEEDS if run.get("kind") == "seeds" else CONTENTS


def chapters_of(run: Results, groups: Groups) -> list[Chapter]:
    """Return the entries that a run has something of, with their sections."""
    built = [(entry, entry.build(run, groups)) for entry in contents_of(run)]
    return [Chapter(entry, sections) for entry, sections in built if sections]
