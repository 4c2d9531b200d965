"""What every message shares: how a list is cut short, which name is nearest, whose line a warning is about."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

EXHAUSTED = "An iterator or generator is exhausted after one pass; give a list or a DataLoader"
"""The end of every message about a loader that yielded nothing."""

SCORES = "scores are what group_grad_norms, grad_norms or magnitudes return, not a {}"
LAYOUT = "a layout is what find_layout(model) returns, not a {}"
GRADIENTS = "gradients are a mapping by name, not a {}: {{name: p.grad for name, p in model.named_parameters()}}"
"""What to say of arguments of another kind."""

T = TypeVar("T")


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


def checked(value: T, kind: Any, message: str) -> T:
    """Return a value, if it is of some class.

    Raises:
        TypeError: if it is not; the message names its class in the place of "{}".
    """
    if not isinstance(value, kind):
        raise TypeError(message.format(type(value).__name__))
    return value


def checked_function(value: T, name: str) -> T:
    """Return an argument that is a function, or None.

    Raises:
        TypeError: if it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}= is a function, not a {type(value).__name__}: give it as it is, without calling it")
    return value


def warn(message: str) -> None:
    """Warn of something in the line of the caller's that called the library, however deep within the library it is."""
    within = tuple(f"{Path(module).parent}{os.sep}" for module in (__file__, torch.__file__))  # torch calls it back
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(within):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
