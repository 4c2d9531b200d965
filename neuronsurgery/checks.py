"""What values check as they are made: one error that lists everything that is wrong with them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.errors import listed

LARGEST = 2**63 - 1
"""Counts and sizes are no larger: beyond, neither torch nor a float can tell them apart."""


def refuse(what: str, wrong: Iterable[str], instead: str) -> None:
    """Raise if a list of what is wrong has an entry.

    Args:
        what: the value that was to be made.
        wrong: what does not fit, see `unfit`.
        instead: how such a value is made.

    Raises:
        ValueError: if something is wrong; lists all.
    """
    found = list(wrong)
    if found:
        raise ValueError(f"{what} cannot be made of this, {len(found)} wrong:\n{listed(found)}\n{instead}")


def unfit(name: str, fits: bool, expected: str, given: object) -> list[str]:
    """Return what is wrong with an argument: nothing if it fits, or else a line that says what was expected.

    Args:
        name: of the argument.
        fits: whether it is as it should be.
        expected: how it should be.
        given: what came.
    """
    if fits:
        return []
    said = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else reprlib.repr(given)
    return [f"{name}: expected {expected}, given {said}"]


def make_tuples(value: object, *names: str) -> None:
    """Make tuples of the lists among some fields of a frozen value, so that the value is equal however it was made."""
    for name in names:
        if isinstance(given := getattr(value, name), list):
            object.__setattr__(value, name, tuple(given))


def is_integer(value: object, least: int = -LARGEST, most: float = LARGEST) -> bool:
    """Return whether a value is an integer, no bool, from `least` to `most`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


def is_number(value: object) -> bool:
    """Return whether a value is a real number that a float can hold, NaN and the infinities among them; no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return not isinstance(value, int) or abs(value) <= LARGEST


def is_finite(value: object) -> bool:
    """Return whether a value is a real number, neither NaN nor infinite; no bool."""
    return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]  # a number


def finite(name: str, value: float) -> float:
    """Return a number as a float.

    Raises:
        TypeError: if it is none.
        ValueError: if it is NaN or infinite, or too large.
    """
    if isinstance(value, bool) or not isinstance(value, float | int | np.number):
        raise TypeError(f"{name} must be a finite number, not {value!r}")
    if not is_finite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    return float(value)


def are_integers(values: object, length: int, least: int = -LARGEST) -> bool:
    """Return whether values are a tuple of so many integers, none below `least`."""
    return isinstance(values, tuple) and len(values) == length and all(is_integer(value, least) for value in values)


def are_numbers(values: object, length: int) -> bool:
    """Return whether values are a tuple of so many real numbers."""
    return isinstance(values, tuple) and len(values) == length and all(map(is_number, values))


def are_strings(values: object) -> bool:
    """Return whether values are a tuple of strings."""
    return isinstance(values, tuple) and all(isinstance(value, str) for value in values)


def are_names(values: object) -> bool:
    """Return whether values are a tuple of integers and strings, as the names of groups are."""
    if not isinstance(values, tuple):
        return False
    # By their types first: there may be one for each of a million examples.
    return set(map(type, values)) <= {int, str} or all(isinstance(value, str) or is_integer(value) for value in values)


def are_groups(values: object) -> bool:
    """Return whether values are a tuple of the names of groups, each once."""
    return isinstance(values, tuple) and are_names(values) and len(set(values)) == len(values)


def is_tensor(value: object, shape: tuple[int, ...], *dtypes: torch.dtype) -> bool:
    """Return whether a value is a plain tensor of a shape and of one of some dtypes; of none, any real floating one."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or tuple(value.shape) != shape:
        return False
    return value.dtype in dtypes if dtypes else value.is_floating_point()


def size_of(value: Any) -> int:
    """Return the length of what has one, or else 0: by it the other arguments are measured."""
    try:
        return len(value)
    except TypeError:
        return 0
