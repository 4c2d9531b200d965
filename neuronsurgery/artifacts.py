"""Files for neurons, scores, edits and metrics: safetensors with a JSON header. No pickle, no code runs on load.

The header says what kind of value it is, in which version of the schema, and holds a SHA-256 of the whole, so that a
damaged or altered file is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from neuronsurgery.edits import Compose, Edit, RandomInit, RandomNoise, Rewind, Scale, ZeroOut
from neuronsurgery.evaluation import GroupMetrics
from neuronsurgery.neurons import Layer, LayerNeurons, Layout, Neurons
from neuronsurgery.scores import Scores

SCHEMA = 1
KEY = "neuronsurgery"

Artifact: TypeAlias = Neurons | Scores | Edit | GroupMetrics


def save_file(obj: Artifact, path: str | os.PathLike[str]) -> None:
    """Write neurons, scores, an edit or metrics to a safetensors file.

    The file is written under a temporary name and renamed, so that it is there whole or not at all. A rewind that was
    made from a path keeps the path and a digest; one made from a mapping keeps its rows in the file.

    Args:
        obj: what to save.
        path: where; an existing file is replaced.

    Raises:
        TypeError: if there is no file format for `obj`.
        OSError: if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from neuronsurgery import find_layout, select
        >>> neurons = select(find_layout(torch.nn.Linear(2, 3)), {"weight": (0, 2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(neurons, f"{folder}/chosen.safetensors")
        ...     load_file(f"{folder}/chosen.safetensors") == neurons
        True
    """
    kind = next((kind for kind in _KINDS if type(obj) is kind.type), None)
    if kind is None:
        known = ", ".join(kind.name for kind in _KINDS)
        raise TypeError(f"there is no file format for a {type(obj).__name__}; there is one for {known}")
    tensors: dict[str, Tensor] = {}
    content = kind.write(obj, tensors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"schema": SCHEMA, "kind": kind.name, "content": content}
    header["sha256"] = _digest(header, tensors)
    data = safetensors.torch.save(tensors, metadata={KEY: json.dumps(header)})
    write_atomically(Path(path), data)


def load_file(path: str | os.PathLike[str]) -> Artifact:
    """Return what `save_file` wrote: neurons, scores, an edit or metrics, equal to what was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, truncated, altered, foreign or from a newer version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(Neurons(), f"{folder}/chosen.safetensors")
        ...     load_file(f"{folder}/chosen.safetensors")
        0 neurons in 0 layers
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): save it again") from error
    if KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but none that neuronsurgery wrote: for a checkpoint of a model use rewind "
            f"or safetensors.torch.load_file"
        )
    try:
        header = json.loads(metadata[KEY])
        schema, name = int(header["schema"]), str(header["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}): save it again") from error
    kind = next((kind for kind in _KINDS if kind.name == name), None)
    if schema > SCHEMA or kind is None:
        raise ValueError(
            f"{path} is of schema {schema}, kind '{name}'; this version reads up to schema {SCHEMA}: update "
            f"neuronsurgery"
        )
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{path} was altered or damaged after it was saved, its digest does not match: save it again")
    loaded: Artifact = kind.read(header["content"], tensors)
    return loaded


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in its folder and rename it: it is there whole or not at all.

    Raises:
        OSError: if the folder is not there or cannot be written to; nothing is left behind.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`, which takes its place, on the disk for good, at the end.

    For writers that need not have the whole file in memory. An error within leaves nothing behind but the old file; a
    process that is killed within leaves the temporary file, whose name is that of the file between a "." and a suffix.

    Raises:
        OSError: if the folder is not there or cannot be written to; nothing is left behind.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to: make it first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads; give what an ordinary open would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    said = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        said.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        said.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return said.hexdigest()


# One pair of functions per kind


def _write_layer(layer: Layer) -> list[Any]:
    return [layer.parameter, layer.axis, layer.count, list(layer.row_shape), layer.groups]


def _read_layer(said: list[Any]) -> Layer:
    parameter, axis, count, row_shape, groups = said
    return Layer(parameter, axis, count, tuple(row_shape), groups)


def _write_layout(layout: Layout) -> dict[str, Any]:
    return {"layers": [_write_layer(layer) for layer in layout], "aliases": layout.aliases, "digest": layout.digest}


def _read_layout(said: Mapping[str, Any]) -> Layout:
    layers = tuple(_read_layer(layer) for layer in said["layers"])
    return Layout(layers, tuple((alias, name) for alias, name in said["aliases"]))


def _write_neurons(neurons: Neurons, tensors: dict[str, Tensor]) -> list[Any]:
    return [[_write_layer(part.layer), list(part.indices), part.start] for part in neurons.parts]


def _read_neurons(said: list[Any], tensors: Mapping[str, Tensor]) -> Neurons:
    return Neurons(LayerNeurons(_read_layer(layer), tuple(indices), start) for layer, indices, start in said)


def _write_scores(scores: Scores, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["values"] = scores.values
    return {
        "groups": scores.groups,
        "counts": scores.counts,
        "criterion": scores.criterion,
        "layout": _write_layout(scores.layout),
    }


def _read_scores(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scores:
    layout = _read_layout(said["layout"])
    return Scores(tensors["values"], tuple(said["groups"]), tuple(said["counts"]), layout, said["criterion"])


def _write_metrics(metrics: GroupMetrics, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # JSON has no NaN and no infinity; the tensor has.
    tensors["values"] = torch.tensor(metrics.values, dtype=torch.float64, device="cpu")
    return {"groups": metrics.groups, "counts": metrics.counts}


def _read_metrics(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GroupMetrics:
    return GroupMetrics(tuple(said["groups"]), tuple(tensors["values"].tolist()), tuple(said["counts"]))


def _write_edit(edit: Edit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(edit, Compose):
        return {"edits": [{"kind": _kind_of(leaf).name, **_write_edit(leaf, tensors)} for leaf in edit.edits]}
    said: dict[str, Any] = {"neurons": _write_neurons(edit.neurons, tensors)}
    if isinstance(edit, Rewind):
        if edit.path is None:
            # Named by the digest: a rewind that is composed twice keeps its rows once, as safetensors demands.
            said["rows"] = [f"rows.{edit.digest}.{number}" for number in range(len(edit.kept or ()))]
            tensors.update(zip(said["rows"], edit.kept or (), strict=True))
        return said | {"alpha": edit.alpha, "digest": edit.digest, "path": edit.path}
    return said | {name: value for name, value in vars(edit).items() if name != "neurons"}


def _edit_reader(kind: type[Edit]) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], Edit]:
    def read(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        if kind is Compose:
            return Compose(tuple(_named(leaf["kind"]).read(leaf, tensors) for leaf in said["edits"]))
        fields = {name: value for name, value in said.items() if name not in ("neurons", "rows", "kind")}
        if "rows" in said:
            fields["kept"] = tuple(tensors[name] for name in said["rows"])
        return kind(neurons=_read_neurons(said["neurons"], tensors), **fields)  # type: ignore[call-arg]

    return read


@dataclass(frozen=True)
class _Kind:
    name: str
    type: type
    write: Callable[[Any, dict[str, Tensor]], Any]
    read: Callable[[Any, Mapping[str, Tensor]], Any]


_KINDS = (
    _Kind("neurons", Neurons, _write_neurons, _read_neurons),
    _Kind("scores", Scores, _write_scores, _read_scores),
    _Kind("metrics", GroupMetrics, _write_metrics, _read_metrics),
    *(
        _Kind(name, kind, _write_edit, _edit_reader(kind))
        for name, kind in (
            ("zero_out", ZeroOut),
            ("scale", Scale),
            ("random_init", RandomInit),
            ("random_noise", RandomNoise),
            ("rewind", Rewind),
            ("compose", Compose),
        )
    ),
)


def _named(name: str) -> _Kind:
    return next(kind for kind in _KINDS if kind.name == name)


def _kind_of(obj: object) -> _Kind:
    return next(kind for kind in _KINDS if type(obj) is kind.type)
