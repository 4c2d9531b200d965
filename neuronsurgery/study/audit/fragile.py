"""Who stands out within each class, and the groups that follow."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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

    Of the examples in some places (N,): `base`, their margins by the network as it is, float64; `scores`, higher is
    more fragile; `flags`, bool; what they are ranked by, in words.
    """

    examples: Examples
    places: Tensor
    base: Tensor
    scores: Tensor
    flags: Tensor
    by: str
    caveats: tuple[str, ...]

    @classmethod
    def of(cls, examples: Examples, places: Tensor, base: Tensor, other: Tensor | None, by: str) -> Fragile:
        """Return it, from the margins of the network as it is, and others that rank the examples, if there are any."""
        targets = examples.targets[places]
        scores = -(base if other is None else other)
        flags, few = torch.zeros(len(places), dtype=torch.bool), []
        for target in torch.unique(targets).tolist():
            own = (targets == target).nonzero().flatten()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of constant scores: nobody stands out
                    flags[own] = ns.infer_groups(scores[own], targets[own]).fragile
            except ValueError:
                few.append(name_of(examples.class_names, target))
        caveats = [f"In {', '.join(few)} fewer than three stand out, or are left: none is flagged."] if few else []
        if other is None:
            caveats.append(f"The network has no residual branches to cut: {by} say who is fragile, which is weaker.")
        elif "cut" in by:
            caveats.append(
                "A cut of the last branches found the rare groups of a small residual network, and none of a "
                "ResNet-18's: the weights of an early epoch rank more safely (--early)."
            )
        return cls(examples, places, base, scores, flags, by, tuple(caveats))

    @functools.cached_property
    def classes(self) -> dict[str, Tensor]:
        """By class which of the examples are of it, bool (N,)."""
        targets = self.examples.targets[self.places]
        return {
            name_of(self.examples.class_names, target): targets == target for target in torch.unique(targets).tolist()
        }

    @functools.cached_property
    def cells(self) -> dict[str, Tensor]:
        """By group, given or else class x fragile, which of the examples are in it, bool (N,)."""
        cells = {}
        if self.examples.groups is not None:
            own = self.examples.groups[self.places]
            cells = {name: own == group for group, name in enumerate(self.examples.group_names)}
        else:
            for name, own in self.classes.items():
                cells |= {f"{name}, others": own & ~self.flags, f"{name}, fragile": own & self.flags}
        return {name: cell for name, cell in cells.items() if cell.any()}

    def worst(self) -> str | None:
        """Return the group to search for; None where none has enough examples."""
        right, inferred = self.base > 0, self.examples.groups is None
        asked = {
            name: (_mean(right[cell]), int(cell.sum()))
            for name, cell in self.cells.items()
            if cell.sum() >= FEWEST and right[cell].sum() >= FEWEST / 2
            if name.endswith(", fragile") or not inferred
        }
        return min(asked, key=lambda name: asked[name]) if asked and len(self.cells) > 1 else None

    def sentences(self) -> tuple[str, str]:
        """Return how right the network is, with its worst group or else class, and how many stand out, in words."""
        kind = "classes" if self.examples.groups is None else "groups"
        row = min((row for row in self.accuracies() if row["experiment"] == kind), key=lambda row: row["value"])
        low, value, high = (100 * row[name] for name in ("low", "value", "high"))
        count, every = len(self.places), len(self.examples.targets)
        part = "" if count == every else f", a random part of {every}"
        flagged = [f"{int(self.flags[own].sum())} of {int(own.sum())} {name}" for name, own in self.classes.items()]
        return (
            f"The network is right on {100 * _mean(self.base > 0):.1f} % of {count} examples{part}; worst: "
            f"{row['group']}, {value:.1f} % of {row['n']} [{low:.1f}, {high:.1f}].",
            f"Fragile are {', '.join(flagged)}, by {self.by}.",
        )

    def accuracies(self) -> list[Row]:
        """Return a row for each class and each group."""
        return self._rows("accuracy", "accuracy", self.base > 0, self.cells)

    def flagged(self) -> list[Row]:
        """Return a row for each class and each given group: the share that is flagged."""
        return self._rows("fragile", "flagged", self.flags, {} if self.examples.groups is None else self.cells)

    def _rows(self, stage: str, measure: str, those: Tensor, groups: dict[str, Tensor]) -> list[Row]:
        return [
            row_of(stage, kind, name, measure, n=int(cell.sum()), **share(_mean(those[cell]), int(cell.sum())))
            for kind, cells in (("classes", self.classes), ("groups", groups))
            for name, cell in cells.items()
        ]

    def ranked(self) -> dict[int, Row]:
        """Return a row for each example, by its place: by class, most fragile first."""
        targets = self.examples.targets[self.places].tolist()
        order = sorted(range(len(self.places)), key=lambda at: (targets[at], -float(self.scores[at])))
        return {
            (place := int(self.places[at])): {
                "path": self.examples.names[place],
                "class": name_of(self.examples.class_names, targets[at]),
                "score": float(self.scores[at]),
                "flag": int(self.flags[at]),
            }
            for at in order
        }


def _mean(those: Tensor) -> float:
    return float(those.double().mean())


def name_of(names: Sequence[str], target: int) -> str:
    """Return what a class is called; "class 3" where it has only its number."""
    name = names[target] if target < len(names) else str(target)
    return f"class {name}" if name.isdigit() else name
