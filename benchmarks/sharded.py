"""What does a rank of a fully sharded model hold, against one process that has the whole model?

A stack of linear layers, sharded over two gloo ranks on this machine, is scored, evaluated and trained through a view.
Per process: the parameters that it holds, the most that was gathered at a time, the rise of its peak resident memory,
and the seconds; each number in processes of their own. The answers are asserted to be those of one process. The ranks
share the cores of one machine, so their seconds say what communication costs, not what is won by it.

    python benchmarks/sharded.py [--layers 16] [--width 1024] [--ranks 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neuronsurgery as ns
from neuronsurgery import gathering

GROUPS, BATCHES, EXAMPLES = 2, 4, 8

Data = list[tuple[Tensor, Tensor, Tensor]]


def make_model(layers: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def make_data(width: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(EXAMPLES, width, generator=generator),
            torch.randint(width, (EXAMPLES,), generator=generator),
            torch.arange(EXAMPLES) % GROUPS,
        )
        for _ in range(BATCHES)
    ]


def scores(model: nn.Module, data: Data, world: dict[str, Any]) -> Tensor:
    return ns.group_grad_norms(model, data, **world).values


def metrics(model: nn.Module, data: Data, world: dict[str, Any]) -> Tensor:
    return torch.tensor(ns.evaluate(model, data, metric=ns.cross_entropy, **world).values)


def a_step(model: nn.Module, data: Data, world: dict[str, Any]) -> Tensor:
    """A step of a view in which every second neuron is cut: the average of a rank's gradients is that of all."""
    view = ns.apply(ns.zero_out(ns.select(ns.find_layout(model), {"*": slice(0, None, 2)})), model)
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    (cross_entropy(view(data[0][0]), data[0][1])).backward()
    optimizer.step()
    return metrics(model, data, world)


TASKS: dict[str, Callable[[nn.Module, Data, dict[str, Any]], Tensor]] = {
    "evaluate": metrics,
    "group_grad_norms": scores,
    "a step of a view": a_step,
}


class Gathered:
    """The most bytes of whole weights that were alive at a time."""

    def __init__(self) -> None:
        self.most, self._remember = 0, gathering._remember
        gathering._remember = self._note

    def _note(self, value: Tensor, again: Any) -> None:
        self._remember(value, again)
        alive = [held for reference, _ in gathering._ALIVE.values() if (held := reference()) is not None]
        self.most = max(self.most, sum(held.numel() * held.element_size() for held in alive))


def work(rank: int, ranks: int, task: str, layers: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    model, data, world = make_model(layers, width), make_data(width), {}
    if ranks > 1:
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
        world = {"process_group": dist.group.WORLD}
        data = data if task == "a step of a view" else data[rank::ranks]
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    held = [p.to_local() if ranks > 1 else p for p in model.parameters()]  # type: ignore[operator]  # DTensors
    TASKS[task](make_model(2, 8), make_data(8), {})  # what is imported when it is first needed
    gathered, before = Gathered(), peak(reset=True)
    started = time.perf_counter()
    answer = TASKS[task](model, data, world)
    seconds, rise = time.perf_counter() - started, peak() - before
    parameters = sum(part.numel() * part.element_size() for part in held)
    torch.save((answer, parameters, gathered.most, rise, seconds), f"{folder}/{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def peak(reset: bool = False) -> int:
    """The peak of the resident memory, in bytes, since it was last reset to what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has the allocator give back at once what is freed, which takes time: its reserves are no need of anybody's."""


def measured(ranks: int, task: str, layers: int, width: int) -> tuple[Tensor, int, int, int, float]:
    """Return what was computed, three sizes in bytes, and seconds; these of processes that do not give memory back."""
    seconds = run(ranks, task, layers, width)[-1]
    os.environ.update(GIVEN_BACK)
    try:
        return (*run(ranks, task, layers, width)[:-1], seconds)
    finally:
        for name in GIVEN_BACK:
            del os.environ[name]


def run(ranks: int, task: str, layers: int, width: int) -> tuple[Tensor, int, int, int, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (ranks, task, layers, width, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        found: tuple[Tensor, int, int, int, float] = torch.load(f"{folder}/0.pt")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    layer = options.width**2 * 4 / 1e6
    print(f"torch {torch.__version__}, {platform.machine()}; {options.layers} layers of {layer:.1f} MB in float32")
    print(f"  {'MB of one process':36s} {'parameters':>10s} {'gathered':>10s} {'peak rise':>10s} {'seconds':>8s}")
    for task in TASKS:
        answers = {ranks: measured(ranks, task, options.layers, options.width) for ranks in (1, options.ranks)}
        for ranks, (_, parameters, most, rise, seconds) in answers.items():
            name = f"{task}, {f'one rank of {ranks}' if ranks > 1 else 'one process'}"
            sizes = " ".join(f"{size / 1e6:10.1f}" for size in (parameters, most, rise))
            print(f"  {name:36s} {sizes} {seconds:8.2f}", flush=True)
        torch.testing.assert_close(answers[options.ranks][0], answers[1][0], rtol=1e-5, atol=1e-6)
        assert answers[options.ranks][2] <= 2 * layer * 1e6, "more than an edited weight beside its own was gathered"
    print("  the answers are those of one process")


if __name__ == "__main__":
    main()
