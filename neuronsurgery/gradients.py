"""Group gradients and their norms: how much the mean loss over a group depends on each neuron.

The model runs through `torch.func.functional_call` on a copy in evaluation mode, with the scored parameters as the only
leaves, and `torch.autograd.grad` differentiates: the same numbers as `torch.func.grad`, which holds more at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from neuronsurgery.batches import Batch, Unpack, by_key, group_members, move, ordered_groups
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.differentiation import (
    Within,
    differentiable,
    differentiable_rnns,
    differentiated,
    warn_of_unreached,
)
from neuronsurgery.digests import digest
from neuronsurgery.discovery import given_layout
from neuronsurgery.distributed import agreed, exchange
from neuronsurgery.errors import EXHAUSTED, inline, warn
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.independence import dependence
from neuronsurgery.layouts import Layout
from neuronsurgery.loaders import iterate, iterate_groups, named_loaders, regrouped_to_the_last
from neuronsurgery.losses import are_probabilities, example_losses, refuse_bad_losses, refuse_unshifted_loss
from neuronsurgery.scores import Scores, by_layout, norms, refuse_non_finite
from neuronsurgery.segments import Segments
from neuronsurgery.spread import is_spread, local
from neuronsurgery.sums import GroupSum, added_up, warn_of_memory
from neuronsurgery.surveys import computed_elsewhere, held_elsewhere, survey
from neuronsurgery.switches import KERNELS, restoring
from neuronsurgery.types import Group, Loader, Loaders, Loss, Predict, Where

Members: TypeAlias = Mapping[Group, Sequence[int] | None]
"""The positions of each group's examples in a batch; None for all."""


# What is differentiated


@dataclass(frozen=True, eq=False)
class _Objective:
    """The loss of a model as a function of its scored parameters.

    Attributes:
        runner: the model, as a copy to run.
        layout: the scored layers.
        leaves: the scored tensors by the layers' names, sharing the model's memory; only these get a gradient.
        parameters: all of the model's tensors, the leaves among them, by every place in `Within` that holds them.
        loss: (logits, targets) -> one loss per example; None is the default.
        predict: the model's output -> logits; None is the default.
        held: the scored parameters that plain attributes hold, too, and where.
        served: of the leaves that FSDP shards, by their place, the number.
    """

    runner: Runner
    layout: Layout
    leaves: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    loss: Loss | None
    predict: Predict | None
    held: Mapping[str, str]
    served: Mapping[int, int]

    def new_sum(self, group: Group) -> GroupSum:
        """Return an empty sum of gradients."""
        return GroupSum(self.leaves.values(), group, self.served, self.runner.service)


@dataclass
class _Seen:
    """What was seen while the model ran: the layers that a gradient came to, what its outputs look like, a digest."""

    reached: set[str] = field(default_factory=set)
    outputs: bool = False
    probabilities: bool = False
    regrouped: bool = False
    data: str = ""


def _objective(
    model: nn.Module,
    loss: Loss | None,
    layout: Layout | None,
    where: Where | None,
    extra: str | Sequence[str] | None,
    predict: Predict | None,
    process_group: dist.ProcessGroup | None,
) -> _Objective:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "gradients cannot be computed inside torch.inference_mode(): leave it, or use torch.no_grad(), in "
            "which this function works"
        )
    surveyed = survey(model)
    runner = make_runner(surveyed, checkpoints=True, spread=True, process_group=process_group)
    layout = given_layout(surveyed, runner.parameters, layout, where, extra)
    scored = by_layout(runner.parameters, layout, surveyed)
    # Of what is spread each process looks at its own part: its neurons are not here, but what is wrong with them is.
    parts = {name: None if is_spread(tensor) else tensor for name, tensor in scored.items()}
    refuse_non_finite(norms(parts, layout), layout, "the model's weights are")
    wrong = [name for name, t in scored.items() if is_spread(t) and not bool(torch.isfinite(local(t)).all())]
    if wrong:
        raise ValueError(f"the model's weights are NaN or infinite in {inline(wrong)}")
    leaves = {name: differentiable(tensor).requires_grad_() for name, tensor in scored.items()}
    first_names = surveyed.first_names(leaves)
    tensors = {name: differentiable(parameter) for name, parameter in runner.parameters.items()}
    tensors |= {first_names[name]: leaf for name, leaf in leaves.items()}
    parameters = {f"model.{place}": tensor for name, tensor in tensors.items() for place in runner.places[name]}
    elsewhere = computed_elsewhere(surveyed) | held_elsewhere(surveyed)
    held = {name: at for name, at in elsewhere.items() if name in first_names.values()}
    places = enumerate(first_names[name] for name in leaves)
    served = {place: runner.gathered[name].number for place, name in places if name in runner.gathered}
    return _Objective(runner, layout, leaves, parameters, loss, predict, held, served)


