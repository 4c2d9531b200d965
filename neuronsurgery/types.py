"""The types of what callers hand in and get back, by the names that signatures use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Literal, TypeAlias

import numpy as np
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

Where: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module, Tensor], bool]
"""A glob, several globs, or a predicate (name, module, parameter) -> bool."""

Patterns: TypeAlias = Mapping[str, str | tuple[str, Mapping[str, int]]]
"""Glob or name of a parameter -> its pattern, or (pattern, sizes): see `Layer`."""

Indices: TypeAlias = int | Sequence[int] | slice | Tensor | np.ndarray | EllipsisType
"""Which neurons of a layer: one or more indices, a slice, a boolean mask, or ... for all."""

Per: TypeAlias = Literal["model", "layer"]
"""Whether the largest are sought in the whole model or in each layer."""

Checkpoint: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""A safetensors file, a state dict saved by torch, or a mapping of tensors."""

Buffers: TypeAlias = Literal["own", "shared"]
"""Whether a view has copies of the model's buffers or the buffers themselves."""

Fit: TypeAlias = Callable[[Tensor], Tensor]
"""The indices to train on, int64, ascending -> how right the model is on every example, shape (n_examples,)."""
