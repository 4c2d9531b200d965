"""Stage 1 of the paper: which edits each experiment makes, and what they change.

An experiment is a list of interventions: a labelled edit with what it was chosen by. Measuring them is one function for
all experiments. A change is always between the same examples, before and after.

Source: You et al., "The Silent Majority", 2025, experiments 1a (global zero-out) and 1g (control).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.types import Loader

CONTROL_FRACTIONS: Final = (0.0001, 0.0002, 0.0003, 0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
"""Shares of the model that the control prunes, 0.01 % to 3 %."""

CONTROL_SEED: Final = 20250101
"""First seed of the controls' draws: fixed, so that no run's seed chooses its own controls."""


def is_convolution(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a layer is studied: convolutions are, the classifier's own rows are not.

    To zero one of those decides between the classes by construction and says nothing about memorisation.
    """
    return isinstance(module, nn.Conv2d)


@dataclass(frozen=True)
class Intervention:
    """One edit of an experiment.

    Attributes:
        experiment: "1a" or "1g".
        criterion: what the neurons were chosen by: "gradient", "magnitude" or "random".
        chosen_for: the group whose gradient chose them, or "all".
        size: k of top-k, or the share of the model for a control.
        draw: the number of the random draw, 0 where nothing is drawn.
        edit: the edit.
    """

    experiment: str
    criterion: str
    chosen_for: str
    size: float
    draw: int
    edit: ns.Edit

    @property
    def label(self) -> str:
        """A name that no other intervention of a run has, fit for a file."""
        words = (self.experiment, self.criterion, self.chosen_for, f"{self.size:g}", f"draw {self.draw}")
        return " ".join(words).replace(" ", "-")


@dataclass(frozen=True)
class Outcome:
    """What an intervention changed.

    Attributes:
        intervention: the intervention.
        change: by group, accuracy after minus accuracy before, in percentage points.
    """

    intervention: Intervention
    change: Mapping[str, float]

    def to_record(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        said = self.intervention
        return {
            "experiment": said.experiment,
            "criterion": said.criterion,
            "chosen_for": said.chosen_for,
            "size": said.size,
            "draw": said.draw,
            "neurons": [str(neuron) for neuron in said.edit.neurons],
            "change": dict(self.change),
        }


def global_zero_out(
    gradients: ns.Scores, magnitudes: ns.Scores, sizes: Sequence[int] = (1, 2, 3)
) -> list[Intervention]:
    """Return experiment 1a: zero the top-k neurons of the whole model, by each group's gradient and by magnitude."""
    chosen = [
        ("gradient", str(group), k, ns.topk(gradients[group], k)) for group in gradients.groups for k in sizes
    ] + [("magnitude", "all", k, ns.topk(magnitudes, k)) for k in sizes]
    return [Intervention("1a", criterion, group, k, 0, ns.zero_out(neurons)) for criterion, group, k, neurons in chosen]


def random_controls(
    layout: ns.Layout, critical: ns.Neurons, draws: int, fractions: Sequence[float] = CONTROL_FRACTIONS
) -> list[Intervention]:
    """Return experiment 1g: zero random neurons that are not critical, a share of the model, at least one neuron."""
    return [
        Intervention(
            "1g",
            "random",
            "all",
            fraction,
            draw,
            ns.zero_out(
                ns.sample(layout, max(1, round(fraction * layout.count)), seed=CONTROL_SEED + draw, exclude=critical)
            ),
        )
        for fraction in fractions
        for draw in range(draws)
    ]


def critical_neurons(interventions: Sequence[Intervention]) -> ns.Neurons:
    """Return every neuron that some interventions touch."""
    united = ns.Neurons()
    for intervention in interventions:
        united |= intervention.edit.neurons
    return united


def measure(
    model: nn.Module, interventions: Sequence[Intervention], loaders: Mapping[str, Loader], *, progress: bool = False
) -> tuple[ns.GroupMetrics, list[Outcome]]:
    """Return the accuracy per group of the model as it is, and what each intervention changes."""
    edits = {intervention.label: intervention.edit for intervention in interventions}
    swept = ns.sweep(model, edits, loaders, progress=progress)
    outcomes = [
        Outcome(intervention, {group: 100 * swept.change(intervention.label)[group] for group in loaders})
        for intervention in interventions
    ]
    return swept.baseline, outcomes
