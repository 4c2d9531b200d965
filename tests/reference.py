"""The slow, obvious reference: float64, evaluation mode, one example at a time, plain loops.

Nothing here knows the library. `axes` is `{parameter name: (axis, groups)}` everywhere, `groups` being that of a
grouped transposed convolution and 1 otherwise (`Case.axes` of the zoo).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

IGNORED = -100

Axes = Mapping[str, tuple[int, int]]
Norms = dict[str, Tensor]  # name -> (count,)
PerExample = Callable[[Tensor, Tensor], Tensor]  # logits, targets of n examples -> (n,)


# --- the model and its examples -------------------------------------------------------------------------------------


def plain_copy(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An independent copy in evaluation mode whose parametrized tensors are plain parameters with the same values.

    The class that torch makes for a parametrized module is shared by its copies, so `remove_parametrizations` on a
    copy would break the original. The copy goes back to the class from before instead.
    """
    copied = copy.deepcopy(model).to(dtype).eval()
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    return copied.requires_grad_(True)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of a plain copy by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


class Example(NamedTuple):
    """One example as a batch of one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    group: Hashable


def unpack(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]:
    """Positional arguments, keyword arguments, targets and groups of one batch."""
    if isinstance(batch, Mapping):
        rest = dict(batch)
        targets, groups = rest.pop("labels"), rest.pop("groups", None)
        return (), rest, targets, groups
    inputs, targets, groups = batch if len(batch) == 3 else (*batch, None)
    if isinstance(inputs, Mapping):
        return (), dict(inputs), targets, groups
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}, targets, groups


def one(value: Any, i: int, n: int) -> Any:
    """Entry i of a tensor that has one entry per example, in float64 where it is real; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    value = value.double() if value.is_floating_point() else value
    return value[i : i + 1] if value.dim() > 0 and value.shape[0] == n else value


def examples(data: Any) -> Iterator[Example]:
    """The examples of a list of batches, or of a mapping from groups to such lists."""
    if isinstance(data, Mapping):
        for group, batches in data.items():
            for example in examples(batches):
                yield example._replace(group=group)
        return
    for batch in data:
        args, kwargs, targets, groups = unpack(batch)
        n = len(targets)
        for i in range(n):
            yield Example(
                tuple(one(value, i, n) for value in args),
                {key: one(value, i, n) for key, value in kwargs.items()},
                one(targets, i, n),
                "all" if groups is None else int(groups[i]),
            )


def logits_of(output: Any) -> Tensor:
    """The tensor itself, `.logits`, `["logits"]`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, Mapping) else output[0]


def forward(model: nn.Module, example: Example) -> Tensor:
    return logits_of(model(*example.args, **example.kwargs))


# --- losses and metrics, one value per example ----------------------------------------------------------------------


def by_position(logits: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(class scores, target) at every position of one example that counts.

    The classes are on axis 0 of one example (axis 1 of a batch), but on the last for (tokens, classes). A target is a
    class index, or probabilities where it has the shape of the logits.
    """
    soft = target.is_floating_point()
    if logits.dim() != 2:
        logits = logits.movedim(0, -1)
        target = target.movedim(0, -1) if soft else target
    scores = logits.reshape(-1, logits.shape[-1])
    wanted = target.reshape(-1, logits.shape[-1]) if soft else target.reshape(-1)
    assert len(scores) == len(wanted)
    return [(s, t) for s, t in zip(scores, wanted, strict=True) if soft or int(t) != IGNORED]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each example that are not -100."""
    losses = []
    for example, target in zip(logits, targets, strict=True):
        terms = []
        for scores, wanted in by_position(example, target):
            logs = scores - scores.logsumexp(0)
            terms.append(-(wanted * logs).sum() if wanted.is_floating_point() else -logs[int(wanted)])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def causal_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Position t predicts the label at t + 1."""
    return cross_entropy(logits[:, :-1], targets[:, 1:])


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of the positions of each example, -100 left out, where the largest score is the target's."""
    values = []
    for example, target in zip(logits, targets, strict=True):
        hits = []
        for scores, wanted in by_position(example, target):
            label = int(wanted.argmax()) if wanted.is_floating_point() else int(wanted)
            hits.append(float(int(scores.argmax()) == label))
        values.append(sum(hits) / len(hits))
    return torch.tensor(values, dtype=torch.float64)


# --- group gradients and scores -------------------------------------------------------------------------------------


def in_order(groups: Iterable[Hashable], data: Any) -> list[Hashable]:
    """A mapping keeps its order; the groups of mixed batches ascend."""
    return list(groups) if isinstance(data, Mapping) else sorted(groups)  # type: ignore[type-var]


