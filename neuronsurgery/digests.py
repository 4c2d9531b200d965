"""One digest for whatever is compared by content: layouts, inputs, rows of checkpoints, files."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*pieces: str | bytes | memoryview | Tensor) -> str:
    """Return the SHA-256 of some pieces in their order, as hexadecimal digits.

    Of a tensor its bytes count, in the order of its entries and wherever they lie. Its shape and dtype do not: say them
    in a piece of text.
    """
    said = hashlib.sha256()
    for piece in pieces:
        said.update(_bytes(piece) if isinstance(piece, Tensor) else piece.encode() if isinstance(piece, str) else piece)
    return said.hexdigest()


def rows_of_bytes(tensor: Tensor) -> list[memoryview]:
    """Return for each row of a tensor what `digest` takes of it; all at once, which is faster."""
    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    return [row.data for row in rows.view(torch.uint8).numpy()]


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor where they lie, if that is in their order in the memory of the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
