"""A model's forward as a checked graph: captured once, replayed for many edits.

`capture` exports the forward (with `predict` inside, so only logits leave) to a `Graph` of torch operators. An edit
taints the nodes that its parameters reach; everything else has the value of the unedited run. `Graph.run` walks the
graph once without edits and, as soon as everything that an edit's tainted nodes read is there, runs just those.

A graph records one path through the model's Python and checks no guards, so it may be wrong for other inputs than those
it was captured with. `CheckedForward` trusts it only where it was checked: for every new signature of the inputs
(structure, shapes, strides, dtypes, autocast) the replay must equal the model's own output bit for bit; otherwise the
forward is captured anew for that signature, and where that fails, too, every edit is a forward pass of its own.
"""

from __future__ import annotations

import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuronsurgery.structure import one_numerical_path, walk_modules
from neuronsurgery.types import Predict, default_predict, random_state_kept

Label = TypeVar("Label", bound=Hashable)

Dims = tuple[frozenset[int], ...]
"""For each tensor among the inputs, the dimensions whose size may change from batch to batch."""


PATIENCE = 3
"""After so many signatures without a graph to trust, no more captures are tried: each takes seconds."""


class CaptureError(RuntimeError):
    """A model's forward cannot be captured, or the graph cannot be trusted; the message says why."""


# Inputs


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a model: its tensors in a fixed order, and the structure that held them."""

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Return the inputs; the order of keyword arguments does not matter."""
        leaves, structure = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), structure)

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with other tensors in the place of these."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.others]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    @property
    def kind(self) -> Hashable:
        """What one graph can serve: everything but the sizes of the tensors."""
        kinds = tuple((tensor.dtype, tensor.device, tensor.dim(), tensor.layout) for tensor in self.tensors)
        devices = sorted({tensor.device.type for tensor in self.tensors})
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices)
        return repr(self.structure), repr(self.others), kinds, autocast

    @property
    def signature(self) -> Hashable:
        """What a check holds for: the kind, and the shapes and strides of the tensors."""
        return self.kind, tuple((tensor.shape, _strides(tensor)) for tensor in self.tensors)

    def refuse_objects(self) -> None:
        """Raise where an input is neither a dense tensor nor a plain value, and cannot be told from another one."""
        if any(tensor.layout != torch.strided for tensor in self.tensors):
            raise CaptureError("an input is a sparse tensor")
        plain = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
        odd = sorted(
            {type(leaf).__name__ for leaf in self.others if leaf is not _TENSOR and not isinstance(leaf, plain)}
        )
        if odd:
            raise CaptureError(f"an input of type {', '.join(odd)} is neither a tensor nor a plain value")


_TENSOR = type("_Tensor", (), {"__repr__": lambda _: "<tensor>"})()


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None


def batch_dims(tensors: Sequence[Tensor]) -> Dims:
    """Return the first dimension of every tensor that has as many entries as the first tensor has, if any."""
    size = next((len(tensor) for tensor in tensors if tensor.dim() > 0), None)
    return tuple(frozenset({0} if tensor.dim() > 0 and len(tensor) == size else ()) for tensor in tensors)


# The graph


