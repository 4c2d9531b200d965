"""Replay: a captured graph, what each of its operators reads, and some of them run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from neuronsurgery.copies import Runner
from neuronsurgery.errors import CaptureError
from neuronsurgery.graph.inputs import Dims, Inputs
from neuronsurgery.graph.operators import operator_name
from neuronsurgery.switches import KERNELS

Fetch = Callable[[list[Any]], tuple[list[Any], dict[str, Any]]]
"""The values by slot -> the arguments of an operator."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured forward: the operators between inputs and logits, none of which writes into another one's value.

    Attributes:
        nodes: the nodes in the order of execution, placeholders first; `node.target` is the operator, `node.users` and
            `node.all_input_nodes` the neighbours. Whatever does not lead to the logits is left out. A node's slot is
            its position here.
        parameters: for each of the model's parameters (its first name) its placeholders; several where the model knows
            it by several names, none where the forward does not use it.
        buffers: for each buffer that the forward reads its placeholder.
        inputs: the placeholders of the inputs' tensors, in order.
        output: the node of the logits.
        constants: the values of the other nodes that no operator computes: parameters, buffers, constants.
        originals: the model's parameters by first name.
        dims: the dimensions that may vary.
        slots: the slot of each node.
        reads: for each slot the slots that its node reads.
        fetches: for each slot of an operator how to fetch its arguments.
    """

    nodes: tuple[fx.Node, ...]
    parameters: Mapping[str, tuple[fx.Node, ...]]
    buffers: Mapping[str, fx.Node]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    constants: Mapping[fx.Node, Any]
    originals: Mapping[str, nn.Parameter]
    dims: Dims
    slots: Mapping[fx.Node, int] = field(init=False, repr=False)
    reads: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    fetches: tuple[Fetch, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        slots = {node: slot for slot, node in enumerate(self.nodes)}
        # An output that is an input is kept; what is left of dead nodes reads nothing that is known.
        reads = tuple(tuple(slots[read] for read in node.all_input_nodes) for node in self.nodes)
        fetches = tuple(_fetch(node, slots) for node in self.nodes)
        for name, value in (("slots", slots), ("reads", reads), ("fetches", fetches)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        used = sum(bool(nodes) for nodes in self.parameters.values())
        return f"Graph({len(self.nodes)} nodes, {used} of {len(self.parameters)} parameters used)"

    def parameter(self, node: fx.Node) -> str | None:
        """Return the first name of the parameter that a placeholder stands for, or None for any other node."""
        return next((name for name, nodes in self.parameters.items() if node in nodes), None)

    def tainted(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the slots of the operators that these parameters reach, in the order of execution.

        Raises:
            KeyError: if a name is not that of a parameter.
        """
        wanted = list(names)
        unknown = sorted(set(wanted) - set(self.parameters))
        if unknown:
            raise KeyError(f"not parameters of the captured model: {', '.join(unknown)}")
        reached = {self.slots[node] for name in wanted for node in self.parameters[name]}
        operators = []
        for slot in range(min(reached, default=len(self.nodes)), len(self.nodes)):
            if not reached.isdisjoint(self.reads[slot]):
                reached.add(slot)
                operators.append(slot)
        return tuple(operators)

    @staticmethod
    def shape(node: fx.Node) -> tuple[int | None, ...] | None:
        """Return the shape of a node's value, None for a size that varies; None for what is not a tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        return tuple(size if isinstance(size, int) else None for size in value.shape)

    def values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the value of every node, by slot, for some arguments of the model."""
        values = bind(self, Inputs.of(args, kwargs).tensors)
        operators = [slot for slot, node in enumerate(self.nodes) if node.op == "call_function"]
        execute(self, [Instruction(slot, ()) for slot in operators], values)
        return values

    def replayed(
        self, origin: fx.Node, value: Tensor, path: Sequence[fx.Node], values: Sequence[Any], skipped: Collection[str]
    ) -> Any:
        """Return what some operators, each of which reads the one before, make of another value of the first.

        Args:
            origin: whose value is another one.
            value: that value.
            path: the operators.
            values: of all other nodes, by slot.
            skipped: the names of operators that are taken to keep every entry as it is.
        """
        own, before = list(values), origin
        own[self.slots[origin]] = value
        with torch.no_grad():
            for node in path:
                name = operator_name(node)
                if name in skipped:
                    own[self.slots[node]] = own[self.slots[before]]
                else:
                    args, kwargs = self.fetches[self.slots[node]](own)
                    call: Any = node.target
                    own[self.slots[node]] = call(*args, **kwargs)
                before = node
        return own[self.slots[before]]


