"""A view made after DistributedDataParallel was built: two ranks train as one process does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from study.forking import Forked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from zoo import CASES

import neuronsurgery as ns

pytestmark = pytest.mark.xdist_group("forked")  # its fixtures are made once, by one process

RANKS, STEPS, ALONE = 2, 2, 1000
MODELS = ("mlp", "attention", "weight_norm")


def batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    inputs, targets, _ = CASES[name].batches(seed=step, sizes=(4 * RANKS,))[0]
    return inputs, targets


def edit_of(model: nn.Module) -> ns.Edit:
    neurons = ns.select(ns.find_layout(model), {"*": slice(0, None, 2)})
    return ns.compose(ns.zero_out(neurons), ns.random_noise(neurons, std=0.1, seed=0))


def train(model: nn.Module, twin: nn.Module, name: str, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Steps of SGD, the model and its twin in one backward; the state afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        inputs, targets = (tensor.chunk(ranks)[rank] for tensor in batch(name, step))
        optimizer.zero_grad()
        (cross_entropy(model(inputs), targets) + 0.5 * cross_entropy(twin(inputs), targets)).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for name in MODELS:
        wrapped = DistributedDataParallel(CASES[name].build())
        twin = ns.apply(edit_of(wrapped), wrapped)
        assert not any(isinstance(module, DistributedDataParallel) for module in twin.modules())
        state = train(wrapped, twin, name, rank, RANKS)
        torch.save(state, f"{folder}/{name}.{rank}.pt")
    torch.save(train_alone(DistributedDataParallel(CASES["mlp"].build()), rank), f"{folder}/alone.{rank}.pt")
    dist.destroy_process_group()


def train_alone(model: DistributedDataParallel, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after some of them are trained alone, each second gradient accumulated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train_steps(model, optimizer, 3, rank)
    before = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    with ns.train_only(alone(model), optimizer, model):
        train_steps(model, optimizer, ALONE, rank)
    return before, {name: value.detach().clone() for name, value in model.module.named_parameters()}


def alone(model: nn.Module) -> ns.Neurons:
    return ns.select(ns.find_layout(model), {"0.weight": (1, 2), "2.weight": 0})


def train_steps(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, steps: int, rank: int) -> None:
    inputs, targets = (tensor.chunk(RANKS)[rank] for tensor in batch("mlp", 0))
    for _ in range(steps):
        with model.no_sync():
            cross_entropy(model(inputs), targets).backward()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def fork_ranks(folder: str) -> None:
    mp.start_processes(work, (folder,), nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have left their weights."""
    folder = tmp_path_factory.mktemp("ranks")
    done = forked("test_ddp.fork_ranks", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_as_one_process_on_the_joined_batch(name: str, folder: Path) -> None:
    model = CASES[name].build()
    before = copy.deepcopy(model.state_dict())
    alone = train(model, ns.apply(edit_of(model), model), name)
    for rank in range(RANKS):
        state = torch.load(folder / f"{name}.{rank}.pt")
        assert list(state) == [f"module.{key}" for key in alone]
        for key, value in alone.items():
            torch.testing.assert_close(state[f"module.{key}"], value, rtol=1e-5, atol=1e-6)
    assert all((alone[key] - before[key]).abs().max() > 1e-3 for key in alone if "in_proj_bias" not in key)


@pytest.mark.parametrize("name", MODELS)
def test_the_twin_has_a_part_in_it(name: str, folder: Path) -> None:
    """Or the test above would pass for a twin that no gradient comes from."""
    model = CASES[name].build()
    without = train(model, copy.deepcopy(model), name)
    state = torch.load(folder / f"{name}.0.pt")
    assert max((state[f"module.{key}"] - value).abs().max() for key, value in without.items()) > 1e-2


def test_what_is_not_trained_alone_keeps_its_bits_on_every_rank(folder: Path) -> None:
    masks = alone(CASES["mlp"].build()).masks()
    found = [torch.load(folder / f"alone.{rank}.pt") for rank in range(RANKS)]
    for before, after in found:
        for name, value in before.items():
            moves = masks.get(name, torch.zeros((), dtype=torch.bool)).expand_as(value)
            assert torch.equal(value[~moves].view(torch.int32), after[name][~moves].view(torch.int32)), name
            assert (value[moves] != after[name][moves]).all(), name
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
