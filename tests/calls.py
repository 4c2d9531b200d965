"""One call of every public function that runs or copies a model, for tests of what has to hold for all of them.

Interrupts and threads are tried on these: see `test_calls.py`, and the programs `interrupts.py` and `threads.py` in the
benchmarks.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.copies import eval_copy
from neuronsurgery.memorization import memorization_scores


class Small(nn.Module):
    """A convolution with a norm, attention with dropout, and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.attention = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.1, batch_first=True)
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).mean(1)
        return self.head(x + self.branch(x).relu())  # type: ignore[no-any-return]


class Drawing(Small):
    """It draws in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(len(x), 3)


@dataclass(frozen=True)
class Setting:
    """What a call is given: made anew for each thread, or shared."""

    model: nn.Module
    data: list[tuple[Tensor, Tensor, Tensor]]
    edit: ns.Edit
    state: Mapping[str, Tensor]


def setting(kind: type[nn.Module] = Small) -> Setting:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        data = [(torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
    edit = ns.zero_out(ns.select(ns.find_layout(model), {"conv.weight": 1, "attention.linear1.weight": slice(0, 2)}))
    return Setting(model, data, edit, state)


def swept(given: Setting, **options: Any) -> ns.Sweep:
    head = ns.random_noise(ns.select(ns.find_layout(given.model), {"head.weight": 0}), std=0.1, seed=1)
    return ns.sweep(given.model, {"cut": given.edit, "head": head}, given.data, **options)


def saved(value: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        ns.save_file(value, Path(folder) / "kept.safetensors")
        return ns.load_file(Path(folder) / "kept.safetensors")


def fragile(given: Setting) -> Any:
    values = torch.arange(60.0).reshape(2, 30).sin()
    targets = torch.arange(30) % 2
    scores = ns.fragility(values, targets)
    return scores, ns.infer_groups(scores, targets, rule=0.3).groups


def gradients(given: Setting) -> ns.Scores:
    found = ns.find_layout(given.model)
    names = {layer.parameter: given.model.get_parameter(layer.parameter).detach().sin() for layer in found}
    return ns.grad_norms(names, found)


def memorized(given: Setting) -> Any:
    return memorization_scores(lambda kept, seed: kept.double() * 0.5 + 0.25, 6, models=8, seed=0).values


CALLS: dict[str, Callable[[Setting], Any]] = {
    "find_layout": lambda given: ns.find_layout(given.model),
    "magnitudes": lambda given: ns.magnitudes(given.model),
    "grad_norms": gradients,
    "group_grad_norms": lambda given: ns.group_grad_norms(given.model, given.data),
    "group_grad_norms by loader": lambda given: ns.group_grad_norms(
        given.model, {"a": given.data, "b": given.data[:1]}
    ),
    "group_grad_norms of whole batches": lambda given: ns.group_grad_norms(given.model, given.data, regroup=False),
    "topk": lambda given: ns.topk(ns.magnitudes(given.model), 3),
    "sample": lambda given: ns.sample(ns.find_layout(given.model), 3, seed=1),
    "hard_batch": lambda given: ns.hard_batch(given.model, given.data, top=4, sample=2).args[0],
    "evaluate": lambda given: ns.evaluate(given.model, given.data),
    "apply": lambda given: ns.apply(given.edit, given.model).eval()(given.data[0][0]),
    "bake": lambda given: ns.bake(given.edit, given.model).eval()(given.data[0][0]),
    "edited_parameters": lambda given: ns.edited_parameters(given.edit, given.model),
    "plan": lambda given: ns.plan(given.edit, given.model)(dict(given.model.named_parameters())),
    "rewind": lambda given: ns.bake(ns.rewind(given.edit.neurons, given.state), given.model).conv.weight,  # type: ignore[attr-defined,union-attr]
    "eval_copy": lambda given: eval_copy(given.model)(given.data[0][0]),
    "sweep": swept,
    "residual_branches": lambda given: ns.residual_branches(given.model, given.data[0]),
    "coupled": lambda given: ns.coupled(given.edit.neurons, given.model, given.data[0]),  # type: ignore[attr-defined]
    "fragility": fragile,
    "memorization_scores": memorized,
    "save_file and load_file": lambda given: saved(given.edit),
}
CAPTURING = ("sweep", "residual_branches", "coupled")


def run(name: str, given: Setting) -> Any:
    """What a call returns; what it warns of is none of these tests' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CALLS[name](given)


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, tensors by their bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict | tuple):
        pairs = (
            zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
        )
        return len(one) == len(other) and all(same(a, b) for a, b in pairs)
    return bool(one == other)
