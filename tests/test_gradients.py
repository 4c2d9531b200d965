"""Group gradients are those of the float64 reference however the data come, at one forward and backward an example."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import CASES, FAST, Case, every_case, fast_case

import neuronsurgery as ns
from neuronsurgery import gradients, sums
from neuronsurgery.batches import Examples, join, map_tensors, unpack_batch
from neuronsurgery.scores import Scores
from neuronsurgery.sums import GroupSum

SEED = 1  # with seed 0 a ReLU of resnext stands within rounding of its kink
ROUNDING = 1e-5  # of the largest norm of a layer, in float32
Expected = dict[Any, dict[str, Tensor]]


@functools.cache
def expected(name: str) -> Expected:
    case = CASES[name]
    loss = reference.causal_lm_loss if case.causal else reference.cross_entropy
    return reference.group_grad_norms(case.build(), case.batches(SEED), case.axes, loss)


def assert_norms(found: Scores, right: Expected, tolerance: float = ROUNDING) -> None:
    assert found.groups == tuple(right)
    for group, layers in right.items():
        assert list(layers) == [layer.parameter for layer in found.layout]
        for name, values in named(found[group].by_layer()).items():
            error = (values[0].double() - layers[name]).abs().max()
            assert error <= tolerance * layers[name].max(), f"group {group}, {name}: {error:.2e}"


def score(case: Case, model: nn.Module, loaders: Any, **options: Any) -> Scores:
    return ns.group_grad_norms(model, loaders, loss=ns.causal_lm_loss if case.causal else None, **options)


def singles(batches: Sequence[Any]) -> list[ns.Batch]:
    """The examples, one a batch."""
    unpacked = [unpack_batch(batch) for batch in batches]
    return [Examples.of(batch).take([i]).batch() for batch in unpacked for i in range(len(batch))]


def joined(examples: Sequence[ns.Batch]) -> ns.Batch:
    return join([Examples.of(example) for example in examples]).batch()


def in_batches(examples: Sequence[ns.Batch], sizes: Sequence[int]) -> list[ns.Batch]:
    """The examples in batches of these sizes, which are repeated to the end."""
    batches, start, number = [], 0, 0
    while start < len(examples):
        size = sizes[number % len(sizes)]
        batches.append(joined(examples[start : start + size]))
        start, number = start + size, number + 1
    return batches


def by_group(examples: Sequence[ns.Batch], size: int) -> dict[Any, list[ns.Batch]]:
    groups = {example.groups[0] for example in examples if example.groups}
    return {g: in_batches([e for e in examples if e.groups == (g,)], [size]) for g in sorted(groups)}


def simple(seed: int = 0, count: int = 12, groups: int = 3) -> tuple[nn.Module, list[ns.Batch]]:
    """A small network and single examples, their groups drawn."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)
    g = torch.randint(groups, (count,), generator=generator)
    g[:groups] = torch.arange(groups)
    return CASES["mlp"].build(), singles([(x, y, g)])


# --- the reference --------------------------------------------------------------------------------------------------


@every_case
def test_norms_are_the_reference_on_every_architecture(case: Case) -> None:
    """In training mode, with dropout and batch normalisation, uneven batches, groups missing from batches."""
    batches = case.batches(SEED)
    found = score(case, case.build(), batches)
    assert_norms(found, expected(case.name))
    assert found.counts == tuple(reference.group_counts(batches).values())
    assert (found.values.dtype, found.criterion) == (torch.float32, "gradient norm")


@fast_case
def test_in_float64_only_the_rounding_of_the_scores_is_left(case: Case) -> None:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    found = score(case, case.build().double(), map_tensors(case.batches(SEED), wide))
    assert_norms(found, expected(case.name), 1e-7)


@pytest.mark.parametrize("size", [1, 2, 8])
@fast_case
def test_loaders_per_group_give_the_same(case: Case, size: int) -> None:
    loaders = by_group(singles(case.batches(SEED)), size)
    assert_norms(score(case, case.build(), loaders), expected(case.name))


