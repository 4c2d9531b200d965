"""One survey of a model: its tensors under all their names, what holds them, what cannot be read.

Everything that looks at a model's structure looks at a `Survey`. It is made once for each call of a public function,
and changes nothing: a parametrized tensor, a property that is computed at every access by a forward pass which may
change buffers (spectral norm's power iteration in training mode), is named here and computed in `copies`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list
from torch.nn.utils.parametrize import is_parametrized

from neuronsurgery.caches import computed_attributes
from neuronsurgery.errors import inline, listed
from neuronsurgery.gathering import GATHERED, Gathered, Policy, policy_of, reshard
from neuronsurgery.habits import given_to
from neuronsurgery.objects import held_by_functions, tensors_in_attributes
from neuronsurgery.parametrized import originals, parametrizations, tensor_attributes
from neuronsurgery.spread import is_one_way, is_spread, unreadable_spread
from neuronsurgery.wrappers import is_a, name_within, same_names, unwrap

HOOKED = (
    ("WeightNorm", "torch.nn.utils.weight_norm", "name", "torch.nn.utils.parametrizations.weight_norm"),
    ("SpectralNorm", "torch.nn.utils.spectral_norm", "name", "torch.nn.utils.parametrizations.spectral_norm"),
    (
        *("BasePruningMethod", "torch.nn.utils.prune", "_tensor_name"),
        "torch.nn.utils.prune.remove(module, name), which makes the pruning permanent, or zero_out",
    ),
)
"""Hooks that compute another tensor from this one, where they keep its name, and what to use in their place."""

SHARDED = (
    "{} of the model's tensors are sharded over processes: {}. What works on parts is scores of gradients, magnitudes, "
    "effects by zeroing, hard_batch, evaluate, sweep, judge, find_critical(edits='zero') and apply: for anything else "
    "use the model as it was before fully_shard or parallelize_module"
)

OFFLOADED = (
    "offloaded by accelerate, here only while its module runs; give every module a device that it stays on "
    "(device_map=), or shard the model over processes with fully_shard"
)


# The survey


class Use(NamedTuple):
    """A module that holds a tensor, the attribute it holds it by, and one path to it in a copy of the model."""

    module: nn.Module
    attribute: str
    path: str


@dataclass(frozen=True, eq=False)
class SurveyedTensor:
    """A parameter, or the tensor that a parametrization computes, under every name it has in the bare model.

    Attributes:
        name: the first name in the order of `named_parameters()`.
        aliases: its other names.
        uses: what holds it, each module and attribute once. Parameters that lie in the same memory in the same way
            are one tensor.
        position: its place among the model's tensors.
        parametrized: whether it is computed by a parametrization.
        hooked: what to use in the place of an old hook that computes another tensor from this one, or "".
        overlapped: the name of another tensor that lies in the same memory in another way (a transpose), or "".
    """

    name: str
    aliases: tuple[str, ...]
    uses: tuple[Use, ...]
    position: int
    parametrized: bool
    hooked: str
    overlapped: str

    @property
    def parameter(self) -> Tensor:
        """The tensor itself; of a parametrized one its first original, since computing it may change buffers."""
        use = self.uses[0]
        if self.parametrized:
            return originals(use.module, use.attribute)[0]
        return use.module._parameters[use.attribute]  # type: ignore[return-value]  # None entries are never named

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that hold it: several where they share one memory."""
        if self.parametrized:
            return (self.parameter,)
        return tuple(use.module._parameters[use.attribute] for use in self.uses)  # type: ignore[misc]  # none is None

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient, or one of the tensors that a parametrization computes it from does."""
        use = self.uses[0]
        held = originals(use.module, use.attribute) if self.parametrized else [self.parameter]
        return any(original.requires_grad for original in held)


@dataclass(frozen=True, eq=False)
class Survey:
    """A model's structure as it was found; nothing in it is computed later.

    Attributes:
        model: the model without the wrappers around it.
        tensors: its tensors by first name, in the order of `named_parameters()`.
        names: every name of a tensor -> its first name.
        modules: its modules and their names, parametrizations too, wrappers taken off.
        gathered: of the tensors that FSDP shards, by first name, how they become whole.
    """

    model: nn.Module
    tensors: Mapping[str, SurveyedTensor]
    names: Mapping[str, str]
    modules: Mapping[nn.Module, str]
    gathered: Mapping[str, Gathered]

    @property
    def is_spread(self) -> bool:
        """Whether some of its tensors are spread over processes."""
        return any(is_spread(tensor.parameter) for tensor in self.tensors.values())

    def ways(self) -> Iterator[tuple[nn.Module, str, Gathered]]:
        """Yield every module and attribute that holds a tensor which FSDP shards, and how that becomes whole."""
        for name, way in self.gathered.items():
            for module, attribute, _ in self.tensors[name].uses:
                yield module, attribute, way

    @property
    def device(self) -> torch.device | None:
        """The device of the model's first parameter, or None where it has none."""
        first = next(self.model.parameters(), None)
        return None if first is None else first.device

    def first_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the first name of each tensor that some names mean, wrappers' prefixes understood; no unknown ones."""
        return {name: self.names[known] for name, known in same_names(names, self.names).items() if known is not None}


