"""What is asked of each layer: the first-order effects of one kind of edit of its neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neuronsurgery.copies import Runner
from neuronsurgery.layers import Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.means import Holder, Means, zeroed
from neuronsurgery.outputs import Place, place_of
from neuronsurgery.spread import whole
from neuronsurgery.surveys import Survey


@dataclass(frozen=True, eq=False)
class Term:
    """What is asked of one layer: the effects of one kind of edit of its neurons.

    Attributes:
        layer: whose neurons.
        start: where its effects stand among those of all terms.
        place: where they are seen in a forward pass; None where they are not.
        held: what the channels become there, on the device; None is 0.
        holder: of mean ablation; None for zeroing.
    """

    layer: Layer
    start: int
    place: Place | None
    held: Tensor | None
    holder: Holder | None

    @property
    def span(self) -> slice:
        """Where its effects stand among those of all terms."""
        return slice(self.start, self.start + self.layer.count)

    @property
    def reads(self) -> tuple[Layer, ...]:
        """The layers whose weights the edit sets."""
        return (self.layer,) if self.holder is None else self.holder.reads

    def written(self, weights: Mapping[Layer, Tensor], gradients: Mapping[Layer, Tensor | None]) -> Tensor:
        """Return the effects, float64, shape (count,), from gradients to the weights."""
        if self.holder is not None:
            return self.holder.written(weights, gradients)
        gradient = gradients[self.layer]
        return zeroed(self.layer, whole(weights[self.layer]), None if gradient is None else whole(gradient))

    def heard(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Return the effects on each example, shape (n, count), of channels, both of shape (n, positions, channels)."""
        assert self.place is not None
        change = -values if self.held is None else self.held.to(values.dtype) - values
        return self.place.per_unit((gradients * change).sum(1))


def terms_of(
    surveyed: Survey, runner: Runner, layout: Layout, edit: str, means: Means | None, start: int = 0
) -> list[Term]:
    """Return what to ask of each layer that can be edited so; the effects begin at `start` and follow the layout."""
    terms = []
    for layer, at in layout.starts.items():
        if edit == "zero":
            # Of what is spread over processes outputs may be, too.
            place = None if runner.is_spread else place_of(layer, surveyed, runner)
            # A norm's own shift and a bias stay where the row is zeroed.
            bias = None if place is None or place.side == "input" else place.module._parameters.get("bias")
            terms.append(Term(layer, start + at, place, None if bias is None else bias.detach(), None))
        elif means is not None and layer in means.holders:
            holder = means.holders[layer]
            held = holder.held.to(runner.device or "cpu")
            terms.append(Term(layer, start + at, means.places[layer], held, holder))
    return terms
