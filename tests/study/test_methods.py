"""Methods against hand-worked cases and slow loops; each trains, resumes and leaves the caller's things alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.objectives import jtt_weights
from neuronsurgery.study.data import SYNTHETIC_COUNTS, Augmentation, Labelled, Split, synthetic, uniforms
from neuronsurgery.study.methods import (
    FINE_TUNING,
    ContrastiveBatches,
    ContrastivePruning,
    CorrectNContrast,
    GroupBalanced,
    GroupDro,
    contrastive_pairs,
    error_set,
    jtt_upsampling,
    logits_and_features,
    predictions,
    unaugmented,
    upsampled,
)
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.readers import Framing, ImageSplit, Loading, RandomCrop
from neuronsurgery.study.training import (
    EpochReport,
    Erm,
    Hardware,
    Method,
    Recipe,
    Source,
    checkpoint_path,
    load_checkpoint,
    train,
)
from study.little_study import tiny_resnet

SHORT = Recipe("adam", epochs=3, batch_size=8, schedule="constant")


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def split() -> Split:
    none = dict.fromkeys(SYNTHETIC_COUNTS, (0, 0, 0, 0))
    return synthetic(0, counts=none | {"train": (12, 4, 4, 6)}).train


@pytest.fixture(scope="module")
def source(split: Split) -> Source:
    return Source(split, Augmentation())


@pytest.fixture(scope="module")
def trained(source: Source, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """What fine-tuning starts from: batch norm has seen data."""
    return train(tiny_resnet(0), source, tmp_path_factory.mktemp("erm"), recipe=Recipe(epochs=2, batch_size=8))


def numbered(targets: list[int], groups: list[int] | None = None) -> Source:
    """Images of one pixel that shows the image's number, not augmented."""
    images = torch.arange(float(len(targets)))[:, None, None, None].expand(-1, 3, 1, 1)
    classes = torch.tensor(targets)
    return Source(Split(images, classes, classes if groups is None else torch.tensor(groups)), None)


def parts(source: Source) -> tuple[Labelled, Any]:
    return source.split, source.augmentation


def shown(source: Source, size: int = 64, seed: int = 0, epoch: int = 1) -> list[int]:
    """The numbers of the images of an epoch, in order."""
    return [int(image[0, 0, 0]) for images, _, _ in source.epoch(size, seed, epoch) for image in images]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Every method

METHODS: dict[str, Callable[[Source], tuple[Source, Method]]] = {
    "gradient": lambda source: (source, ContrastivePruning(unaugmented(source), fraction=0.01, sample=8, top=16)),
    "magnitude": lambda source: (source, pruning(source, criterion="magnitude", statistics="own")),
    "random": lambda source: (source, pruning(source, criterion="random", statistics="frozen", supervised="mse")),
    "none": lambda source: (source, pruning(source, criterion="none")),
    "group DRO": lambda source: (GroupBalanced(*parts(source)), GroupDro(4, step_size=0.5)),
    "just train twice": lambda source: (upsampled(source, jtt_weights(source.split.groups == 2, 3)), Erm()),
    "correct-n-contrast": lambda source: (contrast(source), CorrectNContrast()),
    "with batch norm": lambda source: (contrast(source), CorrectNContrast(statistics="batch")),
}


def contrast(source: Source) -> ContrastiveBatches:
    return ContrastiveBatches(*parts(source), source.split.groups % 2)


every_method = pytest.mark.parametrize("name", METHODS)


def pruning(source: Source, **changes: Any) -> ContrastivePruning:
    return ContrastivePruning(unaugmented(source), where="block*", **({"fraction": 0.05} | changes))