# Gradients of a batch


def _add(sums: Mapping[Group, GroupSum], objective: _Objective, batch: Batch, groups: Members, seen: _Seen) -> None:
    """Add to the sums of each group the gradients of the summed loss over its examples in a batch.

    Args:
        sums: of each group.
        objective: what is differentiated.
        batch: run once, as it is.
        groups: whose examples they are.
        seen: what was seen so far; updated.
    """
    batch = move(batch, objective.runner.device)
    if objective.runner.service is not None:
        seen.data = digest(seen.data, *map(repr, groups), batch.targets)
    with _graph(objective):
        found = _gradients(objective, batch, groups, seen)
    for group, (count, gradients) in found.items():
        sums[group].add(count, gradients)
        seen.reached.update(n for n, gradient in zip(objective.leaves, gradients, strict=True) if gradient is not None)
    if objective.runner.service is not None:
        reached = objective.runner.service.reached
        seen.reached.update(name for at, name in enumerate(objective.leaves) if objective.served.get(at) in reached)


@contextlib.contextmanager
def _graph(objective: _Objective) -> Iterator[None]:
    """Surround a forward pass and its backward passes."""
    with torch.enable_grad(), differentiable_rnns(objective.runner), KERNELS.steady():
        try:
            yield
        finally:
            objective.runner.attributes.restore()  # the graph of what was kept is gone


def _gradients(
    objective: _Objective, batch: Batch, groups: Members, seen: _Seen
) -> dict[Group, tuple[int, Sequence[Tensor | None]]]:
    """Return for each group its number of examples and the gradients of their mean loss."""
    logits, losses = _looked_at(objective, batch, groups, seen)
    leaves = list(objective.leaves.values())
    found: dict[Group, tuple[int, Sequence[Tensor | None]]] = {}
    for left, (group, members) in zip(range(len(groups) - 1, -1, -1), groups.items(), strict=True):
        own = losses if members is None else losses[list(members)]
        with added_up(objective.runner.service, group, len(own), logits, leaves):
            found[group] = len(own), differentiated(own, logits, leaves, retain=left > 0)
    return found


