"""Whether the examples of a batch depend on each other: then no batch may be taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from neuronsurgery.batches import Batch, Examples, inseparable
from neuronsurgery.errors import warn
from neuronsurgery.forward import LogitsShapeError, draws_within

ALONE = 4
"""So many examples at most are run without the others."""

TOLERANCE = 1e-3
"""A larger difference, relative to the largest value, is no rounding; in half precision one fifty times as large."""

HALF = (torch.float16, torch.bfloat16)

Forward = Callable[[Batch], tuple[Tensor, Tensor]]
"""A batch -> its logits and losses."""


def dependence(
    forward: Forward, batch: Batch, logits: Tensor, losses: Tensor, parameters: Iterable[Tensor] = ()
) -> str:
    """Return how the first examples of a batch differ alone from what they are within the batch; "" if they do not.

    Args:
        forward: runs the model on a batch, and its loss.
        batch: of which some examples are run alone; nothing is checked of a single example.
        logits: of the batch.
        losses: of the batch.
        parameters: of the model: where one is in half precision, the logits are no better, whatever their dtype.

    Raises:
        ValueError: if the logits of these examples alone are not one per example, or they run alone only with a tensor
            of the whole batch: a dimension that is none of examples was taken for one.

    Warns:
        UserWarning: if these examples cannot be run alone; says why.
    """
    count = min(ALONE, len(batch) - 1)
    if count < 1 or inseparable(batch):
        return ""
    examples = Examples.of(batch)
    alone = examples.take(range(count)).batch()
    try:
        with torch.no_grad():
            parts = forward(alone)
    except LogitsShapeError as error:
        raise ValueError(
            f"{count} examples cannot be told from their batch: {error}. Of a tensor whose first dimension is not the "
            f"example, and which has as many entries there as the batch has examples ({len(batch)}), a part was taken: "
            f"put the example first, or keep batches together (regroup=False, or a mapping group -> loader)"
        ) from error
    except Exception as error:
        _refuse_whole(forward, examples, count, logits)
        warn(f"whether examples depend on each other was not checked: {count} of a batch fail alone ({error})")
        return ""
    close = tolerance(logits, parameters)
    for what, whole, part in (("logits", logits, parts[0]), ("losses", losses, parts[1])):
        difference = _difference(whole[:count], part)
        if difference > close:
            if draws_within(lambda: forward(alone)):
                return ""  # a model that draws gives other values to other shapes
            return (
                f"the {what} of {count} examples alone differ from those within their batch, by {difference:.2g} of "
                f"the largest: the model or the loss looks at the whole batch (batch norm without running statistics, "
                f"in-batch negatives, pad_packed_sequence without total_length=)"
            )
    return ""


def tolerance(logits: Tensor, parameters: Iterable[Tensor]) -> float:
    """Return which difference, relative to the largest value, is no rounding any more."""
    half = torch.is_autocast_enabled(logits.device.type) or any(t.dtype in HALF for t in (logits, *parameters))
    return TOLERANCE * (50 if half else 1)


def _refuse_whole(forward: Forward, examples: Examples, count: int, logits: Tensor) -> None:
    """Raise if some examples run alone, and as within their batch, once a tensor among the inputs stays whole.

    It has one entry for each class, say, and there are as many classes as examples: it must not be taken apart.

    Raises:
        ValueError: if there is such a tensor; says where.
    """
    places = [place for place, flag in enumerate(examples.per_example) if flag]
    for whole in places if len(places) > 1 else ():
        flags = tuple(flag and place != whole for place, flag in enumerate(examples.per_example))
        part = _logits(forward, replace(examples, per_example=flags).take(range(count)).batch())
        if part is not None and _difference(logits[:count], part) <= TOLERANCE:
            shape = tuple(examples.leaves[whole].shape)
            raise ValueError(
                f"tensor {whole + 1} of the inputs, of shape {shape}, is not one entry per example, though it has as "
                f"many entries as the batch has examples: give batches of another size, put it into the model, or keep "
                f"batches together (regroup=False, or a mapping group -> loader)"
            )


def _logits(forward: Forward, batch: Batch) -> Tensor | None:
    """Return the logits of a batch, or None where it does not run."""
    try:
        with torch.no_grad():
            return forward(batch)[0]
    except Exception:
        return None


def _difference(whole: Tensor, part: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite where the shapes differ."""
    if whole.shape != part.shape:
        return float("inf")
    largest = float(torch.maximum(whole.abs().amax(), part.abs().amax())) if part.numel() else 0.0
    return float((whole.float() - part.float()).abs().max()) / largest if largest > 0 else 0.0
