"""Gradient norms of many small groups in one pass: only the gradients of the weights are taken group by group.

A joint batch holds the examples of several groups, each a segment of it. The model runs forward and backward once, by
the sum of the groups' mean losses. Where an operator reads a scored weight, the backward pass computes the weight's
gradient for each segment by itself, and keeps its norms alone.

Whether a model can be run so is seen, not assumed: one group also runs alone, and its norms must be the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from neuronsurgery.batches import Batch, signature
from neuronsurgery.differentiation import differentiated, is_float16
from neuronsurgery.independence import tolerance
from neuronsurgery.layers import is_squared_wide
from neuronsurgery.layouts import Layout
from neuronsurgery.loaders import Regrouped
from neuronsurgery.scores import norms
from neuronsurgery.types import Group

Forward: TypeAlias = Callable[[Batch, contextlib.AbstractContextManager[Any]], tuple[Tensor, Tensor]]
"""A batch and a context in which the model and its loss are to run -> logits and losses."""

Collect: TypeAlias = Callable[[str, Callable[[slice], Tensor]], None]
"""Takes the name of a weight and what gives the weight's gradient for some of the examples."""

AT_ONCE = 2**18
"""Entries of gradients up to which the norms of several are taken at once: calls take longer than what they compute."""


# Operators that read a weight


@dataclass(frozen=True)
class _Linear:
    """y = x W^T + b, x of shape (n, ..., inputs)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient to the input."""
        return gradient @ weight

    def of_weight(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient to the weight."""
        return gradient.flatten(0, -2).T @ x.flatten(0, -2)


@dataclass(frozen=True)
class _Convolution:
    """A convolution of any number of dimensions, or a transposed one."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self._options)

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, [True, False, False])[0]

    def of_weight(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, [False, True, False])[1]

    @property
    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.ops.aten.convolution_backward(gradient, x, weight, None, *self._options, wanted)
        return found


_Operator: TypeAlias = _Linear | _Convolution
_Read: TypeAlias = tuple[_Operator, Tensor, Tensor, Tensor | None]
"""An operator, its input, weight and bias."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Read:
    return _Linear(), input, weight, bias


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Read | None:
    count = weight.dim() - 2
    spacing = _each(dilation, count)
    if isinstance(padding, str):
        both = [0 if padding == "valid" else d * (k - 1) for d, k in zip(spacing, weight.shape[2:], strict=True)]
        if any(size % 2 for size in both):  # "same" pads one side more
            return None
        padding = [size // 2 for size in both]
    operator = _Convolution(_each(stride, count), _each(padding, count), spacing, False, [0] * count, groups)
    return operator, input, weight, bias


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Read:
    count = weight.dim() - 2
    sizes = [_each(value, count) for value in (stride, padding, dilation, output_padding)]
    return _Convolution(sizes[0], sizes[1], sizes[2], True, sizes[3], groups), input, weight, bias


def _each(value: int | Sequence[int], count: int) -> list[int]:
    """Return one number for each dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


