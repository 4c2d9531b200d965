"""Draws that depend on their key alone: the same on any device, in any order, alone or in any company."""

from __future__ import annotations

import hashlib

import numpy as np


def random_bits(key: str, size: int, start: int = 0) -> np.ndarray:
    """Return `size` random 64-bit integers (uint64) that depend on the key alone, those from the place `start` on."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    generator = np.random.Philox(key=number)
    generator.advance(start // 4)  # it makes four at a time
    return generator.random_raw(start % 4 + size)[start % 4 :]


def normals(key: str, size: int) -> np.ndarray:
    """Return `size` standard normal numbers (float64) that depend on the key alone.

    A 128-bit key from the SHA-256 of the text, the raw stream of the counter-based generator Philox, and the transform
    of Box and Muller in float64.
    """
    pairs = (size + 1) // 2
    uniform = (random_bits(key, 2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # 1 - u lies in (0, 1], so the logarithm is finite.
    radius = np.sqrt(-2.0 * np.log1p(-uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:size]


def smallest_tickets(tickets: np.ndarray, k: int) -> np.ndarray:
    """Return which k of some random numbers are the smallest, bool: a draw without replacement.

    Of the same tickets, a smaller draw is a part of a larger one.
    """
    drawn = np.zeros(len(tickets), dtype=bool)
    drawn[np.argsort(tickets, kind="stable")[:k]] = True
    return drawn


def checked_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        ValueError: if it is not an integer of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, not {seed!r}")
    return int(seed)
