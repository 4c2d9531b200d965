"""Many edits in one pass over the data.

Each batch is loaded once. The part of the forward pass that an edit does not touch is computed once and shared between
all edits (see `graph`), equal edits are evaluated once, and the outcome of every example is kept, so that every change
has a paired interval and a p-value: the same examples before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.batches import Batch, Unpack, by_key
from neuronsurgery.copies import Runner, make_runner
from neuronsurgery.distributed import exchange
from neuronsurgery.edits import Edit, compose
from neuronsurgery.errors import checked_function, inline, warn
from neuronsurgery.evaluation import Tally, member_indices, named_directions, named_metrics
from neuronsurgery.forward import decoder_inputs_given, default_predict, extract_logits
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.loaders import expected_batches, iterate_groups, named_loaders
from neuronsurgery.losses import accuracy, example_values, refuse_unshifted_metrics
from neuronsurgery.outcomes import Outcomes, Sweep
from neuronsurgery.plans import Edited, plan
from neuronsurgery.sharing import Shared
from neuronsurgery.spread import is_spread
from neuronsurgery.surgery import refuse_computed, refuse_unreachable
from neuronsurgery.surveys import computed_elsewhere, held_elsewhere, survey
from neuronsurgery.switches import restoring, without_mha_fastpath
from neuronsurgery.types import Group, Loaders, Metric, Predict

BASELINE = compose()
"""The identity: the model as it is."""

ROUNDED = "edits were run as one, and their logits may differ from those of each alone by rounding (exact=False)"


@overload
def sweep(
    model: nn.Module | Shared,
    edits: Mapping[str, Edit],
    loaders: Loaders,
    *,
    metric: Metric = ...,
    larger_is_better: bool | None = ...,
    predict: Predict | None = ...,
    unpack: Unpack | None = ...,
    group_key: str | None = ...,
    exact: bool = ...,
    progress: bool = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> Sweep: ...


@overload
def sweep(
    model: nn.Module | Shared,
    edits: Mapping[str, Edit],
    loaders: Loaders,
    *,
    metric: Mapping[str, Metric],
    larger_is_better: bool | Mapping[str, bool] | None = ...,
    predict: Predict | None = ...,
    unpack: Unpack | None = ...,
    group_key: str | None = ...,
    exact: bool = ...,
    progress: bool = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> dict[str, Sweep]: ...


@restoring
def sweep(
    model: nn.Module | Shared,
    edits: Mapping[str, Edit],
    loaders: Loaders,
    *,
    metric: Metric | Mapping[str, Metric] = accuracy,
    larger_is_better: bool | Mapping[str, bool] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    group_key: str | None = None,
    exact: bool = True,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Sweep | dict[str, Sweep]:
    """Return what each of many edits changes, in one pass over the data.

    The results equal those of `evaluate(apply(edit, model), loaders)` bit for bit per example. The forward pass is
    captured as a graph, trusted for an input shape only where its replay gives the model's own output bit for bit;
    elsewhere one warning says why, and every edit costs a forward pass of its own. Edits of one layer of small batches
    are run as one behind it, where that was seen to be quicker and to give the same bits. Nothing of the model changes.

    Args:
        model: any module, or what `share` made of it, whose capture is used again.
        edits: the edits by a label of the caller's.
        loaders: a mapping group -> iterable of batches, or one iterable of batches that carry a group per example.
        metric: (logits, targets) -> one value per example, shape (n,); or a mapping name -> such functions, all of
            which see the same forward passes.
        larger_is_better: the direction of a metric of your own, see `evaluate`.
        predict: the model's output -> logits; it becomes a part of the graph.
        unpack: what a loader yields -> `Batch`.
        group_key: the entry of batches that are mappings (or of their inputs) that holds the groups.
        exact: False lets edits be run as one where that gives other bits, by rounding; then `reasons` says so.
        progress: whether to write a line of progress to standard error.
        process_group: gather over its ranks, each of which gives its share of the data. None communicates nothing.

    Returns:
        The sweep; for a mapping of metrics, a dict of them by name.

    Raises:
        TypeError: if `edits` is not a mapping of edits, or a batch has an unknown form.
        ValueError: if an edit does not fit the model (names its label, lists every mismatch), a group has no examples,
            or the metric is not one value per example.
        RuntimeError: if another rank failed.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> layout = find_layout(model)
        >>> edits = {"first": zero_out(select(layout, {"weight": 0})), "all": zero_out(select(layout, {"weight": ...}))}
        >>> data = [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))]
        >>> sweep(model, edits, data)
        Sweep of 2 edits over 2 examples; changes by group
          first: 0: +0.0000, 1: +0.0000
          all: 0: +0.0000, 1: -1.0000

    Source:
        Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data", 2012; McNemar, 1947.
    """
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits are a mapping label -> edit, not a {type(edits).__name__}: write {{'name': edit}}")
    wrong = [f"'{label}': {type(edit).__name__}" for label, edit in edits.items() if not isinstance(edit, Edit)]
    if wrong:
        raise TypeError(f"edits are what zero_out, scale and the like return, not {', '.join(wrong[:5])}")
    metrics = named_metrics(metric)
    checked_function(predict, "predict")
    unpack = by_key(unpack, group_key)
    directions = named_directions(metrics, larger_is_better)
    loaders = named_loaders(loaders)
    tallies = {edit: _Tally(metrics) for edit in dict.fromkeys((BASELINE, *edits.values()))}
    seen = _Seen([], [], ())
    error = None
    try:
        shared, predict = _shared(model, predict)
        runner, edited = _planned(model.model if isinstance(model, Shared) else model, edits, process_group)
        predict = predict or default_predict
        forward = (
            CheckedForward(runner, predict, exact=exact) if shared is None else shared.rebound(runner, exact=exact)
        )
        with torch.no_grad(), without_mha_fastpath():
            seen = _run(runner, edited, tallies, loaders, unpack, progress, forward)
    except Exception as raised:
        error = raised
    order = list(loaders) if isinstance(loaders, Mapping) else None
    shares = exchange(process_group, error, (seen, [tally.outcomes for tally in tallies.values()]))
    results = {
        name: _gathered(name, directions[name], edits, tallies, shares, order, process_group) for name in metrics
    }
    return results if isinstance(metric, Mapping) else results[""]


def _shared(model: nn.Module | Shared, predict: Predict | None) -> tuple[CheckedForward | None, Predict | None]:
    """Return what was captured of a model before, if it was, and from where in its output the logits are.

    Raises:
        TypeError: if it is neither a module nor a share of one.
        ValueError: if logits are to be taken otherwise than they were captured.
    """
    if not isinstance(model, Shared):
        return None, predict
    if predict is not None and predict is not model.predict:
        raise ValueError("predict= is a part of what share() captured: give it to share(), not to sweep()")
    return model.forward, model.predict


class Part(NamedTuple):
    """Edits that are swept together, over data of their own.

    Attributes:
        edits: by label.
        loaders: as of `sweep`.
        narrow: (groups of a batch, metric without an edit, by label metric with each) -> the labels to go on with after
            it; what goes no further is not in the sweep. None for all.
    """

    edits: Mapping[str, Edit]
    loaders: Loaders
    narrow: Callable[[Sequence[Group], Tensor, Mapping[str, Tensor]], Container[str]] | None = None


class _Tally:
    """What was measured of one edit so far, by metric: sums by group, and every example's value."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self.means = {name: Tally() for name in metrics}
        self.outcomes: dict[str, list[Outcomes]] = {name: [] for name in metrics}

    def add(self, members: Mapping[Group, Tensor], logits: Tensor, targets: Tensor) -> None:
        for name, metric in self.metrics.items():
            values = example_values(metric, logits, targets)
            self.means[name].add(members, values)
            self.outcomes[name].append(Outcomes.of(values))


