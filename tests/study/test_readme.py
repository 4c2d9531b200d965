"""The README's example from front to back, on the network that its first command trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import neuronsurgery as ns
from neuronsurgery.study.data import synthetic
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.training import RECIPES, train

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small_resnet(0), synthetic(0).train, tmp_path / "runs" / "synthetic-seed-0", recipe=RECIPES["adam"])
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
        exec(block, names)
    assert isinstance(names["found"], ns.Critical)
    assert isinstance(names["swept"], ns.Sweep) and len(names["swept"]) == len(names["edits"])
