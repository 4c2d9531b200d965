"""The program of the falsifications: its data and networks, and that its rows are what they are said to be."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import conditions
import falsifications
import numpy as np
import pytest
import torch
from conditions import PAIR_COUNTS, deep_resnet, pair, plain_cnn, with_label_noise
from falsifications import CONDITIONS, Condition, fence_flags, table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.study import data
from neuronsurgery.study.data import SYNTHETIC_COUNTS, Split, digits, synthetic
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import RunFolder, Settings
from neuronsurgery.study.stage_fragility import Examples, judge_scores, mitigate
from neuronsurgery.study.training import RECIPES, checkpoint_epochs, digest, load_checkpoint
from study.little_study import tiny_resnet

pytestmark = pytest.mark.xdist_group("falsifications")  # its fixtures are made once, by one process

TINY = {"train": (2, 2, 2, 2), "held-out": (1, 1, 1, 1), "validation": (1, 1, 1, 1), "test": (1, 1, 1, 1)}
SMALL = {"train": (60, 10, 8, 30), "held-out": (24, 6, 5, 12), "validation": (6,) * 4, "test": (8,) * 4}


def pixel_hash(images: Tensor) -> str:
    return hashlib.sha256((images * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()


def same(a: Split, b: Split) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("images", "targets", "groups"))


# Pairs of digits


@pytest.fixture(scope="module")
def shown() -> list[tuple[Any, ...]]:
    """Of each split of the default pairs: its name, its red digits, its blue digits, its groups."""
    pytest.importorskip("sklearn")
    found: list[tuple[Any, ...]] = []
    sources, _ = data.load_digits()
    places = {source.tobytes(): place for place, source in enumerate(sources)}
    assert len(places) == len(sources) == 1797

    def record(red: data.Doubles, blue: data.Doubles, groups: data.Integers, seed: int, split: str) -> Split:
        found.append((split, *(np.array([places[d.tobytes()] for d in digits]) for digits in (red, blue)), groups))
        return Split(torch.zeros(len(groups), 3, 16, 16), torch.from_numpy(groups // 2), torch.from_numpy(groups))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditions, "_draw_pairs", record)
        pair(0)
    return found


def test_pair_images_are_the_golden_ones() -> None:
    pytest.importorskip("sklearn")
    assert (
        pixel_hash(pair(0, counts=TINY).train.images)
        == "042fe44157ea24f5349da65e5b0f695bafc8f7d32fe79b9bfb2cd18f1d38b0f6"
    )


def test_pair_has_the_counts_and_types_of_the_contract() -> None:
    pytest.importorskip("sklearn")
    dataset = pair(1)
    assert {name: split.counts for name, split in dataset.splits.items()} == dict(PAIR_COUNTS)
    assert not dataset.augmentation.flip
    assert dataset.group_names[1] == "red 0-4 with blue 5-9"
    for split in dataset.splits.values():
        assert split.images.shape[1:] == (3, 16, 16)
        assert split.images.dtype == torch.float32
        assert split.targets.dtype == split.groups.dtype == torch.int64
        assert torch.equal(split.targets, split.groups // 2)
        assert torch.equal((split.images * 255).round() / 255, split.images)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_pair_has_the_proportions_of_the_synthetic_data(split: str) -> None:
    ours, theirs = np.array(PAIR_COUNTS[split]), np.array(SYNTHETIC_COUNTS[split])
    assert np.abs(ours - theirs * ours.sum() / theirs.sum()).max() < 1


def test_within_a_split_no_digit_is_used_twice_and_none_is_twice_in_one_channel(shown: Any) -> None:
    for _, red, blue, _ in shown:
        assert len(set(red) | set(blue)) == len(red) + len(blue)
    for channel in (1, 2):
        used = np.concatenate([split[channel] for split in shown])
        assert len(set(used)) == len(used)


def test_red_is_of_the_class_and_blue_of_the_attribute(shown: Any) -> None:
    halves = data.load_digits()[1]
    assert [split[0] for split in shown] == list(PAIR_COUNTS)
    for _, red, blue, groups in shown:
        assert halves[red].tolist() == (groups // 2).tolist()
        assert halves[blue].tolist() == (groups % 2).tolist()


def test_as_many_digits_are_taken_as_is_said(shown: Any) -> None:
    halves = data.load_digits()[1]
    assert np.bincount(halves).tolist() == [901, 896]
    train = np.concatenate(shown[0][1:3])
    assert (halves[train] == 0).sum() == 2 * 420 + 22 + 7 == 869
    assert (halves[np.concatenate([split[1] for split in shown])] == 0).sum() == 883


def test_red_and_blue_are_drawn_alike_and_green_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "_PIXEL_NOISE", 0.0)
    digits = data.load_digits()[0][:6]
    groups = np.zeros(6, np.int64)
    once = conditions._draw_pairs(digits, digits[::-1].copy(), groups, 0, "train").images
    swapped = conditions._draw_pairs(digits[::-1].copy(), digits, groups, 0, "train").images
    assert torch.equal(once, swapped.flip(1))
    assert once[:, 1].max() == 0
    assert once[:, 0].amax((1, 2)).min() > 0.5


def test_pairs_depend_on_seed_and_split_alone() -> None:
    pytest.importorskip("sklearn")
    first, again, other = (pair(seed, counts=TINY) for seed in (0, 0, 1))
    assert all(same(first.splits[name], again.splits[name]) for name in TINY)
    assert not same(first.train, other.train)
    assert same(first.train, pair(0, counts=TINY | {"test": (3, 3, 3, 3)}).train)


def test_too_many_pairs_are_refused() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=r"split 'train' asks for 451 digits 0-4 in blue, found 450 that neither it"):
        pair(0, counts=TINY | {"train": (451, 0, 0, 0)})
    with pytest.raises(
        ValueError, match=r"split 'extra' asks for 890 digits 5-9 in red, found 886 .* lower its counts"
    ):
        pair(0, counts=TINY | {"extra": (0, 0, 890, 0)})
    with pytest.raises(ValueError, match=r"counts of split 'train': expected four whole numbers"):
        pair(0, counts={"train": (1,)})


# Label noise


def striped(count: int) -> Split:
    groups = torch.arange(count) % 4
    return Split(torch.rand(count, 3, 4, 4), groups // 2, groups)


def test_label_noise_flips_what_it_says_and_nothing_else() -> None:
    split = striped(400)
    before = [part.clone() for part in (split.images, split.targets, split.groups)]
    noisy, flipped = with_label_noise(split, 0.03, 0)
    assert all(map(torch.equal, before, (split.images, split.targets, split.groups)))
    assert flipped.dtype == torch.bool
    assert int(flipped.sum()) == 12
    assert torch.equal(noisy.targets != split.targets, flipped)
    assert torch.equal(noisy.groups, split.groups)
    assert torch.equal(noisy.images, split.images)
    assert set(noisy.targets.tolist()) == {0, 1}


def test_label_noise_is_the_golden_one() -> None:
    _, flipped = with_label_noise(striped(100), 0.05, 0)
    assert flipped.nonzero().flatten().tolist() == [3, 23, 54, 68, 90]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_a_smaller_share_is_a_part_of_a_larger_one(count: int, one: float, other: float, seed: int) -> None:
    split = striped(count)
    less, more = (with_label_noise(split, share, seed)[1] for share in sorted((one, other)))
    assert not (less & ~more).any()
    assert int(more.sum()) == round(max(one, other) * count)


def test_label_noise_of_another_seed_is_elsewhere() -> None:
    one, same_again, other = (with_label_noise(striped(400), 0.1, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, same_again)
    assert not torch.equal(one, other)


def test_impossible_label_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], found 3: 0.03 makes"):
        with_label_noise(striped(4), 3, 0)
    with pytest.raises(ValueError, match=r"expected the classes 0 and 1, found \[0, 1, 2\]"):
        with_label_noise(replace(striped(3), targets=torch.arange(3)), 0.1, 0)


# Networks


@pytest.mark.parametrize(
    ("make", "parameters", "golden"),
    [
        (small_resnet, 77_522, "b8d4e2ebf6151390"),
        (deep_resnet, 174_738, "a9633019e5b0f23e"),
        (plain_cnn, 74_770, "c6dd9b648d3b22b5"),
    ],
)
def test_networks_are_the_golden_ones(make: Callable[..., nn.Module], parameters: int, golden: str) -> None:
    state = torch.get_rng_state()
    network = make(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert digest(network.state_dict().values()) == golden
    assert digest(make(1).state_dict().values()) != golden
    assert network.training
    assert make(0, 5)(torch.rand(2, 3, 20, 16)).shape == (2, 5)


def test_the_deep_network_has_two_blocks_in_each_of_three_stages() -> None:
    branches = ns.residual_branches(deep_resnet(0), (torch.rand(4, 3, 32, 32), torch.zeros(4).long()))
    assert [branch.layer for branch in branches] == [f"block{number}.conv2.weight" for number in range(1, 7)]
    assert [branch.stage for branch in branches] == [0, 0, 1, 1, 2, 2]


def test_the_plain_network_is_the_residual_one_without_its_shortcuts() -> None:
    residual, plain = small_resnet(0), plain_cnn(0)
    shapes = {name: value.shape for name, value in residual.state_dict().items() if "shortcut" not in name}
    assert {name: value.shape for name, value in plain.state_dict().items()} == shapes
    with torch.no_grad():
        for block in (residual.block1, residual.block2, residual.block3):
            block.shortcut = Nothing(block.conv2.out_channels, block.conv1.stride[0])
        residual.load_state_dict(plain.state_dict())
        images = torch.rand(4, 3, 32, 32)
        torch.testing.assert_close(plain.eval()(images), residual.eval()(images))
    with pytest.raises(ValueError, match="no residual branch"):
        ns.residual_branches(plain, (images, torch.zeros(4).long()))


class Nothing(nn.Module):
    """Zeros of the shape that a shortcut would give."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.channels, x.shape[2] // self.stride, x.shape[3] // self.stride)


