"""A layer of which an edit zeroes channels is not run, and yet every bit is that of the edited model's own forward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_sweeps import assert_equal_one_by_one, every_kind, one_by_one
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES, Case, tiered

import neuronsurgery as ns
from neuronsurgery.copies import eval_copy, make_runner
from neuronsurgery.graph import fills, trust
from neuronsurgery.graph.export import capture
from neuronsurgery.graph.fills import Fill, Fills
from neuronsurgery.graph.schedules import schedule
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.plans import Edited, plan
from neuronsurgery.precision import same_bits
from neuronsurgery.surveys import survey


class Log:
    """How often layers were filled, and how often not, by the first of their operators."""

    def __init__(self) -> None:
        self.filled: Counter[str] = Counter()
        self.run: Counter[str] = Counter()
        self.lengths: set[int] = set()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(trust, "WORTH", 0.0)  # a capture for whatever there is to run
    found, taken = Log(), Fills.taken

    def noted(self: Fills, graph: Any, fill: Fill, *rest: Any) -> bool:
        result = taken(self, graph, fill, *rest)
        name = str(graph.nodes[fill.slots[0]].target).split(".")[1]
        (found.filled if result else found.run)[name] += 1
        found.lengths.add(len(fill.slots))
        return result

    monkeypatch.setattr(Fills, "taken", noted)
    return found


def zeroing(model: nn.Module, *, most: int = 4) -> dict[str, ns.Edit]:
    """Each of the first neurons of every layer zeroed, and some of several layers at once."""
    layout = ns.find_layout(model)
    edits = {
        f"{layer.parameter} {i}": ns.zero_out(ns.select(layout, {layer.parameter: i}))
        for layer in layout
        for i in range(min(most, layer.count))
    }
    edits |= {str(seed): ns.zero_out(ns.sample(layout, min(5, layout.count), seed=seed)) for seed in range(3)}
    edits["all"] = ns.zero_out(layout.neurons(range(layout.count)))
    return edits


def data_of(*inputs: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)) % 2) for x in inputs]


def headed(body: nn.Module, like: Tensor) -> nn.Module:
    """A layer and a head that turns what it makes into logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        size = body(like)[0].numel()
    return nn.Sequential(body, nn.Flatten(), nn.Linear(size, 3))


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it: columns are neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))
        self.neuron_patterns = {"weight": "i n -> n i"}

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(Conv1D):
    """The same without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def normed(*layers: nn.Module) -> nn.Module:
    """Layers that end in a batch norm which has seen something."""
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]  # it tracks
            layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]  # as above
            nn.init.uniform_(layer.weight, -1, 1)
            nn.init.uniform_(layer.bias, -1, 1)
    return nn.Sequential(*layers)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    # name: layer, shape of an example, its operator
    "linear": (lambda: nn.Linear(5, 6), (5,), "linear"),
    "linear of sequences": (lambda: nn.Linear(5, 6), (4, 5), "linear"),
    "linear without bias": (lambda: nn.Linear(5, 6, bias=False), (5,), "linear"),
    "addmm": (Conv1D, (5,), "addmm"),
    "matmul": (Product, (5,), "matmul"),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9), "conv1d"),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 9, 9), "conv2d"),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (4, 9, 9), "conv2d"),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 9, 9), "conv2d"),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9), "conv2d"),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 9, 9), "conv2d"),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 5, 5, 5), "conv3d"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 5, 5), "conv_transpose2d"),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 5, 5), "conv_transpose2d"),
    "norm behind": (lambda: normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), (4, 9, 9), "conv2d"),
    "soft behind": (lambda: normed(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU()), (5,), "linear"),
}


def built(name: str) -> tuple[nn.Module, tuple[int, ...], str]:
    torch.manual_seed(1)
    layer, shape, operator = KINDS[name]
    body = layer().eval()
    return headed(body, torch.randn(2, *shape)).eval(), shape, operator


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_layer_is_filled(name: str, log: Log) -> None:
    model, shape, operator = built(name)
    swept = assert_equal_one_by_one(model, zeroing(model), data_of(*(torch.randn(n, *shape) for n in (4, 4, 3))))
    assert swept.reasons == ()
    assert log.filled[operator] >= 3 * 6 and not log.run
    assert (max(log.lengths) == 3) == ("behind" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d", "norm behind"])
def test_in_other_precisions(name: str, dtype: torch.dtype, log: Log) -> None:
    model, shape, operator = built(name)
    inputs = [torch.randn(n, *shape, dtype=dtype) for n in (4, 3)]
    edits = zeroing(model)
    model = model.to(dtype)
    forward = CheckedForward(make_runner(survey(model)))
    for x in inputs:
        assert_same(forward, model, edits, x)
    assert log.filled[operator] and not log.run


def assert_same(forward: CheckedForward, model: nn.Module, edits: Mapping[str, ns.Edit], x: Tensor) -> None:
    """The logits of a replay are those of each edited model, to the last bit."""
    parameters = dict(model.named_parameters())
    edited = {label: Edited(plan(edit, model), parameters) for label, edit in edits.items()}
    for label, logits in forward.run((x,), {}, edited):
        with torch.no_grad():
            assert same_bits(logits, eval_copy(ns.bake(edits[label], model))(x)), label


def test_channels_last(log: Log) -> None:
    model, shape, _ = built("norm behind")
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(4, *shape).contiguous(memory_format=torch.channels_last)
    assert_equal_one_by_one(model, zeroing(model), data_of(x))
    assert log.filled["conv2d"] and not log.run


@tiered("mlp", "residual", "grouped", "tied", "shared_module", "shared_parameter", "weight_norm", "unet", "gpt2")
def test_the_zoo(case: Case, log: Log) -> None:
    """The law: a sweep equals one by one, whatever was filled."""
    edits = every_kind(case.build()) | zeroing(case.build(), most=2)
    assert_equal_one_by_one(case.build(), edits, case.batches(sizes=(4, 4, 3, 1)))


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_most_layers_are_filled(name: str, log: Log) -> None:
    case = CASES[name]
    assert_equal_one_by_one(case.build(), zeroing(case.build()), case.batches())
    assert sum(log.filled.values()) > 10 and not log.run


# Where the bits would be others


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_zero_times_what_is_not_finite_is_not_zero(name: str, bad: float, log: Log) -> None:
    model, shape, operator = built(name)
    x = torch.randn(4, *shape)
    worse = x.clone()
    worse[1].view(-1)[0] = bad
    assert_equal_one_by_one(model, zeroing(model), data_of(x, worse, x))
    assert log.run[operator] * 2 == log.filled[operator] > 0


def test_a_bias_of_minus_zero_is_a_matter_of_the_input(log: Log) -> None:
    model, shape, _ = built("linear")
    with torch.no_grad():
        model[0].bias[2] = -0.0
    edits = {str(i): ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": i})) for i in range(4)}
    assert_equal_one_by_one(model, edits, data_of(-torch.rand(4, *shape), torch.rand(4, *shape)))
    assert not log.filled


class FromTheFirst(nn.Module):
    """Adds its products up from the first one: of negative inputs and zero weights that is -0.0."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        total = x[..., :1] * weight[:, 0]
        for i in range(1, weight.shape[1]):
            total = total + x[..., i : i + 1] * weight[:, i]
        return total


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def from_the_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return FromTheFirst()(x, weight)


