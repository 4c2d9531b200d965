"""Input that torch, or a model, answers in riddles: the right number or one clear error, a table for each kind."""

from __future__ import annotations

import socket
import threading
import types
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import neuronsurgery as ns
from neuronsurgery.batches import is_dense, move, unpack_batch
from neuronsurgery.copies import eval_copy
from neuronsurgery.loaders import iterate_groups
from neuronsurgery.wrappers import same_names

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1] * 4)
G = torch.tensor([0, 0, 1, 1] * 2)
DATA = [(X, Y, G)]
Refused = tuple[Callable[[], object], type[Exception], str]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


MODEL = mlp()
LAYOUT = ns.find_layout(MODEL)
NEURONS = ns.select(LAYOUT, {"0.weight": 0})
EDIT = ns.zero_out(NEURONS)
SCORES = ns.magnitudes(MODEL)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refuses(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# --- inputs that are no dense tensors -------------------------------------------------------------------------------


class OfNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(self.head(x), 0.0).sum(1)


class OfSparse(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.weight.T) + self.bias


class OfPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 2)

    def forward(self, packed: PackedSequence) -> Tensor:
        assert isinstance(packed, PackedSequence)
        return self.head(self.rnn(packed)[1][0])  # type: ignore[no-any-return]


class OfRecord(nn.Linear):
    """Takes one argument with names, of which it needs one."""

    def forward(self, record: Any) -> Tensor:
        return super().forward(record.x)


Record = namedtuple("Record", ["x", "scale"])


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x


PIECES = [torch.randn(i % 3 + 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
LENGTHS = torch.tensor([6, 5, 4, 4, 3, 2, 1, 1])
# What the model is, what its input is, and what cannot be taken apart.
INPUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "nested": (OfNested, lambda: torch.nested.nested_tensor(PIECES), "a nested tensor"),
    "jagged": (OfNested, lambda: torch.nested.nested_tensor(PIECES, layout=torch.jagged), "a nested tensor"),
    "COO": (lambda: OfSparse(4, 2), lambda: X.relu().to_sparse(), r"a tensor of layout torch\.sparse_coo"),
    "CSR": (lambda: OfSparse(4, 2), lambda: X.relu().to_sparse_csr(), r"a tensor of layout torch\.sparse_csr"),
    "packed": (OfPacked, lambda: pack_padded_sequence(X.expand(6, 8, 4), LENGTHS), "a PackedSequence"),
    "an object": (lambda: OfRecord(4, 2), lambda: Graph(X), "a Graph"),
}
every_input = pytest.mark.parametrize(("build", "make", "what"), INPUTS.values(), ids=INPUTS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]


def gradients_by_hand(model: nn.Module, x: Any, of: Tensor) -> Tensor:
    weights = [model.get_parameter(layer.parameter) for layer in ns.find_layout(model)]
    loss = F.cross_entropy(model(x), Y, reduction="none")[of].mean()
    return torch.cat([gradient.flatten(1).norm(dim=1) for gradient in torch.autograd.grad(loss, weights)])


@every_input
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_inputs_of_any_layout_give_the_right_numbers(
    build: Callable[[], nn.Module], make: Callable[[], Any], what: str
) -> None:
    model, x = build().eval(), make()
    losses = F.cross_entropy(model(x), Y, reduction="none").detach()
    found = ns.evaluate(model, [(x, Y, G)], metric=ns.cross_entropy)
    assert found.values == pytest.approx([losses[g == G].mean().item() for g in (0, 1)])
    assert ns.evaluate(model, {0: [(x, Y)]}, metric=ns.cross_entropy).average == pytest.approx(losses.mean().item())
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"*": 0}))
    swept = ns.sweep(model, {"cut": edit}, [(x, Y, G)], metric=ns.cross_entropy)
    assert swept.baseline == found
    assert swept["cut"] == ns.evaluate(ns.apply(edit, model), [(x, Y, G)], metric=ns.cross_entropy)
    of_all = gradients_by_hand(model, x, torch.ones(8, dtype=torch.bool))
    for data in ({"all": [(x, Y)]}, [(x, Y)]):
        torch.testing.assert_close(ns.group_grad_norms(model, data).values[0], of_all)
    whole = ns.group_grad_norms(model, [(x, Y, G)], regroup=False)
    torch.testing.assert_close(whole.values, torch.stack([gradients_by_hand(model, x, g == G) for g in (0, 1)]))


@every_input
def test_what_cannot_be_taken_apart_is_refused_where_it_has_to_be(
    build: Callable[[], nn.Module], make: Callable[[], Any], what: str
) -> None:
    data = [(make(), Y, G)]
    message = rf"a batch of several groups holds {what}, which cannot be taken apart .*: pass regroup=False"
    refuses(lambda: ns.group_grad_norms(build(), data), ValueError, message)
    message = rf"the hardest examples cannot be taken out of a batch that holds {what}: give dense inputs"
    refuses(lambda: ns.hard_batch(build(), data), ValueError, message)


def test_a_named_tuple_is_one_argument() -> None:
    model, record = OfRecord(4, 2), Record(X, torch.ones(8))
    expected = ns.cross_entropy(model(record), Y).mean().item()
    assert ns.evaluate(model, [(record, Y)], metric=ns.cross_entropy).average == pytest.approx(expected)
    assert ns.group_grad_norms(model, [(record, Y, G)]).counts == (4, 4)
    assert len(unpack_batch(((record, X), Y)).args) == 2


Example = namedtuple("Example", ["image", "label"])
Tokens = namedtuple("Tokens", ["input_ids", "mask", "labels"])


def test_a_batch_that_is_a_named_tuple_is_read_in_the_order_that_it_names() -> None:
    assert unpack_batch(Example(X, Y)).args[0] is X
    refuses(lambda: unpack_batch(Tokens(X, X, Y)), TypeError, "a loader yielded a Tokens of 3; .* pass unpack=")


def test_the_batch_sizes_of_a_packed_sequence_do_not_move() -> None:
    packed = pack_padded_sequence(X.expand(6, 8, 4), LENGTHS, enforce_sorted=False)
    moved = move(ns.Batch((packed,), {}, Y), torch.device("meta")).args[0]
    assert moved.data.is_meta and moved.sorted_indices.is_meta and not moved.batch_sizes.is_meta


