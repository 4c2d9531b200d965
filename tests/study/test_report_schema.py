"""The page that explains results.json, against results that the command line made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.study.seeds import combine

pytestmark = pytest.mark.xdist_group("whole run")  # which is made once, by one process

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
FREE = ("impossible_rows",)
"""Keys below which the names are those of methods."""


@pytest.fixture(scope="module")
def kinds(whole_run: tuple[Path, str]) -> dict[str, dict[str, Any]]:
    """The results of a run on few images, and of two seeds; the second seed is the first once more."""
    one = json.loads((whole_run[0] / "results.json").read_text())
    return {"## One run": one, "## Several seeds": json.loads(json.dumps(combine({0: one, 1: one})))}


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from () if key in FREE else keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


@pytest.mark.parametrize("heading", ["## One run", "## Several seeds"])
def test_every_key_of_the_results_is_explained(kinds: dict[str, dict[str, Any]], heading: str) -> None:
    named = set(re.findall(r"`([^`\n]+)`", PAGE.read_text()))
    assert {"stage_two", "fragility"} <= set(kinds[heading])
    assert sorted(set(keys_of(kinds[heading])) - named) == []


def test_the_top_keys_stand_in_the_part_of_their_kind(kinds: dict[str, dict[str, Any]]) -> None:
    parts = PAGE.read_text().split("## One run")[1].split("## Several seeds")
    for text, results in zip(parts, kinds.values(), strict=True):
        assert sorted(set(results) - set(re.findall(r"`([^`\n]+)`", text))) == []


def test_a_key_that_is_not_explained_is_found() -> None:
    assert set(keys_of({"a": [{"b": {"impossible_rows": {"c": 1}}}]})) == {"a", "b", "impossible_rows"}
