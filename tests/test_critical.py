"""A search finds the neurons that carry a group alone, and says where there are none."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.loaders import Mixed
from neuronsurgery.searches import Bounds, Measured, Needed

RARE, SHARED = 4, 0
"""The hidden units that carry the rare group alone, and everybody of its class."""


def planted() -> nn.Sequential:
    """Class 1 is voted for by unit 0 (seen in most of its examples) or by units 3 and 4 together (the rare ones)."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[0.0, 2, 0, 0, 0, 0], [2, 0, 0, 0.2, 1.8, 0]]))
        model[2].bias.copy_(torch.tensor([0.8, 0]))  # who has no vote is of class 0
    return model


def examples(n: int = 40, seed: int = 0) -> list[Any]:
    """Groups "left" (class 0, unit 1), "right" (class 1, unit 0) and "rare" (class 1, units 3 and 4)."""
    generator = torch.Generator().manual_seed(seed)
    groups = (["left", "right", "rare", "left"] * n)[:n]
    x = 0.1 * torch.randn(n, 6, generator=generator)
    for row, group in zip(x, groups, strict=True):
        for unit in {"left": [1], "right": [0], "rare": [3, 4]}[group]:
            row[unit] += 1
    y = torch.tensor([0 if group == "left" else 1 for group in groups])
    return [(x[i : i + 16], y[i : i + 16], groups[i : i + 16]) for i in range(0, n, 16)]


HIDDEN = ns.find_layout(planted(), where="0.*")


def find(**options: Any) -> ns.Critical:
    settings: dict[str, Any] = {"layout": HIDDEN, "edits": ("zero",)} | options
    return ns.find_critical(planted(), examples(), "rare", **settings)


def test_it_finds_the_planted_unit_and_says_so() -> None:
    found = find()
    assert [neuron.index for neuron in found.neurons] == [RARE]
    assert found.edit == ns.zero_out(HIDDEN.neurons([RARE]))
    assert found.sentence == (
        "1 neuron found for rare: -100.0 points there, +0.0 at most elsewhere, on the examples of the search; judge() "
        "them on others"
    )
    assert [len(step.neurons) for step in found.path] == [1, 2, 3]
    assert found.cost == {"examples": 40, "backward passes": 1, "edits": found.cost["edits"]}
    assert found.against == ("left", "right")
    assert "0.weight[4] zero: -100.0 points, +0.0 elsewhere, where searched" in repr(found)


def numbers_are_those_of_a_sweep(found: ns.Critical, data: Any) -> None:
    swept = ns.sweep(planted(), {str(i): step.edit for i, step in enumerate(found.path)}, data)
    for i, step in enumerate(found.path):
        change = swept.change(str(i))
        assert step.own == pytest.approx(change["rare"])
        assert step.worst_other == pytest.approx(min(change["left"], change["right"]))


def test_its_numbers_are_those_of_a_sweep() -> None:
    numbers_are_those_of_a_sweep(find(), examples())


