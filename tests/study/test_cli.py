"""The command line from end to end, on little data and for few epochs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import neuronsurgery as ns
from neuronsurgery.study import data, run
from neuronsurgery.study.cli import main
from study.test_readers import make_birds

FEW = ("study", "--quick", "--epochs", "1")
COUNTS = {"train": (24, 8, 6, 12), "validation": (4,) * 4, "test": (4,) * 4}


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded data, but few of them."""
    made = {"digits": data.digits, "synthetic": data.synthetic}
    few: dict[str, Callable[[int], data.DataSet]] = {
        name: lambda seed, make=make: make(seed, counts=COUNTS)  # type: ignore[misc]
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
    every = [*FEW, "--experiments", "all", "--epochs", "5", "--data", "synthetic"]
    assert main([*every, "--out", str(tmp_path / "a")]) == 0
    assert main([*every, "--out", str(tmp_path / "b")]) == 0
    results = results_of(tmp_path / "a")
    assert results == results_of(tmp_path / "b")
    assert set(results["experiments"]) == {"1a", "1b", "1c", "1d", "1e", "1f", "1g"}
    assert results["missing_distances"] == [10, 20, 30, 40]
    assert {record["with_norm"] for record in results["experiments"]["1f"]["train"]} == {False, True}


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_results(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*FEW, "--experiments", "1a", "1e", "1g"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    calls = []
    measure = run.measure

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt("killed")
        return measure(*args, **kwargs)

    monkeypatch.setattr(run, "measure", dying)
    with pytest.raises(KeyboardInterrupt, match="killed"):
        main([*arguments, "--out", str(tmp_path / "broken")])
    monkeypatch.setattr(run, "measure", measure)
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


def test_waterbirds_from_disk_with_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_birds(root := tmp_path / "birds")
    folder = tmp_path / "run"
    chosen = ["--data", "waterbirds", "--root", str(root), "--arch", "resnet18", "--experiments", "1a"]
    assert main([*FEW, *chosen, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "nothing pre-trained" in printed
    assert results_of(folder)["experiments"]["1a"]["train"]
    assert "fc.weight" in load_file(folder / "checkpoints" / "epoch-001.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--data", "waterbirds"], "read from disk and needs --root DIR"),
        (["study", "--root", "somewhere"], "embedded and takes no --root DIR"),
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
