"""The audit: accuracy, who is fragile, and which few neurons carry the worst group, of a network as it is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.audit.costs import DRAWS, HELD, Costs, measure, shared_or_not
from neuronsurgery.study.audit.examples import Examples, Loaded
from neuronsurgery.study.audit.fragile import FEWEST, Fragile
from neuronsurgery.study.audit.results import Audit, Plan, Row, row_of
from neuronsurgery.study.run import Parts, at_work
from neuronsurgery.study.stage_fragility import knockout
from neuronsurgery.study.training import digest

FIRST: Final = 200
"""Examples that are looked at before anything long begins."""

SECONDS: Final = 10.0
"""About how long the examples of one part take, which are written down together."""


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
        images: `ImageFiles` or `Texts`, or any re-iterable of batches (inputs, targets) or (inputs, targets, groups).
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
    examples: Any = images if isinstance(images, Examples) else Loaded(images, class_names, group_names)
    return _Auditing(
        model,
        examples,
        early,
        budget,
        k,
        {"predict": predict},
        seed,
        batch,
        None if out is None else Path(out),
        anyway,
        progress,
        note or type(model).__name__,
    ).run()


def plan(
    model: nn.Module,
    images: Examples | Iterable[Any],
    *,
    budget: float | None = None,
    predict: Callable[[Any], Tensor] | None = None,
    batch: int | None = None,
    anyway: bool = False,
) -> Plan:
    """Return what an audit would do and how long it would take, from a few batches; nothing is written.

    Args:
        model: as for `audit`.
        images: the same.
        budget: the same.
        predict: the same.
        batch: the same.
        anyway: the same.

    Raises:
        ValueError: as `audit` does before anything long begins.
    """
    examples: Any = images if isinstance(images, Examples) else Loaded(images)
    how = {"predict": predict}
    return _Auditing(model, examples, None, budget, 3, how, 0, batch, None, anyway, False, "").planned[0]


@dataclass(frozen=True, eq=False)
class _Auditing:
    """One audit: see `audit`."""

    model: nn.Module
    examples: Examples
    early: nn.Module | None
    budget: float | None
    k: int
    how: dict[str, Any]
    seed: int
    batch: int | None
    out: Path | None
    anyway: bool
    progress: bool
    note: str

    def run(self) -> Audit:
        """Return what is found, step by step, each part written down when it is done."""
        with contextlib.ExitStack() as held:
            if self.out is not None:
                held.enter_context(at_work(self.out))
            kept = Parts() if self.out is None else Parts(self.out / "parts", self._key())
            plan, costs = self._begun(kept)
            self._tell(str(plan))
            places = self._places(plan.scored)
            base, cut = self._margins(places, costs, kept)
            found = Fragile.of(self.examples, places, base, cut, self._ranks_by())
            return self._answered(found, self._critical(found, plan, costs, kept), plan)

    def _begun(self, kept: Parts) -> tuple[Plan, Costs]:
        """Return the plan and the costs: those that an audit began with that was stopped, or new ones."""
        if "plan" in kept:
            self._tell(f"{len(kept)} parts are there from before, the first of them the plan")
        else:
            self._tell("a few batches, to see what it will cost")
            plan, costs = self.planned
            kept.keep({"plan": {"plan": asdict(plan), "costs": asdict(costs)}})
        return Plan(**kept["plan"]["plan"]), Costs(**kept["plan"]["costs"])

    def _tell(self, what: str) -> None:
        if self.progress:
            sys.stderr.write(f"audit: {what}\n")
            sys.stderr.flush()

    # Before anything long

    @functools.cached_property
    def edit(self) -> ns.Edit | None:
        """The cut of the last residual branches, None for a network that has none."""
        few = next(iter(self.examples.batches(torch.arange(min(2, len(self.examples.targets))), 2)))
        try:
            return knockout(self.model, few, **self.how)
        except (ValueError, ns.CaptureError):
            return None

    @functools.cached_property
    def planned(self) -> tuple[Plan, Costs]:
        """What will be done, and the costs that say so."""
        started = time.perf_counter()
        self._refuse()
        costs = measure(self.model, self.examples, self.edit, self.how, self.batch)
        count = len(self.examples.targets)
        spent = time.perf_counter() - started
        left = math.inf if self.budget is None else 0.8 * self.budget - spent  # what is measured is not what will be
        scored = count
        while scored > FIRST and costs.fragile(scored) > left / 2:
            scored = int(scored * 0.9)
        searched = scored if self.budget is None else costs.fitting(left - costs.fragile(scored), scored)
        steps = {
            f"accuracy, and who is fragile, on {scored} of {count} examples": costs.fragile(scored),
            f"a critical set, searched and judged on at most {searched} examples": costs.critical(searched),
        }
        return Plan(scored, searched, steps, costs.batch), costs

    def _refuse(self) -> None:
        """Raise a ValueError where the classes are not the network's, or it seems to see something else than images."""
        targets = self.examples.targets
        if len(targets) < 2 * FEWEST:
            raise ValueError(f"audit: {len(targets)} examples are too few to say anything: give at least {2 * FEWEST}")
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))
        places = order[:FIRST].sort().values
        logits = []
        for part in self.examples.batches(places, 50):
            logits.append(_logits(self.model, part, self.how["predict"]))
        classes = logits[0].shape[1]
        other = [str(target) for target in sorted(set(targets.tolist())) if not 0 <= target < classes]
        if other:
            raise ValueError(
                f"audit: the network has {classes} classes, but there are examples of classes {_few(other)}: pass the "
                f"network that was trained on these classes"
            )
        named = len(self.examples.class_names)
        if named not in (0, classes) and not all(name.isdigit() for name in self.examples.class_names):
            raise ValueError(
                f"audit: the network has {classes} classes and the examples name {named} "
                f"({_few(self.examples.class_names)}): give whole numbers as labels, the network's own"
            )
        right = torch.cat(logits).argmax(1) == targets[places]
        present = sorted(set(targets[places].tolist()))
        recall = [float(right[targets[places] == target].double().mean()) for target in present]
        mean, spread = sum(recall) / len(recall), 1 / math.sqrt(4 * len(places) / len(recall))
        if len(present) > 1 and mean < 1 / len(present) + spread and not self.anyway:
            raise ValueError(
                f"audit: on {len(places)} examples the network is right on {100 * mean:.0f} % of a class on the mean, "
                f"no better than chance ({100 / len(present):.0f} %): was it trained with another normalisation "
                f"(--mean, --std), another size (--size) or another order of the classes? --anyway goes on all the same"
            )

    # Who is fragile

    def _places(self, count: int) -> Tensor:
        order = torch.randperm(len(self.examples.targets), generator=torch.Generator().manual_seed(self.seed))
        return order[:count].sort().values

    def _key(self) -> str:
        """What the parts depend on."""
        early = "" if self.early is None else digest(self.early.state_dict().values())
        own = digest(self.model.state_dict().values())
        said = (own, early, self.examples.digest, self.budget, self.batch, self.k, self.seed)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def _margins(self, places: Tensor, costs: Costs, kept: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the margins of the network as it is, and those that rank, if there are others, float64 (N,)."""
        size = max(costs.batch, int(SECONDS / max(costs.load + costs.forward + costs.knockout, 1e-9)))
        names = {f"margins of {start} to {start + size}": part for start, part in _chunks(places, size)}
        edits = {} if self.edit is None or self.early is not None else {"knockout": self.edit}
        few = next(iter(self.examples.batches(places[:2], 2)))
        shared: Any = None
        for number, (name, part) in enumerate(names.items()):
            if name in kept:
                continue
            shared = shared or shared_or_not(self.model, few, self.how)
            loader = list(self.examples.batches(part, costs.batch))
            swept = ns.sweep(shared, edits, loader, metric=ns.margin, **self.how)
            values = [swept.values().tolist(), swept.values("knockout").tolist() if edits else None]
            if self.early is not None:
                values[1] = ns.sweep(self.early, {}, loader, metric=ns.margin, **self.how).values().tolist()
            kept.keep({name: values})
            self._tell(f"{number + 1} of {len(names)} parts of the examples cut")
        base, cut = zip(*(kept[name] for name in names), strict=True)
        first = torch.tensor(list(itertools.chain(*base)), dtype=torch.float64)
        if cut[0] is None:
            return first, None
        return first, torch.tensor(list(itertools.chain(*cut)), dtype=torch.float64)

    def _ranks_by(self) -> str:
        """Return what the examples are ranked by, in words."""
        if self.early is not None:
            return "margins of the early network"
        cut = "margins under a cut of the last residual branches"
        return "margins of the network as it is" if self.edit is None else cut

    # Which neurons

    def _critical(self, found: Fragile, plan: Plan, costs: Costs, kept: Parts) -> Row:
        """Return what a search and a judgement of the worst group came to, or why there is none."""
        name, groups = found.worst()
        if name is None:
            return {"said": groups, "rows": [], "caveats": []}
        key = f"critical set of {name}, {plan.searched}"
        file = None if self.out is None else self.out / "edits" / "critical.safetensors"
        if key not in kept or (file is not None and not file.exists()):
            loaders = {own: self._loader(part, costs) for own, part in self._capped(groups, plan.searched).items()}
            search, rest = ns.halves(loaders, seed=self.seed)
            self._tell(f"a search for {name}")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                critical = ns.find_critical(self.model, search, name, k=self.k, seed=self.seed, **self.how)
                self._tell(f"a judgement of {len(critical.neurons)} neurons")
                verdict = ns.judge(critical, self.model, rest, name, draws=DRAWS, seed=self.seed, **self.how)
            warned = sorted({str(warning.message) for warning in said if issubclass(warning.category, UserWarning)})
            if file is not None:
                file.parent.mkdir(exist_ok=True)
                ns.save_file(critical.edit, file)
            self._found["critical"] = critical.edit
            kept.keep({key: _plain(critical, verdict, warned)})
        elif file is not None:
            kept_edit = ns.load_file(file)
            assert isinstance(kept_edit, ns.Edit)
            self._found["critical"] = kept_edit
        result: Row = kept[key]
        return result

    _found: dict[str, ns.Edit] = field(default_factory=dict, repr=False)

    def _capped(self, groups: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
        """Return places of each group, at most so many together: all of the small groups, parts of the large ones."""
        cap = max(len(places) for places in groups.values())
        while cap > FEWEST and sum(min(len(places), cap) for places in groups.values()) > most:
            cap = int(cap * 0.95)
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: places[torch.randperm(len(places), generator=generator)[:cap]].sort().values
            for name, places in groups.items()
        }

    def _loader(self, places: Tensor, costs: Costs) -> Iterable[Any]:
        """Return batches of some places, kept in memory where they are not too many."""
        loader = self.examples.batches(places, costs.batch)
        return list(loader) if len(places) * costs.size <= HELD / 8 else loader

    # What it comes to

    def _answered(self, found: Fragile, critical: Row, plan: Plan) -> Audit:
        rows = [*found.accuracies(), *found.flagged(), *critical["rows"]]
        count = len(self.examples.targets)
        part = "" if plan.scored == count else f", a random part of {count}"
        share = 100 * float((found.base > 0).double().mean())
        answers = (
            f"The network is right on {share:.1f} % of {plan.scored} examples{part}; worst: {found.worst_sentence()}.",
            found.sentence(),
            critical["said"] if critical["said"].endswith(".") else f"{critical['said']}.",
        )
        edits = dict(self._found)
        if self.edit is not None:
            edits["knockout"] = self.edit
        notes = (
            self.note,
            f"{count} examples, {len(self.examples.class_names)} classes"
            + (f", {len(self.examples.group_names)} groups" if self.examples.group_names else ", no groups given"),
            *(line.strip() for line in str(plan).splitlines()),
            f"neuronsurgery {version('neuronsurgery')}, torch {torch.__version__}, seed {self.seed}",
        )
        return Audit(
            answers,
            tuple(rows),
            found.records(),
            found.ranked(),
            edits,
            critical.get("verdict", ""),
            (*found.caveats, *critical["caveats"]),
            notes,
        )


def _plain(critical: ns.Critical, verdict: ns.Verdict, warned: Sequence[str]) -> Row:
    """Return what is kept of a search and its judgement, JSON values."""
    how: Row = {"k": len(critical.neurons), "names": ";".join(map(str, critical.neurons))}
    rows = [
        row_of(
            "critical",
            "groups",
            str(row["group"]),
            "change of accuracy",
            (row["change"], row["low"], row["high"]),
            n=row["count"],
            **how,
        )
        for row in verdict.to_records()
    ]
    net = (verdict.net, *verdict.net_interval)
    rows.append(row_of("critical", "groups", str(verdict.group), "net", net, p=verdict.p_value, **how))
    return {"said": verdict.sentence, "verdict": repr(verdict), "rows": rows, "caveats": [*verdict.caveats, *warned]}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _chunks(places: Tensor, size: int) -> Iterable[tuple[int, Tensor]]:
    return [(start, places[start : start + size]) for start in range(0, len(places), size)]


def _logits(model: nn.Module, batch: Any, predict: Callable[[Any], Tensor] | None) -> Tensor:
    """Return the logits of a batch, float32 (B, classes)."""
    seen: list[Tensor] = []

    def keep(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(logits.detach().float().cpu())
        return torch.zeros(len(logits))

    inputs, targets = batch
    # The targets may be of classes that the model does not have: this metric does not look at them.
    ns.evaluate(model, [(inputs, targets)], metric=keep, larger_is_better=True, predict=predict)
    return torch.cat(seen)
