"""Small groups that share a batch have the norms that they have alone, whatever the model; and they do share one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import CASES, FAST, Case, every_case

import neuronsurgery as ns
from neuronsurgery import gradients, loaders, segments
from neuronsurgery.batches import unpack_batch
from neuronsurgery.loaders import regrouped, regrouped_to_the_last
from neuronsurgery.scores import Scores

ROUNDING = 1e-5  # of the largest norm of a layer, in float32
SIZES = (5, 1, 3, 2, 4, 1, 6, 2, 1)
"""Examples of each group."""


class Outcomes:
    """Which joint batches were run, True, and which were not, False."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[bool] = []
        original = segments.Segments._norms

        def spied(*args: Any) -> Any:
            self.found.append(False)
            found = original(*args)
            self.found[-1] = True
            return found

        monkeypatch.setattr(segments.Segments, "_norms", spied)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Outcomes:
    """Groups of any size that fill no batch share batches."""
    monkeypatch.setattr(loaders, "SMALL", 1.0)
    monkeypatch.setattr(loaders, "FEWEST", 2)
    return Outcomes(monkeypatch)


def grouped(*shape: int, batch: int = 8, sizes: tuple[int, ...] = SIZES, classes: int = 3) -> list[Any]:
    """Normal inputs of a shape, the examples of all groups in random order."""
    names = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    names = names[torch.randperm(len(names))]
    x, y = torch.randn(len(names), *shape), torch.randint(classes, (len(names),))
    return list(zip(x.split(batch), y.split(batch), names.split(batch), strict=True))


def by_group(data: list[Any]) -> dict[int, list[Any]]:
    """The same as a mapping of loaders, which knows no joint batches."""
    x, y, g = (torch.cat(parts) for parts in zip(*data, strict=True))
    return {int(name): [(x[g == name], y[g == name])] for name in g.unique()}


def assert_close(found: Scores, right: Scores, tolerance: float = ROUNDING) -> None:
    assert (found.groups, found.counts) == (right.groups, right.counts)
    for (layer, a), b in zip(found.by_layer().items(), right.by_layer().values(), strict=True):
        error = (a - b).abs().amax(1)
        assert bool((error <= tolerance * b.amax(1)).all()), f"{layer}: {error}"


def assert_reference(model: nn.Module, data: list[Any], found: Scores, tolerance: float = ROUNDING) -> None:
    axes = {layer.parameter: layer.default_cut for layer in found.layout}
    right = reference.group_grad_norms(model, data, axes)  # type: ignore[arg-type]  # all patterns are default ones
    for group, layers in right.items():
        for layer, values in found[group].by_layer().items():
            error = (values[0].double() - layers[layer.parameter]).abs().max()
            assert error <= tolerance * layers[layer.parameter].max(), f"group {group}, {layer.parameter}: {error:.2e}"


# --- which groups share a batch -------------------------------------------------------------------------------------


def stream(groups: list[int], batch: int) -> list[ns.Batch]:
    """Examples that are numbered, in batches."""
    numbers, names = torch.arange(len(groups)).split(batch), torch.tensor(groups).split(batch)
    return [ns.Batch((x.float(),), {}, x, tuple(g.tolist())) for x, g in zip(numbers, names, strict=True)]


@settings(deadline=None, max_examples=100)
@given(groups=st.lists(st.integers(0, 12), min_size=1, max_size=80), batch=st.integers(1, 30))
def test_each_example_is_run_once_and_small_groups_whole(groups: list[int], batch: int) -> None:
    batches = stream(groups, batch)
    full = max(map(len, batches))
    numbers: dict[int, list[int]] = {}
    for own, whole, last in regrouped_to_the_last(batches, joint=True):
        assert len(whole) <= full
        assert torch.cat([part.targets for part in own.values()]).tolist() == whole.targets.tolist()
        assert torch.cat([part.args[0] for part in own.values()]).tolist() == whole.targets.tolist()
        for group, part in own.items():
            assert isinstance(group, int)
            assert part.groups == (group,) * len(part)
            if len(own) > 1:
                assert last
                assert len(part) == groups.count(group) <= full * loaders.SMALL
            numbers.setdefault(group, []).extend(part.targets.tolist())
    assert numbers == {group: [i for i, g in enumerate(groups) if g == group] for group in numbers}
    assert sum(map(len, numbers.values())) == len(groups)


