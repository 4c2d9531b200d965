"""Stage 1 of the paper: which edits each experiment makes, and what they change.

An experiment is a list of interventions: an edit with what it was chosen by. Measuring is one sweep for each experiment
and split, so a change is always between the same examples, before and after, and has a paired interval.

Source: You et al., "The Silent Majority", 2025, experiments 1a to 1g. The same-layer controls and their p-values are an
addition: the paper's control is drawn from the whole model, where most neurons lie in layers that matter less.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.silencing import beside_layers
from neuronsurgery.study.progress import Count
from neuronsurgery.study.run import Parts
from neuronsurgery.sweeps import sweep_in_parts
from neuronsurgery.types import Loader

SIZES: Final = (1, 2, 3)
STANDARD_DEVIATIONS: Final = (0.005, 0.01, 0.02)  # the paper's, absolute
RELATIVE_STD: Final = 1.0  # stands beside them, since 0.02 means little to a layer of another scale
DISTANCES: Final = (5, 10, 20, 30, 40)
CONTROL_FRACTIONS: Final = (0.0001, 0.0002, 0.0003, 0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
RANK_SHARES: Final = (0.0001, 0.05)
DRAW_SEED: Final = 20250101  # the first of all random draws: fixed, so that no run's seed chooses its own controls

# Of the parts in which an experiment is measured and written down:
SECONDS: Final = 2.0  # how long one should take
FEWEST: Final = 4  # edits of the first, for which the model is captured, and of any: it costs about two edits more
GROWTH: Final = 4  # how many times as many edits as the one before it may have


@dataclass(frozen=True)
class Studied:
    """The predicate of the layers that are studied: all but a classifier's own, by the names of their parameters.

    To zero a row of those decides between the classes by construction and says nothing about memorisation.
    """

    head: tuple[str, ...]

    def __call__(self, name: str, module: nn.Module, parameter: Tensor) -> bool:
        """Return whether a layer is studied."""
        return name not in self.head


def studied(head: Collection[str]) -> Studied:
    """Return the predicate of the layers that are studied, given the names of the classifier's parameters."""
    return Studied(tuple(sorted(head)))  # sorted, since the settings of a run write it down


