"""Comparing: where neurons rank among all, two groups' scores, two sets of neurons."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.errors import SCORES, checked
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.scores import Scores
from neuronsurgery.types import Group


def ranks(scores: Scores, of: Neurons) -> Tensor:
    """Return where some neurons rank among all, as percentiles in (0, 100], 100 the largest.

    The percentile of a neuron is the share of all neurons that score no more than it does.

    Args:
        scores: of G groups.
        of: the neurons.

    Returns:
        float64, shape (G, len(of)), columns in the order of `of`.

    Raises:
        ValueError: if a neuron is not in the scores' layout.

    Example:
        >>> from neuronsurgery import magnitudes, topk
        >>> scores = magnitudes(torch.nn.Linear(4, 8))
        >>> ranks(scores, of=topk(scores, 1)).tolist()
        [[100.0]]

    Source:
        You et al., "The Silent Majority", 2025 (the two histograms).
    """
    columns = checked(scores, Scores, SCORES).layout.flat(of).numpy()
    no_more = np.empty((len(scores.groups), len(columns)), dtype=np.int64)
    for row, values in zip(no_more, scores.values.detach().cpu().numpy(), strict=True):
        wanted = values[columns]
        order = wanted.argsort()  # looked up in order, they are found where the last one was
        row[order] = np.searchsorted(np.sort(values), wanted[order], side="right")  # numpy sorts faster than torch
    return 100.0 * torch.from_numpy(no_more).double() / scores.layout.count


def contrast(scores: Scores, of: Group, against: Group) -> Scores:
    """Return log((a + eps) / (b + eps)) of two groups' scores, eps = 1e-12 of the largest of both.

    Args:
        scores: of at least these two groups, none negative.
        of: the group a.
        against: the group b.

    Returns:
        Scores of one group named "a / b".

    Raises:
        KeyError: if there is no such group.
        ValueError: if a score is negative, as those of `group_effects` may be.

    Example:
        >>> from neuronsurgery import magnitudes
        >>> scores = magnitudes(torch.nn.Linear(4, 8))
        >>> contrast(scores, of="all", against="all").values.abs().max().item()
        0.0
    """
    a, b = (checked(scores, Scores, SCORES)[group].values.double() for group in (of, against))
    if bool((torch.cat([a, b]) < 0).any()):
        raise ValueError(
            f"a contrast is a ratio of scores of at least 0, and some of these ({scores.criterion}) are negative: "
            f"compare signed scores by their difference"
        )
    eps = 1e-12 * torch.maximum(a.max(), b.max())
    if eps == 0:
        eps = torch.ones((), dtype=torch.float64, device="cpu")  # all scores are zero: no contrast anywhere
    values = torch.log((a + eps) / (b + eps)).float()
    count = scores[of].counts[0] + scores[against].counts[0]
    return Scores(values, (f"{of} / {against}",), (count,), scores.layout, f"log contrast of {scores.criterion}")


def overlap(a: Neurons, b: Neurons) -> float:
    """Return the Jaccard index |a & b| / |a | b| of two sets of neurons; 1 for two empty ones.

    Where the two cut one parameter in several ways (heads and rows), entries are counted in place of neurons.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> layout = find_layout(torch.nn.Linear(2, 4))
        >>> overlap(select(layout, {"weight": (0, 1)}), select(layout, {"weight": (1, 2)}))
        0.3333333333333333

    Source:
        Jaccard, 1901.
    """
    both = checked_neurons(a, "overlap") | checked_neurons(b, "overlap")
    if any(len(layers) > 1 for layers in both.by_parameter().values()):
        ours, theirs, united = (_entries(neurons) for neurons in (a, b, both))
        return (ours + theirs - united) / united
    united = len(both)
    return len(a & b) / united if united else 1.0


def _entries(neurons: Neurons) -> int:
    """Return how many entries some neurons cover."""
    shapes = {layer.parameter: layer.shape for layer in neurons.by_layer()}
    return sum(int(mask.expand(shapes[name]).sum()) for name, mask in neurons.masks().items())
