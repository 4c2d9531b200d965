"""Training: the same weights for the same arguments, whatever interrupted it."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from neuronsurgery.study import training
from neuronsurgery.study.data import Augmentation, Split, synthetic
from neuronsurgery.study.network import SmallResNet, small_resnet
from neuronsurgery.study.training import (
    RECIPES,
    EpochReport,
    Recipe,
    checkpoint_epochs,
    checkpoint_path,
    load_checkpoint,
    train,
)

EPOCHS = 4
SHORT = {name: replace(recipe, epochs=EPOCHS, batch_size=16) for name, recipe in RECIPES.items()}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def split() -> Split:
    none = (0, 0, 0, 0)
    return synthetic(0, counts={"train": (20, 6, 6, 10), "validation": none, "test": none}).train


def kill_after(epoch: int) -> Callable[[EpochReport], None]:
    def progress(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError("killed here")

    return progress


def run(split: Split, folder: Path, **changes: object) -> nn.Module:
    arguments = {"recipe": SHORT["adam"], "seed": 3, "augmentation": Augmentation()} | changes
    return train(small_resnet(5), split, folder, **arguments)  # type: ignore[arg-type]  # a mixed bag of arguments


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
    run(split, tmp_path, recipe=replace(SHORT["adam"], epochs=12), augmentation=None, progress=reports.append)
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
    after = train(model, split, tmp_path / "adam", recipe=recipe).get_parameter("head.weight")
    torch.testing.assert_close(after, before - 0.1 * gradient.sign(), rtol=1e-3, atol=1e-3)


def test_rate_falls_along_half_a_cosine_to_zero() -> None:
    assert training._cosine(2.0, 0, 10) == 2.0
    assert training._cosine(2.0, 5, 10) == pytest.approx(1.0)
    assert training._cosine(2.0, 10, 10) == 0.0


@pytest.mark.parametrize("recipe", ["adam", "sgd"])
def test_same_arguments_same_weights(recipe: str, split: Split, tmp_path: Path) -> None:
    first = run(split, tmp_path / "a", recipe=SHORT[recipe])
    assert same_state(first, run(split, tmp_path / "b", recipe=SHORT[recipe]))
    assert not same_state(first, run(split, tmp_path / "c", recipe=SHORT[recipe], seed=4))


def test_checkpoint_0_is_the_initialisation_and_the_last_is_the_result(split: Split, tmp_path: Path) -> None:
    trained = run(split, tmp_path)
    assert checkpoint_epochs(tmp_path) == tuple(range(EPOCHS + 1))
    assert same_state(load_checkpoint(SmallResNet(), tmp_path, 0), small_resnet(5))
    assert same_state(load_checkpoint(SmallResNet(), tmp_path, EPOCHS), trained)


def test_what_the_caller_owns_stays(split: Split, tmp_path: Path) -> None:
    model, images, state = small_resnet(5), split.images.clone(), torch.get_rng_state()
    trained = train(model, split, tmp_path, recipe=SHORT["adam"], augmentation=Augmentation())
    load_checkpoint(model, tmp_path, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(images, split.images)
    assert same_state(model, small_resnet(5))
    assert model.training
    assert not trained.training
    assert all(parameter.grad is None for parameter in model.parameters())


# KilledError and resumed


@pytest.mark.parametrize("recipe", ["adam", "sgd"])
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
    write: int, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch, the 0th included, renames two files; this dies before each of these renames in turn."""
    whole = run(split, tmp_path / "whole")
    replace_file, renames = os.replace, iter(range(100))

    def die(source: Path, target: Path) -> None:
        if next(renames) == write:
            raise KilledError("killed here")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KilledError, match="killed here"):
            run(split, tmp_path / "killed")
    assert same_state(whole, run(split, tmp_path / "killed"))
    assert same_folder(tmp_path / "whole", tmp_path / "killed")


def test_dropout_resumes_too(split: Split, tmp_path: Path) -> None:
    def model() -> nn.Module:
        network = small_resnet(0)
        return nn.Sequential(nn.Dropout(0.2), network)

    whole = train(model(), split, tmp_path / "whole", recipe=SHORT["adam"])
    with pytest.raises(KilledError, match="killed here"):
        train(model(), split, tmp_path / "killed", recipe=SHORT["adam"], progress=kill_after(2))
    torch.rand(5)
    assert same_state(whole, train(model(), split, tmp_path / "killed", recipe=SHORT["adam"]))


def test_half_written_temporary_files_are_ignored(split: Split, tmp_path: Path) -> None:
    whole = run(split, tmp_path / "whole")
    folder = tmp_path / "killed"
    with pytest.raises(KilledError, match="killed here"):
        run(split, folder, progress=kill_after(2))
    for path in (checkpoint_path(folder, 3), checkpoint_path(folder, 9), folder / "optimizer.safetensors"):
        path.with_name(path.name + ".tmp").write_bytes(b"half of")
    assert checkpoint_epochs(folder) == (0, 1, 2)
    assert same_state(whole, run(split, folder))


def test_a_finished_run_is_only_loaded(split: Split, tmp_path: Path) -> None:
    first = run(split, tmp_path)
    assert same_state(first, run(split, tmp_path, progress=kill_after(EPOCHS)))


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


def test_another_initialisation_or_other_images_are_refused(split: Split, tmp_path: Path) -> None:
    run(split, tmp_path)
    arguments = {"recipe": SHORT["adam"], "seed": 3, "augmentation": Augmentation()}
    with pytest.raises(ValueError, match="holds another run; initial weights: expected"):
        train(small_resnet(6), split, tmp_path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds another run; images and targets: expected"):
        train(small_resnet(5), split.subset(torch.arange(40)), tmp_path, **arguments)  # type: ignore[arg-type]


def test_a_missing_checkpoint_is_named(split: Split, tmp_path: Path) -> None:
    run(split, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of epoch 9; found the epochs \[0, 1, 2, 3, 4\]"):
        load_checkpoint(small_resnet(), tmp_path, 9)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of epoch 4; found the epochs \[\]"):
        run(split, tmp_path)


def test_a_damaged_file_is_named(split: Split, tmp_path: Path) -> None:
    run(split, tmp_path)
    checkpoint_path(tmp_path, 2).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"epoch-002.safetensors: expected safetensors, found"):
        load_checkpoint(small_resnet(), tmp_path, 2)


def test_an_unknown_optimizer_is_named(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'sgd', found 'lion'"):
        train(small_resnet(), split, tmp_path, recipe=Recipe("lion"))  # type: ignore[arg-type]


def test_progress_prints_one_line_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    training.print_progress(EpochReport(3, 30, 0.25, 0.875, 1.26))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "epoch   3/30  loss 0.2500  accuracy  87.5 %  1.3 s\n"
