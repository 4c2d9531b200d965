"""Group gradients and their norms: how much the mean loss over a group depends on each neuron.

The model runs through `torch.func.functional_call` on a copy in evaluation mode, with the scored parameters as the only
leaves, and `torch.autograd.grad` differentiates. `torch.func.grad` gives the same numbers in about the same time, but
holds more at once: for one batch of 128 of a ResNet-18 at 64x64 the peak of the process rose by 491 to 505 MB against
300 to 312 MB (two runs of benchmarks/scoring.py --memory; CPU, two threads, torch 2.14.1).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from neuronsurgery.neurons import Layout, Where, find_layout, layer_tensors, random_bits
from neuronsurgery.scores import Scores, checked_seed, norms, refuse_non_finite
from neuronsurgery.structure import bare, held_elsewhere, named_tensors, one_numerical_path, plain
from neuronsurgery.types import (
    IGNORED_TOKEN,
    Batch,
    Group,
    Loader,
    Loaders,
    Loss,
    Predict,
    Unpack,
    extract_logits,
    group_members,
    grouped_alike,
    is_token_classification,
    iterate,
    join,
    model_device,
    move,
    named_loaders,
    ordered_groups,
    refuse_shifted_labels,
    run_apart,
    seal,
    signature,
    take,
    unseal,
)

MEMORY_WARNING = 4e9


# Losses


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each example, shape (n,), float32 or wider: the default loss.

    Args:
        logits: shape (n, classes, ...); or (n, tokens, classes) with targets (n, tokens).
        targets: class indices, int, shape (n, ...), the mean being over the tokens or pixels whose label is not -100
            (0 where there is none); or probabilities, float, of the shape of the logits.

    Raises:
        ValueError: if a label is not one of the classes, or the shapes do not fit.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():
        if targets.shape != logits.shape or logits.dim() < 2:
            raise ValueError(
                f"float targets are probabilities of the logits' shape {tuple(logits.shape)}, not of shape "
                f"{tuple(targets.shape)}: give class indices (targets.long()), or pass loss= for a regression"
            )
        return _mean_of_each(F.cross_entropy(wide, targets.to(wide.dtype), reduction="none"))
    tokens = is_token_classification(logits, targets)
    wide = wide.movedim(-1, 1) if tokens else wide
    if wide.dim() < 2 or targets.shape != wide.shape[:1] + wide.shape[2:]:
        raise ValueError(
            f"class indices for logits of shape {tuple(logits.shape)} (example, class, ...) have shape "
            f"{tuple(logits.shape[:1] + logits.shape[2:])}, not {tuple(targets.shape)}: reshape them, or pass loss="
        )
    return _mean_over_positions(wide, targets)


def _mean_of_each(losses: Tensor) -> Tensor:
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def _mean_over_positions(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each example, classes on axis 1, averaged over its tokens or pixels that count."""
    refuse_unknown_classes(targets, logits.shape[1])
    losses = F.cross_entropy(logits, targets.long(), reduction="none", ignore_index=IGNORED_TOKEN)
    if targets.dim() == 1:
        return losses
    return losses.flatten(1).sum(1) / (targets != IGNORED_TOKEN).flatten(1).sum(1).clamp(min=1)


def refuse_unknown_classes(targets: Tensor, classes: int) -> None:
    """Raise if a class index is not one of the classes; -100 marks a token or pixel that does not count.

    Raises:
        ValueError: if there is one; shows some of them.
    """
    known = (targets >= 0) & (targets < classes)
    if targets.dim() > 1:
        known |= targets == IGNORED_TOKEN
    if not known.all():
        wrong = sorted(set(targets[~known].tolist()))[:5]
        hint = ""
        if classes == 1:
            hint = "; for one logit pass loss= with binary_cross_entropy_with_logits(..., reduction='none')"
        raise ValueError(f"labels must be 0..{classes - 1} for {classes} classes, found {wrong}{hint}")


