"""What a loader yields: batches, and their examples taken apart and joined again.

What it yields is unpacked in one place, `unpack_batch`, into a `Batch`; everything else in the library sees only that.
A batch is a tree of tensors in one sense everywhere, that of `map_tensors`.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from neuronsurgery.digests import digest
from neuronsurgery.errors import checked, checked_function
from neuronsurgery.objects import tensors_within
from neuronsurgery.types import Group

TARGET_KEYS = ("labels", "label", "targets", "y")
GROUP_KEYS = ("groups", "group", "g")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: the arguments of one call of the model, with a target and perhaps a group per example.

    Tensors (also nested in tuples, lists and mappings) whose first dimension equals the number of targets are per
    example; anything else is passed to the model as it is.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: one target per example, shape (n, ...); unsigned integers become int64.
        groups: one group per example (n integers or strings), or None.
        indices: the place of each example in a data set (n integers), or None. A `Sweep` keeps them.

    Raises:
        TypeError: if `args` is not a tuple, `kwargs` not a mapping, or `targets` are no numbers.
        ValueError: if `targets` has no first dimension or is nested, or `groups` or `indices` have another length.

    Example:
        >>> batch = Batch((torch.zeros(2, 3),), {}, torch.tensor([0, 1]), torch.tensor([0, 3]))
        >>> batch
        Batch(2 examples, args=[2x3 float32], groups 0 3)
        >>> batch.groups
        (0, 3)
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Tensor
    groups: tuple[Group, ...] | None = None
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.args, tuple) or not isinstance(self.kwargs, Mapping):
            raise TypeError(
                f"Batch takes a tuple of positional and a mapping of keyword arguments of the model, not "
                f"{type(self.args).__name__} and {type(self.kwargs).__name__}: write Batch((inputs,), {{}}, targets)"
            )
        targets = _as_targets(self.targets)
        if targets.dim() == 0:
            raise ValueError("targets are one per example, shape (n, ...), not a single number: stack them")
        object.__setattr__(self, "targets", targets)
        if self.groups is not None:
            groups = group_names(self.groups)
            if len(groups) != len(targets):
                raise ValueError(f"{len(groups)} groups for {len(targets)} targets: give one group per example")
            object.__setattr__(self, "groups", groups)
        if self.indices is not None:
            indices = tuple(int(index) for index in self.indices)
            if len(indices) != len(targets):
                raise ValueError(f"{len(indices)} indices for {len(targets)} targets: give one index per example")
            object.__setattr__(self, "indices", indices)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        shown = [_describe(value) for value in self.args]
        text = f"Batch({len(self)} examples, args=[{', '.join(shown)}]"
        if self.kwargs:
            text += ", kwargs={" + ", ".join(f"{key}: {_describe(value)}" for key, value in self.kwargs.items()) + "}"
        if self.groups is not None:
            text += f", groups {' '.join(map(str, ordered_groups(self.groups)))}"
        return text + ")"


Unpack: TypeAlias = Callable[[Any], Batch]
"""What a loader yields -> `Batch`."""


def _as_targets(given: Any) -> Tensor:
    """Return targets as a dense tensor, in a dtype that can be compared and indexed."""
    if not isinstance(given, Tensor):
        try:
            # Not moved to a default device that the caller may have set.
            given = torch.as_tensor(given, device="cpu")
        except Exception as error:
            raise TypeError(
                f"targets are a tensor or numbers, one per example, not {_form(given)}: pass unpack=, a function batch "
                f"-> Batch that says what of it is the target"
            ) from error
    if not is_dense(given):
        raise ValueError(
            f"targets are a dense tensor, not {_form(given)}: pad them (torch.nested.to_padded_tensor) or make them "
            f"dense (to_dense) in the loader, or pass unpack="
        )
    return signed(given)


def signed(targets: Tensor) -> Tensor:
    """Return unsigned integers as int64, since torch computes little with them, and anything else as it is."""
    dtype = targets.dtype
    return targets.long() if not (dtype.is_signed or dtype == torch.bool) else targets


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is neither sparse nor nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


def _form(value: Any) -> str:
    """Return what a value is, in words: "a list of dict"."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
    inner = sorted({type(entry).__name__ for entry in value}) if isinstance(value, tuple | list) else ()
    return f"a {type(value).__name__}" + (f" of {', '.join(inner)}" if inner else "")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor) and not is_dense(value):
        return _form(value).removeprefix("a ")
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