@pytest.mark.parametrize("sizes", [[1], [3], [5, 1], [8]])
@fast_case
def test_neither_order_nor_batch_size_matters(case: Case, sizes: list[int]) -> None:
    examples = singles(case.batches(SEED))
    random.shuffle(examples)
    assert_norms(score(case, case.build(), in_batches(examples, sizes)), expected(case.name))


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(12)), sizes=st.lists(st.integers(1, 12), min_size=1), groups=st.integers(1, 5))
def test_any_order_any_batches_any_groups(order: list[int], sizes: list[int], groups: int) -> None:
    model, examples = simple(groups, groups=groups)
    axes = CASES["mlp"].axes
    right = reference.group_grad_norms(model, [(e.args[0], e.targets, e.groups) for e in examples], axes)
    mixed = in_batches([examples[i] for i in order], sizes)
    assert_norms(ns.group_grad_norms(model, mixed), right)
    assert_norms(ns.group_grad_norms(model, by_group([examples[i] for i in order], sizes[0])), right)


def test_the_linear_model_in_closed_form() -> None:
    """The gradient is the mean of (p - y) x^T."""
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    residual = model(x).softmax(1) - F.one_hot(y, 3)
    right = (residual.T @ x / 6).norm(dim=1).detach()
    torch.testing.assert_close(ns.group_grad_norms(model, [(x, y)]).values[0], right)


