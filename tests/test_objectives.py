"""The objectives against slow loops in float64, numbers worked out by hand, and laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import neuronsurgery as ns
from neuronsurgery.objectives import group_dro, jtt_weights, nt_xent, supervised_contrastive

settled = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)
E = math.e


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=tolerance, atol=tolerance)


# --- the slow reference ---------------------------------------------------------------------------------------------


def cosine(u: Sequence[float], v: Sequence[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(x * x for x in v))
    return sum(x * y for x, y in zip(u, v, strict=True)) / lengths if lengths else 0.0


def slow_nt_xent(a: Tensor, b: Tensor, temperature: float) -> float:
    rows = a.tolist() + b.tolist()
    total = 0.0
    for i, anchor in enumerate(rows):
        partner = (i + len(a)) % len(rows)
        exponentials = {k: math.exp(cosine(anchor, row) / temperature) for k, row in enumerate(rows) if k != i}
        total -= math.log(exponentials[partner] / sum(exponentials.values()))
    return total / len(rows)


def slow_supervised_contrastive(features: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> float:
    rows, anchors = features.tolist(), []
    for i, anchor in enumerate(rows):
        p = [math.exp(cosine(anchor, row) / temperature) for k, row in enumerate(rows) if positives[i, k]]
        n = [math.exp(cosine(anchor, row) / temperature) for k, row in enumerate(rows) if negatives[i, k]]
        if p:
            anchors.append(-sum(math.log(one / (sum(n) + sum(p))) for one in p) / len(p))
    return sum(anchors) / len(anchors) if anchors else 0.0


def slow_group_dro(
    losses: Sequence[float], groups: Sequence[int], weights: Sequence[float], step: float, constants: Sequence[float]
) -> tuple[float, list[float]]:
    means = []
    for group in range(len(weights)):
        members = [loss for loss, of in zip(losses, groups, strict=True) if of == group]
        means.append(sum(members) / len(members) if members else 0.0)
    raised = [
        weight * math.exp(step * (mean + constant))
        for weight, mean, constant in zip(weights, means, constants, strict=True)
    ]
    updated = [one / sum(raised) for one in raised]
    return sum(weight * mean for weight, mean in zip(updated, means, strict=True)), updated


def disjoint_masks(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positives and negatives at random, the diagonal in neither; row 0 has no positive and row 1 nothing at all."""
    kind = whole(3, size, size, seed=seed).fill_diagonal_(2)
    kind[0, kind[0] == 0] = 2
    kind[1] = 2
    return kind == 0, kind == 1


# --- NT-Xent --------------------------------------------------------------------------------------------------------


@settled
@given(seed=seeds, pairs=st.integers(1, 6), width=st.integers(1, 5), temperature=st.sampled_from([0.1, 0.5, 2.0]))
def test_nt_xent_is_the_reference(seed: int, pairs: int, width: int, temperature: float) -> None:
    a, b = normal(pairs, width, seed=seed), normal(pairs, width, seed=seed + 1)
    assert_near(nt_xent(a, b, temperature), slow_nt_xent(a, b, temperature))


def test_nt_xent_by_hand() -> None:
    identity = torch.eye(2, dtype=torch.float64)
    assert_near(nt_xent(identity, identity, 1.0), math.log(E + 2) - 1)
    # Each partner is orthogonal, and each anchor equals the partner of the other pair.
    assert_near(nt_xent(identity, identity.flip(0), 1.0), math.log(E + 2))
    # Opposite partners; the other pair is orthogonal.
    assert_near(nt_xent(identity, -identity, 1.0), math.log(1 / E + 2) + 1)
    # All rows alike: a guess among the three others.
    assert_near(nt_xent(torch.ones(2, 3), torch.ones(2, 3)), math.log(3), 1e-6)
    assert_near(nt_xent(identity, identity), slow_nt_xent(identity, identity, 0.5))  # the paper's default


