"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

KEY = "neuronsurgery"
"""The entry of a safetensors file's metadata in which the library says what is in it."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in its folder and rename it: it is there whole or not at all.

    Raises:
        OSError: if the folder is not there or cannot be written to; nothing is left behind.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`, which takes its place, on the disk for good, at the end.

    For writers that need not have the whole file in memory. An error within leaves nothing behind but the old file; a
    process that is killed within leaves the temporary file, whose name is that of the file between a "." and a suffix.

    Raises:
        OSError: if the folder is not there or cannot be written to; nothing is left behind.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to: make it first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads; give what an ordinary open would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