class _Seen(NamedTuple):
    """Of every example that went by its group and its place, and why a forward pass was not shared."""

    members: list[Group]
    indices: list[int]
    reasons: tuple[str, ...]


def _planned(
    model: nn.Module, edits: Mapping[str, Edit], process_group: dist.ProcessGroup | None
) -> tuple[Runner, dict[Edit, Mapping[str, Tensor]]]:
    """Return the model to run, and the edited tensors of each distinct edit."""
    surveyed = survey(model)
    runner = make_runner(surveyed, spread=True, process_group=process_group)
    held, computed = held_elsewhere(surveyed), computed_elsewhere(surveyed)
    edited: dict[Edit, Mapping[str, Tensor]] = {BASELINE: {}}
    for label, edit in edits.items():
        if edit not in edited:
            try:
                planned = plan(edit, surveyed)
                refuse_unreachable(planned, held)
                refuse_computed(planned, computed)
            except (ValueError, TypeError) as error:
                raise type(error)(f"edit '{label}': {error}") from error
            edited[edit] = Edited(planned, runner.parameters)
    return runner, edited


def _run(
    runner: Runner,
    edited: Mapping[Edit, Mapping[str, Tensor]],
    tallies: Mapping[Edit, _Tally],
    loaders: Loaders,
    unpack: Unpack | None,
    progress: bool,
    forward: CheckedForward,
    narrow: Callable[[Sequence[Group]], Container[Edit]] | None = None,
) -> _Seen:
    """Run the edited models over the data, and add what is measured to the tallies.

    Once a batch is in the tallies, `narrow` says of its groups which edits go on, the unedited model beside them.
    """
    # A capture takes as long as many batches of a small network, and no edits share nothing.
    shares = any(edited.values()) and not runner.is_spread
    if runner.is_spread and any(edited.values()):
        forward.share_nothing("its weights are spread over processes")
    expected = expected_batches(loaders)
    members: list[Group] = []
    indices: list[int] = []
    label = "sweep" if progress else None
    unheard = {edit for edit, tensors in edited.items() if tensors}
    batch = None
    batches = iterate_groups(loaders, device=runner.device, unpack=unpack, progress=label, edits=len(edited))
    for number, (groups, batch) in enumerate(batches):
        indices.extend(range(len(members), len(members) + len(batch)) if batch.indices is None else batch.indices)
        members.extend(groups)
        places = member_indices(groups)
        sums: dict[Edit, int] = {}
        with decoder_inputs_given(runner.model, batch):
            arguments = batch.args, batch.kwargs, edited
            left = max(1, expected - number)
            for edit, logits in forward.run(*arguments, left) if shares else forward.one_by_one(*arguments):
                if edit in unheard or edit is BASELINE:
                    sums[edit] = _sum_of_bits(logits)
                logits = extract_logits(logits, None, len(batch))
                refuse_unshifted_metrics(tallies[edit].metrics.values(), logits, batch)
                tallies[edit].add(places, logits, batch.targets)
        unheard = {edit for edit in unheard if sums[edit] == sums.get(BASELINE)}
        if narrow is not None:
            wanted = narrow(groups)
            edited = {edit: tensors for edit, tensors in edited.items() if edit is BASELINE or edit in wanted}
            unheard &= set(edited)
    if unheard and batch is not None:
        _warn_of_unread({edit: edited[edit] for edit in unheard}, runner, forward, batch)
    return _Seen(members, indices, tuple(sorted({*forward.reasons, *([ROUNDED] if forward.is_rounded else [])})))


