"""Files and checkpoints changed at random, some of them with a digest that is right again, and what became of them.

`tests/test_fuzz.py` runs some hundreds of changes, `benchmarks/fuzz.py` as many as one likes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

import neuronsurgery as ns
from neuronsurgery.files import _content_digest
from neuronsurgery.outcomes import Outcomes
from neuronsurgery.state_dicts import CheckpointError

EQUAL, OTHER, REFUSED, FOREIGN = "loaded equal", "loaded other and usable", "refused", "FOREIGN"
SLOW = 10.0
"""A file that takes so many seconds counts as one that hangs."""


# What is changed


def model() -> nn.Module:
    parts = {"up": nn.ConvTranspose1d(4, 6, 2, groups=2), "head": nn.Linear(6, 4), "out": nn.Linear(4, 3)}
    return nn.ModuleDict(parts).requires_grad_(False)


MODEL = model()
THEN = {name: parameter + 1 for name, parameter in model().named_parameters()}
LAYOUT = ns.find_layout(MODEL, extra="*.bias")
HEADS = ns.find_layout(MODEL, patterns={"head.weight": ("(h d) i -> h d i", {"d": 2})})
NEURONS = ns.select(LAYOUT, {"up.weight": (0, 5), "out.weight": 1, "out.bias": 2})


def sweep(values: Tensor) -> ns.Sweep:
    """A sweep of two edits over five examples."""
    members, groups = ("a", "a", 3, 3, 3), ("a", 3)
    metrics = [ns.GroupMetrics(groups, (float(v[:2].mean()), float(v[2:].mean())), (2, 3), True) for v in values]
    outcomes = [Outcomes.of(row) for row in values.double()]
    index, by_label = torch.arange(5), {"cut": 1, "noise": 2}
    return ns.Sweep(
        metrics[0],
        {label: metrics[at] for label, at in by_label.items()},
        *(members, index, torch.zeros_like(index), ("hooks",), "accuracy"),
        {label: outcomes[at] for label, at in by_label.items()},
        outcomes[0],
    )


def objects(folder: Path) -> dict[str, Any]:
    """One value of every kind that has a file format, and some more of those that differ within."""
    path = folder / "then.safetensors"
    safetensors.torch.save_file(THEN, path)
    zeroed = ns.zero_out(ns.select(HEADS, {"head.weight": 1}) | ns.select(LAYOUT, {"head.weight": 0}))
    noise = ns.random_noise(NEURONS, relative_std=0.1, seed=2**70)
    outcomes = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {
        "neurons": NEURONS,
        "layout": LAYOUT,
        "layout of heads": HEADS,
        "scores": ns.Scores(torch.arange(2.0 * LAYOUT.count).reshape(2, -1), ("a", 3), (4, 5), LAYOUT, "made up"),
        "metrics": ns.GroupMetrics(("a", 3), (0.1, math.nan), (2, 0), larger_is_better=False),
        "sweep": sweep(outcomes),
        "sweep of numbers": sweep(outcomes - 0.3),
        "inferred groups": ns.infer_groups(torch.arange(30.0), torch.tensor([4, 9, 9] * 10), rule=0.3),
        "memorization": ns.memorization.MemorizationScores(
            *(torch.rand(6).double(), torch.rand(6).double()),
            *(torch.tensor([8, 9, 8, 7, 9, 8]) for _ in "s"),
            *(20 - torch.tensor([8, 9, 8, 7, 9, 8]), 0.5, 2),
        ),
        "zero_out": zeroed,
        "scale": ns.scale(NEURONS, 1 / 3),
        "random_init": ns.random_init(NEURONS, std=0.1, seed=3),
        "random_noise": noise,
        "rewind": ns.rewind(NEURONS, THEN, 0.5),
        "rewind to a file": ns.rewind(NEURONS, path),
        "compose": ns.compose(ns.rewind(NEURONS, THEN), zeroed, noise, ns.scale(NEURONS, 2.0)),
    }


# How


class Raw(str):
    """Text that stands in JSON as it is: what `json.dumps` would never write."""


MARK = "\x01raw:"
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *("", "x", "0", "\ud800", "\0", "a" * 5000, [], {}, [[]], [None], {"a": 1}, [1, 2], [True], ["a", "a"]),
    *("zero_out", "compose", "scores", "head.weight", "n ... -> n ...", "(a b) ... -> a b ...", "tensor", "pattern"),
    *map(Raw, ("1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "[" * 50000 + "]" * 50000, "[" * 800 + "]" * 800)),
)


def places(node: Any, within: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every node of a JSON value."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield (*within, key)
        yield from places(node[key], (*within, key))


def change_json(rng: random.Random, root: Any) -> None:
    """One node of a JSON value made another one, gone, there twice or somewhere else."""
    every = list(places(root))
    if not every:
        return
    *way, key = rng.choice(every)
    holder = root
    for step in way:
        holder = holder[step]
    old = holder[key]
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
        case 2 | 3 if isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = rng.choice([old + 1, old - 1, -old, old * 2, old + 0.5, str(old), old / 2])
        case 2 | 3 if isinstance(old, str):
            at = rng.randrange(len(old) + 1)
            holder[key] = rng.choice([old[:at], old[:at] + "~" + old[at:], old + old, old.upper()])
        case 2 | 3 if isinstance(old, list) and old:
            holder[key] = rng.choice([old[:-1], [*old, copy.deepcopy(rng.choice(old))], old[::-1], old[1:], old[0]])
        case 4:
            del holder[key]
        case 5:
            if isinstance(holder, list):
                holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(old))
            else:
                holder[rng.choice(["x", "edits", "rows", "neurons", "path", "seed", "kind"])] = holder.pop(key)
        case 6:
            *others, last = rng.choice(every)
            other = root
            for step in others:
                other = other[step]
            holder[key] = copy.deepcopy(other[last]) if last in other or isinstance(other, list) else None
        case _:
            holder[key] = [old]


DTYPES = (*(torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8),)
DTYPES += (torch.bool, torch.uint8, torch.float8_e4m3fn)


def changed_tensor(rng: random.Random, old: Tensor) -> Tensor:
    shapes: list[Callable[[Tensor], Tensor]] = [
        *(lambda t: t.flatten(), lambda t: t[None], lambda t: t[..., None], lambda t: t[:0], lambda t: t[:-1]),
        *(
            lambda t: torch.cat([t, t]),
            lambda t: t.flip(0),
            lambda t: t.reshape(-1)[:1].reshape(()) if t.numel() else t,
        ),
    ]
    if old.dim() and rng.random() < 0.5:
        return rng.choice(shapes)(old).contiguous()
    if rng.random() < 0.5:
        return old.to(rng.choice(DTYPES))
    new = old.clone().reshape(-1)
    if len(new):
        number = torch.tensor(rng.choice([0, 1, -1, 2**40, math.nan, math.inf, -math.inf, 0.5]), dtype=torch.float64)
        new[rng.randrange(len(new))] = number.to(new.dtype)
    return new.reshape(old.shape)


def change_tensors(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    """One tensor another one, gone, renamed or new."""
    if not tensors or rng.random() < 0.1:
        tensors[rng.choice(["x", "values", "rows.0"])] = torch.zeros(rng.randrange(4))
        return
    name = rng.choice(sorted(tensors))
    match rng.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[f"{name}x"] = tensors.pop(name)
        case 2:
            other = rng.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        case _:
            tensors[name] = changed_tensor(rng, tensors[name])


def parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and what follows."""
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def joined(text: bytes, rest: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def raw_text(value: Any) -> str:
    """JSON with every `Raw` as it is."""

    def marked(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: marked(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [marked(inner) for inner in node]
        return MARK + node if isinstance(node, Raw) else node

    return re.sub(r'"\\u0001raw:([^"]*)"', lambda found: found[1], json.dumps(marked(value)))


def with_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Our part of a header with the digest that it should have, if there can be one."""
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            return text
        return f'{text[:-1]}{", " * bool(header)}"sha256": "{_content_digest(header, tensors)}"}}'
    except (ValueError, RecursionError):
        return text


def changed_content(rng: random.Random, data: bytes) -> bytes:
    """Our part of the header and the tensors changed; in seven of ten files the digest is made again."""
    ours = json.loads(parted(data)[0]["__metadata__"]["neuronsurgery"])
    tensors = safetensors.torch.load(data)
    again, old = rng.random() < 0.7, ours.pop("sha256")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if tensors and rng.random() < 0.3:
            change_tensors(rng, tensors)
        else:
            change_json(rng, ours["content"] if rng.random() < 0.8 and ours.get("content") else ours)
    text = raw_text(ours)
    text = with_digest(text, tensors) if again else f'{text[:-1]}, "sha256": "{old}"}}'
    return safetensors.torch.save(tensors, metadata={"neuronsurgery": text})


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, added or moved, or the header of safetensors changed."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    match rng.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data + rng.randbytes(rng.randrange(1, 40))
        case 2:
            return data[:at] + data[to:]
        case 3:
            return data[:to] + data[at:]
        case 4:
            return struct.pack("<Q", rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(data)])) + data[8:]
        case 5 | 6 if data[8:9] == b"{":
            header, rest = parted(data)
            change_json(rng, header)
            return joined(raw_text(header).encode(), rest)
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 20])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def changed(rng: random.Random, data: bytes) -> bytes:
    """A file changed at random: in half of all, so that its digest is right again."""
    return changed_content(rng, data) if rng.random() < 0.72 else changed_bytes(rng, data)


# What becomes of it


class Fate(NamedTuple):
    """What became of a file, and what was raised where that should not be."""

    outcome: str
    why: str = ""


def fate(path: Path, original: Any) -> Fate:
    """Whether a file is refused, with its name, or gives a value that can be used."""
    started = time.monotonic()
    try:
        loaded = ns.load_file(path)
    except FileNotFoundError:
        return Fate(REFUSED)  # of a rewind, whose path was changed
    except ValueError as error:
        named = path.name in str(error) or isinstance(error, CheckpointError)
        return Fate(REFUSED) if named else Fate(FOREIGN, f"without the file's name: {error!r}")
    except Exception as error:
        return Fate(FOREIGN, f"load_file: {error!r}")
    try:
        use(loaded, path)
    except Exception as error:
        return Fate(FOREIGN, f"used: {error!r}")
    if time.monotonic() - started > SLOW:
        return Fate(FOREIGN, f"took {time.monotonic() - started:.0f} s")
    return Fate(EQUAL if loaded == original else OTHER)


def use(loaded: Any, path: Path) -> None:
    """What every value that a file gives has to stand."""
    assert repr(loaded) and loaded == loaded and loaded == copy.deepcopy(loaded)
    if type(loaded).__hash__ is not None:
        hash(loaded)
    again = path.with_suffix(".again")
    ns.save_file(loaded, again)
    assert ns.load_file(again) == loaded, "saved and loaded it is another one"
    if isinstance(loaded, ns.Edit | ns.Neurons):
        edit = loaded if isinstance(loaded, ns.Edit) else ns.zero_out(loaded)
        try:
            view = ns.apply(edit, MODEL)
        except ValueError:
            return  # not of this model
        baked = ns.bake(edit, MODEL).state_dict()
        for name in edit.neurons.masks():
            module, _, attribute = name.rpartition(".")
            seen = getattr(view.get_submodule(module), attribute)
            assert torch.equal(seen.nan_to_num(0.0), baked[name].nan_to_num(0.0)), "the view and the baked copy differ"
    if isinstance(loaded, ns.Layout):
        try:
            ns.magnitudes(MODEL, layout=loaded)
        except ValueError:
            return
    if hasattr(loaded, "to_records"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of infinity minus infinity
            loaded.to_records()
            loaded._repr_html_()


def fuzz(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """The outcomes of so many changed files, and what was wrong with those that are foreign."""
    rng, outcomes, foreign = random.Random(seed), Counter[str](), list[str]()
    values = objects(folder)
    for name, value in values.items():
        ns.save_file(value, folder / f"{name}.ns")
    names, path = list(values), folder / "changed.ns"
    for number in range(count):
        name = names[number % len(names)]
        data = changed(rng, (folder / f"{name}.ns").read_bytes())
        path.write_bytes(data)
        found = fate(path, values[name])
        outcomes[found.outcome] += 1
        if found.why:
            foreign.append(f"{name}, number {number} of seed {seed}: {found.why}")
    return outcomes, foreign


# Checkpoints of others


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Files that hold the same tensors, as they are written."""
    torch.save(THEN, folder / "plain")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in THEN.items()}}, folder / "nested")
    torch.save(THEN, folder / "legacy", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(THEN, folder / "safe")
    return {name: (folder / name).read_bytes() for name in ("plain", "nested", "legacy", "safe")}


def odd_tensor(rng: random.Random, old: Tensor) -> Tensor:
    wide = old.reshape(-1)
    odd: list[Callable[[], Tensor]] = [
        *(old.to_sparse, old.to_mkldnn, lambda: old.to("meta"), old.cfloat, lambda: old.transpose(0, -1)),
        *(lambda: wide[:1].expand(old.shape), lambda: torch.quantize_per_tensor(old, 0.1, 0, torch.qint8)),
        *(lambda: nn.Parameter(old.clone()), lambda: changed_tensor(rng, old)),
    ]
    return rng.choice(odd)()


def changed_tree(rng: random.Random) -> Any:
    """A checkpoint of whatever form: nested, cyclic, with other names and other tensors."""
    tensors: dict[Any, Any] = dict(THEN)
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice(sorted(THEN))
        new = [odd_tensor(rng, THEN[name]), copy.deepcopy(rng.choice(HOSTILE[:-7])), THEN[name].tolist()]
        tensors[rng.choice([name, "x", 3, None, f"module.{name}", "module." * 5000 + name])] = rng.choice(new)
        if rng.random() < 0.3:
            tensors.pop(name, None)
    for _ in range(rng.choice([0, 1, 1, 2, 40])):
        key = rng.choice(["state_dict", "model", "net", "ema", "model_state_dict", "x", 7, None])
        tensors = {key: tensors, **rng.choice([{}, {"epoch": 3}, {"ema": tensors}, {"ema": dict(THEN)}, THEN])}
    if rng.random() < 0.2:
        tensors["state_dict"] = tensors
    return rng.choice([tensors, tensors, tensors, [tensors], tuple(tensors), None, 3.5])


def checkpoint_fate(source: Any, name: str, expected: ns.Edit) -> Fate:
    """Whether a checkpoint is refused, a file with its name, or gives an edit that can be used."""
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of odd tensors
            edit = ns.rewind(NEURONS, source)
            ns.bake(edit, MODEL)
    except ValueError as error:
        named = isinstance(source, dict) or name in str(error)
        return Fate(REFUSED) if named else Fate(FOREIGN, f"without the file's name: {error!r}")
    except Exception as error:
        return Fate(FOREIGN, repr(error))
    if time.monotonic() - started > SLOW:
        return Fate(FOREIGN, f"took {time.monotonic() - started:.0f} s")
    return Fate(EQUAL if edit == expected else OTHER)


def fuzz_checkpoints(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """The outcomes of rewinding to so many changed checkpoints, and what was wrong with those that are foreign."""
    rng, outcomes, foreign = random.Random(seed), Counter[str](), list[str]()
    written, expected = list(checkpoints(folder).values()), ns.rewind(NEURONS, THEN)
    path = folder / "changed.pt"
    for number in range(count):
        source: Any = path
        if rng.random() < 0.6:
            path.write_bytes(changed_bytes(rng, rng.choice(written)))
        else:
            tree = changed_tree(rng)
            if isinstance(tree, dict) and rng.random() < 0.5:
                source = tree
            else:
                with contextlib.suppress(NotImplementedError):  # of a tensor that cannot be saved; then the last file
                    torch.save(tree, path)
        found = checkpoint_fate(source, path.name, expected)
        outcomes[found.outcome] += 1
        if found.why:
            foreign.append(f"checkpoint {number} of seed {seed}: {found.why}")
    return outcomes, foreign