def bound(graph: Graph, runner: Runner) -> Graph | None:
    """Return a graph with the parameters and buffers of another copy of the model, or None where they do not fit."""
    buffers = dict(runner.model.named_buffers())
    places: dict[fx.Node, Tensor | None] = {
        node: runner.parameters.get(name) for name, nodes in graph.parameters.items() for node in nodes
    }
    places |= {node: buffers.get(name) for name, node in graph.buffers.items()}
    for node, tensor in places.items():
        old = graph.constants[node]
        if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (old.shape, old.dtype, old.device):
            return None
    return replace(graph, constants={**graph.constants, **places}, originals=runner.parameters)


# Running


class Instruction(NamedTuple):
    """One operator to run: its slot, and the slots whose values are not needed afterwards."""

    slot: int
    free: tuple[int, ...]


def instructions(graph: Graph, slots: Sequence[int], keep: Collection[int]) -> tuple[Instruction, ...]:
    """Return the operators as instructions that forget each value after its last use, but for those to keep."""
    seen = set(keep)
    found = []
    for slot in reversed(slots):
        dead = {*graph.reads[slot], slot} - seen
        seen |= dead
        found.append(Instruction(slot, tuple(sorted(dead))))
    return tuple(reversed(found))


def bind(graph: Graph, tensors: Sequence[Tensor]) -> list[Any]:
    """Return the values by slot before anything is run: those of inputs, parameters, buffers and constants.

    Raises:
        CaptureError: if the graph takes another number of tensors.
    """
    if len(tensors) != len(graph.inputs):
        raise CaptureError(f"the graph takes {len(graph.inputs)} tensors, not {len(tensors)}")
    values: list[Any] = [None] * len(graph.nodes)
    for node, tensor in zip(graph.inputs, tensors, strict=True):
        # A copy, as a forward gets: kernels, and so the last bits, go by where a tensor begins in memory, too.
        values[graph.slots[node]] = as_parameter(tensor.clone(), tensor)
    for node, value in graph.constants.items():
        values[graph.slots[node]] = value
    return values


def execute(graph: Graph, steps: Iterable[Instruction], values: list[Any]) -> None:
    """Run operators: their values come into the list by slot."""
    with KERNELS.steady(), torch.inference_mode(False), torch.no_grad():
        for slot, free in steps:
            args, kwargs = graph.fetches[slot](values)
            call: Any = graph.nodes[slot].target
            values[slot] = call(*args, **kwargs)
            for dead in free:
                values[dead] = None


def as_parameter(tensor: Tensor, original: Tensor) -> Tensor:
    """Return the same values, requiring a gradient where the original does.

    Even where no gradient is recorded, matmul chooses its kernel, and so the last bits, by that flag of its operands.
    """
    with torch.inference_mode(False):
        value = tensor.clone() if tensor.is_inference() else tensor.detach()
        return value.requires_grad_(original.requires_grad)


def _fetch(node: fx.Node, slots: Mapping[fx.Node, int]) -> Fetch:
    """Return a function of the values by slot that gives a node's arguments."""
    template = list(node.args)
    direct = [(i, slots[value]) for i, value in enumerate(template) if isinstance(value, fx.Node)]
    nested = [(i, value) for i, value in enumerate(template) if _has_nodes(value) and not isinstance(value, fx.Node)]
    named = {name: value for name, value in node.kwargs.items() if _has_nodes(value)}
    plain = {name: value for name, value in node.kwargs.items() if name not in named}

    def fetch(values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        args = template.copy()
        for i, slot in direct:
            args[i] = values[slot]
        if not nested and not named:
            return args, plain

        def value(n: fx.Node) -> Any:
            return values[slots[n]]

        for i, tree in nested:
            args[i] = fx.map_arg(tree, value)
        return args, {**plain, **{name: fx.map_arg(tree, value) for name, tree in named.items()}}

    return fetch


def _has_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)
