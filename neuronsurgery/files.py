"""Files for neurons, edits and every result: safetensors with a JSON header. No pickle, no code runs on load.

The header says what kind of value it is, in which version of the schema, and holds a SHA-256 of the whole, so that a
damaged or altered file is noticed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import neuronsurgery.checkpoints
import neuronsurgery.rows  # noqa: F401  # both for the kinds of edit that they add to `KINDS`
from neuronsurgery.atomic import KEY, write_atomically
from neuronsurgery.checks import are_groups, are_strings, is_integer
from neuronsurgery.digests import digest
from neuronsurgery.edits import KINDS, Compose, Edit
from neuronsurgery.errors import inline, listed
from neuronsurgery.evaluation import GroupMetrics
from neuronsurgery.fragile import InferredGroups
from neuronsurgery.layers import COLUMNS, GROUPED_COLUMNS, ROWS, Layer
from neuronsurgery.layouts import Layout
from neuronsurgery.memorization import MemorizationScores
from neuronsurgery.neurons import Neurons
from neuronsurgery.outcomes import Outcomes, Sweep
from neuronsurgery.scores import Scores
from neuronsurgery.state_dicts import CheckpointError

SCHEMA = 2

Artifact: TypeAlias = Neurons | Layout | Scores | Edit | GroupMetrics | Sweep | InferredGroups | MemorizationScores
"""What there is a file format for."""


def save_file(obj: Artifact, path: str | os.PathLike[str]) -> None:
    """Write neurons, a layout, an edit or a result to a safetensors file.

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
    kind = next((kind for kind in _kinds() if type(obj) is kind.type), None)
    if kind is None:
        known = ", ".join(kind.name for kind in _kinds())
        raise TypeError(f"there is no file format for a {type(obj).__name__}; there is one for {known}")
    tensors: dict[str, Tensor] = {}
    content = kind.write(obj, tensors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"schema": SCHEMA, "kind": kind.name, "content": content}
    header["sha256"] = _content_digest(header, tensors)
    data = safetensors.torch.save(tensors, metadata={KEY: json.dumps(header, default=_plain)})
    write_atomically(Path(path), data)


def load_file(path: str | os.PathLike[str]) -> Artifact:
    """Return what `save_file` wrote: neurons, scores, an edit or metrics, equal to what was saved.

    Files of all earlier versions are read. Of a rewind that was made from a path the rows are read from that path.

    Raises:
        FileNotFoundError: if there is no such file, or a rewind's checkpoint is gone.
        ValueError: if the file is damaged, truncated, altered, foreign or from a newer version, or a rewind's
            checkpoint has other rows now.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(Neurons(), f"{folder}/chosen.safetensors")
        ...     load_file(f"{folder}/chosen.safetensors")
        0 neurons in 0 layers
    """
    path = Path(path)
    if not os.path.isfile(path):  # not path.is_file, which raises for names that are too long
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            kind = next(kind for kind in _kinds() if kind.name == header["kind"])
            _refuse_other_tensors(path, kind, header["content"], file)  # before any of them is read
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): save it again") from error
    if header.pop("sha256", None) != _content_digest(header, tensors):
        raise ValueError(f"{path} was altered or damaged after it was saved, its digest does not match: save it again")
    try:
        loaded: Artifact = kind.read(header["content"], tensors, header["schema"])
    except (OSError, CheckpointError):
        raise  # of the checkpoint that a rewind is from, which they name
    except Exception as error:  # a digest can be made for anything, and then every type may be another one
        reason = str(error) if isinstance(error, ValueError | TypeError) else repr(error)
        raise ValueError(f"{path} is damaged: {reason}\nSave it again") from error
    return loaded


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return our part of a file's header, of a schema and of kinds that are known."""
    if KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but none that neuronsurgery wrote: for a checkpoint of a model use rewind "
            f"or safetensors.torch.load_file"
        )
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
        json.dumps(header)  # as the digest will, which nests less deeply than loading
        schema, names = header["schema"], [header["kind"]]
        if is_integer(schema, 1) and schema <= SCHEMA:
            names += [leaf["kind"] for leaf in _leaves(header["kind"], header["content"])]
        if not is_integer(schema, 1) or not are_strings(tuple(names)):
            raise TypeError(f"schema {schema!r}, kinds {names!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}): save it again") from error
    known = {kind.name for kind in _kinds()}
    unknown = [name for name in names if name not in known]
    if schema > SCHEMA or unknown:
        raise ValueError(
            f"{path} is of schema {schema}, kind '{(unknown or names)[0]}'; this version reads up to schema {SCHEMA}: "
            f"update neuronsurgery, or import what registers a kind of your own"
        )
    return header


