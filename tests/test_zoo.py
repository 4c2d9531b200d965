"""Every model of the zoo runs, and the reference is right where the answer can be written down."""

from __future__ import annotations

import copy
import math
from operator import attrgetter
from typing import Any

import pytest
import reference
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from zoo import CASES, FAST, SIZES, Case, every_case, fast_case, small_case


def run(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits in float32, as the model comes, and targets."""
    args, kwargs, targets, _ = reference.unpack(batch)
    return reference.logits_of(model(*args, **kwargs)), targets


def gradients(case: Case, model: nn.Module) -> dict[Any, dict[str, Tensor]]:
    loss = reference.causal_lm_loss if case.causal else reference.cross_entropy
    return reference.group_gradients(model, case.batches(), case.layers, loss)


@small_case
def test_a_model_is_fresh_and_the_world_stays(case: Case) -> None:
    bystander = nn.Linear(2, 2)
    case.build()  # imports happen here
    before = snapshot(bystander)
    first, again, other = (case.build(seed).state_dict() for seed in (0, 0, 1))
    assert_unchanged(before, bystander)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert {tensor.dtype for tensor in first.values() if tensor.is_floating_point()} == {torch.float32}


@small_case
def test_batches_are_fresh_and_no_batch_holds_all_groups(case: Case) -> None:
    before, batches = torch.get_rng_state(), case.batches()
    assert torch.equal(before, torch.get_rng_state())
    groups = [[example.group for example in reference.examples([batch])] for batch in batches]
    assert [len(of_batch) for of_batch in groups] == list(SIZES)
    assert {group for of_batch in groups for group in of_batch} == {0, 1, 2, 3}
    assert all(len(set(of_batch)) < 4 for of_batch in groups)


@every_case
def test_it_runs_in_both_modes_and_tells_examples_apart(case: Case) -> None:
    model, batches = case.build(), case.batches()
    logits, targets = run(model, batches[0])
    assert logits.isfinite().all()
    assert len(logits) == len(targets) == SIZES[0]
    model.eval()
    for batch in batches:
        logits, _ = run(model, batch)
        assert logits.isfinite().all()
        assert len(logits) == 1 or (logits[0] - logits[1]).abs().max() > 1e-4


@small_case
def test_examples_do_not_meet_in_evaluation_mode(case: Case) -> None:
    model = case.build().eval()
    together = torch.cat([run(model, batch)[0].flatten() for batch in case.batches()])
    alone = torch.cat([logits.flatten() for logits in reference.logits(model, case.batches())])
    torch.testing.assert_close(together.double(), alone, rtol=1e-3, atol=1e-4)


@small_case
def test_layers_are_what_the_model_has(case: Case) -> None:
    model = case.build()
    for name, rows in case.layers.items():
        tensor = attrgetter(name)(model)
        found = reference.rows(tensor, rows.axis, rows.groups)
        assert (len(found), tuple(found[0].shape)) == (rows.count, rows.row_shape), name
        assert sum(row.numel() for row in found) == tensor.numel()
    order = [name for name in reference.tensors(reference.plain_copy(model)) if name in case.layers]
    assert order == list(case.layers)
    assert len(case.layers) == case.layer_count
    assert sum(rows.count for rows in case.layers.values()) == case.neuron_count


@small_case
def test_reference_gradients_are_finite_and_most_layers_have_some(case: Case) -> None:
    found = gradients(case, case.build())
    assert list(found) == [0, 1, 2, 3]
    for of_group in found.values():
        norms = [float(gradient.norm()) for gradient in of_group.values()]
        assert all(map(math.isfinite, norms))
        assert sum(norm > 1e-6 for norm in norms) > 0.9 * len(norms)


@small_case
def test_an_edit_shows_in_the_logits(case: Case) -> None:
    """Or tests of edits would pass for nothing."""
    model, batches = case.build(), case.batches(sizes=(2,))
    plain = reference.tensors(reference.plain_copy(model))
    before = torch.stack(reference.logits(model, batches))
    for name in [*case.layers][:: max(1, case.layer_count // 4)]:
        rows = case.layers[name]
        cut = reference.zeroed(plain[name], rows.axis, rows.groups, range(0, rows.count, 2))
        after = torch.stack(reference.logits(reference.with_tensors(model, {name: cut}), batches))
        assert (before - after).abs().max() > 1e-3, name


@small_case
def test_a_forward_in_evaluation_mode_and_a_copy_change_nothing(case: Case) -> None:
    """So that what a test of purity finds is the library's doing."""
    model, batches = case.build().eval(), case.batches()
    before = snapshot(model, batches)
    run(model, batches[0])
    copy.deepcopy(model)
    assert_unchanged(before, model, batches)


@fast_case
def test_the_reference_leaves_the_model_alone(case: Case) -> None:
    model, batches = case.build(), case.batches()
    before = snapshot(model, batches)
    gradients(case, model)
    reference.group_means(model, batches)
    reference.magnitudes(model, case.axes)
    assert_unchanged(before, model, batches)


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's own cross entropy: the mean over examples of the mean over the positions that count."""
    logits = logits.movedim(-1, 1) if logits.dim() == 3 else logits
    losses = cross_entropy(logits, targets, reduction="none").reshape(len(logits), -1)
    positions = 1 if targets.is_floating_point() else (targets != -100).reshape(len(logits), -1).sum(1)
    return (losses.sum(1) / positions).mean()


@pytest.mark.parametrize("name", [*FAST, "mlp_soft_targets", "keyword", "gru", "encoder"])
def test_the_reference_is_autograd_of_the_batch(name: str) -> None:
    """One group in one batch, in float32."""
    case = CASES[name]
    model, batches = case.build().eval(), case.batches(sizes=(4,))
    with parametrize.cached():  # one tensor for each parametrized weight
        wanted = [attrgetter(layer)(model) for layer in case.layers]
        expected = torch.autograd.grad(torch_loss(*run(model, batches[0])), wanted)
    found = reference.group_gradients(model, {"one": batches}, case.layers)["one"]
    for gradient, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient.float(), right, rtol=1e-3, atol=1e-5)


