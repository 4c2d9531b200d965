"""What bad input says, scoring and evaluating: one table. Nothing changes on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kinds import built
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from zoo import CASES

import neuronsurgery as ns

MODEL = built("mlp")
LAYOUT = ns.find_layout(MODEL)
SCORES = ns.magnitudes(MODEL)
X, Y, G = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.long)
DATA = [(X, Y, G)]
ErrorRow = tuple[Callable[[], object], type[Exception], str]


def scored(data: Any = DATA, **options: Any) -> Callable[[], object]:
    return lambda: ns.group_grad_norms(MODEL, data, **options)


def hard(data: Any = DATA, **options: Any) -> Callable[[], object]:
    return lambda: ns.hard_batch(MODEL, data, **options)


def evaluated(data: Any = DATA, **options: Any) -> Callable[[], object]:
    return lambda: ns.evaluate(MODEL, data, **options)


def with_labels(labels: Any) -> list[Any]:
    return [(X, labels, G)]


# --- choosing -------------------------------------------------------------------------------------------------------

K = r"k must be an integer of at least 1, not "
SEED = "seed must be an integer of at least 0, not "
CHOOSING: dict[str, ErrorRow] = {
    "k = 0": (lambda: ns.topk(SCORES, 0), ValueError, K + "0"),
    "k negative": (lambda: ns.topk(SCORES, -1, per="layer"), ValueError, K + "-1"),
    "k a float": (lambda: ns.topk(SCORES, 1.5), ValueError, K + r"1\.5"),  # type: ignore[arg-type]
    "k a bool": (lambda: ns.topk(SCORES, True), ValueError, K + "True"),
    "k too large": (
        lambda: ns.topk(SCORES, 11),
        ValueError,
        "k = 11 is more than the 10 neurons of the model: choose fewer",
    ),
    "fraction 0": (lambda: ns.top_fraction(SCORES, 0), ValueError, r"fraction must lie in \(0, 1\], not 0: 0\.01 % is"),
    "fraction above 1": (lambda: ns.top_fraction(SCORES, 1.01), ValueError, r"must lie in \(0, 1\], not 1\.01"),
    "fraction NaN": (lambda: ns.top_fraction(SCORES, math.nan), ValueError, r"must lie in \(0, 1\], not nan"),
    "per": (lambda: ns.topk(SCORES, 1, per="block"), ValueError, "per must be 'model' or 'layer', not 'block'"),  # type: ignore[arg-type]
    "unknown group": (lambda: SCORES["blond"], KeyError, "no group 'blond'; there are 'all'"),
    "contrast of an unknown group": (
        lambda: ns.contrast(SCORES, of="all", against=0),
        KeyError,
        "no group 0; there are 'all'",
    ),
    "metric of an unknown group": (lambda: ns.evaluate(MODEL, DATA)["a"], KeyError, "no group 'a'; there are 0"),
    "sample of 0": (
        lambda: ns.sample(LAYOUT, 0, seed=0),
        ValueError,
        "k must be an integer from 1 to the 10 neurons there are to draw from, not 0",
    ),
    "sample of too many": (lambda: ns.sample(LAYOUT, 11, seed=0), ValueError, "from 1 to the 10 neurons .*, not 11"),
    "sample of nothing": (
        lambda: ns.sample(LAYOUT, 1, seed=0, exclude=ns.topk(SCORES, 10)),
        ValueError,
        "from 1 to the 0 neurons there are to draw from, not 1",
    ),
    "sample of scores": (
        lambda: ns.sample(SCORES, 1, seed=0),  # type: ignore[arg-type]
        TypeError,
        "sample draws from a Layout or from Neurons, not from a Scores",
    ),
    "seed negative": (lambda: ns.sample(LAYOUT, 1, seed=-1), ValueError, SEED + "-1"),
    "seed a float": (lambda: ns.sample(LAYOUT, 1, seed=0.5), ValueError, SEED + r"0\.5"),  # type: ignore[arg-type]
    "seed a bool": (lambda: ns.sample(LAYOUT, 1, seed=True), ValueError, SEED + "True"),
    "seed of hard examples": (hard(seed=-3), ValueError, SEED + "-3"),
    "no hard examples": (hard(top=0), ValueError, "top and sample must be at least 1, not 0 and 128"),
    "no drawn examples": (hard(sample=0), ValueError, "top and sample must be at least 1, not 256 and 0"),
}

# --- loaders and batches --------------------------------------------------------------------------------------------

ITERATOR = iter(DATA)
list(ITERATOR)
FORM = r"a loader yielded a Tensor; understood are \(inputs, targets\), \(inputs, targets, groups\), a mapping with"
EXHAUSTED = "An iterator or generator is exhausted after one pass; give a list or a DataLoader"
SOME_GROUPS = [(X, Y, G), (X, Y)]
LOADERS: dict[str, ErrorRow] = {
    "group without examples": (
        scored({"blond": DATA, "dark": []}),
        ValueError,
        rf"group 'dark' has no examples: its loader yielded no batch\. {EXHAUSTED}",
    ),
    "groups without examples, evaluated": (
        evaluated({"blond": DATA, "dark": [], 3: []}),
        ValueError,
        rf"no examples of 'dark', 3: the loader yielded no batch\. {EXHAUSTED}",
    ),
    "empty batches": (scored({"dark": [(X[:0], Y[:0])]}), ValueError, "group 'dark' has no examples"),
    "empty mixed batches": (scored([(X[:0], Y[:0], G[:0])]), ValueError, "the loader yielded no batch"),
    "exhausted iterator": (scored(ITERATOR), ValueError, rf"the loader yielded no batch\. {EXHAUSTED}"),
    "exhausted iterator of a group": (scored({"a": ITERATOR}), ValueError, rf"group 'a' has no .*{EXHAUSTED}"),
    "exhausted iterator, evaluated": (evaluated(ITERATOR), ValueError, rf"no examples of any group: .*{EXHAUSTED}"),
    "exhausted iterator, hard": (hard(ITERATOR), ValueError, rf"the loader yielded no batch\. {EXHAUSTED}"),
    "empty mapping": (scored({}), ValueError, "the mapping of loaders is empty: give at least one group"),
    "empty mapping, evaluated": (evaluated({}), ValueError, "the mapping of loaders is empty"),
    "unknown form": (scored([X]), TypeError, FORM),
    "unknown form, evaluated": (evaluated([X]), TypeError, FORM),
    "unknown form, hard": (hard([X]), TypeError, FORM),
    "a batch for a loader": (scored({"x": X, "labels": Y}), TypeError, FORM),
    "some batches with groups": (
        scored(SOME_GROUPS),
        ValueError,
        "some batches carry groups and some do not: give every batch its groups, or none",
    ),
    "groups that are floats": (
        scored([(X, Y, G.float())]),
        TypeError,
        r"groups are integers or strings, not float: convert them, e\.g\. groups\.long\(\)",
    ),
}

# --- labels, losses, metrics ----------------------------------------------------------------------------------------

SCALAR = r'loss must return one loss per example, shape \(4,\), not {}: write it with reduction="none"'
ACCURACY = r"accuracy needs logits \(example, class, ...\) of two or more classes and class indices \(int\)"


ONE_LOGIT = nn.Linear(5, 1)


def scalar_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


LABELS: dict[str, ErrorRow] = {
    "label too large": (scored(with_labels(Y + 1)), ValueError, r"labels must be 0\.\.2 for 3 classes, found \[3\]"),
    "label negative": (scored(with_labels(Y - 1)), ValueError, r"labels must be 0\.\.2 for 3 classes, found \[-1\]"),
    "label ignored": (scored(with_labels(Y * 0 - 100)), ValueError, r"for 3 classes, found \[-100\]"),
    "labels of hard examples": (hard(with_labels(Y + 9)), ValueError, r"for 3 classes, found \[9, 10, 11\]"),
    "labels of accuracy": (
        evaluated(with_labels(Y + 1)),
        ValueError,
        r"labels must be 0\.\.2 for 3 classes, found \[3\]",
    ),
    "labels of one logit": (
        lambda: ns.group_grad_norms(ONE_LOGIT, with_labels(Y)),
        ValueError,
        r"labels must be 0\.\.0 for 1 classes, found \[1, 2\]; for one logit pass loss= with binary_cross_entropy",
    ),
    "float labels": (
        scored(with_labels(Y.float())),
        ValueError,
        r"float targets are probabilities of the logits' shape \(4, 3\), not of shape \(4,\): give class indices \(tar",
    ),
    "float labels of another width": (scored(with_labels(torch.rand(4, 2))), ValueError, r"not of shape \(4, 2\)"),
    "labels in a column": (
        scored(with_labels(Y[:, None])),
        ValueError,
        r"class indices for logits of shape \(4, 3\) \(example, class, ...\) have shape \(4,\), not \(4, 1\)",
    ),
    "one-hot labels": (scored(with_labels(torch.eye(3)[Y].long())), ValueError, r"have shape \(4,\), not \(4, 3\)"),
    "token labels of one model": (
        lambda: ns.causal_lm_loss(torch.zeros(2, 3, 4), torch.zeros(2).long()),
        ValueError,
        r"takes logits \(example, token, vocabulary\) .* not shapes \(2, 3, 4\) and \(2,\)",
    ),
    "accuracy of float labels": (
        evaluated(with_labels(Y.float())),
        ValueError,
        ACCURACY + r".*torch.float32 of shape \(4,\): convert the targets, or pass metric=",
    ),
    "accuracy of a column": (evaluated(with_labels(Y[:, None])), ValueError, ACCURACY),
    "accuracy of one-hot labels": (
        lambda: ns.accuracy(torch.zeros(4, 4), torch.eye(4).long()),
        ValueError,
        ACCURACY + r".*torch.int64 of shape \(4, 4\)",
    ),
    "accuracy of one logit": (lambda: ns.evaluate(ONE_LOGIT, DATA), ValueError, ACCURACY),
    "scalar loss": (scored(loss=scalar_loss), ValueError, SCALAR.format(r"shape \(\)")),
    "loss of a matrix": (scored(loss=lambda logits, _: logits), ValueError, SCALAR.format(r"shape \(4, 3\)")),
    "loss of a float": (scored(loss=lambda *_: 1.0), ValueError, SCALAR.format("a float")),
    "scalar loss, hard": (hard(loss=scalar_loss), ValueError, SCALAR.format(r"shape \(\)")),
    "scalar metric": (
        evaluated(metric=scalar_loss),
        ValueError,
        r"metric must return one value per example, shape \(4,\), not shape \(\): average over anything but the",
    ),
    "metric of a float": (evaluated(metric=lambda *_: 1.0), ValueError, "one value per example, .* not a float"),
    "no metric": (evaluated(metric={}), ValueError, "the mapping of metrics is empty: give at least one"),
    "logits of other examples": (
        scored(predict=lambda logits: logits[:3]),
        ValueError,
        r"logits of shape \(3, 3\) for 4 examples; the first dimension must be the example: pass predict=",
    ),
    "no logits": (
        evaluated(predict=lambda logits: None),
        TypeError,
        "predict must return the logits, a tensor, not a NoneType",
    ),
    "unpack": (scored(unpack=lambda raw: raw), TypeError, r"unpack must return a neuronsurgery\.Batch, not a tuple"),
}

# --- numbers that are none ------------------------------------------------------------------------------------------


class Steep(nn.Module):
    """A finite loss whose gradient is infinite: the root of a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        nn.init.zeros_(self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).abs().sqrt())


