"""Models sharded over two gloo ranks, fully or by tensor parallelism, give what one process gives."""

from __future__ import annotations

import copy
import doctest
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from study.forking import Forked
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import neuronsurgery as ns

pytestmark = pytest.mark.xdist_group("forked")  # its fixtures are made once, by one process

RANKS, STEPS = 2, 2

Data = list[tuple[Any, Tensor, Tensor]]


# --- models and data ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    blocks: Callable[[Any], list[nn.Module]]
    inputs: Callable[[], tuple[Any, Tensor]]  # of twelve examples
    loss: Any
    columnwise: tuple[str, ...]  # of a block
    rowwise: tuple[str, ...]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, tie_word_embeddings=True)).eval()  # type: ignore[no-any-return]


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight, std=0.1)  # else nothing comes back from there
    return model  # type: ignore[no-any-return]


def tokens() -> tuple[Any, Tensor]:
    ids = torch.randint(41, (12, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}, ids


def images() -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(3, (12,), generator=generator)


CASES = {
    "llama": Case(
        llama,
        lambda model: list(model.model.layers),
        tokens,
        ns.causal_lm_loss,
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.o_proj", "mlp.down_proj"),
    ),
    "vit": Case(vit, lambda model: list(model.encoder.layers), images, ns.cross_entropy, ("mlp.0",), ("mlp.3",)),
}

MESHES = [(2, 1), (1, 2)]
"""Two replicas, and one."""

PARTS = [[slice(0, 5)], [slice(5, 6), slice(6, 12)]]
"""The batches of each rank: one and two."""

GROUPS = torch.tensor([0, 1, 1, 0, 1, 2, 0, 1, 2, 2, 0, 1])
"""Rank 0 has no group 2."""


def taken(inputs: Any, part: slice) -> Any:
    return {key: value[part] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[part]


def share(case: Case, *ranks: int) -> Data:
    inputs, targets = case.inputs()
    return [(taken(inputs, part), targets[part], GROUPS[part]) for rank in ranks for part in PARTS[rank]]


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[no-any-return]


def fully(model: nn.Module, case: Case) -> nn.Module:
    for block in case.blocks(model):
        fully_shard(block)
    return fully_shard(model)  # type: ignore[no-any-return]


def tensor_parallel(model: nn.Module, case: Case) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in case.blocks(model):
        plan = {name: ColwiseParallel() for name in case.columnwise}
        parallelize_module(block, mesh, {**plan, **{name: RowwiseParallel() for name in case.rowwise}})
    return model


# --- what is done with a model, sharded or not ------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def half(case: Case, step: int, rank: int | None) -> tuple[Any, Tensor]:
    """A batch of six; of it the half of a rank."""
    inputs, targets = case.inputs()
    start, size = 6 * step, 6 if rank is None else 3
    part = slice(start + size * (rank or 0), start + size * ((rank or 0) + 1))
    return taken(inputs, part), targets[part]


def trained(view: nn.Module, case: Case, rank: int | None) -> None:
    """Steps of SGD on a view; ranks of a fully sharded model have a half of each batch."""
    optimizer = torch.optim.SGD(view.parameters(), lr=0.5, momentum=0.9, foreach=False)
    for step in range(STEPS):
        inputs, targets = half(case, step, rank)
        optimizer.zero_grad()
        case.loss(logits_of(view, inputs), targets).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def edit_of(model: nn.Module) -> ns.Edit:
    layout = ns.find_layout(model)
    first, last = layout.names[1], layout.names[-2]
    noise = ns.random_noise(ns.select(layout, {first: 1}), std=0.3, seed=0)
    return ns.compose(*(ns.zero_out(ns.select(layout, {name: slice(0, None, 2)})) for name in (first, last)), noise)


def done(model: nn.Module, case: Case, data: Data, rank: int | None, **world: Any) -> dict[str, Any]:
    layout = ns.find_layout(model)
    every = {name: ns.zero_out(ns.select(layout, {name: slice(0, None, 2)})) for name in layout.names}
    edits = dict(list(every.items())[:2])
    edit = edit_of(model)
    inputs, _ = case.inputs()
    found: dict[str, Any] = {"digest": layout.digest, "names": list(model.state_dict())}
    with torch.no_grad():
        found["logits"] = logits_of(model, inputs)
    found["magnitudes"] = ns.magnitudes(model).values
    metrics = {"loss": case.loss}
    found["metrics"] = ns.evaluate(model, data, metric=metrics, **world)["loss"]
    scores = ns.group_grad_norms(model, data, loss=case.loss, **world)
    found["scores"], found["top"] = scores, ns.topk(scores, 5)
    by_group = {"first": data[:2] if len(data) == 3 else data[:1], "all": data}  # of each rank the first batch
    found["scores of a mapping"] = ns.group_grad_norms(model, by_group, loss=case.loss, **world).values
    if isinstance(inputs, Tensor):
        whole_batches = ns.group_grad_norms(model, data, loss=case.loss, regroup=False, **world)
        found["scores of whole batches"] = whole_batches.values
    found["effects"] = ns.group_effects(model, data, metric=case.loss, **world)
    swept = ns.sweep(model, edits, data, metric=case.loss, **world)
    found["sweep"] = {label: swept.values(label) for label in swept}
    found["hardest"] = ns.hard_batch(model, data, top=6, sample=3, loss=case.loss, **world).targets
    view = ns.apply(edit, model)
    with torch.no_grad():
        found["edited logits"] = logits_of(view, inputs)
        found["logits afterwards"] = logits_of(model, inputs)
    found["magnitudes of the view"] = ns.magnitudes(view).values
    found["metrics of the view"] = ns.evaluate(view, data, metric=metrics, **world)["loss"]
    found["scores of the view"] = ns.group_grad_norms(view, {"all": data}, loss=case.loss, **world).values
    edited = ns.edited_parameters(edit, model)
    found["saved"] = {name: whole(tensor) for name, tensor in {**model.state_dict(), **edited}.items()}
    case.loss(*_logits_and_targets(model, case, rank)).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["norms of gradients"] = ns.grad_norms(gradients, layout).values
    model.zero_grad()
    view.train()
    trained(view, case, rank)
    found["trained"] = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return found


def _logits_and_targets(model: nn.Module, case: Case, rank: int | None) -> tuple[Tensor, Tensor]:
    inputs, targets = half(case, 0, rank)
    return logits_of(model, inputs), targets


# --- what only a fully sharded model has to show ----------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    """What must not change: classes, hooks, the parameters themselves, flags."""
    return [
        (type(module), module.training, *(list(value) for key, value in vars(module).items() if "hooks" in key))
        for module in model.modules()
    ] + [id(parameter) for parameter in model.parameters()]


def said_of(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error in words."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def breaking(data: Data) -> Iterator[Any]:
    yield data[0]
    raise OSError("the disk is gone")


def failures(rank: int, case: Case) -> dict[str, Any]:
    """One rank fails, in the middle of its data or before any; then everything is as it was, and works."""
    world = {"process_group": dist.group.WORLD}
    model, data = fully(case.build(), case), share(case, rank)
    before, said = state(model), dict[str, Any]()
    calls: dict[str, Callable[[], Any]] = {
        "scores": lambda: ns.group_grad_norms(model, breaking(data) if rank else data, loss=case.loss, **world),  # type: ignore[arg-type]
        "metrics": lambda: ns.evaluate(model, breaking(data) if rank else data, metric=case.loss, **world),  # type: ignore[arg-type]
        "other layers": lambda: ns.group_grad_norms(model, data, loss=case.loss, where="*" if rank else "no", **world),  # type: ignore[arg-type]
        "nobody else's": lambda: ns.group_grad_norms(model, data, loss=case.loss),
        "alone": lambda: ns.evaluate(model, [] if rank else data, metric=case.loss),
        "a bake": lambda: ns.bake(ns.zero_out(ns.select(ns.find_layout(model), {"*": 0})), model),
        "units": lambda: ns.find_units(model, data[0], "unit"),
        "means": lambda: ns.group_effects(model, data, metric=case.loss, edit="mean", **world),  # type: ignore[arg-type]
    }
    said |= {name: said_of(call) for name, call in calls.items()}
    said["unchanged"] = before == state(model) and all(isinstance(p, DTensor) for p in model.parameters())
    said["metrics afterwards"] = ns.evaluate(model, data, metric=case.loss, **world)  # type: ignore[arg-type]
    return said


def search(model: nn.Module, data: Data, **world: Any) -> tuple[Any, ...]:
    found = ns.find_critical(model, data, 1, edits="zero", k=1, pool=3, metric=ns.margin, cap=1.0, **world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small groups
        verdict = ns.judge(found.edit, model, data, 1, draws=3, **world)
    return found.neurons, verdict.sentence


def heads_of(model: Any) -> ns.Layout:
    return ns.find_layout(model, where="*.o_proj.weight", patterns={"*": ("e (head d) -> head e d", {"d": 4})})


def of_heads(model: Any, data: Data, **world: Any) -> dict[str, Tensor]:
    """Of a slice that lies across the parts, in a model that runs again in the backward pass."""
    model.gradient_checkpointing_enable()
    heads, loss = heads_of(model), ns.causal_lm_loss
    by_group = {"all": data}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if world else "ignore")  # in one process all activations are kept, and it says so
        effects = ns.group_effects(model, by_group, layout=heads, metric=loss, transform=torch.sigmoid, **world)
    return {
        "scores": ns.group_grad_norms(model, by_group, layout=heads, loss=loss, **world).values,
        "effects": effects.values,
    }


def copies(rank: int, case: Case) -> dict[str, bool]:
    """What views of views, deep copies and a backward pass of the model's own make of the same weights."""
    model, (inputs, targets) = fully(case.build(), case), half(case, 0, rank)
    layout = ns.find_layout(model)
    first, second = (ns.zero_out(ns.select(layout, {"*": own})) for own in (0, 1))
    view = ns.apply(second, ns.apply(first, model))
    copied = copy.deepcopy(view)
    pending = case.loss(logits_of(model, inputs), targets).mean()
    ns.evaluate(model, share(case, rank), metric=case.loss)  # which puts the sharded parameters in their places
    pending.backward()
    gradient = whole(next(model.parameters()).grad)  # type: ignore[arg-type]  # there is one
    model.zero_grad()
    case.loss(logits_of(model, inputs), targets).mean().backward()
    said = {"pending": torch.equal(gradient, whole(next(model.parameters()).grad))}  # type: ignore[arg-type]
    with torch.no_grad():
        before = logits_of(view, inputs)
        said["view of a view"] = torch.equal(before, logits_of(ns.apply(ns.compose(first, second), model), inputs))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        said["deep copy"] = torch.equal(before, logits_of(copied, inputs))
        said["view"] = not torch.equal(before, logits_of(view, inputs))
    full = get_model_state_dict(view, options=StateDictOptions(full_state_dict=True))
    said["full state dict"] = list(full) == list(model.state_dict()) and not isinstance(full["class_token"], DTensor)
    return said


def mixed(rank: int, case: Case) -> dict[str, Tensor]:
    """A view computes in the dtypes that FSDP does."""
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    model = case.build()
    for block in case.blocks(model):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**dtypes))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**dtypes, output_dtype=torch.float32))
    view = ns.apply(ns.compose(), model)
    found = {}
    for name, one in {"model": model, "view": view}.items():
        logits, targets = _logits_and_targets(one, case, rank)
        case.loss(logits, targets).mean().backward()
        found[name] = logits.detach()
        found |= {f"{name} {at}": whole(own.grad) for at, own in enumerate(one.parameters()) if own.grad is not None}
        one.zero_grad()
    return found


