"""Plans: edits checked against a model, each then one pure function of the model's tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from neuronsurgery.copies import readable
from neuronsurgery.discovery import refuse_unfit
from neuronsurgery.edits import Edit, Part, ZeroOut, edited_weight, leaves
from neuronsurgery.errors import checked, inline, listed
from neuronsurgery.layers import Layer
from neuronsurgery.spread import is_spread, spread_like, whole
from neuronsurgery.surveys import Survey, SurveyedTensor, survey
from neuronsurgery.switches import restoring
from neuronsurgery.wrappers import same_names


class Zeroed(NamedTuple):
    """Rows of a parameter that an edit sets to zero, all else of it staying as it is.

    Attributes:
        cut: the axis of the rows and the groups that the other axes are cut in, see `Layer.default_cut`.
        rows: which.
    """

    cut: tuple[int, int]
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """What an edit does to one tensor: a pure function of it.

    Attributes:
        name: the tensor's first name in the model.
        names: the names that `functional_call` needs to reach every use of it, then its other ones.
        steps: the edits from left to right, each with the neurons of this tensor and what it draws or reads for them,
            on the device that the tensor had.
        trainable: whether it is computed by a parametrization from a parameter that requires a gradient.
    """

    name: str
    names: tuple[str, ...]
    steps: tuple[tuple[Edit, tuple[Part, ...]], ...]
    trainable: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.steps[0][1][0][0].shape

    @property
    def zeroed(self) -> Zeroed | None:
        """The rows that become zero, where that is all that happens to the tensor and they are cut in a default way."""
        cuts = {layer.default_cut for _, parts in self.steps for layer, _, _ in parts}
        if len(cuts) != 1 or None in cuts or any(type(edit) is not ZeroOut for edit, _ in self.steps):
            return None
        rows = {row for _, parts in self.steps for _, index, _ in parts for row in index.tolist()}
        return Zeroed(cuts.pop(), tuple(sorted(rows)))  # type: ignore[arg-type]  # not None

    @property
    def identity(self) -> Hashable:
        """What two plans of the same model share exactly if they do the same to the tensor, as far as edits tell."""
        return self.zeroed or tuple(edit for edit, _ in self.steps)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the edited tensor: the same shape, dtype and strides, all other rows bit for bit as they were.

        One that is spread over processes is gathered, edited and spread again.
        """
        if is_spread(weight):
            return spread_like(self(whole(weight)), weight)
        edited, device = weight, weight.device
        for edit, parts in self.steps:
            edited = edited_weight(edit, [_on_device(part, device) for part in parts], edited)
        return edited


def _on_device(part: Part, device: torch.device) -> Part:
    """Return a part where the weight is: a copy of a view may have gone to another device, and took none along."""
    layer, index, constants = part
    return (layer, index.to(device), None if constants is None else constants.to(device))


