"""The sweep equals one by one, bit for bit, on every architecture; its statistics equal slow references."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES, Case, tiered

import neuronsurgery as ns
from neuronsurgery.graph import trust
from neuronsurgery.paired import paired_interval, paired_p_value, student_cdf, student_quantile
from neuronsurgery.sweeps import Outcomes


def fingerprint(logits: Tensor, targets: Tensor) -> Tensor:
    """One number per example that any flipped bit of its logits changes."""
    bits = logits.detach().flatten(1).contiguous().view(torch.int32 if logits.dtype == torch.float32 else torch.int16)
    places = torch.arange(1, bits.shape[1] + 1) % 8191
    return (bits.long() * places).sum(1) % 2**52


def one_by_one(model: nn.Module, edits: Mapping[str, ns.Edit], loaders: Any) -> dict[str, Tensor]:
    """The fingerprint of every example under every edit, each model evaluated on its own."""
    found = {}
    for label, edit in edits.items():
        values: list[Tensor] = []

        def keep(logits: Tensor, targets: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(fingerprint(logits, targets))
            return values[-1]

        ns.evaluate(ns.apply(edit, model), loaders, metric=keep)
        found[label] = torch.cat(values).double()
    return found


def every_kind(model: nn.Module, seed: int = 0) -> dict[str, ns.Edit]:
    """Every kind of edit, of one layer, of many, of all and of none."""
    layout = ns.find_layout(model)
    few = ns.sample(layout, min(3, layout.count), seed=seed)
    many = ns.sample(layout, max(1, layout.count // 4), seed=seed + 1)
    earlier = {layer.parameter: torch.full(layer.shape, 0.1) for layer in layout}
    return {
        "none": ns.compose(),
        "zero": ns.zero_out(few),
        "again": ns.zero_out(few),
        "scale": ns.scale(many, 1.5),
        "init": ns.random_init(few, relative_std=1.0, seed=seed),
        "noise": ns.random_noise(many, std=0.1, seed=seed),
        "rewind": ns.rewind(few, earlier, alpha=0.5),
        "everywhere": ns.scale(layout.neurons(range(layout.count)), 0.9),
        "composed": ns.compose(ns.scale(many, 0.5), ns.zero_out(few)),
    }


def assert_equal_one_by_one(model: nn.Module, edits: Mapping[str, ns.Edit], loaders: Any) -> ns.Sweep:
    swept = ns.sweep(model, edits, loaders, metric=fingerprint)
    for label, values in one_by_one(model, edits, loaders).items():
        assert torch.equal(swept.values(label), values), label
    assert torch.equal(swept.values(), one_by_one(model, {"base": ns.compose()}, loaders)["base"])
    return swept


# Equality


@tiered(
    *("mlp", "mlp_soft_targets", "keyword", "linear", "tied", "tied_head_first", "shared_module", "shared_parameter"),
    *("spectral_norm", "weight_norm", "custom", "bilinear", "residual", "unet_grouped", "attention"),
)
def test_equals_one_by_one(case: Case) -> None:
    swept = assert_equal_one_by_one(case.build(), every_kind(case.build()), case.batches(sizes=(4, 4, 3, 1)))
    assert swept.reasons == ()
    assert not torch.equal(swept.values("everywhere"), swept.values())


@tiered("mlp", "residual", "unet", "tied", "shared_parameter", "custom", "weight_norm", "bilinear")
def test_equals_one_by_one_where_a_batch_of_one_comes_first(case: Case) -> None:
    assert_equal_one_by_one(case.build(), every_kind(case.build()), case.batches(sizes=(1, 4, 1)))


@pytest.mark.parametrize("name", ["mlp", "tied", "grouped"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_equals_one_by_one_for_random_sets_of_edits(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    model = case.build()
    layout = ns.find_layout(model)
    chosen = st.lists(st.integers(0, layout.count - 1), max_size=6).map(layout.neurons)
    edits = {str(i): ns.zero_out(neurons) for i, neurons in enumerate(data.draw(st.lists(chosen, max_size=4)))}
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    assert_equal_one_by_one(model, edits, case.batches(sizes=sizes))


def test_metrics_equal_those_of_evaluate() -> None:
    case = CASES["residual"]
    model, batches, edits = case.build(), case.batches(), every_kind(case.build())
    swept = ns.sweep(model, edits, batches)
    assert swept.baseline == ns.evaluate(model, batches)
    for label, edit in edits.items():
        assert swept[label] == ns.evaluate(ns.apply(edit, model), batches)


def test_of_a_view_equals_the_composed_edit() -> None:
    case = CASES["mlp"]
    model = case.build()
    layout = ns.find_layout(model)
    first, second = (ns.zero_out(ns.sample(layout, 2, seed=seed)) for seed in (0, 1))
    of_view = ns.sweep(ns.apply(first, model), {"second": second}, case.batches(), metric=fingerprint)
    composed = one_by_one(model, {"both": ns.compose(first, second)}, case.batches())
    assert torch.equal(of_view.values("second"), composed["both"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_and_in_half_precision(dtype: torch.dtype) -> None:
    case = CASES["residual"]
    model = case.build()
    if dtype == torch.bfloat16:
        model = model.to(dtype)
        batches = [(images.to(dtype), targets, groups) for images, targets, groups in case.batches()]
        assert_equal_one_by_one(model, every_kind(case.build()), batches)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal_one_by_one(model, every_kind(case.build()), case.batches())


def test_channels_last() -> None:
    case = CASES["residual"]
    model = case.build().to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y, g) for x, y, g in case.batches()]
    assert_equal_one_by_one(model, every_kind(model), batches)


# The fallback


class Branching(nn.Module):
    """Takes another path for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if len(x) > 2 else self.b(x) + x.sum(1, keepdim=True)


