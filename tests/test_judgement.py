"""A verdict says carries only where it is so, on examples that were not searched, and knows what it does not know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from snapshot import assert_unchanged, snapshot
from test_critical import HIDDEN, RARE, SHARED, examples, planted
from torch import nn

import neuronsurgery as ns

FIRST, SECOND = examples(120, seed=1), examples(120, seed=2)


def cut(*units: int) -> ns.Edit:
    return ns.zero_out(HIDDEN.neurons(units))


def first_line(verdict: ns.Verdict) -> str:
    return repr(verdict).splitlines()[0]


def test_a_set_that_carries_its_group() -> None:
    found = ns.find_critical(planted(), FIRST, "rare", layout=HIDDEN, edits="zero")
    verdict = ns.judge(found, planted(), SECOND, "rare")
    assert first_line(verdict) == (
        "1 neuron carries rare: -100.0 points there, +0.0 at most elsewhere, on examples not searched; 0 of 100 random "
        "sets do as much"
    )
    assert verdict.carries
    assert verdict.net == 1.0
    assert verdict.net_interval[0] > 0.5
    assert verdict.p_value == pytest.approx(1 / 101)
    assert verdict.distinct == 5  # the other units
    assert all(control.net < 1 for control in verdict.controls)
    assert verdict.against == ("left", "right")


def test_its_numbers_are_those_of_a_sweep_with_its_paired_intervals() -> None:
    verdict = ns.judge(cut(RARE, SHARED), planted(), SECOND, "rare", draws=3)
    swept = ns.sweep(planted(), {"cut": cut(RARE, SHARED)}, SECOND)
    assert dict(verdict.change) == pytest.approx(swept.change("cut"))
    assert dict(verdict.interval) == pytest.approx(swept.interval("cut"))
    assert verdict.net == pytest.approx(min(verdict.change["left"], verdict.change["right"]) - verdict.change["rare"])
    control = verdict.controls[0]
    assert control.net == pytest.approx(control.worst_other - control.own)


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ((RARE,), "1 neuron carries rare: -100.0 points there, +0.0 at most elsewhere;"),
        ((SHARED,), "1 neuron carries right rather than rare: "),
        ((SHARED, RARE), "2 neurons carry everybody, rare no more than right: "),
        ((2,), "1 neuron carries nobody that can be seen: +0.0 points there, +0.0 at most elsewhere;"),
    ],
)
def test_what_it_says_of_sets_of_every_kind(units: tuple[int, ...], said: str) -> None:
    assert first_line(ns.judge(cut(*units), planted(), SECOND, "rare", draws=5)).startswith(said)


def test_a_set_that_carries_only_what_it_was_searched_on() -> None:
    """The searched examples wake a unit that the others do not."""
    model, data = planted(), [(x.clone(), y, g) for x, y, g in FIRST]
    with torch.no_grad():
        model[2].weight[1, 5] = 1.9
        model[2].weight[1, 4] = 1.9
    for x, _, groups in data:
        for row, group in zip(x, groups, strict=True):
            if group == "rare":
                row[5], row[4] = 1.0, 0.0
    found = ns.find_critical(model, data, "rare", layout=HIDDEN, edits="zero")
    verdict = ns.judge(found, model, SECOND, "rare", draws=5)
    assert first_line(verdict).startswith(
        "1 neuron carries only the examples of rare that it was searched on: +0.0 points"
    )


def test_nothing_found_is_a_verdict_too() -> None:
    nothing: dict[str, Any] = {"layout": HIDDEN, "edits": "zero", "objective": lambda *_: -1.0}
    found = ns.find_critical(planted(), FIRST, "rare", **nothing)
    verdict = ns.judge(found, planted(), SECOND, "rare")
    assert first_line(verdict) == "no set was found for rare, so none is judged: nothing is cut"
    assert (verdict.net, verdict.p_value, verdict.carries) == (0.0, None, False)


def test_the_examples_of_the_search_are_refused() -> None:
    found = ns.find_critical(planted(), FIRST, "rare", layout=HIDDEN, edits="zero", k=1)
    mixed = [*SECOND, (FIRST[0][0][:1], FIRST[0][1][:1], FIRST[0][2][:1])]
    with pytest.raises(ValueError, match="1 of the 121 examples are among those that the set was searched on"):
        ns.judge(found, planted(), mixed, "rare")


def test_a_bare_edit_may_have_been_searched_here() -> None:
    verdict = ns.judge(cut(RARE), planted(), FIRST, "rare", draws=2)
    assert any("is not known; if so, they say nothing" in caveat for caveat in verdict.caveats)
    assert "on examples not searched" not in verdict.sentence


def test_what_is_not_corrected_for_is_named() -> None:
    verdict = ns.judge(cut(RARE), planted(), SECOND, "rare", draws=2)
    assert "Not corrected for: other groups, sizes k, metrics and models" in repr(verdict)
    assert "whether the group is special takes matched() examples" in repr(verdict)


@pytest.mark.filterwarnings("error")
def test_small_groups_warn() -> None:
    with pytest.warns(
        UserWarning, match=r"groups of fewer than 10 examples say little.*rare \(4\), left \(9\), right \(4\)"
    ):
        ns.judge(cut(RARE), planted(), examples(17), "rare", draws=0)
    ns.judge(cut(RARE), planted(), SECOND, "rare", draws=0)


def test_controls_are_of_the_same_layers_kinds_and_sizes() -> None:
    layout = ns.find_layout(planted())
    edit = ns.compose(
        ns.zero_out(ns.select(layout, {"0.weight": (1, 2)})), ns.scale(ns.select(layout, {"2.weight": 0}), 0.5)
    )
    verdict = ns.judge(edit, planted(), SECOND, "rare", draws=20)
    for control in verdict.controls:
        assert {layer.parameter: len(own) for layer, own in control.neurons.by_layer().items()} == {
            "0.weight": 2,
            "2.weight": 1,
        }
        assert control.neurons != edit.neurons
    again = ns.judge(edit, planted(), SECOND, "rare", draws=20)
    assert [control.neurons for control in again.controls] == [control.neurons for control in verdict.controls]


def test_an_edit_that_nothing_can_be_drawn_like_has_no_p_value() -> None:
    held = ns.mean_out(HIDDEN.neurons([RARE]), planted(), FIRST)
    for edit in (held, ns.zero_out(HIDDEN.neurons(range(6)))):
        verdict = ns.judge(edit, planted(), SECOND, "rare", draws=5)
        assert (verdict.p_value, verdict.controls) == (None, ())
        assert "random sets do as much" not in verdict.sentence


def test_what_was_found_at_its_mean_has_controls_held_so() -> None:
    found = ns.find_critical(planted(), FIRST, "rare", layout=HIDDEN, edits="mean", k=1)
    verdict = ns.judge(found, planted(), SECOND, "rare", draws=10)
    assert len(verdict.controls) == 10
    layers = {layer.parameter for control in verdict.controls for layer in control.neurons.by_layer()}
    assert layers == {"0.weight", "0.bias"}


def test_a_loss_is_lost_where_it_rises() -> None:
    verdict = ns.judge(cut(RARE), planted(), SECOND, "rare", metric=ns.cross_entropy, draws=3)
    assert verdict.carries
    assert verdict.change["rare"] > 0
    assert "points" not in verdict.sentence


def test_nothing_of_the_caller_changes() -> None:
    model = planted()
    before = snapshot(model, SECOND)
    ns.judge(cut(RARE), model, SECOND, "rare", draws=3)
    assert_unchanged(before, model, SECOND)


def test_records() -> None:
    verdict = ns.judge(cut(RARE), planted(), SECOND, "rare", against=["left"], draws=0)
    assert [(row["group"], row["role"], row["count"]) for row in verdict.to_records()] == [
        ("left", "spared", 60),
        ("rare", "own", 30),
        ("right", "beside", 30),
    ]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"edit": 3}, TypeError, "judge takes what find_critical returns, or an edit, not a int"),
        ({"group": "nobody"}, KeyError, "no group 'nobody'"),
        ({"draws": -1}, ValueError, "draws: expected an integer from 0, given -1"),
        ({"metric": lambda z, y: z[:, 0]}, ValueError, "pass larger_is_better="),
        ({"seed": "a"}, ValueError, "seed must be an integer"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments: dict[str, Any] = {"edit": cut(RARE), "group": "rare"} | options
    edit = arguments.pop("edit")
    with pytest.raises(error) as raised:
        ns.judge(edit, planted(), SECOND, **arguments)
    assert said in str(raised.value)


# Statistics


class Fixed(nn.Module):
    """Logits that are wrong under the edit for the examples whose input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.switch.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        on = self.switch(torch.ones_like(x[:, :1]))[:, 0]
        right = torch.where(on > 0.5, torch.ones_like(on), 1 - x[:, 0])
        return torch.stack([2 * right - 1, torch.zeros_like(right)], 1)


