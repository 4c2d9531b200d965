"""What several tests of the study train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuronsurgery.study import data
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import Recipe, checkpoint_epochs, checkpoint_path, read_trajectory, train


@pytest.fixture(scope="session")
def erm() -> Callable[[data.DataSet, Path, Recipe], Trained]:
    """Trains the small network by empirical risk minimisation, as the stages are given it."""
    pytest.importorskip("sklearn.linear_model")  # its import draws from Python's random state, once

    def trained(dataset: data.DataSet, path: Path, recipe: Recipe) -> Trained:
        model = train(small_resnet(0), dataset.train, path, recipe=recipe)
        checkpoints = {epoch: checkpoint_path(path, epoch) for epoch in checkpoint_epochs(path)}
        return Trained(model, checkpoints, read_trajectory(path), studied({"head.weight", "head.bias"}))

    return trained
