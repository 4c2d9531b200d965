"""The page on training loops: its examples run, and what it says of them is so.

The blocks with a prompt are one doctest. The block for Lightning is code of a package that is not a dependency; it runs
where that is installed.
"""

from __future__ import annotations

import copy
import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.objectives import nt_xent

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
LIGHTNING = re.compile(r"^```python\n(import lightning\n.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's examples leave behind; they have run without a failure."""
    test = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    results = runner.run(test, out=report.append, clear_globs=False)
    assert results.failed == 0, "".join(report)
    assert results.attempted > 40
    return test.globs


@pytest.fixture
def names(page: dict[str, Any]) -> dict[str, Any]:
    """The page's names with a network and a callback of the test's own."""
    model = copy.deepcopy(page["model"]).train()
    pruned = page["PrunedTwin"](model, page["loader"], fraction=0.05, where=page["convolutions"], top=32, sample=16)
    return page | {"model": model, "pruned": pruned}


class Trainer:
    """As much of a trainer as the callback looks at."""

    def __init__(self, epoch: int = 0) -> None:
        self.current_epoch = epoch


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# --- the callback ---------------------------------------------------------------------------------------------------


def test_the_choice_changes_nothing(names: dict[str, Any]) -> None:
    model, pruned = names["model"], names["pruned"]
    before = snapshot(model, names["loader"])
    pruned.on_train_epoch_start(Trainer(), model)
    assert_unchanged(before, model, names["loader"])


def test_the_choice_is_the_largest_gradients_of_the_hardest_examples(names: dict[str, Any]) -> None:
    model, pruned, (images, labels) = names["model"], names["pruned"], (names["images"], names["labels"])
    pruned.batch = {"top": 8, "sample": 8}
    pruned.on_train_epoch_start(Trainer(), model)
    still = copy.deepcopy(model).eval()
    hardest = nn.functional.cross_entropy(still(images), labels, reduction="none").topk(8).indices
    found = gradients(nn.functional.cross_entropy(still(images[hardest]), labels[hardest]), still)
    lengths = {
        (name, row): found[name][row].norm().item()
        for name in ("0.weight", "3.weight")
        for row in range(len(found[name]))
    }
    chosen = {(neuron.parameter, neuron.index) for neuron in pruned.critical}
    assert chosen == set(sorted(lengths, key=lengths.__getitem__)[-2:])


def test_every_epoch_has_a_twin_of_its_own(names: dict[str, Any]) -> None:
    model, pruned = names["model"], names["pruned"]
    twins = []
    for epoch in range(2):
        pruned.on_train_epoch_start(Trainer(epoch), model)
        twins.append(pruned.twin)
    assert twins[0] is not twins[1]
    assert all({*map(id, twin.parameters())} == {*map(id, model.parameters())} for twin in twins)
    pruned.on_train_end(Trainer(), model)
    assert pruned.twin is None


def test_a_step_is_two_forward_passes_and_one_backward(names: dict[str, Any]) -> None:
    model, pruned, (x, y) = names["model"], names["pruned"], names["loader"][0]
    pruned.on_train_epoch_start(Trainer(), model)
    passes: list[str] = []
    model[-1].register_forward_hook(lambda *_: passes.append("dense"))
    pruned.twin[-1].register_forward_hook(lambda *_: passes.append("pruned"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: passes.append("backward"))
    pruned.loss(x, y).backward()
    assert passes == ["dense", "pruned", "backward"]


def test_the_gradient_is_that_of_a_network_with_zeros_written_in(names: dict[str, Any]) -> None:
    """Both sides of the loss by hand: a plain copy with zeroed rows for the twin, the shares of the two added up."""
    model, pruned, (x, y) = names["model"].double(), names["pruned"], names["loader"][0]
    x = x.double()
    pruned.loader = [(images.double(), labels) for images, labels in names["loader"]]
    pruned.on_train_epoch_start(Trainer(), model)
    found = gradients(pruned.loss(x, y), model)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in pruned.critical.masks().items():
            cut.get_parameter(name).masked_fill_(mask, 0.0)
    dense, zeroed = model(x).softmax(1), cut(x).softmax(1)
    error = (dense - nn.functional.one_hot(y, 2)).square().sum(1).mean()
    loss = nt_xent(dense, zeroed) + 0.2 * error
    through_model, through_cut = (
        gradients(loss, model),
        gradients(nt_xent(dense.detach(), cut(x).softmax(1)), cut),
    )
    masks = pruned.critical.masks()
    for name, gradient in found.items():
        share = through_cut[name]
        share = share.masked_fill(masks[name], 0.0) if name in masks else share
        torch.testing.assert_close(gradient, through_model[name] + share, rtol=1e-9, atol=1e-12)
    assert max(share.abs().max() for share in through_cut.values()) > 1e-4


# --- what the page says of batch norm -------------------------------------------------------------------------------


def twins_of(names: dict[str, Any]) -> tuple[nn.Module, nn.Module, nn.Module]:
    model = names["model"]
    edit = ns.zero_out(names["critical"])
    return model, ns.apply(edit, model), ns.apply(edit, model, buffers="shared")


def test_the_twin_takes_over_the_mode_of_every_module(names: dict[str, Any]) -> None:
    model = names["model"]
    model[1].eval()
    for twin in twins_of(names)[1:]:
        assert [module.training for module in twin.modules() if isinstance(module, nn.BatchNorm2d)] == [False, True]


def test_in_training_mode_the_statistics_are_not_in_the_loss(names: dict[str, Any]) -> None:
    model, own, shared = twins_of(names)
    x, y = names["loader"][0]
    one, two = (ns.contrastive_pruning_loss(model(x).softmax(1), twin(x).softmax(1), y) for twin in (own, shared))
    assert torch.equal(one, two)
    first, second = gradients(one, model), gradients(two, model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_own_statistics_are_of_one_network_and_shared_ones_of_both(names: dict[str, Any]) -> None:
    model, own, shared = twins_of(names)
    x, _ = names["loader"][0]
    before = model[4].num_batches_tracked.item()
    model(x), own(x)
    assert model[4].num_batches_tracked.item() == own[4].num_batches_tracked.item() == before + 1
    assert not torch.equal(model[4].running_mean, own[4].running_mean)
    model(x), shared(x)
    assert model[4].num_batches_tracked.item() == before + 3
    assert model[4].running_mean is shared[4].running_mean


def test_frozen_statistics_are_the_same_in_both(names: dict[str, Any]) -> None:
    names["model"].eval()
    model, own, shared = twins_of(names)
    x, _ = names["loader"][0]
    buffers = list(own.buffers())
    before = snapshot(model, buffers)
    assert torch.equal(own(x), shared(x))
    assert_unchanged(before, model, buffers)


def test_three_passes_leave_the_gradient_of_two(names: dict[str, Any]) -> None:
    model, twin, _ = twins_of(names)
    x, y = names["loader"][0]
    expected = gradients(ns.contrastive_pruning_loss(model(x).softmax(1), twin(x).softmax(1), y), model)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters())
    exec(three_passes(), names | {"model": model, "twin": twin, "x": x, "y": y, "optimizer": optimizer})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def three_passes() -> str:
    """The page's block of three passes, as one program."""
    examples = doctest.DocTestParser().get_examples(PAGE.read_text())
    first = next(number for number, example in enumerate(examples) if "held = model(x)" in example.source)
    return "".join(example.source for example in examples[first : first + 5])


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_lightning_runs_the_callback(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)  # where it writes its logs and checkpoints
    (block,) = LIGHTNING.findall(PAGE.read_text())
    model = names["model"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    namespace = dict(names)
    exec(block, namespace)
    module, trainer = namespace["module"], namespace["trainer"]
    assert isinstance(module.pruned, lightning.Callback) and module.pruned in trainer.callbacks
    assert trainer.global_step == 2 * len(names["loader"])
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [name.removeprefix("network.") for name in module.state_dict()] == list(model.state_dict())
    assert len(module.pruned.critical) == 2 and module.pruned.twin is None