class Padded(nn.Module):
    """A tagger of padded sequences."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.whole = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3), whole

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        total = x.shape[1] if self.whole else None
        return self.head(pad_packed_sequence(self.rnn(packed)[0], True, total_length=total)[0])  # type: ignore[no-any-return]


def test_sequences_as_long_as_the_longest_of_a_part_are_refused() -> None:
    lengths, labels = torch.tensor([6, 5, 4, 4, 3, 2, 1, 1]), torch.arange(48).reshape(8, 6) % 3
    data = [((torch.randn(8, 6, 4), lengths), labels, torch.tensor([0] * 4 + [1] * 4))]
    hint = r"give pad_packed_sequence\(\.\.\., total_length=\) the length of the labels, or pass regroup=False"
    refuses(lambda: ns.group_grad_norms(Padded(False), data), ValueError, hint)
    apart, whole = (ns.group_grad_norms(Padded(True).eval(), data, regroup=regroup) for regroup in (True, False))
    assert apart.counts == whole.counts == (4, 4)
    longer = [(data[0][0], torch.cat([labels, labels[:, :1]], 1), G)]
    for call in (ns.evaluate, ns.hard_batch):
        refuses(lambda call=call: call(Padded(False), longer), ValueError, hint)  # type: ignore[misc]


def test_nested_logits_need_predict() -> None:
    class Tags(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    nested = torch.nested.nested_tensor(PIECES, layout=torch.jagged)
    refuses(lambda: ns.evaluate(Tags(4, 2), [(nested, Y)]), ValueError, "returned nested logits: pass predict=")
    assert repr(ns.Batch((nested, X.to_sparse()), {}, Y)) == (
        "Batch(8 examples, args=[nested tensor, tensor of layout torch.sparse_coo])"
    )


# --- models that are not here as a whole ----------------------------------------------------------------------------


class EightBits(nn.Module):
    """A linear layer that keeps its weight in eight bits, and computes in more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def scripted_within() -> nn.Module:
    model = mlp()
    model[0] = torch.jit.script(model[0])
    return model