def kill_after(epoch: int) -> Callable[[EpochReport], None]:
    def progress(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError("killed here")

    return progress


@every_method
def test_killed_and_resumed_is_uninterrupted(name: str, source: Source, trained: nn.Module, tmp_path: Path) -> None:
    images, method = METHODS[name](source)
    arguments: dict[str, Any] = {"recipe": SHORT, "seed": 2, "method": method}
    before = snapshot(trained)
    whole = train(trained, images, tmp_path / "whole", **arguments)
    assert_unchanged(before, trained)
    with pytest.raises(KilledError, match="killed here"):
        train(trained, images, tmp_path / "killed", progress=kill_after(1), **arguments)
    resumed = train(trained, images, tmp_path / "killed", **arguments)
    assert same_state(whole, resumed)
    one, two = (load_file(tmp_path / run / "optimizer.safetensors") for run in ("whole", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not same_state(whole, trained)
    assert not whole.training and all(parameter.requires_grad for parameter in whole.parameters())
    assert not any(module._forward_hooks for module in whole.modules())


@every_method
def test_bfloat16_trains_too(name: str, source: Source, trained: nn.Module, tmp_path: Path) -> None:
    images, method = METHODS[name](source)
    reports: list[EpochReport] = []
    recipe, hardware = replace(SHORT, epochs=1), Hardware(bfloat16=True, channels_last=True)
    train(trained, images, tmp_path, recipe=recipe, method=method, hardware=hardware, progress=reports.append)
    assert math.isfinite(reports[0].loss)


@every_method
def test_descriptions_tell_methods_apart(name: str, source: Source) -> None:
    said = {key: describe(*make(source)) for key, make in METHODS.items()}
    assert [key for key in said if said[key] == said[name]] == [name]
    assert describe(*METHODS[name](source)) == said[name]


def describe(source: Source, method: Method) -> str:
    return json.dumps([source.describe(), method.describe()])


def test_a_predicate_is_described_by_its_name(source: Source) -> None:
    method = ContrastivePruning(unaugmented(source), where=is_inner)
    assert method.describe()["where"] == f"{__name__}.is_inner"
    assert "examples" not in method.describe()
    assert replace(method, where=partial(is_inner)).describe()["where"] == "functools.partial"


def is_inner(name: str, module: nn.Module, parameter: Tensor) -> bool:
    return "block" in name


# Predictions


def test_error_set_and_predictions_by_hand() -> None:
    """Two classes, the logits being the two inputs; the second and the fifth are wrong."""
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.eye(2)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 2.0], [5.0, 6.0], [0.5, -1.0]])
    targets = torch.tensor([0, 0, 1, 1, 1])
    loader = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    before = snapshot(model, loader)
    assert predictions(model, loader).tolist() == [0, 1, 1, 1, 0]
    assert error_set(model, loader).tolist() == [False, True, False, False, True]
    assert_unchanged(before, model, loader)
    with pytest.raises(ValueError, match=r"the loader yielded no batch\. An iterator or generator is exhausted"):
        error_set(model, [])


def test_unaugmented_images_are_those_of_the_split(source: Source) -> None:
    images, targets, groups = (torch.cat(parts) for parts in zip(*unaugmented(source, 10), strict=True))
    assert torch.equal(images, source.split.images)
    assert torch.equal(targets, source.split.targets) and torch.equal(groups, source.split.groups)


# Contrastive pruning


def small_network() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, stride=4, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 8 * 8, 2))


def test_gradient_chooses_the_neurons_of_largest_gradient(split: Split) -> None:
    """All images are hard ones here, so that the mean loss over them is the whole criterion."""
    model = small_network()
    method = ContrastivePruning([(split.images, split.targets)], where="0.*", fraction=0.33)
    evaluated = small_network().eval()
    evaluated.load_state_dict(model.state_dict())
    loss = functional.cross_entropy(evaluated(split.images), split.targets)
    (gradient,) = torch.autograd.grad(loss, [evaluated[0].weight])  # type: ignore[index]
    expected = gradient.flatten(1).norm(dim=1).topk(2).indices
    assert {neuron.index for neuron in method.choose(model, 0, 1)} == set(expected.tolist())


@pytest.mark.parametrize("top", [1, 2, 4, 7, 12])
def test_hard_images_are_those_of_highest_loss(top: int, split: Split) -> None:
    """Of the hardest all are taken; the gradient is theirs alone."""
    model = small_network().eval()
    method = ContrastivePruning([(split.images, split.targets)], where="0.*", fraction=0.5, top=top, sample=top)
    losses = functional.cross_entropy(model(split.images), split.targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.topk(top).values.mean(), [model[0].weight])  # type: ignore[index]
    expected = gradient.flatten(1).norm(dim=1).topk(3).indices
    assert {neuron.index for neuron in method.choose(model, 0, 1)} == set(expected.tolist())


