"""The audit: accuracy, who is fragile, and which few neurons carry the worst group, of a network as it is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.audit.examples import Examples, from_loader
from neuronsurgery.study.audit.fragile import FEWEST, Fragile
from neuronsurgery.study.audit.planning import DRAWS, FIRST, Plan, make_plan
from neuronsurgery.study.audit.results import Audit, Row, row_of
from neuronsurgery.study.readers.tables import first_of
from neuronsurgery.study.run import Parts, at_work
from neuronsurgery.study.stage_fragility import knockout
from neuronsurgery.study.training import digest


def audit(
    model: nn.Module,
    images: Examples | Iterable[Any],
    *,
    class_names: Sequence[str] | None = None,
    group_names: Sequence[str] | None = None,
    early: nn.Module | None = None,
    budget: float | None = None,
    k: int = 3,
    predict: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    batch: int | None = None,
    out: Path | str | None = None,
    anyway: bool = False,
    progress: bool = False,
    note: str = "",
) -> Audit:
    """Return how right a network is, whom it remembers, and which neurons carry its worst group; nothing is trained.

    - **Accuracy** of every class, and of every group where groups are known, with Wilson's interval.
    - **Who is fragile**: the last residual branches are cut, and the examples of a class whose margin falls out of its
      others' (Tukey's fence) are flagged. Where `early` is given its margins take that place, and without such branches
      those of the network as it is, which the answer says.
    - **A critical set**: the group of lowest accuracy (of at least 20 examples; among inferred groups a fragile one) is
      searched for at most k neurons on one half of its examples and judged on the other half.

    Args:
        model: any classifier; not changed.
        images: `Examples`, or any re-iterable of batches (inputs, targets) or (inputs, targets, groups).
        class_names: of class 0, 1, ..., for a loader.
        group_names: of group 0, 1, ..., for a loader.
        early: the same network after its first epochs, to rank the examples by what it had wrong then.
        budget: seconds to keep to: where all examples take longer, a part is looked at, and the answers say which.
        k: how many neurons at most.
        predict: the model's output -> logits.
        seed: of the halves, the parts and the controls.
        batch: examples in a batch; None takes the size that goes fastest.
        out: a folder to keep finished parts in, so that an audit that was stopped goes on; None keeps nothing.
        anyway: go on where the network is no better than chance.
        progress: write lines of progress to standard error.
        note: what the network is, for the page.

    Raises:
        ValueError: if there are classes that the network has no logit for, too few examples, or it is no better than
            chance on the first of them (most likely another normalisation, or another order of the classes).
        RuntimeError: if another audit is at work in the folder.

    Example:
        >>> from neuronsurgery.study.data import synthetic
        >>> from neuronsurgery.study.network import small_resnet
        >>> split = synthetic().validation
        >>> batches = [(split.images[i : i + 50], split.targets[i : i + 50]) for i in range(0, 200, 50)]
        >>> print(audit(small_resnet(), batches, k=1, anyway=True).answers[0])  # doctest: +ELLIPSIS
        The network is right on ...
    """
    examples = images if isinstance(images, Examples) else from_loader(images, class_names, group_names)
    auditing = _Auditing(model, examples, early, budget, k, predict, seed, batch, anyway, progress)
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        held.enter_context(at_work(folder))
        return auditing.run(folder, note or type(model).__name__)


def plan(
    model: nn.Module,
    images: Examples | Iterable[Any],
    *,
    budget: float | None = None,
    predict: Callable[[Any], Tensor] | None = None,
    batch: int | None = None,
    anyway: bool = False,
) -> Plan:
    """Return what `audit` would do with these arguments and how long it would take; nothing is written.

    A few batches are timed.

    Raises:
        ValueError: as `audit` does before anything long begins.
    """
    examples = images if isinstance(images, Examples) else from_loader(images)
    return _Auditing(model, examples, budget=budget, predict=predict, batch=batch, anyway=anyway).plan()


@dataclass(frozen=True, eq=False)
class _Auditing:
    """One audit: see `audit`."""

    model: nn.Module
    examples: Examples
    early: nn.Module | None = None
    budget: float | None = None
    k: int = 3
    predict: Callable[[Any], Tensor] | None = None
    seed: int = 0
    batch: int | None = None
    anyway: bool = False
    progress: bool = False

    def run(self, folder: Path, note: str) -> Audit:
        """Return what is found, step by step, each part written to the folder when it is done."""
        kept = Parts(folder / "parts", key := self._key())
        if "plan" in kept:
            self._tell(f"{len(kept)} parts are there from before, the first of them the plan")
        else:
            self._tell("a few batches, to see what it will cost")
            kept.keep({"plan": asdict(self.plan())})
        plan = Plan(**kept["plan"])
        self._tell(str(plan))
        places = self._order[: plan.scored].sort().values
        found = Fragile.of(self.examples, places, *self._margins(places, plan, kept), self._ranked_by)
        # By the key: of an audit with other settings in the same folder the cut is another.
        critical, edit = self._critical(found, plan, kept, folder / "parts" / f"{key}.safetensors")
        known = {"critical": edit, "knockout": self.edit if self.early is None else None}
        return Audit(
            answers=(*found.sentences(), critical["said"]),
            table=(*found.rows(), *critical["rows"]),
            fragile=tuple(found.table.select("path", "class", "score", "flag").to_dicts()),
            places=tuple(found.table["place"]),
            edits={name: value for name, value in known.items() if value is not None},
            caveats=(*found.caveats, *critical["caveats"]),
            note=(note, *self._notes(plan)),
        )

    def _key(self) -> str:
        """What the parts depend on."""
        weights = [None if model is None else digest(model.state_dict().values()) for model in (self.model, self.early)]
        said = (weights, self.examples.digest, self.budget, self.batch, self.k, self.seed)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def _notes(self, plan: Plan) -> list[str]:
        groups = f"{len(self.examples.group_names)} groups" if self.examples.group_names else "no groups given"
        return [
            f"{len(self.examples.targets)} examples, {len(self.examples.class_names)} classes, {groups}",
            f"planned: {'; '.join(map(str.strip, str(plan).splitlines())).replace(':;', ':')}",
            f"neuronsurgery {version('neuronsurgery')}, torch {torch.__version__}, seed {self.seed}",
        ]

    def _tell(self, what: str) -> None:
        if self.progress:
            sys.stderr.write(f"audit: {what}\n")
            sys.stderr.flush()

    @functools.cached_property
    def _order(self) -> Tensor:
        """The places of all examples, at random."""
        return torch.randperm(len(self.examples.targets), generator=torch.Generator().manual_seed(self.seed))

    @functools.cached_property
    def _few(self) -> Any:
        """A batch of two examples."""
        return next(iter(self.examples.batches(torch.arange(min(2, len(self.examples.targets))), 2)))

    @functools.cached_property
    def edit(self) -> ns.Edit | None:
        """The cut of the last residual branches, None for a network that has none."""
        try:
            return knockout(self.model, self._few, predict=self.predict)
        except (ValueError, ns.CaptureError):
            return None

    # Before anything long

    def plan(self) -> Plan:
        """Return what will be done, after a look at the first examples."""
        budget = math.inf if self.budget is None else self.budget
        until = time.perf_counter() + 0.8 * budget  # what is measured is not what will be
        self._refuse()
        return make_plan(self.model, self.examples, self.edit, {"predict": self.predict}, self.batch, until)

    def _refuse(self) -> None:
        """Raise a ValueError where the classes are not the network's, or it seems to see something else than images."""
        targets, names = self.examples.targets, self.examples.class_names
        if len(targets) < 2 * FEWEST:
            raise ValueError(f"audit: {len(targets)} examples are too few to say anything: give at least {2 * FEWEST}")
        places = self._order[:FIRST].sort().values
        logits = torch.cat([self._logits(batch) for batch in self.examples.batches(places, 50)])
        classes = logits.shape[1]
        other = [str(target) for target in torch.unique(targets).tolist() if not 0 <= target < classes]
        if other:
            raise ValueError(
                f"audit: the network has {classes} classes, but there are examples of classes {first_of(other, 10)}: "
                f"pass the network that was trained on these classes"
            )
        if len(names) not in (0, classes) and not all(name.isdigit() for name in names):
            raise ValueError(
                f"audit: the network has {classes} classes and the examples name {len(names)} ({first_of(names, 10)}): "
                f"call the labels, or the subfolders, by the network's own numbers, 0 to {classes - 1}"
            )
        right, own = logits.argmax(1) == targets[places], targets[places]
        recall = [float(right[own == target].double().mean()) for target in torch.unique(own).tolist()]
        mean, spread = sum(recall) / len(recall), 1 / math.sqrt(4 * len(places) / len(recall))
        if len(recall) > 1 and mean < 1 / len(recall) + spread and not self.anyway:
            raise ValueError(
                f"audit: on {len(places)} examples the network is right on {100 * mean:.0f} % of a class on the mean, "
                f"no better than chance ({100 / len(recall):.0f} %): was it trained with another normalisation "
                f"(--mean, --std), another size (--size) or another order of the classes? --anyway (anyway=True) goes "
                f"on all the same"
            )

    def _logits(self, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the logits of a batch, float32 (B, classes)."""
        seen: list[Tensor] = []

        def keep(logits: Tensor, targets: Tensor) -> Tensor:
            seen.append(logits.detach().float().cpu())
            return torch.zeros(len(logits))

        # The targets may be of classes that the model does not have: this metric does not look at them.
        ns.evaluate(self.model, [batch], metric=keep, larger_is_better=True, predict=self.predict)
        return torch.cat(seen)

    # Who is fragile

    @property
    def _ranked_by(self) -> str:
        """What the examples are ranked by, in words."""
        if self.early is not None:
            return "margins of the early network"
        cut = "margins under a cut of the last residual branches"
        return "margins of the network as it is" if self.edit is None else cut

    def _margins(self, places: Tensor, plan: Plan, kept: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the margins of the network as it is, and those that rank, if there are others, float64 (N,)."""
        parts = {f"margins, part {number}": part for number, part in enumerate(torch.split(places, plan.part), start=1)}
        shared = functools.cache(functools.partial(ns.share, self.model, self._few, predict=self.predict))
        for number, (name, part) in enumerate(parts.items(), start=1):
            if name not in kept:
                loader = list(self.examples.batches(part, plan.batch))
                kept.keep({name: self._swept(shared(), loader)})
                self._tell(f"{number} of {len(parts)} parts of the examples cut")
        columns = [list(itertools.chain(*column)) for column in zip(*(kept[name] for name in parts), strict=True)]
        base, other = (torch.tensor(column, dtype=torch.float64) for column in (columns[0], columns[-1]))
        return base, other if len(columns) > 1 else None

    def _swept(self, shared: Any, loader: Iterable[Any]) -> list[list[float]]:
        """Return the margins of some examples by the network as it is, and by the other that ranks, if there is one."""
        edits = {} if self.edit is None or self.early is not None else {"knockout": self.edit}
        swept = ns.sweep(shared, edits, loader, metric=ns.margin, predict=self.predict)
        values = [swept.values(), *map(swept.values, edits)]
        if self.early is not None:
            values.append(ns.sweep(self.early, {}, loader, metric=ns.margin, predict=self.predict).values())
        return [column.tolist() for column in values]

    # Which neurons

    def _critical(self, found: Fragile, plan: Plan, kept: Parts, file: Path) -> tuple[Row, ns.Edit | None]:
        """Return what a search and a judgement of the worst group came to, and the cut; or why there is none."""
        name, smaller = found.worst()
        if name is None:
            kind = "fragile group" if self.examples.groups is None else "group"
            said = f"No critical set was sought: no {kind} has {FEWEST} examples, {FEWEST // 2} of them right."
            return {"said": said, "rows": [], "caveats": []}, None
        key = f"critical set of {name}, {plan.searched}"
        how: dict[str, Any] = {"seed": self.seed, "progress": self.progress, "predict": self.predict}
        if key not in kept or not file.exists():
            search, rest = ns.halves(self._loaders(found.places(), plan), seed=self.seed)
            self._tell(f"a search for {name}")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                critical = ns.find_critical(self.model, search, name, k=self.k, **how)
                self._tell(f"a judgement of {len(critical.neurons)} neurons")
                verdict = ns.judge(critical, self.model, rest, name, draws=DRAWS, **how)
            warned = sorted({str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)})
            ns.save_file(critical.edit, file)
            kept.keep({key: _plain(critical, verdict, warned)})
        edit = ns.load_file(file) if kept[key]["rows"][0]["k"] else None
        assert edit is None or isinstance(edit, ns.Edit)
        worse = f" Worse, but with too few examples: {'; '.join(smaller)}." if smaller else ""
        return {**kept[key], "said": kept[key]["said"] + worse}, edit

    def _loaders(self, groups: Mapping[str, Tensor], plan: Plan) -> dict[str, Iterable[Any]]:
        """Return batches of each group, at most `plan.searched` examples: all of small groups, parts of large ones."""
        cap = max(len(places) for places in groups.values())
        while cap > FEWEST and sum(min(len(places), cap) for places in groups.values()) > plan.searched:
            cap = int(cap * 0.95)
        generator = torch.Generator().manual_seed(self.seed)
        loaders = {}
        for name, places in groups.items():
            chosen = places[torch.randperm(len(places), generator=generator)[:cap]].sort().values
            loader = self.examples.batches(chosen, plan.batch)
            loaders[name] = list(loader) if len(chosen) <= plan.held else loader
        return loaders


def _plain(critical: ns.Critical, verdict: ns.Verdict, warned: Sequence[str]) -> Row:
    """Return what is kept of a search and its judgement, JSON values."""
    row = functools.partial(
        row_of, "critical", "groups", k=len(critical.neurons), names=";".join(map(str, critical.neurons))
    )
    rows = [
        row(str(each["group"]), "change of accuracy", each["change"], each["low"], each["high"], n=each["count"])
        for each in verdict.to_records()
    ]
    rows.append(row(str(verdict.group), "net", verdict.net, *verdict.net_interval, p=verdict.p_value))
    which = f": {', '.join(map(str, critical.neurons))}" if critical.neurons else ""
    said = f"{verdict.sentence[0].upper()}{verdict.sentence[1:]}{which}."
    return {"said": said, "rows": rows, "caveats": [*verdict.caveats, *warned]}
