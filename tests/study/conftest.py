"""What several tests of the study train and run."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.study import data, models, program
from neuronsurgery.study.cli import main
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import Recipe, checkpoint_epochs, checkpoint_path, read_trajectory, train
from study.little_study import tiny_resnet

COUNTS = {
    "train": (40, 8, 6, 20),
    "held-out": (40, 8, 6, 20),
    "validation": (6,) * 4,
    "test": (8,) * 4,
}


@pytest.fixture(scope="module", autouse=True)
def one_by_one() -> Iterator[None]:
    """Every edit by a forward pass of its own: of these networks it takes a thousandth of the time of a capture.

    The results are the same bits, which the tests of sweeps hold to. In forks, and in the commands that users run, the
    study shares forward passes.
    """

    def alone(forward: CheckedForward, args: Any, kwargs: Any, edits: Any, batches: int = 1) -> Iterator[Any]:
        return forward.one_by_one(args, kwargs, edits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedForward, "run", alone)
        yield


@pytest.fixture(scope="session")
def erm() -> Callable[[data.DataSet, Path, Recipe], Trained]:
    """Trains a tiny network by empirical risk minimisation, as the stages are given it."""
    pytest.importorskip("sklearn.linear_model")  # its import draws from Python's random state, once

    def trained(dataset: data.DataSet, path: Path, recipe: Recipe) -> Trained:
        model = train(tiny_resnet(0), dataset.train, path, recipe=recipe)
        checkpoints = {epoch: checkpoint_path(path, epoch) for epoch in checkpoint_epochs(path)}
        return Trained(model, checkpoints, read_trajectory(path), studied({"head.weight", "head.bias"}))

    return trained


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of all stages on few images, for reading only, and what was printed.

    Tests that share it are of the xdist group "whole run".
    """
    made: Callable[..., data.DataSet] = data.synthetic
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        few = {"synthetic": lambda seed, counts=None: made(seed, counts=COUNTS)}
        patch.setattr("neuronsurgery.study.program.EMBEDDED", few)
        patch.setattr(models, "small_resnet", tiny_resnet)
        patch.setitem(program.QUICK, "control_draws", 5)  # whatever the module that asks for it first has patched
        assert main(["study", "--quick", "--experiments", "1a", "1b", "1f", "1g", "--out", str(folder)]) == 0
    return folder, printed.getvalue()
