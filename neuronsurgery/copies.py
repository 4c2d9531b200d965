"""Copies of a model that share its weights: to be edited, or to be run in its place.

A copy is a deep copy whose memo holds what is to be shared. What a deep copy takes as it is, and would lead back to the
original, is mended: functions that call a module of the model, and the classes of parametrized modules.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from neuronsurgery.caches import ABSENT, Attributes, blank_caches
from neuronsurgery.errors import inline, warn
from neuronsurgery.gathering import Gathered, gather_in, plain_class, service_for
from neuronsurgery.guards import Guard
from neuronsurgery.habits import CHECKPOINTING, checkpoints_in_training, given_to, type_of, written_by_forward
from neuronsurgery.objects import held_by_attributes, kept_attributes, uncopyable_within
from neuronsurgery.parametrized import (
    TENSOR_ORDER,
    give_own_class,
    originals,
    parametrizations,
    remove_parametrization,
    tensor_attributes,
)
from neuronsurgery.rebinding import rebound, rebound_hooks
from neuronsurgery.serving import Service
from neuronsurgery.spread import is_spread, refuse_different_data
from neuronsurgery.surveys import Survey, SurveyedTensor, refuse_unrunnable, survey
from neuronsurgery.switches import restoring
from neuronsurgery.types import Buffers
from neuronsurgery.wrappers import is_a, is_checkpointed, unwrap, without_fsdp


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of a model, and which of its modules is the copy of which.

    Attributes:
        model: the copy.
        modules: module of the original -> module of the copy.
    """

    model: nn.Module
    modules: Mapping[nn.Module, nn.Module]


@torch.inference_mode(mode=False)  # a copy outlives the caller's mode
def copy_structure(
    surveyed: Survey,
    *,
    replace: Mapping[int, Tensor] | None = None,
    buffers: Buffers = "own",
    blank: bool = True,
) -> Copy:
    """Return a new module of the same classes whose parameters are the model's own.

    It is a deep copy in which parameters, hooks, tensors that are not leaves of autograd (cached activations), and what
    refuses a copy and holds no part of a model (locks, files, process groups) are shared. Nothing of the model changes,
    and wrappers (DDP, torch.compile) are taken off everywhere.

    Args:
        surveyed: the model.
        replace: the tensor to use in place of a parameter, by the parameter's id.
        buffers: "own" copies the buffers, "shared" shares them.
        blank: whether what the modules have computed and keep (see `caches`) is left out.

    Raises:
        TypeError: if an attribute of a module cannot be copied, nor shared; names module and attribute.
        ValueError: if a parameter or buffer is not yet initialised; lists them.
    """
    names = surveyed.modules
    memo: dict[int, Any] = {}
    for module in names:
        # Not __new__ of the class: a torch.fx.GraphModule makes a new class there and loses its forward.
        memo[id(module)] = object.__new__(plain_class(type(module)))
    _refuse_uninitialised(names)
    for module in names:
        _share(module, memo, buffers, optimizers=not replace)
    memo.update(replace or {})
    known = given_to(names)
    for module, name in names.items():
        _fill(memo[id(module)], module, name, memo, blank_caches(module, known) if blank else {})
    copied = {module: memo[id(module)] for module in names}
    for new in copied.values():
        _detach_from_original(new)
    gather_in(copied, surveyed.model, surveyed.ways())
    return Copy(copied[surveyed.model], copied)


def _refuse_uninitialised(names: Mapping[nn.Module, str]) -> None:
    """Raise for lazy modules: the first run of a copy would initialise the model itself, and only half of it."""
    wrong = [
        f"{name}.{attribute}".removeprefix(".")
        for module, name in names.items()
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]
        if isinstance(tensor, UninitializedTensorMixin)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the model's tensors are not yet initialised (lazy modules): {inline(wrong, 10)}; run the "
            f"model on one batch first"
        )


