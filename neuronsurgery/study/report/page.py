"""From text, figures and tables to HTML: one page that holds its styles and figures and loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from neuronsurgery.study.figures.svg import WHOLE_ROW
from neuronsurgery.study.report.section import Section
from neuronsurgery.study.report.wording import times

STYLE: Final = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 60px; max-width: 1320px; color: #1A1A1A; background: #FFFFFF;
  font: 17px/1.5 Helvetica, Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 30px; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 24px; line-height: 1.25; margin: 52px 0 10px; padding-top: 14px; border-top: 3px solid #0072B2; }
h3 { font-size: 19px; margin: 26px 0 8px; }
p, ul { max-width: 78ch; }
.finding { font-size: 18px; padding: 12px 16px; background: #EEF5FB; border-left: 5px solid #0072B2; max-width: 92ch; }
.warning { font-size: 18px; padding: 12px 16px; background: #FFF4E5; border-left: 5px solid #D55E00; max-width: 92ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 18px;
  margin: 16px 0; }
figure { margin: 0; min-width: 0; border: 1px solid #DDDDDD; border-radius: 6px;
  padding: 8px; }
figure.wide { grid-column: 1 / -1; }
figure > div { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 15px; color: #444444; padding: 4px 8px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 15px; line-height: 1.35; }
th, td { text-align: right; vertical-align: top; padding: 5px 10px; border-bottom: 1px solid #DDDDDD; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: normal; text-align: left; }
thead th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #1A1A1A; font-weight: bold;
  max-width: 190px; }
thead th.head { text-align: left; }
.words table { min-width: 600px; }
.words td { text-align: left; white-space: normal; }
.words thead th { text-align: left; }
tbody th { min-width: 112px; }
small { display: block; font-weight: normal; font-size: 13px; color: #555555; }
code { font: 13px/1.3 Menlo, Consolas, monospace; }
.contents { columns: 2 320px; column-gap: 36px; max-width: none; padding-left: 20px; }
.contents li { break-inside: avoid; }
summary { cursor: pointer; color: #0B4A75; font-weight: bold; padding: 6px 0; }
@media (max-width: 640px) { body { font-size: 16px; padding: 12px 14px 40px; } h1 { font-size: 25px; }
  h2 { font-size: 21px; } figure { padding: 4px; } .finding, .warning { font-size: 16px; } }
@media print { figure, tr { break-inside: avoid; } }
"""


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph, of the kind "finding" or "warning" in a box; nothing of no text."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>" if text else ""


def bullets(texts: Iterable[str]) -> str:
    """Return a list of those texts that say something."""
    items = "\n".join(f"<li>{escape(text)}</li>" for text in texts if text)
    return f"<ul>\n{items}\n</ul>" if items else ""


def figures_html(drawn: Sequence[tuple[str, str, str]]) -> str:
    """Return figures side by side where there is room, each no smaller than its text can be read."""
    if not drawn:
        return ""
    parts = []
    for _, caption, svg in drawn:
        width = float(svg.split('viewBox="0 0 ', 1)[1].split(" ", 1)[0])
        kind = "wide" if width >= WHOLE_ROW else ""
        said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        sizes = f"min-width:{0.72 * width:.0f}px;max-width:{1.25 * width:.0f}px"
        parts.append(f'<figure class="{kind}"><div><div style="{sizes}">{svg}</div></div>{said}</figure>')
    return f'<div class="figures">\n{"".join(parts)}\n</div>'


def folded(summary: str, body: str) -> str:
    """Return what shows on a click; nothing where there is nothing to show."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>" if body else ""


def _links(section: Section) -> str:
    """Return the links to the CSV files of a section that have rows."""
    files = [f"tables/{escape(name)}.csv" for name, rows in section.rows.items() if rows]
    links = ", ".join(f'<a href="{file}">{file}</a>' for file in files)
    return f"<p>All rows: {links}</p>" if files else ""


def section_html(section: Section) -> str:
    """Return one section: heading, finding, figures, table, remarks, and the rest folded away."""
    return "\n".join(
        part
        for part in (
            f"<h3>{escape(section.heading)}</h3>" if section.heading else "",
            paragraph(section.finding, "finding"),
            figures_html(section.figures),
            section.table,
            bullets(section.remarks),
            folded(f"{times(len(section.more_figures), 'more figure')}", figures_html(section.more_figures)),
            folded("Every intervention and its effect on every group", section.full_table),
            _links(section),
        )
        if part
    )


def document(title: str, body: Sequence[str]) -> str:
    """Return the whole page: what stands in its body, under its styles."""
    newline = "\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{newline.join(body)}\n</body>\n</html>\n"
    )
