"""The sum of a group's gradients over batches, and over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neuronsurgery.differentiation import is_float16
from neuronsurgery.distributed import exchange
from neuronsurgery.errors import warn
from neuronsurgery.layouts import Layout
from neuronsurgery.precision import wide_dtype, widened
from neuronsurgery.scores import norms
from neuronsurgery.serving import Service, add_up
from neuronsurgery.spread import local, of_parts, own_part
from neuronsurgery.types import Group

MEMORY_WARNING = 4e9
"""Bytes of sums of gradients above which a mixed stream warns."""


class GroupSum:
    """The gradients of a group, summed over its examples in float32 or wider.

    Those of the first batch are kept as they came, of the mean loss: they need no zeros to be added to, and where
    there is no second batch nothing is computed at all. Of what is spread over processes each sums up its own part.

    Args:
        leaves: what is differentiated.
        name: of the group; the same on all processes.
        served: the numbers of those leaves whose gradients a service adds up, by their places.
        service: that service.

    Attributes:
        count: the number of examples so far.
    """

    def __init__(
        self, leaves: Iterable[Tensor], name: Group, served: Mapping[int, int], service: Service | None
    ) -> None:
        self.count = 0
        self._name, self._served, self._service = name, served, service
        self._leaves = list(leaves)
        self._totals: list[Tensor | None] = [None] * len(self._leaves)
        self._of_mean = False

    def add(self, count: int, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of the mean loss over some examples; None is zero."""
        given = zip(gradients, self._leaves, strict=True)
        gradients = [None if gradient is None else own_part(gradient, leaf) for gradient, leaf in given]
        if self.count == 0:
            self._totals, self._of_mean = [None if g is None else _as_total(g) for g in gradients], True
        else:
            self._sum_up()
            for place, gradient in enumerate(gradients):
                if gradient is not None and self._totals[place] is None:
                    self._totals[place] = self._zeros(place)
            pairs = [(t, g) for t, g in zip(self._totals, gradients, strict=True) if t is not None and g is not None]
            if pairs:
                torch._foreach_add_([t for t, _ in pairs], [g for _, g in pairs], alpha=count)
        self.count += count

    def _sum_up(self) -> None:
        """Have what was kept as it came be a sum, in memory of its own."""
        if self._of_mean:
            for place, total in enumerate(self._totals):
                self._totals[place] = None if total is None else self._zeros(place).add_(total, alpha=self.count)
            self._of_mean = False

    def _zeros(self, place: int) -> Tensor:
        leaf = local(self._leaves[place].detach())
        return torch.zeros_like(leaf, dtype=wide_dtype(leaf))

    def over(self, process_group: dist.ProcessGroup | None, error: Exception | None) -> int:
        """Sum over the ranks, in place, and return the summed count; or raise if one rank has an error."""
        counts: list[int] = exchange(process_group, error, self.count)
        if process_group is not None:
            self._sum_up()
            own = [place for place in range(len(self._leaves)) if place not in self._served]
            for place in own:
                if self._totals[place] is None:
                    self._totals[place] = self._zeros(place)
            add_up(process_group, (self._totals[place] for place in own))  # type: ignore[misc]  # none is None any more
        return sum(counts)

    def mean_norms(self, layout: Layout, count: int) -> Tensor:
        """Return the norms of the gradients of the mean loss over all examples, `count` by `over`."""
        whole = [None if t is None else of_parts(t, leaf) for t, leaf in zip(self._totals, self._leaves, strict=True)]
        if self._service is not None:
            sums = self._service.sums(self._name)
            for place, number in self._served.items():
                whole[place] = sums.get(number)
        named = dict(zip((layer.parameter for layer in layout), whole, strict=True))
        return norms(named, layout) / (1 if self._of_mean else count)


def _as_total(gradient: Tensor) -> Tensor:
    """Return a gradient dense and in float32 or wider; not a part of a larger tensor, which it would keep."""
    own = widened(gradient.to_dense())
    return own.clone() if own.untyped_storage().nbytes() > own.numel() * own.element_size() else own


def added_up(
    service: Service | None, group: Group, count: int, logits: Tensor, leaves: Sequence[Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Have the gradients to what FSDP shards added to the sums of a group, so many times as there are examples.

    Raises:
        ValueError: in float16, of which gradients are scaled afterwards.
    """
    if service is None:
        return contextlib.nullcontext()
    if is_float16(logits, leaves):
        raise ValueError("gradients of a sharded model are not taken in float16: use bfloat16 or float32")
    return service.given_to(service.adding(group, count))


def warn_of_memory(leaves: Iterable[Tensor], groups: int) -> None:
    """Warn where the sums of so many groups, one more than before, hold much memory."""
    one = sum(leaf.numel() * wide_dtype(leaf).itemsize for leaf in leaves)
    if one * groups > MEMORY_WARNING >= one * (groups - 1):
        warn(
            f"a mixed stream holds one copy of the scored gradients per group, so far {groups} of "
            f"{one / 1e9:.2g} GB: a mapping group -> loader needs one copy in all"
        )
