"""One capture for many sweeps: of a model whose weights change in between, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from neuronsurgery.batches import Unpack, by_key, move, unpack_batch
from neuronsurgery.copies import make_runner
from neuronsurgery.errors import checked_function
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.surveys import survey
from neuronsurgery.switches import restoring, without_mha_fastpath
from neuronsurgery.types import Predict


@dataclass(frozen=True, eq=False, repr=False)
class Shared:
    """A model with its captured forward, for `sweep` in the place of the model: see `share`.

    Attributes:
        model: the model itself.
        predict: the model's output -> logits, a part of what was captured.
        forward: what was captured.
    """

    model: nn.Module
    predict: Predict | None
    forward: CheckedForward

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the forward pass could not be captured; empty if it was."""
        return tuple(sorted(self.forward.reasons))

    def __repr__(self) -> str:
        state = f"not captured: {'; '.join(self.reasons)}" if self.reasons else "captured"
        return f"share of a {type(self.model).__name__}, {state}"


@restoring
def share(
    model: nn.Module,
    batch: Any,
    *,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
) -> Shared:
    """Return the model with its forward captured once, for `sweep` to take in the model's place again and again.

    A capture takes seconds; a sweep of every epoch, or many small ones, pay it once so. Parameters and buffers are read
    live: each sweep sees the model as it stands then, and checks the capture anew on its first batch, bit for bit. What
    no longer fits (other modules, shapes or devices) is captured again.

    Args:
        model: any module; not changed.
        batch: one batch, as a loader yields it.
        predict: the model's output -> logits; a part of what is captured.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.

    Warns:
        UserWarning: if the forward pass cannot be captured; says why. Sweeps then run every edit on its own.

    Example:
        >>> import torch
        >>> from neuronsurgery import find_layout, select, sweep, zero_out
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 2), torch.arange(8) % 2)]
        >>> shared = share(model, data[0])
        >>> cut = {"first": zero_out(select(find_layout(model), {"0.weight": 0}))}
        >>> before = sweep(shared, cut, data)
        >>> with torch.no_grad():
        ...     _ = model[2].weight.neg_()
        >>> torch.equal(sweep(shared, cut, data).values("first"), sweep(model, cut, data).values("first"))
        True
    """
    checked_function(predict, "predict")
    runner = make_runner(survey(model))
    example = move(unpack_batch(batch, by_key(unpack, group_key)), runner.device)
    forward = CheckedForward(runner, predict or default_predict)
    forward.capture_now()
    with without_mha_fastpath():
        for _ in forward.run(example.args, example.kwargs, {"base": {}}):
            pass
    return Shared(model, predict, forward)