def test_it_is_the_norm_of_the_mean_and_not_the_mean_of_norms() -> None:
    """Two examples whose gradients cancel; and data given twice change nothing."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.ones(2, 2), torch.tensor([0, 1])
    assert not ns.group_grad_norms(model, [(x, y)]).values.any()
    x[1] *= 2
    once, twice = (ns.group_grad_norms(model, [(x, y)] * times) for times in (1, 2))
    assert once.values.all()
    torch.testing.assert_close(once.values, twice.values)
    assert twice.counts == (4,)


def test_tiny_gradients_are_still_ranked() -> None:
    """Those of a confident model: their squares would vanish."""
    model, examples = simple()

    def faint(logits: Tensor, targets: Tensor) -> Tensor:
        return 1e-30 * ns.cross_entropy(logits, targets)

    plain, tiny = (ns.group_grad_norms(model, examples, loss=loss) for loss in (None, faint))
    torch.testing.assert_close(tiny.values * 1e30, plain.values, rtol=1e-4, atol=0)
    assert ns.topk(tiny, 3) == ns.topk(plain, 3)


# --- groups ---------------------------------------------------------------------------------------------------------


def test_a_mapping_keeps_its_order_and_names() -> None:
    model, examples = simple()
    loaders = by_group(examples, 4)
    named = {"dark man": loaders[1], "blond man": loaders[0], 7: loaders[2]}
    found = ns.group_grad_norms(model, named)
    assert found.groups == ("dark man", "blond man", 7)
    assert torch.equal(found.values[1], ns.group_grad_norms(model, {0: loaders[0]}).values[0])


def test_groups_of_mixed_batches_ascend_and_without_groups_it_is_all() -> None:
    model = nn.Linear(2, 2)
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 0])
    assert ns.group_grad_norms(model, [(x, y, torch.tensor([10, 9, -1]))]).groups == (-1, 9, 10)
    assert ns.group_grad_norms(model, [(x, y, ["b", "a", "b"])]).groups == ("a", "b")
    assert ns.group_grad_norms(model, [(x, y)]).groups == ("all",)
    assert ns.group_grad_norms(model, {"mine": [(x, y, ["b", "a", "b"])]}).groups == ("mine",)


# --- what it costs --------------------------------------------------------------------------------------------------


class Counted(torch.autograd.Function):
    """The identity; its backward passes are counted."""

    passes: list[int]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        Counted.passes.append(len(gradient))
        return gradient


class Counting(nn.Module):
    """Sequences of any length; forward and backward passes are counted."""

    forwards: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        Counting.forwards.append(len(x))
        return self.fc(Counted.apply(self.first(x).tanh().mean(1)))


@pytest.fixture
def counts() -> tuple[list[int], list[int]]:
    Counting.forwards, Counted.passes = [], []
    return Counting.forwards, Counted.passes


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_an_example_costs_one_pass_and_batches_are_full(groups: int, counts: tuple[list[int], list[int]]) -> None:
    """64 examples of interleaved groups in batches of 4; three of the first batch are run alone once, to compare."""
    x, y = torch.randn(64, 3, 2), torch.randint(3, (64,))
    names = torch.arange(64) % groups
    found = ns.group_grad_norms(Counting(), list(zip(x.split(4), y.split(4), names.split(4), strict=True)))
    assert counts == ([4, 3] + [4] * 15, [4] * 16)
    assert found.counts == (64 // groups,) * groups


def test_a_last_batch_may_be_uneven_and_nothing_runs_twice(counts: tuple[list[int], list[int]]) -> None:
    x, y, names = torch.randn(30, 3, 2), torch.randint(3, (30,)), torch.randint(5, (30,))
    ns.group_grad_norms(Counting(), list(zip(x.split(8), y.split(8), names.split(8), strict=True)))
    assert counts[0].pop(1) == 4, "half of the first batch is run alone, to compare"
    assert sum(counts[0]) == 30
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 30 // 8 + 5


def test_ragged_batches_run_as_they_come_and_few_examples_wait(counts: tuple[list[int], list[int]]) -> None:
    """Never padded, and of the examples read at most one batch a group waits."""
    seen = 0

    def stream() -> Iterator[Any]:
        nonlocal seen
        for i in range(40):
            assert seen - sum(counts[1]) <= 2 * 4
            seen += 4
            yield torch.randn(4, 1 + i % 7, 2), torch.randint(3, (4,)), torch.tensor([0, 1, 1, 0])

    found = ns.group_grad_norms(Counting(), stream())
    assert (sum(counts[1]), found.counts) == (160, (80, 80))
    assert sum(counts[0]) == 160 + 1, "one of the first two is run alone, to compare"


class Spy(torch.autograd.Function):
    """x w^T, noting which gradients a backward pass is asked for."""

    asked: list[tuple[bool, ...]]

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        Spy.asked.append(ctx.needs_input_grad)
        return gradient @ w, gradient.T @ x


class SpyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Spy.apply(x, self.weight)


def test_only_the_scored_parameters_get_a_gradient() -> None:
    """Layers before the first scored one have no backward pass, later ones hand it on and no more."""
    model = nn.Sequential(*(SpyLinear(3, 3, bias=False) for _ in range(3)))
    model.requires_grad_(False)[0].requires_grad_(True)
    Spy.asked = []
    ns.group_grad_norms(model, [(torch.randn(4, 3), torch.randint(3, (4,)))], where="1.weight")
    assert Spy.asked == [(True, False), (False, True)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_where_and_extra_choose_and_leave_the_numbers() -> None:
    model, examples = simple()
    every = named(ns.group_grad_norms(model, examples, extra="*.bias").by_layer())
    assert list(every) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    some = named(ns.group_grad_norms(model, examples, where="2.*").by_layer())
    torch.testing.assert_close(some, {"2.weight": every["2.weight"]})


def copies_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of groups whose gradients are held is added at every batch."""
    alive: weakref.WeakSet[GroupSum] = weakref.WeakSet()
    at_once = []

    class Counted(GroupSum):
        def add(self, count: int, gradients: Sequence[Tensor | None]) -> None:
            alive.add(self)
            at_once.append(len(alive))
            super().add(count, gradients)

    monkeypatch.setattr(gradients, "GroupSum", Counted)
    return at_once


def test_groups_that_fill_no_batch_are_done_with_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = copies_at_once(monkeypatch)
    images, labels = torch.randn(12, 3), torch.randint(2, (12,))
    ns.group_grad_norms(nn.Linear(3, 2), [(images, labels, torch.arange(12) % 4)])
    assert at_once == [1, 1, 1, 1]


