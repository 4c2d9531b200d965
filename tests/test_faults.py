"""Models, batches and losses that are no textbook classifiers: the right number, or one error before work begins."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import neuronsurgery as ns

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1] * 4)
G = torch.tensor([0, 0, 1, 1] * 2)


# --- objects among the inputs ---------------------------------------------------------------------------------------


@dataclass
class Graph:
    """Data with attributes, as graph libraries have them."""

    x: Tensor
    notes: dict[str, Tensor]


class Output(dict[str, Any]):
    """A mapping with attributes and places, as Hugging Face's outputs are."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]


class Writes(nn.Module):
    """A forward that works in its input object, which would go on from where it stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, data: Any) -> Tensor:
        if isinstance(data, Output):
            assert data.x is data[0]
            data["x"] = self.inner(data.x).relu()
            return self.head(data["x"])  # type: ignore[no-any-return]
        data.x = self.inner(data.x).relu()
        data.notes["seen"] = data.notes.get("seen", torch.zeros(())) + 1
        return self.head(data.x) * data.notes["seen"]  # type: ignore[no-any-return]


OBJECTS: dict[str, Callable[[], Any]] = {"dataclass": lambda: Graph(X, {}), "mapping": lambda: Output(x=X)}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_an_object_among_the_inputs_arrives_as_it_was_given_and_stays_so(make: Callable[[], Any]) -> None:
    model, data = Writes().eval(), make()
    batches = [ns.Batch((data,), {}, Y, G.tolist())]
    expected = ns.cross_entropy(model(make()), Y).mean().item()
    for _ in range(2):
        found = ns.evaluate(model, batches, metric=ns.cross_entropy)
        assert found.average == pytest.approx(expected)
    layout = ns.find_layout(model)
    edits = {f"{i}": ns.zero_out(ns.select(layout, {"inner.weight": i})) for i in range(3)}
    swept = ns.sweep(model, edits, batches, metric=ns.cross_entropy)
    assert swept.baseline == found
    for label, edit in edits.items():
        assert swept[label] == ns.evaluate(ns.apply(edit, model), batches, metric=ns.cross_entropy)
    assert ns.group_grad_norms(model, {"all": batches}).counts == (8,)
    assert data.x is X
    assert not isinstance(data, Graph) or data.notes == {}


def test_a_packed_sequence_is_kept() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 2)

        def forward(self, packed: PackedSequence) -> Tensor:
            assert isinstance(packed, PackedSequence)
            return self.head(self.rnn(packed)[1][0])  # type: ignore[no-any-return]

    model = Recurrent().eval()
    packed = pack_padded_sequence(torch.randn(6, 8, 4), torch.tensor([6, 5, 4, 4, 3, 2, 1, 1]))
    batch = ns.Batch((packed,), {}, Y)
    assert ns.evaluate(model, [batch], metric=ns.cross_entropy).average == pytest.approx(
        ns.cross_entropy(model(packed), Y).mean().item()
    )
    assert ns.group_grad_norms(model, {"all": [batch]}).counts == (8,)


# --- targets --------------------------------------------------------------------------------------------------------

NO_PROBABILITIES = {
    "one column": (nn.Linear(4, 1), torch.rand(8, 1), "of a single column"),
    "multi-hot": (nn.Linear(4, 3), torch.ones(8, 3), r"that sum to 3\.\.3"),
    "a regression": (nn.Linear(4, 3), torch.randn(8, 3) - 9, "with negative entries and that sum to"),
}


@pytest.mark.parametrize(("model", "targets", "reason"), NO_PROBABILITIES.values(), ids=NO_PROBABILITIES)
def test_float_targets_are_probabilities_or_refused(model: nn.Module, targets: Tensor, reason: str) -> None:
    message = rf"are probabilities of the classes, not numbers {reason}.*: for several labels per example, .* pass "
    with pytest.raises(ValueError, match=message + "loss="):
        ns.group_grad_norms(model, [(X, targets)])
    with pytest.raises(ValueError, match=message + "loss="):
        ns.evaluate(model, [(X, targets)], metric=ns.cross_entropy)
    if targets.shape[1] > 1:
        with pytest.raises(ValueError, match=message + "metric="):
            ns.evaluate(model, [(X, targets)])

    def bce(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    assert ns.group_grad_norms(model, [(X, targets)], loss=bce).values.abs().max() > 0


def test_labels_of_a_single_logit_are_refused_whatever_they_are() -> None:
    with pytest.raises(
        ValueError, match=r"the cross entropy over a single class is 0, whatever .*; for one logit pass"
    ):
        ns.group_grad_norms(nn.Linear(4, 1), [(X, torch.zeros(8, dtype=torch.long))])


def test_targets_that_are_not_finite_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match="not numbers that are not finite"):
        ns.evaluate(nn.Linear(4, 3), [(X, torch.full((8, 3), torch.nan))])


def test_probabilities_are_taken() -> None:
    soft = torch.rand(8, 3).softmax(1)
    assert ns.group_grad_norms(nn.Linear(4, 3), [(X, soft)]).values.min() > 0
    assert ns.evaluate(nn.Linear(4, 3), [(X, F.one_hot(Y, 3).float())]).counts == (8,)


# --- modules that are found in places of their own ------------------------------------------------------------------


def in_a_list() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = [model[0], model[1]]
    model.forward = lambda x: layers[1](layers[0](x).relu())  # type: ignore[method-assign]
    return model


def in_a_dictionary_of_tuples() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = {"both": (model[0], model[1])}
    model.forward = lambda x: layers["both"][1](layers["both"][0](x).relu())  # type: ignore[method-assign]
    return model


def in_a_default() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(x: Tensor, first: nn.Module = model[0], *, rest: tuple[nn.Module, ...] = (model[1],)) -> Tensor:
        return rest[0](first(x).relu())  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign]
    return model


class Pair(NamedTuple):
    first: nn.Module
    second: nn.Module


class Holder:
    """An object of a class of the caller's."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.rest = first, [second]

    def run(self, x: Tensor) -> Tensor:
        return self.rest[0](self.first(x).relu())  # type: ignore[no-any-return]


