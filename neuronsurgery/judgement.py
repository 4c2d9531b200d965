"""Judging an edit on examples that it was not searched on: what it takes from whom, and how special that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from neuronsurgery.batches import Unpack, by_key, group_members, ordered_groups
from neuronsurgery.checks import is_integer, refuse, unfit
from neuronsurgery.critical import Critical, counted_examples
from neuronsurgery.draws import checked_seed, random_bits
from neuronsurgery.edits import Edit, compose, leaves
from neuronsurgery.errors import checked, counted, inline, listed, warn
from neuronsurgery.evaluation import named_directions
from neuronsurgery.layers import Layer
from neuronsurgery.loaders import Mixed, named_loaders
from neuronsurgery.losses import accuracy
from neuronsurgery.neurons import Neurons
from neuronsurgery.outcomes import Sweep
from neuronsurgery.results import Table
from neuronsurgery.rows import HeldRows
from neuronsurgery.splits import checked_groups
from neuronsurgery.sweeps import sweep
from neuronsurgery.switches import restoring
from neuronsurgery.types import Group, Loaders, Metric, Predict

FEWEST = 10
"""A group of fewer examples says little: a warning."""

RESAMPLES = 4000
LEVEL = 0.95
TRIES = 20
"""So many times as many draws as are wanted are made at most, to find sets other than the one that is judged."""

JUDGED = "judge takes what find_critical returns, or an edit, not a {}: write judge(zero_out(neurons), model, ...)"


@dataclass(frozen=True)
class Control:
    """What a random edit of the same layers, kinds and sizes does on the same examples.

    Attributes:
        neurons: that were drawn.
        own: the change of the group.
        worst_other: the change of the group to spare that loses most.
        net: what the group loses more than that one.
    """

    neurons: Neurons
    own: float
    worst_other: float
    net: float


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(Table):
    """What an edit takes from a group and from the others, on examples that it was not searched on.

    Attributes:
        group: that it is held to carry.
        against: the groups to spare.
        change: by group the metric after minus before.
        interval: by group the paired interval of the change at 95 %.
        net: the worst other change minus that of the group, in the direction in which the metric is lost: positive
            where the group loses more.
        net_interval: of it at 95 %, by bootstrap within the groups, the worst other group chosen anew each time.
        p_value: (1 + controls with at least that net) / (1 + controls); None where nothing like the edit can be drawn.
        distinct: how many different sets the controls are.
        controls: random edits of as many neurons of the same layers, edited alike, the judged set excluded.
        sentence: what follows, in one sentence.
        caveats: what these numbers do not take into account.
        counts: by group its number of examples.
        metric: the name of the metric.
        judged: what tells the examples apart from others; nothing where they cannot be told apart.
    """

    group: Group
    against: tuple[Group, ...]
    change: Mapping[Group, float]
    interval: Mapping[Group, tuple[float, float]]
    net: float
    net_interval: tuple[float, float]
    p_value: float | None
    distinct: int
    controls: tuple[Control, ...]
    sentence: str
    caveats: tuple[str, ...]
    counts: Mapping[Group, int]
    metric: str
    judged: frozenset[str] = frozenset()

    @property
    def carries(self) -> bool:
        """Whether the neurons carry the group more than any other: the lower limit of the net is above 0."""
        return self.net_interval[0] > 0

    @override
    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per group, for any data frame."""
        roles = {self.group: "own"} | dict.fromkeys(self.against, "spared")
        return [
            {
                "group": name,
                "role": roles.get(name, "beside"),
                "change": change,
                "low": self.interval[name][0],
                "high": self.interval[name][1],
                "count": self.counts[name],
            }
            for name, change in self.change.items()
        ]

    def __repr__(self) -> str:
        rows = [
            f"{row['group']}: {row['change']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] ({row['count']} examples)"
            for row in self.to_records()
        ]
        low, high = self.net_interval
        p = "no control" if self.p_value is None else f"p = {self.p_value:.3g} over {self.distinct} different sets"
        net = f"net {self.net:+.4f} [{low:+.4f}, {high:+.4f}], {p}"
        return "\n".join([self.sentence, listed(rows, 14), f"  {net}", *(f"  {caveat}" for caveat in self.caveats)])