def test_without_joint_batches_each_is_of_one_group() -> None:
    batches = stream([0, 1, 2, 3, 4, 5, 6, 7, 8] * 2, 9)
    alone = [(list(own), whole.targets.tolist(), last) for own, whole, last in regrouped_to_the_last(batches)]
    assert alone == [([group], [group, group + 9], True) for group in range(9)]
    assert [(group, batch.targets.tolist()) for group, batch in regrouped(batches)] == [
        (group, [group, group + 9]) for group in range(9)
    ]
    ((own, whole, _), *rest) = regrouped_to_the_last(batches, joint=True)
    assert (list(own), len(whole)) == ([0, 1, 2, 3], 8)
    assert [len(batch) for _, batch, _ in rest] == [8, 2]


def test_few_small_groups_and_groups_of_several_batches_or_shapes_run_alone() -> None:
    def shared(batches: list[ns.Batch]) -> list[list[Any]]:
        return [list(own) for own, _, _ in regrouped_to_the_last(batches, joint=True) if len(own) > 1]

    few, enough = list(range(loaders.FEWEST - 1)), list(range(loaders.FEWEST))
    assert shared(stream(few, 40)) == []
    assert shared(stream(enough, 40)) == [enough]
    large = [20] * 11
    assert shared(stream([*enough, *large], 40)) == [enough]
    assert shared(stream([*enough, *[21] * 41], 40)) == [enough], "of group 21 one batch is full"
    wide = ns.Batch((torch.zeros(1, 2),), {}, torch.zeros(1), (3,))
    assert shared([*stream([*enough, 8], 40), wide]) == [[0, 1, 2, 4, 5, 6, 7, 8]]


def test_a_table_with_as_many_rows_as_a_joint_batch_stays_whole() -> None:
    table = torch.randn(8, 5)
    batch = ns.Batch((torch.randn(40, 3), table), {}, torch.zeros(40), (*range(8), *[9] * 32))
    (own, whole, _), *_ = regrouped_to_the_last([batch], joint=True)
    assert len(whole) == len(own) == 8
    assert all(torch.equal(part.args[1], table) for part in (whole, *own.values()))
    assert all(len(part.args[0]) == 1 for part in own.values())


# --- operators ------------------------------------------------------------------------------------------------------


