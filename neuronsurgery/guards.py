"""Writes into tensors that are somebody else's, stopped before they happen.

Only while code runs that is not known to leave them alone: it costs some microseconds for each operator.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from typing_extensions import Self, override

from neuronsurgery.spread import local


def is_guarded() -> bool:
    """Return whether a guard watches this thread."""
    return any(isinstance(mode, Guard) for mode in _get_current_dispatch_mode_stack())


def guard_edited(tensor: Tensor) -> None:
    """Have the guard that watches this thread stop writes into a tensor that is computed anew at every access."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Guard):
            mode.add("an edited tensor, which is computed anew at every access", tensor)


def guard_gathered(tensor: Tensor) -> None:
    """Have the same done for a tensor that is gathered at every access, without keeping it."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Guard):
            mode.watch("a gathered tensor, which is computed anew at every access", tensor)


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is not annotated
    """Stop whatever would write into some tensors' memory, by whatever name; optimisers may.

    `.data` that is assigned cannot be stopped: it is given back in the end.

    Args:
        tensors: by name.
        message: of the error, with `{}` for the name.

    Raises:
        RuntimeError: at the first operator that would write into one.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, Tensor], message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._message = message
        self._names: dict[int, str] = {}
        self._held: list[tuple[str, Tensor, Tensor]] = []
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Stop writes into one more tensor."""
        for storage in _storages(tensor):
            self._names.setdefault(storage, name)
        # The second is the tensor as it is: it keeps the memory, and with it the number that stands for it.
        self._held.append((name, tensor, tensor.detach()))

    def watch(self, name: str, tensor: Tensor) -> None:
        """Stop writes into one more tensor for as long as it lives."""
        for storage in _storages(tensor):
            self._names[storage] = name
            weakref.finalize(tensor, self._names.pop, storage, None)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            written = _written(func, args, kwargs or {})
            name = next((self._names[key] for t in written for key in _storages(t) if key in self._names), None)
            if name is not None and not _within_optimizer():
                raise RuntimeError(self._message.format(name))
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have functions that are compiled run as they would without a guard."""
        return True

    # Not torch's own, which set flags of the whole process, in whatever order threads come and go.
    @override
    def __enter__(self) -> Self:
        _push_mode(self)
        return self

    @override
    def __exit__(self, exc_type: Any, exc: Any, trace: Any) -> None:
        _pop_mode()
        moved = [(name, t, before) for name, t, before in self._held if list(_storages(t)) != list(_storages(before))]
        for _, tensor, before in moved:
            tensor.data = before
        if moved and exc is None:
            raise RuntimeError(self._message.format(moved[0][0]))


def _storages(tensor: Tensor) -> Iterable[int]:
    """Return the number of a tensor's memory, in a tuple; none where it has none of its own (sparse, wrapped)."""
    try:
        return (local(tensor).untyped_storage()._cdata,)
    except (RuntimeError, NotImplementedError):
        return ()


def _written(operator: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    written: list[Tensor] = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    return written


def _within_optimizer() -> bool:
    """Return whether an optimiser's step is running: that is what it is for."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Optimizer):
            return True
        frame = frame.f_back
    return False
