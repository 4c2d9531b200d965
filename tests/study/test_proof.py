"""What the fragility stage and a search promise on the embedded data, over three seeds. Minutes: run with `-m slow`."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import neuronsurgery as ns
from neuronsurgery.study import data
from neuronsurgery.study.experiments import studied
from neuronsurgery.study.network import small_resnet
from neuronsurgery.study.run import RunFolder, Settings
from neuronsurgery.study.stage_fragility import Row, stage_fragility
from neuronsurgery.study.stage_one import Trained
from neuronsurgery.study.training import checkpoint_epochs, checkpoint_path, read_trajectory, train


def run(seed: int, path: Path) -> Row:
    """The fragility stage of one seed of the synthetic data."""
    dataset = data.synthetic(seed)
    model = train(small_resnet(seed), dataset.train, path / "erm", seed=seed, augmentation=dataset.augmentation)
    checkpoints = {epoch: checkpoint_path(path / "erm", epoch) for epoch in checkpoint_epochs(path / "erm")}
    trained = Trained(model, checkpoints, read_trajectory(path / "erm"), studied({"head.weight", "head.bias"}))
    return stage_fragility(RunFolder(path / "run", Settings(seed=seed, draws=1)), dataset, trained)


@pytest.mark.slow
def test_the_knockout_finds_the_minorities_and_retraining_on_them_helps(tmp_path: Path) -> None:
    results = [run(seed, tmp_path / str(seed)) for seed in range(3)]

    def auc(score: str, group: str) -> float:
        rows = [row for result in results for row in result["detection"]["train"]]
        return statistics.fmean(row["auc"] for row in rows if (row["score"], row["group"]) == (score, group))

    def worst(name: str) -> float:
        return statistics.fmean(
            row["worst"] for result in results for row in result["mitigation"] if row["name"] == name
        )

    for group in ("landbird on water", "waterbird on land"):
        assert auc("knockout", group) >= 0.97
    assert auc("knockout", "landbird on water") >= auc("final margin", "landbird on water") + 0.1
    assert worst("inferred by knockout") >= worst("class-balanced") + 0.05


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


@pytest.mark.slow
def test_effects_predict_and_what_a_search_finds_holds_on_the_other_half(tmp_path: Path) -> None:
    """Over seeds 0 to 2: first order ranks all 336 neurons, and three of them carry the smallest group."""
    nets = []
    for seed in range(3):
        dataset = data.synthetic(seed)
        model = train(
            small_resnet(seed), dataset.train, tmp_path / str(seed), augmentation=dataset.augmentation, seed=seed
        )
        loaders = dataset.loaders("train")
        layout = ns.find_layout(model, where=studied({"head.weight", "head.bias"}))
        assert layout.count == 336
        predicted = ns.group_effects(model, loaders, layout=layout, edit="mean")
        neurons = [layout.neurons([i]) for i in range(layout.count)]
        edits = {str(i): ns.mean_out(neuron, model, loaders) for i, neuron in enumerate(neurons)}
        swept = ns.sweep(model, edits, loaders, metric=ns.margin)
        for group in ("landbird on water", "waterbird on land"):
            exact = torch.tensor([swept.change(label)[group] for label in edits])
            both = torch.stack([ranks(exact), ranks(predicted[group].values[0])])
            assert torch.corrcoef(both)[0, 1] >= 0.85, (seed, group)
        search, rest = ns.halves(loaders)
        found = ns.find_critical(model, search, "waterbird on land", layout=layout)
        nets.append(ns.judge(found, model, rest, "waterbird on land", draws=0).net)
    assert statistics.fmean(nets) >= 0.30