def _share(module: nn.Module, memo: dict[int, Any], buffers: Buffers, *, optimizers: bool) -> None:
    """Enter into the memo of a deep copy, which has the modules already, what the copy of this one is to share."""
    for parameter in module._parameters.values():
        if parameter is not None:
            memo[id(parameter)] = parameter
    for buffer in module._buffers.values():
        if buffer is not None:
            memo[id(buffer)] = buffer if buffers == "shared" else _clone(buffer)
    for child in module._modules.values():
        if child is not None and unwrap(child) is not child:
            memo[id(child)] = memo[id(unwrap(child))]
    for key, value in without_fsdp(vars(module)).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            for hook in value.values():
                owner = getattr(hook, "__self__", hook)
                # A hook that is a method of one of the model's modules follows that module into the copy;
                # torch's own wrapper holds such a module weakly and knows how to be copied with it.
                if not isinstance(hook, _WrappedHook):
                    memo.setdefault(id(owner), owner)
    for held in held_by_attributes(module, memo):
        if isinstance(held, Optimizer):
            if optimizers:
                memo.setdefault(id(held), held)
        elif isinstance(held, nn.Parameter) or not held.is_leaf:
            memo.setdefault(id(held), held)


def _clone(buffer: Tensor) -> Tensor:
    return buffer if buffer.is_meta else buffer.detach().clone()


_PLAIN = (bool, int, float, str)