Forward = Callable[[Tensor], Any]


def first_then_second(held: Any, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Forward:
    return lambda x: second(held)(first(held)(x).relu())


def attributes(held: Any) -> Forward:
    return first_then_second(held, lambda held: held.first, lambda held: held.second)


def entries(held: Any) -> Forward:
    return first_then_second(held, lambda held: held[0], lambda held: held[1])


def in_an_object(held: dict[str, list[Holder]]) -> Forward:
    return lambda x: held["it"][0].run(x)


HOLDERS: dict[str, Callable[[nn.Module, nn.Module], Forward]] = {
    "ordered": lambda a, b: entries(OrderedDict([(0, a), (1, b)])),
    "named tuple": lambda a, b: attributes(Pair(a, b)),
    "deque": lambda a, b: entries(deque([a, b], maxlen=2)),
    "namespace": lambda a, b: attributes(SimpleNamespace(first=a, second=b)),
    "object": lambda a, b: in_an_object({"it": [Holder(a, b)]}),
    "method of an object": lambda a, b: Holder(a, b).run,
    "bound arguments": lambda a, b: functools.partial(lambda x, a, b: b(a(x).relu()), a=a, b=b),
}


def held_by(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model.forward = HOLDERS[name](model[0], model[1])  # type: ignore[method-assign]
        return model

    build.__name__ = name
    return build


def recursive() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(x: Tensor, again: bool = True) -> Any:
        return forward(model[0](x).relu(), again=False) if again else model[1](x)

    model.forward = forward  # type: ignore[method-assign]
    return model


def by_a_hook() -> nn.Module:
    """A hook that calls another layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Identity())
    model[2].register_forward_hook(lambda *_: model[1](model[0](X).relu()))
    return model


PATCHED = (in_a_list, in_a_dictionary_of_tuples, in_a_default, recursive, by_a_hook, *map(held_by, HOLDERS))


@pytest.mark.parametrize("build", PATCHED, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_a_replaced_forward_that_holds_layers_anywhere_runs_those_of_the_copy(build: Callable[[], nn.Module]) -> None:
    model = build()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": (0, 2)}))
    weight = model[0].weight.detach().clone()  # type: ignore[index]
    weight[[0, 2]] = 0
    hidden = F.linear(X, weight, model[0].bias).relu()  # type: ignore[index]
    expected = F.linear(hidden, model[1].weight, model[1].bias)  # type: ignore[index]
    for edited in (ns.apply(edit, model), ns.bake(edit, model)):
        torch.testing.assert_close(edited(X), expected)
    swept = ns.sweep(model, {"cut": edit}, [(X, Y)], metric=ns.cross_entropy)
    assert swept["cut"].average == pytest.approx(ns.cross_entropy(expected, Y).mean().item())


def closure_with_a_dictionary() -> nn.Module:
    model, kept = nn.Sequential(nn.Linear(4, 2)), {}  # type: ignore[var-annotated]

    def forward(x: Tensor) -> Any:
        if "weight" not in kept:
            kept["weight"] = model[0].weight.softmax(0)
        return x @ kept["weight"].T

    model.forward = forward  # type: ignore[method-assign]
    return model


def closure_with_a_variable() -> nn.Module:
    model, kept = nn.Sequential(nn.Linear(4, 2)), None

    def forward(x: Tensor) -> Any:
        nonlocal kept
        if kept is None:
            kept = model[0].weight.softmax(0)
        return x @ kept.T

    model.forward = forward  # type: ignore[method-assign]
    return model


def closure_with_a_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2))

    @functools.lru_cache
    def weight() -> Tensor:
        return model[0].weight.softmax(0)

    model.forward = lambda x: x @ weight().T  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("build", [closure_with_a_dictionary, closure_with_a_variable, closure_with_a_memory])
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_what_a_closure_keeps_is_none_of_another_copy_s(build: Callable[[], nn.Module]) -> None:
    model: Any = build().eval()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))
    weight = model[0].weight.detach().clone()
    unedited = X @ weight.softmax(0).T
    weight[0] = 0
    right = X @ weight.softmax(0).T
    for edited in (ns.apply(edit, model), ns.bake(edit, model)):
        torch.testing.assert_close(edited(X), right)
    swept = ns.sweep(model, {"cut": edit}, [(X, Y)] * 2, metric=ns.cross_entropy)
    assert swept["cut"].average == pytest.approx(ns.cross_entropy(right, Y).mean().item())
    ns.group_grad_norms(model, [(X, Y)] * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(X), unedited)
    if build is not closure_with_a_memory:
        with pytest.raises(ValueError, match=r"the forward computes with 'kept' of module '' .* come of 0\.weight as"):
            ns.apply(edit, model)


def test_functions_in_a_container_call_the_copy() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(4, 4), nn.Linear(4, 2), [0]
            self.steps = [lambda x: self.a(x).relu(), lambda x: self.b(x), self.seen]

        def forward(self, x: Tensor) -> Tensor:
            return self.steps[1](self.steps[0](x))  # type: ignore[operator,no-any-return]

    model = Steps().eval()
    plain = nn.Sequential(model.a, nn.ReLU(), model.b)
    view: Any = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"a.weight": 0})), model)
    assert torch.equal(view(X), ns.bake(ns.zero_out(ns.select(ns.find_layout(plain), {"0.weight": 0})), plain)(X))
    assert view.steps[2] is view.seen is not model.seen


@pytest.mark.filterwarnings("ignore:no gradient reached")
def test_a_replaced_forward_that_holds_a_bare_parameter_is_refused() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 2))
        held = {"weight": [model[0].weight]}
        model.forward = lambda x: x @ held["weight"][0].T  # type: ignore[method-assign]
        return model

    model = build()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))
    for refused in (lambda: ns.apply(edit, model), lambda: ns.sweep(model, {"cut": edit}, [(X, Y)])):
        with pytest.raises(ValueError, match=r"0\.weight is also held by a plain attribute of module ''"):
            refused()
    with pytest.warns(UserWarning, match=r"some scored parameters are held by plain attributes, too: 0\.weight"):
        ns.group_grad_norms(model, [(X, Y)])


def test_a_tensor_that_torch_prunes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    message = r"0\.weight_orig: only what a hook computes .*; use torch\.nn\.utils\.prune\.remove\(module, name\)"
    for refused in (ns.magnitudes, ns.find_layout, lambda m: ns.group_grad_norms(m, [(X, Y)])):
        with pytest.raises(ValueError, match=message):
            refused(model)
    prune.remove(model[0], "weight")
    assert ns.magnitudes(model).values.shape == (1, 6)


# --- what belongs to the caller, and to other threads ---------------------------------------------------------------


def test_a_capture_that_fails_leaves_no_mark_on_the_inputs() -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * (1 if x.sum().item() > 1e9 else 2)  # type: ignore[no-any-return]

    model, x = Refused(), X.clone()
    before = set(vars(x))
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"head.weight": 0}))
    with pytest.warns(UserWarning, match="no part of the model's forward is shared"):
        ns.sweep(model, {"cut": edit}, [(x, Y)])
    assert set(vars(x)) == before


def test_other_threads_keep_their_draws_and_the_process_its_switches() -> None:
    """Draws of this thread while others evaluate and sweep: none may come again."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2))
    data = [(X, Y, G)] * 3
    layout = ns.find_layout(model)
    edits = {f"{i}": ns.zero_out(ns.select(layout, {"0.weight": i})) for i in range(4)}
    alone = ns.evaluate(model, data, metric=ns.cross_entropy), ns.sweep(model, edits, data, metric=ns.cross_entropy)
    switches = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), list(warnings.filters)
    results: list[Any] = []

    def work(call: Callable[[], Any], times: int) -> Callable[[], None]:
        return lambda: results.extend(call() for _ in range(times))

    calls = [
        work(lambda: ns.evaluate(model, data, metric=ns.cross_entropy), 30),
        *[work(lambda: ns.sweep(model, edits, data, metric=ns.cross_entropy), 3)] * 2,
    ]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    drawn = []
    while any(thread.is_alive() for thread in threads):
        drawn.append(tuple(torch.randint(2**62, (2,)).tolist()))
    assert len(set(drawn)) == len(drawn) > 10
    assert len(results) == 36 and all(result in alone for result in results)
    assert switches == (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), list(warnings.filters))


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_draws_is_still_put_back_beside_another_thread(fails: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x + torch.randn(x.shape))
            if fails:
                raise ArithmeticError("after it has drawn")
            return logits

    done = threading.Event()
    idle = threading.Thread(target=done.wait, daemon=True)
    idle.start()
    model, before = Noisy(), torch.get_rng_state()
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        ns.evaluate(model, [(X, Y)])
    assert torch.equal(torch.get_rng_state(), before)
    done.set()
    idle.join()


