"""Losses as pure functions of tensors: the contrastive pruning loss, and those of the methods it is compared with.

None of them knows a model, holds a state or waits for the device: they take what the caller's own step has computed and
return what it minimises. Cosines, logarithms and sums are in float32 or wider, under autocast too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.precision import widened

NOTHING = 1e-30
"""A row whose largest entry is no larger has no direction: the gradient of one would come near the end of float32."""

_KINDS: Mapping[str, Callable[[torch.dtype], bool]] = {
    "floating-point": lambda dtype: dtype.is_floating_point,
    "boolean": lambda dtype: dtype == torch.bool,
    "integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "real": lambda dtype: not (dtype.is_complex or dtype == torch.bool),
}


# The paper's loss


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the NT-Xent loss of paired rows, a scalar: how badly each row's partner is told from all other rows.

    Of the 2B rows z = [a; b], each is an anchor once; p(i) is its partner, the same row of the other tensor:

        mean over i of -log( exp(cos(z_i, z_p(i)) / temperature) / sum over k != i of exp(cos(z_i, z_k) / temperature) )

    It lies between 0 and log(2B - 1) + 2 / temperature, is 0 for one pair, and does not change where rows are scaled,
    pairs reordered, or a and b swapped. A row of zeros has the cosine 0 with every row and gets no gradient.

    Args:
        a: floating-point, shape (B, D), B and D at least 1; gets a gradient.
        b: the same; row i is the partner of row i of `a`; gets a gradient. Detach one of the two for a fixed target.
        temperature: positive; divides the cosines.

    Returns:
        A scalar, in nats, float32 or wider.

    Raises:
        TypeError: if `a` or `b` is not a tensor.
        ValueError: if the shapes or dtypes do not fit, or the temperature is not a positive number.

    Example:
        >>> rows = torch.eye(2)
        >>> nt_xent(rows, rows, temperature=1.0)  # log(e + 1 + 1) - 1
        tensor(0.5514)

    Source:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020; You et al., "The
        Silent Majority", 2025 (temperature 0.5).
    """
    _require("a", a, "floating-point", {"B": None, "D": None}, "flatten what each example has with .flatten(1)")
    _require("b", b, "floating-point", {"B": a.shape[0], "D": a.shape[1]}, "give both the rows of the same examples")
    _require_number("temperature", temperature, above_zero=True)
    cosines = _cosines(torch.cat([a, b]))  # (2B, 2B)
    itself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    partners = torch.arange(len(cosines), device=cosines.device).roll(len(a))
    return _log_loss((cosines / temperature).masked_fill(itself, -math.inf), partners)


def contrastive_pruning_loss(
    dense: Tensor,
    pruned: Tensor,
    targets: Tensor,
    *,
    logits: Tensor | None = None,
    supervised: Literal["mse", "cross_entropy"] = "mse",
    weight: float = 0.2,
    temperature: float = 0.5,
) -> Tensor:
    """Return the loss of the paper's fine-tuning, a scalar: the pruned model must agree, the dense one must be right.

        nt_xent(dense, pruned, temperature) + weight * supervised term

    "mse" is the mean over the batch of the squared distance |p - onehot(y)|^2, summed over the classes. "cross_entropy"
    is the mean of -log softmax(logits)[y]. The paper's text has the first and both terms on the probabilities:

        contrastive_pruning_loss(model(x).softmax(1), twin(x).softmax(1), y)

    Gradient flows into `dense`, `pruned` and `logits`, so one backward pass does what two with one side detached do.

    Args:
        dense: what represents each example in the whole model, floating-point, shape (B, D): probabilities, logits,
            features.
        pruned: the same of the pruned model, for the same examples in the same order.
        targets: class indices, any integer dtype, shape (B,), each in 0..C-1. A label beyond is torch's own error of
            indexing; no label means "ignore".
        logits: what the supervised term judges, floating-point, shape (B, C); `dense` where it is not given.
            Probabilities for "mse", where they are compared as they come; logits for "cross_entropy", where a softmax
            before it would flatten the loss.
        supervised: "mse" or "cross_entropy".
        weight: of the supervised term, at least 0.
        temperature: of the contrastive term, positive.

    Returns:
        A scalar, float32 or wider.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes or dtypes do not fit, `supervised` is unknown, or a number is out of its range.

    Example:
        >>> probabilities, y = torch.eye(2), torch.tensor([0, 1])
        >>> contrastive_pruning_loss(probabilities, probabilities, y, temperature=1.0)  # all right: nt_xent alone
        tensor(0.5514)
        >>> contrastive_pruning_loss(probabilities, probabilities, 1 - y, temperature=1.0)  # + 0.2 * 2
        tensor(0.9514)

    Source:
        You et al., "The Silent Majority", 2025 (weight 0.2; their code takes a cross entropy).
    """
    if supervised not in _SUPERVISED:
        raise ValueError(f"supervised must be {' or '.join(map(repr, _SUPERVISED))}, not {supervised!r}")
    judged = dense if logits is None else logits
    _require("dense", dense, "floating-point", {"B": None, "D": None}, "flatten what each example has with .flatten(1)")
    _require("logits", judged, "floating-point", {"B": len(dense), "C": None}, "one row of classes per example")
    _require("targets", targets, "integer", {"B": len(dense)}, "one class index per example")
    _require_number("weight", weight)
    return nt_xent(dense, pruned, temperature) + weight * _SUPERVISED[supervised](widened(judged), targets)


