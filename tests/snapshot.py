"""Proof of purity: everything that a function of the library must leave as it was, taken down and compared.

    before = snapshot(model, batches, options)
    ns.apply(edit, model)
    assert_unchanged(before, model, batches, options)

A snapshot is a flat mapping from the name of a fact to the fact. Objects are held, not their ids, so that no id can
be used again while the snapshot lives; tensors are copied.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

Facts = Iterator[tuple[str, object]]
SCALARS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, range, slice)
CACHES = {"__annotations__", "__slotnames__", "__abstractmethods__"}  # Python writes these into a class when asked
MEMBERS = {"_parameters": "parameters", "_buffers": "buffers", "_modules": "modules"}
SHOWN = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Equal to another one only where it holds the very same object."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """A tensor's bytes: NaN equals the same NaN, and -0.0 is not 0.0."""

    value: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and torch.equal(self.value, other.value)

    def __repr__(self) -> str:
        return f"{self.value.numel()} bytes"


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """What `snapshot` saw; to be handed to `assert_unchanged`."""

    facts: Mapping[str, object] = dataclasses.field(repr=False)


def snapshot(model: nn.Module, *containers: Any) -> Snapshot:
    """All that must not change: the model, the caller's containers, the world."""
    with torch.inference_mode(False):  # a view of a parameter with a graph; the caller's mode is read outside
        graph_facts = dict(accumulators(model))
    facts = dict(world()) | dict(members(model)) | dict(modules(model)) | graph_facts
    seen: dict[int, str] = {}
    for i, container in enumerate(containers):
        facts |= dict(content(f"container {i}", container, seen))
    return Snapshot(facts)


