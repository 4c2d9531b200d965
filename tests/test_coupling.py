"""`coupled` makes the units it can silence exactly silent, and says which it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES, marked

import neuronsurgery as ns
from neuronsurgery import CaptureError


def settled(model: nn.Module) -> nn.Module:
    """No parameter at a start value that would hide what is left of a unit."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def output_of(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []
    # A copy: what follows may write into it.
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    model(inputs)
    hook.remove()
    return kept[0]


def silenced(model: nn.Module, layer: str, indices: Any, probe: str, inputs: Tensor, axis: int = 1) -> Tensor:
    """What the probed module gives for the chosen units once the widened set is zeroed."""
    neurons = ns.select(ns.find_layout(model), {layer: indices})
    wide = ns.coupled(neurons, model, (inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    view = ns.apply(ns.zero_out(wide), model)
    return output_of(view, probe, inputs).index_select(axis, torch.tensor(indices))


IMAGES = (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "layer", "probe", "shape", "axis"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "0.weight", "1", IMAGES, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4)), "0.weight", "1", IMAGES, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), "0.weight", "2", IMAGES, 1),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), "0.weight", "1", IMAGES, 1),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), "0.weight", "1", (2, 4, 5, 5), 1),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "0.weight", "1", (5, 3), -1),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(), nn.LayerNorm(4)), "0.weight", "3", (5, 3), -1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0.weight", "0", IMAGES, 1),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), "0.weight", "1", (2, 2, 4, 4, 4), 1),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), "0.weight", "1", (3, 2, 6), 1),
    ],
    ids=[
        "conv-bn",
        "conv-gn",
        "conv-relu-bn",
        "transposed-bn",
        "grouped-transposed-bn",
        "linear-ln",
        "gelu-ln",
        "conv",
        "conv3d-bn",
        "conv1d-bn",
    ],
)
def test_the_unit_is_exactly_zero(model: nn.Module, layer: str, probe: str, shape: tuple[int, ...], axis: int) -> None:
    settled(model)
    inputs = torch.randn(shape)
    assert output_of(model, probe, inputs).abs().min(0).values.max() > 0
    assert torch.count_nonzero(silenced(model, layer, (1, 2), probe, inputs, axis)) == 0


def test_zeroing_the_weight_alone_leaves_the_unit_loud() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 1})), model)
    assert output_of(view, "1", torch.randn(IMAGES))[:, 1].abs().max() > 0


def test_other_units_of_a_batch_norm_are_untouched() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    inputs = torch.randn(IMAGES)
    wide = ns.coupled(ns.select(ns.find_layout(model), {"0.weight": 1}), model, (inputs, torch.zeros(3).long()))
    assert sorted(named(wide.by_layer())) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    after = output_of(ns.apply(ns.zero_out(wide), model), "1", inputs)
    assert torch.equal(after[:, [0, 2, 3]], output_of(model, "1", inputs)[:, [0, 2, 3]])


class Residual(nn.Module):
    """The branch is added to the stream before the stream is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x + self.branch(x)))
        return logits


def test_a_residual_is_warned_of_and_gets_its_bias() -> None:
    model = settled(Residual())
    batch = (torch.randn(3, 4), torch.zeros(3).long())
    neurons = ns.select(ns.find_layout(model), {"branch.weight": (0, 2)})
    with pytest.warns(UserWarning, match=r"the units of branch.weight\[0\], branch.weight\[2\] are joined with others"):
        wide = ns.coupled(neurons, model, batch)
    assert named(wide.by_layer()) == {"branch.weight": (0, 2), "branch.bias": (0, 2)}
    assert torch.count_nonzero(output_of(ns.apply(ns.zero_out(wide), model), "branch", batch[0])[:, [0, 2]]) == 0


class Mixing(nn.Module):
    """Channels are reshaped into each other before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(36)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x).flatten(2))
        return normed.mean(2)


def test_mixed_channels_are_warned_of() -> None:
    model = settled(Mixing())
    neurons = ns.select(ns.find_layout(model), {"conv.weight": 0})
    with pytest.warns(UserWarning, match=r"the units of conv.weight\[0\]"):
        wide = ns.coupled(neurons, model, (torch.randn(2, 3, 8, 8), torch.zeros(2).long()))
    assert named(wide.by_layer()) == {"conv.weight": (0,), "conv.bias": (0,)}


def test_a_norm_that_is_used_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.norm(self.b(self.norm(self.a(x))))
            return normed

    model = settled(Twice())
    with pytest.warns(UserWarning, match="joined with others"):
        wide = ns.coupled(
            ns.select(ns.find_layout(model), {"a.weight": 1}), model, (torch.randn(2, 3), torch.zeros(2).long())
        )
    assert sorted(named(wide.by_layer())) == ["a.bias", "a.weight"]


@pytest.mark.parametrize(
    ("name", "layer", "found"),
    [
        ("resnet18", "layer1.0.conv1.weight", {"layer1.0.bn1.weight", "layer1.0.bn1.bias"}),
        ("resnet18", "layer1.0.conv2.weight", {"layer1.0.bn2.weight", "layer1.0.bn2.bias"}),
    ],
)
@pytest.mark.architectures
def test_on_real_architectures(name: str, layer: str, found: set[str]) -> None:
    model = CASES[name].build()
    wide = ns.coupled(ns.select(ns.find_layout(model), {layer: 1}), model, CASES[name].batches()[0])
    assert set(named(wide.by_layer())) == {layer, *found}


