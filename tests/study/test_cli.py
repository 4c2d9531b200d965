"""The command line from end to end, on little data and for few epochs."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import neuronsurgery as ns
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.study import data, experiments, models, program, readers, settings, stage_one
from neuronsurgery.study.claims import judge
from neuronsurgery.study.cli import main
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.options import parse
from neuronsurgery.study.program import make_options
from neuronsurgery.study.settings import Options
from neuronsurgery.study.table import read_run
from neuronsurgery.study.training import RECIPES, load_checkpoint
from study.little_study import tiny_resnet
from study.test_readers import make_birds

FEW = ("study", "--quick", "--epochs", "1", "--data", "digits", "--stages", "1", "--experiments", "1a", "1g")
COUNTS = {"train": (24, 8, 6, 12), "validation": (4,) * 4, "test": (4,) * 4}
RUN = CheckedForward.run
"""Forward passes are shared, which the tests of the study else leave out."""


reads_few_run = pytest.mark.xdist_group("few run")  # which is made once, by one process


@pytest.fixture(scope="module", autouse=True)
def little_data() -> Iterator[None]:
    """The embedded data, but few of them; and few controls."""
    made = {"digits": data.digits, "synthetic": data.synthetic}
    held_out = {"digits": {}, "synthetic": {"held-out": (24, 8, 6, 12)}}
    few: dict[str, Callable[..., data.DataSet]] = {
        name: lambda seed, counts, name=name, make=make: make(seed, counts=COUNTS | held_out[name])  # type: ignore[misc]
        for name, make in made.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuronsurgery.study.program.EMBEDDED", few)
        patch.setitem(program.QUICK, "control_draws", 2)
        yield


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the small one."""
    monkeypatch.setattr(models, "small_resnet", tiny_resnet)


@pytest.fixture(scope="module")
def few_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of `FEW`, for reading only, and what was printed."""
    folder = tmp_path_factory.mktemp("few") / "run"
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*FEW, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def copied_run(few_run: tuple[Path, str], tmp_path: Path) -> Path:
    """The folder of a finished run of `FEW`."""
    return shutil.copytree(few_run[0], tmp_path / "run")


def asked(*words: str) -> Options:
    """The options of a command line."""
    return make_options(parse(Options, "study", "", words))


def files_of(folder: Path) -> list[bytes]:
    """The two files of a run's results."""
    return [(folder / name).read_bytes() for name in ("results.json", "table.csv")]


@reads_few_run
def test_a_run_leaves_what_it_promises(few_run: tuple[Path, str]) -> None:
    folder, printed = few_run
    assert "Does the paper's cut hit it more than any other group?" in printed
    run = read_run(folder)
    assert {name for name in run.experiments if name.startswith("1")} == {"1a", "1g"}
    assert run.about["counts"]["train"] == list(COUNTS["train"])
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "epoch-000.safetensors",
        "epoch-001.safetensors",
    }
    assert len(run.rows(experiment="1a")) == 15 * 4  # a number of each group, by four gradients and by magnitude
    assert (folder / "figures" / "cuts.svg").read_text() and "vegaEmbed" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "epochs", "fine_tuning", "comparison"),
    [
        ((), 30, 4, 12),
        (("--epochs", "1"), 1, 4, 1),
        (("--epochs", "10"), 10, 4, 4),
        (("--epochs", "60", "--full"), 60, 20, 60),
        (("--quick", "--full"), 5, 1, 2),
        (("--quick", "--epochs", "1"), 1, 1, 2),
        (("--fine-tuning-epochs", "5", "--comparison-epochs", "15"), 30, 5, 15),
        (("--full", "--fine-tuning-epochs", "7"), 30, 7, 30),
        (("--quick", "--comparison-epochs", "3"), 5, 1, 3),
    ],
)
def test_stage_two_is_as_long_as_the_run_says(
    options: tuple[str, ...], epochs: int, fine_tuning: int, comparison: int
) -> None:
    chosen = asked(*options)
    assert (chosen.epochs, chosen.fine_tuning_epochs, chosen.comparison_epochs) == (
        epochs,
        fine_tuning,
        comparison,
    )


@pytest.mark.usefixtures("tiny_network")
def test_a_stage_that_is_added_leaves_those_that_are_there_in_the_results(tmp_path: Path) -> None:
    command = [*FEW[:4], "--data", "digits", "--experiments", "1a", "--out", str(tmp_path / "run")]
    assert main([*command, "--stages", "1"]) == 0
    first = read_run(tmp_path / "run")
    assert main([*command, "--stages", "2"]) == 0
    both = read_run(tmp_path / "run")
    assert both.rows(stage="1").equals(first.rows(stage="1")) and len(first.rows(stage="1"))
    assert len(both.rows(experiment="arms"))