@dataclass(frozen=True)
class Intervention:
    """One edit of an experiment with what distinguishes it from the others, where that is something.

    The criterion that chose its neurons is "gradient", "magnitude", "random", "same layers" or "rewind", and
    `chosen_for` the group whose gradient it was. A control has a `fraction` of the model, a random edit the scale of
    its draws, a rewind its `distance` in epochs; `with_norm` says that the norm that follows the layer goes with it.
    """

    edit: ns.Edit
    criterion: str
    chosen_for: str = "all"
    k: int | None = None
    fraction: float | None = None
    std: float | None = None
    relative_std: float | None = None
    layer: str | None = None
    distance: int | None = None
    with_norm: bool = False
    draw: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return what was done as JSON values, with the names of at most twenty neurons."""
        neurons = self.edit.neurons
        said = {name: value for name, value in vars(self).items() if name != "edit"}
        return {**said, "neurons": len(neurons), "names": [str(neuron) for neuron in islice(neurons, 20)]}


@dataclass(frozen=True)
class Subject:
    """The trained model and all that the experiments choose by.

    `checkpoints` are the files to rewind to, by epoch; the last is the model's own. Of random edits there are `draws`,
    of the controls behind an empirical p-value `control_draws`. `batch` shows which norm follows which layer, which is
    written down in `kept`, since to see it takes seconds.
    """

    model: nn.Module
    gradients: ns.Scores
    magnitudes: ns.Scores
    draws: int
    control_draws: int
    checkpoints: Mapping[int, Path]
    batch: Any
    kept: Parts = field(default_factory=Parts)

    @property
    def layout(self) -> ns.Layout:
        """The studied layers."""
        return self.gradients.layout

    def chosen(self, per: Any = "model") -> Iterator[tuple[str, str, int, ns.Neurons]]:
        """Yield (criterion, group, k, neurons) of every way to choose the top neurons."""
        for k in SIZES:
            if per == "layer" or k <= self.layout.count:
                for group in self.gradients.groups:
                    yield "gradient", str(group), k, ns.topk(self.gradients[group], k, per=per)
                yield "magnitude", "all", k, ns.topk(self.magnitudes, k, per=per)

    @functools.cached_property
    def critical(self) -> ns.Neurons:
        """Every neuron that is among the top three of the model by any criterion."""
        return functools.reduce(lambda a, b: a | b, (neurons for *_, neurons in self.chosen()))


# The experiments


def global_zero_out(subject: Subject) -> Iterator[Intervention]:
    """Yield 1a: zero the top neurons of the whole model."""
    for criterion, group, k, neurons in subject.chosen():
        yield Intervention(ns.zero_out(neurons), criterion, group, k)


def randomised(edit: Callable[..., ns.Edit], subject: Subject) -> Iterator[Intervention]:
    """Yield 1c and 1d: replace the top neurons by normal draws, or add draws to them."""
    scales: list[dict[str, float]] = [{"std": std} for std in STANDARD_DEVIATIONS] + [{"relative_std": RELATIVE_STD}]
    for (criterion, group, k, neurons), scale, draw in product(subject.chosen(), scales, range(subject.draws)):
        made = edit(neurons, **scale, seed=DRAW_SEED + draw)
        yield Intervention(made, criterion, group, k, **scale, draw=draw)  # type: ignore[arg-type]  # std, relative_std


def zero_out_within_layers(subject: Subject) -> Iterator[Intervention]:
    """Yield 1e: zero the top neurons within each layer in turn."""
    for (criterion, group, k, neurons), layer in product(subject.chosen(per="layer"), subject.layout):
        part = neurons & ns.select(subject.layout, {layer.parameter: ...})
        yield Intervention(ns.zero_out(part), criterion, group, k, layer=layer.parameter)


def rewind_layers(subject: Subject) -> Iterator[Intervention]:
    """Yield 1f: every layer in turn as it was some epochs earlier, alone and with the norm that follows it."""
    every, last = ns.find_layout(subject.model, extra="*"), max(subject.checkpoints)
    paths = {distance: subject.checkpoints[last - distance] for distance in DISTANCES if distance <= last}
    norms = subject.kept.of("norms that follow", functools.partial(_following_norms, subject))
    for layer in subject.layout:
        module = layer.parameter.rpartition(".")[0]
        own = [other.parameter for other in every if other.parameter.rpartition(".")[0] == module]
        alone = ns.select(every, dict.fromkeys(own, ...))
        wide = alone | ns.select(every, dict.fromkeys(norms.get(layer.parameter, []), ...))
        for (distance, path), part in product(paths.items(), dict.fromkeys([alone, wide])):  # one, without a norm
            edit, with_norm = ns.rewind(part, path), part != alone
            yield Intervention(edit, "rewind", layer=layer.parameter, distance=distance, with_norm=with_norm)


def _following_norms(subject: Subject) -> dict[str, list[str]]:
    """Return by layer the parameters of the normalisation that reads it alone, where there is one."""
    beside = beside_layers(subject.layout, subject.model, subject.batch)
    return {
        layer.parameter: [other.parameter for other in neurons.by_layer() if other != layer]
        for layer, neurons in beside.items()
    }


def controls(subject: Subject) -> Iterator[Intervention]:
    """Yield 1g: zero random neurons that are not critical.

    The paper's are a share of the model (at least one). Those for p-values are as many as each critical set has, from
    its layers and from all.
    """
    layout, critical = subject.layout, subject.critical
    for fraction, draw in product(CONTROL_FRACTIONS, range(subject.draws)):
        size = min(layout.count - len(critical), max(1, round(fraction * layout.count)))
        drawn = ns.sample(layout, size, seed=DRAW_SEED + draw, exclude=critical)
        yield Intervention(ns.zero_out(drawn), "random", fraction=fraction, draw=draw)
    kinds = ("same layers", "random")
    for (_, group, k, neurons), kind, draw in product(subject.chosen(), kinds, range(subject.control_draws)):
        drawn = _matched(subject, neurons, kind, DRAW_SEED + draw)
        yield Intervention(ns.zero_out(drawn), kind, group, k, draw=draw)


def _matched(subject: Subject, neurons: ns.Neurons, kind: str, seed: int) -> ns.Neurons:
    if kind == "random":
        return ns.sample(subject.layout, len(neurons), seed=seed, exclude=subject.critical)
    drawn = ns.Neurons()
    for layer, indices in neurons.by_layer().items():
        left = ns.select(subject.layout, {layer.parameter: ...}) - subject.critical
        if left:  # a layer of one neuron has none beside the critical one
            drawn |= ns.sample(left, min(len(indices), len(left)), seed=seed)
    return drawn


EXPERIMENTS: Final[Mapping[str, Callable[[Subject], Iterable[Intervention]]]] = {
    "1a": global_zero_out,
    "1c": functools.partial(randomised, ns.random_init),
    "1d": functools.partial(randomised, ns.random_noise),
    "1e": zero_out_within_layers,
    "1f": rewind_layers,
    "1g": controls,
}


# What comes out


def measure(
    model: nn.Module, interventions: Iterable[Intervention], loaders: Mapping[str, Loader], kept: Parts
) -> list[dict[str, Any]]:
    """Return one record per intervention: what was done, and by group what it changes; equal edits are measured once.

    What was measured before a kill is in `kept`, where changes are written down every few seconds.
    """
    made = list(interventions)
    identities = {edit: identity(edit) for edit in dict.fromkeys(said.edit for said in made)}
    left = {name: edit for edit, name in identities.items() if name not in kept}
    done, count = len(identities) - len(left), Count(len(identities), "different edits")
    for swept in sweep_in_parts(model, _by_seconds(left), loaders):
        kept.keep(changes_of(swept))
        done += len(swept)
        count.at(done)
    return [{**said.to_record(), "changes": kept[identities[said.edit]]} for said in made]


def identity(edit: ns.Edit) -> str:
    """Return a digest of all that an edit does."""
    neurons = [[layer.parameter, layer.pattern, indices] for layer, indices in edit.neurons.by_layer().items()]
    said = json.dumps([type(edit).__name__, neurons, edit.content()[0]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _by_seconds(edits: Mapping[str, ns.Edit]) -> Iterator[dict[str, ns.Edit]]:
    """Yield the edits in parts that take `SECONDS`, as the part before lets expect; the first ones are small."""
    names, size = list(edits), FEWEST
    while names:
        now, names = names[:size], names[size:]
        started = time.perf_counter()
        yield {name: edits[name] for name in now}
        rate = len(now) / max(time.perf_counter() - started, 1e-3)
        size = max(FEWEST, min(round(rate * SECONDS), GROWTH * size))


def changes_of(swept: ns.Sweep) -> dict[str, list[dict[str, Any]]]:
    """Return by edit one record per group: before, after (as value), change, interval, p and count."""
    changes: dict[str, list[dict[str, Any]]] = {label: [] for label in swept.labels}
    for row in swept.to_records():
        changes[row.pop("label")].append({"before": swept.baseline[row["group"]], **row})
    return changes


def rank_percentiles(gradients: ns.Scores, magnitudes: ns.Scores) -> list[dict[str, Any]]:
    """Return 1b: where the top neurons by one criterion rank by the other, as percentiles."""
    records = []
    for share, group in product(RANK_SHARES, gradients.groups):
        scores = {"gradient": gradients[group], "magnitude": magnitudes}
        for chosen_by, ranked_by in permutations(scores):
            chosen = ns.top_fraction(scores[chosen_by], share)
            said = {"chosen_by": chosen_by, "ranked_by": ranked_by, "group": str(group), "share": share}
            percentiles = ns.ranks(scores[ranked_by], of=chosen)[0].tolist()
            records.append({**said, "neurons": len(chosen), "percentiles": percentiles})
    return records