def causal_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean next-token cross entropy of each sequence, shape (n,): logits at t against the label at t + 1.

    Args:
        logits: shape (n, tokens, vocabulary).
        targets: token ids, int, shape (n, tokens); -100 is left out.

    Raises:
        ValueError: if the shapes do not fit or a label is not in the vocabulary.

    Example:
        >>> causal_lm_loss(torch.zeros(1, 3, 7), torch.tensor([[2, 5, -100]]))
        tensor([1.9459])
    """
    if logits.dim() != 3 or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"causal_lm_loss takes logits (example, token, vocabulary) and token ids (example, token), not shapes "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).movedim(-1, 1)
    return _mean_over_positions(wide, targets[:, 1:])


def example_losses(loss: Loss | None, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each example, shape (n,).

    Raises:
        ValueError: if `loss` gives something else than one number per example.
    """
    losses = (loss or cross_entropy)(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape[:1]:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"loss must return one loss per example, shape ({len(targets)},), not {found}: write it with "
            f'reduction="none" and average over anything but the examples'
        )
    return losses


def _refuse_bad_losses(losses: Tensor, what: str) -> None:
    wrong = int((~torch.isfinite(losses)).sum())
    if wrong:
        raise ValueError(
            f"the loss of {wrong} of {len(losses)} examples of {what} is NaN or infinite: look for bad inputs, or for "
            f"a model that has diverged"
        )


# Gradients


