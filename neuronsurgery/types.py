"""The vocabulary: what a loader yields, what a model returns, and the functions that callers hand in.

A loader is any iterable of batches that can be iterated again. What it yields is unpacked in one place,
`unpack_batch`, into a `Batch`; everything else in the library sees only that.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Group: TypeAlias = int | str
"""The name of a group: a key of the caller's mapping of loaders, or an integer (or string) of a mixed batch."""

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> one loss per example, shape (n,)."""

Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> one value per example, shape (n,)."""

Predict: TypeAlias = Callable[[Any], Tensor]
"""The model's output -> logits whose first dimension is the example."""

Loader: TypeAlias = Iterable[Any]
"""Any iterable of batches."""

Loaders: TypeAlias = Mapping[Any, Loader] | Loader
"""A mapping group -> loader, or one loader of mixed batches that carry a group per example."""

TARGET_KEYS = ("labels", "label", "targets", "y")
GROUP_KEYS = ("groups", "group", "g")
IGNORED_TOKEN = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: the arguments of one call of the model, with a target and perhaps a group per example.

    Tensors (also nested in tuples, lists and mappings) whose first dimension equals the number of targets are per
    example; anything else is passed to the model as it is.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: one target per example, shape (n, ...).
        groups: one group per example (n integers or strings), or None.

    Raises:
        TypeError: if `args` is not a tuple or `kwargs` not a mapping.
        ValueError: if `targets` has no first dimension or `groups` another length.

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

    def __post_init__(self) -> None:
        if not isinstance(self.args, tuple) or not isinstance(self.kwargs, Mapping):
            raise TypeError(
                f"Batch takes a tuple of positional and a mapping of keyword arguments of the model, not "
                f"{type(self.args).__name__} and {type(self.kwargs).__name__}: write Batch((inputs,), {{}}, targets)"
            )
        # Not moved to a default device that the caller may have set.
        targets = self.targets if isinstance(self.targets, Tensor) else torch.as_tensor(self.targets, device="cpu")
        if targets.dim() == 0:
            raise ValueError("targets are one per example, shape (n, ...), not a single number: stack them")
        object.__setattr__(self, "targets", targets)
        if self.groups is not None:
            groups = group_names(self.groups)
            if len(groups) != len(targets):
                raise ValueError(f"{len(groups)} groups for {len(targets)} targets: give one group per example")
            object.__setattr__(self, "groups", groups)

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
"""What a loader yields -> Batch."""


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def group_names(groups: Any) -> tuple[Group, ...]:
    """Return the groups of a batch as Python integers or strings, whatever container they came in.

    Raises:
        TypeError: if a group is neither an integer nor a string.
    """
    if isinstance(groups, Tensor | np.ndarray):
        groups = groups.tolist()
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups are one integer or string per example, not a {type(groups).__name__}")
    names: tuple[Any, ...] = tuple(g.item() if isinstance(g, Tensor | np.generic) else g for g in groups)
    wrong = sorted({type(name).__name__ for name in names if not isinstance(name, int | str) or isinstance(name, bool)})
    if wrong:
        raise TypeError(f"groups are integers or strings, not {', '.join(wrong)}: convert them, e.g. groups.long()")
    return names


def named_loaders(loaders: Loaders) -> Loaders:
    """Return a mapping of loaders with its keys as groups, those of numpy and torch made Python's; others as they are.

    Raises:
        TypeError: if a key is no integer or string.
        ValueError: if two keys come to one name.
    """
    if not isinstance(loaders, Mapping):
        return loaders
    keys = list(loaders)
    try:
        names = group_names(keys)
    except TypeError as error:
        raise TypeError(f"the mapping of loaders: {error}") from error
    if len(set(names)) < len(names):
        raise ValueError(f"two loaders of the mapping have one name: {', '.join(map(repr, names))}")
    return dict(zip(names, loaders.values(), strict=True))


