"""Files and checkpoints changed at random: each is refused in words, or gives a value that can be used."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from fuzzing import EQUAL, OTHER, REFUSED, checkpoints, fate, fuzz, fuzz_checkpoints, objects

import neuronsurgery as ns


def test_changed_files(tmp_path: Path) -> None:
    outcomes, foreign = fuzz(640, 3, tmp_path)
    assert foreign == []
    assert outcomes[REFUSED] > 500 and outcomes[OTHER] > 10 and outcomes[EQUAL] > 10


def test_changed_checkpoints(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of odd tensors
        outcomes, foreign = fuzz_checkpoints(250, 3, tmp_path)
    assert foreign == []
    assert outcomes[REFUSED] > 100 and outcomes[EQUAL] > 30


def test_what_was_not_changed_is_loaded(tmp_path: Path) -> None:
    """So that a file of the tests above is refused for what was changed in it."""
    for name, value in objects(tmp_path).items():
        ns.save_file(value, tmp_path / "it.ns")
        assert fate(tmp_path / "it.ns", value) == (EQUAL, ""), name
    assert checkpoints(tmp_path).keys() == {"plain", "nested", "legacy", "safe"}


@pytest.mark.parametrize("error", [KeyError("k"), OverflowError("o"), RecursionError("r")])
def test_a_foreign_error_is_noticed(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise error

    path = tmp_path / "it.ns"
    ns.save_file(ns.GroupMetrics(("a",), (0.5,), (2,)), path)
    monkeypatch.setattr(ns, "load_file", fails)
    assert fate(path, torch.nan).why == f"load_file: {error!r}"
