"""Stage 2 and the fragility stage: which epoch counts, what an arm leaves, and what several seeds say together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import named
from snapshot import assert_unchanged, snapshot

import neuronsurgery as ns
from neuronsurgery.study import data, training
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.last_layer import extract_features, last_logits
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import RunFolder, Settings
from neuronsurgery.study.stage_fragility import (
    Examples,
    audit,
    inferred_places,
    knockout,
    mitigate,
    stage_fragility,
    tuned_on_halves,
)
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.stage_two import SELECTIONS, Setting, average, beside_last_layers, make_arms, select, stage_two
from neuronsurgery.study.training import (
    Recipe,
    Source,
    checkpoint_epochs,
    checkpoint_path,
    load_checkpoint,
    read_trajectory,
    train,
)

pytestmark = pytest.mark.xdist_group("stages")  # its fixtures are made once, by one process

COUNTS = {"train": (60, 10, 8, 30), "held-out": (60, 8, 6, 30), "validation": (6,) * 4, "test": (8,) * 4}
RECIPE = Recipe(epochs=3, batch_size=16)


@pytest.fixture(scope="module")
def dataset() -> data.DataSet:
    """Little synthetic data with held-out images."""
    return data.synthetic(0, counts=COUNTS)


@pytest.fixture(scope="module")
def trained(dataset: data.DataSet, erm: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network trained for three epochs."""
    return erm(dataset, tmp_path_factory.mktemp("erm"), RECIPE)  # type: ignore[no-any-return]


def setting_of(dataset: data.DataSet, trained: Trained) -> Setting:
    """Stage 2 at its shortest."""
    source = Source(dataset.train, dataset.augmentation)
    return Setting(trained, source, RECIPE, 0, False, 1, 1)


# Which epoch counts


def arm(name: str, points: list[tuple[list[float], list[float], list[float]]], choice: str | None = None) -> Any:
    """A made-up arm: validation, held-out and test accuracies of two groups, epoch by epoch."""
    return {
        "name": name,
        "choice": choice,
        "settings": {"recipe": {"learning_rate": 0.1}},
        "trajectory": [
            {"epoch": i, "validation": v, "held-out": h, "test": t, "inferred": [min(h), 1.0]}
            for i, (v, h, t) in enumerate(points, start=1)
        ],
    }


COUNTS_OF_TWO = {"train": (90, 10), "held-out": (9, 1), "validation": (5, 5), "test": (20, 20)}


def test_each_rule_picks_its_epoch_and_never_looks_at_the_test_images() -> None:
    points = [
        ([0.5, 0.5], [1.0, 0.0], [0.1, 0.9]),  # highest worst group of validation
        ([0.9, 0.4], [0.9, 0.5], [0.2, 0.8]),  # highest worst inferred group
        ([0.3, 0.2], [1.0, 0.1], [0.3, 0.7]),  # highest accuracy over the held-out images
        ([0.1, 0.1], [0.1, 0.0], [0.4, 0.6]),  # last
    ]
    (row,) = select([arm("a", points)], COUNTS_OF_TWO, "held-out")
    picked = {rule: found["epoch"] for rule, found in row["selected"].items()}
    assert picked == {"last epoch": 4, "class labels": 3, "inferred groups": 2, "worst group": 1}
    found = row["selected"]["class labels"]
    assert found["worst"] == 0.3
    assert found["balanced"] == found["plain"] == pytest.approx(0.5)
    assert found["train-weighted"] == pytest.approx(0.9 * 0.3 + 0.1 * 0.7)


def test_of_equally_good_epochs_the_first_counts() -> None:
    points = [([0.5, 0.5], [0.5, 0.5], [0.1, 0.2]), ([0.5, 0.5], [0.5, 0.5], [0.9, 0.9])]
    (row,) = select([arm("a", points)], COUNTS_OF_TWO, "held-out")
    assert row["selected"]["worst group"]["epoch"] == 1
    assert row["selected"]["last epoch"]["epoch"] == 2


