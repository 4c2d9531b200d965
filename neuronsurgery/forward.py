"""One forward pass in isolation, and the logits in what a model returns."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from neuronsurgery.batches import Batch, map_tensors
from neuronsurgery.copies import Runner
from neuronsurgery.errors import checked_function
from neuronsurgery.switches import KERNELS, undoing
from neuronsurgery.types import Predict


def isolated_forward(runner: Runner, batch: Batch) -> Any:
    """Return a model's output for a batch; what it writes into its inputs, or draws, stays without effect outside.

    Raises:
        RuntimeError: if it would write into a parameter of the caller's model, as far as the first pass shows.
    """
    copies: list[Tensor] = []

    def own(tensor: Tensor) -> Tensor:
        copies.append(tensor.detach().clone())
        return copies[-1]

    args, kwargs = map_tensors((batch.args, dict(batch.kwargs)), own)
    with random_state_kept(copies), KERNELS.steady(), decoder_inputs_given(runner.model, batch), runner.guarded():
        return runner.model(*args, **kwargs)


@contextlib.contextmanager
def decoder_inputs_given(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Say what to do where a model is run without the inputs of its decoder, which it may have made of its labels.

    Raises:
        ValueError: if the model misses them, or has made them of other inputs although the targets are its labels.
    """
    message = (
        "the model needs the inputs of its decoder, and labels are targets here, which are never passed to the model: "
        "give decoder_input_ids in the batch (model.prepare_decoder_input_ids_from_labels(labels)), or pass unpack="
    )
    try:
        yield
    except Exception as error:
        # Its decoder may speak of inputs alone, and may be within a module of the caller's.
        inputs = "inputs_embeds" in str(error) and any(_decodes_other_inputs(m, batch) for m in model.modules())
        if inputs or "decoder_input" in str(error):
            raise ValueError(message) from error
        raise
    if batch.targets.dim() == 2 and _decodes_other_inputs(model, batch):
        raise ValueError(message)


def _decodes_other_inputs(model: nn.Module, batch: Batch) -> bool:
    """Return whether a generating encoder-decoder was given no inputs for its decoder: some decode the encoder's."""
    generates = getattr(model, "can_generate", None)
    if not callable(generates) or not generates():
        return False
    names = list(inspect.signature(model.forward).parameters)
    if "decoder_input_ids" not in names:
        return False
    given = (*names[: len(batch.args)], *batch.kwargs)
    return not any(name == "labels" or name.startswith("decoder_input") for name in given)


@contextlib.contextmanager
def random_state_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give the random state of the CPU and of the tensors' GPUs back as it was.

    Beside other threads only where something was drawn within: what they have drawn meanwhile must not come again.
    """
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    before = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    draws = _Draws() if threading.active_count() > 1 else None

    def restore() -> None:
        if draws is None or draws.seen:
            torch.set_rng_state(before[0])
            for device, state in zip(devices, before[1], strict=True):
                torch.cuda.set_rng_state(state, device)

    with undoing(restore), draws or contextlib.nullcontext():
        yield


def draws_within(call: Callable[[], object]) -> bool:
    """Return whether a call draws from a random state."""
    with _Draws() as draws, torch.no_grad():
        call()
    return bool(draws.seen)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is not annotated
    """See whether an operator draws from a random state."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.seen = False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= _may_draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _may_draw(operator: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator draws: attention may, and does only where its dropout is not 0."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(kwargs.get("dropout_p", args[place] if place < len(args) else 0.0))


class LogitsShapeError(ValueError):
    """The first dimension of a model's logits is not the example."""


def extract_logits(output: Any, predict: Predict | None, examples: int) -> Tensor:
    """Return the logits in a model's output, first dimension the example.

    Args:
        output: what the model returned.
        predict: the caller's function output -> logits; the default takes the tensor itself, `.logits`, `["logits"]`,
            or the first of a tuple.
        examples: the number of examples in the batch.

    Raises:
        TypeError: if no logits are found, or `predict` is no function.
        ValueError: if their first dimension is not `examples`, or they are nested.
    """
    checked_function(predict, "predict")
    logits = default_predict(output) if predict is None else predict(output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"predict must return the logits, a tensor, not a {type(logits).__name__}")
    if logits.is_nested:
        raise ValueError("the model returned nested logits: pass predict=, a function output -> padded logits")
    if logits.dim() == 0 or len(logits) != examples:
        raise LogitsShapeError(
            f"the model returned logits of shape {tuple(logits.shape)} for {examples} examples; the first dimension "
            f"must be the example: pass predict=, a function output -> logits"
        )
    return logits


def default_predict(output: Any) -> Tensor:
    """Return the tensor itself, `.logits`, `["logits"]`, or the first of a tuple, whichever the output has.

    Raises:
        TypeError: if it has none of them.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"no logits found in the model's output, a {type(output).__name__}: pass predict=, a function "
            f"output -> logits"
        )
    return logits
