"""What a section of the page holds, and what an entry of the table of contents is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from neuronsurgery.study.report.effects import Groups

Results: TypeAlias = Mapping[str, Any]
"""The content of a run's `results.json`, or a part of it."""


@dataclass
class Section:
    """What one experiment came to on one split. All text is plain and is escaped when the page is made.

    Attributes:
        finding: one sentence of what was done and what came out.
        heading: such as "On the train split"; none where it is empty.
        split: which split the numbers are of, for the table at the top of the page; empty where that says nothing.
        figures: (file name, caption, SVG).
        more_figures: the same, folded away.
        table: HTML of the main table.
        full_table: HTML of every row, folded away.
        remarks: what follows from the numbers.
        overview: what was seen on minority groups, and on the others; not in the table at the top where both are empty.
        rows: CSV files, by name without the ending; sections may add to the same file.
    """

    finding: str
    heading: str = ""
    split: str = ""
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    more_figures: list[tuple[str, str, str]] = field(default_factory=list)
    table: str = ""
    full_table: str = ""
    remarks: list[str] = field(default_factory=list)
    overview: tuple[str, str] = ("", "")
    rows: dict[str, Sequence[Results]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An entry of the table of contents.

    Attributes:
        identifier: such as "1a"; the anchor of its heading is "e1a".
        heading: what the page calls it: "1a Zero the top neurons of the whole model".
        build: the results of a run and its groups to the sections, none where the run has nothing of it.
        stage: of which stage of a run it is, such as "1": the page says so where a run was asked for it and has nothing
            of it; empty for an entry that nothing asks for.
    """

    identifier: str
    heading: str
    build: Callable[[Results, Groups], list[Section]]
    stage: str = ""

    def asked_for(self, settings: Results) -> bool:
        """Whether a run of these settings is to have it."""
        experiments = settings.get("experiments")
        wanted = self.stage != "1" or experiments is None or self.identifier in experiments
        return bool(self.stage) and self.stage in settings.get("stages", ("1",)) and wanted


@dataclass(frozen=True)
class Chapter:
    """An entry with its sections in one run, at least one."""

    entry: Entry
    sections: Sequence[Section]