def group_gradients(
    model: nn.Module, data: Any, names: Iterable[str], loss: PerExample = cross_entropy
) -> dict[Hashable, dict[str, Tensor]]:
    """The gradient of the mean loss over each group, for every named parameter."""
    plain, names = plain_copy(model), list(names)
    wanted = [tensors(plain)[name] for name in names]
    sums: dict[Hashable, list[Tensor]] = {}
    counts: dict[Hashable, int] = {}
    for example in examples(data):
        with torch.enable_grad():
            value = loss(forward(plain, example), example.target).sum()
            gradients = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        so_far = sums.get(example.group, [torch.zeros_like(tensor) for tensor in wanted])
        sums[example.group] = [a + b for a, b in zip(so_far, gradients, strict=True)]
        counts[example.group] = counts.get(example.group, 0) + 1
    return {
        group: {name: total / counts[group] for name, total in zip(names, sums[group], strict=True)}
        for group in in_order(sums, data)
    }


def group_counts(data: Any) -> dict[Hashable, int]:
    groups = [example.group for example in examples(data)]
    return {group: groups.count(group) for group in in_order(dict.fromkeys(groups), data)}


def rows(tensor: Tensor, axis: int, groups: int = 1) -> list[Tensor]:
    """The neurons of a tensor, as views of it."""
    blocks = tensor.chunk(groups, 0) if groups > 1 else [tensor]
    return [block.select(axis, i) for block in blocks for i in range(block.shape[axis])]


def row_norms(tensor: Tensor, axis: int, groups: int = 1) -> Tensor:
    """(count,) Euclidean norms."""
    return torch.stack([row.double().square().sum().sqrt() for row in rows(tensor.detach(), axis, groups)])


def norms(named: Mapping[str, Tensor], axes: Axes) -> Norms:
    return {name: row_norms(named[name], axis, groups) for name, (axis, groups) in axes.items()}


def group_grad_norms(
    model: nn.Module, data: Any, axes: Axes, loss: PerExample = cross_entropy
) -> dict[Hashable, Norms]:
    """The criterion: the norm of each neuron's slice of the group gradient."""
    gradients = group_gradients(model, data, axes, loss)
    return {group: norms(of_group, axes) for group, of_group in gradients.items()}


def magnitudes(model: nn.Module, axes: Axes) -> Norms:
    return norms(tensors(plain_copy(model)), axes)


def flat(by_layer: Norms) -> list[float]:
    """Numbers 0..M-1 in the order of the layers."""
    return [float(value) for values in by_layer.values() for value in values]


def not_finite(by_layer: Norms) -> dict[str, int]:
    """How many neurons of each layer have no finite norm; layers without one are left out."""
    bad = {name: sum(not math.isfinite(value) for value in values) for name, values in by_layer.items()}
    return {name: count for name, count in bad.items() if count}


# --- choosing -------------------------------------------------------------------------------------------------------


def topk(values: Sequence[float], k: int) -> list[int]:
    """The flat numbers of the k largest, ascending; of equal ones the lower number comes first."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def topk_per_layer(by_layer: Norms, k: int) -> list[int]:
    """The same within every layer, which is taken whole where it has fewer than k."""
    chosen: list[int] = []
    start = 0
    for values in by_layer.values():
        chosen += [start + i for i in topk(values.tolist(), k)]
        start += len(values)
    return chosen


def union(chosen: Iterable[Sequence[int]]) -> list[int]:
    return sorted({number for numbers in chosen for number in numbers})


def percentile_ranks(values: Sequence[float]) -> list[float]:
    """The share of neurons whose value is at most this one's, in (0, 100]; 100 is the largest."""
    return [100 * sum(other <= value for other in values) / len(values) for value in values]


# --- edits: each returns a new tensor -------------------------------------------------------------------------------

Rule = Callable[[int, Tensor], Tensor]


def edited(tensor: Tensor, axis: int, groups: int, indices: Iterable[int], rule: Rule) -> Tensor:
    """A copy in which row i, for each i of `indices`, is `rule(i, row in float64)` rounded to the tensor's dtype."""
    result = tensor.detach().clone()
    old, new = rows(tensor.detach(), axis, groups), rows(result, axis, groups)
    for i in indices:
        new[i].copy_(rule(i, old[i].double()))
    return result


def rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def zeroed(tensor: Tensor, axis: int, groups: int, indices: Iterable[int]) -> Tensor:
    """Exact zeros, whatever was there."""
    return edited(tensor, axis, groups, indices, lambda i, row: torch.zeros_like(row))