def sharded() -> nn.Module:
    model = mlp()
    mesh = init_device_mesh("cpu", (1,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    return model


def unsharded_for_now() -> nn.Module:
    """What an FSDP model is after a forward pass: its root is whole."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(X)
    return model


def in_eight_bits() -> nn.Module:
    return nn.Sequential(EightBits(), nn.ReLU(), nn.Linear(4, 2))


def offloaded() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, device="meta"))


def meta_buffer() -> nn.Module:
    model = mlp()
    model.register_buffer("table", torch.zeros(2, device="meta"))
    return model


RUNNING: dict[str, Callable[[nn.Module], object]] = {
    "group_grad_norms": lambda m: ns.group_grad_norms(m, DATA, where="0.weight"),
    "hard_batch": lambda m: ns.hard_batch(m, DATA),
    "evaluate": lambda m: ns.evaluate(m, DATA),
    "sweep": lambda m: ns.sweep(m, {"cut": EDIT}, DATA),
    "silence": lambda m: ns.silence(NEURONS, m, (X, Y)),
    "residual_branches": lambda m: ns.residual_branches(m, (X, Y)),
    "eval_copy": eval_copy,
}
EDITING: dict[str, Callable[[nn.Module], object]] = {
    "plan": lambda m: ns.plan(EDIT, m),
    "apply": lambda m: ns.apply(EDIT, m),
    "bake": lambda m: ns.bake(EDIT, m),
    "edited_parameters": lambda m: ns.edited_parameters(EDIT, m),
}
READING: dict[str, Callable[[nn.Module], object]] = {"find_layout": ns.find_layout, "magnitudes": ns.magnitudes}
SCRIPTED = "is a compiled TorchScript module, .*: give the model as it was before torch.jit.script or torch.jit.trace"
SHARDED = r"4 of the model's tensors are sharded over processes: 0\.weight, 0\.bias, 2\.weight, 2\.bias\. What"
META = "on the meta device, so it has no values; load the weights first(.*\n)+Give a model that is here as a whole"
FLOAT8 = r"1 of the .*\n  0\.weight: of dtype float8_e4m3fn, too narrow to compute in; use bfloat16 or wider"
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "scripted": (
        lambda: torch.jit.script(mlp()),
        {**RUNNING, **EDITING, **READING},
        TypeError,
        f"module '.*' {SCRIPTED}",
    ),
    "traced": (lambda: torch.jit.trace(mlp(), X), {**RUNNING, **EDITING, **READING}, TypeError, SCRIPTED),
    "partly scripted": (scripted_within, {**RUNNING, **EDITING, **READING}, TypeError, f"module '0' {SCRIPTED}"),
    "offloaded": (offloaded, RUNNING, ValueError, rf"2\.weight: {META}"),
    "a buffer on meta": (meta_buffer, RUNNING, ValueError, rf"1 of the .*\n  table: {META}"),
    "sharded": (
        sharded,
        {name: RUNNING[name] for name in ("silence", "residual_branches", "eval_copy")},
        ValueError,
        SHARDED,
    ),
    "sharded, baked": (
        sharded,
        {"bake": EDITING["bake"]},
        ValueError,
        "a fully sharded model has no plain copy: use a",
    ),
    "eight bits": (in_eight_bits, {**EDITING, **READING}, ValueError, FLOAT8),
    "eight bits, scored": (
        in_eight_bits,
        {name: RUNNING[name] for name in ("group_grad_norms", "sweep", "silence", "residual_branches")},
        ValueError,
        FLOAT8,
    ),
}


@pytest.mark.parametrize(("build", "calls", "error", "text"), MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_is_not_here_as_a_whole_is_refused_by_every_function(
    build: Callable[[], nn.Module], calls: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = build()
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    for call in calls.values():
        refuses(lambda call=call: call(model), error, text)  # type: ignore[misc]
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == kinds, "left as it was"


def test_weights_of_eight_bits_run_where_nothing_is_computed_of_them() -> None:
    model = in_eight_bits()
    assert ns.evaluate(model, DATA, metric=ns.cross_entropy).average == pytest.approx(
        ns.cross_entropy(model(X), Y).mean().item()
    )
    assert ns.group_grad_norms(model, DATA, where="2.weight").values.min() > 0


def test_what_fsdp_holds_as_a_whole_for_now_is_read_as_it_is() -> None:
    model = unsharded_for_now()
    assert not isinstance(model[0].weight, DTensor)
    logits = model(X)
    assert torch.equal(ns.apply(ns.compose(), model)(X), logits)
    assert ns.evaluate(model, DATA, metric=ns.margin).average == pytest.approx(ns.margin(logits, Y).mean().item())
    assert torch.equal(model(X), logits)


def test_sharded_checkpoints_are_refused() -> None:
    text = r"0\.weight: spread over processes; gather it first, tensor\.full_tensor\(\)"
    refuses(lambda: ns.rewind(NEURONS, sharded().state_dict()), ValueError, text)


# --- targets --------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Any, str]] = {
    "a dictionary": ({"boxes": X}, "a dict"),
    "dictionaries": ([{"boxes": 1}] * 8, "a list of dict"),
    "strings": (["cat"] * 8, "a list of str"),
    "one string": ("cat", "a str"),
    "ragged": ([[0], [0, 1]] * 4, "a list of list"),
    "tensors": ([torch.zeros(2)] * 8, "a list of Tensor"),
    "nothing": (None, "a NoneType"),
    "objects": (np.array([{}] * 8), "a ndarray"),
}
CALLS: dict[str, Callable[[Any], object]] = {
    "evaluate": lambda data: ns.evaluate(MODEL, data),
    "sweep": lambda data: ns.sweep(MODEL, {"cut": EDIT}, data),
    "group_grad_norms": lambda data: ns.group_grad_norms(MODEL, data),
    "hard_batch": lambda data: ns.hard_batch(MODEL, data),
}


@pytest.mark.parametrize(("targets", "what"), TARGETS.values(), ids=TARGETS)
def test_targets_that_are_no_numbers_need_unpack(targets: Any, what: str) -> None:
    text = rf"targets are a tensor or numbers, one per example, not {what}: pass unpack=, a function batch -> Batch"
    for data in ([(X, targets)], [{"input": X, "labels": targets}]):
        for call in CALLS.values():
            refuses(lambda call=call, data=data: call(data), TypeError, text)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_targets_give_the_right_numbers(dtype: torch.dtype) -> None:
    data = [(X, Y.to(dtype), G)]
    assert ns.evaluate(MODEL, data) == ns.evaluate(MODEL, DATA)
    assert torch.equal(ns.group_grad_norms(MODEL, data).values, ns.group_grad_norms(MODEL, DATA).values)
    assert torch.equal(ns.hard_batch(MODEL, data).targets, ns.hard_batch(MODEL, DATA).targets)
    logits = MODEL(X)
    for function in (ns.cross_entropy, ns.accuracy, ns.margin):
        assert torch.equal(function(logits, Y.to(dtype)), function(logits, Y))
    logits, tokens = X.reshape(2, 4, 4), Y.reshape(2, 4)
    assert torch.equal(ns.causal_lm_loss(logits, tokens.to(dtype)), ns.causal_lm_loss(logits, tokens))
    assert torch.equal(ns.fragility(X[:, 0][None], Y.to(dtype)), ns.fragility(X[:, 0][None], Y))


def test_a_class_of_eight_bits_is_not_taken_for_the_label_that_does_not_count() -> None:
    """-100 wraps around to 156."""
    logits, labels = torch.zeros(1, 200, 2), torch.tensor([[156, 0]], dtype=torch.uint8)
    torch.testing.assert_close(ns.cross_entropy(logits, labels), torch.tensor([200.0]).log())


NOT_DENSE = {
    "nested": torch.nested.nested_tensor([torch.zeros(2)] * 8, layout=torch.jagged),
    "sparse": Y.to_sparse(),
}


@pytest.mark.parametrize("targets", NOT_DENSE.values(), ids=NOT_DENSE)
def test_targets_that_are_not_dense(targets: Tensor) -> None:
    text = r"targets are a dense tensor, not a (nested tensor|tensor of layout torch.sparse_coo): pad them"
    refuses(lambda: ns.evaluate(MODEL, [(X, targets)]), ValueError, text)
    assert not is_dense(targets) and is_dense(X)


# --- encoder-decoders -----------------------------------------------------------------------------------------------

DECODER = (
    r"the model needs the inputs of its decoder, and labels are targets here, .*: give decoder_input_ids in the batch "
    r"\(model\.prepare_decoder_input_ids_from_labels\(labels\)\), or pass unpack="
)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=12, decoder_start_token_id=0, **sizes)).eval()


def bart(kind: str = "BartForConditionalGeneration") -> Any:
    import transformers

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
    return getattr(transformers, kind)(transformers.BartConfig(vocab_size=12, **layers, **sizes)).eval()


TOKENS = torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])
LABELS = torch.tensor([[5, 4, 3, 2], [8, 7, 6, 2]])


@pytest.mark.parametrize(("build", "raises"), [(t5, True), (bart, False)], ids=["T5", "BART"])
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_labels_alone_are_not_enough_for_an_encoder_decoder(build: Callable[[], Any], raises: bool) -> None:
    """BART decodes the encoder's inputs where it is given no labels, without a word."""
    model = build()
    data = [{"input_ids": TOKENS, "labels": LABELS}]
    for call in (
        lambda: ns.evaluate(model, data),
        lambda: ns.hard_batch(model, data),
        lambda: ns.group_grad_norms(model, data),
        lambda: ns.sweep(model, {"as it is": ns.compose()}, data),
    ):
        with pytest.raises(ValueError, match=DECODER) as refused:
            call()
        assert (refused.value.__cause__ is not None) == raises
    given = {"input_ids": TOKENS, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=LABELS)}
    expected = model(input_ids=TOKENS, labels=LABELS).loss.item()
    found = ns.evaluate(model, [{**given, "labels": LABELS}], metric=ns.cross_entropy)
    assert found.average == pytest.approx(expected, rel=1e-5)
    told = ns.Batch((), {"input_ids": TOKENS, "labels": LABELS}, LABELS)
    logits = lambda output: output.logits  # noqa: E731
    assert ns.evaluate(model, [told], metric=ns.cross_entropy, predict=logits) == found
    held = [{"input_ids": TOKENS, "labels": LABELS}]
    if raises:
        refuses(lambda: ns.evaluate(Lit(model), held), ValueError, DECODER)


def test_an_encoder_decoder_that_classifies_needs_no_decoder_inputs() -> None:
    model = bart("BartForSequenceClassification")
    assert ns.evaluate(model, [{"input_ids": TOKENS, "labels": torch.tensor([0, 1])}]).counts == (2,)


# --- names before globs ---------------------------------------------------------------------------------------------


def bracketed() -> nn.Module:
    return nn.ModuleDict({"block[0]": nn.Linear(4, 4), "block[1]": nn.Linear(4, 2), "block0": nn.Linear(4, 3)})


def names(layers: Iterable[ns.Layer]) -> list[str]:
    return [layer.parameter for layer in layers]


NAMED: dict[str, Callable[[nn.Module], list[str]]] = {
    "where": lambda m: names(ns.find_layout(m, where="block[0].weight")),
    "where, several": lambda m: names(ns.find_layout(m, where=["block[0].weight"])),
    "where, a glob": lambda m: names(ns.find_layout(m, where="block[[]0].*")),
    "where, wrapped": lambda m: names(ns.find_layout(m, where="module.block[0].weight")),
    "extra": lambda m: names(ns.find_layout(m, where="block[1].*", extra="block[0].weight"))[:1],
    "patterns": lambda m: [
        layer.parameter
        for layer in ns.find_layout(m, patterns={"block[0].weight": "i n -> n i"})
        if not layer.has_default_pattern or layer.pattern.startswith("i")
    ],
    "select": lambda m: names(ns.select(ns.find_layout(m), {"block[0].weight": 0}).by_layer()),
}


@pytest.mark.parametrize("found", NAMED.values(), ids=NAMED)
def test_an_exact_name_comes_before_globs(found: Callable[[nn.Module], list[str]]) -> None:
    assert found(bracketed()) == ["block[0].weight"]


def test_brackets_that_match_nothing_stand_for_themselves() -> None:
    model = nn.ModuleDict({"block[a]": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert [layer.parameter for layer in ns.find_layout(model, where="block[a].*")] == ["block[a].weight"]
    assert ns.select(ns.find_layout(model), {"*[a].weight": 0}) == ns.select(
        ns.find_layout(model), {"block[a].weight": 0}
    )


# --- arguments of another kind --------------------------------------------------------------------------------------

THINGS: dict[str, Any] = {
    "a model": MODEL,
    "a string": "resnet",
    "nothing": None,
    "a layout": LAYOUT,
    "scores": SCORES,
    "neurons": NEURONS,
    "an edit": EDIT,
    "a list": [3],
    "a number": 3,
}
NEURONS_WANTED = "takes a set of Neurons, not a .*: choose them with topk, top_fraction, sample or select"
EDIT_WANTED = "an edit is made by zero_out, .*, not a .*: write for instance zero_out"
MODEL_WANTED = r"a model is a torch\.nn\.Module, not a"
LAYOUT_WANTED = r"layout.* is what find_layout(\(model\))? returns, not a"
SCORES_WANTED = "scores are what group_grad_norms, grad_norms or magnitudes return, not a"
LOADER_WANTED = r"a loader (is an iterable of batches, not a|yielded a)"
GLOBS_WANTED = "layers are chosen by a glob or several, not by a .*; give a Layout as layout="
FUNCTION_WANTED = "(is a function, not a|a metric is a function .*, not a)"
# What each argument takes: a call with something in its place, the text, and which of the things above are right.
ARGUMENTS: dict[str, tuple[Callable[[Any], object], str, set[str]]] = {
    "find_layout(model)": (lambda x: ns.find_layout(x), MODEL_WANTED, {"a model"}),
    "find_layout(where=)": (lambda x: ns.find_layout(MODEL, where=x), GLOBS_WANTED, {"a string", "nothing", "scores"}),
    "find_layout(extra=)": (lambda x: ns.find_layout(MODEL, extra=x), GLOBS_WANTED, {"a string", "nothing", "scores"}),
    "find_layout(patterns=)": (lambda x: ns.find_layout(MODEL, patterns=x), "patterns= is a mapping", {"nothing"}),
    "select(layout)": (
        lambda x: ns.select(x, {}),
        r"select takes a Layout, not a .*find_layout\(model\)",
        {"a layout"},
    ),
    "select(chosen)": (lambda x: ns.select(LAYOUT, x), "select takes a mapping .*, not a", set()),
    "magnitudes(model)": (lambda x: ns.magnitudes(x), MODEL_WANTED, {"a model"}),
    "magnitudes(layout=)": (lambda x: ns.magnitudes(MODEL, layout=x), LAYOUT_WANTED, {"a layout", "nothing"}),
    "grad_norms(gradients)": (lambda x: ns.grad_norms(x, LAYOUT), "gradients are a mapping by name, not a", set()),
    "grad_norms(layout)": (lambda x: ns.grad_norms({}, x), LAYOUT_WANTED, {"a layout"}),
    "group_grad_norms(model)": (lambda x: ns.group_grad_norms(x, DATA), MODEL_WANTED, {"a model"}),
    "group_grad_norms(loaders)": (lambda x: ns.group_grad_norms(MODEL, x), LOADER_WANTED, set()),
    "group_grad_norms(layout=)": (
        lambda x: ns.group_grad_norms(MODEL, DATA, layout=x),
        LAYOUT_WANTED,
        {"a layout", "nothing"},
    ),
    "group_grad_norms(loss=)": (
        lambda x: ns.group_grad_norms(MODEL, DATA, loss=x),
        FUNCTION_WANTED,
        {"a model", "nothing"},
    ),
    "group_grad_norms(group_key=)": (
        lambda x: ns.group_grad_norms(MODEL, DATA, group_key=x),
        "group_key= is the name of an entry, not a|is for batches that are mappings, not for a tuple",
        {"nothing"},
    ),
    "hard_batch(model)": (lambda x: ns.hard_batch(x, DATA), MODEL_WANTED, {"a model"}),
    "hard_batch(loader)": (lambda x: ns.hard_batch(MODEL, x), LOADER_WANTED, set()),
    "hard_batch(unpack=)": (
        lambda x: ns.hard_batch(MODEL, DATA, unpack=x),
        FUNCTION_WANTED,
        {"a model", "nothing"},
    ),
    "topk": (lambda x: ns.topk(x, 1), SCORES_WANTED, {"scores"}),
    "top_fraction": (lambda x: ns.top_fraction(x, 0.5), SCORES_WANTED, {"scores"}),
    "sample": (lambda x: ns.sample(x, 1), r"sample draws from .*: write find_layout\(model\)", {"a layout", "neurons"}),
    "sample(exclude=)": (
        lambda x: ns.sample(LAYOUT, 1, exclude=x),
        f"exclude= {NEURONS_WANTED}",
        {"neurons", "nothing"},
    ),
    "ranks(scores)": (lambda x: ns.ranks(x, NEURONS), SCORES_WANTED, {"scores"}),
    "ranks(of)": (lambda x: ns.ranks(SCORES, x), NEURONS_WANTED, {"neurons"}),
    "contrast": (lambda x: ns.contrast(x, "all", "all"), SCORES_WANTED, {"scores"}),
    "overlap": (lambda x: ns.overlap(NEURONS, x), f"overlap {NEURONS_WANTED}", {"neurons"}),
    "zero_out": (lambda x: ns.zero_out(x), NEURONS_WANTED, {"neurons"}),
    "scale": (lambda x: ns.scale(x, 2.0), NEURONS_WANTED, {"neurons"}),
    "random_init": (lambda x: ns.random_init(x, std=1.0), NEURONS_WANTED, {"neurons"}),
    "random_noise": (lambda x: ns.random_noise(x, std=1.0), NEURONS_WANTED, {"neurons"}),
    "rewind": (lambda x: ns.rewind(x, MODEL.state_dict()), NEURONS_WANTED, {"neurons"}),
    "rewind(checkpoint)": (
        lambda x: ns.rewind(NEURONS, x),
        r"a checkpoint is a path .*model\.state_dict",
        {"a string"},
    ),
    "compose": (lambda x: ns.compose(EDIT, x), EDIT_WANTED, {"an edit"}),
    "apply(edit)": (lambda x: ns.apply(x, MODEL), EDIT_WANTED, {"an edit"}),
    "apply(model)": (lambda x: ns.apply(EDIT, x), MODEL_WANTED, {"a model"}),
    "bake(edit)": (lambda x: ns.bake(x, MODEL), EDIT_WANTED, {"an edit"}),
    "bake(model)": (lambda x: ns.bake(EDIT, x), MODEL_WANTED, {"a model"}),
    "edited_parameters(edit)": (lambda x: ns.edited_parameters(x, MODEL), EDIT_WANTED, {"an edit"}),
    "edited_parameters(model)": (lambda x: ns.edited_parameters(EDIT, x), MODEL_WANTED, {"a model"}),
    "edited_parameters(params)": (
        lambda x: ns.edited_parameters(EDIT, MODEL, x),
        r"params are a mapping name -> tensor, not a .*dict\(model\.named_parameters\(\)\)",
        {"nothing"},
    ),
    "plan(edit)": (lambda x: ns.plan(x, MODEL), EDIT_WANTED, {"an edit"}),
    "plan(model)": (lambda x: ns.plan(EDIT, x), MODEL_WANTED, {"a model"}),
    "evaluate(model)": (lambda x: ns.evaluate(x, DATA), MODEL_WANTED, {"a model"}),
    "evaluate(loaders)": (lambda x: ns.evaluate(MODEL, x), LOADER_WANTED, set()),
    "evaluate(metric=)": (lambda x: ns.evaluate(MODEL, DATA, metric=x), FUNCTION_WANTED, {"a model"}),
    "evaluate(predict=)": (lambda x: ns.evaluate(MODEL, DATA, predict=x), FUNCTION_WANTED, {"a model", "nothing"}),
    "sweep(model)": (lambda x: ns.sweep(x, {"cut": EDIT}, DATA), MODEL_WANTED, {"a model"}),
    "sweep(edits)": (lambda x: ns.sweep(MODEL, x, DATA), "edits are a mapping label -> edit, not a", set()),
    "sweep({label: edit})": (
        lambda x: ns.sweep(MODEL, {"cut": x}, DATA),
        "edits are what zero_out, scale and the like return, not 'cut'",
        {"an edit"},
    ),
    "sweep(loaders)": (lambda x: ns.sweep(MODEL, {"cut": EDIT}, x), LOADER_WANTED, set()),
    "sweep(predict=)": (
        lambda x: ns.sweep(MODEL, {"cut": EDIT}, DATA, predict=x),
        FUNCTION_WANTED,
        {"a model", "nothing"},
    ),
    "silence(neurons)": (lambda x: ns.silence(x, MODEL, (X, Y)), f"silence {NEURONS_WANTED}", {"neurons"}),
    "silence(model)": (lambda x: ns.silence(NEURONS, x, (X, Y)), MODEL_WANTED, {"a model"}),
    "residual_branches(model)": (lambda x: ns.residual_branches(x, (X, Y)), MODEL_WANTED, {"a model"}),
    "fragility(sweep)": (lambda x: ns.fragility(x, Y), "fragility takes a Sweep .*: write fragility", set()),
    "fragility(targets)": (lambda x: ns.fragility(X.T, x), "targets are a tensor of class indices", {"a list"}),
    "infer_groups": (lambda x: ns.infer_groups(x, Y), r"infer_groups takes what fragility", {"a list"}),
    "cross_entropy(logits)": (lambda x: ns.cross_entropy(x, Y), "logits are a tensor, not a", set()),
    "accuracy(targets)": (lambda x: ns.accuracy(X, x), "targets are a tensor, not a", set()),
    "margin(logits)": (lambda x: ns.margin(x, Y), "logits are a tensor, not a", set()),
    "causal_lm_loss(targets)": (lambda x: ns.causal_lm_loss(X, x), "targets are a tensor, not a", set()),
    "Neurons": (lambda x: ns.Neurons(x), "Neurons are made of a mapping Layer -> indices, not of a", {"nothing"}),
    "Neurons({layer: indices})": (lambda x: ns.Neurons({x: (0,)}), "not of a .*: choose them", {"scores", "a list"}),
    "Layout": (
        lambda x: ns.Layout((x,)),
        r"a layout is made of layers, not of a .*: write find_layout\(model\)",
        set(),
    ),
    "renamed": (lambda x: NEURONS.renamed(x), "names are a mapping old -> new or a function .*, not a", {"a model"}),
    "with_groups(loader)": (
        lambda x: ns.with_groups(x, [0]),
        LOADER_WANTED,
        {"a model", "a layout", "scores", "neurons", "a list"},
    ),
    "file_kind": (lambda x: ns.file_kind(x), "file_kind takes the name that files know an edit by", {"a string"}),
}


@pytest.mark.parametrize(("call", "text", "right"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_of_another_kind_is_a_type_error_that_says_what_is_wanted(
    call: Callable[[Any], object], text: str, right: set[str]
) -> None:
    before = snapshot(MODEL)
    for name, thing in THINGS.items():
        if name not in right:
            refuses(lambda thing=thing: call(thing), TypeError, text)  # type: ignore[misc]
    assert_unchanged(before, MODEL)


def test_a_mapping_of_loaders_is_checked_and_is_no_single_loader() -> None:
    refuses(
        lambda: ns.evaluate(MODEL, {"a": DATA, "b": None}),
        TypeError,
        "a loader is .*, not a NoneType: give a list of batches or a DataLoader",
    )
    for call in (lambda: ns.hard_batch(MODEL, {"a": DATA}), lambda: ns.with_groups({"a": DATA}, [0])):
        refuses(call, TypeError, "an iterable of batches, not a dict: give one of its values")


# --- attributes that cannot be copied -------------------------------------------------------------------------------


class Stream:
    """Refuses a copy, as a stream of a GPU does."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'Stream' object")


class Counter:
    """Something of the module's own around what cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.seen = threading.Lock(), [torch.zeros(1)]


class Holding(Stream):
    def __init__(self, held: object) -> None:
        self.held = held


def numbers() -> Iterator[int]:
    yield 1


SHARED: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a process group": lambda: dist.group.WORLD,
    "a module of Python": lambda: types,
    "a generator": numbers,
    "a stream": Stream,
    "threads": lambda: ThreadPoolExecutor(1),
    "a thread": threading.Thread,
    "a socket": socket.socket,
    "an open file": lambda: Path(__file__).open(),  # noqa: SIM115  # closed by the test
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_what_refuses_a_copy_and_holds_nothing_of_the_model_is_shared(make: Callable[[], Any]) -> None:
    model = mlp()
    model[0].guard = held = make()
    model[0].kept = [held, {"inner": (held, 1)}]
    for copied in (ns.apply(EDIT, model), ns.bake(EDIT, model), eval_copy(model)):
        assert copied[0].guard is held  # type: ignore[index,union-attr]
        assert copied[0].kept is not model[0].kept and copied[0].kept[1]["inner"][0] is held  # type: ignore[index,union-attr]
    assert ns.evaluate(model, DATA).counts == (4, 4)
    if hasattr(held, "close"):
        held.close()


def test_what_stands_around_it_is_copied_all_the_same() -> None:
    model = mlp()
    model[0].counter = Counter()
    view = ns.apply(EDIT, model)
    assert view[0].counter is not model[0].counter and view[0].counter.lock is model[0].counter.lock  # type: ignore[index,union-attr]
    assert view[0].counter.seen[0] is not model[0].counter.seen[0]  # type: ignore[index,union-attr]


def test_what_refuses_a_copy_and_holds_a_module_is_refused() -> None:
    for held in (Holding(MODEL[2]), (layer for layer in [nn.Linear(2, 2)])):
        model = mlp()
        model[0].guard = held
        text = r"attribute 'guard' of module '0' \(Linear\) cannot be copied"
        refuses(lambda model=model: ns.apply(EDIT, model), TypeError, text)  # type: ignore[misc]


def test_a_batch_norm_over_processes_is_viewed_and_run() -> None:
    norm = nn.SyncBatchNorm(4, process_group=dist.group.WORLD)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2)).eval()
    view = ns.apply(EDIT, model)
    assert view[1].process_group is dist.group.WORLD  # type: ignore[index,union-attr]
    weight = model[0].weight.detach().clone()  # type: ignore[union-attr]
    weight[0] = 0
    expected = model[2](F.linear(X, weight, model[0].bias) / (1 + norm.eps) ** 0.5)  # type: ignore[arg-type]
    torch.testing.assert_close(view(X), expected)


# --- what is in the place of groups ---------------------------------------------------------------------------------

METADATA = torch.rand(8, 3)
IGNORED: dict[str, Any] = {
    "metadata": (X, Y, METADATA),
    "dictionaries": (X, Y, [{"place": 1}] * 8),
    "too few": (X, Y, G[:3]),
    "a mapping": {"input": X, "labels": Y, "group": METADATA, "g": 3},
}


@pytest.mark.parametrize("raw", IGNORED.values(), ids=IGNORED)
def test_with_a_mapping_of_loaders_what_stands_for_groups_is_not_looked_at(raw: Any) -> None:
    loaders, plain = {"a": [raw, raw]}, {"a": [(X, Y)] * 2}
    assert ns.evaluate(MODEL, loaders) == ns.evaluate(MODEL, plain)
    assert ns.sweep(MODEL, {"cut": EDIT}, loaders)["cut"] == ns.sweep(MODEL, {"cut": EDIT}, plain)["cut"]
    assert ns.group_grad_norms(MODEL, loaders) == ns.group_grad_norms(MODEL, plain)
    refuses(lambda: ns.evaluate(MODEL, loaders["a"]), (TypeError, ValueError), "groups|group")  # type: ignore[arg-type]


X32, Y32 = X.repeat(4, 1), Y.repeat(4)
NAMES: dict[str, Any] = {"an index": range(32), "a path": [f"images/{i}.png" for i in range(32)]}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize(
    "call",
    [
        ns.evaluate,
        lambda m, d: ns.sweep(m, {}, d),
        ns.group_grad_norms,
        lambda m, d: ns.group_grad_norms(m, d, regroup=False),
        lambda m, d: ns.hard_batch(m, d, per_group=True),
    ],
    ids=["evaluate", "sweep", "group_grad_norms", "regroup=False", "hard_batch"],
)
def test_one_group_for_each_example_is_said(call: Callable[[Any, Any], Any], names: Any) -> None:
    data = [(X32[i : i + 8], Y32[i : i + 8], list(names)[i : i + 8]) for i in range(0, 32, 8)]
    text = r"the first 24 examples of a mixed stream are of 24 groups: .* an index, a path or the like, leave it out"
    with pytest.warns(UserWarning, match=text) as said:
        call(MODEL, data)
    assert [warning.filename for warning in said] == [__file__]


def test_many_groups_of_many_examples_are_groups() -> None:
    def groups(count: int, distinct: int) -> Any:
        return [(torch.zeros(count, 4), torch.zeros(count).long(), torch.arange(count) % distinct)]

    assert len(list(iterate_groups(groups(400, 150)))) == len(list(iterate_groups(groups(16, 16)))) == 1
    with pytest.warns(UserWarning, match="400 examples of a mixed stream are of 300 groups"):
        list(iterate_groups(groups(400, 300)))


# --- groups from elsewhere ------------------------------------------------------------------------------------------


def test_groups_by_key() -> None:
    rows = {"input": X, "labels": Y, "place": ["land", "sea"] * 4}
    for function in (ns.evaluate, ns.group_grad_norms):
        found = function(MODEL, [rows], group_key="place")  # type: ignore[operator]
        assert found.groups == ("land", "sea") and found.counts == (4, 4)
    for raw in (({"input": X, "place": G}, Y), ({"input": X, "place": G}, Y, METADATA)):
        assert ns.evaluate(MODEL, [raw], group_key="place").groups == (0, 1)
    swept = ns.sweep(MODEL, {"cut": EDIT}, [rows], group_key="place")
    assert swept.members[:2] == ("land", "sea")
    assert ns.hard_batch(MODEL, [rows], group_key="place", per_group=True, top=1).groups == ("land", "sea")
    refuses(
        lambda: ns.evaluate(MODEL, DATA, group_key="place"), TypeError, "group_key='place' is for .* a tuple of Ten"
    )
    text = r"a batch has no 'place', which group_key= names; its keys are \['labels', 'x'\]"
    refuses(lambda: ns.evaluate(MODEL, [{"x": X, "labels": Y}], group_key="place"), KeyError, text)
    both = lambda: ns.evaluate(MODEL, [rows], group_key="place", unpack=unpack_batch)  # noqa: E731
    refuses(both, TypeError, "unpack= says the groups already: give it or group_key=, not both")


def test_groups_beside_a_loader() -> None:
    data = TensorDataset(X, Y, torch.arange(8))
    loader = DataLoader(data, batch_size=3)
    grouped = ns.with_groups(loader, G)
    for _ in range(2):
        assert [batch.groups for batch in grouped] == [(0, 0, 1), (1, 0, 0), (1, 1)]
    assert len(grouped) == 3  # type: ignore[arg-type]
    assert ns.evaluate(MODEL, grouped) == ns.evaluate(
        MODEL, [(X[:3], Y[:3], G[:3]), (X[3:6], Y[3:6], G[3:6]), (X[6:], Y[6:], G[6:])]
    )
    assert next(iter(loader))[2].tolist() == [0, 1, 2]
    stream = ns.with_groups((raw for raw in [(X, Y)]), np.array(["a"] * 8))
    refuses(lambda: len(stream), TypeError, r"has no len\(\)")  # type: ignore[arg-type]
    assert [batch.groups for batch in stream] == [("a",) * 8]
    unpacked = ns.with_groups([X], G.tolist(), unpack=lambda x: ns.Batch((x,), {}, Y))
    assert ns.evaluate(MODEL, unpacked) == ns.evaluate(MODEL, DATA)


NUMBER = "groups for a loader of {} examples.*: give one group per example, in the order of the loader"
MISFITS: dict[str, Refused] = {
    "too few": (lambda: list(ns.with_groups(DATA, [0] * 7)), ValueError, "7 " + NUMBER.format("8") + ""),
    "too many": (lambda: list(ns.with_groups(DATA, [0] * 9)), ValueError, "9 " + NUMBER.format("8")),
    "too many for a DataLoader": (
        lambda: ns.with_groups(DataLoader(TensorDataset(X, Y), 3), [0] * 9),
        ValueError,
        "9 " + NUMBER.format("8"),
    ),
    "a last batch that is dropped": (
        lambda: ns.with_groups(DataLoader(TensorDataset(X, Y), 3, drop_last=True), G),
        ValueError,
        "8 " + NUMBER.format("6"),
    ),
    "a shuffled DataLoader": (
        lambda: ns.with_groups(DataLoader(TensorDataset(X, Y), 3, shuffle=True), G),
        ValueError,
        "the DataLoader shuffles, .*: make it with shuffle=False, or let its data set yield the groups",
    ),
    "floats": (lambda: ns.with_groups(DATA, X[:, 0]), TypeError, "groups are integers or strings, not float"),
}


@pytest.mark.parametrize(("call", "error", "text"), MISFITS.values(), ids=MISFITS)
def test_groups_that_do_not_fit_a_loader(call: Callable[[], object], error: type[Exception], text: str) -> None:
    refuses(call, error, text)


# --- names inside wrappers ------------------------------------------------------------------------------------------


class Lit(nn.Module):
    """A module to train with, around the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.temperature = net, nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.net(*args, **kwargs)
        return output / self.temperature if isinstance(output, Tensor) else output


class Adapter(nn.Module):
    """Named as adapters name what they are put around."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)  # type: ignore[no-any-return]


def adapted(net: nn.Module) -> nn.Module:
    net[0] = Adapter(net[0])  # type: ignore[index,operator]
    return net


OUTER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a module's net": Lit,
    "the net of an inner wrapper": lambda net: Lit(nn.DataParallel(net)),
    "the net, averaged": lambda net: AveragedModel(Lit(net)),
    "a checkpointed net": lambda net: Lit(checkpoint_wrapper(net)),
    "a compiled net": lambda net: Lit(torch.compile(net)),  # type: ignore[arg-type]
    "an adapted layer": adapted,
    "deeper": lambda net: Lit(Lit(net)),
}


@pytest.mark.parametrize("wrap", OUTER.values(), ids=OUTER)
def test_edits_checkpoints_and_gradients_go_both_ways_between_a_net_and_what_holds_it(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    net = mlp().eval()
    outer = wrap(mlp()).eval()
    layouts = ns.find_layout(net), ns.find_layout(outer, where="*0.*weight")
    for layout in layouts:
        neurons = ns.select(layout, {layout.layers[0].parameter: (0, 2)})
        edit = ns.zero_out(neurons)
        for model in (net, outer):
            view = ns.apply(edit, model)
            assert [
                p[[0, 2]].abs().sum().item() for n, p in eval_copy(view).named_parameters() if p.shape == (4, 4)
            ] == [0]
            assert torch.equal(view(X), ns.bake(edit, model)(X)) and not torch.equal(view(X), eval_copy(model)(X))
            edited = ns.plan(edit, model)(dict(outer.named_parameters()))
            assert len(edited) == 1 and edited.keys() <= dict(outer.named_parameters()).keys()
        swept = ns.sweep(outer, {"cut": edit}, DATA, metric=ns.cross_entropy)
        assert swept["cut"] == ns.evaluate(ns.apply(edit, outer), DATA, metric=ns.cross_entropy)
        for source in (net, outer):
            back = ns.bake(ns.rewind(neurons, source.state_dict()), net)
            row = next(p for p in source.parameters() if p.shape == (4, 4))[0]
            assert torch.equal(back[0].weight[0], row)  # type: ignore[index]
            gradients = {name: torch.ones_like(p) for name, p in source.named_parameters()}
            assert ns.grad_norms(gradients, layout).values.min() > 0
    assert net.training is outer.training is False


def test_gradients_of_a_tied_net_within_another() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight  # type: ignore[union-attr]
    gradients = {name: torch.ones_like(parameter) for name, parameter in Lit(net).named_parameters()}
    assert "net.1.weight" not in gradients
    assert ns.grad_norms(gradients, ns.find_layout(net)).values.tolist() == [[2.0] * 4]


def test_of_several_places_for_a_net_none_is_taken() -> None:
    twins = nn.ModuleDict({"left": mlp(), "right": mlp()})
    refuses(lambda: ns.apply(EDIT, twins), ValueError, r"0\.weight: not in the model; nearest are 'left\.0\.weight', '")
    refuses(lambda: ns.rewind(NEURONS, twins.state_dict()), ValueError, r"0\.weight: not in the checkpoint")
    both = ns.select(ns.find_layout(twins), {"*.0.weight": 0})
    refuses(lambda: ns.apply(ns.zero_out(both), MODEL), ValueError, r"left\.0\.weight: not in the model")


PATHS: dict[str, tuple[list[str], list[str], list[str | None]]] = {
    "a child": (["0.weight", "2.weight"], ["net.0.weight", "net.2.weight", "t"], ["net.0.weight", "net.2.weight"]),
    "a parent": (["net.0.weight", "net.2.weight"], ["0.weight", "2.weight"], ["0.weight", "2.weight"]),
    "two children": (["0.weight"], ["a.0.weight", "b.0.weight"], [None]),
    "two parents": (["a.0.weight", "b.0.weight"], ["0.weight"], [None, None]),
    "two paths": (["0.weight", "2.weight"], ["a.0.weight", "b.2.weight"], [None, None]),
    "one of two": (["0.weight", "4.weight"], ["net.0.weight", "net.2.weight"], [None, None]),
    "beside an exact one": (["0.weight", "2.weight"], ["0.weight", "net.2.weight"], ["0.weight", None]),
    "a part of a name": (["0.weight"], ["10.weight"], [None]),
    "wrapped": (["0.weight"], ["model.module.net._orig_mod.0.weight"], ["model.module.net._orig_mod.0.weight"]),
    "none wanted": ([], ["0.weight"], []),
}


@pytest.mark.parametrize(("wanted", "names", "found"), PATHS.values(), ids=PATHS)
def test_names_that_differ_by_one_path(wanted: list[str], names: list[str], found: list[str | None]) -> None:
    assert list(same_names(wanted, names).values()) == found


def test_neurons_renamed() -> None:
    layout = ns.find_layout(MODEL, patterns={"2.weight": "n i -> i n"})
    neurons = ns.select(layout, {"0.weight": (0, 3), "2.weight": 1})
    by_function = neurons.renamed(lambda name: f"trunk.{name}")
    assert [layer.parameter for layer in by_function.by_layer()] == ["trunk.0.weight", "trunk.2.weight"]
    assert by_function.renamed(lambda name: name.removeprefix("trunk.")) == neurons
    assert neurons.renamed({"0.weight": "first", "unused": "x"}).masks().keys() == {"first", "2.weight"}
    assert ns.Neurons().renamed({}) == ns.Neurons()
    rows = ns.select(ns.find_layout(MODEL), {"2.weight": 0}) | ns.select(layout, {"2.weight": 0})
    assert len(rows.renamed(lambda _: "w").by_layer()) == 2  # one parameter, cut in two ways
    model = nn.ModuleDict({"trunk": mlp(), "other": mlp()})
    edited = ns.bake(ns.zero_out(by_function), model)
    assert edited["trunk"][0].weight[[0, 3]].abs().max() == 0  # type: ignore[index]


RENAMES: dict[str, Refused] = {
    "a collision": (
        lambda: ns.select(LAYOUT, {"*": 0}).renamed(lambda name: "w"),
        ValueError,
        r"several layers come to one name: 0\.weight -> w, 2\.weight -> w; give each a name of its own",
    ),
    "a collision with a name that stays": (
        lambda: ns.select(LAYOUT, {"*": 0}).renamed({"0.weight": "2.weight"}),
        ValueError,
        r"come to one name: 0\.weight -> 2\.weight, 2\.weight -> 2\.weight",
    ),
    "no string": (lambda: NEURONS.renamed(lambda name: None), TypeError, r"renamed to a string, not 0\.weight -> None"),  # type: ignore[arg-type,return-value]
    "nothing renamed": (
        lambda: NEURONS.renamed({"o.weight": "x"}),
        ValueError,
        r"names= renames none of the layers of these neurons, which are 0\.weight",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), RENAMES.values(), ids=RENAMES)
def test_renames_that_are_refused(call: Callable[[], object], error: type[Exception], text: str) -> None:
    refuses(call, error, text)
