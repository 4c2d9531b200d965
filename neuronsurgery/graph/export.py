"""Capture: from a model's forward to a graph of torch operators."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from neuronsurgery.batches import Batch
from neuronsurgery.caches import collect_containers, give_contents_back
from neuronsurgery.copies import Runner
from neuronsurgery.errors import CaptureError, inline
from neuronsurgery.forward import default_predict, isolated_forward, random_state_kept
from neuronsurgery.graph.inputs import Dims, Inputs, batch_dims
from neuronsurgery.graph.replay import Graph
from neuronsurgery.graph.writes import AliasedWriteError, attribute, make_functional
from neuronsurgery.switches import KERNELS, undoing, without_mha_fastpath
from neuronsurgery.types import Predict

if TYPE_CHECKING:  # importing it takes as long as all of the library
    from torch.export import ExportedProgram


def captured(runner: Runner, batch: Batch, predict: Predict = default_predict) -> Graph:
    """Return the graph of one batch, after the model has run on it: what it keeps outside of itself are real tensors.

    Args:
        runner: the model, as a copy to run.
        batch: on the model's device.
        predict: the model's output -> logits.

    Raises:
        CaptureError: if the model cannot be captured, see `capture`.
    """
    with evaluating():
        isolated_forward(runner, batch)
    runner.attributes.restore()
    return capture(runner, batch.args, batch.kwargs, predict)


def capture(
    runner: Runner,
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
        runner: the model, as a copy to run.
        args: positional arguments, as of a batch.
        kwargs: keyword arguments.
        predict: the model's output -> logits.
        dims: the dimensions of the inputs' tensors that may vary; default the first of those that are per example (a
            batch of one is captured as two, since sizes of one become constants). Empty sets: these shapes only.

    Raises:
        CaptureError: if the model cannot be captured: its Python depends on the values of tensors, it uses something
            that has no operator, or has hooks.

    Example:
        >>> from neuronsurgery.copies import make_runner
        >>> from neuronsurgery.surveys import survey
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph = capture(make_runner(survey(model)), (torch.ones(4, 2),))
        >>> graph
        Graph(8 nodes, 4 of 4 parameters used)
        >>> [str(graph.nodes[slot].target) for slot in graph.tainted(["0.weight"])]
        ['aten.linear.default', 'aten.relu.default', 'aten.linear.default']
    """
    inputs = Inputs.of(args, kwargs or {})
    inputs.refuse_objects()
    _refuse_hooks(runner.model)
    if dims is None:
        dims = batch_dims(inputs.tensors)
    forward = _Forward(runner.model, predict, inputs)
    # One at a time: export has state of the whole process, and so have the warnings and streams that are silenced.
    with KERNELS.changing(), evaluating(), _attributes_kept(runner.model):
        program = _export(forward, inputs.tensors, dims)
        try:
            make_functional(program.graph_module)
        except AliasedWriteError:
            # Only then: it takes as long as the export did, and some programs cannot be functionalised.
            program = _functionalise(program)
            make_functional(program.graph_module, strict=True)
    return _graph(program, forward, runner, dims)


IDLE_HOOKS = ("transformers.utils.output_capturing",)
"""Where hooks come from that note outputs for somebody who asks for them, stay afterwards, and change nothing."""

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

    @override
    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        args, kwargs = self.inputs.call(tensors)
        logits = self.predict(self.model(*args, **kwargs))
        if not isinstance(logits, Tensor):
            raise TypeError(f"predict must return the logits, a tensor, not a {type(logits).__name__}")
        return logits


@contextmanager
def evaluating() -> Iterator[None]:
    """Run as `evaluate` does, and outside of the caller's inference mode, whose tensors have no version counters."""
    with without_mha_fastpath(), torch.inference_mode(False), torch.no_grad():
        yield


def _refuse_hooks(model: nn.Module) -> None:
    hooked = [name or "the model" for name, module in model.named_modules() if _hooks(module)]
    if hooked:
        raise CaptureError(f"forward hooks would not be called in a replay; there are some on {inline(hooked, 3)}")


def _hooks(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) not in IDLE_HOOKS for hook in hooks)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give the modules their attributes back, and the containers among these their content.

    What the forward stores while it is traced are tensors without values; older releases of torch leave them there.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    contents: dict[int, tuple[Any, Any]] = {}
    for values in attributes.values():
        collect_containers(list(values.values()), contents, entries=False)
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        give_contents_back(contents)