# What is judged


def test_scores_that_are_constant_to_rounding_tell_nothing() -> None:
    dataset = synthetic(0, counts=TINY | {"train": (6, 3, 3, 6)})
    examples = Examples.of(dataset.train)
    noise = torch.where(examples.groups == 1, 1e-9, 0.0).double() + 2.0
    assert [row["auc"] for row in judge_scores(noise, examples, dataset)] == [0.5, 0.5]
    telling = (examples.groups == 1).double()
    assert [row["auc"] for row in judge_scores(telling, examples, dataset)] == [1.0, 0.5]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 2.0, 6.0]))
def test_flags_are_those_of_infer_groups_where_it_makes_groups(seed: int, far: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (60,), generator=generator)
    scores = torch.randn(60, generator=generator) + far * (torch.rand(60, generator=generator) < 0.15)
    flags = fence_flags(scores, targets)
    counts = [int(flags[targets == y].sum()) for y in (0, 1)]
    if min(counts) < 3:
        said = "|".join(
            f"class {y} has {count} examples that are fragile" for y, count in enumerate(counts) if count < 3
        )
        with pytest.raises(ValueError, match=said):
            ns.infer_groups(scores, targets)
    else:
        assert torch.equal(flags, ns.infer_groups(scores, targets).fragile)