class Reading(nn.Module):
    """Reads the values of its input, so no graph can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x[0, 0]) > 0 else -self.a(x)


def noise(*sizes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=generator), torch.zeros(n, dtype=torch.int64), torch.arange(n) % 2) for n in sizes
    ]


def test_a_model_that_branches_on_the_batch_size_is_right() -> None:
    torch.manual_seed(0)
    model = Branching()
    layout = ns.find_layout(model)
    edits = {name: ns.zero_out(ns.select(layout, {name: 0})) for name in ("a.weight", "b.weight")}
    assert_equal_one_by_one(model, edits, noise(4, 4, 2, 1, 4, 3))


def test_a_model_without_a_graph_falls_back_with_a_warning() -> None:
    torch.manual_seed(0)
    model = Reading()
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"a.weight": 0}))}
    with pytest.warns(UserWarning, match="each costs a forward of its own"):
        swept = ns.sweep(model, edits, noise(4, 4, 3), metric=fingerprint)
    assert swept.reasons
    assert torch.equal(swept.values("cut"), one_by_one(model, edits, noise(4, 4, 3))["cut"])


class ReadingAndShared(Reading):
    """One module under two names, in a model without a graph: torch's functional_call would keep the edit."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.norm = nn.BatchNorm1d(3)
        self.same_norm = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.same_norm(self.second(self.norm(self.first(x)))))


def test_one_edit_of_a_shared_module_does_not_leak_into_the_next() -> None:
    torch.manual_seed(0)
    model = ReadingAndShared()
    layout = ns.find_layout(model)
    edits = {name: ns.zero_out(ns.select(layout, {name: (0, 1)})) for name in layout.names}
    with pytest.warns(UserWarning, match="each costs a forward of its own"):
        assert_equal_one_by_one(model, edits, noise(4, 4, 3))


def test_reasons_name_a_path_that_changes_with_the_values() -> None:
    case = CASES["bert"]
    model = case.build()
    batches = [(torch.randn(4, 3), torch.zeros(4).long()), (-torch.randn(4, 3).abs(), torch.zeros(4).long())]
    reading = Reading()
    cut = {"cut": ns.zero_out(ns.select(ns.find_layout(reading), {"a.weight": 0}))}
    with pytest.warns(UserWarning, match="forward of its own"):
        swept = ns.sweep(reading, cut, batches)
    assert swept.reasons
    assert ns.sweep(model, every_kind(model), case.batches()).reasons == ()


