"""What results have in common: they are mappings by name, and become records, frames and small tables."""

from __future__ import annotations

import dataclasses
import html
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from neuronsurgery.errors import first, inline

K = TypeVar("K")
V = TypeVar("V")

ROWS_SHOWN = 20
"""So many rows of a table are shown in a notebook."""


class Table(ABC):
    """A result that can be read as a table."""

    @abstractmethod
    def to_records(self) -> list[dict[str, Any]]:
        """Return one dictionary per row, for any data frame."""

    def to_frame(self) -> Any:
        """Return the records as a pandas data frame.

        Raises:
            ImportError: if pandas is not installed; it is no dependency of the library.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: use to_records()") from error
        return pandas.DataFrame(self.to_records())

    def _shown(self) -> tuple[str, list[str], list[list[str]]]:
        """Return what a notebook shows: a caption, the headings of the columns, and the rows."""
        records = self.to_records()
        columns = list(records[0]) if records else []
        return repr(self).splitlines()[0], columns, [[_cell(row[column]) for column in columns] for row in records]

    def _repr_html_(self) -> str:
        return html_table(*self._shown())


class ByName(Table, Generic[K, V]):
    """A result that behaves as a mapping from names, without being one: `values` may mean something else."""

    @abstractmethod
    def _names(self) -> tuple[K, ...]:
        """Return the names in their order."""

    @abstractmethod
    def __getitem__(self, name: K) -> V:
        """Return what goes by a name."""

    def __iter__(self) -> Iterator[K]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def keys(self) -> tuple[K, ...]:
        """Return the names in their order."""
        return self._names()

    def items(self) -> Iterator[tuple[K, V]]:
        """Yield each name with what goes by it."""
        return ((name, self[name]) for name in self._names())

    def get(self, name: K, default: V | None = None) -> V | None:
        """Return what goes by a name, or the default where nothing does."""
        if name not in self:
            return default
        return self[name]

    def refuse_unknown(self, name: object, what: str) -> None:
        """Raise if nothing goes by a name.

        Raises:
            KeyError: if nothing does; lists the names there are.
        """
        if name not in self:
            raise KeyError(f"no {what} {name!r}; there are {inline(map(repr, self._names()), 10)}")


def same_fields(one: Any, other: Any) -> bool:
    """Return whether two values of one dataclass have equal fields, tensors compared by all of their entries."""
    if type(one) is not type(other):
        return False
    pairs = [(getattr(one, entry.name), getattr(other, entry.name)) for entry in dataclasses.fields(one)]
    return all(_same_entries(a, b) if isinstance(a, Tensor) else bool(a == b) for a, b in pairs)


def _same_entries(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)) and torch.equal(a.isnan(), b.isnan())
    )


# Tables


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a small table for a notebook; a cell that begins with a star is set bold.

    Args:
        caption: a line above it.
        columns: the headings.
        rows: the cells of each row, the first of them its name. Only some rows are shown, and how many are not.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows[:ROWS_SHOWN])
    left = first((row[0] for row in rows), ROWS_SHOWN)[ROWS_SHOWN:]
    more = "".join(f'<tr><td colspan="{len(columns)}">{html.escape(text)}</td></tr>' for text in left)
    style = "text-align:left;caption-side:top"
    return (
        f'<table><caption style="{style}">{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}{more}</tbody></table>"
    )


def _html_cell(text: str) -> str:
    bold, whole = text.startswith("*"), '<td style="white-space:nowrap">'
    return f"{whole}<b>{html.escape(text[1:])}</b></td>" if bold else f"{whole}{html.escape(text)}</td>"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
