"""Tables: of effects as HTML, and of rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from neuronsurgery.study.figures import number, signed
from neuronsurgery.study.report.effects import Cell, Effect, Groups, own_effects, setting_words
from neuronsurgery.study.report.levels import Level

ROWS_SHOWN: Final = 60
"""Rows of a long table on the page; the CSV file has all of them."""

FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet computes instead of showing it."""


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Return an HTML table that scrolls sideways; cells are HTML already, the first `heads` of a row are its head."""
    kinds = [' class="head"' if place < heads else "" for place in range(len(header))]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(kinds, header, strict=True))
    body = []
    for row in rows:
        cells = [f'<th scope="row">{cell}</th>' for cell in row[:heads]] + [f"<td>{cell}</td>" for cell in row[heads:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def words_table(header: Sequence[str], rows: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Return an `html_table` whose cells are words rather than numbers."""
    return html_table(header, rows, heads).replace('<div class="scroll">', '<div class="scroll words">', 1)


def p_text(p: float) -> str:
    """Return a p-value for a cell, as HTML."""
    return "&lt;0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def level_cell(level: Level, where: str = "") -> str:
    """Return a table cell: a share in percent over its interval, and where it was found."""
    small = f"{level.interval} {escape(where)}".strip()
    return number(100 * level.value) + (f"<small>{small}</small>" if small else "")


def group_headers(groups: Groups) -> list[str]:
    """Return the columns of a table by group, as HTML."""
    return [escape(groups.label(name)) for name in groups.names]


def effect_cell(effect: Effect | None) -> str:
    """Return a table cell: the change, bold where an effect is seen, over its interval and p or its draws."""
    if effect is None:
        return "&ndash;"
    change = signed(100 * effect.change)
    change = f"<b>{change}</b>" if effect.seen else change
    p = "" if effect.p is None else f" p&nbsp;{p_text(effect.p)}"
    low, high = effect.widest
    interval = f"[{signed(100 * low)}, {signed(100 * high)}]"
    if effect.draws == 1:
        return f"{change}<small>{interval}{p}</small>"
    spread = number(100 * effect.spread)
    return f"{change} &plusmn; {spread}<small>{effect.seen_in} of {effect.draws} {interval}{p}</small>"


def own_table(cells: Sequence[Cell], groups: Groups) -> str:
    """Return the table of own effects: one row per setting, one column per group."""
    rows = []
    for criterion, words in (("gradient", "each group's own gradient"), ("magnitude", "magnitude")):
        by_setting: dict[str, dict[str, Effect]] = {}
        for effect in own_effects(cells, criterion):
            by_setting.setdefault(effect.setting, {})[effect.group] = effect
        for setting, found in by_setting.items():
            rows.append([words, escape(setting), *(effect_cell(found.get(name)) for name in groups.names)])
    return html_table(["chosen by", "edited", *group_headers(groups)], rows, heads=2)


def full_table(cells: Sequence[Cell], groups: Groups, file: str) -> str:
    """Return every intervention with its effect on every group, or the strongest ones where there are too many."""
    shown, note = list(cells), ""
    if len(shown) > ROWS_SHOWN:
        shown.sort(key=lambda cell: -max(abs(effect.change) for effect in cell.effects.values()))
        shown = shown[:ROWS_SHOWN]
        note = f"<p>The {ROWS_SHOWN} rows with the largest change, of {len(cells)}; all are in {escape(file)}.</p>"
    rows = [
        [
            escape(_chosen_by(cell.setting, groups)),
            escape(setting_words(cell.setting)),
            _named(cell),
            *(effect_cell(cell.effects.get(name)) for name in groups.names),
        ]
        for cell in shown
    ]
    return note + html_table(["chosen by", "edited", "neurons", *group_headers(groups)], rows, heads=2)


def _chosen_by(setting: Mapping[str, Any], groups: Groups) -> str:
    chosen_for, criterion = setting.get("chosen_for"), setting["criterion"]
    if criterion == "rewind":
        return "every layer in turn"
    if criterion in ("random", "same layers") and setting.get("k") is not None:
        words = "random" if criterion == "random" else "random of the same layers"
        return f"{words}, as many as for {groups.label(chosen_for) if chosen_for in groups.names else 'magnitude'}"
    return f"{criterion} of {groups.label(chosen_for)}" if chosen_for in groups.names else str(criterion)


def _named(cell: Cell) -> str:
    if not cell.names:
        return str(cell.neurons)
    more = f" and {cell.neurons - 3} more" if cell.neurons > 3 else ""
    return "<br>".join(f"<code>{escape(name)}</code>" for name in cell.names[:3]) + more


def csv_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV, numbers in full; lists are joined by semicolons, null is empty.

    Names that a spreadsheet would take for a formula stand behind an apostrophe: they come from tables and folders.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [_line(columns), *(_line([row.get(column) for column in columns]) for row in rows)]
    return "".join(lines).encode()


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    # A carriage return within a cell is quoted by all versions of Python only if lines end with one.
    csv.writer(text, lineterminator="\r\n").writerow([_cell(value) for value in values])
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ";".join(str(_cell(part)) for part in value)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) and not _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
