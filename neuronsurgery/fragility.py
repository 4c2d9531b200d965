"""Which examples a network remembers instead of understanding, found by cutting it and without group labels.

In a residual network the skip paths alone are a shallower classifier: they keep what was learnt first and most cheaply.
`residual_branches` says which layers end the branches beside them. Once the last of these are cut, the examples that
only they held right are those with the smallest margins: `fragility` ranks the examples of each class by it, and
`infer_groups` draws the line. Neither looks at a group label.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from neuronsurgery.capture import Graph, OnCopy, capture
from neuronsurgery.coupling import WEIGHTED
from neuronsurgery.gradients import refuse_unknown_classes
from neuronsurgery.neurons import Layout, find_layout
from neuronsurgery.structure import plain
from neuronsurgery.sweep import Sweep
from neuronsurgery.types import Predict, Unpack, default_predict, model_device, move, unpack_batch

Score: TypeAlias = Literal["margin", "flips"]

LOOKUPS = WEIGHTED | {"embedding", "embedding_bag", "index", "index_select", "gather"}
"""Operators that make an activation of token ids and a parameter; adding a table of biases to a mask does not."""

RECURRENT = {f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}
"""Operators that read several weights, no one of which ends them."""

SUMS = {"add", "sub", "rsub"}
"""Operators that do nothing but add their operands up."""

FILLED = {f"{kind}_like" for kind in ("full", "zeros", "ones", "empty")}
FILLED |= {f"new_{kind}" for kind in ("full", "zeros", "ones", "empty")}
"""Operators that read no more of a tensor than its shape."""

ROUNDING = 1e-6
"""A spread that is smaller, relative to the largest value, is what float32 leaves of a constant."""

SMALLEST_CELL = 3
"""Of fewer examples, nothing can be said."""


# Residual branches


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
        >>> from neuronsurgery import select, zero_out
        >>> zero_out(select(find_layout(model), {branches[-1].layer: ...}))
        zero_out(4 neurons in 1 layer: 2.outer.weight[0, 1, 2, 3])
    """
    runner = plain(model)
    unpacked = unpack_batch(batch, unpack)
    device = model_device(runner)
    if device is not None:
        unpacked = move(unpacked, device)
    graph = capture(runner, unpacked.args, unpacked.kwargs, predict or default_predict)
    flow = _Flow(graph, find_layout(runner))
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
            operands = [] if _operator(node) in FILLED else list(filter(_holds_tensors, node.all_input_nodes))
            if _operator(node) == "cat" and not self.sources.keys().isdisjoint(operands):
                tokens = learned.intersection(operands)
                self.sources |= dict.fromkeys(tokens, ())
                self.layers |= {token: set() for token in tokens}
            sources = tuple(operand for operand in operands if operand in self.sources)
            read = self._read(node, [weights.get(operand, set()) for operand in operands if operand not in sources])
            looked_up = _operator(node) in LOOKUPS and not learned.isdisjoint(operands)
            from_input = not given.isdisjoint(operands)
            if sources or (looked_up and from_input) or (node in given and _is_floating(node)):
                self.sources[node] = sources
                self.layers[node] = set() if _operator(node) in SUMS else read  # an added table is no layer
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
        if not weights or _operator(node) in SUMS | RECURRENT | {"cat", "stack"}:
            return set().union(*weights)
        return max(weights, key=lambda names: (-len(names), max(self.row_sizes[name] for name in names)))

    def sums(self) -> Iterator[fx.Node]:
        """Yield the additions of activations; one whose only use is another addition is a part of that."""
        for node in self.nodes:
            if self._addends(node) and not self._is_partial(node):
                yield node

    def _addends(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the activations that an operator adds up, two or more; none where it is no sum."""
        kind, sources = _operator(node), self.sources.get(node, ())
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


def _operator(node: fx.Node) -> str:
    """Return the name of a node's operator without namespace, overload and the mark of a write in place."""
    target: Any = node.target.operator if isinstance(node.target, OnCopy) else node.target
    name = str(target).split(".")
    return (name[1] if len(name) > 1 else name[0]).removesuffix("_")


def _unstacks(reduction: fx.Node, stack: fx.Node) -> bool:
    """Return whether a sum or mean runs over the axis that a stack has made, and no other."""
    axis: Any = stack.args[1] if len(stack.args) > 1 else 0
    summed: list[Any] = pytree.tree_leaves(reduction.args[1:2])
    count = len(Graph.shape(stack) or ())
    return _operator(stack) == "stack" and [other % count for other in summed] == [axis % count]


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


# Scores


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return by how much each example is right, float32 or wider, shape (n,): a metric for `evaluate` and `sweep`.

    The logit of the true class minus the largest other one: positive where the prediction is right.

    Args:
        logits: shape (n, classes), of two or more classes.
        targets: class indices, int, shape (n,).

    Raises:
        ValueError: if the shapes do not fit, or a label is not one of the classes.

    Example:
        >>> margin(torch.tensor([[2.0, 0.5], [1.0, 3.0]]), torch.tensor([0, 0]))
        tensor([ 1.5000, -2.0000])
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"margin needs logits (example, class) of two or more classes and one class index (int) per example, not "
            f"{logits.dtype} of shape {tuple(logits.shape)} and {targets.dtype} of shape {tuple(targets.shape)}: for "
            f"probabilities pass their argmax, for one logit z the two logits (0, z), for tokens a metric of your own"
        )
    refuse_unknown_classes(targets, logits.shape[1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    true = targets[:, None].long()
    others = wide.scatter(1, true, float("-inf")).amax(1)
    return wide.gather(1, true)[:, 0] - others


def fragility(sweep_or_values: Sweep | Tensor, targets: Tensor, *, score: Score = "margin") -> Tensor:
    """Return how little of each example survives some edits, float64, shape (N,), on the CPU; higher is more fragile.

    For one edit: minus the margin that remains, so compare examples of one class only. For E edits, so that none
    outweighs the others, each is centred and scaled within the class c of the example:

        - (1 / E) sum_e (m_e(x) - median_c(m_e)) / IQR_c(m_e)

    An edit whose margins have no spread within a class (an IQR of 0, to rounding) counts 0 there. For "flips", the
    share of the edits that turn the example from right to wrong or back; with two classes, that change its prediction.

    By how much a margin falls is not offered: examples with a large margin have more to lose, and those that are
    remembered need not be among them.

    Args:
        sweep_or_values: a `Sweep` with `metric=margin`, or a metric of your own that is above 0 where an example is
            right and has "margin" in its name; or, for "margin", the remaining margins, float, shape (E, N).
        targets: class indices, int, shape (N,), in the order of the sweep's values: that of the loaders, one after the
            other where they are a mapping (`sweep.members` says the group of each).
        score: "margin" or "flips".

    Raises:
        TypeError: if the first argument is neither a sweep nor a tensor, or the targets are not integers.
        ValueError: if the shapes do not fit, there is no edit, a margin is not finite, the name of the sweep's metric
            is not that of a margin, "flips" is asked of a tensor, or the score is unknown.

    Example:
        >>> remaining = torch.tensor([[2.0, 2.5, -1.0, 1.5, 0.5]])
        >>> fragility(remaining, torch.tensor([0, 0, 0, 1, 1]))
        tensor([-2.0000, -2.5000,  1.0000, -1.5000, -0.5000], dtype=torch.float64)
    """
    if score not in ("margin", "flips"):
        raise ValueError(f"score is 'margin' or 'flips', not {score!r}")
    edits, examples = _refuse_unfit(sweep_or_values, score)
    classes = _class_indices(targets, examples)
    was_right = sweep_or_values.values() > 0 if isinstance(sweep_or_values, Sweep) else None
    total = torch.zeros(examples, dtype=torch.float64, device="cpu")
    for edit in range(edits):
        remaining = _remaining(sweep_or_values, edit)
        _refuse_non_finite(remaining, f"under edit {edit} of {edits}")
        if score == "flips":
            total += (remaining > 0) != was_right
        else:
            total -= remaining if edits == 1 else _standardised(remaining, classes)
    return total / edits


def _refuse_unfit(given: Sweep | Tensor, score: Score) -> tuple[int, int]:
    """Return the number of edits and of examples, or raise where there are no margins to read."""
    if isinstance(given, Sweep):
        if not given.labels:
            raise ValueError("the sweep has no edits: give it at least one, e.g. the last residual branch zeroed")
        name = given.metric.lower()
        if "margin" not in name or "loss" in name:  # a loss, which is low where a margin is high, ranks backwards
            raise ValueError(
                f"the sweep was run with the metric '{given.metric}', which is no margin: run it with metric=margin. A "
                f"margin of your own is taken if its name has 'margin' in it, or as a tensor of shape (edits, examples)"
            )
        return len(given.labels), len(given.members)
    if not isinstance(given, Tensor):
        raise TypeError(f"fragility takes a Sweep or a tensor of margins (edit, example), not {type(given).__name__}")
    if given.dim() != 2 or len(given) == 0:
        found = tuple(given.shape)
        raise ValueError(f"margins have shape (edits, examples), not {found}: for one edit write values[None]")
    if score == "flips":
        raise ValueError("flips need the margins under no edit, which a tensor does not have: pass the Sweep")
    return len(given), given.shape[1]


def _remaining(given: Sweep | Tensor, edit: int) -> Tensor:
    """Return the margins under one edit, float64: one at a time, since hundreds of them may not fit into memory."""
    return given.values(given.labels[edit]) if isinstance(given, Sweep) else given[edit].detach().double().cpu()


def _class_indices(targets: Tensor, count: int) -> Tensor:
    """Return the targets as int64, shape (count,), on the CPU."""
    classes = torch.as_tensor(targets, device="cpu").detach()
    if classes.is_floating_point() or classes.is_complex():
        raise TypeError(f"targets are class indices (int), not {classes.dtype}: pass the argmax of probabilities")
    if classes.shape != (count,):
        raise ValueError(
            f"{count} examples need targets of shape ({count},), not {tuple(classes.shape)}: one class per example, in "
            f"the order of the values"
        )
    return classes.long()


def _refuse_non_finite(values: Tensor, where: str) -> None:
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(values)} values {where} are NaN or infinite, and have no rank: edit less")


def _standardised(values: Tensor, classes: Tensor) -> Tensor:
    """Return the values of one edit minus the median of their class, in units of its interquartile range."""
    result = torch.zeros_like(values)
    for position in torch.unique(classes):
        of_class = classes == position
        part = values[of_class]
        low, median, high = _quantiles(part, 0.25, 0.5, 0.75)
        if high - low > ROUNDING * float(part.abs().max()):
            result[of_class] = (part - median) / (high - low)
    return result


def _quantiles(values: Tensor, *at: float) -> list[float]:
    # numpy's: torch.quantile refuses more than 16 million values.
    return [float(quantile) for quantile in np.quantile(values.numpy(), at)]


# Groups


@dataclass(frozen=True, eq=False, repr=False)
class InferredGroups:
    """Classes split into examples that are fragile and examples that are not.

    Attributes:
        groups: int64, shape (N,): 2 * (position of the class in `classes`) + (1 if fragile).
        fragile: bool, shape (N,).
        classes: the classes, ascending.
        counts: the number of examples of each class that are (not fragile, fragile).
        thresholds: of each class; fragile is what lies above.

    Example:
        >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 7.0, 8.0, 9.0])
        >>> infer_groups(scores, torch.zeros(9).long(), rule=1 / 3).groups
        tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    """

    groups: Tensor
    fragile: Tensor
    classes: tuple[int, ...]
    counts: tuple[tuple[int, int], ...]
    thresholds: tuple[float, ...]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per inferred group, for any data frame."""
        rows = zip(self.classes, self.counts, self.thresholds, strict=True)
        return [
            {"group": 2 * i + fragile, "class": c, "fragile": bool(fragile), "count": counts[fragile], "threshold": at}
            for i, (c, counts, at) in enumerate(rows)
            for fragile in (0, 1)
        ]

    def __repr__(self) -> str:
        total = int(self.fragile.sum())
        lines = [f"InferredGroups of {len(self.groups)} examples, {total} fragile"]
        rows = list(zip(self.classes, self.counts, self.thresholds, strict=True))
        for c, (others, fragile), threshold in rows[:18]:
            lines.append(f"  class {c}: {fragile} of {others + fragile} fragile (above {threshold:.4g})")
        if len(rows) > 18:
            lines.append(f"  ... {len(rows) - 18} more classes")
        return "\n".join(lines)


def infer_groups(fragility: Tensor, targets: Tensor, rule: Literal["tukey"] | float = "tukey") -> InferredGroups:
    """Return class x fragile as groups: who stands out within a class by its score.

    By Tukey's fence, an example is fragile if its score lies above Q3 + 1.5 (Q3 - Q1) of its class (quartiles with
    linear interpolation). A number instead is the share of each class to take: the max(1, round(share * n)) highest
    scores of its n examples, less those that tie with the next one.

    Args:
        fragility: one score per example, float, shape (N,), higher is more fragile: see `fragility`.
        targets: class indices, int, shape (N,).
        rule: "tukey", or a share in (0, 1).

    Returns:
        The groups, with their counts and thresholds.

    Warns:
        UserWarning: if the scores of a class of 3 examples or more are constant (to rounding): the edit left the
            network blind.

    Raises:
        TypeError: if the targets are not integers.
        ValueError: if the shapes do not fit, a score is not finite, the rule is unknown, or a group would have fewer
            than 3 examples: lists all of these.

    Example:
        >>> scores = torch.cat([torch.linspace(-1, 1, 20), torch.tensor([8.0, 9.0, 9.5])])
        >>> infer_groups(scores, torch.zeros(23).long())
        InferredGroups of 23 examples, 3 fragile
          class 0: 3 of 23 fragile (above 2.474)

    Source:
        Tukey, "Exploratory Data Analysis", 1977 (the fence).
    """
    if rule != "tukey" and (not isinstance(rule, float) or not 0 < rule < 1):
        raise ValueError(f"rule is 'tukey' or a share of each class in (0, 1), not {rule!r}")
    scores = torch.as_tensor(fragility, device="cpu").detach().double()
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"fragility is one score per example, shape (N,), not {tuple(scores.shape)}")
    _refuse_non_finite(scores, "of the fragility")
    positions = _class_indices(targets, len(scores))
    classes = torch.unique(positions)
    parts = [scores[positions == position] for position in classes]
    _warn_of_constants(classes, parts)
    thresholds = [fence(part) if rule == "tukey" else _share(part, float(rule)) for part in parts]
    above = [int((part > at).sum()) for part, at in zip(parts, thresholds, strict=True)]
    counts = [(len(part) - fragile, fragile) for part, fragile in zip(parts, above, strict=True)]
    _refuse_small_cells(classes, counts)
    at = torch.searchsorted(classes, positions)
    fragile = scores > torch.tensor(thresholds, dtype=torch.float64, device="cpu")[at]
    return InferredGroups(2 * at + fragile, fragile, tuple(classes.tolist()), tuple(counts), tuple(thresholds))


def fence(scores: Tensor) -> float:
    """Return Tukey's upper fence, Q3 + 1.5 (Q3 - Q1), of scores: float64 on the CPU, shape (N,)."""
    low, high = _quantiles(scores, 0.25, 0.75)
    return high + 1.5 * (high - low)


