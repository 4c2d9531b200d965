"""Last-layer retraining: a logistic regression on what the last linear layer reads, put back as an edit of its rows.

One code for a family of methods, which differ only in what the examples are balanced over: true groups (DFR, on
group-balanced validation images), inferred groups (no group labels), the classes, or the model's own confidence (AFR).
Features are computed once; a fit on some hundred of them takes a fraction of a second, by scikit-learn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import neuronsurgery as ns
from neuronsurgery.batches import Unpack, move, unpack_batch
from neuronsurgery.copies import eval_copy
from neuronsurgery.forward import extract_logits
from neuronsurgery.loaders import iterate_groups
from neuronsurgery.study.data import permutation
from neuronsurgery.switches import without_mha_fastpath
from neuronsurgery.types import Group, Loaders, Predict

Penalty: TypeAlias = Literal["l1", "l2"]

STRENGTHS: Final = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)  # C of `dfr`, as its authors try them for Waterbirds
REFITS: Final = 20  # regressions that `dfr` averages, as its authors do
GAMMAS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)  # of `tuned_afr`


# What is fitted


@dataclass(frozen=True, eq=False)
class Features:
    """What the last linear layer reads, example by example; iterates over features, targets and groups.

    Attributes:
        features: (N, D), in the dtype of the model, on the CPU.
        targets: int64 (N,), the classes.
        groups: int64 (N,).
        head: the name of that layer, for `last_logits` and `retrained`; None where nobody has looked.
    """

    features: Tensor
    targets: Tensor
    groups: Tensor
    head: str | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.features, self.targets, self.groups))


class LinearRule(NamedTuple):
    """A linear classifier of raw features.

    Attributes:
        coef: float64 (C, D), one row per class; for two classes (1, D), the direction of class 1.
        intercept: float64 (C,); for two classes (1,).
    """

    coef: Tensor
    intercept: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """The class of each example, int64 (N,); of equal scores the first."""
        scores = features.double() @ self.coef.T + self.intercept
        return scores.argmax(1) if len(self.coef) > 1 else (scores[:, 0] > 0).long()


class Tuned(NamedTuple):
    """A rule and how its hyper-parameter was chosen.

    Attributes:
        rule: fitted with the chosen value.
        chosen: the value with the best worst-group accuracy; of equal ones the first.
        accuracies: the worst-group accuracy of every value, in [0, 1].
    """

    rule: LinearRule
    chosen: float
    accuracies: Mapping[float, float]


# The model's side


def last_linear(
    model: nn.Module, batch: Any = None, *, predict: Predict | None = None, unpack: Unpack | None = None
) -> str:
    """The name of the last linear layer in the bare model, such as "classifier.6"; "" where it is the model itself.

    Args:
        model: any module; a copy that shares its weights is run in evaluation mode.
        batch: what a loader yields. With it, the layer is the one whose output **is** the model's logits; without, the
            last one that the model registers: the same for the usual networks, unless an auxiliary head is behind it.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.

    Raises:
        ValueError: if the logits are no linear layer's output, or there is no linear layer.
    """
    if batch is not None:
        runner = _Runner(model, predict)
        runner.run(move(unpack_batch(batch, unpack), runner.device))
        return runner.head
    if linears := _linear_layers(bare := eval_copy(model)):
        return list(linears)[-1]
    raise ValueError(f"{type(bare).__name__} has no linear layer, so its last layer cannot be retrained")


def extract_features(
    model: nn.Module, loaders: Loaders, *, predict: Predict | None = None, unpack: Unpack | None = None
) -> Features:
    """What the last linear layer of a model reads, for every example, in the order of the loaders.

    The model runs in evaluation mode on a copy that shares its weights, without gradient; nothing of it changes. Groups
    that are integers stay as they are; names are numbered, those of a mapping in its order, others in ascending order.

    Args:
        model: a network whose logits are the output of a linear layer.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.

    Raises:
        ValueError: if the logits are no linear layer's output, it does not read one vector per example, a target is no
            class index, or there are no examples.
    """
    runner = _Runner(model, predict)
    features: list[Tensor] = []
    targets: list[Tensor] = []
    names: list[Group] = []
    for groups, batch in iterate_groups(loaders, device=runner.device, unpack=unpack, progress=None):
        features.append(runner.run(batch))
        targets.append(batch.targets.detach().cpu())
        names.extend(groups)
    if not features:
        raise ValueError(
            "the loaders yielded no examples: an iterator is exhausted after one pass; give a list or a DataLoader"
        )
    classes = torch.cat(targets)
    if classes.dim() != 1 or classes.is_floating_point():
        raise ValueError(
            f"targets must be class indices, one integer per example, not {classes.dtype} of shape "
            f"{tuple(classes.shape)}: convert them"
        )
    ascending = sorted(set(names), key=lambda name: (isinstance(name, str), name))
    order = list(loaders) if isinstance(loaders, Mapping) else ascending
    integers = all(isinstance(name, int) for name in order)
    numbers = {name: name if integers else number for number, name in enumerate(order)}
    places = torch.tensor([numbers[name] for name in names]).long()
    return Features(torch.cat(features), classes.long(), places, runner.head)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class _Runner:
    """A private copy of a model that notes what its linear layers read and return, to find which are its logits."""

    def __init__(self, model: nn.Module, predict: Predict | None) -> None:
        self.model = eval_copy(model)
        self.device = next(self.model.parameters()).device
        self.predict = predict
        self.head = ""
        self.examples = 0
        self.passed: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        self.names = {layer: name for name, layer in _linear_layers(self.model).items()}
        for layer in self.names:
            layer.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        # Of layers that read many tokens per example only the latest is held: all would fill the memory.
        some = {other: seen for other, seen in self.passed.items() if seen[1].shape[:-1] == (self.examples,)}
        self.passed = some | {layer: (args[0] if args else kwargs["input"], output)}

    def run(self, batch: ns.Batch) -> Tensor:
        """What the last linear layer reads of a batch, (n, D), on the CPU."""
        self.passed, self.examples = {}, len(batch)
        with torch.no_grad(), without_mha_fastpath():
            logits = extract_logits(self.model(*batch.args, **batch.kwargs), self.predict, len(batch))
            heads = [layer for layer, passed in self.passed.items() if _is_output_of(layer, *passed, logits)]
        if not heads:
            last = f"the last that ran is {self.names[list(self.passed)[-1]]}" if self.passed else ""
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not the output of a linear layer"
                f"{f' ({last})' if last else ', of which it runs none'}: pass predict=, a function output -> that "
                f"layer's output, or give a network that ends in one"
            )
        self.head = self.names[heads[-1]]
        features = self.passed[heads[-1]][0]
        if features.dim() != 2:
            raise ValueError(
                f"the last linear layer '{self.head}' reads {tuple(features.shape)} for {len(batch)} examples; "
                f"retraining it needs one vector per example, shape ({len(batch)}, D)"
            )
        return features.detach().cpu().clone()


def _is_output_of(layer: nn.Linear, inputs: Tensor, output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are a linear layer's output, untouched."""
    if not output.is_set_to(logits):
        return False
    # In the same place, they may still have been changed there: divided by a temperature, cut off by a hook.
    again = functional.linear(inputs, layer.weight, layer.bias)
    return torch.allclose(again, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()), equal_nan=True)


