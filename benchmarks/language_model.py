"""What do scores and a sweep of a language model cost, in time and memory of the card?

A Llama with random weights, of about 1.2B parameters or tiny. The floor of the scores is one plain forward and backward
pass over the same batches; that of a sweep is one forward pass. First a tiny model is scored on the same device, and
its scores are asserted to be those of one plain backward pass per group; of the sweeps a few heads are asserted to be
what `evaluate(apply(edit, model), ...)` gives, bit for bit. Each row is printed as soon as it is measured.

    python benchmarks/language_model.py                                        # tiny, on the CPU
    python benchmarks/language_model.py --device cuda --size 1b --dtype bf16   # within three minutes
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import neuronsurgery as ns

GROUPS = 4
HEADS_ONE_BY_ONE = 4
"""Heads that are evaluated one by one, too."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Size(NamedTuple):
    """A model and its data: one batch per group, and as many mixed ones."""

    config: Mapping[str, int]
    batch: int
    tokens: int


SIZES = {
    "tiny": Size(
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        4,
        16,
    ),
    "1b": Size(  # the sizes of Llama 3.2 1B
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8,
        256,
    ),
}

Mixed = list[tuple[dict[str, Tensor], Tensor, Tensor]]


def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**size.config, tie_word_embeddings=True, use_cache=False))
    return model.to(dtype).eval()  # type: ignore[no-any-return]


def make_data(size: Size, device: torch.device) -> Mixed:
    """Return mixed batches of random tokens, as many examples of each group as a batch holds."""
    generator = torch.Generator().manual_seed(0)
    count = GROUPS * size.batch
    tokens = torch.randint(0, size.config["vocab_size"], (count, size.tokens), generator=generator).to(device)
    groups = torch.arange(count)[torch.randperm(count, generator=generator)] % GROUPS
    parts = zip(tokens.split(size.batch), groups.split(size.batch), strict=True)
    return [({"input_ids": own}, own, which) for own, which in parts]


def by_group(data: Mixed) -> dict[int, list[tuple[dict[str, Tensor], Tensor]]]:
    """Return the same examples as one batch per group."""
    tokens, groups = torch.cat([own for _, own, _ in data]), torch.cat([which for _, _, which in data])
    found = {group: tokens[(groups == group).to(tokens.device)] for group in range(GROUPS)}
    return {group: [({"input_ids": own}, own)] for group, own in found.items()}


# Answers


def assert_scores(device: torch.device) -> None:
    """Compare the scores of the tiny model with one plain backward pass per group."""
    model, data = make_model(SIZES["tiny"], device, torch.float32), make_data(SIZES["tiny"], device)
    layout, parameters = ns.find_layout(model), dict(model.named_parameters())
    scored = [parameters[layer.parameter] for layer in layout]
    rows = []
    for batches in by_group(data).values():
        ((inputs, labels),) = batches
        loss = ns.causal_lm_loss(model(**inputs).logits, labels).mean()
        gradients = torch.autograd.grad(loss, scored)
        rows.append(torch.cat([gradient.flatten(1).norm(dim=1) for gradient in gradients]))
    expected = torch.stack(rows).cpu()
    for loaders in (by_group(data), data):
        found = ns.group_grad_norms(model, loaders, loss=ns.causal_lm_loss, layout=layout).values
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    print("scores of the tiny model: those of one plain backward pass per group")


# Time and memory


