"""Training a set of neurons alone: an optimiser that is held to some entries of the model's parameters.

The one place where something that the caller owns is touched: two hooks of the optimiser, until they are removed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from neuronsurgery.edits import zero_out
from neuronsurgery.errors import checked, counted, listed
from neuronsurgery.neurons import Neurons, checked_neurons
from neuronsurgery.parametrized import parametrizations
from neuronsurgery.plans import plan
from neuronsurgery.spread import is_spread
from neuronsurgery.surgery import EditedRows
from neuronsurgery.surveys import SurveyedTensor, survey
from neuronsurgery.switches import restoring

_HELD: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""The optimisers that are held to some neurons now."""


TAKES = "train_only takes an optimiser of torch, not a {}: write train_only(neurons, optimizer, model)"


class _Kept(NamedTuple):
    """What a tensor held where it is not to change, before a step."""

    tensor: Tensor
    mask: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor, mask: Tensor | None) -> _Kept:
        return cls(tensor, mask, tensor.detach().clone() if mask is None else tensor.detach()[mask])

    def give_back(self) -> None:
        with torch.no_grad():
            if self.mask is None:
                self.tensor.detach().copy_(self.values)
            else:
                self.tensor.detach()[self.mask] = self.values


class TrainOnly:
    """An optimiser that is held to some neurons, until `remove()` or the end of the `with` block: see `train_only`."""

    def __init__(self, optimizer: Optimizer, masks: Mapping[Tensor, Tensor], rest: bool) -> None:
        """Hold an optimiser.

        Args:
            optimizer: torch's own.
            masks: for parameters of which only a part is held, which part, bool, of the parameter's shape.
            rest: whether all other parameters are held as a whole; else none of them is.
        """
        self._optimizer, self._masks, self._rest = optimizer, masks, rest
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._kept: list[_Kept] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        _HELD.add(optimizer)

    def remove(self) -> None:
        """Let the optimiser go: from now on it moves whatever it moved before."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._give_back()
            _HELD.discard(self._optimizer)
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _held(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each parameter of the optimiser that is held, and the mask of what of it; None for all of it."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._masks:
                    yield parameter, self._masks[parameter].to(parameter.device)
                elif self._rest:
                    yield parameter, None

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._give_back()  # of a step that was interrupted
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        for parameter, mask in self._held():
            # An optimiser leaves a parameter without a gradient alone; a closure may give it one, within the step.
            if closure is not None or (mask is not None and parameter.grad is not None):
                self._kept.append(_Kept.of(parameter, mask))
                state = [value for value in optimizer.state.get(parameter, {}).values() if _is_like(value, parameter)]
                self._kept += [_Kept.of(value, mask) for value in state]
        if closure is None:
            self._mask_gradients()
            return None
        masked = functools.partial(self._masked, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": masked}
        return (args[0], masked, *args[2:]), kwargs

    def _masked(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._mask_gradients()
        return loss

    def _mask_gradients(self) -> None:
        """Take the gradients of what is held away, to be given back after the step."""
        for parameter, mask in self._held():
            gradient = parameter.grad
            if gradient is None or (mask is not None and gradient.layout != torch.strided):
                continue
            self._gradients.append((parameter, gradient))
            parameter.grad = None if mask is None else gradient.masked_fill(mask, 0)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for kept in self._kept:
            kept.give_back()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._kept, self._gradients = [], []


def _is_like(value: object, parameter: Tensor) -> bool:
    """Return whether a value of an optimiser's state has one entry for each of the parameter's."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


@restoring
def train_only(neurons: Neurons, optimizer: Optimizer, model: nn.Module, *, all_but: bool = False) -> TrainOnly:
    """Return what holds an optimiser to some neurons: every other entry that it would move keeps its bits.

    Whatever the momentum, the weight decay or the schedule: what is held is given back after each step, bit for bit,
    with the optimiser's state for it (where there was none, it becomes what a gradient of zero makes of it). The
    gradients are as they were, so gradients are clipped and accumulated as ever. Every other parameter of the
    optimiser is held too, biases and norms, and those of other modules; buffers are not the optimiser's: put a batch
    norm into evaluation mode.

    Two hooks of the optimiser are all that is changed, and `remove()` (or the end of a `with` block) takes them off.
    It works under DDP, autocast, `torch.compile` and on a view. A step costs a copy of the entries that are held of
    parameters of which a part is trained; with a closure, of all that is held.

    Args:
        neurons: the neurons to train.
        optimizer: of torch, or one that Accelerate has prepared.
        model: whose neurons they are; not changed.
        all_but: the other way round: these neurons keep their bits, and everything else is trained.

    Raises:
        TypeError: if it is given something else than neurons, an optimiser and a module.
        ValueError: if the neurons do not fit the model (lists every mismatch), or are of parameters that the optimiser
            does not have, that require no gradient, or that a parametrization computes (lists all).
        RuntimeError: if the optimiser is held already.

    Example:
        >>> from neuronsurgery import find_layout, select
        >>> model = nn.Linear(3, 2)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> with train_only(select(find_layout(model), {"weight": 1}), optimizer, model):
        ...     for _ in range(3):
        ...         model(torch.ones(4, 3)).square().sum().backward()
        ...         optimizer.step()
        >>> (model.weight == before).all(1)
        tensor([ True, False])
    """
    checked_neurons(neurons, "train_only")
    checked(optimizer, Optimizer, TAKES)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # Accelerate's
        optimizer = inner
    if optimizer in _HELD:
        raise RuntimeError(
            "this optimiser is held to some neurons already: remove() that first; for several sets give their union"
        )
    surveyed = survey(model)
    fitting = plan(zero_out(neurons), surveyed).tensors  # which checks them
    chosen = [surveyed.tensors[name] for name in fitting]
    _refuse_untrainable(chosen, optimizer, all_but)
    masks = {}
    for tensor in chosen:
        layers = {layer: index.tolist() for _, parts in fitting[tensor.name].steps for layer, index, _ in parts}
        for parameter in tensor.parameters:
            mask = torch.stack([layer.mask(own).expand(layer.shape) for layer, own in layers.items()]).any(0)
            masks[parameter] = (mask if all_but else ~mask).to(parameter.device)
    return TrainOnly(optimizer, masks, rest=not all_but)


def _refuse_untrainable(chosen: list[SurveyedTensor], optimizer: Optimizer, all_but: bool) -> None:
    """Raise if neurons cannot be trained, or held, by an optimiser.

    Raises:
        ValueError: if there are some; lists the parameters with the reasons.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wrong = []
    for tensor in chosen:
        if _is_computed(tensor):
            wrong.append(f"{tensor.name}: computed by a parametrization, from tensors that have no such rows")
        elif is_spread(tensor.parameter):
            wrong.append(f"{tensor.name}: sharded over processes; train_only holds whole parameters")
        elif not all_but and not any(id(parameter) in known for parameter in tensor.parameters):
            wrong.append(f"{tensor.name}: not among the optimiser's parameters")
        elif not all_but and not tensor.trainable:
            wrong.append(f"{tensor.name}: requires no gradient")
    if wrong:
        raise ValueError(
            f"neurons of {counted(len(wrong), 'parameter')} cannot be trained alone:\n{listed(wrong)}\nGive the "
            f"optimiser the parameters of this model, and choose neurons of those that are trained"
        )


def _is_computed(tensor: SurveyedTensor) -> bool:
    """Return whether a tensor is computed by anything else than the edits of a view, which keep its rows."""
    if not tensor.parametrized:
        return False
    use = tensor.uses[0]
    return not all(isinstance(step, EditedRows) for step in parametrizations(use.module)[use.attribute])
