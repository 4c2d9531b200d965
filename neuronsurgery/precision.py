"""Arithmetic in float32 or wider, whatever the dtype of the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own dtype where it is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is where it is wider."""
    return tensor.to(wide_dtype(tensor))
