"""Sphinx configuration. Build with `sphinx-build -W --keep-going -b html docs BUILD_FOLDER`."""

from __future__ import annotations

import re
from typing import Any

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
autodoc_type_aliases = {
    name: name
    for name in (
        "Group Loader Loaders Loss Metric Predict Unpack Where Indices Per Checkpoint Buffers Artifact Constants"
    ).split()
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]


def escape_bars(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write the bars of norms and set operations so that reStructuredText does not take them for substitutions."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = re.split("(`+)", line)  # text, backticks, code, backticks, text, ...
            lines[number] = "".join(
                piece if position % 4 == 2 else piece.replace("|", r"\|") for position, piece in enumerate(pieces)
            )


def setup(app: Any) -> None:
    """Connect the hook; before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", escape_bars, priority=400)