class Read(nn.Module):
    """A function of the input and of one more module, before a linear head."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, features: int) -> None:
        super().__init__()
        self.function, self.inner, self.fc = function, module, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.inner, x))


@torch.no_grad()
def without_gradient(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x)


def network(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "linear over tokens": (lambda: network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2), features=10), (5, 4)),
    "linear over a grid": (lambda: network(nn.Linear(4, 2, bias=False), nn.Tanh(), features=12), (2, 3, 4)),
    "1d": (lambda: network(nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 2, 2), features=8), (4, 7)),
    "2d": (lambda: network(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 2, 3), features=8), (3, 6, 6)),
    "3d": (lambda: network(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Conv3d(4, 2, 2), features=16), (2, 4, 4, 4)),
    "groups": (lambda: network(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=2), features=16),
               (4, 6, 6)),
    "depthwise": (lambda: network(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Tanh(), features=64),
                  (4, 4, 4)),
    "dilation": (lambda: network(nn.Conv2d(3, 4, 3, dilation=2), nn.Tanh(), features=16), (3, 6, 6)),
    "stride": (lambda: network(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 0)), nn.Tanh(), features=48), (3, 6, 6)),
    "same": (lambda: network(nn.Conv2d(3, 2, 3, padding="same", dilation=2), nn.Tanh(), features=32), (3, 4, 4)),
    "valid": (lambda: network(nn.Conv1d(3, 2, 3, padding="valid"), nn.Tanh(), features=8), (3, 6)),
    "circular": (lambda: network(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), features=32), (3, 4, 4)),
    "transposed": (
        lambda: network(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(6, 2, 2, dilation=2),
            features=128,
        ),
        (4, 3, 3),
    ),
    "transposed 1d": (lambda: network(nn.ConvTranspose1d(4, 3, 3, bias=False), features=15), (4, 3)),
    "transposed 3d": (lambda: network(nn.ConvTranspose3d(2, 3, 2), features=81), (2, 2, 2, 2)),
    "frozen front": (lambda: network(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Tanh(), features=16), (3, 4, 4)),
    "read without a gradient, too": (
        lambda: Read(lambda m, x: without_gradient(m, x) + m(x).tanh(), nn.Linear(4, 4), 4), (4,)
    ),
}  # fmt: skip
"""Models, and the shape of an example, of which groups share batches."""


@pytest.mark.parametrize("name", SHARED)
def test_groups_that_share_a_batch_have_the_norms_of_the_reference(name: str, outcomes: Outcomes) -> None:
    make, shape = SHARED[name]
    model, data = make(), grouped(*shape)
    found = ns.group_grad_norms(model, data)
    assert outcomes.found
    assert all(outcomes.found)
    assert_reference(model, data, found)
    assert_close(found, ns.group_grad_norms(model, by_group(data)))


def test_channels_last(outcomes: Outcomes) -> None:
    model = SHARED["2d"][0]().to(memory_format=torch.channels_last)
    data = [(x.contiguous(memory_format=torch.channels_last), y, g) for x, y, g in grouped(3, 6, 6)]
    assert_reference(model, data, ns.group_grad_norms(model, data))
    assert all(outcomes.found)


def test_more_neurons_than_are_taken_at_once_and_larger_than_squares_are_summed_wide(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(300, 256), nn.Tanh(), nn.Linear(256, 3))
    data = grouped(300)
    right = ns.group_grad_norms(model, by_group(data))
    for at_once in (1, 2000, 2**30):
        monkeypatch.setattr(segments, "AT_ONCE", at_once)
        assert_close(ns.group_grad_norms(model, data), right)
    assert all(outcomes.found)


def test_tiny_gradients_are_still_ranked(outcomes: Outcomes) -> None:
    """Their squares would vanish in float32, in which those of large weights are summed."""
    model = nn.Sequential(nn.Linear(300, 256), nn.Tanh(), nn.Linear(256, 3))
    data = grouped(300)

    def faint(logits: Tensor, targets: Tensor) -> Tensor:
        return 1e-30 * ns.cross_entropy(logits, targets)

    plain, tiny = (ns.group_grad_norms(model, data, loss=loss) for loss in (None, faint))
    assert_close(dataclasses.replace(tiny, values=tiny.values * 1e30), plain)
    assert tiny.values.all()
    assert all(outcomes.found)


def test_heads_and_columns_as_neurons(outcomes: Outcomes) -> None:
    model, data = SHARED["linear over tokens"][0](), grouped(5, 4)
    heads = ns.Layer("0.weight", "(head d) i -> head d i", {"d": 3}, (6, 4), 0)
    columns = ns.Layer("2.weight", "o n -> n o", {}, (2, 6), 2)
    layout = ns.Layout((heads, columns))
    found = ns.group_grad_norms(model, data, layout=layout)
    assert_close(found, ns.group_grad_norms(model, by_group(data), layout=layout))
    assert found.values.shape == (len(SIZES), 8)
    assert all(outcomes.found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, outcomes: Outcomes) -> None:
    model = SHARED["2d"][0]().to(dtype)
    data = [(x.to(dtype), y, g) for x, y, g in grouped(3, 6, 6)]
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)), 0.05)
    assert all(outcomes.found)


# --- models ---------------------------------------------------------------------------------------------------------

JOINT = {
    *("linear", "mlp", "mlp_soft_targets", "mlp_frozen", "residual", "grouped", "norm_dropout", "conv1d", "conv3d"),
    *("unet", "unet_grouped", "weight_norm", "spectral_norm", "tied", "tied_head_first", "keyword"),
    *("resnet18", "resnext", "mobilenet", "vit", "convnext", "convnext_torchvision", "bert"),
}


@every_case
def test_every_architecture_gives_what_its_groups_give_alone(case: Case, outcomes: Outcomes) -> None:
    data = [unpack_batch(batch) for batch in case.batches(1, sizes=(11, 2))]
    loss = ns.causal_lm_loss if case.causal else None
    found = ns.group_grad_norms(case.build(), data, loss=loss)
    assert (bool(outcomes.found) and all(outcomes.found)) == (case.name in JOINT)
    loaders: dict[Any, list[ns.Batch]] = {}
    for group, batch in regrouped(data):
        loaders.setdefault(group, []).append(batch)
    right = ns.group_grad_norms(case.build(), {group: loaders[group] for group in sorted(loaders)}, loss=loss)
    assert_close(found, right)


def reads(function: Callable[[Any, Tensor], Tensor], inner: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> Any:
    return lambda: Read(function, inner(), 4)


def hidden(inner: nn.Linear, x: Tensor) -> Tensor:
    """As a compiled extension would, where nobody sees it."""
    with torch._C.DisableTorchFunction():
        return F.linear(x, inner.weight)


def swallowing(inner: nn.Linear, x: Tensor) -> Tensor:
    try:
        return x @ inner.weight.T
    except Exception:
        return x


def force(inner: nn.Linear, x: Tensor, create_graph: bool) -> Tensor:
    """A gradient, as forces are that of an energy."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        found = torch.autograd.grad(inner(x).tanh().square().sum(), x, create_graph=create_graph)[0]
    return found if create_graph else found + x


