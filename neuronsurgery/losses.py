"""Losses and metrics, one value per example, and the rules for the labels that they take."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from neuronsurgery.batches import Batch, is_dense, signed
from neuronsurgery.errors import checked, checked_function
from neuronsurgery.precision import widened
from neuronsurgery.types import Loss, Metric

IGNORED_TOKEN = -100


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each example, shape (n,), float32 or wider: the default loss.

    Args:
        logits: shape (n, classes, ...); or (n, tokens, classes) with targets (n, tokens).
        targets: class indices, int, shape (n, ...), the mean being over the tokens or pixels whose label is not -100
            (0 where there is none); or probabilities, float, of the shape of the logits.

    Raises:
        ValueError: if a label is not one of the classes, float targets are no probabilities, or the shapes do not fit.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    targets = _checked_targets(logits, targets)
    wide = widened(logits)
    if targets.is_floating_point():
        if targets.shape != logits.shape or logits.dim() < 2:
            raise ValueError(
                f"float targets are probabilities of the logits' shape {tuple(logits.shape)}, not of shape "
                f"{tuple(targets.shape)}: give class indices (targets.long()), or pass loss= for a regression"
            )
        refuse_other_than_probabilities(targets, "loss=")
        return _mean_of_each(F.cross_entropy(wide, targets.to(wide.dtype), reduction="none"))
    tokens = is_token_classification(logits, targets)
    wide = wide.movedim(-1, 1) if tokens else wide
    if wide.dim() < 2 or targets.shape != wide.shape[:1] + wide.shape[2:]:
        raise ValueError(
            f"class indices for logits of shape {tuple(logits.shape)} (example, class, ...) have shape "
            f"{tuple(logits.shape[:1] + logits.shape[2:])}, not {tuple(targets.shape)}: reshape them, or pass loss="
            f"{_other_lengths(logits, targets)}"
        )
    return _mean_over_positions(wide, targets)


def _mean_of_each(losses: Tensor) -> Tensor:
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def _mean_over_positions(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each example, classes on axis 1, averaged over its tokens or pixels that count."""
    refuse_unknown_classes(targets, logits.shape[1])
    losses = F.cross_entropy(logits, targets.long(), reduction="none", ignore_index=IGNORED_TOKEN)
    if targets.dim() == 1:
        return losses
    return losses.flatten(1).sum(1) / (targets != IGNORED_TOKEN).flatten(1).sum(1).clamp(min=1)


