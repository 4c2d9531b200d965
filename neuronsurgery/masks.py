"""Learned masks: which neurons, held down, break one group of examples and leave the others as they are.

Every neuron has a gate that its slice of the weight is multiplied by. The gates alone are learned; the model runs
through `torch.func.functional_call` on a copy in evaluation mode, as it does where gradients of groups are computed.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from neuronsurgery.batches import Batch, Unpack, by_key, group_names
from neuronsurgery.checks import is_finite, is_integer, refuse, unfit
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.differentiation import Within, differentiable, differentiable_rnns, warn_of_unreached
from neuronsurgery.discovery import given_layout
from neuronsurgery.draws import checked_seed
from neuronsurgery.errors import checked, warn
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.independence import dependence
from neuronsurgery.layouts import Layout
from neuronsurgery.loaders import line_end, named_loaders, pause_between_lines
from neuronsurgery.losses import (
    IGNORED_TOKEN,
    are_probabilities,
    is_larger_better,
    is_token_classification,
    margin,
    refuse_bad_losses,
)
from neuronsurgery.pools import Pool, Unit, joined, read_pools, spared_names
from neuronsurgery.precision import wide_dtype, widened
from neuronsurgery.scores import Scores, by_layout, norms, refuse_non_finite
from neuronsurgery.surveys import computed_elsewhere, held_elsewhere, survey
from neuronsurgery.switches import KERNELS, restoring, without_mha_fastpath
from neuronsurgery.types import Group, Loaders, Metric, Predict, Where

METRIC = "a metric is a function (logits, targets) -> one value per example, not a {}: pass margin or your own"


# A model with gates


@dataclass(frozen=True, eq=False)
class _Masked:
    """A model as a function of the gates of its neurons.

    Attributes:
        runner: the model, as a copy to run.
        layout: the layers whose neurons have gates.
        weights: the tensors of these layers by the layers' names.
        tensors: all of the model's tensors by first name.
        first_names: the first names of the layers' tensors by the layers' names.
        predict: the model's output -> logits; None is the default.
        held: the gated parameters that plain attributes hold, too, and where.
    """

    runner: Runner
    layout: Layout
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    first_names: Mapping[str, str]
    predict: Predict | None
    held: Mapping[str, str]

    def open_gates(self) -> Tensor:
        """Return gates of 1, with which the model is itself: shape (M,), float32 or as wide as the weights."""
        dtype = functools.reduce(torch.promote_types, map(wide_dtype, self.weights.values()))
        return torch.ones(self.layout.count, dtype=dtype, device=self.runner.device)

    def parameters(self, gates: Tensor) -> dict[str, Tensor]:
        """Return all tensors, each neuron's slice times its gate, by every place in `Within` that holds them."""
        tensors = dict(self.tensors)
        for layer, start in self.layout.starts.items():
            weight = self.weights[layer.parameter]
            every = torch.arange(layer.count, device=weight.device)
            own = gates[start : start + layer.count].to(weight.device, weight.dtype)
            rows = layer.take(weight, every) * own.reshape(-1, *[1] * len(layer.row_shape))
            tensors[self.first_names[layer.parameter]] = layer.put(weight, every, rows)
        return {f"model.{place}": tensor for name, tensor in tensors.items() for place in self.runner.places[name]}

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, with whatever tensors the copy holds at the moment."""
        return extract_logits(isolated_forward(self.runner, batch), self.predict, len(batch))


def _masked(model: nn.Module, layout: Layout | None, where: Where | None, predict: Predict | None) -> _Masked:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a mask cannot be learned inside torch.inference_mode(): leave it, or use torch.no_grad(), in which this "
            "function works"
        )
    surveyed = survey(model)
    runner = make_runner(surveyed, checkpoints=True)
    layout = given_layout(surveyed, runner.parameters, layout, where, None)
    tensors = {name: differentiable(parameter) for name, parameter in runner.parameters.items()}
    weights = by_layout(tensors, layout, surveyed)
    refuse_non_finite(norms(weights, layout), layout, "the model's weights are")
    first_names = surveyed.first_names(weights)
    elsewhere = computed_elsewhere(surveyed) | held_elsewhere(surveyed)
    held = {name: at for name, at in elsewhere.items() if name in first_names.values()}
    return _Masked(runner, layout, weights, tensors, first_names, predict, held)


# What is minimised


def pull(metric: Metric, logits: Tensor, targets: Tensor) -> Tensor:
    """Return log(1 + exp(m + 1)) of each example's metric m, of its negative where smaller is better: shape (n,).

    Raises:
        ValueError: if `metric` gives something else than one number per example, or one without a gradient.
    """
    values = metric(logits, targets)
    if not isinstance(values, Tensor) or values.shape != targets.shape[:1]:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"metric must return one value per example, shape ({len(targets)},), not {found}: average over anything "
            f"but the examples"
        )
    if logits.requires_grad and not values.requires_grad:
        raise ValueError(
            "the metric has no gradient, so that no gate can be learned from it: accuracy counts right and wrong, pass "
            "margin, or a function that is differentiable"
        )
    return F.softplus(1.0 - values if is_larger_better(metric) is False else values + 1.0)


def divergence(before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """Return KL(softmax(before) || softmax(after)) of each example, float32 or wider, shape (n,).

    It is the mean over the tokens or pixels of an example. Left out are those whose label is -100; of tokens only where
    the label of the next is -100, too, since that is what a causal language model predicts there.

    Args:
        before: logits, shape (n, classes, ...); or (n, tokens, classes) with targets (n, tokens).
        after: logits of the same shape.
        targets: of these examples.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    tokens = is_token_classification(before, targets)
    axis = 2 if tokens else 1
    if before.dim() < 2 or before.shape[axis] < 2:
        raise ValueError(
            f"other groups are spared by the divergence of class probabilities, for which logits (example, class, ...) "
            f"of two or more classes are needed, not shape {tuple(before.shape)}: for one logit z give the two logits "
            f"(0, z) with predict="
        )
    p, q = widened(before).log_softmax(axis), widened(after).log_softmax(axis)
    possible = p > float("-inf")  # classes that a model rules out by a logit of -inf
    each = (p.exp() * (p.where(possible, 0.0) - q.where(possible, 0.0))).sum(axis)
    if each.dim() == 1:
        return each
    counted = torch.ones_like(each, dtype=torch.bool)
    if targets.shape == each.shape and not targets.is_floating_point():
        counted = targets != IGNORED_TOKEN
        if tokens:
            counted = counted | F.pad(counted[:, 1:], (0, 1))
    return each.where(counted, 0.0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def _even(groups: Iterable[list[Unit]], total: float) -> Iterator[tuple[Unit, float]]:
    """Yield the units of several groups with weights that sum to `total`, every group's to the same."""
    every = list(groups)
    for units in every:
        yield from ((unit, total / len(every) / sum(map(len, units))) for unit in units)


def mask_gradient(
    masked: _Masked, gates: Tensor, metric: Metric, own: list[Unit], others: list[list[Unit]], protect: float
) -> tuple[float, Tensor]:
    """Return the loss of a step, the penalty aside, and its gradient to the gates, shape (M,)."""
    loss, gradient = 0.0, torch.zeros_like(gates)
    for batch, weights in joined(_even([own], 1.0), masked.runner.device):
        part = _backward(masked, gates, batch, functools.partial(_own_loss, metric, batch, weights))
        loss, gradient = loss + part[0], gradient + part[1]
    for batch, weights in joined(_even(others, protect), masked.runner.device) if protect else ():
        with torch.no_grad(), without_mha_fastpath():
            before = masked.logits(batch)
        masked.runner.attributes.restore()
        part = _backward(masked, gates, batch, functools.partial(_others_loss, batch, weights, before))
        loss, gradient = loss + part[0], gradient + part[1]
    return loss, gradient


def _own_loss(metric: Metric, batch: Batch, weights: list[float], logits: Tensor) -> Tensor:
    losses = pull(metric, logits, batch.targets)
    refuse_bad_losses(losses, "the group")
    return losses @ losses.new_tensor(weights)


def _others_loss(batch: Batch, weights: list[float], before: Tensor, logits: Tensor) -> Tensor:
    losses = divergence(before, logits, batch.targets)
    refuse_bad_losses(losses, "the groups to spare")
    return losses @ losses.new_tensor(weights)


def _backward(masked: _Masked, gates: Tensor, batch: Batch, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """Return a loss of the masked model's logits, and its gradient to the gates."""

    def differentiated(leaf: Tensor) -> tuple[float, Tensor]:
        value = loss(masked.logits(batch))
        if not value.requires_grad:
            return float(value.detach()), torch.zeros_like(gates)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient

    with torch.enable_grad(), differentiable_rnns(masked.runner), KERNELS.steady():
        leaf, within = gates.detach().requires_grad_(), Within(masked.runner.model)
        try:
            found = functional_call(within, masked.parameters(leaf), (differentiated, leaf), tie_weights=False)
        finally:
            masked.runner.attributes.restore()  # the graph of what was kept is gone
    return found  # type: ignore[no-any-return]  # what `differentiated` returns


# Learning


@dataclass(frozen=True)
class _Numbers:
    """The numbers of `learned_mask`."""

    steps: int
    penalty: float
    learning_rate: float
    protect: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        refuse("a learned mask", self._unfit(), "Usual are steps=100, penalty=0.02, learning_rate=0.03 and protect=2.0")

    def _unfit(self) -> list[str]:
        return [
            *unfit("steps", is_integer(self.steps, 1), "an integer of at least 1", self.steps),
            *unfit("batch_size", is_integer(self.batch_size, 1), "an integer of at least 1", self.batch_size),
            *unfit("penalty", is_finite(self.penalty) and self.penalty >= 0, "a number of at least 0", self.penalty),
            *unfit("protect", is_finite(self.protect) and self.protect >= 0, "a number of at least 0", self.protect),
            *unfit(
                "learning_rate",
                is_finite(self.learning_rate) and self.learning_rate > 0,
                "a number above 0",
                self.learning_rate,
            ),
        ]


@restoring
def learned_mask(
    model: nn.Module,
    loaders: Loaders,
    group: Group,
    *,
    against: Group | Sequence[Group] | None = None,
    layout: Layout | None = None,
    where: Where | None = None,
    metric: Metric = margin,
    steps: int = 100,
    penalty: float = 0.02,
    learning_rate: float = 0.03,
    protect: float = 2.0,
    batch_size: int = 128,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Return how far each neuron has to be held down to break one group and leave the others as they are.

    Every neuron has a gate g in [0, 1] that its slice of the weight is multiplied by. Beginning at 1, the gates are
    learned, together, to minimise

        mean over the group of log(1 + exp(m_g(x) + 1))
        + protect * mean over the others of KL(p(x) || p_g(x))
        + penalty * sum of (1 - g)

    where m_g is the metric under the gates, and p and p_g are the class probabilities without and with them (for tokens
    or pixels the mean over these). The score of a neuron is 1 - g. Gates act together, as a cut of several neurons
    does; so it is a set that is found, and neurons that could stand in for one another share it.

    The model runs in evaluation mode on a copy that shares its weights; nothing of it changes. It works inside
    `no_grad` and under the caller's autocast.

    Cost: one pass over the data to read it; then for each step one forward and one backward pass of at most
    `batch_size` examples of the group, and two forward and one backward pass of as many of the others. At most
    `steps * batch_size` examples of each group are kept in memory, copies of random ones.

    Args:
        model: any module.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example.
        group: the name of the group to break.
        against: the groups to spare; all others where it is None. Each counts the same, however large.
        layout: the layers whose neurons get gates, see `find_layout`; `where` is the short way to one.
        where: which layers, see `find_layout`.
        metric: (logits, targets) -> one value per example, shape (n,), that is to fall (of the library's losses: rise).
            It needs a gradient, also where it is met: one that saturates never closes a gate, so take a margin rather
            than a probability.
        steps: of Adam, at least 1.
        penalty: what a closed gate costs.
        learning_rate: of Adam; gates move by about as much in a step, so `steps * learning_rate` should be above 1.
        protect: what a change of the others' outputs costs.
        batch_size: how many examples of the group, and of the others, a step sees at most; at least one of each.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        seed: of the draw of examples, an integer of at least 0. Where no group has more than a step sees of it, nothing
            is drawn.
        progress: whether to write lines of progress to standard error.

    Returns:
        Scores of shape (1, M), in [0, 1].

    Raises:
        RuntimeError: inside `inference_mode`.
        TypeError: if a batch has an unknown form, or an argument is of another kind.
        KeyError: if there is no such group (lists those there are), or a glob matches nothing.
        ValueError: if a group has no examples, there is none to spare, a number is out of range, the layout does not
            fit the model, the metric is not one value per example or has no gradient, the logits are of one class, or a
            loss, weight or gradient is NaN or infinite.

    Warns:
        UserWarning: if no gradient reached some layers, the outputs look like probabilities, or examples have other
            values without their batch.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        >>> data = [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))]
        >>> learned_mask(model, data, 1).values
        tensor([[0., 1., 0.]])

    Source:
        Louizos et al., "Learning sparse neural networks through L0 regularization", 2018 (gates that are learned);
        Chang et al., "Do localization methods actually localize memorized data in LLMs?", 2024 (for what is memorised).
    """
    checked(metric, Callable, METRIC)
    numbers = _Numbers(steps, penalty, learning_rate, protect, batch_size, checked_seed(seed))
    loaders, unpack = named_loaders(loaders), by_key(unpack, group_key)
    (group,) = group_names([group])
    spared = spared_names(against)
    masked = _masked(model, layout, where, predict)
    own, others = read_pools(
        loaders,
        group,
        spared,
        key=f"mask\0{numbers.seed}",
        most=numbers.steps * numbers.batch_size,
        unpack=unpack,
        progress=progress,
    )
    gates = _learned(masked, metric, own, others, numbers, progress)
    return Scores((1.0 - gates).float().cpu()[None], (group,), (len(own),), masked.layout, "learned mask")


def _learned(
    masked: _Masked, metric: Metric, own: Pool, others: Sequence[Pool], numbers: _Numbers, progress: bool
) -> Tensor:
    """Return the gates after so many steps of Adam, written out since torch's would load its compiler."""
    gates = masked.open_gates()
    mean, square, reached = torch.zeros_like(gates), torch.zeros_like(gates), torch.zeros_like(gates, dtype=torch.bool)
    owns = own.steps(numbers.batch_size)
    shares = [pool.steps(max(1, numbers.batch_size // len(others))) for pool in others]
    for step in _counted(numbers.steps, progress):
        drawn = next(owns), [next(share) for share in shares]
        if step == 1:
            _warn_of_outputs(masked, metric, drawn[0])
        _, gradient = mask_gradient(masked, gates, metric, *drawn, numbers.protect)
        refuse_non_finite(gradient.cpu(), masked.layout, "the gradients of the gates are")
        reached |= gradient != 0
        mean = mean.lerp(gradient - numbers.penalty, 0.1)
        square = square.lerp((gradient - numbers.penalty) ** 2, 0.001)
        size = (square / (1 - 0.999**step)).sqrt() + 1e-8
        gates = (gates - numbers.learning_rate * (mean / (1 - 0.9**step)) / size).clamp(0.0, 1.0)
    names = [
        layer.parameter for layer, start in masked.layout.starts.items() if reached[start : start + layer.count].any()
    ]
    warn_of_unreached([layer.parameter for layer in masked.layout], names, masked.held)
    return gates


def _counted(steps: int, progress: bool) -> Iterator[int]:
    """Yield the numbers of the steps, with a line of progress on standard error if it is wanted."""
    shown = time.monotonic()
    for step in range(1, steps + 1):
        yield step
        if progress and (step == steps or time.monotonic() - shown > pause_between_lines()):
            shown = time.monotonic()
            sys.stderr.write(f"learned mask: step {step}/{steps}{line_end(last=step == steps)}")
            sys.stderr.flush()


def _warn_of_outputs(masked: _Masked, metric: Metric, units: list[Unit]) -> None:
    """Warn where outputs are no logits, or examples depend on those beside them, which are others in each step."""

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = masked.logits(batch)
        masked.runner.attributes.restore()
        return logits, pull(metric, logits, batch.targets)

    with torch.no_grad(), without_mha_fastpath():
        batch, _ = next(joined(_even([units], 1.0), masked.runner.device))
        logits, losses = run(batch)
        found = dependence(run, batch, logits, losses, masked.tensors.values())
    if are_probabilities(logits):
        warn(
            "the model's outputs look like probabilities (a softmax inside the model?), whose margins and divergences "
            "are not those of its logits: pass predict= to take the logits"
        )
    if found:
        warn(f"{found}. Examples are taken out of their batches, and meet others in each step")