def under_autocast(inner: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return inner(x).float()


def recomputed(inner: nn.Linear, x: Tensor) -> Tensor:
    return checkpoint(lambda y: inner(y).tanh(), x, use_reentrant=False)  # type: ignore[no-any-return]


def two() -> nn.Module:
    return nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def where_negative(inner: nn.Linear, x: Tensor) -> Tensor:
    negative = x[:, :1] < 0
    return x + inner(x) * negative if negative.any() else x


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


class Experts(nn.Module):
    """Each example goes to one of two experts, by its first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        second, out = x[:, 0] > 0, x.new_zeros(len(x), 3)
        for chosen, expert in zip((~second, second), self.experts, strict=True):
            if chosen.any():
                out = out.index_copy(0, chosen.nonzero().flatten(), expert(x[chosen]))
        return out


ALONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "a bias is scored": (lambda: nn.Linear(4, 3), (4,), {"extra": "*bias"}),
    "a norm is scored": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), (4,), {"extra": "0.weight"}),
    "tied": (tied, (4,), {}),
    "a module used twice": (reads(lambda m, x: m(m(x).tanh())), (4,), {}),
    "a function reads a weight": (reads(lambda m, x: x @ m.weight.T), (4,), {}),
    "a function reads it, too": (reads(lambda m, x: m(x) + m.weight.sum()), (4,), {}),
    "a weight as the input of another": (
        reads(lambda m, x: x @ F.linear(m[0].weight, m[1].weight), two),
        (4,),
        {},
    ),
    "read where nobody sees it": (reads(hidden), (4,), {}),
    "read where nobody sees it, too": (reads(lambda m, x: m(x).tanh() + hidden(m, x)), (4,), {}),
    "what is raised is swallowed": (reads(swallowing), (4,), {}),
    "a force": (reads(functools.partial(force, create_graph=True)), (4,), {}),
    "a force that is cut off": (reads(functools.partial(force, create_graph=False)), (4,), {}),
    "sequence first": (reads(lambda m, x: m(x.transpose(0, 1)).tanh().mean(0)), (5, 4), {}),
    "tokens in one dimension": (reads(lambda m, x: m(x.flatten(0, 1)).view_as(x).tanh().mean(1)), (5, 4), {}),
    "an image alone": (reads(lambda m, x: torch.stack([m(y).flatten() for y in x]), lambda: nn.Conv2d(2, 1, 1)),
                       (2, 2, 2), {}),
    "same, one side more": (
        reads(lambda m, x: m(x).tanh().mean(2), lambda: nn.Conv1d(2, 4, 2, padding="same")), (2, 4), {}
    ),
    "a bias that depends on a weight": (
        reads(lambda m, x: F.linear(x, m[0].weight, m[1](x.new_ones(1, 4)).sum(0)), two), (4,), {}
    ),
    "autocast in the model": (reads(under_autocast), (4,), {}),
    "checkpointing": (reads(recomputed), (4,), {}),
    "attention": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
                                        nn.Linear(20, 3)), (5, 4), {}),
    "a dimension that is as large as the joint batch": (
        reads(lambda m, x: m(x.transpose(0, 1)).tanh().mean(0)), (sum(SIZES), 4), {}
    ),
}  # fmt: skip
"""Models, the shape of an example and options, with which each group runs alone."""


LATE = {"read where nobody sees it, too", "a force", "a force that is cut off", "checkpointing"}
"""Where the group that runs first does not tell."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:no gradient reached")
@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_share_a_batch_runs_alone(name: str, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen by how the weights are read, before any numbers are compared, and mostly in one small group."""
    together = []
    original = segments.Segments._together
    monkeypatch.setattr(segments.Segments, "_together", lambda *args: (together.append(1), original(*args))[1])
    monkeypatch.setattr(segments.Segments, "_agree", lambda *args: True)
    make, shape, options = ALONE[name]
    model, data = make(), grouped(*shape, batch=sum(SIZES))
    found = ns.group_grad_norms(model, data, **options)
    assert outcomes.found == [False], "it is tried once"
    assert bool(together) == (name in LATE)
    assert_close(found, ns.group_grad_norms(model, by_group(data), **options))


def test_what_is_tried_warns_of_nothing(outcomes: Outcomes) -> None:
    """The model can be run on some of the examples, only not as it is tried here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ns.group_grad_norms(ALONE["a force"][0](), grouped(4))
    assert outcomes.found == [False]
    assert caught == []


def test_embeddings(outcomes: Outcomes) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randint(7, (len(x), 3)), y, g) for x, y, g in grouped(3)]
    for options, shared in (({}, True), ({"extra": "0.weight"}, False)):
        outcomes.found.clear()
        found = ns.group_grad_norms(model, data, **options)  # type: ignore[arg-type]
        assert_close(found, ns.group_grad_norms(model, by_group(data), **options))  # type: ignore[arg-type]
        assert all(outcomes.found) == shared


