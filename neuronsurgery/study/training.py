"""Training by any method, with a checkpoint per epoch, which resumes to the same bits wherever it was killed.

What a step minimises is a `Method`: empirical risk here, the paper's fine-tuning and those it is compared with in
`methods`. Which images it is given is a `Source`.

A run folder holds `checkpoints/epoch-000.safetensors` (before training) to `epoch-N`, and `optimizer.safetensors`: the
state of optimiser and method after the epoch that its header names. Each file is complete or absent; that of the
optimiser is written last and counts. An epoch without it is trained again, to the same bits, since the batches of an
epoch depend on (seed, epoch) alone.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from neuronsurgery.atomic import remove_abandoned, replaced_atomically
from neuronsurgery.study.data import Batch, Batches, Labelled, Split, batches, raw_bits

Outputs: TypeAlias = tuple[Tensor, ...]  # one row per image, the logits (B, classes) of the trained model first
Passes: TypeAlias = Callable[[nn.Module, Tensor], Outputs]  # (model, images) -> outputs: the forward passes of a step
State: TypeAlias = Mapping[str, Tensor]  # what a method carries from step to step; saved with the optimiser


def check_choices(chosen: Any) -> None:
    """Raise a ValueError if a field of a dataclass has none of the values that its `Literal` type lists."""
    for name, hint in get_type_hints(type(chosen)).items():
        known, value = get_args(hint), getattr(chosen, name)
        if get_origin(hint) is Literal and value not in known:
            listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise ValueError(f"{name} must be {listed}, not {value!r}: pass one of them")


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
            when the mean loss of two epochs in a row was not below the best so far by one part in 10,000.
    """

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    epochs: int = 30
    batch_size: int = 64
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"

    def __post_init__(self) -> None:
        check_choices(self)


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {"adam": Recipe(), "sgd": Recipe("sgd", learning_rate=0.05, weight_decay=1e-3, momentum=0.9)}
)


@dataclass(frozen=True)
class EpochReport:
    """What epoch 1 ... `epochs` came to: mean loss and share of right answers, each image as it was met."""

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


@dataclass(frozen=True, eq=False)
class Source:
    """Training images, in memory or on disk, and how they vary from epoch to epoch; None leaves them as they are."""

    split: Labelled
    augmentation: Any

    def __len__(self) -> int:
        return len(self.split)

    def describe(self) -> dict[str, object]:
        """All that the batches depend on but size, seed and epoch, as JSON values; on disk pixels only by their paths.

        A source that has the images in another order of its own says so.
        """
        split: Any = self.split
        return {
            "augmentation": None if self.augmentation is None else asdict(self.augmentation),
            "images and targets": digest([split.images, split.targets]) if isinstance(split, Split) else split.digest,
        }

    def epoch(self, size: int, seed: int, epoch: int) -> Batches:
        """Batches of `(images, targets, groups)` of one epoch, as (seed, epoch) alone decide."""
        return batches(self.split, size, seed=seed, epoch=epoch, shuffle=True, augmentation=self.augmentation)


@dataclass(frozen=True)
class Method:
    """What a step of training computes and minimises. A value: what changes from step to step is its `State`.

    Where a method does not say otherwise, a step is one forward pass and carries nothing to the next.
    """

    name: ClassVar[str]

    def describe(self) -> dict[str, object]:
        """All that the weights depend on by the method, as JSON values: its name, and the fields that its repr has."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        return {"name": self.name} | {key: _name(value) if callable(value) else value for key, value in said.items()}

    def initial_state(self) -> State:
        """What the first step is given."""
        return {}

    def begin_epoch(self, model: nn.Module, seed: int, epoch: int) -> Passes:
        """The passes of this epoch's steps, as the model's weights and (seed, epoch) alone decide.

        The model comes in training mode and may be put into another one for this epoch. The passes are called with
        this model.
        """
        return lambda network, images: (network(images),)

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """What is to be minimised, a scalar with a gradient to the outputs; and the state of the next step.

        A function of tensors of the whole batch, in its order; outputs are float32 or wider.
        """
        raise NotImplementedError


def _name(function: Any) -> str:
    """The name of a function; of a callable that is a value, the value."""
    if is_dataclass(function):
        return repr(function)
    named = function if hasattr(function, "__qualname__") else type(function)  # functools.partial has no name
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class Erm(Method):
    """Empirical risk minimisation: the mean cross entropy of the batch."""

    def describe(self) -> dict[str, object]:
        """Nothing: a run of no other method is one of this."""
        return {}

    def loss(self, outputs: Outputs, targets: Tensor, groups: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Method`."""
        return functional.cross_entropy(outputs[0], targets), state


