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
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, Protocol

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


class Source(Protocol):
    """Where training images come from: `Embedded`, or images read from disk."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def describe(self) -> dict[str, object]:
        """All that the batches depend on but size, seed and epoch, as JSON values."""
        ...

    def epoch(self, size: int, seed: int, epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Batches of `(images, targets, groups)` of one epoch, as (seed, epoch) alone decide; it has a length."""
        ...


@dataclass(frozen=True, eq=False)
class Embedded:
    """A split in memory and how its images vary from epoch to epoch."""

    split: Split
    augmentation: Augmentation | None

    def __len__(self) -> int:
        return len(self.split)

    def describe(self) -> dict[str, object]:
        """See `Source`."""
        return {
            "augmentation": None if self.augmentation is None else asdict(self.augmentation),
            "images and targets": _digest([self.split.images, self.split.targets]),
        }

    def epoch(self, size: int, seed: int, epoch: int) -> Batches:
        """See `Source`."""
        return batches(self.split, size, seed=seed, epoch=epoch, shuffle=True, augmentation=self.augmentation)


@dataclass(frozen=True)
class Hardware:
    """Where and how the arithmetic of training is done.

    Attributes:
        device: of model and images; None leaves the model where it is.
        bfloat16: whether to train under autocast to bfloat16.
        channels_last: whether images and weights are laid out channels last.
    """

    device: str | None = None
    bfloat16: bool = False
    channels_last: bool = False


def print_progress(report: EpochReport) -> None:
    """Writes an epoch as one line to stderr; pass it to `train` as `progress`."""
    sys.stderr.write(f"{report}\n")


def train(
    model: nn.Module,
    source: Split | Source,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe = RECIPES["adam"],
    seed: int = 0,
    augmentation: Augmentation | None = None,
    hardware: Hardware = Hardware(),
    progress: Callable[[EpochReport], None] | None = None,
) -> nn.Module:
    """A copy of `model`, trained; `model` itself is the initialisation and stays as it is.

    Leaves a checkpoint per epoch in `folder`. Where `folder` holds an unfinished run of the same arguments, that run is
    taken up after its last finished epoch; a finished run is only loaded. On one machine, with one number of threads,
    the weights are the same bits whether or not a run was interrupted.

    Args:
        model: the initialised network; its parameters must be floating point, its output logits (B, classes).
        source: the training images: a split in memory, or what else can give batches by (seed, epoch).
        folder: the run folder, made if it is missing.
        recipe: optimiser, rates, epochs and batch size.
        seed: of the order of the images, their augmentation, and dropout if there is any.
        augmentation: how the images of a split vary from epoch to epoch; None leaves them as they are.
        hardware: device, precision and memory layout.
        progress: called after each epoch, once its files are written.

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        ValueError: if `folder` holds a run of other arguments, or files that cannot be read.
        FileNotFoundError: if the checkpoint to go on from is missing.
    """
    folder = Path(folder)
    if isinstance(source, Split):
        source = Embedded(source, augmentation)
    trained = copy.deepcopy(model).train().to(hardware.device)
    if hardware.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    optimizer = _make_optimizer(trained, recipe)
    run = _describe_run(trained, source, recipe, seed, hardware)
    finished = _resume(trained, optimizer, folder, run)
    if finished is None:
        _write_epoch(trained, optimizer, folder, 0, run)
    for epoch in range((finished or 0) + 1, recipe.epochs + 1):
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            # Only dropout draws from this state. Not torch.manual_seed: that would reseed the GPUs too.
            torch.default_generator.manual_seed(int(raw_bits(1, "dropout", seed, epoch)[0]) >> 1)
            loader = source.epoch(recipe.batch_size, seed, epoch)
            loss, accuracy = _train_epoch(trained, optimizer, loader, recipe, epoch, hardware)
        report = EpochReport(epoch, recipe.epochs, loss, accuracy, time.perf_counter() - started)
        _write_epoch(trained, optimizer, folder, epoch, run, report)
        if progress is not None:
            progress(report)
    return trained.eval()


def read_trajectory(folder: str | os.PathLike[str]) -> list[dict[str, object]]:
    """By epoch of a run folder, the mean loss and the accuracy as met in training (None before training)."""
    trajectory: list[dict[str, object]] = []
    for epoch in checkpoint_epochs(folder):
        header = _read_header(checkpoint_path(folder, epoch))
        met = {name: float(header[name]) if name in header else None for name in ("loss", "accuracy")}
        trajectory.append({"epoch": epoch, **met})
    return trajectory


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    recipe: Recipe,
    epoch: int,
    hardware: Hardware,
) -> tuple[float, float]:
    """Trains `model` in place for one epoch; its mean loss and accuracy."""
    device = next(model.parameters()).device
    assert isinstance(loader, Sized), "a Source gives batches that have a length"
    total_loss, correct, seen = 0.0, 0, 0
    for step, (images, targets, _) in enumerate(loader, start=(epoch - 1) * len(loader)):
        for group in optimizer.param_groups:  # a function of the step alone: nothing to save, nothing to restore
            group["lr"] = _cosine(recipe.learning_rate, step, recipe.epochs * len(loader))
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if hardware.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=hardware.bfloat16):
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        optimizer.step()
        total_loss += loss.item() * len(targets)
        correct += int((logits.argmax(dim=1) == targets).sum())
        seen += len(targets)
    return total_loss / seen, correct / seen


def _cosine(start: float, step: int, steps: int) -> float:
    return start * (1 + math.cos(math.pi * step / steps)) / 2


# The run folder


def _describe_run(model: nn.Module, source: Source, recipe: Recipe, seed: int, hardware: Hardware) -> dict[str, object]:
    """All that the weights depend on, as JSON values: two runs with equal descriptions are the same run."""
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "hardware": asdict(hardware),
        "initial weights": _digest(model.state_dict().values()),
        **source.describe(),
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _write_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    epoch: int,
    run: Mapping[str, object],
    report: EpochReport | None = None,
) -> None:
    met = {} if report is None else {"loss": repr(report.loss), "accuracy": repr(report.accuracy)}
    _write(model.state_dict(), checkpoint_path(folder, epoch), {"epoch": str(epoch), **met})
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
    header = _read_header(path)
    return load_file(path), header


def _read_header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, found {error}: empty the folder and train again") from error
