"""Experiment 1h: sets of few neurons found on one half of the training images, and judged on the other.

For every minority group that has enough images, and for as many images of each majority group that the network is as
sure of: a search on half A, whose own numbers are no evidence, and judgements on half B for one, two and three neurons.
Searches and judgements have the defaults of the library, and each is a part of its own of a run that may be killed.

Source: the question is that of You et al., "The Silent Majority", 2025; the protocol is not theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.experiments import SIZES, changes_of
from neuronsurgery.study.run import Parts
from neuronsurgery.types import Loader, Loaders

FEWEST: Final = 10
"""A group of fewer images a half is not searched: too few to tell its neurons from its images."""

FEWEST_MATCHED: Final = 5
"""Nor is a control: some of a group's images may have none that matches them."""

SCORES: Final = ("own", "worst_other", "score")
"""What a search says of a set, on the images that it was searched on."""

DRAWS: Final = 100
"""Random sets of the same layers and kinds behind a p-value."""


@dataclass(frozen=True)
class Protocol:
    """What is searched and judged, and on which images.

    Attributes:
        model: the trained model.
        where: which layers are studied.
        train: a loader per group, whose halves are searched and judged.
        test: the same of test images; empty where there are none.
        minority: the groups whose neurons are sought.
        draws: random sets behind a p-value.
        kept: what was done before a kill, and where it is written down.
        specs: the folder of the files of the edits.
        progress: whether to write lines of progress to standard error.
    """

    model: nn.Module
    where: Callable[[str, nn.Module, Tensor], bool]
    train: Mapping[str, Loader]
    test: Mapping[str, Loader]
    minority: Sequence[str]
    draws: int
    kept: Parts
    specs: Path
    progress: bool = False

    @functools.cached_property
    def halves(self) -> tuple[Loaders, Loaders]:
        """Half A and half B of the training images."""
        return ns.halves(self.train)

    @functools.cached_property
    def spread(self) -> dict[str, list[int]]:
        """By group how many images each half has."""
        found: dict[str, list[int]] = self.kept.of(
            "halves", lambda: {name: [_count(half, name) for half in self.halves] for name in self.train}
        )
        return found

    @property
    def present(self) -> dict[str, Loader]:
        """The loaders of the groups that both halves have images of."""
        return {name: loader for name, loader in self.train.items() if all(self.spread[name])}

    def cases(self) -> Iterator[Case]:
        """Yield each minority group, followed by its controls."""
        for group in self.minority:
            yield Case(self, group)
            if min(self.spread.get(group, [0])) >= FEWEST:
                yield from (Case(self, group, by) for by in self.present if by not in self.minority)