def last_logits(model: nn.Module, features: Tensor, *, head: str | None = None) -> Tensor:
    """The logits that a model's last linear layer gives for some features (N, D), float64 (N, C).

    Args:
        model: the model.
        features: from `extract_features`.
        head: the layer's name, `Features.head`; default the one linear layer that reads vectors of D.

    Raises:
        ValueError: if there is no such layer, or several, or it reads vectors of another length.
    """
    length = features.shape[1] if features.dim() == 2 else None
    name, layer = _head(model, head, lambda linear: linear.in_features == length)
    if length != layer.in_features:
        raise ValueError(
            f"'{name}' reads vectors of {layer.in_features}, found features of shape {tuple(features.shape)}: take "
            f"them from extract_features of the same model"
        )
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    return functional.linear(features.double(), layer.weight.detach().cpu().double(), bias)


def retrained(model: nn.Module, coef: Tensor, intercept: Tensor, *, head: str | None = None) -> ns.Edit:
    """The edit that puts a linear rule in the place of a model's last layer: a rewind of its weight and bias.

    `apply(edit, model)` is the retrained model. A rule for two classes has one row w (and one number b), the evidence
    for class 1. In a layer of two rows it is split evenly, row 0 = -w / 2 and row 1 = w / 2, so that the difference of
    the logits is w x + b and their softmax the rule's probability. Otherwise rows are taken as they are.

    Args:
        model: the model whose features the rule was fitted on.
        coef: (C, D), or (1, D) for two classes.
        intercept: (C,), or (1,).
        head: the layer's name, `Features.head`; default the one linear layer that the rule fits.

    Raises:
        ValueError: if there is no such layer, or several, it has no bias, or the shapes do not fit it.
    """
    name, layer = _head(model, head, lambda linear: _fits(coef, linear))
    if layer.bias is None:
        raise ValueError(
            f"'{name}' has no bias, where the intercept would go: make the model with a last layer that has one "
            f"(bias=True); set to 0 it leaves the outputs as they are"
        )
    rows = layer.out_features
    if not _fits(coef, layer) or intercept.shape != coef.shape[:1]:
        raise ValueError(
            f"'{name}' has {rows} rows of {layer.in_features} and a bias of {rows}; found coef "
            f"{tuple(coef.shape)} and intercept {tuple(intercept.shape)}: fit them on the features of this model, with "
            f"one row per class (one for two classes)"
        )
    if rows == 2 and len(coef) == 1:
        coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
    weight, bias = (f"{name}.{tensor}".removeprefix(".") for tensor in ("weight", "bias"))
    neurons = ns.select(ns.find_layout(model, where=weight, extra=bias), {weight: ..., bias: ...})
    return ns.rewind(neurons, {weight: coef, bias: intercept})


