"""Two gloo ranks with a share of the data each give what one process gives, and fail together."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from study.forking import Forked
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import CASES

import neuronsurgery as ns

pytestmark = pytest.mark.xdist_group("forked")  # its fixtures are made once, by one process

RANKS = 2
WORLD: dict[str, Any] = {}  # "process_group", in the ranks

Outcome = Any


# --- what the ranks run; each gives its share, one process gives both -----------------------------------------------


def examples() -> tuple[Tensor, Tensor, Tensor]:
    """24 examples; rank 0 has the first 10, in which there is no group 2."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator)
    return x, y, torch.tensor([0, 1, 1, 0, 1] * 2 + [2, 0, 1, 2, 2, 0, 1] * 2)


def share(*ranks: int) -> list[Any]:
    """Uneven mixed batches."""
    parts = [[slice(0, 4), slice(4, 10)], [slice(10, 13), slice(13, 14), slice(14, 24)]]
    return [tuple(tensor[part] for tensor in examples()) for rank in ranks for part in parts[rank]]


def loaders(*ranks: int) -> dict[str, list[Any]]:
    """Rank 0 knows dark and blond, rank 1 blond and red."""
    names = [["dark", "blond"], ["blond", "red"]]
    shares: dict[str, list[Any]] = {}
    for rank in ranks:
        for name, (x, y, _) in zip(names[rank], share(rank), strict=False):
            shares.setdefault(name, []).append((x, y))
    return shares


def model() -> nn.Module:
    return CASES["mlp"].build()


