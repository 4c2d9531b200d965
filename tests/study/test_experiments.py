"""The edits that Stage 1 makes, and how its draws are taken together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import named
from torch import nn

import neuronsurgery as ns
from neuronsurgery.study.experiments import (
    DISTANCES,
    EXPERIMENTS,
    RELATIVE_STD,
    STANDARD_DEVIATIONS,
    Intervention,
    Subject,
)

DRAWS = 4


@pytest.fixture
def model() -> nn.Module:
    """Two layers of four and three neurons, one of a single neuron, and a norm that follows the first."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2)
    ).eval()


@pytest.fixture
def loaders() -> dict[str, list[Any]]:
    return {name: [(torch.randn(6, 2, 2, 2), torch.arange(6) % 2)] for name in ("a", "b")}


def subject_of(model: nn.Module, loaders: dict[str, list[Any]], folder: Path, epochs: int = 10) -> Subject:
    """With a checkpoint per epoch; all convolutions are studied."""
    where = "[0-4].*"
    paths = {epoch: folder / f"{epoch}.pt" for epoch in range(epochs + 1)}
    for path in paths.values():
        torch.save(model.state_dict(), path)
    gradients = ns.group_grad_norms(model, loaders, where=where)
    return Subject(model, gradients, ns.magnitudes(model, where=where), DRAWS, DRAWS, paths, loaders["a"][0])


def made(name: str, model: nn.Module, loaders: dict[str, list[Any]], folder: Path) -> list[Intervention]:
    return list(EXPERIMENTS[name](subject_of(model, loaders, folder)))


def test_the_top_1_to_3_are_cut_for_every_group_and_by_magnitude(
    model: nn.Module, loaders: dict[str, list[Any]], tmp_path: Path
) -> None:
    subject = subject_of(model, loaders, tmp_path)
    found = {(said.criterion, said.chosen_for, said.k): said.edit.neurons for said in EXPERIMENTS["1a"](subject)}
    assert len(found) == 3 * 3
    for k in (1, 2, 3):
        assert found["gradient", "a", k] == ns.topk(subject.gradients["a"], k)
        assert found["magnitude", "all", k] == ns.topk(subject.magnitudes, k)


@pytest.mark.parametrize("name", ["1c", "1d"])
def test_random_edits_have_three_absolute_scales_and_a_relative_one_and_all_draws(
    name: str, model: nn.Module, loaders: dict[str, list[Any]], tmp_path: Path
) -> None:
    interventions = made(name, model, loaders, tmp_path)
    assert len(interventions) == 3 * 3 * 4 * DRAWS
    assert {said.std for said in interventions} == {*STANDARD_DEVIATIONS, None}
    assert {said.relative_std for said in interventions} == {RELATIVE_STD, None}
    assert {said.draw for said in interventions} == set(range(DRAWS))
    assert len({said.edit for said in interventions}) > 4 * (DRAWS - 1)  # each draw is another one


def test_within_layers_every_layer_has_its_turn_and_all_of_it_where_it_has_fewer_than_k(
    model: nn.Module, loaders: dict[str, list[Any]], tmp_path: Path
) -> None:
    interventions = made("1e", model, loaders, tmp_path)
    assert len(interventions) == 3 * 3 * 3  # k, ways to choose, layers
    for said in interventions:
        (layer,) = named(said.edit.neurons.by_layer())
        assert layer == said.layer
        assert len(said.edit.neurons) == (1 if layer == "2.weight" else said.k)


def test_rewinds_take_weight_and_bias_together_and_the_norm_as_a_variant(
    model: nn.Module, loaders: dict[str, list[Any]], tmp_path: Path
) -> None:
    interventions = made("1f", model, loaders, tmp_path)
    assert {said.distance for said in interventions} == {5, 10} < set(DISTANCES)
    layers = {(said.layer, said.with_norm): set(named(said.edit.neurons.by_layer())) for said in interventions}
    assert layers["0.weight", False] == {"0.weight", "0.bias"}
    assert layers["0.weight", True] == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert ("3.weight", True) not in layers  # no norm follows it


def test_controls_leave_the_critical_neurons_alone_and_pass_over_layers_that_have_no_others(
    model: nn.Module, loaders: dict[str, list[Any]], tmp_path: Path
) -> None:
    subject = subject_of(model, loaders, tmp_path)
    interventions = list(EXPERIMENTS["1g"](subject))
    kinds = {said.criterion for said in interventions}
    assert kinds == {"random", "same layers"}
    for said in interventions:
        assert not said.edit.neurons & subject.critical
    matched = [said for said in interventions if said.criterion == "same layers"]
    chosen = {(group if by == "gradient" else "all", k): neurons for by, group, k, neurons in subject.chosen()}
    assert len(matched) == len(chosen) * DRAWS
    for said in matched:
        assert set(named(said.edit.neurons.by_layer())) <= set(named(chosen[said.chosen_for, said.k or 0].by_layer()))