def uneasy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What one row comes to depends on whether another one is zero."""
    zeros = (weight == 0).all(1).sum().to(x.dtype)
    return nn.functional.linear(x, weight, bias) + torch.where((weight == 0).all(1), 0.0, zeros * 1e-3)


class Patched:
    """Stands in a graph for the operator of a linear layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls = 0

    def __str__(self) -> str:
        return "aten.linear.default"

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize(("function", "filled"), [(plain, True), (from_the_first, False), (uneasy, False)])
def test_a_layer_that_differs_is_run(function: Callable[..., Tensor], filled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3)).eval()
    graph = capture(make_runner(survey(model)), (torch.randn(3, 4),))
    patched = Patched(function)
    graph.nodes[graph.tainted(["0.weight"])[0]].target = patched  # type: ignore[assignment]  # no operator of torch's
    layout, parameters = ns.find_layout(model), dict(model.named_parameters())
    edits = {i: ns.zero_out(ns.select(layout, {"0.weight": i})) for i in range(5)}
    edited = {i: Edited(plan(edit, model), parameters) for i, edit in edits.items()}
    planned, known = schedule(graph, edited), Fills()
    # Positive inputs, for which all of them agree, but the one that depends on other rows.
    for n, x in enumerate((torch.rand(3, 4), -torch.rand(3, 4), torch.rand(3, 4))):
        patched.calls = 0
        for i, logits in planned.run((x,), {}, edited, known):
            weight = edited[i]["0.weight"]
            with torch.no_grad():
                assert same_bits(logits, model[1](function(x, weight)))
        assert patched.calls == (1 if filled else 6) or n == 0