# --- examples that depend on each other -----------------------------------------------------------------------------


def contrastive(logits: Tensor, targets: Tensor) -> Tensor:
    """In-batch negatives: each example against all others of its batch."""
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="none")


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 2))


MIXED = [(X[:5], Y[:5], G[:5]), (X[5:], Y[5:], G[5:])]
DEPENDENT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a loss of the whole batch": (lambda: nn.Linear(4, 2), contrastive, "losses"),
    "batch norm without running statistics": (batch_norm, None, "logits"),
}
every_dependence = pytest.mark.parametrize(("build", "loss", "what"), DEPENDENT.values(), ids=DEPENDENT)


@every_dependence
def test_examples_that_depend_on_each_other_are_not_taken_apart(
    build: Callable[[], nn.Module], loss: Any, what: str
) -> None:
    message = rf"the {what} of \d examples alone differ from those within their batch, by .*: pass regroup=False"
    with pytest.raises(ValueError, match=message):
        ns.group_grad_norms(build(), MIXED, loss=loss)


@every_dependence
def test_without_regrouping_each_batch_is_one_forward_pass_as_it_came(
    build: Callable[[], nn.Module], loss: Any, what: str
) -> None:
    model = build().eval()
    found = ns.group_grad_norms(model, MIXED, loss=loss, regroup=False)
    layers = {layer.parameter: model.get_parameter(layer.parameter) for layer in found.layout}
    for group in (0, 1):
        total = {name: torch.zeros_like(weight) for name, weight in layers.items()}
        for x, y, g in MIXED:
            losses = (loss or ns.cross_entropy)(model(x), y)[g == group].sum()
            gradients = torch.autograd.grad(losses, list(layers.values()))
            total = {name: total[name] + gradient for name, gradient in zip(layers, gradients, strict=True)}
        expected = torch.cat([gradient.norm(dim=1) for gradient in total.values()]) / int((group == G).sum())
        torch.testing.assert_close(found[group].values[0], expected, rtol=1e-4, atol=1e-6)


def test_regrouping_or_not_gives_the_same_where_examples_are_independent() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    apart, whole = (ns.group_grad_norms(model, MIXED, regroup=regroup) for regroup in (True, False))
    assert (apart.groups, apart.counts) == (whole.groups, whole.counts)
    torch.testing.assert_close(apart.values, whole.values, rtol=1e-4, atol=1e-6)
    del passes[:]
    ns.group_grad_norms(model, MIXED, regroup=False)
    assert len(passes) == 2, "one forward pass a batch, whatever the groups in it"