def _fits(coef: Tensor, layer: nn.Linear) -> bool:
    """Whether a rule may take a layer's place: a row per class, or one for two classes."""
    rows, length = layer.out_features, layer.in_features
    return coef.shape == (rows, length) or (rows == 2 and coef.shape == (1, length))


def _head(model: nn.Module, head: str | None, fits: Callable[[nn.Linear], bool]) -> tuple[str, nn.Linear]:
    """The name and a plain copy, weights shared, of the last layer; without a name, of the only one that fits."""
    linears = _linear_layers(eval_copy(model))
    fitting = [name for name, layer in linears.items() if fits(layer)]
    if head is None and len(fitting) > 1:
        raise ValueError(
            f"several linear layers could be the last one, {', '.join(map(repr, fitting))}: pass head=features.head, "
            f"which extract_features finds by running the model"
        )
    # Where none fits, the error of the caller is about the last one.
    name = head if head is not None else fitting[0] if fitting else last_linear(model)
    if name not in linears:
        raise ValueError(
            f"no linear layer is called '{name}'; there are {', '.join(map(repr, linears)) or 'none'}: pass one "
            f"of them as head="
        )
    return name, linears[name]


# Fitting


def balanced_subset(groups: Tensor, seed: int, number: int, *, group_count: int | None = None) -> Tensor:
    """As many examples of every group as the smallest group has, drawn at random: their indices, int64, ascending.

    The draw depends on the groups, int (N,) of 0 ... G - 1, the seed and the number of the subset alone. `group_count`
    is G, by default the largest group's number plus 1; a group without examples raises a ValueError.
    """
    members = _members(groups, group_count)
    smallest = min(map(len, members))
    drawn = [
        own[permutation(len(own), "balanced subset", seed, number, group)[:smallest]]
        for group, own in enumerate(members)
    ]
    return torch.cat(drawn).sort().values


