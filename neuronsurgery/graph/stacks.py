"""Stacks: what several edits run alike is run once, on their activations one after the other along the batch.

Once the last edited parameter is read, edits of the same layer run the same operators on activations of their own. In a
small batch that is mostly the overhead of calls. So it is done for several edits at once where it was seen to take less
time and to give the same bits: kernels, and so the last bits, may go by the size of a batch. A few logits may agree by
chance, so every operator is looked at, on thousands of numbers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuronsurgery.graph.inputs import Inputs, batch_dims
from neuronsurgery.graph.replay import Graph, Instruction, execute
from neuronsurgery.loaders import CACHED
from neuronsurgery.precision import same_bits

MOST_ELSEWHERE = 256
"""Examples in a stack on another device than a CPU, whose memory it must not fill; on a CPU they are `CACHED`."""

WORTH = 16
"""Stacks of one tail that are to come where it is worth while to look at it, which takes as long as some of them."""

GAIN = 0.75
"""Of the time that edits take alone, a stack may take so much."""

ENOUGH = 4096
"""Numbers on which an operator is to give the same bits: sums in another order agree in every second or third."""

ROUNDS = 64
"""So many times at most an operator that gives a few numbers is run to see that."""

ROUNDING = 1e-4
"""Relative to the largest logit: a difference above it is no rounding."""


class Tail(NamedTuple):
    """The operators of a run that read no edited parameter, after the last that does.

    Attributes:
        instructions: the operators.
        own: the slots of activations that they read and that differ from edit to edit.
        shared: those of activations of the run before, which all edits have in common.
        sizes: those of numbers that are sizes of batches.
        output: the slot of the logits.
    """

    instructions: tuple[Instruction, ...]
    own: tuple[int, ...]
    shared: tuple[int, ...]
    sizes: tuple[int, ...]
    output: int


def parted(
    graph: Graph, steps: Sequence[Instruction], edited: Collection[int], tainted: Collection[int]
) -> tuple[tuple[Instruction, ...], Tail | None]:
    """Return a run in two parts: to the last operator that reads an edited parameter, and its tail.

    Without a tail where there is none, or an activation of it does not have the example first.

    Args:
        graph: the graph.
        steps: the operators of the run.
        edited: the slots of the edited parameters.
        tainted: the slots of all that the edit changes.
    """
    place = max(
        (at + 1 for at, step in enumerate(steps) if not set(edited).isdisjoint(graph.reads[step.slot])), default=0
    )
    head, left = tuple(steps[:place]), tuple(steps[place:])
    made = {step.slot for step in left}
    output = graph.slots[graph.output]
    if output not in made:
        return tuple(steps), None
    reads = sorted({read for step in left for read in graph.reads[step.slot]} - made)
    own = tuple(slot for slot in reads if slot in tainted)
    others = [slot for slot in reads if slot not in tainted and graph.nodes[slot] not in graph.constants]
    sizes = tuple(slot for slot in others if isinstance(graph.nodes[slot].meta.get("val"), torch.SymInt))
    shared = tuple(slot for slot in others if _has_examples(graph, slot))
    if not own or not all(_has_examples(graph, slot) for slot in (*own, output)):
        return tuple(steps), None
    return head, Tail(left, own, shared, sizes, output)


def _has_examples(graph: Graph, slot: int) -> bool:
    """Return whether the first dimension of a value varies with the inputs, as that of examples does."""
    shape = graph.shape(graph.nodes[slot])
    return bool(shape) and shape[0] is None  # type: ignore[index]  # not None where it is true


class Stacks:
    """Which tails were seen to be right, and worth it, stacked so many times for inputs of one signature.

    Args:
        exact: whether logits of other bits are refused; if not, they may differ by rounding.

    Attributes:
        rounded: whether some that were taken do.
        batches: how many like the next one are left to run, itself among them, as far as anybody knows.
    """

    def __init__(self, *, exact: bool = True) -> None:
        self.rounded = False
        self.batches = 1
        self._exact = exact
        # By tail and number of edits, whether it was right and quicker; by number, the sizes of stacked batches.
        self._known: dict[tuple[Tail, int], bool] = {}
        self._sizes: dict[int, Mapping[int, int] | None] = {}

    def width(self, tail: Tail | None, inputs: Inputs, edits: int) -> int:
        """Return how many of some edits of one tail are to be run as one."""
        tensors = [tensor for tensor in inputs.tensors if tensor.dim() > 0]
        if tail is None or not tensors or not len(tensors[0]):
            return 1
        most = CACHED if tensors[0].device.type == "cpu" else MOST_ELSEWHERE
        width = min(most // len(tensors[0]), edits)
        if width > 1 and (tail, width) not in self._known and edits // width * self.batches < WORTH:
            return 1
        return width if width > 1 and self._known.get((tail, width), True) else 1

    def logits(self, graph: Graph, tail: Tail, runs: Sequence[list[Any]], inputs: Inputs) -> list[Tensor]:
        """Return the logits of several edits, whose runs have come to the same tail.

        Args:
            graph: the graph.
            tail: what is left to run.
            runs: the values by slot of each run so far.
            inputs: of the forward pass.
        """
        if (tail, len(runs)) in self._known:
            return self._stacked(graph, tail, runs, inputs)
        alone: list[Tensor] = []

        def run(own: Sequence[Any]) -> list[Tensor]:
            values = list(own)
            execute(graph, tail.instructions, values)
            alone.append(values[tail.output])
            return alone

        took = sum(_seconds(functools.partial(run, own)) for own in runs)
        self._known[tail, len(runs)] = self._is_better(graph, tail, runs, inputs, alone, took)
        return alone

    def _is_better(
        self, graph: Graph, tail: Tail, runs: Sequence[list[Any]], inputs: Inputs, alone: Sequence[Tensor], took: float
    ) -> bool:
        """Return whether some edits give the same stacked as alone, in less time."""
        try:
            stacked = self._stacked(graph, tail, runs, inputs)
            again = _seconds(lambda: self._stacked(graph, tail, runs, inputs))  # the first time takes longer
            if not _is_quicker(again, took) or len(stacked) != len(alone):
                return False
            if all(map(same_bits, stacked, alone)) and _same_operators(
                graph, tail, self._begun(graph, tail, runs, inputs), runs
            ):
                return True
        except Exception:  # sizes that are written into the graph, or more than the memory holds
            return False
        close = not self._exact and all(map(_close, stacked, alone))
        self.rounded |= close
        return close

    def _begun(self, graph: Graph, tail: Tail, runs: Sequence[list[Any]], inputs: Inputs) -> list[Any]:
        """Return the values by slot of some runs as those of one."""
        count = len(runs)
        if count not in self._sizes:
            self._sizes[count] = _sizes(graph, inputs, count)
        sizes = self._sizes[count]
        if sizes is None or not sizes.keys() >= set(tail.sizes):
            raise ValueError("the batch's size is a part of the graph")
        values = list(runs[0])
        with torch.inference_mode(False), torch.no_grad():
            for slot in tail.own:
                values[slot] = torch.cat([own[slot] for own in runs])
            for slot in tail.shared:
                values[slot] = torch.cat([runs[0][slot]] * count)
        for slot in tail.sizes:
            values[slot] = sizes[slot]
        return values

    def _stacked(self, graph: Graph, tail: Tail, runs: Sequence[list[Any]], inputs: Inputs) -> list[Tensor]:
        values = self._begun(graph, tail, runs, inputs)
        execute(graph, tail.instructions, values)
        # Each in memory of its own: a metric's last bits may go by where a tensor begins.
        return _parts(values[tail.output], len(runs))


def _same_operators(graph: Graph, tail: Tail, values: list[Any], runs: Sequence[Sequence[Any]]) -> bool:
    """Return whether every operator of a tail gives the same bits of all edits at once as of one at a time."""
    activations = {*tail.own, *tail.shared}
    for step in tail.instructions:
        execute(graph, [Instruction(step.slot, ())], values)
        if not _same_operator(graph, step.slot, values, runs, activations):
            return False
        activations.add(step.slot)
        for slot in step.free:
            values[slot] = None
    return True


def _same_operator(
    graph: Graph, slot: int, values: Sequence[Any], runs: Sequence[Sequence[Any]], activations: Collection[int]
) -> bool:
    """Return whether an operator does so, on the activations that came to it and on noise: many of them may be 0."""
    reads = [read for read in graph.reads[slot] if read in activations]
    noisy = any(isinstance(values[read], Tensor) and values[read].is_floating_point() for read in reads)
    generator, seen = torch.Generator().manual_seed(0), 0
    for attempt in range(ROUNDS if noisy else 1):
        whole = list(values)
        if attempt:
            for read in reads:
                whole[read] = _noise(values[read], generator)
        parts = [list(runs[0]) for _ in runs]
        for read in reads:
            for own, part in zip(parts, _parts(whole[read], len(runs)), strict=True):
                own[read] = part
        for own in (whole, *parts):
            execute(graph, [Instruction(slot, ())], own)
        found, expected = _parts(whole[slot], len(runs)), [own[slot] for own in parts]
        tensors = [
            (pytree.tree_leaves(one), pytree.tree_leaves(other)) for one, other in zip(found, expected, strict=True)
        ]
        pairs = [pair for one, other in tensors for pair in zip(one, other, strict=True) if isinstance(pair[0], Tensor)]
        if not all(same_bits(one, other) for one, other in pairs):
            return False
        seen += sum(one.numel() for one, _ in pairs) if attempt else 0
        if seen >= ENOUGH:
            break
    return True


def _parts(value: Any, count: int) -> list[Any]:
    """Return what of a value belongs to each of some edits, in memory of its own."""
    leaves, structure = pytree.tree_flatten(value)
    split = [leaf.chunk(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    if any(
        len(parts) != count or len({part.shape for part in parts if isinstance(part, Tensor)}) > 1 for parts in split
    ):
        raise ValueError("a value does not consist of as many equal parts")
    own = [[part.clone() if isinstance(part, Tensor) else part for part in parts] for parts in split]
    return [pytree.tree_unflatten([parts[number] for parts in own], structure) for number in range(count)]


def _noise(value: Any, generator: torch.Generator) -> Any:
    """Return normal draws in the place of an activation; what holds no activations stays as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.empty_like(value).copy_(torch.randn(value.shape, generator=generator))