PARAMS = "params are a mapping name -> tensor, not a {}: give dict(model.named_parameters())"


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """An edit as a pure function of a model's tensors: see `plan`.

    Attributes:
        edit: what is done.
        tensors: what is done to each edited tensor, by its first name in the model.
    """

    edit: Edit
    tensors: Mapping[str, TensorPlan]

    def __call__(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the edited tensors alone, by the names that `params` has for them.

        Args:
            params: tensors by name, as `named_parameters()` gives them, with the prefixes of wrappers or without; those
                that the edit does not touch are ignored.

        Raises:
            TypeError: if `params` is no mapping.
            KeyError: if an edited tensor is missing; lists all.
            ValueError: if one has another shape than the model's; lists all.
        """
        checked(params, Mapping, PARAMS)
        found = {name: _names_of(tensor, params) for name, tensor in self.tensors.items()}
        missing = [name for name, names in found.items() if not names]
        if missing:
            raise KeyError(f"params lack {len(missing)} of the tensors that the edit changes: {inline(missing)}")
        wrong = [
            f"{names[0]}: expected shape {self.tensors[name].shape}, given {tuple(params[names[0]].shape)}"
            for name, names in found.items()
            if tuple(params[names[0]].shape) != self.tensors[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the tensors have another shape than the model's:\n{listed(wrong)}\nGive the tensors "
                f"of this model; for a stack of them use torch.func.vmap"
            )
        return {
            known: value
            for name, names in found.items()
            for value in [self.tensors[name](params[names[0]])]
            for known in names
        }

    def __repr__(self) -> str:
        return f"plan of {self.edit!r}"


class Edited(Mapping[str, Tensor]):
    """The edited tensors of one edit, computed when they are looked up: hundreds of edits are never held at once.

    Attributes:
        plans: what is done to each tensor, by its first name.
        zeroed: the rows of each tensor that become zero, for the tensors with which nothing else happens.
        identities: what says which tensors of two edits of a model become the same.
    """

    def __init__(self, planned: Plan, weights: Mapping[str, Tensor]) -> None:
        self.plans = planned.tensors
        self.zeroed = {name: zeroed for name, own in self.plans.items() if (zeroed := own.zeroed) is not None}
        self.identities = {name: own.identity for name, own in self.plans.items()}
        self._weights = weights

    @override
    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self.plans[name](self._weights[name])

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    @override
    def __len__(self) -> int:
        return len(self.plans)


def _names_of(tensor: TensorPlan, params: Mapping[str, Tensor]) -> list[str]:
    """Return the names that a mapping has for a tensor: each of its own, or else the one with wrappers' prefixes."""
    names = [name for name in tensor.names if name in params]
    return names or [name for name in same_names([tensor.name], params).values() if name is not None]


@restoring
@torch.inference_mode(mode=False)  # what it makes outlives the caller's mode
def plan(edit: Edit, model: nn.Module | Survey) -> Plan:
    """Return an edit as a pure function of a model's tensors: params -> the edited ones alone, by name.

    Everything is checked here, and draws are made once. The function is differentiable: `torch.func.grad`, `vmap` and
    `functional_call` go through it, and a gradient to the tensors reaches every entry that the edit keeps or scales.

    Args:
        edit: what to do.
        model: any module (or a survey of it); not changed, and not kept.

    Returns:
        A function of a mapping name -> tensor, whose result has the edited tensors' names in that mapping.

    Raises:
        TypeError: if `edit` is not an edit or `model` not a module.
        ValueError: if the edit does not fit the model; lists every mismatch.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 3)
        >>> cut = plan(zero_out(select(find_layout(model), {"weight": 1})), model)
        >>> params = dict(model.named_parameters())
        >>> list(cut(params)), cut(params)["weight"][1].tolist()
        (['weight'], [0.0, 0.0])
        >>> def output(params):
        ...     return torch.func.functional_call(model, {**params, **cut(params)}, torch.ones(2)).sum()
        >>> torch.func.grad(output)(params)["weight"]
        tensor([[1., 1.],
                [0., 0.],
                [1., 1.]])
    """
    surveyed = survey(model)
    steps = leaves(edit)
    layers = list(dict.fromkeys(layer for leaf in steps for layer in leaf.neurons.by_layer()))
    found = surveyed.first_names(layer.parameter for layer in layers)
    computed = any(surveyed.tensors[name].parametrized for name in found.values())
    refuse_unfit(layers, surveyed, readable(surveyed) if computed else None, "the neurons do not fit the model")
    planned: dict[str, list[tuple[Edit, tuple[Part, ...]]]] = {}
    for leaf in steps:
        parts: dict[str, list[Part]] = {}
        for layer, indices in leaf.neurons.by_layer().items():
            tensor = surveyed.tensors[found[layer.parameter]]
            parts.setdefault(tensor.name, []).append(_part(leaf, layer, indices, tensor.parameter.device))
        for name, own in parts.items():
            planned.setdefault(name, []).append((leaf, tuple(own)))
    return Plan(
        edit,
        MappingProxyType(
            {name: _tensor_plan(surveyed.tensors[name], planned[name]) for name in _ordered(planned, surveyed)}
        ),
    )


def _part(edit: Edit, layer: Layer, indices: tuple[int, ...], device: torch.device) -> Part:
    constants = edit.constants(layer, indices)
    return layer, torch.tensor(indices, device=device), None if constants is None else constants.to(device)


def _ordered(names: Mapping[str, Any], surveyed: Survey) -> list[str]:
    return sorted(names, key=lambda name: surveyed.tensors[name].position)


def _tensor_plan(tensor: SurveyedTensor, steps: list[tuple[Edit, tuple[Part, ...]]]) -> TensorPlan:
    return TensorPlan(
        tensor.name, (tensor.name, *tensor.aliases), tuple(steps), tensor.parametrized and tensor.trainable
    )