# Groups


def group_names(groups: Any) -> tuple[Group, ...]:
    """Return the groups of a batch as Python integers or strings, whatever container they came in.

    Raises:
        TypeError: if a group is neither an integer nor a string.
    """
    if isinstance(groups, Tensor | np.ndarray):
        groups = groups.tolist()
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups are one integer or string per example, not a {type(groups).__name__}")
    if set(map(type, groups)) <= {int, str}:  # as they nearly always are, and there may be many
        return tuple(groups)
    names: tuple[Any, ...] = tuple(g.item() if isinstance(g, Tensor | np.generic) else g for g in groups)
    wrong = sorted({type(name).__name__ for name in names if not isinstance(name, int | str) or isinstance(name, bool)})
    if wrong:
        raise TypeError(
            f"groups are integers or strings, not {', '.join(wrong)}: convert them, e.g. groups.long(), or where they "
            f"are no groups pass unpack="
        )
    return names


def ordered_groups(groups: Iterable[Group]) -> list[Group]:
    """Return the distinct groups in ascending order, integers before strings."""
    return sorted(set(groups), key=lambda group: (isinstance(group, str), group))


def group_members(groups: Iterable[Group]) -> dict[Group, list[int]]:
    """Return the positions of each group's examples in a batch, groups in the order of their first example."""
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


# Unpacking


def unpack_batch(raw: Any, unpack: Unpack | None = None, *, grouped: bool = True) -> Batch:
    """Return what a loader yielded as a `Batch`.

    Understood are a `Batch`; `(inputs, targets)` and `(inputs, targets, groups)`, with `inputs` a tensor, a tuple or
    list (positional arguments) or a mapping (keyword arguments); and a mapping with `labels` (or `label`, `targets`,
    `y`), perhaps `groups` (or `group`, `g`), whose other entries are the model's keyword arguments. Inputs in a named
    tuple, a `PackedSequence` too, are one argument.

    Args:
        raw: what the loader yielded.
        unpack: the caller's own function raw -> Batch for any other form.
        grouped: whether groups are wanted; if not, what stands in their place is not looked at.

    Returns:
        The batch. Containers of `raw` are never changed.

    Raises:
        TypeError: if the form is unknown or `unpack` returns something else than a Batch.
        ValueError: if a mapping has no targets or more than one entry that could be.
    """
    if unpack is not None:
        batch = unpack(raw)
        if not isinstance(batch, Batch):
            raise TypeError(f"unpack must return a neuronsurgery.Batch, not a {type(batch).__name__}")
        return batch
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        return _unpack_mapping(raw, GROUP_KEYS, grouped)
    if isinstance(raw, tuple | list) and len(raw) in (2, 3) and not _names_another_order(raw):
        inputs, targets = raw[0], raw[1]
        groups = raw[2] if len(raw) == 3 and grouped else None
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets, groups)
        several = isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields")
        return Batch(tuple(inputs) if several else (inputs,), {}, targets, groups)
    form = type(raw).__name__ + (f" of {len(raw)}" if isinstance(raw, tuple | list) else "")
    raise TypeError(
        f"a loader yielded a {form}; understood are (inputs, targets), (inputs, targets, groups), a mapping with "
        f"'labels', and neuronsurgery.Batch. For any other form pass unpack=, a function batch -> Batch"
    )


def _names_another_order(raw: Any) -> bool:
    """Return whether a named tuple says that its second is no target, or its third no group."""
    places = dict.fromkeys(TARGET_KEYS, 1) | dict.fromkeys(GROUP_KEYS, 2)
    return any(places.get(name, place) != place for place, name in enumerate(getattr(raw, "_fields", ())))


