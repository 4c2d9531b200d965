"""Training a set alone: every other entry keeps its bits, whatever the optimiser does to them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neuronsurgery as ns

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    return model


def some(model: nn.Module) -> ns.Neurons:
    """Two rows of the first layer, and two columns of the last one."""
    layout = ns.find_layout(model, patterns={"*3.weight": "o i -> i o"})
    return ns.select(layout, {"*0.weight": (1, 4), "*3.weight": (0, 5)})


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Which entries of each parameter `some` has."""
    chosen = some(model).masks()
    nothing = torch.zeros((), dtype=torch.bool)
    return {name: chosen.get(name, nothing).expand_as(p) for name, p in model.named_parameters()}


def steps(model: nn.Module, optimizer: Any, count: int, run: Callable[[Tensor], Tensor] | None = None) -> None:
    for step in range(count):
        optimizer.zero_grad()
        cross_entropy((run or model)(X.roll(step, 0)), Y).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def assert_only_moved(before: dict[str, Tensor], model: nn.Module, moved: dict[str, Tensor]) -> None:
    """All other entries have their bits, and no entry that may move has stayed."""
    for name, now in values(model).items():
        mask = moved[name]
        assert same_bits(now[~mask], before[name][~mask]), name
        assert (now[mask] != before[name][mask]).all(), name


# --- what keeps its bits --------------------------------------------------------------------------------------------


@every_optimizer
def test_every_other_entry_keeps_its_bits(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)  # momentum
    before = values(model)
    with ns.train_only(some(model), optimizer, model):
        steps(model, optimizer, 20)
    assert_only_moved(before, model, masks(model))
    steps(model, optimizer, 1)
    assert all(not torch.equal(now, before[name]) for name, now in values(model).items())


@every_optimizer
def test_the_other_way_round(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    before = values(model)
    with ns.train_only(some(model), optimizer, model, all_but=True):
        steps(model, optimizer, 20)
    assert_only_moved(before, model, {name: ~mask for name, mask in masks(model).items()})


def test_a_thousand_steps_of_a_compiled_model_with_accumulated_gradients() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps(model, optimizer, 10)
    before = values(model)
    compiled: Any = torch.compile(model, backend="eager")
    ns.train_only(some(model), optimizer, compiled)
    for step in range(2000):
        cross_entropy(compiled(X.roll(step, 0)[:8]), Y[:8]).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_only_moved(before, model, masks(model))


def test_what_is_trained_is_trained_as_if_there_were_nothing_else() -> None:
    """The reference: a model whose only parameters are these rows, by the same optimiser, which goes by entries."""
    model, rows = net(), torch.tensor([1, 4])
    alone = copy.deepcopy(model).requires_grad_(False)
    parameter = nn.Parameter(alone[0].weight[rows].clone())
    reference = OPTIMIZERS["adamw"]([parameter])

    def forward(x: Tensor) -> Tensor:
        weight = alone[0].weight.index_copy(0, rows, parameter)
        return alone[1:](nn.functional.linear(x, weight, alone[0].bias))  # type: ignore[no-any-return]

    steps(alone, reference, 50, forward)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with ns.train_only(ns.select(ns.find_layout(model), {"0.weight": (1, 4)}), optimizer, model):
        steps(model, optimizer, 50)
    torch.testing.assert_close(model[0].weight[rows], parameter, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_the_state_of_what_is_held_is_as_it_was(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with ns.train_only(some(model), optimizer, model):
        steps(model, optimizer, 5)
    after, compared = optimizer.state_dict()["state"], 0
    for number, (name, parameter) in enumerate(model.named_parameters()):
        held = ~masks(model)[name]
        for key, value in before[number].items():
            if isinstance(value, Tensor) and (value.shape == parameter.shape or held.all()):
                mask = held if value.shape == parameter.shape else torch.ones_like(value, dtype=torch.bool)
                assert torch.equal(value[mask], after[number][key][mask]), (name, key)
                compared += 1
    assert compared >= 6


def test_where_there_was_no_state_it_is_that_of_no_gradient() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with ns.train_only(some(model), optimizer, model):
        steps(model, optimizer, 3)
    assert {name for name, p in model.named_parameters() if p in optimizer.state} == {"0.weight", "3.weight"}
    for name in ("0.weight", "3.weight"):
        mask, state = masks(model)[name], optimizer.state[model.get_parameter(name)]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][~mask].any() and state[key][mask].any()


def test_gradients_are_as_they_were() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with ns.train_only(some(model), optimizer, model):
        cross_entropy(model(X), Y).backward()
        gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}  # type: ignore[union-attr]
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0] and torch.equal(parameter.grad, gradients[name][1])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5, line_search_fn="strong_wolfe"),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
    ids=["lbfgs", "sgd"],
)
def test_a_closure_within_the_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    before, optimizer = values(model), make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with ns.train_only(some(model), optimizer, model):
        first = optimizer.step(closure)
        last = optimizer.step(closure=closure)  # type: ignore[arg-type]
    assert last < first  # type: ignore[operator]
    assert_only_moved(before, model, masks(model))


