"""How the arms of Stage 2 are wired: from which weights, on which images, minimising what, by which recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study import data, last_layer, methods, models, training
from neuronsurgery.study import stage_two as module
from neuronsurgery.study.cli import main
from neuronsurgery.study.last_layer import REFITS, Features, Tuned, dfr, extract_features, retrained
from neuronsurgery.study.methods import (
    FINE_TUNING,
    ContrastiveBatches,
    ContrastivePruning,
    CorrectNContrast,
    GroupBalanced,
    GroupDro,
    error_set,
    predictions,
    unaugmented,
)
from neuronsurgery.study.models import DEFAULTS, build_model
from neuronsurgery.study.program import _published
from neuronsurgery.study.readers import joined_source
from neuronsurgery.study.report.writing import settings_words
from neuronsurgery.study.run import RunFolder, Settings, made_files
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.stage_two import MORE_RATES, RATES, Setting, Training, make_arms, stage_two
from neuronsurgery.study.training import (
    Erm,
    Recipe,
    Source,
    checkpoint_epochs,
    checkpoint_path,
    load_checkpoint,
    train,
)
from neuronsurgery.types import Loader
from study.little_study import tiny_resnet

pytestmark = pytest.mark.xdist_group("arms")  # its fixtures are made once, by one process

COUNTS = {"train": (60, 10, 8, 30), "held-out": (30, 4, 3, 15), "validation": (12,) * 4, "test": (4,) * 4}
RECIPE = Recipe(learning_rate=0.02, epochs=10, batch_size=8)  # makes mistakes at every epoch, and at each others
OWN = Recipe("sgd", learning_rate=0.02, weight_decay=0.01, momentum=0.9, batch_size=16, schedule="constant")
TOO = ", held-out images too"


@pytest.fixture(scope="module")
def dataset() -> data.DataSet:
    return data.synthetic(0, counts=COUNTS)


@pytest.fixture(scope="module")
def trained(dataset: data.DataSet, erm: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network trained for ten epochs, so that the early ones are the first and the second."""
    return erm(dataset, tmp_path_factory.mktemp("erm"), RECIPE)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def setting(dataset: data.DataSet, trained: Trained) -> Setting:
    """Everything that arms can be made from, embedded and from random weights."""
    return Setting(
        trained=trained,
        source=Source(dataset.train, dataset.augmentation),
        recipe=RECIPE,
        seed=0,
        pretrained=False,
        fine_tuning_epochs=3,
        comparison_epochs=5,
        joined=joined_source(dataset),
        full=True,
    )


@pytest.fixture(scope="module")
def arms(setting: Setting) -> dict[str, Training]:
    """What each arm is trained with, by its name."""
    return {arm.name: arm.make() for arm in make_arms(setting)}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def of_epoch(trained: Trained, epoch: int) -> nn.Module:
    return load_checkpoint(trained.model, trained.checkpoints[epoch].parents[1], epoch)