@pytest.mark.parametrize("name", marked(["mlp", "residual", "bert", "weight_norm", "tied"]))
def test_changes_nothing(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    before = snapshot(model, batch)
    neurons = ns.sample(ns.find_layout(model), 2, seed=0)
    try:
        wide = ns.coupled(neurons, model, batch)
    except UserWarning:
        return  # warnings are errors here; what it warns of is tested above
    finally:
        assert_unchanged(before, model, batch)
    assert len(wide & neurons) == 2


def test_errors() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.randn(2, 3), torch.zeros(2).long())
    other = ns.select(ns.find_layout(nn.Linear(5, 2)), {"weight": 0})
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.coupled(other, model, batch)
    model.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(CaptureError, match="hooks"):
        ns.coupled(ns.select(ns.find_layout(model), {"weight": 0}), model, batch)


class Moved(nn.Module):
    """Channels are moved to where the norm looks for them."""

    def __init__(self, layer: nn.Module, move: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.move, self.norm = layer, move, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.move(self.layer(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "shape", "axis"),
    [
        (Moved(nn.Conv2d(3, 4, 3), lambda x: x.permute(0, 2, 3, 1), nn.LayerNorm(4)), IMAGES, -1),
        (Moved(nn.Linear(3, 4), lambda x: x.permute(0, -1, 1), nn.BatchNorm1d(4)), (2, 5, 3), 1),
        (Moved(nn.Linear(3, 4), lambda x: x.transpose(1, 2), nn.BatchNorm1d(4)), (2, 5, 3), 1),
        (Moved(nn.Linear(3, 4), lambda x: x.transpose(0, 1), nn.LayerNorm(4)), (2, 5, 3), -1),
    ],
    ids=["permute-back", "permute-forward", "transpose", "transpose-of-others"],
)
def test_a_norm_behind_a_permutation_is_found(model: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    settled(model)
    assert not silenced(model, "layer.weight", [1, 3], "norm", torch.randn(shape), axis).any()


# --- shifts that are no part of a norm's operator --------------------------------------------------------------------


class ByHand(nn.Module):
    """A convolution and an affine layer of a kind of its own."""

    def __init__(self, affine: Callable[[Tensor, dict[str, Tensor]], Tensor], frozen: bool) -> None:
        super().__init__()
        self.conv, self.head, self.after = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Identity()
        self.affine = affine
        self.tensors = nn.ParameterDict() if not frozen else nn.Module()
        for name in ("gamma", "beta", "mean", "var"):
            tensor = torch.rand(4) + 0.5
            if frozen:
                self.tensors.register_buffer(name, tensor)
            else:
                self.tensors[name] = nn.Parameter(tensor)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        tensors = {name: getattr(self.tensors, name) for name in ("gamma", "beta", "mean", "var")}
        return self.head(self.after(self.affine(self.conv(x), tensors)).mean((2, 3)))  # type: ignore[no-any-return]


def frozen_norm(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    scale = t["gamma"] * (t["var"] + 1e-5).rsqrt()
    return x * scale.reshape(1, -1, 1, 1) + (t["beta"] - t["mean"] * scale).reshape(1, -1, 1, 1)


def affine(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x * t["gamma"][:, None, None] + t["beta"].view(-1, 1, 1)


SHIFTS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "a frozen batch norm by hand": (frozen_norm, True, False),
    "a norm by hand whose shift is computed": (frozen_norm, False, False),
    "an affine layer by hand": (affine, False, True),
    "an affine layer of buffers": (affine, True, False),
    "a functional norm of buffers": (
        lambda x, t: nn.functional.batch_norm(x, t["mean"], t["var"], t["gamma"], t["beta"]),
        True,
        False,
    ),
    "a norm without scale and shift": (lambda x, t: nn.functional.batch_norm(x, t["mean"], t["var"]), True, False),
    "a number": (lambda x, t: x + 0.31, True, False),
    "a shift of the wrong axis": (lambda x, t: x[..., :4] + t["beta"], False, False),
    "one operator for both": (
        lambda x, t: torch.addcmul(t["beta"][:, None, None], x, t["gamma"][:, None, None]),
        False,
        False,
    ),
    "a scale alone": (lambda x, t: x * t["gamma"][:, None, None] / 3, True, True),
    "two shifts": (lambda x, t: affine(x, t) - t["mean"][:, None, None], False, True),
}


@pytest.mark.parametrize(("shift", "frozen", "silent"), SHIFTS.values(), ids=SHIFTS)
def test_any_shift_behind_a_unit_is_added_or_warned_of(
    shift: Callable[[Tensor, dict[str, Tensor]], Tensor], frozen: bool, silent: bool
) -> None:
    model, images = ByHand(shift, frozen).eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="not be silent") if not silent else contextlib.nullcontext():
        left = silenced(model, "conv.weight", [1, 2], "after", images)
    assert (left.abs().max() == 0) == silent
