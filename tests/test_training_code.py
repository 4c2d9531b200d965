"""What training code does to a model, and the models it has: nothing is missed in silence, nothing leaks back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import named
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronsurgery as ns

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1] * 4)
G = torch.tensor([0, 0, 1, 1] * 2)
DATA = [(X, Y, G)]


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def cut(model: nn.Module, **options: Any) -> ns.Edit:
    """Half of the rows of every layer zeroed."""
    return ns.zero_out(ns.select(ns.find_layout(model, **options), {"*": slice(0, None, 2)}))


def everything(model: nn.Module, data: Any = DATA) -> list[Tensor]:
    """What each function of the library says of a model."""
    edit = cut(model)
    swept = ns.sweep(model, {"cut": edit}, data, metric=ns.margin)
    return [
        ns.group_grad_norms(model, data).values,
        torch.tensor(ns.evaluate(model, data, metric=ns.cross_entropy).values),
        torch.tensor(ns.evaluate(ns.apply(edit, model), data, metric=ns.cross_entropy).values),
        torch.tensor(ns.evaluate(ns.bake(edit, model), data, metric=ns.cross_entropy).values),
        swept.values(),
        swept.values("cut"),
        ns.hard_batch(model, data, top=4, sample=4).targets,
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# --- a forward that was replaced ------------------------------------------------------------------------------------


def by_compile(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]


def by_closure(model: nn.Module) -> None:
    old = model.forward

    def forward(x: Tensor) -> Tensor:
        return old(x)  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign]


def by_closure_over_the_model(model: nn.Module) -> None:
    old = functools.partial(type(model).forward, model)

    def forward(x: Tensor, *, call: bool = True) -> Tensor:
        return old(x) if call and model is not None else forward(x)  # type: ignore[no-any-return]

    model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("replace", [by_compile, by_closure, by_closure_over_the_model])
def test_a_forward_that_was_replaced_runs_the_copy(replace: Callable[[nn.Module], None]) -> None:
    model = net()
    expected = everything(model)
    replace(model)
    before = snapshot(model, DATA)
    assert_same(everything(model), expected)
    assert_unchanged(before, model, DATA)


class Normed(nn.Module):
    """Drawn on and updated in training mode: it must be the copy that runs, not the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("replace", [by_compile, by_closure, by_closure_over_the_model])
def test_a_replaced_forward_never_runs_the_model_itself(replace: Callable[[nn.Module], None]) -> None:
    model = Normed()
    replace(model)
    replace(model.body[0])
    before = snapshot(model, DATA)
    everything(model)
    assert_unchanged(before, model, DATA)


def test_a_bound_method_of_a_buffer_follows_the_buffer() -> None:
    model = Normed()
    model.peek = model.body[1].running_var.norm
    view = ns.apply(cut(model), model)
    view.body[1].running_var.zero_()
    assert (view.peek().item(), model.peek().item()) == (0.0, pytest.approx(6**0.5))


# --- what a module holds beside its parameters ----------------------------------------------------------------------


class WithOptimizer(nn.Module):
    """Holds what trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.optimizer = torch.optim.Adam(self.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_an_optimizer_in_an_attribute_is_shared_by_views_and_follows_a_baked_model() -> None:
    model = WithOptimizer()
    model(X).sum().backward()
    model.optimizer.step()
    before = snapshot(model)
    view, baked = ns.apply(cut(model), model), ns.bake(cut(model), model)
    assert_same(everything(model), everything(model.body))
    assert_unchanged(before, model)
    assert view.optimizer is model.optimizer
    held = [parameter for group in baked.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in baked.parameters()}


class Trainer:
    """Holds the data, which is not to be copied, and cannot be: `__deepcopy__` says so."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainer:
        raise AssertionError("the trainer was copied")


class Attached(nn.Module):
    """Leaves its trainer out of what is pickled, as Lightning's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self._trainer: Trainer | None = Trainer(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_what_a_class_does_not_pickle_is_not_copied() -> None:
    model = Attached()
    before = snapshot(model)
    assert_same(everything(model), everything(model.body))
    assert_unchanged(before, model)
    assert ns.apply(cut(model), model)._trainer is None


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of torch's deprecations
def test_a_lightning_module_may_be_cut_in_its_own_hooks() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.said = net(), []

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)  # type: ignore[no-any-return]

        def on_train_epoch_start(self) -> None:
            view = ns.apply(cut(self), self)
            self.said = [ns.evaluate(view, DATA).average, ns.group_grad_norms(self, DATA).values.max().item()]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return ns.cross_entropy(self(batch[0]), batch[1]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Lit()
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8))
    fresh = net()
    assert model.said[0] == ns.evaluate(ns.apply(cut(fresh), fresh), DATA).average
    assert model.said[1] > 0


class Listed(nn.Module):
    """Computes with a parameter that it also keeps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2, bias=False)
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].T


