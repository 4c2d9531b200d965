"""The hardest examples of a stream as one batch, for when there are no group labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.batches import Batch, Examples, Unpack, group_members, join, move, ordered_groups, signature
from neuronsurgery.copies import make_runner
from neuronsurgery.distributed import without_mha_fastpath
from neuronsurgery.draws import checked_seed, random_bits, smallest_tickets
from neuronsurgery.errors import EXHAUSTED
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.loaders import iterate
from neuronsurgery.losses import example_losses, refuse_bad_losses, refuse_default_loss
from neuronsurgery.surveys import survey
from neuronsurgery.types import Group, Loader, Loss, Predict


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

    Returns:
        The batch, examples in the order of the loader (with `per_group` within each group, groups ascending), on the
        loader's device.

    Raises:
        ValueError: if `top` or `sample` is less than 1, the seed is negative, there are no examples, their shapes
            differ, or a loss is NaN or infinite.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> data = [(torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([0, 1, 1]))]
        >>> len(hard_batch(model, data, top=2, sample=1))
        1

    Source:
        You et al., "The Silent Majority", 2025 (256 hardest, 128 of them).
    """
    if top < 1 or sample < 1:
        raise ValueError(f"top and sample must be at least 1, not {top} and {sample}")
    seed = checked_seed(seed)
    surveyed = survey(model)
    refuse_default_loss(surveyed.model, loss)
    runner = make_runner(surveyed)
    pools: dict[Group, _Hardest] = {}
    shapes: set[Any] = set()
    with torch.no_grad(), without_mha_fastpath():
        for batch in iterate(loader, unpack=unpack):
            shapes.add(signature(batch))
            if len(shapes) > 1:
                raise ValueError(
                    "examples of different shapes, or of batches with different further arguments, cannot be joined "
                    "into one batch: pad them to one length in the loader"
                )
            moved = move(batch, runner.device)
            logits = extract_logits(isolated_forward(runner.model, moved), predict, len(batch))
            losses = example_losses(loss, logits, moved.targets).double().cpu()
            refuse_bad_losses(losses, "a batch")
            groups = batch.groups if per_group and batch.groups is not None else ["all"] * len(batch)
            for group, indices in group_members(groups).items():
                pools.setdefault(group, _Hardest(top)).add(Examples.of(batch).take(indices), losses[indices])
    if not pools:
        raise ValueError(f"the loader yielded no batch. {EXHAUSTED}")
    drawn = [pools[group].draw(sample, f"hard\0{seed}\0{group}") for group in ordered_groups(pools)]
    return join(drawn).batch()


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