def _squared_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    one_hot = torch.zeros_like(probabilities).scatter(1, targets.long()[:, None], 1.0)
    return (probabilities - one_hot).square().sum(dim=1).mean()


def _log_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[target]; the subtraction first keeps the digits of a small loss."""
    return (logits - logits.gather(1, targets.long()[:, None])).logsumexp(dim=1).mean()


_SUPERVISED = {"mse": _squared_error, "cross_entropy": _log_loss}


# Losses of the methods it is compared with


def group_dro(
    losses: Tensor,
    groups: Tensor,
    weights: Tensor,
    *,
    step_size: float = 0.01,
    counts: Tensor | None = None,
    adjustment: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and the groups' new weights, one step of Group DRO.

    With l_g the mean loss over the batch's examples of group g (0 where it has none) and n_g the group's size:

        u_g = q_g exp(step_size * (l_g + adjustment / sqrt(n_g)));  q'_g = u_g / sum of u;  loss = sum of q'_g l_g

    The adjustment moves the weights only; the loss is of the l_g themselves. There is no hidden state: hand the new
    weights to the next call.

    Args:
        losses: one per example, floating-point, shape (B,).
        groups: of each example, any integer dtype, shape (B,), in 0..G-1. A group beyond is torch's own error of
            indexing.
        weights: q, floating-point, shape (G,), non-negative with the sum 1; 1 / G each to begin with.
        step_size: of the weights, at least 0.
        counts: n_g, the training examples of each group, shape (G,); needed with an adjustment. A group of none gets
            no adjustment.
        adjustment: the C of the generalisation adjustment, in units of the loss, at least 0.

    Returns:
        The loss, a scalar with a gradient to `losses`; and the new weights, shape (G,), without gradient. Both float32
        or wider.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes or dtypes do not fit, a number is out of its range, or an adjustment comes without counts.

    Example:
        >>> losses, groups = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0, 0, 1])
        >>> loss, weights = group_dro(losses, groups, torch.tensor([0.5, 0.5]), step_size=0.5)
        >>> weights, loss  # e / (e + 1) and 1 / (e + 1), twice the first
        (tensor([0.7311, 0.2689]), tensor(1.4621))

    Source:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020.
    """
    _require("losses", losses, "floating-point", {"B": None}, "compute them with reduction='none'")
    _require("groups", groups, "integer", {"B": len(losses)}, "one group index per example")
    _require("weights", weights, "floating-point", {"G": None}, "one weight per group")
    _require_number("step_size", step_size)
    _require_number("adjustment", adjustment)
    if counts is None and adjustment > 0:
        raise ValueError("an adjustment needs counts=, the number of training examples of each group")
    means = _group_means(widened(losses), groups.long(), len(weights))
    gains = means.detach()
    if counts is not None:
        _require("counts", counts, "real", {"G": len(weights)}, "one number per group")
        gains = gains + torch.where(counts > 0, adjustment / counts.clamp(min=1).to(gains.dtype).sqrt(), 0.0)
    logarithms = widened(weights.detach()).log() + step_size * gains
    updated = (logarithms - logarithms.logsumexp(dim=0)).exp()
    return (updated * means).sum(), updated