def test_the_linear_model_in_closed_form() -> None:
    """Softmax regression: the gradient is the mean of (p - y) x^T."""
    case = CASES["linear"]
    model = case.build()
    ((x, y, _),) = case.batches(sizes=(5,))
    residual = model(x).softmax(1) - nn.functional.one_hot(y, 3)
    expected = (residual.T @ x / 5).double().detach()
    found = reference.group_grad_norms(model, {"g": [(x, y)]}, case.axes)
    torch.testing.assert_close(found["g"]["weight"], expected.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_plain_copy_computes_the_same_and_the_original_still_works(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    x = case.batches()[0][0]
    before = model(x)
    plain = reference.plain_copy(model)
    assert [type(module) for module in plain.children()] == [nn.Linear, nn.Tanh, nn.Linear]
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(plain(x.double()).float(), before)
    assert torch.equal(model(x), before)


def test_rows_of_a_grouped_transposed_convolution_are_its_channels() -> None:
    layer = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
    x = torch.randn(1, 8, 3, 3)
    for channel in range(6):
        weight = reference.zeroed(layer.weight, 1, 2, [channel])
        silent = nn.functional.conv_transpose2d(x, weight, stride=2, groups=2).abs().amax((0, 2, 3)) == 0
        assert silent.tolist() == [i == channel for i in range(6)]


def test_topk_breaks_ties_by_number_and_takes_short_layers_whole() -> None:
    assert reference.topk([1.0, 3.0, 2.0, 3.0, 2.0], 3) == [1, 2, 3]
    layers = {"a": torch.tensor([1.0, 2.0, 2.0]), "b": torch.tensor([5.0])}
    assert reference.topk_per_layer(layers, 2) == [1, 2, 3]
    assert reference.percentile_ranks([0.5, 0.1, 0.5, 0.9]) == [75, 25, 75, 100]


def test_edits_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [math.nan, math.inf], [1.0, 1.0]])
    draws = {0: torch.tensor([1.0, -1.0])}
    assert reference.zeroed(weight, 0, 1, [1])[1].tolist() == [0, 0]
    assert reference.scaled(weight, 0, 1, [0], -2)[0].tolist() == [-6, -8]
    assert reference.initialised(weight[:1], 0, 1, draws, std=0.5)[0].tolist() == [0.5, -0.5]
    spread = math.sqrt(12.5)  # RMS of (3, 4)
    expected = torch.tensor([3 + spread, 4 - spread])
    torch.testing.assert_close(reference.noised(weight, 0, 1, draws, relative_std=1.0)[0], expected)
    earlier = torch.full((3, 2), 5.0)
    assert reference.rewound(weight, 0, 1, [0], earlier, 0.5)[0].tolist() == [4, 4.5]
    assert reference.rewound(weight, 0, 1, [1], earlier)[1].tolist() == [5, 5]
    assert reference.not_finite({"w": reference.row_norms(weight, 0), "v": torch.ones(2)}) == {"w": 1}


def test_soft_ignored_and_shifted_targets() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    hard = torch.tensor([[0, 1, -100], [-100, -100, 3]])
    logs = logits.log_softmax(-1)
    expected = torch.stack([-(logs[0, 0, 0] + logs[0, 1, 1]) / 2, -logs[1, 2, 3]])
    torch.testing.assert_close(reference.cross_entropy(logits, hard), expected)
    torch.testing.assert_close(reference.causal_lm_loss(logits, hard)[1], -logs[1, 1, 3])
    soft = torch.randn(2, 4, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(
        reference.cross_entropy(logits[:, 0], soft), cross_entropy(logits[:, 0], soft, reduction="none")
    )
    assert reference.accuracy(torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]), torch.tensor([[0, 0]])).tolist() == [0.5]


def test_paired_statistics_have_their_textbook_values() -> None:
    # 21 pairs, 1 gained and 7 lost: the airway example of Fagerland, Lydersen and Laake (2014)
    before = [0.0] + [1.0] * 7 + [1.0] + [0.0] * 12
    after = [1.0] + [0.0] * 7 + [1.0] + [0.0] * 12
    assert reference.bonett_price(before, after) == pytest.approx((-0.508, -0.013), abs=1e-3)
    assert reference.mcnemar(before, after) == pytest.approx(2 * 9 / 2**8)
    low, high = reference.bonett_price([1.0] * 28, [1.0] * 28)
    assert low == -high
    assert high > 0.05
    assert reference.mcnemar([1.0, 0.0], [1.0, 0.0]) == 1
    assert reference.student_quantile(0.95, 4) == pytest.approx(2.776445, abs=1e-5)
    assert reference.paired_t_p_value([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.0132, abs=1e-4)