def balanced_logistic(
    features: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    penalty: Penalty = "l2",
    strength: float = 0.1,
    subsets: int = 10,
    seed: int = 0,
    scaler: Any = None,
    group_count: int | None = None,
) -> LinearRule:
    """The mean of logistic regressions, each on a random subset that has equally many examples of every group.

    Groups that lie within classes, such as 2 * class + background, leave every class in every subset. Others need not.

    Args:
        features: (N, D).
        targets: int (N,), classes 0 ... C - 1.
        groups: int (N,), numbered 0 ... G - 1: true groups, inferred ones, or the classes themselves.
        penalty: "l2" (and a softmax over more than two classes), or "l1" (one class against the rest, by liblinear,
            which penalises the intercept too, as DFR's authors have it).
        strength: C, the inverse of the penalty's weight; of standardised features.
        subsets: how many regressions.
        seed: of the subsets.
        scaler: scikit-learn's fitted `StandardScaler`, for the fit alone; default by all of `features`.
        group_count: G, where the last groups might be empty; default the largest group's number plus 1.

    Raises:
        ValueError: if shapes do not fit, features are not finite, there are fewer than two classes, a class or a group
            has no examples, a subset has none of a class, or `strength` or `subsets` is out of range.
    """
    _check(features, targets, groups, strength)
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, found {subsets}: 10 or 20 are usual")
    scaler = scaler or _fitted_scaler(features)
    drawn = [balanced_subset(groups, seed, number, group_count=group_count) for number in range(subsets)]
    for subset in drawn:
        _refuse_missing_classes(targets, subset)
    rules = [_logistic(features[subset], targets[subset], scaler, penalty, strength) for subset in drawn]
    return LinearRule(*(torch.stack(parts).mean(0) for parts in zip(*rules, strict=True)))


def weighted_logistic(
    features: Tensor, targets: Tensor, groups: Tensor, *, strength: float = 0.1, scaler: Any = None
) -> LinearRule:
    """The logistic regression of all examples in which every group weighs the same, with an L2 penalty.

    An example of a group of n weighs N / (G n), where N examples are of G groups that are not empty. No example is left
    out, as each but a few of a common group are in `balanced_logistic`, whose arguments and errors it has.
    """
    _check(features, targets, groups, strength)
    weights = _sklearn("utils.class_weight").compute_sample_weight("balanced", groups.numpy())
    return _logistic(features, targets, scaler or _fitted_scaler(features), "l2", strength, weights)