def test_magnitude_chooses_the_largest_weights_and_at_least_one(split: Split) -> None:
    model = small_network()
    method = ContrastivePruning([], where="0.*", criterion="magnitude")
    norms = model[0].weight.flatten(1).norm(dim=1)  # type: ignore[index,union-attr,operator]
    assert [neuron.index for neuron in method.choose(model, 0, 1)] == [int(norms.argmax())]


def test_random_neurons_are_as_many_and_others_in_each_epoch() -> None:
    model = small_resnet(0)
    method = ContrastivePruning([], where="block*", criterion="random", fraction=0.05)
    chosen = [method.choose(model, seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)]
    magnitude = ContrastivePruning([], where="block*", criterion="magnitude", fraction=0.05).choose(model, 0, 1)
    assert {len(neurons) for neurons in chosen} == {len(magnitude)}
    assert len(set(chosen)) == 6
    assert method.choose(model, 1, 2) == chosen[4]


def test_each_epoch_chooses_anew_by_the_weights_of_its_start(
    source: Source, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, nn.Module, ns.Neurons]] = []
    choose = ContrastivePruning.choose

    def spy(self: ContrastivePruning, model: nn.Module, seed: int, epoch: int) -> ns.Neurons:
        chosen = choose(self, model, seed, epoch)
        seen.append((epoch, ns.bake(ns.zero_out(ns.Neurons()), model), chosen))
        return chosen

    monkeypatch.setattr(ContrastivePruning, "choose", spy)
    method = pruning(source, top=8, sample=4)
    train(trained, source, tmp_path, recipe=replace(SHORT, learning_rate=0.01), method=method)
    assert [epoch for epoch, *_ in seen] == [1, 2, 3]
    for epoch, model, chosen in seen:
        start = load_checkpoint(trained, tmp_path, epoch - 1)
        assert same_state(model, start)
        assert chosen == choose(method, start, 0, epoch)
    assert len({chosen for *_, chosen in seen}) == 3


def stepped(model: nn.Module, source: Source, folder: Path, method: Method) -> nn.Module:
    """After one step of SGD with rate 1 on all images."""
    recipe = Recipe("sgd", learning_rate=1.0, epochs=1, batch_size=len(source), schedule="constant")
    return train(model, source, folder, recipe=recipe, method=method)