def test_arms_of_one_choice_are_chosen_among_and_listed_alone_too() -> None:
    slow = arm("continued, slow", [([0.5, 0.5], [0.5, 0.5], [0.1, 0.1])], "continued")
    fast = arm("continued, fast", [([0.6, 0.6], [0.4, 0.4], [0.3, 0.3])], "continued")
    rows = select([slow, fast], COUNTS_OF_TWO, "held-out")
    assert [row["name"] for row in rows] == ["continued, slow", "continued, fast", "continued, chosen"]
    chosen = rows[-1]["selected"]
    assert chosen["worst group"]["arm"] == "continued, fast"
    assert chosen["class labels"]["arm"] == "continued, slow"
    assert "last epoch" not in chosen  # it chooses no variant


def test_a_method_of_which_one_variant_could_be_trained_has_a_chosen_row_all_the_same() -> None:
    impossible = {**arm("CnC, T = 1", [], "CnC"), "impossible": "no anchors"}
    possible = arm("CnC, T = 6", [([0.6, 0.6], [0.4, 0.4], [0.3, 0.3])], "CnC")
    rows = select([impossible, possible], COUNTS_OF_TWO, "held-out")
    assert [row["name"] for row in rows] == ["CnC, T = 1", "CnC, T = 6", "CnC, chosen"]
    assert rows[-1]["selected"]["worst group"]["arm"] == "CnC, T = 6"
    assert "impossible" not in rows[-1]
    none = select([impossible, {**impossible, "name": "CnC, T = 6"}], COUNTS_OF_TWO, "held-out")
    assert [row["name"] for row in none] == ["CnC, T = 1", "CnC, T = 6"]


def test_an_arm_that_could_not_be_trained_selects_nothing() -> None:
    (row,) = select([{**arm("a", []), "impossible": "no error set"}], COUNTS_OF_TWO, "held-out")
    assert row["selected"] == {}


def test_average_by_counts_is_the_accuracy_over_all_images() -> None:
    assert average([1.0, 0.5], [3, 1]) == pytest.approx(3.5 / 4)


# The stages


@pytest.fixture(scope="module")
def second(
    dataset: data.DataSet, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, dict[str, Any]]:
    """Stage 2, its folder and its results, which left the trained model as it was."""
    folder = RunFolder(tmp_path_factory.mktemp("second") / "run", Settings(quick=True))
    before = snapshot(trained.model)
    results = stage_two(folder, dataset, setting_of(dataset, trained))
    assert_unchanged(before, trained.model)
    return folder, results


def test_stage_two_runs_every_arm_and_is_taken_up_without_training(
    dataset: data.DataSet,
    trained: Trained,
    second: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder, results), setting = second, setting_of(dataset, trained)
    names = [row["name"] for row in results["arms"]]
    assert names == ["ERM", *(one.name for one in make_arms(setting)), "DFR", "ERM continued, chosen"]
    assert len({one.slug for one in make_arms(setting)}) == len(make_arms(setting))
    more = {one.name for one in make_arms(replace(setting, full=True))} - set(names)
    assert more == {"random pruned, own statistics"} | {f"ERM continued, rate {r:g}" for r in (5e-5, 5e-4, 2e-3)}
    for row in results["arms"]:
        assert ("impossible" in row) != bool(row["selected"])
        assert set(row["selected"]) <= set(SELECTIONS)
        assert row["labels"].startswith("class")
    assert json.loads(json.dumps(results)) == results
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert stage_two(folder, dataset, setting) == results