@pytest.mark.parametrize("first", [True, False])
def test_experts_that_the_group_that_ran_alone_did_not_see(first: bool, outcomes: Outcomes) -> None:
    """All examples of a joint batch go to one expert: then it is shared; another batch has both."""
    data = grouped(4, batch=sum(SIZES), sizes=(2,) * 8)
    x, _, g = data[0]
    x[:, 0] = x[:, 0].abs()
    if not first:
        x[g == 3, 0] *= -1
    model = Experts()
    with pytest.warns(UserWarning, match="no gradient reached") if first else contextlib.nullcontext():
        found = ns.group_grad_norms(model, data)
    with pytest.warns(UserWarning, match="no gradient reached") if first else contextlib.nullcontext():
        assert_close(found, ns.group_grad_norms(model, by_group(data)))
    assert outcomes.found == [first]


@pytest.mark.filterwarnings("ignore:no gradient reached")
@pytest.mark.parametrize(("place", "shared"), [(None, True), (0, False), (-1, True)])
def test_what_only_some_examples_need_is_trusted_where_it_was_seen(
    place: int | None, shared: bool, outcomes: Outcomes
) -> None:
    """The group that comes last is the one that is run alone."""
    data = grouped(4, batch=16, sizes=(2,) * 8)
    x, _, g = data[0]
    negative = -1 if place is None else list(dict.fromkeys(g.tolist()))[place]
    x[:, 0] = torch.where(g == negative, -1.0, 1.0) * x[:, 0].abs()
    model = Read(where_negative, nn.Linear(4, 4), 4)
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)))
    assert outcomes.found == [shared]


@pytest.mark.parametrize("wrong", [lambda norm: norm * 1.01, lambda norm: norm * float("nan")])
def test_numbers_that_differ_from_those_alone_are_not_believed(
    wrong: Callable[[Tensor], Tensor], outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = segments._Linear.of_weight
    monkeypatch.setattr(segments._Linear, "of_weight", lambda *args: wrong(original(*args)))
    model, data = SHARED["linear over tokens"][0](), grouped(5, 4)
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)))
    assert outcomes.found == [False]


