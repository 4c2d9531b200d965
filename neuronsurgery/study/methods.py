"""The ways to train that the study compares with empirical risk minimisation, as values for `training.train`.

Each is a `Method` (what a step minimises), a `Source` (which images it is given), or both:

    paper's fine-tuning  ContrastivePruning        any source; from the ERM model
    Group DRO            GroupDro                  GroupBalanced
    Just Train Twice     Erm                       upsampled by the error_set of an early ERM model
    Correct-n-Contrast   CorrectNContrast          ContrastiveBatches by the predictions of an early ERM model

Their authors' settings are for some 5,000 or 160,000 images and a pre-trained ResNet-50. What has to change with the
size of the data changes by a rule that is written down where the setting is, and looks at training images only.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import neuronsurgery as ns
from neuronsurgery.objectives import group_dro, supervised_contrastive
from neuronsurgery.study import training
from neuronsurgery.study.data import Batches, batches, permutation, uniforms
from neuronsurgery.study.training import Method, Outputs, Passes, Recipe, Source, State
from neuronsurgery.types import Loader, Where
from neuronsurgery.wrappers import unwrap

FINE_TUNING: Final = Recipe("adam", learning_rate=2e-4, epochs=20, batch_size=100, schedule="plateau")
"""Stage 2 of the paper: 20 epochs more, with the optimiser and the schedule of its authors' code."""

IDENTIFICATION_SHARES: Final = (0.02, 0.2)
"""JTT's first stage as a share of the run: 1 of 50 epochs on CelebA, 60 of 300 on Waterbirds."""


# What a first stage says of the training images


def unaugmented(source: Source, size: int = 250) -> Batches:
    """The images of a source as they are, in the order of its split: a loader of `(images, targets, groups)`."""
    return batches(source.split, size)


def predictions(model: nn.Module, loader: Loader) -> Tensor:
    """The class with the highest logit of every example, int64 (N,), in the order of the loader, on the CPU.

    Args:
        model: any module with logits (B, classes); runs in evaluation mode on a copy, without gradient.
        loader: any iterable of batches.
    """
    return ns.sweep(model, {}, loader, metric=_predicted).values().long()


