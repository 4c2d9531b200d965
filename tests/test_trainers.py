"""Views and twins where somebody else has the loop: trainers, compilers, checkpointing; and the page about them."""

from __future__ import annotations

import copy
import doctest
import warnings
from abc import ABCMeta
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import neuronsurgery as ns

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 2
ROWS = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)]
DATA = [{"input_ids": IDS, "labels": LABELS}]


def bert(**options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, **sizes, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def cut(model: nn.Module) -> ns.Edit:
    chosen = {"*0.intermediate.dense.weight": (1, 5), "classifier.weight": 0}
    return ns.zero_out(ns.select(ns.find_layout(model), chosen))


def logits(model: Any) -> Tensor:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def same_values(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- Hugging Face's trainer -----------------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    chosen = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "epoch", "weight_decay": 0.1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(str(folder), **{**chosen, **quiet, **options})
    made = transformers.Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)
    made.remove_callback(transformers.PrinterCallback)
    return made


def test_a_view_is_trained_evaluated_saved_and_resumed(tmp_path: Path) -> None:
    model = bert()
    view = ns.apply(cut(model), model)
    whole = trainer(view, tmp_path / "whole")
    whole.train()
    assert whole.model is view and view.classifier.bias is model.classifier.bias, "nothing was copied"
    assert whole.evaluate()["eval_loss"] > 0
    last = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert same_values(last, ns.bake(cut(model), model)) and not same_values(last, model)
    assert torch.equal(logits(last), logits(view))

    first = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-2")
    resumed = ns.apply(cut(first), first)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_values(ns.bake(cut(first), first), last)
    assert torch.equal(logits(resumed), logits(view)) and not torch.equal(logits(bert()), logits(view))

    untrained = bert()
    other = trainer(ns.apply(cut(untrained), untrained), tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"load into that model \(or into one of its class\) and apply again"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_what_a_view_saves_is_what_bake_holds(tmp_path: Path) -> None:
    model = bert()
    before = snapshot(model)
    view = ns.apply(cut(model), model)
    ns.bake(cut(model), model).save_pretrained(tmp_path / "baked")
    view.save_pretrained(tmp_path / "view")
    view.save_pretrained(tmp_path / "as trainers do", state_dict=view.state_dict(), is_main_process=True)
    deep_copy = copy.deepcopy(view)
    deep_copy.save_pretrained(tmp_path / "deep copy")
    view.bert.save_pretrained(tmp_path / "part")
    assert_unchanged(before, model)
    expected = (tmp_path / "baked" / "model.safetensors").read_bytes()
    for name in ("view", "as trainers do", "deep copy"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected, name
    part = transformers.BertModel.from_pretrained(tmp_path / "part")
    assert same_values(part, ns.bake(cut(model), model).bert)
    given = {"classifier.bias": torch.ones(2)}
    view.save_pretrained(tmp_path / "given", state_dict=given)
    assert list(load_file(tmp_path / "given" / "model.safetensors")) == ["classifier.bias"]
    with pytest.raises(RuntimeError, match=r"this view is gone already: view = apply\(edit, model\)"):
        ns.apply(cut(model), model).save_pretrained(tmp_path / "gone")


def test_a_hub_mixin_saves_what_bake_holds(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Small(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

    model = Small()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"fc.weight": 1}))
    view = ns.apply(edit, model)
    view.save_pretrained(tmp_path)
    assert same_values(Small.from_pretrained(tmp_path), ns.bake(edit, model))


def test_a_view_with_an_adapter_is_not_saved_as_its_adapter_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(RuntimeError, match=r"it would write the adapter alone.*merge_and_unload\(\), and save that"):
        ns.apply(cut(model), model).save_pretrained(tmp_path)
    merged = ns.bake(cut(model), model).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert same_values(transformers.BertForSequenceClassification.from_pretrained(tmp_path), merged)


# --- compiled twins -------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def each_epoch(model: nn.Module, kind: str) -> Iterator[ns.Edit]:
    """Other neurons every epoch, of the same layers and as many of each."""
    layout = ns.find_layout(model)
    for epoch in range(4):
        neurons = ns.select(layout, {"0.weight": (epoch, epoch + 2), "3.weight": (epoch, 7)})
        yield {
            "zero_out": lambda neurons=neurons: ns.zero_out(neurons),
            "noise": lambda neurons=neurons, epoch=epoch: ns.random_noise(neurons, std=0.1, seed=0),
            "rewind": lambda neurons=neurons: ns.rewind(neurons, network().state_dict(), alpha=0.5),
            "composed": lambda neurons=neurons: ns.compose(ns.scale(neurons, 0.5), ns.random_init(neurons, std=0.1)),
        }[kind]()


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["zero_out", "noise", "rewind", "composed"])
def test_a_twin_whose_neurons_change_is_compiled_once(kind: str, counter: CompileCounter) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for edit in each_epoch(model, kind):
        twin = ns.apply(edit, model)
        compiled = torch.compile(twin, backend=counter)
        for _ in range(2):
            assert torch.equal(compiled(X), ns.apply(edit, model)(X))
            optimizer.zero_grad()
            compiled(X).square().sum().backward()
            optimizer.step()
    assert counter.frame_count == 1


def test_other_layers_are_compiled_anew(counter: CompileCounter) -> None:
    """Or the test above would pass for a counter that counts nothing."""
    model = network()
    for name in ("0.weight", "3.weight"):
        edit = ns.zero_out(ns.select(ns.find_layout(model), {name: 1}))
        torch.compile(ns.apply(edit, model), backend=counter)(X)
    assert counter.frame_count == 2


class Checked(nn.Linear, metaclass=ABCMeta):
    """Of a class with a metaclass of its own."""


def test_a_class_with_a_metaclass_is_shared(counter: CompileCounter) -> None:
    model = nn.Sequential(Checked(5, 8), nn.ReLU())
    for row in range(3):
        view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": row})), model)
        assert isinstance(view[0], Checked) and not view[0].weight[row].any()
        assert torch.equal(torch.compile(view, backend=counter)(X), view(X))
    assert counter.frame_count == 1


def test_what_torch_does_to_one_view_is_nothing_to_another() -> None:
    """Views share their classes; torch puts properties on the class of a module, and takes them off."""
    model = network()
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"0.weight": 1}))
    one, other, after = (ns.apply(edit, model) for _ in range(3))
    assert type(one[0]) is type(other[0]) is not type(model[0])
    expected = other(X)

    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    parametrize.register_parametrization(one[0], "bias", Doubled())
    assert torch.equal(one[0].bias, 2 * model[0].bias) and other[0].bias is model[0].bias
    other[0].bias = nn.Parameter(torch.zeros(8))
    assert not other[0].bias.any() and one[0].bias.any()
    independent = copy.deepcopy(one)
    parametrize.remove_parametrizations(independent[0], "weight")
    parametrize.remove_parametrizations(independent[0], "bias")
    assert type(independent[0]) is nn.Linear
    assert torch.equal(after(X), expected) and not after[0].weight[1].any()
    assert torch.equal(ns.apply(edit, model)(X), expected)