def _group_means(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    sums = losses.new_zeros(count).index_add(0, groups, losses)
    members = losses.new_zeros(count).index_add(0, groups, torch.ones_like(losses))
    return sums / members.clamp(min=1)


def supervised_contrastive(features: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the contrastive loss of anchors with positives and negatives of the caller's choice, a scalar.

    Every row that has a positive is an anchor. With s(i, k) = exp(cos(z_i, z_k) / temperature), N(i) the negatives and
    P(i) the positives of row i:

        mean over anchors i of  mean over p in P(i) of  -log( s(i, p) / (sum over N(i) of s + sum over P(i) of s) )

    Correct-n-Contrast takes the rows of the same class and another prediction as positives, and those of another class
    and the same prediction as negatives:

        same_class, same_prediction = y[:, None] == y, predicted[:, None] == predicted
        supervised_contrastive(features, same_class & ~same_prediction, ~same_class & same_prediction)

    Args:
        features: floating-point, shape (B, D). A row of zeros has the cosine 0 with every row and gets no gradient.
        positives: bool, shape (B, B); row i says which rows are positives of anchor i. The diagonal is read as any
            other entry: leave it False.
        negatives: bool, shape (B, B), in the same way. A row that is both counts once.
        temperature: positive; divides the cosines.

    Returns:
        A scalar, in nats, float32 or wider; 0, with a gradient of zeros, where no row has a positive.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes or dtypes do not fit, or the temperature is not a positive number.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> positives, negatives = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
        >>> positives[0, 1] = negatives[0, 2] = True
        >>> supervised_contrastive(features, positives, negatives, temperature=1.0)  # log(e + 1) - 1
        tensor(0.3133)

    Source:
        Zhang et al., "Correct-N-Contrast: A Contrastive Approach for Improving Robustness to Spurious Correlations",
        2022; Khosla et al., "Supervised Contrastive Learning", 2020.
    """
    _require("features", features, "floating-point", {"B": None, "D": None}, "flatten them with .flatten(1)")
    square = {"B": len(features), "B'": len(features)}
    _require("positives", positives, "boolean", square, "row i is for anchor i")
    _require("negatives", negatives, "boolean", square, "row i is for anchor i")
    _require_number("temperature", temperature, above_zero=True)
    similarities = _cosines(features) / temperature  # (B, B)
    anchors = positives.any(dim=1)
    # A row without a positive keeps all its entries: a logsumexp over none has a NaN for a gradient, which is masked
    # further on, but stops whoever looks for NaNs with autograd's anomaly mode.
    pool = positives | negatives | ~anchors[:, None]
    totals = similarities.masked_fill(~pool, -math.inf).logsumexp(dim=1)
    means = torch.where(positives, similarities, 0.0).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return torch.where(anchors, totals - means, 0.0).sum() / anchors.sum().clamp(min=1)


def jtt_weights(errors: Tensor, upsampling: int) -> Tensor:
    """Return how often Just Train Twice shows each example in its second stage: 1 + upsampling for an error, else 1.

    `torch.arange(n).repeat_interleave(jtt_weights(errors, upsampling))` are the indices to train on. As weights of a
    `WeightedRandomSampler` they give the same mixture in expectation.

    Args:
        errors: whether the first stage's model got each training example wrong, bool, shape (N,).
        upsampling: the method's lambda, how many copies are *added* of an error, an integer of at least 0.

    Returns:
        int64, shape (N,), on the device of `errors`.

    Raises:
        TypeError: if `errors` is not a tensor.
        ValueError: if `errors` is not boolean or not one per example, or `upsampling` is no integer of at least 0.

    Example:
        >>> jtt_weights(torch.tensor([False, True, False]), upsampling=100)
        tensor([  1, 101,   1])

    Source:
        Liu et al., "Just Train Twice: Improving Group Robustness without Training Group Information", 2021; the factor
        is that of the authors' code, which appends the copies to the whole training set.
    """
    _require("errors", errors, "boolean", {"N": None}, "compare predictions with targets")
    if isinstance(upsampling, bool) or not isinstance(upsampling, int | np.integer) or upsampling < 0:
        raise ValueError(f"upsampling must be an integer of at least 0, not {upsampling!r}")
    return 1 + int(upsampling) * errors.long()


# Numbers


def _cosines(rows: Tensor) -> Tensor:
    """Return the cosine of every row with every row, shape (B, B), float32 or wider; 0 with a row of zeros.

    Each row is divided by its largest entry first, so that no square overflows or vanishes. A cosine does not depend on
    that factor, so it may count as a constant: the gradient is that of the cosine all the same.
    """
    rows = widened(rows)
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    empty = largest <= NOTHING  # False for NaN, which must come through
    scaled = torch.where(empty, 0.0, rows / torch.where(empty, 1.0, largest))
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    directions = scaled / torch.where(empty, 1.0, lengths)
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in half precision
        return directions @ directions.T


# What the arguments must be


def _require(argument: str, tensor: Tensor, kind: str, sizes: Mapping[str, int | None], hint: str) -> None:
    """Raise if an argument is no tensor of a kind and of named dimensions, None standing for any size but 0."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor, not a {type(tensor).__name__}: {hint}")
    fits = len(tensor.shape) == len(sizes) and all(
        found > 0 if size is None else found == size for found, size in zip(tensor.shape, sizes.values(), strict=True)
    )
    if not fits or not _KINDS[kind](tensor.dtype):
        shape = ", ".join(name if size is None else f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(
            f"{argument} must be {kind} of shape ({shape}), not {tensor.dtype} of shape {tuple(tensor.shape)}: {hint}"
        )


def _require_number(argument: str, value: float, *, above_zero: bool = False) -> None:
    if not 0 <= value < math.inf or (above_zero and value == 0):
        least = "a positive finite number" if above_zero else "a finite number of at least 0"
        raise ValueError(f"{argument} must be {least}, not {value!r}")
