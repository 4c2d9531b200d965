"""The page about what a language model recites does what it says. About two minutes: run with `-m slow`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "recitation.md"


@pytest.mark.slow
def test_the_page_runs_and_two_neurons_end_the_recitation(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    page: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the eight sequences in each half
        exec(compile(code, PAGE.name, "exec"), page)  # the page's own code
    assert "on examples not searched" in capsys.readouterr().out
    assert page["before"]["remembered"] == 1.0
    assert page["perplexity_before"] <= 9.0
    assert len(page["found"].neurons) <= 3
    assert page["after"]["searched"] == 0.0
    assert page["after"]["text"] >= page["whole"]["text"] - 0.03  # of the same sentences
    assert page["cost"] <= 1.05
    assert page["verdict"].carries
    _, paper = page["others"]["gradient norm", 20]
    assert paper >= page["cost"] + 0.03