@pytest.mark.parametrize("supervised", ["cross_entropy", "mse"])
def test_the_gradient_reaches_the_shared_weights_by_both_passes(supervised: Any, split: Split, tmp_path: Path) -> None:
    """One step of SGD against a functional call with the chosen rows at zero, and the loss by a loop, in float64."""
    model, source = small_network(), Source(split, None)
    method = ContrastivePruning(unaugmented(source), "0.*", "magnitude", 0.5, 0.7, 0.3, supervised)
    after = stepped(model, source, tmp_path, method)
    double = small_network().double()
    double.load_state_dict(model.state_dict())
    parameters = dict(double.named_parameters())
    rows = [neuron.index for neuron in method.choose(model, 0, 1)]
    kept = torch.ones(6, dtype=torch.float64).index_fill(0, torch.tensor(rows), 0.0)[:, None, None, None]
    (images, targets, _) = next(iter(source.epoch(len(source), 0, 1)))
    dense = functional_call(double, parameters, images.double())
    pruned = functional_call(double, parameters | {"0.weight": parameters["0.weight"] * kept}, images.double())
    loss = by_loops(dense, pruned, targets, supervised)
    for (name, parameter), gradient in zip(
        parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        expected = parameter - gradient
        torch.testing.assert_close(after.get_parameter(name).double(), expected, rtol=1e-3, atol=1e-4)
        assert gradient.abs().max() > 1e-3


def by_loops(dense: Tensor, pruned: Tensor, targets: Tensor, supervised: str) -> Tensor:
    rows = torch.cat([dense.softmax(1), pruned.softmax(1)])
    count = len(dense)
    terms = []
    for i in range(2 * count):
        weights = [(functional.cosine_similarity(rows[i], rows[k], dim=0) / 0.7).exp() for k in range(2 * count)]
        terms.append(-(weights[(i + count) % (2 * count)] / (sum(weights) - weights[i])).log())
    judged = {
        "cross_entropy": -dense.log_softmax(1)[torch.arange(count), targets].mean(),
        "mse": (dense.softmax(1) - functional.one_hot(targets, 2)).square().sum(1).mean(),
    }
    return torch.stack(terms).mean() + 0.3 * judged[supervised]


def test_rows_that_the_twin_has_at_zero_get_the_model_s_gradient_only(split: Split) -> None:
    """With all rows of a layer pruned, the twin's output does not depend on that layer."""
    model = small_network()
    method = ContrastivePruning([], "0.*", "magnitude", 1.0)
    passes = method.begin_epoch(model, 0, 1)
    dense, pruned = passes(model, split.images)
    weight, bias = model.get_parameter("0.weight"), model.get_parameter("4.bias")
    assert [part.any().item() for part in torch.autograd.grad(dense.sum(), [weight, bias])] == [True, True]
    assert [part.any().item() for part in torch.autograd.grad(pruned.sum(), [weight, bias])] == [False, True]


@pytest.mark.parametrize(("statistics", "updates"), [("shared", 2), ("own", 1), ("frozen", 0)])
def test_running_statistics_are_of_the_passes_that_were_asked_for(
    statistics: Any, updates: int, split: Split, tmp_path: Path
) -> None:
    """Of one step: the running mean moves by a tenth of the way for each pass, first the model's, then the twin's."""
    model, source = small_network(), Source(split, None)
    method = ContrastivePruning([], "0.*", "magnitude", 0.5, statistics=statistics)
    after = stepped(model, source, tmp_path, method)
    twin = ns.bake(ns.zero_out(method.choose(model, 0, 1)), model)
    expected = torch.zeros(6)
    for network in (model, twin)[:updates]:
        mean = network[0](split.images).mean(dim=(0, 2, 3))  # type: ignore[index,operator]
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(after.get_buffer("1.running_mean"), expected)
    assert after.get_buffer("1.num_batches_tracked") == updates


def test_frozen_statistics_are_used_by_both_passes(split: Split) -> None:
    model = small_network()
    passes = ContrastivePruning([], "0.*", "none", statistics="frozen").begin_epoch(model, 0, 1)
    dense, pruned = passes(model, split.images)
    assert torch.equal(dense, pruned) and torch.equal(dense, model.eval()(split.images))


def test_none_is_the_whole_model_twice(split: Split) -> None:
    model = small_network()
    method = ContrastivePruning([], criterion="none")
    dense, again = method.begin_epoch(model, 0, 1)(model, split.images)
    assert torch.equal(dense, again)
    assert len(method.choose(model, 0, 1)) == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"criterion": "size"}, "criterion must be 'gradient', 'magnitude', 'random' or 'none', not 'size'"),
        ({"supervised": "l1"}, "supervised must be 'cross_entropy' or 'mse', not 'l1'"),
        ({"statistics": "mine"}, "statistics must be 'shared', 'own' or 'frozen', not 'mine'"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], not 0.0"),
    ],
)
def test_unknown_choices_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ContrastivePruning([], **changes)


def test_the_paper_s_recipe() -> None:
    assert Recipe("adam", 2e-4, 0.0, 0.0, 20, 100, "plateau") == FINE_TUNING


# Group DRO