@reads_few_run
def test_records_are_those_of_one_by_one(few_run: tuple[Path, str]) -> None:
    folder, _ = few_run
    dataset = data.digits(0, counts=COUNTS)
    model = load_checkpoint(small_resnet(0), folder, 1)
    run = read_run(folder)
    cut = run.rows(experiment="1a", selector="gradient", chosen_for=dataset.group_names[1], k=2)
    before = ns.evaluate(model, dataset.loaders("train"))
    assert run.rows(experiment="accuracy", split="train")["value"].to_list() == list(before.values)
    (names,) = cut["names"].unique().to_list()
    layout, neurons = ns.find_layout(model), ns.Neurons()
    for name in names.split(";"):
        layer, _, index = name.removesuffix("]").partition("[")
        neurons |= ns.select(layout, {layer: [int(index)]})
    after = ns.evaluate(ns.apply(ns.zero_out(neurons), model), dataset.loaders("train"))
    for row in cut.iter_rows(named=True):
        assert row["value"] == after[row["group"]] - before[row["group"]]


@pytest.mark.usefixtures("tiny_network")
def test_every_experiment_runs_and_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    every = ["study", "--quick", "--epochs", "5", "--stages", "1"]
    assert main([*every, "--out", str(tmp_path / "a")]) == 0
    assert main([*every, "--out", str(tmp_path / "b")]) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    run = read_run(tmp_path / "a")
    assert run.experiments >= {"1a", "1b", "1c", "1d", "1e", "1f", "1g", "1h"}
    assert run.about["missing_distances"] == [10, 20, 30, 40]
    assert set(run.rows(experiment="1f")["with_norm"]) == {False, True}