def _predicted(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def error_set(model: nn.Module, loader: Loader) -> Tensor:
    """Whether the model gets each example wrong, bool (N,), with the arguments and the order of `predictions`."""
    return ns.sweep(model, {}, loader, metric=ns.accuracy).values() == 0


def identification_epoch(epochs: int, share: float = IDENTIFICATION_SHARES[-1]) -> int:
    """The epoch of the ERM run whose mistakes Just Train Twice and Correct-n-Contrast go by, at least 1.

    Args:
        epochs: of the run.
        share: of the run, in (0, 1]; those of JTT's authors, `IDENTIFICATION_SHARES`, are far apart: try both.

    Example:
        >>> identification_epoch(300), identification_epoch(30), identification_epoch(30, share=0.02)
        (60, 6, 1)
    """
    return max(1, round(share * epochs))


# The paper's fine-tuning


@dataclass(frozen=True)
class ContrastivePruning(Method):
    """Stage 2 of the paper: the network must agree with itself without its critical neurons, and be right.

    Every epoch chooses the neurons anew and makes a twin that shares the weights and has them at zero. A step runs both
    and minimises `nt_xent(p, p') + weight * supervised term`, p and p' being the softmax outputs of model and twin, in
    float32. No group label is looked at. Train with `FINE_TUNING`, from the ERM model.

    Attributes:
        examples: the training images without augmentation, see `unaugmented`; "gradient" chooses by the hardest.
        where: the layers that neurons are chosen from, see `find_layout`.
        criterion: what chooses the neurons: "gradient", the norm of the gradient of the mean loss over `sample` of the
            `top` images of highest loss; "magnitude", the norm of the weights; "random"; "none" keeps all.
        fraction: the share of the neurons that the twin goes without, in (0, 1]; at least one.
        temperature: of the contrastive term.
        weight: of the supervised term; 0.2 in the paper, where it is on softmax outputs; 1 gives both terms one voice.
        supervised: "cross_entropy" of the logits, or "mse" between probabilities and labels as in the paper's text.
        statistics: what batch norm does in the twin's pass. "shared" and "own" normalise by the twin's batch, and
            update the running statistics that the model is evaluated with, or some of the twin's that are dropped.
            "frozen": both passes normalise by the running statistics of the start, and update nothing.
        top: how many of the hardest images to draw from; all, where there are fewer.
        sample: how many to draw.

    Source:
        You et al., "The Silent Majority", 2025.
    """

    name: ClassVar[str] = "contrastive pruning"
    examples: Loader = field(repr=False)
    where: Where | None = None
    criterion: Literal["gradient", "magnitude", "random", "none"] = "gradient"
    fraction: float = 1e-4
    temperature: float = 0.5
    weight: float = 1.0
    supervised: Literal["cross_entropy", "mse"] = "cross_entropy"
    statistics: Literal["shared", "own", "frozen"] = "shared"
    top: int = 256
    sample: int = 128

    def __post_init__(self) -> None:
        training.check_choices(self)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {self.fraction}: 0.01 % is 1e-4")

    def begin_epoch(self, model: nn.Module, seed: int, epoch: int) -> Passes:
        """See `Method`."""
        if self.statistics == "frozen":
            for norm in _batch_norms(model).values():
                norm.eval()
        buffers: Literal["own", "shared"] = "own" if self.statistics == "own" else "shared"
        twin = ns.apply(ns.zero_out(self.choose(model, seed, epoch)), model, buffers=buffers)
        return lambda network, images: (network(images), twin(images))

    def choose(self, model: nn.Module, seed: int, epoch: int) -> ns.Neurons:
        """The neurons that the twin goes without in this epoch."""
        if self.criterion == "none":
            return ns.Neurons()
        if self.criterion == "magnitude":
            return ns.top_fraction(ns.magnitudes(model, where=self.where), self.fraction)
        if self.criterion == "random":
            layout = ns.find_layout(model, where=self.where)
            count = max(1, round(self.fraction * layout.count))
            return ns.sample(layout, count, seed=training.seed_of("random neurons", seed, epoch))
        drawn = training.seed_of("hard", seed, epoch)
        hard = ns.hard_batch(model, self.examples, top=self.top, sample=self.sample, seed=drawn)
        return ns.top_fraction(ns.group_grad_norms(model, {"hard": [hard]}, where=self.where), self.fraction)

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Method`; outputs are the logits of model and twin, (B, classes) each."""
        logits, pruned = outputs
        dense = logits.softmax(dim=1)
        loss = ns.contrastive_pruning_loss(
            dense,
            pruned.softmax(dim=1),
            targets,
            logits=logits if self.supervised == "cross_entropy" else dense,
            supervised=self.supervised,
            weight=self.weight,
            temperature=self.temperature,
        )
        return loss, state


# Group DRO


def group_dro_step_size(steps: int) -> float:
    """The step size of Group DRO's weights for a run of so many steps, in [0.01, 0.1].

    A shorter run needs larger steps for the same say: 0.01 times the 11,400 steps of the authors' run on Waterbirds,
    over the steps of this one. Longer runs keep 0.01, as theirs on CelebA does.

    Example:
        >>> group_dro_step_size(11_400), group_dro_step_size(2280), group_dro_step_size(60_000), group_dro_step_size(10)
        (0.01, 0.05, 0.01, 0.1)
    """
    return min(0.1, max(0.01, 0.01 * 11_400 / steps))


@dataclass(frozen=True)
class GroupDro(Method):
    """Group DRO: the mean losses of the groups, weighted; the weights grow with the losses. It needs every group label.

    Its authors sample the groups alike: train on `GroupBalanced`. The weights are the state, 1 / groups each at first.

    Attributes:
        groups: how many there are.
        step_size: of the weights, see `group_dro_step_size`.
        adjustment: the C of the generalisation adjustment C / sqrt(n_g), which the authors tune; 0 for none.
        counts: the training images of each group, needed with an adjustment.

    Source:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", 2020.
    """

    name: ClassVar[str] = "group DRO"
    groups: int
    step_size: float = 0.01
    adjustment: float = 0.0
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")
        if (self.counts is None and self.adjustment > 0) or (self.counts and len(self.counts) != self.groups):
            raise ValueError(
                f"counts must be the training images of each of {self.groups} groups, found {self.counts}: pass the "
                f"`.counts` of the training split"
            )

    def initial_state(self) -> State:
        """See `Method`."""
        return {"weights": torch.full((self.groups,), 1 / self.groups)}

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Method`."""
        loss, weights = group_dro(
            functional.cross_entropy(outputs[0], targets, reduction="none"),
            groups,
            state["weights"].to(groups.device),
            step_size=self.step_size,
            counts=None if self.counts is None else torch.tensor(self.counts, device=groups.device),
            adjustment=self.adjustment,
        )
        return loss, {"weights": weights}


@dataclass(frozen=True, eq=False)
class GroupBalanced(Source):
    """As many images as the split has, each of a group and an image of it drawn at random, with replacement.

    Every epoch draws anew, from (seed, epoch) alone. Groups without images are left out.
    """

    def describe(self) -> dict[str, object]:
        """See `Source`."""
        return {**super().describe(), "sampling": "groups alike"}

    def epoch(self, size: int, seed: int, epoch: int) -> Batches:
        """See `Source`."""
        drawn = self.split.subset(self.draw(seed, epoch))
        return Source(drawn, self.augmentation).epoch(size, seed, epoch)

    def draw(self, seed: int, epoch: int) -> Tensor:
        """The indices of the images of an epoch, int64 (N,)."""
        groups = self.split.groups
        counts = torch.unique(groups, return_counts=True)[1]
        draws = torch.from_numpy(uniforms((len(groups), 2), "groups alike", seed, epoch))
        which = (draws[:, 0] * len(counts)).long()
        starts = counts.cumsum(0) - counts
        return groups.argsort(stable=True)[starts[which] + (draws[:, 1] * counts[which]).long()]


# Just Train Twice


def jtt_upsampling(errors: Tensor, share: float = 0.5) -> int:
    """How many copies to add of each error, so that errors make up `share` of an epoch: for `objectives.jtt_weights`.

    With E errors among N images that is share / (1 - share) * (N - E) / E - 1, rounded, and at least 0. Half of an
    epoch is what the authors' 100 copies of 1 % of the images, or 50 of 2 %, come to.

    Args:
        errors: whether each training example is in the error set, bool (N,); some must be, and some not.
        share: in (0, 1).

    Example:
        >>> jtt_upsampling(torch.arange(100) < 1), jtt_upsampling(torch.arange(100) < 60)
        (98, 0)
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), not {share}")
    wrong = int(errors.sum())
    if wrong in (0, len(errors)):
        raise ValueError(
            f"the first stage gets {wrong} of {len(errors)} training images wrong, so there is no error set to train "
            f"on: take an earlier epoch of it, or train it with a stronger weight decay"
            + (", or a later one if it has learnt nothing" if wrong else "")
        )
    return max(0, round(share / (1 - share) * (len(errors) - wrong) / wrong) - 1)