def test_group_weights_after_two_steps_by_hand() -> None:
    """Losses log 2 of group 0, log 4 of group 2, none of group 1; then log 2 of group 1 alone; step size 1."""
    method = GroupDro(3, step_size=1.0)
    state = method.initial_state()
    assert state["weights"].tolist() == pytest.approx([1 / 3] * 3)
    even, poor = [0.0, 0.0], [math.log(3), 0.0]  # of class 1: log 2 and log 4
    targets, groups = torch.tensor([1, 1, 1]), torch.tensor([0, 2, 2])
    loss, state = method.loss((torch.tensor([even, poor, poor]),), targets, groups, state)
    assert state["weights"].tolist() == pytest.approx([2 / 7, 1 / 7, 4 / 7])  # 2 : 1 : 4
    assert loss.item() == pytest.approx((2 * math.log(2) + 4 * math.log(4)) / 7)
    loss, state = method.loss((torch.tensor([even]),), targets[:1], torch.tensor([1]), state)
    assert state["weights"].tolist() == pytest.approx([2 / 8, 2 / 8, 4 / 8])
    assert loss.item() == pytest.approx(math.log(2) / 4)


def test_the_adjustment_favours_small_groups() -> None:
    method = GroupDro(2, step_size=1.0, adjustment=2.0, counts=(4, 16))
    outputs, zeros = (torch.zeros(2, 2),), torch.zeros(2, dtype=torch.long)
    _, state = method.loss(outputs, zeros, torch.tensor([0, 1]), method.initial_state())
    assert state["weights"].tolist() == pytest.approx([math.e / (math.e + 1.0 * math.exp(0.5)), 0.3775406], rel=0.1)
    ratio = state["weights"][0] / state["weights"][1]
    assert ratio.item() == pytest.approx(math.exp(2 / 2 - 2 / 4))


def test_group_weights_are_carried_from_step_to_step_and_saved(split: Split, tmp_path: Path) -> None:
    """With the model kept as it is, the weights are proportional to exp(step size * the sum of the batches' losses)."""
    model, source = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), GroupBalanced(split, None)
    recipe = Recipe("sgd", learning_rate=0.0, epochs=2, batch_size=7)
    train(model, source, tmp_path, recipe=recipe, method=GroupDro(4, step_size=0.3))
    total = torch.zeros(4, dtype=torch.float64)
    for epoch in (1, 2):
        for images, targets, groups in source.epoch(7, 0, epoch):
            losses = functional.cross_entropy(model(images), targets, reduction="none").double()
            for group in groups.unique():  # type: ignore[no-untyped-call]
                total[group] += losses[groups == group].mean().detach()
    saved = load_file(tmp_path / "optimizer.safetensors")["method/weights"]
    torch.testing.assert_close(saved.double(), (0.3 * total).softmax(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"groups": 0}, "groups must be at least 1, not 0"),
        ({"groups": 4, "adjustment": 1.0}, "counts must be the training images of each of 4 groups, found None"),
        ({"groups": 4, "counts": (1, 2)}, r"of each of 4 groups, found \(1, 2\): pass the `.counts`"),
    ],
)
def test_group_dro_needs_its_groups(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GroupDro(**arguments)


def test_balanced_draws_are_those_of_a_loop() -> None:
    source = GroupBalanced(*parts(numbered([0] * 7, groups=[0, 3, 0, 1, 3, 0, 0])))
    members = {0: [0, 2, 5, 6], 1: [3], 3: [1, 4]}  # there is no group 2
    draws = uniforms((7, 2), "groups alike", 5, 2)
    expected = [members[[0, 1, 3][int(3 * u)]] for u, _ in draws]
    assert source.draw(5, 2).tolist() == [
        some[int(v * len(some))] for some, (_, v) in zip(expected, draws, strict=True)
    ]
    assert sorted(shown(source, seed=5, epoch=2)) == sorted(source.draw(5, 2).tolist())
    assert source.draw(5, 2).tolist() != source.draw(5, 3).tolist() != source.draw(6, 3).tolist()


def test_groups_are_balanced_in_the_long_run(source: Source) -> None:
    """2,600 draws: a share of a quarter within five standard deviations, and every image is met."""
    drawn = torch.cat([GroupBalanced(*parts(source)).draw(0, epoch) for epoch in range(100)])
    shares = torch.bincount(source.split.groups[drawn]) / len(drawn)
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2600)
    assert set(drawn.tolist()) == set(range(26))


# Just Train Twice