@pytest.mark.usefixtures("tiny_network")
def test_a_killed_run_goes_on_to_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at each of its three experiments in turn."""
    arguments = [*FEW[:-2], "1a", "1e", "1g"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    measure = stage_one.measure
    for name, measured_before in (("1a", 0), ("1e", 1), ("1g", 1)):
        left = iter(range(measured_before))

        def dying(*args: Any, left: Iterator[int] = left, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt("killed")
            return measure(*args, **kwargs)

        monkeypatch.setattr(stage_one, "measure", dying)
        assert main([*arguments, "--out", str(tmp_path / "broken")]) == 130
        said = capsys.readouterr().err.splitlines()
        assert said[-1] == "neuronsurgery: stopped: the same command goes on from here"
        assert not (tmp_path / "broken" / "experiments" / f"{name}-train.json").exists()
        assert not (tmp_path / "broken" / "results.json").exists()
    monkeypatch.setattr(stage_one, "measure", measure)
    assert main([*arguments, "--out", str(tmp_path / "broken")]) == 0
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


@reads_few_run
def test_report_and_show(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied_run
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == first
    capsys.readouterr()
    shown = {}
    for file in (file for file in folder.rglob("*") if file.suffix in (".json", ".csv", ".safetensors")):
        assert main(["show", str(file)]) == 0
        shown[file.name] = capsys.readouterr().out
        assert 1 <= len(shown[file.name].splitlines()) <= 20
    for name, beginning in {
        "gradients.safetensors": "Scores: gradient norm of 336 neurons",
        "epoch-000.safetensors": "checkpoint after epoch 0: ",
        "epoch-001.safetensors": "checkpoint after epoch 1; loss ",
        "optimizer.safetensors": "the optimiser's state after epoch 1: ",
        "results.json": "results of digits, seed 0\n  groups: digit 0-4 on land, ",
        "table.csv": "table.csv: ",
        "run.json": 'run.json: the settings of a run\n  data "digits"; stages ["1"]; ',
        "1a-train.json": "1a-train.json: ",
        "timings.json": "timings.json:\n  training: ",
    }.items():
        assert shown[name].startswith(beginning)


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize(
    ("arch", "head", "options"),
    [
        ("small_resnet", "head", ["--arch", "small_resnet", "--size", "16", "--experiments", "1a", "1b"]),
        pytest.param(
            "resnet18",
            "fc",
            ["--arch", "resnet18", "--size", "32", "--experiments", "all"],
            marks=pytest.mark.architectures,
        ),
        # The default network, and the default size.
        pytest.param("resnet50", "fc", ["--experiments", "1a", "1b"], marks=pytest.mark.architectures),
    ],
)
def test_waterbirds_from_disk_with_another_network(
    arch: str,
    head: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if arch == "resnet18":  # so many edits that a capture is worth it
        monkeypatch.setattr(CheckedForward, "run", RUN)
    make_birds(root := tmp_path / "birds")
    folder = tmp_path / "run"
    chosen = ["--data", "waterbirds", "--root", str(root), "--stages", "1", *options]
    assert main(["study", "--quick", "--epochs", "1", *chosen, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"{arch}, " in printed
    assert "nothing pre-trained" in printed
    run = read_run(folder)
    asked_for = set(run.about["settings"]["experiments"])
    assert {name for name in run.experiments if name.startswith("1")} | {"1f"} == asked_for | {"1f"} >= {"1a", "1b"}
    assert f"{head}.weight" not in {layer["name"] for layer in run.about["layers"]}
    assert f"{head}.weight" in load_file(folder / "checkpoints" / "epoch-001.safetensors")


@pytest.mark.xdist_group("whole run")
def test_both_stages_and_fragility_and_what_is_printed(whole_run: tuple[Path, str]) -> None:
    folder, printed = whole_run
    for question in ("Does the paper's cut", "Does fine-tuning against the pruned twin", "Does fragility"):
        assert question in printed
    run = read_run(folder)
    assert {"1a", "arms", "detection", "mitigation"} <= run.experiments
    assert run.about["settings"]["stages"] == ["1", "2", "fragility"]


@pytest.mark.usefixtures("tiny_network")
def test_several_seeds_are_runs_of_their_own_and_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    assert main([*FEW, "--seeds", "2", "--out", str(folder)]) == 0
    assert "accuracy, %, mean of 2 seeds [95 % interval]" in capsys.readouterr().out
    together = read_run(folder)
    assert together.seeds == (0, 1)
    for seed in (0, 1):
        alone = read_run(folder / f"seed-{seed}")
        assert alone.about["settings"]["seed"] == seed
        assert (folder / f"seed-{seed}" / "report.html").exists()
        assert together.of_seed(seed).table.equals(alone.table)
    assert main([*FEW, "--out", str(folder)]) == 1
    assert "holds files that are no run of this study" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_network")
def test_a_split_and_an_experiment_are_added_to_a_run_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*FEW[:-1], "--out", str(folder)]) == 0
    before = read_run(folder).rows(experiment="1a")
    assert main([*FEW[:-2], "1a", "1b", "--split", "train", "--split", "test", "--out", str(folder)]) == 0
    after = read_run(folder)
    assert after.rows(experiment="1a", split="train").equals(before) and len(before)
    for name in ("1a", "1b"):
        assert set(after.rows(experiment=name)["split"]) == {"train", "test"}


WRONG_USAGE = {
    "": "no command: neuronsurgery study|audit|report|show, or neuronsurgery --help",
    "stduy": "there is no command 'stduy': did you mean study?",
    "--data digits": "there is no command '--data': the commands are study, audit, report, show",
    "study --expochs 3": "there is no option --expochs: did you mean --epochs?",
    "study --experiment 1a": "there is no option --experiment: did you mean --experiments?",
    "study --exp 1a": "there is no option --exp: did you mean --experiments?",
    "study --image-size=64": "there is no option --image-size: did you mean --size?",
    "study --zzz": "there is no option --zzz: neuronsurgery study --help lists them",
    "study --memorization": "there is no option --memorization: neuronsurgery study --help lists them",
    "study digits": "'digits' belongs to no option: neuronsurgery study --help lists them",
    "study --data sythetic": "--data: expected one of synthetic, digits, waterbirds, celeba, folder, not 'sythetic': "
    "did you mean synthetic?",
    "study --experiments 1a,1A": "--experiments: expected one of 1a, 1b, 1c, 1d, 1e, 1f, 1g, 1h, all, not '1A': did "
    "you mean 1a?",
    "study --stages fragile": "--stages: expected one of 1, 2, fragility, all, not 'fragile': did you mean fragility?",
    "study --split vall": "--split: expected one of train, validation, test, not 'vall': did you mean val?",
    "study --split ,": "--split: a value is missing",
    "study --preset adamw": "--preset: expected one of adam, sgd, not 'adamw': did you mean adam?",
    "study --epochs": "--epochs: a value is missing",
    "study --experiments --quick": "--experiments: a value is missing",
    "study --quick=yes": "--quick takes no value, found 'yes': leave the value out",
    "study --batch-size 0": "--batch-size: expected a whole number of at least 1, not '0'",
    "study --epochs=2.5": "--epochs: expected a whole number of at least 1, not '2.5'",
    "study --seeds=none": "--seeds: expected a whole number of at least 1, not 'none'",
    "study --size=-8": "--size: expected a whole number of at least 1, not '-8'",
    "study --workers=-1": "--workers: expected a whole number of at least 0, not '-1'",
    "study --seed -1": "--seed: expected a whole number of at least 0, not '-1'",
    "study --held-out=0.6": "--held-out: expected a share above 0 and up to 0.5, such as 0.2, not '0.6'",
    "study --held-out=half": "--held-out: expected a share above 0 and up to 0.5, such as 0.2, not 'half'",
    "study --mean 0.5,0.5": "--mean: expected 3 numbers, found 2",
    "study --mean a b c": "--mean: expected a number, such as 0.2, not 'a'",
    "study --std 0 1 1": "--std: expected a number above 0, such as 0.2, not '0'",
    "study --data waterbirds": "--data waterbirds is read from disk and needs --root DIR",
    "study --root somewhere": "--data synthetic is embedded and takes no --root: leave it out, or choose --data "
    "waterbirds, celeba, folder",
    "study --table x --label-column y --workers 2 --size 64 --mean 0,0,0": "--data synthetic is embedded and takes "
    "no --size, --mean, --workers, --table, --label-column: leave it out, or choose --data waterbirds, celeba, folder",
    "study --data celeba --root x --table x.csv": "--table: only for --data folder, celeba has its own: leave it out",
    "report": "DIR is missing, see --help",
    "report a b": "'b' belongs to no option: neuronsurgery report --help lists them",
    "show": "FILE is missing, see --help",
    "show --verbose x": "there is no option --verbose: neuronsurgery show --help lists them",
    "show -v": "there is no option -v: neuronsurgery show --help lists them",
    "report --folder d": "there is no option --folder: neuronsurgery report --help lists them",
    "report --quick": "there is no option --quick: neuronsurgery report --help lists them",
}
"""What cannot be meant, whatever files there are: status 2, before torch is imported."""


@pytest.mark.parametrize("command", WRONG_USAGE)
def test_wrong_usage_is_one_line_that_names_the_option(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: object = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert (status, said.out, said.err) == (2, "", f"neuronsurgery: error: {WRONG_USAGE[command]}\n")
    assert not list(tmp_path.iterdir())  # no run folder


WRONG_HERE = {
    "study --device warp": "--device warp cannot be used here (",
    "study --device meta": "--device meta cannot be used here (",
    "study --held-out 0.2": "has held-out images of its own (50): use these and leave out --held-out",
    "study --arch deit_tiny_patch16_224": "deit_tiny_patch16_224 does not take images of 32 x 32 (",
    "study --out file": "--out file is a file: name a folder, which is made if it is missing",
    "study --quick --out file/run": "a file is where a folder should be: choose another folder with --out",
    "study --data folder --root nowhere": "nowhere: no such folder: name the folder that the data set is in",
    "study --data folder --root file": "file: is a file, no folder: name the folder that the data set is in",
    "study --data folder --root folder": "folder has no table of folder: expected metadata.csv there, found nothing: "
    "name the folder that has it",
    "report nowhere": "nowhere is not there: name the folder of a run, as given to `neuronsurgery study --out`",
    "report file": "file is a file, not a run folder: name the folder of a run",
    "report folder": "folder has no results.json and no table.csv: run `neuronsurgery study --out folder` to its end",
    "report audit": "audit is the folder of an audit: the same `neuronsurgery audit` makes its page again",
    "show nowhere.safetensors": "no file at",
    "show folder": "folder is a folder: name a file in it, such as folder/results.json",
    "show model.pt": "model.pt was written by torch.save, and show prints JSON and safetensors: look into it with "
    "torch.load(path, weights_only=True)",
}
"""What the files or the machine do not allow: status 1."""


@pytest.mark.parametrize("command", WRONG_HERE)
def test_what_does_not_go_here_is_one_line_with_the_next_step(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "fragile.csv").touch()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    before = sorted(tmp_path.rglob("*"))
    assert main(command.split()) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("neuronsurgery: error: ")
    assert WRONG_HERE[command] in said[-1]
    assert len(said) == 1
    assert sorted(tmp_path.rglob("*")) == before  # no run folder


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("--experiments 1g,1a", {"experiments": ("1a", "1g")}),
        ("--experiments 1g 1a,1g", {"experiments": ("1a", "1g")}),
        ("--experiments=1a --experiments 1b", {"experiments": ("1a", "1b")}),
        ("--experiments all --stages fragility,1", {"stages": ("1", "fragility")}),
        ("--split val", {"splits": ("validation",)}),
        ("--split test,train", {"splits": ("test", "train")}),
        ("--split train --split test", {"splits": ("train", "test")}),
        ("--data folder --root x --mean 0.5,0.5,0.5 --std 1 1 2", {"mean": (0.5,) * 3, "std": (1.0, 1.0, 2.0)}),
        ("--data folder --root x --mean=-1,0,1", {"mean": (-1.0, 0.0, 1.0)}),
        ("--data folder --root x/ --size 32", {"root": "x", "size": 32, "arch": "resnet50"}),
    ],
)
def test_values_are_written_with_commas_or_blanks(words: str, chosen: dict[str, Any]) -> None:
    options = asked(*words.split())
    assert {name: getattr(options, name) for name in chosen} == chosen


def test_the_names_that_are_known_without_torch_are_those_that_there_are() -> None:
    assert set(program.EMBEDDED) == set(settings.EMBEDDED)
    assert tuple(readers.READERS) == settings.ON_DISK
    assert tuple(RECIPES) == settings.PRESETS
    assert tuple(readers.EXPECTED_COUNTS["waterbirds"]) == settings.SPLITS
    assert set(settings.EXPERIMENTS) == {*experiments.EXPERIMENTS, "1b", "1h"}


LIGHT = """
import sys
from neuronsurgery.study.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stopped:
    status = stopped.code