def test_a_mapping_needs_one_copy_of_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = copies_at_once(monkeypatch)
    model, examples = simple(groups=4)
    mapped = ns.group_grad_norms(model, by_group(examples, 2))
    assert max(at_once) == 1
    mixed = ns.group_grad_norms(model, examples)
    assert max(at_once) == 4
    torch.testing.assert_close(mapped.values, mixed.values)


def test_a_mixed_stream_of_many_large_gradients_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = simple(groups=5)
    monkeypatch.setattr(sums, "MEMORY_WARNING", 2.5 * 4 * (7 * 5 + 3 * 7))
    with pytest.warns(UserWarning, match=r"one copy of the scored gradients per group, so far 3 .*a mapping") as caught:
        ns.group_grad_norms(model, examples)
    assert [warning.filename for warning in caught] == [__file__]
    ns.group_grad_norms(model, by_group(examples, 4))


# --- models that are hard to differentiate --------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_parameter_without_gradient_scores_zero_with_a_warning() -> None:
    data = [(torch.randn(4, 2), torch.randint(3, (4,)))]
    with pytest.warns(
        UserWarning, match=r"no gradient reached 1 of 2 scored layers, whose scores are 0: unused\.weight"
    ):
        found = named(ns.group_grad_norms(Unused(), data).by_layer())
    assert found["used.weight"].all()
    assert not found["unused.weight"].any()
    with pytest.warns(UserWarning, match="no gradient reached 1 of 1"):
        assert not ns.group_grad_norms(Unused(), data, where="unused.*").values.any()


class Checkpointed(nn.Module):
    """Recomputes a frozen layer during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(5, 7).requires_grad_(False), nn.Linear(7, 3)
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        return self.fc(hidden)

    def body(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()


def test_activation_checkpointing_changes_nothing() -> None:
    model, data = Checkpointed(), [(torch.randn(4, 5), torch.randint(3, (4,)))]
    found = ns.group_grad_norms(model, data).values
    model.recompute = False
    torch.testing.assert_close(found, ns.group_grad_norms(model, data).values)
    assert found.all()


def test_activation_checkpointing_of_timm_changes_nothing() -> None:
    case = CASES["vit"]
    model = case.build()
    model.set_grad_checkpointing()  # type: ignore[operator]
    assert_norms(ns.group_grad_norms(model, case.batches(SEED)), expected("vit"))


def test_weights_and_inputs_that_were_made_in_inference_mode() -> None:
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    right = ns.group_grad_norms(model, [(x, y)], where="0.*").values
    with torch.inference_mode():
        features, cloned = x.clone(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        cloned.load_state_dict(model.state_dict())
    assert torch.equal(ns.group_grad_norms(cloned, [(features, y)], where="0.*").values, right)


def test_a_table_that_has_as_many_rows_as_a_part_of_a_group() -> None:
    """Parts of 3 and 3 examples make 6, as many as the table has rows; it is not cut or joined."""
    case = CASES["keyword"]
    model, table = case.build(), torch.randn(6, 5)
    groups = [[0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    data = [({"x": torch.randn(4, 5), "table": table}, torch.randint(3, (4,)), torch.tensor(g)) for g in groups]
    assert_norms(ns.group_grad_norms(model, data), reference.group_grad_norms(model, data, case.axes))


class Reused:
    """A loader that writes every batch into the memory of its first, the largest, and spoils it at the end."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        memory: list[Tensor] = []
        map_tensors(self.batches[0], lambda tensor: memory.append(tensor.clone()))
        for batch in self.batches:
            places = iter(memory)
            yield map_tensors(batch, lambda tensor, places=places: next(places)[: len(tensor)].copy_(tensor))
        for tensor in memory:
            tensor.zero_()