def test_a_signature_is_checked_of_its_own(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape, _ = built("linear")
    checks = []
    constants = fills._constants
    monkeypatch.setattr(fills, "_constants", lambda *args: checks.append(args) or constants(*args))
    edits = {str(i): ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": i})) for i in range(4)}
    ns.sweep(model, edits, data_of(*(torch.randn(n, *shape) for n in (4, 4, 3, 4, 3))))
    assert len(checks) == 2


# What else an edit changes


def mean_edits(model: nn.Module, data: Any) -> dict[str, ns.Edit]:
    layout = ns.find_layout(model)
    chosen = {f"{layer.parameter} {i}": ns.select(layout, {layer.parameter: i}) for layer in layout for i in (0, 1)}
    chosen["several"] = ns.sample(layout, 3, seed=0)
    return {label: ns.mean_out(neurons, model, data) for label, neurons in chosen.items()}


@pytest.mark.parametrize("name", ["linear", "conv2d", "norm behind", "soft behind"])
def test_channels_held_at_their_mean_are_filled_with_it(name: str, log: Log) -> None:
    model, shape, operator = built(name)
    data = data_of(*(torch.randn(n, *shape) for n in (4, 4, 3)))
    assert_equal_one_by_one(model, mean_edits(model, data), data)
    assert log.filled["batch_norm" if "behind" in name else operator] and not log.run


@pytest.mark.parametrize("value", [0.7, 0.0, -0.0, math.inf, math.nan])
@pytest.mark.parametrize("at", [1, 2])
def test_a_bias_that_is_edited_too(value: float, at: int, log: Log) -> None:
    """Filled where the entry of a zeroed row is set to a plain number, run where it is another one's."""
    model, shape, _ = built("linear")
    layout = ns.find_layout(model, extra="0.bias")
    zero = ns.zero_out(ns.select(layout, {"0.weight": 1}))
    edit = ns.compose(zero, ns.set_rows(ns.select(layout, {"0.bias": at}), torch.tensor([value])))
    assert_equal_one_by_one(model, {"zero": zero, "both": edit}, data_of(torch.randn(4, *shape)))
    assert log.filled["linear"] == (2 if at == 1 and value in (0.7, 0.0) and math.copysign(1, value) > 0 else 1)


def test_zero_and_then_something_else_is_not_zero(log: Log) -> None:
    model, shape, _ = built("linear")
    layout = ns.find_layout(model)
    row = ns.select(layout, {"0.weight": 1})
    edits = {
        "noise": ns.compose(ns.zero_out(row), ns.random_noise(row, std=1.0)),
        "another": ns.compose(ns.zero_out(row), ns.scale(ns.select(layout, {"0.weight": 2}), 2.0)),
    }
    assert_equal_one_by_one(model, edits, data_of(torch.randn(4, *shape)))
    assert not log.filled and not log.run


def test_a_norm_behind_that_the_same_edit_changes(log: Log) -> None:
    model, shape, _ = built("norm behind")
    layout = ns.find_layout(model, extra="0.1.weight")
    zero = ns.zero_out(ns.select(layout, {"0.0.weight": 0}))
    scaled = ns.scale(ns.select(layout, {"0.1.weight": (1, 2)}), 3.0)
    assert_equal_one_by_one(model, {"both": ns.compose(zero, scaled)}, data_of(torch.randn(4, *shape)))
    assert log.filled["conv2d"] == 1 and log.lengths == {1}


class Columns(nn.Module):
    """A grouped transposed convolution whose neurons somebody cuts otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose1d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(2)


@pytest.mark.parametrize("pattern", ["i n k -> n i k", "n i k -> n i k", "i n k -> k i n"])
def test_rows_that_are_no_channels_are_not_filled(pattern: str, log: Log) -> None:
    torch.manual_seed(0)
    model = Columns().eval()
    edits = {
        "cut": ns.zero_out(ns.select(ns.find_layout(model, patterns={"layer.weight": pattern}), {"layer.weight": 1}))
    }
    assert_equal_one_by_one(model, edits, data_of(torch.randn(4, 4, 5)))
    assert not log.filled and not log.run


class Twice(nn.Module):
    """One weight that two operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x) + self.layer.weight.sum(1) + self.layer(x.tanh()))


