"""Last-layer retraining: features of a forward pass by hand, fits of scikit-learn, logits that are the rule's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.study import last_layer
from neuronsurgery.study.data import bells, permutation
from neuronsurgery.study.last_layer import (
    STRENGTHS,
    Features,
    LinearRule,
    afr,
    afr_weights,
    balanced_logistic,
    balanced_subset,
    dfr,
    extract_features,
    last_linear,
    last_logits,
    retrained,
    tuned_afr,
    weighted_logistic,
    worst_accuracy,
)
from neuronsurgery.study.network import SmallResNet, small_resnet


def normal(*shape: int, key: str = "") -> Tensor:
    return torch.from_numpy(bells(shape, "test", key)).float()


def assert_close(found: Tensor, right: Tensor) -> None:
    """Equal to the rounding of float32."""
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def data(n: int = 120, width: int = 4, classes: int = 2, key: str = "data") -> Features:
    """Noisy classes, each in two groups: 2 * y and 2 * y + 1, the second rarer."""
    targets = torch.arange(n) % classes
    groups = 2 * targets + (torch.arange(n) % 5 == 0)
    features = normal(n, width, key=key)
    features[:, 0] += 2 * targets
    features[:, 1] += groups % 2
    return Features(features * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5, targets, groups)


def image_batches(classes: int = 3, size: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
    images = normal(7, 3, size, size, key="images")
    numbers = torch.arange(7)
    return [(images[part], numbers[part] % classes, numbers[part] % 4) for part in numbers.chunk(3)]


def state_of_the_world() -> nn.Module:
    """A module to hand to `snapshot` where only random states and switches count."""
    return nn.Identity()


# --- the model's side -----------------------------------------------------------------------------------------------


def small_resnet_features(model: Any, x: Tensor) -> Tensor:
    x = functional.relu(model.stem_norm(model.stem(x)))
    return model.block3(model.block2(model.block1(x))).mean(dim=(2, 3))  # type: ignore[no-any-return]


def resnet_features(model: Any, x: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return model.avgpool(x).flatten(1)  # type: ignore[no-any-return]


def vit_features(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[no-any-return]


def timm_vit() -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 3, "drop_rate": 0.5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    return model


@pytest.mark.parametrize(
    ("build", "by_hand", "name"),
    [
        (lambda: small_resnet(0, 3), small_resnet_features, "head"),
        (lambda: torchvision.models.resnet18(num_classes=3), resnet_features, "fc"),
        (timm_vit, vit_features, "head"),
    ],
    ids=["small_resnet", "resnet18", "vit"],
)
def test_features_are_those_of_a_forward_pass_by_hand(
    build: Callable[[], nn.Module], by_hand: Callable[[nn.Module, Tensor], Tensor], name: str
) -> None:
    model, batches = build().train(), image_batches()
    before = snapshot(model, batches)
    features, targets, groups = extract_features(model, batches)
    assert last_linear(model) == last_linear(model, batches[0]) == extract_features(model, batches).head == name
    logits = last_logits(model, features, head=name)
    assert_unchanged(before, model, batches)
    assert not features.requires_grad and targets.dtype == groups.dtype == torch.int64
    assert targets.tolist() == [0, 1, 2, 0, 1, 2, 0] and groups.tolist() == [0, 1, 2, 3, 0, 1, 2]
    model.eval()
    images = torch.cat([batch[0] for batch in batches])
    with torch.no_grad():
        assert_close(features, by_hand(model, images))
        assert_close(logits, model(images).double())


def hugging_face() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        num_labels=3,  # type: ignore[call-arg]
    )
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), "classifier.3"),
        (lambda: timm.create_model("resnet10t", num_classes=3), "fc"),
        (lambda: timm.create_model("convnext_atto", num_classes=3), "head.fc"),
        (hugging_face, "classifier"),
    ],
    ids=["mobilenet", "timm resnet", "convnext", "hugging face"],
)
def test_the_last_layer_of_others_networks(build: Callable[[], nn.Module], name: str) -> None:
    model, batch = build().train(), image_batches()[0]
    assert last_linear(model) == last_linear(model, batch) == name


def test_a_linear_model_is_its_own_last_layer() -> None:
    model, x = nn.Linear(4, 3), normal(5, 4)
    assert last_linear(model) == last_linear(model, (x, torch.zeros(5).long())) == ""
    assert torch.equal(extract_features(model, [(x, torch.zeros(5).long())]).features, x)


class HeadFirst(nn.Module):
    """Registers its head before what runs before it, and calls it by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(x).relu())  # type: ignore[no-any-return]


