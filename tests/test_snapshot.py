"""The snapshot sees each kind of change: a test of purity that cannot fail would prove nothing."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from snapshot import assert_unchanged, snapshot, torch_flags
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize


class Model(nn.Module):
    """One of each: a shared weight, normalisation, a parametrized module, a recurrent one, odd attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.normed = parametrizations.weight_norm(nn.Linear(3, 3))
        self.rnn = nn.GRU(3, 3, batch_first=True)
        self.register_buffer("table", torch.tensor([0.0, float("nan")]), persistent=False)
        self.cached = self.first.weight * 2
        self.factor = 0.5
        self.names = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.norm(self.second(self.first(x).tanh())))
        return self.rnn(x[:, None])[0][:, 0]


@dataclasses.dataclass
class Bundle:
    inputs: Tensor
    extra: dict[str, Any]


def world() -> tuple[Model, dict[str, Any]]:
    torch.manual_seed(1)
    model = Model()
    bundle = Bundle(torch.randn(4, 3), {"k": 1})
    data = {"batches": [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], "bundle": bundle, "array": np.zeros(3)}
    model(torch.randn(4, 3)).sum().backward()
    return model, data


def there_and_back(model: Model, data: dict[str, Any]) -> None:
    with torch.no_grad():
        model.first.bias.add_(1).sub_(1)


def swap_memory(model: Model, data: dict[str, Any]) -> None:
    model.first.bias.data = model.first.bias.data.clone()


def transpose_memory(model: Model, data: dict[str, Any]) -> None:
    model.first.weight.data = model.first.weight.data.t().contiguous().t()


def replace_parameter(model: Model, data: dict[str, Any]) -> None:
    model.first.bias = nn.Parameter(model.first.bias.detach())


def reorder_parameters(model: Model, data: dict[str, Any]) -> None:
    model.first._parameters["weight"] = model.first._parameters.pop("weight")


def untie(model: Model, data: dict[str, Any]) -> None:
    model.second.weight = nn.Parameter(model.first.weight.detach())


def parametrize_and_remove(model: Model, data: dict[str, Any]) -> None:
    parametrize.register_parametrization(model.first, "weight", nn.Identity())
    parametrize.remove_parametrizations(model.first, "weight", leave_parametrized=False)


def negative_zero(model: Model, data: dict[str, Any]) -> None:
    model.table.data[0] = -0.0


def change_class(model: Model, data: dict[str, Any]) -> None:
    model.norm.__class__ = nn.SyncBatchNorm


def touch_parametrized_class(model: Model, data: dict[str, Any]) -> None:
    parametrize.register_parametrization(model.normed, "bias", nn.Identity())


def train_step(model: Model, data: dict[str, Any]) -> None:
    model(torch.ones(2, 3))


def same_grad_elsewhere(model: Model, data: dict[str, Any]) -> None:
    model.first.bias.grad = model.first.bias.grad.clone()


def same_tensor_elsewhere(model: Model, data: dict[str, Any]) -> None:
    data["batches"][0] = (data["batches"][0][0].clone(), data["batches"][0][1])


def set_grad_of_a_batch(model: Model, data: dict[str, Any]) -> None:
    data["batches"][0][0].grad = torch.zeros(4, 3)


Change = Callable[[Model, dict[str, Any]], Any]

