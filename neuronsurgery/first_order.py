"""First-order effects of edits on each example's metric, from one forward and one backward pass over the data.

What is seen at the outputs of layers is heard there; a few examples of the first batch are run one by one to compare it
with gradients to the weights, and where the two differ these are what counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from neuronsurgery.batches import Batch, Examples, Unpack, group_members, inseparable, ordered_groups
from neuronsurgery.copies import Runner
from neuronsurgery.differentiation import Within, differentiable, differentiable_rnns, goes_past
from neuronsurgery.distributed import exchange
from neuronsurgery.errors import EXHAUSTED, checked, checked_function
from neuronsurgery.evaluation import METRIC
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.gathering import Gathered
from neuronsurgery.independence import HALF, dependence
from neuronsurgery.layers import Layer
from neuronsurgery.loaders import iterate_groups, named_loaders
from neuronsurgery.losses import refuse_unshifted_metrics
from neuronsurgery.outputs import Listener, Place
from neuronsurgery.surveys import Survey
from neuronsurgery.switches import KERNELS, without_mha_fastpath
from neuronsurgery.terms import Term
from neuronsurgery.types import Group, Loaders, Metric, Predict

FEW = 4
"""Of so many examples what is heard at the outputs is compared with gradients to the weights."""

TOLERANCE = 1e-3
"""A larger difference, relative to the largest effect, is no rounding; in half precision one fifty times as large."""

Transform = Callable[[Tensor], Tensor]
"""The metric of each example, float64 -> what its effect is to be measured in."""


# One pass over the data


def mean_effects(
    runner: Runner,
    surveyed: Survey,
    terms: Sequence[Term],
    loaders: Loaders,
    metric: Metric,
    transform: Transform | None,
    predict: Predict | None,
    unpack: Unpack | None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[dict[Group, Tensor], dict[Group, int]]:
    """Return by group the mean effect of every neuron that is asked for, float64, on the CPU; and the counts."""
    checked(metric, Callable, METRIC)
    checked_function(transform, "transform")
    checked_function(predict, "predict")
    loaders = named_loaders(loaders)
    going = _Pass(runner, surveyed, terms, metric, transform, predict)
    error = None
    try:
        with without_mha_fastpath():
            label = "effects" if progress else None
            for groups, batch in iterate_groups(loaders, device=runner.device, unpack=unpack, progress=label):
                going.add(groups, batch)
    except Exception as raised:
        error = raised
    sums = {group: total.cpu() for group, total in going.sums.items()}
    named = list(loaders) if isinstance(loaders, Mapping) else None
    shares = exchange(process_group, error, (named, sums, going.counts))
    present = [group for _, own, _ in shares for group in own]
    order = shares[0][0]
    groups = ordered_groups(present) if order is None else list(dict.fromkeys(g for o, _, _ in shares for g in o))
    counts = {group: sum(own.get(group, 0) for _, _, own in shares) for group in groups}
    empty = [group for group, count in counts.items() if not count]
    if empty or not groups:
        raise ValueError(
            f"no examples of {', '.join(map(repr, empty)) or 'any group'}: the loader yielded no batch. {EXHAUSTED}"
        )
    return {
        group: torch.stack([own[group] for _, own, _ in shares if group in own]).sum(0) / counts[group]
        for group in groups
    }, counts


class _Pass:
    """The sums of effects by group so far, and how each term's effects come by.

    Attributes:
        sums: by group, float64, one entry for each neuron of each term.
        counts: the examples of each group.
    """

    def __init__(
        self,
        runner: Runner,
        surveyed: Survey,
        terms: Sequence[Term],
        metric: Metric,
        transform: Transform | None,
        predict: Predict | None,
    ) -> None:
        self.sums: dict[Group, Tensor] = {}
        self.counts: dict[Group, int] = {}
        self._runner, self._metric, self._predict = runner, metric, predict
        self._transform = transform or (lambda values: values)
        self._apart = transform is not None  # whether every example's own effects are needed
        self._size = max((term.start + term.layer.count for term in terms), default=0)
        self._terms = list(terms)
        self._heard: list[Term] | None = None  # known after the first batch
        self._written: list[Term] = []
        self._compared: set[Place] = set()  # where what is heard was compared with gradients
        self._examples = 0  # on how many examples
        names = surveyed.first_names({layer.parameter for term in terms for layer in term.reads})
        self._names = {layer: names[layer.parameter] for term in terms for layer in term.reads}

    def add(self, groups: Sequence[Group], batch: Batch) -> None:
        """Add the effects on the examples of a batch."""
        if self._examples < min(2, len(batch)):  # one example shows nothing of how several are told apart
            self._compare(batch)
        members = group_members(groups)
        for group, indices in members.items():
            self.counts[group] = self.counts.get(group, 0) + len(indices)
            if group not in self.sums:
                self.sums[group] = torch.zeros(self._size, dtype=torch.float64, device=batch.targets.device)
        while not self._within((), self._add, batch, members):
            pass  # once more, with fewer layers that are heard

    # How a batch runs

    def _within(self, leaves: Sequence[Layer], function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function gives while the model's parameters are tensors of which some get a gradient."""
        wanted = {self._names[layer] for layer in leaves}
        every = self._runner.parameters.items()
        self._tensors = {name: differentiable(tensor).requires_grad_(name in wanted) for name, tensor in every}
        given = {f"model.{at}": tensor for name, tensor in self._tensors.items() for at in self._runner.places[name]}
        with torch.enable_grad(), differentiable_rnns(self._runner), KERNELS.steady():
            try:
                return functional_call(Within(self._runner.model), given, (function, *args), tie_weights=False)
            finally:
                self._runner.attributes.restore()  # the graph of what was kept is gone

    def _values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of a batch and the metric of each example."""
        logits = extract_logits(isolated_forward(self._runner, batch), self._predict, len(batch))
        refuse_unshifted_metrics((self._metric,), logits, batch)
        values = self._metric(logits, batch.targets)
        if not isinstance(values, Tensor) or values.shape != batch.targets.shape[:1]:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"metric must return one value per example, shape ({len(batch)},), not {found}")
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise ValueError(
                f"the metric of {wrong} of {len(values)} examples is NaN or infinite: look for bad inputs, or for "
                f"sequences without a label that counts"
            )
        return logits, values

    def _add(self, batch: Batch, members: Mapping[Group, Sequence[int]]) -> bool:
        """Return whether the effects were added: not if the batch comes to some layers otherwise than those heard."""
        collected = _Collected(self._heard or (), self._deliver(members))
        rest = [] if self._apart else self._written
        for layer in (layer for term in rest for layer in term.reads):
            self._tensors[self._names[layer]].requires_grad_()
        with collected.listener.listening(len(batch)):
            _, values = self._values(batch)
            if self._strayed(collected.listener.whole):
                return False
            if self._heard or rest:  # else gradients are taken of one example at a time, below
                self._refuse_flat(values, batch, [*(self._heard or ()), *rest])
            collected.values = values.detach().double()
            together: Sequence[Tensor] = ()
            if self._heard or len(members) == 1:  # else there is nothing to be had of all groups at once
                together = self._effects(rest, values.sum(), collected.listener.roots, retain=len(members) > 1)
            collected.finish()
        for left, (group, indices) in enumerate(members.items(), start=1):
            if rest:
                own = values[list(indices)].sum()
                found = together if len(members) == 1 else self._effects(rest, own, (), left < len(members))
                for term, effects in zip(rest, found, strict=True):
                    self.sums[group][term.span] += effects
        if self._apart and self._written:
            self._add_one_by_one(batch, collected.values, members)
        return True

    def _strayed(self, calls: Mapping[Place, bool]) -> bool:
        """Return whether some layers are called as they were not where they were compared: these are written from now.

        An expert is given a part of the examples, or none of the first few.

        Args:
            calls: of the modules that were called, whether always with whole examples.
        """
        heard = self._heard or []
        astray = {place for place, whole in calls.items() if not whole or place not in self._compared}
        self._heard = [term for term in heard if term.place not in astray]
        self._written += [term for term in heard if term not in self._heard]
        return len(self._heard) < len(heard)

    def _refuse_flat(self, values: Tensor, batch: Batch, terms: Sequence[Term]) -> None:
        if not values.requires_grad and not self._goes_past(batch, terms):
            name = getattr(self._metric, "__name__", type(self._metric).__name__)
            raise ValueError(
                f"{name} has no gradient, or something cuts it off (no_grad or detach in the forward or in predict=): "
                f"pass a metric that changes with the logits, such as margin"
            )

    def _goes_past(self, batch: Batch, terms: Sequence[Term]) -> bool:
        """Return whether a batch reads no layer of some terms (it goes past an expert), but is not cut off."""
        wanted = [self._tensors[self._names[layer]] for term in terms for layer in term.reads]
        return not self._runner.is_spread and goes_past(lambda: self._values(batch)[1], self._tensors.values(), wanted)

    def _deliver(self, members: Mapping[Group, Sequence[int]]) -> Callable[[Term, Tensor, Tensor], None]:
        def deliver(term: Term, values: Tensor, effects: Tensor) -> None:
            if self._apart:
                before = values[:, None]
                effects = self._transform(before + effects.double()) - self._transform(before)
            for group, indices in members.items():
                own = effects if len(indices) == len(effects) else effects[list(indices)]
                self.sums[group][term.span] += own.double().sum(0)

        return deliver

    def _effects(self, terms: Sequence[Term], of: Tensor, roots: Sequence[Tensor], retain: bool) -> list[Tensor]:
        """Return by term the effects on a sum of metrics; what is listened to comes by on the way."""
        served = _Served(terms, self._runner, self._names)
        with served.listening():
            gradients = self._gradients(terms, of, roots, retain)
        weights = {layer: self._tensors[self._names[layer]] for term in terms for layer in term.reads}
        return [
            served.effects[term.start] if term.start in served.effects else term.written(weights, gradients)
            for term in terms
        ]

    def _gradients(
        self, terms: Sequence[Term], of: Tensor, roots: Sequence[Tensor], retain: bool
    ) -> dict[Layer, Tensor | None]:
        """Return the gradients to the weights that terms read."""
        layers = list({layer: None for term in terms for layer in term.reads})
        leaves = [*(self._tensors[self._names[layer]] for layer in layers), *roots]
        if not leaves or not of.requires_grad:  # of examples that go past all of these layers
            return dict.fromkeys(layers)
        found = torch.autograd.grad(of, leaves, allow_unused=True, retain_graph=retain)
        return dict(zip(layers, found, strict=False))

    def _add_one_by_one(self, batch: Batch, values: Tensor, members: Mapping[Group, Sequence[int]]) -> None:
        """Add the effects on each example of what is not seen at outputs, from gradients of one example at a time."""
        deliver = self._deliver(members)
        rows = self._within(
            [layer for term in self._written for layer in term.reads], self._each, self._written, batch, len(batch)
        )
        for term, effects in zip(self._written, rows, strict=True):
            deliver(term, values, effects)

    def _each(self, terms: Sequence[Term], batch: Batch, count: int) -> list[Tensor]:
        """Return by term the effects on the first examples of a batch, float64, shape (count, neurons)."""
        rows: list[list[Tensor]] = [[] for _ in terms]
        for at, one in self._apart_values(terms, batch, count):
            last = at == count - 1
            effects = self._effects(terms, one, (), retain=not last)
            for row, own in zip(rows, effects, strict=True):
                row.append(own)
        return [torch.stack(row) for row in rows]

    def _apart_values(self, terms: Sequence[Term], batch: Batch, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the metric of each of the first examples of a batch, two of them run at a time.

        Not one: in a batch of one some of torch's operators take other paths, and one of these has wrong gradients.
        """
        if inseparable(batch):
            yield from enumerate(self._sloped_values(terms, batch)[:count])
            return
        examples = Examples.of(batch)
        for at in range(0, count, 2):
            second = at + 1 if at + 1 < len(batch) else max(at - 1, 0)
            values = self._sloped_values(terms, examples.take([at, second]).batch())
            yield at, values[0]
            if at + 1 < count:
                yield at + 1, values[1]

    def _sloped_values(self, terms: Sequence[Term], batch: Batch) -> Tensor:
        """Return the metric of each example, which has a gradient."""
        _, values = self._values(batch)
        self._refuse_flat(values, batch, terms)
        return values

    # What is heard

    def _compare(self, batch: Batch) -> None:
        """Find out, on a few examples, of which terms the effects are heard at the outputs; written are the others."""
        few = batch if inseparable(batch) else Examples.of(batch).take(range(min(FEW, len(batch)))).batch()
        placed = [term for term in self._terms if term.place is not None]
        rough = False
        heard: dict[int, Tensor] = {}

        def note(term: Term, values: Tensor, effects: Tensor) -> None:
            heard[id(term)] = effects.double()

        def listen() -> None:
            nonlocal rough
            self._refuse_dependence(batch)
            collected = _Collected(placed, note)
            with collected.listener.listening(len(few)):
                logits, values = self._values(few)
                collected.values = values.detach()
                half = (logits, *self._runner.parameters.values())
                rough = torch.is_autocast_enabled(logits.device.type) or any(t.dtype in HALF for t in half)
                if collected.listener.roots or not placed:  # an attention does not call its own projection
                    self._refuse_flat(values, few, placed or self._terms)
                self._effects((), values.sum(), collected.listener.roots, retain=False)
                collected.finish()
                self._compared = {place for place, whole in collected.listener.whole.items() if whole}

        layers = [layer for term in placed for layer in term.reads]
        # Where nothing is placed there is nothing to hear, and nothing else that needs a gradient.
        self._within(() if placed else [layer for term in self._terms for layer in term.reads], listen)
        count = self._examples = min(FEW, len(few))
        expected = self._within(layers, self._each, placed, few, count) if placed else []
        right = set()
        for term, effects in zip(placed, expected, strict=True):
            found = heard.get(id(term))
            found = torch.zeros_like(effects) if found is None else found[:count]
            largest = max(float(effects.abs().max()), float(found.abs().max()))
            if float((found - effects).abs().max()) <= TOLERANCE * (50 if rough else 1) * largest:
                right.add(id(term))
        self._heard = [term for term in self._terms if id(term) in right]
        self._written = [term for term in self._terms if id(term) not in right]

    def _refuse_dependence(self, batch: Batch) -> None:
        if len(batch) < 2:
            return
        with torch.no_grad():
            logits, values = self._values(batch)
            found = dependence(self._values, batch, logits, values, self._runner.parameters.values())
        if found:
            raise ValueError(
                f"{found.replace('losses', 'metric')}. An effect is that on one example's metric: give a model and a "
                f"metric whose examples do not depend on each other"
            )