def test_with_a_batch_the_layer_is_found_by_what_it_returns() -> None:
    model, x = HeadFirst(), normal(5, 4)
    batch = (x, torch.zeros(5).long())
    assert last_linear(model, batch) == "head"
    assert last_linear(model) == "body"
    assert torch.equal(extract_features(model, [batch]).features, model.body(x).relu().detach())
    rule = torch.ones(1, 4), torch.ones(1)
    assert retrained(model, *rule) == retrained(model, *rule, head="head")  # the only one that the rule fits
    with pytest.raises(ValueError, match=r"several linear layers could be the last one, 'head', 'body': pass head="):
        last_logits(model, x)


class Auxiliary(nn.Module):
    """Registers behind its head a layer of the same shape, which an evaluation does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


def test_of_two_layers_that_could_be_meant_neither_is_taken() -> None:
    model, x = Auxiliary(), normal(5, 3)
    found = extract_features(model, [(x, torch.zeros(5).long())])
    assert found.head == "head" and last_linear(model) == "aux"
    rule = normal(1, 4, key="coef").double(), torch.zeros(1).double()
    message = r"several linear layers could be the last one, 'head', 'aux': pass head=features\.head, which"
    with pytest.raises(ValueError, match=message):
        last_logits(model, found.features)
    with pytest.raises(ValueError, match=message):
        retrained(model, *rule)
    with torch.no_grad():
        assert_close(last_logits(model, found.features, head=found.head), model(x).double())
        edited = ns.bake(retrained(model, *rule, head=found.head), model)
        assert torch.equal(edited(x).argmax(1), LinearRule(*rule).predict(found.features))


def test_features_are_three_tensors_and_a_name() -> None:
    found = extract_features(nn.Linear(4, 2), [(normal(2, 4), torch.tensor([0, 1]), torch.tensor([3, 4]))])
    features, targets, groups = found
    assert features is found.features and targets is found.targets and groups is found.groups
    assert found.head == "" and Features(*found).head is None


class Ends(nn.Module):
    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.after = nn.Linear(4, 2), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(x))


@pytest.mark.parametrize(
    "after",
    [lambda x: x.softmax(1), lambda x: x + 0.0, lambda x: x[:, :1], lambda x: x.flip(1), lambda x: x.div_(2)],
    ids=["softmax", "copy", "part", "turned", "in place"],
)
def test_a_network_that_goes_on_after_its_last_layer(after: Callable[[Tensor], Tensor]) -> None:
    message = r"the logits of Ends are not the output of a linear layer \(the last that ran is fc\): pass predict="
    with pytest.raises(ValueError, match=message):
        last_linear(Ends(after), (normal(5, 4), torch.zeros(5).long()))


def test_the_activations_of_a_transformer_are_not_held() -> None:
    runner = last_layer._Runner(timm_vit(), None)
    images, targets, _ = image_batches()[0]
    runner.run(ns.Batch((images,), {}, targets))
    assert [name for name, (_, output) in runner.passed.items() if output.dim() > 2] == []
    assert runner.head == "head"


def test_what_predict_takes_from_the_output() -> None:
    class Both(HeadFirst):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x), "logits": x}

    batch = (normal(5, 4), torch.zeros(5).long())
    assert last_linear(Both(), batch, predict=lambda output: output["scores"]) == "head"
    with pytest.raises(ValueError, match="not the output of a linear layer"):
        last_linear(Both(), batch)


def test_a_network_without_a_linear_layer() -> None:
    model = torchvision.models.squeezenet1_1(num_classes=2)
    with pytest.raises(
        ValueError, match=r"logits of SqueezeNet are not .* layer, of which it runs none: pass predict="
    ):
        last_linear(model, image_batches()[0])
    with pytest.raises(ValueError, match="SqueezeNet has no linear layer, so its last layer cannot be retrained"):
        last_linear(model)


def test_a_layer_that_reads_more_than_one_vector_per_example() -> None:
    with pytest.raises(ValueError, match=r"'' reads \(5, 6, 4\) for 5 examples; .* one vector per example"):
        extract_features(nn.Linear(4, 2), [(normal(5, 6, 4), torch.zeros(5, 6).long())])


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [(torch.tensor([7, 3]), [7, 3]), (("water", "land"), [1, 0]), (None, [0, 0])],
    ids=["integers", "names", "none"],
)
def test_groups_of_mixed_batches(groups: Any, wanted: list[int]) -> None:
    batch = ns.Batch((normal(2, 4),), {}, torch.zeros(2).long(), groups)
    assert extract_features(nn.Linear(4, 2), [batch]).groups.tolist() == wanted


@pytest.mark.parametrize(("names", "wanted"), [(("water", "land"), [0, 0, 1]), ((5, 2), [5, 5, 2])])
def test_groups_of_a_mapping_in_its_order(names: tuple[Any, Any], wanted: list[int]) -> None:
    loaders = {names[0]: [(normal(2, 4), torch.zeros(2).long())], names[1]: [(normal(1, 4), torch.ones(1).long())]}
    found = extract_features(nn.Linear(4, 2), loaders)
    assert found.groups.tolist() == wanted and found.targets.tolist() == [0, 0, 1]


def test_what_cannot_be_extracted() -> None:
    with pytest.raises(ValueError, match="the loaders yielded no examples: an iterator is exhausted after one pass"):
        extract_features(nn.Linear(4, 2), [])
    with pytest.raises(ValueError, match=r"targets must be class indices, .* not torch.float32 of shape \(2,\)"):
        extract_features(nn.Linear(4, 2), [(normal(2, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"'' reads vectors of 4, found features of shape \(2, 5\): take them from"):
        last_logits(nn.Linear(4, 2), normal(2, 5))


# --- the edit -------------------------------------------------------------------------------------------------------


def network(rows: int, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, rows, bias=bias))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("apply", [ns.apply, ns.bake])
def test_logits_of_the_edited_model_are_the_rule(rows: int, apply: Callable[[Any, nn.Module], nn.Module]) -> None:
    model, x = network(rows), normal(6, 3)
    coef, intercept = normal(rows, 4, key="coef").double(), normal(rows, key="intercept").double()
    before = snapshot(model, coef, intercept)
    edit = retrained(model, coef, intercept)
    edited = apply(edit, model)
    assert_unchanged(before, model, coef, intercept)
    assert named(edit.neurons.by_layer()) == {"2.weight": tuple(range(rows)), "2.bias": tuple(range(rows))}
    features = extract_features(model, [(x, torch.zeros(6).long())]).features
    with torch.no_grad():
        assert_close(edited(x).double(), features.double() @ coef.T + intercept)


def test_a_rule_for_two_classes_is_split_between_two_rows() -> None:
    model, x = network(2), normal(6, 3)
    coef, intercept = normal(1, 4, key="coef").double(), torch.tensor([0.5], dtype=torch.float64)
    edited = ns.bake(retrained(model, coef, intercept), model)
    torch.testing.assert_close(edited[2].weight, torch.cat([-coef / 2, coef / 2]).float())  # type: ignore[index]
    assert edited[2].bias.tolist() == [-0.25, 0.25]  # type: ignore[index]
    features = extract_features(model, [(x, torch.zeros(6).long())]).features.double()
    with torch.no_grad():
        logits = edited(x).double()
    decision = features @ coef[0] + 0.5
    assert_close(logits[:, 1] - logits[:, 0], decision)
    assert_close(logits.softmax(1)[:, 1], decision.sigmoid())
    assert torch.equal(logits.argmax(1), LinearRule(coef, intercept).predict(features))


def test_the_model_may_be_a_view_or_computed_by_a_parametrization() -> None:
    model = network(3)
    nn.utils.parametrizations.weight_norm(model[2])
    cut = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0})), model)
    coef, intercept = normal(3, 4), normal(3)
    edited = ns.apply(retrained(cut, coef, intercept), cut)
    features = extract_features(cut, [(normal(6, 3), torch.zeros(6).long())]).features
    assert (features[:, 0] == cut[0].bias[0].relu()).all()  # type: ignore[index]
    with torch.no_grad():
        assert_close(edited(normal(6, 3)), features @ coef.T + intercept)
        assert_close(last_logits(cut, features), cut(normal(6, 3)).double())


def test_the_wrapper_of_a_model_does_not_matter() -> None:
    model = network(3)
    coef, intercept = normal(3, 4), normal(3)
    assert last_linear(nn.DataParallel(model)) == "2"
    assert retrained(nn.DataParallel(model), coef, intercept) == retrained(model, coef, intercept)


@pytest.mark.parametrize(
    ("rows", "coef", "intercept", "message"),
    [
        (2, (1, 5), (1,), r"'2' has 2 rows of 4 and a bias of 2; found coef \(1, 5\) and intercept \(1,\): fit them"),
        (2, (1, 4), (2,), r"found coef \(1, 4\) and intercept \(2,\)"),
        (3, (1, 4), (1,), r"'2' has 3 rows of 4 .* found coef \(1, 4\).* one row per class \(one for two classes\)"),
        (2, (3, 4), (3,), r"found coef \(3, 4\) and intercept \(3,\)"),
        (2, (4,), (1,), r"found coef \(4,\) and intercept \(1,\)"),
    ],
)
def test_a_rule_that_does_not_fit_the_layer(
    rows: int, coef: tuple[int, ...], intercept: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrained(network(rows), torch.ones(coef), torch.ones(intercept))


def test_a_layer_that_cannot_be_retrained() -> None:
    with pytest.raises(ValueError, match=r"'2' has no bias, where the intercept would go: make the model .*bias=True"):
        retrained(network(2, bias=False), torch.ones(1, 4), torch.ones(1))
    with pytest.raises(
        ValueError, match="no linear layer is called 'fc'; there are '0', '2': pass one of them as head"
    ):
        retrained(network(2), torch.ones(1, 4), torch.ones(1), head="fc")


# --- subsets --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 2**40), data=st.data())
def test_a_subset_has_as_many_of_every_group(counts: list[int], seed: int, data: st.DataObject) -> None:
    groups = torch.tensor(data.draw(st.permutations([g for g, count in enumerate(counts) for _ in range(count)])))
    subset = balanced_subset(groups, seed, 3)
    assert torch.bincount(groups[subset]).tolist() == [min(counts)] * len(counts)
    assert subset.dtype == torch.int64 and (subset.diff() > 0).all()
    assert torch.equal(subset, balanced_subset(groups, seed, 3))


def test_every_example_of_a_group_is_drawn_as_often() -> None:
    groups = torch.tensor([0] * 3 + [1] * 12)
    drawn = torch.cat([balanced_subset(groups, 0, number) for number in range(800)])
    shares = torch.bincount(drawn).double() / 800
    assert shares[:3].tolist() == [1.0] * 3
    assert (shares[3:] - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 800)


def test_subsets_depend_on_seed_and_number_alone() -> None:
    groups = torch.arange(40) % 3
    chosen = balanced_subset(groups[:39], 0, 0)
    assert torch.equal(chosen, torch.arange(39)), "nothing to leave out"
    uneven = torch.tensor([0] * 4 + [1] * 9)
    assert balanced_subset(uneven, 0, 0).tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert balanced_subset(uneven, 0, 0).tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    assert balanced_subset(uneven, 0, 1).tolist() != [0, 1, 2, 3, 5, 6, 7, 9]
    assert balanced_subset(uneven, 1, 0).tolist() != [0, 1, 2, 3, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("groups", "count", "message"),
    [
        ([0, 0, 2, 2], None, r"the data has no examples of group 1 of 0 \.\.\. 2, so no subset can be balanced"),
        ([0, 0, 1, 1], 4, r"no examples of group 2, 3 of 0 \.\.\. 3, .*: give examples of it, or number the groups"),
        ([0, 1, -1, 1], None, r"groups must be integers 0 \.\.\. 1, found torch.int64 from -1 to 1: number the groups"),
        ([0, 1, 5, 1], 4, r"groups must be integers 0 \.\.\. 3, found torch.int64 from 0 to 5"),
        ([0.0, 1.0, 1.0, 0.0], None, r"groups must be integers 0 \.\.\. 1, found torch.float32"),
    ],
)
def test_groups_that_no_subset_can_balance(groups: list[float], count: int | None, message: str) -> None:
    features, targets = normal(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        balanced_subset(torch.tensor(groups), 0, 0, group_count=count)
    with pytest.raises(ValueError, match=message):
        balanced_logistic(features, targets, torch.tensor(groups), group_count=count)


def test_no_examples_at_all() -> None:
    with pytest.raises(ValueError, match=r"has no examples of group 0 of 0 \.\.\. 0"):
        balanced_subset(torch.tensor([], dtype=torch.int64), 0, 0)


# --- fits -----------------------------------------------------------------------------------------------------------


def by_scikit_learn(x: np.ndarray, y: np.ndarray, penalty: str, strength: float, weight: Any = None) -> LinearRule:
    from sklearn.linear_model import LogisticRegression

    if penalty == "l2":
        fit = LogisticRegression(C=strength, max_iter=10_000).fit(x, y, weight)
        return LinearRule(torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_))
    options = {"C": strength, "solver": "liblinear", "random_state": 0, "max_iter": 10_000} | last_layer._l1()
    fits = [LogisticRegression(**options).fit(x, y == one) for one in ([1] if y.max() == 1 else range(y.max() + 1))]
    return LinearRule(
        torch.from_numpy(np.concatenate([fit.coef_ for fit in fits])),
        torch.from_numpy(np.concatenate([fit.intercept_ for fit in fits])),
    )


def fitted(features: Tensor) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(features.double().numpy())


def scaled(features: Tensor, scaler: Any) -> np.ndarray:
    found: np.ndarray = scaler.transform(features.double().numpy())
    return found


def of_raw_features(rule: LinearRule, scaler: Any) -> LinearRule:
    """By hand: the scale goes into the coefficients, the mean into the intercept."""
    coef = rule.coef / torch.from_numpy(scaler.scale_)
    return LinearRule(coef, rule.intercept - (coef * torch.from_numpy(scaler.mean_)).sum(1))


def assert_same_rule(found: LinearRule, right: LinearRule) -> None:
    for a, b in zip(found, right, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_mean_of_fits_by_hand(penalty: Any, classes: int) -> None:
    features, targets, groups = data(classes=classes)
    scaler, rules = fitted(features), []
    for number in range(3):
        subset = balanced_subset(groups, 7, number)
        rules.append(by_scikit_learn(scaled(features[subset], scaler), targets[subset].numpy(), penalty, 0.3))
    coef = (rules[0].coef + rules[1].coef + rules[2].coef) / 3
    mean = LinearRule(coef, (rules[0].intercept + rules[1].intercept + rules[2].intercept) / 3)
    found = balanced_logistic(features, targets, groups, penalty=penalty, strength=0.3, subsets=3, seed=7)
    assert found.coef.shape == ((1 if classes == 2 else classes), 4)
    assert_same_rule(found, of_raw_features(mean, scaler))
    assert torch.equal(found.predict(features), mean.predict(torch.from_numpy(scaled(features, scaler))))


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("1.3.0", {"penalty": "l1"}),
        ("1.7.2", {"penalty": "l1"}),
        ("1.8.0", {"l1_ratio": 1.0}),
        ("2.0.dev0", {"l1_ratio": 1.0}),
    ],
)
def test_an_l1_penalty_in_any_version(version: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sklearn.__version__", version)
    assert last_layer._l1() == options


def test_a_fit_is_where_the_gradient_vanishes() -> None:
    """Of C times the weighted sum of losses plus half the squared weights, without the intercept's."""
    features, targets, _ = data()
    scaler, weight = fitted(features), normal(len(targets), key="w").abs().double()
    coef, intercept = last_layer._logistic(features, targets, scaler, "l2", 0.5, weight.numpy())
    standard = torch.from_numpy(scaled(features, scaler))
    w = (coef * torch.from_numpy(scaler.scale_)).requires_grad_()
    b = (intercept + coef @ torch.from_numpy(scaler.mean_)).requires_grad_()
    losses = functional.binary_cross_entropy_with_logits((standard @ w.T + b)[:, 0], targets.double(), reduction="none")
    (0.5 * (weight * losses).sum() + w.square().sum() / 2).backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None and b.grad is not None
    assert float(w.grad.abs().max()) < 0.02 and float(b.grad.abs().max()) < 0.02


