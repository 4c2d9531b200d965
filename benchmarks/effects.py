"""What do first-order effects and a search for a critical set cost, on the study's network and data?

The floor of effects is one plain forward and backward pass over the same examples. A search is held to evaluations of
the same examples, one for each set that it looks at, and to the memory of one. Times are medians of interleaved repeats
on one thread; only ratios mean anything on another machine.

    python benchmarks/effects.py              # ratios
    python benchmarks/effects.py --memory     # peak memory of an evaluation and of a search, each in its own process
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import neuronsurgery as ns
from neuronsurgery.study.data import synthetic
from neuronsurgery.study.network import small_resnet

RARE = ("landbird on water", "waterbird on land")


def network() -> nn.Module:
    """The study's network after two epochs of training: few enough to be quick, enough to have something to cut."""
    torch.manual_seed(0)
    model, train = small_resnet(), synthetic().train
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        for part in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            ns.cross_entropy(model(train.images[part]), train.targets[part]).mean().backward()
            optimizer.step()
    return model.eval()


def plain(model: nn.Module, loaders: object) -> None:
    """One forward and backward pass over the data."""
    for loader in loaders.values():  # type: ignore[attr-defined]  # a mapping
        for images, targets, _ in loader:
            ns.margin(model(images), targets).sum().backward()
    model.zero_grad()


def median(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each of some calls, made in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report() -> None:
    model, loaders = network(), synthetic().loaders("train", 256)
    layout = ns.find_layout(model)
    calls: dict[str, Callable[[], object]] = {
        "plain forward and backward": lambda: plain(model, loaders),
        "group_effects, zero": lambda: ns.group_effects(model, loaders, layout=layout),
        "group_effects, mean": lambda: ns.group_effects(model, loaders, layout=layout, edit="mean"),
        "the same, each example's own": lambda: ns.group_effects(
            model, loaders, layout=layout, edit="mean", transform=ns.error_probability
        ),
        "group_grad_norms": lambda: ns.group_grad_norms(model, loaders, layout=layout),
    }
    found = median(calls, 5)
    floor = found["plain forward and backward"]
    for name, seconds in found.items():
        print(f"{name:32s} {seconds:7.3f} s  {seconds / floor:5.2f} of plain")
    search, _ = ns.halves(synthetic().loaders("train"))
    once = median({"": lambda: ns.evaluate(model, search)}, 5)[""]
    print(f"{'an evaluation of a half':32s} {once:7.3f} s")
    for group in RARE:
        started = time.perf_counter()
        sets = ns.find_critical(model, search, group).cost["edits"]
        seconds = time.perf_counter() - started
        print(f"{'find_critical, k = 3':32s} {seconds:7.1f} s  {seconds / once:5.0f} of them, {sets} sets of {group}")
    edits = {str(i): ns.zero_out(layout.neurons([i])) for i in range(layout.count)}
    started = time.perf_counter()
    ns.sweep(model, edits, search)
    print(f"{'a sweep of all zero-outs alone':32s} {time.perf_counter() - started:7.1f} s  {len(edits)} edits")


def one(what: str) -> None:
    """Run one thing and print the peak memory of this process, in MiB."""
    model = network()
    search, _ = ns.halves(synthetic().loaders("train"))
    ns.evaluate(model, search)
    if what == "search":
        ns.find_critical(model, search, RARE[1])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", choices=("evaluation", "search"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        one(arguments.one)
    elif arguments.memory:
        peaks = {}
        for what in ("evaluation", "search"):
            done = subprocess.run([sys.executable, __file__, "--one", what], capture_output=True, text=True, check=True)
            peaks[what] = float(done.stdout)
        print(
            f"evaluation {peaks['evaluation']:.0f} MiB, search {peaks['search']:.0f} MiB: "
            f"{peaks['search'] / peaks['evaluation']:.2f} of it"
        )
    else:
        report()


if __name__ == "__main__":
    main()
