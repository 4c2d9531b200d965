"""What does a step of the contrastive fine-tuning cost with two forward passes, and what with three?

Both steps give the same gradient. With r(w) the outputs of the whole model, r_p(w) those of the pruned one and
L(r, r_p) the NT-Xent loss, the chain rule has two terms:

    d/dw L(r(w), r_p(w))  =  dL/dr dr/dw  +  dL/dr_p dr_p/dw
                          =  d/dw L(r(w), sg r_p)  +  d/dw L(sg r, r_p(w)),        sg: held as a constant

The authors' code takes the two terms on the second line one after the other, each with a backward pass of its own: the
whole model without a gradient for sg r; the pruned model for the second term; the whole model again for the first term
and for the supervised one. The library's step takes the first line: each model once, one backward pass. The equality is
exact, since the weights do not move in between and nothing is drawn at random; in training mode batch norm normalises
by the batch, so its running statistics, which the three passes update once more, do not enter. It is no equality of the
*losses*: the authors' sum counts the contrastive term twice. And the supervised term with the second half alone, the
whole model's outputs held constant in NT-Xent, is another gradient; the run prints how far off it is.

With F for a forward and B for a backward pass, the ratio of work is (2 F + 2 B) / (3 F + 2 B): 0.86 for the usual
B = 2 F, and less where the backward pass costs less, as in a shallow network, whose images need no gradient. In return
the single backward pass needs both graphs at once, where the authors' two hold one at a time: see --memory.

    python benchmarks/objectives.py              # gradients compared, then a table of ratios
    python benchmarks/objectives.py --memory     # peak memory of both steps, each in a process of its own
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import neuronsurgery as ns

WEIGHT = 0.2
TARGET = 0.88


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=2)


def small() -> nn.Module:
    def block(entering: int, leaving: int) -> list[nn.Module]:
        return [nn.Conv2d(entering, leaving, 3, padding=1), nn.BatchNorm2d(leaving), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 16), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: model, image size, batch size
    "ResNet-18, 64x64, batch 32": (resnet18, 64, 32),
    "small convnet, 32x32, batch 128": (small, 32, 128),
}


class Case:
    """A model in training mode, its pruned twin, and one batch."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        build, size, batch = CASES[name]
        torch.manual_seed(0)
        self.model = build().to(dtype).train()
        critical = ns.top_fraction(ns.magnitudes(self.model), 0.01)
        self.twin = ns.apply(ns.zero_out(critical), self.model).train()
        self.images = torch.randn(batch, 3, size, size, dtype=dtype)
        self.targets = torch.randint(0, 2, (batch,))

    def dense(self) -> Tensor:
        """Return the whole model's probabilities."""
        return self.model(self.images).softmax(1)

    def pruned(self) -> Tensor:
        """Return the twin's probabilities."""
        return self.twin(self.images).softmax(1)

    def supervised(self, probabilities: Tensor) -> Tensor:
        """Return the weighted squared error."""
        return WEIGHT * (probabilities - F.one_hot(self.targets, 2)).square().sum(1).mean()

    def plain(self) -> None:
        """A step without the twin."""
        self.supervised(self.dense()).backward()

    def two_passes(self) -> None:
        """The library's step: each model once, one backward pass."""
        ns.contrastive_pruning_loss(self.dense(), self.pruned(), self.targets, weight=WEIGHT).backward()

    def three_passes(self) -> None:
        """The authors' order of passes; each backward pass frees its graph before the next begins."""
        with torch.no_grad():
            held = self.dense()
        pruned = self.pruned()
        ns.objectives.nt_xent(held, pruned).backward()
        dense = self.dense()
        (ns.objectives.nt_xent(dense, pruned.detach()) + self.supervised(dense)).backward()

    def one_half(self) -> None:
        """Not the authors' step: the whole model is a fixed target of the contrastive term."""
        dense = self.dense()
        (ns.objectives.nt_xent(dense.detach(), self.pruned()) + self.supervised(dense)).backward()

    def gradient(self, step: Callable[[], None]) -> Tensor:
        """Return the gradient that a step leaves in the parameters, as one vector."""
        self.model.zero_grad()
        step()
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def compare_gradients(name: str) -> None:
    """Assert in float64 that both steps have one gradient; print how far they are in float32, and how far a half is."""
    exact, single = Case(name, torch.float64), Case(name)
    three = exact.gradient(exact.three_passes)
    off = distance(exact.gradient(exact.two_passes), three)
    assert off < 1e-10, f"{name}: the gradients differ by {off}"
    half = distance(exact.gradient(exact.one_half), three)
    assert half > 1e-2, f"{name}: the comparison cannot tell a missing half, {half}"
    rounding = distance(single.gradient(single.two_passes), single.gradient(single.three_passes))
    print(f"  gradients differ by {off:.1e} of their norm in float64, {rounding:.1e} in float32;")
    print(f"  with the whole model held constant in NT-Xent by {half:.2f}")


def table(repeats: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; {repeats} repeats\n")
    for name in CASES:
        print(name)
        compare_gradients(name)
        case = Case(name)
        steps = {
            "one pass, no twin": case.plain,
            "three passes, two backward": case.three_passes,
            "two passes, one backward": case.two_passes,
        }
        seconds = measure(case.model, steps, repeats)
        three = seconds["three passes, two backward"]
        for step, values in seconds.items():
            paired = statistics.median(one / other for one, other in zip(values, three, strict=True))
            print(
                f"  {step:27s} best {min(values) * 1e3:8.1f} ms, median {statistics.median(values) * 1e3:8.1f} ms;"
                f" of three passes: best {min(values) / min(three):.3f}, median of pairs {paired:.3f}"
            )
        print(f"  target for two passes: at most {TARGET}\n")


def measure(model: nn.Module, steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each step, measured in turn, the order reversed every other round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, repeats):  # two rounds to warm up
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            model.zero_grad()
            started = time.perf_counter()
            steps[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    return times


# Peak memory


def peak(way: str) -> None:
    """Take one step in this process and print the rise of the peak resident memory over it."""
    case = Case("ResNet-18, 64x64, batch 32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {"three passes": case.three_passes, "two passes": case.two_passes, "one pass": case.plain}[way]()
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"way": way, "MB": round(rise / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--memory", action="store_true", help="compare the peak memory of the steps")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        peak(options.way)
    elif options.memory:
        for way in ("one pass", "three passes", "two passes"):
            subprocess.run([sys.executable, __file__, "--way", way, "--threads", str(options.threads)], check=True)
    else:
        table(options.repeats)


if __name__ == "__main__":
    main()