def ordered_groups(groups: Iterable[Group]) -> list[Group]:
    """Return the distinct groups in ascending order, integers before strings."""
    return sorted(set(groups), key=lambda group: (isinstance(group, str), group))


def group_members(groups: Iterable[Group]) -> dict[Group, list[int]]:
    """Return the positions of each group's examples in a batch, groups in the order of their first example."""
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


# What loaders yield


def unpack_batch(raw: Any, unpack: Unpack | None = None) -> Batch:
    """Return what a loader yielded as a `Batch`.

    Understood are a `Batch`; `(inputs, targets)` and `(inputs, targets, groups)`, with `inputs` a tensor, a tuple or
    list (positional arguments) or a mapping (keyword arguments); and a mapping with `labels` (or `label`, `targets`,
    `y`), perhaps `groups` (or `group`, `g`), whose other entries are the model's keyword arguments.

    Args:
        raw: what the loader yielded.
        unpack: the caller's own function raw -> Batch for any other form.

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
        return _unpack_mapping(raw)
    if isinstance(raw, tuple | list) and len(raw) in (2, 3):
        inputs, targets = raw[0], raw[1]
        groups = raw[2] if len(raw) == 3 else None
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets, groups)
        return Batch(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, targets, groups)
    form = type(raw).__name__ + (f" of {len(raw)}" if isinstance(raw, tuple | list) else "")
    raise TypeError(
        f"a loader yielded a {form}; understood are (inputs, targets), (inputs, targets, groups), a mapping with "
        f"'labels', and neuronsurgery.Batch. For any other form pass unpack=, a function batch -> Batch"
    )


def _unpack_mapping(raw: Mapping[Any, Any]) -> Batch:
    target_keys = [key for key in TARGET_KEYS if key in raw]
    group_keys = [key for key in GROUP_KEYS if key in raw]
    if len(target_keys) != 1 or len(group_keys) > 1:
        raise ValueError(
            f"a mapping batch needs exactly one of {TARGET_KEYS} and at most one of {GROUP_KEYS}; this one has the "
            f"keys {sorted(map(str, raw))}. Rename them, or pass unpack=, a function batch -> Batch"
        )
    named = (*target_keys, *group_keys)
    kwargs = {str(key): value for key, value in raw.items() if key not in named}
    return Batch((), kwargs, raw[target_keys[0]], raw[group_keys[0]] if group_keys else None)


def iterate(
    loader: Loader,
    *,
    device: torch.device | None = None,
    unpack: Unpack | None = None,
    progress: str | None = None,
    edits: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of a loader, unpacked and moved to a device, with a line of progress on standard error.

    Batches without examples are left out.

    Args:
        loader: any iterable of batches.
        device: where tensors go; None leaves them.
        unpack: see `unpack_batch`.
        progress: the label of the progress line, or None for silence.
        edits: how many edited models each batch goes through; named in the line if there are any.
    """
    started = shown = time.monotonic()
    examples = 0
    total = _total(loader)
    for number, raw in enumerate(loader, start=1):
        batch = unpack_batch(raw, unpack)
        if len(batch) == 0:
            continue
        yield batch if device is None else move(batch, device)
        examples += len(batch)
        now = time.monotonic()
        if progress is not None and (now - shown > 0.5 or total == f"/{number}"):
            shown = now
            elapsed = max(now - started, 1e-9)
            rate = f"{examples / elapsed:.0f}/s" + (f", {edits * number / elapsed:.0f} edits/s" if edits else "")
            end = "\n" if total == f"/{number}" else "\r"
            sys.stderr.write(f"{progress}: batch {number}{total}, {examples} examples, {rate}{end}")
            sys.stderr.flush()


def _total(loader: Loader) -> str:
    try:
        return f"/{len(loader)}" if isinstance(loader, Sized) else ""
    except TypeError:  # a DataLoader over a stream says only here that it has no length
        return ""


