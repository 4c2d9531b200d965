"""Residual branches: where a forward pass adds a path of layers to a shorter one beside it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from neuronsurgery.batches import Unpack, move, unpack_batch
from neuronsurgery.copies import make_runner
from neuronsurgery.discovery import layout_of
from neuronsurgery.errors import checked_function
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import captured
from neuronsurgery.graph.operators import FILLED, LOOKUPS, RECURRENT, SUMS, operator_name
from neuronsurgery.graph.replay import Graph
from neuronsurgery.layouts import Layout
from neuronsurgery.surveys import survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Predict


@dataclass(frozen=True)
class Branch:
    """A path of layers that is added to a shorter one beside it.

    Attributes:
        layer: the parameter of the last layer that everything on the branch passes through.
        stage: counted from 0; consecutive branches whose sums have one shape are one stage, the order of the sizes,
            sizes of 1 and whether neighbouring ones are merged (8 x 8 positions, 64 tokens) aside.
        shape: of the sum, of one example.

    Example:
        >>> Branch("layer4.1.conv2.weight", 3, (512, 7, 7)).stage
        3
    """

    layer: str
    stage: int
    shape: tuple[int, ...]


@restoring
def residual_branches(
    model: nn.Module,
    batch: Any,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
) -> tuple[Branch, ...]:
    """Return the residual branches of a model in the order in which the forward pass adds them.

    A branch is found where the captured forward adds two (or more) values that come from one activation: one of them
    straight from it or through at most one layer (the skip, perhaps with a projection and a normalisation), the other
    through more layers than that. Attention and feed-forward branches of transformers are branches, before or after a
    normalisation, one after the other or in parallel. Added masks, biases and position embeddings are not: they do not
    come from the activation they are added to. A branch that no single layer ends is left out; of the tensors that a
    layer multiplies (a weight and its gain), the one with the most entries per neuron stands for it.

    The sums that are seen are `+` and `-`, in place or not, with a factor or not, `sum([...])`, a stack that is summed
    or averaged over its own axis, `lerp` with a given weight and `addcmul` of one activation. Joins by anything else
    are not: a gate, a concatenation, `addmm` onto the skip.

    Zeroing all of `layer` cuts the branch. What follows that layer stays, and is the same for every example: its bias,
    the shift of a normalisation. A layer that a model uses several times may end several branches.

    Args:
        model: any module that can be captured (see `sweep`); not changed.
        batch: one batch of two examples or more, as a loader yields it.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.

    Returns:
        The branches, at least one.

    Raises:
        CaptureError: if the forward pass cannot be captured; says why.
        ValueError: if there is no residual branch.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)
        ...
        ...     def forward(self, x):
        ...         return x + self.outer(self.inner(x).relu())
        >>> model = nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 2))
        >>> branches = residual_branches(model, (torch.randn(5, 3), torch.zeros(5).long()))
        >>> [branch.layer for branch in branches]
        ['1.outer.weight', '2.outer.weight']
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> zero_out(select(find_layout(model), {branches[-1].layer: ...}))
        zero_out(4 neurons in 1 layer: 2.outer.weight[0, 1, 2, 3])
    """
    surveyed = survey(model)
    runner = make_runner(surveyed)
    unpacked = move(unpack_batch(batch, checked_function(unpack, "unpack")), runner.device)
    graph = captured(runner, unpacked, predict or default_predict)
    flow = _Flow(graph, layout_of(surveyed, runner.parameters))
    branches: list[Branch] = []
    for node in flow.sums():
        shape = _example_shape(node)
        for layer in flow.branches(node):
            stage = branches[-1].stage + (not _one_stage(branches[-1].shape, shape)) if branches else 0
            branches.append(Branch(layer, stage, shape))
    if not branches:
        raise ValueError(
            "no residual branch: nowhere does the forward pass add a path of layers to a shorter one beside it, by +, "
            "-, lerp, addcmul or the sum of a stack. Plain and densely connected networks do not; a branch that is "
            "joined in another way (by a gate, a concatenation, addmm) is not seen, but you can select its last layer "
            "by name. Cut neurons instead, enough of them to change many predictions: sample(layout, k, seed) for "
            "random ones, topk(scores, k) for critical ones"
        )
    return tuple(branches)


class _Flow:
    """Which values of a graph are activations, what each is computed from, and which layers it reads.

    An activation comes from a floating-point input, or from ids that look rows of a parameter up, or is a learned token
    that is put beside others; masks, positions and sizes are none.
    """

    def __init__(self, graph: Graph, layout: Layout) -> None:
        self.nodes = graph.nodes
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.layers: dict[fx.Node, set[str]] = {}
        self.row_sizes = {layer.parameter: math.prod(layer.row_shape) for layer in layout}
        weights = {node: {layer.parameter} for layer in layout for node in graph.parameters[layer.parameter]}
        learned = {node for nodes in graph.parameters.values() for node in nodes}
        given = set(graph.inputs)
        for node in filter(_holds_tensors, graph.nodes):
            operands = [] if operator_name(node) in FILLED else list(filter(_holds_tensors, node.all_input_nodes))
            if operator_name(node) == "cat" and not self.sources.keys().isdisjoint(operands):
                tokens = learned.intersection(operands)
                self.sources |= dict.fromkeys(tokens, ())
                self.layers |= {token: set() for token in tokens}
            sources = tuple(operand for operand in operands if operand in self.sources)
            read = self._read(node, [weights.get(operand, set()) for operand in operands if operand not in sources])
            looked_up = operator_name(node) in LOOKUPS and not learned.isdisjoint(operands)
            from_input = not given.isdisjoint(operands)
            if sources or (looked_up and from_input) or (node in given and _is_floating(node)):
                self.sources[node] = sources
                self.layers[node] = set() if operator_name(node) in SUMS else read  # an added table is no layer
                continue
            if from_input:
                given.add(node)
            if node.op == "call_function":
                weights[node] = read
                if not learned.isdisjoint(operands):
                    learned.add(node)

    def _read(self, node: fx.Node, operands: Iterable[set[str]]) -> set[str]:
        """Return the tensors that must all be zero for what an operator makes of some weights to be zero.

        Those of every operand where it adds, joins or steps through them. Of a product those of one: the fewest, and of
        these the ones with the most entries per neuron, since a weight has more than its gain.
        """
        weights = [names for names in operands if names]
        if not weights or operator_name(node) in SUMS | RECURRENT | {"cat", "stack"}:
            return set().union(*weights)
        return max(weights, key=lambda names: (-len(names), max(self.row_sizes[name] for name in names)))

    def sums(self) -> Iterator[fx.Node]:
        """Yield the additions of activations; one whose only use is another addition is a part of that."""
        for node in self.nodes:
            if self._addends(node) and not self._is_partial(node):
                yield node

    def _addends(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the activations that an operator adds up, two or more; none where it is no sum."""
        kind, sources = operator_name(node), self.sources.get(node, ())
        if kind in ("sum", "mean") and len(sources) == 1 and _unstacks(node, sources[0]):
            sources = self.sources[sources[0]]
        elif kind == "lerp":  # where its weight is an activation, a gate
            sources = sources if all(source in node.args[:2] for source in sources) else ()
        elif kind == "addcmul":  # where both factors are activations, a gate
            start, factors = node.args[0], node.args[1:3]
            sources = sources if len(sources) == 2 and start in sources and start not in factors else ()
        elif kind not in SUMS:
            sources = ()
        return sources if len(sources) > 1 else ()

    def _is_partial(self, node: fx.Node) -> bool:
        return bool(self._addends(node)) and len(node.users) == 1 and bool(self._addends(next(iter(node.users))))

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        terms = []
        for source in self._addends(node):
            terms += self._terms(source) if self._is_partial(source) else [source]
        return terms

    def branches(self, node: fx.Node) -> Iterator[str]:
        """Yield the layer that ends each branch that a sum adds."""
        terms = self._terms(node)
        for term in terms:
            skips = [other for other in terms if other is not term and Graph.shape(other) == Graph.shape(node)]
            layer = self._branch(term, skips)
            if layer is not None:
                yield layer

    def _branch(self, term: fx.Node, skips: list[fx.Node]) -> str | None:
        """Return the layer that ends a term if there is a shorter way beside it; None if there is not."""
        leading = self._leading_to(term)
        for skip in skips:
            fork, passed = self._fork(skip, leading)
            layer, count = (None, 0) if fork is None else self._end(fork, term, leading)
            if count > passed:
                return layer
        return None

    def _leading_to(self, node: fx.Node) -> set[fx.Node]:
        """Return the activations that lead to one, and that one."""
        found, queue = {node}, [node]
        while queue:
            new = set(self.sources[queue.pop()]) - found
            found |= new
            queue.extend(new)
        return found

    def _fork(self, skip: fx.Node, leading: set[fx.Node]) -> tuple[fx.Node | None, int]:
        """Return where a skip leaves what leads to the branch, if it does, and how many layers it passes from there."""
        node, passed = skip, 0
        while node not in leading:
            passed += bool(self.layers[node])
            if passed > 1 or len(self.sources[node]) != 1:
                return None, passed
            (node,) = self.sources[node]
        return node, passed

    def _end(self, fork: fx.Node, term: fx.Node, leading: set[fx.Node]) -> tuple[str | None, int]:
        """Return the last layer that every path from a fork to a term passes through, and the count of layers on them.

        A value is on every path if the paths to it times the paths from it are all the paths there are.
        """
        start, stop = self.position[fork], self.position[term]
        between = [node for node in self.nodes[start + 1 : stop + 1] if node in leading]
        paths_to = {fork: 1}
        for node in between:
            paths_to[node] = sum(paths_to.get(source, 0) for source in self.sources[node])
        paths_from = dict.fromkeys([fork, *between], 0) | {term: 1}
        for node in reversed(between):
            for source in self.sources[node]:
                if source in paths_from:
                    paths_from[source] += paths_from[node]
        passed = [node for node in between if paths_to[node] and self.layers[node]]
        ends = [node for node in passed if paths_to[node] * paths_from[node] == paths_to[term]]
        names = [name for node in ends if len(self.layers[node]) == 1 for name in self.layers[node]]
        return (names[-1] if names else None), len(passed)