def test_nt_xent_of_one_pair_is_nothing() -> None:
    a, b = normal(1, 3).requires_grad_(), normal(1, 3, seed=1).requires_grad_()
    loss = nt_xent(a, b)
    loss.backward()
    assert loss.item() == 0 and not a.grad.any() and not b.grad.any()  # type: ignore[union-attr]


@settled
@given(seed=seeds, pairs=st.integers(1, 7))
def test_laws_of_nt_xent(seed: int, pairs: int) -> None:
    a, b = normal(pairs, 4, seed=seed), normal(pairs, 4, seed=seed + 1)
    loss = nt_xent(a, b, 0.3)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    factors = 10.0 ** (20 * normal(pairs, 1, seed=seed + 2).clamp(-1, 1))
    rotation = torch.linalg.qr(normal(4, 4, seed=seed + 3)).Q
    assert_near(nt_xent(b, a, 0.3), loss.item())
    assert_near(nt_xent(a[order], b[order], 0.3), loss.item())
    assert_near(nt_xent(a * factors, b / factors, 0.3), loss.item())
    assert_near(nt_xent(a @ rotation, b @ rotation, 0.3), loss.item())
    assert 0 <= loss.item() < math.log(max(2 * pairs - 1, 1)) + 2 / 0.3


def test_both_arguments_at_once_are_two_halves_with_one_side_detached() -> None:
    a, b = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    at_once = torch.autograd.grad(nt_xent(a, b), (a, b))
    halves = torch.autograd.grad(nt_xent(a, b.detach()) + nt_xent(a.detach(), b), (a, b))
    for one, two in zip(at_once, halves, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        assert one.abs().max() > 1e-3


def test_a_half_that_is_left_out_is_missed() -> None:
    """So the test above can fail: the dense side's own share of the gradient is no small thing."""
    weight = normal(3, 3).requires_grad_()
    x, mask = normal(5, 3, seed=1), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    dense, pruned = x @ weight, (x * mask) @ weight
    (full,) = torch.autograd.grad(nt_xent(dense, pruned), weight, retain_graph=True)
    (half,) = torch.autograd.grad(nt_xent(dense.detach(), pruned), weight)
    assert (full - half).norm() > 0.1 * full.norm()


# --- the contrastive pruning loss -----------------------------------------------------------------------------------


def test_contrastive_pruning_loss_by_hand() -> None:
    dense = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    pruned = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    contrastive = slow_nt_xent(dense, pruned, 0.5)
    squared = (0.1**2 + 0.1**2 + 0.6**2 + 0.6**2) / 2
    y = torch.tensor([0, 0])
    assert_near(ns.contrastive_pruning_loss(dense, pruned, y), contrastive + 0.2 * squared)
    assert_near(ns.contrastive_pruning_loss(dense, pruned, y, weight=0), contrastive)
    assert_near(
        ns.contrastive_pruning_loss(dense, pruned, y, weight=3.0, temperature=0.1),
        slow_nt_xent(dense, pruned, 0.1) + 3 * squared,
    )
    logits = torch.tensor([[0.0, 0.0, math.log(2)], [math.log(3), 0.0, 0.0]], dtype=torch.float64)
    entropy = (math.log(4 / 2) + math.log(5 / 1)) / 2
    found = ns.contrastive_pruning_loss(dense, pruned, torch.tensor([2, 1]), logits=logits, supervised="cross_entropy")
    assert_near(found, contrastive + 0.2 * entropy)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_contrastive_pruning_loss_takes_any_integers(dtype: torch.dtype) -> None:
    dense, pruned, y = normal(6, 3), normal(6, 3, seed=1), whole(3, 6)
    for supervised, term in {
        "mse": (dense - F.one_hot(y, 3)).square().sum(1).mean(),
        "cross_entropy": F.cross_entropy(dense, y),
    }.items():
        found = ns.contrastive_pruning_loss(dense, pruned, y.to(dtype), supervised=supervised, weight=1)  # type: ignore[arg-type]
        assert_near(found, slow_nt_xent(dense, pruned, 0.5) + term.item())


def test_the_supervised_term_reaches_the_logits_and_the_contrastive_one_both_models() -> None:
    dense, pruned, logits = (normal(4, 3, seed=seed).requires_grad_() for seed in range(3))
    ns.contrastive_pruning_loss(dense, pruned, whole(3, 4), logits=logits).backward()
    assert all(one.grad is not None and one.grad.abs().min() > 0 for one in (dense, pruned, logits))
    (alone,) = torch.autograd.grad(0.2 * (logits - F.one_hot(whole(3, 4), 3)).square().sum(1).mean(), logits)
    torch.testing.assert_close(logits.grad, alone)


@pytest.mark.parametrize("supervised", ["mse", "cross_entropy"])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_label_beyond_the_classes_is_never_silent(supervised: Any, label: int) -> None:
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        ns.contrastive_pruning_loss(normal(2, 3), normal(2, 3), torch.tensor([0, label]), supervised=supervised)


# --- Group DRO ------------------------------------------------------------------------------------------------------


def test_group_dro_is_exponentiated_gradient_over_three_steps() -> None:
    """Two groups, step 0.5, group means (2, 1), then (0, 3), then 4 and an absent group."""
    batches = [([1.0, 3.0, 1.0], [0, 0, 1]), ([0.0, 3.0], [0, 1]), ([4.0], [0])]
    exponents, weights = (0.0, 0.0), torch.full((2,), 0.5, dtype=torch.float64)
    for (losses, groups), means in zip(batches, [(2.0, 1.0), (0.0, 3.0), (4.0, 0.0)], strict=True):
        exponents = (exponents[0] + 0.5 * means[0], exponents[1] + 0.5 * means[1])
        total = math.exp(exponents[0]) + math.exp(exponents[1])
        expected = [math.exp(exponents[0]) / total, math.exp(exponents[1]) / total]
        loss, weights = group_dro(
            torch.tensor(losses, dtype=torch.float64), torch.tensor(groups), weights, step_size=0.5
        )
        assert_near(weights, torch.tensor(expected, dtype=torch.float64))
        assert_near(loss, expected[0] * means[0] + expected[1] * means[1])
    assert_near(weights[0], 1 / (1 + math.exp(2 - 3)))  # exponents (1 + 0 + 2, 0.5 + 1.5 + 0)


@settled
@given(seed=seeds, groups=st.integers(1, 5), size=st.integers(1, 9), adjustment=st.sampled_from([0.0, 0.5, 4.0]))
def test_group_dro_is_the_reference_and_stays_on_the_simplex(
    seed: int, groups: int, size: int, adjustment: float
) -> None:
    losses, members = normal(size, seed=seed).abs(), whole(groups, size, seed=seed)
    counts = 1 + whole(50, groups, seed=seed)
    weights = normal(groups, seed=seed + 1).softmax(0)
    loss, updated = group_dro(losses, members, weights, step_size=0.7, counts=counts, adjustment=adjustment)
    constants = [adjustment / math.sqrt(count) for count in counts.tolist()]
    wanted, wanted_weights = slow_group_dro(losses.tolist(), members.tolist(), weights.tolist(), 0.7, constants)
    assert_near(loss, wanted)
    assert_near(updated, torch.tensor(wanted_weights, dtype=torch.float64))
    assert_near(updated.sum(), 1.0)
    assert (updated >= 0).all()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    again = group_dro(losses[order], members[order], weights, step_size=0.7, counts=counts, adjustment=adjustment)
    assert_near(again[0], loss.item())
    assert_near(again[1], updated)


def test_the_adjustment_moves_the_weights_and_is_not_in_the_loss() -> None:
    losses, groups, counts = torch.zeros(4).double(), torch.tensor([0, 1, 0, 1]), torch.tensor([100, 1])
    loss, weights = group_dro(
        losses, groups, torch.tensor([0.5, 0.5]).double(), step_size=1.0, counts=counts, adjustment=1.0
    )
    assert loss.item() == 0
    assert_near(weights[1], 1 / (1 + math.exp(0.1 - 1)))
    unadjusted = group_dro(losses, groups, torch.tensor([0.5, 0.5]), counts=counts)
    assert_near(unadjusted[1], torch.tensor([0.5, 0.5]))


def test_group_dro_has_a_gradient_to_the_losses_alone() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    loss, updated = group_dro(losses, torch.tensor([0, 0, 1]), weights, step_size=0.0)
    loss.backward()
    assert_near(losses.grad, torch.tensor([0.125, 0.125, 0.75]))  # type: ignore[arg-type]
    assert weights.grad is None and not updated.requires_grad


def test_group_dro_forgets_nothing_and_remembers_nothing() -> None:
    losses, groups, weights = normal(6).abs(), whole(3, 6), torch.full((3,), 1 / 3).double()
    first, again = group_dro(losses, groups, weights), group_dro(losses, groups, weights)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_group_dro_survives_extremes() -> None:
    half = torch.tensor([0.5, 0.5])
    loss, weights = group_dro(torch.tensor([1e4, 0.0]), torch.tensor([0, 1]), half, step_size=10.0)
    assert weights.tolist() == [1.0, 0.0] and loss.item() == 1e4
    loss, weights = group_dro(torch.tensor([1.0, 5.0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    assert weights.tolist() == [1.0, 0.0] and loss.item() == 1.0  # a weight of zero stays
    empty = group_dro(
        torch.ones(1), torch.tensor([0]), half, step_size=1.0, counts=torch.tensor([4, 0]), adjustment=2.0
    )
    assert_near(empty[1][0], 1 / (1 + math.exp(-2)), 1e-6)  # no adjustment for a group of none, instead of infinity
    assert group_dro(torch.ones(2, dtype=torch.bfloat16), torch.tensor([0, 1]), half.bfloat16())[1].dtype == half.dtype


@pytest.mark.parametrize("group", [2, -1])
def test_a_group_beyond_the_weights_is_never_silent(group: int) -> None:
    with pytest.raises(IndexError, match="index out of range"):
        group_dro(torch.ones(2), torch.tensor([0, group]), torch.tensor([0.5, 0.5]))


# --- the supervised contrastive loss --------------------------------------------------------------------------------


@settled
@given(seed=seeds, size=st.integers(2, 8), temperature=st.sampled_from([0.1, 0.5, 2.0]))
def test_supervised_contrastive_is_the_reference(seed: int, size: int, temperature: float) -> None:
    features, (positives, negatives) = normal(size, 3, seed=seed), disjoint_masks(size, seed)
    found = supervised_contrastive(features, positives, negatives, temperature)
    assert_near(found, slow_supervised_contrastive(features, positives, negatives, temperature))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    shuffled = positives[order][:, order], negatives[order][:, order]
    assert_near(supervised_contrastive(features[order], *shuffled, temperature), found.item())
    scaled = features * 10.0 ** normal(size, 1, seed=seed + 1)
    assert_near(supervised_contrastive(scaled, positives, negatives, temperature), found.item())


def test_supervised_contrastive_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]], dtype=torch.float64)
    positives, negatives = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    positives[0, 1] = positives[0, 2] = negatives[0, 3] = True  # cosines 1, 0; -1
    pool = math.log(E + 1 + 1 / E)
    assert_near(supervised_contrastive(features, positives, negatives, 1.0), pool - 0.5)
    positives[3, 2] = True  # an anchor without negatives: nothing to tell its one positive from
    assert_near(supervised_contrastive(features, positives, negatives, 1.0), (pool - 0.5) / 2)
    negatives[1, 0] = True  # negatives alone make no anchor
    assert_near(supervised_contrastive(features, positives, negatives, 1.0), (pool - 0.5) / 2)
    both = positives | negatives
    assert_near(supervised_contrastive(features, positives, both, 1.0), (pool - 0.5) / 2)  # counted once


def test_nt_xent_is_a_supervised_contrastive_loss() -> None:
    a, b = normal(5, 3), normal(5, 3, seed=1)
    positives = torch.eye(10, dtype=torch.bool).roll(5, 1)
    negatives = ~positives & ~torch.eye(10, dtype=torch.bool)
    assert_near(
        supervised_contrastive(torch.cat([a, b]), positives, negatives, 0.5),
        nt_xent(a, b).item(),
    )


def test_supervised_contrastive_without_positives_is_zero_with_a_gradient() -> None:
    features = normal(4, 3).requires_grad_()
    nobody = torch.zeros(4, 4, dtype=torch.bool)
    for negatives in (nobody, ~nobody):
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
            loss = supervised_contrastive(features, nobody, negatives)
            (gradient,) = torch.autograd.grad(loss, features)
        assert loss.item() == 0 and torch.equal(gradient, torch.zeros(4, 3, dtype=torch.float64))


# --- Just Train Twice -----------------------------------------------------------------------------------------------


def test_jtt_weights() -> None:
    errors = torch.tensor([True, False, True])
    weights = jtt_weights(errors, 2)
    assert weights.tolist() == [3, 1, 3] and weights.dtype == torch.int64
    assert torch.arange(3).repeat_interleave(weights).tolist() == [0, 0, 0, 1, 2, 2, 2]
    # The authors' way: the whole set, and after it the error set as often as the factor says.
    appended = [0, 1, 2, *[0, 2] * 2]
    assert sorted(appended) == torch.arange(3).repeat_interleave(weights).tolist()
    assert jtt_weights(errors, 0).tolist() == [1, 1, 1]


# --- numbers: gradients, precision, extremes ------------------------------------------------------------------------

POSITIVES, NEGATIVES = disjoint_masks(4, seed=5)
LABELS, GROUPS = torch.tensor([0, 2, 1, 2]), torch.tensor([0, 1, 1, 0])
Objective = Callable[..., Tensor]
OBJECTIVES: dict[str, tuple[Objective, int]] = {
    # name: a function of so many tensors (4, 3)
    "nt_xent": (nt_xent, 2),
    "nt_xent, cold": (lambda a, b: nt_xent(a, b, 0.01), 2),
    "contrastive_pruning_loss, mse": (lambda a, b: ns.contrastive_pruning_loss(a, b, LABELS), 2),
    "contrastive_pruning_loss, cross entropy": (
        lambda a, b, c: ns.contrastive_pruning_loss(a, b, LABELS, logits=c, supervised="cross_entropy"),
        3,
    ),
    "group_dro": (
        lambda a: group_dro(a[:, 0].abs(), GROUPS, torch.tensor([0.25, 0.75]).to(a), step_size=0.0)[0],
        1,
    ),
    "supervised_contrastive": (lambda a: supervised_contrastive(a, POSITIVES, NEGATIVES), 1),
    "supervised_contrastive, cold": (lambda a: supervised_contrastive(a, POSITIVES, NEGATIVES, 0.01), 1),
}
every_objective = pytest.mark.parametrize(("objective", "count"), OBJECTIVES.values(), ids=list(OBJECTIVES))


def arguments(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(4, 3, seed=10 + seed, dtype=dtype).requires_grad_() for seed in range(count)]


@every_objective
def test_gradients_are_right_in_float64(objective: Objective, count: int) -> None:
    assert gradcheck(objective, arguments(count))
    assert gradgradcheck(objective, arguments(count))


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(objective: Objective, count: int, dtype: torch.dtype) -> None:
    """The same numbers in float64: nothing is lost but what the inputs never had."""
    narrow = arguments(count, dtype)
    wide = [one.detach().double().requires_grad_() for one in narrow]
    found, expected = objective(*narrow), objective(*wide)
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    assert_near(found, expected.item(), 2e-5)
    precision = max(2e-4, torch.finfo(dtype).eps)
    for one, two in zip(torch.autograd.grad(found, narrow), torch.autograd.grad(expected, wide), strict=True):
        assert one.dtype == dtype
        assert (one.double() - two).norm() <= precision * two.norm() + 1e-7


@every_objective
def test_autocast_changes_nothing(objective: Objective, count: int) -> None:
    plain = arguments(count, torch.float32)
    expected = objective(*plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(*plain)
    assert torch.equal(found, expected)
    gradients = zip(torch.autograd.grad(found, plain), torch.autograd.grad(expected, plain), strict=True)
    assert all(torch.equal(one, two) for one, two in gradients)


def test_autocast_would_have_changed_a_plain_product() -> None:
    rows = F.normalize(normal(4, 3, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (rows @ rows.T).dtype == torch.bfloat16


def test_mixed_dtypes_are_promoted() -> None:
    a, b = normal(4, 3, dtype=torch.bfloat16), normal(4, 3, seed=1, dtype=torch.float32)
    assert_near(nt_xent(a, b), slow_nt_xent(a, b, 0.5), 1e-5)


EXTREMES = {
    "huge": lambda rows: rows * 1e30,
    "tiny": lambda rows: rows * 1e-25,
    "huge beside tiny": lambda rows: rows * torch.tensor([1e35, 1e-25, 1.0, 1e10])[:, None],
}


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent, cold", "supervised_contrastive", "supervised_contrastive, cold"])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=list(EXTREMES))
def test_cosines_do_not_see_the_lengths(name: str, extreme: Callable[[Tensor], Tensor]) -> None:
    objective, count = OBJECTIVES[name]
    rows = [one.detach() for one in arguments(count, torch.float32)]
    stretched = [extreme(one).requires_grad_() for one in rows]
    loss = objective(*stretched)
    assert_near(loss, objective(*(one.double() for one in rows)).item(), 2e-4)
    assert all(torch.isfinite(one).all() for one in torch.autograd.grad(loss, stretched))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_a_row_of_zeros_has_no_direction(temperature: float) -> None:
    a, b = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32)
    a[1], b[2], b[3] = 0, 0, 1e-38
    expected = slow_nt_xent(a, torch.cat([b[:3], 0 * b[3:]]), temperature)
    a.requires_grad_(), b.requires_grad_()
    loss = nt_xent(a, b, temperature)
    loss.backward()
    assert_near(loss, expected, 1e-4)
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()  # type: ignore[arg-type]
    assert not a.grad[1].any() and not b.grad[2:].any() and a.grad[0].all()  # type: ignore[index]
    alone = torch.zeros(3, 2, requires_grad=True)
    ring = torch.eye(3, dtype=torch.bool).roll(1, 0)
    supervised_contrastive(alone, ring, ring.T, temperature).backward()
    assert alone.grad is not None and not alone.grad.any()


def test_the_coldest_of_worst_cases() -> None:
    """Partners opposite, every negative alike: exp(100) over exp(-100), and the answer is 200 and a logarithm."""
    a = torch.ones(3, 2, requires_grad=True)
    loss = nt_xent(a, -torch.ones(3, 2), 0.01)
    assert_near(loss, 200 + math.log(2), 1e-6)
    (gradient,) = torch.autograd.grad(loss, a)
    assert torch.isfinite(gradient).all()
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    found = ns.contrastive_pruning_loss(
        torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1]), logits=logits, supervised="cross_entropy", weight=1.0
    )
    assert found.item() == 2e4
    assert torch.autograd.grad(found, logits)[0].tolist() == [[1.0, -1.0]]


def test_a_small_loss_keeps_its_digits() -> None:
    a = torch.eye(2)
    assert_near(nt_xent(a, a, 0.1), math.log1p(2 * math.exp(-10)), 1e-7)
    assert abs(nt_xent(a, a, 0.1).item() / math.log1p(2 * math.exp(-10)) - 1) < 2e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(bad: float) -> None:
    a = normal(4, 3)
    a[0, 0] = bad
    assert nt_xent(a, normal(4, 3)).isnan()
    assert supervised_contrastive(a, ~torch.eye(4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)).isnan()


# --- how they are called --------------------------------------------------------------------------------------------


def test_nothing_of_the_caller_is_changed() -> None:
    a, b = arguments(2, torch.float32)
    losses, weights, counts = normal(4).abs(), torch.tensor([0.5, 0.5]), torch.tensor([3, 4])
    held = (a, b, losses, weights, counts, LABELS, GROUPS, POSITIVES, NEGATIVES)
    model = nn.Identity()
    before = snapshot(model, held)
    nt_xent(a, b)
    ns.contrastive_pruning_loss(a, b, LABELS)
    group_dro(losses, GROUPS, weights, counts=counts, adjustment=1.0, step_size=1.0)
    supervised_contrastive(a, POSITIVES, NEGATIVES)
    jtt_weights(POSITIVES[0], 3)
    assert_unchanged(before, model, held)


@every_objective
def test_one_graph_and_no_wait_for_the_device(objective: Objective, count: int) -> None:
    """`fullgraph` raises at anything that would read a value back, such as `.item()`."""
    rows = arguments(count, torch.float32)
    compiled = torch.compile(objective, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*rows), objective(*rows))


