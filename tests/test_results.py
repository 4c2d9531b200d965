"""Results behave as mappings by name, and become records, frames and tables for a notebook."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from kinds import built
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.results import ROWS_SHOWN, html_table

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y, G = torch.tensor([0, 1, 2] * 4), torch.tensor([0, 1, 2, 0] * 3)
DATA = [(X[:7], Y[:7], G[:7]), (X[7:], Y[7:], G[7:])]
MODEL = built("mlp")
LAYOUT = ns.find_layout(MODEL)
EDITS = {f"row {i}": ns.zero_out(ns.select(LAYOUT, {"0.weight": i})) for i in range(3)} | {
    "all": ns.zero_out(ns.select(LAYOUT, {"0.weight": ...}))
}
SWEPT = ns.sweep(MODEL, EDITS, DATA)
SCORES = ns.group_grad_norms(MODEL, DATA)
METRICS = ns.evaluate(MODEL, DATA)
INFERRED = ns.infer_groups(torch.arange(20.0), torch.zeros(20).long(), rule=0.25)


def fit(indices: Tensor) -> Tensor:
    return torch.arange(8) < 4


MEMORIZED = ns.memorization.memorization_scores(fit, 8, 20, 0.5)
RESULTS: dict[str, Any] = {
    "Scores": SCORES,
    "GroupMetrics": METRICS,
    "Sweep": SWEPT,
    "InferredGroups": INFERRED,
    "MemorizationScores": MEMORIZED,
}
BY_NAME = {"Scores": (0, 1, 2), "GroupMetrics": (0, 1, 2), "Sweep": tuple(EDITS)}


@pytest.mark.parametrize("kind", BY_NAME)
def test_they_behave_as_mappings(kind: str) -> None:
    result, names = RESULTS[kind], BY_NAME[kind]
    assert tuple(result) == tuple(result.keys()) == names and len(result) == len(names)
    assert all(name in result for name in names) and "nobody" not in result and -1 not in result
    assert dict(result) == dict(result.items()) == {name: result[name] for name in names}
    assert result.get("nobody") is None and result.get("nobody", 7) == 7 and result.get(names[0]) == result[names[0]]
    with pytest.raises(KeyError, match=r"no (group|edit labelled) 'nobody'; there are "):
        result["nobody"]


def test_values_keep_their_own_meaning() -> None:
    assert SCORES.values.shape == (3, LAYOUT.count)
    assert METRICS.values == tuple(METRICS[group] for group in METRICS)
    assert SWEPT.values("all").shape == (12,)


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_frames_are_the_records(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pandas:
        DataFrame = staticmethod(list)

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert result.to_frame() == result.to_records()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas, which is not installed: use to_records\(\)"):
        result.to_frame()


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_notebook_shows_a_small_table(result: Any) -> None:
    table = result._repr_html_()
    assert table.startswith("<table><caption") and table.endswith("</table>")
    assert table.count("<tr>") == table.count("</tr>") <= 22
    assert table.count("<td style") + table.count("<td colspan") == table.count("</td>")


def test_a_sweep_shows_the_largest_changes_first_and_what_is_settled() -> None:
    """Of an edit that turns many predictions the interval leaves 0 out; a change of nothing is never settled."""
    data = [(torch.cat([torch.eye(2)] * 40), torch.tensor([0, 1] * 40), torch.tensor([0, 1] * 40))]
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    layout = ns.find_layout(model)
    edits = {
        "nothing": ns.scale(ns.select(layout, {"weight": 0}), 2.0),
        "<all>": ns.scale(ns.select(layout, {"weight": ...}), -1.0),
    }
    table = ns.sweep(model, edits, data)._repr_html_()
    assert table.index("&lt;all&gt;") < table.index("nothing")
    assert "<b>-1.000 [-1.000, " in table and "<b>+0" not in table
    many = ns.sweep(MODEL, {f"{i}": ns.scale(ns.select(LAYOUT, {"0.weight": 0}), i) for i in range(30)}, DATA)
    assert "... and 10 more" in many._repr_html_()


def test_a_sweep_of_several_metrics_is_one_sweep_for_each() -> None:
    wanted = {"accuracy": ns.accuracy, "loss": ns.cross_entropy}
    together = ns.sweep(MODEL, EDITS, DATA, metric=wanted)
    assert list(together) == list(wanted)
    for name, metric in wanted.items():
        alone = ns.sweep(MODEL, EDITS, DATA, metric=metric)
        assert together[name] == alone
        assert together[name].baseline == ns.evaluate(MODEL, DATA, metric=metric)
        for label, edit in EDITS.items():
            assert together[name][label] == ns.evaluate(ns.apply(edit, MODEL), DATA, metric=metric)
    assert together["accuracy"].is_binary and not together["loss"].is_binary
    assert together["loss"]["all"].worst == together["loss"]["all"].max
    with pytest.raises(ValueError, match="the mapping of metrics is empty"):
        ns.sweep(MODEL, EDITS, DATA, metric={})


def test_a_sweep_knows_the_place_of_every_example() -> None:
    assert SWEPT.indices.tolist() == list(range(12)) and SWEPT.ranks.tolist() == [0] * 12
    order = torch.randperm(12)

    def unpack(index: Tensor) -> ns.Batch:
        return ns.Batch((X[index],), {}, Y[index], G[index], index)

    shuffled = ns.sweep(MODEL, EDITS, list(order.split(5)), unpack=unpack)
    assert shuffled.indices.tolist() == order.tolist()
    values = torch.empty(12, dtype=torch.float64)
    values[shuffled.indices] = shuffled.values("all")
    assert torch.equal(values, SWEPT.values("all"))
    with pytest.raises(ValueError, match="2 indices for 3 targets: give one index per example"):
        ns.Batch((X[:3],), {}, Y[:3], None, (0, 1))


def test_results_are_equal_where_all_of_them_is() -> None:
    again = ns.sweep(MODEL, EDITS, DATA)
    assert again == SWEPT and again != ns.sweep(MODEL, EDITS, DATA[:1])
    assert again != ns.sweep(MODEL, EDITS, DATA, metric=ns.cross_entropy) and again != "a sweep"
    assert ns.infer_groups(torch.arange(20.0), torch.zeros(20).long(), rule=0.25) == INFERRED
    assert ns.memorization.memorization_scores(fit, 8, 20, 0.5) == MEMORIZED
    assert ns.memorization.memorization_scores(fit, 8, 20, 0.5, seed=1) != MEMORIZED
    gaps = [
        ns.Scores(torch.tensor([[np.nan, 1.0]]), ("a",), (1,), ns.find_layout(nn.Linear(3, 2)), "c") for _ in range(2)
    ]
    assert gaps[0] == gaps[1]


def test_a_table_of_a_sweep_has_columns_for_eight_groups() -> None:
    model = nn.Linear(3, 2)
    batch = torch.randn(20, 3), torch.arange(20) % 2, torch.arange(20) % 10
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"weight": 0}))}
    table = ns.sweep(model, edits, [batch])._repr_html_()
    assert "... and 2 more" in table
    assert table.count("</th>") == 1 + 8 + 1


def test_a_long_table_ends_after_its_rows_and_says_how_many_are_left() -> None:
    rows = [[f"row {i}", "*1"] for i in range(ROWS_SHOWN + 3)]
    table = html_table("caption", ["name", "value"], rows)
    assert table.count("<b>1</b>") == ROWS_SHOWN
    assert "... and 3 more" in table
    assert f"row {ROWS_SHOWN - 1}<" in table and f"row {ROWS_SHOWN}<" not in table
    assert "more" not in html_table("caption", ["name", "value"], rows[:ROWS_SHOWN])
