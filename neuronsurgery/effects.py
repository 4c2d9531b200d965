"""Signed first-order effects: by how much each group's metric would change if a neuron were cut, for one backward pass.

The change of an example's metric m, if the output z of a unit became c at every position t, is to first order the sum
over t of dm/dz (c - z): c is the bias that stays (zero) or the mean (mean). It is read off the gradients to the
outputs, so that no gradient to a weight is needed, whatever the number of groups. Where an output is not seen (a
recurrent layer, an attention's own projection, a model spread over processes) the same number is the product of the
weights' change and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.batches import Unpack, by_key
from neuronsurgery.copies import Runner, checkpointing_asleep, make_runner
from neuronsurgery.discovery import given_layout
from neuronsurgery.errors import warn
from neuronsurgery.first_order import Transform, mean_effects
from neuronsurgery.layouts import Layout
from neuronsurgery.losses import margin
from neuronsurgery.means import find_means
from neuronsurgery.scores import Scores
from neuronsurgery.surveys import Survey, survey
from neuronsurgery.switches import restoring
from neuronsurgery.terms import terms_of
from neuronsurgery.types import Loaders, Metric, Predict, Where
from neuronsurgery.wrappers import is_checkpointed


def error_probability(margins: Tensor) -> Tensor:
    """Return sigmoid(-m) of margins m: near 0 for an example that is surely right, 1/2 at the boundary, 1 if wrong.

    Example:
        >>> error_probability(torch.tensor([0.0, 20.0]))
        tensor([5.0000e-01, 2.0612e-09])
    """
    return torch.sigmoid(-margins)


@restoring
def group_effects(
    model: nn.Module,
    loaders: Loaders,
    *,
    layout: Layout | None = None,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    edit: Literal["zero", "mean"] = "zero",
    metric: Metric = margin,
    transform: Transform | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Scores:
    """Return the first-order change of each group's mean metric if a neuron were cut, signed, for every neuron.

    For an example's metric m and an edit that changes weights by d: <dm/dw, d>, averaged over the group; with
    `transform` the average of transform(m + <dm/dw, d>) - transform(m). One forward and one backward pass over the data
    (one more forward pass for means that are not those of a batch norm). Layers whose outputs are not seen (recurrent
    ones, `nn.MultiheadAttention`) cost one backward pass more for each group in a batch; with `transform` their
    examples are run one by one.

    First order is exact where the metric is linear in what is cut. It is good for mean ablation and poor where the edit
    is far: for zeroing a row before a norm (the norm rescales what is left), across kinks, and for large units.

    Args:
        model: any module; runs in evaluation mode on a copy, and does not change.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example.
        layout: the layers to score, see `find_layout`; `where` and `extra` are the short way to one.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.
        edit: "zero" is `zero_out`, "mean" is `mean_out` on the same data.
        metric: (logits, targets) -> one differentiable value per example, shape (n,).
        transform: a function of the metric, element by element, float64; for instance `error_probability`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        progress: whether to write a line of progress to standard error.
        process_group: reduce over its ranks, each of which gives its share of the data. None communicates nothing.

    Returns:
        Scores of shape (G, M), signed: negative where the group's metric falls.

    Raises:
        RuntimeError: inside `inference_mode`, or if another rank failed.
        TypeError: if a batch has an unknown form.
        ValueError: if a group has no examples, the layout does not fit, the metric is not one differentiable, finite
            value per example, examples depend on each other, or, with "mean", neurons cannot be held at their mean
            (lists the layers with the reasons).

    Example:
        >>> from neuronsurgery import evaluate, apply, zero_out, select, find_layout
        >>> model = nn.Linear(3, 2)
        >>> data = [(torch.randn(8, 3), torch.arange(8) % 2)]
        >>> effects = group_effects(model, data)
        >>> cut = apply(zero_out(select(find_layout(model), {"weight": 1})), model)
        >>> exact = evaluate(cut, data, metric=margin)["all"] - evaluate(model, data, metric=margin)["all"]
        >>> abs(float(effects["all"].values[0, 1]) - exact) < 1e-6
        True

    Source:
        Molchanov et al., "Importance estimation for neural network pruning", 2019 (the absolute value for a loss).
    """
    if edit not in ("zero", "mean"):
        raise ValueError(f"edit must be 'zero' or 'mean', not {edit!r}")
    unpack = by_key(unpack, group_key)
    surveyed, runner, layout = prepared(model, layout, where, extra, spread=edit == "zero", process_group=process_group)
    options = (predict, unpack, progress, process_group)
    means = find_means(surveyed, runner, layout.layers, loaders, *options) if edit == "mean" else None
    if means is not None:
        means.refuse_unheld(layout)
    terms = terms_of(surveyed, runner, layout, edit, means)
    values, counts = mean_effects(runner, surveyed, terms, loaders, metric, transform, *options)
    named = tuple(values)
    scores = torch.stack(list(values.values())).float()
    name = getattr(metric, "__name__", type(metric).__name__)
    criterion = f"first-order change of {name} by {'zeroing' if edit == 'zero' else 'mean ablation'}"
    return Scores(scores, named, tuple(counts[group] for group in named), layout, criterion)


def prepared(
    model: nn.Module,
    layout: Layout | None,
    where: Where | None,
    extra: str | Sequence[str] | None,
    *,
    spread: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Survey, Runner, Layout]:
    """Return the survey of a model, a copy to differentiate, and the layers to score.

    Raises:
        RuntimeError: inside `inference_mode`.
        ValueError: if the layout does not fit the model.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "gradients cannot be computed inside torch.inference_mode(): leave it, or use torch.no_grad(), in "
            "which this function works"
        )
    surveyed = survey(model)
    heard = not (spread and surveyed.is_spread)  # else gradients to the weights are all that is looked at
    if heard and (any(map(is_checkpointed, surveyed.model.modules())) or checkpointing_asleep(surveyed)):
        warn(
            "gradient checkpointing is off while effects are computed, which look at what layers put out: all "
            "activations of a batch are kept, and smaller batches need less memory"
        )
    runner = make_runner(surveyed, checkpoints=not heard, spread=spread, process_group=process_group)
    return surveyed, runner, given_layout(surveyed, runner.parameters, layout, where, extra)