STEEP = Steep()


def poisoned(bad: float) -> nn.Module:
    model = CASES["mlp"].build()
    with torch.no_grad():
        model[0].weight[2:4, 1] = bad  # type: ignore[index,union-attr]
    return model


def poisoned_data(bad: float) -> dict[str, Any]:
    inputs = X.clone()
    inputs[1, 0] = bad
    return {"fine": DATA, "dark": [(inputs, Y)]}


WEIGHTS = r"the model's weights are NaN or infinite in 1 layers:\n  0\.weight: 2 of 7 neurons\nFind the example or the"
LOSSES = r"the loss of 1 of 4 examples of group 'dark' is NaN or infinite: look for bad inputs"
NUMBERS: dict[str, ErrorRow] = {
    "NaN in a weight": (lambda: ns.group_grad_norms(poisoned(math.nan), DATA), ValueError, WEIGHTS),
    "infinity in a weight": (lambda: ns.group_grad_norms(poisoned(math.inf), DATA), ValueError, WEIGHTS),
    "NaN in a magnitude": (lambda: ns.magnitudes(poisoned(math.nan)), ValueError, WEIGHTS),
    "NaN in a loss": (scored(poisoned_data(math.nan)), ValueError, LOSSES),
    "infinity in a loss": (
        scored({"dark": DATA}, loss=lambda logits, _: logits.sum(1) / torch.tensor([1.0, 0, 1, 1])),
        ValueError,
        LOSSES,
    ),
    "NaN in a loss of mixed batches": (
        scored([(X * torch.tensor([[1.0], [math.nan], [1], [1]]), Y, G)]),
        ValueError,
        "the loss of 1 of 4 examples of group 0 is NaN or infinite",
    ),
    "NaN in a loss, hard": (
        hard(poisoned_data(math.nan)["dark"]),
        ValueError,
        "the loss of 1 of 4 examples of a batch is NaN or infinite",
    ),
    "infinity in a gradient": (
        lambda: ns.group_grad_norms(STEEP, {"blond": [(X, Y)]}),
        ValueError,
        r"the gradients of group 'blond' are NaN or infinite in 1 layers:\n  body\.weight: 5 of 5 neurons",
    ),
    "NaN in a gradient of one's own": (
        lambda: ns.grad_norms({"0.weight": torch.full((7, 5), math.nan), "2.weight": None}, LAYOUT),
        ValueError,
        r"the gradients are NaN or infinite in 1 layers:\n  0\.weight: 7 of 7 neurons",
    ),
    "gradients that do not fit": (
        lambda: ns.grad_norms({"0.weight": torch.ones(5, 7), "fc.weight": None}, LAYOUT),
        ValueError,
        r"2 layers of the layout have no fitting gradient:\n  0\.weight: expected shape \(7, 5\), given \(5, 7\)\n"
        r"  2\.weight: no gradient given\nGive one entry per layer",
    ),
}

# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    """Sharded by FSDP over two meshes of this process alone."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    rendezvous = tmp_path_factory.mktemp("mesh") / "meeting"
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=0, world_size=1)
    model = CASES["mlp"].build()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "parts")))  # type: ignore[index,call-overload]
    yield fully_shard(model)
    dist.destroy_process_group()


def quantised() -> nn.Module:
    model = CASES["mlp"].build()
    weight = torch.quantize_per_tensor(model[0].weight.detach(), 0.1, 0, torch.qint8)  # type: ignore[index,union-attr]
    model[0].weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[index,union-attr]
    return model


def packed() -> nn.Module:
    """A weight of a class that computes for itself, as torchao's quantised ones."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = CASES["mlp"].build()
    weight = model[0].weight.detach()  # type: ignore[index,union-attr]
    model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))  # type: ignore[index,union-attr]
    return model


REFUSED = r"1 of the model's tensors cannot be read or edited:\n  0\.weight: {}"
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (
        lambda: nn.Sequential(nn.Linear(5, 7, device="meta"), nn.Linear(7, 3)),
        "on the meta device, so it has no values; load the weights first",
    ),
    "complex": (lambda: nn.Sequential(nn.Linear(5, 7, dtype=torch.cfloat)), "of dtype complex64; only real floating"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(7)), r"not yet initialised \(a lazy module\); run the model on"),
    "quantised": (quantised, r"quantised or otherwise packed \(Parameter\); dequantise it first"),
    "packed": (packed, r"quantised or otherwise packed \(TwoTensor\); dequantise it first"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still about
@pytest.mark.parametrize(("build", "reason"), MODELS.values(), ids=MODELS)
def test_weights_that_cannot_be_read_are_refused(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=REFUSED.format(reason)):
        ns.magnitudes(model)
    with pytest.raises(ValueError, match=reason.replace("a lazy module", "lazy modules").partition(";")[0]):
        ns.group_grad_norms(model, DATA)


def test_what_is_sharded_over_two_meshes_is_not_run(sharded: nn.Module) -> None:
    layout = ns.find_layout(sharded)
    edit = ns.zero_out(ns.select(layout, {"0.weight": 0}))
    reason = r"4 of the model's tensors cannot .*\n  0\.weight: sharded over a mesh where others are over"
    for refused in (lambda: ns.group_grad_norms(sharded, DATA), lambda: ns.apply(edit, sharded)):
        with pytest.raises(ValueError, match=reason):
            refused()
    assert torch.equal(ns.magnitudes(sharded).values, ns.magnitudes(CASES["mlp"].build()).values)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_first_fsdp_is_refused(sharded: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    model = nn.Sequential(FullyShardedDataParallel(CASES["mlp"].build(), **options))
    edit = ns.zero_out(ns.select(ns.find_layout(CASES["mlp"].build()), {"0.weight": 0}))
    reason = r"1 of the model's tensors cannot .*\n  0: sharded by FullyShardedDataParallel \(FSDP1\); use fully_shard"
    for refused in (ns.group_grad_norms, ns.evaluate, lambda model, _: ns.apply(edit, model)):
        with pytest.raises(ValueError, match=reason):
            refused(model, DATA)


CALLS: dict[str, ErrorRow] = {
    "unknown layer": (scored(where="0.wieght"), KeyError, r"no layer matches '0\.wieght'; nearest are '0\.weight'"),
    "one unknown of several": (scored(where=["0.*", "9.*"]), KeyError, r"no layer matches '9\.\*'"),
    "unknown extra layer": (scored(extra="4.bias"), KeyError, r"no layer matches '4\.bias'; nearest are '.\.bias'"),
    "unknown layer, magnitudes": (lambda: ns.magnitudes(MODEL, where="x"), KeyError, "no layer matches 'x'"),
    "a predicate that keeps nothing": (
        scored(where=lambda name, module, parameter: False),
        ValueError,
        "the predicate where= keeps none of the 2 layers",
    ),
    "no model": (lambda: ns.group_grad_norms(3, DATA), TypeError, r"a model is a torch\.nn\.Module, not a int"),  # type: ignore[arg-type]
    "no model, evaluated": (lambda: ns.evaluate(DATA, MODEL), TypeError, r"torch\.nn\.Module, not a list"),  # type: ignore[call-overload]
    "no layer": (
        lambda: ns.group_grad_norms(nn.ReLU(), DATA),
        ValueError,
        "no layer found in ReLU: it has no weight of two or more dimensions outside embeddings; name what you want",
    ),
}

TABLE = {**CHOOSING, **LOADERS, **LABELS, **NUMBERS, **CALLS}


@pytest.mark.parametrize(("call", "error", "text"), TABLE.values(), ids=TABLE)
def test_bad_input_says_what_it_is_and_changes_nothing(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    before = snapshot(MODEL, DATA)
    with pytest.raises(error, match=text):
        call()
    assert_unchanged(before, MODEL, DATA)


def test_hard_examples_of_different_shapes() -> None:
    """Also where each group has one shape."""
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4, 3))
    data = [(torch.randn(2, 1, 8 + i), torch.tensor([0, 1]), torch.tensor([i, i])) for i in range(2)]
    for per_group in (False, True):
        with pytest.raises(ValueError, match=r"examples of different shapes, .* cannot be joined .*: pad them to one"):
            ns.hard_batch(model, data, per_group=per_group)


def test_gradients_in_inference_mode() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inside torch\.inference_mode\(\): leave it"),
    ):
        ns.group_grad_norms(MODEL, DATA)


def no_data() -> Iterator[Any]:
    raise AssertionError("the data were touched")
    yield


REFUSED_EARLY: dict[str, ErrorRow] = {
    "unknown layer": (lambda: ns.group_grad_norms(MODEL, no_data(), where="x"), KeyError, "no layer matches 'x'"),
    "bad weights": (lambda: ns.group_grad_norms(poisoned(math.inf), no_data()), ValueError, "weights are NaN"),
    "empty metrics": (lambda: ns.evaluate(MODEL, no_data(), metric={}), ValueError, "mapping of metrics is empty"),
    "bad seed": (lambda: ns.hard_batch(MODEL, no_data(), seed=-1), ValueError, "seed must be an integer"),
    "bad top": (lambda: ns.hard_batch(MODEL, no_data(), top=-1), ValueError, "top and sample must be at least 1"),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED_EARLY.values(), ids=REFUSED_EARLY)
def test_what_can_be_known_is_refused_before_the_data_are_read(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_labels_per_token_beside_inputs_of_other_shapes_are_no_tokens() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.head(x) * (lengths > 0).view(-1, 1, 1)  # type: ignore[no-any-return]

    x, lengths, labels = torch.randn(2, 5, 3), torch.tensor([5, 4]), torch.randint(4, (2, 5))
    found = ns.evaluate(Tagger(), [((x, lengths), labels)])
    assert found.counts == (2,)