_READERS: dict[Any, Callable[..., _Read | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
}


class _Segmented(torch.autograd.Function):
    """An operator whose weight gets no gradient: it is handed on instead, for whatever examples are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operator: _Operator,
        collect: Callable[[Callable[[slice], Tensor]], None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operator, ctx.collect = operator, collect
        return operator(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operator: _Operator = ctx.operator
        ctx.collect(lambda part: operator.of_weight(gradient[part], x[part], weight))
        of_input = operator.of_input(gradient, x, weight) if ctx.needs_input_grad[0] else None
        return of_input, None, None, None, None


# Who reads the weights


class _Unfit(Exception):  # noqa: N818  # no error: the groups are run one by one
    """A weight is read in a way in which its gradients cannot be had segment by segment."""


class _Reading(TorchFunctionMode):
    """See that each weight is read at most once, by an operator whose input has the examples first.

    Args:
        leaves: the scored weights, by name.
        examples: how many there are.
        collect: what is given the gradients for segments; None leaves the operators as they are.

    Attributes:
        read: the names of the weights that were read.
    """

    def __init__(self, leaves: Mapping[str, Tensor], examples: int, collect: Collect | None) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._examples, self._collect = examples, collect
        self._unfit = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not self._has_leaf((*args, *kwargs.values())):
            return func(*args, **kwargs)
        read = _READERS[func](*args, **kwargs) if func in _READERS else None
        if read is None or not self._fits(*read[1:]):
            result = func(*args, **kwargs)
            if _is_differentiable(result):  # the shape or the dtype of a weight may be read by anybody
                self._refuse()
            return result
        operator, x, weight, bias = read
        name = self._names[id(weight)]
        self.read.add(name)
        if self._collect is None:
            return func(*args, **kwargs)
        collect = self._collect
        return _Segmented.apply(x, weight, bias, operator, lambda of: collect(name, of))

    def _has_leaf(self, values: Sequence[Any]) -> bool:
        return any(
            self._has_leaf(value) if isinstance(value, tuple | list) else id(value) in self._names for value in values
        )

    def _fits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        return (
            id(weight) in self._names
            and self._names[id(weight)] not in self.read
            and (bias is None or not bias.requires_grad)
            and type(x) is Tensor
            and x.layout == torch.strided
            and x.size(0) == self._examples
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _refuse(self) -> None:
        self._unfit = True
        raise _Unfit

    def refuse_others(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Raise if another reader of a weight was seen, or a weight has a gradient that none of those read can give.

        Raises:
            _Unfit: if so.
        """
        expected = set() if self._collect else self.read
        if self._unfit or any(g is not None and name not in expected for name, g in gradients.items()):
            raise _Unfit


def _is_differentiable(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return any(map(_is_differentiable, result))
    return isinstance(result, Tensor) and result.requires_grad


# Norms


@dataclass(frozen=True, eq=False)
class _Found:
    """What came of some groups that ran at once: their norms, shape (G, M), which weights were read and reached."""

    values: Tensor
    read: set[str]
    reached: set[str]
    tolerance: float = 0.0


class Segments:
    """The groups of one call that share batches.

    Args:
        leaves: the scored weights by the names of the layers; only these get a gradient.
        layout: the scored layers.
        forward: runs the model on a batch, its loss, and what else is looked at.
        graph: a context around each forward pass and its backward pass.

    Attributes:
        done: each group that shared a batch, with its norms, float32, shape (M,), and its number of examples.
        reached: the names of the weights that a gradient came to.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        layout: Layout,
        forward: Forward,
        graph: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.done: dict[Group, tuple[Group, Tensor, int]] = {}
        self.reached: set[str] = set()
        self._leaves, self._layout, self._forward, self._graph = leaves, layout, forward, graph
        self._trusted: dict[Hashable, set[str]] = {}
        self._fit = True

    def left(self, batches: Iterable[Regrouped]) -> Iterator[tuple[Group, Batch, bool]]:
        """Yield (group, batch, whether its last) of what has to run by itself; what need not is done meanwhile.

        Args:
            batches: see `regrouped_to_the_last`.
        """
        for groups, joint, last in batches:
            if len(groups) > 1 and self._fit:
                try:
                    found = self._norms(list(groups.values()), joint)
                except Exception:  # what is wrong with an example shows again where its group runs alone, and is named
                    self._fit = False
                else:
                    own = zip(groups.items(), found.values, strict=True)
                    self.done |= {group: (group, row, len(batch)) for (group, batch), row in own}
                    self.reached |= found.reached
                    continue
            yield from ((group, batch, last) for group, batch in groups.items())

    def _norms(self, batches: Sequence[Batch], joint: Batch) -> _Found:
        """Return the norms of groups that share a batch.

        Raises:
            _Unfit: if they cannot share one.
        """
        kind = signature(joint)
        if kind in self._trusted:
            found = self._together(batches, joint)
        else:
            smallest = min(reversed(range(len(batches))), key=lambda place: len(batches[place]))
            alone = self._alone(batches[smallest])
            found = self._together(batches, joint)
            if not self._agree(found.values[smallest], alone.values[0], found.tolerance):
                raise _Unfit
            self._trusted[kind] = alone.read
        if not found.read <= self._trusted[kind]:  # an expert, say, that no example of the group that ran alone came to
            raise _Unfit
        return found

    def _alone(self, batch: Batch) -> _Found:
        """Return the norms of one group, computed as those of any other batch."""
        with self._graph():
            reading = _Reading(self._leaves, len(batch), None)
            logits, losses = self._forward(batch, reading)
            gradients = differentiated(losses, logits, list(self._leaves.values()), retain=False)
        named = dict(zip(self._leaves, gradients, strict=True))
        reading.refuse_others(named)
        return _Found(norms(named, self._layout)[None], reading.read, set())

    def _together(self, batches: Sequence[Batch], joint: Batch) -> _Found:
        """Return the norms of groups that share a batch, by one pass."""
        collector = _Collector(self._layout, list(map(len, batches)))
        leaves = list(self._leaves.values())
        with self._graph():
            reading = _Reading(self._leaves, len(joint), collector)
            logits, losses = self._forward(joint, reading)
            if is_float16(logits, leaves):  # of which gradients are scaled
                raise _Unfit
            gradients = collector.backward(losses, leaves)
        reading.refuse_others(dict(zip(self._leaves, gradients, strict=True)))
        return _Found(collector.values, reading.read, collector.reached, tolerance(logits, leaves))

    def _agree(self, row: Tensor, other: Tensor, close: float) -> bool:
        """Return whether norms differ by no more than rounding, relative to the largest of their layer."""
        for layer, start in self._layout.starts.items():
            a, b = (values[start : start + layer.count] for values in (row, other))
            if layer.count and not bool((a - b).abs().max() <= close * torch.maximum(a, b).max()):
                return False
        return True


class _Collector:
    """The norms of each segment, as the backward pass comes to the weights.

    Args:
        layout: the scored layers.
        counts: the number of examples of each segment.

    Attributes:
        values: the norms, float32, shape (G, M), on the CPU.
        reached: the names of the weights that a gradient came to.
    """

    def __init__(self, layout: Layout, counts: Sequence[int]) -> None:
        self.values = torch.zeros(len(counts), layout.count, dtype=torch.float32, device="cpu")
        self.reached: set[str] = set()
        self._spans = {layer.parameter: (layer, start) for layer, start in layout.starts.items()}
        self._counts = torch.tensor(counts, device="cpu")
        self._parts = [slice(stop - count, stop) for stop, count in zip(accumulate(counts), counts, strict=True)]
        self._backward = False

    def backward(self, losses: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Differentiate the sum of the mean losses of the segments; return what gradients leaves have all the same."""
        if not losses.requires_grad:
            return [None] * len(leaves)
        self._backward = True
        counts = self._counts.repeat_interleave(self._counts).to(losses)
        return torch.autograd.grad((losses / counts).sum(), leaves, allow_unused=True)

    def __call__(self, name: str, gradient: Callable[[slice], Tensor]) -> None:
        """Take the norms of a weight's gradients, small ones several at a time.

        Raises:
            _Unfit: if these are not the gradients of the losses.
        """
        if not self._backward:  # a backward pass of the model's own
            raise _Unfit
        self.reached.add(name)
        layer, start = self._spans[name]
        columns = self.values[:, start : start + layer.count]
        at_once = max(1, AT_ONCE // max(1, math.prod(layer.shape)))
        for at in range(0, len(self._parts), at_once):
            gradients = [gradient(part) for part in self._parts[at : at + at_once]]
            if all(map(is_squared_wide, gradients)):
                columns[at : at + at_once] = torch.func.vmap(layer.lengths)(torch.stack(gradients))
            else:
                columns[at : at + at_once] = torch.stack(list(map(layer.norms, gradients)))