def iterate_groups(
    loaders: Loaders, *, device: torch.device | None, unpack: Unpack | None, progress: str | None, edits: int = 0
) -> Iterator[tuple[Sequence[Group], Batch]]:
    """Yield (group of each example, batch) of a mapping of loaders or of one loader of mixed batches."""
    if not isinstance(loaders, Mapping):
        for batch in grouped_alike(iterate(loaders, device=device, unpack=unpack, progress=progress, edits=edits)):
            yield batch.groups or ["all"] * len(batch), batch
        return
    for name, loader in loaders.items():
        label = None if progress is None else f"{progress} of {name}"
        for batch in iterate(loader, device=device, unpack=unpack, progress=label, edits=edits):
            yield [name] * len(batch), batch


def grouped_alike(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a mixed stream as they are.

    Raises:
        ValueError: if some carry groups and some do not.
    """
    grouped = None
    for batch in batches:
        if grouped is not None and grouped != (batch.groups is not None):
            raise ValueError("some batches carry groups and some do not: give every batch its groups, or none")
        grouped = batch.groups is not None
        yield batch


def model_device(model: nn.Module) -> torch.device | None:
    """Return the device of the model's first parameter, or None where it has none."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


# Batches as trees of tensors


def map_tensors(value: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Return `value` with every tensor in it, nested in tuples, lists and mappings, replaced by `function(tensor)`.

    Args:
        value: anything.
        function: what to do with a tensor.
        kind: the class to look for in place of Tensor.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function, kind) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, function, kind) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, kind) for key, item in value.items()}
    return value


def run_apart(model: nn.Module, batch: Batch) -> Any:
    """Return a model's output for a batch; what it writes into its inputs, or draws, stays without effect outside."""
    copies: list[Tensor] = []

    def own(tensor: Tensor) -> Tensor:
        copies.append(tensor.detach().clone())
        return copies[-1]

    args, kwargs = map_tensors(batch.args, own), map_tensors(batch.kwargs, own)
    with random_state_kept(copies):
        return model(*args, **kwargs)