def test_balance_over_the_groups_removes_a_shortcut() -> None:
    """Mirrored cells: with equally many of each, the shortcut says nothing, and its weight is 0 by symmetry."""
    core = normal(20, key="core")[:, None]
    cells = [
        (torch.cat([core * 0.5 + (2 * y - 1), torch.full_like(core, 2.0 * a - 1)], 1), y, a)
        for y in (0, 1)
        for a in (0, 1)
    ]
    rare = [x[:4] if y != a else x for x, y, a in cells]
    features = torch.cat(rare)
    targets = torch.cat([torch.full((len(x),), y) for x, (_, y, _) in zip(rare, cells, strict=True)])
    groups = torch.cat([torch.full((len(x),), 2 * y + a) for x, (_, y, a) in zip(rare, cells, strict=True)])
    by_class = balanced_logistic(features, targets, targets)
    by_group = balanced_logistic(features, targets, groups, subsets=200)
    assert float(by_class.coef[0, 1]) > 0.3
    assert abs(float(by_group.coef[0, 1])) < 0.05
    test = Features(torch.cat([x for x, _, _ in cells]), torch.arange(80) // 40, torch.arange(80) // 20)
    assert worst_accuracy(by_group, test) > worst_accuracy(by_class, test)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_a_constant_feature_weighs_nothing(penalty: Any) -> None:
    features, targets, groups = data()
    constant = torch.full((len(targets), 1), 0.1)  # no binary fraction
    rule = balanced_logistic(torch.cat([features, constant], 1), targets, groups, penalty=penalty)
    assert rule.coef[0, 4] == 0
    without = balanced_logistic(features, targets, groups, penalty=penalty)
    torch.testing.assert_close(rule.coef[:, :4], without.coef, rtol=1e-3, atol=1e-6)


def test_rescaled_features_give_the_same_answers() -> None:
    features, targets, groups = data()
    rule = balanced_logistic(features, targets, groups)
    factors = torch.tensor([2.0, 0.25, 8.0, 1.0])
    other = balanced_logistic(features * factors, targets, groups)
    torch.testing.assert_close(other.coef * factors, rule.coef, rtol=1e-4, atol=1e-6)


def test_a_rule_predicts() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    two = LinearRule(torch.tensor([[1.0, -1.0]]).double(), torch.tensor([0.0]).double())
    assert two.predict(features).tolist() == [1, 0, 0]
    three = LinearRule(torch.tensor([[1.0, 0], [0, 2], [0, 0]]).double(), torch.tensor([0, 0, 1.5]).double())
    assert three.predict(features).tolist() == [2, 1, 1]


def test_the_worst_group_by_hand() -> None:
    rule = LinearRule(torch.tensor([[1.0]]).double(), torch.tensor([0.0]).double())
    found = Features(torch.tensor([[1.0], [-1], [1], [1]]), torch.tensor([1, 1, 1, 0]), torch.tensor([0, 4, 4, 0]))
    assert worst_accuracy(rule, found) == 0.5
    assert worst_accuracy(rule, replace(found, groups=torch.tensor([0, 1, 0, 2]))) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(3, 4)}, r"of the same N examples, found \(3, 4\), \(120,\) and \(120,\)"),
        ({"features": torch.ones(120)}, r"expected features \(N, D\), .* found \(120,\), \(120,\)"),
        ({"groups": torch.ones(3).long()}, r"found \(120, 4\), \(120,\) and \(3,\)"),
        ({"features": torch.full((120, 4), math.nan)}, "the features of 120 of 120 examples are NaN or infinite"),
        ({"targets": torch.zeros(120).long()}, r"found \[120\] examples of the classes 0 \.\.\. 0: give examples"),
        ({"targets": 2 * (torch.arange(120) % 2)}, r"every class needs examples, .* found \[60, 0, 60\] examples"),
        ({"targets": torch.zeros(120)}, r"targets must be classes 0 \.\.\. C - 1, found torch.float32"),
        ({"targets": -torch.ones(120).long()}, r"targets must be classes .* found torch.int64 from -1: number them"),
        ({"strength": 0.0}, "strength must be a finite number above 0, found 0.0: 0.1 is a usual value"),
        ({"strength": math.inf}, "strength must be a finite number above 0, found inf"),
        ({"subsets": 0}, "subsets must be at least 1, found 0: 10 or 20 are usual"),
        ({"penalty": "l3"}, "penalty must be 'l1' or 'l2', found 'l3': pass one of them"),
    ],
)
def test_what_cannot_be_fitted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_logistic(**dict(zip(("features", "targets", "groups"), data(), strict=True)) | changes)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(
    ("targets", "groups", "message"),
    [
        ([0] * 20 + [1] * 20, [0] * 3 + [1] * 17 + [1] * 20, None),
        ([0] * 20 + [1] * 20, [0] * 3 + [1] * 17 + [2] * 20, None),
        ([0] * 39 + [1], [0] * 2 + [1] * 38, r"a subset of 4 examples .* has none of class 1, because groups cross"),
        ([0] * 38 + [1, 2], [0] * 1 + [1] * 39, r"has none of class 1, 2, because groups cross the classes: give gro"),
    ],
)
def test_groups_that_cross_classes(penalty: Any, targets: list[int], groups: list[int], message: str | None) -> None:
    """They may, as long as every class is left in every subset."""
    fit = partial(balanced_logistic, normal(40, 3), torch.tensor(targets), torch.tensor(groups), penalty=penalty)
    if message is None:
        assert fit(subsets=2).coef.shape == (1, 3)
    else:
        with pytest.raises(ValueError, match=message):
            fit()


