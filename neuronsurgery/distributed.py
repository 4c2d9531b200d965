"""What several processes agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from neuronsurgery.serving import current_service

T = TypeVar("T")


def exchange(process_group: dist.ProcessGroup | None, error: Exception | None, payload: Any) -> list[Any]:
    """Return what every rank gives, or raise on all of them if one has an error."""
    if process_group is None:
        if error is not None:
            raise error
        return [payload]
    if (service := current_service()) is not None:
        service.rest()
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