class Sorting(nn.Module):
    """Computes with its examples in the order of their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.fc(self.first(x[order]).tanh()[order.argsort()])


def test_a_permutation_of_the_examples_is_seen(outcomes: Outcomes) -> None:
    """All that a weight is read with has as many rows as there are examples; only the numbers tell."""
    model, data = Sorting(), grouped(4)
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)))
    assert outcomes.found == [False]


def test_autocast_of_the_caller(outcomes: Outcomes) -> None:
    model, data = SHARED["2d"][0](), grouped(3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)), 0.05)
    assert outcomes.found == []


def test_float16_gradients_are_scaled(outcomes: Outcomes) -> None:
    model, data = nn.Linear(4, 3).half(), [(x.half(), y, g) for x, y, g in grouped(4)]
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)), 0.01)
    assert outcomes.found == [False]


class Reentrant(nn.Module):
    """A part of it is cut off from the loss, as torch warns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.inner, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_cuts_the_gradient_off_as_ever(outcomes: Outcomes) -> None:
    model, data = Reentrant(), grouped(4)
    with pytest.warns(UserWarning, match=r"no gradient reached 1 of 2 scored layers, whose scores are 0: inner.weight"):
        found = ns.group_grad_norms(model, data)
    with pytest.warns(UserWarning, match="no gradient reached 1 of 2"):
        assert_close(found, ns.group_grad_norms(model, by_group(data)))
    assert all(outcomes.found)


# --- laws -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(sum(SIZES))), batch=st.integers(2, 25))
def test_neither_order_nor_batch_size_matters(order: list[int], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "SMALL", 1.0)
        patch.setattr(loaders, "FEWEST", 2)
        torch.default_generator.manual_seed(0)
        model, ((x, y, g),) = SHARED["linear over tokens"][0](), grouped(5, 4, batch=100)
        mixed = [part.split(batch) for part in (x[order], y[order], g[order])]
        found = ns.group_grad_norms(model, list(zip(*mixed, strict=True)))
        assert_close(found, ns.group_grad_norms(model, by_group([(x, y, g)])))


