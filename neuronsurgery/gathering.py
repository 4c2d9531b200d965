"""Copies of fully sharded models: each weight is gathered when it is read, and again in the backward pass.

`torch.distributed.fsdp.fully_shard` (FSDP2) changes a model's classes, and its hooks swap its parameters. In a copy all
that is taken off. The copy has the sharded parameters under their own names, and classes whose properties compute the
whole weight from the part: a view of them is edited there, too.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from typing_extensions import override

from neuronsurgery.guards import guard_gathered
from neuronsurgery.serving import Service, current_service, service_of
from neuronsurgery.spread import is_spread, whole
from neuronsurgery.wrappers import is_fsdp

GATHERED = "_neuronsurgery_gathered"
"""Name of the attribute in which a copy's module keeps, by the parameter's name, how it is gathered."""

PLAIN = "_neuronsurgery_plain"
"""Name of the attribute in which a class whose weights are gathered keeps the class that it was made of."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """A weight as a function of its sharded parameter.

    Attributes:
        number: of the parameter in its model.
        param_dtype: of the whole weight, where it is not the parameter's own.
        reduce_dtype: in which gradients are averaged, where it is not their own.
        steps: what is done to the whole weight, from left to right.
    """

    number: int
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def then(self, step: Callable[[Tensor], Tensor]) -> Gathered:
        """Return the same with one more step."""
        return replace(self, steps=(*self.steps, step))

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the whole weight; a gradient to it is averaged over the processes, as FSDP does."""
        service = service_of(self.number, weight)
        value: Tensor = _Whole.apply(weight, self, service)
        if service is None:  # else scores are those of the edited weight, and it is edited already
            value = self.after_steps(value)
        if not torch.is_grad_enabled() and weight.requires_grad:
            value = value.detach().requires_grad_()  # matmul folds its batch otherwise where it is not set
        if not torch.compiler.is_compiling():
            guard_gathered(value)
            _remember(value, _Again(weight.detach(), self, service))
        return value

    def after_steps(self, weight: Tensor) -> Tensor:
        """Return a whole weight after what is done to it."""
        for step in self.steps:
            weight = step(weight)
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Gathered:
        return self


class _Whole(torch.autograd.Function):
    """The whole weight of a sharded parameter, one process's data behind it: its gradient is reduced over all."""

    @staticmethod
    @override
    def forward(ctx: Any, weight: Any, gathered: Gathered, service: Service | None) -> Tensor:
        ctx.gathered, ctx.service = gathered, service
        ctx.like = weight.detach()
        if service is not None:
            return gathered.after_steps(service.weight(gathered.number))
        return whole(ctx.like.to(gathered.param_dtype or weight.dtype))

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if ctx.service is not None:
            ctx.service.gradient(ctx.gathered.number, gradient)
            return None, None, None
        return _averaged(gradient.to(ctx.gathered.reduce_dtype or gradient.dtype), ctx.like), None, None


