"""Files that are there whole or not at all, and files that one process at a time holds."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

KEY = "neuronsurgery"
"""The entry of a safetensors file's metadata in which the library says what is in it."""

TEMPORARY: Final = ".part"
"""The end of a temporary file's name, which is that of the file, between a "." and eight random letters before it."""

_HAS_FLOCK = importlib.util.find_spec("fcntl") is not None  # not so on Windows
_FAR: Final = 2**30  # a byte that no lock file has: on Windows what is locked cannot be read


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

    For writers that need not have the whole file in memory. An error within leaves nothing behind but the old file. A
    process that is killed within leaves the temporary file, which the next one that writes `path` removes: it is locked
    for as long as its writer lives, so that several may write at once, and the last to end counts.

    Raises:
        OSError: if the folder is not there or cannot be written to; nothing is left behind.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to: make it first")
    remove_abandoned(path.parent, glob.escape(path.name))
    with _temporary_beside(path) as temporary:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads; give what an ordinary open would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a new file, locked by this process until it is renamed within; after an error it is removed."""
    handle, name = _locked_temporary(path)
    try:
        yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _locked_temporary(path: Path) -> tuple[int | None, str]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        if not _HAS_FLOCK:  # an open file cannot be renamed on Windows: nothing is locked, and nothing is removed
            os.close(handle)
            return None, name
        # Whoever looks for abandoned files may have found this one between its making and its locking.
        if _lock_if_possible(handle) and _is_named(handle, name):
            return handle, name
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the temporary files of writers that were killed; those of writers at work stay, and all other files do.

    Where there are no locks (on Windows, on some network file systems) nobody can tell, and nothing is removed.

    Args:
        folder: the folder.
        pattern: of the files that were written, below the folder, such as `checkpoints/epoch-*.safetensors`.
    """
    if not _HAS_FLOCK:
        return
    written = Path(pattern)
    for file in folder.glob(str(written.with_name(f".{written.name}.????????{TEMPORARY}"))):
        with contextlib.suppress(OSError):  # gone meanwhile, somebody else's, or of a file system without locks
            handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(handle):
                    file.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO | None]:
    """Yield the file `path`, opened and locked by this process; None where another process has it locked.

    It is made where it is missing, and removed at the end. The operating system takes the lock back when the process
    ends, however it ends: the file that a killed one leaves locks nothing. Where the file system has no locks, there is
    no other either.

    Raises:
        OSError: if the file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(handle, "r+b", buffering=0) as file:
            if not _lock_if_possible(handle):
                yield None
                return
            if not _is_named(handle, path):
                continue  # the process that had it locked removed it before this one locked it
            try:
                yield file
            finally:
                with contextlib.suppress(PermissionError):  # an open file cannot be removed on Windows: it may stay
                    path.unlink(missing_ok=True)
            return


def _lock_if_possible(handle: int) -> bool:
    """Return whether no other process has locked a file; True without a lock where there are none."""
    try:
        return _lock(handle)
    except OSError:
        return True


def _lock(handle: int) -> bool:
    """Return whether an open file is locked for this process from now on, until it is closed.

    Raises:
        OSError: if its file system has no locks.
    """
    if _HAS_FLOCK:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    windows = importlib.import_module("msvcrt")
    os.lseek(handle, _FAR, os.SEEK_SET)
    try:
        windows.locking(handle, windows.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True


def _is_named(handle: int, path: str | Path) -> bool:
    """Return whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
