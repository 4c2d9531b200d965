"""`silence` makes the units it can silence exactly silent, and says which it cannot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES, marked

import neuronsurgery as ns
from neuronsurgery import CaptureError
from neuronsurgery.silencing import beside_layers


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
    """What the probed module gives for the chosen units once they are silent."""
    neurons = ns.select(ns.find_layout(model), {layer: indices})
    edit = ns.silence(neurons, model, (inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    return output_of(ns.apply(edit, model), probe, inputs).index_select(axis, torch.tensor(indices))


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
    wide = ns.silence(ns.select(ns.find_layout(model), {"0.weight": 1}), model, (inputs, torch.zeros(3).long())).neurons
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


def test_what_writes_into_a_residual_stream_adds_nothing() -> None:
    model = settled(Residual())
    batch = (torch.randn(3, 4), torch.zeros(3).long())
    neurons = ns.select(ns.find_layout(model), {"branch.weight": (0, 2)})
    edit = ns.silence(neurons, model, batch)
    assert named(edit.neurons.by_layer()) == {"branch.weight": (0, 2), "branch.bias": (0, 2)}
    assert torch.count_nonzero(output_of(ns.apply(edit, model), "branch", batch[0])[:, [0, 2]]) == 0


class Mixing(nn.Module):
    """Channels are reshaped into each other before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(36)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x).flatten(2))
        return normed.mean(2)


SHIFTED = "its output is shifted by what is no entry of a parameter of its own"


def test_mixed_channels_are_refused() -> None:
    model = settled(Mixing())
    neurons = ns.select(ns.find_layout(model), {"conv.weight": 0})
    with pytest.raises(ValueError, match=rf"zeros do not make 1 units silent:\n *conv.weight\[0\]: {SHIFTED}"):
        ns.silence(neurons, model, (torch.randn(2, 3, 8, 8), torch.zeros(2).long()))


def test_a_norm_that_is_used_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.norm(self.b(self.norm(self.a(x))))
            return normed

    model = settled(Twice())
    with pytest.raises(ValueError, match=SHIFTED):
        ns.silence(ns.select(ns.find_layout(model), {"a.weight": 1}), model, (torch.randn(2, 3), torch.zeros(2).long()))


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
    edit = ns.silence(ns.select(ns.find_layout(model), {layer: 1}), model, CASES[name].batches()[0])
    assert set(named(edit.neurons.by_layer())) == {layer, *found}


@pytest.mark.parametrize("name", marked(["mlp", "residual", "bert", "weight_norm", "tied"]))
def test_changes_nothing(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    before = snapshot(model, batch)
    neurons = ns.sample(ns.find_layout(model), 2, seed=0)
    try:
        edit = ns.silence(neurons, model, batch)
    except ValueError as refused:
        assert "do not make" in str(refused)  # noqa: PT017  # which units can be is tested above
        return
    finally:
        assert_unchanged(before, model, batch)
    assert len(edit.neurons & neurons) == 2


def test_errors() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.randn(2, 3), torch.zeros(2).long())
    other = ns.select(ns.find_layout(nn.Linear(5, 2)), {"weight": 0})
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.silence(other, model, batch)
    model.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(CaptureError, match="hooks"):
        ns.silence(ns.select(ns.find_layout(model), {"weight": 0}), model, batch)


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
def test_any_shift_behind_a_unit_is_added_or_refused(
    shift: Callable[[Tensor, dict[str, Tensor]], Tensor], frozen: bool, silent: bool
) -> None:
    model, images = ByHand(shift, frozen).eval(), torch.randn(2, 3, 8, 8)
    said = f"{SHIFTED}|addcmul mixes it with others, shifts it"
    with pytest.raises(ValueError, match=said) if not silent else contextlib.nullcontext():
        assert silenced(model, "conv.weight", [1, 2], "after", images).abs().max() == 0


