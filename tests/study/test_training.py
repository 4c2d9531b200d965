"""Training: the same weights for the same arguments, whatever interrupted it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from neuronsurgery.study import training
from neuronsurgery.study.data import Augmentation, Split, raw_bits, synthetic
from neuronsurgery.study.methods import GroupDro
from neuronsurgery.study.network import SmallResNet, small_resnet
from neuronsurgery.study.training import (
    RECIPES,
    EpochReport,
    Recipe,
    Source,
    checkpoint_epochs,
    checkpoint_path,
    load_checkpoint,
    train,
)
from study.little_study import tiny_resnet

EPOCHS = 4
SHORT = {name: replace(recipe, epochs=EPOCHS, batch_size=16) for name, recipe in RECIPES.items()}
SHORT["plateau"] = Recipe("adam", epochs=EPOCHS, batch_size=16, schedule="plateau")


class KilledError(Exception):
    pass


def make_split() -> Split:
    none = (0, 0, 0, 0)
    return synthetic(0, counts={"train": (20, 6, 6, 10), "validation": none, "test": none}).train


@pytest.fixture(scope="module")
def split() -> Split:
    return make_split()


def kill_after(epoch: int) -> Callable[[EpochReport], None]:
    def progress(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError("killed here")

    return progress


def run(split: Split, folder: Path, **changes: Any) -> nn.Module:
    arguments = {"recipe": SHORT["adam"], "seed": 3, "augmentation": Augmentation()} | changes
    return train(arguments.pop("model", None) or tiny_resnet(5), split, folder, **arguments)


@pytest.fixture(scope="module")
def whole(split: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """What `run` gives, and the folder of it, for reading only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(split, folder), folder


