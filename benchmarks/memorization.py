"""Who is memorised by the definition of the word: many trainings, each on a part of the images.

The score of an image is how much more often models that saw it get it right than models that did not. Three questions
are put to it: do minority images score higher than the rest of their class; are they the ones that lose most when the
critical neurons of their group are zeroed in the run's own model; and do those agree with the knockout of `fragility`,
which needs no second training. Each answer has an interval, and one that does not tell says so.

    python benchmarks/memorization.py                                # seed 0: 40 trainings, about an hour of one core
    python benchmarks/memorization.py --data digits --epochs 30 --out runs/memorization-digits
    python benchmarks/memorization.py --quick                        # few images and epochs: does it run

What is done is kept in the folder, and a run that was killed goes on where it was.

Source: Feldman and Zhang, "What neural networks memorize and why", 2020.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from scipy import stats
from scipy.special import stdtrit
from torch import Tensor

import neuronsurgery as ns
from neuronsurgery.memorization import kept_outcomes
from neuronsurgery.study import readers
from neuronsurgery.study.data import Integers, digits, raw_bits, synthetic
from neuronsurgery.study.experiments import DRAW_SEED, SIZES, studied
from neuronsurgery.study.models import DEFAULTS, build_model
from neuronsurgery.study.run import RunFolder, at_work
from neuronsurgery.study.settings import Settings
from neuronsurgery.study.stage_fragility import SHOWN, Examples, knockout
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import RECIPES, EpochReport, Hardware, Recipe, checkpoint_path, digest, train
from neuronsurgery.types import Fit

Row: TypeAlias = dict[str, Any]


def signed(value: float, decimals: int = 1) -> str:
    """Return a change as it is read: with its sign, and none where it rounds to 0."""
    text = f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return text if abs(value) >= 1e-9 else f"{0:.{decimals}f}"


MODELS: Final = 40
"""Of 2397 images, one or another was in all subsets of 24 models for 7 seeds of 20, of 40 models for none."""

SHARE: Final = 0.7
LEVEL: Final = 0.95
MINORITY: Final = "minority images"
RESAMPLES: Final = 1000

OWN: Final = "critical neurons of the own group"
RANDOM: Final = "random neurons"


def memorization(
    folder: RunFolder,
    data: Any,
    trained: Trained,
    *,
    models: int = MODELS,
    share: float = SHARE,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    hardware: Hardware | None = None,
    progress: bool = True,
) -> Row:
    """Return who of the training images is memorised.

    Its keys: "models", "share", "epochs"; "groups", of each the mean score and the two shares of right answers that it
    is the difference of; "minority_difference", by how much the minority of a class scores above the rest of it,
    averaged over the minorities and for each alone; "points", the scores by group, thinned; "relation", Spearman's
    correlation of the score with what a cut of the trained model does to the image. A number that cannot be given is
    None, and the row says why as "impossible".

    Args:
        folder: the run folder; what it holds is not done again, nor is a model that was trained before a kill.
        data: the data set, embedded or read from disk: splits, loaders and group names.
        trained: the trained model of the run, on which the cuts are tried.
        models: how many models to train, at least 2.
        share: of the training images that each is trained on, in (0, 1).
        epochs: passes of each over its share. None: half of the run's, rounded down, at least 1.
        recipe: of the run; its epochs do not count. None: that of the run's preset.
        hardware: where and how the models are trained. None: on the CPU, as the run's own by default.
        progress: whether to write lines of progress to standard error.

    Raises:
        ValueError: if epochs is below 1, models or share out of range, or an image in all or in none of the subsets
            (says how many models are needed); before any training.
    """
    settings = folder.settings
    epochs = max(1, settings.epochs // 2) if epochs is None else epochs
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1, not {epochs!r}: pass None for half of the run's")
    chosen = replace(recipe or _preset(settings), epochs=epochs)
    # Outcomes of another length of training are other outcomes; `memorization_scores` would not notice.
    kept = folder.path / "memorization" / f"share-{share}-epochs-{epochs}"

    def compute() -> Row:
        started = time.perf_counter()
        fit = make_fit(data, settings, chosen, hardware)
        ensemble = Ensemble.trained(fit, len(data.splits["train"]), models, share, settings.seed, kept, progress)
        found = {
            "models": models,
            "share": share,
            "epochs": epochs,
            **_by_group(ensemble, data),
            "relation": _relation(folder, data, trained, ensemble.scores.values, progress),
        }
        folder.note_seconds("memorization", time.perf_counter() - started)
        return found

    row: Row = folder.remember(f"memorization-{models}-{share}-{epochs}", compute)
    return row


def _preset(settings: Settings) -> Recipe:
    return RECIPES[settings.preset] if settings.preset in RECIPES else DEFAULTS[settings.preset].recipe


# The models


def make_fit(data: Any, settings: Settings, recipe: Recipe, hardware: Hardware | None = None) -> Fit:
    """Return the study's training as a function of the images to train on, for `ns.memorization.memorization_scores`.

    Initial weights (of a network from a file: of its head), order and augmentation are drawn anew for every subset:
    memorization is defined over all that is random in a training. Their seed is made from the run's and the subset
    alone, so that a model is the same whether or not others were trained before it.

    Args:
        data: the data set.
        settings: of the run: architecture, initial weights and seed.
        recipe: how to train.
        hardware: where and how; None: on the CPU.

    Returns:
        The indices of training images, int64 -> whether each of all training images, as it is, is then classified
        right, bool (N,).
    """
    split = data.splits["train"]

    def fit(indices: Tensor) -> Tensor:
        seed = int(raw_bits(1, "memorization", settings.seed, digest([indices]))[0] >> np.uint64(1))
        part = replace(data, splits={**data.splits, "train": split.subset(indices)})
        network = build_model(settings.arch, len(set(split.targets.tolist())), settings.weights, seed).model
        with tempfile.TemporaryDirectory(prefix="neuronsurgery-") as temporary:

            def drop_last_but_one(report: EpochReport) -> None:
                checkpoint_path(temporary, report.epoch - 1).unlink()

            model = train(
                network,
                readers.training_source(part),
                temporary,
                recipe=recipe,
                seed=seed,
                hardware=hardware or Hardware(),
                progress=drop_last_but_one,
            )
        device = next(model.parameters()).device
        with torch.no_grad():
            right = [
                model(images.to(device)).argmax(1).cpu() == targets
                for images, targets, _ in readers.batches(split, 250)
            ]
        return torch.cat(right)

    return fit


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Many models and what each came to.

    Attributes:
        scores: the memorization of each image, in the order of the split.
        outcomes: float64 (models, N), how right each model is on each image.
        member: bool (models, N), whether it was trained on it.
    """

    scores: ns.memorization.MemorizationScores
    outcomes: Tensor
    member: Tensor

    @classmethod
    def trained(
        cls, fit: Fit, count: int, models: int, share: float, seed: int, folder: Path, progress: bool = False
    ) -> Ensemble:
        """Return the models of `ns.memorization.memorization_scores`, trained or read from the folder."""
        scores = ns.memorization.memorization_scores(
            fit, count, models, share, seed=seed, folder=folder, progress=progress
        )
        return cls(scores, *kept_outcomes(folder, count, models, share, seed=seed))

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean outcome of each image over the models that saw it and over the others, each (N,)."""
        means = [(self.outcomes * side).sum(0) / side.sum(0) for side in (self.member, ~self.member)]
        return means[0], means[1]

    def without_each(self) -> Iterator[Tensor]:
        """Yield, for each model, the scores (N,) of the others.

        An image that no other model saw, or that all others saw, keeps its mean outcome over that side.
        """
        sides = (self.member, ~self.member)
        for model, outcome in enumerate(self.outcomes):
            seen, unseen = (
                mean - side[model] * (outcome - mean) / (side.sum(0) - 1).clamp(min=1)
                for mean, side in zip(self.means(), sides, strict=True)
            )
            yield seen - unseen


# By group


def _by_group(ensemble: Ensemble, data: Any) -> Row:
    split = data.splits["train"]
    scores = ensemble.scores
    seen, unseen = ensemble.means()
    return {
        "groups": [
            {
                "group": data.group_names[int(group)],
                "mean": found.mean,
                "standard_error": None if math.isnan(found.standard_error) else found.standard_error,
                "right_when_seen": float(seen[split.groups == group].mean()),
                "right_when_not_seen": float(unseen[split.groups == group].mean()),
                "count": found.examples,
            }
            for group, found in scores.by_group(split.groups).items()
        ],
        "minority_difference": _minority_difference(ensemble, data),
        "points": _points(scores.values, data),
    }


def _points(scores: Tensor, data: Any) -> list[Row]:
    """Return the scores by group, evenly thinned."""
    points = []
    for group, name in enumerate(data.group_names):
        members = (data.splits["train"].groups == group).nonzero().flatten()
        kept = members[torch.linspace(0, len(members) - 1, min(SHOWN, len(members))).round().long()]
        points.append({"group": name, "of": len(members), "scores": [round(s, 4) for s in scores[kept].tolist()]})
    return points


def _minority_difference(ensemble: Ensemble, data: Any) -> Row:
    """Return by how much minorities score above the rest of their class: the mean over them, and each alone."""
    split = data.splits["train"]
    cells = torch.where(torch.isin(split.groups, torch.tensor(data.minority)), split.groups, -1 - split.targets)
    contrasts: dict[str, Tensor] = {}
    for group in data.minority:
        rare = split.groups == group
        common = cells == -1 - split.targets[rare][0] if rare.any() else rare
        if common.any():
            contrasts[data.group_names[group]] = rare / rare.sum().double() - common / common.sum().double()
    if not contrasts:
        reason = "no class has both minority images and others"
        text = difference_text(MINORITY, None, reason=reason)
        return {"mean": None, "low": None, "high": None, "text": text, "impossible": reason}
    average = torch.stack(list(contrasts.values())).mean(0)
    return {
        **contrast(ensemble, average, cells, MINORITY),
        "groups": [
            {"group": name, **contrast(ensemble, weights, cells, images_of(name))}
            for name, weights in contrasts.items()
        ],
    }


def contrast(ensemble: Ensemble, weights: Tensor, cells: Tensor, name: str) -> Row:
    """Return a weighted sum of scores with an interval that knows of the models and of the images.

    All images share the models, so their scores err together: what that comes to is the jackknife over models. The
    images stand for others of their cell: the variance of a cell's mean, from the spread of its scores. The interval
    is Student's of the sum of both, with the degrees of freedom of Welch and Satterthwaite, rounded down. What is left
    to chance in a single outcome is in both, so the interval is if anything too wide.

    Args:
        ensemble: the models.
        weights: float64 (N,), equal within a cell; they sum to 0.
        cells: int (N,), which images stand for the same.
        name: of the images with positive weights, for the text.

    Returns:
        "mean", "low", "high", "models_error" and "examples_error" (the two standard errors), and "text".
    """
    models = len(ensemble.member)
    mean = float(weights @ ensemble.scores.values)
    left_out = torch.stack([scores @ weights for scores in ensemble.without_each()])
    between_models = float((models - 1) / models * (left_out - left_out.mean()).square().sum())
    parts = [(between_models, models - 1)]
    for cell in sorted(set(cells[weights != 0].tolist())):
        own = ensemble.scores.values[cells == cell]
        if len(own) < 2:
            reason = f"a single image says nothing of the spread among {name}, or the rest of their class"
            said = difference_text(name, mean, reason=reason)
            return {"mean": mean, "low": None, "high": None, "text": said, "impossible": reason}
        total = float(weights[cells == cell].sum())
        parts.append((total**2 * float(own.var()) / len(own), len(own) - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    degrees = max(1, int(variance**2 / spread)) if spread else models - 1
    half = float(stdtrit(degrees, (1 + LEVEL) / 2)) * math.sqrt(variance)
    low, high = mean - half, mean + half
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "models_error": math.sqrt(between_models),
        "examples_error": math.sqrt(variance - between_models),
        "text": difference_text(name, mean, (low, high)),
    }


def images_of(group: str) -> str:
    """Return the images of a group, in words."""
    return f"images of {group}"


def difference_text(
    name: str, mean: float | None, interval: tuple[float, float] | None = None, *, reason: str = ""
) -> str:
    """Return what a difference of scores says of some images, as a sentence without its first capital and full stop.

    Args:
        name: of the images, such as "minority images".
        mean: by how much they score above the rest of their class; None where that cannot be given.
        interval: of it; None where there is none.
        reason: why there is no interval.

    Example:
        >>> print(difference_text("minority images", 0.223, (0.175, 0.272)))
        that minority images are memorised more than the rest of their class is shown: +0.223
        (95 % interval +0.175 to +0.272)
    """
    low, high = interval or (0.0, 0.0)
    shown = "is shown" if low > 0 or high < 0 else "is not shown"
    claim = f"that {name} are memorised {'less' if high < 0 else 'more'} than the rest of their class {shown}"
    ends = f"({100 * LEVEL:g} % interval {signed(low, 3)} to {signed(high, 3)})"
    if mean is None:
        return f"{claim}: {reason}"
    return f"{claim}: {signed(mean, 3)}{f' {ends}' if interval else f', and {reason}'}"


# What cuts do to whom


def _relation(folder: RunFolder, data: Any, trained: Trained, scores: Tensor, progress: bool) -> list[Row]:
    """Return the correlation of the scores with what each cut does, over all images and within each minority."""
    examples = Examples.of(data.splits["train"])
    effects = _effects(folder, data, trained, examples, progress)
    ordered = scores[examples.order]
    among = {"all": torch.ones(len(ordered), dtype=torch.bool)}
    among |= {data.group_names[group]: examples.groups == group for group in data.minority}
    return [
        {
            "cut": name,
            **rank_correlation(ordered[members], effect[members], folder.settings.seed),
            "group": group,
        }
        for group, members in among.items()
        if members.any()
        for name, effect in effects.items()
    ]


def _effects(folder: RunFolder, data: Any, trained: Trained, examples: Examples, progress: bool) -> dict[str, Tensor]:
    """Return what each cut does to each training image, float64 (N,), in the order of the loaders."""
    model, loaders = trained.model, data.loaders("train")
    gradients = folder.scores("gradients", lambda: ns.group_grad_norms(model, loaders, where=trained.where))
    count = min(max(SIZES), gradients.layout.count)
    edits = {f"own {group}": ns.zero_out(ns.topk(gradients[group], count)) for group in gradients.groups}
    draws = {
        f"random {draw}": ns.zero_out(ns.sample(gradients.layout, count, seed=DRAW_SEED + draw))
        for draw in range(folder.settings.draws)
    }
    deep = _knockout(data, trained)
    if progress:
        sys.stderr.write("memorization: what cuts do to whom\n")
    swept = ns.sweep(model, edits | draws | deep, loaders, metric=ns.margin)
    before = swept.values().double()
    own = before.clone()
    for group, name in enumerate(data.group_names):
        if f"own {name}" in edits:
            members = examples.groups == group
            own[members] = swept.values(f"own {name}").double()[members]
    randomly = torch.stack([swept.values(label).double() for label in draws])
    effects = {
        f"{OWN}: change of the margin": own - before,
        f"{OWN}: change of correctness": (own > 0).double() - (before > 0).double(),
        f"{RANDOM}: change of the margin": randomly.mean(0) - before,
        f"{RANDOM}: change of correctness": (randomly > 0).double().mean(0) - (before > 0).double(),
        "nothing: the margin itself": before,
    }
    for label in deep:
        left = ns.fragility(swept.values(label)[None], examples.targets).double()
        effects["last residual stage: fragility"] = _centred(left, examples.targets)
    return effects


def _knockout(data: Any, trained: Trained) -> dict[str, ns.Edit]:
    try:
        return {"knockout": knockout(trained.model, next(iter(next(iter(data.loaders("train").values())))))}
    except (ValueError, ns.CaptureError):  # no residual branches: nothing to compare with
        return {}


def _centred(values: Tensor, targets: Tensor) -> Tensor:
    """Return values minus the median of their class: an edit that cuts deeply shifts a class as a whole."""
    centred = values.clone()
    for target in set(targets.tolist()):
        centred[targets == target] -= values[targets == target].median()
    return centred


def rank_correlation(scores: Tensor, effect: Tensor, seed: int) -> Row:
    """Return Spearman's correlation of two values per image, with a percentile bootstrap interval over images.

    The draws of the bootstrap depend on the seed and the number of images alone: one cut is compared with another on
    the same draws. A draw in which either value is the same for all images shows no relation and counts as 0.

    Args:
        scores: float64 (N,).
        effect: float64 (N,).
        seed: of the draws.

    Returns:
        "spearman", "low", "high" and "count"; None and the reason, as "impossible", if a value is the same for all.
    """
    count = len(scores)
    both = {"score": scores.numpy(), "effect": effect.numpy()}
    constant = [name for name, values in both.items() if np.ptp(values) == 0]
    if constant:
        reason = f"the {' and the '.join(constant)} {'is' if len(constant) == 1 else 'are'} the same for all images"
        return {"spearman": None, "low": None, "high": None, "count": count, "impossible": reason}
    x, y = both.values()
    drawn = [_spearman(x[chosen], y[chosen]) for chosen in _resamples(count, seed)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return {"spearman": _spearman(x, y), "low": low, "high": high, "count": count}


def _resamples(count: int, seed: int) -> Iterator[Integers]:
    """Yield which of `count` images are drawn, int64 (count,), for each resample."""
    for number in range(RESAMPLES):
        yield (raw_bits(count, "memorization, resample", seed, number) % np.uint64(count)).astype(np.int64)


def _spearman(x: Any, y: Any) -> float:
    """Return Spearman's correlation; 0 where one side has no spread."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)


