"""What several processes agree on, and switches of the whole process that several threads may want at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def exchange(process_group: dist.ProcessGroup | None, error: Exception | None, payload: Any) -> list[Any]:
    """Return what every rank gives, or raise on all of them if one has an error."""
    if process_group is None:
        if error is not None:
            raise error
        return [payload]
    said: list[Any] = [None] * dist.get_world_size(process_group)
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(said, (text, payload), group=process_group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(said) if text is not None]
    if failed:
        raise RuntimeError("another process failed, so none has a result:\n" + "\n".join(failed))
    return [payload for _, payload in said]


def agreed(process_group: dist.ProcessGroup | None, make: Callable[[], T], what: Callable[[T], Any], error: str) -> T:
    """Return what `make` gives once every rank has made one, and all of them are alike.

    Args:
        process_group: the ranks, or None.
        make: what each rank makes; if it fails on one, it is raised on all.
        what: what has to be equal on all ranks.
        error: what to say if it is not.

    Raises:
        RuntimeError: if another rank failed.
        ValueError: if the ranks made different things.
    """
    made: list[T] = []
    failure = None
    try:
        made.append(make())
    except Exception as raised:
        failure = raised
    said = exchange(process_group, failure, what(made[0]) if made else None)
    if any(other != said[0] for other in said):
        raise ValueError(error)
    return made[0]


def add_up(process_group: dist.ProcessGroup | None, tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the ranks, in place."""
    if process_group is not None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=process_group)


class _Switch:
    """A switch of the whole process: turned off while anyone needs it off, and then as it was."""

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._holders = 0
        self._before = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._before = self._read()
                self._write(False)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._write(self._before)


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
    with _MHA_FASTPATH.off():
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Turn cuDNN off, which cannot differentiate a recurrent layer in evaluation mode, and restore it afterwards."""
    return _CUDNN.off()