class Through(nn.Module):
    """A convolution, a function of its output, and a layer that reads that."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.after, self.head, self.function = nn.Conv2d(3, 4, 3), nn.Identity(), nn.LazyLinear(2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.function(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a sigmoid": (torch.sigmoid, False),
    "softplus": (nn.functional.softplus, False),
    "an exponential": (torch.exp, False),
    "hyperbolic tangent": (torch.tanh, True),
    "a swish by hand": (lambda x: x * torch.sigmoid(x), True),
    "a GELU by hand": (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x.pow(3)))), True),
    "pooling": (lambda x: nn.functional.max_pool2d(x, 2), True),
    "a mean of places": (lambda x: x.mean((2, 3)), True),
    "a mean of channels": (lambda x: x.mean(1), True),
}


@pytest.mark.parametrize(("function", "silent"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_is_not_zero_at_zero_is_refused(function: Callable[[Tensor], Tensor], silent: bool) -> None:
    torch.manual_seed(0)
    model, images = Through(function), torch.randn(2, 3, 8, 8)
    model(images)
    neurons = ns.select(ns.find_layout(settled(model)), {"conv.weight": 1})
    with (
        pytest.raises(ValueError, match="a function that is not zero at zero")
        if not silent
        else (contextlib.nullcontext())
    ):
        view = ns.apply(ns.silence(neurons, model, (images, torch.zeros(2).long())), model)
        assert not output_of(view, "conv", images)[:, 1].any()
        if silent and (after := output_of(view, "after", images)).dim() > 1 and after.shape[1] == 4:
            assert not after[:, 1].any()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("last", [False, True])
def test_a_softmax_counts_a_zero_as_any_other_number(name: str, last: bool) -> None:
    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(3, 4)
            self.head = nn.Identity() if last else nn.Linear(1 if name == "logsumexp" else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            weights: Tensor = getattr(torch, name)(self.router(x), 1).reshape(len(x), -1)
            return self.head(weights)  # type: ignore[no-any-return]

    model, inputs = Weighing(), torch.randn(3, 3)
    neurons = ns.select(ns.find_layout(model, where="router.*"), {"*": 1})
    with pytest.raises(ValueError, match=rf"router.weight\[1\]: {name} mixes it with others"):
        ns.silence(neurons, model, (inputs, torch.zeros(3).long()))


class Dense(nn.Module):
    """What is made is put beside what was there, and normalised with it, as in a densely connected network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.norm, self.other, self.head = nn.BatchNorm2d(9), nn.BatchNorm2d(12), nn.Conv2d(9, 2, 1)
        self.tail = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        normed = self.other(torch.cat([x, first, second], 1)).relu()
        return self.head(self.norm(torch.cat([first, second], 1))).mean((2, 3)) + self.tail(normed.mean((2, 3)))  # type: ignore[no-any-return]


def test_channels_are_followed_through_concatenations() -> None:
    torch.manual_seed(0)
    model, images = settled(Dense()), torch.randn(2, 3, 8, 8)
    neurons = ns.select(ns.find_layout(model), {"second.weight": 3})
    edit = ns.silence(neurons, model, (images, torch.zeros(2).long()))
    assert named(edit.neurons.by_layer()) == {
        "second.weight": (3,),
        "second.bias": (3,),
        "norm.weight": (7,),
        "norm.bias": (7,),
        "other.weight": (10,),
        "other.bias": (10,),
    }
    assert not output_of(ns.apply(edit, model), "norm", images)[:, 7].any()
    assert not output_of(ns.apply(edit, model), "other", images)[:, 10].any()


# --- recurrent layers -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer whose whole output a norm and a linear layer read."""

    def __init__(self, cell: nn.RNNBase, start: float = 0.0) -> None:
        super().__init__()
        width = (cell.proj_size or cell.hidden_size) * (1 + cell.bidirectional)
        self.cell, self.norm, self.head, self.start = cell, nn.LayerNorm(width), nn.Linear(width, 2), start

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.cell.num_layers * (1 + self.cell.bidirectional), len(x), self.cell.hidden_size)
        given = self.cell(x) if self.start == 0 else self.cell(x, torch.full(shape, self.start))
        return self.head(self.norm(given[0]).mean(1))  # type: ignore[no-any-return]