class BySteps(nn.Module):
    """Its inputs have the time first, and are as many steps long as the batch has examples."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][0])  # type: ignore[no-any-return]


def test_a_first_dimension_that_is_no_example_by_chance() -> None:
    model, x = BySteps(), torch.randn(8, 8, 4)
    message = r"\d examples cannot be told from their batch: the model returned logits of shape \(8, 2\) for \d .*"
    with pytest.raises(ValueError, match=message + r"example first, or keep batches together \(regroup=False"):
        ns.group_grad_norms(model, [(x, Y, torch.zeros(8, dtype=torch.long))])
    with pytest.raises(ValueError, match=message):
        ns.hard_batch(model, [(x, Y)])
    found = ns.group_grad_norms(model, [(x, Y, G)], regroup=False)
    right = {group: [(x, Y)] for group in (0, 1)}
    loss = {
        group: lambda logits, targets, group=group: ns.cross_entropy(logits, targets) * (group == G) for group in right
    }
    for group, data in right.items():
        by_hand = ns.group_grad_norms(model, {group: data}, loss=loss[group])
        torch.testing.assert_close(found[group].values, by_hand.values * 2)


class PerClass(nn.Linear):
    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        return super().forward(x) * temperature


def test_a_tensor_with_one_entry_per_class_is_not_taken_apart() -> None:
    """There are as many classes as examples in a batch, and groups come to as many, too."""
    model, temperature = PerClass(4, 8), torch.rand(8) + 0.5
    data = [({"x": torch.randn(8, 4), "temperature": temperature}, torch.arange(8), G) for _ in range(2)]
    message = r"tensor 2 of the inputs, of shape \(8,\), is not one entry per example.*regroup=False"
    for refused in (lambda: ns.group_grad_norms(model, data), lambda: ns.hard_batch(model, data)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert ns.group_grad_norms(model, data, regroup=False).counts == (8, 8)


def test_the_hardest_of_dependent_examples_are_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"the logits of 4 examples alone differ .*\. The examples were chosen by their"
    ):
        ns.hard_batch(batch_norm(), [(X, Y)], top=4, sample=2)


def test_a_first_batch_of_one_does_not_spend_the_check_of_the_hardest() -> None:
    with pytest.warns(UserWarning, match=r"the losses of 4 examples alone differ"):
        ns.hard_batch(nn.Linear(4, 2), [(X[:1], Y[:1]), (X[1:], Y[1:])], loss=contrastive)


def test_a_first_batch_of_one_does_not_spend_the_check() -> None:
    one = [(X[:1], Y[:1], torch.tensor([0]))]
    with pytest.raises(ValueError, match="pass regroup=False"):
        ns.group_grad_norms(nn.Linear(4, 2), one + MIXED, loss=contrastive)


def test_what_cannot_be_checked_is_said() -> None:
    class OfFour(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 4, "only by fours"
            return super().forward(x)

    data = [(X[:4], Y[:4], G[:4].clone().zero_()), (X[4:], Y[4:], G[4:].clone().zero_())]
    with pytest.warns(
        UserWarning, match=r"whether examples depend on each other was not checked: 3 .* \(only by fours"
    ):
        assert ns.group_grad_norms(OfFour(4, 2), data).counts == (8,)


class Upcast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float() * 3


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_rounding_in_half_precision_is_no_dependence(how: str) -> None:
    """Whatever the dtype of the logits: kernels round other shapes in another way."""
    model = Upcast(64, 3)
    x, y, g = torch.randn(64, 64) * 9, torch.arange(64) % 3, torch.arange(64) % 2
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ns.group_grad_norms(model.bfloat16() if how == "weights" else model, [(x, y, g)])


def test_a_model_that_draws_is_not_taken_for_a_dependent_one() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn(x.shape[::-1]).T)

    assert ns.group_grad_norms(Noisy(4, 2), MIXED).counts == (4, 4)


@pytest.mark.parametrize(
    ("weight", "value", "count"),
    [(2e-4, 2e4, 8), (5.0, 1.0, 4096)],
    ids=["large inputs: the multiple overflows", "many examples: each has a small share"],
)
def test_sure_and_right_in_half_precision(weight: float, value: float, count: int) -> None:
    """The gradient of the mean loss fits into float16; its multiple does not, or an example's share of it."""
    model = nn.Linear(1, 2, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[weight], [-weight]]))
    x, y = torch.full((count, 1), value).half(), torch.zeros(count, dtype=torch.long)
    wide = model.weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(x.double() @ wide.T, y), wide)
    found = ns.group_grad_norms(model, [(x, y)]).values.double()
    torch.testing.assert_close(found, expected.abs().T, rtol=0.02, atol=0)
    both = ns.group_grad_norms(model, [(x, y, torch.arange(count) % 2)], regroup=False).values.double()
    torch.testing.assert_close(both, expected.abs().T.expand(2, -1), rtol=0.02, atol=0)


# --- what modules keep from one forward pass to the next ------------------------------------------------------------


class Table(nn.Module):
    """Computes a bias table from a parameter, and may keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3))

    def compute(self) -> Tensor:
        return self.table.T.softmax(0)

    def kept(self) -> Tensor:
        return self.compute()

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.compute() if self.training else self.kept()).T


class InADictionary(Table):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def kept(self) -> Tensor:
        return self.cache.setdefault("bias", self.compute())


class InAnAttribute(Table):
    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    def train(self, mode: bool = True) -> Any:
        self.bias = None
        return super().train(mode)

    def kept(self) -> Tensor:
        if self.bias is None:
            self.bias = self.compute()
        return self.bias


class InATuple(Table):
    """Whose constructor assigns several at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pair: tuple[Tensor, str] | None
        self.by_device: dict[str, list[Tensor]]
        self.pair, self.by_device = None, defaultdict(list)

    def kept(self) -> Tensor:
        if self.pair is None:
            self.pair = (self.compute(), "cpu")
            self.by_device["cpu"].append(self.pair[0])
        return (self.pair[0] + self.by_device["cpu"][0]) / 2


class MadeLate(Table):
    def kept(self) -> Tensor:
        if not hasattr(self, "_late"):
            self._late = self.compute()
        return self._late


