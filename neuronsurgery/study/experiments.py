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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study.progress import Count
from neuronsurgery.study.run import Parts
from neuronsurgery.sweeps import sweep_in_parts
from neuronsurgery.types import Loader

SIZES: Final = (1, 2, 3)
STANDARD_DEVIATIONS: Final = (0.005, 0.01, 0.02)
"""The paper's absolute scales; RELATIVE_STD stands beside them, since 0.02 means little to a layer of another scale."""

RELATIVE_STD: Final = 1.0
DISTANCES: Final = (5, 10, 20, 30, 40)
CONTROL_FRACTIONS: Final = (0.0001, 0.0002, 0.0003, 0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
RANK_SHARES: Final = (0.0001, 0.05)
SECONDS: Final = 2.0
"""How long a part of an experiment should take, after which it is written down."""

FEWEST: Final = 4
"""The edits of the first part, for which the model is captured, too, and of any: a part costs about two edits more."""

GROWTH: Final = 4
"""How many times as many edits as the one before a part may have."""

DRAW_SEED: Final = 20250101
"""First seed of all random draws: fixed, so that no run's seed chooses its own controls."""


@dataclass(frozen=True)
class Studied:
    """The predicate of the layers that are studied: all but a classifier's own rows.

    To zero one of those decides between the classes by construction and says nothing about memorisation.

    Attributes:
        head: the names of the classifier's parameters.
    """

    head: tuple[str, ...]

    def __call__(self, name: str, module: nn.Module, parameter: Tensor) -> bool:
        """Return whether a layer is studied."""
        return name not in self.head


def studied(head: Collection[str]) -> Studied:
    """Return the predicate of the layers that are studied, given the names of the classifier's parameters."""
    return Studied(tuple(sorted(head)))


@dataclass(frozen=True)
class Intervention:
    """One edit of an experiment.

    Attributes:
        edit: the edit.
        criterion: what chose the neurons: "gradient", "magnitude", "random", "same layers" or "rewind".
        chosen_for: the group whose gradient chose them, or "all".
        k: of top-k, or None.
        fraction: the share of the model for a control, or None.
        std: absolute scale of a random edit, or None.
        relative_std: relative scale of a random edit, or None.
        layer: the layer, where the experiment goes through the layers.
        distance: epochs back of a rewind, or None.
        with_norm: whether the normalisation that follows is rewound with the layer.
        draw: the number of the random draw.
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
        """Return what was done as JSON values."""
        neurons = self.edit.neurons
        said = {name: value for name, value in vars(self).items() if name != "edit"}
        names = [str(neuron) for _, neuron in zip(range(20), neurons, strict=False)]
        return {**said, "neurons": len(neurons), "names": names}


@dataclass(frozen=True)
class Subject:
    """The trained model and all that the experiments choose by.

    Attributes:
        model: the trained model.
        gradients: the norms of every group's gradient.
        magnitudes: the norms of the weights.
        draws: how many random draws are averaged (10 in the paper).
        control_draws: how many controls an empirical p-value rests on.
        checkpoints: by epoch, the files to rewind to; the last is the model's own.
        batch: one batch, to see which norm follows which layer.
        kept: where that is written down, since to see it takes seconds.
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

    @property
    def epochs(self) -> int:
        """The epoch of the trained model."""
        return max(self.checkpoints)

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


def global_zero_out(subject: Subject) -> list[Intervention]:
    """Return 1a: zero the top neurons of the whole model."""
    return [
        Intervention(ns.zero_out(neurons), criterion, group, k) for criterion, group, k, neurons in subject.chosen()
    ]


def random_init(subject: Subject) -> list[Intervention]:
    """Return 1c: replace the top neurons by normal draws."""
    return _randomised(subject, ns.random_init)


def random_noise(subject: Subject) -> list[Intervention]:
    """Return 1d: add normal draws to the top neurons."""
    return _randomised(subject, ns.random_noise)


def _randomised(subject: Subject, edit: Callable[..., ns.Edit]) -> list[Intervention]:
    scales: list[dict[str, float]] = [{"std": std} for std in STANDARD_DEVIATIONS] + [{"relative_std": RELATIVE_STD}]
    return [
        Intervention(
            edit(neurons, **scale, seed=DRAW_SEED + draw),
            criterion,
            group,
            k,
            std=scale.get("std"),
            relative_std=scale.get("relative_std"),
            draw=draw,
        )
        for criterion, group, k, neurons in subject.chosen()
        for scale in scales
        for draw in range(subject.draws)
    ]


def zero_out_within_layers(subject: Subject) -> list[Intervention]:
    """Return 1e: zero the top neurons within each layer in turn."""
    return [
        Intervention(ns.zero_out(part), criterion, group, k, layer=layer.parameter)
        for criterion, group, k, neurons in subject.chosen(per="layer")
        for layer in subject.layout
        for part in [neurons & ns.select(subject.layout, {layer.parameter: ...})]
    ]


def rewind_layers(subject: Subject) -> list[Intervention]:
    """Return 1f: every layer in turn as it was some epochs earlier, alone and with the norm that follows it."""
    interventions = []
    every = ns.find_layout(subject.model, extra="*")
    for layer in subject.layout:
        prefix = layer.parameter.rpartition(".")[0]
        own = [other.parameter for other in every if other.parameter.rpartition(".")[0] == prefix]
        whole = ns.select(every, dict.fromkeys(own, ...))
        wide = whole | _following_norm(subject, layer, every)
        for distance in distances(subject.epochs):
            path = subject.checkpoints[subject.epochs - distance]
            variants = [(whole, False)] + ([(wide, True)] if len(wide) > len(whole) else [])
            interventions += [
                Intervention(
                    ns.rewind(part, path), "rewind", layer=layer.parameter, distance=distance, with_norm=with_norm
                )
                for part, with_norm in variants
            ]
    return interventions


def distances(epochs: int) -> list[int]:
    """Return the paper's distances that a run of so many epochs has a checkpoint for."""
    return [distance for distance in DISTANCES if distance <= epochs]


def _following_norm(subject: Subject, layer: ns.Layer, every: ns.Layout) -> ns.Neurons:
    """Return all entries of the normalisation that reads a layer alone; none where there is none."""

    def found() -> list[str]:
        try:
            silent = ns.silence(ns.select(subject.layout, {layer.parameter: ...}), subject.model, subject.batch)
        except ValueError:  # what follows is no layer's alone
            return []
        return [other.parameter for other in silent.neurons.by_layer() if other != layer]

    names = subject.kept.of(f"norm that follows {layer.parameter}", found)
    return ns.select(every, dict.fromkeys(names, ...))


def random_controls(subject: Subject) -> list[Intervention]:
    """Return the paper's 1g: zero random neurons that are not critical, a share of the model (at least one)."""
    layout = subject.layout
    left = layout.count - len(subject.critical)
    return [
        Intervention(
            ns.zero_out(ns.sample(layout, size, seed=DRAW_SEED + draw, exclude=subject.critical)),
            "random",
            fraction=fraction,
            draw=draw,
        )
        for fraction in CONTROL_FRACTIONS
        for size in [min(left, max(1, round(fraction * layout.count)))]
        for draw in range(subject.draws)
    ]


def matched_controls(subject: Subject) -> list[Intervention]:
    """Return the controls for p-values: for each critical set as many random neurons, from its layers and from all."""
    interventions = []
    for criterion, group, k, neurons in subject.chosen():
        for kind in ("same layers", "random"):
            for draw in range(subject.control_draws):
                drawn = _matched(subject, neurons, kind, DRAW_SEED + draw)
                name = group if criterion == "gradient" else "all"
                interventions.append(Intervention(ns.zero_out(drawn), kind, name, k, draw=draw))
    return interventions


def _matched(subject: Subject, neurons: ns.Neurons, kind: str, seed: int) -> ns.Neurons:
    if kind == "random":
        return ns.sample(subject.layout, len(neurons), seed=seed, exclude=subject.critical)
    drawn = ns.Neurons()
    for layer, indices in neurons.by_layer().items():
        left = ns.select(subject.layout, {layer.parameter: ...}) - subject.critical
        if left:  # a layer of one neuron has none beside the critical one
            drawn |= ns.sample(left, min(len(indices), len(left)), seed=seed)
    return drawn


EXPERIMENTS: Final[Mapping[str, Callable[[Subject], list[Intervention]]]] = {
    "1a": global_zero_out,
    "1c": random_init,
    "1d": random_noise,
    "1e": zero_out_within_layers,
    "1f": rewind_layers,
    "1g": lambda subject: random_controls(subject) + matched_controls(subject),
}


# What comes out


def measure(
    model: nn.Module,
    interventions: Sequence[Intervention],
    loaders: Mapping[str, Loader],
    *,
    kept: Parts | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Return one record per intervention: what was done, and by group before, after, change, interval, p and count.

    Args:
        model: the trained model.
        interventions: what to measure; those of equal edits are measured once.
        loaders: a loader per group.
        kept: what was measured before a kill, and where it is written down every few seconds.
        progress: whether to write lines of progress to standard error.
    """
    identities = {edit: identity(edit) for edit in dict.fromkeys(said.edit for said in interventions)}
    changes = Parts() if kept is None else kept
    left = {name: edit for edit, name in identities.items() if name not in changes}
    done = len(identities) - len(left)
    count = Count(len(identities), "different edits")
    for swept in sweep_in_parts(model, _by_seconds(left), loaders):
        changes.keep({name: changes_of(swept, name) for name in swept.labels})
        done += len(swept)
        if progress:
            count.at(done)
    return [{**said.to_record(), "changes": changes[identities[said.edit]]} for said in interventions]


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


def changes_of(swept: ns.Sweep, label: str) -> list[dict[str, Any]]:
    """Return by group before, after, change, interval, p and count of one edit of a sweep."""
    change, interval, p = swept.change(label), swept.interval(label), swept.p_value(label)
    return [
        {
            "group": group,
            "before": swept.baseline[group],
            "after": swept[label][group],
            "change": change[group],
            "low": interval[group][0],
            "high": interval[group][1],
            "p": p[group],
            "count": count,
        }
        for group, count in zip(swept.baseline.groups, swept.baseline.counts, strict=True)
    ]


def rank_percentiles(
    gradients: ns.Scores, magnitudes: ns.Scores, shares: Sequence[float] = RANK_SHARES
) -> list[dict[str, Any]]:
    """Return 1b: where the top neurons by one criterion rank by the other, as percentiles."""
    records = []
    for share in shares:
        for group in gradients.groups:
            own = gradients[group]
            for chosen_by, chooser, ranked_by, ranker in (
                ("gradient", own, "magnitude", magnitudes),
                ("magnitude", magnitudes, "gradient", own),
            ):
                chosen = ns.top_fraction(chooser, share)
                percentiles = ns.ranks(ranker, of=chosen)[0]
                records.append(
                    {
                        "chosen_by": chosen_by,
                        "ranked_by": ranked_by,
                        "group": str(group),
                        "share": share,
                        "neurons": len(chosen),
                        "percentiles": percentiles.tolist(),
                    }
                )
    return records