def dfr(
    validation: Features,
    train_features: Tensor,
    *,
    penalty: Penalty = "l1",
    strengths: Sequence[float] = STRENGTHS,
    refits: int = REFITS,
    seed: int = 0,
    group_count: int | None = None,
) -> Tuned:
    """Deep feature reweighting on validation images, DFR^Val_Tr: tuned on half of them, refitted on all.

    The images are split in random halves. For every C, a regression is fitted on a group-balanced subset of one half
    (standardised by that subset) and judged by the worst group of the other. With the best C, `refits` regressions on
    group-balanced subsets of all images (standardised by the training images) are averaged.

    C is chosen on a single split, as by the authors. Where groups are small the choice is noisy, and it matters: with
    some 30 images per group, one seed of the synthetic data had 57 % of the worst test group right at C = 0.03 and 89 %
    at C = 1. Look at what several seeds have `chosen` before you trust one.

    Args:
        validation: features, classes and groups of the validation images.
        train_features: (M, D), features of the training images; for the standardisation only.
        penalty: see `balanced_logistic`, as for `group_count` and errors.
        strengths: values of C to choose from; of equally good ones, the first.
        refits: how many regressions to average.
        seed: of the halves and the subsets.
        group_count: that of the data; a half without examples of a group is an error.

    Source:
        Kirichenko et al., "Last layer re-training is sufficient for robustness to spurious correlations", 2023, and
        their code.
    """
    features, targets, groups = validation
    if not strengths:
        raise ValueError("strengths is empty: give the values of C to choose from")
    _check(features, targets, groups, min(strengths))
    count = len(_members(groups, group_count))
    order = torch.from_numpy(permutation(len(targets), "halves", seed))
    judging, fitting = order[: len(order) // 2], order[len(order) // 2 :]
    for half in (fitting, judging):
        _members(groups[half], count, "half of the validation images, drawn at random,")
    fitting = fitting[balanced_subset(groups[fitting], seed, refits, group_count=count)]  # none of the refits' subsets
    _refuse_missing_classes(targets, fitting)
    x, y, scaler = features[fitting], targets[fitting], _fitted_scaler(features[fitting])
    rules = {strength: _logistic(x, y, scaler, penalty, strength) for strength in strengths}
    tuned = _best(rules, Features(features[judging], targets[judging], groups[judging]))
    rule = balanced_logistic(
        *validation,
        penalty=penalty,
        strength=tuned.chosen,
        subsets=refits,
        seed=seed,
        scaler=_fitted_scaler(train_features),
        group_count=count,
    )
    return tuned._replace(rule=rule)


def afr_weights(targets: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """The weight of each example in AFR, float64 (N,), of mean 1: as exp(-gamma p) / n.

    Args:
        targets: int (N,), the classes, of n examples each.
        logits: (N, C), of the model before retraining, see `last_logits`; p is the probability of the example's class.
        gamma: how strongly to weigh, at least 0; 0 weighs all examples of a class the same.

    Raises:
        ValueError: if shapes do not fit, a target is none of the classes, or gamma is negative or not finite.
    """
    if (
        logits.dim() != 2
        or targets.shape != logits.shape[:1]
        or not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]
    ):
        raise ValueError(
            f"AFR needs logits (N, C) and classes 0 ... C - 1 of N examples, found {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}: take the logits of the same examples, for instance from last_logits"
        )
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number of at least 0, found {gamma}: 4 is a usual value")
    probability = logits.double().softmax(1).gather(1, targets.long()[:, None])[:, 0]
    weights = (-gamma * probability).exp() / torch.bincount(targets)[targets]
    return weights * (len(weights) / weights.sum())


def afr(features: Tensor, targets: Tensor, logits: Tensor, *, gamma: float = 4.0, strength: float = 0.1) -> LinearRule:
    """Automatic feature reweighting: a logistic regression in which an example weighs more, the worse it is known.

    The features are those of images that the model was not trained on; see `afr_weights` and `balanced_logistic`. It
    differs from its source in the fit: an L2 penalty on the weights, which start from zero, to the optimum, in place of
    some steps of gradient descent with a penalty on the distance to the weights of the model.

    Source:
        Qiu et al., "Simple and fast group robustness by automatic feature reweighting", 2023.
    """
    _check(features, targets, targets, strength)
    weights = afr_weights(targets, logits, gamma).detach().numpy()
    return _logistic(features, targets, _fitted_scaler(features), "l2", strength, weights)


def tuned_afr(
    features: Tensor,
    targets: Tensor,
    logits: Tensor,
    validation: Features,
    *,
    gammas: Sequence[float] = GAMMAS,
    strength: float = 0.1,
) -> Tuned:
    """`afr` with the gamma, of equally good ones the first, that does best for the worst group of other images.

    The groups of `validation`, none of whose images should be among those of `features`, are the selector: true groups,
    inferred ones, or its classes (the worst class). The rest as for `afr`.

    Raises:
        ValueError: as `afr`, or if there is no gamma to choose from or no image to judge by.
    """
    if not gammas or not len(validation.targets):
        raise ValueError(f"found {len(gammas)} gammas and {len(validation.targets)} images to judge them by: give both")
    rules = {gamma: afr(features, targets, logits, gamma=gamma, strength=strength) for gamma in gammas}
    return _best(rules, validation)


def _best(rules: Mapping[float, LinearRule], data: Features) -> Tuned:
    """The rule that does best for the worst group, of those of some values."""
    accuracies = {value: worst_accuracy(rule, data) for value, rule in rules.items()}
    chosen = max(accuracies, key=accuracies.__getitem__)
    return Tuned(rules[chosen], chosen, accuracies)


def worst_accuracy(rule: LinearRule, data: Features) -> float:
    """The share of right answers in the group that has the lowest, in [0, 1]; groups without examples do not count."""
    right = (rule.predict(data.features) == data.targets).double()
    return min(float(right[data.groups == group].mean()) for group in set(data.groups.tolist()))


def _logistic(
    features: Tensor, targets: Tensor, scaler: Any, penalty: Penalty, strength: float, weights: Any = None
) -> LinearRule:
    """A logistic regression of standardised features, as the rule of raw ones."""
    regression = _sklearn("linear_model").LogisticRegression
    if penalty not in ("l1", "l2"):
        raise ValueError(f"penalty must be 'l1' or 'l2', found {penalty!r}: pass one of them")
    x, y = scaler.transform(features.detach().double().numpy()), targets.numpy()
    # A seed of its own: liblinear would otherwise draw one from numpy's global state.
    options: dict[str, Any] = {"C": strength, "max_iter": 10_000, "random_state": 0}
    answers = [y]
    if penalty == "l1":
        options |= {"solver": "liblinear"} | _l1()
        answers = [y == one for one in ([1] if y.max() == 1 else range(y.max() + 1))]
    fits = [regression(**options).fit(x, answer, weights) for answer in answers]
    coef = np.concatenate([fit.coef_ for fit in fits]) / scaler.scale_
    intercept = np.concatenate([fit.intercept_ for fit in fits]) - coef @ scaler.mean_
    return LinearRule(torch.from_numpy(coef), torch.from_numpy(intercept))


def _fitted_scaler(features: Tensor) -> Any:
    return _sklearn("preprocessing").StandardScaler().fit(features.detach().double().numpy())


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "last-layer retraining needs scikit-learn, which is not installed: pip install 'neuronsurgery[study]'"
        ) from error


