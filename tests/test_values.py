"""What values are made of is checked as they are made: one message that says everything that is wrong."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import HEADS, LAYOUT, MODEL, NEURONS, THEN, objects, sweep

import neuronsurgery as ns
from neuronsurgery import scores as scores_module
from neuronsurgery.checks import size_of
from neuronsurgery.digests import digest
from neuronsurgery.edits import Compose, RandomNoise, Scale, ZeroOut
from neuronsurgery.memorization import MemorizationScores
from neuronsurgery.outcomes import Outcomes

ROWS = "n ... -> n ..."
LAYER = ns.Layer("w", ROWS, {}, (4, 3))
ONES = [f"a{i}" for i in range(31)]
SWEPT = sweep(torch.tensor([[1.0, 0, 1, 1, 0]] * 3))
REWOUND = ns.rewind(NEURONS, THEN)
BOTH = ns.select(HEADS, {"head.weight": 1}) | ns.select(LAYOUT, {"head.weight": 2})
INFERRED = ns.infer_groups(torch.arange(30.0), torch.tensor([4, 9, 9] * 10), rule=0.3)
MEMORIZED = MemorizationScores(*torch.rand(2, 3).double(), *torch.tensor([[8, 7, 6], [2, 3, 4]]), 0.5, 2)


def scores(**changes: Any) -> ns.Scores:
    made = {"values": torch.zeros(1, LAYOUT.count), "groups": ("a",), "counts": (1,), "layout": LAYOUT}
    return ns.Scores(**{**made, "criterion": "made up", **changes})


def metrics(**changes: Any) -> ns.GroupMetrics:
    return ns.GroupMetrics(**{"groups": ("a", 3), "values": (0.5, 1.0), "counts": (2, 3), **changes})


def changed(value: Any, **changes: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(value, **changes)


def layer(*arguments: Any) -> Callable[[], object]:
    return lambda: ns.Layer(*arguments)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "layer: types": (
        layer(3, None, {"d": 0}, (4, -1), True),
        r"a layer cannot be made of this, 5 wrong:\n  parameter: expected the name of a parameter, given 3\n"
        r"  pattern: expected a string, given None\n  sizes: .* of at least 1, given \{'d': 0\}\n"
        r"  shape: .*, given \(4, -1\)\n  position: expected an integer of at least 0, given True\nfind_layout makes",
    ),
    "layer: a huge shape": (layer("w", ROWS, {}, (2**40, 2**40)), r"shape: expected .* with a product below 2\*\*63"),
    "layer: a bool": (layer("w", ROWS, {}, (True, 3)), r"shape: expected integers of at least 0"),
    "layer: a float": (layer("w", ROWS, {"g": 2.0}, (4, 3)), r"sizes: expected a mapping"),
    "layer: what einops calls its own": (layer("w", ROWS, {"pattern": 2}, (4, 3)), r"w: the pattern .* does not fit"),
    "layer: axes that torch has no room for": (
        layer("w", f"(n {' '.join(ONES)}) i -> n {' '.join(ONES)} i", dict.fromkeys(ONES, 1), (4, 3)),
        r"it has 33 axes, more than 32$",
    ),
    "neurons: a list": (lambda: ns.Neurons([3]), r"Neurons are made of a mapping Layer -> indices, not of a list"),
    "neurons: everything": (
        lambda: ns.Neurons({LAYER: (4, 1), ns.Layer("v", ROWS, {}, (2,)): (0.5,)}),
        r"2 wrong:\n  w: expected indices in 0\.\.3, given 1\.\.4\n  v: expected integers",
    ),
    "neurons: a bool": (lambda: ns.Neurons({LAYER: (1, True)}), r"w: expected integers"),
    "neurons: negative": (lambda: ns.Neurons({LAYER: (-1,)}), r"w: expected indices in 0\.\.3, given -1\.\.-1"),
    "neurons: no indices": (lambda: ns.Neurons({LAYER: 3}), r"w: expected integers"),
    "neurons: two shapes": (
        lambda: ns.Neurons({LAYER: (0,), ns.Layer("w", ROWS, {}, (2, 2)): (0,)}),
        r"w: of shape \(4, 3\) in one layer and \(2, 2\) in another\nChoose neurons with select",
    ),
    "layout: aliases": (lambda: ns.Layout((LAYER,), (("v", 3),)), r"aliases: expected pairs"),
    "layout: a layer's name": (lambda: ns.Layout((LAYER,), (("w", "w"),)), r"another name, which is no layer's"),
    "layout: an alias twice": (lambda: ns.Layout((LAYER,), (("v", "w"), ("v", "u"))), r"aliases: expected pairs"),
    "scores: everything": (
        lambda: scores(values=[1.0], groups="a", counts=(1.5,), layout=None, criterion=3),
        r"5 wrong:\n  values: expected a plain float32 tensor, given \[1\.0\]\n  groups: .*, given 'a'\n"
        r"  counts: .*\n  layout: expected a Layout that has a neuron, given None\n  criterion: .*\ngroup_grad_norms, ",
    ),
    "scores: a group twice": (
        lambda: scores(values=torch.zeros(2, LAYOUT.count), groups=("a", "a"), counts=(1, 1)),
        r"groups: expected distinct integers or strings, given \('a', 'a'\)",
    ),
    "scores: another dtype": (lambda: scores(values=torch.zeros(1, LAYOUT.count).double()), r"torch\.float64 of shape"),
    "scores: no neuron": (lambda: scores(values=torch.zeros(1, 0), layout=ns.Layout(())), r"layout: .* has a neuron"),
    "metrics: everything": (
        lambda: metrics(groups=(True, 0.5), values=(1.0,), counts=(-1, 2), larger_is_better=1),
        r"4 wrong:\n  groups: .*, given \(True, 0\.5\)\n  values: expected 2 numbers, given \(1\.0,\)\n  counts: .*\n"
        r"  larger_is_better: expected True, False or None, given 1\nevaluate makes metrics",
    ),
    "metrics: nobody": (
        lambda: metrics(counts=(0, 0)),
        r"counts: expected 2 integers of at least 0, one of them larger",
    ),
    "metrics: no group": (lambda: metrics(groups=(), values=(), counts=()), r"groups: expected distinct"),
    "metrics: a huge count": (lambda: metrics(counts=(1, 10**400)), r"counts: expected"),
    "metrics: a huge value": (lambda: metrics(values=(1, 10**400)), r"values: expected"),
    "sweep: metrics of other groups": (
        changed(SWEPT, metrics={**SWEPT.metrics, "cut": metrics(groups=(0, 1))}),
        r"metrics: expected GroupMetrics of the baseline's groups, counts and direction",
    ),
    "sweep: a metric of something else": (changed(SWEPT, metrics={"cut": 0.5}), r"metrics: expected GroupMetrics"),
    "sweep: members": (changed(SWEPT, members=("a", "a", "a", 3, 3)), r"members: expected the group of every example"),
    "sweep: everything else": (
        changed(SWEPT, indices=SWEPT.indices[:4], ranks=-SWEPT.indices, reasons=(3,), metric=None, _outcomes={}),
        r"5 wrong:\n  outcomes: expected 5 under each edit and none, .*\n  indices: expected int64, shape \(5,\), "
        r"given "
        r"torch\.int64 of shape \(4,\)\n  ranks: .*\n  reasons: .*\n  metric: .*\nsweep makes sweeps",
    ),
    "inferred groups": (
        changed(INFERRED, groups=INFERRED.groups.flip(0)),
        r"groups: expected 2 \* place of the class \+ fragile",
    ),
    "inferred groups: a class too many": (
        changed(INFERRED, groups=INFERRED.groups + 2),
        r"groups: expected 2 \* place of the class \+ fragile",
    ),
    "inferred groups: everything": (
        changed(INFERRED, fragile=INFERRED.groups, classes=(9, 4), counts=((1, 2), 3), thresholds=(math.nan, 1.0)),
        r"4 wrong:\n  fragile: .*\n  classes: expected ascending .*\n  counts: .*\n  thresholds: .*\ninfer_groups",
    ),
    "memorization: everything": (
        changed(MEMORIZED, values=MEMORIZED.values[None], standard_errors=None, seen=0, share=1.0, seed=-1),
        r"5 wrong:\n  values: .*\n  standard_errors: .*\n  seen, unseen: .*\n  share: .*\n  seed: .*\nmemorization",
    ),
    "memorization: other models": (changed(MEMORIZED, seen=MEMORIZED.seen + MEMORIZED.seen), r"of the same sum"),
    "memorization: nobody": (
        lambda: MemorizationScores(*torch.zeros(2, 0).double(), *torch.zeros(2, 0).long(), 0.5, 0),
        r"values: expected floating-point, shape \(1,\)",
    ),
    "scale: a bool": (lambda: ns.scale(NEURONS, True), r"factor must be a finite number, not True"),
    "scale by hand": (lambda: Scale(NEURONS, math.inf), r"factor must be a finite number, not inf"),
    "scale of shared entries": (lambda: Scale(BOTH, 2.0), r"a scale of neurons that share entries"),
    "zero_out by hand": (lambda: ZeroOut((0, 1)), r"an edit takes a set of Neurons, not a tuple"),
    "noise by hand": (lambda: RandomNoise(NEURONS, -1, 0.1), r"seed must be an integer of at least 0, not -1"),
    "noise without a scale": (lambda: RandomNoise(NEURONS, 1), r"give exactly one of std= and relative_std="),
    "rewind: rows of others": (changed(REWOUND, kept=REWOUND.kept[:1]), r"kept: expected floating-point rows of"),
    "rewind: no path": (changed(REWOUND, path=3), r"path: expected a string or None"),
    "rewind of shared entries": (
        changed(ns.rewind(BOTH, THEN), alpha=0.5),
        r"a rewind by a share of neurons that share entries",
    ),
    "compose: no edits": (lambda: Compose((NEURONS,)), r"edits: expected edits, none of them composed"),
    "compose: of composed": (lambda: Compose((Compose(()),)), r"edits: expected edits, none of them composed"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_lists_and_numpys_numbers_do() -> None:
    """What means the same is the same value."""
    numbers = np.array([2, 3])
    assert metrics(groups=["a", 3], values=[0.5, 1.0], counts=list(numbers)) == metrics()
    assert ns.Layer("w", ROWS, {}, [np.int64(4), 3]) == LAYER and hash(ns.Layout([LAYER])) == hash(ns.Layout((LAYER,)))
    assert ns.Neurons({LAYER: numbers}) == ns.Neurons({LAYER: (3, 2, 2)}) == ns.Neurons({LAYER: range(2, 4)})
    assert ns.Neurons({LAYER: range(3, 1, -1)}).by_layer()[LAYER] == (2, 3)


def test_metrics_with_a_nan_equal_themselves_however_they_came_about() -> None:
    one, other = (metrics(values=(float("nan"), 1.0)) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != metrics(values=(1.0, math.nan))


def test_a_scale_beyond_float32_is_an_infinity_and_no_error() -> None:
    for edit in (ns.random_init(NEURONS, std=1e300), ns.random_noise(NEURONS, std=1e300), ns.scale(NEURONS, 1e300)):
        assert ns.bake(edit, MODEL).state_dict()["out.weight"][1].isinf().all()
        assert ns.apply(edit, MODEL)["out"].weight[1].isinf().all()


def test_numbers_of_numpy_are_saved(tmp_path: Any) -> None:
    ns.save_file(metrics(counts=tuple(np.array([2, 3]))), tmp_path / "it")
    assert ns.load_file(tmp_path / "it") == metrics()


def test_labels_that_a_file_cannot_keep_are_refused_before_anything_is_written(tmp_path: Any) -> None:
    labels = {("cut", 1): "cut", 7: "noise"}
    odd = dataclasses.replace(
        SWEPT,
        metrics={label: SWEPT[known] for label, known in labels.items()},
        _outcomes={label: SWEPT._outcomes[known] for label, known in labels.items()},
    )
    assert '<td style="white-space:nowrap">7</td>' in odd._repr_html_()
    with pytest.raises(TypeError, match=r"a sweep whose labels are strings or integers, not \('cut', 1\), 7"):
        ns.save_file(odd, tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_every_kind_can_be_made_again(tmp_path: Any) -> None:
    """So that the checks above refuse nothing that the library makes."""
    for value in objects(tmp_path).values():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [entry.name for entry in dataclasses.fields(value) if entry.init]
            assert type(value)(**{name: getattr(value, name) for name in names}) == value


# --- what grows with the number of neurons --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 11, 60])
def test_the_largest_are_those_of_a_stable_sort(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "WORTH_NARROWING", 0)
    generator = torch.Generator().manual_seed(k)
    for special in ((), (math.nan,), (math.nan,) * 5, (math.inf, math.inf, -math.inf), (0.0, -0.0)):
        values = torch.randint(0, 6, (60,), generator=generator).float() / 2
        values[torch.randperm(60, generator=generator)[: len(special)]] = torch.tensor(special)
        expected = values.sort(descending=True, stable=True).indices[:k]
        assert sorted(scores_module._first_largest(values, k).tolist()) == sorted(expected.tolist())


def test_both_ways_to_the_largest_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = scores(values=torch.randint(0, 3, (1, LAYOUT.count), generator=torch.Generator().manual_seed(0)).float())
    whole = [ns.topk(tied, 2), ns.topk(tied, 2, per="layer"), ns.top_fraction(tied, 0.4)]
    monkeypatch.setattr(scores_module, "WORTH_NARROWING", 0)
    assert whole == [ns.topk(tied, 2), ns.topk(tied, 2, per="layer"), ns.top_fraction(tied, 0.4)]


def test_a_digest_takes_no_copy() -> None:
    tensor = torch.zeros(2**22, dtype=torch.uint8)
    tracemalloc.start()
    digest("a", tensor, tensor.view(torch.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert digest(torch.zeros(0), b"ab") == digest("ab") == digest(torch.tensor([97, 98], dtype=torch.uint8))


def test_what_has_no_length_measures_nothing() -> None:
    assert size_of(3) == 0 and size_of("abc") == 3


def test_outcomes_are_equal_only_where_they_are_the_same() -> None:
    one = Outcomes.of(torch.tensor([1.0, 0.0]))
    assert one == Outcomes.of(torch.tensor([1.0, 0.0])) and one != Outcomes.of(torch.tensor([0.0, 1.0])) and one != 3
