"""What every message shares: how a list is cut short, which name is nearest, whose line a warning is about."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

EXHAUSTED = "An iterator or generator is exhausted after one pass; give a list or a DataLoader"
"""The end of every message about a loader that yielded nothing."""


class CaptureError(RuntimeError):
    """A model's forward cannot be captured, or the graph cannot be trusted; the message says why."""


def first(items: Iterable[str], limit: int = 10) -> list[str]:
    """Return the first `limit` items and, where there are more, how many these are."""
    every = list(items)
    return every if len(every) <= limit else [*every[:limit], f"... and {len(every) - limit} more"]


def inline(items: Iterable[str], limit: int = 5) -> str:
    """Return the first items within a sentence: "a, b, ... and 3 more"."""
    return ", ".join(first(items, limit))


def listed(items: Iterable[str], limit: int = 10) -> str:
    """Return the first items, each on a line of its own and indented."""
    return "\n".join(f"  {item}" for item in first(items, limit))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the nearest of some names as the end of an error message."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return "; nearest are " + ", ".join(f"'{other}'" for other in close) if close else "; there are none at all"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 neuron", "2 neurons"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def warn(message: str) -> None:
    """Warn of something in the line of the caller's that called the library, however deep within the library it is."""
    package = str(Path(__file__).parent)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