CELLS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(3, 4, batch_first=True),
    "lstm of two layers and both directions": lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
    "lstm without biases": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
    "gru": lambda: nn.GRU(3, 4, 2, batch_first=True),
    "rnn": lambda: nn.RNN(3, 4, batch_first=True),
    "rnn with relu": lambda: nn.RNN(3, 4, batch_first=True, nonlinearity="relu"),
}
SEQUENCES = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
NO_TARGETS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh"])
def test_a_recurrent_unit_is_exactly_zero(name: str, weight: str) -> None:
    torch.manual_seed(0)
    model = settled(Recurrent(CELLS[name]()))
    cell = model.cell
    last, ways = cell.num_layers - 1, 1 + cell.bidirectional
    for way in range(ways):
        layer = f"cell.{weight}_l{last}{'_reverse' * way}"
        gates = cell.get_parameter(layer.removeprefix("cell.")).shape[0] // cell.hidden_size
        for gate in range(gates):
            row = ns.select(ns.find_layout(model), {layer: gate * cell.hidden_size + 2})
            edit = ns.silence(row, model, (SEQUENCES, NO_TARGETS))
            view = ns.apply(edit, model)
            assert not view.cell(SEQUENCES)[0][..., way * cell.hidden_size + 2].any()
            assert not output_of(view, "norm", SEQUENCES)[..., way * cell.hidden_size + 2].any()
            assert view.cell(SEQUENCES)[0].any()


def test_units_of_an_inner_recurrent_layer_and_of_one_with_a_projection() -> None:
    torch.manual_seed(0)
    model = settled(Recurrent(nn.GRU(3, 4, 2, batch_first=True)))
    row = ns.select(ns.find_layout(model), {"cell.weight_ih_l0": 1})
    edit = ns.silence(row, model, (SEQUENCES, NO_TARGETS))
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert sorted(named(edit.neurons.by_layer())) == sorted(f"cell.{name}" for name in names)
    view, inner = ns.apply(edit, model), nn.GRU(3, 4, batch_first=True)
    with torch.no_grad():
        for name in names:
            inner.get_parameter(name).copy_(getattr(view.cell, name))
    assert not inner(SEQUENCES)[0][..., 1].any()


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_unit_that_is_projected() -> None:
    torch.manual_seed(0)
    model = settled(Recurrent(nn.LSTM(3, 4, batch_first=True, proj_size=2)))
    row = ns.select(ns.find_layout(model), {"cell.weight_ih_l0": 1})
    edit = ns.silence(row, model, (SEQUENCES, NO_TARGETS))
    columns = ns.find_layout(model, where="cell.weight_hr_l0", patterns={"cell.weight_hr_l0": "p unit -> unit p"})
    wanted = ns.apply(ns.zero_out(columns.neurons([1])), model)(SEQUENCES)
    assert torch.equal(ns.apply(edit, model)(SEQUENCES), wanted)
    assert not torch.equal(model(SEQUENCES), wanted)


def test_a_state_that_does_not_begin_at_zero_is_refused() -> None:
    model = settled(Recurrent(nn.GRU(3, 4, batch_first=True), start=0.5))
    with pytest.raises(ValueError, match="its first state is not zero"):
        ns.silence(ns.select(ns.find_layout(model), {"cell.weight_ih_l0": 1}), model, (SEQUENCES, NO_TARGETS))


# --- slices that are no rows -----------------------------------------------------------------------------------------


def test_columns_of_a_layer_that_alone_reads_its_input() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    batch = (torch.randn(3, 3), NO_TARGETS)
    units = ns.find_units(model, batch, "unit")
    assert ns.silence(units.neurons([1]), model, batch) == ns.zero_out(units.neurons([1]))
    squares = ns.find_layout(model, patterns={"0.weight": ("(a b) i -> b a i", {"a": 2})})
    rows = ns.silence(ns.select(squares, {"0.weight": 1}), model, batch)
    assert sorted(map(str, rows.neurons - squares.neurons([1]))) == ["0.bias[1]", "0.bias[3]"]


