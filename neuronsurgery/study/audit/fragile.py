"""Who stands out within each class, and the groups that follow."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples
from neuronsurgery.study.audit.results import Row, row_of

FEWEST: Final = 20
"""A group of fewer examples is not searched: ten are left on each half."""


@dataclass(frozen=True, eq=False)
class Fragile:
    """Who stands out within each class, and the groups that follow."""

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
        for target in sorted(set(targets.tolist())):
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
    def targets(self) -> Tensor:
        """The class of each."""
        return self.examples.targets[self.places]

    @functools.cached_property
    def classes(self) -> dict[str, Tensor]:
        """By class which of the examples are of it, bool (N,)."""
        present = sorted(set(self.targets.tolist()))
        return {name_of(self.examples.class_names, target): self.targets == target for target in present}

    @functools.cached_property
    def cells(self) -> dict[str, Tensor]:
        """By group, given or else class x fragile, which of the examples are in it, bool (N,)."""
        if self.examples.groups is not None:
            own = self.examples.groups[self.places]
            return {name: own == group for group, name in enumerate(self.examples.group_names) if (own == group).any()}
        cells = {}
        for name, own in self.classes.items():
            for fragile, said in ((False, "others"), (True, "fragile")):
                cells[f"{name}, {said}"] = own & (self.flags == fragile)
        return {name: cell for name, cell in cells.items() if cell.any()}

    def worst(self) -> tuple[str | None, Any]:
        """Return the group to search for and the places by group; or None and why there is none."""
        right = self.base > 0
        asked = {
            name: float(right[cell].double().mean())
            for name, cell in self.cells.items()
            if cell.sum() >= FEWEST and right[cell].sum() >= FEWEST / 2
        }
        inferred = self.examples.groups is None
        asked = {name: share for name, share in asked.items() if not inferred or name.endswith(", fragile")}
        if not asked or len(self.cells) < 2:
            kind = "fragile group" if inferred else "group"
            return None, f"No critical set was sought: no {kind} has {FEWEST} examples, {FEWEST // 2} of them right"
        sizes = {name: int(cell.sum()) for name, cell in self.cells.items()}
        name = min(asked, key=lambda name: (asked[name], sizes[name]))
        return name, {own: self.places[cell] for own, cell in self.cells.items() if cell.sum() >= 2}

    def worst_sentence(self) -> str:
        """Return the part with the lowest accuracy, of the given groups or else of the classes, in words."""
        rows = [row for row in self.accuracies() if row["n"] >= 1]
        kind = "groups" if self.examples.groups is not None else "classes"
        row = min((row for row in rows if row["experiment"] == kind), key=lambda row: row["value"])
        low, value, high = (100 * row[name] for name in ("low", "value", "high"))
        return f"{row['group']}, {value:.1f} % of {row['n']} [{low:.1f}, {high:.1f}]"

    def sentence(self) -> str:
        """Return how many stand out, in words."""
        counts = {name: (int(self.flags[own].sum()), int(own.sum())) for name, own in self.classes.items()}
        parts = [f"{flagged} of {count} {name}" for name, (flagged, count) in counts.items()]
        return f"Fragile are {', '.join(parts)}, by {self.by}."

    def accuracies(self) -> list[Row]:
        """Return a row for each class and each group."""
        return [
            row_of("accuracy", kind, name, "accuracy", _share(self.base[cell] > 0), n=int(cell.sum()))
            for kind, cells in (("classes", self.classes), ("groups", self.cells))
            for name, cell in cells.items()
        ]

    def flagged(self) -> list[Row]:
        """Return a row for each class and each given group: the share that is flagged."""
        rows = [("classes", name, cell) for name, cell in self.classes.items()]
        if self.examples.groups is not None:
            rows += [("groups", name, cell) for name, cell in self.cells.items()]
        return [
            row_of("fragile", kind, name, "flagged", _share(self.flags[cell]), n=int(cell.sum()))
            for kind, name, cell in rows
        ]

    def ranked(self) -> tuple[int, ...]:
        """Return the examples' places, by class, most fragile first."""
        order = sorted(range(len(self.places)), key=lambda at: (int(self.targets[at]), -float(self.scores[at])))
        return tuple(int(self.places[at]) for at in order)

    def records(self) -> tuple[Row, ...]:
        """Return a row for each example, by class, most fragile first."""
        at = {int(place): number for number, place in enumerate(self.places)}
        return tuple(
            {
                "path": self.examples.names[place],
                "class": name_of(self.examples.class_names, int(self.targets[at[place]])),
                "score": float(self.scores[at[place]]),
                "flag": int(self.flags[at[place]]),
            }
            for place in self.ranked()
        )


def _share(right: Tensor) -> tuple[float, float, float]:
    """Return a share with Wilson's 95 % interval."""
    from scipy import stats

    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return float(right.double().mean()), float(interval.low), float(interval.high)


def name_of(names: Sequence[str], target: int) -> str:
    """Return what a class is called; "class 3" where it has only its number."""
    name = names[target] if target < len(names) else str(target)
    return f"class {name}" if name.isdigit() else name
