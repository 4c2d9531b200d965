"""Tables as they are found: commas, semicolons, tabs or blanks, with or without a header; errors list every fault."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

Problems: TypeAlias = Mapping[str, Sequence[str]]
"""What is wrong, to the names of everything that is wrong in that way."""

_SHOWN: Final = 5  # names per problem in an error
_LONGEST: Final = 200  # characters of such a name
_COLUMNS_SHOWN: Final = 20


def raise_for(source: Path, problems: Problems) -> None:
    """Raise a ValueError that lists all that is wrong with a table, if anything is."""
    found = {what: names for what, names in problems.items() if names}
    if not found:
        return
    lines = [f"  {what} ({len(names)}): {first_of(names)}" for what, names in found.items()]
    raise ValueError(
        f"{source} cannot be used:\n" + "\n".join(lines) + "\nPut this right and run again; nothing was done"
    )


def first_of(names: Sequence[str], limit: int = _SHOWN) -> str:
    """The first few names, as an error lists them: very long ones without their middle, and how many more there are."""
    half = _LONGEST // 2
    shown = [name if len(name) <= _LONGEST else f"{name[:half]}...{name[-half:]}" for name in names[:limit]]
    return ", ".join(shown) + (f", ... and {len(names) - limit} more" if len(names) > limit else "")


def number_in(text: str) -> float:
    """The number that `text` is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def whole_number(text: str) -> int | None:
    """The whole number that `text` is, pandas' "1.0" included, or None."""
    number = number_in(text)
    return int(number) if number.is_integer() else None


Rows: TypeAlias = Iterator[tuple[int, list[str]]]
"""The number of the first line and the fields of each row that is not blank."""


def read_columns(
    path: Path, aliases: Mapping[str, Sequence[str]], header: tuple[str, ...] | None = None
) -> dict[str, list[str]]:
    """The columns of a table by the names that we use; of several aliases the first that the table has.

    `header` names the columns of a table that begins with data. Only what is asked for is kept: CelebA's table has
    eight million fields. As "row" comes the number of the line that each row begins in.
    """
    columns, rows = _split_header(path, _read_rows(path), header)
    places = _place_columns(path, columns, aliases)
    picked: dict[str, list[str]] = {key: [] for key in (*places, "row")}
    ragged, with_null = [], []
    for number, fields in rows:
        if any("\0" in field for field in fields):
            with_null.append(f"line {number}")
        if len(fields) != len(columns):
            ragged.append(f"line {number} ({len(fields)})")
            continue
        picked["row"].append(str(number))
        for key, place in places.items():
            picked[key].append(fields[place])
    ragged_ones = f"rows without the {len(columns)} fields of the header"
    raise_for(path, {ragged_ones: ragged, "rows with a null byte, which no text and no path has": with_null})
    return picked


def unreadable(path: Path, error: OSError) -> OSError:
    """The error to raise where a table, or the folder that it is in, cannot be read."""
    return OSError(f"{path} cannot be read ({error.strerror or error}): give leave to read it, or pass another one")


def _read_rows(path: Path) -> Rows:
    """Rows by the delimiter that the first two use most: comma, semicolon, tab, or else any blanks."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file, found {error}: pass the table as text in UTF-8") from error
    except OSError as error:
        raise unreadable(path, error) from error
    head = "\n".join([line for line in io.StringIO(text[:65536]) if line.strip()][:2])
    delimiter = max(",;\t", key=head.count)
    if delimiter not in head:
        yield from ((number, line.split()) for number, line in enumerate(io.StringIO(text), 1) if line.strip())
        return
    # Strict: else a quotation mark that is not closed takes all rows up to the next one into its cell.
    reader, begun = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                yield begun, fields
            begun = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row that begins in line {begun} cannot be read ({error}): close the quotation mark that is "
            f"open there, or double it where it belongs to the text, and run again; nothing was done"
        ) from error


def _split_header(path: Path, rows: Rows, header: tuple[str, ...] | None) -> tuple[tuple[str, ...], Rows]:
    """The names of the columns, and the rows that are left."""
    first = next(rows, None)
    if first is not None and len(first[1]) == 1 and first[1][0].isdigit():
        first = next(rows, None)  # CelebA's .txt begins with the number of images
    if first is not None and header is not None and whole_number(first[1][-1]) is not None:
        return header, itertools.chain([first], rows)
    second = next(rows, None)
    if first is None or second is None:
        raise ValueError(f"{path}: the table is empty: expected a header and one row per image")
    columns = tuple(first[1])
    if len(second[1]) == len(columns) + 1:  # CelebA's .txt names the attributes and not the images
        columns = ("" if "image_id" in columns else "image_id", *columns)
    return columns, itertools.chain([second], rows)


def _place_columns(path: Path, columns: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> dict[str, int]:
    chosen = {key: next((name for name in names if name in columns), None) for key, names in aliases.items()}
    missing = [" or ".join(map(repr, aliases[key])) for key, name in chosen.items() if name is None]
    twice = [f"{name!r} ({count} times)" for name, count in Counter(columns).items() if name and count > 1]
    wrong = [f"columns of one name ({len(twice)}): {first_of(twice)}"] if twice else []
    if missing:
        found = first_of([repr(name) for name in columns], _COLUMNS_SHOWN)
        wrong.append(f"columns missing ({len(missing)}): expected {', '.join(missing)}, found {found}")
    if wrong:
        raise ValueError(
            f"{path}: {'; '.join(wrong)}: name the columns as expected, each of them otherwise, or say what they are "
            f"called (--path-column, --label-column and so on; not of Waterbirds and CelebA)"
        )
    return {key: columns.index(name) for key, name in chosen.items() if name is not None}