def _refuse_other_tensors(path: Path, kind: _Kind, content: Any, file: Any) -> None:
    """Raise if the tensors in an open file are not those that its kind has, by their names, dtypes and dimensions."""
    try:
        expected = kind.tensors(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}): save it again") from error
    names = set(file.keys())
    wrong = [f"{name}: missing" for name in sorted(expected.keys() - names)]
    wrong += [f"{name}: unknown" for name in sorted(names - expected.keys())]
    for name in sorted(names & expected.keys()):
        dtypes, dimensions = expected[name]
        dtype, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
        if dtype not in dtypes.split() or (dimensions is not None and len(shape) != dimensions):
            said = dtypes if dimensions is None else f"{dtypes} of {dimensions} dimensions"
            wrong.append(f"{name}: expected {said}, found {dtype} of shape {shape}")
    if wrong:
        raise ValueError(
            f"{path} was altered or damaged after it was saved, its tensors are not those of its kind, '{kind.name}':\n"
            f"{listed(wrong)}\nSave it again"
        )


def _content_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    pieces: list[str | Tensor] = [json.dumps(header, sort_keys=True, default=_plain)]
    for name in sorted(tensors):
        tensor = tensors[name]
        pieces += [f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0", tensor]
    return digest(*pieces)


def _plain(value: object) -> Any:
    """Return a number of numpy, which counts may be, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a file keeps numbers, strings, lists and dictionaries, not a {type(value).__name__}")


# One pair of functions per kind


def _write_layer(layer: Layer) -> list[Any]:
    return [layer.parameter, layer.pattern, dict(layer.sizes), list(layer.shape), layer.position]


def _read_layer(said: list[Any], schema: int, position: int) -> Layer:
    """Return a layer; in files of version 0.1 it has an axis in place of a pattern, and no position."""
    if schema > 1:
        return Layer(*said)
    parameter, axis, count, row_shape, groups = said
    if not all(map(is_integer, (axis, count, groups, *row_shape))):
        raise ValueError(f"a layer has integers for its axis, count, row and groups, not {said}")
    if groups > 1:
        shape = (groups * row_shape[0], count // groups, *row_shape[1:])
        return Layer(parameter, GROUPED_COLUMNS, {"g": groups}, shape, position)
    return Layer(parameter, COLUMNS if axis else ROWS, {}, (*row_shape[:axis], count, *row_shape[axis:]), position)


def _write_layout(layout: Layout) -> dict[str, Any]:
    return {"layers": [_write_layer(layer) for layer in layout], "aliases": layout.aliases, "digest": layout.digest}


def _read_layout(said: Mapping[str, Any], schema: int) -> Layout:
    layers = tuple(_read_layer(layer, schema, position) for position, layer in enumerate(said["layers"]))
    return Layout(layers, tuple(map(tuple, said["aliases"])))


def _write_neurons(neurons: Neurons, tensors: dict[str, Tensor]) -> list[Any]:
    return [[_write_layer(layer), list(indices)] for layer, indices in neurons.by_layer().items()]


def _read_neurons(said: list[Any], tensors: Mapping[str, Tensor], schema: int) -> Neurons:
    # In files of version 0.1 each layer's first flat number follows its indices.
    pairs = [(_read_layer(layer, schema, start[0] if start else 0), indices) for layer, indices, *start in said]
    chosen = dict(pairs)
    if len(chosen) < len(pairs):
        raise ValueError("a layer is there twice")
    return Neurons(chosen)


def _write_scores(scores: Scores, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["values"] = scores.values
    return {
        "groups": scores.groups,
        "counts": scores.counts,
        "criterion": scores.criterion,
        "layout": _write_layout(scores.layout),
    }


def _read_scores(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> Scores:
    layout = _read_layout(said["layout"], schema)
    return Scores(tensors["values"], said["groups"], said["counts"], layout, said["criterion"])


def _write_metrics(metrics: GroupMetrics, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # JSON has no NaN and no infinity; the tensor has.
    tensors["values"] = torch.tensor(metrics.values, dtype=torch.float64, device="cpu")
    return _metrics_header(metrics)


def _metrics_header(metrics: GroupMetrics) -> dict[str, Any]:
    return {"groups": metrics.groups, "counts": metrics.counts, "larger_is_better": metrics.larger_is_better}


def _read_metrics(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> GroupMetrics:
    return _metrics_from(said, tensors["values"])


def _metrics_from(said: Mapping[str, Any], values: Tensor) -> GroupMetrics:
    # Files of version 0.1 do not say which direction is better.
    direction = said.get("larger_is_better")
    return GroupMetrics(said["groups"], tuple(values.tolist()), said["counts"], direction)


def _write_layout_alone(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return _write_layout(layout)


def _read_layout_alone(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> Layout:
    return _read_layout(said, schema)


def _write_sweep(sweep: Sweep, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers in tensors: one row for no edit, then one for each edit."""
    metrics = [sweep.baseline, *sweep.metrics.values()]
    rows = [sweep.values(), *map(sweep.values, sweep.labels)]
    if not are_groups(sweep.labels):
        raise TypeError(
            f"a file keeps a sweep whose labels are strings or integers, not {inline(map(repr, sweep.labels))}"
        )
    tensors["means"] = torch.tensor([each.values for each in metrics], dtype=torch.float64, device="cpu")
    tensors["values"] = torch.stack(rows).to(torch.bool if sweep.is_binary else torch.float64)
    tensors["indices"], tensors["ranks"] = sweep.indices, sweep.ranks
    said = {"labels": sweep.labels, "members": sweep.members, "reasons": sweep.reasons, "metric": sweep.metric}
    return {**said, **_metrics_header(sweep.baseline)}


def _read_sweep(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> Sweep:
    metrics = [_metrics_from(said, row) for row in tensors["means"]]
    outcomes = [Outcomes.of(row.double()) for row in tensors["values"]]
    labels = tuple(said["labels"])
    if not are_groups(labels):
        raise ValueError(f"the labels of a sweep are distinct strings or integers, not {inline(map(repr, labels))}")
    return Sweep(
        metrics[0],
        dict(zip(labels, metrics[1:], strict=True)),
        said["members"],
        tensors["indices"],
        tensors["ranks"],
        said["reasons"],
        said["metric"],
        dict(zip(labels, outcomes[1:], strict=True)),
        outcomes[0],
    )


def _write_inferred(inferred: InferredGroups, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors.update(groups=inferred.groups, fragile=inferred.fragile)
    tensors["thresholds"] = torch.tensor(inferred.thresholds, dtype=torch.float64, device="cpu")
    return {"classes": inferred.classes, "counts": inferred.counts}


def _read_inferred(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> InferredGroups:
    counts, thresholds = tuple(map(tuple, said["counts"])), tuple(tensors["thresholds"].tolist())
    return InferredGroups(tensors["groups"], tensors["fragile"], said["classes"], counts, thresholds)


def _write_memorization(scores: MemorizationScores, tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = ("values", "standard_errors", "seen", "unseen")
    tensors.update({name: getattr(scores, name) for name in names})
    return {"share": scores.share, "seed": scores.seed}


def _read_memorization(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> MemorizationScores:
    return MemorizationScores(**tensors, share=said["share"], seed=said["seed"])


def _write_edit(edit: Edit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(edit, Compose):
        return {"edits": [{"kind": _kind_of(leaf).name, **_write_edit(leaf, tensors)} for leaf in edit.edits]}
    values, own = edit.content()
    said = {"neurons": _write_neurons(edit.neurons, tensors), **values}
    if own:
        # Named by their content: rows that are composed twice are kept once, as safetensors demands.
        said["rows"] = [f"rows.{digest(str(tuple(tensor.shape)), tensor)}" for tensor in own]
        tensors.update(zip(said["rows"], own, strict=True))
    return said


def _read_edit(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int, *, kind: type[Edit]) -> Edit:
    values = {name: value for name, value in said.items() if name not in ("neurons", "rows", "kind")}
    rows = tuple(tensors[name] for name in said.get("rows", ()))
    return kind.restored(_read_neurons(said["neurons"], tensors, schema), values, rows)


def _read_composed(said: Mapping[str, Any], tensors: Mapping[str, Tensor], schema: int) -> Edit:
    return Compose(tuple(_read_edit(leaf, tensors, schema, kind=KINDS[leaf["kind"]]) for leaf in said["edits"]))


def _leaves(kind: str, content: Any) -> Sequence[Any]:
    """Return what a file says of the edits of which one is composed."""
    return content["edits"] if kind == "compose" else ()


def _tensors_of_edit(content: Any) -> _Tensors:
    return {str(name): (ANY, None) for leaf in content.get("edits", [content]) for name in leaf.get("rows", ())}


_Tensors: TypeAlias = "Mapping[str, tuple[str, int | None]]"
"""The dtypes that each tensor of a file may have, and how many dimensions; None is any number."""

FLOATS = "F16 BF16 F32 F64"
ANY = f"BOOL U8 I8 I16 I32 I64 {FLOATS} F8_E4M3 F8_E5M2"
"""The dtypes that a tensor of an edit may have: an edit of one's own may keep anything."""


def _has(**tensors: tuple[str, int]) -> Callable[[Any], _Tensors]:
    return lambda content: tensors


@dataclass(frozen=True)
class _Kind:
    """A kind of value: its name in files, its class, how it is written and read, and the tensors that it has."""

    name: str
    type: type
    write: Callable[[Any, dict[str, Tensor]], Any]
    read: Callable[[Any, Mapping[str, Tensor], int], Any]
    tensors: Callable[[Any], _Tensors]


_VALUES = (
    _Kind("neurons", Neurons, _write_neurons, _read_neurons, _has()),
    _Kind("scores", Scores, _write_scores, _read_scores, _has(values=("F32", 2))),
    _Kind("metrics", GroupMetrics, _write_metrics, _read_metrics, _has(values=("F64", 1))),
    _Kind("compose", Compose, _write_edit, _read_composed, _tensors_of_edit),
    _Kind("layout", Layout, _write_layout_alone, _read_layout_alone, _has()),
    _Kind(
        *("sweep", Sweep, _write_sweep, _read_sweep),
        _has(means=("F64", 2), values=("BOOL F64", 2), indices=("I64", 1), ranks=("I64", 1)),
    ),
    _Kind(
        *("inferred groups", InferredGroups, _write_inferred, _read_inferred),
        _has(groups=("I64", 1), fragile=("BOOL", 1), thresholds=("F64", 1)),
    ),
    _Kind(
        *("memorization scores", MemorizationScores, _write_memorization, _read_memorization),
        _has(values=(FLOATS, 1), standard_errors=(FLOATS, 1), seen=("I64", 1), unseen=("I64", 1)),
    ),
)


def _kinds() -> Iterator[_Kind]:
    """Yield every kind of value that has a file format, the kinds of edit that callers have registered among them."""
    yield from _VALUES
    for name, kind in KINDS.items():
        yield _Kind(name, kind, _write_edit, functools.partial(_read_edit, kind=kind), _tensors_of_edit)


def _kind_of(obj: object) -> _Kind:
    return next(kind for kind in _kinds() if type(obj) is kind.type)