def _sum_of_bits(tensor: Tensor) -> int:
    """Return a number that differs, but by chance, where any bit of a tensor does."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(integers[tensor.dtype.itemsize]).sum(dtype=torch.int64))


def _warn_of_unread(
    edited: Mapping[Edit, Mapping[str, Tensor]], runner: Runner, forward: CheckedForward, batch: Batch
) -> None:
    """Warn of parameters that the forward does not read, though edits that change no output have changed them."""
    changed = {
        name: None
        for tensors in edited.values()
        for name in tensors
        if not is_spread(runner.parameters[name]) and not torch.equal(tensors[name], runner.parameters[name])
    }
    unread = [name for name in changed if not forward.reads(batch.args, batch.kwargs, name)]
    if unread:
        warn(
            f"edits of {inline(unread)} changed no output: either nothing reads these parameters here, or what was "
            f"computed from them is kept where an edit does not reach (a global dictionary, an object): empty it, and "
            f"have the forward compute it anew"
        )


Share: TypeAlias = "tuple[_Seen, list[dict[str, list[Outcomes]]]]"
"""What one rank has seen, and the outcomes of each edit by metric."""


def _gathered(
    metric: str,
    larger_is_better: bool | None,
    edits: Mapping[str, Edit],
    tallies: Mapping[Edit, _Tally],
    shares: Sequence[Share],
    order: list[Group] | None,
    process_group: dist.ProcessGroup | None,
) -> Sweep:
    """Return the sweep of one metric over all ranks; `tallies` are in an order that these share."""
    outcomes = {
        edit: Outcomes.joined(part for _, own in shares for part in own[place][metric])
        for place, edit in enumerate(tallies)
    }
    metrics = {
        edit: tally.means[metric].result(order, larger_is_better, None, process_group)
        for edit, tally in tallies.items()
    }
    seen = [share for share, _ in shares]
    counts = torch.tensor([len(share.members) for share in seen], device="cpu")
    return Sweep(
        metrics[BASELINE],
        {label: metrics[edit] for label, edit in edits.items()},
        tuple(group for share in seen for group in share.members),
        torch.tensor([index for share in seen for index in share.indices], dtype=torch.int64, device="cpu"),
        torch.arange(len(seen), device="cpu").repeat_interleave(counts),
        tuple(sorted({reason for share in seen for reason in share.reasons})),
        _name(tallies[BASELINE].metrics[metric]),
        {label: outcomes[edit] for label, edit in edits.items()},
        outcomes[BASELINE],
    )


def _name(metric: Metric) -> str:
    """Return what a metric is called, that of its function where arguments were bound to it."""
    function = metric.func if isinstance(metric, functools.partial) else metric
    return str(getattr(function, "__name__", type(function).__name__))


def sweep_in_parts(
    model: nn.Module,
    parts: Iterable[Mapping[str, Edit] | Part],
    loaders: Loaders = (),
    *,
    metric: Metric = accuracy,
    larger_is_better: bool | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Iterator[Sweep]:
    """Yield the sweep of each of several mappings of edits in turn, as by `sweep`, with one capture of the model.

    For what is to be written down on the way, and for edits that depend on what came of others. Each part is one pass
    over the data; the model must stay as it is until the last, and is run once for parts without data of their own.

    Args:
        model: any module.
        parts: mappings of edits by label, or each a `Part` with data of its own; they may be made one by one, when the
            sweep of the last has been dealt with.
        loaders: see `sweep`; to be passed over once for each part that is a mapping, in the same order.
        metric: (logits, targets) -> one value per example, shape (n,).
        larger_is_better: the direction of a metric of your own, see `evaluate`.
        predict: the model's output -> logits; it becomes a part of the graph.
        unpack: what a loader yields -> `Batch`.
        process_group: gather over its ranks, which are to make the same parts; none of these may be narrowed.

    Raises:
        ValueError: if an edit does not fit the model, a group has no examples, or the metric is not one value per
            example.
        RuntimeError: if another rank failed.

    Example:
        >>> from neuronsurgery import find_layout, select, zero_out
        >>> model = nn.Linear(2, 2)
        >>> layout = find_layout(model)
        >>> parts = [{f"neuron {i}": zero_out(select(layout, {"weight": i}))} for i in range(2)]
        >>> data = [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))]
        >>> [swept.labels for swept in sweep_in_parts(model, parts, data)]
        [('neuron 0',), ('neuron 1',)]
    """
    metrics, loaders = named_metrics(metric), named_loaders(loaders)
    direction = named_directions(metrics, larger_is_better)[""]
    forward: CheckedForward | None = None
    base = _Tally(metrics)
    for each in parts:
        part = each if isinstance(each, Part) else Part(each, loaders)
        order = list(part.loaders) if isinstance(part.loaders, Mapping) else None
        tallies = {BASELINE: _Tally(metrics) if part is each else base}
        tallies |= {edit: _Tally(metrics) for edit in part.edits.values() if edit != BASELINE}
        forward, shares = _part(model, part, tallies, predict, unpack, process_group, forward)
        edits = {label: edit for label, edit in part.edits.items() if edit in tallies}
        yield _gathered("", direction, edits, tallies, shares, order, process_group)


@restoring
def _part(
    model: nn.Module,
    part: Part,
    tallies: dict[Edit, _Tally],
    predict: Predict | None,
    unpack: Unpack | None,
    process_group: dist.ProcessGroup | None,
    forward: CheckedForward | None,
) -> tuple[CheckedForward | None, list[Share]]:
    """Return what was captured and what each rank has seen; the tallies then hold the edits that went to the end."""
    seen, error = _Seen([], [], ()), None

    def narrow(groups: Sequence[Group]) -> set[Edit]:
        newest = {edit: tally.outcomes[""][-1].values() for edit, tally in tallies.items()}
        values = {label: newest[edit] for label, edit in part.edits.items() if edit in newest}
        wanted = part.narrow(groups, newest[BASELINE], values) if part.narrow else values
        left = {part.edits[label] for label in values if label in wanted}
        for edit in set(tallies) - left - {BASELINE}:
            del tallies[edit]
        return left

    try:
        runner, edited = _planned(model, part.edits, process_group)
        if forward is None:
            forward = CheckedForward(runner, predict or default_predict)
        else:
            forward.start_again()
        if tallies[BASELINE].outcomes[""]:
            del edited[BASELINE]
        with torch.no_grad(), without_mha_fastpath():
            seen = _run(runner, edited, tallies, part.loaders, unpack, False, forward, narrow if part.narrow else None)
    except Exception as raised:
        error = raised
    return forward, exchange(process_group, error, (seen, [tally.outcomes for tally in tallies.values()]))
