"""Memorization by definition: what a model knows of an example only because it was trained on it.

The slow yardstick for everything that claims to find memorised examples from one model: many models, each trained on a
random part of the examples, and for each example the accuracy of those that saw it minus that of those that did not.
How a model is trained is the caller's business; this module draws the subsets, keeps what each model came to in a
file, and does the statistics.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import override

from neuronsurgery.atomic import KEY, write_atomically
from neuronsurgery.batches import group_members, group_names, ordered_groups
from neuronsurgery.checks import is_finite, is_integer, is_tensor, refuse, size_of, unfit
from neuronsurgery.digests import digest
from neuronsurgery.draws import checked_seed, random_bits
from neuronsurgery.errors import listed
from neuronsurgery.loaders import line_end
from neuronsurgery.results import Table, same_fields
from neuronsurgery.types import Fit, Group

SEARCHED = 10**8
"""How many numbers are drawn at most to say how many models are needed."""


class GroupMean(NamedTuple):
    """The mean score of a group of examples.

    Attributes:
        mean: over the examples of the group.
        standard_error: of that mean, from the spread of its examples: NaN for a single one.
        examples: their number.
    """

    mean: float
    standard_error: float
    examples: int


@dataclass(frozen=True, eq=False, repr=False)
class MemorizationScores(Table):
    """How much each example is memorised, with its standard error; see `memorization_scores`.

    Attributes:
        values: the score of each example, float64, shape (n,), in [-1, 1].
        standard_errors: float64, shape (n,).
        seen: how many models were trained on the example, int64, shape (n,), each at least 1.
        unseen: how many were not.
        share: the share of the examples that each model was trained on.
        seed: of the subsets.

    Raises:
        ValueError: if the tensors are not of one length, the models are not the same number for every example, or an
            argument is of another type or out of range; lists all.
    """

    values: Tensor
    standard_errors: Tensor
    seen: Tensor
    unseen: Tensor
    share: float
    seed: int

    def __post_init__(self) -> None:
        refuse("a value of MemorizationScores", self._unfit(), "memorization_scores makes them")

    def _unfit(self) -> list[str]:
        shape, sides = (max(1, size_of(self.values)),), (self.seen, self.unseen)
        counted = all(is_tensor(side, shape, torch.int64) and bool((side >= 1).all()) for side in sides)
        models = self.seen + self.unseen if counted else None
        same = models is not None and bool((models == models[0]).all())
        share = is_finite(self.share) and 0 < self.share < 1
        return [
            *unfit("values", is_tensor(self.values, shape), f"floating-point, shape {shape}", self.values),
            *unfit(
                "standard_errors", is_tensor(self.standard_errors, shape), f"as values, {shape}", self.standard_errors
            ),
            *unfit("seen, unseen", same, f"int64, shape {shape}, at least 1, of the same sum", sides),
            *unfit("share", share, "a number between 0 and 1", self.share),
            *unfit("seed", is_integer(self.seed, 0, math.inf), "an integer of at least 0", self.seed),
        ]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def models(self) -> int:
        """The number of models."""
        return int(self.seen[0] + self.unseen[0])

    def by_group(self, groups: Sequence[Group] | Tensor) -> dict[Group, GroupMean]:
        """Return the mean score of each group, groups in ascending order.

        The standard error takes the examples for a sample of their group. It knows nothing of the models, which all
        examples share.

        Args:
            groups: one integer or string per example, in a tensor or a sequence.

        Raises:
            TypeError: if a group is neither an integer nor a string.
            ValueError: if there is not one group per example.
        """
        names = group_names(groups)
        if len(names) != len(self):
            raise ValueError(f"{len(names)} groups for {len(self)} examples: give one group per example")
        members = group_members(names)
        means: dict[Group, GroupMean] = {}
        for group in ordered_groups(names):
            own = self.values[members[group]]
            spread = float(own.std()) / math.sqrt(len(own)) if len(own) > 1 else math.nan
            means[group] = GroupMean(float(own.mean()), spread, len(own))
        return means

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    @override
    def to_records(self) -> list[dict[str, Any]]:
        """Return one row per example, for any data frame."""
        columns = (self.values, self.standard_errors, self.seen, self.unseen)
        names = ("example", "score", "standard_error", "seen", "unseen")
        rows = zip(range(len(self)), *(column.tolist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def __repr__(self) -> str:
        size = round(self.share * len(self))
        said = (
            f"MemorizationScores of {len(self)} examples: mean {float(self.values.mean()):.4f}; {self.models} models, "
            f"each of {size} examples (share {self.share:g}, seed {self.seed})"
        )
        bounds = [f"at least {bound:g}: {int((self.values >= bound).sum())} examples" for bound in (0.25, 0.5, 0.75)]
        rows = (
            f"{example:>9}  {self.values[example]:>7.4f}  {self.standard_errors[example]:>14.4f}  "
            f"{self.seen[example]:>5}  {self.unseen[example]:>6}"
            for example in torch.argsort(self.values, descending=True, stable=True).tolist()
        )
        head = f"{'example':>9}  {'score':>7}  {'standard error':>14}  {'seen':>5}  {'unseen':>6}"
        return "\n".join([said, listed([*bounds, head]), listed(rows)])


def memorization_scores(
    fit: Fit,
    n_examples: int,
    models: int,
    share: float,
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MemorizationScores:
    """Return how much more often each example is got right by models that were trained on it than by others.

    Model t = 0, 1, ... is trained on S_t, a random subset of round(share * n_examples) examples. With a_t(i) in [0, 1]
    how right model t is on example i,

        score(i) = mean of a_t(i) over the t with i in S_t  -  mean of a_t(i) over the t with i not in S_t

    estimates without bias the memorization of i by this training procedure on that many examples. The standard error is
    sqrt(s1^2 / n1 + s0^2 / n0), with n1 and n0 the numbers of models that saw i and that did not, and s^2 the sample
    variance of their outcomes *together with one 0 and one 1*. Without these two, the models of a side that agree would
    give a standard error of 0, after three models as after three hundred (and a single model none at all); with them,
    the square of the standard error is on the mean never below the true variance of the score, however few the models,
    and they fade as the models grow many.

    S_t depends on (seed, t, n_examples, share) alone, on any machine: the first models of a longer run are those of a
    shorter one, and their files serve it.

    Args:
        fit: the caller's training: the examples to train on, int64, ascending, shape (round(share * n_examples),) ->
            for **all** of the examples, whether (bool) or how far (floating point, in [0, 1]) the trained model gets
            them right, shape (n_examples,), a tensor or an array of numpy. Its own randomness (initialisation, order)
            is best drawn anew for every model.
        n_examples: how many examples there are, at least 2.
        models: how many models to train. Feldman and Zhang took 2000 to 4000; for means over groups, tens do.
        share: the share of the examples that a model is trained on, in (0, 1); 0.7 in the source.
        seed: of the subsets, an integer of at least 0.
        folder: where to keep what each model came to, made if it is missing; the same call with the same folder goes
            on where it was interrupted. The folder knows the subsets, but not `fit`: take another one for another
            training. None keeps nothing.
        progress: whether to write a line of progress to standard error.

    Raises:
        TypeError: if `fit` returns neither a tensor nor an array, or one of integers.
        ValueError: if an argument is out of range; if an example would be in all or in none of the subsets (found
            before any training; says how many models are needed); if `folder` holds another run or a damaged file; if
            what `fit` returns has another shape, is NaN or lies outside [0, 1] (names the model).

    Example:
        >>> def memorise(indices: Tensor) -> Tensor:
        ...     outcomes = torch.tensor([True, True, True, False])  # what is learnt from others
        ...     outcomes[indices] = True  # and what is learnt by heart
        ...     return outcomes
        >>> scores = memorization_scores(memorise, n_examples=4, models=20, share=0.5, seed=0)
        >>> scores.values.tolist()
        [0.0, 0.0, 0.0, 1.0]

    Source:
        Feldman and Zhang, "What neural networks memorize and why", 2020; for the 0 and the 1, Agresti and Caffo,
        "Simple and effective confidence intervals for proportions", 2000.
    """
    run = _Run(*_checked(fit, n_examples, models, share, seed))
    _refuse_uncovered(run, models)
    kept = None if folder is None else Path(folder)
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)  # before hours of training, not after the first of them
    finished = set() if kept is None else {model for model in range(models) if _is_kept(run, model, kept)}
    # Of the models that saw an example (row 1) and that did not (row 0): their number, and sums of powers of outcomes.
    counts, sums, squares = (torch.zeros(2, n_examples, dtype=torch.float64, device="cpu") for _ in range(3))
    started = time.monotonic()
    for model in range(models):
        subset = run.subset(model)
        if kept is not None and model in finished:
            outcomes = _load(run, model, kept)
        else:
            outcomes = _checked_outcomes(fit(torch.from_numpy(subset.copy())), model, n_examples)
            if kept is not None:
                _keep(run, model, outcomes, kept)
        member = torch.zeros(n_examples, dtype=torch.bool, device="cpu")
        member[torch.from_numpy(subset)] = True
        for side in (0, 1):
            mine = (member == bool(side)).double()
            counts[side] += mine
            sums[side] += mine * outcomes.double()
            squares[side] += mine * outcomes.double().square()
        if progress:
            end = line_end(last=model + 1 == models)
            sys.stderr.write(f"memorization: model {model + 1}/{models}, {time.monotonic() - started:.0f} s{end}")
            sys.stderr.flush()
    means = sums / counts
    errors = (_padded_variance(counts, sums, squares) / counts).sum(0).sqrt()
    return MemorizationScores(means[1] - means[0], errors, counts[1].long(), counts[0].long(), run.share, run.seed)


def kept_outcomes(
    folder: str | os.PathLike[str], n_examples: int, models: int, share: float, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return what the models that `memorization_scores` kept in a folder came to, and what each was trained on.

    For what the scores alone do not say: how right the models of either side are, or an error that knows of the models.

    Args:
        folder: of a call of `memorization_scores` that has ended.
        n_examples: of that call.
        models: of that call, or fewer: then the first ones.
        share: of that call.
        seed: of that call.

    Returns:
        How right each model is on each example, float64, and whether it was trained on it, bool; both of shape
        (models, n_examples).

    Raises:
        FileNotFoundError: if the folder lacks a model.
        ValueError: if the folder holds another run or a damaged file.
    """
    run, kept = _Run(n_examples, float(share), seed), Path(folder)
    missing = [model for model in range(models) if not _path(model, kept).exists()]
    if missing:
        raise FileNotFoundError(
            f"{kept} lacks {len(missing)} of {models} models, the first of them {_path(missing[0], kept).name}: "
            f"memorization_scores with this folder trains what is missing"
        )
    outcomes = torch.stack([_load(run, model, kept).double() for model in range(models)])
    member = torch.zeros(outcomes.shape, dtype=torch.bool, device="cpu")
    for model in range(models):
        member[model, torch.from_numpy(run.subset(model))] = True
    return outcomes, member


