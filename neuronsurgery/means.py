"""Mean ablation as an edit of weights: the output of a neuron held at its mean over some examples.

Behind a batch norm that alone reads it, a channel is held by the norm's own scale entry, which becomes 0; behind
another norm by its scale and shift. Without one its row becomes 0 and its bias entry the mean. A head or hidden unit,
some input columns of a projection, is held by the projection's bias. Which norm reads what is seen in one forward and
backward pass of a copy.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.batches import Batch, Examples, Unpack, by_key, inseparable
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.discovery import refuse_unfit
from neuronsurgery.distributed import exchange
from neuronsurgery.edits import Edit, compose, zero_out
from neuronsurgery.errors import EXHAUSTED, checked_function, inline, listed
from neuronsurgery.forward import isolated_forward
from neuronsurgery.layers import ROWS, Layer
from neuronsurgery.loaders import iterate_groups, named_loaders
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.normed import sole_readers
from neuronsurgery.outputs import CHANNEL_SECOND, Place, place_of, to_input
from neuronsurgery.rows import set_rows
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring, without_mha_fastpath
from neuronsurgery.types import Loaders, Predict

FEW = 4
"""So many examples show which norm reads which layer."""


@dataclass(frozen=True, eq=False)
class Holder:
    """How the neurons of one layer are held at their mean, as values that go into an edit.

    Attributes:
        layer: whose neurons are held.
        scale: the scale entries of the norm behind them, which become 0; None where there is no such norm.
        shift: the bias or shift entries that are set; None where these stay.
        values: what they are set to, shape (count,); for the columns of a projection the share of each neuron in its
            bias, shape (count, out).
        bias: of such a projection, the bias as it stands; else None.
        held: the values at which the channels stay, as they are seen, shape (channels,).
    """

    layer: Layer
    scale: Layer | None
    shift: Layer | None
    values: Tensor | None
    bias: Tensor | None
    held: Tensor

    @property
    def reads(self) -> tuple[Layer, ...]:
        """The layers that are written to."""
        written = self.layer if self.scale is None else self.scale
        return (written,) if self.shift is None else (written, self.shift)

    def edit(self, indices: Sequence[int]) -> Edit:
        """Return the edit that holds some of the neurons."""
        chosen = list(indices)
        zeroed = zero_out(Neurons({self.reads[0]: chosen}))
        if self.shift is None or self.values is None:
            return zeroed
        if self.bias is None:
            return compose(zeroed, set_rows(Neurons({self.shift: chosen}), self.values[chosen]))
        shifted = self.bias + self.values[chosen].sum(0).to(self.bias.dtype)
        return compose(zeroed, set_rows(Neurons({self.shift: range(self.shift.count)}), shifted))

    def written(self, weights: Mapping[Layer, Tensor], gradients: Mapping[Layer, Tensor | None]) -> Tensor:
        """Return the first-order change by each neuron's edit, float64, shape (count,), from gradients to what it sets.

        Args:
            weights: the parameters of `reads`.
            gradients: of the metric to them; None is zero.
        """
        change = zeroed(self.reads[0], weights[self.reads[0]], gradients[self.reads[0]])
        gradient = None if self.shift is None else gradients[self.shift]
        if self.shift is None or self.values is None or gradient is None:
            return change
        values = self.values.to(gradient.device).double()
        if self.bias is not None:
            return change + values @ gradient.double()
        return change + (values - weights[self.shift].detach().double()) * gradient.double()


def zeroed(layer: Layer, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Return minus the product of each neuron's slice and its gradient, float64, shape (count,)."""
    if gradient is None:
        return torch.zeros(layer.count, dtype=torch.float64, device=weight.device)
    product = layer.slices(weight.detach().double() * gradient.double())
    return -product.reshape(layer.count, -1).sum(1)


@dataclass(frozen=True, eq=False)
class Means:
    """For each layer how its neurons are held at their means, or why they cannot be.

    Attributes:
        holders: by layer.
        reasons: of the other layers, why not.
        places: where each held layer is seen in the copy that ran.
    """

    holders: Mapping[Layer, Holder]
    reasons: Mapping[Layer, str]
    places: Mapping[Layer, Place]

    def edit(self, neurons: Neurons) -> Edit:
        """Return the edit that holds some neurons at their mean.

        Raises:
            ValueError: if some cannot be held; lists their layers with the reasons.
        """
        self.refuse_unheld(neurons.by_layer())
        return compose(*(self.holders[layer].edit(indices) for layer, indices in neurons.by_layer().items()))

    def refuse_unheld(self, layers: Iterable[Layer]) -> None:
        """Raise if some layers have no holder.

        Raises:
            ValueError: if one has none; lists them with the reasons.
        """
        wrong = [f"{layer.parameter}: {self.reasons[layer]}" for layer in layers if layer not in self.holders]
        if wrong:
            raise ValueError(
                f"the neurons of {len(wrong)} layers cannot be held at their mean by weights alone:\n{listed(wrong)}\n"
                f"Zero these out instead (edit='zero'), or leave them out with where="
            )