def test_constant_scores_flag_none() -> None:
    scores = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0 + 1e-6, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert fence_flags(scores, torch.tensor([0] * 5 + [1] * 5)).tolist() == [False] * 9 + [True]


# The whole


def shortened(condition: Condition) -> Condition:
    recipe = replace(condition.recipe, epochs=3, batch_size=16)
    noisy = {"noise": 0.1, "network": tiny_resnet} if condition.noise else {}
    return replace(condition, counts=SMALL, recipe=recipe, **noisy)  # type: ignore[arg-type]  # of several types


NOT_HELD_OUT = {split: counts for split, counts in SMALL.items() if split != "held-out"}
NAMES = ("label noise", "deeper network", "plain network", "nothing held out")
SHORT = (
    *(shortened(condition) for condition in CONDITIONS if condition.name in NAMES),
    replace(shortened(Condition("nothing held out", "digits have no such split", data=digits)), counts=NOT_HELD_OUT),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    pytest.importorskip("sklearn.linear_model")
    return RunFolder(tmp_path_factory.mktemp("falsifications") / "run", Settings(draws=2))


@pytest.fixture(scope="module")
def rows(folder: RunFolder) -> dict[str, Any]:
    found = falsifications.falsifications(folder, seed=0, conditions=SHORT, progress=False)
    return {row["condition"]: row for row in found}


def trained_model(folder: RunFolder, name: str) -> nn.Module:
    (condition,) = (condition for condition in SHORT if condition.name == name)
    path = folder.path / "falsifications" / f"{condition.slug}-seed-0"
    return load_checkpoint(condition.network(0, 2), path, checkpoint_epochs(path)[-1])


def margins_after(model: nn.Module, split: Split, *zeroed: str) -> np.ndarray[Any, Any]:
    """Margins in the order of the split, with the whole of some parameters zero: by hand, and in double precision."""
    cut = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name in zeroed:
            cut.get_parameter(name).zero_()
        logits = cut(split.images.double())
    return np.array([float(row[y] - row[1 - y]) for row, y in zip(logits, split.targets.tolist(), strict=True)])


def pairwise_auc(positive: np.ndarray[Any, Any], negative: np.ndarray[Any, Any]) -> float:
    """The share of pairs of which the positive one scores higher; ties count half."""
    return float(np.mean([[(p > n) + (p == n) / 2 for n in negative] for p in positive]))


def row_of(rows: Any, score: str, group: str) -> Any:
    (found,) = (row for row in rows if row["score"] == score and row["group"] == group)
    return found


def test_every_condition_says_what_it_is_and_what_came_of_it(rows: dict[str, Any]) -> None:
    assert tuple(rows) == NAMES
    for row in rows.values():
        assert (row["impossible"] is None) == bool(row["cuts"])
        splits = NOT_HELD_OUT if row["condition"] == "nothing held out" else SMALL
        assert row["counts"] == {name: list(counts) for name, counts in splits.items()}
        assert set(row["accuracy"]) == set(splits)
        assert list(row["detection"]) == [name for name in ("train", "held-out") if name in splits]
        assert (row["mitigation"] is None) == ("held-out" not in splits)
        for found in row["detection"].values():
            scores = {part["score"] for part in found["rows"]}
            assert {"final margin", "margin after epoch 2", "random neurons, 20 %"} <= scores
            assert {part["score"] for part in found["flagged"]} == scores
            assert {part["cut"] for part in found["damage"]} == scores - {"final margin", "margin after epoch 2"}
            assert all(0 <= part["auc"] <= 1 and 0 <= part["average_precision"] <= 1 for part in found["rows"])


def test_wrong_labels_are_left_out_where_groups_are_judged(rows: dict[str, Any], folder: RunFolder) -> None:
    row, dataset = rows["label noise"], synthetic(0, counts=SMALL)
    noisy, wrong = with_label_noise(dataset.train, 0.1, 0)
    model = trained_model(folder, "label noise")
    scores = -margins_after(model, noisy, "block.conv2.weight")
    groups, classes, right = noisy.groups.numpy(), noisy.targets.numpy(), ~wrong.numpy()
    for group in dataset.minority:
        found = row_of(row["detection"]["train"]["rows"], "knockout", dataset.group_names[group])
        positive = scores[right & (groups == group)]
        others = scores[right & (groups // 2 == group // 2) & (groups != group)]
        assert (found["count"], found["of"]) == (len(positive), len(positive) + len(others))
        assert found["auc"] == pytest.approx(pairwise_auc(positive, others), abs=1e-9)
    predictions = margins_after(model, noisy) > 0
    assert row["accuracy"]["train"] == [pytest.approx(predictions[right & (groups == g)].mean()) for g in range(4)]
    assert row["wrong_labels"]["learnt"] == pytest.approx(predictions[~right].mean())
    assert row["wrong_labels"]["counts"] == np.bincount(groups[~right], minlength=4).tolist()
    (said,) = (part for part in row["detection"]["train"]["flagged"] if part["score"] == "knockout")
    flagged = np.zeros(len(scores), bool)
    for y in (0, 1):
        low, high = np.percentile(scores[classes == y], [25, 75])  # of all: nobody knows which labels are wrong
        flagged |= (classes == y) & (scores > high + 1.5 * (high - low))
    assert said == {
        "score": "knockout",
        "fragile": [int((flagged & right & (groups == group)).sum()) for group in range(4)],
        "wrong_labels": int((flagged & ~right).sum()),
        "refused": min(flagged[classes == y].sum() for y in (0, 1)) < 3,
    }


def test_held_out_images_have_wrong_labels_too_and_validation_and_test_have_none() -> None:
    condition = replace(next(one for one in CONDITIONS if one.name == "label noise"), counts=SMALL)
    noisy, wrong = falsifications._make_data(condition, 0)
    clean = synthetic(0, counts=SMALL)
    for split in clean.splits:
        changed = noisy.splits[split].targets != clean.splits[split].targets
        assert torch.equal(changed, wrong[split])
        expected = round(0.03 * len(changed)) if split in ("train", "held-out") else 0
        assert int(changed.sum()) == expected


def test_the_deeper_network_is_cut_at_three_depths(rows: dict[str, Any], folder: RunFolder) -> None:
    row, dataset = rows["deeper network"], synthetic(0, counts=SMALL)
    last = [f"block{number}.conv2.weight" for number in (3, 4, 5, 6)]
    assert row["cuts"] == {
        "knockout": last[2:],
        "knockout, last branch only": last[3:],
        "knockout, last two stages": last,
    }
    model, held = trained_model(folder, "deeper network"), dataset.splits["held-out"]
    for name, layers in row["cuts"].items():
        margins = margins_after(model, held, *layers)
        found = row_of(row["detection"]["held-out"]["rows"], name, "waterbird on land")
        groups = held.groups.numpy()
        assert found["auc"] == pytest.approx(pairwise_auc(-margins[groups == 2], -margins[groups == 3]), abs=1e-9)
        (damage,) = (part["flips"] for part in row["detection"]["held-out"]["damage"] if part["cut"] == name)
        assert damage == pytest.approx(((margins > 0) != (margins_after(model, held) > 0)).mean())


def test_the_shallow_network_has_one_branch_in_its_last_stage(rows: dict[str, Any]) -> None:
    assert rows["nothing held out"]["cuts"] == {
        "knockout": ["block3.conv2.weight"],
        "knockout, last two stages": ["block2.conv2.weight", "block3.conv2.weight"],
    }


def test_the_plain_network_says_why_and_what_was_cut_instead(rows: dict[str, Any]) -> None:
    row = rows["plain network"]
    assert "no residual branch" in row["impossible"]
    assert {part["cut"] for part in row["detection"]["train"]["damage"]} == {
        *(f"random neurons, {share} %" for share in ("2.5", "10", "20")),
        "block3.conv2.weight zeroed",
        "block3.conv1.weight re-initialised",
        "block3.conv2.weight re-initialised",
    }
    for found in row["detection"].values():
        zeroed = [part["auc"] for part in found["rows"] if part["score"] == "block3.conv2.weight zeroed"]
        assert zeroed == [0.5, 0.5]
    missing = {part["name"] for part in row["mitigation"] if "impossible" in part}
    assert {"inferred by knockout", "AFR, gamma by inferred groups"} <= missing
    assert "true groups" not in missing


def test_without_a_cut_mitigation_says_so(folder: RunFolder, rows: dict[str, Any]) -> None:
    dataset = synthetic(0, counts=SMALL)
    found = mitigate(dataset, trained_model(folder, "plain network"), None, "held-out", 0)
    (row,) = (row for row in found if row["name"] == "inferred by knockout")
    assert row["impossible"] == "no groups are inferred: the network has no residual branch to cut"
    assert found == rows["plain network"]["mitigation"]


def test_a_condition_that_the_folder_holds_is_not_done_again(
    folder: RunFolder, rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(falsifications, "train", None)
    again = falsifications.falsifications(folder, seed=0, conditions=SHORT[::-1], progress=False)
    assert again == list(rows.values())[::-1]
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        falsifications.falsifications(folder, seed=1, conditions=SHORT, progress=False)


class StoppedError(Exception):
    """Instead of training."""


def test_conditions_differ_from_the_default_in_one_thing_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    asked: dict[str, Any] = {}

    def note(model: nn.Module, split: Split, path: Path, **options: Any) -> nn.Module:
        asked[path.name] = {"network": digest(model.state_dict().values()), "data": digest([split.images])} | {
            "targets": digest([split.targets]),
            **options,
        }
        raise StoppedError

    monkeypatch.setattr(falsifications, "train", note)
    for condition in (replace(condition, counts=SMALL) for condition in CONDITIONS):
        with pytest.raises(StoppedError):
            falsifications.falsifications(
                RunFolder(tmp_path / condition.slug, Settings()), seed=2, conditions=[condition], progress=False
            )
    default = asked["as-is-seed-2"]
    assert default["recipe"] == RECIPES["adam"]
    assert default["seed"] == 2
    assert default["data"] == digest([synthetic(2, counts=SMALL).train.images])
    assert {name: {key for key in default if options[key] != default[key]} for name, options in asked.items()} == {
        "as-is-seed-2": set(),
        "no-augmentation-seed-2": {"augmentation"},
        "label-noise-seed-2": {"targets"},
        "deeper-network-seed-2": {"network"},
        "plain-network-seed-2": {"network"},
        "equally-hard-shortcut-seed-2": {"data", "augmentation"},
    }
    assert asked["no-augmentation-seed-2"]["augmentation"] is None
    assert all(condition.counts is None and condition.noise in (0, 0.03) for condition in CONDITIONS)


def test_two_conditions_of_one_name_are_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"two conditions have one name among as-is, as-is: give each"):
        falsifications.falsifications(folder, seed=0, conditions=CONDITIONS[:1] * 2)


def test_progress_is_written_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> nn.Module:
        raise StoppedError

    monkeypatch.setattr(falsifications, "train", stop)
    with pytest.raises(StoppedError):
        falsifications.falsifications(RunFolder(tmp_path / "run", Settings()), seed=0, conditions=SHORT[:1])
    assert capsys.readouterr().err == "falsification, label noise: 3 epochs\n"


def test_what_is_printed_says_where_the_knockout_is_ahead(rows: dict[str, Any]) -> None:
    found = [rows["label noise"], rows["plain network"]]
    header, noise, plain, last = table(found).splitlines()
    assert header.split()[:3] == ["condition", "seed", "knockout"]
    auc = [row_of(found[0]["detection"]["train"]["rows"], "knockout", name)["auc"] for name in found[0]["groups"][1:3]]
    assert " / ".join(f"{value:.3f}" for value in auc) in noise
    assert "no branch" in plain and "refused" in plain
    assert last.startswith("the knockout ranks every minority better than the final margin in ")
    ahead = {"score": "knockout", "group": "rare", "auc": 0.9}, {"score": "final margin", "group": "rare", "auc": 0.8}
    assert falsifications.is_ahead({"detection": {"train": {"rows": [*ahead]}}})
    assert not falsifications.is_ahead({"detection": {"train": {"rows": [*ahead[1:]]}}})