def test_copies_by_hand() -> None:
    source = numbered([0, 0, 1, 1])
    errors = torch.tensor([False, True, False, False])
    twice = upsampled(source, jtt_weights(errors, 2))
    assert len(twice) == 6
    assert sorted(shown(twice)) == [0, 1, 1, 1, 2, 3]
    assert len(shown(twice, size=4)) == 6
    assert {tuple(shown(twice, epoch=epoch)) for epoch in range(9)} > {tuple(shown(twice))}
    assert sorted(shown(upsampled(source, torch.tensor([0, 2, 0, 1])))) == [1, 1, 3]


def test_one_copy_of_each_is_the_source(source: Source) -> None:
    same = upsampled(source, torch.ones(26, dtype=torch.long))
    for one, two in zip(same.epoch(8, 3, 2), source.epoch(8, 3, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_copies_of_an_image_are_augmented_each_by_itself(source: Source) -> None:
    ((images, _, _),) = upsampled(source, torch.eye(26, dtype=torch.long)[0] * 9).epoch(9, 0, 1)
    assert len({image.numpy().tobytes() for image in images}) > 3


@pytest.mark.parametrize("copies", [torch.ones(3, dtype=torch.long), torch.tensor([1, -1]), torch.tensor([0, 0])])
def test_copies_that_do_not_fit_are_refused(copies: Tensor) -> None:
    with pytest.raises(ValueError, match="copies must say of each of 2 images how often it comes, at least once"):
        upsampled(numbered([0, 1]), copies)


@pytest.mark.parametrize("wrong", [1, 7, 26, 100, 333])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_errors_make_up_their_share(wrong: int, share: float) -> None:
    """As near as a whole number of copies comes to it."""
    errors = torch.arange(1000) < wrong
    upsampling = jtt_upsampling(errors, share)
    found = [
        abs((jtt_weights(errors, some)[errors].sum() / jtt_weights(errors, some).sum()).item() - share)
        for some in range(max(0, upsampling - 2), upsampling + 3)
    ]
    met = abs((jtt_weights(errors, upsampling)[errors].sum() / jtt_weights(errors, upsampling).sum()).item() - share)
    assert met <= 1.1 * min(found) + 1e-6


def test_an_error_set_of_nothing_or_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gets 0 of 5 training images wrong, .*: take an earlier epoch of it"):
        jtt_upsampling(torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"gets 5 of 5 .* weight decay, or a later one if it has learnt nothing"):
        jtt_upsampling(torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\), not 1"):
        jtt_upsampling(torch.tensor([True, False]), 1)


# Correct-n-Contrast

TARGETS = [0, 0, 0, 0, 1, 1, 1, 1]
PREDICTED = [0, 0, 1, 0, 1, 1, 0, 1]
CELLS = {(0, 0): {0, 1, 3}, (0, 1): {2}, (1, 0): {6}, (1, 1): {4, 5, 7}}


def contrastive(targets: list[int], predicted: list[int]) -> ContrastiveBatches:
    return ContrastiveBatches(*parts(numbered(targets)), torch.tensor(predicted))


def test_batches_of_eight_images_by_hand() -> None:
    source = contrastive(TARGETS, PREDICTED)
    assert source.anchors.tolist() == list(range(8))
    firsts = Counter[tuple[int, int]]()
    for step in range(400):
        drawn = source.draw(2, 0, 1, step).tolist()
        y, p = TARGETS[drawn[0]], PREDICTED[drawn[0]]
        firsts[y, p] += 1
        blocks = [drawn[start : start + 2] for start in range(0, 8, 2)]
        for block, cell in zip(blocks, [(y, p), (y, 1 - p), (1 - y, p), (1 - y, 1 - p)], strict=True):
            assert set(block) <= CELLS[cell]
            assert len(set(block)) == min(2, len(CELLS[cell]))  # no repeats as far as there are images
    ones = {tuple(source.draw(1, 0, 1, step).tolist()) for step in range(200)}
    for (y, p), images in CELLS.items():  # any image of a cell may be drawn with any of the others
        pairs = {(drawn[0], drawn[3]) for drawn in ones if drawn[0] in images}
        assert pairs == {(one, two) for one in images for two in CELLS[1 - y, 1 - p]}
    for cell, images in CELLS.items():  # any image is as likely to be the first anchor
        assert firsts[cell] / 400 == pytest.approx(len(images) / 8, abs=0.1)


def test_an_epoch_has_as_many_images_as_the_source_and_predictions_for_groups() -> None:
    source = contrastive(TARGETS * 2, PREDICTED * 2)
    batches = list(source.epoch(4, 0, 1))
    assert [len(images) for images, _, _ in batches] == [4] * 4
    for images, targets, groups in batches:
        numbers = [int(image[0, 0, 0]) % 8 for image in images]
        assert targets.tolist() == [TARGETS[number] for number in numbers]
        assert groups.tolist() == [PREDICTED[number] for number in numbers]
    assert shown(source, 4) != shown(source, 4, epoch=2) != shown(source, 4, seed=1, epoch=2)
    assert len(shown(source, 11)) == 16 == len(source)
    assert len(shown(contrastive(TARGETS, PREDICTED), 64)) == 64  # one batch is the least


def test_three_classes_have_easy_negatives_of_the_positives_predictions() -> None:
    targets, predicted = [0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2, 1]
    source = contrastive(targets, predicted)
    for step in range(100):
        drawn = source.draw(2, 0, 1, step)
        y, p = targets[drawn[0]], predicted[drawn[0]]
        others = {predicted[index] for index in drawn[2:4]}
        assert all(targets[index] == y and predicted[index] != p for index in drawn[2:4])
        assert all(targets[index] != y and predicted[index] == p for index in drawn[4:6])
        assert all(targets[index] != y and predicted[index] in others for index in drawn[6:])


def test_without_easy_negatives_there_are_more_of_the_others() -> None:
    """Class 1 is never taken for 0: only image 1 can be an anchor, with the positive 0 and the negatives 2, 3, 4."""
    source = contrastive([0, 0, 1, 1, 1], [0, 1, 1, 1, 1])
    assert source.anchors.tolist() == [1]
    drawn = source.draw(2, 0, 1, 0).tolist()
    assert drawn[:4] == [1, 1, 0, 0]
    assert Counter(drawn[4:]).most_common(1)[0][1] == 2 and set(drawn[4:]) == {2, 3, 4}


def test_a_first_stage_without_mistakes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no image can be an anchor: .* gets 0/0 of the classes' images wrong"):
        contrastive(TARGETS, TARGETS)
    with pytest.raises(ValueError, match=r"gets 0/4 of the classes' images wrong: .* a later one where it always says"):
        contrastive(TARGETS, [0] * 8)
    with pytest.raises(ValueError, match=r"predicted must be one class per image, shape \(8,\), not \(3,\)"):
        contrastive(TARGETS, [0, 1, 0])
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        contrastive(TARGETS, PREDICTED).epoch(3, 0, 1)


def test_pairs_by_hand() -> None:
    """Anchor, positive, negative, easy negative: the first two are anchors, each with the other and one negative."""
    positives, negatives = contrastive_pairs(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 1]))
    assert positives.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert negatives.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_loss_is_that_of_a_loop() -> None:
    """Two blocks' anchors against their own blocks, in float64."""
    features, logits = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    targets, predicted = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])
    method = CorrectNContrast(weight=0.6, temperature=0.2)
    loss, _ = method.loss((logits, features), targets, predicted, {})

    def s(i: int, k: int) -> Tensor:
        return (functional.cosine_similarity(features[i], features[k], dim=0) / 0.2).exp()

    terms = []
    for anchors, positives, negatives in (([0, 1], [2, 3], [4, 5]), ([2, 3], [0, 1], [6, 7])):
        for i in anchors:
            total = sum(s(i, k) for k in positives + negatives)
            terms.append(-sum((s(i, p) / total).log() for p in positives) / 2)
    expected = 0.6 * torch.stack(terms).mean() + 0.4 * functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_features_are_what_the_head_reads(wrapped: bool, split: Split) -> None:
    network = small_resnet(0).eval()
    model = nn.Sequential(nn.Identity(), network) if wrapped else network
    before = snapshot(model)
    with torch.no_grad():
        logits, features = logits_and_features(model, split.images)
        assert torch.equal(network.head(features), logits)
    assert features.shape == (26, 64)
    assert_unchanged(before, model)


