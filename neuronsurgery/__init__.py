"""Model surgery for PyTorch: which few neurons carry a group of examples, and what happens when they are cut."""

from neuronsurgery import memorization, objectives, types
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
    "scale",
    "select",
    "set_rows",
    "share",
    "silence",
    "sweep",
    "top_fraction",
    "topk",
    "types",
    "with_groups",
    "zero_out",
]
