"""First-order effects are minus weights times gradient, per group and per example, and tend to the exact changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import reference
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import Case, small_case

import neuronsurgery as ns

SEED = 1
ROUNDING = 2e-5  # of the largest effect of a layer, in float32


def own_metric(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return ns.causal_lm_loss if case.causal else ns.cross_entropy


@functools.cache
def expected(name: str) -> dict[Any, dict[str, list[Tensor]]]:
    """By group and layer, for each example minus the product of weights and gradients, row by row, in float64."""
    from zoo import CASES

    case = CASES[name]
    model = reference.plain_copy(case.build())
    loss = reference.causal_lm_loss if case.causal else reference.cross_entropy
    tensors = reference.tensors(model)
    found: dict[Any, dict[str, list[Tensor]]] = {}
    for example in reference.examples(case.batches(SEED)):
        value = loss(reference.forward(model, example), example.target).sum()
        weights = [tensors[layer] for layer in case.axes]
        gradients = torch.autograd.grad(value, weights, allow_unused=True)
        for (layer, (axis, groups)), weight, gradient in zip(case.axes.items(), weights, gradients, strict=True):
            gradient = torch.zeros_like(weight) if gradient is None else gradient
            rows = reference.rows(weight.detach() * gradient, axis, groups)
            own = found.setdefault(example.group, {}).setdefault(layer, [])
            own.append(torch.stack([-row.sum() for row in rows]))
    return found


def assert_effects(found: ns.Scores, right: Mapping[Any, Mapping[str, Tensor]]) -> None:
    assert found.groups == tuple(sorted(right))
    for group, layers in right.items():
        for layer, values in found[group].by_layer().items():
            wanted = layers[layer.parameter]
            error = (values[0].double() - wanted).abs().max()
            assert error <= ROUNDING * max(1e-3, float(wanted.abs().max())), f"{group}, {layer.parameter}: {error:.2e}"


@small_case
def test_a_zeroed_row_is_minus_weight_times_gradient(case: Case) -> None:
    model, batches = case.build(), case.batches(SEED)
    before = snapshot(model, batches)
    found = ns.group_effects(model, batches, metric=own_metric(case))
    assert_unchanged(before, model, batches)
    means = {g: {n: torch.stack(v).mean(0) for n, v in layers.items()} for g, layers in expected(case.name).items()}
    assert_effects(found, means)


@small_case
def test_a_transform_sees_every_example_on_its_own(case: Case) -> None:
    model, batches = case.build(), case.batches(SEED)
    loss = reference.causal_lm_loss if case.causal else reference.cross_entropy
    plain = reference.plain_copy(model)
    values: dict[Any, list[Tensor]] = {}
    for example in reference.examples(batches):
        value = loss(reference.forward(plain, example), example.target).detach().sum()
        values.setdefault(example.group, []).append(value)
    means = {
        group: {
            name: torch.stack(
                [torch.sigmoid(v + e) - torch.sigmoid(v) for v, e in zip(values[group], effects, strict=True)]
            ).mean(0)
            for name, effects in layers.items()
        }
        for group, layers in expected(case.name).items()
    }
    found = ns.group_effects(model, batches, metric=own_metric(case), transform=torch.sigmoid)
    assert_effects(found, means)


# What first order means


def wide_data(n: int = 40, inputs: int = 5, classes: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return [
        (x[i : i + 16], torch.arange(n)[i : i + 16] % classes, torch.arange(n)[i : i + 16] % 3) for i in (0, 16, 32)
    ]


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model.eval()


def exact(model: nn.Module, edit: ns.Edit, data: Any) -> Tensor:
    swept = ns.sweep(model, {"edit": edit}, data, metric=ns.margin)
    return torch.tensor([swept.change("edit")[group] for group in swept.baseline.groups])


def units(layout: ns.Layout) -> list[ns.Neurons]:
    return [layout.neurons([i]) for i in range(layout.count)]


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_first_order_is_exact_where_the_margin_is_linear(kind: Any) -> None:
    model, data = network(nn.Linear(5, 4), nn.Linear(4, 2)), wide_data()
    layout = ns.find_layout(model)
    found = ns.group_effects(model, data, edit=kind)
    for column, neuron in enumerate(units(layout)):
        edit = ns.zero_out(neuron) if kind == "zero" else ns.mean_out(neuron, model, data)
        assert torch.allclose(found.values[:, column], exact(model, edit, data).float(), atol=1e-5), neuron


def test_the_error_is_of_second_order() -> None:
    """Of an edit that is half as far, the error is a quarter."""
    model, data = network(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), wide_data()
    layout = ns.find_layout(model, where="0.*")
    found = ns.group_effects(model, data, layout=layout).values.double()
    for column, neuron in enumerate(units(layout)):
        errors = [
            (exact(model, ns.scale(neuron, 1 - step), data) - step * found[:, column]).abs().max()
            for step in (0.02, 0.01)
        ]
        assert 3.2 < errors[0] / errors[1] < 4.8, neuron


def test_heads_and_hidden_units_are_seen_at_the_input_that_reads_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    heads = ns.find_layout(model, where="2.*", patterns={"2.weight": ("o (head d) -> head o d", {"d": 2})})
    found = ns.group_effects(model, wide_data(), layout=heads)
    for column, neuron in enumerate(units(heads)):
        wanted = exact(model, ns.zero_out(neuron), wide_data())  # linear in what the last layer reads
        assert torch.allclose(found.values[:, column], wanted.float(), atol=1e-6)


@pytest.mark.parametrize("edit", ["zero", "mean"])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_hidden_units_cut_by_a_plain_pattern_are_seen_at_the_input_too(stored: str, edit: Any) -> None:
    """Columns of a linear layer, rows of one that is stored the other way round: no axis of theirs is an output."""
    from transformers.pytorch_utils import Conv1D

    last = nn.Linear(8, 2) if stored == "columns" else Conv1D(2, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), last).double()
    pattern = "o unit -> unit o" if stored == "columns" else "unit o -> unit o"
    hidden = ns.find_layout(model, where="2.*", patterns={"2.weight": pattern})
    assert hidden.count == 8
    found = ns.group_effects(model, wide_data(), layout=hidden, edit=edit)
    for column, neuron in enumerate(units(hidden)):
        cut = ns.zero_out(neuron) if edit == "zero" else ns.mean_out(neuron, model, wide_data())
        assert torch.allclose(found.values[:, column], exact(model, cut, wide_data()).float(), atol=1e-6)


def test_where_nothing_is_seen_at_outputs_gradients_to_weights_say_it() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(5, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x[:, None])[0][:, -1])  # type: ignore[no-any-return]

    model = Recurrent().double()
    alone = ns.group_effects(model, wide_data(), where="rnn*")
    together = ns.group_effects(model, wide_data())
    assert torch.equal(alone.values, together.values[:, : alone.layout.count]) and alone.values.any()


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"edit": "median"}, ValueError, "edit must be 'zero' or 'mean', not 'median'"),
        ({"metric": ns.accuracy}, ValueError, "accuracy has no gradient"),
        ({"metric": 3}, TypeError, "a metric is a function"),
        ({"metric": lambda z, y: z.sum()}, ValueError, "one value per example, shape (16,), not shape ()"),
        ({"metric": lambda z, y: z[:, 0] / 0}, ValueError, "the metric of 16 of 16 examples is NaN or infinite"),
        ({"transform": 3}, TypeError, "transform= is a function"),
        ({"where": "nothing"}, KeyError, "no layer matches 'nothing'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = network(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(error) as raised:
        ns.group_effects(model, wide_data(), **options)
    assert said in str(raised.value)


def test_a_group_without_examples() -> None:
    with pytest.raises(ValueError, match="no examples of 'b': the loader yielded no batch"):
        ns.group_effects(network(nn.Linear(5, 2)), {"a": wide_data(), "b": []})


def test_examples_that_depend_on_each_other() -> None:
    model = network(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="An effect is that on one example's metric"):
        ns.group_effects(model, wide_data())


def test_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave it, or use torch\.no_grad"):
        ns.group_effects(network(nn.Linear(5, 2)), wide_data())


def test_a_layer_that_cannot_be_held() -> None:
    model = network(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight: it has no bias, and no norm with a shift alone reads its output"):
        ns.group_effects(model, wide_data(), edit="mean")


def test_frozen_models_caller_modes_and_mappings_make_no_difference() -> None:
    model = network(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    wanted = ns.group_effects(model, wide_data()).values
    model.requires_grad_(False).train()
    with torch.no_grad():
        assert torch.equal(ns.group_effects(model, wide_data()).values, wanted)
    by_group = {g: [(x[z == g], y[z == g]) for x, y, z in wide_data() if (z == g).any()] for g in (0, 1, 2)}
    assert torch.allclose(ns.group_effects(model, by_group).values, wanted, atol=1e-6)


def test_an_attentions_own_projection_alone() -> None:
    """Its module is never called, so that nothing is heard."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).eval()
    data = [(torch.randn(6, 3, 8), torch.arange(6) % 3)]
    every = ns.find_layout(model, extra="0.self_attn.*")
    alone = ns.find_layout(model, where=(), extra="0.self_attn.out_proj.weight")
    assert [own.parameter for own in alone] == ["0.self_attn.out_proj.weight"]
    start = every.starts[alone.layers[0]]
    wanted = ns.group_effects(model, data, layout=every).values[:, start : start + 8]
    assert torch.allclose(ns.group_effects(model, data, layout=alone).values, wanted, atol=1e-7)
    with pytest.raises(ValueError, match="has no gradient, or something cuts it off"):
        ns.group_effects(model, data, layout=alone, metric=lambda logits, targets: targets.double())


