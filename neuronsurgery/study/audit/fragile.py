"""Who stands out within each class, and the groups that follow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl
import torch
from torch import Tensor

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples
from neuronsurgery.study.audit.results import Row, row_of
from neuronsurgery.study.table import share

FEWEST: Final = 20
"""A group of fewer examples is not searched: ten are left on each half."""


@dataclass(frozen=True, eq=False)
class Fragile:
    """Who stands out within each class, and the groups that follow.

    `table` has a row for each example, by class and the most fragile first: its `place`, `path`, number (`target`) and
    name of the `class`, number (`cell`) and name of the `group`, whether the network is `right`, `score`, `flag`. The
    groups are those given, or else class x fragile. `by` says in words what the scores are.
    """

    examples: Examples
    table: pl.DataFrame
    by: str
    caveats: tuple[str, ...]

    @classmethod
    def of(cls, examples: Examples, places: Tensor, base: Tensor, other: Tensor | None, by: str) -> Fragile:
        """Return it, from the margins of the network as it is, and others that rank the examples, if there are any."""
        targets, scores = examples.targets[places], -(base if other is None else other)
        flags, few = torch.zeros(len(places), dtype=torch.bool), []
        for target in torch.unique(targets).tolist():
            own = (targets == target).nonzero().flatten()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of constant scores: nobody stands out
                    flags[own] = ns.infer_groups(scores[own], targets[own]).fragile
            except ValueError:
                few.append(_name_of(examples.class_names, target))
        caveats = [f"In {', '.join(few)} fewer than three stand out, or are left: none is flagged."] if few else []
        if other is None:
            caveats.append(f"The network has no residual branches to cut: {by} say who is fragile, which is weaker.")
        elif "cut" in by:
            caveats.append(
                "A cut of the last branches found the rare groups of a small residual network, and none of a "
                "ResNet-18's: the weights of an early epoch rank more safely (--early)."
            )
        columns = {"place": places, "target": targets, "right": base > 0, "score": scores, "flag": flags.long()}
        columns["cell"] = 2 * targets + flags if examples.groups is None else examples.groups[places]
        rows = pl.DataFrame({name: column.numpy() for name, column in columns.items()})
        table = rows.sort("target", "score", descending=[False, True], maintain_order=True)
        return cls(examples, _named(table, examples), by, tuple(caveats))

    def _parts(self, kind: str) -> Iterator[tuple[str, pl.DataFrame]]:
        """Yield the name and the rows of each of the "classes", or of the "groups"."""
        number, name = {"classes": ("target", "class"), "groups": ("cell", "group")}[kind]
        for rows in self.table.sort(number, maintain_order=True).partition_by(number, maintain_order=True):
            yield rows[name][0], rows

    def worst(self) -> tuple[str | None, list[str]]:
        """Return the group to search for, None where none has enough examples, and those that are worse but too small.

        Of inferred groups the fragile ones are meant.
        """
        groups = {name: rows["right"] for name, rows in self._parts("groups")}
        asked = [name for name in groups if name.endswith(", fragile") or self.examples.groups is not None]
        asked.sort(key=lambda name: (groups[name].mean(), len(groups[name])))
        for place, name in enumerate(asked):
            if len(groups) > 1 and len(groups[name]) >= FEWEST and groups[name].sum() >= FEWEST / 2:
                return name, asked[:place]
        return None, []

    def places(self) -> dict[str, Tensor]:
        """Return the places of the examples of each group that has at least two, ascending."""
        parts = {name: torch.tensor(rows["place"].sort().to_list()) for name, rows in self._parts("groups")}
        return {name: places for name, places in parts.items() if len(places) > 1}

    def sentences(self) -> tuple[str, str]:
        """Return how right the network is, with its worst group or else class, and how many stand out, in words."""
        kind = "classes" if self.examples.groups is None else "groups"
        row = min(self._rows("accuracy", "accuracy", "right", kind), key=lambda row: row["value"])
        low, value, high = (100 * row[name] for name in ("low", "value", "high"))
        count, every, right = len(self.table), len(self.examples.targets), self.table["right"].sum()
        part = "" if count == every else f", a random part of {every}"
        flagged = [f"{rows['flag'].sum()} of {len(rows)} {name}" for name, rows in self._parts("classes")]
        return (
            f"The network is right on {100 * right / count:.1f} % of {count} examples{part}; worst: "
            f"{row['group']}, {value:.1f} % of {row['n']} [{low:.1f}, {high:.1f}].",
            f"Fragile are {', '.join(flagged)}, by {self.by}.",
        )

    def rows(self) -> list[Row]:
        """Return the accuracy of each class and group, and the share flagged, but not of groups inferred by that."""
        flagged = ["classes"] if self.examples.groups is None else ["classes", "groups"]
        accuracies = self._rows("accuracy", "accuracy", "right", "classes", "groups")
        return [*accuracies, *self._rows("fragile", "flagged", "flag", *flagged)]

    def _rows(self, stage: str, measure: str, column: str, *kinds: str) -> Iterator[Row]:
        for kind in kinds:
            for name, rows in self._parts(kind):
                share_of_all = share(int(rows[column].sum()) / len(rows), len(rows))
                yield row_of(stage, kind, name, measure, n=len(rows), **share_of_all)


def _named(table: pl.DataFrame, examples: Examples) -> pl.DataFrame:
    """The same rows with names."""
    paths = [examples.names[place] for place in table["place"]]
    classes = [_name_of(examples.class_names, target) for target in table["target"]]
    if examples.groups is None:
        kinds = ["fragile" if flag else "others" for flag in table["flag"]]
        groups = [f"{name}, {kind}" for name, kind in zip(classes, kinds, strict=True)]
    else:
        groups = [examples.group_names[cell] for cell in table["cell"]]
    return table.with_columns(pl.Series("path", paths), pl.Series("class", classes), pl.Series("group", groups))


def _name_of(names: Sequence[str], target: int) -> str:
    """Return what a class is called; "class 3" where it has only its number."""
    name = names[target] if target < len(names) else str(target)
    return f"class {name}" if name.isdigit() else name