def test_a_parameter_that_is_used_from_a_plain_attribute_is_never_missed_in_silence() -> None:
    model = Listed()
    edit = cut(model)
    with (
        pytest.warns(UserWarning, match=r"held by plain attributes, too: first\.weight \(by module '' \(Listed\)\)"),
        pytest.warns(UserWarning, match="no gradient reached 1 of 1 scored layers"),
    ):
        ns.group_grad_norms(model, DATA)
    held = r"first\.weight is also held by a plain attribute of module '' \(Listed\)"
    with pytest.raises(ValueError, match=f"edit 'cut': {held}"):
        ns.sweep(model, {"cut": edit}, DATA)
    with pytest.raises(ValueError, match=held):
        ns.edited_parameters(edit, model)


class Cutting(nn.Module):
    """Cuts the gradient of its first layer off, in one of two ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 6), nn.Linear(6, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "reentrant checkpoint":
            hidden: Any = checkpoint(self.first, x, use_reentrant=True)
        else:
            hidden = self.first(x).detach()
        return self.last(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["reentrant checkpoint", "detach"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_no_gradient_reaches_are_named(how: str) -> None:
    with pytest.warns(UserWarning, match=r"no gradient reached 1 of 2 scored layers, .*: first\.weight\. The loss"):
        found = named(ns.group_grad_norms(Cutting(how), DATA).by_layer())
    assert found["first.weight"].max() == 0 < found["last.weight"].min()
    with pytest.warns(UserWarning, match="no gradient reached 2 of 2 scored layers"):
        ns.group_grad_norms(net(), DATA, predict=torch.Tensor.detach)


# --- modules that change what they are given ------------------------------------------------------------------------


class Rude(nn.Module):
    """Writes into its input, and draws while it is evaluated."""

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.body, self.draws = net(), draws

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).sub_(1)
        return self.body(nn.functional.dropout(x, 0.5) if self.draws else x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:no part of the model's forward")
@pytest.mark.parametrize("draws", [False, True])
def test_neither_the_batches_nor_the_random_state_change(draws: bool) -> None:
    model = Rude(draws=draws)
    data = [(X.clone(), Y, G)]
    before = snapshot(model, data)
    first = everything(model, data)
    assert_unchanged(before, model, data)
    if not draws:
        assert_same(first, everything(model.body, [(2 * X - 1, Y, G)]))
        hard = ns.hard_batch(model, data, top=8, sample=8)
        assert torch.equal(hard.args[0], X)


@pytest.mark.filterwarnings("ignore:no part of the model's forward")
def test_an_embedding_that_renormalises_itself_does_not_renormalise_the_model_s() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))  # type: ignore[no-any-return]

    model = Words()
    data = [(torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), Y, G)]
    before = snapshot(model, data)
    found = everything(model, data)
    assert_unchanged(before, model, data)
    view = ns.apply(cut(model), model)
    assert torch.tensor(ns.evaluate(view, data, metric=ns.cross_entropy).values).equal(found[2])


@pytest.mark.parametrize("act", [everything, lambda model: ns.apply(ns.compose(), model)], ids=["use", "apply"])
def test_a_lazy_model_is_refused_before_it_is_initialised_by_halves(act: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 2))
    before = torch.get_rng_state()
    for do in (lambda: ns.evaluate(model, DATA), lambda: ns.bake(ns.compose(), model), lambda: act(model)):
        with pytest.raises(ValueError, match=r"not yet initialised.*run the model on one batch first"):
            do()
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        model(X)
    everything(model)


def test_a_sparse_input_is_passed_on_as_it_is() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.body(x) + adjacency.to_dense().sum()  # type: ignore[no-any-return]

    model = Graph()
    data = [ns.Batch((X, torch.eye(3).to_sparse()), {}, Y, G)]
    dense = [ns.Batch((X, torch.eye(3)), {}, Y, G)]
    with pytest.warns(UserWarning, match="forward of its own.*: an input is a sparse tensor"):
        found = everything(model, data)
    assert_same(found, everything(model, dense))


# --- groups, defaults and precision ---------------------------------------------------------------------------------


def test_names_of_groups_may_come_from_numpy_and_torch_and_are_saved(tmp_path: Path) -> None:
    model = net()
    plain = {0: [(X[:4], Y[:4])], 1: [(X[4:], Y[4:])]}
    for keys in (np.unique(G.numpy()), torch.unique(G)):
        loaders = dict(zip(keys, plain.values(), strict=True))
        scores, metrics = ns.group_grad_norms(model, loaders), ns.evaluate(model, loaders)
        assert scores == ns.group_grad_norms(model, plain)
        assert metrics == ns.evaluate(model, plain)
        assert ns.sweep(model, {}, loaders).baseline.groups == (0, 1)
        for value in (scores, metrics):
            ns.save_file(value, tmp_path / "value.safetensors")
            assert ns.load_file(tmp_path / "value.safetensors") == value


@pytest.mark.parametrize("key", [("a", 0), 0.5, None, True])
def test_other_names_of_groups_are_refused(key: object) -> None:
    for function in (ns.group_grad_norms, ns.evaluate, lambda model, loaders: ns.sweep(model, {}, loaders)):
        with pytest.raises(TypeError, match="the mapping of loaders: groups are integers or strings, not "):
            function(net(), {key: DATA})
    with pytest.raises(ValueError, match="two loaders of the mapping have one name: 0, 0"):
        ns.evaluate(net(), {torch.tensor(0): DATA, torch.tensor(0): DATA})


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_and_device_of_torch_do_not_matter(other_defaults: None) -> None:
    with torch.device("cpu"):
        model = net().float()
    edit = cut(model)
    scores = ns.group_grad_norms(model, DATA)
    assert (scores.values.dtype, scores.values.device.type) == (torch.float32, "cpu")
    assert ns.magnitudes(model).values.dtype == torch.float32
    assert len(ns.topk(scores[0], 2)) == 2
    assert all(mask.device.type == "cpu" for mask in edit.neurons.masks().values())
    swept = ns.sweep(model, {"cut": edit}, DATA, metric=ns.margin)
    assert ns.fragility(swept, Y).shape == (8,)
    assert ns.evaluate(ns.apply(edit, model), DATA).counts == (4, 4)
    assert len(ns.hard_batch(model, DATA, top=4, sample=2)) == 2

    def fit(indices: Tensor) -> Tensor:
        return torch.ones(4, dtype=torch.bool, device="cpu")

    assert ns.memorization.memorization_scores(fit, 4, models=12, share=0.5, seed=0).values.tolist() == [0.0] * 4


@pytest.mark.parametrize("halved", ["autocast", "half"])
def test_float16_scores_of_a_fitted_model_do_not_vanish(halved: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(20)
        x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
        y = model(x).argmax(1)
        x, y = x[model(x).diff(dim=1).abs()[:, 0] > 11], y[model(x).diff(dim=1).abs()[:, 0] > 11]
    expected = ns.group_grad_norms(model, [(x, y)]).values
    if halved == "half":
        found = ns.group_grad_norms(copy.deepcopy(model).half(), [(x.half(), y)]).values
    else:
        with torch.autocast("cpu", dtype=torch.float16):
            found = ns.group_grad_norms(model, [(x, y)]).values
    assert ((found == 0) == (expected == 0)).all()
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0.0)


def test_gradients_that_would_overflow_when_scaled_are_taken_as_they_are() -> None:
    model = nn.Linear(1, 1, bias=False).half()
    loss: Any = lambda logits, targets: 30000.0 * logits[:, 0]  # noqa: E731
    data = [(torch.ones(2, 1).half(), torch.zeros(2).long())]
    assert ns.group_grad_norms(model, data, loss=loss).values.item() == 30000.0


def test_a_group_of_nans_is_the_worst_and_nans_are_wrong() -> None:
    bad = [(torch.full((4, 4), torch.nan), torch.zeros(4).long())]
    for loaders in ({"good": DATA, "bad": bad}, {"bad": bad, "good": DATA}):
        assert np.isnan(ns.evaluate(net(), loaders, metric=ns.cross_entropy).worst)
        assert ns.evaluate(net(), loaders)["bad"] == 0.0


# --- views that travel ----------------------------------------------------------------------------------------------


def test_a_deep_copy_of_a_view_runs_on_another_device() -> None:
    model = net()
    layout = ns.find_layout(model)
    edit = ns.compose(cut(model), ns.random_init(ns.select(layout, {"0.weight": 1}), std=0.1, seed=0))
    moved = copy.deepcopy(ns.apply(edit, model)).to("meta")  # stands in for an accelerator
    assert moved(X.to("meta")).device.type == "meta"


def test_a_folder_that_cannot_be_one_is_found_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        ns.memorization.memorization_scores(
            lambda indices: pytest.fail("trained"), 4, models=12, share=0.5, seed=0, folder=tmp_path / "file"
        )


def test_edits_that_are_none_are_named() -> None:
    with pytest.raises(TypeError, match="edits are what zero_out, scale and the like return, not 'a': list"):
        ns.sweep(net(), {"a": [1]}, DATA)  # type: ignore[dict-item]
