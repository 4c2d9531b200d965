"""What does it cost to score every neuron for every group?

The floor is one plain forward and backward pass over the same examples in the same batch size: no way of getting these
gradients from autograd can do with less. Beside it stand the naive ways: one pass over the data per group, and
per-example gradients (`vmap(grad)`). All answers are asserted equal in the run; times are medians of interleaved
repeats, and only their ratios mean anything on another machine.

    python benchmarks/scoring.py              # a table of ratios
    python benchmarks/scoring.py --memory     # peak memory of two ways to differentiate, each in a process of its own
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

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import neuronsurgery as ns
from neuronsurgery.scores import norms

Data = list[tuple[Tensor, Tensor, Tensor]]


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=2)


def deit_tiny() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", num_classes=2, img_size=112)


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: model, image size, batch size
    "ResNet-18, 64x64, batch 128": (resnet18, 64, 128),
    "DeiT-tiny, 112x112, batch 64": (deit_tiny, 112, 64),
}


def make_data(size: int, batch: int, batches: int, groups: int, seed: int = 0) -> Data:
    """Return batches of noise whose groups are shared out as on Waterbirds: most examples in few groups."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1]) if groups == 4 else torch.ones(groups)
    return [
        (
            torch.randn(batch, 3, size, size, generator=generator),
            torch.randint(0, 2, (batch,), generator=generator),
            torch.multinomial(weights, batch, replacement=True, generator=generator),
        )
        for _ in range(batches)
    ]


def plain_pass(model: nn.Module, data: Data) -> None:
    """The floor: one forward and backward pass, no groups."""
    parameters = list(model.parameters())
    for images, targets, _ in data:
        torch.autograd.grad(F.cross_entropy(model(images), targets), parameters)


def library(model: nn.Module, data: Data) -> Tensor:
    return ns.group_grad_norms(model, data).values


def pass_per_group(model: nn.Module, data: Data) -> Tensor:
    """The naive way: the whole stream once per group, the other groups' examples thrown away."""
    layout = ns.find_layout(model)
    parameters = dict(model.named_parameters())
    scored = [parameters[layer.parameter] for layer in layout]
    groups = sorted({int(group) for _, _, groups in data for group in groups})
    rows = []
    for group in groups:
        sums, count = [torch.zeros_like(parameter) for parameter in scored], 0
        for images, targets, membership in data:
            chosen = membership == group
            if chosen.any():
                loss = F.cross_entropy(model(images[chosen]), targets[chosen], reduction="sum")
                for total, part in zip(sums, torch.autograd.grad(loss, scored), strict=True):
                    total += part
                count += int(chosen.sum())
        means = {layer.parameter: total / count for layer, total in zip(layout, sums, strict=True)}
        rows.append(norms(means, layout))
    return torch.stack(rows)


def per_example(model: nn.Module, data: Data) -> Tensor:
    """Per-example gradients, summed within the groups afterwards."""
    layout = ns.find_layout(model)
    names = {layer.parameter for layer in layout}
    scored = {name: p.detach() for name, p in model.named_parameters() if name in names}
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in names}

    def loss(scored: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (scored, rest), (image[None],)), target[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=16)
    groups = sorted({int(group) for _, _, groups in data for group in groups})
    sums = {group: {name: torch.zeros_like(p) for name, p in scored.items()} for group in groups}
    counts = dict.fromkeys(groups, 0)
    for images, targets, membership in data:
        gradients = each(scored, images, targets)
        for group in groups:
            chosen = membership == group
            counts[group] += int(chosen.sum())
            for name, gradient in gradients.items():
                sums[group][name] += gradient[chosen].sum(0)
    return torch.stack(
        [norms({name: total / counts[group] for name, total in sums[group].items()}, layout) for group in groups]
    )


def measure(ways: dict[str, Callable[[], Tensor | None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each way, measured in turn; a first round warms up and compares the answers."""
    answers = {name: way() for name, way in ways.items()}
    computed = {name: answer for name, answer in answers.items() if answer is not None}
    reference = next(iter(computed.values()))
    for name, answer in computed.items():
        scale = reference.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(answer / scale, reference / scale, rtol=1e-3, atol=1e-5, msg=f"{name} differs")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def table(repeats: int, batches: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; median of {repeats}\n")
    for name, (build, size, batch) in CASES.items():
        torch.manual_seed(0)
        model = build().eval()
        data = make_data(size, batch, batches, groups=4)
        many = make_data(size, batch, batches, groups=100)
        ragged = [
            (F.interpolate(images, scale_factor=1 - 0.25 * (i % 2)), targets, groups)
            for i, (images, targets, groups) in enumerate(data)
        ]
        arms: dict[str, Callable[[], Tensor | None]] = {
            "plain forward + backward (the floor)": lambda m=model, d=data: plain_pass(m, d),
            "group_grad_norms, 4 groups mixed": lambda m=model, d=data: library(m, d),
            "one pass per group": lambda m=model, d=data: pass_per_group(m, d),
        }
        show(name, measure(arms, repeats), batches * batch)
        few = [tuple(tensor[:32] for tensor in data[0])]  # so few, since per-example gradients are so slow here
        slow: dict[str, Callable[[], Tensor | None]] = {
            "plain forward + backward (the floor)": lambda m=model, d=few: plain_pass(m, d),
            "group_grad_norms, 4 groups mixed": lambda m=model, d=few: library(m, d),
            "vmap(grad), chunks of 16": lambda m=model, d=few: per_example(m, d),
        }
        show(f"{name}, one batch of 32", measure(slow, 1), 32)
        show(
            f"{name}, 100 groups",
            measure(
                {
                    "plain forward + backward (the floor)": lambda m=model, d=many: plain_pass(m, d),
                    "group_grad_norms, 100 groups mixed": lambda m=model, d=many: library(m, d),
                },
                repeats,
            ),
            batches * batch,
        )
        if size == 64:  # a transformer takes one size
            show(
                f"{name}, ragged (every other batch at 3/4 of the size)",
                measure(
                    {
                        "plain forward + backward (the floor)": lambda m=model, d=ragged: plain_pass(m, d),
                        "group_grad_norms, 4 groups mixed": lambda m=model, d=ragged: library(m, d),
                    },
                    repeats,
                ),
                batches * batch,
            )


def show(name: str, seconds: dict[str, float], examples: int) -> None:
    floor = next(iter(seconds.values()))
    print(f"{name}: {examples} examples")
    for way, value in seconds.items():
        print(f"  {way:40s} {value:7.2f} s   {value / floor:5.2f} of the floor")
    print()


# Peak memory of the two ways to differentiate


def differentiate(way: str) -> None:
    """Run one backward pass in this process and print its time and the rise of the peak resident memory over it."""
    torch.manual_seed(0)
    model = resnet18().eval()
    ((images, targets, _),) = make_data(64, 128, 1, 4)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (images,)), targets)

    def run(images: Tensor, targets: Tensor) -> None:
        if way == "torch.func.grad":
            grad(loss)(parameters, images, targets)
        elif way == "autograd.grad":
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
            torch.autograd.grad(loss(leaves, images, targets), list(leaves.values()))

    run(images[:2], targets[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    run(images, targets)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"way": way, "seconds": round(seconds, 3), "MB": round((peak - before) / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--memory", action="store_true", help="compare the peak memory of two ways to differentiate")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        differentiate(options.way)
    elif options.memory:
        for way in ("autograd.grad", "torch.func.grad"):
            subprocess.run([sys.executable, __file__, "--way", way, "--threads", str(options.threads)], check=True)
    else:
        table(options.repeats, options.batches)


if __name__ == "__main__":
    main()
