"""Empirical risk minimisation with a checkpoint per epoch, which resumes to the same bits wherever it was killed.

A run folder holds `checkpoints/epoch-000.safetensors` (before training) to `epoch-N`, and `optimizer.safetensors`: the
state of the optimiser after the epoch that its header names. Each file is complete or absent. The optimiser's file is
written last and is the one that counts: an epoch whose checkpoint is there without it is trained again, to the same
bits, because the batches of an epoch depend on (seed, epoch) alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from neuronsurgery.study.data import Augmentation, Batches, Split, batches, raw_bits


@dataclass(frozen=True)
class Recipe:
    """How to train. The learning rate falls from `learning_rate` to 0 along half a cosine, step by step.

    Attributes:
        optimizer: "adamw", or "sgd" with `momentum`.
        learning_rate: of the first step.
        weight_decay: decoupled for AdamW, an L2 term for SGD; it acts on every parameter.
        momentum: of SGD; AdamW does not look at it.
        epochs: passes over the training images.
        batch_size: images per step.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    epochs: int = 30
    batch_size: int = 64


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "adam": Recipe(),
        "sgd": Recipe("sgd", learning_rate=0.05, weight_decay=1e-3, momentum=0.9),
    }
)


@dataclass(frozen=True)
class EpochReport:
    """What one epoch of training came to; prints as one line.

    Attributes:
        epoch: 1 ... epochs.
        epochs: of the whole run.
        loss: mean cross entropy of the epoch's (augmented) images, each as it was met.
        accuracy: share of them that was met with the right answer, in [0, 1].
        seconds: that the epoch took.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}/{self.epochs}  loss {self.loss:.4f}  accuracy {100 * self.accuracy:5.1f} %  "
            f"{self.seconds:.1f} s"
        )


def print_progress(report: EpochReport) -> None:
    """Writes an epoch as one line to stderr; pass it to `train` as `progress`."""
    sys.stderr.write(f"{report}\n")


def train(
    model: nn.Module,
    split: Split,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe = RECIPES["adam"],
    seed: int = 0,
    augmentation: Augmentation | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> nn.Module:
    """A copy of `model`, trained on a split; `model` itself is the initialisation and stays as it is.

    Leaves a checkpoint per epoch in `folder`. Where `folder` holds an unfinished run of the same arguments, that run is
    taken up after its last finished epoch; a finished run is only loaded. On one machine, with one number of threads,
    the weights are the same bits whether or not a run was interrupted.

    Args:
        model: the initialised network; its parameters must be floating point, its output logits (B, classes).
        split: the training images.
        folder: the run folder, made if it is missing.
        recipe: optimiser, rates, epochs and batch size.
        seed: of the order of the images, their augmentation, and dropout if there is any.
        augmentation: how the images vary from epoch to epoch; None leaves them as they are.
        progress: called after each epoch, once its files are written.

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        ValueError: if `folder` holds a run of other arguments, or files that cannot be read.
        FileNotFoundError: if the checkpoint to go on from is missing.
    """
    folder = Path(folder)
    trained = copy.deepcopy(model).train()
    optimizer = _make_optimizer(trained, recipe)
    run = _describe_run(trained, split, recipe, seed, augmentation)
    finished = _resume(trained, optimizer, folder, run)
    if finished is None:
        _write_epoch(trained, optimizer, folder, 0, run)
    for epoch in range((finished or 0) + 1, recipe.epochs + 1):
        loader = batches(split, recipe.batch_size, seed=seed, epoch=epoch, shuffle=True, augmentation=augmentation)
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            # Only dropout draws from this state. Not torch.manual_seed: that would reseed the GPUs too.
            torch.default_generator.manual_seed(int(raw_bits(1, "dropout", seed, epoch)[0]) >> 1)
            loss, accuracy = _train_epoch(trained, optimizer, loader, recipe, epoch)
        _write_epoch(trained, optimizer, folder, epoch, run)
        if progress is not None:
            progress(EpochReport(epoch, recipe.epochs, loss, accuracy, time.perf_counter() - started))
    return trained.eval()


def checkpoint_path(folder: str | os.PathLike[str], epoch: int) -> Path:
    """Where a run folder keeps the weights after `epoch` (0: before training)."""
    return Path(folder) / "checkpoints" / f"epoch-{epoch:03d}.safetensors"


def checkpoint_epochs(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The epochs whose checkpoints a run folder holds, in ascending order; unfinished files do not count."""
    names = (path.name for path in (Path(folder) / "checkpoints").glob("epoch-*.safetensors"))
    matches = (re.fullmatch(r"epoch-(\d+)\.safetensors", name) for name in names)
    return tuple(sorted(int(match[1]) for match in matches if match))


