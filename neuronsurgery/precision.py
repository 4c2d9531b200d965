"""Arithmetic in float32 or wider, whatever the dtype of the weights; and equality to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or the tensor's own dtype where it is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is where it is wider."""
    return tensor.to(wide_dtype(tensor))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits; a NaN equals itself, -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