class AtTheSwitch(Table):
    """Filled when evaluation begins, as a layer that is fused is."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: Tensor | None = None

    def train(self, mode: bool = True) -> Any:
        self.fused = None if mode else self.compute().detach()
        return super().train(mode)

    def kept(self) -> Tensor:
        return self.compute() if self.fused is None else self.fused


class Inherited(InAnAttribute):
    """Its forward is that of a base class, by way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Counted(Table):
    """A counter goes with the cache, and a method that the constructor calls empties both."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.length, self.__bias = 0, None

    def kept(self) -> Tensor:
        if self.length < 3:
            self.length, self.__bias = 3, self.compute()
        return self.__bias  # type: ignore[return-value]


def fill(module: Any) -> Tensor:
    if module.bias is None:
        module.bias = module.compute()
    return module.bias  # type: ignore[no-any-return]


class ByAFunction(Table):
    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    def kept(self) -> Tensor:
        return fill(self)


class InADeque(Table):
    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[Tensor] = deque(maxlen=2)

    def kept(self) -> Tensor:
        if not self.queue:
            self.queue.append(self.compute())
        return self.queue[0]


class InABuffer(Table):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", None)

    def kept(self) -> Tensor:
        if self.bias is None:
            self.bias = self.compute()
        return self.bias  # type: ignore[no-any-return]


class AsAProperty(Table):
    @functools.cached_property
    def bias(self) -> Tensor:
        return self.compute()

    def kept(self) -> Tensor:
        return self.bias


class OfTheClass(Table):
    shared: ClassVar[dict[int, Tensor]] = {}

    def kept(self) -> Tensor:
        if 0 not in self.shared:
            self.shared[0] = self.compute()
        return self.shared[0]


class ByLruCache(Table):
    @functools.lru_cache(maxsize=4)  # noqa: B019  # the fault that is meant
    def kept(self) -> Tensor:
        return self.compute()


class Store:
    value: Tensor | None = None


class InAnObject(Table):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()

    def kept(self) -> Tensor:
        if self.store.value is None:
            self.store.value = self.compute()
        return self.store.value


class FromTheStart(Table):
    def __init__(self) -> None:
        super().__init__()
        self.bias = self.compute()

    def kept(self) -> Tensor:
        return self.bias


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.bias.T  # type: ignore[no-any-return,union-attr]


class InAChild(Table):
    """Which reads what its parent writes."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Child()

    def forward(self, x: Tensor) -> Tensor:
        if self.child.bias is None:
            self.child.bias = self.compute()
        return self.child(x)  # type: ignore[no-any-return]


class BehindASetter(Table):
    def __init__(self) -> None:
        super().__init__()
        self._bias: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @bias.setter
    def bias(self, value: Tensor) -> None:
        self._bias = value

    def kept(self) -> Tensor:
        if self.bias is None:
            self.bias = self.compute()
        return self.bias


CACHES = (
    *(InADictionary, InAnAttribute, InATuple, InADeque, AtTheSwitch, MadeLate, AsAProperty, OfTheClass, ByLruCache),
    *(Inherited, Counted, ByAFunction, InAChild, BehindASetter),
)
every_cache = pytest.mark.parametrize("kind", CACHES)


def cached(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Table]:
    """A model that has run, so that its cache is full, and one of the same weights that keeps nothing."""
    model, plain = kind().eval(), Table()
    if kind is OfTheClass:
        OfTheClass.shared.clear()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        model(X)
    return model, plain


@every_cache
def test_a_cache_of_a_parameter_does_not_survive_into_copies(kind: Callable[[], nn.Module]) -> None:
    model, plain = cached(kind)
    before = snapshot(model)
    edits = {f"{i}": ns.zero_out(ns.select(ns.find_layout(model), {"table": i})) for i in range(4)}
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no part of the model's forward is shared")
        swept = ns.sweep(model, edits, data, metric=ns.cross_entropy)
    for label, edit in edits.items():
        right = ns.bake(edit, plain)(X)
        for edited in (ns.apply(edit, model), ns.bake(edit, model), ns.apply(edit, ns.apply(ns.compose(), model))):
            assert torch.equal(edited(X), right)
        assert swept[label] == ns.evaluate(ns.bake(edit, plain), data, metric=ns.cross_entropy)
    assert_unchanged(before, model)


@every_cache
def test_a_cache_of_a_parameter_does_not_survive_into_a_second_backward_pass(kind: Callable[[], nn.Module]) -> None:
    model, plain = cached(kind)
    for data in ([(X[:4], Y[:4]), (X[4:], Y[4:])], MIXED):
        torch.testing.assert_close(ns.group_grad_norms(model, data).values, ns.group_grad_norms(plain, data).values)