def _looked_at(
    objective: _Objective,
    batch: Batch,
    groups: Iterable[Group],
    seen: _Seen,
    within: contextlib.AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits and losses of a batch, of which what is wrong with them is known.

    Raises:
        ValueError: if a loss is bad, or examples that were regrouped depend on each other.
    """
    with within or contextlib.nullcontext():
        logits, losses = _forward(objective, batch)
    refuse_bad_losses(losses, f"group {', '.join(map(repr, groups))}")
    if not seen.outputs:
        seen.outputs, seen.probabilities = True, objective.loss is None and are_probabilities(logits.detach())
    if seen.regrouped and len(batch) > 1:
        run, parameters = functools.partial(_forward, objective), objective.runner.parameters.values()
        found_out = dependence(run, batch, logits.detach(), losses.detach(), parameters)
        if found_out:
            raise ValueError(f"{found_out}. Mixed batches are taken apart: pass regroup=False")
        seen.regrouped = False  # once is enough
    return logits, losses


def _forward(objective: _Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = extract_logits(isolated_forward(objective.runner, batch), objective.predict, len(batch))
    refuse_unshifted_loss(objective.loss, logits, batch)
    return logits, example_losses(objective.loss, logits, batch.targets)


# Gradients of groups


@restoring
def group_grad_norms(
    model: nn.Module,
    loaders: Loaders,
    *,
    loss: Loss | None = None,
    layout: Layout | None = None,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    regroup: bool = True,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Scores:
    """Return each group's gradient norm of every neuron, ||v(i, j)||_2, v(i, j) = d/dz_i of the mean loss over group j.

    Each example costs one forward and one backward pass, whatever the number of groups: mixed batches are regrouped on
    the fly, examples being joined only with others of the same shapes. Small groups share batches where each scored
    weight is read once, by a linear layer or a convolution; one of them runs twice to see that. The model runs in
    evaluation mode on a copy that shares its weights; nothing of it changes, and only the scored parameters get a
    gradient, frozen ones too. It works inside `no_grad` and under the caller's autocast (a bfloat16 backward pass is
    itself good to about 2 %). Sums are in float32 or wider.

    Memory: one copy of the scored gradients for a mapping of loaders; for a mixed stream one per group that fills a
    batch (a warning above 4 GB names the way out: a mapping of loaders), and up to one batch of waiting examples per
    group.

    Args:
        model: any module.
        loaders: a mapping group -> iterable of batches (whose own groups are then ignored), or one iterable of mixed
            batches that carry a group per example. Batches without groups are one group "all".
        loss: (logits, targets) -> one loss per example; default `cross_entropy`.
        layout: the layers to score, see `find_layout`; `where` and `extra` are the short way to one.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`, for forms that `Batch` does not name.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        regroup: whether mixed batches may be taken apart. False is for a loss or a module that looks at the whole batch
            (batch norm without running statistics, in-batch negatives): each batch is one forward pass as it comes, and
            one backward pass for each group in it. Such a dependence is looked for in the first batch.
        progress: whether to write a line of progress to standard error.
        process_group: reduce over its ranks, each of which gives its share of the data; every rank gets the same
            scores. None communicates nothing, but for a fully sharded model, whose ranks then give the same data.

    Returns:
        Scores of shape (G, M). Groups in the order of the mapping, or ascending.

    Raises:
        RuntimeError: inside `inference_mode`, or if another rank failed.
        TypeError: if a batch has an unknown form, or the name of a group is no integer or string.
        KeyError: if a glob matches nothing.
        ValueError: if a group has no examples, the layout does not fit the model, a label is not one of the classes,
            the loss is not one number per example, examples depend on each other in mixed batches, or a loss, weight or
            gradient is NaN or infinite; names the group and the layers.

    Warns:
        UserWarning: if no gradient reached some layers, if the outputs look like probabilities, or if much memory is
            needed; says what to do.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> images, labels, groups = torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> group_grad_norms(model, [(images, labels, groups)]).values
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Source:
        You et al., "The Silent Majority", 2025.
    """
    loaders, unpack = named_loaders(loaders), by_key(unpack, group_key)
    objective = agreed(
        process_group,
        lambda: _objective(model, loss, layout, where, extra, predict, process_group),
        lambda made: made.layout.digest,
        "the processes score different layers: give each the same model, where= and extra=",
    )
    seen, service, own = _Seen(), objective.runner.service, process_group
    if service is not None:
        process_group = service.process_group if own is None else service.checked(own)
    streams: Any = _mapped_sums if isinstance(loaders, Mapping) else _mixed_sums if regroup else _whole_sums
    rows: dict[Group, Tensor] = {}
    counts: dict[Group, int] = {}

    def collect() -> None:
        for group, row, count in streams(objective, loaders, seen, unpack, progress, process_group):
            rows[group], counts[group] = row, count
            refuse_non_finite(rows[group], objective.layout, f"the gradients of group {group!r} are")

    # Around all batches: in a small network, to put the tensors in place for each would take a tenth of the time.
    functional_call(Within(objective.runner.model), dict(objective.parameters), (collect,), tie_weights=False)
    shares = exchange(process_group, None, (seen.reached, seen.data))
    reached = set().union(*(share[0] for share in shares))
    if own is None and process_group is not None:  # the same data everywhere, each of them counted by all
        if any(share[1] != seen.data for share in shares):
            raise ValueError(
                f"the model is sharded over {len(shares)} processes, and they were given different data: pass "
                f"process_group=, over which each gives its share, or the same data everywhere"
            )
        counts = {group: count // len(shares) for group, count in counts.items()}
    if seen.probabilities:
        warn(
            "the model's outputs look like probabilities (a softmax inside the model?); the cross entropy of them "
            "flattens the gradient and changes the ranking of neurons: pass predict= to take the logits, or loss="
        )
    warn_of_unreached(objective.leaves, reached, objective.held)
    return Scores(
        torch.stack(list(rows.values())), tuple(rows), tuple(counts.values()), objective.layout, "gradient norm"
    )


def _mapped_sums(
    objective: _Objective,
    loaders: Mapping[Any, Loader],
    seen: _Seen,
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> Iterator[tuple[Group, Tensor, int]]:
    """Yield the norms of one group at a time, so that one copy of the gradients is enough."""
    names = list(dict.fromkeys(name for share in exchange(process_group, None, list(loaders)) for name in share))
    if not names:
        raise ValueError("the mapping of loaders is empty: give at least one group")
    for name in names:
        total, error = objective.new_sum(name), None
        label = f"gradients of {name}" if progress else None
        try:
            for batch in iterate(loaders.get(name, ()), unpack=unpack, progress=label, grouped=False):
                _add({name: total}, objective, batch, {name: None}, seen)
        except Exception as raised:
            error = raised
        yield _row(objective, name, total, process_group, error)


def _mixed_sums(
    objective: _Objective,
    loader: Loader,
    seen: _Seen,
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> Iterator[tuple[Group, Tensor, int]]:
    """Yield the norms of the groups of one mixed stream, after it has run through; small groups share batches."""
    seen.regrouped = True
    may_share = process_group is None and _may_share(objective)
    batches = iterate(loader, unpack=unpack, progress="gradients" if progress else None)

    def forward(batch: Batch, within: contextlib.AbstractContextManager[Any]) -> tuple[Tensor, Tensor]:
        groups, batch = ordered_groups(batch.groups or ()), move(batch, objective.runner.device)
        return _looked_at(objective, batch, groups, seen, within)

    graph = functools.partial(_graph, objective)
    segments = Segments(objective.leaves, objective.layout, forward, graph)
    alone = segments.left(regrouped_to_the_last(batches, joint=may_share))
    yield from _sums_of(
        objective, (({group: None}, batch, last) for group, batch, last in alone), seen, process_group, segments.done
    )
    seen.reached |= segments.reached


def _may_share(objective: _Objective) -> bool:
    """Return whether groups may share batches."""
    device = objective.runner.device
    cast = device is not None and torch.is_autocast_enabled(device.type)
    return not cast and objective.runner.service is None and not any(map(is_spread, objective.leaves.values()))


def _whole_sums(
    objective: _Objective,
    loader: Loader,
    seen: _Seen,
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> Iterator[tuple[Group, Tensor, int]]:
    """Yield the norms of the groups of one mixed stream, after it has run through, each batch as it came."""
    groups = iterate_groups(loader, unpack=unpack, progress="gradients" if progress else None)
    return _sums_of(
        objective, ((group_members(names), batch, False) for names, batch in groups), seen, process_group, {}
    )


def _sums_of(
    objective: _Objective,
    batches: Iterable[tuple[Members, Batch, bool]],
    seen: _Seen,
    process_group: dist.ProcessGroup | None,
    done: dict[Group, tuple[Group, Tensor, int]],
) -> Iterator[tuple[Group, Tensor, int]]:
    """Yield the norms of the groups of a stream, after it has run through; some may be done by then.

    A group is done with at its last batch, where that is known: most groups are small, and the sums of all would be
    held at once. Several processes have to sum up first, in one order.
    """
    sums: dict[Group, GroupSum] = {}
    error = None
    try:
        for groups, batch, last in batches:
            for group in groups:
                if group not in sums:
                    sums[group] = objective.new_sum(group)
                    warn_of_memory(objective.leaves.values(), len(sums))
            _add(sums, objective, batch, groups, seen)
            if last and process_group is None:
                done |= {group: _row(objective, group, sums.pop(group), None, None) for group in groups}
    except Exception as raised:
        error = raised
    present = ordered_groups(group for share in exchange(process_group, error, [*sums, *done]) for group in share)
    if not present:
        raise ValueError(f"the loader yielded no batch. {EXHAUSTED}")
    for group in present:
        if group in done:
            yield done.pop(group)
            continue
        total = sums.pop(group) if group in sums else objective.new_sum(group)
        yield _row(objective, group, total, process_group, None)


def _row(
    objective: _Objective,
    group: Group,
    total: GroupSum,
    process_group: dist.ProcessGroup | None,
    error: Exception | None,
) -> tuple[Group, Tensor, int]:
    """Return a group, its norms and the number of its examples, over all ranks."""
    count = total.over(process_group, error)
    if count == 0:
        raise ValueError(f"group {group!r} has no examples: its loader yielded no batch. {EXHAUSTED}")
    return group, total.mean_norms(objective.layout, count), count