def test_where_no_edit_changes_anything_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture costs more than the forward passes that it could save: there are none."""
    monkeypatch.setattr("neuronsurgery.graph.trust.capture", lambda *args, **kwargs: pytest.fail("captured"))
    reading, batches = Reading(), noise(4, 3)
    expected = ns.evaluate(reading, batches, metric=ns.margin)
    for edits in ({}, {"none": ns.compose()}):
        swept = ns.sweep(reading, edits, batches, metric=ns.margin)
        assert list(swept.baseline.values) == list(expected.values)
        assert swept.reasons == ()


def test_a_model_with_hooks_falls_back_and_they_fire() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(1))
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))}
    with pytest.warns(UserWarning, match="hooks"):
        swept = ns.sweep(model, edits, noise(4), metric=fingerprint)
    assert calls
    assert torch.equal(swept.values("cut"), one_by_one(model, edits, noise(4))["cut"])


# One pass


class Counting:
    """A loader that counts how often it is iterated and how many batches it gave."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.passes = self.given = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


def test_the_data_are_read_once() -> None:
    case = CASES["mlp"]
    loader = Counting(case.batches())
    ns.sweep(case.build(), every_kind(case.build()), loader)
    assert (loader.passes, loader.given) == (1, 3)


def test_equal_edits_are_evaluated_once() -> None:
    case = CASES["mlp"]
    calls = []

    def metric(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return ns.accuracy(logits, targets)

    neurons = ns.sample(ns.find_layout(case.build()), 2, seed=0)
    edits = {str(i): ns.zero_out(neurons) for i in range(5)}
    swept = ns.sweep(case.build(), edits, case.batches(), metric=metric)
    assert len(calls) == 2 * 3  # the model as it is and one edit, three batches
    assert swept.labels == ("0", "1", "2", "3", "4")


@tiered("mlp", "residual", "grouped", "tied", "shared_parameter", "custom", "weight_norm", "bilinear")
def test_changes_nothing(case: Case) -> None:
    model, batches, edits = case.build(), case.batches(), every_kind(case.build())
    before = snapshot(model, batches, edits)
    ns.sweep(model, edits, batches, metric=fingerprint)
    assert_unchanged(before, model, batches, edits)


def test_an_interrupt_that_the_caller_deals_with_is_none_of_the_capture_s() -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.sum() > 0 else 1)

    model = Branching(4, 2)
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"weight": 0}))
    try:
        raise KeyboardInterrupt("of the caller")
    except KeyboardInterrupt:
        with pytest.warns(UserWarning, match=r"shared .*: torch\.export refused it"):
            swept = ns.sweep(model, {"cut": cut}, [(torch.ones(3, 4), torch.tensor([0, 1, 0]))])
    assert swept.labels == ("cut",)


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    case = CASES["residual"]
    model, batches = case.build(), case.batches()
    before = snapshot(model, batches)

    def metric(logits: Tensor, targets: Tensor) -> Tensor:
        raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        ns.sweep(model, every_kind(model), batches, metric=metric)
    assert_unchanged(before, model, batches)


def test_progress_says_edits_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["mlp"]
    ns.sweep(case.build(), every_kind(case.build()), case.batches(), progress=True)
    assert "batch 3/3, 8 examples" in capsys.readouterr().err
    ns.sweep(case.build(), every_kind(case.build()), case.batches(), progress=True)
    assert "edits/s" in capsys.readouterr().err


# The result


def test_groups_follow_the_mapping_or_ascend() -> None:
    case = CASES["mlp"]
    model, batches = case.build(), case.batches()
    assert ns.sweep(model, {}, batches).baseline.groups == (0, 1, 2, 3)
    assert ns.sweep(model, {}, {"b": batches, "a": batches[:1]}).baseline.groups == ("b", "a")