def random_state_kept(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Return a context that gives the random state of the CPU and of the tensors' GPUs back as it was."""
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`; tensors that are there already are not copied."""

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(map_tensors(batch.args, to), map_tensors(batch.kwargs, to), to(batch.targets), batch.groups)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A tensor that belongs to a whole batch, out of sight of `take` and `join`."""

    tensor: Tensor


def seal(batch: Batch) -> Batch:
    """Return the batch with its tensors that are not per example copied and sealed; `unseal` undoes it.

    A part of a batch may happen to have as many examples as such a tensor has rows. Sealed, it passes through `take`
    and `join` as it is, and a loader may reuse its memory.
    """
    n = len(batch)

    def sealed(tensor: Tensor) -> Tensor | _Whole:
        return tensor if tensor.dim() > 0 and len(tensor) == n else _Whole(tensor.clone())

    return Batch(map_tensors(batch.args, sealed), map_tensors(batch.kwargs, sealed), batch.targets, batch.groups)


def unseal(batch: Batch) -> Batch:
    """Return the batch as it was before `seal`."""

    def opened(whole: _Whole) -> Tensor:
        return whole.tensor

    args, kwargs = map_tensors(batch.args, opened, _Whole), map_tensors(batch.kwargs, opened, _Whole)
    return Batch(args, kwargs, batch.targets, batch.groups)


def take(batch: Batch, indices: Sequence[int]) -> Batch:
    """Return the examples at `indices` as a batch of their own.

    A contiguous range is a view of the batch; anything else is copied, so that a loader may reuse its memory.
    """
    n = len(batch)

    def pick(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != n:
            return tensor
        if isinstance(indices, range):
            return tensor[indices.start : indices.stop]
        return tensor.index_select(0, torch.tensor(indices, device=tensor.device))

    groups = None if batch.groups is None else tuple(batch.groups[i] for i in indices)
    return Batch(map_tensors(batch.args, pick), map_tensors(batch.kwargs, pick), pick(batch.targets), groups)


def join(batches: Sequence[Batch]) -> Batch:
    """Return batches of one `signature` as a single batch, examples in order."""
    if len(batches) == 1:
        return batches[0]

    def cat(values: Sequence[Any], sizes: Sequence[int]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            per_example = first.dim() > 0 and all(len(value) == n for value, n in zip(values, sizes, strict=True))
            return torch.cat(list(values)) if per_example else first
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)(*(cat(items, sizes) for items in zip(*values, strict=True)))
        if isinstance(first, tuple | list):
            return type(first)(cat(items, sizes) for items in zip(*values, strict=True))
        if isinstance(first, Mapping):
            return {key: cat([value[key] for value in values], sizes) for key in first}
        return first

    sizes = [len(batch) for batch in batches]
    groups = None
    if all(batch.groups is not None for batch in batches):
        groups = tuple(group for batch in batches for group in batch.groups or ())
    return Batch(
        cat([batch.args for batch in batches], sizes),
        cat([batch.kwargs for batch in batches], sizes),
        torch.cat([batch.targets for batch in batches]),
        groups,
    )


def signature(batch: Batch) -> Hashable:
    """Return a key that two batches share exactly when their examples may be joined into one batch.

    It holds the shape without the first dimension, the dtype and the device of what is per example, and the value of
    everything else.
    """
    n = len(batch)

    def key(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            if value.dim() > 0 and len(value) == n:
                return ("per example", tuple(value.shape[1:]), value.dtype, value.device)
            if value.layout != torch.strided:
                return ("sparse", id(value))  # its content is not compared
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return (tuple(value.shape), value.dtype, value.device, hashlib.sha256(content).digest())
        if isinstance(value, tuple | list):
            return (type(value), tuple(key(item) for item in value))
        if isinstance(value, Mapping):
            return tuple((name, key(item)) for name, item in value.items())
        return value if isinstance(value, Hashable) else ("unhashable", id(value))

    return (key(batch.args), key(batch.kwargs), key(batch.targets))


# What models return


def extract_logits(output: Any, predict: Predict | None, examples: int) -> Tensor:
    """Return the logits in a model's output, first dimension the example.

    Args:
        output: what the model returned.
        predict: the caller's function output -> logits; the default takes the tensor itself, `.logits`, `["logits"]`,
            or the first of a tuple.
        examples: the number of examples in the batch.

    Raises:
        TypeError: if no logits are found.
        ValueError: if their first dimension is not `examples`.
    """
    logits = default_predict(output) if predict is None else predict(output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"predict must return the logits, a tensor, not a {type(logits).__name__}")
    if logits.dim() == 0 or len(logits) != examples:
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for {examples} examples; the first dimension "
            f"must be the example: pass predict=, a function output -> logits"
        )
    return logits


def default_predict(output: Any) -> Tensor:
    """Return the tensor itself, `.logits`, `["logits"]`, or the first of a tuple, whichever the output has.

    Raises:
        TypeError: if it has none of them.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"no logits found in the model's output, a {type(output).__name__}: pass predict=, a function "
            f"output -> logits"
        )
    return logits


def is_token_classification(logits: Tensor, targets: Tensor) -> bool:
    """Return whether the classes are on the last axis: 3-D logits (n, tokens, classes) and targets (n, tokens).

    Where tokens and classes are equally many, both readings fit, and this one is taken.
    """
    return logits.dim() == 3 and targets.shape == logits.shape[:2] and not targets.is_floating_point()


def refuse_shifted_labels(model: nn.Module, default: str, instead: str) -> None:
    """Raise for a causal language model, whose labels the library never shifts on its own.

    Args:
        model: the model; recognised by its class name, as Hugging Face names them.
        default: what the caller left at its default.
        instead: what to pass in its place.

    Raises:
        ValueError: if the model is a causal language model.
    """
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name} is a causal language model: its logits at one position predict the label of the next, and labels "
            f"are never shifted by {default}. Pass {instead}"
        )