def _padded_variance(counts: Tensor, sums: Tensor, squares: Tensor) -> Tensor:
    """Return the sample variance of outcomes together with one 0 and one 1, which is never 0.

    For n independent outcomes in [0, 1] of variance v its mean is at least v: the squared deviations sum to those of
    the outcomes, (n - 1) v on the mean, plus 1/2 + 2n / (n + 2) (mean - 1/2)^2 for the two, and 1/2 is at least 2v.
    """
    count, total, square = counts + 2, sums + 1, squares + 1
    return (square - total.square() / count) / (count - 1)


# The subsets


@dataclass(frozen=True)
class _Run:
    """What the subsets depend on."""

    n_examples: int
    share: float
    seed: int

    @property
    def size(self) -> int:
        """The number of examples in a subset."""
        return round(self.share * self.n_examples)

    def subset(self, model: int) -> np.ndarray:
        """Return the examples that a model is trained on, int64, ascending: those of the smallest random numbers."""
        tickets = random_bits(f"memorization\0{self.seed}\0{model}", self.n_examples)
        return np.sort(np.argpartition(tickets, self.size - 1)[: self.size]).astype(np.int64)

    def header(self, model: int) -> dict[str, Any]:
        """Return what the file of a model says of the run, as JSON values."""
        subset = digest(self.subset(model).astype("<i8").tobytes())
        return {"examples": self.n_examples, "share": self.share, "seed": self.seed, "model": model, "subset": subset}


