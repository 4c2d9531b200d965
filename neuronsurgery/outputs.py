"""Where in a forward pass a layer's neurons are seen, and what each example's metric owes to them there.

A row of a linear layer or a convolution is seen in the channel of the output that it writes; a head or a hidden unit,
some columns of the projection that reads it, in the channels of that projection's input. Modules of a copy are hooked,
and whatever is heard so is compared with gradients to the weights before it is relied on (see `effects`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from neuronsurgery.copies import Runner
from neuronsurgery.layers import Layer
from neuronsurgery.precision import widened
from neuronsurgery.surveys import Survey
from neuronsurgery.wrappers import is_a

CHANNEL_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.modules.batchnorm._BatchNorm, nn.GroupNorm),
)
"""Modules whose channels are on axis 1; of others they are on the last."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the neurons of a layer are seen.

    Attributes:
        module: of the copy that runs.
        side: whether they are channels of its output or of its input.
        axis: of the channels.
        units: for each channel the neuron that it belongs to, int64; None where they are the same.
        count: the number of neurons.
    """

    module: nn.Module
    side: Literal["output", "input"]
    axis: int
    units: Tensor | None
    count: int

    def per_unit(self, values: Tensor) -> Tensor:
        """Return sums over the channels of each neuron: shape (n, channels) -> (n, count)."""
        if self.units is None:
            return values
        summed = values.new_zeros(len(values), self.count)
        return summed.index_add_(1, self.units.to(values.device), values)


def place_of(layer: Layer, surveyed: Survey, runner: Runner) -> Place | None:
    """Return where a layer's neurons are seen, or None: then only gradients to its weights say what they do."""
    name = surveyed.first_names([layer.parameter])[layer.parameter]
    path, _, attribute = runner.places[name][0].rpartition(".")
    if attribute != "weight" or len(runner.places[name]) > 1:
        return None
    module = runner.model.get_submodule(path)
    axis = 1 if isinstance(module, CHANNEL_SECOND) else -1
    linear = len(layer.shape) == 2 and (isinstance(module, nn.Linear) or _is_transposed(module))
    if layer.has_default_pattern:
        cut = layer.identity[1]
        if cut == _output_axis(module, layer) and layer.count == layer.shape[cut]:
            return Place(module, "output", axis, None, layer.count)
        return Place(module, "input", -1, torch.arange(layer.count), layer.count) if linear else None
    if not linear:
        return None
    numbers = layer.put(
        torch.zeros(layer.shape, dtype=torch.int64, device="cpu"),
        torch.arange(layer.count),
        torch.arange(layer.count).reshape(-1, *[1] * len(layer.row_shape)).expand(layer.count, *layer.row_shape),
    )
    numbers = numbers.T if _is_transposed(module) else numbers
    if bool((numbers == numbers[:, :1]).all()):
        return Place(module, "output", -1, numbers[:, 0].contiguous(), layer.count)
    if bool((numbers == numbers[:1]).all()):
        return Place(module, "input", -1, numbers[0].contiguous(), layer.count)
    return None


def _is_transposed(module: nn.Module) -> bool:
    """Return whether it is Hugging Face's Conv1D, a linear layer stored (in, out)."""
    return is_a(module, "Conv1D", "transformers.pytorch_utils")


def _output_axis(module: nn.Module, layer: Layer) -> int:
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return 1 if len(layer.shape) > 1 and (transposed or _is_transposed(module)) else 0


# What is seen there


Heard: TypeAlias = Callable[[Place, Tensor, Tensor, bool], None]
"""Called with a place, the values of its channels, shape (n, positions, channels), their gradients, and whether that
was the last call of the module that is waited for."""


class Listener:
    """Hooks on the modules of a copy, and what of a backward pass goes through them.

    Args:
        places: where to listen, several of one module perhaps.
        heard: called for every call of a module, from within the backward pass; not for a call whose tensors are not
            made of whole examples.

    Attributes:
        roots: what to differentiate to, so that the gradients come by: tensors that would need none otherwise.
        awake: whether a backward pass is listened to.
        whole: by place whether all calls of its module in this pass were of whole examples; without those not called.
    """

    def __init__(self, places: Sequence[Place], heard: Heard) -> None:
        self.roots: list[Tensor] = []
        self.awake = True
        self.whole: dict[Place, bool] = {}
        self._by_module: dict[nn.Module, list[Place]] = {}
        for place in places:
            self._by_module.setdefault(place.module, []).append(place)
        self._heard = heard
        self._examples = 0
        self._waiting: dict[nn.Module, int] = {}

    @contextlib.contextmanager
    def listening(self, examples: int) -> Iterator[None]:
        """Listen to a forward pass of so many examples and to the backward pass that follows it."""
        self._examples, self.roots, self._waiting, self.whole = examples, [], {}, {}
        handles = [module.register_forward_hook(self._hook) for module in self._by_module]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.roots = []

    def _hook(self, module: nn.Module, args: tuple[object, ...], output: object) -> Tensor | None:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        inputs = args[0] if args and isinstance(args[0], Tensor) else None
        seen = {"output": output, "input": inputs}
        self._waiting[module] = self._waiting.get(module, 0) + 1
        places = []
        for place in self._by_module[module]:
            value = seen[place.side]
            if value is not None and value.numel() == 0:
                continue
            whole = value is not None and value.dim() > 1 and len(value) % self._examples == 0
            self.whole[place] = self.whole.get(place, True) and whole
            if value is not None and whole:
                places.append((place, value.detach()))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            self.roots.append(output)
        # A copy: what comes behind may write into its input, and a hook wants the value as it was.
        copied = output.clone()
        copied.register_hook(lambda gradient: self._receive(module, places, gradient))  # type: ignore[no-untyped-call]
        return copied

    def _receive(self, module: nn.Module, places: Sequence[tuple[Place, Tensor]], gradient: Tensor) -> None:
        self._waiting[module] -= self.awake
        for place, value in places if self.awake else ():
            own = gradient
            if place.side == "input":
                weight: Tensor = place.module.weight  # type: ignore[assignment]  # a linear layer
                own = to_input(place.module, gradient, weight.detach())
            value, own = self._by_example(value, place.axis), self._by_example(own, place.axis)
            self._heard(place, value, own, self._waiting[module] == 0)

    def _by_example(self, tensor: Tensor, axis: int) -> Tensor:
        """Return a tensor as (n, positions, channels), in float32 or wider."""
        last = widened(tensor.movedim(axis, -1))
        return last.reshape(self._examples, -1, last.shape[-1])


def to_input(module: nn.Module, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient to the input of a linear layer, of its own share."""
    return gradient @ (weight.T if _is_transposed(module) else weight)
