"""Experts of fused mixtures, all in one tensor: which no graph tells apart, known by their tensors' shapes."""

from __future__ import annotations

from typing import Literal

from neuronsurgery.copies import Runner
from neuronsurgery.layers import Layer
from neuronsurgery.surveys import Survey

FUSED = ("gate_up_proj", "down_proj")
"""What the tensors of all experts of a mixture are called."""


def expert_layers(surveyed: Survey, runner: Runner, kind: str) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of fused experts, and why others are none.

    Which axis is which is read off the shapes of the two tensors that a mixture keeps its experts in.
    """
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, tensor in surveyed.tensors.items():
        path, _, attribute = name.rpartition(".")
        shape = tuple(runner.parameters[name].shape)
        if attribute != "down_proj" or len(shape) != 3:
            continue
        prefix = f"{path}." if path else ""
        other = runner.parameters.get(f"{prefix}gate_up_proj")
        form = None if other is None else _form(tuple(other.shape), shape)
        if form is None:
            reasons[name] = "the shapes of gate_up_proj and down_proj do not say which axis is which"
        elif kind == "expert":
            layers.append(Layer(name, "expert h i -> expert h i", {}, shape, tensor.position))
            if f"{prefix}down_proj_bias" in runner.parameters:
                reasons[f"{prefix}down_proj_bias"] = "an expert's bias stays: silence() zeroes it, too"
        else:
            left = "expert h unit" if form == "rows" else "expert unit h"
            layers.append(Layer(name, f"{left} -> (expert unit) h", {}, shape, tensor.position))
    return layers, reasons


def _form(gate_up: tuple[int, ...], down: tuple[int, ...]) -> Literal["rows", "columns"] | None:
    """Return whether the experts' weights are (out, in) or (in, out); None where the shapes allow both or neither."""
    if len(gate_up) != 3 or gate_up[0] != down[0]:
        return None
    rows = gate_up[1] == 2 * down[2] and gate_up[2] == down[1]
    columns = gate_up[2] == 2 * down[1] and gate_up[1] == down[2]
    if rows == columns:
        return None
    return "rows" if rows else "columns"
