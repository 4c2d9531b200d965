"""Where the weights of a recurrent layer stand among the arguments of its operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from neuronsurgery.graph.operators import operator_name


@dataclass(frozen=True)
class Recurrent:
    """Where a weight stands among those of an operator for recurrent layers.

    Attributes:
        weights: of its layer and direction: of the input, of the state, their biases perhaps, a projection perhaps.
        states: those that the layers begin with.
        projected: whether there is a projection.
        is_last: whether it is of the last of the operator's layers, whose units others read.
        direction: 0 or 1.
        directions: how many there are.
    """

    weights: Sequence[fx.Node]
    states: Any
    projected: bool
    is_last: bool
    direction: int
    directions: int

    @classmethod
    def every(cls, node: fx.Node) -> list[Recurrent]:
        """Return each direction of each layer of an operator; none for the operator of a single step."""
        if operator_name(node).endswith("_cell"):
            return []
        packed = str(node.target).endswith(".data")
        arguments: Any = node.args[1 + packed : 8 + packed]
        states, weights, has_biases, layers, _, _, both = arguments
        directions = 1 + bool(both)
        size = len(weights) // (layers * directions)
        projected = size == 3 + 2 * bool(has_biases)
        return [
            cls(own, states, projected, part // directions == layers - 1, part % directions, directions)
            for part in range(layers * directions)
            for own in [weights[part * size : part * size + size]]
        ]

    @classmethod
    def of(cls, node: fx.Node, held: Sequence[fx.Node]) -> Recurrent | None:
        """Return where the weight that is held stands; None for the operator of a single step."""
        return next((part for part in cls.every(node) if not set(held).isdisjoint(part.weights)), None)
