"""Sphinx configuration. Build with `sphinx-build -W --keep-going -b html docs BUILD_FOLDER`."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

project = "neuronsurgery"
author = "The neuronsurgery authors"
project_copyright = "The neuronsurgery authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "neuronsurgery"
html_show_sphinx = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # docstrings name code in single backticks
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
# Names that a reader looks up in api/types.md, instead of what they stand for.
TYPES = (
    "Group",
    "Loader",
    "Loaders",
    "Loss",
    "Metric",
    "Predict",
    "Unpack",
    "Where",
    "Patterns",
    "Indices",
    "Per",
    "Checkpoint",
    "Buffers",
    "Fit",
    "Score",
    "Artifact",
)
autodoc_type_aliases = {name: name for name in TYPES}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]


def lay_out_tables(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the tables of docstrings, which are written as in Markdown, into tables of reStructuredText."""
    laid_out: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)[|]", line.strip())[1:-1]]
        if not line.lstrip().startswith("| ") and not line.lstrip().startswith("|--"):
            laid_out.append(line)
        elif set(line.strip()) <= set("|-: "):
            continue
        else:
            margin = line[: len(line) - len(line.lstrip())]
            if not laid_out or not laid_out[-1].startswith(f"{margin}     "):
                laid_out += [f"{margin}.. list-table::", f"{margin}   :header-rows: 1", ""]
            first, *others = cells
            laid_out += [f"{margin}   * - {first}", *(f"{margin}     - {cell}" for cell in others)]
    lines[:] = laid_out


def escape(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the bars of norms and the stars of shapes from being read as markup."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = re.split("(`+)", line)  # text, backticks, code, backticks, text, ...
            lines[number] = "".join(
                piece if position % 4 == 2 else re.sub(r"([|]|[*](?=\w))", r"\\\1", piece)
                for position, piece in enumerate(pieces)
            )


def keep_colons(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep what stands before a colon from being read as a type, as napoleon does with attributes."""
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[0] = f": {lines[0]}"  # an empty type


def name_aliases(
    app: object, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, ...]:
    """Show a type alias by its name where autodoc shows the stand-in that it evaluates annotations with."""
    stand_in = r"TypeAliasForwardRef\('(\w+)'\)"
    return tuple(text and re.sub(stand_in, r"\1", text) for text in (signature, returns))


def strip_examples(app: object, doctree: nodes.document) -> None:
    """Take off the blank line that ends an example so that doctest does not read the closing fence as output."""
    for block in doctree.findall(nodes.literal_block):
        block.rawsource = block.rawsource.rstrip()
        block[:] = [nodes.Text(block.rawsource)]


def setup(app: Any) -> None:
    """Connect the hooks; those of docstrings before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", lay_out_tables, priority=300)
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-docstring", keep_colons, priority=450)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("doctree-read", strip_examples)