heavy = {"torch", "numpy", "scipy", "sklearn", "PIL", "einops"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--help", 0, "commands:\n  study   train a network"),
        ("study --help", 0, "--experiments NAME [NAME ...]"),
        ("--version", 0, "neuronsurgery 0."),
        ("study --sees 3", 2, "did you mean --seeds?"),
        ("study --data waterbirds", 2, "needs --root DIR"),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(words: str, status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *words.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert ("usage: " in done.stdout) == ("--help" in words)


def test_the_package_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neuronsurgery", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("neuronsurgery 0.")


@reads_few_run
def test_what_was_found_and_how_far_a_run_is_are_lines(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied_run / "experiments" / "1g-train.json").unlink()
    assert main([*FEW, "--out", str(copied_run)]) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    first, left, step, *_ = said.splitlines()
    assert first == "found in the folder, and not done again: 2 steps"
    assert re.fullmatch(r"1 step to do, (about \d+ min|less than a minute) in all", left)
    assert re.fullmatch(r"\[3/3\] 1g on train, (about \d+ min|less than a minute) left", step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--device", "cuda", "--out", str(tmp_path / "run")]) == 1
    assert "error: --device cuda cannot be used here (" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "missing"), [(("1",), ("torchvision", "Pillow")), (("fragility",), ("scikit-learn", "torchvision"))]
)
def test_missing_packages_are_named_together_before_any_work(
    stages: tuple[str, ...],
    missing: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("sklearn", "torchvision", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    chosen = ["--data", "folder", "--root", str(tmp_path), "--stages", *stages, "--out", str(tmp_path / "run")]
    assert main(["study", "--arch", "small_resnet", *chosen]) == 1
    said = capsys.readouterr().err
    assert all(f"{package} (" in said for package in missing)
    assert "pip install 'neuronsurgery[study]'" in said
    assert not (tmp_path / "run").exists()


def test_a_preset_keeps_the_length_that_is_the_data_sets_own() -> None:
    arguments = ["--data", "celeba", "--root", "x", "--preset", "sgd", "--batch-size", "8"]
    chosen = asked(*arguments)
    assert chosen.recipe == replace(RECIPES["sgd"], epochs=20, batch_size=8)
    assert (chosen.size, chosen.table, chosen.label_column) == (224, None, None)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ((), 224),
        (("--arch", "vit_tiny_patch16_384"), 384),
        (("--arch", "timm:test_vit"), 160),
        (("--arch", "test_vit", "--size", "64"), 64),
    ],
)
def test_images_on_disk_get_the_size_that_the_network_is_made_for(options: tuple[str, ...], size: int) -> None:
    chosen = asked("--data", "folder", "--root", "x", *options)
    assert chosen.size == size
    assert (chosen.table, chosen.label_column) == ("metadata.csv", "label")


def on_disk(root: Path, *options: str) -> list[str]:
    small = ("--arch", "small_resnet", "--size", "16", "--stages", "1", "--experiments", "1a")
    return ["study", "--quick", "--epochs", "1", "--data", "waterbirds", "--root", str(root), *small, *options]


def test_a_size_that_does_not_fit_is_refused_with_that_which_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_birds(tmp_path / "birds")
    command = on_disk(tmp_path / "birds", "--arch", "vit_tiny_patch16_384", "--out", str(tmp_path / "run"))
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "error: vit_tiny_patch16_384 does not take images of 16 x 16 (" in said
    assert "pass --size 384, for which it is made" in said
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_found_before_the_run_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_birds(tmp_path / "birds")
    image = next(iter((tmp_path / "birds").rglob("*.jpg")))
    image.write_bytes(image.read_bytes()[:-20])
    assert main(on_disk(table.parent, "--out", str(tmp_path / "run"))) == 1
    assert "files that are no readable images (1): " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("tiny_network")
def test_data_on_disk_with_held_out_images_and_a_table_that_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = make_birds(tmp_path / "birds"), tmp_path / "run"
    table.write_text(table.read_text().replace(",1,2,0,/", ",1,2,1,/"))  # no test image of group 2
    command = on_disk(table.parent, "--held-out", "0.3", "--out", str(out))
    assert main(command) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if re.match(r"test +\d+\.\d ", line))
    assert line.split()[3] == "-"
    run = read_run(out)
    assert run.about["settings"]["held_out"] == 0.3
    assert sum(run.about["counts"]["train"]) == 7
    assert sum(run.about["counts"]["held-out"]) == 3
    assert run.about["counts"]["test"] == [1, 2, 0, 2]
    assert len(run.rows(experiment="accuracy", split="test")) == 3
    before = files_of(out)
    table.write_text(table.read_text().replace(",0,1,1,/", ",0,1,0,/"))
    assert main(command) == 1
    assert "images, classes or groups are not what they were in validation: put" in capsys.readouterr().err
    assert files_of(out) == before


