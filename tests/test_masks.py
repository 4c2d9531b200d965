"""A learned mask finds the neurons that carry a group, draws by its seed alone, and changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from zoo import CASES, Case, every_case

import neuronsurgery as ns
from neuronsurgery.batches import Batch, map_tensors
from neuronsurgery.losses import cross_entropy
from neuronsurgery.masks import _masked, divergence, mask_gradient, pull
from neuronsurgery.pools import Pool, read_pools

# --- closed forms ---------------------------------------------------------------------------------------------------


def carried() -> tuple[nn.Sequential, dict[str, Any]]:
    """Of four hidden neurons the third sees the rare inputs and no others; the rest see the common ones."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(4))
        second.weight.copy_(torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 2], [0, 0, 4, 0]]))
    model = nn.Sequential(first, nn.ReLU(), second).train()
    common = torch.eye(4)[[0, 1, 3]], torch.tensor([0, 1, 1])
    return model, {"common": [common], "rare": [(torch.eye(4)[[2]], torch.tensor([2]))]}


def test_the_neuron_that_alone_carries_a_group_is_found() -> None:
    model, loaders = carried()
    scores = ns.learned_mask(model, loaders, "rare", where="0.*")
    assert scores["rare"].values.tolist() == [[0, 0, 1, 0]]
    assert (scores.groups, scores.counts, scores.criterion) == (("rare",), (1,), "learned mask")
    found = ns.topk(scores, 1)
    after = ns.evaluate(ns.apply(ns.zero_out(found), model), loaders)
    assert dict(after) == {"common": 1.0, "rare": 0.0}
    assert ns.learned_mask(model, loaders, "common", where="0.*").values[0, 2] == 0


def test_every_neuron_of_a_way_is_found_and_one_dear_enough_is_not() -> None:
    """The margin of the rare input is 4 a b for gates a and b of its hidden neuron and its class."""
    model, loaders = carried()
    assert ns.learned_mask(model, loaders, "rare").values[0].nonzero().flatten().tolist() == [2, 6]
    assert not ns.learned_mask(model, loaders, "rare", penalty=5.0).values.any()
    assert ns.learned_mask(model, loaders, "rare", steps=1, learning_rate=0.25).values[0, 2] == 0.25