def survey(model: nn.Module | Survey) -> Survey:
    """Return the survey of a model, or the survey itself where it is given one.

    Wrappers inside the model and the suffixes of parametrizations never show in names; a tensor of a parametrized
    module is there under its plain name.

    Raises:
        TypeError: if it is given something else, or the model or a part of it is compiled TorchScript.
    """
    if isinstance(model, Survey):
        return model
    root = unwrap(model)
    modules: dict[nn.Module, str] = {}
    for prefix, module in _all_modules(root):
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"module '{prefix.removesuffix('.') or type(module).__name__}' is a compiled TorchScript module, whose "
                f"weights cannot be shared with a copy: give the model as it was before torch.jit.script or "
                f"torch.jit.trace"
            )
        modules.setdefault(module, prefix.removesuffix("."))
    reshard(modules)
    found = _found(root)
    overlapped = _overlapped(found)
    tensors = {}
    for position, entry in enumerate(found.values()):
        first = next(iter(entry.uses.values()))
        tensors[entry.names[0]] = SurveyedTensor(
            entry.names[0],
            tuple(entry.names[1:]),
            tuple(entry.uses.values()),
            position,
            is_parametrized(first.module, first.attribute),
            next(filter(None, map(_old_hook, entry.uses.values())), ""),
            overlapped.get(entry.names[0], ""),
        )
    names = {alias: name for name, tensor in tensors.items() for alias in (name, *tensor.aliases)}
    gathered = _gathered(root, tensors.values())
    return Survey(
        root, MappingProxyType(tensors), MappingProxyType(names), MappingProxyType(modules), MappingProxyType(gathered)
    )


class _Found(NamedTuple):
    """The names and uses of one tensor, as they are met."""

    names: list[str]
    uses: dict[tuple[int, str], Use]


def _found(root: nn.Module) -> dict[Any, _Found]:
    """Return the names and uses of every tensor, by what makes two tensors one."""
    found: dict[Any, _Found] = {}
    taken: set[str] = set()
    for prefix, path, module in _walk(root):
        for attribute in tensor_attributes(module):
            entry = found.setdefault(_identity(module, attribute), _Found([], {}))
            # Within an adapter two tensors may come to one name; then the later one is named by its whole path.
            name = f"{prefix}{attribute}" if f"{prefix}{attribute}" not in taken else f"{path}{attribute}"
            taken.add(name)
            entry.names.append(name)
            entry.uses.setdefault((id(module), attribute), Use(module, attribute, f"{path}{attribute}"))
    return found


def _identity(module: nn.Module, attribute: str) -> Any:
    """Return a key that two tensors share exactly if they are tied: one object, or the same memory in the same way."""
    if is_parametrized(module, attribute):
        # A view of a tied weight keeps the tie: its uses share one list of parametrizations.
        return id(parametrizations(module)[attribute])
    parameter = module._parameters[attribute]
    assert parameter is not None  # None entries are never named
    memory = _memory(parameter)
    return id(parameter) if memory is None else (*memory, parameter.shape, parameter.stride(), parameter.dtype)


def _memory(parameter: Tensor) -> tuple[str, int] | None:
    """Return where a plain, dense tensor lies; None for any other, and for an empty one."""
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.is_meta or parameter.layout != torch.strided:
        return None
    return (str(parameter.device), parameter.data_ptr()) if parameter.numel() else None


def _overlapped(found: Mapping[Any, _Found]) -> dict[str, str]:
    """Return for each tensor that begins in the memory of another one, but is cut otherwise, the name of that one."""
    at: dict[Any, list[str]] = {}
    for key, entry in found.items():
        if isinstance(key, tuple):
            at.setdefault(key[:2], []).append(entry.names[0])
    return {
        name: next(other for other in names if other != name)
        for names in at.values()
        if len(names) > 1
        for name in names
    }