def scaled(tensor: Tensor, axis: int, groups: int, indices: Iterable[int], factor: float) -> Tensor:
    return edited(tensor, axis, groups, indices, lambda i, row: factor * row)


def initialised(
    tensor: Tensor,
    axis: int,
    groups: int,
    draws: Mapping[int, Tensor],
    *,
    std: float | None = None,
    relative_std: float | None = None,
) -> Tensor:
    """Row i is its standard normal draw times s; a relative s is a multiple of the RMS of the whole tensor."""
    s = std if std is not None else (relative_std or 0) * rms(tensor)
    return edited(tensor, axis, groups, draws, lambda i, row: s * draws[i].double())


def noised(
    tensor: Tensor,
    axis: int,
    groups: int,
    draws: Mapping[int, Tensor],
    *,
    std: float | None = None,
    relative_std: float | None = None,
) -> Tensor:
    """Row i gets its standard normal draw times s on top; a relative s is a multiple of the RMS of that row."""

    def rule(i: int, row: Tensor) -> Tensor:
        s = std if std is not None else (relative_std or 0) * rms(row)
        return row + s * draws[i].double()

    return edited(tensor, axis, groups, draws, rule)


def rewound(
    tensor: Tensor, axis: int, groups: int, indices: Iterable[int], earlier: Tensor, alpha: float = 1.0
) -> Tensor:
    """Row i moves the share `alpha` of the way to the row of `earlier`, and is exactly that row where alpha is 1."""
    there = [row.double() for row in rows(earlier.detach(), axis, groups)]
    return edited(
        tensor, axis, groups, indices, lambda i, row: there[i] if alpha == 1 else row + alpha * (there[i] - row)
    )


def with_tensors(model: nn.Module, new: Mapping[str, Tensor]) -> nn.Module:
    """A plain float64 copy with these values in the named parameters."""
    plain = plain_copy(model)
    with torch.no_grad():
        for name, value in new.items():
            tensors(plain)[name].copy_(value)
    return plain


# --- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, data: Any) -> list[Tensor]:
    """The logits of every example, in the order of the data."""
    plain = plain_copy(model)
    return [forward(plain, example)[0] for example in examples(data)]


@torch.no_grad()
def outcomes(model: nn.Module, data: Any, metric: PerExample = accuracy) -> dict[Hashable, list[float]]:
    """The metric of every example, by group."""
    plain = plain_copy(model)
    values: dict[Hashable, list[float]] = {}
    for example in examples(data):
        values.setdefault(example.group, []).append(float(metric(forward(plain, example), example.target)))
    return {group: values[group] for group in in_order(values, data)}


def group_means(model: nn.Module, data: Any, metric: PerExample = accuracy) -> dict[Hashable, float]:
    """The mean of the metric over each group: accuracy per group, unless told otherwise."""
    return {group: sum(values) / len(values) for group, values in outcomes(model, data, metric).items()}


# --- paired statistics ----------------------------------------------------------------------------------------------


def discordant(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """Pairs that go from 0 to 1, and from 1 to 0."""
    pairs = list(zip(before, after, strict=True))
    return sum(pair == (0, 1) for pair in pairs), sum(pair == (1, 0) for pair in pairs)


def bonett_price(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of mean(after) - mean(before) for 0/1 pairs, within [-1, 1] (Bonett and Price 2012).

    A Wald interval after one pair is added to each of the two discordant cells.
    """
    gained, lost = discordant(before, after)
    n = len(before) + 2
    p, q = (gained + 1) / n, (lost + 1) / n
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((p + q - (p - q) ** 2) / n)
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Exact two-sided p-value: a fair coin for each discordant pair."""
    gained, lost = discordant(before, after)
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def student_cdf(t: float, df: int) -> float:
    """P(T <= t), by Simpson's rule over the density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps = 20_000
    h = abs(t) / steps
    density = [scale * (1 + (i * h) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = h / 3 * (density[0] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]) + density[-1])
    return 0.5 + math.copysign(area, t)


def student_quantile(level: float, df: int) -> float:
    """The t with P(|T| <= t) = level, by bisection (up to 10^4)."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * student_cdf(middle, df) - 1 < level else (low, middle)
    return (low + high) / 2


def mean_and_error(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The mean difference and its standard error."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n, mean = len(changes), sum(changes) / len(changes)
    return mean, math.sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1) / n)


def paired_t_interval(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    mean, error = mean_and_error(before, after)
    half = student_quantile(level, len(before) - 1) * error
    return mean - half, mean + half


def paired_t_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided; the differences must not all be equal."""
    mean, error = mean_and_error(before, after)
    return 2 * (1 - student_cdf(abs(mean) / error, len(before) - 1))