class _Served:
    """The effects of terms whose weights FSDP shards: each is had of a whole gradient, which is then forgotten.

    Attributes:
        effects: by where they stand, float64; zero where no gradient comes.
    """

    def __init__(self, terms: Sequence[Term], runner: Runner, names: Mapping[Layer, str]) -> None:
        self._service = runner.service
        self._terms: dict[int, list[tuple[Term, Gathered]]] = {}
        self.effects: dict[int, Tensor] = {}
        for term in terms if runner.gathered else ():  # all of them are of zeroing then
            if (way := runner.gathered.get(names[term.layer])) is not None:
                self._terms.setdefault(way.number, []).append((term, way))
                device = runner.device
                self.effects[term.start] = torch.zeros(term.layer.count, dtype=torch.float64, device=device)

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Listen to a backward pass."""
        return contextlib.nullcontext() if self._service is None else self._service.given_to(self._hear)

    def _hear(self, number: int, gradient: Tensor) -> None:
        assert self._service is not None
        for term, way in self._terms.get(number, ()):
            weight = way.after_steps(self._service.weight(number))
            self.effects[term.start] += term.written({term.layer: weight}, {term.layer: gradient})


class _Collected:
    """The effects on the examples of one batch as they are heard, handed on term by term and forgotten."""

    def __init__(self, terms: Sequence[Term], deliver: Callable[[Term, Tensor, Tensor], None]) -> None:
        self.values = torch.zeros(0, device="cpu")
        self._deliver = deliver
        self._by_place: dict[Place, Term] = {term.place: term for term in terms if term.place is not None}
        self._calls: dict[Place, Tensor] = {}
        self.listener = Listener(list(self._by_place), self._hear)

    def _hear(self, place: Place, values: Tensor, gradients: Tensor, last: bool) -> None:
        effects = self._by_place[place].heard(values, gradients)
        if place in self._calls:
            effects = self._calls.pop(place) + effects
        if last:
            self._deliver(self._by_place[place], self.values, effects)
        else:
            self._calls[place] = effects

    def finish(self) -> None:
        """Hand on what is known of modules of which a call had no part in the metric, and listen no longer."""
        self.listener.awake = False
        for place, effects in self._calls.items():
            self._deliver(self._by_place[place], self.values, effects)
        self._calls = {}
