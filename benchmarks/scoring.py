"""What does it cost to score every neuron for every group?

The floor is one plain forward and backward pass over the same examples in the same batch size: no way of getting these
gradients from autograd can do with less. Beside it stand the same pass over batches of one group each, and the naive
ways: one pass over the data per group, one backward pass per group, per-example gradients (`vmap(grad)`, Opacus), the
Jacobian of the groups' losses (TorchJD). All answers are asserted equal in the run; times are medians of interleaved
repeats, in processor seconds (on a card in seconds of the clock), and only their ratios mean anything elsewhere.

    python benchmarks/scoring.py              # a table of ratios
    python benchmarks/scoring.py --device cuda --dtype bf16
    python benchmarks/scoring.py --memory     # peak memory of two ways to differentiate, each in a process of its own
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchjd.autojac import jac

import neuronsurgery as ns
from neuronsurgery.loaders import iterate, regrouped
from neuronsurgery.scores import norms
from neuronsurgery.study.network import small_resnet

Data = list[tuple[Tensor, Tensor, Tensor]]


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=2)


def deit_tiny() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", num_classes=2, img_size=112)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    return transformers.BertForSequenceClassification(config)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored, and what beside `group_grad_norms` is measured on it."""

    build: Callable[[], nn.Module]
    size: int  # of an image; of a sentence, in tokens, where negative
    batch: int
    batches: int
    groups: int = 4
    peers: tuple[str, ...] = ()


PEERS_OF_BATCHES = ("one pass per group", "Opacus, per-example gradients", "TorchJD, Jacobian of group losses")

JOBS = {
    "ResNet-18 64x64, 8 batches of 64": Job(resnet18, 64, 64, 8, peers=("one pass per group",)),
    "ResNet-18 64x64, 2 batches of 32": Job(
        resnet18, 64, 32, 2, peers=(*PEERS_OF_BATCHES, "one backward pass per group", "vmap(grad), chunks of 16")
    ),
    "DeiT-tiny 112x112, 2 batches of 64": Job(deit_tiny, 112, 64, 2, peers=PEERS_OF_BATCHES),
    "DeiT-tiny 112x112, 8 batches of 64": Job(deit_tiny, 112, 64, 8),
    "BERT of 4 layers, 64 tokens, 8 batches of 64": Job(bert, -64, 64, 8),
    "the study's network 32x32, 8 batches of 250": Job(small_resnet, 32, 250, 8, peers=("one pass per group",)),
    "the same, 100 groups": Job(small_resnet, 32, 250, 8, groups=100),
    "the same, 1000 groups": Job(small_resnet, 32, 250, 8, groups=1000),
    "ResNet-18 64x64, 8 batches of 128, 100 groups": Job(resnet18, 64, 128, 8, groups=100),
}


def make_data(size: int, batch: int, batches: int, groups: int, seed: int = 0) -> Data:
    """Return batches of noise whose groups are shared out as on Waterbirds: most examples in few groups."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1]) if groups == 4 else torch.ones(groups)
    return [
        (
            torch.randn(batch, 3, size, size, generator=generator)
            if size > 0
            else torch.randint(0, 1000, (batch, -size), generator=generator),
            torch.randint(0, 2, (batch,), generator=generator),
            torch.multinomial(weights, batch, replacement=True, generator=generator),
        )
        for _ in range(batches)
    ]


def logits_of(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def plain_pass(model: nn.Module, data: Data) -> None:
    """The floor: one forward and backward pass, no groups."""
    parameters = list(model.parameters())
    for images, targets, _ in data:
        torch.autograd.grad(F.cross_entropy(logits_of(model(images)), targets), parameters, allow_unused=True)


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


def regrouped_passes(model: nn.Module, data: Data) -> None:
    """The floor where batches are of one group each: as `plain_pass`, on those of groups that cannot share one."""
    plain_pass(model, [(b.args[0], b.targets, b.targets) for _, b in regrouped(iterate(data))])


def backward_per_group(model: nn.Module, data: Data) -> Tensor:
    """One forward pass over each batch as it comes, and one backward pass through all of it for each group in it."""
    return ns.group_grad_norms(model, data, regroup=False).values


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


def with_torchjd(model: nn.Module, data: Data) -> Tensor:
    """TorchJD: the Jacobian of the vector of the groups' losses, batch by batch."""
    layout, groups = ns.find_layout(model), sorted({int(group) for _, _, own in data for group in own})
    parameters = dict(model.named_parameters())
    scored = [parameters[layer.parameter] for layer in layout]
    sums = [torch.zeros(len(groups), *parameter.shape, device=parameter.device) for parameter in scored]
    for images, targets, membership in data:
        losses = F.cross_entropy(logits_of(model(images)), targets, reduction="none")
        each = torch.stack([losses[membership == group].sum() for group in groups])
        for total, part in zip(sums, jac(each, scored), strict=True):
            total += part
    return _norms_of_sums(sums, groups, layout, data)