def _share(scores: Tensor, share: float) -> float:
    """Return the highest score that is not to be taken."""
    taken = min(max(1, round(share * len(scores))), len(scores) - 1)
    return float(scores.sort(descending=True).values[taken])


def _warn_of_constants(classes: Tensor, parts: list[Tensor]) -> None:
    constant = [
        str(int(position))
        for position, part in zip(classes, parts, strict=True)
        if len(part) >= SMALLEST_CELL and float(part.max() - part.min()) <= ROUNDING * float(part.abs().max())
    ]
    if constant:
        warnings.warn(
            f"the scores of class {', '.join(constant[:10])} are constant: the edit left nothing of the input (in a "
            f"network without skip connections any whole layer does), so no example stands out. Cut less",
            stacklevel=3,
        )


def _refuse_small_cells(classes: Tensor, counts: list[tuple[int, int]]) -> None:
    small = [
        f"class {int(position)} has {cell} examples that are{' not' * (not fragile)} fragile"
        for position, cells in zip(classes, counts, strict=True)
        for fragile, cell in enumerate(cells)
        if cell < SMALLEST_CELL
    ]
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        raise ValueError(
            f"a group needs {SMALLEST_CELL} examples or more, but {'; '.join(small[:5])}{more}. Where nobody stands "
            f"out, there may be no shortcut that is simpler than the class: look at the scores before you take a fixed "
            f"share of each class with rule=0.05"
        )
