"""Model surgery for PyTorch: which few neurons carry a group of examples, and what happens when they are cut."""

from neuronsurgery.artifacts import load_file as load_file
from neuronsurgery.artifacts import save_file as save_file
from neuronsurgery.coupling import coupled as coupled
from neuronsurgery.edits import Edit as Edit
from neuronsurgery.edits import compose as compose
from neuronsurgery.edits import random_init as random_init
from neuronsurgery.edits import random_noise as random_noise
from neuronsurgery.edits import rewind as rewind
from neuronsurgery.edits import scale as scale
from neuronsurgery.edits import zero_out as zero_out
from neuronsurgery.evaluation import GroupMetrics as GroupMetrics
from neuronsurgery.evaluation import accuracy as accuracy
from neuronsurgery.evaluation import evaluate as evaluate
from neuronsurgery.fragility import Branch as Branch
from neuronsurgery.fragility import InferredGroups as InferredGroups
from neuronsurgery.fragility import fragility as fragility
from neuronsurgery.fragility import infer_groups as infer_groups
from neuronsurgery.fragility import margin as margin
from neuronsurgery.fragility import residual_branches as residual_branches
from neuronsurgery.gradients import causal_lm_loss as causal_lm_loss
from neuronsurgery.gradients import cross_entropy as cross_entropy
from neuronsurgery.gradients import grad_norms as grad_norms
from neuronsurgery.gradients import group_grad_norms as group_grad_norms
from neuronsurgery.gradients import hard_batch as hard_batch
from neuronsurgery.memorization import MemorizationScores as MemorizationScores
from neuronsurgery.memorization import memorization_scores as memorization_scores
from neuronsurgery.neurons import Layer as Layer
from neuronsurgery.neurons import Layout as Layout
from neuronsurgery.neurons import Neuron as Neuron
from neuronsurgery.neurons import Neurons as Neurons
from neuronsurgery.neurons import find_layout as find_layout
from neuronsurgery.neurons import select as select
from neuronsurgery.objectives import contrastive_pruning_loss as contrastive_pruning_loss
from neuronsurgery.objectives import group_dro as group_dro
from neuronsurgery.objectives import jtt_weights as jtt_weights
from neuronsurgery.objectives import nt_xent as nt_xent
from neuronsurgery.objectives import supervised_contrastive as supervised_contrastive
from neuronsurgery.scores import Scores as Scores
from neuronsurgery.scores import contrast as contrast
from neuronsurgery.scores import magnitudes as magnitudes
from neuronsurgery.scores import overlap as overlap
from neuronsurgery.scores import ranks as ranks
from neuronsurgery.scores import sample as sample
from neuronsurgery.scores import top_fraction as top_fraction
from neuronsurgery.scores import topk as topk
from neuronsurgery.surgery import apply as apply
from neuronsurgery.surgery import bake as bake
from neuronsurgery.surgery import edited_parameters as edited_parameters
from neuronsurgery.sweep import Sweep as Sweep
from neuronsurgery.sweep import sweep as sweep
from neuronsurgery.types import Batch as Batch

__all__ = [
    "Batch",
    "Branch",
    "Edit",
    "GroupMetrics",
    "InferredGroups",
    "Layer",
    "Layout",
    "MemorizationScores",
    "Neuron",
    "Neurons",
    "Scores",
    "Sweep",
    "accuracy",
    "apply",
    "bake",
    "causal_lm_loss",
    "compose",
    "contrast",
    "contrastive_pruning_loss",
    "coupled",
    "cross_entropy",
    "edited_parameters",
    "evaluate",
    "find_layout",
    "fragility",
    "grad_norms",
    "group_dro",
    "group_grad_norms",
    "hard_batch",
    "infer_groups",
    "jtt_weights",
    "load_file",
    "magnitudes",
    "margin",
    "memorization_scores",
    "nt_xent",
    "overlap",
    "random_init",
    "random_noise",
    "ranks",
    "residual_branches",
    "rewind",
    "sample",
    "save_file",
    "scale",
    "select",
    "supervised_contrastive",
    "sweep",
    "top_fraction",
    "topk",
    "zero_out",
]