@restoring
def mean_out(
    neurons: Neurons,
    model: nn.Module,
    loaders: Loaders,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Edit:
    """Return the edit that holds the output of each neuron at its mean over some examples.

    A channel that a batch norm alone reads becomes the norm's shift (its scale entry is set to 0: the mean under the
    norm's running statistics). One that another norm with a shift alone reads becomes the mean of what the norm makes
    of it; the statistics of that norm still see the channel. Without a norm the row is set to 0 and the bias entry to
    the mean. The columns of a linear layer's input (a head, a hidden unit) are set to 0 and what they give on the mean
    goes into its bias. An example's mean is over its positions (pixels, tokens); all examples count the same. Of a
    layer that only some examples come to (an expert), the mean is over the rows that come.

    Args:
        neurons: output channels of linear layers, convolutions and the like, or input columns of linear layers.
        model: any module; runs in evaluation mode on a copy, and does not change.
        loaders: a mapping group -> iterable of batches, or one iterable of batches; groups make no difference.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: see `group_grad_norms`.
        progress: whether to write a line of progress to standard error.
        process_group: average over its ranks, each of which gives its share of the data. None communicates nothing.

    Returns:
        An edit made of `zero_out` and `set_rows`, for the model as it stands.

    Raises:
        TypeError: if `neurons` are no set of neurons, or a batch has an unknown form.
        ValueError: if the neurons do not fit the model, the loader yields no batch, or some cannot be held: there is
            neither a norm nor a bias of their own (lists the layers with the reasons).

    Example:
        >>> from neuronsurgery import apply, find_layout, select
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))]
        >>> edit = mean_out(select(find_layout(model), {"0.weight": 1}), model, data)
        >>> edit
        compose(zero_out(1 neuron in 1 layer: 0.weight[1]), set_rows(1 neuron in 1 layer: 0.bias[1]))
        >>> held = apply(edit, model)[0](data[0][0])[:, 1]
        >>> torch.allclose(held, model[0](data[0][0])[:, 1].mean().expand(8), atol=1e-6)
        True

    Source:
        Meyes et al., "Ablation studies in artificial neural networks", 2019; mean ablation as in Wang et al.,
        "Interpretability in the wild", 2023.
    """
    layers = list(checked_neurons(neurons, "mean_out").by_layer())
    surveyed = survey(model)
    runner = make_runner(surveyed)
    refuse_unfit(layers, surveyed, runner.parameters, "the neurons do not fit the model")
    unpack = by_key(unpack, group_key)
    means = find_means(surveyed, runner, layers, loaders, predict, unpack, progress, process_group)
    return means.edit(neurons)


def find_means(
    surveyed: Survey,
    runner: Runner,
    layers: Sequence[Layer],
    loaders: Loaders,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Means:
    """Return how the neurons of some layers are held at their means: see `mean_out`."""
    checked_function(predict, "predict")
    loaders = named_loaders(loaders)
    found = _Search(surveyed, runner, layers)
    error = None
    try:
        with without_mha_fastpath():
            batch = next((b for _, b in iterate_groups(loaders, device=runner.device, unpack=unpack)), None)
            seen = None if batch is None else found.see(batch, predict)
    except Exception as raised:
        error, seen = raised, None
    shares = [share for share in exchange(process_group, error, seen) if share is not None]
    if not shares:
        raise ValueError(f"the loader yielded no batch. {EXHAUSTED}")
    found.take(shares[0])  # of the first rank that has an example
    channels = _channel_means(runner, found.wanted, loaders, unpack, progress, process_group)
    return found.means(channels)


def _channel_means(
    runner: Runner,
    wanted: Sequence[Place],
    loaders: Loaders,
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> dict[Place, Tensor]:
    """Return the mean of each channel at some places, float64, by one forward pass over the data; none for none."""
    if not wanted:
        return {}
    seen: dict[int, _Mean] = {}
    examples, error = 0, None
    try:
        with torch.no_grad(), without_mha_fastpath():
            label = "means" if progress else None
            for _, batch in iterate_groups(loaders, device=runner.device, unpack=unpack, progress=label):
                with _summing(wanted) as batch_means:
                    isolated_forward(runner, batch)
                runner.attributes.restore()
                for at, parts in batch_means.items():
                    own = _Mean.of(parts, len(batch))
                    seen[at] = seen[at] + own if at in seen else own
                examples += len(batch)
    except Exception as raised:
        error = raised
    shares = exchange(process_group, error, ({at: mean.cpu() for at, mean in seen.items()}, examples))
    total = sum(count for _, count in shares)
    given = {at: [share[at] for share, _ in shares if at in share] for at in range(len(wanted))}
    return {
        place: functools.reduce(operator.add, given[at]).over(total) for at, place in enumerate(wanted) if given[at]
    }


class _Mean(NamedTuple):
    """The sums of which the mean at a place is made.

    Where every example comes, each counts the same, however many positions it has. Of a module that is given only some
    of them (an expert to which they are routed) nobody knows which: then each row that comes counts the same.
    """

    by_example: Tensor
    examples: int
    by_row: Tensor
    rows: int

    @classmethod
    def of(cls, calls: Sequence[tuple[Tensor, int]], examples: int) -> _Mean:
        """Return the sums of a batch of so many examples: of each call the mean, and its number of rows."""
        whole = all(rows % examples == 0 for _, rows in calls)
        return cls(
            torch.stack([mean for mean, _ in calls]).mean(0) * examples,
            examples if whole else 0,
            torch.stack([mean * rows for mean, rows in calls]).sum(0),
            sum(rows for _, rows in calls),
        )

    def __add__(self, other: _Mean) -> _Mean:  # type: ignore[override]  # sums are added up, not strung together
        pairs = zip(self, other, strict=True)
        return _Mean(*(one + more for one, more in pairs))  # type: ignore[operator]  # tensors or numbers, both

    def cpu(self) -> _Mean:
        return self._replace(by_example=self.by_example.cpu(), by_row=self.by_row.cpu())

    def over(self, examples: int) -> Tensor:
        """Return the mean over all data, of so many examples."""
        return self.by_example / examples if self.examples == examples else self.by_row / self.rows


@contextmanager
def _summing(places: Sequence[Place]) -> Iterator[dict[int, list[tuple[Tensor, int]]]]:
    """Note the mean of the channels at some places, by the place's number, of each call, and how many rows it had."""
    means: dict[int, list[tuple[Tensor, int]]] = {}

    def note(at: int, place: Place, value: Any) -> None:
        if not len(value):
            return
        last = value.detach().movedim(place.axis, -1).double()
        means.setdefault(at, []).append((last.reshape(-1, last.shape[-1]).mean(0), len(value)))

    handles = [
        place.module.register_forward_hook(
            lambda _, args, output, at=at, place=place: note(at, place, output if place.side == "output" else args[0])
        )
        for at, place in enumerate(places)
    ]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


class _Search:
    """What holds each layer: found out on a batch, and filled in once the means are there."""

    def __init__(self, surveyed: Survey, runner: Runner, layers: Sequence[Layer]) -> None:
        self._surveyed, self._runner = surveyed, runner
        self._seen = {layer: place_of(layer, surveyed, runner) for layer in layers}
        self._norms: dict[Layer, nn.Module] = {}

    def see(self, batch: Batch, predict: Predict | None) -> dict[int, str]:
        """Return which norm alone reads which layer's output, on a few examples of a batch, by the norm's path."""
        if not inseparable(batch):
            batch = Examples.of(batch).take(range(min(FEW, len(batch)))).batch()
        outputs = {at: place.module for at, place in enumerate(self._seen.values()) if place and place.side == "output"}
        readers = sole_readers(self._runner, set(outputs.values()), batch, predict)
        paths = {module: path for path, module in self._runner.model.named_modules()}
        return {at: paths[readers[module]] for at, module in outputs.items() if module in readers}

    def take(self, norms: Mapping[int, str]) -> None:
        """Note which norm alone reads each layer's output, by the number of the layer and the path of the norm."""
        layers = list(self._seen)
        self._norms = {layers[at]: self._runner.model.get_submodule(path) for at, path in norms.items()}

    @property
    def wanted(self) -> list[Place]:
        """Where means are needed: nowhere for what a batch norm holds."""
        holds = [self._hold(layer) for layer in self._seen]
        return [hold.place for hold in holds if isinstance(hold, _Hold) and hold.needs_mean]

    def means(self, channels: Mapping[Place, Tensor]) -> Means:
        """Return how each layer is held, given the means of the places that are wanted."""
        by_module = {(place.module, place.side): mean for place, mean in channels.items()}
        holders, places, reasons = {}, {}, {}
        for layer in self._seen:
            hold = self._hold(layer)
            if isinstance(hold, str):
                reasons[layer] = hold
                continue
            mean = by_module.get((hold.place.module, hold.place.side))
            if hold.needs_mean and mean is None:
                reasons[layer] = "it is never called: no example comes to it, or a fused operator reads its weight"
                continue
            holders[layer], places[layer] = self._holder(layer, hold, mean), hold.place
        return Means(holders, reasons, places)

    def _hold(self, layer: Layer) -> _Hold | str:
        """Return what holds a layer, or why nothing does."""
        place = self._seen[layer]
        if place is None:
            return "it is no linear layer, convolution or the like, or is held in several places"
        if place.side == "output" and place.units is not None:
            return f"each of its neurons ({layer.kind}) is several rows"
        norm = self._norms.get(layer)
        scale, shift = self._entry(norm, "weight", layer), self._entry(norm, "bias", layer)
        at_norm = None if norm is None else Place(norm, "output", _axis(norm), None, layer.count)
        if at_norm is not None and scale is not None and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            return _Hold(at_norm, scale, shift, needs_mean=False)
        bias = self._entry(place.module, "bias")
        if bias is not None:
            return _Hold(place, None, bias, needs_mean=True)
        if at_norm is not None and scale is not None and shift is not None:
            return _Hold(at_norm, scale, shift, needs_mean=True)
        return "it has no bias, and no norm with a shift alone reads its output"

    def _entry(self, module: nn.Module | None, attribute: str, of: Layer | None = None) -> Layer | None:
        """Return the entries of a vector that one module alone holds, as many as a layer has neurons; or None."""
        if module is None or module._parameters.get(attribute) is None:
            return None
        for name, places in self._runner.places.items():
            path, _, own = places[0].rpartition(".")
            if own == attribute and self._runner.model.get_submodule(path) is module and len(places) == 1:
                shape = tuple(self._runner.parameters[name].shape)
                if len(shape) == 1 and (of is None or shape[0] == of.count):
                    return Layer(name, ROWS, {}, shape, self._surveyed.tensors[name].position)
        return None

    def _holder(self, layer: Layer, hold: _Hold, mean: Tensor | None) -> Holder:
        if not hold.needs_mean:
            module = hold.place.module
            shift = module._parameters["bias"]
            held = torch.zeros(layer.count, device="cpu") if shift is None else shift.detach().cpu()
            return Holder(layer, hold.scale, None, None, None, held)
        assert mean is not None and hold.shift is not None
        bias = self._runner.parameters[hold.shift.parameter].detach().cpu()
        mean = mean.to(torch.float64 if bias.dtype == torch.float64 else torch.float32)
        if hold.place.side == "output":
            return Holder(layer, hold.scale, hold.shift, mean, None, mean)
        weight = self._runner.parameters[self._surveyed.first_names([layer.parameter])[layer.parameter]].detach().cpu()
        units = hold.place.units
        assert units is not None  # the columns of an input belong to units
        # What each channel of the input gives on its mean, one row per channel, then summed over those of a unit.
        shares = to_input(hold.place.module, torch.eye(hold.shift.count, dtype=mean.dtype), weight.to(mean.dtype))
        given = (shares * mean).T
        values = given.new_zeros(layer.count, hold.shift.count).index_add_(0, units.cpu(), given)
        return Holder(layer, None, hold.shift, values, bias, mean)


@dataclass(frozen=True, eq=False)
class _Hold:
    """What holds the neurons of a layer.

    Attributes:
        place: where they are seen.
        scale: the entries that become 0 in the place of their rows; None for the rows.
        shift: the entries that may be set.
        needs_mean: whether these are set to means that are to be measured.
    """

    place: Place
    scale: Layer | None
    shift: Layer | None
    needs_mean: bool


def _axis(module: nn.Module) -> int:
    return 1 if isinstance(module, CHANNEL_SECOND) else -1


def unheld_layers(reasons: Mapping[Layer, str]) -> str:
    """Return in one sentence which layers cannot be held at their means, or ""."""
    if not reasons:
        return ""
    return f"not held at their mean: {inline(f'{layer.parameter} ({why})' for layer, why in reasons.items())}"