# --- DFR ------------------------------------------------------------------------------------------------------------


def test_dfr_step_by_step() -> None:
    """The halves, the choice, and the refits, by hand."""
    validation, train = data(200), normal(50, 4, key="train") * 4
    found = dfr(validation, train, strengths=(1.0, 0.1, 0.001), refits=3, seed=2)
    features, targets, groups = validation
    order = permutation(200, "halves", 2)
    judging, fitting = order[:100], order[100:]
    fitting = fitting[balanced_subset(groups[fitting], 2, 3).numpy()]
    scaler = fitted(features[fitting])
    for strength, accuracy in found.accuracies.items():
        rule = by_scikit_learn(scaled(features[fitting], scaler), targets[fitting].numpy(), "l1", strength)
        right = (rule.predict(torch.from_numpy(scaled(features[judging], scaler))) == targets[judging]).double()
        assert accuracy == min(float(right[groups[judging] == group].mean()) for group in range(4))
    assert found.accuracies.keys() == {1.0, 0.1, 0.001}
    assert found.accuracies[found.chosen] == max(found.accuracies.values())
    assert_same_rule(
        found.rule,
        balanced_logistic(*validation, penalty="l1", strength=found.chosen, subsets=3, seed=2, scaler=fitted(train)),
    )


@pytest.mark.parametrize("strengths", [(1.0, 0.3), (0.3, 1.0)])
def test_dfr_takes_the_first_of_equals(strengths: tuple[float, ...]) -> None:
    features, targets, groups = data()
    easy = Features(features + 100 * targets[:, None], targets, groups)
    found = dfr(easy, easy.features, refits=2, strengths=strengths)
    assert found.accuracies == {1.0: 1.0, 0.3: 1.0}
    assert found.chosen == strengths[0]


