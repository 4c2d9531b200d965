"""A model's structure: its tensors by name, and copies that share its weights.

Two facts of torch shape this module. A parametrized tensor is a property that is computed at every access, by a
forward pass that may change buffers (spectral norm's power iteration in training mode): so it is only ever computed
on a copy. And the dynamic class that torch gives a parametrized module holds the properties of all its parametrized
tensors: a copy that kept that class would change the original when a further tensor is parametrized. So every copy
gets a class of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # missing in torch's own list
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.optim import Optimizer

Buffers: TypeAlias = Literal["own", "shared"]

TENSOR_ORDER = "_neuronsurgery_tensor_order"
"""Name of the attribute in which a copy remembers the order of a module's tensors, which parametrizing would change."""

HOOKED = {
    "WeightNorm": "torch.nn.utils.parametrizations.weight_norm",
    "SpectralNorm": "torch.nn.utils.parametrizations.spectral_norm",
}


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DistributedDataParallel, DataParallel and torch.compile.

    Raises:
        TypeError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, not a {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            # By name, since importing torch._dynamo costs a second that most callers need not spend.
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


# Names


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """A parameter, or the tensor that a parametrization computes, under every name it has in the bare model.

    Attributes:
        name: the first name in the order of `named_parameters()`.
        aliases: its other names.
        uses: the (module, attribute) pairs that hold it, each once.
        parametrized: whether it is computed by a parametrization.
        hooked: the class name of an old weight-norm hook that computes another tensor from this one, or "".
    """

    name: str
    aliases: tuple[str, ...]
    uses: tuple[tuple[nn.Module, str], ...]
    parametrized: bool
    hooked: str

    @property
    def parameter(self) -> Tensor:
        """The tensor itself; of a parametrized one its first original, since computing it may change buffers."""
        module, attribute = self.uses[0]
        if self.parametrized:
            return _originals(module, attribute)[0]
        return module._parameters[attribute]  # type: ignore[return-value]  # None entries are never named

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient, or one of the tensors that a parametrization computes it from does."""
        originals = _originals(*self.uses[0]) if self.parametrized else [self.parameter]
        return any(original.requires_grad for original in originals)


def named_tensors(model: nn.Module) -> dict[str, NamedTensor]:
    """Return the model's parameters by their first name in the bare model, in the order of `named_parameters()`.

    Wrappers inside the model and the suffixes of parametrizations never show; a tensor of a parametrized module is
    there under its plain name.
    """
    names: dict[tuple[bool, int], list[str]] = {}
    uses: dict[tuple[bool, int], dict[tuple[int, str], tuple[nn.Module, str]]] = {}
    for prefix, module in walk_modules(bare(model)):
        for attribute in tensor_attributes(module):
            parametrized = is_parametrized(module, attribute)
            # A view of a tied weight keeps the tie: its uses share one list of parametrizations.
            held = parametrizations(module)[attribute] if parametrized else module._parameters[attribute]
            key = (parametrized, id(held))
            names.setdefault(key, []).append(f"{prefix}{attribute}")
            uses.setdefault(key, {})[id(module), attribute] = (module, attribute)
    tensors = {}
    for key, (name, *aliases) in names.items():
        held_by = tuple(uses[key].values())
        hooked = next(filter(None, (_old_hook(module, attribute) for module, attribute in held_by)), "")
        tensors[name] = NamedTensor(name, tuple(aliases), held_by, key[0], hooked)
    return tensors


def walk_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix, module) for every path to a module, wrappers taken off, parametrizations left out."""
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not (name == "parametrizations" and is_parametrized(model)):
            yield from walk_modules(bare(child), f"{prefix}{name}.")


def tensor_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, parametrized ones included, in their original order."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if is_parametrized(module):
        names += [
            name
            for name in parametrizations(module)
            if any(isinstance(original, nn.Parameter) for original in _originals(module, name))
        ]
    order = vars(module).get(TENSOR_ORDER, ())
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def parametrizations(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the parametrizations of a module's tensors, by the tensor's name."""
    held = module._modules.get("parametrizations") if is_parametrized(module) else None
    return {} if held is None else dict(held._modules)  # type: ignore[arg-type]  # torch registers nothing else there


def _originals(module: nn.Module, attribute: str) -> list[Tensor]:
    held = parametrizations(module)[attribute]
    names = ["original"] if held.is_tensor else [f"original{i}" for i in range(held.ntensors)]
    return [getattr(held, name) for name in names]


def _old_hook(module: nn.Module, attribute: str) -> str:
    """Return the class name of an old weight-norm hook that owns this parameter, or ""."""
    for hook in module._forward_pre_hooks.values():
        name = type(hook).__name__
        owned = getattr(hook, "name", None)
        if name in HOOKED and attribute.removesuffix("_g").removesuffix("_v").removesuffix("_orig") == owned:
            return name
    return ""


def refuse_unsupported(tensors: Iterable[NamedTensor]) -> None:
    """Raise one error that lists every tensor the library cannot read or edit, with the reason.

    Raises:
        ValueError: if a tensor is on the meta device, not yet initialised, quantised, sharded, complex, or owned by an
            old weight-norm hook.
    """
    wrong = [f"  {tensor.name}: {reason}" for tensor in tensors if (reason := _unsupported(tensor))]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the model's tensors cannot be read or edited:\n"
            + "\n".join([*wrong[:10], *([f"  ... and {len(wrong) - 10} more"] if len(wrong) > 10 else [])])
            + "\nGive a model with plain floating-point parameters on a real device, or leave these out with where="
        )


def _unsupported(named: NamedTensor) -> str:
    parameter = named.parameter
    if named.hooked:
        return f"owned by the old hook-based {named.hooked}; use {HOOKED[named.hooked]} instead"
    if isinstance(parameter, UninitializedTensorMixin):
        return "not yet initialised (a lazy module); run the model on one batch first"
    if parameter.is_meta:
        return "on the meta device, so it has no values; load the weights first"
    kinds = {kind.__name__ for kind in type(parameter).__mro__}
    if kinds & {"DTensor", "FlatParameter", "ShardedTensor"}:
        return "sharded over processes (DTensor or FSDP); gather the full model first"
    if parameter.is_quantized or type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"quantised or otherwise packed ({type(parameter).__name__}); dequantise it first"
    if not parameter.dtype.is_floating_point:
        return f"of dtype {str(parameter.dtype).removeprefix('torch.')}; only real floating-point weights have neurons"
    return ""


# Copies


@torch.inference_mode(mode=False)  # a copy outlives the caller's mode
def copy_structure(
    model: nn.Module, *, replace: Mapping[int, Tensor] | None = None, buffers: Buffers = "own"
) -> nn.Module:
    """Return a new module of the same classes whose parameters are the model's own.

    It is a deep copy in which parameters, hooks and tensors that are not leaves of autograd (cached activations) are
    shared instead of copied. Nothing of `model` changes, and wrappers (DDP, torch.compile) are taken off everywhere.

    Args:
        model: any module.
        replace: the tensor to use in place of a parameter, by the parameter's id.
        buffers: "own" copies the buffers, "shared" shares them.

    Raises:
        TypeError: if an attribute of a module cannot be copied (a lock, an open file); names module and attribute.
        ValueError: if a parameter or buffer is not yet initialised; lists them.
    """
    root = bare(model)
    names: dict[nn.Module, str] = {}
    for prefix, module in all_modules(root):
        names.setdefault(module, prefix.removesuffix("."))
    memo: dict[int, Any] = {}
    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"module '{name or type(module).__name__}' is a compiled TorchScript module, whose weights "
                f"cannot be shared with a copy: give the model as it was before torch.jit.script or torch.jit.trace"
            )
        # Not __new__ of the class: a torch.fx.GraphModule makes a new class there and loses its forward.
        memo[id(module)] = object.__new__(type(module))
    _refuse_uninitialised(names)
    for module in names:
        _share(module, memo, buffers, optimizers=not replace)
    memo.update(replace or {})
    for module, name in names.items():
        _fill(memo[id(module)], module, name, memo)
    for module in names:
        _detach_from_original(memo[id(module)])
    copied: nn.Module = memo[id(root)]
    return copied


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
            f"{len(wrong)} of the model's tensors are not yet initialised (lazy modules): {', '.join(wrong[:10])}"
            f"{', ...' * (len(wrong) > 10)}; run the model on one batch first"
        )


def all_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix, module) for every path to a module, wrappers taken off, parametrizations too."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from all_modules(bare(child), f"{prefix}{name}.")


def _attributes(module: nn.Module) -> Mapping[str, Any]:
    """Return the attributes that a copy of a module takes over: those that its class pickles, where it says which.

    A Lightning module leaves its trainer out, which holds the data, the optimiser and the model once more.
    """
    # The class that torch gives a parametrized module refuses to be pickled.
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    pickled, restored = getattr(kind, "__getstate__", None), getattr(kind, "__setstate__", None)
    default = getattr(object, "__getstate__", None)
    if pickled is None or pickled is default or restored is not nn.Module.__setstate__:
        return vars(module)
    state = pickled(module)
    registered = ("_parameters", "_buffers", "_modules")
    whole = isinstance(state, dict) and all(state.get(key) is vars(module).get(key) for key in registered)
    return state if whole else vars(module)


def _share(module: nn.Module, memo: dict[int, Any], buffers: Buffers, *, optimizers: bool) -> None:
    """Enter into the memo of a deep copy, which has the modules already, what the copy of this one is to share."""
    for parameter in module._parameters.values():
        if parameter is not None:
            memo[id(parameter)] = parameter
    for buffer in module._buffers.values():
        if buffer is not None:
            memo[id(buffer)] = buffer if buffers == "shared" else _clone(buffer)
    for child in module._modules.values():
        if child is not None and bare(child) is not child:
            memo[id(child)] = memo[id(bare(child))]
    for key, value in vars(module).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            for hook in value.values():
                owner = getattr(hook, "__self__", hook)
                # A hook that is a method of one of the model's modules follows that module into the copy;
                # torch's own wrapper holds such a module weakly and knows how to be copied with it.
                if type(hook).__name__ != "_WrappedHook":
                    memo.setdefault(id(owner), owner)
    for held in _held_by_attributes(module, memo):
        if isinstance(held, Optimizer):
            if optimizers:
                memo.setdefault(id(held), held)
        elif isinstance(held, nn.Parameter) or not held.is_leaf:
            memo.setdefault(id(held), held)


def _clone(buffer: Tensor) -> Tensor:
    return buffer if buffer.is_meta else buffer.detach().clone()


def tensors_in_attributes(module: nn.Module, known: Container[int]) -> Iterator[Tensor]:
    """Yield the tensors that a module's plain attributes hold at any depth; objects of a known id are not entered.

    Nor are optimisers, which hold parameters to update them, not to compute with them.
    """
    return (held for held in _held_by_attributes(module, known) if isinstance(held, Tensor))


def _held_by_attributes(module: nn.Module, known: Container[int]) -> Iterator[Tensor | Optimizer]:
    registered = ("_parameters", "_buffers", "_modules")
    # What a deep copy takes as it is needs no look inside, and classes and functions lead everywhere.
    atomic = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType, weakref.ref)
    plain = (str, bytes, int, float, complex, bool, type(None))
    attributes = _attributes(module).items()
    queue = [value for key, value in attributes if key not in registered and not key.endswith("_hooks")]
    seen: dict[int, Any] = {}
    while queue:
        value = queue.pop()
        if id(value) in seen or id(value) in known or isinstance(value, plain + atomic):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor | Optimizer):
            yield value
        else:
            queue.extend(gc.get_referents(value))


def held_elsewhere(model: nn.Module) -> dict[str, str]:
    """Return the parameters that a plain attribute of a module holds too, by name, and the module in words.

    What computes with such an attribute sees neither an edit of a view nor a tensor that `functional_call` puts in the
    parameter's place.
    """
    names = {id(tensor.parameter): name for name, tensor in named_tensors(model).items()}
    # Wrappers inside the model are left out: DDP lists the parameters, but a copy runs without it.
    named = {module: path.removesuffix(".") for path, module in all_modules(bare(model))}
    modules = {id(module): None for module in named}
    held: dict[str, str] = {}
    for module, path in named.items():
        if isinstance(module, nn.RNNBase):
            continue  # its flat list of weights is brought up to date at every forward pass
        for tensor in tensors_in_attributes(module, modules):
            if id(tensor) in names:
                held.setdefault(names[id(tensor)], f"module '{path}' ({type(module).__name__})")
    return held


def _rebound(value: Any, memo: Mapping[int, Any], within: tuple[int, ...] = ()) -> Any:
    """Return a function so that it calls the copy where it called the model, as an uncompiled one; else the value.

    A deep copy takes functions as they are, and with a forward that was replaced by a closure (by `torch.compile`, by
    autocast, by hand) the original would go on to run in the copy.

    Args:
        value: what an attribute or a closure holds.
        memo: the copies of the modules, by the id of the original.
        within: the ids of the functions that this one is in the closure of.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    compiled = getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None
    if compiled is not None:
        return _rebound(compiled, memo, within)
    if isinstance(value, types.MethodType):
        function, owner = _rebound(value.__func__, memo, within), memo.get(id(value.__self__), value.__self__)
        same = function is value.__func__ and owner is value.__self__
        return value if same else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        inner = [value.func, *value.args]
        function, *args = (_rebound(part, memo, within) for part in inner)
        same = all(new is old for new, old in zip([function, *args], inner, strict=True))
        return value if same else functools.partial(function, *args, **value.keywords)
    if not isinstance(value, types.FunctionType) or not value.__closure__ or id(value) in within:
        return value
    contents = [_content(cell) for cell in value.__closure__]
    rebound = [_rebound(content, memo, (*within, id(value))) for content in contents]
    if all(new is old for new, old in zip(rebound, contents, strict=True)):
        return value
    cells = tuple(types.CellType(content) for content in rebound)
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    function.__kwdefaults__ = value.__kwdefaults__
    function.__dict__.update(vars(value))
    return function


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    rebound = _rebound(value, memo)
    return copy.deepcopy(value, memo) if rebound is value else rebound


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _fill(new: nn.Module, module: nn.Module, name: str, memo: dict[int, Any]) -> None:
    attributes = {}
    for key, value in _attributes(module).items():
        try:
            # A compiled forward is bound to the original; the copy runs uncompiled.
            attributes[key] = None if key == "_compiled_call_impl" else _copied(value, memo)
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
        own_class(new)
    if isinstance(new, nn.RNNBase):
        # On CUDA it would move the shared weights into one block of memory.
        new.__dict__["flatten_parameters"] = _keep_parameters


def _keep_parameters() -> None:
    """Stand in for RNNBase.flatten_parameters on a copy that shares its weights."""


def own_class(module: nn.Module, *, assignable: bool = False) -> None:
    """Give a parametrized copy a class of its own, whose properties compute the tensor at every access.

    torch's own property would cache under the id of the module it was made for (`parametrize.cached()`), which is
    another module's, or a dead one's; and its setter would write into the shared parameter.

    Args:
        module: the copy.
        assignable: whether assigning the tensor is allowed, as torch does it: for copies that own their weights.
    """
    kind = type(module)
    namespace = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    setter = _assign if assignable else _refuse_assignment
    for name in parametrizations(module):
        namespace[name] = property(_named(_compute, name), _named(setter, name))
    namespace.pop("register_parameter", None)
    if not assignable:
        namespace["register_parameter"] = functools.partialmethod(_register_parameter, kind.__bases__[0])
    metaclass: Callable[..., type[nn.Module]] = type(kind)
    module.__class__ = metaclass(kind.__name__, kind.__bases__, namespace)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda module, *value: function(name, module, *value)


def _compute(name: str, module: nn.Module) -> Tensor:
    value: Tensor = parametrizations(module)[name]()
    return value


def _assign(name: str, module: nn.Module, value: Tensor) -> None:
    parametrizations(module)[name].right_inverse(value)


def _refuse_assignment(name: str, module: nn.Module, value: object) -> None:
    raise RuntimeError(
        f"'{name}' is computed by a parametrization in this view, which shares its weights with the model it was made "
        f"from; assigning it, or passing it to functional_call under its plain name, would overwrite the original. "
        f"Use the key 'parametrizations.{name}.original', or bake the edit first"
    )


def _register_parameter(module: nn.Module, base: type[nn.Module], name: str, parameter: nn.Parameter | None) -> None:
    """Refuse to assign a parameter as a tensor is refused; torch would only say that the attribute exists."""
    if name in parametrizations(module):
        _refuse_assignment(name, module, parameter)
    base.register_parameter(module, name, parameter)


def set_eval(module: nn.Module) -> nn.Module:
    """Set evaluation mode on a copy by its flags alone, and return it.

    Some classes override `train()` to merge weights or to freeze parameters, which would reach the shared ones.
    """
    for child in module.modules():
        child.training = False
    return module


def plain(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that shares the parameters and in which no tensor is parametrized any more.

    A parametrized tensor is computed once and stands in the copy as a parameter of its own, under its plain name and
    in its plain place. This is what scores, evaluation and sweeps run.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
    """
    copied = set_eval(copy_structure(model, replace=_renormalised(model)))
    computed: dict[int, Tensor] = {}
    parametrized = [module for module in copied.modules() if is_parametrized(module)]
    for module in parametrized:
        for attribute, held in parametrizations(module).items():
            if id(held) not in computed:
                computed[id(held)] = _computed(module, attribute)
            take_off(module, attribute, computed[id(held)])
    return copied


def _renormalised(model: nn.Module) -> dict[int, Tensor]:
    """Return own copies of the weights that a forward pass itself changes: those of embeddings with `max_norm`."""
    own: dict[int, Tensor] = {}
    for _, module in all_modules(bare(model)):
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None and weight is not None:
            own[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return own


def _computed(module: nn.Module, attribute: str) -> Tensor:
    with torch.no_grad():
        value: Tensor = getattr(module, attribute).detach()
    originals = _originals(module, attribute)
    if not any(isinstance(original, nn.Parameter) for original in originals):
        return value
    return nn.Parameter(value, requires_grad=any(original.requires_grad for original in originals))


@contextlib.contextmanager
def one_numerical_path() -> Iterator[None]:
    """Turn torch's fast path of multi-head attention off, whose last bits differ, and restore it afterwards.

    Casts of weights that autocast has kept meanwhile are forgotten too: made without gradient, they would cut the
    caller's next backward pass off.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        torch.clear_autocast_cache()


def take_off(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Put `value` in the place of a parametrized tensor of a copy, as the plain parameter (or buffer) it once was."""
    del module._modules["parametrizations"]._modules[attribute]  # type: ignore[union-attr]
    if not parametrizations(module):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    else:
        own_class(module)
        delattr(type(module), attribute)
    if isinstance(value, nn.Parameter):
        module._parameters[attribute] = value
        order = tensor_attributes(module)
        module._parameters = {name: module._parameters[name] for name in order if name in module._parameters} | {
            name: None for name, parameter in module._parameters.items() if parameter is None
        }
    else:
        module.register_buffer(attribute, value)