def small_sweep() -> ns.Sweep:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    layout = ns.find_layout(model)
    edits = {
        "first": ns.zero_out(ns.select(layout, {"weight": 0})),
        "all": ns.zero_out(ns.select(layout, {"weight": ...})),
    }
    inputs = torch.eye(2).repeat(14, 1)
    return ns.sweep(model, edits, [(inputs, torch.arange(28) % 2, torch.arange(28) % 2)])


def test_changes_are_signed_and_paired() -> None:
    swept = small_sweep()
    assert swept.change("all") == {0: 0.0, 1: -1.0}
    before, after = swept.values()[1::2].tolist(), swept.values("all")[1::2].tolist()
    assert swept.interval("all", 0.9)[1] == pytest.approx(reference.bonett_price(before, after, 0.9))
    assert swept.p_value("all")[1] == pytest.approx(2 / 2**14)
    low, high = swept.interval("all")[0]
    assert low < 0 < high, "no change among 14 examples is not an interval of width 0"


def test_statistics_of_a_group_are_those_of_its_own_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(40, 3, generator=generator), torch.randint(2, (40,), generator=generator)
    groups = torch.randint(3, (40,), generator=generator)
    model = nn.Linear(3, 2)
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"weight": 0}))}
    measures = ((ns.accuracy, reference.bonett_price), (ns.margin, reference.paired_t_interval))
    for metric, interval in measures:
        swept = ns.sweep(model, edits, [(inputs, targets, groups)], metric=metric)
        for group in range(3):
            mine = [i for i in range(40) if groups[i] == group]
            before, after = ([float(values[i]) for i in mine] for values in (swept.values(), swept.values("cut")))
            assert swept.interval("cut")[group] == pytest.approx(interval(before, after, 0.95), rel=1e-6)
            assert swept.change("cut")[group] == pytest.approx((sum(after) - sum(before)) / len(mine))


def test_records_and_repr() -> None:
    swept = small_sweep()
    records = swept.to_records()
    assert len(records) == 4
    assert set(records[0]) == {"label", "group", "value", "count", "change", "low", "high", "p"}
    assert len(repr(swept).splitlines()) <= 20
    many = ns.sweep(CASES["mlp"].build(), {str(i): ns.compose() for i in range(40)}, CASES["mlp"].batches())
    assert len(repr(many).splitlines()) <= 20


def test_remembers_the_name_of_its_metric() -> None:
    case = CASES["mlp"]
    names = [
        (ns.accuracy, "accuracy"),
        (partial(ns.cross_entropy), "cross_entropy"),
        (nn.CrossEntropyLoss(reduction="none"), "CrossEntropyLoss"),
    ]
    for metric, name in names:
        swept = ns.sweep(case.build(), {}, case.batches(), metric=metric)
        assert swept.metric == name
        copied = pickle.loads(pickle.dumps(swept))
        assert copied.metric == name and torch.equal(copied.values(), swept.values())


def test_unknown_labels_and_levels_are_named() -> None:
    swept = small_sweep()
    with pytest.raises(KeyError, match="no edit labelled 'other'; there are 'first', 'all'"):
        swept["other"]
    with pytest.raises(KeyError, match="no edit labelled"):
        swept.values("other")
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), not 95"):
        swept.interval("all", level=95)


def test_an_edit_that_does_not_fit_is_named_before_the_data_are_read() -> None:
    case = CASES["mlp"]
    loader = Counting(case.batches())
    other = ns.zero_out(ns.sample(ns.find_layout(nn.Linear(5, 4)), 1, seed=0))
    with pytest.raises(ValueError, match="edit 'strange': the neurons do not fit the model"):
        ns.sweep(case.build(), {"strange": other}, loader)
    assert loader.passes == 0


def test_bad_edits_and_metrics() -> None:
    case = CASES["mlp"]
    with pytest.raises(TypeError, match="edits are a mapping label -> edit, not a list"):
        ns.sweep(case.build(), [ns.compose()], case.batches())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric must return one value per example"):
        ns.sweep(case.build(), {}, case.batches(), metric=lambda logits, targets: logits.mean())
    with pytest.raises(ValueError, match="no examples of any group"):
        ns.sweep(case.build(), {}, iter(()))


