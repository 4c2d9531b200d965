"""One call of every public function that runs or copies a model, for tests of what has to hold for all of them.

Interrupts and threads are tried on these: see `test_calls.py`, and the programs `interrupts.py` and `threads.py` in the
benchmarks.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from snapshot import differences, snapshot, torch_flags
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

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


def travelled(given: Setting) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        ns.save_folder(given.edit, given.model, folder)
        return ns.load_folder(folder, given.model)


def adapted(given: Setting) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        edit = ns.zero_out(ns.select(ns.find_layout(given.model), {"head.weight": 1}))
        return ns.lora.save_adapter(edit, given.model, folder)


def held(given: Setting) -> Any:
    """Made anew for each call, since an optimiser is held once."""
    optimizer = torch.optim.SGD(given.model.parameters())
    with ns.train_only(given.edit.neurons, optimizer, given.model):
        optimizer.step()  # nothing has a gradient
    return len(optimizer.state)


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
    return memorization_scores(lambda kept: torch.arange(6) % 2 == 0, 6, models=12, share=0.5, seed=0).values


def convolution(given: Setting) -> ns.Neurons:
    return ns.select(ns.find_layout(given.model), {"conv.weight": 1})


def judged(given: Setting) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups of few examples
        verdict = ns.judge(given.edit, given.model, given.data, 1, draws=2)
    return verdict.net, verdict.net_interval, verdict.sentence


CALLS: dict[str, Callable[[Setting], Any]] = {
    "find_layout": lambda given: ns.find_layout(given.model),
    "magnitudes": lambda given: ns.magnitudes(given.model),
    "grad_norms": gradients,
    "group_grad_norms": lambda given: ns.group_grad_norms(given.model, given.data),
    "group_grad_norms by loader": lambda given: ns.group_grad_norms(
        given.model, {"a": given.data, "b": given.data[:1]}
    ),
    "group_grad_norms of whole batches": lambda given: ns.group_grad_norms(given.model, given.data, regroup=False),
    "learned_mask": lambda given: ns.learned_mask(given.model, given.data, 1, steps=2, batch_size=3),
    "group_effects": lambda given: ns.group_effects(given.model, given.data),
    "group_effects of means": lambda given: ns.group_effects(
        given.model, given.data, where="conv*", edit="mean", transform=ns.error_probability
    ),
    "mean_out": lambda given: dict(
        ns.bake(ns.mean_out(convolution(given), given.model, given.data), given.model).state_dict()
    ),
    "halves": lambda given: tuple(batch.targets for half in ns.halves(given.data) for batch in half),
    "find_critical": lambda given: ns.find_critical(given.model, given.data, 1, k=2, pool=3).edit,
    "judge": judged,
    "share": lambda given: ns.sweep(ns.share(given.model, given.data[0]), {"edit": given.edit}, given.data),
    "find_units": lambda given: ns.find_units(given.model, given.data[0], "unit"),
    "topk": lambda given: ns.topk(ns.magnitudes(given.model), 3),
    "sample": lambda given: ns.sample(ns.find_layout(given.model), 3, seed=1),
    "hard_batch": lambda given: ns.hard_batch(given.model, given.data, top=4, sample=2).args[0],
    "evaluate": lambda given: ns.evaluate(given.model, given.data),
    "apply": lambda given: ns.apply(given.edit, given.model).conv.weight,  # type: ignore[union-attr]
    "bake": lambda given: dict(ns.bake(given.edit, given.model).state_dict()),
    "edited_parameters": lambda given: ns.edited_parameters(given.edit, given.model),
    "plan": lambda given: ns.plan(given.edit, given.model)(dict(given.model.named_parameters())),
    "rewind": lambda given: ns.bake(ns.rewind(given.edit.neurons, given.state), given.model).conv.weight,  # type: ignore[attr-defined,union-attr]
    "eval_copy": lambda given: dict(eval_copy(given.model).state_dict()),
    "sweep": swept,
    "residual_branches": lambda given: ns.residual_branches(given.model, given.data[0]),
    "silence": lambda given: ns.silence(given.edit.neurons, given.model, given.data[0]),  # type: ignore[attr-defined]
    "fragility": fragile,
    "memorization_scores": memorized,
    "save_file and load_file": lambda given: saved(given.edit),
    "save_folder and load_folder": travelled,
    "lora.save_adapter": adapted,
    "lora.effective": lambda given: ns.lora.effective(convolution(given), given.model),
    "train_only": held,
}
CAPTURING = ("sweep", "residual_branches", "silence", "find_critical", "judge", "share", "find_units")


def run(name: str, given: Setting) -> Any:
    """What a call returns; what it warns of is none of these tests' business."""
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


# --- the process ----------------------------------------------------------------------------------------------------


def process() -> dict[str, Any]:
    """What belongs to the whole process."""
    names = ("torch.export", "torch.fx.experimental.symbolic_shapes")
    return {
        **torch_flags(),
        "standard error": sys.stderr,
        "filters of warnings": list(warnings.filters),
        "log levels": [logging.getLogger(name).level for name in names],
    }


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """Return what each function gives, all of them run at the same time; an exception in the place of its result."""
    found: list[Any] = [None] * len(work)
    ready = threading.Barrier(len(work))

    def do(place: int) -> None:
        ready.wait()
        try:
            found[place] = work[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=do, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- interrupts -----------------------------------------------------------------------------------------------------

WATCHED = (
    str(Path(ns.__file__).parent),
    contextlib.__file__,
    *(
        str(Path(torch.__file__).parent / name)
        for name in ("utils/_contextlib.py", "autograd/grad_mode.py", "random.py")
    ),
)


class Interrupter:
    """Counts the lines that run in the watched files, and interrupts at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace the frames of the watched files."""
        return self.step if frame.f_code.co_filename.startswith(WATCHED) else None

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Count a line, and interrupt if it is the one."""
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self.step


def world(given: Setting) -> tuple[Any, Any]:
    """What has to be as it was."""
    modes = {"dispatch modes": len(_get_current_dispatch_mode_stack())}
    return snapshot(given.model, given.data, given.state), process() | modes


def interrupted(name: str, given: Setting, at: int | None) -> tuple[int, str]:
    """Run a call that is interrupted at a line; return the lines that ran, and where it was interrupted or ""."""
    interrupter, where = Interrupter(at), ""
    sys.settrace(interrupter)
    try:
        run(name, given)
    except KeyboardInterrupt as interrupt:
        where = str(interrupt)
    finally:
        sys.settrace(None)
    return interrupter.lines, where


def world_changes(before: tuple[Any, Any], after: tuple[Any, Any]) -> list[str]:
    other = [key for key in before[1] if before[1][key] != after[1][key]]
    return differences(before[0], after[0]) + other