@pytest.mark.parametrize("name", [*FAST, "keyword", "bert", "cross_attention"])
def test_a_loader_may_reuse_its_memory(name: str) -> None:
    case = CASES[name]
    batches = case.batches(SEED, sizes=(3, 1, 1, 3))
    assert torch.equal(score(case, case.build(), Reused(batches)).values, score(case, case.build(), batches).values)


# --- precision and modes --------------------------------------------------------------------------------------------


SMOOTH = ["mlp", "attention", "lstm", "vit"]
"""No activation of these has a kink that the rounding could cross."""


@pytest.mark.parametrize("name", SMOOTH)
def test_autocast_is_near(name: str) -> None:
    case = CASES[name]
    batches = case.batches(SEED)
    first = unpack_batch(batches[0], None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            case.build()(*first.args, **first.kwargs)
        except RuntimeError as error:  # torch has no bfloat16 LSTM for some processors
            pytest.skip(f"torch cannot run this module under autocast on this processor: {error}")
        assert_norms(ns.group_grad_norms(case.build(), batches), expected(name), 0.05)


@pytest.mark.parametrize("name", SMOOTH)
def test_bfloat16_is_near(name: str) -> None:
    case = CASES[name]
    batches = case.batches(SEED)

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    found = ns.group_grad_norms(case.build().bfloat16(), map_tensors(batches, narrow))
    assert_norms(found, expected(name), 0.1)


def test_sums_of_many_half_precision_batches_do_not_stall() -> None:
    """In bfloat16 256 + 1 is 256: a sum of 600 equal gradients would stop there."""
    model = nn.Linear(2, 2).bfloat16()
    batch = (torch.randn(1, 2).bfloat16(), torch.tensor([0]))
    once, often = (ns.group_grad_norms(model, {"g": [batch] * times}).values for times in (1, 600))
    torch.testing.assert_close(once, often, rtol=1e-4, atol=0)


def test_training_after_scoring_in_one_autocast_still_gets_gradients() -> None:
    """Autocast keeps casts of weights; one made without gradient must not serve the caller."""
    model, data = nn.Linear(4, 3), [(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ns.group_grad_norms(model, data)
        ns.hard_batch(model, data)
        ns.evaluate(model, data)
        model(data[0][0]).float().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.any()


def test_it_works_inside_no_grad_and_not_in_inference_mode() -> None:
    model, examples = simple()
    right = ns.group_grad_norms(model, examples)
    with torch.no_grad():
        assert torch.equal(ns.group_grad_norms(model, examples).values, right.values)
        assert not torch.is_grad_enabled()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\): leave it"),
    ):
        ns.group_grad_norms(model, examples)


@pytest.mark.parametrize("name", [*FAST, "norm_dropout", "mlp_frozen", "spectral_norm", "gpt2"])
def test_nothing_changes(name: str) -> None:
    """In training mode, with gradients and hooks, a part frozen, half of the modules in evaluation mode."""
    case = CASES[name]
    model, batches = case.build(), case.batches(SEED)
    for i, (module, parameter) in enumerate(zip(model.children(), model.parameters(), strict=False)):
        parameter.grad = torch.randn_like(parameter) if i % 2 else None
        module.train(i % 2 == 0)
    model.register_forward_hook(lambda module, args, output: None)
    loaders = by_group(singles(case.batches(SEED)), 3)
    before = snapshot(model, batches, loaders)
    score(case, model, batches)
    score(case, model, loaders)
    ns.hard_batch(model, batches[:1], top=2, sample=1, loss=ns.causal_lm_loss if case.causal else None)
    assert_unchanged(before, model, batches, loaders)


def test_a_pending_backward_is_not_disturbed() -> None:
    model, examples = simple()
    x = torch.randn(3, 5)
    loss = model(x).square().sum()
    ns.group_grad_norms(model, examples)
    found = torch.autograd.grad(loss, list(model.parameters()))
    right = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(map(torch.equal, found, right))


def test_progress_is_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    model, examples = simple()
    ns.group_grad_norms(model, by_group(examples, 4), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == [f"gradients of {group}" for group in (0, 1, 2)]
    ns.group_grad_norms(model, examples)
    assert capsys.readouterr() == ("", "")


# --- wrappers and gradients of the caller's own ---------------------------------------------------------------------


def test_a_compiled_model_is_scored_as_the_bare_one() -> None:
    case = CASES["residual"]
    model = case.build()
    compiled = torch.compile(model, backend="eager")  # a wrapper; nothing is compiled until it is called
    found = ns.group_grad_norms(compiled, case.batches(SEED))
    assert_norms(found, expected("residual"))
    assert found == ns.group_grad_norms(model, case.batches(SEED))
    assert ns.group_grad_norms(nn.DataParallel(model), case.batches(SEED)) == found


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_norms_of_the_gradients_of_a_training_step(prefix: str) -> None:
    model, examples = simple()
    batch = joined(examples)
    F.cross_entropy(model(batch.args[0]), batch.targets).backward()
    given = {f"{prefix}{name}": parameter.grad for name, parameter in model.named_parameters()}
    found = ns.grad_norms(given, ns.find_layout(model))
    right = ns.group_grad_norms(model, {"all": [batch]})
    assert (found.groups, found.counts, found.criterion) == (("all",), (0,), "gradient norm")
    torch.testing.assert_close(found.values, right.values)


def test_a_part_of_the_model_may_be_called_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 3)})
    given = {"module.weight": torch.ones(3, 2), "module.bias": None}
    torch.testing.assert_close(ns.grad_norms(given, ns.find_layout(model)).values, torch.full((1, 3), 2.0).sqrt())


