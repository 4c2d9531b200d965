"""What the operators of a graph do, by name."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from neuronsurgery.graph.writes import OnCopy

CONVOLUTIONS = {f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3)} | {"convolution"}

WEIGHTED = CONVOLUTIONS | {"linear", "addmm", "matmul", "mm", "bmm", "bilinear", "scaled_dot_product_attention"}
"""Operators that mix the channels of what they read: a layer ends where they begin."""

NORMS = {
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "group_norm": (2, 3),
    "layer_norm": (2, 3),
    "rms_norm": (2, None),
}
"""Normalisations and where their arguments have the scale and the shift."""

ACTIVATIONS = {"relu", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "relu6", "hardtanh", "hardswish"}
ELEMENTWISE = ACTIVATIONS | {"hardsigmoid", "mish", "sigmoid", "tanh", "softplus", "neg", "abs", "exp", "pow", "square"}
ELEMENTWISE |= {"dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "to", "type_as"}
ELEMENTWISE |= {"_to_copy", "clamp", "clamp_min", "clamp_max", "sqrt", "lift_fresh", "mul", "div"}
"""Operators that keep every entry where it is; `mul` and `div` only by a number."""

JOINS = {"add", "sub", "cat", "stack"}

SUMS = {"add", "sub", "rsub"}
"""Operators that do nothing but add their operands up."""

SOFTMAXES = {"softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp"}
"""Operators to which a zero counts as any other number."""

SCALINGS = {"mul", "div"}
"""Operators that leave zero zero, whatever number it is multiplied with or divided by."""

LOOKUPS = WEIGHTED | {"embedding", "embedding_bag", "index", "index_select", "gather"}
"""Operators that make an activation of token ids and a parameter; adding a table of biases to a mask does not."""

RECURRENT = {f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}
"""Operators that read several weights, no one of which ends them."""

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "contiguous", "squeeze"}
RESHAPES |= {"unsqueeze", "movedim", "clone", "t", "expand", "slice", "select"}
"""Operators that only say otherwise where an entry stands."""

POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
POOLS |= {"max_pool2d_with_indices", "mean", "upsample_nearest2d", "upsample_bilinear2d"}
"""Operators that keep channels apart."""

MOVES = RESHAPES | POOLS | {"cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "getitem"}
"""Operators that put entries elsewhere, or average entries of one channel."""

SHAPES = {"sym_size", "sym_numel", "sym_stride"}
"""Operators that read no more of a tensor than its shape."""

FILLED = {f"{kind}_like" for kind in ("full", "zeros", "ones", "empty")}
FILLED |= {f"new_{kind}" for kind in ("full", "zeros", "ones", "empty")}
"""Operators that make a constant of a tensor's shape."""


def operator_name(node: fx.Node) -> str:
    """Return the name of a node's operator without namespace, overload and the mark of a write in place."""
    target: Any = node.target.operator if isinstance(node.target, OnCopy) else node.target
    if target is operator.getitem:
        return "getitem"
    name = str(target).split(".")
    return (name[1] if len(name) > 1 else name[0]).removesuffix("_")


def convolution_form(node: fx.Node) -> tuple[bool, int]:
    """Return whether a convolution is transposed, and its groups."""
    name = operator_name(node)
    turned = "transpose" in name or bool(name == "convolution" and node.args[6])
    return turned, int(argument(node, 8 if name == "convolution" else 6, "groups") or 1)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """Return an argument of a node's operator, given by position or by name; None where it is left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
