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
from neuronsurgery.study.seeds import combine

pytestmark = pytest.mark.xdist_group("report schema")  # its fixtures are made once, by one process

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
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of a run on few images, and of two seeds; the second seed is the first once more."""
    made: Callable[..., data.DataSet] = data.synthetic
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        few = {"synthetic": lambda seed, counts=None: made(seed, counts=COUNTS)}
        patch.setattr("neuronsurgery.study.cli.EMBEDDED", few)
        assert main(["study", "--quick", "--experiments", "1a", "1b", "1f", "1g", "--out", str(path)]) == 0
    one = json.loads((path / "results.json").read_text())
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