def causal_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean next-token cross entropy of each sequence, shape (n,): logits at t against the label at t + 1.

    Args:
        logits: shape (n, tokens, vocabulary).
        targets: token ids, int, shape (n, tokens); -100 is left out.

    Raises:
        ValueError: if the shapes do not fit or a label is not in the vocabulary.

    Example:
        >>> causal_lm_loss(torch.zeros(1, 3, 7), torch.tensor([[2, 5, -100]]))
        tensor([1.9459])
    """
    targets = _checked_tokens("causal_lm_loss", logits, targets)
    wide = widened(logits[:, :-1]).movedim(-1, 1)
    return _mean_over_positions(wide, targets[:, 1:])


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each example that is classified right and 0 otherwise, float32, shape (n,): the default metric.

    An example with a NaN among its logits is wrong.

    Args:
        logits: shape (n, classes, ...), of two or more classes; or (n, tokens, classes) with targets (n, tokens).
        targets: class indices, int, shape (n, ...), the share being over the tokens or pixels whose label is not -100
            (0 where there is none); or probabilities of the shape of the logits, whose largest counts.

    Raises:
        ValueError: if the shapes do not fit, a label is not one of the classes, or float targets are no probabilities.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor([1., 0.])
    """
    wanted = targets = _checked_targets(logits, targets)
    axis = 2 if is_token_classification(logits, targets) else 1
    if targets.is_floating_point() and targets.shape == logits.shape and logits.dim() > 1:
        refuse_other_than_probabilities(targets, "metric=")
        wanted = targets.argmax(1)
    without_classes = logits.shape[:axis] + logits.shape[axis + 1 :]
    if logits.dim() < 2 or logits.shape[axis] < 2 or wanted.is_floating_point() or wanted.shape != without_classes:
        raise ValueError(
            f"accuracy needs logits (example, class, ...) of two or more classes and class indices (int) without the "
            f"class dimension, or probabilities with it, not {logits.dtype} of shape {tuple(logits.shape)} and "
            f"{targets.dtype} of shape {tuple(targets.shape)}: convert the targets, or pass metric="
            f"{_other_lengths(logits, targets)}"
        )
    if wanted is targets:
        refuse_unknown_classes(targets, logits.shape[axis])
    # The largest of logits with a NaN would be the NaN itself, or the first of them.
    right = (logits.argmax(axis) == wanted) & ~logits.isnan().any(axis)
    if right.dim() == 1:
        return right.float()
    counted = wanted != IGNORED_TOKEN
    return (right & counted).flatten(1).sum(1).float() / counted.flatten(1).sum(1).clamp(min=1)


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
    targets = _checked_targets(logits, targets)
    if logits.dim() != 2 or logits.shape[1] < 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"margin needs logits (example, class) of two or more classes and one class index (int) per example, not "
            f"{logits.dtype} of shape {tuple(logits.shape)} and {targets.dtype} of shape {tuple(targets.shape)}: for "
            f"probabilities pass their argmax, for one logit z the two logits (0, z), for tokens causal_margin"
        )
    refuse_unknown_classes(targets, logits.shape[1])
    wide = widened(logits)
    true = targets[:, None].long()
    others = wide.scatter(1, true, float("-inf")).amax(1)
    return wide.gather(1, true)[:, 0] - others


def causal_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return by how much a causal language model is right about each sequence: its smallest margin over the tokens.

    The margin of a token is its logit at the position before it minus the largest other one: positive for all of them
    where greedy decoding from any true prefix gives the next token, see `recited`. inf where no label counts.

    Args:
        logits: shape (n, tokens, vocabulary).
        targets: token ids, int, shape (n, tokens); -100 is left out.

    Returns:
        float32 or wider, shape (n,).

    Raises:
        ValueError: if the shapes do not fit or a label is not in the vocabulary.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
        >>> causal_margin(logits, torch.tensor([[0, 1, 0]]))
        tensor([2.])
    """
    targets = _checked_tokens("causal_margin", logits, targets)
    wide, labels = widened(logits[:, :-1]), targets[:, 1:].long()
    counted = labels != IGNORED_TOKEN
    true = labels.where(counted, 0)[..., None]
    others = wide.scatter(2, true, float("-inf")).amax(2)
    margins = (wide.gather(2, true)[..., 0] - others).masked_fill(~counted, float("inf"))
    return torch.cat([margins, margins.new_full((len(margins), 1), float("inf"))], dim=1).amin(1)


def recited(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each sequence whose every label is the largest logit of the position before it, else 0.

    That is what greedy decoding from the true prefix gives, in one forward pass and without generating: as long as
    every token so far was right, the model has seen the sequence itself. A sequence with a NaN among its logits is not
    recited; one without a label that counts is.

    Args:
        logits: shape (n, tokens, vocabulary).
        targets: token ids, int, shape (n, tokens); -100 (the prefix that is given, padding) is left out.

    Returns:
        float32, shape (n,).

    Raises:
        ValueError: if the shapes do not fit or a label is not in the vocabulary.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
        >>> recited(logits, torch.tensor([[0, 1, 0]])), recited(logits, torch.tensor([[0, 1, 1]]))
        (tensor([1.]), tensor([0.]))

    Source:
        Carlini et al., "Quantifying memorization across neural language models", 2023 (greedy extraction).
    """
    targets = _checked_tokens("recited", logits, targets)
    labels = targets[:, 1:]
    right = (logits[:, :-1].argmax(2) == labels) & ~logits[:, :-1].isnan().any(2)
    return (right | (labels == IGNORED_TOKEN)).all(1).float()