# --- activation checkpointing ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Checkpoints its layers in training mode, as encoders do that are written so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3))
        self.head = nn.Linear(5, 2)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class Dropping(Encoder):
    """Its own dropout wakes in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.5, self.training)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.gradient_checkpointing and self.training else layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class Unconditional(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.gradient_checkpointing else layer(x)
        return self.head(x)  # type: ignore[no-any-return]


SOME = [(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]


def runs_of(model: Any, act: Any) -> tuple[int, Any]:
    """How often the first layer runs meanwhile, and what comes back."""
    runs: list[int] = []
    handle = model.layers[0][0].register_forward_hook(lambda *_: runs.append(1))
    found = act(model)
    handle.remove()
    return len(runs), found


@pytest.mark.parametrize("kind", [Encoder, Unconditional])
def test_checkpointing_stays_on_while_scoring(kind: type[Encoder]) -> None:
    model = kind()
    before = snapshot(model, SOME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs, scores = runs_of(model, lambda model: ns.group_grad_norms(model, {"all": SOME}))
    assert runs == 2, "once more in the backward pass"
    assert_unchanged(before, model, SOME)
    model.gradient_checkpointing = False
    once, expected = runs_of(model, lambda model: ns.group_grad_norms(model, {"all": SOME}))
    assert once == 1 and torch.equal(scores.values, expected.values)


def test_where_dropout_would_wake_a_warning_says_what_it_costs() -> None:
    model = Dropping()
    said = "gradient checkpointing of Dropping is off while scores are computed.*smaller batches need less memory"
    with pytest.warns(UserWarning, match=said):
        runs, scores = runs_of(model, lambda model: ns.group_grad_norms(model, {"all": SOME}))
    assert runs == 1
    model.gradient_checkpointing = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scores.values, ns.group_grad_norms(model, {"all": SOME}).values)


@pytest.mark.parametrize("make", [Encoder, lambda: bert()], ids=["encoder", "transformers"])
def test_effects_say_that_checkpointing_is_off(make: Any) -> None:
    model = make()
    data = SOME if isinstance(model, Encoder) else DATA
    if not isinstance(model, Encoder):
        model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is off while effects are computed"):
        effects = ns.group_effects(model, data)
    model.gradient_checkpointing = False
    if not isinstance(model, Encoder):
        model.gradient_checkpointing_disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(effects.values, ns.group_effects(model, data).values)


# --- the page -------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "trainers.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's examples leave behind; they have run without a failure."""
    test = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=report.append, clear_globs=False
    )
    assert results.failed == 0, "".join(report)
    assert results.attempted > 60
    return test.globs