def test_a_neuron_that_others_need_is_spared() -> None:
    """One neuron serves both groups, and another one the group alone; unguarded, both are cut."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        second.weight.copy_(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    model = nn.Sequential(first, second)
    loaders = {group: [(torch.eye(2)[[group]], torch.tensor([0]))] for group in (0, 1)}
    options: dict[str, Any] = {"where": "0.*", "steps": 200}
    free = ns.learned_mask(model, loaders, 0, protect=0.0, **options).values[0]
    assert free.tolist() == [1, 1]
    kept = ns.learned_mask(model, loaders, 0, protect=50.0, **options).values[0]
    assert kept[0] < 0.3 and kept[1] == 1


def test_of_a_loss_the_negative_is_the_metric() -> None:
    model, loaders = carried()
    scores = ns.learned_mask(model, loaders, "rare", where="0.*", metric=cross_entropy)
    assert scores.values.argmax() == 2 and scores.values[0, 2] > 0.9
    losses = torch.tensor([0.5, 3.0], requires_grad=True)
    assert torch.equal(pull(lambda logits, _: logits, losses, torch.zeros(2)), torch.nn.functional.softplus(losses + 1))
    logits = torch.randn(2, 3)
    expected = torch.nn.functional.softplus(1 - cross_entropy(logits, torch.tensor([0, 1])))
    assert torch.equal(pull(cross_entropy, logits, torch.tensor([0, 1])), expected)


# --- the loss and its gradient --------------------------------------------------------------------------------------


def wide(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


@pytest.mark.parametrize("name", ["mlp", "grouped", "unet_grouped", "lstm"])
def test_the_gradient_of_a_step_is_that_of_finite_differences(name: str) -> None:
    model, batches = CASES[name].build().double(), wide(CASES[name].batches(1))
    masked = _masked(model, None, None, None)
    own, others = read_pools(batches, 0, [1, 2], key="", most=100)
    units, spared = next(own.steps(100)), [next(pool.steps(100)) for pool in others]
    step = functools.partial(mask_gradient, masked, metric=cross_entropy, own=units, others=spared, protect=2.0)
    gates = masked.open_gates() - 0.3 * torch.linspace(0, 1, masked.layout.count, dtype=torch.float64)
    assert gates.dtype == torch.float64
    _, gradient = step(gates)
    for i in range(masked.layout.count):
        nudge = torch.zeros_like(gates).index_fill(0, torch.tensor([i]), 1e-6)
        difference = (step(gates + nudge)[0] - step(gates - nudge)[0]) / 2e-6
        assert difference == pytest.approx(float(gradient[i]), rel=1e-5, abs=1e-8)


def test_the_loss_of_a_step_is_the_mean_of_the_group_and_the_mean_of_the_others_means() -> None:
    case = CASES["mlp"]
    model, batches = case.build().eval(), case.batches(1)
    masked = _masked(model, None, None, None)
    own, others = read_pools(batches, 0, None, key="", most=100)
    gates = torch.full_like(masked.open_gates(), 0.5)
    loss, _ = mask_gradient(
        masked, gates, ns.margin, next(own.steps(99)), [next(pool.steps(99)) for pool in others], 3.0
    )
    x, y, g = (torch.cat(parts) for parts in zip(*batches, strict=True))
    halved = ns.apply(ns.scale(masked.layout.neurons(range(masked.layout.count)), 0.5), model)
    before, after = model(x).log_softmax(1), halved(x)
    apart = torch.nn.functional.kl_div(after.log_softmax(1), before, reduction="none", log_target=True).sum(1)
    expected = torch.nn.functional.softplus(ns.margin(after, y) + 1)[g == 0].mean()
    expected += 3 * torch.stack([apart[g == group].mean() for group in (1, 2, 3)]).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


@every_case
def test_gates_of_one_are_the_model_to_the_bit(case: Case) -> None:
    """On every architecture, of every pattern and memory format."""
    masked = _masked(case.build(), None, None, None)
    gated = masked.parameters(masked.open_gates())
    held = {name: masked.runner.model.get_parameter(name.removeprefix("model.")) for name in gated}
    assert set(map(id, held.values())) == set(map(id, masked.runner.model.parameters()))
    for name, tensor in held.items():
        assert torch.equal(gated[name], tensor), name
        assert gated[name].stride() == tensor.stride(), name


@every_case
def test_on_every_architecture_a_step_moves_gates_and_nothing_else(case: Case) -> None:
    model, batches = case.build(), case.batches(1)
    metric = ns.causal_lm_loss if case.causal else cross_entropy
    before = snapshot(model, batches)
    scores = ns.learned_mask(model, batches, 0, steps=2, metric=metric, penalty=0.0, batch_size=4)
    assert_unchanged(before, model, batches)
    assert scores.values.shape == (1, case.neuron_count)
    assert 0 < scores.values.max() <= 0.061


# --- the divergence -------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_torch_and_zero_for_the_same() -> None:
    before, after = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double()
    p, q = torch.distributions.Categorical(logits=before), torch.distributions.Categorical(logits=after)
    apart = torch.distributions.kl_divergence(p, q)
    tokens = torch.randint(4, (2, 5))
    torch.testing.assert_close(divergence(before[0], after[0], tokens[0]), apart[0])
    torch.testing.assert_close(divergence(before, after, tokens), apart.mean(1))
    torch.testing.assert_close(divergence(before.mT, after.mT, torch.zeros(2)), apart.mean(1))
    assert not divergence(before, before, tokens).any()
    assert divergence(before.half(), after.half(), tokens).dtype == torch.float32


def test_divergence_leaves_out_what_counts_for_nobody() -> None:
    """Tokens whose label and whose next label are -100; pixels whose label is."""
    before, after = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    each = divergence(before[0], after[0], torch.zeros(5))
    labels = torch.tensor([[-100, 1, 2, -100, -100]])
    torch.testing.assert_close(divergence(before, after, labels), each[:3].mean()[None])
    torch.testing.assert_close(divergence(before.mT, after.mT, labels), each[1:3].mean()[None])
    assert divergence(before, after, labels * 0 - 100).tolist() == [0]


def test_divergence_of_classes_that_are_ruled_out() -> None:
    before = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    after = torch.tensor([[2.0, 1.0, -math.inf]], requires_grad=True)
    apart = divergence(before, after, torch.tensor([0]))
    torch.testing.assert_close(apart, divergence(before[:, :2], after[:, :2], torch.tensor([0])))
    (gradient,) = torch.autograd.grad(apart.sum(), after)
    assert gradient.isfinite().all()


# --- layouts, containers, models ------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Four heads that each see one input, read by one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.o_proj = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            self.value.weight.copy_(torch.eye(4).repeat_interleave(2, 0))
            self.o_proj.weight.copy_(torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 2], [0, 0, 2, 0]]).repeat_interleave(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.value(x))  # type: ignore[no-any-return]


def test_heads_are_found_by_their_pattern() -> None:
    _, loaders = carried()
    model = Heads()
    heads = ns.find_layout(model, where="o_proj*", patterns={"o_proj.weight": ("e (head d) -> head e d", {"d": 2})})
    scores = ns.learned_mask(model, loaders, "rare", layout=heads)
    assert scores.values.tolist() == [[0, 0, 1, 0]]
    assert str(next(iter(ns.topk(scores, 1)))) == "o_proj.weight[head 2]"


class Language(nn.Module):
    """A causal language model whose hidden unit t predicts token t + 1 after token t."""

    def __init__(self, vocabulary: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, vocabulary)
        self.up, self.down = nn.Linear(vocabulary, vocabulary, bias=False), nn.Linear(vocabulary, vocabulary)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.eye(vocabulary))
            self.up.weight.copy_(torch.eye(vocabulary))
            self.down.weight.copy_(6 * torch.eye(vocabulary).roll(1, 0))
            self.down.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.down(self.up(self.embedding(input_ids)).relu())}


def smallest_margin(logits: Tensor, targets: Tensor) -> Tensor:
    flat = ns.margin(logits[:, :-1].flatten(0, 1), targets[:, 1:].clamp(min=0).flatten())
    return flat.reshape(len(logits), -1).masked_fill(targets[:, 1:] == -100, 9.0).amin(1)


def test_a_sequence_of_a_language_model_is_broken_and_others_are_kept() -> None:
    """Batches are mappings of ragged shapes; the padding counts for nobody."""
    secret, other = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 2, 3, 0]])
    batches = [
        {"input_ids": secret, "attention_mask": secret * 0 + 1, "labels": secret, "groups": ["secret"]},
        {"input_ids": other, "attention_mask": other * 0 + 1, "labels": other.clone(), "groups": ["text"]},
    ]
    batches[1]["labels"][0, 4] = -100  # type: ignore[index]
    model = Language()
    scores = ns.learned_mask(model, batches, "secret", where="up*", metric=smallest_margin)
    assert scores.values[0, 4] == 1 and scores.values[0, [0, 1, 2]].tolist() == [0, 0, 0]
    found = ns.zero_out(ns.topk(scores, 1))
    margins = ns.evaluate(ns.apply(found, model), batches, metric=smallest_margin)
    assert margins["secret"] <= 0 < margins["text"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Any) -> Tensor:
        return self.head(self.rnn(x)[1][0])  # type: ignore[no-any-return]


def test_what_cannot_be_taken_apart_stays_whole() -> None:
    def batch(count: int) -> Batch:
        x = pack_padded_sequence(torch.randn(count, 5, 3), torch.arange(5, 5 - count, -1), batch_first=True)
        return Batch((x,), {}, torch.arange(count) % 3)

    model, loaders = Packed(), {"a": [batch(2), batch(3)], "b": [batch(2)]}
    before = snapshot(model, loaders)
    scores = ns.learned_mask(model, loaders, "a", steps=3, batch_size=3)
    assert_unchanged(before, model, loaders)
    assert scores.counts == (5,) and scores.values.any()
    mixed = [Batch((loaders["a"][0].args[0],), {}, torch.tensor([0, 1]), ("a", "b"))]
    with pytest.raises(ValueError, match=r"a batch of several groups holds .*: give a mapping group -> loader"):
        ns.learned_mask(model, mixed, "a")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = carried()[0][:2], carried()[0][2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_a_part_that_runs_again_in_the_backward_pass_meets_the_same_gates() -> None:
    model, loaders = carried()
    assert torch.equal(
        ns.learned_mask(Checkpointed(), loaders, "rare").values, ns.learned_mask(model, loaders, "rare").values
    )


def test_inside_no_grad_and_autocast() -> None:
    model, loaders = carried()
    with torch.no_grad():
        assert ns.learned_mask(model, loaders, "rare", where="0.*").values.tolist() == [[0, 0, 1, 0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ns.learned_mask(model, loaders, "rare", where="0.*").values.tolist() == [[0, 0, 1, 0]]
    half = ns.learned_mask(carried()[0].bfloat16(), map_half(loaders), "rare", where="0.*")
    assert half.values.tolist() == [[0, 0, 1, 0]]


def map_half(loaders: dict[str, Any]) -> dict[str, Any]:
    return {name: [(x.bfloat16(), y) for x, y in batches] for name, batches in loaders.items()}


# --- draws ----------------------------------------------------------------------------------------------------------


def noisy(count: int = 40) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)
    return [(x, y, torch.arange(count) % 4)]


def test_examples_are_drawn_by_the_seed_alone() -> None:
    model = CASES["mlp"].build()

    def learned(data: Any, seed: int = 0) -> Tensor:
        return ns.learned_mask(model, data, 1, steps=8, batch_size=4, seed=seed).values

    torch.manual_seed(1)
    one = learned(noisy())
    torch.manual_seed(2)
    assert torch.equal(learned(noisy()), one)
    (x, y, g) = noisy()[0]
    assert torch.equal(learned([(x[:7], y[:7], g[:7]), (x[7:], y[7:], g[7:])]), one)
    by_group = {group: [(x[g == group], y[g == group])] for group in (3, 1, 0, 2)}
    torch.testing.assert_close(learned(by_group), one, rtol=0, atol=1e-5)
    assert not torch.equal(learned(noisy(), 1), one)


def test_a_pool_gives_each_example_once_before_one_comes_again() -> None:
    pool = Pool("key", 100)
    pool.add(Batch((torch.arange(10)[:, None],), {}, torch.arange(10)), range(10))
    steps = pool.steps(5)
    drawn = [[int(unit.held.targets) for unit in next(steps)] for _ in range(4)]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(10))
    assert drawn[:2] != drawn[2:]
    everything = pool.steps(10)
    assert [int(unit.held.targets) for unit in next(everything)] == list(range(10))
    assert len(next(everything)) == 10


def test_a_pool_keeps_a_part_that_depends_on_places_alone() -> None:
    def kept(sizes: list[int], most: int) -> list[int]:
        pool = Pool("key", most)
        for part in torch.split(torch.arange(sum(sizes)), sizes):
            pool.add(Batch((part[:, None],), {}, part), range(len(part)))
        return [int(unit.held.targets) for unit in pool.units]

    assert kept([30], 7) == kept([4, 9, 1, 16], 7) == sorted(kept([30], 7))
    assert set(kept([30], 7)) < set(kept([30], 9))
    assert kept([30], 30) == list(range(30))


def test_against_names_the_groups_to_spare() -> None:
    model, (x, y, g) = CASES["mlp"].build(), noisy()[0]
    some = ns.learned_mask(model, noisy(), 1, against=(3, 0), steps=5).values
    kept = (g == 1) | (g == 3) | (g == 0)
    assert torch.equal(some, ns.learned_mask(model, [(x[kept], y[kept], g[kept])], 1, steps=5).values)
    one = ns.learned_mask(model, noisy(), 1, against=2, steps=5).values
    assert torch.equal(one, ns.learned_mask(model, noisy(), 1, against=[2], steps=5).values)
    assert not torch.equal(one, some)


def no_data() -> Iterator[Any]:
    raise AssertionError("the data were touched")
    yield


def test_loaders_that_are_not_needed_are_not_read() -> None:
    (x, y, _) = noisy()[0]
    loaders = {"a": [(x, y)], "b": [(x, y)], "c": no_data()}
    assert ns.learned_mask(CASES["mlp"].build(), loaders, "a", against="b", steps=1).counts == (40,)


def test_progress_is_written_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    ns.learned_mask(CASES["mlp"].build(), noisy(), 1, steps=2, progress=True)
    assert capsys.readouterr().err.endswith("learned mask: step 2/2\n")
    ns.learned_mask(CASES["mlp"].build(), noisy(), 1, steps=2)
    assert capsys.readouterr().err == ""


# --- purity ---------------------------------------------------------------------------------------------------------


def test_nothing_changes() -> None:
    model, data = CASES["mlp"].build(), noisy()
    model(data[0][0]).sum().backward()
    next(model.parameters()).requires_grad_(False)
    layout = ns.find_layout(model)
    before = snapshot(model, data, layout)
    ns.learned_mask(model, data, 1, steps=3, layout=layout)
    assert_unchanged(before, model, data, layout)


# --- warnings -------------------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """It looks at the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))  # type: ignore[no-any-return]


