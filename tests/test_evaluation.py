"""Metrics per group are the reference's means, and evaluating leaves no trace."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES, FAST, Case, small_case

import neuronsurgery as ns
from neuronsurgery.batches import Examples, join, unpack_batch
from neuronsurgery.evaluation import GroupMetrics

METRICS = GroupMetrics(("landbird", "waterbird", 3), (0.9, 0.5, 0.7), (30, 10, 60), larger_is_better=True)


def loss_of(case: Case) -> tuple[Any, Any]:
    """The library's loss as a metric, and the reference's."""
    if case.causal:
        return ns.causal_lm_loss, reference.causal_lm_loss
    return ns.cross_entropy, reference.cross_entropy


# --- the reference --------------------------------------------------------------------------------------------------


@small_case
def test_group_means_are_the_reference_on_every_architecture(case: Case) -> None:
    """Accuracy and the mean loss, in one pass; the models come in training mode."""
    loss, right = loss_of(case)
    batches = case.batches(1)
    metrics = {"loss": loss} if case.causal else {"loss": loss, "accuracy": ns.accuracy}
    found = ns.evaluate(case.build(), batches, metric=metrics)
    losses = reference.group_means(case.build(), batches, right)
    assert found["loss"].groups == tuple(losses)
    assert found["loss"].counts == tuple(reference.group_counts(batches).values())
    assert found["loss"].values == pytest.approx(tuple(losses.values()), rel=1e-4)
    if not case.causal:
        hits = reference.group_means(case.build(), batches, reference.accuracy)
        assert found["accuracy"].values == pytest.approx(tuple(hits.values()), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(10)), size=st.integers(1, 10), groups=st.integers(1, 4))
def test_loaders_per_group_and_mixed_ones_agree(order: list[int], size: int, groups: int) -> None:
    x, y = torch.randn(10, 5), torch.randint(3, (10,))
    g = torch.arange(10) % groups
    model, data = CASES["mlp"].build(), [(x, y, g)]
    right = ns.evaluate(model, data)
    mixed = [(x[part], y[part], g[part]) for part in torch.tensor(order).split(size)]
    assert ns.evaluate(model, mixed) == right
    assert ns.evaluate(model, {i: [(x[g == i], y[g == i])] for i in range(groups)}) == right


def test_a_mapping_keeps_its_order_and_mixed_groups_ascend() -> None:
    model, x, y = nn.Linear(2, 2), torch.randn(3, 2), torch.tensor([0, 1, 0])
    assert ns.evaluate(model, {"b": [(x, y)], "a": [(x, y)], 0: [(x, y)]}).groups == ("b", "a", 0)
    assert ns.evaluate(model, [(x, y, torch.tensor([10, 9, -1]))]).groups == (-1, 9, 10)
    assert ns.evaluate(model, [(x, y, ["b", "a", "b"])]).groups == ("a", "b")
    assert ns.evaluate(model, [(x, y)]).groups == ("all",)


# --- accuracy -------------------------------------------------------------------------------------------------------


def ignored(classes: int, *shape: int) -> Tensor:
    targets = torch.randint(classes, shape)
    targets[:, ..., 0] = -100
    return targets


ACCURACY: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "classes": lambda: (torch.randn(40, 3), torch.randint(3, (40,))),
    "narrow labels": lambda: (torch.randn(40, 3), torch.randint(3, (40,), dtype=torch.uint8)),
    "probabilities": lambda: (torch.randn(40, 3), torch.randn(40, 3).softmax(1)),
    "tokens": lambda: (torch.randn(40, 7, 3), ignored(3, 40, 7)),
    "pixels": lambda: (torch.randn(40, 3, 4, 5), ignored(3, 40, 4, 5)),
    "soft pixels": lambda: (torch.randn(40, 3, 4, 5), torch.randn(40, 3, 4, 5).softmax(1)),
}


@pytest.mark.parametrize("make", ACCURACY.values(), ids=ACCURACY)
def test_accuracy_is_the_reference(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    logits, targets = make()
    found = ns.accuracy(logits, targets)
    assert (found.shape, found.dtype) == ((40,), torch.float32)
    torch.testing.assert_close(found.double(), reference.accuracy(logits, targets))
    assert 0 < found.mean() < 1


def test_an_example_of_which_nothing_counts_is_wrong() -> None:
    assert ns.accuracy(torch.randn(2, 4, 3), torch.full((2, 4), -100)).tolist() == [0, 0]


# --- the call -------------------------------------------------------------------------------------------------------


def test_all_metrics_see_one_forward_and_batches_are_not_regrouped() -> None:
    model, sizes = nn.Linear(2, 3), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    data = [(torch.randn(n, 2), torch.randint(3, (n,)), torch.arange(n) % 2) for n in (4, 1, 3)]
    seen: list[Tensor] = []

    def spy(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(logits)
        return logits[:, 0] > 0

    found = ns.evaluate(model, data, metric={"a": spy, "b": spy, "accuracy": ns.accuracy})
    assert sizes == [4, 1, 3]
    assert all(first is second for first, second in zip(seen[::2], seen[1::2], strict=True))
    assert found["a"] == found["b"]
    assert list(found) == ["a", "b", "accuracy"]
    assert not seen[0].requires_grad


def test_predict_and_unpack_are_the_callers() -> None:
    model, rows = nn.Linear(2, 3), [{"pixels": torch.randn(4, 2), "answer": torch.randint(3, (4,))}]

    def unpack(row: dict[str, Tensor]) -> ns.Batch:
        return ns.Batch((row["pixels"],), {}, row["answer"])

    plain = ns.evaluate(model, rows, unpack=unpack, metric=ns.cross_entropy)
    same = ns.evaluate(model, rows, unpack=unpack, metric=ns.cross_entropy, predict=lambda output: output + 1)
    flat = ns.evaluate(model, rows, unpack=unpack, metric=ns.cross_entropy, predict=lambda output: output * 0)
    assert same.average == pytest.approx(plain.average)
    assert flat.average == pytest.approx(torch.tensor(3.0).log().item())


def test_the_callers_autocast_is_respected() -> None:
    model, dtypes = nn.Linear(2, 3), []
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    data = [(torch.randn(4, 2), torch.randint(3, (4,)))]
    ns.evaluate(model, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ns.evaluate(model, data)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_it_works_without_gradient_and_in_inference_mode() -> None:
    case = CASES["weight_norm"]
    model, batches = case.build(), case.batches()
    right = ns.evaluate(model, batches)
    with torch.no_grad():
        assert ns.evaluate(model, batches) == right
    with torch.inference_mode():
        assert ns.evaluate(model, batches) == right


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_of_attention_is_off_inside_and_restored(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    case, inside = CASES["encoder"], []

    def spy(logits: Tensor, targets: Tensor) -> Tensor:
        inside.append(torch.backends.mha.get_fastpath_enabled())
        return ns.accuracy(logits, targets)

    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("broken")

    ns.evaluate(case.build(), case.batches(), metric=spy)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    with pytest.raises(ArithmeticError, match="broken"):
        ns.evaluate(case.build(), case.batches(), metric=broken)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert not any(inside)
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", [*FAST, "norm_dropout", "encoder", "spectral_norm", "gpt2"])
def test_nothing_changes(name: str) -> None:
    """In training mode, with gradients and hooks, half of the modules in evaluation mode."""
    case = CASES[name]
    model, batches = case.build(), case.batches()
    for i, (module, parameter) in enumerate(zip(model.children(), model.parameters(), strict=False)):
        parameter.grad = torch.randn_like(parameter) if i % 2 else None
        module.train(i % 2 == 0)
    model.register_forward_hook(lambda module, args, output: None)
    loaders, metrics = {"one": batches, "two": batches[:1]}, {"accuracy": ns.accuracy, "loss": ns.cross_entropy}
    before = snapshot(model, batches, loaders, metrics)
    ns.evaluate(model, batches)
    ns.evaluate(model, loaders, metric=metrics)
    ns.magnitudes(model)
    assert_unchanged(before, model, batches, loaders, metrics)


def test_a_view_is_evaluated_as_the_baked_model() -> None:
    case = CASES["residual"]
    model, batches = case.build(), case.batches()
    edit = ns.zero_out(ns.topk(ns.magnitudes(model), 5))
    found = ns.evaluate(ns.apply(edit, model), batches, metric=ns.cross_entropy)
    assert found == ns.evaluate(ns.bake(edit, model), batches, metric=ns.cross_entropy)
    assert found != ns.evaluate(model, batches, metric=ns.cross_entropy)


def test_the_default_metric_never_shifts_labels() -> None:
    case = CASES["gpt2_lm"]
    text = "the labels are the input tokens: a causal language model's .* never shifted by accuracy. Pass metric="
    for metric in ({}, {"metric": {"ours": ns.accuracy}}):
        with pytest.raises(ValueError, match=text):
            ns.evaluate(case.build(), case.batches(), **metric)


def test_progress_is_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = nn.Linear(2, 2), (torch.randn(3, 2), torch.tensor([0, 1, 0]))
    ns.evaluate(model, {"blond": [batch], "dark": [batch]}, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["evaluation of blond", "evaluation of dark"]


# --- GroupMetrics ---------------------------------------------------------------------------------------------------


def test_means_over_groups_and_examples() -> None:
    assert METRICS["waterbird"] == 0.5
    assert METRICS[3] == METRICS.values[2]
    assert METRICS.worst == METRICS.min == 0.5 and METRICS.max == 0.9
    assert METRICS.average == pytest.approx((0.9 * 30 + 0.5 * 10 + 0.7 * 60) / 100)
    assert METRICS.balanced == pytest.approx(0.7)
    assert METRICS.weighted({"landbird": 1, "waterbird": 3, 3: 0}) == pytest.approx(0.6)
    assert METRICS.weighted(dict(zip(METRICS.groups, METRICS.counts, strict=True))) == METRICS.average
    assert METRICS.to_records()[1] == {"group": "waterbird", "value": 0.5, "count": 10}


def test_the_worst_group_goes_by_the_direction_of_the_metric() -> None:
    data = [(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), torch.tensor([0, 1]))]
    model = nn.Identity()
    for metric in (ns.accuracy, ns.margin):
        assert ns.evaluate(model, data, metric=metric).worst == ns.evaluate(model, data, metric=metric)[1]
    loss = ns.evaluate(model, data, metric=ns.cross_entropy)
    assert loss.worst == loss[1] == loss.max > loss.min
    bound = ns.evaluate(model, data, metric=functools.partial(ns.cross_entropy))
    assert bound == loss

    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        return (1 - ns.margin(logits, targets)).clamp(min=0)

    unknown = ns.evaluate(model, data, metric=hinge)
    assert "min 0.0000, max 2.0000, average" in repr(unknown)
    with pytest.raises(ValueError, match="no group is the worst: pass larger_is_better= to evaluate or sweep, or"):
        _ = unknown.worst
    assert ns.evaluate(model, data, metric=hinge, larger_is_better=False).worst == 2.0
    both = ns.evaluate(model, data, metric={"h": hinge, "a": ns.accuracy}, larger_is_better={"h": False})
    assert (both["h"].worst, both["a"].worst) == (2.0, 0.0)
    with pytest.raises(ValueError, match="larger_is_better= names 'hinge'; there are 'h'"):
        ns.evaluate(model, data, metric={"h": hinge}, larger_is_better={"hinge": False})


def test_metrics_are_a_mapping_of_groups() -> None:
    expected = {"landbird": 0.9, "waterbird": 0.5, 3: 0.7}
    assert dict(METRICS) == expected == dict(METRICS.items()) and list(METRICS) == list(METRICS.keys()) == list(
        expected
    )
    assert len(METRICS) == 3 and "waterbird" in METRICS and "land" not in METRICS and 3 in METRICS
    assert METRICS.get("land") is None and METRICS.get("land", 0.1) == 0.1 and METRICS.get(3) == 0.7
    assert METRICS.values == (0.9, 0.5, 0.7)
    table = METRICS._repr_html_()
    assert "<th>group</th>" in table and ">waterbird</td>" in table and ">0.5</td>" in table and ">10</td>" in table
    escaped = GroupMetrics(("<b>", "a"), (0.1, 0.2), (1, 1))._repr_html_()
    assert ">&lt;b&gt;</td>" in escaped


def test_groups_are_found_by_name_and_weights_are_for_all_of_them() -> None:
    for group in (0, "land", -1):
        with pytest.raises(KeyError, match=f"no group {group!r}; there are 'landbird', 'waterbird', 3"):
            METRICS[group]
    text = r"one non-negative weight for each of the groups \['landbird', 'waterbird', 3\], not"
    wrong: list[dict[Any, float]] = [{}, {"landbird": 1}, {"landbird": -1, "waterbird": 1, 3: 1}]
    for proportions in [*wrong, dict.fromkeys(METRICS.groups, 0.0)]:
        with pytest.raises(ValueError, match=text):
            METRICS.weighted(proportions)


def test_metrics_are_hashable_values() -> None:
    again = GroupMetrics(METRICS.groups, METRICS.values, METRICS.counts, True)
    assert again == METRICS
    assert hash(again) == hash(METRICS)
    assert ns.evaluate(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))]) == GroupMetrics(
        ("all",), (1.0,), (2,), True
    )


@pytest.mark.parametrize("groups", [1, 14, 15, 300])
def test_repr_has_at_most_20_lines(groups: int) -> None:
    text = repr(GroupMetrics(tuple(range(groups)), (0.25,) * groups, (4,) * groups, larger_is_better=False))
    assert len(text.splitlines()) <= 20
    said = "worst 0.2500, average 0.2500, balanced 0.2500"
    assert text.splitlines()[0] == f"GroupMetrics of {groups} groups: {said}"
    assert text.splitlines()[1] == "  0: 0.2500 (4 examples)"
    assert (f"... and {groups - 14} more" in text) == (groups > 14)


def test_sums_are_wide() -> None:
    """The mean of many float32 values is not rounded on the way."""
    data = [(torch.full((1000, 1), 0.1), torch.zeros(1000, dtype=torch.long))] * 20
    found = ns.evaluate(nn.Identity(), data, metric=lambda logits, targets: logits[:, 0])
    assert found.average == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_accuracy_of_one_batch_is_that_of_its_examples() -> None:
    """Also when batches are cut apart and joined: what the helpers of other tests rely on."""
    case = CASES["mlp"]
    model, (first, *_) = case.build(), case.batches()
    batch = unpack_batch(first)
    parts = [Examples.of(batch).take([i]) for i in range(len(batch))]
    examples = [part.batch() for part in parts]
    random.shuffle(examples)
    assert ns.evaluate(model, [join(parts).batch()]) == ns.evaluate(model, [first]) == ns.evaluate(model, examples)
    assert F.cross_entropy(model.eval()(batch.args[0]), batch.targets).item() == pytest.approx(
        ns.evaluate(model, [first], metric=ns.cross_entropy).average, rel=1e-6
    )