def elsewhere(setting: Setting, path: Path, **changes: Any) -> Setting:
    """A setting whose run is in a folder of its own, with the checkpoint of the first weights alone."""
    checkpoint = checkpoint_path(path, 0)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(setting.trained.checkpoints[0].read_bytes())
    return replace(setting, trained=replace(setting.trained, checkpoints={0: checkpoint}), **changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that errors and predictions are asked of, in order; the answers are made up."""
    models: list[nn.Module] = []

    def answer(model: nn.Module, loader: Loader, every: int) -> Tensor:
        models.append(model)
        return torch.arange(sum(len(batch[1]) for batch in loader)) % every

    monkeypatch.setattr(methods, "predictions", lambda model, loader: answer(model, loader, 2))
    monkeypatch.setattr(methods, "error_set", lambda model, loader: answer(model, loader, 3) == 0)
    return models


FINE_TUNED = (
    *(f"ERM continued, rate {rate:g}" for rate in MORE_RATES),
    *("pruned by gradient", "pruned by magnitude", "slides' objective", "pruned, own statistics"),
    *("nothing pruned", "random pruned", "random pruned, own statistics"),
)
ANEW = ("JTT, T = 1", "JTT, T = 2", "CnC, T = 1", "CnC, T = 2", "Group DRO")


def test_there_are_these_arms_and_no_others(arms: dict[str, Training]) -> None:
    assert list(arms) == [*FINE_TUNED, *ANEW, f"ERM{TOO}", *(f"{name}{TOO}" for name in ANEW)]


# Starts and recipes


def test_the_first_weights_differ_from_those_of_every_later_epoch(trained: Trained) -> None:
    """What follows would else prove nothing."""
    assert list(trained.checkpoints) == list(range(11))
    assert same_weights(of_epoch(trained, 10), trained.model)
    assert not any(same_weights(of_epoch(trained, epoch), of_epoch(trained, epoch + 1)) for epoch in range(10))


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_starts_from_the_trained_model(name: str, arms: dict[str, Training], setting: Setting) -> None:
    assert arms[name].start is setting.trained.model
    assert arms[name].source is setting.source


@pytest.mark.parametrize("name", [*ANEW, f"ERM{TOO}", *(f"{name}{TOO}" for name in ANEW)])
def test_other_methods_start_from_the_first_weights(name: str, arms: dict[str, Training], trained: Trained) -> None:
    assert same_weights(arms[name].start, of_epoch(trained, 0))


def test_fine_tuning_is_literally_this() -> None:
    assert Recipe("adam", 2e-4, 0.0, 0.0, 20, 100, "plateau") == FINE_TUNING
    assert RATES == (2e-4, 1e-3)
    assert MORE_RATES == (5e-5, 2e-4, 5e-4, 1e-3, 2e-3)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_has_its_recipe_and_continued_erm_its_rate(name: str, arms: dict[str, Training]) -> None:
    rate = float(name.split("rate ")[1]) if "rate" in name else 2e-4
    assert arms[name].recipe == Recipe("adam", rate, epochs=3, batch_size=100, schedule="plateau")


def test_continued_erm_has_every_rate_that_is_asked_for(setting: Setting) -> None:
    for full, rates in ((True, MORE_RATES), (False, RATES)):
        made = [arm for arm in make_arms(replace(setting, full=full)) if arm.choice == "ERM continued"]
        assert [arm.make().recipe.learning_rate for arm in made] == list(rates)
        assert all(arm.make().method == Erm() for arm in made)


@pytest.mark.parametrize("name", [name for name in ANEW if not name.startswith("JTT")])
@pytest.mark.parametrize("too", ["", TOO])
def test_other_methods_have_the_recipe_of_the_run(name: str, too: str, arms: dict[str, Training]) -> None:
    assert arms[name + too].recipe == replace(RECIPE, epochs=5)
    assert arms[f"ERM{TOO}"].recipe == replace(RECIPE, epochs=5)


def test_methods_have_their_own_recipe_where_there_is_one(
    setting: Setting, tmp_path: Path, asked: list[nn.Module]
) -> None:
    own = {name: replace(OWN, batch_size=place) for place, name in enumerate(("JTT", "CnC", "Group DRO"), start=8)}
    made = make_arms(elsewhere(setting, tmp_path / "run", comparisons=own, comparison_epochs=1))
    sizes = {arm.name: arm.make().recipe for arm in made if arm.name in ANEW}
    for name, recipe in sizes.items():
        assert recipe == replace(own[name.split(",")[0]], epochs=1)


# The paper's fine-tuning and its controls


@pytest.mark.parametrize(
    ("name", "criterion", "supervised", "weight", "statistics"),
    [
        ("pruned by gradient", "gradient", "cross_entropy", 1.0, "shared"),
        ("pruned by magnitude", "magnitude", "cross_entropy", 1.0, "shared"),
        ("slides' objective", "gradient", "mse", 0.2, "shared"),
        ("pruned, own statistics", "gradient", "cross_entropy", 1.0, "own"),
        ("nothing pruned", "none", "cross_entropy", 1.0, "shared"),
        ("random pruned", "random", "cross_entropy", 1.0, "shared"),
        ("random pruned, own statistics", "random", "cross_entropy", 1.0, "own"),
    ],
)
def test_variants_of_the_paper_differ_in_what_they_say(
    name: str,
    criterion: str,
    supervised: str,
    weight: float,
    statistics: str,
    arms: dict[str, Training],
    setting: Setting,
) -> None:
    method = arms[name].method
    assert isinstance(method, ContrastivePruning)
    assert (method.criterion, method.supervised, method.weight, method.statistics) == (
        criterion,
        supervised,
        weight,
        statistics,
    )
    assert (method.fraction, method.temperature, method.top, method.sample) == (1e-4, 0.5, 256, 128)
    assert method.where is setting.trained.where
    shown = torch.cat([images for images, _, _ in method.examples])
    assert torch.equal(shown, setting.source.split.images)  # type: ignore[union-attr]  # as they are, and in order


def test_defaults_of_contrastive_pruning_are_literally_these() -> None:
    said = ContrastivePruning([]).describe()
    assert said == {
        "name": "contrastive pruning",
        "where": None,
        "criterion": "gradient",
        "fraction": 1e-4,
        "temperature": 0.5,
        "weight": 1.0,
        "supervised": "cross_entropy",
        "statistics": "shared",
        "top": 256,
        "sample": 128,
    }


# Just Train Twice and Correct-n-Contrast


def source_of(setting: Setting, too: str) -> Source:
    source = setting.joined if too else setting.source
    assert isinstance(source, Source)
    return source


def assert_copied(found: Source, source: Source, copies: Tensor) -> None:
    """As many copies of each image."""
    assert isinstance(found, Source)
    assert found.augmentation == source.augmentation
    for name, part in vars(source.split).items():
        assert torch.equal(getattr(found.split, name), part.repeat_interleave(copies, dim=0))


@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("too", ["", TOO])
def test_jtt_copies_the_errors_of_the_early_epoch(
    early: int, too: str, arms: dict[str, Training], setting: Setting, trained: Trained
) -> None:
    how, source = arms[f"JTT, T = {early}{too}"], source_of(setting, too)
    wrong, late = (error_set(of_epoch(trained, epoch), unaugmented(source)) for epoch in (early, 10))
    assert not torch.equal(wrong, late) and late.any()
    count, all_images = int(wrong.sum()), len(source)
    more = max(0, round((all_images - count) / count) - 1)
    assert_copied(how.source, source, 1 + more * wrong.long())
    assert how.method == Erm()
    fewer = max(1, round(5 * all_images / (all_images + more * count)))
    assert how.recipe == replace(RECIPE, epochs=fewer)
    assert how.given == {"name": "just train twice", "errors": count, "upsampling": more, "epoch": early}


def test_jtt_is_shorter_where_there_are_copies(arms: dict[str, Training], setting: Setting) -> None:
    """As many steps as 5 epochs without copies, as near as whole epochs come to it."""
    how = arms["JTT, T = 2"]
    assert how.recipe.epochs < 5
    assert abs(how.recipe.epochs * len(how.source) - 5 * len(setting.source)) <= len(how.source) / 2


@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("too", ["", TOO])
def test_cnc_goes_by_the_predictions_of_the_early_epoch(
    early: int, too: str, arms: dict[str, Training], setting: Setting, trained: Trained
) -> None:
    how, source = arms[f"CnC, T = {early}{too}"], source_of(setting, too)
    then, late = (predictions(of_epoch(trained, epoch), unaugmented(source)) for epoch in (early, 10))
    assert not torch.equal(then, late)
    assert isinstance(how.source, ContrastiveBatches)
    assert how.source.split is source.split
    assert torch.equal(how.source.predicted, then)
    assert how.method == CorrectNContrast(weight=0.75, temperature=0.1, statistics="batch")
    assert how.given == {"epoch": early}


def test_cnc_has_the_temperature_of_the_data_and_freezes_the_statistics_of_pre_trained_weights(
    setting: Setting,
) -> None:
    made = make_arms(replace(setting, pretrained=True, contrast_temperature=0.05))
    methods = [arm.make().method for arm in made if arm.name.startswith("CnC")]
    assert methods == [CorrectNContrast(weight=0.75, temperature=0.05, statistics="frozen")] * 4


# Group DRO


@pytest.mark.parametrize(
    ("too", "epochs", "size", "step_size"),
    [
        ("", 5, 8, 0.1),  # 70 steps
        ("", 100, 8, 114 / 1400),
        ("", 100, 7, 114 / 1600),  # 108 images are 15 batches of 7 and one of 3
        ("", 1000, 8, 0.01),
        (TOO, 100, 8, 114 / 2000),  # 160 images
    ],
)
def test_group_dro_has_balanced_groups_and_the_step_size_of_its_steps(
    too: str, epochs: int, size: int, step_size: float, setting: Setting
) -> None:
    changed = replace(setting, comparison_epochs=epochs, recipe=replace(RECIPE, batch_size=size))
    how = next(arm for arm in make_arms(changed) if arm.name == f"Group DRO{too}").make()
    assert how.method == GroupDro(4, step_size=pytest.approx(step_size), adjustment=0.0)
    assert isinstance(how.source, GroupBalanced)
    assert how.source.split is source_of(setting, too).split
    assert how.recipe.epochs == epochs


# With the held-out images


def test_held_out_variants_say_so_and_are_chosen_among_themselves(setting: Setting, dataset: data.DataSet) -> None:
    made = [arm for arm in make_arms(setting) if arm.held_out]
    assert [arm.choice for arm in made] == [None, f"JTT{TOO}", f"JTT{TOO}", f"CnC{TOO}", f"CnC{TOO}", None]
    assert all(arm.text.endswith("; on training and held-out images") for arm in made)
    joined = source_of(setting, TOO)
    assert len(joined) == len(dataset.train) + len(dataset.splits["held-out"])
    alone = made[0].make()
    assert alone.source is joined
    assert alone.method == Erm()
    assert not any(arm.held_out for arm in make_arms(replace(setting, joined=None)))


# First stages of their own


def test_without_a_recipe_of_its_own_a_method_trains_no_first_stage(
    arms: dict[str, Training], setting: Setting
) -> None:
    assert arms  # all are made
    assert not (setting.folder / "stage-2").exists()
    texts = {arm.name: arm.text for arm in make_arms(setting)}
    assert "that the ERM model of epoch 2 gets wrong" in texts["JTT, T = 2"]
    assert texts["CnC, T = 1"].endswith("across the predictions of the ERM model of epoch 1")


@pytest.mark.parametrize("too", ["", TOO])
def test_a_first_stage_has_the_method_s_recipe_images_and_folder(
    too: str, setting: Setting, tmp_path: Path, asked: list[nn.Module]
) -> None:
    """Against a training by hand of as many epochs; the methods go by what that says."""
    own = {"JTT": OWN, "CnC": replace(OWN, learning_rate=0.05)}
    changed = elsewhere(setting, tmp_path / "run", comparisons=own)
    arms = {arm.name: arm for arm in make_arms(changed)}
    source, start = source_of(setting, too), changed.checkpoint(0)
    for method in own:
        for early in (1, 2):
            arm = arms[f"{method}, T = {early}{too}"]
            how = arm.make()
            recipe = replace(own[method], epochs=early)
            first = train(start, source, tmp_path / f"{method} {early}", recipe=recipe)
            folder = tmp_path / "run" / "stage-2" / f"{method.lower()}-first-stage{'-held-out-images-too' * bool(too)}"
            assert same_weights(load_checkpoint(start, folder, early), first)
            assert checkpoint_epochs(folder) == (1, 2)
            assert f"the model of epoch {early} of a first stage with the method's own settings" in arm.text
            assert how.given["first_stage"] == asdict(replace(own[method], epochs=2))
            assert how.given["epoch"] == early
            assert same_weights(how.start, start)
            assert same_weights(asked[-1], first)
            if method == "JTT":
                wrong = torch.arange(len(source)) % 3 == 0
                assert_copied(how.source, source, 1 + how.given["upsampling"] * wrong.long())
                assert how.given["upsampling"] > 0
            else:
                assert isinstance(how.source, ContrastiveBatches)
                assert how.source.split is source.split
                assert how.source.predicted.tolist() == [index % 2 for index in range(len(source))]


def test_a_first_stage_is_trained_once_and_taken_up(
    setting: Setting, tmp_path: Path, asked: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = elsewhere(setting, tmp_path / "run", comparisons={"JTT": OWN}, joined=None)
    arms = {arm.name: arm for arm in make_arms(changed)}

    def killed(*args: Any, **kwargs: Any) -> nn.Module:
        kwargs["progress"] = lambda report: (_ for _ in ()).throw(KeyboardInterrupt("killed"))
        return train(*args, **kwargs)

    monkeypatch.setattr(training, "train", killed)
    with pytest.raises(KeyboardInterrupt, match="killed"):
        arms["JTT, T = 1"].make()
    folder = tmp_path / "run" / "stage-2" / "jtt-first-stage"
    assert checkpoint_epochs(folder) == (0, 1)
    monkeypatch.setattr(training, "train", train)
    arms["JTT, T = 1"].make()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    arms["JTT, T = 2"].make()
    arms["JTT, T = 1"].make()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written
    other = replace(changed, comparisons={"JTT": replace(OWN, learning_rate=0.1)})
    with pytest.raises(
        RuntimeError, match=r"the first stage of JTT could not be trained: .* holds another run; recipe"
    ):
        make_arms(other)[len(FINE_TUNED)].make()  # no finding about the data, as a ValueError would be


def recipe_in(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        recipe: dict[str, Any] = json.loads(file.metadata()["run"])["recipe"]
    return recipe


def test_waterbirds_from_pre_trained_weights_have_the_authors_settings_in_both_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("PIL.Image")
    from study.test_readers import make_birds

    make_birds(tmp_path / "birds")
    monkeypatch.setattr(models, "small_resnet", tiny_resnet)
    network = build_model("small_resnet", 2).model
    network(torch.randn(8, 3, 16, 16))  # batch norm has seen data, as that of pre-trained weights has
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    small = ("--arch", "small_resnet", "--size", "16", "--weights", str(tmp_path / "weights.pt"))
    command = ["study", "--data", "waterbirds", "--root", str(tmp_path / "birds"), *small, "--stages", "2"]
    command += ["--quick", "--epochs", "10", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    said = capsys.readouterr().err
    rows = {
        row["name"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["stage_two"]["arms"]
    }
    for method in ("JTT", "CnC"):
        folder = tmp_path / "run" / "stage-2" / f"{method.lower()}-first-stage"
        own = DEFAULTS["waterbirds"].comparisons[method]
        assert Recipe(**recipe_in(folder)) == replace(own, epochs=2)
        assert checkpoint_epochs(folder) == (1, 2)
        for early in (1, 2):
            row = rows[f"{method}, T = {early}"]
            assert f"the model of epoch {early} of a first stage with the method's own settings" in row["text"]
            assert f"Stage 2, {method}, T = {early}: " in said
            if "impossible" not in row:
                assert row["settings"]["first_stage"] == asdict(replace(own, epochs=2))
                assert row["settings"]["epoch"] == early
    files = {path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.parent.name != "tables"}
    assert files <= set(made_files(tmp_path / "run"))
    before = (tmp_path / "run" / "table.csv").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "run" / "table.csv").read_bytes() == before


# Deep feature reweighting


def test_dfr_is_fitted_on_validation_features_with_the_scaler_of_the_training_features(
    setting: Setting, dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = setting.trained.model
    features = {split: extract_features(model, dataset.loaders(split)) for split in ("train", "validation")}
    given: list[tuple[Features, Tensor, Mapping[str, Any]]] = []

    def spy(validation: Features, train_features: Tensor, **options: Any) -> Tuned:
        given.append((validation, train_features, options))
        return dfr(validation, train_features, **options)

    monkeypatch.setattr(last_layer, "dfr", spy)
    judged: list[nn.Module] = []
    row = module._dfr(lambda one: judged.append(one) or {"test": [1.0]}, replace(setting, seed=3), dataset)  # type: ignore[arg-type,func-returns-value]
    ((validation, train_features, options),) = given
    for found, expected in zip(validation, features["validation"], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(train_features, features["train"].features)
    assert options == {"strengths": setting.strengths, "seed": 3}
    tuned = dfr(features["validation"], features["train"].features, seed=3)
    rows = retrained(model, *tuned.rule, head="head")
    images = dataset.splits["test"].images
    assert torch.equal(judged[0](images), ns.bake(rows, model)(images))
    assert row["settings"] == {"C": tuned.chosen, "refits": 20}
    assert REFITS == 20
    assert row["trajectory"] == [{"epoch": 10, "loss": None, "test": [1.0]}]


def test_dfr_chooses_from_the_strengths_of_the_data(setting: Setting, dataset: data.DataSet) -> None:
    row = module._dfr(lambda model: {}, replace(setting, strengths=(0.25,)), dataset)  # type: ignore[arg-type]
    assert row["settings"]["C"] == 0.25


# What the results say of it


def test_results_and_progress_say_what_each_arm_was_given(
    setting: Setting, dataset: data.DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run", Settings(quick=True))
    few = replace(setting, fine_tuning_epochs=1, comparison_epochs=2, joined=None, full=False)
    rows = {row["name"]: row["settings"] for row in stage_two(folder, dataset, few)["arms"]}
    said = capsys.readouterr().err.splitlines()
    arms = {arm.name: arm.make() for arm in make_arms(few)}
    for name, how in arms.items():
        assert rows[name] == json.loads(json.dumps(how.settings))
        epochs = how.recipe.epochs
        assert f"Stage 2, {name}: {epochs} epoch{'s' if epochs > 1 else ''}" in said
    assert arms["JTT, T = 2"].recipe.epochs == 1
    assert rows["JTT, T = 2"]["recipe"]["epochs"] == 1
    assert {"epoch", "errors", "upsampling"} <= rows["JTT, T = 2"].keys()
    assert (rows["CnC, T = 1"]["epoch"], rows["CnC, T = 1"]["temperature"]) == (1, 0.1)
    assert rows["Group DRO"]["step_size"] == 0.1
    assert rows["ERM continued, rate 0.001"]["recipe"]["learning_rate"] == 1e-3
    assert rows["pruned by magnitude"]["criterion"] == "magnitude"
    assert {"C", "refits"} == rows["DFR"].keys()
    said = settings_words(rows["JTT, T = 2"])
    assert said.startswith("optimizer adamw, learning rate 0.02, ") and f"errors {rows['JTT, T = 2']['errors']}" in said
    assert settings_words({"recipe": asdict(OWN), "epoch": 8, "first_stage": {"epochs": 2}}).endswith(
        ", epoch 8, first stage (epochs 2)"
    )


# Settings of the authors


def published(rate: float, decay: float, size: int) -> Recipe:
    return Recipe("sgd", rate, decay, momentum=0.9, batch_size=size, schedule="constant")


def test_published_settings_are_literally_these() -> None:
    assert DEFAULTS["waterbirds"].comparisons == {
        "JTT": published(1e-5, 1.0, 64),
        "CnC": published(1e-4, 1e-3, 68),
        "Group DRO": published(1e-3, 1e-4, 128),
    }
    assert DEFAULTS["celeba"].comparisons == {
        "JTT": published(1e-5, 0.1, 64),
        "CnC": published(1e-5, 0.1, 256),
        "Group DRO": published(1e-4, 1e-4, 128),
    }
    assert {
        name: dict(found.comparisons) for name, found in DEFAULTS.items() if name not in ("waterbirds", "celeba")
    } == {name: {} for name in ("synthetic", "digits", "folder")}
    temperatures = {name: found.contrast_temperature for name, found in DEFAULTS.items()}
    assert temperatures == dict.fromkeys(DEFAULTS, 0.1) | {"celeba": 0.05}
    strengths = {name: tuple(found.strengths) for name, found in DEFAULTS.items()}
    assert strengths == dict.fromkeys(DEFAULTS, (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)) | {
        "celeba": (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_recipes_of_the_authors_are_for_pre_trained_weights_and_the_rest_is_of_the_data(name: str) -> None:
    random = build_model("small_resnet", 2)
    assert not random.pretrained
    for built in (random, replace(random, pretrained=True)):
        found = _published(argparse.Namespace(data=name), built)
        assert found == {
            "comparisons": DEFAULTS[name].comparisons if built.pretrained else {},
            "contrast_temperature": DEFAULTS[name].contrast_temperature,
            "strengths": DEFAULTS[name].strengths,
        }
