"""Memorization scores are those of the slow loop and of closed forms, and a killed run ends in the same bits."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from snapshot import assert_unchanged, snapshot
from torch import Tensor, nn

from neuronsurgery import memorization
from neuronsurgery.draws import random_bits
from neuronsurgery.memorization import MemorizationScores, _padded_variance, _Run, memorization_scores
from neuronsurgery.types import Fit

CLASSES = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 0])


class KilledError(Exception):
    pass


def noise(key: str, n: int) -> Tensor:
    """Uniform numbers in [0, 1), float64, that depend on the key alone."""
    return torch.from_numpy((random_bits(key, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def noisy(n: int) -> Fit:
    """A training whose outcomes are any numbers in [0, 1], the same for the same subset."""
    return lambda indices: noise(f"{indices.tolist()}", n)


def member(subset: np.ndarray, n: int) -> list[bool]:
    return [i in set(subset.tolist()) for i in range(n)]


def reference_scores(fit: Fit, n: int, models: int, share: float, seed: int) -> tuple[list[float], list[float]]:
    """Scores and standard errors by lists, one example at a time."""
    run = _Run(n, share, seed)
    inside: list[list[float]] = [[] for _ in range(n)]
    outside: list[list[float]] = [[] for _ in range(n)]
    for model in range(models):
        outcomes = fit(torch.from_numpy(run.subset(model))).tolist()
        for i, saw in enumerate(member(run.subset(model), n)):
            (inside if saw else outside)[i].append(float(outcomes[i]))
    scores = [sum(a) / len(a) - sum(b) / len(b) for a, b in zip(inside, outside, strict=True)]
    errors = [
        math.sqrt(sum(float(np.var([*side, 0.0, 1.0], ddof=1)) / len(side) for side in sides))
        for sides in zip(inside, outside, strict=True)
    ]
    return scores, errors


def same(a: MemorizationScores, b: MemorizationScores) -> bool:
    fields = ("values", "standard_errors", "seen", "unseen")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)


# --- the estimate ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 12), models=st.integers(16, 40), seed=st.integers(0, 2**40), share=st.floats(0.3, 0.7))
def test_it_is_the_slow_loop(n: int, models: int, seed: int, share: float) -> None:
    seen = np.bincount(np.concatenate([_Run(n, share, seed).subset(model) for model in range(models)]), minlength=n)
    assume(seen.min() > 0 and seen.max() < models)
    found = memorization_scores(noisy(n), n, models, share, seed=seed)
    values, errors = reference_scores(noisy(n), n, models, share, seed)
    assert found.values.dtype == found.standard_errors.dtype == torch.float64
    assert found.seen.dtype == found.unseen.dtype == torch.int64
    torch.testing.assert_close(found.values, torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.standard_errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_training_that_learns_by_heart_scores_one() -> None:
    def by_heart(indices: Tensor) -> Tensor:
        return torch.zeros(10, dtype=torch.bool).index_fill(0, indices, True)

    scores = memorization_scores(by_heart, 10, 30, 0.7, seed=0)
    assert scores.values.tolist() == [1.0] * 10
    assert (scores.seen + scores.unseen == 30).all() and scores.models == 30
    assert int(scores.seen.sum()) == 30 * 7


def test_a_training_that_learns_nothing_from_an_example_scores_zero() -> None:
    """The majority class of a training set is 0 whichever examples it has, and the two 1s are never got right."""
    majority: Fit = lambda indices: CLASSES.eq(CLASSES[indices].mode().values)  # noqa: E731  # one line says it
    assert memorization_scores(majority, 10, 30, 0.7, seed=0).values.tolist() == [0.0] * 10


def test_the_estimate_is_unbiased() -> None:
    """Right with probability p1 if seen and p0 if not: the mean over examples, and each one, lie at p1 - p0."""
    n, models = 400, 200
    inside, outside = noise("inside", n), noise("outside", n)

    def fit(indices: Tensor) -> Tensor:
        probability = outside.clone()
        probability[indices] = inside[indices]
        return noise(f"{indices.tolist()}", n) < probability

    scores = memorization_scores(fit, n, models, 0.7, seed=0)
    deviations = (scores.values - (inside - outside)) / scores.standard_errors
    assert deviations.abs().max() < 4
    # Independent examples: their mean deviation has a standard error of 1 / sqrt(n), if each one's is right.
    assert abs(float(deviations.mean())) < 4 / math.sqrt(n)
    assert 0.8 < float(deviations.std()) < 1.05


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.5, 0.9, 1.0])
def test_the_variance_is_on_the_mean_never_too_small(n: int, p: float) -> None:
    """Over all outcomes of n models that are right with probability p, weighted by their probability."""
    expected = 0.0
    for outcomes in itertools.product((0.0, 1.0), repeat=n):
        ones = sum(outcomes)
        chance = p**ones * (1 - p) ** (n - ones)
        estimate = _padded_variance(torch.tensor(float(n)), torch.tensor(ones), torch.tensor(ones))
        assert float(estimate) > 0
        assert float(estimate) == pytest.approx(np.var([*outcomes, 0, 1], ddof=1))
        expected += chance * float(estimate)
    assert expected >= p * (1 - p) - 1e-6


def test_the_padding_fades() -> None:
    values = noise("many", 100_000)
    found = _padded_variance(torch.tensor(1e5, dtype=torch.float64), values.sum(), values.square().sum())
    assert float(found) == pytest.approx(float(values.var()), rel=1e-4)


def test_models_that_agree_do_not_claim_certainty() -> None:
    scores = memorization_scores(lambda indices: torch.ones(4), 4, 20, 0.5, seed=0)
    assert scores.values.tolist() == [0.0] * 4
    n1, n0 = int(scores.seen[0]), int(scores.unseen[0])
    by_hand = sum((n + 1 - (n + 1) ** 2 / (n + 2)) / (n + 1) / n for n in (n1, n0))
    assert float(scores.standard_errors[0]) == pytest.approx(math.sqrt(by_hand))
    assert float(scores.standard_errors.min()) > 0


@pytest.mark.parametrize("kind", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, "numpy"])
def test_outcomes_of_any_kind_that_says_the_same(kind: torch.dtype | str) -> None:
    wanted = memorization_scores(lambda indices: noise(f"{indices}", 6) < 0.5, 6, 20, 0.5, seed=0)

    def fit(indices: Tensor) -> Tensor:
        outcomes = noise(f"{indices}", 6) < 0.5
        return outcomes.numpy() if isinstance(kind, str) else outcomes.to(kind)  # type: ignore[return-value]

    assert same(memorization_scores(fit, 6, 20, 0.5, seed=0), wanted)


# --- the subsets ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(n=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**70), model=st.integers(0, 9999))
def test_a_subset_has_its_size_in_order_and_again(n: int, share: float, seed: int, model: int) -> None:
    subset = _Run(n, share, seed).subset(model)
    assert subset.dtype == np.int64 and len(subset) == round(share * n)
    assert (np.diff(subset) > 0).all() and all(0 <= i < n for i in subset)
    assert (subset == _Run(n, share, seed).subset(model)).all()


def test_subsets_are_the_same_on_any_machine() -> None:
    key = int.from_bytes(hashlib.sha256(b"memorization\x007\x003").digest()[:16], "little")
    tickets = np.random.Philox(key=key).random_raw(10).tolist()
    smallest = sorted(range(10), key=tickets.__getitem__)[:5]
    assert _Run(10, 0.5, 7).subset(3).tolist() == sorted(smallest)
    assert _Run(10, 0.5, 0).subset(0).tolist() == [0, 2, 6, 7, 8]
    assert _Run(10, 0.5, 0).subset(1).tolist() == [0, 2, 3, 6, 9]
    assert _Run(10, 0.5, 1).subset(0).tolist() == [1, 4, 6, 7, 8]


def test_subsets_are_uniform_and_independent() -> None:
    """Every example, and every pair, is drawn as often as a fair draw without replacement has it."""
    n, size, draws = 8, 5, 4000
    drawn = np.zeros((draws, n))
    for model in range(draws):
        drawn[model, _Run(n, size / n, 3).subset(model)] = 1
    share = size / n
    assert (abs(drawn.mean(0) - share) < 4 * math.sqrt(share * (1 - share) / draws)).all()
    pairs = drawn.T @ drawn / draws
    together = size * (size - 1) / (n * (n - 1))
    off = pairs[~np.eye(n, dtype=bool)]
    assert (abs(off - together) < 4 * math.sqrt(together * (1 - together) / draws)).all()
    follows = (drawn[:-1] * drawn[1:]).mean(0)  # one model's subset says nothing about the next one's
    assert (abs(follows - share**2) < 4 * math.sqrt(share**2 * (1 - share**2) / draws)).all()


def test_a_longer_run_begins_with_the_shorter_one(tmp_path: Path) -> None:
    trained: list[tuple[int, ...]] = []

    def fit(indices: Tensor) -> Tensor:
        trained.append(tuple(indices.tolist()))
        return noisy(6)(indices)

    memorization_scores(fit, 6, 20, 0.5, seed=0, folder=tmp_path)
    longer = memorization_scores(fit, 6, 30, 0.5, seed=0, folder=tmp_path)
    assert len(trained) == 30
    assert trained == [tuple(_Run(6, 0.5, 0).subset(model).tolist()) for model in range(30)]
    assert same(longer, memorization_scores(fit, 6, 30, 0.5, seed=0))


def test_an_example_that_is_never_seen_or_never_left_out_stops_it_before_training() -> None:
    def never(indices: Tensor) -> Tensor:
        raise AssertionError("trained")

    with pytest.raises(
        ValueError, match=r"of 100 examples, \d+ are in none and \d+ in all of the 3 subsets of 70"
    ) as e:
        memorization_scores(never, 100, 3, 0.7, seed=0)
    needed = int(str(e.value).split("models=")[1].split(",")[0])
    memorization_scores(noisy(100), 100, needed, 0.7, seed=0)
    with pytest.raises(ValueError, match=f"pass models={needed}, the least that suffices"):
        memorization_scores(never, 100, needed - 1, 0.7, seed=0)


def test_the_search_for_enough_models_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "SEARCHED", 1000)
    with pytest.raises(ValueError, match=r"even 13 models do not suffice for this seed; pass a share nearer to 1/2"):
        memorization_scores(noisy(100), 100, 2, 0.01, seed=0)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_killed_run_ends_in_the_same_bits(kind: torch.dtype, tmp_path: Path) -> None:
    left = 0

    def fit(indices: Tensor) -> Tensor:
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        outcomes = noisy(8)(indices)
        return outcomes < 0.5 if kind == torch.bool else outcomes

    left = 24
    whole = memorization_scores(fit, 8, 24, 0.6, seed=5)
    assert left == 0
    for some in (0, 1, 10):
        left = some
        with pytest.raises(KilledError):
            memorization_scores(fit, 8, 24, 0.6, seed=5, folder=tmp_path / "run")
    left = 13
    assert same(memorization_scores(fit, 8, 24, 0.6, seed=5, folder=tmp_path / "run"), whole)
    assert left == 0, "each model is trained once"
    assert same(memorization_scores(fit, 8, 24, 0.6, seed=5, folder=str(tmp_path / "run")), whole)
    assert sorted(path.name for path in (tmp_path / "run").iterdir())[-1] == "model-00023.safetensors"


def test_a_missing_file_is_trained_again(tmp_path: Path) -> None:
    whole = memorization_scores(noisy(6), 6, 20, 0.5, seed=0, folder=tmp_path)
    (tmp_path / "model-00004.safetensors").unlink()
    assert same(memorization_scores(noisy(6), 6, 20, 0.5, seed=0, folder=tmp_path), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.6}, r"model-00000.* is of another run; share: expected 0.6, found 0.5; subset: expected"),
        ({"seed": 1}, r"is of another run; seed: expected 1, found 0; .*: choose another folder or empty this one"),
        ({"n_examples": 7}, r"is of another run; examples: expected 7, found 6"),
    ],
)
def test_the_folder_of_another_run(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    arguments = {"n_examples": 6, "models": 20, "share": 0.5, "seed": 0}
    memorization_scores(noisy(6), **arguments, folder=tmp_path)  # type: ignore[arg-type]  # a mixed bag of arguments
    with pytest.raises(ValueError, match=message):
        memorization_scores(noisy(7), **arguments | changes, folder=tmp_path)  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("model-00004.safetensors").read_bytes())


def counts(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[memorization.KEY])
    outcomes = torch.ones(6, dtype=torch.int64)
    header["sha256"] = memorization.digest(outcomes)
    safetensors.torch.save_file({"outcomes": outcomes}, path, {memorization.KEY: json.dumps(header)})


def nested(path: Path) -> None:
    safetensors.torch.save_file({"outcomes": torch.zeros(6)}, path, {memorization.KEY: "[" * 100_000})


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"outcomes": torch.zeros(6)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-00003.safetensors is damaged .*: remove this file, and its model is trained again"),
        (empty, r"model-00003.safetensors is damaged or no safetensors file"),
        (alter, r"was altered or damaged after it was written, its digest does not match: remove this file"),
        (swap, r"is of another run; model: expected 3, found 4"),
        (counts, r"model-00003.safetensors is damaged \(fit must return a tensor of bool or .*int64 .*\): remove this"),
        (nested, r"model-00003.safetensors is damaged or no safetensors file \(maximum recursion depth"),
        (foreign, r"holds no outcomes that memorization_scores wrote: choose another folder"),
    ],
)
def test_a_damaged_file_is_found_before_any_training(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    memorization_scores(noisy(6), 6, 20, 0.5, seed=0, folder=tmp_path)
    (tmp_path / "model-00000.safetensors").unlink()
    damage(tmp_path / "model-00003.safetensors")

    def never(indices: Tensor) -> Tensor:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=message):
        memorization_scores(never, 6, 20, 0.5, seed=0, folder=tmp_path)


def test_what_was_kept_is_what_the_scores_were_made_of(tmp_path: Path) -> None:
    subsets = []

    def fit(indices: Tensor) -> Tensor:
        subsets.append(indices)
        return noisy(9)(indices)

    scores = memorization_scores(fit, 9, 20, 0.6, seed=3, folder=tmp_path)
    outcomes, trained_on = memorization.kept_outcomes(tmp_path, 9, 20, 0.6, seed=3)
    assert torch.equal(outcomes, torch.stack([noisy(9)(indices) for indices in subsets]))
    assert [row.nonzero()[:, 0].tolist() for row in trained_on] == [indices.tolist() for indices in subsets]
    sides = [(outcomes * side).sum(0) / side.sum(0) for side in (trained_on, ~trained_on)]
    assert torch.allclose(sides[0] - sides[1], scores.values)
    first, _ = memorization.kept_outcomes(tmp_path, 9, 5, 0.6, seed=3)
    assert torch.equal(first, outcomes[:5])
    with pytest.raises(ValueError, match=r"model-00000\.safetensors is of another run; seed: expected 4, found 3"):
        memorization.kept_outcomes(tmp_path, 9, 20, 0.6, seed=4)
    for model in (7, 11):
        (tmp_path / f"model-{model:05d}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 20 models, the first of them model-00007\.safetensors: "):
        memorization.kept_outcomes(tmp_path, 9, 20, 0.6, seed=3)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    memorization_scores(noisy(6), 6, 20, 0.5, seed=0)
    assert list(tmp_path.iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_examples": 1}, "n_examples must be an integer of at least 2, not 1"),
        ({"n_examples": 4.0}, "n_examples must be an integer of at least 2, not 4.0"),
        ({"models": True}, "models must be an integer of at least 2, not True"),
        ({"share": 1.0}, "share must be a number between 0 and 1, not 1.0: pass for instance 0.7"),
        ({"share": math.nan}, "share must be a number between 0 and 1, not nan"),
        ({"share": 0.1}, "a share of 0.1 of 4 examples is 0: a model must be trained on at least one example"),
        ({"share": 0.9}, "a share of 0.9 of 4 examples is 4: .* leave at least one out; pass a share nearer to 1/2"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, object], message: str) -> None:
    arguments = {"n_examples": 4, "models": 20, "share": 0.5, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        memorization_scores(noisy(4), **arguments)  # type: ignore[arg-type]  # a mixed bag of arguments


def test_fit_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"fit is a function: indices to train on .* not a list"):
        memorization_scores([0], 4, 20, 0.5, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (torch.ones(3), ValueError, r"one value for each of all 4 examples, shape \(4,\), not \(3,\) \(model 2\)"),
        (torch.ones(4, 1), ValueError, r"shape \(4,\), not \(4, 1\) \(model 2\): evaluate the model on the examples"),
        (torch.tensor([1, math.nan, 0, 0]), ValueError, r"1 of 4 are not, the first nan for example 1 \(model 2\)"),
        (torch.tensor([1, 0, 1.5, -1]), ValueError, r"2 of 4 are not, the first 1.5 for example 2 \(model 2\)"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"not torch.int64 values \(model 2\): convert it"),
        ([1.0] * 4, TypeError, r"a tensor of bool or floating point, not a list \(model 2\)"),
    ],
)
def test_what_fit_must_not_return(found: object, error: type[Exception], message: str, tmp_path: Path) -> None:
    calls = itertools.count()

    def fit(indices: Tensor) -> Tensor:
        return found if next(calls) == 2 else torch.ones(4)  # type: ignore[return-value]

    with pytest.raises(error, match=message):
        memorization_scores(fit, 4, 20, 0.5, seed=0, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "what is wrong is not kept"


# --- the value ------------------------------------------------------------------------------------------------------


def example(n: int) -> MemorizationScores:
    ones = torch.ones(n, dtype=torch.int64)
    return MemorizationScores(torch.arange(n) / n, torch.full((n,), 0.125).double(), 14 * ones, 6 * ones, 0.7, 3)


def test_it_prints_the_most_memorised() -> None:
    lines = repr(example(20)).splitlines()
    assert lines[0] == (
        "MemorizationScores of 20 examples: mean 0.4750; 20 models, each of 14 examples (share 0.7, seed 3)"
    )
    assert lines[1:4] == ["  at least 0.25: 15 examples", "  at least 0.5: 10 examples", "  at least 0.75: 5 examples"]
    assert lines[4].split() == ["example", "score", "standard", "error", "seen", "unseen"]
    assert lines[5].split() == ["19", "0.9500", "0.1250", "14", "6"]
    assert len(lines) == 16 and lines[-1] == "  ... and 10 more"
    assert len(repr(example(3)).splitlines()) == 8


def test_means_of_groups_by_hand() -> None:
    means = example(4).by_group(torch.tensor([3, 0, 3, 3]))  # scores 0, 1/4, 1/2, 3/4
    assert list(means) == [0, 3]
    assert means[0].mean == 0.25 and math.isnan(means[0].standard_error) and means[0].examples == 1
    assert means[3].mean == pytest.approx(1.25 / 3)
    assert means[3].standard_error == pytest.approx(float(np.std([0, 0.5, 0.75], ddof=1)) / math.sqrt(3))
    assert list(example(4).by_group(["b", "a", "b", "b"])) == ["a", "b"]
    with pytest.raises(ValueError, match="3 groups for 4 examples: give one group per example"):
        example(4).by_group([0, 0, 1])


def test_records() -> None:
    assert example(4).to_records()[1] == {
        "example": 1, "score": 0.25, "standard_error": 0.125, "seen": 14, "unseen": 6
    }  # fmt: skip
    assert len(example(4)) == len(example(4).to_records()) == 4


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    memorization_scores(noisy(4), 4, 20, 0.5, seed=0)
    assert capsys.readouterr() == ("", "")
    memorization_scores(noisy(4), 4, 20, 0.5, seed=0, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.count("memorization: model ") == 20 and err.endswith("model 20/20, 0 s\n")


def test_it_leaves_no_trace_and_fit_may_spoil_what_it_gets(tmp_path: Path) -> None:
    reused = torch.zeros(6)

    def fit(indices: Tensor) -> Tensor:
        reused.copy_(noisy(6)(indices))
        indices.fill_(0)
        return reused

    model = nn.Linear(1, 1)
    before = snapshot(model)
    found = memorization_scores(fit, 6, 20, 0.5, seed=0, folder=tmp_path)
    assert_unchanged(before, model)  # the random states and switches of the process
    assert same(found, memorization_scores(lambda i: noisy(6)(i).float(), 6, 20, 0.5, seed=0))
