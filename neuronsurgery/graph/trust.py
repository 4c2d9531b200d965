"""Trust: a captured graph is replayed only where it was checked against the model itself, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from neuronsurgery.batches import map_tensors
from neuronsurgery.copies import Runner
from neuronsurgery.errors import CaptureError, inline, warn
from neuronsurgery.forward import default_predict, random_state_kept
from neuronsurgery.gathering import edited_in
from neuronsurgery.graph.export import capture, evaluating
from neuronsurgery.graph.fills import Fills
from neuronsurgery.graph.inputs import Dims, Inputs, batch_dims, varying
from neuronsurgery.graph.replay import Graph, as_parameter, bound
from neuronsurgery.graph.schedules import Label, Schedule, run, schedule
from neuronsurgery.graph.stacks import Stacks
from neuronsurgery.plans import Edited, TensorPlan
from neuronsurgery.precision import same_bits
from neuronsurgery.switches import KERNELS
from neuronsurgery.types import Predict

NOT_WORTH = "there was less to run than a capture takes"

PATIENCE = 3
"""After so many signatures without a graph to trust, no more captures are tried: each takes seconds."""


WORTH = 2.0
"""Seconds: a capture takes about as long, so as much time is spent on edits one by one before there is one."""


class CheckedForward:
    """A model's forward for many edits at once, by replay where that was checked and by one forward each elsewhere.

    Promised are the logits of the model's own forward with the edited parameters in place, bit for bit, for a model
    whose output is a function of its inputs, parameters and buffers. A graph that took another path through the Python
    of the model than the model itself does is found by the check, if the unedited outputs differ. The paths that can
    part them are: sizes, which the signature holds; and values that the model reads from its tensors in Python. Export
    refuses those, unless the model does so only outside an export (Hugging Face skips a mask that is all ones): reads
    are seen in the first check, and then every batch is checked. What the check cannot find is a path that depends on
    the values of an *edited* run and is hidden from the export, or on something that is no tensor (a clock, a global).

    Args:
        runner: the model, as a copy not used by anyone else meanwhile.
        predict: the model's output -> logits.
        exact: whether edits are run as one only where that gives the same bits; if not, it may differ by rounding.

    Attributes:
        fallbacks: for each signature that no graph could be trusted for, the reason.
        reasons: why any forward pass was not shared; what could not be has been warned of, once for each reason.

    Example:
        >>> from neuronsurgery.copies import make_runner
        >>> from neuronsurgery.surveys import survey
        >>> model = torch.nn.Linear(2, 2)
        >>> forward = CheckedForward(make_runner(survey(model)))
        >>> edits = {"base": {}, "cut": {"weight": torch.zeros(2, 2)}}
        >>> logits = dict(forward.run((torch.ones(3, 2),), {}, edits))
        >>> torch.equal(logits["cut"], model.bias.expand(3, 2))
        True
    """

    def __init__(self, runner: Runner, predict: Predict = default_predict, *, exact: bool = True) -> None:
        self.fallbacks: dict[Hashable, str] = {}
        self.reasons: set[str] = set()
        self._runner = runner
        self._predict = predict
        self._exact = exact
        # How long edits were run one by one, before a capture was worth its time.
        self._spent = 0.0
        self._quickest: float | None = None
        self._places = _places(runner)
        # By signature of the inputs, the graph that was checked for it; by kind of inputs, the newest graph and the
        # shapes that were met.
        self._checked: dict[Hashable, Graph] = {}
        self._newest: dict[Hashable, Graph] = {}
        self._shapes: dict[Hashable, list[tuple[torch.Size, ...]]] = {}
        # By graph, what its newest schedule was made for, and that; by signature, the layers that need not be run, and
        # the edits that may be run as one.
        self._schedules: dict[Graph, tuple[Hashable, Schedule[Any]]] = {}
        self._fills: dict[Hashable, Fills] = {}
        self._stacks: dict[Hashable, Stacks] = {}
        # Whether the model reads values of its tensors in Python, and by label what its buffers have become.
        self._reads_values = False
        self._changed_buffers: dict[Hashable, dict[str, Tensor]] = {}

    def run(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        edits: Mapping[Label, Mapping[str, Tensor]],
        batches: int = 1,
    ) -> Iterator[tuple[Label, Tensor]]:
        """Return an iterator over (label, logits) of every edit, in no particular order.

        Where no graph can be trusted a warning says why, once for each reason.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            edits: for each label the edited parameters by their first names; `{}` is the unedited model. Values are
                looked up just before use.
            batches: how many like this one are left to run, itself among them, as far as anybody knows.

        Raises:
            KeyError: if a name is not that of a parameter.
        """
        unknown = sorted({name for edited in edits.values() for name in edited} - set(self._runner.parameters))
        if unknown:
            raise KeyError(f"not parameters of the model: {', '.join(unknown)}")
        if self._is_worth_it():
            return self._shared(args, kwargs, edits, batches)
        return self._until_worth_it(args, kwargs, edits, batches)

    def _is_worth_it(self) -> bool:
        """Return whether there is a graph, or was a try at one, or enough time was spent without."""
        return bool(self._newest or self.fallbacks) or self._spent >= WORTH

    def _shared(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]], batches: int
    ) -> Iterator[tuple[Label, Tensor]]:
        inputs = Inputs.of(args, kwargs)
        graph = self._graph(inputs)
        if graph is None:
            return self.one_by_one(args, kwargs, edits)
        wanted = tuple((label, _identity(edited)) for label, edited in edits.items())
        if graph not in self._schedules or self._schedules[graph][0] != wanted:
            self._schedules[graph] = wanted, schedule(graph, edits)
        fills = self._fills.setdefault(inputs.signature, Fills())
        stacks = self._stacks.setdefault(inputs.signature, Stacks(exact=self._exact))
        stacks.batches = batches
        return self._schedules[graph][1].run(args, kwargs, edits, fills, stacks)

    def _until_worth_it(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]], batches: int
    ) -> Iterator[tuple[Label, Tensor]]:
        """Yield what `one_by_one` gives for as long as a capture takes, and then the rest by a graph.

        So no sweep takes more than twice as long as the better of the two ways, whatever the model and the data. Where
        the edits of the batches that are left would take twice as long, it does not wait.
        """
        left, later = list(edits), (batches - 1) * len(edits)
        while left and not self._is_worth_it():
            started, label = time.perf_counter(), left.pop(0)
            # What the caller does with the logits is a part of it: there a device comes to the end of its work.
            yield from self.one_by_one(args, kwargs, {label: edits[label]})
            took = time.perf_counter() - started
            self._spent += took
            self._quickest = took if self._quickest is None else min(took, self._quickest)
            self.reasons.add(NOT_WORTH)
            # The first takes longer than others do.
            if self._spent > took and self._spent + self._quickest * (len(left) + later) >= 2 * WORTH:
                self.capture_now()
        if left:
            self.reasons.discard(NOT_WORTH)
            yield from self._shared(args, kwargs, {label: edits[label] for label in left}, batches)

    def share_nothing(self, reason: str) -> None:
        """Note why forward passes are not shared, and warn of it once."""
        self._warn(reason)

    def capture_now(self) -> None:
        """Have the next forward pass captured, however little there is to run."""
        self._spent = WORTH

    def start_again(self) -> None:
        """Forget what the buffers of the edited models have become, for another pass over the data: graphs are kept."""
        self._changed_buffers.clear()

    @property
    def is_rounded(self) -> bool:
        """Whether some logits may differ from those of the model itself by rounding, as only `exact=False` allows."""
        return any(stacks.rounded for stacks in self._stacks.values())

    def rebound(self, runner: Runner, *, exact: bool = True) -> CheckedForward:
        """Return the same for another copy of the model: with its graphs, none of which is trusted yet.

        Args:
            runner: a new copy of the same model; its parameters and buffers as they are now take the place of the old.
            exact: as of the class.
        """
        forward = CheckedForward(runner, self._predict, exact=exact)
        graphs = {kind: bound(graph, runner) for kind, graph in self._newest.items()}
        forward._newest = {kind: graph for kind, graph in graphs.items() if graph is not None}
        forward._shapes = {kind: list(self._shapes[kind]) for kind in forward._newest}
        return forward

    def reads(self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> bool:
        """Return whether a forward pass reads a parameter at all, by its graph or by whether NaN makes any difference.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            name: the parameter's first name.
        """
        inputs, logits = Inputs.of(args, kwargs), []
        graph = self._checked.get(inputs.signature)
        if graph is not None and graph.parameters[name]:
            return True  # in a graph is only what leads to the logits
        for edited in ({}, {name: torch.full_like(self._runner.parameters[name], torch.nan)}):
            try:
                with random_state_kept(inputs.tensors):
                    logits.append(self._eager(inputs, edited, {}))
            except Exception:  # a model that checks its values
                return True
        return not same_bits(*logits)

    def one_by_one(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]]
    ) -> Iterator[tuple[Label, Tensor]]:
        """Yield what `run` gives, by one forward pass for each edit: for where there is nothing to share.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            edits: for each label the edited parameters by their first names, all of them parameters of the model.
        """
        inputs = Inputs.of(args, kwargs)
        for label in edits:
            # Each edited model is a model of its own: what it changes in its buffers stays with it.
            changed = self._changed_buffers.setdefault(label, {})
            # Here, not in `_eager`: that a model draws must show where its graph is checked.
            with random_state_kept(inputs.tensors):
                logits = self._eager(inputs, edits[label], changed)
            yield label, logits

    def _eager(
        self,
        inputs: Inputs,
        edited: Mapping[str, Tensor],
        changed: dict[str, Tensor],
        watch: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """Return the logits of a plain forward.

        Args:
            inputs: the arguments; copied, objects that hold tensors too, since some models write into them.
            edited: parameters to put in the place of the model's.
            changed: buffers as earlier batches left them, by name; updated with those that this one changes.
            watch: what the model itself is run in, and nothing else: what is compared here is not read by the model.
        """
        with KERNELS.steady(), evaluating():
            buffers = {name: changed.get(name, tensor).clone() for name, tensor in self._runner.model.named_buffers()}
            parameters = self._runner.parameters
            # A parameter that the forward writes into is a state, as buffers are.
            plans = self._gathered_plans(edited)
            weights = {n: changed[n] if n in changed else edited[n] for n in edited if n not in plans}
            weights |= {name: changed.get(name, parameters[name]).clone() for name in self._runner.own - set(edited)}
            weights = {name: as_parameter(weight, parameters[name]) for name, weight in weights.items()}
            given = {**weights, **buffers}
            args, kwargs = map_tensors(inputs.call(inputs.tensors), lambda tensor: as_parameter(tensor.clone(), tensor))
            # Each place once: torch swaps a module of two names twice, and leaves the second value in it.
            placed = {place: given[name] for name in given for place in self._places[name]}
            try:
                edited_where_gathered = edited_in(self._runner.model, self._runner.places, plans)
                with self._runner.guarded(), edited_where_gathered, watch or nullcontext():
                    output = functional_call(self._runner.model, placed, args, kwargs, tie_weights=False)
                    logits = self._predict(output)
            finally:
                self._runner.attributes.restore()  # what was computed from these weights is none of the next ones
            given = {name: placed[self._places[name][0]] for name in {**buffers, **dict.fromkeys(self._runner.own)}}
        for name, tensor in (*self._runner.model.named_buffers(), *((n, parameters[n]) for n in self._runner.own)):
            if not same_bits(given[name], changed.get(name, tensor)):
                changed[name] = given[name]
        return logits

    def _gathered_plans(self, edited: Mapping[str, Tensor]) -> dict[str, TensorPlan]:
        """Return what an edit does to the weights that FSDP shards: it is done when one of them is gathered."""
        plans = edited.plans if isinstance(edited, Edited) else {}
        return {name: plan for name, plan in plans.items() if name in self._runner.gathered}

    # Which graph, if any

    def _graph(self, inputs: Inputs) -> Graph | None:
        """Return the graph to trust for these inputs, or None after a warning that says why there is none."""
        signature = inputs.signature
        if signature in self.fallbacks:
            return None
        known = self._checked.get(signature)
        if known is not None and not self._reads_values:
            return known
        with random_state_kept(inputs.tensors):
            changed: dict[str, Tensor] = {}
            reads = _Reads()
            expected = self._eager(inputs, {}, changed, reads)
            self._reads_values |= reads.seen
            if known is not None:
                if _agrees(known, inputs, expected):
                    return known
                self._warn("it reads the values of its inputs and took another path for this batch than when captured")
                return None
            graph, reason = self._find(inputs, expected, set(changed))
        if graph is None:
            self.fallbacks[signature] = reason
            self._warn(reason)
        else:
            self._checked[signature] = graph
        return graph

    def _find(self, inputs: Inputs, expected: Tensor, changed: set[str]) -> tuple[Graph | None, str]:
        """Return a graph to trust for these inputs, or None and the reason.

        Args:
            inputs: the arguments.
            expected: what the model itself gives.
            changed: the buffers that it changed meanwhile.
        """
        reason = "a replay of its captured graph gives other bits than the model itself"
        try:
            if self._runner.own:
                raise CaptureError(f"its forward writes into {inline(sorted(self._runner.own))}")
            inputs.refuse_objects()
            for graph in self._candidates(inputs):
                carried = sorted(changed.intersection(graph.buffers))
                if carried:
                    return None, f"it carries {', '.join(carried)} from one batch to the next"
                if _agrees(graph, inputs, expected):
                    return graph, ""
        except CaptureError as error:
            reason = str(error)
        if not same_bits(self._eager(inputs, {}, {}), expected):
            reason = "its own output differs from one run to the next"
        return None, reason

    def _candidates(self, inputs: Inputs) -> Iterator[Graph]:
        """Yield the graph of earlier inputs of this kind, one of the sizes that were seen to vary, one of these sizes.

        Raises:
            CaptureError: if the last of them cannot be captured.
        """
        kind = inputs.kind
        shapes = self._shapes.setdefault(kind, [])
        shapes.append(tuple(tensor.shape for tensor in inputs.tensors))
        general = self._newest.get(kind)
        if general is not None:
            yield general
        if len(self.fallbacks) >= PATIENCE:
            return
        dims = varying(batch_dims(inputs.tensors), shapes)
        if general is None or dims != general.dims:
            try:
                general = self._newest[kind] = self._capture(inputs, dims)
            except CaptureError:
                if not any(dims):
                    raise
            else:
                yield general
        if any(dims):
            yield self._capture(inputs, tuple(frozenset() for _ in dims))

    def _capture(self, inputs: Inputs, dims: Dims) -> Graph:
        args, kwargs = inputs.call(inputs.tensors)
        return capture(self._runner, args, kwargs, self._predict, dims=dims)

    def _warn(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.add(reason)
            text = f"no part of the model's forward is shared between edits (each costs a forward of its own): {reason}"
            warn(text)


def _identity(edited: Mapping[str, Tensor]) -> Hashable:
    """Return what a schedule depends on of an edit."""
    return tuple(edited.identities.items()) if isinstance(edited, Edited) else frozenset(edited)


def _places(runner: Runner) -> dict[str, tuple[str, ...]]:
    """Return for each parameter and buffer, by its first name, one path to every module and attribute that hold it."""
    places = dict(runner.places)
    first: dict[int, str] = {}
    met: set[tuple[int, str]] = set()
    for prefix, module in runner.model.named_modules(remove_duplicate=False):
        for attribute, buffer in module._buffers.items():
            if buffer is not None and (id(module), attribute) not in met:
                met.add((id(module), attribute))
                path = f"{prefix}.{attribute}".removeprefix(".")
                name = first.setdefault(id(buffer), path)
                places[name] = (*places.get(name, ()), path)
    return places


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is not annotated
    """See whether Python reads a value from a tensor (`.item()`, `if mask.all():`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.seen = False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def _agrees(graph: Graph, inputs: Inputs, expected: Tensor) -> bool:
    args, kwargs = inputs.call(inputs.tensors)
    try:
        (replayed,) = (logits for _, logits in run(graph, args, kwargs, {"base": {}}))
    except Exception:  # shapes that a graph was not made for fail in any operator
        return False
    return same_bits(replayed, expected)