def _l1() -> dict[str, Any]:
    """How to ask scikit-learn for an L1 penalty: by another argument since 1.8, which warns of the old one."""
    import sklearn

    major, minor = (int(part) for part in sklearn.__version__.split(".")[:2])
    return {"l1_ratio": 1.0} if (major, minor) >= (1, 8) else {"penalty": "l1"}


def _members(groups: Tensor, group_count: int | None, where: str = "the data") -> list[Tensor]:
    """The examples of each group 0 ... G - 1."""
    if group_count is None:
        group_count = int(groups.max()) + 1 if len(groups) else 1
    if groups.is_floating_point() or (len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < group_count):
        raise ValueError(
            f"groups must be integers 0 ... {group_count - 1}, found {groups.dtype} from {groups.min()} to "
            f"{groups.max()}: number the groups, or give the right group_count="
        )
    members = [(groups == group).nonzero().flatten() for group in range(group_count)]
    empty = [group for group, own in enumerate(members) if not len(own)]
    if empty:
        raise ValueError(
            f"{where} has no examples of group {', '.join(map(str, empty))} of 0 ... {group_count - 1}, so no "
            f"subset can be balanced over the groups: give examples of it, or number the groups without it"
        )
    return members


def _refuse_missing_classes(targets: Tensor, subset: Tensor) -> None:
    """Raise where a group-balanced subset has no examples of a class, since there is nothing to tell it from."""
    counts = torch.bincount(targets[subset], minlength=int(targets.max()) + 1)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"a subset of {len(subset)} examples that is balanced over the groups has none of class "
            f"{', '.join(map(str, missing))}, because groups cross the classes: give groups that lie within a class "
            f"each, such as 2 * class + group"
        )


def _check(features: Tensor, targets: Tensor, groups: Tensor, strength: float) -> None:
    n = len(targets)
    if features.dim() != 2 or len(features) != n or targets.shape != (n,) or groups.shape != (n,) or n == 0:
        raise ValueError(
            f"expected features (N, D), targets (N,) and groups (N,) of the same N examples, found "
            f"{tuple(features.shape)}, {tuple(targets.shape)} and {tuple(groups.shape)}"
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise ValueError(f"the features of {bad} of {n} examples are NaN or infinite: look at the model's weights")
    if targets.is_floating_point() or int(targets.min()) < 0:
        raise ValueError(
            f"targets must be classes 0 ... C - 1, found {targets.dtype} from {targets.min()}: number them"
        )
    counts = torch.bincount(targets)
    if len(counts) < 2 or (counts == 0).any():
        raise ValueError(
            f"every class needs examples, and there must be two or more; found {counts.tolist()} examples of the "
            f"classes 0 ... {len(counts) - 1}: give examples of every class"
        )
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength must be a finite number above 0, found {strength}: 0.1 is a usual value")
