"""The run folder: killed, full, foreign or damaged, a run is never half-written and goes on to the same numbers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from neuronsurgery.study import data
from neuronsurgery.study.run import RunFolder, Settings, read_results, refuse_missing_groups

TESTS = Path(__file__).parents[1]
SHORT = ("study", "--quick", "--epochs", "2", "--data", "digits", "--stages", "1", "2", "--experiments", "1b", "1a")


def test_ten_kills_at_random_moments_leave_the_same_results(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "study.killing", str(tmp_path), "10", *SHORT],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = (tmp_path / "whole" / "results.json").read_bytes()
    for number in range(10):
        assert (tmp_path / f"broken-{number}" / "results.json").read_bytes() == whole, done.stdout


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    def only_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a checkpoint is larger

    program = "import sys; from neuronsurgery.study.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*SHORT, "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", program, *arguments]
    failed = subprocess.run(command, capture_output=True, text=True, preexec_fn=only_small_files, check=False)
    assert failed.returncode == 1
    assert "neuronsurgery: error: " in failed.stderr
    assert "File too large" in failed.stderr
    assert not list(tmp_path.rglob("*.tmp*"))
    assert not (tmp_path / "run" / "results.json").exists()
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert read_results(tmp_path / "run")["experiments"]["1a"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file"):
        RunFolder(tmp_path / "file" / "run", Settings())


def test_a_run_may_be_added_to_but_not_changed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Settings(experiments=("1a",), splits=("train",)))
    RunFolder(tmp_path / "run", Settings(experiments=("1g",), splits=("test",), stages=("memorization", "2")))
    folder = RunFolder(tmp_path / "run", Settings(experiments=("1c",), stages=("fragility",)))
    # All that it ever was asked for, in the order of the study: nothing that it has falls out of its results.
    assert folder.settings.experiments == ("1a", "1c", "1g")
    assert folder.settings.splits == ("train", "test")
    assert folder.settings.stages == ("1", "2", "fragility", "memorization")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["splits"] == ["train", "test"]
    with pytest.raises(ValueError, match=r"holds another run; draws: this run 3, the folder 10: choose another folder"):
        RunFolder(tmp_path / "run", Settings(draws=3))


def test_another_version_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Settings())
    held = tmp_path / "run" / "run.json"
    held.write_text(json.dumps({**json.loads(held.read_text()), "version": "0.0.0"}))
    with pytest.raises(ValueError, match=r"version: this run '.*', the folder '0\.0\.0'.*--overwrite"):
        RunFolder(tmp_path / "run", Settings())


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"settings": 3}'])
def test_a_damaged_run_file_is_named(content: str, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Settings())
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        RunFolder(tmp_path / "run", Settings())


def test_what_was_computed_is_remembered_and_a_damaged_memory_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Settings())
    assert folder.remember("value", lambda: [0.1, 2]) == [0.1, 2]
    assert folder.remember("value", lambda: pytest.fail("computed again")) == [0.1, 2]
    (tmp_path / "run" / "experiments" / "value.json").write_text("[0.1,")
    with pytest.raises(ValueError, match=r"value\.json is damaged .* delete it, and it is made again"):
        folder.remember("value", lambda: 0)


def test_how_long_a_thing_took_is_not_how_long_it_took_to_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Settings())
    folder.note_seconds("training", 28.04)
    folder.note_seconds("training", 0.2)
    folder.note_seconds("1a", 3.0)
    assert json.loads((tmp_path / "run" / "timings.json").read_text()) == {"training": 28.0, "1a": 3.0}


def test_groups_without_images_are_refused_before_training_where_a_run_looks_at_them() -> None:
    dataset = data.synthetic(0, counts={"validation": (2, 2, 2, 0), "held-out": (2,) * 4})
    refuse_missing_groups(dataset, Settings(stages=("1",)))
    refuse_missing_groups(dataset, Settings(stages=("1",), splits=("train", "test")))
    message = r"groups without images in validation: waterbird on water: give .*--stages 1"
    for settings in (Settings(), Settings(stages=("1",), splits=("validation",))):
        with pytest.raises(ValueError, match=message):
            refuse_missing_groups(dataset, settings)
