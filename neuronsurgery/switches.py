"""State of the thread and of the process that a call changes for a while, and that is given back however it ends.

A context manager gives back what it changed, unless an interrupt comes between two lines of its own. So whatever is to
be undone is noted until it is, and `restoring`, around every public function, undoes what is left.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch._C import (
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ForceDispatchKeyGuard,
    _len_torch_function_stack,
    _pop_torch_function_stack,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode
from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")


class _Noted(threading.local):
    """What is to be undone in this thread, the last first."""

    def __init__(self) -> None:
        self.undo: list[_Once] = []


_NOTED = _Noted()


class _Once:
    """Something to be undone, and only once: a context manager that was cut short is closed when nobody knows."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def __call__(self) -> None:
        if self.action is not None:
            self.action()
            self.action = None
        if self in _NOTED.undo:
            _NOTED.undo.remove(self)


@contextlib.contextmanager
def undoing(action: Callable[[], None]) -> Iterator[None]:
    """Do something at the end, whatever happens; in time, too, where an interrupt cuts this context short.

    Args:
        action: what to do; doing it twice at once must be doing it once.
    """
    undo = _Once(action)
    _NOTED.undo.append(undo)
    try:
        yield
    finally:
        undo()


def finally_do(action: Callable[[], None]) -> None:
    """Do something when the public function that is running ends, whatever happens.

    Args:
        action: what to do; doing it twice must be doing it once.
    """
    _NOTED.undo.append(_Once(action))


def restoring(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which gives back the state of its thread and of the process even if it is interrupted."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        grad, noted, modes = torch.is_grad_enabled(), len(_NOTED.undo), len(_get_current_dispatch_mode_stack())
        functions = _len_torch_function_stack()
        keys = _dispatch_tls_local_include_set(), _dispatch_tls_local_exclude_set()
        try:
            # What torch's own modes, entered while a forward is captured, have told its dispatcher.
            with _ForceDispatchKeyGuard(*keys):
                return _call(function, *args, **kwargs)
        finally:
            for _ in _get_current_dispatch_mode_stack()[modes:]:
                _pop_mode()
            for _ in range(functions, _len_torch_function_stack()):
                _pop_torch_function_stack()
            if torch.is_grad_enabled() != grad:
                torch.set_grad_enabled(grad)
            for undo in reversed(_NOTED.undo[noted:]):
                undo()

    return run


def _call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function; if it is interrupted, have the guards that torch holds in its frames end now, and not later.

    They would set the state of the thread back to what they found, whenever somebody lets the exception go.
    """
    try:
        return function(*args, **kwargs)
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)
        raise


class _Switch:
    """A switch of the whole process: turned off while anyone needs it off, and then as it was."""

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._holders: set[object] = set()
        self._before = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        holder = object()
        with undoing(lambda: self._release(holder)):
            with self._lock:
                if not self._holders:
                    self._before = self._read()
                self._holders.add(holder)
                self._write(False)
            yield

    def _release(self, holder: object) -> None:
        with self._lock:
            if holder in self._holders:
                if len(self._holders) == 1:
                    self._write(self._before)
                self._holders.remove(holder)


class _Kernels:
    """Which kernels torch runs is set for the whole process: nobody computes while somebody has set it otherwise."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._computing: set[object] = set()
        self._changing: object | None = None

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Compute, beside others who do."""
        own = object()
        with undoing(lambda: self._leave(own)):
            with self._condition:
                self._condition.wait_for(lambda: self._changing is None)
                self._computing.add(own)
            yield

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Be alone; not within `steady` of the same thread."""
        own = object()
        with undoing(lambda: self._leave(own)):
            with self._condition:
                self._condition.wait_for(lambda: self._changing is None and not self._computing)
                self._changing = own
            yield

    def _leave(self, own: object) -> None:
        with self._condition:
            self._computing.discard(own)
            if self._changing is own:
                self._changing = None
            self._condition.notify_all()


KERNELS = _Kernels()
"""torch.export turns oneDNN, NNPACK and cuDNN off while it traces, and other kernels round otherwise."""


def _set_cudnn(enabled: bool) -> None:
    torch.backends.cudnn.enabled = enabled


_CUDNN = _Switch(lambda: torch.backends.cudnn.enabled, _set_cudnn)
_MHA_FASTPATH = _Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)


@contextlib.contextmanager
def without_mha_fastpath() -> Iterator[None]:
    """Turn torch's fast path of multi-head attention off, whose last bits differ, and restore it afterwards.

    Casts of weights that autocast has kept meanwhile are forgotten too: made without gradient, they would cut the
    caller's next backward pass off.
    """
    with _MHA_FASTPATH.off(), undoing(torch.clear_autocast_cache):
        yield


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Turn cuDNN off, which cannot differentiate a recurrent layer in evaluation mode, and restore it afterwards."""
    return _CUDNN.off()