def test_a_network_without_a_linear_head_is_refused(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2), nn.LogSoftmax(dim=1))
    with pytest.raises(ValueError, match="the logits of Sequential are not what a linear layer makes of"):
        logits_and_features(model, split.images)
    assert not model[1]._forward_hooks
    with pytest.raises(ValueError, match="of Conv2d are not what a linear layer"):
        logits_and_features(nn.Conv2d(3, 2, 32), split.images)


@pytest.mark.parametrize(("statistics", "moves"), [("frozen", False), ("batch", True)])
def test_statistics_of_contrast(
    statistics: Any, moves: bool, source: Source, trained: nn.Module, tmp_path: Path
) -> None:
    images = contrast(source)
    after = train(trained, images, tmp_path, recipe=SHORT, method=CorrectNContrast(statistics=statistics))
    buffers = zip(after.buffers(), trained.buffers(), strict=True)
    assert all(torch.equal(one, two) != moves for one, two in buffers)


def test_new_batch_norm_is_not_frozen(source: Source, tmp_path: Path) -> None:
    images = contrast(source)
    with pytest.raises(ValueError, match=r"batch norm 'stem_norm' has not seen any data, .* pass statistics='batch'"):
        train(tiny_resnet(0), images, tmp_path, recipe=SHORT, method=CorrectNContrast())