class _Within(nn.Module):
    """A model and a function to be called while the model's parameters are replaced.

    The backward pass runs in there too: activation checkpointing runs parts of the model again, and must meet the
    same parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class _Differentiator:
    """The model as a function of its scored parameters: gradients of the summed loss of a batch.

    Attributes:
        layout: the scored layers.
        leaves: the scored tensors by name, sharing the model's memory; only these get a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        where: Where | None,
        extra: str | Sequence[str] | None,
        predict: Predict | None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "gradients cannot be computed inside torch.inference_mode(): leave it, or use torch.no_grad(), in "
                "which this function works"
            )
        if loss is None:
            refuse_shifted_labels(bare(model), "the default loss", "loss=neuronsurgery.causal_lm_loss")
        self.layout: Layout = find_layout(model, where, extra)
        self.runner = plain(model)
        self.loss, self.predict = loss, predict
        scored = layer_tensors(self.runner, self.layout)
        refuse_non_finite(norms(scored, self.layout), self.layout, "the model's weights are")
        self.leaves = {name: _differentiable(tensor).requires_grad_() for name, tensor in scored.items()}
        rest = {name: _differentiable(tensor.parameter) for name, tensor in named_tensors(self.runner).items()}
        self.within = _Within(self.runner)
        self.parameters = {f"model.{name}": tensor for name, tensor in (rest | self.leaves).items()}
        self.device = model_device(self.runner)
        self.warned = loss is not None
        self.reached: set[str] = set()

    def zeros(self) -> dict[str, Tensor]:
        """Return zeros to add gradients to, in float32 or wider."""
        return {
            name: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32), requires_grad=False)
            for name, leaf in self.leaves.items()
        }

    def add(self, sums: dict[str, Tensor], batch: Batch, group: Group) -> None:
        """Add to `sums` the gradients of the summed loss of a batch."""
        if self.device is not None:
            batch = move(batch, self.device)
        with torch.enable_grad(), _differentiable_rnns(self.runner, self.device):
            logits, gradients = functional_call(self.within, self.parameters, (self._gradients, batch, group))
        self._warn_of_probabilities(logits)
        for (name, total), gradient in zip(sums.items(), gradients, strict=True):
            if gradient is not None:
                self.reached.add(name)
                total.add_(gradient, alpha=len(batch))

    def _gradients(self, batch: Batch, group: Group) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return the logits and the gradients of the mean loss of a batch; to be called with the leaves in place."""
        logits = extract_logits(run_apart(self.runner, batch), self.predict, len(batch))
        losses = example_losses(self.loss, logits, batch.targets)
        _refuse_bad_losses(losses, f"group {group!r}")
        if not losses.requires_grad:
            return logits.detach(), [None] * len(self.leaves)
        leaves = list(self.leaves.values())
        if _is_float16(logits, leaves):
            return logits.detach(), _scaled_gradients(losses, leaves)
        # The mean, not the sum, so that half-precision gradients stay in range whatever the batch size.
        return logits.detach(), torch.autograd.grad(losses.mean(), leaves, allow_unused=True)

    def norms(self, sums: dict[str, Tensor], count: int, group: Group) -> Tensor:
        """Return the norm of each neuron's gradient of the mean loss, float32, shape (M,)."""
        values = norms(sums, self.layout) / count
        refuse_non_finite(values, self.layout, f"the gradients of group {group!r} are")
        return values

    def warn_of_unreached(self, stacklevel: int) -> None:
        """Warn of scored layers that no gradient came to in any batch, and of parameters used in ways it cannot see."""
        scored = [layer.parameter for layer in self.layout]
        held = held_elsewhere(self.runner)
        partly = [f"{name} (by {held[name]})" for name in scored if name in held]
        if partly:
            warnings.warn(
                f"some scored parameters are held by plain attributes, too: {_some(partly)}. What is computed with "
                f"these counts in no score: use the registered parameter, or leave these layers out with where=",
                stacklevel=stacklevel,
            )
        missed = [name for name in scored if name not in self.reached]
        if missed:
            warnings.warn(
                f"no gradient reached {len(missed)} of {len(scored)} scored layers, whose scores are 0: "
                f"{_some(missed)}. The loss does not depend on them, or something cuts the gradient off (no_grad or "
                f"detach in the forward or in predict=, checkpointing with use_reentrant=True)",
                stacklevel=stacklevel,
            )

    def _warn_of_probabilities(self, values: Tensor) -> None:
        if self.warned:
            return
        self.warned = True
        axis = 1 if values.dim() != 3 else 2
        if values.dim() < 2 or values.shape[axis] < 2 or values.min() < 0:
            return
        if torch.allclose(values.sum(axis), torch.ones_like(values.sum(axis)), atol=1e-3):
            warnings.warn(
                "the model's outputs look like probabilities (a softmax inside the model?); the cross entropy of them "
                "flattens the gradient and changes the ranking of neurons: pass predict= to take the logits, or loss=",
                stacklevel=5,  # the caller of group_grad_norms, whose generator calls `add`
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def _is_float16(logits: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether a part of the backward pass may be in float16, which has no numbers under 6e-8."""
    device = logits.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(tensor.dtype == torch.float16 for tensor in (logits, *leaves))


def _scaled_gradients(losses: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of the mean loss, its backward pass run on a multiple of it, in float32.

    For a cross entropy l the largest entry of an example's gradient to its logits is 1 - exp(-l): the multiple, a power
    of two, brings that of the hardest example to about 1. Where this overflows, the mean itself is differentiated.
    """
    steepest = -math.expm1(-max(float(losses.detach().max()), 1e-12)) / len(losses)
    multiple = 2.0 ** max(0, round(-math.log2(steepest)))
    gradients = torch.autograd.grad(losses.mean() * multiple, leaves, allow_unused=True, retain_graph=True)
    if not all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return torch.autograd.grad(losses.mean(), leaves, allow_unused=True)
    return [None if gradient is None else gradient.float() / multiple for gradient in gradients]


def _differentiable(tensor: Tensor) -> Tensor:
    """Return the tensor detached; one made in inference mode copied, since autograd cannot save such a tensor."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _differentiable_rnns(model: nn.Module, device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which recurrent layers in evaluation mode can be differentiated: cuDNN's cannot."""
    if device is None or device.type != "cuda" or not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=False)


def group_grad_norms(
    model: nn.Module,
    loaders: Loaders,
    *,
    loss: Loss | None = None,
    where: Where | None = None,
    extra: str | Sequence[str] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Scores:
    """Return each group's gradient norm of every neuron, ||v(i, j)||_2, v(i, j) = d/dz_i of the mean loss over group j.

    Each example costs one forward and one backward pass, whatever the number of groups: mixed batches are regrouped on
    the fly, examples being joined only with others of the same shapes. The model runs in evaluation mode on a copy that
    shares its weights; nothing of it changes, and only the scored parameters get a gradient, frozen ones too. It works
    inside `no_grad` and under the caller's autocast (a bfloat16 backward pass is itself good to about 2 %). Sums are in
    float32 or wider.

    Memory: one copy of the scored gradients for a mapping of loaders; for a mixed stream one per group (a warning
    above 4 GB names the way out: a mapping of loaders), and up to one batch of waiting examples per group.

    Args:
        model: any module.
        loaders: a mapping group -> iterable of batches (whose own groups are then ignored), or one iterable of mixed
            batches that carry a group per example. Batches without groups are one group "all".
        loss: (logits, targets) -> one loss per example; default `cross_entropy`.
        where: which layers, see `find_layout`.
        extra: layers to add, see `find_layout`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`, for forms that `Batch` does not name.
        progress: whether to write a line of progress to standard error.
        process_group: reduce over its ranks, each of which gives its share of the data; every rank gets the same
            scores. None communicates nothing.

    Returns:
        Scores of shape (G, M). Groups in the order of the mapping, or ascending.

    Raises:
        RuntimeError: inside `inference_mode`, or if another rank failed.
        TypeError: if a batch has an unknown form, or the name of a group is no integer or string.
        KeyError: if a glob matches nothing.
        ValueError: if a group has no examples, a label is not one of the classes, the loss is not one number per
            example, or a loss, weight or gradient is NaN or infinite; names the group and the layers.

    Warns:
        UserWarning: if no gradient reached some layers, if the outputs look like probabilities, or if much memory is
            needed; says what to do.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> images, labels, groups = torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> group_grad_norms(model, [(images, labels, groups)]).values
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Source:
        You et al., "The Silent Majority", 2025.
    """
    loaders = named_loaders(loaders)
    differentiator = _agreed(process_group, lambda: _Differentiator(model, loss, where, extra, predict))
    rows: dict[Group, Tensor] = {}
    counts: dict[Group, int] = {}
    if isinstance(loaders, Mapping):
        passes = _mapped_sums(differentiator, loaders, unpack, progress, process_group)
    else:
        passes = _mixed_sums(differentiator, loaders, unpack, progress, process_group)
    for group, sums, count in passes:
        if count == 0:
            raise ValueError(
                f"group {group!r} has no examples: its loader yielded no batch. An iterator or generator is exhausted "
                f"after one pass; give a list or a DataLoader"
            )
        rows[group] = differentiator.norms(sums, count, group)
        counts[group] = count
    for reached in exchange(process_group, None, differentiator.reached):
        differentiator.reached |= reached
    differentiator.warn_of_unreached(stacklevel=3)
    groups = tuple(rows)
    return Scores(
        torch.stack([rows[group] for group in groups]),
        groups,
        tuple(counts[group] for group in groups),
        differentiator.layout,
        "gradient norm",
    )


def _agreed(process_group: dist.ProcessGroup | None, make: Callable[[], _Differentiator]) -> _Differentiator:
    """Return what `make` gives, once every rank has one of the same layers."""
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    digests = exchange(process_group, error, made and made.layout.digest)
    assert made is not None
    if len(set(digests)) > 1:
        raise ValueError("the processes score different layers: give each the same model, where= and extra=")
    return made


Sums: TypeAlias = tuple[Group, dict[str, Tensor], int]


def _mapped_sums(
    differentiator: _Differentiator,
    loaders: Mapping[Any, Loader],
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> Iterator[Sums]:
    """Yield one group at a time, so that one copy of the gradients is enough."""
    names = list(dict.fromkeys(name for share in exchange(process_group, None, list(loaders)) for name in share))
    if not names:
        raise ValueError("the mapping of loaders is empty: give at least one group")
    sums = differentiator.zeros()
    for name in names:
        count, error = 0, None
        for total in sums.values():
            total.zero_()
        label = f"gradients of {name}" if progress else None
        try:
            for batch in iterate(loaders.get(name, ()), unpack=unpack, progress=label):
                differentiator.add(sums, batch, name)
                count += len(batch)
        except Exception as raised:
            error = raised
        yield name, sums, _reduce(process_group, error, sums, count)


def _mixed_sums(
    differentiator: _Differentiator,
    loader: Loader,
    unpack: Unpack | None,
    progress: bool,
    process_group: dist.ProcessGroup | None,
) -> Iterator[Sums]:
    """Yield the groups of one mixed stream, after it has run through."""
    sums: dict[Group, dict[str, Tensor]] = {}
    counts: dict[Group, int] = {}
    error = None
    try:
        for group, batch in _regroup(iterate(loader, unpack=unpack, progress="gradients" if progress else None)):
            if group not in sums:
                sums[group], counts[group] = differentiator.zeros(), 0
                _warn_of_memory(sums)
            differentiator.add(sums[group], batch, group)
            counts[group] += len(batch)
    except Exception as raised:
        error = raised
    present = ordered_groups(group for share in exchange(process_group, error, list(sums)) for group in share)
    if not present:
        raise ValueError(
            "the loader yielded no batch. An iterator or generator is exhausted after one pass; give a list or a "
            "DataLoader"
        )
    for group in present:
        total = sums.pop(group) if group in sums else differentiator.zeros()
        yield group, total, _reduce(process_group, None, total, counts.get(group, 0))


def _regroup(batches: Iterable[Batch]) -> Iterator[tuple[Group, Batch]]:
    """Yield (group, batch of that group alone), examples joined with others of the same shapes into full batches.

    A full batch is as large as the largest of the stream. Where the shapes vary, at most as many examples wait as with
    one shape: then the ones that have waited longest run as they are.
    """
    waiting: dict[tuple[Group, Any], Batch] = {}
    groups: set[Group] = set()
    full = 0
    for batch in grouped_alike(batches):
        full = max(full, len(batch))
        members = group_members(batch.groups or ["all"] * len(batch))
        groups |= set(members)
        shape = signature(batch)
        batch = seal(batch)
        for group, indices in members.items():
            whole = len(members) == 1 and len(batch) == full and (group, shape) not in waiting
            part = batch if whole else take(batch, indices)  # what waits is a copy: a loader may reuse its memory
            if (group, shape) in waiting:
                part = join([waiting.pop((group, shape)), part])
            while len(part) >= full:
                yield group, unseal(take(part, range(full)))
                part = take(part, range(full, len(part)))
            if len(part):
                waiting[group, shape] = part
        while sum(map(len, waiting.values())) > len(groups) * full:
            oldest = next(iter(waiting))
            yield oldest[0], unseal(waiting.pop(oldest))
    for (group, _), part in waiting.items():
        yield group, unseal(part)


def _warn_of_memory(sums: Mapping[Group, Mapping[str, Tensor]]) -> None:
    one = sum(total.numel() * total.element_size() for total in next(iter(sums.values())).values())
    if one * len(sums) > MEMORY_WARNING >= one * (len(sums) - 1):
        warnings.warn(
            f"a mixed stream holds one copy of the scored gradients per group, so far {len(sums)} of "
            f"{one / 1e9:.2g} GB: a mapping group -> loader needs one copy in all",
            stacklevel=4,
        )


def exchange(process_group: dist.ProcessGroup | None, error: Exception | None, payload: Any) -> list[Any]:
    """Return what every rank gives, or raise on all of them if one has an error."""
    if process_group is None:
        if error is not None:
            raise error
        return [payload]
    said: list[Any] = [None] * dist.get_world_size(process_group)
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(said, (text, payload), group=process_group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(said) if text is not None]
    if failed:
        raise RuntimeError("another process failed, so none has a result:\n" + "\n".join(failed))
    return [payload for _, payload in said]


def _reduce(
    process_group: dist.ProcessGroup | None, error: Exception | None, sums: dict[str, Tensor], count: int
) -> int:
    """Sum the gradients over the ranks, in place, and return the summed count."""
    counts: list[int] = exchange(process_group, error, count)
    if process_group is not None:
        for total in sums.values():
            dist.all_reduce(total, group=process_group)
    return sum(counts)


def grad_norms(gradients: Mapping[str, Tensor | None], layout: Layout) -> Scores:
    """Return the norms ||g_i||_2 of every neuron's slice of gradients that the caller has already, group "all".

    Args:
        gradients: a gradient per layer, of the parameter's shape, by any of its names: for instance
            `{name: p.grad for name, p in model.named_parameters()}`. None counts as zero; other entries are ignored.
        layout: the layers to score, see `find_layout`.

    Returns:
        Scores of shape (1, M).

    Raises:
        ValueError: if a layer has no entry or one of another shape (lists all), or a gradient is NaN or infinite.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> grad_norms({"weight": model.weight.grad}, find_layout(model)).values
        tensor([[5., 5.]])
    """
    named: dict[str, Tensor | None] = {}
    for name, gradient in gradients.items():
        known = name if name in layout else name.replace("_orig_mod.", "").removeprefix("module.")
        if known in layout:
            named[layout[known].parameter] = None if gradient is None else gradient.to_dense()
    wrong = []
    for layer in layout:
        expected = layer.weight(torch.empty((layer.count, *layer.row_shape), device="meta")).shape
        if layer.parameter not in named:
            wrong.append(f"  {layer.parameter}: no gradient given")
        elif (found := named[layer.parameter]) is not None and found.shape != expected:
            wrong.append(f"  {layer.parameter}: expected shape {tuple(expected)}, given {tuple(found.shape)}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} layers of the layout have no fitting gradient:\n"
            + "\n".join(wrong)
            + "\nGive one entry per layer, or make the layout smaller with where="
        )
    values = norms(named, layout)
    refuse_non_finite(values, layout, "the gradients are")
    return Scores(values[None], ("all",), (0,), layout, "gradient norm")


# Hard examples


def hard_batch(
    model: nn.Module,
    loader: Loader,
    *,
    top: int = 256,
    sample: int = 128,
    seed: int = 0,
    per_group: bool = False,
    loss: Loss | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
) -> Batch:
    """Return `sample` examples drawn at random from the `top` of highest loss, as one batch.

    It needs no group labels. A batch in a list is a loader: `group_grad_norms(model, {"hard": [hard_batch(...)]})`.

    Args:
        model: any module; runs in evaluation mode on a copy, without gradient.
        loader: an iterable of batches, all of one shape.
        top: from how many of the highest loss to draw (all, where there are fewer); ties go to the earlier example.
        sample: how many to draw without replacement (all, where there are fewer).
        seed: of the draw, an integer of at least 0.
        per_group: whether to take `top` and `sample` of each group of the batches instead of all examples.
        loss: (logits, targets) -> one loss per example; default `cross_entropy`.
        predict: the model's output -> logits.
        unpack: what a loader yields -> `Batch`.

    Returns:
        The batch, examples in the order of the loader (with `per_group` within each group, groups ascending), on the
        loader's device.

    Raises:
        ValueError: if `top` or `sample` is less than 1, the seed is negative, there are no examples, their shapes
            differ, or a loss is NaN or infinite.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> data = [(torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([0, 1, 1]))]
        >>> len(hard_batch(model, data, top=2, sample=1))
        1

    Source:
        You et al., "The Silent Majority", 2025 (256 hardest, 128 of them).
    """
    if top < 1 or sample < 1:
        raise ValueError(f"top and sample must be at least 1, not {top} and {sample}")
    seed = checked_seed(seed)
    if loss is None:
        refuse_shifted_labels(bare(model), "the default loss", "loss=neuronsurgery.causal_lm_loss")
    runner = plain(model)
    device = model_device(runner)
    pools: dict[Group, _Hardest] = {}
    shapes: set[Any] = set()
    with torch.no_grad(), one_numerical_path():
        for batch in iterate(loader, unpack=unpack):
            shapes.add(signature(batch))
            if len(shapes) > 1:
                raise ValueError(
                    "examples of different shapes, or of batches with different further arguments, cannot be joined "
                    "into one batch: pad them to one length in the loader"
                )
            moved = batch if device is None else move(batch, device)
            logits = extract_logits(run_apart(runner, moved), predict, len(batch))
            losses = example_losses(loss, logits, moved.targets).double().cpu()
            _refuse_bad_losses(losses, "a batch")
            groups = batch.groups if per_group and batch.groups is not None else ["all"] * len(batch)
            for group, indices in group_members(groups).items():
                pools.setdefault(group, _Hardest(top)).add(take(seal(batch), indices), losses[indices])
    if not pools:
        raise ValueError(
            "the loader yielded no batch: an iterator is exhausted after one pass, give a list or a loader"
        )
    drawn = [pools[group].draw(sample, f"hard\0{seed}\0{group}") for group in ordered_groups(pools)]
    return unseal(join(drawn))


class _Hardest:
    """A running pool of the examples of highest loss."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.batch: Batch | None = None
        self.losses = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, batch: Batch, losses: Tensor) -> None:
        together = batch if self.batch is None else join([self.batch, batch])
        self.losses = torch.cat([self.losses, losses])
        kept = self.losses.sort(descending=True, stable=True).indices[: self.top].sort().values
        self.batch = take(together, kept.tolist())
        self.losses = self.losses[kept]

    def draw(self, sample: int, key: str) -> Batch:
        assert self.batch is not None
        tickets = random_bits(key, len(self.batch))
        drawn = sorted(tickets.argsort(kind="stable")[:sample].tolist())
        return take(self.batch, drawn)