def replicated(shape: tuple[int, int], rank: int, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and a trained view of a model that is sharded, and has replicas."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "parts"))
    model = case.build()
    for block in (*case.blocks(model), model):
        fully_shard(block, mesh=mesh)
    scores = ns.group_grad_norms(model, share(case, rank), loss=case.loss, process_group=dist.group.WORLD)
    trained(ns.apply(edit_of(model), model).train(), case, rank)
    return scores.values, {name: whole(tensor) for name, tensor in model.state_dict().items()}


def memory(rank: int) -> tuple[int, int, int]:
    """The largest number of whole weights' entries that were alive at once, of the largest layer, and of all."""
    import neuronsurgery.gathering as gathering

    case = Case(
        lambda: nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8))),
        list,  # type: ignore[arg-type]
        lambda: (torch.randn(4, 32), torch.zeros(4).long()),
        ns.cross_entropy,
        (),
        (),
    )
    model = fully(case.build(), case)
    largest, real = 0, gathering._remember

    def remember(value: Tensor, again: Any) -> None:
        nonlocal largest
        real(value, again)
        alive = [held for reference, _ in gathering._ALIVE.values() if (held := reference()) is not None]
        largest = max(largest, sum(held.numel() for held in alive))

    gathering._remember = remember
    try:
        ns.group_grad_norms(model, [case.inputs()], process_group=dist.group.WORLD)
        view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"*": 0})), model)
        view(case.inputs()[0]).sum().backward()
    finally:
        gathering._remember = real
    return largest, 32 * 32, sum(parameter.numel() for parameter in model.parameters())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "no part of the model's forward is shared")
    init = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    world = {"process_group": dist.group.WORLD}
    for name, case in CASES.items():
        model = fully(case.build(), case)
        logits_of(model, case.inputs()[0])  # from now on FSDP has its hooks
        model.reshard()
        before = state(model)
        results[f"fully {name}"] = done(model, case, share(case, rank), rank, **world)
        results[f"fully {name} unchanged"] = before == state(model)
        parallel = tensor_parallel(case.build(), case)
        results[f"parallel {name}"] = done(parallel, case, share(case, 0, 1), None)
        results[f"parallel {name} over both"] = said_of(lambda: ns.evaluate(parallel, share(case, rank), **world))  # noqa: B023
    results["failures"] = failures(rank, CASES["vit"])
    results["search"] = search(fully(vit(), CASES["vit"]), share(CASES["vit"], rank), **world)
    results["heads"] = of_heads(fully(llama(), CASES["llama"]), share(CASES["llama"], rank)[:1], **world)
    results["copies"] = copies(rank, CASES["vit"])
    results |= {f"replicas {shape}": replicated(shape, rank, CASES["vit"]) for shape in MESHES}
    results["mixed"] = mixed(rank, CASES["vit"])
    results["memory"] = memory(rank)
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def fork_ranks(folder: str) -> None:
    mp.start_processes(work, (folder,), nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]