def assert_unchanged(before: Snapshot, model: nn.Module, *containers: Any) -> None:
    """Fail with the names of all facts that differ."""
    changes = differences(before, snapshot(model, *containers))
    if changes:
        more = [f"... and {len(changes) - SHOWN} more"] if len(changes) > SHOWN else []
        raise AssertionError("\n  ".join(["changed since the snapshot:", *changes[:SHOWN], *more]))


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """One line for each fact that is another, vanished or appeared."""
    old, new = before.facts, after.facts
    changes = [f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    changes += [f"{name}: gone" for name in topmost([name for name in old if name not in new])]
    return changes + [f"{name}: new" for name in topmost([name for name in new if name not in old])]


def topmost(names: list[str]) -> list[str]:
    """Of a thing that came or went whole, its identity alone."""
    things = [name.removesuffix("identity") for name in names if name.endswith(" identity")]
    return [n for n in names if not any(n.startswith(thing) and n != f"{thing}identity" for thing in things)]


# --- tensors --------------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Bits:
    with torch.no_grad():
        return Bits(tensor.detach().reshape(-1).clone().view(torch.uint8))


def tensor_facts(name: str, tensor: Tensor) -> Facts:
    """Identity, bytes, memory, version, flags, hooks, attributes and `.grad` of one tensor."""
    yield f"{name} identity", Same(tensor)
    yield f"{name} type", Same(type(tensor))
    yield f"{name} bits", bits(tensor)
    yield f"{name} dtype", tensor.dtype
    yield f"{name} device", tensor.device
    yield f"{name} shape", tuple(tensor.shape)
    yield f"{name} strides", (tensor.stride(), tensor.storage_offset())
    yield f"{name} storage", tensor.untyped_storage().data_ptr()
    yield f"{name} requires_grad", tensor.requires_grad
    if not tensor.is_inference():
        yield f"{name} version", tensor._version
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        for key, hook in (getattr(tensor, hooks) or {}).items():
            yield f"{name} {hooks}[{key}]", Same(hook)
    for key, value in vars(tensor).items():
        yield f"{name} attribute {key}", Same(value)
    if tensor.is_leaf or tensor.retains_grad:
        yield f"{name} grad identity", Same(tensor.grad)
        if tensor.grad is not None:
            yield f"{name} grad bits", bits(tensor.grad)


def accumulator(parameter: Tensor) -> object:
    """The node that adds to `.grad`; DDP hangs its hooks on it."""
    with torch.enable_grad():
        view = parameter.view_as(parameter)
    assert view.grad_fn is not None
    return view.grad_fn.next_functions[0][0]


# --- the model ------------------------------------------------------------------------------------------------------


def members(model: nn.Module) -> Facts:
    """Parameters and buffers under each of their names, and the order of these names."""
    kinds = {
        "parameter": dict(model.named_parameters(remove_duplicate=False)),
        "buffer": dict(model.named_buffers(remove_duplicate=False)),
    }
    for kind, named in kinds.items():
        yield f"{kind} order", tuple(named)
        for name, tensor in named.items():
            yield from tensor_facts(f"{kind} {name}", tensor)
    yield "state dict keys", tuple(model.state_dict())


def accumulators(model: nn.Module) -> Facts:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not parameter.is_inference():
            yield f"parameter {name} gradient accumulator", Same(accumulator(parameter))


def modules(model: nn.Module) -> Facts:
    """Every module under each of its names: what it is, its class, its attributes, its hooks."""
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        where = f"module {name or '(root)'}"
        yield f"{where} identity", Same(module)
        yield f"{where} class", Same(type(module))
        yield f"{where} training", module.training
        yield from class_facts(f"{where} class attribute", type(module))
        yield f"{where} attribute names", tuple(vars(module))
        for key, value in vars(module).items():
            if key in MEMBERS:
                yield f"{where} {MEMBERS[key]} dict", Same(value)
                yield f"{where} {MEMBERS[key]} names", tuple(value)
            else:
                yield from content(f"{where} attribute {key}", value, seen)


def class_facts(where: str, cls: type) -> Facts:
    """The class's own attributes: torch puts a property there for each parametrized tensor."""
    for key, value in vars(cls).items():
        if key not in CACHES:
            yield f"{where} {key}", Same(value)


# --- containers -----------------------------------------------------------------------------------------------------


def content(name: str, value: Any, seen: dict[int, str]) -> Facts:
    """Identity and, for what we know how to open, everything inside; scalars by value."""
    if isinstance(value, SCALARS):
        yield name, (type(value).__name__, repr(value))
        return
    yield f"{name} identity", Same(value)
    if id(value) in seen:
        return
    seen[id(value)] = name
    if isinstance(value, Tensor):
        yield from tensor_facts(name, value)
    elif isinstance(value, np.ndarray):
        yield f"{name} bytes", (value.dtype.str, value.shape, value.strides, value.tobytes())
    elif isinstance(value, (set, frozenset)):
        yield f"{name} entries", frozenset(value)
    elif isinstance(value, Mapping):
        yield f"{name} keys", tuple(value)
        for key in value:
            yield from content(f"{name}[{key!r}]", value[key], seen)
    elif isinstance(value, (list, tuple)):
        yield f"{name} length", len(value)
        for i, entry in zip(count(), value, strict=False):
            yield from content(f"{name}[{i}]", entry, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from content(f"{name}.{field.name}", getattr(value, field.name), seen)


# --- the world ------------------------------------------------------------------------------------------------------


def world() -> Facts:
    """Random states, flags and global hooks."""
    yield "random state of torch", Bits(torch.get_rng_state())
    yield "random state of numpy", repr_of_numpy_state()
    yield "random state of python", random.getstate()
    for name, value in torch_flags().items():
        yield f"torch flag {name}", value
    for key, value in vars(torch_module).items():
        if key.startswith("_global") and key.endswith("hooks"):
            yield f"global hooks {key}", tuple(Same(hook) for hook in value.values())


def repr_of_numpy_state() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return (kind, np.asarray(keys).tobytes(), *rest)


def torch_flags() -> dict[str, object]:
    """The process-wide switches that a library may be tempted to flip."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "mha fast path": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill uninitialized memory": torch.utils.deterministic.fill_uninitialized_memory,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math attention": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.enabled,
        "parametrization cache": parametrize._cache_enabled,
    }