# --- errors ---------------------------------------------------------------------------------------------------------

A, B = torch.ones(4, 3), torch.ones(4, 3)
SQUARE = torch.eye(4, dtype=torch.bool)
HALF = torch.tensor([0.5, 0.5])
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rows that are no tensor": (
        lambda: nt_xent([1.0], B),
        TypeError,
        "a must be a tensor, not a list: flatten",
    ),  # type: ignore[arg-type]
    "images": (
        lambda: nt_xent(torch.ones(4, 3, 2, 2), B),
        ValueError,
        r"a must be floating-point of shape \(B, D\), not torch.float32 of shape \(4, 3, 2, 2\): flatten what each",
    ),
    "no rows": (
        lambda: nt_xent(A[:0], B[:0]),
        ValueError,
        r"a must be .* \(B, D\), not torch.float32 of shape \(0, 3\)",
    ),
    "unpaired rows": (
        lambda: nt_xent(A, B[:3]),
        ValueError,
        r"b must be floating-point of shape \(B = 4, D = 3\), not torch.float32 of shape \(3, 3\): give both the rows",
    ),
    "other width": (
        lambda: nt_xent(A, B[:, :2]),
        ValueError,
        r"\(B = 4, D = 3\), not torch.float32 of shape \(4, 2\)",
    ),
    "integers": (
        lambda: nt_xent(A, B.long()),
        ValueError,
        "b must be floating-point .* not torch.int64 of shape",
    ),
    "temperature 0": (
        lambda: nt_xent(A, B, 0),
        ValueError,
        "temperature must be a positive finite number, not 0",
    ),
    "temperature NaN": (
        lambda: nt_xent(A, B, math.nan),
        ValueError,
        "temperature must be a positive .*, not nan",
    ),
    "temperature infinite": (
        lambda: nt_xent(A, B, math.inf),
        ValueError,
        "positive finite number, not inf",
    ),
    "supervised": (
        lambda: ns.contrastive_pruning_loss(A, B, LABELS, supervised="l1"),  # type: ignore[arg-type]
        ValueError,
        "supervised must be 'mse' or 'cross_entropy', not 'l1'",
    ),
    "dense": (
        lambda: ns.contrastive_pruning_loss(A[0], B, LABELS),
        ValueError,
        r"dense must be floating-point of shape",
    ),
    "pruned": (lambda: ns.contrastive_pruning_loss(A, B[:2], LABELS), ValueError, r"b must be .* \(B = 4, D = 3\)"),
    "one-hot targets": (
        lambda: ns.contrastive_pruning_loss(A, B, A),
        ValueError,
        r"targets must be integer of shape \(B = 4\), not torch.float32 of shape \(4, 3\): one class index per",
    ),
    "boolean targets": (lambda: ns.contrastive_pruning_loss(A, B, LABELS > 1), ValueError, "integer .* not torch.bool"),
    "fewer targets": (
        lambda: ns.contrastive_pruning_loss(A, B, LABELS[:1]),
        ValueError,
        r"not torch.int64 of shape \(1,\)",
    ),
    "logits": (
        lambda: ns.contrastive_pruning_loss(A, B, LABELS, logits=A[:2]),
        ValueError,
        r"logits must be floating-point of shape \(B = 4, C\), not torch.float32 of shape \(2, 3\)",
    ),
    "weight": (
        lambda: ns.contrastive_pruning_loss(A, B, LABELS, weight=-1),
        ValueError,
        "weight must be a finite number of at least 0, not -1",
    ),
    "a mean loss": (
        lambda: group_dro(torch.tensor(1.0), GROUPS, HALF),
        ValueError,
        r"losses must be floating-point of shape \(B\), not torch.float32 of shape \(\): .*reduction='none'",
    ),
    "groups": (
        lambda: group_dro(A[:, 0], GROUPS[:2], HALF),
        ValueError,
        r"groups must be integer of shape \(B = 4\)",
    ),
    "weights": (
        lambda: group_dro(A[:, 0], GROUPS, GROUPS),
        ValueError,
        r"weights must be floating-point of shape \(G\)",
    ),
    "step size": (
        lambda: group_dro(A[:, 0], GROUPS, HALF, step_size=-1),
        ValueError,
        "step_size must be a finite",
    ),
    "adjustment": (
        lambda: group_dro(A[:, 0], GROUPS, HALF, adjustment=-1),
        ValueError,
        "adjustment must be a finite",
    ),
    "no counts": (
        lambda: group_dro(A[:, 0], GROUPS, HALF, adjustment=1),
        ValueError,
        "an adjustment needs counts=, the number of training examples of each group",
    ),
    "counts": (
        lambda: group_dro(A[:, 0], GROUPS, HALF, counts=torch.ones(3)),
        ValueError,
        r"counts must be real of shape \(G = 2\), not torch.float32 of shape \(3,\): one number per group",
    ),
    "features": (
        lambda: supervised_contrastive(A[0], SQUARE, SQUARE),
        ValueError,
        r"features must be .* \(B, D\)",
    ),
    "positives": (
        lambda: supervised_contrastive(A, SQUARE.long(), SQUARE),
        ValueError,
        r"positives must be boolean of shape \(B = 4, B' = 4\), not torch.int64 of shape \(4, 4\): row i is for",
    ),
    "negatives": (
        lambda: supervised_contrastive(A, SQUARE, SQUARE[:2]),
        ValueError,
        "negatives must be boolean of",
    ),
    "cold": (
        lambda: supervised_contrastive(A, SQUARE, SQUARE, -1),
        ValueError,
        "temperature must be a positive",
    ),
    "errors": (
        lambda: jtt_weights(LABELS, 2),
        ValueError,
        r"errors must be boolean of shape \(N\), not torch.int64",
    ),
    "upsampling": (
        lambda: jtt_weights(SQUARE[0], -1),
        ValueError,
        "upsampling must be an integer of at least 0, not -1",
    ),
    "half a copy": (
        lambda: jtt_weights(SQUARE[0], 0.5),
        ValueError,
        r"upsampling must be an integer .*, not 0\.5",
    ),  # type: ignore[arg-type]
    "upsampling True": (
        lambda: jtt_weights(SQUARE[0], True),
        ValueError,
        "upsampling must be .*, not True",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=list(WRONG))
def test_what_bad_input_says(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