# --- models of one process on several devices -------------------------------------------------------------------------


def test_a_model_with_a_device_map_is_one_like_any_other() -> None:
    from accelerate import dispatch_model

    case = CASES["vit"]
    data, mapped = share(case, 0, 1), dispatch_model(vit(), {"": "cpu"}, force_hooks=True)
    assert hasattr(mapped, "_hf_hook")
    found, right = (ns.group_grad_norms(model, data) for model in (mapped, vit()))
    assert torch.equal(found.values, right.values)
    cut = ns.zero_out(ns.topk(right, 3))
    assert torch.equal(ns.apply(cut, mapped)(data[0][0]), ns.apply(cut, vit())(data[0][0]))
    swept = [ns.sweep(model, {"cut": cut}, data, metric=ns.margin).values("cut") for model in (mapped, vit())]
    assert torch.equal(*swept)


def test_an_offloaded_model_is_refused() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), execution_device=torch.device("cpu"))
    text = r"offloaded by accelerate, here only while its module runs; give every module a device .*with fully_shard"
    for refused in (lambda: ns.magnitudes(model), lambda: ns.evaluate(model, [(torch.ones(2, 3), torch.zeros(2))])):
        with pytest.raises(ValueError, match=rf"cannot be read or edited:\n  0\.weight: {text}"):
            refused()


PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def run_page() -> int:
    test = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 20
    return doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed


def test_the_examples_of_the_page_run(forked: Forked) -> None:
    ran = forked("test_sharded.run_page")  # it has a process group of its own
    assert ran.returncode == 0, ran.stdout + ran.stderr


# --- the tests of several processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    ran = forked("test_sharded.fork_ranks", str(folder))
    assert ran.returncode == 0, ran.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process got."""
    return {name: done(case.build(), case, share(case, 0, 1), None) for name, case in CASES.items()}


both_ways = pytest.mark.parametrize("way", ["fully", "parallel"])
each_case = pytest.mark.parametrize("name", CASES)
EXACT = {"fully": {"rtol": 0.0, "atol": 0.0}, "parallel": {"rtol": 1e-5, "atol": 1e-6}}
"""A forward of gathered weights has the bits of one process; one of parts adds up in another order."""


@both_ways
@each_case
def test_layers_scores_and_chosen_sets(way: str, name: str, results: list[dict[str, Any]], alone: Any) -> None:
    right = alone[name]
    for rank in range(RANKS):
        found = results[rank][f"{way} {name}"]
        assert found["digest"] == right["digest"]
        assert (found["scores"].groups, found["scores"].counts) == (right["scores"].groups, right["scores"].counts)
        torch.testing.assert_close(found["scores"].values, right["scores"].values, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(found["effects"].values, right["effects"].values, rtol=1e-4, atol=1e-6)
        assert found["top"] == right["top"]
        for key in (key for key in right if key.startswith(("scores of", "norms of"))):
            torch.testing.assert_close(found[key], right[key], rtol=1e-5, atol=1e-6)
        for key in ("magnitudes", "magnitudes of the view"):
            assert torch.equal(found[key], right[key])


@both_ways
@each_case
def test_forwards_edits_and_metrics(way: str, name: str, results: list[dict[str, Any]], alone: Any) -> None:
    right = alone[name]
    assert (right["edited logits"] - right["logits"]).abs().max() > 1e-3
    for rank in range(RANKS):
        found = results[rank][f"{way} {name}"]
        for key in ("logits", "edited logits"):
            torch.testing.assert_close(found[key], right[key], **EXACT[way])
        assert torch.equal(found["logits"], found["logits afterwards"])
        for key in ("metrics", "metrics of the view"):
            assert found[key].counts == right[key].counts
            assert found[key].values == pytest.approx(right[key].values, rel=1e-6)
        for label, values in right["sweep"].items():
            torch.testing.assert_close(found["sweep"][label], values, **EXACT[way])
        assert torch.equal(found["hardest"], right["hardest"])


@both_ways
@each_case
def test_a_view_trains_and_saves(way: str, name: str, results: list[dict[str, Any]], alone: Any) -> None:
    right = alone[name]
    for rank in range(RANKS):
        found = results[rank][f"{way} {name}"]
        assert found["names"] == right["names"] and list(found["saved"]) == right["names"]
        for key, value in right["saved"].items():
            assert torch.equal(found["saved"][key], value)
        for key, value in right["trained"].items():
            torch.testing.assert_close(found["trained"][key], value, rtol=1e-4, atol=2e-6)
    before = CASES[name].build().state_dict()
    assert max(float((right["trained"][key] - value).abs().max()) for key, value in before.items()) > 1e-2


@each_case
def test_nothing_of_a_fully_sharded_model_changes(name: str, results: list[dict[str, Any]]) -> None:
    assert all(result[f"fully {name} unchanged"] for result in results)


@each_case
def test_ranks_of_one_tensor_parallel_model_give_the_same_data(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        said = result[f"parallel {name} over both"]
        assert said.startswith("ValueError: the ranks [0, 1] of process_group= compute with parts of one model")


OTHER = "RuntimeError: another process failed, so none has a result:\nrank 1: OSError: the disk is gone"
SAID: Mapping[str, tuple[str, str]] = {
    "scores": (OTHER, "OSError: the disk is gone"),
    "metrics": (OTHER, "OSError: the disk is gone"),
    "other layers": ("KeyError: \"no layer matches 'no'", "RuntimeError: another process failed"),
    "nobody else's": ("ValueError: the model is sharded over 2 processes, and they were given different data",) * 2,
    "alone": ("GroupMetrics of 2 groups", "ValueError: no examples of any group"),
    "a bake": ("ValueError: a fully sharded model has no plain copy: use a view",) * 2,
    "units": ("ValueError: 20 of the model's tensors are sharded over processes: class_token, ",) * 2,
    "means": ("ValueError: 20 of the model's tensors are sharded over processes: class_token, ",) * 2,
}


@pytest.mark.parametrize("name", SAID)
def test_one_rank_fails_and_all_hear_of_it(name: str, results: list[dict[str, Any]]) -> None:
    for rank, text in enumerate(SAID[name]):
        assert str(results[rank]["failures"][name]).startswith(text), results[rank]["failures"][name]


def test_after_failures_the_model_is_as_it_was(results: list[dict[str, Any]], alone: Any) -> None:
    for result in results:
        assert result["failures"]["unchanged"]
        assert result["failures"]["metrics afterwards"].values == pytest.approx(alone["vit"]["metrics"].values)


def test_a_search_and_a_verdict(results: list[dict[str, Any]]) -> None:
    right = search(vit(), share(CASES["vit"], 0, 1))
    assert results[0]["search"] == results[1]["search"] == right


def test_heads_of_a_checkpointed_model(results: list[dict[str, Any]]) -> None:
    case = CASES["llama"]
    batches = [share(case, rank)[0] for rank in range(RANKS)]
    right = of_heads(llama(), batches)
    for result in results:
        for key, value in right.items():
            torch.testing.assert_close(result["heads"][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["pending", "view of a view", "deep copy", "view", "full state dict"])
def test_copies_of_a_fully_sharded_model(name: str, results: list[dict[str, Any]]) -> None:
    assert all(result["copies"][name] for result in results)


@pytest.mark.parametrize("shape", MESHES)
def test_replicas_of_a_fully_sharded_model(shape: tuple[int, int], results: list[dict[str, Any]], alone: Any) -> None:
    right = alone["vit"]
    for result in results:
        scores, state = result[f"replicas {shape}"]
        torch.testing.assert_close(scores, right["scores"].values, rtol=0.0, atol=1e-6)
        for key, value in right["trained"].items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=2e-6)


def test_a_view_computes_in_the_dtypes_of_fsdp(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result["mixed"]
        pairs = [(value, found[key.replace("model", "view")]) for key, value in found.items() if "model" in key]
        assert len(pairs) > 10
        for of_model, of_view in pairs:
            assert of_model.dtype == of_view.dtype == torch.float32
            torch.testing.assert_close(of_view, of_model, rtol=1e-6, atol=1e-7)


def test_no_more_than_one_layer_is_gathered_at_a_time(results: list[dict[str, Any]]) -> None:
    for result in results:
        largest, layer, every = result["memory"]
        assert layer <= largest <= 2 * layer < every  # an edited weight beside the one that it is computed from