class ByAMethod(Table):
    """Which the caller calls, and which autograd says nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    @torch.no_grad()
    def prepare(self) -> Tensor:
        weight = self.compute()
        self.bias = weight
        return weight

    def kept(self) -> Tensor:
        return self.compute() if self.bias is None else self.bias


def prepared() -> nn.Module:
    model = ByAMethod()
    model.prepare()
    return model


prepared.__name__ = "ByAMethod"


@pytest.mark.parametrize(("kind", "name"), [(InAnObject, "store"), (FromTheStart, "bias"), (prepared, "bias")])
@pytest.mark.filterwarnings("ignore:no gradient reached")
def test_what_cannot_be_computed_anew_is_refused_or_warned_of(kind: Callable[[], nn.Module], name: str) -> None:
    model, _ = cached(kind)
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"table": 0}))
    message = rf"the forward computes with '{name}' of module '' \({kind.__name__}\), which may come of table as it was"  # type: ignore[attr-defined]
    for refused in (ns.apply, ns.bake, ns.edited_parameters):
        with pytest.raises(ValueError, match=message + r" before .*: set it back to what it was before"):
            refused(edit, model)
    with pytest.raises(ValueError, match=r"edit 'cut': " + message):
        ns.sweep(model, {"cut": edit}, [(X, Y)])
    with pytest.warns(UserWarning, match=rf"held by plain attributes, too: table \(by '{name}' of module ''"):
        ns.group_grad_norms(model, [(X, Y)])


def test_what_the_constructor_or_the_caller_puts_into_an_attribute_is_no_cache() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.scale, self.masks, self.mask = torch.full((2,), 3.0), {"a": torch.ones(2)}, None
            self.seen: list[Tensor] = []
            self.made = self.make()

        def make(self) -> Tensor:
            return torch.ones(2)

        def set_mask(self, mask: Tensor) -> None:
            self.mask = mask  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return super().forward(x) * self.scale * self.masks["a"] * self.made * self.mask  # type: ignore[operator]

    model = Masked()
    model.set_mask(torch.tensor([0.0, 1.0]))
    model(X)
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"weight": 1})), model)
    assert torch.equal(
        view(X), (torch.stack([model.weight[0], torch.zeros(4)]) @ X.T).T * 0 + model.bias * 3 * model.mask
    )


class NormAsANumber(Table):
    def __init__(self) -> None:
        super().__init__()
        self.norm = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == 0:
            self.norm = self.table.norm().item()
        return x @ self.compute().T / self.norm


class NormMadeLate(Table):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "norm"):
            self.norm = self.table.norm().item()
        return x @ self.compute().T / self.norm


class NormInAnArray(Table):
    def __init__(self) -> None:
        super().__init__()
        self.norm: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            self.norm = self.table.detach().norm().numpy()
        return x @ self.compute().T / float(self.norm)


@pytest.mark.parametrize("kind", [NormAsANumber, NormMadeLate, NormInAnArray])
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_a_number_that_was_computed_from_a_parameter_is_a_cache_too(kind: Callable[[], nn.Module]) -> None:
    model: Any = kind().eval()
    model(X)
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"table": 1}))
    table = model.table.detach().clone()
    table[1] = 0
    right = X @ table.T.softmax(0).T / table.norm()
    for edited in (ns.apply(edit, model), ns.bake(edit, model)):
        torch.testing.assert_close(edited(X), right)
    swept = ns.sweep(model, {"cut": edit}, [(X, Y)], metric=ns.cross_entropy)
    assert swept["cut"].average == pytest.approx(ns.cross_entropy(right, Y).mean().item())


class Counting(Table):
    """Whose state is written to in place: a tensor, an entry of an object, a variable of a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.store = torch.zeros(()), SimpleNamespace(value=torch.zeros(()), times=0)
        times = 0

        def count() -> int:
            nonlocal times
            times += 1
            return times

        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.store.value += 1
        self.store.times += 1
        return x @ self.compute().T * self.calls * self.store.value * self.store.times * self.count()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_what_a_forward_writes_in_place_does_not_leak_from_one_edit_to_the_next() -> None:
    model = Counting().eval()
    layout = ns.find_layout(model)
    edits = {f"{i}": ns.zero_out(ns.select(layout, {"table": i})) for i in range(4)}
    swept = ns.sweep(model, edits, [(X, Y)], metric=ns.cross_entropy)
    for label, edit in edits.items():
        plain = Table()
        plain.load_state_dict(model.state_dict())
        assert swept[label] == ns.evaluate(ns.bake(edit, plain), [(X, Y)], metric=ns.cross_entropy)
    assert model.calls == 0 and model.store.value == 0 and model.count() == 1


KEPT: dict[str, Tensor] = {}


class Elsewhere(Table):
    def kept(self) -> Tensor:
        if "bias" not in KEPT:
            KEPT["bias"] = self.compute()
        return KEPT["bias"]


@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_a_sweep_says_where_edits_change_nothing_since_what_they_change_is_not_read() -> None:
    KEPT.clear()
    model = Elsewhere().eval()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"table": 0}))
    with pytest.warns(UserWarning, match=r"edits of table changed no output: either nothing reads .* \(a global dict"):
        ns.sweep(model, {"cut": edit}, [(X, Y)])


def test_a_sweep_says_nothing_of_neurons_that_are_silent_here() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias[0] = -99
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))
    swept = ns.sweep(model, {"cut": edit}, [(X, Y)], metric=ns.cross_entropy)
    assert swept["cut"] == swept.baseline


def test_the_memory_of_a_method_is_everybody_s_and_stays() -> None:
    ByLruCache.kept.cache_clear()  # type: ignore[attr-defined]
    model, other = ByLruCache().eval(), ByLruCache().eval()
    other(X)
    ns.group_grad_norms(model, {"a": [(X, Y)], "b": [(X, Y)]})
    assert ByLruCache.kept.cache_info().currsize == 1  # type: ignore[attr-defined]


class State(nn.Module):
    """What the caller sets, and what the forward carries, is no cache, whatever else its code does."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux, self.maps = nn.Linear(4, 2), torch.tensor(0.0), {}  # type: ignore[var-annotated]
        self.shift, self.index, self.gamma = torch.arange(4.0), torch.tensor([1]), nn.Parameter(torch.ones(4))
        self.mask: Tensor | None = None
        self.seen = torch.zeros(4)

    def note(self, x: Tensor) -> Tensor:
        self.maps["x"] = x.data
        return F.relu_(x * self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x * self.shift]
        outputs.append(x if self.mask is None else torch.add(x, self.mask))
        y = self.note(sum(outputs, self.seen))  # type: ignore[arg-type]
        y[:, self.index] = 0
        self.aux = y.mean()
        self.seen = self.seen + 1
        return self.head(y) * self.aux  # type: ignore[no-any-return]


def test_what_the_caller_sets_and_the_forward_carries_stays() -> None:
    model = State().eval()
    model.mask = torch.tensor([1.0, 0.0, 5.0, 1.0])
    with torch.no_grad():
        model(X)
    before = snapshot(model)
    right = copy.deepcopy(model)(X)
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"head.weight": 0}))
    assert torch.equal(ns.apply(ns.compose(), model)(X), right)
    assert torch.equal(ns.bake(ns.compose(), model)(X), right)
    assert torch.equal(ns.apply(cut, model)(X), ns.bake(cut, copy.deepcopy(model))(X))
    own = copy.deepcopy(model)
    losses = torch.cat([ns.cross_entropy(own(X[part]), Y[part]) for part in (slice(0, 4), slice(4, 8))])
    found = ns.evaluate(model, [(X[:4], Y[:4]), (X[4:], Y[4:])], metric=ns.cross_entropy)
    assert found.average == pytest.approx(losses.mean().item()), "as a loop of one's own, which carries the state"
    assert_unchanged(before, model)


def test_a_buffer_that_is_made_in_a_forward_pass_is_of_that_pass() -> None:
    model, plain = InABuffer().eval(), Table()
    plain.load_state_dict(model.state_dict())
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"table": 0}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no part of the model's forward is shared")
        swept = ns.sweep(model, {"cut": edit}, data, metric=ns.cross_entropy)
    assert swept["cut"] == ns.evaluate(ns.bake(edit, plain), data, metric=ns.cross_entropy)
    torch.testing.assert_close(ns.group_grad_norms(model, data).values, ns.group_grad_norms(plain, data).values)


# --- methods that would reach the model through a view --------------------------------------------------------------


def test_what_writes_into_the_weights_is_refused_by_a_view_and_not_by_its_copies() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.delta = nn.Linear(4, 2), nn.Parameter(torch.ones(2, 4))
            self.data = "an attribute of this name is the module's own"

        def merge(self) -> None:
            self.base.weight.data += self.delta

        def restart(self) -> None:
            nn.init.zeros_(self.delta)

        def rows(self, count: int) -> None:
            self.base.weight.data[:count] = 0

        def rename(self) -> None:
            self.data = "another"

        def teach(self, base: nn.Linear) -> None:
            nn.init.ones_(base.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.delta.T  # type: ignore[no-any-return]

    model, other = Adapted(), nn.Linear(4, 2)
    before = snapshot(model)
    view: Any = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"delta": 0})), model)
    for call in (view.merge, view.restart, lambda: view.rows(1), view.base.reset_parameters):
        with pytest.raises(RuntimeError, match=r"this view shares its weights with the model .*, or use bake"):
            call()
    view.rename()
    view.teach(other)
    assert_unchanged(before, model)
    for independent in (copy.deepcopy(view), ns.bake(ns.compose(), view)):
        independent.rows(2)
        assert independent.base.weight.abs().max() == 0
    weight = model.base.weight.detach().clone()
    model.merge()
    assert torch.equal(model.base.weight, weight + 1)


def zeroed(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)


class Rewritten(nn.Module):
    """Methods whose source does not name what they write into."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 2)

    def halve(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.5)

    def shrink(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= 0.5

    def local(self) -> None:
        with torch.no_grad():
            weight = self.base.weight
            weight[0] = 0

    def load_vector(self) -> None:
        nn.utils.vector_to_parameters(torch.zeros(10), self.parameters())

    def by_a_helper(self) -> None:
        zeroed(self.base)

    def initialise(self) -> None:
        self.apply(zeroed)

    def fit(self) -> None:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        total = 0.0
        self.base(X).sum().backward()
        optimizer.step()
        total += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)  # type: ignore[no-any-return]


