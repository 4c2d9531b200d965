"""A sweep in parts is the sweep, bit for bit, for one capture of the model and one pass of it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.graph import trust
from neuronsurgery.sweeps import Part, sweep_in_parts
from neuronsurgery.types import Group

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
LOADERS = {
    "a": [(X[:5], torch.tensor([0, 1, 2, 1, 0])), (X[5:8], torch.tensor([2, 2, 1]))],
    "b": [(X[8:], torch.tensor([0, 1, 0, 2]))],
}


class Counting(nn.Module):
    """Its output grows with every forward that it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.head(x) * self.seen  # type: ignore[no-any-return]


MODELS = {
    "captured": nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)),
    "one by one": Counting(),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_parts_are_the_sweep(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ns.find_layout(model.eval())
    edits = {f"{i}": ns.zero_out(ns.sample(layout, 1 + i % 2, seed=i)) for i in range(5)} | {"none": ns.compose()}
    whole = ns.sweep(model, edits, LOADERS, metric=ns.cross_entropy)
    captures: list[object] = []
    real = trust.capture
    monkeypatch.setattr(trust, "capture", lambda *args, **kwargs: captures.append(args) or real(*args, **kwargs))
    asked: list[str] = []

    def parts() -> Iterator[dict[str, ns.Edit]]:
        for labels in (["0"], [], ["1", "2", "none"], ["3", "4"]):
            yield {label: edits[label] for label in labels}
            asked.extend(labels)  # only once the sweep of these has been dealt with

    found = {}
    for swept in sweep_in_parts(model, parts(), LOADERS, metric=ns.cross_entropy):
        assert not set(swept.labels) & set(asked)
        assert swept.baseline == whole.baseline
        assert torch.equal(swept.values(), whole.values())
        for label in swept.labels:
            found[label] = swept[label]
            assert torch.equal(swept.values(label), whole.values(label))
            assert swept.interval(label) == whole.interval(label)
    assert found == dict(whole)
    monkeypatch.undo()
    alone: list[object] = []
    monkeypatch.setattr(trust, "capture", lambda *args, **kwargs: alone.append(args) or real(*args, **kwargs))
    ns.sweep(model, edits, LOADERS)
    assert len(captures) <= len(alone) + 1


def test_the_model_as_it_is_runs_once_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(5, 3))
    edits = [{f"{i}": ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": i}))} for i in range(3)]

    def metric(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        return targets.double()

    list(sweep_in_parts(model, edits, LOADERS, metric=metric))
    assert sum(calls) == 12 * (1 + 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_a_part_may_be_narrowed(model: nn.Module) -> None:
    """What goes no further is run no more and is not in the sweep; the rest is what it would be."""
    layout = ns.find_layout(model.eval())
    edits = {f"{i}": ns.zero_out(layout.neurons([i])) for i in range(3)} | {"none": ns.compose()}
    edits["again"] = edits["2"]
    whole = ns.sweep(model, edits, LOADERS, metric=ns.margin)
    rows: list[int] = []
    told: list[tuple[list[str], list[str]]] = []

    def metric(logits: Tensor, targets: Tensor) -> Tensor:
        rows.append(len(targets))
        return ns.margin(logits, targets)

    def narrow(groups: Sequence[Group], before: Tensor, after: Mapping[str, Tensor]) -> list[str]:
        told.append((list(map(str, groups)), list(after)))
        at = slice(sum(len(names) for names, _ in told[:-1]), sum(len(names) for names, _ in told))
        assert torch.equal(before, whole.values()[at])
        for label in after:
            assert torch.equal(after[label], whole.values(label)[at])
        return [label for label in after if label not in ("0", "2")[: len(told)]]

    (swept,) = sweep_in_parts(model, [Part(edits, LOADERS, narrow)], metric=metric)
    assert [labels for _, labels in told] == [list(edits), ["1", "2", "none", "again"], ["1", "2", "none", "again"]]
    assert swept.labels == ("1", "2", "none", "again")  # one edit by two names goes on as long as one of them does
    assert sum(rows) == 12 * 3 + 5
    for label in swept.labels:
        assert torch.equal(swept.values(label), whole.values(label))
    (none,) = sweep_in_parts(model, [Part(edits, LOADERS, lambda *_: ())], metric=ns.margin)
    assert none.labels == ("none",)
    assert torch.equal(none.values(), whole.values())


def test_parts_have_data_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))}
    parts = [Part(edits, {name: LOADERS[name]}) for name in LOADERS]
    for swept, name in zip(sweep_in_parts(model, parts), LOADERS, strict=True):
        assert swept == ns.sweep(model, edits, {name: LOADERS[name]})


def test_an_edit_that_does_not_fit_is_named() -> None:
    other = ns.zero_out(ns.select(ns.find_layout(nn.Linear(2, 2)), {"weight": 0}))
    with pytest.raises(ValueError, match="edit 'other': "):
        list(sweep_in_parts(nn.Sequential(nn.Linear(5, 3)), [{"other": other}], LOADERS))