@pytest.fixture
def finished(whole: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """The folder of a finished run."""
    return shutil.copytree(whole[1], tmp_path / "finished")


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return same_tensors(a.state_dict(), b.state_dict())


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_folder(a: Path, b: Path) -> bool:
    names = sorted(path.relative_to(a) for path in a.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(b) for path in b.rglob("*.safetensors"))
    return all(same_tensors(load_file(a / name), load_file(b / name)) for name in names)


# The network


def test_network_has_the_size_and_names_of_the_contract() -> None:
    network = small_resnet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 77_522
    weights = {name: parameter for name, parameter in network.named_parameters() if parameter.ndim > 1}
    assert sum(len(weight) for weight in weights.values() if weight.ndim == 4) == 336
    assert list(weights) == [
        "stem.weight",
        "block1.conv1.weight",
        "block1.conv2.weight",
        "block2.conv1.weight",
        "block2.conv2.weight",
        "block2.shortcut.conv.weight",
        "block3.conv1.weight",
        "block3.conv2.weight",
        "block3.shortcut.conv.weight",
        "head.weight",
    ]


@pytest.mark.parametrize(("size", "classes"), [(32, 2), (16, 3), (5, 2)])
def test_network_maps_images_to_logits(size: int, classes: int) -> None:
    assert small_resnet(0, classes)(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = small_resnet(7)
    torch.manual_seed(2)
    assert same_state(first, small_resnet(7))
    assert not same_state(first, small_resnet(8))


def test_initialisation_is_that_of_torch_in_distribution() -> None:
    ours, theirs = small_resnet(0), SmallResNet()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1:
            bound = parameter[0].numel() ** -0.5
            weight = ours.get_parameter(name)
            assert parameter.abs().max() <= bound
            assert 0.9 * bound < weight.abs().max() <= bound


# Training


def test_training_learns(split: Split, tmp_path: Path) -> None:
    reports: list[EpochReport] = []
    recipe = replace(SHORT["adam"], epochs=12)
    run(split, tmp_path, model=small_resnet(5), recipe=recipe, augmentation=None, progress=reports.append)
    assert [report.epoch for report in reports] == list(range(1, 13))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].accuracy > 0.9


def test_first_step_of_each_recipe_is_by_hand(split: Split, tmp_path: Path) -> None:
    """One step on the whole split: SGD moves by -rate * (gradient + decay * weight), AdamW by -rate * sign."""
    model = small_resnet(0)
    recipe = Recipe("sgd", learning_rate=0.1, weight_decay=0.5, momentum=0.9, epochs=1, batch_size=len(split))
    loss = nn.functional.cross_entropy(model(split.images), split.targets)
    before = model.head.weight.detach()
    (gradient,) = torch.autograd.grad(loss, [model.head.weight])
    after = train(model, split, tmp_path / "sgd", recipe=recipe).get_parameter("head.weight")
    torch.testing.assert_close(after, before - 0.1 * (gradient + 0.5 * before))
    recipe = Recipe("adamw", learning_rate=0.1, epochs=1, batch_size=len(split))
    after = train(model, split, tmp_path / "adamw", recipe=recipe).get_parameter("head.weight")
    torch.testing.assert_close(after, before - 0.1 * gradient.sign(), rtol=1e-3, atol=1e-3)
    # A decay so strong that, being a part of the gradient, it decides the sign.
    recipe = replace(recipe, optimizer="adam", weight_decay=1e4)
    after = train(model, split, tmp_path / "adam", recipe=recipe).get_parameter("head.weight")
    torch.testing.assert_close(after, before - 0.1 * before.sign(), rtol=1e-3, atol=1e-3)


def test_rate_falls_along_half_a_cosine_to_zero() -> None:
    recipe = Recipe(learning_rate=2.0)
    assert [training._rate(recipe, step, 10, []) for step in (0, 5, 10)] == [2.0, pytest.approx(1.0), 0.0]


def rates(recipe: Recipe, losses: list[float]) -> list[float]:
    """Of each epoch, the first being before any loss."""
    return [training._rate(recipe, 7, 10, losses[:epoch]) for epoch in range(len(losses) + 1)]


def test_rate_stays_where_it_is_constant() -> None:
    assert rates(Recipe(learning_rate=0.3, schedule="constant"), [3.0, 3.0, 3.0]) == [0.3] * 4


def test_rate_is_halved_after_two_epochs_on_a_plateau() -> None:
    recipe = Recipe(learning_rate=8.0, schedule="plateau")
    assert rates(recipe, [3.0, 2.0, 2.0, 1.99999]) == [8.0, 8.0, 8.0, 8.0, 4.0]
    assert rates(recipe, [2.0, 3.0, 1.0, 3.0, 0.9]) == [8.0] * 6
    assert rates(recipe, [1.0] * 7) == [8.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_plateau_is_that_of_torch(seed: int) -> None:
    losses = torch.rand(60, generator=torch.Generator().manual_seed(seed)).cumsum(0).neg().exp().add(0.5).tolist()
    losses = [loss + 0.1 * (index % 3) for index, loss in enumerate(losses)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, eps=0.0)
    expected = [1.0]
    for loss in losses:
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(Recipe(learning_rate=1.0, schedule="plateau"), losses) == expected
    assert expected[-1] < 0.1


def test_training_uses_the_rate_of_the_plateau(split: Split, tmp_path: Path) -> None:
    """No step is ever taken that lowers the loss: every second epoch halves the rate, so three sizes of step."""
    recipe = Recipe("sgd", learning_rate=0.25, epochs=6, batch_size=len(split), schedule="plateau")
    model = Constant()
    train(model, split, tmp_path, recipe=recipe, method=Uphill())
    met = [load_checkpoint(model, tmp_path, epoch).get_parameter("weight").item() for epoch in range(7)]
    steps = [after - before for before, after in pairwise(met)]
    assert steps == pytest.approx([0.25, 0.25, 0.25, 0.125, 0.125, 0.0625], rel=1e-5)


@pytest.mark.parametrize("epoch", range(1, 6))
def test_the_rate_of_the_plateau_survives_a_kill(epoch: int, split: Split, tmp_path: Path) -> None:
    recipe = Recipe("sgd", learning_rate=0.25, epochs=6, batch_size=len(split), schedule="plateau")
    with pytest.raises(KilledError, match="killed here"):
        train(Constant(), split, tmp_path, recipe=recipe, method=Uphill(), progress=kill_after(epoch))
    after = train(Constant(), split, tmp_path, recipe=recipe, method=Uphill())
    assert after.get_parameter("weight").item() == pytest.approx(3 * 0.25 + 2 * 0.125 + 0.0625, rel=1e-5)


class Constant(nn.Module):
    """Its one weight as the logit of either class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight.expand(len(images), 2)


class Uphill(training.Erm):
    """A loss of gradient -1, to which the weight adds nothing."""

    def loss(self, outputs: Any, targets: Tensor, groups: Tensor, state: Any) -> Any:
        mean = outputs[0].mean()
        return mean.detach() - mean, state


@pytest.mark.parametrize("recipe", ["adam", "sgd"])
def test_same_arguments_same_weights(recipe: str, split: Split, tmp_path: Path) -> None:
    first = run(split, tmp_path / "a", recipe=SHORT[recipe])
    assert same_state(first, run(split, tmp_path / "b", recipe=SHORT[recipe]))
    assert not same_state(first, run(split, tmp_path / "c", recipe=SHORT[recipe], seed=4))


def test_checkpoint_0_is_the_initialisation_and_the_last_is_the_result(whole: tuple[nn.Module, Path]) -> None:
    trained, folder = whole
    assert checkpoint_epochs(folder) == tuple(range(EPOCHS + 1))
    assert same_state(load_checkpoint(tiny_resnet(), folder, 0), tiny_resnet(5))
    assert same_state(load_checkpoint(tiny_resnet(), folder, EPOCHS), trained)


def test_what_the_caller_owns_stays(split: Split, tmp_path: Path) -> None:
    model, images, state = tiny_resnet(5), split.images.clone(), torch.get_rng_state()
    trained = train(model, split, tmp_path, recipe=SHORT["adam"], augmentation=Augmentation())
    load_checkpoint(model, tmp_path, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(images, split.images)
    assert same_state(model, tiny_resnet(5))
    assert model.training
    assert not trained.training
    assert all(parameter.grad is None for parameter in model.parameters())


# KilledError and resumed


@pytest.mark.parametrize("recipe", ["adam", "sgd", "plateau"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_and_resumed_is_uninterrupted(recipe: str, epoch: int, split: Split, tmp_path: Path) -> None:
    whole = run(split, tmp_path / "whole", recipe=SHORT[recipe])
    with pytest.raises(KilledError, match="killed here"):
        run(split, tmp_path / "killed", recipe=SHORT[recipe], progress=kill_after(epoch))
    assert checkpoint_epochs(tmp_path / "killed") == tuple(range(epoch + 1))
    reports: list[EpochReport] = []
    resumed = run(split, tmp_path / "killed", recipe=SHORT[recipe], progress=reports.append)
    assert [report.epoch for report in reports] == list(range(epoch + 1, EPOCHS + 1))
    assert same_state(whole, resumed)
    assert same_folder(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("write", range(2 * (EPOCHS + 1)))
def test_killed_before_any_write_resumes_to_the_same_bits(
    write: int, whole: tuple[nn.Module, Path], split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch, the 0th included, renames two files; this dies before each of these renames in turn."""
    replace_file, renames = os.replace, iter(range(100))

    def die(source: Path, target: Path) -> None:
        if next(renames) == write:
            raise KilledError("killed here")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KilledError, match="killed here"):
            run(split, tmp_path / "killed")
    assert same_state(whole[0], run(split, tmp_path / "killed"))
    assert same_folder(whole[1], tmp_path / "killed")


def test_dropout_resumes_too(split: Split, tmp_path: Path) -> None:
    def model() -> nn.Module:
        network = tiny_resnet(0)
        return nn.Sequential(nn.Dropout(0.2), network)

    whole = train(model(), split, tmp_path / "whole", recipe=SHORT["adam"])
    with pytest.raises(KilledError, match="killed here"):
        train(model(), split, tmp_path / "killed", recipe=SHORT["adam"], progress=kill_after(2))
    torch.rand(5)
    assert same_state(whole, train(model(), split, tmp_path / "killed", recipe=SHORT["adam"]))


def test_dropout_is_drawn_from_a_seed_of_the_epoch(split: Split, tmp_path: Path) -> None:
    """One step by hand: folders of runs that were begun long ago go on with the same draws."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 32 * 32, 2))
    recipe = Recipe("sgd", learning_rate=0.1, epochs=1, batch_size=len(split))
    after = train(model, split, tmp_path, recipe=recipe, seed=3)
    (batch,) = Source(split, None).epoch(len(split), 3, 1)
    torch.manual_seed(int(raw_bits(1, "dropout", 3, 1)[0]) >> 1)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    (gradient,) = torch.autograd.grad(loss, [model.get_parameter("2.weight")])
    torch.testing.assert_close(after.get_parameter("2.weight"), model.get_parameter("2.weight") - 0.1 * gradient)


def test_half_written_temporary_files_are_ignored(whole: tuple[nn.Module, Path], split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    with pytest.raises(KilledError, match="killed here"):
        run(split, folder, progress=kill_after(2))
    for path in (checkpoint_path(folder, 3), checkpoint_path(folder, 9), folder / "optimizer.safetensors"):
        path.with_name(f".{path.name}.a1b2c3d4.part").write_bytes(b"half of")
    assert checkpoint_epochs(folder) == (0, 1, 2)
    assert same_state(whole[0], run(split, folder))
    assert same_names(folder, whole[1]), "what a killed process left is removed"


def same_names(a: Path, b: Path) -> bool:
    return {path.relative_to(a) for path in a.rglob("*")} == {path.relative_to(b) for path in b.rglob("*")}


def test_a_folder_from_before_methods_and_schedules_is_still_understood(whole: tuple[nn.Module, Path]) -> None:
    with safe_open(whole[1] / "optimizer.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["run"])
    recipe = {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.0, "momentum": 0.0}
    assert said.pop("recipe") == recipe | {"epochs": EPOCHS, "batch_size": 16}
    assert said.pop("hardware") == {"device": None, "bfloat16": False, "channels_last": False}
    assert sorted(said) == ["augmentation", "images and targets", "initial weights", "seed"]


def test_a_run_by_another_method_is_refused_either_way(split: Split, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"recipe": SHORT["adam"]}
    train(tiny_resnet(5), split, tmp_path / "erm", **arguments)
    with pytest.raises(ValueError, match=r"another run; method: expected {'name': 'group DRO'.*, found None: choose"):
        train(tiny_resnet(5), split, tmp_path / "erm", method=GroupDro(4), **arguments)
    train(tiny_resnet(5), split, tmp_path / "dro", method=GroupDro(4), **arguments)
    with pytest.raises(ValueError, match=r"another run; method: expected None, found {'name': 'group DRO'"):
        train(tiny_resnet(5), split, tmp_path / "dro", **arguments)
    with pytest.raises(ValueError, match=r"another run; method: expected .*0.02, .*, found .*0.01, "):
        train(tiny_resnet(5), split, tmp_path / "dro", method=GroupDro(4, step_size=0.02), **arguments)


def test_a_finished_run_is_only_loaded(whole: tuple[nn.Module, Path], finished: Path, split: Split) -> None:
    assert same_state(whole[0], run(split, finished, progress=kill_after(EPOCHS)))


# Errors


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed: expected 4, found 3"),
        ({"recipe": SHORT["sgd"]}, "recipe: expected {'optimizer': 'sgd'"),
        ({"augmentation": None}, "augmentation: expected None, found {'flip': True, 'shift': 1}"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    changes: dict[str, object], named: str, split: Split, tmp_path: Path
) -> None:
    with pytest.raises(KilledError, match="killed here"):
        run(split, tmp_path, progress=kill_after(1))
    with pytest.raises(ValueError, match="holds another run; " + re.escape(named) + ".*another folder"):
        run(split, tmp_path, **changes)


def test_another_initialisation_or_other_images_are_refused(finished: Path, split: Split) -> None:
    arguments = {"recipe": SHORT["adam"], "seed": 3, "augmentation": Augmentation()}
    with pytest.raises(ValueError, match="holds another run; initial weights: expected"):
        train(tiny_resnet(6), split, finished, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds another run; images and targets: expected"):
        train(tiny_resnet(5), split.subset(torch.arange(40)), finished, **arguments)  # type: ignore[arg-type]


def test_a_missing_checkpoint_is_named(finished: Path, split: Split) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of epoch 9; found the epochs \[0, 1, 2, 3, 4\]"):
        load_checkpoint(tiny_resnet(), finished, 9)
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of epoch 4; found the epochs \[\]"):
        run(split, finished)


def test_a_damaged_file_is_named(finished: Path) -> None:
    checkpoint_path(finished, 2).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"epoch-002.safetensors: expected safetensors, found"):
        load_checkpoint(tiny_resnet(), finished, 2)


def test_an_unknown_optimizer_is_named(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must be 'adamw', 'adam' or 'sgd', not 'lion'"):
        train(small_resnet(), split, tmp_path, recipe=Recipe("lion"))  # type: ignore[arg-type]


def test_an_unknown_schedule_is_named(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule must be 'cosine', 'constant' or 'plateau', not 'linear'"):
        train(small_resnet(), split, tmp_path, recipe=Recipe(schedule="linear"))  # type: ignore[arg-type]


def test_a_report_is_one_line() -> None:
    assert str(EpochReport(3, 30, 0.25, 0.875, 1.26)) == "epoch   3/30  loss 0.2500  accuracy  87.5 %  1.3 s"
