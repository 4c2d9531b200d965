"""What it takes to differentiate a copy of a model by tensors in the place of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from neuronsurgery.copies import Runner
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