# Experts


class Routed(nn.Module):
    """Two experts, each of which sees the tokens of one sign alone, and beside them one that sees all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.all, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.all(x).tanh()
        for expert, own in ((self.up, x[..., 0] > 0), (self.down, x[..., 0] < 0)):
            if own.any():
                hidden = hidden.index_put((own,), expert(x[own]).tanh(), accumulate=True)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("where", ["*", "up.*", ["up.*", "down.*"]])
@pytest.mark.parametrize("size", [30, 7, 1])
@pytest.mark.parametrize("transform", [None, ns.error_probability])
def test_experts_that_see_a_part_of_the_examples(where: Any, size: int, transform: Any) -> None:
    """In the first batches one expert sees every token and the other none, so that these show nothing of the rest."""
    torch.manual_seed(0)
    model, x, y = Routed().double(), torch.randn(30, 2, 3).double(), torch.arange(30) % 2
    x[:10, :, 0] = -x[:10, :, 0].abs()
    groups = torch.arange(30) % 3
    batches = [(x[part], y[part], groups[part]) for part in torch.arange(30).split(size)]
    found = ns.group_effects(model, batches, where=where, transform=transform)
    transform = transform or (lambda values: values)
    right: dict[Any, dict[str, Tensor]] = {
        g: {layer.parameter: torch.zeros(()) for layer in found.layout} for g in range(3)
    }
    for at in range(30):
        margin = ns.margin(model(x[at : at + 1]), y[at : at + 1])[0]
        for layer in found.layout:
            weight = model.get_parameter(layer.parameter)
            (gradient,) = torch.autograd.grad(margin, weight, retain_graph=True, allow_unused=True)
            effect = torch.zeros(layer.count) if gradient is None else -(weight * gradient).sum(1)
            change = (transform(margin + effect) - transform(margin)).detach()
            right[at % 3][layer.parameter] = right[at % 3][layer.parameter] + change / 10
    assert_effects(found, right)


class Turned(nn.Module):
    """The layer sees the examples of a batch in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flip(0)).flip(0).tanh())


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


