"""Files that are there whole or not at all: killed, at the same time as others, and where nobody can lock."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from neuronsurgery import atomic
from neuronsurgery.atomic import locked, remove_abandoned, replaced_atomically, write_atomically

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in forks"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # from Python 3.12 on
]


def killed_in(work: Callable[[], None]) -> None:
    """Do some work in a process of its own, which ends within it as if it were killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)  # the work did not kill its process
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(path: Path, content: bytes = b"half") -> None:
    def write() -> None:
        with replaced_atomically(path) as temporary:
            temporary.write_bytes(content)
            die()

    killed_in(write)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a[1].bin"  # whose name is a pattern, too
    others = [
        f".{path.name}.original",
        f".{path.name}.12345678",
        f".{path.name}.toolong99.part",
        ".a1.bin.12345678.part",
    ]
    for other in others:
        (tmp_path / other).touch()
    killed_while_writing(path)
    killed_while_writing(tmp_path / "b.bin")
    assert len(names(tmp_path)) == len(others) + 2
    assert not path.exists()
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    (left,) = set(names(tmp_path)) - {*others, path.name}
    assert left.startswith(".b.bin.")
    remove_abandoned(tmp_path, "*.bin")
    assert set(names(tmp_path)) == {*others[:3], path.name}  # of .a1.bin.12345678.part nobody is the writer


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_a_kill_at_any_step_leaves_the_old_file_and_the_next_write_nothing_but_the_new(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def write() -> None:
        monkeypatch.setattr(os, call, lambda *_, **__: die())
        write_atomically(path, b"new")

    killed_in(write)
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    write_atomically(path, b"new")
    assert names(tmp_path) == ["a.bin"]


def test_two_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replaced_atomically(path) as first:
        first.write_bytes(b"first")
        with replaced_atomically(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
        child = os.fork()
        if child == 0:
            write_atomically(path, b"third")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.read_bytes() == b"third"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


def test_a_temporary_file_that_was_taken_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = atomic.tempfile.mkstemp, []

    def seen_before_it_was_locked(**options: object) -> tuple[int, str]:
        handle, name = make(**options)  # type: ignore[call-overload]
        made.append(name)
        if len(made) == 1:
            remove_abandoned(tmp_path, "a.bin")
        return handle, name

    monkeypatch.setattr(atomic.tempfile, "mkstemp", seen_before_it_was_locked)
    write_atomically(tmp_path / "a.bin", b"whole")
    assert len(made) == 2
    assert names(tmp_path) == ["a.bin"]


def test_a_link_in_the_place_of_a_temporary_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / ".a.bin.12345678.part").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "a.bin", b"")
    assert names(tmp_path) == [".a.bin.12345678.part", "a.bin", "mine"]


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def hold() -> None:
        with locked(path) as held:
            assert held is not None
            die()

    killed_in(hold)
    assert path.exists()
    with locked(path) as held:
        assert held is not None
        held.write(b"7")
        with locked(path) as second:
            assert second is None
        assert path.read_bytes() == b"7"
    assert names(tmp_path) == []


def test_a_lock_file_that_was_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock, asked = tmp_path / "lock", atomic._lock, []

    def removed_before(handle: int) -> bool:
        if not asked:
            path.unlink()  # by the one that held it, when its work was done
        asked.append(handle)
        return lock(handle)

    monkeypatch.setattr(atomic, "_lock", removed_before)
    with locked(path) as held:
        assert held is not None
        assert os.path.samestat(os.fstat(held.fileno()), path.stat())
    assert len(asked) == 2


def test_where_there_are_no_locks_files_are_written_and_none_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    killed_while_writing(tmp_path / "a.bin")
    monkeypatch.setattr("fcntl.flock", unsupported)
    write_atomically(tmp_path / "a.bin", b"whole")
    assert len(names(tmp_path)) == 2
    with locked(tmp_path / "lock") as held:
        assert held is not None


def test_windows_has_locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its module `msvcrt` is documented; a byte that a lock file does not have is locked."""
    places: list[int] = []

    def locking(handle: int, mode: int, size: int) -> None:
        if places:
            raise OSError(13, "Permission denied")
        places.append(os.lseek(handle, 0, os.SEEK_CUR))

    monkeypatch.setattr(atomic, "_HAS_FLOCK", False)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with locked(tmp_path / "lock") as held:
        assert held is not None
        held.write(b"7")
        with locked(tmp_path / "lock") as second:
            assert second is None
        assert (tmp_path / "lock").read_bytes() == b"7"
    assert places == [2**30]
    write_atomically(tmp_path / "a.bin", b"whole")
    remove_abandoned(tmp_path, "*")
    assert names(tmp_path) == ["a.bin"]