class Severed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).detach())  # type: ignore[no-any-return]


WARNINGS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a softmax": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)),
        r"outputs look like probabilities \(a softmax inside the model\?\), whose margins .*: pass predict=",
    ),
    "the whole batch": (Normalised, r"examples alone differ .*\. Examples are taken out of their batches, and meet"),
    "no gradient": (Severed, r"no gradient reached 1 of 2 scored layers, whose scores are 0: body\.weight\. The loss"),
}


@pytest.mark.parametrize(("build", "text"), WARNINGS.values(), ids=WARNINGS)
def test_what_is_warned_of(build: Callable[[], nn.Module], text: str) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=text):
        ns.learned_mask(build(), noisy(), 1, steps=2)


# --- errors ---------------------------------------------------------------------------------------------------------

MODEL = CASES["mlp"].build().eval()
DATA = noisy()
ErrorRow = tuple[Callable[[], object], type[Exception], str]


def learned(group: Any = 1, data: Any = DATA, model: Any = MODEL, **options: Any) -> Callable[[], object]:
    return lambda: ns.learned_mask(model, data, group, **{"steps": 2, **options})


def poisoned() -> nn.Module:
    model = CASES["mlp"].build()
    with torch.no_grad():
        model[0].weight[2] = math.nan  # type: ignore[index]
    return model