def _copied(key: str, value: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of an attribute; one that is compiled is bound to the original, and the copy runs uncompiled."""
    if key == "_compiled_call_impl":
        return None
    if value is None or type(value) in _PLAIN:  # as most are: nothing to find in them
        return value
    hooks = key.endswith("_hooks") and isinstance(value, dict)
    new = rebound_hooks(value, memo) if hooks else rebound(value, memo)
    if new is not value and not hooks:
        memo[id(value)] = new if callable(value) else copy.deepcopy(new, memo)
        return memo[id(value)]
    value, known = new, len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for half_done in list(memo)[known:]:
            del memo[half_done]
        shared = {id(held): held for held in uncopyable_within(value, memo)}
        if not shared:
            raise
        memo.update(shared)
        return copy.deepcopy(value, memo)


def _fill(new: nn.Module, module: nn.Module, name: str, memo: dict[int, Any], blank: Mapping[str, Any]) -> None:
    attributes = {key: value for key, value in blank.items() if value is not ABSENT}
    for key, value in kept_attributes(module).items():
        if key in blank:
            continue
        try:
            attributes[key] = _copied(key, value, memo)
        except Exception as error:
            raise TypeError(
                f"cannot make a view of the model: attribute '{key}' of module '{name or type(module).__name__}' "
                f"({type(module).__name__}) cannot be copied: {error}. Remove it before the call, or give its class a "
                f"__deepcopy__"
            ) from error
    attributes.setdefault(TENSOR_ORDER, tuple(tensor_attributes(module)))
    new.__dict__.update(attributes)


def _detach_from_original(new: nn.Module) -> None:
    if is_parametrized(new):
        give_own_class(new)
    if isinstance(new, nn.RNNBase):
        # On CUDA it would move the shared weights into one block of memory.
        new.__dict__["flatten_parameters"] = _keep_parameters


def _keep_parameters() -> None:
    """Stand in for RNNBase.flatten_parameters on a copy that shares its weights."""


# Copies to run

WRITES = (
    "the forward pass would write into {}, a parameter of your model: have it compute with a copy of the parameter "
    "(weight.clamp(...) in the place of weight.data.clamp_(...)), or change the parameter outside of the forward"
)


@dataclass(frozen=True, eq=False)
class Runner:
    """A copy in evaluation mode that shares the parameters and in which no tensor is parametrized any more.

    Attributes:
        model: the copy. What it caches of its own is its own.
        parameters: its parameters by the names of the survey.
        places: for each parameter one path to every module and attribute that hold it, for `functional_call`.
        device: of its first parameter, or None.
        own: the names of the parameters that the copy does not share, since its forward pass writes into them.
        gathered: of the tensors that FSDP shards, by name, how the copy computes them.
        service: what gives this process whole weights whenever it asks; None where all are here.
        attributes: of its modules, to be given back after each forward pass.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    places: Mapping[str, tuple[str, ...]]
    device: torch.device | None
    own: frozenset[str] = frozenset()
    gathered: Mapping[str, Gathered] = field(default_factory=dict)
    service: Service | None = None
    attributes: Attributes = field(init=False)
    _unguarded: list[bool] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", Attributes(self.model))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Have the first forward pass refused if it writes into a shared parameter, before it does.

        Raises:
            RuntimeError: where it would; names the parameter.
        """
        shared = {name: tensor for name, tensor in self.parameters.items() if name not in self.own}
        with contextlib.nullcontext() if self._unguarded else Guard(shared, WRITES):
            yield
        self._unguarded.append(True)

    @property
    def is_spread(self) -> bool:
        """Whether some parameters are spread over processes."""
        return any(map(is_spread, self.parameters.values()))


def make_runner(
    surveyed: Survey,
    *,
    checkpoints: bool = False,
    blank: bool = True,
    spread: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Runner:
    """Return the copy of a model that scores, evaluation and sweeps run: see `computed_copy`.

    Args:
        surveyed: the model.
        spread: whether it may be spread over processes. Where FSDP shards it, all processes serve each other from here
            on until the public function ends.
        checkpoints: see `computed_copy`.
        blank: see `computed_copy`.
        process_group: over whose ranks the data are shared out.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
        ValueError: if a tensor is on the meta device or sharded, or not yet initialised (lists all), or if ranks that
            compute one model together are to give different data.
    """
    refuse_unrunnable(surveyed, spread=spread)
    refuse_different_data(
        (t.parameter for n, t in surveyed.tensors.items() if n not in surveyed.gathered), process_group
    )
    runner = computed_copy(surveyed, checkpoints=checkpoints, blank=blank)
    if runner.service is not None:
        runner.service.start()
    return runner


@restoring
def computed_copy(surveyed: Survey, *, checkpoints: bool = False, blank: bool = True) -> Runner:
    """Return a copy of a model in which a parametrized tensor stands as a parameter, computed once, in its plain place.

    Args:
        surveyed: the model.
        checkpoints: whether modules that are checkpointed in training are so in the copy, too, though it evaluates.
        blank: whether what the modules have computed and keep is left out: it need not be where the weights stay.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
    """
    written = _written(surveyed)
    copied = copy_structure(surveyed, replace=_own_copies(written), blank=blank)
    _set_eval(copied.model)
    if checkpoints:
        children = [child for module in surveyed.modules for child in module._modules.values() if child is not None]
        for child in filter(is_checkpointed, children):
            _checkpoint(copied.modules[unwrap(child)])
        _keep_checkpointing(surveyed, copied)
    computed: dict[int, Tensor] = {}
    for module in [module for module in copied.model.modules() if is_parametrized(module)]:
        for attribute, held in parametrizations(module).items():
            if id(held) not in computed:
                computed[id(held)] = _computed(module, attribute)
            remove_parametrization(module, attribute, computed[id(held)])
    parameters = {
        name: copied.modules[tensor.uses[0].module]._parameters[tensor.uses[0].attribute]
        for name, tensor in surveyed.tensors.items()
    }
    places = {name: tuple(use.path for use in tensor.uses) for name, tensor in surveyed.tensors.items()}
    own = frozenset(tensor.name for tensor in written)
    gathered = surveyed.gathered
    service = service_for(gathered, {name: surveyed.tensors[name].parameter for name in gathered})
    return Runner(copied.model, parameters, places, surveyed.device, own, gathered, service)  # type: ignore[arg-type]  # none is None


def eval_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode that shares its parameters, for a loop of one's own.

    It is what scores, evaluation and sweeps run: wrappers and parametrizations are taken off, buffers are copies, and
    whatever is done to the modules (hooks, flags) stays with the copy. What is written into a parameter does not.

    Args:
        model: any module; not changed.

    Raises:
        TypeError: if an attribute of a module cannot be copied; names module and attribute.
        ValueError: if a parameter or buffer is not yet initialised, on the meta device, or sharded; lists them.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = eval_copy(model)
        >>> copied.training, model.training, copied[0].weight is model[0].weight
        (False, True, True)
    """
    return make_runner(survey(model)).model


def readable(surveyed: Survey) -> Mapping[str, Tensor]:
    """Return the model's tensors by first name; where one is parametrized, as they are computed on a copy.

    Raises:
        TypeError: if a model with parametrized tensors cannot be copied.
    """
    if any(tensor.parametrized for tensor in surveyed.tensors.values()):
        return computed_copy(surveyed).parameters
    return {name: tensor.parameter for name, tensor in surveyed.tensors.items()}


def _set_eval(module: nn.Module) -> None:
    """Set evaluation mode on a copy by its flags alone.

    Some classes override `train()` to merge weights or to freeze parameters, which would reach the shared ones.
    """
    for child in module.modules():
        child.training = False


def _checkpoint(module: nn.Module) -> None:
    """Have a module of a copy run again in the backward pass, without a cache of keys, which it would fill twice."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        cached = [key for key, value in kwargs.items() if is_a(value, "Cache", "transformers.cache_utils")]
        return checkpoint(forward, *args, use_reentrant=False, **kwargs | dict.fromkeys(cached))

    module.__dict__["forward"] = run


def checkpointing_asleep(surveyed: Survey) -> dict[nn.Module, str]:
    """Return the modules that checkpoint parts of themselves in training mode alone, and their names.

    Not those whose parts are checkpointed whatever the mode, see `is_checkpointed`.
    """
    return {
        module: name
        for module, name in surveyed.modules.items()
        if any(vars(module).get(flag) is True for flag in CHECKPOINTING)
        and checkpoints_in_training(type_of(module)) != "no"
        and not any(map(is_checkpointed, module.modules()))
    }


def _keep_checkpointing(surveyed: Survey, copied: Copy) -> None:
    """Have modules of a copy that evaluates go on checkpointing parts of themselves, where nothing else wakes with it.

    Warns:
        UserWarning: where something would, or nothing says how to checkpoint without reentering the backward pass.
    """
    left = []
    for module, name in checkpointing_asleep(surveyed).items():
        if checkpoints_in_training(type_of(module)) == "alone" and hasattr(module, "_gradient_checkpointing_func"):
            new = copied.modules[module]
            new.training = True  # of this module by itself: its parts go on evaluating
            new.__dict__["_gradient_checkpointing_func"] = functools.partial(checkpoint, use_reentrant=False)
        else:
            left.append(name or type(module).__name__)
    if left:
        warn(
            f"gradient checkpointing of {inline(left)} is off while scores are computed: it would take training mode, "
            f"in which dropout wakes. All activations of a batch are kept: smaller batches need less memory"
        )


def _written(surveyed: Survey) -> list[SurveyedTensor]:
    """Return the tensors that a forward pass in evaluation mode itself changes: embeddings with `max_norm`, clamps."""
    written: set[tuple[int, str]] = set()
    for module in surveyed.modules:
        written |= {(id(holder), attribute) for holder, attribute in written_by_forward(module)}
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            written.add((id(module), "weight"))
    return [
        tensor
        for tensor in surveyed.tensors.values()
        if any((id(use.module), use.attribute) in written for use in tensor.uses)
    ]


def _own_copies(tensors: Iterable[SurveyedTensor]) -> dict[int, Tensor]:
    """Return copies of some tensors, by the id of each parameter; what lies in one memory goes on doing so."""
    own: dict[int, Tensor] = {}
    for tensor in tensors:
        value = tensor.parameter.detach().clone()
        for held in tensor.parameters:
            if not tensor.parametrized and id(held) not in own:
                own[id(held)] = nn.Parameter(value.detach(), held.requires_grad)
    return own


def _computed(module: nn.Module, attribute: str) -> Tensor:
    with torch.no_grad():
        value: Tensor = getattr(module, attribute).detach()
    held = originals(module, attribute)
    if not any(isinstance(original, nn.Parameter) for original in held):
        return value
    return nn.Parameter(value, requires_grad=any(original.requires_grad for original in held))