def test_gradients_by_another_name_sparse_or_missing() -> None:
    tied = CASES["shared_parameter"].build()
    given = {"second.weight": torch.ones(5, 5), "fc.weight": None}
    found = named(ns.grad_norms(given, ns.find_layout(tied)).by_layer())
    torch.testing.assert_close(found["first.weight"], torch.full((1, 5), 5.0).sqrt())
    assert not found["fc.weight"].any()
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1])
    F.cross_entropy(model(x), y).backward()
    right = ns.group_grad_norms(model, [(x, y)], extra="0.weight")
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(ns.grad_norms(own, right.layout).values, right.values)


# --- losses ---------------------------------------------------------------------------------------------------------


def ignored(*shape: int) -> Tensor:
    targets = torch.randint(4, shape)
    targets[:, ..., 0] = -100
    return targets


LOGITS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "classes": lambda: (torch.randn(5, 4), torch.randint(4, (5,))),
    "narrow labels": lambda: (torch.randn(5, 4), torch.randint(4, (5,), dtype=torch.uint8)),
    "probabilities": lambda: (torch.randn(5, 4), torch.randn(5, 4).softmax(1)),
    "tokens": lambda: (torch.randn(5, 6, 4), ignored(5, 6)),
    "pixels": lambda: (torch.randn(5, 4, 2, 3), ignored(5, 2, 3)),
    "soft pixels": lambda: (torch.randn(5, 4, 2, 3), torch.randn(5, 4, 2, 3).softmax(1)),
    "a line of pixels": lambda: (torch.randn(5, 4, 3), ignored(5, 3)),
}


@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
def test_cross_entropy_is_the_reference(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    logits, targets = make()
    by_class = logits.movedim(1, -1) if logits.shape == (5, 4, 3) else logits  # the reference takes it as tokens
    right = reference.cross_entropy(by_class.double(), targets)
    found = ns.cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ns.cross_entropy(logits.double(), targets), right, rtol=1e-6, atol=1e-6)
    assert ns.cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_causal_lm_loss_is_the_reference() -> None:
    logits, targets = torch.randn(4, 6, 7), torch.randint(7, (4, 6))
    targets[1, 3:] = -100
    right = reference.causal_lm_loss(logits.double(), targets)
    torch.testing.assert_close(ns.causal_lm_loss(logits, targets).double(), right, rtol=1e-5, atol=1e-6)


