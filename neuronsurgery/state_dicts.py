"""Checkpoints that others wrote: the dictionaries of tensors in a file, a folder or a mapping, read as they are needed.

A file is a safetensors file or a state dict saved by torch, whole or in shards with an index; no code of it is run. Of
the dictionaries in it, the one is taken that fits what it is wanted for, if no other one does.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.errors import inline
from neuronsurgery.types import Checkpoint
from neuronsurgery.wrappers import same_names, without_wrappers

INDEX = ".index.json"
IN_FOLDERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What Hugging Face's folders hold the weights of a model in."""

TRAINERS = ("model.", "net.", "network.", "backbone.")
"""What a module that trains another one puts before each of its names."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or has not what is wanted of it; the message says why."""


# Which dictionary


def find_dictionaries(checkpoint: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
    """Return the dictionaries with tensors in a checkpoint, by where they are in it: "" is the checkpoint itself.

    Args:
        checkpoint: a mapping, or the path of a safetensors file, a file of torch, the index of a sharded one, or a
            folder of Hugging Face's. Of safetensors and of shards, each tensor is read when it is asked for.

    Raises:
        TypeError: if it is neither path nor mapping.
        FileNotFoundError: if there is no such file.
        CheckpointError: a `ValueError`, if the file is damaged or holds something else.

    Example:
        >>> weight = torch.ones(2)
        >>> list(find_dictionaries({"epoch": 3, "net": {"weight": weight}, "ema": {"shadow": {"weight": weight}}}))
        ['net', 'ema.shadow']
    """
    root = checkpoint if isinstance(checkpoint, Mapping) else _opened(_path(checkpoint))
    if isinstance(root, _Lazy):
        return {"": root}
    found: dict[str, Mapping[str, Tensor]] = {}
    seen: set[int] = set()
    left: deque[tuple[str, Mapping[Any, Any]]] = deque([("", root)])
    while left:
        place, mapping = left.popleft()
        if id(mapping) in seen:  # a dictionary may be there twice, or hold itself
            continue
        seen.add(id(mapping))
        tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
        if tensors:
            found[place] = tensors
        left.extend((f"{place}.{n}" if place else str(n), v) for n, v in mapping.items() if isinstance(v, Mapping))
    return found


def choose_dictionary(
    found: Mapping[str, Mapping[str, Tensor]], fit: Callable[[Mapping[str, Tensor]], int], where: object
) -> Mapping[str, Tensor]:
    """Return the dictionary that fits best, the checkpoint itself before those in it; an empty one where there is none.

    Args:
        found: see `find_dictionaries`.
        fit: how many of its tensors are wanted.
        where: what the dictionaries were found in, for the message.

    Raises:
        CheckpointError: a `ValueError`, if several fit equally well; names them.

    Example:
        >>> found = find_dictionaries({"net": {"weight": torch.ones(2)}, "other": {"bias": torch.ones(2)}})
        >>> list(choose_dictionary(found, lambda tensors: "weight" in tensors, "the mapping"))
        ['weight']
    """
    if len(found) < 2:
        return next(iter(found.values()), {})
    fits = {place: fit(tensors) for place, tensors in found.items()}
    best = max(fits.values())
    fitting = [place for place in found if fits[place] == best]
    if best and fitting[0] and len(fitting) > 1:
        raise CheckpointError(
            f"{where} holds the dictionaries {inline(map(repr, fitting), 10)}, each of which fits: pass the one you "
            f"mean, e.g. torch.load(path){''.join(f'[{key!r}]' for key in fitting[0].split('.'))}"
        )
    return found[fitting[0]]


def wanted_names(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str | None]:
    """Return for each wanted name the one of `names` that means the same tensor; None where there is none.

    Parts that wrappers put into names do not count, see `same_names`; where these find nothing, nor does the one part
    that a module which trains the model puts before every name.
    """
    every, known = list(wanted), dict.fromkeys(names)
    found = same_names(every, known)
    if any(key is not None for key in found.values()):
        return found
    plain = {without_wrappers(name): name for name in known}
    for prefix in TRAINERS:
        if plain and all(name.startswith(prefix) for name in plain):
            inner = same_names(every, [name.removeprefix(prefix) for name in plain])
            return {name: None if key is None else plain[f"{prefix}{key}"] for name, key in inner.items()}
    return found


# Files


def _path(checkpoint: object) -> Path:
    """Return the file that a path means: in a folder, the one that holds the weights."""
    try:
        path = Path(os.fspath(checkpoint))  # type: ignore[call-overload]  # or it raises
    except TypeError:
        raise TypeError(
            f"a checkpoint is a path or a mapping of tensors, not a {type(checkpoint).__name__}: of a model give "
            f"model.state_dict()"
        ) from None
    if os.path.isdir(path):
        inside = next((path / name for name in IN_FOLDERS if os.path.isfile(path / name)), None)
        if inside is None:
            raise FileNotFoundError(
                f"no checkpoint in the folder {path}: it has none of {', '.join(IN_FOLDERS)}; give the path of a file"
            )
        return inside
    if not os.path.isfile(path):  # not path.is_file, which raises for names that are too long
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a safetensors file or a torch state dict")
    return path


def _opened(path: Path) -> Mapping[Any, Any]:
    return _Shards(path) if path.name.endswith(INDEX) else _file(path)


def _file(path: Path) -> Mapping[Any, Any]:
    with path.open("rb") as file:
        start = file.read(9)
    try:
        return _Safetensors(path)
    except safetensors.SafetensorError as error:
        if path.suffix == ".safetensors" or start[8:] == b"{":  # eight bytes of length, then JSON
            raise CheckpointError(f"{path} is no readable safetensors file ({error}): write it again") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the archive or the unpickler ran into
        raise CheckpointError(
            f"{path} is neither a safetensors file nor a state dict that torch.load(weights_only=True) reads "
            f"({str(error).partition(chr(10))[0] or type(error).__name__}): save model.state_dict() alone"
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    return loaded


class _Lazy(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    _files: Mapping[str, Path]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    @override
    def __len__(self) -> int:
        return len(self._files)


class _Safetensors(_Lazy):
    """The tensors of a safetensors file."""

    def __init__(self, path: Path) -> None:
        opened: Any = safetensors.safe_open(path, framework="pt")  # without annotations of its own
        self._path, self._open, self._files = path, opened, dict.fromkeys(opened.keys(), path)

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise KeyError(name)
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except Exception as error:  # a dtype that this torch does not have is an error of many kinds
            raise CheckpointError(f"{name} of {self._path} cannot be read ({error!r}): write it again") from error
        return tensor


class _Shards(_Lazy):
    """The tensors of several files, by an index that says which is in which; one of the files is kept open."""

    def __init__(self, index: Path) -> None:
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            # A name with a folder in it could lead anywhere.
            wrong = [file for file in files.values() if file in ("", "..") or Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the index {index} is damaged ({error!r}): fetch it again") from error
        if wrong:
            raise CheckpointError(
                f"the index {index} names {inline(map(repr, wrong))}, no file beside it: fetch it again"
            )
        self._index, self._files = index, {name: index.parent / file for name, file in files.items()}
        self._last: tuple[Path, Mapping[str, Any]] | None = None

    @override
    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if self._last is None or self._last[0] != path:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no file {path}, which {self._index.name} says holds {name}: fetch it")
            self._last = path, _file(path)
        tensor = self._last[1].get(name)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} lacks {name}, which {self._index.name} says it holds: fetch both again")
        return tensor