def _unstacks(reduction: fx.Node, stack: fx.Node) -> bool:
    """Return whether a sum or mean runs over the axis that a stack has made, and no other."""
    axis: Any = stack.args[1] if len(stack.args) > 1 else 0
    summed: list[Any] = pytree.tree_leaves(reduction.args[1:2])
    count = len(Graph.shape(stack) or ())
    return operator_name(stack) == "stack" and [other % count for other in summed] == [axis % count]


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _holds_tensors(node: fx.Node) -> bool:
    # Sizes are read from activations, too, and would join everything with everything.
    return bool(_tensors(node))


def _is_floating(node: fx.Node) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(node))


def _example_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes that do not vary with the batch; without the first where none does."""
    shape = Graph.shape(node) or ()
    return tuple(size for size in (shape if None in shape else shape[1:]) if size is not None)


def _one_stage(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Return whether one shape is the other in another order, or with neighbouring sizes merged, sizes of 1 aside.

    Within a stage Swin adds to (rows, columns, channels) and to (tokens, channels), MaxViT to channels first and last.
    """
    fewer, more = sorted((tuple(size for size in shape if size > 1) for shape in (first, second)), key=len)
    ends, all_ends = (tuple(itertools.accumulate(shape, operator.mul)) for shape in (fewer, more))
    # Down to a single size would merge the channels with the positions.
    merged = len(fewer) > 1 and ends[-1] == all_ends[-1] and set(ends) <= set(all_ends)
    return merged or sorted(fewer) == sorted(more)
