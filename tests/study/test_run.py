"""The run folder: killed, full, foreign or damaged, a run is never half-written and goes on to the same numbers."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from neuronsurgery.study import data, run, show
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import (
    RunFolder,
    Settings,
    delete_run,
    describe_run,
    read_results,
    refuse_missing_groups,
)
from neuronsurgery.study.seeds import delete_other_seeds, refuse_other_files
from neuronsurgery.study.show import describe_file
from neuronsurgery.study.training import RECIPES, Recipe
from study.forking import Forked

RESULTS = ("results.json", "table.csv")
SHORT = ("study", "--quick", "--epochs", "2", "--data", "digits", "--stages", "1", "2", "--experiments", "1b", "1a")


@pytest.mark.xdist_group("forked")
def test_ten_kills_at_random_moments_leave_the_same_results(forked: Forked, tmp_path: Path) -> None:
    done = forked("study.killing.kill_and_go_on", str(tmp_path), "2", "5", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = [(tmp_path / "whole" / name).read_bytes() for name in RESULTS]
    for number in range(2):
        found = [(tmp_path / f"broken-{number}" / name).read_bytes() for name in RESULTS]
        assert found == whole, done.stdout


@pytest.mark.xdist_group("forked")
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(forked: Forked, tmp_path: Path) -> None:
    arguments = [*SHORT, "--out", str(tmp_path / "run")]
    failed = forked("study.little_study.study_on_a_full_disk", *arguments)
    assert failed.returncode == 1
    assert "neuronsurgery: error: " in failed.stderr
    assert "File too large" in failed.stderr
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "run" / "results.json").exists()
    assert forked("study.little_study.study", *arguments).returncode == 0
    assert len(read_results(tmp_path / "run").rows(experiment="1a"))


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file"):
        RunFolder(tmp_path / "file" / "run", Settings())


def test_a_run_may_be_added_to_but_not_changed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Settings(experiments=("1a",), splits=("train",)))
    RunFolder(tmp_path / "run", Settings(experiments=("1g",), splits=("test",), stages=("2",)))
    folder = RunFolder(tmp_path / "run", Settings(experiments=("1c",), stages=("fragility",)))
    # All that it ever was asked for, in the order of the study: nothing that it has falls out of its results.
    assert folder.settings.experiments == ("1a", "1c", "1g")
    assert folder.settings.splits == ("train", "test")
    assert folder.settings.stages == ("1", "2", "fragility")
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
    noted = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert list(noted.items()) == [("training", 28.0), ("1a", 3.0)]


def test_groups_without_images_are_refused_before_training_where_a_run_looks_at_them() -> None:
    counts = dict.fromkeys(data.SYNTHETIC_COUNTS, (2,) * 4)
    dataset = data.synthetic(0, counts=counts | {"validation": (2, 2, 2, 0)})
    refuse_missing_groups(dataset, Settings(stages=("1",)))
    refuse_missing_groups(dataset, Settings(stages=("1",), splits=("train", "test")))
    message = r"groups without images in validation: waterbird on water: give .*--stages 1"
    for settings in (Settings(), Settings(stages=("1",), splits=("validation",))):
        with pytest.raises(ValueError, match=message):
            refuse_missing_groups(dataset, settings)


# What is deleted, and what is not


MADE = (
    "optimizer.safetensors",
    ".optimizer.safetensors.q9x",
    "checkpoints/epoch-001.safetensors",
    "experiments/1a-train.json",
    "experiments/.1b-train.json.4f_",
    "stage-2/jtt-t-1/checkpoints/epoch-003.safetensors",
    "gradients-test.safetensors",
    "specs/1a-000.safetensors",
    "report.html",
    "table.csv",
    "figures/accuracy.svg",
    ".report-abc/new/report.html",
)
MINE = ("notes.txt", "checkpoints/best.pt", "figures/poster.png", "stage-2/plan.md")


def write_files(path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")


def files_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_overwriting_deletes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    RunFolder(tmp_path, Settings(), data={"train": "a"})
    write_files(tmp_path, MADE + MINE)
    with pytest.raises(ValueError, match="seed: this run 1, the folder 0"):
        RunFolder(tmp_path, Settings(seed=1))
    assert files_in(tmp_path) == {*MADE, *MINE, "run.json"}
    RunFolder(tmp_path, Settings(seed=1), overwrite=True, data={"train": "b"})
    assert files_in(tmp_path) == {*MINE, "run.json"}
    assert not (tmp_path / "experiments").exists()
    held = json.loads((tmp_path / "run.json").read_text())
    assert (held["settings"]["seed"], held["data"]) == (1, {"train": "b"})
    delete_run(tmp_path)
    assert files_in(tmp_path) == set(MINE)


@pytest.mark.parametrize("content", ["{", "[1]", '{"settings": {"seed": 1}}', '{"schema": 1, "settings": {"lr": 1}}'])
def test_a_run_file_of_something_else_is_not_overwritten(content: str, tmp_path: Path) -> None:
    write_files(tmp_path, MADE)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json .*choose another folder with --out"):
        RunFolder(tmp_path, Settings(), overwrite=True)
    assert files_in(tmp_path) == {*MADE, "run.json"}


def test_a_run_of_another_version_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 0, "settings": {"data": "old", "seed": 3}}))
    RunFolder(tmp_path, Settings(), overwrite=True)
    RunFolder(tmp_path, Settings())


def test_a_kill_in_the_first_write_leaves_no_foreign_file(tmp_path: Path) -> None:
    write_files(tmp_path, (".run.json.x7c",))
    RunFolder(tmp_path, Settings())
    (tmp_path / "run.json").unlink()
    write_files(tmp_path, ("checkpoints/epoch-001.safetensors",))
    with pytest.raises(ValueError, match=r"no run of this study, for it has no run.json \(1: checkpoints\): choose"):
        RunFolder(tmp_path, Settings(), overwrite=True)


def test_seeds_do_not_fall_out_of_the_results_of_several(tmp_path: Path) -> None:
    path = tmp_path / "seeds"
    refuse_other_files(path, [0, 1])
    write_files(path, ("seed-0/.run.json.abc",))
    (path / "seed-1").mkdir()
    refuse_other_files(path, [0, 1])
    for seed in (0, 1):
        RunFolder(path / f"seed-{seed}", Settings(seed=seed))
    refuse_other_files(path, [0, 1, 2])
    with pytest.raises(ValueError, match=r"seeds 0, 1, of which 0 would fall out .* \(--seed 0 --seeds 3\)"):
        refuse_other_files(path, [1, 2])
    refuse_other_files(path)
    write_files(path, ("seed-0/notes.txt", "seed-0/results.json"))
    delete_other_seeds(path, [1, 2])
    assert files_in(path) == {"seed-0/notes.txt", "seed-1/run.json"}
    write_files(tmp_path / "other", ("seed-0/thesis.tex",))
    with pytest.raises(ValueError, match=r"holds files that are no runs of this study \(1: seed-0\)"):
        refuse_other_files(tmp_path / "other", [0, 1])


# What a run was made from


def test_other_images_or_labels_are_refused_by_the_names_of_their_splits(tmp_path: Path) -> None:
    before = {"train": "a", "validation": "b", "test": "c"}
    RunFolder(tmp_path, Settings(), data=before)
    RunFolder(tmp_path, Settings(), data=before)
    RunFolder(tmp_path, Settings())  # another process, that does not look
    with pytest.raises(ValueError, match=r"not what they were in held-out, test: put the data back .*--overwrite"):
        RunFolder(tmp_path, Settings(), data={"held-out": "d", **before, "test": "e"})
    assert json.loads((tmp_path / "run.json").read_text())["data"] == before


def test_the_recipe_is_that_of_the_settings() -> None:
    assert Settings().recipe == RECIPES["adam"]
    assert Settings(optimizer="sgd", momentum=0.5, epochs=3).recipe == Recipe("sgd", momentum=0.5, epochs=3)


def test_a_split_that_lacks_a_group_keeps_the_others(tmp_path: Path) -> None:
    counts = {"train": (2, 1, 1, 1), "held-out": (0,) * 4, "validation": (1, 0, 1, 1), "test": (1,) * 4}
    dataset = data.synthetic(counts=counts)
    found = describe_run(RunFolder(tmp_path, Settings()), dataset, small_resnet(), [], "")
    assert found["counts"] == {split: list(counts[split]) for split in ("train", "validation", "test")}
    assert {split: len(values) for split, values in found["accuracy"].items()} == {
        "train": 4,
        "validation": 3,
        "test": 4,
    }


# What goes wrong in reading and writing


def test_what_cannot_be_written_is_named_with_the_next_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Settings())
    (tmp_path / "experiments").write_text("in the way")
    with pytest.raises(OSError, match=r"experiments/value\.json could not be written \(.*: a file is where a .*--out"):
        folder.remember("value", lambda: 1)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "make room there, and start again to go on"),
        (errno.EACCES, "give leave to write there, or choose another folder with --out"),
        (errno.ENOTDIR, "a file is where a folder should be: choose another folder with --out"),
        (errno.EIO, "see that it can be written, and start again to go on"),
    ],
)
def test_the_next_step_goes_by_what_kept_a_file_from_being_written(number: int, step: str) -> None:
    assert run.next_step(OSError(number, "why")) == step


@pytest.mark.parametrize("content", ["[]", "3", '"text"'])
def test_results_that_are_no_object_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match=r"results\.json is damaged \(a .*, where an object was expected\): delete"):
        read_results(tmp_path)


def test_a_long_file_is_shown_in_twenty_lines(tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    file.write_text(json.dumps({f"part {number}": [number] * 200 for number in range(40)}))
    lines = describe_file(file).splitlines()
    assert lines[:2] == ["timings.json:", "  part 0: 200 entries"]
    assert (len(lines), lines[-1]) == (show.LINES, "... and 22 more")
    with pytest.raises(ValueError, match=r"is a folder: name a file in it, such as .*results\.json"):
        describe_file(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"timings\.json is damaged"):
        describe_file(file)
