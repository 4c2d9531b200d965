"""Critical sets: few neurons whose cut takes one group's answers and spares everybody else's."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from neuronsurgery.batches import Unpack, by_key
from neuronsurgery.checks import is_finite, is_integer, refuse, unfit
from neuronsurgery.copies import Runner
from neuronsurgery.distributed import exchange
from neuronsurgery.edits import Edit, compose
from neuronsurgery.effects import error_probability, prepared
from neuronsurgery.errors import checked_function, counted, inline, listed
from neuronsurgery.first_order import mean_effects
from neuronsurgery.layouts import Layout
from neuronsurgery.loaders import Mixed, named_loaders
from neuronsurgery.losses import is_larger_better, margin
from neuronsurgery.masks import learned_mask
from neuronsurgery.means import find_means, unheld_layers
from neuronsurgery.neurons import Neurons
from neuronsurgery.searches import Candidate, Kind, Kinds, Objective, Race, Search, Step, in_turn, points, selective
from neuronsurgery.splits import Counted, checked_groups, groups_of
from neuronsurgery.surveys import Survey
from neuronsurgery.sweeps import sweep_in_parts
from neuronsurgery.switches import restoring
from neuronsurgery.terms import terms_of
from neuronsurgery.types import Group, Loaders, Metric, Predict, Where


@dataclass(frozen=True, eq=False, repr=False)
class Critical:
    """What `find_critical` has found, with all of its numbers from the examples that it was searched on.

    Attributes:
        group: whose neurons were sought.
        against: the groups to spare.
        bests: for each size the set that counts among those of at most that size, None where there was none: the last
            is what was found.
        path: for each size the set that the search went on from first, within the cap where one is.
        cost: "examples" and "backward passes" of the search, and the "edits" that it looked at.
        reasons: what could not be tried, in words.
        cap: how much any other group was allowed to lose; None where an objective of the caller's decided.
        kinds: how sets of neurons become edits.
        searched: what tells the examples of the search apart from others.
    """

    group: Group
    against: tuple[Group, ...]
    bests: tuple[Step | None, ...]
    path: tuple[Step, ...]
    cost: Mapping[str, int]
    reasons: tuple[str, ...]
    cap: float | None
    kinds: Kinds
    searched: frozenset[str]

    @property
    def found(self) -> Step | None:
        """The set that was found, with its numbers on the examples of the search; None where there is none."""
        return self.bests[-1]

    @property
    def edit(self) -> Edit:
        """The edit; the identity where nothing was found."""
        return compose() if self.found is None else self.found.edit

    @property
    def neurons(self) -> Neurons:
        """The chosen neurons, not the norm and bias entries that are written for them; none where nothing was found."""
        return Neurons() if self.found is None else self.found.neurons

    def within(self, k: int) -> Critical:
        """Return what the same search for at most k neurons finds: its first k steps are those of this one.

        Raises:
            ValueError: if k is less than 1 or more than was searched for.
        """
        if not is_integer(k, 1, len(self.bests)):
            raise ValueError(f"k must be an integer from 1 to the {len(self.bests)} of this search, not {k!r}")
        return dataclasses.replace(self, bests=self.bests[:k], path=self.path[:k])

    @property
    def sentence(self) -> str:
        """What was found, in one sentence that says what the numbers are of."""
        if self.found is None:
            allowed = "" if self.cap is None else f" while no other group loses more than {100 * self.cap:g} points"
            return f"no set of at most {len(self.path)} neurons takes anything from {self.group}{allowed}"
        step = self.found
        return (
            f"{counted(len(self.neurons), 'neuron')} found for {self.group}: {points(step.own)} points there, "
            f"{points(step.worst_other)} at most elsewhere, on the examples of the search; judge() them on others"
        )

    def __repr__(self) -> str:
        lines = [f"{counted(len(step.neurons), 'neuron')}: {step}" for step in self.path]
        cost = ", ".join(f"{number} {what}" for what, number in self.cost.items())
        said = [self.sentence, f"  {self.neurons}", listed(lines), f"  cost: {cost}"]
        return "\n".join([*said, *(f"  {reason}" for reason in self.reasons)])


@restoring
def find_critical(
    model: nn.Module,
    loaders: Loaders,
    group: Group,
    *,
    against: Group | Iterable[Group] | None = None,
    k: int = 3,
    edits: Sequence[Kind] = ("zero", "mean"),
    layout: Layout | None = None,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    screen: Literal["effects", "mask"] = "effects",
    pool: int = 40,
    width: int = 2,
    weight: float = 2.0,
    cap: float = 0.005,
    metric: Metric = margin,
    objective: Objective | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    seed: int = 0,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Critical:
    """Return at most k neurons whose cut takes one group's answers and spares all others, as found on these examples.

    An edit is scored by J = D p(own) - weight * max(0, max over the others of D p): p = sigmoid(-m) is the error
    probability of an example of margin m, D the mean of a group after the edit minus before. Ties are broken by the
    rise of log(1 + exp(-m)). Every neuron is screened by its predicted J (see `group_effects`, `error_probability`; one
    backward pass), and the best `pool` of them go into a beam search with exact sweeps that share one capture, about
    200 edits for k = 3. A set is run on the group first, and on the others for as long as it may still matter: that
    changes nothing but the time. The pool and the beam take in turn the best of those within `cap` and of all. Of all
    sets that it looked at, it returns the one whose group loses most among those that take no more than `cap` from any
    other group.

    Its numbers are of the examples that it chose by, and say little: `judge` the result on others (see `halves`).

    Args:
        model: any module; not changed.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example; to
            be iterated several times.
        group: the name of the group whose neurons are sought.
        against: the groups to spare; default all others.
        k: the largest size of a set.
        edits: how a neuron may be edited: "zero" (`zero_out`), "mean" (`mean_out`), or functions neurons -> edit. Where
            no output can be held at its mean, zeroing alone is tried, and `reasons` says so. With a function, as with
            `objective`, nothing can be screened: every neuron is tried exactly.
        layout: the layers to search, see `find_layout`; `where` and `extra` are the short way to one.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.
        screen: "effects", or "mask": half of the pool by the predicted J, half by `learned_mask`.
        pool: so many candidates (a neuron and a kind of edit) go into the search.
        width: of the beam: so many sets of one size are extended.
        weight: what the loss of the worst other group counts.
        cap: the share of its examples that any other group may lose.
        metric: (logits, targets) -> one differentiable value per example, positive where it is right.
        objective: (metric of each example before, after, their groups) -> a number, larger for a better edit, in the
            place of J; then the best set counts, whatever it takes from whom, if it is better than none.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        seed: of the learned mask.
        progress: whether to write lines of progress to standard error.
        process_group: share the data over its ranks, each of which gives its part; all find the same.

    Returns:
        The set; with no set under the cap, one without neurons whose sentence says so.

    Raises:
        KeyError: if there is no such group; lists those there are.
        TypeError: if an edit is none of these kinds.
        ValueError: if there is no other group, the metric is a loss, no neuron can be edited so, or an argument is out
            of range (lists all).

    Example:
        >>> import neuronsurgery as ns
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = [(torch.randn(64, 2), torch.arange(64) % 2, torch.arange(64) // 2 % 2)]
        >>> search, rest = ns.halves(data)
        >>> found = ns.find_critical(model, search, 1, k=2)
        >>> verdict = ns.judge(found, model, rest, 1)

    Source:
        Mean ablation and signed effects: Molchanov et al., 2019. The question: You et al., "The Silent Majority", 2025.
    """
    kinds, unpack = _checked(edits, objective, screen), by_key(unpack, group_key)
    if is_larger_better(metric) is False:
        raise ValueError("metric= is positive where an example is right, which no loss is: pass margin, or your own")
    _refuse_unfit(k=k, pool=pool, width=width, weight=weight, cap=cap)
    if screen == "mask" and process_group is not None:
        raise ValueError("a mask is learned by one process: pass screen='effects' with process_group=")
    named = named_loaders(loaders)
    options = _Options(metric, predict, unpack, progress, process_group)
    counts, searched, separable = counted_examples(named, unpack, process_group)
    group, others = checked_groups(group, against, counts)
    spread = "mean" not in kinds and screen != "mask"
    surveyed, runner, layout = prepared(model, layout, where, extra, spread=spread, process_group=process_group)
    means = find_means(surveyed, runner, layout.layers, named, *options[1:]) if "mean" in kinds else None
    made = Kinds(kinds, layout, means)
    screened = objective is None and all(isinstance(kind, str) for kind in kinds)
    candidates, race = list(made.candidates()), None
    if not candidates:
        reasons = unheld_layers(means.reasons) if means is not None and means.reasons else "the layout has none"
        raise ValueError(f"no neuron can be edited as edits= says, {reasons}: add 'zero', or other layers with where=")
    if screened:
        own, harm = _predicted(surveyed, runner, made, candidates, named, group, others, options)
        worst = harm.max(0)
        order = np.argsort(-own + weight * np.maximum(worst, 0), kind="stable")
        best = in_turn([candidates[at] for at in order if worst[at] <= cap], [candidates[at] for at in order])
        if process_group is None and separable:  # each rank would leave out other sets
            harmed = np.argsort(-np.maximum(harm[:, order[:pool]], 0).mean(1), kind="stable")
            apart = _apart(named, unpack, runner, group, [others[at] for at in harmed])
            race = Race(*apart, weight, dict(zip(candidates, worst.tolist(), strict=True)))
        if screen == "mask":
            best = in_turn(_by_mask(model, made, named, group, others, seed, options), best)
        candidates = best[:pool]
    allowed = cap if objective is None else None
    search = Search(made, group, others, objective or selective(group, others, weight), k, allowed, pool, width)
    settings: dict[str, Any] = {"metric": metric, "larger_is_better": True, "predict": predict}
    parts = search.parts(candidates, Mixed(named, unpack, runner.device), race)
    for swept in sweep_in_parts(model, parts, process_group=process_group, **settings):
        search.take(swept)
        if progress:
            top = max(search.scores.values(), default=-math.inf)
            sys.stderr.write(f"search: {search.looked} sets, the best scores {top:.4g}\n")
    bests = tuple(search.best(size) for size in range(1, k + 1))
    cost = {"examples": sum(counts.values()), "backward passes": int(screened), "edits": search.looked}
    return Critical(
        group,
        others,
        bests,
        tuple(search.path),
        cost,
        () if means is None or not means.reasons else (unheld_layers(means.reasons),),
        allowed,
        made,
        searched,
    )


class _Options(NamedTuple):
    """How the data are read and what is measured."""

    metric: Metric
    predict: Predict | None
    unpack: Unpack | None
    progress: bool
    process_group: dist.ProcessGroup | None


def _checked(edits: Sequence[Kind], objective: Objective | None, screen: str) -> tuple[Kind, ...]:
    checked_function(objective, "objective")
    kinds = (edits,) if isinstance(edits, str) or callable(edits) else tuple(edits)
    wrong = [repr(kind) for kind in kinds if kind not in ("zero", "mean") and not callable(kind)]
    if wrong or not kinds:
        raise TypeError(
            f"edits= are 'zero', 'mean' or functions neurons -> edit, one or more, not {inline(wrong) or '()'}"
        )
    if screen not in ("effects", "mask"):
        raise ValueError(f"screen must be 'effects' or 'mask', not {screen!r}")
    return kinds


def _refuse_unfit(k: int, pool: int, width: int, weight: float, cap: float) -> None:
    integers = {"k": k, "pool": pool, "width": width}
    wrong = [line for name, n in integers.items() for line in unfit(name, is_integer(n, 1), "an integer from 1", n)]
    for name, number in (("weight", weight), ("cap", cap)):
        wrong += unfit(name, is_finite(number) and number >= 0, "a finite number of at least 0", number)
    refuse("a search", wrong, "The defaults are k=3, pool=40, width=2, weight=2.0, cap=0.005")


def counted_examples(loaders: Loaders, unpack: Unpack | None, process_group: dist.ProcessGroup | None) -> Counted:
    """Return what there is of each group, over the ranks."""
    error: Exception | None = None
    own = Counted({}, frozenset(), True)
    try:
        own = groups_of(loaders, unpack)
    except Exception as raised:
        error = raised
    counts: dict[Group, int] = {}
    shares = exchange(process_group, error, own)
    for share in shares:
        for name, count in share.counts.items():
            counts[name] = counts.get(name, 0) + count
    keys = frozenset(key for share in shares for key in share.keys)
    return Counted(counts, keys, all(share.separable for share in shares))


# Screening


def _predicted(
    surveyed: Survey,
    runner: Runner,
    made: Kinds,
    candidates: Sequence[Candidate],
    loaders: Loaders,
    group: Group,
    others: Sequence[Group],
    options: _Options,
) -> tuple[np.ndarray, np.ndarray]:
    """Return by candidate the predicted rise of the error probability: of the group, and a row for each other."""
    count = made.layout.count
    terms = [
        term
        for number, kind in enumerate(made.kinds)
        for term in terms_of(surveyed, runner, made.layout, str(kind), made.means, number * count)
    ]
    metric, *rest = options
    effects, _ = mean_effects(runner, surveyed, terms, loaders, metric, error_probability, *rest)  # type: ignore[arg-type]
    places = [c.kind * count + made.layout.starts[c.layer] + c.neuron for c in candidates]
    return effects[group].numpy()[places], torch.stack([effects[name] for name in others]).numpy()[:, places]


def _apart(
    loaders: Loaders, unpack: Unpack | None, runner: Runner, group: Group, others: Sequence[Group]
) -> tuple[Mixed, Mixed]:
    """Return the examples of a group and those of the others, in the order of the latter where they have loaders."""

    def only(names: Sequence[Group]) -> Mixed:
        wanted = {name: loaders[name] for name in names} if isinstance(loaders, Mapping) else loaders
        return Mixed(wanted, unpack, runner.device, groups=frozenset(names))

    return only([group]), only(others)


def _by_mask(
    model: nn.Module,
    made: Kinds,
    loaders: Loaders,
    group: Group,
    others: Sequence[Group],
    seed: int,
    options: _Options,
) -> list[Candidate]:
    """Return the candidates in the order of a learned mask, every kind of the first neuron first."""
    scores = learned_mask(
        model,
        loaders,
        group,
        against=others,
        layout=made.layout,
        metric=options.metric,
        predict=options.predict,
        unpack=options.unpack,
        seed=seed,
        progress=options.progress,
    )
    order = scores.values[0].argsort(descending=True, stable=True).tolist()
    flat = {made.layout.starts[c.layer] + c.neuron: [] for c in made.candidates()}  # type: dict[int, list[Candidate]]
    for candidate in made.candidates():
        flat[made.layout.starts[candidate.layer] + candidate.neuron].append(candidate)
    return [candidate for place in order for candidate in flat.get(place, [])]