def _unpack_mapping(raw: Mapping[Any, Any], known: Sequence[str], grouped: bool = True) -> Batch:
    target_keys = [key for key in TARGET_KEYS if key in raw]
    group_keys = [key for key in known if key in raw]
    if len(target_keys) != 1 or (len(group_keys) > 1 and grouped):
        raise ValueError(
            f"a mapping batch needs exactly one of {TARGET_KEYS} and at most one of {GROUP_KEYS}; this one has the "
            f"keys {sorted(map(str, raw))}. Rename them, or pass unpack=, a function batch -> Batch"
        )
    named = (*target_keys, *group_keys)
    kwargs = {str(key): value for key, value in raw.items() if key not in named}
    return Batch((), kwargs, raw[target_keys[0]], raw[group_keys[0]] if group_keys and grouped else None)


def by_key(unpack: Unpack | None, group_key: str | None) -> Unpack | None:
    """Return how to unpack batches that are mappings, or whose inputs are, with their groups under a key.

    Args:
        unpack: what the caller passed as `unpack`; returned as it is where there is no key.
        group_key: the key, or None.

    Raises:
        TypeError: if both are given, or one is of another kind.
    """
    checked_function(unpack, "unpack")
    if group_key is None:
        return unpack
    if unpack is not None:
        raise TypeError("unpack= says the groups already: give it or group_key=, not both")
    return functools.partial(_unpack_by_key, checked(group_key, str, "group_key= is the name of an entry, not a {}"))


def _unpack_by_key(group_key: str, raw: Any) -> Batch:
    inputs = raw[0] if isinstance(raw, tuple | list) and len(raw) in (2, 3) else raw
    if not isinstance(inputs, Mapping):
        raise TypeError(f"group_key={group_key!r} is for batches that are mappings, not for a {_form(raw)[2:]}")
    if group_key not in inputs:
        raise KeyError(f"a batch has no {group_key!r}, which group_key= names; its keys are {sorted(map(str, inputs))}")
    if inputs is raw:
        return _unpack_mapping(raw, (group_key,))
    return Batch((), {str(key): inputs[key] for key in inputs if key != group_key}, raw[1], inputs[group_key])