def test_examples_of_which_nothing_counts_have_a_loss_of_zero() -> None:
    nothing = torch.full((2, 3), -100)
    assert ns.cross_entropy(torch.randn(2, 3, 5), nothing).tolist() == [0, 0]
    assert ns.causal_lm_loss(torch.randn(2, 3, 5), nothing).tolist() == [0, 0]
    assert ns.causal_lm_loss(torch.randn(2, 1, 5), torch.zeros(2, 1, dtype=torch.long)).tolist() == [0, 0]


def test_labels_are_never_shifted_unasked() -> None:
    case = CASES["gpt2_lm"]
    model, batches = case.build(), case.batches(SEED)
    text = r"the labels are the input tokens: a causal language model's .* Pass loss=neuronsurgery\.causal_lm_loss"
    for refused in (ns.group_grad_norms, ns.hard_batch):
        with pytest.raises(ValueError, match=text):
            refused(model, batches)
    assert ns.hard_batch(model, batches[:1], loss=ns.causal_lm_loss).targets.shape[1] == 8
    assert ns.hard_batch(model, batches[:1], loss=ns.cross_entropy).targets.shape[1] == 8, "asked for by name"


class Tagger(nn.Module):
    """A head over tokens, under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))  # type: ignore[no-any-return]


class RowForCausalLM(Tagger):
    """No language model, whatever its name says."""


def test_what_counts_is_what_the_labels_are_and_not_what_the_model_is_called() -> None:
    tokens = torch.randint(9, (6, 5))
    padded = tokens.masked_fill(torch.arange(5) > 2, -100)
    for model in (Tagger(), nn.Sequential(Tagger())):
        for labels in (tokens, padded):
            with pytest.raises(ValueError, match="the labels are the input tokens"):
                ns.group_grad_norms(model, [(tokens, labels)])
            with pytest.raises(ValueError, match="the labels are the input tokens"):
                ns.sweep(model, {}, [(tokens, labels)])
    tags = (tokens + 1) % 9
    assert ns.group_grad_norms(RowForCausalLM(), [(tokens, tags)]).counts == (6,)
    masked = torch.where(torch.arange(5) == 1, tokens, -100)
    hidden = torch.where(torch.arange(5) == 1, 0, tokens.clamp(min=1))
    assert ns.group_grad_norms(Tagger(), [(hidden, masked.clamp(max=8))]).counts == (6,)


def test_a_softmax_inside_the_model_is_warned_about() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Softmax(1))
    _, examples = simple()
    with pytest.warns(UserWarning, match="outputs look like probabilities .*pass predict=") as caught:
        ns.group_grad_norms(model, examples)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="outputs look like probabilities"):
        ns.group_grad_norms(model, by_group(examples, 4))
    ns.group_grad_norms(model, examples, loss=lambda p, y: F.nll_loss(p.log(), y, reduction="none"))
    ns.group_grad_norms(model, examples, predict=torch.log)


def test_a_loss_and_the_logits_of_the_callers_own() -> None:
    model, examples = simple()

    def margin(logits: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(logits, targets, reduction="none")

    data = [(e.args[0], e.targets, e.groups) for e in examples]
    right = reference.group_grad_norms(model, data, CASES["mlp"].axes, margin)
    assert_norms(ns.group_grad_norms(model, examples, loss=margin), right)
    halved = ns.group_grad_norms(model, examples, predict=lambda output: output * 0.5, loss=margin)
    assert not torch.allclose(halved.values, ns.group_grad_norms(model, examples, loss=margin).values)


# --- hard examples --------------------------------------------------------------------------------------------------


def column(losses: Sequence[float], groups: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """A batch whose example i has loss `losses[i]` under `given` and is known by its number, i."""
    x = torch.stack([torch.tensor(losses, dtype=torch.float32), torch.arange(len(losses)).float()], 1)
    return (x, torch.zeros(len(losses), dtype=torch.long), *([] if groups is None else [torch.tensor(groups)]))


def given_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return logits[:, 0]


def hardest(losses: Sequence[float], groups: Sequence[int] | None = None, cut: int = 3, **options: Any) -> list[int]:
    data = list(zip(*(part.split(cut) for part in column(losses, groups)), strict=True))
    batch = ns.hard_batch(nn.Identity(), data, loss=given_loss, **options)
    return [int(number) for number in batch.args[0][:, 1]]


loss_lists = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0]), min_size=1, max_size=20)  # many ties


@settings(deadline=None, max_examples=60)
@given(losses=loss_lists, top=st.integers(1, 25), sample=st.integers(1, 25), cut=st.integers(1, 9))
def test_hard_examples_are_drawn_from_the_top(losses: list[float], top: int, sample: int, cut: int) -> None:
    """Sorting all losses, ties to the earlier example; in the order of the loader."""
    pool = reference.topk(losses, top)
    assert hardest(losses, cut=cut, top=top, sample=10**6) == pool
    drawn = hardest(losses, cut=cut, top=top, sample=sample)
    assert drawn == sorted(set(drawn) & set(pool))
    assert len(drawn) == min(sample, len(pool))
    assert drawn == hardest(losses, cut=20, top=top, sample=sample)


@settings(deadline=None, max_examples=40)
@given(losses=loss_lists, top=st.integers(1, 6), cut=st.integers(1, 9))
def test_hard_examples_of_each_group(losses: list[float], top: int, cut: int) -> None:
    groups = [i * i % 3 for i in range(len(losses))]
    right = []
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        right += [members[i] for i in reference.topk([losses[i] for i in members], top)]
    assert hardest(losses, groups, cut=cut, top=top, per_group=True) == right


def test_the_draw_of_hard_examples_depends_on_the_seed_alone() -> None:
    losses = list(range(40))
    draws = {seed: hardest(losses, top=30, sample=5, seed=seed) for seed in range(30)}
    assert len({tuple(drawn) for drawn in draws.values()}) > 25
    assert {number for drawn in draws.values() for number in drawn} == set(range(10, 40))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    torch.manual_seed(0)
    assert draws[7] == hardest(losses, top=30, sample=5, seed=7) == [16, 22, 27, 33, 38]
    torch.set_rng_state(before[0])
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tobytes())


def test_hard_examples_are_those_of_the_reference_and_a_loader() -> None:
    case = CASES["norm_dropout"]
    model, batches = case.build(), case.batches(SEED)
    losses = [value for values in losses_of(case, model, batches) for value in values]
    batch = ns.hard_batch(model, batches, top=3, sample=3)
    examples = singles(batches)
    right = joined([examples[i] for i in reference.topk(losses, 3)])
    assert torch.equal(batch.args[0], right.args[0])
    assert torch.equal(batch.targets, right.targets)
    assert ns.group_grad_norms(model, {"hard": [batch]}).counts == (3,)


def losses_of(case: Case, model: nn.Module, batches: list[Any]) -> list[list[float]]:
    return [list(reference.outcomes(model, {0: [batch]}, reference.cross_entropy)[0]) for batch in batches]


def test_hard_examples_of_batches_with_a_table_and_of_reused_memory() -> None:
    """The pool holds as many examples as the table has rows."""
    case = CASES["keyword"]
    model, table = case.build(), torch.randn(6, 5)
    data = [({"x": torch.randn(4, 5), "table": table}, torch.randint(3, (4,))) for _ in range(3)]
    batch, reused = (ns.hard_batch(model, loader, top=6, sample=5) for loader in (data, Reused(data)))
    assert torch.equal(batch.kwargs["table"], table)
    assert torch.equal(reused.kwargs["x"], batch.kwargs["x"])


def test_hard_examples_of_one_batch_are_no_view_of_it() -> None:
    x, y = column([1.0, 2.0])
    batch = ns.hard_batch(nn.Identity(), [(x, y)], loss=given_loss)
    x.zero_()
    assert batch.args[0][:, 0].tolist() == [1, 2]
