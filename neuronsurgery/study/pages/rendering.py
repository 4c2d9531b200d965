"""From a template, values and charts to a page, and from charts to files."""

from __future__ import annotations

import functools
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

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("neuronsurgery.study.pages", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.globals["script"] = _script
    return environment.get_template(template).render(**values)


@functools.cache
def _script() -> Any:
    """Return the script that draws charts, with all that it needs."""
    import markupsafe
    import vl_convert

    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return markupsafe.Markup(code.replace("</script", "<\\/script"))  # noqa: S704  # of a package, not of a user


def exports(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Return each chart as an SVG file, by its name, as it stands before anything is chosen."""
    import vl_convert

    drawn = {name: vl_convert.vegalite_to_svg(figure.specification(WIDTH)) for name, figure in figures.items()}
    return {f"figures/{name}.svg": _renumbered(svg).encode() for name, svg in drawn.items()}


def _renumbered(svg: str) -> str:
    """Return an SVG file whose clips are numbered from 0: they are counted over all charts of a process."""
    places = {name: place for place, name in enumerate(dict.fromkeys(re.findall(r'id="(clip\d+)"', svg)))}
    return re.sub(r"\bclip\d+\b", lambda found: f"clip{places.get(found[0], found[0])}", svg)