WRITERS = ("halve", "shrink", "local", "load_vector", "by_a_helper", "initialise")


@pytest.mark.parametrize("edited", [True, False])
@pytest.mark.parametrize("name", [*WRITERS, "apply"])
def test_a_write_into_shared_weights_is_stopped_before_it_happens(name: str, edited: bool) -> None:
    model = Rewritten()
    before = snapshot(model)
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"base.weight": 0}))
    view: Any = ns.apply(cut if edited else ns.compose(), model)
    arguments = (zeroed,) if name == "apply" else ()
    message = r"(it would write into (base\.|an edited tensor)|this view shares).*, or use bake for an independent copy"
    with pytest.raises(RuntimeError, match=message):
        getattr(view, name)(*arguments)
    assert_unchanged(before, model)
    own: Any = copy.deepcopy(view)
    getattr(own, name)(*arguments)
    getattr(ns.bake(cut, model), name)(*arguments)
    assert_unchanged(before, model)


def test_an_optimiser_within_a_method_trains_the_shared_weights() -> None:
    model = Rewritten()
    weight = model.base.weight.detach().clone()
    view: Any = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"base.weight": 0})), model)
    view.fit()
    assert torch.equal(model.base.weight[0], weight[0]) and not torch.equal(model.base.weight[1], weight[1])


class Clamped(nn.Linear):
    """A forward that writes into its weight, as networks for EEG do, to keep its norm."""

    how = "data"

    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data":
            self.weight.data.clamp_(-0.1, 0.1)
        elif self.how == "assigned":
            self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        else:
            with torch.no_grad():
                weight = self.weight
                weight.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("how", ["data", "assigned", "local"])
@pytest.mark.filterwarnings("ignore:no part of the model's forward is shared")
def test_a_forward_that_writes_into_a_weight_writes_into_a_copy(how: str) -> None:
    model = Clamped().eval()
    Clamped.how = how
    before = snapshot(model)
    edit = ns.scale(ns.select(ns.find_layout(model), {"weight": 0}), 3.0)
    data = [(X[:4], Y[:4], G[:4]), (X[4:], Y[4:], G[4:])]
    swept = ns.sweep(model, {"cut": edit}, data, metric=ns.cross_entropy)
    for found, applied in ((swept["cut"], edit), (swept.baseline, ns.compose())):
        values = ns.bake(applied, model).weight.detach().clamp(-0.1, 0.1)  # type: ignore[operator,union-attr]
        expected = ns.cross_entropy(F.linear(X, values, model.bias), Y).mean().item()
        assert found.average == pytest.approx(expected)
        assert ns.evaluate(ns.bake(applied, model), data, metric=ns.cross_entropy) == found
    assert swept["cut"] != swept.baseline
    ns.group_grad_norms(model, data)
    with pytest.raises(RuntimeError, match="it would write into an edited tensor"):
        ns.apply(edit, model)(X)
    with pytest.raises(RuntimeError, match="it would write into weight, and this view shares its weights"):
        ns.apply(ns.compose(), model)(X)
    assert_unchanged(before, model)


def halved(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, edit: ns.evaluate(model, [(X, Y)]),
        lambda model, edit: ns.group_grad_norms(model, [(X, Y)]),
        lambda model, edit: ns.hard_batch(model, [(X, Y)]),
        lambda model, edit: ns.sweep(model, {"cut": edit}, [(X, Y)]),
    ],
    ids=["evaluate", "scores", "hard", "sweep"],
)
def test_a_forward_that_writes_into_a_weight_unseen_is_refused_before_it_does(call: Callable[..., object]) -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for module in self.children():
                halved(module)  # type: ignore[arg-type]
            return self.inner(x)  # type: ignore[no-any-return]

    model = Unseen().eval()
    before = snapshot(model)
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"inner.weight": 0}))
    with pytest.raises(RuntimeError, match=r"the forward pass would write into inner\.weight, a parameter of your mod"):
        call(model, edit)
    assert_unchanged(before, model)