def test_what_is_no_unit_is_refused_with_its_reason() -> None:
    torch.manual_seed(0)
    model, batch = settled(Residual()), (torch.randn(3, 4), NO_TARGETS)
    columns = ns.find_layout(model, where="branch.weight", patterns={"branch.weight": "o i -> i o"})
    with pytest.raises(ValueError, match="its input is read by others, too"):
        ns.silence(columns.neurons([0]), model, batch)
    blocks = ns.find_layout(
        model, where="branch.weight", patterns={"branch.weight": ("(a o) (b i) -> (a b) o i", {"a": 2, "b": 2})}
    )
    with pytest.raises(ValueError, match="neither whole rows nor whole columns"):
        ns.silence(blocks.neurons([0]), model, batch)
    entries = ns.find_layout(model, extra="*")
    with pytest.raises(ValueError, match="an entry alone makes no unit: give the row that it belongs to"):
        ns.silence(ns.select(entries, {"norm.bias": 0}), model, batch)
    silent = ns.silence(ns.select(entries, {"branch.weight": 1}), model, batch)
    assert ns.silence(silent.neurons, model, batch) == silent


def test_embeddings_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    batch = (torch.tensor([[0, 1], [2, 3]]), torch.zeros(2).long())
    with pytest.raises(ValueError, match="embedding reads its weight"):
        ns.silence(ns.select(ns.find_layout(model, extra="0.weight"), {"0.weight": 1}), model, batch)


# --- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", marked(CASES))
def test_whatever_is_called_silent_is_zero_where_it_is_made(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    looked = [layer for layer in ns.find_layout(model) if isinstance(_module(model, layer), nn.Linear | nn.Conv2d)]
    for layer in looked[:: max(1, len(looked) // 4)]:
        try:
            edit = ns.silence(ns.Neurons({layer: [layer.count - 1]}), model, batch)
        except ValueError as refused:
            assert "zeros do not make 1 units silent" in str(refused)  # noqa: PT017
            continue
        outputs: list[Tensor] = []
        view = ns.apply(edit, model).eval()
        _module(view, layer).register_forward_hook(lambda *given, keep=outputs.append: keep(given[-1].clone()))
        ns.evaluate(view, [batch])
        axis = 1 if isinstance(_module(model, layer), nn.Conv2d) else -1
        for output in outputs:  # of a module that is not called, but whose weight is read, there is none
            assert not output.select(axis, layer.count - 1).any()


@pytest.mark.parametrize("name", marked(["mlp", "residual", "weight_norm", "tied", "lstm", "mobilenet"]))
def test_one_capture_serves_all_layers(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batches()[0]
    before = snapshot(model, batch)
    layout = ns.find_layout(model)
    beside = beside_layers(layout, model, batch)
    assert_unchanged(before, model, batch)
    for layer in list(layout)[:: max(1, len(layout) // 6)]:
        whole = ns.Neurons({layer: range(layer.count)})
        try:
            assert ns.silence(whole, model, batch).neurons == whole | beside[layer]
        except ValueError:
            assert layer not in beside


def _module(model: nn.Module, layer: ns.Layer) -> nn.Module:
    return model.get_submodule(layer.parameter.rpartition(".")[0])


@pytest.mark.architectures
def test_an_expert_of_a_fused_mixture_goes_with_its_bias() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    model = settled(transformers.GptOssForCausalLM(config))
    tokens = torch.randint(64, (2, 6))
    batch = ({"input_ids": tokens}, tokens)
    with pytest.warns(UserWarning, match="an expert's bias stays"):
        experts = ns.find_units(model, batch, "expert")
    edit = ns.silence(experts.neurons([2]), model, batch)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        mixture = wanted.model.layers[0].mlp.experts
        mixture.down_proj[2], mixture.down_proj_bias[2] = 0, 0
        assert torch.equal(ns.apply(edit, model)(tokens).logits, wanted(tokens).logits)
        assert not torch.equal(ns.apply(ns.zero_out(experts.neurons([2])), model)(tokens).logits, wanted(tokens).logits)
