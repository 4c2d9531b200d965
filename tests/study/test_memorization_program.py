"""The program of memorization: what its models are, what it says of minorities, and how sure of it it is."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import memorization as module
import numpy as np
import pytest
import torch
from memorization import Ensemble, contrast, make_fit, rank_correlation, table
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.memorization import MemorizationScores
from neuronsurgery.study import data, models
from neuronsurgery.study.data import permutation, uniforms
from neuronsurgery.study.experiments import DRAW_SEED, studied
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import RunFolder, Settings
from neuronsurgery.study.stage_fragility import Examples
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import Recipe, train
from study.little_study import tiny_resnet
from study.test_readers import make_birds

COUNTS = {"train": (20, 5, 4, 11), "validation": (2,) * 4, "test": (2,) * 4}
RECIPE = Recipe(epochs=2, batch_size=16)
SETTINGS = Settings(epochs=2, draws=2)
MINUS = "\N{MINUS SIGN}"
MODELS, SHARE = 8, 0.5  # six suffice for every image to be seen and not seen
KEYS = {"models", "share", "epochs", "groups", "minority_difference", "points", "relation"}


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def few_resamples_and_a_tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 50)
    monkeypatch.setattr(models, "small_resnet", tiny_resnet)


@pytest.fixture(scope="module")
def dataset() -> data.DataSet:
    return data.synthetic(0, counts=COUNTS)


@pytest.fixture(scope="module")
def trained(dataset: data.DataSet, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = train(tiny_resnet(0), dataset.train, tmp_path_factory.mktemp("erm"), recipe=RECIPE)
    return Trained(model, {}, [], studied({"head.weight", "head.bias"}))


def stage(path: Path, dataset: Any, trained: Trained, **options: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"models": MODELS, "share": SHARE, "recipe": RECIPE, "progress": False, **options}
    return module.memorization(RunFolder(path, SETTINGS), dataset, trained, **chosen)


@pytest.fixture
def without_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_relation", lambda *_: [])


# --- the entry ------------------------------------------------------------------------------------------------------


def test_the_entry_has_what_it_promises(tmp_path: Path, dataset: data.DataSet, trained: Trained) -> None:
    before = snapshot(trained.model)
    row = stage(tmp_path / "run", dataset, trained)
    assert_unchanged(before, trained.model)
    assert set(row) == KEYS
    assert (row["models"], row["share"], row["epochs"]) == (MODELS, SHARE, 1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    counts = {group["group"]: group["count"] for group in row["groups"]}
    assert counts == dict(zip(dataset.group_names, COUNTS["train"], strict=True))
    for group, points in zip(row["groups"], row["points"], strict=True):
        assert points["group"] == group["group"]
        assert points["of"] == len(points["scores"]) == group["count"]
        assert group["mean"] == pytest.approx(statistics.fmean(points["scores"]), abs=1e-4)
        assert group["mean"] == pytest.approx(group["right_when_seen"] - group["right_when_not_seen"])
        error = statistics.stdev(points["scores"]) / math.sqrt(group["count"])
        assert group["standard_error"] == pytest.approx(error, abs=1e-4)
    land, on_water, on_land, water = (group["mean"] for group in row["groups"])
    assert row["minority_difference"]["mean"] == pytest.approx((on_water - land + on_land - water) / 2)
    alone = row["minority_difference"]["groups"]
    assert [(one["group"], pytest.approx(one["mean"])) for one in alone] == [
        ("landbird on water", on_water - land),
        ("waterbird on land", on_land - water),
    ]
    for relation in row["relation"]:
        assert {"cut", "spearman", "low", "high", "count", "group"} <= set(relation)
        assert (relation["spearman"] is None) == ("impossible" in relation)
    groups = {relation["group"]: relation["count"] for relation in row["relation"]}
    assert groups == {"all": 40, "landbird on water": 5, "waterbird on land": 4}
    assert len({relation["cut"] for relation in row["relation"]}) == 6


@pytest.mark.usefixtures("without_cuts")
def test_shares_of_right_answers_are_those_of_the_models_and_every_model_is_asked_for_once(
    tmp_path: Path, dataset: data.DataSet, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, runs, calls = ns.memorization.memorization_scores, [], []
    right = torch.from_numpy(uniforms((40,), "right", 0)) < 0.5  # whatever was trained on, and all images seen besides

    def counted(*arguments: Any, **options: Any) -> MemorizationScores:
        runs.append(options)
        return real(*arguments, **options)

    def fit(indices: Tensor) -> Tensor:
        calls.append(indices)
        return right.index_fill(0, indices, True)

    monkeypatch.setattr(ns.memorization, "memorization_scores", counted)
    monkeypatch.setattr(module, "make_fit", lambda *_: fit)
    row = stage(tmp_path / "run", dataset, trained)
    assert len(runs) == 1 and len(calls) == MODELS
    for group, found in enumerate(row["groups"]):
        own = right[dataset.train.groups == group].double()
        assert found["right_when_seen"] == 1
        assert found["right_when_not_seen"] == pytest.approx(float(own.mean()))
        assert found["mean"] == pytest.approx(1 - float(own.mean()))


@pytest.mark.usefixtures("without_cuts")
def test_what_is_there_is_not_done_again(
    tmp_path: Path, dataset: data.DataSet, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = stage(tmp_path / "run", dataset, trained)
    monkeypatch.setattr(module, "train", None)
    assert stage(tmp_path / "run", dataset, trained) == row
    (tmp_path / "run" / "experiments" / f"memorization-{MODELS}-{SHARE}-1.json").unlink()
    assert stage(tmp_path / "run", dataset, trained) == row  # from what each model came to
    with pytest.raises(TypeError, match="not callable"):  # other models are needed
        stage(tmp_path / "run", dataset, trained, epochs=2)


@pytest.mark.usefixtures("without_cuts")
@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_killed_stage_goes_on_to_the_same_entry(
    killed_at: int, tmp_path: Path, dataset: data.DataSet, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage(tmp_path / "whole", dataset, trained)
    calls = []

    def counting(*args: Any, **options: Any) -> nn.Module:
        calls.append(1)
        if len(calls) == killed_at:
            raise KilledError
        return train(*args, **options)

    monkeypatch.setattr(module, "train", counting)
    with pytest.raises(KilledError):
        stage(tmp_path / "broken", dataset, trained)
    assert stage(tmp_path / "broken", dataset, trained) == whole
    assert len(calls) == MODELS + 1  # the one that was killed is the only one begun twice


def test_a_network_without_branches_lacks_the_knockout_alone(tmp_path: Path, dataset: data.DataSet) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))
    trained = Trained(plain, {}, [], studied({"3.weight", "3.bias"}))
    cuts = {relation["cut"] for relation in stage(tmp_path / "run", dataset, trained)["relation"]}
    assert len(cuts) == 5
    assert not any("residual" in cut for cut in cuts)


def test_bad_arguments_are_refused_before_any_training(
    tmp_path: Path, dataset: data.DataSet, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", None)
    with pytest.raises(ValueError, match=r"epochs must be an integer of at least 1, not 0: pass None for half"):
        stage(tmp_path / "run", dataset, trained, epochs=0)
    with pytest.raises(ValueError, match=r"nothing can be said about them: pass models=\d+, the least that suffices"):
        stage(tmp_path / "run", dataset, trained, models=3)
    with pytest.raises(ValueError, match=r"share must be a number between 0 and 1, not 1\.5"):
        stage(tmp_path / "run", dataset, trained, share=1.5)


def test_the_recipe_is_that_of_the_preset() -> None:
    assert module._preset(Settings(preset="sgd")).momentum == 0.9
    assert module._preset(Settings(preset="waterbirds")).batch_size == 32


# --- the models -----------------------------------------------------------------------------------------------------


def test_a_model_is_drawn_anew_and_by_its_subset_alone(dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(network: nn.Module, source: Any, folder: str, **options: Any) -> nn.Module:
        seen.append((network, source, options["seed"], folder))
        return train(network, source, folder, **options)

    monkeypatch.setattr(module, "train", noting)
    a, b = torch.arange(0, 30), torch.arange(10, 40)
    one = make_fit(dataset, SETTINGS, replace(RECIPE, epochs=3))
    outcomes = [one(a), one(b), one(a), make_fit(dataset, replace(SETTINGS, seed=1), RECIPE)(a)]
    assert torch.equal(outcomes[0], outcomes[2])
    assert outcomes[0].dtype == torch.bool
    first, second, again, other = seen
    assert first[2] == again[2]
    assert len({first[2], second[2], other[2]}) == 3
    assert len({float(network.stem.weight.detach().sum()) for network, *_ in seen}) == 3
    assert torch.equal(first[1].split.images, dataset.train.images[a])
    assert first[1].augmentation == dataset.augmentation
    assert not any(Path(folder).exists() for *_, folder in seen)


def test_outcomes_are_of_all_images_as_they_are_in_the_order_of_the_split(
    dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_resnet(3).eval()
    monkeypatch.setattr(module, "train", lambda *_, **__: model)
    shuffled = replace(
        dataset, splits={**dataset.splits, "train": dataset.train.subset(torch.from_numpy(permutation(40, "mixed")))}
    )
    split = shuffled.splits["train"]
    with torch.no_grad():
        expected = [int(model(image[None]).argmax()) == int(split.targets[i]) for i, image in enumerate(split.images)]
    assert make_fit(shuffled, SETTINGS, RECIPE)(torch.arange(20)).tolist() == expected
    assert 0 < sum(expected) < 40


def test_images_on_disk_are_trained_on_as_well(tmp_path: Path) -> None:
    from neuronsurgery.study.readers import READERS

    make_birds(root := tmp_path / "birds")
    birds = READERS["waterbirds"](root)
    count = len(birds.splits["train"])
    outcomes = make_fit(birds, SETTINGS, replace(RECIPE, epochs=1))(torch.arange(count - 1))
    assert outcomes.shape == (count,)


# --- how sure it is -------------------------------------------------------------------------------------------------


def ensemble_of(outcomes: Tensor, member: Tensor) -> Ensemble:
    seen, unseen = member.sum(0), (~member).sum(0)
    values = (outcomes * member).sum(0) / seen - (outcomes * ~member).sum(0) / unseen
    return Ensemble(MemorizationScores(values, values, seen, unseen, 0.5, 0), outcomes, member)


def drawn_ensemble(models: int, examples: int, seed: int) -> Ensemble:
    """Outcomes that are any numbers; every image is seen and not seen at least twice."""
    draws = torch.from_numpy(uniforms((2, models, examples), "ensemble", seed))
    member = draws[0] < 0.6
    member[:2], member[2:4] = True, False
    return ensemble_of(draws[1], member)


def scores_by_lists(outcomes: Sequence[Sequence[float]], member: Sequence[Sequence[bool]]) -> list[float]:
    scores = []
    for i in range(len(outcomes[0])):
        inside = [row[i] for row, mine in zip(outcomes, member, strict=True) if mine[i]]
        outside = [row[i] for row, mine in zip(outcomes, member, strict=True) if not mine[i]]
        scores.append(statistics.fmean(inside) - statistics.fmean(outside))
    return scores


def test_scores_without_each_model_are_those_of_a_slow_loop() -> None:
    ensemble = drawn_ensemble(12, 7, 0)
    outcomes, member = ensemble.outcomes.tolist(), ensemble.member.tolist()
    for model, scores in enumerate(ensemble.without_each()):
        others = [t for t in range(12) if t != model]
        expected = scores_by_lists([outcomes[t] for t in others], [member[t] for t in others])
        assert scores.tolist() == pytest.approx(expected, abs=1e-12)


def test_an_image_that_no_other_model_saw_keeps_its_side() -> None:
    ensemble = ensemble_of(torch.tensor([[1.0], [0.0], [1.0]]).double(), torch.tensor([[True], [False], [False]]))
    assert [scores.tolist() for scores in ensemble.without_each()] == [[0.5], [0.0], [1.0]]


def test_the_interval_is_that_of_the_formula() -> None:
    models, cells = 12, torch.tensor([0, 0, 0, 0, 1, 1, 1])
    ensemble = drawn_ensemble(models, 7, 1)
    weights = torch.tensor([-0.25] * 4 + [1 / 3] * 3).double()
    outcomes, member = ensemble.outcomes.tolist(), ensemble.member.tolist()
    left_out = []
    for model in range(models):
        others = [t for t in range(models) if t != model]
        scores = scores_by_lists([outcomes[t] for t in others], [member[t] for t in others])
        left_out.append(statistics.fmean(scores[4:]) - statistics.fmean(scores[:4]))
    scores = scores_by_lists(outcomes, member)
    parts = [(models - 1) ** 2 / models * statistics.variance(left_out)]
    parts += [statistics.variance(scores[4:]) / 3, statistics.variance(scores[:4]) / 4]
    degrees = math.floor(sum(parts) ** 2 / (parts[0] ** 2 / 11 + parts[1] ** 2 / 2 + parts[2] ** 2 / 3))
    quantile = pytest.importorskip("scipy.stats").t.ppf(0.975, degrees)
    said = contrast(ensemble, weights, cells, "rare")
    assert said["mean"] == pytest.approx(statistics.fmean(scores[4:]) - statistics.fmean(scores[:4]))
    assert said["high"] - said["mean"] == pytest.approx(quantile * math.sqrt(sum(parts)))
    assert said["models_error"] == pytest.approx(math.sqrt(parts[0]))
    assert said["examples_error"] == pytest.approx(math.sqrt(parts[1] + parts[2]))


def test_the_interval_covers_where_models_are_shared_and_one_over_images_alone_does_not() -> None:
    cells = torch.tensor([0] * 60 + [1] * 20)
    weights = torch.tensor([-1 / 60] * 60 + [1 / 20] * 20).double()
    covered = naive = 0
    for number in range(100):
        draws = torch.from_numpy(uniforms((16, 80), "coverage", number))
        order = torch.from_numpy(uniforms((16, 80), "coverage, order", number)).argsort(0).argsort(0)
        member = order < 10
        # A model that has learnt the rare cell gets right every image of it that it saw; half the models have.
        learnt = torch.from_numpy(uniforms((16, 1), "coverage, learnt", number)) < 0.5
        chance = torch.where(member & (cells == 1) & learnt, 1.0, 0.3)
        said = contrast(ensemble_of((draws < chance).double(), member), weights, cells, "rare")
        covered += said["low"] <= 0.35 <= said["high"]
        naive += abs(said["mean"] - 0.35) <= 2 * said["examples_error"]
    assert covered >= 90
    assert naive < 70


@pytest.mark.parametrize(("rare", "verdict"), [(1.0, "rare are memorised more"), (0.0, "rare are memorised less")])
def test_a_difference_is_said_in_words(rare: float, verdict: str) -> None:
    """By hand: the common cell scores 1/2, the rare one 1 or 0."""
    member = torch.tensor([[True] * 4, [False] * 4]).repeat(30, 1)
    outcomes = torch.where(member, torch.tensor([0.5, 0.5, rare, rare]), 0.0).double()
    weights, cells = torch.tensor([-0.5, -0.5, 0.5, 0.5]).double(), torch.tensor([0, 0, 1, 1])
    bound = "+0.500" if rare else f"{MINUS}0.500"
    said = contrast(ensemble_of(outcomes, member), weights, cells, "rare")["text"]
    assert said == f"that {verdict} than the rest of their class is shown: {bound} (95 % interval {bound} to {bound})"


def test_a_difference_that_is_not_shown_says_so() -> None:
    ensemble = drawn_ensemble(12, 6, 2)
    weights, cells = torch.tensor([-0.5, -0.5, 0, 0, 0.5, 0.5]).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    said = contrast(ensemble, weights, cells, "rare")
    assert said["low"] < 0 < said["high"]
    low, mean, high = (f"{said[key]:+.3f}".replace("-", MINUS) for key in ("low", "mean", "high"))
    what = "that rare are memorised more than the rest of their class is not shown"
    assert said["text"] == f"{what}: {mean} (95 % interval {low} to {high})"
    weights, cells = torch.tensor([-0.5, -0.5, 0, 0, 0, 1]).double(), torch.tensor([0, 0, 1, 1, 1, 2])
    single = contrast(ensemble, weights, cells, "rare")
    assert (single["low"], single["high"]) == (None, None)
    mean = f"{single['mean']:+.3f}".replace("-", MINUS)
    assert single["text"] == f"{what}: {mean}, and {single['impossible']}"
    assert "a single image says nothing of the spread among rare" in single["text"]


@pytest.mark.usefixtures("without_cuts")
def test_classes_without_both_sides_are_said_to_have_none(tmp_path: Path, trained: Trained) -> None:
    dataset = data.synthetic(0, counts={**COUNTS, "train": (20, 0, 0, 20)})
    row = stage(tmp_path / "run", dataset, trained)
    what = "that minority images are memorised more than the rest of their class is not shown"
    assert row["minority_difference"]["text"] == f"{what}: no class has both minority images and others"


# --- what cuts do ---------------------------------------------------------------------------------------------------


def margins_of(model: nn.Module, split: data.Split) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(split.images).double()
    own = logits.gather(1, split.targets[:, None])[:, 0]
    return own - logits.scatter(1, split.targets[:, None], -torch.inf).amax(1)


def test_effects_are_those_of_edits_made_one_by_one(tmp_path: Path, dataset: data.DataSet, trained: Trained) -> None:
    folder, split = RunFolder(tmp_path / "run", SETTINGS), dataset.train
    effects = module._effects(folder, dataset, trained, Examples.of(split), False)
    gradients = ns.group_grad_norms(trained.model, dataset.loaders("train"), where=trained.where)
    before = margins_of(trained.model, split)
    own = torch.empty_like(before)
    for group, name in enumerate(dataset.group_names):
        members = split.groups == group
        edited = ns.apply(ns.zero_out(ns.topk(gradients[name], 3)), trained.model)
        own[members] = margins_of(edited, split.subset(members))
    random = [ns.zero_out(ns.sample(gradients.layout, 3, seed=DRAW_SEED + draw)) for draw in range(2)]
    drawn = torch.stack([margins_of(ns.apply(edit, trained.model), split) for edit in random])
    expected = {
        "critical neurons of the own group: change of the margin": own - before,
        "critical neurons of the own group: change of correctness": (own > 0).double() - (before > 0).double(),
        "random neurons: change of the margin": drawn.mean(0) - before,
        "random neurons: change of correctness": (drawn > 0).double().mean(0) - (before > 0).double(),
        "nothing: the margin itself": before,
    }
    for name, values in expected.items():
        torch.testing.assert_close(effects[name], values, atol=1e-5, rtol=1e-4, msg=name)
    left = effects["last residual stage: fragility"]
    assert [float(left[split.targets == target].median()) for target in (0, 1)] == [0, 0]


def test_scores_meet_the_effects_of_the_same_images(tmp_path: Path, dataset: data.DataSet, trained: Trained) -> None:
    """Of a split whose groups are mixed, while the loaders give them one after the other."""
    mixed = dataset.train.subset(torch.from_numpy(permutation(40, "mixed")))
    shuffled = replace(dataset, splits=MappingProxyType({**dataset.splits, "train": mixed}))
    scores = margins_of(trained.model, mixed)
    rows = module._relation(RunFolder(tmp_path / "run", SETTINGS), shuffled, trained, scores, False)
    found = {row["group"]: row["spearman"] for row in rows if row["cut"] == "nothing: the margin itself"}
    assert found == {name: pytest.approx(1.0, abs=1e-3) for name in ("all", "landbird on water", "waterbird on land")}


@pytest.mark.parametrize("seed", range(5))
def test_spearman_and_its_interval_are_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    draws = uniforms((2, 30), "spearman", seed)
    x = np.floor(draws[0] * 6)  # ties
    y = x + np.floor(draws[1] * 9)
    said = rank_correlation(torch.from_numpy(x), torch.from_numpy(y), seed)
    assert said["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    resampled = []
    for chosen in module._resamples(30, seed):
        resampled.append(stats.spearmanr(x[chosen], y[chosen]).statistic)
    assert [said["low"], said["high"]] == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist())
    assert len({tuple(times) for times in module._resamples(30, seed)}) == 50


def test_a_value_that_is_the_same_for_all_has_no_correlation() -> None:
    rising, flat = torch.arange(4).double(), torch.zeros(4).double()
    assert rank_correlation(rising, flat, 0) == {
        "spearman": None,
        "low": None,
        "high": None,
        "count": 4,
        "impossible": "the effect is the same for all images",
    }
    assert rank_correlation(flat, rising, 0)["impossible"] == "the score is the same for all images"
    assert rank_correlation(flat, flat, 0)["impossible"] == "the score and the effect are the same for all images"
    assert rank_correlation(rising, -rising, 0)["spearman"] == -1


def test_resamples_without_spread_count_as_no_relation() -> None:
    """One image of 30 differs: it is missing from a resample with probability (29/30)^30 = 0.36."""
    x, y = torch.arange(30).double(), torch.zeros(30).double()
    y[29] = 1
    assert rank_correlation(x, y, 0)["low"] == 0


# --- what is printed ------------------------------------------------------------------------------------------------


def test_what_is_printed_has_every_group_and_relation(tmp_path: Path, dataset: data.DataSet, trained: Trained) -> None:
    row = stage(tmp_path / "run", dataset, trained)
    printed = table(row, [0.25, 0.5, 0.75, 1.0])
    assert printed.startswith(f"{MODELS} models on 50 % of the images, 1 epochs each\n")
    for group in row["groups"]:
        assert re.search(rf"\n{group['group']} .* (25|50|75|100)\.0 +{group['count']}\n", printed)
    text = row["minority_difference"]["text"]
    assert f"\n{text[0].upper()}{text[1:]}.\n" in printed
    assert all(f"  {one['cut']}, {one['group']}: " in printed for one in row["relation"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["memorization", "falsifications"])
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "benchmarks" / f"{program}.py"
    only = ["--only", "label noise"] if program == "falsifications" else ["--models", "16"]
    command = [sys.executable, str(file), "--quick", "--out", str(tmp_path / "run"), *only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {"memorization": "Spearman's correlation", "falsifications": "ranks every minority"}[program] in done.stdout
