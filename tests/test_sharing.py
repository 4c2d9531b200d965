"""What is captured once serves every later sweep, and follows the model's weights, buffers and modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.graph import trust

X = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = [(X[:6], torch.arange(6) % 2), (X[6:], torch.arange(4) % 2)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)]
    return nn.Sequential(*layers).eval()


def edits(model: nn.Module) -> dict[str, ns.Edit]:
    layout = ns.find_layout(model)
    return {str(i): ns.zero_out(layout.neurons([i])) for i in range(0, layout.count, 2)}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    real = trust.capture
    monkeypatch.setattr(trust, "capture", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    return made


def assert_same(one: ns.Sweep, other: ns.Sweep) -> None:
    assert one.labels == other.labels
    assert one.baseline == other.baseline
    assert all(torch.equal(one.values(label), other.values(label)) for label in one.labels)


def test_weights_and_buffers_are_read_live(captures: list[Any]) -> None:
    model = network()
    shared = ns.share(model, DATA[0])
    assert repr(shared) == "share of a Sequential, captured"
    ns.sweep(shared, edits(model), DATA)
    known = len(captures)
    with torch.no_grad():
        model[0].weight.add_(0.3)
        model[1].running_mean.add_(0.5)
        model[4].weight = nn.Parameter(-model[4].weight)
    before = snapshot(model, DATA)
    found = ns.sweep(shared, edits(model), DATA, metric=ns.margin)
    assert_unchanged(before, model, DATA)
    assert len(captures) == known
    assert not found.reasons
    assert_same(found, ns.sweep(model, edits(model), DATA, metric=ns.margin))


class Switched(nn.Module):
    """Another path where a flag says so: what the graph has recorded is not what the model does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.flag = network(), False

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2.0 if self.flag else 1.0)  # type: ignore[no-any-return]


def test_a_path_that_is_another_one_by_now_is_captured_anew(captures: list[Any]) -> None:
    model = Switched()
    shared = ns.share(model, DATA[0])
    model.flag = True
    known = len(captures)
    found = ns.sweep(shared, edits(model), DATA, metric=ns.margin)
    assert len(captures) > known
    assert_same(found, ns.sweep(model, edits(model), DATA, metric=ns.margin))


def test_replaced_modules_are_captured_anew() -> None:
    model = network()
    shared = ns.share(model, DATA[0])
    model[4] = nn.Linear(64, 3)
    assert_same(ns.sweep(shared, edits(model), DATA), ns.sweep(model, edits(model), DATA))


def test_predict_belongs_to_what_was_captured() -> None:
    model = network()
    shared = ns.share(model, DATA[0], predict=lambda output: -output)
    found = ns.sweep(shared, edits(model), DATA, metric=ns.margin)
    assert_same(found, ns.sweep(model, edits(model), DATA, metric=ns.margin, predict=lambda output: -output))
    with pytest.raises(ValueError, match=r"give it to share\(\), not to sweep\(\)"):
        ns.sweep(shared, edits(model), DATA, predict=lambda output: output)


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 1e9 else -self.body(x)


def test_what_cannot_be_captured_is_said_and_swept_all_the_same() -> None:
    model = Reading()
    with pytest.warns(UserWarning, match="no part of the model's forward is shared"):
        shared = ns.share(model, DATA[0])
    assert shared.reasons
    with pytest.warns(UserWarning, match="no part of the model's forward is shared"):
        found = ns.sweep(shared, edits(model), DATA)
    with pytest.warns(UserWarning, match="no part of the model's forward is shared"):
        assert_same(found, ns.sweep(model, edits(model), DATA))