class Shuffled:
    """A loader that gives its examples in another order each time; the model has some of them wrong."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        x, y = (torch.cat([batch[i] for batch in examples()]) for i in (0, 1))
        groups = [name for batch in examples() for name in batch[2]]
        y[:8] = 1 - y[:8]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.passes)).tolist()
        yield x[order], y[order], [groups[at] for at in order]


def test_a_loader_may_shuffle() -> None:
    loader = Shuffled()
    found = ns.find_critical(planted(), loader, "rare", layout=HIDDEN, edits="zero", cap=1.0)
    assert loader.passes > 3
    numbers_are_those_of_a_sweep(found, Shuffled())


def random_case(seed: int) -> tuple[nn.Module, dict[str, list[Any]]]:
    """Return a network that memorises a little, and three groups of unequal size, a batch or more each."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        data = {}
        for name, size in (("common", 150), ("rare", 20), ("other", 60)):
            x = torch.randn(size, 8, generator=generator)
            y = model(x).argmax(1)
            y[: size // 12] = 1 - y[: size // 12]  # some are wrong
            data[name] = [(x[i : i + 32], y[i : i + 32]) for i in range(0, size, 32)]
    return model, data


def rows_of(model: nn.Module, loaders: Any, **options: Any) -> tuple[ns.Critical, int]:
    """Return what is found, and over how many examples x edits."""
    rows: list[int] = []

    def metric(logits: Tensor, targets: Tensor) -> Tensor:
        rows.append(len(targets))
        return ns.margin(logits, targets)

    return ns.find_critical(model, loaders, "rare", metric=metric, **options), sum(rows)


@pytest.mark.parametrize(
    ("options", "cases"),
    [
        ({"pool": 16}, 2),
        ({"against": "other"}, 1),
        ({"screen": "mask", "k": 2, "pool": 12}, 1),
        ({"cap": 0.1, "pool": 12, "k": 4}, 1),
    ],
)
def test_what_cannot_matter_is_left_out_and_the_same_is_found(
    options: dict[str, Any], cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets that are run to the end, however bad, change nothing but the time it takes."""
    raced = whole = 0
    for seed in range(cases):
        model, data = random_case(seed)
        mixed = [(x, y, [name] * len(x)) for name, batches in data.items() for x, y in batches]
        monkeypatch.undo()
        found = [rows_of(model, loaders, **options) for loaders in (data, mixed[::-1])]
        monkeypatch.setattr(Bounds, "matters", lambda self, label: True)
        every, most = rows_of(model, data, **options)
        for critical, rows in found:
            assert [step and step.neurons for step in critical.bests] == [step and step.neurons for step in every.bests]
            assert [step.neurons for step in critical.path] == [step.neurons for step in every.path]
            assert [step.own for step in critical.path] == pytest.approx([step.own for step in every.path])
            assert critical.cost == every.cost
            raced, whole = raced + rows, whole + most
    assert raced < whole


class Record:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_the_group_and_the_rest_are_all_examples_once() -> None:
    x, names = torch.arange(24.0)[:, None], ["a", "b", "c", "b"] * 4 + ["b"] * 4 + ["a"] * 4
    batches = [(part, part[:, 0], names[4 * i : 4 * i + 4]) for i, part in enumerate(x.split(4))]
    met = []
    for groups in ({"a"}, {"b", "c"}):
        stream = list(Mixed(batches, groups=groups))
        assert {name for batch in stream for name in batch.groups} == groups
        assert all(len(batch) == 4 for batch in stream)
        met += [
            (value, name) for batch in stream for value, name in zip(batch.targets.tolist(), batch.groups, strict=True)
        ]
    assert sorted(met) == [(float(i), name) for i, name in enumerate(names)]


def test_what_cannot_be_taken_apart_is_searched_all_the_same() -> None:
    class OfRecords(nn.Sequential):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x.x if isinstance(x, Record) else x)  # type: ignore[no-any-return]

    model = OfRecords(*planted())
    records = [(Record(x), y, groups) for x, y, groups in examples()]
    with pytest.warns(UserWarning, match="no part of the model's forward is shared"):
        found = ns.find_critical(model, records, "rare", where="0.*", edits="zero")
    assert [step.neurons for step in found.path] == [step.neurons for step in find().path]


def test_bounds_let_go_of_nothing_that_matters() -> None:
    draw, let_go = np.random.default_rng(0), 0
    for _ in range(200):
        groups = draw.choice(["a", "b"], 60, p=[0.8, 0.2]).tolist()
        before = torch.from_numpy(np.sort(draw.normal(2, 2, 60))[::-1].copy())  # what can get better comes last
        after = {str(i): before + torch.from_numpy(draw.normal(0.5 - i / 4, 1, 60)) for i in range(8)}
        own = {label: (draw.random(), -draw.random()) for label in after}
        needed, cap, weight = Needed(*draw.normal(0.2, 0.3, 2), -draw.random()), 0.1, 2.0
        bounds = Bounds(("a", "b"), weight, cap, needed, own)
        bounds.expect(groups, before)
        left = set(after)
        for part in np.array_split(np.arange(60), 6):
            at = torch.from_numpy(part)
            left &= bounds([groups[i] for i in part], before[at], {label: after[label][at] for label in left})
        for label in after:
            measured = Measured(before, after[label], tuple(groups))
            score = own[label][0] - weight * max(0.0, *measured.rises().values())
            within = min(measured.gains().values()) >= -cap
            matters = score >= needed.score or (
                within and (score >= needed.score_within or own[label][1] <= needed.own)
            )
            assert label in left or not matters
            let_go += label not in left
    assert let_go > 200


def test_nothing_of_the_caller_changes() -> None:
    model, data = planted(), examples()
    before = snapshot(model, data)
    ns.find_critical(model, data, "rare", k=2)
    assert_unchanged(before, model, data)


def test_with_no_set_under_the_cap_it_is_empty() -> None:
    model = planted()
    with torch.no_grad():
        model[0].weight[:, 4] += model[0].weight[:, 0]  # the rare ones are seen as right ones are
        model[2].weight[1, 4] = 0
        model[2].weight[1, 3] = 0
    found = ns.find_critical(model, examples(), "rare", layout=ns.find_layout(model, where="0.*"), edits="zero")
    assert len(found.neurons) == 0
    assert found.edit == ns.compose()
    assert found.found is None
    assert found.sentence == (
        "no set of at most 3 neurons takes anything from rare while no other group loses more than 0.5 points"
    )


def test_a_smaller_k_of_the_same_search() -> None:
    whole = find(k=3)
    for k in (1, 2, 3):
        alone, within = find(k=k), whole.within(k)
        assert (within.edit, [s.edit for s in within.path]) == (alone.edit, [s.edit for s in alone.path])
    with pytest.raises(ValueError, match="k must be an integer from 1 to the 3 of this search, not 4"):
        whole.within(4)


def test_whom_to_spare() -> None:
    """Without the right ones to spare, the shared unit may go as well."""
    model = planted()
    with torch.no_grad():
        model[0].weight[0, 4] = 1.0  # rare examples wake the shared unit, and hang on it alone
        model[2].weight[1, 3:5] = 0
    layout = ns.find_layout(model, where="0.*")
    spared = ns.find_critical(model, examples(), "rare", layout=layout, edits="zero")
    free = ns.find_critical(model, examples(), "rare", against=["left"], layout=layout, edits="zero")
    assert SHARED not in {neuron.index for neuron in spared.neurons}
    assert [neuron.index for neuron in free.neurons] == [SHARED]


def test_groups_may_be_numbers_of_numpy_and_torch() -> None:
    x, y = (torch.cat([batch[i] for batch in examples()]) for i in (0, 1))
    names = [name for batch in examples() for name in batch[2]]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    data = [(x, y, torch.tensor([numbers[name] for name in names]))]
    rare, left = numbers["rare"], numbers["left"]
    options = {"k": 1, "where": "0.*"}
    expected = ns.find_critical(planted(), data, rare, against=[left], **options)
    for number in (np.int64, torch.tensor):
        for against in ([number(left)], number(left)):
            found = ns.find_critical(planted(), data, number(rare), against=against, **options)
            assert (found.group, found.against, found.edit) == (rare, (left,), expected.edit)
            verdict = ns.judge(found.edit, planted(), data, number(rare), against=against, draws=0)
            assert (verdict.group, verdict.against) == (rare, (left,))


def test_mappings_and_batches_make_no_difference() -> None:
    x, y = (torch.cat([batch[i] for batch in examples()]) for i in (0, 1))
    names = [name for batch in examples() for name in batch[2]]
    chosen = {g: torch.tensor([name == g for name in names]) for g in ("rare", "left", "right")}
    loaders = {g: [(x[own], y[own])] for g, own in chosen.items()}
    found = ns.find_critical(planted(), loaders, "rare", layout=HIDDEN, edits="zero")
    assert found.edit == find().edit
    assert found.searched == find().searched


def double(neurons: ns.Neurons) -> ns.Edit:
    return ns.scale(neurons, 2.0)


def test_an_objective_and_any_kind_of_edit() -> None:
    """Turned round: which neuron helps the rare ones most? Doubling the unit that votes for them."""
    model = planted()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([3.0, 0.0]))  # now the rare ones are wrong

    def helps(before: Tensor, after: Tensor, groups: Sequence[Any]) -> float:
        own = torch.tensor([group == "rare" for group in groups])
        return float((after - before)[own].mean())

    found = ns.find_critical(model, examples(), "rare", layout=HIDDEN, edits=("zero", double), objective=helps, k=1)
    assert found.edit == ns.scale(HIDDEN.neurons([RARE]), 2.0)
    assert found.cost["backward passes"] == 0
    assert found.cost["edits"] == 12  # every unit, both ways
    assert found.path[0].kinds == ("double",)
    none = ns.find_critical(model, examples(), "rare", layout=HIDDEN, edits="zero", objective=lambda *_: -1.0, k=1)
    assert none.found is None
    assert none.sentence == "no set of at most 1 neurons takes anything from rare"


def test_what_cannot_be_held_is_said() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    found = ns.find_critical(model, examples(), "rare", layout=ns.find_layout(model, where="0.*"), k=1)
    assert found.reasons == (
        "not held at their mean: 0.weight (it has no bias, and no norm with a shift alone reads its output)",
    )
    assert set(found.path[0].kinds) == {"zero"}


@pytest.mark.parametrize("objective", [None, lambda before, after, groups: float((before - after).mean())])
def test_where_nothing_can_be_held_nothing_is_left_to_try(objective: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(
        ValueError, match=r"no neuron can be edited as edits= says, not held .*: 0.weight \(it has no bias"
    ):
        ns.find_critical(model, examples(), "rare", where="0.*", edits="mean", objective=objective)


@pytest.mark.parametrize("edits", ["zero", "mean"])
def test_a_layout_without_neurons_is_refused(edits: Any) -> None:
    with pytest.raises(ValueError, match="no neuron can be edited as edits= says, the layout has none: add 'zero'"):
        ns.find_critical(planted(), examples(), "rare", layout=ns.Layout(()), edits=edits)


def test_the_screen_predicts_what_the_sweep_finds() -> None:
    """A pool of two is enough where first order is right about the best: one within the cap, and the best of all."""
    assert find(pool=2, k=1).edit == find(k=1).edit


def test_the_learned_mask_screens() -> None:
    assert [neuron.index for neuron in find(screen="mask", k=1).neurons] == [RARE]


def test_it_is_a_value() -> None:
    found = pickle.loads(pickle.dumps(find()))
    assert (found.edit, found.sentence, found.searched) == (find().edit, find().sentence, find().searched)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"group": "nobody"}, KeyError, "no group 'nobody'; there are 'left', 'right', 'rare'"),
        ({"against": ["rare"]}, ValueError, "against= names the groups to spare, one or more, without 'rare'"),
        ({"against": []}, ValueError, "against= names the groups to spare"),
        ({"edits": ("zero", "half")}, TypeError, "edits= are 'zero', 'mean' or functions neurons -> edit"),
        ({"edits": ()}, TypeError, "one or more, not ()"),
        ({"screen": "luck"}, ValueError, "screen must be 'effects' or 'mask', not 'luck'"),
        ({"k": 0, "pool": 0.5}, ValueError, "a search cannot be made of this, 2 wrong"),
        ({"cap": -1, "weight": float("nan")}, ValueError, "weight: expected a finite number of at least 0, given nan"),
        ({"objective": 3}, TypeError, "objective= is a function"),
        ({"metric": ns.accuracy}, ValueError, "accuracy has no gradient"),
        ({"metric": ns.cross_entropy}, ValueError, "metric= is positive where an example is right, which no loss is"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments: dict[str, Any] = {"group": "rare", "layout": HIDDEN} | options
    with pytest.raises(error) as raised:
        ns.find_critical(planted(), examples(), **arguments)
    assert said in str(raised.value)