def _walk(model: nn.Module, name: str = "", path: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (prefix of names, prefix of paths, module) for every path to a module, parametrizations left out."""
    yield name, path, model
    for key, child in model._modules.items():
        if child is not None and not (key == "parametrizations" and is_parametrized(model)):
            yield from _walk(unwrap(child), f"{name}{name_within(model, key)}", f"{path}{key}.")


def _all_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix, module) for every path to a module, wrappers taken off, parametrizations too."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _all_modules(unwrap(child), f"{prefix}{name}.")


def _old_hook(use: Use) -> str:
    """Return what to use in the place of an old hook that computes another tensor from this one, or ""."""
    plain = use.attribute.removesuffix("_g").removesuffix("_v").removesuffix("_orig")
    for hook in use.module._forward_pre_hooks.values():
        for kind, module, attribute, instead in HOOKED:
            if is_a(hook, kind, module) and getattr(hook, attribute, None) == plain:
                return instead
    return ""


def _gathered(root: nn.Module, tensors: Iterable[SurveyedTensor]) -> dict[str, Gathered]:
    """Return how each tensor that FSDP shards becomes whole, by its first name; that of a view goes on as it does."""
    policies = dict(_policies(root, None))
    found = {}
    for tensor in tensors:
        use = tensor.uses[0]
        known = vars(use.module).get(GATHERED, {}).get(use.attribute)
        policy = policies.get(use.module)
        if known is not None:
            found[tensor.name] = known
        elif policy is not None and is_spread(tensor.parameter):
            found[tensor.name] = Gathered(tensor.position, policy.param_dtype, policy.reduce_dtype)
    return found


def _policies(module: nn.Module, around: Policy | None) -> Iterator[tuple[nn.Module, Policy | None]]:
    """Yield every module with the policy of the innermost module around it that FSDP shards."""
    own = policy_of(module) or around
    yield module, own
    for child in module._modules.values():
        if child is not None:
            yield from _policies(unwrap(child), own)


# What is refused


def refuse_unsupported(tensors: Iterable[SurveyedTensor]) -> None:
    """Raise one error that lists every tensor the library cannot read or edit, with the reason.

    Raises:
        ValueError: if a tensor is on the meta device, not yet initialised, quantised, in a dtype of 8 bits, sharded,
            complex, owned by an old weight-norm hook, or in the memory of another one.
    """
    _refuse(
        [f"{tensor.name}: {reason}" for tensor in tensors if (reason := _unsupported(tensor))],
        "Give a model with plain floating-point parameters on a real device, or leave these out with where=",
    )


HERE = "Give a model that is here as a whole: load what is offloaded, gather what is sharded"


def refuse_unrunnable(surveyed: Survey, *, spread: bool = False) -> None:
    """Raise one error that lists every tensor without which the model cannot run here, with the reason.

    Args:
        surveyed: the model.
        spread: whether it may be spread over processes.

    Raises:
        ValueError: if a tensor is on the meta device, or sharded, though it must not or in a way that cannot be read.
    """
    held = {name: (tensor.uses[0].module, tensor.parameter) for name, tensor in surveyed.tensors.items()} | {
        f"{path}.{attribute}".removeprefix("."): (module, buffer)
        for module, path in surveyed.modules.items()
        for attribute, buffer in module._buffers.items()
        if buffer is not None
    }
    _refuse([f"{name}: {reason}" for name, (at, tensor) in held.items() if (reason := _absent(at, tensor))], HERE)
    if not spread:
        refuse_spread({name: tensor for name, (_, tensor) in held.items()})
    refuse_ungatherable(surveyed)


def refuse_spread(tensors: Mapping[str, Tensor]) -> None:
    """Raise if some tensors are spread over processes; says what works with these.

    Raises:
        ValueError: if there are any.
    """
    sharded = [name for name, tensor in tensors.items() if is_spread(tensor)]
    if sharded:
        raise ValueError(SHARDED.format(len(sharded), inline(sharded)))


def refuse_ungatherable(surveyed: Survey) -> None:
    """Raise one error that lists every tensor that FSDP shards in a way that a copy cannot gather, with the reason.

    Raises:
        ValueError: if there is one.
    """
    found = {
        path or "the model": "sharded by FullyShardedDataParallel (FSDP1); use fully_shard (FSDP2)"
        for module, path in surveyed.modules.items()
        if is_a(module, "FullyShardedDataParallel", "torch.distributed.fsdp")
    }
    weights: dict[str, Any] = {name: surveyed.tensors[name].parameter for name in surveyed.gathered}
    meshes = {weight.device_mesh for weight in weights.values()}
    for name, weight in weights.items():
        if len(meshes) > 1:
            found[name] = "sharded over a mesh where others are over another one; use one mesh for all"
        elif not is_one_way(weight):
            found[name] = "sharded over several dimensions of a mesh; use one, or one and replicas"
        elif weight.device.type != weight.device_mesh.device_type:
            found[name] = "offloaded by FSDP (CPUOffloadPolicy); shard it without"
        elif surveyed.tensors[name].parametrized:
            found[name] = "sharded and parametrized; remove the parametrization before fully_shard"
    _refuse([f"{name}: {reason}" for name, reason in found.items()], HERE)


def _refuse(wrong: Sequence[str], instead: str) -> None:
    if wrong:
        raise ValueError(f"{len(wrong)} of the model's tensors cannot be read or edited:\n{listed(wrong)}\n{instead}")


def _absent(module: nn.Module, tensor: Tensor) -> str:
    """Return why the values of a tensor that a module holds are not here, or ""."""
    if tensor.is_meta and not isinstance(tensor, UninitializedTensorMixin):
        if is_a(getattr(module, "_hf_hook", None), "ModelHook", "accelerate.hooks"):
            return OFFLOADED
        return "on the meta device, so it has no values; load the weights first"
    return unreadable_spread(tensor)


def _unsupported(tensor: SurveyedTensor) -> str:
    parameter = tensor.parameter
    if tensor.hooked:
        return f"only what a hook computes another tensor from before each forward; use {tensor.hooked}"
    if tensor.overlapped:
        return (
            f"in the same memory as {tensor.overlapped}, but cut in another way (a transpose?), where an edit would "
            f"not reach it; give it memory of its own, or tie the two as one parameter"
        )
    if isinstance(parameter, UninitializedTensorMixin):
        return "not yet initialised (a lazy module); run the model on one batch first"
    if reason := _absent(tensor.uses[0].module, parameter):
        return reason
    if not is_spread(parameter) and (
        parameter.is_quantized or type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return f"quantised or otherwise packed ({type(parameter).__name__}); dequantise it first"
    if not parameter.dtype.is_floating_point:
        return f"of dtype {str(parameter.dtype).removeprefix('torch.')}; only real floating-point weights have neurons"
    if parameter.dtype.itemsize < 2:
        return (
            f"of dtype {str(parameter.dtype).removeprefix('torch.')}, too narrow to compute in; use bfloat16 or wider"
        )
    return ""


def held_elsewhere(surveyed: Survey) -> dict[str, str]:
    """Return the parameters that a plain attribute of a module holds too, by name, and the module in words.

    What computes with such an attribute sees neither an edit of a view nor a tensor that `functional_call` puts in the
    parameter's place.
    """
    names = {id(held): name for name, tensor in surveyed.tensors.items() for held in tensor.parameters}
    modules = {id(module): None for module in surveyed.modules}
    held: dict[str, str] = {}
    for module, path in surveyed.modules.items():
        if isinstance(module, nn.RNNBase):
            continue  # its flat list of weights is brought up to date at every forward pass
        for tensor in itertools.chain(tensors_in_attributes(module, modules), held_by_functions(module)):
            if id(tensor) in names:
                held.setdefault(names[id(tensor)], f"module '{path}' ({type(module).__name__})")
    return held


def computed_elsewhere(surveyed: Survey) -> dict[str, str]:
    """Return the parameters that a plain attribute may have been computed from, by name, and the attribute in words.

    These are the parameters within the module that has the attribute. An attribute that can be computed anew is none:
    in a copy it is blank.
    """
    known = given_to(surveyed.modules)
    found: dict[str, str] = {}
    for module, path in surveyed.modules.items():
        attributes = computed_attributes(module, known)
        if attributes:
            prefix = f"{path}." if path else ""
            where = f"{inline(map(repr, attributes))} of module '{path}' ({type(module).__name__})"
            within = [t.name for t in surveyed.tensors.values() if any(use.path.startswith(prefix) for use in t.uses)]
            found |= {name: where for name in within if name not in found}
    return found
