"""Experiment 1h: sets of few neurons found on one half of the training images, and judged on the other.

For every minority group that has enough images, and for as many images of each majority group that the network is as
sure of: a search on half A, whose own numbers are no evidence, and judgements on half B for one, two and three neurons.
Searches and judgements have the defaults of the library, and each is a part of its own of a run that may be killed.

Source: the question is that of You et al., "The Silent Majority", 2025; the protocol is not theirs.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.experiments import SIZES, changes_of
from neuronsurgery.study.run import Parts
from neuronsurgery.types import Loader, Loaders

FEWEST: Final = 10  # images a half: of fewer, a group's neurons cannot be told from its images
FEWEST_MATCHED: Final = 5  # the same of a control, since some of a group's images may have none that matches them
DRAWS: Final = 100  # random sets of the same layers and kinds behind a p-value


@dataclass(frozen=True)
class Protocol:
    """What is searched and judged: the layers of a model for the groups of `minority`.

    `train`, whose halves are searched and judged, and `test`, which may be empty, have a loader per group. `draws`
    random sets are behind a p-value. What is done is written down in `kept`, and the edits in the folder `specs`.
    """

    model: nn.Module
    where: Callable[[str, nn.Module, Tensor], bool]
    train: Mapping[str, Loader]
    test: Mapping[str, Loader]
    minority: Sequence[str]
    draws: int
    kept: Parts
    specs: Path

    @functools.cached_property
    def halves(self) -> tuple[Any, Any]:
        """Half A and half B of the training images, a loader per group each."""
        return ns.halves(self.train)

    @functools.cached_property
    def spread(self) -> dict[str, list[int]]:
        """By group how many images each half has."""
        return {name: [_count(half, name) for half in self.halves] for name in self.train}

    @property
    def present(self) -> dict[str, Loader]:
        """The loaders of the groups that both halves have images of."""
        return {name: loader for name, loader in self.train.items() if all(self.spread[name])}


@dataclass(frozen=True)
class Case:
    """Images that are searched and judged as a group: those of a minority group, or a control.

    A control is the images of a majority group that are matched to those of the minority group that it is `chosen_for`.
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
        a, b = ({name: half[name] for name in self.protocol.present} for half in self.protocol.halves)
        return a, b

    @functools.cached_property
    def said(self) -> dict[str, Any]:
        """Whose images these are, and how many; with "impossible" where they are not searched."""
        said: dict[str, Any] = {"criterion": "critical", "chosen_for": self.chosen_for, "control": self.control}
        if self.control is None:
            said["examples"], fewest = self.chosen_for, FEWEST
            sizes = self.protocol.spread.get(self.chosen_for, [0, 0])
        else:
            try:
                made = self.matched
            except ValueError as error:
                return {**said, "examples": None, "impossible": str(error)}
            said |= {
                "examples": made.name,
                **{name: getattr(made, name) for name in ("gap", "largest_gap", "unmatched")},
            }
            sizes, fewest = [_count(half, made.name) for half in self.halves], FEWEST_MATCHED
        said |= {"searched": sizes[0], "judged": sizes[1]}
        if min(sizes) < fewest:
            said["impossible"] = f"too few: {sizes[0]} and {sizes[1]} images in the halves, {fewest} are asked for"
        return said

    def _kept(self, part: str, compute: Callable[[], Any]) -> Any:
        return self.protocol.kept.of(f"{self.chosen_for} / {self.control}: {part}", compute)

    def records(self, number: int) -> list[dict[str, Any]]:
        """Return one record for each size, or one that says why there is none; files are numbered from `number`."""
        if "impossible" in self.said:
            return [{**self.said, "k": None}]
        return [
            {**self.said, "k": k, **self._kept(str(k), functools.partial(self._judged, k, place))}
            for place, k in enumerate(SIZES, start=number)
        ]

    def _found(self, **fewer: Any) -> ns.Critical:
        searching, name = self.halves[0], self.said["examples"]
        return ns.find_critical(self.protocol.model, searching, name, where=self.protocol.where, **fewer)

    @functools.cached_property
    def critical(self) -> ns.Critical:
        """The result of the search, from what was kept of it: of this process or of one that was killed.

        Of the best set of every size are kept its places among all candidates, and its scores. The shortest search, of
        one backward pass and one edit, knows the examples and how neurons are held at their means; the sets that were
        found are put in the place of its own.
        """

        def search() -> dict[str, Any]:
            sys.stderr.write(f"1h: {self.said['examples']} searched\n")
            found = self._found()
            places = {candidate: place for place, candidate in enumerate(found.kinds.candidates())}
            bests = [
                best and [sorted(map(places.__getitem__, best.chosen)), best.own, best.worst_other, best.score]
                for best in found.bests
            ]
            return {"bests": bests, "cost": dict(found.cost)}

        kept = self._kept("search", search)
        found = self._found(k=1, pool=1, width=1)
        bests = tuple(None if best is None else _restored(found, *best) for best in kept["bests"])
        # Of a path the length alone is read here.
        return replace(found, bests=bests, path=found.path * len(bests), cost=kept["cost"])

    def _judged(self, k: int, number: int) -> dict[str, Any]:
        """Return what a set takes from whom on half B and on the test images; its edit is written to a file."""
        protocol, name = self.protocol, self.said["examples"]
        found = self.critical.within(k)
        sys.stderr.write(f"1h: {name} judged, k = {k}\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few images to spare, whose counts are in the record
            draws = protocol.draws if self.control is None else 0  # a control is one itself
            verdict = ns.judge(found, protocol.model, self.halves[1], name, draws=draws)
        if found.neurons:
            protocol.specs.mkdir(exist_ok=True)
            ns.save_file(found.edit, protocol.specs / f"1h-{number:03d}.safetensors")
        own, worst, lost, changes = _look(protocol.model, found.edit, self.halves[1], name)
        tested: Sequence[Any] = [None] * 4  # a control is no group of the test images
        if self.control is None and name in protocol.test and len(protocol.test) > 1:
            tested = _look(protocol.model, found.edit, protocol.test, name)
        return {
            "neurons": len(found.neurons),
            "names": [str(neuron) for neuron in found.neurons],
            "kinds": [] if found.found is None else list(found.found.kinds),
            "cost": dict(found.cost),
            "own": own,
            "worst_other": worst,
            "net": verdict.net,
            "net_low": verdict.net_interval[0],
            "net_high": verdict.net_interval[1],
            "p_value": verdict.p_value,
            "draws": len(verdict.controls),
            "distinct": verdict.distinct,
            "right_lost": lost,
            **dict(zip(("test_own", "test_worst_other", "test_right_lost"), tested, strict=False)),
            "sentence": verdict.sentence,
            "changes": changes,
        }


def critical_sets(protocol: Protocol) -> list[dict[str, Any]]:
    """Return the records of 1h: for each minority group and each of its controls one per size."""
    records: list[dict[str, Any]] = []
    for group in protocol.minority:
        enough = min(protocol.spread.get(group, [0])) >= FEWEST
        controls = [by for by in protocol.present if by not in protocol.minority] if enough else []
        for control in (None, *controls):
            records += Case(protocol, group, control).records(len(records))
    return records


def _look(
    model: nn.Module, edit: ns.Edit, loaders: Loaders, name: str
) -> tuple[float, float, float | None, list[dict[str, Any]]]:
    """Return a group's change, that of the other group that loses most, and the share of its right images lost."""
    swept = ns.sweep(model, {"found": edit}, loaders)
    change = swept.change("found")
    own = [place for place, group in enumerate(swept.members) if group == name]
    right, after = swept.values()[own] > 0, swept.values("found")[own] > 0
    lost = float((right & ~after).sum() / right.sum()) if right.any() else None
    worst = min(value for group, value in change.items() if group != name)
    return change[name], worst, lost, changes_of(swept)["found"]


def _count(loaders: Loaders, name: str) -> int:
    """Return how many images of a group a half has."""
    if isinstance(loaders, Mapping):
        return sum(len(batch) for batch in loaders[name])
    return sum(list(batch.groups).count(name) for batch in loaders)


def _restored(like: ns.Critical, chosen: Sequence[int], own: float, worst_other: float, score: float) -> Any:
    """Return a set as a search has it, from the places of its candidates and its scores."""
    kinds, layout, candidates = like.kinds, like.kinds.layout, list(like.kinds.candidates())
    flat = {candidates[place]: layout.starts[candidates[place].layer] + candidates[place].neuron for place in chosen}
    members = sorted(flat, key=flat.__getitem__)
    return replace(
        like.path[0],
        neurons=layout.neurons(flat.values()),
        kinds=tuple(kinds.name(one.kind) for one in members),
        edit=kinds.edit(members),
        chosen=frozenset(members),
        own=own,
        worst_other=worst_other,
        score=score,
    )