def with_opacus(model: nn.Module, data: Data) -> Tensor:
    """Opacus: every example's gradient, summed within the groups afterwards."""
    layout, groups = ns.find_layout(model), sorted({int(group) for _, _, own in data for group in own})
    names, own = {layer.parameter for layer in layout}, copy.deepcopy(model)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name in names)
    for name in names:  # it records in training mode alone, in which linear layers and convolutions are the same
        own.get_submodule(name.rpartition(".")[0]).train()
    wrapped = GradSampleModule(own, strict=False, loss_reduction="sum")
    scored = [dict(own.named_parameters())[layer.parameter] for layer in layout]
    sums = [torch.zeros(len(groups), *parameter.shape, device=parameter.device) for parameter in scored]
    for images, targets, membership in data:
        F.cross_entropy(logits_of(wrapped(images)), targets, reduction="sum").backward()
        for total, parameter in zip(sums, scored, strict=True):
            for place, group in enumerate(groups):
                total[place] += parameter.grad_sample[membership == group].sum(0)  # type: ignore[attr-defined]  # its own
        wrapped.zero_grad()
    return _norms_of_sums(sums, groups, layout, data)


def _norms_of_sums(sums: list[Tensor], groups: list[int], layout: ns.Layout, data: Data) -> Tensor:
    counts = [sum(int((membership == group).sum()) for _, _, membership in data) for group in groups]
    rows = (
        {layer.parameter: total[place] / count for layer, total in zip(layout, sums, strict=True)}
        for place, count in enumerate(counts)
    )
    return torch.stack([norms(row, layout) for row in rows])


PEERS: dict[str, Callable[[nn.Module, Data], Tensor]] = {
    "one pass per group": pass_per_group,
    "one backward pass per group": backward_per_group,
    "vmap(grad), chunks of 16": per_example,
    "Opacus, per-example gradients": with_opacus,
    "TorchJD, Jacobian of group losses": with_torchjd,
}


def clock(device: torch.device) -> float:
    """Return the processor seconds of this process; on a card those of the clock, once it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def measure(
    ways: dict[str, Callable[[], Tensor | None]], repeats: int, device: torch.device, rtol: float
) -> dict[str, list[float]]:
    """Return the seconds of each way, measured in turn; a first round warms up and compares the answers."""
    answers = {name: way() for name, way in ways.items()}
    computed = {name: answer for name, answer in answers.items() if answer is not None}
    reference = next(iter(computed.values()))
    for name, answer in computed.items():
        scale = reference.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(answer / scale, reference / scale, rtol=rtol, atol=rtol / 100, msg=f"{name} differs")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = clock(device)
            way()
            times[name].append(clock(device) - started)
    return times


def table(repeats: int, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}, {dtype}; median of {repeats}")
    print()
    for name, job in JOBS.items():
        if wanted not in name:
            continue
        torch.manual_seed(0)
        model = job.build().eval().to(device, dtype)
        data = [
            ((inputs.to(dtype) if inputs.is_floating_point() else inputs).to(device), targets.to(device), groups)
            for inputs, targets, groups in make_data(job.size, job.batch, job.batches, job.groups)
        ]
        ways: dict[str, Callable[[nn.Module, Data], Tensor | None]] = {
            "plain forward + backward (the floor)": plain_pass,
            "the same on the regrouped batches": regrouped_passes,
            "group_grad_norms": library,
            **{peer: PEERS[peer] for peer in job.peers},
        }
        rtol = 1e-3 if dtype == torch.float32 else 0.3  # bfloat16 has three digits, and sums in another order
        runs = {way: functools.partial(run, model, data) for way, run in ways.items()}
        show(name, measure(runs, repeats, device, rtol))


def show(name: str, seconds: dict[str, list[float]]) -> None:
    floors = next(iter(seconds.values()))
    print(name)
    for way, values in seconds.items():
        ratios = sorted(value / floor for value, floor in zip(values, floors, strict=True))
        ratio = statistics.median(values) / statistics.median(floors)
        print(
            f"  {way:38s} {statistics.median(values):7.2f} s   {ratio:5.2f} of the floor"
            f"   ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--job", default="", help="a part of the name of the jobs to measure")
    parser.add_argument("--memory", action="store_true", help="compare the peak memory of two ways to differentiate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        differentiate(options.way)
    elif options.memory:
        for way in ("autograd.grad", "torch.func.grad"):
            subprocess.run([sys.executable, __file__, "--way", way, "--threads", str(options.threads)], check=True)
    else:
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        table(options.repeats, options.job, torch.device(options.device), dtype)


if __name__ == "__main__":
    main()