def load_checkpoint(model: nn.Module, folder: str | os.PathLike[str], epoch: int) -> nn.Module:
    """A copy of `model` with the weights and buffers that it had after `epoch` (0: before training).

    Args:
        model: a network of the run's architecture; it stays as it is.
        folder: the run folder.
        epoch: of the checkpoint.

    Returns:
        The copy, in evaluation mode, on the devices of `model`.

    Raises:
        FileNotFoundError: if there is no such checkpoint; the message lists those that there are.
        ValueError: if the file cannot be read.
        RuntimeError: if the weights do not fit the model (from `load_state_dict`, which lists them).
    """
    path = checkpoint_path(folder, epoch)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no checkpoint of epoch {epoch}; found the epochs {list(checkpoint_epochs(folder))}: "
            f"choose one of them, or train again in an empty folder"
        )
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(_read(path)[0])
    return loaded.eval()


# One epoch


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":
        decay = recipe.weight_decay
        return torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=decay)
    raise ValueError(f"recipe: optimizer must be 'adamw' or 'sgd', found {recipe.optimizer!r}: pass one of them")


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: Batches, recipe: Recipe, epoch: int
) -> tuple[float, float]:
    """Trains `model` in place for one epoch; its mean loss and accuracy."""
    device = next(model.parameters()).device
    total_loss, correct = 0.0, 0
    for step, (images, targets, _) in enumerate(loader, start=(epoch - 1) * len(loader)):
        for group in optimizer.param_groups:  # a function of the step alone: nothing to save, nothing to restore
            group["lr"] = _cosine(recipe.learning_rate, step, recipe.epochs * len(loader))
        images, targets = images.to(device), targets.to(device)
        with torch.enable_grad():
            logits = model(images)
            loss = functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        optimizer.step()
        total_loss += loss.item() * len(targets)
        correct += int((logits.argmax(dim=1) == targets).sum())
    return total_loss / len(loader.split), correct / len(loader.split)


def _cosine(start: float, step: int, steps: int) -> float:
    return start * (1 + math.cos(math.pi * step / steps)) / 2


# The run folder


def _describe_run(
    model: nn.Module, split: Split, recipe: Recipe, seed: int, augmentation: Augmentation | None
) -> dict[str, object]:
    """All that the weights depend on, as JSON values: two runs with equal descriptions are the same run."""
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "augmentation": None if augmentation is None else asdict(augmentation),
        "initial weights": _digest(model.state_dict().values()),
        "images and targets": _digest([split.images, split.targets]),
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _write_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, epoch: int, run: Mapping[str, object]
) -> None:
    _write(model.state_dict(), checkpoint_path(folder, epoch), {"epoch": str(epoch)})
    moments = {
        f"{index}/{name}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
        if tensor is not None  # SGD without momentum keeps an empty slot
    }
    _write(moments, _optimizer_path(folder), {"epoch": str(epoch), "run": json.dumps(run)})


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, run: Mapping[str, object]) -> int | None:
    """Loads the last finished epoch into model and optimiser and returns it; None where there is none."""
    if not _optimizer_path(folder).exists():
        return None
    moments, header = _read(_optimizer_path(folder))
    found = json.loads(header.get("run", "{}"))
    differing = [f"{key}: expected {run[key]}, found {found.get(key)}" for key in run if run[key] != found.get(key)]
    if differing:
        raise ValueError(f"{folder} holds another run; {'; '.join(differing)}: choose another folder or empty this one")
    epoch = int(header["epoch"])
    model.load_state_dict(load_checkpoint(model, folder, epoch).state_dict())
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return epoch


def _optimizer_path(folder: Path) -> Path:
    return folder / "optimizer.safetensors"


def _write(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Writes a safetensors file that is either complete or absent, even if the process or the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return load_file(path), header
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, found {error}: empty the folder and train again") from error