def test_a_weight_with_another_use_is_not_filled(log: Log) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    edits = {str(i): ns.zero_out(ns.select(ns.find_layout(model), {"layer.weight": i})) for i in range(4)}
    assert_equal_one_by_one(model, edits, data_of(torch.randn(4, 4)))
    assert not log.filled and not log.run


class InPlace(nn.Module):
    """What follows the layer writes into its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.relu_().add_(1).mul_(x)
        return self.head(y)


def test_what_follows_may_write_into_the_output(log: Log) -> None:
    torch.manual_seed(0)
    model = InPlace().eval()
    edits = zeroing(model)
    assert_equal_one_by_one(model, edits | {"again": edits["all"]}, data_of(torch.randn(4, 4), torch.randn(4, 4)))
    assert log.filled["linear"] and not log.run


# Edits that begin alike


class Products(TorchDispatchMode):
    """Count the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Products]:
    with Products() as products:
        yield products


def test_edits_that_begin_alike_share_the_run_up_to_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).eval()
    layout, parameters = ns.find_layout(model), dict(model.named_parameters())
    neurons = [{"0.weight": 1, f"{i}.weight": j} for i in (3, 4, 5) for j in (0, 1)]
    edits = {str(i): ns.zero_out(ns.select(layout, chosen)) for i, chosen in enumerate(neurons)}
    edits |= {"first": ns.zero_out(ns.select(layout, {"0.weight": 1})), "base": ns.compose()}
    edited = {label: Edited(plan(edit, model), parameters) for label, edit in edits.items()}
    x = torch.randn(3, 4)
    planned = schedule(capture(make_runner(survey(model)), (x,)), edited)
    with counted() as products:
        found = dict(planned.run((x,), {}, edited))
    # The model as it is, the first layer cut, and from each of the others on: 3, 2 and 1 of two edits.
    assert products.count == 6 + 6 + 2 * (3 + 2 + 1)
    for label, logits in found.items():
        assert same_bits(logits, eval_copy(ns.bake(edits[label], model))(x).detach()), label


@tiered("mlp", "residual", "norm_dropout", "unet")
def test_sets_of_neurons_equal_one_by_one(case: Case, log: Log) -> None:
    model, data = case.build(), case.batches(sizes=(4, 3))
    layout = ns.find_layout(model)
    single = [layout.neurons([i * layout.count // 6]) for i in range(6)]
    edits: dict[str, ns.Edit] = {}
    for i, one in enumerate(single):
        for j, other in enumerate(single[i + 1 :], start=i + 1):
            edits[f"{i} {j}"] = ns.zero_out(one | other)
            edits[f"{i} {j} scaled"] = ns.compose(ns.zero_out(one), ns.scale(other, 0.5))
        edits[f"{i}"] = ns.zero_out(one)
        edits[f"{i} and the last two"] = ns.zero_out(one | single[-1] | single[-2])
    assert_equal_one_by_one(model, edits, data)
    recurrent = any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in model.modules())
    assert log.filled or recurrent  # whose rows are not outputs


def test_the_mean_of_one_and_the_norm_of_another(log: Log) -> None:
    """The norm behind a layer that is filled is edited by what comes next."""
    torch.manual_seed(0)
    model = normed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    data = data_of(torch.randn(4, 3, 9, 9))
    layout = ns.find_layout(model)
    zero = ns.zero_out(ns.select(layout, {"0.0.weight": 0}))
    means = {i: ns.mean_out(ns.select(layout, {"0.0.weight": i}), model, data) for i in (1, 2, 3)}
    later = {i: ns.zero_out(ns.select(layout, {"0.3.weight": i})) for i in range(3)}
    edits = {f"mean {i}": ns.compose(zero, mean) for i, mean in means.items()}
    edits |= {f"mean {i}, later {j}": ns.compose(zero, means[i], later[j]) for i in means for j in later}
    edits |= {"zero": zero} | {f"later {j}": ns.compose(zero, edit) for j, edit in later.items()}
    assert_equal_one_by_one(model, edits, data)
    assert log.filled["batch_norm"] and log.filled["conv2d"] and not log.run


def test_one_by_one_knows_no_fills(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference that all of these are compared with runs every layer."""
    model, shape, _ = built("linear")
    one_by_one(model, zeroing(model), data_of(torch.randn(4, *shape)))
    assert not log.filled and not log.run