def test_methods_may_have_the_held_out_images_too_but_not_to_choose_by(
    dataset: data.DataSet, trained: Trained, tmp_path: Path
) -> None:
    joined = data.join(dataset.train, dataset.splits["held-out"])
    assert joined.counts == tuple(
        a + b for a, b in zip(dataset.train.counts, dataset.splits["held-out"].counts, strict=True)
    )
    assert torch.equal(joined.groups, joined.groups.sort().values)
    setting = replace(setting_of(dataset, trained), joined=Source(joined, dataset.augmentation))
    more = [one for one in make_arms(setting) if one.held_out]
    assert {one.name for one in more} > {"ERM, held-out images too", "Group DRO, held-out images too"}
    sources = {one.name: one.make().source for one in more if not one.name.startswith(("JTT", "CnC"))}
    assert {len(source) for source in sources.values()} == {len(joined)}
    points = [([0.5, 0.5], [0.5, 0.5], [0.1, 0.2])]
    (row,) = select([{**arm("a", points), "held_out": True}], COUNTS_OF_TWO, "held-out")
    assert set(row["selected"]) == {"last epoch", "worst group"}


def test_methods_stand_beside_last_layers_with_the_labels_that_chose_their_epoch() -> None:
    picked = {"last epoch": {"epoch": 2}, "worst group": {"epoch": 1, "test": [0.9, 0.3], "worst": 0.3}}
    said = {"family": "comparison", "choice": None, "labels": "class", "selected": picked}
    arms = [{"name": "A", **said}, {"name": "DFR", **said}]
    arms += [{"name": name, **said, "choice": "B"} for name in ("B, 1", "B, 2")]
    arms += [{"name": "B, chosen", **said}, {"name": "C", **said, "choice": "C"}]
    row, *others = beside_last_layers({"arms": arms, "selections": SELECTIONS})
    assert [other["name"] for other in others] == ["B, chosen", "C"]  # C has one variant, which stands for itself
    assert (row["name"], row["worst"], row["images"]) == ("A", 0.3, "train")
    assert row["labels"] == "class; group labels of validation images (epoch)"


def test_stage_two_reports_the_accuracies_of_the_weights_it_leaves(
    dataset: data.DataSet, trained: Trained, second: tuple[RunFolder, dict[str, Any]]
) -> None:
    folder, results = second
    row = next(row for row in results["arms"] if row["name"] == "pruned by gradient")
    path = folder.path / "stage-2" / "pruned-by-gradient"
    assert checkpoint_epochs(path) == (1,)
    kept = load_checkpoint(trained.model, path, 1)
    assert list(ns.evaluate(kept, dataset.loaders("test")).values) == row["trajectory"][-1]["test"]
    assert row["trajectory"][-1]["loss"] == read_trajectory(path)[-1]["loss"] > 0


def test_twins_with_statistics_of_their_own_leave_the_same_weights_and_other_statistics(
    dataset: data.DataSet, trained: Trained, tmp_path: Path
) -> None:
    arms = {one.name: one for one in make_arms(setting_of(dataset, trained))}
    states = []
    for name in ("pruned by gradient", "pruned, own statistics"):
        how = arms[name].make()
        after = train(how.start, how.source, tmp_path / name, recipe=how.recipe, method=how.method)
        states.append(after.state_dict())
    shared, own = states
    differing = {name for name in shared if not torch.equal(shared[name], own[name])}
    assert differing
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in differing)