def test_the_callback_of_scores_changes_nothing(page: dict[str, Any]) -> None:
    model, loader = bert(), ns.with_groups(DATA, torch.arange(16) % 4)
    before = snapshot(model)
    critical = page["Critical"](loader, k=2)
    critical.on_epoch_end(None, None, None, model=model)
    assert_unchanged(before, model)
    expected = ns.group_grad_norms(model, loader, where="*dense.weight")
    assert critical.epochs == [{group: ns.topk(expected[group], 2) for group in range(4)}]


def test_the_loss_of_the_twin_is_a_term_in_training_alone(page: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), dict(DATA[0])
    made = page["TwinTrainer"](model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    made.twin = ns.apply(cut(model), model)
    whole, pruned = model(**inputs), ns.bake(cut(model), model)(**inputs)
    term = 0.2 * nn.functional.mse_loss(pruned.logits, whole.logits)
    assert term > 0
    torch.testing.assert_close(made.compute_loss(model, inputs), whole.loss + term)
    loss, outputs = made.compute_loss(model.eval(), inputs, return_outputs=True)
    assert torch.equal(loss, outputs.loss)


class Control:
    should_training_stop = False


def test_training_stops_when_the_worst_is_no_better(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    worst = iter([0.2, 0.3, 0.5, 0.5, 0.6])

    class Metrics:
        def __init__(self) -> None:
            self.worst = next(worst)

    monkeypatch.setattr(ns, "evaluate", lambda *_: Metrics())
    stop, control = page["StopByWorst"](DATA), Control()
    for expected in (False, False, False, True, True):
        stop.on_epoch_end(None, None, control, model=None)
        assert control.should_training_stop == expected


@pytest.mark.filterwarnings("ignore")
def test_lightning_stops_by_the_worst_group(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(5, 2)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.network.parameters(), lr=0.0)

    examples = torch.utils.data.TensorDataset(*SOME[0])
    stop = page["StopByWorstGroup"](ns.with_groups(SOME, torch.arange(8) % 2))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    made = lightning.Trainer(max_epochs=9, callbacks=[stop], enable_model_summary=False, **options)
    made.fit(Module(), torch.utils.data.DataLoader(examples, batch_size=4))
    assert made.current_epoch == 2 and len(stop.worst) == 2