def _sizes(graph: Graph, inputs: Inputs, count: int) -> dict[int, int] | None:
    """Return the numbers in a graph, by slot, for so many batches in one; None where a size does not vary."""
    values: list[Any] = [None] * len(graph.nodes)
    for node, value in graph.constants.items():
        values[graph.slots[node]] = value
    for node, tensor, dims, varies in zip(
        graph.inputs, inputs.tensors, batch_dims(inputs.tensors), graph.dims, strict=True
    ):
        if not dims <= varies:
            return None
        shape = (count * len(tensor), *tensor.shape[1:]) if dims else tensor.shape
        values[graph.slots[node]] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    found = {}
    for slot, node in enumerate(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt):
            args, kwargs = graph.fetches[slot](values)
            call: Any = node.target
            values[slot] = found[slot] = int(call(*args, **kwargs))
    return found


def _seconds(call: Callable[[], Sequence[Tensor]]) -> float:
    """Return how long a call takes, until a device has computed the last of what it returns."""
    started = time.perf_counter()
    call()[-1].reshape(-1)[:1].cpu()
    return time.perf_counter() - started


def _is_quicker(stacked: float, alone: float) -> bool:
    return stacked < GAIN * alone


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not bool(torch.isfinite(other).all()):
        return False
    return bool((one - other).abs().max() <= ROUNDING * other.abs().max())
