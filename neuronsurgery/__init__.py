"""Model surgery for PyTorch: which few neurons carry a group of examples, and what happens when they are cut.

A name is imported with the module that defines it when it is first asked for: `import neuronsurgery` alone imports
nothing else, not even torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not call `__getattr__`
    from neuronsurgery import lora, memorization, objectives, types
    from neuronsurgery.batches import Batch
    from neuronsurgery.checkpoints import rewind
    from neuronsurgery.comparisons import contrast, overlap, ranks
    from neuronsurgery.critical import Critical, find_critical
    from neuronsurgery.discovery import find_layout
    from neuronsurgery.edits import Edit, compose, file_kind, random_init, random_noise, scale, zero_out
    from neuronsurgery.effects import error_probability, group_effects
    from neuronsurgery.errors import CaptureError
    from neuronsurgery.evaluation import GroupMetrics, evaluate
    from neuronsurgery.files import load_file, save_file
    from neuronsurgery.folders import load_folder, save_folder
    from neuronsurgery.fragile import InferredGroups, fragility, infer_groups
    from neuronsurgery.gradients import group_grad_norms
    from neuronsurgery.graph.residual import Branch, residual_branches
    from neuronsurgery.hard import hard_batch
    from neuronsurgery.judgement import Verdict, judge
    from neuronsurgery.layers import Layer
    from neuronsurgery.layouts import Layout, select
    from neuronsurgery.loaders import with_groups
    from neuronsurgery.losses import accuracy, causal_lm_loss, causal_margin, cross_entropy, margin, recited
    from neuronsurgery.masks import learned_mask
    from neuronsurgery.means import mean_out
    from neuronsurgery.neurons import Neuron, Neurons
    from neuronsurgery.objectives import contrastive_pruning_loss
    from neuronsurgery.outcomes import Sweep
    from neuronsurgery.plans import Plan, plan
    from neuronsurgery.rows import set_rows
    from neuronsurgery.scores import Scores, grad_norms, magnitudes, sample, top_fraction, topk
    from neuronsurgery.sharing import Shared, share
    from neuronsurgery.silencing import silence
    from neuronsurgery.splits import Matched, halves, matched
    from neuronsurgery.surgery import apply, bake, edited_parameters
    from neuronsurgery.sweeps import sweep
    from neuronsurgery.training import TrainOnly, train_only
    from neuronsurgery.units import find_units

__all__ = [
    "Batch",
    "Branch",
    "CaptureError",
    "Critical",
    "Edit",
    "GroupMetrics",
    "InferredGroups",
    "Layer",
    "Layout",
    "Matched",
    "Neuron",
    "Neurons",
    "Plan",
    "Scores",
    "Shared",
    "Sweep",
    "TrainOnly",
    "Verdict",
    "accuracy",
    "apply",
    "bake",
    "causal_lm_loss",
    "causal_margin",
    "compose",
    "contrast",
    "contrastive_pruning_loss",
    "cross_entropy",
    "edited_parameters",
    "error_probability",
    "evaluate",
    "file_kind",
    "find_critical",
    "find_layout",
    "find_units",
    "fragility",
    "grad_norms",
    "group_effects",
    "group_grad_norms",
    "halves",
    "hard_batch",
    "infer_groups",
    "judge",
    "learned_mask",
    "load_file",
    "load_folder",
    "lora",
    "magnitudes",
    "margin",
    "matched",
    "mean_out",
    "memorization",
    "objectives",
    "overlap",
    "plan",
    "random_init",
    "random_noise",
    "ranks",
    "recited",
    "residual_branches",
    "rewind",
    "sample",
    "save_file",
    "save_folder",
    "scale",
    "select",
    "set_rows",
    "share",
    "silence",
    "sweep",
    "top_fraction",
    "topk",
    "train_only",
    "types",
    "with_groups",
    "zero_out",
]

_HOMES = {
    "batches": ("Batch",),
    "checkpoints": ("rewind",),
    "comparisons": ("contrast", "overlap", "ranks"),
    "critical": ("Critical", "find_critical"),
    "discovery": ("find_layout",),
    "edits": ("Edit", "compose", "file_kind", "random_init", "random_noise", "scale", "zero_out"),
    "effects": ("error_probability", "group_effects"),
    "errors": ("CaptureError",),
    "evaluation": ("GroupMetrics", "evaluate"),
    "files": ("load_file", "save_file"),
    "folders": ("load_folder", "save_folder"),
    "fragile": ("InferredGroups", "fragility", "infer_groups"),
    "gradients": ("group_grad_norms",),
    "graph.residual": ("Branch", "residual_branches"),
    "hard": ("hard_batch",),
    "judgement": ("Verdict", "judge"),
    "layers": ("Layer",),
    "layouts": ("Layout", "select"),
    "loaders": ("with_groups",),
    "losses": ("accuracy", "causal_lm_loss", "causal_margin", "cross_entropy", "margin", "recited"),
    "masks": ("learned_mask",),
    "means": ("mean_out",),
    "neurons": ("Neuron", "Neurons"),
    "objectives": ("contrastive_pruning_loss",),
    "outcomes": ("Sweep",),
    "plans": ("Plan", "plan"),
    "rows": ("set_rows",),
    "scores": ("Scores", "grad_norms", "magnitudes", "sample", "top_fraction", "topk"),
    "sharing": ("Shared", "share"),
    "silencing": ("silence",),
    "splits": ("Matched", "halves", "matched"),
    "surgery": ("apply", "bake", "edited_parameters"),
    "sweeps": ("sweep",),
    "training": ("TrainOnly", "train_only"),
    "units": ("find_units",),
}
"""The modules that define the names of `__all__`; the other names are modules."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}


def _import_name(name: str) -> Any:
    """Return a public name, or a module of the package, imported now.

    Raises:
        AttributeError: if there is neither.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOME.get(name, name)}"
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    found = getattr(module, name) if name in _HOME else module
    globals()[name] = found  # so that it is asked for once
    return found


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours
    __getattr__ = _import_name


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