class ConvolutionalHead(torch.nn.Module):
    """Ends in a convolution and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(3, 2, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images).mean((2, 3))


def test_methods_that_need_a_linear_head_are_impossible_without_one_and_the_others_go_on(
    dataset: data.DataSet, tmp_path: Path
) -> None:
    path = tmp_path / "erm"
    model = train(ConvolutionalHead(), dataset.train, path, recipe=RECIPE)
    checkpoints = {epoch: checkpoint_path(path, epoch) for epoch in checkpoint_epochs(path)}
    found = Trained(model, checkpoints, read_trajectory(path), studied(()))
    folder = RunFolder(tmp_path / "run", Settings(quick=True))
    results = stage_two(folder, dataset, setting_of(dataset, found))
    why = {row["name"]: row["impossible"] for row in results["arms"] if "impossible" in row}
    assert "linear" in why["DFR"]
    assert {name for name in why if not name.startswith(("CnC", "JTT"))} == {"DFR"}
    assert not any(row["selected"] for row in results["arms"] if row["name"].startswith("CnC"))
    start, last = mitigate(dataset, model, None, "held-out", 0)
    assert (start["name"], last["name"]) == ("ERM", "last layer")
    assert "linear" in last["impossible"]


def test_published_settings_are_those_of_the_method_and_the_rest_has_the_run_s(
    dataset: data.DataSet, trained: Trained
) -> None:
    own = Recipe("sgd", learning_rate=1e-5, weight_decay=1.0, momentum=0.9, batch_size=32, schedule="constant")
    setting = replace(setting_of(dataset, trained), comparisons={"Group DRO": own}, comparison_epochs=2)
    arms = {one.name: one for one in make_arms(setting)}
    dro = arms["Group DRO"].make()
    assert dro.recipe == replace(own, epochs=2)
    assert dro.method.step_size == 0.1  # type: ignore[attr-defined]  # by its own steps: 2 epochs of 4 batches
    twice = next(one for one in arms.values() if one.choice == "JTT")
    assert twice.make().recipe.learning_rate == RECIPE.learning_rate


@pytest.fixture(scope="module")
def fragile(
    dataset: data.DataSet, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, dict[str, Any]]:
    """The fragility stage, its folder and its results, which left the trained model as it was."""
    folder = RunFolder(tmp_path_factory.mktemp("fragile") / "run", Settings(quick=True, draws=3))
    before = snapshot(trained.model)
    results = stage_fragility(folder, dataset, trained)
    assert_unchanged(before, trained.model)
    return folder, results


def test_fragility_stage_leaves_every_number_and_is_taken_up(
    dataset: data.DataSet, trained: Trained, fragile: tuple[RunFolder, dict[str, Any]]
) -> None:
    folder, results = fragile
    assert json.loads(json.dumps(results)) == results
    assert stage_fragility(folder, dataset, trained) == results
    assert results["edit"] == ["block.conv2.weight"]
    scores = {row["score"] for row in results["detection"]["train"]}
    assert {"knockout", "final margin", "margin after epoch 1", "critical neurons"} <= scores
    assert {row["group"] for row in results["detection"]["train"]} == {"landbird on water", "waterbird on land"}
    assert [sum(part["of"] for part in results["points"])] == [len(dataset.train)]


def test_a_network_without_skips_says_so_instead(dataset: data.DataSet, trained: Trained, tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)).eval()
    folder = RunFolder(tmp_path / "run", Settings(quick=True))
    results = stage_fragility(folder, dataset, Trained(plain, {}, [], studied(())))
    assert "no residual branch" in results["impossible"]
    assert results["edit"] == []
    assert "final margin" in {row["score"] for row in results["detection"]["train"]}
    rows = {row["name"]: row for row in results["mitigation"]}
    assert "no residual branch to cut" in rows["inferred by knockout"]["impossible"]
    assert rows["true groups"]["worst"] >= 0
    assert json.loads(json.dumps(results)) == results


class Attention(torch.nn.Module):
    """A little transformer of four blocks, whose eight branches are of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, 8, 8)
        self.blocks = torch.nn.Sequential(
            *(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(4))
        )
        self.head = torch.nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))


def test_of_a_network_of_one_stage_the_last_quarter_is_cut(dataset: data.DataSet) -> None:
    model = Attention().eval()
    batch = next(iter(next(iter(dataset.loaders("train").values()))))
    assert len(ns.residual_branches(model, batch)) == 8
    edit = knockout(model, batch)
    assert {layer.parameter for layer in edit.neurons.by_layer()} == {
        "blocks.3.self_attn.out_proj.weight",
        "blocks.3.linear2.weight",
    }
    logits = ns.apply(edit, model)(dataset.train.images[:8])
    assert logits.std(0).min() > 1e-4  # something of the image is left


