"""The hardest examples of a stream as one batch, for when there are no group labels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.batches import (
    Batch,
    Examples,
    Unpack,
    by_key,
    group_members,
    inseparable,
    join,
    move,
    ordered_groups,
    signature,
)
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.distributed import exchange
from neuronsurgery.draws import checked_seed, random_bits, smallest_tickets
from neuronsurgery.errors import EXHAUSTED, warn
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.independence import dependence
from neuronsurgery.loaders import checked_loader, iterate, refuse_partly_grouped
from neuronsurgery.losses import example_losses, refuse_bad_losses, refuse_unshifted_loss
from neuronsurgery.surveys import survey
from neuronsurgery.switches import restoring, without_mha_fastpath
from neuronsurgery.types import Group, Loader, Loss, Predict


@restoring
def hard_batch(
    model: nn.Module,
    loader: Loader,
    *,
    top: int = 256,
    sample: int = 128,
    seed: int = 0,
    per_group: bool = False,
    loss: Loss | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Batch:
    """Return `sample` examples drawn at random from the `top` of highest loss, as one batch.

    It needs no group labels. A batch in a list is a loader: `group_grad_norms(model, {"hard": [hard_batch(...)]})`.

    Args:
        model: any module; runs in evaluation mode on a copy, without gradient.
        loader: an iterable of batches, all of one shape.
        top: from how many of the highest loss to draw (all, where there are fewer); ties go to the earlier example.
        sample: how many to draw without replacement (all, where there are fewer).
        seed: of the draw, an integer of at least 0.
        per_group: whether to take `top` and `sample` of each group of the batches instead of all examples.
        loss: (logits, targets) -> one loss per example; default `cross_entropy`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        progress: whether to write a line of progress to standard error.
        process_group: choose among the examples of all of its ranks, each of which gives its share of the data; every
            rank gets the same batch. None communicates nothing.

    Returns:
        The batch, examples in the order of the loader (with `per_group` within each group, groups ascending), on the
        loader's device.

    Raises:
        RuntimeError: if another rank failed.
        TypeError: if it is given a mapping of loaders, or a batch has an unknown form.
        ValueError: if `top` or `sample` is less than 1, the seed is negative, there are no examples, their shapes
            differ, they cannot be told from their batch, or a loss is NaN or infinite.

    Warns:
        UserWarning: if examples have other losses without their batch (batch norm without running statistics).

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> data = [(torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([0, 1, 1]))]
        >>> len(hard_batch(model, data, top=2, sample=1))
        1

    Source:
        You et al., "The Silent Majority", 2025 (256 hardest, 128 of them).
    """
    if not all(isinstance(number, int | np.integer) and number >= 1 for number in (top, sample)):
        raise ValueError(f"top and sample must be at least 1, not {top} and {sample}")
    checked_loader(loader)
    seed, unpack = checked_seed(seed), by_key(unpack, group_key)
    pools: dict[Group, _Hardest] = {}
    shapes: set[Any] = set()
    error, told = None, False
    try:
        runner = make_runner(survey(model), blank=False, spread=True, process_group=process_group)
        with torch.no_grad(), without_mha_fastpath():
            batches = iterate(loader, unpack=unpack, progress="hard examples" if progress else None)
            for batch in refuse_partly_grouped(batches) if per_group else batches:
                _refuse_inseparable(batch)
                shapes.add(signature(batch))
                _refuse_several(shapes)
                logits, losses = _losses(runner, batch, loss, predict)
                if not told and len(batch) > 1:  # the first batch that shows it
                    _warn_of_dependence(runner, batch, logits, losses, loss, predict)
                    told = True
                losses = losses.double().cpu()
                groups = batch.groups if per_group and batch.groups is not None else ["all"] * len(batch)
                for group, indices in group_members(groups).items():
                    pools.setdefault(group, _Hardest(top)).add(Examples.of(batch).take(indices), losses[indices])
    except Exception as raised:
        error = raised
    pools = _gathered(exchange(process_group, error, (pools, shapes)), top)
    if not pools:
        raise ValueError(f"the loader yielded no batch. {EXHAUSTED}")
    drawn = [pools[group].draw(sample, f"hard\0{seed}\0{group}") for group in ordered_groups(pools)]
    return join(drawn).batch()


def _refuse_inseparable(batch: Batch) -> None:
    whole_only = inseparable(batch)
    if whole_only:
        raise ValueError(
            f"the hardest examples cannot be taken out of a batch that holds {whole_only}: give dense inputs (padded, "
            f"or by to_dense) in the loader"
        )


def _refuse_several(shapes: set[Any]) -> None:
    if len(shapes) > 1:
        raise ValueError(
            "examples of different shapes, or of batches with different further arguments, cannot be joined into one "
            "batch: pad them to one length in the loader"
        )


def _losses(runner: Runner, batch: Batch, loss: Loss | None, predict: Predict | None) -> tuple[Tensor, Tensor]:
    """Return the logits, and the loss of each example."""
    moved = move(batch, runner.device)
    logits = extract_logits(isolated_forward(runner, moved), predict, len(batch))
    refuse_unshifted_loss(loss, logits, moved)
    losses = example_losses(loss, logits, moved.targets)
    refuse_bad_losses(losses, "a batch")
    return logits, losses


def _warn_of_dependence(
    runner: Runner, batch: Batch, logits: Tensor, losses: Tensor, loss: Loss | None, predict: Predict | None
) -> None:
    """Warn if examples have other losses without their batch, which is not kept together."""
    run = functools.partial(_losses, runner, loss=loss, predict=predict)
    found = dependence(run, batch, logits, losses, runner.parameters.values())
    if found:
        warn(f"{found}. The examples were chosen by their losses within their batches, and are put into another one")


def _gathered(shares: list[tuple[dict[Group, _Hardest], set[Any]]], top: int) -> dict[Group, _Hardest]:
    """Return the pools of all ranks as one, the examples of the first rank coming first."""
    _refuse_several(set().union(*(shapes for _, shapes in shares)))
    if len(shares) == 1:
        return shares[0][0]
    pools: dict[Group, _Hardest] = {}
    for own, _ in shares:
        for group, pool in own.items():
            assert pool.examples is not None
            pools.setdefault(group, _Hardest(top)).add(pool.examples, pool.losses)
    return pools


class _Hardest:
    """A running pool of the examples of highest loss."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.examples: Examples | None = None
        self.losses = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, examples: Examples, losses: Tensor) -> None:
        together = examples if self.examples is None else join([self.examples, examples])
        self.losses = torch.cat([self.losses, losses])
        kept = self.losses.sort(descending=True, stable=True).indices[: self.top].sort().values
        self.examples = together.take(kept.tolist())
        self.losses = self.losses[kept]

    def draw(self, sample: int, key: str) -> Examples:
        assert self.examples is not None
        drawn = smallest_tickets(random_bits(key, len(self.examples)), sample)
        return self.examples.take(drawn.nonzero()[0].tolist())