@pytest.mark.parametrize("changes", [{"weight": 1.5}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_numbers_of_contrast_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\] and temperature above 0, found"):
        CorrectNContrast(**changes)
    with pytest.raises(ValueError, match="statistics must be 'frozen' or 'batch', not 'shared'"):
        CorrectNContrast(statistics="shared")  # type: ignore[arg-type]


# Images on disk


@pytest.fixture
def on_disk(tmp_path: Path) -> Source:
    """Eight images of one grey each, in the cells of `CELLS`; the group of image i is i % 4."""
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for number in range(8):
        image.new("RGB", (8, 8), (30 * number,) * 3).save(tmp_path / f"{number}.png")
    paths = tuple(f"{number}.png" for number in range(8))
    targets, groups = torch.tensor(TARGETS), torch.arange(8) % 4
    split = ImageSplit(tmp_path, paths, targets, groups, 4, Framing((("resize", 8),)), Loading())
    return Source(split, RandomCrop(8))


def greys(source: Source, size: int = 4) -> list[int]:
    """The numbers of the images of an epoch, told by their grey."""
    images = torch.cat([images for images, _, _ in source.epoch(size, 0, 1)])
    return [round(value * 255 / 30) for value in (images.mean(dim=(2, 3))[:, 0] * 0.229 + 0.485).tolist()]


def test_sources_pick_images_from_disk_too(on_disk: Source) -> None:
    assert sorted(greys(upsampled(on_disk, jtt_weights(torch.arange(8) == 3, 2)))) == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7]
    balanced = GroupBalanced(*parts(on_disk))
    assert sorted(greys(balanced)) == sorted(balanced.draw(0, 1).tolist())
    contrast = ContrastiveBatches(*parts(on_disk), torch.tensor(PREDICTED))
    assert greys(contrast) == torch.cat([contrast.draw(1, 0, 1, step) for step in range(2)]).tolist()
    predicted = torch.cat([groups for _, _, groups in contrast.epoch(4, 0, 1)])
    assert predicted.tolist() == [PREDICTED[number] for number in greys(contrast)]
    assert [len(targets) for _, targets, _ in unaugmented(on_disk, 5)] == [5, 3]


def test_every_checkpoint_is_there(source: Source, trained: nn.Module, tmp_path: Path) -> None:
    train(trained, source, tmp_path, recipe=SHORT, method=pruning(source))
    assert all(checkpoint_path(tmp_path, epoch).exists() for epoch in range(4))