@restoring
def judge(
    edit: Critical | Edit,
    model: nn.Module,
    loaders: Loaders,
    group: Group,
    *,
    against: Group | Iterable[Group] | None = None,
    metric: Metric = accuracy,
    larger_is_better: bool | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    draws: int = 100,
    seed: int = 0,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Verdict:
    """Return what an edit takes from a group and from the others, on examples that it was not searched on.

    Its first line is the verdict. It says *carry* only where the lower limit of the net is above 0. The controls say
    how many random sets of the same layers do as much; they were not searched for, so that a small p-value does not say
    that the group is special: that takes `matched` examples of another group, searched and judged alike.

    Args:
        edit: what `find_critical` returned, which knows the examples that it was searched on; or any edit.
        model: any module; not changed.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example; of
            examples that the edit was not searched on, see `halves`.
        group: that the neurons are held to carry.
        against: the groups to spare; default those of the search, or all others.
        metric: (logits, targets) -> one value per example.
        larger_is_better: the direction of a metric of your own, see `evaluate`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        draws: how many controls.
        seed: of the controls and the bootstrap.
        progress: whether to write a line of progress to standard error.
        process_group: share the data over its ranks, each of which gives its part.

    Returns:
        The verdict.

    Raises:
        KeyError: if there is no such group; lists those there are.
        TypeError: if it is given something else than an edit.
        ValueError: if an example is one of those of the search (says how many), the direction of the metric is not
            known, or the edit does not fit the model.

    Warns:
        UserWarning: if a group has fewer than 10 examples.

    Example:
        >>> import neuronsurgery as ns, torch
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> data = [(torch.eye(2).repeat(20, 1), torch.arange(40) % 2, torch.arange(40) % 2)]
        >>> cut = ns.zero_out(ns.select(ns.find_layout(model), {"weight": 1}))
        >>> print(str(ns.judge(cut, model, data, 1)).splitlines()[0])  # doctest: +ELLIPSIS
        1 neuron carries 1: -100.0 points there, +0.0 at most elsewhere; ...

    Source:
        Bonett and Price, 2012 (the intervals); Phipson and Smyth, "Permutation p-values should never be zero", 2010.
    """
    found = edit if isinstance(edit, Critical) else None
    made: Edit = edit.edit if isinstance(edit, Critical) else checked(edit, Edit, JUDGED)
    refuse("a judgement", unfit("draws", is_integer(draws, 0), "an integer from 0", draws), "The default is draws=100")
    seed, unpack, named = checked_seed(seed), by_key(unpack, group_key), named_loaders(loaders)
    direction = named_directions({"": metric}, larger_is_better)[""]
    if direction is None:
        raise ValueError("whether larger values of this metric are better is not known: pass larger_is_better=")
    counts, keys, _ = counted_examples(named, unpack, process_group)
    wanted = against if against is not None or found is None else found.against
    group, spared = checked_groups(group, wanted, counts)
    _refuse_searched(found, keys)
    _warn_of_few(counts, (group, *spared))
    drawn = _drawn(found, made, draws, seed)
    edits = {"judged": made} | {f"control {number}": one for number, one in enumerate(drawn or ())}
    swept = sweep(
        model,
        edits,
        Mixed(named, unpack, next((p.device for p in model.parameters()), None)),
        metric=metric,
        larger_is_better=direction,
        predict=predict,
        progress=progress,
        process_group=process_group,
    )
    apart = found is not None and bool(found.searched) and bool(keys)
    verdict = _verdict(swept, found, made, group, spared, drawn, seed, apart)
    return dataclasses.replace(verdict, judged=keys)


def _refuse_searched(found: Critical | None, keys: frozenset[str]) -> None:
    both = len(found.searched & keys) if found is not None else 0
    if both:
        raise ValueError(
            f"{both} of the {len(keys)} examples are among those that the set was searched on, which say nothing of "
            f"it: judge it on others, for instance on the second of halves(loaders)"
        )


def _warn_of_few(counts: Mapping[Group, int], groups: Iterable[Group]) -> None:
    few = [f"{group} ({counts[group]})" for group in groups if counts[group] < FEWEST]
    if few:
        warn(f"groups of fewer than {FEWEST} examples say little, whatever their intervals: {inline(few)}")


# Controls


def _drawn(found: Critical | None, edit: Edit, draws: int, seed: int) -> list[Edit] | None:
    """Return random edits of as many neurons of the same layers, edited alike, none the judged one; None if none is."""
    if found is not None and found.found is None:
        return None
    made: list[Edit] = []
    for number in range(TRIES * draws):
        key = f"judge\0{seed}\0{number}"
        if found is not None and found.found is not None:
            other = found.kinds.edit(found.kinds.drawn(found.found.chosen, key))
        else:
            parts = [_redrawn(leaf, f"{key}\0{place}") for place, leaf in enumerate(leaves(edit))]
            if any(part is None for part in parts):
                return None
            other = compose(*(part for part in parts if part is not None))
        if other != edit:
            made.append(other)
        if len(made) == draws:
            break
    return made or None


def _redrawn(leaf: Edit, key: str) -> Edit | None:
    """Return the edit of as many random neurons of the same layers; None where it holds what is of its own neurons."""
    if isinstance(leaf, HeldRows) or not hasattr(leaf, "__dataclass_fields__") or not leaf.neurons:
        return None
    neurons = Neurons({layer: _indices(layer, len(own), key) for layer, own in leaf.neurons.by_layer().items()})
    copied: Any = leaf
    redrawn: Edit = dataclasses.replace(copied, neurons=neurons)
    return redrawn


def _indices(layer: Layer, count: int, key: str) -> list[int]:
    order = np.argsort(random_bits(f"{key}\0{layer.key}", layer.count), kind="stable")
    chosen: list[int] = order[:count].tolist()
    return chosen


# The verdict


def _verdict(
    swept: Sweep,
    found: Critical | None,
    edit: Edit,
    group: Group,
    against: tuple[Group, ...],
    drawn: Sequence[Edit] | None,
    seed: int,
    apart: bool,
) -> Verdict:
    sign = 1.0 if swept.baseline.larger_is_better else -1.0
    change, interval = swept.change("judged"), swept.interval("judged", LEVEL)
    net = _net(change, group, against, sign)
    low, high = _net_interval(swept, group, against, sign, net, f"net\0{seed}")
    controls = tuple(
        Control(one.neurons, changes[group], _worst(changes, against, sign), _net(changes, group, against, sign))
        for number, one in enumerate(drawn or ())
        for changes in [swept.change(f"control {number}")]
    )
    as_much = sum(control.net >= net - 1e-12 for control in controls)
    said = _Said(found, edit, group, against, change, interval, net, (low, high), sign, swept.is_binary, apart)
    rest = f"; {as_much} of {len(controls)} random sets do as much" if controls else ""
    return Verdict(
        group,
        against,
        change,
        interval,
        net,
        (low, high),
        (1 + as_much) / (1 + len(controls)) if controls else None,
        len(set(drawn or ())),
        controls,
        said.verdict() + rest,
        said.caveats(),
        dict(zip(swept.baseline.groups, swept.baseline.counts, strict=True)),
        swept.metric,
    )


def _worst(change: Mapping[Group, float], against: Iterable[Group], sign: float) -> float:
    """Return the change of the group to spare that loses most."""
    return min((change[name] for name in against), key=lambda value: sign * value)


def _net(change: Mapping[Group, float], group: Group, against: Iterable[Group], sign: float) -> float:
    return sign * (_worst(change, against, sign) - change[group])


def _net_interval(
    swept: Sweep, group: Group, against: Sequence[Group], sign: float, net: float, key: str
) -> tuple[float, float]:
    """Return the interval of the net by bootstrap: each group's examples drawn anew, and the worst of the others.

    Of values of 0 and 1 each group is drawn from with one example more that rises and one that falls, as in the
    interval of Bonett and Price, so that groups in which nothing changed are not taken for certain. The worst of
    several is worse in most draws than in truth, so the middle of the draws is moved to the net that was measured.
    """
    number = int.from_bytes(random_bits(key, 2).tobytes(), "little")
    generator = np.random.Generator(np.random.Philox(key=number))
    difference = sign * (swept.values("judged") - swept.values()).numpy()
    members = group_members(swept.members)
    # In one order of groups and of values, or the draws would go by the order of the loader.
    means = {
        name: _resampled(np.sort(difference[members[name]]), swept.is_binary, generator)
        for name in (group, *ordered_groups(against))
    }
    nets = np.min([means[name] for name in against], axis=0) - means[group]
    low, middle, high = np.quantile(nets, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return float(low + net - middle), float(high + net - middle)


def _resampled(difference: np.ndarray, binary: bool, generator: np.random.Generator) -> np.ndarray:
    """Return the means of samples drawn with replacement, shape (RESAMPLES,)."""
    if not binary:
        n = len(difference)
        return np.array([difference[generator.integers(0, n, n)].mean() for _ in range(RESAMPLES)])
    rises, falls = int((difference > 0).sum()), int((difference < 0).sum())
    n = len(difference) + 2
    shares = np.array([rises + 1, falls + 1, n - rises - falls - 2]) / n
    counts = generator.multinomial(n, shares, size=RESAMPLES)
    means: np.ndarray = (counts[:, 0] - counts[:, 1]) / n
    return means


@dataclass(frozen=True, eq=False)
class _Said:
    """The words of a verdict."""

    found: Critical | None
    edit: Edit
    group: Group
    against: tuple[Group, ...]
    change: Mapping[Group, float]
    interval: Mapping[Group, tuple[float, float]]
    net: float
    net_interval: tuple[float, float]
    sign: float
    binary: bool
    apart: bool  # whether these examples are known to be others than those of the search

    def verdict(self) -> str:
        """Return what follows, and the two changes."""
        neurons = self.edit.neurons if self.found is None else self.found.neurons
        if not neurons:
            return f"no set was found for {self.group}, so none is judged: nothing is cut"
        worst = _worst(self.change, self.against, self.sign)
        where = " on examples not searched" if self.apart else ""
        who, many = counted(len(neurons), "neuron"), len(neurons) > 1
        numbers = f"{self._said(self.change[self.group])} there, {self._said(worst, unit=False)} at most elsewhere"
        return f"{who} {self._claim(many)}: {numbers}{',' if where else ''}{where}"

    def _claim(self, many: bool) -> str:
        carry, do = ("carry", "do") if many else ("carries", "does")
        if self.net_interval[0] > 0:
            return f"{carry} {self.group}"
        own, others = self._lost(self.group), [name for name in self.against if self._lost(name)]
        if self._only_searched():
            return f"{carry} only the examples of {self.group} that {'they were' if many else 'it was'} searched on"
        if own and others:
            return f"{carry} everybody, {self.group} no more than {self._hardest(others)}"
        if others:
            return f"{carry} {self._hardest(others)} rather than {self.group}"
        if own:
            return f"{do} not certainly carry {self.group} more than others"
        return f"{carry} nobody that can be seen"

    def _lost(self, name: Group) -> bool:
        """Return whether a group has lost for certain."""
        low, high = self.interval[name]
        return high < 0 if self.sign > 0 else low > 0

    def _hardest(self, names: Sequence[Group]) -> Group:
        return min(names, key=lambda name: self.sign * self.change[name])

    def _only_searched(self) -> bool:
        """Return whether the group has lost where the set was searched, and certainly less than half of that here."""
        step = None if self.found is None else self.found.found
        if step is None or not self.binary:
            return False
        low, _ = self.interval[self.group]
        return low > step.own / 2 and not self._lost(self.group)

    def _said(self, change: float, unit: bool = True) -> str:
        return f"{100 * change:+.1f}{' points' * unit}" if self.binary else f"{change:+.4g}"

    def caveats(self) -> tuple[str, ...]:
        """Return what the numbers do not take into account."""
        said = ["Not corrected for: other groups, sizes k, metrics and models that are judged beside this one."]
        if not self.apart:
            said.append("Whether the edit was searched on these examples is not known; if so, they say nothing of it.")
        said.append("Random sets are not searched for: whether the group is special takes matched() examples.")
        return tuple(said)