def test_a_first_batch_of_one_example_shows_nothing_of_the_others() -> None:
    torch.manual_seed(0)
    model, x, y = Turned().double(), torch.randn(9, 3).double(), torch.arange(9) % 2
    groups = torch.tensor([0, *[0] * 4, *[1] * 4])
    whole, parts = (
        ns.group_effects(model, [(x[part], y[part], groups[part]) for part in torch.arange(9).split(sizes)])
        for sizes in ([9], [1, 8])
    )
    assert torch.allclose(whole.values, parts.values, atol=1e-6)


def test_a_first_batch_of_one_example_hides_no_dependence() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Centred(), nn.Linear(4, 2))
    data = [(torch.randn(size, 3), torch.zeros(size).long()) for size in (1, 8)]
    with pytest.raises(ValueError, match="the model or the loss looks at the whole batch"):
        ns.group_effects(model, data)


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 3), nn.LSTM(3, 3, batch_first=True), nn.MultiheadAttention(3, 1, batch_first=True)]
)
def test_a_layer_that_is_cut_off_is_none_that_the_examples_go_past(layer: nn.Module) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
            return self.head(features[0] if isinstance(features, tuple) else features).mean(1)

    with pytest.raises(ValueError, match="margin has no gradient, or something cuts it off"):
        ns.group_effects(Frozen(), [(torch.randn(4, 2, 3), torch.zeros(4).long())], where="layer.*")
