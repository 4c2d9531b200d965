"""Training by any method, with a checkpoint per epoch, which resumes to the same bits wherever it was killed.

What a step minimises is a `Method`: empirical risk here, the paper's fine-tuning and those it is compared with in
`methods`. Which images it is given is a `Source`.

A run folder holds `checkpoints/epoch-000.safetensors` (before training) to `epoch-N`, and `optimizer.safetensors`: the
state of optimiser and method after the epoch that its header names. Each file is complete or absent. The optimiser's
file is written last and is the one that counts: an epoch whose checkpoint is there without it is trained again, to the
same bits, because the batches of an epoch depend on (seed, epoch) alone.
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
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from neuronsurgery.atomic import replaced_atomically
from neuronsurgery.study.data import Augmentation, Batches, Split, batches, raw_bits

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W), int64 targets (B,), int64 groups (B,)."""

Outputs: TypeAlias = tuple[Tensor, ...]
"""What a method's passes give: tensors of one row per image, the logits (B, classes) of the trained model first."""

Passes: TypeAlias = Callable[[nn.Module, Tensor], Outputs]
"""(model, images) -> outputs: the forward passes of one step."""

State: TypeAlias = Mapping[str, Tensor]
"""What a method carries from step to step; saved with the optimiser."""

_METHOD: Final = "method"
"""Stands before the names of a method's tensors in the optimiser's file, where those of the optimiser have a number."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: "adamw"; "adam", which adds the weight decay to the gradient; or "sgd" with `momentum`.
        learning_rate: of the first step.
        weight_decay: decoupled for AdamW, an L2 term for the others; it acts on every parameter.
        momentum: of SGD; the others do not look at it.
        epochs: passes over the training images.
        batch_size: images per step.
        schedule: "cosine": the rate falls to 0 along half a cosine, step by step. "constant". "plateau": it is halved
            when the mean loss of two epochs in a row was not below the best so far by one part in 10,000
            (ReduceLROnPlateau with factor 0.5 and patience 1).
    """

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    epochs: int = 30
    batch_size: int = 64
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"


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
        loss: mean over the epoch's (augmented) images of what the method minimises, each as it was met.
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

    def epoch(self, size: int, seed: int, epoch: int) -> Iterable[Batch]:
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
            "images and targets": digest([self.split.images, self.split.targets]),
        }

    def epoch(self, size: int, seed: int, epoch: int) -> Batches:
        """See `Source`."""
        return batches(self.split, size, seed=seed, epoch=epoch, shuffle=True, augmentation=self.augmentation)


class Method(Protocol):
    """What a step of training computes and minimises. A value: what changes from step to step is its `State`."""

    def describe(self) -> dict[str, object]:
        """All that the weights depend on by the method, as JSON values; nothing for empirical risk minimisation."""
        ...

    def initial_state(self) -> State:
        """What the first step is given."""
        ...

    def begin_epoch(self, model: nn.Module, seed: int, epoch: int) -> Passes:
        """The passes of this epoch's steps, as the model's weights and (seed, epoch) alone decide.

        The model comes in training mode and may be put into another one for this epoch. The passes are called with
        this model.
        """
        ...

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """What is to be minimised, a scalar with a gradient to the outputs; and the state of the next step.

        A function of tensors: outputs, targets and groups are of the whole batch, in its order.
        """
        ...