class Instruction(NamedTuple):
    """One operator of a schedule: what to call, how to fetch its arguments, where its value goes, what to forget."""

    call: Callable[..., Any]
    fetch: Callable[[list[Any]], tuple[list[Any], dict[str, Any]]]
    slot: int
    free: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Suffix:
    """What an edit of some parameters runs anew.

    Attributes:
        instructions: the tainted operators in order.
        reads: slots of the unedited run that they (or the caller) read.
        ready: the last of these, by position in the graph.
        slots: the placeholders' slots of each edited parameter.
    """

    instructions: tuple[Instruction, ...]
    reads: frozenset[int]
    ready: int
    slots: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of the unedited run, then the suffixes (by their parameters' names) that are ready after it."""

    instructions: tuple[Instruction, ...]
    suffixes: tuple[frozenset[str], ...]
    free: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured forward: the operators between inputs and logits, none of which writes into another one's value.

    Attributes:
        nodes: the nodes in the order of execution, placeholders first; `node.target` is the operator, `node.users` and
            `node.all_input_nodes` the neighbours. Whatever does not lead to the logits is left out.
        parameters: for each of the model's parameters (its first name) its placeholders; several where the model knows
            it by several names, none where the forward does not use it.
        buffers: for each buffer that the forward reads its placeholder.
        inputs: the placeholders of the inputs' tensors, in order.
        output: the node of the logits.
        constants: the values of the other nodes that no operator computes: parameters, buffers, constants.
        originals: the model's parameters by first name.
        dims: the dimensions that may vary.
    """

    nodes: tuple[fx.Node, ...]
    parameters: Mapping[str, tuple[fx.Node, ...]]
    buffers: Mapping[str, fx.Node]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    constants: Mapping[fx.Node, Any]
    originals: Mapping[str, nn.Parameter]
    dims: Dims
    _slots: Mapping[fx.Node, int] = field(repr=False)
    _suffixes: dict[frozenset[str], Suffix] = field(default_factory=dict, repr=False)
    _schedules: dict[frozenset[frozenset[str]], tuple[Segment, ...]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        used = sum(bool(nodes) for nodes in self.parameters.values())
        return f"Graph({len(self.nodes)} nodes, {used} of {len(self.parameters)} parameters used)"

    # What the graph says

    def parameter(self, node: fx.Node) -> str | None:
        """Return the first name of the parameter that a placeholder stands for, or None for any other node."""
        return next((name for name, nodes in self.parameters.items() if node in nodes), None)

    def tainted(self, names: Iterable[str]) -> tuple[fx.Node, ...]:
        """Return the operators that these parameters reach, in the order of execution.

        Raises:
            KeyError: if a name is not that of a parameter.
        """
        unknown = sorted(set(names) - set(self.parameters))
        if unknown:
            raise KeyError(f"not parameters of the captured model: {', '.join(unknown)}")
        reached = {node for name in names for node in self.parameters[name]}
        operators = []
        for node in self.nodes:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
                operators.append(node)
        return tuple(operators)

    @staticmethod
    def shape(node: fx.Node) -> tuple[int | None, ...] | None:
        """Return the shape of a node's value, None for a size that varies; None for what is not a tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        return tuple(size if isinstance(size, int) else None for size in value.shape)

    # Replay

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]]
    ) -> Iterator[tuple[Label, Tensor]]:
        """Yield (label, logits) of every edit, as each becomes available.

        What the edits have in common with the unedited run is computed once. Nothing is checked: see `CheckedForward`.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            edits: for each label the edited parameters by their first names; `{}` is the unedited model. A value is
                looked up just before it is used and forgotten right after, so a mapping may compute it on demand.

        Raises:
            KeyError: if a name is not that of a parameter.
        """
        labels: dict[frozenset[str], list[Label]] = {}
        for label, edited in edits.items():
            labels.setdefault(frozenset(edited), []).append(label)
        values = self._bind(Inputs.of(args, kwargs).tensors)
        for segment in self._schedule(frozenset(labels)):
            _execute(segment.instructions, values)
            for names in segment.suffixes:
                for label in labels[names]:
                    yield label, self._branch(self._suffix(names), values, edits[label])
            for slot in segment.free:
                values[slot] = None

    def _bind(self, tensors: Sequence[Tensor]) -> list[Any]:
        if len(tensors) != len(self.inputs):
            raise CaptureError(f"the graph takes {len(self.inputs)} tensors, not {len(tensors)}")
        values: list[Any] = [None] * len(self.nodes)
        for node, tensor in zip(self.inputs, tensors, strict=True):
            values[self._slots[node]] = tensor
        for node, value in self.constants.items():
            values[self._slots[node]] = value
        return values

    def _branch(self, suffix: Suffix, values: Sequence[Any], edited: Mapping[str, Tensor]) -> Tensor:
        own = list(values)
        for name, slots in suffix.slots.items():
            value = as_parameter(edited[name], self.originals[name])
            for slot in slots:
                own[slot] = value
        _execute(suffix.instructions, own)
        logits: Tensor = own[self._slots[self.output]]
        return logits

    def _suffix(self, names: frozenset[str]) -> Suffix:
        if names not in self._suffixes:
            nodes = self.tainted(names)
            computed = {*nodes, *(node for name in names for node in self.parameters[name])}
            needed = {self.output}.union(*(node.all_input_nodes for node in nodes))
            reads = frozenset(self._slots[node] for node in needed - computed)
            self._suffixes[names] = Suffix(
                self._instructions(nodes, keep={self.output}),
                reads,
                max(reads, default=0),
                {name: tuple(self._slots[node] for node in self.parameters[name]) for name in names},
            )
        return self._suffixes[names]

    def _schedule(self, names: frozenset[frozenset[str]]) -> tuple[Segment, ...]:
        """Return the unedited run cut where suffixes are ready; it stops after the last of them."""
        if names in self._schedules:
            return self._schedules[names]
        ready: dict[int, list[frozenset[str]]] = {}
        until: dict[int, int] = {}
        for key in sorted(names, key=sorted):
            suffix = self._suffix(key)
            ready.setdefault(suffix.ready, []).append(key)
            until.update({slot: max(suffix.ready, until.get(slot, 0)) for slot in suffix.reads})
        nodes = self.nodes[: max(ready, default=-1) + 1]
        last_use = {self._slots[used]: i for i, node in enumerate(nodes) for used in node.all_input_nodes}
        held = {slot: stop for slot, stop in until.items() if stop >= last_use.get(slot, 0)}
        operators = [node for node in nodes if node.op == "call_function"]
        instructions = self._instructions(operators, keep={self.nodes[slot] for slot in held})
        segments, start = [], 0
        for stop in sorted(ready):
            part = tuple(instruction for instruction in instructions if start <= instruction.slot <= stop)
            free = tuple(slot for slot in held if held[slot] == stop)
            segments.append(Segment(part, tuple(ready[stop]), free))
            start = stop + 1
        self._schedules[names] = tuple(segments)
        return self._schedules[names]

    def _instructions(self, nodes: Sequence[fx.Node], keep: set[fx.Node]) -> tuple[Instruction, ...]:
        """Return the operators as instructions that forget each value after its last use, but for those to keep."""
        seen = set(keep)
        instructions = []
        for node in reversed(nodes):
            dead = {*node.all_input_nodes, node} - seen
            seen |= dead
            free = tuple(sorted(self._slots[value] for value in dead))
            call: Any = node.target
            instructions.append(Instruction(call, _fetch(node, self._slots), self._slots[node], free))
        return tuple(reversed(instructions))