def test_outcomes_keep_bits_and_numbers() -> None:
    parts = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.25]), torch.zeros(9)]
    outcomes = Outcomes.joined(Outcomes.of(part.double()) for part in parts)
    assert torch.equal(outcomes.values(), torch.cat(parts).double())


# Statistics


binary = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)


@given(pairs=binary)
def test_statistics_of_binary_values_equal_the_reference(pairs: list[tuple[float, float]]) -> None:
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    assert paired_interval(before, after) == pytest.approx(reference.bonett_price(list(before), list(after), 0.95))
    assert paired_p_value(before, after) == pytest.approx(reference.mcnemar(list(before), list(after)))


def test_statistics_of_other_values_equal_the_reference() -> None:
    generator = np.random.default_rng(0)
    for n in (2, 3, 4, 7, 30, 101):
        before, after = generator.normal(size=(2, n))
        expected = reference.paired_t_interval(list(before), list(after), 0.9)
        assert paired_interval(before, after, 0.9) == pytest.approx(expected, rel=1e-6)
        assert paired_p_value(before, after) == pytest.approx(
            reference.paired_t_p_value(list(before), list(after)), abs=1e-8
        )


def test_statistics_at_the_edges() -> None:
    one = np.array([0.3])
    assert paired_interval(one, one + 1) == (-np.inf, np.inf)
    assert paired_p_value(np.array([0.1, 0.2]), np.array([0.1, 0.2])) == 1.0
    assert student_cdf(0.0, 5) == 0.5
    assert student_quantile(0.975, 1) == pytest.approx(12.7062047, rel=1e-7)
    assert student_quantile(0.975, 10) == pytest.approx(2.2281389, rel=1e-7)
    assert student_quantile(0.975, 100000) == pytest.approx(1.959988, rel=1e-5)


def test_a_copy_of_the_model_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["residual"]
    model = case.build()
    edits = every_kind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = ns.sweep(model, edits, case.batches(), metric=fingerprint)
        second = ns.sweep(copy.deepcopy(model), edits, case.batches(), metric=fingerprint)
    assert all(torch.equal(first.values(label), second.values(label)) for label in edits)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("worth", [1e9, 1e-9])
def test_little_work_is_done_without_a_capture_and_the_rest_of_more_with_one(
    worth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, whether all edits are run one by one, or the first one alone, in the middle of a batch."""
    captures: list[Any] = []
    real = trust.capture
    monkeypatch.setattr(trust, "capture", lambda *args, **kwargs: captures.append(args) or real(*args, **kwargs))
    monkeypatch.setattr(trust, "WORTH", worth)
    case = CASES["residual"]
    swept = assert_equal_one_by_one(case.build(), every_kind(case.build()), case.batches())
    assert bool(captures) == (worth < 1)
    assert swept.reasons == (() if worth < 1 else ("there was less to run than a capture takes",))


@dataclass
class Streamed:
    """Batches of which it is known, at best, about how many there are."""

    batches: Sequence[Any]
    about: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __length_hint__(self) -> int:
        return self.about


@pytest.mark.parametrize("about", [0, 40])
def test_batches_to_come_are_a_reason_for_a_capture(about: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are less than a capture takes; forty are more, as far as the loader says."""
    clock = itertools.count()  # on which each edit takes a second
    monkeypatch.setattr(trust, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(trust, "WORTH", 50.0)
    captures: list[Any] = []
    real = trust.capture
    monkeypatch.setattr(trust, "capture", lambda *args, **kwargs: captures.append(args) or real(*args, **kwargs))
    case = CASES["mlp"]
    edits = every_kind(case.build())
    swept = assert_equal_one_by_one(case.build(), edits, Streamed(case.batches(sizes=(4, 4)), about))
    assert bool(captures) == (about > 0)
    assert bool(swept.reasons) == (about == 0)