def test_random_neurons_of_equal_damage_do_about_the_damage_of_the_critical_ones(
    fragile: tuple[RunFolder, dict[str, Any]],
) -> None:
    _, results = fragile
    damage = {row["cut"]: row for row in results["damage"]["train"]}
    critical, alike = damage["critical neurons"], damage["random neurons, equal damage"]
    assert damage["random neurons, equal count"]["neurons"] == critical["neurons"]
    assert 1 <= alike["neurons"] <= 56
    # No nearer than two neighbouring sizes are to each other, of a share that is not steady in the size.
    assert abs(alike["flips"] - critical["flips"]) < 0.1
    assert results["damage"]["held-out"] == []


def test_knockout_zeroes_the_last_stage_alone(dataset: data.DataSet) -> None:
    batch = next(iter(next(iter(dataset.loaders("train").values()))))
    edit = knockout(small_resnet(0).eval(), batch)
    assert named(edit.neurons.by_layer()) == {"block3.conv2.weight": tuple(range(64))}


def test_inferred_groups_are_in_the_order_of_the_loaders(dataset: data.DataSet, trained: Trained) -> None:
    edit = knockout(trained.model, next(iter(next(iter(dataset.loaders("train").values())))))
    examples = Examples.of(dataset.splits["train"])
    order = torch.cat([batch[2] for part in dataset.loaders("train").values() for batch in part])
    assert torch.equal(order, examples.groups)
    margins = ns.sweep(trained.model, {"cut": edit}, dataset.loaders("train"), metric=ns.margin).values("cut")
    images = dataset.train.images[examples.order]
    with torch.no_grad():
        logits = ns.apply(edit, trained.model).eval()(images)
    assert torch.allclose(margins.float(), ns.margin(logits, examples.targets), atol=1e-4)


def test_each_image_has_one_place_in_one_inferred_group(dataset: data.DataSet) -> None:
    targets = Examples.of(dataset.train).targets
    scores = torch.arange(len(targets)).double()
    inferred = ns.infer_groups(scores, targets, rule=0.2)
    places = inferred_places(dataset, "train", inferred)
    assert [len(own) for own in places.values()] == [row["count"] for row in inferred.to_records()]
    assert torch.cat(list(places.values())).sort().values.tolist() == list(range(len(dataset.train)))


def test_audit_shows_the_images_that_score_highest(dataset: data.DataSet, trained: Trained) -> None:
    edit = knockout(trained.model, next(iter(next(iter(dataset.loaders("train").values())))))
    swept = ns.sweep(trained.model, {"cut": edit}, dataset.loaders("train"), metric=ns.margin)
    rows = audit(dataset, -swept.values("cut"), count=3)
    assert [row["class"] for row in rows] == [0, 1]
    with torch.no_grad():
        logits = ns.apply(edit, trained.model).eval()(dataset.train.images)
    margins = ns.margin(logits, dataset.train.targets)
    for row in rows:
        members = (dataset.train.targets == row["class"]).nonzero().flatten()
        lowest = members[margins[members].argsort()[:3]]
        assert [image["index"] for image in row["images"]] == lowest.tolist()


def test_mitigation_says_what_each_row_takes_and_why_one_is_missing(
    dataset: data.DataSet, trained: Trained, fragile: tuple[RunFolder, dict[str, Any]]
) -> None:
    rows = {row["name"]: row for row in fragile[1]["mitigation"]}
    assert rows["ERM"]["test"] == list(ns.evaluate(trained.model, dataset.loaders("test")).values)
    assert "group" in rows["true groups"]["labels"]
    assert "group" not in rows["inferred by knockout"]["labels"]
    for row in rows.values():
        assert ("worst" in row) != ("impossible" in row)


def test_gamma_by_halves_never_judges_on_what_it_fits(dataset: data.DataSet, trained: Trained) -> None:
    held = extract_features(trained.model, dataset.loaders("held-out"))
    logits = last_logits(trained.model, held.features)
    tuned = tuned_on_halves(held, logits, held.targets, 0)
    assert tuned.rule.coef.shape == (1, 16)
    assert tuned.chosen in tuned.accuracies.keys() == {0.0, 1.0, 2.0, 4.0, 8.0}
    assert tuned.accuracies[tuned.chosen] == max(tuned.accuracies.values())