@dataclass(frozen=True)
class Case:
    """Images that are searched and judged as a group.

    Attributes:
        protocol: on which images.
        chosen_for: the minority group.
        control: None for its own images; else the majority group whose images, matched to them, are searched.
    """

    protocol: Protocol
    chosen_for: str
    control: str | None = None

    @functools.cached_property
    def matched(self) -> ns.Matched:
        """The images of the control as a group of their own."""
        assert self.control is not None
        return ns.matched(self.protocol.present, self.chosen_for, self.control, self.protocol.model)

    @functools.cached_property
    def halves(self) -> tuple[Loaders, Loaders]:
        """The images to search on, and those to judge on."""
        if self.control is not None:
            return ns.halves(self.matched)
        a, b = (_only(half, self.protocol.present) for half in self.protocol.halves)
        return a, b

    @functools.cached_property
    def said(self) -> dict[str, Any]:
        """Whose images these are, and how many; with "impossible" where they are not searched."""
        said: dict[str, Any] = self.protocol.kept.of(f"{self._name}: images", self._images)
        return {"criterion": "critical", "chosen_for": self.chosen_for, "control": self.control, **said}

    @property
    def _name(self) -> str:
        return f"{self.chosen_for} / {self.control}"

    def _images(self) -> dict[str, Any]:
        if self.control is None:
            name, gaps = self.chosen_for, {}
            sizes = self.protocol.spread.get(name, [0, 0])
        else:
            try:
                made = self.matched
            except ValueError as error:
                return {"examples": None, "impossible": str(error)}
            name, gaps = made.name, {"gap": made.gap, "largest_gap": made.largest_gap, "unmatched": made.unmatched}
            sizes = [_count(half, name) for half in self.halves]
        said = {"examples": name, "searched": sizes[0], "judged": sizes[1], **gaps}
        fewest = FEWEST if self.control is None else FEWEST_MATCHED
        if min(sizes) < fewest:
            said["impossible"] = f"too few: {sizes[0]} and {sizes[1]} images in the halves, {fewest} are asked for"
        return said

    def records(self, number: int) -> list[dict[str, Any]]:
        """Return one record for each size, or one that says why there is none.

        Args:
            number: of the first record among all, for the names of its files.
        """
        if "impossible" in self.said:
            return [{**self.said, "k": None}]
        self._tell("searched")
        searched = self.protocol.kept.of(f"{self._name}: search", self._search)
        records = []
        for place, k in enumerate(SIZES):
            self._tell(f"judged, k = {k}")
            judged = self.protocol.kept.of(
                f"{self._name}: {k}", functools.partial(self._judged, searched, k, number + place)
            )
            records.append({**self.said, "k": k, **judged})
        return records

    def _tell(self, what: str) -> None:
        if self.protocol.progress:
            sys.stderr.write(f"1h: {self.said['examples']} {what}\n")

    def _found(self, **fewer: Any) -> ns.Critical:
        searching, name = self.halves[0], self.said["examples"]
        return ns.find_critical(self.protocol.model, searching, name, where=self.protocol.where, **fewer)

    def _search(self) -> dict[str, Any]:
        """Return what is kept of a search: the best set of every size, by the places among all candidates."""
        found = self._found()
        places = {candidate: place for place, candidate in enumerate(found.kinds.candidates())}
        return {"bests": [_plain(best, places) for best in found.bests], "cost": dict(found.cost)}

    @functools.cached_property
    def critical(self) -> ns.Critical:
        """The result of the search, from what was kept of it: of this process or of one that was killed.

        The shortest search, of one backward pass and one edit, knows the examples and how neurons are held at their
        means; the sets that were found are put in the place of its own.
        """
        found = self._found(k=1, pool=1, width=1)
        kept = self.protocol.kept[f"{self._name}: search"]["bests"]
        bests = tuple(None if best is None else _restored(found, **best) for best in kept)
        path = tuple(best or found.path[0] for best in bests)  # which nothing here reads
        return dataclasses.replace(found, bests=bests, path=path)

    def _judged(self, searched: Mapping[str, Any], k: int, number: int) -> dict[str, Any]:
        """Return what a set takes from whom on half B and on the test images; its edit is written to a file."""
        protocol, name = self.protocol, self.said["examples"]
        found = self.critical.within(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few images to spare, whose counts are in the record
            draws = protocol.draws if self.control is None else 0  # a control is one itself
            verdict = ns.judge(found, protocol.model, self.halves[1], name, draws=draws)
        if found.neurons:
            protocol.specs.mkdir(exist_ok=True)
            ns.save_file(found.edit, protocol.specs / f"1h-{number:03d}.safetensors")
        own, worst, lost, changes = _look(protocol.model, found.edit, self.halves[1], name)
        return {
            "neurons": len(found.neurons),
            "names": [str(neuron) for neuron in found.neurons],
            "kinds": [] if found.found is None else list(found.found.kinds),
            "cost": searched["cost"],
            "own": own,
            "worst_other": worst,
            "net": verdict.net,
            "net_low": verdict.net_interval[0],
            "net_high": verdict.net_interval[1],
            "p_value": verdict.p_value,
            "draws": len(verdict.controls),
            "distinct": verdict.distinct,
            "right_lost": lost,
            **self._on_test(found.edit),
            "sentence": verdict.sentence,
            "changes": changes,
        }

    def _on_test(self, edit: ns.Edit) -> dict[str, Any]:
        """Return what a group's set takes on the test images; null for controls, which are no group there."""
        own = worst = lost = None
        if self.control is None and self.chosen_for in self.protocol.test and len(self.protocol.test) > 1:
            own, worst, lost, _ = _look(self.protocol.model, edit, self.protocol.test, self.chosen_for)
        return {"test_own": own, "test_worst_other": worst, "test_right_lost": lost}


def critical_sets(protocol: Protocol) -> list[dict[str, Any]]:
    """Return the records of 1h: for each minority group and each of its controls one per size."""
    records: list[dict[str, Any]] = []
    for case in protocol.cases():
        records += case.records(len(records))
    return records


def _look(
    model: nn.Module, edit: ns.Edit, loaders: Loaders, name: str
) -> tuple[float, float, float | None, list[dict[str, Any]]]:
    """Return a group's change, that of the other group that loses most, the share of its right images that are lost."""
    swept = ns.sweep(model, {"found": edit}, loaders)
    change = swept.change("found")
    own = [place for place, group in enumerate(swept.members) if group == name]
    right, after = swept.values()[own] > 0, swept.values("found")[own] > 0
    lost = float((right & ~after).sum() / right.sum()) if right.any() else None
    worst = min(value for group, value in change.items() if group != name)
    return change[name], worst, lost, changes_of(swept, "found")


def _only(half: Loaders, groups: Collection[str]) -> Loaders:
    assert isinstance(half, Mapping)  # as what it is half of
    return {name: loader for name, loader in half.items() if name in groups}


def _count(loaders: Loaders, name: str) -> int:
    """Return how many images of a group a half has."""
    if isinstance(loaders, Mapping):
        return sum(len(batch) for batch in loaders[name])
    return sum(list(batch.groups).count(name) for batch in loaders)


def _plain(best: Any, places: Mapping[Any, int]) -> dict[str, Any] | None:
    """Return what is kept of a set that a search has found; None of none."""
    if best is None:
        return None
    scores = {name: getattr(best, name) for name in SCORES}
    return {"chosen": sorted(places[candidate] for candidate in best.chosen), **scores}


def _restored(like: ns.Critical, chosen: Sequence[int], **scores: float) -> Any:
    """Return a set as the search has it, from the places of its candidates and its scores."""
    candidates, kinds = list(like.kinds.candidates()), like.kinds
    layers = list(kinds.layout)
    members = sorted((candidates[place] for place in chosen), key=lambda one: (layers.index(one.layer), one.neuron))
    return dataclasses.replace(
        like.path[0],
        neurons=functools.reduce(lambda a, b: a | b, (ns.Neurons({one.layer: [one.neuron]}) for one in members)),
        kinds=tuple(kinds.name(one.kind) for one in members),
        edit=kinds.edit(members),
        chosen=frozenset(members),
        **scores,
    )