class Meter:
    """Measures ways to compute something on one device, and prints a row for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        print(f"  {'':52s} {'seconds':>9s} {'peak GB':>9s} {'above weights':>14s}")

    def __call__(self, name: str, way: Callable[[], object], repeats: int = 1, warm: bool = True) -> float:
        """Return the median of the seconds that a way takes."""
        if warm:
            way()
        seconds = []
        before = self._allocated(reset=True)
        for _ in range(repeats):
            self._wait()
            started = time.perf_counter()
            way()
            self._wait()
            seconds.append(time.perf_counter() - started)
        peak = self._allocated()
        memory = f"{peak / 1e9:9.2f} {(peak - before) / 1e9:14.2f}" if self.device.type == "cuda" else ""
        print(f"  {name:52s} {statistics.median(seconds):9.3f} {memory}", flush=True)
        return statistics.median(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def scores(model: nn.Module, data: Mixed, measure: Meter) -> None:
    grouped, parameters = by_group(data), list(model.parameters())

    def forward() -> None:
        with torch.no_grad():
            for inputs, labels, _ in data:
                ns.causal_lm_loss(model(**inputs).logits, labels)

    def backward() -> None:
        for inputs, labels, _ in data:
            torch.autograd.grad(ns.causal_lm_loss(model(**inputs).logits, labels).mean(), parameters)

    measure("plain forward", forward, 3)
    measure("plain forward + backward", backward, 3)
    measure("evaluate", lambda: ns.evaluate(model, grouped, metric=ns.causal_lm_loss), 3)
    ways = {"a loader per group": grouped, "mixed batches": data}
    for name, loaders in ways.items():
        way = f"group_grad_norms, {GROUPS} groups, {name}"
        measure(way, lambda given=loaders: ns.group_grad_norms(model, given, loss=ns.causal_lm_loss), 3)  # type: ignore[misc]


def sweeps(model: nn.Module, data: Mixed, measure: Meter, limit: float) -> None:
    """Cut every head on its own: those of the first layer, which share least, and those of as many as time allows."""
    batch, loaders = data[0], data[:1]
    found: list[ns.Layout] = []
    captured: list[ns.Shared] = []
    swept: list[ns.Sweep] = []
    size = model.config.hidden_size // model.config.num_attention_heads
    heads = ns.find_layout(model, where="*.o_proj.weight", patterns={"*": ("e (head d) -> head e d", {"d": size})})
    try:
        measure("find_units, heads", lambda: found.append(ns.find_units(model, batch, "head")), warm=False)
        assert [layer.count for layer in found[0]] == [layer.count for layer in heads]
    except ns.CaptureError as error:
        print(f"  find_units: {error}")
    measure("share: one capture", lambda: captured.append(ns.share(model, batch)), warm=False)
    (shared,) = captured
    print(f"  {shared}", flush=True)

    def cut(layers: int) -> dict[str, ns.Edit]:
        chosen = [ns.Neurons({layer: [i]}) for layer in heads.layers[:layers] for i in range(layer.count)]
        return {str(neurons): ns.zero_out(neurons) for neurons in chosen}

    def swept_over(edits: Mapping[str, ns.Edit]) -> None:
        swept.append(ns.sweep(shared, edits, loaders, metric=ns.causal_lm_loss))

    one = cut(1)
    seconds = measure(f"sweep of the {len(one)} heads of the first layer", lambda: swept_over(one), 2)
    fitting = max(1, min(len(heads.layers), int(limit / max(seconds, 1e-9))))
    every = cut(fitting)
    last = dict(list(every.items())[-HEADS_ONE_BY_ONE:])
    measure(f"sweep of the {len(every)} heads of {fitting} layers", lambda: swept_over(every), warm=False)
    exact: dict[str, Mapping[int | str, float]] = {}

    def one_by_one() -> None:
        for label, edit in last.items():
            exact[label] = dict(ns.evaluate(ns.apply(edit, model), loaders, metric=ns.causal_lm_loss))

    measure(f"evaluate(apply(edit)) of {len(last)} heads", one_by_one)
    for label, means in exact.items():
        assert dict(swept[-1][label]) == means, f"{label}: {dict(swept[-1][label])} is not {means}"
    print("  sweep and evaluate(apply) agree bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that the sweep of all heads may take")
    options = parser.parse_args()
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"{card}; torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )
    warnings.filterwarnings("ignore", "a mixed stream holds one copy")
    assert_scores(device)
    size = SIZES[options.size]
    model, data = make_model(size, device, DTYPES[options.dtype]), make_data(size, device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Llama of {count / 1e6:.1f}M parameters in {options.dtype}, {len(data)} x {size.batch} x {size.tokens} tokens"
    )
    measure = Meter(device)
    scores(model, data, measure)
    sweeps(model, data, measure, options.limit)


if __name__ == "__main__":
    main()