def _checked_tokens(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the labels of a causal language model.

    Raises:
        ValueError: if the shapes do not fit or a label is not in the vocabulary.
    """
    targets = _checked_targets(logits, targets)
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or targets.is_floating_point():
        raise ValueError(
            f"{name} takes logits (example, token, vocabulary) and token ids (example, token), not shapes "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    refuse_unknown_classes(targets, logits.shape[2])
    return targets


# Labels


def _checked_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the targets, unsigned integers as int64.

    Raises:
        TypeError: if one of the two is no tensor.
    """
    for name, value in (("logits", logits), ("targets", targets)):
        checked(value, Tensor, f"{name} are a tensor, not a {{}}: take them out of what the model or the loader gives")
    return signed(targets)


def _other_lengths(logits: Tensor, targets: Tensor) -> str:
    """Return the end of a message where the logits are of sequences of another length than the labels, or ""."""
    if logits.dim() != 3 or targets.dim() != 2 or targets.shape[1] in logits.shape[1:]:
        return ""
    return (
        ". Where sequences are as long as the longest of a batch or part, give pad_packed_sequence(..., total_length=) "
        "the length of the labels, or pass regroup=False"
    )


def refuse_other_than_probabilities(targets: Tensor, instead: str) -> None:
    """Raise if float targets are no probabilities over the classes on axis 1: multi-hot labels, or numbers to regress.

    Args:
        targets: floating-point, of two dimensions or more.
        instead: the argument to pass in their case.

    Raises:
        ValueError: if there is a single class, a negative entry, or a sum over the classes that is not 1.
    """
    if targets.numel() == 0:
        return
    sums = targets.detach().float().sum(1)
    reasons = {
        "that are not finite": not bool(sums.isfinite().all()),
        "of a single column": targets.shape[1] < 2,
        "with negative entries": bool((targets < 0).any()),
        f"that sum to {float(sums.min()):.3g}..{float(sums.max()):.3g}": bool((sums - 1).abs().max() > 1e-2),
    }
    wrong = [reason for reason, found in reasons.items() if found]
    if wrong:
        raise ValueError(
            f"float targets of the logits' shape are probabilities of the classes, not numbers {' and '.join(wrong)}: "
            f"for several labels per example, one logit, or a regression pass {instead} with a function of your own, "
            f"for instance binary_cross_entropy_with_logits(..., reduction='none').mean(1)"
        )


def are_probabilities(values: Tensor) -> bool:
    """Return whether outputs are non-negative and sum to 1 over the classes."""
    axis = 1 if values.dim() != 3 else 2
    if values.dim() < 2 or values.shape[axis] < 2 or values.min() < 0:
        return False
    return torch.allclose(values.sum(axis), torch.ones_like(values.sum(axis)), atol=1e-3)


def is_token_classification(logits: Tensor, targets: Tensor) -> bool:
    """Return whether the classes are on the last axis: 3-D logits (n, tokens, classes) and targets (n, tokens).

    Where tokens and classes are equally many, both readings fit, and this one is taken.
    """
    return logits.dim() == 3 and targets.shape == logits.shape[:2] and not targets.is_floating_point()


def refuse_unknown_classes(targets: Tensor, classes: int) -> None:
    """Raise if a class index is not one of the classes; -100 marks a token or pixel that does not count.

    Raises:
        ValueError: if there is one; shows some of them. If there is a single class, of which the loss is always 0.
    """
    known = (targets >= 0) & (targets < classes)
    if targets.dim() > 1:
        known |= targets == IGNORED_TOKEN
    one = "for one logit pass loss= with binary_cross_entropy_with_logits(..., reduction='none')"
    if not known.all():
        wrong = sorted(set(targets[~known].tolist()))[:5]
        hint = f"; {one}" if classes == 1 else ""
        raise ValueError(f"labels must be 0..{classes - 1} for {classes} classes, found {wrong}{hint}")
    if classes == 1:
        raise ValueError(f"the cross entropy over a single class is 0, whatever the logits are; {one}")


def refuse_unshifted_labels(logits: Tensor, batch: Batch, default: str, instead: str) -> None:
    """Raise where the labels of tokens are the tokens themselves: those of a causal language model, not shifted.

    Its logits at one position predict the label of the next. The library never shifts labels on its own.

    Args:
        logits: of the batch.
        batch: the inputs and targets; the labels that count are compared with every input of their shape.
        default: what the caller left at its default.
        instead: what to pass in its place.

    Raises:
        ValueError: if the labels are the tokens.
    """
    if not is_token_classification(logits, batch.targets):
        return
    counted = batch.targets != IGNORED_TOKEN
    labels = batch.targets[counted]
    inputs = [leaf for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(leaf, Tensor)]
    for tokens in inputs:
        if not is_dense(tokens):
            continue
        fits = tokens.shape == batch.targets.shape and not tokens.is_floating_point() and len(labels) > 1
        if fits and torch.equal(tokens.to(labels.device)[counted].long(), labels.long()):
            raise ValueError(
                f"the labels are the input tokens: a causal language model's logits at one position predict the label "
                f"of the next, and labels are never shifted by {default}. Pass {instead}"
            )


def refuse_unshifted_loss(loss: Loss | None, logits: Tensor, batch: Batch) -> None:
    """Raise if a loss was left at its default where labels have to be shifted.

    Raises:
        ValueError: if it was.
    """
    if loss is None:
        instead = "loss=neuronsurgery.causal_lm_loss (or loss=neuronsurgery.cross_entropy, if that is meant)"
        refuse_unshifted_labels(logits, batch, "the default loss", instead)


def refuse_unshifted_metrics(metrics: Iterable[Metric], logits: Tensor, batch: Batch) -> None:
    """Raise if `accuracy` is among the metrics where labels have to be shifted.

    Raises:
        ValueError: if it is.
    """
    if accuracy in metrics:
        instead = "metric=neuronsurgery.recited, or causal_lm_loss, or a function of your own"
        refuse_unshifted_labels(logits, batch, "accuracy", instead)


# Directions


def is_larger_better(metric: Metric, said: bool | None = None) -> bool | None:
    """Return whether larger values of a metric are better: what the caller says, or what is known of a built-in one.

    Args:
        metric: the function; of one with arguments bound to it the function itself is asked.
        said: the caller's own word; None for none.
    """
    function = metric.func if isinstance(metric, functools.partial) else metric
    known: dict[Any, bool] = {
        **dict.fromkeys((accuracy, margin, causal_margin, recited), True),
        **dict.fromkeys((cross_entropy, causal_lm_loss), False),
    }
    return said if said is not None else known.get(function) if isinstance(function, Hashable) else None


# One value per example


def example_losses(loss: Loss | None, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each example, shape (n,).

    Raises:
        TypeError: if `loss` is no function.
        ValueError: if `loss` gives something else than one number per example.
    """
    losses = (cross_entropy if loss is None else checked_function(loss, "loss"))(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape[:1]:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"loss must return one loss per example, shape ({len(targets)},), not {found}: write it with "
            f'reduction="none" and average over anything but the examples'
        )
    return losses


def example_values(metric: Metric, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the metric of each example, float64, shape (n,), on the CPU.

    Raises:
        ValueError: if `metric` gives something else than one number per example.
    """
    values = metric(logits, targets)
    if not isinstance(values, Tensor) or values.shape != targets.shape[:1]:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"metric must return one value per example, shape ({len(targets)},), not {found}: average over anything "
            f"but the examples"
        )
    return values.detach().double().cpu()


def refuse_bad_losses(losses: Tensor, what: str) -> None:
    """Raise if a loss is NaN or infinite.

    Raises:
        ValueError: if one is; says of how many examples of what.
    """
    if math.isfinite(losses.detach().sum()):  # as they nearly always are, at the price of one number
        return
    wrong = int((~torch.isfinite(losses)).sum())
    if wrong:
        raise ValueError(
            f"the loss of {wrong} of {len(losses)} examples of {what} is NaN or infinite: look for bad inputs, or for "
            f"a model that has diverged"
        )
