"""The command line from end to end, on little data and for few epochs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import neuronsurgery as ns
from neuronsurgery.study import data, stage_one
from neuronsurgery.study.cli import _parser, _settings, main
from study.test_readers import make_birds

FEW = ("study", "--quick", "--epochs", "1", "--data", "digits", "--stages", "1", "--experiments", "1a", "1g")
COUNTS = {"train": (24, 8, 6, 12), "validation": (4,) * 4, "test": (4,) * 4}


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded data, but few of them."""
    made = {"digits": data.digits, "synthetic": data.synthetic}
    held_out = {"digits": {}, "synthetic": {"held-out": (24, 8, 6, 12)}}
    few: dict[str, Callable[..., data.DataSet]] = {
        name: lambda seed, counts, name=name, make=make: make(seed, counts=COUNTS | held_out[name])  # type: ignore[misc]
        for name, make in made.items()
    }
    monkeypatch.setattr("neuronsurgery.study.cli.EMBEDDED", few)


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_a_run_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*FEW, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "1a  Zero the top neurons of the model" in printed
    assert "1g  Zero random other neurons" in printed
    results = results_of(folder)
    assert set(results["experiments"]) == {"1a", "1g"}
    assert results["counts"]["train"] == list(COUNTS["train"])
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "epoch-000.safetensors",
        "epoch-001.safetensors",
    }
    specs = [ns.load_file(path) for path in sorted((folder / "specs").iterdir())]
    assert len(specs) == len(results["experiments"]["1a"]["train"])
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "epochs", "fine_tuning", "comparison"),
    [
        ((), 30, 5, 15),
        (("--epochs", "10"), 10, 5, 5),
        (("--epochs", "60", "--full"), 60, 20, 60),
        (("--quick", "--full"), 5, 1, 2),
        (("--quick", "--epochs", "1"), 1, 1, 2),
    ],
)
def test_stage_two_is_as_long_as_the_run_says(
    options: tuple[str, ...], epochs: int, fine_tuning: int, comparison: int
) -> None:
    settings = _settings(_parser().parse_args(["study", *options]))
    assert (settings.epochs, settings.fine_tuning_epochs, settings.comparison_epochs) == (
        epochs,
        fine_tuning,
        comparison,
    )


def test_a_stage_that_is_added_leaves_those_that_are_there_in_the_results(tmp_path: Path) -> None:
    command = [*FEW[:4], "--data", "digits", "--experiments", "1a", "--out", str(tmp_path / "run")]
    assert main([*command, "--stages", "1"]) == 0
    first = results_of(tmp_path / "run")
    assert main([*command, "--stages", "2"]) == 0
    both = results_of(tmp_path / "run")
    assert both["experiments"] == first["experiments"]
    assert both["stage_two"]["arms"]


def test_records_are_those_of_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*FEW, "--out", str(folder)]) == 0
    dataset = data.digits(0, counts=COUNTS)
    model = run_model(folder)
    record = results_of(folder)["experiments"]["1a"]["train"][0]
    edit = ns.load_file(folder / "specs" / "1a-000.safetensors")
    assert isinstance(edit, ns.Edit)
    before = ns.evaluate(model, dataset.loaders("train"))
    after = ns.evaluate(ns.apply(edit, model), dataset.loaders("train"))
    for change in record["changes"]:
        assert change["before"] == before[change["group"]]
        assert change["change"] == after[change["group"]] - before[change["group"]]


def run_model(folder: Path) -> Any:
    from neuronsurgery.study.network import small_resnet
    from neuronsurgery.study.training import load_checkpoint

    return load_checkpoint(small_resnet(0), folder, 1)


