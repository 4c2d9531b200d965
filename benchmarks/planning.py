"""What it costs to plan and to apply edits: the model is looked at once, and time grows as edits and layers do.

    python benchmarks/planning.py

- **Planning** 1,000 edits of one neuron each of a ResNet-50, the survey of the model included, beside planning them one
  after the other with a survey each.
- **One edited weight** of a view, beside the same written by hand: a copy of the weight, and a write into its rows.
- **A view** of a ResNet-50 with an edit in every layer: a forward pass, and one within `parametrize.cached()`.
- **Depth**: planning and scheduling a sweep of ten edits that are spread over a chain of 100 and of 400 linear layers.
  The floor of the ratio is 4. The export of the graph, which is torch's, is left out.
- **Chains**: a whole sweep with an edit for each layer, over the square of their number: what is run grows so.

Times are the best of interleaved repeats; edited weights are compared with those of the hand-written way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached
from torchvision.models import resnet50

import neuronsurgery as ns
from neuronsurgery.copies import make_runner
from neuronsurgery.graph.export import capture
from neuronsurgery.graph.replay import Graph
from neuronsurgery.graph.schedules import Schedule, schedule
from neuronsurgery.plans import Edited
from neuronsurgery.surveys import survey


def best(ways: dict[str, Callable[[], object]], repeats: int, times: int = 1) -> dict[str, float]:
    """Return the shortest time of each way, in seconds, the ways taking turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(times):
                way()
            seconds[name] = min(seconds[name], (time.perf_counter() - started) / times)
    return seconds


def planning(repeats: int) -> None:
    model = resnet50(num_classes=10).eval()
    layout = ns.find_layout(model)
    edits = [ns.zero_out(layout.neurons([i * layout.count // 1000])) for i in range(1000)]

    def together() -> None:
        surveyed = survey(model)
        for edit in edits:
            ns.plan(edit, surveyed)

    seconds = best(
        {"one survey": together, "100 of them alone": lambda: [ns.plan(e, model) for e in edits[:100]]}, repeats
    )
    alone = 10 * seconds["100 of them alone"]
    print(f"planning 1000 edits of a ResNet-50: {seconds['one survey']:.3f} s; with a survey each {alone:.3f} s")


CASES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "Linear(64, 64)": (nn.Linear(64, 64), lambda rows: rows),
    "Linear(512, 512)": (nn.Linear(512, 512), lambda rows: rows),
    "Conv2d(64, 64, 3)": (nn.Conv2d(64, 64, 3), lambda rows: rows),
    "ConvTranspose2d(64, 64, 3)": (nn.ConvTranspose2d(64, 64, 3), lambda weight: weight.transpose(0, 1)),
}


def applying(repeats: int) -> None:
    index = torch.tensor([1, 5])
    for name, (module, rows) in CASES.items():
        edit = ns.zero_out(ns.select(ns.find_layout(module), {"weight": (1, 5)}))
        view, weight = ns.apply(edit, module), module.weight.detach()

        def by_hand(weight: Tensor = weight, rows: Callable[[Tensor], Tensor] = rows) -> Tensor:
            edited = weight.clone()
            rows(edited)[index] = 0
            return edited

        with torch.no_grad():
            assert torch.equal(view.weight, by_hand())
            seconds = best({"view": lambda v=view: v.weight, "by hand": by_hand}, repeats, times=200)
        ratio = seconds["view"] / seconds["by hand"]
        print(f"{name}: {1e6 * seconds['view']:.0f} us a weight, {ratio:.1f} of writing it by hand")


def viewing(repeats: int) -> None:
    """Print what a forward pass of a view costs that has an edit in every layer of a ResNet-50."""
    model = resnet50(num_classes=10).eval()
    layout = ns.find_layout(model)
    view = ns.apply(ns.zero_out(ns.select(layout, {layer.parameter: 0 for layer in layout})), model)
    for batch in (1, 16):
        images = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            seconds = best({"plain": lambda x=images: model(x), "view": lambda x=images: view(x)}, repeats)
            with cached():
                view(images)
                kept = best({"plain": lambda x=images: model(x), "view": lambda x=images: view(x)}, repeats)
        ratios = [each["view"] / each["plain"] for each in (seconds, kept)]
        print(
            f"a view with {len(layout)} edited layers, batch {batch}: {ratios[0]:.2f} of plain, {ratios[1]:.2f} cached"
        )


def depth(repeats: int) -> None:
    seconds = {}
    for layers in (100, 400):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        layout, images = ns.find_layout(model), torch.randn(8, 16)
        edits = [ns.zero_out(layout.neurons([16 * (i * layers // 10)])) for i in range(10)]
        graph = capture(make_runner(survey(model)), (images,))

        def planned(
            model: nn.Module = model, edits: list[ns.Edit] = edits, graph: Graph = graph
        ) -> tuple[Schedule[int], dict[int, Edited]]:
            surveyed = survey(model)
            parameters = make_runner(surveyed).parameters
            edited = {i: Edited(ns.plan(edit, surveyed), parameters) for i, edit in enumerate(edits)}
            return schedule(graph, edited), edited

        def run(images: Tensor = images, planned: tuple[Schedule[int], dict[int, Edited]] = planned()) -> None:
            for _ in planned[0].run((images,), {}, planned[1]):
                pass

        held = sum(len(s.instructions) for child in planned()[0].root.children for s in child.suffix.segments)
        seconds[layers] = best({"it": planned, "run": run}, repeats), held
    ratio, memory = seconds[400][0]["it"] / seconds[100][0]["it"], seconds[400][1] / seconds[100][1]
    print(
        f"ten edits of 400 layers: {ratio:.2f} times the planning of those of 100, {memory:.2f} times the instructions"
    )


def chains() -> None:
    """Print what a sweep costs with an edit for each layer of a chain, of the sum of what it runs."""
    for layers in (100, 200, 400):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        layout, data = ns.find_layout(model), [(torch.randn(8, 16), torch.zeros(8).long())]
        edits = {str(i): ns.zero_out(layout.neurons([16 * i])) for i in range(layers)}
        shared = ns.share(model, data[0])
        seconds = best({"sweep": lambda s=shared, e=edits, d=data: ns.sweep(s, e, d)}, 1)["sweep"]
        print(f"an edit for each of {layers} linear layers, capture apart: {1e6 * seconds / layers**2:.0f} us a pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    planning(options.repeats)
    applying(options.repeats)
    viewing(options.repeats)
    depth(options.repeats)
    chains()


if __name__ == "__main__":
    main()
