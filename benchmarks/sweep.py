"""What does it cost to evaluate one edit per layer?

One by one is a whole forward pass per edit. The floor of a sweep is the sum of the suffixes: what lies behind the
edited layer has to run anew for each edit, whatever one does. Beside both stands the way of the paper's published code:
for every variant the weights are loaded again and the data read again from JPEG files.

All answers are asserted equal, bit for bit, in the run; times are medians of interleaved repeats, and only their ratios
mean anything on another machine.

    python benchmarks/sweep.py                      # a table, one row per model
    python benchmarks/sweep.py --plot cost.svg      # cost against the number of edits and against depth
    python benchmarks/sweep.py --memory             # peak memory, each way in a process of its own
    python benchmarks/sweep.py --neurons            # every neuron of a layer, and of a small network; on a card too:
    python benchmarks/sweep.py --neurons --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.io import decode_jpeg, encode_jpeg, read_file

import neuronsurgery as ns
from neuronsurgery.copies import make_runner
from neuronsurgery.graph.trust import CheckedForward
from neuronsurgery.study.network import small_resnet
from neuronsurgery.surveys import survey

Data = list[tuple[Tensor, Tensor, Tensor]]

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: model, image size, batch size
    "ResNet-50, 64x64": (lambda: torchvision.models.resnet50(num_classes=2), 64, 32),
    "DeiT-tiny, 224x224": (lambda: timm.create_model("deit_tiny_patch16_224", num_classes=2), 224, 8),
}


def make_data(size: int, batch: int, batches: int, device: str = "cpu") -> Data:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(batch, 3, size, size, generator=generator).to(device),
            torch.randint(0, 2, (batch,), generator=generator).to(device),
            torch.randint(0, 4, (batch,), generator=generator),
        )
        for _ in range(batches)
    ]


def fingerprint(logits: Tensor, targets: Tensor) -> Tensor:
    """One number per example that any flipped bit of its logits changes."""
    bits = logits.detach().flatten(1).contiguous().view(torch.int32).long()
    return (bits * torch.arange(1, bits.shape[1] + 1, device=bits.device)).sum(1) % 2**52


def one_per_layer(model: nn.Module) -> dict[str, ns.Edit]:
    layout = ns.find_layout(model)
    return {layer.parameter: ns.zero_out(ns.select(layout, {layer.parameter: 0})) for layer in layout}


def swept(model: nn.Module, edits: dict[str, ns.Edit], data: Data) -> dict[str, Tensor]:
    result = ns.sweep(model, edits, data, metric=fingerprint)
    assert not result.reasons, result.reasons
    return {label: result.values(label) for label in edits}


def one_by_one(model: nn.Module, edits: dict[str, ns.Edit], data: Data) -> dict[str, Tensor]:
    found = {}
    for label, edit in edits.items():
        values: list[Tensor] = []

        def keep(logits: Tensor, targets: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(fingerprint(logits, targets))
            return values[-1]

        ns.evaluate(ns.apply(edit, model), data, metric=keep)
        found[label] = torch.cat(values).double().cpu()
    return found


def published_way(model: nn.Module, edits: dict[str, ns.Edit], folder: Path, data: Data) -> dict[str, Tensor]:
    """Load the checkpoint, zero the neuron in place, read and decode every image again: for each variant."""
    own = copy.deepcopy(model).eval()
    found = {}
    for label, edit in edits.items():
        own.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True))
        parameters = dict(own.named_parameters())
        values = []
        with torch.no_grad():
            for neuron in edit.neurons:
                parameters[neuron.parameter][neuron.index] = 0
            for number, (images, targets, _) in enumerate(data):
                read = [decode_jpeg(read_file(str(folder / f"{number}-{i}.jpg"))) / 255 for i in range(len(images))]
                values.append(fingerprint(own(torch.stack(read)), targets))
        found[label] = torch.cat(values).double()
    return found


def write_files(model: nn.Module, folder: Path, data: Data) -> Data:
    """Write checkpoint and JPEG files, and return the data as they decode."""
    torch.save(model.state_dict(), folder / "checkpoint.pt")
    decoded = []
    for number, (images, targets, groups) in enumerate(data):
        for i, image in enumerate(images):
            (folder / f"{number}-{i}.jpg").write_bytes(bytes(encode_jpeg((image * 255).byte()).numpy()))
        read = [decode_jpeg(read_file(str(folder / f"{number}-{i}.jpg"))) / 255 for i in range(len(images))]
        decoded.append((torch.stack(read), targets, groups))
    return decoded


def capture_seconds(model: nn.Module, data: Data) -> float:
    """Return the time that the first batch takes more than the second: capture and check."""
    forward = CheckedForward(make_runner(survey(model)))
    forward.capture_now()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        for _ in forward.run((data[0][0],), {}, {"base": {}}):
            pass
        times.append(time.perf_counter() - started)
    return times[0] - times[1]


def suffix_share(model: nn.Module, edits: dict[str, ns.Edit], data: Data) -> float:
    """Return the floor: the time of all suffixes over that of as many whole forwards, one operator timed at a time."""
    runner = make_runner(survey(model))
    forward = CheckedForward(runner)
    forward.capture_now()
    images = data[0][0]
    for _ in forward.run((images,), {}, {"base": {}}):
        pass
    (graph,) = set(forward._checked.values())
    seconds: dict[str, float] = {}
    values: dict[object, object] = dict(graph.constants)
    values.update(zip(graph.inputs, [images], strict=True))
    with torch.no_grad():
        for node in graph.nodes:
            if node in values:
                continue
            args = torch.fx.map_arg(node.args, lambda n: values[n])
            kwargs = torch.fx.map_arg(node.kwargs, lambda n: values[n])
            runs = []
            for _ in range(3):
                started = time.perf_counter()
                values[node] = node.target(*args, **kwargs)
                runs.append(time.perf_counter() - started)
            seconds[node.name] = min(runs)
    whole = sum(seconds.values())
    suffixes = (sum(seconds[graph.nodes[slot].name] for slot in graph.tainted([name])) for name in edits)
    return sum(suffixes) / (len(edits) * whole)


def medians(ways: dict[str, Callable[[], dict[str, Tensor]]], repeats: int) -> dict[str, float]:
    """Return the median processor seconds of each way, measured in turn; every round compares the answers."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        answers = {}
        for name, way in ways.items():
            started = time.process_time()
            answers[name] = way()
            times[name].append(time.process_time() - started)
        first = next(iter(answers.values()))
        for name, answer in answers.items():
            for label, values in answer.items():
                assert torch.equal(values, first[label]), f"{name} differs for {label}"
    return {name: statistics.median(values) for name, values in times.items()}