def test_every_experiment_runs_and_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    every = ["study", "--quick", "--epochs", "5", "--stages", "1"]
    assert main([*every, "--out", str(tmp_path / "a")]) == 0
    assert main([*every, "--out", str(tmp_path / "b")]) == 0
    results = results_of(tmp_path / "a")
    assert results == results_of(tmp_path / "b")
    assert set(results["experiments"]) == {"1a", "1b", "1c", "1d", "1e", "1f", "1g"}
    assert results["missing_distances"] == [10, 20, 30, 40]
    assert {record["with_norm"] for record in results["experiments"]["1f"]["train"]} == {False, True}


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_results(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FEW[:-2], "1a", "1e", "1g"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    calls = []
    measure = stage_one.measure

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt("killed")
        return measure(*args, **kwargs)

    monkeypatch.setattr(stage_one, "measure", dying)
    assert main([*arguments, "--out", str(tmp_path / "broken")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "neuronsurgery: stopped: the same command goes on from here"
    monkeypatch.setattr(stage_one, "measure", measure)
    assert not (tmp_path / "broken" / "results.json").exists()
    assert main([*arguments, "--out", str(tmp_path / "broken")]) == 0
    assert results_of(tmp_path / "broken") == results_of(tmp_path / "whole")


def test_report_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*FEW, "--out", str(folder)]) == 0
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == first
    capsys.readouterr()
    assert main(["show", str(folder / "gradients.safetensors")]) == 0
    assert "Scores: gradient norm of 336 neurons" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_waterbirds_from_disk_with_another_network(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_birds(root := tmp_path / "birds")
    folder = tmp_path / "run"
    chosen = ["--data", "waterbirds", "--root", str(root), "--stages", "1", "--experiments", "1a", "1b"]
    architecture = ["--arch", arch] if arch != "resnet50" else []  # the default
    assert main(["study", "--quick", "--epochs", "1", *chosen, *architecture, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"{arch}, " in printed
    assert "nothing pre-trained" in printed
    results = results_of(folder)
    assert results["experiments"]["1a"]["train"]
    assert "fc.weight" not in {layer["name"] for layer in results["layers"]}
    assert "fc.weight" in load_file(folder / "checkpoints" / "epoch-001.safetensors")


def test_both_stages_and_fragility_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["study", "--quick", "--experiments", "1a", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    for title in ("1a  Zero the top neurons", "Stage 2  Worst group of the test images", "Last layer retrained"):
        assert title in printed
    results = results_of(folder)
    assert {"experiments", "stage_two", "fragility"} <= results.keys()
    assert results["settings"]["stages"] == ["1", "2", "fragility"]


def test_several_seeds_are_runs_of_their_own_and_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    assert main([*FEW, "--seeds", "2", "--out", str(folder)]) == 0
    assert "| ERM | training accuracy is near 100 %" in capsys.readouterr().out
    together = results_of(folder)
    assert together["seeds"] == [0, 1]
    for seed in (0, 1):
        assert results_of(folder / f"seed-{seed}")["settings"]["seed"] == seed
        assert (folder / f"seed-{seed}" / "report.html").exists()
    alone = results_of(folder / "seed-1")["accuracy"]["train"]
    assert [column["values"][1] for column in together["accuracy"]["train"]] == alone
    assert main([*FEW, "--out", str(folder)]) == 1
    assert "holds files that are no run of this study" in capsys.readouterr().err


def test_a_split_and_an_experiment_are_added_to_a_run_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*FEW[:-1], "--out", str(folder)]) == 0
    before = results_of(folder)["experiments"]["1a"]["train"]
    assert main([*FEW[:-2], "1a", "1b", "--split", "train", "--split", "test", "--out", str(folder)]) == 0
    after = results_of(folder)["experiments"]
    assert after["1a"]["train"] == before
    assert set(after["1a"]) == set(after["1b"]) == {"train", "test"}


def test_two_processes_train_together_and_the_first_goes_on(tmp_path: Path) -> None:
    program = Path(__file__).with_name("little_study.py")
    arguments = ["--nproc-per-node", "2", "--master-port", "0", "--standalone", str(program)]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, *FEW, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=program.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert results_of(tmp_path / "run")["experiments"]["1a"]["train"]
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-001.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--data", "waterbirds"], "read from disk and needs --root DIR"),
        (["study", "--root", "somewhere"], "embedded and takes no --root: leave it out"),
        (["report", "nowhere"], "nowhere has no results.json"),
        (["show", "nowhere.safetensors"], "no file at"),
    ],
)
def test_errors_are_one_line_with_the_next_step(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_unless_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*FEW, "--out", str(folder)]) == 0
    before = (folder / "results.json").read_bytes()
    assert main([*FEW, "--seed", "1", "--out", str(folder)]) == 1
    assert "holds another run; seed: this run 1, the folder 0" in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before
    assert main([*FEW, "--seed", "1", "--overwrite", "--out", str(folder)]) == 0
    assert results_of(folder)["settings"]["seed"] == 1


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*FEW, "--overwrite", "--out", str(tmp_path)]) == 1
    assert "holds files that are no run of this study" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
