"""Weights that are spread over processes, given out on demand: each process runs its own batches in its own order.

A fully sharded model holds on every process a part of each weight. Whoever needs a whole one has to have all the others
take part, whatever these are doing, so nobody ever waits for another one but in a *round*. In a round every process
says what it wants: a weight, to hand on a gradient, nothing because it waits for the others, or nothing because it is
done. Then all do what was asked for. Processes that are at the same layer at the same time, as they mostly are, gather
it once. A process whose data end early, or that fails, goes on taking part until all are done.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from neuronsurgery.precision import widened
from neuronsurgery.spread import local, of_parts, parts_of, whole
from neuronsurgery.switches import finally_do

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WEIGHT, GRADIENT, WAITING, DONE = range(4)
"""What a process may want in a round."""

Sink = Callable[[int, Tensor], None]
"""Is given, from within a backward pass, the number of a weight and this process's gradient to all of it."""


_OPEN: list[Service] = []
"""The services that are open, the newest last: each in one thread, and in those in which autograd goes back for it."""


def add_up(process_group: dist.ProcessGroup | None, tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the ranks, in place."""
    if process_group is not None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=process_group)


class Service:
    """Gives whole weights to each process when it asks, and adds up gradients part by part.

    Args:
        weights: of the model, by number, all spread along the last dimension of one mesh; along another one, if there
            is one, are replicas, and then the mesh is of all processes.
        dtypes: in which dtype to gather each, where that is not its own.

    Attributes:
        process_group: the processes of the mesh.
        reached: the numbers of the weights that a gradient came to on this process.
        thread: in which the model runs.
    """

    def __init__(self, weights: Mapping[int, DTensor], dtypes: Mapping[int, torch.dtype]) -> None:
        mesh = next(iter(weights.values())).device_mesh
        world = dist.group.WORLD
        assert world is not None  # there is a mesh
        self.process_group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else world
        self.reached: set[int] = set()
        self._weights, self._dtypes = weights, dtypes
        self._device, self._ranks = torch.device(mesh.device_type), mesh.size()
        self._sharers, self._replicas = mesh.get_group(mesh.ndim - 1), mesh.get_group(0) if mesh.ndim > 1 else None
        every = dist.get_process_group_ranks(self.process_group)
        self._rank = every.index(dist.get_rank())
        self._places = [every.index(rank) for rank in dist.get_process_group_ranks(self._sharers)]
        self.thread = threading.get_ident()
        self._sink: Sink | None = None
        self._sums: dict[tuple[int, int], Tensor] = {}

    def start(self) -> None:
        """Serve in this thread until the public function ends that this is called in."""
        if self not in _OPEN:
            _OPEN.append(self)
            finally_do(self._end)

    def _end(self) -> None:
        if self in _OPEN:
            _OPEN.remove(self)
            while not all(wish[0] == DONE for wish in self._round(DONE)[1]):
                pass

    def checked(self, process_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """Return a process group over whose ranks data are shared out, if a model sharded so can be scored there.

        Raises:
            ValueError: if its ranks are others than those that the model is sharded over.
        """
        ranks = [sorted(dist.get_process_group_ranks(group)) for group in (process_group, self.process_group)]
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"process_group= has the ranks {ranks[0]}, and the model is sharded over {ranks[1]}: give the group of "
                f"its mesh, mesh.get_group()"
            )
        return process_group

    def knows(self, number: int, weight: Tensor) -> bool:
        """Return whether a weight is the one of this number."""
        own = self._weights.get(number)
        return own is not None and own.shape == weight.shape and local(own).data_ptr() == local(weight).data_ptr()

    # What a process asks for

    def weight(self, number: int) -> Tensor:
        """Return a whole weight, without a graph."""
        found, _ = self._round(WEIGHT, number)
        assert found is not None
        return found

    def gradient(self, number: int, gradient: Tensor) -> None:
        """Hand on this process's gradient to a whole weight."""
        self.reached.add(number)
        if self._sink is not None:
            self._sink(number, gradient)

    def rest(self) -> None:
        """Take part until all processes have come to where this one is.

        Raises:
            RuntimeError: if one will not, since it has failed.
        """
        while True:
            _, wishes = self._round(WAITING)
            wanted = {wish[0] for wish in wishes}
            if wanted == {WAITING}:
                return
            if wanted == {WAITING, DONE}:
                raise RuntimeError("another process failed or has left, so none has a result")

    # What gradients are for

    @contextmanager
    def given_to(self, sink: Sink) -> Iterator[None]:
        """Give gradients to a function meanwhile."""
        before, self._sink = self._sink, sink
        try:
            yield
        finally:
            self._sink = before

    def adding(self, name: object, factor: float) -> Sink:
        """Return a function that adds a multiple of gradients to the sums of this name, over all processes."""
        label = label_of(name)

        def add(number: int, gradient: Tensor) -> None:
            self._round(GRADIENT, number, label, widened(gradient.to_dense()) * factor)

        return add

    def sums(self, name: object) -> dict[int, Tensor]:
        """Return the sums of this name by the number of the weight, spread as these are, and forget them."""
        label = label_of(name)
        found = {number: self._sums.pop((own, number)) for own, number in sorted(self._sums) if own == label}
        add_up(self._replicas, found.values())
        return {number: of_parts(part, self._weights[number]) for number, part in found.items()}

    # Rounds

    @torch.no_grad()
    def _round(
        self, kind: int, number: int = -1, label: int = 0, gradient: Tensor | None = None
    ) -> tuple[Tensor | None, Sequence[Sequence[int]]]:
        """Say what this process wants, do what all want, and return the weight it asked for, and what all want."""
        own = torch.tensor([kind, number, label], device=self._device)
        every = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(every, own, group=self.process_group)
        wishes: list[list[int]] = torch.stack(every).tolist()
        found = None
        for wanted in sorted({wish[1] for wish in wishes if wish[0] == WEIGHT}):
            gathered = self._gathered(wanted)
            if (kind, number) == (WEIGHT, wanted):
                found = gathered
        for wanted in sorted({wish[1] for wish in wishes if wish[0] == GRADIENT}):
            labels = [wish[2] if wish[:2] == [GRADIENT, wanted] else None for wish in wishes]
            self._pass_on(wanted, gradient if labels[self._rank] is not None else None, labels)
        return found, wishes

    def _gathered(self, number: int) -> Tensor:
        weight = self._weights[number]
        dtype = self._dtypes.get(number, weight.dtype)
        return whole(weight.detach().to(dtype))

    def _pass_on(self, number: int, gradient: Tensor | None, labels: Sequence[int | None]) -> None:
        """Give every process its part of the gradients of those that have one, and add it to the sums of its name."""
        weight = self._weights[number]
        part = local(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts = [] if gradient is None else [own.reshape(-1) for own in parts_of(gradient.to(wide), weight)]
        given = torch.cat(parts) if parts else torch.empty(0, dtype=wide, device=self._device)
        near = [labels[place] for place in self._places]  # of those with the other parts, not of replicas
        sizes = [0 if label is None else part.numel() for label in near]
        received = torch.empty(sum(sizes), dtype=wide, device=self._device)
        sent = [own.numel() for own in parts] or [0] * len(near)
        dist.all_to_all_single(received, given, sizes, sent, group=self._sharers)
        for label in set(labels) - {None}:  # of replicas, too: all of them have the same sums
            self._sums.setdefault((label, number), torch.zeros(part.shape, dtype=wide, device=self._device))  # type: ignore[arg-type]
        for label, own in zip(near, torch.split(received, sizes), strict=True):
            if label is not None:
                self._sums[label, number] += own.view(part.shape)


def current_service() -> Service | None:
    """Return the service that is open in this thread, if there is one."""
    own = threading.get_ident()
    return next((service for service in reversed(_OPEN) if service.thread == own), None)


def service_of(number: int, weight: Tensor) -> Service | None:
    """Return the open service that gives out a weight, if there is one."""
    return next((service for service in reversed(_OPEN) if service.knows(number, weight)), None)


def label_of(name: object) -> int:
    """Return a number for a name that is the same on all processes."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:7], "big")