@dataclass(frozen=True)
class Hardware:
    """Where and how the arithmetic of training is done.

    None as the device leaves the model where it is; bfloat16 is that of autocast; channels last is a memory layout.
    """

    device: str | None = None
    bfloat16: bool = False
    channels_last: bool = False


def train(
    model: nn.Module,
    source: Labelled | Source,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe = RECIPES["adam"],
    seed: int = 0,
    augmentation: Any = None,
    method: Method = Erm(),
    hardware: Hardware = Hardware(),
    progress: Callable[[EpochReport], None] | None = None,
) -> nn.Module:
    """A trained copy of `model`, in evaluation mode; `model` itself is the initialisation and stays as it is.

    Leaves a checkpoint per epoch in `folder`. Where `folder` holds an unfinished run of the same arguments, that run is
    taken up after its last finished epoch; a finished run is only loaded. On one machine, with one number of threads,
    the weights are the same bits whether or not a run was interrupted.

    Args:
        model: the initialised network; its parameters must be floating point, its output logits (B, classes).
        source: the training images: a split, or a source with an augmentation or an order of its own.
        folder: the run folder, made if it is missing.
        recipe: optimiser, rates, epochs and batch size.
        seed: of the order of the images, their augmentation, dropout, and what the method draws.
        augmentation: how the images of a split vary from epoch to epoch; None leaves them as they are.
        method: what is minimised.
        hardware: device, precision and memory layout.
        progress: called after each epoch, once its files are written.

    Raises:
        ValueError: if `folder` holds a run of other arguments or files that cannot be read.
        FileNotFoundError: if the checkpoint to go on from is missing.
    """
    if isinstance(source, Labelled):
        source = Source(source, augmentation)
    trained = copy.deepcopy(model).train().to(hardware.device)
    if hardware.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    run = _Run(trained, source, Path(folder), recipe, seed, method, hardware)
    run.take_up()
    while run.epoch < recipe.epochs:
        report = run.train_epoch()
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
    names = (path.stem.removeprefix("epoch-") for path in (Path(folder) / "checkpoints").glob("epoch-*.safetensors"))
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def load_checkpoint(model: nn.Module, folder: str | os.PathLike[str], epoch: int) -> nn.Module:
    """A copy of `model`, in evaluation mode, with the weights and buffers after `epoch` (0: before training).

    Args:
        model: a network of the run's architecture; it stays as it is.
        folder: the run folder.
        epoch: of the checkpoint.

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


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hex digits that depend on the tensors' shapes, dtypes and bits, in their order."""
    said = hashlib.sha256()
    for tensor in tensors:
        said.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        said.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return said.hexdigest()[:16]


def seed_of(*key: str | int) -> int:
    """A seed for torch that depends on `key` alone."""
    return int(raw_bits(1, *key)[0]) >> 1


# One run


