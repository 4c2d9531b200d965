"""What it takes to differentiate a copy of a model by tensors in the place of its parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from neuronsurgery.copies import Runner
from neuronsurgery.errors import inline, warn
from neuronsurgery.switches import without_cudnn


class Within(nn.Module):
    """A model and a function to be called while the model's parameters are replaced.

    The backward pass runs in there too: activation checkpointing runs parts of the model again, and must meet the
    same parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def differentiable(tensor: Tensor) -> Tensor:
    """Return the tensor detached; one made in inference mode copied, since autograd cannot save such a tensor."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def differentiable_rnns(runner: Runner) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which recurrent layers in evaluation mode can be differentiated."""
    on_gpu = runner.device is not None and runner.device.type == "cuda"
    if on_gpu and any(isinstance(module, nn.RNNBase) for module in runner.model.modules()):
        return without_cudnn()
    return contextlib.nullcontext()


def differentiated(losses: Tensor, logits: Tensor, leaves: Sequence[Tensor], retain: bool) -> Sequence[Tensor | None]:
    """Return the gradients of the mean loss."""
    if not losses.requires_grad:
        return [None] * len(leaves)
    if is_float16(logits, leaves):
        return _scaled_gradients(losses, leaves)
    # The mean, not the sum, so that half-precision gradients stay in range whatever the batch size.
    return torch.autograd.grad(losses.mean(), leaves, allow_unused=True, retain_graph=retain)


def is_float16(logits: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether a part of the backward pass may be in float16, which has no numbers under 6e-8."""
    device = logits.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(tensor.dtype == torch.float16 for tensor in (logits, *leaves))


def _scaled_gradients(losses: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of the mean loss, its backward pass run on a multiple of it, in float32.

    For a cross entropy l the largest entry of an example's gradient to its logits is 1 - exp(-l): the multiple, a power
    of two, brings that of the hardest example to about 1. Where this overflows, the mean itself is differentiated.
    """
    steepest = -math.expm1(-max(float(losses.detach().max()), 1e-12)) / len(losses)
    multiple = 2.0 ** max(0, round(-math.log2(steepest)))
    gradients = torch.autograd.grad(losses.mean() * multiple, leaves, allow_unused=True, retain_graph=True)
    if not all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return torch.autograd.grad(losses.mean(), leaves, allow_unused=True, retain_graph=True)
    return [None if gradient is None else gradient.float() / multiple for gradient in gradients]


class _Read(TorchFunctionMode):
    """Notes which tensors are given to functions of torch, by their identities."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.tensors.update(map(id, pytree.tree_leaves((args, kwargs))))
        return func(*args, **(kwargs or {}))


def goes_past(run: Callable[[], Tensor], tensors: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Return whether what a function computes owes something to some tensors, and it reads none of those wanted.

    Args:
        run: what to compute; runs once.
        tensors: all that it could read, leaves of autograd.
        wanted: some of them.
    """
    read = _Read()
    others = [tensor for tensor in tensors if tensor.is_floating_point() and not tensor.requires_grad]
    try:
        for tensor in others:
            tensor.requires_grad_()
        with read:
            value = run()
    finally:
        for tensor in others:
            tensor.requires_grad_(False)
    return value.requires_grad and read.tensors.isdisjoint(map(id, wanted))


def warn_of_unreached(scored: Collection[str], reached: Collection[str], held: Mapping[str, str]) -> None:
    """Warn of scored layers that no gradient came to in any batch, and of those that plain attributes hold, too."""
    if held:
        partly = inline(f"{name} (by {where})" for name, where in held.items())
        warn(
            f"some scored parameters are held by plain attributes, too: {partly}. What is computed with these counts "
            f"in no score: use the registered parameter, or leave these layers out with where="
        )
    missed = [name for name in scored if name not in reached]
    if missed:
        warn(
            f"no gradient reached {len(missed)} of {len(scored)} scored layers, whose scores are 0: "
            f"{inline(missed)}. The loss does not depend on them, or something cuts the gradient off (no_grad or "
            f"detach in the forward or in predict=, checkpointing with use_reentrant=True)"
        )