@pytest.mark.usefixtures("tiny_network")
def test_seeds_of_data_without_test_images_and_seeds_that_would_fall_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = make_birds(tmp_path / "birds"), tmp_path / "runs"
    lines = [line for line in table.read_text().splitlines() if line.split(",")[3] != "2"]
    table.write_text("\n".join(lines) + "\n")
    assert main(on_disk(table.parent, "--seeds", "2", "--out", str(out))) == 0
    together = read_run(out)
    assert "test" not in together.about["counts"]
    assert {record["text"] for record in judge(together)} >= {"training accuracy is near 100 %"}
    capsys.readouterr()
    assert main(["show", str(out / "results.json")]) == 0
    assert capsys.readouterr().out.startswith("results of waterbirds, seeds 0, 1\n  groups: landbird on land, ")
    before = files_of(out)
    assert main(on_disk(table.parent, "--seeds", "2", "--seed", "5", "--out", str(out))) == 1
    assert "holds runs of the seeds 0, 1, of which 0, 1 would fall out" in capsys.readouterr().err
    assert files_of(out) == before


@reads_few_run
def test_a_checkpoint_that_was_deleted_is_named(
    copied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch, message in ((0, "the checkpoints of epochs 0 are missing"), (1, "no checkpoint of epoch 1; found")):
        file = copied_run / "checkpoints" / f"epoch-00{epoch}.safetensors"
        file.rename(tmp_path / "elsewhere")
        assert main([*FEW, "--out", str(copied_run)]) == 1
        assert message in capsys.readouterr().err
        (tmp_path / "elsewhere").rename(file)


@reads_few_run
def test_another_run_in_the_folder_is_refused_unless_overwritten(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(copied_run)
    command = [*FEW[:-2], "1b", "--seed", "1", "--out", str(copied_run)]
    assert main(command) == 1
    assert "holds another run; --seed: this run 1, the folder 0" in capsys.readouterr().err
    assert files_of(copied_run) == before
    assert main([*command, "--overwrite"]) == 0
    assert read_run(copied_run).about["settings"]["seed"] == 1


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*FEW, "--overwrite", "--out", str(tmp_path)]) == 1
    assert "holds files that are no run of this study" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