def upsampled(source: Source, copies: Tensor) -> Source:
    """A source in which each image comes as often as it is told: the second stage of Just Train Twice.

    Each copy has a place and an augmentation of its own. Train with `Erm`, from the initial weights.

    Args:
        source: the training images.
        copies: int64 (N,), how often each comes, at least 0; see `objectives.jtt_weights`.

    Source:
        Liu et al., "Just Train Twice: Improving Group Robustness without Training Group Information", 2021.
    """
    if copies.shape != (len(source),) or bool((copies < 0).any()) or not bool(copies.any()):
        raise ValueError(
            f"copies must say of each of {len(source)} images how often it comes, at least once for one of them, not "
            f"{copies}: see jtt_weights"
        )
    return replace(source, split=source.split.subset(torch.arange(len(source)).repeat_interleave(copies)))


# Correct-n-Contrast


@dataclass(frozen=True)
class CorrectNContrast(Method):
    """Correct-n-Contrast: features of one class come together whatever the first stage took the image for.

    A step minimises `weight * contrastive term + (1 - weight) * cross entropy` of the batch. The features are what the
    last linear layer reads, the pairs those of `contrastive_pairs`. Train on `ContrastiveBatches`.

    Attributes:
        weight: of the contrastive term, in [0, 1]; the authors' 0.75 on Waterbirds and on CelebA.
        temperature: theirs is 0.1 on Waterbirds, 0.05 on CelebA.
        statistics: "frozen" has the network in evaluation mode while it is trained, as the authors have: batch norm
            keeps the statistics it came with, dropout is off. "batch" has it in training mode.

    Source:
        Zhang et al., "Correct-N-Contrast: A Contrastive Approach for Improving Robustness to Spurious Correlations",
        2022.
    """

    name: ClassVar[str] = "correct-n-contrast"
    weight: float = 0.75
    temperature: float = 0.1
    statistics: Literal["frozen", "batch"] = "frozen"

    def __post_init__(self) -> None:
        training.check_choices(self)
        if not 0 <= self.weight <= 1 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"weight must lie in [0, 1] and temperature above 0, found {self.weight} and {self.temperature}"
            )

    def begin_epoch(self, model: nn.Module, seed: int, epoch: int) -> Passes:
        """See `Method`; batch norm that has not seen any data cannot be frozen."""
        if self.statistics == "frozen":
            for name, norm in _batch_norms(model).items():
                mean, variance = norm.running_mean, norm.running_var
                if mean is not None and variance is not None and not mean.any() and bool((variance == 1).all()):
                    raise ValueError(
                        f"batch norm '{name}' has not seen any data, so its statistics cannot be frozen: start from "
                        f"trained weights, or pass statistics='batch'"
                    )
            model.eval()
        return logits_and_features

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Method`; outputs are logits and features, `groups` are the predictions of the first stage."""
        logits, features = outputs
        contrast = supervised_contrastive(features, *contrastive_pairs(targets, groups), self.temperature)
        return self.weight * contrast + (1 - self.weight) * functional.cross_entropy(logits, targets), state


def contrastive_pairs(targets: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The positives and the negatives of each anchor, bool (B, B) each, row i for image i.

    Anchors are the images of the class of the first one; the rows of others are False. Positives are of its class and
    another prediction, negatives of another class and its prediction.

    Args:
        targets: int64 (B,).
        predicted: by the first stage, int64 (B,).
    """
    same_class, same_prediction = targets[:, None] == targets, predicted[:, None] == predicted
    anchors = (targets == targets[0])[:, None]
    return anchors & same_class & ~same_prediction, anchors & ~same_class & same_prediction


def logits_and_features(model: nn.Module, images: Tensor) -> Outputs:
    """Logits (B, classes), and what the linear layer that makes them reads, (B, D), both with their graph."""
    read: list[tuple[Tensor, Tensor]] = []

    def keep_last(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read[:] = [(inputs[0], output)]

    with contextlib.ExitStack() as hooks:
        for module in unwrap(model).modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(keep_last))
        logits = model(images)
    if not read or read[0][1] is not logits or read[0][0].dim() != 2:
        raise ValueError(
            f"the logits of {type(unwrap(model)).__name__} are not what a linear layer makes of one row of features "
            f"per image: contrast needs a network that ends in torch.nn.Linear"
        )
    return logits, read[0][0]


@dataclass(frozen=True, eq=False)
class ContrastiveBatches(Source):
    """Batches of anchors, positives and negatives; each image has the first stage's prediction in place of its group.

    A batch begins with an image, of class y and prediction p, drawn from all that have positives and negatives. It is
    four blocks of equal size, each drawn without repeats as far as there are images:

        anchors         class y, prediction p
        positives       class y, another prediction
        negatives       another class, prediction p: of the anchors
        easy negatives  another class, one of the positives' predictions: of the positives, which are anchors in turn

    Where there are no easy negatives, further negatives of the anchors take their place. A block is a quarter of the
    recipe's batch, as the authors' are; an epoch has as many images as the source, rounded up to whole batches.

    Attributes:
        split: the training images.
        augmentation: how they vary from epoch to epoch.
        predicted: the first stage's class of each, int64 (N,), see `predictions`.
    """

    predicted: Tensor

    def __post_init__(self) -> None:
        targets = self.split.targets
        if self.predicted.shape != targets.shape:
            raise ValueError(
                f"predicted must be one class per image, shape {tuple(targets.shape)}, not "
                f"{tuple(self.predicted.shape)}: take the predictions on the images of this source"
            )
        if len(self.anchors) == 0:
            wrong = [int((self.predicted[targets == y] != y).sum()) for y in sorted(set(targets.tolist()))]
            raise ValueError(
                f"no image can be an anchor: one needs images of its class that the first stage took for another than "
                f"its own, and images of another class that it took for the same; the first stage gets "
                f"{'/'.join(map(str, wrong))} of the classes' images wrong: take an earlier epoch of it where it makes "
                f"no mistakes, a later one where it always says the same"
            )

    @cached_property
    def anchors(self) -> Tensor:
        """The images that have both positives and negatives, int64 indices."""
        targets, predicted = self.split.targets, self.predicted
        classes = int(torch.cat([targets, predicted]).max()) + 1
        cells = torch.bincount(targets * classes + predicted, minlength=classes**2).view(classes, classes)
        eligible = (cells.sum(1, keepdim=True) > cells) & (cells.sum(0) > cells)
        return eligible[targets, predicted].nonzero().flatten()

    def describe(self) -> dict[str, object]:
        """See `Source`."""
        return {**super().describe(), "first stage's predictions": training.digest([self.predicted])}

    def epoch(self, size: int, seed: int, epoch: int) -> Batches:
        """See `Source`; a batch has at least four images."""
        if size < 4:
            raise ValueError(
                f"a batch of anchors, positives and two kinds of negatives has at least 4 images, not {size}"
            )
        block = size // 4
        steps = -(-len(self.split) // (4 * block))
        order = torch.cat([self.draw(block, seed, epoch, step) for step in range(steps)])
        drawn: Any = self.split.subset(order)
        split = replace(drawn, groups=self.predicted[order])
        return batches(split, 4 * block, seed=seed, epoch=epoch, augmentation=self.augmentation)

    def draw(self, block: int, seed: int, epoch: int, step: int) -> Tensor:
        """The indices of the images of one batch, int64 (4 * block,)."""
        key = ("contrast", seed, epoch, step)
        targets, predicted = self.split.targets, self.predicted
        first = self.anchors[int(uniforms((1,), *key)[0] * len(self.anchors))]
        same_class, same_prediction = targets == targets[first], predicted == predicted[first]
        anchors = _draw(same_class & same_prediction, block, *key, "anchors")
        positives = _draw(same_class & ~same_prediction, block, *key, "positives")
        easy = ~same_class & torch.isin(predicted, predicted[positives])
        hard = _draw(~same_class & same_prediction, block if easy.any() else 2 * block, *key, "negatives")
        parts = [anchors, positives, hard]
        return torch.cat([*parts, _draw(easy, block, *key, "easy negatives")] if easy.any() else parts)


# What they share


def _draw(pool: Tensor, count: int, *key: str | int) -> Tensor:
    """`count` indices of a boolean mask's members, in random order; members come again only after all have come."""
    members = pool.nonzero().flatten()
    order = torch.from_numpy(permutation(len(members), *key))
    return members[order[torch.arange(count) % len(members)]]


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