def test_several_shapes_in_one_stream(outcomes: Outcomes) -> None:
    """Groups of one length each, and one of both, which runs alone."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.first(x).tanh().mean(1))

    model = Mean()
    short, long = grouped(3, 4), [(x, y, torch.where(g > 0, g + 20, g)) for x, y, g in grouped(5, 4)]
    found = ns.group_grad_norms(model, [*short, *long])
    assert len(outcomes.found) >= 2
    assert all(outcomes.found)
    for data in (short, long):
        right = ns.group_grad_norms(model, {g: b for g, b in by_group(data).items() if g > 0})
        for group in right.groups:
            torch.testing.assert_close(found[group].values, right[group].values)
    both = ns.group_grad_norms(model, {0: [*by_group(short)[0], *by_group(long)[0]]})
    torch.testing.assert_close(found[0].values, both.values)


@pytest.mark.parametrize("name", [*FAST, "norm_dropout", "mlp_frozen", "spectral_norm", "gpt2"])
def test_nothing_changes(name: str, outcomes: Outcomes) -> None:
    case = CASES[name]
    model, batches = case.build(), case.batches(1, sizes=(11, 2))
    model.register_forward_hook(lambda module, args, output: None)
    before = snapshot(model, batches)
    ns.group_grad_norms(model, batches)
    assert outcomes.found
    assert_unchanged(before, model, batches)


# --- errors and warnings --------------------------------------------------------------------------------------------


def test_a_bad_example_is_named_by_its_group(outcomes: Outcomes) -> None:
    model, data = nn.Linear(4, 3), grouped(4)
    for x, _, g in data:
        x[g == 5] = float("nan")
    with pytest.raises(ValueError, match="group 5") as found:
        ns.group_grad_norms(model, data)
    with pytest.raises(ValueError, match="group 5") as right:
        ns.group_grad_norms(model, by_group(data))
    assert str(found.value) == str(right.value)


@pytest.mark.parametrize("group", range(len(SIZES)))
def test_a_bad_gradient_is_named_by_its_group_and_no_other(group: int, outcomes: Outcomes) -> None:
    """The root of 0 is 0, its slope infinite."""
    model, data = nn.Linear(4, 3, bias=False), grouped(4)
    for x, _, g in data:
        x[g == group] = 0.0

    def root(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.square().sum(1).sqrt()

    with pytest.raises(ValueError, match=rf"the gradients of group {group} are NaN or infinite in 1 layers"):
        ns.group_grad_norms(model, data, loss=root)


def test_a_bad_label_is_refused_as_ever(outcomes: Outcomes) -> None:
    model, data = nn.Linear(4, 3), grouped(4)
    data[-1][1][0] = 7
    with pytest.raises(ValueError, match="7"):
        ns.group_grad_norms(model, data)


def test_examples_that_depend_on_each_other_are_refused(outcomes: Outcomes) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="pass regroup=False"):
        ns.group_grad_norms(model, grouped(4, sizes=(2, 3, 2, 4, 3)))
    assert outcomes.found == [False]


def test_single_examples_that_would_depend_on_each_other_run_alone(outcomes: Outcomes) -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=False), nn.Flatten(), nn.Linear(20, 3)
    )
    data = grouped(4, 5, sizes=(1,) * 6)
    assert_close(ns.group_grad_norms(model, data), ns.group_grad_norms(model, by_group(data)))
    assert outcomes.found == [False]


def test_a_model_that_draws_runs_its_groups_alone(outcomes: Outcomes) -> None:
    model, data = Read(lambda m, x: m(x + torch.randn_like(x)), nn.Linear(4, 4), 4), grouped(4)
    assert ns.group_grad_norms(model, data).counts == SIZES
    assert outcomes.found == [False]


def test_a_layer_that_no_gradient_reaches_is_warned_about(outcomes: Outcomes) -> None:
    model, data = Read(lambda m, x: m(x).detach() + x, nn.Linear(4, 4), 4), grouped(4)
    with pytest.warns(UserWarning, match=r"no gradient reached 1 of 2 scored layers, whose scores are 0: inner.weight"):
        found = ns.group_grad_norms(model, data)
    assert all(outcomes.found)
    assert [bool(values.any()) for values in found.by_layer().values()] == [False, True]


def test_outputs_that_look_like_probabilities_are_warned_about(outcomes: Outcomes) -> None:
    with pytest.warns(UserWarning, match="outputs look like probabilities"):
        ns.group_grad_norms(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), grouped(4))
    assert all(outcomes.found)


# --- what it costs --------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Forward passes are counted."""

    forwards: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        Counting.forwards.append(len(x))
        return self.fc(self.first(x).tanh())


def test_many_small_groups_take_as_many_passes_as_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 groups of two in batches of 32; the last group is run alone, too, and one of its examples."""
    outcomes, sums = Outcomes(monkeypatch), []
    monkeypatch.setattr(gradients.GroupSum, "add", lambda self, *args: sums.append(self))
    Counting.forwards = []
    found = ns.group_grad_norms(Counting(), grouped(2, batch=32, sizes=(2,) * 64))
    assert found.counts == (2,) * 64
    assert Counting.forwards == [2, 1, 32, 32, 32, 32]
    assert outcomes.found == [True] * 4
    assert sums == [], "the gradients of no group are held"


def test_where_groups_cannot_share_a_batch_it_is_known_after_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.forwards = []
    ns.group_grad_norms(Counting(), grouped(2, batch=32, sizes=(2,) * 64), extra="*.bias")
    assert Counting.forwards == [2, 2, 1, *[2] * 63]


def test_large_groups_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = Outcomes(monkeypatch)
    ns.group_grad_norms(nn.Linear(2, 3), grouped(2, batch=32, sizes=(31, 17, 10, 6)))
    ns.group_grad_norms(nn.Linear(2, 3), grouped(2, batch=32, sizes=(9,) * 12))
    assert outcomes.found == []


def test_several_processes_sum_up_first(outcomes: Outcomes, tmp_path: Path) -> None:
    """Each may have a part of any group."""
    model, data = nn.Linear(4, 3), grouped(4)
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        found = ns.group_grad_norms(model, data, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert outcomes.found == []
    assert_close(found, ns.group_grad_norms(model, data))
    assert all(outcomes.found)
