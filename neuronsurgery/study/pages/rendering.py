"""From a template, values and charts to a page, and from charts to files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from neuronsurgery.study.pages.charts import Figure

WIDTH = 760
"""Pixels of an exported chart."""


def render(template: str, **values: Any) -> str:
    """Return a page made from a template of this folder and the values that it names.

    Of the `figures` among these, by name, `{% call chart(name, title) %}` draws one.
    """
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("neuronsurgery.study.pages", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["shown"] = shown
    environment.globals["script"] = lambda: markupsafe.Markup(_script())  # noqa: S704  # of a package, not of a user
    environment.globals["specification"] = _specification
    return environment.get_template(template).render(**values)


def shown(value: Any) -> str:
    """Return a value of a row as a cell of a table has it."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _specification(figure: Figure) -> Any:
    """Return a chart as JSON that may stand within a script of a page."""
    import markupsafe

    text = json.dumps(figure.specification(), separators=(",", ":"), ensure_ascii=False)
    return markupsafe.Markup(text.replace("<", "\\u003c"))  # noqa: S704  # nothing in it can end the script


@functools.cache
def _script() -> str:
    """Return the script that draws charts, with all that it needs."""
    import vl_convert

    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return code.replace("</script", "<\\/script")


def exports(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Return each chart as an SVG file, by its name, as it stands before anything is chosen."""
    import vl_convert

    drawn = {name: vl_convert.vegalite_to_svg(figure.specification(WIDTH)) for name, figure in figures.items()}
    return {f"figures/{name}.svg": _renumbered(svg).encode() for name, svg in drawn.items()}


def _renumbered(svg: str) -> str:
    """Return an SVG file whose clips are numbered from 0: they are counted over all charts of a process."""
    places = {name: place for place, name in enumerate(dict.fromkeys(re.findall(r'id="(clip\d+)"', svg)))}
    return re.sub(r"\bclip\d+\b", lambda found: f"clip{places.get(found[0], found[0])}", svg)
