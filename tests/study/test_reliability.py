"""A run that is killed again and again comes to its end; no two are at work in one folder; nothing is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.atomic import locked, replaced_atomically
from neuronsurgery.study import data, experiments, models
from neuronsurgery.study.cli import main
from neuronsurgery.study.run import LOCK, Parts, RunFolder, Settings, at_work, delete_run
from neuronsurgery.study.seeds import refuse_other_files
from study.conftest import COUNTS
from study.little_study import tiny_resnet


def files_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


# --- parts ----------------------------------------------------------------------------------------------------------


def test_parts_are_kept_until_the_whole_is_written_and_never_used_for_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one", Settings(), data={"train": "a"})

    def interrupted() -> None:
        folder.parts("whole", [1]).keep({"a": (1, 2), "b": 0.1})
        folder.parts("whole", [1]).keep({"c": None})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.remember("whole", interrupted)
    kept = RunFolder(tmp_path / "one", Settings()).parts("whole", [1])
    assert (kept["a"], kept["b"], "c" in kept) == ([1, 2], 0.1, True)
    assert kept.of("b", lambda: pytest.fail("made again")) == 0.1
    elsewhere = RunFolder(tmp_path / "two", Settings(), data={"train": "b"})  # the same run of other images
    shutil.copytree(tmp_path / "one" / "parts", tmp_path / "two" / "parts")
    for others in (folder.parts("whole", [2]), folder.parts("other", [1]), elsewhere.parts("whole", [1])):
        assert "a" not in others
    assert elsewhere.remember("whole", lambda: 3) == 3
    assert files_in(tmp_path / "two") == {"run.json", "experiments/whole.json"}
    assert not (tmp_path / "two" / "parts").exists()


def test_a_damaged_part_is_made_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Settings())
    folder.parts("whole", 0).keep({"a": 1})
    for content in ("{", "[]", '{"depends on": 3}'):
        (tmp_path / "parts" / "whole" / "00000.json").write_text(content)
        assert "a" not in folder.parts("whole", 0)
    assert folder.parts("whole", 0).of("a", lambda: 2) == 2


class KilledError(BaseException):
    """As a kill: nothing in the program catches it."""


@contextmanager
def killed_after(parts: int, done: list[str]) -> Iterator[None]:
    """Within, a run is killed once it has written down so many parts; their names are added to `done`."""
    keep, last = Parts.keep, len(done) + parts

    def dying(self: Parts, kept: Mapping[str, Any]) -> None:
        keep(self, kept)
        done.append(f"{self._folder}: {sorted(kept)}")
        if len(done) == last:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "keep", dying)
        yield


REDONE = ("1a-train", "1f-train", "1g-train", "stage-2-random-pruned", "fragility-train", "fragility-mitigation")


@pytest.mark.xdist_group("whole run")
def test_a_run_that_is_killed_again_and_again_does_nothing_twice_and_comes_to_the_same_bytes(
    whole_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Callable[..., data.DataSet] = data.synthetic
    few = {"synthetic": lambda seed, counts=None: made(seed, counts=COUNTS)}
    monkeypatch.setattr("neuronsurgery.study.program.EMBEDDED", few)
    monkeypatch.setattr(models, "small_resnet", tiny_resnet)
    for name, value in (("FEWEST", 7), ("GROWTH", 1), ("SECONDS", 1e9)):  # parts of seven edits, however fast it is
        monkeypatch.setattr(experiments, name, value)
    path = shutil.copytree(whole_run[0], tmp_path / "run")
    for name in (*(f"experiments/{name}.json" for name in REDONE), "results.json", "table.csv", "report.html"):
        (path / name).unlink()
    command = ["study", "--quick", "--experiments", "1a", "1b", "1f", "1g", "--out", str(path)]
    done: list[str] = []
    kills = 0
    while not (path / "report.html").exists():
        try:
            with killed_after(10, done):
                assert main(command) == 0
        except KilledError:
            kills += 1
    assert kills == len(done) // 10 > 2
    assert len(set(done)) == len(done)
    assert {Path(each.partition(":")[0]).name for each in done} == set(REDONE)
    for name in ("results.json", "table.csv"):
        assert (path / name).read_bytes() == (whole_run[0] / name).read_bytes()
    assert files_in(path) == files_in(whole_run[0])
    assert not (path / "parts").exists()


# --- one run at a time ----------------------------------------------------------------------------------------------


def test_a_folder_in_which_a_run_is_at_work_is_refused_to_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    with at_work(path):
        RunFolder(path, Settings())
        message = rf"another run is at work in {path} \(process {os.getpid()}\): wait for its end or stop it .*--out"
        with pytest.raises(RuntimeError, match=message), at_work(path):
            pytest.fail("two at work")
        with pytest.raises(RuntimeError, match=message):
            delete_run(path)
        (path / LOCK).write_text("")
        with pytest.raises(RuntimeError, match=rf"at work in {path}: wait"), at_work(path):
            pytest.fail("two at work")
    assert files_in(path) == {"run.json"}
    (path / LOCK).write_text("123456789\n")  # of a run that was killed
    with at_work(path):
        assert (path / LOCK).read_text() == f"{os.getpid()}\n"
    (path / LOCK).touch()
    delete_run(path)
    assert not path.exists()


@pytest.mark.parametrize("seeds", ["1", "2"])
def test_a_study_holds_its_folders(seeds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, command = tmp_path / "runs", ["study", "--quick", "--data", "digits", "--stages", "1", "--seeds", seeds]
    own = [path, path / "seed-0"] if seeds == "2" else [path]
    for folder in own:
        for options in ([], ["--overwrite"]):
            with at_work(folder):
                before = files_in(path)
                assert main([*command, *options, "--out", str(path)]) == 1
                assert f"error: another run is at work in {folder} (process {os.getpid()})" in capsys.readouterr().err
                assert files_in(path) == before


def test_a_lock_that_a_kill_left_is_no_foreign_file(tmp_path: Path) -> None:
    for path in (tmp_path / "one", tmp_path / "seeds", tmp_path / "seeds" / "seed-0"):
        path.mkdir()
        (path / LOCK).touch()
    RunFolder(tmp_path / "one", Settings())
    refuse_other_files(tmp_path / "seeds", [0, 1])


# --- what kills leave -----------------------------------------------------------------------------------------------


def test_a_run_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Settings())
    left = [f"{name}.a1b2c3d4.part" for name in (".results.json", "checkpoints/.epoch-9.safetensors", "figures/.x.svg")]
    others = (".notes.txt.a1b2c3d4.part", ".results.json.mine", ".report-12345678/notes.txt", ".report-1/new/a.html")
    for name in (*left, *others, ".report-a1b2c3d4/new/report.html", ".report-a1b2c3d4/.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with replaced_atomically(tmp_path / "report.html") as writing, locked(tmp_path / "at work"):
        (tmp_path / ".report-9876543_").mkdir()
        with locked(tmp_path / ".report-9876543_" / LOCK):
            folder.remove_abandoned()
            assert files_in(tmp_path) == {*others, "run.json", writing.name, "at work", ".report-9876543_/.lock"}