def both(run: Callable[..., Any], data: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *ranks: run(model(), data(*ranks), **WORLD)


def first_only(data: Callable[..., Any], nothing: Any) -> Callable[..., Any]:
    """All of the data on rank 0, none on the other."""
    return lambda *ranks: data(0, 1) if 0 in ranks else nothing


def both_metrics(model: nn.Module, data: Any, **world: Any) -> dict[str, Any]:
    return ns.evaluate(model, data, metric={"loss": ns.cross_entropy, "accuracy": ns.accuracy}, **world)


def losses(model: nn.Module, data: Any, **world: Any) -> Any:
    return ns.evaluate(model, data, metric=ns.cross_entropy, **world)


def wrapped(*ranks: int) -> Any:
    distributed = dist.is_initialized()
    return ns.group_grad_norms(DistributedDataParallel(model()) if distributed else model(), share(*ranks), **WORLD)


PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def page_step(rank: int) -> tuple[ns.Scores, list[Tensor]]:
    """What the block of the page on several processes leaves: the scores, and the gradients of the model's weights."""
    after = PAGE.read_text().partition("## Several processes")[2]
    network, (x, y, _) = model(), share(rank)[0]
    names = {"ns": ns, "dist": dist, "cross_entropy": nn.functional.cross_entropy, "x": x, "y": y}
    names |= {"my_share": share(rank), "ddp_model": DistributedDataParallel(network), "twin": twin_of(network)}
    exec(after.split("```python\n")[1].split("```")[0], names)
    return names["scores"], [parameter.grad for parameter in network.parameters()]


def twin_of(network: nn.Module) -> nn.Module:
    return ns.apply(ns.zero_out(ns.topk(ns.magnitudes(network), 1)), network)


def sweeps(model: nn.Module, data: Any, **world: Any) -> dict[str, ns.Sweep]:
    layout = ns.find_layout(model)
    edits = {name: ns.zero_out(ns.select(layout, {name: ...})) for name in layout.names}
    return ns.sweep(model, edits, data, metric={"accuracy": ns.accuracy, "loss": ns.cross_entropy}, **world)


def hardest(model: nn.Module, data: Any, **world: Any) -> tuple[Tensor, Tensor, Any]:
    batch = ns.hard_batch(model, data, top=9, sample=5, per_group=True, **world)
    return batch.args[0].numpy(), batch.targets.numpy(), batch.groups  # type: ignore[return-value]  # arrays compare by bytes


def effects(model: nn.Module, data: Any, **world: Any) -> tuple[Any, ...]:
    found = [ns.group_effects(model, data, edit=kind, **world) for kind in ("zero", "mean")]  # type: ignore[arg-type]
    # The ranks' sums are added up in another order.
    return np.round(found[0].values.numpy(), 5), np.round(found[1].values.numpy(), 5), found[0].groups


def search(model: nn.Module, data: Any, **world: Any) -> tuple[Any, ...]:
    found = ns.find_critical(model, data, 1, k=2, pool=6, **world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small groups
        verdict = ns.judge(found.edit, model, data, 1, draws=4, **world)
    own = np.array([step.own for step in found.path])
    return own, np.array([verdict.net, *verdict.net_interval]), (found.neurons, found.cost, verdict.sentence)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(one[0], np.ndarray):
        return all(np.array_equal(a, b) for a, b in zip(one[:2], other[:2], strict=True)) and one[2] == other[2]
    return bool(one == other)


AGREE: dict[str, Callable[..., Any]] = {
    "scores of mixed batches": both(ns.group_grad_norms, share),
    "scores of a mapping": both(ns.group_grad_norms, loaders),
    "scores, a rank without a batch": both(ns.group_grad_norms, first_only(share, [])),
    "scores, a rank without a group": both(ns.group_grad_norms, first_only(loaders, {})),
    "scores of a wrapped model": wrapped,
    "metrics of mixed batches": both(losses, share),
    "metrics of a mapping": both(losses, loaders),
    "metrics, a rank without a batch": both(losses, first_only(share, [])),
    "metrics, a rank without a group": both(losses, first_only(loaders, {})),
    "several metrics": both(both_metrics, share),
    "sweeps": both(sweeps, share),
    "the hardest examples": both(hardest, share),
    "the hardest, a rank without a batch": both(hardest, first_only(share, [])),
    "effects": both(effects, share),
    "effects, a rank without a batch": both(effects, first_only(share, [])),
    "a search and a verdict": both(search, share),
    "a search, a rank without a batch": both(search, first_only(share, [])),
}


def broken(run: Callable[..., Any], data: Any, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> Any:
    """Rank 1 has other data or another model."""

    def fail(rank: int) -> Any:
        return run(change(model()), data, **WORLD) if rank == 1 else run(model(), share(0), **WORLD)

    return fail


def stream_that_breaks() -> Iterator[Any]:
    yield share(1)[0]
    raise OSError("the disk is gone")


def narrower(_: nn.Module) -> nn.Module:
    return nn.Linear(5, 3)


def poisoned(model: nn.Module) -> nn.Module:
    nn.init.constant_(model[0].weight, torch.nan)  # type: ignore[index,arg-type]
    return model


def nan_inputs() -> list[Any]:
    x, y, g = share(1)[0]
    return [(x * torch.nan, y, g)]


def doubles() -> list[Any]:
    x, y, g = share(1)[0]
    return [(x.double(), y, g)]


OTHER = "RuntimeError: another process failed, so none has a result:\nrank 1: "
SCORES, METRICS = ns.group_grad_norms, ns.evaluate
FAIL: dict[str, tuple[Callable[[int], Any], tuple[str, str]]] = {
    "a batch of an unknown form": (
        lambda rank: broken(SCORES, [3])(rank),
        (
            "RuntimeError: another process failed, so none has a result:\nrank 1: TypeError: a loader",
            "TypeError: a loa",
        ),
    ),
    "a loader that breaks": (
        lambda rank: broken(SCORES, stream_that_breaks())(rank),
        (OTHER + "OSError: the disk", "OSError: the disk"),
    ),
    "a loss that is no number": (
        lambda rank: broken(SCORES, nan_inputs())(rank),
        (
            "RuntimeError: another process failed, so none has a result:\nrank 1: ValueError: the loss",
            "ValueError: the ",
        ),
    ),
    "a weight that is no number": (
        lambda rank: broken(SCORES, share(1), poisoned)(rank),
        (
            "RuntimeError: another process failed, so none has a result:\nrank 1: ValueError: the model's weights",
            "Valu",
        ),
    ),
    "a model of other layers": (
        lambda rank: broken(SCORES, share(1), narrower)(rank),
        ("ValueError: the processes score different layers", "ValueError: the processes score different layers"),
    ),
    "no example anywhere": (
        lambda rank: SCORES(model(), [], **WORLD),
        ("ValueError: the loader yielded no batch", "ValueError: the loader yielded no batch"),
    ),
    "no group anywhere": (
        lambda rank: SCORES(model(), {}, **WORLD),
        ("ValueError: the mapping of loaders is empty", "ValueError: the mapping of loaders is empty"),
    ),
    "a group without examples": (
        lambda rank: SCORES(model(), {"dark": []}, **WORLD),
        ("ValueError: group 'dark' has no examples", "ValueError: group 'dark' has no examples"),
    ),
    "metrics of an unknown form": (
        lambda rank: broken(METRICS, [3])(rank),
        (
            "RuntimeError: another process failed, so none has a result:\nrank 1: TypeError: a loader",
            "TypeError: a loa",
        ),
    ),
    "the hardest of an unknown form": (
        lambda rank: broken(hardest, [3])(rank),
        (
            "RuntimeError: another process failed, so none has a result:\nrank 1: TypeError: a loader",
            "TypeError: a loa",
        ),
    ),
    "the hardest of two shapes": (
        lambda rank: broken(
            hardest, [(torch.randn(2, 5).double(), torch.tensor([0, 1]), torch.tensor([0, 1]))], nn.Module.double
        )(rank),
        ("ValueError: examples of different shapes", "ValueError: examples of different shapes"),
    ),
    "metrics of nothing": (
        lambda rank: METRICS(model(), {"dark": []}, **WORLD),
        ("ValueError: no examples of 'dark'", "ValueError: no examples of 'dark'"),
    ),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    if rank == 0:  # nobody else takes part
        alone: list[Outcome] = [ns.group_grad_norms(model(), share(0)), ns.evaluate(model(), share(0))]
    WORLD["process_group"] = dist.group.WORLD
    results: dict[str, Outcome] = {name: run(rank) for name, run in AGREE.items()}
    results["the page"] = page_step(rank)
    for name, (run, _) in FAIL.items():
        try:
            results[name] = run(rank)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    results["alone"] = alone if rank == 0 else []
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def fork_ranks(folder: str) -> None:
    mp.start_processes(work, (folder,), nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def results(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    done = forked("test_processes.fork_ranks", str(folder))
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", AGREE)
def test_the_ranks_agree_to_the_last_bit(name: str, results: list[dict[str, Outcome]]) -> None:
    assert equal(results[0][name], results[1][name])


@pytest.mark.parametrize("name", [name for name in AGREE if "scores" in name])
def test_scores_are_those_of_one_process(name: str, results: list[dict[str, Outcome]]) -> None:
    found, right = results[0][name], AGREE[name](0, 1)
    assert (found.groups, found.counts, found.layout) == (right.groups, right.counts, right.layout)
    torch.testing.assert_close(found.values, right.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in AGREE if "metrics of" in name or "metrics," in name])
def test_metrics_are_those_of_one_process(name: str, results: list[dict[str, Outcome]]) -> None:
    found, right = results[0][name], AGREE[name](0, 1)
    assert (found.groups, found.counts) == (right.groups, right.counts)
    assert found.values == pytest.approx(right.values, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in AGREE if "effects" in name or "search" in name])
def test_effects_and_searches_are_those_of_one_process(name: str, results: list[dict[str, Outcome]]) -> None:
    found, right = results[0][name], AGREE[name](0, 1)
    assert found[2] == right[2]
    for one, other in zip(found[:2], right[:2], strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_several_metrics_are_those_of_one_process(results: list[dict[str, Outcome]]) -> None:
    found, right = results[0]["several metrics"], AGREE["several metrics"](0, 1)
    assert found["accuracy"] == right["accuracy"]
    assert found["loss"].values == pytest.approx(right["loss"].values, rel=1e-6)


def test_a_sweep_is_that_of_one_process_and_knows_the_rank_and_place_of_every_example(
    results: list[dict[str, Outcome]],
) -> None:
    found, right = results[0]["sweeps"], AGREE["sweeps"](0, 1)
    for name in ("accuracy", "loss"):
        assert found[name].members == right[name].members and found[name].labels == right[name].labels
        assert found[name].ranks.tolist() == [0] * 10 + [1] * 14
        assert found[name].indices.tolist() == [*range(10), *range(14)]
        for label in found[name]:
            torch.testing.assert_close(found[name].values(label), right[name].values(label))
            assert found[name].p_value(label).keys() == right[name].p_value(label).keys()


@pytest.mark.parametrize("name", [name for name in AGREE if "hardest" in name])
def test_the_hardest_examples_are_those_of_one_process(name: str, results: list[dict[str, Outcome]]) -> None:
    assert equal(results[1][name], AGREE[name](0, 1))


def test_groups_are_of_all_ranks(results: list[dict[str, Outcome]]) -> None:
    assert results[0]["scores of mixed batches"].groups == (0, 1, 2)
    assert results[1]["scores of a mapping"].groups == ("dark", "blond", "red")
    assert results[1]["metrics, a rank without a batch"].counts == (8, 10, 6)


def test_without_a_process_group_a_rank_is_alone(results: list[dict[str, Outcome]]) -> None:
    scores, metrics = results[0]["alone"]
    assert scores.counts == metrics.counts == (4, 6)
    torch.testing.assert_close(scores.values, ns.group_grad_norms(model(), share(0)).values, rtol=1e-5, atol=1e-6)


def test_the_step_of_the_page_averages_the_gradients_of_model_and_twin(results: list[dict[str, Outcome]]) -> None:
    network = model()
    for rank in range(RANKS):
        x, y, _ = share(rank)[0]
        for of in (network, twin_of(network)):
            (nn.functional.cross_entropy(of(x), y) / RANKS).backward()
    right = [parameter.grad for parameter in network.parameters()]
    for scores, gradients in (result["the page"] for result in results):
        assert scores.counts == AGREE["scores of mixed batches"](0, 1).counts
        torch.testing.assert_close(gradients, right)


@pytest.mark.parametrize("name", FAIL)
def test_an_error_is_raised_on_every_rank(name: str, results: list[dict[str, Outcome]]) -> None:
    for rank, text in enumerate(FAIL[name][1]):
        assert str(results[rank][name]).startswith(text), results[rank][name]
