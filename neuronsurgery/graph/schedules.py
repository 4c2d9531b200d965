"""Schedules: for many edits what is run when, so that nothing is run twice, and forgotten when.

An edit is cut into stages, in the order in which the forward reads what it changes. Edits that begin with the same
stages share the run up to there: all of them the run without any, which is the root of a tree.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from neuronsurgery.graph.fills import Fill, Fills, find_fill
from neuronsurgery.graph.inputs import Inputs
from neuronsurgery.graph.replay import Graph, Instruction, as_parameter, bind, execute, instructions
from neuronsurgery.graph.stacks import Stacks, Tail, parted
from neuronsurgery.plans import Edited

Label = TypeVar("Label", bound=Hashable)


class Stage(NamedTuple):
    """What an edit changes at one place of the forward.

    Attributes:
        names: the parameters.
        zeroed: those that have nothing but rows set to zero, and how these are cut.
        identity: what two edits share that do the same here.
    """

    names: frozenset[str]
    zeroed: frozenset[tuple[str, tuple[int, int]]]
    identity: Hashable


NOTHING = Stage(frozenset(), frozenset(), None)


@dataclass(eq=False)
class Branch(Generic[Label]):
    """What edits have in common that begin in the same way.

    Attributes:
        stage: how they go on from the branch that this one is of.
        example: one of the edits.
        labels: those that end here.
        children: those that go on, by their next stage.
    """

    stage: Stage
    example: Label | None = None
    labels: list[Label] = field(default_factory=list)
    children: dict[Stage, Branch[Label]] = field(default_factory=dict)

    def joined(self) -> Branch[Label]:
        """Return the same with every stage that no two edits share joined to the next one."""
        self.children = {stage: child.joined() for stage, child in self.children.items()}
        if self.stage is NOTHING or self.labels or len(self.children) != 1:
            return self
        (child,) = self.children.values()
        mine, last = self.stage, child.stage
        both = Stage(mine.names | last.names, mine.zeroed | last.zeroed, (mine.identity, last.identity))
        return Branch(both, child.example, child.labels, child.children)


class Segment(NamedTuple):
    """A stretch of a run, then the branches that start after it, by their number, and the slots not needed any more."""

    instructions: tuple[Instruction, ...]
    branches: tuple[int, ...]
    free: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Suffix:
    """What an edit of some parameters runs anew.

    Attributes:
        fills: the layers that need not be run.
        segments: the tainted operators in order, cut where branches start.
        reads: slots of the run before that they, the branches or the caller read.
        ready: the last of these.
        slots: the placeholders' slots of each edited parameter.
        head: of a run from which nothing starts, what comes before its tail.
        tail: of such a run, what can be stacked; None where nothing can.
    """

    fills: tuple[Fill, ...]
    segments: tuple[Segment, ...]
    reads: frozenset[int]
    ready: int
    slots: Mapping[str, tuple[int, ...]]
    head: tuple[Instruction, ...] = ()
    tail: Tail | None = None


@dataclass(frozen=True, eq=False)
class Planned(Generic[Label]):
    """A branch with what it runs, and those that start from it."""

    branch: Branch[Label]
    suffix: Suffix
    children: tuple[Planned[Label], ...]


@dataclass(frozen=True, eq=False)
class Schedule(Generic[Label]):
    """A graph planned for some edits.

    Attributes:
        graph: the graph.
        root: the run without an edit, and all that starts from it; it stops when everything has started.
    """

    graph: Graph
    root: Planned[Label]

    def run(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        edits: Mapping[Label, Mapping[str, Tensor]],
        fills: Fills | None = None,
        stacks: Stacks | None = None,
    ) -> Iterator[tuple[Label, Tensor]]:
        """Yield (label, logits) of every edit, as each becomes available.

        What edits have in common is computed once. Nothing is checked but fills and stacks: see `CheckedForward`.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            edits: for each label the edited parameters by their first names, those that the schedule was made for; `{}`
                is the unedited model. A value is looked up just before it is used and forgotten right after, so a
                mapping may compute it on demand.
            fills: which layers need not be run for inputs like these; none for running them all.
            stacks: which edits are run as one for inputs like these; none for running each alone.
        """
        inputs = Inputs.of(args, kwargs)
        return _Pass(self.graph, inputs, edits, fills, stacks).run(self.root, bind(self.graph, inputs.tensors))


@dataclass(frozen=True, eq=False)
class _Pass(Generic[Label]):
    """One forward pass of a schedule, as by the arguments of `Schedule.run`."""

    graph: Graph
    inputs: Inputs
    edits: Mapping[Label, Mapping[str, Tensor]]
    fills: Fills | None
    stacks: Stacks | None

    def run(self, planned: Planned[Label], values: list[Any]) -> Iterator[tuple[Label, Tensor]]:
        """Yield (label, logits) of a branch and all that starts from it, with the values of its run so far."""
        calm: dict[int, bool] = {}
        for segment in planned.suffix.segments:
            execute(self.graph, segment.instructions, values)
            leaves = []
            for number in segment.branches:
                child = planned.children[number]
                if child.children:
                    yield from self.run(child, self._begun(child, values, calm))
                else:
                    leaves.append(child)
            yield from self._leaves(leaves, values, calm)
            for slot in segment.free:
                values[slot] = None
        for label in planned.branch.labels:
            yield label, values[self.graph.slots[self.graph.output]]

    def _leaves(
        self, leaves: Sequence[Planned[Label]], values: Sequence[Any], calm: dict[int, bool]
    ) -> Iterator[tuple[Label, Tensor]]:
        together: dict[Suffix, list[Planned[Label]]] = {}
        for leaf in leaves:
            together.setdefault(leaf.suffix, []).append(leaf)
        for suffix, alike in together.items():
            number = len(alike)
            while alike:  # asked anew each time: the first may be seen to be better off alone
                width = 1 if self.stacks is None else self.stacks.width(suffix.tail, self.inputs, number)
                some = alike[: width if width <= len(alike) else 1]
                alike = alike[len(some) :]
                for leaf, logits in zip(some, self._logits(suffix, some, values, calm), strict=True):
                    for label in leaf.branch.labels:
                        yield label, logits

    def _logits(
        self, suffix: Suffix, leaves: Sequence[Planned[Label]], values: Sequence[Any], calm: dict[int, bool]
    ) -> Sequence[Tensor]:
        """Return the logits of some leaves of one suffix, stacked if they are several."""
        runs = [self._begun(leaf, values, calm) for leaf in leaves]
        if len(runs) == 1 or self.stacks is None or suffix.tail is None:
            (own,) = runs
            for segment in suffix.segments:
                execute(self.graph, segment.instructions, own)
            return [own[self.graph.slots[self.graph.output]]]
        for own in runs:
            execute(self.graph, suffix.head, own)
        return self.stacks.logits(self.graph, suffix.tail, runs, self.inputs)

    def _begun(self, planned: Planned[Label], values: Sequence[Any], calm: dict[int, bool]) -> list[Any]:
        """Return the values of an edited run, the edited parameters and the layers that may be filled among them."""
        graph, suffix, own = self.graph, planned.suffix, list(values)
        edited = self.edits[planned.branch.example]  # type: ignore[index]  # only the root has none
        weights = {fill.weight for fill in suffix.fills}
        for name, slots in suffix.slots.items():
            if name not in weights:
                value = as_parameter(edited[name], graph.originals[name])
                for slot in slots:
                    own[slot] = value
        for fill in suffix.fills:
            assert isinstance(edited, Edited)  # otherwise nothing is known to be zero
            if self.fills is None or not self.fills.taken(graph, fill, values, own, edited, calm):
                (slot,) = suffix.slots[fill.weight]
                own[slot] = as_parameter(edited[fill.weight], graph.originals[fill.weight])
                execute(graph, [Instruction(each, ()) for each in fill.slots], own)
                for each in (slot, *fill.slots[:-1]):
                    own[each] = None
        return own


# Making one


def schedule(graph: Graph, edits: Mapping[Label, Mapping[str, Tensor]]) -> Schedule[Label]:
    """Return the schedule of a graph for some edits, each the edited parameters by their first names.

    Raises:
        KeyError: if a name is not that of a parameter.
    """
    root: Branch[Label] = Branch(NOTHING)
    first = _first_uses(graph)
    for label, edited in edits.items():
        branch = root
        for stage in _stages(first, label, edited):
            branch = branch.children.setdefault(stage, Branch(stage, label))
        branch.labels.append(label)
    return Schedule(graph, _planned(graph, root.joined(), {}))


def run(
    graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]]
) -> Iterator[tuple[Label, Tensor]]:
    """Return an iterator over (label, logits) of every edit: see `Schedule.run`.

    Example:
        >>> from torch import nn, ones, zeros
        >>> from neuronsurgery.copies import make_runner
        >>> from neuronsurgery.graph.export import capture
        >>> from neuronsurgery.surveys import survey
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph = capture(make_runner(survey(model)), (ones(4, 2),))
        >>> edits = {"base": {}, "cut": {"2.weight": zeros(2, 3), "2.bias": zeros(2)}}
        >>> {label: logits.shape for label, logits in run(graph, (ones(5, 2),), {}, edits)}
        {'cut': torch.Size([5, 2]), 'base': torch.Size([5, 2])}
    """
    return schedule(graph, edits).run(args, kwargs, edits)


def _first_uses(graph: Graph) -> dict[str, int]:
    """Return for each parameter the slot of the first operator that reads it; the end for one that none reads."""
    first = dict.fromkeys(graph.parameters, len(graph.nodes))
    names = {graph.slots[node]: name for name, nodes in graph.parameters.items() for node in nodes}
    for slot in reversed(range(len(graph.nodes))):
        first.update({names[read]: slot for read in graph.reads[slot] if read in names})
    return first


def _stages(first: Mapping[str, int], label: Hashable, edited: Mapping[str, Tensor]) -> list[Stage]:
    """Return what an edit changes in the order in which the forward reads it.

    Raises:
        KeyError: if a name is not that of a parameter.
    """
    unknown = sorted(set(edited) - set(first))
    if unknown:
        raise KeyError(f"not parameters of the captured model: {', '.join(unknown)}")
    if not isinstance(edited, Edited):
        return [Stage(frozenset(edited), frozenset(), ("alone", label))] if edited else []
    places: dict[int, list[str]] = {}
    for name in edited:
        places.setdefault(first[name], []).append(name)
    return [
        Stage(
            frozenset(names),
            frozenset((name, edited.zeroed[name].cut) for name in names if name in edited.zeroed),
            tuple((name, edited.identities[name]) for name in names),
        )
        for _, names in sorted(places.items())
    ]


Leaves = dict[tuple[frozenset[str], frozenset[tuple[str, tuple[int, int]]]], Suffix]


def _planned(graph: Graph, branch: Branch[Label], leaves: Leaves) -> Planned[Label]:
    """Return a branch with what it runs; edits of the same parameters run the same."""
    children = tuple(_planned(graph, child, leaves) for child in branch.children.values())
    stage = branch.stage
    if children or stage is NOTHING:
        return Planned(branch, _suffix(graph, stage, bool(branch.labels), [c.suffix for c in children]), children)
    key = stage.names, stage.zeroed
    if key not in leaves:
        leaves[key] = _suffix(graph, stage, True, ())
    return Planned(branch, leaves[key], ())


def _suffix(graph: Graph, stage: Stage, ends: bool, branches: Sequence[Suffix]) -> Suffix:
    """Return what is run for a stage.

    Args:
        graph: the graph.
        stage: what is edited.
        ends: whether the logits are wanted.
        branches: what starts from this run.
    """
    root = stage is NOTHING
    operators = [slot for slot, node in enumerate(graph.nodes) if node.op == "call_function"]
    tainted = operators if root else graph.tainted(stage.names)
    slots = {name: tuple(graph.slots[node] for node in graph.parameters[name]) for name in stage.names}
    below = frozenset[int]().union(*(branch.reads for branch in dict.fromkeys(branches)))
    output = {graph.slots[graph.output]} if ends else set[int]()
    fills = () if root else _fills(graph, stage, tainted, below | output)
    skipped = {slot for fill in fills for slot in fill.slots}
    computed = {*tainted, *(slot for own in slots.values() for slot in own)}
    reads = below.union(output, *(graph.reads[slot] for slot in tainted)) - computed
    # A fill begins with what stood there, and an edited bias is compared with the one before.
    reads |= {slot for fill in fills for slot in (fill.end, fill.shift) if slot is not None}
    last = len(graph.nodes) if ends else max((branch.ready for branch in branches), default=-1)
    left = [slot for slot in tainted if slot not in skipped and slot <= last]
    segments = _segments(graph, left, branches, output)
    suffix = Suffix(fills, segments, reads, max(reads, default=0), slots)
    if root or branches:
        return suffix
    edited = {slot for own in slots.values() for slot in own}
    head, tail = parted(graph, segments[0].instructions, edited, computed)
    return replace(suffix, head=head, tail=tail)


def _fills(graph: Graph, stage: Stage, tainted: Sequence[int], needed: Iterable[int]) -> tuple[Fill, ...]:
    if not stage.zeroed:
        return ()
    reached, kept = set(tainted), set(needed)
    edge = [slot for slot in tainted if reached.isdisjoint(graph.reads[slot])]
    found = (find_fill(graph, slot, stage.names, stage.zeroed, kept) for slot in edge)
    return tuple(fill for fill in found if fill is not None)


def _segments(
    graph: Graph, operators: Sequence[int], branches: Sequence[Suffix], output: set[int]
) -> tuple[Segment, ...]:
    """Return a run cut where branches are ready, and forgetting each value when the run and they are done with it."""
    ready: dict[int, list[int]] = {}
    until: dict[int, int] = {}
    for number, branch in enumerate(branches):
        ready.setdefault(branch.ready, []).append(number)
    for branch in dict.fromkeys(branches):
        until.update({slot: max(branch.ready, until.get(slot, 0)) for slot in branch.reads})
    last_use = {read: slot for slot in operators for read in graph.reads[slot]}
    held = {slot: stop for slot, stop in until.items() if stop >= last_use.get(slot, 0) and slot not in output}
    freed: dict[int, list[int]] = {}
    for slot, stop in held.items():
        freed.setdefault(stop, []).append(slot)
    left = list(instructions(graph, operators, keep=output | set(held)))[::-1]
    segments = []
    for stop in sorted(ready):
        part = []
        while left and left[-1].slot <= stop:
            part.append(left.pop())
        segments.append(Segment(tuple(part), tuple(ready[stop]), tuple(freed.get(stop, ()))))
    return (*segments, Segment(tuple(reversed(left)), (), ())) if left or not segments else tuple(segments)