# Batches as trees of tensors


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a value with every tensor in it replaced by `function(tensor)`; the value itself is not changed.

    Containers are those that torch's pytree knows: tuples (named ones too), lists, dictionaries and what was registered
    there. Any other object that holds tensors is deep-copied around the new ones, so that it arrives as what it was: a
    dataclass, a cache, a graph. An object in two places stays one object. The batch sizes of a `PackedSequence` stay on
    the CPU.
    """
    leaves, structure = pytree.tree_flatten(value, is_leaf=_is_packed)
    memo: dict[int, Any] = {}

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if _is_packed(leaf):
            orders = (None if order is None else function(order) for order in leaf[2:])
            return PackedSequence(function(leaf.data), leaf.batch_sizes.clone(), *orders)
        tensors = list(tensors_within([leaf]))
        if not tensors:
            return leaf
        memo.update({id(tensor): function(tensor) for tensor in tensors if id(tensor) not in memo})
        try:
            return copy.deepcopy(leaf, memo)
        except Exception as error:
            raise TypeError(
                f"an input of type {type(leaf).__name__} holds tensors and cannot be copied ({error}), but a model may "
                f"write into its inputs: give what can be copied, with unpack= for instance"
            ) from error

    return pytree.tree_unflatten([replaced(leaf) for leaf in leaves], structure)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def move(batch: Batch, device: torch.device | None) -> Batch:
    """Return the batch with every tensor on a device (None: where it is); what is there already is not copied."""
    if device is None:
        return batch

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    args, kwargs = map_tensors((batch.args, dict(batch.kwargs)), to)
    return Batch(args, kwargs, to(batch.targets), batch.groups, batch.indices)


# Examples taken apart


@dataclass(frozen=True, eq=False)
class Examples:
    """A batch taken apart: which of its tensors are per example stays known, whatever part is taken.

    A part may happen to have as many examples as a tensor of the whole batch has rows; by its shape it could not be
    told any more.

    Attributes:
        leaves: what the arguments of the batch hold, in a fixed order; tensors of the whole batch are copies, since a
            loader may reuse its memory.
        per_example: which of the leaves are tensors with one entry per example.
        structure: what puts the leaves back into (args, kwargs).
        targets: one per example.
        groups: one per example, or None.
        indices: one per example, or None.
    """

    leaves: tuple[Any, ...]
    per_example: tuple[bool, ...]
    structure: pytree.TreeSpec
    targets: Tensor
    groups: tuple[Group, ...] | None
    indices: tuple[int, ...] | None

    @classmethod
    def of(cls, batch: Batch) -> Examples:
        """Return the examples of a batch."""
        leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
        flags = tuple(_is_per_example(leaf, len(batch)) for leaf in leaves)
        kept = (
            leaf.clone() if isinstance(leaf, Tensor) and not flag else leaf
            for leaf, flag in zip(leaves, flags, strict=True)
        )
        return cls(tuple(kept), flags, structure, batch.targets, batch.groups, batch.indices)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self) -> Batch:
        """Return the examples as a batch."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.structure)
        return Batch(args, kwargs, self.targets, self.groups, self.indices)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return some of the examples: a range as a view; else copies, so that a loader may reuse its memory."""
        index = None if isinstance(indices, range) else torch.tensor(indices, device="cpu")

        def pick(tensor: Tensor) -> Tensor:
            if index is None:
                return tensor[indices.start : indices.stop]  # type: ignore[attr-defined]  # a range
            return tensor.index_select(0, index.to(tensor.device))

        pairs = zip(self.leaves, self.per_example, strict=True)
        leaves = tuple(pick(leaf) if flag else leaf for leaf, flag in pairs)
        groups = None if self.groups is None else tuple(self.groups[i] for i in indices)
        own = None if self.indices is None else tuple(self.indices[i] for i in indices)
        return Examples(leaves, self.per_example, self.structure, pick(self.targets), groups, own)


def _is_per_example(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == count


def inseparable(batch: Batch) -> str:
    """Return what in a batch cannot be taken apart into examples, in words, or ""."""
    for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs)), is_leaf=_is_packed):
        if isinstance(leaf, Tensor):
            if not is_dense(leaf) and (leaf.is_nested or _is_per_example(leaf, len(batch))):
                return _form(leaf)
        elif any(True for _ in tensors_within([leaf])):
            return f"a {type(leaf).__name__}"
    return ""


def join(parts: Sequence[Examples]) -> Examples:
    """Return examples of one `signature` together, in order."""
    if len(parts) == 1:
        return parts[0]
    head = parts[0]
    leaves = tuple(
        torch.cat([part.leaves[i] for part in parts]) if flag else head.leaves[i]
        for i, flag in enumerate(head.per_example)
    )
    targets = torch.cat([part.targets for part in parts])
    groups = _chained([part.groups for part in parts])
    return Examples(
        leaves, head.per_example, head.structure, targets, groups, _chained([part.indices for part in parts])
    )


def _chained(parts: Sequence[tuple[T, ...] | None]) -> tuple[T, ...] | None:
    """Return one tuple of some, None where one is missing."""
    known = [part for part in parts if part is not None]
    return tuple(itertools.chain.from_iterable(known)) if len(known) == len(parts) else None


def signature(batch: Batch) -> Hashable:
    """Return a key that two batches share exactly when their examples may be joined into one batch.

    It holds the shape without the first dimension, the dtype and the device of what is per example, and the value of
    everything else.
    """
    leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs), batch.targets))
    return repr(structure), tuple(_kind(leaf, len(batch)) for leaf in leaves)


def _kind(leaf: Any, count: int) -> Hashable:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, Hashable) else ("unhashable", id(leaf))
    if _is_per_example(leaf, count):
        return ("per example", tuple(leaf.shape[1:]), leaf.dtype, leaf.device)
    if leaf.layout != torch.strided:
        return ("sparse", id(leaf))  # its content is not compared
    return (tuple(leaf.shape), leaf.dtype, leaf.device, digest(leaf))