def _export(forward: _Forward, tensors: Sequence[Tensor], dims: Dims) -> ExportedProgram:
    """Return the exported program, in torch's training form: operators as the model calls them, writes included."""
    from torch.export import Dim, export

    # Copies: export marks the tensors that it is given, and leaves the marks where it fails.
    twice = [
        torch.cat([tensor, tensor]) if 0 in d and len(tensor) == 1 else tensor.clone()
        for tensor, d in zip(tensors, dims, strict=True)
    ]
    # AUTO, not DYNAMIC: a size that the model's code makes a constant is no error, the check finds it.
    shapes = [dict.fromkeys(sorted(d), Dim.AUTO) for d in dims]
    handled = sys.exc_info()[1]
    with _quiet(), random_state_kept(tensors):
        try:
            program: ExportedProgram = export(forward, (twice,), dynamic_shapes=(shapes,), strict=False)
            return program
        except Exception as error:
            _refuse_interrupted(error, handled)
            raise CaptureError(f"torch.export refused it: {_first_line(error)}") from error


def _functionalise(program: ExportedProgram) -> ExportedProgram:
    handled = sys.exc_info()[1]
    with _quiet():
        try:
            functional: ExportedProgram = program.run_decompositions({})
            return functional
        except Exception as error:
            _refuse_interrupted(error, handled)
            raise CaptureError(f"its writes in place could not be undone: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.export's advice, and the graph that it prints where it fails: both are for those who deploy it.

    Both are the whole process's: other threads go on to write to standard error, and may redirect it meanwhile.
    """
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    errors, filters = sys.stderr, warnings.filters

    def restore() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        muted.thread = None  # somebody may have kept it, to put it back later
        if sys.stderr is muted:
            sys.stderr = errors
        # Not catch_warnings, which would put back a list that another thread has replaced meanwhile.
        for each in (filters, warnings.filters):
            for ours in [one for one in each if getattr(one[3], "pattern", one[3]) == ANY_MODULE]:
                each.remove(ours)  # type: ignore[attr-defined]  # a list; declared as a sequence

    muted: Any = _Muted(errors, threading.get_ident())
    with undoing(restore):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=ANY_MODULE)
        sys.stderr = muted
        yield


class _Muted:
    """Standard error, without what one thread writes to it."""

    def __init__(self, stream: Any, thread: int | None) -> None:
        self.stream, self.thread = stream, thread

    def write(self, text: str) -> int:
        """Write a text, unless it is of the thread that is muted."""
        if threading.get_ident() == self.thread:
            return len(text)
        written: int = self.stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


ANY_MODULE = "(?:while neuronsurgery captures)?"
"""A pattern that every name begins with, and that nobody else gives."""


def _refuse_interrupted(error: BaseException | None, handled: BaseException | None) -> None:
    """Raise an interrupt that torch has lost: one that comes within a mode of its own may end as another exception.

    Args:
        error: what came.
        handled: what the caller was dealing with before, which is behind everything that comes after.
    """
    while error is not None and error is not handled:
        if isinstance(error, KeyboardInterrupt):
            raise error
        error = error.__context__


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# From an exported program to a graph


def _graph(program: ExportedProgram, forward: _Forward, runner: Runner, dims: Dims) -> Graph:
    from torch.export.graph_signature import InputKind

    signature, module = program.graph_signature, program.graph_module
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    output = _logits(program)
    first_names = {
        id(runner.model.get_parameter(place)): name for name, places in runner.places.items() for place in places
    }
    parameters: dict[str, list[fx.Node]] = {name: [] for name in runner.parameters}
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
            constants[node] = attribute(module, node)
    nodes = tuple(node for node in module.graph.nodes if node in live.union(inputs))
    _drop_dead(module.graph, output, live)
    return Graph(
        nodes,
        {name: tuple(node for node in found if node in live) for name, found in parameters.items()},
        {name: node for name, node in buffers.items() if node in live},
        tuple(inputs),
        output,
        {node: value for node, value in constants.items() if node in live},
        runner.parameters,
        dims,
    )


def _logits(program: ExportedProgram) -> fx.Node:
    from torch.export.graph_signature import OutputKind

    results = program.graph.output_node().args[0]
    pairs = zip(results, program.graph_signature.output_specs, strict=True)
    logits = [node for node, spec in pairs if spec.kind == OutputKind.USER_OUTPUT]
    assert len(logits) == 1 and isinstance(logits[0], fx.Node), "_Forward returns one tensor"
    return logits[0]


def _held(spec: Any, program: ExportedProgram, forward: _Forward) -> Tensor:
    from torch.export.graph_signature import InputKind

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
