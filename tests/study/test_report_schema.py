"""The page that explains results.json, against results that the command line made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.study import data
from neuronsurgery.study.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
COUNTS = {
    "train": (40, 8, 6, 20),
    "held-out": (40, 8, 6, 20),
    "validation": (6,) * 4,
    "test": (8,) * 4,
}
FREE = ("impossible_rows",)
"""Keys below which the names are those of methods."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two seeds, on few images."""
    made: Callable[..., data.DataSet] = data.synthetic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "neuronsurgery.study.cli.EMBEDDED", {"synthetic": lambda seed, counts=None: made(seed, counts=COUNTS)}
        )
        path = tmp_path_factory.mktemp("seeds")
        assert main(["study", "--quick", "--seeds", "2", "--out", str(path)]) == 0
    return path


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from () if key in FREE else keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


@pytest.mark.parametrize(
    ("file", "heading"), [("seed-0/results.json", "## One run"), ("results.json", "## Several seeds")]
)
def test_every_key_of_the_results_is_explained(folder: Path, file: str, heading: str) -> None:
    page = PAGE.read_text()
    assert heading in page
    named = set(re.findall(r"`([^`\n]+)`", page))
    results = json.loads((folder / file).read_text())
    assert {"stage_two", "fragility"} <= set(results)
    assert sorted(set(keys_of(results)) - named) == []


def test_the_top_level_keys_stand_in_the_section_of_their_kind(folder: Path) -> None:
    one, several = PAGE.read_text().split("## One run")[1].split("## Several seeds")
    for text, file in ((one, "seed-0/results.json"), (several, "results.json")):
        keys = set(json.loads((folder / file).read_text()))
        assert sorted(keys - set(re.findall(r"`([^`\n]+)`", text))) == []


def test_a_key_that_is_not_explained_is_found() -> None:
    assert set(keys_of({"a": [{"b": {"impossible_rows": {"c": 1}}}]})) == {"a", "b", "impossible_rows"}


def test_the_seeds_have_reports_that_the_upper_one_links_to(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    links = re.findall(r'href="(seed-[^"]*)"', page)
    assert links == ["seed-0/report.html", "seed-1/report.html"]
    assert all((folder / link).is_file() for link in links)