@dataclass(eq=False)
class _Run:
    """A training: what it is made of, the last epoch that is finished, and the mean loss of each so far."""

    model: nn.Module
    source: Source
    folder: Path
    recipe: Recipe
    seed: int
    method: Method
    hardware: Hardware
    epoch: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.folder / "optimizer.safetensors"
        self.optimizer = _make_optimizer(self.model, self.recipe)
        self.state = self.method.initial_state()
        # All that the weights depend on: two runs with equal arguments are the same run. What is usual goes without
        # saying, so that folders from before there was a choice are still understood.
        recipe = {name: value for name, value in asdict(self.recipe).items() if (name, value) != ("schedule", "cosine")}
        method = self.method.describe()
        said = {
            "recipe": recipe,
            "seed": self.seed,
            "hardware": asdict(self.hardware),
            "initial weights": digest(self.model.state_dict().values()),
            **self.source.describe(),
            **({"method": method} if method else {}),
        }
        self.arguments: dict[str, object] = json.loads(json.dumps(said))  # as they will be read back: no tuples

    def take_up(self) -> None:
        """Go on from the last finished epoch that the folder holds; write down the first weights where it has none."""
        for written in (self.file.name, "checkpoints/epoch-*.safetensors"):
            remove_abandoned(self.folder, written)
        if self.file.exists():
            self._load()
        else:
            self._save({})

    def train_epoch(self) -> EpochReport:
        """Train the model for one epoch more, and write down what came of it."""
        epoch, started = self.epoch + 1, time.perf_counter()
        total_loss, correct, seen = 0.0, 0, 0
        with torch.random.fork_rng(devices=[]):
            # Only dropout draws from this state. Not torch.manual_seed: that would reseed the GPUs too.
            torch.default_generator.manual_seed(seed_of("dropout", self.seed, epoch))
            self.model.train()
            passes = self.method.begin_epoch(self.model, self.seed, epoch)
            loader = self.source.epoch(self.recipe.batch_size, self.seed, epoch)
            for step, batch in enumerate(loader, start=self.epoch * len(loader)):
                for group in self.optimizer.param_groups:
                    group["lr"] = _rate(self.recipe, step, self.recipe.epochs * len(loader), self.losses)
                loss, right = self._step(passes, batch)
                total_loss += loss * len(batch[1])
                correct += right
                seen += len(batch[1])
        self.epoch, loss, accuracy = epoch, total_loss / seen, correct / seen
        self.losses.append(loss)
        seconds = time.perf_counter() - started
        self._save({"loss": repr(loss), "accuracy": repr(accuracy)})
        return EpochReport(epoch, self.recipe.epochs, loss, accuracy, seconds)

    def _step(self, passes: Passes, batch: Batch) -> tuple[float, int]:
        """One step of the optimiser and of the method's state; the loss, and the number of right answers."""
        device = next(self.model.parameters()).device
        images, targets, groups = (part.to(device, non_blocking=True) for part in batch)
        if self.hardware.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=self.hardware.bfloat16):
                outputs = passes(self.model, images)
            outputs = tuple(output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)
            loss, self.state = self.method.loss(outputs, targets, groups, self.state)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        return loss.item(), int((outputs[0].argmax(dim=1) == targets).sum())

    def _save(self, met: Mapping[str, str]) -> None:
        """Write the files of an epoch: its checkpoint, then the state of optimiser and method."""
        epoch = str(self.epoch)
        _write(self.model.state_dict(), checkpoint_path(self.folder, self.epoch), {"epoch": epoch, **met})
        tensors = {
            f"{owner}/{name}": tensor
            for owner, values in {**self.optimizer.state_dict()["state"], "method": self.state}.items()
            for name, tensor in values.items()
            if tensor is not None  # SGD without momentum keeps an empty slot
        }
        header = {"epoch": epoch, "run": json.dumps(self.arguments), "losses": json.dumps(self.losses)}
        _write(tensors, self.file, header)

    def _load(self) -> None:
        """Load the last finished epoch; a ValueError says how the folder's run is another one."""
        tensors, header = _read(self.file)
        found = json.loads(header.get("run", "{}"))
        differing = [
            f"{key}: expected {self.arguments.get(key)}, found {found.get(key)}"
            for key in self.arguments | found
            if self.arguments.get(key) != found.get(key)
        ]
        if differing:
            raise ValueError(
                f"{self.folder} holds another run; {'; '.join(differing)}: choose another folder or empty this one"
            )
        self.epoch, self.losses = int(header["epoch"]), json.loads(header.get("losses", "[]"))
        self.model.load_state_dict(load_checkpoint(self.model, self.folder, self.epoch).state_dict())
        saved: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, name = key.split("/", 1)
            saved.setdefault(owner, {})[name] = tensor
        self.state = saved.pop("method", {})
        by_index = {int(index): values for index, values in saved.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": by_index})


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    kinds: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": functools.partial(torch.optim.SGD, momentum=recipe.momentum),
    }
    return kinds[recipe.optimizer](model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _rate(recipe: Recipe, step: int, steps: int, losses: Sequence[float]) -> float:
    """The learning rate, as step and losses of the epochs so far alone decide: nothing to save, nothing to restore."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "cosine":
        return recipe.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
    optimizer = torch.optim.SGD([nn.Parameter(torch.empty(0))], recipe.learning_rate)
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, eps=0.0)
    for loss in losses:
        plateau.step(loss)
    return float(optimizer.param_groups[0]["lr"])


# Files


def _write(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file that is either complete or absent, even if the process or the machine dies."""
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