def judged(falls: dict[str, float], sizes: dict[str, int], generator: np.random.Generator, seed: int) -> ns.Verdict:
    """The verdict where each example of a group falls with the group's probability."""
    loaders = {}
    for group, size in sizes.items():
        fall = torch.tensor(generator.random(size) < falls[group]).float()
        loaders[group] = [(torch.stack([fall, torch.rand(size)], 1), torch.zeros(size, dtype=torch.int64))]
    model = Fixed()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"switch.weight": 0}))
    return ns.judge(edit, model, loaders, "own", draws=0, seed=seed)


@pytest.mark.parametrize("metric", [ns.accuracy, ns.margin])
def test_the_order_of_the_examples_makes_no_difference(metric: Any) -> None:
    x = torch.rand(90, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].round() if metric is ns.accuracy else x[:, 0]
    names = [("own", "a", "b")[at % 3] for at in range(90)]
    data = [(x, torch.zeros(90, dtype=torch.int64), names)]
    back = [(x.flip(0), torch.zeros(90, dtype=torch.int64), names[::-1])]
    edit = ns.zero_out(ns.select(ns.find_layout(Fixed()), {"switch.weight": 0}))
    one, other = (ns.judge(edit, Fixed(), loader, "own", metric=metric, draws=0) for loader in (data, back))
    assert one.net_interval == pytest.approx(other.net_interval, rel=1e-9)
    assert one.net_interval[0] < one.net < one.net_interval[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("falls", "sizes"),
    [
        ({"own": 0.57, "a": 0.0, "b": 0.02}, {"own": 30, "a": 300, "b": 60}),
        ({"own": 0.3, "a": 0.1, "b": 0.1}, {"own": 100, "a": 100, "b": 100}),
        ({"own": 0.1, "a": 0.1, "b": 0.1}, {"own": 40, "a": 200, "b": 40}),
    ],
)
def test_the_interval_of_the_net_covers(falls: dict[str, float], sizes: dict[str, int]) -> None:
    """At 95 %: of 300 intervals at least 92 % hold the truth (2.4 standard errors)."""
    generator = np.random.default_rng(0)
    truth = falls["own"] - max(falls["a"], falls["b"])
    intervals = [judged(falls, sizes, generator, seed).net_interval for seed in range(300)]
    assert sum(low <= truth <= high for low, high in intervals) >= 0.92 * 300


def noisy(n: int = 240) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network that has half learned its classes: many of its examples hang on few neurons."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    y = ((x[:, 0] * x[:, 1] + 0.5 * torch.randn(n, generator=generator)) > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        ns.cross_entropy(model(x), y).mean().backward()
        optimizer.step()
    return model, x, y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:edits of .* changed no output")
def test_where_groups_mean_nothing_few_verdicts_say_that_one_is_carried() -> None:
    """A third of one class is called rare, at random: at most 5 of 100 sets that were found for it carry it."""
    model, x, y = noisy()
    layout, members = ns.find_layout(model, where="0.*"), (y == 1).nonzero().flatten()
    carries = found_some = 0
    for seed in range(100):
        groups = ["zero" if label == 0 else "one" for label in y.tolist()]
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
        for place in members[order[: len(members) // 3]].tolist():
            groups[place] = "rare"
        search, rest = ns.halves([(x, y, groups)], seed=seed)
        found = ns.find_critical(model, search, "rare", layout=layout, k=2, edits="zero", cap=0.15)
        found_some += found.found is not None
        carries += ns.judge(found, model, rest, "rare", draws=0).carries
    assert found_some >= 50
    assert carries <= 5