def table(repeats: int, batches: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; median of {repeats}")
    for name, (build, size, batch) in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        edits = one_per_layer(model)
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            data = write_files(model, folder, make_data(size, batch, batches))
            ns.evaluate(model, data)  # to warm up
            seconds = medians(
                {
                    "one by one": lambda m=model, e=edits, d=data: one_by_one(m, e, d),
                    "sweep, with capture": lambda m=model, e=edits, d=data: swept(m, e, d),
                    "published way (reload, re-read)": lambda m=model, e=edits, f=folder, d=data: published_way(
                        m, e, f, d
                    ),
                },
                repeats,
            )
        capturing = capture_seconds(model, data)
        floor = suffix_share(model, edits, data)
        base = seconds["one by one"]
        print(f"\n{name}: {len(edits)} edits, one per layer; {batches} batches of {batch}, read once by the sweep")
        for way, value in seconds.items():
            print(f"  {way:34s} {value:8.2f} s   {value / base:5.2f} of one by one")
        print(f"  {'sweep, without capture':34s} {seconds['sweep, with capture'] - capturing:8.2f} s   ", end="")
        print(f"{(seconds['sweep, with capture'] - capturing) / base:5.2f}")
        print(f"  {'floor (the sum of the suffixes)':34s} {'':10s}   {floor:5.2f}")
        print(f"  {'capture and check, once':34s} {capturing:8.2f} s", flush=True)


# Every neuron


def neurons(repeats: int, device: str) -> None:
    """Print what one more edit costs where every neuron is cut in turn, in plain forward passes of the same batch."""
    print(torch.cuda.get_device_name(device) if device != "cpu" else platform.machine(), f"torch {torch.__version__}")
    resnet18 = torchvision.models.resnet18(num_classes=2).eval().to(device)
    for layer in ("layer4.1.conv2.weight", "layer4.1.conv1.weight"):
        layout = ns.find_layout(resnet18, where=layer)
        per_edit(f"ResNet-18, 64x64, batch 32, {layer}", resnet18, layout, make_data(64, 32, 4, device), repeats)
    small = small_resnet().eval().to(device)
    for batch in (4, 16, 64, 250):
        data = make_data(32, batch, 4, device)
        per_edit(f"small_resnet, batch {batch}, all", small, ns.find_layout(small), data, repeats)


def per_edit(name: str, model: nn.Module, layout: ns.Layout, data: Data, repeats: int) -> None:
    """Time a sweep of all neurons of a layout beside plain forward passes of a batch, in turn; the capture is apart."""
    edits = {str(i): ns.zero_out(layout.neurons([i])) for i in range(layout.count)}
    few = dict(list(edits.items())[:: max(1, len(edits) // 20)])
    found = swept(model, edits, data)
    for label, values in one_by_one(model, few, data).items():
        assert torch.equal(found[label], values), label
    shared, images = ns.share(model, data[0]), data[0][0]
    ratios = []
    for _ in range(repeats):
        with torch.no_grad():
            forward = statistics.median(timed(lambda: model(images)) for _ in range(9))
        ratios.append(timed(lambda: ns.sweep(shared, edits, data)) / len(edits) / len(data) / forward)
    print(f"{name}: {len(edits)} edits, each {statistics.median(ratios):.4f} of a forward pass")


# Cost against the number of edits and against depth


def plot(path: Path, batches: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, (build, size, batch) in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        data = make_data(size, batch, batches)
        edits = one_per_layer(model)
        labels = list(edits)
        base = timed(lambda m=model, d=data: ns.evaluate(m, d))
        counts = [1, len(labels) // 4, len(labels) // 2, len(labels)]
        chosen = [{label: edits[label] for label in labels[:: max(1, len(labels) // n)][:n]} for n in counts]
        cost = [timed(lambda m=model, e=e, d=data: swept(m, e, d)) / base for e in chosen]
        left.plot([len(e) for e in chosen], cost, marker="o", label=name)
        at = [round(i * (len(labels) - 1) / 8) for i in range(9)]
        depth = suffix_seconds(model, [labels[i] for i in at], data[0][0])
        right.plot([i / (len(labels) - 1) for i in at], depth, marker="o", label=name)
    limit = max(line.get_xdata()[-1] for line in left.lines)
    left.plot([0, limit], [0, limit], color="grey", linestyle="--", label="one by one")
    left.set(xlabel="number of edits", ylabel="cost in forward passes over the data", title="Cost, capture included")
    right.set(
        xlabel="depth of the edited layer (0 first, 1 last)", ylabel="forward passes", title="Cost of one more edit"
    )
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(path)


def suffix_seconds(model: nn.Module, names: list[str], images: Tensor) -> list[float]:
    """Return what one more edit of each layer costs, in forward passes: the best of five replays, capture apart."""
    runner = make_runner(survey(model))
    weights = {name: parameter.detach() for name, parameter in runner.model.named_parameters()}
    forward = CheckedForward(runner)
    forward.capture_now()

    def replay(edits: dict[str, dict[str, Tensor]]) -> float:
        return min(timed(lambda: list(forward.run((images,), {}, edits))) for _ in range(5))

    base = replay({"base": {}})
    return [(replay({"base": {}, "edit": {name: weights[name].clone()}}) - base) / base for name in names]


def timed(way: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - started


# Peak memory


def peak(way: str, name: str) -> None:
    """Run one way in this process and print by how much it raises the peak resident memory."""
    build, size, batch = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    data = make_data(size, 4 * batch, 1)  # large enough that the activations outweigh what the capture itself holds
    edits = one_per_layer(model)
    if way == "sweep":  # the capture machinery itself, once, on a small input
        swept(nn.Sequential(nn.Linear(2, 2)), {}, [(torch.ones(2, 2), torch.zeros(2).long(), torch.zeros(2).long())])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    swept(model, edits, data) if way == "sweep" else ns.evaluate(model, data)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"model": name, "way": way, "MB": round((after - before) / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="write a plot of the cost to this SVG file")
    parser.add_argument("--memory", action="store_true", help="compare the peak memory with a plain evaluation")
    parser.add_argument("--neurons", action="store_true", help="cut every neuron of a layer, and of a small network")
    parser.add_argument("--device", default="cpu", help="of --neurons")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        peak(*options.way)
    elif options.memory:
        for name in MODELS:
            for way in ("evaluate", "sweep"):
                subprocess.run(
                    [sys.executable, __file__, "--way", way, name, "--threads", str(options.threads)], check=True
                )
    elif options.neurons:
        neurons(options.repeats, options.device)
    elif options.plot:
        plot(options.plot, options.batches)
    else:
        table(options.repeats, options.batches)


if __name__ == "__main__":
    main()