def test_dfr_chooses_from_its_authors_strengths() -> None:
    assert (
        tuple(dfr(data(), data().features, refits=1).accuracies) == STRENGTHS == (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    )


@pytest.mark.parametrize(
    ("groups", "count", "message"),
    [
        ([0, 1, 2, 3] * 30, 5, r"the data has no examples of group 4 of 0 \.\.\. 4"),
        (
            [0, 0, 2, 1] + [0, 1] * 58,
            None,
            r"half of the validation images, .*has no examples of group 2 of 0 \.\.\. 2",
        ),
    ],
)
def test_dfr_without_a_group(groups: list[int], count: int | None, message: str) -> None:
    """A single example of a group is in one half only."""
    validation = replace(data(), groups=torch.tensor(groups))
    with pytest.raises(ValueError, match=message):
        dfr(validation, validation.features, refits=1, strengths=(1.0,), group_count=count)


def test_dfr_with_a_class_that_its_fit_would_not_see() -> None:
    targets, groups = torch.tensor([0] * 116 + [1] * 4), torch.tensor([0, 0, 0, 0] + [1] * 116)
    crossing = replace(data(), targets=targets, groups=groups)
    with pytest.raises(ValueError, match="is balanced over the groups has none of class 1"):
        dfr(crossing, crossing.features, refits=1, strengths=(1.0,))


def test_dfr_needs_a_strength() -> None:
    with pytest.raises(ValueError, match="strengths is empty: give the values of C to choose from"):
        dfr(data(), data().features, strengths=())


# --- AFR ------------------------------------------------------------------------------------------------------------


def test_afr_weights_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, math.log(4.0)]])
    found = afr_weights(torch.tensor([0, 0, 1]), logits, 2.0)
    weights = torch.tensor([math.exp(-2 * 0.75) / 2, math.exp(-2 * 0.5) / 2, math.exp(-2 * 0.8)], dtype=torch.float64)
    torch.testing.assert_close(found, 3 * weights / weights.sum())
    balanced = afr_weights(torch.tensor([0, 0, 1]), logits, 0.0)
    torch.testing.assert_close(balanced, torch.tensor([0.75, 0.75, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("classes", [2, 3])
def test_afr_is_one_weighted_fit(classes: int) -> None:
    features, targets, _ = data(classes=classes)
    logits = normal(len(targets), classes, key="logits")
    scaler = fitted(features)
    weights = afr_weights(targets, logits, 3.0).numpy()
    right = by_scikit_learn(scaled(features, scaler), targets.numpy(), "l2", 0.2, weights)
    assert_same_rule(afr(features, targets, logits, gamma=3.0, strength=0.2), of_raw_features(right, scaler))


def test_afr_without_gamma_knows_the_classes_alone() -> None:
    features, targets, _ = data()
    first, second = (normal(len(targets), 2, key=key) for key in ("a", "b"))
    assert torch.equal(afr(features, targets, first, gamma=0).coef, afr(features, targets, second, gamma=0).coef)
    assert not torch.equal(afr(features, targets, first).coef, afr(features, targets, second).coef)


def test_the_gamma_of_the_best_worst_group() -> None:
    held, validation = data(), data(key="validation")
    logits = normal(120, 2, key="logits") * 3
    rules = {gamma: afr(held.features, held.targets, logits, gamma=gamma) for gamma in (8.0, 0.0, 2.0)}
    for selector in (validation.groups, validation.targets):
        judged = replace(validation, groups=selector)
        found = tuned_afr(held.features, held.targets, logits, judged, gammas=(8.0, 0.0, 2.0))
        assert found.accuracies == {gamma: worst_accuracy(rule, judged) for gamma, rule in rules.items()}
        assert found.chosen == max(found.accuracies, key=lambda gamma: found.accuracies[gamma])
        assert torch.equal(found.rule.coef, rules[found.chosen].coef)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.ones(3, 2)}, r"logits \(N, C\) and classes .* found \(3, 2\) and \(120,\): take the logits"),
        ({"logits": torch.ones(120, 1)}, r"AFR needs logits \(N, C\) .* found \(120, 1\) and \(120,\)"),
        ({"gamma": -1.0}, "gamma must be a finite number of at least 0, found -1.0: 4 is a usual value"),
        ({"gamma": math.nan}, "gamma must be a finite number of at least 0, found nan"),
    ],
)
def test_what_afr_cannot_use(changes: dict[str, Any], message: str) -> None:
    features, targets, _ = data()
    arguments = {"features": features, "targets": targets, "logits": torch.ones(120, 2)} | changes
    with pytest.raises(ValueError, match=message):
        afr(**arguments)