def as_parameter(tensor: Tensor, original: Tensor) -> Tensor:
    """Return the same values, requiring a gradient where the original does.

    Even where no gradient is recorded, matmul chooses its kernel, and so the last bits, by that flag of its operands.
    """
    with torch.inference_mode(False):
        value = tensor.clone() if tensor.is_inference() else tensor.detach()
        return value.requires_grad_(original.requires_grad)


def _fetch(node: fx.Node, slots: Mapping[fx.Node, int]) -> Callable[[list[Any]], tuple[list[Any], dict[str, Any]]]:
    """Return a function of the values by slot that gives a node's arguments."""
    template = list(node.args)
    direct = [(i, slots[value]) for i, value in enumerate(template) if isinstance(value, fx.Node)]
    nested = [(i, value) for i, value in enumerate(template) if _has_nodes(value) and not isinstance(value, fx.Node)]
    named = {name: value for name, value in node.kwargs.items() if _has_nodes(value)}
    plain = {name: value for name, value in node.kwargs.items() if name not in named}

    def fetch(values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        args = template.copy()
        for i, slot in direct:
            args[i] = values[slot]
        if not nested and not named:
            return args, plain

        def value(n: fx.Node) -> Any:
            return values[slots[n]]

        for i, tree in nested:
            args[i] = fx.map_arg(tree, value)
        return args, {**plain, **{name: fx.map_arg(tree, value) for name, tree in named.items()}}

    return fetch


def _has_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


def _execute(instructions: Iterable[Instruction], values: list[Any]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for call, fetch, slot, free in instructions:
            args, kwargs = fetch(values)
            values[slot] = call(*args, **kwargs)
            for dead in free:
                values[dead] = None


# Capture


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    predict: Predict = default_predict,
    *,
    dims: Dims | None = None,
) -> Graph:
    """Return the model's forward on such inputs as a graph. The graph is not checked: see `CheckedForward`.

    The graph holds the model's parameters and buffers themselves, so it follows their values. Nothing of the model
    changes: parameters, buffers, flags and attributes stay as they are, and so does the global random state.

    Args:
        model: a plain copy in evaluation mode (`structure.plain`): without parametrizations.
        args: positional arguments, as of a batch.
        kwargs: keyword arguments.
        predict: the model's output -> logits.
        dims: the dimensions of the inputs' tensors that may vary; default the first of those that are per example (a
            batch of one is captured as two, since sizes of one become constants). Empty sets: these shapes only.

    Raises:
        CaptureError: if the model cannot be captured: its Python depends on the values of tensors, it uses something
            that has no operator, or has hooks.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> graph = capture(model, (torch.ones(4, 2),))
        >>> graph
        Graph(8 nodes, 4 of 4 parameters used)
        >>> [str(node.target) for node in graph.tainted(["0.weight"])]
        ['aten.linear.default', 'aten.relu.default', 'aten.linear.default']
        >>> edits = {"base": {}, "cut": {"2.weight": torch.zeros(2, 3), "2.bias": torch.zeros(2)}}
        >>> {label: logits.shape for label, logits in graph.run((torch.ones(5, 2),), {}, edits)}
        {'cut': torch.Size([5, 2]), 'base': torch.Size([5, 2])}
    """
    inputs = Inputs.of(args, kwargs or {})
    inputs.refuse_objects()
    _refuse_hooks(model)
    if dims is None:
        dims = batch_dims(inputs.tensors)
    forward = _Forward(model, predict, inputs)
    with _evaluating(), _attributes_kept(model):
        program = _export(forward, inputs.tensors, dims)
        try:
            _make_functional(program.graph_module)
        except _AliasedWriteError:
            # Only then: it takes as long as the export did, and some programs cannot be functionalised.
            program = _functionalise(program)
            _make_functional(program.graph_module, strict=True)
    return _graph(program, forward, model, dims)


PREFIX = "model."
"""Where the model stands in what is exported."""


class _Forward(nn.Module):
    """From the inputs' tensors to the logits."""

    def __init__(self, model: nn.Module, predict: Predict, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.predict = predict
        self.inputs = Inputs((), inputs.others, inputs.structure)
        self.training = False

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        args, kwargs = self.inputs.call(tensors)
        logits = self.predict(self.model(*args, **kwargs))
        if not isinstance(logits, Tensor):
            raise TypeError(f"predict must return the logits, a tensor, not a {type(logits).__name__}")
        return logits


@contextmanager
def _evaluating() -> Iterator[None]:
    """Run as `evaluate` does, and outside of the caller's inference mode, whose tensors have no version counters."""
    with one_numerical_path(), torch.inference_mode(False), torch.no_grad():
        yield


def _refuse_hooks(model: nn.Module) -> None:
    hooked = [name or "the model" for name, module in model.named_modules() if _hooks(module)]
    if hooked:
        raise CaptureError(f"forward hooks would not be called in a replay; there are some on {', '.join(hooked[:3])}")


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give the modules their attributes back, and the containers among these their content.

    What the forward stores while it is traced are tensors without values; older releases of torch leave them there.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    contents: dict[int, tuple[Any, Any]] = {}
    for values in attributes.values():
        _collect_containers(list(values.values()), contents)
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        for container, content in contents.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _collect_containers(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """Add every list, dict and set within `value` to `found`, by its id, with a copy of what it holds."""
    if not isinstance(value, (list, tuple, dict, set)) or id(value) in found:
        return
    if not isinstance(value, tuple):
        found[id(value)] = (value, copy.copy(value))
    for item in value.values() if isinstance(value, dict) else value:
        _collect_containers(item, found)


def _export(forward: _Forward, tensors: Sequence[Tensor], dims: Dims) -> ExportedProgram:
    """Return the exported program, in torch's training form: operators as the model calls them, writes included."""
    twice = [
        torch.cat([tensor, tensor]) if 0 in d and len(tensor) == 1 else tensor
        for tensor, d in zip(tensors, dims, strict=True)
    ]
    # AUTO, not DYNAMIC: a size that the model's code makes a constant is no error, the check finds it.
    shapes = [dict.fromkeys(sorted(d), Dim.AUTO) for d in dims]
    with _quiet(), random_state_kept(tensors):
        try:
            program: ExportedProgram = torch.export.export(forward, (twice,), dynamic_shapes=(shapes,), strict=False)
            return program
        except Exception as error:
            raise CaptureError(f"torch.export refused it: {_first_line(error)}") from error


def _functionalise(program: ExportedProgram) -> ExportedProgram:
    with _quiet():
        try:
            functional: ExportedProgram = program.run_decompositions({})
            return functional
        except Exception as error:
            raise CaptureError(f"its writes in place could not be undone: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.export's advice, and the graph that it prints where it fails: both are for those who deploy it."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# Writes in place


class _AliasedWriteError(Exception):
    """A node writes into a value that others see under another name."""


def _make_functional(module: fx.GraphModule, *, strict: bool = False, nested: bool = False) -> None:
    """Replace every write in place by an operator that returns a new value, in the graph and in graphs nested in it.

    Right where nobody else sees the value written to, which the storages of the recorded values tell: views of it that
    were taken before and are read after would keep the old content.

    Args:
        module: what to change.
        strict: raise a CaptureError where it cannot be done, instead of _AliasedWriteError.
        nested: whether the placeholders are values of an outer graph.
    """
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    family: dict[Any, list[fx.Node]] = {}
    for node in position:
        for storage in _storages(node):
            family.setdefault(storage, []).append(node)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and isinstance(inner := _attribute(module, node), fx.GraphModule):
            _make_functional(inner, strict=strict, nested=True)
        written = _written(node)
        if not written:
            continue
        target = node.args[0]
        kin = {n for storage in _storages(target) for n in family[storage] if position[n] < position[node]} | {target}
        seen = [n for n in kin - {target} if any(position[user] > position[node] for user in n.users)]
        outer = nested and any(n.op == "placeholder" for n in kin)
        if written != [0] or seen or outer:
            if strict:
                raise CaptureError(f"{node.target} writes into a value that others see")
            raise _AliasedWriteError
        target.replace_all_uses_with(node, delete_user_cb=lambda user, at=position[node]: position[user] > at)
        node.target = _functional(node)


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _storages(node: fx.Node) -> set[Any]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}


def _written(node: fx.Node) -> list[int]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _functional(node: fx.Node) -> Callable[..., Any]:
    """Return the operator that computes what `node` writes: its twin without the underscore, or itself on a copy."""
    write: Any = node.target
    namespace, name = write._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    twin = getattr(packet, write._overloadname, None) if name.endswith("_") else None
    dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
    # With mixed dtypes the twin would promote where the write keeps the dtype of its target.
    return twin if twin is not None and len(dtypes) == 1 else OnCopy(write)


@dataclass(frozen=True)
class OnCopy:
    """An operator that writes into its first argument, run on a copy of that."""

    operator: Callable[..., Tensor]

    @property
    def __name__(self) -> str:
        return str(self.operator)

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `target` would hold afterwards."""
        return self.operator(target.clone(), *args, **kwargs)


# From an exported program to a graph


def _graph(program: ExportedProgram, forward: _Forward, model: nn.Module, dims: Dims) -> Graph:
    signature, module = program.graph_signature, program.graph_module
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    output = _logits(program)
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, list[fx.Node]] = {name: [] for name in first_names.values()}
    buffers: dict[str, fx.Node] = {}
    constants: dict[fx.Node, Any] = {}
    inputs = []
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(node)
            continue
        constants[node] = value = _held(spec, program, forward)
        # By identity: each name of a tied parameter has a placeholder of its own.
        if spec.kind == InputKind.PARAMETER and id(value) in first_names:
            parameters[first_names[id(value)]].append(node)
        if spec.kind == InputKind.BUFFER:
            buffers[str(spec.target).removeprefix(PREFIX)] = node
    live = _ancestors(output)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node in live:
            constants[node] = _attribute(module, node)
    nodes = tuple(node for node in module.graph.nodes if node in live.union(inputs))
    _drop_dead(module.graph, output, live)
    return Graph(
        nodes,
        {name: tuple(node for node in found if node in live) for name, found in parameters.items()},
        {name: node for name, node in buffers.items() if node in live},
        tuple(inputs),
        output,
        {node: value for node, value in constants.items() if node in live},
        dict(model.named_parameters()),
        dims,
        {node: i for i, node in enumerate(nodes)},
    )


def _logits(program: ExportedProgram) -> fx.Node:
    results = program.graph.output_node().args[0]
    pairs = zip(results, program.graph_signature.output_specs, strict=True)
    logits = [node for node, spec in pairs if spec.kind == OutputKind.USER_OUTPUT]
    assert len(logits) == 1 and isinstance(logits[0], fx.Node), "_Forward returns one tensor"
    return logits[0]


def _held(spec: Any, program: ExportedProgram, forward: _Forward) -> Tensor:
    if spec.kind == InputKind.PARAMETER:
        return forward.get_parameter(spec.target)
    if spec.kind == InputKind.BUFFER:
        return forward.get_buffer(spec.target)
    if spec.kind == InputKind.CONSTANT_TENSOR:
        constant: Tensor = program.constants[spec.target]
        return constant
    raise CaptureError(f"it uses {spec.target!r}, an object that is not a tensor")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return everything that leads to a node, and the node."""
    found = {node}
    queue = [node]
    while queue:
        new = set(queue.pop().all_input_nodes) - found
        found |= new
        queue.extend(new)
    return found


def _drop_dead(graph: fx.Graph, output: fx.Node, live: set[fx.Node]) -> None:
    """Take out what does not lead to the logits, so that `users` says who reads a value."""
    graph.output_node().args = ((output,),)
    for node in reversed(graph.nodes):
        if node not in live and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


# Trust


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
        model: a plain copy in evaluation mode (`structure.plain`), not used by anyone else meanwhile.
        predict: the model's output -> logits.

    Attributes:
        fallbacks: for each signature that no graph could be trusted for, the reason.
        reasons: why any forward pass was not shared; each has been warned of once.

    Example:
        >>> model = nn.Linear(2, 2).eval()
        >>> forward = CheckedForward(model)
        >>> edits = {"base": {}, "cut": {"weight": torch.zeros(2, 2)}}
        >>> logits = dict(forward.run((torch.ones(3, 2),), {}, edits))
        >>> torch.equal(logits["cut"], model.bias.expand(3, 2))
        True
    """

    def __init__(self, model: nn.Module, predict: Predict = default_predict) -> None:
        self.fallbacks: dict[Hashable, str] = {}
        self._model = model
        self._predict = predict
        self._parameters = dict(model.named_parameters())
        self._places = _places(model)
        self._trusted: dict[Hashable, Graph] = {}
        self._general: dict[Hashable, Graph] = {}
        self._shapes: dict[Hashable, list[tuple[torch.Size, ...]]] = {}
        self._reads_values = False
        self._changed_buffers: dict[Hashable, dict[str, Tensor]] = {}
        self.reasons: set[str] = set()

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], edits: Mapping[Label, Mapping[str, Tensor]]
    ) -> Iterator[tuple[Label, Tensor]]:
        """Return an iterator over (label, logits) of every edit, in no particular order.

        Where no graph can be trusted a warning says why, once for each reason.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            edits: for each label the edited parameters by their first names; `{}` is the unedited model. Values are
                looked up just before use.

        Raises:
            KeyError: if a name is not that of a parameter.
        """
        unknown = sorted({name for edited in edits.values() for name in edited} - set(self._parameters))
        if unknown:
            raise KeyError(f"not parameters of the model: {', '.join(unknown)}")
        graph = self._graph(Inputs.of(args, kwargs))
        if graph is not None:
            return graph.run(args, kwargs, edits)
        return self.one_by_one(args, kwargs, edits)

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

    def _eager(self, inputs: Inputs, edited: Mapping[str, Tensor], changed: dict[str, Tensor]) -> Tensor:
        """Return the logits of a plain forward.

        Args:
            inputs: the arguments; copied, since some models write into them.
            edited: parameters to put in the place of the model's.
            changed: buffers as earlier batches left them, by name; updated with those that this one changes.
        """
        with _evaluating():
            buffers = {name: changed.get(name, tensor).clone() for name, tensor in self._model.named_buffers()}
            weights = {name: as_parameter(edited[name], self._parameters[name]) for name in edited}
            given = {**weights, **buffers}
            args, kwargs = inputs.call(as_parameter(tensor.clone(), tensor) for tensor in inputs.tensors)
            # Each place once: torch swaps a module of two names twice, and leaves the second value in it.
            placed = {place: given[name] for name in given for place in self._places[name]}
            logits = self._predict(functional_call(self._model, placed, args, kwargs, tie_weights=False))
            given = {name: placed[self._places[name][0]] for name in buffers}
        for name, tensor in self._model.named_buffers():
            if not same_bits(given[name], changed.get(name, tensor)):
                changed[name] = given[name]
        return logits

    # Which graph, if any

    def _graph(self, inputs: Inputs) -> Graph | None:
        """Return the graph to trust for these inputs, or None after a warning that says why there is none."""
        signature = inputs.signature
        if signature in self.fallbacks:
            return None
        known = self._trusted.get(signature)
        if known is not None and not self._reads_values:
            return known
        with random_state_kept(inputs.tensors):
            changed: dict[str, Tensor] = {}
            with _Reads() as reads:
                expected = self._eager(inputs, {}, changed)
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
            self._trusted[signature] = graph
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
        general = self._general.get(kind)
        if general is not None:
            yield general
        if len(self.fallbacks) >= PATIENCE:
            return
        dims = varying(batch_dims(inputs.tensors), shapes)
        if general is None or dims != general.dims:
            try:
                general = self._general[kind] = self._capture(inputs, dims)
            except CaptureError:
                if not any(dims):
                    raise
            else:
                yield general
        if any(dims):
            yield self._capture(inputs, tuple(frozenset() for _ in dims))

    def _capture(self, inputs: Inputs, dims: Dims) -> Graph:
        args, kwargs = inputs.call(inputs.tensors)
        return capture(self._model, args, kwargs, self._predict, dims=dims)

    def _warn(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.add(reason)
            text = f"no part of the model's forward is shared between edits (each costs a forward of its own): {reason}"
            warnings.warn(text, stacklevel=4)


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Return for each parameter and buffer, by its first name, one name for every module and attribute that hold it."""
    places: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    met: set[tuple[int, str]] = set()
    for prefix, module in walk_modules(model):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and (id(module), attribute) not in met:
                met.add((id(module), attribute))
                name = first.setdefault(id(tensor), f"{prefix}{attribute}")
                places.setdefault(name, []).append(f"{prefix}{attribute}")
    return places


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is not annotated
    """See whether Python reads a value from a tensor (`.item()`, `if mask.all():`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def _agrees(graph: Graph, inputs: Inputs, expected: Tensor) -> bool:
    args, kwargs = inputs.call(inputs.tensors)
    try:
        (replayed,) = (logits for _, logits in graph.run(args, kwargs, {"base": {}}))
    except Exception:  # shapes that a graph was not made for fail in any operator
        return False
    return same_bits(replayed, expected)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits; a NaN equals itself, -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def varying(dims: Dims, shapes: Sequence[Sequence[torch.Size]]) -> Dims:
    """Return `dims` and every dimension in which the shapes (of the same tensors in several batches) differ."""
    return tuple(
        d.union(i for i, sizes in enumerate(zip(*seen, strict=True)) if len(set(sizes)) > 1)
        for d, seen in zip(dims, zip(*shapes, strict=True), strict=True)
    )
