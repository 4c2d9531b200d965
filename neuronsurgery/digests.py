"""One digest for whatever is compared by content: layouts, inputs, rows of checkpoints, files."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*pieces: str | bytes | Tensor) -> str:
    """Return the SHA-256 of some pieces in their order, as hexadecimal digits.

    Of a tensor its bytes count, in the order of its entries and wherever they lie. Its shape and dtype do not: say them
    in a piece of text.
    """
    said = hashlib.sha256()
    for piece in pieces:
        said.update(piece.encode() if isinstance(piece, str) else piece if isinstance(piece, bytes) else _bytes(piece))
    return said.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return content.numpy().tobytes()