def _averaged(gradient: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    sums = [Partial()] * like.device_mesh.ndim
    reduced = DTensor.from_local(gradient.contiguous(), like.device_mesh, sums, run_check=False)
    mean: Tensor = reduced.redistribute(placements=like.placements) / like.device_mesh.size()
    return mean.to(like.dtype)


# What a backward pass needs is gathered again


class _Again(NamedTuple):
    """How a whole weight is computed once more."""

    weight: Tensor
    gathered: Gathered
    service: Service | None

    def value(self) -> Tensor:
        with torch.no_grad():
            if self.service is not None:
                return self.gathered.after_steps(self.service.weight(self.gathered.number))
            return self.gathered.after_steps(whole(self.weight.to(self.gathered.param_dtype or self.weight.dtype)))


_ALIVE: dict[int, tuple[weakref.ref[Tensor], _Again]] = {}
"""The whole weights that are in use, by where they lie."""


def _remember(value: Tensor, again: _Again) -> None:
    at = value.untyped_storage().data_ptr()
    _ALIVE[at] = weakref.ref(value, lambda dead: _forget(at, dead)), again


def _forget(at: int, dead: weakref.ref[Tensor]) -> None:
    if at in _ALIVE and _ALIVE[at][0] is dead:
        del _ALIVE[at]


class _Saved(NamedTuple):
    """A whole weight, or a view of it, as autograd saves it: how to have it again."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def value(self) -> Tensor:
        return self.again.value().as_strided(self.size, self.stride, self.offset)


def _save(tensor: Tensor) -> Tensor | _Saved:
    try:
        found = _ALIVE.get(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return tensor
    held = None if found is None else found[0]()
    if found is None or held is None or held.dtype != tensor.dtype:
        return tensor
    return _Saved(found[1], tensor.size(), tensor.stride(), tensor.storage_offset())


def _saved(saved: Tensor | _Saved) -> Tensor:
    return saved.value() if isinstance(saved, _Saved) else saved


# Classes


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a module without what FSDP, or a copy whose weights are gathered, made of it."""
    while (plain := _plainer(kind)) is not None:
        kind = plain
    return kind


def _plainer(kind: Any) -> Any:
    if PLAIN in vars(kind):
        return vars(kind)[PLAIN]
    bases = [base.__name__ for base in kind.__bases__ if base.__module__.startswith("torch.distributed.fsdp")]
    return kind.__mro__[2] if bases == ["FSDPModule"] and kind.__mro__[1] is kind.__bases__[0] else None


@functools.lru_cache(maxsize=1024)
def _gathering_class(kind: Any, attributes: tuple[str, ...], outermost: bool) -> Any:
    namespace: dict[str, Any] = {name: property(functools.partial(_read, name)) for name in attributes}
    namespace |= {PLAIN: kind, "__module__": kind.__module__}
    if outermost:
        namespace["forward"] = _saving_little(kind.forward)
    return type(kind)(kind.__name__, (kind,), namespace)


def _read(name: str, module: nn.Module) -> Tensor:
    parameter = module._parameters.get(name)
    if parameter is None:
        raise AttributeError(name)
    # A plain tensor there was put in its place, for instance by functional_call.
    return vars(module)[GATHERED][name](parameter) if is_spread(parameter) else parameter


def _saving_little(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_save, _saved):
            return forward(*args, **kwargs)

    return run


def gather_in(
    copied: Mapping[nn.Module, nn.Module], model: nn.Module, ways: Iterable[tuple[nn.Module, str, Gathered]]
) -> None:
    """Have the modules of a copy compute the weights that FSDP shards, in the dtypes that it would.

    Args:
        copied: module of the original -> module of the copy.
        model: the original.
        ways: the modules of the original and the names there of the weights, and how they are gathered.
    """
    computed: dict[nn.Module, dict[str, Gathered]] = {}
    for module, attribute, way in ways:
        computed.setdefault(module, {})[attribute] = way
    if not computed:
        return
    for module in {**computed, model: {}}:
        own, new = computed.get(module, {}), copied[module]
        kind: Any = plain_class(type(new))  # a class: mypy does not take those for hashable
        new.__dict__[GATHERED] = own
        new.__class__ = _gathering_class(kind, tuple(own), module is model)
    for module, new in copied.items():
        if (policy := policy_of(module)) is not None:
            cast_as(new, policy)


@contextlib.contextmanager
def edited_in(
    model: nn.Module, places: Mapping[str, Sequence[str]], plans: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Have a copy compute some weights with an edit meanwhile.

    Args:
        model: the copy.
        places: the paths to each weight, by its name.
        plans: whole weight -> edited weight, by name.
    """
    held = [
        (vars(model.get_submodule(path))[GATHERED], attribute, plan)
        for name, plan in plans.items()
        for path, _, attribute in (place.rpartition(".") for place in places[name])
    ]
    before = [(ways, attribute, ways[attribute]) for ways, attribute, _ in held]
    for ways, attribute, plan in held:
        ways[attribute] = ways[attribute].then(plan)
    try:
        yield
    finally:
        for ways, attribute, way in before:
            ways[attribute] = way


def service_for(ways: Mapping[str, Gathered], weights: Mapping[str, Any]) -> Service | None:
    """Return what gives out the weights that FSDP shards, the one that is open if it does; None if there are none.

    Args:
        ways: how each is gathered, by name.
        weights: the sharded parameters, by name.
    """
    if not ways:
        return None
    numbered = {way.number: weights[name] for name, way in ways.items()}
    service = current_service()
    if service is not None and all(service.knows(number, weight) for number, weight in numbered.items()):
        return service  # of a function that this one is called in
    return Service(numbered, {way.number: way.param_dtype for way in ways.values() if way.param_dtype is not None})


# What FSDP is told


class Policy(NamedTuple):
    """In which dtypes a module that FSDP shards computes; None is the parameters' own."""

    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    casts_inputs: bool


def policy_of(module: nn.Module) -> Policy | None:
    """Return in which dtypes a module computes that `fully_shard` was called on; None for any other."""
    if not is_fsdp(module):
        return None
    said = module._get_fsdp_state()._mp_policy  # type: ignore[operator]  # of FSDPModule
    return Policy(said.param_dtype, said.reduce_dtype, said.output_dtype, bool(said.cast_forward_inputs))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have FSDP put the sharded parameters in their places, as it does before it saves them.

    Between two forward passes it may hold whole tensors there, which it takes away again.
    """
    for module in modules:
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]  # of FSDPModule


def cast_as(module: nn.Module, policy: Policy) -> None:
    """Have a copy's module cast its inputs and outputs as FSDP does."""
    if policy.casts_inputs and policy.param_dtype is not None:
        cast = functools.partial(tree_map, functools.partial(_cast, policy.param_dtype))
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (cast(args), cast(kwargs)), prepend=True, with_kwargs=True
        )
    if policy.output_dtype is not None:
        cast_output = functools.partial(tree_map, functools.partial(_cast, policy.output_dtype))
        module.register_forward_hook(lambda _, args, output: cast_output(output))


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and torch.is_floating_point(value) else value
