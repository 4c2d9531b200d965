"""set_rows writes what it is given, and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neuronsurgery as ns

MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
LAYOUT = ns.find_layout(MODEL, extra="*.bias")
NEURONS = ns.select(LAYOUT, {"0.weight": (1, 3), "2.bias": 0})
VALUES = {"0.weight": torch.randn(2, 3, dtype=torch.float64), "2.bias": torch.tensor([7.0])}


def test_the_rows_are_written_in_the_dtype_of_the_weight() -> None:
    view = ns.apply(ns.set_rows(NEURONS, VALUES), MODEL)
    assert torch.equal(view[0].weight[[1, 3]], VALUES["0.weight"].float())
    assert torch.equal(view[0].weight[[0, 2]], MODEL[0].weight[[0, 2]])
    assert view[2].bias.tolist() == [7.0, MODEL[2].bias[1].item()]


def test_an_edit_keeps_its_own_copy_and_equals_one_of_the_same_rows() -> None:
    values = {name: rows.clone() for name, rows in VALUES.items()}
    edit = ns.set_rows(NEURONS, values)
    values["2.bias"].zero_()
    assert edit == ns.set_rows(NEURONS, VALUES)
    assert hash(edit) == hash(ns.set_rows(NEURONS, VALUES))
    assert edit != ns.set_rows(NEURONS, values)
    assert ns.set_rows(NEURONS, {LAYOUT[name]: rows for name, rows in VALUES.items()}) == edit


def test_files_and_pickles_give_it_back(tmp_path: Path) -> None:
    edit = ns.compose(ns.set_rows(NEURONS, VALUES), ns.zero_out(ns.select(LAYOUT, {"2.weight": 1})))
    ns.save_file(edit, tmp_path / "edit.safetensors")
    assert ns.load_file(tmp_path / "edit.safetensors") == edit
    assert pickle.loads(pickle.dumps(edit)) == edit


def test_rows_are_set_twice_as_once_and_swept_as_applied() -> None:
    edit = ns.set_rows(NEURONS, VALUES)
    data = [(torch.randn(6, 3), torch.arange(6) % 2)]
    swept = ns.sweep(MODEL, {"once": edit, "twice": ns.compose(edit, edit)}, data, metric=ns.margin)
    assert torch.equal(swept.values("once"), swept.values("twice"))
    assert swept["once"] == ns.evaluate(ns.apply(edit, MODEL), data, metric=ns.margin)


@pytest.mark.parametrize(
    ("neurons", "values", "error", "said"),
    [
        (NEURONS, torch.zeros(3, 3), ValueError, "one tensor of rows is for neurons of one layer, these are of 2"),
        (NEURONS, [1.0], TypeError, "values are a tensor, or a mapping from layers to tensors, not a list"),
        (NEURONS, {"0.weight": torch.zeros(2, 3)}, ValueError, "2.bias: no rows given"),
        (NEURONS, VALUES | {"0.weight": torch.zeros(3, 2)}, ValueError, "rows of shape (2, 3), given torch.float32"),
        (NEURONS, VALUES | {"0.weight": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "given torch.int64"),
        (NEURONS, VALUES | {"9.weight": torch.zeros(1)}, ValueError, "values= has rows for 9.weight, no one touched"),
        ([3], VALUES, TypeError, "set_rows takes a set of Neurons"),
    ],
)
def test_what_does_not_fit(neurons: Any, values: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        ns.set_rows(neurons, values)
    assert said in str(raised.value)


def test_a_damaged_file_is_refused() -> None:
    edit = ns.set_rows(NEURONS, VALUES)
    with pytest.raises(ValueError, match="are not those of the digest beside them"):
        type(edit).restored(NEURONS, {"digest": "other"}, edit.kept)