def test_tuning_needs_something_to_choose_from() -> None:
    features, targets, groups = data()
    with pytest.raises(ValueError, match="found 0 gammas and 120 images to judge them by: give both"):
        tuned_afr(features, targets, torch.ones(120, 2), Features(features, targets, groups), gammas=())


# --- no trace, no chance --------------------------------------------------------------------------------------------


def test_fits_leave_no_trace_and_depend_on_their_seed_alone() -> None:
    found, logits = data(), normal(120, 2, key="logits")
    model = state_of_the_world()

    def everything(seed: int) -> list[LinearRule]:
        return [
            balanced_logistic(*found, penalty="l1", seed=seed, subsets=2),
            balanced_logistic(*found, seed=seed, subsets=2),
            dfr(found, found.features, seed=seed, refits=2, strengths=(1.0, 0.1)).rule,
            afr(found.features, found.targets, logits),
            tuned_afr(found.features, found.targets, logits, found).rule,
        ]

    before = snapshot(model, found, logits)
    first = everything(0)
    assert_unchanged(before, model, found, logits)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again, other = everything(0), everything(1)
    assert all(
        torch.equal(a.coef, b.coef) and torch.equal(a.intercept, b.intercept) for a, b in zip(first, again, strict=True)
    )
    assert not any(torch.equal(a.coef, b.coef) for a, b in zip(first[:3], other[:3], strict=True))


