"""Every kind of edit as data: how it is made, and what the reference says that it does to a tensor."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from torch import Tensor, nn
from zoo import CASES, Case, Rows

import neuronsurgery as ns

SEED = 7


class Site(NamedTuple):
    """Where an edit acts: a layer, its chosen neurons, and the values the layer had at another time."""

    name: str
    axis: int
    groups: int
    indices: Sequence[int]
    earlier: Tensor

    @property
    def where(self) -> tuple[int, int, Sequence[int]]:
        return self.axis, self.groups, self.indices


class Kind(NamedTuple):
    """`make(neurons, earlier tensors)` is the edit, `expect(tensor, site)` the tensor after it."""

    make: Callable[[ns.Neurons, Mapping[str, Tensor]], ns.Edit]
    expect: Callable[[Tensor, Site], Tensor]


def draw(seed: int, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """What a neuron draws: SHA-256 of (seed, name, index), the raw stream of Philox, Box and Muller."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()[:16], "little")
    size = math.prod(shape)
    bits = np.random.Philox(key=key).random_raw(size + size % 2)
    u, v = ((bits // 2**11) / 2**53).reshape(-1, 2).T
    pairs = np.sqrt(-2 * np.log(1 - u)) * np.exp(2j * np.pi * v)
    normals = np.column_stack([pairs.real, pairs.imag]).ravel()[:size]
    return torch.tensor(normals).float().reshape(shape)


def draws(tensor: Tensor, site: Site) -> dict[int, Tensor]:
    shape = tuple(reference.rows(tensor, site.axis, site.groups)[0].shape)
    return {i: draw(SEED, site.name, i, shape) for i in site.indices}


def compose_expected(tensor: Tensor, site: Site) -> Tensor:
    noised = reference.noised(tensor, site.axis, site.groups, draws(tensor, site), relative_std=0.5)
    scaled = reference.scaled(noised, *site.where, 0.3)
    return reference.initialised(scaled, site.axis, site.groups, draws(scaled, site), relative_std=1.5)


KINDS: dict[str, Kind] = {
    "zero_out": Kind(lambda n, _: ns.zero_out(n), lambda t, s: reference.zeroed(t, *s.where)),
    "scale": Kind(lambda n, _: ns.scale(n, -1.7), lambda t, s: reference.scaled(t, *s.where, -1.7)),
    "random_init": Kind(
        lambda n, _: ns.random_init(n, std=0.4, seed=SEED),
        lambda t, s: reference.initialised(t, s.axis, s.groups, draws(t, s), std=0.4),
    ),
    "random_init_relative": Kind(
        lambda n, _: ns.random_init(n, relative_std=0.7, seed=SEED),
        lambda t, s: reference.initialised(t, s.axis, s.groups, draws(t, s), relative_std=0.7),
    ),
    "random_noise": Kind(
        lambda n, _: ns.random_noise(n, std=0.3, seed=SEED),
        lambda t, s: reference.noised(t, s.axis, s.groups, draws(t, s), std=0.3),
    ),
    "random_noise_relative": Kind(
        lambda n, _: ns.random_noise(n, relative_std=0.9, seed=SEED),
        lambda t, s: reference.noised(t, s.axis, s.groups, draws(t, s), relative_std=0.9),
    ),
    "rewind": Kind(lambda n, then: ns.rewind(n, then), lambda t, s: reference.rewound(t, *s.where, earlier=s.earlier)),
    "rewind_half": Kind(
        lambda n, then: ns.rewind(n, then, 0.5),
        lambda t, s: reference.rewound(t, *s.where, earlier=s.earlier, alpha=0.5),
    ),
    "compose": Kind(
        lambda n, _: ns.compose(
            ns.random_noise(n, relative_std=0.5, seed=SEED),
            ns.scale(n, 0.3),
            ns.random_init(n, relative_std=1.5, seed=SEED),
        ),
        compose_expected,
    ),
}


@functools.cache
def built(name: str) -> nn.Module:
    """A model of the zoo in evaluation mode, for tests that only read it: to build one anew takes up to a second."""
    return CASES[name].build().eval()


def earlier(case: Case) -> dict[str, Tensor]:
    """Other values for the layers, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(1)
    model = built(case.name)
    return {name: torch.randn(tensor_of(model, name).shape, generator=generator) / 4 for name in case.layers}


def few(layout: ns.Layout) -> ns.Neurons:
    """The first, the middle and the last neuron of every layer."""
    return ns.select(layout, {layer.parameter: sorted({0, layer.count // 2, layer.count - 1}) for layer in layout})


def layer_of(name: str, rows: Rows) -> ns.Layer:
    """The layer that the zoo describes."""
    if rows.groups > 1:
        shape = (rows.groups * rows.row_shape[0], rows.count // rows.groups, *rows.row_shape[1:])
        return ns.Layer(name, "(g i) n ... -> (g n) i ...", {"g": rows.groups}, shape)
    pattern = "i n ... -> n i ..." if rows.axis else "n ... -> n ..."
    return ns.Layer(name, pattern, {}, (*rows.row_shape[: rows.axis], rows.count, *rows.row_shape[rows.axis :]))


def named(by_layer: Mapping[ns.Layer, Any]) -> dict[str, Any]:
    """What is kept by layer, by the names of the parameters."""
    return {layer.parameter: value for layer, value in by_layer.items()}


def sites(case: Case, neurons: ns.Neurons, then: Mapping[str, Tensor]) -> list[Site]:
    return [
        Site(name, case.layers[name].axis, case.layers[name].groups, indices, then[name])
        for name, indices in named(neurons.by_layer()).items()
    ]


def tensor_of(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = attrgetter(name)(model)
    return tensor.detach()


def run(model: nn.Module, batch: Any) -> Tensor:
    """The logits of one batch, as the model gives them."""
    args, kwargs, _, _ = reference.unpack(batch)
    return reference.logits_of(model(*args, **kwargs))
