"""Wrappers and adapters around a model and within it: the modules that they hold, and the names that they change."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPERS = (
    ("_orig_mod", "OptimizedModule", "torch._dynamo.eval_frame"),
    ("_checkpoint_wrapped_module", "ActivationWrapper", "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"),
)
"""Where wrappers hold the module that they run, their classes, and the modules that define these."""

ADAPTERS = (
    ("PeftModel", "peft", "base_model"),
    ("BaseTuner", "peft.tuners.tuners_utils", "model"),
    ("BaseTunerLayer", "peft.tuners.tuners_utils", "base_layer"),
)
"""Classes of adapters, the modules that define them, and the child that adds nothing to names."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that only run it: of DDP, DataParallel, averaging, compiling, checkpointing.

    Raises:
        TypeError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, not a {type(model).__name__}")
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
        return model.module
    for child, kind, module in WRAPPERS:
        if child in model._modules and is_a(model, kind, module):
            return model._modules[child]
    return None


def is_a(value: object, kind: str, module: str) -> bool:
    """Return whether a value is of a class in a module that costs too much to import, or may not be installed.

    Where there is such a value, somebody has imported the module.
    """
    found = getattr(sys.modules.get(module), kind, None)
    return isinstance(found, type) and isinstance(value, found)


def name_within(module: nn.Module, name: str) -> str:
    """Return what a child adds to the names of its tensors: its own name, or nothing within an adapter."""
    transparent = any(name == child and is_a(module, kind, at) for kind, at, child in ADAPTERS)
    return "" if transparent else f"{name}."


def is_checkpointed(module: nn.Module) -> bool:
    """Return whether a module runs again in the backward pass of training, instead of keeping its activations."""
    wrapped = is_a(module, "CheckpointWrapper", WRAPPERS[1][2])
    return wrapped or (is_a(module, "GradientCheckpointingLayer", "transformers.modeling_layers") and _is_on(module))


def _is_on(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


# Fully sharded models

FSDP = "torch.distributed.fsdp"
"""Where `fully_shard` is from."""

FSDP_ATTRIBUTES = ("__composable_api_state_key", "_is_fsdp_managed", "_fsdp_use")
"""What the names of the attributes begin with that it puts into modules."""


def is_fsdp(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on a module."""
    return is_a(module, "FSDPModule", FSDP)


def without_fsdp(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes of a module without the state and the hooks that `fully_shard` has put there."""
    if "_is_fsdp_managed_module" not in attributes:
        return attributes
    return {
        key: OrderedDict((k, hook) for k, hook in value.items() if not _is_of_fsdp(hook))
        if key.endswith("_hooks") and isinstance(value, dict)
        else value
        for key, value in attributes.items()
        if not key.startswith(("__composable_api_state_key", "_is_fsdp_managed", "_fsdp_use"))
        and not _is_of_fsdp(value)
    }


def _is_of_fsdp(value: object) -> bool:
    """Return whether a hook or a replaced method is what `fully_shard` has put there."""
    if not callable(value) or isinstance(value, nn.Module):
        return False
    owner = getattr(value, "__self__", None)
    at = (getattr(value, "__module__", ""), type(owner).__module__)
    return any(str(module).startswith(FSDP) for module in at)


# Names of others


def same_names(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str | None]:
    """Return for each wanted name the one of `names` that is the same but for what wrappers put into it; None if none.

    The very name comes first. Without it, the one name that differs by parts of wrappers only: `module.` of DDP,
    `_orig_mod.` of a compiled module, `_checkpoint_wrapped_module.`, and `base_model.model.` and `base_layer.` of
    adapters. A module of the model's own may be called so, too; where two names fit, none is taken.

    Where none is found at all, the names of a module are understood that has the other as its child: all of those
    wanted differ by the same path in front (the `net.` of a training module), and there is one such path.
    """
    wanted = list(wanted)
    known = names if isinstance(names, Mapping) else dict.fromkeys(names)
    by_plain: dict[str, list[str]] = {}
    found: dict[str, str | None] = {}
    for name in wanted:
        if name in known:
            found[name] = name
            continue
        if not by_plain:
            for other in known:
                by_plain.setdefault(without_wrappers(other), []).append(other)
        fitting = by_plain.get(without_wrappers(name), [])
        found[name] = fitting[0] if len(fitting) == 1 else None
    if found and not any(found.values()) and by_plain.keys().isdisjoint(map(without_wrappers, found)):
        found.update(_by_one_path(list(found), by_plain))
    return found


def _by_one_path(wanted: Sequence[str], by_plain: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the names that differ from those wanted by one path in front, if there is exactly one; else none."""
    plain = [without_wrappers(name) for name in wanted]
    longer = [other.removesuffix(plain[0]) for other in by_plain if other.endswith(f".{plain[0]}")]
    steps = plain[0].split(".")
    shorter = [".".join(steps[:end]) + "." for end in range(1, len(steps))]
    fits = [
        *([path + name for name in plain] for path in longer),
        *([name.removeprefix(path) for name in plain] for path in shorter if all(n.startswith(path) for n in plain)),
    ]
    known = [names for names in fits if all(len(by_plain.get(name, ())) == 1 for name in names)]
    return {name: by_plain[other][0] for name, other in zip(wanted, known[0], strict=True)} if len(known) == 1 else {}


def without_wrappers(name: str) -> str:
    """Return a name without the parts that wrappers and adapters put into it."""
    name = name.removeprefix("base_model.model.")
    own = ("module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer")
    return ".".join(part for part in name.split(".") if part not in own)
