"""The captured forward: whatever the model and the batch, the bits of a plain forward of the edited model."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES, Case, every_case, marked

from neuronsurgery.batches import Batch, unpack_batch
from neuronsurgery.copies import Runner, eval_copy
from neuronsurgery.forward import default_predict
from neuronsurgery.graph.export import capture
from neuronsurgery.graph.inputs import Inputs, varying
from neuronsurgery.graph.replay import Graph
from neuronsurgery.graph.schedules import run
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.precision import same_bits
from neuronsurgery.surveys import survey

Edits = dict[str, dict[str, Tensor]]


def running(model: nn.Module) -> Runner:
    """A model that is fit to run as it is, to be run itself and not a copy of it."""
    surveyed = survey(model)
    parameters = {name: tensor.parameter for name, tensor in surveyed.tensors.items()}
    places = {name: tuple(use.path for use in tensor.uses) for name, tensor in surveyed.tensors.items()}
    return Runner(model, parameters, places, surveyed.device)  # type: ignore[arg-type]


def tainted(graph: Graph, names: list[str]) -> tuple[fx.Node, ...]:
    return tuple(graph.nodes[slot] for slot in graph.tainted(names))


def reference(model: nn.Module, edited: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The slow way: a copy of the model, the edited values written into it, its own forward."""
    edited_model = copy.deepcopy(model)
    parameters = dict(edited_model.named_parameters())
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            for name, value in edited.items():
                parameters[name].copy_(value)
            return default_predict(edited_model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def edits_of(model: nn.Module, most: int = 12) -> Edits:
    """The unedited model; a zeroed row of some parameters; three parameters at once; all of them."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    step = -(-len(parameters) // most)
    edits: Edits = {"base": {}}
    for name in list(parameters)[::step]:
        value = parameters[name].clone()
        value[:1] = 0
        edits[f"zero {name}"] = {name: value}
    names = list(parameters)
    some = {names[0], names[len(names) // 2], names[-1]}
    edits["three"] = {name: parameters[name] * 0.9 for name in some}
    edits["all"] = {name: value * 1.1 for name, value in parameters.items()}
    return edits


def assert_exact(forward: CheckedForward, model: nn.Module, edits: Edits, *args: Any, **kwargs: Any) -> None:
    got = dict(forward.run(args, kwargs, edits))
    assert set(got) == set(edits)
    wrong = [label for label in edits if not same_bits(got[label], reference(model, edits[label], *args, **kwargs))]
    assert not wrong, f"other bits than the model's own for {wrong}"


def assert_all_exact(forward: CheckedForward, model: nn.Module, edits: Edits, inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        assert_exact(forward, model, edits, x)


def batches_of(case: Case) -> list[Batch]:
    return [unpack_batch(batch) for batch in case.batches(sizes=(4, 3, 1, 4))]


# The zoo


@every_case
def test_replay_has_the_bits_of_the_edited_model(case: Case) -> None:
    model = eval_copy(case.build())
    forward = CheckedForward(running(model))
    for batch in batches_of(case):
        assert_exact(forward, model, edits_of(model), *batch.args, **batch.kwargs)
    assert not forward.fallbacks


@pytest.mark.parametrize("name", marked(["residual", "lstm", "tied", "encoder", "bert", "weight_norm"]))
def test_batch_of_one_first(name: str) -> None:
    case = CASES[name]
    model = eval_copy(case.build())
    forward = CheckedForward(running(model))
    for batch in map(unpack_batch, case.batches(sizes=(1, 4, 1))):
        assert_exact(forward, model, edits_of(model, 4), *batch.args, **batch.kwargs)
    assert not forward.fallbacks


@pytest.mark.parametrize("name", marked(["residual", "lstm", "tied", "encoder", "bert", "norm_dropout"]))
def test_nothing_changes(name: str) -> None:
    case = CASES[name]
    model = case.build()
    batches = batches_of(case)
    edits = edits_of(eval_copy(model), 3)
    before = snapshot(model, batches, edits)
    forward = CheckedForward(running(eval_copy(model)))
    for batch in batches:
        for _ in forward.run(batch.args, batch.kwargs, edits):
            pass
    assert_unchanged(before, model, batches, edits)


def test_what_was_checked_runs_no_more() -> None:
    passes: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(len(x))
            return super().forward(x)

    model = eval_copy(Counting(4, 3))
    forward, edits = CheckedForward(running(model)), {"base": {}, "cut": {"weight": torch.zeros(3, 4)}}
    list(forward.run((torch.randn(5, 4),), {}, edits))
    before = len(passes)
    list(forward.run((torch.randn(5, 4),), {}, edits))
    assert len(passes) == before


def test_every_use_of_a_tied_weight_is_edited() -> None:
    model = eval_copy(CASES["tied"].build())
    graph = capture(running(model), (torch.zeros(2, 6, dtype=torch.long),))
    targets = [str(node.target) for node in tainted(graph, ["embed.weight"])]
    assert targets == ["aten.embedding.default", "aten.linear.default", "aten.tanh.default", "aten.linear.default"]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *(("bert", mask) for mask in ("padded", "full", "mixed", "none")),
        ("gpt2", "padded"),
        *(pytest.param("gpt2", mask, marks=pytest.mark.architectures) for mask in ("full", "mixed", "none")),
    ],
)
def test_masks(name: str, mask: str) -> None:
    model = eval_copy(CASES[name].build())
    forward = CheckedForward(running(model))
    for i in range(3):
        ids = torch.randint(3, 30, (4, 8))
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if mask == "padded" or (mask == "mixed" and i != 1):
            kwargs["attention_mask"][1, 5:] = 0
        if mask == "none":
            del kwargs["attention_mask"]
        assert_exact(forward, model, edits_of(model, 6), **kwargs)
    assert not forward.fallbacks


def test_lengths_that_vary_are_captured_once_more_only() -> None:
    model = eval_copy(CASES["bert"].build())
    forward = CheckedForward(running(model))
    for length in (8, 5, 7, 11, 6):
        ids = torch.randint(3, 30, (3, length))
        assert_exact(forward, model, edits_of(model, 3), input_ids=ids, attention_mask=torch.ones_like(ids))
    assert not forward.fallbacks
    assert len({id(graph) for graph in forward._checked.values()}) <= 2


# Precision and memory formats


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64", "channels_last"])
@pytest.mark.parametrize("name", marked(["residual", "mobilenet"]))
def test_precision_and_memory_format(name: str, how: str) -> None:
    model = eval_copy(CASES[name].build())
    size = 8 if name == "residual" else 32
    inputs = [torch.randn(n, 3, size, size) for n in (4, 3, 1)]
    if how in ("bfloat16", "float64"):
        model = model.to(getattr(torch, how))
        inputs = [x.to(getattr(torch, how)) for x in inputs]
    if how == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    forward = CheckedForward(running(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for x in inputs:
            assert_exact(forward, model, edits_of(model, 6), x)
    assert not forward.fallbacks


def test_autocast_that_comes_later_is_another_kind() -> None:
    model = eval_copy(CASES["mlp"].build())
    forward, edits, x = CheckedForward(running(model)), edits_of(model), torch.randn(4, 5)
    assert_exact(forward, model, edits, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(forward, model, edits, x)
    assert len(forward._checked) == 2


def test_inference_mode_of_the_caller() -> None:
    model = eval_copy(CASES["residual"].build())
    forward = CheckedForward(running(model))
    with torch.inference_mode():
        assert_exact(forward, model, edits_of(model, 3), torch.randn(4, 3, 8, 8))


def test_caller_keeps_gradients_between_results() -> None:
    model = eval_copy(CASES["mlp"].build())
    for _ in CheckedForward(running(model)).run((torch.randn(4, 5),), {}, edits_of(model)):
        assert torch.is_grad_enabled()
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_gradient_flag_that_chooses_the_kernel(requires_grad: bool) -> None:
    model = eval_copy(CASES["cross_attention"].build()).requires_grad_(requires_grad)
    batch = batches_of(CASES["cross_attention"])[0]
    assert_exact(CheckedForward(running(model)), model, edits_of(model, 99), *batch.args)


# Writes in place


class Writes(nn.Module):
    """Two linears, and between them a function that writes in place."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.write(self.a(x), self.b(x)))


def plain_chain(a: Tensor, b: Tensor) -> Tensor:
    return a.relu_().add_(b).mul_(2) + b


def target_read_again(a: Tensor, b: Tensor) -> Tensor:
    before = a * 2
    a += b
    return before + a.sigmoid()


def view_of_a_value_read_later(a: Tensor, b: Tensor) -> Tensor:
    a[:, :2].mul_(b[:, :2])
    return a


def view_taken_before(a: Tensor, b: Tensor) -> Tensor:
    left = a[:, :2]
    a.add_(b)
    return a * left.sum(1, keepdim=True)


def through_eval_dropout(a: Tensor, b: Tensor) -> Tensor:
    same = nn.functional.dropout(a, training=False)
    same.relu_()
    return a + b


def mask_of_constants(a: Tensor, b: Tensor) -> Tensor:
    mask = a.new_zeros(a.shape[0], 4)
    mask[:, 1:3] = 1
    mask[:, 2] += 1
    return a * mask + b


def mixed_dtypes(a: Tensor, b: Tensor) -> Tensor:
    small = a.bfloat16()
    small += b.double()
    return small.float() + b


def copied_into(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    out[:, :2] = a[:, :2]
    out[:, 2:].copy_(b[:, 2:])
    return out


def chunks(a: Tensor, b: Tensor) -> Tensor:
    left, right = a.chunk(2, 1)
    left.add_(right)
    return torch.cat([right, left], 1) * b


def inside_autocast(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        c = (a @ b.T).relu_()
        c += 1
    return a + c.float().sum(1, keepdim=True)


def outer_value_inside_autocast(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        a.relu_()
        c = a @ b.T
    return a + c.float().sum(1, keepdim=True)


def view_of_an_outer_value_inside_autocast(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        a[:, :2].mul_(2)
        c = b @ b.T
    return a + c.float().sum(1, keepdim=True)


WRITES = [
    plain_chain,
    target_read_again,
    view_of_a_value_read_later,
    view_taken_before,
    mask_of_constants,
    mixed_dtypes,
    copied_into,
    chunks,
    inside_autocast,
    outer_value_inside_autocast,
    view_of_an_outer_value_inside_autocast,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_in_place(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Writes(write).eval()
    forward = CheckedForward(running(model))
    for n in (4, 3, 1):
        assert_exact(forward, model, edits_of(model), torch.randn(n, 4))
    assert not forward.fallbacks


def test_write_that_an_old_export_does_not_record() -> None:
    model = Writes(through_eval_dropout).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.6 exports it wrongly: the check finds that, and each edit is run
        assert_exact(CheckedForward(running(model)), model, edits_of(model), torch.randn(4, 4))


class WritesInput(nn.Module):
    """Centres its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.sub_(0.5))


def test_inputs_of_the_caller_stay() -> None:
    model, x = WritesInput().eval(), torch.randn(4, 4)
    kept = x.clone()
    assert_exact(CheckedForward(running(model)), model, edits_of(model), x)
    assert torch.equal(x, kept)


# Models that a graph is right for only sometimes


class Odd(nn.Module):
    """A linear layer and a function of (module, inputs, outputs)."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.function = function
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x, self.fc(x))


def branch_on_batch_size(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.other(y) if x.shape[0] > 2 else module.other(y.tanh())


def size_in_python(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.other(y) / len(x) + y.new_zeros(len(x), 4)


def counter_that_nobody_reads(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    module.calls.add_(1)
    return module.other(y)


def attribute_that_nobody_reads(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    module.last = y
    module.log.append(y)
    return module.other(y)


@pytest.mark.parametrize(
    "function",
    [branch_on_batch_size, size_in_python, counter_that_nobody_reads, attribute_that_nobody_reads],
    ids=lambda function: function.__name__,
)
def test_captured_again_where_needed(function: Callable[..., Tensor]) -> None:
    model = Odd(function).eval()
    forward, edits = CheckedForward(running(model)), edits_of(model)
    for n in (4, 2, 1, 3, 4, 2):
        assert_exact(forward, model, edits, torch.randn(n, 4))
    assert not forward.fallbacks
    assert model.calls == 0
    assert {type(tensor) for tensor in model.log} <= {Tensor}


def branch_on_values(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.other(y) if y.sum() > 0 else y


def draw(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.other(y + torch.rand_like(y))


def to_numpy(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return module.other(torch.from_numpy(y.numpy().copy()))


FALLBACKS = [
    (branch_on_values, "torch.export refused it: GuardOnDataDependentSymNode"),
    (to_numpy, "torch.export refused it"),
]


@pytest.mark.parametrize(("function", "reason"), FALLBACKS, ids=lambda value: getattr(value, "__name__", ""))
def test_falls_back_and_says_why(
    function: Callable[..., Tensor], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Odd(function).eval()
    forward, edits = CheckedForward(running(model)), edits_of(model)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert_all_exact(forward, model, edits, [torch.randn(n, 4) for n in (4, 4, 3, 1)])
    assert len(caught) == 1
    assert len(forward.fallbacks) == 3
    assert "".join(capfd.readouterr()) == ""


def test_random_models_fall_back() -> None:
    model = Odd(draw).eval()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="differs from one run to the next"):
        CheckedForward(running(model)).run((torch.randn(4, 4, generator=torch.Generator()),), {}, {"base": {}})
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_fall_back_and_fire() -> None:
    model, seen = Odd(counter_that_nobody_reads).eval(), []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    forward = CheckedForward(running(model))
    with pytest.warns(UserWarning, match="there are some on fc"):
        assert_exact(forward, model, edits_of(model), torch.randn(4, 4))
    assert set(seen) == {Tensor}


def state_in_place(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    module.calls.add_(1)
    return module.other(y) * module.calls


def state_reassigned(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    module.calls = module.calls + y.mean().detach()
    return module.other(y) * module.calls


@pytest.mark.parametrize("function", [state_in_place, state_reassigned], ids=lambda function: function.__name__)
def test_state_is_each_edits_own(function: Callable[..., Tensor]) -> None:
    model = Odd(function).eval()
    edits, batches = edits_of(model), [torch.randn(4, 4) for _ in range(3)]
    forward, results = CheckedForward(running(model)), []
    with pytest.warns(UserWarning, match="carries calls from one batch to the next"):
        results = [dict(forward.run((x,), {}, edits)) for x in batches]
    assert model.calls == 0
    for label, edited in edits.items():
        own = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in edited.items():
                own.get_parameter(name).copy_(value)
            for x, got in zip(batches, results, strict=True):
                assert same_bits(got[label], own(x))


def norm_in_training(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.batch_norm(module.other(y), module.mean, module.var, training=True)


def test_running_statistics_are_state() -> None:
    model = Odd(norm_in_training).eval()
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    with pytest.warns(UserWarning, match="carries mean, var from one batch to the next"):
        assert_exact(CheckedForward(running(model)), model, edits_of(model), torch.randn(4, 4))
    assert not model.mean.any()


def hidden_branch(module: Odd, x: Tensor, y: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and bool((x > 0).all()):
        return module.other(y.tanh())
    return module.other(y)


def test_a_branch_that_is_hidden_from_the_export() -> None:
    model = Odd(hidden_branch).eval()
    forward, edits = CheckedForward(running(model)), edits_of(model)
    batches = [torch.randn(4, 4), torch.rand(4, 4) + 0.1, torch.randn(4, 4)]
    with pytest.warns(UserWarning, match="another path for this batch"):
        assert_all_exact(forward, model, edits, batches)


def test_a_model_that_reads_no_values_is_checked_once() -> None:
    calls = []

    class Counted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any

    model = Counted(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    forward, edits = CheckedForward(running(model)), {"base": {}, "cut": {"2.weight": torch.zeros(2, 4)}}
    forward.capture_now()
    dict(forward.run((torch.randn(4, 4),), {}, edits))
    after_the_first = len(calls)
    for _ in range(3):  # its buffers are compared with what they were, which is no reading of the model's
        dict(forward.run((torch.randn(4, 4),), {}, edits))
    assert 0 < len(calls) == after_the_first


def test_odd_inputs_fall_back() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, options: Any) -> Tensor:
            return super().forward(x) * options.factor

    class Options:
        factor = 2.0

    model = Scaled(4, 3).eval()
    with pytest.warns(UserWarning, match="an input of type Options is neither a tensor nor a plain value"):
        assert_exact(CheckedForward(running(model)), model, edits_of(model), torch.randn(4, 4), Options())


def test_plain_values_are_part_of_the_signature() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, factor: float, *, squash: bool = False) -> Tensor:
            y = super().forward(x) * factor
            return y.tanh() if squash else y

    model = Scaled(4, 3).eval()
    forward, x = CheckedForward(running(model)), torch.randn(4, 4)
    for factor, kwargs in [(1.0, {}), (2.0, {}), (2.0, {"squash": True}), (1, {"squash": False})]:
        assert_exact(forward, model, edits_of(model), x, factor, **kwargs)
    assert len(forward._checked) == 4


# What is run, and what is kept


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def deep(layers: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).eval()


@pytest.mark.parametrize(
    ("layers", "products"),
    [(["base"], 4), ([3], 4), ([3, 3, 3], 3 + 3), ([0], 4), ([0, 1, 2, 3, "base"], 4 + 4 + 3 + 2 + 1)],
    ids=str,
)
def test_only_tainted_operators_are_run(layers: list[Any], products: int) -> None:
    model, x = deep(), torch.randn(5, 4)
    graph = capture(running(model), (x,))
    edits = {i: {} if n == "base" else {f"{n}.weight": torch.randn(4, 4)} for i, n in enumerate(layers)}
    with Count() as count:
        for _ in run(graph, (x,), {}, edits):
            pass
    assert count.products == products


def test_values_are_forgotten() -> None:
    model, x = deep(12), torch.randn(5, 4)
    graph = capture(running(model), (x,))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.addmm.default:
                alive.append(weakref.ref(out))
                most = max(most, sum(ref() is not None for ref in alive))
            return out

    edits = {"base": {}, **{i: {f"{i}.weight": torch.randn(4, 4)} for i in range(12)}}
    with Watch():
        for _, logits in run(graph, (x,), {}, edits):
            del logits
    assert most <= 3  # the unedited run's, and two of a suffix
    assert sum(ref() is not None for ref in alive) == 0


def test_edited_tensors_may_be_made_on_demand() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Lazy(Mapping[str, Tensor]):
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, name: str) -> Tensor:
            value = torch.zeros(4, 4)
            alive.append(weakref.ref(value))
            return value

        def __iter__(self) -> Iterator[str]:
            return iter([self.name])

        def __len__(self) -> int:
            return 1

    model, x = deep(), torch.randn(5, 4)
    graph = capture(running(model), (x,))
    for _ in run(graph, (x,), {}, {i: Lazy(f"{i}.weight") for i in range(4)}):
        assert sum(ref() is not None for ref in alive) == 0
    assert len(alive) == 4


# What the graph says


def test_nodes_parameters_and_shapes() -> None:
    model = eval_copy(CASES["residual"].build())
    graph = capture(running(model), (torch.randn(4, 3, 8, 8),))
    assert set(graph.parameters) == {name for name, _ in model.named_parameters()}
    (stem,) = graph.parameters["stem.weight"]
    assert graph.parameter(stem) == "stem.weight"
    assert graph.parameter(graph.output) is None
    first = tainted(graph, ["stem.weight"])[0]
    assert (str(first.target), graph.shape(first)) == ("aten.conv2d.default", (None, 6, 8, 8))
    assert graph.shape(graph.output) == (None, 3)
    assert graph.shape(fx.Graph().placeholder("a number")) is None
    assert repr(graph) == f"Graph({len(graph.nodes)} nodes, 18 of 18 parameters used)"


def test_unused_parameters_and_dead_operators_are_left_out() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.dead, self.unused = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.dead(x)

    model = Dead().eval()
    graph = capture(running(model), (torch.randn(4, 4),))
    assert tainted(graph, ["dead.weight", "unused.weight"]) == ()
    assert [node.name for node in graph.nodes if node.op == "call_function"] == ["linear"]
    assert_exact(CheckedForward(running(model)), model, edits_of(model), torch.randn(4, 4))


def test_unknown_names() -> None:
    model, x = deep(), torch.randn(5, 4)
    with pytest.raises(KeyError, match=r"not parameters of the captured model: 9\.weight"):
        tainted(capture(running(model), (x,)), ["9.weight"])
    with pytest.raises(KeyError, match=r"not parameters of the model: 9\.weight"):
        CheckedForward(running(model)).run((x,), {}, {"a": {"9.weight": x}})


def test_order_of_keyword_arguments_does_not_matter() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    assert Inputs.of((), {"a": a, "b": b}).signature == Inputs.of((), {"b": b, "a": a}).signature


def test_varying_dimensions() -> None:
    shapes = [(torch.Size([4, 7]), torch.Size([5])), (torch.Size([4, 9]), torch.Size([5]))]
    assert varying((frozenset({0}), frozenset()), shapes) == (frozenset({0, 1}), frozenset())


def test_bits() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_no_warnings_of_export() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(running(eval_copy(CASES["lstm"].build())), (torch.randn(4, 6, 5),))