def test_a_parameter_that_another_module_has_is_held_too() -> None:
    model, head = net(), nn.Linear(3, 3)
    optimizer = OPTIMIZERS["adamw"]([*model.parameters()])
    optimizer.add_param_group({"params": head.parameters(), "weight_decay": 0.5})
    before = values(head)
    held = ns.train_only(some(model), optimizer, model)
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.ones(3))]})
    steps(model, optimizer, 3, lambda x: head(model(x)) * extra)
    assert all(same_bits(now, before[name]) for name, now in values(head).items()) and bool((extra == 1).all())
    held.remove()
    held.remove()
    steps(model, optimizer, 1, lambda x: head(model(x)) * extra)
    assert not torch.equal(head.weight, before["weight"]) and bool((extra != 1).all())


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    before = values(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with ns.train_only(ns.select(ns.find_layout(model), {"1.weight": 2}), optimizer, model):
        steps(model, optimizer, 3)
    assert (model[0].weight != before["0.weight"]).any(1).tolist() == [False, False, True, False, False]


# --- what else a training loop does ---------------------------------------------------------------------------------


def test_accumulated_and_clipped_gradients_with_a_schedule() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    before = values(model)
    with ns.train_only(some(model), optimizer, model):
        for step in range(40):
            cross_entropy(model(X.roll(step, 0)), Y).backward()
            if step % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert_only_moved(before, model, masks(model))


def test_a_compiled_model_and_a_compiled_step() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["adamw"](compiled.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    before = values(model)
    with ns.train_only(some(model), optimizer, compiled):  # type: ignore[arg-type]
        for number in range(6):
            optimizer.zero_grad()
            cross_entropy(compiled(X.roll(number, 0)), Y).backward()
            step() if number % 2 else optimizer.step()
    assert_only_moved(before, model, masks(model))


def test_a_view_is_trained_by_its_own_rows() -> None:
    model = net()
    view = ns.apply(ns.scale(ns.select(ns.find_layout(model), {"0.weight": 2}), 0.5), model)
    optimizer = OPTIMIZERS["adamw"](view.parameters())
    before = values(model)
    with ns.train_only(some(view), optimizer, view):
        steps(view, optimizer, 5)
    assert_only_moved(before, model, masks(model))


def test_an_optimiser_that_accelerate_has_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    before = values(model)
    with ns.train_only(some(prepared), wrapped, prepared):
        steps(prepared, wrapped, 3)
    assert_only_moved(before, model, masks(model))


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_view_in_lightning_whose_optimiser_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps with a closure."""
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    model = net()
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 2})), model)
    before = values(model)

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = view

        def on_fit_start(self) -> None:
            ns.train_only(some(view), self.trainer.optimizers[0], view)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS["adamw"](self.parameters())

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=3, enable_model_summary=False, **options)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8))
    assert_only_moved(before, model, masks(model))


# --- what is touched ------------------------------------------------------------------------------------------------


def test_only_two_hooks_of_the_optimiser_are_touched() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps(model, optimizer, 2)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    own = {key: value for key, value in vars(optimizer).items() if "hooks" not in key}
    held = ns.train_only(some(model), optimizer, model)
    assert [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)] == [1, 1]
    held.remove()
    assert_unchanged(before, model)
    assert str(optimizer.state_dict()) == str(state)
    assert all(vars(optimizer)[key] is value for key, value in own.items())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


class Broken(torch.optim.SGD):
    """Moves everything; fails after it has done so for the first time."""

    failed = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1.0 if parameter.grad is not None else 0.0)
        if not self.failed:
            self.failed = True
            raise KeyboardInterrupt


def test_a_step_that_is_interrupted_is_made_good() -> None:
    model = net()
    optimizer = Broken(model.parameters(), lr=0.1)
    cross_entropy(model(X), Y).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = values(model)
    with (
        pytest.raises(KeyboardInterrupt),
        ns.train_only(ns.select(ns.find_layout(model), {"0.weight": 1}), optimizer, model),
    ):
        optimizer.step()
    moved = (model[0].weight != before["0.weight"]).any(1)
    assert moved.tolist() == [False, True, False, False, False, False]
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())


def test_a_step_that_is_interrupted_is_made_good_by_the_next_one() -> None:
    model = net()
    optimizer = Broken(model.parameters(), lr=0.1)
    before = values(model)
    ns.train_only(some(model), optimizer, model)
    cross_entropy(model(X), Y).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.step()
    assert_only_moved(before, model, masks(model))
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_alone_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))
    model[2].weight.requires_grad_(False)
    every = ns.select(ns.find_layout(model), {"*": 0})
    optimizer = torch.optim.SGD([*model[1].parameters(), *model[2].parameters()])
    with pytest.raises(ValueError, match=r"(?s)neurons of 3 parameters cannot be trained alone") as raised:
        ns.train_only(every, optimizer, model)
    assert [line.strip() for line in str(raised.value).splitlines()[1:4]] == [
        "0.weight: not among the optimiser's parameters",
        "1.weight: computed by a parametrization, from tensors that have no such rows",
        "2.weight: requires no gradient",
    ]
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="the neurons do not fit the model"):
        ns.train_only(some(net()), optimizer, model)
    with pytest.raises(TypeError, match="train_only takes a set of Neurons, not a list"):
        ns.train_only([1], optimizer, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_only takes an optimiser of torch, not a Sequential"):
        ns.train_only(every, model, optimizer)  # type: ignore[arg-type]


def test_an_optimiser_is_held_once() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    held = ns.train_only(some(model), optimizer, model)
    with pytest.raises(RuntimeError, match=r"held to some neurons already: remove\(\) that first"):
        ns.train_only(some(model), optimizer, model)
    held.remove()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.enter_context(ns.train_only(some(model), optimizer, model))