CHANGES: dict[str, tuple[Change, str]] = {
    "in place and back": (there_and_back, r"parameter first\.bias version: \d+ -> \d+"),
    "in place past the version": (lambda m, d: m.first.bias.data.add_(1), r"parameter first\.bias bits"),
    "another memory": (swap_memory, r"parameter first\.bias storage"),
    "another layout": (transpose_memory, r"parameter first\.weight strides"),
    "another dtype": (lambda m, d: m.double(), r"parameter first\.bias dtype: torch.float32 -> torch.float64"),
    "another parameter": (replace_parameter, r"parameter first\.bias identity"),
    "another order": (reorder_parameters, r"parameter order"),
    "a tie broken": (untie, r"parameter second\.weight identity"),
    "a parameter added": (
        lambda m, d: m.register_parameter("p", nn.Parameter(torch.ones(1))),
        r"parameter p identity: new",
    ),
    "a parameter removed": (lambda m, d: delattr(m.first, "bias"), r"parameter first\.bias identity: gone"),
    "an accumulator lost": (parametrize_and_remove, r"parameter first\.weight gradient accumulator"),
    "frozen": (lambda m, d: m.first.bias.requires_grad_(False), r"parameter first\.bias requires_grad: True -> False"),
    "grad cleared": (lambda m, d: m.zero_grad(), r"parameter first\.bias grad bits: gone"),
    "grad replaced": (same_grad_elsewhere, r"parameter first\.bias grad identity"),
    "grad accumulated": (lambda m, d: m.first.bias.grad.add_(1), r"parameter first\.bias grad bits"),
    "statistics updated": (train_step, r"buffer norm\.running_mean bits"),
    "a zero turned negative": (negative_zero, r"buffer table bits"),
    "a buffer replaced": (lambda m, d: setattr(m, "table", m.table.clone()), r"buffer table identity"),
    "a buffer made persistent": (lambda m, d: m._non_persistent_buffers_set.clear(), r"state dict keys"),
    "training flag": (lambda m, d: m.norm.eval(), r"module norm training: True -> False"),
    "module class": (change_class, r"module norm class"),
    "class of a parametrized module": (touch_parametrized_class, r"module normed class attribute bias: new"),
    "module replaced": (lambda m, d: setattr(m, "norm", copy.deepcopy(m.norm)), r"module norm identity"),
    "attribute added": (lambda m, d: setattr(m, "note", 1), r"module \(root\) attribute names"),
    "attribute changed": (lambda m, d: setattr(m, "factor", 0.25), r"module \(root\) attribute factor"),
    "method overridden": (lambda m, d: setattr(m.first, "forward", m.forward), r"module first attribute forward"),
    "inside an attribute": (lambda m, d: m.names.append("c"), r"module \(root\) attribute names length: 2 -> 3"),
    "cached activation": (lambda m, d: m.cached.data.mul_(2), r"module \(root\) attribute cached bits"),
    "flat weights": (lambda m, d: m.rnn._flat_weights.clear(), r"module rnn attribute _flat_weights length"),
    "forward hook": (lambda m, d: m.first.register_forward_hook(print), r"module first attribute _forward_hooks keys"),
    "pre-hook": (lambda m, d: m.norm.register_forward_pre_hook(print), r"attribute _forward_pre_hooks keys"),
    "backward hook": (lambda m, d: m.register_full_backward_hook(print), r"attribute _backward_hooks keys"),
    "state dict hook": (
        lambda m, d: m.register_state_dict_post_hook(lambda *args: None),
        r"attribute _state_dict_hooks keys",
    ),
    "tensor hook": (lambda m, d: m.first.bias.register_hook(print), r"parameter first\.bias _backward_hooks"),
    "grad hook": (
        lambda m, d: m.first.bias.register_post_accumulate_grad_hook(print),
        r"parameter first\.bias _post_accumulate_grad_hooks",
    ),
    "attribute of a tensor": (lambda m, d: setattr(m.first.bias, "score", 1), r"first\.bias attribute score: new"),
    "torch random": (lambda m, d: torch.rand(1), r"random state of torch"),
    "numpy random": (lambda m, d: np.random.rand(), r"random state of numpy"),
    "python random": (lambda m, d: random.random(), r"random state of python"),
    "dict entry added": (lambda m, d: d.update(new=1), r"container 0 keys"),
    "dict order": (lambda m, d: d.update(bundle=d.pop("bundle")), r"container 0 keys"),
    "list entry added": (lambda m, d: d["batches"].append(1), r"container 0\['batches'\] length"),
    "batch changed": (lambda m, d: d["batches"][0][0].add_(1), r"container 0\['batches'\]\[0\]\[0\] bits"),
    "batch copied": (same_tensor_elsewhere, r"container 0\['batches'\]\[0\]\[0\] identity"),
    "grad of a batch": (set_grad_of_a_batch, r"container 0\['batches'\]\[0\]\[0\] grad bits: new"),
    "array changed": (lambda m, d: d["array"].fill(1), r"container 0\['array'\] bytes"),
    "dataclass field": (lambda m, d: d["bundle"].extra.update(k=2), r"container 0\['bundle'\]\.extra\['k'\]"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_named(change: Change, message: str) -> None:
    model, data = world()
    before = snapshot(model, data)
    assert_unchanged(before, model, data)
    change(model, data)
    with pytest.raises(AssertionError, match=message):
        assert_unchanged(before, model, data)


def grad_off() -> Callable[[], Any]:
    torch.set_grad_enabled(False)
    return lambda: torch.set_grad_enabled(True)


def fast_path_off() -> Callable[[], Any]:
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(True)


def deterministic_off() -> Callable[[], Any]:
    torch.use_deterministic_algorithms(False)
    return lambda: torch.use_deterministic_algorithms(True)


def double() -> Callable[[], Any]:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def other_threads() -> Callable[[], Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    return lambda: torch.set_num_threads(threads)


def other_precision() -> Callable[[], Any]:
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision("highest")


def global_hook() -> Callable[[], Any]:
    return torch_module.register_module_forward_hook(lambda module, args, output: None).remove


def inference() -> Callable[[], Any]:
    mode = torch.inference_mode()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def autocast() -> Callable[[], Any]:
    mode = torch.autocast("cpu", torch.bfloat16)
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def parametrization_cache() -> Callable[[], Any]:
    mode = parametrize.cached()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


SWITCHES: dict[str, tuple[Callable[[], Callable[[], Any]], str]] = {
    "grad mode": (grad_off, "torch flag grad mode: True -> False"),
    "inference mode": (inference, "torch flag inference mode: False -> True"),
    "fast path": (fast_path_off, "torch flag mha fast path: True -> False"),
    "deterministic": (deterministic_off, "torch flag deterministic: True -> False"),
    "dtype": (double, "torch flag default dtype: torch.float32 -> torch.float64"),
    "threads": (other_threads, "torch flag threads"),
    "precision": (other_precision, "torch flag matmul precision: highest -> high"),
    "autocast": (autocast, "torch flag autocast: False -> True"),
    "parametrization cache": (parametrization_cache, "torch flag parametrization cache: 0 -> 1"),
    "global hook": (global_hook, "global hooks _global_forward_hooks"),
}


@pytest.mark.parametrize(("switch", "message"), SWITCHES.values(), ids=SWITCHES)
def test_a_switch_is_named(switch: Callable[[], Callable[[], Any]], message: str) -> None:
    model, data = world()
    before = snapshot(model, data)
    restore = switch()
    try:
        with pytest.raises(AssertionError, match=message):
            assert_unchanged(before, model, data)
    finally:
        restore()
    assert_unchanged(before, model, data)


def test_what_only_reads_changes_nothing() -> None:
    model, data = world()
    model.eval()
    before = snapshot(model, data)
    model(torch.ones(2, 3))
    torch.autograd.grad(model(torch.ones(2, 3)).sum(), [model.first.weight])
    model.cached = model.cached  # the very same object
    model.state_dict()
    torch_flags()
    assert_unchanged(before, model, data)


def test_a_deep_copy_changes_nothing() -> None:
    """Copying fills a cache in the class; the snapshot must not mistake it for a change."""
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.spectral_norm(nn.Linear(2, 2)))
    before = snapshot(model)
    copy.deepcopy(model).double()
    assert_unchanged(before, model)


def test_it_works_without_gradients_too() -> None:
    model, data = world()
    with torch.no_grad():
        before = snapshot(model, data)
        assert_unchanged(before, model, data)
    with torch.inference_mode():
        before = snapshot(model, data)
        assert_unchanged(before, model, data)


def test_many_changes_are_cut_short() -> None:
    model, data = world()
    before = snapshot(model, data)
    model.double()
    with pytest.raises(AssertionError, match=r"\.\.\. and \d+ more"):
        assert_unchanged(before, model, data)