@dataclass(frozen=True)
class Erm:
    """Empirical risk minimisation: the mean cross entropy of the batch."""

    def describe(self) -> dict[str, object]:
        """See `Method`."""
        return {}

    def initial_state(self) -> State:
        """See `Method`."""
        return {}

    def begin_epoch(self, model: nn.Module, seed: int, epoch: int) -> Passes:
        """See `Method`."""
        return lambda network, images: (network(images),)

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Method`."""
        return functional.cross_entropy(outputs[0].float(), targets), state


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
    method: Method = Erm(),
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
        seed: of the order of the images, their augmentation, dropout if there is any, and what the method draws.
        augmentation: how the images of a split vary from epoch to epoch; None leaves them as they are.
        method: what is minimised.
        hardware: device, precision and memory layout.
        progress: called after each epoch, once its files are written.

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        ValueError: if the recipe is unknown, or `folder` holds a run of other arguments or files that cannot be read.
        FileNotFoundError: if the checkpoint to go on from is missing.
    """
    folder = Path(folder)
    if isinstance(source, Split):
        source = Embedded(source, augmentation)
    trained = copy.deepcopy(model).train().to(hardware.device)
    if hardware.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    optimizer = _make_optimizer(trained, recipe)
    run = _describe_run(trained, source, recipe, seed, method, hardware)
    finished = _resume(trained, optimizer, folder, run)
    _remove_unfinished(folder)
    if finished is None:
        finished = _Finished(0, (), method.initial_state())
        _conclude_epoch(trained, optimizer, folder, finished, run)
    loop = _Loop(trained, optimizer, recipe, method, hardware)
    for epoch in range(finished.epoch + 1, recipe.epochs + 1):
        started = time.perf_counter()
        loss, accuracy, state = loop.run_epoch(source, seed, epoch, finished)
        report = EpochReport(epoch, recipe.epochs, loss, accuracy, time.perf_counter() - started)
        finished = _Finished(epoch, (*finished.losses, loss), state)
        _conclude_epoch(trained, optimizer, folder, finished, run, report, progress)
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
    if recipe.schedule not in ("cosine", "constant", "plateau"):
        raise ValueError(
            f"recipe: schedule must be 'cosine', 'constant' or 'plateau', found {recipe.schedule!r}: pass one of them"
        )
    decay = recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=decay)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), recipe.learning_rate, weight_decay=decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=decay)
    raise ValueError(
        f"recipe: optimizer must be 'adamw', 'adam' or 'sgd', found {recipe.optimizer!r}: pass one of them"
    )


@dataclass(frozen=True, eq=False)
class _Finished:
    """How far a run has come.

    Attributes:
        epoch: the last one that is finished; 0 before training.
        losses: the mean loss of each epoch so far.
        state: the method's.
    """

    epoch: int
    losses: tuple[float, ...]
    state: State


@dataclass(frozen=True, eq=False)
class _Loop:
    """What stays the same from epoch to epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    method: Method
    hardware: Hardware

    def run_epoch(self, source: Source, seed: int, epoch: int, finished: _Finished) -> tuple[float, float, State]:
        """Trains the model in place for one epoch; mean loss, accuracy, and the method's state."""
        with torch.random.fork_rng(devices=[]):
            # Only dropout draws from this state. Not torch.manual_seed: that would reseed the GPUs too.
            torch.default_generator.manual_seed(int(raw_bits(1, "dropout", seed, epoch)[0]) >> 1)
            self.model.train()
            passes = self.method.begin_epoch(self.model, seed, epoch)
            loader = source.epoch(self.recipe.batch_size, seed, epoch)
            assert isinstance(loader, Sized), "a Source gives batches that have a length"
            state, total_loss, correct, seen = finished.state, 0.0, 0, 0
            for step, batch in enumerate(loader, start=(epoch - 1) * len(loader)):
                for group in self.optimizer.param_groups:
                    group["lr"] = _rate(self.recipe, step, self.recipe.epochs * len(loader), finished.losses)
                loss, right, state = self._step(passes, batch, state)
                total_loss += loss * len(batch[1])
                correct += right
                seen += len(batch[1])
        return total_loss / seen, correct / seen, state

    def _step(self, passes: Passes, batch: Batch, state: State) -> tuple[float, int, State]:
        """One step of the optimiser; the loss, the number of right answers, and the method's state."""
        device = next(self.model.parameters()).device
        images, targets, groups = (part.to(device, non_blocking=True) for part in batch)
        if self.hardware.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=self.hardware.bfloat16):
                outputs = passes(self.model, images)
            loss, state = self.method.loss(outputs, targets, groups, state)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        return loss.item(), int((outputs[0].argmax(dim=1) == targets).sum()), state


def _rate(recipe: Recipe, step: int, steps: int, losses: Sequence[float]) -> float:
    """The learning rate, as step and losses of the epochs so far alone decide: nothing to save, nothing to restore."""
    if recipe.schedule == "cosine":
        return _cosine(recipe.learning_rate, step, steps)
    return recipe.learning_rate if recipe.schedule == "constant" else _plateau(recipe.learning_rate, losses)


def _cosine(start: float, step: int, steps: int) -> float:
    return start * (1 + math.cos(math.pi * step / steps)) / 2


def _plateau(start: float, losses: Iterable[float]) -> float:
    rate, best, stalled = start, math.inf, 0
    for loss in losses:
        stalled = 0 if loss < best * (1 - 1e-4) else stalled + 1
        best = loss if stalled == 0 else best
        if stalled == 2:
            rate, stalled = rate / 2, 0
    return rate


# The run folder


def _describe_run(
    model: nn.Module,
    source: Source,
    recipe: Recipe,
    seed: int,
    method: Method,
    hardware: Hardware,
) -> dict[str, object]:
    """All that the weights depend on, as JSON values: two runs with equal descriptions are the same run.

    What is usual goes without saying, so that folders from before there was a choice are still understood.
    """
    said: dict[str, object] = {
        "recipe": {name: value for name, value in asdict(recipe).items() if (name, value) != ("schedule", "cosine")},
        "seed": seed,
        "hardware": asdict(hardware),
        "initial weights": digest(model.state_dict().values()),
        **source.describe(),
    }
    if described := method.describe():
        said["method"] = described
    plain: dict[str, object] = json.loads(json.dumps(said))  # as it will be read back: no tuples
    return plain


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hex digits that depend on the tensors' shapes, dtypes and bits, in their order."""
    said = hashlib.sha256()
    for tensor in tensors:
        said.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        said.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return said.hexdigest()[:16]


def _conclude_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    finished: _Finished,
    run: Mapping[str, object],
    report: EpochReport | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> None:
    """Writes the files of an epoch, and then says so."""
    epoch = str(finished.epoch)
    met = {} if report is None else {"loss": repr(report.loss), "accuracy": repr(report.accuracy)}
    _write(model.state_dict(), checkpoint_path(folder, finished.epoch), {"epoch": epoch, **met})
    moments = {
        f"{index}/{name}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
        if tensor is not None  # SGD without momentum keeps an empty slot
    }
    state = {f"{_METHOD}/{name}": tensor for name, tensor in finished.state.items()}
    header = {"epoch": epoch, "run": json.dumps(run), "losses": json.dumps(finished.losses)}
    _write(moments | state, _optimizer_path(folder), header)
    if report is not None and progress is not None:
        progress(report)


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, run: Mapping[str, object]
) -> _Finished | None:
    """Loads the last finished epoch into model and optimiser; None where there is none."""
    if not _optimizer_path(folder).exists():
        return None
    moments, header = _read(_optimizer_path(folder))
    found = json.loads(header.get("run", "{}"))
    differing = [
        f"{key}: expected {run.get(key)}, found {found.get(key)}"
        for key in dict.fromkeys([*run, *found])
        if run.get(key) != found.get(key)
    ]
    if differing:
        raise ValueError(f"{folder} holds another run; {'; '.join(differing)}: choose another folder or empty this one")
    epoch = int(header["epoch"])
    model.load_state_dict(load_checkpoint(model, folder, epoch).state_dict())
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        owner, name = key.split("/", 1)
        saved.setdefault(owner, {})[name] = tensor
    state = saved.pop(_METHOD, {})
    by_index = {int(index): values for index, values in saved.items()}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    return _Finished(epoch, tuple(json.loads(header.get("losses", "[]"))), state)


def _remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote."""
    for pattern in (f".{_optimizer_path(folder).name}.*", "checkpoints/.epoch-*.safetensors.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _optimizer_path(folder: Path) -> Path:
    return folder / "optimizer.safetensors"


def _write(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Writes a safetensors file that is either complete or absent, even if the process or the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_atomically(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{path} could not be written ({error}): make room, and start again to go on") from error


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