def _checked(fit: Fit, n_examples: int, models: int, share: float, seed: int) -> tuple[int, float, int]:
    if not callable(fit):
        raise TypeError(
            f"fit is a function: indices to train on -> how right the model is on every example; not a "
            f"{type(fit).__name__}"
        )
    for name, value in (("n_examples", n_examples), ("models", models)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 2:
            raise ValueError(f"{name} must be an integer of at least 2, not {value!r}")
    if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 < share < 1:
        raise ValueError(f"share must be a number between 0 and 1, not {share!r}: pass for instance 0.7")
    if not 0 < round(share * n_examples) < n_examples:
        raise ValueError(
            f"a share of {share:g} of {n_examples} examples is {round(share * n_examples)}: a model must be trained on "
            f"at least one example and leave at least one out; pass a share nearer to 1/2"
        )
    return int(n_examples), float(share), checked_seed(seed)


def _refuse_uncovered(run: _Run, models: int) -> None:
    """Raise if an example is in all or in none of the subsets; the error says from how many models on none is."""
    seen = np.zeros(run.n_examples, dtype=np.int64)
    for model in range(models):
        seen[run.subset(model)] += 1
    never, always = int((seen == 0).sum()), int((seen == models).sum())
    if not never and not always:
        return
    needed = models
    for needed in range(models + 1, models + 2 + SEARCHED // run.n_examples):
        seen[run.subset(needed - 1)] += 1
        if seen.min() > 0 and seen.max() < needed:
            enough = f"pass models={needed}, the least that suffices for this seed"
            break
    else:
        enough = f"even {needed} models do not suffice for this seed; pass a share nearer to 1/2"
    raise ValueError(
        f"of {run.n_examples} examples, {never} are in none and {always} in all of the {models} subsets of {run.size}, "
        f"so nothing can be said about them: {enough}"
    )


# What a model came to


def _checked_outcomes(found: object, model: int, n_examples: int) -> Tensor:
    """Return what `fit` gave for a model on the CPU, as bool or float64."""
    if isinstance(found, np.ndarray):
        found = torch.tensor(found, device="cpu")
    if not isinstance(found, Tensor) or not (found.dtype == torch.bool or found.is_floating_point()):
        kind = f"{found.dtype} values" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(
            f"fit must return a tensor of bool or floating point, not {kind} (model {model}): convert it, e.g. "
            f"(logits.argmax(1) == targets)"
        )
    if found.shape != (n_examples,):
        raise ValueError(
            f"fit must return one value for each of all {n_examples} examples, shape ({n_examples},), not "
            f"{tuple(found.shape)} (model {model}): evaluate the model on the examples it was not trained on, too"
        )
    outcomes = found.detach().cpu()
    outcomes = outcomes if outcomes.dtype == torch.bool else outcomes.double()
    wrong = ~((outcomes >= 0) & (outcomes <= 1))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"fit must return values in [0, 1], but {int(wrong.sum())} of {n_examples} are not, the first "
            f"{float(outcomes[first])} for example {first} (model {model}): return whether each example is got right"
        )
    return outcomes


def _path(model: int, folder: Path) -> Path:
    return folder / f"model-{model:05d}.safetensors"


def _keep(run: _Run, model: int, outcomes: Tensor, folder: Path) -> None:
    header = {"kind": "outcomes", **run.header(model), "sha256": digest(outcomes)}
    data = safetensors.torch.save({"outcomes": outcomes.contiguous()}, metadata={KEY: json.dumps(header)})
    write_atomically(_path(model, folder), data)


def _is_kept(run: _Run, model: int, folder: Path) -> bool:
    """Return whether there is a file of a model; raises, before any training, if it is not of this run or damaged."""
    if not _path(model, folder).exists():
        return False
    _load(run, model, folder)
    return True


def _load(run: _Run, model: int, folder: Path) -> Tensor:
    path = _path(model, folder)
    again = "remove this file, and its model is trained again"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "{}"))
            names = list(file.keys())
            outcomes = file.get_tensor("outcomes") if names == ["outcomes"] else None
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {again}") from error
    if not isinstance(found, dict) or found.get("kind") != "outcomes" or outcomes is None:
        raise ValueError(f"{path} holds no outcomes that memorization_scores wrote: choose another folder")
    wanted = run.header(model)
    other = [key for key in wanted if wanted[key] != found.get(key)]
    if other:
        differing = "; ".join(f"{key}: expected {wanted[key]}, found {found.get(key)}" for key in other)
        raise ValueError(f"{path} is of another run; {differing}: choose another folder or empty this one")
    if found.get("sha256") != digest(outcomes):
        raise ValueError(f"{path} was altered or damaged after it was written, its digest does not match: {again}")
    try:
        return _checked_outcomes(outcomes, model, run.n_examples)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from error