# What is printed


def table(found: Row, own: Sequence[float]) -> str:
    """Return what came out as text: scores by group, the minorities, and what goes with the score.

    Args:
        found: what `memorization` returns.
        own: the accuracy of the run's own model, per group.
    """
    lines = [f"{found['models']} models on {100 * found['share']:g} % of the images, {found['epochs']} epochs each", ""]
    lines += [f"{'group':24}  mean score  standard error  right when seen  when not  own model  images"]
    for row, accuracy in zip(found["groups"], own, strict=True):
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.3f}"
        shares = f"{100 * row['right_when_seen']:15.1f}  {100 * row['right_when_not_seen']:8.1f}  {100 * accuracy:9.1f}"
        lines.append(f"{row['group']:24}  {signed(row['mean'], 3):>10}  {error:>14}  {shares}  {row['count']:6}")
    difference = found["minority_difference"]
    said = [difference["text"], *(row["text"] for row in difference.get("groups", ()))]
    lines += ["", *(f"{text[0].upper()}{text[1:]}." for text in said), "", "Spearman's correlation of the score with"]
    lines += [f"  {row['cut']}, {row['group']}: {_correlation(row)}" for row in found["relation"]]
    return "\n".join(lines)


def _correlation(row: Row) -> str:
    if row["spearman"] is None:
        return str(row["impossible"])
    ends = f"[{signed(row['low'], 2)}, {signed(row['high'], 2)}]"
    return f"{signed(row['spearman'], 2)} {ends} over {row['count']} images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="default: runs/memorization-DATA-seed-N")
    parser.add_argument("--data", choices=["synthetic", "digits"], default="synthetic")
    parser.add_argument("--preset", choices=list(RECIPES), default="adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=int, default=MODELS)
    parser.add_argument("--epochs", type=int, help="of each model; default: half of the run's")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    few = {"train": (60, 12, 8, 30), "validation": (4,) * 4, "test": (4,) * 4} if options.quick else None
    dataset = {"synthetic": synthetic, "digits": digits}[options.data](options.seed, counts=few)
    recipe = replace(RECIPES[options.preset], epochs=4 if options.quick else 30)
    settings = Settings(
        data=options.data, preset=options.preset, seed=options.seed, quick=options.quick, **vars(recipe)
    )
    path = options.out or Path("runs") / f"memorization-{options.data}-seed-{options.seed}"
    with at_work(path):
        folder = RunFolder(path, settings)
        trained = _trained(folder, dataset)
        found = memorization(folder, dataset, trained, models=options.models, epochs=options.epochs, recipe=recipe)
    print(table(found, list(ns.evaluate(trained.model, dataset.loaders("train")).values)))


def _trained(folder: RunFolder, dataset: Any) -> Trained:
    """Return the network of a run, as `neuronsurgery study` trains it."""
    built = build_model(folder.settings.arch, 2, None, folder.settings.seed)
    source, recipe = readers.training_source(dataset), folder.settings.recipe
    model = train(built.model, source, folder.path, recipe=recipe, seed=folder.settings.seed)
    return Trained(model, {}, [], studied(built.head))


if __name__ == "__main__":
    main()
