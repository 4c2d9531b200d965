"""Which normalisation alone reads the output of which layer, as a forward and a backward pass of few examples show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuronsurgery.batches import Batch, move
from neuronsurgery.copies import Runner
from neuronsurgery.differentiation import Within, differentiable, differentiable_rnns
from neuronsurgery.forward import extract_logits, isolated_forward
from neuronsurgery.switches import KERNELS
from neuronsurgery.types import Predict

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
TOLERANCE = 1e-3
"""Of the largest gradient: a norm whose share differs by more is not all that reads an output."""


class _Readers:
    """Hooks that note which norms are given which modules' outputs."""

    def __init__(self, writers: Iterable[nn.Module], norms: Iterable[nn.Module]) -> None:
        self.outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in writers}
        self.normed: dict[nn.Module, list[Tensor]] = {module: [] for module in norms}
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        self._given: dict[int, tuple[nn.Module, Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._wrote) for module in self.outputs]
        handles += [module.register_forward_hook(self._norm) for module in self.normed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _wrote(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.outputs[module].append(output)
        copied = output.clone()  # what comes behind may write into it
        self._given[id(copied)] = module, copied
        return copied

    def _norm(self, module: nn.Module, args: Any, output: Any) -> Any:
        writer, given = self._given.get(id(args[0]), (None, None)) if args else (None, None)
        if writer is not None and given is args[0]:
            self.pairs.append((writer, module))
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        self.normed[module].append(output)
        return output.clone()


def sole_readers(
    runner: Runner, writers: Iterable[nn.Module], batch: Batch, predict: Predict | None
) -> dict[nn.Module, nn.Module]:
    """Return for each module whose output only a norm reads this norm; both run once."""
    norms = [module for module in runner.model.modules() if isinstance(module, NORMS)]
    readers = _Readers(writers, norms)
    # Functions of tensors without gradients: none of the model's parameters is to get one.
    given = {place: differentiable(p) for name, p in runner.parameters.items() for place in runner.places[name]}
    found: dict[nn.Module, nn.Module] = {}

    def look() -> None:
        with readers.listening():
            logits = extract_logits(isolated_forward(runner, batch), predict, len(batch))
        # Any function of all logits: different numbers, so that nothing cancels.
        numbers = torch.arange(logits.numel(), device=logits.device).reshape(logits.shape)
        total = (logits.float() * torch.cos(1.7 * numbers + 0.3)).sum()
        for writer, norm in readers.pairs:
            once = len(readers.outputs[writer]) == len(readers.normed[norm]) == 1 and total.requires_grad
            if once and _is_all(total, readers.outputs[writer][0], readers.normed[norm][0]):
                found[writer] = norm

    batch = move(batch, runner.device)
    with torch.enable_grad(), differentiable_rnns(runner), KERNELS.steady():
        try:
            given = {f"model.{place}": tensor for place, tensor in given.items()}
            functional_call(Within(runner.model), given, (look,), tie_weights=False)
        finally:
            runner.attributes.restore()
    return found


def _is_all(total: Tensor, written: Tensor, normed: Tensor) -> bool:
    """Return whether all that a sum owes to an output goes through what a norm makes of it."""
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        total, (written, normed), retain_graph=True, allow_unused=True
    )
    whole, behind = gradients
    if whole is None or behind is None:
        return False
    (through,) = torch.autograd.grad(normed, written, behind, retain_graph=True)
    largest = float(whole.abs().max())
    return largest > 0 and float((whole - through).abs().max()) <= TOLERANCE * largest