def replace_a_module(model: nn.Sequential) -> None:
    model[1] = nn.Linear(3, 2)


def take_a_bias(model: nn.Sequential) -> None:
    model[1].bias = None


def parametrize_later(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[1])


def take_a_module_out(model: nn.Sequential) -> None:
    del model[1]


def add_a_module(model: nn.Sequential) -> None:
    model.append(nn.ReLU())


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (replace_a_module, r"modules now: 1 were"),
        (take_a_bias, r"parameters now: 1\.bias were"),
        (parametrize_later, r"parameters now: 1\.weight were"),
        (take_a_module_out, r"modules now: 1, the model were"),
        (add_a_module, r"modules now: the model were"),
    ],
)
def test_a_view_whose_model_got_other_modules_says_so(act: Callable[[nn.Sequential], None], what: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))
    view = ns.apply(cut, model)
    model.train().eval()
    view(X)
    act(model)
    with pytest.raises(RuntimeError, match=rf"has other {what} replaced.*: apply the edit again"):
        view(X)


def test_a_view_goes_on_where_a_module_is_only_wrapped_or_the_model_is_gone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"*": 0})), model)
    before = view(X)
    model[1] = checkpoint_wrapper(model[1])
    assert torch.equal(view(X), before)
    del model
    assert torch.equal(view(X), before)


def test_a_view_whose_model_got_other_parameters_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    cut = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0}))
    view, independent = ns.apply(cut, model), copy.deepcopy(ns.apply(cut, model))
    view(X)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    view(X)  # written into, not replaced
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for run in (lambda: view(X), lambda: ns.evaluate(view, [(X, Y)])):
        with pytest.raises(
            RuntimeError, match=r"other parameters now: 0\.weight, 0\.bias, 1\.weight, 1\.bias were repl"
        ):
            run()
    independent(X)
    ns.apply(cut, model)(X)
    layer = model[1]
    view = ns.apply(cut, model)
    layer.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"other parameters now: 1\.bias were replaced .*: apply the edit again"):
        view(X)


# --- trainers, hooks, checkpoints -----------------------------------------------------------------------------------


def test_a_view_may_be_moved_to_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 0})), model)
    for unchanged in (view.to("cpu"), view.to(torch.float32), view.float(), view.cpu()):
        assert unchanged is view
    for change in (
        view.double,
        view.bfloat16,
        lambda: view.to("meta"),
        view.share_memory,
        lambda: view.to_empty(device="cpu"),
    ):
        with pytest.raises(RuntimeError, match="this view shares its weights"):
            change()
    assert copy.deepcopy(view).double()[0].bias.dtype == torch.float64


def test_what_stands_around_a_lock_is_a_copy() -> None:
    model = nn.Linear(4, 2)
    model.box = {"lock": threading.Lock(), "seen": [1]}  # type: ignore[assignment]
    view: Any = ns.apply(ns.compose(), model)
    view.box["seen"].append(2)
    assert view.box["lock"] is model.box["lock"] and model.box["seen"] == [1]  # type: ignore[index]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes))
    return model.eval()


TOKENS = {"input_ids": torch.arange(48).reshape(8, 6) % 20, "labels": Y}


def test_idle_hooks_of_transformers_do_not_keep_a_sweep_from_sharing() -> None:
    model = bert()
    model(TOKENS["input_ids"], output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    edits = {"cut": ns.zero_out(ns.select(ns.find_layout(model), {"*layer.2.output.dense.weight": 0}))}
    swept = ns.sweep(model, edits, [TOKENS], metric=ns.cross_entropy)
    assert swept.reasons == ()
    assert swept["cut"] == ns.evaluate(ns.apply(edits["cut"], model), [TOKENS], metric=ns.cross_entropy)


def saved_bytes(model: nn.Module, data: list[Any]) -> tuple[int, ns.Scores]:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = ns.group_grad_norms(model, data)
    return sum(kept), scores


def test_checkpoints_of_transformers_are_kept_where_scores_are_computed() -> None:
    model: Any = bert()
    data = [TOKENS | {"input_ids": TOKENS["input_ids"].repeat(1, 8)}]
    whole, expected = saved_bytes(model, data)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    less, scores = saved_bytes(model, data)
    assert less < whole
    torch.testing.assert_close(scores.values, expected.values)


def test_checkpoints_of_torch_are_kept_where_scores_are_computed() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4)) for _ in range(2)]
    plain = nn.Sequential(*blocks, nn.Linear(4, 2))
    wrapped = nn.Sequential(*(checkpoint_wrapper(block) for block in blocks), plain[2])
    runs: list[int] = []
    blocks[0][1].register_forward_hook(lambda *_: runs.append(1))
    expected = ns.group_grad_norms(plain, {"all": [(X, Y)]})
    assert len(runs) == 1
    scores = ns.group_grad_norms(wrapped, {"all": [(X, Y)]})
    assert len(runs) == 3, "once more in the backward pass"
    assert torch.equal(scores.values, expected.values)
    ns.evaluate(wrapped, [(X, Y)])
    assert len(runs) == 4


@functools.lru_cache(maxsize=4)
def triangle(size: int) -> Tensor:
    return torch.triu(torch.ones(size, size), 1)


@pytest.mark.parametrize(
    "look", [lambda m: ns.residual_branches(m, (X, Y)), lambda m: ns.silence(ns.Neurons(), m, (X, Y))]
)
def test_a_capture_leaves_no_tensor_without_values_in_what_others_keep(look: Callable[[nn.Module], object]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x) @ triangle(4))  # type: ignore[no-any-return]

    triangle.cache_clear()
    model = Masked().eval()
    look(model)
    assert type(model(X)) is Tensor


def test_an_input_that_cannot_be_copied_is_refused_by_its_type() -> None:
    graph = Graph(X, {"lock": threading.Lock()})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"an input of type Graph holds tensors and cannot be copied .*unpack="):
        ns.evaluate(Writes(), [ns.Batch((graph,), {}, Y)])