def test_without_scikit_learn_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn, which is not installed: pip install 'neuronsurgery\["):
        balanced_logistic(*data())


def test_end_to_end_on_a_network() -> None:
    """The retrained network answers as the rule does, on images it has never seen."""
    model: SmallResNet = small_resnet(0)
    batches = image_batches(classes=2)
    found = extract_features(model, batches)
    rule = balanced_logistic(found.features, found.targets, found.targets, subsets=2)
    retrained_model = ns.apply(retrained(model, rule.coef, rule.intercept), model).eval()
    new = normal(9, 3, 32, 32, key="new")
    with torch.no_grad():
        answers = retrained_model(new).argmax(1)
    features = extract_features(model, [(new, torch.zeros(9).long())]).features
    assert torch.equal(answers, rule.predict(features))


def test_weights_are_what_copies_of_the_rare_would_be() -> None:
    """Groups of 48 and 12 of each class: four copies of the rare ones, at the strength of as many examples."""
    given = data()
    scaler = fitted(given.features)
    copies = torch.tensor([1, 4])[given.groups % 2]
    every = torch.arange(len(given.targets)).repeat_interleave(copies)
    strength = 0.1 * len(given.targets) / len(every)
    groups = torch.arange(len(every)) % 1  # one group: nothing is weighted
    right = weighted_logistic(given.features[every], given.targets[every], groups, strength=strength, scaler=scaler)
    found = weighted_logistic(given.features, given.targets, given.groups, scaler=scaler)
    torch.testing.assert_close(found.coef, right.coef, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.intercept, right.intercept, rtol=1e-3, atol=1e-4)


def test_an_empty_group_weighs_nothing() -> None:
    given = data()
    moved = torch.where(given.groups > 1, given.groups + 3, given.groups)
    assert_close(
        weighted_logistic(given.features, given.targets, moved).coef,
        weighted_logistic(given.features, given.targets, given.groups).coef,
    )


def test_features_may_carry_a_gradient() -> None:
    features, targets, groups = data()
    logits = normal(len(targets), 2, key="logits")
    for fit in (
        partial(balanced_logistic, targets=targets, groups=groups),
        partial(afr, targets=targets, logits=logits),
    ):
        assert torch.equal(fit(features.clone().requires_grad_()).coef, fit(features).coef)
    graded = afr(features, targets, logits.clone().requires_grad_())
    assert torch.equal(graded.coef, afr(features, targets, logits).coef)