def numbers(text: str, count: int = 1) -> str:
    return (
        rf"a learned mask cannot be made of this, {count} wrong:\n  {text}(.|\n)*\nUsual are steps=100, penalty=0\.02"
    )


X, Y, G = DATA[0]
EXHAUSTED = "An iterator or generator is exhausted after one pass; give a list or a DataLoader"
PAIR = {"a": [(X, Y)], "b": [(X, Y)]}
EARLY: dict[str, ErrorRow] = {
    "steps": (
        learned(data=no_data(), steps=0),
        ValueError,
        numbers("steps: expected an integer of at least 1, given 0"),
    ),
    "steps a float": (learned(steps=1.5), ValueError, numbers(r"steps: expected an integer of at least 1, given 1\.5")),
    "batch size": (
        learned(data=no_data(), batch_size=True),
        ValueError,
        numbers("batch_size: expected an integer of at least 1, given True"),
    ),
    "penalty": (
        learned(data=no_data(), penalty=-0.1),
        ValueError,
        numbers(r"penalty: expected a number of at least 0, given -0\.1"),
    ),
    "protect": (
        learned(data=no_data(), protect=math.inf),
        ValueError,
        numbers("protect: expected a number of at least 0, given inf"),
    ),
    "several": (
        learned(data=no_data(), penalty="a", learning_rate=0.0),
        ValueError,
        numbers(r"penalty: .*, given 'a'\n  learning_rate: expected a number above 0, given 0\.0", 2),
    ),
    "seed": (learned(data=no_data(), seed=-1), ValueError, "seed must be an integer of at least 0, not -1"),
    "metric": (
        learned(data=no_data(), metric=3),
        TypeError,
        r"a metric is a function \(logits, targets\) -> .*, not a int",
    ),
    "group": (learned(1.5, no_data()), TypeError, "groups are integers or strings, not float"),
    "layer": (learned(data=no_data(), where="x"), KeyError, "no layer matches 'x'"),
    "weights": (
        learned(data=no_data(), model=poisoned()),
        ValueError,
        r"weights are NaN or infinite in 1 layers:\n  0\.w",
    ),
    "empty mapping": (learned(data={}), ValueError, "the mapping of loaders is empty: give at least two groups"),
    "unknown group": (
        learned("c", {"a": no_data(), "b": no_data()}),
        KeyError,
        "no group 'c'; there are 'a', 'b'",
    ),
    "unknown group to spare": (
        learned("a", {"a": no_data(), "b": no_data()}, against=["b", "d"]),
        KeyError,
        "no group 'd'; there are 'a', 'b'",
    ),
    "one group": (
        learned("a", {"a": no_data()}),
        ValueError,
        "there is no group to spare beside 'a': give the examples of another group, too",
    ),
    "spared itself": (
        learned("a", {"a": no_data(), "b": no_data()}, against=["a", "b"]),
        ValueError,
        "group 'a' cannot be broken and spared: leave it out of against=",
    ),
    "spares nobody": (learned("a", {"a": no_data(), "b": no_data()}, against=[]), ValueError, "no group to spare"),
}
LATER: dict[str, ErrorRow] = {
    "unknown group of a stream": (learned(7), KeyError, "no group 7; there are 0, 1, 2, 3"),
    "one group of a stream": (learned("all", [(X, Y)]), ValueError, "there is no group to spare beside 'all'"),
    "empty stream": (learned(data=[]), ValueError, rf"the loader yielded no batch\. {EXHAUSTED}"),
    "empty loader": (
        learned("a", {"a": [(X, Y)], "b": []}),
        ValueError,
        rf"group 'b' has no examples: its loader yielded no batch\. {EXHAUSTED}",
    ),
    "empty loader of the group": (learned("a", {"a": [], "b": [(X, Y)]}), ValueError, "group 'a' has no examples"),
    "no gradient": (
        learned(metric=ns.accuracy),
        ValueError,
        "the metric has no gradient, .*: accuracy counts .*margin",
    ),
    "scalar metric": (
        learned(metric=lambda logits, _: logits.mean()),
        ValueError,
        r"metric must return one value per example, shape \(10,\), not shape \(\): average over anything but the",
    ),
    "metric of a float": (learned(metric=lambda *_: 1.0), ValueError, "one value per example, .* not a float"),
    "tokens": (
        learned("a", [(torch.eye(2, 3).long(),) * 2 + (["a", "b"],)], Language()),
        ValueError,
        r"margin needs logits \(example, class\)",
    ),
    "one class": (
        learned(model=nn.Linear(5, 1), metric=lambda logits, _: logits[:, 0]),
        ValueError,
        r"of two or more classes are needed, not shape \(\d+, 1\): for one logit z give the two logits \(0, z\)",
    ),
    "NaN in the group": (
        learned("a", PAIR, metric=lambda logits, _: logits[:, 0] * math.nan),
        ValueError,
        "the loss of 40 of 40 examples of the group is NaN or infinite",
    ),
    "NaN in the others": (
        learned("a", {"a": [(X, Y)], "b": [(X * math.nan, Y)]}),
        ValueError,
        "the loss of 40 of 40 examples of the groups to spare is NaN or infinite",
    ),
    "infinite gradient": (
        learned(metric=lambda logits, _: (logits[:, 0] * 0).abs().sqrt()),
        ValueError,
        r"the gradients of the gates are NaN or infinite in 2 layers",
    ),
    "unknown form": (learned(data=[X]), TypeError, "a loader yielded a Tensor; understood are"),
}


@pytest.mark.parametrize(("call", "error", "text"), (EARLY | LATER).values(), ids=EARLY | LATER)
def test_bad_input_says_what_it_is_and_changes_nothing(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    before = snapshot(MODEL, DATA)
    with pytest.raises(error, match=text):
        call()
    assert_unchanged(before, MODEL, DATA)


def test_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch\.inference_mode\(\): leave it"):
        ns.learned_mask(MODEL, DATA, 1)
